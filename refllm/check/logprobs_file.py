"""Log-probabilities of tokens as a program writes them down, or hands them over (docs/recording.md)."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from refllm.check.inputs import Inputs
from refllm.errors import CheckpointError, InputError
from refllm.precision.dtype_names import dtype_name
from refllm.storage import input_file
from refllm.storage.json_text import show
from refllm.storage.safetensors_format import read_header

_ARRAYS = {"ids", "input_ids", "logprobs", "mask", "attention_mask", "temperature"}
_ABOUT = ("temperature", "source", "dtype")


@dataclass(frozen=True)
class LogProbs:
    """What one program says of the tokens of some sequences.

    ids [B, S], padded on the right. logprobs [B, S]: float64, of each token given those before it; NaN where none is
    said, as of the first token of a sequence and of padding. lengths: of the sequences. temperatures: by which the
    logits of each were divided. dtypes: in which it computed each, "" where nobody says.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    lengths: tuple[int, ...]
    temperatures: tuple[float, ...]
    source: str
    dtypes: tuple[str, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a safetensors file, or JSON lines with one sequence in each.

        Raises InputError, naming the file, for anything else.
        """
        path = Path(path)
        try:
            if not os.path.exists(path):
                raise InputError("no such file")
            rows = list(_of_safetensors(path) if path.suffix == ".safetensors" else _of_lines(path))
            return cls._of_rows(rows, path.name)
        except (CheckpointError, InputError) as error:
            raise InputError(f"--logprobs {path}: {str(error).removeprefix(f'{path}: ')}") from None
        except OSError as error:
            raise InputError(f"--logprobs {path}: {error.strerror or error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"--logprobs {path}: not readable ({error})") from None

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str = "arrays") -> Self:
        """Take arrays, or lists, by the names that a file has them under: ids [B, S], logprobs [B, S], perhaps mask
        [B, S]; and temperature (a number, or [B]), source and dtype. name: the source, where there is none.

        Raises InputError for other names and shapes.
        """
        try:
            strange = next((key for key in values if key not in _ARRAYS and key not in _ABOUT), None)
            if strange is not None:
                raise InputError(f"{show(strange)} is unknown; expected {', '.join(sorted(_ARRAYS | set(_ABOUT)))}")
            arrays = {key: _numbers(value) for key, value in values.items() if key in _ARRAYS}
            return cls._of_rows(list(_rows(arrays, {key: values[key] for key in _ABOUT if key in values})), name)
        except InputError as error:
            raise InputError(f"log-probabilities: {error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"log-probabilities: not readable ({error})") from None

    @classmethod
    def _of_rows(cls, rows: "list[_Row]", name: str) -> Self:
        if not rows or not all(len(row.ids) for row in rows):
            raise InputError("it holds no tokens, or a sequence without any")
        longest = max(len(row.ids) for row in rows)
        ids, logprobs = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), np.nan)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            logprobs[i, 1 : len(row.ids)] = row.said[1:]
        temperatures = tuple(float(row.about.get("temperature", 1.0)) for row in rows)
        wrong = next((t for t in temperatures if not 0 < t < math.inf), None)
        if wrong is not None:
            raise InputError(f"temperature is {wrong:g}; expected a number above 0")
        if not np.isfinite(logprobs).any() and not np.isinf(logprobs).any():
            raise InputError("it says no log-probability of any token that comes after another")
        sources = list(dict.fromkeys(str(row.about.get("source", name)) for row in rows))
        if len(sources) > 1:
            raise InputError(f"its sources are {show(sources[0])} and {show(sources[1])}; use two files")
        lengths = tuple(len(row.ids) for row in rows)
        dtypes = tuple(dtype_name(str(row.about.get("dtype", ""))) for row in rows)
        return cls(ids, logprobs, lengths, temperatures, sources[0], dtypes)

    @property
    def said(self) -> np.ndarray:
        """[B, S]: where there is a log-probability to judge."""
        return ~np.isnan(self.logprobs)

    @property
    def inputs(self) -> Inputs:
        """The run that they are of."""
        mask = (np.arange(self.ids.shape[1]) < np.array(self.lengths)[:, None]).astype(np.int64)
        return Inputs(self.ids, None if mask.all() else mask, label="log-probabilities")

    def alike(self) -> dict[tuple[str, float], list[int]]:
        """The sequences of which anything is said, by dtype and temperature, of which each is judged by itself."""
        found: dict[tuple[str, float], list[int]] = {}
        for i, key in enumerate(zip(self.dtypes, self.temperatures, strict=True)):
            if self.said[i].any():
                found.setdefault(key, []).append(i)
        return found

    def part(self, sequences: list[int]) -> Self:
        """Some of the sequences."""
        longest = max(self.lengths[i] for i in sequences)
        of = lambda values: tuple(values[i] for i in sequences)  # noqa: E731
        ids, logprobs = self.ids[sequences, :longest], self.logprobs[sequences, :longest]
        return type(self)(ids, logprobs, of(self.lengths), of(self.temperatures), self.source, of(self.dtypes))


@dataclass(frozen=True)
class _Row:
    """One sequence: ids [S] and log-probabilities [S]. about: its temperature, source and dtype, where said."""

    ids: np.ndarray
    said: np.ndarray
    about: dict[str, Any]


def _of_safetensors(path: Path) -> Iterator[_Row]:
    from safetensors import safe_open

    input_file.must_be_regular(path)
    with open(path, "rb") as raw:
        infos, about = read_header(raw, str(path))
    with safe_open(str(path), framework="numpy") as file:
        values = {name: file.get_tensor(name) for name in infos if name in _ARRAYS}
    return _rows(values, {key: about[key] for key in _ABOUT if key in about})


def _of_lines(path: Path) -> Iterator[_Row]:
    text = input_file.read_text(path)
    input_file.count_values(text)
    for i, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {i + 1} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"line {i + 1} holds {show(values)}, not an object of ids and logprobs")
        arrays = {key: _numbers(value) for key, value in values.items() if key in _ARRAYS}
        yield from _rows(arrays, {key: values[key] for key in _ABOUT if key in values})


def _numbers(value: Any) -> np.ndarray:
    """An array, a list of JSON, or of such lists; None is NaN."""
    if not isinstance(value, (list, tuple)) and np.asarray(value).dtype != object:  # another library's too
        return np.asarray(value)
    found = np.array(value, object)
    return np.where(found == None, np.nan, found).astype(np.float64)  # noqa: E711 (element by element)


def _rows(values: dict[str, np.ndarray], about: dict[str, Any]) -> Iterator[_Row]:
    """Every sequence without padding. about: of all of them."""
    ids, said = values.get("ids", values.get("input_ids")), values.get("logprobs")
    if ids is None or said is None:
        raise InputError("expected ids [B, S] and logprobs [B, S], of each token given those before it")
    ids, said = np.atleast_2d(ids), np.atleast_2d(said).astype(np.float64)
    mask = np.atleast_2d(values.get("mask", values.get("attention_mask", np.ones(ids.shape)))) != 0
    if ids.ndim != 2 or said.shape != ids.shape or mask.shape != ids.shape:
        raise InputError(
            f"ids {list(ids.shape)}, logprobs {list(said.shape)}, mask {list(mask.shape)}: expected [B, S]"
        )
    whole = ids[mask].astype(np.int64)
    if not np.array_equal(whole, ids[mask]) or (whole < 0).any():
        raise InputError("ids: expected integers from 0 on")
    if (said[mask] > 0).any():
        raise InputError(f"logprobs: {said[mask].max():g} is above 0, so it is no log-probability")
    if _has_holes(mask):
        raise InputError("mask: there is padding inside a sequence; it may stand at either end")
    if "temperature" in values:
        if values["temperature"].size not in (1, len(ids)):
            raise InputError(f"temperature {list(values['temperature'].shape)}: expected one number, or [{len(ids)}]")
        temperatures = np.broadcast_to(values["temperature"].ravel(), len(ids))
        about = {key: value for key, value in about.items() if key != "temperature"}
        each = [{**about, "temperature": float(t)} for t in temperatures]
    else:
        each = [about] * len(ids)
    for row, of_row, at, which in zip(ids, said, mask, each, strict=True):
        yield _Row(row[at].astype(np.int64), of_row[at], which)


def _has_holes(mask: np.ndarray) -> bool:
    first, last = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return bool((mask.sum(axis=1) != np.where(mask.any(axis=1), last - first, 0)).any())
