"""The operators of `refllm.ops` on Torch tensors, by the same names and signatures; imported as `refllm.kernels`.

    refllm.kernels.rms_norm(x, weight, eps)          # Triton: kernels/triton/rms_norm.py
    refllm.kernels.plain.rms_norm(x, weight, eps)    # plain Torch: kernels/plain/norm.py

Neither stands in for the other on its own: the caller chooses. Triton kernels need a GPU, or `interpreted()`:

    with refllm.kernels.interpreted():               # the repaired interpreter: any Triton kernel, on the CPU
        refllm.kernels.rms_norm(x, weight, eps)

Nothing here is imported before it is used, so that this package can be imported without Torch and Triton.
"""

import importlib
from typing import Any

from refllm import extras
from refllm.ops.contracts import OPERATORS

__all__ = [*OPERATORS, "OPERATORS", "fast_class", "interpreted", "patch", "plain", "register", "unpatch"]


def __getattr__(name: str) -> Any:
    if name in OPERATORS:
        return getattr(_import("refllm.kernels.triton"), name)
    if name == "interpreted":
        extras.require("refllm.kernels.interpreted", "torch", "triton")
        return _import("refllm.kernels.interpreter").interpreted
    if name == "fast_class":
        return _import("refllm.kernels.models.fast_model").fast_class
    if name in ("patch", "unpatch", "register"):
        return getattr(_import("refllm.kernels.transformers"), name)
    if name == "plain":
        return _import("refllm.kernels.plain")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = extras.optional_package(error)
        if missing is None:
            raise
        raise extras.missing_extra(module, missing) from error
