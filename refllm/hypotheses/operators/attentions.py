"""Mistakes in attention, and in attention over a cache."""

from collections.abc import Iterator
from typing import Any

from refllm.hypotheses.operators.edits import Edits
from refllm.hypotheses.operators.hypothesis import OpHypothesis, mistake

SCALE = "(D**-0.5 if scale is None else scale)"
_HEADS = "k, v = k.repeat(g, axis=1), np.nan_to_num(v.repeat(g, axis=1))\n"
_SEEN = "seen = np.ones((S, T), bool) if key_mask is None else key_mask[:, None, None]\n"
_CAUSAL = "seen = seen & (np.arange(T) <= np.arange(S)[:, None] + T - S) if causal else seen\n"
_SCORES = f"q @ k.swapaxes(2, 3) * {SCALE}"
_MASKED = f"s = np.where(seen, {_SCORES}, -np.inf)\n"
_TOP = "top = s.max(axis=-1, keepdims=True, initial=-1e300)\n"
_EXP, _TOTAL = "e = np.exp(s - top)\n", "total = e.sum(axis=-1, keepdims=True)\n"
_O, _LSE = "e @ v / np.where(total == 0, 1, total)", "np.log(total)[..., 0] + top[..., 0]"
_CALL = "attention(q[b], k[b, :, :n], v[b, :, :n], scale)[0]"
_TOKEN = "np.arange(S)[:, None]"
_TILES = ("2", "4", "8", "16", "32", "64", "128")
_DIMS = ("4", "8", "16", "32", "64")


def hypotheses() -> Iterator[OpHypothesis]:
    """All of `attention` and `decode_attention`."""
    for operator in ("attention", "decode_attention"):
        yield from _scale(operator)
        yield from _softmax(operator)
        yield from _grouped(operator)
        yield from _tiles(operator)
    yield from _masks()
    yield from _lse()
    yield from _cache()


def _scale(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *scales: str) -> OpHypothesis:
        """scales: what the scores are multiplied with."""
        return mistake(operator, name, says, *[((SCALE, scale),) for scale in scales])

    yield one("no scale", "the scores are not scaled", "(1 if scale is None else scale)", "1")
    yield one("divided by D", "the scores are divided by D, and not by its root", "(1 / D if scale is None else scale)")
    yield one(
        "scale from E",
        "the scores are divided by the root of H D, and not of D",
        "((q.shape[1] * D) ** -0.5 if scale is None else scale)",
    )
    yield one(
        "multiplied by the root of D",
        "the scores are multiplied by the root of D, and should be divided by it",
        "(D**0.5 if scale is None else scale)",
    )
    yield one(
        "scale of the number of keys",
        "the scores are divided by the root of T, the number of keys, and not of D",
        "(T**-0.5 if scale is None else scale)",
    )
    yield one(
        "scale of the number of heads",
        "the scores are divided by the root of H, the number of heads, and not of D",
        "(q.shape[1] ** -0.5 if scale is None else scale)",
    )
    yield one(
        "fourth root of D",
        "the scores are divided by the fourth root of D: the root of the root",
        "(D**-0.25 if scale is None else scale)",
    )
    yield one("scale argument ignored", "the scale is D^-1/2, whatever the argument says", "D**-0.5")
    yield one(
        "scale on top", "the argument scale comes on top of D^-1/2", "(D**-0.5 * (1 if scale is None else scale))"
    )
    yield one("scale squared", "the scale is applied twice", f"{SCALE} ** 2")
    yield one(
        "divided by the scale",
        "the scores are divided by the argument scale, and should be multiplied by it",
        "(D**-0.5 if scale is None else 1 / scale)",
    )
    yield one("sign of the scale lost", "a negative scale is used as its magnitude", f"abs({SCALE})")
    yield one("sign of the scores", "the scores have the wrong sign", f"-{SCALE}")
    yield mistake(
        operator,
        "scaled after the softmax",
        "the scale multiplies the weights, and not the scores",
        ((SCALE, "1"), (_O, f"{_O} * {SCALE}")),
    )


def _softmax(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    def over(axis: str) -> Edits:
        return (
            (_TOP, _TOP.replace("axis=-1", f"axis={axis}")),
            (_TOTAL, _TOTAL.replace("axis=-1", f"axis={axis}")),
            (_O, "e / np.where(total == 0, 1, total) @ v"),
        )

    yield one(
        "softmax over the queries",
        "the softmax runs over the queries, and not over the keys",
        over("-2"),
        ((_O, "np.nan_to_num(softmax(s, -2)) @ v"),),
    )
    yield one(
        "softmax over the heads",
        "the softmax runs over the heads, and not over the keys",
        over("1"),
        ((_O, "np.nan_to_num(softmax(s, 1)) @ v"),),
    )
    yield one("softmax over everything", "all scores of a head share one sum", over("(-2, -1)"))
    yield one(
        "base 2",
        "the weights are 2^s, and not e^s",
        ((_EXP, "e = np.exp2(s - top)\n"),),
        ((_EXP, "e = np.exp2(s - top)\n"), (_LSE, "np.log2(total)[..., 0] + top[..., 0]")),
    )
    yield one("not normalised", "the exponentials are not divided by their sum", ((_O, "e @ v"),))
    yield one(
        "divided by the number of keys",
        "the exponentials are divided by the number of keys, and not by their sum",
        ((_O, "e @ v / T"),),
    )
    yield one("no softmax", "the scores themselves weigh the values", ((_O, "np.where(np.isneginf(s), 0, s) @ v"),))
    yield one(
        "softmax twice",
        "the softmax is taken twice",
        ((_O, "softmax(np.where(np.isneginf(s), -np.inf, e / np.where(total == 0, 1, total))) @ v"),),
        ((_O, "softmax(e / np.where(total == 0, 1, total)) @ v"),),
    )
    yield one("uniform weights", "all visible keys have the same weight", ((_EXP, "e = 1.0 * ~np.isneginf(s)\n"),))
    yield one(
        "largest weight alone", "the value of the largest score is taken alone", ((_EXP, "e = 1.0 * (s == top)\n"),)
    )
    yield one(
        "maximum not subtracted",
        "the maximum is not subtracted, and the exponential overflows",
        ((_TOP, "top = np.zeros_like(s[..., :1])\n"),),
    )
    yield one(
        "weights in bfloat16",
        "the weights are rounded to NUMBER",
        ((_O, 'narrow(e, "NUMBER") @ v / np.where(total == 0, 1, total)'),),
        ((_O, 'narrow(e / np.where(total == 0, 1, total), "NUMBER") @ v'),),
        numbers=("bfloat16", "float16"),
        place=True,
    )
    yield one(
        "scores in bfloat16",
        "the scores are rounded to NUMBER",
        ((_SCORES, f'narrow({_SCORES}, "NUMBER")'),),
        ((_SCORES, f'narrow(q @ k.swapaxes(2, 3), "NUMBER") * {SCALE}'),),
        numbers=("bfloat16", "float16"),
        place=True,
    )
    yield one(
        "denominator in bfloat16",
        "the sum of the weights is rounded to NUMBER",
        ((_TOTAL, 'total = narrow(e.sum(axis=-1, keepdims=True), "NUMBER")\n'),),
        numbers=("bfloat16", "float16"),
    )
    yield one(
        "q in bfloat16",
        "q is rounded to NUMBER after it was scaled",
        ((_SCORES, f'narrow(q * {SCALE}, "NUMBER") @ k.swapaxes(2, 3)'),),
        numbers=("bfloat16", "float16"),
        place=True,
    )
    yield one(
        "keys as values", "the weights multiply k, and not v", (("np.nan_to_num(v.repeat", "np.nan_to_num(k.repeat"),)
    )
    yield one(
        "values as keys",
        "the scores are those of q and v, and not of q and k",
        (("k, v = k.repeat(g, axis=1),", "k, v = v.repeat(g, axis=1),"),),
    )
    yield one(
        "keys and values exchanged",
        "k and v are exchanged",
        ((_HEADS, "k, v = v.repeat(g, axis=1), k.repeat(g, axis=1)\n"),),
    )
    yield one(
        "distances for products",
        "the scores are squared distances, and not products",
        (("q @ k.swapaxes(2, 3)", "-((q[..., None, :] - k[..., None, :, :]) ** 2).sum(-1)"),),
    )
    yield one(
        "cosines for products",
        "the scores are those of q and k of length 1",
        (
            (
                "q @ k.swapaxes(2, 3)",
                "(q / np.linalg.norm(q, axis=-1, keepdims=True)) @ (k / np.linalg.norm(k, axis=-1, "
                "keepdims=True)).swapaxes(2, 3)",
            ),
        ),
    )
    yield one(
        "scores capped",
        "the scores are capped at NUMBER by a tanh",
        ((_SCORES, f"np.tanh({_SCORES} / NUMBER) * NUMBER"),),
        numbers=("30.0", "50.0", "20.0"),
    )
    yield one("query added to the result", "q is added to the result", ((_O, f"{_O} + q"),))
    yield one(
        "value of an extra key",
        "there is one more key, of score 0 and value 0: a denominator plus one",
        ((_TOTAL, "total = e.sum(axis=-1, keepdims=True) + np.exp(-top)\n"),),
        ((_TOTAL, "total = e.sum(axis=-1, keepdims=True) + 1\n"),),
    )


def _grouped(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, k: str, v: str) -> OpHypothesis:
        return mistake(operator, name, says, ((_HEADS, f"k, v = {k}, {v}\n"),))

    k, v = "k.repeat(g, axis=1)", "np.nan_to_num(v.repeat(g, axis=1))"
    tiled_k, tiled_v = "np.tile(k, (1, g, 1, 1))", "np.nan_to_num(np.tile(v, (1, g, 1, 1)))"
    first_k, first_v = "k[:, :1]", "np.nan_to_num(v[:, :1])"
    yield one(
        "heads by modulo",
        "key/value heads are tiled (0, 1, 0, 1), and not each repeated (0, 0, 1, 1)",
        tiled_k,
        tiled_v,
    )
    yield one(
        "keys by modulo", "the heads of k are tiled (0, 1, 0, 1), and those of v repeated (0, 0, 1, 1)", tiled_k, v
    )
    yield one(
        "values by modulo", "the heads of v are tiled (0, 1, 0, 1), and those of k repeated (0, 0, 1, 1)", k, tiled_v
    )
    yield one("first key head for all", "every query head reads key/value head 0", first_k, first_v)
    yield one("keys of the first head", "every query head reads the keys of head 0", first_k, v)
    yield one("values of the first head", "every query head reads the values of head 0", k, first_v)
    yield one(
        "last key head for all",
        "every query head reads the last key/value head",
        "k[:, -1:]",
        "np.nan_to_num(v[:, -1:])",
    )
    yield one(
        "heads reversed",
        "the key/value heads are read from the last to the first",
        "k[:, ::-1].repeat(g, axis=1)",
        "np.nan_to_num(v[:, ::-1].repeat(g, axis=1))",
    )
    yield one(
        "heads averaged",
        "every query head reads the mean of the key/value heads",
        "k.mean(axis=1, keepdims=True)",
        "v.mean(axis=1, keepdims=True)",
    )
    yield one(
        "heads off by one",
        "query head h reads the key/value head of head h + 1",
        "np.roll(k.repeat(g, axis=1), -1, 1)",
        "np.roll(np.nan_to_num(v.repeat(g, axis=1)), -1, 1)",
    )


def _tiles(operator: str) -> Iterator[OpHypothesis]:
    whole = _slots(f"np.arange(T) <= {_TOKEN} + n - S") if operator == "decode_attention" else ()

    def one(name: str, says: str, *codes: Edits, numbers: tuple[str, ...] = _TILES) -> OpHypothesis:
        """Tiles are those of what a sequence has, or of the whole cache."""
        every = [*codes, *((*whole, *code) for code in codes if whole)]
        return mistake(operator, name, says, *every, numbers=numbers)

    yield one(
        "last keys left out",
        "the last, partial tile of NUMBER keys is not read",
        ((_MASKED, f"seen = seen & (np.arange(T) < whole(T, NUMBER))\n    {_MASKED}"),),
    )
    yield one(
        "first keys alone",
        "no more than the first NUMBER keys are read",
        ((_MASKED, f"seen = seen & (np.arange(T) < NUMBER)\n    {_MASKED}"),),
    )
    yield one(
        "padding in the denominator",
        "the lanes past the last key, to NUMBER, count as keys of score 0",
        ((_TOTAL, "total = e.sum(axis=-1, keepdims=True) + (padded(T, NUMBER) - T) * np.exp(-top)\n"),),
        numbers=(*_TILES, "next_power(T)", "max(16, next_power(T))"),
    )
    online = "e = np.exp(s - running(s, NUMBER))\n"
    yield one(
        "no rescaling",
        "what was summed is not rescaled when a later tile of NUMBER keys has a larger maximum",
        ((_EXP, online),),
    )
    yield one(
        "result not rescaled",
        "the result is not rescaled when a later tile of NUMBER keys has a larger maximum",
        ((_O, "np.exp(s - running(s, NUMBER)) @ v / np.where(total == 0, 1, total)"),),
    )
    yield one(
        "denominator not rescaled",
        "the sum of the weights is not rescaled when a later tile of NUMBER keys has a larger maximum",
        ((_TOTAL, "total = np.exp(s - running(s, NUMBER)).sum(axis=-1, keepdims=True)\n"),),
    )
    yield one(
        "tiles not weighted",
        "tiles of NUMBER keys are added as if their maxima were the same",
        ((_EXP, "e = np.exp(s - tile_tops(s, NUMBER))\n"),),
    )
    yield one(
        "results of tiles not weighted",
        "the results of tiles of NUMBER keys are added as if their maxima "
        "were the same, and the sums of the weights rightly",
        ((_O, "np.exp(s - tile_tops(s, NUMBER)) @ v / np.where(total == 0, 1, total)"),),
    )
    yield one(
        "sums of tiles not weighted",
        "the sums of tiles of NUMBER keys are added as if their maxima were the same, and the results rightly",
        ((_TOTAL, "total = np.exp(s - tile_tops(s, NUMBER)).sum(axis=-1, keepdims=True)\n"),),
    )
    parts = (
        "[softmax(s[..., i : i + NUMBER]) @ v[..., i : i + NUMBER, :] for i in range(0, T, NUMBER) "
        "if not np.isneginf(s[..., i : i + NUMBER]).all()]"
    )
    yield one(
        "tiles averaged",
        "the results of tiles of NUMBER keys are averaged, and not weighted by their sums",
        ((_O, f"np.mean({parts}, axis=0)"),),
    )
    yield one(
        "dims left out of the scores",
        "the last, partial tile of NUMBER dims is missing from the scores",
        (("q @ k.swapaxes(2, 3)", "q[..., : whole(D, NUMBER)] @ k[..., : whole(D, NUMBER)].swapaxes(2, 3)"),),
        numbers=_DIMS,
    )
    yield one(
        "first dims alone",
        "only the first NUMBER dims enter the scores",
        (("q @ k.swapaxes(2, 3)", "q[..., :NUMBER] @ k[..., :NUMBER].swapaxes(2, 3)"),),
        numbers=_DIMS,
    )


def _masks() -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake("attention", name, says, *codes, **more)

    def causal(seen: str) -> Edits:
        return ((_CAUSAL, f"seen = seen & ({seen}) if causal else seen\n"),)

    def masked(value: str) -> Edits:
        return ((_MASKED, _MASKED.replace("-np.inf", value)),)

    keys, rows = "np.arange(T)", "np.arange(S)[:, None]"
    yield one("mask one too wide", "a query sees one key after itself", causal(f"{keys} <= {rows} + T - S + 1"))
    yield one("diagonal masked", "a query does not see its own key", causal(f"{keys} < {rows} + T - S"))
    yield one(
        "aligned at the start",
        "the causal mask is aligned at the top: query s sees keys 0 .. s, although earlier keys are cached",
        causal(f"{keys} <= {rows}"),
    )
    yield one(
        "aligned at the start, one too wide",
        "the causal mask is aligned at the top, and one key too wide",
        causal(f"{keys} <= {rows} + 1"),
    )
    yield one(
        "aligned at the start, diagonal masked",
        "the causal mask is aligned at the top, and hides the key of the query itself",
        causal(f"{keys} < {rows}"),
    )
    yield one(
        "upper triangle",
        "the wrong triangle is masked: a query sees itself and what comes later",
        causal(f"{keys} >= {rows} + T - S"),
        causal(f"{keys} >= {rows}"),
    )
    yield one(
        "strictly later keys",
        "the wrong triangle is masked: a query sees only what comes later",
        causal(f"{keys} > {rows} + T - S"),
        causal(f"{keys} > {rows}"),
    )
    yield one("own key alone", "a query sees its own key alone", causal(f"{keys} == {rows} + T - S"))
    yield one("q as keys", "the scores are those of q with itself", (("q @ k.swapaxes", "q @ q.swapaxes"),))
    yield one(
        "q and k exchanged",
        "the scores are k q^T, and not q k^T",
        (("q @ k.swapaxes(2, 3)", "(k @ q.swapaxes(2, 3) if S == T else q @ k.swapaxes(2, 3))"),),
    )
    yield one(
        "maximum of everything",
        "one maximum is subtracted from all rows of a head",
        ((_TOP, "top = s.max(axis=(-2, -1), keepdims=True, initial=-1e300) + 0 * s[..., :1] * 0\n"),),
    )
    yield one(
        "maximum of what is masked",
        "the maximum is that of all scores, the masked ones too",
        ((_TOP, f"top = ({_SCORES}).max(axis=-1, keepdims=True, initial=-1e300)\n"),),
    )
    yield one("causal ignored", "causal is not used: every query sees all keys", ((_CAUSAL, "seen = seen\n"),))
    yield one("always causal", "causal is not used: it is always causal", ((" if causal else seen\n", "\n"),))
    yield one("causal exchanged", "causal is taken the other way round", (("if causal", "if not causal"),))
    yield one(
        "window",
        "a query sees no more than NUMBER keys",
        causal(f"({keys} <= {rows} + T - S) & ({keys} > {rows} + T - S - NUMBER)"),
        numbers=("2", "3", "4", "8", "16", "32", "64", "128"),
    )
    yield one(
        "window of tiles",
        "a query sees its own tile of NUMBER keys and no more than two before it",
        causal(f"({keys} <= {rows} + T - S) & ({keys} >= ({rows} + T - S) // NUMBER * NUMBER - 2 * NUMBER)"),
        numbers=("8", "16", "32", "64"),
    )
    yield one("key mask ignored", "key_mask is not used", ((" if key_mask is None else key_mask[:, None, None]", ""),))
    yield one(
        "key mask inverted",
        "key_mask is taken the other way round: True hides a key",
        (("key_mask[:, None, None]", "~key_mask[:, None, None]"),),
    )
    yield one(
        "key mask of the first sequence",
        "all sequences share the key_mask of the first",
        (("key_mask[:, None, None]", "key_mask[:1, None, None]"),),
    )
    yield one(
        "key mask reversed",
        "key_mask is read from the last key to the first",
        (("key_mask[:, None, None]", "key_mask[:, None, None, ::-1]"),),
    )
    yield one(
        "key mask of the queries",
        "key_mask hides queries, and not keys",
        (("key_mask[:, None, None]", "key_mask[:, None, -S:, None] & np.ones((S, T), bool)"),),
    )
    yield one(
        "key mask without causal",
        "where there is a key_mask, it is not causal",
        ((_CAUSAL, _CAUSAL.replace("if causal", "if causal and key_mask is None")),),
    )
    yield one(
        "masks joined by or",
        "a key is seen that either mask shows, and both should",
        ((_CAUSAL, _CAUSAL.replace("seen & (", "(seen & (key_mask is not None)) | (")),),
    )
    after = "np.where(seen, e, 0) / np.where(total == 0, 1, total) @ v"
    yield one(
        "mask after the softmax",
        "the mask is applied after the softmax, whose rows then do not sum to 1",
        ((_MASKED, f"s = {_SCORES}\n"), (_O, after)),
    )
    yield one(
        "masked with 0",
        "masked scores are 0, and not -inf: masked keys have weight",
        masked("0.0"),
        masked("-1e-9"),
        masked("1e-9"),
    )
    yield one(
        "masked with a small number",
        "masked scores are NUMBER, and not -inf: masked keys have weight",
        masked("NUMBER"),
        numbers=("-1.0", "1.0", "-5.0", "-10.0", "-100.0"),
    )
    yield one(
        "mask added",
        "the mask of ones and zeros is added to the scores, and nothing is masked",
        ((_MASKED, f"s = {_SCORES} + (seen if causal or key_mask is not None else 0)\n"),),
        ((_MASKED, f"s = {_SCORES} + 1.0 * seen\n"),),
        ((_MASKED, f"s = {_SCORES} + 1.0 * ~seen\n"),),
    )
    yield one(
        "mask subtracted",
        "the mask of ones and zeros is subtracted from the scores",
        ((_MASKED, f"s = {_SCORES} - 1.0 * ~seen\n"),),
        ((_MASKED, f"s = {_SCORES} - 1.0 * seen\n"),),
    )
    yield one(
        "mask inverted",
        "what should be seen is masked, and the rest is seen",
        ((_MASKED, _MASKED.replace("(seen", "(~(seen & np.ones((S, T), bool))")),),
    )
    finite = masked("NUMBER")
    yield one(
        "finite sentinel",
        "masked scores are NUMBER, and valid ones may be smaller",
        finite,
        numbers=("-1e4", "-5e4", "-65504.0", "-10000.0", "-1e5", "-1e6"),
    )
    yield one(
        "last key left out",
        "the last key is never read",
        ((_MASKED, f"seen = seen & ({keys} < T - 1)\n    {_MASKED}"),),
        ((_MASKED, f"seen = seen & ({keys} < max(1, T - 1))\n    {_MASKED}"),),
    )
    yield one(
        "first key left out", "the first key is never read", ((_MASKED, f"seen = seen & ({keys} > 0)\n    {_MASKED}"),)
    )
    blind = "np.where(np.isneginf(s).all(-1, keepdims=True), {0}, {1})"
    mean = blind.format("v.mean(-2, keepdims=True)", _O)
    yield one(
        "mean for no keys",
        "a query without a key has the mean of all values, and should be 0",
        ((_O, mean),),
        ((_O, mean), (_LSE, "np.log(total + T * (total == 0))[..., 0] + top[..., 0]")),
        ((_MASKED, _MASKED.replace("-np.inf", "-1e30")),),
        ((_MASKED, _MASKED.replace("-np.inf", "-3.4e38")),),
        ((_MASKED, _MASKED.replace("-np.inf", "-1e9")),),
    )
    nan = "np.where(np.isneginf(s).all(-1), np.nan, {0})"
    yield one(
        "NaN for no keys",
        "a query without a key is 0 / 0, and should be 0",
        ((_O, blind.format("np.nan", _O)),),
        ((_O, blind.format("np.nan", _O)), (_LSE, nan.format(_LSE))),
    )


def _lse() -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *texts: str) -> OpHypothesis:
        return mistake("attention", name, says, *[((_LSE, text),) for text in texts])

    yield one("LSE without the maximum", "lse lacks the maximum that was subtracted", "np.log(total)[..., 0]")
    yield one(
        "LSE in base 2",
        "lse is a logarithm of base 2",
        f"({_LSE}) / np.log(2)",
        "np.log2(total)[..., 0] + top[..., 0]",
        "np.log(total)[..., 0] + top[..., 0] / np.log(2)",
    )
    yield one("LSE is the maximum", "lse is the largest score", "top[..., 0]")
    yield one(
        "LSE is the sum", "lse is the sum, without its logarithm", "total[..., 0]", "(total * np.exp(top))[..., 0]"
    )
    yield one(
        "LSE of unscaled scores",
        "lse is that of the scores before they were scaled",
        (
            "(lambda z, m: np.log(np.exp(z - m).sum(-1)) + m[..., 0])(*(lambda z: (z, z.max(-1, keepdims=True, "
            "initial=-1e300)))(np.where(seen, q @ k.swapaxes(2, 3), -np.inf)))"
        ),
    )
    yield one(
        "LSE of all keys",
        "lse is that of all keys, the masked ones too",
        (f"(lambda z: np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1))({_SCORES})"),
    )
    yield one(
        "LSE of no keys",
        "lse of a query without a key is 0, and should be -inf",
        f"np.where(total[..., 0] == 0, 0, {_LSE})",
        f"np.where(total[..., 0] == 0, -1e30, {_LSE})",
        f"np.where(total[..., 0] == 0, np.inf, {_LSE})",
    )
    yield one("sign of LSE", "lse has the wrong sign", f"-({_LSE})")
    yield one("LSE of the mean", "lse is the logarithm of the mean, and not of the sum", f"{_LSE} - np.log(T)")
    yield one(
        "maximum subtracted twice in LSE",
        "lse has the maximum with the wrong sign",
        "np.log(total)[..., 0] - top[..., 0]",
    )


def _slots(seen: str, value: str = "-np.inf") -> Edits:
    """All T slots of the cache, of which a token sees those that `seen` says; n: the length."""
    return (
        (_CALL, "attention(q[b], k[b], v[b], scale, n)[0]"),
        (_CAUSAL, f"n = causal\n    seen = seen & ({seen})\n"),
        ("-np.inf)", f"{value})"),
    )


def _cache() -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake("decode_attention", name, says, *codes, **more)

    def length(n: str) -> Edits:
        return (("int(n)) for b", f"{n}) for b"),)

    slots, slot, token = _slots, "np.arange(T)", _TOKEN
    whole = slots("np.ones((S, T), bool)")
    yield one(
        "lengths ignored",
        "the lengths are not used: every token sees all slots of the cache",
        whole,
        slots(f"{slot} <= {token} + T - S"),
    )
    yield one(
        "one slot too many",
        "one slot too many is read: <= length, and not < length",
        slots(f"{slot} <= {token} + n - S + 1"),
        slots(f"{slot} <= n + 0 * {token}"),
    )
    yield one(
        "last slot left out",
        "the newest slot of each sequence is not read",
        slots(f"{slot} < {token} + n - S"),
        slots(f"({slot} <= {token} + n - S) & ({slot} < n - 1)"),
    )
    yield one(
        "first slot left out",
        "the first slot of the cache is not read",
        slots(f"({slot} <= {token} + n - S) & ({slot} > 0)"),
    )
    yield one(
        "length of the first sequence", "the length of the first sequence is used for all", length("int(lengths[0])")
    )
    yield one(
        "length of the last sequence", "the length of the last sequence is used for all", length("int(lengths[-1])")
    )
    yield one("largest length", "the largest length is used for all sequences", length("int(lengths.max())"))
    yield one("smallest length", "the smallest length is used for all sequences", length("int(lengths.min())"))
    yield one(
        "lengths reversed",
        "the lengths are read from the last sequence to the first",
        (("enumerate(lengths)", "enumerate(lengths[::-1])"),),
    )
    yield one(
        "tokens see each other",
        "of several new tokens, the earlier see the later ones",
        slots(f"{slot} < n + 0 * {token}"),
    )
    yield one(
        "tokens after the length",
        "token s sees length + s slots: the new tokens are taken to come after them",
        slots(f"{slot} < n + {token}"),
        slots(f"{slot} <= n + {token}"),
    )
    yield one(
        "aligned at the start",
        "token s sees the slots 0 .. s, and not 0 .. length - S + s",
        slots(f"({slot} <= {token}) & ({slot} < n)"),
        slots(f"{slot} <= {token}"),
    )
    yield one(
        "last slots read",
        "the last slots of the cache are read, and not the first ones",
        slots(f"({slot} >= T - n) & ({slot} <= {token} + T - S)"),
        slots(f"{slot} >= T - n + 0 * {token}"),
    )
    yield one(
        "slots past the length alone",
        "what lies past the length is read, and not what lies before it",
        slots(f"{slot} >= n + 0 * {token}"),
    )
    yield one("newest slot alone", "a token sees its own slot alone", slots(f"{slot} == {token} + n - S"))
    yield one(
        "masked with 0",
        "masked scores are 0, and not -inf: slots past the length have weight",
        slots(f"{slot} <= {token} + n - S", "0.0"),
        slots(f"{slot} <= {token} + n - S", "-1e-9"),
    )
    yield one(
        "finite sentinel",
        "masked scores are NUMBER, and valid ones may be smaller",
        slots(f"{slot} <= {token} + n - S", "NUMBER"),
        numbers=("-1e4", "-5e4", "-65504.0", "-1e5", "-1e6"),
    )
    yield one(
        "cache of the first sequence",
        "all sequences read the cache of the first",
        ((_CALL, _CALL.replace("k[b,", "k[:1,").replace("v[b,", "v[:1,")),),
    )
    yield one(
        "window",
        "a token sees no more than NUMBER slots",
        slots(f"({slot} <= {token} + n - S) & ({slot} > {token} + n - S - NUMBER)"),
        numbers=("2", "4", "8", "16", "32", "64", "128"),
    )
    empty = f"(padded(T, NUMBER) // NUMBER - padded(n - S + 1 + {token}, NUMBER) // NUMBER)"
    yield one(
        "empty splits counted",
        "a split of NUMBER slots of which none is in use counts as one of sum 1",
        (
            *slots(f"{slot} <= {token} + n - S"),
            (_TOTAL, f"total = e.sum(axis=-1, keepdims=True) + {empty} * np.exp(-top)\n"),
        ),
        numbers=("16", "32", "64", "128"),
    )
    yield one(
        "NaN for no slots",
        "a sequence without a slot is 0 / 0, and should be 0",
        ((_O, f"np.where(total == 0, np.nan, {_O})"),),
    )
