"""Writes docs/mutants.md: the catalogue of known bugs, and how many of them a test finds: ours, and typical ones.

    python -m refllm.opcheck.mutants_page docs/mutants.md      # six minutes on one core
    python -m refllm.opcheck.mutants_page docs/mutants.md --catalogue-only     # keeps what was measured

Exit code 1 if our own check misses a bug or rejects what is none.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

if TYPE_CHECKING:
    from refllm.kernels.mutants import Mutant
    from refllm.opcheck.audit import AuditReport

CATALOGUE = "## The catalogue"
"""The heading from which on the page holds nothing that was measured."""
_OURS = "check-op"
_DRAWN = {"torch": 100, "triton": 0}
"""Examples that check-op draws after its fixed ones, which are enough for the Triton kernels."""


def catalogue_part() -> str:
    """The page from `CATALOGUE` on: every mutant by operator, what changes nothing, and bugs that no operator has."""
    from refllm import kernels
    from refllm.kernels.mutants import catalogue
    from refllm.kernels.mutants.not_applicable import NOT_APPLICABLE

    mutants = catalogue()
    lines = [
        CATALOGUE,
        "",
        f"{sum(not m.equivalent for m in mutants)} bugs. Each is a function that can be called, checked, or read:",
        "`refllm.kernels.mutants.built:NAME`, where NAME is the operator and the name with underscores, and `triton_`",
        "before it for a Triton kernel. A source that is no issue is the area of a one-line mistake. A defect is",
        "wrong whatever else the kernel does; a place is where honest code may round too, so a report shows it, and",
        "calls it wrong only with `--policy fused`. The words after `place` are those of the report.",
        "",
    ]
    for operator in kernels.OPERATORS:
        own = [m for m in mutants if m.operator == operator and not m.equivalent]
        lines += [f"### {operator}", "", *_table(("name", "form", "what", "kind", "source"), map(_row, own)), ""]
    lines += [
        "## Changes that nobody can see",
        "",
        "Listed so that nobody plants them again, and checked: the check must not reject them.",
        "",
        *_table(
            ("operator", "name", "form", "what", "why it is no bug"),
            ((m.operator, m.name, m.form, m.what, m.equivalent) for m in mutants if m.equivalent),
        ),
        "",
        "## Real bugs that no operator here can have",
        "",
        *_table(("source", "why"), NOT_APPLICABLE),
        "",
    ]
    return "\n".join(lines)


def _row(mutant: "Mutant") -> tuple[str, ...]:
    kind = f"place: {mutant.place}" if mutant.place else "defect"
    return mutant.name, mutant.form, mutant.what, kind, mutant.source


def measure(step: StatusLine) -> tuple["AuditReport", dict[str, dict[str, "AuditReport"]], float]:
    """Our check on the whole catalogue, typical tests (by operator, by name) on the torch part, and the seconds."""
    from refllm import kernels
    from refllm.opcheck.audit import AuditReport, audit
    from refllm.opcheck.typical_tests import typical_tests

    start = time.monotonic()
    parts = (audit(form=form, max_examples=drawn, progress=step) for form, drawn in _DRAWN.items())
    ours = AuditReport(_OURS, tuple(outcome for part in parts for outcome in part.outcomes))
    typical = {
        operator: {
            name: audit(operator, test, dtype=name.rpartition(", ")[2], progress=step)
            for name, test in typical_tests(operator).items()
        }
        for operator in kernels.OPERATORS
    }
    step.clear()
    return ours, typical, time.monotonic() - start


def measured_part(ours: "AuditReport", typical: dict[str, dict[str, "AuditReport"]], seconds: float) -> str:
    """The page up to `CATALOGUE`."""
    import torch

    names = list(next(iter(typical.values())))
    rows = []
    for operator, reports in typical.items():
        own = ours.of(operator)
        by_form = (_rate([o for o in own.bugs if o.form == form]) for form in ("torch", "triton"))
        rows.append((operator, *by_form, *(_rate(reports[name].bugs) for name in names)))
    every = [_rate([o for o in ours.bugs if o.form == form]) for form in ("torch", "triton")]
    theirs = [_rate([o for reports in typical.values() for o in reports[name].bugs]) for name in names]
    rows.append(("**all**", *every, *theirs))
    found: dict[str, int] = {}
    for outcome in ours.bugs:
        found[outcome.by] = found.get(outcome.by, 0) + outcome.killed
    first = sum(o.killed and o.examples == 1 for o in ours.bugs)
    ten = sum(o.killed and o.examples <= 10 for o in ours.bugs)
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
        "Written by a command:",
        "",
        "    python -m refllm.opcheck.mutants_page docs/mutants.md",
        "",
        f"Measured with torch {torch.__version__}, Python {platform.python_version()}, in {seconds:.0f} s.",
        "",
        "## Kill rates",
        "",
        "The share of bugs that are found, and how many there are. `check-op` is `refllm check-op` without shrinking,",
        "on its fixed calls and, for plain Torch, up to 100 drawn ones. A bug counts as found if it is in every dtype",
        "in which it makes a difference. Triton kernels are asked `--bitwise` besides: a row alone must have the bits",
        "that it has in its batch, as ours promise, and some of their bugs break nothing else. The others are tests as",
        "they are usually written: one call on normally distributed numbers of a round shape (4 x 1024 for the norms),",
        "compared with plain Torch by `torch.allclose` with rtol = atol = 1e-2 or `torch.testing.assert_close`.",
        "They are asked for the bugs in plain Torch that make a difference in their dtype.",
        "",
        "Bugs of whole models, and whether `refllm check` names them: [docs/validation.md](../"
        + "docs/validation.md).",
        "",
        *_table(("operator", f"{_OURS}, torch", f"{_OURS}, triton", *names), rows),
        "",
        f"{first} of {len(ours.bugs)} bugs are found by the first call, {ten} by one of the first ten. By property:",
        ", ".join(f"{by} {count}" for by, count in sorted(found.items(), key=lambda pair: -pair[1])) + ".",
        "",
        *_by_level(ours),
    ]
    if ours.survivors or ours.rejected:
        lines += ["Survived, or rejected though nothing is wrong:", ""]
        lines += [f"- {o.operator}, {o.form}: {o.what}" for o in (*ours.survivors, *ours.rejected)] + [""]
    return "\n".join(lines)


def _by_level(ours: "AuditReport") -> list[str]:
    """At which level each bug is found first, in the first dtype in which it makes a difference."""
    levels = ("basic", "contract", "hostile")
    rows = []
    for operator in (*ours.operators, "**all**"):
        own = ours.bugs if operator == "**all**" else ours.of(operator).bugs
        defects, places = ([o for o in own if bool(o.place) is wanted] for wanted in (False, True))
        rows.append((operator, *(str(sum(o.level == one for o in defects)) for one in levels), str(len(places))))
    return [
        "Defects by the level of inputs at which each is found first, and places, where honest code may round too: a",
        "report shows those, and they are wrong under `--policy fused` alone.",
        "",
        *_table(("operator", *levels, "places"), rows),
        "",
    ]


def _rate(outcomes: Sequence) -> str:
    killed = sum(o.killed for o in outcomes)
    return f"{100 * killed / len(outcomes):.0f} % of {len(outcomes)}" if outcomes else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m refllm.opcheck.mutants_page", description=main.__doc__)
    parser.add_argument("page", type=Path, help="the file to write")
    parser.add_argument("--catalogue-only", action="store_true", help="measure nothing: keep that part of the page")
    given = parser.parse_args(arguments)
    if given.catalogue_only:
        head = given.page.read_text(encoding="utf-8").partition(CATALOGUE)[0]
        output_file.replace(given.page, head + catalogue_part())
        return 0
    with StatusLine(sys.stderr) as step:
        ours, typical, seconds = measure(step)
    text = measured_part(ours, typical, seconds) + "\n" + catalogue_part()
    output_file.replace(given.page, text)
    return 0 if ours.holds else 1


if __name__ == "__main__":
    sys.exit(main())
