"""A function of JAX as a candidate, jitted or not. Needs `jax`.

    def forward(params, input_ids, attention_mask, position_ids, dtype) -> {"model.embed_tokens": x, ..., "lm_head": z}

It is pure: it names its values (`refllm.forward.taps`) by what it returns, so that they survive a compilation. The
logits may be called "logits" too. Parts of it may be dictionaries, as the intermediates of Flax are: "layers_0" in one
is layers.0, and "intermediates" and "__call__" are no names. What Flax captures of modules that have no value in the
vocabulary, as of a whole attention, is left out.

Its first argument, if it is called `params`, is a dictionary of the checkpoint's tensors, arrays of JAX in the dtype
asked for, by the names that they have in its files; else it is the checkpoint's folder. The next three are int32
[B, S]. The rest is as of every forward pass of somebody's own (`refllm.check.functions.Forward`): `dtype`,
`inputs_embeds`, and `cache` for one that returns (values, cache).
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refllm.check.adapters.graph_names import path_in_model
from refllm.check.functions import TAKES, Forward, FunctionCandidate, imported
from refllm.check.misbehaviour import misbehaves
from refllm.check.stacks import Opening
from refllm.check.taps import ALWAYS, Sink, is_array
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.forward.taps import HEAD_TAPS, axes_of_values
from refllm.storage.checkpoint import Checkpoint

_CALLED = "__call__"
_NO_NAMES = ("intermediates", _CALLED)
_NUMBERED = re.compile(r"(?<=[a-z])_(\d+)(?=\.|$)")


def open_candidate(opening: Opening) -> "JaxCandidate":
    """The function that FILE.PY:FUNCTION or module:function names."""
    if ":" not in opening.given:
        raise InputError(f"--candidate {opening.name} names no function: jax:FILE.PY:FUNCTION")
    return JaxCandidate(imported(opening.given), opening)


def wrap(function: Forward, opening: Opening) -> "JaxCandidate":
    """A function that was made by jax.jit."""
    if not callable(function):
        raise InputError(f"a {type(function).__name__} of JAX is no forward pass: expected a function of jax.jit")
    return JaxCandidate(function, opening)


class JaxCandidate(FunctionCandidate):
    """A pure function that returns its values."""

    def __init__(self, function: Forward, opening: Opening) -> None:
        import jax

        name = opening.given or getattr(function, "__name__", "")
        super().__init__(self._forward, opening.folder, head=opening.head, dtype=opening.dtype, name=f"jax {name}")
        self._function = function
        arguments = list(inspect.signature(function).parameters)
        self._takes_params = arguments[:1] == ["params"]
        self._params: dict[str, Any] = {}
        self.takes = (*ALWAYS, *(what for argument, what in TAKES.items() if argument in arguments))
        self.details = {"jax": jax.__version__, "device": str(jax.devices()[0])}

    def _forward(self, checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Sink, **more: Any) -> Any:
        """A call as `Forward` has it, handed to the function as it wants it."""
        import jax.numpy as jnp

        if more.get("inputs_embeds") is not None:
            more["inputs_embeds"] = jnp.asarray(more["inputs_embeds"], self.dtype)
        integers = (jnp.asarray(x, jnp.int32) for x in (ids, mask, positions))
        out = self._function(self._read(checkpoint) if self._takes_params else checkpoint, *integers, **more)
        values, cache = (out + (None, None))[:2] if isinstance(out, tuple) else (out, None)
        if is_array(values):
            return values, cache
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise misbehaves("result", f"it returns a {kind}; expected a dictionary of arrays by their names")
        known = axes_of_values(AutoConfig.from_pretrained(checkpoint), self.head)
        by_flax, own = dict[str, Any](), set[str]()
        for name, value, captured in _flat(values):
            if captured:
                by_flax[path_in_model(name)] = value
            else:
                name = HEAD_TAPS.get(self.head, name) if name == "logits" else name
                own.add(name)
                tap(name, value)
        for name, value in by_flax.items():
            if name in known and name not in own:  # the head may be a module, and what the function returns
                tap(name, value)
        return None, cache

    def _read(self, checkpoint: str) -> dict[str, Any]:
        import jax.numpy as jnp

        if not self._params:
            with Checkpoint.open(Path(checkpoint)) as file:
                self._params = {name: jnp.asarray(file.read(name)).astype(self.dtype) for name in file.names}
        return self._params


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(name, array, whether Flax captured it as what a module returns) of all that dictionaries in dictionaries hold.
    What Flax keeps is a tuple of one array per call."""
    for key, value in values.items():
        name = before if key in _NO_NAMES else f"{before}.{key}" if before else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield _NUMBERED.sub(r".\1", name), value, key == _CALLED
