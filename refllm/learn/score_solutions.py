"""Scores a folder of answers by somebody who has not seen the list of mistakes:
`python -m refllm.learn.score_solutions FOLDER`, with `--markdown`, `--json` and `--judged`, each with a file.

One answer per file, anywhere in the folder. Its first line says what is wrong with it in its author's words,
`# softmax: the sum runs over the whole array`, or `# softmax: right`. Whether a mistake that the coach names is the
author's is for a person to say: The file of `--judged` has true or false for each file whose mistake was named.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from refllm.accuracy.verdicts import SCHEMA
from refllm.errors import InputError, RefllmError
from refllm.learn.coach import Review, review
from refllm.learn.exercises import find
from refllm.storage import output_file
from refllm.storage.json_text import json_text

_RIGHT = "right"
OUTCOMES = {
    "accepted rightly": "right, and accepted",
    "refused wrongly": "right, and refused",
    "named rightly": "wrong, and its mistake named",
    "named wrongly": "wrong, and another mistake named",
    "named, not judged": "wrong, and a mistake named, of which nobody has said whether it is the one",
    "raises": "wrong, and it raises, races, reads outside or has another shape, which is said with its line",
    "silent": "wrong and refused, and nothing named",
    "accepted wrongly": "wrong, and accepted",
}


@dataclass(frozen=True)
class Scored:
    """One answer. words: its author's. named: the mistakes that the coach names. says: their sentences, or what is
    said in their place. outcome: one of `OUTCOMES`."""

    file: str
    exercise: str
    words: str
    outcome: str
    named: tuple[str, ...]
    says: str
    seconds: float


def score(folder: Path, judged: dict[str, bool], forked: bool = True) -> list[Scored]:
    """Every answer in the folder. Raises InputError for a file without its first line."""
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise InputError(f"{folder} has no .py files")
    return [_scored(file, str(file.relative_to(folder)), judged, forked) for file in files]


def _scored(file: Path, name: str, judged: dict[str, bool], forked: bool) -> Scored:
    first = (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    exercise, colon, words = first.lstrip("# ").partition(":")
    if not first.startswith("#") or not colon or not words.strip():
        raise InputError(f"{name}: the first line should be `# EXERCISE: what is wrong`, found {first!r}")
    found = review(find(exercise.strip()), file, forked=forked)
    said = "; ".join(f"{'as if ' if one.as_if else ''}{one.says}" for one in found.named) or (
        found.trouble.text if found.trouble else ""
    )
    outcome = _outcome(found, words.strip(), judged.get(name))
    named = tuple(one.name for one in found.named)
    return Scored(name, found.exercise, words.strip(), outcome, named, said, round(found.seconds, 3))


def _outcome(found: Review, words: str, rightly: bool | None) -> str:
    if words.lower() == _RIGHT:
        return "accepted rightly" if found.done else "refused wrongly"
    if found.done:
        return "accepted wrongly"
    if found.named:
        return {None: "named, not judged", True: "named rightly", False: "named wrongly"}[rightly]
    return "raises" if found.trouble else "silent"


def markdown(scored: list[Scored]) -> str:
    """The counts, and a line for every answer."""
    counts = Counter(one.outcome for one in scored)
    lines = ["| outcome | answers | |", "|---|---|---|"]
    lines += [f"| {name} | {counts[name]} | {what} |" for name, what in OUTCOMES.items() if counts[name]]
    lines += ["", "| file | exercise | its author says | outcome | the coach says |", "|---|---|---|---|---|"]
    for one in scored:
        cells = (one.file, one.exercise, one.words, one.outcome, one.says)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(prog="python -m refllm.learn.score_solutions", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--judged", type=Path)
    asked = parser.parse_args()
    try:
        judged = json.loads(asked.judged.read_text(encoding="utf-8")) if asked.judged else {}
        scored = score(asked.folder, judged)
    except (RefllmError, OSError, ValueError) as error:
        parser.error(str(error))
    if asked.markdown:
        output_file.write("--markdown", asked.markdown, markdown(scored))
    if asked.json:
        output_file.write(
            "--json", asked.json, json_text({"schema": SCHEMA, "answers": [asdict(one) for one in scored]})
        )
    if not asked.markdown and not asked.json:
        print(markdown(scored), end="")


if __name__ == "__main__":
    main()
