"""The probe behind `refllm info`: "the same bits" where torch's kernels are known ones, and it sees every change."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from this_cpu import avx2, every_dtype
from typer.testing import CliRunner

from refllm import machine
from refllm.commands import cli
from refllm.kernels import same_bits
from refllm.precision import torch_cpu

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", every_dtype())
def test_all_kinds_are_the_same_where_the_kernels_are_known(dtype: str) -> None:
    assert same_bits.compare(dtype) == dict.fromkeys(("products", "softmax", "norms", "exp"), True)


def other_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = 8 if torch_cpu.this_cpu().lanes == 16 else 16
    monkeypatch.setattr(torch_cpu, "this_cpu", lambda: torch_cpu.Cpu(lanes=lanes, onednn=False))


def replaced(name: str, function: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(torch_cpu, name, function)


@avx2
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("products", replaced("half_order", lambda *a, **k: torch_cpu.chain)),
        ("softmax", other_lanes),
        ("softmax", replaced("softmax_sum", lambda e: e.sum(axis=-1, keepdims=True))),
        ("norms", replaced("row_sum", lambda x: x.sum(axis=-1))),
        ("norms", replaced("moments", lambda x, _: (x.mean(-1, keepdims=True), x.var(-1, keepdims=True)))),
        ("exp", replaced("exp_elementwise", np.exp)),
    ],
)
def test_a_kind_that_adds_in_another_order_is_found(
    kind: str, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert not same_bits.compare("float16")[kind]


def test_info_without_a_checkpoint_is_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_bits, "compare", lambda dtype: {"products": dtype == "float16", "exp": True})
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0
    assert "bfloat16: the same bits in exp; sums in another order in products" in result.stdout
    assert "float16: the same bits in products, exp" in result.stdout
    told = json.loads(CliRunner().invoke(cli.app, ["info", "--json", "-"]).stdout)
    assert told["same_bits"]["float16"] == {"products": True, "exp": True}
    assert told["versions"]["numpy"] == np.__version__


def test_info_without_torch_says_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "torch" else True)
    assert machine.describe()["same_bits"] is None
    result = CliRunner().invoke(cli.app, ["info"])
    assert "is not known: torch is not installed" in result.stdout
