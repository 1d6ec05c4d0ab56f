"""What `refllm bench tune` can choose between: of each kernel the classes of shapes, a call of each, and candidates.

A kernel file says it in its `TUNABLE`. The call is made from the record of its operator and the sizes of a published
layer (`refllm.kernels.calls`). On the meta device it is compiled; on a GPU it runs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch

from refllm.errors import InputError
from refllm.kernels import calls
from refllm.kernels.launch import Launch
from refllm.kernels.targets import TARGETS, Target
from refllm.kernels.tuning.table import entries
from refllm.ops.contracts import contract_of

SMALL = {"S": 144, "N": 304, "V": 992, "E": 992}
"""Sizes of a small call: over one tile by a few. A remainder by 16 is added to them, so that the class stays."""


ROWS = 16
"""Up to so many rows of a product are a step of decoding, whose speed is that of reading the matrix."""
STEPS = (3, 4)
"""Stages where every step waits for copies: in two they would have to arrive within one step."""
HELD = 160
"""Sums per thread: with more of them the addresses and operands do not fit into its 255 registers beside them."""


@dataclass(frozen=True)
class Call:
    """A call of an operator on one class of shapes.

    work: whether products decide its speed; else it is bytes or instructions that do.
    """

    operator: str
    arguments: list[Any]
    keywords: dict[str, Any]
    work: bool


@dataclass(frozen=True)
class Tunable:
    """One kernel of the table.

    kernel: its file. operator: one that it computes.
    shapes: classes, as its `shape_class` names them, with the sizes of the call that stands for each: by axis, of one
        sequence unless B says more. row is an E that the class depends on; interleaved is 0 or 1.
    fields: of its tile, with the values worth trying; a field that is not among them is that size of the call.
    only: of some classes fewer: in float32 products become single multiplications, and large tiles endless code.
    outer, inner: fields that say how often an operand of a product is read again, from memory and from shared memory.
    sums: sizes and fields of the accumulators of its products.
    streamed: fields and constants whose product is what one step reads of the large operand (weights, keys, logits);
        none if a program reads all that it needs at once.
    about: which of the launches of a call the tiles are of.
    """

    kernel: str
    operator: str
    shapes: dict[str, dict[str, int]]
    fields: dict[str, tuple[int, ...]]
    only: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    outer: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()
    sums: tuple[tuple[str, str], ...] = ()
    about: int = 0

    @property
    def module(self) -> Any:
        return import_module(f"refllm.kernels.triton.{self.kernel}")

    def dtype(self, shape: str) -> torch.dtype:
        """bfloat16, or float32 where the class says so."""
        return torch.float32 if shape == "float32" else torch.bfloat16

    def make(self, shape: str, source: calls.Source, small: bool = False) -> Call:
        """The call that stands for a class, or a small one of it, as the definition can compute."""
        sizes = self.shapes[shape]
        if small:
            sizes = {
                name: size if size <= SMALL.get(name, size) else SMALL[name] + size % 16 for name, size in sizes.items()
            }
        known = contract_of(self.operator)
        given: dict[str, Any] = {name: words[-1] for name, words in known.choices.items()}
        given["interleaved"] = bool(sizes.get("interleaved", False))
        n = {"B": 1, "H": 1, "K": 1, **sizes, "E": sizes.get("row", sizes.get("E", 0))}
        arguments, keywords = calls.call(self.operator, n, source, bias=not known.product, **given)
        return Call(self.operator, arguments, keywords, known.product and n["S"] > ROWS)

    def launch(self, call: Call, target: Target, tile: Any) -> tuple[Launch, Any]:
        """The launch that the tile is about, and everything that `plan` returned."""
        from refllm.kernels.triton import plan

        planned = plan(call.operator, call.arguments, call.keywords, target=target, tile=tile)
        first = planned[0]
        return (first if isinstance(first, Launch) else first[self.about]), planned

    def candidates(self, shape: str, target: Target) -> list[Any]:
        """Every tile worth trying for a class: on AMD in 2 stages, since copies there pass through registers."""
        sizes, kind = self.shapes[shape], self.module.Tile
        fields = {**self.fields, **self.only.get(shape, {}), **({"stages": (2,)} if target.is_amd else {})}
        values = (fields.get(name) or (sizes[name],) for name in kind._fields)
        tiles = [kind(*each) for each in itertools.product(*values)]
        return [tile for tile in tiles if self._sums_per_thread(shape, tile, target) <= HELD]

    def _sums_per_thread(self, shape: str, tile: Any, target: Target) -> float:
        """Those that live as long as the loop over the products does; 0 without products."""
        sizes = {"warps": 1, **self.shapes[shape], **tile._asdict()}
        sums = sum(prod(sizes[name] for name in names) for names in self.sums)
        return sums / (sizes["warps"] * target.warp_size)

    def near(self, shape: str, target: Target) -> list[Any]:
        """The tile of the table first, then the candidates that differ from it in one or two fields; all without it."""
        entry = entries().get((self.kernel, shape, target.name))
        if entry is None:
            return self.candidates(shape, target)
        now = self.module.Tile(**entry.tile)
        differ = [
            (sum(a != b for a, b in zip(each, now, strict=True)), each) for each in self.candidates(shape, target)
        ]
        return [now, *(each for count, each in differ if 1 <= count <= 2)]


@cache
def tunables() -> dict[str, Tunable]:
    """What the kernel files say of their tiles (`TUNABLE`), by the name of the file."""
    from refllm.kernels.triton import BACKWARD_KERNELS, KERNELS

    return {file.TUNABLE.kernel: file.TUNABLE for file in (*KERNELS, *BACKWARD_KERNELS)}


def tunable(kernel: str) -> Tunable:
    """The kernel of that name. Raises InputError for another."""
    if kernel not in tunables():
        raise InputError(f"--kernel {kernel!r} is no kernel; use one of {', '.join(tunables())}")
    return tunables()[kernel]


@cache
def meta_call(kernel: str, shape: str) -> Call:
    """The call of a class without any memory, to be compiled."""
    each = tunable(kernel)
    return each.make(shape, calls.Source(each.dtype(shape), "meta", 0))


def everything() -> Iterator[tuple[Tunable, str, Target]]:
    """Every class of every kernel on every target."""
    for each in tunables().values():
        for target in TARGETS.values():
            for shape in each.shapes:
                yield each, shape, target
