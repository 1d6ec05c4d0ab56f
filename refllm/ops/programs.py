"""What the formulas of several records share (`refllm.ops.contracts`): the definitions once more, as a few lines of
float64 NumPy each, for reproductions, which run without refllm. Tested against `refllm.ops`.
"""

RMS_NORM = """def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)

"""
LAYER_NORM = """def layer_norm(x, weight, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    y = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if bias is None else y + bias

"""
ROTATE = """def rotate(x, cos, sin, interleaved):
    cos, sin, R, out = cos[..., None, :, :], sin[..., None, :, :], 2 * cos.shape[-1], x.copy()
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out

"""
ATTENTION = """def attention(q, k, v, scale=None, causal=True, key_mask=None, return_lse=False):
    (S, D), T, g = q.shape[2:], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat(g, axis=1), np.nan_to_num(v.repeat(g, axis=1))
    seen = np.ones((S, T), bool) if key_mask is None else key_mask[:, None, None]
    seen = seen & (np.arange(T) <= np.arange(S)[:, None] + T - S) if causal else seen
    s = np.where(seen, q @ k.swapaxes(2, 3) * (D**-0.5 if scale is None else scale), -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-1e300)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    return (e @ v / np.where(total == 0, 1, total), np.log(total)[..., 0] + top[..., 0])[: 1 + return_lse]

"""
LOSS = """def cross_entropy(logits, labels, ignore_index=-100, reduction="mean"):
    counted = labels != ignore_index
    z = logits[counted] - logits[counted].max(axis=-1, keepdims=True)
    loss = np.zeros(len(labels))
    loss[counted] = np.log(np.exp(z).sum(axis=-1)) - z[np.arange(len(z)), labels[counted]]
    return (loss if reduction == "none" else loss.sum() / (counted.sum() if reduction == "mean" else 1),)

"""
