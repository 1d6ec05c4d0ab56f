"""The inline assembly that asks a GPU where or when it runs, or lets another grid begin: what it says without one.

Assembly that computes is not run: an error names it.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from refllm.kernels.interpreter import formats
from refllm.kernels.interpreter.errors import KernelError

WAITS = re.compile(r"griddepcontrol\.(wait|launch_dependents)|bar\.sync|membar|fence|nanosleep")
"""Programs run one after another, so what these wait for has happened."""
REGISTER = re.compile(r"%(globaltimer_lo|globaltimer|clock64|clock|smid|nsmid|laneid|warpid|nwarpid)")


def run(text: str, program: int, warps: int, operands: Sequence[Any], types: Sequence[Any]) -> list[np.ndarray]:
    """One array per result, of the shape of its type; program: the number of the one that runs, which is its
    multiprocessor's too. Raises KernelError for assembly that is not known."""
    first = text.split(";")[0]
    register = REGISTER.search(first)
    if operands or not (register or WAITS.search(first)):
        raise KernelError(f"the interpreter cannot run the inline assembly `{' '.join(first.split())}`")
    number = _number(register[1], program, warps) if register else 0
    return [np.full(getattr(t, "shape", None) or 1, number).astype(formats.numpy_type(t)) for t in types]


def _number(register: str, program: int, warps: int) -> int:
    if register.startswith(("globaltimer", "clock")):
        return time.monotonic_ns() & (2**31 - 1 if register in ("clock", "globaltimer_lo") else 2**63 - 1)
    return {"smid": program, "nsmid": program + 1, "nwarpid": warps}.get(register, 0)
