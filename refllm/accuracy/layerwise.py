"""A walk through some layers of a page only: what comes before stands ready, and what comes after is left out.

A page is written as one loop, and does not know of this. Where it is not to be computed, operators return `NOTHING`,
whatever they are given, and read no weight.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

from refllm.accuracy.propagation import Uncertain

_LAYER = re.compile(r"model\.layers\.(\d+)")
EMBEDDING = "model.embed_tokens"


class _Nothing:
    """What an operator returns that is passed over. shape: for a page that counts heads."""

    shape = (1, 1, 1, 1)

    def __getitem__(self, index: Any) -> "_Nothing":
        return self

    def map(self, view: Any) -> "_Nothing":
        return self


NOTHING = _Nothing()


def border(layers: int) -> str:
    """The name of the stream after so many layers."""
    return f"model.layers.{layers - 1}" if layers else EMBEDDING


class InLayers:
    """The operators `op` of a page, for the layers first .. stop - 1. start: the stream before them; None: the page
    begins with its tokens, and first is 0. stop: None is the end of the page, with its norm and its head. reached: told
    how many layers are behind it, and the stream there."""

    def __init__(
        self,
        op: Any,
        first: int = 0,
        start: Uncertain | None = None,
        stop: int | None = None,
        reached: Callable[[int, Uncertain], None] = lambda layers, x: None,
    ) -> None:
        self.op, self.first, self.start, self.stop, self.reached = op, first, start, stop, reached

    def within(self, scope: str) -> Any:
        found = _LAYER.fullmatch(scope)
        if found is None or self._has(int(found[1])):
            return self.op.within(scope)
        return _PassedOver()

    def tap(self, name: str, x: Any) -> Any:
        found = _LAYER.fullmatch(name)
        layers = int(found[1]) + 1 if found else 0 if name == EMBEDDING else None
        if layers is not None and self.start is not None and layers == self.first:
            return self.start
        if x is NOTHING or (layers is not None and self.start is not None and layers < self.first):
            return NOTHING
        x = self.op.tap(name, x)
        if layers is not None:
            self.reached(layers, x)
            if layers == self.stop:
                return NOTHING
        return x

    def _has(self, layer: int) -> bool:
        return self.first <= layer and (self.stop is None or layer < self.stop)

    def __getattr__(self, name: str) -> Any:
        known = getattr(self.op, name)
        if not inspect.isroutine(known):
            return known

        def operator(*inputs: Any, **how: Any) -> Any:
            if any(x is NOTHING for x in inputs):
                return (NOTHING, NOTHING) if name == "rope" else NOTHING
            return known(*inputs, **how)

        return operator


class _PassedOver:
    """The operators of a layer that is passed over."""

    def within(self, scope: str) -> "_PassedOver":
        return self

    def rope(self, *inputs: Any, **how: Any) -> Any:
        return NOTHING, NOTHING

    def __getattr__(self, name: str) -> Any:
        return lambda *inputs, **how: NOTHING
