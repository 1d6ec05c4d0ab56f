"""Mistakes in gradients: a term or a factor that is missing, a sum that is a mean, a mask aligned at the other end."""

from collections.abc import Iterator

import numpy as np

from refllm.hypotheses.operators.hypothesis import OpHypothesis, Outputs, mistake
from refllm.ops.backward_contracts import BACKWARD

Mistakes = dict[str, tuple[str, str]]
"""Name and sentence -> what stands in the definition, and what stands there with the mistake."""

_FACTORS = tuple(sign * 2.0**k for k in range(-6, 7, 2) for sign in (1, -1))
_MEAN_OF_GN = "np.mean(g * n, axis=-1, keepdims=True)"

_NORMS: Mistakes = {
    "second term missing: the term that takes away what lies along x is missing": (f" - n * {_MEAN_OF_GN}", ""),
    "second term added: the term that takes away what lies along x is added": (
        f" - n * {_MEAN_OF_GN}",
        f" + n * {_MEAN_OF_GN}",
    ),
    "second term summed: the second term has the sum of g n, and should have its mean": (
        _MEAN_OF_GN,
        "np.sum(g * n, axis=-1, keepdims=True)",
    ),
    "weight missing: the incoming gradient is not multiplied by the weight": ("x * r, dy * weight", "x * r, dy"),
    "weight missing in the second term: the mean of the second term is that of dy n, without the weight": (
        "np.mean(g * n,",
        "np.mean(dy * n,",
    ),
    "root missing: dx is not divided by the root": ("r * (g", "1 * (g"),
    "root twice: dx is divided by the root twice": ("r * (g", "r * r * (g"),
    "row not normed in dweight: dweight is the sum of dy x, and x is not normed": (
        "summed_to(dy * n",
        "summed_to(dy * x",
    ),
    "weight in dweight: dweight has the weight in it": ("summed_to(dy * n", "summed_to(g * n"),
    "eps left out: eps is not added": (" + eps)", ")"),
    "weight averaged: gradients of what all rows share are their mean, and should be their sum": (
        "x = x.sum(axis=tuple(range",
        "x = x.mean(axis=tuple(range",
    ),
    "last row left out: the last row is missing in dweight": ("summed_to(dy * n, ", "summed_to((dy * n)[:-1], "),
}
_LAYER: Mistakes = {
    "mean not subtracted: the mean of g is not subtracted": ("g - g.mean(axis=-1, keepdims=True) - n", "g - n"),
}
_AFTER_A_SUM: Mistakes = {
    "gradient of the sum left out: the gradient of the sum that is handed on is not added": (
        "dsum + dx, dsum + dx",
        "dx, dx",
    ),
    "gradient of the sum through the norm: that gradient goes through the norm too (Dao-AILab/quack#53)": (
        "_backward(dy, residual + x",
        "_backward(dy + dsum, residual + x",
    ),
}
_ROTATIONS: Mistakes = {
    "turned forward: it is turned by the angle once more, and should be turned back": ("-sin", "sin"),
    "other pairs: the pairs are those of the other layout": ("-sin, interleaved)", "-sin, not interleaved)"),
    "not turned: it is not turned": ("a * cos - b * sin, b * cos + a * sin", "a, b"),
}
_ATTENTION: Mistakes = {
    "sum missing: the sum of p dp is not subtracted": (
        "dp - (p * dp).sum(axis=-1, keepdims=True) + extra",
        "dp + extra",
    ),
    "sum without the weights: the sum that is subtracted is that of dp, not of p dp": ("(p * dp).sum(", "dp.sum("),
    "scale missing: the scale is missing": ("+ extra) * scale", "+ extra)"),
    "scale twice: the scale is there twice": ("+ extra) * scale", "+ extra) * scale * scale"),
    "gradient of the log-sum-exp left out: the gradient of the log-sum-exp is left out": (
        "extra = 0 if dlse is None else",
        "extra = 0 if True else",
    ),
    "sign of the log-sum-exp: the gradient of the log-sum-exp has the wrong sign": (
        "keepdims=True) + extra",
        "keepdims=True) - extra",
    ),
    "one head of a group: of the query heads that read a key head the first alone counts": (
        "(group).sum(axis=2)",
        "(group)[:, :, 0]",
    ),
    "mean over a group: the query heads that read a key head count as their mean": (
        "(group).sum(axis=2)",
        "(group).mean(axis=2)",
    ),
    "weights missing in ds: ds is not multiplied by the weights": ("ds = p * (", "ds = ("),
    "aligned at the top: the mask is causal from the first key on": (
        "np.arange(S)[:, None] + T - S",
        "np.arange(S)[:, None]",
    ),
    "causal ignored: nothing is masked for being later": ("if causal else seen", "if False else seen"),
    "always causal: the mask is causal whether that is asked or not": ("if causal else seen", "if True else seen"),
    "key mask ignored: the key mask is ignored": ("if key_mask is None else", "if True else"),
}
_LOSS: Mistakes = {
    "one not subtracted: 1 is not subtracted at the label": ("labels[counted]] -= 1", "labels[counted]] -= 0"),
    "divided by all rows: it is divided by the number of rows, ignored ones included": (
        "max(1, counted.sum())",
        "max(1, len(labels))",
    ),
    "not divided: it is not divided by the number of rows that count": ("(max(1, counted.sum()) if", "(1 if"),
    "gradient of the loss missing: the gradient of the loss is taken as 1": (
        "np.broadcast_to(dloss,",
        "np.broadcast_to(1.0,",
    ),
    "first gradient for all: every row has the gradient of the first one's loss (linkedin/Liger-Kernel#968)": (
        "np.broadcast_to(dloss,",
        "np.broadcast_to(np.ravel(dloss)[0] if np.size(dloss) else dloss,",
    ),
}
_OF: dict[str, Mistakes] = {
    "rms_norm": _NORMS,
    "add_rms_norm": _NORMS | _AFTER_A_SUM,
    "layer_norm": _NORMS | _LAYER,
    "add_layer_norm": _NORMS | _LAYER | _AFTER_A_SUM,
    "rope": _ROTATIONS,
    "norm_rope": _ROTATIONS,
    "rms_norm_qkv_rope": _ROTATIONS,
    "attention": _ATTENTION,
    "cross_entropy": _LOSS,
    "linear_cross_entropy": _LOSS,
    "softmax": {
        "sum missing: the sum of p dp is not subtracted": ("dp - np.sum(p * dp, axis=-1, keepdims=True)", "dp"),
        "sum without the weights: the sum that is subtracted is that of dp": ("np.sum(p * dp,", "np.sum(dp,"),
        "weights missing: it is not multiplied by p": ("p * (dp", "1 * (dp"),
    },
    "swiglu": {
        "slope is the sigmoid: the slope of the SiLU is taken to be the sigmoid": ("s * (1 + gate * (1 - s))", "s"),
        "slope has s for 1 - s: the slope has s where 1 - s should stand": ("gate * (1 - s)", "gate * s"),
        "sign in the slope: the second term of the slope is subtracted": ("(1 + gate *", "(1 - gate *"),
        "up missing: dgate is not multiplied by up": ("dh * up * s", "dh * s"),
        "sigmoid for the SiLU in dup: dup has the sigmoid where the SiLU should stand": ("dh * gate * s", "dh * s"),
        "gate for the SiLU in dup: dup has gate where the SiLU should stand": ("dh * gate * s", "dh * gate"),
    },
    "relu2": {
        "two missing: the factor 2 is missing": ("2 * np.maximum(x, 0)", "np.maximum(x, 0)"),
        "of negative numbers too: numbers below 0 have a gradient": ("np.maximum(x, 0)", "x"),
        "slope of a relu: it is the gradient of a ReLU": ("2 * np.maximum(x, 0)", "(x > 0)"),
        "square for the slope: it is multiplied by the squared ReLU": ("2 * np.maximum(x, 0)", "np.maximum(x, 0) ** 2"),
    },
    "linear": {
        "weight averaged: dweight is the mean over the rows": ("rows.T @ given", "rows.T @ given / max(1, len(rows))"),
        "bias averaged: dbias is the mean over the rows": ("rows.sum(axis=0)", "rows.mean(axis=0)"),
        "last row left out: the last row is missing in dweight": ("rows.T @ given", "rows[:-1].T @ given[:-1]"),
    },
    "embedding": {
        "last place alone: of several places with one id the last alone counts": (
            "np.add.at(d, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))",
            "d[ids.reshape(-1)] = dy.reshape(-1, dy.shape[-1])",
        ),
    },
    "mean_squared_error": {
        "two missing: the factor 2 is missing": ("2 * (x", "(x"),
        "sum for mean: it is not divided by the number of elements": (" / max(1, x.size)", ""),
    },
    "binary_cross_entropy": {
        "sum for mean: it is not divided by the number of elements": (" / max(1, logits.size)", ""),
        "target not subtracted: the target is not subtracted": (" - target)", ")"),
    },
    "activation": {
        "value for the slope: it is multiplied by the activation, not by its slope": ("dy * slope(", "dy * act(")
    },
    "glu": {
        "up missing: dgate is not multiplied by up": ("dh * up * slope", "dh * slope"),
        "value for the slope: dgate has the activation, not its slope": ("up * slope(", "up * act("),
        "slope for the value: dup has the slope, not the activation": ("dh * act(", "dh * slope("),
    },
}


def hypotheses() -> Iterator[OpHypothesis]:
    """Those of every backward operator."""
    for operator in BACKWARD:
        for words, edit in _OF.get(operator.removesuffix("_backward"), {}).items():
            name, _, says = words.partition(": ")
            yield mistake(operator, name, says, (edit,))
        yield mistake(operator, "all zero", "the gradient is 0", _zero)
        yield mistake(operator, "factor", "the gradient is NUMBER times what it should be", _times, solved=_FACTORS)


def _zero(outputs: Outputs, _: str) -> Outputs:
    return tuple(np.zeros(np.shape(x)) for x in outputs)


def _times(outputs: Outputs, number: str) -> Outputs:
    return tuple(float(number) * x for x in outputs)
