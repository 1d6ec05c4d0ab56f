"""What a check of gradients runs: the tokens with labels, a padded batch in micro-batches, and under stress more."""

from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from refllm.check.inputs import FAR, NOT_COUNTED, Inputs, Learning, padded_rows
from refllm.check.taps import EVERYTHING, GRADIENTS, LOSS_SCALE, MICRO_BATCHES, Candidate
from refllm.errors import InputError
from refllm.forward.gradients import tensor_names
from refllm.forward.model import Model

SCALE = {"float16": 1024.0}
"""What a loss is multiplied with, by dtype: gradients of a mean over many tokens are below what float16 holds."""
_NARROW_LOSSES = ("sequence_classification", "question_answering")
_HEADS = ("causal_lm", "token_classification", "sequence_classification", "question_answering")


def must_show_gradients(candidate: Candidate) -> None:
    """Raises InputError for a candidate that has no backward pass to show."""
    if GRADIENTS not in getattr(candidate, "takes", EVERYTHING):
        raise InputError(
            f"{candidate.name}: it shows no gradients; --backward takes Transformers' models, torch modules, and "
            "functions with an argument labels (docs/gradients.md). The fast models, torch and triton, "
            "are not checked so yet"
        )


def with_labels(inputs: Inputs, model: Model, candidate: Candidate, frozen: Collection[str] = ()) -> Inputs:
    """The same run with the candidate's gradients asked for. frozen: names or patterns of tensors that learn nothing.

    Raises InputError for a model without a loss, and for a pattern that is the name of no tensor.
    """
    if model.head in _NARROW_LOSSES and candidate.dtype in ("bfloat16", "float16"):
        raise InputError(
            f"--backward: the loss of {model.head} is computed in {candidate.dtype} itself by Transformers, whose "
            "gradients are not predicted: use --dtype float32"
        )
    if model.head not in _HEADS:
        raise InputError(f"--backward: a checkpoint with the head {model.head!r} has no loss; use one with a head")
    names = list(tensor_names(model).values())
    for pattern in frozen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"--frozen {pattern} is the name of no tensor; the first of all is {names[0]}")
    still = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in frozen))
    scaled = LOSS_SCALE in getattr(candidate, "takes", EVERYTHING)
    scale = SCALE.get(candidate.dtype, 1.0) if scaled else 1.0
    return replace(inputs, learning=Learning(_labels(inputs, model), scale=scale, frozen=still))


def _labels(inputs: Inputs, model: Model) -> np.ndarray:
    """A language model has the tokens, but not padding, nor the first token behind it, which padding predicts."""
    B, S = inputs.input_ids.shape
    classes = int(getattr(model.config, "num_labels", 2))
    if model.head == "sequence_classification":
        return np.arange(B) % max(1, classes)
    if model.head == "question_answering":
        return np.stack([np.arange(B) % S, np.minimum(S - 1, np.arange(B) + S // 2)], axis=1)
    labels = inputs.input_ids % classes if model.head == "token_classification" else inputs.input_ids
    before = np.pad(inputs.valid[:, :-1], ((0, 0), (1, 0)))
    counts = inputs.valid & (before if model.head == "causal_lm" else True)
    return np.where(counts, labels, NOT_COUNTED)


def more_runs(plain: Inputs, model: Model, candidate: Candidate, stress: bool) -> list[Inputs]:
    """Runs besides the plain one: a batch of rows that are padded differently, in two micro-batches, with prompts whose
    labels do not count; under stress also packed rows and far positions."""
    takes, learning = getattr(candidate, "takes", EVERYTHING), plain.learning
    assert learning is not None
    (B, S), runs = plain.input_ids.shape, []
    if S > 1 and {"batch", "mask", "positions"} <= {*takes}:
        ids, mask, positions = padded_rows(plain.input_ids)
        batch = with_labels(Inputs(ids, mask, positions, label="padded rows"), model, candidate, learning.frozen)
        assert batch.learning is not None
        labels = batch.learning.labels.copy()
        if model.head == "causal_lm":
            labels[1, : S // 3] = NOT_COUNTED
        # Of the heads of Transformers, only that of a language model divides by the labels of all micro-batches.
        parts = 2 if MICRO_BATCHES in takes and model.head == "causal_lm" else 1
        label = "padded rows in 2 micro-batches" if parts > 1 else "padded rows"
        more = replace(batch.learning, labels=labels, micro_batches=parts)
        runs.append(replace(batch, learning=more, label=label))
    if stress and "positions" in takes:
        far = np.broadcast_to(np.arange(FAR, FAR + S), (B, S)).copy()
        runs.append(replace(plain, position_ids=far, label="far positions"))
        if S > 3 and model.head == "causal_lm" and MICRO_BATCHES in takes:
            runs.append(_packed(plain, learning))
    return runs


def _packed(plain: Inputs, learning: Learning) -> Inputs:
    """Two sequences in every row, of which none sees the other."""
    S = plain.input_ids.shape[1]
    first = S // 3 + 1
    positions = np.r_[np.arange(first), np.arange(S - first)]
    labels = learning.labels.copy()
    labels[:, first] = NOT_COUNTED
    return replace(
        plain,
        position_ids=np.broadcast_to(positions, plain.input_ids.shape).copy(),
        learning=replace(learning, labels=labels, packed=True),
        label="packed rows",
    )
