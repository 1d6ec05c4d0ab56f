"""Values as JSON: for every command that reports, and for every message that shows what a file holds."""

import json
import math
import reprlib
from typing import Any

import numpy as np

_SHORT = reprlib.Repr()
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 4
_SHORT.maxstring = _SHORT.maxother = 60


def json_text(values: Any, *, ascii_only: bool = False) -> str:
    """Indented standard JSON of nested dicts, lists, tuples and NumPy values; NaN and infinities become null."""
    return json.dumps(_plain(values), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def show(value: Any) -> str:
    """The value as config.json spells it, shortened where it is long or nested."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "an integer of thousands of digits"
