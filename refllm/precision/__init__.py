"""Where an implementation rounds, and how: the rounding points, the policies, and the arithmetic that follows them."""

from refllm.precision.arithmetic import (
    DTYPES,
    EXACT,
    FUSED,
    HF_EAGER,
    HF_SDPA,
    NATIVE,
    POLICIES,
    Arithmetic,
    Dtype,
    Policy,
    arithmetic,
    check_dtype,
    largest,
    round_bfloat16,
    round_float16,
    rounding,
)

__all__ = [
    "DTYPES",
    "EXACT",
    "FUSED",
    "HF_EAGER",
    "HF_SDPA",
    "NATIVE",
    "POLICIES",
    "Arithmetic",
    "Dtype",
    "Policy",
    "arithmetic",
    "check_dtype",
    "largest",
    "round_bfloat16",
    "round_float16",
    "rounding",
]
