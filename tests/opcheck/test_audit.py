"""Both sides of the check of operators: every known bug is found, and no right implementation is rejected."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import legitimate  # noqa: E402
import legitimate_libraries  # noqa: E402
from legitimate import RIGHT, Legitimate  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from warm_python import WarmPopen  # noqa: E402

from refllm import kernels  # noqa: E402
from refllm.commands import cli  # noqa: E402
from refllm.commands.audit import audit as audit_command  # noqa: E402
from refllm.commands.operators import check_op as check_op_command  # noqa: E402
from refllm.errors import InputError, RefllmError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.interpreter.poison import ALLOCATORS  # noqa: E402
from refllm.kernels.mutants import Mutant, catalogue, planting  # noqa: E402
from refllm.opcheck import mutants_measured, mutants_page  # noqa: E402
from refllm.opcheck.api import check_op  # noqa: E402
from refllm.opcheck.audit import AuditReport, Outcome, TestIsVoidError, audit  # noqa: E402
from refllm.opcheck.typical_tests import typical_tests  # noqa: E402
from refllm.strategies import corners  # noqa: E402
from refllm.user_code import find_function  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TORCH = catalogue(form="torch")

# -- what must be found ------------------------------------------------------------------------------------------------


def assert_all_found(report: AuditReport) -> None:
    """In every dtype in which it makes a difference; and what is no bug in none of them."""
    assert [f"{o.name} in {o.dtype}: {o.what}" for o in report.survivors] == []
    assert [f"{o.name} in {o.dtype}: {o.by}" for o in report.rejected] == []
    dtypes = {(m.name, m.form): m.dtypes for m in catalogue(report.outcomes[0].operator)}
    assert [o.name for o in report.outcomes if o.dtypes != dtypes[o.name, o.form]] == []


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_bug_is_found_and_its_reproduction_shows_it(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search, and then the program that it wrote, in one process; a program of its own is tried below.

    By the fixed calls, which the search begins with; what is no bug is shown drawn calls as well.
    """
    report = audit(operator, form="torch", known_first=True)
    assert_all_found(report)
    assert len(report.bugs) >= 14
    silent = [o.name for o in report.bugs if exit_code(o.repro, monkeypatch) != 1]
    assert silent == []


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_bug_of_a_triton_kernel_is_found(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fixed calls alone, as the interpreter takes its time; and the programs that were written show them.

    Offsets that do not fit in 32 bits are named so. Each is shown by the call that it names, or else by one of the
    first few.
    """
    pytest.importorskip("triton")
    report = audit(operator, form="triton", known_first=True, max_examples=0)
    assert_all_found(report)
    assert len(report.bugs) >= 6
    assert {o.by for o in report.bugs if "32 bits" in o.name} <= {"overflow"}
    named = {m.name: m.corner for m in catalogue(operator, "triton")}
    assert [o.name for o in report.bugs if o.examples > (1 if named[o.name] else 4)] == []
    assert [o.name for o in report.bugs if exit_code(o.repro, monkeypatch) != 1] == []


@pytest.mark.parametrize(("equivalent", "dtypes"), [("", ("float32", "bfloat16")), ("no bug", ("bfloat16", "float32"))])
def test_a_bug_is_found_only_if_it_is_in_every_dtype_that_it_names(
    equivalent: str, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong in float32 alone: as a bug it survives in bfloat16, and as none it is rejected for float32."""

    def wrong_in_float32(x: Any) -> Any:
        return plain.relu2(x) * (2 if x.dtype == torch.float32 else 1)

    planted = Mutant("a", "relu2", "torch", "b", "c", lambda: wrong_in_float32, dtypes, equivalent)
    monkeypatch.setattr("refllm.kernels.mutants.catalogue", lambda *_: [planted])
    report = audit("relu2", max_examples=0)
    (outcome,) = report.rejected if equivalent else report.survivors
    assert (outcome.dtype, outcome.dtypes) == (dtypes[1], dtypes)
    assert not report.holds
    assert audit("relu2", dtype=dtypes[0], max_examples=0).holds


def test_the_call_that_a_mutant_names_exists() -> None:
    """Those of Triton name one where it is not among the first few; those of plain Torch are asked everything."""
    naming = [m for m in catalogue() if m.corner]
    assert len(naming) >= 80
    assert {m.form for m in naming} == {"triton"}
    for m in naming:
        kinds = {call.kind for dtype in m.dtypes for call in corners(m.operator, dtype)}
        assert m.corner in kinds, f"{m.name}: there is no call of the kind {m.corner}"


def exit_code(program: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a program, run in this process. It may replace torch.empty, which is undone."""
    with monkeypatch.context() as undo, contextlib.redirect_stdout(io.StringIO()):
        for owner, name in ALLOCATORS:
            undo.setattr(owner, name, getattr(owner, name))
        try:
            exec(compile(program, "<reproduction>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            return end.code
    return 0


@pytest.mark.parametrize("name", ["rms_norm_no_eps", "rope_rest_of_the_head_unwritten", "attention_q_scaled_in_place"])
def test_a_reproduction_is_a_program_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "rms_norm_no_eps":  # one shows that nothing else has to be imported
        monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    mutant = next(m for m in TORCH if m.slug == name)
    file = tmp_path / "repro.py"
    report = check_op(mutant.operator, mutant.function(), shrink=False, isolate=False, repro=file)
    assert report.verdict == "fails"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.strip()


def test_the_right_operators_pass_where_their_mutants_fail() -> None:
    """The reproduction of a mutant, with the right operator put in its place, shows nothing."""
    mutant = next(m for m in TORCH if m.slug == "layer_norm_bias_left_out")
    report = check_op("layer_norm", mutant.function(), shrink=False, isolate=False)
    program = report.repro.replace('"refllm.kernels.mutants.built"', '"refllm.kernels.plain"')
    with pytest.MonkeyPatch.context() as patch:
        assert exit_code(report.repro, patch) == 1
        assert exit_code(program.replace(f'"{mutant.slug}"', '"layer_norm"'), patch) == 0


# -- what must pass ----------------------------------------------------------------------------------------------------


def in_one_dtype() -> Iterator[tuple[Legitimate, str]]:
    """Every implementation in one of its dtypes, which take turns; `python tests/opcheck/legitimate.py` runs all.

    Those with the same dtypes take turns among themselves: else every second one would always have the same. The forms
    of this project are asked in all of theirs by tests/kernels/test_operators.py.
    """
    turns: dict[tuple[str, ...], Iterator[int]] = defaultdict(itertools.count)
    for one in (one for one in RIGHT if not one.name.startswith("refllm.kernels")):
        yield one, one.dtypes[next(turns[one.dtypes]) % len(one.dtypes)]


@pytest.mark.parametrize(
    ("one", "dtype"),
    [pytest.param(*pair, id=f"{pair[0].operator}-{pair[0].name}-{pair[1]}") for pair in in_one_dtype()],
)
def test_a_right_implementation_passes(one: Legitimate, dtype: str) -> None:
    legitimate.must_pass(one, dtype)


def test_the_list_of_right_implementations_is_worth_its_name() -> None:
    assert len(RIGHT) >= 100
    for operator in kernels.OPERATORS:
        assert sum(one.operator == operator for one in RIGHT) >= 5, operator
    assert {dtype for _, dtype in in_one_dtype()} == {"bfloat16", "float16", "float32"}
    assert sum(one.name.startswith("refllm.kernels") for one in RIGHT) == 2 * len(kernels.OPERATORS)
    names = [(one.operator, one.name) for one in RIGHT]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("operator", "dtype", "kind", "property"),
    [
        ("relu2", "bfloat16", "NaN in one element", "NaN pattern"),
        ("cross_entropy", "bfloat16", "strides", "result"),  # a plain call does not ask for the dtype of a loss
        ("cross_entropy", "float32", "all ignored", "NaN pattern"),
        ("linear_cross_entropy", "float32", "all ignored", "NaN pattern"),
    ],
)
def test_a_deviation_of_a_library_is_reported_as_what_it_is(
    operator: str, dtype: str, kind: str, property: str
) -> None:
    pytest.importorskip("liger_kernel")
    deviating = getattr(legitimate_libraries, f"liger_{operator}")
    calls = [call for call in corners(operator, dtype) if call.kind == kind]
    report = check_op(operator, deviating, dtype=dtype, calls=calls, shrink=False, isolate=False)
    assert report.property == property


def test_a_refused_implementation_fails_the_test() -> None:
    wrong = Legitimate("relu2", "a ReLU", lambda x: x.clamp(min=0))
    with pytest.raises(AssertionError, match="a ReLU"):
        legitimate.must_pass(wrong, "float32")


def test_an_implementation_that_was_not_examined_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legitimate, "SECONDS", 1e-9)
    with pytest.raises(AssertionError, match="relu2, plain"):
        legitimate.must_pass(Legitimate("relu2", "plain", plain.relu2), "float32")


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_the_catalogue_covers_every_operator_and_names_each_mutant_once() -> None:
    keys = [(m.operator, m.form, m.name) for m in catalogue()]
    assert len(set(keys)) == len(keys)
    slugs = [m.slug for m in catalogue()]
    assert len(set(slugs)) == len(slugs)
    assert all(slug.isidentifier() for slug in slugs)
    for m in catalogue():
        assert m.source, m.name
        assert m.what[-1] != ".", m.name
        assert set(m.dtypes) <= {"bfloat16", "float16", "float32"}, m.name
    assert len([m for m in TORCH if not m.equivalent]) >= 250


def test_a_catalogue_of_one_form_does_not_import_the_other() -> None:
    program = "import sys; from refllm.kernels.mutants import catalogue; catalogue(form='torch'); "
    program += "sys.exit('triton' in sys.modules and 'refllm.kernels.mutants.triton_norm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("mutant", [m for m in TORCH if m.name in ("no eps", "heads by modulo")], ids=lambda m: m.slug)
def test_a_mutant_can_be_imported_by_its_name(mutant: Mutant) -> None:
    found = find_function(f"refllm.kernels.mutants.built:{mutant.slug}")
    assert (found.__module__, found.__name__) == ("refllm.kernels.mutants.built", mutant.slug)
    assert not found.uses_triton  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no function 'rms_norm_no_such'"):
        find_function("refllm.kernels.mutants.built:rms_norm_no_such")


def test_a_change_of_source_follows_the_source_or_says_so() -> None:
    with pytest.raises(RefllmError, match="'no such text' is 0 times in rms_norm, expected 1"):
        planting.changed("rms_norm", "no such text", "")("rms_norm")
    with pytest.raises(RefllmError, match="no function nothing"):
        planting.changed("nothing", "a", "b")("rms_norm")
    same = planting.changed("rms_norm", "weight.float()", "weight.float()")("rms_norm")
    x, w = torch.randn(3, 5), torch.randn(5)
    assert torch.equal(same(x, w, 1e-6), plain.rms_norm(x, w, 1e-6))


def test_the_page_is_that_of_the_catalogue_and_of_what_was_measured() -> None:
    """`python -m refllm.opcheck.mutants_page docs/mutants.md --json docs/mutants.json --resume` makes them so again."""
    results = mutants_measured.read(ROOT / "docs/mutants.json")
    assert (ROOT / "docs/mutants.md").read_text(encoding="utf-8") == mutants_page.page(results)
    assert mutants_measured.holds(results)
    for mutant in catalogue():
        one = results.of(mutant)
        assert one is not None
        assert one.dtypes == mutant.dtypes, mutant.slug
        if mutant.equivalent:
            continue
        assert one.seconds < mutants_page.TARGETS[mutant.form], mutant.slug
        options = one.asked.split(" --")
        assert ("--policy fused" in one.asked) == bool(mutant.place), (mutant.slug, options)
        assert ("--level hostile" in one.asked) == (one.level == "hostile"), (mutant.slug, options)


def test_a_bug_that_is_missed_or_not_told_is_on_the_page() -> None:
    results = mutants_measured.read(ROOT / "docs/mutants.json")

    def changed(mutant: Mutant, **change: Any) -> mutants_measured.Results:
        other = dataclasses.replace(results.mutants[mutant.slug], **change)
        return dataclasses.replace(results, mutants=results.mutants | {mutant.slug: other})

    place, none = (next(m for m in TORCH if getattr(m, name)) for name in ("place", "equivalent"))
    for mutant, found in ((place, False), (none, True)):
        wrong = changed(mutant, found=found)
        assert not mutants_measured.holds(wrong)
        assert f"- {mutant.operator}, {mutant.form}: {mutant.what}" in mutants_page.page(wrong)
    assert not mutants_measured.holds(changed(place, rounds=""))


def test_a_measurement_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, asked = TORCH[:3], list[tuple[str, str]]()
    monkeypatch.setattr("refllm.kernels.mutants.catalogue", lambda *_, **__: some)
    monkeypatch.setattr(mutants_measured, "_each", lambda slugs, *_: asked.extend(slugs) or [])
    known = [mutants_measured.Measured(m.slug, True, "value", "basic", 1, "", 0.1, 0.1, ("float32",)) for m in some[:2]]
    mutants_measured.write(tmp_path / "m", mutants_measured.Results(mutants={one.mutant: one for one in known}))
    assert [*mutants_measured.measure(tmp_path / "m", True, 1, print).mutants.values()] == known
    assert [name for part, name in asked if part == "mutants"] == [some[2].slug]


# -- tests of other people ---------------------------------------------------------------------------------------------


def within(tolerance: float) -> Callable[..., None]:
    """A test as many are: one call, one tolerance."""

    def test_my_rms_norm(fn: Callable[..., Any]) -> None:
        x, weight = torch.randn(4, 1024), torch.randn(1024)
        want = torch.nn.functional.rms_norm(x, (1024,), weight, 1e-6)
        print("what it prints is not shown")
        assert torch.allclose(fn(x, weight, 1e-6), want, atol=tolerance)

    return test_my_rms_norm


def test_a_test_with_one_call_lets_bugs_pass_and_is_told_which(capsys: pytest.CaptureFixture[str]) -> None:
    report = audit("rms_norm", within(1e-2))
    assert 0 < report.kill_rate < 0.5
    assert "no eps" in {o.name for o in report.survivors}
    killed = {o.name: o.by for o in report.outcomes if o.killed}
    assert killed["weight plus one"] == "AssertionError"
    assert {o.form for o in report.outcomes} == {"torch"}
    assert not capsys.readouterr().out


def test_typical_tests_like_what_is_right() -> None:
    """Otherwise the rates on the page would be of void tests."""
    for operator in kernels.OPERATORS:
        tests = typical_tests(operator)
        assert len(tests) >= 2, operator
        for test in tests.values():
            test(getattr(plain, operator))


@pytest.mark.parametrize("tolerance", [-1.0])
def test_a_test_that_rejects_what_is_right_is_void(tolerance: float) -> None:
    with pytest.raises(
        TestIsVoidError, match=r"test_my_rms_norm is void: it rejects the right rms_norm \(torch form\)"
    ):
        audit("rms_norm", within(tolerance))


def test_a_skipped_test_is_void_and_a_failed_one_kills() -> None:
    def skips(fn: Any) -> None:
        pytest.skip("no GPU")

    with pytest.raises(TestIsVoidError, match="with Skipped: no GPU"):
        audit("relu2", skips)

    def fails(fn: Any) -> None:
        if fn.__module__ != plain.relu2.__module__:
            pytest.fail("not mine")

    assert audit("relu2", fails).kill_rate == 1


def test_a_test_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refllm.kernels.mutants.catalogue", lambda *_: TORCH[:1])

    def waits(fn: Any) -> None:
        while fn.__name__ == TORCH[0].slug:
            time.sleep(0.01)

    (outcome,) = audit(TORCH[0].operator, waits, time_limit=0.1).outcomes
    assert outcome.by == "no answer within 0.1 s"
    found: list[AuditReport] = []  # in a thread there are no alarms: it runs all the same
    thread = threading.Thread(target=lambda: found.append(audit(TORCH[0].operator, lambda fn: None)))
    thread.start()
    thread.join()
    assert found[0].kill_rate == 0


def test_a_test_of_triton_kernels_runs_on_the_interpreter() -> None:
    pytest.importorskip("triton")

    def small(fn: Any) -> None:
        x = torch.linspace(-1, 1, 40)
        torch.testing.assert_close(fn(x), x.clamp(min=0) ** 2)

    report = audit("relu2", small, form="triton")
    assert report.outcomes
    assert {o.form for o in report.outcomes} == {"triton"}
    assert 0 < report.kill_rate < 1


# -- the command -------------------------------------------------------------------------------------------------------

MINE = """
import torch


def test_allclose(fn):
    x, weight = torch.randn(4, 1024), torch.randn(1024)
    assert torch.allclose(fn(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (1024,), weight, 1e-6), atol=1e-2)


def test_void(fn):
    assert fn(torch.ones(2, 8), torch.ones(8), 0.0).sum() == 3
"""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["audit", *arguments])


def test_the_command_lists_survivors_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    done = run("rms_norm", "--test", f"{tmp_path / 'mine.py'}:test_allclose", "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 1
    assert "survived:" in done.output
    assert "eps is left out, so that a row of zeros is 0 / 0 (one-line: norm)" in done.output
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["schema"], written["verdict"]) == (2, "fails")
    assert written["killed"] + len(written["survivors"]) == written["mutants"] == len(written["outcomes"])
    row = re.search(r"^ *rms_norm +(\d+) +(\d+) +(\d+) %", done.output, re.MULTILINE)
    assert row, done.output
    assert (int(row[1]), int(row[2])) == (written["mutants"], written["killed"])
    assert int(row[3]) == round(100 * written["killed"] / written["mutants"])
    assert f"{row[2]} of {row[1]} bugs found" in done.output


def test_the_command_exits_with_0_where_all_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "refllm.kernels.mutants.catalogue", lambda *_: [m for m in TORCH if m.operator == "rms_norm"][:2]
    )
    done = run("rms_norm")
    assert done.exit_code == 0, done.output
    assert "2 of 2 bugs found" in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nonsense",), "'nonsense' is no operator"),
        (("--test", "mine.py:test_allclose"), "--test needs an operator"),
        (("rms_norm", "--test", "nothing.py:test"), "there is no file nothing.py"),
        (("rms_norm", "--test", "nothing"), "as file.py:function or module:function"),
        (("rms_norm", "--test", "mine.py:nothing"), "has no function 'nothing'"),
        (("rms_norm", "--test", "mine.py:test_void"), "is void: it rejects the right rms_norm"),
        (("rms_norm", "--form", "cuda"), "--form cuda is not known; use torch or triton"),
        (("rms_norm", "--dtype", "int8"), "int8 is not known"),
        (("rms_norm", "--time-limit", "0", "--test", "mine.py:test_allclose"), "expected more than 0 seconds"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert isinstance(done.exception, RefllmError), done.output
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize(("command", "function"), [(audit_command, audit), (check_op_command, check_op)])
def test_a_command_leaves_out_what_its_function_leaves_out(command: Any, function: Any) -> None:
    asked, taken = (inspect.signature(one).parameters for one in (command, function))
    shared = {name: (asked[name].default, taken[name].default) for name in asked if name in taken}
    assert len(shared) > 5
    assert {name: both for name, both in shared.items() if both[0] is not None and both[0] != both[1]} == {}
    assert {"max_examples", "seed", "time_limit"} <= {name for name, both in shared.items() if both[0] == both[1]}


def test_a_report_counts_bugs_alone() -> None:
    def outcome(killed: bool, equivalent: str = "") -> Outcome:
        return Outcome("relu2", "a", "torch", "b", "c", "float32", killed, "value" * killed, 1, 0.0, "", equivalent)

    report = AuditReport("mine", (outcome(True), outcome(False), outcome(False, "the same"), outcome(True, "the same")))
    assert (report.kill_rate, len(report.survivors), len(report.rejected), report.holds) == (0.5, 1, 1, False)
    assert AuditReport("mine", (outcome(True), outcome(False, "the same"))).holds
    assert AuditReport("mine", ()).kill_rate == 1


def test_corners_are_where_it_begins() -> None:
    """What a mutant's `examples` counts from."""
    assert audit("relu2", form="torch").outcomes[0].examples <= len(corners("relu2", "bfloat16", "fused"))
