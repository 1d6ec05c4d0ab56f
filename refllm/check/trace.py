"""A trace: the named values of one forward pass of any implementation, in memory or in a safetensors file.

The files that `refllm trace` writes say everything about themselves. Any other program writes a plain safetensors file,
with `input_ids` and tensors whose names are those of `refllm.forward.taps` (docs/recording.md).
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.check.layout import words_of
from refllm.check.values import IN_MEMORY, Taps, Values, narrowed, widened
from refllm.errors import CheckpointError, InputError
from refllm.precision import rounding
from refllm.precision.dtype_names import dtype_name
from refllm.storage import input_file, output_file
from refllm.storage.checkpoint import MappedFile
from refllm.storage.checkpoint_writer import header
from refllm.storage.safetensors_format import read_header

FORMAT = "refllm trace 1"
INPUTS_FORMAT = "refllm inputs 1"
"""The format of a file that has inputs to run, and no values."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
FLOAT32_INSIDE = "float32 inside"
"""The detail of a candidate in float64 that computes in float32 in places."""
_FEWEST = 64  # numbers other than 0 that tell a format
_PAGE = "docs/recording.md"
_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class Trace:
    """taps: name -> array, in order of computation; narrow formats are held in float32. source: who computed it.

    head, config_hash: of the model, the latter of what its config says about the mathematics (`refllm.config.digest`);
    "" where a file does not say. details: anything else worth keeping. layout: words of `refllm.check.layout.LAYOUTS`
    that say how the values lie; notes, doubts: what was said when they were brought to the shapes of the vocabulary
    (`refllm.check.layout.Laid`), last_alone: what the logits are, as there. weights: tensors that the candidate handed
    over (`refllm.check.weights`), which no file keeps. gradients: "grad:" + name of a value or
    tensor -> array, of a backward pass; no file keeps them. file: in which the values lie, None for none.
    """

    taps: Taps
    inputs: Inputs
    source: str
    dtype: str
    head: str
    config_hash: str
    details: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    layout: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    gradients: Taps = field(default_factory=dict)
    last_alone: bool = False
    file: Path | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a program wrote it that does not know refllm, and its file has no word on its model."""
        return not self.config_hash

    def with_last_logits(self) -> "Trace":
        """The same with the logits of the last token of every sequence alone."""
        logits = self.taps.get("lm_head")
        if self.last_alone or logits is None:
            return replace(self, last_alone=True)
        rows, last = np.arange(len(logits))[:, None], self.inputs.last[:, None]
        return replace(self, taps=self.taps | {"lm_head": logits[rows, last]}, last_alone=True)

    def save(self, path: str | Path) -> None:
        """Write to a file. Narrow values are stored in their own dtype, two bytes each."""
        write_tensors(path, _Narrowed(self), self.metadata())

    def metadata(self) -> dict[str, str]:
        """What a file says of the run, beside its values and inputs."""
        about: dict[str, Any] = {
            "source": self.source,
            "dtype": self.dtype,
            "head": self.head,
            "config_hash": self.config_hash,
            "layout": self.layout,
        }
        about |= {"chunks": self.inputs.chunks, "embeds_scale": self.inputs.embeds_scale, "label": self.inputs.label}
        return {"format": FORMAT, "about": json.dumps(about), "details": json.dumps(self.details)}

    @staticmethod
    def load(path: str | Path, input_ids: np.ndarray | None = None) -> "Trace":
        """Read what `save` wrote, or a plain safetensors file of values by name.

        input_ids: the tokens [B, S] that were run, for a file that does not hold them. Raises InputError, naming the
        file, for anything else, and for other tokens than the file has.
        """
        from safetensors import SafetensorError

        path = Path(path)
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; a trace is made by refllm trace, or by any program ({_PAGE})")
        try:
            tensors, metadata, values = _read(path)
            made = _of_refllm if metadata.get("format") == FORMAT else _plain
            return made(tensors, metadata, input_ids, path, values)
        except (CheckpointError, InputError) as error:
            said = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{path}: {said}; a trace is made by refllm trace, or by any program ({_PAGE})") from None
        except (SafetensorError, KeyError, ValueError, TypeError, OSError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not readable as a trace ({error}); make it again with refllm trace") from None


def tap_name(number: int, name: str) -> str:
    """What a file calls the value `name` that was shown after `number` others."""
    return f"tap.{number:05d}.{name}"


def tensors_of(inputs: Inputs) -> dict[str, np.ndarray]:
    """What a file has of the inputs."""
    given = {f"input.{name}": getattr(inputs, name) for name in _INPUTS}
    tensors = {name: np.ascontiguousarray(value.astype(np.int64)) for name, value in given.items() if value is not None}
    if inputs.embeds is not None:
        tensors["input.embeds"] = np.ascontiguousarray(inputs.embeds, np.float32)
    return tensors


class _Narrowed(Mapping[str, np.ndarray]):
    """The tensors of a trace's file, each made when it is asked for."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._inputs = trace, tensors_of(trace.inputs)
        self._names = {tap_name(i, name): name for i, name in enumerate(trace.taps)}

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._inputs:
            return self._inputs[name]
        return np.ascontiguousarray(narrowed(self._trace.taps[self._names[name]], self._trace.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._names, *self._inputs))

    def __len__(self) -> int:
        return len(self._names) + len(self._inputs)


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file of contiguous arrays, each of which is asked for twice. Raises InputError where it
    cannot be written."""
    kinds = {name: (value.shape, value.dtype.name) for name, value in tensors.items()}
    try:
        with output_file.replacing(path) as file:
            file.write(header(kinds, metadata))
            for value in tensors.values():
                file.write(value.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], Callable[[dict[str, np.ndarray]], Taps]]:
    """The tensors, in the order of their data, and the metadata of a file that is not trusted; and what makes values of
    some of them: those of a large file stay there."""
    from safetensors import safe_open

    input_file.must_be_regular(path)
    with open(path, "rb") as raw:
        infos, metadata = read_header(raw, str(path))  # refuses what the library would fill the memory with
    if metadata.get("format") == INPUTS_FORMAT:
        raise InputError("it holds inputs to run, and no values; run them, and record what comes out")
    strange = next((name for name, info in infos.items() if not _readable(name, info.dtype)), None)
    if strange is not None:
        raise InputError(f"{strange} is {infos[strange].dtype}; expected float32, bfloat16, float16 or float64")
    if sum(info.nbytes for info in infos.values()) > IN_MEMORY:
        mapped = MappedFile(path)
        return {name: mapped.view(name) for name in mapped.tensors}, metadata, Values
    with safe_open(str(path), framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in infos}
    return tensors, metadata, lambda raw: {name: widened(value) for name, value in raw.items()}


def _readable(name: str, dtype: str) -> bool:
    return name.removeprefix("input.") in _INPUTS or dtype in DTYPES


def _of_refllm(
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    given: np.ndarray | None,
    path: Path,
    values: Callable[[dict[str, np.ndarray]], Taps],
) -> Trace:
    about, details = json.loads(metadata["about"]), json.loads(metadata["details"])
    if not all(isinstance(about[key], str) for key in ("source", "dtype", "head", "config_hash", "label")):
        raise InputError("its metadata says something other than a text of its source, dtype, head, config or label")
    dtype = _dtype(about["dtype"])
    scale = None if about["embeds_scale"] is None else _scale(about["embeds_scale"])
    ids, mask, positions = (tensors.get(f"input.{name}") for name in _INPUTS)
    chunks = tuple(int(size) for size in about["chunks"])
    inputs = _inputs(ids, mask, positions, given, chunks=chunks, embeds_scale=scale, label=about["label"])
    inputs = replace(inputs, embeds=tensors.get("input.embeds"))
    taps = values({n.split(".", 2)[2]: value for n, value in sorted(tensors.items()) if n.startswith("tap.")})
    said = about["source"], dtype, about["head"], about["config_hash"], _texts(details)
    layout = words_of(",".join(about.get("layout", ())), "its metadata")
    return Trace(taps, inputs, *said, layout=layout, file=path)


def _plain(
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    given: np.ndarray | None,
    path: Path,
    values: Callable[[dict[str, np.ndarray]], Taps],
) -> Trace:
    """What any program may write: see `_PAGE`."""
    ids, mask, positions = (tensors.pop(name, None) for name in _INPUTS)
    dtype, scale = metadata.get("dtype", ""), metadata.get("embeds_scale")
    stored = [d for d in DTYPES[1:3] if any(value.dtype.name == d for value in tensors.values())]
    label, factor = metadata.get("label", "recorded tokens"), None if scale is None else _scale(scale)
    inputs = _inputs(ids, mask, positions, given, label=label, embeds_scale=factor)
    taps = values(tensors)
    return Trace(
        taps,
        inputs,
        source=metadata.get("source", path.name),
        dtype=_dtype(dtype) if dtype else stored[0] if len(stored) == 1 else format_of(taps),
        head="",
        config_hash=metadata.get("config_hash", ""),
        details={key: value for key, value in metadata.items() if key not in ("format", "layout")},
        layout=words_of(metadata.get("layout", ""), "its metadata"),
        file=path,
    )


def _inputs(
    ids: np.ndarray | None,
    mask: np.ndarray | None,
    positions: np.ndarray | None,
    given: np.ndarray | None,
    **how: Any,
) -> Inputs:
    """The inputs of a file; given: tokens that somebody named beside it."""
    if ids is None and given is None:
        raise InputError("it has no input_ids [B, S], and nobody says with --ids which tokens were run")
    arrays: dict[str, Any] = {}
    for name, value in zip(_INPUTS, (given if ids is None else ids, mask, positions), strict=True):
        if value is not None:
            arrays[name] = _integers(name, value)
    if given is not None and not np.array_equal(arrays["input_ids"], np.atleast_2d(given)):
        raise InputError("its input_ids are other tokens than those of the command; leave out --ids, --prompt")
    if "attention_mask" in arrays:
        arrays["attention_mask"] = (arrays["attention_mask"] != 0).astype(np.int64)
        if not arrays["attention_mask"].any():
            raise InputError("attention_mask: every token is padding")
    return Inputs(**arrays, **how)


def _integers(name: str, value: np.ndarray) -> np.ndarray:
    """[S] or [B, S] of a file as int64 [B, S]."""
    if value.dtype.kind not in "iub" or (value.dtype.kind == "b" and name != "attention_mask"):
        raise InputError(f"{name} is {value.dtype.name}; expected integers")
    found = np.atleast_2d(value).astype(np.int64)
    if found.size and found.min() < 0:
        raise InputError(f"{name} has {found.min()}, which is negative")
    return found


def _dtype(text: str) -> str:
    if (name := dtype_name(text)) not in DTYPES:
        raise InputError(f"its metadata says dtype {text!r}; use {', '.join(DTYPES)}")
    return name


def _scale(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise InputError(f"its metadata says embeds_scale {value!r}; expected a finite number")
    return found


def _texts(values: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def format_of(taps: Mapping[str, np.ndarray]) -> str:
    """The dtype on whose grid the values lie that somebody shows: one value in a narrow format is enough, since norms
    and logits may be wider. The embedding does not count, which is on the grid of the checkpoint."""
    for name, value in taps.items():
        some = value.ravel()[: 1 << 16]
        some = some[np.isfinite(some) & (some != 0)]
        if name != "model.embed_tokens" and some.size >= _FEWEST:
            for dtype in ("bfloat16", "float16"):  # most numbers of bfloat16 are numbers of float16 too
                if (rounding(dtype)(some) == some).all():
                    return dtype
    return "float32"
