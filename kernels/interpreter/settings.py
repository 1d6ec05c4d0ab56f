"""What `interpreted()` checks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The arguments of `interpreted()`; see there."""

    bounds: bool | str = True
    overflow: bool = True
    races: bool = True
    poison: bool = True
    tf32: bool = True
    configs: str = "first"
