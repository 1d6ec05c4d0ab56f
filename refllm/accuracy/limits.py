"""When a measured error is a finding. Every number of the check is here, with its reason; none is tuned to a model."""

from collections.abc import Iterator

import numpy as np

from refllm.accuracy.measure import Measure, measure, sampling

ISOLATED = {"bfloat16": 1.25, "float16": 1.25, "float32": 1.8}
"""Of rms(error) / rms(sigma) over one operator's result, on its own inputs. With narrow formats the only error is the
rounding of the result, which is known exactly: a second, hidden rounding makes it 1.41. With float32 the order of
additions counts, which is not."""
END_TO_END = 2.0
"""The same after all that came before: independence of errors is an approximation there."""
ROW = {"bfloat16": 3.0, "float16": 3.0, "float32": 6.0}
"""Of the worst row (isolated), plus what chance allows for the number of independent errors that it is made of: among a
million rows of softmax weights some have their weight on two keys, and one error. The errors of a row share the sums of
its norm or softmax, which in float32 count as much as the rest."""
MISROUNDED = 0.01
"""Of the elements that differ from what the policy's rounding points give, where that is known to the bit (norms, RoPE,
activations, sums of two in a narrow format). Float32 arithmetic inside an operator, exact to a few times 6e-8, moves
an element across a rounding boundary of bfloat16 or float16 in at most 1 of 500 cases; one rounding point too many or
too few moves every fifth. This sees what the error's size cannot: a rounding that is missing. Two elements more are
granted, so that no single one decides about a small value."""
FLIP = 5.0
"""Sigmas of margin up to which a changed next token is explained by rounding."""


NOT_FINITE = "not finite: no verdict at these values"
"""What is untested where the reference, which rounds nothing, gives an infinity or NaN."""

_MANY, _POSITIONS = 1 << 20, 64  # see `undetected`


def isolated_limit(found: Measure, dtype: str) -> float:
    """Up to which `found.ratio` an operator's result holds on its own inputs."""
    return float(ISOLATED[dtype] + sampling(found.errors))


def row_limit(found: Measure, dtype: str) -> float:
    """Up to which `found.row_ratio` does."""
    return float(ROW[dtype] + sampling(found.row_errors))


def end_to_end_limit(found: Measure) -> float:
    """Up to which `found.ratio` a value holds after all that came before: twice the prediction, or twice what an honest
    run reaches where that is more."""
    return float(END_TO_END * max(1.0, found.honest) + sampling(found.errors))


def misrounded_limit(found: Measure) -> float:
    """Up to which `found.misrounded` does."""
    return MISROUNDED + 2 / found.elements


def broken_isolated(found: Measure, dtype: str) -> list[str]:
    """Names of the rules that an operator's result breaks on its own inputs."""
    rules = []
    if found.nonfinite:
        rules.append("NaN or infinity")
    if found.ratio > isolated_limit(found, dtype):
        rules.append("error")
    if found.row_ratio > row_limit(found, dtype):
        rules.append("one row")
    if found.misrounded > misrounded_limit(found):
        rules.append("rounding points")
    return rules


def broken(end_to_end: Measure, isolated: Measure | None, dtype: str) -> list[str]:
    """Names of the rules that break, isolated ones first."""
    rules = broken_isolated(isolated, dtype) if isolated is not None else []
    if end_to_end.nonfinite and "NaN or infinity" not in rules:
        rules.append("NaN or infinity")
    if end_to_end.ratio > end_to_end_limit(end_to_end):
        rules.append("error end to end")
    return rules


def undetected(exact: np.ndarray, variance: np.ndarray, dtype: str) -> list[str]:
    """Trivial wrong answers that the isolated rules would let pass on these values. Should be none.

    exact, variance: [N, ..., n], positions first. Of many positions 64 are taken: what is rejected on a part is
    rejected on the whole. Where the exact values themselves are infinite or NaN, nothing is right: `NOT_FINITE`.
    """
    if not np.isfinite(exact).all():
        return [NOT_FINITE]
    some = slice(None, None, -(-len(exact) // _POSITIONS) if exact.size > _MANY else 1)
    exact, variance = exact[some], variance[some]
    return [
        name
        for name, wrong in wrong_answers(exact)
        if not np.array_equal(wrong, exact) and not broken_isolated(measure(wrong, exact, variance), dtype)
    ]


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
