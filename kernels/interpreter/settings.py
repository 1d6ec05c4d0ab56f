"""What `interpreted()` checks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The arguments of `interpreted()`; see there."""

    bounds: bool | str
    overflow: bool
    races: bool
    poison: bool
    tf32: bool
    configs: str
