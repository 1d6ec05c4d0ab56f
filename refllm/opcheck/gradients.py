"""What a backward operator returns beside the gradients that are asked: None where there is no tensor to have one."""

from dataclasses import replace

from refllm.accuracy.expected import Expected
from refllm.opcheck.observe import Observation, Result
from refllm.ops.backward_contracts import is_backward
from refllm.ops.contracts import contract_of
from refllm.strategies.call import Call

_NONE = "NoneType"


def without_none(call: Call, seen: Observation, expected: tuple[Expected, ...]) -> Observation:
    """The observation with the results that are asked alone, in order; as it is for a forward operator."""
    if not is_backward(call.operator):
        return seen
    asked = [e.name for e in expected]
    alone = seen.alone and (seen.alone[0], _asked(call, seen.alone[1], asked))
    return replace(seen, results=_asked(call, seen.results, asked), alone=alone)


def _asked(call: Call, results: tuple[Result, ...], asked: list[str]) -> tuple[Result, ...]:
    names = list(contract_of(call.operator).outputs)
    if len(results) != len(names):
        return results
    return tuple(r for name, r in zip(names, results, strict=True) if name in asked or r.kind != _NONE)


def missing(call: Call, results: tuple[Result, ...], expected: tuple[Expected, ...]) -> tuple[str, str] | None:
    """The first gradient that is not there, and the argument that it is of; None if all are."""
    if not is_backward(call.operator) or len(results) != len(expected):
        return None
    of = contract_of(call.operator).gradient_of  # type: ignore[attr-defined]
    return next(((e.name, of[e.name]) for r, e in zip(results, expected, strict=True) if r.kind == _NONE), None)
