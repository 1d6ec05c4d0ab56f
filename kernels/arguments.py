"""What every operator checks about its arguments, in one place for the plain and the Triton form.

    arguments.check("add_rms_norm", x, residual, weight)   # by the record: axes, kinds, what may be float32

Each function raises InputError: the operator, the argument, what it is, what was expected. They look at shapes, dtypes
and devices; those that end in `_exist` look at values, and are only called for what lies on the CPU, because on a GPU
that would mean to wait for it.
"""

from typing import Any

import torch

from refllm.errors import InputError
from refllm.ops.contracts import CONTRACTS, ROWS, Contract, contract_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels compute with."""


def describe(x: Any) -> str:
    """[2, 3] torch.bfloat16 on cuda:0; or the type, for what is not a tensor."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def fail(operator: str, name: str, value: Any, expected: str) -> None:
    """Raises the InputError for one argument."""
    raise InputError(f"{operator}: {name} is {describe(value)}; expected {expected}")


def floating(operator: str, name: str, x: Any, ndim: int | None = None) -> torch.Tensor:
    """x, a tensor of float32, float16 or bfloat16 with `ndim` axes (None: one or more)."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        fail(operator, name, x, "a float32, float16 or bfloat16 tensor")
    if (ndim is None and x.ndim < 1) or (ndim is not None and x.ndim != ndim):
        fail(operator, name, x, "at least one axis" if ndim is None else f"{ndim} axes")
    return x


def like(
    operator: str,
    name: str,
    x: Any,
    shape: tuple[int, ...],
    model: torch.Tensor,
    *,
    or_float32: bool = False,
) -> None:
    """x has that shape and the dtype (or float32, if or_float32) and device of `model`."""
    dtypes = {model.dtype, torch.float32} if or_float32 else {model.dtype}
    ok = isinstance(x, torch.Tensor) and tuple(x.shape) == shape and x.dtype in dtypes and x.device == model.device
    if not ok:
        kinds = " or ".join(sorted(str(dtype) for dtype in dtypes))
        fail(operator, name, x, f"{list(shape)} {kinds} on {model.device}")


def _asked(known: Contract) -> tuple[tuple[str, tuple[str, ...], str, bool], ...]:
    first = next(iter(known.arguments.values()))
    return tuple(
        (
            name,
            axes,
            "same" if axes == first and known.kind(name) != "mask" else known.kind(name),
            name in known.or_float32,
        )
        for name, axes in known.arguments.items()
    )


_ASKED = {known.operator: _asked(known) for known in (*CONTRACTS.values(), contract_of("rope_backward"))}
"""Every argument that is an array, by operator: its name, axes and kind ("same": the shape of the first), and whether
it may be float32. Made once: a check takes microseconds of every call."""
_HEADS = {"H": "heads", "K": "heads"}
BACKWARD = "_backward"
"""What the name of the operator of a backward pass ends in."""


def check(operator: str, first: Any, *others: Any, sizes: dict[str, int] | None = None, **chosen: str) -> None:
    """The arrays of a call, in the order of the record, fit together: axes of one name have one length.

    The first is a tensor of float32, float16 or bfloat16 and says the dtype and the device of the others. None stands
    for a bias or a mask that is not given. sizes: of axes that no array has as such. chosen: arguments that are words.
    operator: also one of a backward pass, whose arguments behind the incoming gradients are those of the forward pass
    (a rotation back has no others than its own).
    """
    known_as = operator if operator in _ASKED else operator.removesuffix(BACKWARD)
    asked = _ASKED[known_as]
    name, axes = asked[0][:2]
    rows = axes[0] == ROWS
    floating(operator, name, first, None if rows else len(axes))
    known: dict[str, Any] = {axes[-1]: first.shape[-1]} if rows else dict(zip(axes, first.shape, strict=True))
    if sizes is not None:
        known.update(sizes)
    for (name, axes, kind, wide), x in zip(asked[1:], others, strict=True):
        if kind == "same":
            like(operator, name, x, tuple(first.shape), first)
            continue
        if x is None and kind in ("bias", "mask"):
            continue
        if kind == "table":
            _table(operator, name, x, known, first)
            continue
        shape = _shape(operator, name, axes, x, known)
        if kind in ("labels", "lengths"):
            integers(operator, name, x, shape, first)
        elif kind == "mask":
            booleans(operator, name, x, shape, first)
        else:
            like(operator, name, x, shape, first, or_float32=wide)
    for name, word in chosen.items():
        if word not in contract_of(known_as).choices[name]:
            *words, last = (f'"{choice}"' for choice in contract_of(known_as).choices[name])
            raise InputError(f"{operator}: {name}={word!r} is not known; use {', '.join(words)} or {last}")


def incoming(operator: str, first: torch.Tensor, **gradients: Any) -> None:
    """Incoming gradients have the shape, dtype and device of `first`, as the results that they belong to have."""
    for name, gradient in gradients.items():
        like(operator, name, gradient, tuple(first.shape), first)


def kept(operator: str, q: torch.Tensor, o: Any, lse: Any, dlse: Any = None) -> None:
    """o [B, H, S, D] as q, lse and its gradient float32 [B, H, S]; None for what is computed again or was not used."""
    if o is not None:
        like(operator, "o", o, tuple(q.shape), q)
    for name, x in (("lse", lse), ("dlse", dlse)):
        ok = isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.device == q.device
        if x is not None and (not ok or x.shape != q.shape[:3]):
            fail(operator, name, x, f"{list(q.shape[:3])} torch.float32 on {q.device}")


def loss_gradient(operator: str, dloss: Any, labels: torch.Tensor, reduction: str) -> None:
    """dloss is float32, one number or one per label, as the loss that it belongs to is."""
    shape, ok = tuple(labels.shape) if reduction == "none" else (), isinstance(dloss, torch.Tensor)
    if not ok or tuple(dloss.shape) != shape or dloss.dtype != torch.float32 or dloss.device != labels.device:
        fail(operator, "dloss", dloss, f"{list(shape)} torch.float32 on {labels.device}")


def _shape(operator: str, name: str, axes: tuple[str, ...], x: Any, known: dict[str, Any]) -> tuple[int, ...]:
    """The shape that x has to have; an axis of a name that is new gets its length from x."""
    for place, axis in enumerate(axes):
        if axis not in known:
            if not isinstance(x, torch.Tensor) or x.ndim != len(axes):
                said = [str(known.get(axis, _HEADS.get(axis, axis))) for axis in axes]
                fail(operator, name, x, f"[{', '.join(said)}]")
            known[axis] = x.shape[place]
    return tuple([known[axis] for axis in axes])


def _table(operator: str, name: str, x: Any, known: dict[str, Any], first: torch.Tensor) -> None:
    """cos, then sin as it: [S, R/2] or [B, S, R/2] with R <= D."""
    B, S, D = known["B"], known["S"], known["D"]
    if "cos" in known:
        like(operator, name, x, tuple(known["cos"].shape), known["cos"])
        return
    if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3) or 2 * x.shape[-1] > D:
        fail(operator, name, x, f"[{S}, R/2] or [{B}, {S}, R/2] with R <= D = {D}: each angle once")
    half = x.shape[-1]
    like(operator, name, x, (S, half) if x.ndim == 2 else (B, S, half), first, or_float32=True)
    known["cos"] = x


def attention(operator: str, q: Any, k: Any, v: Any, *rest: Any) -> None:
    """What `check` asks, with D in 8..256 and H a multiple of K."""
    if not 8 <= floating(operator, "q", q, 4).shape[3] <= 256:
        fail(operator, "q", q, "a head_dim (last axis) of 8 to 256")
    check(operator, q, k, v, *rest)
    H, K = q.shape[1], k.shape[1]
    if K < 1 or H % K:
        fail(operator, "k", k, f"a number of heads (axis 1) that divides the {H} query heads")


def decode_attention(operator: str, q: Any, k_cache: Any, v_cache: Any, lengths: Any) -> None:
    """What `attention` asks, with S in 1..8."""
    attention(operator, q, k_cache, v_cache, lengths)
    if not 1 <= q.shape[2] <= 8:
        fail(operator, "q", q, "1 to 8 queries (axis 2)")


def rms_norm_qkv_rope(
    operator: str,
    x: Any,
    norm_weight: Any,
    w_qkv: Any,
    b_qkv: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    num_kv_heads: int,
    cache: Any = None,
) -> None:
    """What `check` asks, with an even D >= R; cache: None or (k_cache [B, K, N, D], v_cache, as it, lengths [B])."""
    floating(operator, "w_qkv", w_qkv, 2)
    heads = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or w_qkv.shape[0] % heads:
        sizes = f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        fail(operator, "w_qkv", w_qkv, f"(H + 2K) D rows for {sizes}, each at least 1")
    rows, D = w_qkv.shape[0], w_qkv.shape[0] // heads
    if D % 2:
        fail(operator, "w_qkv", w_qkv, f"an even head_dim, found {rows} / {heads} = {D}: dims are rotated in pairs")
    check(operator, x, norm_weight, w_qkv, b_qkv, cos, sin, sizes={"D": D})
    if cache is not None:
        _cache(operator, cache, (x.shape[0], num_kv_heads, D), x)


def _cache(operator: str, cache: Any, sizes: tuple[int, int, int], x: torch.Tensor) -> None:
    if not isinstance(cache, tuple) or len(cache) != 3:
        fail(operator, "cache", cache, "a tuple (k_cache, v_cache, lengths)")
    (B, K, D), (k_cache, v_cache, lengths) = sizes, cache
    floating(operator, "k_cache", k_cache, 4)
    shape = (B, K, k_cache.shape[2], D)
    like(operator, "k_cache", k_cache, shape, x)
    like(operator, "v_cache", v_cache, shape, x)
    integers(operator, "lengths", lengths, (B,), x)


def slots_exist(operator: str, lengths_B: torch.Tensor, S: int, N: int) -> None:
    """Slots lengths[b] .. lengths[b] + S - 1 lie in a cache of N slots. Looks at values: only for CPU tensors."""
    if S and ((lengths_B < 0) | (lengths_B > N - S)).any():
        bad = int(lengths_B[(lengths_B < 0) | (lengths_B > N - S)][0])
        raise InputError(f"{operator}: lengths holds {bad}; expected 0..{N - S}, so that {S} tokens fit into {N} slots")


def integers(operator: str, name: str, x: Any, shape: tuple[int, ...], model: torch.Tensor) -> None:
    """x has that shape, int32 or int64, on the device of `model`."""
    ok = isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64) and x.device == model.device
    if not ok or tuple(x.shape) != shape:
        fail(operator, name, x, f"{list(shape)} torch.int32 or torch.int64 on {model.device}")


def booleans(operator: str, name: str, x: Any, shape: tuple[int, ...], model: torch.Tensor) -> None:
    """x has that shape, bool, on the device of `model`."""
    ok = isinstance(x, torch.Tensor) and x.dtype == torch.bool and x.device == model.device
    if not ok or tuple(x.shape) != shape:
        fail(operator, name, x, f"{list(shape)} torch.bool on {model.device}")


def labels_exist(operator: str, labels_N: torch.Tensor, V: int, ignore_index: int) -> None:
    """Every label is in 0..V-1 or is ignore_index. Looks at values: only called for CPU tensors."""
    bad = labels_N[(labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= V))]
    if len(bad):
        raise InputError(
            f"{operator}: labels holds {int(bad[0])}, outside 0..{V - 1}; use {ignore_index} for a position that does "
            "not count"
        )


def lengths_exist(operator: str, lengths_B: torch.Tensor, N: int) -> None:
    """lengths lie in 0..N. Looks at values: only called for tensors on the CPU."""
    wrong = (lengths_B < 0) | (lengths_B > N)
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise InputError(
            f"{operator}: lengths[{b}] is {int(lengths_B[b])}; expected 0..{N}, the number of slots in the cache"
        )
