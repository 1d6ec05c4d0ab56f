"""`refllm bench`: speed and memory, on a CPU and on a GPU."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.commands.shared_options import FINDING, Json, console, to_stdout, write_json
from refllm.errors import InputError
from refllm.extras import require
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Measure speed and memory.")

Plots = Annotated[
    Path | None, typer.Option("--plots", metavar="DIR", help="Write a roofline and a bar chart, as PNG and SVG.")
]
Device = Annotated[
    str,
    typer.Option("--device", help="cuda, or cpu: reduced, Triton kernels checked but not timed. Default: cuda if any."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Default: bfloat16; on a CPU float32.")]


def _a_number(minutes: float | None) -> float | None:
    if minutes is not None and math.isnan(minutes):
        raise InputError(f"--minutes {minutes} is no number of minutes")
    return minutes


Minutes = Annotated[
    float | None, typer.Option("--minutes", min=0, callback=_a_number, help="Begin nothing new after so long.")
]
Peers = Annotated[
    str | None,
    typer.Option("--peers", metavar="A,B", help="Of plain, eager, compile, liger, sdpa; or none. Default: what fits."),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="A published model by name, helium-220m or helium-1m; repeat for more."),
]
ModelForms = Annotated[
    str, typer.Option("--peers", metavar="A,B", help="Who computes, of triton, torch, transformers.")
]
Lengths = Annotated[str, typer.Option("--tokens", metavar="N,N", help="Lengths. Default: 1024 to 32768.")]
Batches = Annotated[str, typer.Option("--batch", metavar="1,8", help="Sequences at a time.")]


@app.command("cpu")
def bench_cpu(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder; without one, random weights.")
    ] = None,
    shape: Annotated[
        str, typer.Option("--shape", help="Of the random weights: helium-220m or helium-1m.")
    ] = "helium-220m",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1)] = 32,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 5,
    backend: Annotated[str, typer.Option("--backend", help="Our side: numpy (the reference) or torch.")] = "numpy",
    dtype: Annotated[str, typer.Option("--dtype", help="float32; with --backend torch also bfloat16.")] = "float32",
    json_file: Json = None,
) -> None:
    """Prefill and decode against Transformers: same weights, same dtype, same threads, taking turns."""
    require("bench cpu", "torch", "transformers")
    from refllm import bench
    from refllm.bench import report
    from refllm.bench.results import stamp

    settings = bench.Settings(prompt_tokens, new_tokens, threads, repeats, backend, dtype)
    result = _or_finding(lambda step: bench.bench_checkpoint_or_shape(checkpoint, shape, settings, step))
    _show(report.show_bench(result), stamp("cpu") | result, json_file)


@app.command("memory")
def bench_memory(
    shape: Annotated[
        str, typer.Option("--shape", help="Of the random weights: helium-1-preview-2b or helium-1m.")
    ] = "helium-1-preview-2b",
    tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 32,
    check_shape: Annotated[str, typer.Option("--check-shape", help="Of what is checked.")] = "helium-220m",
    check_tokens: Annotated[int, typer.Option("--check-tokens", min=1)] = 512,
    json_file: Json = None,
) -> None:
    """Peak memory of loading and running a full-size model, with and without low_memory; and of `refllm check`, all its
    processes together, over that of a forward pass."""
    from rich.console import Group

    from refllm.bench import check_memory, memory
    from refllm.bench.results import describe_machine, installed_versions, stamp

    with StatusLine(sys.stderr) as step:
        result = memory.bench_memory(shape, tokens, step=step)
        result["check"] = check_memory.bench_check(check_shape, check_tokens, step=step)
    about = {"machine": describe_machine("cpu"), "versions": installed_versions()}
    shown = Group(memory.show_memory(result), "", check_memory.show_check(result["check"]))
    _show(shown, stamp("memory") | about | result, json_file)


@app.command("checkpoint")
def bench_checkpoint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A published one: helium-1-2b, afm-4.5b, ...")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it.")],
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="So many, and not as many as it has.")] = None,
) -> None:
    """Write a checkpoint of a published model's shape with random bfloat16 weights: to see what a check of that size
    takes."""
    from refllm.bench.memory import write_published

    with StatusLine(sys.stderr) as step:
        step(f"writing random weights: {model}")
        numbers = write_published(folder, model, layers)
    console(quiet=False).print(f"{folder}: {numbers / 1e9:.2f} billion random weights of the shape of {model}")


@app.command("growth")
def bench_growth(
    shape: Annotated[
        str, typer.Option("--shape", help="Of prefill and decode: helium-220m or helium-1m.")
    ] = "helium-220m",
    check_shape: Annotated[str, typer.Option("--check-shape", help="Of check, which varies the layers.")] = "helium-1m",
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N,N", help="Prompts and contexts. Default: 128 to 4096.")
    ] = "",
    layers: Annotated[str, typer.Option("--layers", metavar="N,N", help="Of check. Default: 1 to 16.")] = "",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Decoded at each context.")] = 8,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 2,
    sides: Annotated[str, typer.Option("--side", metavar="A,B", help="Of numpy, torch, transformers.")] = "",
    measures: Annotated[str, typer.Option("--measure", metavar="A,B", help="Of prefill, decode, check.")] = "",
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="DIR", help="Write the lines as PNG and SVG.")
    ] = None,
    json_file: Json = None,
) -> None:
    """How time grows: prefill over its length, decode over the context, check over the layers; fitted exponents."""
    from refllm.bench import growth

    settings = growth.Settings(
        shape,
        check_shape,
        numbers("--tokens", tokens) or growth.TOKENS,
        numbers("--layers", layers) or growth.LAYERS,
        new_tokens,
        threads,
        names(sides) or growth.SIDES,
        names(measures) or growth.MEASURES,
    )
    if "transformers" in settings.sides:
        require("bench growth (--side numpy leaves the others out)", "torch", "transformers")
    elif "torch" in settings.sides:
        require("bench growth --side torch", "torch")
    result = _or_finding(lambda step: growth.bench_growth(settings, step), plots)
    _show(growth.show_growth(result), result, json_file, plots)


@app.command("kernels")
def bench_kernels(
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="A published model, whose layer it is; repeat for more.")
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option("--operator", help="Repeat for more. Default: those that the model runs.")
    ] = None,
    sizes: Annotated[
        str, typer.Option("--size", metavar="BxS,BxS", help="Sequences x tokens. Default: 1x4096,64x1,1x1,1x32768.")
    ] = "",
    context: Annotated[int, typer.Option("--context", min=0, help="Slots of the cache where S is 1.")] = 0,
    peers: Peers = None,
    device: Device = "",
    dtype: Dtype = "",
    minutes: Minutes = 8.0,
    plots: Plots = None,
    json_file: Json = None,
) -> None:
    """Every operator on the layers of published models, against this machine's ceilings and other people's kernels."""
    from refllm.bench import kernels

    settings = kernels.Settings(
        _device(device),
        dtype,
        tuple(layer or ()),
        _sizes(sizes),
        tuple(operator or ()),
        context=context,
        peers=None if peers is None else names(peers),
        minutes=minutes,
    )
    _report(lambda step: kernels.bench_kernels(settings, step), json_file, plots)


@app.command("attention")
def bench_attention(
    tokens: Lengths = "",
    head_dim: Annotated[str, typer.Option("--head-dim", metavar="D,D", help="Default: 64,80,128,160.")] = "",
    batch: Annotated[str, typer.Option("--batch", metavar="B,B", help="Of decoding. Default: 1,16.")] = "",
    peers: Peers = None,
    device: Device = "",
    dtype: Dtype = "",
    minutes: Minutes = 8.0,
    plots: Plots = None,
    json_file: Json = None,
) -> None:
    """Causal attention over lengths and head sizes, and decoding over caches, beside every backend of Torch's."""
    from refllm.bench import kernels

    settings = kernels.Settings(
        _device(device),
        dtype,
        lengths=numbers("--tokens", tokens),
        head_dims=numbers("--head-dim", head_dim),
        batches=numbers("--batch", batch),
        peers=None if peers is None else names(peers),
        minutes=minutes,
    )
    _report(lambda step: kernels.bench_attention(settings, step), json_file, plots)


@app.command("decode")
def bench_decode(
    model: Models = None,
    batch: Batches = "",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=0, help="Default: 512.")] = 0,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Default: 128.")] = 0,
    forms: ModelForms = "",
    device: Device = "",
    dtype: Dtype = "",
    minutes: Minutes = 8.0,
    plots: Plots = None,
    json_file: Json = None,
) -> None:
    """Whole models token by token, on CUDA graphs, against reading the weights once and Transformers' generate."""
    from refllm.bench import models

    settings = models.Settings(
        _device(device),
        dtype,
        tuple(model or ()),
        numbers("--batch", batch),
        prompt_tokens,
        new_tokens,
        forms=names(forms) or models.FORMS,
        minutes=minutes,
    )
    _report(lambda step: models.bench_decode(settings, step), json_file, plots)


@app.command("prefill")
def bench_prefill(
    model: Models = None,
    tokens: Lengths = "",
    batch: Batches = "1",
    forms: ModelForms = "",
    device: Device = "",
    dtype: Dtype = "",
    minutes: Minutes = 8.0,
    plots: Plots = None,
    json_file: Json = None,
) -> None:
    """Whole models over whole prompts, against the matrix product and Transformers' forward pass."""
    from refllm.bench import models

    settings = models.Settings(
        _device(device),
        dtype,
        tuple(model or ()),
        numbers("--batch", batch),
        lengths=numbers("--tokens", tokens),
        forms=names(forms) or models.FORMS,
        minutes=minutes,
    )
    _report(lambda step: models.bench_prefill(settings, step), json_file, plots)


@app.command("page")
def bench_page(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With the JSON files; the page goes there too.")
    ] = Path("docs/benchmarks"),
) -> None:
    """Render the results kept in a folder as its README.md, with the figures to reach beside them."""
    from refllm.bench.page import write_page

    print(write_page(folder))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,2,3" as numbers of at least 1; "" is none. Raises InputError."""
    try:
        found = tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found):
        raise InputError(
            f"{option} {text}: expected whole numbers of at least 1 with commas between them, as in 1,8,64"
        )
    return found


def names(text: str) -> tuple[str, ...]:
    """ "a,b" as names; "" and "none" are none."""
    return tuple(part.strip() for part in text.split(",")) if text.strip() not in ("", "none") else ()


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(",") if text.strip() else ():
        pieces = part.strip().split("x")
        if len(pieces) != 2 or not all(piece.isdigit() and int(piece) for piece in pieces):
            raise InputError(f"--size {text}: expected sequences x tokens, as in 1x4096,64x1")
        found.append((int(pieces[0]), int(pieces[1])))
    return tuple(found)


def _device(device: str) -> str:
    """The device asked for; else "cuda" if Torch sees a GPU, else "cpu"."""
    if device:
        return device
    from refllm.bench.kernels import has_gpu

    return "cuda" if has_gpu() else "cpu"


def _report(work: Callable[[Any], dict[str, Any]], json_file: Path | None, plots: Path | None) -> None:
    """Runs a benchmark of kernels or models, shows it, and ends with exit code 1 if there is a finding."""
    result = _or_finding(work, plots)
    from refllm.bench.tables import show_result

    _show(show_result(result), result, json_file, plots)
    if result["verdict"] != "holds":
        raise typer.Exit(FINDING)


def _or_finding(work: Callable[[Any], dict[str, Any]], plots: Path | None = None) -> dict[str, Any]:
    """The result; a benchmark whose sides disagree is a sentence and exit code 1."""
    from refllm.bench import BenchError

    if plots is not None:  # said before the work, not after it
        from refllm.bench.plots import pyplot

        output_file.must_be_folder("--plots", plots)
        pyplot()
    with StatusLine(sys.stderr) as step:
        try:
            return work(step)
        except BenchError as error:
            print(f"refllm: {error}", file=sys.stderr)
            raise typer.Exit(FINDING) from None


def _show(table: Any, result: dict[str, Any], json_file: Path | None, plots: Path | None = None) -> None:
    console(quiet=to_stdout(json_file)).print(table)
    write_json(result, json_file)
    if plots is not None:
        from refllm.bench.plots import write_plots

        stem = "" if json_file is None or to_stdout(json_file) else json_file.stem
        files = write_plots(result, plots, stem)
        console(quiet=to_stdout(json_file)).print(f"{plots}: {', '.join(file.name for file in files) or 'no pictures'}")
