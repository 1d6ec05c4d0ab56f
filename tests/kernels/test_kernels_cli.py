"""`refllm kernels`: the list of kernels, and the ahead-of-time gate over ours and over a user's own file."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from refllm.commands import cli
from refllm.kernels import OPERATORS
from refllm.kernels.aot import commands, sources
from refllm.kernels.targets import TARGETS
from refllm.kernels.triton import BACKWARD_FILES, FILES

Run = Callable[..., tuple[int, str, str]]

MINE = """
import torch, triton, triton.language as tl

@triton.jit
def half(x):
    return x * 0.5

@triton.jit
def scale(x, out, n, eps, row_stride, BLOCK: tl.constexpr):
    at = x + tl.program_id(0) * row_stride
    i = tl.arange(0, BLOCK)
    tl.store(out + i, half(tl.load(at + i, mask=i < n)) + eps, mask=i < n)

@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w) for b in (128, 256) for w in (2, 4)], key=["n"])
@triton.heuristics({"EVEN": lambda given: given["n"] % 16 == 0})
@triton.jit
def tuned(x_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0, mask=i < n)

@triton.jit
def square(a_ptr, c_ptr, B: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr):
    tile = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    total = tl.zeros([B, B], tl.float32)
    for step in range(STEPS):
        a = tl.load(a_ptr + step * B * B + tile)
        total = tl.dot(a, a, total, input_precision=PRECISION)
    tl.store(c_ptr + tile, total)

@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), missing)

def plain():
    pass
"""

CARRIED = (
    MINE
    + """
from refllm.kernels.launch import Launch

def launches(target):
    x = torch.empty(4096, device="meta")
    given = {"x": x, "out": x, "n": 4096, "eps": 1e-5, "row_stride": 4096}
    for block in (1024, 4096):
        yield f"scale {block}", Launch(scale, (1,), given, {"BLOCK": block}, wide_loads=True)
    yield "narrow", Launch(scale, (1,), {**given, "n": 4095}, {"BLOCK": 4096}, wide_loads=True)
"""
)


@pytest.fixture
def refllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        sources.load.cache_clear()
        monkeypatch.setattr(sys, "argv", ["refllm", "kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    path = tmp_path / "carried.py"
    path.write_text(CARRIED)
    return path


# --- list


def test_list_names_every_operator_once(refllm: Run) -> None:
    code, out, _ = refllm("list", "--json", "-")
    kernels = json.loads(out)["kernels"]
    assert code == 0
    assert sorted(name for kernel in kernels for name in kernel["operators"]) == sorted({*FILES, *BACKWARD_FILES})
    assert set(FILES) == set(OPERATORS)
    for kernel in kernels:
        assert set(kernel) == {"operators", "file", "kernels", "configurations", "about"}
        assert (Path(__file__).parents[2] / kernel["file"]).is_file()
        assert list(kernel["configurations"]) == list(TARGETS)
        assert all(kernel["configurations"].values())
        assert kernel["kernels"]
        assert kernel["about"]


def test_list_shows_files_and_with_verbose_configurations(refllm: Run) -> None:
    _, short, _ = refllm("list")
    _, long, _ = refllm("list", "--verbose")
    assert "rms_norm_kernel" in short
    assert "bfloat16" not in short
    assert "bfloat16" in long


# --- check-aot, our kernels


def test_check_aot_of_one_kernel_for_one_target(refllm: Run, tmp_path: Path) -> None:
    ours = dict(sources.our_sources()[0].launches(TARGETS["sm_90"]))
    name = max(ours, key=len)  # in no other name
    code, out, _ = refllm("check-aot", "--kernel", name, "--target", "sm_90", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert code == 0, out
    assert set(result) == {"schema", "verdict", "triton", "compiled", "seconds", "configurations"}
    (row,) = result["configurations"]
    assert set(row) == {
        *("module", "kernel", "configuration", "target", "num_warps", "num_stages", "report", "findings")
    }
    assert (row["kernel"], row["configuration"], row["target"]) == (ours[name].kernel.__name__, name, "sm_90")
    assert set(row["report"]) == {
        *("kernel", "target", "num_warps", "resources", "instructions", "shared", "tensor_memory", "occupancy"),
        *("dots", "seconds", "loads_can_be_wide", "stores_can_be_wide"),
    }
    assert set(row["report"]["resources"]) == {"registers", "stack", "spill_bytes", "wgmma_serialized"}
    assert set(row["report"]["instructions"]) == {
        *("count", "code_bytes", "classes", "tensor", "fp64", "async_copies", "local", "loads", "stores")
    }
    assert set(row["report"]["occupancy"]) == {"programs", "warps", "limit"}
    assert result["verdict"] == "holds"
    assert "1 configurations, 1 compiled" in out
    assert "within the gates" in out


def test_check_aot_compiles_for_every_target_by_default() -> None:
    assert commands.read_targets("") == list(TARGETS.values())
    assert [target.name for target in commands.read_targets("gfx942, sm_80")] == ["gfx942", "sm_80"]


# --- check-aot, a user's kernel


def test_a_file_that_carries_its_configurations(refllm: Run, carried: Path) -> None:
    code, out, _ = refllm("check-aot", carried, "--target", "sm_90", "--json", "-")
    result = json.loads(out)
    assert code == 1
    assert (result["schema"], result["verdict"]) == (2, "fails")
    found = {row["configuration"]: [each["gate"] for each in row["findings"]] for row in result["configurations"]}
    assert found == {"scale 1024": [], "scale 4096": [], "narrow": ["wide loads", "wide stores"]}
    finding, _ = result["configurations"][2]["findings"]
    assert set(finding) == {"gate", "sentence", "value", "limit"}
    assert finding["value"] < finding["limit"]


def test_the_worst_configuration_is_shown_and_all_with_verbose(refllm: Run, carried: Path) -> None:
    _, short, _ = refllm("check-aot", f"{carried}:scale", "--target", "sm_90")
    _, long, _ = refllm("check-aot", f"{carried}:scale", "--target", "sm_90", "-v")
    assert "3: narrow" in short
    assert "scale 4096" not in short
    assert "scale 4096" in long
    assert "scale sm_90 [narrow]: 0 % of the bytes come in loads of 16 bytes" in short
    assert "3 configurations, 3 compiled" in short


def test_a_kernel_with_arguments_of_the_command_line(refllm: Run, mine: Path) -> None:
    given = ("x=*bf16", "out=*fp32", "n=i32:16", "eps=1e-5", "row_stride=i32:16")
    words = [word for text in given for word in ("--arg", text)]
    words += ["--constant", "BLOCK=1024", "--num-warps", "2", "--json", "-", "--target", "sm_80"]
    code, out, _ = refllm("check-aot", f"{mine}:scale", *words)
    (row,) = json.loads(out)["configurations"]
    assert code == 0
    assert (row["configuration"], row["num_warps"]) == ("BLOCK=1024 warps=2 stages=3", 2)
    assert list(row["report"]["instructions"]["loads"]) == ["16"]


def test_a_tensor_may_be_given_as_not_aligned(refllm: Run, mine: Path) -> None:
    given = ("x=*bf16:1", "out=*fp32", "n=i32:16", "eps=1e-5", "row_stride=i32:16")
    words = [word for text in given for word in ("--arg", text)]
    _, out, _ = refllm(
        "check-aot", f"{mine}:scale", *words, "--constant", "BLOCK=1024", "--json", "-", "--target", "sm_80"
    )
    (row,) = json.loads(out)["configurations"]
    assert list(row["report"]["instructions"]["loads"]) == ["2"]
    assert row["findings"] == []  # what is not aligned cannot move 16 bytes at a time


def test_narrow_loads_and_stores_of_aligned_tensors_are_found(refllm: Run, mine: Path) -> None:
    """Any n may be the end of the mask; and nobody had to say that the kernel's speed is that of the memory."""
    given = ("x=*bf16", "out=*fp32", "n=i32", "eps=1e-5", "row_stride=i32:16")
    words = [word for text in given for word in ("--arg", text)]
    code, out, _ = refllm("check-aot", f"{mine}:scale", *words, "--constant", "BLOCK=1024", "--target", "sm_80")
    assert code == 1
    assert "0 % / 0 %" in out
    said = " ".join(out.split())
    assert "0 % of the bytes come in loads of 16 bytes, where 50 % must (there are 8 of 2 bytes)" in said
    assert "0 % of the bytes come in stores of 16 bytes, where 50 % must (there are 8 of 4 bytes)" in said


def test_an_autotuned_kernel_is_compiled_in_every_configuration(refllm: Run, mine: Path) -> None:
    words = ("--arg", "x_ptr=*fp32", "--arg", "n=4096", "--target", "gfx942", "--json", "-")
    code, out, _ = refllm("check-aot", f"{mine}:tuned", *words)
    assert code == 0
    assert [row["configuration"] for row in json.loads(out)["configurations"]] == [
        f"BLOCK={block} EVEN=True warps={warps} stages=3" for block in (128, 256) for warps in (2, 4)
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--arg", "a_ptr=*bf16", "--constant", "PRECISION=ieee"), []),
        (("--arg", "a_ptr=*bf16", "--constant", "PRECISION=ieee", "--num-stages", "1"), ["async copies"]),
        (("--arg", "a_ptr=*fp32", "--constant", "PRECISION=ieee"), []),
    ],
)
def test_a_product_of_narrow_numbers_in_a_loop_is_expected_to_run_ahead(
    refllm: Run, mine: Path, words: tuple[str, ...], found: list[str]
) -> None:
    """float32 asked for exactly needs no tensor cores, and nothing is expected of it."""
    words += ("--arg", "c_ptr=*fp32", "--constant", "B=64", "--constant", "STEPS=16", "--target", "sm_80")
    code, out, _ = refllm("check-aot", f"{mine}:square", *words, "--json", "-")
    (row,) = json.loads(out)["configurations"]
    assert [finding["gate"] for finding in row["findings"]] == found
    assert code == bool(found)


def test_what_is_missing_is_a_command_line_with_the_names_filled_in(refllm: Run, mine: Path) -> None:
    code, _, err = refllm("check-aot", f"{mine}:scale", "--arg", "n=4096")
    assert code == 2
    assert err.strip().endswith(
        f"refllm kernels check-aot {mine}:scale --arg n=4096 --arg 'x=*bf16' --arg 'out=*bf16' --arg eps=fp32 "
        "--arg row_stride=i32:16 --constant BLOCK=128"
    )
    assert "scale cannot be compiled without x, out, eps, row_stride, BLOCK; correct the guesses in this, which" in err


@pytest.mark.parametrize(
    ("reference", "words", "sentence"),
    [
        ("nowhere.py", (), "refllm: no such file: nowhere.py"),
        ("no_such_package:kernel", (), "no_such_package cannot be imported: ModuleNotFoundError"),
        ("{mine}:gone", (), "has no kernel 'gone'; its @triton.jit functions: scale, tuned, square, broken"),
        ("{mine}:plain", (), "plain in {mine} is not decorated with @triton.jit"),
        ("{mine}", (), "has the kernels scale, tuned, square, broken; name one as {mine}:scale"),
        ("{mine}:scale", ("--target", "sm_70"), "target 'sm_70' is not known; use one of sm_80, sm_90, sm_100, gfx942"),
        ("{mine}:scale", ("--arg", "z=i32"), "scale has no parameter 'z'; it has x, out, n, eps, row_stride, BLOCK"),
        ("{mine}:scale", ("--arg", "n=int"), "--arg n=int: give a type such as *bf16"),
        ("{mine}:scale", ("--arg", "n=*bf17"), "--arg n=*bf17: give a type such as *bf16"),
        ("{mine}:scale", ("--arg", "n"), "'n': expected NAME=VALUE"),
        (
            "{mine}:broken",
            ("--arg", "x_ptr=*fp32", "--constant", "BLOCK=16", "--target", "gfx942"),
            "broken does not compile for gfx942: mine.py:{line} `tl.store(x_ptr + tl.arange(0, BLOCK), missing)`: ",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    refllm: Run, mine: Path, reference: str, words: tuple[str, ...], sentence: str
) -> None:
    code, out, err = refllm("check-aot", reference.format(mine=mine), *words)
    assert code == 2
    assert out == ""
    line = MINE[: MINE.index(", missing)")].count("\n") + 1
    assert sentence.format(mine=mine, line=line) in err
    assert len(err.splitlines()) == 1


def test_a_file_that_fails_is_one_sentence(refllm: Run, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise OSError('no disk')\n")
    (tmp_path / "launches.py").write_text("def launches(target):\n    return [1 / 0]\n")
    (tmp_path / "pairs.py").write_text("LAUNCHES = [3]\n")
    assert "fails.py cannot be imported: OSError: no disk" in refllm("check-aot", tmp_path / "fails.py")[2]
    assert "fail on sm_90: ZeroDivisionError" in refllm("check-aot", tmp_path / "launches.py")[2]
    assert "must be pairs (name, refllm.kernels.launch.Launch)" in refllm("check-aot", tmp_path / "pairs.py")[2]


def test_a_filter_that_matches_nothing_is_one_sentence(refllm: Run, carried: Path) -> None:
    code, _, err = refllm("check-aot", carried, "--kernel", "zzz")
    assert (code, err) == (2, "refllm: no configuration's name contains 'zzz'\n")


def test_interpreting_by_environment_is_one_sentence(refllm: Run, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = refllm("check-aot", mine)
    assert (code, err) == (2, "refllm: TRITON_INTERPRET is set, and with it nothing can be compiled; unset it\n")


def test_help_loads_neither_torch_nor_triton() -> None:
    script = (
        "import sys; from refllm.commands import cli; sys.argv = ['refllm', 'kernels', 'check-aot', '--help']\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--target" in result.stdout


@pytest.mark.parametrize("others", [["--target", "sm_80"], ["--kernel", "relu2"]])
def test_a_record_is_of_all_kernels_or_refused_before_the_work(refllm: Run, tmp_path: Path, others: list[str]) -> None:
    code, _, error = refllm("check-aot", "--record", str(tmp_path / "record.json"), *others)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "--record keeps all of our kernels on all targets" in error
    code, _, error = refllm("check-aot", "--record", str(tmp_path / "nowhere" / "record.json"))
    assert code == 2
    assert "there is no folder" in error
