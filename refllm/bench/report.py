"""Results of `refllm bench` as tables for a terminal."""

import os
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from refllm.terminal.fitted_table import Table


def show_bench(result: dict[str, Any]) -> RenderableType:
    """Speed, the bound of a decode step, and memory. result: as `refllm.bench.bench_cpu` returns it."""
    settings, machine, weights = result["settings"], result["machine"], result["weights"]
    title = Text.assemble(
        (result["checkpoint"], "bold"),
        f"  {settings['dtype']}, backend {settings['backend']}, {settings['threads']} threads, ",
        f"median of {settings['repeats']} (range), {machine['processor']}",
    )
    read, products = result["read"], result["products"]
    own = (
        f"the matrix products of a prefill alone take {_span(products)}: prefill takes "
        f"{result['prefill']['ratio_to_products']:.2f} x that"
    )
    bound = (
        f"a decode step reads {_size(weights['read_per_token'])} of weights and {_size(weights['cache'])} of keys and "
        f"values; reading them once takes {_span(read)} ({read['bytes_per_second'] / 1e9:.1f} GB/s): decode takes "
        f"{result['decode']['ratio_to_read']:.2f} x that"
    )
    agree = f"outputs agree to {result['output_difference']:.1e} (relative rms)"
    parts: list[RenderableType] = [title, _speed(result, settings), "", _memory(result), "", own, bound, agree]
    if machine["blas"] and settings["backend"] == "numpy":
        parts.append(f"NumPy's matrix products: {machine['blas']}{_asked_for()}")
    return Group(*parts)


def _asked_for() -> str:
    """Who chose the kernels, if not OpenBLAS itself."""
    kernels = os.environ.get("OPENBLAS_CORETYPE")
    return (
        f", because OPENBLAS_CORETYPE={kernels}; without it OpenBLAS takes what suits the processor" if kernels else ""
    )


def _speed(result: dict[str, Any], settings: dict[str, int]) -> Table:
    table = _table("", "refllm", "transformers", "time ratio")
    tokens = {"prefill": settings["prompt_tokens"], "decode": 1}
    names = {"prefill": f"prefill, {settings['prompt_tokens']} tokens", "decode": "decode, per token"}
    for job, name in names.items():
        sides = [result[job][side] for side in ("refllm", "transformers")]
        cells = [f"{_span(side)}  {tokens[job] / side['median']:,.1f} tokens/s" for side in sides]
        table.add_row(name, *cells, f"{result[job]['ratio']:.2f} x")
    return table


def _memory(result: dict[str, Any]) -> Table:
    table = _table("anonymous memory", "refllm", "transformers", "of the weights")
    total = result["weights"]["total"]
    for key, name in (("load_peak", "peak while loading"), ("run_peak", "peak while running")):
        values = [result["memory"][side][key] for side in ("refllm", "transformers")]
        table.add_row(
            name, *(_size(value) for value in values), " and ".join(f"{value / total:.2f} x" for value in values)
        )
    loads = result["load_seconds"]
    table.add_row("time to load", f"{loads['refllm']:.2f} s", f"{loads['transformers']:.2f} s", "")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _span(timing: dict[str, float]) -> str:
    """Median and range in milliseconds."""
    return f"{1e3 * timing['median']:.1f} ms ({1e3 * timing['best']:.1f}..{1e3 * timing['worst']:.1f})"


def _size(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
