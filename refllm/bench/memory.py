"""`refllm bench memory`: what loading and one forward pass of a full-size model take, with and without low_memory.

The checkpoint holds random bfloat16 weights, written to a temporary folder tensor by tensor. Each mode runs in a
process of its own. What counts is anonymous memory: pages of the memory-mapped file can be dropped at any time.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refllm import bench
from refllm.apart import Channel, EndedError, Process
from refllm.config import published
from refllm.errors import InputError

GIB = 2**30
MODES = ("float32", "low_memory")

# A published shape, and a small one to try the command.
SHAPES: dict[str, dict[str, int]] = {
    "helium-1-preview-2b": published.MODELS["helium-1-preview-2b"][1],
    "helium-1m": bench.SHAPES["helium-1m"],
}


def bench_memory(
    shape: str, tokens: int, modes: tuple[str, ...] = MODES, step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Seconds and peak anonymous bytes of loading and of one forward pass, per mode. InputError: unknown shape."""
    if shape not in SHAPES:
        raise InputError(f"--shape {shape} is not known: use {' or '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as folder:
        step(f"writing random weights: {shape}")
        parameters = write_random(Path(folder), SHAPES[shape])
        results = {}
        for mode in modes:
            step(f"loading and running: {mode}")
            results[mode] = _in_a_process(folder, mode, tokens)
    layer = 4 * _layer_parameters(SHAPES[shape])
    return {"shape": shape, "tokens": tokens, "parameters": parameters, "layer_bytes": layer, "modes": results}


def write_random(folder: Path, shape: dict[str, Any], seed: int = 0, name: str = "HeliumForCausalLM") -> int:
    """A bfloat16 checkpoint of the shape, written in memory for one tensor. name: of its class. Returns the number of
    parameters."""
    from refllm.models.families import CLASSES
    from refllm.storage.checkpoint_writer import save_checkpoint
    from refllm.storage.weights import fresh_weights

    cls = CLASSES[name]
    config = cls.config_class(**shape, architectures=[name])
    tensors = cls.tensors(config)
    weights = fresh_weights(tensors, config, seed, tied=cls.tied(config), low_memory=True)
    save_checkpoint(folder, weights.renamed("model."), "bfloat16")
    config.save_pretrained(folder)
    return sum(int(np.prod(shape)) for shape in tensors.values())


def write_published(folder: Path, model: str, layers: int | None = None) -> int:
    """A checkpoint of a published model's shape with random weights. layers: other than it has. Returns the number of
    parameters. Raises InputError for an unknown one."""
    if model not in published.MODELS:
        raise InputError(f"{model} is not known: use {', '.join(published.MODELS)}")
    name, sizes = published.MODELS[model]
    return write_random(folder, sizes | ({} if layers is None else {"num_hidden_layers": layers}), name=name)


def _layer_parameters(shape: dict[str, int]) -> int:
    E, F = shape["hidden_size"], shape["intermediate_size"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    return E * heads * shape["head_dim"] + 3 * E * F + 2 * E


def _in_a_process(folder: str, mode: str, tokens: int) -> dict[str, Any]:
    with Process.fresh("refllm.bench.memory:serve") as process:
        process.send((folder, mode, tokens))
        try:
            return dict(process.receive(math.inf).values)
        except EndedError as error:
            raise InputError(f"the {mode} run ended: {error}") from None


def serve(channel: Channel) -> None:
    """What the process of one mode does."""
    for request in channel.requests():
        channel.answer("done", _run(*request))


def _run(folder: str, mode: str, tokens: int) -> dict[str, Any]:
    """Loads and runs a model, and measures both."""
    import refllm
    from refllm.bench.worker import Peak, anonymous_bytes

    before, start = anonymous_bytes(), time.perf_counter()
    with Peak() as loading:
        model = refllm.load(folder, low_memory=mode == "low_memory")
    loaded = time.perf_counter()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    with Peak() as running:
        logits = model(input_ids=ids, use_cache=False).logits
    return {
        "load_seconds": loaded - start,
        "forward_seconds": time.perf_counter() - loaded,
        "load_peak": loading.bytes - before,
        "run_peak": running.bytes - before,
        "finite": bool(np.isfinite(logits).all()),
    }


def show_memory(result: dict[str, Any]) -> Any:
    """The result as a table for a terminal."""
    from refllm.terminal.fitted_table import Table

    weights = 4 * result["parameters"]
    title = f"{result['shape']}: {result['parameters'] / 1e6:,.1f} million parameters, {result['tokens']} tokens, "
    title += f"float32 weights {weights / GIB:.2f} GiB, two layers {2 * result['layer_bytes'] / GIB:.2f} GiB"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "peak loading", "peak running", "over weights", "loading", "forward"):
        table.add_column(column, justify="left" if not column else "right")
    for mode, run in result["modes"].items():
        peak = max(run["load_peak"], run["run_peak"])
        table.add_row(
            mode,
            f"{run['load_peak'] / GIB:.2f} GiB",
            f"{run['run_peak'] / GIB:.2f} GiB",
            f"{peak / weights:.3f}",
            f"{run['load_seconds']:.1f} s",
            f"{run['forward_seconds']:.1f} s",
        )
    return table
