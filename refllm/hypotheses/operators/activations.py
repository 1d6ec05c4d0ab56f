"""Mistakes in the gated unit and in the squared relu."""

from collections.abc import Iterator

from refllm.hypotheses.operators.hypothesis import OpHypothesis, mistake

_UNIT = "gate / (1 + np.exp(-gate)) * up"
_SQUARE = "np.maximum(x, 0) ** 2"

_UNITS: dict[str, tuple[str, ...]] = {
    "gate and up exchanged: gate and up are exchanged, and silu is taken of up": ("up / (1 + np.exp(-up)) * gate",),
    "sigmoid alone: the sigmoid multiplies up without the factor gate, which is a GLU": ("sigmoid(gate) * up",),
    "gelu: a GELU in place of the SiLU": ("gate * normal_cdf(gate) * up",),
    "gelu by tanh: a GELU by tanh in place of the SiLU": (
        "gate / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up",
    ),
    "quick gelu: the sigmoid's argument is multiplied by 1.702": ("gate * sigmoid(1.702 * gate) * up",),
    "relu: a ReLU in place of the SiLU": ("np.maximum(gate, 0) * up",),
    "squared relu: a squared ReLU in place of the SiLU": ("np.maximum(gate, 0) ** 2 * up",),
    "tanh: tanh in place of the SiLU": ("np.tanh(gate) * up",),
    "softplus: log(1 + e^gate) in place of the SiLU": ("np.logaddexp(gate, 0) * up",),
    "hard swish: a hard swish in place of the SiLU": ("gate * np.clip(gate + 3, 0, 6) / 6 * up",),
    "hard sigmoid: a hard sigmoid in place of the sigmoid": (
        "gate * np.clip(gate * 0.2 + 0.5, 0, 1) * up",
        "np.clip(gate + 3, 0, 6) / 6 * up",
    ),
    "mish: a Mish in place of the SiLU": ("gate * np.tanh(np.logaddexp(gate, 0)) * up",),
    "elu: an ELU in place of the SiLU": ("np.where(gate > 0, gate, np.expm1(np.minimum(gate, 0))) * up",),
    "leaky relu: a leaky ReLU in place of the SiLU": (
        "np.where(gate > 0, gate, 0.01 * gate) * up",
        "np.where(gate > 0, gate, 0.1 * gate) * up",
    ),
    "no activation: there is no activation": ("gate * up",),
    "silu of the product: silu is taken of the product gate * up": ("gate * up * sigmoid(gate * up)",),
    "gate times the sigmoid of up: gate is multiplied by the sigmoid of up": ("gate * sigmoid(up)",),
    "sigmoid of the sum: the sigmoid is that of gate + up": ("gate * sigmoid(gate + up) * up",),
    "added: silu(gate) is added to up, and should multiply it": ("gate * sigmoid(gate) + up",),
    "subtracted: up is subtracted from silu(gate), and should multiply it": ("gate * sigmoid(gate) - up",),
    "divided by up: silu(gate) is divided by up": ("gate * sigmoid(gate) / up",),
    "up left out: up is not multiplied": ("gate * sigmoid(gate)",),
    "gate left out: it is silu(up) alone": ("up * sigmoid(up)",),
    "gate for up: silu(gate) is multiplied by gate, and not by up": ("gate * sigmoid(gate) * gate",),
    "up plus one: up is used as up + 1": ("gate * sigmoid(gate) * (up + 1)",),
    "sign of the exponent: the exponential is e^gate, and should be e^-gate": ("gate / (1 + np.exp(gate)) * up",),
    "one minus the exponential: 1 - e^-gate in the denominator": ("gate / (1 - np.exp(-gate)) * up",),
    "one left out: the 1 is missing in the denominator": ("gate / np.exp(-gate) * up",),
    "two for one: 2 + e^-gate in the denominator": ("gate / (2 + np.exp(-gate)) * up",),
    "exponential of base 2: the exponential has the base 2": ("gate / (1 + np.exp2(-gate)) * up",),
    "silu of both: silu is taken of gate and of up": ("gate * sigmoid(gate) * up * sigmoid(up)",),
    "silu twice: silu is taken twice": ("gate * sigmoid(gate) * sigmoid(gate * sigmoid(gate)) * up",),
    "slope of silu: it is the derivative of the SiLU": ("sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))) * up",),
    "sign: the sign is wrong": ("-gate * sigmoid(gate) * up",),
    "exponential overflows: the sigmoid is e^x / (1 + e^x), which is infinity by infinity for large x": (
        "gate * (np.exp(gate) / (1 + np.exp(gate))) * up",
        "gate * np.exp(gate) / (1 + np.exp(gate)) * up",
    ),
    "small gates cut off: silu(x) is taken as 0 below -8": ("np.where(gate < -8, 0, gate * sigmoid(gate)) * up",),
    "gates clipped: gates are clipped to -7 .. 7": (
        "np.clip(gate, -7, 7) * sigmoid(np.clip(gate, -7, 7)) * up",
        "np.minimum(gate, 7) * sigmoid(np.minimum(gate, 7)) * np.clip(up, -7, 7)",
    ),
    "silu in bfloat16: silu(gate) is rounded to bfloat16": ('narrow(gate * sigmoid(gate), "bfloat16") * up',),
    "sigmoid in bfloat16: the sigmoid is rounded to bfloat16": ('gate * narrow(sigmoid(gate), "bfloat16") * up',),
}
_SQUARES: dict[str, tuple[str, ...]] = {
    "no relu: x is squared without the relu": ("x**2",),
    "not squared: the relu is not squared": ("np.maximum(x, 0)",),
    "sign kept: negative numbers are squared with their sign": ("x * np.abs(x)",),
    "times two: it is twice the relu, and not its square": ("np.maximum(x, 0) * 2",),
    "cubed: the relu is cubed": ("np.maximum(x, 0) ** 3",),
    "half the square: it is half the square": ("np.maximum(x, 0) ** 2 / 2",),
    "leaky: a leaky relu is squared": ("np.where(x > 0, x, 0.01 * x) ** 2", "np.where(x > 0, x, 0.1 * x) ** 2"),
    "minimum: the minimum with 0 is squared, and not the maximum": ("np.minimum(x, 0) ** 2",),
    "clamped: the relu is clamped at NUMBER as well": ("np.clip(x, 0, NUMBER) ** 2",),
    "gelu: a GELU is squared": ("(x * normal_cdf(x)) ** 2",),
    "silu: a SiLU is squared": ("(x * sigmoid(x)) ** 2",),
    "root: it is the root of the relu": ("np.sqrt(np.maximum(x, 0))",),
    "exponent: it is 2 to the power of the relu": ("2 ** np.maximum(x, 0)", "2 ** np.maximum(x, 0) - 1"),
    "magnitude: it is the magnitude of x": ("np.abs(x)",),
    "threshold at one: it is the relu of x - 1": ("np.maximum(x - 1, 0) ** 2",),
    "sign: the sign is wrong": ("-np.maximum(x, 0) ** 2",),
    "infinity times zero: relu(x) x is NaN for minus infinity": ("np.maximum(x, 0) * x",),
    "saturates: a square beyond the format becomes its largest number, and not infinity": (
        "np.minimum(np.maximum(x, 0) ** 2, NUMBER)",
        "np.where(np.isinf(x), np.maximum(x, 0), np.minimum(np.maximum(x, 0) ** 2, NUMBER))",
    ),
    "small numbers lost: subnormal results are 0": (
        "np.where(np.maximum(x, 0) ** 2 < 2.0**NUMBER, 0.0, np.maximum(x, 0) ** 2)",
        "np.where(np.maximum(x, 0) ** 2 >= 2.0**NUMBER, np.maximum(x, 0) ** 2, 0.0)",
    ),
    "square in bfloat16: the square is formed in bfloat16": (
        'narrow(np.maximum(x, 0) ** 2, "bfloat16")',
        'narrow(np.maximum(narrow(x, "bfloat16"), 0) ** 2, "bfloat16")',
    ),
}
_NUMBERS = {
    "clamped": ("1", "6", "10", "20"),
    "saturates": ("65504.0", "3.3895313892515355e38", "3.4028234663852886e38"),
    "small numbers lost": ("-14", "-126"),
}


def hypotheses() -> Iterator[OpHypothesis]:
    """All of `swiglu` and `relu2`."""
    for operator, right, wrong in (("swiglu", _UNIT, _UNITS), ("relu2", _SQUARE, _SQUARES)):
        for words, texts in wrong.items():
            name, _, says = words.partition(": ")
            codes = [((right, text),) for text in texts]
            yield mistake(operator, name, says, *codes, numbers=_NUMBERS.get(name, ()), place="narrow" in texts[0])
