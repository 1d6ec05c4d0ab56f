"""A candidate with weights of its own is judged with those, and what their format costs is said apart."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writer import write_gguf
from tiny import tiny_model

import refllm
from refllm.check import compare
from refllm.check.html import render
from refllm.check.oracle import Report
from refllm.check.report import show_report
from refllm.check.weights import Given
from refllm.commands import cli
from refllm.errors import CheckpointError, InputError
from refllm.forward.operators import Operators
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


def reads_as(kind: str, monkeypatch: Any) -> Callable[[Any], Any]:
    """Makes a port one whose products read their inputs as those of llama.cpp with matrices of that kind do."""
    stored = gguf.GGMLQuantizationType[kind]

    def linear(self: Operators, x: np.ndarray, *more: Any) -> np.ndarray:
        read = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(x), stored), stored)
        return refllm.ops.linear(read.astype(np.float32), *more, ar=self.ar)

    def made(forward: Any) -> Any:
        def inside(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(Operators, "linear", linear)
                return forward(checkpoint, ids, mask, positions, tap)

        return inside

    return made


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_products_with_weights_of_a_file_may_read_what_that_format_has(
    folder: Path, kind: str, monkeypatch: Any
) -> None:
    file, arrays = of_file(folder, kind)
    narrow = reads_as(kind, monkeypatch)
    right = one(folder, narrow(port(arrays)), weights=file)
    assert right.verdict == "holds", right.first_failure
    assert any("reads its input" in str(habit) for habit in right.habits)
    assert max(tap.isolated.ratio for tap in right.taps if tap.isolated) < 1.3  # as sharp as where nothing is rounded
    unrounded = one(folder, port(arrays), weights=file)
    assert unrounded.verdict == "holds"
    assert right.taps[-1].end_to_end.rms_sigma > 100 * unrounded.taps[-1].end_to_end.rms_sigma
    wrong = one(folder, narrow(port(rows_swapped(arrays))), weights=file).first_failure
    assert wrong is not None
    assert wrong.name == "model.layers.1.mlp.up_proj"
    unsaid = one(folder, narrow(port(arrays)), weights=arrays)  # nothing says in which format they are
    assert unsaid.verdict == {"Q8_0": "fails", "F16": "incomplete"}[kind]  # float16 may be TF32, which is to be said


@pytest.mark.parametrize("hidden", ["o_proj", "lm_head", "context"])
def test_a_reading_that_nothing_shows_is_a_part_of_the_error(folder: Path, hidden: str, monkeypatch: Any) -> None:
    file, arrays = of_file(folder, "Q8_0")
    forward = reads_as("Q8_0", monkeypatch)(port(arrays))

    def fewer(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        logits = forward(checkpoint, ids, mask, positions, lambda n, x: None if n.endswith(hidden) else tap(n, x))
        return None if hidden == "lm_head" else logits

    report = one(folder, fewer, weights=file)
    assert report.verdict == ("holds" if hidden == "o_proj" else "incomplete"), report.first_failure
    assert not any(tap.broken for tap in report.taps)
    untested = [tap.name for tap in report.taps if tap.untested]  # int8 in few tokens hides a factor of 1.01
    assert untested == ["model.layers.1.self_attn.o_proj"] * (hidden == "context")


KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "MXFP4")


def own_file(folder: Path, kind: str, **planted: Any) -> tuple[Given | None, list[str]]:
    file = GgufFile.open(write_gguf(folder, folder.parent / f"planted-{kind}.gguf", kind, **planted))
    return Given("m.gguf", file, rounded=True, own=True).checked(refllm.load(folder, dtype="float64"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_format_costs_makes_no_other_tensor(folder: Path, kind: str) -> None:
    """Whatever the numbers are: one of a block may be as large as it likes, or all be far below the smallest of it."""

    def edit(tensors: Arrays) -> None:
        rng = np.random.default_rng(1)
        for weight in tensors.values():
            weight *= 10 ** rng.uniform(-4, 0)
            weight.flat[:: rng.integers(20, 60)] *= 10 ** rng.uniform(0, 4)

    odd = folder.parent / "odd"
    arrays = {name: weight.copy() for name, weight in model_of(str(folder)).weights.renamed("model.").items()}
    edit(arrays)
    model = refllm.load(folder, dtype="float32")
    own = model.weights.replaced({name.removeprefix("model."): weight for name, weight in arrays.items()})
    type(model)(model.config, own, model.arithmetic).save_pretrained(odd, dtype="float32")
    for checkpoint in (folder, odd):
        given, said = own_file(checkpoint, kind)
        assert said == []
        assert (given is None) == (kind == "F32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bug", ["row lost", "rows swapped", "another one's", "norm plus one"])
def test_a_tensor_of_a_file_that_is_another_is_said_and_not_taken(folder: Path, kind: str, bug: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight" if bug != "norm plus one" else "model.layers.1.input_layernorm.weight"

    def edit(tensors: Arrays) -> None:
        weight = tensors[name]
        if bug == "row lost":
            weight[-1] = 0
        elif bug == "rows swapped":
            weight[[3, 4]] = weight[[4, 3]]
        elif bug == "another one's":
            weight[:] = tensors[name.replace("up", "gate")]
        else:
            weight += 1

    given, said = own_file(folder, kind, edit=edit)
    assert len(said) == 1
    assert said[0].startswith(f"{name} of m.gguf (")
    model = refllm.load(folder, dtype="float32")
    if given is not None:
        taken = given.in_place_of(model).weights[name.removeprefix("model.")]
        assert np.array_equal(taken, model.weights[name.removeprefix("model.")])


def test_weights_that_a_port_hands_over_are_asked_whose_they_are(folder: Path) -> None:
    report = one(folder, port(rows_swapped(by_rows(folder)), hands_over=True))
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.1.mlp.up_proj"
    assert any("up_proj.weight of" in note and "is not the checkpoint's: a row is off" in note for note in report.notes)


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


@pytest.mark.parametrize("damage", ["magic", "text", "cut", "family", "tensor", "heads"])
def test_a_damaged_gguf_file_is_one_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    path, edits = tmp_path / "m.gguf", {}
    if damage == "heads":
        edits = {"metadata": {"ARCH.attention.head_count": 0}}
    write_gguf(folder, path, **edits)
    data = path.read_bytes()
    if damage == "magic":
        path.write_bytes(b"GGUF" + b"\xff" * 100)
    elif damage == "text":
        path.write_text("no GGUF file, but a text")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "family":
        path.write_bytes(data.replace(b"llama", b"phi77"))
    elif damage == "tensor":
        path.write_bytes(data.replace(b"blk.0.ffn_up", b"blk.9.ffn_up"))
    expected = {
        "text": "this is no GGUF file",
        "family": "expected one of llama",
        "tensor": "is no tensor of",
        "heads": "expected a number of 1",
    }
    with pytest.raises(CheckpointError, match=expected.get(damage, "a GGUF file that cannot be read")):
        GgufFile.open(path)
