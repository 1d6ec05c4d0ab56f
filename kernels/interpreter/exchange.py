"""Attributes that are others for a while, and put back in the end."""

from typing import Any

_MISSING = object()


class Exchange:
    """What was exchanged, in order. `undo` puts back all of it, the last first."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Makes `owner.name` be `value`."""
        self._before.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts back what was there, or nothing where there was nothing."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
