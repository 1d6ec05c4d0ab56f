"""Who computes an operator: this project's kernels and, in the same run, everybody else's that is installed.

    triton              refllm.kernels; without a GPU interpreted: checked, but not timed
    plain               refllm.kernels.plain
    eager, compile      refllm.kernels.plain.EAGER, as it stands and through torch.compile
    liger               Liger-Kernel
    math, flash, efficient, cudnn   the backends of torch.nn.functional.scaled_dot_product_attention, one at a time

What is missing, or does not take a call, raises `NotTakenError` with the reason in a clause: that is then a row.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refllm.errors import InputError, RefllmError

SDPA = ("math", "flash", "efficient", "cudnn")
ATTENTION = ("attention", "decode_attention")
PEERS = ("plain", "eager", "compile", "liger", "sdpa")
MATH_BYTES = 16 << 30
"""The backend "math" stores the scores; it is left out where they would take more."""

Thunk = Callable[[], Any]


class NotTakenError(RefllmError):
    """A peer is not installed, or has no such operator, or not for this call."""


@dataclass(frozen=True)
class Noted:
    """A call that is timed, and what its row has to say about it."""

    call: Thunk
    note: str

    def __call__(self) -> Any:
        return self.call()


@dataclass(frozen=True)
class Form:
    """name: as a row shows it. ours: of this project, so that a wrong result is a finding.

    bind(arguments, keywords): a call without arguments; what it prepares there is not timed. graph: whether a CUDA
    graph can record it. reusable: False if it changes its inputs. note: why it is checked and not timed.
    """

    name: str
    ours: bool
    bind: Callable[[Sequence[Any], dict[str, Any]], Thunk]
    graph: bool = True
    reusable: bool = True
    note: str = ""


def forms(operator: str, device: str, peers: Sequence[str]) -> Iterator[Form]:
    """The Triton kernel and these peers (of `PEERS`). Raises InputError for an unknown one."""
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"--peers {peer} is not known: use {', '.join(PEERS)}, or none")
    yield triton_form(operator, device)
    attends = operator in ATTENTION
    for peer in peers:
        if peer == "sdpa":
            yield from (sdpa_form(operator, name) for name in SDPA if attends)
        elif peer == "plain" or not attends:
            yield _MAKERS[peer](operator, device)


def triton_form(operator: str, device: str) -> Form:
    """refllm.kernels.OPERATOR; on a CPU on the interpreter."""
    from refllm import kernels

    function = getattr(kernels, operator)
    if device == "cuda":
        return Form("triton", True, lambda a, k: lambda: function(*a, **k))

    def interpreted(arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
        def call() -> Any:
            with kernels.interpreted():
                return function(*arguments, **keywords)

        return call

    return Form("triton", True, interpreted, note="not timed: interpreted")


def _plain(operator: str, device: str) -> Form:
    from refllm import kernels

    function = getattr(kernels.plain, operator)
    waits = operator in ATTENTION  # it looks whether a product is finite
    return Form("plain", True, lambda a, k: lambda: function(*a, **k), graph=not waits)


def _eager(operator: str, device: str) -> Form:
    from refllm.kernels import plain

    function = plain.EAGER[operator]
    return Form("eager", False, lambda a, k: lambda: function(*a, **k))


def _compile(operator: str, device: str) -> Form:
    import torch

    from refllm.kernels import plain

    made: list[Any] = []

    def bind(arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
        if not made:  # once for all sets of inputs; a form lives for one job, so each shape is compiled for itself
            torch._dynamo.reset()
            made.append(torch.compile(plain.EAGER[operator], dynamic=False))
        return lambda: made[0](*arguments, **keywords)

    return Form("compile", False, bind)


def _liger(operator: str, device: str) -> Form:
    """Liger's function for the operator, on the interpreter without a GPU."""

    def bind(arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
        try:
            from liger_kernel.transformers import functional
        except ModuleNotFoundError as error:
            raise NotTakenError(f"{error.name} is not installed") from None
        if operator not in _LIGER:
            raise NotTakenError("Liger-Kernel has no such operator")
        call = _LIGER[operator](functional, arguments, keywords)
        return call if device == "cuda" else _on_interpreter(call)

    waits = operator in ("cross_entropy", "linear_cross_entropy")  # it counts the labels
    note = "" if device == "cuda" else "not timed: interpreted"
    return Form("liger", False, bind, graph=not waits, reusable=operator != "rope", note=note)


def _on_interpreter(call: Thunk) -> Thunk:
    from refllm import kernels

    def interpreted() -> Any:
        with kernels.interpreted():
            return call()

    return interpreted


def _liger_rope(f: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
    """Rotates in place: on copies, made once."""
    import torch

    if keywords["interleaved"]:
        raise NotTakenError("Liger-Kernel rotates half-split pairs only")
    q, k, cos, sin = arguments
    q, k = (x.transpose(1, 2).clone().transpose(1, 2) for x in (q, k))
    wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    R = wide[0].shape[-1]
    return lambda: f.liger_rope(q, k, *wide, rotary_dim=None if q.shape[-1] == R else R)


def _liger_swiglu(f: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
    """Liger's SwiGLU gets dense tensors: two halves of one it would copy first."""
    gate, up = (x.contiguous() for x in arguments)
    return lambda: f.liger_swiglu(gate, up)


_LIGER: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Thunk]] = {
    "rms_norm": lambda f, a, k: lambda: f.liger_rms_norm(*a, 0.0, "llama", False),
    "add_rms_norm": lambda f, a, k: lambda: f.liger_fused_add_rms_norm(*a, 0.0, "llama", False),
    "layer_norm": lambda f, a, k: lambda: f.liger_layer_norm(*a),
    "rope": _liger_rope,
    "swiglu": _liger_swiglu,
    "relu2": lambda f, a, k: lambda: f.liger_relu_squared(*a),
    "cross_entropy": lambda f, a, k: lambda: f.liger_cross_entropy(*a, reduction=k["reduction"]),
    "linear_cross_entropy": lambda f, a, k: lambda: f.liger_fused_linear_cross_entropy(*a, reduction=k["reduction"]),
}

_MAKERS: dict[str, Callable[[str, str], Form]] = {
    "plain": _plain,
    "eager": _eager,
    "compile": _compile,
    "liger": _liger,
}


def sdpa_form(operator: str, backend: str) -> Form:
    """One backend of Torch's attention. It has no lengths: decoding is timed over caches that are full."""

    def bind(arguments: Sequence[Any], keywords: dict[str, Any]) -> Thunk:
        q, k, v = arguments[:3]
        if backend == "math" and (size := 6 * q[..., 0].numel() * k.shape[2]) > MATH_BYTES:
            raise NotTakenError(f"its scores would take {size / 2**30:.0f} GiB")
        causal, group = operator == "attention", q.shape[1] // k.shape[1]
        if _takes(call := _sdpa(backend, q, k, v, causal, grouped=group > 1)):
            return call
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            if _takes(call := _sdpa(backend, q, k, v, causal, grouped=False)):
                return Noted(call, f"key/value heads repeated beforehand, untimed: {group} x their bytes to read")
        raise NotTakenError("it does not take this call")

    return Form(f"sdpa {backend}", False, bind)


def _sdpa(backend: str, q: Any, k: Any, v: Any, causal: bool, grouped: bool) -> Thunk:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
    which = getattr(SDPBackend, names[backend])
    options = {"enable_gqa": True} if grouped else {}

    def call() -> Any:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)

    return call


def _takes(call: Thunk) -> bool:
    """Whether a backend computes it; Torch says at length why not, and a clause is enough."""
    import torch

    with warnings.catch_warnings(), contextlib.suppress(UserWarning):
        warnings.simplefilter("ignore")
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    return True
