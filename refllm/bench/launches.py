"""Which kernels a call of an operator starts on a target. Tensors may be shapes without memory ("meta")."""

from collections.abc import Callable, Sequence
from typing import Any

from refllm.bench.workloads import Arguments


def launches(operator: str, call: Arguments, target: Any) -> list[Any]:
    """The starts of kernels that a call on `target` consists of."""
    from refllm.kernels.triton import KERNELS

    files = {module.__name__.rsplit(".", 1)[1]: module for module in KERNELS}
    file, given = _GIVEN[operator]
    planned = files[file].plan(*given(*call[0], **call[1]), target=target)[0]
    return list(planned) if isinstance(planned, list | tuple) else [planned]


def _attention(q: Any, k: Any, v: Any) -> Sequence[Any]:
    return q, k, v, q.shape[-1] ** -0.5, True, None


def _losses(*arguments: Any, reduction: str) -> Sequence[Any]:
    return *arguments, -100, reduction


# Operator -> (kernel file, arguments of its `plan` up to the target).
_GIVEN: dict[str, tuple[str, Callable[..., Sequence[Any]]]] = {
    "rms_norm": ("rms_norm", lambda x, weight, eps: (x, None, weight, eps)),
    "add_rms_norm": ("rms_norm", lambda *given: given),
    "layer_norm": ("layer_norm", lambda x, *rest: (x, None, *rest)),
    "add_layer_norm": ("layer_norm", lambda *given: given),
    "rope": ("rope", lambda *given, interleaved: (*given, interleaved)),
    "norm_rope": ("norm_rope", lambda *given, norm, interleaved: (*given, norm, interleaved)),
    "rms_norm_qkv_rope": ("rms_norm_qkv_rope", lambda *given, **heads: (*given, *heads.values())),
    "attention": ("attention", _attention),
    "decode_attention": ("decode_attention", lambda q, *rest: (q, *rest, q.shape[-1] ** -0.5)),
    "swiglu": ("swiglu", lambda *given: given),
    "relu2": ("relu2", lambda *given: given),
    "cross_entropy": ("cross_entropy", _losses),
    "linear_cross_entropy": ("linear_cross_entropy", _losses),
}
