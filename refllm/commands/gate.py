"""A gate for continuous integration: what is wrong in the JSON of a check, what of it is known, and whether it passes.

It reads the plain values that `--json` writes (docs/schema): of `refllm check`, with `--logprobs` too, and of `refllm
check-op`.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from refllm.accuracy.verdicts import SCHEMA
from refllm.errors import InputError
from refllm.storage.input_file import read_object
from refllm.storage.json_text import show

LOG_PROBABILITIES = "log-probabilities"
"""What the value is called that a report on log-probabilities is about."""
_WHERE = ("checkpoint", "candidate", "dtype", "property")
_KEYS = {"value", "operator", "reason", "until", *_WHERE}


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong in a report. name: of the value or the operator, or the kind of misbehaviour. property:
    the broken one of an operator. text: one sentence without a full stop."""

    name: str
    text: str
    property: str = ""


def reports_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports in what `--json` writes: several, or itself the only one."""
    several = found.get("reports")
    return [found] if several is None else list(several)


def cut_short(found: dict[str, Any]) -> str:
    """Why not all was looked at that was to be: by Ctrl-C, or in `refllm check` since the time was up; "" if it was."""
    if found.get("interrupted"):
        return "it was interrupted"
    return "" if "op" in found else str(found.get("ended", ""))


def wrong_in(report: dict[str, Any]) -> list[Wrong]:
    """What is wrong in one report: every defect and none of their consequences. Empty unless it fails."""
    if report["verdict"] != "fails":
        return []
    if "op" in report:
        counted = [one for one in report.get("findings", ()) if one["counts"]] or [report]
        return [Wrong(report["op"], f"{one['property']}: {one['text']}", str(one["property"])) for one in counted]
    if "sigmas" in report:
        return [Wrong(LOG_PROBABILITIES, _token_in_words(report))]
    if report["misbehaviour"] is not None:
        return [Wrong(report["misbehaviour"]["kind"], report["misbehaviour"]["text"])]
    taps = [tap for tap in report["taps"] if tap.get("cause") in ("defect", "place")]
    taps = taps or [tap for tap in report["taps"] if tap["name"] == report["first_failure"]]
    found = [Wrong("ranks", said) for said in report.get("copies", ())]
    found += [Wrong(tap["name"], _in_words(tap)) for tap in taps]
    return found or [Wrong("next tokens", _tokens_in_words(report))]


def _token_in_words(report: dict[str, Any]) -> str:
    """What is wrong in a report on log-probabilities: the whole, or single tokens."""
    row, position = report["worst"]
    whole = f"{float(report['ratio']):.3g} sigma (limit {report['limit']:.3g})"
    token = f"{float(report['sigmas']):.3g} sigma (limit {report['token_limit']:.3g})"
    return f"log-probabilities of {report['source']} are wrong: {whole}; sequence {row}, position {position} {token}"


def _in_words(tap: dict[str, Any]) -> str:
    where, of = ("on its own inputs", tap["isolated"]) if tap["isolated"] else ("end to end", tap["end_to_end"])
    return f"{tap['name']} is wrong ({', '.join(tap['broken'])}): {where} {float(of['ratio']):.3g} sigma"


def _tokens_in_words(report: dict[str, Any]) -> str:
    count = report["next_tokens"]["unexplained"]
    return f"{count} next token{'s' * (count != 1)} changed by more than rounding explains"


def missing_in(report: dict[str, Any]) -> list[str]:
    """What was not looked at, in sentences; beside what is wrong, too."""
    if "op" in report:
        untested = [f"not told from right: {name}" for name in report.get("untested", ())]
        return ([report["ended"] or "no call was examined"] if report["verdict"] == "incomplete" else []) + untested
    if "sigmas" in report:
        return ["the log-probabilities of the tokens before would hold as well"] if report["untested"] else []
    untested = [f"{tap['name']} is untested" for tap in report["taps"] if tap["verdict"] == "untested"]
    return [*report.get("unseen", ()), *report.get("unsaid", ()), *untested]


@dataclass(frozen=True)
class Entry:
    """A finding that is known. name: of a value, "*" standing for any characters, or of an operator. until: the last
    day on which it counts. where: of which checkpoint, candidate, dtype or property it is; what is left out is any."""

    name: str
    of_operator: bool
    reason: str
    until: datetime.date
    where: dict[str, str] = field(default_factory=dict)

    def could_be_in(self, report: dict[str, Any]) -> bool:
        """Whether the report is on what the entry is about."""
        if self.of_operator != ("op" in report) or (self.of_operator and report["op"] != self.name):
            return False
        about = {"candidate": report.get("source"), **report}  # who said log-probabilities
        return all(key == "property" or fnmatchcase(str(about.get(key)), said) for key, said in self.where.items())

    def is_of(self, wrong: Wrong, report: dict[str, Any]) -> bool:
        """Whether this is what is wrong."""
        named = fnmatchcase(wrong.name, self.name) and self.where.get("property", wrong.property) == wrong.property
        return named and self.could_be_in(report)

    def would_show_in(self, report: dict[str, Any]) -> bool:
        """Whether nothing that was left out, or came first, can hide it there."""
        if "op" in report or "sigmas" in report or report["misbehaviour"] is not None:
            return bool(report["verdict"] == "holds")
        failing = (tap["name"] for tap in report["taps"] if tap["verdict"] == "fails")
        hidden = any(fnmatchcase(name, self.name) for name in failing)  # as a consequence of something else
        return not hidden and not report["unseen"]

    def __str__(self) -> str:
        where = "".join(f", {key} {value}" for key, value in self.where.items())
        return f"{self.name}{where} ({self.reason})"


class Known:
    """The entries of a `--known` file, and which of them were seen."""

    def __init__(self, entries: list[Entry], today: datetime.date | None = None) -> None:
        self.entries, self.today = entries, today or datetime.date.today()

    @staticmethod
    def load(path: Path | None, today: datetime.date | None = None) -> "Known":
        """Reads the file; None has no entries. Raises InputError for one that is not as docs/schema/known.json says."""
        if path is None:
            return Known([], today)
        values = read_object(path, InputError)
        if values.get("schema", SCHEMA) != SCHEMA:
            raise InputError(f"--known {path}: schema is {show(values['schema'])}; expected {SCHEMA}")
        listed = values.get("known")
        if not isinstance(listed, list) or set(values) - {"schema", "known"}:
            raise InputError(f'--known {path}: expected {{"schema": {SCHEMA}, "known": [...]}} and no other keys')
        return Known([_entry(f"--known {path}: entry {i + 1}", one) for i, one in enumerate(listed)], today)

    def entry_for(self, wrong: Wrong, report: dict[str, Any]) -> Entry | None:
        """The entry by which it is known today, or None."""
        of_it = (entry for entry in self.entries if entry.is_of(wrong, report))
        return next((entry for entry in of_it if entry.until >= self.today), None)

    def all_known(self, report: dict[str, Any]) -> bool:
        """Whether a report that fails has nothing wrong but what is known, and nothing was left out."""
        wrong = wrong_in(report)
        return bool(wrong) and not missing_in(report) and all(self.entry_for(one, report) for one in wrong)

    def passes(self, found: dict[str, Any]) -> bool:
        """Whether the exit code is 0: every report holds, or has nothing wrong but what is known."""
        reports = reports_of(found)
        complete = bool(reports) and not cut_short(found)
        return complete and all(report["verdict"] == "holds" or self.all_known(report) for report in reports)

    def states(self, found: dict[str, Any]) -> list[tuple[Entry, str]]:
        """Every entry with what became of it: "seen", "past its date" (and seen), "gone", or "not checked", where
        nothing was that it is about."""
        return [(entry, self._state(entry, reports_of(found))) for entry in self.entries]

    def _state(self, entry: Entry, reports: list[dict[str, Any]]) -> str:
        about = [report for report in reports if entry.could_be_in(report)]
        if any(entry.is_of(wrong, report) for report in about for wrong in wrong_in(report)):
            return "seen" if entry.until >= self.today else "past its date"
        return "gone" if about and all(entry.would_show_in(report) for report in about) else "not checked"

    def in_words(self, found: dict[str, Any]) -> Iterator[str]:
        """A sentence for every entry that there is something to say of."""
        for entry, state in self.states(found):
            if state == "seen":
                yield f"known until {entry.until}: {entry}"
            elif state == "past its date":
                yield f"no longer known, since its date was {entry.until}: {entry}"
            elif state == "gone":
                yield f"gone, so take it out of the file: {entry}"

    def to_list(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        """Plain values for JSON: every entry, with its state."""
        return [
            {("operator" if e.of_operator else "value"): e.name, **e.where, "reason": e.reason, "until": str(e.until)}
            | {"state": state}
            for e, state in self.states(found)
        ]


def _entry(where: str, values: Any) -> Entry:
    if not isinstance(values, dict) or ("value" in values) == ("operator" in values):
        raise InputError(f"{where} is {show(values)}; expected an object with a value or an operator")
    strange = next((key for key in values if key not in _KEYS), None)
    if strange is not None:
        raise InputError(f"{where} has the key {show(strange)}; expected {', '.join(sorted(_KEYS))}")
    missing = next((key for key in ("reason", "until") if key not in values), None)
    if missing is not None:
        raise InputError(f'{where} has no "{missing}"')
    wrong = next((key for key, value in values.items() if not isinstance(value, str) or not value.strip()), None)
    if wrong is not None:
        raise InputError(f"{where}: {wrong} is {show(values[wrong])}; expected a text")
    if "property" in values and "value" in values:
        raise InputError(f"{where}: property goes with an operator, not with a value")
    try:
        until = datetime.datetime.strptime(values["until"], "%Y-%m-%d").date()
    except ValueError:
        raise InputError(f"{where}: until is {show(values['until'])}; expected a date such as 2027-01-31") from None
    about = {key: values[key] for key in _WHERE if key in values}
    name = values["operator" if "operator" in values else "value"]
    return Entry(name, "operator" in values, values["reason"], until, about)
