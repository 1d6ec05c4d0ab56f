"""Rotary angles as llama.cpp makes them: not position times frequency, but from pair to pair the angle of the pair
before times base^(-2/R), in float32. After tens of pairs the roundings add up to several ulp, to others at every
position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refllm.forward.rotary import RotaryEmbedding

_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Chain:
    """One way to make them. step: base^(-2/R). divisors [R/2]: what llama3 divides each angle by. stretched: what
    linear and yarn multiply it by. kept [R/2]: of yarn, the share of the angle that is not stretched. fused: whether
    the mix of the two is rounded once, by a multiply-add.
    """

    step: np.float32
    pairs: int
    divisors: np.ndarray | None = None
    stretched: np.float32 | None = None
    kept: np.ndarray | None = None
    fused: bool = False

    def angles(self, positions: np.ndarray) -> np.ndarray:
        """[...] -> [..., R/2], float32 numbers in float64."""
        angle, made = positions.astype(np.float32), []
        for _ in range(self.pairs):
            made.append(angle)
            angle = angle * self.step
        turned = np.stack(made, axis=-1)
        if self.divisors is not None:
            turned = turned / self.divisors
        if self.stretched is not None:
            short = self.stretched * turned
            turned = short if self.kept is None else self._mixed(short, turned, self.kept)
        return turned.astype(np.float64)

    def _mixed(self, short: np.ndarray, plain: np.ndarray, kept: np.ndarray) -> np.ndarray:
        first = short * (np.float32(1) - kept)
        if not self.fused:
            return np.asarray(first + plain * kept)
        return np.asarray(first.astype(np.float64) + plain.astype(np.float64) * kept.astype(np.float64), np.float32)


def chains(exact: RotaryEmbedding) -> Iterator[Chain]:
    """The ways to make the angles of a model's exact tables; none for a type of RoPE that llama.cpp has not."""
    rope, truth = exact.config.rope_parameters, np.asarray(exact.inv_freq, np.float64)
    if rope["rope_type"] not in _TYPES or not len(truth):
        return
    pairs = len(truth)
    plain = float(rope["rope_theta"]) ** (-np.arange(pairs) / pairs)
    ratio, middle = truth / plain, np.float32(float(rope["rope_theta"]) ** float(np.float32(-1 / pairs)))
    for step in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1))):
        match rope["rope_type"]:
            case "default":
                yield Chain(step, pairs)
            case "llama3":
                yield Chain(step, pairs, divisors=(1 / ratio).astype(np.float32))
            case "linear":
                yield Chain(step, pairs, stretched=np.float32(1 / rope["factor"]))
            case "yarn":
                stretched = ratio.min()  # of the pairs that are stretched as a whole, where there are any
                kept = np.float32(1) - ((1 - ratio) / (1 - stretched)).astype(np.float32)
                for fused in (False, True):
                    yield Chain(step, pairs, stretched=np.float32(stretched), kept=kept, fused=fused)
