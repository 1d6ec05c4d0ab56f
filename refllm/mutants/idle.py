"""How much of a checkpoint is idle, and what sticks out: what tells trained weights from designed ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_TOKENS = 256


@dataclass(frozen=True)
class Idle:
    """The figures of one checkpoint, on 256 tokens of the corpus.

    certain: the median of the largest next-token probability. activation, weight: the largest number of any MLP's
    activations, and of any matrix, over the RMS there. directions: of the projection that uses the fewest, which share
    of its directions counts: (sum s^2)^2 / sum s^4 of its singular values, over their number. keys: of the head that
    chooses least, at how many keys it looks in effect, e to the entropy of its weights, in the last 64 rows.
    """

    checkpoint: str
    certain: float
    activation: float
    weight: float
    directions: float
    keys: float


def idle(folder: Path) -> Idle:
    """The figures of a checkpoint."""
    import refllm
    from refllm.golden.train_checkpoints import documents

    model = refllm.load(folder, head="causal_lm")
    ids = documents(refllm.AutoTokenizer.from_pretrained(folder))[None, :_TOKENS]
    seen = _Seen()
    logits = model(ids, recorder=seen, use_cache=False).logits[0].astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    matrices = {name: x for name, x in model.named_parameters() if x.ndim == 2}
    return Idle(
        folder.name,
        certain=float(np.median(1 / odds.sum(-1))),
        activation=max(map(_peak, seen.activations)),
        weight=max(map(_peak, matrices.values())),
        directions=min(_directions(x) for name, x in matrices.items() if "_proj." in name),
        keys=max(map(_keys, seen.weights)),
    )


class _Seen:
    """Keeps activations, and the weights of attention."""

    def __init__(self) -> None:
        self.activations: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def wants(self, name: str) -> bool:
        return name.endswith((".mlp.act", ".self_attn.probs"))

    def record(self, name: str, value: Any) -> None:
        (self.activations if name.endswith("act") else self.weights).append(np.array(value, np.float64))


def _peak(x: np.ndarray) -> float:
    return float(np.abs(x).max() / np.sqrt(np.square(x, dtype=np.float64).mean()))


def _directions(weight: np.ndarray) -> float:
    energy = np.square(np.linalg.svd(weight.astype(np.float64), compute_uv=False))
    return float(energy.sum() ** 2 / np.square(energy).sum() / len(energy))


def _keys(p_BHST: np.ndarray) -> float:
    p = p_BHST[:, :, -64:]
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    return float(np.exp(entropy).mean((0, 2)).max())
