"""The backward definitions once more, as a few lines of float64 NumPy each: for reproductions, which run without
refllm. Each `definition` takes the arguments in order and returns a tuple, None for what has no gradient. Tested
against `refllm.ops`.
"""

from refllm.ops.programs import ROTATE

_SUMMED = """def summed_to(x, shape):
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1), keepdims=True)


"""
_RMS_NORM = (
    _SUMMED
    + """def rms_norm_backward(dy, x, weight, eps):
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    n, g = x * r, dy * weight
    return r * (g - n * np.mean(g * n, axis=-1, keepdims=True)), summed_to(dy * n, weight.shape)

"""
)
_LAYER_NORM = (
    _SUMMED
    + """def layer_norm_backward(dy, x, weight, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    n, g = x * r, dy * weight
    dx = r * (g - g.mean(axis=-1, keepdims=True) - n * np.mean(g * n, axis=-1, keepdims=True))
    return dx, summed_to(dy * n, weight.shape), None if bias is None else summed_to(dy, bias.shape)

"""
)
_ATTENTION = """def attention_backward(
    do, q, k, v, o=None, lse=None, dlse=None, scale=None, causal=True, key_mask=None
):
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    scale, group = D**-0.5 if scale is None else scale, (B, K, H // K, T, D)
    k, v = (np.nan_to_num(x.repeat(H // K, axis=1)) for x in (k, v))
    seen = np.ones((S, T), bool) if key_mask is None else key_mask[:, None, None]
    seen = np.broadcast_to(seen & (np.arange(T) <= np.arange(S)[:, None] + T - S) if causal else seen, (B, H, S, T))
    q, do = (np.where(seen.any(axis=-1, keepdims=True), x, 0) for x in (q, do))
    s = np.where(seen, q @ k.swapaxes(2, 3) * scale, -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True, initial=-1e300))
    p = e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)
    dp = do @ v.swapaxes(2, 3)
    extra = 0 if dlse is None else dlse[..., None]
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True) + extra) * scale
    dk, dv = (x.reshape(group).sum(axis=2) for x in (ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ do))
    return ds @ k, dk, dv

"""
_LOSS = """def cross_entropy_backward(dloss, logits, labels, ignore_index=-100, reduction="mean"):
    counted, d = labels != ignore_index, np.zeros(logits.shape)
    e = np.exp(logits[counted] - logits[counted].max(axis=-1, keepdims=True))
    d[counted] = e / e.sum(axis=-1, keepdims=True)
    d[np.flatnonzero(counted), labels[counted]] -= 1
    each = np.broadcast_to(dloss, labels.shape) / (max(1, counted.sum()) if reduction == "mean" else 1)
    return (np.where(counted[:, None], d * each[:, None], 0),)

"""
_SLOPE = """def act(x, name):
    erf = np.vectorize(math.erf, otypes=[float])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    tanh_gelu = lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    gelu = lambda x: x * (1 + erf(x / 2**0.5)) / 2
    return {
        "silu": lambda: x * sigmoid(x), "swish": lambda: x * sigmoid(x), "relu": lambda: np.maximum(x, 0),
        "relu2": lambda: np.maximum(x, 0) ** 2, "relu6": lambda: np.clip(x, 0, 6), "gelu": lambda: gelu(x),
        "gelu_python": lambda: gelu(x), "gelu_10": lambda: np.clip(gelu(x), -10, 10),
        "quick_gelu": lambda: x * sigmoid(1.702 * x), "sigmoid": lambda: sigmoid(x), "tanh": lambda: np.tanh(x),
        "linear": lambda: x, "mish": lambda: x * np.tanh(np.logaddexp(x, 0)),
        "hardswish": lambda: x * np.clip(x + 3, 0, 6) / 6, "leaky_relu": lambda: np.where(x > 0, x, 0.01 * x),
        "laplace": lambda: (1 + erf((x - 0.707107) / (0.282095 * 2**0.5))) / 2,
        "sqrtsoftplus": lambda: np.sqrt(np.logaddexp(x, 0)),
    }.get(name, lambda: tanh_gelu(x))()


def slope(x, name):  # by central differences
    h = 1e-6 * np.maximum(1, np.abs(x))
    return (act(x + h, name) - act(x - h, name)) / (2 * h)

"""

PROGRAMS = {
    "linear": """def definition(dy, x, weight, bias):
    rows, given = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return dy @ weight, rows.T @ given, None if bias is None else rows.sum(axis=0)""",
    "embedding": """def definition(dy, ids, weight):
    d = np.zeros(weight.shape)
    np.add.at(d, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return (d,)""",
    "rms_norm": _RMS_NORM
    + """
def definition(dy, x, weight, eps):
    return rms_norm_backward(dy, x, weight, eps)""",
    "add_rms_norm": _RMS_NORM
    + """
def definition(dy, dsum, x, residual, weight, eps):
    dx, dweight = rms_norm_backward(dy, residual + x, weight, eps)
    return dsum + dx, dsum + dx, dweight""",
    "layer_norm": _LAYER_NORM
    + """
def definition(dy, x, weight, bias, eps):
    return layer_norm_backward(dy, x, weight, bias, eps)""",
    "add_layer_norm": _LAYER_NORM
    + """
def definition(dy, dsum, x, residual, weight, bias, eps):
    dx, dweight, dbias = layer_norm_backward(dy, residual + x, weight, bias, eps)
    return dsum + dx, dsum + dx, dweight, dbias""",
    "rope": ROTATE
    + """
def definition(dq, dk, cos, sin, interleaved):
    return rotate(dq, cos, -sin, interleaved), rotate(dk, cos, -sin, interleaved)""",
    "norm_rope": _LAYER_NORM
    + "\n"
    + _RMS_NORM.removeprefix(_SUMMED)
    + "\n"
    + ROTATE
    + """
def definition(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    def one(d, x, weight):
        d, weight = rotate(d, cos, -sin, interleaved), weight[:, None, :]
        if norm == "rms":
            dx, dweight = rms_norm_backward(d, x, weight, eps)
        else:
            dx, dweight, _ = layer_norm_backward(d, x, weight, None, eps)
        return dx, dweight[:, 0]

    (dq, dq_weight), (dk, dk_weight) = one(dq, q, q_weight), one(dk, k, k_weight)
    return dq, dk, dq_weight, dk_weight""",
    "rms_norm_qkv_rope": _RMS_NORM
    + "\n"
    + ROTATE
    + """
def definition(dq, dk, dv, x, weight, w_qkv, b_qkv, cos, sin, eps, num_heads, num_kv_heads, interleaved):
    turned = [rotate(d, cos, -sin, interleaved) for d in (dq, dk)]
    d = np.concatenate([*turned, dv], axis=1).swapaxes(1, 2).reshape(-1, len(w_qkv))
    n = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    dx, dweight = rms_norm_backward((d @ w_qkv).reshape(x.shape), x, weight, eps)
    return dx, dweight, d.T @ n.reshape(-1, x.shape[-1]), None if b_qkv is None else d.sum(axis=0)""",
    "attention": _ATTENTION.replace("def attention_backward", "def definition").rstrip(),
    "decode_attention": _ATTENTION
    + """
def definition(do, q, k, v, lengths, o=None, lse=None, scale=None):
    found = [np.zeros(x.shape) for x in (q, k, v)]
    for b, n in enumerate(map(int, lengths)):
        row = slice(b, b + 1)
        dq, dk, dv = attention_backward(do[row], q[row], k[row, :, :n], v[row, :, :n], scale=scale)
        found[0][row], found[1][row, :, :n], found[2][row, :, :n] = dq, dk, dv
    return tuple(found)""",
    "softmax": """def definition(dp, p):
    return (p * (dp - np.sum(p * dp, axis=-1, keepdims=True)),)""",
    "activation": _SLOPE
    + """
def definition(dy, x, name):
    return (dy * slope(x, name),)""",
    "glu": _SLOPE
    + """
def definition(dh, gate, up, name):
    return dh * up * slope(gate, name), dh * act(gate, name)""",
    "swiglu": """def definition(dh, gate, up):
    s = 1 / (1 + np.exp(-gate))
    return dh * up * s * (1 + gate * (1 - s)), dh * gate * s""",
    "relu2": """def definition(dy, x):
    return (2 * np.maximum(x, 0) * dy,)""",
    "cross_entropy": _LOSS.replace("def cross_entropy_backward", "def definition").rstrip(),
    "linear_cross_entropy": _LOSS
    + """
def definition(dloss, x, weight, labels, ignore_index=-100, reduction="mean"):
    x = np.where((labels != ignore_index)[:, None], x, 0)
    (d,) = cross_entropy_backward(dloss, x @ weight.T, labels, ignore_index, reduction)
    return d @ weight, d.T @ x""",
    "mean_squared_error": """def definition(dloss, x, target):
    return (2 * (x - target) * dloss / max(1, x.size),)""",
    "binary_cross_entropy": """def definition(dloss, logits, target):
    return ((1 / (1 + np.exp(-logits)) - target) * dloss / max(1, logits.size),)""",
}
"""Forward operator -> the source of its backward pass. It finds numpy as np, and `math` where it has an erf."""
