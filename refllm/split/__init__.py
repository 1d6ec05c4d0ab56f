"""How a model is split over devices: the laws of tensor, sequence, context and data parallel runs, as definitions.

Every function computes over a list of parts, one per rank, what the ranks of a distributed program compute together;
what they send each other is spelled as plain NumPy. The law of each is that the parts together are the whole: the same
result, and the same gradients, as the operator of `refllm.ops` on the tensors before they were cut.

Names that end in `_P` are such lists. Words as in PyTorch's DTensor: a tensor is sharded (each rank holds a part of
it), replicated (each holds all of it) or partial (the sum over the ranks is the tensor).
"""

from importlib import import_module

# Each file says what it exports, so that a new definition is named once.
from refllm.split.attention import *  # noqa: F403
from refllm.split.cuts import *  # noqa: F403
from refllm.split.linear import *  # noqa: F403
from refllm.split.loss import *  # noqa: F403
from refllm.split.norm import *  # noqa: F403
from refllm.split.reduction import *  # noqa: F403

_FILES = ("attention", "cuts", "linear", "loss", "norm", "reduction")
__all__ = sorted(name for file in _FILES for name in import_module(f"{__name__}.{file}").__all__)
