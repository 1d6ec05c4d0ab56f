"""A device that is not here is the CPU, with one warning; Torch is not imported to find out."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from refllm import devices, golden
from refllm.devices import Device, found
from refllm.errors import InputError

PROGRAM = """
import sys
import refllm

folder = sys.argv[1]
refllm.set_seed(0)
model = refllm.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype="bfloat16").to("cuda")
tokenizer = refllm.AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(["a"], return_tensors="np").to(model.device)
tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=2, do_sample=True))
refllm.pipeline("text-generation", model=model, tokenizer=tokenizer, device=0)("a", max_new_tokens=2)
print(sorted({"torch", "transformers", "triton"} & sys.modules.keys()), model.device)
"""


@pytest.fixture(autouse=True)
def _nothing_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_missed", set())


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: 2)


@pytest.mark.skipif(devices.gpus() > 0, reason="with a GPU Torch is asked for it")
def test_a_program_without_tensors_does_not_import_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(golden.path("helium-tiny"))], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[] cpu\n"
    assert run.stderr.count("device cuda: not here") == 1


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cuda", "cuda"),
        (1, "cuda:1"),
        (torch.device("cuda", 0), "cuda:0"),
        ("cpu", "cpu"),
        (-1, "cpu"),
        ("cpu:0", "cpu"),
    ],
)
def test_a_device_that_is_here_is_that(given: Any, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(given) == expected


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("given", ["cuda:2", 2, "mps", torch.device("mps", 0), "xla:1"])
def test_a_device_that_is_not_here_is_the_cpu_with_one_warning(given: Any) -> None:
    with pytest.warns(UserWarning, match=r"device [a-z]+(:\d)?: not here \(.*\), so the CPU is used") as caught:
        assert [found(given), found(given)] == ["cpu", "cpu"]
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("given", ["moon", "cuda:x", "cuda:", "", None, True, 1.5, "disk", "meta"])
def test_what_is_no_device_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="is no device; use cpu, cuda, cuda:0, or the number of a GPU"):
        found(given)


def test_a_device_is_equal_to_the_one_of_torch_and_torch_takes_it() -> None:
    device = Device("cuda:1")
    assert (device.type, device.index, Device("cuda").index) == ("cuda", 1, None)
    assert device == torch.device("cuda", 1) == device == "cuda:1"
    assert device != torch.device("cuda", 0) != device
    assert torch.zeros(1, device=Device("cpu")).to(Device("cpu")).device == Device("cpu")
    assert {device: 1}["cuda:1"] == 1
