"""The gate for continuous integration: the published form of the JSON, JUnit XML, known findings and Ctrl-C."""

import dataclasses
import datetime
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import numpy_operators
import pytest
from tiny import tiny_model

import refllm
from refllm.check import check_op, compare
from refllm.check import run as check_run
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.inputs import Inputs
from refllm.check.oracle import judge
from refllm.commands import cli
from refllm.commands.gate import Known
from refllm.commands.junit import junit_text
from refllm.commands.operators import _together
from refllm.forward.model import Model
from refllm.opcheck import api
from refllm.opcheck.api import SearchInterrupted
from refllm.precision import arithmetic
from refllm.storage.weights import Weights

SCHEMAS = Path(__file__).parents[2] / "docs/schema"
IDS = np.random.default_rng(3).permutation(23)[None]
TODAY = datetime.date(2026, 5, 1)
GATE = "model.layers.1.mlp.gate_proj"
CONFIG: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
Run = Callable[..., tuple[int, str, str]]


def schema(name: str, closed: bool = False) -> dict[str, Any]:
    """closed: such that a key that it does not describe is an error."""
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())

    def close(part: Any) -> None:
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            close(inner)
        if isinstance(part, dict) and isinstance(part.get("properties"), dict):
            part.setdefault("additionalProperties", False)

    if closed:
        close(found)
    return found


def found_of(*reports: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 2, "verdict": "fails", "reports": list(reports)}


def validate(values: Any, name: str, closed: bool = True) -> None:
    jsonschema.Draft202012Validator(schema(name, closed)).validate(json.loads(json.dumps(values)))


@pytest.fixture(scope="module")
def of_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reports of `check` on a right run, one with a wrong weight, the same logits alone, and one that raises."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(folder, dtype="float32")
    right, wrong = refllm.load(folder, dtype="float32"), refllm.load(folder, dtype="float32")
    weight = wrong.weights["layers.1.mlp.gate_proj.weight"].copy()
    weight[3] *= np.float32(1.05)
    wrong = replace_weight(wrong, "layers.1.mlp.gate_proj.weight", weight)

    def raises(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        raise ValueError("no\x00such kernel")

    models = {"right": right, "wrong": wrong}
    traces = {name: record(ReferenceCandidate(model), right, Inputs(IDS, label=name)) for name, model in models.items()}
    logits = {name: x for name, x in traces["wrong"].taps.items() if name == "lm_head"}
    traces["logits"] = replace(traces["wrong"], taps=logits, inputs=Inputs(IDS, label="logits"))
    found = {name: judge(right, trace, checkpoint="llama").to_dict() for name, trace in traces.items()}
    return found | {"raises": compare(folder, raises, dtype="float32", input_ids=IDS, isolate=False)[0].to_dict()}


def replace_weight(model: Model, name: str, value: np.ndarray) -> Model:
    tensors = {key: value if key == name else model.weights[key] for key in type(model).tensors(model.config)}
    weights = Weights(type(model).tensors(model.config), tensors, tied=type(model).tied(model.config))
    return type(model)(model.config, weights, arithmetic("float32", None))


OPTIONS: dict[str, Any] = {"dtype": "float32", "arrays": "numpy", "isolate": False, "max_examples": 0}


@pytest.fixture(scope="module")
def of_operators() -> dict[str, Any]:
    kinds = {"right": numpy_operators.relu2, "wrong": numpy_operators.wrong}
    return {kind: check_op("relu2", function, **OPTIONS).to_dict() for kind, function in kinds.items()}


def known(*entries: dict[str, str], today: datetime.date = TODAY) -> Known:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "known.json")
        path.write_text(json.dumps({"known": [{"reason": "seen", "until": "2026-05-01"} | entry for entry in entries]}))
        validate(json.loads(path.read_text()), "known")
        return Known.load(path, today)


NONE = Known([], TODAY)


def cases(found: dict[str, Any], known: Known = NONE) -> dict[str, ET.Element]:
    root = ET.fromstring(junit_text(found, known))
    listed = list(root.iter("testcase"))
    assert root.get("tests") == str(len(listed)) == str(len({(c.get("classname"), c.get("name")) for c in listed}))
    assert root.get("failures") == str(len(list(root.iter("failure"))))
    return {f"{case.get('classname')} {case.get('name')}": case for case in listed}


# ------------------------------------------------------------------------------------------------------- the form of it


def test_what_is_written_is_as_its_schema_says_and_has_no_key_that_the_schema_lacks(
    of_runs: dict[str, Any], of_operators: dict[str, Any]
) -> None:
    entries = known({"value": GATE}, {"operator": "relu2"}, {"value": "nothing"})
    runs, operators = found_of(*of_runs.values()) | {"interrupted": True}, _together([*of_operators.values()])
    assert {report["verdict"] for report in runs["reports"]} == {"holds", "fails"}
    validate(runs | {"known": entries.to_list(runs)}, "check")
    validate(operators | {"known": entries.to_list(operators)}, "check-op")
    validate(of_operators["right"], "check-op")


def test_schema_refuses_what_is_not_as_it_says(of_runs: dict[str, Any], of_operators: dict[str, Any]) -> None:
    for name, values in (("check", found_of(of_runs["right"])), ("check-op", of_operators["right"])):
        for change in ({"schema": 3}, {"verdict": "passes"}, {"unheard_of": 1}):
            with pytest.raises(jsonschema.ValidationError):
                validate(values | change, name)
    with pytest.raises(jsonschema.ValidationError):
        validate({"known": [{"value": "x", "operator": "y", "reason": "r", "until": "2026-05-01"}]}, "known")


def test_file_without_the_keys_that_came_later_is_still_read(of_runs: dict[str, Any]) -> None:
    older = found_of(*of_runs.values())
    assert not {"interrupted", "known"} & set(older)
    validate(older, "check", closed=False)
    assert len(cases(older)) == len(older["reports"])
    assert known({"value": GATE}).passes(found_of(of_runs["wrong"]))


# ---------------------------------------------------------------------------------------------------------------- JUnit


def test_a_run_is_a_test_case_and_its_failure_names_what_is_wrong(of_runs: dict[str, Any]) -> None:
    for kind, said in (
        ("wrong", f"{GATE} is wrong"),
        ("logits", "lm_head is wrong"),
        ("raises", "no\ufffdsuch kernel"),
    ):
        (case,) = cases(found_of(of_runs[kind])).values()
        failure = case.find("failure")
        assert failure is not None, kind
        assert said in str(failure.get("message")), kind
    (case,) = cases(found_of(of_runs["right"])).values()
    assert not list(case)


def test_a_property_is_a_test_case(of_operators: dict[str, Any]) -> None:
    right, wrong = cases(of_operators["right"]), cases(of_operators["wrong"])
    assert len(right) > 5
    assert not any(list(case) for case in right.values())
    assert not any(name.endswith("race") for name in right)  # looked at in interpreted kernels alone
    failed = [name for name, case in wrong.items() if case.find("failure") is not None]
    assert [name.rpartition(": ")[2] for name in failed] == ["value"]
    assert sum(case.find("skipped") is not None for case in wrong.values()) == len(wrong) - 1


def test_of_several_findings_each_has_its_case_and_its_entry(of_operators: dict[str, Any]) -> None:
    kinds = {"value": True, "purity": True, "reuse": False}
    several = [{"level": "basic", "counts": counts, "property": name, "text": name} for name, counts in kinds.items()]
    report = of_operators["wrong"] | {"findings": several}
    failed = {name.rpartition(": ")[2]: case.find("failure") for name, case in cases(report).items()}
    assert {name for name, failure in failed.items() if failure is not None} == {"value", "purity"}
    value, purity = ({"operator": "relu2", "property": name} for name in ("value", "purity"))
    assert known(value, purity).passes(report)
    assert not known(value).passes(report)


def test_what_was_not_looked_at_is_no_success(of_runs: dict[str, Any], of_operators: dict[str, Any]) -> None:
    unseen = of_runs["right"] | {"verdict": "incomplete", "unseen": ["the head is not shown"]}
    stopped = of_operators["right"] | {"verdict": "incomplete", "ended": "the time was up"}
    for report, said in ((unseen, "the head is not shown"), (stopped, "the time was up")):
        failures = [case.find("failure") for case in cases(found_of(report)).values()]
        assert failures
        assert all(f is not None and f.get("type") == "incomplete" and said in f.get("message", "") for f in failures)
    assert any("interrupted" in name for name in cases(found_of(of_runs["right"]) | {"interrupted": True}))


# ------------------------------------------------------------------------------------------------------- known findings


def test_known_findings_pass_until_their_date_and_others_never(
    of_runs: dict[str, Any], of_operators: dict[str, Any]
) -> None:
    wrong, operator = found_of(of_runs["wrong"]), of_operators["wrong"]
    after = TODAY + datetime.timedelta(1)
    assert known({"value": "model.layers.*.mlp.gate_proj", "checkpoint": "lla*"}).passes(wrong)
    assert known({"value": "raises"}).passes(found_of(of_runs["raises"]))
    assert known({"operator": "relu2", "property": "value", "dtype": "float32"}).passes(operator)
    assert not NONE.passes(wrong)
    for entry in ({"value": GATE, "dtype": "bfloat16"}, {"value": "*.up_proj"}, {"operator": GATE}):
        assert not known(entry).passes(wrong), entry
    assert not known({"operator": "relu2", "property": "purity"}).passes(operator)
    assert not known({"value": GATE}, today=after).passes(wrong)
    assert not known({"value": GATE}).passes(wrong | {"interrupted": True})
    assert not known({"value": GATE}).passes(found_of(of_runs["wrong"], of_runs["raises"]))


def test_known_finding_covers_nothing_that_was_left_out(of_runs: dict[str, Any]) -> None:
    unseen = of_runs["wrong"] | {"unseen": ["the head is not shown"]}
    assert not known({"value": GATE}).passes(found_of(unseen))
    (case,) = cases(found_of(unseen), known({"value": GATE})).values()
    assert case.find("failure") is not None
    (case,) = cases(found_of(of_runs["wrong"]), known({"value": GATE})).values()
    assert [child.tag for child in case] == ["skipped"]


def test_what_became_of_an_entry_is_said(of_runs: dict[str, Any], of_operators: dict[str, Any]) -> None:
    wrong, right, after = found_of(of_runs["wrong"]), found_of(of_runs["right"]), TODAY + datetime.timedelta(1)

    def said(found: dict[str, Any], entry: dict[str, str], today: datetime.date = TODAY) -> tuple[str, str]:
        it = known(entry, today=today)
        return it.to_list(found)[0]["state"], " ".join(it.in_words(found))

    assert said(wrong, {"value": GATE})[0] == "seen"
    assert said(wrong, {"value": GATE}, after)[0] == "past its date"
    assert "no longer known, since its date was 2026-05-01" in said(wrong, {"value": GATE}, after)[1]
    assert said(right, {"value": GATE}) == ("gone", f"gone, so take it out of the file: {GATE} (seen)")
    # Of what did not show itself nobody knows: another checkpoint, an operator, a consequence, a search that ended.
    hidden = [
        said(right, {"value": GATE, "checkpoint": "other"}),
        said(right, {"operator": "relu2"}),
        said(wrong, {"value": "lm_head"}),
        said(found_of(of_runs["raises"]), {"value": GATE}),
        said(of_operators["wrong"], {"operator": "relu2", "property": "purity"}),
    ]
    assert hidden == [("not checked", "")] * 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "expected {"),
        ('{"schema": 9, "known": []}', "schema is 9"),
        ('{"schema": 1, "known": []}', "schema is 1; expected 2"),
        ('{"known": [3]}', "entry 1 is 3"),
        ('{"known": [{"value": "a", "operator": "b"}]}', "a value or an operator"),
        ('{"known": [{"value": "a", "until": "2027-01-31"}]}', 'no "reason"'),
        ('{"known": [{"value": "a", "reason": "r"}]}', 'no "until"'),
        ('{"known": [{"value": "a", "reason": "r", "until": "31.1.2027"}]}', "expected a date"),
        ('{"known": [{"value": "a", "reason": " ", "until": "2027-01-31"}]}', "reason is"),
        ('{"known": [{"value": "a", "why": "r", "until": "2027-01-31"}]}', "has the key"),
        ('{"known": [{"value": "a", "reason": "r", "until": "2027-01-31", "property": "p"}]}', "with an operator"),
    ],
)
def test_bad_file_is_one_sentence_and_exit_code_2(text: str, said: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(text)
    for command in (("check",), ("check-op", "relu2", "--candidate", "none:none")):
        code, out, err = run(*command, "--known", path)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert str(path) in err


# --------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return command


def test_check_op_writes_junit_and_passes_what_is_known(run: Run, tmp_path: Path) -> None:
    xml, file = tmp_path / "found.xml", tmp_path / "known.json"
    file.write_text('{"schema": 2, "known": [{"operator": "relu2", "reason": "soon", "until": "9999-12-31"}]}')
    command = ["check-op", "relu2", "--candidate", f"{numpy_operators.__file__}:wrong", "--arrays", "numpy"]
    command += ["--max-examples", "0", "--dtype", "float32", "--time", "20", "--junit", str(xml)]
    assert run(*command)[0] == 1
    assert ET.parse(xml).find(".//failure") is not None
    code, out, _ = run(*command, "--known", file, "--json", tmp_path / "found.json")
    assert code == 0, out
    assert "known until 9999-12-31: relu2 (soon)" in out
    assert ET.parse(xml).find(".//failure") is None
    values = json.loads((tmp_path / "found.json").read_text())
    validate(values, "check-op")
    assert (values["verdict"], values["known"][0]["state"]) == ("fails", "seen")


def test_ctrl_c_in_check_writes_the_report_so_far(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check_run.check_all

    def interrupted(after: int) -> Callable[..., Iterator[Any]]:
        def check_all(folders: list[Path], settings: Any, step: Any, say: Any) -> Iterator[Any]:
            for i, report in enumerate(checked(folders, [replace(one, isolate=False) for one in settings], step)):
                if i == after:
                    break
                yield report
            raise KeyboardInterrupt

        return check_all

    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(tmp_path / "tiny", dtype="float32")
    ids, files = ",".join(map(str, IDS[0])), ["--json", tmp_path / "f.json", "--junit", tmp_path / "f.xml"]
    for after in (0, 1):
        monkeypatch.setattr(check_run, "check_all", interrupted(after))
        code, out, err = run("check", tmp_path / "tiny", "--candidate", "numpy", "--ids", ids, *files)
        assert (code, err) == (130, "")
        assert "interrupted" in out
        values = json.loads((tmp_path / "f.json").read_text())
        validate(values, "check")
        assert (values["verdict"], values["interrupted"], len(values["reports"])) == ("incomplete", True, after)
        assert "interrupted" in (tmp_path / "f.xml").read_text()


@pytest.mark.parametrize("after", [0, 1])
def test_check_that_takes_too_long_is_incomplete_and_has_the_report_so_far(
    after: int, of_runs: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check_run.check_all

    def check_all(folders: list[Path], settings: Any, step: Any, say: Any) -> Iterator[Any]:
        here = [replace(one, isolate=False) for one in settings]
        yield from [*checked(folders, here, step)][:after]
        step("llama: the next one")
        (timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
        asked.append(timer.interval)
        threading.Thread(target=timer.function).start()  # now, and not when this machine has come so far
        time.sleep(60)

    monkeypatch.setattr(check_run, "check_all", check_all)
    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(tmp_path / "tiny", dtype="float32")
    files = ["--json", tmp_path / "f.json", "--junit", tmp_path / "f.xml", "--html", tmp_path / "f.html"]
    before, asked = signal.getsignal(signal.SIGINT), list[float]()
    ids = ",".join(map(str, IDS[0]))
    code, out, err = run("check", tmp_path / "tiny", "--candidate", "numpy", "--ids", ids, "--time", "600", *files)
    assert (code, err, asked) == (1, "", [600])
    said = "the time of 600 s was up at llama: the next one"
    assert f"incomplete: {said}, and this is the report so far" in " ".join(out.split())
    values = json.loads((tmp_path / "f.json").read_text())
    validate(values, "check")
    assert (values["verdict"], values["interrupted"], values["ended"]) == ("incomplete", False, said)
    assert [report["verdict"] for report in values["reports"]] == ["holds"] * after
    assert said in (tmp_path / "f.xml").read_text()
    page = (tmp_path / "f.html").read_text()
    assert 'class="verdict">incomplete' in page
    assert said in page
    assert signal.getsignal(signal.SIGINT) is before
    assert not known({"value": GATE}).passes(found_of(of_runs["wrong"]) | {"ended": said})


def test_time_that_suffices_changes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check_run.check_all

    def check_all(folders: list[Path], settings: Any, step: Any, say: Any) -> Iterator[Any]:
        return checked(folders, [replace(one, isolate=False) for one in settings], step)

    monkeypatch.setattr(check_run, "check_all", check_all)
    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(tmp_path / "tiny", dtype="float32")
    command = ["check", tmp_path / "tiny", "--candidate", "numpy", "--ids", ",".join(map(str, IDS[0]))]
    found = []
    for more in ([], ["--time", "600"]):
        assert run(*command, *more, "--json", tmp_path / "f.json")[0] == 0
        found.append(json.loads((tmp_path / "f.json").read_text()))
    assert found[0] == found[1]
    assert "ended" not in found[0]
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_ctrl_c_in_check_op_has_the_report_so_far() -> None:
    def stop(when: str) -> Callable[..., None]:
        def progress(text: str, done: float, total: float) -> None:
            if when in text or done == 3:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(SearchInterrupted) as searching:
        check_op("relu2", numpy_operators.relu2, **OPTIONS, progress=stop("nothing"))
    report = searching.value.report
    assert (report.verdict, report.ended, report.examples) == ("incomplete", "interrupted", 3)
    with pytest.raises(SearchInterrupted) as shrinking:
        check_op("relu2", numpy_operators.wrong, **OPTIONS, progress=stop("small"))
    report = shrinking.value.report
    assert (report.verdict, report.property, report.ended) == ("fails", "value", "interrupted")
    assert report.repro
    validate(report.to_dict(), "check-op")


def test_ctrl_c_ends_the_other_dtypes_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check_one(*arguments: Any, progress: Any, dtype: str, **options: Any) -> Any:
        asked.append(dtype)
        raise SearchInterrupted(report)

    report = check_op("relu2", numpy_operators.relu2, **OPTIONS)
    report = dataclasses.replace(report, verdict="incomplete", ended="interrupted")
    monkeypatch.setattr(api, "check_op", check_one)
    command = ["check-op", "relu2", "--candidate", "x:y", "--dtype", "float32", "--dtype", "bfloat16"]
    code, out, err = run(*command, "--json", tmp_path / "f.json")
    assert (code, err, asked) == (130, "", ["float32"])
    assert "interrupted" in out
    validate(json.loads((tmp_path / "f.json").read_text()), "check-op")


class Swallows:
    """A destructor in which Ctrl-C comes, as it may in a callback of the garbage collector."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_swallows_ends_the_search_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def observe(self: Any, task: Any, *limits: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            Swallows()
        return observed(self, task, *limits)

    observed = api.Worker.observe
    monkeypatch.setattr(api.Worker, "observe", observe)
    before = signal.getsignal(signal.SIGINT)
    command = ["check-op", "relu2", "--candidate", f"{numpy_operators.__file__}:relu2", "--arrays", "numpy"]
    code, out, _ = run(*command, "--max-examples", "0", "--dtype", "float32", "--json", tmp_path / "f.json")
    values = json.loads((tmp_path / "f.json").read_text())
    assert (code, values["verdict"], values["examples"]) == (130, "incomplete", 4), out
    assert signal.getsignal(signal.SIGINT) is before
