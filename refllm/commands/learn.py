"""`refllm learn`: what the words of the reports mean."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.commands.shared_options import Json, console, to_stdout, write_json

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="What helps to understand the reports and the models.",
)


@app.callback()
def describe() -> None:
    """What helps to understand the reports and the models."""


@app.command()
def term(
    name: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="A word of a report; without it, all.")
    ] = None,
    json_file: Json = None,
) -> None:
    """What a word of the reports means: `refllm learn term sigma`."""
    from rich.text import Text

    from refllm.learn.glossary import find, terms
    from refllm.terminal.fitted_table import Table

    out = console(quiet=to_stdout(json_file))
    if not name:
        table = Table.grid(padding=(0, 2, 0, 0))
        for one in terms().values():
            table.add_row(Text(one.name, style="bold"), Text(one.means))
        out.print(table)
        write_json({one.name: asdict(one) for one in terms().values()}, json_file)
        return
    found = find(" ".join(name))
    out.print(_entry(found))
    write_json(asdict(found), json_file)


@app.command()
def book(
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where the pages go.")] = Path("docs/book"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; compare with what stands in the folder. 1 if it differs.")
    ] = False,
) -> None:
    """The book: pages about operators, families and what a beginner needs, made from the code that they show."""
    from refllm.learn.book import make

    if not check:
        print(f"{make.write(output)} files in {output}; begin with {output / 'index.html'}")
        return
    if found := make.differences(make.pages(), output):
        print(*found, sep="\n")
        raise typer.Exit(1)
    print(f"{output} is what its sources make")


def _entry(found: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    others = f" (also: {', '.join(found.also)})" if found.also else ""
    lines = [Text.assemble((found.name, "bold"), (others, "dim")), Text(found.means)]
    lines += [Text(""), Text(found.more)] if found.more else []
    lines += [Text(""), Text(f"see {', '.join(found.see)}", style="dim")] if found.see else []
    return Group(*lines)
