"""The weights that a candidate really has, where they are not those of the checkpoint: a quantised engine is right if
it computes with its own weights as it should. What its format costs is another question, which has its own figures.

`--weights F` names them; a forward pass may hand them over as it runs, by tap("weights.<tensor>", array).
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from refllm.accuracy.limits import ANOTHER_TENSOR, OF_ONE_ROUNDING, OF_THE_SMALLEST, STEPS_OF_A_ROW
from refllm.check.inputs import Inputs
from refllm.check.next_tokens import compare_tokens
from refllm.check.taps import as_array
from refllm.check.values import Taps, only
from refllm.errors import CheckpointError, InputError
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.precision import rounding
from refllm.storage.gguf_file import GgufFile, is_gguf
from refllm.storage.load_report import file_name, find_prefix
from refllm.storage.not_a_checkpoint import explain
from refllm.storage.quantized import open_checkpoint

if TYPE_CHECKING:
    from refllm.check.oracle import Report

HANDED = "weights."
"""What the name of a tap begins with that is a tensor of the candidate, and no value of its run."""
WORST = 5
"""Tensors that a report names."""


class Tensors(Protocol):
    """What arrays are read from, one at a time."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dtype: Any = ...) -> np.ndarray: ...


class Handed:
    """Arrays that somebody handed over, by the names of a checkpoint's tensors: `Tensors`."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {name: as_array(value) for name, value in arrays.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array(self._arrays[name], dtype)


@dataclass(frozen=True)
class Given:
    """Weights in the place of a checkpoint's, as far as there are any. source: where they come from, in words.

    rounded: whether the precision of the check rounds them, as it does those of a checkpoint; what was handed over is
    taken as it is. own: whether they are what the candidate has, which is asked whether they are the checkpoint's in
    another format, and not what somebody said that they should be.
    without: tensors, as the pages name them, that are not taken though they are there.
    """

    source: str
    tensors: Tensors
    rounded: bool
    own: bool = False
    without: frozenset[str] = frozenset()

    @classmethod
    def open(cls, given: str | Path | Mapping[str, Any]) -> "Given":
        """given: a checkpoint folder, a safetensors or GGUF file, or arrays by the names of a checkpoint's tensors.

        Raises CheckpointError for what is none of these.
        """
        if isinstance(given, Mapping):
            return cls("arrays that were given", Handed(given), rounded=False)
        path = Path(given)
        if is_gguf(path):
            return cls(path.name, GgufFile.open(path), rounded=True)
        if not path.is_dir() and path.suffix != ".safetensors":
            raise CheckpointError(
                f"--weights {path}: {explain(path)} (it takes a checkpoint folder, a safetensors file or a GGUF file)"
            )
        return cls(path.name, open_checkpoint(path), rounded=True)

    @classmethod
    def handed(cls, source: str, arrays: Mapping[str, Any]) -> "Given | None":
        """What somebody handed over; None for nothing."""
        return cls(source, Handed(arrays), rounded=False, own=True) if arrays else None

    def in_place_of(self, model: Model) -> Model:
        """`model` with these weights. Raises InputError for a tensor that it does not have, or of another shape."""
        own = model.weights
        return type(model)(model.config, own.replaced(self.arrays(model)), model.arithmetic, model.generation_config)

    def kinds(self, model: Model) -> dict[str, str]:
        """The products of `model` with a weight of these, by the names of their values -> how it is stored, as far as
        the file says that."""
        stored: Mapping[str, str] = getattr(self.tensors, "kinds", {})
        by_page = {page: stored[name] for page, name in self._every_page().items() if name in stored}
        by_page |= {target: by_page[source] for target, source in model.weights.tied.items() if source in by_page}
        return {file_name(page, "model.").removesuffix(".weight"): kind for page, kind in by_page.items()}

    def arrays(self, model: Model) -> "_Arrays":
        """The arrays by the names that the pages of `model` have, each read when it is asked for."""
        pages = {page: name for page, name in self._every_page().items() if page not in self.without}
        for page, name in pages.items():
            self._must_fit(model, page, name)
        exact = model.dtype == "float64"
        round = rounding(model.dtype) if self.rounded and not exact else None
        return _Arrays(self.tensors, pages, np.float64 if exact else np.float32, round)

    def checked(self, exact: Model) -> "tuple[Given | None, list[str]]":
        """Those of the candidate's own that are the checkpoint's in another format; None where there are no other
        formats. And a sentence on each tensor that is another one: the candidate is judged without it, and found.

        exact: the checkpoint in float64.
        """
        if not self.own:
            return self, []
        arrays, said, same = self.arrays(exact), list[str](), set[str]()
        kinds: Mapping[str, str] = getattr(self.tensors, "kinds", {})
        for page, name in arrays.names.items():
            kind = kinds.get(name, "")
            bits = self.tensors.bits(name) if kind else 0.0  # type: ignore[attr-defined]
            off, most = _worst_row(arrays[page], exact.weights[page]), _most(kind, bits)
            if off > most:
                said.append(
                    f"{name} of {self.source}{f' ({kind})' if kind else ''} is not the checkpoint's: a row is off by "
                    f"{_percent(off)} of its size, and {'that' if kind else 'a'} format costs no more than "
                    f"{_percent(most)}; judged with the checkpoint's (if it is meant, --weights says so)"
                )
            if off > most or (off == 0 and kind == "F32"):
                same.add(page)
        left = len(same) < len(arrays)
        return (replace(self, own=False, without=frozenset(same)) if left else None), said

    def _every_page(self) -> dict[str, str]:
        """Name on a page -> name of the tensor."""
        names, prefix = self.tensors.names, find_prefix(self.tensors.names, self.source)
        return {name.removeprefix(prefix): name for name in names if not name.endswith("rotary_emb.inv_freq")}

    def _must_fit(self, model: Model, page: str, name: str) -> None:
        own = model.weights
        if page not in own:
            close = difflib.get_close_matches(page, [*own.shapes, *own.tied], 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"weights of {self.source}: {name!r} is no tensor of the checkpoint's model{meant}")
        expected, found = own.shapes[own.tied.get(page, page)], self.tensors.shape(name)
        if tuple(expected) != tuple(found):
            raise InputError(
                f"weights of {self.source}: {name} has shape {list(found)}, expected {list(expected)} ([out, in] as in "
                "the checkpoint)"
            )

    def replaces_embedding(self) -> bool:
        """Whether the rows of the embedding may be other ones than the checkpoint's."""
        return any(name.endswith("embed_tokens.weight") for name in self.tensors.names)


class _Arrays(Mapping[str, np.ndarray]):
    """Page name -> array, read and rounded at every access."""

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        dtype: Any,
        round: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        self._tensors, self.names, self._dtype, self._round = tensors, names, dtype, round

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._tensors.read(self.names[name], self._dtype)
        return values if self._round is None else self._round(values)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def handed_over(taps: Taps) -> tuple[Taps, dict[str, np.ndarray]]:
    """The values among what a candidate named, and the tensors, without their prefix."""
    tensors = {name.removeprefix(HANDED): taps[name] for name in taps if name.startswith(HANDED)}
    return only(taps, [name for name in taps if not name.startswith(HANDED)]), tensors


# ------------------------------------------------------------------------------------------------ what the format costs


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the checkpoint's. kind: how it is stored, "" where nobody says. relative: rms of the
    difference over rms of the tensor. largest: the largest difference of an element, at `at`."""

    name: str
    kind: str
    relative: float
    largest: float
    at: tuple[int, ...]


@dataclass(frozen=True)
class FormatError:
    """What the format of the weights costs, whoever computes with them: exact runs with these weights and with those of
    the checkpoint, compared.

    source: where the weights come from. tensors: of the model, and given: those in the place of the checkpoint's.
    worst: the tensors furthest from the checkpoint's, by relative error, all that differ counted in `changed`. value:
    the last named value of a run; error, scale: rms of its difference, and of the value. sigma: of the rounding that
    the check predicts there, for comparison. flips: positions whose most likely next token changes, of `positions`; kl:
    mean KL(checkpoint || these); both 0 for a model without next tokens.
    """

    source: str
    tensors: int
    given: int
    changed: int
    worst: tuple[TensorError, ...]
    value: str
    error: float
    scale: float
    sigma: float = 0.0
    flips: int = 0
    positions: int = 0
    kl: float = 0.0

    @property
    def relative(self) -> float:
        """Error over scale of the last value."""
        return self.error / self.scale if self.scale else 0.0

    def in_words(self) -> list[str]:
        """Sentences without a full stop."""
        said = [
            f"{self.given} of {self.tensors} tensors from {self.source}; {self.changed} differ from the checkpoint's"
        ]
        for tensor in self.worst:
            kind = f" ({tensor.kind})" if tensor.kind else ""
            said.append(f"{tensor.name}{kind}: {_percent(tensor.relative)} rms, at most {tensor.largest:.3g}")
        beside = f", {self.error / self.sigma:.3g} times the rounding that is predicted there" if self.sigma else ""
        said.append(f"{self.value}: {_percent(self.relative)} rms in exact arithmetic{beside}")
        if self.positions:
            said.append(f"next tokens: {self.flips} of {self.positions} change, KL {self.kl:.3g}")
        return said


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _most(kind: str, bits: float) -> float:
    """What a row of a tensor may be off by in a format of so many bits, as a part of its size. bits: 0 if unknown."""
    return OF_ONE_ROUNDING.get(kind, min(ANOTHER_TENSOR, 2 ** (STEPS_OF_A_ROW - bits)))


def _worst_row(found: np.ndarray, own: np.ndarray) -> float:
    """The largest rms of a row's difference over that of the row; of a tensor of numbers, its own."""
    if found.shape != own.shape:
        return float("inf")
    off, size = (np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1)) for x in (found - own, own))
    off = np.where(off > OF_THE_SMALLEST, off, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(off > 0, off / size, 0), initial=0))


def format_error(exact: Model, given: Given, inputs: Inputs, report: "Report") -> FormatError:
    """exact: the checkpoint in float64. report: on the run, whose predicted rounding error stands beside it."""
    arrays, kinds = given.arrays(exact), getattr(given.tensors, "kinds", {})
    errors = [_tensor_error(page, name, arrays[page], exact, kinds) for page, name in arrays.names.items()]
    changed = sorted((error for error in errors if error.largest), key=lambda error: -error.relative)
    last = HEAD_TAPS.get(exact.head, "model.norm")
    original, dequantised = (_last_value(model, inputs, last) for model in (exact, given.in_place_of(exact)))
    tokens: dict[str, Any] = {}
    if last == "lm_head":
        found = compare_tokens(original, np.zeros_like(original), dequantised, np.argwhere(inputs.valid))
        tokens = {"flips": len(found.flips), "positions": found.positions, "kl": found.kl}
    return FormatError(
        source=given.source,
        tensors=len(exact.weights),
        given=len(arrays),
        changed=len(changed),
        worst=tuple(changed[:WORST]),
        value=last,
        error=_rms(dequantised - original),
        scale=_rms(original),
        sigma=next((tap.end_to_end.rms_sigma for tap in report.taps if tap.name == last), 0.0),
        **tokens,
    )


def _tensor_error(page: str, name: str, found: np.ndarray, exact: Model, kinds: Mapping[str, str]) -> TensorError:
    own = exact.weights[page]
    difference = np.abs(found - own)
    scale, at = _rms(own), np.unravel_index(int(difference.argmax()), difference.shape)
    relative = _rms(difference) / scale if scale else float(difference.max() > 0)
    return TensorError(name, kinds.get(name, ""), relative, float(difference[at]), tuple(int(i) for i in at))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _last_value(model: Model, inputs: Inputs, name: str) -> np.ndarray:
    """The value `name` [N, n] of an exact run, at the positions that are no padding."""
    from refllm.check.candidates import ReferenceCandidate

    kept: list[np.ndarray] = []

    def keep(tap: str, value: Any) -> None:
        if tap == name:
            kept.append(value)

    ReferenceCandidate(model).run(inputs, keep)
    return np.asarray(kept[0], np.float64)[inputs.valid]
