"""The implementations that can be checked: refllm's own, other stacks by name, and what the user wrote."""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.functions import DTYPES, FunctionCandidate, takes_a_checkpoint_alone
from refllm.check.gradient_formulas import GRADIENT, is_gradient, of_tensor
from refllm.check.inputs import Inputs
from refllm.check.layout import laid_out, put_together
from refllm.check.misbehaviour import EnoughError, floats, misbehaves, must_not_have_changed, raised
from refllm.check.stacks import STACKS, Opening, adapter, find_stack, must_have, wrap
from refllm.check.taps import EVERYTHING, GRADIENTS, Candidate, Sink
from refllm.check.trace import Trace, tap_name, tensors_of
from refllm.check.values import IN_MEMORY, Spool, Stored, Taps, Values, like, only, raw_of
from refllm.check.weights import HANDED, Given, handed_over
from refllm.config.digest import config_hash
from refllm.errors import InputError, RefllmError
from refllm.forward.gradients import tensor_names
from refllm.forward.model import Model
from refllm.inputs import to_numpy
from refllm.user_code import find_function

ATTENTION = ("eager", "sdpa")
FAST = ("torch", "triton")
"""The backends of the fast models."""


KNOWN = {"torch": ("torch",), "triton": ("torch", "triton"), "transformers": ("torch", "transformers"), "numpy": ()}
"""The candidates that have a name of their own, and the packages that they need."""


def must_be_known(opening: Opening) -> None:
    """Raises InputError for a candidate, dtype or attention that there is none of.

    Raises MissingExtraError for a candidate whose packages are not installed.
    """
    name, stack = opening.name, find_stack(opening.name)
    exact = opening.dtype == "float64" and (name == "transformers" or (stack is None and ":" in name))  # its gradients
    if opening.dtype not in DTYPES and not exact:
        raise InputError(f"--dtype {opening.dtype} cannot be checked: use {', '.join(DTYPES)}")
    if opening.attention not in ATTENTION:
        raise InputError(f"--attn {opening.attention} is not known: use {' or '.join(ATTENTION)}")
    if stack is not None:
        must_have(stack, opening)
    elif name not in KNOWN and ":" not in name:
        raise InputError(
            f"--candidate {name} is not known: use {', '.join([*KNOWN, *STACKS])}, or a forward pass of yours as "
            "module:function or file.py:function"
        )
    extras.require(f"--candidate {name}", *KNOWN.get(name, ()))


def open_candidate(opening: Opening) -> Candidate:
    """The candidate that `--candidate` names, in this process. Raises InputError as `must_be_known`."""
    must_be_known(opening)
    stack = find_stack(opening.name)
    if stack is not None:
        found: Candidate = adapter(stack).open_candidate(opening)
        return found
    how: dict[str, Any] = {"head": opening.head, "dtype": opening.dtype}
    if opening.name == "transformers":
        from refllm.check.adapters.transformers import TransformersCandidate

        return TransformersCandidate.load(opening.folder, **how, attention=opening.attention)
    if opening.name == "numpy":
        return ReferenceCandidate.load(opening.folder, **how, attention=opening.attention)
    if opening.name in FAST:
        return ReferenceCandidate.fast(opening.folder, **how, backend=opening.name)
    return of_object(find_function(opening.name), opening)


def weights_of(opening: Opening) -> Given | None:
    """The weights in the file that `--candidate` names; None where it has none, or nothing is known of them."""
    stack = find_stack(opening.name)
    find = None if stack is None else getattr(adapter(stack), "weights", None)
    given: Given | None = None if find is None else find(opening)
    return given


def of_object(found: Any, opening: Opening) -> Candidate:
    """A live object of somebody's as a candidate: a model of some stack, a function that takes a checkpoint alone and
    returns a model, a `Candidate`, or a forward pass (`refllm.check.functions.Forward`). A function that returns a
    model is told the dtype, if it has an argument `dtype`."""
    candidate = wrap(found, opening)
    if candidate is not None:
        return candidate
    if hasattr(found, "run"):
        of_their_own: Candidate = found
        return of_their_own
    if takes_a_checkpoint_alone(found):
        return _of_factory(found, opening)
    name = opening.name or None
    return FunctionCandidate(found, opening.folder, head=opening.head, dtype=opening.dtype, name=name)


def _of_factory(function: Callable[[str], Any], opening: Opening) -> Candidate:
    told = {"dtype": opening.dtype} if "dtype" in signature(function).parameters else {}
    try:
        model = function(str(opening.folder), **told)
    except Exception as error:
        raise raised(error) from None
    candidate: Any = wrap(model, opening)
    if candidate is None:
        kind = type(model).__name__
        raise misbehaves("result", f"it takes a checkpoint alone, and returns a {kind}; expected a model of a stack")
    if told and hasattr(candidate, "takes"):
        candidate.takes = (*candidate.takes, "dtype")
    found: Candidate = candidate
    return found


def record(
    candidate: Candidate, model: Model, inputs: Inputs, layout: tuple[str, ...] = (), file: Path | None = None
) -> Trace:
    """Run a candidate and keep what it names, in the shapes of the vocabulary. model: of the same checkpoint, for its
    config and head. layout: how the values lie, where their shapes do not tell (`refllm.check.layout.LAYOUTS`). file:
    where to keep the values, as a trace; None: in memory, and of more than `IN_MEMORY` bytes on disk until they are no
    longer needed.

    Raises MisbehavesError as `run_candidate`, and for one that names nothing.
    """
    kept = Kept(candidate.name, inputs, candidate.dtype, file)
    try:
        run_candidate(candidate, inputs, kept.keep)
        trace = Trace(
            taps={},
            inputs=inputs,
            source=candidate.name,
            dtype=candidate.dtype,
            head=model.head,
            config_hash=config_hash(model.config),
            details=candidate.details,
            layout=layout,
        )
        trace.taps = kept.taps(trace)
    finally:
        kept.close()
    taps, weights = handed_over(trace.taps)
    gradients = raw_of(only(taps, [name for name in taps if is_gradient(name)]))
    raw = {name: value for name, value in raw_of(taps).items() if name not in gradients}
    if inputs.learning is not None and not gradients:
        raise misbehaves("result", "it was asked for gradients and shows none")
    laid = laid_out(raw, model.config, model.head, inputs, layout, candidate.name)
    of_values = {name[len(GRADIENT) :]: gradients.pop(name) for name in [*gradients] if not of_tensor(name)}
    of_values = laid_out(of_values, model.config, model.head, inputs, layout, candidate.name).taps
    gradients = {**{f"{GRADIENT}{name}": value for name, value in of_values.items()}, **gradients}
    return replace(
        trace,
        taps=like(taps, laid.taps),
        layout=(),
        weights=weights,
        notes=[*kept.notes, *laid.notes],
        doubts=laid.doubts,
        gradients=like(taps, gradients),
        last_alone=laid.last_alone,
        file=file,
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
    """What a candidate names in a run. notes: sentences on what it named more often than it was called. dtype, file: of
    the trace that it is written to, value by value, if there is a file, or once it is more than `IN_MEMORY`."""

    def __init__(self, candidate: str, inputs: Inputs, dtype: str = "float32", file: Path | None = None) -> None:
        self.candidate, self.inputs, self.dtype = candidate, inputs, dtype
        self.lengths = [len(range(*piece.indices(piece.stop))) for piece in inputs.pieces()]
        self.notes: list[str] = []
        self._pieces: dict[str, list[np.ndarray | Stored]] = {}
        self._bytes, self._spool = 0, None if file is None else Spool(file, dtype)

    def keep(self, name: str, value: np.ndarray) -> None:
        """value: an array that nobody else changes. Raises InputError for a name too many."""
        pieces = self._pieces.setdefault(name, [])
        if pieces and name.startswith(HANDED):
            return  # every piece has the same weights
        self._bytes += value.nbytes
        pieces.append(value if self._spool is None else self._spool.add(value))
        if len(pieces) > sum(self.lengths):
            raise self._named(name)
        if self._spool is None and self._bytes > IN_MEMORY and not self.inputs.until:
            self._spool = Spool(None, self.dtype)
            for all_of_one in self._pieces.values():
                all_of_one[:] = [self._spool.add(self._array(piece)) for piece in all_of_one]

    def taps(self, trace: Trace) -> Taps:
        """What was named, in order, the pieces put together. trace: what else there is to say of it, for a file. Raises
        InputError for pieces that are not the run's."""
        if not self._pieces:
            raise misbehaves("result", "it returns nothing (None) and names no value")
        taps: dict[str, np.ndarray | Stored] = {}
        for name, pieces in self._pieces.items():
            if len(pieces) == 1 == len(self.lengths) or name.startswith(HANDED):
                taps[name] = pieces[0]
                continue
            if name.endswith((".probs", ".scores")):
                continue  # the pieces have different numbers of keys
            joined = put_together([self._array(piece) for piece in pieces], self.lengths, len(self.inputs.input_ids))
            if joined is None:
                raise self._named(name)
            taps[name] = joined if self._spool is None else self._spool.add(joined)
        more = {len(values) for name, values in self._pieces.items() if not name.startswith(HANDED)}
        more -= {len(self.lengths)}
        if more:
            self.notes.append(f"named up to {max(more)} times in {self._calls()}: the parts were put together")
        if self._spool is None:
            return {name: self._array(value) for name, value in taps.items()}
        return self._in_file(self._spool, taps, trace)

    def _in_file(self, spool: Spool, taps: dict[str, Any], trace: Trace) -> Taps:
        """The file is completed, and read back."""
        names = {tap_name(i, name): stored for i, (name, stored) in enumerate(taps.items())}
        names |= {name: spool.add(value) for name, value in tensors_of(self.inputs).items()}
        shown = {id(stored) for stored in taps.values()}
        for name, pieces in self._pieces.items():
            names |= {f"part.{i}.{name}": piece for i, piece in enumerate(pieces) if id(piece) not in shown}
        mapped = spool.read_back(names, trace.metadata())
        return Values({name: mapped.view(tap_name(i, name)) for i, name in enumerate(taps)})

    def close(self) -> None:
        """Leaves no file behind of a run that did not end well."""
        if self._spool is not None:
            self._spool.close()

    def _array(self, piece: "np.ndarray | Stored") -> np.ndarray:
        if isinstance(piece, np.ndarray):
            return piece
        assert self._spool is not None
        return self._spool.read(piece)

    def _calls(self) -> str:
        return "1 call" if len(self.lengths) == 1 else f"{len(self.lengths)} calls"

    def _named(self, name: str) -> InputError:
        values, tokens = self._pieces[name], sum(self.lengths)
        shapes = ", ".join(str(list(value.shape)) for value in values[:3]) + ", ..." * (len(values) > 3)
        return InputError(
            f"{self.candidate}: {name} was named {len(values)} times in {self._calls()}, with shapes {shapes}; name it "
            f"once in each, or part after part, [B, part, n], with {tokens} tokens in all"
        )


class ReferenceCandidate:
    """The reference itself in an emulated precision: what an implementation computes that rounds as the policy says."""

    def __init__(self, model: Model, name: str | None = None) -> None:
        from refllm import __version__

        self.model = model
        self.dtype = model.dtype
        self.fused = hasattr(model, "backend")
        self.takes = EVERYTHING if self.fused else (*EVERYTHING, GRADIENTS)
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
        if inputs.learning is not None:
            self._backward(inputs, sink)
            return
        cache = self.model.new_cache() if inputs.chunks else None
        embeds = None
        if inputs.feeds_embeddings:
            embeds = inputs.embedded(lambda ids: to_numpy(self.model.weights.rows("embed_tokens.weight", ids)))
        for piece in inputs.pieces():
            self.model(
                input_ids=None if embeds is not None else inputs.input_ids[:, piece],
                inputs_embeds=None if embeds is None else embeds[:, piece],
                attention_mask=None if inputs.given_mask is None else inputs.mask[:, : piece.stop],
                position_ids=inputs.positions[:, piece],
                past_key_values=cache,
                use_cache=cache is not None,
                recorder=_Everything(sink, fused_attention=self.fused),
            )

    def _backward(self, inputs: Inputs, sink: Sink) -> None:
        """Values and gradients, by the tape."""
        learning = inputs.learning
        assert learning is not None
        given: dict[str, Any] = {"input_ids": inputs.input_ids, "position_ids": inputs.positions}
        given |= {"attention_mask": inputs.given_mask, **learning.targets(self.model.head)}
        recorder = _Everything(sink, fused_attention=True)
        found = self.model.gradients(**given, frozen=learning.frozen, recorder=recorder)
        names = {of_file: name for name, of_file in tensor_names(self.model, self.model.prefix).items()}
        for name, gradient in found.gradients.items():
            sink(GRADIENT + tensor_names(self.model)[names[name]], gradient)


class _Everything:
    """A recorder that wants every value, but not those that only a slower way of computing would show."""

    def __init__(self, sink: Sink, fused_attention: bool) -> None:
        self._sink, self._without = sink, (".scores", ".probs") if fused_attention else ()

    def wants(self, name: str) -> bool:
        return not name.endswith(self._without)

    def record(self, name: str, value: np.ndarray) -> None:
        self._sink(name, value)
