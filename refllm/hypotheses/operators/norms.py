"""Mistakes in norms: alone, after the residual sum, over each head, and before a projection."""

from collections.abc import Iterator
from typing import Any

from refllm.hypotheses.operators.edits import Edits
from refllm.hypotheses.operators.hypothesis import OpHypothesis, mistake

MEAN = "np.mean(x * x, axis=-1, keepdims=True)"
ROOT = f"np.sqrt({MEAN} + eps)"
SUM = "np.sum(x * x, axis=-1, keepdims=True)"
_CENTRE = "x = x - x.mean(axis=-1, keepdims=True)\n"
_BIAS = "return y if bias is None else y + bias"
TILES = ("4", "8", "16", "32", "64", "128", "256", "512", "1024")
BLOCKS = (
    "next_power(x.shape[-1])",
    *(f"max({tile}, next_power(x.shape[-1]))" for tile in (8, 16, 32, 64, 128, 256, 512, 1024)),
    *(f"padded(x.shape[-1], {tile})" for tile in (4, 8, 16, 32, 64, 128, 256)),
    *("16", "32", "64", "128", "256", "512", "1024", "2048"),
)
_EPS = ("1e-5", "1e-6", "1e-8", "1e-12", "1e-3")


def hypotheses() -> Iterator[OpHypothesis]:
    """All of the four norms."""
    for operator in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
        layer = "layer" in operator
        yield from root(operator)
        yield from weight(operator, "weight * x")
        yield from of_rows(operator)
        yield from _layer(operator) if layer else _rms(operator)
        if operator.startswith("add"):
            yield from _sum(operator, "layer_norm" if layer else "rms_norm")


def root(operator: str) -> Iterator[OpHypothesis]:
    """What may be wrong with 1 / sqrt(mean(x^2) + eps), wherever it stands."""

    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    sqrt_mean, sqrt_sum = f"np.sqrt({MEAN})", f"np.sqrt({SUM})"
    yield one("no eps", "eps is left out", ((ROOT, sqrt_mean),))
    yield one(
        "eps outside the root",
        "eps is added outside the root, and not under it",
        ((ROOT, f"({sqrt_mean} + eps)"),),
        ((ROOT, f"({sqrt_mean} + np.sqrt(eps))"),),
        ((f"/ {ROOT}", f"* (1 / {sqrt_mean} + eps)"),),
        ((f"x / {ROOT}", f"(x / {sqrt_mean} + eps)"),),
    )
    yield one(
        "eps fixed",
        "eps is NUMBER, whatever the argument says",
        ((f"{MEAN} + eps", f"{MEAN} + NUMBER"),),
        ((ROOT, f"({sqrt_mean} + NUMBER)"),),
        numbers=_EPS,
    )
    yield one("eps squared", "eps is squared before it is added", ((f"{MEAN} + eps", f"{MEAN} + eps**2"),))
    yield one("eps twice", "eps is added twice", ((f"{MEAN} + eps", f"{MEAN} + 2 * eps"),))
    yield one("eps subtracted", "eps is subtracted", ((f"{MEAN} + eps", f"{MEAN} - eps"),))
    yield one(
        "eps as a floor",
        "eps is the least that the mean square may be, and is not added",
        ((f"{MEAN} + eps", f"np.maximum({MEAN}, eps)"),),
        ((ROOT, f"np.maximum({sqrt_mean}, eps)"),),
    )
    yield one(
        "eps times E",
        "eps is added to the sum of squares, before it is divided",
        ((ROOT, f"np.sqrt(({SUM} + eps) / x.shape[-1])"),),
    )
    yield one("no root", "it divides by the mean square, and not by its root", ((ROOT, f"({MEAN} + eps)"),))
    yield one(
        "multiplied by the root", "it multiplies by the root, and should divide by it", ((f"/ {ROOT}", f"* {ROOT}"),)
    )
    yield one(
        "squares summed",
        "the squares are summed, and not averaged",
        ((MEAN, SUM),),
        ((ROOT, f"({sqrt_sum} + eps)"),),
        ((ROOT, f"np.maximum({sqrt_sum}, 1e-12)"),),
        ((ROOT, f"np.maximum({sqrt_sum}, eps)"),),
    )
    yield one(
        "magnitudes averaged",
        "it divides by the mean magnitude, and not by the root of the mean square",
        ((ROOT, "(np.mean(np.abs(x), axis=-1, keepdims=True) + eps)"),),
        ((ROOT, "np.mean(np.abs(x), axis=-1, keepdims=True)"),),
    )
    yield one(
        "largest magnitude",
        "it divides by the largest magnitude of a row, and not by the root of the mean square",
        ((ROOT, "(np.max(np.abs(x), axis=-1, keepdims=True) + eps)"),),
        ((ROOT, "np.max(np.abs(x), axis=-1, keepdims=True)"),),
        ((ROOT, "np.sqrt(np.max(x * x, axis=-1, keepdims=True) + eps)"),),
    )
    yield one(
        "divided by E - 1" if "layer" not in operator else "unbiased variance",
        "the sum of squares is divided by E - 1, and not by E",
        ((MEAN, f"({SUM} / (x.shape[-1] - 1))"),),
    )
    if "layer" in operator:
        yield one(
            "unbiased variance, eps outside the root",
            "it divides by the deviation over E - 1, and eps is outside the root",
            ((ROOT, f"(np.sqrt({SUM} / (x.shape[-1] - 1)) + eps)"),),
        )
    yield one(
        "divided by the rows",
        "the sum of squares is divided by the number of rows, and not by E",
        ((MEAN, f"({SUM} / len(x))"),),
    )
    yield one(
        "mean over the padded row",
        "the sum of squares is divided by the length of the padded row, NUMBER",
        ((MEAN, f"({SUM} / (NUMBER))"),),
        numbers=BLOCKS,
    )
    yield one(
        "only the first tile in the mean",
        "only the first NUMBER columns of a row enter the mean square",
        ((MEAN, "np.mean(x[..., :NUMBER] ** 2, axis=-1, keepdims=True)"),),
        ((MEAN, "(np.sum(x[..., :NUMBER] ** 2, axis=-1, keepdims=True) / x.shape[-1])"),),
        numbers=TILES,
    )
    yield one(
        "last tile not in the mean",
        "the last, partial tile of NUMBER columns is missing from the mean square",
        ((MEAN, "(np.sum(x[..., : whole(x.shape[-1], NUMBER)] ** 2, axis=-1, keepdims=True) / x.shape[-1])"),),
        numbers=TILES,
    )
    yield one(
        "only the last tile in the mean",
        "of a row longer than a tile only the last NUMBER columns enter the mean square",
        ((MEAN, "(np.sum(x[..., whole(x.shape[-1] - 1, NUMBER) :] ** 2, axis=-1, keepdims=True) / x.shape[-1])"),),
        numbers=TILES,
    )
    yield one(
        "root rounded",
        "the root is kept in NUMBER",
        ((f"/ {ROOT}", f'* narrow(1 / {ROOT}, "NUMBER")'),),
        ((ROOT, f'narrow({ROOT}, "NUMBER")'),),
        numbers=("bfloat16", "float16"),
    )


def weight(operator: str, product: str) -> Iterator[OpHypothesis]:
    """What may be wrong with the weight; product: how it stands in the text, "weight * x"."""
    factor = product.removesuffix(" * x")
    yield mistake(operator, "weight plus one", "the weight is used as 1 + weight", ((product, f"(1 + {factor}) * x"),))
    yield mistake(operator, "no weight", "the weight is not applied", ((product, "x"),))
    yield mistake(operator, "divided by the weight", "it divides by the weight", ((product, f"1 / {factor} * x"),))
    yield mistake(operator, "weight squared", "the weight is applied twice", ((product, f"{factor} ** 2 * x"),))
    if factor == "weight":
        yield mistake(
            operator, "weight of the first column", "one weight serves every column", ((product, "weight[:1] * x"),)
        )
        yield mistake(operator, "weight reversed", "the weight is read backwards", ((product, "weight[::-1] * x"),))


def of_rows(operator: str) -> Iterator[OpHypothesis]:
    """What is taken of the wrong rows."""
    both = MEAN if "layer" not in operator else f"{MEAN}"
    names = {
        "mean over everything": ("one mean is taken over the whole array, and not one for each row", "np.mean(x * x)"),
        "mean down the columns": (
            "the mean runs down the columns (axis 0), and not along each row",
            "np.mean(x * x, axis=0, keepdims=True)",
        ),
        "statistics of the first row": ("every row is divided by the root of the first one", f"{MEAN}[:1]"),
    }
    for name, (says, new) in names.items():
        codes: list[Edits] = [((both, new),)]
        if "layer" in operator:  # the mean that is subtracted as well
            mean = {"np.mean(x * x)": "x.mean()", f"{MEAN}[:1]": "x.mean(axis=-1, keepdims=True)[:1]"}
            codes.append(
                (("x.mean(axis=-1, keepdims=True)", mean.get(new, "x.mean(axis=0, keepdims=True)")), (both, new))
            )
        yield mistake(operator, name, says, *codes)


def _rms(operator: str) -> Iterator[OpHypothesis]:
    line = f"return weight * x / {ROOT}"
    yield mistake(
        operator, "mean subtracted", "the mean is subtracted: this is a LayerNorm", ((line, f"{_CENTRE}    {line}"),)
    )
    yield mistake(
        operator,
        "variance for the mean square",
        "the variance is under the root, and x is not centred",
        ((MEAN, "np.var(x, axis=-1, keepdims=True)"),),
        ((MEAN, "np.var(x, axis=-1, ddof=1, keepdims=True)"),),
        ((ROOT, "(np.std(x, axis=-1, keepdims=True) + eps)"),),
        ((ROOT, "(np.std(x, axis=-1, ddof=1, keepdims=True) + eps)"),),
    )
    yield mistake(
        operator,
        "square of the mean",
        "the mean is squared, and not the squares averaged",
        ((MEAN, "np.mean(x, axis=-1, keepdims=True) ** 2"),),
    )
    yield mistake(
        operator,
        "mean without the square",
        "the mean of x is under the root, and not that of its squares",
        ((MEAN, "np.mean(x, axis=-1, keepdims=True)"),),
        ((MEAN, "np.abs(np.mean(x, axis=-1, keepdims=True))"),),
        ((MEAN, "np.mean(np.abs(x), axis=-1, keepdims=True)"),),
    )
    yield mistake(
        operator,
        "weight before the mean",
        "the weight is applied before the mean square is taken",
        ((line, f"x = weight * x\n    return x / {ROOT}"),),
    )
    yield mistake(operator, "not normed", "x is not divided by anything", ((f" / {ROOT}", ""),))


def _layer(operator: str) -> Iterator[OpHypothesis]:
    raw = (_CENTRE, f"raw = x\n    {_CENTRE}")
    yield mistake(
        operator, "mean not subtracted", "the mean is not subtracted: this is an RMSNorm", ((_CENTRE, "x = x\n"),)
    )
    yield mistake(
        operator,
        "result not centred",
        "the mean is subtracted for the variance, and not in the result",
        (raw, ("weight * x", "weight * raw")),
    )
    yield mistake(
        operator,
        "mean square for the variance",
        "the mean square of x is under the root, and not its variance",
        (raw, (MEAN, MEAN.replace("x * x", "raw * raw"))),
    )
    yield mistake(operator, "bias left out", "the bias is not added", ((_BIAS, "return y"),))
    yield mistake(operator, "bias subtracted", "the bias is subtracted", ((_BIAS, _BIAS.replace("y +", "y -")),))
    yield mistake(operator, "bias twice", "the bias is added twice", ((_BIAS, _BIAS.replace("y +", "y + 2 *")),))
    yield mistake(
        operator,
        "bias before the weight",
        "the bias is added before the weight multiplies",
        ((f"weight * x / {ROOT}", f"weight * (x / {ROOT} + (0 if bias is None else bias))"), (_BIAS, "return y")),
    )
    yield mistake(
        operator,
        "weight and bias exchanged",
        "weight and bias are exchanged",
        (("weight * x", "(0 if bias is None else bias) * x"), (_BIAS, "return y + weight")),
    )
    yield mistake(
        operator,
        "weight and bias of the first column",
        "one weight and one bias serve every column",
        (("weight * x", "weight[:1] * x"), (_BIAS, _BIAS.replace("y + bias", "y + bias[:1]"))),
    )
    yield mistake(
        operator,
        "mean of the first row",
        "every row is centred with the mean of the first one",
        ((_CENTRE, "x = x - x.mean(axis=-1, keepdims=True)[:1]\n"),),
    )
    yield mistake(
        operator,
        "mean of everything subtracted",
        "one mean is subtracted from all rows",
        ((_CENTRE, "x = x - x.mean()\n"),),
    )
    yield mistake(
        operator,
        "centred with the padded row",
        "the sum of a row is divided by the length of the padded row, NUMBER, for its mean",
        ((_CENTRE, "x = x - x.sum(axis=-1, keepdims=True) / (NUMBER)\n"),),
        numbers=BLOCKS,
    )
    yield mistake(
        operator,
        "centred with the first tile",
        "the mean that is subtracted is that of the first NUMBER columns",
        ((_CENTRE, "x = x - x[..., :NUMBER].mean(axis=-1, keepdims=True)\n"),),
        numbers=TILES,
    )
    padding = f"({SUM} + ((NUMBER) - x.shape[-1]) * (raw - x)[..., :1] ** 2) / x.shape[-1]"
    yield mistake(
        operator,
        "padding in the variance",
        "the padding lanes of a ragged row count in the variance, as (0 - mean)^2",
        (raw, (MEAN, f"({padding})")),
        numbers=BLOCKS,
    )
    yield mistake(
        operator,
        "median",
        "the median is subtracted, and not the mean",
        ((_CENTRE, "x = x - np.median(x, axis=-1, keepdims=True)\n"),),
    )
    yield mistake(operator, "centred, not divided", "x is centred, and not divided by anything", ((f" / {ROOT}", ""),))


def _sum(operator: str, norm: str) -> Iterator[OpHypothesis]:
    """What may be wrong with the residual sum."""
    line = f"return {norm}(residual + x, " + ("weight, bias, eps)" if norm == "layer_norm" else "weight, eps)")
    right = f"{line}, residual + x"
    call = line.removeprefix("return ")

    def returns(*results: str) -> Edits:
        return ((right, f"return {', '.join(results)}"),)

    yield mistake(
        operator, "x returned as the sum", "the second result is x as it came, and not residual + x", returns(call, "x")
    )
    yield mistake(
        operator,
        "residual returned as the sum",
        "the second result is the residual as it came, and not residual + x",
        returns(call, "residual"),
    )
    yield mistake(
        operator,
        "normed value returned as the sum",
        "the second result is the normed value, and not residual + x",
        returns(call, call),
    )
    yield mistake(
        operator, "results exchanged", "sum and norm are returned in the other order", returns("residual + x", call)
    )
    yield mistake(
        operator,
        "residual left out of the norm",
        "the norm is that of x alone",
        returns(call.replace("residual + x", "x"), "residual + x"),
    )
    yield mistake(
        operator,
        "x left out of the norm",
        "the norm is that of the residual alone",
        returns(call.replace("residual + x", "residual"), "residual + x"),
    )
    yield mistake(
        operator,
        "residual added after the norm",
        "the residual is added after the norm",
        returns("residual + " + call.replace("residual + x", "x"), "residual + x"),
        returns("residual + " + call, "residual + x"),
        returns("residual + " + call.replace("residual + x", "x"), "residual + " + call.replace("residual + x", "x")),
    )
    yield mistake(
        operator,
        "x added after the norm",
        "x is added after the norm of the residual",
        returns("x + " + call.replace("residual + x", "residual"), "residual + x"),
    )
    minus = call.replace("residual + x", "residual - x")
    yield mistake(
        operator,
        "x subtracted",
        "x is subtracted from the residual",
        returns(minus, "residual - x"),
        returns(minus, "residual + x"),
        returns(call, "residual - x"),
    )
    yield mistake(
        operator,
        "nothing added",
        "nothing is added: both results are those of x alone",
        returns(call.replace("residual + x", "x"), "x"),
    )
    first = call.replace("residual + x", "residual[:1] + x")
    yield mistake(
        operator,
        "residual of the first row",
        "every row is added to the residual of the first one",
        returns(first, "residual[:1] + x"),
    )
    yield mistake(
        operator,
        "sum doubled",
        "the residual is added twice",
        returns(call.replace("residual + x", "2 * residual + x"), "2 * residual + x"),
        returns(call, "2 * residual + x"),
    )
    both = 'narrow(narrow(residual, "bfloat16") + narrow(x, "bfloat16"), "bfloat16")'
    one = 'narrow(residual + x, "bfloat16")'
    yield mistake(
        operator,
        "sum in bfloat16",
        "x and the residual meet in bfloat16 whatever their dtype",
        *(returns(call.replace("residual + x", how), how) for how in (one, both)),
        place=True,
    )
    centred = "(residual + x) - (residual + x).mean(axis=-1, keepdims=True)"
    yield mistake(operator, "sum centred", "the sum that returns has lost the mean of its row", returns(call, centred))
    of_x = MEAN.replace("x * x", "NUMBER * NUMBER")
    for name, argument in (("x", "x"), ("the residual", "residual")):
        if norm == "rms_norm":
            scaled = ROOT.replace(MEAN, of_x.replace("NUMBER", argument))
            yield mistake(
                operator,
                f"mean square of {name} alone",
                f"the scale is that of {name} alone",
                returns(f"weight * (residual + x) / {scaled}", "residual + x"),
            )
