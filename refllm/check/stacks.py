"""The stacks that can be checked by name: what each is called, needs and can compute. Their adapters are one file each
in `refllm.check.adapters`, imported when somebody asks for one.

An adapter is a module with two functions:

    open_candidate(opening)   -> Candidate   what `--candidate NAME[:FILE]` names
    wrap(model, opening)      -> Candidate   the same for a live object of that stack

and a third where a file has weights of its own, which may be in another format than the checkpoint's:

    weights(opening)          -> Given       (refllm.check.weights)
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refllm import extras
from refllm.check.taps import Candidate
from refllm.errors import InputError


@dataclass(frozen=True)
class Opening:
    """What a candidate is opened from.

    name: as it was asked for, `NAME`, `NAME:FILE`, `module:function` or `file.py:function`. folder: the checkpoint.
    head: `refllm.load`'s. attention: of Transformers. names: a JSON file that says how a torch module calls its parts.
    library: a shared library of llama.cpp. page: of a family from outside (`refllm.models.own_page`).
    """

    name: str
    folder: Path
    head: str = "causal_lm"
    dtype: str = "float32"
    attention: str = "eager"
    names: Path | None = None
    library: Path | None = None
    page: str = ""

    @property
    def given(self) -> str:
        """What stands after the first colon."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Stack:
    """needs: the packages, by the names of their imports. dtypes: what it computes in on a CPU. given: what has to
    stand after the colon, "" nothing. adapter: its module. roots: the packages that its live objects come from.
    optional: whether what is given may be left out."""

    needs: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    given: str = ""
    adapter: str = ""
    roots: tuple[str, ...] = ()
    optional: bool = False


STACKS: dict[str, Stack] = {
    "litgpt": Stack(("torch", "litgpt"), adapter="litgpt", roots=("litgpt",)),
    "onnx": Stack(("onnx", "onnxruntime"), ("float32", "float16"), "FILE", "onnx", ("onnx", "onnxruntime")),
    "openvino": Stack(("openvino",), ("float32",), "FILE", "openvino", ("openvino",)),
    "ctranslate2": Stack(("ctranslate2",), ("float32",), "FOLDER", "ctranslate2", ("ctranslate2",)),
    "mlx": Stack(("mlx", "mlx_lm"), given="FOLDER", adapter="mlx", roots=("mlx",), optional=True),
    "jax": Stack(("jax",), given="FILE.PY:FUNCTION", adapter="jax", roots=("jaxlib", "jax")),
    "gguf": Stack(("gguf",), ("float32",), given="FILE.gguf", adapter="gguf"),
}
"""What stands before the colon of `--candidate` -> the stack."""

TORCH_MODULE = Stack(("torch",), adapter="torch_module", roots=("torch",))
"""Any module of Torch, by `file.py:module` or as an object; Transformers' models have an adapter of their own."""


def find_stack(name: str) -> Stack | None:
    """The stack that a candidate's name asks for; None if it asks for none."""
    return STACKS.get(name.partition(":")[0])


def must_have(stack: Stack, opening: Opening) -> None:
    """Raises InputError for a name without the file that the stack reads, and for a dtype that it has not.

    Raises MissingExtraError for a stack whose packages are not installed.
    """
    word = opening.name.partition(":")[0]
    if stack.given and not opening.given and (not stack.optional or ":" in opening.name):
        raise InputError(f"--candidate {word} needs what it reads: --candidate {word}:{stack.given}")
    if opening.given and not stack.given:
        raise InputError(f"--candidate {opening.name}: {word} reads the checkpoint itself; leave out :{opening.given}")
    if opening.dtype not in stack.dtypes:
        raise InputError(
            f"--candidate {word} computes in {' or '.join(stack.dtypes)} on a CPU, not in {opening.dtype}: "
            f"use --dtype {stack.dtypes[0]}"
        )
    extras.require(f"--candidate {word}", *stack.needs)


def adapter(stack: Stack) -> Any:
    """The module of a stack's adapter."""
    return importlib.import_module(f"refllm.check.adapters.{stack.adapter}")


def wrap(model: Any, opening: Opening) -> Candidate | None:
    """A live object of some stack as a candidate; None for what comes from none of them."""
    roots = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    if "transformers" in roots and hasattr(model, "named_modules"):
        from refllm.check.adapters.transformers import TransformersCandidate

        return TransformersCandidate(model)
    for stack in (*STACKS.values(), TORCH_MODULE):
        if any(root in stack.roots for root in roots):
            candidate: Candidate = adapter(stack).wrap(model, opening)
            return candidate
    return None
