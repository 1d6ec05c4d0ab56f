"""OpenVINO against the pages: models that it converts from Transformers', and bugs planted in them before."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from exported import BUGS, model_and_inputs, planted, to_onnx, to_openvino
from harness import LLAMA, Bug, Checks, must_be_named, must_hold

from refllm import golden
from refllm.check import compare
from refllm.check.stacks import Opening, wrap
from refllm.errors import InputError

CHECKS = Checks(
    "openvino", ("helium-tiny", LLAMA, "stablelm-tiny-parallel", "stablelm-tiny-sequential", "arcee-tiny"), ("float32",)
)
IDS = np.random.default_rng(0).integers(0, 600, size=48)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("openvino") / "llama.xml"
    to_openvino(model_and_inputs(golden.path(LLAMA)), file)
    return file


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    to_openvino(model_and_inputs(golden.path(checkpoint), attention="eager"), file)
    reports = must_hold(CHECKS, checkpoint, dtype, f"openvino:{file}", stress=True, isolate=False)
    assert len(reports) == 5 + checkpoint.startswith(("llama", "stablelm"))  # what is fed there by a norm's own rule


def test_rows_that_see_no_key_become_nan_in_fused_attention(llama: Path) -> None:
    """And from there they reach the others in the next layer. If this fails, they do not any more: the page says so."""
    reports = compare(golden.path(LLAMA), f"openvino:{llama}", stress=True, isolate=False)
    failing = {report.inputs: report.first_failure for report in reports if report.first_failure is not None}
    assert list(failing) == ["rows padded differently"]
    assert failing["rows padded differently"].name == "model.layers.1.self_attn.context"


def test_a_right_onnx_file_holds(tmp_path: Path) -> None:
    to_onnx(model_and_inputs(golden.path(LLAMA)), tmp_path / "model.onnx")
    reports = compare(golden.path(LLAMA), f"openvino:{tmp_path / 'model.onnx'}", input_ids=IDS, isolate=False)
    assert [report.verdict for report in reports] == ["holds"]
    assert len(reports[0].taps) == 48


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_named(bug: Bug, dtype: str, tmp_path: Path) -> None:
    must_be_named(
        CHECKS, bug, dtype, f"openvino:{planted(to_openvino, bug, dtype, tmp_path / 'bug.xml')}", isolate=False
    )


def test_weights_in_float16_are_said(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "narrow.xml"
    openvino.save_model(openvino.Core().read_model(llama), file)
    report = compare(golden.path(LLAMA), f"openvino:{file}", input_ids=IDS, isolate=False)[0]
    assert report.verdict == "fails"
    assert report.candidate.endswith("narrow.xml (weights in float16)")


def test_a_live_model_is_a_candidate_and_a_compiled_one_is_not(llama: Path) -> None:
    model = openvino.Core().read_model(llama)
    candidate: Any = wrap(model, Opening("", golden.path(LLAMA)))
    assert len(candidate.values) == 48
    assert candidate.takes == ("mask", "positions", "batch", "embeddings")
    assert "the same to the bit" in candidate.details["graph"]
    with pytest.raises(InputError, match=r"a CompiledModel cannot be checked: give the openvino\.Model, or its file"):
        wrap(openvino.compile_model(model, "CPU"), Opening("", golden.path(LLAMA)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_format_is_refused(dtype: str, llama: Path) -> None:
    with pytest.raises(InputError, match=f"openvino computes in float32 on a CPU, not in {dtype}"):
        compare(golden.path(LLAMA), f"openvino:{llama}", dtype=dtype, isolate=False)


@pytest.mark.parametrize("content", [None, "<html></html>", "not a model"])
def test_what_is_no_model_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        InputError, match="no such file" if content is None else "OpenVINO does not read it: "
    ) as refused:
        compare(golden.path(LLAMA), f"openvino:{file}", isolate=False)
    assert "\n" not in str(refused.value)
