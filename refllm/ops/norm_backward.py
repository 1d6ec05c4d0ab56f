"""The gradients of RMSNorm and LayerNorm, alone and with the residual sum before them."""

import numpy as np

from refllm.precision import EXACT, Arithmetic

__all__ = ["add_layer_norm_backward", "add_rms_norm_backward", "layer_norm_backward", "rms_norm_backward"]


def rms_norm_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float, *, ar: Arithmetic = EXACT
) -> tuple[np.ndarray, np.ndarray]:
    """dx = r (g - n mean(g n)) and dw = sum of dy n over rows, with r = 1 / sqrt(mean(x^2) + eps), n = r x, g = w dy.

    n_i depends on x_j through r as well: dn_i/dx_j = r (delta_ij - n_i n_j / E), since dr/dx_j = -r^3 x_j / E. The
    second term is the correction that makes <dx, x> = 0 where eps is 0: a longer x gives the same y.
    Rounding: `rms_norm.grad.scaled` for g, `rms_norm.grad.terms` for each dy n, `rms_norm.grad` for dx and dw.
    """
    dy, x, weight = ar.array(dy), ar.array(x), ar.array(weight)
    r = 1 / np.sqrt(ar.mean(x * x) + eps)
    n, g = x * r, ar.round(dy * weight, "rms_norm.grad.scaled")
    dx = r * (g - n * np.mean(g * n, axis=-1, keepdims=True))
    terms = ar.round(dy * ar.round(n, "rms_norm.normalized"), "rms_norm.grad.terms")
    return ar.round(dx, "rms_norm.grad"), ar.round(summed_to(terms, weight.shape), "rms_norm.grad")


def layer_norm_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, *, ar: Arithmetic = EXACT
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dx = r (g - mean(g) - n mean(g n)), dw = sum of dy n and db = sum of dy over the rows, with n = r (x - mean(x)),
    r = 1 / sqrt(var(x) + eps), g = w dy; db is None without bias.

    As for RMSNorm, and the mean takes away what all elements of a row have in common: sum dx = 0.
    Rounding: `layer_norm.grad.statistics` for the mean and r that the forward pass kept, `layer_norm.grad.sum` for dw
    and db after the addition of every row, `layer_norm.grad`, each once.
    """
    dy, x, weight = ar.array(dy), ar.array(x), ar.array(weight)
    mean = np.mean(x, axis=-1, keepdims=True)
    r = 1 / np.sqrt(np.mean((x - mean) ** 2, axis=-1, keepdims=True) + eps)
    centred = x - ar.round(mean, "layer_norm.grad.statistics")
    r = ar.round(r, "layer_norm.grad.statistics")
    n, g = centred * r, dy * weight
    dx = r * (g - np.mean(g, axis=-1, keepdims=True) - n * np.mean(g * n, axis=-1, keepdims=True))
    dweight = _row_by_row(dy * n, weight.shape, ar)
    dbias = None if bias is None else ar.round(_row_by_row(dy, np.shape(bias), ar), "layer_norm.grad")
    return ar.round(dx, "layer_norm.grad"), ar.round(dweight, "layer_norm.grad"), dbias


def add_rms_norm_backward(
    dy: np.ndarray,
    dsum: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    eps: float,
    *,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx = dresidual = dsum + the dx of `rms_norm_backward` at residual + x, and its dw; dsum: of the sum handed on.

    Rounding: `add` for the forward's sum, then as `rms_norm_backward`, then `add.grad`.
    """
    r = ar.round(ar.array(residual) + ar.array(x), "add")
    through, dweight = rms_norm_backward(dy, r, weight, eps, ar=ar)
    dx = ar.round(ar.array(dsum) + through, "add.grad")
    return dx, dx, dweight


def add_layer_norm_backward(
    dy: np.ndarray,
    dsum: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    eps: float,
    *,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """dx = dresidual = dsum + the dx of `layer_norm_backward` at residual + x, and its dw and db.

    Rounding: `add` for the forward's sum, then as `layer_norm_backward`, then `add.grad`.
    """
    r = ar.round(ar.array(residual) + ar.array(x), "add")
    through, dweight, dbias = layer_norm_backward(dy, r, weight, bias, eps, ar=ar)
    dx = ar.round(ar.array(dsum) + through, "add.grad")
    return dx, dx, dweight, dbias


def _row_by_row(terms: np.ndarray, shape: tuple[int, ...], ar: Arithmetic) -> np.ndarray:
    """The sum over the rows, one after another where each addition is rounded (torch's CPU kernel, on one thread)."""
    if ar.exact or "layer_norm.grad.sum" not in ar.policy.points:
        return summed_to(terms, shape)
    total = np.zeros(shape, ar.work)
    for row in rows_first(terms, shape):
        total = ar.round(total + row, "layer_norm.grad.sum")
    return total


def rows_first(terms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[N, *shape]: what `summed_to` adds, term after term."""
    lead = terms.ndim - len(shape)
    repeated = [i for i in range(terms.ndim) if i < lead or (shape[i - lead] == 1 and terms.shape[i] != 1)]
    return np.moveaxis(terms, repeated, range(len(repeated))).reshape(-1, *shape)


def summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum over the axes along which an array of `shape` was repeated to the shape of x: the gradient of what a
    product or sum broadcasts."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1), keepdims=True)
