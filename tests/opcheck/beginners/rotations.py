"""Rotations as beginners write them."""

import numpy as np
import torch
import torch.nn.functional as F

from beginners import beginner


def heads(table):
    return table[..., None, :, :]


def pairs(x, R, interleaved):
    return (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])


def joined(x, a, b, R, interleaved):
    out = x.copy()
    if interleaved:
        out[..., 0:R:2], out[..., 1:R:2] = a, b
    else:
        out[..., : R // 2], out[..., R // 2 : R] = a, b
    return out


def turn(x, cos, sin, interleaved):
    c, s, R = heads(cos), heads(sin), 2 * cos.shape[-1]
    a, b = pairs(x, R, interleaved)
    return joined(x, a * c - b * s, b * c + a * s, R, interleaved)


def rotated_torch(x, cos, sin, interleaved):
    c, s, R = heads(cos), heads(sin), 2 * cos.shape[-1]
    a, b = pairs(x, R, interleaved)
    first, second = a * c - b * s, b * c + a * s
    y = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((y, x[..., R:]), -1)


@beginner("rope", "torch")
def rope_sign_of_rotate_half(q, k, cos, sin, *, interleaved):
    """It rotates the other way: the sign of sin is wrong."""

    def rotate_half(x):
        if interleaved:
            return torch.stack((x[..., 1::2], -x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((x[..., half:], -x[..., :half]), dim=-1)

    R = 2 * cos.shape[-1]
    if interleaved:
        c, s = heads(cos).repeat_interleave(2, -1), heads(sin).repeat_interleave(2, -1)
    else:
        c, s = heads(torch.cat((cos, cos), -1)), heads(torch.cat((sin, sin), -1))

    def one(x):
        return torch.cat((x[..., :R] * c + rotate_half(x[..., :R]) * s, x[..., R:]), -1)

    return one(q), one(k)


@beginner("rope")
def rope_always_half_split(q, k, cos, sin, *, interleaved):
    """The argument interleaved is not used: pairs are always (i, i + R/2)."""
    return turn(q, cos, sin, False), turn(k, cos, sin, False)


@beginner("rope", "torch")
def rope_always_complex(q, k, cos, sin, *, interleaved):
    """The argument interleaved is not used: pairs are always (2i, 2i + 1)."""
    R = 2 * cos.shape[-1]
    turned = torch.complex(heads(cos).float(), heads(sin).float())

    def one(x):
        z = torch.view_as_complex(x[..., :R].float().reshape(*x.shape[:-1], -1, 2).contiguous())
        y = torch.view_as_real(z * turned).flatten(-2).to(x.dtype)
        return torch.cat((y, x[..., R:]), -1)

    return one(q), one(k)


@beginner("rope")
def rope_interleaved_exchanged(q, k, cos, sin, *, interleaved):
    """The argument interleaved is taken the other way round."""
    return turn(q, cos, sin, not interleaved), turn(k, cos, sin, not interleaved)


@beginner("rope")
def rope_only_q(q, k, cos, sin, *, interleaved):
    """k is returned as it came, not rotated."""
    return turn(q, cos, sin, interleaved), k.copy()


@beginner("rope")
def rope_sin_cos(q, k, cos, sin, *, interleaved):
    """cos and sin are exchanged."""
    return turn(q, sin, cos, interleaved), turn(k, sin, cos, interleaved)


@beginner("rope", "torch")
def rope_table_repeated_the_wrong_way(q, k, cos, sin, *, interleaved):
    """The tables are stretched for the other pairing: dims i and i + R/2 have not the same angle."""
    R = 2 * cos.shape[-1]
    if interleaved:
        c, s = heads(torch.cat((cos, cos), -1)), heads(torch.cat((sin, sin), -1))
    else:
        c, s = heads(cos).repeat_interleave(2, -1), heads(sin).repeat_interleave(2, -1)

    def rotate_half(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((-x[..., R // 2 :], x[..., : R // 2]), -1)

    def one(x):
        return torch.cat((x[..., :R] * c + rotate_half(x[..., :R]) * s, x[..., R:]), -1)

    return one(q), one(k)


@beginner("rope", "torch")
def rope_halves_joined(q, k, cos, sin, *, interleaved):
    """Interleaved pairs are rotated and then written as two halves."""
    c, s, R = heads(cos), heads(sin), 2 * cos.shape[-1]

    def one(x):
        a, b = pairs(x, R, interleaved)
        return torch.cat((a * c - b * s, b * c + a * s, x[..., R:]), -1)

    return one(q), one(k)


@beginner("rope")
def rope_rest_is_zero(q, k, cos, sin, *, interleaved):
    """The dims from R on are 0, and should pass through."""
    R = 2 * cos.shape[-1]

    def one(x):
        y = turn(x, cos, sin, interleaved)
        y[..., R:] = 0
        return y

    return one(q), one(k)


@beginner("rope")
def rope_first_overwritten(q, k, cos, sin, *, interleaved):
    """The second of a pair is computed from the first one after that was rotated."""
    c, s, R = heads(cos), heads(sin), 2 * cos.shape[-1]

    def one(x):
        a, b = pairs(x, R, interleaved)
        a = a * c - b * s
        b = b * c + a * s
        return joined(x, a, b, R, interleaved)

    return one(q), one(k)


@beginner("rope")
def rope_one_position_late(q, k, cos, sin, *, interleaved):
    """Positions are off by one: token s is rotated with the tables of token s - 1."""
    cos, sin = np.roll(cos, 1, axis=-2), np.roll(sin, 1, axis=-2)
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


@beginner("rope")
def rope_first_batch_row(q, k, cos, sin, *, interleaved):
    """The tables of the first batch row are used for all rows."""
    if cos.ndim == 3 and len(cos):
        cos, sin = cos[0], sin[0]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


@beginner("rope")
def rope_last_dims(q, k, cos, sin, *, interleaved):
    """The last R dims are rotated, not the first R."""
    D, R = q.shape[-1], 2 * cos.shape[-1]

    def one(x):
        return np.concatenate((x[..., : D - R], turn(x[..., D - R :], cos, sin, interleaved)), -1)

    return one(q), one(k)


@beginner("rope")
def rope_sign_of_second(q, k, cos, sin, *, interleaved):
    """The second of a pair has a minus where a plus belongs."""
    c, s, R = heads(cos), heads(sin), 2 * cos.shape[-1]

    def one(x):
        a, b = pairs(x, R, interleaved)
        return joined(x, a * c - b * s, b * c - a * s, R, interleaved)

    return one(q), one(k)


@beginner("rope", "torch")
def rope_position_zero(q, k, cos, sin, *, interleaved):
    """Every token is rotated as the first one."""
    cos, sin = cos[..., :1, :], sin[..., :1, :]
    return rotated_torch(q, cos, sin, interleaved), rotated_torch(k, cos, sin, interleaved)


@beginner("rope")
def rope_twice(q, k, cos, sin, *, interleaved):
    """The rotation is applied twice."""
    q, k = turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


def rms(x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def normed(x, eps, norm):
    return rms(x - x.mean(-1, keepdims=True) if norm == "layer" else x, eps)


@beginner("norm_rope")
def norm_rope_rotated_first(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The rotation comes before the norm."""
    q, k = turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)
    return normed(q, eps, norm) * q_weight[:, None], normed(k, eps, norm) * k_weight[:, None]


@beginner("norm_rope")
def norm_rope_one_weight(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The weight of q is used for k."""
    q, k = normed(q, eps, norm) * q_weight[:, None], normed(k, eps, norm) * q_weight[: k.shape[1], None]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


@beginner("norm_rope")
def norm_rope_over_all_heads(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The norm runs over all heads of a token together, not over each head."""

    def one(x, weight):
        x = x - x.mean((1, 3), keepdims=True) if norm == "layer" else x
        return x / np.sqrt((x * x).mean((1, 3), keepdims=True) + eps) * weight[:, None]

    return turn(one(q, q_weight), cos, sin, interleaved), turn(one(k, k_weight), cos, sin, interleaved)


@beginner("norm_rope", "torch")
def norm_rope_always_rms(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The argument norm is not used: it is always RMSNorm."""

    def one(x, weight):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight[:, None]
        return rotated_torch(y, cos, sin, interleaved)

    return one(q, q_weight), one(k, k_weight)


@beginner("norm_rope")
def norm_rope_first_weight(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The weight of the first head is used for all heads."""
    q, k = normed(q, eps, norm) * q_weight[0], normed(k, eps, norm) * k_weight[0]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


@beginner("norm_rope")
def norm_rope_k_not_normed(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """k is not normed."""
    q = normed(q, eps, norm) * q_weight[:, None]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


@beginner("norm_rope")
def norm_rope_no_weights(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """The weights are not applied."""
    return turn(normed(q, eps, norm), cos, sin, interleaved), turn(normed(k, eps, norm), cos, sin, interleaved)


@beginner("norm_rope", "torch")
def norm_rope_eps_outside(q, k, q_weight, k_weight, cos, sin, eps, *, norm, interleaved):
    """Eps is added to the root, not under it."""

    def one(x, weight):
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        y = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight[:, None]
        return rotated_torch(y, cos, sin, interleaved)

    return one(q, q_weight), one(k, k_weight)


def projected(x, norm_weight, w_qkv, b_qkv, eps, heads, transposed=True):
    y = rms(x, eps) * norm_weight @ w_qkv.T
    y = y if b_qkv is None else y + b_qkv
    y = y.reshape(*x.shape[:2], heads, -1)
    return y.transpose(0, 2, 1, 3) if transposed else y


@beginner("rms_norm_qkv_rope")
def qkv_k_and_v(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """The rows of k and v are exchanged."""
    H, K = num_heads, num_kv_heads
    y = projected(x, norm_weight, w_qkv, b_qkv, eps, H + 2 * K)
    q, v, k = y[:, :H], y[:, H : H + K], y[:, H + K :]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), v.copy()


@beginner("rms_norm_qkv_rope", "torch")
def qkv_reshaped(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """[B, S, H D] is reshaped to [B, H, S, D] without a transpose."""
    (B, S, _E), H, K = x.shape, num_heads, num_kv_heads
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm_weight
    y = F.linear(h, w_qkv, b_qkv)
    D = y.shape[-1] // (H + 2 * K)
    q, k, v = y.split((H * D, K * D, K * D), -1)
    q, k, v = q.reshape(B, H, S, D), k.reshape(B, K, S, D), v.reshape(B, K, S, D)
    return rotated_torch(q, cos, sin, interleaved), rotated_torch(k, cos, sin, interleaved), v


@beginner("rms_norm_qkv_rope")
def qkv_v_rotated(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """v is rotated as well."""
    H, K = num_heads, num_kv_heads
    y = turn(projected(x, norm_weight, w_qkv, b_qkv, eps, H + 2 * K), cos, sin, interleaved)
    return y[:, :H].copy(), y[:, H : H + K].copy(), y[:, H + K :].copy()


@beginner("rms_norm_qkv_rope", "torch")
def qkv_not_normed(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """The norm is missing before the projection."""
    H, K = num_heads, num_kv_heads
    y = F.linear(x, w_qkv, b_qkv).view(*x.shape[:2], H + 2 * K, -1).transpose(1, 2)
    q, k, v = y.split((H, K, K), 1)
    return rotated_torch(q, cos, sin, interleaved), rotated_torch(k, cos, sin, interleaved), v.contiguous()


@beginner("rms_norm_qkv_rope")
def qkv_no_bias(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """The bias is not added."""
    H, K = num_heads, num_kv_heads
    y = projected(x, norm_weight, w_qkv, None, eps, H + 2 * K)
    q, k, v = y[:, :H], y[:, H : H + K], y[:, H + K :]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), v.copy()


@beginner("rms_norm_qkv_rope")
def qkv_no_norm_weight(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """The norm's weight is not applied."""
    H, K = num_heads, num_kv_heads
    y = projected(x, np.ones_like(norm_weight), w_qkv, b_qkv, eps, H + 2 * K)
    q, k, v = y[:, :H], y[:, H : H + K], y[:, H + K :]
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), v.copy()


@beginner("rms_norm_qkv_rope")
def qkv_dims_before_heads(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """Columns are taken as [D, heads], not as [heads, D]."""
    (B, S, _), H, K = x.shape, num_heads, num_kv_heads
    y = projected(x, norm_weight, w_qkv, b_qkv, eps, H + 2 * K, transposed=False).reshape(B, S, -1)
    D = y.shape[-1] // (H + 2 * K)
    q, k, v = np.split(y, [H * D, (H + K) * D], axis=-1)
    q, k, v = (part.reshape(B, S, D, -1).transpose(0, 3, 1, 2) for part in (q, k, v))
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), np.ascontiguousarray(v)


@beginner("rms_norm_qkv_rope")
def qkv_k_not_rotated(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *, num_heads, num_kv_heads, interleaved):
    """k is not rotated."""
    H, K = num_heads, num_kv_heads
    y = projected(x, norm_weight, w_qkv, b_qkv, eps, H + 2 * K)
    return turn(y[:, :H], cos, sin, interleaved), y[:, H : H + K].copy(), y[:, H + K :].copy()
