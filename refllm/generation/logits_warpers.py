"""Logits warpers: the processors that shape the distribution before a token is drawn from it.

Same calls and conventions as in `refllm.generation.logits_process`. `min_tokens_to_keep` tokens survive every rule (1;
with beams the number of end-of-sequence ids + 1, so that a beam can always go on). p is softmax(s). Names and rules are
those of `transformers.generation.logits_process` (5.23.0). Among exactly equal scores its sort is unstable; here the
lowest token id counts as the better one. A parameter out of its range raises InputError.
"""

from __future__ import annotations

import numpy as np

from refllm.errors import InputError
from refllm.generation.logits_process import drop, log_softmax, softmax

SMALLEST_TEMPERATURE = 1e-30
"""Divided by less than this, scores leave the range of float32; all but the best token are lost long before."""

TOP_H_CANDIDATES = 100
"""Top-H looks at this many tokens only (Transformers: `TopHLogitsWarper.top_n`)."""


def _between(name: str, value: float, low: float, high: float, closed: str) -> float:
    """The value as a float where it lies in the interval; `closed` holds the brackets, such as "(]"."""
    above = value >= low if closed[0] == "[" else value > low
    below = value <= high if closed[1] == "]" else value < high
    if not (above and below):
        raise InputError(f"{name}={value} must lie in {closed[0]}{low:g}, {high:g}{closed[1]}")
    return float(value)


def _best_first(scores_BV: np.ndarray) -> np.ndarray:
    """Token ids from the largest score to the smallest, lowest id first among equals, [B, V]."""
    return np.argsort(-scores_BV, axis=-1, kind="stable")


def _kth_largest(scores_BV: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest score of each row, [B, 1]; k is cut to V."""
    k = min(k, scores_BV.shape[-1])
    return np.partition(scores_BV, -k, axis=-1)[:, -k, None]


def _running_sum(values_BV: np.ndarray) -> np.ndarray:
    """Cumulative sums, accumulated in float64 and rounded to the type of the input (as `torch.cumsum` does)."""
    return np.cumsum(values_BV, axis=-1, dtype=np.float64).astype(values_BV.dtype)


def _categorical(scores_BV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p = softmax(s) [B, V] and the entropy -sum p ln p [B, 1].

    ln p is s - logsumexp(s), rounded to the type of the scores, as in `torch.distributions.Categorical`. With one
    token of probability nearly 1 the rounding decides what the entropy is.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        best_B1 = scores_BV.max(axis=-1, keepdims=True)
        sums_B1 = np.exp(scores_BV - best_B1, dtype=np.float64).sum(axis=-1, keepdims=True)
        lp_BV = scores_BV - (best_B1 + np.log(sums_B1).astype(scores_BV.dtype))
        p_BV = softmax(lp_BV)
        return p_BV, -np.nansum(p_BV * lp_BV, axis=-1, keepdims=True)


class TemperatureLogitsWarper:
    """s / temperature, for a temperature greater than 0."""

    def __init__(self, temperature: float) -> None:
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be greater than 0; greedy decoding is do_sample=False")
        if not SMALLEST_TEMPERATURE <= temperature <= 1 / SMALLEST_TEMPERATURE:
            raise InputError(
                f"temperature={temperature} must lie in [{SMALLEST_TEMPERATURE:g}, {1 / SMALLEST_TEMPERATURE:g}]: "
                "scores divided by it are no numbers of float32"
            )
        self.temperature = float(temperature)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scaled scores [B, V]."""
        with np.errstate(over="ignore"):
            return scores_BV / self.temperature


class TopHLogitsWarper:
    """Keeps the best tokens while their entropy is at most `top_h` times the entropy of the distribution.

    Over the 100 best tokens, renormalised among them, best first: keep while the running sum of -p ln p is at most
    top_h * sum of -p ln p. The best token always stays. Source: "Top-H Decoding: Adapting the Creativity and
    Coherence with Bounded Entropy in Text Generation" (arXiv:2509.02510).
    """

    def __init__(self, top_h: float) -> None:
        self.top_h = _between("top_h", top_h, 0, 1, "(]")

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        best_BN = _best_first(scores_BV)[:, :TOP_H_CANDIDATES]
        p_BN, entropy_B1 = _categorical(np.take_along_axis(scores_BV, best_BN, axis=-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            keep_BN = _running_sum(-p_BN * np.log(p_BN)) <= entropy_B1 * self.top_h
        keep_BN[:, 0] = True
        keep_BV = np.zeros(scores_BV.shape, dtype=bool)
        np.put_along_axis(keep_BV, best_BN, keep_BN, axis=-1)
        return drop(scores_BV, ~keep_BV)


class TopKLogitsWarper:
    """Drops scores below the k-th largest one; ties with it stay.

    Source: Fan et al., "Hierarchical Neural Story Generation" (arXiv:1805.04833).
    """

    def __init__(self, top_k: int, min_tokens_to_keep: int = 1) -> None:
        if top_k < 1:
            raise InputError(f"top_k={top_k} must be at least 1, or 0 to switch the rule off")
        self.k = max(top_k, min_tokens_to_keep)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        return drop(scores_BV, scores_BV < _kth_largest(scores_BV, self.k))


class TopPLogitsWarper:
    """Keeps the smallest set of best tokens whose probability exceeds top_p: drops where the sum up to and including
    the token, taken from the smallest probability upwards, is at most 1 - top_p.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751).
    """

    def __init__(self, top_p: float, min_tokens_to_keep: int = 1) -> None:
        self.top_p = _between("top_p", top_p, 0, 1, "[]")
        self.keep = min_tokens_to_keep

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        order_BV = _best_first(scores_BV)[:, ::-1]
        drop_BV = _running_sum(softmax(np.take_along_axis(scores_BV, order_BV, axis=-1))) <= 1 - self.top_p
        drop_BV[:, -self.keep :] = False
        mask_BV = np.zeros_like(drop_BV)
        np.put_along_axis(mask_BV, order_BV, drop_BV, axis=-1)
        return drop(scores_BV, mask_BV)


class MinPLogitsWarper:
    """Drops tokens with p < min_p * (largest p).

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs"
    (arXiv:2407.01082).
    """

    def __init__(self, min_p: float, min_tokens_to_keep: int = 1) -> None:
        self.min_p = _between("min_p", min_p, 0, 1, "[]")
        self.keep = min_tokens_to_keep

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        p_BV = softmax(scores_BV)
        mask_BV = p_BV < self.min_p * p_BV.max(axis=-1, keepdims=True)
        np.put_along_axis(mask_BV, _best_first(p_BV)[:, : self.keep], False, axis=-1)
        return drop(scores_BV, mask_BV)


class TypicalLogitsWarper:
    """Keeps the tokens whose information -ln p is nearest to the entropy, up to the given probability mass.

    With d = abs(-ln p - entropy), sorted upwards, and c the running sum of p in that order: j = number of c < mass (at
    most V - 1); drop where d > d_sorted[j]. Source: Meister et al., "Locally Typical Sampling" (arXiv:2202.00666).
    """

    def __init__(self, mass: float, min_tokens_to_keep: int = 1) -> None:
        self.mass = _between("typical_p", mass, 0, 1, "()")
        self.keep = min_tokens_to_keep

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        lp_BV = log_softmax(scores_BV)
        with np.errstate(invalid="ignore"):
            entropy_B1 = -np.nansum(lp_BV * np.exp(lp_BV), axis=-1, keepdims=True)
            distance_BV = np.abs(-lp_BV - entropy_B1)
        order_BV = np.argsort(distance_BV, axis=-1, kind="stable")
        sorted_BV = np.take_along_axis(distance_BV, order_BV, axis=-1)
        mass_BV = _running_sum(softmax(np.take_along_axis(scores_BV, order_BV, axis=-1)))
        last_B1 = np.minimum((mass_BV < self.mass).sum(axis=-1, keepdims=True), scores_BV.shape[-1] - 1)
        drop_BV = sorted_BV > np.take_along_axis(sorted_BV, last_B1, axis=-1)
        drop_BV[:, : self.keep] = False
        mask_BV = np.zeros_like(drop_BV)
        np.put_along_axis(mask_BV, order_BV, drop_BV, axis=-1)
        return drop(scores_BV, mask_BV)


class EpsilonLogitsWarper:
    """Drops tokens with p < epsilon, but not the best `min_tokens_to_keep`.

    Source: Hewitt et al., "Truncation Sampling as Language Model Desmoothing" (arXiv:2210.15191).
    """

    def __init__(self, epsilon: float, min_tokens_to_keep: int = 1) -> None:
        self.epsilon = _between("epsilon_cutoff", epsilon, 0, 1, "()")
        self.keep = min_tokens_to_keep

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        low_BV = softmax(scores_BV) < self.epsilon
        return drop(scores_BV, low_BV & (scores_BV < _kth_largest(scores_BV, self.keep)))


class EtaLogitsWarper:
    """Drops tokens with p < eta = min(epsilon, sqrt(epsilon) * exp(-entropy)), but not the best `min_tokens_to_keep`.

    Source: Hewitt et al., "Truncation Sampling as Language Model Desmoothing" (arXiv:2210.15191).
    """

    def __init__(self, epsilon: float, min_tokens_to_keep: int = 1) -> None:
        self.epsilon = np.float32(_between("eta_cutoff", epsilon, 0, 1, "()"))
        self.keep = min_tokens_to_keep

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        p_BV, entropy_B1 = _categorical(scores_BV)
        eta_B1 = np.minimum(self.epsilon, np.sqrt(self.epsilon) * np.exp(-entropy_B1))
        return drop(scores_BV, (p_BV < eta_B1) & (scores_BV < _kth_largest(scores_BV, self.keep)))
