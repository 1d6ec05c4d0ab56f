"""The rotary tables of a candidate are solved: honest ones are within 16 float32 ulp, and what is not shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import golden, ops
from refllm.accuracy.limits import TABLES_WITHIN
from refllm.accuracy.tables import angles, in_pairs, solve
from refllm.config import AutoConfig
from refllm.forward.rotary import RotaryEmbedding
from refllm.precision import rounding

CONFIG: Any = AutoConfig.from_pretrained(Path(golden.path("llama-tiny")))
R = CONFIG.rotary_dim
EXACT = RotaryEmbedding(CONFIG, exact=True).inv_freq
TORCH = RotaryEmbedding(CONFIG, exact=False).inv_freq.astype(np.float64)


def turned(frequencies: np.ndarray, narrow: bool, dtype: str, first: int, shift: int = 0) -> tuple[Any, np.ndarray]:
    """What a candidate shows that turns with these frequencies: rows before and after, and their positions."""
    onto = rounding(dtype)
    x = onto(np.random.default_rng(1).standard_normal((1, 6, 50, R)).astype(np.float32))
    positions = np.arange(first, first + 50)[None]
    turn = angles(positions + shift, frequencies, narrow)
    y = ops.rope(x, x, np.float32(np.cos(turn)), np.float32(np.sin(turn)), interleaved=False)[0]
    rows = (in_pairs(a[0].transpose(1, 0, 2), R, interleaved=False) for a in (x, onto(y.astype(np.float32))))
    return (positions[0], *rows), positions


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("first", [0, 4000, 30000])
@pytest.mark.parametrize("ulp", [0, 3, -7])
def test_honest_frequencies_are_found(dtype: str, first: int, ulp: int) -> None:
    """Up to what the rows can tell: the angles that are found are the ones that were used."""
    used = (EXACT.astype(np.float32) + np.float32(ulp) * np.spacing(EXACT.astype(np.float32))).astype(np.float64)
    rows, positions = turned(used, True, dtype, first)
    found = solve(CONFIG, positions, [rows], dtype)
    off = np.abs(angles(positions, found.frequencies, found.narrow) - angles(positions, used, True))
    spacing = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert off.max() < 0.5 * spacing
    assert found.farthest <= TABLES_WITHIN


def test_tables_that_have_a_name_are_named() -> None:
    for frequencies, narrow, words in ((EXACT, False, "exact tables"), (TORCH, True, "as Transformers")):
        rows, positions = turned(frequencies, narrow, "float32", 3000)
        assert words in solve(CONFIG, positions, [rows], "float32").name
    assert solve(CONFIG, positions, [], "float32").name == "not shown"


@pytest.mark.parametrize("mistake", ["base", "positions", "narrow frequencies"])
def test_what_is_no_honest_table_is_not_solved_away(mistake: str) -> None:
    used = {"base": EXACT * 1.001, "narrow frequencies": rounding("bfloat16")(EXACT.astype(np.float32))}
    rows, positions = turned(used.get(mistake, EXACT), True, "float32", 100, shift=mistake == "positions")
    found = solve(CONFIG, positions, [rows], "float32")
    cos, sin = found.values()
    _, before, after = rows
    z, w = (x[..., 0::2] + 1j * x[..., 1::2] for x in (before.astype(float), after.astype(float)))
    left = np.abs(w - z * (cos + 1j * sin)[0][:, None])
    assert left.max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [EXACT * 10, np.zeros_like(EXACT)])
def test_one_wrong_layer_does_not_change_what_the_others_are_judged_by(wrong: np.ndarray, dtype: str) -> None:
    good, positions = turned(TORCH, True, dtype, 100)
    bad, _ = turned(wrong, True, dtype, 100)
    found = solve(CONFIG, positions, [good, bad, good], dtype)
    alone = solve(CONFIG, positions, [good, good], dtype)
    assert (found.name, found.farthest) == (alone.name, alone.farthest)
    assert np.array_equal(found.frequencies, alone.frequencies)
