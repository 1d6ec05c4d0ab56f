"""What commands share: exit codes, options, where tables go, and the files that say what was found."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.errors import InputError
from refllm.storage import output_file

if TYPE_CHECKING:
    from refllm.commands.gate import Known

HOLDS, FINDING, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def can_be_written(option: str) -> Callable[[Path | None], Path | None]:
    """The callback of an option that names a file to write: it is tried before the work, and not after it."""

    def tried(file: Path | None) -> Path | None:
        if file is not None and not (option == "--json" and to_stdout(file)):
            output_file.must_be_writable(option, file)
        return file

    return tried


def more_than_none(option: str) -> Callable[[float | None], float | None]:
    """The callback of an option that is a number of seconds."""

    def tried(seconds: float | None) -> float | None:
        if seconds is not None and not 0 < seconds < threading.TIMEOUT_MAX:
            raise InputError(f"{option} {seconds:g}: expected more than 0 seconds")
        return seconds

    return tried


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="F", callback=can_be_written("--json"), help="Write the result as JSON; - is standard output."
    ),
]


Junit = Annotated[
    Path | None,
    typer.Option(
        "--junit",
        metavar="F",
        callback=can_be_written("--junit"),
        help="Write the result as JUnit XML, for a CI server.",
    ),
]
KnownFile = Annotated[
    Path | None,
    typer.Option(
        "--known",
        metavar="F.json",
        help="Findings that are known, each with a reason and a date; where there are no others the exit code is 0.",
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


def conclude(found: dict[str, Any], known: "Known", screen: Any, json_file: Path | None, junit: Path | None) -> None:
    """Says what is known, writes the files and ends the command with its exit code. found: for the JSON; where it was
    cut short it says "interrupted", or why it "ended"."""
    for sentence in known.in_words(found):
        screen.print(sentence)
    if known.entries:
        found = {**found, "known": known.to_list(found)}
    write_json(found, json_file)
    if junit is not None:
        from refllm.commands.junit import junit_text

        output_file.write("--junit", junit, junit_text(found, known))
    if found.get("interrupted"):
        raise typer.Exit(INTERRUPTED)
    if not known.passes(found):
        raise typer.Exit(FINDING)
