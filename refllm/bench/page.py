"""`refllm bench page`: the results kept in docs/benchmarks as one page, with the figures to reach beside them.

The page holds nothing that is not in the JSON files; what no file has is "not measured".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refllm.bench.results import span, speed
from refllm.bench.targets import GPU, TARGETS, Result, counts_for, device_of, fastest_peer
from refllm.errors import InputError
from refllm.storage import input_file, output_file

PAGE = "README.md"
GPU_BENCHES = ("kernels", "attention", "decode", "prefill")
NOT_MEASURED = "not measured"

_HEAD = """# Benchmarks

Every table here is rendered from the JSON files beside this page by `refllm bench page`. Each file holds the machine,
the versions, the command and the date of one run. GPU results come from `make gpu`, which leaves them in
`build/benchmarks/`; a row says "not measured" where no GPU was at hand.

A time is the median of many, on inputs that no cache holds, of outputs that were checked against the definition first.
"Share" is the least time that the machine's own ceilings (copy, matrix product; measured in the same run) allow for the
bytes and operations of a call, over the time that it took. A peer is compared with where it was timed in the same way.

A figure to reach counts from a run that was asked for all that its command does by itself, on the machine named.
"""


def write_page(folder: Path) -> Path:
    """Writes the page of a folder of results. InputError for a file that is no result, and for a missing folder."""
    page = folder / PAGE
    text = render(load(folder), pictures(folder), pages(folder))
    output_file.write("the page", page, text)
    return page


def load(folder: Path) -> dict[str, Result]:
    """File name -> result, in the order of the names."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name the one that holds the JSON files of `refllm bench`")
    found = {}
    for file in sorted(set(folder.glob("*.json")) - {folder / f"{name}.json" for name in pages(folder)}):
        try:
            result = input_file.read_json(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as JSON: {error}") from None
        if not isinstance(result, dict) or not {"bench", "date", "command", "machine"} <= result.keys():
            raise InputError(f"{file} is no result of `refllm bench`: it needs bench, date, command and machine")
        found[file.name] = result
    return found


def pictures(folder: Path) -> list[str]:
    """Names of the PNG files of a folder."""
    return sorted(file.name for file in folder.glob("*.png"))


def pages(folder: Path) -> list[str]:
    """Names, without an end, of the files that have a page of their own beside them."""
    return sorted(file.stem for file in folder.glob("*.md") if file.with_suffix(".json").exists())


def render(results: dict[str, Result], images: Sequence[str] = (), linked: Sequence[str] = ()) -> str:
    """The page as Markdown. images: pictures that lie beside it. linked: names of pages that do."""
    parts = [_HEAD, "## Figures to reach\n", _targets(list(results.values()))]
    for name, result in results.items():
        parts.append(_section(name, result, images))
    parts += [
        f"## {bench} on a GPU\n\n{NOT_MEASURED}: `refllm bench {bench} --json FILE`\n"
        for bench in GPU_BENCHES
        if not any(r["bench"] == bench and device_of(r) == "cuda" for r in results.values())
    ]
    parts += [f"## {name}\n\nOn a page of its own: [{name}.md]({name}.md).\n" for name in linked]
    return "\n".join(parts)


def _targets(results: Sequence[Result]) -> str:
    lines = []
    for target in TARGETS:
        fitting = [result for result in results if counts_for(target, result)]
        where = "CPU" if target.device == "cpu" else GPU
        lines.append([where, target.what, target.goal, target.measured(fitting) or NOT_MEASURED, f"`{target.command}`"])
    return table(["on", "what", "target", "measured", "command"], lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]) + "\n"


def _section(name: str, result: Result, images: Sequence[str]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result.get("versions", {}).items() if version)
    text = f"## {name.removesuffix('.json')}\n\n"
    where = machine.get("gpu") or ", ".join(filter(None, (machine["processor"], machine.get("blas"))))
    text += f"{where}; {versions}; {result['date']}  \n`{result['command']}`\n\n"
    text += _BODIES.get(result["bench"], _calls)(result)
    stem = name.removesuffix(".json")
    shown = [image for image in images if image.startswith(f"{stem}.") or image.startswith(f"{stem}-")]
    return text + "".join(f"\n![{image.removesuffix('.png')}]({image})\n" for image in shown)


def _cpu(result: Result) -> str:
    settings = result["settings"]
    rows = []
    for job, title in (("prefill", f"prefill, {settings['prompt_tokens']} tokens"), ("decode", "decode, per token")):
        sides = [span(result[job][side]["median"]) for side in ("refllm", "transformers")]
        rows.append([title, *sides, f"{result[job]['ratio']:.2f} x"])
    for what, title, job in (
        ("products", "prefill's matrix products alone", "prefill"),
        ("read", "reading the weights and the cache once", "decode"),
    ):
        if what in result:  # results of before had neither
            rows.append([title, span(result[what]["median"]), "", f"{result[job][f'ratio_to_{what}']:.2f} x"])
    how = (
        f"{result['checkpoint']}, {settings['dtype']}, backend {settings['backend']}, {settings['threads']} threads\n\n"
    )
    return how + table(["", "refllm", "Transformers", "ratio"], rows)


def _memory(result: Result) -> str:
    rows = [
        [mode, *(f"{run[name] / 2**30:.2f} GiB" for name in ("load_peak", "run_peak"))]
        for mode, run in result["modes"].items()
    ]
    how = f"{result['shape']}, {result['parameters'] / 1e6:,.0f} million parameters, {result['tokens']} tokens\n\n"
    return how + table(["", "peak loading", "peak running"], rows)


def _growth(result: Result) -> str:
    text = f"{result['settings']['shape']}, check on {result['settings']['check_shape']}, float32\n"
    for what in dict.fromkeys(one["what"] for one in result["series"]):
        lines = [one for one in result["series"] if one["what"] == what]
        rows = [
            [one["side"], *map(span, one["seconds"]), f"{one['exponent']:.2f}", f"{one['exponent_at_the_end']:.2f}"]
            for one in lines
        ]
        unit = "layers" if what == "check" else "tokens"
        heads = [what, *(f"{n} {unit}" for n in lines[0]["n"]), "exponent", "at the end"]
        text += "\n" + table(heads, rows)
    return text


def _calls(result: Result) -> str:
    """A row per call, ours beside the fastest peer; what was not timed says why."""
    ceilings, rows = result["ceilings"], []
    calls: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        calls.setdefault((row["what"], row["panel"], row["group"], row["dtype"]), []).append(row)
    for call, forms in calls.items():
        peers = [row for row in forms if not row["ours"]]
        rows += [[", ".join(call), row["form"], *_measured(row, peers)] for row in forms if row["ours"]]
    products = ", ".join(f"{rate / 1e12:,.3g} TFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_second"].items())
    text = f"Ceilings: copy {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s, product {products}. "
    text += f"{result['verdict']}; {len(result['left_out'])} left out for want of time.\n\n"
    return text + table(["call", "by", "median", "speed", "share", "fastest peer", "error"], rows)


def _measured(row: dict[str, Any], peers: Sequence[dict[str, Any]]) -> list[str]:
    error = "" if row["error"] is None else f"{row['error']:.2g}"
    if not row["time"]:
        return [row["finding"] or row["note"].replace("not timed", NOT_MEASURED), "", "", "", error]
    figures, best = row["figures"], fastest_peer(row, peers)
    peer = "" if best is None else f"{best['form']}, {best['time']['median'] / row['time']['median']:.2f} x"
    share = f"{100 * figures['share']:.3g} % ({figures['bound']})"
    return [span(row["time"]["median"]), speed(row), share, peer, error]


_BODIES: dict[str, Callable[[Result], str]] = {
    "cpu": _cpu,
    "memory": _memory,
    "growth": _growth,
}
