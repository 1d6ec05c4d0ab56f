"""A candidate with weights of its own is judged with those, and what their format costs is said apart."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import write_gguf
from tiny import tiny_model

import refllm
from refllm.check import compare
from refllm.check.html import render
from refllm.check.oracle import Report
from refllm.check.report import show_report
from refllm.commands import cli
from refllm.errors import CheckpointError, InputError
from refllm.storage.checkpoint import save_checkpoint
from refllm.storage.gguf_file import GgufFile, in_halves, in_pairs

IDS = np.random.default_rng(5).integers(4, 90, (1, 24))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 97, "max_position_embeddings": 4096}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    changes = {**SIZES, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    tiny_model("LlamaForCausalLM", **changes).save_pretrained(folder, dtype="float32")
    return folder


@cache
def model_of(folder: str) -> Any:
    return refllm.load(folder, dtype="float32")


class Shown:
    def __init__(self, tap: Callable[..., Any]) -> None:
        self.tap = tap

    def wants(self, name: str) -> bool:
        return name != "lm_head"

    def record(self, name: str, value: np.ndarray) -> None:
        self.tap(name, value)


def port(arrays: Arrays, hands_over: bool = False) -> Any:
    """A right port that computes with these arrays in float32. arrays: by the names of a checkpoint."""

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        model = model_of(checkpoint)
        own = model.weights.replaced({name.removeprefix("model."): value for name, value in arrays.items()})
        for name, value in arrays.items() if hands_over else ():
            tap(f"weights.{name}", value)
        copy = type(model)(model.config, own, model.arithmetic)
        return copy(input_ids=ids, attention_mask=mask, position_ids=positions, recorder=Shown(tap)).logits

    return forward


def by_rows(folder: Path) -> Arrays:
    """Every matrix of a layer in int8 with a scale per row, dequantised."""
    found = {}
    for name, weight in model_of(str(folder)).weights.renamed("model.").items():
        if weight.ndim == 2 and "layers" in name:
            scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
            found[name] = np.rint(weight / scale).astype(np.int8) * scale
    return found


def of_file(folder: Path, kind: str) -> tuple[Path, Arrays]:
    path = write_gguf(folder, folder.parent / f"{folder.name}-{kind}.gguf", kind)
    file = GgufFile.open(path)
    return path, {name: file.read(name) for name in file.names}


def rows_swapped(arrays: Arrays) -> Arrays:
    """The same with one bug more: two rows of a matrix change places."""
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = arrays[name].copy()
    wrong[[3, 4]] = wrong[[4, 3]]
    return {**arrays, name: wrong}


def one(folder: Path, candidate: Any, **options: Any) -> Report:
    return compare(folder, candidate, input_ids=IDS, **options)[0]


@pytest.mark.parametrize("kind", ["int8", "Q8_0", "Q4_0"])
def test_a_quantised_port_holds_with_its_own_weights_and_a_second_bug_is_named(folder: Path, kind: str) -> None:
    weights: Any
    weights, arrays = (None, by_rows(folder)) if kind == "int8" else of_file(folder, kind)
    weights = arrays if weights is None else weights
    without = one(folder, port(arrays))
    assert without.verdict == "fails"  # beside the checkpoint's own weights every product is wrong
    right = one(folder, port(arrays), weights=weights)
    assert right.verdict == "holds", right.first_failure
    wrong = one(folder, port(rows_swapped(arrays)), weights=weights)
    assert wrong.verdict == "fails"
    assert wrong.first_failure is not None
    assert wrong.first_failure.name == "model.layers.1.mlp.up_proj"
    assert wrong.first_failure.defect_here


def test_weights_that_a_port_hands_over_are_those_that_it_is_judged_with(folder: Path) -> None:
    arrays = by_rows(folder)
    reports = compare(folder, port(arrays, hands_over=True), input_ids=IDS, stress=True)
    assert [report.verdict for report in reports] == ["holds"] * len(reports)
    assert len(reports) > 2
    found = reports[0].format_error
    assert found is not None
    assert (found.given, found.changed) == (len(arrays), len(arrays))
    files = one(folder, port(arrays, hands_over=True), weights=arrays)
    assert files.verdict == "holds"
    assert any("not read" in note for note in files.notes)


def test_the_error_of_the_format_is_that_of_exact_runs(folder: Path, tmp_path: Path) -> None:
    arrays = by_rows(folder)
    save_checkpoint(tmp_path, arrays, "float32")
    report = one(folder, port(arrays), weights=tmp_path)
    found, original = report.format_error, refllm.load(folder, dtype="float64")
    assert found is not None
    given = original.weights.replaced({name.removeprefix("model."): value for name, value in arrays.items()})
    logits = original(input_ids=IDS).logits
    other = type(original)(original.config, given, original.arithmetic)(input_ids=IDS).logits
    assert found.error == pytest.approx(np.sqrt(np.mean((other - logits) ** 2)), rel=1e-12)
    assert found.flips == int((other.argmax(-1) != logits.argmax(-1)).sum())
    worst = found.worst[0]
    own = original.weights[worst.name.removeprefix("model.")]
    difference = np.abs(arrays[worst.name] - own)
    assert worst.largest == difference.max() == difference[worst.at]
    assert worst.relative == pytest.approx(np.sqrt(np.mean(difference**2) / np.mean(own**2)))
    assert [tensor.relative for tensor in found.worst] == sorted((t.relative for t in found.worst), reverse=True)
    assert report.to_dict()["format_error"]["worst"][0]["name"] == worst.name
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured:
        console.print(show_report(report))
    for shown in (captured.get(), render([report])):
        assert worst.name in shown
        assert f"{found.flips} of {found.positions} change" in shown


def test_weights_equal_to_the_checkpoints_cost_nothing(folder: Path) -> None:
    report = one(folder, port({}), weights=folder)
    assert report.verdict == "holds"
    assert report.format_error is not None
    assert (report.format_error.changed, report.format_error.error, report.format_error.kl) == (0, 0.0, 0.0)


def test_a_file_is_rounded_to_the_precision_of_the_check_and_arrays_are_not(folder: Path) -> None:
    from refllm.check.weights import Given

    model, arrays = refllm.load(folder, dtype="bfloat16"), by_rows(folder)
    path, _ = of_file(folder, "Q8_0")
    name = "layers.0.mlp.up_proj.weight"
    handed = Given.open(arrays).in_place_of(model).weights[name]
    assert np.array_equal(handed, arrays[f"model.{name}"])
    rounded = Given.open(path).in_place_of(model).weights[name]
    assert np.array_equal(rounded, refllm.precision.rounding("bfloat16")(rounded))


def test_what_is_wrong_with_weights_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    arrays = by_rows(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=r"is no tensor of the checkpoint's model; did you mean"):
        one(folder, port({}), weights={name.replace("up_proj", "up_prj"): arrays[name]})
    with pytest.raises(InputError, match=r"has shape \[32, 64\], expected \[64, 32\]"):
        one(folder, port({}), weights={name: arrays[name].T})
    (tmp_path / "text.txt").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"--weights .*text.txt: .*it takes a checkpoint folder"):
        one(folder, port({}), weights=tmp_path / "text.txt")


@pytest.mark.parametrize("family", ["Llama", "StableLm", "Arcee"])
def test_a_gguf_file_gives_the_checkpoint_back(family: str, tmp_path: Path) -> None:
    """Names and order of rows, of every feature that a family has; what is stored as it is comes back to the bit."""
    model = tiny_model(f"{family}ForCausalLM")
    model.save_pretrained(tmp_path, dtype="float32")
    own = refllm.load(tmp_path, dtype="float32").weights.renamed("model.")
    file = GgufFile.open(write_gguf(tmp_path, tmp_path / "m.gguf"))
    assert set(file.names) == set(own)
    for name in file.names:
        assert file.shape(name) == own[name].shape
        assert np.array_equal(file.read(name), own[name]), name


def test_rows_in_pairs_and_in_halves_are_inverse() -> None:
    rows = np.arange(2 * 6)[:, None] * np.ones(3)
    assert in_pairs(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert np.array_equal(in_halves(in_pairs(rows, 2), 2), rows)


def test_info_says_what_a_gguf_file_is(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    path, _ = of_file(folder, "Q4_0")
    monkeypatch.setattr(sys, "argv", ["refllm", "info", str(path), "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    own = refllm.load(folder).num_parameters()
    assert (found["form"], found["architecture"], found["parameters"]) == ("gguf", "llama", own)
    assert found["kinds"]["Q4_0"] == 16


@pytest.mark.parametrize("damage", ["magic", "cut", "family", "tensor", "heads"])
def test_a_damaged_gguf_file_is_one_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    path, edits = tmp_path / "m.gguf", {}
    if damage == "heads":
        edits = {"metadata": {"ARCH.attention.head_count": 0}}
    write_gguf(folder, path, **edits)
    data = path.read_bytes()
    if damage == "magic":
        path.write_bytes(b"GGUF" + b"\xff" * 100)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "family":
        path.write_bytes(data.replace(b"llama", b"phi77"))
    elif damage == "tensor":
        path.write_bytes(data.replace(b"blk.0.ffn_up", b"blk.9.ffn_up"))
    expected = {"family": "expected one of llama", "tensor": "is no tensor of", "heads": "expected a number of 1"}
    with pytest.raises(CheckpointError, match=expected.get(damage, "a GGUF file that cannot be read")):
        GgufFile.open(path)
