"""The way from Torch to Triton, tile by tile: products, the online softmax, flash attention, decoding, a loss."""

from collections.abc import Iterator

import numpy as np

from refllm.learn.exercise import Exercise, Given, ways, wrong
from refllm.learn.exercises.draws import Draws, filled
from refllm.learn.exercises.memory import PROGRAMS

# fmt: off

# -------------------------------------------------------------------------------------------------------- matmul


def _matmul() -> Iterator[Given]:
    d = Draws(51)
    for M, N, K, bm, bn, bk in ((4, 4, 16, 2, 2, 16), (5, 3, 23, 2, 2, 16), (6, 5, 40, 4, 2, 16), (4, 6, 39, 2, 4, 16)):
        yield Given(f"{M} x {K} by {K} x {N}, tiles {bm}, {bn}, {bk}", (d.normal(M, K), d.normal(K, N), bm, bn, bk),
                    lengths={"M": M, "N": N, "K": K})


MATMUL_KERNEL = Exercise(
    name="matmul_kernel",
    track="triton",
    title="A matrix product in tiles",
    statement="""
    a is [M, K], b is [K, N], both contiguous: element (m, k) of a lies at m * K + k, element (k, n) of b at k * N + n.
    out = a b is [M, N]. BM, BN and BK are powers of two.

    The grid is two-dimensional: program (pm, pn) = (tl.program_id(0), tl.program_id(1)) makes the tile of rows pm * BM
    .. and columns pn * BN .. It walks along K in tiles of BK, loads a tile of a [BM, BK] and one of b [BK, BN], and
    adds their product to an accumulator: acc += tl.dot(a, b). Offsets of two axes are rows[:, None] * K +
    columns[None, :].

    Example: K = 23, BK = 16: two turns, the second with seven columns; lanes beyond load 0. (tl.dot wants BK of 16 or
    more, and on a GPU BM and BN too; here they are small, so that you can follow them.)

    What counts: every product is added once. With a and b of ones every element is K.
    """,
    function="matmul",
    solution='''@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    # your part
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a_mask = (m[:, None] < M) & (k[None, :] < K)
        b_mask = (k[:, None] < K) & (n[None, :] < N)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        acc += tl.dot(a, b)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))
    # end of your part


def matmul(a, b, BM, BN, BK):
    (M, K), N = a.shape, b.shape[1]
    out = torch.empty((M, N), dtype=a.dtype)
    matmul_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](a, b, out, M, N, K, BM=BM, BN=BN, BK=BK)
    return out
''',
    definition=PROGRAMS + '''def matmul(a, b, BM, BN, BK):
    (M, K), N = a.shape, b.shape[1]
    out = np.full((M, N), np.nan)
    for pm in range(cdiv(M, BM)):
        for pn in range(cdiv(N, BN)):
            m, n = (pm * BM + np.arange(BM))[:, None], (pn * BN + np.arange(BN))[None, :]
            acc = np.zeros((BM, BN))
            for start in range(0, K, BK):
                k = start + np.arange(BK)
                left = load(a, m * K + k[None, :], (m < M) & (k[None, :] < K))
                right = load(b, k[:, None] * N + n, (k[:, None] < K) & (n < N))
                acc += left @ right
            store(out, m * N + n, acc, (m < M) & (n < N))
    return out
''',
    calls=_matmul,
    outputs={"out": ("M", "N")},
    shown=lambda: [Given("ones: every element is K", (np.ones((4, 23)), np.ones((23, 4)), 2, 2, 16))],
    mistakes=(
        wrong("accumulator overwritten", "acc is set and not added to: only the last tile of K counts",
              "What is in acc after the second turn?", "acc += left", "acc = left"),
        wrong("K tail dropped", "K // BK tiles are visited: the last K % BK products are missing",
              "Which columns of a does your loop visit?", "range(0, K, BK)", "range(0, K - K % BK, BK)"),
        wrong("only the first tile", "there is no walk along K: only the first BK products are added",
              "Which columns of a does your loop visit?", "range(0, K, BK)", "range(0, 1, BK)"),
        wrong("start not added", "the offsets do not move along K: the first tile is added again and again",
              "Which columns of a does the second turn read?", "k = start + np.arange(BK)", "k = np.arange(BK)"),
        wrong("a does not move", "a stays at its first tile, while b moves",
              "Which columns of a does the second turn read?",
              "load(a, m * K + k[None, :]", "load(a, m * K + k[None, :] - start"),
        wrong("b does not move", "b stays at its first tile, while a moves",
              "Which rows of b does the second turn read?",
              "load(b, k[:, None] * N + n", "load(b, (k[:, None] - start) * N + n"),
        wrong("grid floors M", "M // BM programs: the last M % BM rows belong to nobody",
              "Which rows has the last program?",
              "cdiv(M, BM)", "M // BM"),
        wrong("grid floors N", "N // BN programs: the last N % BN columns belong to nobody",
              "Which columns has the last program?", "cdiv(N, BN)", "N // BN"),
        wrong("rows of a not moved", "all programs read the first rows of a",
              "Which rows of a does program (1, 0) read?",
              "load(a, m * K + k[None, :], (m < M)", "load(a, (m - pm * BM) * K + k[None, :], (m < M)"),
        wrong("columns of b not moved", "all programs read the first columns of b",
              "Which columns of b does program (0, 1) read?",
              "load(b, k[:, None] * N + n,", "load(b, k[:, None] * N + n - pn * BN,"),
        wrong("b transposed", "b is read as its transpose", "Where does element (k, n) of b lie?",
              "load(b, k[:, None] * N + n, ", "load(b, (k[:, None] + n * K) % b.size, "),
        wrong("stride of b is K", "a row of b is taken as K long, and is N long", "Where does element (k, n) of b lie?",
              "load(b, k[:, None] * N + n, (k[:, None] < K) & (n < N))",
              "load(b, np.minimum(k[:, None] * K + n, b.size - 1), (k[:, None] < K) & (n < N))"),
        wrong("one tile too few", "the walk along K ends one tile early", "Which columns of a does your loop visit?",
              "range(0, K, BK)", "range(0, K - BK, BK)"),
        wrong("last column of K short", "the last column of K is masked off", "Is column K - 1 inside your mask?",
              "(k[None, :] < K)", "(k[None, :] < K - 1)"),
        wrong("averaged", "the sum is divided by K", "What is a product of ones?", "n, acc,", "n, acc / K,"),
        wrong("elementwise", "the tiles are multiplied element by element, and not as matrices",
              "What does * do with two tiles, and what does tl.dot?",
              "acc += left @ right", "acc += left[:, :1] * right[:1]"),
    ),
    hints=(
        "With a and b of ones, every element should be K. What is yours, and of how many tiles is that?",
        "Rows from program 0, columns from program 1, and a loop over K that moves the columns of a and the rows of b.",
        "k = start + tl.arange(0, BK); acc += tl.dot(a, b) with both loads masked on k < K.",
    ),
)

# ---------------------------------------------------------------------------------------------------- lse_kernel


def _lse() -> Iterator[Given]:
    d = Draws(52)
    for R, E, block in ((2, 4, 4), (3, 7, 4), (4, 6, 2), (3, 11, 4), (2, 3, 4)):
        yield Given(f"{R} rows of {E}, BLOCK {block}",
        (d.normal(R, E, size=1.5), block), lengths={"E": E, "BLOCK": block})
    low = d.normal(3, 6) - np.array([[0.0], [2000.0], [0.0]])
    yield Given("a row at -2000, and a number of 2000", (filled(low, (2, 1), 2000.0), 4), corner=True)


LSE_KERNEL = Exercise(
    name="lse_kernel",
    track="triton",
    title="Flash attention, step 1: the online softmax",
    statement="""
    x is [R, E], contiguous; BLOCK is a power of two, and may be smaller than E. out[row] = log of the sum of exp over
    the row, in ONE walk over tiles, without overflow. Keep two numbers: m, the largest number so far, and l, the sum of
    exp(x - m) so far. When a tile brings a new maximum, what was summed before must shrink:

        new = max(m, largest of the tile)
        l = l * exp(m - new) + sum of exp(tile - new)
        m = new                                         and at the end out[row] = m + log(l)

    Example: tiles (0) and (1): m = 0, l = 1; then new = 1, l = exp(-1) + 1, and out = 1 + log(1 + 1/e) = 1.313.

    What counts: the tile size changes nothing. m begins at minus infinity, l at 0, lanes beyond E load minus infinity.
    """,
    function="lse",
    solution='''@triton.jit
def lse_kernel(x_ptr, out_ptr, E, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    m = -float("inf")
    l = 0.0
    for start in range(0, E, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * E + i, mask=i < E, other=-float("inf"))
        new = tl.maximum(m, tl.max(x, 0))
        l = l * tl.exp(m - new) + tl.sum(tl.exp(x - new), 0)
        m = new
    tl.store(out_ptr + row, m + tl.log(l))
    # end of your part


def lse(x, BLOCK):
    R, E = x.shape
    out = torch.empty(R, dtype=x.dtype)
    lse_kernel[(R,)](x, out, E, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def lse(x, BLOCK):
    R, E = x.shape
    out = np.full(R, np.nan)
    for row in range(R):
        m, l = -np.inf, 0.0
        for start in range(0, E, BLOCK):
            i = start + np.arange(BLOCK)
            v = load(x, row * E + i, i < E, -np.inf)
            new = np.maximum(m, v.max())
            l = l * np.exp(m - new) + np.exp(v - new).sum()
            m = new
        store(out, row, m + np.log(l))
    return out
''',
    calls=_lse,
    outputs={"out": ("R",)},
    shown=lambda: [Given("0 and 1, tiles of one", (np.array([[0.0, 1.0], [1.0, 0.0]]), 1))],
    mistakes=(
        wrong("sum not rescaled", "l is not multiplied by exp(m - new) when a new maximum comes",
              "What is the old sum relative to, after the maximum has changed?", "l * np.exp(m - new)", "l"),
        wrong("factor inverted", "the factor is exp(new - m): what was summed before must shrink, and not grow",
              "Is new larger or smaller than m?", "l * np.exp(m - new)", "(l * np.exp(new - m) if l else 0.0)"),
        wrong("maximum of the tile", "new is the maximum of the tile, and not the running one",
              "What is new if the first tile has the largest number?", "np.maximum(m, v.max())", "v.max()"),
        wrong("sum overwritten", "l is set and not added to: only the last tile counts",
              "What is in l after two turns?",
              "l = l * np.exp(m - new) + np.exp", "l = np.exp"),
        wrong("m not added", "the maximum is not added again outside the logarithm",
              "What happens to your result if a row is shifted?", "m + np.log(l)", "np.log(l)"),
        wrong("no logarithm", "the logarithm is missing", "What is out for a row of one number?", "m + np.log(l)",
              "m + l"),
        wrong("other is 0", "lanes that are masked off hold 0, and count exp(0 - max)",
              "What does a lane beyond E add?",
              "i < E, -np.inf)", "i < E, 0.0)"),
        wrong("maximum alone", "it is the largest number: the logarithm of the sum is missing",
              "What is out for two equal numbers?", "m + np.log(l)", "m"),
        wrong("base 2", "exponentials and logarithm have the base 2", "What is out for two equal numbers?",
              "np.exp(", "np.exp2(", "np.log(l)", "np.log2(l)"),
        wrong("base 2 exponentials", "the exponentials have the base 2, and the logarithm has not",
              "What is out for 0 and 1?", "np.exp(", "np.exp2("),
        wrong("maximum starts at 0", "m begins at 0: a row far below it underflows to log(0)",
              "What is m for a row at -2000?", "m, l = -np.inf, 0.0", "m, l = 0.0, 0.0"),
        wrong("tail dropped", "E // BLOCK tiles are visited", "Which columns does your loop visit?",
              "range(0, E, BLOCK)", "range(0, E - E % BLOCK, BLOCK)"),
        wrong("only the first tile", "only the first tile is visited", "Which columns does your loop visit?",
              "range(0, E, BLOCK)", "range(0, 1, BLOCK)"),
        wrong("start not added", "every turn reads the first tile", "Which columns does the second turn read?",
              "i = start + np.arange(BLOCK)", "i = np.arange(BLOCK)"),
        wrong("tile's exponentials at the old maximum", "exp(tile - m) in place of exp(tile - new)",
              "What is the sum relative to?", "np.exp(v - new)", "np.exp(v - (m if start else new))"),
        wrong("l starts at one", "l begins at 1, and should begin at 0",
              "What is summed before the first tile?", "m, l = -np.inf, 0.0", "m, l = -np.inf, 1.0",
              "l * np.exp(m - new) +", "(l * np.exp(m - new) if start else l) +"),
        wrong("rescaled together", "the new exponentials are multiplied by the factor as well",
              "Which part of the sum was taken at the old maximum?",
              "l * np.exp(m - new) + np.exp(v - new).sum()",
              "(l + np.exp(v - new).sum()) * (np.exp(m - new) if start else 1.0)"),
    ),
    hints=(
        "Tiles of one number, row (0, 1): follow m and l by hand.",
        "When the maximum changes, everything that was summed is too large by exp(new - m).",
        "l = l * tl.exp(m - new) + tl.sum(tl.exp(x - new), 0), and then m = new.",
    ),
)

# ----------------------------------------------------------------------------------------------------- flash_row


def _flash_row() -> Iterator[Given]:
    d = Draws(53)
    for S, T, D, block in ((1, 4, 2, 4), (3, 7, 2, 2), (2, 6, 4, 4), (3, 5, 2, 4)):
        yield Given(f"{S} queries, {T} keys, BLOCK {block}",
                    (d.normal(S, D, size=2.0), d.normal(T, D, mean=0.3), d.normal(T, D, mean=0.5), block),
                    lengths={"S": S, "T": T, "D": D, "BLOCK": block})
    q, k = d.normal(2, 2), d.normal(5, 2)
    far = np.abs(k) + 1
    yield Given("all scores far below 0", (np.abs(q) * -3000 - 3000, far, d.normal(5, 2), 2), corner=True)


FLASH_ROW = Exercise(
    name="flash_row",
    track="triton",
    title="Flash attention, step 2: one query over tiles of keys",
    statement="""
    One head, no mask: q is [S, D], k and v are [T, D], contiguous; D and BLOCK are powers of two. out[s] is the
    average of the rows of v with the softmax over the keys of q[s] . k / sqrt(D). One program per query walks over the
    keys in tiles of BLOCK, and never holds more than a tile of scores. Beside m and l of the online softmax it keeps
    acc, the sum of exp(score - m) v so far, of D lanes; the same factor that shrinks l shrinks acc:

        scores of the tile [BLOCK]: sum over D of q * k, over sqrt(D); minus infinity for keys beyond T
        new = max(m, largest score);   p = exp(scores - new);   alpha = exp(m - new)
        l = l * alpha + sum(p);        acc = acc * alpha + sum over the keys of p[:, None] * v;        m = new
        at the end out[s] = acc / l

    Example: where all scores are equal, out is the mean of the rows of v.

    What counts: the tile size changes nothing, and the weights sum to 1.
    """,
    function="flash_row",
    solution='''@triton.jit
def flash_row_kernel(q_ptr, k_ptr, v_ptr, out_ptr, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    # your part
    s = tl.program_id(0)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + s * D + d)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = t[:, None] < T
        k = tl.load(k_ptr + t[:, None] * D + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + t[:, None] * D + d[None, :], mask=mask, other=0.0)
        scores = tl.where(t < T, tl.sum(q[None, :] * k, 1) * scale, -float("inf"))
        new = tl.maximum(m, tl.max(scores, 0))
        p = tl.exp(scores - new)
        alpha = tl.exp(m - new)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v, 0)
        m = new
    tl.store(out_ptr + s * D + d, acc / l)
    # end of your part


def flash_row(q, k, v, BLOCK):
    (S, D), T = q.shape, k.shape[0]
    out = torch.empty_like(q)
    flash_row_kernel[(S,)](q, k, v, out, T, D**-0.5, D=D, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def flash_row(q, k, v, BLOCK):
    (S, D), T = q.shape, len(k)
    scale = D**-0.5
    out = np.full((S, D), np.nan)
    d = np.arange(D)
    for row in range(S):
        m, l, acc = -np.inf, 0.0, np.zeros(D)
        for start in range(0, T, BLOCK):
            t = start + np.arange(BLOCK)
            mask = t[:, None] < T
            keys, values = load(k, t[:, None] * D + d, mask), load(v, t[:, None] * D + d, mask)
            scores = np.where(t < T, (q[row] * keys).sum(1) * scale, -np.inf)
            new = np.maximum(m, scores.max())
            p = np.exp(scores - new)
            alpha = np.exp(m - new)
            l = l * alpha + p.sum()
            acc = acc * alpha + (p[:, None] * values).sum(0)
            m = new
        store(out, row * D + d, acc / l)
    return out
''',
    calls=_flash_row,
    operator="attention",
    adapt="lambda operator, q, k, v, BLOCK: "
    "(operator(q[None, None], k[None, None], v[None, None], causal=False)[0][0, 0],)",
    outputs={"out": ("S", "D")},
    shown=lambda: [
        Given("scores 0 and 1, v is the identity", (np.array([[1.0, 0.0]]) * 2**0.5, np.array([[0.0, 0.0], [1.0, 0.0]]),
                                                   np.eye(2), 1)),
    ],
    mistakes=(
        wrong("accumulator not rescaled", "l is rescaled when a new maximum comes, and acc is not",
              "What is acc relative to, after the maximum has changed?", "acc * alpha +", "acc +"),
        wrong("sum not rescaled", "acc is rescaled when a new maximum comes, and l is not",
              "What is l relative to, after the maximum has changed?", "l * alpha +", "l +"),
        wrong("nothing rescaled", "neither acc nor l is rescaled when a new maximum comes",
              "What are acc and l relative to, after the maximum has changed?", "acc * alpha +", "acc +",
              "l * alpha +", "l +"),
        wrong("factor inverted", "alpha is exp(new - m): what was summed before must shrink",
              "Is alpha ever larger than 1?", "alpha = np.exp(m - new)", "alpha = np.exp(new - m) if start else 0.0"),
        wrong("maximum of the tile", "new is the maximum of the tile, and not the running one",
              "What is new if the first tile has the largest score?", "np.maximum(m, scores.max())", "scores.max()",
              "alpha = np.exp(m - new)", "alpha = np.exp(m - new)"),
        wrong("m not updated", "m is never set: alpha stays 0, and only the last tile counts",
              "What is m in the second turn?", "            m = new\n", ""),
        wrong("accumulator overwritten", "acc holds the last tile alone", "What is in acc after two turns?",
              "acc = acc * alpha + ", "acc = "),
        wrong("sum overwritten", "l holds the last tile alone", "What is in l after two turns?",
              "l = l * alpha + ", "l = "),
        wrong("not divided", "acc is not divided by l at the end", "What do your weights sum to?", "acc / l)", "acc)"),
        wrong("divided in every turn", "acc is divided by l in every turn, and not multiplied back",
              "How often is the first tile divided?", "            m = new\n",
              "            m = new\n            acc = acc / l\n",
              "acc / l)", "acc)"),
        wrong("no scale", "the scores are not divided by sqrt(D)", "By what are your scores divided?", " * scale", ""),
        wrong("divided by D", "the scores are divided by D, and not by its root", "By what are your scores divided?",
              "D**-0.5", "1 / D"),
        wrong("key tail not hidden", "keys beyond T have score 0, and count exp(0 - max)",
              "Which score has a key beyond T?", "np.where(t < T, (q[row] * keys).sum(1) * scale, -np.inf)",
              "(q[row] * keys).sum(1) * scale"),
        wrong("base 2", "the exponentials have the base 2", "Which base has a softmax?", "np.exp(", "np.exp2("),
        wrong("k for v", "the keys are averaged, and not the values", "What do the weights multiply?",
              "* values).sum(0)", "* keys).sum(0)"),
        wrong("tail dropped", "T // BLOCK tiles are visited", "Which keys does your loop visit?",
              "range(0, T, BLOCK)", "range(0, T - T % BLOCK, BLOCK)"),
        wrong("v does not move", "v stays at its first tile", "Which rows of v does the second turn read?",
              "load(v, t[:, None] * D + d, mask)", "load(v, (t[:, None] - start) * D + d, mask)"),
        wrong("query 0 for all", "every program reads query 0", "Which query has program 1?", "q[row]", "q[0]"),
        wrong("maximum starts at 0", "m begins at 0: where all scores are far below, it is 0 / 0",
              "What is m where all scores are below 0?", "m, l, acc = -np.inf,", "m, l, acc = 0.0,"),
        wrong("divided by T", "acc is divided by T, and not by l", "What do your weights sum to?", "acc / l)",
              "acc / T)"),
    ),
    hints=(
        "With v the identity the result is the weights: which tile has too much?",
        "Two tiles, scores 0 and 1: follow m, l and acc by hand; alpha is exp(-1) in the second turn.",
        "acc = acc * alpha + tl.sum(p[:, None] * v, 0), l = l * alpha + tl.sum(p, 0), with alpha = tl.exp(m - new).",
    ),
)

# -------------------------------------------------------------------------------------------------- flash_kernel


def _flash() -> Iterator[Given]:
    d = Draws(54)
    # The last: a tile of queries whose first sees one tile of keys, and whose others see two.
    for S, T, D, bm, bn in ((4, 4, 16, 4, 16), (5, 37, 16, 2, 16), (20, 20, 16, 8, 16), (18, 34, 16, 16, 16),
                            (7, 20, 16, 4, 16)):  # fmt: skip
        yield Given(f"{S} queries of {T} keys, tiles {bm} and {bn}",
                    (d.normal(S, D, size=2.5), d.normal(T, D, mean=0.2), d.normal(T, D, mean=0.4), bm, bn),
                    lengths={"S": S, "T": T, "D": D})
    q, k = -3e5 - np.abs(d.normal(4, 16)) * 3e5, np.abs(d.normal(20, 16)) + 1
    yield Given("all scores far below 0", (q, k, d.normal(20, 16), 2, 16), corner=True)


FLASH_KERNEL = Exercise(
    name="flash_kernel",
    track="triton",
    title="Flash attention, step 3: tiles of queries, and causal",
    statement="""
    One head: q is [S, D], k and v are [T, D], contiguous, S at most T; D, BM and BN are powers of two. Query s sees the
    keys 0 .. T - S + s. out = softmax over the seen keys of q k^T / sqrt(D), times v.

    Program pid has the queries pid * BM .. and walks over the keys in tiles of BN. As in step 2, but m and l have BM
    lanes and acc is [BM, D]; tl.dot(q, tl.trans(k)) gives the scores [BM, BN]. Scores of keys that are not seen, or
    beyond T, become minus infinity. Tiles that no query of the program sees may be skipped: the last key that any of
    them sees is T - S + the last query. Queries beyond S load 0 and are not stored.

    Example: S = T: query 0 sees key 0 alone, so out[0] = v[0].

    What counts: the tile sizes change nothing. (tl.dot wants D and BN of 16 or more.)
    """,
    function="flash",
    solution='''@triton.jit
def flash_kernel(q_ptr, k_ptr, v_ptr, out_ptr, S, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    # your part
    s = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + s[:, None] * D + d[None, :], mask=s[:, None] < S, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    end = tl.minimum(T, T - S + (tl.program_id(0) + 1) * BM)
    for start in range(0, end, BN):
        t = start + tl.arange(0, BN)
        mask = t[:, None] < T
        k = tl.load(k_ptr + t[:, None] * D + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + t[:, None] * D + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        seen = (t[None, :] <= s[:, None] + T - S) & (t[None, :] < T)
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        alpha = tl.exp(m - new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p, v)
        m = new
    tl.store(out_ptr + s[:, None] * D + d[None, :], acc / l[:, None], mask=s[:, None] < S)
    # end of your part


def flash(q, k, v, BM, BN):
    (S, D), T = q.shape, k.shape[0]
    out = torch.empty_like(q)
    flash_kernel[(triton.cdiv(S, BM),)](q, k, v, out, S, T, D**-0.5, D=D, BM=BM, BN=BN)
    return out
''',
    definition=PROGRAMS + '''def flash(q, k, v, BM, BN):
    (S, D), T = q.shape, len(k)
    scale = D**-0.5
    out = np.full((S, D), np.nan)
    d = np.arange(D)
    for pid in range(cdiv(S, BM)):
        s = (pid * BM + np.arange(BM))[:, None]
        queries = load(q, s * D + d, s < S)
        m, l, acc = np.full(BM, -np.inf), np.zeros(BM), np.zeros((BM, D))
        for start in range(0, min(T, T - S + (pid + 1) * BM), BN):
            t = start + np.arange(BN)
            mask = t[:, None] < T
            keys, values = load(k, t[:, None] * D + d, mask), load(v, t[:, None] * D + d, mask)
            scores = queries @ keys.T * scale
            scores = np.where((t <= s + T - S) & (t < T), scores, -np.inf)
            new = np.maximum(m, scores.max(1))
            p = np.exp(scores - new[:, None])
            alpha = np.exp(m - new)
            l = l * alpha + p.sum(1)
            acc = acc * alpha[:, None] + p @ values
            m = new
        store(out, s * D + d, acc / l[:, None], s < S)
    return out
''',
    calls=_flash,
    operator="attention",
    adapt="lambda operator, q, k, v, BM, BN: (operator(q[None, None], k[None, None], v[None, None])[0][0, 0],)",
    outputs={"out": ("S", "D")},
    shown=lambda: [Given("equal scores, v is the identity", (np.zeros((16, 16)), np.eye(16), np.eye(16), 8, 16))],
    mistakes=(
        wrong("accumulator not rescaled", "l is rescaled when a new maximum comes, and acc is not",
              "What is acc relative to, after the maximum has changed?", "acc * alpha[:, None] +", "acc +"),
        wrong("sum not rescaled", "acc is rescaled, and l is not",
              "What is l relative to, after the maximum has changed?",
              "l * alpha +", "l +"),
        wrong("nothing rescaled", "neither acc nor l is rescaled",
              "What are they relative to, after the maximum has changed?",
              "acc * alpha[:, None] +", "acc +", "l * alpha +", "l +"),
        wrong("factor inverted", "alpha is exp(new - m): what was summed before must shrink", "Is alpha ever above 1?",
              "alpha = np.exp(m - new)", "alpha = np.where(np.isneginf(m), 0.0, np.exp(new - m))"),
        wrong("maximum of the tile", "new is the maximum of the tile, and not the running one",
              "What is new if the first tile has the largest score?", "np.maximum(m, scores.max(1))", "scores.max(1)"),
        wrong("m not updated", "m is never set: alpha stays 0, and only the last tile counts",
              "What is m in the second turn?", "            m = new\n", ""),
        wrong("accumulator overwritten", "acc holds the last tile alone", "What is in acc after two turns?",
              "acc = acc * alpha[:, None] +", "acc ="),
        wrong("not divided", "acc is not divided by l at the end", "What do your weights sum to?", "acc / l[:, None]",
              "acc"),
        wrong("divided in every turn", "acc is divided by l in every turn, and not multiplied back",
              "How often is the first tile divided?", "            m = new\n",
              "            m = new\n            acc = acc / l[:, None]\n", "acc / l[:, None], s < S", "acc, s < S"),
        wrong("no causal mask", "queries see later keys", "Which keys does query 0 see?",
              "(t <= s + T - S) & (t < T)", "t < T", "min(T, T - S + (pid + 1) * BM)", "T"),
        wrong("mask inside the tile", "the mask compares positions inside the tile, and not in the sequence",
              "Which key is lane 0 of the second tile?", "(t <= s + T - S)", "((t - start) <= (s - pid * BM))"),
        wrong("mask at the top left", "the mask is aligned at the first key; with S < T it is aligned at the end",
              "Which keys does the last query see?", "(t <= s + T - S)", "(t <= s)"),
        wrong("own position masked", "a query does not see its own position", "Does query 0 see key 0, where S = T?",
              "(t <= s + T - S)", "(t < s + T - S)"),
        wrong("one key too many", "each query sees one later key", "Which keys does query 0 see, where S = T?",
              "(t <= s + T - S)", "(t <= s + T - S + 1)", "(pid + 1) * BM), BN)", "(pid + 1) * BM + 1), BN)"),
        wrong("diagonal tile skipped", "the walk ends before the tile on the diagonal",
              "Which keys does your loop visit?",
              "T - S + (pid + 1) * BM", "T - S + pid * BM"),
        wrong("walk ends at the first query",
              "the walk ends at the last key of the tile's first query, and the others see more",
              "Which keys does the last query of the tile see?",
              "T - S + (pid + 1) * BM", "T - S + pid * BM + 1"),
        wrong("walk forgets T - S", "the walk ends as if S were T",
              "Which is the last key that a program's queries see?",
              "min(T, T - S + (pid + 1) * BM)", "min(T, (pid + 1) * BM)"),
        wrong("masked with 0", "hidden scores are 0, and not minus infinity", "What is exp(0)?",
              "scores, -np.inf)", "scores, 0.0)"),
        wrong("finite sentinel", "hidden scores are NUMBER, and not minus infinity: one that is seen may be smaller",
              "Is there a number below every score?", "scores, -np.inf)", "scores, NUMBER)",
              numbers=("-1e4", "-1e5", "-1e3", "-100.0", "-10.0")),
        wrong("no scale", "the scores are not divided by sqrt(D)", "By what are your scores divided?", " * scale", ""),
        wrong("base 2", "the exponentials have the base 2", "Which base has a softmax?", "np.exp(", "np.exp2("),
        wrong("v does not move", "v stays at its first tile", "Which rows of v does the second turn read?",
              "load(v, t[:, None] * D + d, mask)", "load(v, (t[:, None] - start) * D + d, mask)"),
        wrong("first queries for all", "every program reads the first queries", "Which queries has program 1?",
              "load(q, s * D + d, s < S)", "load(q, (s - pid * BM) * D + d, s < S)"),
        wrong("k for v", "the keys are averaged, and not the values", "What do the weights multiply?", "p @ values",
              "p @ keys"),
        wrong("tail dropped", "whole tiles of keys are visited alone", "Which keys does your loop visit?",
              "(pid + 1) * BM), BN)", "(pid + 1) * BM) // BN * BN, BN)"),
        wrong("maximum starts at 0", "m begins at 0: where all scores are far below, it is 0 / 0",
              "What is m where all scores are below 0?", "m, l, acc = np.full(BM, -np.inf),",
              "m, l, acc = np.zeros(BM),"),
    ),
    hints=(
        "With q = 0 and v the identity the result is the weights: which should be 0, and what do rows sum to?",
        "First the mask: which keys does each query see? Then one row over two tiles: m, l and acc by hand.",
        "seen = (t[None, :] <= s[:, None] + T - S) & (t[None, :] < T); acc and l are both multiplied by alpha.",
    ),
)

# ------------------------------------------------------------------------------------------------- decode_kernel


def _decode() -> Iterator[Given]:
    d = Draws(55)
    for B, H, K, N, D, block, lengths in ((2, 2, 1, 5, 2, 4, [3, 5]), (2, 4, 2, 6, 2, 2, [4, 1]), (1, 6, 2, 7, 4, 4,
    [6])):
        yield Given(f"{H} heads on {K}, lengths {lengths}",
                    (d.normal(B, H, D, size=2.0), d.normal(B, K, N, D, mean=0.3), d.normal(B, K, N, D, mean=0.5),
                     np.array(lengths), block), lengths={"D": D, "N": N, "H": H})
    q, k, v = d.normal(2, 2, 2), d.normal(2, 1, 4, 2), d.normal(2, 1, 4, 2)
    yield Given("a length of 0", (q, k, v, np.array([0, 3]), 2), corner=True)
    k, v = filled(k, (1, 0, 3), np.nan), filled(v, (1, 0, 3), np.nan)
    yield Given("NaN in slots that are not filled", (q, k, v, np.array([2, 3]), 4), corner=True)


DECODE_KERNEL = Exercise(
    name="decode_kernel",
    track="triton",
    title="Decoding: one query over a cache",
    statement="""
    q is [B, H, D]: one new token for each of B sequences. k_cache and v_cache are [B, K, N, D]: N slots, of which the
    first lengths[b] are filled; what the others hold is anything, NaN too. All are contiguous; D and BLOCK are powers
    of two. Query head h reads key/value head h // (H // K). For each (b, h):

        out = softmax over the slots 0 .. lengths[b] - 1 of q . k / sqrt(D), times v;  0 where lengths[b] is 0

    One program per (b, h), number b * H + h, that walks over the slots in tiles of BLOCK as flash attention does; the
    length is loaded from lengths_ptr + b. The offset of slot t is ((b * K + kv) * N + t) * D. Example: H = 4, K = 2:
    query heads 0 and 1 read head 0, heads 2 and 3 read head 1; with a length of 1 out is v of slot 0.

    What counts: a slot that is not filled is never loaded: 0 times NaN is NaN.
    """,
    function="decode",
    solution='''@triton.jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, H, K, N, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    # your part
    pid = tl.program_id(0)
    b, h = pid // H, pid % H
    base = (b * K + h // (H // K)) * N
    length = tl.load(lengths_ptr + b)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + pid * D + d)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = t[:, None] < length
        k = tl.load(k_ptr + (base + t[:, None]) * D + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + (base + t[:, None]) * D + d[None, :], mask=mask, other=0.0)
        scores = tl.where(t < length, tl.sum(q[None, :] * k, 1) * scale, -float("inf"))
        new = tl.maximum(m, tl.max(scores, 0))
        p = tl.exp(scores - new)
        alpha = tl.exp(m - new)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v, 0)
        m = new
    tl.store(out_ptr + pid * D + d, acc / tl.where(l == 0.0, 1.0, l))
    # end of your part


def decode(q, k_cache, v_cache, lengths, BLOCK):
    (B, H, D), (K, N) = q.shape, k_cache.shape[1:3]
    out = torch.empty_like(q)
    decode_kernel[(B * H,)](q, k_cache, v_cache, lengths, out, H, K, N, D**-0.5, D=D, BLOCK=BLOCK)
    return out
''',
    definition='''def decode(q, k_cache, v_cache, lengths, BLOCK):
    (B, H, D), (K, N) = q.shape, k_cache.shape[1:3]
    out = np.zeros((B, H, D))
    for b in range(B):
        n = lengths[b]
        for h in range(H):
            kv = h // (H // K)
            keys, values = k_cache[b, kv, :n], v_cache[b, kv, :n]
            scores = keys @ q[b, h] / np.sqrt(D)
            e = np.exp(scores - scores.max(initial=-1e300))
            out[b, h] = e @ values / (e.sum() if n else 1.0)
    return out
''',
    calls=_decode,
    operator="decode_attention",
    adapt="lambda operator, q, k, v, n, BLOCK: (operator(q[:, :, None], k, v, n)[0][:, :, 0],)",
    outputs={"out": ("B", "H", "D")},
    mistakes=(
        wrong("lengths ignored", "all N slots are read: the length is not used", "Which slots does row 0 read?",
              "n = lengths[b]", "n = N"),
        wrong("newest slot missing", "the newest slot is not read", "Is slot length - 1 read?",
              "n = lengths[b]", "n = max(0, lengths[b] - 1)"),
        wrong("one slot too many", "slot number length is read: it is not filled", "Is slot number length read?",
              "n = lengths[b]", "n = min(N, lengths[b] + 1)"),
        wrong("first length for all", "every sequence uses the length of the first", "Which length has sequence 1?",
              "n = lengths[b]", "n = lengths[0]"),
        wrong("longest length for all", "every sequence uses the longest length", "Which length has sequence 1?",
              "n = lengths[b]", "n = max(lengths)"),
        wrong("heads tiled", "query head h reads key/value head h % K", "Which key/value head has query head 1?",
              "kv = h // (H // K)", "kv = h % K"),
        wrong("key head 0 for all", "all query heads read key/value head 0",
              "Which key/value head has the last query head?",
              "kv = h // (H // K)", "kv = 0"),
        wrong("h // K", "query head h reads head h // K: the group has H // K heads", "How many query heads share one?",
              "kv = h // (H // K)", "kv = min(h // K, K - 1)"),
        wrong("no scale", "the scores are not divided by sqrt(D)", "By what are your scores divided?",
              " / np.sqrt(D)", ""),
        wrong("divided by D", "the scores are divided by D", "By what are your scores divided?", "np.sqrt(D)", "D"),
        wrong("k for v", "the keys are averaged", "What do the weights multiply?", "e @ values", "e @ keys"),
        wrong("oldest slot missing", "slot 0 is never read", "Which slots does your loop visit?",
              "k_cache[b, kv, :n], v_cache[b, kv, :n]", "k_cache[b, kv, 1:n], v_cache[b, kv, 1:n]",
              "if n else", "if len(e) else"),
        wrong("empty is NaN", "a length of 0 gives 0 / 0", "What do you divide by where the length is 0?",
              "(e.sum() if n else 1.0)", "e.sum()"),
        wrong("tail not hidden", "lanes beyond the length have score 0, and count exp(0 - max)",
              "Which score has a lane beyond the length?",
              "            e = np.exp", "            rest = -n % BLOCK\n"
              "            scores = np.concatenate([scores, np.zeros(rest)])\n"
              "            values = np.concatenate([values, np.zeros((rest, D))])\n            e = np.exp"),
        wrong("not divided", "the exponentials are not divided by their sum", "What do your weights sum to?",
              "e @ values / (e.sum() if n else 1.0)", "e @ values"),
        wrong("only the first tile", "only the first tile of slots is read", "Which slots does your loop visit?",
              "n = lengths[b]", "n = min(BLOCK, lengths[b])"),
        wrong("tail dropped", "whole tiles of slots are read alone", "Which slots does your loop visit?",
              "n = lengths[b]", "n = lengths[b] // BLOCK * BLOCK"),
        wrong("last tile alone", "the accumulators are overwritten: only the last tile counts",
              "What is in acc after two turns?", "k_cache[b, kv, :n], v_cache[b, kv, :n]",
              "k_cache[b, kv, max(0, n - 1) // BLOCK * BLOCK : n], v_cache[b, kv, max(0, n - 1) // BLOCK * BLOCK : n]"),
        wrong("base 2", "the exponentials have the base 2", "Which base has a softmax?", "np.exp(", "np.exp2("),
        wrong("sequence 0 for all", "every sequence reads the cache of the first",
              "Where does the cache of sequence 1 begin?",
              "k_cache[b, kv, :n], v_cache[b, kv, :n]", "k_cache[0, kv, :n], v_cache[0, kv, :n]"),
    ),
    hints=(
        "Take a length of 1: the weight is 1, so out is v of slot 0 of the right head.",
        "b, h = pid // H, pid % H; the key/value head is h // (H // K); the walk ends at the length.",
        "Mask loads with t < length, hide scores beyond it with minus infinity, and mind l = 0.",
    ),
)

# ------------------------------------------------------------------------------------------ cross_entropy_kernel


def _cross_entropy() -> Iterator[Given]:
    d = Draws(56)
    for N, V, block in ((3, 4, 4), (4, 7, 4), (3, 6, 2), (2, 5, 8)):
        labels = d.integers(V, N)
        yield Given(f"{N} rows of {V}, BLOCK {block}", (d.normal(N, V, size=1.5), labels, block),
                    lengths={"N": N, "V": V, "BLOCK": block})
    yield Given("labels of -100", (d.normal(4, 7), np.array([2, -100, 0, -100]), 4), corner=True)
    yield Given("a logit of 2000", (filled(d.normal(2, 5), (0, 3), 2000.0), np.array([1, 2]), 2), corner=True)


CROSS_ENTROPY_KERNEL = Exercise(
    name="cross_entropy_kernel",
    track="triton",
    title="Cross entropy over a large vocabulary",
    statement="""
    logits is [N, V], contiguous; labels is [N], whole numbers, -100 for a row that does not count; BLOCK is a power of
    two, and may be smaller than V. out[n] is logsumexp(logits[n]) - logits[n, labels[n]], and 0 where the label is
    -100.

    One program per row walks over the classes in tiles with the online softmax (m and l, see lse_kernel), and loads the
    label's logit by itself. Example: two equal logits: out = ln 2 = 0.693.

    What counts: a label of -100 must not be used as an offset; the tile size changes nothing.
    """,
    function="cross_entropy",
    solution='''@triton.jit
def cross_entropy_kernel(z_ptr, labels_ptr, out_ptr, V, BLOCK: tl.constexpr):
    # your part
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if label == -100:
        tl.store(out_ptr + row, 0.0)
    else:
        m = -float("inf")
        l = 0.0
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * V + i, mask=i < V, other=-float("inf"))
            new = tl.maximum(m, tl.max(z, 0))
            l = l * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0)
            m = new
        tl.store(out_ptr + row, m + tl.log(l) - tl.load(z_ptr + row * V + label))
    # end of your part


def cross_entropy(logits, labels, BLOCK):
    N, V = logits.shape
    out = torch.empty(N, dtype=logits.dtype)
    cross_entropy_kernel[(N,)](logits, labels, out, V, BLOCK=BLOCK)
    return out
''',
    definition=PROGRAMS + '''def cross_entropy(logits, labels, BLOCK):
    N, V = logits.shape
    out = np.full(N, np.nan)
    for row in range(N):
        label = labels[row]
        if label == -100:
            store(out, row, 0.0)
            continue
        m, l = -np.inf, 0.0
        for start in range(0, V, BLOCK):
            i = start + np.arange(BLOCK)
            z = load(logits, row * V + i, i < V, -np.inf)
            new = np.maximum(m, z.max())
            l = l * np.exp(m - new) + np.exp(z - new).sum()
            m = new
        store(out, row, m + np.log(l) - logits[row, label])
    return out
''',
    calls=_cross_entropy,
    operator="cross_entropy",
    adapt="lambda operator, z, y, BLOCK: operator(z, y, reduction='none')",
    outputs={"out": ("N",)},
    shown=lambda: [Given("equal logits", (np.zeros((3, 4)), np.array([0, 3, 2]), 2))],
    mistakes=(
        wrong("sum not rescaled", "l is not rescaled when a new maximum comes", "What is l relative to?",
              "l * np.exp(m - new)", "l"),
        wrong("maximum of the tile", "new is the maximum of the tile", "What if the first tile has the largest logit?",
              "np.maximum(m, z.max())", "z.max()"),
        wrong("only the first tile", "only the first tile of classes is in the sum",
              "Which classes does your loop visit?",
              "range(0, V, BLOCK)", "range(0, 1, BLOCK)"),
        ways("sum overwritten", "only the last tile of classes counts: l is set and not added to, or m is never set",
             "What are l and m after two turns?", ("l = l * np.exp(m - new) +", "l ="),
             ("            m = new\n", "", "m + np.log(l)", "new + np.log(l)")),
        wrong("tail dropped", "whole tiles of classes are visited alone", "Which classes does your loop visit?",
              "range(0, V, BLOCK)", "range(0, max(V // BLOCK, 1) * BLOCK, BLOCK)"),
        wrong("other is 0", "lanes that are masked off hold 0, and count exp(0 - max)",
              "What does a lane beyond V add?",
              "i < V, -np.inf)", "i < V, 0.0)"),
        wrong("maximum not added", "the maximum is not added again outside the logarithm", "What if a row is shifted?",
              "m + np.log(l)", "np.log(l)"),
        wrong("sign", "the sign is wrong", "Can a loss be negative?",
              "m + np.log(l) - logits[row, label]", "logits[row, label] - m - np.log(l)"),
        wrong("label's logit missing", "the label's logit is not subtracted: it is the logsumexp",
              "Where is the label used?",
              " - logits[row, label])", ")"),
        wrong("ignored rows counted", "a label of -100 is read as class 0", "What becomes of label -100?",
              "            store(out, row, 0.0)\n            continue\n", "            label = 0\n"),
        wrong("ignored rows not written", "nothing is stored for a label of -100", "What is stored for label -100?",
              "            store(out, row, 0.0)\n", ""),
        wrong("label minus one", "the class before the label is read", "Which column belongs to label 0?",
              "logits[row, label]", "logits[row, label - 1]"),
        wrong("label's logit from row 0", "the label's logit is read from row 0",
              "Where does the row of program 1 begin?",
              "- logits[row, label]", "- logits[0, label]"),
        wrong("row 0 for all", "every program reads the logits of row 0", "Where does the row of program 1 begin?",
              "load(logits, row * V + i", "load(logits, i", "logits[row, label]", "logits[0, label]"),
        wrong("label of row 0", "every program reads the label of row 0", "Which label has program 1?",
              "labels[row]", "labels[0]"),
        wrong("probability", "it is the probability of the label", "What is your loss where the label is certain?",
              "m + np.log(l) - logits[row, label]", "np.exp(logits[row, label] - m) / l"),
        wrong("base 2", "the logarithm has the base 2", "What is your loss for two equal logits?",
              "m + np.log(l) - logits[row, label]", "(m + np.log(l) - logits[row, label]) / np.log(2)"),
        wrong("mean of V", "the mean of the exponentials is taken, and not their sum",
              "What is your loss for equal logits?",
              "np.log(l)", "np.log(l / V)"),
    ),
    hints=(
        "Equal logits, V classes: the loss is ln V. What is yours?",
        "The online softmax gives m + log(l); the label's logit is one more load; -100 comes before it.",
        "tl.store(out_ptr + row, m + tl.log(l) - tl.load(z_ptr + row * V + label)).",
    ),
)

EXERCISES = (MATMUL_KERNEL, LSE_KERNEL, FLASH_ROW, FLASH_KERNEL, DECODE_KERNEL, CROSS_ENTROPY_KERNEL)
