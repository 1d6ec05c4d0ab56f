"""JSON for every command that reports."""

import json
import math
from typing import Any

import numpy as np


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
