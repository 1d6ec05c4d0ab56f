"""Runs that were recorded elsewhere: by programs that know no refllm, in their layouts, against a known-good one. What
is wrong in them is named, and a file that is none is one sentence."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_model

import refllm
from refllm.check import compare
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.difference import diff
from refllm.check.inputs import Inputs, stressed
from refllm.check.layout import gguf_order
from refllm.check.oracle import Report
from refllm.check.trace import Trace
from refllm.commands import cli
from refllm.errors import InputError, RefllmError

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs/recording.md").read_text()
IDS = np.random.default_rng(3).integers(4, 90, (2, 24))
CONFIG: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "vocab_size": 97}
Taps = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def traces(folder: Path) -> dict[str, Trace]:
    """A right run in each format, of an implementation whose rounding nobody names."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = refllm.load(folder, dtype=dtype, policy=None if dtype == "float32" else "fused")
        found[dtype] = record(ReferenceCandidate(model), model, Inputs(IDS))
    return found


def plain(trace: Trace, path: Path, taps: Taps | None = None, **metadata: str) -> Path:
    """The file that a program writes that knows the names alone."""
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[trace.dtype]
    shown = trace.taps if taps is None else taps
    narrow = {name: value.astype(kind) for name, value in shown.items()}  # scores may be held in float32
    exact = {n: x if np.array_equal(x.astype(np.float32), shown[n]) else shown[n] for n, x in narrow.items()}
    values = {name: np.ascontiguousarray(value) for name, value in exact.items()}
    save_file(values | {"input_ids": trace.inputs.input_ids}, path, metadata or None)
    return path


def first(report: Report) -> str:
    return "" if report.first_failure is None else report.first_failure.name


def changed(trace: Trace, change: Callable[[str, np.ndarray], np.ndarray]) -> Trace:
    return replace(trace, taps={name: change(name, value.copy()) for name, value in trace.taps.items()})


# -- programs that know no refllm --------------------------------------------------------------------------------------


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def ran(command: list[Any], **how: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path, str], None]]:
    """What there is to run a program in -> runs Llama there: right, or with a bug, into a file."""
    made, c = tmp_path_factory.mktemp("programs"), json.loads((folder / "config.json").read_text())
    (made / "trace_writer.py").write_text(block("python"))
    shutil.copy(HERE / "foreign" / "llama_numpy.py", made)

    def in_numpy(out: Path, kind: str) -> None:
        command = [sys.executable, made / "llama_numpy.py", folder, out, kind]
        ran(command, input=json.dumps(IDS.tolist()), cwd=made)

    def in_cpp(out: Path, kind: str) -> None:
        sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
        given = [c[name] for name in sizes] + [c["rope_parameters"]["rope_theta"]]
        ran([made / "llama", folder / "model.safetensors", *given, out, kind, *IDS[0]])

    if shutil.which("g++") is None:
        return {"numpy": in_numpy}
    (made / "llama.cpp").write_text(block("cpp") + (HERE / "foreign" / "llama.cpp").read_text())
    ran(["g++", "-std=c++17", "-Wall", "-Werror", made / "llama.cpp", "-o", made / "llama"])
    return {"numpy": in_numpy, "cpp": in_cpp}


BUGS = {
    "numpy": ("unscaled", "model.layers.1.self_attn.context", 2 * 24),
    "cpp": ("swapped", "model.layers.1.mlp.act", 24),
}


def test_a_run_of_a_program_without_refllm_is_judged(
    folder: Path, programs: dict[str, Callable[[Path, str], None]], tmp_path: Path
) -> None:
    assert "numpy" in programs
    for language, run in programs.items():
        bug, name, tokens = BUGS[language]
        run(tmp_path / "right.safetensors", "right")
        run(tmp_path / "wrong.safetensors", bug)
        right, wrong = (compare(folder, trace=tmp_path / f"{kind}.safetensors")[0] for kind in ("right", "wrong"))
        assert (right.verdict, right.dtype, right.tokens) == ("holds", "float32", tokens), (language, first(right))
        assert len(right.taps) >= 31
        assert "plain" in right.candidate
        assert any("shown as [" in note for note in right.notes)
        assert (wrong.verdict, first(wrong)) == ("fails", name), language
        beside = compare(folder, trace=tmp_path / "wrong.safetensors", against=tmp_path / "right.safetensors")[0]
        assert (beside.verdict, first(beside)) == ("fails", name), language


@pytest.fixture(scope="module")
def padded(folder: Path) -> dict[str, Trace]:
    """Right runs of two rows of which one has padding on the right, in each format."""
    found, mask = {}, np.ones_like(IDS)
    mask[1, -5:] = 0
    for dtype in ("float32", "bfloat16"):
        model = refllm.load(folder, dtype=dtype, policy=None if dtype == "float32" else "fused")
        found[dtype] = record(ReferenceCandidate(model), model, Inputs(IDS, mask))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 97), (2, 1, 97), (2, 100)])
def test_logits_of_the_last_token_alone_are_judged_for_it(
    folder: Path, padded: dict[str, Trace], dtype: str, shape: tuple[int, ...]
) -> None:
    """As an engine that generates keeps them; the last token is the last that is no padding."""
    trace = padded[dtype]
    last = trace.taps["lm_head"][[0, 1], [23, 18]]
    shown = np.pad(last, ((0, 0), (0, shape[-1] - 97))).reshape(shape)
    right = compare(folder, trace=replace(trace, taps={**trace.taps, "lm_head": shown}))[0]
    assert right.verdict == "holds", first(right)
    assert any("of the last token of each sequence alone" in note for note in right.notes)
    assert right.next_tokens is not None
    assert right.next_tokens.positions == 2
    wrong = shown.copy()
    wrong[1] = np.roll(wrong[1], 1, axis=-1)
    report = compare(folder, trace=replace(trace, taps={**trace.taps, "lm_head": wrong}))[0]
    assert (report.verdict, first(report)) == ("fails", "lm_head")
    assert report.taps[-1].isolated is not None
    assert report.taps[-1].isolated.row == (1, 18)
    beside = compare(folder, trace=replace(trace, taps={**trace.taps, "lm_head": wrong}), against=trace)
    assert beside[0].verdict == "fails"


RUST = r"""
fn main() {
    let ids: Vec<u8> = [3i64, 1, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
    let logits: Vec<u8> = (0..12).flat_map(|n| (n as f32 / 4.0).to_le_bytes()).collect();
    let path = std::env::args().nth(1).unwrap();
    write_trace(&path, &[("input_ids", "I64", vec![3], ids), ("lm_head", "F32", vec![3, 4], logits)],
                "{\"source\":\"Rust\"}").unwrap();
}
"""


def test_the_writer_in_rust_writes_the_format(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    values = {"input_ids": np.array([3, 1, 4]), "lm_head": np.arange(12, dtype=np.float32).reshape(3, 4) / 4}
    if shutil.which("rustc") is None:
        exec(block("python"), space := {})  # the same writer in a language that is there
        space["write_trace"](file, values, source="Rust")
    else:
        (tmp_path / "a.rs").write_text(block("rust") + RUST)
        ran(["rustc", "--edition=2021", tmp_path / "a.rs", "-o", tmp_path / "a"], cwd=tmp_path)
        ran([tmp_path / "a", file])
    made = Trace.load(file)
    assert (made.source, made.inputs.input_ids.tolist(), made.dtype) == ("Rust", [[3, 1, 4]], "float32")
    assert np.array_equal(made.taps["lm_head"], values["lm_head"])


# -- formats and layouts -----------------------------------------------------------------------------------------------


def test_a_trace_of_ours_and_a_plain_file_get_the_same_figures(
    folder: Path, traces: dict[str, Trace], tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        trace = traces[dtype]
        trace.save(tmp_path / "ours.safetensors")
        ours, theirs = (
            compare(folder, trace=file)[0]
            for file in (tmp_path / "ours.safetensors", plain(trace, tmp_path / "plain.safetensors"))
        )
        assert (ours.verdict, theirs.verdict, theirs.dtype) == ("holds", "holds", dtype)
        assert [(tap.name, tap.isolated) for tap in ours.taps] == [(tap.name, tap.isolated) for tap in theirs.taps]
        assert theirs.notes[-2] == f"judged as {dtype}, as its values are; --dtype says another"
        assert "which read" in ours.notes[-1]
        assert len(ours.notes) == 1
        assert diff(Trace.load(tmp_path / "ours.safetensors"), Trace.load(tmp_path / "plain.safetensors")).identical


def test_metadata_says_the_format_the_source_and_the_run(
    folder: Path, traces: dict[str, Trace], tmp_path: Path
) -> None:
    file = plain(traces["bfloat16"], tmp_path / "a.safetensors", source="mine", dtype="bf16", label="far positions")
    report = compare(folder, trace=file)[0]
    assert (report.candidate, report.dtype, report.inputs) == ("mine", "bfloat16", "far positions")
    assert not any(note.startswith("judged as") for note in report.notes)
    assert compare(folder, trace=file, dtype="float32")[0].dtype == "float32"


def test_a_stressed_run_is_judged_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    model = refllm.load(folder, dtype="float32")
    small = next(inputs for inputs in stressed(IDS) if inputs.embeds_scale == 0.01)
    trace = record(ReferenceCandidate(model), model, small)
    file = plain(trace, tmp_path / "a.safetensors", embeds_scale="0.01", label=small.label)
    assert compare(folder, trace=file)[0].verdict == "holds"
    assert first(compare(folder, trace=plain(trace, file))[0]) == "model.embed_tokens"


def test_functions_may_lay_out_their_values_as_programs_do(folder: Path) -> None:
    model = refllm.load(folder, dtype="float32")

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        """Token by token, the sequence first, fused and padded."""
        store, rows = model.new_cache(), []
        for at in range(ids.shape[1]):
            shown: Taps = {}
            out = model(
                input_ids=ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=store,
                use_cache=True,
                recorder=Kept(shown),
            )
            for layer in range(2):
                a = f"model.layers.{layer}.self_attn."
                tap(f"{a}qkv_proj", np.concatenate([shown.pop(f"{a}{p}_proj") for p in "qkv"], axis=-1).swapaxes(0, 1))
                tap(f"{a}context", shown.pop(f"{a}context").transpose(2, 0, 1, 3))
            rows.append(np.pad(out.logits, [(0, 0), (0, 0), (0, 7)]))
        return np.concatenate(rows, axis=1).swapaxes(0, 1)

    report = compare(folder, forward, input_ids=IDS)[0]
    assert [tap.verdict for tap in report.taps] == ["holds"] * len(report.taps)
    assert [tap.name.rpartition(".")[2] for tap in report.taps] == [
        *("q_proj", "k_proj", "v_proj", "context") * 2,
        "lm_head",
    ]
    assert report.notes[0] == "named up to 24 times in 1 call: the parts were put together"
    assert {"qkv_proj: split into q_proj, k_proj, v_proj", "context: shown as [S, B, heads, D]"} <= {*report.notes}


class Kept:
    def __init__(self, shown: Taps) -> None:
        self.shown = shown

    def wants(self, name: str) -> bool:
        return name.endswith(("q_proj", "k_proj", "v_proj", "context"))

    def record(self, name: str, value: np.ndarray) -> None:
        self.shown[name] = value


def test_what_is_named_too_often_hears_how_to_name_it(folder: Path) -> None:
    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        for _ in range(3):
            tap("model.norm", np.zeros((2, 16, 16), np.float32))
        return np.zeros((2, 24, 97), np.float32)

    words = (
        r"forward: model.norm was named 3 times in 1 call, with shapes \[2, 16, 16\], \[2, 16, 16\], \[2, 16, 16\]; "
        r"name it once in each, or part after part, \[B, part, n\], with 24 tokens in all"
    )
    with pytest.raises(InputError, match=words):
        compare(folder, forward, input_ids=IDS)


# -- whose order it is -------------------------------------------------------------------------------------------------

QK = ("q_proj", "k_proj", "q_rope", "k_rope")


def in_gguf_order(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith(QK):
        return value
    out = np.empty_like(value)
    out[..., gguf_order(value.shape[-1], 8)] = value
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_q_and_k_as_in_a_gguf_file_are_the_taps_order(
    folder: Path, traces: dict[str, Trace], dtype: str
) -> None:
    shown = changed(traces[dtype], in_gguf_order)
    report = compare(folder, trace=shown)[0]
    assert report.verdict == "holds", first(report)
    assert report.notes[0] == (
        "q_proj, k_proj, q_rope, k_rope: shown in the order of a GGUF file (dims i and i + D/2 of a head side by "
        "side), and put in order: it is the tap's, not the model's, since what reads it holds"
    )
    named = compare(folder, trace=shown, layout="gguf")[0]
    assert (named.verdict, len(named.notes)) == ("holds", 2)
    wrong = changed(shown, lambda name, x: x * 1.02 if name == "model.layers.1.mlp.up_proj" else x)
    assert first(compare(folder, trace=wrong)[0]) == "model.layers.1.mlp.up_proj"


def test_any_order_of_channels_is_found(folder: Path, traces: dict[str, Trace]) -> None:
    heads, rows = np.array([2, 0, 3, 1]), np.random.default_rng(0).permutation(24)

    def disorder(name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith("context"):
            return x[:, heads]
        return x[..., rows] if name.endswith(("gate_proj", "up_proj", "mlp.act")) else x

    report = compare(folder, trace=changed(traces["bfloat16"], disorder))[0]
    assert report.verdict == "holds", first(report)
    assert "context: shown in another order of whole heads (1, 3, 0, 2), and put in order" in report.notes[0]
    assert "gate_proj, up_proj, act: shown in another order of its 24 channels, and put in order" in report.notes[1]


def test_an_order_that_is_not_undone_is_the_models(folder: Path, tmp_path: Path) -> None:
    """Rows of a GGUF file, read as they lie, and turned in halves: the classic mistake."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = np.empty_like(weight)
            tensors[name][gguf_order(len(weight), 8)] = weight
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    model, wrong = (refllm.load(each, dtype="float32") for each in (folder, tmp_path))
    report = compare(folder, trace=record(ReferenceCandidate(wrong), model, Inputs(IDS)))[0]
    assert (report.verdict, first(report)) == ("fails", "model.layers.0.self_attn.q_proj")
    assert report.first_failure is not None
    assert "in the order of a GGUF file" in report.first_failure.named
    assert "the order is the model's" in report.first_failure.named
    assert not any("put in order" in note for note in report.notes)


# -- against a known-good run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_honest_runs_differ_by_sigma_and_a_bug_by_more(folder: Path, traces: dict[str, Trace], dtype: str) -> None:
    policy = {"float32": None, "bfloat16": "hf-eager"}[dtype]
    model = refllm.load(folder, dtype=dtype, policy=policy)
    other = record(ReferenceCandidate(model, "other"), model, Inputs(IDS))
    same, beside = (compare(folder, trace=trace, against=traces[dtype])[0] for trace in (traces[dtype], other))
    assert {tap.end_to_end.ratio for tap in same.taps} == {0.0}
    assert max(tap.isolated.ratio for tap in same.taps if tap.isolated) < 1e-6
    assert (same.verdict, beside.verdict) == ("holds", "holds")
    assert same.notes == [f"no value differs from {traces[dtype].source} by more than two honest runs do"]
    if dtype == "bfloat16":  # what rounds once in both is two roundings of one size
        isolated = {tap.name: tap.isolated for tap in beside.taps}
        for name in ("model.layers.1.mlp.up_proj", "lm_head"):
            assert isolated[name] is not None
            assert 0.9 < isolated[name].ratio < 1.1, (name, isolated[name].ratio)
    wrong = changed(other, lambda name, x: x * 1.02 if name == "model.layers.1.mlp.up_proj" else x)
    found = compare(folder, trace=wrong, against=traces[dtype])[0]
    assert (found.verdict, first(found)) == ("fails", "model.layers.1.mlp.up_proj")
    assert found.notes[-1].startswith("model.layers.1.mlp.up_proj is the first value that differs from ")


def test_a_known_good_run_need_not_be_right_by_the_page(folder: Path, traces: dict[str, Trace]) -> None:
    """A port with another activation, before and after a harmless and a harmful change."""
    model = refllm.load(folder, dtype="bfloat16", policy="fused")
    ours = refllm.load(folder, dtype="bfloat16", policy="hf-eager")
    for each in (model, ours):
        each.config.hidden_act = "gelu"
    good, harmless = (record(ReferenceCandidate(each), each, Inputs(IDS)) for each in (model, ours))
    ours.config.hidden_act = "silu"
    harmful = record(ReferenceCandidate(ours), ours, Inputs(IDS))
    for trace in (good, harmless, harmful):
        trace.config_hash = ""
    assert compare(folder, trace=good)[0].verdict == "fails"
    beside = compare(folder, trace=harmless, against=good)[0]
    assert beside.verdict == "holds", first(beside)
    acts = [tap for tap in beside.taps if tap.name.endswith("mlp.act")]
    assert [tap.isolated for tap in acts] == [None, None]
    assert first(compare(folder, trace=harmful, against=good)[0]) == "model.layers.0.mlp.act"


def test_a_candidate_is_run_on_the_tokens_of_the_known_good_run(folder: Path, traces: dict[str, Trace]) -> None:
    model, given = refllm.load(folder, dtype="float32"), []

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        given.append(ids.tolist())
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    report = compare(folder, forward, against=traces["float32"])[0]
    assert given == [IDS.tolist()]
    assert report.verdict == "incomplete"
    assert report.unseen == [f"36 values of {traces['float32'].source} were not shown, first model.embed_tokens"]
    logits = replace(traces["float32"], taps={"lm_head": traces["float32"].taps["lm_head"]})
    assert compare(folder, forward, against=logits)[0].verdict == "holds"
    with pytest.raises(InputError, match="different lengths"):
        compare(folder, forward, against=logits, input_ids=IDS[:, :5])
    with pytest.raises(InputError, match=r"is a run in float32, .* one in bfloat16: record it again"):
        compare(folder, trace=traces["bfloat16"], against=traces["float32"])
    with pytest.raises(InputError, match="leave out stress"):
        compare(folder, forward, against=logits, stress=True)


# -- the command line --------------------------------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: exit code, standard output, standard error."""

    def run(*command: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", *map(str, command)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


def test_exit_codes_of_a_recorded_run(folder: Path, traces: dict[str, Trace], tmp_path: Path, run: Run) -> None:
    file, js = plain(traces["bfloat16"], tmp_path / "a.safetensors"), tmp_path / "a.json"
    wrong = changed(traces["bfloat16"], lambda name, x: x * 1.1 if name == "model.norm" else x)
    bad = plain(wrong, tmp_path / "b.safetensors")
    for files, more, right in (((file,), [], 0), ((file, bad), [], 1), ((bad,), ["--against", file], 1)):
        command = ["check", folder, *[part for each in files for part in ("--trace", each)], *more, "--json", js]
        code, out, _ = run(*command)
        assert code == right
        told = json.loads(js.read_text())
        assert [r["first_failure"] for r in told["reports"]] == [
            None if each is file else "model.norm" for each in files
        ]
        assert ("model.norm is the first value that differs from a.safetensors" in " ".join(out.split())) == bool(more)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stress"], "so leave out --stress: other inputs cannot be run; record those that refllm trace"),
        (["--candidate", "numpy"], "so leave out --candidate: it was run already"),
        (["--time-limit", "3"], "leave out --time-limit: nothing is run"),
        (["--dtype", "float32", "--dtype", "bfloat16"], "a run that was recorded has one"),
        (["--layout", "NE"], "--layout: layout 'NE' is not known; use tokens, SBE"),
        (["--ids", "1,2,3"], "its input_ids are other tokens than those of the command"),
        (["--against", "no.safetensors"], "no.safetensors: no such file"),
    ],
)
def test_what_a_recorded_run_cannot_be_asked_is_said(
    folder: Path, traces: dict[str, Trace], tmp_path: Path, options: list[str], words: str, run: Run
) -> None:
    code, _, said = run("check", folder, "--trace", plain(traces["float32"], tmp_path / "a.safetensors"), *options)
    assert (code, said.count("\n")) == (2, 1)
    assert words in said


def test_inputs_for_another_machine_are_what_check_runs(folder: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "in.safetensors"
    code, out, _ = run("trace", folder, "--inputs-only", "--stress", "--ids", "3,1,4,1,5", "-o", file)
    assert (code, " ".join(out.split())) == (
        0,
        f"{file}: inputs of 7 runs, 37 values to record (docs/recording.md)",
    )
    tensors, metadata = read(file)
    wanted = [Inputs(np.array([[3, 1, 4, 1, 5]])), *stressed(np.array([[3, 1, 4, 1, 5]]))]
    described = json.loads(metadata["runs"])
    assert [each["label"] for each in described] == [inputs.label for inputs in wanted]
    for each, inputs in zip(described, wanted, strict=True):
        for name, right in (("input_ids", inputs.input_ids), ("attention_mask", inputs.mask)):
            assert np.array_equal(tensors[each["prefix"] + name], right)
        assert np.array_equal(tensors[each["prefix"] + "position_ids"], inputs.positions)
        assert (tuple(each["chunks"]), each["embeds_scale"]) == (inputs.chunks, inputs.embeds_scale)
    values = json.loads(metadata["values"])
    model = refllm.load(folder, dtype="float32")
    taps = record(ReferenceCandidate(model), model, Inputs(IDS)).taps
    sizes = {"B": IDS.shape[0], "S": IDS.shape[1]}
    assert {name: tuple(sizes.get(n, n) for n in shape) for name, shape in values.items()} == {
        name: value.shape for name, value in taps.items()
    }
    code, _, said = run("check", folder, "--trace", file)
    assert (code, "it holds inputs to run, and no values" in said) == (2, True)
    code, _, said = run("trace", folder, "--stress", "-o", file)
    assert (code, "--stress goes with --inputs-only" in said) == (2, True)


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


# -- files that are none -----------------------------------------------------------------------------------------------

LOGITS = {"lm_head": np.zeros((1, 3, 97), np.float32)}
ROW = {"input_ids": np.array([3, 1, 4])}
BAD: dict[str, tuple[Taps, dict[str, str], str]] = {
    "no tokens": (LOGITS, {}, "it has no input_ids"),
    "no values": (ROW, {}, "it holds no values"),
    "floats for tokens": (
        LOGITS | {"input_ids": np.zeros(3, np.float32)},
        {},
        "input_ids is float32; expected integers",
    ),
    "negative tokens": (LOGITS | {"input_ids": np.array([1, -2, 3])}, {}, "input_ids has -2, which is negative"),
    "tokens beyond": (LOGITS | {"input_ids": np.array([1, 97, 3])}, {}, "token id 97 is outside the vocabulary of 97"),
    "tokens of three axes": (LOGITS | {"input_ids": np.ones((1, 3, 1), int)}, {}, "expected [batch, sequence]"),
    "another mask": (
        LOGITS | ROW | {"attention_mask": np.ones(4, int)},
        {},
        "attention_mask: shape (1, 4) for input_ids",
    ),
    "all padding": (LOGITS | ROW | {"attention_mask": np.zeros(3, int)}, {}, "every token is padding"),
    "negative positions": (LOGITS | ROW | {"position_ids": np.array([0, 1, -1])}, {}, "position_ids has -1"),
    "integers for values": (
        ROW | {"lm_head": np.zeros((1, 3, 97), np.int32)},
        {},
        "lm_head is int32; expected float32",
    ),
    "another shape": (
        ROW | {"lm_head": np.zeros((4, 97), np.float32)},
        {},
        "lm_head has shape [4, 97], expected [1, 3, 97]",
    ),
    "another name": (
        ROW | {"model.layers.0.self_attn.qproj": np.zeros((3, 32), np.float32)},
        {},
        "did you mean 'model.layers.0.self_attn.q_proj' or",
    ),
    "no name at all": (ROW | {"Qcur-0": np.zeros((3, 32), np.float32)}, {}, "refllm trace CHECKPOINT --inputs-only"),
    "no dtype": (LOGITS | ROW, {"dtype": "nan"}, "its metadata says dtype 'nan'; use float32"),
    "a dtype of 8 bits": (LOGITS | ROW, {"dtype": "float8_e4m3fn"}, "use float32, bfloat16"),
    "64 bits": (LOGITS | ROW, {"dtype": "float64"}, "float64 cannot be checked: say --dtype with one of float32"),
    "no layout": (LOGITS | ROW, {"layout": "BSE"}, "its metadata: layout 'BSE' is not known; use tokens"),
    "no scale": (
        LOGITS | ROW,
        {"embeds_scale": "NaN"},
        "its metadata says embeds_scale 'NaN'; expected a finite number",
    ),
    "words for a scale": (LOGITS | ROW, {"embeds_scale": "small"}, "not readable as a trace"),
    "another model": (LOGITS | ROW, {"config_hash": "0" * 16}, "is not that of the checkpoint"),
    "half of ours": (LOGITS | ROW, {"format": "refllm trace 1"}, "not readable as a trace"),
    "NaN in ours": (
        LOGITS,
        {"format": "refllm trace 1", "about": '{"source": NaN, "dtype": NaN}', "details": "{}"},
        "trace",
    ),
}


def in_one_sentence(folder: Path, file: Path, words: str) -> None:
    with pytest.raises(RefllmError) as caught:
        compare(folder, trace=file)
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    assert len(said) < 500, said


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_trace_of_this_checkpoint_is_one_sentence(folder: Path, kind: str, tmp_path: Path) -> None:
    tensors, metadata, words = BAD[kind]
    save_file(tensors, tmp_path / "a.safetensors", metadata or None)
    in_one_sentence(folder, tmp_path / "a.safetensors", words)


def test_a_damaged_file_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(LOGITS | ROW, file)
    whole = file.read_bytes()
    huge = {"lm_head": {"dtype": "F32", "shape": [1, 2**40, 97], "data_offsets": [0, 97 * 2**42]}}
    metadata = {
        "__metadata__": {"dtype": float("nan")},
        "lm_head": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    for damaged in (
        b"",
        whole[:5],
        whole[:-4],
        whole + b"more",
        struct.pack("<Q", 2**60) + whole[8:],
        whole.replace(b"F32", b"F99"),
        whole.replace(b"[1,3,97]", b"[1,3,96]"),
        *(struct.pack("<Q", len(text := json.dumps(each).encode())) + text for each in (huge, metadata, [1], {"a": 1})),
    ):
        file.write_bytes(damaged)
        in_one_sentence(folder, file, "a.safetensors: ")


def test_a_nan_among_the_values_is_a_finding_and_no_error(folder: Path, traces: dict[str, Trace]) -> None:
    def broken(name: str, x: np.ndarray) -> np.ndarray:
        if name == "model.layers.1.mlp.act":
            x[0, 3, 2] = np.nan
        return x

    report = compare(folder, trace=changed(traces["float32"], broken))[0]
    assert (report.verdict, first(report)) == ("fails", "model.layers.1.mlp.act")
