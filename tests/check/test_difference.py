"""`refllm diff` of two traces: every figure of the comparison, and the table that shows it."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from refllm.check.difference import Difference, diff
from refllm.check.difference_report import show_difference
from refllm.check.inputs import Inputs
from refllm.check.trace import Trace
from refllm.errors import InputError

NAMES = ("model.embed_tokens", "model.layers.0.self_attn.q_rope", "lm_head")


def trace(dtype: str = "float32", source: str = "mine", names: tuple[str, ...] = NAMES, **changed: object) -> Trace:
    """Two sequences of three tokens, the first of the second one padding; all values are 2."""
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    inputs = Inputs(np.array([[1, 2, 3], [0, 4, 5]]), mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    shapes = {name: (2, 2, 3, 4) if name.endswith("rope") else (2, 3, 4) for name in names}
    taps = {name: np.full(shape, 2.0, np.float32) for name, shape in shapes.items()}
    given = {
        "inputs": inputs,
        "dtype": dtype,
        "source": source,
        "taps": taps,
        "config_hash": "0" * 16,
        "head": "causal_lm",
    }
    return Trace(**(given | changed))  # type: ignore[arg-type]


def shown(found: Difference) -> str:
    console = Console(file=StringIO(), width=120, color_system=None)
    console.print(show_difference(found))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_same_twice_is_identical() -> None:
    found = diff(trace(), trace(source="yours"))
    assert found.identical
    assert found.first_difference is None
    assert [(tap.relative, tap.largest, tap.differing, tap.nonfinite) for tap in found.taps] == [(0, 0, 0, 0)] * 3
    assert [tap.elements for tap in found.taps] == [20, 40, 20]
    text = shown(found)
    assert text.startswith("mine against yours\n")
    assert "identical, bit for bit" in text
    assert "only in" not in text


def test_figures_of_a_difference_are_its_size_its_place_and_its_count() -> None:
    first, second = trace(), trace(source="yours")
    second.taps[NAMES[1]][1, 1, 2, 3] += 1.0
    second.taps[NAMES[1]][0, 0, 0, 1] -= 0.5
    second.taps[NAMES[2]][0, 1, 2] = np.nan
    second.taps[NAMES[0]][1, 0] = 9.0  # padding
    found = diff(first, second)
    embed, rope, head = found.taps
    assert embed.differing == 0
    assert (rope.differing, rope.largest, rope.at, rope.nonfinite) == (2, 1.0, (4, 1, 3), 0)
    assert rope.relative == pytest.approx(np.sqrt(1.25 / 40) / 2)
    assert (rope.ulps[0], rope.ulps[-1]) == (38, 2)
    assert (head.differing, head.nonfinite, head.at, head.relative) == (1, 1, (1, 2), 0)
    assert found.first_difference is rope
    assert found.to_dict()["first_difference"] == NAMES[1]
    assert not found.to_dict()["identical"]
    text = shown(found)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("model.", "lm_"))}
    assert rows[NAMES[0]] == ["0", "0", "20"]
    assert rows[NAMES[1]] == ["8.8e-02", "1.0e+00", "2", "2", "40"]
    assert rows[NAMES[2]] == ["0.0e+00", "0.0e+00", "+1", "NaN/inf", "1", "20"]
    assert f"first difference: {NAMES[1]} at [4, 1, 3]" in text


def test_what_is_exactly_one_ulp_off_is_not_over_one_ulp() -> None:
    first, second = trace("bfloat16"), trace("bfloat16")
    second.taps[NAMES[0]][0, :2] += 2.0**-6  # one ulp of 2
    second.taps[NAMES[0]][0, 2, 0] += 2.0**-5
    embed = diff(first, second).taps[0]
    assert (embed.differing, sum(embed.ulps[3:])) == (9, 1)
    assert "1       9" in shown(diff(first, second))


def test_names_that_one_lacks_are_counted() -> None:
    found = diff(trace(), trace(source="yours", names=(NAMES[2], "model.norm")))
    assert (found.only_first, found.only_second) == ([*NAMES[:2]], ["model.norm"])
    text = shown(found)
    assert f"only in mine: 2 values, first {NAMES[0]}" in text
    assert "only in yours: 1 values, first model.norm" in text


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("float32", "bfloat16", "bfloat16"),
        ("float64", "float16", "float16"),
        ("float64", "float64", "float32"),
        ("float16", "bfloat16", "bfloat16"),
    ],
)
def test_ulp_are_those_of_the_coarser_format(one: str, other: str, expected: str) -> None:
    assert diff(trace(one), trace(other)).dtype == expected
    assert diff(trace(other), trace(one)).dtype == expected


def test_a_partial_rotation_is_compared_where_both_have_it() -> None:
    second = trace()
    second.taps[NAMES[1]] = second.taps[NAMES[1]][..., :2]
    assert diff(trace(), second).taps[1].elements == 20
    second.taps[NAMES[2]] = second.taps[NAMES[2]][..., :2]
    with pytest.raises(InputError, match=r"lm_head: shape \[2, 3, 4\] in the first trace, \[2, 3, 2\] in the second"):
        diff(trace(), second)


def test_values_are_compared_in_whatever_layout_their_shapes_tell() -> None:
    rng, first = np.random.default_rng(0), trace()
    first.taps = {name: rng.random(value.shape).astype(np.float32) for name, value in first.taps.items()}
    embed, rope, head = first.taps.values()
    for shown in (
        (embed.reshape(6, 4), rope.transpose(0, 2, 1, 3).reshape(6, 2, 4), head.reshape(6, 4)),
        (embed.swapaxes(0, 1), rope.swapaxes(1, 2), head.swapaxes(0, 1)),
    ):
        second = trace(taps=dict(zip(NAMES, shown, strict=True)), config_hash="", source="yours")
        assert diff(first, second).identical
    second.taps[NAMES[2]] = head[:, 1:]
    with pytest.raises(InputError, match=r"lm_head: shape \[2, 3, 4\] in the first trace, \[2, 2, 4\] in the second"):
        diff(first, second)


def test_traces_of_other_runs_are_refused() -> None:
    mine = trace().inputs
    for inputs, words in (
        (Inputs(mine.input_ids, np.ones((2, 3), int), mine.positions), "different attention masks"),
        (Inputs(mine.input_ids, np.array(mine.valid, int), mine.positions + 1), "different position ids"),
        (Inputs(mine.input_ids + [[0, 0, 0], [0, 0, 1]], None, mine.positions), "first at row 1, position 2"),
        (Inputs(mine.input_ids[:1], None, mine.positions[:1]), "different lengths"),
    ):
        with pytest.raises(InputError, match=words):
            diff(trace(), trace(inputs=inputs))
