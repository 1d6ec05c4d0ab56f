"""What a candidate does that no forward pass may do: a finding about the candidate, and no error of the check."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.apart import in_one_line, place
from refllm.check.taps import as_numpy, is_array, wide
from refllm.errors import RefllmError


@dataclass(frozen=True)
class Misbehaviour:
    """kind: "raises", "crashes" (it ends the process), "hangs", "purity" (it changes its inputs) or "result".

    text: one sentence without a full stop, in which the place is named. file, line: of whose code did it; "" and 0
    where there is none.
    """

    kind: str
    text: str
    file: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        """The kind in words."""
        words = {"purity": "changes its inputs", "crashes": "ends the process", "result": "what it returns"}
        return words.get(self.kind, self.kind)


class MisbehavesError(RefllmError):
    """A candidate misbehaved. found: how."""

    def __init__(self, found: Misbehaviour, candidate: str = "") -> None:
        super().__init__(f"{candidate}: {found.text}" if candidate else found.text)
        self.found = found


class EnoughError(BaseException):
    """Ends the run of a candidate that has shown what was asked for (`Inputs.until`). No Exception, which a candidate
    may catch."""


def misbehaves(kind: str, text: str) -> MisbehavesError:
    """The error to raise for what has no place."""
    return MisbehavesError(Misbehaviour(kind, text))


def raised(error: BaseException, when: str = "") -> MisbehavesError:
    """What a candidate raised. when: " when it is imported", or "" for a call."""
    said, file, line = in_one_line(error)
    at = f" ({place(file, line)})" if file else ""
    if isinstance(error, SystemExit):
        return MisbehavesError(Misbehaviour("crashes", f"it ends the process{when}: {said}{at}", file, line))
    return MisbehavesError(Misbehaviour("raises", f"it raises {said}{when}{at}", file, line))


def floats(name: str, value: Any) -> np.ndarray:
    """The value of a tap as an array of its own. Raises MisbehavesError for what is no array or tensor of floats.

    Of a tuple with one array in it, as layers return them, the array is taken.
    """
    if isinstance(value, tuple) and sum(map(is_array, value)) == 1:
        value = next(filter(is_array, value))
    if not is_array(value):
        kind = "nothing (None)" if value is None else f"a {type(value).__name__}"
        raise misbehaves("result", f"{name} is {kind}; expected an array or a tensor of floats")
    try:
        array = as_numpy(value)
    except Exception as error:  # tensors that cannot be read are of many kinds
        raise misbehaves("result", f"{name} cannot be read: {in_one_line(error)[0]}") from None
    if "float" not in array.dtype.name:
        raise misbehaves("result", f"{name} is {array.dtype.name}; expected float32, bfloat16, float16 or float64")
    return wide(array)


def must_not_have_changed(given: dict[str, np.ndarray], copies: dict[str, np.ndarray]) -> None:
    """Raises MisbehavesError if an array that a candidate was given is not what it was."""
    changed = [name for name, value in given.items() if not np.array_equal(value, copies[name])]
    if changed:
        what = "inputs" if len(changed) > 1 else "input"
        raise misbehaves("purity", f"it changes its {what} {', '.join(changed)} in place; work on a copy")
