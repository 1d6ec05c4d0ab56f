"""The page of a family: its layer drawn, its parameters counted, and what breaks where it is taken for another one."""

import ast
import copy
import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refllm import golden
from refllm.config import published
from refllm.config.traits import TRAITS
from refllm.learn.book import architecture, sources
from refllm.models import families
from refllm.precision import HF_EAGER
from refllm.text.tokenizer import AutoTokenizer

FAMILIES = tuple(TRAITS)
_TOKENS = 48


@dataclass(frozen=True)
class Tensors:
    """One line of the count. times: how often there is such a tensor. numbers: in all of them."""

    name: str
    shape: tuple[int, ...]
    times: int
    numbers: int


@dataclass(frozen=True)
class Published:
    """A published model of the family. drawing: one layer of it."""

    name: str
    drawing: str
    tensors: list[Tensors]
    total: int


@dataclass(frozen=True)
class Change:
    """A difference of two pages. ours, theirs: the lines. where: in which part of the page. breaks: what happens to a
    model of this family that is computed with the other's lines."""

    where: str
    ours: list[str]
    theirs: list[str]
    breaks: str


def page(name: str) -> dict[str, Any]:
    """What the template of a family's page needs."""
    text = sources.path_of("models", f"{name}.py").read_text(encoding="utf-8")
    return {
        "name": name,
        "about": about(name),
        "docstring": ast.get_docstring(ast.parse(text)),
        "block": sources.coloured(sources.function("models", f"{name}.block").text),
        "models": [_published(model) for model, (cls, _) in published.MODELS.items() if cls == _class_name(name)],
        "others": [(other, title(other), list(changes(name, other))) for other in FAMILIES if other != name],
    }


def title(name: str) -> str:
    """The family's name, as its page has it: "Helium (Kyutai)"."""
    return _first_line(name).partition(":")[0]


def about(name: str) -> str:
    """What its page says that it is made of."""
    return _first_line(name).partition(": ")[2]


def _first_line(name: str) -> str:
    text = sources.path_of("models", f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def _class_name(name: str) -> str:
    return f"{TRAITS[name].class_prefix}ForCausalLM"


def _published(model: str) -> Published:
    class_name, sizes = published.MODELS[model]
    cls = families.CLASSES[class_name]
    config = cls.config_class(**sizes)
    groups: dict[str, list[tuple[int, ...]]] = {}
    for tensor, shape in cls.tensors(config).items():
        groups.setdefault(re.sub(r"\.\d+\.", ".N.", tensor), []).append(shape)
    counted = [
        Tensors(tensor, shapes[0], len(shapes), sum(int(np.prod(shape)) for shape in shapes))
        for tensor, shapes in groups.items()
    ]
    drawing = architecture.drawn(cls.page, config, f"one layer of {model}")
    return Published(model, drawing, counted, sum(one.numbers for one in counted))


def changes(name: str, other: str) -> Iterator[Change]:
    """The differences of two pages in the order of their lines, each with what it breaks."""
    ours, theirs = _code(name), _code(other)
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag == "equal" or not _shown([*ours[i1:i2], *theirs[j1:j2]]):
            continue
        text = "\n".join([*ours[:i1], *theirs[j1:j2], *ours[i2:]])
        where = _part(ours, i1)
        yield Change(where, _shown(ours[i1:i2]), _shown(theirs[j1:j2]), _breaks(name, text, where))


def _shown(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("import ")]


def _code(name: str) -> list[str]:
    """A page without its docstring and its comments."""
    text = sources.path_of("models", f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()[tree.body[0].end_lineno or 0 :]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _part(lines: list[str], at: int) -> str:
    """The function that a line is in; "" at the top of the page."""
    for line in reversed(lines[: at + 1]):
        if line.startswith("def "):
            return line[4:].partition("(")[0]
        if line and not line[0].isspace():
            return ""
    return ""


def _breaks(name: str, text: str, where: str) -> str:
    """What a model that has learnt a text does when its page is another one."""
    if where == "tensors":
        return "Another checkpoint is expected: tensors are missing, or left over."
    module = types.ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), vars(module))
    model = _trained(name, "float64" if where else "bfloat16")
    right = _right(name, model.dtype)
    other = copy.copy(model)
    other.page = module
    other.arithmetic = replace(other.arithmetic, policy=HF_EAGER.without(module.NOT_ROUNDED))
    try:
        wrong = other(_ids(name), labels=_ids(name))
    except Exception as error:
        return f"It fails at once: {type(error).__name__}, {str(error)[:100]}"
    return _compared(right, wrong, rounding=not where)


def _compared(right: Any, wrong: Any, rounding: bool) -> str:
    if np.allclose(right.logits, wrong.logits, rtol=1e-9, atol=1e-9):
        return "Nothing, for this checkpoint: its config does not use that line."
    if rounding:
        share = "most" if np.mean(right.logits != wrong.logits) > 0.5 else "some"
        return (
            f"In bfloat16 {share} logits are other numbers, by a rounding or two; in float64 there is no difference. A "
            "loose tolerance cannot tell the two apart."
        )
    flips, places = int(np.sum(right.logits.argmax(-1) != wrong.logits.argmax(-1))), right.logits.shape[1]
    losses = f"The loss goes from {float(right.loss):.1f} to {float(wrong.loss):.1f}"
    return f"{losses}, and {flips} of {places} next tokens are others."


def _checkpoints() -> Path:
    return Path(str(golden.__file__)).with_name("checkpoints")


@cache
def _ids(name: str) -> np.ndarray:
    text = _checkpoints().parent.joinpath("corpus.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(_checkpoints() / f"{name}-trained")
    return np.array([tokenizer(text[:800]).input_ids[:_TOKENS]])


@cache
def _trained(name: str, dtype: str) -> Any:
    cls: Any = families.CLASSES[_class_name(name)]
    return cls.from_pretrained(_checkpoints() / f"{name}-trained", dtype=dtype)


@cache
def _right(name: str, dtype: str) -> Any:
    return _trained(name, dtype)(_ids(name), labels=_ids(name))
