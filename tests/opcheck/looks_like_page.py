"""Writes docs/looks-like.md: how often `check-op` names a mistake rightly, wrongly, or not at all.

    python tests/opcheck/looks_like_page.py docs/looks-like.md      # five minutes of CPU

Exit code 1 where less is named rightly, or more wrongly, than the page promises.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from refllm import kernels
from refllm.hypotheses.operators.catalogue import catalogue
from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.fit import fitting, is_right
from refllm.hypotheses.operators.outcomes import outcomes
from refllm.kernels.mutants import catalogue as planted
from refllm.ops.contracts import OPERATORS
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

sys.path.insert(0, str(Path(__file__).parent))

from beginners import every as beginners
from beginners.right_names import BEGINNERS, PLANTED
from beginners.scoring import Asked, Score, answers_of, falsely, is_visible, score
from beginners.twins import TWINS, are_twins

RIGHTLY, OF_PLANTED, WRONGLY = 0.70, 0.80, 0.02
"""What is promised in float32: the least share that is named rightly, of beginners' and of planted mistakes, and the
most that is named wrongly."""


def ask_beginners(dtype: str) -> Iterator[Asked]:
    """Every operator of a beginner."""
    for one in beginners():
        answers = answers_of(one.operator, one.function, dtype, one.arrays)
        yield Asked(one.operator, one.name, one.mistake, frozenset({BEGINNERS[one.name]}), answers)


def ask_planted(form: str, dtype: str) -> Iterator[Asked]:
    """Every planted bug of `refllm.kernels.mutants` of a form whose values are wrong on a designed input."""
    for mutant in planted(form=form):
        if dtype not in mutant.dtypes or mutant.equivalent or mutant.place:
            continue
        right = frozenset({mutant.name, *PLANTED.get(mutant.name, ())})
        inside = kernels.interpreted() if form == "triton" else contextlib.nullcontext()
        with inside:
            function = mutant.function()
            for deep in (False, True):  # the second is dearer, and is asked of few
                answers = answers_of(mutant.operator, function, dtype, "torch", form == "triton", deep)
                asked = Asked(mutant.operator, f"{mutant.name}, {form}", mutant.what, right, answers)
                if not answers or not is_visible(asked, dtype):
                    break
            else:
                yield asked


def named_right_ones(dtype: str) -> tuple[list[str], int]:
    """Of the right implementations of the tests, those of which something is named, and how many there are."""
    from legitimate_libraries import RIGHT

    found, asked = [], 0
    for one in RIGHT:
        if dtype in one.dtypes:
            asked += 1
            answers = answers_of(one.operator, one.function, dtype, "torch")
            if not is_right(one.operator, dtype, answers):
                found += [f"{one.operator}, {one.name}: {fit.says}" for fit in fitting(one.operator, dtype, answers)]
    return found, asked


def row(words: str, scores: Sequence[Score]) -> tuple[str, ...]:
    """One line of the table of rates."""
    n = len(scores)
    counts = {verdict: sum(s.verdict == verdict for s in scores) for verdict in ("rightly", "wrongly", "silent")}
    shares = [f"{counts[verdict]} ({100 * counts[verdict] / max(1, n):.1f} %)" for verdict in counts]
    alone = sum(s.alone for s in scores)
    return words, str(n), shares[0], str(alone), shares[1], shares[2], str(sum(bool(falsely(s)) for s in scores))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def said(scored: Score) -> str:
    """What is named, in words."""
    return "; or: ".join(fit.says for fit in scored.named) or "nothing"


GROUPS = {
    "beginners', float32": ("beginners", "float32"),
    "beginners', bfloat16": ("beginners", "bfloat16"),
    "planted in Torch, float32": ("torch", "float32"),
    "planted in Triton, float32": ("triton", "float32"),
    "planted in Torch, bfloat16": ("torch", "bfloat16"),
}
"""What is asked, and in which format."""


def measure(words: str) -> list[Score]:
    """The scores of one group, without the numbers that they rest on."""
    torch.set_num_threads(1)
    kind, dtype = GROUPS[words]
    every = ask_beginners(dtype) if kind == "beginners" else ask_planted(kind, dtype)
    scores = (score(asked, dtype, removed=dtype == "float32") for asked in every)
    return [replace(scored, asked=replace(scored.asked, answers={})) for scored in scores]


def page(scores: dict[str, list[Score]], right: dict[str, tuple[list[str], int]]) -> str:
    """The whole page."""
    hypotheses = {operator: catalogue(operator) for operator in OPERATORS}
    total = sum(map(len, hypotheses.values()))
    rates = [row(words, of) for words, of in scores.items()]
    beginners_32 = scores["beginners', float32"]
    lines = [
        "# What a wrong operator looks like",
        "",
        "When a candidate of `refllm check-op` returns wrong values, it is run on a few designed inputs, and",
        f"each of {total} hypotheses is asked whether it gives the candidate's numbers: a hypothesis is a small named",
        "edit of the definition's text (`refllm/hypotheses/operators/`). All that fit on every input are named, within",
        "their predicted rounding; where none does, nothing is. Written by a command:",
        "",
        "    python tests/opcheck/looks_like_page.py docs/looks-like.md",
        "",
        "## How often",
        "",
        "*Beginners'*: wrong operators in NumPy and Torch, each with one mistake, written before the catalogue and",
        "without it (`tests/opcheck/beginners/`), though by the same hand. *Planted*: the bugs of",
        "docs/mutants.md whose values are wrong on a designed input, by others, who did not know",
        "of a catalogue. *Rightly*: the right name is among those that fit; *alone*: and no other is. *Wrongly*: only",
        "others are. *Falsely*: once the right name is taken out of the catalogue, another takes its place (one that",
        "was not there before, and does not say the same in other words: a number that was solved for, or a mistake",
        "restricted to one result or one value of an argument).",
        "",
        *table(("wrong operators", "asked", "rightly", "alone", "wrongly", "silent", "falsely"), rates),
        "",
        "A right implementation has no finding, so nothing is asked of it. Asked all the same, by its numbers on the",
        "designed inputs alone, without the options and limits of a check, something is named of "
        + ", ".join(f"{len(found)} of {n} in {dtype}" for dtype, (found, n) in right.items())
        + ".",
        "",
        "In a narrow format a beginner's code rounds everywhere, the statistics of a row too, which is a second",
        "mistake beside the first; a kernel that computes in float32 inside is named as well as one in float32.",
        "",
        "## The catalogue",
        "",
        "Numbers: those of all results on the designed inputs. Twins are named together: nothing tells them apart.",
        "",
        *table(
            ("operator", "hypotheses", "ways to write them", "inputs", "numbers", "twins"),
            [
                (
                    operator,
                    str(len(of)),
                    str(sum(len(h.codes) for h in of)),
                    str(len(designed(operator, "float32"))),
                    str(_numbers(operator)),
                    "; ".join(" = ".join(pair) for pair in TWINS.get(operator, ())) or "none",
                )
                for operator, of in hypotheses.items()
            ],
        ),
        "",
        "## Beginners, one by one",
        "",
        "In float32: the mistake as it was written down, and what is named.",
        "",
        *table(
            ("operator", "mistake", "named"),
            [(s.asked.operator, s.asked.mistake, said(s)) for s in beginners_32],
        ),
        "",
        "## Not named, or wrongly",
        "",
    ]
    for words, of in scores.items():
        rest = [s for s in of if s.verdict != "rightly"]
        lines += [f"### {words}", ""]
        lines += [f"- {s.asked.operator}, {s.asked.name}: {s.asked.mistake} (named: {said(s)})" for s in rest] or [
            "None."
        ]
        lines.append("")
    lines += ["## Right implementations, asked all the same", ""]
    lines += [f"- {dtype}: {one}" for dtype, (found, _) in right.items() for one in found] or ["None."]
    lines += ["", "## Named falsely without its own entry", ""]
    lines += [
        f"- {words}: {s.asked.operator}, {s.asked.name}: {', '.join(falsely(s))}"
        for words, of in scores.items()
        for s in of
        if falsely(s)
    ] or ["None."]
    return "\n".join(lines) + "\n"


def _numbers(operator: str) -> int:
    known = outcomes(operator, "float32")
    return sum(x.size for n in range(len(known.calls)) for x in known.results(known.right, n) or ())


def alike() -> list[str]:
    """The hypotheses whose own numbers fit another one that is not listed as a twin, or do not fit themselves."""
    found = []
    for operator in OPERATORS:
        known = outcomes(operator, "float32")
        shapes = [[x.shape for x in known.results(known.right, n) or ()] for n in range(len(known.calls))]
        for variant in (v for h in catalogue(operator) for v in h.variants):
            every = ((n, known.results(variant, n)) for n in range(len(known.calls)))
            answers = {n: out for n, out in every if out is not None and [x.shape for x in out] == shapes[n]}
            name = variant.hypothesis.name
            if not is_right(operator, "float32", answers):
                named = {fit.hypothesis.name for fit in fitting(operator, "float32", answers)}
                odd = [other for other in named - {name} if not are_twins(operator, name, other)]
                found += [f"{operator}: {name} is {other} as well" for other in odd]
                found += [f"{operator}: {name} does not fit itself"] if name not in named else []
    return list(dict.fromkeys(found))


def promised(scores: dict[str, list[Score]]) -> list[str]:
    """What is not as the page promises, in words."""

    def share(of: Sequence[Score], verdict: str) -> float:
        return sum(s.verdict == verdict for s in of) / max(1, len(of))

    of_planted = [s for words, of in scores.items() if words.startswith("planted") and "float32" in words for s in of]
    groups = {"beginners'": (scores["beginners', float32"], RIGHTLY), "planted": (of_planted, OF_PLANTED)}
    broken = [f"{words}: {share(of, 'rightly'):.1%} rightly" for words, (of, least) in groups.items()
              if share(of, "rightly") < least]  # fmt: skip
    broken += [f"{words}: {share(of, 'wrongly'):.1%} wrongly" for words, (of, _) in groups.items()
               if share(of, "wrongly") > WRONGLY]  # fmt: skip
    return broken


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python tests/opcheck/looks_like_page.py", description=main.__doc__)
    parser.add_argument("page", type=Path, help="the file to write")
    parser.add_argument("--told-apart", action="store_true", help="also ask whether every way to be wrong has one name")
    parser.add_argument("--processes", type=int, default=4)
    given = parser.parse_args(arguments)
    with StatusLine(sys.stderr) as step, ProcessPoolExecutor(given.processes, get_context("fork")) as pool:
        asked = {words: pool.submit(measure, words) for words in GROUPS}
        of_right = {dtype: pool.submit(named_right_ones, dtype) for dtype in ("float32", "bfloat16", "float16")}
        told_apart = pool.submit(alike) if given.told_apart else None
        scores, right = {}, {}
        for i, (words, future) in enumerate(asked.items()):
            step(words, i, len(asked))
            scores[words] = future.result()
        right = {dtype: future.result() for dtype, future in of_right.items()}
        odd = told_apart.result() if told_apart is not None else []
        step.clear()
    output_file.replace(given.page, page(scores, right))
    broken = promised(scores) + odd
    print("\n".join(broken) or "as promised")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
