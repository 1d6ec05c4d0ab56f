"""Gradients by hand, operator by operator, and then a training loop."""

from collections.abc import Iterator

import numpy as np

from refllm.learn.exercise import Exercise, Given, ways, wrong
from refllm.learn.exercises.draws import Draws, filled

# fmt: off

_SOFTMAX = '''def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


'''

# -------------------------------------------------------------------------------------------------------- linear


def _linear() -> Iterator[Given]:
    d = Draws(21)
    for N, n, m in ((3, 2, 4), (5, 3, 3), (1, 4, 2)):
        yield Given(f"{N} rows", (d.normal(N, m), d.normal(N, n), d.normal(m, n)), lengths={"N": N, "I": n, "O": m})


LINEAR_BACKWARD = Exercise(
    name="linear_backward",
    track="backward",
    title="The gradient of a linear layer",
    statement="""
    The layer was y = x w^T + b: x [N, I], w [O, I], b [O], y [N, O]. dy [N, O] is the gradient of a loss with respect
    to y: how the loss grows with each element of it. Return (dx [N, I], dw [O, I], db [O]).

    y[n, o] = sum over i of x[n, i] w[o, i] + b[o], so y[n, o] grows with x[n, i] by w[o, i], with w[o, i] by x[n, i],
    and with b[o] by 1. Sum over everything that an element reaches. Example: dy = [[1]], x = [[2, 3]], w = [[4, 5]]:
    dx = [[4, 5]], dw = [[2, 3]], db = [1].

    What counts: a gradient has the shape of what it is a gradient of, and what all rows share gets the sum over them.
    """,
    function="linear_backward",
    solution='''def linear_backward(dy, x, w):
    dx = dy @ w
    dw = dy.T @ x
    db = dy.sum(axis=0)
    return dx, dw, db
''',
    calls=_linear,
    outputs={"dx": ("N", "I"), "dw": ("O", "I"), "db": ("O",)},
    shown=lambda: [Given("small",
    (np.array([[1.0, 0.0]]), np.array([[2.0, 3.0]]), np.array([[4.0, 5.0], [6.0, 7.0]])))],
    mistakes=(
        wrong("db averaged", "db is the mean over the rows, and should be their sum",
              "By how much does the loss grow if b grows: for one row or for all?", "dy.sum(axis=0)",
              "dy.mean(axis=0)"),
        wrong("dw averaged", "dw is divided by the number of rows: that belongs to the loss, and dy has it already",
              "Is a factor 1/N in dy already?", "dy.T @ x", "dy.T @ x / len(x)"),
        wrong("both averaged", "dw and db are divided by the number of rows, and should be sums",
              "Is a factor 1/N in dy already?", "dy.T @ x", "dy.T @ x / len(x)", "dy.sum(axis=0)", "dy.mean(axis=0)"),
        wrong("dx averaged", "dx is divided by the number of rows: each row of x reaches its own row of y alone",
              "How many rows of y does a row of x reach?", "dx = dy @ w", "dx = dy @ w / len(x)"),
        wrong("db of the last row", "db is that of the last row: rows overwrite each other",
              "How many rows use b?", "dy.sum(axis=0)", "dy[-1]"),
        wrong("db is one", "db is 1 everywhere, or the number of rows: dy is not in it",
              "By the chain rule, what multiplies the 1?", "dy.sum(axis=0)", "np.full(dy.shape[1], 1.0)"),
        wrong("dw of the first row", "dw is that of the first row", "How many rows use w?",
              "dy.T @ x", "dy[:1].T @ x[:1]"),
        wrong("dx of summed dy", "every row of dx is that of the sum of dy over the rows",
              "Which rows of y does row n of x reach?", "dx = dy @ w",
              "dx = np.repeat(dy.sum(axis=0)[None] @ w, len(x), 0)"),
        wrong("sign", "all gradients have the wrong sign: that is the step, and not the gradient",
              "Does the loss grow or fall along a gradient?", "return dx, dw, db", "return -dx, -dw, -db"),
        wrong("dx without dy", "dx does not depend on dy", "By the chain rule, what multiplies w?",
              "dx = dy @ w", "dx = np.repeat(w.sum(axis=0)[None], len(x), 0)"),
        wrong("dw without dy", "dw does not depend on dy", "By the chain rule, what multiplies x?",
              "dy.T @ x", "np.repeat(x.sum(axis=0)[None], dy.shape[1], 0)"),
        wrong("magnitude of dy", "dx uses the magnitude of dy", "What if the loss falls with y?",
              "dx = dy @ w", "dx = np.abs(dy) @ w"),
        wrong("db doubled", "db is twice what it should be", "How often does b enter each y?",
              "dy.sum(axis=0)", "2 * dy.sum(axis=0)"),
    ),
    hints=(
        "Write the shapes down: which product of dy [N, O] and w [O, I] has the shape of x?",
        "dx sums over o, dw sums over n, db sums over n.",
        "dx = dy @ w, dw = dy.T @ x, db = dy.sum(axis=0).",
    ),
)

# -------------------------------------------------------------------------------------------------------- swiglu


def _swiglu() -> Iterator[Given]:
    d = Draws(22)
    yield Given("a few numbers", (d.normal(2, 5), d.normal(2, 5, size=1.5), d.normal(2, 5, mean=0.4)))
    yield Given("one row", (d.normal(1, 7), d.normal(1, 7, size=2.5), d.normal(1, 7)))
    large = np.array([[900.0, -900.0, 3.0]])
    yield Given("gates of 900 and -900", (d.normal(1, 3, mean=1.0), large, d.normal(1, 3, mean=1.0)), corner=True)


SWIGLU_BACKWARD = Exercise(
    name="swiglu_backward",
    track="backward",
    title="The gradient of SwiGLU",
    statement="""
    The forward pass was h = silu(gate) * up with silu(x) = x s(x), s(x) = 1 / (1 + exp(-x)). dh is the gradient of a
    loss with respect to h; all have one shape. Return (dgate, dup).

    By the product rule, silu'(x) = s(x) + x s(x) (1 - s(x)). Example: gate = 0, up = 5, dh = 2: s = 1/2, silu' = 1/2,
    so dgate = 2 * 5 * 1/2 = 5 and dup = 2 * 0 = 0.

    What counts: each argument's gradient is dh times the derivative of h by it, the other held fixed.
    """,
    function="swiglu_backward",
    solution='''def swiglu_backward(dh, gate, up):
    s = 1 / (1 + np.exp(-gate))
    dgate = dh * up * (s + gate * s * (1 - s))
    dup = dh * gate * s
    return dgate, dup
''',
    calls=_swiglu,
    outputs={"dgate": ("rows", "F"), "dup": ("rows", "F")},
    shown=lambda: [Given("dh and up are 1",
    (np.ones((1, 5)), np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]]), np.ones((1, 5))))],
    mistakes=(
        wrong("second term missing", "silu' is taken as s(x): x s(x) is a product, and has a second term",
              "Of how many factors is silu(x) = x s(x) a product?", "(s + gate * s * (1 - s))", "s"),
        wrong("first term missing", "silu' is taken as x s (1 - s): the factor x has a derivative as well",
              "What is silu'(0)?", "(s + gate * s * (1 - s))", "(gate * s * (1 - s))"),
        wrong("sigmoid's derivative", "the derivative of the sigmoid alone is taken", "What is silu'(0)?",
              "(s + gate * s * (1 - s))", "(s * (1 - s))"),
        wrong("silu for its derivative", "silu itself stands where its derivative belongs", "What is silu'(0)?",
              "(s + gate * s * (1 - s))", "(gate * s)"),
        wrong("sign of the second term", "the second term is subtracted", "What sign has s'(x)?",
              "(s + gate", "(s - gate"),
        wrong("one plus s", "s' is taken as s (1 + s)", "What is the derivative of a sigmoid where it is flat?",
              "(1 - s)", "(1 + s)"),
        wrong("up missing", "dgate lacks the factor up", "By what is silu(gate) multiplied in h?", "dh * up *", "dh *"),
        wrong("dh missing in dgate", "dgate lacks the factor dh", "By the chain rule, what multiplies the derivative?",
              "dgate = dh *", "dgate ="),
        wrong("dh missing in dup", "dup lacks the factor dh", "By the chain rule, what multiplies the derivative?",
              "dup = dh *", "dup ="),
        wrong("dup is dh times the sigmoid", "dup lacks the factor gate", "What multiplies up in h?",
              "dh * gate * s", "dh * s"),
        wrong("dup is dh times gate", "dup lacks the sigmoid", "What multiplies up in h?", "dh * gate * s",
              "dh * gate"),
        wrong("results exchanged", "dgate and dup are returned in the other order",
              "In which order are they asked for?",
              "return dgate, dup", "return dup, dgate"),
        wrong("gate and up exchanged", "the derivative is that of silu(up) * gate", "Which of the two has the silu?",
              "dh, gate, up)", "dh, up, gate)", "return dgate, dup", "return dup, dgate"),
        wrong("sigmoid of minus", "the sigmoid is that of -gate", "Is your s near 1 for a large gate?",
              "np.exp(-gate)", "np.exp(gate)"),
        wrong("dup with the derivative", "dup uses silu', and should use silu", "What multiplies up in h?",
              "dh * gate * s", "dh * (s + gate * s * (1 - s))"),
    ),
    hints=(
        "At gate = 0 silu' is 1/2. What is yours?",
        "h is a product of silu(gate) and up: hold one fixed, and differentiate the other.",
        "silu' = s + x s (1 - s) with s = 1 / (1 + exp(-x)).",
    ),
)

# ------------------------------------------------------------------------------------------------------- softmax


def _softmax() -> Iterator[Given]:
    d = Draws(23)
    yield Given("three columns", (d.normal(2, 3), d.normal(2, 3)), lengths={"E": 3})
    yield Given("five columns", (d.normal(3, 5, mean=0.3), d.normal(3, 5, size=1.5)), lengths={"E": 5})
    yield Given("a number of 2000", (d.normal(2, 4), filled(d.normal(2, 4), (0, 1), 2000.0)), corner=True)


SOFTMAX_BACKWARD = Exercise(
    name="softmax_backward",
    track="backward",
    title="The gradient of a softmax",
    statement="""
    p = softmax(x) along the last axis, x [N, E]. dp [N, E] is the gradient of a loss with respect to p. Return
    dx [N, E].

    Every x_j reaches every p_i of its row, through the sum: dp_i/dx_j = p_i (1 - p_i) if i = j, and -p_i p_j if not. So
    dx_j = sum over i of dp_i times that. Write it without a matrix of E by E. Example: x = [0, 0], dp = [1, 0]: p is
    [1/2, 1/2], and dx = [1/4, -1/4].

    What counts: dx sums to 0 in every row, since a shift of the row changes nothing; x may hold a 2000.
    """,
    function="softmax_backward",
    solution='''def softmax_backward(dp, x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
''',
    calls=_softmax,
    outputs={"dx": ("N", "E")},
    shown=lambda: [Given("equal numbers", (np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.zeros((2, 3))))],
    mistakes=(
        wrong("sum missing", "it is p dp alone: every x_j changes every p_i, through the sum",
              "What does a row of your result sum to?", "(dp - np.sum(p * dp, axis=-1, keepdims=True))", "dp"),
        wrong("diagonal alone", "it is p (1 - p) dp: the diagonal of the matrix, the rest is missing",
              "What does a row of your result sum to?",
              "p * (dp - np.sum(p * dp, axis=-1, keepdims=True))", "p * (1 - p) * dp"),
        wrong("sum without p", "the sum is of dp, and should be of p dp", "What does a row of your result sum to?",
              "np.sum(p * dp,", "np.sum(dp,"),
        wrong("mean for sum", "the mean of p dp is subtracted, and should be the sum",
              "What does a row of your result sum to?", "np.sum(p * dp,", "np.mean(p * dp,"),
        wrong("sign of the sum", "the sum is added, and should be subtracted", "What sign has -p_i p_j?",
              "dp - np.sum", "dp + np.sum"),
        wrong("factor p missing", "the factor p before the bracket is missing",
              "What does a row of your result sum to?",
              "return p * (dp", "return (dp"),
        wrong("bracket", "the bracket is misplaced: p dp minus the sum", "What does a row of your result sum to?",
              "p * (dp - np.sum(p * dp, axis=-1, keepdims=True))", "p * dp - np.sum(p * dp, axis=-1, keepdims=True)"),
        wrong("sum of everything", "one sum is taken over all rows", "How many sums does your code compute?",
              "np.sum(p * dp, axis=-1, keepdims=True)", "np.sum(p * dp)"),
        wrong("down the columns", "the sum runs down the columns (axis 0)", "Along which axis is the softmax?",
              "np.sum(p * dp, axis=-1, keepdims=True)", "np.sum(p * dp, axis=0)"),
        ways("x for p", "x stands where p belongs", "Are the factors of dp probabilities?",
             ("return p * (dp", "return x * (dp"), ("    return p * (dp", "    p = x\n    return p * (dp")),
        wrong("maximum not subtracted", "the softmax is computed without its maximum, and overflows",
              "What is exp(2000)?", "x - x.max(axis=-1, keepdims=True)", "x"),
        wrong("p not divided", "p is not divided by its sum", "What does your p sum to?",
              "e / e.sum(axis=-1, keepdims=True)", "e"),
        wrong("p squared", "the factor before the bracket is p squared", "How often is p a factor of the diagonal?",
              "return p * (dp", "return p * p * (dp"),
        wrong("dp minus p", "it is p (dp - p): that is the gradient of a cross entropy", "Where is your sum?",
              "np.sum(p * dp, axis=-1, keepdims=True)", "p"),
    ),
    hints=(
        "Add up a row of your result: it should be 0.",
        "Sum p_i (delta_ij - p_j) dp_i over i, and take p_j out of the bracket.",
        "dx = p * (dp - sum of p * dp over the row).",
    ),
)

# ------------------------------------------------------------------------------------------------------ rms_norm


def _norms(seed: int) -> Iterator[Given]:
    d = Draws(seed)
    for words, x, eps in (("eps of the size of the squares", d.normal(3, 4, size=0.7, mean=0.5), 0.25),
                          ("a mean", d.normal(2, 6, mean=1.5), 1e-5), ("five rows", d.normal(5, 3, size=0.3), 0.1)):
        E = x.shape[-1]
        yield Given(words, (d.normal(*x.shape), x, d.weight(E), eps), lengths={"E": E, "N": len(x)})
    x = filled(d.normal(3, 4), 1, 0.0)
    yield Given("a row of zeros", (d.normal(3, 4), x, d.weight(4), 0.01), corner=True)


RMS_NORM_BACKWARD = Exercise(
    name="rms_norm_backward",
    track="backward",
    title="The gradient of RMSNorm",
    statement="""
    The forward pass was y = weight * n with n = r x and r = 1 / sqrt(mean(x^2) + eps), per row of x [N, E]. dy [N, E]
    is the gradient of a loss with respect to y. Return (dx [N, E], dweight [E]).

    With g = weight * dy: x_j reaches n_i directly and through r, and dr/dx_j = -r^3 x_j / E. So

        dx = r g - r^3 x mean(g x)             mean over the row
        dweight = sum over the rows of dy * n

    Example: E = 1, weight 1, eps = 0: n is the sign of x, so dx = 0 whatever dy is.

    What counts: where eps is 0, a longer x gives the same y, so dx and x are at right angles: sum of dx x is 0.
    """,
    function="rms_norm_backward",
    solution='''def rms_norm_backward(dy, x, weight, eps):
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    g = dy * weight
    c = np.mean(g * x, axis=-1, keepdims=True)
    dx = r * g - r**3 * x * c
    dw = (dy * x * r).sum(axis=0)
    return dx, dw
''',
    calls=lambda: _norms(24),
    outputs={"dx": ("N", "E"), "dweight": ("E",)},
    shown=lambda: [
        Given("small", (np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [2.0, 2.0]]), np.ones(2), 0.0)),
    ],
    mistakes=(
        wrong("second term missing", "r is held fixed: it depends on x as well, and gives the second term",
              "Does y change if x is doubled, and what does your dx say?", " - r**3 * x * c", ""),
        wrong("weight missing", "dy is not multiplied by the weight before dx", "Where is weight used in your dx?",
              "g = dy * weight", "g = dy"),
        wrong("sum for mean", "the sum of g x is taken, and should be its mean", "Is dx at right angles to x?",
              "np.mean(g * x,", "np.sum(g * x,"),
        wrong("r squared", "it is r^2 in the second term: the derivative of 1/sqrt gives r^3",
              "What is the derivative of u^(-1/2)?", "r**3", "r**2"),
        wrong("r alone", "it is r in the second term, and should be r^3", "What is the derivative of u^(-1/2)?",
              "r**3", "r"),
        wrong("sign of the second term", "the second term is added: the derivative of 1/sqrt is negative",
              "Does r grow or shrink with x?", "r * g - r", "r * g + r"),
        wrong("weight not in the mean", "the mean in the second term is of dy x, without the weight",
              "Which gradient reaches n: dy or g?", "np.mean(g * x,", "np.mean(dy * x,"),
        wrong("dweight without r", "dweight uses x, and should use the normed x", "What does weight multiply in y?",
              "(dy * x * r)", "(dy * x)"),
        wrong("dweight of the last row", "dweight is that of the last row: rows overwrite each other",
              "How many rows use the weight?", ".sum(axis=0)", "[-1]"),
        wrong("dweight averaged", "dweight is averaged over the rows, and should be their sum",
              "How many rows use the weight?", ".sum(axis=0)", ".mean(axis=0)"),
        wrong("dweight from y", "dweight uses y, or weight * dy: the weight is in it once too often",
              "What does weight multiply in y?",
              "(dy * x * r)", "(dy * x * r * weight)"),
        wrong("mean over everything", "one mean is taken over all rows in the second term",
              "How many means of g x does your code compute?", "np.mean(g * x, axis=-1, keepdims=True)",
              "np.mean(g * x)"),
        wrong("factor two", "a factor 2 too many: that of the square cancels the 1/2 of the root",
              "What is the derivative of (x^2)^(-1/2)?", "r**3 * x * c", "2 * r**3 * x * c"),
        wrong("factor one half", "a factor 1/2 too many: that of the root cancels the 2 of the square",
              "What is the derivative of (x^2)^(-1/2)?", "r**3 * x * c", "r**3 * x * c / 2"),
        wrong("eps left out", "eps is not in r", "Is the r of your backward pass that of the forward pass?",
              " + eps)", ")"),
        wrong("g for x in the second term", "the second term has g where x belongs", "What is dr/dx_j?",
              "r**3 * x * c", "r**3 * g * c"),
        wrong("mean subtracted", "the mean of g is subtracted as in LayerNorm", "Is a mean of x in the forward pass?",
              "dx = r * g -", "dx = r * (g - g.mean(axis=-1, keepdims=True)) -"),
    ),
    hints=(
        "With eps = 0 the sum of dx * x over a row is 0. What is yours?",
        "Two terms: r held fixed, and x held fixed while r changes.",
        "dx = r * g - r**3 * x * mean(g * x), with g = dy * weight.",
    ),
)

# ---------------------------------------------------------------------------------------------------- layer_norm

LAYER_NORM_BACKWARD = Exercise(
    name="layer_norm_backward",
    track="backward",
    title="The gradient of LayerNorm",
    statement="""
    The forward pass was y = weight * n + bias with n = (x - m) r, m = mean(x), r = 1 / sqrt(var(x) + eps), per row of x
    [N, E]; the variance is divided by E. dy [N, E] is the gradient of a loss with respect to y. Return (dx [N, E],
    dweight [E], dbias [E]).

    With g = weight * dy: x reaches y directly, through the mean and through r, which gives three terms:

        dx = r ( g - mean(g) - n mean(g n) )           means over the row
        dweight = sum over the rows of dy * n,   dbias = sum over the rows of dy

    Example: E = 2, weight 1, eps = 0: n is (1, -1) or (-1, 1), so dx = 0 whatever dy is.

    What counts: a shift of a row changes nothing, so every row of dx sums to 0.
    """,
    function="layer_norm_backward",
    solution='''def layer_norm_backward(dy, x, weight, eps):
    d = x - x.mean(axis=-1, keepdims=True)
    r = 1 / np.sqrt(np.mean(d * d, axis=-1, keepdims=True) + eps)
    n = d * r
    g = dy * weight
    dx = r * (g - np.mean(g, axis=-1, keepdims=True) - n * np.mean(g * n, axis=-1, keepdims=True))
    dw = (dy * n).sum(axis=0)
    db = dy.sum(axis=0)
    return dx, dw, db
''',
    calls=lambda: _norms(25),
    outputs={"dx": ("N", "E"), "dweight": ("E",), "dbias": ("E",)},
    mistakes=(
        wrong("mean of g missing", "the mean of g is not subtracted: the forward pass subtracts a mean of x",
              "What does a row of your dx sum to?", " - np.mean(g, axis=-1, keepdims=True)", ""),
        wrong("third term missing", "r is held fixed: the term with n mean(g n) is missing",
              "Does y change if x is doubled, and what does your dx say?",
              " - n * np.mean(g * n, axis=-1, keepdims=True)", ""),
        wrong("both terms missing", "only r g is left: mean and r depend on x as well",
              "What does a row of your dx sum to?",
              " - np.mean(g, axis=-1, keepdims=True) - n * np.mean(g * n, axis=-1, keepdims=True)", ""),
        wrong("weight missing", "dy is not multiplied by the weight before dx", "Where is weight used in your dx?",
              "g = dy * weight", "g = dy"),
        wrong("r missing", "the factor r before the bracket is missing", "By what is x - m multiplied in n?",
              "dx = r * (", "dx = ("),
        wrong("x for n", "the third term has x - m where n belongs", "Is the third term at the size of g?",
              "- n * np.mean(g * n", "- d * np.mean(g * d"),
        wrong("weight not in the third term", "the mean in the third term is of dy n, without the weight",
              "Which gradient reaches n: dy or g?", "np.mean(g * n,", "np.mean(dy * n,"),
        wrong("mean of dy", "the mean of dy is subtracted, and should be that of g = dy weight",
              "Which gradient reaches x - m: dy or g?", "np.mean(g, axis=-1", "np.mean(dy, axis=-1"),
        wrong("means over the rows", "both means are taken over the rows, and not over a row",
              "Does one row of dx depend on the other rows?",
              "np.mean(g, axis=-1", "np.mean(g, axis=0", "np.mean(g * n, axis=-1", "np.mean(g * n, axis=0"),
        wrong("x in the mean", "the mean in the third term is of g x, and should be of g n",
              "What is the third term if x has a large mean?", "np.mean(g * n", "np.mean(g * x"),
        wrong("sign of the third term", "the third term is added", "Does r grow or shrink with the variance?",
              "- n * np.mean", "+ n * np.mean"),
        wrong("sums for means", "sums are taken where means belong", "What does a row of your dx sum to?",
              "np.mean(g, axis", "np.sum(g, axis", "np.mean(g * n", "np.sum(g * n"),
        wrong("dweight from x", "dweight uses x, and should use n", "What does weight multiply in y?",
              "(dy * n).sum", "(dy * x).sum"),
        wrong("dweight from x - m", "dweight uses x - m without r", "What does weight multiply in y?",
              "(dy * n).sum", "(dy * d).sum"),
        wrong("dbias from g", "dbias uses g: the bias is added after the weight", "What does bias multiply in y?",
              "db = dy.sum", "db = g.sum"),
        wrong("dweight averaged", "dweight is averaged over the rows", "How many rows use the weight?",
              "(dy * n).sum", "(dy * n).mean"),
        wrong("both averaged", "dweight and dbias are averaged over the rows", "How many rows use the weight?",
              "(dy * n).sum", "(dy * n).mean", "dy.sum", "dy.mean"),
        wrong("dbias of the last row", "dbias is that of the last row", "How many rows use the bias?",
              "dy.sum(axis=0)", "dy[-1]"),
        wrong("results exchanged", "dweight and dbias are returned in the other order",
              "In which order are they asked for?", "return dx, dw, db", "return dx, db, dw"),
        wrong("variance over E - 1", "the variance is divided by E - 1",
              "Is the r of your backward pass that of the forward?",
              "np.mean(d * d, axis=-1, keepdims=True)", "np.sum(d * d, axis=-1, keepdims=True) / (x.shape[-1] - 1)"),
        wrong("RMSNorm's", "the mean of x is not taken off: this is the gradient of RMSNorm",
              "Is the n of your backward pass that of the forward?", "d = x - x.mean(axis=-1, keepdims=True)", "d = x",
              " - np.mean(g, axis=-1, keepdims=True)", ""),
        wrong("eps left out", "eps is not in r", "Is the r of your backward pass that of the forward pass?",
              " + eps)", ")"),
    ),
    hints=(
        "Add up a row of your dx: it should be 0.",
        "Three ways lead from x to y: directly, through the mean, and through r.",
        "dx = r * (g - mean(g) - n * mean(g * n)), with g = dy * weight and means over the row.",
    ),
)

# ---------------------------------------------------------------------------------------------------------- rope


def _rope() -> Iterator[Given]:
    d = Draws(26)
    for S, D, R in ((3, 4, 4), (4, 6, 4), (2, 8, 8)):
        a = d.uniform(S, R // 2, low=0.3, high=2.6)
        yield Given("a part of the head" if R < D else "whole heads",
                    (d.normal(S, D, mean=0.3), np.cos(a).round(3), np.sin(a).round(3)), lengths={"D": D, "R": R})


ROPE_BACKWARD = Exercise(
    name="rope_backward",
    track="backward",
    title="The gradient of the rotary embedding",
    statement="""
    One head. The forward pass turned the first R of D dims of x [S, D] in halves: with a = x[:, :R/2], b = x[:, R/2:R],
    cos and sin [S, R/2]:

        ya = a cos - b sin,        yb = b cos + a sin,        the other dims as they are

    dy [S, D] is the gradient of a loss with respect to y. Return dx [S, D]. Example: R = D = 2, a quarter turn
    (cos 0, sin 1): dy = (1, 0) gives dx = (0, -1): ya was -b.

    What counts: a gradient is turned back, by the angle with the other sign, so the size of every pair is kept.
    """,
    function="rope_backward",
    solution='''def rope_backward(dy, cos, sin):
    h = cos.shape[-1]
    da, db = dy[:, :h], dy[:, h : 2 * h]
    dx = dy.copy()
    dx[:, :h] = da * cos + db * sin
    dx[:, h : 2 * h] = db * cos - da * sin
    return dx
''',
    calls=_rope,
    outputs={"dx": ("S", "D")},
    shown=lambda: [Given("unit vectors, a quarter turn", (np.eye(4), np.zeros((4, 2)), np.ones((4, 2))))],
    mistakes=(
        wrong("turned forwards", "it is the forward rotation: a gradient is turned back",
              "Which element of y does b reach with a minus?",
              "da * cos + db * sin", "da * cos - db * sin", "db * cos - da * sin", "db * cos + da * sin"),
        wrong("both signs plus", "both lines have a plus", "Does your result keep the size of a pair?",
              "db * cos - da * sin", "db * cos + da * sin"),
        wrong("both signs minus", "both lines have a minus", "Does your result keep the size of a pair?",
              "da * cos + db * sin", "da * cos - db * sin"),
        wrong("cos alone", "the terms with sin are missing: each input reaches two outputs",
              "How many elements of y does a reach?", " + db * sin", "", " - da * sin", ""),
        wrong("first half overwritten", "the second line reads what the first has written",
              "Which da does your second line read?", "db * cos - da * sin", "db * cos - dx[:, :h] * sin"),
        wrong("cos and sin exchanged", "cos and sin are exchanged", "What is dx where the angle is 0?",
              "da * cos + db * sin", "da * sin + db * cos", "db * cos - da * sin", "db * sin - da * cos"),
        wrong("pairs side by side", "the pairs are (2i, 2i + 1): the other convention's",
              "Which dim does dim 0 share its angle with?",
              "dy[:, :h], dy[:, h : 2 * h]", "dy[:, 0 : 2 * h : 2], dy[:, 1 : 2 * h : 2]",
              "dx[:, :h]", "dx[:, 0 : 2 * h : 2]", "dx[:, h : 2 * h]", "dx[:, 1 : 2 * h : 2]"),
        wrong("the rest is zero", "dims that do not turn should pass through, and are 0",
              "What is the gradient of a dim that passes through?", "dx = dy.copy()", "dx = np.zeros_like(dy)"),
        wrong("nothing turned", "dy is returned as it is", "Where is the rotation?",
              "da * cos + db * sin", "da", "db * cos - da * sin", "db"),
        wrong("turned twice", "it is turned back twice", "By which angle is the gradient turned?",
              "    h = cos", "    cos, sin = cos * cos - sin * sin, 2 * sin * cos\n    h = cos"),
        wrong("halves exchanged", "the two halves of the result are exchanged", "Which half of dx belongs to a?",
              "da * cos + db * sin\n", "db * cos - da * sin\n", "dx[:, h : 2 * h] = db * cos - da * sin",
              "dx[:, h : 2 * h] = da * cos + db * sin"),
        wrong("always position 0", "all positions use the angle of position 0", "Which angle has row 1?",
              "    h = cos", "    cos, sin = cos[:1], sin[:1]\n    h = cos"),
        wrong("halves of the head", "pairs are D/2 apart, and should be R/2 apart",
              "How far apart are the two dims of a pair?",
              "dy[:, h : 2 * h]", "dy[:, dy.shape[1] // 2 : dy.shape[1] // 2 + h]",
              "dx[:, h : 2 * h]", "dx[:, dy.shape[1] // 2 : dy.shape[1] // 2 + h]"),
    ),
    hints=(
        "A quarter turn: dy = (1, 0) gives (0, -1). What is yours?",
        "a reaches ya by cos and yb by sin; b reaches ya by -sin and yb by cos.",
        "dxa = da cos + db sin, dxb = db cos - da sin.",
    ),
)

# ------------------------------------------------------------------------------------------------- cross_entropy


def _cross_entropy() -> Iterator[Given]:
    d = Draws(27)
    yield Given("three classes", (d.normal(4, 3), np.array([2, 0, 1, 1])), lengths={"N": 4, "V": 3})
    yield Given("five classes", (d.normal(3, 5, size=2.0), np.array([4, 0, 2])), lengths={"N": 3, "V": 5})
    yield Given("labels of -100", (d.normal(5, 7), np.array([1, -100, 3, 0, -100])), corner=True)
    yield Given("a logit of 2000", (filled(d.normal(2, 4), (1, 2), 2000.0), np.array([0, 1])), corner=True)
    yield Given("nothing counts", (d.normal(2, 3), np.array([-100, -100])), corner=True)


CROSS_ENTROPY_BACKWARD = Exercise(
    name="cross_entropy_backward",
    track="backward",
    title="The gradient of the cross entropy",
    statement="""
    The loss was the mean over the rows that count of logsumexp(row) - row[label]: logits [N, V], labels [N], -100 for a
    row that does not count. Return its gradient dlogits [N, V].

    In a row that counts, the loss of the row grows with logit v by softmax(row)[v], and falls with the label's by 1
    more; the mean divides by the number of rows that count. Example: logits = [[0, 0]], labels = [1]: dlogits = [[1/2,
    -1/2]].

    What counts: every row sums to 0; a row that does not count is 0, and where none counts everything is.
    """,
    function="cross_entropy_backward",
    solution=_SOFTMAX + '''def cross_entropy_backward(logits, labels):
    counted = labels != -100
    d = softmax(logits)
    d[np.arange(len(d)), np.where(counted, labels, 0)] -= 1
    d = np.where(counted[:, None], d, 0)
    return d / max(1, counted.sum())
''',
    calls=_cross_entropy,
    outputs={"dlogits": ("N", "V")},
    shown=lambda: [Given("equal logits", (np.zeros((2, 2)), np.array([1, 0])))],
    mistakes=(
        wrong("ignored rows keep their softmax", "1 is not subtracted in ignored rows, and their softmax is left",
              "What is the gradient of a row that does not count?",
              "    d[np.arange(len(d)), np.where(counted, labels, 0)] -= 1\n    d = np.where(counted[:, None], d, 0)\n",
              "    rows = np.flatnonzero(counted)\n    d[rows, labels[rows]] -= 1\n"),
        wrong("one subtracted in whole columns", "1 is subtracted in every row, at the labels of all rows",
              "What does d[:, labels] name?",
              "d[np.arange(len(d)), np.where(counted, labels, 0)] -= 1", "d[:, labels[counted]] -= 1"),
        wrong("one not subtracted", "it is the softmax alone: 1 has to be subtracted at the label",
              "What does a row of your result sum to?", "] -= 1", "] -= 0"),
        wrong("sign", "it is one-hot minus softmax: the sign is exchanged",
              "Does the loss grow with the label's logit?",
              "return d /", "return -d /"),
        wrong("not averaged", "the mean's factor is missing: every row is that of its own loss",
              "By how many rows is the loss divided?", " / max(1, counted.sum())", ""),
        wrong("divided by all rows", "it is divided by all rows, and should be divided by those that count",
              "By how many rows is the loss divided?", "max(1, counted.sum())", "len(d)"),
        wrong("ignored rows not zero", "a row with label -100 has a gradient, and should be 0",
              "What is the gradient of a row that does not count?",
              "    d = np.where(counted[:, None], d, 0)\n", ""),
        wrong("only the label", "only the label's column has a gradient: every logit is in the sum",
              "Does the loss grow with the other logits?", "d = softmax(logits)\n",
              "d = softmax(logits) * (np.arange(logits.shape[1]) == labels[:, None])\n"),
        wrong("divided by V", "it is divided by the number of classes", "By how many rows is the loss divided?",
              "max(1, counted.sum())", "logits.shape[1]"),
        wrong("label minus one", "1 is subtracted in the column before the label", "Which column belongs to label 0?",
              "np.where(counted, labels, 0)] -=", "np.where(counted, labels, 0) - 1] -="),
        wrong("subtracted everywhere", "1 is subtracted from every class", "What does a row of your result sum to?",
              "d[np.arange(len(d)), np.where(counted, labels, 0)] -= 1", "d -= 1"),
        wrong("probability subtracted", "p is subtracted at the label, and not 1: the label's gradient is 0",
              "What is the label's gradient where p is 1/2?", "d[np.arange(len(d)), np.where(counted, labels, 0)] -= 1",
              "d[np.arange(len(d)), np.where(counted, labels, 0)] = 0"),
        wrong("down the columns", "the softmax runs down the columns", "Which sums of your softmax are 1?",
              "axis=-1", "axis=0"),
        wrong("maximum not subtracted", "the softmax overflows", "What is exp(2000)?",
              "x - x.max(axis=-1, keepdims=True)", "x"),
        wrong("nothing counted is 0 / 0", "where no row counts it is 0 / 0, and should be 0",
              "By what do you divide where no row counts?", "max(1, counted.sum())", "counted.sum()"),
        wrong("p times 1 - p", "the softmax's own derivative is multiplied in: the logarithm cancels it",
              "What is the label's gradient where p is 1/2?",
              "    d = np.where(counted",
              "    d = d * softmax(logits) * (1 - softmax(logits))\n    d = np.where(counted"),
        wrong("label of the next row", "each row uses the label of the next", "Which label belongs to row 0?",
              "np.where(counted, labels, 0)] -=", "np.roll(np.where(counted, labels, 0), -1)] -="),
        wrong("logits for the softmax", "it is logits minus one-hot: the softmax is missing",
              "What does a row of your result sum to?", "d = softmax(logits)", "d = logits.copy()"),
    ),
    hints=(
        "Add up a row of your result: it should be 0.",
        "softmax minus one-hot, 0 for what does not count, divided by the number of rows that count.",
        "d[np.arange(N), labels] -= 1 subtracts at the label of each row; mind the label -100.",
    ),
)

# ----------------------------------------------------------------------------------------------------- attention


def _attention() -> Iterator[Given]:
    d = Draws(28)
    for S, D in ((3, 2), (4, 3), (5, 4)):
        yield Given(f"{S} tokens", (d.normal(S, D), d.normal(S, D, size=1.3), d.normal(S, D, mean=0.2), d.normal(S, D)),
                    lengths={"S": S, "D": D})


ATTENTION_BACKWARD = Exercise(
    name="attention_backward",
    track="backward",
    title="The gradient of causal attention",
    statement="""
    One head: q, k, v are [S, D], and the forward pass was

        s = q k^T / sqrt(D),   p = softmax of s over the keys 0 .. s that a query sees,   o = p v

    do [S, D] is the gradient of a loss with respect to o. Return (dq, dk, dv), each [S, D]. Backwards, line by line:

        dv = p^T do,     dp = do v^T,     ds = p (dp - sum over the keys of p dp),     dq = ds k / sqrt(D),
        dk = ds^T q / sqrt(D)

    p is computed again; softmax is there. Example: S = 1: p is 1 whatever q and k are, so dq = dk = 0 and dv = do.

    What counts: every row of ds sums to 0, and what no query sees has the gradient 0.
    """,
    function="attention_backward",
    solution=_SOFTMAX + '''def attention_backward(do, q, k, v):
    S, D = q.shape
    s = np.where(np.tri(S, dtype=bool), q @ k.T / np.sqrt(D), -np.inf)
    p = softmax(s)
    dv = p.T @ do
    dp = do @ v.T
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    dq = ds @ k / np.sqrt(D)
    dk = ds.T @ q / np.sqrt(D)
    return dq, dk, dv
''',
    calls=_attention,
    outputs={"dq": ("S", "D"), "dk": ("T", "D"), "dv": ("T", "D")},
    mistakes=(
        wrong("no scale in dq and dk", "dq and dk are not divided by sqrt(D)", "By what does s grow with q?",
              "ds @ k / np.sqrt(D)", "ds @ k", "ds.T @ q / np.sqrt(D)", "ds.T @ q"),
        wrong("no scale in dk", "dk is not divided by sqrt(D)", "By what does s grow with k?",
              "ds.T @ q / np.sqrt(D)", "ds.T @ q"),
        wrong("scaled twice", "dq and dk are divided by sqrt(D) twice", "How often does the scale stand in s?",
              "ds @ k / np.sqrt(D)", "ds @ k / D", "ds.T @ q / np.sqrt(D)", "ds.T @ q / D"),
        wrong("softmax's sum missing", "ds is p dp alone: the sum of p dp is not subtracted",
              "What does a row of ds sum to?", "(dp - np.sum(p * dp, axis=-1, keepdims=True))", "dp"),
        wrong("sum over the queries", "the sum of p dp runs over the queries, and not over the keys",
              "Along which axis is the softmax?", "np.sum(p * dp, axis=-1, keepdims=True)",
              "np.sum(p * dp, axis=0, keepdims=True)"),
        wrong("p missing in ds", "the factor p before the bracket is missing",
              "What is the gradient of a hidden score?",
              "ds = p * (dp", "ds = (dp"),
        wrong("p not transposed in dv", "dv uses p, and should use its transpose", "Which queries read key 0?",
              "dv = p.T @ do", "dv = p @ do"),
        wrong("ds not transposed in dk", "dk uses ds, and should use its transpose", "Which queries read key 0?",
              "ds.T @ q", "ds @ q"),
        wrong("no mask", "the mask is missing in the recomputed p", "Is your p that of the forward pass?",
              "np.where(np.tri(S, dtype=bool), q @ k.T / np.sqrt(D), -np.inf)", "q @ k.T / np.sqrt(D)"),
        wrong("no scale in p", "the scale is missing in the recomputed p", "Is your p that of the forward pass?",
              "q @ k.T / np.sqrt(D)", "q @ k.T"),
        wrong("dq from q", "dq is made of q, and should be made of k", "What does s grow by with q?",
              "ds @ k /", "ds @ q /"),
        wrong("dk from k", "dk is made of k, and should be made of q", "What does s grow by with k?",
              "ds.T @ q /", "ds.T @ k /"),
        wrong("dv from ds", "dv uses ds, and should use p", "What does o grow by with v?", "dv = p.T", "dv = ds.T",
              "    dv = ds.T @ do\n", "", "    dq =", "    dv = ds.T @ do\n    dq ="),
        ways("dp from k", "dp is do k^T, and should be do v^T", "What does o grow by with p?", ("do @ v.T", "do @ k.T"),
             ("do @ v.T", "do @ k.T", "np.sum(p * dp,", "np.sum(p * (do @ v.T),")),
        wrong("sign of the sum", "the sum of p dp is added", "What does a row of ds sum to?", "(dp - np.sum",
              "(dp + np.sum"),
        wrong("mean for sum", "the mean of p dp is subtracted, and not its sum", "What does a row of ds sum to?",
              "np.sum(p * dp,", "np.mean(p * dp,"),
        wrong("dq and dk exchanged", "dq and dk are returned in the other order", "In which order are they asked for?",
              "return dq, dk, dv", "return dk, dq, dv"),
        wrong("delta without p", "the sum is of dp, and should be of p dp", "What does a row of ds sum to?",
              "np.sum(p * dp,", "np.sum(dp,"),
    ),
    hints=(
        "dv is the simplest: is it right? Then look at ds: its rows sum to 0.",
        "Go backwards through the three lines of the forward pass; each product gives two gradients.",
        "ds = p * (dp - sum(p * dp)); dq = ds @ k / sqrt(D); dk = ds.T @ q / sqrt(D).",
    ),
)

# ----------------------------------------------------------------------------------------------------- embedding


def _embedding() -> Iterator[Given]:
    d = Draws(29)
    for ids, V, E in (([1, 3, 1], 5, 2), ([0, 0, 0, 2], 3, 3), ([4, 2, 4, 1, 2], 6, 2)):
        yield Given("tokens that come twice", (d.normal(len(ids), E), np.array(ids), V), lengths={"V": V, "E": E})


EMBEDDING_BACKWARD = Exercise(
    name="embedding_backward",
    track="backward",
    title="The gradient of the embedding",
    statement="""
    The forward pass looked up rows: x[n] = table[ids[n]], table [V, E], ids [N] whole numbers, x [N, E]. dx [N, E] is
    the gradient of a loss with respect to x. Return dtable [V, E]; V is given.

    Example: ids = [1, 1], dx = [[1], [10]], V = 3: dtable = [[0], [11], [0]].

    What counts: a token that comes twice gets the sum of both; one that does not come gets 0.
    """,
    function="embedding_backward",
    solution='''def embedding_backward(dx, ids, V):
    dtable = np.zeros((V, dx.shape[1]))
    np.add.at(dtable, ids, dx)
    return dtable
''',
    calls=_embedding,
    outputs={"dtable": ("V", "E")},
    shown=lambda: [Given("a token that comes twice", (np.array([[1.0], [10.0]]), np.array([1, 1]), 3))],
    mistakes=(
        wrong("last one wins", "a token that comes twice has the gradient of its last place: "
              "dtable[ids] += dx adds once per row",
              "Which places does token ids[0] have, and which of them is in your result?",
              "np.add.at(dtable, ids, dx)", "dtable[ids] = dx"),
        wrong("first one wins", "a token that comes twice has the gradient of its first place",
              "Which of the places of a token is in your result?",
              "np.add.at(dtable, ids, dx)", "dtable[ids[::-1]] = dx[::-1]"),
        wrong("averaged", "a token that comes twice has the mean of its gradients, and should have their sum",
              "How often does a row of the table reach the loss?",
              "    return dtable", "    return dtable / np.maximum(1, np.bincount(ids, minlength=V))[:, None]"),
        wrong("divided by the tokens", "everything is divided by the number of tokens",
              "Is a factor 1/N in dx already?", "return dtable", "return dtable / len(ids)"),
        wrong("counted", "the number of times is counted, and dx not used", "Where is dx used?",
              "np.add.at(dtable, ids, dx)", "np.add.at(dtable, ids, np.ones_like(dx))"),
        wrong("row before", "the gradient goes into the row before the token's", "Which row belongs to id 0?",
              "dtable, ids, dx", "dtable, ids - 1, dx"),
        wrong("row behind", "the gradient goes into the row behind the token's", "Which row belongs to id 0?",
              "dtable, ids, dx", "dtable, (ids + 1) % V, dx"),
        wrong("all rows", "every row of the table gets the whole sum", "Which rows reach the loss?",
              "np.add.at(dtable, ids, dx)", "dtable += dx.sum(axis=0)"),
        wrong("subtracted", "the gradient is subtracted: that is a step", "Is a gradient or a step asked?",
              "dtable, ids, dx", "dtable, ids, -dx"),
        wrong("in order", "row n of dx goes into row n of the table, whatever the token",
              "Where are ids used?", "dtable, ids, dx", "dtable, np.arange(len(ids)) % V, dx"),
        wrong("twice", "each gradient is added twice", "How often does your loop add?", "dtable, ids, dx",
              "dtable, ids, 2 * dx"),
    ),
    hints=(
        "Find a token that comes twice, and look at its row.",
        "dtable[ids] += dx reads, adds and writes once per row: what comes twice is lost.",
        "np.add.at(dtable, ids, dx), or a loop over the tokens with dtable[ids[n]] += dx[n].",
    ),
)

# --------------------------------------------------------------------------------------------------------- adamw


def _adamw() -> Iterator[Given]:
    d = Draws(30)
    for step, decay in ((1, 0.1), (3, 0.1), (2, 0.5)):
        m, v = d.normal(5, size=0.3), np.abs(d.normal(5, size=0.3))
        state = (np.zeros(5), np.zeros(5)) if step == 1 else (m, v)
        yield Given(f"step {step}", (d.normal(5, size=2.0), d.normal(5), *state, step, 0.1, decay))
    tiny = d.normal(4) * 1e-4
    yield Given("tiny gradients", (d.normal(4), tiny, np.zeros(4), np.zeros(4), 1, 0.1, 0.2))
    zero = np.zeros(3)
    yield Given("a gradient of 0", (d.normal(3), zero, zero, zero, 1, 0.1, 0.1), corner=True)


ADAMW = Exercise(
    name="adamw",
    track="backward",
    title="A step of AdamW",
    statement="""
    w is an array of weights, g their gradient, m and v (of its shape) the running means of g and g^2, step counts from
    1, lr and decay are numbers. With b1 = 0.9, b2 = 0.95, eps = 1e-8:

        m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2
        mhat = m / (1 - b1^step)               vhat = v / (1 - b2^step)
        w = w - lr (mhat / (sqrt(vhat) + eps) + decay w)

    Return (w, m, v). Nothing that came in may change. Example: step 1, m = v = 0, decay = 0: mhat = g and vhat = g^2,
    so w moves by lr against the sign of g.

    What counts: the first step has the size lr whatever the size of g, and the decay does not go through m and v.
    """,
    function="adamw",
    solution='''def adamw(w, g, m, v, step, lr, decay):
    b1, b2, eps = 0.9, 0.95, 1e-8
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    mhat = m / (1 - b1**step)
    vhat = v / (1 - b2**step)
    w = w - lr * (mhat / (np.sqrt(vhat) + eps) + decay * w)
    return w, m, v
''',
    calls=_adamw,
    outputs={"w": ("N",), "m": ("N",), "v": ("N",)},
    mistakes=(
        wrong("no correction", "the running means are not corrected: the first steps are wrong in size",
              "How large is the first step, from m = v = 0?",
              "m / (1 - b1**step)", "m", "v / (1 - b2**step)", "v"),
        wrong("m alone corrected", "only m is corrected, and v is not", "Is v near 0 in the first steps as well?",
              "v / (1 - b2**step)", "v"),
        wrong("v alone corrected", "only v is corrected, and m is not", "Is m near 0 in the first steps as well?",
              "m / (1 - b1**step)", "m"),
        wrong("correction multiplied", "the means are multiplied by 1 - b^step, and should be divided by it",
              "Are the means of the first steps too small or too large?",
              "m / (1 - b1**step)", "m * (1 - b1**step)", "v / (1 - b2**step)", "v * (1 - b2**step)"),
        wrong("plain gradient descent", "the step is lr times the gradient: m and v are not used in it",
              "Where in your step are m and v?", "mhat / (np.sqrt(vhat) + eps)", "g"),
        wrong("sign of the gradient", "the step is lr times the sign of the gradient",
              "Where in your step are m and v?",
              "mhat / (np.sqrt(vhat) + eps)", "np.sign(g)"),
        wrong("decay after the step", "the decay acts on the weights after the step, and should on those before it",
              "Which w does the decay multiply?", " + decay * w)", ")",
              "    return w, m, v", "    w = w - lr * decay * w\n    return w, m, v"),
        wrong("step counted from 0", "the correction uses step - 1: the first one divides by 0",
              "What is 1 - b1^0?", "b1**step", "b1 ** (step - 1)", "b2**step", "b2 ** (step - 1)"),
        wrong("corrected one step late", "the correction uses step + 1", "What is mhat in step 1, from m = 0?",
              "b1**step", "b1 ** (step + 1)", "b2**step", "b2 ** (step + 1)"),
        wrong("first step for ever", "the correction is always that of step 1", "Where is step used?",
              "b1**step", "b1", "b2**step", "b2"),
        wrong("decay through the gradient",
              "the decay is added to the gradient, and goes through m and v: that is Adam "
              "with L2, and not AdamW", "What does decay do where g is large?",
              "    m = b1", "    g = g + decay * w\n    m = b1", " + decay * w)", ")"),
        wrong("no decay", "the weights do not decay", "Where is decay used?", " + decay * w)", ")"),
        wrong("decay without lr", "the decay is not multiplied by lr",
              "How much does w shrink in a step without gradient?",
              "lr * (mhat / (np.sqrt(vhat) + eps) + decay * w)", "lr * mhat / (np.sqrt(vhat) + eps) - decay * w"),
        wrong("decay's sign", "the weights grow where they should decay", "Does |w| shrink where g is 0?",
              "+ decay * w", "- decay * w"),
        wrong("no root", "the step is divided by vhat, and not by its root",
              "How large is the first step, for a small g?",
              "np.sqrt(vhat)", "vhat"),
        wrong("eps under the root", "eps is added under the root, and should be added to it",
              "How large is the first step, for a gradient of 1e-4?", "(np.sqrt(vhat) + eps)", "np.sqrt(vhat + eps)"),
        wrong("no eps", "eps is missing: a gradient of 0 is 0 / 0", "What is the step where every gradient was 0?",
              "(np.sqrt(vhat) + eps)", "np.sqrt(vhat)"),
        wrong("g for m", "the step uses g, and not its running mean", "Where is m used?",
              "(mhat /", "(g /"),
        wrong("v of g", "v is the running mean of g, and not of its square", "Can your v be negative?",
              "(1 - b2) * g * g", "(1 - b2) * np.abs(g)"),
        wrong("b1 and b2 exchanged", "b1 and b2 are exchanged", "Which of the two means is the slower one?",
              "b1, b2, eps = 0.9, 0.95", "b1, b2, eps = 0.95, 0.9"),
        wrong("shares exchanged", "b1 weighs the new gradient, and 1 - b1 the old mean",
              "How much does one gradient change m?", "b1 * m + (1 - b1) * g", "(1 - b1) * m + b1 * g",
              "b2 * v + (1 - b2) * g * g", "(1 - b2) * v + b2 * g * g"),
        wrong("means forgotten", "m and v are returned as they came", "What does the next step begin with?",
              "    m = b1 * m", "    old = m, v\n    m = b1 * m", "return w, m, v", "return w, *old"),
        wrong("corrected means kept", "the corrected means are returned, and are corrected again in the next step",
              "Which m does the next step begin with?", "return w, m, v", "return w, mhat, vhat"),
        wrong("uphill", "the step goes along the gradient, and not against it", "Does the loss grow along a gradient?",
              "w = w - lr * (mhat", "w = w - lr * (-mhat"),
        wrong("own rates", "b2 is 0.999, and 0.95 is asked", "Which b2 does the statement have?", "0.95,", "0.999,"),
        wrong("sum for mean", "m adds up gradients without 1 - b1: that is momentum",
              "What is m after many equal gradients?", "b1 * m + (1 - b1) * g", "b1 * m + g"),
    ),
    hints=(
        "Step 1 from m = v = 0: without decay every weight moves by lr. Does yours?",
        "Check m and v first, then the correction, then the decay.",
        "w - lr * (mhat / (np.sqrt(vhat) + eps) + decay * w): the decay stands beside the step, inside lr.",
    ),
)

# --------------------------------------------------------------------------------------------------------- train


def _train() -> Iterator[Given]:
    d = Draws(31)
    for V, E, N, steps in ((4, 2, 5, 3), (5, 3, 6, 4), (3, 2, 4, 2)):
        ids, labels = d.integers(V, N), d.integers(V, N)
        yield Given(f"{N} tokens, {steps} steps", (d.normal(V, E), d.normal(V, E), ids, labels, 0.5, steps),
                    lengths={"V": V, "E": E, "N": N})


TRAIN = Exercise(
    name="train",
    track="backward",
    title="A training loop",
    statement="""
    The smallest language model: logits = table[ids] @ head^T, with table [V, E] and head [V, E]. ids [N] are tokens,
    labels [N] those that follow them. In each of the steps: the loss (the mean over the N rows of logsumexp(row) -
    row[label]), the gradients of table and head, and then a step of plain gradient descent on both:
    weight = weight - lr * gradient.

    Return (losses [steps], table, head): the loss before each step, and the weights after the last. The arrays that
    came in must not change. softmax is there. Example: head = 0 gives equal logits, so the first loss is ln V.

    What counts: both gradients are taken at the weights of before the step; tokens that come twice get the sum; the
    mean is over the rows.
    """,
    function="train",
    solution=_SOFTMAX + '''def train(table, head, ids, labels, lr, steps):
    table, head = table.copy(), head.copy()
    N, losses = len(ids), []
    for _ in range(steps):
        x = table[ids]
        p = softmax(x @ head.T)
        losses.append(-np.log(p[np.arange(N), labels]).mean())
        d = p.copy()
        d[np.arange(N), labels] -= 1
        d = d / N
        dx, dhead = d @ head, d.T @ x
        dtable = np.zeros_like(table)
        np.add.at(dtable, ids, dx)
        table = table - lr * dtable
        head = head - lr * dhead
    return np.array(losses), table, head
''',
    calls=_train,
    outputs={"losses": ("S",), "table": ("V", "E"), "head": ("V", "E")},
    mistakes=(
        wrong("uphill", "the step goes along the gradient: the loss grows", "Do your losses fall?",
              "table - lr * dtable", "table + lr * dtable", "head - lr * dhead", "head + lr * dhead"),
        wrong("gradients added up", "gradients are not set to 0 in a step: they add up over the steps",
              "What is in dtable at the beginning of step 2?",
              "dtable = np.zeros_like(table)", "dtable = np.zeros_like(table) if _ == 0 else dtable",
              "dx, dhead = d @ head, d.T @ x", "dx, dhead = d @ head, d.T @ x + (0 if _ == 0 else dhead)"),
        wrong("dx at the new head", "dx is taken with the head of after its step",
              "At which weights are gradients taken?",
              "dx, dhead = d @ head, d.T @ x",
              "dhead = d.T @ x\n        head = head - lr * dhead\n        dx = d @ head",
              "        head = head - lr * dhead\n    return", "    return"),
        wrong("not averaged", "the gradient lacks the 1/N of the mean", "Is your gradient that of the mean?",
              "d = d / N", "d = d / 1"),
        wrong("divided by V", "the gradient is divided by the number of classes", "Over what is the mean?",
              "d = d / N", "d = d / len(table)"),
        wrong("last one wins", "a token that comes twice has the gradient of its last place only",
              "What does dtable[ids] += dx do with a token that comes twice?",
              "np.add.at(dtable, ids, dx)", "dtable[ids] = dx"),
        wrong("softmax over the tokens", "the softmax runs over the tokens, and not over the classes",
              "Along which axis do your probabilities sum to 1?", "axis=-1", "axis=0"),
        wrong("dhead at the new table", "dhead is taken with the table of after its step",
              "At which weights are gradients taken?", "        head = head - lr * dhead",
              "        head = head - lr * d.T @ table[ids]"),
        wrong("head not trained", "the head stays as it is", "Which weights have a step?",
              "head = head - lr * dhead", "head = head"),
        wrong("table not trained", "the table stays as it is", "Which weights have a step?",
              "table = table - lr * dtable", "table = table"),
        wrong("loss after the step", "the losses are those of after each step",
              "Is losses[0] that of the given weights?",
              "        losses.append(-np.log(p[np.arange(N), labels]).mean())\n", "",
              "        head = head - lr * dhead\n", "        head = head - lr * dhead\n"
              "        losses.append(-np.log(softmax(table[ids] @ head.T)[np.arange(N), labels]).mean())\n"),
        wrong("loss summed", "the losses are sums, and not means", "What is the loss of equal logits, of V classes?",
              "labels]).mean()", "labels]).sum()"),
        wrong("loss's sign", "the losses have the wrong sign", "Can a loss be negative?",
              "append(-np.log", "append(np.log"),
        wrong("one not subtracted", "1 is not subtracted at the label", "What does a row of d sum to?",
              "labels] -= 1", "labels] -= 0"),
        wrong("one step", "only one step is made", "How often does your loop run?",
              "        head = head - lr * dhead\n",
              "        head = head - lr * dhead * (_ == 0)\n", "table - lr * dtable", "table - lr * dtable * (_ == 0)"),
        wrong("ids and labels exchanged", "ids and labels are exchanged: the model predicts backwards",
              "Which tokens are looked up, and which predicted?", "ids, labels, lr, steps):",
              "labels, ids, lr, steps):"),
        wrong("tied", "head and table are stepped with each other's gradient as well, as if they were one",
              "Are table and head one matrix?", "table - lr * dtable", "table - lr * (dtable + dhead)",
              "head - lr * dhead", "head - lr * (dtable + dhead)"),
        wrong("fixed gradient", "the gradient is always that of the first step",
              "At which weights is the gradient of step 2 taken?",
              "        table = table - lr * dtable",
              "        dtable, dhead = (dtable, dhead) if _ == 0 else first\n        first = dtable, dhead\n"
              "        table = table - lr * dtable"),
    ),
    hints=(
        "Is losses[0] right? Then the forward pass is. Is losses[1]? Then the step is.",
        "In each step: look up, logits, loss, d of the logits, gradients of head and x, of the table, both steps.",
        "np.add.at(dtable, ids, d @ head) sums what comes twice; take d @ head before the head changes.",
    ),
)

EXERCISES = (
    LINEAR_BACKWARD, SWIGLU_BACKWARD, SOFTMAX_BACKWARD, ROPE_BACKWARD, RMS_NORM_BACKWARD, LAYER_NORM_BACKWARD,
    CROSS_ENTROPY_BACKWARD, ATTENTION_BACKWARD, EMBEDDING_BACKWARD, ADAMW, TRAIN,
)
