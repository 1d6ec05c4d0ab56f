"""The definitions: one pure function of arrays per operator. What they compute is what every kernel must compute.

Called directly they are exact: inputs are taken as float64 and nothing is rounded. Called with `ar=` (a
`refllm.precision.Arithmetic`) they emulate another precision. Model pages call them through
`refllm.forward.operators.Operators`, which fixes `ar` once.

Shape suffixes name the axes: B batch, S query positions, T key positions, E hidden_size, F intermediate_size, H query
heads, K key/value heads, D head_dim, R rotary dims, V vocabulary, L layers, C classes, N rows of any kind.
"""

from importlib import import_module

# Each file says what it exports, so that a new definition is named once.
from refllm.ops.activation import *  # noqa: F403
from refllm.ops.activation_backward import *  # noqa: F403
from refllm.ops.attention import *  # noqa: F403
from refllm.ops.attention_backward import *  # noqa: F403
from refllm.ops.linear import *  # noqa: F403
from refllm.ops.linear_backward import *  # noqa: F403
from refllm.ops.loss import *  # noqa: F403
from refllm.ops.loss_backward import *  # noqa: F403
from refllm.ops.norm import *  # noqa: F403
from refllm.ops.norm_backward import *  # noqa: F403
from refllm.ops.rope import *  # noqa: F403
from refllm.ops.rope_backward import *  # noqa: F403

_FORWARD = ("activation", "attention", "linear", "loss", "norm", "rope")
_FILES = (*_FORWARD, *(f"{name}_backward" for name in _FORWARD))
__all__ = sorted(name for file in _FILES for name in import_module(f"{__name__}.{file}").__all__)
