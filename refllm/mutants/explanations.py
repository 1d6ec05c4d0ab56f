"""How well a wrong run is explained, from its logits alone.

    python -m refllm.mutants.explanations FILE [FOLDER [CASE ...]]

FOLDER keeps what was found in each case, so that a sweep that was ended goes on. CASE: some of the models alone.

Every mistake of `refllm.mutants.port_bugs` is planted into a port that shares no code with the hypotheses, on the
embedded checkpoints and on random models, in float32 and bfloat16. It is right if the explanation names the hypothesis
that stands beside the mistake, or one that gives the same numbers.
"""

import json
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refllm import golden
from refllm.forward.model import Model
from refllm.hypotheses.catalogue import catalogue
from refllm.hypotheses.explain import Explanation, explain
from refllm.hypotheses.search import Kept, Search, holds
from refllm.hypotheses.setup import Tokens
from refllm.models.auto import load
from refllm.mutants.port import Port
from refllm.mutants.port_bugs import BUGS, Bug
from refllm.precision import rounding
from refllm.storage import output_file
from refllm.strategies import small_models

LENGTH, RIGHT_RUNS, _WORKERS = 64, 10, 2
_SAME = 0.5  # sigma by which two hypotheses with the same numbers may differ


@dataclass(frozen=True)
class Case:
    """A model and what is run. dtype: of the weights and of the port. kept: what the reference gave under hypotheses,
    which does not depend on the mistake in the port."""

    name: str
    model: Model
    ids: np.ndarray
    dtype: str
    kept: Kept = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Name and dtype."""
        return self.name, self.dtype

    def logits(self, bug: Bug | None = None) -> np.ndarray:
        """What the port shows, [1, S, V]."""
        fields = {} if bug is None else bug.fields(self.model.config)
        half = (lambda x: x) if self.dtype == "float32" else _narrow(self.dtype)
        with np.errstate(all="ignore"):
            return np.asarray(Port(self.model.weights, self.model.config, half, **fields).logits(self.ids[0]))[None]

    def search(self, logits: np.ndarray, seconds: float = 60.0) -> Search:
        """The search for what explains such logits."""
        positions = np.arange(self.ids.shape[1])[None]
        tokens = Tokens(self.ids, np.ones_like(self.ids), positions, dtype=self.dtype)
        return Search(self.model, tokens, "lm_head", logits, dtype=self.dtype, seconds=seconds, kept=self.kept)


def _narrow(dtype: str) -> Any:
    onto = rounding(dtype)
    return lambda x: onto(np.asarray(x, np.float32))


@dataclass(frozen=True)
class Outcome:
    """One mistake in one model. result: right, same (other words, the same numbers), wrong, none, nearly, invisible. Of
    mistakes that are in no list: silent, almost (a hypothesis is said to give nearly all of the error), false name."""

    case: str
    dtype: str
    bug: str
    result: str
    said: str
    seconds: float
    before: float = 0.0


def examined(case: Case, bug: Bug) -> Outcome:
    """Plants a mistake and reads the explanation."""
    begin = time.process_time()
    logits = case.logits(bug)
    search = case.search(logits)
    found = explain(search, case.model.config)
    result = _result(case, bug, search, found)
    said = "; ".join(cause.name for cause in found.causes)
    return Outcome(case.name, case.dtype, bug.name, result, said, time.process_time() - begin, found.before)


def _result(case: Case, bug: Bug, search: Search, found: Explanation) -> str:
    if not np.isfinite(search.seen(True)).all():
        return "invisible"
    if not _visible(search):
        return "below" if found.kind == "slope" else "invisible"
    names = {cause.name for cause in found.causes}
    if found.kind == "none":
        return "none" if bug.right else "silent"
    if not bug.right:
        return "almost" if found.kind == "nearly" else "false name"
    if found.kind == "nearly":
        return "nearly" if set(found.causes[0].name.split(" and ")) & set(bug.right) else "wrong"
    if names & set(bug.right) or _solved(bug, found):
        return "right"
    return "same" if _same_numbers(bug, search, found) else "wrong"


def _visible(search: Search) -> bool:
    return not holds(search.reference, search.dtype)


def _solved(bug: Bug, found: Explanation) -> bool:
    """Whether the number was found, within its error."""
    for cause in found.causes:
        if bug.number is None or cause.value is None or not bug.right:
            continue
        if cause.low is None or cause.high is None:
            continue
        if cause.family != re.sub(r" [-+.e\d]+$", "", bug.right[0]):
            continue
        # A negative number is a part of what is right, which differs from model to model.
        if bug.number < 0 or cause.low - 1e-6 * bug.number <= bug.number <= cause.high + 1e-6 * bug.number:
            return True
    return False


def _same_numbers(bug: Bug, search: Search, found: Explanation) -> bool:
    """Whether the hypothesis that is named gives the logits of the port within the error of either."""
    named = {h.name: h for h in catalogue(search.model.config)}
    right = [named[name] for name in bug.right if name in named]
    cause = found.causes[0]
    one = [named[name] for name in cause.name.split(" and ") if name in named]
    if not right or not one:
        return False
    a, b = search.run(tuple(one), True), search.run((right[0],), True)
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return bool(np.sqrt(np.mean(np.square(a - b))) <= _SAME * search.reference.rms_sigma)


def cases(only: tuple[str, str] | None = None) -> Iterator[Case]:
    """The models: the embedded checkpoints, and random ones of every family. only: name and dtype of one."""
    for name, make in {**_embedded(), **_random()}.items():
        for dtype in ("float32", "bfloat16"):
            if only in (None, (name, dtype)):
                model = make(dtype)
                ids = np.random.default_rng(17).integers(0, model.config.vocab_size, (1, LENGTH))
                yield Case(name, model, ids, dtype)


def _embedded() -> dict[str, Callable[[str], Model]]:
    return {
        name: partial(lambda folder, dtype: load(folder, head="causal_lm", dtype=dtype), folder)
        for name, folder in golden.checkpoints().items()
    }


def _random() -> dict[str, Callable[[str], Model]]:
    def make(family: str, n: int, flags: dict[str, Any]) -> Callable[[str], Model]:
        config, cls = small_models.small_config(family, **flags), small_models.model_class(family)
        return lambda dtype: small_models.build(cls, config, 5 + n, dtype)

    return {
        f"random {family} {n}": make(family, n, flags)
        for family in small_models.FAMILIES
        for n, flags in enumerate(small_models.EVERY_FLAG[family])
    }


def swept(case: Case) -> Iterator[Outcome]:
    """Every mistake in one model."""
    for bug in BUGS:
        if bug.fields(case.model.config):
            yield examined(case, bug)


def right_run(case: Case, seed: int) -> Explanation:
    """The explanation of a run in which nothing is wrong."""
    ids = np.random.default_rng(seed).integers(0, case.model.config.vocab_size, case.ids.shape)
    other = replace(case, ids=ids, kept={})
    return explain(other.search(other.logits()), case.model.config)


def in_case(key: tuple[str, str], kept: Path | None) -> list[Outcome]:
    """Every mistake in one model, read from a folder if it was done before."""
    file = None if kept is None else kept / f"{key[0].replace(' ', '-')}-{key[1]}.json"
    if file is not None and file.exists():
        return [Outcome(**entry) for entry in json.loads(file.read_text())]
    case = next(cases(key))
    found = [*swept(case)]
    found += [_of_a_right_run(case, n) for n in range(RIGHT_RUNS)]
    if file is not None:
        output_file.write("outcomes", file, json.dumps([asdict(o) for o in found]))
    return found


def _of_a_right_run(case: Case, n: int) -> Outcome:
    begin = time.process_time()
    found = right_run(case, n)
    said = "; ".join(cause.name for cause in found.causes)
    result = "false" if found.causes else "right run"
    return Outcome(case.name, case.dtype, f"none {n}", result, said, time.process_time() - begin, found.before)


_COLUMNS = ("visible", "right", "same numbers", "nearly", "none", "wrong", "below the limit", "not in the list",
            "of them named", "right runs", "false", "s")  # fmt: skip
_UNLISTED = ("silent", "almost", "false name")
_VISIBLE = ("right", "same", "nearly", "none", "wrong")


def page(outcomes: list[Outcome]) -> str:
    """The document."""
    visible = [o for o in outcomes if o.result in _VISIBLE]
    count = Counter(o.result for o in outcomes)
    explained, right_runs = count["right"] + count["same"], count["right run"] + count["false"]
    unlisted = sum(count[v] for v in _UNLISTED)
    lines = [
        "# Explanations, measured",
        "",
        "Made by `python -m refllm.mutants.explanations FILE`. A port that shares no code with the hypotheses",
        f"shows its logits alone, of {LENGTH} tokens; {len(BUGS)} mistakes are planted into it, one at a time.",
        "A mistake is visible if the check fails. It is named rightly if the explanation has the hypothesis that",
        "stands beside it in `refllm/mutants/port_bugs.py`, or a number of its kind whose interval has the right one.",
        "",
        f"- {len(visible)} visible wrong runs: {explained} ({100 * explained / max(1, len(visible)):.1f} %) explained, "
        f"{count['right']} by the right hypothesis and",
        f"  {count['same']} by one with the same numbers; {count['nearly']} nearly, {count['none']} not, "
        f"{count['wrong']} by a wrong one.",
        f"- {count['below']} runs whose error is below the limit are named by its shape.",
        f"- {unlisted} visible runs with mistakes that no hypothesis describes: nothing is said of the cause of",
        f"  {count['silent']}, {count['almost']} are nearly a hypothesis, {count['false name']} are given a name.",
        f"- {right_runs} right runs: {count['false']} false explanations.",
        "",
        "One row for a model and a dtype; s: the median of the seconds of CPU time of an explanation.",
        "",
        "| model | " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
        *_rows(outcomes),
        "",
        "## By mistake",
        "",
        "Visible runs, those that are explained, and what else became of them.",
        "",
        "| mistake | visible | explained | else |",
        "|---|---:|---:|---|",
        *_by_mistake(visible),
        "",
        "## Twins",
        "",
        "Hypotheses that were named together, since the logits of a run cannot tell them apart:",
        "",
        *_twins(outcomes),
        "",
        "## What stays silent, and why",
        "",
        "A mistake that moves the logits by less than half a sigma has no direction in them. One that moves them by",
        "less than six cannot fall threefold, and is named by its shape or not at all. No hypothesis describes:",
        textwrap.fill(f"{', '.join(sorted({bug.name for bug in BUGS if not bug.right}))}.", 100),
        *_named_unlisted(outcomes),
    ]
    return "\n".join(lines) + "\n"


def _rows(outcomes: list[Outcome]) -> Iterator[str]:
    for case, dtype in dict.fromkeys((o.case, o.dtype) for o in outcomes):
        of = [o for o in outcomes if (o.case, o.dtype) == (case, dtype)]
        n = Counter(o.result for o in of)
        cells = [sum(n[v] for v in _VISIBLE), *(n[v] for v in _VISIBLE), n["below"], sum(n[v] for v in _UNLISTED),
                 n["false name"], n["right run"] + n["false"], n["false"]]  # fmt: skip
        yield f"| {case}, {dtype} | {' | '.join(map(str, cells))} | {np.median([o.seconds for o in of]):.1f} |"


def _by_mistake(visible: list[Outcome]) -> Iterator[str]:
    for name in dict.fromkeys(o.bug for o in visible):
        of = [o for o in visible if o.bug == name]
        rest = [o for o in of if o.result not in ("right", "same")]
        said = "; ".join(f"{o.case}, {o.dtype}: {o.result}{f', {o.said}' * bool(o.said)}" for o in rest)
        yield f"| {name} | {len(of)} | {len(of) - len(rest)} | {said} |"


def _twins(outcomes: list[Outcome]) -> list[str]:
    sets = {frozenset(o.said.split("; ")) for o in outcomes if "; " in o.said}
    largest = [one for one in sets if not any(one < other for other in sets)]
    return [f"- {', '.join(sorted(one))}" for one in sorted(largest, key=sorted)] or ["None."]


def _named_unlisted(outcomes: list[Outcome]) -> Iterator[str]:
    named = [o for o in outcomes if o.result == "false name"]
    if named:
        yield ""
        yield "Given a name all the same:"
        yield ""
        yield from (f"- {o.bug} ({o.case}, {o.dtype}): {o.said}" for o in named)


def main(arguments: list[str]) -> int:
    """Writes the document, and prints a line for each mistake that is not explained rightly."""
    path, kept, *some = [*arguments, *[""] * (2 - len(arguments))]
    keys = [case.key for case in cases() if not some or case.name in some]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(_WORKERS) as pool:
        for found in pool.map(in_case, keys, [Path(kept) if kept else None] * len(keys)):
            outcomes += found
    for o in outcomes:
        if o.result not in ("right", "same", "invisible", "silent", "right run"):
            print(f"{o.case} {o.dtype} {o.bug}: {o.result} {o.said}")
    text = page(outcomes)
    if path:
        output_file.write("docs", path, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
