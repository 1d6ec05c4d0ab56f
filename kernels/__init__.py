"""The operators of `refllm.ops` on Torch tensors, by the same names and signatures; imported as `refllm.kernels`.

    refllm.kernels.rms_norm(x, weight, eps)          # Triton: kernels/triton/rms_norm.py
    refllm.kernels.plain.rms_norm(x, weight, eps)    # plain Torch: kernels/plain/norm.py
    refllm.kernels.rms_norm_backward(dy, x, weight, eps)    # its gradients, which autograd finds through it as well

Neither stands in for the other on its own: the caller chooses. Triton kernels need a GPU, or `interpreted()`:

    with refllm.kernels.interpreted():               # the repaired interpreter: any Triton kernel, on the CPU
        refllm.kernels.rms_norm(x, weight, eps)

Nothing here is imported before it is used, so that this package can be imported without Torch and Triton: the pytest
plugin is, in every run of pytest where refllm is installed.
"""

import importlib
from typing import Any

from refllm import extras

_BESIDE = ("OPERATORS", "cuda_stand_in", "fast_class", "interpreted", "patch", "plain", "register", "unpatch")


def __getattr__(name: str) -> Any:
    if name in ("OPERATORS", "__all__"):
        operators = importlib.import_module("refllm.ops.contracts").OPERATORS
        return operators if name == "OPERATORS" else [*operators, *_BESIDE]
    if name == "interpreted":
        extras.require("refllm.kernels.interpreted", "torch", "triton")
        return _import("refllm.kernels.interpreter").interpreted
    if name == "cuda_stand_in":
        extras.require("refllm.kernels.cuda_stand_in", "torch", "triton")
        return _import("refllm.kernels.interpreter").cuda_stand_in
    if name == "fast_class":
        return _import("refllm.kernels.models.fast_model").fast_class
    if name in ("patch", "unpatch", "register"):
        return getattr(_import("refllm.kernels.transformers"), name)
    if name == "plain":
        return _import("refllm.kernels.plain")
    if name.removesuffix("_backward") in __getattr__("OPERATORS"):
        return getattr(_import("refllm.kernels.triton"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = extras.optional_package(error)
        if missing is None:
            raise
        raise extras.missing_extra(module, missing) from error
