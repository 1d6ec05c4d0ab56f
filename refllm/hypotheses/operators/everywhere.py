"""Mistakes that any operator may have and that are no edits of a text: what is done to the right results."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from refllm.hypotheses.operators.edits import narrow, whole, whole_of_long
from refllm.hypotheses.operators.hypothesis import OpHypothesis, Outputs, mistake
from refllm.ops.contracts import OPERATORS, ROWS, contract_of

_TILES = ("4", "8", "16", "32", "64", "128", "256", "512", "1024")
_ROWS = ("2", "4", "8", "16", "32", "64")


def hypotheses() -> Iterator[OpHypothesis]:
    """Those of every operator."""
    for operator in OPERATORS:
        outputs = list(contract_of(operator).outputs.values())
        if outputs[0] == ("N",):  # one number per row
            continue
        yield mistake(operator, "copied from the first row", "every row of the result is that of the first", _first_row)
        yield mistake(operator, "rows reversed", "the rows of the result are in the reverse order", _reversed)
        yield mistake(
            operator,
            "last columns zero",
            "the last, partial tile of NUMBER columns of the result is 0",
            partial(_no_columns, whole),
            partial(_no_columns, whole_of_long),
            numbers=_TILES,
        )
        yield mistake(
            operator,
            "last rows zero",
            "the last, partial tile of NUMBER rows of the result is 0",
            partial(_no_rows, whole),
            partial(_no_rows, whole_of_long),
            numbers=_ROWS,
        )
        if outputs[0][0] == ROWS:
            yield mistake(operator, "NaN hidden", "a NaN becomes 0", _no_nan)
        yield mistake(operator, "all zero", "the result is 0", _zero)
        yield mistake(
            operator,
            "result rounded",
            "the result is rounded to NUMBER",
            _rounded,
            numbers=("bfloat16", "float16"),
            place=True,
        )
        if len(outputs[0]) == 4:
            yield mistake(
                operator,
                "result by token",
                "the result is stored as [B, S, H, D], and lies as [B, H, S, D]",
                _by_token,
                _by_head,
            )
            yield mistake(
                operator, "result transposed", "positions and dims of the result are exchanged in memory", _transposed
            )
            yield mistake(
                operator, "heads copied from the first", "every head of the result is that of the first", _first_head
            )
        else:
            yield mistake(
                operator, "result transposed", "rows and columns of the result are exchanged in memory", _transposed
            )


def _first_row(outputs: Outputs, value: str) -> Outputs:
    return tuple(np.broadcast_to(x[:1], x.shape) for x in outputs)


def _zero(outputs: Outputs, value: str) -> Outputs:
    return tuple(0 * x for x in outputs)


def _rounded(outputs: Outputs, dtype: str) -> Outputs:
    return tuple(narrow(x, dtype) for x in outputs)


def _no_nan(outputs: Outputs, value: str) -> Outputs:
    return tuple(np.where(np.isnan(x), 0.0, x) for x in outputs)


def _reversed(outputs: Outputs, value: str) -> Outputs:
    return tuple(x[::-1] for x in outputs)


def _first_head(outputs: Outputs, value: str) -> Outputs:
    return tuple(np.broadcast_to(x[:, :1], x.shape) for x in outputs)


def _no_columns(kept: Callable[[int, int], int], outputs: Outputs, value: str) -> Outputs:
    return tuple(np.where(np.arange(x.shape[-1]) < kept(x.shape[-1], int(value)), x, 0.0) for x in outputs)


def _no_rows(kept: Callable[[int, int], int], outputs: Outputs, value: str) -> Outputs:
    """Rows are the positions of heads, else the last axis but one; of one number per row that one."""

    def cut(x: np.ndarray) -> np.ndarray:
        axis = x.ndim - 1 if x.ndim in (1, 3) else x.ndim - 2
        rows = np.arange(x.shape[axis]) < kept(x.shape[axis], int(value))
        return np.where(rows if axis == x.ndim - 1 else rows[:, None], x, 0.0)

    return tuple(map(cut, outputs))


def _by_token(outputs: Outputs, value: str) -> Outputs:
    return tuple(x.swapaxes(1, 2).ravel().reshape(x.shape) if x.ndim == 4 else x for x in outputs)


def _by_head(outputs: Outputs, value: str) -> Outputs:
    """The other way round: memory that is read as [B, S, H, D] was written as [B, H, S, D]."""

    def read(x: np.ndarray) -> np.ndarray:
        B, H, S, D = x.shape
        return np.ascontiguousarray(x).reshape(B, S, H, D).swapaxes(1, 2)

    return tuple(read(x) if x.ndim == 4 else x for x in outputs)


def _transposed(outputs: Outputs, value: str) -> Outputs:
    return tuple(x.swapaxes(-1, -2).ravel().reshape(x.shape) if x.ndim != 3 else x for x in outputs)
