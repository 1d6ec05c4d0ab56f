"""The operators in plain Torch: short, on any device, with the names, signatures and checks of the Triton forms.

    plain.rms_norm(x, weight, eps)             # meets the contract: float32 inside, rounded once
    plain.rms_norm_backward(dy, x, weight, eps)    # its gradients, as `refllm.ops.rms_norm_backward`
    plain.EAGER["rms_norm"](x, weight, eps)    # as anybody would write it: what a kernel has to beat

All are found by the operator's name in the files of this folder, the last as eager_rms_norm.
"""

import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from refllm.ops.contracts import OPERATORS

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


BACKWARD = tuple(f"{name}_backward" for name in ("linear", "embedding", "softmax", *OPERATORS))
"""The functions of gradients: those of the operators, and of parts that models train besides."""


def _found(names: Iterable[str], prefix: str = "") -> dict[str, Callable[..., Any]]:
    files = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    known = ((name, file, getattr(file, prefix + name, None)) for name in names for file in files)
    return {name: made for name, file, made in known if made is not None and made.__module__ == file.__name__}


EAGER = _found(OPERATORS, "eager_")
"""One library call after the other, rounding where Torch does, after each step: a little more often than the contract.
Signatures as in `refllm.kernels`. `torch.compile` gets these too, and goldens are confirmed by them in float64. None of
attention, which is a library call itself."""

__all__ = [*OPERATORS, *BACKWARD]
globals().update(_found(__all__))
