"""The JSON of a check as JUnit XML, which the servers of continuous integration show as a table of tests.

A run of `check` on one checkpoint, dtype and input is a test case, and so are the log-probabilities of one program in
one dtype and temperature; of `check-op` every property of one operator and dtype is.
"""

import re
from typing import Any
from xml.etree import ElementTree as ET

from refllm.commands.gate import LOG_PROBABILITIES, Known, cut_short, missing_in, reports_of, wrong_in

_OF_THE_INTERPRETER = ("bounds", "race", "overflow")
"""Properties that are looked at in interpreted kernels alone, so that of other candidates nothing is said."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_text(found: dict[str, Any], known: Known) -> str:
    """The text of the XML file. found: what `--json` writes. known: what is skipped in place of failing."""
    suite = ET.Element("testsuite", name="refllm")
    for report in reports_of(found):
        _of_operator(suite, report, known) if "op" in report else _of_run(suite, report, known)
    if why := cut_short(found):
        _outcome(_case(suite, "refllm", "interrupted"), "failure", "incomplete", why)
    counts = {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}
    root = ET.Element("testsuites")
    for element in (root, suite):
        for name, path in counts.items():
            element.set(name, str(len(suite.findall(path))))
        element.set("errors", "0")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _of_run(suite: ET.Element, report: dict[str, Any], known: Known) -> None:
    name = f"{report.get('candidate')}, {report['dtype']}, {report.get('inputs')}"
    if "sigmas" in report:
        of = f", temperature {report['temperature']}" if report["temperature"] != 1 else ""
        name = f"{report['source']}, {report['dtype']}{of}, {LOG_PROBABILITIES}"
    _judge(_case(suite, f"refllm.check.{report['checkpoint']}", name), report, known)


def _of_operator(suite: ET.Element, report: dict[str, Any], known: Known) -> None:
    from refllm.opcheck.examine import PROPERTIES

    broken = {wrong.property for wrong in wrong_in(report)}
    for name in [name for name in PROPERTIES if name not in _OF_THE_INTERPRETER or name in broken]:
        of = f"refllm.check-op.{report['op']}.{report['dtype']}"
        case = _case(suite, of, f"{report['candidate']}: {name}")
        if not broken or name in broken:
            _judge(case, report, known, name)
        else:
            _outcome(case, "skipped", "", f"not told apart from another finding: {', '.join(sorted(broken))}")


def _judge(case: ET.Element, report: dict[str, Any], known: Known, property: str = "") -> None:
    if report["verdict"] == "fails":
        wrong = [one for one in wrong_in(report) if one.property == property]
        entry = known.entry_for(wrong[0], report) if known.all_known(report) else None
        if entry is not None:
            _outcome(case, "skipped", "", f"known until {entry.until}: {entry.reason}")
        else:
            _outcome(case, "failure", "fails", wrong[0].text, [one.text for one in wrong] + missing_in(report))
    elif report["verdict"] == "incomplete":
        missing = missing_in(report)
        _outcome(case, "failure", "incomplete", missing[0], missing)


def _case(suite: ET.Element, of: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_xml(of), name=_xml(name))


def _outcome(case: ET.Element, tag: str, kind: str, message: str, lines: list[str] | None = None) -> None:
    outcome = ET.SubElement(case, tag, {"message": _xml(message)} | ({"type": kind} if kind else {}))
    outcome.text = _xml("\n".join(lines or [])) or None


def _xml(text: str) -> str:
    """The text without the characters that no XML may hold."""
    return _NOT_XML.sub("\ufffd", text)
