"""What a check does so that a model fits: values on disk, matrices read in blocks, layers one after another, and what
was judged kept, resumed and merged. In all these ways the report is that of the whole, to the last digit."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

import refllm
from refllm.accuracy import tables
from refllm.check import candidates, compare, keeper
from refllm.check import trace as traces_module
from refllm.check.asked import ALL_LAYERS, Asked, Layers
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.difference import diff
from refllm.check.inputs import Inputs
from refllm.check.merged import check_parts
from refllm.check.oracle import Judge, PartlyJudgedError, Report
from refllm.check.recorded import check_files, check_recorded
from refllm.check.run import Settings, load
from refllm.check.trace import Trace
from refllm.check.values import Values
from refllm.commands import cli
from refllm.errors import InputError
from refllm.storage import weights

IDS = np.random.default_rng(5).integers(4, 90, (2, 12))
CONFIG: dict[str, Any] = {"vocab_size": 97, "num_hidden_layers": 4, "tie_word_embeddings": False}
LAYERS = 4
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stablelm")
    tiny_model("StableLmForCausalLM", **CONFIG).save_pretrained(folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of runs: right in two formats, and one with a planted bug."""
    made = tmp_path_factory.mktemp("runs")
    for dtype in ("float32", "bfloat16"):
        model = refllm.load(folder, dtype=dtype, policy=None if dtype == "float32" else "fused")
        trace = record(ReferenceCandidate(model), model, Inputs(IDS))
        trace.save(made / f"{dtype}.safetensors")
    name = "model.layers.2.mlp.act"
    trace.taps[name] = trace.taps[name] * np.float32(1.125)
    trace.save(made / "wrong.safetensors")
    return {file.stem: file for file in made.iterdir()}


def judged(folder: Path, file: Path, step: Callable[..., None] = lambda *_: None, **how: Any) -> Report:
    (report,) = check_files(folder, [file], Settings("a:b", (), explain=False, **how), step)
    return report


@pytest.fixture(scope="module")
def wholes(folder: Path, recorded: dict[str, Path]) -> dict[str, Report]:
    return {kind: judged(folder, file) for kind, file in recorded.items()}


def said(report: Report) -> dict[str, Any]:
    """All that a report says, its pictures too."""
    values = report.to_dict()
    values.pop("part", None)
    values["maps"] = [None if tap.zmap is None else tap.zmap.tolist() for tap in report.taps]
    return values


def test_a_right_run_holds_and_the_bug_is_named(wholes: dict[str, Report]) -> None:
    assert {kind: report.verdict for kind, report in wholes.items() if kind != "wrong"} == dict.fromkeys(
        ("float32", "bfloat16"), "holds"
    )
    assert wholes["wrong"].first_failure is not None
    assert wholes["wrong"].first_failure.name == "model.layers.2.mlp.act"


# -- values on disk ----------------------------------------------------------------------------------------------------


def test_values_on_disk_are_those_in_memory(
    folder: Path, recorded: dict[str, Path], wholes: dict[str, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reports() -> list[dict[str, Any]]:
        found = compare(folder, "numpy", dtype="bfloat16", input_ids=IDS, stress=True, isolate=False, explain=False)
        return [said(report) for report in found]

    in_memory, difference = reports(), diff(*(Trace.load(recorded[kind]) for kind in ("bfloat16", "wrong")))
    for module in (candidates, traces_module):
        monkeypatch.setattr(module, "IN_MEMORY", 0)
    assert reports() == in_memory
    mapped = Trace.load(recorded["wrong"])
    assert isinstance(mapped.taps, Values)
    assert {value.dtype.name for value in mapped.taps.raw.values()} == {"bfloat16", "float32"}
    assert diff(Trace.load(recorded["bfloat16"]), mapped) == difference
    assert said(judged(folder, recorded["wrong"])) == said(wholes["wrong"])


def test_a_file_that_is_written_value_by_value_is_a_trace(folder: Path, tmp_path: Path) -> None:
    model = refllm.load(folder, dtype="bfloat16", policy="fused")
    file, inputs = tmp_path / "run.safetensors", Inputs(IDS, chunks=(5, 7))
    made = record(ReferenceCandidate(model), model, inputs, file=file)
    read = Trace.load(file)
    assert (read.source, read.dtype, read.inputs.chunks) == (made.source, made.dtype, inputs.chunks)
    assert list(read.taps) == list(made.taps)
    assert all(np.array_equal(read.taps[name], made.taps[name]) for name in made.taps)
    assert not diff(made, read).first_difference

    class Fails(ReferenceCandidate):
        def run(self, inputs: Inputs, sink: Any) -> None:
            super().run(inputs, sink)
            raise ValueError("at the end")

    with pytest.raises(refllm.errors.RefllmError, match="at the end"):
        record(Fails(model), model, inputs, file=tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


# -- matrices in blocks ------------------------------------------------------------------------------------------------


def test_a_matrix_that_is_not_read_has_the_numbers_of_one_that_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "UNREAD", 1)
    kept = load(folder, "bfloat16").weights
    for name in ("layers.1.mlp.up_proj.weight", "lm_head.weight"):
        lazy, matrix = kept.unread()[name], kept[name]
        assert isinstance(lazy, weights.Unread)
        assert lazy.shape == matrix.shape
        rows = np.array([3, 0, 3, len(matrix) - 1])
        for index in (slice(None), slice(2, 9), slice(5, None), rows, (rows, slice(1, 4)), 4, (slice(None), 2)):
            assert np.array_equal(lazy[index], matrix[index])
        assert np.array_equal(lazy.T, matrix.T)
        assert np.array_equal(1 + lazy, 1 + matrix)
        assert np.array_equal(rows[:1, None] @ lazy[:1], rows[:1, None] @ matrix[:1])
    assert isinstance(kept.unread()["norm.weight"], np.ndarray)


def test_a_check_reads_no_large_matrix_as_a_whole(
    folder: Path, recorded: dict[str, Path], wholes: dict[str, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "UNREAD", 1)
    monkeypatch.setattr(weights.Unread, "__array__", lambda *_, **__: pytest.fail("it was read"))
    assert said(judged(folder, recorded["wrong"])) == said(wholes["wrong"])


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "IN_MEMORY", 0)
    peaks, ids = [], np.arange(4, 52)[None]
    for layers in (2, 8):
        of_it = tmp_path / str(layers)
        sizes = {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 512}
        tiny_model("ArceeForCausalLM", **{**CONFIG, **sizes}).save_pretrained(of_it, dtype="bfloat16")
        model = refllm.load(of_it, dtype="bfloat16", policy="fused")
        record(ReferenceCandidate(model), model, Inputs(ids), file=tmp_path / "run.safetensors")
        values = sum(value.nbytes for value in Trace.load(tmp_path / "run.safetensors").taps.values())
        tracemalloc.start()
        report = judged(of_it, tmp_path / "run.safetensors")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        for tap in report.taps:  # what a report has of every value grows, and is small beside it
            peaks[-1] -= 0 if tap.zmap is None else tap.zmap.nbytes
    assert peaks[1] - peaks[0] < values / 4, peaks


# -- ended and resumed -------------------------------------------------------------------------------------------------


class Stop:
    """A step that ends the check when it is called for the n-th time."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["float32", "wrong"])
def test_what_was_ended_goes_on_and_says_what_the_whole_says(
    folder: Path,
    recorded: dict[str, Path],
    wholes: dict[str, Report],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(keeper, "SECONDS_BETWEEN", 0.0)
    file, kept = recorded[kind], recorded[kind].with_name(f"{kind}.safetensors.judged")
    steps = Stop(0)
    judged(folder, file, steps)
    for at in (5, 9, steps.calls):
        with pytest.raises(PartlyJudgedError) as ended:
            judged(folder, file, Stop(at))
        assert kept.exists()
        judged_so_far = ended.value.report
        assert judged_so_far.verdict != "holds"
        shown = {tap.name: tap.isolated for tap in wholes[kind].taps}
        assert all(tap.isolated == shown[tap.name] for tap in judged_so_far.taps if tap.name in shown)
        assert len(judged_so_far.taps) > 10
        rest = Stop(0)
        assert said(judged(folder, file, rest)) == said(wholes[kind])
        assert rest.calls < steps.calls
        assert not kept.exists()


def test_where_tables_are_guessed_nothing_is_taken_from_another_guess(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "SECONDS_BETWEEN", 0.0)
    trace, file, guesses = Trace.load(recorded["float32"]), tmp_path / "hidden.safetensors", tables.guesses

    def wrong_ones_first(config: Any, positions: np.ndarray) -> list[tables.Tables]:
        right = guesses(config, positions)
        return [replace(right[0], frequencies=2 * right[0].frequencies), *right]

    monkeypatch.setattr(tables, "guesses", wrong_ones_first)
    trace.taps = {name: value for name, value in trace.taps.items() if not name.endswith("_rope")}
    trace.save(file)
    with pytest.raises(PartlyJudgedError):
        judged(folder, file, Stop(6))
    assert judged(folder, file).verdict == "holds"


def test_what_is_kept_is_of_no_other_check(
    folder: Path, recorded: dict[str, Path], wholes: dict[str, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "SECONDS_BETWEEN", 0.0)
    file = recorded["bfloat16"]
    kept = file.with_name("bfloat16.safetensors.judged")
    with pytest.raises(PartlyJudgedError):
        judged(folder, file, Stop(7))
    steps, other = Stop(0), recorded["wrong"].with_name("wrong.safetensors.judged")
    kept.rename(other)
    assert said(judged(folder, recorded["wrong"], steps)) == said(wholes["wrong"])
    other.write_bytes(b"\x10" * 99)
    assert said(judged(folder, recorded["wrong"], steps)) == said(wholes["wrong"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: exit code, standard output, standard error."""

    def run(*command: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", *map(str, command)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def test_ctrl_c_shows_what_was_judged_so_far(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = Judge._isolated

    def interrupted(self: Judge, name: str, x: Any) -> Any:
        if name == "model.layers.3.mlp.act":
            raise KeyboardInterrupt
        return isolated(self, name, x)

    monkeypatch.setattr(Judge, "_isolated", interrupted)
    file = tmp_path / "found.json"
    code, out, _ = run("check", folder, "--trace", recorded["wrong"], "--no-explain", "--json", file)
    assert code == 130
    assert "first failure: model.layers.2.mlp.act" in out
    assert "nothing from layer 3 on was judged" in " ".join(out.split())
    found = json.loads(file.read_text())
    assert (found["interrupted"], found["verdict"]) == (True, "fails")
    assert found["reports"][0]["taps"][-1]["name"].startswith("model.layers.3.")
    assert found["reports"][0]["taps"][-1]["end_to_end"] is None


def test_the_same_folder_of_work_runs_nothing_again(folder: Path, tmp_path: Path) -> None:
    ran = []

    class Counted(ReferenceCandidate):
        def run(self, inputs: Inputs, sink: Any) -> None:
            ran.append(inputs.label)
            super().run(inputs, sink)

    from refllm.check.runs import Runs
    from refllm.check.work import Work

    def reports(ids: np.ndarray) -> list[dict[str, Any]]:
        candidate = Counted(refllm.load(folder, dtype="bfloat16", policy="fused"))
        work = Work(tmp_path, folder, "counted", "bfloat16")
        runs = Runs(lambda dtype: load(folder, dtype), candidate, Inputs(ids), Asked(), explain=False, work=work)
        return [said(report) for report in runs.reports()]

    first, count = reports(IDS), len(ran)
    assert count > 1  # the rows of the embedding too
    assert reports(IDS) == first
    assert len(ran) == count
    reports(IDS[:, :6])
    assert len(ran) > count


# -- some layers, some positions, and parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cuts"), [("float32", (2, 3)), ("bfloat16", (1,)), ("wrong", (2, 3))])
def test_parts_that_are_merged_are_the_whole(
    folder: Path,
    recorded: dict[str, Path],
    wholes: dict[str, Report],
    tmp_path: Path,
    kind: str,
    cuts: tuple[int, ...],
) -> None:
    files, shown = [], []
    for first, stop in zip((0, *cuts), (*cuts, LAYERS), strict=True):
        report = judged(folder, recorded[kind], layers=f"{first}:{stop}")
        assert report.verdict == ("fails" if kind == "wrong" and first <= 2 < stop else "incomplete")
        files.append(tmp_path / f"{first}.json")
        files[-1].write_text(json.dumps({"reports": [report.to_dict()]}))
        shown += [tap.name for tap in report.taps]
    assert shown == [tap.name for tap in wholes[kind].taps]
    (merged,) = check_parts(files[::-1], None, None, lambda *_: None, False)
    assert said(merged) == said(wholes[kind])


def test_what_makes_no_whole_is_said_in_one_sentence(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, layers, policy in zip(parts, ("0:2", "3:"), ("fused", "fused"), strict=True):
        run("check", folder, "--trace", recorded["bfloat16"], "--policy", policy, "--layers", layers, "--json", part)
    other = tmp_path / "c.json"
    run("check", folder, "--trace", recorded["bfloat16"], "--layers", "2:3", "--json", other)
    (tmp_path / "d.json").write_text("{}")
    for command, words in (
        (["--merge", *parts], "layer 2 is in no part; judge it with --layers 2:"),
        (["--merge", *parts, other], "judged with policy None and fused"),
        (["--merge", tmp_path / "d.json"], "it is not the part of a check"),
        (["--merge", tmp_path / "e.json"], "No such file"),
        (["--merge"], "--merge needs the parts"),
        ([folder, "--layers", "4:"], "the model has 4 layers, 0 to 3"),
        ([folder, "--layers", "2"], "expected A:B"),
        ([folder, "--layers", "2:2"], "expected A:B"),
        ([folder, "--last", "0"], "expected how many positions"),
        ([folder, "--last", "3", "--backward"], "leave out --backward"),
        ([folder, "--trace", recorded["bfloat16"], "--work", tmp_path], "leave out --work"),
        ([folder, folder], "check takes one CHECKPOINT"),
    ):
        code, _, error = run("check", *command)
        assert (code, error.count("\n")) == (2, 1), (command, error)
        assert words in error, (command, error)


def test_the_last_positions_are_judged_as_in_the_whole(
    folder: Path, recorded: dict[str, Path], wholes: dict[str, Report]
) -> None:
    S = IDS.shape[1]
    for kind, whole in wholes.items():
        report = judged(folder, recorded[kind], last=5)
        assert report.tokens == whole.tokens
        assert report.verdict == ("fails" if kind == "wrong" else "incomplete")
        assert [tap.name for tap in report.taps] == [tap.name for tap in whole.taps]
        assert all(tap.isolated is not None and tap.isolated.row[1] >= S - 5 for tap in report.taps)
        assert said(judged(folder, recorded[kind], last=S)) == said(whole)
    trace = Trace.load(recorded["bfloat16"])
    for position, verdict in ((S - 2, "fails"), (2, "incomplete")):
        wrong = trace.taps["model.layers.1.self_attn.context"].copy()
        wrong[:, :, position] *= 1.5
        bad = replace(trace, taps=trace.taps | {"model.layers.1.self_attn.context": wrong})
        report = check_recorded(lambda dtype: load(folder, dtype), bad, Asked(last=3), explain=False)
        assert report.verdict == verdict
    few = replace(trace, taps={k: v for k, v in trace.taps.items() if not k.endswith("1.self_attn.v_proj")})
    with pytest.raises(InputError, match=r"--last needs the keys and values .* model.layers.1.self_attn.k_rope"):
        check_recorded(lambda dtype: load(folder, dtype), few, Asked(last=3), explain=False)


def test_layers_of_text() -> None:
    assert [Layers.of(text) for text in (None, ":", "3:", ":2", "1:4")] == [
        ALL_LAYERS,
        ALL_LAYERS,
        Layers(3),
        Layers(0, 2),
        Layers(1, 4),
    ]
    assert Layers(1, 4).within(4) == Layers(1)
