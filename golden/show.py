"""Tables for a terminal: which goldens there are, what one holds, what was found, what has changed."""

import math
from collections.abc import Sequence
from typing import Any

from refllm.golden.exact import Golden
from refllm.golden.make_vectors import Change
from refllm.golden.verify import Finding, Verified
from refllm.terminal.fitted_table import Table

_COMPARED = "largest difference to the witness in sigma of float32"


def figure(x: float) -> str:
    """A number in a few characters; empty for 0."""
    return "0" if x == 0 else f"{x:.2g}" if math.isfinite(x) else str(x)


def table_of_cases(manifest: dict[str, Any], names: Sequence[str]) -> Table:
    """One row per case."""
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("golden", "what it is for", "outputs", "dtypes", "witness"):
        table.add_column(column, overflow="fold")
    for name in names:
        entry = manifest["cases"][name]
        outputs = ", ".join(f"{n} {shape}" for n, shape in entry["outputs"].items() if not n.startswith("model."))
        taps = sum(n.startswith("model.") for n in entry["outputs"])
        found = max(entry["witness"]["max_sigma_float32"].values(), default=math.nan)
        dtypes = ", ".join(d.replace("float", "f") for d in entry["dtypes"])
        table.add_row(name, entry["what"], outputs + (f", {taps} taps" if taps else ""), dtypes, figure(found))
    return table


def closing_of_cases(manifest: dict[str, Any], names: Sequence[str]) -> str:
    """The last line under the table."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        for package, number in manifest["cases"][name]["versions"].items():
            found.setdefault(package, {})[number] = None
    made = ", ".join(f"{package} {' and '.join(numbers)}" for package, numbers in found.items())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    files = f"{len(manifest['files'])} files, {size / 1e6:.1f} MB"
    return f"{len(names)} goldens, {files}, made with {made}; witness: {_COMPARED}"


def description(one: Golden) -> list[str]:
    """What a golden is, in lines."""
    about = one.about
    lines = [f"{one.case.name}: {about['what']}"]
    if about["kind"] == "operator":
        given = ", ".join(_argument(x) for x in about["arguments"])
        named = ", ".join(f"{n}={_argument(x)}" for n, x in about["keywords"].items())
        lines.append(f"call:     {about['operator']}({', '.join(x for x in (given, named) if x)})")
    else:
        source = about["checkpoint"] or f"config and weights in this golden ({about['model']})"
        lines.append(f"model:    {about['class']}, {source}, config {about['config_hash']}")
        if about["chunks"]:
            lines.append(f"fed in:   pieces of {', '.join(map(str, about['chunks']))} tokens with a cache")
    worst = max(about["witness"]["max_abs"].values(), default=math.nan)
    lines.append(f"witness:  {about['witness']['who']}; largest difference {figure(worst)}")
    return lines


def _argument(x: Any) -> str:
    return x["tensor"] if isinstance(x, dict) else repr(x)


def table_of_tensors(one: Golden) -> Table:
    """Every input and output of a golden; of the outputs also the rms of the predicted error."""
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("tensor", "shape", "dtype", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "tensor" else "right")
    keys = list(one.sigma)
    for key in keys:
        table.add_column(f"sigma {key.replace('.', ' ')}", justify="right")
    from refllm.golden.run import rms

    for name, x in one.inputs.items():
        table.add_row(name, str(list(x.shape)), str(x.dtype), *_range(x), *["" for _ in keys])
    for name, x in one.exact.items():
        sigma = [figure(rms(one.sigma[key][name])) for key in keys]
        table.add_row(f"-> {name}", str(list(x.shape)), str(x.dtype), *_range(x), *sigma)
    return table


def _range(x: Any) -> tuple[str, str]:
    import numpy as np

    if not x.size:
        return "", ""
    if x.dtype.kind != "f":
        return str(x.min()), str(x.max())
    nan = " and NaN" if np.isnan(x).any() else ""
    values = x[~np.isnan(x)]
    return (f"{values.min():.4g}", f"{values.max():.4g}{nan}") if values.size else ("NaN", "NaN")


def table_of_verified(results: Sequence[Verified]) -> Table:
    """One row per backend and dtype."""
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("backend", "dtype", "goldens", "worst rms", "worst element", "", ""):
        table.add_column(column, justify="left" if column in ("backend", "dtype", "") else "right")
    for r in results:
        verdict = "holds" if not r.findings else f"{len(r.findings)} findings"
        table.add_row(r.backend, r.dtype, str(r.cases), figure(r.ratio), figure(r.largest), r.worst, verdict)
    return table


def closing_of_verified(results: Sequence[Verified], files: Sequence[Finding]) -> str:
    """The verdict in one line."""
    findings = sum(len(r.findings) for r in results)
    if not findings and not files:
        return "every file is as the manifest says, and every golden holds"
    parts = [f"{len(files)} files or cases are not as the manifest says"] if files else []
    parts += [f"{findings} outputs do not hold"] if findings else []
    left_out = "; what is computed from changed files was left out" if files else ""
    return f"fails: {' and '.join(parts)}{left_out}"


def table_of_changes(changes: Sequence[Change]) -> Table:
    """One row per case that is not the same, the largest change first."""
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("golden", "", "change of the exact values, sigma of float32", "change of sigma"):
        table.add_column(column, justify="right" if "change" in column else "left")
    for c in sorted((c for c in changes if c.kind != "same"), key=lambda c: -c.sigma):
        table.add_row(c.name, c.kind, "" if c.kind != "changed" else figure(c.sigma), _percent(c))
    return table


def _percent(change: Change) -> str:
    if change.kind != "changed":
        return ""
    return f"{change.expected:.1%}" if math.isfinite(change.expected) else "inf"
