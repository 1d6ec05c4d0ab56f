"""Answers to the NumPy track as people write them: right ones, and mistakes as edits of the first right one.

RIGHT: exercise -> two texts. WRONG: exercise -> (the name of the mistake, old, new, ...).
"""

# fmt: off

RIGHT = {
    "swiglu": ('''
def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def swiglu(gate, up):
    s = sigmoid(gate)
    act = gate * s
    return act * up
''', '''
def swiglu(gate, up):
    out = np.empty_like(gate)
    for i in np.ndindex(gate.shape):
        g = gate[i]
        e = np.exp(-abs(g))
        s = 1 / (1 + e) if g > 0 else e / (1 + e)
        out[i] = g * s * up[i]
    return out
'''),
    "softmax": ('''
def softmax(x):
    m = np.max(x, -1)
    z = np.exp(x - m[..., None])
    total = np.sum(z, -1)
    return z / total[..., None]
''', '''
def softmax(x):
    rows = x.reshape(-1, x.shape[-1])
    out = []
    for row in rows:
        row = row - max(row)
        lse = np.log(sum(np.exp(row)))
        out.append(np.exp(row - lse))
    return np.array(out).reshape(x.shape)
'''),
    "rms_norm": ('''
def rms_norm(x, weight, eps):
    var = (x ** 2).mean(-1)
    scale = (var + eps) ** -0.5
    return x * scale[..., None] * weight
''', '''
def rms_norm(x, weight, eps):
    flat = x.reshape(-1, x.shape[-1])
    y = np.zeros_like(flat)
    for r, row in enumerate(flat):
        y[r] = row / np.sqrt(row @ row / len(row) + eps) * weight
    return y.reshape(x.shape)
'''),
    "layer_norm": ('''
def layer_norm(x, weight, bias, eps):
    mu = np.mean(x, -1)[..., None]
    sigma2 = np.var(x, -1)[..., None]
    xhat = (x - mu) * (sigma2 + eps) ** -0.5
    return xhat * weight + bias
''', '''
def layer_norm(x, weight, bias, eps):
    n = x.shape[-1]
    m = x.sum(-1, keepdims=True) / n
    v = ((x - m) ** 2).sum(-1, keepdims=True) / n
    inv = 1 / np.sqrt(v + eps)
    return x * inv * weight - m * inv * weight + bias
'''),
    "rope_tables": ('''
def rope_tables(positions, R, theta):
    dims = np.arange(0, R, 2)
    inv_freq = 1.0 / theta ** (dims / R)
    angles = np.outer(positions, inv_freq)
    return np.cos(angles), np.sin(angles)
''', '''
def rope_tables(positions, R, theta):
    cos = np.zeros((len(positions), R // 2))
    sin = np.zeros((len(positions), R // 2))
    for s, p in enumerate(positions):
        for i in range(R // 2):
            a = p * np.exp(-2 * i / R * np.log(theta))
            cos[s, i], sin[s, i] = np.cos(a), np.sin(a)
    return cos, sin
'''),
    "rope": ('''
def rope(x, cos, sin):
    r = cos.shape[-1]
    x1 = x[..., 0:r]
    x2 = x[..., r:2 * r]
    rest = x[..., 2 * r:]
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return np.concatenate([y1, y2, rest], axis=-1)
''', '''
def rope(x, cos, sin):
    R = 2 * cos.shape[-1]
    c, s = np.concatenate([cos, cos], -1), np.concatenate([sin, sin], -1)
    t = x[..., :R]
    turned = np.concatenate([-t[..., R // 2:], t[..., :R // 2]], -1)
    out = np.array(x)
    out[..., :R] = t * c + turned * s
    return out
'''),
    "attention": ('''
def softmax(z):
    z = z - z.max(-1, keepdims=True)
    w = np.exp(z)
    return w / w.sum(-1, keepdims=True)


def attention(q, k, v):
    B, H, S, D = q.shape
    K, T = k.shape[1], k.shape[2]
    scale = 1 / D ** 0.5
    out = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // K)
            scores = q[b, h] @ k[b, g].T * scale
            mask = np.triu(np.ones((S, T), bool), k=1 + T - S)
            scores[mask] = -np.inf
            out[b, h] = softmax(scores) @ v[b, g]
    return out
''', '''
def attention(q, k, v):
    B, H, S, D = q.shape
    K, T = k.shape[1:3]
    q5 = q.reshape(B, K, H // K, S, D)
    scores = np.einsum("bkgsd,bktd->bkgst", q5, k) / np.sqrt(D)
    hidden = np.arange(T)[None, :] > np.arange(S)[:, None] + (T - S)
    scores = scores + np.where(hidden, -np.inf, 0)
    scores -= scores.max(-1, keepdims=True)
    w = np.exp(scores)
    return (np.einsum("bkgst,bktd->bkgsd", w, v) / w.sum(-1, keepdims=True)).reshape(B, H, S, D)
'''),
    "kv_cache": ('''
def attend(q, k, v, k_cache, v_cache):
    P, S = len(k_cache), len(q)
    K = np.vstack([k_cache, k])
    V = np.vstack([v_cache, v])
    scale = np.sqrt(q.shape[1])
    out = []
    for s in range(S):
        n = P + s + 1
        scores = K[:n] @ q[s] / scale
        w = np.exp(scores - scores.max())
        out.append(w @ V[:n] / w.sum())
    return np.array(out), K, V
''', '''
def attend(q, k, v, k_cache, v_cache):
    keys, values = np.append(k_cache, k, axis=0), np.append(v_cache, v, axis=0)
    scores = q @ keys.T * q.shape[1] ** -0.5
    S, T = scores.shape
    scores[np.triu_indices(S, T - S + 1, T)] = -np.inf
    w = np.exp(scores - scores.max(1)[:, None])
    w /= w.sum(1)[:, None]
    return w @ values, keys, values
'''),
    "cross_entropy": ('''
def cross_entropy(logits, labels):
    out = np.zeros(len(labels))
    for n, label in enumerate(labels):
        if label == -100:
            continue
        z = logits[n] - logits[n].max()
        out[n] = np.log(np.exp(z).sum()) - z[label]
    return out
''', '''
def cross_entropy(logits, labels):
    logp = logits - np.max(logits, 1, keepdims=True)
    logp = logp - np.log(np.sum(np.exp(logp), 1, keepdims=True))
    keep = labels >= 0
    loss = np.zeros(len(logits))
    loss[keep] = -logp[keep, labels[keep]]
    return loss
'''),
    "block": ('''
def rms_norm(x, weight):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def turn(x):
    S, D = x.shape
    half = D // 2
    f = 100.0 ** (-np.arange(half) / half)
    c, s = np.cos(np.outer(np.arange(S), f)), np.sin(np.outer(np.arange(S), f))
    a, b = x[:, :half], x[:, half:]
    return np.hstack([a * c - b * s, b * c + a * s])


def block(x, norm1, norm2, wq, wk, wv, wo, gate, up, down, H):
    S, E = x.shape
    D = E // H
    n = rms_norm(x, norm1)
    Q, K, V = n @ wq.T, n @ wk.T, n @ wv.T
    parts = []
    for h in range(H):
        c = slice(h * D, (h + 1) * D)
        s = turn(Q[:, c]) @ turn(K[:, c]).T / np.sqrt(D)
        s[np.triu_indices(S, 1)] = -np.inf
        w = np.exp(s - s.max(1, keepdims=True))
        parts.append(w / w.sum(1, keepdims=True) @ V[:, c])
    h1 = x + np.hstack(parts) @ wo.T
    m = rms_norm(h1, norm2)
    g, u = m @ gate.T, m @ up.T
    mlp = (g / (1 + np.exp(-g)) * u) @ down.T
    return h1 + mlp
''', '''
def block(x, norm1, norm2, wq, wk, wv, wo, gate, up, down, H):
    def norm(t, w):
        return t / np.sqrt(np.square(t).mean(1)[:, None] + 1e-5) * w

    S, E = x.shape
    D = E // H
    a = norm(x, norm1)
    q, k, v = (np.einsum("se,oe->so", a, w).reshape(S, H, D) for w in (wq, wk, wv))
    i = np.arange(D // 2)
    ang = np.arange(S)[:, None] / 100.0 ** (i / (D // 2))
    rot = np.exp(1j * ang)[:, None, :]

    def rope(t):
        z = (t[..., :D // 2] + 1j * t[..., D // 2:]) * rot
        return np.concatenate([z.real, z.imag], -1)

    s = np.einsum("shd,thd->hst", rope(q), rope(k)) / D ** 0.5
    s = s + np.triu(np.full((S, S), -np.inf), 1)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    x = x + np.einsum("hst,thd->shd", p, v).reshape(S, E) @ wo.T
    b = norm(x, norm2)
    z = b @ gate.T
    return x + (z * (1 / (1 + np.exp(-z))) * (b @ up.T)) @ down.T
'''),
    "generate": ('''
def rotate(x, positions):
    half = x.shape[-1] // 2
    a = np.asarray(positions)[:, None] * 0.7 ** np.arange(half)
    u, w = x[:, :half], x[:, half:]
    return np.concatenate([u * np.cos(a) - w * np.sin(a), w * np.cos(a) + u * np.sin(a)], axis=-1)


def generate(emb, wq, wk, wv, head, prompt, steps):
    D = emb.shape[1]
    seq = [int(t) for t in prompt]
    K, V, logs = [], [], []
    feed = seq[:]
    for step in range(steps):
        start = len(K)
        pos = [start + i for i in range(len(feed))]
        h = emb[feed]
        Q = rotate(h @ wq, pos)
        K.extend(rotate(h @ wk, pos))
        V.extend(h @ wv)
        last = Q[-1]
        s = np.array(K) @ last / np.sqrt(D)
        w = np.exp(s - s.max())
        y = (h[-1] + w @ np.array(V) / w.sum()) @ head
        logs.append(y)
        nxt = int(np.argmax(y))
        seq.append(nxt)
        feed = [nxt]
    return np.stack(logs), np.array(seq)
''', '''
def rotate(x, positions):
    half = x.shape[-1] // 2
    a = np.asarray(positions)[:, None] * 0.7 ** np.arange(half)
    u, w = x[:, :half], x[:, half:]
    return np.concatenate([u * np.cos(a) - w * np.sin(a), w * np.cos(a) + u * np.sin(a)], axis=-1)


def generate(emb, wq, wk, wv, head, prompt, steps):
    tokens = np.array(prompt)
    rows = []
    for _ in range(steps):
        x = emb[tokens]
        p = np.arange(len(tokens))
        q, k, v = rotate(x @ wq, p)[-1], rotate(x @ wk, p), x @ wv
        s = k @ q / emb.shape[1] ** 0.5
        w = np.exp(s - s.max())
        rows.append((x[-1] + w @ v / w.sum()) @ head)
        tokens = np.append(tokens, rows[-1].argmax())
    return np.array(rows), tokens
'''),
    "top_p": ('''
def top_p(logits, p, temperature):
    scaled = logits / temperature
    prob = np.exp(scaled - scaled.max())
    prob = prob / prob.sum()
    idx = np.argsort(prob)[::-1]
    total = 0.0
    keep = []
    for i in idx:
        keep.append(i)
        total += prob[i]
        if total >= p:
            break
    result = np.zeros(len(prob))
    result[keep] = prob[keep]
    return result / result.sum()
''', '''
def top_p(logits, p, temperature):
    z = np.asarray(logits) / temperature
    w = np.exp(z - np.logaddexp.reduce(z))
    larger = (w[None, :] > w[:, None]) @ w
    w = np.where(larger < p, w, 0)
    return w / w.sum()
'''),
}

WRONG = {
    "swiglu": [
        ("gate and up exchanged", "sigmoid(gate)", "sigmoid(up)", "gate * s", "up * s", "act * up", "act * gate"),
        ("sigmoid alone", "act = gate * s", "act = s"), ("no activation", "gate * s", "gate"),
        ("up left out", "return act * up", "return act"), ("added", "act * up", "act + up"),
        ("relu", "act = gate * s", "act = np.where(gate > 0, gate, 0.0)"),
        ("quick gelu", "sigmoid(gate)", "sigmoid(1.702 * gate)"), ("sign of the exponent", "(0, -z)", "(0, z)"),
        ("silu of both", "act * up", "act * up * sigmoid(up)"), ("silu of the product", "s = sigmoid(gate)",
         "gate = gate * up; s = sigmoid(gate)", "return act * up", "return act"),
        ("exponential overflows", "return np.exp(-np.logaddexp(0, -z))", "return np.exp(z) / (np.exp(z) + 1)"),
    ],
    "softmax": [
        ("maximum not subtracted", "x - m[..., None]", "x"), ("not divided", "z / total[..., None]", "z"),
        ("one maximum for all", "m[..., None]", "x.max()"),
        ("sum of everything", "total = np.sum(z, -1)", "total = np.sum(z)", "total[..., None]", "total"),
        ("sum of everything", "m[..., None]", "np.max(x)", "np.sum(z, -1)", "np.sum(z) * np.ones(x.shape[:-1])"),
        ("down the columns", "np.max(x, -1)", "np.max(x, 0)", "m[..., None]", "m", "np.sum(z, -1)", "np.sum(z, 0)",
         "total[..., None]", "total"),
        ("base 2", "np.exp(x - m[..., None])", "2.0 ** (x - m[..., None])"), ("mean for sum", "np.sum(z", "np.mean(z"),
        ("numerator not shifted", "return z /", "return np.exp(x) /"), ("minimum subtracted", "np.max(x", "np.min(x"),
        ("logarithm", "return z / total[..., None]", "return np.log(z / total[..., None])"),
        ("constant added below", "total[..., None]", "(total[..., None] + 1e-3)"),
    ],
    "rms_norm": [
        ("eps outside the root", "(var + eps) ** -0.5", "1 / (var ** 0.5 + eps)"), ("no eps", "var + eps", "var"),
        ("own eps", "var + eps", "var + 1e-6"), ("mean subtracted", "(x ** 2)",
        "((x - x.mean(-1, keepdims=True)) ** 2)",
         "return x *", "return (x - x.mean(-1, keepdims=True)) *"),
        ("weight plus one", "* weight", "* (weight + 1.0)"), ("no weight", " * weight", ""),
        ("sum for mean", ".mean(-1)", ".sum(-1)"), ("root forgotten", "** -0.5", "** -1.0"),
        ("multiplied by the root", "** -0.5", "** 0.5"), ("square of the mean", "(x ** 2).mean(-1)", "x.mean(-1) ** 2"),
        ("mean of everything", "(x ** 2).mean(-1)", "(x ** 2).mean() * np.ones(x.shape[:-1])"),
        ("n - 1", "(x ** 2).mean(-1)", "(x ** 2).sum(-1) / (x.shape[-1] - 1)"),
        ("weight before the norm", "var = (x ** 2)", "x = x * weight; var = (x ** 2)", "[..., None] * weight",
        "[..., None]"),
    ],
    "layer_norm": [
        ("n - 1", "np.var(x, -1)", "np.var(x, -1, ddof=1)"),
        ("eps outside the root", "(sigma2 + eps) ** -0.5", "1 / (np.sqrt(sigma2) + eps)"),
        ("n - 1 and eps outside", "np.var(x, -1)", "np.var(x, -1, ddof=1)", "(sigma2 + eps) ** -0.5",
         "1 / (np.sqrt(sigma2) + eps)"),
        ("no eps", "sigma2 + eps", "sigma2"), ("numerator not centred", "(x - mu)", "x"),
        ("root forgotten", "** -0.5", "** -1.0"), ("weight and bias exchanged", "xhat * weight + bias",
        "xhat * bias + weight"),
        ("bias before the weight", "xhat * weight + bias", "(xhat + bias) * weight"), ("no bias", " + bias", ""),
        ("down the columns", "np.mean(x, -1)[..., None]", "np.mean(x, 0)", "np.var(x, -1)[..., None]", "np.var(x, 0)"),
        ("statistics of everything", "np.mean(x, -1)[..., None]", "x.mean()", "np.var(x, -1)[..., None]", "x.var()"),
        ("mean square for variance", "np.var(x, -1)", "np.mean(x ** 2, -1)"),
    ],
    "rope_tables": [
        ("exponent without two", "dims / R", "dims / 2 / R"), ("divided by half", "dims / R", "dims / (R // 2)"),
        ("faster and faster", "1.0 / theta", "theta"), ("own theta", "1.0 / theta", "1.0 / 10000.0"),
        ("positions counted from 1", "np.outer(positions", "np.outer(positions + 1"),
        ("own positions", "np.outer(positions", "np.outer(range(len(positions))"),
        ("cos and sin exchanged", "np.cos(angles), np.sin(angles)", "np.sin(angles), np.cos(angles)"),
        ("sign of the angle", "np.outer(positions", "np.outer(-positions"),
        ("degrees", "angles = np.outer(positions, inv_freq)", "angles = np.radians(np.outer(positions, inv_freq))"),
    ],
    "rope": [
        ("turned the wrong way", "- x2 * sin", "+ x2 * sin", "+ x1 * sin", "- x1 * sin"),
        ("both signs plus", "- x2 * sin", "+ x2 * sin"), ("both signs minus", "+ x1 * sin", "- x1 * sin"),
        ("first half overwritten", "+ x1 * sin", "+ y1 * sin"),
        ("cos and sin exchanged", "r = cos.shape[-1]", "cos, sin = sin, cos; r = cos.shape[-1]",
         "x1 * cos - x2 * sin", "x1 * cos - x2 * sin"),
        ("always position 0", "r = cos.shape[-1]", "cos = cos[0]; sin = sin[0]; r = cos.shape[-1]"),
        ("pairs side by side", "x[..., 0:r]", "x[..., 0:2 * r:2]", "x[..., r:2 * r]", "x[..., 1:2 * r:2]"),
        ("position one late", "r = cos.shape[-1]",
        "cos = np.roll(cos, 1, 0); sin = np.roll(sin, 1, 0); r = cos.shape[-1]"),
        ("only the first half", "y2 = x2 * cos + x1 * sin", "y2 = x2"),
        ("the rest is zero", "rest = x[..., 2 * r:]", "rest = 0 * x[..., 2 * r:]"),
    ],
    "attention": [
        ("no scale", "scale = 1 / D ** 0.5", "scale = 1"), ("divided by D", "D ** 0.5", "D"),
        ("multiplied by the root", "1 / D ** 0.5", "D ** 0.5"), ("root of the model width", "D ** 0.5",
        "(D * H) ** 0.5"),
        ("no causal mask", "            scores[mask] = -np.inf\n", ""), ("own position masked", "k=1 + T - S",
        "k=T - S"),
        ("one key too many", "k=1 + T - S", "k=2 + T - S"), ("mask at the top left", "k=1 + T - S", "k=1"),
        ("masked with 0", "= -np.inf", "= 0"), ("heads tiled", "h // (H // K)", "h % K"),
        ("masked after the softmax", "            scores[mask] = -np.inf\n", "",
         "softmax(scores) @", "np.where(mask, 0, softmax(scores)) @"),
        ("k for v", "@ v[b, g]", "@ k[b, g]"), ("maximum not subtracted", "    z = z - z.max(-1, keepdims=True)\n", ""),
        ("not normalised", "w / w.sum(-1, keepdims=True)", "w"), ("first key head for all", "h // (H // K)", "0"),
        ("softmax over the queries", "z.max(-1, keepdims=True)", "z.max(0)", "w.sum(-1, keepdims=True)", "w.sum(0)"),
        ("mask added as 0 and 1", "scores[mask] = -np.inf", "scores = scores + ~mask"),
    ],
    "kv_cache": [
        ("mask counts from the cache's start", "n = P + s + 1", "n = s + 1"),
        ("no mask among the new", "n = P + s + 1", "n = P + S"),
        ("appended in front", "[k_cache, k]", "[k, k_cache]", "[v_cache, v]", "[v, v_cache]"),
        ("values appended in front", "[v_cache, v]", "[v, v_cache]"), ("keys in the cache of values", "[v_cache, v]",
         "[v_cache, k]"), ("no scale", " / scale", ""), ("scale of all keys", "np.sqrt(q.shape[1])", "np.sqrt(len(K))"),
        ("keys for values", "w @ V[:n]", "w @ K[:n]"), ("caches exchanged", "np.array(out), K, V",
        "np.array(out), V, K"),
        ("one key too many", "n = P + s + 1", "n = min(P + S, P + s + 2)"),
        ("o of the last token for all", "np.array(out), K", "np.array(out[-1:] * S), K"),
    ],
    "cross_entropy": [
        ("sign", "np.log(np.exp(z).sum()) - z[label]", "z[label] - np.log(np.exp(z).sum())"),
        ("maximum not subtracted", "logits[n] - logits[n].max()", "logits[n]"),
        ("logarithm of the probability", "np.log(np.exp(z).sum()) - z[label]",
        "-np.log(np.exp(z[label]) / np.exp(z).sum())"),
        ("clipped", "np.log(np.exp(z).sum()) - z[label]", "-np.log(np.exp(z[label]) / np.exp(z).sum() + 1e-9)"),
        ("base 2", "np.log(np.exp(z).sum()) - z[label]", "(np.log(np.exp(z).sum()) - z[label]) / np.log(2)"),
        ("label minus one", "z[label]", "z[label - 1]"), ("ignored rows counted", "continue", "label = 0"),
        ("ignored rows read from the end", "continue", "label = -1"),
        ("mean of the rows", "return out", "return np.full(len(out), out[labels != -100].mean())"),
        ("probability", "np.log(np.exp(z).sum()) - z[label]", "np.exp(z[label]) / np.exp(z).sum()"),
        ("margin", "np.log(np.exp(z).sum()) - z[label]", "-z[label]"),
        ("maximum not added back", "- z[label]", "- logits[n, label]"),
    ],
    "block": [
        ("no residual at attention", "h1 = x + np.hstack", "h1 = np.hstack"), ("no residual at the MLP", "h1 + mlp",
        "mlp"),
        ("residual of the normed", "h1 = x + np.hstack", "h1 = n + np.hstack"), ("no first norm",
        "n = rms_norm(x, norm1)", "n = x"),
        ("no second norm", "m = rms_norm(h1, norm2)", "m = h1"), ("norm1 twice", "rms_norm(h1, norm2)",
        "rms_norm(h1, norm1)"),
        ("MLP beside attention", "m = rms_norm(h1, norm2)", "m = rms_norm(x, norm2)"),
        ("k not turned", "turn(K[:, c]).T", "K[:, c].T"), ("v turned", "@ V[:, c]", "@ turn(V[:, c])"),
        ("heads cut the other way", "slice(h * D, (h + 1) * D)", "slice(h, E, H)"),
        ("gate and up exchanged", "g, u = m @ gate.T, m @ up.T", "g, u = m @ up.T, m @ gate.T"),
        ("no silu", "g / (1 + np.exp(-g)) * u", "g * u"), ("wo not transposed", "@ wo.T", "@ wo"),
        ("up not used", "/ (1 + np.exp(-g)) * u", "/ (1 + np.exp(-g))"),
    ],
    "generate": [
        ("position restarts", "start + i for i", "i for i"), ("positions from 1", "start + i for i",
        "start + i + (step > 0) for i"),
        ("prompt fed again", "feed = [nxt]", "feed = seq[:]"), ("token not fed", "feed = [nxt]",
        "feed = [int(prompt[-1])]"),
        ("cache replaced", "K.extend(rotate(h @ wk, pos))", "K = list(rotate(h @ wk, pos))",
         "V.extend(h @ wv)", "V = list(h @ wv)", "start = len(K)", "start = len(seq) - len(feed)"),
        ("k cached unturned", "rotate(h @ wk, pos)", "h @ wk"), ("q not turned", "rotate(h @ wq, pos)", "h @ wq"),
        ("smallest logit", "np.argmax(y)", "np.argmin(y)"), ("no scale", " / np.sqrt(D)", ""),
        ("no residual", "h[-1] + w @", "w @"), ("v turned", "V.extend(h @ wv)", "V.extend(rotate(h @ wv, pos))"),
    ],
    "top_p": [
        ("one too few", "                break\n", "                break\n",
        "        keep.append(i)\n        total += prob[i]\n        if total >= p:\n            break\n",
         "        total += prob[i]\n        if total > p and keep:\n            break\n        keep.append(i)\n"),
        ("not divided again", "result / result.sum()", "result"), ("from the smallest", "[::-1]", ""),
        ("temperature multiplied", "logits / temperature", "logits * temperature"),
        ("temperature ignored", "logits / temperature", "logits"), ("equal shares", "result[keep] = prob[keep]",
        "result[keep] = 1"),
        ("in sorted order", "return result / result.sum()", "return (result / result.sum())[idx]"),
        ("nothing cut", "if total >= p", "if total >= 2"), ("only the largest", "if total >= p", "if total >= 0"),
        ("temperature after the softmax", "scaled = logits / temperature", "scaled = logits",
         "prob = prob / prob.sum()", "prob = prob / prob.sum() / temperature"),
    ],
}
