"""What commands share: exit codes, options, where tables go, and the JSON file."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.storage import output_file

HOLDS, FINDING, WRONG_USE = 0, 1, 2


def can_be_written(option: str) -> Callable[[Path | None], Path | None]:
    """The callback of an option that names a file to write: it is tried before the work, and not after it."""

    def tried(file: Path | None) -> Path | None:
        if file is not None and not (option == "--json" and to_stdout(file)):
            output_file.must_be_writable(option, file)
        return file

    return tried


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="F", callback=can_be_written("--json"), help="Write the result as JSON; - is standard output."
    ),
]


def _use_page(context: typer.Context, page: str | None) -> str | None:
    """The page is in use until the command ends."""
    if page is not None:
        from refllm.models.own_page import in_use

        context.with_resource(in_use(page))
    return page


Page = Annotated[
    str | None,
    typer.Option(
        "--page",
        metavar="FILE.PY",
        callback=_use_page,
        help="The page of the checkpoint's family, one of your own; or a known family, as which it is read if nothing "
        "differs.",
    ),
]


def console(quiet: bool) -> Any:
    """Where tables go. Not wrapped to the width of a terminal that is not there."""
    from rich.console import Console

    return Console(quiet=quiet, highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 120)


def to_stdout(json_file: Path | None) -> bool:
    """Whether the JSON is what goes to standard output, and nothing else may."""
    return json_file is not None and str(json_file) == "-"


def write_json(values: Any, json_file: Path | None) -> None:
    """Writes the result where `--json` says, if it does. Raises InputError for a file that cannot be written."""
    if json_file is None:
        return
    from refllm.storage.json_text import json_text

    if to_stdout(json_file):
        text = json_text(values)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # escapes, which are JSON too, instead of question marks
            text = json_text(values, ascii_only=True)
        print(text)
    else:
        output_file.write("--json", json_file, json_text(values) + "\n")
