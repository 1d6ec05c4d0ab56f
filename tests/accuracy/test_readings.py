"""What products read in place of their inputs: the numbers of the formats, and the variance of what rounding does."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from refllm.accuracy.readings import (
    BFLOAT16,
    FLOAT16,
    INT8,
    INT8_AWAY,
    INT8_BY_STEP,
    INT8_IN_256,
    READ_BESIDE,
    as_read,
    in_no_certain_way,
    variance_of,
)

ALL = (FLOAT16, BFLOAT16, INT8, INT8_BY_STEP, INT8_AWAY, INT8_IN_256)


def rows(seed: int, width: int = 256, count: int = 400) -> np.ndarray:
    """Float32 numbers of sizes from 1e-3 to 1e3, a row each."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-3, 3, size=(count, 1))
    return np.asarray(sizes * rng.standard_normal((count, width)), np.float32)


def test_int8_is_that_of_gguf() -> None:
    """The package `gguf` rounds ties away from 0, and multiplies with 1 / step."""
    x = rows(0)
    x[3] = 0
    x[4, 32:64] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert np.array_equal(as_read(x, INT8_AWAY), theirs)


def test_ways_of_int8_differ_in_ties() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = 127, 2.5, -2.5, 3.5  # steps of 1
    expected = {INT8: [127, 2, -2, 4], INT8_BY_STEP: [127, 2, -2, 4], INT8_AWAY: [127, 3, -3, 4]}
    assert {way: as_read(x, way)[0, :4].tolist() for way in expected} == expected
    assert {in_no_certain_way(way) for way in expected}.isdisjoint(expected)


@pytest.mark.parametrize(("reading", "dtype"), [(FLOAT16, np.float16), (BFLOAT16, ml_dtypes.bfloat16)])
def test_formats_are_their_roundings(reading: str, dtype: type) -> None:
    x = rows(2)
    assert np.array_equal(as_read(x, reading), x.astype(dtype).astype(np.float64))


@pytest.mark.parametrize("reading", ALL)
@pytest.mark.parametrize("width", [256, 300])
def test_the_variance_is_that_of_the_error(reading: str, width: int) -> None:
    """Row by row in the mean over many, and of no row is an error beyond half a step; what is 0 or the largest of its
    block has none."""
    x = rows(3, width, 4000)
    x[:, ::7] = 0
    error, V = as_read(x, reading) - x, variance_of(x, reading)
    ratio = np.sqrt(np.mean(np.square(error), axis=-1) / np.mean(V, axis=-1))
    assert abs(np.mean(ratio) - 1) < 0.02
    assert not error[:, ::7].any()
    assert not V[:, ::7].any()
    assert np.all(np.square(error) <= 3.1 * (V + np.square(x, dtype=np.float64) * 2.0**-20) + V.max(-1, keepdims=True))


def test_steps_too_small_for_float16_are_a_part_of_the_error() -> None:
    """A step of 1e-6 is 17 of the smallest numbers of float16."""
    x = (rows(4, 64, 2000) * 0 + np.random.default_rng(4).standard_normal((2000, 64)) * 5e-5).astype(np.float32)
    error, V = as_read(x, INT8) - x, variance_of(x, INT8)
    assert np.sqrt(np.mean(np.square(error)) / np.mean(V)) == pytest.approx(1, abs=0.05)


def test_what_is_read_first_is_the_input_itself() -> None:
    assert {readings[0] for readings in READ_BESIDE.values()} == {""}
