"""Calls of the norms, alone and after the residual sum."""

from hypothesis import strategies as st

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.draws import VALUES, Seeds, beside, layouts, row_shape, seeded, values, weights

KINDS = VALUES
EPSILONS = (1e-5, 1e-6, 0.01, 0.0)


def norm(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """rms_norm, add_rms_norm, layer_norm or add_layer_norm: [..., E] with weight [E] and bias [E] or None.

    eps 0 comes with values whose squares are neither 0 nor lost in float32.
    """
    shape = row_shape(draw)
    kind = kind or draw(st.sampled_from(KINDS))
    with_bias = "layer" in operator and draw(st.booleans())
    lie = layouts(draw, shape, shape, shape[-1:], shape[-1:])
    x = values(draw, kind, shape, dtype, lie[0])
    residual = _residual(x, kind, shape, dtype, lie[1])
    eps = draw(st.sampled_from(EPSILONS[: 4 if _eps_may_be_0(kind, operator, shape) else 3]))
    wide = beside(draw, dtype, policy)
    x, residual, weight, bias = seeded(
        Seeds(draw), x, residual, weights(shape[-1:], wide, lie[2]), Array(shape[-1:], wide, layout=lie[3])
    )
    first = [x, residual, weight] if operator.startswith("add") else [x, weight]
    last = [bias if with_bias else None, eps] if "layer" in operator else [eps]
    return Call(operator, dtype, (*first, *last), kind=kind)


def _residual(x: Array, kind: str, shape: tuple[int, ...], dtype: str, layout: str) -> Array:
    """What x is added to: of its size, and 0 where the sum is to be what x is."""
    if kind in ("zero rows", "subnormal", "all equal"):
        return Array(shape, dtype, "zeros", layout=layout)
    return Array(shape, dtype, scale=x.scale, layout=layout)


def _eps_may_be_0(kind: str, operator: str, shape: tuple[int, ...]) -> bool:
    # One element has no variance, and two may be equal.
    return kind in ("plain", "outlier 10000") and ("layer" not in operator or shape[-1] > 8)
