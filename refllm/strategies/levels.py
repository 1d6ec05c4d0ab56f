"""Families of inputs, and the level at which each is asked for: a beginner's, the contract's, that of hostile memory.

    families_of(call)           # ("strides", "key_mask")
    level_of(call)              # "contract"

A call may belong to several families, and its level is the highest of theirs; one of none is `basic`: dense arrays of
one dtype, ragged sizes, usual and scaled values, as many queries as keys, no optional argument. A kernel that does not
offer a family is checked without it, by its name. Optional arguments are families too, by their own names.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.errors import InputError
from refllm.ops.backward_contracts import BACKWARD, forward_name
from refllm.ops.contracts import ROWS, contract_of
from refllm.strategies.arrays import FLOATS, Array
from refllm.strategies.call import Call

LEVELS = ("basic", "contract", "hostile")
"""The levels, in the order in which they are asked for."""


@dataclass(frozen=True)
class Family:
    """name: as --without takes it. level: of `LEVELS`. what: its calls, in a few words. has: whether a call is one."""

    name: str
    level: str
    what: str
    has: Callable[[Call], bool]


def _arrays(call: Call) -> list[Array]:
    return [x for x in (*call.arguments, *(value for _, value in call.keywords)) if isinstance(x, Array)]


def _floats(call: Call) -> list[Array]:
    return [x for x in _arrays(call) if x.dtype in FLOATS]


def given(call: Call, name: str) -> Any:
    """An argument of a call by its name, None where it has none of that name."""
    return dict(zip(call.names, call.arguments, strict=True)).get(name, dict(call.keywords).get(name))


def _kind(call: Call, kind: str) -> Any:
    """The argument of that kind of `refllm.ops.contracts`."""
    return next((given(call, name) for name, of in contract_of(call.operator).kinds.items() if of == kind), None)


def is_mixed(call: Call) -> bool:
    """Whether it has floating-point arrays of another dtype than its activations, where the contract does not ask for
    that (the gradient of a loss, a log-sum-exp)."""
    known = BACKWARD.get(call.operator)
    asked = () if known is None else (*known.incoming, *known.kept)
    named = [*zip(call.names, call.arguments, strict=True), *call.keywords]
    return any(
        isinstance(x, Array) and x.dtype in FLOATS and x.dtype != call.dtype and name not in asked for name, x in named
    )


def _lengths(call: Call) -> tuple[int, int] | None:
    """Queries and keys of an attention."""
    q, k = given(call, "q"), given(call, "k")
    return (q.shape[2], k.shape[2]) if forward_name(call.operator) == "attention" else None


def _fewer_queries(call: Call) -> bool:
    sizes = _lengths(call)
    return sizes is not None and sizes[0] < sizes[1]


def _cached(call: Call) -> np.ndarray | None:
    lengths = _kind(call, "lengths")
    return None if lengths is None else lengths.array()


def _no_key(call: Call) -> bool:
    sizes, lengths = _lengths(call), _cached(call)
    if lengths is not None:
        return bool((lengths < given(call, "q").shape[2]).any())
    if sizes is None:
        return False
    S, T = sizes
    causal, mask = given(call, "causal") is not False, given(call, "key_mask")
    first = max(0, T - S + 1) if causal else T  # keys of the first query
    return bool(S) and (first == 0 or (mask is not None and not mask.array()[:, :first].any(axis=-1).all()))


def _ignored_label(call: Call) -> int:
    value = given(call, "ignore_index")
    return -100 if value is None else int(value)


def ignored_rows(call: Call) -> np.ndarray | None:
    """Which rows have a label that is ignored; None where there are no labels."""
    labels = _kind(call, "labels")
    return None if labels is None else labels.array() == _ignored_label(call)


def _some_ignored(call: Call) -> bool:
    ignored = ignored_rows(call)
    return ignored is not None and bool(ignored.any())


def _all_ignored(call: Call) -> bool:
    ignored = ignored_rows(call)
    return ignored is not None and bool(ignored.all())


def _not_finite(x: Array) -> bool:
    return any(not np.isfinite(value) for _, value in x.planted)


def _nan_where_nobody_reads(call: Call) -> bool:
    """NaN or an infinity among keys and values of which some query sees not all, or in a row whose label is ignored."""
    if forward_name(call.operator) == "attention":
        hides = given(call, "key_mask") is not None or given(call, "causal") is not False
        return hides and any(_not_finite(given(call, name)) for name in ("k", "v"))
    if _kind(call, "lengths") is not None:
        return any(_not_finite(given(call, name)) for name in ("k_cache", "v_cache"))
    return _some_ignored(call) and any(_not_finite(x) for x in _floats(call))


def _large_mean(call: Call) -> bool:
    return any(abs(x.mean) >= limits.LARGE_MEAN and x.values in ("normal", "uniform", "ramp") for x in _floats(call))


def _extreme(call: Call) -> bool:
    values = (value for x in _floats(call) for _, value in x.planted)
    if any(np.isfinite(value) and abs(value) >= limits.EXTREME_VALUE for value in values):
        return True
    free = [x for x in _floats(call) if x.values not in ("cos", "sin")]
    return any(
        x.scale >= limits.EXTREME_VALUE or x.scale <= limits.VANISHING_SCALE or abs(x.mean) >= limits.EXTREME_MEAN
        for x in free
    )


def _tables(call: Call) -> list[Array]:
    return [x for x in (given(call, "cos"), given(call, "sin")) if isinstance(x, Array)]


def _head_dim(call: Call) -> int:
    if forward_name(call.operator) == "rms_norm_qkv_rope":
        heads = given(call, "num_heads") + 2 * given(call, "num_kv_heads")
        return int(given(call, "w_qkv").shape[0] // heads)
    heads = given(call, "q") or given(call, "dq")  # the gradient of a rotation needs no heads
    return int(heads.shape[-1])


def _partly(call: Call) -> bool:
    tables = _tables(call)
    return bool(tables) and 2 * tables[0].shape[-1] < _head_dim(call)


def _grouped(call: Call) -> bool:
    if "attention" not in call.operator:
        return False
    keys = given(call, "k") or given(call, "k_cache")
    return bool(given(call, "q").shape[1] != keys.shape[1])


_SUMMED = {"weight", "norm_weight"}
"""Arguments whose gradient is a sum over rows."""


def _many_rows(call: Call) -> bool:
    return rows_summed(call) >= limits.MANY_ROWS


def rows_summed(call: Call) -> int:
    """Over how many terms a call of a backward operator sums to the gradient of a weight: its rows, or the places of
    the id that is there most often; 0 where there is no such gradient."""
    known = BACKWARD.get(call.operator)
    if known is None or not _SUMMED & set(known.gradient_of.values()):
        return 0
    ids, x = given(call, "ids"), given(call, "x")
    if isinstance(ids, Array):
        return int(np.bincount(ids.array().ravel()).max(initial=0)) if 0 not in ids.shape else 0
    return int(np.prod(x.shape[:-1])) if isinstance(x, Array) else 0


def _confident(call: Call) -> bool:
    """Whether a row has a probability so near 1 that what is left of it is lost where that is rounded."""
    if call.operator not in ("cross_entropy_backward", "linear_cross_entropy_backward"):
        return False
    values = (value for name in ("logits", "weight") if given(call, name) for _, value in given(call, name).planted)
    return any(np.isfinite(value) and value >= limits.CONFIDENT for value in values)


def _nothing_kept(call: Call) -> bool:
    known = BACKWARD.get(call.operator)
    return known is not None and any(given(call, name) is None for name in known.kept)


def _row_axes(call: Call) -> bool:
    axes = next(iter(contract_of(call.operator).arguments.values()))
    return ROWS in axes and len(call.arguments[0].shape) != 2  # type: ignore[union-attr]


_ALL = (
    Family(
        "strides",
        "contract",
        "arrays that are views of others",
        lambda c: any(x.layout not in ("dense", "far") for x in _arrays(c)),
    ),
    Family("mixed_dtypes", "contract", "float32 weights and tables beside narrower activations", is_mixed),
    Family("row_axes", "contract", "rows in one axis alone, or in several", _row_axes),
    Family("empty", "contract", "axes of length 0", lambda c: any(0 in x.shape for x in _arrays(c))),
    Family("fewer_queries", "contract", "fewer queries than keys", _fewer_queries),
    Family("no_keys", "contract", "queries that see no key", _no_key),
    Family("grouped_heads", "contract", "more query heads than key heads", _grouped),
    Family(
        "several_tokens",
        "contract",
        "several tokens at once",
        lambda c: _cached(c) is not None and given(c, "q").shape[2] != 1,
    ),
    Family("partial_rotation", "contract", "heads that are rotated in part", _partly),
    Family(
        "tables_per_row",
        "contract",
        "tables of their own for every row",
        lambda c: any(len(x.shape) == 3 for x in _tables(c)),
    ),
    Family(
        "one_pair",
        "basic",
        "one pair of dims that is rotated, where both pairings are alike",
        lambda c: any(x.shape[-1] == 1 for x in _tables(c)),
    ),
    Family(
        "any_tables",
        "contract",
        "tables that are no cos and sin",
        lambda c: any(x.values not in ("cos", "sin") for x in _tables(c)),
    ),
    Family(
        "far_positions",
        "contract",
        "positions past 4096",
        lambda c: any(x.mean > limits.FAR_POSITIONS for x in _tables(c)),
    ),
    Family("large_means", "contract", "means of 100 and more", _large_mean),
    Family("extreme_values", "contract", "values far from their neighbours, near overflow, or subnormal", _extreme),
    Family("not_finite", "contract", "NaN and infinities", lambda c: any(_not_finite(x) for x in _floats(c))),
    Family("ignored_labels", "contract", "rows whose label is ignored", _some_ignored),
    Family("nothing_counted", "contract", "labels that are all ignored", _all_ignored),
    Family(
        "no_bias",
        "contract",
        "None for a bias",
        lambda c: any(of == "bias" and given(c, n) is None for n, of in contract_of(c.operator).kinds.items()),
    ),
    Family("many_rows", "contract", "gradients that are sums over many rows", _many_rows),
    Family("confident_rows", "contract", "gradients of losses where a probability is near 1", _confident),
    Family("nothing_kept", "contract", "None for what the forward pass kept", _nothing_kept),
    Family("half_split", "basic", "pairs (i, i + R/2)", lambda c: given(c, "interleaved") is False),
    Family("interleaved", "basic", "pairs (2i, 2i + 1)", lambda c: given(c, "interleaved") is True),
    Family("rms", "basic", "heads normed by their root mean square", lambda c: given(c, "norm") == "rms"),
    Family("layer", "basic", "heads normed by mean and variance", lambda c: given(c, "norm") == "layer"),
    Family("hidden_nan", "hostile", "NaN in what a row does not see", _nan_where_nobody_reads),
    Family("far_offsets", "hostile", "elements past 2^31", lambda c: any(x.layout == "far" for x in _arrays(c))),
)
FAMILIES = {family.name: family for family in _ALL}
"""Every family that is no optional argument, by its name."""


def families(operator: str) -> tuple[str, ...]:
    """The names of the families that calls of an operator may belong to. Raises InputError for no operator."""
    known = contract_of(operator)
    kinds, names = set(known.kinds.values()), set(known.parameters)
    needs: dict[str, bool] = {
        "mixed_dtypes": bool(known.or_float32),
        "row_axes": any(ROWS in axes for axes in known.arguments.values()),
        "no_bias": "bias" in kinds,
        **dict.fromkeys(("ignored_labels", "nothing_counted"), "labels" in kinds),
        **dict.fromkeys(
            ("partial_rotation", "tables_per_row", "one_pair", "any_tables", "far_positions"), "table" in kinds
        ),
        **dict.fromkeys(("half_split", "interleaved"), "interleaved" in names),
        **dict.fromkeys(("rms", "layer"), "norm" in names),
        "fewer_queries": "mask" in kinds,
        "no_keys": bool(kinds & {"mask", "lengths"}),
        "grouped_heads": bool(kinds & {"mask", "lengths"}),
        "several_tokens": "lengths" in kinds,
        "many_rows": operator in BACKWARD
        and bool({"weight", "norm_weight"} & set(BACKWARD[operator].gradient_of.values())),
        "confident_rows": operator in ("cross_entropy_backward", "linear_cross_entropy_backward"),
        "nothing_kept": operator in BACKWARD and bool(BACKWARD[operator].kept),
        "hidden_nan": bool(kinds & {"mask", "lengths", "labels"}),
    }
    return tuple(name for name in FAMILIES if needs.get(name, True))


def _optional_ones(call: Call) -> list[str]:
    """The optional keywords that a call gives another value than their default."""
    known = contract_of(call.operator).parameters
    return [
        name
        for name, value in call.keywords
        if known[name].default is not inspect.Parameter.empty and value != known[name].default
    ]


@lru_cache(maxsize=4096)
def families_of(call: Call) -> tuple[str, ...]:
    """The names of the families that a call belongs to, optional arguments that it has included."""
    return (*(name for name, family in FAMILIES.items() if family.has(call)), *_optional_ones(call))


def level_of(call: Call) -> str:
    """The level of a call: the highest of its families."""
    levels = (FAMILIES[name].level if name in FAMILIES else "contract" for name in families_of(call))
    return max(levels, key=LEVELS.index, default="basic")


def find_level(level: str) -> str:
    """The level. Raises InputError for another name."""
    if level not in LEVELS:
        raise InputError(f"--level {level} is not known; use {', '.join(LEVELS)}")
    return level
