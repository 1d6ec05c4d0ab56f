"""The command line: results on standard output, one sentence for a mistake, exit codes that mean what they say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from refllm.commands import cli
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.text.token_input import parse_ids, read_tokens

HELIUM = {
    "model_type": "helium",
    "architectures": ["HeliumForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Helium with random weights and no tokenizer."""
    from refllm import HeliumConfig, HeliumForCausalLM

    folder = tmp_path_factory.mktemp("helium")
    HeliumForCausalLM.from_config(HeliumConfig(**HELIUM), seed=3).save_pretrained(folder, dtype="float32")
    return folder


def one_sentence(code: int, out: str, err: str) -> str:
    """The complaint, after checking that it is exit code 2, nothing on standard output, and one line."""
    assert code == 2, (code, out, err)
    assert out == ""
    lines = [line for line in err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("refllm: ")
    assert "Traceback" not in err
    return lines[0]


# ------------------------------------------------------------------ mistakes


def test_every_command_has_help(refllm: Run) -> None:
    for command in (["check"], ["generate"], ["score"], ["info"], ["bench"], ["bench", "cpu"], []):
        code, out, _ = refllm(*command, "--help")
        assert code == 0
        assert "Usage" in out


def test_no_arguments_shows_the_help(refllm: Run) -> None:
    assert refllm()[0] == 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown command": (["chekc"], "chekc"),
    "unknown option": (["info", "{folder}", "--tensor"], "--tensor"),
    "no checkpoint": (["score", "--prompt", "a"], "CHECKPOINT"),
    "not a number": (["generate", "{folder}", "--ids", "1", "--max-new-tokens", "many"], "--max-new-tokens"),
    "no such folder": (["info", "/nowhere/at/all"], "/nowhere/at/all"),
    "check of no folder": (["check", "/nowhere/at/all"], "/nowhere/at/all"),
    "no tokens given": (["score", "{folder}"], "--prompt"),
    "no tokens to continue": (["generate", "{folder}"], "--prompt"),
    "two sources": (["score", "{folder}", "--ids", "1", "--prompt", "a"], "exclude each other"),
    "file and ids": (["score", "{folder}", "--ids", "1", "--file", "x"], "--file excludes"),
    "empty ids": (["generate", "{folder}", "--ids", ""], "no tokens"),
    "words for ids": (["generate", "{folder}", "--ids", "1,two"], "'two'"),
    "id too large": (["generate", "{folder}", "--ids", "1,40"], "0..39"),
    "negative id": (["check", "{folder}", "--ids", "-1"], "0..39"),
    "missing ids file": (["score", "{folder}", "--ids-file", "/nowhere/ids"], "/nowhere/ids"),
    "one token to score": (["score", "{folder}", "--ids", "1"], "at least 2"),
    "stride as long as the context": (
        ["score", "{folder}", "--ids", "1,2", "--context", "4", "--stride", "4"],
        "--stride",
    ),
    "unknown dtype": (["check", "{folder}", "--dtype", "int8"], "int8"),
    "unknown dtype to generate": (["generate", "{folder}", "--ids", "1", "--dtype", "int8"], "int8"),
    "unknown policy": (["check", "{folder}", "--policy", "lucky"], "lucky"),
    "unknown candidate": (["check", "{folder}", "--candidate", "mine"], "mine"),
    "unknown attention": (["check", "{folder}", "--attn", "flash"], "flash"),
    "prompt without a tokenizer": (["generate", "{folder}", "--prompt", "hello"], "tokenizer"),
    "chat without a prompt": (["generate", "{folder}", "--ids", "1", "--chat"], "--chat"),
    "stop without a tokenizer": (["generate", "{folder}", "--ids", "1", "--stop", "x"], "--stop"),
    "unknown shape": (["bench", "cpu", "--shape", "huge"], "huge"),
    "no threads": (["bench", "cpu", "--threads", "0"], "--threads"),
    "json into nowhere": (["info", "{folder}", "--json", "/nowhere/at/all/x.json"], "/nowhere/at/all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_sentence_and_exit_code_2(mistake: str, refllm: Run, checkpoint: Path) -> None:
    arguments, named = MISTAKES[mistake]
    arguments = [argument.format(folder=checkpoint) for argument in arguments]
    if mistake == "json into nowhere":
        code, _, err = refllm(*arguments)
        assert (code, err.count("\n")) == (2, 1)
    else:
        err = one_sentence(*refllm(*arguments))
    assert named in err


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-7]),
    "absurd header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "unknown family": lambda f: (f / "config.json").write_text(json.dumps(HELIUM | {"model_type": "gpt2"})),
    "heads do not divide": lambda f: (f / "config.json").write_text(json.dumps(HELIUM | {"num_key_value_heads": 3})),
    "pickled weights": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
}


@pytest.mark.parametrize("command", ["generate", "score", "check"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_one_sentence(
    damage: str, command: str, refllm: Run, checkpoint: Path, tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    DAMAGE[damage](tmp_path)
    one_sentence(*refllm(command, tmp_path, "--ids", "1,2,3"))


def test_warning_is_one_line_without_source_code(refllm: Run, checkpoint: Path) -> None:
    code, _, err = refllm("score", checkpoint, "--ids", ",".join("1" * 70), "--context", 70)
    assert code == 0
    assert all(line.startswith("refllm: warning: ") for line in err.splitlines())
    assert "max_position_embeddings" in err


def test_reader_that_goes_away_is_no_error(checkpoint: Path) -> None:
    command = f"{sys.executable} -m refllm.commands.cli info {checkpoint} --tensors | true"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# ------------------------------------------------------------------ token input


@given(st.lists(st.integers(0, 10**6)), st.sampled_from([",", " ", ", ", "\n", "\t,"]))
def test_ids_are_read_in_every_spelling(ids: list[int], separator: str) -> None:
    assert parse_ids(separator.join(map(str, ids)), "--ids") == ids
    assert parse_ids(json.dumps(ids), "--ids") == ids


@given(st.text(max_size=30))
def test_no_text_breaks_the_reader_of_ids(text: str) -> None:
    try:
        numbers = parse_ids(text, "--ids")
    except InputError:
        return
    assert all(type(number) is int for number in numbers)


@pytest.mark.parametrize("text", ["[1, 2.0]", "[true]", "[[1]]", "[1", '["1"]', "[" * 100000, "1.5", "1e3", "0x10"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_ids(text, "F")


def test_ids_file_and_ids_give_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("[3, 1, 4]\n")
    from_file = read_tokens(tmp_path, 5, prompt=None, ids=None, ids_file=tmp_path / "ids")
    given_ids = read_tokens(tmp_path, 5, prompt=None, ids="3 1,4", ids_file=None)
    assert from_file is not None
    assert given_ids is not None
    np.testing.assert_array_equal(from_file, given_ids)
    assert from_file.shape == (1, 3)


def test_binary_ids_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"\xff\xfe1")
    with pytest.raises(InputError, match="UTF-8"):
        read_tokens(tmp_path, 5, prompt=None, ids=None, ids_file=tmp_path / "ids")


# ------------------------------------------------------------------ results


def test_info_tells_parameters_and_tensors(refllm: Run, checkpoint: Path) -> None:
    code, out, err = refllm("info", checkpoint, "--tensors")
    assert (code, err) == (0, "")
    assert "model.layers.1.self_attn.k_proj.weight" in out
    assert "all as expected" in out
    code, out, _ = refllm("info", checkpoint, "--json", "-")
    values = json.loads(out)
    assert values["parameters"] == sum(int(np.prod(shape)) for shape in values["tensors"].values())
    assert values["config"]["model_type"] == AutoConfig.from_pretrained(checkpoint).model_type == "helium"


def test_info_of_an_incomplete_checkpoint_is_a_finding(refllm: Run, checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(HELIUM | {"mlp_bias": True}))
    code, out, _ = refllm("info", tmp_path)
    assert code == 1
    assert "missing: model.layers.0.mlp.gate_proj.bias" in out


def test_score_json_is_the_table_in_full(refllm: Run, checkpoint: Path, tmp_path: Path) -> None:
    ids = "3,1,4,1,5,9,2,6"
    code, out, err = refllm("score", checkpoint, "--ids", ids, "--json", tmp_path / "score.json")
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "score.json").read_text())
    assert len(values["nll"]) == 7
    assert values["log_likelihood"] == pytest.approx(-sum(values["nll"]))
    assert f"{values['perplexity']:.4f}" in out


def test_score_is_the_loss_of_the_model(refllm: Run, checkpoint: Path) -> None:
    import refllm as package

    ids = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    loss = package.load(checkpoint, dtype="float64")(input_ids=ids, labels=ids).loss
    _, out, _ = refllm("score", checkpoint, "--ids", "3 1 4 1 5 9 2 6", "--dtype", "float64", "--json", "-")
    assert json.loads(out)["mean_nll"] == pytest.approx(float(loss), rel=1e-12)


def test_generate_prints_what_json_holds_and_beams_print_at_the_end(
    refllm: Run, checkpoint: Path, tmp_path: Path
) -> None:
    for options in ([], ["--num-beams", "3"], ["--temperature", "0.7", "--seed", "5"]):
        code, out, err = refllm(
            "generate", checkpoint, "--ids", "3,1", "--max-new-tokens", "6", *options, "--json", tmp_path / "out.json"
        )
        assert (code, err) == (0, "")
        values = json.loads((tmp_path / "out.json").read_text())
        assert [int(word) for word in out.split()] == values["new_ids"]
        assert 1 <= len(values["new_ids"]) <= 6


def test_generate_prints_text_piece_by_piece_on_one_line(refllm: Run, tmp_path: Path) -> None:
    from refllm import golden

    command = ["generate", golden.path("llama-tiny"), "--ids", "3,1", "--max-new-tokens", "6", "--greedy"]
    _, out, _ = refllm(*command, "--json", tmp_path / "out.json")
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert len(text) > 2
    assert out == f"{text}\n"


def test_generate_continues_a_chat_as_its_template_has_it(refllm: Run, tmp_path: Path) -> None:
    from refllm import AutoTokenizer, golden

    shutil.copytree(golden.path("llama-tiny"), folder := tmp_path / "chatty")
    template = "{{ messages[0].role }}: {{ messages[0].content }}{{ '!' if add_generation_prompt }}"
    (folder / "chat_template.jinja").write_text(template)
    command = ["generate", folder, "--chat", "--prompt", "good day", "--max-new-tokens", "1"]
    code, _, err = refllm(*command, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    wanted = AutoTokenizer.from_pretrained(folder)("user: good day!", add_special_tokens=False)["input_ids"]
    assert json.loads((tmp_path / "out.json").read_text())["prompt_ids"] == list(wanted)


def test_trace_and_diff_tell_what_they_hold(refllm: Run, checkpoint: Path, tmp_path: Path) -> None:
    from refllm.check.trace import Trace

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for file, dtype in ((one, "float32"), (two, "bfloat16")):
        command = ["trace", checkpoint, "-o", file, "--candidate", "numpy", "--ids", "3,1,4", "--dtype", dtype]
        code, out, _ = refllm(*command)
        assert code == 0
        made = Trace.load(file)
        assert made.source.startswith(f"refllm {dtype}")
        assert " ".join(out.split()).endswith(f": {len(made.taps)} values of {made.source}, 3 tokens"), out
    code, out, _ = refllm("diff", one, one)
    assert (code, "identical, bit for bit" in out) == (0, True)
    code, out, _ = refllm("diff", one, two, "--json", tmp_path / "diff.json")
    assert (code, "first difference: " in out) == (1, True)
    told = json.loads((tmp_path / "diff.json").read_text())
    assert not told["identical"]
    assert f"first difference: {told['first_difference']} at [" in out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InputError("so it is"), 2, "refllm: so it is\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "refllm: a.json: No such file\n"),
        (OSError("first line\nsecond"), 2, "refllm: first line\n"),
        (OSError(28, "No space left"), 2, "refllm: No space left\n"),
        (BrokenPipeError(), 0, ""),
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError(name="no_such_module"), None, ""),
        (ZeroDivisionError(), None, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_what_a_command_raises_is_a_sentence_and_an_exit_code(
    raised: BaseException, code: int | None, said: str, refllm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    if code is None:
        with pytest.raises(type(raised)):
            cli._run()
    else:
        assert refllm("info") == (code, "", said)


def test_no_switch_is_on_by_itself() -> None:
    import typer

    def switches(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for inner in getattr(command, "commands", {}):
            yield from switches(command.commands[inner], f"{name} {inner}")
        yield from ((f"{name} {p.opts[0]}", p.default) for p in command.params if getattr(p, "is_flag", False))

    found = dict(switches(typer.main.get_command(cli.app), "refllm"))
    assert len(found) > 10
    assert {name for name, default in found.items() if default not in (False, None)} == set()


def test_seed_repeats_the_sample(refllm: Run, checkpoint: Path) -> None:
    command = ["generate", checkpoint, "--ids", "3,1", "--max-new-tokens", "12", "--seed"]
    assert refllm(*command, "7")[1] == refllm(*command, "7")[1]
    assert len({refllm(*command, str(seed))[1] for seed in range(5)}) > 1


def test_low_memory_generates_the_same(refllm: Run, checkpoint: Path) -> None:
    command = ["generate", checkpoint, "--ids", "3,1", "--greedy"]
    assert refllm(*command)[1] == refllm(*command, "--low-memory")[1]


def test_check_holds_and_says_so_in_json(warm_python: None, refllm: Run, checkpoint: Path, tmp_path: Path) -> None:
    ids = ",".join(str((7 * i) % 40) for i in range(60))
    code, out, err = refllm("check", checkpoint, "--ids", ids, "--json", tmp_path / "check.json")
    assert (code, err) == (0, ""), out
    values = json.loads((tmp_path / "check.json").read_text())
    assert (values["schema"], values["verdict"]) == (2, "holds")
    assert [report["dtype"] for report in values["reports"]] == ["float32", "bfloat16"]
    assert "2 checked: 2 holds" in out


@pytest.mark.parametrize(
    ("command", "advice"), [("score", "input or --low-memory"), ("check", "input or --layers A:B or --last N")]
)
def test_advice_names_no_option_that_the_command_lacks(
    command: str, advice: str, refllm: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refllm.check import run
    from refllm.commands import score

    def all_gone(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(run, "folders_to_check", all_gone)
    monkeypatch.setattr(score, "score_source", all_gone)
    code, _, err = refllm(command, checkpoint, "--ids", "1,2")
    assert (code, err) == (2, f"refllm: not enough memory: try a smaller {advice}\n")


# ------------------------------------------------------------------ what the README shows

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


# Not the benchmark, and not the lines in which CHECKPOINT, COURSE or FILE.PY stands for the reader's own; those about
# what is learnt are run in tests/training, with fewer steps.
@pytest.mark.parametrize(
    "line", re.findall(r"^    refllm ((?!bench|.*CHECKPOINT|.*COURSE|.*FILE|.*\blearnt\b).*)$", README, re.MULTILINE)
)
def test_command_of_the_readme_runs(line: str, warm_python: None, refllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    code, out, _ = refllm(*shlex.split(line))
    assert code == 0
    assert out.strip()


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from refllm import golden

    exec(_block("AutoTokenizer"), {"folder": golden.path("llama-tiny")})
    assert "The residual stream" in capsys.readouterr().out


def test_kernel_test_of_the_readme_tells_a_right_kernel_from_a_wrong_one() -> None:
    from refllm.kernels import plain

    names: dict[str, Any] = {"my_rms_norm": plain.rms_norm}
    exec(_block("def test_my_rms_norm"), names)
    names["test_my_rms_norm"]()
    names["my_rms_norm"] = lambda x, weight, eps: plain.rms_norm(x, weight, 1e-1)
    with pytest.raises(AssertionError, match="sigma off"):
        names["test_my_rms_norm"]()


def test_contract_of_one_call_in_the_readme_holds_for_a_right_kernel_alone() -> None:
    from refllm import kernels
    from refllm.kernels.verify import ContractBrokenError

    names: dict[str, Any] = {"my_rms_norm": kernels.rms_norm}
    exec(_block("assert_meets_contract"), names)
    names["my_rms_norm"] = lambda x, weight, eps: kernels.rms_norm(x, weight, 1e-1)
    with pytest.raises(ContractBrokenError, match="times that of the contract"):
        exec(_block("assert_meets_contract"), names)


def test_fast_model_of_the_readme_runs() -> None:
    from refllm import golden

    names: dict[str, Any] = {"folder": golden.path("llama-tiny"), "ids": np.arange(4, 9)[None]}
    exec(_block('backend="torch"'), names)
    assert 5 < names["tokens"].shape[1] <= 25


def test_patch_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from refllm import golden

    exec(_block("kernels.patch"), {"folder": golden.path("llama-tiny"), "ids": np.arange(4, 9)[None]})
    shown = capsys.readouterr().out
    assert "swapped" in shown
    assert "torch.Size([1, 5," in shown


def _block(contents: str) -> str:
    """The first piece of Python in the README that has this in it."""
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if contents in code)


def test_the_help_says_what_it_is_and_lists_every_command() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert "The math of Helium, Llama, StableLM and Arcee in NumPy" in shown
    assert [c for c in ("check", "trace", "diff", "generate", "score", "info", "audit") if c not in shown] == []


def test_port_shown_in_the_readme_is_checked(tmp_path: Path) -> None:
    """The forward pass and the test of the README, around a model of somebody else's that is right."""
    from refllm import golden
    from refllm.check import assert_matches

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    forward, test = (next(code for code in blocks if name in code) for name in ("def forward", "def test_my_port"))
    names: dict[str, Any] = {}
    exec(forward, names)
    exec(test.replace('"path/to/checkpoint"', "folder"), names)
    folder = golden.path("llama-tiny")

    ran = []

    def my_forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        ran.append(ids.shape)
        model = _port(checkpoint, ids)
        names.update(embed=model.embed, layers=model.layers, norm=model.norm, lm_head=model.lm_head)
        return names["forward"](checkpoint, ids, mask, positions, tap)

    names.update(folder=folder, my_forward=my_forward, assert_matches=partial(assert_matches, policy="hf-eager"))
    names["test_my_port"]()
    assert ran


def _port(checkpoint: str, ids: Any) -> Any:
    """Transformers taken apart into the four things that the README's forward pass calls."""
    import torch
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).requires_grad_(requires_grad=False)
    backbone, length = whole.model, ids.shape[1]
    rotary = backbone.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    mask = torch.full((length, length), torch.finfo(torch.float32).min, dtype=torch.float32).triu(1)[None, None]
    layers = [partial(layer, attention_mask=mask, position_embeddings=rotary) for layer in backbone.layers]
    embed = lambda given: backbone.embed_tokens(torch.from_numpy(given))  # noqa: E731
    return SimpleNamespace(embed=embed, layers=layers, norm=backbone.norm, lm_head=whole.lm_head)


def test_block_shown_in_the_readme_is_the_page() -> None:
    """Line by line, but for the taps that it says it leaves out."""

    def bare(text: str) -> list[str]:
        text = re.sub(r"op\.tap\(\"[^\"]*\", (.*)\)$", r"\1", text, flags=re.MULTILINE)
        return [line.strip() for line in text.splitlines() if line.strip() and "op.tap" not in line]

    shown = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "# Attention" in code)
    page = (Path(__file__).resolve().parents[2] / "refllm" / "models" / "helium.py").read_text()
    start = bare(page).index("# Attention")
    assert bare(page)[start : start + len(bare(shown))] == bare(shown)
