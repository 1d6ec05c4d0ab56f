"""Norms as beginners write them."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from beginners import beginner


@beginner("rms_norm")
def rms_mean_without_square(x, weight, eps):
    """The mean of x is under the root, not the mean of its squares."""
    return x / np.sqrt(np.abs(x.mean(axis=-1, keepdims=True)) + eps) * weight


@beginner("rms_norm", "torch")
def rms_eps_outside(x, weight, eps):
    """Eps is added to the root, not under it."""
    rms = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True))
    return weight * (x / (rms + eps))


@beginner("rms_norm")
def rms_eps_outside_of_a_vector_norm(x, weight, eps):
    """Eps is added to the root, not under it."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    rms = length / math.sqrt(x.shape[-1])
    return x / (rms + eps) * weight


@beginner("rms_norm")
def rms_unit_length(x, weight, eps):
    """The squares are summed and not averaged."""
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + eps) * weight


@beginner("rms_norm", "torch")
def rms_normalize(x, weight, eps):
    """Rows are brought to length 1: the squares are summed and not averaged, and eps is not used."""
    return F.normalize(x, dim=-1) * weight


@beginner("rms_norm", "torch")
def rms_of_std(x, weight, eps):
    """The variance is under the root, not the mean of the squares."""
    return x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * weight


@beginner("rms_norm", "torch")
def rms_plus_one(x, weight, eps):
    """The weight is used as 1 + weight."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y * (1.0 + weight)


@beginner("rms_norm")
def rms_no_weight(x, weight, eps):
    """The weight is not applied."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


@beginner("rms_norm", "torch")
def rms_multiplied(x, weight, eps):
    """x is multiplied by the root, and should be divided by it."""
    norm = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * norm * weight


@beginner("rms_norm")
def rms_mean_of_all(x, weight, eps):
    """One mean is taken over the whole array, not one for each row."""
    return weight * x / np.sqrt(np.mean(x**2) + eps)


@beginner("rms_norm")
def rms_axis_0(x, weight, eps):
    """The mean runs over the rows (axis 0), not along each row."""
    return weight * x / np.sqrt(np.mean(x**2, axis=0, keepdims=True) + eps)


@beginner("rms_norm", "torch")
def rms_layer_norm(x, weight, eps):
    """The mean is subtracted: this is LayerNorm."""
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


@beginner("rms_norm", "torch")
def rms_own_eps(x, weight, eps):
    """The argument eps is not used; 1e-6 is."""
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * weight


@beginner("rms_norm")
def rms_no_root(x, weight, eps):
    """x is divided by the mean square, not by its root."""
    ms = np.mean(np.square(x), -1, keepdims=True)
    return x / (ms + eps) * weight


@beginner("rms_norm", "torch")
def rms_weight_first(x, weight, eps):
    """The weight is applied before the mean square is taken."""
    x = x * weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@beginner("rms_norm")
def rms_largest(x, weight, eps):
    """x is divided by the largest magnitude of its row, not by the root of the mean square."""
    return x / (np.abs(x).max(-1, keepdims=True) + eps) * weight


@beginner("rms_norm")
def rms_mean_magnitude(x, weight, eps):
    """x is divided by the mean magnitude, not by the root of the mean square."""
    return x / (np.abs(x).mean(-1, keepdims=True) + eps) * weight


@beginner("rms_norm", "torch")
def rms_eps_squared(x, weight, eps):
    """Eps is squared before it is added."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps**2) * weight


@beginner("rms_norm")
def rms_one_less(x, weight, eps):
    """The sum of squares is divided by E - 1, not by E."""
    E = x.shape[-1]
    return x / np.sqrt((x * x).sum(-1, keepdims=True) / (E - 1) + eps) * weight


@beginner("rms_norm")
def rms_length_of_batch(x, weight, eps):
    """The sum of squares is divided by the number of rows, not by E."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True) / max(1, len(x)) + eps) * weight


@beginner("rms_norm")
def rms_square_of_mean(x, weight, eps):
    """The mean is squared, not the squares averaged."""
    return x / np.sqrt(x.mean(-1, keepdims=True) ** 2 + eps) * weight


@beginner("add_rms_norm")
def add_rms_returns_x(x, residual, weight, eps):
    """The second result is x, not residual + x."""
    r = x + residual
    return r / np.sqrt((r * r).mean(-1, keepdims=True) + eps) * weight, x.copy()


@beginner("add_rms_norm", "torch")
def add_rms_returns_residual(x, residual, weight, eps):
    """The second result is the residual as it came, not residual + x."""
    h = residual + x
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight, residual.clone()


@beginner("add_rms_norm", "torch")
def add_rms_norm_of_x(x, residual, weight, eps):
    """The norm is that of x alone, not of residual + x."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y, residual + x


@beginner("add_rms_norm")
def add_rms_swapped(x, residual, weight, eps):
    """The two results are exchanged."""
    r = residual + x
    return r, weight * r / np.sqrt((r * r).mean(-1, keepdims=True) + eps)


@beginner("add_rms_norm")
def add_rms_added_after(x, residual, weight, eps):
    """The residual is added after the norm."""
    y = weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return residual + y, residual + x


@beginner("add_rms_norm", "torch")
def add_rms_eps_outside(x, residual, weight, eps):
    """Eps is added to the root, not under it."""
    r = residual + x
    return r / (r.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight, r


@beginner("layer_norm", "torch")
def layer_unbiased(x, weight, bias, eps):
    """The variance is divided by E - 1 (torch.var's default), not by E."""
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm", "torch")
def layer_annotated(x, weight, bias, eps):
    """Divided by the standard deviation with E - 1, and eps is outside the root."""
    y = weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps)
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_not_centred(x, weight, bias, eps):
    """The mean is subtracted for the variance, but not in the result."""
    y = x / np.sqrt(x.var(-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_eps_outside(x, weight, bias, eps):
    """Eps is added to the standard deviation, not under the root."""
    y = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_no_bias(x, weight, bias, eps):
    """The bias is not added."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight


@beginner("layer_norm", "torch")
def layer_arguments_exchanged(x, weight, bias, eps):
    """Weight and bias are exchanged."""
    shift = torch.zeros_like(weight) if bias is None else bias
    return F.layer_norm(x, (x.shape[-1],), shift, weight, eps)


@beginner("layer_norm")
def layer_batch_norm(x, weight, bias, eps):
    """Mean and variance run over the rows (axis 0): this is BatchNorm."""
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_bias_first(x, weight, bias, eps):
    """The bias is added before the weight multiplies."""
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y * weight if bias is None else (y + bias) * weight


@beginner("layer_norm", "torch")
def layer_no_root(x, weight, bias, eps):
    """Divided by the variance, not by its root."""
    var = x.var(-1, unbiased=False, keepdim=True)
    y = (x - x.mean(-1, keepdim=True)) / (var + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_of_everything(x, weight, bias, eps):
    """One mean and one variance are taken over the whole array, not one for each row."""
    y = (x - x.mean()) / np.sqrt(x.var() + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm")
def layer_mean_square(x, weight, bias, eps):
    """The mean square of x is under the root, not its variance."""
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm", "torch")
def layer_is_rms(x, weight, bias, eps):
    """No mean is subtracted: this is RMSNorm."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm", "torch")
def layer_plus_one(x, weight, bias, eps):
    """The weight is used as 1 + weight."""
    return F.layer_norm(x, (x.shape[-1],), 1 + weight, bias, eps)


@beginner("layer_norm")
def layer_sum_of_squares(x, weight, bias, eps):
    """The squares are summed and not averaged."""
    d = x - x.mean(-1, keepdims=True)
    y = d / np.sqrt((d * d).sum(-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


@beginner("layer_norm", "torch")
def layer_default_eps(x, weight, bias, eps):
    """The argument eps is not used; 1e-5 is."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


@beginner("add_layer_norm")
def add_layer_added_after(x, residual, weight, bias, eps):
    """The residual is added after the norm."""
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight
    y = y if bias is None else y + bias
    return residual + y, residual + x


@beginner("add_layer_norm", "torch")
def add_layer_returns_y_twice(x, residual, weight, bias, eps):
    """The second result is the normed value, not residual + x."""
    y = F.layer_norm(residual + x, (x.shape[-1],), weight, bias, eps)
    return y, y.clone()


@beginner("add_layer_norm", "torch")
def add_layer_of_residual(x, residual, weight, bias, eps):
    """The norm is that of the residual alone, not of residual + x."""
    return F.layer_norm(residual, (x.shape[-1],), weight, bias, eps), residual + x


@beginner("add_layer_norm")
def add_layer_unbiased(x, residual, weight, bias, eps):
    """The variance is divided by E - 1, not by E."""
    r = residual + x
    y = (r - r.mean(-1, keepdims=True)) / np.sqrt(r.var(-1, ddof=1, keepdims=True) + eps) * weight
    return (y if bias is None else y + bias), r
