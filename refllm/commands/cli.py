"""The command line: reads arguments, calls the module that does the work, prints what it returns.

Exit codes: 0 it holds or is done, 1 a finding, 2 wrong use or unreadable input, 130 Ctrl-C. A mistake of the user's is
one sentence on standard error, never a traceback. Progress goes to standard error, and only if that is a terminal.
Everything heavy is imported inside the commands, so that `refllm --help` is quick.
"""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.accuracy.verdicts import SCHEMA, verdict, worst
from refllm.commands import audit, bench, golden, learn, operators, train, tune
from refllm.commands.cut_short import CutShort
from refllm.commands.shared_options import (
    FINDING,
    HOLDS,
    INTERRUPTED,
    WRONG_USE,
    Json,
    Junit,
    KnownFile,
    Page,
    can_be_written,
    conclude,
    more_than_none,
)
from refllm.commands.shared_options import console as _console
from refllm.commands.shared_options import to_stdout as _to_stdout
from refllm.commands.shared_options import write_json as _write_json
from refllm.errors import InputError, RefllmError
from refllm.extras import needs, optional_package, require
from refllm.storage import output_file
from refllm.terminal import streams
from refllm.terminal.status_line import StatusLine

if TYPE_CHECKING:
    from refllm.check.logprobs import LogProbReport
    from refllm.commands.gate import Known

# The base class of all errors in arguments; where it is imported from differs between versions of typer.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bench.app, name="bench")
bench.app.command("tune")(tune.bench_tune)
kernels_app = typer.Typer(add_completion=False, rich_markup_mode=None, help="The Triton kernels, and yours.")
app.add_typer(kernels_app, name="kernels")
app.add_typer(golden.app, name="golden")
app.add_typer(learn.app, name="learn")
app.command("check-op")(operators.check_op)
app.command("audit")(audit.audit)
app.command("train")(train.train)

Folder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder with config.json and safetensors files.")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Tokens: this text, through the tokenizer.")
]
Ids = Annotated[str | None, typer.Option("--ids", metavar="1,2,3", help="Tokens: these ids.")]
IdsFile = Annotated[
    Path | None, typer.Option("--ids-file", metavar="F", help="Tokens: the ids in a file, or a JSON list.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float64 (exact), float32, bfloat16 or float16.")]
Policy = Annotated[str | None, typer.Option("--policy", help="Where an emulated precision rounds: hf-eager or fused.")]
Backend = Annotated[str, typer.Option("--backend", help="numpy (the reference), torch or triton (the fast models).")]
Device = Annotated[str | None, typer.Option("--device", help="Of torch and triton: cpu, cuda, cuda:1. Default: cuda.")]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="Read the weights layer by layer and keep none.")]


@app.callback()
def describe() -> None:
    """The math of Helium, Llama, StableLM and Arcee in NumPy, and how far other implementations are from it."""


_CANDIDATES = (
    "torch, triton, transformers, numpy (the reference); another stack, NAME or NAME:FILE (refllm check --help); or a "
    "forward pass or a Torch module: module:function, file.py:function."
)
Candidate = Annotated[str, typer.Option("--candidate", help=_CANDIDATES)]
Attention = Annotated[str, typer.Option("--attn", help="Transformers' attention: eager or sdpa.")]
Rounding = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Where the candidate has to round: hf-eager, hf-sdpa or fused. Default for a forward pass of yours: "
        "wherever honest code may, which the report then says.",
    ),
]
Names = Annotated[
    Path | None,
    typer.Option("--names", metavar="F.json", help="How a Torch module calls its parts: a map to the names of values."),
]
Library = Annotated[Path | None, typer.Option("--library", metavar="F", help="The shared library of llama.cpp.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FOLDER|FILE",
        help="The weights that the candidate really has, if they are not the checkpoint's: a checkpoint folder, a "
        "safetensors file, or a GGUF file, dequantised. What they cost is said apart.",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="A,B",
        help="How the values lie, where their shapes do not tell: tokens, SBE, BSHD, BHSD, gguf, grouped-qkv.",
    ),
]
_TIME_LIMIT = "Seconds for each run of a candidate, which then hangs. Default: 600, and 3600 more per GiB of weights."
TimeLimit = Annotated[
    float | None,
    typer.Option("--time-limit", metavar="S", help=f"{_TIME_LIMIT} That is a finding; the end of --time is none."),
]


@app.command()
def check(
    given: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder; without one, all embedded checkpoints. With --merge, the parts."
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            help=f"{_CANDIDATES} Repeat for more. Default: transformers; without a CHECKPOINT torch, triton and "
            "transformers.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="Precision; repeat for more. Default: float32, bfloat16; a function's own, if it takes no dtype.",
        ),
    ] = None,
    policy: Rounding = None,
    attention: Attention = "eager",
    stress: Annotated[
        bool,
        typer.Option(
            "--stress",
            help="Also far positions, small and large values, rows padded differently, cached pieces, every token id.",
        ),
    ] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also the gradient of a loss by every value and tensor.")
    ] = False,
    frozen: Annotated[
        list[str] | None,
        typer.Option("--frozen", metavar="NAME", help="With --backward: a tensor, or a pattern, that learns nothing."),
    ] = None,
    taps: Annotated[
        bool, typer.Option("--taps", help="A line for every named value, not only for every layer.")
    ] = False,
    prompt: Prompt = None,
    ids: Ids = None,
    ids_file: IdsFile = None,
    time: Annotated[
        float | None,
        typer.Option(
            "--time",
            metavar="N",
            callback=more_than_none("--time"),
            help="Seconds for the whole check; what is not done by then is left out, and the verdict is incomplete.",
        ),
    ] = None,
    time_limit: TimeLimit = None,
    splits: Annotated[
        int, typer.Option("--splits", metavar="N", help="Products of N parts, each rounded, are meant.")
    ] = 1,
    tf32: Annotated[bool, typer.Option("--tf32", help="Float32 products of 11-bit factors are meant.")] = False,
    names: Names = None,
    library: Library = None,
    weights: Weights = None,
    recorded: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace",
            metavar="F",
            help="Judge the values in a file of a run on any machine, or in a folder of one per rank; repeat for more.",
        ),
    ] = None,
    layout: Layout = "",
    logprobs: Annotated[
        list[Path] | None,
        typer.Option(
            "--logprobs",
            metavar="F",
            help="Judge the log-probabilities of tokens in a file (docs/recording.md); of two, a trainer's and a "
            "rollout's, also whose fault their difference is.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="F",
            help="Judge against the recorded run in this file, which is known to be good; its tokens are run.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="A:B", help="Judge the layers from A on and before B alone: a first look, or a part."
        ),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", help="Judge the last N positions alone: a first look.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Keep the values of every run there, and what was judged; the same command goes on from that. For "
            "another candidate, or a changed one, another folder.",
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Put parts together, each written by --layers A:B --json part.json of one recorded run: refllm check "
            "--merge part*.json. --trace F and a CHECKPOINT where they lie elsewhere now.",
        ),
    ] = False,
    page: Page = None,
    explain: Annotated[
        bool | None,
        typer.Option(
            "--explain/--no-explain",
            help="Look for the change of the reference that gives what a wrong run has, for 30 s at most; by default "
            "in the first run that fails.",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="F", callback=can_be_written("--html"), help="Write everything as one HTML page."
        ),
    ] = None,
    junit: Junit = None,
    known_file: KnownFile = None,
) -> None:
    """Run the same tokens through an implementation and the reference; say where and by how much they differ.

    Exit code 1 if anything is wrong, or was not seen.
    """
    from refllm.check import report as show
    from refllm.check import run
    from refllm.check.logprobs import LogProbReport, judged
    from refllm.commands.gate import Known

    known = Known.load(known_file)
    checkpoint, parts = _checkpoint_and_parts(given, merge)
    if logprobs:
        others: dict[str, Any] = {
            "--candidate": candidate,
            "--trace": recorded,
            "--against": against,
            "--stress": stress,
            "--splits": splits > 1,
            "--tf32": tf32,
            "--taps": taps,
            "--explain": explain,
        }
        others |= {"--layers": layers, "--last": last, "--work": work, "--merge": merge}
        others |= {"--weights": weights, "--time-limit": time_limit, "--names": names}
        others |= {"--backward": backward}
        others |= {"--prompt": prompt, "--ids": ids, "--ids-file": ids_file, "--layout": layout, "--library": library}
        too_much = next((option for option, value in others.items() if value), None)
        if too_much is not None:
            raise InputError(f"--logprobs judges what a file says, so leave out {too_much}")
        if checkpoint is None or len(logprobs) > 2:
            raise InputError(
                "--logprobs needs the CHECKPOINT, and one file or two: refllm check CHECKPOINT --logprobs F"
            )
        with CutShort(time) as cut:
            told = list[LogProbReport]()
            for one in judged(checkpoint, list(logprobs), dtype or (), policy, cut.step):
                told.append(one)
        return _tell_logprobs(told, cut, known, json_file, html_file, junit)
    tokens = {"prompt": prompt, "ids": ids, "ids_file": ids_file}
    more: dict[str, Any] = {"splits": splits, "tf32": tf32, "names": names, "library": library, "layout": layout}
    if against is not None:
        from refllm.check.trace import Trace

        more["against"] = Trace.load(against)
    more |= {"weights": weights, "explain": explain, "backward": backward, "frozen": tuple(frozen or ())}
    more |= {"layers": layers, "last": last, "work": work}
    if work is not None:
        output_file.must_be_folder("--work", work)
    if recorded:
        from refllm.check.recorded import check_files, refuse

        runs_it = {"--candidate": candidate, "--stress": stress, "--time-limit": time_limit, "--names": names}
        refuse({**runs_it, "--library": library, "--backward": backward, "--work": work})
    candidates, left_out = ([""], []) if recorded or merge else run.candidates_to_check(candidate, checkpoint)
    if backward and not candidate and set(candidates) & {*run.FAST}:
        candidates = [name for name in candidates if name not in run.FAST]
        left_out = [*left_out, "not checked: torch and triton, which show no gradients yet"]
    settings = [
        run.Settings(name, tuple(dtype or ()), attention, policy, stress, tokens, time_limit, **more)
        for name in candidates
    ]
    console, folders = _console(quiet=_to_stdout(json_file)), [] if merge else run.folders_to_check(checkpoint)
    reports = []
    with CutShort(time) as cut:

        def say(text: str) -> None:
            cut.clear()
            console.print(text, soft_wrap=True, markup=False)

        if merge:
            from refllm.check.merged import check_parts

            runs = check_parts(parts, checkpoint, recorded[0] if recorded else None, cut.step, explain)
        elif recorded:
            runs = check_files(checkpoint, recorded, settings[0], cut.step, say)
        else:
            runs = run.check_all(folders, settings, cut.step, say)
        for report in runs:
            reports.append(report)
            cut.clear()
            console.print(show.show_report(report, verbose=taps))
    if cut.report is not None:
        reports.append(cut.report)
        console.print(show.show_report(cut.report, verbose=taps))
    if len(reports) > 1:
        console.print(show.show_summary(reports))
    for sentence in left_out:
        console.print(sentence)
    console.print(show.closing_line(reports))
    if cut.why:
        console.print(f"incomplete: {cut.why}, and this is the report so far")
    wrong = worst(report.verdict for report in reports)
    found: dict[str, Any] = {"schema": SCHEMA, "verdict": verdict(wrong == "fails", wrong != "holds" or cut.why)}
    found |= {**cut.to_dict(), "reports": [report.to_dict() for report in reports]}
    if html_file is not None:
        from refllm.check.html import write_html

        write_html(html_file, reports, {"command": _command()}, run.token_texts(folders), cut.why)
    conclude(found, known, console, json_file, junit)


def _checkpoint_and_parts(given: list[Path] | None, merge: bool) -> tuple[Path | None, list[Path]]:
    """The folder of a checkpoint, and the files of parts that are to be merged."""
    given = given or []
    folders = [path for path in given if not merge or path.is_dir()]
    if len(folders) > 1:
        raise InputError(f"{folders[1]}: check takes one CHECKPOINT, and {folders[0]} is one")
    parts = [path for path in given if merge and path not in folders]
    if merge and not parts:
        raise InputError("--merge needs the parts: refllm check --merge part*.json")
    return (folders[0] if folders else None), parts


def _command() -> str:
    """What was typed."""
    return " ".join(["refllm", *sys.argv[1:]])


def _tell_logprobs(
    told: "list[LogProbReport]",
    cut: CutShort,
    known: "Known",
    json_file: Path | None,
    html_file: Path | None,
    junit: Path | None,
) -> None:
    """Shows what was found of log-probabilities, writes the files, and ends the command."""
    from refllm.check.logprobs import Found
    from refllm.check.logprobs_report import show_logprobs, write_html

    found, console = Found.of(told) if told and not cut.why else Found(tuple(told)), _console(_to_stdout(json_file))
    console.print(show_logprobs(found))
    if cut.why:
        console.print(f"incomplete: {cut.why}, and this is the report so far")
    if html_file is not None:
        write_html(html_file, found, {"command": _command()}, cut.why)
    values = found.to_dict()
    values |= {"verdict": worst([values["verdict"], verdict(False, cut.why)]), **cut.to_dict()}
    conclude(values, known, console, json_file, junit)


@app.command()
def trace(
    checkpoint: Folder,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="F", callback=can_be_written("--output"), help="The safetensors file to write."
        ),
    ],
    candidate: Candidate = "transformers",
    dtype: Dtype = "float32",
    policy: Rounding = None,
    attention: Attention = "eager",
    prompt: Prompt = None,
    ids: Ids = None,
    ids_file: IdsFile = None,
    time_limit: Annotated[float | None, typer.Option("--time-limit", "--time", metavar="S", help=_TIME_LIMIT)] = None,
    names: Names = None,
    library: Library = None,
    layout: Layout = "",
    inputs_only: Annotated[
        bool, typer.Option("--inputs-only", help="Write what another machine must run, and no values; nothing is run.")
    ] = False,
    stress: Annotated[
        bool, typer.Option("--stress", help="With --inputs-only: the stressed inputs of check too.")
    ] = False,
    page: Page = None,
) -> None:
    """Write the named values of one run to a file, for refllm diff and check --against. Exit code 1 if the candidate
    misbehaves."""
    from refllm.check import run
    from refllm.check.misbehaviour import MisbehavesError

    tokens_given = {"prompt": prompt, "ids": ids, "ids_file": ids_file}
    if inputs_only:
        runs, values = run.write_inputs(run.folders_to_check(checkpoint)[0], tokens_given, stress, output)
        said = f"{runs} run" + "s" * (runs > 1)
        return _console(quiet=False).print(f"{output}: inputs of {said}, {values} values to record (docs/recording.md)")
    if stress:
        raise InputError("trace records one run; --stress goes with --inputs-only")
    more: dict[str, Any] = {"names": names, "library": library, "layout": layout}
    settings = run.Settings(candidate, (dtype,), attention, policy, False, tokens_given, time_limit, **more)
    try:
        with StatusLine(sys.stderr) as step:
            recorded = run.trace_candidate(run.folders_to_check(checkpoint)[0], settings, step)
    except MisbehavesError as error:
        print(f"refllm: {error}", file=sys.stderr)
        raise typer.Exit(FINDING) from None
    recorded.save(output)
    tokens = int(recorded.inputs.valid.sum())
    _console(quiet=False).print(f"{output}: {len(recorded.taps)} values of {recorded.source}, {tokens} tokens")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A trace file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    json_file: Json = None,
) -> None:
    """Compare two trace files of any origin, value by value. Exit code 1 if anything differs."""
    from refllm.check.difference import diff as compare_traces
    from refllm.check.difference_report import show_difference
    from refllm.check.trace import Trace

    found = compare_traces(Trace.load(first), Trace.load(second))
    _console(quiet=_to_stdout(json_file)).print(show_difference(found))
    _write_json(found.to_dict(), json_file)
    if not found.identical:
        raise typer.Exit(FINDING)


@app.command()
def generate(
    checkpoint: Folder,
    prompt: Prompt = None,
    ids: Ids = None,
    ids_file: IdsFile = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Stop after this many.")] = 128,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy", help="Default: as the checkpoint says; sampling if an option for it is given."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divide the logits by this.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the most likely tokens that sum to this probability.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Make what was said less likely (above 1).")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beam search with this many beams.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop at this text; repeat for more.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: apply the chat template.")
    ] = False,
    dtype: Dtype = "float32",
    policy: Policy = None,
    low_memory: LowMemory = False,
    backend: Backend = "numpy",
    device: Device = None,
    page: Page = None,
    json_file: Json = None,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from refllm.commands import generate as continuation

    choices = {
        "do_sample": sample
        if sample is not None
        else (True if any(v is not None for v in (temperature, top_k, top_p, seed)) else None),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "num_beams": num_beams,
        "seed": seed,
        "stop_strings": stop,
    }
    continuation.check_settings(max_new_tokens, choices)
    tokens = {"prompt": prompt, "ids": ids, "ids_file": ids_file}
    with StatusLine(sys.stderr) as step:
        how = {"dtype": dtype, "policy": policy, "low_memory": low_memory, "backend": backend, "device": device}
        task = continuation.prepare(checkpoint, tokens, how, chat=chat, step=step)
    shown = None if _to_stdout(json_file) else sys.stdout
    result = task.generate(max_new_tokens, {name: value for name, value in choices.items() if value is not None}, shown)
    _write_json(result, json_file)


@app.command()
def score(
    checkpoint: Folder,
    prompt: Prompt = None,
    ids: Ids = None,
    ids_file: IdsFile = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="F", help="Score the text in this file.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens per window. Default: max_position_embeddings, at most 4096.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens scored per window. Default: half the context.")
    ] = None,
    dtype: Dtype = "float32",
    policy: Policy = None,
    low_memory: LowMemory = False,
    backend: Backend = "numpy",
    device: Device = None,
    page: Page = None,
    json_file: Json = None,
) -> None:
    """Log-likelihood, perplexity and bits per byte of a text."""
    from refllm.commands import score as work

    with StatusLine(sys.stderr) as step:
        tokens = {"prompt": prompt, "ids": ids, "ids_file": ids_file}
        how = {"dtype": dtype, "policy": policy, "low_memory": low_memory, "backend": backend, "device": device}
        result = work.score_source(checkpoint, tokens, how, file=file, context=context, stride=stride, step=step)
    _console(quiet=_to_stdout(json_file)).print(work.show_score(result))
    _write_json(result.to_dict(), json_file)


@app.command()
def info(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder, a config.json alone, or a GGUF file; without one, this machine."
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    page: Page = None,
    json_file: Json = None,
) -> None:
    """What a checkpoint is: architecture, parameters, memory, tensors. A config.json is enough. Without one: this
    machine, and whether policy hf-eager has Transformers' bits on its CPU."""
    from refllm.commands import info as work
    from refllm.storage.gguf_file import is_gguf

    if checkpoint is None:
        from refllm import machine

        found = machine.describe()
        _console(quiet=_to_stdout(json_file)).print(machine.show(found))
        _write_json(found, json_file)
        return
    if is_gguf(checkpoint):
        from refllm.commands.info_gguf import describe_gguf, show_gguf

        found = describe_gguf(checkpoint)
        _console(quiet=_to_stdout(json_file)).print(show_gguf(found, tensors=tensors))
        _write_json(found, json_file)
        return
    result = work.describe(checkpoint)
    _console(quiet=_to_stdout(json_file)).print(work.show_info(result, tensors=tensors))
    _write_json(result.to_dict(), json_file)
    if result.findings:
        raise typer.Exit(FINDING)


@kernels_app.command("list")
def kernels_list(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Name every configuration.")] = False,
    json_file: Json = None,
) -> None:
    """Every kernel file: its operators, kernels and shipped configurations."""
    require("kernels list", "torch", "triton")
    from refllm.kernels.aot import commands, show

    described = commands.describe()
    _console(quiet=_to_stdout(json_file)).print(show.show_list(described, verbose))
    _write_json({"kernels": described}, json_file)


@kernels_app.command("check-aot")
def kernels_check_aot(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE.PY:KERNEL",
            help="Your kernel instead of ours, also package.module:kernel. The file is imported. It may carry its "
            "configurations: `def launches(target)` or a list LAUNCHES of pairs (name, refllm.kernels.launch.Launch).",
        ),
    ] = None,
    targets: Annotated[
        str, typer.Option("--target", metavar="A,B", help="Of sm_80, sm_90, sm_100, gfx942. Default: all.")
    ] = "",
    kernel: Annotated[str, typer.Option("--kernel", metavar="NAME", help="Only what has this in its name.")] = "",
    arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--arg",
            metavar="NAME=TYPE",
            help="An argument of your kernel: *bf16 (a tensor; *bf16:1 not aligned), i32 (i32:16: 16 divides it), i64, "
            "fp32, or a value. Repeat for more.",
        ),
    ] = None,
    constants: Annotated[
        list[str] | None, typer.Option("--constant", metavar="NAME=VALUE", help="A tl.constexpr of your kernel.")
    ] = None,
    num_warps: Annotated[int, typer.Option("--num-warps", min=1, help="Of your kernel.")] = 4,
    num_stages: Annotated[int, typer.Option("--num-stages", min=1, help="Of your kernel.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes; 0: one per core.")] = 0,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Every configuration, not only the worst.")] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Ours, as the layers of published models call them; with --json F the page beside F is written too.",
        ),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="F", help="Keep what became of ours: tests compile what is not in it."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Compile kernels without a GPU; find spills, too much shared memory, missing tensor cores and slow loads."""
    require("kernels check-aot", "torch", "triton")
    from refllm.kernels.aot import commands, show

    if layers:
        return _check_layers(targets, jobs, json_file, [file, kernel, *(arguments or ()), *(constants or ())])
    settings = commands.Settings(targets, kernel, file, arguments or (), constants or (), num_warps, num_stages, jobs)
    if record is not None:
        _all_of_ours(record, [file, targets, kernel])
    with StatusLine(sys.stderr) as step:
        outcome = commands.check_aot(settings, step)
    if record is not None:
        commands.keep(record, outcome)
    console = _console(quiet=_to_stdout(json_file))
    console.print(show.show_checked(outcome.checked, verbose))
    console.print(show.closing_line(outcome.checked, outcome.compiled, outcome.seconds))
    _write_json(outcome.to_dict(), json_file)
    if not outcome.holds:
        raise typer.Exit(FINDING)


def _all_of_ours(record: Path, others: list[Any]) -> None:
    if any(others):
        raise InputError("--record keeps all of our kernels on all targets; leave out the file, --target and --kernel")
    output_file.must_be_writable("--record", record)


def _check_layers(targets: str, jobs: int, json_file: Path | None, others: list[Any]) -> None:
    from refllm.bench import layers

    if any(others):
        raise InputError(
            "--layers compiles our kernels as they are; leave out the file, --kernel, --arg and --constant"
        )
    page = None if json_file is None or _to_stdout(json_file) else json_file.with_suffix(".md")
    if page is not None:
        output_file.must_be_writable("the page beside --json:", page)
    with StatusLine(sys.stderr) as step:
        found, text = layers.check_layers(targets, jobs, step)
    _write_json(found, json_file)
    if page is not None:
        output_file.write("the page beside --json:", page, text)
    _console(quiet=_to_stdout(json_file)).print(layers.closing_line(found))
    if found["verdict"] != "holds":
        raise typer.Exit(FINDING)


def main() -> None:
    """Entry point of the `refllm` command: turns exceptions into one sentence and an exit code."""
    streams.prepare()
    warnings.showwarning = _show_warning
    _shown_warnings.clear()
    code = _run()
    sys.exit(streams.flush(code))


def _run() -> int:
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="refllm", standalone_mode=False)
    except RefllmError as error:
        code = _complain(str(error))
    except ModuleNotFoundError as error:
        package = optional_package(error)
        if package is None:
            raise
        code = _complain(needs("this command", package))
    except _USAGE_ERROR as error:
        code = _complain(error.format_message())
    except BrokenPipeError:  # the reader of the output went away, as `head` does
        code = HOLDS
    except SystemExit as error:  # which click makes of it
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = HOLDS
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        code = _complain(f"{error.filename}: {reason}" if error.filename else reason)
    except MemoryError:
        ways = [f" or {option}" for option in ("--low-memory", "--layers A:B", "--last N") if _takes(option.split()[0])]
        code = _complain(f"not enough memory: try a smaller input{''.join(ways)}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    return code if isinstance(code, int) else HOLDS


def _takes(option: str) -> bool:
    """Whether the command that was typed has such an option."""
    commands = vars(typer.main.get_command(app))["commands"]
    command = commands.get(sys.argv[1] if len(sys.argv) > 1 else "")
    return command is not None and any(option in parameter.opts for parameter in command.params)


def _complain(sentence: str) -> int:
    print(f"refllm: {sentence}", file=sys.stderr)
    return WRONG_USE


_shown_warnings: set[str] = set()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, and the same one once: a command may read a checkpoint several times."""
    if str(message) not in _shown_warnings:
        _shown_warnings.add(str(message))
        print(f"refllm: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
