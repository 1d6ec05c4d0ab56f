"""A sigmoid that is made as a difference of numbers near 1, of which nothing is left where the gate is far below 0.

silu(g) = g s(g) with s(g) = 1 / (1 + e^-g), which is about e^g below 0. Written as 1 - s(-g), or as
(1 + tanh(g / 2)) / 2, it is a multiple of 2^-24 or 2^-25 in float32, whatever e^g is. Moderately below 0 that is an
error of a few float32 steps of 1, which a row of values hides and a bfloat16 result does not show. From
`limits.NOTHING_LEFT` on the smallest step is more than all there is: the result is 0, or several times too large, and
no rounding explains either. The rule is the same for an operator alone (`refllm.accuracy.judge`) and in a model
(`refllm.check.oracle`).
"""

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.propagation import ulp
from refllm.precision import largest

SIGMOIDS = ("silu", "swish")
"""The activations that are a product with a sigmoid, by their names in a config."""


def nothing_left(gate: np.ndarray, y: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Which elements of silu(gate) * up have lost their sigmoid. y: as returned. exact: for this gate, which was read
    so or rounded to `dtype` afterwards. None where the format cannot hold the sigmoid itself: honest code may lose it.
    """
    gate, y, exact = (np.asarray(x, np.float64) for x in (gate, y, exact))
    low, high = limits.GATE_KNOWN, limits.NOTHING_LEFT
    far = (gate < high) & (gate > low) & np.isfinite(exact) & (np.abs(exact) >= np.finfo(np.float32).tiny)
    if not far.any() or np.exp(low) * largest(dtype) < 1:
        return np.zeros(gate.shape, bool)
    # What is float64 inside may cancel too, farther out: its steps of 1 are granted, as many as limits.INNER.
    steps = limits.INNER * 2.0**-53 * (1 + np.exp(np.minimum(-gate, -low)))
    with np.errstate(invalid="ignore"):
        off = np.abs(y - exact) > np.abs(exact) * (0.5 + steps) + ulp(exact, dtype, np.float64)
    return np.asarray(far & off)


def in_words(gate: np.ndarray, y: np.ndarray, exact: np.ndarray, lost: np.ndarray) -> str:
    """One clause on the elements that are lost, the first of them with its numbers."""
    at = tuple(int(i) for i in np.argwhere(lost)[0])
    count = int(lost.sum())
    where = f"at a gate of {float(gate[at]):.4g} it is {float(y[at]):.3g} and has to be {float(exact[at]):.3g}"
    more = f" ({count} such elements)" if count > 1 else ""
    return f"nothing is left of the sigmoid: {where}{more}; 1 - sigmoid(-g) and 1 + tanh(g / 2) cancel for g below 0"
