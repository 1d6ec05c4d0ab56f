"""Operators in NumPy: the softmax, the norms, the rotation, the gated unit, attention, the loss."""

from collections.abc import Iterator

import numpy as np

from refllm.learn.exercise import Exercise, Given, ways, wrong
from refllm.learn.exercises.draws import Draws, filled

# fmt: off

# ------------------------------------------------------------------------------------------------------- softmax


def _softmax() -> Iterator[Given]:
    d = Draws(1)
    yield Given("five numbers in a row", (d.normal(3, 5),), lengths={"E": 5})
    yield Given("four rows", (d.normal(4, 3, size=2.0),), lengths={"E": 3})
    yield Given("three axes", (d.normal(2, 3, 4),), lengths={"E": 4})
    yield Given("a number of 2000", (filled(d.normal(3, 5), (1, 2), 2000.0),), corner=True, lengths={"E": 5})
    yield Given("a row at -2000", (d.normal(3, 5) + np.array([[0.0], [-2000.0], [3.0]]),), corner=True)
    yield Given("a row of equal numbers", (filled(d.normal(3, 4), 1, 0.5),), corner=True)


SOFTMAX = Exercise(
    name="softmax",
    track="numpy",
    title="Softmax along the last axis",
    statement="""
    x has any number of axes; the last one has E entries. Turn every row (everything along the last axis) into weights:

        y[..., i] = exp(x[..., i]) / sum over j of exp(x[..., j])

    The result has the shape of x. Example: softmax([[0, ln 2, ln 3]]) is [[1/6, 2/6, 3/6]].

    What counts: every row sums to 1, and adding one number to a whole row changes nothing. exp(710) is infinite in
    float64, and exp(89) in float32: a row with 2000 in it, or one that lies at -2000 as a whole, must still come out
    right.
    """,
    function="softmax",
    solution='''def softmax(x):
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - top)
    return e / e.sum(axis=-1, keepdims=True)
''',
    calls=_softmax,
    outputs={"y": ("rows", "E")},
    shown=lambda: [Given("0, ln 2 and ln 3", (np.log(np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])),))],
    mistakes=(
        wrong(
            "maximum not subtracted",
            "the maximum of the row is not subtracted, so exp overflows: infinity by infinity is NaN",
            "What is exp(2000) in floating point, and does a softmax change when a row is shifted?",
            "x - top", "x",
        ),
        ways(
            "one maximum for all",
            "one maximum is taken of the whole array: a row far below it underflows to 0 / 0",
            "Which rows does your maximum come from?",
            ("x.max(axis=-1, keepdims=True)", "x.max()"),
        ),
        ways(
            "sum of everything",
            "one sum is taken of the whole array: all numbers together are 1, and each row should be",
            "What does each row of your result sum to?",
            ("e.sum(axis=-1, keepdims=True)", "e.sum()"),
            ("e.sum(axis=-1, keepdims=True)", "e.sum()", "x.max(axis=-1, keepdims=True)", "x.max()"),
        ),
        ways(
            "down the columns",
            "the softmax runs along axis 0, and not along the last axis",
            "Which sums of your result are 1: those of the rows or those of the columns?",
            ("axis=-1", "axis=0"),
            ("e.sum(axis=-1", "e.sum(axis=0"),
            ("e.sum(axis=-1", "e.sum(axis=0", "x.max(axis=-1, keepdims=True)", "x.max()"),
        ),
        wrong(
            "axis 1",
            "the softmax runs along axis 1, which is the last one only where there are two",
            "Which axis is the last one of an array with three?",
            "axis=-1", "axis=1",
        ),
        ways(
            "not divided",
            "the exponentials are not divided by their sum: the largest of each row is 1",
            "What does each row of your result sum to?",
            ("e / e.sum(axis=-1, keepdims=True)", "e"),
            ("e / e.sum(axis=-1, keepdims=True)", "e", "x - top", "x"),
        ),
        wrong(
            "base 2",
            "it is 2 to the power of x, and not e",
            "What ratio have the weights of 0 and of ln 2 in your result?",
            "np.exp(x", "np.exp2(x",
        ),
        wrong(
            "mean for sum",
            "the exponentials are divided by their mean: every number is too large by E",
            "What does each row of your result sum to, and how long is it?",
            "e.sum(", "e.mean(",
        ),
        ways(
            "numerator not shifted",
            "the numerator is exp(x) and the sum is of exp(x - max): rows sum to exp(max)",
            "Is the same exponential above and below the line of your fraction?",
            ("return e /", "return np.exp(x) /"),
        ),
        wrong(
            "sign lost",
            "the exponent has the wrong sign: small numbers get the large weights",
            "Which entry of a row gets the largest weight, and which should?",
            "np.exp(x - top)", "np.exp(top - x)",
        ),
        wrong(
            "divided by the maximum",
            "the row is divided by its maximum, which is not what may be done to it without changing the result",
            "What may be done to a whole row without changing its softmax: adding a number, or multiplying by one?",
            "x - top", "x / top",
        ),
        wrong(
            "divided by the sum of x",
            "the exponentials are divided by the sum of x, and not by their own",
            "Which numbers does your sum add up?",
            "e.sum(axis=-1", "x.sum(axis=-1",
        ),
        ways(
            "over two axes",
            "the softmax runs over the last two axes together: each row should sum to 1",
            "Over how many numbers does your sum run?",
            ("axis=-1", "axis=(-2, -1)"),
            ("e.sum(axis=-1", "e.sum(axis=(-2, -1)"),
        ),
        wrong(
            "largest magnitude subtracted",
            "the largest magnitude is subtracted, and not the maximum: a row at -2000 underflows to 0 / 0",
            "What is left of a row of negative numbers when its largest magnitude is subtracted?",
            "x.max(", "np.abs(x).max(",
        ),
        wrong(
            "divided by the length",
            "the exponentials are divided by the root of the sum of their squares, and not by their sum",
            "What does each row of your result sum to, and what do its squares?",
            "e.sum(axis=-1, keepdims=True)", "np.sqrt((e * e).sum(axis=-1, keepdims=True))",
        ),
        wrong(
            "minimum subtracted",
            "the minimum or the mean is subtracted and not the maximum, so that large numbers still overflow",
            "How large can the exponent get with what you subtract?",
            "x.max(", "x.min(",
        ),
        ways(
            "divided without exp",
            "the numbers themselves are divided by their sum: the exponential is missing",
            "Where in your code is the exponential?",
            ("np.exp(x - top)", "x"),
            ("np.exp(x - top)", "x - top"),
        ),
        wrong(
            "logarithm",
            "it is the logarithm of the softmax",
            "What sign have the numbers of your result, and what sign have weights?",
            "return e / e.sum(axis=-1, keepdims=True)",
            "return x - top - np.log(e.sum(axis=-1, keepdims=True))",
        ),
        ways(
            "constant added below",
            "a constant is added to the sum, so that rows do not quite sum to 1",
            "The largest exponential is 1: can the sum ever be 0?",
            ("e.sum(axis=-1, keepdims=True)", "(e.sum(axis=-1, keepdims=True) + NUMBER)"),
            numbers=("1e-3", "1e-4", "1e-2", "0.1", "1"),
        ),
    ),
    hints=(
        "Write down what one row of your result sums to.",
        "Three steps: the largest of each row, the exponentials of what is left above it, their sum for each row.",
        "x.max(axis=-1, keepdims=True) keeps the axis, so that it can be subtracted from x row by row.",
    ),
)

# ------------------------------------------------------------------------------------------------------ rms_norm


def _norm_inputs(seed: int, bias: bool) -> Iterator[Given]:
    d = Draws(seed)

    def given(words: str, x: np.ndarray, eps: float, **more: bool) -> Given:
        E = x.shape[-1]
        values = (x, d.weight(E), *([d.normal(E)] if bias else []), eps)
        return Given(words, values, lengths={"E": E}, **more)

    yield given("eps of the size of the squares", d.normal(3, 5, size=0.7, mean=0.6), 0.25)
    yield given("a mean", d.normal(4, 6, mean=2.0), 1e-5)
    yield given("three axes", d.normal(2, 3, 7, mean=-0.4), 0.1)
    yield given("small numbers", d.normal(3, 11) * 0.01, 1e-5)
    yield given("numbers smaller than eps", d.normal(3, 4, size=0.1), 0.25)
    yield given("a row of zeros", filled(d.normal(3, 5), 1, 0.0), 1e-5, corner=True)
    yield given("numbers of a thousand", d.normal(2, 6, size=1000.0, mean=300.0), 1e-5, corner=True)


RMS_NORM = Exercise(
    name="rms_norm",
    track="numpy",
    title="RMSNorm",
    statement="""
    x has any number of axes, the last one with E entries; weight has shape [E]; eps is a number. Per row:

        y = weight * x / sqrt(mean(x^2) + eps)          mean over the E entries of the row

    The result has the shape of x. Example: x = [[3, 4]], weight = [1, 2], eps = 0: the mean square is (9 + 16) / 2 =
    12.5, so y = [[3, 8]] / sqrt(12.5) = [[0.849, 2.263]].

    What counts: with weight 1 and a small eps each row has mean square 1, whatever its size; a row of zeros gives
    zeros; and eps is added under the root.
    """,
    function="rms_norm",
    solution='''def rms_norm(x, weight, eps):
    E = x.shape[-1]
    square = np.sum(x * x, axis=-1, keepdims=True) / E
    return weight * x / np.sqrt(square + eps)
''',
    calls=lambda: _norm_inputs(2, False),
    operator="rms_norm",
    outputs={"y": ("rows", "E")},
    shown=lambda: [Given("3 and 4", (np.array([[3.0, 4.0], [6.0, 8.0]]), np.array([1.0, 2.0]), 0.0))],
    mistakes=(
        ways(
            "eps outside the root",
            "eps is added to the root, and not under it",
            "What is the result of a row of zeros, with eps under the root and with eps beside it?",
            ("np.sqrt(square + eps)", "(np.sqrt(square) + eps)"),
            ("np.sqrt(square + eps)", "(np.sqrt(square) + np.sqrt(eps))"),
            ("x / np.sqrt(square + eps)", "x * (1 / np.sqrt(square) + eps)"),
        ),
        wrong(
            "no eps", "eps is missing: a row of zeros is 0 / 0", "What does your code do with a row of zeros?",
            "square + eps", "square",
        ),
        wrong(
            "own eps", "the argument eps is not used: it is NUMBER whatever the caller says",
            "Does your result change if the caller passes another eps?",
            "square + eps", "square + NUMBER", numbers=("1e-5", "1e-6", "1e-8", "1e-3"),
        ),
        ways(
            "mean subtracted", "the mean of the row is subtracted: that is LayerNorm",
            "Is there a mean of x, and not of its squares, in the formula?",
            ("    square =", "    x = x - x.mean(axis=-1, keepdims=True)\n    square ="),
            ("square = np.sum(x * x, axis=-1, keepdims=True) / E", "square = x.var(axis=-1, keepdims=True)"),
        ),
        ways(
            "weight plus one", "the weight is used as 1 + weight: that is Gemma's convention",
            "With weight 1, what is the mean square of a row of your result?",
            ("return weight *", "return (1 + weight) *"),
        ),
        wrong(
            "no weight", "the weight is not applied", "Where does your code use weight?", "weight * x", "x",
        ),
        wrong(
            "weight before the norm", "the weight is applied before the mean square is taken",
            "Which x is squared: the given one, or one that the weight has changed?",
            "    square =", "    x, weight = x * weight, 1\n    square =",
        ),
        wrong(
            "sum for mean", "the squares are summed and not averaged: every number is too small by sqrt(E)",
            "What is the mean square of a row of your result, with weight 1?",
            "keepdims=True) / E", "keepdims=True)",
        ),
        wrong(
            "n - 1", "the sum of squares is divided by E - 1, and not by E",
            "How many squares are there in a row, and by how many do you divide?",
            "/ E", "/ (E - 1)",
        ),
        wrong(
            "root forgotten", "x is divided by the mean square, and not by its root",
            "If a row is twice as long, what should become of the result, and what does?",
            "np.sqrt(square + eps)", "(square + eps)",
        ),
        wrong(
            "multiplied by the root", "x is multiplied by the root, and should be divided by it",
            "If a row is twice as long, what should become of the result, and what does?",
            "x / np.sqrt", "x * np.sqrt",
        ),
        wrong(
            "square of the mean", "the mean is squared: it should be the mean of the squares",
            "Is the mean of the squares of 1 and -1 equal to the square of their mean?",
            "np.sum(x * x, axis=-1, keepdims=True) / E", "np.mean(x, axis=-1, keepdims=True) ** 2",
        ),
        wrong(
            "mean of everything", "one mean square is taken of the whole array: each row has its own",
            "How many mean squares does your code compute?",
            "np.sum(x * x, axis=-1, keepdims=True) / E", "np.mean(x * x)",
        ),
        wrong(
            "down the columns", "the mean is taken down the columns (axis 0), and not along each row",
            "Along which axis does your mean run?",
            "np.sum(x * x, axis=-1, keepdims=True) / E", "np.mean(x * x, axis=0)",
        ),
        wrong(
            "axis 1", "the mean runs along axis 1, which is the last one only where there are two",
            "Which axis is the last one of an array with three?",
            "np.sum(x * x, axis=-1, keepdims=True) / E", "np.mean(x * x, axis=1, keepdims=True)",
        ),
        wrong(
            "mean of magnitudes", "the mean of the magnitudes is used, and not the root of the mean square",
            "Where in your code is a square, and where the root?",
            "np.sqrt(square + eps)", "(np.mean(np.abs(x), axis=-1, keepdims=True) + eps)",
        ),
        wrong(
            "eps as a floor", "the larger of the root and eps is taken, and eps should be added under the root",
            "Does eps change the result of a row whose root is larger than eps?",
            "np.sqrt(square + eps)", "np.maximum(np.sqrt(square), eps)",
        ),
        wrong(
            "eps added to x", "eps is added to x, and not to the mean square",
            "What is the result of a row of zeros?",
            "    square =", "    x, eps = x + eps, 0\n    square =",
        ),
        wrong(
            "eps squared", "eps is squared", "How much is added under the root?", "square + eps", "square + eps**2",
        ),
        wrong(
            "length of the row", "x is divided by its length, the root of the sum of squares: with eps beside it",
            "By how many do you divide the sum of squares?",
            "keepdims=True) / E", "keepdims=True)", "np.sqrt(square + eps)", "(np.sqrt(square) + eps)",
        ),
        wrong(
            "weight added", "the weight is added, and should multiply", "What becomes of a column whose weight is 0?",
            "weight * x / np.sqrt(square + eps)", "weight + x / np.sqrt(square + eps)",
        ),
        wrong(
            "divided by the weight", "the result is divided by the weight, and should be multiplied by it",
            "If a weight is twice as large, what becomes of its column?",
            "weight * x", "x / weight",
        ),
        wrong(
            "root twice", "the root is taken twice: it is the fourth root of the mean square",
            "With weight 1, what is the mean square of a row of your result?",
            "np.sqrt(square + eps)", "np.sqrt(np.sqrt(square + eps))",
        ),
    ),
    hints=(
        "Compute the mean square of a row of your result by hand, with weight 1. It should be 1.",
        "One number per row: the mean of the squares, plus eps, and then the root of both together.",
        "np.mean(x * x, axis=-1, keepdims=True) keeps the axis, so that x can be divided row by row.",
    ),
)

# ---------------------------------------------------------------------------------------------------- layer_norm

LAYER_NORM = Exercise(
    name="layer_norm",
    track="numpy",
    title="LayerNorm",
    statement="""
    x has any number of axes, the last one with E entries; weight and bias have shape [E]; eps is a number. Per row:

        m = mean(x)        v = mean((x - m)^2)        y = weight * (x - m) / sqrt(v + eps) + bias

    The result has the shape of x. Example: x = [[1, 3]], weight = [1, 1], bias = [0, 5], eps = 0: m = 2, v = 1, so
    y = [[-1, 6]].

    What counts: with weight 1 and bias 0 each row has mean 0, and mean square 1 where eps is small; adding one number
    to a whole row changes nothing; the variance is divided by E, and not by E - 1.
    """,
    function="layer_norm",
    solution='''def layer_norm(x, weight, bias, eps):
    E = x.shape[-1]
    mean = np.sum(x, axis=-1, keepdims=True) / E
    d = x - mean
    var = np.sum(d * d, axis=-1, keepdims=True) / E
    return weight * d / np.sqrt(var + eps) + bias
''',
    calls=lambda: _norm_inputs(3, True),
    operator="layer_norm",
    outputs={"y": ("rows", "E")},
    shown=lambda: [
        Given("1 and 3", (np.array([[1.0, 3.0], [2.0, 6.0]]), np.array([1.0, 2.0]), np.array([0.0, 5.0]), 0.0))
    ],
    mistakes=(
        wrong(
            "n - 1", "the variance is divided by E - 1 (Torch's default, ddof=1), and should be divided by E",
            "By how many does your variance divide a sum of E squares?",
            "np.sum(d * d, axis=-1, keepdims=True) / E", "np.sum(d * d, axis=-1, keepdims=True) / (E - 1)",
        ),
        ways(
            "eps outside the root", "eps is added to the root, and not under it",
            "What becomes of a row of equal numbers, with eps under the root and beside it?",
            ("np.sqrt(var + eps)", "(np.sqrt(var) + eps)"),
            ("np.sqrt(var + eps)", "(np.sqrt(var) + np.sqrt(eps))"),
        ),
        wrong(
            "n - 1 and eps outside", "x.std(ddof=1) + eps: divided by E - 1, and eps outside the root",
            "What are the two differences between x.std() of Torch plus eps, and sqrt(v + eps)?",
            "np.sum(d * d, axis=-1, keepdims=True) / E", "np.sum(d * d, axis=-1, keepdims=True) / (E - 1)",
            "np.sqrt(var + eps)", "(np.sqrt(var) + eps)",
        ),
        wrong("no eps", "eps is missing: a row of equal numbers is 0 / 0",
              "What does your code do with a row of equal numbers?", "var + eps", "var"),
        wrong("own eps", "the argument eps is not used: it is NUMBER whatever the caller says",
              "Does your result change if the caller passes another eps?",
              "var + eps", "var + NUMBER", numbers=("1e-5", "1e-6", "1e-8", "1e-3")),
        wrong("numerator not centred", "the mean is subtracted for the variance, but not in the result",
              "What is the mean of a row of your result, with bias 0?", "weight * d /", "weight * x /"),
        wrong("no mean", "no mean is subtracted at all: this is RMSNorm with a bias",
              "What is the mean of a row of your result, with bias 0?", "d = x - mean", "d = x"),
        wrong("root forgotten", "the row is divided by its variance, and not by the root of it",
              "If a row is twice as long, what should become of the result?",
              "np.sqrt(var + eps)", "(var + eps)"),
        wrong("weight and bias exchanged", "weight and bias are exchanged",
              "Which of the two multiplies, and which is added?",
              "weight * d / np.sqrt(var + eps) + bias", "bias * d / np.sqrt(var + eps) + weight"),
        wrong("bias before the weight", "the bias is added before the weight multiplies",
              "In which order are weight and bias applied?",
              "weight * d / np.sqrt(var + eps) + bias", "weight * (d / np.sqrt(var + eps) + bias)"),
        wrong("no bias", "the bias is not added", "Where does your code use bias?", " + bias", ""),
        wrong("no weight", "the weight is not applied", "Where does your code use weight?", "weight * d", "d"),
        wrong("bias subtracted", "the bias is subtracted, and should be added",
              "What sign has the bias in the formula?", "+ bias", "- bias"),
        wrong("sum for variance", "the squares are summed and not averaged: too small by sqrt(E)",
              "What is the mean square of a row of your result?",
              "np.sum(d * d, axis=-1, keepdims=True) / E", "np.sum(d * d, axis=-1, keepdims=True)"),
        wrong("statistics of everything", "one mean and variance are taken of the whole array: each row has its own",
              "How many means does your code compute?",
              "np.sum(x, axis=-1, keepdims=True) / E", "np.mean(x)",
              "np.sum(d * d, axis=-1, keepdims=True) / E", "np.mean(d * d)"),
        wrong("down the columns", "mean and variance run down the columns (axis 0): that is BatchNorm",
              "Along which axis do your mean and variance run?",
              "np.sum(x, axis=-1, keepdims=True) / E", "np.mean(x, axis=0)",
              "np.sum(d * d, axis=-1, keepdims=True) / E", "np.mean(d * d, axis=0)"),
        wrong("mean square for variance", "the mean of x^2 is used as the variance: the mean is not taken off first",
              "Is the mean of the squares the variance where the mean is not 0?", "np.sum(d * d,", "np.sum(x * x,"),
        wrong("weight plus one", "the weight is used as 1 + weight",
              "With weight 1, what is the mean square of a row of your result?", "weight * d", "(1 + weight) * d"),
    ),
    hints=(
        "Compute mean and mean square of one row of your result, with weight 1 and bias 0: 0 and 1 would be right.",
        "Take the mean off first; the variance is the mean of the squares of what is left.",
        "x.mean(axis=-1, keepdims=True) and x.var(axis=-1, keepdims=True): NumPy's var divides by E, Torch's by E - 1.",
    ),
)

# -------------------------------------------------------------------------------------------------------- swiglu


def _swiglu() -> Iterator[Given]:
    d = Draws(4)
    yield Given("a few numbers", (d.normal(3, 5, size=1.5), d.normal(3, 5)))
    yield Given("a row", (d.normal(1, 7, size=3.0), d.normal(1, 7, mean=0.5)))
    large = np.array([[1000.0, -1000.0, 2.0, -3.0]])
    yield Given("gates of 1000 and -1000", (large, d.normal(1, 4, mean=1.0)), corner=True)


SWIGLU = Exercise(
    name="swiglu",
    track="numpy",
    title="SwiGLU, the gated unit",
    statement="""
    gate and up have one shape. The result, of that shape, is

        y = silu(gate) * up         with silu(x) = x / (1 + exp(-x))

    Example: swiglu([[0, 1]], [[5, 2]]) = [[0, 2 / (1 + 1/e)]] = [[0, 1.462]].

    What counts: the gate decides how much of up gets through: nearly all of it times the gate where the gate is
    large, nothing where it is far below 0. Gates of 1000 and -1000 give finite numbers.
    """,
    function="swiglu",
    solution='''def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up
''',
    calls=_swiglu,
    operator="swiglu",
    outputs={"y": ("rows", "F")},
    shown=lambda: [Given("up is 1", (np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]]), np.ones((1, 5))))],
    mistakes=(
        wrong("gate and up exchanged", "the activation is applied to up, and it belongs to gate",
              "Which of the two arguments goes through the exponential?",
              "gate / (1 + np.exp(-gate)) * up", "up / (1 + np.exp(-up)) * gate"),
        wrong("sigmoid alone", "it is sigmoid(gate) * up: the factor gate is missing",
              "What is silu(2), and what is sigmoid(2)?", "gate / (1", "1 / (1"),
        wrong("no activation", "it is gate * up: there is no activation",
              "What does your code do with a gate far below 0?", "gate / (1 + np.exp(-gate))", "gate"),
        wrong("up left out", "up is not multiplied", "Where does your code use up?", " * up", ""),
        wrong("added", "silu(gate) is added to up, and should multiply it",
              "What is the result where silu(gate) is 0?", "* up", "+ up"),
        wrong("relu", "relu is taken in place of silu: that is ReGLU", "What is silu(-1)?",
              "gate / (1 + np.exp(-gate))", "np.maximum(gate, 0)"),
        ways("gelu", "a GELU is taken in place of the SiLU: that is GeGLU",
             "Which function belongs to the name silu, and which is yours?",
             ("gate / (1 + np.exp(-gate))",
              "0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))"),
             ("gate / (1 + np.exp(-gate))", "gate * normal_cdf(gate)")),
        wrong("quick gelu", "the sigmoid's argument is multiplied by 1.702: that approximates GELU",
              "Is there a number in the formula of silu besides 1?", "np.exp(-gate)", "np.exp(-1.702 * gate)"),
        ways("sign of the exponent", "the exponential is e^x, and should be e^-x",
             "What is your denominator for a large gate?", ("np.exp(-gate)", "np.exp(gate)")),
        wrong("one left out", "the 1 in the denominator is missing", "What is silu(0.1), about?",
              "(1 + np.exp(-gate))", "np.exp(-gate)"),
        ways("exponential overflows",
             "the sigmoid is written as e^x / (1 + e^x): for large x that is infinity by infinity",
             "What is e^1000 in floating point, and what is e^-1000?",
             ("gate / (1 + np.exp(-gate))", "gate * np.exp(gate) / (1 + np.exp(gate))"),
             ("gate / (1 + np.exp(-gate))", "gate * (np.exp(gate) / (1 + np.exp(gate)))")),
        wrong("silu of the product", "silu is taken of gate * up", "Of what is the exponential taken?",
              "gate / (1 + np.exp(-gate)) * up", "gate * up / (1 + np.exp(-gate * up))"),
        wrong("tanh", "tanh is taken in place of the sigmoid", "Between which numbers does a sigmoid lie?",
              "gate / (1 + np.exp(-gate))", "gate * np.tanh(gate)"),
        wrong("silu of both", "silu is taken of gate and of up", "Does the formula change up before it multiplies?",
              "* up", "* up / (1 + np.exp(-up))"),
        wrong("base 2", "the exponential has the base 2", "Which base has the exponential of the sigmoid?",
              "np.exp(", "np.exp2("),
        wrong("gate for up", "silu(gate) is multiplied by gate, and not by up", "Where does your code use up?",
              "* up", "* gate"),
    ),
    hints=(
        "Set up to 1: then the result is silu(gate). What is yours for gate = 2?",
        "silu(x) = x * sigmoid(x), and sigmoid(x) = 1 / (1 + exp(-x)).",
        "gate / (1 + np.exp(-gate)) is silu; exp(-gate) may overflow to infinity, which gives 0, as it should.",
    ),
)

# ---------------------------------------------------------------------------------------------------------- rope


def _angles(d: Draws, S: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    a = d.uniform(S, half, low=0.2, high=2.8)
    return np.cos(a).round(3), np.sin(a).round(3)


def _rope() -> Iterator[Given]:
    d = Draws(5)
    for B, H, S, D, R in ((1, 2, 3, 6, 6), (2, 3, 4, 10, 4), (1, 1, 5, 8, 8)):
        words = "a part of the head" if R < D else "whole heads"
        yield Given(words, (d.normal(B, H, S, D, mean=0.3), *_angles(d, S, R // 2)), lengths={"D": D, "R": R, "S": S})
    x = np.zeros((1, 2, 3, 4))
    yield Given("no angle", (x + d.normal(4), np.ones((3, 2)), np.zeros((3, 2))), corner=True)


ROPE = Exercise(
    name="rope",
    track="numpy",
    title="Rotary position embedding, in halves",
    statement="""
    x has shape [B, H, S, D]: batch, heads, positions, dims of a head. cos and sin have shape [S, R/2], R at most D.
    Of every head and position s the first R dims are turned in pairs, the others pass through as they are. Pair i is
    (i, i + R/2), and its angle is that of cos[s, i] and sin[s, i]:

        y[..., i]       = x[..., i] * cos - x[..., i + R/2] * sin
        y[..., i + R/2] = x[..., i + R/2] * cos + x[..., i] * sin

    Example: R = D = 2, cos = 0, sin = 1 (a quarter turn): (1, 0) becomes (0, 1), and (0, 1) becomes (-1, 0).

    What counts: a rotation changes no length: the sum of squares of every pair stays what it was. x itself must not
    change.
    """,
    function="rope",
    solution='''def rope(x, cos, sin):
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    y = x.copy()
    y[..., :half] = a * cos - b * sin
    y[..., half : 2 * half] = b * cos + a * sin
    return y
''',
    calls=_rope,
    operator="rope",
    adapt="lambda operator, x, cos, sin: operator(x, x[:, :1], cos, sin, False)[:1]",
    outputs={"y": ("B", "H", "S", "D")},
    shown=lambda: [
        Given("unit vectors, a quarter turn", (np.eye(4)[None, None], np.zeros((4, 2)), np.ones((4, 2)))),
    ],
    mistakes=(
        ways("pairs side by side", "the pairs are (2i, 2i + 1): that is the interleaved convention",
             "Which dim does dim 0 share its angle with?",
             ("x[..., :half], x[..., half : 2 * half]", "x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]",
              "y[..., :half]", "y[..., 0 : 2 * half : 2]",
              "y[..., half : 2 * half]", "y[..., 1 : 2 * half : 2]"),
             ("x[..., :half], x[..., half : 2 * half]", "x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]")),
        wrong("turned the wrong way", "the rotation turns the other way: both signs of sin are exchanged",
              "Where does a quarter turn take (1, 0)?",
              "a * cos - b * sin", "a * cos + b * sin", "b * cos + a * sin", "b * cos - a * sin"),
        wrong("both signs plus", "both lines have a plus, and that is no rotation: the first needs a minus",
              "Does your result keep the length of a pair?", "a * cos - b * sin", "a * cos + b * sin"),
        wrong("both signs minus", "both lines have a minus, and that is no rotation: the second needs a plus",
              "Does your result keep the length of a pair?", "b * cos + a * sin", "b * cos - a * sin"),
        wrong("first half overwritten",
              "the first half is changed before the second reads it: the second line uses what the first has made",
              "Which a does your second line read: the old one or the new one?",
              "b * cos + a * sin", "b * cos + y[..., :half] * sin"),
        wrong("cos and sin exchanged", "cos and sin are exchanged", "What does your code do where the angle is 0?",
              "a * cos - b * sin", "a * sin - b * cos", "b * cos + a * sin", "b * sin + a * cos"),
        wrong("position one late", "position s uses the angle of position s - 1",
              "Which row of the table does position 1 use?",
              "    half =", "    cos, sin = np.roll(cos, 1, axis=0), np.roll(sin, 1, axis=0)\n    half ="),
        wrong("position one early", "position s uses the angle of position s + 1",
              "Which row of the table does position 0 use?",
              "    half =", "    cos, sin = np.roll(cos, -1, axis=0), np.roll(sin, -1, axis=0)\n    half ="),
        wrong("always position 0", "all positions use the angle of position 0",
              "Which row of the table does position 1 use?", "    half =",
              "    cos, sin = cos[:1], sin[:1]\n    half ="),
        ways("angle by head", "the table is indexed by the head, and not by the position",
             "Along which axis of x does the table lie: heads or positions?",
             ("    half =", "    h = np.arange(x.shape[1]) % len(cos)\n"
              "    cos, sin = cos[h][:, None], sin[h][:, None]\n    half =")),
        wrong("halves of the head", "pairs are D/2 apart; only R dims turn, so they are R/2 apart",
              "How far apart are the two dims of a pair where R is less than D?",
              "x[..., half : 2 * half]", "x[..., x.shape[-1] // 2 : x.shape[-1] // 2 + half]",
              "y[..., half : 2 * half]", "y[..., x.shape[-1] // 2 : x.shape[-1] // 2 + half]"),
        wrong("the rest is zero", "the dims from R on should pass through, and they are 0",
              "What should happen to dims that do not turn?", "x.copy()", "np.zeros_like(x)"),
        wrong("angle doubled", "it is turned twice", "Is the rotation applied once to each pair?",
              "    half =", "    cos, sin = cos * cos - sin * sin, 2 * sin * cos\n    half ="),
        wrong("only the first half", "only the first half of the pairs is written",
              "Which of the two lines of the formula does your code have?",
              "    y[..., half : 2 * half] = b * cos + a * sin\n", ""),
        wrong("only the first head", "only head 0 is turned", "Are all heads turned?",
              "    return y", "    y[:, 1:] = x[:, 1:]\n    return y"),
        wrong("table repeated for pairs",
              "each angle is repeated for neighbouring dims, and the rotation takes dims that are R/2 apart",
              "Do both dims of a pair get the same angle?",
              "a * cos - b * sin", "a * np.repeat(cos, 2, -1)[..., :half] - b * np.repeat(sin, 2, -1)[..., :half]",
              "b * cos + a * sin", "b * np.repeat(cos, 2, -1)[..., half:] + a * np.repeat(sin, 2, -1)[..., half:]"),
    ),
    hints=(
        "Turn (1, 0) by a quarter: cos 0, sin 1. It should become (0, 1).",
        "Take the two halves of the first R dims out of x first; write both lines from the old values.",
        "cos of shape [S, R/2] fits beside x[..., :half] of shape [B, H, S, R/2] as it is.",
    ),
)

# ----------------------------------------------------------------------------------------------------- attention


def _qkv(d: Draws, B: int, H: int, K: int, S: int, T: int, D: int) -> tuple[np.ndarray, ...]:
    return d.normal(B, H, S, D, size=1.5), d.normal(B, K, T, D, mean=0.3), d.normal(B, K, T, D, mean=0.2)


def _attention() -> Iterator[Given]:
    d = Draws(6)
    for B, H, K, S, T, D in ((1, 1, 1, 4, 4, 3), (2, 4, 2, 5, 5, 3), (1, 4, 2, 3, 5, 2), (1, 6, 2, 4, 4, 5)):
        words = f"{H} query heads on {K}, {S} queries of {T} keys"
        yield Given(words, _qkv(d, B, H, K, S, T, D), lengths={"D": D, "H": H, "T": T, "S": S})
    q, k, v = _qkv(d, 1, 2, 1, 3, 3, 4)
    yield Given("scores of millions", (q * 1e6, k, v), corner=True)
    yield Given("all scores far below 0", (-1e6 * (np.abs(q) + 1), np.abs(k) + 1, v), corner=True)


def _attention_shown() -> Iterator[Given]:
    v = np.eye(4)[None, None]
    yield Given("v is the identity: the result is the weights", (np.zeros((1, 1, 4, 4)), v, v))


ATTENTION = Exercise(
    name="attention",
    track="numpy",
    title="Causal attention with grouped heads",
    statement="""
    q has shape [B, H, S, D], k and v have shape [B, K, T, D]: batch, heads, positions, dims. H is a multiple of K:
    query head h reads key/value head h // (H // K), so that neighbouring query heads share one. For every head:

        scores = q k^T / sqrt(D)                      [S, T]
        query s sees the keys 0 .. T - S + s only     (the last query sees all: the first T - S keys come from a cache)
        weights = softmax of the scores that are seen, over the keys
        o = weights v                                 [S, D]

    The result has the shape of q. Example: H = K = 1, S = T = 2, q = 0: the first query sees one key, so o[0] = v[0];
    the second sees two with equal scores, so o[1] = (v[0] + v[1]) / 2.

    What counts: the weights of every query sum to 1, no query sees a later key, and large scores do not overflow.
    """,
    function="attention",
    solution='''def attention(q, k, v):
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    s = q @ k.swapaxes(-1, -2) / np.sqrt(D)
    seen = np.arange(T) <= np.arange(S)[:, None] + T - S
    s = np.where(seen, s, -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p @ v
''',
    calls=_attention,
    operator="attention",
    outputs={"o": ("B", "H", "S", "D")},
    shown=_attention_shown,
    mistakes=(
        wrong("no scale", "the scores are not divided by sqrt(D)", "How large are your scores when D grows?",
              " / np.sqrt(D)", ""),
        wrong("divided by D", "the scores are divided by D: not by its root, or by the root twice",
              "By what exactly are your scores divided?", "np.sqrt(D)", "D"),
        wrong("multiplied by the root", "the scores are multiplied by sqrt(D), and should be divided",
              "Do your scores grow or shrink when D grows?", "/ np.sqrt(D)", "* np.sqrt(D)"),
        wrong("root of the model width", "the scores are divided by the root of H D, and not of D",
              "Whose width is under the root: that of the model or that of a head?", "np.sqrt(D)", "np.sqrt(H * D)"),
        wrong("root of the number of keys", "the scores are divided by the root of T, and not of D",
              "Which axis of k gives the number under your root?", "np.sqrt(D)", "np.sqrt(T)"),
        wrong("no causal mask", "queries see later keys: there is no causal mask",
              "Which keys does the first query see?", "s = np.where(seen, s, -np.inf)", "s = s"),
        ways("own position masked", "a query does not see its own position",
             "Does query 0 see key 0, where S = T?",
             ("np.arange(T) <=", "np.arange(T) <"),
             ("np.arange(T) <=", "np.arange(T) <", "return p @ v", "return np.nan_to_num(p) @ v")),
        wrong("one key too many", "each query sees one key of the future",
              "Which keys does query 0 see, where S = T?", "+ T - S", "+ T - S + 1"),
        wrong("mask at the top left", "the mask is aligned at the first key; with S < T it is aligned at the end",
              "Which keys does the last query see, where S is less than T?", " + T - S", ""),
        ways("mask mirrored", "the mask is mirrored: queries see the future, and not the past",
             "Which keys does the first query see?", ("np.arange(T) <=", "np.arange(T) >=")),
        ways("masked with 0", "masked scores are 0 and not minus infinity: they still count as exp(0)",
             "What weight has a key whose score is 0?", ("s, -np.inf)", "s, 0.0)"),
             ("s, -np.inf)", "s, 1e-9)"), ("np.where(seen, s, -np.inf)", "s * seen")),
        wrong("finite sentinel", "masked scores are NUMBER, and not minus infinity: one that is seen may be smaller",
              "Is there a number below every score?", "s, -np.inf)", "s, NUMBER)",
              numbers=("-1e4", "-1e5", "-1e3", "-100.0", "-10.0", "-1.0")),
        ways("masked after the softmax", "the weights are masked after the softmax, and rows do not sum to 1",
             "What do the weights of the first query sum to?",
             ("    s = np.where(seen, s, -np.inf)\n", "", "return p @ v", "return np.where(seen, p, 0) @ v")),
        wrong("mask added as 0 and 1", "the mask of 0 and 1 is added to the scores: add 0 and minus infinity",
              "What becomes of a score when you add your mask to it?", "np.where(seen, s, -np.inf)", "s + seen"),
        ways("softmax over the queries", "the softmax runs over the queries, and not over the keys",
             "Which sums of your weights are 1: over keys or over queries?",
             ("axis=-1, keepdims", "axis=-2, keepdims"),
             ("e.sum(axis=-1, keepdims", "e.sum(axis=-2, keepdims")),
        ways("softmax over the heads", "the softmax runs over the heads (axis 1), and not over the keys",
             "Which axis of the scores are the keys?",
             ("s - s.max(axis=-1, keepdims=True)", "np.where(seen, s - s.max(axis=1, keepdims=True), -np.inf)",
              "e / e.sum(axis=-1, keepdims=True)", "np.nan_to_num(e / e.sum(axis=1, keepdims=True))"),
             ("axis=-1, keepdims=True", "axis=1, keepdims=True")),
        wrong("no softmax", "there is no softmax: the scores themselves weigh the values",
              "What do your weights sum to?", "return p @ v", "return np.where(seen, s, 0) @ v"),
        wrong("not normalised", "the exponentials are not divided by their sum",
              "What do your weights sum to?", "return p @ v", "return e @ v"),
        wrong("heads tiled", "query head h reads key/value head h % K: that is tile, where repeat would be right",
              "Which key/value head does query head 1 read?",
              "np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)",
              "np.tile(k, (1, H // K, 1, 1)), np.tile(v, (1, H // K, 1, 1))"),
        wrong("first key head for all", "all query heads read key/value head 0",
              "Which key/value head does the last query head read?",
              "np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)",
              "np.repeat(k[:, :1], H, axis=1), np.repeat(v[:, :1], H, axis=1)"),
        wrong("k for v", "the keys are averaged, and not the values", "What do your weights multiply?",
              "return p @ v", "return p @ k"),
        wrong("maximum not subtracted", "the maximum is not subtracted, so exp overflows",
              "What is exp of a score of 2000?", "s - s.max(axis=-1, keepdims=True)", "s"),
        wrong("base 2", "the weights are 2^s, and not e^s", "Which base has the exponential of a softmax?",
              "np.exp(", "np.exp2("),
        wrong("heads mixed by reshape", "the result is reshaped where heads and positions have to be exchanged",
              "In which order do heads and positions lie in your result?",
              "return p @ v", "return (p @ v).swapaxes(1, 2).reshape(B, H, S, D)"),
        wrong("scale after the softmax", "the weights are divided by sqrt(D), and not the scores",
              "What do your weights sum to?", " / np.sqrt(D)", "", "return p @ v", "return p @ v / np.sqrt(D)"),
    ),
    hints=(
        "Let v be the identity, so that the result is the weights: which of them should be 0, and what do rows sum to?",
        "Four steps: repeat the key/value heads, scores over sqrt(D), hide what is not seen, softmax over the keys.",
        "seen = np.arange(T) <= np.arange(S)[:, None] + T - S, and np.where(seen, scores, -np.inf) hides the others.",
    ),
)

# ------------------------------------------------------------------------------------------------- cross_entropy


def _cross_entropy() -> Iterator[Given]:
    d = Draws(7)
    yield Given("three classes", (d.normal(4, 3), np.array([2, 0, 1, 1])), lengths={"N": 4, "V": 3})
    yield Given("five classes", (d.normal(6, 5, size=2.0), np.array([4, 0, 2, 3, 1, 0])), lengths={"N": 6, "V": 5})
    ignored = (d.normal(5, 7), np.array([1, -100, 3, 0, -100]))
    yield Given("rows with label -100", ignored, corner=True, lengths={"N": 5, "V": 7})
    yield Given("a logit of 2000", (filled(d.normal(3, 4), (1, 2), 2000.0), np.array([0, 1, 3])), corner=True)
    yield Given("a certain label", (filled(d.normal(2, 3), (0, 1), 2000.0), np.array([1, 2])), corner=True)
    yield Given("an unlikely label", (filled(d.normal(2, 4), (0, 1), -2000.0), np.array([1, 2])), corner=True)


CROSS_ENTROPY = Exercise(
    name="cross_entropy",
    track="numpy",
    title="Cross entropy from logits",
    statement="""
    logits has shape [N, V]: N rows with a number for each of V classes. labels has shape [N], whole numbers: the right
    class of each row, or -100 for a row that does not count. The result has shape [N]:

        loss[n] = -log( exp(logits[n, labels[n]]) / sum over v of exp(logits[n, v]) ),      0 where the label is -100

    Example: cross_entropy([[0, 0], [0, ln 3]], [1, 1]) = [ln 2, ln (4/3)] = [0.693, 0.288].

    What counts: the loss of two equal logits is ln 2; adding a number to a whole row changes nothing; a logit of 2000
    gives a finite loss, and so does a label whose probability is too small for a floating-point number.
    """,
    function="cross_entropy",
    solution='''def cross_entropy(logits, labels):
    counted = labels != -100
    y = np.where(counted, labels, 0)
    top = logits.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    loss = lse - logits[np.arange(len(y)), y]
    return np.where(counted, loss, 0.0)
''',
    calls=_cross_entropy,
    operator="cross_entropy",
    adapt="lambda operator, z, y: operator(z, y, reduction='none')",
    outputs={"loss": ("N",)},
    shown=lambda: [Given("equal logits", (np.zeros((3, 2)) + [[0.0], [1.0], [5.0]], np.array([0, 1, 1])))],
    mistakes=(
        wrong("sign", "the sign is wrong: the loss is minus the logarithm of the probability",
              "Can the logarithm of a probability be positive?", "loss = lse - logits[np.arange(len(y)), y]",
              "loss = logits[np.arange(len(y)), y] - lse"),
        wrong("maximum not subtracted", "the maximum is not subtracted, so exp overflows",
              "What is exp(2000)?", "top = logits.max(axis=-1, keepdims=True)", "top = 0 * logits[:, :1]"),
        wrong("minimum subtracted", "the minimum is subtracted and not the maximum, so that exp still overflows",
              "How large can your exponent get?", "logits.max(axis=-1", "logits.min(axis=-1"),
        wrong("maximum not added back", "the maximum is subtracted inside the logarithm and not added again outside",
              "What happens to your loss if a number is added to a whole row?", " + top[:, 0]", ""),
        ways("logarithm of the probability",
             "log(softmax): a probability that is too small becomes 0, and the loss infinite; take lse - logit",
             "What is log(exp(-2000))?",
             ("loss = lse - logits[np.arange(len(y)), y]",
              "loss = -np.log((np.exp(logits - top) / np.exp(logits - top).sum(axis=-1, keepdims=True))"
              "[np.arange(len(y)), y])")),
        wrong("clipped", "log(p + NUMBER): an unlikely label cannot cost more than -log(NUMBER)",
              "What is the largest loss that your code can give?",
              "loss = lse - logits[np.arange(len(y)), y]",
              "loss = -np.log(np.exp(logits[np.arange(len(y)), y] - lse) + NUMBER)",
              numbers=("1e-9", "1e-8", "1e-7", "1e-10", "1e-12", "1e-6", "1e-5")),
        wrong("probability", "it is the probability of the label: the logarithm is missing",
              "What is your loss where the label is certain?", "loss = lse - logits[np.arange(len(y)), y]",
              "loss = np.exp(logits[np.arange(len(y)), y] - lse)"),
        wrong("base 2", "the logarithm has the base 2: too large by 1 / ln 2",
              "What is your loss for two equal logits?", "loss = lse - logits[np.arange(len(y)), y]",
              "loss = (lse - logits[np.arange(len(y)), y]) / np.log(2)"),
        wrong("label minus one", "the class before the label is read: labels count from 0",
              "Which column belongs to label 0?", "logits[np.arange(len(y)), y]", "logits[np.arange(len(y)), y - 1]"),
        wrong("label of the next row", "each row takes the label of the next one: the caller shifts already",
              "Which label belongs to row 0?", "logits[np.arange(len(y)), y]",
              "logits[np.arange(len(y)), np.roll(y, -1)]"),
        wrong("ignored rows counted", "rows with label -100 are read as class 0, and should give 0",
              "What does your code do with label -100?", "np.where(counted, loss, 0.0)", "loss"),
        wrong("ignored rows read from the end", "label -100 is used as an index, or as the last class",
              "What does your code do with label -100?", "np.where(counted, labels, 0)",
              "np.where(counted, labels, -1)",
              "np.where(counted, loss, 0.0)", "loss"),
        wrong("ignored rows are NaN", "rows with label -100 are NaN, and should be 0", "What should such a row give?",
              "np.where(counted, loss, 0.0)", "np.where(counted, loss, np.nan)"),
        wrong("all classes", "the losses of all classes are summed, and only the label counts",
              "How many classes of a row enter your loss?", "loss = lse - logits[np.arange(len(y)), y]",
              "loss = (lse[:, None] - logits).sum(axis=-1)"),
        wrong("mean of the classes", "the mean over all classes is taken, and only the label counts",
              "How many logits of a row besides the sum enter your loss?",
              "logits[np.arange(len(y)), y]", "logits.mean(axis=-1)"),
        ways("mean of the rows", "every row has the mean of the losses; one loss for each row is asked",
             "Is the loss of each row its own?",
             ("np.where(counted, loss, 0.0)", "np.full(len(loss), loss[counted].mean())")),
        wrong("softmax twice", "the logits go through a softmax first: they are no probabilities, and need not be",
              "What does your code assume that a row of logits sums to?",
              "    top =", "    e = np.exp(logits - logits.max(axis=-1, keepdims=True))\n"
              "    logits = e / e.sum(axis=-1, keepdims=True)\n    top ="),
        wrong("down the columns", "the sum runs over the rows (axis 0), and not over the classes",
              "Along which axis does your sum run?",
              "np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]",
              "np.log(np.exp(logits - logits.max()).sum(axis=0))[y] + logits.max()"),
        wrong("sum of everything", "one sum is taken over all rows and classes",
              "How many sums does your code compute?",
              "np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]",
              "np.log(np.exp(logits - logits.max()).sum()) + logits.max()"),
        wrong("largest logit for the label", "the largest logit of a row is used, and not that of the label",
              "Where does your code use labels?", "logits[np.arange(len(y)), y]", "top[:, 0]"),
        wrong("margin", "it is the largest logit minus that of the label: the logarithm of the sum is missing",
              "What is your loss for two equal logits?", "lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]",
              "lse = top[:, 0]"),
    ),
    hints=(
        "Two equal logits: the loss is ln 2 = 0.693. What is yours?",
        "loss = logsumexp(row) - row[label]. Both grow together when a number is added to the row.",
        "logsumexp(row) = max + log(sum(exp(row - max))); nothing overflows, and nothing is 0 before the logarithm.",
    ),
)

EXERCISES = (SWIGLU, SOFTMAX, RMS_NORM, LAYER_NORM, ROPE, ATTENTION, CROSS_ENTROPY)
