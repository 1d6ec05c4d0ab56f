"""A catalogue of defects and of places, each of which can be planted in a Transformers model.

Defects are the mistakes that ports of decoder models make. Places are roundings that honest code may do elsewhere than
Transformers: they hold unless a policy was named. Every one is named after what is wrong, knows the models in
which it changes anything, and the named values (`refllm.forward.taps`) of which one must be reported. `source` is a
public report of it, where there is one. The check is held to this list by `refllm.mutants.validation`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from refllm.config import ModelConfig
from refllm.mutants.attention import ATTENTION, WINDOW
from refllm.mutants.blocks import BIASES, BLOCK, HEAD, MLP, NORM
from refllm.mutants.planting import Plant
from refllm.mutants.rotary import ROPE


@dataclass(frozen=True)
class Mutant:
    """One defect or place.

    area: norm, rope, attention, mlp, block or head. taps: the names of which one must be reported first, inside the
    layer ("" is the layer itself) or, for what is outside the layers, in full. applies: whether it changes anything in
    a model of this config. dtype: in which its effect is above the rounding of plain inputs. attention: what the model
    must run. equivalent: why its effect cannot be wrong, "" if it can. place: for a rounding that honest code may do,
    the words by one of which a report says so; () for a defect. splits: of how many parts products are then the sum,
    which has to be said.
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
    place: tuple[str, ...] = ()
    splits: int = 1

    def planted(self, model: Any, layer: int) -> AbstractContextManager[None]:
        """The defect is in `model`, a Transformers model, while the context is open."""
        return self.plant(model, layer)

    @property
    def kind(self) -> str:
        """defect, place or equivalent."""
        return "equivalent" if self.equivalent else "place" if self.place else "defect"

    @contextmanager
    def everywhere(self, model: Any) -> Iterator[None]:
        """The same in every layer, as code has it that rounds elsewhere."""
        with ExitStack() as stack:
            for layer in range(model.config.num_hidden_layers):
                stack.enter_context(self.plant(model, layer))
            yield

    def reported_at(self, layer: int) -> tuple[str, ...]:
        """Full names of the values that may be reported first."""
        outside = self.taps[0] in OUTSIDE
        return self.taps if outside else tuple(f"model.layers.{layer}.{tap}".rstrip(".") for tap in self.taps)


OUTSIDE = ("model.norm", "lm_head")
"""Values that belong to no layer."""


_AREAS = {"norm": NORM, "rope": ROPE, "attention": ATTENTION, "mlp": MLP, "block": BLOCK, "head": HEAD}


def catalogue() -> list[Mutant]:
    """Every mutant of the families that refllm knows, area by area."""
    return _made(_AREAS)


def of_own_pages() -> list[Mutant]:
    """Every mutant, and those of what pages from outside have: a window of keys, biases in three projections."""
    return _made({**_AREAS, "attention": ATTENTION | WINDOW, "block": BLOCK | BIASES})


def _made(areas: dict[str, dict[str, dict[str, Any]]]) -> list[Mutant]:
    return [Mutant(name=name, area=area, **entry) for area, part in areas.items() for name, entry in part.items()]
