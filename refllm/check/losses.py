"""Whether a loss is the loss of its logits, and a catalogue of losses that are not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.propagation import ulp
from refllm.forward.operators import Operators
from refllm.models import heads
from refllm.ops import IGNORE_INDEX

_ADDITIONS = 8.0  # roundings at full size when a mean is taken: see `_total_noise` in refllm.accuracy.propagation


@dataclass(frozen=True)
class LossReport:
    """A loss against the exact loss of the same logits. sigma: predicted error of float32 arithmetic."""

    loss: float
    exact: float
    sigma: float

    @property
    def sigmas(self) -> float:
        return abs(self.loss - self.exact) / self.sigma

    @property
    def holds(self) -> bool:
        return bool(self.sigmas <= limits.LOSS)


def compare_loss(logits_BSV: np.ndarray, labels_BS: np.ndarray, loss: float) -> LossReport:
    """`loss` against the mean of -log softmax(logits[s])[labels[s + 1]] over the labels that are not -100.

    Each position rounds its logit, its log-sum-exp and their difference in float32; the mean rounds a few times more.
    """
    logits_BSV = logits_BSV.astype(np.float64)
    exact = float(heads.causal_lm_loss(Operators(), logits_BSV, labels_BS))
    counted = labels_BS[:, 1:] != IGNORE_INDEX
    largest = np.abs(logits_BSV[:, :-1]).max(axis=-1)[counted]
    variance = float((4 * ulp(largest, "float32") ** 2 / 12).sum() / max(1, counted.sum()) ** 2)
    variance += _ADDITIONS * float(ulp(np.array(exact), "float32")) ** 2 / 12
    return LossReport(float(loss), exact, float(np.sqrt(variance)))


Loss = Callable[[Any, Any], Any]
"""loss(logits [B, S, V], labels [B, S]) -> a number; tensors of Torch."""


def _mean(logits: Any, labels: Any, *, shift: int = 1, ignore: int = IGNORE_INDEX) -> Any:
    import torch

    S = labels.shape[1]
    rows = logits[:, : S - shift].reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(rows, labels[:, shift:].reshape(-1), ignore_index=ignore)


def _over_all(logits: Any, labels: Any) -> Any:
    counted = (labels[:, 1:] != IGNORE_INDEX).sum()
    return _mean(logits, labels) * counted / labels[:, 1:].numel()


def _in_bfloat16(logits: Any, labels: Any) -> Any:
    """The logarithm of softmax is rounded to bfloat16 before it is averaged."""
    import torch

    log_p = torch.log_softmax(logits[:, :-1].float(), dim=-1).bfloat16().float()
    targets = labels[:, 1:]
    chosen = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen[targets != IGNORE_INDEX].mean()


correct: Loss = _mean
"""The loss as it should be."""

MUTANTS: dict[str, Loss] = {
    "label shift missing": lambda logits, labels: _mean(logits, labels, shift=0),
    "label shift doubled": lambda logits, labels: _mean(logits, labels, shift=2),
    "ignored labels counted": lambda logits, labels: _mean(logits, labels.clamp(min=0)),
    "mean over all positions": _over_all,
    "log-softmax rounded to bfloat16": _in_bfloat16,
}
