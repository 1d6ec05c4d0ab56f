"""Writes docs/mutants.md: the catalogue of known bugs, and how many of them a test finds: ours, and typical ones.

    python -m refllm.opcheck.mutants_page docs/mutants.md --json docs/mutants.json      # half an hour on one core
    python -m refllm.opcheck.mutants_page docs/mutants.md --json docs/mutants.json --resume     # what is missing there
    python -m refllm.opcheck.mutants_page docs/mutants-backward.md --json docs/mutants-backward.json --backward

The last is the same of gradients (`gradient_mutants_page.py`). What was measured lies in the JSON file, which is
written after every bug, so that a run that was ended goes on. Exit code 1 if our own check misses a bug or rejects what
is none.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.opcheck import mutants_measured
from refllm.opcheck.mutants_measured import Measured, Results
from refllm.storage import output_file
from refllm.strategies.levels import LEVELS
from refllm.terminal.status_line import StatusLine

if TYPE_CHECKING:
    from refllm.kernels.mutants import Mutant

TARGETS = {"torch": 30.0, "triton": 120.0}
"""Seconds in which a counterexample has to be found and made small, by form."""


def page(results: Results, backward: bool = False) -> str:
    """The page as a whole. backward: that of gradients."""
    from refllm.opcheck import gradient_mutants_page

    first = gradient_mutants_page.measured_part(results) if backward else measured_part(results)
    return first + "\n" + catalogue_part(results, backward)


def catalogue_part(results: Results, backward: bool = False) -> str:
    """Every mutant by operator, what changes nothing, and bugs that no operator has."""
    from refllm.kernels.mutants import catalogue
    from refllm.kernels.mutants.not_applicable import IN_NO_GRADIENT, NOT_APPLICABLE

    mutants = catalogue(backward=backward)
    lines = [
        "## The catalogue",
        "",
        f"{sum(not m.equivalent for m in mutants)} bugs. Each is a function that can be called, checked, or read:",
        "`refllm.kernels.mutants.built:NAME`, where NAME is the operator and the name with underscores, and `triton_`",
        "before it for a Triton kernel. A source that is no issue is the area of a one-line mistake. A defect is",
        "wrong whatever else the kernel does; a place is where honest code may round too, so a report shows it, and",
        "calls it wrong only with `--policy fused`. The words after `place` are those of the report. The level is that",
        "of the inputs that show a bug first; an option is named where the defaults do not find it.",
        "",
    ]
    for operator in mutants_measured.operators(backward):
        own = [m for m in mutants if m.operator == operator and not m.equivalent]
        lines += [
            f"### {operator}",
            "",
            *table(("name", "form", "what", "kind", "found at", "source"), (_row(m, results.of(m)) for m in own)),
            "",
        ]
    lines += [
        "## Changes that nobody can see",
        "",
        "Listed so that nobody plants them again, and checked: the check must not reject them.",
        "",
        *table(
            ("operator", "name", "form", "what", "why it is no bug"),
            ((m.operator, m.name, m.form, m.what, m.equivalent) for m in mutants if m.equivalent),
        ),
        "",
        "## Real bugs that no operator here can have",
        "",
        *table(("source", "why"), IN_NO_GRADIENT if backward else NOT_APPLICABLE),
        "",
    ]
    return "\n".join(lines)


def _row(mutant: "Mutant", found: Measured | None) -> tuple[str, ...]:
    kind = f"place: {mutant.place}" if mutant.place else "defect"
    at = "not found" if found is None or not found.found else found.level
    at += f", `{found.asked}`" if found is not None and found.found and found.asked else ""
    return mutant.name, mutant.form, mutant.what, kind, at, mutant.source


def measured_part(results: Results) -> str:
    """What was measured, without the catalogue."""
    from refllm.kernels.mutants import catalogue

    bugs = [(m, one) for m in catalogue() if not m.equivalent and (one := results.of(m)) is not None]
    names = list(next(iter(results.typical.values()), {}))
    rows = []
    for operator, typical in results.typical.items():
        own = [(m, one) for m, one in bugs if m.operator == operator]
        by_form = (share_found(one for m, one in own if m.form == form) for form in TARGETS)
        rows.append((operator, *by_form, *(rate(*typical[name]) for name in names)))
    every = [share_found(one for m, one in bugs if m.form == form) for form in TARGETS]
    theirs = [rate(*map(sum, zip(*(by[name] for by in results.typical.values()), strict=True))) for name in names]
    rows.append(("**all**", *every, *theirs))
    found = Counter(one.by for _, one in bugs if one.found)
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        "# How good is a test of a kernel?",
        "",
        "Every bug of a catalogue is planted in the operator that has it, and a test is asked. Whoever writes a test",
        "for a kernel can ask the same of it:",
        "",
        "    refllm audit rms_norm --test my_tests.py:test_my_rms_norm",
        "",
        "where `test_my_rms_norm(fn)` calls `fn` as it would call the kernel, and raises if it dislikes it. It is",
        "given the right operator first: a test that rejects that is void.",
        "",
        "Written by a command, with what it measured beside it:",
        "",
        "    python -m refllm.opcheck.mutants_page docs/mutants.md --json docs/mutants.json",
        "",
        f"Measured with {versions}.",
        "",
        "## Kill rates",
        "",
        "The share of bugs that are found, and how many there are. `check-op` is `refllm check-op` on its fixed calls",
        "and, for plain Torch, up to 100 drawn ones. A bug counts as found if it is in every dtype in which it makes a",
        "difference. The others are tests as they are usually written: one call on normally distributed numbers of a",
        "round shape (4 x 1024 for the norms), compared with plain Torch by `torch.allclose` with rtol = atol = 1e-2",
        "or `torch.testing.assert_close`. They are asked for the bugs in plain Torch that make a difference in their",
        "dtype.",
        "",
        "Bugs of whole models, and whether `refllm check` names them: [docs/validation.md](../"
        + "docs/validation.md).",
        "",
        *table(("operator", "check-op, torch", "check-op, triton", *names), rows),
        "",
        "By property: " + ", ".join(f"{by} {count}" for by, count in found.most_common()) + ".",
        "",
        *by_level(bugs),
        *places_told(bugs),
        *_times(bugs),
    ]
    wrong = [(m, one) for m in catalogue() if (one := results.of(m)) is not None and one.found == bool(m.equivalent)]
    if wrong:
        lines += ["Survived, or rejected though nothing is wrong:", ""]
        lines += [f"- {m.operator}, {m.form}: {m.what}" for m, _ in wrong] + [""]
    return "\n".join(lines)


Bugs = Sequence[tuple["Mutant", Measured]]


def by_level(bugs: Bugs) -> list[str]:
    """The lines on levels: at which inputs each defect shows first."""
    places = [m for m, one in bugs if _is_a_place(m, one)]
    defects = [(m, one) for m, one in bugs if m not in places]
    asked = {"": "by default", "--level hostile": "with `--level hostile`"}
    rows = []
    for operator in (*dict.fromkeys(m.operator for m, _ in bugs), "**all**"):
        own = [one for m, one in defects if operator in (m.operator, "**all**")]
        levels = (sum(one.found and one.level == level for one in own) for level in LEVELS)
        rows.append((operator, *map(str, levels), str(sum(operator in (m.operator, "**all**") for m in places))))
    told = Counter(one.asked for _, one in defects if one.found)
    return [
        "## Levels",
        "",
        "Defects by the level of inputs that shows each first. `basic` and `contract` count by default, `hostile` with",
        "`--level hostile`. Places are where honest code may round too, or add in another order.",
        "",
        *table(("operator", *LEVELS, "places"), rows),
        "",
        f"Of {len(defects)} defects are found: "
        + ", ".join(f"{told[option]} {words}" for option, words in asked.items())
        + ".",
        "",
    ]


def _is_a_place(mutant: "Mutant", one: Measured) -> bool:
    """Whether honest code may do so too: round there, or add in an order that hangs on the batch."""
    return bool(mutant.place) or one.asked == mutants_measured.BITWISE


def places_told(bugs: Bugs) -> list[str]:
    """The lines on places: what the report says of each, and the option that calls it wrong."""
    rows = [
        (m.operator, m.form, m.name, one.rounds or "nothing: every value is right", f"`{one.asked}`")
        for m, one in bugs
        if _is_a_place(m, one)
    ]
    return [
        "## Places",
        "",
        "Each holds by default, and the report says where it rounds; the option calls it wrong. A row whose bits hang",
        "on its batch breaks a promise of our own kernels, not the contract: `--bitwise` asks for it.",
        "",
        *table(("operator", "form", "name", "the report says", "found with"), rows),
        "",
    ]


def _times(bugs: Bugs) -> list[str]:
    rows = []
    for form, target in TARGETS.items():
        own = [(m, one) for m, one in bugs if m.form == form and one.found]
        if own:
            worst, longest = max(own, key=lambda pair: pair[1].seconds)
            half = statistics.median(one.seconds for _, one in own)
            slow = sum(one.seconds > 10 for _, one in own)
            words = f"{longest.seconds:.1f} s ({worst.operator}: {worst.what})"
            rows.append((form, f"{target:.0f} s", f"{half:.1f} s", str(slow), words))
    return [
        "## Time to a counterexample",
        "",
        "As a command takes it, in a process of its own and with the counterexample made small; two bugs were measured",
        "at a time.",
        "",
        *table(("form", "target", "median", "over 10 s", "longest"), rows),
        "",
    ]


def share_found(own: Iterable[Measured]) -> str:
    """ "98 % of 50", "" of none."""
    each = [one.found for one in own]
    return rate(sum(each), len(each))


def rate(found: int, of: int) -> str:
    """The share as text, "" of none."""
    return f"{100 * found / of:.0f} % of {of}" if of else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m refllm.opcheck.mutants_page", description=main.__doc__)
    parser.add_argument("page", type=Path, help="the file to write")
    parser.add_argument("--json", type=Path, required=True, help="the file of what is measured")
    parser.add_argument("--resume", action="store_true", help="measure what that file does not have")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure")
    parser.add_argument("--backward", action="store_true", help="bugs of gradients")
    parser.add_argument("--most", type=int, help="measure so many at a time, of what is missing")
    given = parser.parse_args(arguments)
    with StatusLine(sys.stderr) as step:
        how = given.resume, given.workers, step, given.backward, given.most
        results = mutants_measured.measure(given.json, *how)
    output_file.replace(given.page, page(results, given.backward))
    return 0 if mutants_measured.holds(results, given.backward) else 1


if __name__ == "__main__":
    sys.exit(main())
