"""A tape in place of the operators: it records what a page computes, and walks back over it.

The page runs once with `TapedOperators` in place of `refllm.forward.operators.Operators` and with `TapedWeights`; what
comes out is the very forward pass. Every call is written down with the numbers of its inputs and results and with what
its `<operator>_backward` reads. Backwards, each value has the sum of the gradients of those who read it, rounded at
`add.grad`; a tensor that is used twice, tied weights say, is one value. What depends on nothing that a gradient is
asked for is an array and is not written down.

Checkpointed, calls within a layer keep only what comes from outside of the layer. When the walk reaches its last call
they are all computed again, by the same operators on the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import Signature, signature
from typing import Any

import numpy as np

from refllm import ops
from refllm.forward.operators import Operators, Recorder
from refllm.forward.traced import Gradients, Step, Traced, value_of
from refllm.precision import Arithmetic
from refllm.storage.weights import Weights


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor of the model, which is fetched when it is needed."""

    name: str


@dataclass(frozen=True)
class _Inside:
    """Stands for a value that is computed again within its layer."""

    number: int


class _Call:
    """One step that was taken. sources: the numbers of its arguments, None for what needs no gradient; arguments: with
    which it is taken again; kept: what its reverse reads, None until it is taken again; certain: whether its arguments
    are known to the bit."""

    def __init__(self, step: Step, sources: tuple[int | None, ...], results: list[int], scope: str) -> None:
        self.step, self.sources, self.results, self.scope = step, sources, results, scope
        self.shapes: list[tuple[int, ...]] = []
        self.certain = False
        self.arguments: tuple[Any, ...] = ()
        self.kept: tuple[Any, ...] | None = None


class Walk:
    """What is done with gradients on the way back. This is the way of the definitions, in one arithmetic; a check
    follows gradients that know their error (`refllm.accuracy.gradients`), and puts others in their place."""

    def __init__(self, ar: Arithmetic, recorder: Recorder | None = None) -> None:
        self.ar, self.recorder = ar, recorder

    def start(self) -> Any:
        """The gradient of the loss by itself."""
        return np.ones((), self.ar.work)

    def nothing(self, shape: tuple[int, ...]) -> Any:
        """The gradient of a result that nobody read."""
        return np.zeros(shape, self.ar.work)

    def back(self, step: Step, grads: list[Any], kept: tuple[Any, ...], needed: tuple[bool, ...], certain: bool) -> Any:
        """The gradients of the arguments of a step. certain: whether all that was kept is known to the bit."""
        return step.backward(grads, kept, needed)

    def sum(self, before: Any, gradient: Any) -> Any:
        """Two gradients of one value."""
        return self.ar.round(before + gradient, "add.grad")

    def arrived(self, names: Collection[str], gradient: Any) -> Any:
        """The whole gradient of a value with these names, "grad:" before them; what is returned is passed on."""
        for name in names:
            if self.recorder is not None and self.recorder.wants(name):
                self.recorder.record(name, gradient)
        return gradient


class Tape:
    """What a forward pass computed, in order. One pass forward, one walk back.

    wanted: the tensors that are to have a gradient. inputs: named value -> the name that its gradient gets, for values
    that come from outside. checkpointing: layers are computed again. walk: what is done with gradients. exactly: the
    operators whose results are known to the bit where their arguments are.
    """

    def __init__(
        self,
        ar: Arithmetic,
        weights: Weights,
        wanted: Collection[str],
        *,
        inputs: Mapping[str, str],
        padding: int | None = None,
        checkpointing: bool = False,
        walk: Walk | None = None,
        exactly: Collection[str] = (),
    ) -> None:
        self.exactly = exactly
        self.ar, self.inputs, self.padding, self.walk = ar, inputs, padding, walk or Walk(ar)
        self._weights, self._wanted, self._checkpointing = weights, wanted, checkpointing
        self._calls: list[_Call] = []
        self._scopes: dict[str, list[_Call]] = defaultdict(list)
        self._scope_of: dict[int, str] = {}  # of values that are computed again
        self._leaves: dict[str, int] = {}
        self._tensors: dict[int, str] = {}
        self._names: dict[int, list[str]] = defaultdict(list)
        self._certain: set[int] = set()
        self._count = 0

    # ---------------------------------------------------------------------------------------------------------- forward

    def tensor(self, name: str, value: np.ndarray) -> Any:
        """A tensor of the model as the page reads it. name: the one that it is listed under."""
        if name not in self._wanted:
            return value
        traced = self.leaf(name, value)
        self._tensors[traced.number] = name
        return traced

    def leaf(self, name: str, value: np.ndarray) -> Traced:
        """A value that the walk back ends at."""
        if name not in self._leaves:
            self._leaves[name] = self._new()
            self._certain.add(self._leaves[name])
        return Traced(self, value, self._leaves[name])

    def put(self, traced: Traced, value: np.ndarray) -> Traced:
        """Another array in the place of a value: what somebody has there, to the bit."""
        self._certain.add(traced.number)
        return Traced(self, value, traced.number)

    def rows(self, name: str, ids: np.ndarray) -> Any:
        """The embeddings of `ids`. The row of the padding id learns nothing here, as in Transformers."""
        value = self._weights.rows(name, ids)
        if name not in self._wanted:
            return value
        counted = np.ones(ids.shape, bool) if self.padding is None else ids != self.padding
        table = np.broadcast_to(self.ar.work(0), self._weights.shapes[name])  # only its shape is read

        def backward(grads: list[np.ndarray], _: tuple[Any, ...], __: tuple[bool, ...]) -> Gradients:
            return [ops.embedding_backward(grads[0][counted], ids[counted], table, ar=self.ar)]

        how = {"ids": ids[counted], "counted": counted, "table": table}
        found = self.record(Step(lambda _: value, backward, lambda _: (), "embedding", how), (self.leaf(name, value),))
        self._certain.add(found.number)
        return found

    def named(self, name: str, value: Any) -> None:
        """Notes the name of a value."""
        if isinstance(value, Traced):
            self._names[value.number].append(f"grad:{name}")

    def record(self, step: Step, arguments: tuple[Any, ...], scope: str = "") -> Any:
        """Takes a step and writes it down, if one of the arguments is on the tape. Its results."""
        found = step.forward(*map(value_of, arguments))
        sources = tuple(x.number if isinstance(x, Traced) else None for x in arguments)
        if all(number is None for number in sources):
            return found
        results = found if isinstance(found, tuple) else (found,)
        call = _Call(step, sources, [self._new() for _ in results], scope if self._checkpointing else "")
        call.shapes = [np.shape(x) for x in results]
        known = all(number is None or number in self._certain for number in sources)
        call.certain = known or step.operator in _READS  # of these nothing is kept that could be uncertain
        if known and (step.moves or step.operator in self.exactly):
            self._certain.update(call.results)
        self._write_down(call, arguments)
        traced = tuple(Traced(self, x, n) for x, n in zip(results, call.results, strict=True))
        return traced if isinstance(found, tuple) else traced[0]

    def _write_down(self, call: _Call, arguments: tuple[Any, ...]) -> None:
        given: list[Any] = []
        for x, number in zip(arguments, call.sources, strict=True):
            if number in self._tensors:
                given.append(_Tensor(self._tensors[number]))
            elif call.scope and number is not None and self._scope_of.get(number) == call.scope:
                given.append(_Inside(number))
            else:
                given.append(value_of(x))
        if call.scope:
            call.arguments = tuple(given)
            self._scopes[call.scope].append(call)
            self._scope_of |= dict.fromkeys(call.results, call.scope)
        else:
            call.kept = call.step.keep(*given)
        self._calls.append(call)

    def _new(self) -> int:
        self._count += 1
        return self._count

    # --------------------------------------------------------------------------------------------------------- backward

    def gradients(self, loss: Traced) -> dict[str, Any]:
        """Name -> gradient of what was asked for and the loss depends on. The tape is used up."""
        walk = self.walk
        grads: dict[int, Any] = {loss.number: walk.start()}
        while self._calls:
            call = self._calls.pop()
            self._again(call)
            incoming = [grads.pop(number, None) for number in call.results]
            if all(grad is None for grad in incoming):
                continue
            given = [
                self._arrived(number, walk.nothing(shape) if d is None else d)
                for number, d, shape in zip(call.results, incoming, call.shapes, strict=True)
            ]
            for source, of_source in zip(call.sources, self._back(call, given), strict=True):
                if source is not None and of_source is not None:
                    before = grads.get(source)
                    grads[source] = of_source if before is None else walk.sum(before, of_source)
        found = {name: number for name, number in self._leaves.items() if number in grads}
        return {name: self._arrived(number, grads[number]) for name, number in found.items()}

    def _back(self, call: _Call, grads: list[Any]) -> Sequence[Any]:
        assert call.kept is not None
        kept = tuple(self._fetched(x) for x in call.kept)
        needed = tuple(number is not None for number in call.sources)
        found: Sequence[Any] = self.walk.back(call.step, grads, kept, needed, call.certain)
        return found

    def _arrived(self, number: int, gradient: Any) -> Any:
        names = self._names.get(number)
        return self.walk.arrived(names, gradient) if names else gradient

    def _again(self, call: _Call) -> None:
        """Where a call has nothing kept: all calls of its layer are made again."""
        if call.kept is not None:
            return
        values: dict[int, np.ndarray] = {}
        for other in self._scopes.pop(call.scope):
            given = [values[x.number] if isinstance(x, _Inside) else x for x in other.arguments]
            found = other.step.forward(*map(self._fetched, given))
            values |= zip(other.results, found if isinstance(found, tuple) else (found,), strict=True)
            other.kept = other.step.keep(*given)

    def _fetched(self, x: Any) -> Any:
        return self._weights[x.name] if isinstance(x, _Tensor) else x


class TapedOperators:
    """The operators of a page, each call of which is recorded on a tape."""

    def __init__(self, plain: Operators, tape: Tape) -> None:
        self._plain, self._tape, self.ar = plain, tape, plain.ar

    def within(self, scope: str) -> "TapedOperators":
        return TapedOperators(self._plain.within(scope), self._tape)

    def tap(self, name: str, value: Any) -> Any:
        """`value`, shown to the recorder under its name; an input that a gradient is asked for enters here."""
        full = self._plain.scope + name
        if full in self._tape.inputs:
            value = self._tape.leaf(self._tape.inputs[full], value)
        shown, array = self._plain.tap(name, value_of(value)), value_of(value)
        self._tape.named(full, value)
        return self._tape.put(value, shown) if shown is not array and isinstance(value, Traced) else value

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        getattr(self._plain, operator)  # raises for a name that is none
        return partial(self._call, operator)

    def _call(self, operator: str, *arguments: Any, **keywords: Any) -> Any:
        bound = _signature(operator).bind(*arguments, **keywords)
        reverse = partial(getattr(ops, f"{operator}_backward"), ar=self.ar, **bound.kwargs)

        def backward(grads: list[np.ndarray], kept: tuple[Any, ...], needed: tuple[bool, ...]) -> Gradients:
            skip = {"needed": needed} if operator == "linear" else {}
            found = reverse(*grads, *kept, **skip)
            found = found if isinstance(found, tuple) else (found,)
            return [*found, *[None] * (len(needed) - len(found))][: len(needed)]

        forward = partial(getattr(self._plain, operator), **bound.kwargs)
        keep = _READS.get(operator, lambda *arguments: arguments)
        step = Step(forward, backward, keep, operator, bound.kwargs, operator in _MOVES)
        return self._tape.record(step, bound.args, self._plain.scope)


@cache
def _signature(operator: str) -> Signature:
    return signature(getattr(ops, operator))


_MOVES = ("split_heads", "merge_heads")
_READS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "add": lambda *_: (),
    "rope": lambda q, k, cos, sin: (cos, sin),
    "split_heads": lambda *_: (),
    "merge_heads": lambda x: (x.shape[1],),
}
"""What `<operator>_backward` takes beside the incoming gradients, where that is not all arguments."""


class TapedWeights(Mapping[str, Any]):
    """The tensors of a model as `Weights` gives them, those that are to have a gradient as values on the tape."""

    low_memory = False  # whole tensors, so that each is one value

    def __init__(self, weights: Weights, tape: Tape, prefix: str = "") -> None:
        self._weights, self._tape, self._prefix = weights, tape, prefix
        self.shapes = weights.shapes

    def layer(self, index: int) -> "TapedWeights":
        return TapedWeights(self._weights, self._tape, f"layers.{index}.")

    def rows(self, name: str, ids: np.ndarray) -> Any:
        return self._tape.rows(name, ids)

    def __getitem__(self, name: str) -> Any:
        name = self._prefix + name
        name = self._weights.tied.get(name, name)
        return self._tape.tensor(name, self._weights[name])

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._weights

    def __iter__(self) -> Iterator[str]:
        return (name[len(self._prefix) :] for name in self._weights if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
