"""Answers to the Triton track as people write them: right ones, and mistakes as edits of the solution.

RIGHT: exercise -> two texts. WRONG: exercise -> (the name of the mistake, old, new, ...), where a name that begins with
! is what the interpreter says before any values: out of bounds, a race, memory that nobody wrote.
"""

# fmt: off

_INF = '-float("inf")'

RIGHT = {
    "add": ('''
@triton.jit
def k(x, y, o, n, B: tl.constexpr):
    pid = tl.program_id(axis=0)
    offs = pid * B + tl.arange(0, B)
    ok = offs < n
    tl.store(o + offs, tl.load(x + offs, ok) + tl.load(y + offs, ok), ok)


def add(x, y, BLOCK):
    out = torch.zeros_like(x)
    k[((x.shape[0] + BLOCK - 1) // BLOCK,)](x, y, out, x.shape[0], BLOCK)
    return out
''', '''
@triton.jit
def k(x, y, o, n, B: tl.constexpr):
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        a = tl.load(x + i, mask=i < n, other=0.0)
        b = tl.load(y + i, mask=i < n, other=0.0)
        tl.store(o + i, a + b, mask=i < n)


def add(x, y, BLOCK):
    out = torch.empty_like(x)
    k[(1,)](x, y, out, len(x), BLOCK)
    return out
'''),
    "row_sum": ('''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for c in range(0, tl.cdiv(E, B)):
        i = c * B + tl.arange(0, B)
        total += tl.sum(tl.load(x + r * E + i, mask=i < E, other=0.0))
    tl.store(o + r, total)


def row_sum(x, BLOCK):
    out = torch.empty(x.shape[0])
    k[(x.shape[0],)](x, out, x.shape[1], BLOCK)
    return out
''', '''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * E + i, mask=i < E, other=0.0)
    tl.store(o + tl.program_id(0), tl.sum(v, axis=0))


def row_sum(x, BLOCK):
    R, E = x.shape
    out = torch.empty(R)
    k[(R,)](x, out, E, triton.next_power_of_2(E))
    return out
'''),
    "softmax_kernel": ('''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    ok = i < E
    row = tl.load(x + r * E + i, mask=ok, other=float("-inf"))
    row -= tl.max(row, axis=0)
    num = tl.exp(row)
    den = tl.sum(num, axis=0)
    tl.store(o + r * E + i, num / den, mask=ok)


def softmax(x, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, y, x.shape[1], BLOCK)
    return y
''', '''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    row = tl.load(x + r * E + i, mask=i < E, other=0.0)
    top = tl.max(tl.where(i < E, row, -1e30), axis=0)
    num = tl.where(i < E, tl.exp(row - top), 0.0)
    tl.store(o + r * E + i, num * (1.0 / tl.sum(num, axis=0)), mask=i < E)


def softmax(x, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, y, x.shape[1], BLOCK)
    return y
'''),
    "rms_norm_kernel": ('''
@triton.jit
def k(x, w, o, E, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * E + i, mask=i < E, other=0.0)
    rstd = tl.rsqrt(tl.sum(v * v, axis=0) / E + eps)
    tl.store(o + r * E + i, v * rstd * tl.load(w + i, mask=i < E, other=0.0), mask=i < E)


def rms_norm(x, weight, eps, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, weight, y, x.shape[1], eps, BLOCK)
    return y
''', '''
@triton.jit
def k(x, w, o, E, eps, B: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for start in range(0, E, B):
        i = start + tl.arange(0, B)
        v = tl.load(x + r * E + i, mask=i < E, other=0.0)
        total += tl.sum(v * v, axis=0)
    root = tl.sqrt(total / E + eps)
    for start in range(0, E, B):
        i = start + tl.arange(0, B)
        v = tl.load(x + r * E + i, mask=i < E, other=0.0)
        tl.store(o + r * E + i, tl.load(w + i, mask=i < E, other=0.0) * (v / root), mask=i < E)


def rms_norm(x, weight, eps, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, weight, y, x.shape[1], eps, BLOCK // 2)
    return y
'''),
    "layer_norm_kernel": ('''
@triton.jit
def k(x, w, b, o, E, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    ok = i < E
    v = tl.load(x + r * E + i, mask=ok, other=0.0)
    mu = tl.sum(v, axis=0) / E
    var = tl.sum(v * v, axis=0) / E - mu * mu
    xhat = (v - mu) * tl.rsqrt(var + eps)
    tl.store(o + r * E + i, xhat * tl.load(w + i, mask=ok, other=0.0) + tl.load(b + i, mask=ok, other=0.0), mask=ok)


def layer_norm(x, weight, bias, eps, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, weight, bias, y, x.shape[1], eps, BLOCK)
    return y
''', '''
@triton.jit
def k(x, w, b, o, E, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    ok = i < E
    v = tl.load(x + r * E + i, mask=ok, other=0.0)
    mu = tl.sum(v, axis=0) / E
    d = (v - mu) * ok
    s = tl.sqrt(tl.sum(d * d, axis=0) / E + eps)
    tl.store(o + r * E + i, d / s * tl.load(w + i, mask=ok, other=0.0) + tl.load(b + i, mask=ok, other=0.0), mask=ok)


def layer_norm(x, weight, bias, eps, BLOCK):
    y = torch.empty_like(x)
    k[(x.shape[0],)](x, weight, bias, y, x.shape[1], eps, BLOCK)
    return y
'''),
    "rope_kernel": ('''
@triton.jit
def k(x, cos, sin, o, S, D, B: tl.constexpr):
    h = tl.program_id(0)
    s = tl.program_id(1)
    half = D // 2
    i = tl.arange(0, B)
    ok = i < half
    p = (h * S + s) * D
    c = tl.load(cos + s * half + i, mask=ok)
    n = tl.load(sin + s * half + i, mask=ok)
    x1 = tl.load(x + p + i, mask=ok)
    x2 = tl.load(x + p + half + i, mask=ok)
    tl.store(o + p + i, x1 * c - x2 * n, mask=ok)
    tl.store(o + p + half + i, x2 * c + x1 * n, mask=ok)


def rope(x, cos, sin, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    k[(H, S)](x, cos, sin, out, S, D, BLOCK)
    return out
''', '''
@triton.jit
def k(x, cos, sin, o, H, S, HALF, B: tl.constexpr):
    s = tl.program_id(0)
    i = tl.arange(0, B)
    ok = i < HALF
    c = tl.load(cos + s * HALF + i, mask=ok, other=1.0)
    n = tl.load(sin + s * HALF + i, mask=ok, other=0.0)
    for h in range(H):
        p = x + (h * S + s) * 2 * HALF + i
        q = o + (h * S + s) * 2 * HALF + i
        a = tl.load(p, mask=ok, other=0.0)
        b = tl.load(p + HALF, mask=ok, other=0.0)
        tl.store(q, a * c - b * n, mask=ok)
        tl.store(q + HALF, b * c + a * n, mask=ok)


def rope(x, cos, sin, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    k[(S,)](x, cos, sin, out, H, S, D // 2, BLOCK)
    return out
'''),
    "norm_rope_kernel": ('''
@triton.jit
def k(x, w, cos, sin, o, S, D, eps, B: tl.constexpr):
    h = tl.program_id(0)
    s = tl.program_id(1)
    half = D // 2
    i = tl.arange(0, B)
    ok = i < half
    p = (h * S + s) * D
    x1 = tl.load(x + p + i, mask=ok, other=0.0)
    x2 = tl.load(x + p + half + i, mask=ok, other=0.0)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=0) / D + eps)
    n1 = x1 * rstd * tl.load(w + h * D + i, mask=ok, other=0.0)
    n2 = x2 * rstd * tl.load(w + h * D + half + i, mask=ok, other=0.0)
    c = tl.load(cos + s * half + i, mask=ok, other=0.0)
    t = tl.load(sin + s * half + i, mask=ok, other=0.0)
    tl.store(o + p + i, n1 * c - n2 * t, mask=ok)
    tl.store(o + p + half + i, n2 * c + n1 * t, mask=ok)


def norm_rope(x, weight, cos, sin, eps, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    k[(H, S)](x, weight, cos, sin, out, S, D, eps, BLOCK)
    return out
''', '''
@triton.jit
def k(x, w, cos, sin, o, S, HALF, eps, B: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, B)
    ok = d < 2 * HALF
    whole = tl.load(x + row * 2 * HALF + d, mask=ok, other=0.0)
    root = tl.sqrt(tl.sum(whole * whole, axis=0) / (2 * HALF) + eps)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    sign = tl.where(d < HALF, -1.0, 1.0)
    wb = w + row // S * 2 * HALF
    partner = tl.load(x + row * 2 * HALF + other, mask=ok, other=0.0) * tl.load(wb + other, mask=ok, other=0.0)
    own = whole * tl.load(wb + d, mask=ok, other=0.0)
    c = tl.load(cos + row % S * HALF + d % HALF, mask=ok, other=0.0)
    t = tl.load(sin + row % S * HALF + d % HALF, mask=ok, other=0.0)
    tl.store(o + row * 2 * HALF + d, (own * c + sign * partner * t) / root, mask=ok)


def norm_rope(x, weight, cos, sin, eps, BLOCK):
    H, S, D = x.shape
    out = torch.empty_like(x)
    k[(H * S,)](x, weight, cos, sin, out, S, D // 2, eps, 2 * BLOCK)
    return out
'''),
    "matmul_kernel": ('''
@triton.jit
def k(a, b, o, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    pa = a + rm[:, None] * K + rk[None, :]
    pb = b + rk[:, None] * N + rn[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for left in range(K, 0, -BK):
        x = tl.load(pa, mask=(rm[:, None] < M) & (rk[None, :] < left), other=0.0)
        y = tl.load(pb, mask=(rk[:, None] < left) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc)
        pa += BK
        pb += BK * N
    tl.store(o + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


def matmul(a, b, BM, BN, BK):
    M, K = a.shape
    N = b.shape[1]
    out = torch.empty((M, N))
    k[(triton.cdiv(M, BM), triton.cdiv(N, BN))](a, b, out, M, N, K, BM, BN, BK)
    return out
''', '''
@triton.jit
def k(a, b, o, N, K, BK: tl.constexpr):
    m = tl.program_id(0)
    n = tl.program_id(1)
    total = 0.0
    for start in range(0, K, BK):
        i = start + tl.arange(0, BK)
        x = tl.load(a + m * K + i, mask=i < K, other=0.0)
        y = tl.load(b + i * N + n, mask=i < K, other=0.0)
        total += tl.sum(x * y, axis=0)
    tl.store(o + m * N + n, total)


def matmul(a, b, BM, BN, BK):
    M, K = a.shape
    out = torch.empty((M, b.shape[1]))
    k[(M, b.shape[1])](a, b, out, b.shape[1], K, BK)
    return out
'''),
    "lse_kernel": ('''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    r = tl.program_id(0)
    top = tl.load(x + r * E)
    total = 0.0
    for start in range(0, E, B):
        i = start + tl.arange(0, B)
        v = tl.load(x + r * E + i, mask=i < E, other=-float("inf"))
        best = tl.max(v, axis=0)
        if best > top:
            total = total * tl.exp(top - best)
            top = best
        total += tl.sum(tl.exp(v - top), axis=0)
    tl.store(o + r, tl.log(total) + top)


def lse(x, BLOCK):
    out = torch.empty(x.shape[0])
    k[(x.shape[0],)](x, out, x.shape[1], BLOCK)
    return out
''', '''
@triton.jit
def k(x, o, E, B: tl.constexpr):
    r = tl.program_id(0)
    m = tl.full([B], -1e30, tl.float32)
    l = tl.zeros([B], tl.float32)
    for start in range(0, E, B):
        i = start + tl.arange(0, B)
        v = tl.load(x + r * E + i, mask=i < E, other=-float("inf"))
        new = tl.maximum(m, v)
        l = l * tl.exp(m - new) + tl.exp(v - new)
        m = new
    top = tl.max(m, axis=0)
    tl.store(o + r, top + tl.log(tl.sum(l * tl.exp(m - top), axis=0)))


def lse(x, BLOCK):
    out = torch.empty(x.shape[0])
    k[(x.shape[0],)](x, out, x.shape[1], BLOCK)
    return out
'''),
    "flash_row": ('''
@triton.jit
def k(q, key, v, o, T, D: tl.constexpr, B: tl.constexpr):
    s = tl.program_id(0)
    d = tl.arange(0, D)
    x = tl.load(q + s * D + d) * (1.0 / tl.sqrt(D * 1.0))
    m_i = -float("inf")
    l_i = 0.0
    o_i = tl.zeros([D], tl.float32)
    for j in range(0, T, B):
        t = j + tl.arange(0, B)
        off = t[:, None] * D + d[None, :]
        kj = tl.load(key + off, mask=t[:, None] < T, other=0.0)
        vj = tl.load(v + off, mask=t[:, None] < T, other=0.0)
        z = tl.sum(kj * x[None, :], axis=1) + tl.where(t < T, 0.0, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(z, axis=0))
        w = tl.exp(z - m_new)
        o_i = o_i * tl.exp(m_i - m_new) + tl.sum(vj * w[:, None], axis=0)
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(w, axis=0)
        m_i = m_new
    tl.store(o + s * D + d, o_i / l_i)


def flash_row(q, k_, v, BLOCK):
    out = torch.empty_like(q)
    k[(q.shape[0],)](q, k_, v, out, k_.shape[0], q.shape[1], BLOCK)
    return out
''', '''
@triton.jit
def k(q, key, v, o, T, D: tl.constexpr):
    s = tl.program_id(0)
    d = tl.arange(0, D)
    x = tl.load(q + s * D + d)
    m = -1e38
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for t in range(T):
        z = tl.sum(x * tl.load(key + t * D + d), axis=0) / tl.sqrt(D * 1.0)
        new = tl.maximum(m, z)
        a = tl.exp(m - new)
        w = tl.exp(z - new)
        acc = (acc * l * a + w * tl.load(v + t * D + d)) / (l * a + w)
        l = l * a + w
        m = new
    tl.store(o + s * D + d, acc)


def flash_row(q, k_, v, BLOCK):
    out = torch.empty_like(q)
    k[(q.shape[0],)](q, k_, v, out, k_.shape[0], q.shape[1])
    return out
'''),
    "flash_kernel": ('''
@triton.jit
def k(q, key, v, o, S, T, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    d = tl.arange(0, D)
    x = tl.load(q + rows[:, None] * D + d[None, :], mask=rows[:, None] < S, other=0.0)
    m_i = tl.full([BM], -float("inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in range(0, T, BN):
        t = j + tl.arange(0, BN)
        kt = tl.load(key + t[None, :] * D + d[:, None], mask=t[None, :] < T, other=0.0)
        vj = tl.load(v + t[:, None] * D + d[None, :], mask=t[:, None] < T, other=0.0)
        z = tl.dot(x, kt) / tl.sqrt(D * 1.0)
        z = tl.where((rows[:, None] + T - S >= t[None, :]) & (t[None, :] < T), z, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(z, axis=1))
        w = tl.exp(z - m_new[:, None])
        a = tl.exp(m_i - m_new)
        acc = tl.dot(w, vj, acc * a[:, None])
        l_i = l_i * a + tl.sum(w, axis=1)
        m_i = m_new
    tl.store(o + rows[:, None] * D + d[None, :], acc / l_i[:, None], mask=rows[:, None] < S)


def flash(q, k_, v, BM, BN):
    S, D = q.shape
    out = torch.empty_like(q)
    k[(triton.cdiv(S, BM),)](q, k_, v, out, S, k_.shape[0], D, BM, BN)
    return out
''', '''
@triton.jit
def k(q, key, v, o, S, T, D: tl.constexpr):
    s = tl.program_id(0)
    d = tl.arange(0, D)
    x = tl.load(q + s * D + d)
    m = -1e38
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for t in range(T - S + s + 1):
        z = tl.sum(x * tl.load(key + t * D + d), axis=0) / tl.sqrt(D * 1.0)
        new = tl.maximum(m, z)
        a = tl.exp(m - new)
        acc = acc * a + tl.exp(z - new) * tl.load(v + t * D + d)
        l = l * a + tl.exp(z - new)
        m = new
    tl.store(o + s * D + d, acc / l)


def flash(q, k_, v, BM, BN):
    out = torch.empty_like(q)
    k[(q.shape[0],)](q, k_, v, out, q.shape[0], k_.shape[0], q.shape[1])
    return out
'''),
    "decode_kernel": ('''
@triton.jit
def k(q, key, v, lengths, o, H, K, N, D: tl.constexpr, B: tl.constexpr):
    b = tl.program_id(0)
    h = tl.program_id(1)
    kv = h * K // H
    n = tl.load(lengths + b)
    d = tl.arange(0, D)
    x = tl.load(q + (b * H + h) * D + d)
    m = -1e38
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for j in range(0, n, B):
        t = j + tl.arange(0, B)
        off = ((b * K + kv) * N + t[:, None]) * D + d[None, :]
        kj = tl.load(key + off, mask=t[:, None] < n, other=0.0)
        vj = tl.load(v + off, mask=t[:, None] < n, other=0.0)
        z = tl.where(t < n, tl.sum(kj * x[None, :], axis=1) / tl.sqrt(D * 1.0), -float("inf"))
        new = tl.maximum(m, tl.max(z, axis=0))
        w = tl.exp(z - new)
        a = tl.exp(m - new)
        acc = acc * a + tl.sum(vj * w[:, None], axis=0)
        l = l * a + tl.sum(w, axis=0)
        m = new
    if n == 0:
        l = 1.0
    tl.store(o + (b * H + h) * D + d, acc / l)


def decode(q, k_cache, v_cache, lengths, BLOCK):
    B, H, D = q.shape
    K, N = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty_like(q)
    k[(B, H)](q, k_cache, v_cache, lengths, out, H, K, N, D, BLOCK)
    return out
''', '''
@triton.jit
def k(q, key, v, lengths, o, H, G, N, D: tl.constexpr):
    p = tl.program_id(0)
    n = tl.load(lengths + p // H)
    d = tl.arange(0, D)
    x = tl.load(q + p * D + d)
    base = (p // G) * N * D
    m = -1e38
    for t in range(n):
        m = tl.maximum(m, tl.sum(x * tl.load(key + base + t * D + d), axis=0) / tl.sqrt(D * 1.0))
    l = 0.0
    acc = tl.zeros([D], tl.float32)
    for t in range(n):
        w = tl.exp(tl.sum(x * tl.load(key + base + t * D + d), axis=0) / tl.sqrt(D * 1.0) - m)
        l += w
        acc += w * tl.load(v + base + t * D + d)
    tl.store(o + p * D + d, acc / tl.maximum(l, 1e-30))


def decode(q, k_cache, v_cache, lengths, BLOCK):
    B, H, D = q.shape
    K, N = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty_like(q)
    k[(B * H,)](q, k_cache, v_cache, lengths, out, H, H // K, N, D)
    return out
'''),
    "cross_entropy_kernel": ('''
@triton.jit
def k(z, y, o, V, B: tl.constexpr):
    r = tl.program_id(0)
    label = tl.load(y + r)
    keep = label >= 0
    m = -float("inf")
    l = 0.0
    for j in range(0, V, B):
        i = j + tl.arange(0, B)
        t = tl.load(z + r * V + i, mask=i < V, other=-float("inf"))
        new = tl.maximum(m, tl.max(t, axis=0))
        l = l * tl.exp(m - new) + tl.sum(tl.exp(t - new), axis=0)
        m = new
    own = tl.load(z + r * V + label, mask=keep, other=0.0)
    tl.store(o + r, tl.where(keep, m + tl.log(l) - own, 0.0))


def cross_entropy(logits, labels, BLOCK):
    out = torch.empty(logits.shape[0])
    k[(logits.shape[0],)](logits, labels, out, logits.shape[1], BLOCK)
    return out
''', '''
@triton.jit
def k(z, y, o, V, B: tl.constexpr):
    r = tl.program_id(0)
    label = tl.load(y + r)
    i = tl.arange(0, B)
    t = tl.load(z + r * V + i, mask=i < V, other=-float("inf"))
    t = t - tl.max(t, axis=0)
    own = tl.sum(tl.where(i == label, t, 0.0), axis=0)
    loss = tl.log(tl.sum(tl.exp(t), axis=0)) - own
    if label == -100:
        loss = 0.0
    tl.store(o + r, loss)


def cross_entropy(logits, labels, BLOCK):
    N, V = logits.shape
    out = torch.empty(N)
    k[(N,)](logits, labels, out, V, triton.next_power_of_2(V))
    return out
'''),
}

WRONG = {
    "add": [
        ("grid floors", "triton.cdiv(n, BLOCK)", "n // BLOCK"), ("!", "tl.program_id(0) * BLOCK + ", ""),
        ("!", "mask = i < n", "mask = tl.arange(0, BLOCK) < n"), ("mask one short", "i < n", "i < n - 1"),
        ("x twice", "tl.load(y_ptr", "tl.load(x_ptr"), ("y twice", "tl.load(x_ptr", "tl.load(y_ptr"),
        ("y not shifted", "tl.load(y_ptr + i", "tl.load(y_ptr + tl.arange(0, BLOCK)"), ("!", "x + y, mask=mask",
        "x + y"),
        ("x alone", "x + y, mask", "x, mask"), ("subtracted", "x + y, mask", "x - y, mask"), ("one program",
        "triton.cdiv(n, BLOCK)", "1"),
        ("!", "tl.load(x_ptr + i, mask=mask)", "tl.load(x_ptr + i)"), ("!", "tl.program_id(0) * BLOCK",
        "tl.program_id(0)"),
    ],
    "row_sum": [
        ("accumulator overwritten", "acc +=", "acc ="), ("only the first tile", "range(0, E, BLOCK)", "range(0, 1)"),
        ("tail dropped", "range(0, E, BLOCK)", "range(0, E // BLOCK * BLOCK, BLOCK)"), ("other is one", "other=0.0",
        "other=1.0"),
        ("no other", ", other=0.0", ""), ("start not added", "start + tl.arange", "tl.arange"), ("row stride missing",
        "row * E + i", "row + i"),
        ("mean for sum", "tl.sum(acc, 0)", "tl.sum(acc, 0) / E"), ("maximum for sum", "tl.sum(acc, 0)",
        "tl.max(acc, 0)"),
        ("!", "mask=i < E, ", ""), ("!", "row * E + i", "row * BLOCK + i + 100"),
    ],
    "softmax_kernel": [
        ("other is 0", f"other={_INF}", "other=0.0"), ("no other", f", other={_INF}", ""), ("maximum not subtracted",
        "v - tl.max(v, 0)", "v"),
        ("base 2", "tl.exp(v)", "tl.exp2(v)"), ("not divided", "e / tl.sum(e, 0)", "e"), ("mean of E", "tl.sum(e, 0)",
        "(tl.sum(e, 0) / E)"),
        ("mean for sum", "tl.sum(e, 0)", "(tl.sum(e, 0) / BLOCK)"), ("row 0 for all", "x_ptr + row * E + i",
        "x_ptr + i"),
        ("!", "tl.sum(e, 0), mask=i < E", "tl.sum(e, 0)"), ("large negative other", f"other={_INF}", "other=-1e3"),
        ("logarithm", "e / tl.sum(e, 0)", "v - tl.log(tl.sum(e, 0))"),
        ("numerator not shifted", "v = v - tl.max(v, 0)\n    e = tl.exp(v)", "e = tl.exp(v - tl.max(v, 0))",
         "e / tl.sum", "tl.exp(v) / tl.sum"),
    ],
    "rms_norm_kernel": [
        ("mean over BLOCK", "/ E", "/ BLOCK"), ("eps outside the root", "tl.sqrt(square + eps)",
        "(tl.sqrt(square) + eps)"),
        ("no eps", "square + eps", "square"), ("no weight", "w * x", "x"), ("weight plus one", "y = w", "y = (1 + w)"),
        ("sum for mean", "tl.sum(x * x, 0) / E", "tl.sum(x * x, 0)"), ("root forgotten", "tl.sqrt(square + eps)",
        "(square + eps)"),
        ("multiplied by the root", "x / tl.sqrt", "x * tl.sqrt"), ("n - 1", "/ E", "/ (E - 1)"), ("row 0 for all",
        "x_ptr + row * E + i", "x_ptr + i"),
        ("!", "y, mask=mask", "y"), ("other is one", "x_ptr + row * E + i, mask=mask, other=0.0",
        "x_ptr + row * E + i, mask=mask, other=1.0"),
        ("mean subtracted", "    square =", "    x = tl.where(mask, x - tl.sum(x, 0) / E, 0.0)\n    square ="),
    ],
    "layer_norm_kernel": [
        ("padding in the variance", "tl.where(mask, x - mean, 0.0)", "x - mean"), ("variance over BLOCK",
        "tl.sum(d * d, 0) / E", "tl.sum(d * d, 0) / BLOCK"),
        ("mean over BLOCK", "tl.sum(x, 0) / E", "tl.sum(x, 0) / BLOCK"), ("n - 1", "tl.sum(d * d, 0) / E",
        "tl.sum(d * d, 0) / (E - 1)"),
        ("eps outside the root", "tl.sqrt(var + eps)", "(tl.sqrt(var) + eps)"), ("not centred", "w * d", "w * x"),
        ("no bias", " + b, mask", ", mask"),
        ("weight and bias exchanged", "w * d / tl.sqrt(var + eps) + b", "b * d / tl.sqrt(var + eps) + w"), ("no mean",
        "x - mean", "x"),
        ("bias before the weight", "w * d / tl.sqrt(var + eps) + b", "w * (d / tl.sqrt(var + eps) + b)"),
        ("mean of squares for the variance", "d * d", "x * x"), ("both over BLOCK", "/ E", "/ BLOCK"),
    ],
    "rope_kernel": [
        ("turned the wrong way", "a * c - b * n", "a * c + b * n", "b * c + a * n", "b * c - a * n"),
        ("both signs plus", "a * c - b * n", "a * c + b * n"),
        ("both signs minus", "b * c + a * n", "b * c - a * n"), ("angle by head", "s = row % S", "s = row // S % S"),
        ("always position 0", "s = row % S", "s = 0"), ("both halves of a", "x_ptr + row * 2 * HALF + HALF + i",
        "x_ptr + row * 2 * HALF + i"),
        ("cos and sin exchanged", "cos_ptr + s", "tmp_ptr + s", "sin_ptr + s", "cos_ptr + s", "tmp_ptr + s",
        "sin_ptr + s"),
        ("second half not turned", "b * c + a * n", "b"), ("!", "s = row % S", "s = row"), ("last pair missing",
        "i < HALF", "i < HALF - 1"),
        ("first half overwritten", "    tl.store(out_ptr + row * 2 * HALF + i, a * c - b * n, mask=mask)\n",
         "    a = a * c - b * n\n    tl.store(out_ptr + row * 2 * HALF + i, a, mask=mask)\n"),
        ("pairs side by side", "HALF * 0", "HALF * 0", "row * 2 * HALF + HALF + i", "row * 2 * HALF + 2 * i + 1",
         "x_ptr + row * 2 * HALF + i,", "x_ptr + row * 2 * HALF + 2 * i,", "out_ptr + row * 2 * HALF + i,",
         "out_ptr + row * 2 * HALF + 2 * i,"),
    ],
    "norm_rope_kernel": [
        ("mean of the first half", "(tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF)", "tl.sum(a * a, 0) / HALF"),
        ("divided by half", "(2 * HALF) + eps", "HALF + eps"), ("divided by twice BLOCK", "(2 * HALF) + eps",
        "(2 * BLOCK) + eps"),
        ("weight of head 0", "w_ptr + h * 2 * HALF", "w_ptr"), ("weight's first half twice",
        "w_ptr + h * 2 * HALF + HALF + i", "w_ptr + h * 2 * HALF + i"),
        ("no norm", "a * r * tl", "a * tl", "b * r * tl", "b * tl"), ("no rotation", "a * c - b * n", "a",
        "b * c + a * n", "b"),
        ("turned the wrong way", "a * c - b * n", "a * c + b * n", "b * c + a * n", "b * c - a * n"), ("no eps",
        " + eps)", ")"),
        ("angle by head", "row // S, row % S", "row // S, row // S % S"), ("always position 0", "row // S, row % S",
        "row // S, 0"),
        ("both signs plus", "a * c - b * n", "a * c + b * n"),
    ],
    "matmul_kernel": [
        ("accumulator overwritten", "acc += ", "acc = "), ("K tail dropped", "range(0, K, BK)",
        "range(0, K // BK * BK, BK)"),
        ("only the first tile", "range(0, K, BK)", "range(0, 1)"), ("start not added", "start + tl.arange",
        "tl.arange"),
        ("b does not move", "k[:, None] * N", "(k[:, None] - start) * N"), ("a does not move", "K + k[None, :]",
        "K + k[None, :] - start"),
        ("grid floors M", "triton.cdiv(M, BM)", "M // BM"), ("grid floors N", "triton.cdiv(N, BN)", "N // BN"),
        ("!", "& (k[None, :] < K)", "", "(k[:, None] < K) & ", ""), ("!", "tl.program_id(1)", "tl.program_id(0)"),
        ("one tile too few", "range(0, K, BK)", "range(0, K - BK, BK)"), ("averaged", ", acc, mask", ", acc / K, mask"),
    ],
    "lse_kernel": [
        ("sum not rescaled", "l * tl.exp(m - new)", "l"), ("sum overwritten", "l * tl.exp(m - new) + ", ""),
        ("m not added", "m + tl.log(l)", "tl.log(l)"),
        ("other is 0", f"other={_INF}", "other=0.0"), ("maximum starts at 0", f"m = {_INF}", "m = 0.0"),
        ("maximum alone", "m + tl.log(l)", "m"),
        ("no logarithm", "m + tl.log(l)", "m + l"), ("tail dropped", "range(0, E, BLOCK)",
        "range(0, E // BLOCK * BLOCK, BLOCK)"),
        ("start not added", "start + tl.arange", "tl.arange"), ("base 2 exponentials", "tl.exp(", "tl.exp2("),
        ("only the first tile", "range(0, E, BLOCK)", "range(0, 1)"),
    ],
    "flash_row": [
        ("accumulator not rescaled", "acc * alpha", "acc"), ("sum not rescaled", "l * alpha", "l"),
        ("nothing rescaled", "acc * alpha", "acc", "l * alpha", "l"),
        ("m not updated", "        m = new\n", ""), ("not divided", "acc / l)", "acc)"), ("no scale", " * scale", ""),
        ("key tail not hidden", f"tl.where(t < T, tl.sum(q[None, :] * k, 1) * scale, {_INF})",
        "tl.sum(q[None, :] * k, 1) * scale"),
        ("accumulator overwritten", "acc = acc * alpha + ", "acc = "), ("k for v", "p[:, None] * v",
        "p[:, None] * k"), ("base 2", "tl.exp(", "tl.exp2("),
        ("divided by D", "D**-0.5", "1 / D"), ("query 0 for all", "q_ptr + s * D + d", "q_ptr + d"), ("divided by T",
        "acc / l)", "acc / T)"),
        ("divided in every turn", "        m = new\n", "        m = new\n        acc = acc / l\n", "acc / l)", "acc)"),
    ],
    "flash_kernel": [
        ("accumulator not rescaled", "acc * alpha[:, None]", "acc"), ("sum not rescaled", "l * alpha", "l"),
        ("nothing rescaled", "acc * alpha[:, None]", "acc", "l * alpha", "l"), ("m not updated", "        m = new\n",
        ""),
        ("no causal mask", "(t[None, :] <= s[:, None] + T - S) & (t[None, :] < T)", "t[None, :] < T",
        "end = tl.minimum(T, T - S + (tl.program_id(0) + 1) * BM)", "end = T"),
        ("mask at the top left", "s[:, None] + T - S", "s[:, None]"), ("no scale", " * scale", ""), ("not divided",
        "acc / l[:, None]", "acc"),
        ("diagonal tile skipped", "(tl.program_id(0) + 1) * BM", "tl.program_id(0) * BM"), ("walk forgets T - S",
        "T - S + (tl", "(tl"),
        ("masked with 0", f"scores, {_INF})", "scores, 0.0)"), ("k for v", "tl.dot(p, v)", "tl.dot(p, k)"), ("base 2",
        "tl.exp(", "tl.exp2("),
        ("accumulator overwritten", "acc * alpha[:, None] + ", ""),
    ],
    "decode_kernel": [
        ("!", "tl.load(lengths_ptr + b)", "N + 0 * tl.load(lengths_ptr + b)", "t[:, None] < length",
        "t[:, None] < N + 1"),
        ("lengths ignored", "tl.load(lengths_ptr + b)", "N"), ("newest slot missing", "tl.load(lengths_ptr + b)",
        "tl.maximum(tl.load(lengths_ptr + b) - 1, 0)"),
        ("first length for all", "lengths_ptr + b", "lengths_ptr"), ("heads tiled", "h // (H // K)", "h % K"),
        ("no scale", " * scale", ""),
        ("key head 0 for all", "h // (H // K)", "0"), ("divided by D", "D**-0.5", "1 / D"), ("k for v",
        "p[:, None] * v", "p[:, None] * k"),
        ("tail not hidden", f"tl.where(t < length, tl.sum(q[None, :] * k, 1) * scale, {_INF})",
        "tl.sum(q[None, :] * k, 1) * scale"),
        ("not divided", "acc / tl.where(l == 0.0, 1.0, l)", "acc"), ("empty is NaN",
        "acc / tl.where(l == 0.0, 1.0, l)", "acc / l"),
        ("sequence 0 for all", "(b * K + h", "(h", "(H // K)) * N", "(H // K)) * N"), ("only the first tile",
        "range(0, length, BLOCK)", "range(0, tl.minimum(length, 1), BLOCK)"),
        ("last tile alone", "acc * alpha + ", "", "l * alpha + ", ""),
    ],
    "cross_entropy_kernel": [
        ("sum not rescaled", "l * tl.exp(m - new)", "l"), ("only the first tile", "range(0, V, BLOCK)", "range(0, 1)"),
        ("sum overwritten", "l * tl.exp(m - new) + ", ""), ("other is 0", f"other={_INF}", "other=0.0"),
        ("maximum not added", "m + tl.log(l)", "tl.log(l)"),
        ("sign", "m + tl.log(l) - tl.load(z_ptr + row * V + label)",
        "tl.load(z_ptr + row * V + label) - m - tl.log(l)"),
        ("label's logit missing", " - tl.load(z_ptr + row * V + label)", ""), ("label's logit from row 0",
        "z_ptr + row * V + label", "z_ptr + label"),
        ("ignored rows not written", "        tl.store(out_ptr + row, 0.0)\n", "        pass\n"), ("label of row 0",
        "labels_ptr + row", "labels_ptr"),
        ("!", "label == -100", "label == -1"), ("row 0 for all", "row * V + ", ""),
    ],
}
