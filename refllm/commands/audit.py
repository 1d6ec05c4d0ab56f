"""`refllm audit`: a test against the known bugs of an operator."""

import sys
from typing import Annotated, Any

import typer

from refllm.commands.shared_options import FINDING, Json, console, to_stdout, write_json
from refllm.extras import require
from refllm.terminal.status_line import StatusLine


def audit(
    operator: Annotated[
        str | None, typer.Argument(metavar="OPERATOR", help="Without one, all operators (our own check only).")
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            "--test",
            metavar="FILE.PY:TEST",
            help="Your test, a function that is called with an implementation of the operator and raises if it "
            "dislikes it. Default: check-op.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--form", help="Mutants in plain torch, or triton (interpreted). Default: both; of a test: torch."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Only bugs that show in this dtype: name the one that your test works in. Default: all of them, and "
            "check-op has to find a bug in every dtype in which it shows.",
        ),
    ] = None,
    max_examples: Annotated[int, typer.Option("--max-examples", min=0, help="That check-op draws.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of what check-op draws.")] = 0,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", help="Seconds that a test has for one mutant.")
    ] = 10.0,
    json_file: Json = None,
) -> None:
    """How good is a test? Give it every known bug of an operator; list those that it misses. Exit code 1 if any."""
    require("audit", "torch")
    if test is None:
        require("audit without --test", "hypothesis")
    if form == "triton" or (test is None and form is None):
        require("audit (not with --form torch)", "triton")
    from refllm.opcheck.audit import audit as work

    screen = console(quiet=to_stdout(json_file))
    with StatusLine(sys.stderr) as step:
        report = work(
            operator,
            test,
            form,
            dtype=dtype,
            max_examples=max_examples,
            seed=seed,
            time_limit=time_limit,
            progress=lambda text, done, total: step(text, done, total or None),
        )
        step.clear()
    show(report, screen)
    write_json(report.to_dict(), json_file)
    if not report.holds:
        raise typer.Exit(FINDING)


def show(report: Any, screen: Any) -> None:
    """The table, the survivors, and a closing line."""
    from rich import box
    from rich.text import Text

    from refllm.terminal.fitted_table import Table

    screen.print(Text(f"{report.checker} against known bugs\n"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("operator")
    for name in ("mutants", "killed", "kill rate"):
        table.add_column(name, justify="right")
    for name in report.operators:
        part = report.of(name)
        killed = len(part.bugs) - len(part.survivors)
        table.add_row(name, str(len(part.bugs)), str(killed), f"{100 * part.kill_rate:.0f} %")
    screen.print(table)
    for title, outcomes in (("survived", report.survivors), ("not wrong, and rejected all the same", report.rejected)):
        if outcomes:
            screen.print(Text(f"\n{title}:"))
        for o in outcomes:
            why = f" [no bug: {o.equivalent}]" if o.equivalent else ""
            screen.print(Text(f"  {o.operator}, {o.form}, {o.dtype}: {o.what} ({o.source}){why}"))
    killed = len(report.bugs) - len(report.survivors)
    left_out = len(report.outcomes) - len(report.bugs)
    end = f"; {left_out} changes that nobody can see are not counted" if left_out else ""
    screen.print(Text(f"\n{killed} of {len(report.bugs)} bugs found{end}"))
