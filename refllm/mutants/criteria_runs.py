"""Wrong runs and right ones, each asked by the criteria of the field and by this check.

Wrong: the defects of the catalogue, in Transformers models; the mistakes of a port that shows its logits alone;
mistakes on top of ports that round elsewhere. Right: such ports without a mistake, Transformers with its other
attention and with roundings in other places, the Torch backend, split products, sums in another order. Plain inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.verdicts import verdict
from refllm.check.asked import Asked
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.inputs import Inputs
from refllm.check.oracle import judge
from refllm.check.taps import Candidate
from refllm.inputs import to_numpy
from refllm.mutants import profiles
from refllm.mutants.field_criteria import CRITERIA, GREEDY, PROMPT, Evidence
from refllm.mutants.honest import FUSED, HF, Honest
from refllm.mutants.models import Mutant, catalogue
from refllm.mutants.port import Port
from refllm.mutants.port_bugs import BUGS
from refllm.mutants.validation import Pair
from refllm.precision import EXACT, rounding

ALONE, SHOWN = "refllm check, logits alone", "refllm check, values shown"
GROUPS = ("Transformers", "port with logits alone", "ports that round elsewhere")
VISIBLE = 2.0
"""A mistake is visible in the logits if it changes them by more than so many times their rounding error (rms)."""


@dataclass(frozen=True)
class Outcome:
    """One run. wrong: whether a mistake is in it. visible: whether the logits have it, by more than `VISIBLE`. said:
    criterion -> holds, fails or incomplete; `SHOWN` only where the run shows values."""

    group: str
    name: str
    checkpoint: str
    dtype: str
    wrong: bool
    visible: bool
    said: dict[str, str]


_NOTHING_SAID = Asked()
Logits = Callable[[np.ndarray], np.ndarray]
"""Token ids [S] -> logits [S, V]."""


@dataclass(frozen=True)
class Subject:
    """A run to be judged. open: while it is open, the mistake is in what `candidate` and `logits` run. right: the
    logits without the mistake, None for a run that has none. asked: what was said of it."""

    group: str
    name: str
    candidate: Candidate
    logits: Logits
    open: Callable[[], AbstractContextManager[Any]] = nullcontext
    right: np.ndarray | None = None
    asked: Asked = _NOTHING_SAID


class Bench:
    """One checkpoint in one format: the exact logits, the known run, and everything that is judged against them."""

    def __init__(self, name: str, folder: Path, dtype: str) -> None:
        self.name, self.folder, self.dtype = name, folder, dtype
        self.pairs = {attention: Pair(folder, dtype, attention) for attention in ("eager", "sdpa")}
        self.model = self.pairs["eager"].model
        self.ids = self.pairs["eager"].tokens(0)
        exact = type(self.model)(self.model.config, self.model.weights, EXACT)
        self.exact = np.asarray(exact(self.ids).logits, np.float64)[0]
        self.transformers = {attention: _of_transformers(pair) for attention, pair in self.pairs.items()}
        known = self.transformers["eager"]
        self.known, self.known_greedy = known(self.ids[0]), greedy(known, self.ids[0, :PROMPT])

    def outcome(self, subject: Subject) -> Outcome:
        """What every criterion says of a run."""
        with subject.open(), np.errstate(all="ignore"):
            trace = record(subject.candidate, self.model, Inputs(self.ids))
            continued = greedy(subject.logits, self.ids[0, :PROMPT], self.known_greedy)
        found = np.asarray(trace.taps["lm_head"], np.float64)[0]
        evidence = Evidence(found, self.known, self.exact, self.dtype, continued, self.known_greedy)
        with np.errstate(all="ignore"):
            said = {criterion.name: str(verdict(not criterion.holds(evidence))) for criterion in CRITERIA}
        alone = replace(trace, taps={"lm_head": trace.taps["lm_head"]})
        said[ALONE] = judge(self.model, alone, subject.asked).verdict
        if len(trace.taps) > 1:
            said[SHOWN] = judge(self.model, trace, subject.asked).verdict
        wrong = subject.right is not None
        visible = subject.right is not None and self.visible(found, subject.right)
        return Outcome(subject.group, subject.name, self.name, self.dtype, wrong, visible, said)

    def visible(self, found: np.ndarray, right: np.ndarray) -> bool:
        """Whether a mistake shows in the logits at all, whatever a criterion says."""
        change, rounded = (np.sqrt(np.mean(np.square(x))) for x in (found - right, right - self.exact))
        return not change <= VISIBLE * rounded  # NaN too


def greedy(logits: Logits, prompt: np.ndarray, known: list[int] | None = None) -> list[int]:
    """The most probable next tokens, one after another. known: where one differs from these, it ends."""
    ids, found = prompt, list[int]()
    while len(found) < GREEDY and (known is None or found == known[: len(found)]):
        found.append(int(np.argmax(logits(ids)[-1])))
        ids = np.append(ids, found[-1])
    return found


def _of_transformers(pair: Pair) -> Logits:
    def logits(ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found: np.ndarray = (
                pair.candidate.model(torch.from_numpy(ids[None]), use_cache=False).logits.float().numpy()
            )
        return found[0].astype(np.float64)

    return logits


# ----------------------------------------------------------------------------------------------- in Transformers models


def in_transformers(bench: Bench, every: int, turn: int) -> Iterator[Subject]:
    """Defects in the middle layer, places in all, and the other attention. Of `every` defects the `turn`-th is planted;
    those that only float32 can show in float32 alone, and places, which are those of a narrow format, in theirs."""
    right = {attention: logits(bench.ids[0]) for attention, logits in bench.transformers.items()}
    config, layer = bench.model.config, bench.model.config.num_hidden_layers // 2
    mutants = [m for m in catalogue() if m.applies(config) and not m.equivalent]
    for n, mutant in enumerate(m for m in mutants if bench.dtype == "float32" or m.dtype != "float32"):
        if mutant.dtype == bench.dtype if mutant.place else n % every == turn % every:
            yield _planted(bench, mutant, layer, None if mutant.place else right[mutant.attention])
    sdpa = bench.pairs["sdpa"].candidate
    yield Subject(GROUPS[0], "sdpa", sdpa, bench.transformers["sdpa"])


def _planted(bench: Bench, mutant: Mutant, layer: int, right: np.ndarray | None) -> Subject:
    pair, logits = bench.pairs[mutant.attention], bench.transformers[mutant.attention]
    model = pair.candidate.model

    def opened() -> AbstractContextManager[Any]:
        return mutant.everywhere(model) if mutant.place else mutant.planted(model, layer)

    return Subject(GROUPS[0], mutant.name, pair.candidate, logits, opened, right, Asked(splits=mutant.splits))


# --------------------------------------------------------------------------------------------- a port with logits alone


class _PortCandidate:
    """A `refllm.mutants.port.Port` as a candidate."""

    def __init__(self, logits: Logits, dtype: str) -> None:
        self.logits, self.dtype = logits, dtype
        self.name, self.details = "port", dict[str, str]()

    def run(self, inputs: Inputs, sink: Any) -> None:
        """See `Candidate.run`; one row of ids."""
        sink("lm_head", self.logits(inputs.input_ids[0])[None].astype(np.float32))


def in_port(bench: Bench, every: int, turn: int) -> Iterator[Subject]:
    """The port without a mistake, and with those that change anything in this checkpoint, of `every` the `turn`-th."""
    model, onto = bench.model, rounding(bench.dtype)
    tensors = {name: np.asarray(model.weights[name]) for name in type(model).tensors(model.config)}

    def logits_with(fields: dict[str, Any]) -> Logits:
        port = Port(tensors, model.config, lambda x: onto(np.asarray(x, np.float32)), **fields)
        return port.logits

    right = logits_with({})
    yield Subject(GROUPS[1], "right", _PortCandidate(right, bench.dtype), right)
    known = np.asarray(right(bench.ids[0]), np.float64)
    bugs = [bug for bug in BUGS if bug.fields(model.config)]
    for bug in bugs[turn % every :: every]:
        wrong = logits_with(bug.fields(model.config))
        with np.errstate(all="ignore"):
            same = np.array_equal(wrong(bench.ids[0]), right(bench.ids[0]), equal_nan=True)
        if not same:  # a bias dropped that is not there
            yield Subject(GROUPS[1], bug.name, _PortCandidate(wrong, bench.dtype), wrong, right=known)


# ----------------------------------------------------------------------------------------- ports that round elsewhere

MORE: dict[str, tuple[Honest, Asked]] = {
    "4 parts, each rounded": (HF.but(splits=4), Asked(splits=4)),
    "float32 sums one after another": (FUSED.but(sums="chain"), _NOTHING_SAID),
}
"""More right ports, with what has to be said of them."""


def in_profiles(bench: Bench, every: int, turn: int) -> Iterator[Subject]:
    """Right ports that round elsewhere, the Torch backend, and mistakes on top of ports. Of `every` mistakes the
    `turn`-th, each on top of another port."""
    for name, how in profiles.PROFILES.items():
        yield _port(bench, name, how)
    for name, (how, asked) in MORE.items():
        if how.sums != "chain" or bench.dtype == "float32":
            yield _port(bench, name, how, asked=asked)
    fast = ReferenceCandidate.fast(bench.folder, head="causal_lm", dtype=bench.dtype, backend="torch")
    model: Any = fast.model
    yield Subject(GROUPS[2], "torch backend", fast, lambda ids: to_numpy(model(ids[None]).logits)[0].astype(np.float64))
    names = list(profiles.PROFILES)
    for n, mistake in enumerate(profiles.mistakes_for(bench.model)):
        if n % every == turn % every:
            yield _port(bench, names[(n + turn) % len(names)], mistake=mistake)


def _port(
    bench: Bench, profile: str, how: Honest | None = None, mistake: str = "", asked: Asked = _NOTHING_SAID
) -> Subject:
    right = how or profiles.PROFILES[profile]
    wrong = profiles.with_mistake(right, mistake) if mistake else right
    as_it_is = _of_honest(bench, right)(bench.ids[0]) if mistake else None
    name = f"{mistake}, on top of {profile}" if mistake else profile
    port = profiles.Port(wrong, bench.folder, bench.dtype)
    return Subject(GROUPS[2], name, port, _of_honest(bench, wrong), right=as_it_is, asked=asked)


def _of_honest(bench: Bench, how: Honest) -> Logits:
    run = how.but(names=()).in_dtype(bench.dtype)

    def logits(ids: np.ndarray) -> np.ndarray:
        positions = np.arange(len(ids))[None]
        found = run(str(bench.folder), ids[None], np.ones_like(ids[None]), positions, lambda *_: None)
        return np.asarray(found.float().numpy(), np.float64)[0]

    return logits


SOURCES: dict[str, Callable[[Bench, int, int], Iterator[Subject]]] = dict(
    zip(GROUPS, (in_transformers, in_port, in_profiles), strict=True)
)


def outcomes(name: str, folder: Path, dtype: str, group: str, every: int, turn: int) -> list[Outcome]:
    """Everything of one group in one checkpoint and one format."""
    bench = Bench(name, folder, dtype)
    return [bench.outcome(subject) for subject in SOURCES[group](bench, every, turn)]
