"""What is installed to test a stack: the one table of exact versions. The extras of pyproject.toml say which versions
users may have, and tests/house/test_run_stacks.py that these are among them.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """pins: exact versions. extra: of pyproject.toml, which brings the same packages; "" where they cannot be resolved
    beside refllm's own, or there are none. alone: they are installed without what they say that they depend on.
    in_make_test: the extra `test` has them, so tests/stacks/test_NAME.py runs in `make test` too. besides: what tests
    need that the stack does not, to make a file for it.
    """

    pins: tuple[str, ...] = ()
    extra: str = ""
    alone: bool = False
    in_make_test: bool = False
    besides: tuple[str, ...] = ()


ENVIRONMENTS: dict[str, Environment] = {
    "torch_module": Environment(in_make_test=True),
    "litgpt": Environment(
        (
            "litgpt==0.5.13",
            "lightning==2.6.6",
            "lightning-utilities==0.15.3",
            "pytorch-lightning==2.6.6",
            "torchmetrics==1.9.0",
            "psutil==7.2.2",
        ),
        alone=True,
    ),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), "mlx", in_make_test=True),
    "onnx": Environment(("onnx==1.23.2", "onnxruntime==1.32.0", "onnxscript==0.7.2"), "onnx", in_make_test=True),
    "openvino": Environment(("openvino==2026.4.1",), "openvino", besides=("onnx==1.23.2", "onnxscript==0.7.2")),
    "jax": Environment(("jax==0.10.2",), "jax"),
    "flax": Environment(("jax==0.10.2", "flax==0.12.8")),
    "ctranslate2": Environment(("ctranslate2==4.8.5",), "ctranslate2"),
    "gguf": Environment(("gguf==0.19.0",), "gguf"),
    "lm_eval": Environment(("lm-eval==0.4.13",), "eval", besides=("accelerate==1.15.0",)),
    "quantized": Environment(
        (
            "bitsandbytes==0.50.2",
            "accelerate==1.15.0",
            "compressed-tensors==0.20.1",
            "autoawq==0.2.9",
            "loguru==0.7.3",
            "frozendict==2.5.1",
            "psutil==7.2.2",
        ),
        alone=True,
    ),
}
"""Stack -> its environment. Beside the pins it has Torch, Transformers and what `make check` installs."""


def only_by_hand() -> list[str]:
    """The test files of stacks that `make test` does not have: not collected there, and not skipped either."""
    return [f"test_{name}.py" for name, environment in ENVIRONMENTS.items() if not environment.in_make_test]


def extras() -> dict[str, list[str]]:
    """The extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found
