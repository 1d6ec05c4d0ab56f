"""Fixed calls of the operators that work on heads: rotations and attention. See `refllm.strategies.fixed`."""

from collections.abc import Callable, Iterator
from typing import Any

from refllm.strategies.arrays import FIRST_DIM, Array
from refllm.strategies.call import Call

NAN, ALL = float("nan"), (None, None)


def _fields(given: dict[str, Any] | None, **usual: Any) -> dict[str, Any]:
    """Fields of an `Array`: the usual ones, with those that are given in their place."""
    return usual | (given or {})


def attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """attention."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int],
        q: dict[str, Any] | None = None,
        k: dict[str, Any] | None = None,
        v: dict[str, Any] | None = None,
        hidden: tuple[Any, ...] = (),
        **keywords: Any,
    ) -> Call:
        B, H, K, S, T, D = sizes
        arrays = (
            Array((B, H, S, D), dtype, **(q or {})),
            Array((B, K, T, D), dtype, **_fields(k, seed=1)),
            Array((B, K, T, D), dtype, **_fields(v, seed=2, mean=0.5)),
        )
        if hidden:
            keywords["key_mask"] = Array((B, T), "bool", "ones", planted=tuple((place, 0) for place in hidden))
        return Call(operator, dtype, arrays, tuple(keywords.items()), kind)

    def poison(value: float, *places: tuple[Any, Any]) -> dict[str, Any]:
        return {"planted": tuple(((b, ALL, keys), value) for b, keys in places)}

    fused = policy != "hf-eager"
    # scale missing or from another size, diagonal masked, mask one too wide, key j at 2j, the last key stale
    yield call("plain", (2, 2, 1, 5, 5, 8))
    yield call("q is 0: the mean of v", (1, 1, 1, 3, 7, 8), q={"values": "zeros"}, causal=False)  # lanes past the end
    yield call("grouped heads", (3, 6, 3, 4, 6, 16), return_lse=True)  # head j reads j // g, and never j % K
    yield call("fewer queries than keys", (2, 2, 2, 3, 20, 24), scale=0.5)  # causal is aligned at the end
    hidden = ((0, (None, 3)), (1, (6, None)), (2, 4))
    yield call("key mask", (3, 2, 1, 4, 9, 8), hidden=((0, (None, 3)), (2, 4)), return_lse=True)
    for value in (1e4, NAN) if fused else (100.0,):
        bad = poison(value, *((b, keys if isinstance(keys, tuple) else (keys, keys + 1)) for b, keys in hidden))
        kind = f"masked values hold {'NaN' if value != value else f'{value:g}'}"
        yield call(kind, (3, 2, 1, 4, 9, 8), None, {"seed": 1} | bad, {"seed": 2} | bad, hidden, causal=False)
    if fused:
        later = poison(NAN, (ALL, (15, None)))  # queries 0 .. 6 see no key past 14
        yield call("NaN in later keys", (1, 2, 1, 12, 20, 24), None, {"seed": 1} | later, {"seed": 2} | later)
        row = ((1, ALL), (2, (None, 2)))
        yield call("rows without a key", (3, 2, 1, 5, 6, 16), hidden=row, return_lse=True)  # 0 and -inf
        yield call("more queries than keys", (1, 2, 1, 20, 3, 16), return_lse=True)
    low = -392.0 if fused or dtype != "float16" else -112.0
    shift = (
        {"values": "eighths", "planted": ((FIRST_DIM, 256.0),)},
        {"values": "eighths", "seed": 1, "planted": ((FIRST_DIM, low),)},
    )
    yield call("logits shifted by -100000", (2, 2, 1, 3, 40, 16), *shift, scale=1.0)  # finite sentinels, float16 scores
    # Online softmax: the largest score comes late (a maximum that is not carried over), and early.
    yield call(
        "growing scores", (1, 1, 1, 2, 140, 16), {"values": "ones"}, {"values": "ramp", "scale": 30.0}, scale=0.5
    )
    yield call(
        "falling scores", (1, 1, 1, 2, 140, 16), {"values": "ones"}, {"values": "ramp", "scale": -30.0}, scale=0.5
    )
    views = {"layout": "heads"}, {"seed": 1, "layout": "shifted"}, {"seed": 2, "mean": 0.5, "layout": "gaps"}
    yield call("strides, each its own", (3, 4, 2, 5, 9, 40), *views)
    yield call("a tile and one, head dim 80", (1, 2, 1, 129, 129, 80), return_lse=True)  # tail tiles
    yield call("257 keys, head dim 160", (2, 1, 1, 2, 257, 160))  # dims past 128, third tile
    yield call("nothing to see", (2, 2, 1, 0, 4, 8))


def decode_attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """decode_attention."""
    fused = policy != "hf-eager"

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int],
        lengths: tuple[int, ...],
        poison: float | None = None,
        q: dict[str, Any] | None = None,
        k: dict[str, Any] | None = None,
        v: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> Call:
        H, K, S, N, D = sizes
        B = len(lengths)
        past = tuple(((b, ALL, (n, None)), poison) for b, n in enumerate(lengths) if poison is not None and n < N)
        arrays = (
            Array((B, H, S, D), dtype, **(q or {})),
            Array((B, K, N, D), dtype, **_fields(k, seed=1, planted=past)),
            Array((B, K, N, D), dtype, **_fields(v, seed=2, mean=0.5, planted=past)),
            Array((B,), "int64", "zeros", planted=tuple(((b,), float(n)) for b, n in enumerate(lengths))),
        )
        return Call(operator, dtype, arrays, tuple(keywords.items()), kind)

    yield call("plain", (2, 1, 1, 5, 8), (5, 5, 5))
    yield call("q is 0: the mean of v", (1, 1, 1, 16, 8), (7,), q={"values": "zeros"})  # lanes past the length
    yield call("every row its own length", (4, 2, 1, 20, 16), (20, 3, 11))  # lengths of a batch mate
    yield call("slots past the length hold 10000", (2, 1, 1, 9, 16), (9, 1, 4), 1e4 if fused else 100.0)
    if fused:
        yield call("slots past the length hold NaN", (2, 1, 1, 40, 16), (1, 17, 33), NAN)  # 0 * NaN
        yield call("empty sequences", (2, 2, 1, 9, 16), (0, 3, 0), NAN)  # all scores -inf: 0, and no NaN
        yield call("more queries than slots", (2, 1, 4, 9, 16), (2, 9, 3), NAN)
    yield call("three tokens at once", (6, 2, 3, 20, 24), (20, 3, 12))  # causal among themselves
    yield call("grouped heads", (6, 3, 1, 17, 40), (17, 16, 1), scale=0.5)  # j // g, and never j % K
    low = -392.0 if fused or dtype != "float16" else -112.0
    shift = {"values": "eighths", "planted": ((FIRST_DIM, 256.0),)}, {
        "values": "eighths", "seed": 1, "planted": ((FIRST_DIM, low),)}  # fmt: skip
    yield call("logits shifted by -100000", (2, 1, 1, 40, 16), (40, 33), None, *shift, scale=1.0)
    views = {"layout": "heads"}, {"seed": 1, "layout": "heads"}, {"seed": 2, "mean": 0.5, "layout": "gaps"}
    yield call("strides, each its own", (4, 2, 2, 9, 40), (9, 5, 2), None, *views)
    yield call("129 slots, head dim 80", (2, 1, 1, 129, 80), (129, 128, 127), 1e4 if fused else 100.0)
    # Splits of a long cache: some without a slot, one with a single slot, the largest score in the last one.
    grow = {"values": "ones"}, {"values": "ramp", "scale": 30.0}
    yield call("growing scores", (1, 1, 1, 300, 16), (300,), None, *grow, scale=0.5)
    yield call("1025 slots", (2, 1, 1, 1025, 16), (1025, 257, 2), NAN if fused else None)
    yield call("no slots" if fused else "one slot", (2, 2, 1, 0 if fused else 1, 8), (0, 0) if fused else (1, 1))


def rotations(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rope and norm_rope."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int],
        interleaved: bool,
        norm: str = "rms",
        table: dict[str, Any] | None = None,
        own: bool = False,
        q: dict[str, Any] | None = None,
        k: dict[str, Any] | None = None,
    ) -> Call:
        B, H, K, S, D, R = sizes
        keys = _fields(table, mean=1000.0)  # at position 0 nothing is rotated, at 1 the pairings look alike
        shape = (B, S, R // 2) if own else (S, R // 2)
        cos = Array(shape, dtype, **_fields(keys, values="cos"))
        sin = Array(shape, dtype, **_fields(keys, values="sin", **({"seed": 9} if "values" in keys else {})))
        arrays = Array((B, H, S, D), dtype, **(q or {})), Array((B, K, S, D), dtype, **_fields(k, seed=1))
        keywords: tuple[tuple[str, Any], ...] = (("interleaved", interleaved),)
        if operator == "rope":
            return Call(operator, dtype, (*arrays, cos, sin), keywords, kind)
        w_q, w_k = (Array((n, D), dtype, scale=0.3, mean=1.0, seed=5 + n) for n in (H, K))
        return Call(operator, dtype, (*arrays, w_q, w_k, cos, sin, 1e-5), (("norm", norm), *keywords), kind)

    yield call("plain, interleaved", (1, 2, 2, 3, 8, 8), True)  # the other pairing, sign of sin, q and k swapped
    yield call("plain, half-split", (1, 2, 1, 3, 8, 8), False, "layer")
    yield call("partial rotation", (2, 3, 1, 2, 16, 4), False, table={"layout": "wider"})  # R from the stride, D for R
    yield call("partial rotation, interleaved", (2, 1, 2, 2, 24, 6), True, "layer", table={"layout": "wider"})
    # One table for all rows; positions that only grow, or that start at 0.
    yield call("positions in any order", (3, 2, 2, 4, 8, 8), False, table={"seed": 7}, own=True)
    yield call("positions in any order, interleaved", (3, 2, 1, 5, 8, 4), True, "layer", {"seed": 7}, own=True)
    yield call("tables of random numbers", (2, 2, 2, 3, 16, 16), False, table={"values": "normal", "mean": 0.0})
    yield call("head dim 80, R 20", (2, 5, 3, 7, 80, 20), False, "layer")  # no power of two anywhere
    past = {"planted": (((0, 1, 1, 15), NAN),)}
    yield call("NaN past R", (1, 2, 2, 3, 16, 8), True, q=past)  # stays where it is
    far = {"scale": 30.0, "mean": 1000.0}
    yield call("mean 1000", (1, 2, 1, 2, 24, 24), False, "layer", q=far, k={"seed": 1} | far)
    small = {"scale": 1e-3}
    yield call("tiny heads: eps decides", (1, 2, 2, 2, 16, 16), True, q=small, k={"seed": 1} | small)
    views = {"layout": "heads"}, {"seed": 1, "layout": "shifted"}
    yield call("strides, each its own", (3, 4, 2, 5, 40, 40), False, q=views[0], k=views[1])
    yield call("one token in each row", (3, 2, 1, 1, 8, 8), False)  # the stride of an axis of length 1 says nothing
    yield call("65 tokens", (1, 1, 1, 65, 8, 8), True, "layer", own=True)  # tail of a tile
    yield call("nothing", (0, 2, 2, 3, 8, 8), False)


def projection(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rms_norm_qkv_rope."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int, int],
        interleaved: bool,
        bias: bool = True,
        table: dict[str, Any] | None = None,
        own: bool = False,
        x: dict[str, Any] | None = None,
        w: str = "dense",
    ) -> Call:
        B, S, E, H, K, D, R = sizes
        rows, keys = (H + 2 * K) * D, _fields(table, mean=1000.0)
        shape = (B, S, R // 2) if own else (S, R // 2)
        arguments = (
            Array((B, S, E), dtype, **(x or {})),
            Array((E,), dtype, scale=0.3, mean=1.0, seed=1),
            Array((rows, E), dtype, scale=float(E) ** -0.5, seed=2, layout=w),
            Array((rows,), dtype, seed=3) if bias else None,
            Array(shape, dtype, **_fields(keys, values="cos")),
            Array(shape, dtype, **_fields(keys, values="sin")),
            1e-5,
        )
        heads = (("num_heads", H), ("num_kv_heads", K), ("interleaved", interleaved))
        return Call(operator, dtype, arguments, heads, kind)

    yield call("plain, interleaved", (1, 2, 16, 2, 1, 8, 8), True)  # bias dropped, v rotated, q and k swapped
    yield call("plain, half-split", (2, 3, 17, 2, 2, 8, 8), False, bias=False)
    yield call("partial rotation", (2, 2, 24, 3, 1, 16, 4), False, table={"layout": "wider"})
    yield call("positions in any order", (3, 4, 16, 2, 1, 8, 8), True, False, {"seed": 7}, own=True)
    yield call("tiny rows: eps decides", (1, 2, 16, 1, 1, 8, 8), False, x={"scale": 1e-3})
    yield call(
        "mean 1000", (1, 2, 33, 1, 1, 8, 8), True, x={"mean": 1000.0}
    )  # no variance taken for the mean of squares
    bad = {"planted": (((0, 1, 4), NAN),)}
    yield call("NaN in one row", (2, 3, 16, 2, 1, 8, 8), False, x=bad)
    yield call("strides, each its own", (3, 5, 40, 2, 1, 8, 8), True, x={"layout": "gaps"}, w="shifted")
    yield call("one token in each row", (3, 1, 16, 2, 1, 8, 8), True)
    yield call("weights not dense", (1, 2, 65, 2, 2, 24, 24), False, w="transposed")
    yield call("head dim 80, R 20", (1, 17, 33, 2, 1, 80, 20), False)
    yield call("65 tokens, 129 features", (1, 65, 129, 1, 1, 16, 16), True)  # tails of all tiles
    yield call("nothing", (2, 0, 8, 1, 1, 8, 8), False)


CORNERS: dict[str, Callable[[str, str, str], Iterator[Call]]] = {
    "rope": rotations,
    "norm_rope": rotations,
    "rms_norm_qkv_rope": projection,
    "attention": attention,
    "decode_attention": decode_attention,
}
