"""What a candidate offers: which calls it is asked, and by whose conventions.

A kernel may be right in all that it does and do less than the contract: no strides, widths that 256 divides, one dtype.
Then it says so, is asked the rest, and the verdict shows what was left out.
"""

import operator as operators
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from refllm.errors import InputError
from refllm.opcheck.shrink import axis_lengths, resized
from refllm.opcheck.without import calls_without, find_left_out, left_out
from refllm.ops.backward_contracts import forward_name
from refllm.ops.contracts import ROWS, contract_of
from refllm.strategies.call import Call
from refllm.strategies.levels import families_of

CONVENTIONS = ("", "torch")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "==": operators.eq,
    "!=": operators.ne,
    "<=": operators.le,
    ">=": operators.ge,
    "<": operators.lt,
    ">": operators.gt,
}
_RULE = re.compile(r"([A-Z])(?:%([1-9]\d{0,6}))?(==|!=|<=|>=|<|>)(\d{1,7}|[A-Z])")
_FARTHEST = 4096
"""The most by which a length is changed to meet a rule."""


@dataclass(frozen=True)
class Size:
    """A rule about the length of an axis: E%256==0, D<=128, S==T. divisor: 0 for none. than: a number or an axis."""

    axis: str
    divisor: int
    compare: str
    than: int | str

    def __str__(self) -> str:
        return f"{self.axis}{f'%{self.divisor}' * bool(self.divisor)}{self.compare}{self.than}"

    def holds(self, lengths: dict[str, int]) -> bool:
        """Whether these lengths keep it; what has no such axis does."""
        if self.axis not in lengths or (isinstance(self.than, str) and self.than not in lengths):
            return True
        length = lengths[self.axis] % self.divisor if self.divisor else lengths[self.axis]
        return _COMPARE[self.compare](length, self.than if isinstance(self.than, int) else lengths[self.than])


@dataclass(frozen=True)
class Offers:
    """without: arguments and families that no call has. sizes: rules that all calls keep. convention: "" is the
    contract's, "torch" Torch's and Transformers'."""

    without: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    convention: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What was not asked, as its options have it."""
        of = (f"convention {self.convention}",) if self.convention else ()
        return (*self.without, *map(str, self.sizes), *of)

    def of(self, calls: Any) -> Any:
        """A list or a Hypothesis strategy of calls: those that are asked, with lengths that keep the rules."""
        calls = calls_without(calls, self.without)
        if not self.sizes:
            return calls
        if not isinstance(calls, Sequence):
            return calls.map(self.fitted).filter(lambda call: call is not None)
        kept = [made for made in map(self.fitted, calls) if made is not None]
        if calls and not kept:
            raise InputError(
                f"--sizes {', '.join(map(str, self.sizes))}: no call keeps that, so nothing is left to check"
            )
        return list(dict.fromkeys(kept))

    def asks(self, call: Call) -> bool:
        """Whether a call is one that is asked."""
        lengths = _lengths(call)
        return left_out(call, self.without) == call and all(size.holds(lengths) for size in self.sizes)

    def fitted(self, call: Call) -> Call | None:
        """The call with the nearest lengths that keep the rules, of the same families but for those that rest on a
        length; None if there is none."""
        for size in self.sizes:
            changed = _changed(call, size)
            if changed is None:
                return None
            call = changed
        return call if all(size.holds(_lengths(call)) for size in self.sizes) and self.asks(call) else None


def find_offers(operator: str, without: str | Sequence[str], sizes: str | Sequence[str], convention: str) -> Offers:
    """What these options say. Raises InputError for what they cannot mean."""
    if convention not in CONVENTIONS:
        raise InputError(f"--convention {convention} is not known; use torch, or leave it out for the contract's")
    given = (sizes,) if isinstance(sizes, str) else tuple(sizes)
    rules = [rule for one in given for rule in one.replace(" and ", ",").split(",") if rule.strip()]
    if convention == "torch" and forward_name(operator) == "attention":
        rules.append("S<=T")  # what a mask that is causal from the top means for more queries than keys, nobody says
    return Offers(find_left_out(operator, without), tuple(_size(operator, rule) for rule in rules), convention)


def _size(operator: str, rule: str) -> Size:
    axes = sorted({axis for named in contract_of(operator).arguments.values() for axis in named} - {ROWS, "(H+2K)D"})
    axes = ["R" if axis == "R/2" else axis for axis in axes]
    axes += ["D", "H", "K"] if forward_name(operator) == "rms_norm_qkv_rope" else []
    found = _RULE.fullmatch(re.sub(r"\s+", "", rule))
    than = found[4] if found else ""
    if not found or found[1] not in axes or not (than.isdigit() or than in axes):
        raise InputError(
            f"--sizes {rule.strip()}: expected an axis ({', '.join(axes)}) and what is true of its length, as "
            f"{axes[0]}%256==0 or {axes[0]}<=128 or {axes[0]}=={axes[-1]}"
        )
    return Size(found[1], int(found[2] or 0), found[3], int(than) if than.isdigit() else than)


def _lengths(call: Call) -> dict[str, int]:
    lengths = axis_lengths(call)
    return lengths | ({"R": 2 * lengths["R/2"]} if "R/2" in lengths else {})


def _changed(call: Call, size: Size) -> Call | None:
    lengths = _lengths(call)
    if size.holds(lengths):
        return call
    length = lengths[size.axis]
    by = sorted(range(-min(length, _FARTHEST), _FARTHEST + 1), key=lambda n: (n < 0, abs(n)))
    fits = next((length + n for n in by if size.holds(lengths | {size.axis: length + n})), None)
    if fits is None or (not fits and length):
        return None
    try:
        return resized(call, {"R/2": fits // 2} if size.axis == "R" else {size.axis: fits})
    except InputError:
        return None


def suggestion(call: Call, text: str) -> str:
    """The option that fits a finding on a call that could not be made plainer: what such a kernel may not offer."""
    if "expected float32" in text and "loss" in text:
        return "--convention torch takes the loss in the dtype of the logits"
    names = [name for name in families_of(call) if name not in ("half_split", "interleaved", "rms", "layer")]
    if "fewer_queries" in names:
        return "--convention torch for a mask that is causal from the top, or --without fewer_queries"
    return f"{' or '.join(f'--without {name}' for name in names)} if yours does not offer that" if names else ""
