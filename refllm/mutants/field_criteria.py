"""What other projects ask of an implementation before they call it right: thresholds on its logits.

Each is written down once, as a sentence and as a function; the numbers are those of the projects that are named. They
compare with a known run (Transformers' eager model in the same format), the last but one with the exact run as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PROMPT, GREEDY, TOP, KL_TOKENS = 16, 20, 10, 4
ATOL = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Evidence:
    """One run. found, known, exact: logits [S, V] of the candidate, of the known run and of the exact one. greedy: the
    tokens that the candidate continues a prompt with, as far as they are `known_greedy`, the known run's."""

    found: np.ndarray
    known: np.ndarray
    exact: np.ndarray
    dtype: str
    greedy: list[int]
    known_greedy: list[int]


@dataclass(frozen=True)
class Criterion:
    """name: short. text: one sentence on what holds. source: who asks for it. holds: of a run."""

    name: str
    text: str
    source: str
    holds: Callable[[Evidence], bool]


def _nmse(e: Evidence) -> bool:
    return bool(np.mean(np.square(e.found - e.known)) < 1e-2 * np.var(e.known))


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _kl(e: Evidence) -> bool:
    known, found = (_log_softmax(z[:KL_TOKENS]) for z in (e.known, e.found))
    return bool((np.exp(known) * (known - found)).sum(axis=-1).max() < 0.1)


def _cosine(e: Evidence) -> bool:
    sizes = np.linalg.norm(e.found) * np.linalg.norm(e.known)
    return bool(np.sum(e.found * e.known) > 0.99 * sizes)


def _top(e: Evidence) -> bool:
    first, second = (np.argsort(-z[-1], kind="stable")[:TOP] for z in (e.found, e.known))
    return bool(np.array_equal(first, second))


def _greedy(e: Evidence) -> bool:
    return e.greedy == e.known_greedy


def _ratio(e: Evidence) -> bool:
    return bool(np.abs(e.found - e.exact).max() <= 2 * np.abs(e.known - e.exact).max())


def _allclose(e: Evidence) -> bool:
    return bool(np.allclose(e.found, e.known, atol=ATOL[e.dtype]))


CRITERIA: tuple[Criterion, ...] = (
    Criterion(
        "NMSE < 1e-2",
        "The mean square of the difference to the known run's logits is under 1 % of their variance.",
        "llama.cpp's scripts for converted models call that a good match",
        _nmse,
    ),
    Criterion(
        "KL < 0.1, 4 tokens",
        "After each of the first 4 tokens the Kullback-Leibler divergence of the next token's distribution from the "
        "known run's is under 0.1.",
        "MaxText's checker of forward passes, which takes the limit (0.015 and more) and the number of tokens",
        _kl,
    ),
    Criterion(
        "cosine > 0.99",
        "All logits as one vector have a cosine of more than 0.99 with the known run's.",
        "common in reports on exported and quantised models",
        _cosine,
    ),
    Criterion(
        "same top 10",
        "The ten most probable tokens after the last one are the known run's, in the same order.",
        "common in checks of converted checkpoints, which print both lists",
        _top,
    ),
    Criterion(
        "20 greedy tokens",
        f"A prompt of {PROMPT} tokens is continued greedily by the same {GREEDY} tokens as in the known run.",
        "vLLM's tests of models, and the integration tests of Transformers",
        _greedy,
    ),
    Criterion(
        "error ratio <= 2",
        "The largest error of the logits, against the exact ones, is at most twice that of the known run.",
        "FlashAttention's tests (of attention alone), with a run of plain PyTorch as the known one",
        _ratio,
    ),
    Criterion(
        "allclose",
        "All logits are within 1e-2 (bfloat16), 1e-3 (float16) or 1e-5 (float32), and 1e-5 of their size, of the known "
        "run's.",
        "the tolerances of many tests of kernels, Liger-Kernel's among them, which add a relative one",
        _allclose,
    ),
)
"""What is compared with this check."""
