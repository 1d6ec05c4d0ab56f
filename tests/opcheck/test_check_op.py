"""`check_op` finds what is wrong, makes it small, names it, writes a program that shows it; right functions pass."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import opcheck_candidates as candidates  # noqa: E402
from hypothesis import strategies  # noqa: E402
from opcheck_tools import HERE, command, shapes, shown  # noqa: E402

from refllm.check import assert_operator, check_op  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.opcheck.candidate import load  # noqa: E402
from refllm.opcheck.observe import Task  # noqa: E402
from refllm.opcheck.tile import tile  # noqa: E402
from refllm.opcheck.worker import Worker  # noqa: E402
from refllm.ops.contracts import CONTRACTS  # noqa: E402
from refllm.strategies import Array, Call, calls, corners  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")


# -- wrong values: the smallest call -----------------------------------------------------------------------------------


def test_a_wrong_tail_needs_one_row_and_one_column_more_than_the_block() -> None:
    """In float16; the test of the command does the same in the other formats."""
    report = check_op("rms_norm", candidates.tail, dtype="float16")
    assert report.property == "value"
    assert shapes(report) == {"x": (1, 257), "weight": (257,)}
    assert tile(report.finding.where, report.finding.axes) == "column 256 (of 257) of row 0"
    assert report.finding.judgement.worst == (0, 256)
    assert report.worst.value == 0
    assert report.seconds < 30
    said = shown(report)
    assert "at (0, 256): 0, exact" in said


WRONG: list[tuple[Callable[..., Any], str, str, str, dict[str, tuple[int, ...]]]] = [
    (candidates.rounded_before_weight, "rms_norm", "bfloat16", "value", {}),
    (candidates.bias_of_3_in_1000, "rms_norm", "bfloat16", "value", {}),
    (candidates.bias_of_3_in_1000, "rms_norm", "float32", "value", {}),
    (candidates.one_element, "rms_norm", "bfloat16", "value", {"x": (1, 4001), "weight": (4001,)}),
    (candidates.no_nan, "rms_norm", "bfloat16", "NaN pattern", {}),
    (candidates.nan_spreads, "rms_norm", "float32", "NaN pattern", {}),
    (candidates.padding_lanes, "layer_norm", "bfloat16", "value", {"x": (1, 3), "weight": (3,)}),
    (candidates.last_key, "attention", "bfloat16", "value",
     {"q": (1, 1, 65, 8), "k": (1, 1, 65, 8), "v": (1, 1, 65, 8)}),
    (candidates.half_split, "rope", "float16", "value", {"q": (1, 1, 1, 4)}),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_wrong_values_are_found_small_and_shown_and_the_nearest_known_bug_is_named(case: Any) -> None:
    function, operator, dtype, property, smallest = case
    policy = "fused" if function is candidates.rounded_before_weight else None  # which honest code may well do
    report = check_op(operator, function, dtype=dtype, policy=policy, isolate=False)
    assert report.property == property
    found = shapes(report)
    assert {name: found[name] for name in smallest} == smallest
    assert sum(int(np.prod(shape)) for shape in found.values()) < 9000
    if function is candidates.padding_lanes:
        assert "Dao-AILab/quack" in " ".join(guess.text for guess in report.guesses)
        assert "looks like" in str(report)
    if function is candidates.one_element:
        assert report.guesses == ()
    shown(report)


def test_a_rounding_too_many_which_is_wrong_under_fused_is_right_under_hf_eager() -> None:
    eager = check_op("rms_norm", candidates.rounded_before_weight, policy="hf-eager", max_examples=20, isolate=False)
    assert eager.verdict == "holds", str(eager)


# -- bad behaviour -----------------------------------------------------------------------------------------------------

BEHAVIOUR = [
    (candidates.raises, "raises", "RuntimeError: only 16 columns", {"x": (1, 17), "weight": (17,)}),
    (candidates.exits, "raises", "SystemExit: 3", {"x": (1, 1)}),
    (candidates.hangs, "hangs", "did not return within 0.5 s", {"x": (1, 31)}),
    (candidates.aborts, "crashes", "SIGABRT", {"x": (1, 31)}),
    (candidates.ends_quietly, "crashes", "exit code 0", {"x": (1, 1)}),
    (candidates.raises_alone, "raises", "row 1 computed alone: ValueError", {}),
    (candidates.two_results, "result", "it returns 2 results; the contract has 1: y", {"x": (1, 1)}),
    (candidates.no_result, "result", "y is a NoneType", {"x": (1, 1)}),
    (candidates.sparse, "result", "y is a sparse_coo tensor; expected a dense tensor", {"x": (1, 1)}),
    (candidates.nested, "result", "y is a nested tensor; expected a dense tensor", {"x": (1, 1)}),
    (candidates.quantized, "result", "what it returns cannot be read", {"x": (1, 1)}),
    (candidates.flat, "result", "has the shape [1]; expected [1, 1]", {"x": (1, 1)}),
    (candidates.wide, "result", "y is float32; expected bfloat16", {"x": (1, 1)}),
    (candidates.elsewhere, "result", "y is on meta; expected cpu", {"x": (1, 1)}),
    (candidates.view, "result", "shares its memory with the input x", {"x": (1, 8)}),
    (candidates.in_place, "purity", "changes its input x", {}),
    (candidates.changes_weight, "purity", "changes its input weight", {"x": (1, 1)}),
    (candidates.unwritten, "unwritten", "memory held that nobody wrote", {"x": (1, 65)}),
    (candidates.unwritten_permuted, "unwritten", "memory held that nobody wrote", {"x": (1, 65)}),
    (candidates.workspace, "unwritten", "memory held that nobody wrote", {}),
    (candidates.counts_unwritten, "unwritten", "memory held that nobody wrote", {}),
    (candidates.varies, "determinism", "from run to run", {}),
    (candidates.reads_beside, "invariance", "what lies between the elements of", {}),
    (candidates.leans_on_its_batch, "invariance", "computed alone is wrong", {}),
]


@pytest.mark.parametrize("case", BEHAVIOUR, ids=lambda case: case[0].__name__)
def test_misbehaviour_is_a_finding_with_a_name(case: Any) -> None:
    function, property, text, smallest = case
    start = time.monotonic()
    report = check_op("rms_norm", function, time_limit=0.5, level="hostile")
    assert (report.verdict, report.property) == ("fails", property), str(report)
    assert text in report.finding.text
    found = shapes(report)
    assert {name: found[name] for name in smallest} == smallest
    assert time.monotonic() - start < 20
    shown(report)


def test_an_array_is_no_tensor_and_a_tensor_no_array() -> None:
    """In float32, where the values would be the same."""
    given = {"dtype": "float32", "isolate": False}
    for function, arrays, text in (
        (candidates.as_array, "torch", "y is a numpy.ndarray; expected a dense tensor"),
        (candidates.numpy_as_tensor, "numpy", "y is a torch.Tensor; expected a NumPy array"),
    ):
        report = check_op("rms_norm", function, arrays=arrays, **given)
        assert (report.property, report.finding.text) == ("result", text)
        shown(report)


def test_a_row_that_is_wrong_as_a_call_of_its_own_is_no_matter_of_its_batch() -> None:
    only = [call for call in corners("cross_entropy", "float32") if call.kind == "plain"]
    given = {"dtype": "float32", "isolate": False, "calls": only}
    found = check_op("cross_entropy", candidates.zero_for_one_row, shrink=False, **given)
    assert (found.property, found.finding.row_alone is not None) == ("invariance", True)
    report = check_op("cross_entropy", candidates.zero_for_one_row, **given)
    assert (report.property, report.finding.row_alone) == ("value", None)
    assert shapes(report)["labels"] == (1,)
    shown(report)


def test_a_row_that_does_not_count_is_not_asked_alone_for_its_mean() -> None:
    """Calls of which no row counts are a family of their own, which a kernel need not offer."""
    given = {"dtype": "float32", "isolate": False, "level": "hostile"}
    kinds = {call.kind: [call] for call in corners("cross_entropy", "float32")}
    asked = check_op("cross_entropy", candidates.zero_for_no_rows, calls=kinds["ignored rows hold NaN"], **given)
    assert asked.verdict == "holds", str(asked)
    report = check_op("cross_entropy", candidates.zero_for_no_rows, calls=kinds["all ignored"], **given)
    assert (report.property, report.finding.text) == ("NaN pattern", "loss: 0, expected nan")
    assert "mean over no rows is 0" in " ".join(guess.text for guess in report.guesses)


def test_a_bug_that_was_seen_in_one_row_alone_is_named_after_the_smallest_call() -> None:
    name = "linear_cross_entropy_loss_in_bfloat16"
    function = load(f"refllm.kernels.mutants.built:{name}").function
    report = check_op("linear_cross_entropy", function, isolate=False)
    assert report.first.row_alone is not None
    assert "the loss of a row is kept in bfloat16" in [guess.what for guess in report.guesses]


def test_what_a_masked_value_holds_must_not_move_a_bit() -> None:
    mask = Array((2, 9), "bool", "ones", planted=(((0, 3), 0), ((1, 8), 0)))
    q, k, v = (Array((2, 2, 9, 16), "float32", seed=seed) for seed in range(3))
    call = Call("attention", "float32", (q, k, v), (("causal", False), ("key_mask", mask)))
    report = check_op("attention", candidates.masked_values, calls=[call], dtype="float32", isolate=False)
    assert report.property == "invariance"
    assert "masked keys and masked values hold" in report.finding.text
    shown(report)


def test_bits_of_a_row_alone_count_only_if_asked() -> None:
    given = {"dtype": "float32", "max_examples": 0, "isolate": False}
    assert check_op("rms_norm", candidates.other_bits_alone, **given).verdict == "holds"
    report = check_op("rms_norm", candidates.other_bits_alone, bitwise=True, **given)
    assert report.property == "invariance"
    assert "other bits" in report.finding.text
    shown(report)


def test_the_search_survives_a_crash_and_what_is_printed() -> None:
    calls = corners("rms_norm", "bfloat16")[:2]
    printed: list[str] = []

    def loud(x: Any, weight: Any, eps: float) -> Any:
        print("a word on standard output")
        printed.append("not in this process")
        return candidates.right(x, weight, eps)

    out = io.StringIO()
    with redirect_stdout(out):
        report = check_op("rms_norm", loud, calls=calls)
    assert (report.verdict, report.examples, printed, out.getvalue()) == ("holds", 2, [], "")


# -- right functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", CONTRACTS)
@pytest.mark.parametrize(("dtype", "policy"), [("bfloat16", "fused"), ("float32", "hf-eager")])
def test_plain_forms_pass_and_the_check_could_have_failed(operator: str, dtype: str, policy: str) -> None:
    report = check_op(operator, getattr(plain, operator), dtype=dtype, policy=policy, max_examples=6, isolate=False)
    assert report.verdict == "holds", str(report)
    assert report.untested == ()
    assert report.worst.ratio <= report.worst.limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_functions(dtype: str) -> None:
    given = {"arrays": "numpy", "dtype": dtype, "max_examples": 10}
    assert check_op("rms_norm", candidates.numpy_right, **given).verdict == "holds"
    unwritten = check_op("rms_norm", candidates.numpy_unwritten, **given)
    assert unwritten.property == "unwritten"
    assert shapes(unwritten)["x"] == (1, 6)
    in_place = check_op("rms_norm", candidates.numpy_in_place, **given)
    assert in_place.property == "purity"
    for report in (unwritten, in_place):
        shown(report)


def test_closures_work_and_so_does_a_strategy_of_calls() -> None:
    factor = 1.5

    def closure(x: Any, weight: Any, eps: float) -> Any:
        return candidates.right(x, weight, eps) * factor

    report = check_op("rms_norm", closure, calls=calls("rms_norm", dtype="float32"), max_examples=5)
    assert report.property == "value"
    assert "put your function here" in report.repro
    factor = 1.0
    assert check_op("rms_norm", closure, calls=calls("rms_norm", dtype="bfloat16"), max_examples=5).examples == 5


def test_the_same_seed_draws_the_same_calls() -> None:
    seen: list[list[str]] = []
    for seed in (1, 1, 2):
        words: list[str] = []
        check_op("rms_norm", candidates.right, max_examples=8, seed=seed, isolate=False,
                 progress=lambda text, done, total, words=words: words.append(text))  # fmt: skip
        seen.append(words)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_a_check_that_cannot_fail_says_so() -> None:
    zeros = [Call("rms_norm", "bfloat16", (Array((2, 8), "bfloat16", "zeros"), Array((8,), "bfloat16"), 1e-5))]
    report = check_op("rms_norm", candidates.right, calls=zeros, isolate=False)
    assert report.verdict == "holds"
    assert "times 1.01 of y" in report.untested
    assert "untested" in str(report)
    # Squares of 2^-132, four units of the smallest number: 1 % more is rounded away.
    tiny = [Call("relu2", "bfloat16", (Array((2, 8), "bfloat16", "ones", scale=2.0**-66),))]
    report = check_op("relu2", plain.relu2, calls=tiny, isolate=False)
    assert report.verdict == "holds"
    assert "times 1.01 of y" in report.untested


def test_what_float32_loses_inside_is_no_finding() -> None:
    """A sum whose first term swallows the others; a mean of 1000, which leaves float32's noise in a bfloat16 result."""
    x = Array((2, 584), "float32", planted=(((0, 0), 1e4),), layout="transposed")
    swallowed = Call("rms_norm", "float32", (x, Array((584,), "float32", seed=1), 1e-6))
    given = {"arrays": "numpy", "dtype": "float32", "calls": [swallowed], "isolate": False}
    assert check_op("rms_norm", candidates.numpy_right, **given).verdict == "holds"

    def one_pass_apart(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    x = Array((64, 500), "bfloat16", mean=1000.0, scale=30.0)
    far = Call("layer_norm", "bfloat16", (x, Array((500,), "bfloat16", seed=1), None, 1e-5))
    assert check_op("layer_norm", one_pass_apart, calls=[far], isolate=False).verdict == "holds"


def test_assert_operator_raises_the_report() -> None:
    assert_operator("rms_norm", candidates.right, max_examples=5, isolate=False)
    with pytest.raises(AssertionError, match=r"(?s)rms_norm .*fails, value.*smallest call.*--repro FILE.py writes"):
        assert_operator("rms_norm", candidates.tail, isolate=False, shrink=False)


def test_time_is_bounded() -> None:
    def slow(x: Any, weight: Any, eps: float) -> Any:
        time.sleep(0.2)
        return candidates.right(x, weight, eps)

    report = check_op("rms_norm", slow, seconds=1.0)
    assert report.seconds < 3
    assert "the time was up" in report.ended


def test_calls_that_were_not_looked_at_do_not_pass() -> None:
    def slow(x: Any, weight: Any, eps: float) -> Any:
        time.sleep(0.2)
        return candidates.right(x, weight, eps)

    given = {"seconds": 0.1, "isolate": False}
    report = check_op("rms_norm", slow, **given)
    assert (report.verdict, report.finding, report.examples) == ("incomplete", None, 1)
    assert re.search(r"incomplete\n.*the time was up after 1 of 17 fixed calls", str(report), re.DOTALL)
    with pytest.raises(AssertionError, match="the time was up"):
        assert_operator("rms_norm", slow, **given)
    drawn = check_op("rms_norm", slow, calls=calls("rms_norm"), seconds=1e-9, isolate=False)
    assert (drawn.verdict, drawn.examples, drawn.ended) == (
        "incomplete",
        0,
        "the time was up after 0 of 100 drawn calls",
    )


LATE = Call("rms_norm", "bfloat16", (Array((2, 1025), "bfloat16"), Array((1025,), "bfloat16"), 1e-5), kind="late")


def test_a_run_in_flight_is_cut_off_when_all_time_is_up_and_that_is_no_pass() -> None:
    for given, which in (([LATE], "fixed call 1 of 1"), (strategies.just(LATE), "drawn call 1 of 100")):
        report = check_op("rms_norm", candidates.hangs_late, calls=given, seconds=0.5)
        assert report.seconds < 3
        assert (report.verdict, report.finding, report.examples) == ("incomplete", None, 0)
        assert report.ended.startswith(f"the time was up while {which} was running: rms_norm (late): x [2, 1025]")


def test_a_hang_that_is_found_late_is_made_small_in_the_time_that_is_left() -> None:
    report = check_op("rms_norm", candidates.hangs_late, calls=[LATE], seconds=2.5, time_limit=0.5)
    assert report.property == "hangs"
    assert report.seconds < 5
    assert "it did not return within 0.5 s" in report.finding.text


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_exit_codes_and_the_reproduction_as_a_program(
    warm_python: None, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    program, written = tmp_path / "repro.py", tmp_path / "result.json"
    candidate = f"{HERE / 'opcheck_candidates.py'}:tail"
    words = ["rms_norm", "--candidate", candidate, "--dtype", "float32", "--dtype", "bfloat16"]
    assert command(monkeypatch, *words, "--repro", str(program), "--json", str(written)) == 1
    said = capsys.readouterr().out
    assert "column 256 (of 257) of row 0" in said
    result = json.loads(written.read_text())
    assert {"schema", "op", "verdict", "dtype", "policy", "examples", "worst", "counterexample", "repro"} <= set(result)
    assert (result["schema"], result["op"], result["verdict"], result["policy"]) == (2, "rms_norm", "fails", None)
    assert result["counterexample"]["shapes"] == {"x": [1, 257], "weight": [257]}
    assert result["counterexample"]["begins"] == [0, 256]
    assert result["counterexample"]["where"] == "column 256 (of 257) of row 0"
    assert result["counterexample"]["output"] == result["worst"]["output"] == "y"
    assert result["counterexample"]["call"].startswith("rms_norm: x [1, 257] float32")
    assert result["counterexample"]["first_call"].startswith(f"rms_norm ({result['counterexample']['kind']}): x [")
    assert result["reports"][0]["repro"] == program.read_text()
    assert result["worst"]["ratio"] > 2
    assert [r["dtype"] for r in result["reports"]] == ["float32", "bfloat16"]
    assert [r["repro_file"] for r in result["reports"]] == [str(program), str(tmp_path / "repro-bfloat16.py")]
    assert "bfloat16" in (tmp_path / "repro-bfloat16.py").read_text()
    assert "bfloat16" not in program.read_text()
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "at (0, 256)" in done.stdout
    assert "refllm" not in "".join(line for line in program.read_text().splitlines() if "import" in line)
    words = ["rms_norm", "--candidate", candidate.replace("tail", "right"), "--max-examples", "3", "--json", "-"]
    assert command(monkeypatch, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "holds"
    assert {result[name] for name in ("property", "text", "ended", "counterexample", "repro", "repro_file")} == {None}


def test_an_incomplete_search_is_told_by_the_exit_code_and_the_json(monkeypatch: Any, capsys: Any) -> None:
    words = f"rms_norm --candidate {HERE / 'opcheck_candidates.py'}:right --seconds 1e-9 --json -".split()
    assert command(monkeypatch, *words) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["examples"], result["counterexample"]) == ("incomplete", 0, None)


def test_list_shows_every_signature(monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, "--list") == 0
    said = capsys.readouterr().out
    assert all(operator in said for operator in CONTRACTS)
    assert "rms_norm(x, weight, eps) -> y" in said


MISTAKES = {
    "rmsnorm --candidate opcheck_candidates:right": "'rmsnorm' is no operator; there are rms_norm, add_rms_norm",
    "rms_norm": "check-op needs an operator and --candidate",
    "rms_norm --candidate right": "name a function, as module:function or file.py:function",
    "rms_norm --candidate no_such_module:f": "no_such_module cannot be imported: ModuleNotFoundError",
    "rms_norm --candidate nothing/here.py:f": "no such file",
    "rms_norm --candidate opcheck_candidates:wrong_name": "has no function 'wrong_name'",
    "rms_norm --candidate opcheck_candidates:not_a_function": "has no function 'not_a_function'",
    "rms_norm --candidate opcheck_candidates:right --dtype int8": "--dtype int8 is not known; use bfloat16, float16",
    "rms_norm --candidate opcheck_candidates:right --policy exact": "--policy exact is not known; use fused or hf",
    "rms_norm --candidate opcheck_candidates:right --arrays jax": "--arrays jax is not known; use torch or numpy",
    "rms_norm --candidate opcheck_candidates:right --device tpu": "--device tpu is not known; use cpu or cuda",
    "rms_norm --candidate opcheck_candidates:right --device cuda": "torch sees no GPU here",
    "rms_norm --candidate opcheck_candidates:right --time-limit 0": "time_limit=0",
    "rms_norm --candidate opcheck_candidates:right --seconds 0": "seconds=0.0: expected more than 0",
    "rms_norm --candidate opcheck_candidates:right --seconds -1": "seconds=-1.0: expected more than 0",
    "attention --candidate opcheck_candidates:right --without lse": "return_lse or strides",
    "rms_norm --candidate opcheck_candidates:right --without eps": "of that name; use strides or mixed_dtypes",
    "rms_norm --candidate opcheck_candidates:tail --repro nowhere/f.py": "--repro nowhere/f.py cannot be written",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_of_the_users_is_one_sentence(monkeypatch: Any, capsys: Any, words: str) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command(monkeypatch, *words.split()) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("refllm: ")
    assert len(said.splitlines()) == 1
    assert MISTAKES[words] in said


@pytest.mark.parametrize("option", ["--json", "--repro"])
def test_a_file_that_cannot_be_written_is_refused_before_the_search(
    option: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    def searched(*_: Any) -> None:
        raise AssertionError("the search has begun")

    monkeypatch.setattr("refllm.opcheck.search.fixed", searched)
    for path, why in ((tmp_path / "nowhere" / "f", "there is no folder"), (tmp_path, "it is a folder")):
        words = ["rms_norm", "--candidate", "opcheck_candidates:right", option, str(path)]
        assert command(monkeypatch, *words) == 2
        assert f"{option} {path} cannot be written: {why}" in capsys.readouterr().err


def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    for name, source in (("broken", "1 +"), ("raising", "raise ValueError('at import')"), ("ending", "exit(1)")):
        file = tmp_path / f"{name}_candidate.py"
        file.write_text(source)
        with pytest.raises(InputError, match="cannot be imported"):
            check_op("rms_norm", f"{file}:f")
    for calls_of_none, more in (([], {}), (calls("rms_norm"), {"max_examples": 0})):
        with pytest.raises(InputError, match="there is no call to examine"):
            check_op("rms_norm", candidates.right, calls=calls_of_none, **more)
    with pytest.raises(InputError, match="a candidate is a function, or its name"):
        check_op("rms_norm", 3)
    with pytest.raises(InputError, match="expected calls of rms_norm"):
        check_op("rms_norm", candidates.right, calls=corners("relu2", "bfloat16")[:1])


# -- Triton, and processes ---------------------------------------------------------------------------------------------


def test_triton_kernels_are_interpreted_and_what_the_interpreter_finds_has_a_name() -> None:
    kernels = pytest.importorskip("opcheck_triton", reason="triton is not installed")
    assert check_op("rms_norm", kernels.right, max_examples=2, isolate=False).verdict == "holds"
    found = {
        kernels.first_tile: ("unwritten", (1, 257)),
        kernels.beyond: ("bounds", (1, 3)),
        kernels.race: ("race", (2, 3)),
    }
    for function, (property, shape) in found.items():
        report = check_op("rms_norm", function, isolate=function is not kernels.race)
        assert (report.property, shapes(report)["x"]) == (property, shape), str(report)
        assert report.seconds < 120
        assert "interpreted" in report.repro
        shown(report)


def test_a_process_that_imports_the_candidate_again(monkeypatch: Any) -> None:
    """As for a GPU, which does not survive a fork: here on the CPU."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    worker = Worker(load("opcheck_candidates:aborts"))
    worker.fork = False
    small, large = corners("rms_norm", "bfloat16")[0], corners("rms_norm", "bfloat16")[3]
    task = Task(small, "cpu", "torch", False, "fused", True, False)
    try:
        seen = worker.observe(task, 10.0)
        assert (seen.property, seen.results[0].shape) == ("", (3, 8))
        assert worker.observe(replace(task, call=large), 10.0).property == "crashes"
    finally:
        worker.close()
    worker = Worker(replace(load("opcheck_candidates:right"), reference="opcheck_candidates:gone"))
    worker.fork = False
    with pytest.raises(InputError, match="cannot be imported by a process of its own: opcheck_candidates has no"):
        worker.observe(task, 10.0)


def test_a_process_that_takes_too_long_to_import_the_candidate_is_told(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr("refllm.opcheck.worker._START_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"cannot be imported by a process of its own: no answer within 0\.2 s"):
        Worker(replace(load("opcheck_candidates:right"), reference=f"{tmp_path / 'sleepy.py'}:f", device="cuda"))
