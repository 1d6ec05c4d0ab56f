"""The implementations that can be checked: Transformers, the reference itself, and a function of the user's own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.functions import DTYPES, FunctionCandidate
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import EnoughError, floats, misbehaves, must_not_have_changed, raised
from refllm.check.taps import Candidate, Sink
from refllm.check.trace import Trace
from refllm.config.digest import config_hash
from refllm.errors import InputError, RefllmError
from refllm.forward.model import Model
from refllm.inputs import to_numpy
from refllm.precision.dtype_names import dtype_name
from refllm.user_code import find_function

ATTENTION = ("eager", "sdpa")
FAST = ("torch", "triton")
"""The backends of the fast models."""


KNOWN = {"torch": ("torch",), "triton": ("torch", "triton"), "transformers": ("torch", "transformers"), "numpy": ()}
"""The candidates that have a name of their own, and the packages that they need."""


def must_be_known(name: str, dtype: str, attention: str) -> None:
    """Raises InputError for a candidate, dtype or attention that there is none of.

    Raises MissingExtraError for a candidate whose packages are not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} cannot be checked: use {', '.join(DTYPES)}")
    if attention not in ATTENTION:
        raise InputError(f"--attn {attention} is not known: use {' or '.join(ATTENTION)}")
    if name not in KNOWN and ":" not in name:
        raise InputError(
            f"--candidate {name} is not known: use torch, triton, transformers, numpy, or a forward pass of yours as "
            "module:function or file.py:function"
        )
    extras.require(f"--candidate {name}", *KNOWN.get(name, ()))


def open_candidate(name: str, folder: Path, *, head: str, dtype: str, attention: str) -> Candidate:
    """The candidate that `--candidate` names, in this process. Raises InputError as `must_be_known`."""
    dtype = dtype_name(dtype)
    must_be_known(name, dtype, attention)
    if name == "transformers":
        from refllm.check.adapters.transformers import TransformersCandidate

        return TransformersCandidate.load(folder, head=head, dtype=dtype, attention=attention)
    if name == "numpy":
        return ReferenceCandidate.load(folder, head=head, dtype=dtype, attention=attention)
    if name in FAST:
        return ReferenceCandidate.fast(folder, head=head, dtype=dtype, backend=name)
    return FunctionCandidate(find_function(name), folder, head=head, dtype=dtype, name=name)


def record(candidate: Candidate, model: Model, inputs: Inputs) -> Trace:
    """Run a candidate and keep what it names. model: of the same checkpoint, for its config and head.

    Raises MisbehavesError as `run_candidate`, and for one that names nothing.
    """
    kept = Kept(candidate.name, len(inputs.pieces()))
    run_candidate(candidate, inputs, kept.keep)
    return Trace(
        taps=kept.taps(),
        inputs=inputs,
        source=candidate.name,
        dtype=candidate.dtype,
        head=model.head,
        config_hash=config_hash(model.config),
        details=candidate.details,
    )


def run_candidate(candidate: Candidate, inputs: Inputs, keep: Callable[[str, np.ndarray], None]) -> None:
    """Run a candidate on copies of the inputs; keep(name, array) is told every value that it names.

    The run ends early where the inputs say so (`Inputs.until`). Raises MisbehavesError for what no forward pass may do:
    to raise, to name what is no array of floats, to change its inputs.
    """
    sink = Checked(keep, inputs.until)
    given = {name: value for name, value in vars(inputs).items() if isinstance(value, np.ndarray)}
    copies: dict[str, Any] = {name: value.copy() for name, value in given.items()}
    try:
        candidate.run(replace(inputs, **copies), sink)
    except KeyboardInterrupt:
        raise
    except EnoughError:
        pass
    except RefllmError as error:
        raise sink.refused or error from None
    except BaseException as error:  # whatever it raises is a finding about it
        raise sink.refused or raised(error) from None
    if sink.refused is not None:
        raise sink.refused
    must_not_have_changed(given, copies)


class Checked:
    """The sink that a candidate gets: hands on copies of what are arrays or tensors of floats.

    refused: the error for anything else, or of `keep`, which the candidate may have caught. Raises EnoughError once the
    value `until` was handed on.
    """

    def __init__(self, keep: Callable[[str, np.ndarray], None], until: str = "") -> None:
        self.keep, self.until = keep, until
        self.refused: RefllmError | None = None

    def __call__(self, name: str, value: Any) -> None:
        try:
            self.keep(str(name), floats(str(name), value))
        except RefllmError as error:
            self.refused = self.refused or error
            raise
        if name == self.until:
            raise EnoughError


class Kept:
    """What a candidate names in a run of so many passes."""

    def __init__(self, candidate: str, passes: int) -> None:
        self.candidate, self.passes = candidate, passes
        self._pieces: dict[str, list[np.ndarray]] = {}

    def keep(self, name: str, value: np.ndarray) -> None:
        """value: an array that nobody else changes. Raises InputError for a name too many."""
        pieces = self._pieces.setdefault(name, [])
        pieces.append(value)
        if len(pieces) > self.passes:
            raise self._named(name)

    def taps(self) -> dict[str, np.ndarray]:
        """What was named, in order, the pieces put together. Raises InputError for a name too few."""
        if not self._pieces:
            raise misbehaves("result", "it returns nothing (None) and names no value")
        taps = {}
        for name, values in self._pieces.items():
            if self.passes > 1 and name.endswith((".probs", ".scores")):
                continue  # the pieces have different numbers of keys
            if len(values) != self.passes:
                raise self._named(name)
            taps[name] = values[0] if self.passes == 1 else np.concatenate(values, axis=-2)
        return taps

    def _named(self, name: str) -> InputError:
        times = len(self._pieces[name])
        return InputError(f"{self.candidate}: {name} was named {times} times in {self.passes} passes; once is right")


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
        from refllm.models.auto import load

        policy = None if dtype == "float32" else "hf-eager" if attention == "eager" else "hf-sdpa"
        return cls(load(folder, head=head, dtype=dtype, policy=policy))

    @classmethod
    def fast(cls, folder: Path, *, head: str, dtype: str, backend: str) -> "ReferenceCandidate":
        """The fast model of a backend, in the reference's place: it takes and names the same things."""
        from refllm.models.auto import load

        model: Any = load(folder, head=head, dtype=dtype, backend=backend)
        return cls(model, f"refllm {backend}, {dtype} on {model.device}")

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`."""
        cache = self.model.new_cache() if inputs.chunks else None
        embeds = None
        if inputs.feeds_embeddings:
            embeds = inputs.embedded(lambda ids: to_numpy(self.model.weights.rows("embed_tokens.weight", ids)))
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
