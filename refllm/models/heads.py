"""The heads: what is done with the last hidden state, and the losses.

    causal LM                 logits = W_lm x                     (W_lm = E[.] when tied)
    sequence classification   logits = W_score x_t, t the last token that is not padding
    token classification      logits = W_score x + b
    question answering        start, end = W_qa x + b

`logits` functions are bound to an arithmetic through `op`; `loss` functions take logits and labels, upcast to at least
float32, and return a number. Source: Transformers, modeling_layers and loss/loss_utils.
"""

import warnings

import numpy as np

from refllm.errors import InputError
from refllm.inputs import as_array, as_integers
from refllm.ops import IGNORE_INDEX

HEADS = ("base", "causal_lm", "sequence_classification", "token_classification", "question_answering")

_ARGUMENTS = {  # what a call may give beside its tokens
    "base": (),
    "causal_lm": ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep"),
    "sequence_classification": ("labels", "num_items_in_batch"),
    "token_classification": ("labels", "num_items_in_batch", "ignore_index"),
    "question_answering": ("start_positions", "end_positions", "num_items_in_batch"),
}

_ROWS_AT_ONCE = 4096  # rows of W_lm converted at a time in low-memory mode


def check_arguments(head, given):
    """InputError if `given`, a set of names, holds one that this head has no use for."""
    for name in sorted(given - {*_ARGUMENTS[head]}):
        takes = ", ".join(_ARGUMENTS[head]) or "none"
        raise InputError(f"{name}: not an argument of head {head!r}; beside tokens, masks and cache it takes {takes}")


def tensors(c, head):
    """Name -> shape of the head's own tensors."""
    C, E = c.num_labels, c.hidden_size
    return {
        "base": {},
        "causal_lm": {} if c.tie_word_embeddings else {"lm_head.weight": (c.vocab_size, E)},
        "sequence_classification": {"score.weight": (C, E)},
        "token_classification": {"score.weight": (C, E), "score.bias": (C,)},
        "question_answering": {"qa_outputs.weight": (2, E), "qa_outputs.bias": (2,)},
    }[head]


def causal_lm(op, c, w, x_BSE):
    """Logits [B, S, V]. No bias, and one rounding at the end."""
    if not w.low_memory:
        return op.tap("lm_head", op.linear(x_BSE, w["lm_head.weight"]))
    blocks = [op.linear(x_BSE, rows) for rows in w.chunks("lm_head.weight", _ROWS_AT_ONCE)]
    return op.tap("lm_head", np.concatenate(blocks, axis=-1))


def select(x_BSE, logits_to_keep):
    """The positions of x_BSE that logits are wanted for.

    int n: the last n (0: all; -n: all but the first n); int array [n]: those positions of every row; int array [B, n]:
    those of each row; bool array [B, S]: the marked ones, row after row, as [N, E]. Else InputError.
    """
    B, S, _ = x_BSE.shape
    keep = as_array("logits_to_keep", logits_to_keep)
    if keep.ndim == 0 and np.issubdtype(keep.dtype, np.integer):
        return x_BSE[:, -int(keep) :] if keep else x_BSE
    if keep.ndim == 2 and keep.dtype == bool and keep.shape == (B, S):
        return x_BSE[keep]
    if not np.issubdtype(keep.dtype, np.integer) or keep.ndim > 2 or (keep.ndim == 2 and keep.shape[0] != B):
        raise InputError(
            f"logits_to_keep: expected an int, positions [n] or [{B}, n], or a bool mask [{B}, {S}]; found "
            f"{keep.dtype} of shape {keep.shape}"
        )
    if keep.size and (keep.min() < -S or keep.max() >= S):
        bad = keep.max() if keep.max() >= S else keep.min()
        raise InputError(f"logits_to_keep: position {bad} is outside 0..{S - 1}, the positions of this call")
    return x_BSE[:, keep] if keep.ndim == 1 else x_BSE[np.arange(B)[:, None], keep]


def causal_lm_loss(op, logits_BSV, labels_BS, *, shift_labels=None, num_items_in_batch=None, ignore_index=IGNORE_INDEX):
    """Mean over counted positions of -log softmax(logits[s])[labels[s + 1]].

    shift_labels: [B, S], used instead of the shifted labels. num_items_in_batch: divides the sum instead of the count.
    """
    if shift_labels is not None:
        return _token_loss(op, logits_BSV, shift_labels, "shift_labels", num_items_in_batch, ignore_index)
    labels_BS = as_integers("labels", labels_BS)
    if labels_BS.ndim == 2:
        labels_BS = np.pad(labels_BS[:, 1:], ((0, 0), (0, 1)), constant_values=ignore_index)
    return _token_loss(op, logits_BSV, labels_BS, "labels", num_items_in_batch, ignore_index)


def token_loss(op, logits_BSC, labels_BS, *, num_items_in_batch=None, ignore_index=IGNORE_INDEX):
    """Mean over counted positions of the cross entropy, nothing shifted."""
    return _token_loss(op, logits_BSC, labels_BS, "labels", num_items_in_batch, ignore_index)


def _token_loss(op, logits, labels, name, num_items_in_batch, ignore_index):
    labels = as_integers(name, labels)
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"{name}: shape {labels.shape} for logits of shape {logits.shape}; expected {logits.shape[:-1]}"
        )
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return _mean_loss(op, rows, targets, num_items_in_batch, ignore_index)


def _mean_loss(op, rows, targets, num_items_in_batch, ignore_index):
    if as_integers("ignore_index", ignore_index).ndim:
        raise InputError(f"ignore_index: expected one integer, found {ignore_index!r}")
    if num_items_in_batch is None:
        return op.cross_entropy(rows, targets, ignore_index=ignore_index)
    items = as_array("num_items_in_batch", num_items_in_batch)
    if items.size != 1 or items.item() <= 0:
        raise InputError(f"num_items_in_batch: expected one number above 0, found {num_items_in_batch!r}")
    return op.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / items.item()


def sequence_logits(op, c, w, x_BSE, input_ids):
    """Logits [B, C] at the last token of each row that is not padding (by token id, whatever the mask says).

    Without ids (inputs_embeds) or without a pad id the last position is taken; InputError for a batch without a pad id.
    """
    logits_BSC = op.tap("score", op.linear(x_BSE, w["score.weight"]))
    B, S, _ = x_BSE.shape
    last_B = np.full(B, S - 1)
    if c.pad_token_id is None and B > 1:
        raise InputError(
            "config.json: pad_token_id is not set, so where the rows of a batch end cannot be told; set it, or give "
            "rows one at a time"
        )
    if input_ids is None and c.pad_token_id is not None:
        warnings.warn(
            "inputs_embeds do not show which positions are padding; each row is judged at its last position",
            UserWarning,
            stacklevel=4,
        )
    if input_ids is not None and c.pad_token_id is not None:
        # -1 stands for the last row of the vocabulary nowhere else: no token has that id, so nothing is padding.
        last_B = ((input_ids != c.pad_token_id) * np.arange(S)).argmax(axis=-1)
    return logits_BSC[np.arange(B), last_B]


def sequence_loss(op, c, logits_BC, labels):
    """Mean squared error, cross entropy or binary cross entropy, by c.problem_type, which is inferred once if None."""
    labels, problem = as_array("labels", labels), c.problem_type
    if problem is None:
        integer = np.issubdtype(labels.dtype, np.integer)
        several = "single_label_classification" if integer else "multi_label_classification"
        problem = several if c.num_labels > 1 else "regression"
    if problem == "regression":
        loss = op.mean_squared_error(*_same_shape(logits_BC.squeeze(), labels.squeeze(), problem))
    elif problem == "single_label_classification":
        loss = op.cross_entropy(*_same_rows(logits_BC, as_integers("labels", labels).reshape(-1), "labels"))
    else:
        loss = op.binary_cross_entropy(*_same_shape(logits_BC, labels, problem))
    c.problem_type = problem  # only now: labels that do not fit must not decide about later calls
    return loss


def question_loss(op, start_BS, end_BS, start_positions, end_positions, *, num_items_in_batch=None):
    """Mean of the two cross entropies. Positions [B]: S and beyond are not counted, negative ones count as 0."""

    def one(name, logits_BS, positions):
        S = logits_BS.shape[1]
        logits_BS, positions = _same_rows(logits_BS, as_integers(name, positions).reshape(-1), name)
        return _mean_loss(op, logits_BS, np.clip(positions, 0, S), num_items_in_batch, S)

    return (one("start_positions", start_BS, start_positions) + one("end_positions", end_BS, end_positions)) / 2


def _same_shape(logits, labels, problem):
    if logits.shape != labels.shape:
        raise InputError(
            f"labels: shape {labels.shape} for {problem} with logits of shape {logits.shape}; they must be equal"
        )
    return logits, labels


def _same_rows(logits, labels, name):
    if len(logits) != len(labels):
        raise InputError(f"{name}: {len(labels)} for a batch of {len(logits)}; expected one per row")
    return logits, labels
