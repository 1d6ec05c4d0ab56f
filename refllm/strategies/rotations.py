"""Calls of the operators that rotate heads: alone, after a norm of each head, after norm and projection."""

from dataclasses import replace

from hypothesis import strategies as st

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.draws import VALUES, Seeds, beside, layouts, plant, seeded, spot, values, weights

POSITIONS = (
    "far positions",
    "positions in any order",
    "tables end at R",
    "tables of random numbers",
)
"""far positions: from 1000 on, up to 100000. positions in any order: [B, S, R/2], another order in every row. tables
end at R: views of wider ones, with NaN past R/2. tables of random numbers: neither cos nor sin, so that all four
products must be the right ones."""
KINDS = {
    "rope": (*VALUES, *POSITIONS, "NaN past R"),
    "norm_rope": (*VALUES, *POSITIONS),
    "rms_norm_qkv_rope": (*(f for f in VALUES if f != "subnormal"), *POSITIONS, "NaN in a weight"),
}
"""NaN past R: in one dim that is not rotated, which it must not leave. NaN in a weight: of one row of w_qkv.
Subnormal numbers are not for products: the bfloat16 instructions of CPUs take them for 0."""
TOKENS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 65, 0)
DIMS = (8, 2, 4, 16, 24, 32, 40, 64, 72, 80, 128, 160, 256)
_TOKENS = 70
_HEADS = 100  # heads of q, and of k, over all tokens
_WORK = 300_000


def rope(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """rope and norm_rope: q [B, H, S, D], k [B, K, S, D], R <= D, both pairings; K need not divide H."""
    B, S = _tokens(draw)
    most = max(1, min(5, _HEADS // max(1, B * S)))
    H, K = draw(st.integers(1, most)), draw(st.integers(1, most))
    D = draw(st.sampled_from(DIMS if operator == "rope" else [d for d in DIMS if d >= 8]))
    R = _rotary_dim(draw, D)
    kind = kind or draw(st.sampled_from(KINDS[operator]))
    q_shape, k_shape = (B, H, S, D), (B, K, S, D)
    lie = layouts(draw, q_shape, k_shape, (H, D), (K, D))
    q, k = values(draw, kind, q_shape, dtype, lie[0]), Array(k_shape, dtype, layout=lie[1])
    if draw(st.booleans()):  # k is the special one
        q, k = (
            replace(q, scale=1.0, mean=0.0, planted=(), values="normal"),
            values(draw, kind, k_shape, dtype, lie[1]),
        )
    if kind == "NaN past R" and R < D and 0 not in q_shape:
        place = spot(draw, (B, H, S))
        q = plant(q, ((*place, draw(st.sampled_from([R, D - 1]))), float("nan")))
    cos, sin = _tables(draw, kind, B, S, R, beside(draw, dtype, policy))
    keywords: dict[str, object] = {"norm": draw(st.sampled_from(["rms", "layer"]))} if operator == "norm_rope" else {}
    keywords["interleaved"] = draw(st.booleans())
    eps = draw(st.sampled_from([1e-5, 1e-6, 0.01]))
    wide = beside(draw, dtype, policy) if operator == "norm_rope" else dtype
    seeds = Seeds(draw)
    cos, sin = _same_positions(seeds, kind, cos, sin)
    q, k, q_weight, k_weight = seeded(seeds, q, k, weights((H, D), wide, lie[2]), weights((K, D), wide, lie[3]))
    normed = (q_weight, k_weight, cos, sin, eps) if operator == "norm_rope" else (cos, sin)
    return Call(operator, dtype, (q, k, *normed), tuple(keywords.items()), kind)


def projected(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """rms_norm_qkv_rope: x [B, S, E], w_qkv [(H + 2K) D, E], bias or None, grouped heads, both pairings."""
    B, S = _tokens(draw)
    K, g = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    H = K * g
    D = draw(st.sampled_from([8, 16, 24, 40, 64, 80]))
    rows = (H + 2 * K) * D
    lengths = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1025)
    E = draw(st.sampled_from([n for n in lengths if n == 1 or n * rows * max(1, B * S) <= 20 * _WORK]))
    R = _rotary_dim(draw, D)
    kind = kind or draw(st.sampled_from(KINDS[operator]))
    with_bias = draw(st.booleans())
    lie = layouts(draw, (B, S, E), (E,), (rows, E), (rows,))
    x = values(draw, kind, (B, S, E), dtype, lie[0])
    w = Array((rows, E), dtype, scale=float(E) ** -0.5, layout=lie[2])
    if kind == "NaN in a weight":
        w = plant(w, (spot(draw, (rows, E)), float("nan")))
    cos, sin = _tables(draw, kind, B, S, R, beside(draw, dtype, policy))
    interleaved, eps = draw(st.booleans()), draw(st.sampled_from([1e-5, 1e-6, 0.01]))
    norm_weight = weights((E,), beside(draw, dtype, policy), lie[1])
    seeds = Seeds(draw)
    cos, sin = _same_positions(seeds, kind, cos, sin)
    x, norm_weight, w, bias = seeded(seeds, x, norm_weight, w, Array((rows,), dtype, layout=lie[3]))
    keywords = (("num_heads", H), ("num_kv_heads", K), ("interleaved", interleaved))
    arguments = (x, norm_weight, w, bias if with_bias else None, cos, sin, eps)
    return Call(operator, dtype, arguments, keywords, kind)


def _tokens(draw: st.DrawFn) -> tuple[int, int]:
    """B and S; three rows are likely: with one, tables per row and strides are not seen."""
    S = draw(st.sampled_from(TOKENS))
    return draw(st.sampled_from([n for n in (1, 2, 3, 4, 0) if n * S <= _TOKENS])), S


def _rotary_dim(draw: st.DrawFn, D: int) -> int:
    """An even R in 2..D: all dims first, then the fractions that models have, then any."""
    fractions = [D, *(r for r in (D // 2, D // 4) if r and r % 2 == 0)]
    return draw(st.sampled_from(fractions) | st.integers(1, D // 2).map(lambda i: 2 * i))


def _tables(draw: st.DrawFn, kind: str, B: int, S: int, R: int, dtype: str) -> tuple[Array, Array]:
    """cos and sin, without their seed."""
    own = kind == "positions in any order" or draw(st.booleans())
    shape = (B, S, R // 2) if own else (S, R // 2)
    cos = Array(shape, dtype, "cos")
    if kind == "far positions":
        cos = replace(cos, mean=float(draw(st.sampled_from([1000, 4097, 100_000]))))
    elif kind == "tables end at R":
        cos = replace(cos, mean=17.0, layout="wider")
    elif kind == "tables of random numbers":
        cos = replace(cos, values="normal")
    elif draw(st.booleans()):
        cos = replace(cos, mean=1000.0, layout=layouts(draw, shape)[0])
        cos = replace(cos, layout="dense") if cos.layout == "expanded" and not own else cos
    return cos, replace(cos, values="normal" if cos.values == "normal" else "sin")


def _same_positions(seeds: Seeds, kind: str, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Seeds of the tables: 0 for consecutive positions, else one for both; two where they hold random numbers."""
    if kind == "tables of random numbers":
        cos, sin = seeded(seeds, cos, sin)
    elif kind == "positions in any order":
        seed = seeds() + 1
        cos, sin = replace(cos, seed=seed), replace(sin, seed=seed)
    return cos, sin
