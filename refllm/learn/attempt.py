"""Runs an answer on the designed calls, in a process of its own, with a limit of time."""

import linecache
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm import apart
from refllm.extras import require
from refllm.learn import guard
from refllm.learn.exercise import Exercise, Given

SECONDS = 20.0
"""How long an answer may take for all of its calls."""
_LINES, _WIDTH = 12, 200
"""What is shown of what an answer prints: so many lines, and so much of each."""
NOT_BEGUN, CHANGES = "not begun", "changes"
_UNWRITTEN = "yours to write"


@dataclass(frozen=True)
class Trouble:
    """What came before any numbers. kind: "not begun", "refused", "syntax", "raises", "hangs", "form" (the result has
    another form), "changes" (an argument was changed), "misnamed" (of a bug). text: one sentence. line: of the file, 0
    if not known. call: the number of the designed call, -1 where it was none."""

    kind: str
    text: str
    line: int = 0
    call: int = -1


@dataclass(frozen=True)
class Attempt:
    """What an answer gave. results: by the number of the designed call. drawn: of the calls that are only drawn.
    troubles: in the order in which they came. bug: what the file says in BUG. printed: what the answer printed, its
    first lines."""

    results: dict[int, tuple[np.ndarray, ...]]
    drawn: dict[int, tuple[np.ndarray, ...]]
    troubles: tuple[Trouble, ...]
    bug: str = ""
    printed: str = ""


def attempt(exercise: Exercise, path: Path, seconds: float = SECONDS, forked: bool = True) -> Attempt:
    """Runs the file. forked: in a process of its own; else in this one, as tests do, which trust what they run. Raises
    MissingExtraError for an exercise in Triton where that is not installed."""
    if exercise.uses_triton:
        require(f"the exercise {exercise.name}", "torch", "triton")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return Attempt({}, {}, (Trouble("syntax", f"{path.name} is no UTF-8 text"),))
    except OSError as error:
        return Attempt({}, {}, (Trouble("syntax", f"{path.name} cannot be read: {error.strerror}"),))
    if source.split() == exercise.skeleton.split():
        return Attempt({}, {}, (Trouble(NOT_BEGUN, "nothing is written yet"),))
    try:
        tree = guard.read(source, exercise.function, _packages(exercise))
    except SyntaxError as error:
        return Attempt({}, {}, (Trouble("syntax", f"{error.msg}", error.lineno or 0),))
    except (ValueError, RecursionError) as error:  # RefusedError, or bytes that are no text
        kind = "refused" if isinstance(error, guard.RefusedError) else "syntax"
        return Attempt({}, {}, (Trouble(kind, str(error), getattr(error, "line", 0)),))

    def work() -> dict[str, Any]:
        return _run(exercise, path, tree)

    if not forked:
        return _attempt(work())
    if exercise.uses_triton:
        import torch  # noqa: F401  (a fork keeps what is imported before it)
        import triton  # noqa: F401
    parts: list[bytes] = []
    found = apart.run(work, seconds, parts.append)
    printed = _first_lines(b"".join(parts).decode("utf-8", "replace"))
    if isinstance(found, apart.Ended):
        kind = "raises" if found.in_time else "hangs"
        return Attempt({}, {}, (Trouble(kind, f"your code gave no answer: {found.text}"),), printed=printed)
    return replace(_attempt(found), printed=printed)


def _first_lines(text: str) -> str:
    lines = text.rstrip().splitlines()
    more = [f"... and {len(lines) - _LINES} lines more"] if len(lines) > _LINES else []
    return "\n".join([line[:_WIDTH] for line in lines[:_LINES]] + more)


def _packages(exercise: Exercise) -> tuple[str, ...]:
    return guard.TRITON_PACKAGES if exercise.uses_triton else guard.PACKAGES


def _attempt(found: dict[str, Any]) -> Attempt:
    def arrays(key: str) -> dict[int, tuple[np.ndarray, ...]]:
        return {int(n): tuple(np.asarray(x) for x in results) for n, results in found[key]}

    troubles = tuple(Trouble(*values) for values in found["troubles"])
    return Attempt(arrays("results"), arrays("drawn"), troubles, found["bug"])


def _run(exercise: Exercise, path: Path, tree: Any) -> dict[str, Any]:
    linecache.checkcache(str(path))  # Triton reads the text of a kernel again
    troubles: list[list[Any]] = []
    found: dict[str, Any] = {"results": [], "drawn": [], "troubles": troubles, "bug": ""}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(np.errstate(all="ignore"))
        if exercise.uses_triton:
            from refllm.kernels import interpreted

            stack.enter_context(interpreted(tf32=False))
            stack.enter_context(guard.torch_asked(path, exercise.torch_may))
        try:
            space = guard.run_module(path, tree, _packages(exercise))
        except (Exception, SystemExit) as error:
            troubles.append(_raised(error, path, -1))
            return found
        found["bug"] = str(space.get("BUG", ""))
        function = space.get(exercise.function)
        if not callable(function):
            troubles.append(["form", f"{path.name} has no function {exercise.function}", 0, -1])
            return found
        for key, calls in (("results", exercise.given), ("drawn", exercise.drawn)):
            for n, call in enumerate(calls):
                results, trouble = _one(exercise, function, call, path, n)
                if trouble and key == "results":
                    troubles.append(trouble)
                if results is not None:
                    found[key].append([n, results])
                if trouble and trouble[0] in (NOT_BEGUN, "refused"):
                    return found
    return found


def _one(
    exercise: Exercise, function: Callable[..., Any], call: Given, path: Path, n: int
) -> tuple[list[np.ndarray] | None, list[Any] | None]:
    """(results, trouble) of one call."""
    values, _ = call.arrays()
    given = _tensors(values) if exercise.uses_triton else values
    try:
        out = function(*given)
    except (Exception, SystemExit) as error:
        return None, _raised(error, path, n)
    parts = list(out) if isinstance(out, tuple) else [out]
    names = list(exercise.outputs)
    if len(parts) != len(names) or any(part is None for part in parts):
        wanted = f"{len(names)} results ({', '.join(names)})" if len(names) > 1 else "one array"
        return None, ["form", f"{exercise.function} returned {_kind(out)}; {wanted} would be right", 0, n]
    try:
        results = [np.asarray(_array(part), np.float64) for part in parts]
    except (TypeError, ValueError):
        return None, ["form", f"{exercise.function} returned {_kind(out)}, which is no array of numbers", 0, n]
    for name, x, y in zip(names, results, exercise.expected(call), strict=True):
        if x.shape != y.shape:
            said = f"{name} has the shape {list(x.shape)}; {list(y.shape)} would be right ({_shapes(values)})"
            return None, ["form", said, 0, n]
    changed = [i for i, (a, b) in enumerate(zip(call.values, given, strict=True)) if _differs(a, b)]
    if changed:
        said = f"argument {changed[0] + 1} of {exercise.function} was changed by the call: work on a copy of it"
        return results, [CHANGES, said, 0, n]
    return results, None


def _tensors(values: Sequence[Any]) -> list[Any]:
    import torch

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return torch.from_numpy(np.array(x)).to(torch.float32 if x.dtype.kind == "f" else torch.int64)

    return [tensor(x) for x in values]


def _array(x: Any) -> Any:
    return x.detach().numpy() if hasattr(x, "detach") else x


def _differs(before: Any, after: Any) -> bool:
    if not isinstance(before, np.ndarray):
        return False
    now = np.asarray(_array(after), np.float64)
    wanted = before.astype(np.float32) if now.dtype != before.dtype or hasattr(after, "detach") else before
    return before.shape != now.shape or not np.array_equal(wanted.astype(np.float64), now, equal_nan=True)


def _kind(out: Any) -> str:
    if out is None:
        return "nothing (None)"
    if isinstance(out, tuple):
        return f"{len(out)} results"
    return f"a {type(out).__name__}"


def _shapes(values: Sequence[Any]) -> str:
    return "inputs " + ", ".join(str(list(x.shape)) if isinstance(x, np.ndarray) else f"{x}" for x in values)


def _raised(error: BaseException, path: Path, n: int) -> list[Any]:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = lines[-1] if lines else 0
    if isinstance(error, NotImplementedError) and _UNWRITTEN in str(error):
        return [NOT_BEGUN, "nothing is written yet", line or 0, n]
    if isinstance(error, guard.RefusedError):
        return ["refused", str(error), error.line or line or 0, n]
    if isinstance(error.__cause__, guard.RefusedError):
        return ["refused", str(error.__cause__), line or 0, n]
    if isinstance(error, SystemExit):
        return ["raises", f"it ends the program, with {error.code!r}", line or 0, n]
    text = " ".join(str(error).split()) or "without a word"
    return ["raises", f"{type(error).__name__}: {text}"[:600], line or 0, n]
