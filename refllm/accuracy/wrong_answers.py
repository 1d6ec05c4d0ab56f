"""Trivial wrong answers, and whether the rules would see them: a verdict on values where they would not is none."""

from collections.abc import Iterator

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.judge import broken_isolated
from refllm.accuracy.measure import measure
from refllm.parallel import for_each

NOT_FINITE = "not finite: no verdict at these values"
"""What is untested where the reference, which rounds nothing, gives an infinity or NaN."""

_A_TILE = 16  # of fewer numbers a tile is one of them, which may be less than the error of the others
_MANY, _POSITIONS = 1 << 20, 64  # see `undetected`


def undetected(exact: np.ndarray, variance: np.ndarray, dtype: str, signed: bool = False) -> list[str]:
    """Trivial wrong answers that the isolated rules would accept on these values. Should be none.

    exact, variance: [N, ..., n], positions first. Of many positions 64 are taken: what is rejected on a part is
    rejected on the whole. Where the exact values themselves are infinite or NaN, nothing is right: `NOT_FINITE`.
    signed: also those of the other sign, which gradients easily have.
    """
    if not np.isfinite(exact).all():
        return [NOT_FINITE]
    some = slice(None, None, -(-len(exact) // _POSITIONS) if exact.size > _MANY else 1)
    exact, variance = exact[some], variance[some]
    answers = dict(wrong_answers(exact)) | ({"another sign": -exact} if signed else {})
    if signed and exact.size < _A_TILE:
        del answers["a missing tile"]
    holds: dict[str, bool] = {}
    mean_V = np.mean(np.where(np.isfinite(variance), variance, 0.0), dtype=np.float64)
    # The limit of the rule "error" for a single independent error, which is the loosest. Nearly every wrong answer is
    # beyond it by its size, and what else `measure` finds takes several times as long.
    loosest = (limits.ISOLATED[dtype] + limits.chance(1)) * np.sqrt(mean_V)

    def try_one(name: str) -> None:
        wrong = answers[name]
        if np.sqrt(np.mean(np.square(wrong - exact))) > loosest:
            holds[name] = False
        else:
            found = measure(wrong, exact, variance)
            holds[name] = not np.array_equal(wrong, exact) and not broken_isolated(found, dtype)

    for_each(try_one, answers)
    return [name for name in answers if holds[name]]


def wrong_answers(exact: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Zeros, rows in another order, the mean everywhere, a factor of 1.01, and a missing tile at the end."""
    yield "zeros", np.zeros_like(exact)
    if len(exact) > 1:
        yield "rows in another order", np.roll(exact, 1, axis=0)
    yield "the mean", np.full_like(exact, exact.mean())
    yield "times 1.01", exact * 1.01
    tile = exact.copy()
    tile[..., -max(1, exact.shape[-1] // 8) :] = 0
    yield "a missing tile", tile
