"""CTranslate2 against the pages: models that its converter makes, whose logits are all that can be seen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
from harness import LLAMA, Bug, Checks, must_be_named, must_hold
from safetensors.numpy import load_file, save_file

from refllm import golden
from refllm.check import compare
from refllm.check.inputs import Inputs
from refllm.check.stacks import Opening, wrap
from refllm.check.taps import cannot_run
from refllm.errors import InputError

CHECKS = Checks("ctranslate2", (LLAMA,), ("float32",))
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def unscaled(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """The converter loses the scaling of the rotary frequencies, so a right model is one that has none."""
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def changed(folder: Path, *changes: Change) -> Path:
    """A checkpoint like llama-tiny, with another config or other tensors."""
    shutil.copytree(golden.path(LLAMA), folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    for change in changes:
        change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def converted(checkpoint: Path, folder: Path) -> Path:
    ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(str(folder))
    return folder


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and what the converter makes of it."""
    root = tmp_path_factory.mktemp("ctranslate2")
    checkpoint = changed(root / "checkpoint", unscaled)
    return checkpoint, converted(checkpoint, root / "converted")


def test_right_logits_hold_where_every_token_is_run(right: tuple[Path, Path]) -> None:
    checkpoint, folder = right
    reports = must_hold(
        CHECKS, LLAMA, "float32", f"ctranslate2:{folder}", folder=checkpoint, stress=True, isolate=False
    )
    assert [report.inputs for report in reports] == ["tokens", "rows padded differently", "every token id"]
    assert "far positions (it takes no positions)" in " ".join(reports[0].notes)


def test_the_scaling_that_its_converter_loses_is_named(tmp_path: Path) -> None:
    """No hint: the checkpoint as it is, converted by its own converter, and logits alone."""
    folder = converted(golden.path(LLAMA), tmp_path / "converted")
    ids = np.random.default_rng(1).integers(3, 640, 64)
    (report,) = compare(golden.path(LLAMA), f"ctranslate2:{folder}", isolate=False, explain=True, input_ids=ids)
    assert report.explanation is not None
    assert report.explanation.kind == "explained"
    assert [cause.name for cause in report.explanation.causes] == ["rope scaling ignored"]


def test_right_logits_alone_are_incomplete(right: tuple[Path, Path]) -> None:
    checkpoint, folder = right
    report = compare(checkpoint, f"ctranslate2:{folder}", isolate=False)[0]
    assert (report.verdict, report.first_failure) == ("incomplete", None)
    (unseen,) = report.unseen
    assert unseen.endswith(
        "rows of the embedding were never read: it does not show model.embed_tokens; show it, or stress its inputs"
    )


def test_only_rows_of_different_lengths_are_taken(right: tuple[Path, Path]) -> None:
    checkpoint, folder = right
    candidate = wrap(ctranslate2.Generator(str(folder), compute_type="float32"), Opening("", checkpoint))
    assert candidate is not None
    ids, mask = np.arange(6).reshape(1, 6), np.array([[0, 0, 1, 1, 1, 0]])
    counted = np.array([[9, 9, 0, 1, 2, 7]])
    assert cannot_run(candidate, Inputs(ids, mask, counted)) == ""
    assert cannot_run(candidate, Inputs(ids, mask, counted + 1)) == "it takes no mask"
    assert cannot_run(candidate, Inputs(ids, None, np.arange(6)[None] + 1)) == "it takes no positions"
    found: dict[str, np.ndarray] = {}
    candidate.run(Inputs(ids, mask, counted), found.__setitem__)
    alone: dict[str, np.ndarray] = {}
    candidate.run(Inputs(ids[:, 2:5]), alone.__setitem__)
    np.testing.assert_array_equal(found["lm_head"][:, 2:5], alone["lm_head"])


# ---------------------------------------------------------------------------------------------------------------- bugs


def _in_heads(weight: np.ndarray, parts: int = 1) -> np.ndarray:
    """[heads * 16, E] -> [heads, parts, 16 / parts, E]."""
    return weight.reshape(-1, parts, 16 // parts, weight.shape[-1])


def _tensor(name: str, change: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Change:
    def plant(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors).reshape(tensors[name].shape))

    return plant


def _config(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def _swapped(one: str, other: str) -> Change:
    def plant(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return plant


LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"
NORM = f"{LAYER}.input_layernorm.weight"

BUGS = (
    Bug("the scaling of the frequencies is lost", None, "layers.1.self_attn.q_rope"),
    Bug(
        "theta is 1e6",
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "layers.1.self_attn.q_rope",
    ),
    Bug("eps 1e-3", _config(rms_norm_eps=1e-3), "layers.1.input_layernorm"),
    Bug("norm weight plus one", _tensor(NORM, lambda t: t[NORM] + 1), "layers.1.input_layernorm"),
    Bug("gate and up swapped", _swapped(GATE, UP), "layers.1.mlp.gate_proj"),
    Bug("rows of q in pairs", _tensor(Q, lambda t: _in_heads(t[Q], 2).swapaxes(1, 2)), "layers.1.self_attn.q_proj"),
    Bug("heads of k in another order", _tensor(K, lambda t: _in_heads(t[K])[::-1]), "layers.1.self_attn.k_proj"),
    Bug("v made with the weight of k", _tensor(V, lambda t: t[K]), "layers.1.self_attn.v_proj"),
    Bug("o_proj transposed", _tensor(OUT, lambda t: t[OUT].T), "layers.1.self_attn.o_proj"),
    Bug("last norm of ones", _tensor("model.norm.weight", lambda t: np.ones(96, np.float32)), "norm"),
)


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_found(bug: Bug, dtype: str, right: tuple[Path, Path], tmp_path: Path) -> None:
    """Somewhere in the model: nothing but the logits is seen."""
    wrong = golden.path(LLAMA) if bug.plant is None else changed(tmp_path / "checkpoint", unscaled, bug.plant)
    folder = converted(wrong, tmp_path / "converted")
    judged_by = golden.path(LLAMA) if bug.plant is None else right[0]
    report = must_be_named(CHECKS, bug, dtype, f"ctranslate2:{folder}", folder=judged_by, isolate=False)
    assert report.first_failure is not None
    assert report.first_failure.name == "lm_head"


# ------------------------------------------------------------------------------------------------------------- refused


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for content, says in ((None, "has no model.bin: expected a folder that"), (b"no model", "does not load it: ")):
        if content is not None:
            (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(InputError, match=says):
            compare(golden.path(LLAMA), f"ctranslate2:{tmp_path}", isolate=False)


def test_other_formats_are_refused(right: tuple[Path, Path]) -> None:
    checkpoint, folder = right
    with pytest.raises(InputError, match="ctranslate2 computes in float32 on a CPU, not in bfloat16"):
        compare(checkpoint, f"ctranslate2:{folder}", dtype="bfloat16", isolate=False)
    with pytest.raises(
        InputError, match=r"int8_float32 cannot be checked: make a ctranslate2\.Generator with compute_type"
    ):
        compare(checkpoint, ctranslate2.Generator(str(folder), compute_type="int8"))
