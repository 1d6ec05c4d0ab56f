"""What other projects' criteria catch, and what they reject of right code, beside this check.

    python -m refllm.mutants.criteria docs/criteria.md [--keep FOLDER] [--every N] [--jobs N]

Everything of `refllm.mutants.criteria_runs`, on the embedded checkpoints in three formats, and pairs of a trainer and a
rollout engine (`refllm.mutants.rollouts`). FOLDER keeps what was done, part by part, so that a sweep that was ended
goes on. Needs Torch and Transformers.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refllm.mutants import rollouts
from refllm.mutants.criteria_runs import ALONE, GROUPS, SHOWN, VISIBLE, Outcome, outcomes
from refllm.mutants.field_criteria import CRITERIA
from refllm.mutants.validation import DTYPES
from refllm.mutants.validation_page import table
from refllm.storage import output_file
from refllm.strategies import small_models

NAMES = (*(criterion.name for criterion in CRITERIA), ALONE, SHOWN)
_PAIRS = "trainer and rollout"
_LISTED = 12
Part = tuple[str, ...]
"""Group, checkpoint and format; or `_PAIRS` and a family."""

# ----------------------------------------------------------------------------------------------------------- measuring


def parts() -> list[Part]:
    """Everything that is measured."""
    from refllm import golden

    runs = [(group, name, dtype) for group in GROUPS for name in golden.checkpoints() for dtype in DTYPES]
    return [*runs, *((_PAIRS, family) for family in small_models.FAMILIES)]


def measured(part: Part, every: int, keep: Path | None) -> tuple[float, list[dict[str, Any]]]:
    """CPU seconds and plain values of one part, read from a folder if it was done before."""
    file = None if keep is None else _file(part, every, keep)
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        return kept["seconds"], kept["values"]
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = _measured(part, every)
    seconds = time.process_time() - begin
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        output_file.replace(file, json.dumps({"seconds": seconds, "values": values}))
    return seconds, values


def _file(part: Part, every: int, keep: Path) -> Path:
    return keep / f"{'-'.join(part).replace(' ', '_')}-{every}.json"


def _measured(part: Part, every: int) -> list[dict[str, Any]]:
    import torch

    from refllm import golden
    from refllm.check.adapters.transformers import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(1)
    if part[0] == _PAIRS:
        return [asdict(one) | {"right": one.right} for one in rollouts.swept(part[1])]
    group, name, dtype = part
    folders = golden.checkpoints()
    turn = list(folders).index(name) + DTYPES.index(dtype)
    return [asdict(one) for one in outcomes(name, Path(folders[name]), dtype, group, every, turn)]


# ------------------------------------------------------------------------------------------------------------ the page


def share(outcomes_: Iterable[Outcome], name: str, word: str = "fails") -> str:
    """How many of them a criterion says that word of, of those that it was asked: 3 of 12 (25 %)."""
    asked = [one.said[name] for one in outcomes_ if name in one.said]
    count = asked.count(word)
    return f"{count} of {len(asked)} ({100 * count / len(asked):.1f} %)" if asked else ""


def _main_table(found: list[Outcome]) -> list[str]:
    wrong, right = [one for one in found if one.wrong], [one for one in found if not one.wrong]
    visible, hidden = [one for one in wrong if one.visible], [one for one in wrong if not one.visible]
    header = (
        "criterion",
        "wrong runs caught",
        "of those visible in the logits",
        "of the others",
        "right runs rejected",
        "right runs without a verdict",
    )
    rows = [
        (
            name,
            *(share(of, name) for of in (wrong, visible, hidden, right)),
            share(right, name, "incomplete") if name in (ALONE, SHOWN) else "",
        )
        for name in NAMES
    ]
    return table(header, rows)


def _table_by(found: list[Outcome], key: Callable[[Outcome], str], keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    header = ("criterion", *(f"{k}: {what}" for k in keys for what in ("caught", "rejected")))
    rows = []
    for name in NAMES:
        cells = []
        for k in keys:
            of = [one for one in found if key(one) == k]
            for wrong in (True, False):
                cells.append(_short(share([one for one in of if one.wrong == wrong], name)))
        rows.append((name, *cells))
    return table(header, rows)


def _short(cell: str) -> str:
    """3 of 12 (25.0 %) -> 3 of 12."""
    return cell.partition(" (")[0]


def _passed(found: list[Outcome]) -> list[str]:
    """The mistakes that are visible in the logits and pass a criterion most often, for each."""
    rows = []
    for name in NAMES:
        passed = Counter(one.name for one in found if one.visible and one.said.get(name, "fails") != "fails")
        listed = [f"{mistake} ({n})" if n > 1 else mistake for mistake, n in passed.most_common(_LISTED)]
        more = len(passed) - len(listed)
        rows.append((name, "; ".join(listed) + (f"; and {more} more" if more else "") or "none"))
    return table(("criterion", "mistakes that are visible in the logits and pass"), rows)


def _rejected(found: list[Outcome]) -> list[str]:
    """Right runs of which this check says that they are wrong; with all values shown, that says nothing too."""
    lines = [
        f"- {name}: {one.group}, {one.name}, {one.checkpoint}, {one.dtype}: {one.said[name]}"
        for name in (ALONE, SHOWN)
        for one in found
        if not one.wrong and is_false_alarm(one, name)
    ]
    return lines or ["This check rejects no right run."]


def is_false_alarm(one: Outcome, name: str) -> bool:
    """Whether a right run is rejected: one that shows its values has to hold, of logits alone nothing may be said."""
    said = one.said.get(name, "holds")
    return not one.wrong and said != "holds" and (name == SHOWN or said != "incomplete")


_HEAD = """# Criteria of the field, beside this check

Written by a command, which takes {minutes:.0f} minutes of CPU time:

    python -m refllm.mutants.criteria docs/criteria.md

The same wrong runs and the same right ones are put to the criteria by which other projects call an implementation
right, and to `refllm check`. Wrong: the defects of the catalogue (`refllm/mutants/models.py`) in the middle layer of a
Transformers model; mistakes of a port in NumPy that shows its logits alone (`refllm/mutants/port_bugs.py`); mistakes on
top of ports that round elsewhere than Transformers (`refllm/mutants/profiles.py`). Right: those ports without a
mistake, Transformers with its other attention and with roundings in other places, the Torch backend, products of four
parts (as was said with `--splits 4`), float32 sums added one after another. Five embedded checkpoints, three formats,
one input of 61 random tokens; of every {every} mistakes one is planted in each. The known run is Transformers' eager
model in the same format, so that it is no candidate itself. {wrong} wrong runs, {right} right ones.

Left out are stressed inputs, which the check runs with `--stress` (docs/validation.md), and that it names
the place of a mistake.
"""


def page(
    found: list[Outcome], pairs: list[rollouts.Blamed], every: int, seconds: float, missing: Iterable[Part] = ()
) -> str:
    """The document. missing: parts that were not measured."""
    wrong = sum(one.wrong for one in found)
    lines = [
        _HEAD.format(minutes=seconds / 60, every=every, wrong=wrong, right=len(found) - wrong),
        *_not_measured(list(missing)),
        "## The criteria",
        "",
        *(f"- **{c.name}**. {c.text} (Who asks so: {c.source}.)" for c in CRITERIA),
        f"- **{ALONE}**. The check is shown the logits and nothing else. Where an error that rounding explains would "
        "hide a factor of 1.01 as well it says so (incomplete) and gives no verdict.",
        f"- **{SHOWN}**. The check is shown all values that the run names. Ports that show their logits alone are not "
        "asked.",
        "",
        "## What they catch, and what they reject",
        "",
        f"A mistake is *visible in the logits* if it changes them by more than {VISIBLE:g} times their rounding error "
        "(rms), whatever any criterion says. The others can hardly be seen without values in between, or not with this "
        "input at all.",
        "",
        *_main_table(found),
        "",
        "## By format",
        "",
        *_table_by(found, lambda one: one.dtype, DTYPES),
        "",
        "## By checkpoint",
        "",
        *_table_by(found, lambda one: one.checkpoint, dict.fromkeys(one.checkpoint for one in found)),
        "",
        "## By kind of candidate",
        "",
        *_table_by(found, lambda one: one.group, GROUPS),
        "",
        "## What passes",
        "",
        "In how many runs, where in more than one. *refllm check* says of some that it has no verdict.",
        "",
        *_passed(found),
        "",
        *_rejected(found),
        "",
        "## Trainer and rollout",
        "",
        f"Random models of about 20 million parameters of four families, {rollouts.SEEDS} seeds each; a trainer that "
        "rounds as Transformers and a rollout engine that rounds as fused code say log-probabilities of the same "
        "tokens (`refllm check --logprobs`). A mistake in positions is in either or in both: "
        f"{'; '.join(rollouts.MISTAKES)}. It is counted as right if those are blamed that have it, and nobody else.",
        "",
        *rollouts.in_words(pairs),
    ]
    return "\n".join(lines) + "\n"


def _not_measured(missing: list[Part]) -> list[str]:
    if not missing:
        return []
    said = (f"{group} ({sum(part[0] == group for part in missing)})" for group in dict.fromkeys(p[0] for p in missing))
    return [f"Not measured yet are {len(missing)} of {len(parts())} parts: {', '.join(said)}.", ""]


def main() -> int:
    """The command. Exit code 1 where this check rejects a right run, or blames the wrong program."""
    parser = argparse.ArgumentParser(description="Compare the criteria of the field with this check.")
    parser.add_argument("markdown", type=Path, help="the document to write")
    parser.add_argument("--keep", type=Path, help="a folder that keeps what was done")
    parser.add_argument(
        "--every", type=int, default=2, help="plant one of so many mistakes in each checkpoint and format"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--kept", action="store_true", help="write what --keep has, and say what is missing")
    given = parser.parse_args()
    if given.kept and given.keep is None:
        parser.error("--kept needs --keep")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on tiny products its threads wait longer than they work
    found, pairs, seconds = list[Outcome](), list[rollouts.Blamed](), 0.0
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        wanted = [part for part in parts() if not given.kept or _file(part, given.every, given.keep).exists()]
        futures = {part: pool.submit(measured, part, given.every, given.keep) for part in wanted}
        for part, future in futures.items():
            took, values = future.result()
            seconds += took
            print(f"{seconds:.0f} s, {', '.join(part)}: {len(values)}", flush=True)
            if part[0] == _PAIRS:
                pairs += [_blamed(one) for one in values]
            else:
                found += [Outcome(**one) for one in values]
    missing = [part for part in parts() if part not in futures]
    output_file.replace(given.markdown, page(found, pairs, given.every, seconds, missing))
    false = [one for one in found if any(is_false_alarm(one, name) for name in (ALONE, SHOWN))]
    return int(bool(false) or not all(one.right for one in pairs))


def _blamed(values: dict[str, Any]) -> rollouts.Blamed:
    """What was kept of a pair."""
    pairs = {key: tuple(values[key]) for key in ("formats", "ratios")}
    return rollouts.Blamed(**{key: value for key, value in values.items() if key != "right"} | pairs)


if __name__ == "__main__":
    raise SystemExit(main())
