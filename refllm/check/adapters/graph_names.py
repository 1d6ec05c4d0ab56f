"""Which values of a compiled graph are the named ones (`refllm.forward.taps`): by the modules that its nodes come from.

Exporters write into every node which module of the source it belongs to. What leaves a module is that module's value,
as a hook on its output would see it; what enters o_proj is the context, and so on. Rotated heads belong to no module:
they are what the product of the scores reads.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from refllm.config import ModelConfig
from refllm.forward.taps import HEAD_TAPS, axes_of_values, sizes_of_axes

Shape = tuple[int | None, ...]

_IN_A_MODEL = re.compile(r"(?:^|\.)((?:layers\.\d+(?:\..+)?|embed_tokens|norm|lm_head|score|qa_outputs)$)")
_INPUTS = {
    "self_attn.context": "self_attn.o_proj",
    "residual_mid": "post_attention_layernorm",
    "mlp.act": "mlp.down_proj",
}
"""What belongs to no module -> the module that it enters."""
_ROTATED = {"self_attn.q_rope": (0, "H"), "self_attn.k_rope": (1, "K")}
"""Which input of the product of the scores it is, and how many heads it has."""
_LAYER = re.compile(r"(model\.layers\.\d+)\.?(.*)")
_PRODUCTS = ("MatMul", "FusedMatMul")
_ATTENTION = ("Attention", "MultiHeadAttention", "ScaledDotProductAttention")
_LIKE = ("CastLike", "ConvertLike")
_SCALES = ("Mul", "Multiply", "Div", "Divide", "Cast", "Convert", *_LIKE)
_SIZES = ("Shape", "ShapeOf", "Size")
_REPEATS = ("Expand", "Broadcast", "Identity")
_MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", *_REPEATS, "Tile", "Concat", "Slice")


@dataclass(frozen=True)
class Node:
    """kind: the operator. inputs, outputs: names of values. path: of the module that it comes from, "" if unknown."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: str
    swaps: bool = False
    """A transposition of the last two axes."""


@dataclass(frozen=True)
class Graph:
    """nodes: in order of computation. shapes: of the values of floats, as far as known, None for what is not fixed.

    results: the names of what the graph returns. constants: the names of weights.
    """

    nodes: list[Node]
    shapes: Mapping[str, Shape]
    results: tuple[str, ...]
    constants: frozenset[str] = frozenset()

    @cached_property
    def made_by(self) -> dict[str, Node]:
        """The node that makes a value."""
        return {name: node for node in self.nodes for name in node.outputs}

    @cached_property
    def fixed(self) -> set[str]:
        """The constants, and what is made of them and of shapes alone, such as a scale."""
        found = {"", *self.constants}
        for node in self.nodes:
            given = node.inputs[:1] if node.kind in _LIKE else node.inputs
            if node.kind in _SIZES or found.issuperset(given):
                found.update(node.outputs)
        return found


def path_in_model(path: str) -> str:
    """A module's path as the vocabulary has it: "transformer.layers.0" and "layers.0" are "model.layers.0"; "" for what
    belongs to no part of a model."""
    found = _IN_A_MODEL.search(path.lstrip("."))
    if found is None:
        return ""
    return found[1] if found[1] in HEAD_TAPS.values() else f"model.{found[1]}"


def named_values(graph: Graph, config: ModelConfig, head: str) -> dict[str, str]:
    """Tap -> the name of its value, in order of computation, of those that can be identified. A context is what o_proj
    receives: [B, S, H*D]."""
    names, sizes = _Names(graph, sizes_of_axes(config, head)), sizes_of_axes(config, head)
    found = {}
    for tap, axes in axes_of_values(config, head).items():
        name = tap if tap in graph.made_by else names.of(tap, axes)  # a graph made by hand may use our names
        if name is not None:
            found[tap] = name
    last = HEAD_TAPS.get(head, "model.norm")
    if last not in found and (result := names.result(sizes["V"] if last == "lm_head" else None)) is not None:
        found[last] = result
    return found


class _Names:
    def __init__(self, graph: Graph, sizes: Mapping[str, int]) -> None:
        self.graph, self.sizes = graph, sizes
        self.within = {name: path_in_model(node.path) for name, node in graph.made_by.items()}
        self.readers: dict[str, list[str]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(path_in_model(node.path))
        self.by_module: dict[str, list[Node]] = {}
        for node in graph.nodes:
            path = path_in_model(node.path)
            while path:
                self.by_module.setdefault(path, []).append(node)
                path = path.rpartition(".")[0]

    def of(self, tap: str, axes: str) -> str | None:
        """The value that a tap names. axes: of `axes_of_values`."""
        layer = _LAYER.match(tap)
        at, short = (layer[1], layer[2]) if layer else ("", tap)
        if short in _ROTATED:
            return self.rotated(f"{at}.self_attn", *_ROTATED[short])
        width = None if axes.endswith(("T", "C")) else math.prod(self.sizes[axis] for axis in _last(axes))
        if short in _INPUTS:
            width = width if short != "self_attn.context" else self.sizes["H"] * self.sizes["D"]
            return self.entering(f"{at}.{_INPUTS[short]}", width)
        heads = next((self.sizes[axis] for axis in "HK" if axes.startswith(f"B {axis} ")), None)
        return self.leaving(tap, width, heads)

    def leaving(self, module: str, width: int | None, heads: int | None) -> str | None:
        """The last value that is made in a module and read outside of it. heads: how many it has to have; None: it is
        not split into them."""
        for node in reversed(self.by_module.get(module, [])):
            for name in node.outputs:
                fits = self._fits(name, width) and (heads is None or self._are_heads(name, heads))
                if fits and (name in self.graph.results or self._read_outside(name, module)):
                    return name
        return None

    def entering(self, module: str, width: int | None) -> str | None:
        """The first value that is read in a module and made outside of it."""
        for node in self.by_module.get(module, []):
            for name in node.inputs:
                if name in self.graph.fixed or _inside(self.within.get(name, module), module):
                    continue
                if self._fits(name, width) or self.graph.shapes.get(name, ())[-1:] == (None,):
                    return name
        return None

    def result(self, width: int | None) -> str | None:
        """What the graph returns, where no module says which value that is: "logits", or the only one that fits."""
        fitting = [name for name in self.graph.results if self._fits(name, width)]
        return next((name for name in fitting if name == "logits"), fitting[0] if len(fitting) == 1 else None)

    def rotated(self, attention: str, side: int, heads: str) -> str | None:
        """The heads that the scores are made of."""
        product = next(self._products(attention), None)
        return None if product is None else self._heads(product.inputs[side], self.sizes[heads])

    def _products(self, attention: str) -> Iterator[Node]:
        """The products that scores come of: what softmax goes back to, or attention in one operator."""
        nodes = self.by_module.get(attention, [])
        yield from (node for node in nodes if node.kind in _ATTENTION)
        for node in nodes:
            seen = [node] if node.kind == "Softmax" else []
            for before in seen:  # which grows
                if before.kind in _PRODUCTS:
                    yield before
                    break
                within = [name for name in before.inputs if _inside(self.within.get(name, ""), attention)]
                seen += [self.graph.made_by[name] for name in within]

    def _heads(self, name: str, heads: int) -> str | None:
        """Where the heads [B, heads, S, D] are that a product reads: before they were scaled, repeated, transposed."""
        node = self.graph.made_by.get(name)
        while node is not None:
            scaled = node.kind in _SCALES and (varying := self._varying(node)) is not None
            if not scaled and not node.swaps and self._are_heads(name, heads):
                return self._before_repeating(name, heads)
            if scaled:
                name = str(varying)
            elif node.kind in _MOVES:
                name = node.inputs[-1 if node.kind == "Concat" else 0]
            else:
                return None
            node = self.graph.made_by.get(name)
        return None

    def _before_repeating(self, name: str, heads: int) -> str:
        """The same heads where they are first: a compiler takes out what expands to the shape that there is."""
        node = self.graph.made_by[name]
        while node.kind in _REPEATS and self._are_heads(node.inputs[0], heads):
            name = node.inputs[0]
            if name not in self.graph.made_by:
                break
            node = self.graph.made_by[name]
        return name

    def _varying(self, node: Node) -> str | None:
        """The one input of a node that is not fixed, if there is one."""
        varying = [name for name in node.inputs if name not in self.graph.fixed]
        return varying[0] if len(varying) == 1 else None

    def _are_heads(self, name: str, heads: int) -> bool:
        shape = self.graph.shapes.get(name, ())
        return len(shape) == 4 and shape[1] in (heads, None) and shape[3] == self.sizes["D"]

    def _read_outside(self, name: str, module: str) -> bool:
        return any(not _inside(reader, module) for reader in self.readers.get(name, []))

    def _fits(self, name: str, width: int | None) -> bool:
        shape = None if name in self.graph.fixed else self.graph.shapes.get(name)
        return shape is not None and (width is None or shape[-1:] == (width,))


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _last(axes: str) -> list[str]:
    """ "B S (H D)" -> ["H", "D"]."""
    return axes.rstrip(")").rpartition("(")[2].split() if axes.endswith(")") else axes.split()[-1:]
