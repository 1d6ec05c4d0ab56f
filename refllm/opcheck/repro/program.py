"""Puts the program together: imports, the candidate, the arrays of the call, and the check."""

import textwrap

from refllm.opcheck.candidate import Candidate
from refllm.opcheck.examine import Finding
from refllm.opcheck.repro.case import WIDTH, Case, indented, made
from refllm.opcheck.repro.checks import check
from refllm.opcheck.repro.source import candidate_code
from refllm.opcheck.repro.unread import filled_memory
from refllm.ops.contracts import CONTRACTS
from refllm.strategies.arrays import Array


def reproduction(finding: Finding, candidate: Candidate, policy: str, limit: float) -> str:
    """The program. limit: seconds after which it hangs."""
    case = Case(finding, candidate, policy, limit)
    said = textwrap.fill(f"{finding.text}.", WIDTH).replace("\\", "/").replace('"""', "'''")
    lines = [
        f'"""{finding.call.operator}: {candidate.name}, {finding.property}.',
        "",
        *said.splitlines(),
        "",
        'Written by refllm check-op. Exit code 1: the failure is there."""',
        "",
        *_imports(case),
        "",
        *_helpers(case),
        *([] if case.kind in ("pair", "crashes") else [*made(case), ""]),
        *check(case),
    ]
    return "\n".join(lines) + "\n"


def _imports(case: Case) -> list[str]:
    own, needs = candidate_code(case.candidate)
    special = {"hangs": {"faulthandler"}, "crashes": {"os"}}.get(case.finding.property, set())
    lines = [f"import {name}" for name in sorted({"sys"} | special | needs)]
    lines += ["", *(["import ml_dtypes"] if _bfloat16_arrays(case) else []), "import numpy as np"]
    lines += [] if case.numpy else ["import torch"]
    if case.candidate.interpreted:
        lines.append("from refllm.kernels import interpreted")
    # Before the candidate, which may import torch.empty by name.
    return [*lines, *(["", *filled_memory(case.numpy)] if case.fills else []), "", *own]


def _bfloat16_arrays(case: Case) -> bool:
    """Whether there are NumPy arrays of a type that NumPy does not have."""
    given = (*case.call.arguments, *(x for _, x in case.call.keywords))
    return case.numpy and any(isinstance(x, Array) and x.dtype == "bfloat16" for x in given)


def _helpers(case: Case) -> list[str]:
    lines = []
    if case.whole:
        lines += ["", *CONTRACTS[case.call.operator].program.splitlines(), "", ""]
    if case.kind == "pair":
        made_here = [*made(case), "return arguments, keywords"]
        run = [*case.called(), f"return [{case.read('x')} for x in got]"]
        lines += [
            "",
            "def make():",
            *indented(made_here),
            "",
            "",
            "def run(arguments, keywords):",
            *indented(run),
            "",
            "",
        ]
    return lines
