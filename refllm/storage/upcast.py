"""Stored floating-point numbers to float32 or float64 arrays, block by block.

A block is small enough to stay in the cache between the passes over it. Every conversion but float64 to float32 is
exact.
"""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refllm.parallel import blocks

# Elements per pass: 512 KiB of float32, inside the second-level cache.
BLOCK = 1 << 17

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def upcast(stored: NDArray, out: NDArray) -> None:
    """out[...] = stored, for 1-D arrays of one length; `stored` is float64, float32, float16 or bfloat16.

    A bfloat16 number is the upper half of a float32, so the bits are shifted; that is twice as fast as a cast.
    float64 to float32 rounds to nearest even and overflows to infinity without a warning.
    """
    for part in blocks(stored.size, BLOCK):
        _upcast_block(stored[part], out[part])


def _upcast_block(stored: NDArray, out: NDArray) -> None:
    if stored.dtype == BFLOAT16 and out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[...] = stored.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    elif stored.dtype == BFLOAT16:
        upper = np.empty(stored.shape, np.float32)
        _upcast_block(stored, upper)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            out[...] = upper
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = stored
