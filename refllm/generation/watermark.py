"""Watermarked sampling: a random "green" part of the vocabulary, fixed by the previous tokens, gets a bonus.

Whoever knows the key can count green tokens and so tell generated text from other text. Source: Kirchenbauer et al.,
"A Watermark for Large Language Models" (arXiv:2301.10226) and "On the Reliability of Watermarks for Large Language
Models" (arXiv:2306.04634); `WatermarkLogitsProcessor` of Transformers 5.23.0, whose random permutations (those of
`torch.randperm` on the CPU) are reproduced exactly, so that its detector finds the watermark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from refllm.config.values import read_choice, read_float, read_int
from refllm.errors import ConfigError, InputError

TABLE_SIZE = 1_000_003
"""Entries of the hash table of the "selfhash" scheme (Transformers: `WatermarkLogitsProcessor.table_size`)."""

CANDIDATES = 40
"""The "selfhash" scheme considers this many of the best tokens only (Transformers, after the authors' code)."""


@dataclass(frozen=True)
class WatermarkingConfig:
    """Part of the vocabulary that is green, its bonus, the key, what is hashed, how many tokens of context."""

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        source = "watermarking_config"
        try:
            if not 0.0 < read_float(source, "greenlist_ratio", self.greenlist_ratio) < 1.0:
                raise ConfigError(f"{source}: greenlist_ratio={self.greenlist_ratio} must lie between 0 and 1")
            read_float(source, "bias", self.bias)
            read_int(source, "hashing_key", self.hashing_key, minimum=-(2**31))
            read_choice(source, "seeding_scheme", self.seeding_scheme, ("lefthash", "selfhash"))
            read_int(source, "context_width", self.context_width, minimum=1)
        except ConfigError as error:
            raise InputError(str(error)) from None


def permutation_head(size: int, count: int, seed: int) -> np.ndarray:
    """The first `count` entries of `torch.randperm(size)` under `torch.manual_seed(seed)`, int64 [count].

    Fisher-Yates: for i = 0, 1, ...: exchange entry i with entry i + (u_i mod (size - i)), where u_i are the 32-bit
    outputs of the Mersenne Twister MT19937 started from the low 32 bits of the seed. Source: ATen `randperm_cpu`.
    """
    count = min(count, size)
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=count, dtype=np.uint32)
    steps = (words.astype(np.int64) % (size - np.arange(count))).tolist()
    order = list(range(size))
    for i, step in enumerate(steps):
        order[i], order[i + step] = order[i + step], order[i]
    return np.array(order[:count], dtype=np.int64)


@cache
def _hash_table(key: int) -> np.ndarray:
    return permutation_head(TABLE_SIZE, TABLE_SIZE, key)


class WatermarkLogitsProcessor:
    """Adds `bias` to the scores of the green tokens, a pseudo-random part of the vocabulary.

    lefthash: green = first int(V * ratio) entries of the permutation of the vocabulary with seed key * last token.
    selfhash: for each of the 40 best tokens t: with the table h, a permutation, and the context c of the last
    `context_width` tokens, t included, the seed is min over c of key * (h[c] + 1) * (h[t] + 1) (in 64 bits, which
    overflow); t gets the bonus if it is in its own green list.
    """

    def __init__(self, vocab_size: int, config: WatermarkingConfig) -> None:
        self.vocab_size = vocab_size
        self.config = config
        self.green_size = int(vocab_size * config.greenlist_ratio)

    def _green_ids(self, context: np.ndarray) -> np.ndarray:
        key = self.config.hashing_key
        context = context[-self.config.context_width :]
        if self.config.seeding_scheme == "lefthash":
            seed = key * int(context[-1])
        else:
            table = _hash_table(key)
            with np.errstate(over="ignore"):
                hashes = np.int64(key) * (table[context % TABLE_SIZE] + 1) * (table[context[-1] % TABLE_SIZE] + 1)
            seed = int(hashes.min())
        return permutation_head(self.vocab_size, self.green_size, seed % (2**64 - 1))

    def _self_green_ids(self, row: np.ndarray, scores_V: np.ndarray) -> list[int]:
        best = np.argsort(-scores_V, kind="stable")[:CANDIDATES]
        return [int(token) for token in best if token in self._green_ids(np.append(row, token))]

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with the bonus added; unchanged where the text is shorter than the context."""
        if ids_BT.shape[1] < self.config.context_width:
            return scores_BV
        scores_BV = scores_BV.copy()
        for row, scores_V in zip(ids_BT, scores_BV, strict=True):
            selfhash = self.config.seeding_scheme == "selfhash"
            green = self._self_green_ids(row, scores_V) if selfhash else self._green_ids(row)
            scores_V[green] += scores_V.dtype.type(self.config.bias)
        return scores_BV
