"""Mistakes in rotations: alone, after the norm of each head, and after a projection."""

from collections.abc import Iterator
from typing import Any

from refllm.hypotheses.operators.edits import Edits
from refllm.hypotheses.operators.hypothesis import OpHypothesis, mistake
from refllm.hypotheses.operators.norms import BLOCKS, MEAN, ROOT, root, weight

_TABLES = "cos, sin, R, out = cos[..., None, :, :], sin[..., None, :, :], 2 * cos.shape[-1], x.copy()\n"
_PAIRS = "(slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))"
_HALVES = "(slice(0, R // 2), slice(R // 2, R))"
_TURN = "out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin\n"
_LEFT = "out[..., first], out[..., second] = "


def hypotheses() -> Iterator[OpHypothesis]:
    """All of the three operators that rotate."""
    for operator in ("rope", "norm_rope", "rms_norm_qkv_rope"):
        yield from _rotation(operator)
        yield from _tables(operator)
    yield from _which("rope", "rotate({0}, cos, sin, interleaved)", "{0}.copy()")
    yield from _norm_rope()
    yield from _projected()


def _rotation(operator: str) -> Iterator[OpHypothesis]:
    """What may be wrong with a pair."""

    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    def turned(text: str) -> Edits:
        return ((_TURN, text),)

    def paired(text: str) -> Edits:
        return ((_PAIRS, text),)

    yield one(
        "sign of sin",
        "it rotates the other way: the sign of sin is wrong",
        turned(f"{_LEFT}a * cos + b * sin, b * cos - a * sin\n"),
    )
    yield one(
        "minus in the second",
        "the second of a pair has a minus where a plus belongs",
        turned(f"{_LEFT}a * cos - b * sin, b * cos - a * sin\n"),
        turned(f"{_LEFT}a * cos - b * sin, a * sin - b * cos\n"),
    )
    yield one(
        "plus in the first",
        "the first of a pair has a plus where a minus belongs",
        turned(f"{_LEFT}a * cos + b * sin, b * cos + a * sin\n"),
    )
    yield one(
        "cos and sin exchanged", "cos and sin are exchanged", turned(f"{_LEFT}a * sin - b * cos, b * sin + a * cos\n")
    )
    yield one("no sin", "the products with sin are missing", turned(f"{_LEFT}a * cos, b * cos\n"))
    yield one(
        "second for the first",
        "the two of a pair change places",
        turned(f"{_LEFT}b * cos + a * sin, a * cos - b * sin\n"),
    )
    yield one(
        "sin with its own number",
        "each number of a pair is multiplied with its own sin, and not the other's",
        turned(f"{_LEFT}a * cos - a * sin, b * cos + b * sin\n"),
    )
    yield one(
        "second from the turned first",
        "the second of a pair is computed from the first one after that was rotated",
        turned(f"a = a * cos - b * sin\n    {_LEFT}a, b * cos + a * sin\n"),
    )
    yield one(
        "first from the turned second",
        "the first of a pair is computed from the second one after that was rotated",
        turned(f"b = b * cos + a * sin\n    {_LEFT}a * cos - b * sin, b\n"),
    )
    yield one(
        "other pairs",
        "interleaved pairs are taken for halves, and halves for interleaved pairs",
        paired(_PAIRS.replace("if interleaved", "if not interleaved")),
    )
    yield one("always half-split", "interleaved is not used: pairs are always (i, i + R/2)", paired(_HALVES))
    yield one(
        "always interleaved",
        "interleaved is not used: pairs are always (2i, 2i + 1)",
        paired("(slice(0, R, 2), slice(1, R, 2))"),
    )
    over = "D = x.shape[-1]\n    first, second = "
    whole = _PAIRS.replace(_HALVES, "(slice(0, R // 2), slice(D // 2, D // 2 + R // 2))")
    yield one(
        "pairs over the whole head",
        "pairs are (i, i + D/2) where they should be (i, i + R/2)",
        (("first, second = ", over), (_PAIRS, whole)),
    )
    last = "(slice(D - R, D, 2), slice(D - R + 1, D, 2)) if interleaved else (slice(D - R, D - R // 2), "
    yield one(
        "last dims rotated",
        "the last R dims are rotated, and not the first R",
        (("first, second = ", over), (_PAIRS, last + "slice(D - R // 2, D))")),
    )
    halves = "out[..., : R // 2], out[..., R // 2 : R] = a * cos - b * sin, b * cos + a * sin\n"
    yield one("pairs written as halves", "interleaved pairs are rotated, and written as two halves", turned(halves))
    pairs = "out[..., 0:R:2], out[..., 1:R:2] = a * cos - b * sin, b * cos + a * sin\n"
    yield one("halves written as pairs", "halves are rotated, and written as interleaved pairs", turned(pairs))
    yield one(
        "rest of the head zero",
        "the dims from R on are 0, and should pass through",
        (("x.copy()\n", "np.zeros_like(x)\n"),),
    )
    yield one(
        "rotated twice",
        "the rotation is applied twice",
        turned("a, b = a * cos - b * sin, b * cos + a * sin\n    " + _TURN),
    )
    yield one("not rotated", "nothing is rotated", turned("pass\n"))
    yield one(
        "only the first head rotated",
        "only the first head is rotated",
        ((_TURN, f"{_TURN}    out[:, 1:] = x[:, 1:]\n"),),
    )
    yield one(
        "last head not rotated", "the last head is not rotated", ((_TURN, f"{_TURN}    out[:, -1:] = x[:, -1:]\n"),)
    )
    yield one(
        "first pair not rotated",
        "the first pair is not rotated",
        ((_TURN, f"{_TURN}    out[..., first][..., :1], out[..., second][..., :1] = a[..., :1], b[..., :1]\n"),),
    )
    yield one(
        "last pair not rotated",
        "the last pair is not rotated",
        ((_TURN, f"{_TURN}    out[..., first][..., -1:], out[..., second][..., -1:] = a[..., -1:], b[..., -1:]\n"),),
    )


def _tables(operator: str) -> Iterator[OpHypothesis]:
    """What may be wrong with cos and sin."""

    def one(name: str, says: str, *changes: str, **more: Any) -> OpHypothesis:
        """changes: how a table {0}, [..., 1, S, R/2], is changed."""
        codes = [
            ((_TABLES, f"{_TABLES}    cos, sin = {change.format('cos')}, {change.format('sin')}\n"),)
            for change in changes
        ]
        return mistake(operator, name, says, *codes, **more)

    yield one(
        "one position on",
        "positions are off by one: a token takes the tables of the next one",
        "np.roll({0}, -1, axis=-2)",
        "{0}[..., np.minimum(np.arange(1, {0}.shape[-2] + 1), {0}.shape[-2] - 1), :]",
    )
    yield one(
        "one position late",
        "positions are off by one: a token takes the tables of the one before",
        "np.roll({0}, 1, axis=-2)",
        "{0}[..., np.maximum(np.arange(-1, {0}.shape[-2] - 1), 0), :]",
    )
    yield one("first position for all", "every token is rotated as the first one", "{0}[..., :1, :]")
    yield one("last position for all", "every token is rotated as the last one", "{0}[..., -1:, :]")
    yield one("positions reversed", "the tables are read from the last position to the first", "{0}[..., ::-1, :]")
    yield one("frequencies reversed", "the frequencies are read from the last to the first", "{0}[..., ::-1]")
    yield one("first frequency for all", "every pair has the angle of the first one", "{0}[..., :1]")
    yield one(
        "table of the first sequence",
        "the batch axis of cos and sin is ignored: all sequences have the tables of the first",
        "{0}[:1] if {0}.ndim == 4 else {0}",
    )
    yield one(
        "tables by head",
        "the tables are read by head, and not by position",
        "{0}.swapaxes(-3, -2)[..., : x.shape[1], :, :]",
    )
    yield one(
        "table rounded",
        "cos and sin are rounded to NUMBER",
        'narrow({0}, "NUMBER")',
        numbers=("bfloat16", "float16"),
        place=True,
    )
    stretched = (
        "c, s = (np.concatenate([t, t], -1) if interleaved else np.repeat(t, 2, -1) for t in (cos, sin))\n"
        f"    {_LEFT}a * c[..., first] - b * s[..., first], b * c[..., second] + a * s[..., second]\n"
    )
    yield mistake(
        operator,
        "tables stretched for the other pairs",
        "the tables are stretched for the other pairing, so that the two of a pair have not the same angle",
        ((_TURN, stretched),),
    )


def _which(operator: str, turned: str, plain: str) -> Iterator[OpHypothesis]:
    """k or q alone."""
    for name, other in (("k", "keys"), ("q", "queries")):
        yield mistake(
            operator, f"{other} not rotated", f"{name} is not rotated", ((turned.format(name), plain.format(name)),)
        )


def _norm_rope() -> Iterator[OpHypothesis]:
    operator = "norm_rope"
    yield from root(operator)
    yield from weight(operator, "weight[:, None] * x")
    centre = 'x = x - x.mean(axis=-1, keepdims=True) if norm == "layer" else x\n'
    line = f"y = weight[:, None] * x / {ROOT}\n        return rotate(y, cos, sin, interleaved)"
    right = "return one(q, q_weight), one(k, k_weight)"

    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    for name, words in (("k", "keys"), ("q", "queries")):
        yield one(
            f"{words} not rotated",
            f"{name} is not rotated",
            (
                ("def one(x, weight):", "def one(x, weight, turn=True):"),
                ("return rotate(y, cos, sin, interleaved)", "return rotate(y, cos, sin, interleaved) if turn else y"),
                (f"one({name}, {name}_weight)", f"one({name}, {name}_weight, False)"),
            ),
        )
    yield one(
        "rotated before the norm",
        "the rotation comes before the norm",
        (
            (f"        {centre}", f"        x = rotate(x, cos, sin, interleaved)\n        {centre}"),
            ("return rotate(y, cos, sin, interleaved)", "return y"),
        ),
    )
    yield one(
        "weight after the rotation",
        "the weights meet the dims after they were rotated",
        ((line, f"return weight[:, None] * rotate(x / {ROOT}, cos, sin, interleaved)"),),
    )
    yield one(
        "q_weight for k",
        "the weight of q is used for k",
        ((right, "return one(q, q_weight), one(k, q_weight[: k.shape[1]])"),),
    )
    yield one(
        "k_weight for q",
        "the weight of k is used for q",
        ((right, "return one(q, k_weight[np.arange(q.shape[1]) % k.shape[1]]), one(k, k_weight)"),),
        ((right, "return one(q, k_weight.repeat(q.shape[1] // k.shape[1], 0)), one(k, k_weight)"),),
    )
    yield one(
        "weights of the first head",
        "the weight of the first head is used for all heads",
        (("weight[:, None] * x", "weight[0] * x"),),
    )
    yield one(
        "norm over all heads",
        "the norm runs over all heads of a token together",
        ((MEAN, MEAN.replace("-1", "(1, 3)")), ("x.mean(axis=-1", "x.mean(axis=(1, 3)")),
        ((MEAN, MEAN.replace("-1", "(1, 3)")),),
    )
    yield one(
        "norm over all positions",
        "the norm runs over all positions of a head together",
        ((MEAN, MEAN.replace("-1", "(2, 3)")), ("x.mean(axis=-1", "x.mean(axis=(2, 3)")),
    )
    yield one(
        "norm along the positions",
        "the norm runs along the positions, and not along the dims",
        ((MEAN, MEAN.replace("-1", "2")), ("x.mean(axis=-1", "x.mean(axis=2")),
    )
    yield one("always rms", "norm is not used: it is always an RMSNorm", ((centre, "x = x\n"),))
    yield one("always layer", "norm is not used: it is always a LayerNorm", ((' if norm == "layer" else x\n', "\n"),))
    yield one(
        "norms exchanged",
        'norm is taken the other way round: "rms" for "layer"',
        (('norm == "layer"', 'norm == "rms"'),),
    )
    rotated = MEAN.replace("x * x", "x[..., : 2 * cos.shape[-1]] ** 2")
    yield one(
        "statistics of the rotated part",
        "the norm sees only the dims that are rotated",
        ((MEAN, rotated), ("x.mean(", "x[..., : 2 * cos.shape[-1]].mean(")),
        ((MEAN, rotated),),
        ((MEAN, f"({rotated} * 2 * cos.shape[-1] / x.shape[-1])"),),
    )
    rest = "raw = x\n        " + centre
    from_r = "        y[..., 2 * cos.shape[-1] :] = {0}[..., 2 * cos.shape[-1] :]\n        return rotate("
    yield one(
        "rest of the head not normed",
        "the dims from R on are copied from the input",
        ((centre, rest), ("        return rotate(", from_r.format("raw"))),
    )
    yield one(
        "rest of the head without its weight",
        "the dims from R on are normed, and not multiplied with their weight",
        (("        return rotate(", from_r.format(f"(x / {ROOT})")),),
    )
    halves = "weight.reshape(len(weight), 2, -1).swapaxes(1, 2).reshape(weight.shape)"
    yield one(
        "weight in halves",
        "the weights are read in halves where pairs are interleaved",
        (("y = weight", f"weight = {halves} if interleaved else weight\n        y = weight"),),
    )
    for name, words in (("k", "keys"), ("q", "queries")):
        yield one(
            f"{words} not normed",
            f"{name} is not normed",
            ((f"one({name}, {name}_weight)", f"rotate({name}, cos, sin, interleaved)"),),
        )
        yield one(
            f"{words} without a weight",
            f"the weight of {name} is not applied",
            ((f"one({name}, {name}_weight)", f"one({name}, np.ones_like({name}_weight))"),),
        )
    yield one(
        "padding in the variance",
        "the padding lanes of a head count in the variance, as (0 - mean)^2",
        ((centre, rest), (MEAN, f"({MEAN} + ((NUMBER) / x.shape[-1] - 1) * (raw - x)[..., :1] ** 2)")),
        numbers=BLOCKS,
    )


def _projected() -> Iterator[OpHypothesis]:
    operator = "rms_norm_qkv_rope"
    yield from root(operator)
    yield from weight(operator, "weight * x")
    right = "return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved), v"
    bias = "y = y if b_qkv is None else y + b_qkv\n"
    heads = "y = y.reshape(*x.shape[:2], num_heads + 2 * num_kv_heads, -1).swapaxes(1, 2)\n"
    split = "q, k, v = np.split(y, [num_heads, num_heads + num_kv_heads], axis=1)\n"
    norm = f" / {ROOT}"

    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    yield from _which(operator, "rotate({0}, cos, sin, interleaved)", "{0}")
    yield one("v rotated", "v is rotated as well", ((right, right[:-1] + "rotate(v, cos, sin, interleaved)"),))
    yield one("norm skipped", "the projection sees x, and not its norm", ((norm, ""), ("weight * x", "x")))
    yield one("scale left out", "x is multiplied with the norm's weight, and not divided by its root", ((norm, ""),))
    yield one("bias left out", "the bias is not added", ((bias, "pass\n"),))
    yield one("bias subtracted", "the bias is subtracted", (("y + b_qkv", "y - b_qkv"),))
    yield one(
        "bias of v left out",
        "the bias reaches q and k, and not v",
        (
            (
                "y + b_qkv",
                "y + b_qkv * (np.arange(len(b_qkv)) < len(b_qkv) * (num_heads + num_kv_heads) / "
                "(num_heads + 2 * num_kv_heads))",
            ),
        ),
    )
    yield one(
        "bias of v alone",
        "the bias reaches v, and not q and k",
        (
            (
                "y + b_qkv",
                "y + b_qkv * (np.arange(len(b_qkv)) >= len(b_qkv) * (num_heads + num_kv_heads) / "
                "(num_heads + 2 * num_kv_heads))",
            ),
        ),
    )
    split_bias = (
        "bias = np.zeros(y.shape[-1]) if b_qkv is None else b_qkv\n"
        "    bq, bk, bv = np.split(bias.reshape(num_heads + 2 * num_kv_heads, 1, -1), "
        "[num_heads, num_heads + num_kv_heads])\n"
    )
    yield one(
        "bias after the rotation",
        "the bias is added after the rotation",
        ((bias, split_bias), (right, right.replace("), rotate", ") + bq, rotate").replace("), v", ") + bk, v + bv"))),
    )
    columns = "b_qkv.reshape(num_heads + 2 * num_kv_heads, 2, -1).swapaxes(1, 2).ravel()"
    rotary = (
        "b_qkv.reshape(num_heads + 2 * num_kv_heads, -1)[:, np.concatenate([np.arange(2 * cos.shape[-1]).reshape(2, "
        "-1).T.ravel(), np.arange(2 * cos.shape[-1], len(b_qkv) // (num_heads + 2 * num_kv_heads))])].ravel()"
    )
    yield one(
        "bias by column",
        "the bias is taken in an order of columns in which pairs are neighbours",
        (("y + b_qkv", f"y + {columns}"),),
        (("y + b_qkv", f"y + ({rotary} if interleaved else b_qkv)"),),
        (("y + b_qkv", f"y + (b_qkv if interleaved else {rotary})"),),
        (("y + b_qkv", f"y + {rotary}"),),
    )
    kv = split.replace("q, k, v", "q, v, k")
    yield one("k and v exchanged", "the rows of w_qkv are read as q, v, k", ((split, kv),))
    order = "q, k, v = (y[:, 2 * num_kv_heads :], y[:, :num_kv_heads], y[:, num_kv_heads : 2 * num_kv_heads])\n"
    yield one("q last", "the rows of w_qkv are read as k, v, q", ((split, order),))
    dims = (
        "parts = np.split(y, np.array([num_heads, num_heads + num_kv_heads]) * "
        "(y.shape[-1] // (num_heads + 2 * num_kv_heads)), axis=-1)\n"
        "    n = y.shape[-1] // (num_heads + 2 * num_kv_heads)\n"
        "    q, k, v = (part.reshape(*x.shape[:2], {0}) for part in parts)\n"
    )
    strided = dims.replace("{0})", "n, -1).transpose(0, 3, 1, 2)")
    every = "y = y.reshape(*x.shape[:2], -1, num_heads + 2 * num_kv_heads).transpose(0, 3, 1, 2)\n"
    yield one(
        "heads strided",
        "the rows of w_qkv are read as [D, heads], and not as [heads, D]",
        ((heads, strided), (split, "pass\n")),
        ((heads, every),),
    )
    flat = dims.replace("part.reshape(*x.shape[:2], {0})", "part.reshape(len(x), -1, x.shape[1], n)")
    whole = "y = y.reshape(len(x), num_heads + 2 * num_kv_heads, x.shape[1], -1)\n"
    yield one(
        "reshaped, not transposed",
        "[B, S, heads D] is reshaped to [B, heads, S, D] without a transpose",
        ((heads, flat), (split, "pass\n")),
        ((heads, whole),),
    )
    grouped = (
        "g = num_heads // num_kv_heads\n"
        "    y = y.reshape(len(x), num_kv_heads, g + 2, *y.shape[2:])\n"
        "    q, k, v = y[:, :, :g].reshape(len(x), num_heads, *y.shape[3:]), y[:, :, g], y[:, :, g + 1]\n"
    )
    yield one(
        "grouped layout",
        "the rows of w_qkv are read group by group: its queries, its key, its value",
        ((split, grouped),),
    )
    yield one(
        "scale folded into q",
        "q is multiplied by D^-1/2, which attention does",
        (
            (
                right,
                right.replace(
                    "rotate(q, cos, sin, interleaved)", "rotate(q, cos, sin, interleaved) * q.shape[-1] ** -0.5"
                ),
            ),
        ),
    )
    product = f"y = weight * x / {ROOT} @ w_qkv.T"
    left = f"(weight * x / {ROOT})[..., : whole(x.shape[-1], NUMBER)] @ w_qkv.T[: whole(x.shape[-1], NUMBER)]"
    yield one(
        "tail of E left out",
        "the last, partial tile of NUMBER columns is missing from the product",
        ((product, f"y = {left}"),),
        (
            (MEAN, "(np.sum(x[..., : whole(x.shape[-1], NUMBER)] ** 2, axis=-1, keepdims=True) / x.shape[-1])"),
            ("@ w_qkv.T", "@ (w_qkv.T * (np.arange(x.shape[-1]) < whole(x.shape[-1], NUMBER))[:, None])"),
        ),
        numbers=("8", "16", "32", "64", "128"),
    )
    yield one(
        "norm after the projection",
        "the norm is that of the projected row",
        ((product, f"x0, x = x, x @ w_qkv.T\n    y, x = x / {ROOT}, x0"),),
    )
