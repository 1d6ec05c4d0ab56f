"""How often the coach is right, on the answers that stand here: `python tests/learn/coach_page.py docs/coach.md`.

Beside it what one allclose on one seed says of the same answers: the check that puzzles usually have.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import answers
import numpy as np

from refllm.hypotheses.operators.fit import fitting_among
from refllm.learn.attempt import attempt
from refllm.learn.coach import review
from refllm.learn.exercise import TRACKS, Exercise, Given
from refllm.learn.exercises import exercises

_CLOSE = 1e-3
"""The relative and absolute tolerance of the allclose, as in Triton-Puzzles."""
_SEED = 0


@dataclass(frozen=True)
class Seen:
    """One answer. outcome: "accepted", "named", "misnamed", "interpreter", "silent". close: whether it passes one
    allclose. seconds: of its check."""

    answer: answers.Answer
    outcome: str
    close: bool
    seconds: float


def one_seed(one: Exercise) -> Exercise:
    """The exercise with one call: the lengths of its largest of the basic stage, and numbers in -0.5 .. 0.5."""
    first = max((call for call in one.given if not call.corner), key=_size)
    rng = np.random.default_rng(_SEED)

    def drawn(x: object) -> object:
        floats = isinstance(x, np.ndarray) and x.dtype.kind == "f"
        return rng.uniform(-0.5, 0.5, x.shape) if floats and isinstance(x, np.ndarray) else x

    return answers.on_one_call(one, Given(first.words, tuple(drawn(x) for x in first.values)))


def _size(call: Given) -> int:
    return sum(x.size for x in call.values if isinstance(x, np.ndarray))


def seen(answer: answers.Answer, folder: Path, number: int) -> Seen:
    """What the coach and the allclose say of an answer."""
    path = folder / f"answer_{number}.py"
    path.write_text(answer.text)
    start = time.process_time()
    said = review(answer.exercise, path, forked=False)
    seconds = time.process_time() - start
    names = [named.name for named in said.named]
    outcome = (
        "accepted" if said.done
        else "interpreter" if said.trouble and not said.drawn and not names
        else "named" if names == [answer.mistake]
        else "misnamed" if names
        else "interpreter" if said.trouble
        else "silent"
    )  # fmt: skip
    return Seen(answer, outcome, _close(one_seed(answer.exercise), path), seconds)


def _close(one: Exercise, path: Path) -> bool:
    tried = attempt(one, path, forked=False)
    if 0 not in tried.results:
        return False
    pairs = zip(tried.results[0], one.expected(one.given[0]), strict=True)
    return all(np.allclose(x, y, rtol=_CLOSE, atol=_CLOSE, equal_nan=True) for x, y in pairs)


def renamed() -> tuple[int, list[str]]:
    """(how many mistakes were removed from their list one by one, which of them are then called another)."""
    count, other = 0, []
    for one in (one for one in exercises().values() if not one.planted):
        for hypothesis in one.hypotheses[:-1]:
            given = {n: one.known.results(hypothesis.variants[0], n) for n in range(len(one.given))}
            rest = [h for h in one.hypotheses if h.name != hypothesis.name]
            fits = fitting_among(rest, [one.known], {n: x for n, x in given.items() if x is not None})
            count += 1
            other += [f"{one.name}: {hypothesis.name} as {fit.hypothesis.name}" for fit in fits if not fit.restricted
                      and fit.hypothesis.name != "factor"]  # fmt: skip
    return count, other


def page(found: list[Seen]) -> str:
    """The text of docs/coach.md."""
    known = [one for one in exercises().values() if not one.planted]
    wrong, right = ([s for s in found if bool(s.answer.mistake) is is_wrong] for is_wrong in (True, False))
    count, other = renamed()
    outcomes = Counter(s.outcome for s in wrong)
    passes = sum(s.close for s in wrong)
    slow = np.percentile([s.seconds for s in found], 95)
    lines = [
        "# How often the coach is right",
        "",
        "`python tests/learn/coach_page.py docs/coach.md` writes this page. The answers stand in `tests/learn`: right",
        "ones in several styles, and mistakes that beginners make, as edits of one of them. One hand wrote them and",
        "the list of mistakes, so the share that is named is what the coach can do, and not what it will do for",
        "others: `python -m refllm.learn.score_solutions FOLDER` scores answers of somebody who has not seen it.",
        "",
        "| | |",
        "|---|---|",
        f"| exercises | {len(exercises())}, {len(known)} of them with a definition of their own |",
        f"| mistakes that are known | {sum(len(one.mistakes) for one in known)} |",
        f"| wrong answers | {len(wrong)}: {outcomes['named']} called by their name and no other, "
        f"{outcomes['misnamed']} by another, {outcomes['interpreter']} said by the interpreter with their "
        f"line, {outcomes['silent']} refused and not named, {outcomes['accepted']} accepted |",
        f"| right answers | {len(right)}, of which {sum(s.outcome == 'accepted' for s in right)} are accepted |",
        f"| one allclose on one seed | accepts {passes} of the {len(wrong)} wrong answers, and "
        f"{sum(s.close for s in right)} of the {len(right)} right ones |",
        f"| a mistake whose entry is removed | is called another {len(other)} times of {count}"
        f"{': ' + '; '.join(other) if other else ''} |",
        f"| a check | 95 % take under {slow:.2f} CPU-seconds, imports not counted |",
        "",
        "The allclose has the lengths of the largest usual call of each exercise, numbers in -0.5 .. 0.5, and a",
        "tolerance of 1e-3, as the puzzles that this is compared with.",
        "",
        "| exercise | mistakes | wrong answers | named | accepted by one allclose | right answers accepted |",
        "|---|---|---|---|---|---|",
    ]
    for track in TRACKS:
        for one in (one for one in exercises().values() if one.track == track):
            own = [s for s in found if s.answer.exercise.name == one.name]
            bad, good = [s for s in own if s.answer.mistake], [s for s in own if not s.answer.mistake]
            named = sum(s.outcome in ("named", "interpreter") for s in bad)
            lines.append(f"| {one.name} | {len(one.mistakes)} | {len(bad)} | {named} | {sum(s.close for s in bad)} | "
                         f"{sum(s.outcome == 'accepted' for s in good)} of {len(good)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("markdown", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every = [*answers.right(), *answers.wrong(), *answers.of_bugs()]
        found = [seen(answer, Path(folder), number) for number, answer in enumerate(every)]
    for one in found:
        if one.outcome in ("misnamed", "silent") or (one.outcome == "accepted") is bool(one.answer.mistake):
            print(one.answer.exercise.name, one.answer.mistake, one.outcome)
    asked.markdown.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
