"""The way from Torch to Triton, row by row: programs, masks, reductions, norms, rotations."""

from collections.abc import Iterator

import numpy as np

from refllm.learn.exercise import Exercise, Given, wrong
from refllm.learn.exercises.draws import Draws, filled
from refllm.learn.exercises.memory import PROGRAMS

# fmt: off

# ----------------------------------------------------------------------------------------------------------- add


def _add() -> Iterator[Given]:
    d = Draws(41)
    for n, block in ((8, 8), (10, 4), (11, 4), (5, 8), (16, 4)):
        yield Given(f"{n} numbers, BLOCK {block}", (d.normal(n), d.normal(n, mean=5.0), block), lengths={"n": n})


ADD = Exercise(
    name="add",
    track="triton",
    title="A first kernel: add two vectors",
    statement="""
    x and y are vectors of n float32 numbers; BLOCK is a power of two. out[i] = x[i] + y[i].

    A kernel runs as many programs, each of which works on one tile of BLOCK elements. Program pid (tl.program_id(0))
    has the elements pid * BLOCK .. pid * BLOCK + BLOCK - 1. There are n / BLOCK programs, rounded up, so the last tile
    may reach beyond n: a mask keeps loads and stores inside. Example: n = 10, BLOCK = 4: three programs; the last has
    the elements 8 and 9, and two lanes that are masked off.

    Write the kernel; the function that launches it is there. You need tl.arange(0, BLOCK), tl.load(pointer + offsets,
    mask=mask) and tl.store(pointer + offsets, values, mask=mask).

    What counts: every element is written once, by one program, and nothing outside is touched.
    """,
    function="add",
    solution='''@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    # your part
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask)
    tl.store(out_ptr + i, x + y, mask=mask)
    # end of your part


def add(x, y, BLOCK):
    out = torch.empty_like(x)
    n = x.numel()
    add_kernel[(triton.cdiv(n, BLOCK),)](x, y, out, n, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def add(x, y, BLOCK):
    n = len(x)
    out = np.full(n, np.nan)
    for pid in range(cdiv(n, BLOCK)):
        i = pid * BLOCK + np.arange(BLOCK)
        mask = i < n
        store(out, i, load(x, i, mask) + load(y, i, mask), mask)
    return out
''',
    calls=_add,
    outputs={"out": ("n",)},
    mistakes=(
        wrong("grid floors", "n // BLOCK programs start: the last n % BLOCK elements belong to no program",
              "How many programs start, and which elements does the last one have?", "cdiv(n, BLOCK)", "n // BLOCK"),
        wrong("id not times BLOCK", "program 1 begins at element 1, and should begin at element BLOCK",
              "Which elements does program 1 work on?", "pid * BLOCK +", "pid +"),
        wrong("mask one short", "the last element is masked off: the mask says i < n - 1",
              "Is the last element inside your mask?", "mask = i < n", "mask = i < n - 1"),
        wrong("y not shifted", "y is read from its first tile in every program",
              "Which elements of y does program 1 read?", "load(y, i, mask)",
              "load(y, np.arange(BLOCK), np.arange(BLOCK) < n)"),
        wrong("x not shifted", "x is read from its first tile in every program",
              "Which elements of x does program 1 read?", "load(x, i, mask)",
              "load(x, np.arange(BLOCK), np.arange(BLOCK) < n)"),
        wrong("x twice", "x is read twice, and y never", "From which pointer does your second load read?",
              "load(y, i", "load(x, i"),
        wrong("y twice", "y is read twice, and x never", "From which pointer does your first load read?",
              "load(x, i", "load(y, i"),
        wrong("x alone", "y is not added", "What is stored?", " + load(y, i, mask)", ""),
        wrong("y alone", "x is not added", "What is stored?", "load(x, i, mask) + ", ""),
        wrong("multiplied", "x and y are multiplied", "What is stored?", ") + load(y", ") * load(y"),
        wrong("subtracted", "y is subtracted", "What is stored?", ") + load(y", ") - load(y"),
        wrong("one program", "only program 0 works", "How many programs start?", "range(cdiv(n, BLOCK))", "range(1)"),
        wrong("first program idle", "program 0 does nothing: ids count from 0",
              "Which elements does program 0 work on?",
              "for pid in range(cdiv(n, BLOCK))", "for pid in range(1, cdiv(n, BLOCK))"),
        wrong("every second lane", "lanes are two elements apart", "What does tl.arange(0, BLOCK) give?",
              "BLOCK + np.arange(BLOCK)", "BLOCK + 2 * np.arange(BLOCK)"),
    ),
    hints=(
        "Write down, for n = 10 and BLOCK = 4, which elements each program has.",
        "Offsets: the program's id times BLOCK plus tl.arange(0, BLOCK); the mask compares them with n.",
        "i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK); mask = i < n; the same mask in loads and store.",
    ),
)

# ------------------------------------------------------------------------------------------------------- row_sum


def _row_sum() -> Iterator[Given]:
    d = Draws(42)
    for R, E, block in ((2, 4, 4), (3, 6, 4), (4, 11, 4), (3, 3, 4), (2, 8, 2)):
        x = d.normal(R, E, mean=1.0)
        yield Given(f"{R} rows of {E}, BLOCK {block}", (x, block), lengths={"E": E, "R": R, "BLOCK": block})


ROW_SUM = Exercise(
    name="row_sum",
    track="triton",
    title="Sums of rows, tile by tile",
    statement="""
    x is [R, E], contiguous: element (row, column) lies at row * E + column. out[row] is the sum of its row. BLOCK is a
    power of two, and may be smaller than E.

    One program per row. It walks along the row in tiles of BLOCK columns and keeps a running sum of BLOCK lanes; at the
    end tl.sum(acc, 0) adds the lanes. Lanes beyond E must not count: tl.load(..., mask=mask, other=0.0) gives them 0.
    Example: E = 6, BLOCK = 4: two tiles, columns 0 to 3, and 4 and 5.

    What counts: every column is added once, and nothing of the next row.
    """,
    function="row_sum",
    solution='''@triton.jit
def row_sum_kernel(x_ptr, out_ptr, E, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, E, BLOCK):
        i = start + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + row * E + i, mask=i < E, other=0.0)
    tl.store(out_ptr + row, tl.sum(acc, 0))
    # end of your part


def row_sum(x, BLOCK):
    R, E = x.shape
    out = torch.empty(R, dtype=x.dtype)
    row_sum_kernel[(R,)](x, out, E, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def row_sum(x, BLOCK):
    R, E = x.shape
    out = np.full(R, np.nan)
    for row in range(R):
        acc = np.zeros(BLOCK)
        for start in range(0, E, BLOCK):
            i = start + np.arange(BLOCK)
            acc += load(x, row * E + i, i < E, 0.0)
        store(out, row, np.sum(acc))
    return out
''',
    calls=_row_sum,
    outputs={"out": ("R",)},
    mistakes=(
        wrong("accumulator overwritten", "acc is set and not added to: only the last tile is summed",
              "What is in acc after the second tile?", "acc += load", "acc = load"),
        wrong("only the first tile", "there is no walk along the row: columns from BLOCK on are not summed",
              "Which columns does your loop visit?", "range(0, E, BLOCK)", "range(0, 1, BLOCK)"),
        wrong("tail dropped", "E // BLOCK tiles are visited: the last E % BLOCK columns are not summed",
              "Which columns does your loop visit?", "range(0, E, BLOCK)", "range(0, E - E % BLOCK, BLOCK)"),
        wrong("other is one", "lanes that are masked off count as 1", "What do masked lanes add to a sum?",
              "i < E, 0.0", "i < E, 1.0"),
        wrong("other is minus infinity", "lanes that are masked off are minus infinity: that is for a maximum",
              "What do masked lanes add to a sum?", "i < E, 0.0", "i < E, -np.inf"),
        wrong("no other", "lanes that are masked off have no value: a load without other gives them none",
              "What do masked lanes hold if other is not given?", "i < E, 0.0", "i < E, np.nan"),
        wrong("start not added", "every turn of the loop reads the first tile again",
              "Which columns does the second turn read?", "i = start + np.arange(BLOCK)", "i = np.arange(BLOCK)"),
        wrong("row stride missing", "the row's number is added without its stride: row 1 begins at element 1",
              "Where in memory does row 1 begin?", "row * E + i", "row + i"),
        wrong("mean for sum", "the sum is divided by E: this is the mean", "Is a sum or a mean asked?",
              "np.sum(acc)", "np.sum(acc) / E"),
        wrong("maximum for sum", "the largest lane is stored, and not their sum", "How are the lanes put together?",
              "np.sum(acc)", "np.max(acc)"),
        wrong("first lane alone", "the lanes are not added together at the end", "How are the lanes put together?",
              "np.sum(acc)", "acc[0]"),
        wrong("row 0 for all", "every program reads row 0: the program's id is not in the address",
              "Where in memory does row 1 begin?", "row * E + i", "i"),
        wrong("one tile too few", "the loop ends one tile early", "Which columns does your loop visit?",
              "range(0, E, BLOCK)", "range(0, E - BLOCK, BLOCK)"),
        wrong("squares", "the squares are summed", "What is added to acc?",
              "load(x, row * E + i, i < E, 0.0)", "load(x, row * E + i, i < E, 0.0) ** 2"),
        wrong("last column short", "the last column is masked off", "Is the last column inside your mask?",
              "i < E, 0.0", "i < E - 1, 0.0"),
    ),
    hints=(
        "Which columns does each turn of your loop add, for E = 6 and BLOCK = 4?",
        "Set acc to 0 once, add every tile to it with its own mask, and add the lanes at the end.",
        "i = start + tl.arange(0, BLOCK); acc += tl.load(x_ptr + row * E + i, mask=i < E, other=0.0).",
    ),
)

# ------------------------------------------------------------------------------------------------ softmax_kernel


def _softmax() -> Iterator[Given]:
    d = Draws(43)
    for R, E, block in ((2, 4, 4), (3, 5, 8), (3, 3, 4), (2, 6, 16)):
        yield Given(f"{R} rows of {E}, BLOCK {block}",
        (d.normal(R, E, mean=-1.0), block), lengths={"E": E, "BLOCK": block})
    yield Given("a number of 2000", (filled(d.normal(2, 5), (0, 1), 2000.0), 8), corner=True)
    yield Given("a row at -2000", (d.normal(3, 5) + np.array([[1.0], [-2000.0], [0.0]]), 8), corner=True)


SOFTMAX_KERNEL = Exercise(
    name="softmax_kernel",
    track="triton",
    title="Softmax of rows",
    statement="""
    x is [R, E], contiguous; BLOCK is a power of two, at least E, so that a row is one tile. out is [R, E]:

        out[row, i] = exp(x[row, i] - max of the row) / sum over j of exp(x[row, j] - max of the row)

    One program per row. Lanes from E on take part in tl.max(v, 0) and in tl.sum(e, 0) unless they hold a number that
    changes neither: choose other so that exp of it is 0. Example: E = 3, BLOCK = 4: lane 3 must not count.

    What counts: every row sums to 1, with a 2000 in it as well, and for a row that lies at -2000.
    """,
    function="softmax",
    solution='''@triton.jit
def softmax_kernel(x_ptr, out_ptr, E, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + row * E + i, mask=i < E, other=-float("inf"))
    v = v - tl.max(v, 0)
    e = tl.exp(v)
    tl.store(out_ptr + row * E + i, e / tl.sum(e, 0), mask=i < E)
    # end of your part


def softmax(x, BLOCK):
    R, E = x.shape
    out = torch.empty_like(x)
    softmax_kernel[(R,)](x, out, E, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def softmax(x, BLOCK):
    R, E = x.shape
    out = np.full((R, E), np.nan)
    for row in range(R):
        i = np.arange(BLOCK)
        v = load(x, row * E + i, i < E, -np.inf)
        v = v - v.max()
        e = np.exp(v)
        store(out, row * E + i, e / e.sum(), i < E)
    return out
''',
    calls=_softmax,
    outputs={"out": ("R", "E")},
    mistakes=(
        wrong("other is 0", "lanes that are masked off hold 0, and exp(0 - max) counts in the sum",
              "What does a lane beyond E add to your sum?", "i < E, -np.inf)", "i < E, 0.0)"),
        wrong("no other", "lanes that are masked off have no value: a load without other gives them none",
              "What do masked lanes hold if other is not given?", "i < E, -np.inf)", "i < E, np.nan)"),
        wrong("maximum not subtracted", "the maximum is not subtracted: exp overflows",
              "What is exp(2000)?", "v = v - v.max()", "v = v"),
        wrong("numerator not shifted", "the numerator is exp(x), and the sum is of exp(x - max)",
              "Is the same exponential above and below the line?",
              "e / e.sum()", "np.exp(load(x, row * E + i, i < E, -np.inf)) / e.sum()"),
        wrong("base 2", "it is 2 to the power of x: tl.exp2 needs a factor log2(e)", "Which base has your exponential?",
              "np.exp(v)", "np.exp2(v)"),
        wrong("not divided", "the exponentials are not divided by their sum", "What does a row of your result sum to?",
              "e / e.sum()", "e"),
        wrong("one in the sum", "1 is added to the sum: one masked lane too many, or a softmax with a sink",
              "What does a row of your result sum to?", "e / e.sum()", "e / (e.sum() + 1)"),
        wrong("mean for sum", "the exponentials are divided by their mean over BLOCK lanes",
              "What does a row of your result sum to?", "e.sum()", "e.mean()"),
        wrong("mean of E", "the exponentials are divided by their mean over E",
              "What does a row of your result sum to?",
              "e.sum()", "(e.sum() / E)"),
        wrong("row 0 for all", "every program reads row 0", "Which row does program 1 read?",
              "load(x, row * E + i", "load(x, i"),
        wrong("minimum subtracted", "the minimum is subtracted, and large numbers still overflow",
              "How large can your exponent get?", "v.max()", "v[:E].min()"),
        wrong("last column short", "the last column is masked off at the load", "Is the last column inside your mask?",
              "load(x, row * E + i, i < E,", "load(x, row * E + i, i < E - 1,"),
        wrong("last column not stored", "the last column is not stored", "Is the last column inside your mask?",
              "e.sum(), i < E)", "e.sum(), i < E - 1)"),
        wrong("logarithm", "the logarithm of the softmax is stored", "Can a weight be negative?",
              "e / e.sum()", "v - np.log(e.sum())"),
        wrong("sign lost", "the exponent has the wrong sign", "Which entry gets the largest weight?",
              "np.exp(v)", "np.where(i < E, np.exp(-v), 0.0)"),
        wrong("row stride missing", "the row's number is added without its stride at the load",
              "Where in memory does row 1 begin?", "load(x, row * E + i", "load(x, row + i"),
        wrong("large negative other", "masked lanes hold NUMBER and not minus infinity: a row below it loses",
              "Is there a number below every row?", "i < E, -np.inf)", "i < E, NUMBER)",
              numbers=("-1e3", "-100.0", "-10.0", "-1.0")),
    ),
    hints=(
        "Add up a row of your result. If it is less than 1, which lanes have the rest?",
        "Load with other = minus infinity, subtract tl.max, exponentiate, divide by tl.sum, store with the mask.",
        'v = tl.load(x_ptr + row * E + i, mask=i < E, other=-float("inf")); v = v - tl.max(v, 0).',
    ),
)

# ----------------------------------------------------------------------------------------------- rms_norm_kernel


def _norms(seed: int, bias: bool) -> Iterator[Given]:
    d = Draws(seed)
    for R, E, block, eps, mean in ((2, 4, 4, 0.25, 0.0), (3, 5, 8, 0.1, 1.5), (4, 3, 16, 1e-5, 0.4), (3, 7, 8, 0.25,
    -1.0)):
        x = d.normal(R, E, size=0.8, mean=mean)
        rest = (d.weight(E), *([d.normal(E)] if bias else []), eps, block)
        yield Given(f"{R} rows of {E}, BLOCK {block}", (x, *rest), lengths={"E": E, "R": R, "BLOCK": block})
    zero = filled(d.normal(3, 5), 1, 0.0)
    yield Given("a row of zeros", (zero, d.weight(5), *([d.normal(5)] if bias else []), 1e-5, 8), corner=True)


RMS_NORM_KERNEL = Exercise(
    name="rms_norm_kernel",
    track="triton",
    title="RMSNorm of rows",
    statement="""
    x is [R, E], contiguous; weight is [E]; BLOCK is a power of two, at least E. out is [R, E]:

        out[row, i] = weight[i] * x[row, i] / sqrt(mean of x[row]^2 + eps)       mean over the E columns

    One program per row, a row is one tile. Example: E = 2, BLOCK = 4, row (3, 4): the mean square is 25 / 2; the two
    lanes beyond E do not count, neither in the sum nor in the number by which it is divided.

    What counts: with weight 1 and a small eps every row has mean square 1; a row of zeros gives zeros.
    """,
    function="rms_norm",
    solution='''@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, E, eps, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < E
    x = tl.load(x_ptr + row * E + i, mask=mask, other=0.0)
    w = tl.load(weight_ptr + i, mask=mask, other=0.0)
    square = tl.sum(x * x, 0) / E
    y = w * x / tl.sqrt(square + eps)
    tl.store(out_ptr + row * E + i, y, mask=mask)
    # end of your part


def rms_norm(x, weight, eps, BLOCK):
    R, E = x.shape
    out = torch.empty_like(x)
    rms_norm_kernel[(R,)](x, weight, out, E, eps, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def rms_norm(x, weight, eps, BLOCK):
    R, E = x.shape
    out = np.full((R, E), np.nan)
    for row in range(R):
        i = np.arange(BLOCK)
        mask = i < E
        v = load(x, row * E + i, mask, 0.0)
        w = load(weight, i, mask, 0.0)
        square = np.sum(v * v) / E
        y = w * v / np.sqrt(square + eps)
        store(out, row * E + i, y, mask)
    return out
''',
    calls=lambda: _norms(44, False),
    operator="rms_norm",
    adapt="lambda operator, x, w, eps, BLOCK: operator(x, w, eps)",
    outputs={"out": ("R", "E")},
    mistakes=(
        wrong("mean over BLOCK", "the sum is divided by BLOCK, and not by E: all values too large by sqrt(BLOCK / E)",
              "By how many does your mean divide, and how many columns are there?", "/ E", "/ BLOCK"),
        wrong("eps outside the root", "eps is added to the root, and not under it", "What becomes of a row of zeros?",
              "np.sqrt(square + eps)", "(np.sqrt(square) + eps)"),
        wrong("eps after the inverse root", "eps is added to 1 / root", "What becomes of a row of zeros?",
              "v / np.sqrt(square + eps)", "v * (1 / np.sqrt(square) + eps)"),
        wrong("no eps", "eps is missing", "What becomes of a row of zeros?", "square + eps", "square"),
        wrong("mean subtracted", "the mean of the row is subtracted: that is LayerNorm",
              "Is a mean of x in the formula?",
              "        square =", "        v = np.where(mask, v - np.sum(v) / E, 0.0)\n        square ="),
        wrong("no weight", "the weight is not applied", "Where is the weight used?", "w * v", "v"),
        wrong("weight plus one", "the weight is used as 1 + weight", "With weight 1, what is the mean square of a row?",
              "y = w * v", "y = (1 + w) * v"),
        wrong("weight of the row", "the weight of the row's number is used, and not of the column's",
              "Which element of weight belongs to column 1?", "load(weight, i, mask, 0.0)",
              "load(weight, np.minimum(row, E - 1))"),
        wrong("sum for mean", "the squares are summed and not averaged",
              "With weight 1, what is the mean square of a row?",
              "np.sum(v * v) / E", "np.sum(v * v)"),
        wrong("root forgotten", "x is divided by the mean square, and not by its root",
              "What if a row is twice as long?",
              "np.sqrt(square + eps)", "(square + eps)"),
        wrong("multiplied by the root", "x is multiplied by the root", "What if a row is twice as long?",
              "v / np.sqrt", "v * np.sqrt"),
        wrong("x for its square", "the mean of x is taken, and not that of its square", "Where is your square?",
              "np.sum(v * v) / E", "np.abs(np.sum(v)) / E"),
        wrong("other is one", "lanes that are masked off are 1 and count in the mean", "What does a lane beyond E add?",
              "load(x, row * E + i, mask, 0.0)", "load(x, row * E + i, mask, 1.0)"),
        wrong("no other", "lanes that are masked off have no value: a load without other gives them none",
              "What does a lane beyond E add?", "load(x, row * E + i, mask, 0.0)",
              "load(x, row * E + i, mask, np.nan)"),
        wrong("row 0 for all", "every program reads row 0", "Which row does program 1 read?",
              "load(x, row * E + i", "load(x, i"),
        wrong("row stride missing", "the row's number is added without its stride at the load",
              "Where does row 1 begin?", "load(x, row * E + i", "load(x, row + i"),
        wrong("n - 1", "the sum is divided by E - 1", "By how many does your mean divide?", "/ E", "/ (E - 1)"),
        wrong("last column short", "the last column is masked off", "Is the last column inside your mask?",
              "mask = i < E", "mask = i < E - 1"),
    ),
    hints=(
        "Compute one row by hand: the sum of squares, the number by which it is divided, the root.",
        "Load with other=0.0, so that lanes beyond E add nothing; divide by E; add eps before the root.",
        "square = tl.sum(x * x, 0) / E; y = w * x / tl.sqrt(square + eps).",
    ),
)

# --------------------------------------------------------------------------------------------- layer_norm_kernel

LAYER_NORM_KERNEL = Exercise(
    name="layer_norm_kernel",
    track="triton",
    title="LayerNorm of rows",
    statement="""
    x is [R, E], contiguous; weight and bias are [E]; BLOCK is a power of two, at least E. out is [R, E]:

        out[row, i] = weight[i] * (x[row, i] - m) / sqrt(v + eps) + bias[i]

    with m the mean of the row, and v the mean of (x[row] - m)^2, over E columns. One program per row, a row is one
    tile.

    What counts: lanes beyond E are 0 when they are loaded, but 0 - m is not 0: they must be masked again before the
    squares are summed. Example: E = 2, BLOCK = 4, row (1, 3): m = 2 and v = 1, not 1 + 2 * 4 / 2.
    """,
    function="layer_norm",
    solution='''@triton.jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, E, eps, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < E
    x = tl.load(x_ptr + row * E + i, mask=mask, other=0.0)
    w = tl.load(weight_ptr + i, mask=mask, other=0.0)
    b = tl.load(bias_ptr + i, mask=mask, other=0.0)
    mean = tl.sum(x, 0) / E
    d = tl.where(mask, x - mean, 0.0)
    var = tl.sum(d * d, 0) / E
    tl.store(out_ptr + row * E + i, w * d / tl.sqrt(var + eps) + b, mask=mask)
    # end of your part


def layer_norm(x, weight, bias, eps, BLOCK):
    R, E = x.shape
    out = torch.empty_like(x)
    layer_norm_kernel[(R,)](x, weight, bias, out, E, eps, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def layer_norm(x, weight, bias, eps, BLOCK):
    R, E = x.shape
    out = np.full((R, E), np.nan)
    for row in range(R):
        i = np.arange(BLOCK)
        mask = i < E
        v = load(x, row * E + i, mask, 0.0)
        w, b = load(weight, i, mask, 0.0), load(bias, i, mask, 0.0)
        mean = np.sum(v) / E
        d = np.where(mask, v - mean, 0.0)
        var = np.sum(d * d) / E
        store(out, row * E + i, w * d / np.sqrt(var + eps) + b, mask)
    return out
''',
    calls=lambda: _norms(45, True),
    operator="layer_norm",
    adapt="lambda operator, x, w, b, eps, BLOCK: operator(x, w, b, eps)",
    outputs={"out": ("R", "E")},
    mistakes=(
        wrong("padding in the variance", "lanes beyond E count in the variance: 0 - mean is not 0",
              "What does a lane beyond E add to the sum of squares?", "np.where(mask, v - mean, 0.0)", "v - mean"),
        wrong("variance over BLOCK", "the variance is divided by BLOCK, and not by E", "By how many do you divide?",
              "np.sum(d * d) / E", "np.sum(d * d) / BLOCK"),
        wrong("mean over BLOCK", "the mean is divided by BLOCK, and not by E", "By how many do you divide?",
              "np.sum(v) / E", "np.sum(v) / BLOCK"),
        wrong("both over BLOCK", "mean and variance are divided by BLOCK", "By how many do you divide?",
              "np.sum(v) / E", "np.sum(v) / BLOCK", "np.sum(d * d) / E", "np.sum(d * d) / BLOCK"),
        wrong("n - 1", "the variance is divided by E - 1", "By how many do you divide?",
              "np.sum(d * d) / E", "np.sum(d * d) / (E - 1)"),
        wrong("eps outside the root", "eps is added to the root", "What becomes of a row of equal numbers?",
              "np.sqrt(var + eps)", "(np.sqrt(var) + eps)"),
        wrong("no eps", "eps is missing", "What becomes of a row of equal numbers?", "var + eps", "var"),
        wrong("not centred", "x is divided, and not x - mean", "What is the mean of a row of your result?",
              "w * d /", "w * v /"),
        wrong("mean of squares for the variance", "the mean of x^2 is used as the variance", "Is the mean 0?",
              "np.sum(d * d)", "np.sum(v * v)"),
        wrong("no mean", "no mean is subtracted: this is RMSNorm with a bias",
              "What is the mean of a row of your result?",
              "v - mean", "v"),
        wrong("weight and bias exchanged", "weight and bias are exchanged", "Which of the two multiplies?",
              "w, b = ", "b, w = "),
        wrong("bias before the weight", "the bias is added before the weight multiplies", "In which order do they act?",
              "w * d / np.sqrt(var + eps) + b", "w * (d / np.sqrt(var + eps) + b)"),
        wrong("no bias", "the bias is not added", "Where is the bias used?", " + b, mask)", ", mask)"),
        wrong("no weight", "the weight is not applied", "Where is the weight used?", "w * d /", "d /"),
        wrong("root forgotten", "the row is divided by its variance", "What if a row is twice as long?",
              "np.sqrt(var + eps)", "(var + eps)"),
        wrong("row 0 for all", "every program reads row 0", "Which row does program 1 read?",
              "load(x, row * E + i", "load(x, i"),
        wrong("sum for variance", "the squares are summed and not averaged", "By how many do you divide?",
              "np.sum(d * d) / E", "np.sum(d * d)"),
        wrong("no other", "lanes that are masked off have no value: a load without other gives them none",
              "What does a lane beyond E add to the mean?", "load(x, row * E + i, mask, 0.0)",
              "load(x, row * E + i, mask, np.nan)"),
    ),
    hints=(
        "Compute m and v of one row by hand, and compare your result times sqrt(v) with x - m.",
        "After the mean is subtracted, lanes beyond E hold -m: they have to become 0 again.",
        "d = tl.where(mask, x - mean, 0.0); var = tl.sum(d * d, 0) / E.",
    ),
)

# --------------------------------------------------------------------------------------------------- rope_kernel


def _heads(d: Draws, H: int, S: int, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = d.uniform(S, D // 2, low=0.3, high=2.6)
    return d.normal(H, S, D, mean=0.3), np.cos(a).round(3), np.sin(a).round(3)


def _rope() -> Iterator[Given]:
    d = Draws(46)
    for H, S, D, block in ((1, 2, 4, 2), (2, 3, 6, 4), (3, 2, 8, 8), (2, 4, 4, 2)):
        yield Given(f"{H} heads, {S} positions of {D} dims", (*_heads(d, H, S, D), block),
                    lengths={"H": H, "S": S, "D": D, "BLOCK": block})


ROPE_KERNEL = Exercise(
    name="rope_kernel",
    track="triton",
    title="The rotary embedding, in halves",
    statement="""
    x is [H, S, D], contiguous: head h, position s begins at (h * S + s) * D. cos and sin are [S, D/2], the same for all
    heads. Pair i is (i, i + D/2):

        out[.., i]       = x[.., i] cos[s, i] - x[.., i + D/2] sin[s, i]
        out[.., i + D/2] = x[.., i + D/2] cos[s, i] + x[.., i] sin[s, i]

    One program per head and position: program pid has row pid of the H * S rows, so its position is pid % S. BLOCK is a
    power of two, at least D/2. Example: D = 2, a quarter turn (cos 0, sin 1): (1, 0) becomes (0, 1).

    What counts: pairs keep their length, and every head uses the angles of its position.
    """,
    function="rope",
    solution='''@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, S, HALF, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    s = row % S
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    c = tl.load(cos_ptr + s * HALF + i, mask=mask, other=0.0)
    n = tl.load(sin_ptr + s * HALF + i, mask=mask, other=0.0)
    a = tl.load(x_ptr + row * 2 * HALF + i, mask=mask, other=0.0)
    b = tl.load(x_ptr + row * 2 * HALF + HALF + i, mask=mask, other=0.0)
    tl.store(out_ptr + row * 2 * HALF + i, a * c - b * n, mask=mask)
    tl.store(out_ptr + row * 2 * HALF + HALF + i, b * c + a * n, mask=mask)
    # end of your part


def rope(x, cos, sin, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    rope_kernel[(H * S,)](x, cos, sin, out, S, D // 2, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def rope(x, cos, sin, BLOCK):
    H, S, D = x.shape
    half = D // 2
    out = np.full((H, S, D), np.nan)
    for row in range(H * S):
        s = row % S
        i = np.arange(BLOCK)
        mask = i < half
        first, second = row * D + i, row * D + half + i
        c, n = load(cos, s * half + i, mask), load(sin, s * half + i, mask)
        a, b = load(x, first, mask), load(x, second, mask)
        store(out, first, a * c - b * n, mask)
        store(out, second, b * c + a * n, mask)
    return out
''',
    calls=_rope,
    operator="rope",
    adapt="lambda operator, x, cos, sin, BLOCK: (operator(x[None], x[None, :1], cos, sin, False)[0][0],)",
    outputs={"out": ("H", "S", "D")},
    shown=lambda: [Given("unit vectors, a quarter turn", (np.eye(4)[None], np.zeros((4, 2)), np.ones((4, 2)), 2))],
    mistakes=(
        wrong("pairs side by side", "the pairs are (2i, 2i + 1): the other convention's",
              "Which dim does dim 0 share its angle with?",
              "first, second = row * D + i, row * D + half + i",
              "first, second = row * D + 2 * i, row * D + 2 * i + 1"),
        wrong("turned the wrong way", "the rotation turns the other way", "Where does a quarter turn take (1, 0)?",
              "a * c - b * n", "a * c + b * n", "b * c + a * n", "b * c - a * n"),
        wrong("both signs plus", "both lines have a plus", "Does your result keep the length of a pair?",
              "a * c - b * n", "a * c + b * n"),
        wrong("both signs minus", "both lines have a minus", "Does your result keep the length of a pair?",
              "b * c + a * n", "b * c - a * n"),
        wrong("cos and sin exchanged", "cos and sin are exchanged", "What if the angle is 0?", "c, n = ", "n, c = "),
        wrong("angle by head", "the angle is that of the head's number, and not of the position",
              "Which position has row 1 of head 1?", "s = row % S", "s = row // S % S"),
        wrong("always position 0", "all rows use the angle of position 0", "Which position has row 1?",
              "s = row % S", "s = 0"),
        wrong("second half not written", "only the first half is stored", "How many stores does your kernel have?",
              "        store(out, second, b * c + a * n, mask)\n", ""),
        wrong("second half not turned", "the second half is stored as it came", "How do both halves change?",
              "b * c + a * n", "b"),
        wrong("first half not turned", "the first half is stored as it came", "How do both halves change?",
              "a * c - b * n", "a"),
        wrong("first half overwritten", "the second line uses what the first has made",
              "Which a does your second line use?", "b * c + a * n", "b * c + (a * c - b * n) * n"),
        wrong("halves exchanged", "the halves of the result are exchanged", "Which half goes where?",
              "store(out, first, a * c - b * n, mask)", "store(out, second, a * c - b * n, mask)",
              "store(out, second, b * c + a * n, mask)", "store(out, first, b * c + a * n, mask)"),
        wrong("table stride is D", "a row of cos and sin is taken as D apart, and is D/2",
              "How long is a row of cos?", "load(cos, s * half + i, mask), load(sin, s * half + i, mask)",
              "load(cos, (s * D + i) % cos.size, mask), load(sin, (s * D + i) % sin.size, mask)"),
        wrong("table stride missing", "the position is added without its stride", "Where does row 1 of cos begin?",
              "load(cos, s * half + i, mask), load(sin, s * half + i, mask)",
              "load(cos, s + i, mask & (s + i < cos.size)), load(sin, s + i, mask & (s + i < sin.size))"),
        wrong("position one late", "row s uses the angle of s - 1", "Which angle has position 0?",
              "s = row % S", "s = (row - 1) % S"),
        wrong("both halves of a", "the second half is read from the first", "Where does the second half begin?",
              "load(x, second, mask)", "load(x, first, mask)"),
        wrong("last pair missing", "the last pair is masked off", "Is the last pair inside your mask?",
              "mask = i < half", "mask = i < half - 1"),
    ),
    hints=(
        "Follow one pair of row 0, then of row S: both have position 0.",
        "Load the two halves of the row and the angles of its position, and store both lines of the formula.",
        "s = row % S; a lies at row * D + i, b at row * D + D/2 + i, the angles at s * D/2 + i.",
    ),
)

# ---------------------------------------------------------------------------------------------- norm_rope_kernel


def _norm_rope() -> Iterator[Given]:
    d = Draws(47)
    for H, S, D, block, eps in ((1, 2, 4, 2, 0.25), (2, 3, 6, 4, 0.1), (3, 2, 8, 8, 1e-5)):
        x, cos, sin = _heads(d, H, S, D)
        yield Given(f"{H} heads, {S} positions of {D} dims", (x, d.weight(H, D), cos, sin, eps, block),
                    lengths={"H": H, "S": S, "D": D, "BLOCK": block})


NORM_ROPE_KERNEL = Exercise(
    name="norm_rope_kernel",
    track="triton",
    title="RMSNorm and rotation in one kernel",
    statement="""
    x is [H, S, D], contiguous; weight is [H, D]: each head has its own; cos and sin are [S, D/2]. Every row of D
    numbers (head h, position s) is normed, then turned in halves, and written once:

        n = weight[h] * x[h, s] / sqrt(mean over D of x[h, s]^2 + eps)
        out[.., i]       = n[i] cos[s, i] - n[i + D/2] sin[s, i]
        out[.., i + D/2] = n[i + D/2] cos[s, i] + n[i] sin[s, i]

    One program per row: head row // S, position row % S. BLOCK is a power of two, at least D/2: load both halves.
    Example: with angles of 0 the result is the norm alone.

    What counts: the mean is over all D numbers of the row, both halves; the norm comes first.
    """,
    function="norm_rope",
    solution='''@triton.jit
def norm_rope_kernel(x_ptr, w_ptr, cos_ptr, sin_ptr, out_ptr, S, HALF, eps, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    h, s = row // S, row % S
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    a = tl.load(x_ptr + row * 2 * HALF + i, mask=mask, other=0.0)
    b = tl.load(x_ptr + row * 2 * HALF + HALF + i, mask=mask, other=0.0)
    r = 1 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
    a = a * r * tl.load(w_ptr + h * 2 * HALF + i, mask=mask, other=0.0)
    b = b * r * tl.load(w_ptr + h * 2 * HALF + HALF + i, mask=mask, other=0.0)
    c = tl.load(cos_ptr + s * HALF + i, mask=mask, other=0.0)
    n = tl.load(sin_ptr + s * HALF + i, mask=mask, other=0.0)
    tl.store(out_ptr + row * 2 * HALF + i, a * c - b * n, mask=mask)
    tl.store(out_ptr + row * 2 * HALF + HALF + i, b * c + a * n, mask=mask)
    # end of your part


def norm_rope(x, weight, cos, sin, eps, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    norm_rope_kernel[(H * S,)](x, weight, cos, sin, out, S, D // 2, eps, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def norm_rope(x, weight, cos, sin, eps, BLOCK):
    H, S, D = x.shape
    half = D // 2
    out = np.full((H, S, D), np.nan)
    for row in range(H * S):
        h, s = row // S, row % S
        i = np.arange(BLOCK)
        mask = i < half
        first, second = row * D + i, row * D + half + i
        a, b = load(x, first, mask), load(x, second, mask)
        wa, wb = load(weight, h * D + i, mask), load(weight, h * D + half + i, mask)
        c, n = load(cos, s * half + i, mask), load(sin, s * half + i, mask)
        r = 1 / np.sqrt((np.sum(a * a) + np.sum(b * b)) / D + eps)
        a, b = a * r * wa, b * r * wb
        store(out, first, a * c - b * n, mask)
        store(out, second, b * c + a * n, mask)
    return out
''',
    calls=_norm_rope,
    operator="norm_rope",
    adapt="lambda operator, x, w, cos, sin, eps, BLOCK: "
    "(operator(x[None], x[None, :1], w, w[:1], cos, sin, eps, 'rms', False)[0][0],)",
    outputs={"out": ("H", "S", "D")},
    mistakes=(
        wrong("mean of the first half", "the mean square is that of the first half alone",
              "Which numbers are in your sum?",
              "(np.sum(a * a) + np.sum(b * b)) / D", "np.sum(a * a) / half"),
        wrong("each half normed alone", "each half is normed by its own mean square", "How many means has a row?",
              "a, b = a * r * wa, b * r * wb", "a, b = (t / np.sqrt(np.sum(t * t) / half + eps) * u "
              "for t, u in ((a, wa), (b, wb)))"),
        wrong("divided by half", "the sum over D numbers is divided by D/2", "How many numbers has a row?",
              "np.sum(b * b)) / D", "np.sum(b * b)) / half"),
        wrong("divided by BLOCK", "the sum is divided by BLOCK", "How many numbers has a row?",
              "np.sum(b * b)) / D", "np.sum(b * b)) / BLOCK"),
        wrong("divided by twice BLOCK", "the sum is divided by 2 BLOCK, and not by D", "How many numbers has a row?",
              "np.sum(b * b)) / D", "np.sum(b * b)) / (2 * BLOCK)"),
        wrong("weight of head 0", "all heads use the weight of head 0", "Where does the weight of head 1 begin?",
              "load(weight, h * D + i, mask), load(weight, h * D + half + i, mask)",
              "load(weight, i, mask), load(weight, half + i, mask)"),
        wrong("weight's first half twice", "both halves use the first half of the weight", "Which weight has dim D/2?",
              "load(weight, h * D + half + i, mask)", "load(weight, h * D + i, mask)"),
        wrong("weight after the rotation", "the weight multiplies what was turned",
              "Which comes first, norm or rotation?",
              "a, b = a * r * wa, b * r * wb", "a, b = a * r, b * r",
              "a * c - b * n", "(a * c - b * n) * wa", "b * c + a * n", "(b * c + a * n) * wb"),
        wrong("no weight", "the weight is not applied", "Where is the weight used?", "a * r * wa, b * r * wb",
              "a * r, b * r"),
        wrong("no norm", "the row is turned, and not normed", "With angles of 0, what is the result?",
              "a * r * wa, b * r * wb", "a * wa, b * wb"),
        wrong("no rotation", "the row is normed, and not turned", "Where are cos and sin used?",
              "a * c - b * n", "a", "b * c + a * n", "b"),
        wrong("eps outside the root", "eps is added to the root", "Where does eps stand in the formula?",
              "1 / np.sqrt((np.sum(a * a) + np.sum(b * b)) / D + eps)",
              "1 / (np.sqrt((np.sum(a * a) + np.sum(b * b)) / D) + eps)"),
        wrong("no eps", "eps is missing", "Where is eps used?", " / D + eps)", " / D)"),
        wrong("turned the wrong way", "the rotation turns the other way", "Where does a quarter turn take (1, 0)?",
              "a * c - b * n", "a * c + b * n", "b * c + a * n", "b * c - a * n"),
        wrong("both signs plus", "both lines have a plus", "Does the rotation keep the length of a pair?",
              "a * c - b * n", "a * c + b * n"),
        wrong("pairs side by side", "the pairs are (2i, 2i + 1)", "Which dim does dim 0 share its angle with?",
              "first, second = row * D + i, row * D + half + i", "first, second = row * D + 2 * i, row * D + 2 * i + 1",
              "load(weight, h * D + i, mask), load(weight, h * D + half + i, mask)",
              "load(weight, h * D + 2 * i, mask), load(weight, h * D + 2 * i + 1, mask)"),
        wrong("angle by head", "the angle is that of the head's number", "Which position has row 1 of head 1?",
              "h, s = row // S, row % S", "h, s = row // S, row // S % S"),
        wrong("head and position exchanged", "head and position are exchanged: row % S and row // S",
              "Which head has row 1?", "h, s = row // S, row % S", "h, s = row % S % H, row // S % S"),
        wrong("always position 0", "all rows use the angle of position 0", "Which position has row 1?",
              "h, s = row // S, row % S", "h, s = row // S, 0"),
    ),
    hints=(
        "With angles of 0 only the norm is left: is that right? Then look at the rotation.",
        "One root for the whole row: the squares of both halves over D. Weights by head, angles by position.",
        "r = 1 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps).",
    ),
)

EXERCISES = (
    ADD, ROW_SUM, SOFTMAX_KERNEL, RMS_NORM_KERNEL, LAYER_NORM_KERNEL, ROPE_KERNEL, NORM_ROPE_KERNEL,
)
