"""What the runtimes of compiled graphs have in common: inputs by their names, named values as further results."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.check.stacks import Opening
from refllm.check.taps import Sink, cannot_run
from refllm.check.unseen import EMBEDDING
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.precision import rounding

OF_TOKENS = ("input_ids", "attention_mask", "position_ids")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")
_PROBE = 8  # tokens

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """An input of a graph. shape: None for what is not fixed. dtype: of NumPy."""

    shape: tuple[int | None, ...]
    dtype: str

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape can be given."""
        return len(shape) == len(self.shape) and all(n in (None, m) for n, m in zip(self.shape, shape, strict=True))


class GraphCandidate:
    """A graph in a file, with inputs as exporters call them: input_ids and, where there are such, attention_mask,
    position_ids, past_key_values.N.key and .value, which are fed what came as present.N.key and .value.

    A subclass computes (`outputs`). computes_in: the dtype of the file. values: tap -> the name of its value.
    """

    def __init__(self, file: Path, opening: Opening, computes_in: str, wanted: Mapping[str, Wanted]) -> None:
        self.file, self.dtype, self.computes_in = file, opening.dtype, computes_in
        self.config: Any = AutoConfig.from_pretrained(opening.folder)
        self.values: dict[str, str] = {}
        self._wanted = wanted
        self._cache = {name: f"present.{found[1]}.{found[2]}" for name in wanted if (found := _PAST.match(name))}
        if "input_ids" not in wanted:
            raise InputError(f"{file} takes no input_ids, but {', '.join(wanted) or 'nothing'}: no language model")
        if more := sorted(set(wanted) - set(OF_TOKENS) - set(self._cache)):
            raise InputError(
                f"{file} takes {', '.join(more)}, of which nothing is known; expected {', '.join(OF_TOKENS)}, "
                "past_key_values.N.key and .value"
            )

    @property
    def takes(self) -> tuple[str, ...]:
        """See `refllm.check.taps.EVERYTHING`."""
        return tuple(self._takes())

    def outputs(self, names: list[str], given: Arrays, fed: tuple[str, np.ndarray] | None = None) -> Arrays:
        """Values by their names, and no more computed than they need. fed: a value that is given, not computed."""
        raise NotImplementedError

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises InputError for inputs that the file's fixed shapes do not fit."""
        if reason := cannot_run(self, inputs):
            raise InputError(f"{self.name}: {inputs.label}: {reason}")
        shown = {inputs.until: self.values[inputs.until]} if inputs.until in self.values else self.values
        presents = list(self._cache.values()) if inputs.chunks else []
        past = self._nothing(len(inputs.input_ids))
        for piece in inputs.pieces():
            given, fed = self._given(inputs, piece) | past, None
            if inputs.feeds_embeddings:
                fed = self.values[EMBEDDING], self._embedded(given, inputs, piece)
            names = [name for name in (*shown.values(), *presents) if fed is None or name != fed[0]]
            found = self.outputs(list(dict.fromkeys(names)), given, fed) | dict([fed] if fed else [])
            for tap, name in shown.items():
                sink(tap, self._in_heads(found[name]) if tap.endswith(".context") else found[name])
            past |= {name: found[present] for name, present in self._cache.items() if present in found}

    def probe(self) -> Arrays:
        """A few tokens, to see what two graphs make of them."""
        B, S = (n or m for n, m in zip(self._wanted["input_ids"].shape, (1, _PROBE), strict=True))
        ids = np.resize(np.arange(self.config.vocab_size), (B, S))
        return self._given(Inputs(ids), slice(0, S)) | self._nothing(B)

    def _takes(self) -> Iterator[str]:
        of_tokens = {"mask": "attention_mask", "positions": "position_ids"}
        yield from (word for word, name in of_tokens.items() if name in self._wanted)
        if self._wanted["input_ids"].shape[0] != 1:
            yield "batch"
        if self._cache:
            yield "cache"
        if EMBEDDING in self.values:
            yield "embeddings"

    def _given(self, inputs: Inputs, piece: slice) -> Arrays:
        arrays = (inputs.input_ids[:, piece], inputs.mask[:, : piece.stop], inputs.positions[:, piece])
        return {n: self._fitted(n, a) for n, a in zip(OF_TOKENS, arrays, strict=True) if n in self._wanted}

    def _fitted(self, name: str, array: np.ndarray) -> np.ndarray:
        wanted = self._wanted[name]
        if not wanted.fits(array.shape):
            shape = " x ".join("any" if n is None else str(n) for n in wanted.shape)
            raise InputError(
                f"{self.file}: {name} is fixed to {shape}, and {' x '.join(map(str, array.shape))} is to be run: "
                "export it with dynamic shapes, or give as many --ids"
            )
        return np.ascontiguousarray(array, wanted.dtype)

    def _nothing(self, rows: int) -> Arrays:
        """No keys or values yet."""
        shape = rows, self.config.num_key_value_heads, 0, self.config.head_dim
        return {name: np.zeros(shape, self._wanted[name].dtype) for name in self._cache}

    def _embedded(self, given: Arrays, inputs: Inputs, piece: slice) -> np.ndarray:
        """The embeddings to feed, on the grid of the dtype."""
        name = self.values[EMBEDDING]
        rows = self.outputs([name], given)[name]
        whole = inputs.embedded(lambda _: np.asarray(rows, np.float32))
        embeds = np.asarray(whole if inputs.embeds is None else whole[:, piece])
        return np.asarray(rounding(self.computes_in)(embeds), rows.dtype)

    def _in_heads(self, merged: np.ndarray) -> np.ndarray:
        """[B, S, H*D] -> [B, H, S, D]."""
        return merged.reshape(*merged.shape[:2], self.config.num_attention_heads, -1).transpose(0, 2, 1, 3)

    name: str
    details: dict[str, str]


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """What to say of the results of the graph that is checked beside those of the file as it is."""
    off = max(float(np.abs(np.float64(theirs[name]) - ours[name]).max(initial=0)) for name in theirs)
    return "which gives the same to the bit" if off == 0 else f"which gives something else, by up to {off:.2g}"
