"""The gradients of a whole model with their predicted error: walks over the tape of `refllm.forward.tape`.

*Isolated*, the tape takes over a candidate's value at every name, forward, and its gradient at every name, backward: so
each backward operator is judged on the candidate's own saved values and incoming gradient (`isolated`). The same walk
in the candidate's format says what it has to the bit (`to_the_bit`).

*End to end* the errors of the forward pass count as well, and they are the same errors wherever a value is read: in
the residual stream, in all that was kept, in the loss. A variance beside each value cannot know that. So the passes are
made again and again, each operator's result off by a random error of the size that is predicted for that operator
alone, and what the gradients differ by is their variance (`end_to_end`). Nothing in it is calibrated; one prediction of
one operator serves both.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from refllm.accuracy.backward import Backward, exact_arithmetic
from refllm.accuracy.propagation import Propagation, Uncertain, certain
from refllm.forward.gradients import padding_id, taped_loss, tensor_names
from refllm.forward.model import Model
from refllm.forward.operators import Operators
from refllm.forward.tape import Tape, Walk
from refllm.forward.traced import Step
from refllm.ops import IGNORE_INDEX
from refllm.precision import Arithmetic, Policy, rounding

_NARROW = ("bfloat16", "float16")
_OF_A_NORM = 0.6  # of the variance of its float32 roundings: four of seven are of its mean, sum and root
RUNS = 8
"""Passes with random errors. A variance that is the mean of n squares over k of them is known to sqrt(2 / (n k))."""

Named = dict[str, np.ndarray]
_UNCERTAIN = {
    "linear": 1,
    "rms_norm": 1,
    "layer_norm": 1,
    "rope": 4,
    "attention": 3,
    "glu": 2,
    "activation": 1,
    "add": 2,
}
"""Operator -> how many of its first arguments are values of the pass. What is not here rounds nothing."""


@dataclass(frozen=True)
class Pass:
    """One call of a model with its loss.

    input_ids [B, S], attention_mask, position_ids: as a model takes them, None where they are not given. targets: the
    labels by the names of the head's arguments, each with B rows. micro_batches: into how many parts the batch is cut,
    whose gradients are added; the loss of each is then divided by the labels of all. scale: what the loss is multiplied
    with before the walk back. tables: cos and sin [B, S, R/2]. frozen: tensors that learn nothing, by their names in a
    file.
    """

    input_ids: np.ndarray
    targets: Mapping[str, np.ndarray]
    tables: tuple[np.ndarray, np.ndarray]
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    micro_batches: int = 1
    scale: float = 1.0
    frozen: frozenset[str] = frozenset()

    def parts(self) -> list[slice]:
        """The rows of each micro-batch."""
        return parts_of(len(self.input_ids), self.micro_batches)

    def arguments(self, rows: slice) -> dict[str, Any]:
        """The call of one micro-batch."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}
        found: dict[str, Any] = {name: None if x is None else x[rows] for name, x in {**given, **self.targets}.items()}
        if self.micro_batches > 1:
            found["num_items_in_batch"] = counted(self.targets)
        return found


def parts_of(rows: int, micro_batches: int) -> list[slice]:
    """The rows of each micro-batch."""
    cuts = np.linspace(0, rows, micro_batches + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def counted(targets: Mapping[str, np.ndarray]) -> int:
    """How many labels of a batch count, before they are shifted: what its micro-batches divide their losses by."""
    return max(1, int(sum((labels != IGNORE_INDEX).sum() for labels in targets.values())))


class _Tables:
    """Rotary tables that are given, in the place of a `RotaryEmbedding`."""

    def __init__(self, cos: np.ndarray, sin: np.ndarray) -> None:
        self._both = cos, sin

    def tables(self, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._both


def walked(
    model: Model,
    call: Pass,
    ar: Arithmetic,
    plain: Callable[[slice], Any],
    walk: Walk,
    begin: Callable[[slice], None],
    exactly: Collection[str] = (),
) -> dict[str, Any]:
    """Tensor -> gradient after a pass and a walk over all micro-batches. plain: the operators of one of them; begin:
    told its rows before it is walked. exactly: see `Tape`."""
    names, found = tensor_names(model), dict[str, Any]()
    wanted = {name for name, key in names.items() if key not in call.frozen}
    taped = copy(model)
    taped.arithmetic = ar
    for rows in call.parts():
        taped.rotary = _Tables(*(np.asarray(table[rows], ar.work) for table in call.tables))  # type: ignore[assignment]
        padding = padding_id(model.config)
        tape = Tape(ar, model.weights, wanted, inputs={}, padding=padding, walk=walk, exactly=exactly)
        begin(rows)
        loss = taped_loss(taped, tape, call.arguments(rows), plain(rows))
        with np.errstate(all="ignore"):
            for name, gradient in tape.gradients(loss).items():
                key = names[name]
                found[key] = walk.sum(found[key], gradient) if key in found else gradient
    return found


# --------------------------------------------------------------------------------------------- each operator on its own


class _Shown:
    """Operators at whose names a candidate's values are put in the place of what was computed."""

    def __init__(self, plain: Any, shown: Mapping[str, np.ndarray], rows: slice, dtype: str) -> None:
        self._plain, self._shown, self._rows, self._dtype = plain, shown, rows, dtype
        self.ar, self.scope = plain.ar, plain.scope

    def within(self, scope: str) -> "_Shown":
        return _Shown(self._plain.within(scope), self._shown, self._rows, self._dtype)

    def tap(self, name: str, value: np.ndarray) -> np.ndarray:
        found = self._shown.get(self.scope + name)
        return value if found is None else put(found[self._rows], value)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """A sum in a narrow format, which is known to the bit though nobody showed it."""
        total = self._plain.add(x, y)
        narrow = self._dtype in _NARROW
        return rounding(self._dtype)(total.astype(np.float32)).astype(self.ar.work) if narrow else total

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self._plain, operator)
        return function


def put(shown: np.ndarray, value: np.ndarray) -> np.ndarray:
    """`value` with what was shown of it, which may be its first channels, in its place."""
    taken = np.array(value)
    taken[..., : shown.shape[-1]] = shown
    return taken


class _Following(Walk):
    """Follows gradients that know their variance, and the operators that it is of (`Uncertain.shares`).

    At every name the candidate's gradient is put in their place, after what was predicted there is kept. What a step
    kept of values that nobody saw makes a variance NaN: not known.
    """

    def __init__(self, rules: Callable[[str], Backward], ar: Arithmetic, shown: Named, scale: float) -> None:
        super().__init__(ar)
        self.rules, self.shown, self.scale, self.rows = rules, shown, scale, slice(None)
        self.predicted: dict[str, list[Uncertain]] = {}

    def start(self) -> Uncertain:
        return certain(np.asarray(self.scale))

    def nothing(self, shape: tuple[int, ...]) -> Uncertain:
        return certain(np.zeros(shape))

    def back(
        self, step: Step, grads: list[Any], kept: tuple[Any, ...], needed: tuple[bool, ...], certain: bool
    ) -> list[Uncertain | None]:
        values = step.backward([d.value for d in grads], kept, needed)
        of_grads = [np.asarray(d.variance, np.float64) for d in grads]
        if step.operator and not step.moves:
            variances = self.rules(step.operator).back(step.operator, grads, kept, step.how, needed)
        elif step.operator or step.moves:
            variances = list(step.backward(of_grads, kept, needed))
        else:  # sums and products of a page or head: the squares of their factors
            squares = tuple(np.square(x) if np.ndim(x) or isinstance(x, float | int) else x for x in kept)
            variances = [None if v is None else np.abs(v) for v in step.backward(of_grads, squares, needed)]
        shares = {name: 1.0 for d in grads if step.moves or d.variance.any() for name in d.shares}
        shares |= {step.operator: 1.0} if step.operator and not step.moves else {}
        found: list[Uncertain | None] = []
        for value, variance in zip(values, [*variances, *[None] * len(values)], strict=False):
            if value is None or variance is None:
                found.append(None)
                continue
            known = certain or step.moves
            found.append(Uncertain(value, variance if known else np.full(value.shape, np.nan), shares))
        return found

    def sum(self, before: Uncertain, gradient: Uncertain) -> Uncertain:
        found = self.rules("add").sum(before, gradient)
        return replace(found, shares={**before.shares, **gradient.shares, "add": 1.0})

    def arrived(self, names: Collection[str], gradient: Uncertain) -> Uncertain:
        for name in names:
            self.predicted.setdefault(name, []).append(gradient)
            found = self.shown.get(name)
            if found is not None:
                rest = np.array(gradient.variance, np.float64)
                rest[..., : found.shape[-1]] = 0
                shares = gradient.shares if rest.any() else {}  # channels that were not shown
                gradient = Uncertain(put(found[self.rows], gradient.value), rest, shares)
        return gradient

    def begin(self, rows: slice) -> None:
        self.rows = rows


def isolated(
    model: Model,
    call: Pass,
    values: Mapping[str, np.ndarray],
    gradients: Named,
    rules: Callable[[str], Backward],
    policy: Policy,
) -> dict[str, Uncertain]:
    """ "grad:" + name -> what follows from the candidate's own values and incoming gradients, with the variance of the
    operator's own rounding, NaN where a value that it reads was not shown. gradients: of named values, by such names.
    """
    ar = exact_arithmetic(policy)
    walk = _Following(rules, ar, gradients, call.scale)
    dtype = rules("add").dtype
    exactly = ("add",) if dtype in _NARROW else ()
    plain = lambda rows: _Shown(Operators(ar), values, rows, dtype)  # noqa: E731
    tensors = walked(model, call, ar, plain, walk, walk.begin, exactly)
    found = {name: _joined(parts) for name, parts in walk.predicted.items()}
    return found | {f"grad:{name}": gradient for name, gradient in tensors.items()}


def _joined(parts: list[Uncertain]) -> Uncertain:
    value, variance = (np.concatenate([getattr(x, name) for x in parts]) for name in ("value", "variance"))
    return Uncertain(value, variance, parts[0].shares)


class _Emulating(Walk):
    """The walk of the definitions in a narrow format, on a candidate's gradients."""

    def __init__(self, ar: Arithmetic, shown: Named, scale: float) -> None:
        super().__init__(ar)
        self.shown, self.scale, self.rows, self.found = shown, scale, slice(None), dict[str, list[np.ndarray]]()

    def start(self) -> np.ndarray:
        return np.asarray(self.scale, self.ar.work)

    def arrived(self, names: Collection[str], gradient: np.ndarray) -> np.ndarray:
        for name in names:
            self.found.setdefault(name, []).append(gradient)
            if name in self.shown:
                gradient = put(self.shown[name][self.rows], gradient)
        return gradient

    def begin(self, rows: slice) -> None:
        self.rows = rows


def to_the_bit(
    model: Model, call: Pass, values: Mapping[str, np.ndarray], gradients: Named, dtype: str, policy: Policy
) -> Named:
    """What `isolated` predicts, as an implementation has it that rounds where the policy says, wherever the order of
    float32 sums does not matter."""
    ar = Arithmetic(dtype, replace(policy, torch_order=False))
    walk = _Emulating(ar, gradients, call.scale)
    tensors = walked(model, call, ar, lambda rows: _Shown(Operators(ar), values, rows, dtype), walk, walk.begin)
    return {n: np.concatenate(parts) for n, parts in walk.found.items()} | {f"grad:{n}": g for n, g in tensors.items()}


# ----------------------------------------------------------------------------------------------------------- end to end


class _Errors:
    """The errors of all results of a pass and a walk, in order. They are predicted in a first run, which makes none."""

    def __init__(self, factor: float) -> None:
        self._sigmas: list[np.ndarray] = []
        self._left: Iterator[np.ndarray] | None = None
        self._random: np.random.Generator = np.random.default_rng(0)
        self._factor = factor

    def begin(self, seed: int) -> None:
        """Errors are made from here on."""
        self._left, self._random = iter(self._sigmas), np.random.default_rng(seed)

    @property
    def predicting(self) -> bool:
        return self._left is None

    def keep(self, variance: Any) -> None:
        self._sigmas.append((self._factor * np.sqrt(np.asarray(variance, np.float64))).astype(np.float32))

    def made(self, value: np.ndarray, of_rows: float = 0.0) -> np.ndarray:
        """of_rows: which part of the variance is that of a factor which all of a row share."""
        assert self._left is not None
        sigma, shape = next(self._left), np.shape(value)
        random = self._random.standard_normal(shape, np.float32)
        if of_rows:
            factor = np.sign(value) * self._random.standard_normal((*shape[:-1], 1), np.float32)
            random = np.sqrt(1 - of_rows) * random + np.sqrt(of_rows) * factor
        return value + sigma * random


class _Disturbed:
    """The exact operators, each result off by an error of its own."""

    def __init__(self, plain: Any, forward: Propagation, errors: _Errors) -> None:
        self._plain, self._forward, self._errors = plain, forward, errors
        self.ar, self.scope = plain.ar, plain.scope

    def for_rows(self, _: slice) -> "_Disturbed":
        return self

    def within(self, scope: str) -> "_Disturbed":
        return _Disturbed(self._plain.within(scope), self._forward, self._errors)

    def tap(self, name: str, value: np.ndarray) -> np.ndarray:
        return value

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self._plain, operator)
        if operator not in _UNCERTAIN:
            return function
        return lambda *arguments, **how: self._off(operator, function, arguments, how)

    def _off(self, operator: str, function: Callable[..., Any], arguments: Any, how: dict[str, Any]) -> Any:
        value = function(*arguments, **how)
        several = value if isinstance(value, tuple) else (value,)
        if self._errors.predicting:
            n = _UNCERTAIN[operator]
            given = [certain(x) for x in arguments[:n]] + list(arguments[n:])
            predicted = getattr(self._forward, operator)(*given, **how)
            for one in predicted if isinstance(predicted, tuple) else (predicted,):
                self._errors.keep(one.variance)
            return value
        # In float32 a norm's root, or its mean, rounds as much as its products, and all of a row have it.
        shared = _OF_A_NORM if self._forward.dtype == "float32" and operator.endswith("_norm") else 0.0
        found = tuple(self._errors.made(x, shared) for x in several)
        return found if isinstance(value, tuple) else found[0]


class _Straying(Walk):
    """The exact walk, each gradient off by an error of its own. found: what arrived at each name."""

    def __init__(self, ar: Arithmetic, rules: Callable[[str], Backward], errors: _Errors, scale: float) -> None:
        super().__init__(ar)
        self.rules, self.errors, self.scale = rules, errors, scale
        self.found: dict[str, list[np.ndarray]] = {}

    def start(self) -> np.ndarray:
        return np.asarray(self.scale, np.float64)

    def back(
        self, step: Step, grads: list[Any], kept: tuple[Any, ...], needed: tuple[bool, ...], certain: bool
    ) -> list[np.ndarray | None]:
        values = list(step.backward(grads, kept, needed))
        if not step.operator or step.moves or step.operator == "add":
            return values
        if self.errors.predicting:
            incoming = [_certain(d) for d in grads]
            variances = self.rules(step.operator).back(step.operator, incoming, kept, step.how, needed)
            for value, variance in zip(values, variances, strict=False):
                if value is not None:
                    self.errors.keep(variance)
            return values
        return [None if value is None else self.errors.made(value) for value in values]

    def sum(self, before: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        if self.errors.predicting:
            self.errors.keep(self.rules("add").sum(_certain(before), _certain(gradient)).variance)
            return before + gradient
        return self.errors.made(before + gradient)

    def arrived(self, names: Collection[str], gradient: np.ndarray) -> np.ndarray:
        for name in names:
            self.found.setdefault(name, []).append(gradient)
        return gradient


def _certain(value: np.ndarray) -> Uncertain:
    return certain(value)


def end_to_end(
    model: Model,
    call: Pass,
    dtype: str,
    policy: Policy,
    rules: Callable[[str], Backward],
    *,
    runs: int = RUNS,
    factor: float = 1.0,
) -> dict[str, Uncertain]:
    """ "grad:" + name -> the exact gradient of every named value and tensor, and its variance for an implementation in
    `dtype` under `policy`, from its forward pass on. factor: what the predicted sigma of each operator is times."""
    ar, errors = exact_arithmetic(policy), _Errors(factor)
    forward = Propagation(dtype, policy, lambda _, x: x, lambda _: False)

    def once() -> Named:
        walk, plain = _Straying(ar, rules, errors, call.scale), _Disturbed(Operators(ar), forward, errors)
        tensors = walked(model, call, ar, plain.for_rows, walk, lambda _: None)
        found = {name: np.concatenate(parts) for name, parts in walk.found.items()}
        return found | {f"grad:{name}": gradient for name, gradient in tensors.items()}

    exact = once()
    squares = {name: np.zeros(np.shape(x)) for name, x in exact.items()}
    for seed in range(1, runs + 1):
        errors.begin(seed)
        for name, gradient in once().items():
            squares[name] += np.square(gradient - exact[name])
    return {name: Uncertain(value, squares[name] / runs) for name, value in exact.items()}
