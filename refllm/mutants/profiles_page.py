"""The parts of the validation's page about places, and about right ports that round elsewhere."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from refllm.mutants import chance
from refllm.mutants.validation_page import (
    by_mutant,
    calibration_rows,
    operator,
    outliers,
    ratio_table,
    table,
)

if TYPE_CHECKING:
    from refllm.mutants.runs import Run
    from refllm.mutants.validation import Case, Validation


_MISSED = {
    "eps times 10": "where eps is far below the mean square of a row, and biases keep that large, no bit shows it",
}
"""Mutant -> why it is missed, where it is."""


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


def aims(found: "Validation") -> list[str]:
    """Every aim beside what was measured, also where it is missed."""
    runs = [*found.runs, *found.ports]
    elsewhere = sum(run.elsewhere for run in found.ports)
    defects, planted, places = found.defects, found.planted, found.places
    visible = [case for case in planted if not case.invisible]
    many, some = ("at least 600", "at least 300") if found.weights == "designed" else ("", "")
    rows = [
        ("right runs", many, str(len(runs))),
        ("of them rounding elsewhere than Transformers", some, str(elsewhere)),
        ("false alarms", "0", str(len(found.false_alarms))),
        ("defects in Transformers models, plain inputs", "95 %", _count([case.plain.right for case in defects])),
        ("the same, plain or stressed", "100 %", _count([case.found for case in defects])),
        ("mistakes on top of profiles, named first, plain inputs", "97 %", _count([c.plain.right for c in planted])),
        (
            "the same, plain or stressed (without a cache), of those that change anything",
            "100 %",
            _count([case.found for case in visible]),
        ),
        ("places: hold and are said", "100 %", _count([case.plain.right for case in places])),
        ("places: found under the named policy", "100 %", _count([case.named.right for case in places])),
    ]
    rows += chance.rows(found.ports)
    seeds = ", ".join(f"{name} {value}" for name, value in found.asked.items())
    return [
        "## Aims, and what was measured",
        "",
        *table(("", "aim", "measured"), rows),
        "",
        f"Drawn: {seeds}. Seeds are 0, 1, ...; of `every` pairs of a mistake and a profile, one is planted.",
        "",
    ]


def _count(right: list[bool]) -> str:
    return _share(sum(right), len(right))


def _isolated(runs: list["Run"]) -> np.ndarray:
    return np.array([isolated for run in runs for _, isolated in run.ratios.values()])


def places(found: "Validation") -> list[str]:
    """Roundings that honest code may do elsewhere."""
    return [
        "### Places: roundings that honest code may do elsewhere",
        "",
        "Planted in every layer. They are no defects: where no policy is named, the run has to hold and the report has",
        "to say where it rounds; where the policy of the model is named, the first layer has to be reported for it.",
        "Products that are sums of rounded parts hold where they were said (`--splits 2`).",
        "",
        *table(
            ("area", "place", "checkpoints", "holds and is said", "named: found", "the report's words", "seen in"),
            (_place_row(cases) for cases in by_mutant(found.places)),
        ),
        "",
        *_missed([case.mutant for case in found.places if not case.found]),
    ]


def _missed(names: list[str]) -> list[str]:
    counts = sorted(Counter(names).items())
    lines = [f"- {name}, {n} missed: {_MISSED.get(name, 'not explained yet')}" for name, n in counts]
    return [*lines, ""] if lines else []


def _place_row(cases: list["Case"]) -> tuple[str, ...]:
    first = cases[0]
    return (
        first.area,
        first.mutant,
        str(len(cases)),
        f"{sum(case.plain.right for case in cases)} of {len(cases)}",
        f"{sum(case.named.right for case in cases)} of {len(cases)}",
        "; ".join(sorted({said for case in cases for said in case.plain.said})),
        first.source,
    )


def ports(found: "Validation") -> list[str]:
    """Right ports, and mistakes on top of them."""
    by_profile: dict[str, list[Run]] = defaultdict(list)
    for run in found.ports:
        by_profile[run.attention].append(run)
    wrong = [run for run in found.ports if run.verdict != "holds"]
    rows, elsewhere = calibration_rows(found.ports), sum(run.elsewhere for run in found.ports)
    return [
        "## Right ports that round elsewhere",
        "",
        "A decoder in Torch that shares no code with the check (`refllm/mutants/honest.py`), with a switch wherever",
        "stacks differ. One or two rows of 5 to 89 random tokens, some with padding on the left, some from position",
        "4000 on; no policy is named. *elsewhere*: runs in which a value differs in any bit from the port that rounds",
        "as Transformers.",
        "",
        f"- {len(found.ports)} runs, {elsewhere} of them elsewhere, {len(wrong)} reported",
        *(
            f"- {run.model} {run.dtype}, {run.attention}, {run.inputs}, seed {run.seed}: {run.verdict} {run.reported}"
            for run in wrong
        ),
        "",
        *table(
            ("profile", "runs", "elsewhere", "reported", "isolated, least", "median", "most"),
            (_port_row(profile, runs) for profile, runs in by_profile.items()),
        ),
        "",
        "Measured error over predicted error of the recognised profile:",
        "",
        *ratio_table([row for row in rows if row["operator"] == "all"], with_operator=False),
        "",
        *outliers([row for row in rows if row["operator"] != "all" and row["way"] == "end to end"]),
        "",
        *chance.lines(found.ports),
        *_planted(found),
    ]


def _port_row(profile: str, runs: list["Run"]) -> tuple[str, ...]:
    isolated = _isolated(runs)
    elsewhere, wrong = sum(run.elsewhere for run in runs), sum(run.verdict != "holds" for run in runs)
    figures = (f"{f(isolated):.2f}" for f in (np.min, np.median, np.max))
    return (profile, str(len(runs)), str(elsewhere), str(wrong), *figures)


def _planted(found: "Validation") -> list[str]:
    by_mistake: dict[str, list[bool]] = defaultdict(list)
    stressed: dict[str, list[bool]] = defaultdict(list)
    for case in found.planted:
        by_mistake[case.mistake].append(case.plain.right)
        if case.stressed is not None:
            stressed[case.mistake].append(case.stressed.right)
    late = [case for case in found.planted if not case.plain.right]
    return [
        "### Mistakes on top of these profiles",
        "",
        "Planted in one layer, bfloat16. Named: the first value that is reported is the one that the mistake is in, as",
        "a defect. Stressed inputs (far positions, small and large embeddings, padding) where plain ones do not",
        "suffice. What changes no more than two elements of the value that it is in, in any of these runs, to the bit,",
        "is none that anybody could see, and is not counted.",
        "",
        *table(
            ("mistake", "plain", "stressed"),
            (
                (mistake, _count(right), _count(stressed[mistake]) if stressed[mistake] else "")
                for mistake, right in by_mistake.items()
            ),
        ),
        "",
        *_missed([case.mistake for case in found.planted if not case.found]),
        "Not named by plain inputs:" if late else "All are named by plain inputs.",
        "",
        *(
            f"- {case.mistake}, {case.profile}, {case.checkpoint}: "
            + (f"{operator(case.plain.reported)} reported; " if case.plain.reported else "nothing reported; ")
            + (f"named with {case.stressed.inputs}" if case.stressed and case.stressed.right else "not named at all")
            + (f", and changes {case.changed} elements of that value at most" if case.changed is not None else "")
            for case in late
        ),
        "",
    ]
