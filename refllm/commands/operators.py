"""`refllm check-op`: somebody's operator against its contract."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.accuracy.verdicts import worst
from refllm.commands.shared_options import Json, Junit, KnownFile, conclude, console, to_stdout
from refllm.errors import InputError
from refllm.terminal.interrupts import Interrupts
from refllm.terminal.status_line import StatusLine


def check_op(
    operator: Annotated[str | None, typer.Argument(metavar="OP", help="The operator; --list shows all.")] = None,
    candidate: Annotated[
        str | None,
        typer.Option("--candidate", help="Yours: module:function or file.py:function, with the operator's signature."),
    ] = None,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward", help="Judge its gradients, by autograd. One written by hand: OP is rms_norm_backward."
        ),
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the operators with their signatures.")] = False,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Of the activations; repeat for more. Default: bfloat16.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="Where it has to round: fused (once, at the end) or hf-eager (everywhere). "
            "Default: wherever honest code does, and the report says where.",
        ),
    ] = None,
    level: Annotated[
        str, typer.Option("--level", help="Up to which level of inputs the exit code counts: basic, contract, hostile.")
    ] = "contract",
    device: Annotated[str, typer.Option("--device", help="cpu (Triton kernels are interpreted) or cuda.")] = "cpu",
    arrays: Annotated[str, typer.Option("--arrays", help="What it takes and returns: torch or numpy.")] = "torch",
    max_examples: Annotated[
        int, typer.Option("--max-examples", min=0, help="Calls to draw after the fixed ones.")
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", help="Seconds after which a call hangs.")
    ] = 10.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--time",
            "--seconds",
            metavar="N",
            help="Seconds for the whole search. Default: 25; of Triton kernels: 100.",
        ),
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="A row alone must have the bits that it has in a batch.")
    ] = False,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="NAME",
            help="What yours lacks: an optional argument (key_mask), or a family of inputs (strides); repeat.",
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--sizes", metavar="RULE", help="Which lengths yours takes: E%256==0, D<=128, S==T; repeat."),
    ] = None,
    convention: Annotated[
        str,
        typer.Option(
            "--convention", help="torch: Torch's choices where the contract chose otherwise (dtype of a loss)."
        ),
    ] = "",
    keep_going: Annotated[
        bool | None,
        typer.Option(
            "--keep-going/--first",
            help="Look for all that is wrong. Default: the first; all with --json, --junit or --known.",
        ),
    ] = None,
    configs: Annotated[
        str, typer.Option("--configs", help="Of an autotuned Triton kernel run the first configuration, or all.")
    ] = "first",
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="F", help="A safetensors file of one call's arguments, dumped from a real run."
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option("--output", metavar="NAME", help="Judge this result in --inputs, instead of a candidate; repeat."),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(
            "--value", metavar="NAME=VALUE", help="An argument of --inputs that is no tensor: eps=1e-6; repeat."
        ),
    ] = None,
    repro: Annotated[
        Path | None,
        typer.Option(
            "--repro",
            metavar="F",
            help="Write a program that shows the failure by itself, - to print it; of a second dtype, F-DTYPE.py.",
        ),
    ] = None,
    json_file: Json = None,
    junit: Junit = None,
    known_file: KnownFile = None,
) -> None:
    """Search for an input on which your operator breaks its contract; make it small and say what is wrong.

    Exit code 1 if there is one, or if the time was up before every fixed call was examined.
    """
    from refllm.commands.gate import Known
    from refllm.opcheck import api, report

    known, interrupted = Known.load(known_file), False
    to_file = any(file is not None for file in (json_file, junit, known_file))  # where others stand beside a known one
    screen = console(quiet=to_stdout(json_file))
    if list_all:
        screen.print(report.show_operators())
        return
    if operator is not None and inputs is not None:
        from refllm.opcheck.dumped import check_dumped, values_of

        told = check_dumped(
            operator,
            inputs,
            candidate,
            output=output or (),
            values=values_of(value or ()),
            arrays=arrays,
            policy=policy,
            convention=convention,
            time_limit=time_limit,
            seconds=seconds,
        )
        screen.print(report.show_report(told, with_repro=repro == Path("-")))
        return conclude(told.to_dict(), known, screen, json_file, junit)
    if operator is None or candidate is None:
        raise InputError("check-op needs an operator and --candidate; refllm check-op --list shows the operators")
    reports: list[api.OpReport] = []
    with StatusLine(sys.stderr) as step, Interrupts() as ctrl_c:

        def progress(text: str, done: float, total: float) -> None:
            ctrl_c.ask()
            step(text, done, total or None)

        for one in dtype or ["bfloat16"]:
            try:
                reports.append(
                    api.check_op(
                        operator,
                        candidate,
                        dtype=one,
                        policy=policy,
                        device=device,
                        arrays=arrays,
                        max_examples=max_examples,
                        seed=seed,
                        time_limit=time_limit,
                        seconds=seconds,
                        bitwise=bitwise,
                        level=level,
                        keep_going=to_file if keep_going is None else keep_going,
                        without=without or (),
                        sizes=sizes or (),
                        convention=convention,
                        configs=configs,
                        backward=backward,
                        repro=_program_of(repro, one) if any(r.repro for r in reports) else _file(repro),
                        progress=progress,
                    )
                )
            except api.SearchInterrupted as error:
                reports.append(error.report)
                interrupted = True
            step.clear()
            screen.print(report.show_report(reports[-1], with_repro=repro == Path("-")))
            if interrupted:
                break
    found = _together([r.to_dict() for r in reports]) | ({"interrupted": True} if interrupted else {})
    conclude(found, known, screen, json_file, junit)


def _program_of(repro: Path | None, dtype: str) -> Path | None:
    """The file of another dtype, beside that of the first that fails."""
    repro = _file(repro)
    return None if repro is None else repro.with_stem(f"{repro.stem}-{dtype.removeprefix('torch.')}")


def _file(repro: Path | None) -> Path | None:
    """The file to write to, if there is one to be written."""
    return None if repro == Path("-") else repro


def _together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The first that fails, else that is incomplete, else the first; and all of them if there are several."""
    verdict = worst(r["verdict"] for r in reports)
    shown = next(r for r in reports if r["verdict"] == verdict)
    return shown if len(reports) == 1 else {**shown, "reports": reports}
