"""What verdicts on released kernels are compared with is itself right, and sees what is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import in_float64  # noqa: E402

from refllm import ops  # noqa: E402
from refllm.strategies import corners  # noqa: E402

FOLDER = Path(__file__).parent
OPERATORS = (
    *("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "attention", "decode_attention"),
    *("swiglu", "relu2", "cross_entropy", "linear_cross_entropy"),
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_loops_in_float64_are_the_definition(operator: str) -> None:
    calls = corners(operator, "float32")[:3]
    assert len(calls) == 3
    for call in calls:
        wanted = getattr(ops, operator)(*call.arrays()[0], **call.arrays()[1])
        made = in_float64.right(operator, *call.tensors())
        for mine, one in zip(made, wanted if isinstance(wanted, tuple) else (wanted,), strict=False):
            assert in_float64.far_off(torch.from_numpy(np.asarray(one)), mine, torch.float32)[0] < 4, call


def test_what_is_wrong_is_far_off() -> None:
    wanted = torch.tensor([[1.0, 2.0], [3.0, float("nan")]], dtype=torch.float64)
    assert in_float64.far_off(wanted.bfloat16(), wanted, torch.bfloat16) == (0.0, (0, 0))
    off, place = in_float64.far_off(wanted + torch.tensor([[0, 0.125], [0, 0]]), wanted, torch.bfloat16)
    assert (off, place) == (8.0, (0, 1))
    assert in_float64.far_off(wanted.nan_to_num(0.0), wanted, torch.bfloat16)[0] > 1e30


def test_every_fault_of_the_page_has_its_call() -> None:
    page = (FOLDER.parents[1] / "docs/findings.md").read_text(encoding="utf-8")
    source = (FOLDER / "reproduced.py").read_text(encoding="utf-8")
    assert set(re.findall(r"`reproduced.py (\w+)`", page)) == set(re.findall(r"@fault\ndef (\w+)", source))
