"""The answers of numpy_solutions.py, backward_solutions.py and triton_solutions.py, as files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import backward_solutions
import numpy_solutions
import triton_solutions

from refllm.learn.coach import Review, review
from refllm.learn.exercise import END, YOURS, Exercise, Given
from refllm.learn.exercises import exercises

_FILES = (numpy_solutions, backward_solutions, triton_solutions)
BY_INTERPRETER = "!"
"""The name of what is said before any values: out of bounds, a race, memory that nobody wrote."""


@dataclass(frozen=True)
class Answer:
    """mistake: the name that would be right; "" of a right answer."""

    exercise: Exercise
    mistake: str
    text: str


def right() -> Iterator[Answer]:
    """The solutions, and two more of every exercise that is no bug to find."""
    for one in exercises().values():
        yield Answer(one, "", one.whole)
    for file in _FILES:
        for name, texts in file.RIGHT.items():
            one = exercises()[name]
            yield from (Answer(one, "", f"{one.header}\n{text}") for text in texts)


def wrong() -> Iterator[Answer]:
    """Every wrong one. Raises ValueError for an edit that changes nothing."""
    for file in _FILES:
        for name, entries in file.WRONG.items():
            one = exercises()[name]
            base = _plain(one.solution) if file is triton_solutions else file.RIGHT[name][0]
            for mistake, *edits in entries:
                text = base
                for old, new in zip(edits[::2], edits[1::2], strict=True):
                    text = text.replace(old, new)
                if text == base:
                    raise ValueError(f"{name}: {mistake} changes nothing")
                yield Answer(one, mistake, f"{one.header}\n{text}")


def of_bugs() -> Iterator[Answer]:
    """The right and wrong answers of the exercises from which bugs were made, as answers to those."""
    for bug in exercises().values():
        if bug.planted:
            base = bug.name.removeprefix("bug_")
            for answer in (*right(), *wrong()):
                if answer.exercise.name == base:
                    yield Answer(bug, answer.mistake, f'BUG = "{bug.letter}"\n{answer.text}')


def _plain(text: str) -> str:
    return re.sub(rf"\n *({YOURS}|{END})(?=\n)", "", text)


def reviewed(answer: Answer, folder: Path, number: int = 0) -> Review:
    """What the coach says of it."""
    path = folder / f"answer_{number}.py"
    path.write_text(answer.text)
    return review(answer.exercise, path, forked=False)


def on_one_call(one: Exercise, call: Given) -> Exercise:
    """The exercise with one designed call."""
    return replace(one, calls=lambda: [call], shown=tuple)
