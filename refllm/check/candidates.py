"""The implementations that can be checked: Transformers, the reference itself, and a function of the user's own."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.check.taps import HEAD_TAPS, Candidate, Sink, as_array
from refllm.check.trace import Trace, config_hash
from refllm.dtype_names import dtype_name
from refllm.errors import InputError
from refllm.inputs import to_numpy
from refllm.model import Model

ATTENTION = ("eager", "sdpa")
DTYPES = ("float32", "bfloat16", "float16")
FAST = ("torch", "triton")
"""The backends of the fast models."""
Forward = Callable[..., Any]
"""A user's forward pass: f(checkpoint, input_ids, attention_mask, position_ids, tap) -> logits.

checkpoint: the folder. The others are int64 arrays [B, S]. tap(name, value) hands over a named value
(`refllm.check.taps`) and returns it; call it for whatever is at hand, or not at all. Arrays or tensors, both are fine.
"""


def open_candidate(name: str, folder: Path, *, head: str, dtype: str, attention: str) -> Candidate:
    """The candidate that `--candidate` names. Raises InputError for a name, dtype or attention that is not known."""
    dtype = dtype_name(dtype)
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} cannot be checked: use {', '.join(DTYPES)}")
    if attention not in ATTENTION:
        raise InputError(f"--attn {attention} is not known: use {' or '.join(ATTENTION)}")
    if name == "transformers":
        from refllm.check.transformers_adapter import TransformersCandidate

        return TransformersCandidate.load(folder, head=head, dtype=dtype, attention=attention)
    if name == "numpy":
        return ReferenceCandidate.load(folder, head=head, dtype=dtype, attention=attention)
    if name in FAST:
        return ReferenceCandidate.fast(folder, head=head, dtype=dtype, backend=name)
    if ":" in name:
        return FunctionCandidate(find_function(name), folder, head=head, dtype=dtype, name=name)
    raise InputError(
        f"--candidate {name} is not known: use torch, triton, transformers, numpy, or a forward pass of yours as "
        "module:function or file.py:function"
    )


def record(candidate: Candidate, model: Model, inputs: Inputs) -> Trace:
    """Run a candidate and keep what it names. model: of the same checkpoint, for its config and head."""
    pieces: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: Any) -> None:
        pieces.setdefault(name, []).append(as_array(value))

    candidate.run(inputs, keep)
    count = len(inputs.pieces())
    taps = {}
    for name, values in pieces.items():
        if count > 1 and name.endswith((".probs", ".scores")):
            continue  # the pieces have different numbers of keys
        if len(values) != count:
            raise InputError(f"{candidate.name}: {name} was named {len(values)} times in {count} passes; once is right")
        taps[name] = values[0] if count == 1 else np.concatenate(values, axis=-2)
    return Trace(
        taps=taps,
        inputs=inputs,
        source=candidate.name,
        dtype=candidate.dtype,
        head=model.head,
        config_hash=config_hash(model.config),
        details=candidate.details,
    )


class ReferenceCandidate:
    """The reference itself in an emulated precision: what an implementation computes that rounds as the policy says."""

    def __init__(self, model: Model, name: str | None = None) -> None:
        from refllm import __version__

        self.model = model
        self.dtype = model.dtype
        self.fused = hasattr(model, "backend")
        self.name = name or f"refllm {model.dtype}" + (f" {model.policy}" if model.policy else "")
        self.details = {"refllm": __version__, "numpy": np.__version__}

    @classmethod
    def load(cls, folder: Path, *, head: str, dtype: str, attention: str) -> "ReferenceCandidate":
        from refllm.auto import load

        policy = None if dtype == "float32" else "hf-eager" if attention == "eager" else "hf-sdpa"
        return cls(load(folder, head=head, dtype=dtype, policy=policy))

    @classmethod
    def fast(cls, folder: Path, *, head: str, dtype: str, backend: str) -> "ReferenceCandidate":
        """The fast model of a backend, in the reference's place: it takes and names the same things."""
        from refllm.auto import load

        model: Any = load(folder, head=head, dtype=dtype, backend=backend)
        return cls(model, f"refllm {backend}, {dtype} on {model.device}")

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`."""
        cache = self.model.new_cache() if inputs.chunks else None
        embeds = None
        if inputs.embeds_scale is not None:
            rows = self.model.weights.rows("embed_tokens.weight", inputs.input_ids)
            embeds = to_numpy(rows) * np.float32(inputs.embeds_scale)
        for piece in inputs.pieces():
            self.model(
                input_ids=None if embeds is not None else inputs.input_ids[:, piece],
                inputs_embeds=None if embeds is None else embeds[:, piece],
                attention_mask=inputs.mask[:, : piece.stop],
                position_ids=inputs.positions[:, piece],
                past_key_values=cache,
                use_cache=cache is not None,
                recorder=_Everything(sink, fused_attention=self.fused),
            )


class _Everything:
    """A recorder that wants every value, but not those that only a slower way of computing would show."""

    def __init__(self, sink: Sink, fused_attention: bool) -> None:
        self._sink, self._without = sink, (".scores", ".probs") if fused_attention else ()

    def wants(self, name: str) -> bool:
        return not name.endswith(self._without)

    def record(self, name: str, value: np.ndarray) -> None:
        self._sink(name, value)


class FunctionCandidate:
    """A forward pass that somebody wrote (`Forward`)."""

    def __init__(self, function: Forward, folder: Path, *, head: str, dtype: str, name: str | None = None) -> None:
        dtype = dtype_name(dtype)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype} cannot be checked: use {', '.join(DTYPES)}")
        self.function, self.folder, self.head, self.dtype = function, folder, head, dtype
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.details: dict[str, str] = {}

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Embeddings and caches are the function's own business: such inputs raise InputError."""
        if inputs.chunks or inputs.embeds_scale is not None:
            raise InputError(f"{self.name}: {inputs.label} needs a cache or embeddings, which a function does not take")

        def tap(name: str, value: Any) -> Any:
            sink(name, value)
            return value

        logits = self.function(str(self.folder), inputs.input_ids, inputs.mask, np.array(inputs.positions), tap)
        if logits is not None and self.head in HEAD_TAPS:
            sink(HEAD_TAPS[self.head], logits)


def find_function(reference: str) -> Forward:
    """The function that "module:function" or "file.py:function" names. Raises InputError if there is none."""
    where, _, name = reference.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # whatever the user's module raises is the answer to the user
        raise InputError(f"{where} cannot be imported: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{where} has no function {name!r}")
    return function


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
