"""Whether the errors of a row, or of a column, have something in common: a factor, or an offset.

A rounding that every element makes for itself leaves nothing in common. One that a row shares does, and so small a one
is seen in thousands of elements though each is within its own rounding. In bfloat16, which has 128 mantissas, the
errors of honest code are not independent either: so the limit is what the honest predictions themselves show.
"""

from collections.abc import Sequence

import numpy as np

from refllm.accuracy.limits import SHARED, SHARED_BESIDES, SHARED_FLOOR

_LEAST = 1e-300
_SAID = ("the elements of a row have an error in common (a factor)", "a column has an error in common (a factor)",
         "the elements of a row have an error in common (an offset)")  # fmt: skip


def shared_error(error: np.ndarray, exact: np.ndarray, variance: np.ndarray, honest: Sequence[np.ndarray]) -> str:
    """One clause about what the errors [..., n] have in common, or "". honest: the errors of admissible profiles."""
    if error.shape[-1] < 2 or not np.isfinite(error).all():
        return ""
    found = _scores(error, exact, variance)
    allowed = np.max([_scores(e, exact, variance) for e in honest if np.isfinite(e).all()], axis=0, initial=0)
    over = found > SHARED * allowed + SHARED_BESIDES
    return _SAID[int(np.argmax(over))] if over.any() and (found[over] > 1 + SHARED_BESIDES).any() else ""


def _scores(error: np.ndarray, exact: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """RMS z-scores of the common factor of rows, of columns, and of the common offset of rows."""
    e, y, V = (a.reshape(-1, a.shape[-1]) for a in (error, exact, variance))
    V = np.maximum(V, SHARED_FLOOR * V.mean() + _LEAST)

    def z(along: np.ndarray, axis: int) -> float:
        over = (e * along / V).sum(axis=axis) ** 2 / ((along**2 / V).sum(axis=axis) + _LEAST)
        return float(np.sqrt(np.mean(over)))

    return np.array([z(y, -1), z(y, 0), z(np.ones_like(y), -1)])
