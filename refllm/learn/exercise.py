"""An exercise: one object from which its statement, its file, its solution and what checks an answer are made.

The definition is a text of NumPy, and a mistake is an edit of it (`refllm.hypotheses.operators`), so that the coach
knows what a wrong answer would return, can say what is wrong in a sentence, and can show the line.
"""

import ast
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from refllm.hypotheses.operators.catalogue import catalogue
from refllm.hypotheses.operators.designed import CORNER
from refllm.hypotheses.operators.edits import compiled, edited
from refllm.hypotheses.operators.hypothesis import NUMBER, OpHypothesis, Variant, mistake
from refllm.hypotheses.operators.outcomes import Outcomes

TRACKS = {
    "numpy": "operators, a block, the cache and generation in NumPy",
    "triton": "from Torch to Triton: kernels on the interpreter, no GPU",
    "backward": "gradients by hand, up to a training loop",
    "bugs": "find the bug: name it and mend it",
}
STAGES = {"basic": "the formula", "contract": "what is asked beyond it: overflow, empty rows, ignored labels"}
YOURS, END = "# your part", "# end of your part"
_FLOOR = 2e-7
"""What an exact 0 may be off in code of another order, as a share of the median of a result."""
_PYTHON_HEADER = "import numpy as np\n"
_TRITON_HEADER = "import torch\nimport triton\nimport triton.language as tl\n"


@dataclass(frozen=True, eq=False)
class Given:
    """A call on which answers are judged. words: what is special about it. values: the arguments in order, arrays or
    numbers. corner: it asks more than the formula, and belongs to the stage "contract". lengths: of the axes by name,
    for numbers that are "1/sqrt(D)"."""

    words: str
    values: tuple[Any, ...]
    corner: bool = False
    lengths: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it is, as reports of operators have it."""
        return f"{CORNER if self.corner else 'designed: '}{self.words}"

    @property
    def keywords(self) -> tuple[tuple[str, Any], ...]:
        """There are none: answers are called by position."""
        return ()

    @property
    def stage(self) -> str:
        """Which of `STAGES` it belongs to."""
        return "contract" if self.corner else "basic"

    def arrays(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords), new on every call."""
        return [x.copy() if isinstance(x, np.ndarray) else x for x in self.values], {}


@dataclass(frozen=True)
class Mistake:
    """What a beginner may have written. name: short, one per exercise. says: what is wrong, in a sentence. asks: the
    question that comes before that sentence. codes: ways to write it, as edits of the definition. numbers: what NUMBER
    may be in them."""

    name: str
    says: str
    asks: str
    codes: tuple[tuple[tuple[str, str], ...], ...]
    numbers: tuple[str, ...] = ()


def wrong(name: str, says: str, asks: str, *edits: str, numbers: tuple[str, ...] = ()) -> Mistake:
    """A mistake with one code: old, new, old, new ..."""
    return Mistake(name, says, asks, (_pairs(edits),), numbers)


def ways(name: str, says: str, asks: str, *codes: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Mistake:
    """A mistake with several codes, each as (old, new, old, new ...)."""
    return Mistake(name, says, asks, tuple(_pairs(code) for code in codes), numbers)


def _pairs(edits: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(edits[::2], edits[1::2], strict=True))


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    name: of its file too. track: of `TRACKS`. title: a few words. statement: shapes, an example and the property that
    counts, for somebody who knows only this text. function: what the answer has to define. solution: the whole answer
    but for its imports; what stands between `YOURS` and `END` is left out of the skeleton, else the body of `function`.
    calls: makes the designed calls. outputs: names of the results, and of their axes. mistakes: see `Mistake`. hints:
    three, from a nudge to the line, for what is not recognised. definition: the NumPy text of which mistakes are edits,
    with a function of the same name; "" where it is the solution. shown: calls of a simple structure, on which a wrong
    answer is drawn by preference. planted: the name of the mistake that is in the file of a bug to find; choices: the
    names among which it has to be found; bug: its edit of the solution, as (old, new, ...), where the mistake's is of
    another text. operator: the operator of `refllm.ops` whose known mistakes are looked through where none of its own
    fits; adapt: a lambda of that operator's definition and the arguments of the exercise, which returns a tuple.
    torch_may: more functions of Torch that an answer may call.
    """

    name: str
    track: str
    title: str
    statement: str
    function: str
    solution: str
    calls: Callable[[], Iterable[Given]]
    outputs: Mapping[str, tuple[str, ...]]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    definition: str = ""
    shown: Callable[[], Iterable[Given]] = tuple
    planted: str = ""
    choices: tuple[str, ...] = ()
    bug: tuple[str, ...] = ()
    operator: str = ""
    adapt: str = "lambda operator, *given: operator(*given)"
    torch_may: tuple[str, ...] = ()

    @property
    def uses_triton(self) -> bool:
        """Whether the answer is a Triton kernel."""
        return "tl." in self.solution

    @cached_property
    def text(self) -> str:
        """The definition as a text that `compiled` takes: its function and `definition`, which returns a tuple."""
        fresh = "one_given.copy() if hasattr(one_given, 'copy') else one_given"
        return (
            f"{self.definition or _without_marks(self.solution)}\n"
            "def definition(*given):\n"
            f"    out = {self.function}(*[{fresh} for one_given in given])\n"
            "    return out if isinstance(out, tuple) else (out,)\n"
        )

    @cached_property
    def given(self) -> tuple[Given, ...]:
        """The designed calls."""
        return tuple(self.calls())

    @cached_property
    def drawn(self) -> tuple[Given, ...]:
        """The calls that are only drawn."""
        return tuple(self.shown())

    @cached_property
    def hypotheses(self) -> tuple[OpHypothesis, ...]:
        """Its mistakes as what a result is compared with."""
        return tuple(
            mistake(self.name, m.name, m.says, *m.codes, numbers=m.numbers, definition=self.text) for m in self.mistakes
        ) + (_factor(self),)

    @cached_property
    def of_operator(self) -> tuple[OpHypothesis, ...]:
        """The mistakes that are known of its operator, as answers to the exercise."""
        if not self.operator:
            return ()
        asked = f"\n_operator = definition\n\n\ndef definition(*given):\n    return ({self.adapt})(_operator, *given)\n"
        return tuple(
            replace(h, operator=self.name, definition=h.text + asked) for h in catalogue(self.operator) if not h.place
        )

    @cached_property
    def known(self) -> Outcomes:
        """What each mistake gives on the designed calls."""
        right = Variant(OpHypothesis("right", "", self.name, ((),), definition=self.text), ())
        names = list(self.outputs)
        return Outcomes(right, self.given, names, ["float32"] * len(names), "float32", "float32", _FLOOR)

    def expected(self, call: Given) -> tuple[np.ndarray, ...]:
        """What the definition returns."""
        with np.errstate(all="ignore"):
            return tuple(np.asarray(x, np.float64) for x in compiled(self.text)(*call.arrays()[0]))

    def mistake(self, name: str) -> Mistake | None:
        """The mistake of that name; None for one that has none, as the factor that is solved for."""
        return next((m for m in self.mistakes if m.name == name), None)

    # ------------------------------------------------------------------------------------------------- files

    @property
    def header(self) -> str:
        """The imports of its file."""
        return _TRITON_HEADER if self.uses_triton else _PYTHON_HEADER

    @property
    def skeleton(self) -> str:
        """The file that a student begins with."""
        if self.planted:
            bug = f'{_choices(self)}\nBUG = ""  # the letter of what is wrong\n\n\n'
            return f"{self._head}\n{bug}{self.with_bug}"
        return f"{self._head}\n\n{_cut(self.solution, self.function)}"

    @property
    def whole(self) -> str:
        """The file with the solution in it."""
        bug = f'{_choices(self)}\nBUG = "{self.letter}"\n' if self.planted else ""
        return f"{self._head}\n{bug}\n{_without_marks(self.solution)}"

    @property
    def _head(self) -> str:
        statement = textwrap.dedent(self.statement).strip().replace('"""', "'''").replace("\\", "\\\\")
        return f'"""{self.title}.\n\n{statement}\n"""\n\n{self.header}'

    @property
    def with_bug(self) -> str:
        """The solution with the planted mistake in it. Raises NoSuchTextError where that is no edit of it."""
        one = self.mistake(self.planted)
        edits = _pairs(self.bug) or (one.codes[0] if one else ())
        return edited(_without_marks(self.solution), edits)

    @property
    def letter(self) -> str:
        """The letter of the planted bug among the choices; "" where none is planted."""
        return "abcdefghijklmnop"[self.choices.index(self.planted)] if self.planted else ""


def _choices(exercise: Exercise) -> str:
    listed = [(m, exercise.mistake(m)) for m in exercise.choices]
    return "\n".join(
        f"# {x}: {m.says.replace(NUMBER, 'a constant')}"
        for x, (_, m) in zip("abcdefghijklmnop", listed, strict=False)
        if m
    )


def _factor(exercise: Exercise) -> OpHypothesis:
    def times(outputs: tuple[np.ndarray, ...], value: str) -> tuple[np.ndarray, ...]:
        return tuple(float(value) * x for x in outputs)

    powers = tuple(sign * 2.0**k for k in range(-12, 13, 2) for sign in (1, -1))
    says = "every number is NUMBER times what it should be: which of your numbers is that?"
    return OpHypothesis("factor", says, exercise.name, (times,), solved=powers, definition=exercise.text)


def _without_marks(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if line.strip() not in (YOURS, END))


def _cut(text: str, function: str) -> str:
    """The text without what a student has to write."""
    if YOURS in text:
        return _cut_at_marks(text)
    tree = ast.parse(text)
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    first = found.body[0].lineno
    lines = text.splitlines()
    kept = [
        *lines[: first - 1],
        f'    raise NotImplementedError("{function}: yours to write")',
        *lines[found.end_lineno :],
    ]
    return "\n".join(kept) + "\n"


def _cut_at_marks(text: str) -> str:
    kept, inside = [], False
    for line in text.splitlines():
        if line.strip() == YOURS:
            kept.append(f"{line.split('#')[0]}pass  {YOURS}")
        inside = line.strip() == YOURS or (inside and line.strip() != END)
        if not inside and line.strip() not in (YOURS, END):
            kept.append(line)
    return "\n".join(kept) + "\n"
