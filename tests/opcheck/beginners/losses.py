"""Losses as beginners write them."""

import numpy as np
import torch
import torch.nn.functional as F

from beginners import beginner


def reduced(loss, counted, reduction):
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else np.asarray(total / np.float32(counted) if counted else np.nan, loss.dtype)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def picked(logp, labels, ignore_index):
    """-log p of the label, 0 where it does not count; and how many count."""
    keep = labels != ignore_index
    safe = np.where(keep, labels, 0)
    loss = -logp[np.arange(len(labels)), safe]
    return np.where(keep, loss, 0).astype(logp.dtype), int(keep.sum())


@beginner("cross_entropy")
def loss_no_maximum(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The maximum is not subtracted: exp overflows."""
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return reduced(*picked(logp, labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_mean_of_all(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The mean is taken over all rows, with those that are ignored."""
    loss, _ = picked(log_softmax(logits), labels, ignore_index)
    return reduced(loss, len(loss), reduction)


@beginner("cross_entropy", "torch")
def loss_label_clipped(logits, labels, *, ignore_index=-100, reduction="mean"):
    """Ignored rows count, as if their label were 0."""
    labels = torch.where(labels == ignore_index, 0, labels)
    return F.cross_entropy(logits, labels, reduction=reduction)


@beginner("cross_entropy", "torch")
def loss_shifted(logits, labels, *, ignore_index=-100, reduction="mean"):
    """Labels are shifted by one: row i has the label of row i + 1."""
    if reduction == "none":
        one = F.cross_entropy(logits[:-1], labels[1:], ignore_index=ignore_index, reduction="none")
        return torch.cat((one, one.new_zeros(min(1, len(logits)))))
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=ignore_index, reduction=reduction)


@beginner("cross_entropy")
def loss_sign(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The sign is wrong: log p, not -log p."""
    loss, counted = picked(log_softmax(logits), labels, ignore_index)
    return reduced(-loss, counted, reduction)


@beginner("cross_entropy", "torch")
def loss_softmax_twice(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The softmax is taken twice."""
    probs = torch.softmax(logits, -1)
    return F.cross_entropy(probs, labels, ignore_index=ignore_index, reduction=reduction)


@beginner("cross_entropy")
def loss_clipped(logits, labels, *, ignore_index=-100, reduction="mean"):
    """A small number is added inside the logarithm: log(p + 1e-9)."""
    p = np.exp(log_softmax(logits))
    return reduced(*picked(np.log(p + 1e-9), labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_clipped_below(logits, labels, *, ignore_index=-100, reduction="mean"):
    """p is clipped from below before the logarithm: max(p, 1e-7)."""
    p = np.clip(np.exp(log_softmax(logits)), 1e-7, 1)
    return reduced(*picked(np.log(p), labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_sum_for_mean(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The sum is returned where the mean is asked for."""
    loss, _counted = picked(log_softmax(logits), labels, ignore_index)
    return loss if reduction == "none" else loss.sum()


@beginner("cross_entropy")
def loss_mean_for_sum(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The argument reduction "sum" is not known: the mean is returned."""
    loss, counted = picked(log_softmax(logits), labels, ignore_index)
    return loss if reduction == "none" else reduced(loss, counted, "mean")


@beginner("cross_entropy", "torch")
def loss_own_ignore_index(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The argument ignore_index is not used; rows with a label of that value count."""
    return F.cross_entropy(logits, labels, reduction=reduction)


@beginner("cross_entropy")
def loss_base_2(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The logarithm has the base 2."""
    logp = np.log2(np.exp(log_softmax(logits)))
    return reduced(*picked(logp, labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_axis_0(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The softmax runs over the rows (axis 0), not along each row."""
    z = logits - logits.max(axis=0, initial=-np.inf)
    logp = z - np.log(np.exp(z).sum(axis=0))
    return reduced(*picked(logp, labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_mean_over_classes(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The mean runs over the classes as well: too small by V."""
    loss, counted = picked(log_softmax(logits), labels, ignore_index)
    return reduced(loss, counted * logits.shape[-1], reduction)


@beginner("cross_entropy")
def loss_no_logarithm(logits, labels, *, ignore_index=-100, reduction="mean"):
    """1 - p in place of -log p."""
    p = np.exp(log_softmax(logits))
    return reduced(*picked(p - 1, labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_no_denominator(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The logit alone: the logarithm of the sum is missing."""
    return reduced(*picked(logits, labels, ignore_index), reduction)


@beginner("cross_entropy")
def loss_label_of_next_class(logits, labels, *, ignore_index=-100, reduction="mean"):
    """Labels are taken to begin at 1: the class before the label is read."""
    keep = labels != ignore_index
    safe = np.where(keep, labels - 1, 0)
    loss = np.where(keep, -log_softmax(logits)[np.arange(len(labels)), safe], 0).astype(logits.dtype)
    return reduced(loss, int(keep.sum()), reduction)


@beginner("cross_entropy")
def loss_maximum_not_added_back(logits, labels, *, ignore_index=-100, reduction="mean"):
    """The maximum is subtracted in the sum and not added back: the label's logit is not shifted."""
    z = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(z).sum(-1, keepdims=True))
    return reduced(*picked(logp, labels, ignore_index), reduction)


@beginner("linear_cross_entropy")
def linear_mean_of_all(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The mean is taken over all rows, with those that are ignored."""
    loss, _ = picked(log_softmax(x @ weight.T), labels, ignore_index)
    return reduced(loss, len(loss), reduction)


@beginner("linear_cross_entropy")
def linear_scaled(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The logits are divided by sqrt(E)."""
    z = x @ weight.T / np.float32(x.shape[-1]) ** 0.5
    return reduced(*picked(log_softmax(z), labels, ignore_index), reduction)


@beginner("linear_cross_entropy")
def linear_no_maximum(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The maximum is not subtracted: exp overflows."""
    z = x @ weight.T
    return reduced(*picked(z - np.log(np.exp(z).sum(-1, keepdims=True)), labels, ignore_index), reduction)


@beginner("linear_cross_entropy", "torch")
def linear_mean_of_chunks(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The mean is the mean of the means of chunks, which count different numbers of rows."""
    losses = []
    for part, wanted in zip(x.split(4), labels.split(4), strict=True):
        losses.append(F.cross_entropy(part @ weight.T, wanted, ignore_index=ignore_index, reduction=reduction))
    if reduction == "none":
        return torch.cat(losses) if losses else x.new_zeros(0)
    stacked = torch.stack(losses)
    return stacked.mean() if reduction == "mean" else stacked.sum()


@beginner("linear_cross_entropy", "torch")
def linear_label_clipped(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """Ignored rows count, as if their label were 0."""
    return F.cross_entropy(x @ weight.T, labels.masked_fill(labels == ignore_index, 0), reduction=reduction)


@beginner("linear_cross_entropy", "torch")
def linear_last_chunk(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The last, shorter chunk of classes is left out of the sum."""
    z = x @ weight.T
    V, chunk = len(weight), 16
    whole = max(chunk, V // chunk * chunk)
    lse = torch.logsumexp(z[:, :whole], -1)
    keep = labels != ignore_index
    at = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = torch.where(keep, lse - at, 0)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / keep.sum()


@beginner("linear_cross_entropy")
def linear_not_rescaled(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The running sum is not rescaled when a later chunk of classes has a larger maximum."""
    z = x @ weight.T
    top, total = np.full(len(z), -np.inf, z.dtype), np.zeros(len(z), z.dtype)
    for start in range(0, z.shape[-1], 8):
        part = z[:, start : start + 8]
        top = np.maximum(top, part.max(-1))
        total = total + np.exp(part - top[:, None]).sum(-1)
    logp = z - (np.log(total) + top)[:, None]
    return reduced(*picked(logp, labels, ignore_index), reduction)


@beginner("linear_cross_entropy", "torch")
def linear_softmax_twice(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    """The softmax is taken twice."""
    probs = torch.softmax(x @ weight.T, -1)
    return F.cross_entropy(probs, labels, ignore_index=ignore_index, reduction=reduction)
