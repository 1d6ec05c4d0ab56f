"""Runs checks: which checkpoints, inputs and candidate; what `refllm check` and `refllm trace` call."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.asked import Asked, Layers
from refllm.check.candidates import FAST, KNOWN, open_candidate, record, weights_of
from refllm.check.functions import DTYPES
from refllm.check.inputs import Inputs
from refllm.check.layout import words_of
from refllm.check.misbehaviour import MisbehavesError
from refllm.check.oracle import Report
from refllm.check.process import ApartCandidate, Processes
from refllm.check.runs import Runs
from refllm.check.stacks import Opening
from refllm.check.taps import EVERYTHING, Candidate
from refllm.check.trace import Trace
from refllm.check.weights import Given
from refllm.check.work import Work
from refllm.errors import InputError, RefllmError
from refllm.forward.model import Model
from refllm.forward.taps import axes_of_values
from refllm.precision import POLICIES, Policy
from refllm.precision.dtype_names import dtype_name
from refllm.storage.hub_cache import local_folder
from refllm.storage.not_a_checkpoint import explain

Step = Callable[..., None]

# Long enough that the rules tell a wrong factor of 1.01 from rounding in bfloat16, and past the original context of the
# embedded checkpoint with stretched positions.
DEFAULT_TEXT = """\
The lighthouse keeper counted the ships twice. Eleven had left the harbour before the storm, and eleven lanterns now
rose and fell beyond the reef; but the twelfth light, the small green one, belonged to nobody she knew. "Write it
down," her father used to say, "a number is a promise." So she wrote: 23:40, wind south-west, 12 lights, 11 ships. By
morning the twelfth had gone. Nobody in the village had seen it, or nobody said so; the harbour master turned the page
back and forth, as if the missing ship might have slipped between two lines, and asked her whether she had slept."""
DEFAULT_LENGTH = 128


DEFAULT_DTYPES = ("float32", "bfloat16")
POLICY_OF_ATTENTION = {"eager": "hf-eager", "sdpa": "hf-sdpa"}


@dataclass(frozen=True)
class Settings:
    """What to check.

    candidate: "torch", "triton", "transformers", "numpy", or a function as module:function. dtypes: () takes
    `DEFAULT_DTYPES`, or that of a function that has one of its own. attention: of Transformers.
    policy: where the candidate has to round; None: see `rounding_of`.
    stress: check the stressed inputs too (`refllm.check.inputs.stressed`). tokens: the arguments prompt, ids and
    ids_file of `read_tokens`. seconds: for each run of the candidate; None: `refllm.check.process.time_limit`.
    isolate: run it in a process of its own. splits, tf32: see `refllm.check.asked`. names, library: see
    `refllm.check.stacks.Opening`. layout: words of `refllm.check.layout.LAYOUTS`.
    against: a known-good run to be the measure, and its tokens those that are run where `tokens` has none.
    weights: what `refllm.check.weights.Given.open` takes. explain: see
    `refllm.check.runs.Runs`. backward: check gradients too; frozen: names or patterns of tensors that learn
    nothing.
    """

    candidate: str = "transformers"
    dtypes: tuple[str, ...] = ()
    attention: str = "eager"
    policy: str | None = None
    stress: bool = False
    tokens: dict[str, Any] = field(default_factory=lambda: {"prompt": None, "ids": None, "ids_file": None})
    seconds: float | None = None
    isolate: bool = True
    splits: int = 1
    tf32: bool = False
    names: Path | None = None
    library: Path | None = None
    layout: str = ""
    against: Trace | None = None
    weights: Path | None = None
    explain: bool | None = None
    backward: bool = False
    frozen: tuple[str, ...] = ()
    layers: str | None = None
    last: int | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(dtype_name(dtype) for dtype in self.dtypes))
        allowed = (*DTYPES, "float64") if self.backward else DTYPES
        for dtype in self.dtypes:
            if dtype not in allowed:
                raise InputError(f"--dtype {dtype} cannot be checked: use {', '.join(allowed)}")
        if self.frozen and not self.backward:
            raise InputError("--frozen is about gradients: use it with --backward")
        if self.backward and self.against is not None:
            raise InputError("--against has the values of a forward pass, so leave out --backward")
        if self.attention not in POLICY_OF_ATTENTION:
            raise InputError(f"--attn {self.attention} is not known: use {' or '.join(POLICY_OF_ATTENTION)}")
        _ = self.rounding, words_of(self.layout, "--layout")  # refuse what is not known
        some = "--layers" if self.layers else "--last" if self.last is not None else ""
        for option, given in (("--against", self.against is not None), ("--backward", self.backward)):
            if some and given:
                raise InputError(f"{some} looks at a part of a forward pass, so leave out {option}")
        if self.against is not None and self.stress:
            raise InputError("--against has the values of one run, so leave out --stress")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"--time-limit {self.seconds:g}: expected more than 0 seconds")

    def opening(self, folder: Path, dtype: str) -> Opening:
        """What the candidate is opened from, for one checkpoint in one precision."""
        head = head_of(folder)
        return Opening(self.candidate, folder, head, dtype, self.attention, self.names, self.library)

    @property
    def rounding(self) -> Asked:
        """Where the candidate has to round, and what is known of it."""
        policy = rounding_of(self.candidate, self.policy, self.attention)
        return Asked(policy, self.splits, self.tf32, layers=Layers.of(self.layers), last=self.last)


def rounding_of(candidate: str, policy: str | None, attention: str = "eager") -> Policy | None:
    """Where a candidate is asked to round: as the named policy says; else Transformers' models and the reference as
    their attention does, the fast models as fused kernels do, and whatever is foreign wherever honest code may.

    candidate: a name of `refllm.check.candidates.KNOWN`; any other one is foreign. Raises InputError for an unknown
    policy.
    """
    if policy is None and candidate in FAST:
        policy = "fused"
    return None if policy is None and candidate not in KNOWN else find_policy(policy, attention)


def find_policy(name: str | None, attention: str = "eager") -> Policy:
    """The policy of that name; None takes that of the attention. Raises InputError for an unknown one."""
    name = name or POLICY_OF_ATTENTION[attention]
    if name not in POLICIES:
        raise InputError(f"--policy {name} is not known: use {', '.join(POLICIES)}")
    return POLICIES[name]


def folders_to_check(checkpoint: Path | None) -> list[Path]:
    """The folder given, by its name on the hub too, or those of all embedded checkpoints.

    Raises InputError for what is no folder.
    """
    if checkpoint is None:
        from refllm import golden

        return [Path(folder) for folder in golden.checkpoints().values()]
    folder = local_folder(checkpoint)
    if not folder.is_dir():
        raise InputError(f"{checkpoint}: {explain(checkpoint)}")
    return [folder]


def candidates_to_check(given: list[str] | None, checkpoint: Path | None) -> tuple[list[str], list[str]]:
    """The candidates asked for. By default Transformers, or for the embedded checkpoints everything that is installed;
    then also a sentence for each that is not."""
    if given or checkpoint is not None:
        return given or ["transformers"], []
    missing = {name: extras.not_installed(packages) for name, packages in KNOWN.items() if packages}
    names = [name for name, packages in missing.items() if not packages]
    if not names:
        extras.require("check without a CHECKPOINT and a --candidate", "torch", "triton")
    return names, [f"not checked: {extras.needs(name, *packages)}" for name, packages in missing.items() if packages]


def check_all(
    folders: list[Path],
    settings: Settings | list[Settings],
    step: Step = lambda *_: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Report]:
    """One report per candidate, folder, precision and input, as they are done. settings: of one candidate or several,
    of which the first says how they run. say: told what a check will take, before it begins."""
    several = settings if isinstance(settings, list) else [settings]
    jobs = [_Job(folder, dtype, each) for each in several for folder in folders for dtype in _dtypes(each)]
    with Processes(several[0].seconds) as processes:
        while jobs:
            job = jobs.pop(0)
            if job.dtype is None and job.takes_dtype(processes):
                jobs[:0] = [_Job(job.folder, dtype, job.settings) for dtype in DEFAULT_DTYPES]
                jobs[0].candidate = job.candidate
            else:
                yield from _check(job, jobs[0] if jobs else None, processes, step, say)


def _dtypes(settings: Settings) -> tuple[str, ...] | tuple[None]:
    """What was asked for. Else of what refllm knows the usual ones; and None of a function, which may have its own."""
    if settings.against is not None and not settings.dtypes:
        return (settings.against.dtype,)
    return settings.dtypes or (DEFAULT_DTYPES if settings.candidate in KNOWN else (None,))


class _Job:
    """One candidate on one checkpoint in one precision. candidate: once it was opened. dtype: None if nobody said."""

    def __init__(self, folder: Path, dtype: str | None, settings: Settings) -> None:
        self.folder, self.dtype, self.settings = folder, dtype, settings
        self.candidate: Candidate | None = None

    def open(self, processes: Processes) -> Candidate:
        """The candidate; one in a process of its own is only begun with, or not even that where its values are kept."""
        if self.candidate is None:
            opening = self.settings.opening(self.folder, self.dtype or DEFAULT_DTYPES[0])
            if self.settings.isolate:
                self.candidate = processes.open(opening, begin=self.work is None or not self.work.has_any())
            else:
                self.candidate = open_candidate(opening)
        return self.candidate

    @property
    def work(self) -> Work | None:
        """Where what was done is kept."""
        given, dtype = self.settings.work, self.dtype or DEFAULT_DTYPES[0]
        return None if given is None else Work(given, self.folder, self.settings.candidate, dtype)

    def takes_dtype(self, processes: Processes) -> bool:
        """Whether it is told in which precision to compute. One that cannot be opened is not."""
        candidate = self.open(processes)
        try:
            if isinstance(candidate, ApartCandidate):
                candidate.open()
        except MisbehavesError:
            return False
        return "dtype" in getattr(candidate, "takes", EVERYTHING)


def _check(
    job: _Job, following: _Job | None, processes: Processes, step: Step, say: Callable[[str], None]
) -> Iterator[Report]:
    """A report per input. The candidate of the following job is opened while the last run of this one is judged."""
    step(f"{job.folder.name}: loading")
    candidate = job.open(processes)  # it loads its weights while this process loads its own
    good, opening = job.settings.against, job.settings.opening(job.folder, candidate.dtype)
    inputs, notes = inputs_for(job.folder, job.settings.tokens, good)

    def go_on() -> None:
        job.candidate = None
        if following is None:
            close(candidate)
        elif following.settings.isolate:
            with contextlib.suppress(RefllmError):  # is said when its turn has come
                following.open(processes)

    runs = Runs(
        lambda dtype: load(job.folder, dtype),
        candidate,
        inputs,
        job.settings.rounding,
        checkpoint=job.folder.name,
        stress=job.settings.stress,
        said=job.dtype is not None,
        layout=words_of(job.settings.layout, "--layout"),
        against=good,
        notes=notes,
        step=step,
        say=say,
        recorded=go_on,
        weights=weights_of(opening) if job.settings.weights is None else Given.open(job.settings.weights),
        explain=job.settings.explain,
        backward=job.settings.backward,
        frozen=job.settings.frozen,
        work=job.work,
    )
    yield from runs.reports()


def close(candidate: Candidate) -> None:
    """Frees what a candidate in a process of its own holds."""
    if isinstance(candidate, ApartCandidate):
        candidate.close()


def head_of(folder: Path) -> str:
    """The head that a checkpoint says it has."""
    from refllm.config import AutoConfig
    from refllm.models.auto import model_class

    return model_class(AutoConfig.from_pretrained(folder)).head


def load(folder: Path, dtype: str) -> Model:
    """The checkpoint with its weights rounded to `dtype`."""
    from refllm.models.auto import load

    # Every weight is read once or twice in a check, layer by layer: none is kept.
    return load(folder, dtype=dtype, low_memory=True)


def trace_candidate(folder: Path, settings: Settings, step: Step = lambda *_: None) -> Trace:
    """The named values of one run: `refllm trace`. Takes the first of the settings' dtypes.

    Raises MisbehavesError for a candidate that has none to show.
    """
    step(f"{folder.name}: loading")
    job = _Job(folder, (settings.dtypes or DEFAULT_DTYPES)[0], settings)
    with Processes(settings.seconds) as processes:
        candidate = job.open(processes)
        ids, notes = tokens_for(folder, settings.tokens)
        step(f"{folder.name}: {settings.candidate}")
        trace = record(candidate, load(folder, candidate.dtype), Inputs(ids), words_of(settings.layout, "--layout"))
    policy = settings.rounding.name or ""
    trace.details |= {"checkpoint": folder.name, "policy": policy, "notes": "; ".join(notes)}
    return trace


def inputs_for(folder: Path, tokens: dict[str, Any], good: Trace | None) -> tuple[Inputs, list[str]]:
    """What to run, and notes for the reader: the tokens asked for, else those of the known-good run, else our own."""
    if good is not None and all(value is None for value in tokens.values()):
        return replace(good.inputs, chunks=(), label="tokens"), []
    ids, notes = tokens_for(folder, tokens)
    return Inputs(ids), notes


def write_inputs(folder: Path, tokens: dict[str, Any], stress: bool, path: Path) -> tuple[int, int]:
    """Write what another machine must run, and the values that are expected: `refllm trace --inputs-only`. Returns how
    many runs and values those are."""
    from refllm.check import inputs_file
    from refllm.config import AutoConfig

    config, head = AutoConfig.from_pretrained(folder), head_of(folder)
    runs = inputs_file.runs_of(config, tokens_for(folder, tokens)[0], stress)
    inputs_file.write_inputs(path, config, head, runs, folder.name)
    return len(runs), len(axes_of_values(config, head))


def tokens_for(folder: Path, tokens: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The token ids [1, S] asked for; else a text of our own through the folder's tokenizer; else random ids. And notes
    for the reader."""
    from refllm.config import AutoConfig
    from refllm.errors import TokenizerError
    from refllm.text.token_input import read_tokens

    config = AutoConfig.from_pretrained(folder)
    vocab_size, length = config.vocab_size, min(DEFAULT_LENGTH, config.max_position_embeddings)
    given = read_tokens(folder, vocab_size, **tokens)
    if given is not None:
        return given, []
    try:
        default = read_tokens(folder, vocab_size, prompt=DEFAULT_TEXT, ids=None, ids_file=None)
    except TokenizerError as error:
        ids = np.random.default_rng(0).integers(0, vocab_size, size=(1, length))
        return ids, [f"random token ids, since there is no tokenizer: {error}"]
    assert default is not None
    return default[:, :length], []


def token_texts(folders: list[Path]) -> Callable[[Report, int], str]:
    """(report, token id) -> text by the tokenizer of that report's checkpoint; empty where there is none."""
    from refllm.errors import RefllmError
    from refllm.text.tokenizer import AutoTokenizer

    tokenizers: dict[str, Any] = {}
    for folder in folders:
        try:
            tokenizers[folder.name] = AutoTokenizer.from_pretrained(folder)
        except RefllmError:
            continue

    def text(report: Report, token: int) -> str:
        tokenizer = tokenizers.get(report.checkpoint)
        return "" if tokenizer is None else str(tokenizer.decode([token]))

    return text
