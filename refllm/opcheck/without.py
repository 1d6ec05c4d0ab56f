"""Checks of a candidate that offers less: calls without some arguments or families, and hints at what to leave out.

A kernel without a key mask, or one that returns no log-sum-exp, can be right in all that it does.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from refllm.errors import InputError
from refllm.ops.contracts import contract_of
from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.levels import FAMILIES, families, families_of, is_mixed

_DROPPED = ("return_lse", "dlse", "bias", "b_qkv")
"""What a call stays valid without, whatever else is in it. Other calls are left out: behind a key mask there may be
NaN, and logits may be finite at their own scale alone."""
MIXED, STRIDES = "mixed_dtypes", "strides"
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def optional(operator: str) -> dict[str, Any]:
    """The arguments of an operator that a call may lack, with what it then means: keywords that have a default, and
    arrays that may be None. Raises InputError for an operator that there is none of."""
    known = contract_of(operator).parameters
    keywords = {name: p for name, p in known.items() if p.kind is p.KEYWORD_ONLY}
    arrays = [name for name, p in known.items() if name not in keywords and "None" in str(p.annotation)]
    return dict.fromkeys(arrays) | {name: p.default for name, p in keywords.items() if p.default is not p.empty}


def find_left_out(operator: str, names: str | Sequence[str]) -> tuple[str, ...]:
    """`names`, each once. Raises InputError for one that is no optional argument and no family of the operator."""
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    known = [*optional(operator), *families(operator)]
    for name in names:
        if name not in known:
            raise InputError(
                f"--without {name}: {operator} has no optional argument and no family of inputs of that name; use "
                f"{' or '.join(known)}"
            )
    return names


def left_out(call: Call, names: Sequence[str]) -> Call | None:
    """The call with none of these arguments and of none of these families; None for one that means nothing without."""
    if STRIDES in names:
        call = _dense(call)
    defaults = {name: value for name, value in optional(call.operator).items() if name in names} if names else {}
    for name, value in call.keywords:
        if name in defaults and name not in _DROPPED and value != defaults[name]:
            return None
    keywords = tuple((name, value) for name, value in call.keywords if name not in defaults)
    arguments = tuple(
        None if name in defaults else value for name, value in zip(call.names, call.arguments, strict=True)
    )
    call = replace(call, arguments=arguments, keywords=keywords)
    return None if any(name in FAMILIES for name in set(names) & set(families_of(call))) else call


def _dense(call: Call) -> Call:
    """The same arrays, of which none is a view of another."""

    def dense(x: Any) -> Any:
        return replace(x, layout="dense") if isinstance(x, Array) and x.layout != "far" else x

    keywords = tuple((name, dense(value)) for name, value in call.keywords)
    return replace(call, arguments=tuple(map(dense, call.arguments)), keywords=keywords)


def calls_without(calls: Any, names: Sequence[str]) -> Any:
    """A list or a Hypothesis strategy of calls, of which none has one of these arguments."""
    if not names:
        return calls
    if isinstance(calls, Sequence):
        kept = [made for made in (left_out(call, names) for call in calls) if made is not None]
        if calls and not kept:
            raise InputError(f"--without {', '.join(names)}: every call needs it, so nothing is left to check")
        return list(dict.fromkeys(kept))
    return calls.map(lambda call: left_out(call, names)).filter(lambda call: call is not None)


def missing_result(call: Call, returned: int) -> str:
    """What to leave out if a candidate returns fewer results than it is asked for, as a clause; else ""."""
    asked = dict(call.keywords).get("return_lse")
    return "; --without return_lse leaves it out" if asked and returned == 1 else ""


def raised(call: Call) -> str:
    """What to leave out if a candidate raises on a call, as a clause; else ""."""
    return f"; --without {MIXED} leaves out float32 arrays beside {call.dtype}" if is_mixed(call) else ""


def refused(operator: str, error: BaseException, at_once: bool) -> str:
    """What a candidate that does not take the arguments should take, or what to leave out, as a clause; else "".

    at_once: it was raised by the call itself, and not by a line of the candidate.
    """
    if not isinstance(error, TypeError):
        return ""
    unexpected = _UNEXPECTED.search(str(error))
    if unexpected and unexpected[1] in optional(operator):
        return f"; --without {unexpected[1]} leaves it out"
    return f"; the contract is {contract_of(operator).text}" if at_once else ""
