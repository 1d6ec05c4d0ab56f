"""The definitions once more, as a few lines of float64 NumPy each: for reproductions, which run without refllm.

They take the arguments of the contract as arrays and return a tuple of outputs. Tested against `refllm.ops`.
"""

_NORMS = {
    "rms": """def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)""",
    "layer": """def layer_norm(x, weight, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    y = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if bias is None else y + bias""",
}
_ROPE = """def rotate(x, cos, sin, interleaved):
    cos, sin, R, out = cos[..., None, :, :], sin[..., None, :, :], 2 * cos.shape[-1], x.copy()
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out"""
_ATTENTION = """def attention(q, k, v, scale=None, causal=True, key_mask=None, return_lse=False):
    (S, D), T, g = q.shape[2:], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat(g, axis=1), np.nan_to_num(v.repeat(g, axis=1))
    seen = np.ones((S, T), bool) if key_mask is None else key_mask[:, None, None]
    seen = seen & (np.arange(T) <= np.arange(S)[:, None] + T - S) if causal else seen
    s = np.where(seen, q @ k.swapaxes(2, 3) * (D**-0.5 if scale is None else scale), -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-1e300)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    return (e @ v / np.where(total == 0, 1, total), np.log(total)[..., 0] + top[..., 0])[: 1 + return_lse]"""
_LOSS = """def cross_entropy(logits, labels, ignore_index=-100, reduction="mean"):
    counted = labels != ignore_index
    z = logits[counted] - logits[counted].max(axis=-1, keepdims=True)
    loss = np.zeros(len(labels))
    loss[counted] = np.log(np.exp(z).sum(axis=-1)) - z[np.arange(len(z)), labels[counted]]
    return (loss if reduction == "none" else loss.sum() / (counted.sum() if reduction == "mean" else 1),)"""

PROGRAMS: dict[str, str] = {
    "rms_norm": f"""{_NORMS["rms"]}


def definition(x, weight, eps):
    return (rms_norm(x, weight, eps),)""",
    "add_rms_norm": f"""{_NORMS["rms"]}


def definition(x, residual, weight, eps):
    return rms_norm(residual + x, weight, eps), residual + x""",
    "layer_norm": f"""{_NORMS["layer"]}


def definition(x, weight, bias, eps):
    return (layer_norm(x, weight, bias, eps),)""",
    "add_layer_norm": f"""{_NORMS["layer"]}


def definition(x, residual, weight, bias, eps):
    return layer_norm(residual + x, weight, bias, eps), residual + x""",
    "rope": f"""{_ROPE}


def definition(q, k, cos, sin, interleaved):
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)""",
    "norm_rope": f"""{_ROPE}


def definition(q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    def one(x, weight):
        x = x - x.mean(axis=-1, keepdims=True) if norm == "layer" else x
        y = weight[:, None] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return rotate(y, cos, sin, interleaved)

    return one(q, q_weight), one(k, k_weight)""",
    "rms_norm_qkv_rope": f"""{_ROPE}


def definition(x, weight, w_qkv, b_qkv, cos, sin, eps, num_heads, num_kv_heads, interleaved):
    y = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) @ w_qkv.T
    y = y if b_qkv is None else y + b_qkv
    y = y.reshape(*x.shape[:2], num_heads + 2 * num_kv_heads, -1).swapaxes(1, 2)
    q, k, v = np.split(y, [num_heads, num_heads + num_kv_heads], axis=1)
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved), v""",
    "attention": _ATTENTION.replace("def attention", "def definition"),
    "decode_attention": f"""{_ATTENTION}


def definition(q, k, v, lengths, scale=None):
    rows = [(slice(b, b + 1), int(n)) for b, n in enumerate(lengths)]
    return (np.concatenate([attention(q[b], k[b, :, :n], v[b, :, :n], scale)[0] for b, n in rows]),)""",
    "swiglu": """def definition(gate, up):
    return (gate / (1 + np.exp(-gate)) * up,)""",
    "relu2": """def definition(x):
    return (np.maximum(x, 0) ** 2,)""",
    "cross_entropy": _LOSS.replace("def cross_entropy", "def definition"),
    "linear_cross_entropy": f"""{_LOSS}


def definition(x, weight, labels, ignore_index=-100, reduction="mean"):
    return cross_entropy(x @ weight.T, labels, ignore_index, reduction)""",
}
"""Source of `definition(...)` by operator."""
