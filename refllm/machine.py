"""`refllm info` without a checkpoint: versions, and where policy `hf-eager` has torch's bits on the CPU at hand."""

import importlib.util
import platform
from importlib.metadata import version
from typing import Any

from refllm.precision.torch_cpu import this_cpu

_PACKAGES = ("numpy", "torch", "triton", "transformers")
_LANES = {16: "16 float32 lanes (AVX-512)", 8: "8 float32 lanes (AVX2)", 0: "no vector code that is known"}


def describe() -> dict[str, Any]:
    """Plain values for JSON. versions: None for what is not installed. same_bits: dtype -> kind of kernel -> whether
    this CPU's torch adds as `refllm.precision.torch_cpu` does, on one thread; None without torch."""
    versions = {name: version(name) if importlib.util.find_spec(name) else None for name in _PACKAGES}
    same_bits = None
    if versions["torch"]:
        from refllm.kernels.same_bits import DTYPES, compare

        same_bits = {dtype: compare(dtype) for dtype in DTYPES}
    cpu = this_cpu()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": {"lanes": cpu.lanes, "onednn": cpu.onednn},
        "same_bits": same_bits,
    }


def show(found: dict[str, Any]) -> Any:
    """The description as a table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    versions = ", ".join(f"{name} {number or '-'}" for name, number in found["versions"].items())
    table.add_row(Text("versions", style="dim"), f"python {found['python']}, {versions}")
    table.add_row(Text("vector code", style="dim"), _LANES[found["cpu"]["lanes"]])
    table.add_row(Text("policy hf-eager", style="dim"), "rounds where Transformers does, on every CPU; on this one,")
    if found["same_bits"] is None:
        table.add_row("", "whether sums have the same last bit is not known: torch is not installed")
        return Group(table)
    for dtype, kinds in found["same_bits"].items():
        same = ", ".join(kind for kind, agrees in kinds.items() if agrees) or "nothing"
        other = ", ".join(kind for kind, agrees in kinds.items() if not agrees)
        table.add_row(
            "", f"{dtype}: the same bits in {same}" + (f"; sums in another order in {other}" if other else "")
        )
    return Group(table)
