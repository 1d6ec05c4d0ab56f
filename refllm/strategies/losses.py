"""Calls of the losses, of logits and of what logits are made from."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.draws import NUMBERS, ROW_LENGTHS, Seeds, layouts, plant, scales, seeded, spot

KINDS = (
    "plain",
    "scale",
    "logits shifted by -100000",
    "huge logits",
    "confident rows",
    "equal logits",
    "near ties",
    "labels ignored",
    "all labels ignored",
    "another label is ignored",
    "first and last class",
    "NaN",
    "infinity",
)
"""logits shifted by -100000: in float16 by what it still holds. confident rows: the probability of the label is near 1.
labels ignored: some, and their rows hold NaN, which counts for nothing. another label is ignored: one that is no class
and not -100, below 0 or beyond V. infinity: -inf is a class that cannot be, +inf
makes the row NaN."""
ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 33, 65, 0)
IGNORED = -100
OTHERS_IGNORED = (-1, 255, -(2**31), 1_000_003)
"""What else people pass as ignore_index: -1, and 255 of image masks; others are there to be far from every class."""
_PRODUCTS = 1_000_000


def cross_entropy(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """cross_entropy: logits [N, V], labels [N], every reduction; ignore_index may be a class."""
    V = draw(st.sampled_from(ROW_LENGTHS))
    N = draw(st.sampled_from([n for n in ROWS if n * V <= NUMBERS]))
    kind = kind or draw(st.sampled_from(KINDS))
    lie = layouts(draw, (N, V), (N,))
    logits, labels = Array((N, V), dtype, scale=3.0, layout=lie[0]), _labels(draw, kind, N, V, lie[1])
    keywords = _keywords(draw, kind, V, labels)
    logits = _logits(draw, kind, logits)
    for n, value in labels.planted:
        if N and kind == "confident rows":
            logits = plant(logits, ((*n, int(value)), draw(st.sampled_from([15.0, 20.0, 30.0]))))
        elif N and kind == "labels ignored":
            logits = plant(_expanded_is_dense(logits), (n, float("nan")))
    logits, labels = seeded(Seeds(draw), logits, labels)
    return Call(operator, dtype, (logits, labels), keywords, kind)


def linear_cross_entropy(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """linear_cross_entropy: x [N, E], weight [V, E], labels [N]; logits of the order of 1 to 10."""
    V = draw(st.sampled_from([n for n in ROW_LENGTHS if n <= 1025]))
    E = draw(st.sampled_from((1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 257)))
    N = draw(st.sampled_from([n for n in ROWS if n * V * E <= _PRODUCTS]))
    kind = kind or draw(st.sampled_from(KINDS))
    lie = layouts(draw, (N, E), (V, E), (N,))
    x, labels = Array((N, E), dtype, layout=lie[0]), _labels(draw, kind, N, V, lie[2])
    weight = Array((V, E), dtype, scale=2 * float(E) ** -0.5, layout=_never_expanded(lie[1]))
    keywords = _keywords(draw, kind, V, labels)
    if kind == "logits shifted by -100000":
        low = -392.0 if dtype != "float16" else -112.0  # times 256; logits are float16 numbers
        x, weight = (replace(y, values="eighths", scale=1.0) for y in (x, weight))
        x, weight = plant(x, (((None, None), 0), 256.0)), plant(weight, (((None, None), 0), low))
    elif kind in ("scale", "NaN", "infinity"):
        x = _logits(draw, kind, x)
    elif kind == "equal logits":
        weight = replace(weight, values="ones", scale=0.25)
    elif kind == "near ties":
        weight = replace(weight, scale=0.01 * weight.scale, mean=1.0 / E)
    elif kind == "huge logits":
        weight = replace(weight, scale=100.0 * weight.scale)
    for n, value in labels.planted:
        if N and kind == "confident rows":
            x, weight = plant(x, ((*n, 0), 4.0)), plant(weight, ((int(value), 0), 5.0))
        elif N and kind == "labels ignored":
            x = plant(_expanded_is_dense(x), (n, float("nan")))
    x, weight, labels = seeded(Seeds(draw), x, weight, labels)
    return Call(operator, dtype, (x, weight, labels), keywords, kind)


def _labels(draw: st.DrawFn, kind: str, N: int, V: int, layout: str) -> Array:
    """[N] classes, some of them planted: ignored ones, the first and the last class, or any that a kind needs."""
    labels = Array((N,), "int64", "integers", scale=float(V), layout=_never_expanded(layout))
    if not N:
        return labels
    if kind == "all labels ignored":
        return plant(labels, ((), IGNORED))
    rows = draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=3, unique=True))
    if kind == "labels ignored":
        return plant(labels, *(((n,), IGNORED) for n in rows))
    if kind == "another label is ignored":
        other = draw(st.sampled_from([n for n in OTHERS_IGNORED if n < 0 or n >= V]))
        return plant(labels, *(((n,), float(other)) for n in rows))
    if kind in ("first and last class", "confident rows"):
        return plant(labels, *(((n,), draw(st.sampled_from(sorted({0, V - 1})))) for n in rows))
    return labels


def _keywords(draw: st.DrawFn, kind: str, V: int, labels: Array) -> tuple[tuple[str, Any], ...]:
    keywords: dict[str, Any] = {}
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    if reduction != "mean":
        keywords["reduction"] = reduction
    if kind == "first and last class" and draw(st.booleans()):  # a class that does not count, as padding tokens do not
        keywords["ignore_index"] = draw(st.sampled_from(sorted({0, V - 1})))
    if kind == "another label is ignored" and labels.planted:
        keywords["ignore_index"] = int(labels.planted[0][1])
    return tuple(keywords.items())


def _logits(draw: st.DrawFn, kind: str, x: Array) -> Array:
    """Rows [N, V] of a kind."""
    if kind == "scale":
        return replace(x, scale=draw(scales()))
    if kind == "logits shifted by -100000":
        apart = {"bfloat16": 1024.0, "float16": 64.0}.get(x.dtype, 8.0)  # so that the format still tells some apart
        return replace(x, values="eighths", scale=apart, mean=-6e4 if x.dtype == "float16" else -1e5)
    if kind == "huge logits":
        return replace(x, scale=draw(st.sampled_from([300.0, 5000.0])))
    if kind == "equal logits":
        return replace(x, values="ones")
    if kind == "near ties":
        return replace(x, scale=0.01, mean=1.0)
    if kind in ("NaN", "infinity") and 0 not in x.shape:
        bad = [float("nan")] if kind == "NaN" else [float("-inf"), float("inf")]
        return plant(x, (spot(draw, x.shape), draw(st.sampled_from(bad))))
    return x


def _expanded_is_dense(x: Array) -> Array:
    return replace(x, layout=_never_expanded(x.layout))


def _never_expanded(layout: str) -> str:
    return "dense" if layout == "expanded" else layout
