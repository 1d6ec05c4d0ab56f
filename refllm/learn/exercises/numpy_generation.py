"""The way from operators to text in NumPy: angles, a whole block, the cache, generation, choosing a token."""

from collections.abc import Iterator

import numpy as np

from refllm.learn.exercise import Exercise, Given, ways, wrong
from refllm.learn.exercises.draws import Draws

# fmt: off

# --------------------------------------------------------------------------------------------------- rope_tables


def _tables() -> Iterator[Given]:
    for positions, R, theta in (([0, 1, 2, 3], 6, 100.0), ([3, 4, 9], 4, 10000.0), ([5, 2, 2, 7, 1], 8, 50.0)):
        p = np.array(positions)
        yield Given(f"positions {positions}", (p, R, theta), lengths={"R": R, "S": len(p)})
    yield Given("positions of a million", (np.array([1000000, 1000003]), 4, 10000.0), corner=True)


ROPE_TABLES = Exercise(
    name="rope_tables",
    track="numpy",
    title="The angles of the rotary embedding",
    statement="""
    positions has shape [S], whole numbers; R is even, the number of dims that turn; theta is a number, such as 10000.
    Pair i (0 .. R/2 - 1) turns by the angle

        a[s, i] = positions[s] * theta^(-2 i / R)

    The results are cos(a) and sin(a), both of shape [S, R/2]. Example: positions = [0, 1], R = 2: there is one pair, it
    turns by one radian per position, so cos = [[1], [0.540]] and sin = [[0], [0.841]].

    What counts: position 0 does not turn; pair 0 turns by one radian per position, the others slower and slower.
    """,
    function="rope_tables",
    solution='''def rope_tables(positions, R, theta):
    i = np.arange(R // 2)
    frequency = theta ** (-2.0 * i / R)
    a = positions[:, None] * frequency
    return np.cos(a), np.sin(a)
''',
    calls=_tables,
    outputs={"cos": ("S", "R"), "sin": ("S", "R")},
    shown=lambda: [Given("two positions", (np.array([0, 1]), 4, 100.0))],
    mistakes=(
        wrong("exponent without two", "the exponent is -i / R, and should be -2 i / R",
              "With R = 4, what is the frequency of pair 1?", "-2.0 * i", "-1.0 * i"),
        wrong("faster and faster", "the exponent is positive: pairs turn faster and faster",
              "Which pair turns fastest?", "-2.0 * i", "2.0 * i"),
        wrong("positions counted from 1", "positions are counted from 1: position 0 turns",
              "What is the angle at position 0?", "positions[:, None]", "(positions[:, None] + 1)"),
        wrong("own positions", "the argument positions is not used: they are counted from 0",
              "What are the angles where the positions are 3, 4, 9?",
              "positions[:, None]", "np.arange(len(positions))[:, None]"),
        wrong("positions from the first", "positions are counted from the first of them",
              "What are the angles where the positions are 3, 4, 9?",
              "positions[:, None]", "(positions - positions[0])[:, None]"),
        wrong("cos and sin exchanged", "cos and sin are exchanged", "What is the cosine of 0?",
              "return np.cos(a), np.sin(a)", "return np.sin(a), np.cos(a)"),
        wrong("pairs counted from 1", "pairs are counted from 1: pair 0 does not turn by one radian",
              "By which angle does pair 0 turn per position?", "np.arange(R // 2)", "np.arange(1, R // 2 + 1)"),
        wrong("own theta", "the argument theta is not used: it is 10000",
              "Does your result change with theta?", "theta **", "10000.0 **"),
        wrong("sign of the angle", "the angle has the wrong sign", "Is the sine at position 1 positive?",
              "a = positions", "a = -positions"),
        wrong("in circles", "the angle is in turns, and not in radians",
              "By which angle does pair 0 turn per position?",
              "a = positions", "a = 2 * np.pi * positions"),
        wrong("degrees", "the angle is taken as degrees", "In which unit does np.cos take its angle?",
              "np.cos(a), np.sin(a)", "np.cos(np.pi / 180 * a), np.sin(np.pi / 180 * a)"),
        wrong("all pairs alike", "all pairs turn alike: the frequency is not used",
              "Does pair 1 turn more slowly than pair 0?", "* frequency", "* frequency[:1] ** i"),
        wrong("divided by half",
              "the exponent is -4 i / R: 2 i is divided by R/2, or i, which counts pairs, is taken four times",
              "With R = 4, what is the frequency of pair 1?", "-2.0 * i / R", "-2.0 * i / (R // 2)"),
        wrong("even spacing", "frequencies are evenly spaced, and should fall by one factor from pair to pair",
              "By which factor do neighbouring frequencies differ?",
              "theta ** (-2.0 * i / R)", "1 - (1 - 1 / theta) * 2 * i / R"),
    ),
    hints=(
        "Look at position 0: cos is 1 and sin is 0 in every column.",
        "One frequency per pair, theta to the power of -2 i / R; the angle is the position times it.",
        "positions[:, None] * frequency has the shape [S, R/2].",
    ),
)

# -------------------------------------------------------------------------------------------------------- kv_cache

_SOFTMAX = '''def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


'''


def _cache() -> Iterator[Given]:
    d = Draws(12)
    for words, P, S, D in (("three cached, one new", 3, 1, 2), ("two cached, three new", 2, 3, 4),
                           ("nothing cached", 0, 4, 3), ("five cached, two new", 5, 2, 3)):
        q, k, v = d.normal(S, D, size=2.0), d.normal(S, D, mean=0.3), d.normal(S, D)
        yield Given(words, (q, k, v, d.normal(P, D, mean=-0.2), d.normal(P, D, mean=0.4)), lengths={"D": D, "S": S})


KV_CACHE = Exercise(
    name="kv_cache",
    track="numpy",
    title="Attention with a cache of keys and values",
    statement="""
    One head. S new tokens come with q, k, v of shape [S, D]; the cache holds k_cache and v_cache of shape [P, D] of the
    P tokens before them (P may be 0). Append the new keys and values to the cache, and let the new queries attend to
    all that is in it, causally: new query s sees the P cached keys and the new keys 0 .. s. Scores are divided by
    sqrt(D). softmax, over the last axis, is there already.

    The results are (o [S, D], keys [P + S, D], values [P + S, D]). The caches that came in must not change.
    Example: P = 0, S = 1: o is v, and the new caches are k and v.

    What counts: feeding tokens one by one gives, row by row, what feeding them all at once gives.
    """,
    function="attend",
    solution=_SOFTMAX + '''def attend(q, k, v, k_cache, v_cache):
    keys = np.concatenate([k_cache, k])
    values = np.concatenate([v_cache, v])
    S, T = len(q), len(keys)
    s = q @ keys.T / np.sqrt(q.shape[-1])
    seen = np.arange(T) <= np.arange(S)[:, None] + T - S
    o = softmax(np.where(seen, s, -np.inf)) @ values
    return o, keys, values
''',
    calls=_cache,
    outputs={"o": ("S", "D"), "keys": ("T", "D"), "values": ("T", "D")},
    shown=lambda: [
        Given("scores are 0", (np.zeros((2, 2)), np.eye(2), np.eye(2), np.eye(2)[:1] * 3, np.eye(2)[:1] * 3)),
    ],
    mistakes=(
        wrong("mask counts from the cache's start",
              "the mask is aligned at the first cached key: new query 0 sees key 0 only",
              "How many keys does the first new query see, with P in the cache?", " + T - S", ""),
        wrong("no mask among the new", "all new tokens see each other: among them the mask is missing",
              "Which of the new keys does the first new query see?", "np.where(seen, s, -np.inf)", "s"),
        wrong("own key not seen", "a new token does not see its own key",
              "Does new query 0 see new key 0?", "np.arange(T) <=", "np.arange(T) < (T == S) +"),
        wrong("appended in front", "the new keys and values are put before the cached ones",
              "Where in the cache do the newest keys lie?",
              "[k_cache, k]", "[k, k_cache]", "[v_cache, v]", "[v, v_cache]"),
        wrong("values appended in front", "the new values are put before the cached ones, the keys behind them",
              "Does value t belong to key t?", "[v_cache, v]", "[v, v_cache]"),
        wrong("keys in the cache of values", "the new keys are appended to the cached values",
              "What do the weights multiply?", "[v_cache, v]", "[v_cache, k]"),
        wrong("values in the cache of keys", "the new values are appended to the cached keys",
              "With what are the queries compared?", "[k_cache, k]", "[k_cache, v]"),
        wrong("no scale", "the scores are not divided by sqrt(D)", "By what are your scores divided?",
              " / np.sqrt(q.shape[-1])", ""),
        wrong("scale of all keys", "the scores are divided by the root of the number of keys",
              "What is under your root: the width of a head or the length of the cache?",
              "np.sqrt(q.shape[-1])", "np.sqrt(T)"),
        wrong("keys for values", "the keys are averaged, and not the values", "What do the weights multiply?",
              "@ values", "@ keys"),
        wrong("softmax over the queries", "the softmax runs over the queries, and not over the keys",
              "Which sums of your weights are 1?", "softmax(np.where(seen, s, -np.inf))",
              "np.nan_to_num(softmax(np.where(seen, s, -np.inf).T).T)"),
        wrong("masked with 0", "hidden scores are 0, and not minus infinity", "What is exp(0)?", "s, -np.inf)",
              "s, 0.0)"),
        wrong("one key too many", "each query sees one later key", "Which keys does the last query see but one?",
              "+ T - S", "+ T - S + 1"),
        wrong("o of the last token for all", "every row of o is that of the last query",
              "Is every row of o its own?", "return o, keys", "return np.repeat(o[-1:], S, axis=0), keys"),
        wrong("caches exchanged", "keys and values are returned in the other order",
              "In which order are the results asked for?", "return o, keys, values", "return o, values, keys"),
        wrong("cache not seen", "the cached keys are never attended to, though they are returned",
              "Which keys does your softmax run over?", "seen = np.arange(T) <=",
              "seen = (np.arange(T) >= T - S) & (np.arange(T) <=", "+ T - S\n", "+ T - S)\n"),
    ),
    hints=(
        "With P = 3 and one new token: how many weights has it, and do they sum to 1?",
        "Append first, then attend over everything in the cache; the mask is that of S queries at the end of T.",
        "seen = np.arange(T) <= np.arange(S)[:, None] + T - S, with T = P + S.",
    ),
)

# ----------------------------------------------------------------------------------------------------------- block

_BLOCK_GIVEN = '''def rms_norm(x, weight):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def rope(x):
    """x [H, S, D], turned in halves by its position."""
    S, half = x.shape[1], x.shape[2] // 2
    angle = np.arange(S)[:, None] * 100.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def attention(q, k, v):
    """Causal, of heads [H, S, D]."""
    s = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    s = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ v


def silu(x):
    return x / (1 + np.exp(-x))


'''


def _block_inputs() -> Iterator[Given]:
    d = Draws(13)
    for S, E, H, F in ((3, 4, 2, 6), (5, 8, 2, 5), (2, 6, 1, 4)):
        matrices = (d.normal(n, m, size=0.6) for n, m in ((E, E), (E, E), (E, E), (E, E), (F, E), (F, E), (E, F)))
        x, norms = d.normal(S, E, mean=0.2), (d.weight(E), d.weight(E))
        yield Given(f"{S} tokens, {H} heads", (x, *norms, *matrices, H), lengths={"E": E, "F": F, "H": H, "S": S})


BLOCK = Exercise(
    name="block",
    track="numpy",
    title="A decoder block",
    statement="""
    x has shape [S, E]: one residual stream per token. Weights are [out, in], so a linear layer is x @ w.T. The block of
    Llama and Helium, H heads of D = E / H dims (rms_norm, rope, attention, silu are there already):

        a = rms_norm(x, norm1)
        q, k, v = a wq^T, a wk^T, a wv^T       [S, E] each, cut into heads [H, S, D]: head 0 has the first D columns
        q, k = rope(q), rope(k)                v is not turned
        x = x + (attention(q, k, v), heads side by side again) wo^T
        b = rms_norm(x, norm2)
        x = x + (silu(b gate^T) * (b up^T)) down^T

    gate and up are [F, E], down is [E, F]. The result is x, [S, E]. Example: where wo and down are 0 the block returns
    x as it came.

    What counts: the residual stream runs straight through, norms act on what branches off it, and no token sees a later
    one: row 0 of the result depends on row 0 of x alone.
    """,
    function="block",
    solution=_BLOCK_GIVEN + '''def block(x, norm1, norm2, wq, wk, wv, wo, gate, up, down, H):
    S, E = x.shape

    def heads(y):
        return y.reshape(S, H, E // H).swapaxes(0, 1)

    a = rms_norm(x, norm1)
    q, k, v = heads(a @ wq.T), heads(a @ wk.T), heads(a @ wv.T)
    o = attention(rope(q), rope(k), v)
    x = x + o.swapaxes(0, 1).reshape(S, E) @ wo.T
    b = rms_norm(x, norm2)
    return x + (silu(b @ gate.T) * (b @ up.T)) @ down.T
''',
    calls=_block_inputs,
    outputs={"x": ("S", "E")},
    mistakes=(
        wrong("no residual at attention", "the residual is not added after attention: x is replaced",
              "What does the block return where wo is 0?", "x = x + o.swapaxes", "x = o.swapaxes"),
        wrong("no residual at the MLP", "the residual is not added after the MLP",
              "What does the block return where down is 0?", "return x + (silu", "return (silu"),
        wrong("residual of the normed", "what is added to is the normed x: the stream must run straight through",
              "Does x itself reach the sum, or what the norm made of it?", "x = x + o.swapaxes", "x = a + o.swapaxes"),
        wrong("MLP's residual of the normed", "the MLP's result is added to the normed x",
              "Does x itself reach the last sum, or what the norm made of it?", "return x + (silu", "return b + (silu"),
        wrong("no first norm", "attention reads x itself: the first norm is missing", "Where is norm1 used?",
              "a = rms_norm(x, norm1)", "a = x"),
        wrong("no second norm", "the MLP reads x itself: the second norm is missing", "Where is norm2 used?",
              "b = rms_norm(x, norm2)", "b = x"),
        wrong("norms exchanged", "norm1 and norm2 are exchanged", "Which norm is whose?",
              "rms_norm(x, norm1)", "rms_norm(x, norm_2)", "rms_norm(x, norm2)", "rms_norm(x, norm1)", "norm_2",
              "norm2"),
        wrong("norm1 twice", "norm1 is used in both places", "Where is norm2 used?",
              "rms_norm(x, norm2)", "rms_norm(x, norm1)"),
        wrong("MLP beside attention", "the MLP reads the x from before attention: that is a parallel block",
              "Which x does the second norm take?", "    x = x + o.swapaxes", "    before = x\n    x = x + o.swapaxes",
              "b = rms_norm(x,", "b = rms_norm(before,"),
        wrong("k not turned", "k is not turned", "Which of q, k and v does rope turn?", "rope(k)", "k"),
        wrong("nothing turned", "neither q nor k is turned", "Where is rope used?", "rope(q), rope(k)", "q, k"),
        wrong("v turned", "v is turned as well", "Which of q, k and v does rope turn?", "rope(k), v)",
              "rope(k), rope(v))"),
        wrong("heads cut the other way", "heads are cut as [D, H]: head 0 has every H-th column",
              "Which columns belong to head 0?", "y.reshape(S, H, E // H).swapaxes(0, 1)",
              "y.reshape(S, E // H, H).transpose(2, 0, 1)"),
        wrong("heads by reshape alone", "heads and positions are mixed: [S, E] is reshaped to [H, S, D] as it lies",
              "Which tokens does row 0 of head 0 hold?", "y.reshape(S, H, E // H).swapaxes(0, 1)",
              "y.reshape(H, S, E // H)"),
        wrong("heads not put side by side",
              "heads are merged as they lie: positions and heads have to be exchanged first",
              "Whose numbers are in row 0 of what wo reads?", "o.swapaxes(0, 1).reshape(S, E)", "o.reshape(S, E)"),
        wrong("gate and up exchanged", "gate and up are exchanged: silu is taken of up",
              "Which product goes through silu?", "silu(b @ gate.T) * (b @ up.T)", "silu(b @ up.T) * (b @ gate.T)"),
        wrong("gate and up added", "silu(gate) and up are added, and should be multiplied",
              "What reaches down where silu(gate) is 0?", " * (b @ up.T)", " + (b @ up.T)"),
        wrong("silu of the product", "silu is taken of the product of gate and up", "Which product goes through silu?",
              "silu(b @ gate.T) * (b @ up.T)", "silu((b @ gate.T) * (b @ up.T))"),
        wrong("k and v exchanged", "wk and wv are exchanged", "Which matrix makes the keys?",
              "heads(a @ wk.T), heads(a @ wv.T)", "heads(a @ wv.T), heads(a @ wk.T)"),
        wrong("v turned, and k not", "v is turned, and k is not", "Which of q, k and v does rope turn?",
              "rope(k), v)", "k, rope(v))"),
        wrong("attention's norm again", "the MLP reads what attention read, and not the norm of the new x",
              "Which x does the second norm take?", "b = rms_norm(x, norm2)", "b = a"),
        wrong("residual twice", "x is added twice", "How often is x added?", "x = x + o.swapaxes",
              "x = x + x + o.swapaxes"),
        wrong("no silu", "there is no activation", "Where is silu used?", "silu(b @ gate.T)", "(b @ gate.T)"),
        wrong("q and k exchanged", "wq and wk are exchanged", "Which matrix makes the queries?",
              "heads(a @ wq.T), heads(a @ wk.T)", "heads(a @ wk.T), heads(a @ wq.T)"),
        wrong("wo not transposed", "the product with wo lacks its transpose", "Which axis of wo is the input?",
              "@ wo.T", "@ wo"),
        wrong("wq not transposed", "the product with wq lacks its transpose", "Which axis of wq is the input?",
              "a @ wq.T", "a @ wq"),
        wrong("up not used", "up is not multiplied", "Where is up used?", " * (b @ up.T)", ""),
        wrong("norm after the block", "the norms act on the sums and not on the branches: that is post-norm",
              "Where does the norm stand: on the branch or on the stream?",
              "a = rms_norm(x, norm1)", "a = x", "    b = rms_norm(x, norm2)\n", "    b = x = rms_norm(x, norm1)\n",
              "return x + (silu(b @ gate.T) * (b @ up.T)) @ down.T",
              "return rms_norm(x + (silu(b @ gate.T) * (b @ up.T)) @ down.T, norm2)"),
    ),
    hints=(
        "Set wo and down to 0 in your mind: what does your block return? It should be x.",
        "Row 0 sees itself alone: its rotation is none and its weights are 1, so it can be followed by hand.",
        "y.reshape(S, H, D).swapaxes(0, 1) cuts into heads; o.swapaxes(0, 1).reshape(S, E) puts them side by side.",
    ),
)

# -------------------------------------------------------------------------------------------------------- generate

_GENERATE_GIVEN = _SOFTMAX + '''def rotate(x, positions):
    """x [N, D], each row turned by its position."""
    half = x.shape[-1] // 2
    a = np.asarray(positions)[:, None] * 0.7 ** np.arange(half)
    u, w = x[:, :half], x[:, half:]
    return np.concatenate([u * np.cos(a) - w * np.sin(a), w * np.cos(a) + u * np.sin(a)], axis=-1)


'''


def _generation() -> Iterator[Given]:
    d = Draws(14)
    for V, D, n, steps in ((7, 4, 3, 4), (8, 4, 4, 5), (6, 2, 2, 3)):
        matrices = tuple(d.normal(*shape, size=1.2) for shape in ((V, D), (D, D), (D, D), (D, D), (D, V)))
        yield Given(f"{n} tokens of prompt, {steps} steps", (*matrices, d.integers(V, n), steps), lengths={"D": D})


GENERATE = Exercise(
    name="generate",
    track="numpy",
    title="Greedy generation with a cache",
    statement="""
    A model of one layer and one head. emb is [V, D], wq, wk, wv are [D, D] (used as x @ wq), head is [D, V], prompt is
    an array of token ids. Each step feeds the tokens that are new (all of the prompt at first, then the one that was
    chosen), at their positions in the whole sequence, counted from 0:

        x = emb[new];    q, k = rotate(x @ wq, positions), rotate(x @ wk, positions);    v = x @ wv
        k and v are appended to the cache; the new queries attend to all of it, causally, with scores over sqrt(D)
        logits = (x + attended) @ head;    the next token is the largest of the last row, and is fed in the next step

    The results are (the logits of the last row in every step [steps, V], the tokens of prompt and generation
    [len(prompt) + steps]). rotate and softmax are there already. Example: a prompt of 3 tokens and 2 steps: the first
    step feeds 3 tokens at the positions 0, 1, 2, the second feeds 1 token at position 3, with 4 keys in the cache.

    What counts: with the cache and without it the same tokens come out; a token keeps its position for ever.
    """,
    function="generate",
    solution=_GENERATE_GIVEN + '''def generate(emb, wq, wk, wv, head, prompt, steps):
    tokens, new, past = list(prompt), list(prompt), 0
    keys, values = np.zeros((0, emb.shape[1])), np.zeros((0, emb.shape[1]))
    logits = []
    for _ in range(steps):
        x = emb[new]
        positions = past + np.arange(len(new))
        q, k, v = rotate(x @ wq, positions), rotate(x @ wk, positions), x @ wv
        keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
        s = q @ keys.T / np.sqrt(x.shape[-1])
        seen = np.arange(len(keys)) <= positions[:, None]
        y = (x + softmax(np.where(seen, s, -np.inf)) @ values) @ head
        past += len(new)
        token = int(y[-1].argmax())
        logits.append(y[-1])
        tokens.append(token)
        new = [token]
    return np.array(logits), np.array(tokens)
''',
    calls=_generation,
    outputs={"logits": ("S", "V"), "tokens": ("N",)},
    mistakes=(
        wrong("position restarts", "every new token is rotated as position 0: the length of the cache is not added",
              "Which position has the first generated token?",
              "positions = past + np.arange(len(new))", "positions = np.arange(len(new))",
              "<= positions[:, None]", "<= past + positions[:, None]"),
        wrong("position plus one", "the position grows by one after the prompt, and should grow by its length",
              "Which position has the first generated token, after a prompt of three?",
              "past += len(new)", "past += 1",
              "<= positions[:, None]", "<= np.arange(len(new))[:, None] + len(keys) - len(new)"),
        wrong("position counts all tokens", "the position grows by all tokens so far, and not by those of the step",
              "By how much does the position grow in a step that feeds one token?",
              "past += len(new)", "past += len(tokens)",
              "<= positions[:, None]", "<= np.arange(len(new))[:, None] + len(keys) - len(new)"),
        wrong("positions from 1", "generated tokens have a position one too large",
              "Which position has the first generated token, after a prompt of three?",
              "positions = past + np.arange(len(new))", "positions = past + np.arange(len(new)) + (past > 0)",
              "<= positions[:, None]", "<= np.arange(len(new))[:, None] + len(keys) - len(new)"),
        ways("cache replaced", "the cache is replaced, and not extended: a new token sees only itself",
             "How many keys does the second step see?",
             ("keys, values = np.concatenate([keys, k]), np.concatenate([values, v])", "keys, values = k, v",
              "<= positions[:, None]", "<= np.arange(len(new))[:, None]")),
        wrong("mask at the first key", "the mask is aligned at the first key: a new token sees key 0 only",
              "How many keys does a generated token see?",
              "<= positions[:, None]", "<= np.arange(len(new))[:, None]"),
        wrong("prompt fed again",
              "the whole sequence is fed in each step although the cache holds it: keys are doubled",
              "Which tokens does the second step feed?", "new = [token]", "new = tokens[:]"),
        wrong("token not fed", "the chosen token is never fed: the prompt's last one is",
              "Which token does the second step feed?", "new = [token]", "new = [prompt[-1]]"),
        wrong("logits of the first row", "the next token is taken from the first row, and not from the last",
              "Which row of logits predicts the next token?", "y[-1].argmax()", "y[0].argmax()"),
        wrong("logits of the first row kept", "the logits that are kept are those of the first row",
              "Which row of logits is asked for?", "logits.append(y[-1])", "logits.append(y[0])"),
        wrong("largest of all rows", "the largest logit of all rows is chosen, and not of the last",
              "Over which numbers does your argmax run?", "int(y[-1].argmax())", "int(y.argmax() % y.shape[1])"),
        wrong("k cached unturned", "k goes into the cache without its rotation",
              "Which of q, k and v are rotated?", "rotate(x @ wk, positions), x @ wv", "x @ wk, x @ wv"),
        wrong("q not turned", "q is not rotated", "Which of q, k and v are rotated?",
              "rotate(x @ wq, positions)", "x @ wq"),
        wrong("v turned", "v is rotated as well", "Which of q, k and v are rotated?",
              ", x @ wv", ", rotate(x @ wv, positions)"),
        wrong("cached keys turned again", "the cached keys are rotated again in every step",
              "How often is a key rotated on its way into the softmax?",
              "np.concatenate([keys, k])", "np.concatenate([rotate(keys, np.arange(len(keys))), k])"),
        wrong("newest key not seen", "in generation a token does not see its own key",
              "When is the new key appended: before or after attending?",
              "<= positions[:, None]", "<= positions[:, None] - (past > 0)"),
        wrong("smallest logit", "the smallest logit is chosen", "Which logit is the most likely token?",
              "argmax()", "argmin()"),
        wrong("no scale", "the scores are not divided by sqrt(D)", "By what are your scores divided?",
              " / np.sqrt(x.shape[-1])", ""),
        wrong("no residual", "x is not added to what attention gives", "What does the head read?",
              "(x + softmax", "(softmax"),
    ),
    hints=(
        "Compare the first step with the second: if the first is right, the mistake is in what is carried over.",
        "Three things are carried: the cache grows by the new keys, the position by the new tokens, one token is fed.",
        "positions = past + np.arange(len(new)); seen = np.arange(len(keys)) <= positions[:, None].",
    ),
)

# ----------------------------------------------------------------------------------------------------------- top_p


def _nucleus() -> Iterator[Given]:
    def logits(*p: float) -> np.ndarray:
        return np.log(np.array(p)).round(3)

    yield Given("p between the sums", (logits(0.1, 0.4, 0.2, 0.3), 0.55, 1.0))
    yield Given("p is small", (logits(0.35, 0.1, 0.3, 0.25), 0.15, 1.0))
    yield Given("a temperature of 2", (logits(0.05, 0.5, 0.15, 0.25, 0.05), 0.7, 2.0))
    yield Given("a temperature of a half", (Draws(15).normal(6, size=1.2), 0.85, 0.5))
    yield Given("everything", (Draws(16).normal(5), 1.0, 0.8))
    yield Given("one token is likelier than p", (logits(0.1, 0.8, 0.1001), 0.3, 1.0), corner=True)


TOP_P = Exercise(
    name="top_p",
    track="numpy",
    title="Temperature and the nucleus (top-p)",
    statement="""
    logits has shape [V]; p is a share, temperature a positive number. Turn logits into the probabilities from which a
    token is drawn:

        1. logits / temperature, then softmax
        2. sort the probabilities from large to small; keep the fewest of them, from the largest on, that sum to at
           least p; at least one
        3. the others become 0, and those that are kept are divided by their sum

    The result has shape [V], in the order of the logits. Example: probabilities (0.5, 0.2, 0.3), p = 0.7,
    temperature 1: 0.5 is not enough, 0.5 + 0.3 is, so the result is (0.625, 0, 0.375).

    What counts: the token that carries the sum over p is kept; the result sums to 1.
    """,
    function="top_p",
    solution='''def top_p(logits, p, temperature):
    z = logits / temperature
    e = np.exp(z - z.max())
    probs = e / e.sum()
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[before < p]
    out = np.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()
''',
    calls=_nucleus,
    outputs={"probs": ("V",)},
    shown=lambda: [Given("one half, one fifth, the rest", (np.log(np.array([0.5, 0.2, 0.3])), 0.7, 1.0))],
    mistakes=(
        ways("one too few", "the token that carries the sum over p is dropped, and should be kept",
             "Do the tokens that you keep sum to at least p?",
             ("order[before < p]", "order[before + probs[order] <= p]"),
             ("order[before < p]", "order[before + probs[order] < p]"),
             ("order[before < p]", "order[np.maximum(before + probs[order] <= p, np.arange(len(order)) == 0)]")),
        wrong("one too many", "one token too many is kept", "Would fewer tokens also sum to p?",
              "order[before < p]", "order[np.roll(before, 1) * (np.arange(len(before)) > 0) < p]"),
        wrong("not divided again", "what is kept is not divided by its sum", "What does your result sum to?",
              "return out / out.sum()", "return out"),
        wrong("from the smallest", "the smallest probabilities are kept", "In which order do you sum?",
              "np.argsort(-probs)", "np.argsort(probs)"),
        wrong("temperature multiplied", "the logits are multiplied by the temperature, and should be divided",
              "Does a high temperature make probabilities more alike?", "logits / temperature", "logits * temperature"),
        wrong("temperature ignored", "the temperature is not used", "Where is the temperature used?",
              "logits / temperature", "logits"),
        wrong("temperature after the softmax", "the probabilities are divided by the temperature, and not the logits",
              "Does your temperature change the ratio of two probabilities?",
              "z = logits / temperature", "z = logits", "probs = e / e.sum()", "probs = e / e.sum() / temperature"),
        wrong("temperature after the cut", "the nucleus is chosen before the temperature is applied",
              "Which probabilities do you sum: with or without temperature?",
              "order = np.argsort(-probs)",
              "cold = np.exp(logits - logits.max())\n    cold = cold / cold.sum()\n    order = np.argsort(-cold)",
              "np.cumsum(probs[order]) - probs[order]", "np.cumsum(cold[order]) - cold[order]"),
        wrong("softmax again", "what is kept goes through a softmax again, as probabilities",
              "What is the ratio of two kept probabilities before and after?",
              "return out / out.sum()", "w = np.where(out > 0, np.exp(out), 0)\n    return w / w.sum()"),
        wrong("equal shares", "all that are kept have the same probability", "Are kept tokens still unequal?",
              "out[kept] = probs[kept]", "out[kept] = 1.0"),
        wrong("in sorted order", "the result is in the order of the sorting, and not in that of the logits",
              "Which token has the first probability of your result?",
              "return out / out.sum()", "return (out / out.sum())[order]"),
        wrong("threshold", "probabilities below p are dropped, and not those behind the sum",
              "With p = 0.7, what becomes of a token of probability 0.5?",
              "order[before < p]", "order[probs[order] >= min(p, probs.max())]"),
        wrong("threshold 1 - p", "probabilities below 1 - p are dropped: the sum is not looked at",
              "Which sum decides whether a token is kept?", "order[before < p]", "order[probs[order] >= 1 - p]"),
        wrong("logits summed", "the sorted logits are summed, and not the probabilities",
              "What do you sum: can it be negative?", "np.cumsum(probs[order]) - probs[order]",
              "np.cumsum(z[order]) - z[order]"),
        wrong("1 - p for p", "tokens are kept up to 1 - p, and should be up to p",
              "How much do your kept tokens sum to?",
              "order[before < p]", "order[before <= 1 - p]"),
        wrong("nothing cut", "nothing is dropped", "Where is p used?", "order[before < p]", "order"),
        wrong("only the largest", "only the largest is kept: that is greedy", "How many tokens sum to p?",
              "order[before < p]", "order[:1]"),
    ),
    hints=(
        "Sum up what you keep: is it at least p, and would one token less be enough?",
        "Sort, sum up, and keep a token if what stands before it is still less than p.",
        "before = np.cumsum(sorted) - sorted; order[before < p] are the kept tokens.",
    ),
)

EXERCISES = (ROPE_TABLES, KV_CACHE, BLOCK, GENERATE, TOP_P)
