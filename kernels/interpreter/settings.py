"""What `interpreted()` checks, and how it is said on a command line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refllm.kernels.interpreter.errors import KernelError

CHOICES: dict[str, tuple[bool | str, ...]] = {
    "bounds": (True, False, "view"),
    "overflow": (True, False),
    "races": (True, False),
    "poison": (True, False),
    "masked": ("nan", "zero"),
    "tf32": (True, False),
    "configs": ("first", "all"),
}
"""What each setting may be; the first is what it is when nothing is said."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `interpreted()`; see there. Raises KernelError for a value that is none of CHOICES."""

    bounds: bool | str
    overflow: bool
    races: bool
    poison: bool
    masked: str
    tf32: bool
    configs: str

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or (value == choice and isinstance(value, str)) for choice in choices):
                raise KernelError(f"interpreted: {name}={value!r}; expected {_listed(choices, repr)}")


def read(texts: Iterable[str]) -> dict[str, bool | str]:
    """Settings as typed, `races=false` or `bounds=view`, by name. Raises KernelError for what is none."""
    found: dict[str, bool | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in CHOICES:
            raise KernelError(f"{text!r} is no setting; write NAME=VALUE with {_listed(tuple(CHOICES), str)} as NAME")
        spelled: dict[str, bool | str] = {str(choice).lower(): choice for choice in CHOICES[name]}
        if value.lower() not in spelled:
            raise KernelError(f"{text!r}: {name} is {_listed(tuple(spelled), str)}")
        found[name] = spelled[value.lower()]
    return found


def _listed(choices: tuple[Any, ...], said: Any) -> str:
    words = [said(choice).replace("'", '"') for choice in choices]
    return f"{', '.join(words[:-1])} or {words[-1]}"
