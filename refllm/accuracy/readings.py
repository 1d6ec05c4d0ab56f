"""What a product reads in place of its input. Engines for quantised weights round the input first, to a format whose
products with the weights they have by hand, and then add in float32:

    float16, bfloat16    the format of the weights
    int8                 blocks of 32 (of 256: `INT8_IN_256`) numbers, each a whole multiple of its block's step

The step of a block is its largest number / 127, kept in float16 (of 256: in float32). Where the input is known the
rounding is known, and the product of the rounded numbers is expected, to float32. Where it is not, an element of a
block is off by a uniform error of half a step to either side, and by what rounding the step does to it.

As llama.cpp does on a CPU (ggml/src/ggml-cpu/ggml-cpu.c, vec_dot_type; ggml-quants.c, quantize_row_q8_0_ref).
"""

from dataclasses import dataclass

import numpy as np

from refllm.accuracy.forms import on_grid
from refllm.accuracy.propagation import ulp

AS_IT_IS = ""
FLOAT16, BFLOAT16 = "float16", "bfloat16"
INT8, INT8_BY_STEP, INT8_AWAY = "int8", "int8 by 1 / step", "int8 by 1 / step, ties away from 0"
INT8_IN_256 = "int8 in blocks of 256"

SOMEHOW = "int8 somehow"
_INT8 = (INT8, INT8_BY_STEP, INT8_AWAY)
_OF_KINDS = {
    FLOAT16: ("F16",),
    BFLOAT16: ("BF16",),
    INT8: ("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4"),
    INT8_IN_256: ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S"),
}
READ_BESIDE: dict[str, tuple[str, ...]] = {
    kind: (AS_IT_IS, *(_INT8 if reading == INT8 else (reading,)))
    for reading, kinds in _OF_KINDS.items()
    for kind in kinds
}
"""How a matrix is stored, as GGUF files call it -> what a product with it may read, the least rounded first."""


def in_no_certain_way(reading: str) -> str:
    """The same reading of somebody who did not show what it gave: blocks of 32 are made in several ways, which now and
    then give another number."""
    return SOMEHOW if reading in _INT8 else reading


def in_words(reading: str) -> str:
    """What a report says of it."""
    if reading in (FLOAT16, BFLOAT16):
        return f"reads its input rounded to {reading}"
    return f"reads its input as int8, in blocks of {256 if reading == INT8_IN_256 else 32} with a step each"


def as_read(x: np.ndarray, reading: str) -> np.ndarray:
    """The numbers that a product reads in place of x [..., n], float32 numbers, as float64."""
    if reading in (FLOAT16, BFLOAT16):
        return on_grid(x, reading)
    blocks = _Blocks.of(x, reading)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is judged, and told
        scaled = blocks.x * blocks.per_step
        whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)) if reading == INT8_AWAY else np.rint(scaled)
        return blocks.joined(np.minimum(whole, 127).astype(np.float64) * blocks.kept_step)


def variance_of(x: np.ndarray, reading: str) -> np.ndarray:
    """The variance of what reading does to x [..., n], whose exact digits nobody knows: float64."""
    if reading in (FLOAT16, BFLOAT16):
        return np.asarray(ulp(x, reading, np.float64) ** 2 / 12)
    blocks = _Blocks.of(x, reading)
    x, step = blocks.x.astype(np.float64), np.abs(blocks.step).astype(np.float64)
    of_the_number = np.minimum(np.square(step) / 12, np.square(x))
    of_the_number = np.where(np.abs(x) >= 127 * step * (1 - 2.0**-20), 0, of_the_number)  # the largest is a multiple
    of_the_step = 0.0 if reading == INT8_IN_256 else ulp(step, FLOAT16, np.float64) ** 2 / 12
    relative = np.divide(of_the_step, np.square(step), out=np.zeros_like(step), where=step > 0)
    return blocks.joined(of_the_number + np.square(x) * relative)


@dataclass(frozen=True)
class _Blocks:
    """A row in blocks: x [..., blocks, size], step and what numbers are multiplied with to count it [..., blocks, 1],
    and the step as it is kept; n numbers, the last block filled with zeros."""

    x: np.ndarray
    step: np.ndarray
    per_step: np.ndarray
    kept_step: np.ndarray
    n: int

    @classmethod
    def of(cls, x: np.ndarray, reading: str) -> "_Blocks":
        size, n = 256 if reading == INT8_IN_256 else 32, x.shape[-1]
        whole = np.zeros((*x.shape[:-1], -(-n // size) * size), np.float32)
        whole[..., :n] = x
        split = whole.reshape(*x.shape[:-1], -1, size)
        largest = np.abs(split).max(axis=-1, keepdims=True)
        there = np.where(largest > 0, largest, 1)
        if reading == INT8_IN_256:  # its number of the largest size becomes -127
            first = np.abs(split).argmax(axis=-1)[..., None]
            signed = np.take_along_axis(split, first, axis=-1)
            per_step = np.where(largest > 0, np.float32(-127) / np.where(largest > 0, signed, 1), 0)
            step = np.where(largest > 0, 1 / np.where(per_step == 0, 1, per_step), 0).astype(np.float32)
            return cls(split, step, per_step.astype(np.float32), step.astype(np.float64), n)
        step = largest / np.float32(127)
        per_step = np.float32(127) / there if reading == INT8 else 1 / np.where(step > 0, step, 1)
        with np.errstate(over="ignore"):
            kept = step.astype(np.float16).astype(np.float64)
        return cls(split, step, np.where(largest > 0, per_step, 0).astype(np.float32), kept, n)

    def joined(self, values: np.ndarray) -> np.ndarray:
        """[..., blocks, size] -> [..., n]."""
        return values.reshape(*values.shape[:-2], -1)[..., : self.n]
