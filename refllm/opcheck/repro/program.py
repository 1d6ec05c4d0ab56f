"""Puts the program together: imports, the candidate, the arrays of the call, and the check."""

import textwrap

from refllm.opcheck import inputs
from refllm.opcheck.candidate import Candidate
from refllm.opcheck.examine import Finding
from refllm.opcheck.formulas import FORMULAS
from refllm.opcheck.repro.case import WIDTH, Case, indented
from refllm.opcheck.repro.checks import check
from refllm.opcheck.repro.source import candidate_code
from refllm.opcheck.repro.unread import filled_memory


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
        *([] if case.kind == "pair" else [*finding.call.code(), *_placed(case), ""]),
        *check(case),
    ]
    return "\n".join(lines) + "\n"


def _imports(case: Case) -> list[str]:
    own, needs = candidate_code(case.candidate)
    special = {"hangs": {"faulthandler"}, "crashes": {"os"}}.get(case.finding.property, set())
    lines = [f"import {name}" for name in sorted({"sys"} | special | needs)]
    lines += ["", *(["import ml_dtypes"] if case.numpy else []), "import numpy as np", "import torch"]
    if case.candidate.interpreted:
        lines.append("from refllm.kernels import interpreted")
    # Before the candidate, which may import torch.empty by name.
    return [*lines, *(["", *filled_memory(case.numpy)] if case.fills else []), "", *own]


_AS_NUMPY = """
def as_numpy(x):
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype is not torch.bfloat16:
        return x.numpy()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


"""


def _helpers(case: Case) -> list[str]:
    lines = []
    if case.whole:
        lines += ["", *FORMULAS[case.call.operator].splitlines(), "", ""]
    if case.numpy:
        lines += _AS_NUMPY.splitlines()
    if case.kind == "pair":
        made = [*case.call.code(), *_placed(case), "return arguments, keywords"]
        run = [*case.called(), f"return [{case.read('x')} for x in got]"]
        lines += ["", "def make():", *indented(made), "", "", "def run(arguments, keywords):", *indented(run), "", ""]
    return lines


def _placed(case: Case) -> list[str]:
    """The arrays on their device; one row of them where that is what fails."""
    lines = []
    if case.candidate.device != "cpu":
        lines = [
            "def there(x):",
            f"    return x.to({case.candidate.device!r}) if isinstance(x, torch.Tensor) else x",
            "",
            "",
            "arguments, keywords = [there(x) for x in arguments], {n: there(x) for n, x in keywords.items()}",
        ]
    if case.alone:
        row, arguments = case.row, case.call.tensors()[0]
        cut = inputs.row_alone(case.call, arguments, {}, row)[0]
        which = [i for i, (a, b) in enumerate(zip(arguments, cut, strict=True)) if a is not b]
        lines += [
            f"whole, cut = list(arguments), {which}",
            f"arguments = [x[{row}:{row + 1}] if i in cut else x for i, x in enumerate(whole)]  # one row alone",
        ]
        if any(n == "key_mask" and v is not None for n, v in case.call.keywords):
            lines.append(f'keywords = {{**keywords, "key_mask": keywords["key_mask"][{row}:{row + 1}]}}')
    return lines
