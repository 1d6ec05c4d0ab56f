"""Makes a failing call small: shape first, then heads, layout, planted values, scale, seed.

A call is a recipe, so it can be changed one thing at a time. Sizes are halved towards the smallest that still fails:
one row and BLOCK + 1 columns for a tail that nobody writes. Each change is kept only if the same property still breaks.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from refllm.errors import RefllmError
from refllm.opcheck.examine import Finding
from refllm.ops.backward_contracts import forward_name
from refllm.ops.contracts import ROWS, axis_names, contract_of, is_batched
from refllm.strategies.arrays import Array, Kept
from refllm.strategies.call import Call
from refllm.strategies.levels import LEVELS, families_of

Retry = Callable[[Call], Finding | None]
"""Examines a smaller call; raises RefllmError for one that the contract does not allow."""

_LEAST: dict[str, dict[str, int]] = {
    "attention": {"D": 8},
    "decode_attention": {"D": 8},
    "rope": {"D": 2},
    "norm_rope": {"D": 2},
}
_SIMPLER = {"invariance": ("value", "NaN pattern")}
"""What a broken property may become: a row that is wrong alone is wrong as a batch of one as well."""
_BOUNDS = {"labels": ("V", -1), "ids": ("V", -1), "lengths": ("N", 0)}
"""Integers that an axis bounds: below V, up to N."""
_ALLOWED = ("no_bias", "row_axes", "extreme_values")
"""Families that a smaller call may be of though the first was not: what is left out, and one row."""
_ORDER = ("B", "S", "N", "T", "E", "F", "V", "D", "R/2")


def shrink(finding: Finding, retry: Retry, deadline: float) -> tuple[Finding, int]:
    """The smallest call found that breaks the same property, with its finding; and how many calls were tried."""
    work = _Shrinker(finding, retry, deadline)
    work.row_alone()
    before = None
    while work.best.call != before and work.in_time:
        before = work.best.call
        work.drop_row_axes()
        work.sizes()
        work.heads()
        work.try_all(_plain_layouts)
        work.try_all(_fewer_planted)
        work.try_all(_plain_arguments)
        work.try_all(_plain_values)
    return work.best, work.tried


class _Shrinker:
    def __init__(self, finding: Finding, retry: Retry, deadline: float) -> None:
        self.best, self.retry, self.deadline = finding, retry, deadline
        self.tried = 0
        self._families = {*families_of(finding.call), *_ALLOWED}
        self._seen: set[Call] = {finding.call}

    def _is_the_same(self, finding: Finding) -> bool:
        """Whether a finding on a smaller call is the one that is being made small, and not another one."""
        best = self.best
        if finding.property not in (best.property, *_SIMPLER.get(best.property, ())):
            return False
        same_output = finding.output == best.output or not (finding.output and best.output)
        return same_output and LEVELS.index(finding.level) <= LEVELS.index(best.level)

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def attempt(self, make: Callable[[], Call | None]) -> bool:
        """Takes the call that `make` makes if it still breaks the property."""
        try:
            call = make()
            if (
                call is None
                or call in self._seen
                or not self.in_time
                or not self._families.issuperset(families_of(call))
            ):
                return False
            self._seen.add(call)
            finding = self.retry(call)
        except RefllmError:  # not a valid call
            return False
        self.tried += 1
        if finding is None or not self._is_the_same(finding):
            return False
        self.best = finding
        return True

    def try_all(self, changes: Callable[[Call], Iterator[Callable[[], Call]]]) -> None:
        """Every change, each from the best call so far; again from the start after one that was kept."""
        kept = True
        while kept and self.in_time:
            kept = any(self.attempt(change) for change in changes(self.best.call))

    def row_alone(self) -> None:
        """What was found in one row by itself, as a call of that row: it may be no matter of the batch at all."""
        row = self.best.row_alone
        if row is not None:
            self._families |= set(families_of(_only_row(self.best.call, row)))
            self.attempt(lambda: _only_row(self.best.call, row))

    def drop_row_axes(self) -> None:
        """One axis of rows where there were several."""
        self.attempt(lambda: _one_row_axis(self.best.call))

    def sizes(self) -> None:
        """Every axis as short as it can be: 1 at once, else halved."""
        if axis_lengths(self.best.call).get("S") == axis_lengths(self.best.call).get("T"):
            self._shorten("S", "T")  # as many queries as keys
        for name in _axes(self.best.call):
            self._shorten(name)

    def _shorten(self, name: str, *others: str) -> None:
        if name not in axis_lengths(self.best.call):
            return

        def to(size: int) -> bool:
            return self.attempt(lambda: resized(self.best.call, dict.fromkeys((name, *others), size)))

        least = _least(self.best.call.operator, name)
        high, low = axis_lengths(self.best.call)[name], least
        if high <= least or to(least) or (least == 1 and high > 2 and to(2)):
            return
        while high - low > 1 and self.in_time:
            middle = (low + high) // 2
            if to(middle):
                high = middle
            else:
                low = middle
        while high - 2 >= least and to(high - 2):  # where only even sizes are allowed
            high -= 2

    def heads(self) -> None:
        """Query and key/value heads together: the first must be a multiple of the second."""
        sizes = axis_lengths(self.best.call)
        if "H" not in sizes:
            return
        H, K = sizes["H"], sizes["K"]
        tried = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 2), (3, 1), (H // 2, K // 2), (H, 1), (K, K), (H - 1, K))
        for h, k in tried:
            smaller = h <= H and k <= K and (h, k) != (H, K) and h > 0 and k > 0
            if smaller and self.attempt(lambda h=h, k=k: resized(self.best.call, {"H": h, "K": k})):  # type: ignore[misc]
                return


# -------------------------------------------------------------------------------------------------------------- shapes


def _least(operator: str, axis: str) -> int:
    """The length down to which an axis is shortened. Of a row of one element a norm has no gradient to speak of."""
    name = forward_name(operator)
    if name != operator and axis == "E" and "norm" in name:
        return 2
    return _LEAST.get(name, {}).get(axis, 1)


def _arrays(call: Call) -> Iterator[tuple[str, Array]]:
    for name, x in (*zip(call.names, call.arguments, strict=True), *call.keywords):
        if isinstance(x, Array):
            yield name, x


def _axes(call: Call) -> list[str]:
    """The axes that can be shortened one by one, rows first."""
    names = [name for name in axis_lengths(call) if name not in ("H", "K", "(H+2K)D")]
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else -1)


def axis_lengths(call: Call) -> dict[str, int]:
    """The length of every axis by name."""
    axes = contract_of(call.operator).arguments
    sizes: dict[str, int] = {}
    for name, x in _arrays(call):
        sizes.update(zip(axis_names(axes[name], len(x.shape)), x.shape, strict=True))
    if "(H+2K)D" in sizes:
        given = dict(call.keywords)
        sizes["H"], sizes["K"] = given["num_heads"], given["num_kv_heads"]
        sizes["D"] = sizes["(H+2K)D"] // (sizes["H"] + 2 * sizes["K"])
    return sizes


def resized(call: Call, changed: dict[str, int]) -> Call:
    """The same call with other lengths of some axes. Planted values outside are dropped, integers kept in range."""
    sizes = {**axis_lengths(call), **changed}
    if "(H+2K)D" in sizes:
        sizes["(H+2K)D"] = (sizes["H"] + 2 * sizes["K"]) * sizes["D"]
    if "R/2" in sizes and "D" in sizes and "R/2" not in changed:
        sizes["R/2"] = min(sizes["R/2"], sizes["D"] // 2)
    axes, ignored = contract_of(call.operator).arguments, dict(call.keywords).get("ignore_index", -100)

    def fit(name: str, x: Any) -> Any:
        if name in ("num_heads", "num_kv_heads"):
            return sizes["H" if name == "num_heads" else "K"]
        if not isinstance(x, Array):
            return x
        shape = tuple(sizes[axis] for axis in axis_names(axes[name], len(x.shape)))
        fitted = replace(x, shape=shape, planted=_inside(x, shape))
        return _bounded(name, fitted, sizes, ignored) if name in _BOUNDS else fitted

    return _mapped(call, fit)


def _only_row(call: Call, row: int) -> Call:
    """One row of a batch: what is planted in it stays, its drawn numbers are others."""
    axes = contract_of(call.operator).arguments

    def only(name: str, x: Any) -> Any:
        if not isinstance(x, Array) or not is_batched(axes[name], len(x.shape)):
            return x
        planted = [(index, value) for index, value in x.planted if not index or _holds(index[0], row, x.shape[0])]
        moved = tuple(((0, *index[1:]) if index else (), value) for index, value in planted)
        layout = "dense" if x.layout == "expanded" else x.layout
        return replace(x, shape=(1, *x.shape[1:]), planted=moved, layout=layout)

    return _mapped(call, only)


def _holds(part: Any, row: int, size: int) -> bool:
    """Whether an index along one axis, as in `Array.planted`, holds a row."""
    return row in range(size)[slice(*part)] if isinstance(part, tuple) else part % size == row


def _mapped(call: Call, change: Callable[[str, Any], Any]) -> Call:
    """The call with change(name, value) in place of every argument and keyword."""
    return replace(
        call,
        arguments=tuple(change(name, x) for name, x in zip(call.names, call.arguments, strict=True)),
        keywords=tuple((name, change(name, x)) for name, x in call.keywords),
    )


def _inside(x: Array, shape: tuple[int, ...]) -> Any:
    def fits(index: Any) -> bool:
        return all(_reaches(part, n) for part, n in zip(index, shape, strict=False))

    return tuple((index, value) for index, value in x.planted if fits(index))


def _reaches(part: Any, n: int) -> bool:
    return len(range(*slice(*part).indices(n))) > 0 if isinstance(part, tuple) else -n <= part < n


def _bounded(name: str, x: Array, sizes: dict[str, int], ignored: int) -> Array:
    """Integers that are not above their bound; the label that is ignored may be."""
    axis, beyond = _BOUNDS[name]
    top = sizes[axis] + beyond
    planted = tuple(
        (index, value if name == "labels" and value == ignored else min(value, top)) for index, value in x.planted
    )
    if x.values == "integers":
        return replace(x, scale=max(1.0, min(x.scale, top - x.mean + 1)), mean=min(x.mean, top), planted=planted)
    if x.values == "zeros" or not x.values:
        return replace(x, mean=min(x.mean, top), planted=planted)
    if x.values == "ones":
        return replace(x, scale=min(x.scale, top), planted=planted)
    return replace(x, planted=planted)


def _one_row_axis(call: Call) -> Call | None:
    axes = contract_of(call.operator).arguments
    if not any(ROWS in axes[name] and len(x.shape) > len(axes[name]) for name, x in _arrays(call)):
        return None

    def drop(name: str, x: Any) -> Any:
        if not isinstance(x, Array) or ROWS not in axes[name] or len(x.shape) <= len(axes[name]):
            return x
        layout = "dense" if x.layout in ("heads", "expanded") else x.layout
        return replace(x, shape=x.shape[-len(axes[name]) :], planted=(), layout=layout)

    return _mapped(call, drop)


# ----------------------------------------------------------------------------------------------- everything but shapes


def _one_by_one(call: Call, change: Callable[[str, Array], Array]) -> Iterator[Callable[[], Call]]:
    """Every array changed alone, if that changes it."""
    for name, x in _arrays(call):
        if change(name, x) != x:
            yield lambda only=name: _mapped(  # type: ignore[misc]
                call, lambda n, y: change(n, y) if n == only and isinstance(y, Array) else y
            )


def _plain_layouts(call: Call) -> Iterator[Callable[[], Call]]:
    yield lambda: _mapped(call, lambda n, x: replace(x, layout="dense") if isinstance(x, Array) else x)
    yield from _one_by_one(call, lambda name, x: replace(x, layout="dense"))


def _fewer_planted(call: Call) -> Iterator[Callable[[], Call]]:
    yield from _one_by_one(call, lambda name, x: replace(x, planted=()))
    for half in (0, 1):
        yield from _one_by_one(call, lambda name, x, half=half: replace(x, planted=_half(x.planted, half)))  # type: ignore[misc]


def _half(planted: Any, half: int) -> Any:
    middle = (len(planted) + 1) // 2
    return planted if len(planted) < 2 else (planted[:middle], planted[middle:])[half]


_DEFAULTS = {"scale": None, "causal": True, "key_mask": None, "return_lse": False, "ignore_index": -100, "dlse": None}


def _plain_arguments(call: Call) -> Iterator[Callable[[], Call]]:
    """Keywords that have a default left out, optional arrays too, weights in the dtype of the rest."""
    for name, _ in call.keywords:
        if name in _DEFAULTS or name == "reduction":
            yield lambda left=name: _without_keyword(call, left)  # type: ignore[misc]
    for name in ("bias", "b_qkv"):
        if name in call.names and call.arguments[call.names.index(name)] is not None:
            yield lambda left=name: _mapped(call, lambda n, x: None if n == left else x)  # type: ignore[misc]
    wide = contract_of(call.operator).or_float32
    yield from _one_by_one(call, lambda n, x: replace(x, dtype=call.dtype) if x.dtype == "float32" and n in wide else x)


def _without_keyword(call: Call, left: str) -> Call:
    """The call without it; the gradient of a loss of all rows is one number."""
    call = replace(call, keywords=tuple((name, value) for name, value in call.keywords if name != left))
    if left != "reduction":
        return call
    one = Array((), "float32", "ones", scale=0.75)
    return _mapped(call, lambda name, x: one if name == "dloss" else x)


def _plain_values(call: Call) -> Iterator[Callable[[], Call]]:
    """Scale 1 and mean 0, but for the integers, whose range they are, and the tables, whose positions."""
    yield from _one_by_one(call, lambda n, x: replace(x, scale=1.0, mean=0.0) if _free(x) else x)
    yield from _one_by_one(call, lambda n, x: replace(x, scale=1.0) if _free(x) else x)
    yield from _one_by_one(call, lambda n, x: replace(x, mean=0.0) if x.values != "integers" else x)
    yield from _one_by_one(call, lambda n, x: replace(x, values="normal") if _free(x) else x)
    yield lambda: _mapped(call, lambda n, x: _seeded(call, n, x))


def _free(x: Array) -> bool:
    return (
        not isinstance(x, Kept)
        and x.values not in ("integers", "softmax", "cos", "sin")
        and x.dtype not in ("int64", "bool")
    )


def _seeded(call: Call, name: str, x: Any) -> Any:
    """Seeds 0, 1, 2 in the order of the arguments; cos and sin keep the one that they share."""
    if not isinstance(x, Array) or x.values in ("cos", "sin"):
        return x
    return replace(x, seed=[n for n, _ in _arrays(call)].index(name))
