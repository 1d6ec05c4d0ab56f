"""Runs a candidate on one call and writes down what it did. This is the part that runs in the candidate's process.

A call is made up to three times: plainly; for one row of the batch alone; and once more with everything changed that
the contract says nobody reads (masked keys, slots past a length, memory between elements and memory never written).
If the last differs from the first by a bit, the changes are tried one by one to say which of them was read. What was
returned is held meanwhile: a result that a later call overwrites was not the caller's. Where results of two calls lie
in one place, one more call, on other numbers, shows whether they are overwritten.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.inputs import to_numpy
from refllm.opcheck import inputs
from refllm.opcheck.autograd import BrokenError
from refllm.opcheck.poison import filled
from refllm.opcheck.without import refused
from refllm.parallel import one_blas_thread
from refllm.strategies.call import Call

_INTERPRETER = {
    "OutOfBoundsError": "bounds",
    "RaceError": "race",
    "IntegerOverflowError": "overflow",
    "UninitializedError": "unwritten",
    "ConfigurationsDifferError": "configurations",
}
"""What the interpreter raises, and the property that it breaks."""
_LARGEST = 1 << 26
"""Elements up to which a result is looked at; more have the wrong shape anyway."""
_NOTHING = np.zeros(0)


@dataclass(frozen=True)
class Task:
    """One call for the candidate. deep: also one row alone and the repetition. bitwise: the row alone must have the
    bits that it has in the batch. repeats: make the plain call so many times more and nothing else, to see whether one
    differs. configs: which configurations of an autotuned kernel are interpreted, "first" or "all". rows: those
    of the batch that are taken, all if None. Numbers and names only, to be sent to another process."""

    call: Call
    device: str
    arrays: str
    interpreted: bool
    policy: str
    deep: bool
    bitwise: bool
    repeats: int = 0
    configs: str = "first"
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Result:
    """One output. kind: what it is if not a dense tensor (an array, of a NumPy function), else "". view_of: the
    argument whose memory it shares."""

    value: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    device: str
    view_of: str = ""
    kind: str = ""

    @staticmethod
    def from_answer(values: dict[str, Any]) -> "Result":
        """The result that another process sent."""
        return Result(**values | {"shape": tuple(values["shape"])})


@dataclass(frozen=True)
class Observation:
    """What a candidate did. property, text: what it broke outright, "" if nothing. where: elements that show it.

    alone: (row, results) of one row by itself; row_alone: its number, if that run is the one that broke it.
    output: the number of the result that shows it. seconds: of its longest run.
    """

    property: str = ""
    text: str = ""
    results: tuple[Result, ...] = ()
    alone: tuple[int, tuple[Result, ...]] | None = None
    row_alone: int | None = None
    output: int = 0
    where: np.ndarray | None = None
    seconds: float = 0.0

    def to_answer(self) -> dict[str, Any]:
        """Plain values and arrays, for another process to read."""
        alone = None if self.alone is None else (self.alone[0], [vars(result) for result in self.alone[1]])
        return {**vars(self), "results": [vars(result) for result in self.results], "alone": alone}

    @staticmethod
    def from_answer(values: dict[str, Any]) -> "Observation":
        """What `to_answer` made."""
        alone = values["alone"]
        return Observation(
            **values
            | {
                "results": tuple(map(Result.from_answer, values["results"])),
                "alone": None if alone is None else (alone[0], tuple(map(Result.from_answer, alone[1]))),
            }
        )


class _Broken(Exception):
    def __init__(self, property: str, text: str, row_alone: int | None = None) -> None:
        super().__init__(text)
        self.property, self.text, self.row_alone = property, text, row_alone


Step = Callable[[str], None]


def observe(function: Callable[..., Any], task: Task, step: Step = lambda name: None) -> Observation:
    """See the module docstring. step: told before each run of the candidate."""
    run = _Run(function, task, step)
    results: tuple[Result, ...] = ()
    try:
        results = run()
        if task.repeats:
            return _repeated(run, results)
        if not task.deep:
            return Observation(results=results, seconds=run.longest)
        alone = run.alone()
        again = run(filling=1, padding=True, unread=True)
        overwritten = run.overwritten()
        if overwritten is not None:
            output, where = overwritten
            text = f"{_count(where)} of the result: a later call overwrites what an earlier one returned"
            return Observation("reuse", text, results, output=output, where=where, seconds=run.longest)
        different = _different(results, again)
        if different is not None:
            return _why(run, results, different)
        further = run.further()
        if further is not None:
            return Observation(*further, results, seconds=run.longest)
        return Observation(results=results, alone=alone, seconds=run.longest)
    except _Broken as broken:
        return Observation(broken.property, broken.text, results, None, broken.row_alone, seconds=run.longest)


def _repeated(run: "_Run", results: tuple[Result, ...]) -> Observation:
    """The call with the same inputs whose results are others than those of the rest."""

    def found(text: str, output: int = 0, where: np.ndarray | None = None) -> Observation:
        text = f"wrong now and then: {text}, same inputs"
        return Observation("determinism", text, results, output=output, where=where, seconds=run.longest)

    last, odd = run.task.repeats + 1, None
    for n in range(2, last + 1):
        right = "call 1" if n == 2 else f"calls 1 to {n - 1}"
        try:
            again = run()
        except _Broken as broken:
            return found(f"{right} right, {n} {broken.text}")
        different = _different(results, again)
        if different is not None and n == 2:
            results, odd = again, different
        elif different is not None:
            return found(f"{right} right, {n} wrong", *different)
    return Observation(results=results) if odd is None else found(f"call 1 wrong, calls 2 to {last} right", *odd)


def _why(run: "_Run", results: tuple[Result, ...], different: tuple[int, np.ndarray]) -> Observation:
    """Which of the changes the candidate felt, one by one."""

    def found(property: str, text: str, again: tuple[int, np.ndarray]) -> Observation:
        return Observation(property, text, results, output=again[0], where=again[1], seconds=run.longest)

    again = _different(results, run())
    if again is not None:
        return found("determinism", f"{_count(again[1])} of the result: it changes from run to run on one input", again)
    again = _different(results, run(filling=1))
    if again is not None:
        text = f"{_count(again[1])} of the result: it changes with what memory held that nobody wrote"
        return found("unwritten", text + _masked_off(run.task), again)
    again = _different(results, run(padding=True))
    if again is not None:
        names = " and ".join(run.padded)
        return found("invariance", f"what lies between the elements of {names} changes the result", again)
    again = _different(results, run(unread=True))
    phrases = " and ".join(run.unread) or "memory that the contract does not read"
    return found("invariance", f"what {phrases} hold changes the result", again or different)


def _masked_off(task: Task) -> str:
    """Which load of an interpreted kernel masked lanes off without `other`, as a clause; "" for none."""
    if not task.interpreted:
        return ""
    from refllm.kernels.interpreter.memory import MASKED_OFF

    loads = [f"the tl.load of `{name}` at {place}" for name, place in MASKED_OFF.items()]
    return f"; {' and '.join(loads)} has a mask and no `other`" if loads else ""


def _count(where: np.ndarray) -> str:
    n = int(where.sum())
    return "1 element" if n == 1 else f"{n} elements"


def _different(a: tuple[Result, ...], b: tuple[Result, ...]) -> tuple[int, np.ndarray] | None:
    """The first output that differs by a bit, and where; None if none does."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x.value.shape != y.value.shape or x.value.dtype != y.value.dtype:
            return i, np.ones(x.value.shape, bool)
        where = np.asarray(~inputs.same_bits(x.value, y.value))  # of a single number NumPy makes no array
        if where.any():
            return i, where
    return None


class _Run:
    """Calls the candidate on new inputs. padded, unread: what was changed in the last run that changed something.
    longest: seconds of the longest run."""

    def __init__(self, function: Callable[..., Any], task: Task, step: Step) -> None:
        self.function, self.task, self.step = function, task, step
        self.padded: list[str] = []
        self.unread: list[str] = []
        self.longest = 0.0
        self._held: list[tuple[tuple[Any, ...], tuple[Result, ...]]] = []

    def __call__(self, *, filling: int = 0, padding: bool = False, unread: bool = False) -> tuple[Result, ...]:
        call = self.task.call
        arguments, keywords = inputs.make(call, self.task.device, self.task.arrays)
        if self.task.rows is not None:
            arguments, keywords = inputs.rows_alone(call, arguments, keywords, slice(*self.task.rows))
        tensors = inputs.named(call, arguments, keywords)
        if padding:
            self.padded = inputs.change_padding(tensors) or self.padded
        if unread:
            self.unread = inputs.change_unread(call, tensors) or self.unread
        before = {name: inputs.memory(x) for name, x in tensors.items()}
        out = self._call(arguments, keywords, filling)
        modified = [name for name, x in tensors.items() if not _same_memory(inputs.memory(x), before[name])]
        if modified:
            what = "inputs" if len(modified) > 1 else "input"
            raise _Broken("purity", f"it changes its {what} {', '.join(modified)}")
        return self._hold(out, self._results(out, tensors))

    def alone(self) -> tuple[int, tuple[Result, ...]] | None:
        """A row of the batch by itself."""
        call = self.task.call
        row = inputs.row_for_itself(call)
        if row < 0 or inputs.rows_of(call) < 2:
            return None
        arguments, keywords = inputs.row_alone(call, *inputs.make(call, self.task.device, self.task.arrays), row)
        try:
            out = self._call(arguments, keywords, 0)
        except _Broken as broken:
            raise _Broken(broken.property, f"row {row} computed alone: {broken.text}", row) from None
        return row, self._hold(out, self._results(out, {}))

    def further(self) -> tuple[str, str] | None:
        """What else a candidate of its kind has to keep, and does not (`refllm.opcheck.autograd`)."""
        ask = getattr(self.function, "further", None)
        if ask is None:
            return None
        with _no_grad(self.task), _interpreter(self.task, 1):
            found: tuple[str, str] | None = ask(lambda: inputs.make(self.task.call, self.task.device, self.task.arrays))
        return found

    def overwritten(self) -> tuple[int, np.ndarray] | None:
        """The first result of an earlier call that is not what it was, and where; None if there is none."""
        found = self._changed()
        if found is None and self._in_one_place():
            arguments, keywords = inputs.other_numbers(*inputs.make(self.task.call, self.task.device, self.task.arrays))
            with contextlib.suppress(_Broken):  # nobody asked for a call on those numbers
                self._call(arguments, keywords, 0)
            found = self._changed()
        return found

    def _hold(self, out: tuple[Any, ...], results: tuple[Result, ...]) -> tuple[Result, ...]:
        if self.task.deep:
            self._held.append((out, results))
        return results

    def _changed(self) -> tuple[int, np.ndarray] | None:
        for out, results in self._held:
            now = tuple(_result(x, {}, self.task.arrays) for x in out)
            different = _different(results, now)
            if different is not None and different[1].any():
                return different
        return None

    def _in_one_place(self) -> bool:
        """Whether results of two calls share memory."""
        places = [{p for x in out for p in [_memory_of(x)] if p} for out, _ in self._held]
        return any(a & b for i, a in enumerate(places) for b in places[:i])

    def _results(self, out: tuple[Any, ...], tensors: dict[str, Any]) -> tuple[Result, ...]:
        try:
            return tuple(_result(x, tensors, self.task.arrays) for x in out)
        except Exception as error:  # tensors that cannot be read are of many kinds
            raise _Broken("result", f"what it returns cannot be read: {type(error).__name__}: {error}"[:300]) from None

    def _call(self, arguments: Sequence[Any], keywords: dict[str, Any], filling: int) -> tuple[Any, ...]:
        self.step("run")
        begin = time.monotonic()
        try:
            memory = filled(filling, self.task.arrays, self.function)
            with _no_grad(self.task), memory, _interpreter(self.task, filling):
                out = self.function(*arguments, **keywords)
            if self.task.device != "cpu":
                import torch

                torch.cuda.synchronize()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise _Broken(_property(error), _sentence(error, self.task.call.operator)) from None
        finally:
            self.longest = max(self.longest, time.monotonic() - begin)
        return tuple(out) if isinstance(out, tuple | list) else (out,)


def _memory_of(x: Any) -> int:
    """Where the memory of a result begins that its owner got; 0 for what has none."""
    if hasattr(x, "untyped_storage"):
        try:
            return int(x.untyped_storage().data_ptr()) if x.numel() else 0
        except (RuntimeError, NotImplementedError):  # sparse tensors and their like
            return 0
    if not isinstance(x, np.ndarray) or not x.size:
        return 0
    while isinstance(x.base, np.ndarray):
        x = x.base
    return int(x.__array_interface__["data"][0])


def _no_grad(task: Task) -> Any:
    if task.arrays == "numpy":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@contextlib.contextmanager
def _interpreter(task: Task, filling: int) -> Iterator[None]:
    if not task.interpreted:
        yield
        return
    from refllm import kernels
    from refllm.kernels.interpreter.memory import MASKED_OFF

    if filling == 0:
        MASKED_OFF.clear()
    # Its own filling tells what a kernel reads before anybody wrote it; the second run wants another. Its products are
    # those of a tile.
    how = {"poison": filling == 0, "configs": task.configs if filling == 0 else "first"}
    with kernels.interpreted(**how), one_blas_thread():
        yield


def _same_memory(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    import torch

    return (a is None and b is None) or torch.equal(a, b)


def _property(error: BaseException) -> str:
    if isinstance(error, BrokenError):
        return error.property
    return next((_INTERPRETER[c.__name__] for c in type(error).__mro__ if c.__name__ in _INTERPRETER), "raises")


def _sentence(error: BaseException, operator: str) -> str:
    """The error in one line, the line of code that raised it, and what arguments the candidate should take."""
    lines = str(error).strip().splitlines()
    if isinstance(error, BrokenError):
        return lines[0]
    said = f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if type(error).__name__ in _INTERPRETER or type(error).__module__.startswith("refllm") or not frames:
        return said + refused(operator, error, not frames)
    last = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    return f"{said} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})" + refused(operator, error, False)


def _result(x: Any, tensors: dict[str, Any], arrays: str) -> Result:
    """What came back as one output, whatever it is. tensors: the inputs, of which it may be a view."""
    if arrays == "numpy" and isinstance(x, np.ndarray | np.generic):
        return _array_result(np.asarray(x), tensors)
    if arrays == "torch" and hasattr(x, "data_ptr"):
        return _tensor_result(x, tensors)
    module = type(x).__module__
    name = type(x).__name__ if module == "builtins" else f"{module.partition('.')[0]}.{type(x).__name__}"
    return Result(_NOTHING, (), "", "", kind=name)


def _array_result(x: np.ndarray, tensors: dict[str, Any]) -> Result:
    view = next((name for name, t in tensors.items() if x.size and np.shares_memory(x, t)), "")
    narrow = x.dtype.kind == "V" or x.dtype.name in ("bfloat16", "float16")
    value = x.astype(np.float32) if narrow else x.copy()
    readable = x.size <= _LARGEST and value.dtype.kind in "biuf"  # others are refused by their dtype
    return Result(value if readable else _NOTHING, x.shape, x.dtype.name, "cpu", view)


def _tensor_result(x: Any, tensors: dict[str, Any]) -> Result:
    dtype, layout = str(x.dtype).removeprefix("torch."), str(x.layout).removeprefix("torch.")
    if x.is_nested or layout != "strided":
        return Result(_NOTHING, (), dtype, x.device.type, kind="nested tensor" if x.is_nested else f"{layout} tensor")
    shape = tuple(int(n) for n in x.shape)
    if x.device.type == "meta" or x.numel() > _LARGEST:
        return Result(_NOTHING, shape, dtype, str(x.device))
    place = x.untyped_storage().data_ptr()
    shared = (name for name, t in tensors.items() if t.untyped_storage().data_ptr() == place)
    view = next(shared, "") if x.numel() else ""
    value = _NOTHING if x.is_complex() else np.array(to_numpy(x))
    return Result(value, shape, dtype, x.device.type, view)
