"""How large an error may be. Every number of the check lives here, with its reason.

The exact run (float64) is the truth. The *yardstick* is the reference's own run in the candidate's precision, with a
rounding at every named rounding point: its error against the exact run is what honest rounding costs on exactly these
weights and tokens. A candidate is allowed a small multiple of that and nothing absolute, so no tolerance needs tuning
for a model, a depth or a precision.
"""

from dataclasses import dataclass

import numpy as np

# Half the distance from 1 to the next larger value: the largest relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# Another legitimate order of summation or another place to round draws errors of the same size, independently. Twice
# the plain low-precision run's error is the rule of FlashAttention's tests (Dao et al., 2022).
RMS_FACTOR = 2.0
# One float32 rounding, relative: taps that the yardstick reproduces exactly (the embeddings) still allow this much.
FLOOR = UNIT_ROUNDOFF["float32"]
# The worst single position: its error is a mean over far fewer values than the whole tap's, so it scatters more.
ROW_FACTOR = 3.0
# A common factor on all values: see `gain_limit`.
GAIN_SIGMAS = 3.0
# A next token may change where two logits were closer than rounding can tell apart.
FLIP_SIGMAS = 5.0


@dataclass(frozen=True)
class Error:
    """What one run's values of one tap differ by from the exact ones.

    scale: rms of the exact values. rms: of the error over all values; relative: rms / scale. worst_row: largest over
    the positions of (rms error of the position / scale). gain: <run, exact> / <exact, exact> - 1, a common factor.
    """

    scale: float
    rms: float
    relative: float
    worst_row: float
    gain: float
    rows: int


def measure(exact: np.ndarray, run: np.ndarray) -> Error:
    """Error of `run` against `exact`, both float64 [..., n] without NaN or infinity."""
    rows = exact.reshape(-1, exact.shape[-1])
    error = run.reshape(rows.shape) - rows
    row_square, square = np.mean(error**2, axis=-1), float(np.mean(rows**2))
    rms, worst, scale = float(np.sqrt(row_square.mean())), float(np.sqrt(row_square.max())), float(np.sqrt(square))
    gain = float(np.mean(error * rows)) / square if square else 0.0
    return Error(scale, rms, _ratio(rms, scale), _ratio(worst, scale), gain, len(rows))


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else (np.inf if error else 0.0)


def gain_limit(yardstick: Error) -> float:
    """Largest common factor that rounding explains.

    Roundings of one position may all point the same way (the norm before them shares one error), which moves that
    position's gain by at most its relative error (Cauchy-Schwarz). Positions are independent, so their mean moves by
    1 / sqrt(rows) of that.
    """
    noise = yardstick.relative / np.sqrt(yardstick.rows)
    return 2.0 * abs(yardstick.gain) + GAIN_SIGMAS * float(noise) + FLOOR


def broken_rules(candidate: Error, yardstick: Error) -> list[str]:
    """Names of the rules that the candidate's error breaks; empty if it holds."""
    broken = []
    if not candidate.relative <= RMS_FACTOR * yardstick.relative + FLOOR:
        broken.append("error")
    if not candidate.worst_row <= ROW_FACTOR * yardstick.worst_row + FLOOR:
        broken.append("one position")
    if not abs(candidate.gain) <= gain_limit(yardstick):
        broken.append("common factor")
    return broken


def flip_limit(yardstick: Error) -> float:
    """Largest margin between two exact logits that rounding may turn round: 5 sigma of a difference of two errors."""
    return FLIP_SIGMAS * float(np.sqrt(2.0)) * (yardstick.rms + FLOOR * yardstick.scale)
