"""Runs a check: which checkpoints, which tokens, the exact run, the yardstick and the candidate, one report each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.compare import Report, Verdict, compare_next_tokens, compare_traces
from refllm.check.reference import ReferenceCandidate
from refllm.check.taps import Candidate, Trace
from refllm.errors import InputError

Step = Callable[..., None]

CANDIDATES = ("transformers",)

# Long enough that the rules tell a wrong factor of 1.01 from rounding in bfloat16, and past the original context of the
# embedded checkpoint with stretched positions.
DEFAULT_TEXT = """\
The lighthouse keeper counted the ships twice. Eleven had left the harbour before the storm, and eleven lanterns now
rose and fell beyond the reef; but the twelfth light, the small green one, belonged to nobody she knew. "Write it
down," her father used to say, "a number is a promise." So she wrote: 23:40, wind south-west, 12 lights, 11 ships. By
morning the twelfth had gone. Nobody in the village had seen it, or nobody said so; the harbour master turned the page
back and forth, as if the missing ship might have slipped between two lines, and asked her whether she had slept."""
DEFAULT_LENGTH = 128


def folders_to_check(checkpoint: Path | None) -> list[Path]:
    """The folder given, or those of all embedded checkpoints. Raises InputError for what is no folder."""
    if checkpoint is None:
        from refllm import golden

        return [Path(folder) for folder in golden.checkpoints().values()]
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder: expected a checkpoint with config.json and safetensors files")
    return [checkpoint]


def check_all(
    folders: list[Path],
    *,
    candidate: str,
    dtypes: list[str],
    policy: str,
    attention: str,
    tokens: dict[str, Any],
    step: Step = lambda *_: None,
) -> Iterator[Report]:
    """One report per folder and precision, as they are done.

    tokens: the arguments prompt, ids and ids_file of `read_tokens`. Raises InputError for an unknown candidate,
    precision, policy or attention before anything runs.
    """
    from refllm.precision import POLICIES, check_dtype

    _one_of("--candidate", candidate, CANDIDATES)
    _one_of("--policy", policy, tuple(POLICIES))
    _one_of("--attn", attention, ("eager", "sdpa"))
    dtypes = [check_dtype(dtype) for dtype in dtypes]
    from refllm.check.transformers_adapter import TransformersCandidate, require_transformers

    require_transformers()
    for folder in folders:
        for dtype in dtypes:

            def load(head: str, folder: Path = folder, dtype: str = dtype) -> Candidate:
                return TransformersCandidate(folder, head=head, dtype=dtype, attention=attention)

            yield check_checkpoint(folder, load, dtype=dtype, policy=policy, tokens=tokens, step=step)


def check_checkpoint(
    folder: Path,
    load_candidate: Callable[[str], Candidate],
    *,
    dtype: str,
    policy: str,
    tokens: dict[str, Any],
    step: Step = lambda *_: None,
) -> Report:
    """Checks one candidate, loaded by `load_candidate(head)`, on one checkpoint in one precision.

    The three runs follow each other, so that only one model is in memory at a time.
    """
    import refllm

    name = folder.name
    config = refllm.AutoConfig.from_pretrained(folder)
    input_ids_BS, notes = tokens_for(folder, config, tokens)
    step(f"{name}: exact run")
    exact_model = refllm.load(folder, dtype="float64")
    head = exact_model.head
    if stored_dtypes(folder) != {dtype}:
        round_weights(exact_model, dtype)
    exact = ReferenceCandidate(exact_model).run(input_ids_BS)
    del exact_model
    step(f"{name}: reference in {dtype}")
    yardstick = yardstick_trace(folder, head, dtype, policy, input_ids_BS)
    step(f"{name}: candidate in {dtype}")
    candidate = load_candidate(head)
    trace = candidate.run(input_ids_BS)
    next_tokens = (
        compare_next_tokens(exact["lm_head"], yardstick["lm_head"], trace["lm_head"]) if head == "causal_lm" else None
    )
    return Report(
        checkpoint=name,
        candidate=candidate.name,
        dtype=dtype,
        policy=policy,
        tokens=int(input_ids_BS.shape[1]),
        taps=compare_traces(exact, yardstick, trace),
        next_tokens=next_tokens,
        notes=notes,
    )


def yardstick_trace(folder: Path, head: str, dtype: str, policy: str, input_ids_BS: np.ndarray) -> Trace:
    """The reference's own run in the candidate's precision.

    For float64 that is float32: a float64 model of Transformers still computes norms, rotation angles and softmax in
    float32, so float32 is the precision it may be held to.
    """
    import refllm

    model = refllm.load(folder, head=head, dtype="float32" if dtype == "float64" else dtype, policy=policy)
    return ReferenceCandidate(model).run(input_ids_BS)


def round_weights(model: Any, dtype: str) -> None:
    """Puts an exact model's weights onto the grid of `dtype`, so that the check measures arithmetic and not storage."""
    from refllm.precision import rounding

    if dtype != "float64":
        for values in model.weights.values():
            values[...] = rounding(dtype)(values.astype(np.float32))


def stored_dtypes(folder: Path) -> set[str]:
    """The precisions of the tensors in the files."""
    from refllm.checkpoint import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        return {checkpoint.dtype(name) for name in checkpoint.names}


def tokens_for(folder: Path, config: Any, tokens: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The tokens asked for; else a text of our own through the folder's tokenizer; else, with a note, random ids."""
    from refllm.errors import TokenizerError
    from refllm.token_input import read_tokens

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


def overall(reports: list[Report]) -> Verdict:
    """fails if one fails, else untested if one is, else holds."""
    verdicts = {report.verdict for report in reports}
    return "fails" if "fails" in verdicts else "untested" if "untested" in verdicts else "holds"


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{option} {value} is not known: use {' or '.join(known)}")
