"""The fast models as a whole, on the device at hand: the check of the oracle, and decoding that a graph repeats.

Part of `make gpu`; the tests run it reduced, interpreted.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import refllm
from refllm import golden
from refllm.check.inputs import Inputs
from refllm.check.process import Processes
from refllm.check.run import find_policy, head_of, load
from refllm.check.runs import Runs
from refllm.check.stacks import Opening
from refllm.config import published
from refllm.kernels.models.operators import BACKENDS
from refllm.models.families import CLASSES

Row = dict[str, Any]
Step = Callable[[str], None]


def _few(name: str, layers: int) -> tuple[str, dict[str, Any]]:
    """A published model with few layers and a small vocabulary: what a GPU computes depends on the shapes of a layer,
    and the reference has to follow in float64."""
    cls, sizes = published.MODELS[name]
    return cls, {**sizes, "vocab_size": 4096, "num_hidden_layers": layers}


REAL_LAYERS = {
    "helium-1-preview-2b, 2 layers": _few("helium-1-preview-2b", 2),
    "stablelm-2-12b, 1 layer": _few("stablelm-2-12b", 1),
}
TOKENS = 96
NEW_TOKENS = 24


def checkpoints(folder: Path, real: bool) -> Iterator[tuple[str, Path]]:
    """The embedded checkpoints, and if `real` random ones of `REAL_LAYERS`, written to `folder`."""
    yield from ((name, Path(path)) for name, path in golden.checkpoints().items())
    for name, (cls, sizes) in REAL_LAYERS.items() if real else ():
        where = folder / cls
        reference = CLASSES[cls]
        reference.from_config(reference.config_class(**sizes), seed=1).save_pretrained(where, dtype="bfloat16")
        yield name, where


def check_models(
    device: str, dtypes: tuple[str, ...], step: Step, *, real: bool = True, tokens: int = TOKENS, only: str = ""
) -> Iterator[Row]:
    """A row per checkpoint, backend and dtype: the verdict of `refllm check` with policy fused, and one on decoding.

    real: also models of real layer shapes. only: part of the names of the checkpoints to run.
    """
    with tempfile.TemporaryDirectory() as folder, Processes() as processes:
        for name, path in checkpoints(Path(folder), real):
            for backend in BACKENDS if only in name else ():
                for dtype in dtypes:
                    step(f"{name}: {backend}, {dtype}")
                    yield _judged(name, backend, dtype, partial(_check, processes, path, backend, dtype, tokens))
                yield _judged(name, backend, "float32", partial(_decodes, path, backend, device))


def _judged(name: str, backend: str, dtype: str, run: Callable[[], Row]) -> Row:
    row = {"checkpoint": name, "backend": backend, "dtype": dtype}
    try:
        return row | run()
    except Exception as error:  # a finding of this run; the others still count
        return row | {"what": "run", "problem": f"{type(error).__name__}: {error}"}


def _check(processes: Processes, path: Path, backend: str, dtype: str, tokens: int) -> Row:
    candidate = processes.open(Opening(backend, path, head_of(path), dtype))
    model = load(path, dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    report = next(Runs(lambda _: model, candidate, Inputs(ids), find_policy("fused", "eager")).reports())
    worst = max((tap.isolated.ratio for tap in report.taps if tap.isolated is not None), default=0.0)
    broken = [tap.name for tap in report.taps if tap.broken]
    problem = "" if report.verdict != "fails" else f"fails at {broken[0] if broken else 'the next tokens'}"
    return {"what": "check", "worst_isolated_ratio": round(float(worst), 3), "problem": problem}


def _decodes(path: Path, backend: str, device: str) -> Row:
    """Greedy generation with the recorded step of decoding (a CUDA graph on a GPU) and without: the same tokens."""
    model: Any = refllm.load(path, backend=backend, device=device)
    prompt = np.random.default_rng(1).integers(5, model.config.vocab_size, (2, 7))
    new = NEW_TOKENS if device == "cuda" or backend == "torch" else 2
    sequences = []
    for recorded in (False, True):
        model.records_decoding = recorded
        sequences.append(model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None))
    same = np.array_equal(*sequences)
    return {"what": "recorded decoding", "problem": "" if same else "other tokens than without the recorded step"}
