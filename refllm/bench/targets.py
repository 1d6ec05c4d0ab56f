"""The figures to reach, and how each is read off the results of `refllm bench`.

A target gets the results (parsed JSON files) of its machine and returns what was measured as a text, or "" if none of
them has it; then it counts as not measured. A run that was asked for less than the command does by itself (fewer layers
or sizes, another dtype) is a look at a part and no answer.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from refllm.bench.results import WHOLE_CALL
from refllm.ops.contracts import CONTRACTS

Result = dict[str, Any]

STREAMING = tuple(known.operator for known in CONTRACTS.values() if not known.product)
"""Operators that read and write long arrays and multiply no matrices."""
MANY_TOKENS = 4096
GPU = "H200"
"""The figures are for this one: another GPU's results are kept beside it, and do not count."""
LEAST_SECONDS = 0.05
"""Seconds of timing per form: what `make gpu` has time for."""
_MAY_DIFFER = ("device", "minutes", "seconds", "new", "batches")
PROMPT_TOKENS = 512
"""The length of the prompt of `refllm bench cpu`."""


@dataclass(frozen=True)
class Target:
    """what: in words. goal: the figure. device: "cpu", or "cuda" for a `GPU`. measured: see the module."""

    what: str
    goal: str
    device: str
    command: str
    measured: Callable[[Sequence[Result]], str]


def device_of(result: Result) -> str:
    """Where a result comes from: "cpu" or "cuda"."""
    return str(result.get("machine", {}).get("device", "cpu"))


def counts_for(target: Target, result: Result) -> bool:
    """Whether a result is of the machine that a target means."""
    return device_of(result) == target.device and (target.device == "cpu" or GPU in str(result["machine"]["gpu"]))


def find(results: Sequence[Result], bench: str, **settings: Any) -> Result | None:
    """The newest result of a benchmark whose settings are these, or None."""
    fitting = [
        result
        for result in results
        if result["bench"] == bench and all(result["settings"].get(name) == v for name, v in settings.items())
    ]
    return max(fitting, key=lambda result: str(result["date"]), default=None)


def is_whole(result: Result) -> bool:
    """Whether a run of kernels or models on a GPU was asked for all that its command does there by itself.

    What the time did not suffice for is another matter: the result names it, and `_from` says how much it was. How long
    a form is timed may differ, down to `LEAST_SECONDS`, and how many tokens are generated at which batch sizes: a
    target of one batch reads that one alone.
    """
    from refllm.bench import kernels, models

    given = result["settings"]
    settings = models.Settings if result["bench"] in ("decode", "prefill") else kernels.Settings
    usual = {field.name: field.default for field in fields(settings) if field.name not in _MAY_DIFFER}
    asked = {name: given.get(name, value) for name, value in usual.items()}
    usual["dtype"] = kernels.DTYPE["cuda"]
    asked["dtype"] = asked["dtype"] or usual["dtype"]
    too_short = 0 < given.get("seconds", 0) < LEAST_SECONDS
    return not too_short and json.dumps(asked) == json.dumps(usual)  # a tuple is a list in a file


def _cpu(job: str, value: str, backend: str = "numpy", dtype: str = "float32") -> Callable[[Sequence[Result]], str]:
    def measured(results: Sequence[Result]) -> str:
        result = _full_size(results, backend, dtype)
        return "" if result is None or value not in result[job] else f"{result[job][value]:.2f} x"

    return measured


def _full_size(results: Sequence[Result], backend: str = "numpy", dtype: str = "float32") -> Result | None:
    """The newest of `refllm bench cpu` on the shape and the prompt that the targets mean."""
    of_shape = [result for result in results if str(result.get("checkpoint", "")).startswith("helium-220m")]
    return find(of_shape, "cpu", backend=backend, dtype=dtype, prompt_tokens=PROMPT_TOKENS)


def _load(results: Sequence[Result]) -> str:
    result = _full_size(results)
    return "" if result is None else f"{result['memory']['refllm']['load_peak'] / result['weights']['total']:.2f} x"


def _low_memory(results: Sequence[Result]) -> str:
    for result in results:
        if result["bench"] == "memory" and result["parameters"] > 2e9:
            peak = max(result["modes"]["low_memory"][name] for name in ("load_peak", "run_peak"))
            return f"{peak / 2**30:.2f} GiB ({2 * result['layer_bytes'] / 2**30:.2f} GiB are two layers)"
    return ""


Rows = list[dict[str, Any]]


def _from(bench: str, value: Callable[[Rows], str]) -> Callable[[Sequence[Result]], str]:
    """`value` of the timed rows of the newest whole run, and how much of that run there was no time for."""

    def measured(results: Sequence[Result]) -> str:
        result = find([r for r in results if r["bench"] == bench and is_whole(r)], bench)
        if result is None:
            return ""
        found = value([row for row in result["rows"] if row["time"]])
        missing = len(result["left_out"])
        return f"{found}; {missing} left out" if found and missing else found

    return measured


def _calls(rows: Rows) -> list[dict[str, dict[str, Any]]]:
    """A dict per call: form -> row."""
    calls: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        calls.setdefault((row["what"], row["panel"], row["group"], row["dtype"]), {})[row["form"]] = row
    return list(calls.values())


def fastest_peer(ours: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of the timed rows `others` of a call that was timed as `ours` was, or None.

    A replayed graph has none of the time that Python takes to start a kernel, so it is not held against one that
    could not be recorded.
    """
    alike = [row for row in others if row["time"] and row["time"]["method"] == ours["time"]["method"]]
    return min(alike, key=lambda row: row["time"]["median"], default=None)


def speedup(forms: dict[str, dict[str, Any]], ours: str, peers: Sequence[str]) -> float | None:
    """Time of the fastest of `peers` over ours; None if either was not timed, or not in the same way."""
    if ours not in forms:
        return None
    peer = fastest_peer(forms[ours], [forms[name] for name in peers if name in forms])
    return None if peer is None else float(peer["time"]["median"] / forms[ours]["time"]["median"])


def _speedups(rows: Rows, ours: str, peers: tuple[str, ...]) -> str:
    return _range([f for call in _calls(rows) if (f := speedup(call, ours, peers)) is not None], "x")


def _shares(rows: Rows, form: str) -> str:
    return _range([100 * row["figures"]["share"] for row in rows if row["form"] == form], "%")


def _streamed(rows: Rows) -> Rows:
    """Those that read and write long arrays."""
    return [r for r in rows if r["what"] in STREAMING and r["sizes"]["B"] * r["sizes"]["S"] >= MANY_TOKENS]


def _attended(rows: Rows, dims: tuple[int, ...], lengths: range) -> Rows:
    """Those of attention over a prompt."""
    return [r for r in rows if r["what"] == "attention" and r["sizes"]["D"] in dims and r["sizes"]["S"] in lengths]


def _long_caches(rows: Rows) -> Rows:
    return [r for r in rows if r["what"] == "decode_attention" and r["sizes"]["N"] == 32768]


def _alone(rows: Rows) -> Rows:
    """Those of one sequence."""
    return [row for row in rows if row["sizes"]["batch"] == 1]


def _range(values: Sequence[float], unit: str) -> str:
    """Smallest to largest, with how many there are."""
    if not values:
        return ""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return f"{low} to {high} {unit} ({len(values)} calls)" if len(values) > 1 else f"{low} {unit}"


_SDPA = ("sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn")
CPU, TORCH_CPU = "refllm bench cpu", "refllm bench cpu --backend torch"
BF16_CPU = f"{TORCH_CPU} --dtype bfloat16"

TARGETS = (
    Target("NumPy float32 prefill, 512 tokens, over Transformers", "1.00 x", "cpu", CPU, _cpu("prefill", "ratio")),
    Target("the same, over its products alone", "1.15 x", "cpu", CPU, _cpu("prefill", "ratio_to_products")),
    Target("NumPy float32 decode, over Transformers", "0.50 x", "cpu", CPU, _cpu("decode", "ratio")),
    Target("the same, over reading weights and cache once", "1.15 x", "cpu", CPU, _cpu("decode", "ratio_to_read")),
    Target(
        "torch backend float32, prefill, over Transformers",
        "0.95 x",
        "cpu",
        TORCH_CPU,
        _cpu("prefill", "ratio", "torch"),
    ),
    Target(
        "torch backend float32, decode, over Transformers", "0.95 x", "cpu", TORCH_CPU, _cpu("decode", "ratio", "torch")
    ),
    Target(
        "torch backend bfloat16, prefill, over Transformers",
        "0.95 x",
        "cpu",
        BF16_CPU,
        _cpu("prefill", "ratio", "torch", "bfloat16"),
    ),
    Target(
        "torch backend bfloat16, decode, over Transformers",
        "0.95 x",
        "cpu",
        BF16_CPU,
        _cpu("decode", "ratio", "torch", "bfloat16"),
    ),
    Target("peak memory of loading, over the float32 weights", "1.1 x", "cpu", CPU, _load),
    Target(
        "peak memory with low_memory, 2.17 billion parameters", "two layers", "cpu", "refllm bench memory", _low_memory
    ),
    Target(
        "norms, rope, activations, cross entropy, from 4096 tokens on: share of the copy bandwidth",
        "90 %",
        "cuda",
        "refllm bench kernels",
        _from("kernels", lambda rows: _shares(_streamed(rows), "triton")),
    ),
    Target(
        "the same, speed over the faster of torch.compile and Liger-Kernel",
        "1.0 x",
        "cuda",
        "refllm bench kernels",
        _from("kernels", lambda rows: _speedups(_streamed(rows), "triton", ("compile", "liger"))),
    ),
    Target(
        "attention, causal, D 128, 4k to 16k: speed over cuDNN",
        "1.0 x",
        "cuda",
        "refllm bench attention",
        _from(
            "attention",
            lambda rows: _speedups(_attended(rows, (128,), range(4096, 16385)), "triton", ("sdpa cudnn",)),
        ),
    ),
    Target(
        "attention, causal, D 80 and 160: speed over the fastest SDPA backend",
        "1.3 x",
        "cuda",
        "refllm bench attention",
        _from("attention", lambda rows: _speedups(_attended(rows, (80, 160), range(1024, 32769)), "triton", _SDPA)),
    ),
    Target(
        "decode attention, 32k slots: share of the copy bandwidth",
        "85 %",
        "cuda",
        "refllm bench attention",
        _from("attention", lambda rows: _shares(_long_caches(rows), "triton")),
    ),
    Target(
        "decode end to end, batch 1: share of the bandwidth that reading the weights needs",
        "80 %",
        "cuda",
        "refllm bench decode",
        _from("decode", lambda rows: _shares(_alone(rows), "triton")),
    ),
    Target(
        "generate, batch 1, behind 512 tokens, prompt and recording included: speed over Transformers'",
        "3.0 x",
        "cuda",
        "refllm bench decode",
        _from(
            "decode", lambda rows: _speedups(_alone(rows), f"triton, {WHOLE_CALL}", (f"transformers, {WHOLE_CALL}",))
        ),
    ),
)
