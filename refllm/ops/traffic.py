"""What a call of an operator cannot do without: bytes that have to move, and floating-point operations.

Bytes: every number that the definition reads is read once and every number of the result is written once. A kernel that
reads something twice, or writes something in between, moves more and is slower for it: that is the point. Flops: those
of the formulas at the top of each kernel file; a product of [N, I] and [I, O] has 2 N I O.

A function takes the arguments of its operator, as tensors or as shapes of tensors. N is the number of rows (tokens), w
the bytes of a number.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

LABEL, LOSS = 8, 4
"""Bytes of an int64 label and of a float32 loss."""


@dataclass(frozen=True)
class Traffic:
    """bytes: moved between the chip and its memory, at least. flops: done."""

    bytes: int
    flops: int


def _width(x: Any) -> int:
    return int(x.element_size())


def norm(flops: int, copies: int) -> Any:
    """A norm of N rows of E: `copies` arrays of N E, the weight (and bias) once, `flops` per number."""

    def formula(x: Any, *rest: Any) -> Traffic:
        """copies N E w + E w (+ E w for a bias) bytes; flops N E."""
        vectors = sum(prod(v.shape) for v in rest[copies // 2 - 1 : -1] if v is not None)
        numbers = prod(x.shape)
        return Traffic(_width(x) * (copies * numbers + vectors), flops * numbers)

    return formula


def rope(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> Traffic:
    """Heads read and written, both tables read: 2 N (H + K) D + S R numbers. 3 R flops per head."""
    heads, R = prod(q.shape[:3]) + prod(k.shape[:3]), 2 * cos.shape[-1]
    numbers = 2 * heads * q.shape[-1] + prod(cos.shape) + prod(sin.shape)
    return Traffic(_width(q) * numbers, 3 * R * heads)


def norm_rope(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float, **_: Any) -> Traffic:
    """The traffic of `rope`, and the weights (H + K) D. 10 D flops per head."""
    heads, D = prod(q.shape[:3]) + prod(k.shape[:3]), q.shape[-1]
    weights = prod(q_weight.shape) + prod(k_weight.shape)
    return Traffic(rope(q, k, cos, sin).bytes + _width(q) * weights, 10 * D * heads)


def qkv(x: Any, norm_weight: Any, w_qkv: Any, b_qkv: Any, cos: Any, sin: Any, eps: float, **_: Any) -> Traffic:
    """N E + E + C E (+ C) + S R numbers read, N C written; C = (H + 2K) D. 2 N E C flops, and 5 N E of the norm."""
    E, (C, _E) = x.shape[-1], w_qkv.shape
    N = prod(x.shape) // E if E else 0
    numbers = N * E + E + C * E + (C if b_qkv is not None else 0) + prod(cos.shape) + prod(sin.shape) + N * C
    return Traffic(_width(x) * numbers, 2 * N * E * C + 5 * N * E)


def attention(
    q: Any, k: Any, v: Any, *, causal: bool = True, return_lse: bool = False, key_mask: Any = None, **_: Any
) -> Traffic:
    """q, k, v and o once (and the mask; and 4 bytes of LSE per query). 4 D flops per pair of a query and a key it sees.

    Causal, aligned at the end: query s sees T - S + s + 1 keys (none where that is negative).
    """
    (B, H, S, D), T = q.shape, k.shape[2]
    pairs = sum(max(0, T - S + s + 1) for s in range(S)) if causal else S * T
    size = _width(q) * (2 * prod(q.shape) + prod(k.shape) + prod(v.shape))
    size += 4 * B * H * S if return_lse else 0
    size += prod(key_mask.shape) if key_mask is not None else 0
    return Traffic(size, 4 * B * H * D * pairs)


def decode_attention(q: Any, k_cache: Any, v_cache: Any, lengths: Any, **_: Any) -> Traffic:
    """q and o once, of the caches the filled slots. 4 D flops per pair of a query head and a slot it sees."""
    (_B, H, S, D), K = q.shape, k_cache.shape[1]
    filled = [int(n) for n in lengths.tolist()]
    pairs = sum(max(0, n - S + s + 1) for n in filled for s in range(S))
    size = _width(q) * (2 * prod(q.shape) + 2 * K * D * sum(filled)) + prod(lengths.shape) * _width(lengths)
    return Traffic(size, 4 * H * D * pairs)


def swiglu(gate: Any, up: Any) -> Traffic:
    """Two numbers read and one written per element. 10 flops each."""
    return Traffic(3 * _width(gate) * prod(gate.shape), 10 * prod(gate.shape))


def relu2(x: Any) -> Traffic:
    """One number read and one written per element. 2 flops each."""
    return Traffic(2 * _width(x) * prod(x.shape), 2 * prod(x.shape))


def cross_entropy(logits: Any, labels: Any, **_: Any) -> Traffic:
    """Every logit and label read, one loss per row written. 8 flops per logit. All rows are taken to count."""
    N, V = logits.shape
    return Traffic(_width(logits) * N * V + N * (LABEL + LOSS), 8 * N * V)


def linear_cross_entropy(x: Any, weight: Any, labels: Any, **_: Any) -> Traffic:
    """x, the matrix and the labels read, one loss per row written; the logits never. 2 N V E flops, and 8 N V."""
    (N, E), V = x.shape, len(weight)
    return Traffic(_width(x) * (N * E + V * E) + N * (LABEL + LOSS), 2 * N * V * E + 8 * N * V)
