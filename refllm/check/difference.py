"""`refllm diff`: two traces of any origin, value by value."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.accuracy.measure import ULP_BINS, ulp_histogram
from refllm.check.trace import Trace
from refllm.errors import InputError


@dataclass(frozen=True)
class TapDifference:
    """One value in two traces.

    relative: rms of the difference / rms of the first. largest, at: the largest difference and its index. differing:
    elements that are not equal. nonfinite: elements that are NaN or infinite in one only. ulps: by `ULP_BINS`, in the
    coarser dtype of the two.
    """

    name: str
    relative: float
    largest: float
    at: tuple[int, ...]
    differing: int
    elements: int
    nonfinite: int
    ulps: list[int]


@dataclass(frozen=True)
class Difference:
    """Two traces. only_first, only_second: names that the other lacks."""

    first: str
    second: str
    dtype: str
    taps: list[TapDifference]
    only_first: list[str]
    only_second: list[str]

    @property
    def identical(self) -> bool:
        return not any(tap.differing for tap in self.taps)

    @property
    def first_difference(self) -> TapDifference | None:
        return next((tap for tap in self.taps if tap.differing), None)

    def to_dict(self) -> dict[str, Any]:
        first = self.first_difference
        return {
            **{name: getattr(self, name) for name in ("first", "second", "dtype", "only_first", "only_second")},
            "identical": self.identical,
            "first_difference": None if first is None else first.name,
            "ulp_bins": [str(edge) for edge in ULP_BINS],
            "taps": [dict(vars(tap)) for tap in self.taps],
        }


_WIDTH = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}


def diff(first: Trace, second: Trace) -> Difference:
    """Compare the values that both traces name, at the positions that are no padding.

    Raises InputError, saying what does not fit, for other tokens, masks, positions, configs or shapes, and for traces
    without a name in common.
    """
    require_same_run(first, second)
    common = [name for name in first.taps if name in second.taps]
    if not common:
        raise InputError(
            f"{first.source} and {second.source} have no name in common: {next(iter(first.taps), 'nothing')!r} against "
            f"{next(iter(second.taps), 'nothing')!r}; refllm.forward.taps lists the names"
        )
    dtype = min(first.dtype, second.dtype, key=lambda name: _WIDTH[name])
    dtype = "float32" if dtype == "float64" else dtype
    valid = first.inputs.valid
    return Difference(
        first=first.source,
        second=second.source,
        dtype=dtype,
        taps=[_compare(name, first.taps[name], second.taps[name], valid, dtype) for name in common],
        only_first=[name for name in first.taps if name not in second.taps],
        only_second=[name for name in second.taps if name not in first.taps],
    )


def _compare(name: str, a: np.ndarray, b: np.ndarray, valid: np.ndarray, dtype: str) -> TapDifference:
    if name.endswith("_rope"):  # a partial rotation may be recorded without the dims that pass through
        width = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :width], b[..., :width]
    rows = [_rows(x, valid) for x in (a, b)]
    if rows[0] is None or rows[1] is None or rows[0].shape != rows[1].shape:
        raise InputError(f"{name}: shape {list(a.shape)} in the first trace, {list(b.shape)} in the second")
    a, b = rows[0].astype(np.float64), rows[1].astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)), 0)
    at = np.unravel_index(int(np.argmax(np.where(same, -1, np.where(finite, error, np.inf)))), error.shape)
    scale = float(np.sqrt(np.mean(np.where(finite, a, 0) ** 2)))
    rms = float(np.sqrt(np.mean(error**2)))
    return TapDifference(
        name=name,
        relative=rms / scale if scale else float(rms > 0),
        largest=float(error.max(initial=0.0)),
        at=tuple(int(i) for i in at),
        differing=int(np.count_nonzero(~same)),
        elements=a.size,
        nonfinite=int(np.count_nonzero(~finite & ~same)),
        ulps=ulp_histogram(b, a, dtype),
    )


def _rows(x: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
    """[N, n] or [N, heads, D], the positions that are no padding, of a value in the shape of the vocabulary, with the
    sequence or the tokens first, or with heads after the sequence; None for another shape."""
    B, S = valid.shape
    if x.ndim == 4 and (x.shape[0], x.shape[2]) == (B, S):
        return np.asarray(x.transpose(0, 2, 1, 3)[valid])
    if x.shape[:2] == (B, S):
        return np.asarray(x[valid])
    if x.shape[:1] == (B * S,):
        return np.asarray(x[valid.reshape(-1)])
    return np.asarray(x.swapaxes(0, 1)[valid]) if x.shape[:2] == (S, B) else None


def require_same_run(first: Trace, second: Trace) -> None:
    """Raises InputError, saying what differs, for traces of other models or inputs. A file that does not say of which
    model it is may be of any."""
    if first.config_hash and second.config_hash and first.config_hash != second.config_hash:
        raise InputError(
            f"the traces are of different models: config {first.config_hash} ({first.source}) and "
            f"{second.config_hash} ({second.source})"
        )
    a, b = first.inputs, second.inputs
    if a.input_ids.shape != b.input_ids.shape:
        raise InputError(f"the traces have different lengths: {a.input_ids.shape} and {b.input_ids.shape} tokens")
    if not np.array_equal(a.input_ids, b.input_ids):
        where = np.argwhere(a.input_ids != b.input_ids)[0].tolist()
        raise InputError(f"the traces are of different tokens, first at row {where[0]}, position {where[1]}")
    for name in ("valid", "positions"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            what = {"valid": "attention masks", "positions": "position ids"}[name]
            raise InputError(f"the traces have different {what}; trace both with the same inputs")
    one, other = (np.zeros(0) if inputs.embeds is None else inputs.embeds for inputs in (a, b))
    if (a.embeds_scale or 1.0) != (b.embeds_scale or 1.0) or not np.array_equal(one, other):
        raise InputError("the traces have different embeddings; trace both with the same inputs")
