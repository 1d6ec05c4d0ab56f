"""The strategy of every operator, by its name."""

from collections.abc import Callable

from hypothesis import strategies as st

from refllm.dtype_names import dtype_name
from refllm.errors import InputError
from refllm.strategies import activations, attentions, losses, norms, rotations
from refllm.strategies.call import Call

DTYPES = ("bfloat16", "float16", "float32", "float64")
POLICIES = ("fused", "hf-eager", "hf-sdpa")

_Drawn = Callable[[st.DrawFn, str, str, str, str | None], Call]
_STRATEGIES: dict[str, _Drawn] = {
    "rms_norm": norms.norm,
    "add_rms_norm": norms.norm,
    "layer_norm": norms.norm,
    "add_layer_norm": norms.norm,
    "rope": rotations.rope,
    "norm_rope": rotations.rope,
    "rms_norm_qkv_rope": rotations.projected,
    "attention": attentions.attention,
    "decode_attention": attentions.decode,
    "swiglu": activations.swiglu,
    "relu2": activations.relu2,
    "cross_entropy": losses.cross_entropy,
    "linear_cross_entropy": losses.linear_cross_entropy,
}
OPERATORS = tuple(_STRATEGIES)
_FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), norms.FAMILIES),
    **dict.fromkeys(("cross_entropy", "linear_cross_entropy"), losses.FAMILIES),
    **rotations.FAMILIES,
    **activations.FAMILIES,
}


def calls(
    operator: str, *, dtype: str = "bfloat16", policy: str = "fused", family: str | None = None
) -> st.SearchStrategy[Call]:
    """Calls of one operator. It shrinks to sizes of 1, dense, normal values, scale 1, nothing planted, seed 0.

    policy: "fused" covers the whole contract; "hf-eager" leaves out what eager code is not asked to stand: NaN behind a
    mask and queries without a key. family: one of `families(operator)`, or None for any.
    Raises InputError for an operator, dtype, policy or family that is not known.
    """
    allowed = families(operator, policy)
    dtype = dtype_name(dtype)
    if dtype not in DTYPES:
        raise InputError(f"calls: dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if family is not None and family not in allowed:
        raise InputError(f"calls: {operator} has no family {family!r} under {policy}; use one of: {'; '.join(allowed)}")

    @st.composite
    def drawn(draw: st.DrawFn) -> Call:
        return _STRATEGIES[operator](draw, operator, dtype, policy, family)

    return drawn()


def families(operator: str, policy: str = "fused") -> tuple[str, ...]:
    """The families of inputs that `calls` draws for an operator; InputError for one that is not known."""
    if operator not in _STRATEGIES:
        raise InputError(f"operator {operator!r} is not known; use one of {', '.join(OPERATORS)}")
    if policy not in POLICIES:
        raise InputError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    if operator in attentions.FAMILIES:
        return attentions.families(operator, policy)
    return _FAMILIES[operator]
