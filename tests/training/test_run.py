"""A run learns, stops and goes on as if it had not, and refuses what it cannot go on from."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import refllm
from refllm import golden
from refllm.commands import cli
from refllm.errors import InputError
from refllm.inputs import to_numpy
from refllm.kernels.models.fast_model import FastModel
from refllm.storage import output_file
from refllm.strategies.small_models import build, model_class, small_config
from refllm.training.run import CURVE, STATE, Settings, TrainingRun

HELIUM = Path(__file__).parents[2] / "golden" / "checkpoints" / "helium-tiny"
IDS = np.random.default_rng(0).integers(4, 20, 20).repeat(2)[np.arange(600) % 40]
SMALL = Settings(batch=4, context=12, lr=1e-2)


def fresh(seed: int = 1) -> Any:
    config = small_config("arcee", hidden_size=16, intermediate_size=32, head_dim=4, tie_word_embeddings=True)
    return build(model_class("arcee"), config, seed, "float32")


def on(backend: str, seed: int = 1) -> Any:
    return fresh(seed) if backend == "numpy" else FastModel.of(fresh(seed), backend=backend, device="cpu")


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(backend: str, tmp_path: Path) -> None:
    """... to the bit, also after a stop between two savings; and what it leaves is the model that it had."""
    whole = TrainingRun(on(backend), IDS, tmp_path / "whole", SMALL)
    losses = [loss for _, loss in whole.steps(80)]
    for steps in (25, 43, 80):
        part = TrainingRun(on(backend, seed=7 if steps > 25 else 1), IDS, tmp_path / "parts", SMALL)
        for done, _ in part.steps(80, save_every=10):
            if done == steps:
                break
    assert part.losses == losses
    assert all((x == whole.tensors[name]).all() for name, x in part.tensors.items())
    assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:5])
    saved = dict(refllm.load(tmp_path / "parts", head="causal_lm").named_parameters())
    assert all((x == to_numpy(whole.tensors[name])).all() for name, x in saved.items())
    assert f"last {np.mean(losses[-1:]):.3f}" in (tmp_path / "parts" / CURVE).read_text()


def test_what_a_run_cannot_go_on_from_is_refused(tmp_path: Path) -> None:
    list(TrainingRun(fresh(), IDS, tmp_path, SMALL).steps(1))
    with pytest.raises(InputError, match="is of a run with backend=numpy, not torch; give another folder"):
        TrainingRun(on("torch"), IDS, tmp_path, SMALL)
    larger = build(model_class("llama"), small_config("llama"), 0, "float32")
    for model, ids, settings, said in (
        (fresh(), IDS, Settings(batch=4, context=12, lr=0.1), "is of a run with lr=0.01, not 0.1; give another folder"),
        (fresh(), IDS[1:], SMALL, "is of a run on another text; give another folder"),
        (larger, IDS, SMALL, "is of a run with another model; give another folder"),
        (fresh(), IDS[:5], SMALL, "the text has 5 tokens, fewer than one window of 12"),
    ):
        with pytest.raises(InputError, match=said):
            TrainingRun(model, ids, tmp_path, settings)
    narrow = build(model_class("llama"), small_config("llama"), 0, "bfloat16", "fused")
    with pytest.raises(InputError, match="this model is bfloat16, too coarse for small steps; load it as float32"):
        TrainingRun(narrow, IDS, tmp_path, SMALL)
    output_file.replace(tmp_path / STATE, b"PK\x03\x04 half of it")
    with pytest.raises(InputError, match="is no state of a training run; give another folder, or remove it"):
        TrainingRun(fresh(), IDS, tmp_path, SMALL)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    run = TrainingRun(fresh(), IDS, tmp_path, SMALL)
    list(run.steps(2))
    run.tensors["model.norm.weight"][0] = np.nan
    with pytest.raises(InputError, match=r"the loss of step 3 is nan; a smaller --lr than 0.01 may help"):
        list(run.steps(5))
    assert len(TrainingRun(fresh(), IDS, tmp_path, SMALL).losses) == 2


@pytest.mark.parametrize("name", ["helium-tiny", "stablelm-tiny-parallel"])
def test_numpy_and_torch_have_the_same_losses(name: str, tmp_path: Path) -> None:
    """The first steps of the run that README.md tells of, of whose losses all 500 are compared there."""
    losses: dict[str, Any] = {}
    for backend in ("numpy", "torch"):
        asked = ["train", str(HELIUM.parent / name), "--text", str(golden.CORPUS), "--output", str(tmp_path / backend)]
        shown = CliRunner().invoke(cli.app, [*asked, "--backend", backend, "--steps", "12", "--json", "-"])
        assert shown.exit_code == 0, shown.output
        losses[backend] = json.loads(shown.stdout)["losses"]
    assert losses["numpy"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["numpy"] != losses["torch"]  # sums in another order: it was not NumPy both times
    assert losses["numpy"][-1] < 0.9 * losses["numpy"][0]


def test_what_readme_trains_and_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of README.md about `learnt`, with two steps."""
    root = HELIUM.parents[2]
    lines = re.findall(r"^    refllm (.*\blearnt\b.*)$", (root / "README.md").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["train", "generate"]
    monkeypatch.chdir(root)
    for line, more in zip(lines, (["--steps", "2"], []), strict=True):
        words = [str(tmp_path / word) if word == "learnt" else word for word in shlex.split(line)]
        shown = CliRunner().invoke(cli.app, [*words, *more])
        assert shown.exit_code == 0, shown.output
        assert shown.output.strip()


def test_the_kernels_train_too(tmp_path: Path) -> None:
    """Interpreted without a GPU: the losses of a few steps are NumPy's, and the gradients are those of the kernels."""
    losses = {}
    for backend in ("numpy", "triton"):
        asked = ["train", str(HELIUM), "--text", str(golden.CORPUS), "--output", str(tmp_path / backend)]
        small = ["--steps", "3", "--batch", "1", "--context", "8", "--backend", backend, "--json", "-"]
        shown = CliRunner().invoke(cli.app, [*asked, *small])
        assert shown.exit_code == 0, shown.output
        losses[backend] = json.loads(shown.stdout)["losses"]
    assert losses["numpy"] == pytest.approx(losses["triton"], rel=1e-5)
    assert losses["numpy"] != losses["triton"]
    assert losses["numpy"][-1] != pytest.approx(losses["numpy"][0], rel=1e-2)


def test_a_backend_that_is_not_there_is_refused(tmp_path: Path) -> None:
    asked = ["train", str(HELIUM), "--text", str(golden.CORPUS), "--output", str(tmp_path / "out"), "--backend"]
    refused = CliRunner().invoke(cli.app, [*asked, "jax"])
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "--backend jax is not known: use numpy, torch or triton"
    refused = CliRunner().invoke(cli.app, [*asked, "torch", "--checkpointing"])
    assert "backend torch keeps every value; load the model with backend='numpy'" in str(refused.exception)


def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same again, and " * 40)
    asked = ["train", str(HELIUM), "--text", str(text), "--output", str(tmp_path / "out"), "--batch", "2"]
    first = CliRunner().invoke(cli.app, [*asked, "--context", "16", "--steps", "2", "--checkpointing"])
    again = CliRunner().invoke(cli.app, [*asked, "--context", "16", "--steps", "4", "--json", "-"])
    assert first.exit_code == again.exit_code == 0, (first.output, again.output)
    assert '"steps_before": 2' in again.output
    assert refllm.AutoTokenizer.from_pretrained(tmp_path / "out").encode("again")
    over = CliRunner().invoke(cli.app, ["train", str(HELIUM), "--text", str(text), "--output", str(HELIUM)])
    assert isinstance(over.exception, InputError)
    assert "--output is CHECKPOINT itself" in str(over.exception)
