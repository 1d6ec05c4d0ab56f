"""`refllm bench tune`: the tiles of the kernels."""

import sys
from typing import Annotated

import typer

from refllm.commands.shared_options import Json, console, to_stdout, write_json
from refllm.extras import require
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine


def bench_tune(
    kernel: Annotated[str, typer.Option("--kernel", metavar="NAME", help="Default: every kernel with tiles.")] = "",
    target: Annotated[
        str, typer.Option("--target", help="sm_80, sm_90, sm_100 or gfx942. Default: sm_90, or that of the device.")
    ] = "",
    device: Annotated[
        str,
        typer.Option("--device", help="cuda: time candidates there. Default: compile them and rank what comes out."),
    ] = "",
    shape: Annotated[str, typer.Option("--shape", metavar="TEXT", help="Only classes with this in their name.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Write the better tiles into the table.")] = False,
    json_file: Json = None,
) -> None:
    """Look for better tiles than those of the committed table; say what would change, and with --write change it."""
    require("bench tune", "torch", "triton")
    from refllm.bench import tune
    from refllm.kernels.tuning import table

    if write:
        output_file.must_be_writable("--write changes the table:", table.FILE)
    results, written = [], 0
    with StatusLine(sys.stderr) as step:
        for result in tune.tune(tune.Settings(kernel, target, device, shape), step):
            results.append(result)
            written += tune.write(result) if write else 0  # at once: what was found stays if the rest is stopped
    out = console(quiet=to_stdout(json_file))
    out.print(tune.show(results, ahead_of_time=not device))
    if write:
        out.print(f"{written} lines of the table written")
    write_json(
        {"chosen": "measured" if device else "ahead of time", "classes": [r.to_dict() for r in results]}, json_file
    )
