"""Puts the program together: imports, the candidate, the arrays of the call, and the check."""

import textwrap

from refllm.opcheck.candidate import Candidate
from refllm.opcheck.examine import Finding
from refllm.opcheck.repro.by_autograd import gradients_code
from refllm.opcheck.repro.checks import check
from refllm.opcheck.repro.shown import WIDTH, Shown, indented, made
from refllm.opcheck.repro.source import candidate_code
from refllm.opcheck.repro.unread import filled_memory
from refllm.ops.contracts import contract_of
from refllm.strategies.arrays import Array


def reproduction(finding: Finding, candidate: Candidate, policy: str, limit: float) -> str:
    """The program. limit: seconds after which it hangs."""
    shown = Shown(finding, candidate, policy, limit)
    said = textwrap.fill(f"{finding.text}.", WIDTH).replace("\\", "/").replace('"""', "'''")
    lines = [
        f'"""{finding.call.operator}: {candidate.name}, {finding.property}.',
        "",
        *said.splitlines(),
        "",
        'Written by refllm check-op. Exit code 1: the failure is there."""',
        "",
        *_imports(shown),
        "",
        *_helpers(shown),
        *([] if shown.way in ("pair", "crashes") else [*made(shown), ""]),
        *check(shown),
    ]
    return "\n".join(lines) + "\n"


def _imports(shown: Shown) -> list[str]:
    own, needs = candidate_code(shown.candidate)
    special = {"hangs": {"faulthandler"}, "crashes": {"os"}}.get(shown.finding.property, set())
    needs |= {"math"} if shown.whole and "math." in contract_of(shown.call.operator).program else set()
    lines = [f"import {name}" for name in sorted({"sys"} | special | needs)]
    lines += ["", *(["import ml_dtypes"] if _bfloat16_arrays(shown) else []), "import numpy as np"]
    lines += [] if shown.numpy else ["import torch"]
    if shown.candidate.interpreted:
        lines.append("from refllm.kernels import interpreted")
    own = [*own, "", "", *gradients_code(shown.call.operator)] if shown.candidate.autograd else own
    # Before the candidate, which may import torch.empty by name.
    return [*lines, *(["", *filled_memory(shown.numpy)] if shown.fills else []), "", *own]


def _bfloat16_arrays(shown: Shown) -> bool:
    """Whether there are NumPy arrays of a type that NumPy does not have."""
    given = (*shown.call.arguments, *(x for _, x in shown.call.keywords))
    return shown.numpy and any(isinstance(x, Array) and x.dtype == "bfloat16" for x in given)


def _helpers(shown: Shown) -> list[str]:
    lines = []
    if shown.whole:
        lines += ["", *contract_of(shown.call.operator).program.splitlines(), "", ""]
    if shown.way == "pair":
        made_here = [*made(shown), "return arguments, keywords"]
        run = [*shown.called(), f"return [{shown.read('x')} for x in got]"]
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
