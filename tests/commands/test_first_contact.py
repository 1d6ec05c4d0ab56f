"""What a new user meets: what is installed, what is missing, how it is said, and what the README promises."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy_operators
import pytest
import torch
import typer.main

from refllm import extras, golden
from refllm.check.stacks import STACKS
from refllm.commands import cli
from refllm.config import AutoConfig
from refllm.errors import ConfigError, InputError, MissingExtraError, RefllmError, TokenizerError
from refllm.opcheck import inputs
from refllm.opcheck.api import check_op
from refllm.precision import check_dtype
from refllm.precision.dtype_names import dtype_name
from refllm.storage import not_a_checkpoint
from refllm.strategies.arrays import LAYOUTS, Array, memory_of
from refllm.text.tokenizer import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CHECKPOINTS = golden.checkpoints()


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one sentence with which the command ends, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["refllm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1), said
    return said.err.strip()


# --------------------------------------------------------------------------------------------- what make check installs


def packages_of(names: set[str]) -> set[str]:
    """The names of the distributions that extras bring, those of other extras that they name included."""
    found: set[str] = set()
    for requirement in (r for name in names for r in PYPROJECT["project"]["optional-dependencies"][name]):
        nested = re.match(r"refllm\[(.*)\]", requirement)
        found |= packages_of(set(nested[1].split(","))) if nested else {re.split(r"[<>=;\[ ]", requirement)[0]}
    return found


DISTRIBUTIONS = {"markdown_it": "markdown-it-py"}
"""Name of an import -> what it is installed as, where the two differ by more than a dash."""
PACKAGES_OF_STACKS = {name for stack in STACKS.values() for name in stack.needs if name != "torch"}


def installed_by_make_check() -> set[str]:
    chosen = re.search(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)
    assert chosen is not None
    return packages_of(set(chosen[1].split(","))) | {"pytest"}


@cache
def optional_imports() -> set[str]:
    """Every package that refllm, kernels or golden import and that the core does not bring."""
    statement = re.compile(r"^ *(?:from (\w+)[\w.]* import |import (\w+)[\w., ]*(?:#.*)?$)", re.MULTILINE)
    files = [file for folder in ("refllm", "kernels", "golden") for file in (ROOT / folder).rglob("*.py")]
    found = {name for file in files for pair in statement.findall(file.read_text()) for name in pair if name}
    core = {re.split(r"[<>= ]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]}
    brought = {"click", "markupsafe"}  # by typer and by jinja2
    return found - set(sys.stdlib_module_names) - core - brought - {"refllm"}


def test_make_check_installs_every_package_that_a_command_of_the_readme_imports() -> None:
    assert "'.[$(EXTRAS)]'" in MAKEFILE
    assert "$(PYTEST)" in MAKEFILE
    only_in_tests = {"liger_kernel"}  # timed beside ours where it is there
    only_in_tests |= PACKAGES_OF_STACKS | {"lm_eval"}  # installed by who uses one
    assert {"torch", "hypothesis", "matplotlib", "transformers"} <= optional_imports()  # the search finds them
    needed = {DISTRIBUTIONS.get(name, name) for name in optional_imports() - only_in_tests}
    assert needed <= installed_by_make_check()


def test_every_optional_import_has_an_extra_that_brings_it() -> None:
    of_their_own = {"litgpt"}  # in an environment without what else is here
    assert optional_imports() - of_their_own <= set(extras.EXTRA_OF)
    for package, extra in extras.EXTRA_OF.items():
        assert DISTRIBUTIONS.get(package, package.replace("_", "-")) in packages_of({extra})


def commands_of_the_readme() -> list[str]:
    lines = re.findall(r"^    (refllm .*)$", README, re.MULTILINE)
    quoted = re.findall(r"`(?:time )?(refllm [a-z][^`]*)`", README)
    return sorted({*lines, *(text for text in quoted if "..." not in text)})


@pytest.mark.parametrize("line", commands_of_the_readme())
def test_command_of_the_readme_is_one_that_there_is(line: str) -> None:
    """Its subcommand and every option of it; what it prints is not asked."""
    words = shlex.split(line.replace("[", "").replace("]", ""))[1:]
    command: Any = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known | {"--help"}


def test_python_runs_it_as_a_module() -> None:
    command = [sys.executable, "-m", "refllm", "info", str(CHECKPOINTS["helium-tiny"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0].split()[-1]) == (0, "(causal_lm)")


def test_a_script_above_a_clone_called_refllm_finds_the_package(tmp_path: Path) -> None:
    """As `make check` installs it; without that line Python takes the folder for a package without content."""
    finder = re.search(r"^FINDER := (import .*)$", MAKEFILE, re.MULTILINE)
    assert finder is not None
    (tmp_path / "refllm" / "refllm").mkdir(parents=True)
    (tmp_path / "script.py").write_text(f"{finder[1]}\nimport refllm\nprint(refllm.load.__name__)")
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False, env=quiet
    )
    assert done.stdout == "load\n", done.stderr


def test_the_line_by_which_that_works_does_nothing_where_pythonpath_names_another_copy() -> None:
    finder = re.search(r"^FINDER := (import .*)$", MAKEFILE, re.MULTILINE)
    assert finder is not None
    ours = SimpleNamespace(__module__="__editable___refllm_0_1_0_finder")
    other = SimpleNamespace(__module__="importlib")
    for environment, expected in (({}, [ours, other]), ({"PYTHONPATH": "x"}, [other, ours])):
        meta_path = [other, ours]
        line = finder[1].removeprefix("import os, sys; ")
        exec(line, {"os": SimpleNamespace(environ=environment), "sys": SimpleNamespace(meta_path=meta_path)})
        assert meta_path == expected


# ----------------------------------------------------------------------------------------------------- what is missing


def installed_from(monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """As if the installed package had these files in its metadata, and pip lay beside the interpreter."""
    found = SimpleNamespace(read_text=lambda name: files.get(name.partition(".")[0]))
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    monkeypatch.setattr(extras.shutil, "which", lambda name: str(Path(sys.executable).parent / name))


def test_advice_fits_a_checkout_a_wheel_and_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = tmp_path / "my refllm"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text('[project]\nname = "refllm"\n')
    wheel = tmp_path / "refllm-0.1.0-py3-none-any.whl"
    wheel.touch()
    for direct, source in (
        ({"url": checkout.as_uri(), "dir_info": {"editable": True}}, f"-e '{checkout}[check]'"),
        ({"url": checkout.as_uri(), "dir_info": {}}, f"'{checkout}[check]'"),
        ({"url": wheel.as_uri(), "archive_info": {}}, f"'{wheel}[check]'"),
        ({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}}, "'refllm[check]'"),
        ({"url": "https://example.org/refllm-0.1.0-py3-none-any.whl", "archive_info": {}}, "'refllm[check]'"),
    ):
        installed_from(monkeypatch, direct_url=json.dumps(direct))
        assert extras.install_command("hypothesis") == f"pip install {source}"
    installed_from(monkeypatch, direct_url="no JSON")
    assert extras.install_command("torch", "transformers") == "pip install 'refllm[fast,witness]'"


def test_advice_without_metadata_is_that_of_the_folder_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch)
    assert extras.install_command("torch") == f"pip install -e {shlex.quote(f'{ROOT}[fast]')}"


def test_advice_names_a_pip_that_belongs_to_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, direct_url="{", INSTALLER="uv\n")
    monkeypatch.setattr(extras.shutil, "which", lambda name: "/somewhere/else/pip")
    assert extras.install_command("torch").startswith(f"{shlex.quote(sys.executable)} -m pip install ")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert extras.install_command("torch") == "uv pip install 'refllm[fast]'"


def test_no_message_has_a_command_of_its_own() -> None:
    files = [file for folder in ("refllm", "kernels", "golden") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if "pip install" in file.read_text()] == []


ABSENT = (
    "torch",
    "triton",
    "transformers",
    "hypothesis",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "ctranslate2",
)
HELIUM = str(CHECKPOINTS["helium-tiny"])
OPERATOR_FILE = str(Path(__file__).with_name("numpy_operators.py"))
NUMPY_OPERATOR = ["--arrays", "numpy", "--max-examples", "0"]
WITH_NUMPY = {
    "info": ["info", HELIUM],
    "generate": ["generate", HELIUM, "--ids", "1,2", "--max-new-tokens", "2"],
    "score": ["score", HELIUM, "--ids", "1,2,3"],
    "check, numpy": ["check", HELIUM, "--candidate", "numpy", "--dtype", "bf16", "--prompt", "The residual stream"],
    "golden verify": ["golden", "verify", "rms_norm"],
    "golden show": ["golden", "show", "rms_norm"],
    "check-op --list": ["check-op", "--list"],
    "check-op of a right one": ["check-op", "relu2", "--candidate", "{me}:relu2", *NUMPY_OPERATOR],
    "check-op of a wrong one": ["check-op", "relu2", "--candidate", "{me}:wrong", *NUMPY_OPERATOR],
    "check-op of one that changes its input": ["check-op", "relu2", "--candidate", "{me}:in_place", *NUMPY_OPERATOR],
}
WITHOUT: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "check": (["check"], ("torch", "triton")),
    "check CHECKPOINT": (["check", HELIUM], ("torch", "transformers")),
    "check, torch": (["check", HELIUM, "--candidate", "torch"], ("torch",)),
    "check, onnx": (["check", HELIUM, "--candidate", "onnx:m.onnx"], ("onnx", "onnxruntime")),
    "check, openvino": (["check", HELIUM, "--candidate", "openvino:m.xml"], ("openvino",)),
    "check, ctranslate2": (["check", HELIUM, "--candidate", "ctranslate2:m"], ("ctranslate2",)),
    "trace, triton": (["trace", HELIUM, "--candidate", "triton", "-o", "{tmp}/t"], ("torch", "triton")),
    "generate, torch": (["generate", HELIUM, "--ids", "1", "--backend", "torch"], ("torch",)),
    "score, triton": (["score", HELIUM, "--ids", "1,2", "--backend", "triton"], ("torch", "triton")),
    "check-op": (["check-op", "relu2", "--candidate", "{me}:relu2"], ("hypothesis",)),
    "check-op, tensors": (["check-op", "relu2", "--candidate", "{me}:relu2", "--max-examples", "0"], ("torch",)),
    "audit": (["audit", "relu2"], ("torch",)),
    "kernels list": (["kernels", "list"], ("torch", "triton")),
    "kernels check-aot": (["kernels", "check-aot"], ("torch", "triton")),
    "golden verify, torch": (["golden", "verify", "--backend", "torch"], ("torch",)),
    "golden verify, triton": (["golden", "verify", "--backend", "triton"], ("torch", "triton")),
    "golden make": (["golden", "make"], ("torch", "transformers")),
    "bench cpu": (["bench", "cpu"], ("torch", "transformers")),
    "bench growth": (["bench", "growth"], ("torch", "transformers")),
    "bench growth, plots": (["bench", "growth", "--side", "numpy", "--plots", "{tmp}"], ("matplotlib",)),
    "bench kernels": (["bench", "kernels"], ("torch", "triton")),
    "bench attention": (["bench", "attention"], ("torch", "triton")),
    "bench decode": (["bench", "decode"], ("torch", "triton")),
    "bench prefill": (["bench", "prefill"], ("torch", "triton")),
    "bench tune": (["bench", "tune"], ("torch", "triton")),
}


_COMMANDS = """
import contextlib, io, json, sys
for name in {absent!r}:
    sys.modules[name] = None  # as if it were not installed
from refllm.commands import cli

def run(arguments):
    sys.argv, out, err = ["refllm", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code, out.getvalue(), err.getvalue()
        except BaseException as error:
            return -1, out.getvalue(), repr(error)

print(json.dumps({{name: run(arguments) for name, arguments in json.loads(sys.stdin.read()).items()}}))
"""


@pytest.fixture(scope="module")
def numpy_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """What the commands say where NumPy is all there is: exit code, standard output, standard error, by name."""
    fill = {"tmp": tmp_path_factory.mktemp("numpy_only"), "me": OPERATOR_FILE}
    commands = {name: arguments for name, (arguments, _) in WITHOUT.items()} | WITH_NUMPY
    given = {name: [part.format(**fill) for part in arguments] for name, arguments in commands.items()}
    program = _COMMANDS.format(absent=ABSENT)
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", WITHOUT)
def test_a_command_that_needs_more_than_numpy_says_what_and_how(
    name: str, numpy_only: dict[str, tuple[int, str, str]]
) -> None:
    code, out, said = numpy_only[name]
    assert (code, out, said.count("\n")) == (2, "", 1), said
    missing = WITHOUT[name][1]
    which = "which is" if len(missing) == 1 else "which are"
    assert f" needs {' and '.join(missing)}, {which} not installed; install with: " in said
    assert said.rstrip().endswith(extras.install_command(*missing))


@pytest.mark.parametrize("name", WITH_NUMPY)
def test_what_needs_no_more_than_numpy_works_with_numpy_alone(
    name: str, numpy_only: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = numpy_only[name]
    expected = {"check-op of a wrong one": ("fails", 1), "check-op of one that changes its input": ("fails, purity", 1)}
    says, wanted = expected.get(name, ("holds" if name.startswith("check-op of") else "", 0))
    assert code == wanted, err
    assert says in out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64", "bool"])
def test_arrays_lie_in_memory_as_tensors_do(layout: str, dtype: str) -> None:
    for shape in ((2, 3, 4), (1, 3, 4), (2, 5, 1)):
        values = "integers" if dtype in ("int64", "bool") else "normal"
        array = Array(shape, dtype, values=values, scale=2, layout=layout)
        ours, theirs = array.placed(), array.tensor()
        assert ours.shape == tuple(theirs.shape)
        for mine, stride, size in zip(ours.strides, theirs.stride(), shape, strict=True):
            assert mine == stride * ours.itemsize or size == 1
        assert ours.flags.writeable
        if layout != "far":
            assert memory_of(ours).nbytes == theirs.untyped_storage().nbytes()
            for _ in range(2):  # as made, and with what lies between the elements changed
                np.testing.assert_array_equal(inputs.memory(ours), inputs.memory(theirs).numpy())
                changed = inputs.change_padding({"x": ours})
                assert changed == inputs.change_padding({"x": theirs})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64", "bool"])
def test_the_lines_that_make_an_array_make_that_array(layout: str, dtype: str) -> None:
    values = "integers" if dtype in ("int64", "bool") else "normal"
    array = Array((2, 3, 4), dtype, values=values, scale=2, planted=(((0, 1, 2), 1.0),), layout=layout)
    scope: dict[str, Any] = {"np": np, "ml_dtypes": ml_dtypes}
    exec("\n".join(array.code("x", numpy=True)), scope)
    ours, made = array.placed(), scope["x"]
    assert (made.dtype, made.shape) == (ours.dtype, ours.shape)
    assert made.strides == ours.strides
    assert made.tobytes() == ours.tobytes()
    if layout not in ("dense", "expanded", "constant", "far"):
        assert made.base.tobytes() == memory_of(ours).tobytes()


@pytest.mark.parametrize(
    ("operator", "function", "broken"),
    [
        ("relu2", "wrong", "value"),
        ("relu2", "in_place", "purity"),
        ("relu2", "raises", "raises"),
        ("relu2", "half_written", "unwritten"),
        ("relu2", "reads_beside", "invariance"),
        ("relu2", "other_dtype", "result"),
        ("decode_attention", "reads_past_the_lengths", ""),
        ("attention", "sees_masked_keys", ""),
    ],
)
def test_the_reproduction_of_a_numpy_function_needs_no_torch(
    operator: str, function: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("empty", "empty_like"):  # a reproduction may exchange them, and is meant to run alone
        monkeypatch.setattr(np, name, getattr(np, name))
    candidate = getattr(numpy_operators, function)
    report = check_op(
        operator, candidate, dtype="bfloat16", arrays="numpy", policy="fused", level="hostile", max_examples=0,
        isolate=False, shrink=function == "wrong",
    )  # fmt: skip
    assert report.verdict == "fails"
    assert broken in ("", report.property)
    assert "torch" not in report.repro
    with pytest.raises(SystemExit) as ended:
        exec(compile(report.repro, "repro.py", "exec"), {"__name__": "repro"})
    assert ended.value.code == 1


def test_large_inputs_are_copied_to_see_whether_they_change() -> None:
    for large in (Array((2200, 2000), "float32", "zeros").placed(), torch.zeros(2200, 2000)):
        before = inputs.memory(large)
        large[0, 0] = 1
        assert (np.asarray(before) == 0).all()


# --------------------------------------------------------------------------------------------- dtypes and ids by name


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("bfloat16", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16, ml_dtypes.bfloat16]),
        (
            "float16",
            ["fp16", "f16", "half", "torch.half", torch.float16, np.float16, np.dtype("float16")],
        ),
        ("float32", ["fp32", "f32", "float", "torch.float32", torch.float32, np.float32, np.dtype("float32")]),
        ("float64", ["fp64", "double", "torch.float64", torch.double, np.float64]),
    ],
)
def test_a_dtype_may_be_called_by_every_usual_name(name: str, spelled: list[Any]) -> None:
    assert [dtype_name(one) for one in spelled] == [name] * len(spelled)
    assert [check_dtype(one) for one in spelled] == [name] * len(spelled)


@pytest.mark.parametrize("unknown", ["fp8", "int8", "", None, 16, torch.int8, np.int32, object()])
def test_what_is_no_dtype_is_refused_with_those_that_there_are(unknown: Any) -> None:
    assert dtype_name(unknown) is unknown or unknown is np.int32
    with pytest.raises(InputError, match="float64, float32, bfloat16, float16"):
        check_dtype(unknown)


@pytest.mark.parametrize("command", ["check", "generate", "score", "check-op"])
def test_short_names_of_dtypes_work_on_the_command_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "check": [HELIUM, "--candidate", "numpy", "--ids", "1,2,3,4", "--dtype", "bf16"],
        "generate": [HELIUM, "--ids", "1,2", "--max-new-tokens", "1", "--dtype", "half"],
        "score": [HELIUM, "--ids", "1,2", "--dtype", "torch.bfloat16"],
        "check-op": ["relu2", "--candidate", f"{OPERATOR_FILE}:relu2", "--arrays", "numpy", "--max-examples", "0"],
    }[command]
    monkeypatch.setattr(sys, "argv", ["refllm", command, *arguments, *(["--dtype", "fp16"] * (command == "check-op"))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, 1)
    assert "is not known" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,,2", "place 2"),
        ("1,", "place 2"),
        (",", "place 1"),
        (",1", "place 1"),
        ("1, ,2", "place 2"),
        ("1.5", "'1.5' is not a token id"),
        ("\uff11", "is not a token id"),
        ("\u0661,2", "is not a token id"),
        ("9" * 30, "is not a token id"),
        ("-1", "outside 0..767"),
        ("768", "outside 0..767"),
        ("", "no tokens"),
    ],
)
def test_ids_that_are_none_are_refused(
    text: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in complaint(["score", HELIUM, "--ids", text], capsys, monkeypatch)


# ------------------------------------------------------------------------------------------ files to read and to write


OUTPUTS = {
    "--html": ["check", HELIUM, "--candidate", "numpy", "--html", "{file}"],
    "--json": ["check", HELIUM, "--candidate", "numpy", "--json", "{file}"],
    "--output": ["trace", HELIUM, "--candidate", "numpy", "--output", "{file}"],
    "--repro": ["check-op", "relu2", "--candidate", f"{OPERATOR_FILE}:relu2", "--arrays", "numpy", "--repro", "{file}"],
}


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("kind", ["no folder", "a folder"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    option: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("refllm.check.run.check_all", "refllm.check.run.trace_candidate", "refllm.opcheck.candidate.load"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("began"))
    file = tmp_path / "nowhere" / "f" if kind == "no folder" else tmp_path
    said = complaint([part.format(file=file) for part in OUTPUTS[option]], capsys, monkeypatch)
    assert f"{option} {file} cannot be written" in said


def test_a_folder_of_pictures_that_cannot_be_one_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refllm.bench.growth.bench_growth", lambda *_: pytest.fail("began"))
    (tmp_path / "file").touch()
    said = complaint(["bench", "growth", "--side", "numpy", "--plots", str(tmp_path / "file")], capsys, monkeypatch)
    assert f"--plots {tmp_path / 'file'} cannot be made a folder" in said


def _config(path: Path) -> None:
    (path / "config.json").write_bytes((Path(HELIUM) / "config.json").read_bytes())


def _nested(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    _config(path / "inner")


def _cache_of_the_hub(path: Path) -> None:
    (path / "snapshots" / "abc").mkdir(parents=True)
    _config(path / "snapshots" / "abc")


def _folder_with(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).touch()

    return make


NO_CHECKPOINTS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "m.gguf": (b"GGUF\3\0\0\0", "a GGUF file"),
    "old.bin": (b"lmgg", "GGML"),
    "pytorch_model.bin": (b"PK\3\4", "a zip archive"),
    "m.pt": (b"\x80\x02}", "a Python pickle"),
    "empty.pt": (b"hello", "by its name a pickle"),
    "m.tar.gz": (b"\x1f\x8b\x08", "a gzip archive"),
    "m.h5": (b"\x89HDF\r\n", "an HDF5 file"),
    "page.html": (b"<!doctype html>", "a web page"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "model.safetensors": (b"\x02\0\0\0\0\0\0\0{}", "the weights alone"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "the index of a checkpoint"),
    "tokenizer.json": (b'{"added_tokens": []}', "a tokenizer, not config.json"),
    "empty": (b"", "an empty file"),
    "notes.txt": (b"hello", "no file of a checkpoint"),
    "nested": (_nested, "give that"),
    "models--a--b": (_cache_of_the_hub, "give that"),
    "nothing": (Path.mkdir, "no config.json in this folder"),
    "ggufs": (_folder_with("m.gguf"), "GGUF files of llama.cpp"),
    "pickles": (_folder_with("pytorch_model.bin"), "pickles"),
    "adapter": (_folder_with("adapter_config.json"), "an adapter of PEFT"),
    "pipe": (os.mkfifo, "not a regular file"),
    "link": (lambda path: path.symlink_to("nowhere"), "no such folder or file"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named_for_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, says = NO_CHECKPOINTS[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    for command in ("info", "check"):
        said = complaint([command, str(path), *(["--candidate", "numpy"] * (command == "check"))], capsys, monkeypatch)
        assert says in said
        assert str(path) in said


@pytest.mark.parametrize("read", [AutoConfig.from_pretrained, AutoTokenizer.from_pretrained])
@pytest.mark.parametrize("name", ["kyutai/helium-1-2b", "https://huggingface.co/kyutai/helium-1-2b"])
def test_a_name_of_the_hub_is_told_that_nothing_is_downloaded(read: Callable[[str], Any], name: str) -> None:
    with pytest.raises(
        (ConfigError, TokenizerError), match=r"nothing is downloaded: .*'hf download kyutai/helium-1-2b"
    ):
        read(name)


def test_a_misspelt_path_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "golden").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("golden/checkpoint", "nowhere", "/no/where"):
        assert "no such folder or file" in not_a_checkpoint.explain(path)


def test_a_configuration_of_any_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes((Path(HELIUM) / "config.json").read_bytes())
    assert AutoConfig.from_pretrained(tmp_path / "mine.json").model_type == "helium"


# --------------------------------------------------------------------------------------------------------------- widths


def test_the_diff_of_the_readme_cuts_no_line_of_the_pages() -> None:
    command = next(line for line in README.splitlines() if line.startswith("    diff -y"))
    words = shlex.split(command.partition("|")[0])
    for other in ("llama", "stablelm", "arcee"):
        words[-1] = f"refllm/models/{other}.py"
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        for page in (words[-2], words[-1]):
            for line in (ROOT / page).read_text().splitlines():
                assert line in shown, f"{page}: {line}"


def test_an_optional_package_is_known_by_the_import_that_did_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"torch"}
    monkeypatch.setattr(extras, "not_installed", lambda packages: [name for name in packages if name in missing])
    for name, package in (("torch", "torch"), ("torch.nn", "torch"), ("triton", None), ("torchx", None), (None, None)):
        assert extras.optional_package(ModuleNotFoundError(name=name)) == package


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_where_there_is_no_triton_that_is_said_of_triton_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.sys, "platform", platform)
    said = "; there is no triton for this system"
    assert (said in extras.needs("this", "torch", "triton")) == (platform == "darwin")
    assert said not in extras.needs("this", "torch")
    assert "needs torch and triton, which are not installed" in extras.needs("this", "torch", "triton")
    assert "needs torch, which is not installed" in extras.needs("this", "torch")


def test_a_checkout_is_a_folder_of_this_project(tmp_path: Path) -> None:
    assert not extras._is_checkout(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert not extras._is_checkout(tmp_path)
    assert extras._is_checkout(ROOT)


def test_missing_extras_are_errors_of_refllm_and_of_imports() -> None:
    error = extras.missing_extra("this", "torch")
    assert isinstance(error, RefllmError | MissingExtraError)
    assert isinstance(error, ImportError)
