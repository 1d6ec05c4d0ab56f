"""Next tokens: which ones changed, whether rounding explains it, and how far the distributions are apart."""

from dataclasses import dataclass

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.measure import row_blocks


@dataclass(frozen=True)
class Flip:
    """A position whose most likely next token is another than in the exact run.

    margin: difference of the two exact logits. sigmas: the same over the predicted error of that difference.
    """

    row: int
    position: int
    exact: int
    candidate: int
    margin: float
    sigmas: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains it."""
        return self.sigmas <= limits.FLIP


@dataclass(frozen=True)
class TokenReport:
    """Next-token distributions.

    kl: mean over positions of KL(exact || candidate). kl_error: its standard error. kl_predicted: what the predicted
    error of the logits makes of it.
    """

    positions: int
    flips: list[Flip]
    kl: float
    kl_error: float
    kl_predicted: float

    @property
    def defects(self) -> list[Flip]:
        """Flips that rounding does not explain."""
        return [flip for flip in self.flips if not flip.explained]


def compare_tokens(
    exact_NV: np.ndarray, variance_NV: np.ndarray, candidate_NV: np.ndarray, at_N2: np.ndarray
) -> TokenReport:
    """Exact logits with the variance of their predicted error, and the candidate's. at_N2: batch row and position."""
    flips: list[Flip] = []
    kl, mean_error = [], []
    for rows in row_blocks(exact_NV):
        found = _compare_rows(exact_NV[rows], variance_NV[rows], candidate_NV[rows], at_N2[rows])
        flips += found[0]
        kl.append(found[1])
        mean_error.append(found[2])
    kl_N, mean_error_N = np.concatenate(kl), np.concatenate(mean_error)
    with np.errstate(invalid="ignore"):  # a candidate without finite logits is infinitely far away
        spread = float(kl_N.std(ddof=1) / np.sqrt(len(kl_N))) if len(kl_N) > 1 else 0.0
    return TokenReport(len(kl_N), flips, float(kl_N.mean()), spread, float(mean_error_N.mean() / 2))


def _compare_rows(
    exact_NV: np.ndarray, variance_NV: np.ndarray, candidate_NV: np.ndarray, at_N2: np.ndarray
) -> tuple[list[Flip], np.ndarray, np.ndarray]:
    """Flips, and of every position [N] the KL and the mean error of its log-probabilities."""
    candidate_NV = np.nan_to_num(candidate_NV.astype(np.float64), nan=-np.inf)
    best, chosen = exact_NV.argmax(axis=-1), candidate_NV.argmax(axis=-1)
    flips = []
    for n in np.flatnonzero(best != chosen):
        a, b = best[n], chosen[n]
        margin = float(exact_NV[n, a] - exact_NV[n, b])
        sigma = float(np.sqrt(variance_NV[n, a] + variance_NV[n, b]))
        sigmas = margin / sigma if sigma else (np.inf if margin else 0.0)
        flips.append(Flip(int(at_N2[n, 0]), int(at_N2[n, 1]), int(a), int(b), margin, sigmas))
    with np.errstate(invalid="ignore"):  # a candidate without finite logits is infinitely far away
        log_p, log_q = _log_softmax(exact_NV), _log_softmax(candidate_NV)
        p = np.exp(log_p)
        kl_N = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1)
    mean_error_N = (p * variance_NV).sum(axis=-1) - (p**2 * variance_NV).sum(axis=-1)
    return flips, kl_N, mean_error_N


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
