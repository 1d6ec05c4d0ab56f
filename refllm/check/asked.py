"""What somebody said of a candidate before it was checked: where it rounds, and what it does on purpose."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from refllm.errors import InputError
from refllm.precision import Policy


@dataclass(frozen=True)
class Asked:
    """policy: where it has to round; None: wherever honest code may. splits: of how many products of parts, each
    rounded, its products with o_proj and down_proj are the sums (a model split over devices). tf32: whether its float32
    products keep 11 bits of the factors. Either is `incomplete` where it is found and was not said.

    kinds: of the products with a weight from a GGUF file, their names -> how it is stored, which says what else they
    may read than their input (`refllm.accuracy.readings`)."""

    policy: Policy | None = None
    splits: int = 1
    tf32: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
