"""Mistakes with a number that is solved for: a wrong scale, another eps, a factor on the result."""

from collections.abc import Iterator

from refllm.hypotheses.operators.attentions import SCALE
from refllm.hypotheses.operators.hypothesis import OpHypothesis, Outputs, mistake
from refllm.hypotheses.operators.norms import MEAN
from refllm.ops.contracts import OPERATORS

_FACTORS = tuple(sign * 2.0**k for k in range(-12, 13, 2) for sign in (1, -1))
_POSITIVE = tuple(10.0**k for k in range(-12, 2))
_TABLES = "cos, sin, R, out = cos[..., None, :, :], sin[..., None, :, :],"


def hypotheses() -> Iterator[OpHypothesis]:
    """Those of every operator."""
    for operator in OPERATORS:
        yield mistake(operator, "factor", "the result is NUMBER times what it should be", _times, solved=_FACTORS)
        if "norm" in operator:
            yield mistake(
                operator,
                "another eps",
                "eps is NUMBER, whatever the argument says",
                ((f"{MEAN} + eps", f"{MEAN} + NUMBER"),),
                solved=_POSITIVE,
            )
            yield mistake(
                operator,
                "mean times a number",
                "the mean square is NUMBER times what it should be",
                ((MEAN, f"NUMBER * {MEAN}"),),
                solved=_POSITIVE,
            )
        if "rope" in operator:
            yield mistake(
                operator,
                "tables times a number",
                "cos and sin are NUMBER times what they should be",
                ((_TABLES, f"cos, sin = NUMBER * cos, NUMBER * sin\n    {_TABLES}"),),
                solved=_FACTORS,
            )
        if "attention" in operator:
            yield mistake(
                operator, "another scale", "the scores are multiplied by NUMBER", ((SCALE, "NUMBER"),), solved=_FACTORS
            )
            yield mistake(
                operator,
                "scale times a number",
                "the scale is NUMBER times what it should be",
                ((SCALE, f"NUMBER * {SCALE}"),),
                solved=_FACTORS,
            )
        if "entropy" in operator:
            yield mistake(
                operator,
                "logits times a number",
                "the logits are NUMBER times what they should be",
                (("counted = labels", "logits = NUMBER * logits\n    counted = labels"),),
                solved=_FACTORS,
            )
        if operator == "swiglu":
            yield mistake(
                operator,
                "sigmoid of a multiple",
                "the sigmoid's argument is multiplied by NUMBER",
                (("np.exp(-gate)", "np.exp(-NUMBER * gate)"),),
                solved=_FACTORS,
            )


def _times(outputs: Outputs, value: str) -> Outputs:
    return tuple(float(value) * x for x in outputs)
