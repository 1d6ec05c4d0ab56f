"""What somebody said of a candidate before it was checked: where it rounds, what it does on purpose, and how much of it
is to be looked at."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from refllm.errors import InputError
from refllm.precision import Policy


@dataclass(frozen=True)
class Layers:
    """The layers first .. stop - 1. stop: None is the end of the model, with its norm and its head."""

    first: int = 0
    stop: int | None = None

    @property
    def all(self) -> bool:
        """Whether nothing is left out."""
        return self == ALL_LAYERS

    def within(self, layers: int) -> "Layers":
        """The same of a model of so many layers. Raises InputError where it has none of them."""
        if self.first >= layers or (self.stop is not None and self.stop > layers):
            raise InputError(f"--layers {self}: the model has {layers} layers, 0 to {layers - 1}")
        return Layers(self.first, None if self.stop == layers else self.stop)

    @staticmethod
    def of(text: str | None) -> "Layers":
        """Those of "A:B", "A:" or ":B". Raises InputError for what is none of these."""
        found = re.fullmatch(r"(\d*):(\d*)", text or ":")
        first, stop = ("", "") if found is None else found.groups()
        if found is None or (stop and int(stop) <= int(first or 0)):
            raise InputError(f"--layers {text}: expected A:B, the layers from A on and before B, such as 0:4 or 20:")
        return Layers(int(first or 0), int(stop) if stop else None)

    def __str__(self) -> str:
        return f"{self.first}:{'' if self.stop is None else self.stop}"


ALL_LAYERS = Layers()


@dataclass(frozen=True)
class Asked:
    """policy: where it has to round; None: wherever honest code may. splits: of how many products of parts, each
    rounded, its products with o_proj and down_proj are the sums (a model split over devices). tf32: whether its float32
    products keep 11 bits of the factors. Either is `incomplete` where it is found and was not said.

    kinds: of the products with a weight from a GGUF file, their names -> how it is stored, which says what else they
    may read than their input (`refllm.accuracy.readings`).

    layers: those that are judged. last: how many positions at the end of every row are; None: all."""

    policy: Policy | None = None
    splits: int = 1
    tf32: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    layers: Layers = ALL_LAYERS
    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise InputError(f"--last {self.last}: expected how many positions, 1 or more")
        if self.splits < 1:
            raise InputError(f"--splits {self.splits}: expected the number of parts, 1 or more")

    @property
    def name(self) -> str | None:
        """The policy's name."""
        return None if self.policy is None else self.policy.name

    @classmethod
    def of(cls, given: "Asked | Policy | None") -> "Asked":
        """What was given, which may be a policy alone."""
        return given if isinstance(given, Asked) else cls(given)
