"""The rotated queries and keys of a torch module, where a function of its files or a part of it makes them."""

import difflib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from refllm.check.adapters.torch_names import Place, template
from refllm.errors import InputError

Show = Callable[[str, Any, Callable[[Any], Any]], None]
"""(name, tensor, view): the value is view(tensor), and its gradient view(that of the tensor)."""


class Rotations:
    """Sees what rotates queries and keys, both in one call or one in each. What makes another shape than it is given
    rotates nothing.

    show: told the name, a tensor, and how to read it. heads: of queries, and of keys.
    """

    def __init__(self, show: Show, places: dict[str, Place], heads: tuple[int, int]) -> None:
        self.show, self.places, self.heads = show, places, heads
        self.attention, self.inside = "", False
        self.missing: list[str] = []
        self.tokens = 1
        self.memory: dict[str, int] = {}

    def projected(self, attention: str, letter: str) -> Callable[..., None]:
        """A hook for the projection of the queries or the keys, after which they are rotated."""

        def hook(_module: Any, _args: Any, out: Any) -> None:
            value = tensors_of(out)[0]
            if attention != self.attention:
                self.attention, self.missing, self.memory = attention, ["q", "k"], {}
            self.tokens = math.prod(value.shape[:-1])
            self.memory[letter] = value.untyped_storage().data_ptr()

        return hook

    @contextmanager
    def watched(self, module: Any, names: tuple[str, ...]) -> Iterator[None]:
        """A context in which these functions of the files of the module's classes, and these parts, are watched."""
        files = [vars(sys.modules[name]) for name in {type(part).__module__ for part in module.modules()}]
        functions = [(file, name, file[name]) for file in files for name in names if callable(file.get(name))]
        parts = [part for path, part in module.named_modules() if path in names or template(path) in names]
        with ExitStack() as stack:
            stack.callback(setattr, self, "attention", "")
            for file, name, original in functions:
                file[name] = self._watched(original)
                stack.callback(file.__setitem__, name, original)
            for part in parts:
                see = lambda _, args, kwargs, out: self._see((*args, *kwargs.values()), out)  # noqa: E731
                stack.callback(part.register_forward_hook(see, with_kwargs=True).remove)
            yield

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            outermost, self.inside = not self.inside, True
            try:
                out = original(*args, **kwargs)
            finally:
                self.inside = not outermost
            if outermost:
                self._see((*args, *kwargs.values()), out)
            return out

        return watched

    def _see(self, given: tuple[Any, ...], out: Any) -> None:
        sources, turned = tensors_of(given), tensors_of(out)
        of_shape = [next((s for s in sources if s.shape == value.shape), None) for value in turned]
        if not 1 <= len(turned) <= len(self.missing) or None in of_shape:
            return
        letters = self._letters(of_shape, turned)
        for letter, value in zip(letters, turned, strict=True):
            self.missing.remove(letter)
            name = f"{self.attention}.{letter}_rope"
            if name not in self.places:
                order = in_order(self.places.get(f"{self.attention}.{letter}_proj"), value.shape[-1])
                self.show(name, value, functools.partial(_ordered, order=order))

    def _letters(self, sources: list[Any], turned: list[Any]) -> list[str]:
        """Which of them are queries: by their memory, which is still that of the projection, by the number of heads,
        or by the order of the calls."""
        H, K = self.heads
        if len(turned) == 2:
            return ["q", "k"]
        pointer = sources[0].untyped_storage().data_ptr()
        of = [letter for letter in self.missing if self.memory.get(letter) == pointer]
        if len(of) == 1:
            return of
        heads = turned[0].numel() // (self.tokens * turned[0].shape[-1])
        by_heads = [letter for letter, n in (("q", H), ("k", K)) if n == heads and letter in self.missing]
        return by_heads[:1] or self.missing[:1]


def must_rotate(names: tuple[str, ...], module: Any, where: str) -> None:
    """Raises InputError for a name that no function of the files of the module's classes and no part of it has."""
    parts = {path for name, _ in module.named_modules() for path in (name, template(name))}
    functions = {
        n for part in module.modules() for n, f in vars(sys.modules[type(part).__module__]).items() if callable(f)
    }
    for name in names:
        if name not in parts | functions:
            close = difflib.get_close_matches(name, sorted(parts | functions), 3, 0.5)
            meant = f"; there are {', '.join(map(repr, close))}" if close else ""
            raise InputError(f"{where}: rotation: the module has no part, and its files no function, {name!r}{meant}")


def tensors_of(values: Any) -> list[Any]:
    """The tensors of floats among arguments or results."""
    values = values if isinstance(values, tuple | list) else (values,)
    return [value for value in values if hasattr(value, "is_floating_point") and value.is_floating_point()]


def _ordered(x: Any, order: np.ndarray | None) -> Any:
    return x if order is None else x[..., order]


def in_order(projection: Place | None, width: int) -> np.ndarray | None:
    """[width] int: which of the rotated dims of a head is each of the page's; None if they are in order.

    A projection whose rows are permuted within heads (as in files of Meta's own layout) makes heads with permuted dims.
    """
    if projection is None or projection.channels is None or len(projection.channels) % width:
        return None
    heads = projection.channels.reshape(-1, width)
    within = heads - heads.min(axis=1, keepdims=True)
    if (within != within[0]).any() or (np.sort(within[0]) != np.arange(width)).any():
        return None
    return None if (within[0] == np.arange(width)).all() else within[0]
