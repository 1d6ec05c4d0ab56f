"""`refllm info` of a GGUF file, the form of llama.cpp: what its header says, and how its tensors are stored."""

import math
from pathlib import Path
from typing import Any

from refllm.storage.gguf_file import PAIRED, GgufFile

_TOKENIZER = "tokenizer."


def describe_gguf(path: Path) -> dict[str, Any]:
    """Plain values for JSON. Raises CheckpointError for what is unreadable."""
    file = GgufFile.open(path)
    kinds = file.kinds
    shapes = {name: file.shape(name) for name in file.names}
    return {
        "path": str(path),
        "form": "gguf",
        "architecture": file.architecture,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "kinds": {kind: list(kinds.values()).count(kind) for kind in dict.fromkeys(kinds.values())},
        "rows_in_pairs": file.architecture in PAIRED,
        "metadata": {key: value for key, value in file.metadata.items() if not key.startswith(("GGUF.", _TOKENIZER))},
        "tensors": {name: {"stored": kinds[name], "shape": list(shape)} for name, shape in shapes.items()},
    }


def show_gguf(found: dict[str, Any], *, tensors: bool = False) -> Any:
    """The description as a table; a line per tensor if `tensors`."""
    from rich.console import Group
    from rich.text import Text

    from refllm.terminal.fitted_table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {key.removeprefix(f"{found['architecture']}."): str(value) for key, value in found["metadata"].items()}
    rows |= {
        "parameters": f"{found['parameters']:,}",
        "tensors": ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items()),
        "rows of q and k": "in pairs (2i, 2i+1); read back to (i, i + D/2)"
        if found["rows_in_pairs"]
        else "as they are",
        "to judge with it": f"refllm check CHECKPOINT --candidate NAME --weights {found['path']}",
    }
    for name, value in rows.items():
        facts.add_row(Text(name, style="dim"), value)
    lines: list[Any] = [Text(f"{found['path']} (a GGUF file, the form of llama.cpp)", style="bold"), facts]
    if tensors:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("tensor", "shape", "stored"):
            table.add_column(column)
        for name, tensor in found["tensors"].items():
            table.add_row(name, str(tensor["shape"]), tensor["stored"])
        lines += ["", table]
    return Group(*lines)
