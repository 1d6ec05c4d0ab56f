"""What check-aot makes of other people's files: modules inside packages, what their own launches say of arguments, and
a guess that compiles. Nothing is compiled here but one small kernel."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refllm.errors import InputError
from refllm.kernels.aot import call_sites, guess
from refllm.kernels.aot.machine_code import read_traffic
from refllm.kernels.aot.modules import load
from refllm.kernels.aot.sources import CommandSource, find_kernel
from refllm.kernels.targets import TARGETS

LAUNCHER = """
import enum
import torch, triton, triton.language as tl
from .sizes import MOST, settings

class Mode(enum.Enum):
    PLAIN = 3

@triton.jit
def loss_kernel(X, x_stride, Y, out, lse, bias, n_cols, shift, softcap, ignore: tl.int32, mode: tl.constexpr,
                REDUCTION: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    label = tl.load(Y + row)
    if label == ignore:
        return
    p = X + row * x_stride
    total = tl.zeros([BLOCK], ACC)
    total += tl.load(p + at, mask=at < n_cols, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at)
    if REDUCTION == "mean":
        total = total / n_cols
    if mode == 3:
        total = softcap * total
    tl.store(lse + row, tl.sum(total) + shift)
    tl.store(out + label, tl.load(p + label))

def loss(x, labels, bias=None, *, shift: float, softcap=0.5, reduction="mean", mode=Mode.PLAIN):
    assert labels.max() < 7, "what depends on data is left out"
    *rows, n_cols = x.shape
    x = x.reshape(-1, n_cols)
    n_rows = x.shape[0]
    BLOCK, num_warps = settings(n_cols)
    out = torch.empty_like(x, dtype=torch.float16)
    counted = labels.sum().item()
    if n_cols < 7:
        softcap = None
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    for i in range(3):
        lse = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    with torch.no_grad():
        if x.numel():
            options = {"HAS_BIAS": bias is not None}
            loss_kernel[(n_rows,)](x, x.stride(0), labels, out, lse, bias, n_cols, shift, softcap=softcap,
                ignore=-100, mode=mode, REDUCTION=reduction, ACC=tl.float32, BLOCK=min(MOST, BLOCK),
                num_warps=num_warps, **options)
    return lse
"""
SIZES = """
import triton
MOST = 512
def settings(n):
    return triton.next_power_of_2(n), 8
"""


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a package and gives the path of its module ops/loss.py."""

    def write(name: str, init: str = "") -> Path:
        folder = tmp_path / name / "ops"
        folder.mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(init)
        (folder / "__init__.py").touch()
        (folder / "loss.py").write_text(LAUNCHER)
        (folder / "sizes.py").write_text(SIZES)
        return folder / "loss.py"

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("their_", "_user_kernels_")):
            del sys.modules[name]


def test_a_module_of_a_package_loads(package: Callable[..., Path]) -> None:
    module = load(str(package("their_kernels")))
    assert module.__name__ == "their_kernels.ops.loss"
    assert module.MOST == 512
    assert not any("their_kernels" in folder for folder in sys.path)


def test_a_package_that_cannot_be_imported_does_not_keep_its_file_from_it(package: Callable[..., Path]) -> None:
    module = load(str(package("their_broken", "import no_such_thing_here")))
    assert module.MOST == 512


def test_another_package_of_that_name_is_left_alone(package: Callable[..., Path]) -> None:
    import json

    module = load(str(package("json")))
    assert module.MOST == 512
    assert sys.modules["json"] is json


def test_what_is_missing_in_a_package_is_said(package: Callable[..., Path]) -> None:
    path = package("their_missing")
    (path.parent / "sizes.py").write_text("import no_such_thing_here")
    with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_thing"):
        load(str(path))


SCRIPT = """
import torch, triton, triton.language as tl
DEVICE = triton.runtime.driver.active.get_active_torch_device()
SMS = torch.cuda.get_device_properties(DEVICE).multi_processor_count
@triton.jit
def kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1)
x = torch.empty(SMS, device=DEVICE)
kernel[(1,)](x, N=4)
raise SystemExit("not reached")
"""


def test_a_script_that_asks_for_the_gpu_and_then_uses_it_is_read_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    module = load(str(tmp_path / "script.py"))
    assert module.kernel.arg_names == ["x", "N"]
    assert not torch.cuda.is_available()
    (tmp_path / "none.py").write_text(SCRIPT.replace("@triton.jit", "1 / 0"))
    with pytest.raises(InputError, match=r"none\.py cannot be imported: RuntimeError: 0 active drivers"):
        load(str(tmp_path / "none.py"))


def guessed(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    module = load(str(path))
    kernel = find_kernel(module, str(path), "loss_kernel")
    found, options = guess.guesses(module, "loss_kernel", kernel, list(kernel.params))
    return {each.name: each.text for each in found}, options


def test_arguments_are_those_of_the_launch_in_the_file(package: Callable[..., Path]) -> None:
    found, options = guessed(package("their_launch"))
    assert found == {
        "X": "*bf16", "x_stride": "i32:16", "Y": "*i64", "out": "*fp16", "lse": "*fp32", "bias": "None",
        "n_cols": "i32:16", "shift": "fp32", "softcap": "fp32", "ignore": "i32", "mode": "3", "REDUCTION": "mean",
        "HAS_BIAS": "False", "ACC": "tl.float32", "BLOCK": "512",
    }  # fmt: skip
    assert options == {"num_warps": 8}


def test_without_a_launch_names_annotations_and_the_code_of_the_kernel_decide(package: Callable[..., Path]) -> None:
    path = package("their_kernel_alone")
    path.write_text(LAUNCHER[: LAUNCHER.index("def loss(")])
    found, options = guessed(path)
    assert found == {
        "X": "*bf16", "x_stride": "i32:16", "Y": "*bf16", "out": "*bf16", "lse": "*fp32", "bias": "*bf16",
        "n_cols": "i32", "shift": "i32", "softcap": "fp32", "ignore": "i32", "mode": "3", "REDUCTION": "mean",
        "HAS_BIAS": "False", "ACC": "tl.float32", "BLOCK": "128",
    }  # fmt: skip
    assert options == {}


def test_the_guess_that_is_printed_compiles(package: Callable[..., Path]) -> None:
    """Of the kernel alone too: labels taken for numbers are what the compiler refuses first, and then they are not."""
    path = package("their_guess")
    path.write_text(LAUNCHER[: LAUNCHER.index("def loss(")])
    with pytest.raises(InputError) as told:
        CommandSource(str(path), "loss_kernel").launches(TARGETS["gfx942"])
    assert "correct the guesses in this, which compile, or give" in str(told.value)
    assert "--arg 'Y=*i32'" in str(told.value)


def test_what_no_guess_can_mend_is_said(package: Callable[..., Path]) -> None:
    kernel = load(str(package("their_compiler"))).loss_kernel
    found = [guess.Guess("n", False, "i32", ("fp32",)), guess.Guess("BLOCK", True, "128", ("64",))]
    kept, reason = guess.compiling(kernel, found, lambda _: "k.py:7 `x = y`: never")
    assert (kept, reason) == (found, "k.py:7 `x = y`: never")
    said = {("i32", "128"): "k.py:7 `x`: no", ("i32", "64"): "k.py:9 `x`: no", ("fp32", "64"): ""}
    kept, reason = guess.compiling(
        kernel, found, lambda each: said.get((each[0].text, each[1].text), "k.py:3 `x`: worse")
    )
    assert ([each.text for each in kept], reason) == (["fp32", "64"], "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("labels", torch.int64), ("cu_seqlens", torch.int32), ("attn_mask", torch.bool), ("rstd", torch.float32)],
)
def test_a_tensor_is_taken_for_what_it_is_called(name: str, dtype: Any) -> None:
    assert call_sites.dtype_named(name) == dtype
    assert call_sites.dtype_named("x") == torch.bfloat16


TTIR = """
  tt.func public @k(%x: !tt.ptr<bf16>, %y: !tt.ptr<bf16>) {
    %i = tt.make_range {end = 4096 : i32, start = 0 : i32} : tensor<4096xi32>
    %p = tt.addptr %xs, %i : tensor<4096x!tt.ptr<bf16>>, tensor<4096xi32>
    %one = tt.load %x : !tt.ptr<bf16>
    %v = tt.load %p, %mask, %other : tensor<4096x!tt.ptr<bf16>>
    %at = arith.extsi %v : tensor<4096xi16> to tensor<4096xi32>
    %r:2 = scf.for %k = %a to %b step %c iter_args(%q = %at, %s = %i) -> (tensor<4096xi32>) : i32 {
      %pg = tt.addptr %ys, %q : tensor<4096x!tt.ptr<f32>>, tensor<4096xi32>
      %g = tt.load %pg : tensor<4096x!tt.ptr<f32>>
    }
    tt.store %y, %one : !tt.ptr<bf16>
    tt.store %p, %v : tensor<4096x!tt.ptr<bf16>>
"""


def test_bytes_that_could_move_16_at_a_time_are_those_of_blocks_with_addresses_that_were_not_loaded() -> None:
    assert read_traffic(TTIR, 128) == (8192 / (2 + 8192 + 16384), 8192 / 8194)
    assert read_traffic(TTIR, 1024) == (0, 0)  # 8 bytes for a thread
    assert read_traffic("", 128) == (0, 0)
