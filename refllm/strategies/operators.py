"""The strategy of every operator, by its name: the function that its record names (`refllm.ops.contracts`)."""

from importlib import import_module
from types import ModuleType

from hypothesis import strategies as st

from refllm.errors import InputError
from refllm.ops.backward_contracts import forward_name, is_backward
from refllm.ops.contracts import CONTRACTS, OPERATORS
from refllm.precision.dtype_names import dtype_name
from refllm.strategies.call import Call

DTYPES = ("bfloat16", "float16", "float32", "float64")
POLICIES = ("fused", "hf-eager", "hf-sdpa")


def calls(
    operator: str, *, dtype: str = "bfloat16", policy: str = "fused", kind: str | None = None
) -> st.SearchStrategy[Call]:
    """Calls of one operator. It shrinks to sizes of 1, dense, normal values, scale 1, nothing planted, seed 0.

    policy: "fused" covers the whole contract; "hf-eager" leaves out what eager code is not asked to stand: NaN behind a
    mask and queries without a key. kind: one of `kinds(operator)`, or None for any.
    Raises InputError for an operator, dtype, policy or kind that is not known.
    """
    allowed = kinds(operator, policy)
    dtype = dtype_name(dtype)
    if dtype not in DTYPES:
        raise InputError(f"calls: dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if kind is not None and kind not in allowed:
        raise InputError(f"calls: {operator} has no kind {kind!r} under {policy}; use one of: {'; '.join(allowed)}")

    if is_backward(operator):
        from refllm.strategies import backward_only

        forward = forward_name(operator)
        if forward not in CONTRACTS:
            return backward_only.gradients(operator, backward_only.only(operator, dtype, kind))
        return backward_only.gradients(operator, calls(forward, dtype=dtype, policy=policy, kind=kind))

    module, name = _strategy(operator)
    function = getattr(module, name)

    @st.composite
    def drawn(draw: st.DrawFn) -> Call:
        found: Call = function(draw, operator, dtype, policy, kind)
        return found

    return drawn()


def kinds(operator: str, policy: str = "fused") -> tuple[str, ...]:
    """The kinds of inputs that `calls` draws for an operator; InputError for one that is not known."""
    if is_backward(operator):
        from refllm.strategies import backward_only

        forward = forward_name(operator)
        return kinds(forward, policy) if forward in CONTRACTS else backward_only.KINDS
    if operator not in CONTRACTS:
        raise InputError(f"operator {operator!r} is not known; use one of {', '.join(OPERATORS)}")
    if policy not in POLICIES:
        raise InputError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    module, _ = _strategy(operator)
    if hasattr(module, "kinds"):  # some of them depend on the policy
        found: tuple[str, ...] = module.kinds(operator, policy)
        return found
    known = module.KINDS
    drawn: tuple[str, ...] = known[operator] if isinstance(known, dict) else known
    return drawn


families = kinds
"""Its name before families were models' alone; it stays, since it was public."""


def _strategy(operator: str) -> tuple[ModuleType, str]:
    """The module that draws the calls of an operator, and the name of its function."""
    module, _, name = CONTRACTS[operator].inputs.partition(":")
    return import_module(f"refllm.strategies.{module}"), name
