"""What a judgement consists of, as JSON and arrays, and back: every number is the same to the last bit.

Only the classes that are listed are made again of what a file says, and nothing else of a file is executed.
"""

import base64
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from refllm.accuracy.measure import Measure
from refllm.accuracy.parts import Parts
from refllm.accuracy.profiles import Profile
from refllm.accuracy.propagation import Uncertain
from refllm.accuracy.recognise import Recognition
from refllm.check.record import Record
from refllm.check.tap_report import TapReport

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (Measure, Parts, Profile, Recognition, Record, TapReport, Uncertain)
}
_LISTS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def packed(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value for JSON; its arrays are added to `arrays`, by the names that stand in their places."""
    if isinstance(value, np.ndarray):
        name = f"array.{len(arrays):06d}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        return {"is": type(value).__name__} | {f.name: packed(getattr(value, f.name), arrays) for f in fields(value)}
    if isinstance(value, dict):
        return {"dict": [[packed(key, arrays), packed(item, arrays)] for key, item in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        items = value if isinstance(value, tuple) else sorted(value)
        return {type(value).__name__: [packed(item, arrays) for item in items]}
    if isinstance(value, list):
        return [packed(item, arrays) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(type(value).__name__)


def unpacked(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `packed` was given. Raises LookupError, TypeError or ValueError for what it did not make."""
    if isinstance(value, list):
        return [unpacked(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "dict" in value:
        return {unpacked(key, arrays): unpacked(item, arrays) for key, item in value["dict"]}
    if "is" in value:
        return _CLASSES[value["is"]](**{k: unpacked(item, arrays) for k, item in value.items() if k != "is"})
    ((kind, items),) = value.items()
    return _LISTS[kind](unpacked(item, arrays) for item in items)


def as_text(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays for a JSON file: their dtype, their shape, and their bytes in base64."""
    return {
        name: [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]
        for name, value in arrays.items()
    }


def of_text(texts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that `as_text` was given. Raises ValueError or TypeError for what it did not make."""
    return {
        name: np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape, text) in texts.items()
    }
