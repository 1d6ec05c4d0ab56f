"""Answers to the backward track as people write them: right ones, and mistakes as edits of the first right one.

RIGHT: exercise -> two texts. WRONG: exercise -> (the name of the mistake, old, new, ...).
"""

# fmt: off

_SOFTMAX = '''
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

'''

RIGHT = {
    "linear_backward": ('''
def linear_backward(dy, x, w):
    dx = np.zeros(x.shape)
    dw = np.zeros(w.shape)
    db = np.zeros(len(w))
    for n in range(len(x)):
        for o in range(len(w)):
            dx[n] += dy[n, o] * w[o]
            dw[o] += dy[n, o] * x[n]
            db[o] += dy[n, o]
    return dx, dw, db
''', '''
def linear_backward(dy, x, w):
    return np.einsum("no,oi->ni", dy, w), np.einsum("no,ni->oi", dy, x), np.ones(len(x)) @ dy
'''),
    "swiglu_backward": ('''
def swiglu_backward(dh, gate, up):
    sig = 0.5 * (1 + np.tanh(gate / 2))
    silu = gate * sig
    dsilu = sig + silu * (1 - sig)
    return dh * up * dsilu, dh * silu
''', '''
def swiglu_backward(dh, gate, up):
    dgate, dup = np.zeros_like(gate), np.zeros_like(up)
    for i in np.ndindex(gate.shape):
        x = gate[i]
        e = np.exp(-abs(x))
        s = 1 / (1 + e) if x >= 0 else e / (1 + e)
        dup[i] = dh[i] * x * s
        dgate[i] = dh[i] * up[i] * s * (1 + x * (1 - s))
    return dgate, dup
'''),
    "softmax_backward": (_SOFTMAX + '''
def softmax_backward(dp, x):
    p = softmax(x)
    inner = (p * dp).sum(-1)
    return p * dp - p * inner[:, None]
''', '''
def softmax_backward(dp, x):
    out = []
    for row, d in zip(x, dp):
        e = np.exp(row - row.max())
        p = e / e.sum()
        J = np.diag(p) - np.outer(p, p)
        out.append(J @ d)
    return np.array(out)
'''),
    "rope_backward": ('''
def rope_backward(dy, cos, sin):
    half = cos.shape[1]
    g1 = dy[:, :half]
    g2 = dy[:, half:2 * half]
    rest = dy[:, 2 * half:]
    return np.concatenate([g1 * cos + g2 * sin, -g1 * sin + g2 * cos, rest], axis=1)
''', '''
def rope_backward(dy, cos, sin):
    h = cos.shape[1]
    z = (dy[:, :h] + 1j * dy[:, h:2 * h]) * (cos - 1j * sin)
    dx = np.array(dy)
    dx[:, :h], dx[:, h:2 * h] = z.real, z.imag
    return dx
'''),
    "rms_norm_backward": ('''
def rms_norm_backward(dy, x, weight, eps):
    N, E = x.shape
    rms = np.sqrt((x ** 2).mean(1) + eps)
    dx = np.zeros((N, E))
    dw = np.zeros(E)
    for n in range(N):
        xhat = x[n] / rms[n]
        g = dy[n] * weight
        dot = (g * xhat).mean()
        dx[n] = (g - xhat * dot) / rms[n]
        dw += dy[n] * xhat
    return dx, dw
''', '''
def rms_norm_backward(dy, x, weight, eps):
    E = x.shape[1]
    r = (np.einsum("ne,ne->n", x, x) / E + eps) ** -0.5
    g = weight * dy
    dot = np.einsum("ne,ne->n", g, x) / E
    return r[:, None] * g - (r ** 3 * dot)[:, None] * x, np.einsum("ne,ne,n->e", dy, x, r)
'''),
    "layer_norm_backward": ('''
def layer_norm_backward(dy, x, weight, eps):
    mu = x.mean(1, keepdims=True)
    std = np.sqrt(x.var(1, keepdims=True) + eps)
    xhat = (x - mu) / std
    g = dy * weight
    c1 = g.mean(1, keepdims=True)
    c2 = (g * xhat).mean(1, keepdims=True)
    dx = (g - c1 - xhat * c2) / std
    return dx, (dy * xhat).sum(0), dy.sum(0)
''', '''
def layer_norm_backward(dy, x, weight, eps):
    N, E = x.shape
    dx, dw, db = np.zeros((N, E)), np.zeros(E), np.zeros(E)
    for n in range(N):
        d = x[n] - x[n].mean()
        inv = 1 / np.sqrt(d @ d / E + eps)
        g = dy[n] * weight
        dvar = (g @ d) * -0.5 * inv ** 3
        dd = g * inv + 2 * dvar * d / E
        dx[n] = dd - dd.mean()
        dw += dy[n] * d * inv
        db += dy[n]
    return dx, dw, db
'''),
    "cross_entropy_backward": ('''
def cross_entropy_backward(logits, labels):
    N, V = logits.shape
    grad = np.zeros((N, V))
    keep = [n for n in range(N) if labels[n] != -100]
    count = len(keep)
    for n in keep:
        e = np.exp(logits[n] - logits[n].max())
        grad[n] = e / e.sum()
        grad[n, labels[n]] -= 1.0
        grad[n] /= count
    return grad
''', '''
def cross_entropy_backward(logits, labels):
    z = logits - logits.max(1, keepdims=True)
    p = np.exp(z - np.log(np.exp(z).sum(1, keepdims=True)))
    onehot = np.arange(logits.shape[1]) == labels[:, None]
    mask = (labels >= 0)[:, None]
    return (p - onehot) * mask / max(mask.sum(), 1)
'''),
    "attention_backward": (_SOFTMAX + '''
def attention_backward(do, q, k, v):
    S, D = q.shape
    scale = D ** -0.5
    scores = q @ k.T * scale
    scores[np.triu_indices(S, 1)] = -np.inf
    p = softmax(scores)
    o = p @ v
    dv = np.dot(p.T, do)
    dp = np.dot(do, v.T)
    delta = (do * o).sum(1, keepdims=True)
    ds = p * (dp - delta) * scale
    return ds @ k, ds.T @ q, dv
''', '''
def attention_backward(do, q, k, v):
    S, D = q.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for s in range(S):
        keys, values = k[: s + 1], v[: s + 1]
        z = keys @ q[s] / np.sqrt(D)
        p = np.exp(z - z.max())
        p /= p.sum()
        dp = values @ do[s]
        ds = p * (dp - p @ dp)
        dv[: s + 1] += np.outer(p, do[s])
        dq[s] = ds @ keys / np.sqrt(D)
        dk[: s + 1] += np.outer(ds, q[s]) / np.sqrt(D)
    return dq, dk, dv
'''),
    "embedding_backward": ('''
def embedding_backward(dx, ids, V):
    grad = np.zeros((V, dx.shape[1]))
    for n, token in enumerate(ids):
        grad[token] += dx[n]
    return grad
''', '''
def embedding_backward(dx, ids, V):
    return (np.arange(V)[:, None] == ids).astype(float) @ dx
'''),
    "adamw": ('''
def adamw(w, g, m, v, step, lr, decay):
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g ** 2
    c1 = 1 - beta1 ** step
    c2 = 1 - beta2 ** step
    update = (new_m / c1) / (np.sqrt(new_v / c2) + eps)
    new_w = w * (1 - lr * decay) - lr * update
    return new_w, new_m, new_v
''', '''
def adamw(w, g, m, v, step, lr, decay):
    m = m + 0.1 * (g - m)
    v = v + 0.05 * (g * g - v)
    a, b = 1 - 0.9 ** step, 1 - 0.95 ** step
    return w - lr * decay * w - lr / a * m / ((v / b) ** 0.5 + 1e-8), m, v
'''),
    "train": (_SOFTMAX + '''
def train(table, head, ids, labels, lr, steps):
    E, W = np.array(table), np.array(head)
    losses = []
    for step in range(steps):
        x = E[ids]
        logits = x @ W.T
        p = softmax(logits)
        loss = -np.mean(np.log(p[range(len(ids)), labels]))
        losses.append(loss)
        g = p
        g[range(len(ids)), labels] -= 1
        g /= len(ids)
        gW = g.T @ x
        gx = g @ W
        gE = np.zeros_like(E)
        for n, t in enumerate(ids):
            gE[t] += gx[n]
        E -= lr * gE
        W -= lr * gW
    return np.array(losses), E, W
''', '''
def train(table, head, ids, labels, lr, steps):
    V, N = len(table), len(ids)
    A, L = np.eye(V)[ids], np.eye(V)[labels]
    losses = []
    for _ in range(steps):
        z = A @ table @ head.T
        z = z - z.max(1, keepdims=True)
        logp = z - np.log(np.exp(z).sum(1, keepdims=True))
        losses.append(-(L * logp).sum() / N)
        d = (np.exp(logp) - L) / N
        table, head = table - lr * A.T @ d @ head, head - lr * d.T @ A @ table
    return np.array(losses), table, head
'''),
}

WRONG = {
    "linear_backward": [
        ("db averaged", "return dx, dw, db", "return dx, dw, db / len(x)"),
        ("dw averaged", "return dx, dw, db", "return dx, dw / len(x), db"),
        ("both averaged", "return dx, dw, db", "return dx, dw / len(x), db / len(x)"),
        ("db of the last row", "db[o] += dy[n, o]", "db[o] = dy[n, o]"), ("sign", "return dx, dw, db",
        "return -dx, -dw, -db"),
        ("dx without dy", "dx[n] += dy[n, o] * w[o]", "dx[n] += w[o]"),
        ("dw without dy", "dw[o] += dy[n, o] * x[n]", "dw[o] += x[n]"),
        ("magnitude of dy", "dx[n] += dy[n, o]", "dx[n] += abs(dy[n, o])"), ("db doubled", "db[o] += dy[n, o]",
        "db[o] += 2 * dy[n, o]"),
    ],
    "swiglu_backward": [
        ("second term missing", "sig + silu * (1 - sig)", "sig"), ("first term missing", "sig + silu", "silu"),
        ("sigmoid's derivative", "sig + silu * (1 - sig)", "sig * (1 - sig)"), ("silu for its derivative",
        "sig + silu * (1 - sig)", "silu"),
        ("sign of the second term", "sig + silu", "sig - silu"), ("up missing", "dh * up * dsilu", "dh * dsilu"),
        ("dh missing in dgate", "dh * up * dsilu", "up * dsilu"), ("dh missing in dup", "dh * silu", "silu"),
        ("dup is dh times the sigmoid", "dh * silu", "dh * sig"), ("dup with the derivative", "dh * silu",
        "dh * dsilu"),
        ("results exchanged", "dh * up * dsilu, dh * silu", "dh * silu, dh * up * dsilu"),
    ],
    "softmax_backward": [
        ("sum missing", " - p * inner[:, None]", ""), ("diagonal alone", "p * dp - p * inner[:, None]",
        "p * dp * (1 - p)"),
        ("sum without p", "(p * dp).sum(-1)", "dp.sum(-1)"), ("mean for sum", "(p * dp).sum(-1)", "(p * dp).mean(-1)"),
        ("sign of the sum", "dp - p *", "dp + p *"), ("bracket", "- p * inner", "- inner"),
        ("factor p missing", "p * dp - p * inner[:, None]", "dp - inner[:, None]"),
        ("sum of everything", "(p * dp).sum(-1)", "(p * dp).sum() * np.ones(len(p))"),
        ("x for p", "return p * dp - p *", "return x * dp - x *"), ("maximum not subtracted",
        "x - x.max(axis=-1, keepdims=True)", "x"),
        ("p squared", "return p * dp - p *", "return p * p * dp - p * p *"),
    ],
    "rope_backward": [
        ("turned forwards", "g1 * cos + g2 * sin, -g1 * sin", "g1 * cos - g2 * sin, g1 * sin"),
        ("both signs plus", "-g1 * sin", "g1 * sin"), ("both signs minus", "g1 * cos + g2 * sin",
        "g1 * cos - g2 * sin"),
        ("cos alone", "g1 * cos + g2 * sin, -g1 * sin + g2 * cos", "g1 * cos, g2 * cos"),
        ("cos and sin exchanged", "g1 * cos + g2 * sin, -g1 * sin + g2 * cos",
        "g1 * sin + g2 * cos, -g1 * cos + g2 * sin"),
        ("the rest is zero", "rest = dy[:, 2 * half:]", "rest = np.zeros_like(dy[:, 2 * half:])"),
        ("nothing turned", "g1 * cos + g2 * sin, -g1 * sin + g2 * cos", "g1, g2"),
        ("halves exchanged", "g1 * cos + g2 * sin, -g1 * sin + g2 * cos", "-g1 * sin + g2 * cos, g1 * cos + g2 * sin"),
        ("always position 0", "half = cos", "cos, sin = cos[:1], sin[:1]; half = cos"),
    ],
    "rms_norm_backward": [
        ("second term missing", "(g - xhat * dot) / rms[n]", "g / rms[n]"), ("weight missing", "g = dy[n] * weight",
        "g = dy[n]"),
        ("sum for mean", "(g * xhat).mean()", "(g * xhat).sum()"), ("sign of the second term", "(g - xhat",
        "(g + xhat"),
        ("weight not in the mean", "(g * xhat).mean()", "(dy[n] * xhat).mean()"), ("dweight without r",
        "dw += dy[n] * xhat", "dw += dy[n] * x[n]"),
        ("dweight of the last row", "dw += ", "dw = "), ("dweight averaged", "return dx, dw", "return dx, dw / N"),
        ("dweight from y", "dw += dy[n] * xhat", "dw += g * xhat"), ("eps left out", " + eps", ""),
        ("factor two", "xhat * dot", "2 * xhat * dot"), ("mean subtracted", "(g - xhat", "(g - g.mean() - xhat"),
    ],
    "layer_norm_backward": [
        ("mean of g missing", "g - c1 - xhat", "g - xhat"), ("third term missing", " - xhat * c2", ""),
        ("both terms missing", "(g - c1 - xhat * c2)", "g"), ("weight missing", "g = dy * weight", "g = dy"),
        ("r missing", "xhat * c2) / std", "xhat * c2)"), ("sign of the third term", "c1 - xhat", "c1 + xhat"),
        ("dweight from x", "(dy * xhat).sum(0)", "(dy * x).sum(0)"), ("dweight from x - m", "(dy * xhat).sum(0)",
        "(dy * (x - mu)).sum(0)"),
        ("dbias from g", ", dy.sum(0)", ", g.sum(0)"), ("both averaged", "xhat).sum(0), dy.sum(0)",
        "xhat).mean(0), dy.mean(0)"),
        ("results exchanged", "(dy * xhat).sum(0), dy.sum(0)", "dy.sum(0), (dy * xhat).sum(0)"),
        ("variance over E - 1", "x.var(1, keepdims=True)", "x.var(1, keepdims=True, ddof=1)"),
    ],
    "cross_entropy_backward": [
        ("one not subtracted", "        grad[n, labels[n]] -= 1.0\n", ""), ("sign", "return grad", "return -grad"),
        ("not averaged", "        grad[n] /= count\n", ""), ("divided by all rows", "/= count", "/= N"),
        ("divided by V", "/= count", "/= V"), ("label minus one", "labels[n]] -=", "labels[n] - 1] -="),
        ("subtracted everywhere", "grad[n, labels[n]] -=", "grad[n] -="), ("maximum not subtracted",
        "logits[n] - logits[n].max()", "logits[n]"),
        ("logits for the softmax", "grad[n] = e / e.sum()", "grad[n] = logits[n]"),
    ],
    "attention_backward": [
        ("no scale in dq and dk", "(dp - delta) * scale", "(dp - delta)"), ("softmax's sum missing", "(dp - delta)",
        "dp"),
        ("p missing in ds", "p * (dp - delta)", "(dp - delta)"), ("p not transposed in dv", "p.T, do", "p, do"),
        ("ds not transposed in dk", "ds.T @ q", "ds @ q"), ("no mask",
        "    scores[np.triu_indices(S, 1)] = -np.inf\n", ""),
        ("dq from q", "ds @ k", "ds @ q"), ("dk from k", "ds.T @ q", "ds.T @ k"), ("dp from k", "do, v.T", "do, k.T"),
        ("sign of the sum", "dp - delta", "dp + delta"), ("dq and dk exchanged", "ds @ k, ds.T @ q",
        "ds.T @ q, ds @ k"),
        ("no scale in p", "q @ k.T * scale", "q @ k.T"), ("scaled twice", "(dp - delta) * scale",
        "(dp - delta) * scale ** 2"),
    ],
    "embedding_backward": [
        ("last one wins", "grad[token] += dx[n]", "grad[token] = dx[n]"), ("counted", "+= dx[n]", "+= 1"),
        ("divided by the tokens", "return grad", "return grad / len(ids)"), ("row before", "grad[token]",
        "grad[token - 1]"),
        ("subtracted", "+= dx[n]", "-= dx[n]"), ("in order", "grad[token]", "grad[n % V]"), ("twice", "+= dx[n]",
        "+= 2 * dx[n]"),
        ("all rows", "grad[token] += dx[n]", "grad += dx[n]"), ("row behind", "grad[token]", "grad[(token + 1) % V]"),
    ],
    "adamw": [
        ("no correction", "new_m / c1", "new_m", "new_v / c2", "new_v"), ("no decay", "w * (1 - lr * decay)", "w"),
        ("decay through the gradient", "    new_m =", "    g = g + decay * w\n    new_m =", "w * (1 - lr * decay)",
        "w"),
        ("decay without lr", "1 - lr * decay", "1 - decay"), ("decay's sign", "1 - lr", "1 + lr"),
        ("no root", "np.sqrt(new_v / c2)", "new_v / c2"), ("g for m", "(new_m / c1)", "g"),
        ("v of g", "g ** 2", "abs(g)"), ("b1 and b2 exchanged", "0.9, 0.95", "0.95, 0.9"), ("uphill", "- lr * update",
        "+ lr * update"),
        ("own rates", "0.95", "0.999"), ("corrected one step late", "** step", "** (step + 1)"),
        ("means forgotten", "new_w, new_m, new_v", "new_w, m, v"),
    ],
    "train": [
        ("uphill", "-= lr", "+= lr"), ("not averaged", "        g /= len(ids)\n", ""), ("last one wins",
        "gE[t] += gx", "gE[t] = gx"),
        ("head not trained", "        W -= lr * gW\n", ""), ("table not trained", "        E -= lr * gE\n", ""),
        ("loss summed", "np.mean(", "np.sum("), ("loss's sign", "-np.mean", "np.mean"),
        ("one not subtracted", "        g[range(len(ids)), labels] -= 1\n", ""), ("divided by V", "g /= len(ids)",
        "g /= len(E)"),
        ("dx at the new head", "        gx = g @ W\n", "        W -= lr * gW\n        gx = g @ W\n",
        "        W -= lr * gW\n    return", "    return"),
        ("ids and labels exchanged", "E, W =", "ids, labels = labels, ids; E, W ="),
    ],
}
