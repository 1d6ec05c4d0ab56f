"""What commands print holds every row, figure and count of what was found."""

import json
import sys
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from refllm import golden
from refllm.check.run import token_texts
from refllm.commands import audit, info, score
from refllm.commands.shared_options import write_json
from refllm.golden import manifest, show, verify
from refllm.golden.make_vectors import Change
from refllm.golden.verify import Finding, Verified
from refllm.kernels.fusions import ALWAYS_IN_STEPS, fusions
from refllm.opcheck.audit import AuditReport, Outcome


def printed(*shown: Any, width: int = 200) -> str:
    """Every run of spaces as one, so that a row is what its cells say."""
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    for one in shown:
        console.print(one)
    assert isinstance(console.file, StringIO)
    return "\n".join(" ".join(line.split()) for line in console.file.getvalue().splitlines())


def outcome(operator: str, what: str, killed: bool, equivalent: str = "") -> Outcome:
    return Outcome(operator, what, "torch", what, "somewhere", "float32", killed, "", 1, 0.0, "", equivalent)


def test_an_audit_names_operators_survivors_and_false_alarms_with_their_counts() -> None:
    report = AuditReport(
        "mine.py:test",
        (
            outcome("relu2", "bug one", True),
            outcome("relu2", "bug two", False),
            outcome("relu2", "bug three", True),
            outcome("swiglu", "bug four", True),
            outcome("swiglu", "bug five", True),
            outcome("swiglu", "not seen", False, "nor is this"),
            outcome("swiglu", "no bug", True, "it is the same"),
            outcome("swiglu", "unseen", False, "so is this"),
        ),
    )
    console = Console(file=StringIO(), width=200, color_system=None, legacy_windows=False)
    audit.show(report, console)
    assert isinstance(console.file, StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]
    rows = [line for line in lines if "─" not in line]
    assert rows == [
        "mine.py:test against known bugs",
        "operator mutants killed kill rate",
        "relu2 3 2 67 %",
        "swiglu 2 2 100 %",
        "survived:",
        "relu2, torch, float32: bug two (somewhere)",
        "not wrong, and rejected all the same:",
        "swiglu, torch, float32: no bug (somewhere) [no bug: it is the same]",
        "4 of 5 bugs found; 3 changes that nobody can see are not counted",
    ]
    console = Console(file=StringIO(), width=200)
    audit.show(AuditReport("mine", report.outcomes[:1]), console)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().rstrip().endswith("1 of 1 bugs found")


def test_a_score_is_told_in_figures_and_token_by_token() -> None:
    nll = np.array([1.5, 0.25, 2.75])
    told = score.Score(np.array([7, 8, 9, 10]), nll, ["a", "b", "c", "d"], 5)
    assert printed(score.show_score(told)).splitlines() == [
        "tokens scored 3 of 4",
        "log-likelihood -4.5000 nats",
        "per token 1.5000 nats",
        f"perplexity {np.exp(1.5):.4f}",
        f"bits per byte {4.5 / np.log(2) / 5:.4f}",
        "",
        "every token",
        "position id nats token",
        "1 8 1.5000 'b'",
        "2 9 0.2500 'c'",
        "3 10 2.7500 'd'",
    ]
    without = printed(score.show_score(replace(told, pieces=None, bytes=None), most=2)).splitlines()
    assert "bits per byte" not in " ".join(without)
    assert without[-4:] == ["the 2 least expected tokens", "position id nats token", "3 10 2.7500", "1 8 1.5000"]


def test_info_tells_every_tensor_operator_and_finding() -> None:
    found = info.describe(Path(golden.path("llama-tiny")))
    found = replace(found, unexpected=["a.foreign.weight"], missing=["one.gone"])
    shown = printed(info.show_info(found, tensors=True))
    lines = shown.splitlines()
    assert lines[0].endswith(f"({found.head})")
    assert f"parameters {found.parameters:,}" in lines
    assert {f"{name} {value}" for name, value in info.features(found.config).items()} <= {*lines}
    for fusion in fusions(found.config):
        assert any(line.startswith(f"{fusion.operator} {fusion.fuses}") for line in lines), fusion
    for asked, instead in ALWAYS_IN_STEPS.items():
        assert f"attention for {asked} not used: {instead}" in lines
    for line in ("missing: one.gone", "not used: a.foreign.weight", "tensor shape stored"):
        assert line in lines
    assert found.stored is not None
    for name, shape in found.shapes.items():
        assert any(line.startswith(f"{name} {list(shape)}") for line in lines), name
    assert f"files {len(found.stored)} tensors, " in shown
    assert "not as expected" in shown
    assert "a.foreign.weight [] -" in lines
    assert "tensor shape stored" not in printed(info.show_info(found))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 19, "1.5 MiB"),
        (1 << 30, "1.00 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)
def test_sizes_in_words(size: int, said: str) -> None:
    assert info._size(size) == said


def test_goldens_are_listed_verified_and_compared_in_full() -> None:
    told = manifest.read_manifest(golden.FOLDER)
    names = ["swiglu/plain", "helium/tiny-prompt"]
    entries = [told["cases"][name] for name in names]
    listed = printed(show.table_of_cases(told, names), width=400)
    assert listed.splitlines()[0] == "golden what it is for outputs dtypes witness"
    for name, entry in zip(names, entries, strict=True):
        worst = show.figure(max(entry["witness"]["max_sigma_float32"].values()))
        dtypes = ", ".join(dtype.replace("float", "f") for dtype in entry["dtypes"])
        (line,) = (line for line in listed.splitlines() if line.startswith(f"{name} {entry['what']} "))
        assert line.endswith(f" {dtypes} {worst}")
    assert f", {sum(n.startswith('model.') for n in entries[1]['outputs'])} taps" in listed
    closing = show.closing_of_cases(told, names)
    assert closing.startswith(f"2 goldens, {len(told['files'])} files, ")
    assert f"{sum(file['bytes'] for file in told['files'].values()) / 1e6:.1f} MB" in closing
    for package, number in entries[0]["versions"].items():
        assert f"{package} {number}" in closing

    good, bad = Verified("numpy", "float32", 4, 1.25, 3.5, "relu2/plain y"), Verified("torch", "bfloat16", 2, 9.0, 80.0)
    bad.findings += [Finding("a", "b"), Finding("a", "c")]
    assert printed(show.table_of_verified([good, bad])).splitlines() == [
        "backend dtype goldens worst rms worst element",
        "numpy float32 4 1.2 3.5 relu2/plain y holds",
        "torch bfloat16 2 9 80 2 findings",
    ]
    assert show.closing_of_verified([good], []) == "every file is as the manifest says, and every golden holds"
    assert show.closing_of_verified([good, bad], []) == "fails: 2 outputs do not hold"
    left_out = "; what is computed from changed files was left out"
    said = "fails: 1 files or cases are not as the manifest says"
    assert show.closing_of_verified([good], [Finding("x", "y")]) == said + left_out
    assert show.closing_of_verified([bad], [Finding("x", "y")]) == f"{said} and 2 outputs do not hold{left_out}"

    changes = [
        Change("a", "changed", 2.0, 0.25),
        Change("b", "same"),
        Change("c", "new"),
        Change("d", "changed", 5.0, np.inf),
    ]
    assert printed(show.table_of_changes(changes)).splitlines()[1:] == ["d changed 5 inf", "a changed 2 25.0%", "c new"]


def test_a_golden_is_described_by_every_input_and_output() -> None:
    (one,) = verify.goldens_of(golden.FOLDER, manifest.read_manifest(golden.FOLDER), ["attention/no-keys"])
    lines = printed(show.table_of_tensors(one)).splitlines()
    assert lines[0].startswith("tensor shape dtype smallest largest sigma ")
    assert len(lines) == 1 + len(one.inputs) + len(one.exact)
    for name, x in {**one.inputs, **{f"-> {name}": x for name, x in one.exact.items()}}.items():
        assert any(line.startswith(f"{name} {list(x.shape)} {x.dtype} ") for line in lines), name
    assert "call: attention(" in " ".join(" ".join(show.description(one)).split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([2.0, -1.0]), ("-1", "2")),
        (np.array([np.nan, 3.0]), ("3", "3 and NaN")),
        (np.array([np.nan]), ("NaN", "NaN")),
        (np.array([4, 9]), ("4", "9")),
        (np.array([True, False]), ("False", "True")),
        (np.zeros(0), ("", "")),
    ],
)
def test_the_range_of_a_tensor(values: np.ndarray, said: tuple[str, str]) -> None:
    assert show._range(values) == said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_escaped_where_the_terminal_cannot_show_it(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(raw := BytesIO(), encoding=encoding, errors="replace"))
    write_json({"text": "\u00e9"}, Path("-"))
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"text": "\u00e9"}
    assert (b"\\u00e9" in raw.getvalue()) == (encoding == "ascii")


def test_tokens_are_texts_of_their_own_checkpoint_where_it_has_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    folders = [tmp_path / "none", Path(golden.path("llama-tiny"))]
    text = token_texts(folders)
    assert text(SimpleNamespace(checkpoint="none"), 300) == ""  # type: ignore[arg-type]
    assert len(text(SimpleNamespace(checkpoint="llama-tiny"), 300)) > 0  # type: ignore[arg-type]
