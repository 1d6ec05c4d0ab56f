"""An ONNX file as a candidate, run by ONNX Runtime on a CPU. Needs the packages `onnx` and `onnxruntime`.

What is run is the graph that ONNX Runtime makes of the file: it fuses nodes and, in float16, drops conversions between
them. Asked for the values of the file itself, it would fuse and drop less, and the graph that is checked would not be
the user's. So it optimises the file first; those of the named values that are left become outputs of the optimised
graph, which is then run as it is. What both return is compared when the file is opened.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.adapters import onnx_files
from refllm.check.adapters.graph_names import named_values
from refllm.check.inputs import Inputs
from refllm.check.stacks import Opening
from refllm.check.taps import Sink, cannot_run
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.precision import rounding

EMBEDDING = "model.embed_tokens"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids")
_PROBE = 8  # tokens


def open_candidate(opening: Opening) -> "OnnxCandidate":
    """The graph in a file. Raises InputError for what is none, or one that cannot be run."""
    return OnnxCandidate(Path(opening.given), opening)


def wrap(model: Any, opening: Opening) -> "OnnxCandidate":
    """An `onnx.ModelProto`, or a session of ONNX Runtime that was made of a file."""
    path = getattr(model, "_model_path", None)
    if path is not None:
        return OnnxCandidate(Path(path), opening)
    if not hasattr(model, "SerializeToString"):
        raise InputError(f"a {type(model).__name__} cannot be checked: give the ONNX file, or an onnx.ModelProto")
    import onnx

    with tempfile.TemporaryDirectory(prefix="refllm-") as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file, save_as_external_data=True, location="model.data")
        return OnnxCandidate(file, opening)


class OnnxCandidate:
    """An ONNX file with inputs as exporters call them: input_ids and, where there are such, attention_mask,
    position_ids and past_key_values.N.key and .value, which present.N.key and .value follow."""

    def __init__(self, file: Path, opening: Opening) -> None:
        import onnx
        import onnxruntime

        source = onnx_files.read(file)
        self.file, self.dtype, self.computes_in = file, opening.dtype, onnx_files.dtype_of(source, file)
        self.config: Any = AutoConfig.from_pretrained(opening.folder)
        names = named_values(onnx_files.graph_of(source), self.config, opening.head)
        self._folder = tempfile.TemporaryDirectory(prefix="refllm-")
        optimised = Path(self._folder.name) / "optimised.onnx"
        as_it_is = onnx_files.session(file, optimised)
        self._graph = onnx.load(optimised, load_external_data=False)
        self.values = onnx_files.left(names, source, self._graph)
        onnx_files.with_outputs(self._graph, set(self.values.values()))
        self._session, self._fed = self._of_graph("shown"), None
        self._asked_for = {each.name: each for each in as_it_is.get_inputs()}
        self._cache = {name: f"present.{m[1]}.{m[2]}" for name in self._asked_for if (m := _PAST.match(name))}
        self._must_be_known()
        self.takes = tuple(self._takes())
        self.name = f"onnxruntime {onnxruntime.__version__} {file.name}"
        self.details = {
            "onnxruntime": onnxruntime.__version__,
            "made by": f"{source.producer_name} {source.producer_version}".strip(),
            "graph": f"the file as ONNX Runtime optimises it, {self._compared(as_it_is)}",
            "not shown": ", ".join(tap for tap in names if tap not in self.values),
        }

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises InputError for inputs that the file's fixed shapes do not fit."""
        if reason := cannot_run(self, inputs):
            raise InputError(f"{self.name}: {inputs.label}: {reason}")
        past = {name: self._nothing(name, len(inputs.input_ids)) for name in self._cache}
        shown = {inputs.until: self.values[inputs.until]} if inputs.until in self.values else self.values
        for piece in inputs.pieces():
            given = self._given(inputs, piece) | past
            if inputs.embeds_scale is None:
                found = self._outputs(self._session, [*shown.values(), *self._presents(inputs)], given)
            else:
                found = self._outputs_of_embeddings(given, inputs.embeds_scale)
            for tap, name in shown.items():
                sink(tap, self._in_heads(found[name]) if tap.endswith(".context") else found[name])
            past |= {name: found[present] for name, present in self._cache.items() if present in found}

    # ------------------------------------------------------------------------------------------------- what it is given

    def _must_be_known(self) -> None:
        known = {*_OF_TOKENS, *self._cache}
        if "input_ids" not in self._asked_for:
            raise InputError(f"{self.file} takes no input_ids but {', '.join(self._asked_for) or 'nothing'}")
        if more := [name for name in self._asked_for if name not in known]:
            raise InputError(
                f"{self.file} takes {', '.join(more)}, of which nothing is known: expected {', '.join(_OF_TOKENS)} and "
                "past_key_values.N.key and .value"
            )

    def _takes(self) -> Iterator[str]:
        if self._cache:
            yield "cache"
        if EMBEDDING in self.values:
            yield "embeddings"
        yield from (
            word for word, name in (("mask", _OF_TOKENS[1]), ("positions", _OF_TOKENS[2])) if name in self._asked_for
        )
        if self._asked_for["input_ids"].shape[0] != 1:
            yield "batch"

    def _given(self, inputs: Inputs, piece: slice) -> dict[str, np.ndarray]:
        arrays = (inputs.input_ids[:, piece], inputs.mask[:, : piece.stop], inputs.positions[:, piece])
        return {
            name: self._array(name, each)
            for name, each in zip(_OF_TOKENS, arrays, strict=True)
            if name in self._asked_for
        }

    def _array(self, name: str, array: np.ndarray) -> np.ndarray:
        asked = self._asked_for[name]
        fixed = [n for n in asked.shape if isinstance(n, int)]
        if len(asked.shape) != array.ndim or any(
            n != m for n, m in zip(asked.shape, array.shape, strict=True) if n in fixed and isinstance(n, int)
        ):
            shape = " x ".join(str(n) for n in asked.shape)
            raise InputError(
                f"{self.file}: {name} has the fixed shape {shape}, and {' x '.join(map(str, array.shape))} was given: "
                "export it with dynamic shapes, or give as many --ids"
            )
        return np.ascontiguousarray(array, _numpy_type(asked.type))

    def _nothing(self, name: str, rows: int) -> np.ndarray:
        """No keys or values yet."""
        c = self.config
        return np.zeros((rows, c.num_key_value_heads, 0, c.head_dim), _numpy_type(self._asked_for[name].type))

    def _presents(self, inputs: Inputs) -> list[str]:
        return list(self._cache.values()) if inputs.chunks else []

    # ------------------------------------------------------------------------------------------------------ what it runs

    def _of_graph(self, name: str) -> Any:
        import onnx

        file = Path(self._folder.name) / f"{name}.onnx"
        onnx.save(self._graph, file)
        return onnx_files.session(file)

    def _outputs(self, session: Any, names: list[str], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values by their names; nothing is computed that they do not need."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        names = list(dict.fromkeys(names))
        return dict(zip(names, session.run(names, given, options), strict=True))

    def _outputs_of_embeddings(self, given: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
        """All values, where the rows of the embedding are scaled: those are an input of another session."""
        name = self.values[EMBEDDING]
        rows = self._outputs(self._session, [name], given)[name]
        scaled = rounding(self.computes_in)(np.float32(rows) * np.float32(scale)).astype(rows.dtype)
        if self._fed is None:
            onnx_files.with_input(self._graph, name, rows.shape[-1], rows.dtype.name)
            self._fed = self._of_graph("fed")
        others = [value for value in self.values.values() if value != name]
        return self._outputs(self._fed, others, given | {name: scaled}) | {name: scaled}

    def _in_heads(self, merged: np.ndarray) -> np.ndarray:
        """[B, S, H*D] -> [B, H, S, D]."""
        return merged.reshape(*merged.shape[:2], self.config.num_attention_heads, -1).transpose(0, 2, 1, 3)

    def _compared(self, as_it_is: Any) -> str:
        """Whether the graph that is run returns what the file does, on a few tokens."""
        shape = self._asked_for["input_ids"].shape
        B, S = (n if isinstance(n, int) else m for n, m in zip(shape, (1, _PROBE), strict=True))
        inputs = Inputs(np.resize(np.arange(self.config.vocab_size), (B, S)))
        given = self._given(inputs, slice(0, S)) | {name: self._nothing(name, B) for name in self._cache}
        results = [each.name for each in as_it_is.get_outputs()]
        ours = self._outputs(self._session, results, given)
        theirs = dict(zip(results, as_it_is.run(results, given), strict=True))
        off = [float(np.abs(np.float64(theirs[name]) - ours[name]).max(initial=0)) for name in results]
        return "which gives the same to the bit" if not any(off) else f"which gives something else: by {max(off):.3g}"


def _numpy_type(said: str) -> Any:
    """ "tensor(int64)" -> int64."""
    return np.dtype(said.removeprefix("tensor(").removesuffix(")").replace("float", "float32").replace("3216", "16"))
