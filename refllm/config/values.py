"""Readers of single config values: each takes what JSON gave and returns the Python value, or says what is wrong.

Transformers 5 checks types strictly (an int where a float belongs is an error, and the reverse). Published files are
not that strict, so a value is converted where nothing is lost: 4096.0 is the integer 4096, 1 is the float 1.0, and 0
and 1 are flags. Anything else raises `ConfigError` with one sentence that names the file, the field and the value.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

from refllm.errors import ConfigError
from refllm.storage.json_text import show

MAX_SIZE = 2**31 - 1
"""Upper limit of every size and length: tensor dimensions and token ids of all known files lie far below it."""

MAX_DEPTH = 50
"""Upper limit of nesting: real files nest two levels, and Python's own copying and printing fails at some hundreds."""


def warn(message: str) -> None:
    """Report what is accepted but looks like a mistake."""
    warnings.warn(message, UserWarning, stacklevel=3)


def check_depth(source: str, name: str, value: Any) -> None:
    """Refuse a value that is nested deeper than MAX_DEPTH. Raises ConfigError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise ConfigError(f"{source}: the value of {name} is nested deeper than {MAX_DEPTH} levels")


def read_int(source: str, name: str, value: Any, minimum: int = -MAX_SIZE, maximum: int = MAX_SIZE) -> int:
    """An integer in [minimum, maximum]; integral floats are converted. Raises ConfigError."""
    is_integral = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_integral:
        raise ConfigError(f"{source}: {name}={show(value)} must be an integer")
    if not minimum <= value <= maximum:
        raise ConfigError(f"{source}: {name}={show(value)} must be an integer from {minimum} to {maximum}")
    return int(value)


def read_size(source: str, name: str, value: Any) -> int:
    """A dimension, count or length: an integer of at least 1. Raises ConfigError."""
    return read_int(source, name, value, minimum=1)


def read_float(source: str, name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """A finite number in [minimum, maximum]; integers are converted. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{source}: {name}={show(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{source}: {name}={show(value)} must be a finite number")
    if number < minimum:
        raise ConfigError(f"{source}: {name}={show(value)} must be at least {minimum:g}")
    if number > maximum:
        raise ConfigError(f"{source}: {name}={show(value)} must be at most {maximum:g}")
    return number


def read_bool(source: str, name: str, value: Any) -> bool:
    """A flag; the integers 0 and 1 are converted. Raises ConfigError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral) and value in (0, 1):
        return bool(value)
    if type(value).__name__ == "bool" and type(value).__module__ == "numpy":
        return bool(value)
    raise ConfigError(f"{source}: {name}={show(value)} must be true or false")


def read_str(source: str, name: str, value: Any) -> str:
    """A string. Raises ConfigError."""
    if not isinstance(value, str):
        raise ConfigError(f"{source}: {name}={show(value)} must be a string")
    return value


def read_choice(source: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of the given strings. Raises ConfigError, which lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{source}: {name}={show(value)} is not one of {', '.join(choices)}")
    return value
