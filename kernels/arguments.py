"""What every operator checks about its arguments, in one place for the plain and the Triton form.

Each function raises InputError: the operator, the argument, what it is, what was expected. Shape checks only look at
shapes, dtypes and devices, never at values, and so never wait for a GPU.
"""

from typing import Any

import torch

from refllm.errors import InputError

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


def rms_norm(operator: str, x: Any, weight: Any) -> None:
    """x [..., E], weight [E]."""
    floating(operator, "x", x)
    like(operator, "weight", weight, (x.shape[-1],), x, or_float32=True)


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
    """x [B, S, E], norm_weight [E], w_qkv [(H + 2K) D, E], b_qkv [(H + 2K) D] or None, cos and sin [S, R/2] or
    [B, S, R/2] with an even D >= R; cache: None or (k_cache [B, K, N, D], v_cache, as it, lengths [B])."""
    floating(operator, "x", x, 3)
    B, S, E = x.shape
    like(operator, "norm_weight", norm_weight, (E,), x, or_float32=True)
    floating(operator, "w_qkv", w_qkv, 2)
    heads = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or w_qkv.shape[0] % heads:
        sizes = f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        fail(operator, "w_qkv", w_qkv, f"(H + 2K) D rows for {sizes}, each at least 1")
    rows, D = w_qkv.shape[0], w_qkv.shape[0] // heads
    if D % 2:
        fail(operator, "w_qkv", w_qkv, f"an even head_dim, found {rows} / {heads} = {D}: dims are rotated in pairs")
    like(operator, "w_qkv", w_qkv, (rows, E), x)
    if b_qkv is not None:
        like(operator, "b_qkv", b_qkv, (rows,), x)
    floating(operator, "cos", cos)
    half = cos.shape[-1]
    if 2 * half > D:
        fail(operator, "cos", cos, f"at most head_dim / 2 = {D // 2} angles per position")
    shape = (B, S, half) if cos.ndim == 3 else (S, half)
    like(operator, "cos", cos, shape, x, or_float32=True)
    like(operator, "sin", sin, shape, cos)
    if cache is not None:
        _cache(operator, cache, (B, num_kv_heads, D), x)


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


def cross_entropy(operator: str, logits: Any, labels: Any, reduction: str) -> None:
    """logits [N, V], labels [N], reduction "mean", "sum" or "none"."""
    floating(operator, "logits", logits, 2)
    _loss(operator, labels, logits, reduction)


def linear_cross_entropy(operator: str, x: Any, weight: Any, labels: Any, reduction: str) -> None:
    """x [N, E], weight [V, E], labels [N], reduction "mean", "sum" or "none"."""
    floating(operator, "x", x, 2)
    floating(operator, "weight", weight, 2)
    like(operator, "weight", weight, (weight.shape[0], x.shape[1]), x)
    _loss(operator, labels, x, reduction)


def _loss(operator: str, labels: Any, rows_of: torch.Tensor, reduction: str) -> None:
    integers(operator, "labels", labels, (rows_of.shape[0],), rows_of)
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f'{operator}: reduction={reduction!r} is not known; use "mean", "sum" or "none"')


def labels_exist(operator: str, labels_N: torch.Tensor, V: int, ignore_index: int) -> None:
    """Every label is in 0..V-1 or is ignore_index. Looks at values: only called for CPU tensors."""
    bad = labels_N[(labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= V))]
    if len(bad):
        raise InputError(
            f"{operator}: labels holds {int(bad[0])}, outside 0..{V - 1}; use {ignore_index} for a position that does "
            "not count"
        )


def add_rms_norm(operator: str, x: Any, residual: Any, weight: Any) -> None:
    """x, residual [..., E], weight [E]."""
    rms_norm(operator, x, weight)
    like(operator, "residual", residual, tuple(x.shape), x)


def layer_norm(operator: str, x: Any, weight: Any, bias: Any) -> None:
    """x [..., E], weight [E], bias [E] or None."""
    rms_norm(operator, x, weight)
    if bias is not None:
        like(operator, "bias", bias, (x.shape[-1],), x, or_float32=True)


def add_layer_norm(operator: str, x: Any, residual: Any, weight: Any, bias: Any) -> None:
    """x, residual [..., E], weight [E], bias [E] or None."""
    layer_norm(operator, x, weight, bias)
    like(operator, "residual", residual, tuple(x.shape), x)


def rope(operator: str, q: Any, k: Any, cos: Any, sin: Any) -> None:
    """q [B, H, S, D], k [B, K, S, D], cos and sin [S, R/2] or [B, S, R/2] with R <= D."""
    B, _, S, D = floating(operator, "q", q, 4).shape
    if not isinstance(k, torch.Tensor) or k.ndim != 4:
        fail(operator, "k", k, f"[{B}, heads, {S}, {D}]")
    like(operator, "k", k, (B, k.shape[1], S, D), q)
    _table(operator, "cos", cos, q)
    like(operator, "sin", sin, tuple(cos.shape), cos)


def _table(operator: str, name: str, cos: Any, q: torch.Tensor) -> None:
    """cos [S, R/2] or [B, S, R/2] with R <= D, of the dtype of q [B, H, S, D] or float32."""
    B, _, S, D = q.shape
    if not isinstance(cos, torch.Tensor) or cos.ndim not in (2, 3) or 2 * cos.shape[-1] > D:
        fail(operator, name, cos, f"[{S}, R/2] or [{B}, {S}, R/2] with R <= D = {D}: each angle once")
    half = cos.shape[-1]
    shape = (S, half) if cos.ndim == 2 else (B, S, half)
    like(operator, name, cos, shape, q, or_float32=True)


def norm_rope(operator: str, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, norm: Any) -> None:
    """The arguments of `rope`, with q_weight [H, D], k_weight [K, D], norm "rms" or "layer"."""
    rope(operator, q, k, cos, sin)
    like(operator, "q_weight", q_weight, (q.shape[1], q.shape[3]), q, or_float32=True)
    like(operator, "k_weight", k_weight, (k.shape[1], k.shape[3]), k, or_float32=True)
    if norm not in ("rms", "layer"):
        raise InputError(f'{operator}: norm={norm!r} is not known; use "rms" or "layer"')


def swiglu(operator: str, gate: Any, up: Any) -> None:
    """gate, up: one shape, one dtype."""
    floating(operator, "gate", gate)
    like(operator, "up", up, tuple(gate.shape), gate)


def relu2(operator: str, x: Any) -> None:
    """x: any shape."""
    floating(operator, "x", x)


def attention(operator: str, q: Any, k: Any, v: Any, key_mask: Any = None) -> None:
    """q [B, H, S, D], k and v [B, K, T, D] with H a multiple of K and D in 8..256, key_mask bool [B, T] or None."""
    floating(operator, "q", q, 4)
    floating(operator, "k", k, 4)
    (B, H, _, D), (K, T) = q.shape, k.shape[1:3]
    if not 8 <= D <= 256:
        fail(operator, "q", q, "a head_dim (last axis) of 8 to 256")
    like(operator, "k", k, (B, K, T, D), q)
    like(operator, "v", v, (B, K, T, D), q)
    if K < 1 or H % K:
        fail(operator, "k", k, f"a number of heads (axis 1) that divides the {H} query heads")
    if key_mask is None:
        return
    ok = isinstance(key_mask, torch.Tensor) and key_mask.dtype == torch.bool and key_mask.device == q.device
    if not ok or tuple(key_mask.shape) != (B, T):
        fail(operator, "key_mask", key_mask, f"[{B}, {T}] torch.bool on {q.device}")


def decode_attention(operator: str, q: Any, k_cache: Any, v_cache: Any, lengths: Any) -> None:
    """q [B, H, S, D] with S in 1..8, caches [B, K, N, D] as keys and values of `attention`, lengths [B]."""
    attention(operator, q, k_cache, v_cache)
    if not 1 <= q.shape[2] <= 8:
        fail(operator, "q", q, "1 to 8 queries (axis 2)")
    integers(operator, "lengths", lengths, (q.shape[0],), q)


def lengths_exist(operator: str, lengths_B: torch.Tensor, N: int) -> None:
    """lengths lie in 0..N. Looks at values: only called for tensors on the CPU."""
    wrong = (lengths_B < 0) | (lengths_B > N)
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise InputError(
            f"{operator}: lengths[{b}] is {int(lengths_B[b])}; expected 0..{N}, the number of slots in the cache"
        )
