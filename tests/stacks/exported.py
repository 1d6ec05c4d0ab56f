"""Models of Transformers in files of other runtimes, made by the lines of docs/exporting.md, with and without a bug."""

import re
from pathlib import Path
from typing import Any

from harness import Bug

from refllm import golden
from refllm.mutants.models import Mutant, catalogue

DOCS = Path(__file__).resolve().parents[2] / "docs/exporting.md"
MUTANTS = {mutant.name: mutant for mutant in catalogue()}
LAYER = 1
"""Where bugs are planted."""


def lines(heading: str) -> str:
    """The Python lines below a heading of the page."""
    text = DOCS.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    return str(code[0])


def model_and_inputs(folder: Path, dtype: str = "float32", attention: str = "") -> dict[str, Any]:
    """What the first lines of the page make: `model` and `inputs` among it. attention: "" for what is the default."""
    loading = lines("ONNX").replace('dtype="float32"', f'dtype="{dtype}"')
    scope: dict[str, Any] = {"folder": str(folder)}
    exec(loading[: loading.index("torch.onnx.export")], scope)
    if attention:
        scope["model"].set_attn_implementation(attention)
    return scope


def to_onnx(scope: dict[str, Any], file: Path) -> None:
    """The last line."""
    code = lines("ONNX")
    exec(code[code.index("torch.onnx.export") :], scope | {"file": str(file)})


def to_openvino(scope: dict[str, Any], file: Path) -> None:
    """The lines of OpenVINO."""
    exec(lines("OpenVINO"), scope | {"file": str(file)})


def planted(write: Any, bug: Bug, dtype: str, file: Path) -> Path:
    """A file with a bug of the catalogue in it. write: `to_onnx` or `to_openvino`."""
    scope = model_and_inputs(golden.path(bug.checkpoint), dtype, "eager")
    with bug.plant.planted(scope["model"], LAYER):
        write(scope, file)
    return file


def bug(name: str, checkpoint: str = "llama-tiny", dtype: str = "") -> Bug:
    """A bug of the catalogue."""
    mutant: Mutant = MUTANTS[name]
    return Bug(name, mutant, mutant.reported_at(LAYER), checkpoint, dtype)


BUGS = (
    bug("wrong eps", "helium-tiny", "float32"),
    bug("LayerNorm for RMSNorm"),
    bug("norm weight plus one", "stablelm-tiny-sequential"),
    bug("the other pairing of dims"),
    bug("theta times 10", "arcee-tiny"),
    bug("scale missing", "helium-tiny"),
    bug("mask one too wide"),
    bug("key and value heads tiled instead of repeated"),
    bug("gate and up swapped", "stablelm-tiny-parallel"),
    bug("gelu for silu"),
    bug("square without relu", "arcee-tiny"),
    bug("residual from the normed value"),
    bug("weight of q_proj used for k"),
    bug("tied weight ignored"),
    bug("last norm skipped", "stablelm-tiny-parallel"),
    bug("diagonal masked"),
    bug("v_proj bias dropped", "arcee-tiny"),
    bug("last tile of the intermediate size dropped", "helium-tiny"),
    bug("all positions one later", "stablelm-tiny-sequential"),
    bug("weight of the q norm used for k", "stablelm-tiny-parallel"),
)
