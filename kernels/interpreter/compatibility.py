"""What differs between the versions of Triton that the interpreter runs on (3.6 to 3.9), found by looking."""

import inspect
from typing import Any

import triton
import triton.language as tl
from triton.compiler import code_generator
from triton.runtime import jit


class _Absent:
    """Stands for a class that this version does not have; nothing is an instance of it."""


ConstexprFunction: Any = getattr(jit, "ConstexprFunction", _Absent)
BoundConstexprFunction: Any = getattr(jit, "BoundConstexprFunction", _Absent)
base_value: Any = tl.core.base_value

CHAINED_COMPARISONS = "simultaneous multiple comparison" not in inspect.getsource(code_generator)
"""Whether a < b < c compiles. A version that cannot do it says so with these words."""


def plain_globals_allowed() -> bool:
    """Whether kernels may read global variables that are not tl.constexpr (TRITON_ALLOW_NON_CONSTEXPR_GLOBALS)."""
    return bool(triton.knobs.compilation.allow_non_constexpr_globals)


def launch_options() -> frozenset[str]:
    """Names that a launch takes beside the arguments of the kernel: num_warps and its kin."""
    names = {"debug", "ir_override", "maxnreg", "num_warps", "num_stages", "num_ctas", "instrumentation_mode"}
    for vendor, options in (("nvidia", "CUDAOptions"), ("amd", "HIPOptions")):
        try:
            module = __import__(f"triton.backends.{vendor}.compiler", fromlist=[options])
        except ImportError:
            continue
        names.update(getattr(getattr(module, options, None), "__dataclass_fields__", ()))
    return frozenset(names)


def smallest_dot() -> Any:
    """Triton's own rule for the smallest tl.dot on NVIDIA GPUs: a function of the operand types -> (M, N, K)."""
    try:
        from triton.backends.nvidia.compiler import min_dot_size
    except ImportError:
        return lambda left, right: (1, 1, 16)
    return min_dot_size(None)
