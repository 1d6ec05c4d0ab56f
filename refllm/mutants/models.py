"""A catalogue of defects, each of which can be planted in one layer of a Transformers model.

They are the mistakes that ports of decoder models make: every one is named after what is wrong, knows the models in
which it changes anything, and the named values (`refllm.forward.taps`) of which one must be reported. `source` is a
public report of such a defect, where there is one. The check is held to this list by `refllm.mutants.validation`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from refllm.config import ModelConfig
from refllm.mutants.attention import ATTENTION
from refllm.mutants.blocks import BLOCK, HEAD, MLP, NORM
from refllm.mutants.planting import Plant
from refllm.mutants.rotary import ROPE


@dataclass(frozen=True)
class Mutant:
    """One defect.

    area: norm, rope, attention, mlp, block or head. taps: the names of which one must be reported first, inside the
    layer ("" is the layer itself) or, for what is outside the layers, in full. applies: whether it changes anything in
    a model of this config. dtype: in which its effect is above the rounding of plain inputs. attention: what the model
    must run. equivalent:
    why its effect cannot be wrong, "" if it can.
    """

    name: str
    area: str
    taps: tuple[str, ...]
    plant: Plant
    applies: Callable[[ModelConfig], bool] = lambda config: True
    source: str = ""
    dtype: str = "bfloat16"
    attention: str = "eager"
    equivalent: str = ""

    def planted(self, model: Any, layer: int) -> AbstractContextManager[None]:
        """The defect is in `model`, a Transformers model, while the context is open."""
        return self.plant(model, layer)

    def reported_at(self, layer: int) -> tuple[str, ...]:
        """Full names of the values that may be reported first."""
        outside = self.taps[0] in OUTSIDE
        return self.taps if outside else tuple(f"model.layers.{layer}.{tap}".rstrip(".") for tap in self.taps)


OUTSIDE = ("model.norm", "lm_head")
"""Values that belong to no layer."""


def catalogue() -> list[Mutant]:
    """Every mutant, area by area."""
    areas = {"norm": NORM, "rope": ROPE, "attention": ATTENTION, "mlp": MLP, "block": BLOCK, "head": HEAD}
    return [Mutant(name=name, area=area, **entry) for area, part in areas.items() for name, entry in part.items()]
