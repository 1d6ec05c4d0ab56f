"""Mistakes in the loss, of logits and of a projection."""

from collections.abc import Iterator
from typing import Any

from refllm.hypotheses.operators.edits import Edits
from refllm.hypotheses.operators.hypothesis import OpHypothesis, mistake

_COUNTED = "counted = labels != ignore_index\n"
_SHIFTED = "z = logits[counted] - logits[counted].max(axis=-1, keepdims=True)\n"
_LOSS = "loss[counted] = np.log(np.exp(z).sum(axis=-1)) - z[np.arange(len(z)), labels[counted]]\n"
_LOG_SUM, _LABEL = "np.log(np.exp(z).sum(axis=-1))", "z[np.arange(len(z)), labels[counted]]"
_RESULT = 'loss if reduction == "none" else loss.sum() / (counted.sum() if reduction == "mean" else 1)'
_MEAN = 'loss.sum() / (counted.sum() if reduction == "mean" else 1)'
_TILES = ("4", "8", "16", "32", "64", "128", "256", "512", "1024")


def hypotheses() -> Iterator[OpHypothesis]:
    """All of `cross_entropy` and `linear_cross_entropy`."""
    for operator in ("cross_entropy", "linear_cross_entropy"):
        yield from _rows(operator)
        yield from _label(operator)
        yield from _softmax(operator)
        yield from _reduction(operator)
        yield from _tiles(operator)
    yield from _projection()


def _rows(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    def as_label(label: str) -> Edits:
        return (
            (
                _COUNTED,
                f"labels = np.where(labels == ignore_index, {label}, labels)\n"
                "    counted = np.ones(len(labels), bool)\n",
            ),
        )

    def inside(label: str) -> Edits:
        """The same, with the mean over the counted rows."""
        return (
            *as_label(label),
            ("    counted = np.ones", "    kept = given != ignore_index\n    counted = np.ones"),
            ("labels = np.where(", "given = labels\n    labels = np.where("),
            ("counted.sum()", "kept.sum()"),
        )

    clamped: Edits = (
        (_COUNTED, "given, labels = labels, np.maximum(labels, 0)\n    counted = np.ones(len(labels), bool)\n"),
    )
    kept: Edits = (("counted.sum()", "(given != ignore_index).sum()"),)
    yield one(
        "mean over all rows",
        "the mean is taken over all rows, with those that are ignored",
        (("counted.sum()", "len(labels)"),),
    )
    yield one(
        "ignored rows count",
        "an ignored row counts as if its label were 0",
        as_label("0"),
        inside("0"),
        clamped,
        (*clamped, *kept),
    )
    yield one(
        "ignored rows count at the end",
        "an ignored row counts as if its label were the last one",
        as_label("logits.shape[-1] - 1"),
        inside("logits.shape[-1] - 1"),
        as_label("ignore_index"),
        inside("ignore_index"),
    )
    yield one(
        "ignored rows have no label",
        "an ignored row counts with the logarithm of its sum, without a label",
        (
            (_COUNTED, "kept = labels != ignore_index\n    counted = np.ones(len(labels), bool)\n"),
            (_LABEL, "kept * z[np.arange(len(z)), np.where(kept, labels, 0)]"),
        ),
    )
    yield one(
        "ignore_index fixed",
        "only -100 is ignored, whatever ignore_index says",
        (("labels != ignore_index", "labels != -100"),),
        (("labels != ignore_index", "labels != -100"), ("counted.sum()", "(labels != ignore_index).sum()")),
    )
    yield one(
        "negative labels ignored",
        "every negative label is ignored, whatever ignore_index says",
        (("labels != ignore_index", "labels >= 0"),),
    )
    yield one(
        "ignored rows counted, others not",
        "the rows that count are ignored, and the others count",
        (("labels != ignore_index", "labels == ignore_index"), ("labels[counted]]", "np.maximum(labels[counted], 0)]")),
    )
    yield one(
        "losses copied from the first row",
        "every row has the loss of the first one",
        ((f"({_RESULT},)", f"({_RESULT.replace('loss', '(loss[:1] + 0 * loss)')},)"),),
    )
    yield one(
        "zero for no rows",
        "the mean over no rows is 0, and should be NaN",
        (("counted.sum() if", "max(1, counted.sum()) if"),),
    )


def _label(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    def at(label: str) -> Edits:
        return ((_LABEL, f"z[np.arange(len(z)), {label}]"),)

    shifted = "logits, labels = logits[:-1], labels[1:]\n    "
    last = ('loss if reduction == "none"', 'np.append(loss, 0) if reduction == "none"')
    yield one(
        "labels shifted",
        "labels are shifted by one: a row has the label of the next one",
        ((_COUNTED, shifted + _COUNTED), last),
        ((_COUNTED, f"labels = np.roll(labels, -1)\n    {_COUNTED}"),),
        ((_COUNTED, f"labels = np.append(labels[1:], ignore_index)\n    {_COUNTED}"),),
        ((_COUNTED, f"labels = np.append(labels[1:], labels[-1:])\n    {_COUNTED}"),),
    )
    yield one(
        "labels shifted back",
        "labels are shifted by one: a row has the label of the one before",
        ((_COUNTED, f"labels = np.roll(labels, 1)\n    {_COUNTED}"),),
        ((_COUNTED, f"labels = np.append(labels[:1], labels[:-1])\n    {_COUNTED}"),),
        ((_COUNTED, f"labels = np.append(ignore_index, labels[:-1])\n    {_COUNTED}"),),
    )
    yield one("label minus one", "the class before the label is read", at("labels[counted] - 1"))
    yield one("label plus one", "the class after the label is read", at("(labels[counted] + 1) % z.shape[-1]"))
    yield one("largest for the label", "the largest logit is read, and not the label's", at("z.argmax(axis=-1)"))
    yield one("first class for the label", "the first class is read, and not the label", at("0 * labels[counted]"))
    yield one("label of the first row", "every row has the label of the first one", at("labels[counted][:1]"))
    yield one("mean for the label", "the mean over all classes is read, and not the label", ((_LABEL, "z.mean(-1)"),))
    yield one(
        "label left out", "the label's logit is not subtracted", ((f" - {_LABEL}", " + logits[counted].max(axis=-1)"),)
    )
    yield one(
        "label's logit twice",
        "the label's own logit counts twice in the sum",
        ((_LOG_SUM, f"np.log(np.exp(z).sum(axis=-1) + np.exp({_LABEL}))"),),
    )
    yield one(
        "label left out of the sum",
        "the label's own logit is left out of the sum",
        ((_LOG_SUM, f"np.log(np.exp(z).sum(axis=-1) - np.exp({_LABEL}))"),),
    )


def _softmax(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *codes, **more)

    def of_p(text: str) -> Edits:
        return ((_LOSS, f"p = softmax(z)[np.arange(len(z)), labels[counted]]\n    loss[counted] = {text}\n"),)

    def prepared(text: str) -> Edits:
        """The logits are changed first."""
        return ((_COUNTED, f"{text}\n    {_COUNTED}"),)

    yield one(
        "maximum not subtracted",
        "the maximum is not subtracted, and the exponential overflows",
        ((_SHIFTED, "z = logits[counted]\n"),),
        (
            (
                _LOSS,
                "p = np.exp(logits[counted])\n    loss[counted] = "
                "-np.log((p / p.sum(axis=-1, keepdims=True))[np.arange(len(z)), labels[counted]])\n",
            ),
        ),
    )
    yield one(
        "maximum of everything",
        "one maximum is subtracted from all rows",
        ((_SHIFTED, "z = logits[counted] - logits[counted].max()\n"),),
    )
    yield one(
        "maximum not added back",
        "the maximum is subtracted in the sum alone",
        ((_LABEL, "logits[counted][np.arange(len(z)), labels[counted]]"),),
    )
    yield one(
        "maximum added twice",
        "the maximum is taken from the label's logit alone",
        ((_LOG_SUM, "(np.log(np.exp(z).sum(axis=-1)) + logits[counted].max(axis=-1))"),),
    )
    yield one(
        "sign", "the sign is wrong: log p, and not -log p", ((f"{_LOG_SUM} - {_LABEL}", f"{_LABEL} - {_LOG_SUM}"),)
    )
    yield one("softmax twice", "the softmax is taken twice", prepared("logits = softmax(logits)"))
    yield one(
        "log-softmax of the softmax's logarithm",
        "the probabilities' logarithm is taken of the sigmoid, class by class",
        of_p("np.logaddexp(0, -logits[counted][np.arange(len(z)), labels[counted]])"),
    )
    yield one(
        "probability kept from 0",
        "NUMBER is added to the probability before its logarithm",
        of_p("-np.log(p + NUMBER)"),
        numbers=("1e-12", "1e-10", "1e-9", "1e-8", "1e-7", "1e-6", "1e-5"),
    )
    yield one(
        "probability clipped",
        "the probability is clipped at NUMBER before its logarithm",
        of_p("-np.log(np.maximum(p, NUMBER))"),
        of_p("-np.log(np.clip(p, NUMBER, 1 - NUMBER))"),
        numbers=("1e-15", "1e-12", "1e-10", "1e-9", "1e-8", "1e-7", "1e-6"),
    )
    yield one(
        "logarithm of the probability", "the logarithm is taken of the probability, which may be 0", of_p("-np.log(p)")
    )
    yield one("no logarithm", "the logarithm is missing: 1 - p, or -p", of_p("1 - p"), of_p("-p"), of_p("p"))
    yield one(
        "base 2", "the logarithm has the base 2", of_p("-np.log2(p)"), ((_LOG_SUM, "np.log2(np.exp(z).sum(axis=-1))"),)
    )
    yield one("base 10", "the logarithm has the base 10", of_p("-np.log10(p)"))
    yield one("exponential of the loss", "it is the perplexity, e to the loss", of_p("1 / p"))
    yield one(
        "softmax down the rows",
        "the softmax runs over the rows (axis 0), and not along each row",
        prepared("logits = np.log(softmax(logits, 0))")
        + (
            (_LOG_SUM, "0"),
            ("z = logits[counted] - logits[counted].max(axis=-1, keepdims=True)", "z = logits[counted]"),
        ),
        (
            (_SHIFTED, "z = logits[counted] - logits[counted].max(axis=0)\n"),
            (_LOG_SUM, "np.log(np.exp(z).sum(axis=0))[labels[counted]]"),
        ),
    )
    yield one("sum over everything", "one sum serves all rows", ((_LOG_SUM, "np.log(np.exp(z).sum())"),))
    yield one(
        "logarithm of the sum left out",
        "the logarithm of the sum is missing: the logit alone",
        ((_SHIFTED, "z = logits[counted]\n"), (_LOG_SUM, "0")),
        ((_LOG_SUM, "0"),),
    )
    yield one(
        "logarithm of the mean",
        "the logarithm is that of the mean of the exponentials, and not of their sum",
        ((_LOG_SUM, "np.log(np.exp(z).mean(axis=-1))"),),
    )
    yield one(
        "label smoothing",
        "NUMBER of the label's weight is spread over all classes",
        ((_LABEL, f"((1 - NUMBER) * {_LABEL} + NUMBER * z.mean(-1))"),),
        numbers=("0.1", "0.05", "0.2"),
    )
    yield one(
        "squared distance",
        "it is the squared distance of the probabilities from the label's",
        of_p("((softmax(z) - np.eye(z.shape[-1])[labels[counted]]) ** 2).sum(-1)"),
        of_p("((softmax(z) - np.eye(z.shape[-1])[labels[counted]]) ** 2).mean(-1)"),
    )
    yield one("focal loss", "it is the focal loss, (1 - p)^2 times the loss", of_p("-np.log(p) * (1 - p) ** 2"))
    yield one(
        "logits in bfloat16",
        "the logits are rounded to NUMBER before the loss",
        prepared('logits = narrow(logits, "NUMBER")'),
        numbers=("bfloat16", "float16"),
        place=True,
    )
    yield one(
        "loss in bfloat16",
        "the loss of a row is kept in NUMBER",
        ((_LOSS, f'{_LOSS}    loss = narrow(loss, "NUMBER")\n'),),
        *_also_of_rounded_logits(operator),
        numbers=("bfloat16", "float16"),
    )
    yield one(
        "sum in bfloat16",
        "the sum of the exponentials is kept in NUMBER",
        ((_LOG_SUM, 'np.log(narrow(np.exp(z).sum(axis=-1), "NUMBER"))'),),
        numbers=("bfloat16", "float16"),
    )
    yield one(
        "logits capped",
        "the logits are capped at NUMBER by a tanh",
        prepared("logits = np.tanh(logits / NUMBER) * NUMBER"),
        numbers=("30.0", "50.0", "15.0"),
    )
    yield one(
        "logits clipped",
        "the logits are clipped to -NUMBER .. NUMBER",
        prepared("logits = np.clip(logits, -NUMBER, NUMBER)"),
        numbers=("1", "10", "30", "50", "80", "88", "100"),
    )


def _also_of_rounded_logits(operator: str) -> list[Edits]:
    """The loss of a row kept in a narrow format, of logits that are honestly rounded to it."""
    if operator != "linear_cross_entropy":
        return []
    logits = ("cross_entropy(x @ weight.T,", "cross_entropy(narrow(x @ weight.T, 'NUMBER'),")
    return [((_LOSS, f'{_LOSS}    loss = narrow(loss, "NUMBER")\n'), logits)]


def _reduction(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: str) -> OpHypothesis:
        return mistake(operator, name, says, *[((_RESULT, code),) for code in codes])

    yield one("sum for mean", 'reduction="mean" gives the sum', 'loss if reduction == "none" else loss.sum()')
    yield one(
        "mean for sum", 'reduction="sum" gives the mean', 'loss if reduction == "none" else loss.sum() / counted.sum()'
    )
    yield one(
        "mean and sum exchanged",
        "sum and mean are exchanged",
        'loss if reduction == "none" else loss.sum() / (counted.sum() if reduction == "sum" else 1)',
    )
    yield one(
        "mean over the classes",
        "the mean runs over the classes as well: it is too small by V",
        _RESULT.replace("counted.sum() if", "counted.sum() * logits.shape[-1] if"),
    )
    yield one(
        "mean over the classes alone",
        "it is divided by the number of classes, and not of rows",
        _RESULT.replace("counted.sum() if", "logits.shape[-1] if"),
    )
    yield one(
        "every loss divided",
        'the losses of reduction="none" are divided by the number of counted rows',
        _RESULT.replace('loss if reduction == "none"', 'loss / counted.sum() if reduction == "none"'),
    )
    yield one(
        "divided by rows less one",
        "the mean is divided by the counted rows less one",
        _RESULT.replace("counted.sum() if", "(counted.sum() - 1) if"),
    )
    yield one(
        "median",
        "it is the median of the losses, and not their mean",
        _RESULT.replace(
            "loss.sum() /", '(np.median(loss[counted]) * counted.sum() if reduction == "mean" else loss.sum()) /'
        ),
    )
    yield one(
        "last loss",
        "it is the loss of the last row, and not their mean",
        _RESULT.replace("loss.sum() /", 'loss[counted][-1] * (counted.sum() if reduction == "mean" else 1) /'),
    )


def _tiles(operator: str) -> Iterator[OpHypothesis]:
    def one(name: str, says: str, *codes: Edits, numbers: tuple[str, ...] = _TILES) -> OpHypothesis:
        return mistake(operator, name, says, *codes, numbers=numbers)

    cut = "z[..., : whole(z.shape[-1], NUMBER)]"
    yield one(
        "last classes left out",
        "the last, partial tile of NUMBER classes is missing from the sum",
        ((_LOG_SUM, f"np.log(np.exp({cut}).sum(axis=-1))"),),
    )
    yield one(
        "padding in the sum",
        "the padding lanes of the last tile of NUMBER count as logits of 0",
        (
            (
                _LOG_SUM,
                "np.log(np.exp(z).sum(axis=-1) + (padded(z.shape[-1], NUMBER) - z.shape[-1]) * "
                "np.exp(-logits[counted].max(axis=-1)))",
            ),
        ),
        numbers=(*_TILES, "2048", "4096", "next_power(z.shape[-1])", "max(16, next_power(z.shape[-1]))"),
    )
    yield one(
        "lanes not weighted",
        "the sums of NUMBER lanes are added as if their maxima were the same",
        ((_LOG_SUM, "np.log(np.exp(z - lane_tops(z, NUMBER)).sum(axis=-1))"),),
        numbers=(*_TILES, "2048", "4096"),
    )
    yield one(
        "no rescaling",
        "the running sum is not rescaled when a later tile of NUMBER has a larger maximum",
        ((_LOG_SUM, "np.log(np.exp(z - running(z, NUMBER)).sum(axis=-1))"),),
    )
    yield one(
        "tiles not weighted",
        "the sums of tiles of NUMBER are added as if their maxima were the same",
        ((_LOG_SUM, "np.log(np.exp(z - tile_tops(z, NUMBER)).sum(axis=-1))"),),
    )
    yield one(
        "only the first classes",
        "only the first NUMBER classes are in the sum",
        ((_LOG_SUM, "np.log(np.exp(z[..., :NUMBER]).sum(axis=-1))"),),
    )
    yield one(
        "only the last classes",
        "only the last tile of NUMBER classes is in the sum",
        ((_LOG_SUM, "np.log(np.exp(z[..., whole(z.shape[-1] - 1, NUMBER) :]).sum(axis=-1))"),),
    )


def _projection() -> Iterator[OpHypothesis]:
    operator = "linear_cross_entropy"
    call = "return cross_entropy(x @ weight.T, labels, ignore_index, reduction)"

    def one(name: str, says: str, *logits: str, **more: Any) -> OpHypothesis:
        return mistake(operator, name, says, *[((call, call.replace("x @ weight.T", z)),) for z in logits], **more)

    root = "x.shape[-1] ** 0.5"
    yield one("logits divided by the root of E", "the logits are divided by the root of E", f"x @ weight.T / {root}")
    yield one(
        "logits multiplied by the root of E", "the logits are multiplied by the root of E", f"x @ weight.T * {root}"
    )
    yield one("logits divided by E", "the logits are divided by E", "x @ weight.T / x.shape[-1]")
    yield one("x normed", "x is brought to length 1 first", "x / np.sqrt((x * x).sum(-1, keepdims=True)) @ weight.T")
    yield one(
        "tail of E left out",
        "the last, partial tile of NUMBER columns is missing from the product",
        "x[:, : whole(x.shape[-1], NUMBER)] @ weight.T[: whole(x.shape[-1], NUMBER)]",
        numbers=_TILES,
    )
    narrow = "narrow(narrow(x, 'NUMBER') @ narrow(weight, 'NUMBER').T, 'NUMBER')"
    yield one(
        "product in bfloat16", "the product is formed in NUMBER", narrow, numbers=("bfloat16", "float16"), place=True
    )
    yield one(
        "factors in bfloat16",
        "x and the weight are rounded to NUMBER before the product",
        "narrow(x, 'NUMBER') @ narrow(weight, 'NUMBER').T",
        numbers=("bfloat16", "float16"),
        place=True,
    )
    chunks = (
        "parts = [cross_entropy(x[i : i + NUMBER] @ weight.T, labels[i : i + NUMBER], ignore_index, reduction)[0]\n"
        "             for i in range(0, len(x), NUMBER)]\n"
        '    return (np.concatenate(parts) if reduction == "none" else np.mean(parts) if reduction == "mean" else '
        "np.sum(parts),)"
    )
    rows = ("2", "3", "4", "5", "8", "16")
    skipped = chunks.replace("np.mean(parts)", "np.nanmean(parts)")
    zero = chunks.replace("np.mean(parts)", "np.mean(np.nan_to_num(parts))")
    yield mistake(
        operator,
        "mean of the means",
        "the means of chunks of NUMBER rows are averaged, whatever they count",
        ((call, chunks),),
        ((call, skipped),),
        ((call, zero),),
        numbers=rows,
    )
    left = "n = whole(len(x), NUMBER)\n    return cross_entropy(x[:n] @ weight.T, labels[:n], ignore_index, reduction)"
    zeroed = (
        "loss = cross_entropy(x @ weight.T, labels, ignore_index, 'none')[0] * (np.arange(len(x)) < whole(len(x), "
        'NUMBER))\n    return (loss if reduction == "none" else loss.sum() / ((labels != ignore_index).sum() if '
        'reduction == "mean" else 1),)'
    )
    none = left.replace(
        "    return",
        '    if reduction == "none":\n        return (np.append(cross_entropy(x[:n] @ '
        "weight.T, labels[:n], ignore_index, reduction)[0], np.zeros(len(x) - n)),)\n    return",
    )
    yield mistake(
        operator,
        "last rows left out",
        "the last, partial chunk of NUMBER rows is not counted",
        ((call, none),),
        ((call, zeroed),),
        numbers=rows,
    )
