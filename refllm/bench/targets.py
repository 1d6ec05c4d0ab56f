"""The figures to reach, and how each is read off the results of `refllm bench`.

A target gets the results (parsed JSON files) of its kind of machine and returns what was measured as a text, or "" if
none of them has it; then it counts as not measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]

STREAMING = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "add_layer_norm",
    "rope",
    "norm_rope",
    "swiglu",
    "relu2",
    "cross_entropy",
)
MANY_TOKENS = 4096


@dataclass(frozen=True)
class Target:
    """what: in words. goal: the figure. device: "cpu" or "cuda". measured: see the module."""

    what: str
    goal: str
    device: str
    command: str
    measured: Callable[[Sequence[Result]], str]


def device_of(result: Result) -> str:
    """Where a result comes from: "cpu" or "cuda"."""
    return str(result.get("machine", {}).get("device", "cpu"))


def find(results: Sequence[Result], bench: str, **settings: Any) -> Result | None:
    """The newest result of a benchmark whose settings are these, or None."""
    fitting = [
        result
        for result in results
        if result["bench"] == bench and all(result["settings"].get(name) == v for name, v in settings.items())
    ]
    return max(fitting, key=lambda result: str(result["date"]), default=None)


def _cpu(job: str, value: str, backend: str = "numpy", dtype: str = "float32") -> Callable[[Sequence[Result]], str]:
    def measured(results: Sequence[Result]) -> str:
        result = find(_full_size(results), "cpu", backend=backend, dtype=dtype)
        return "" if result is None else f"{result[job][value]:.2f} x"

    return measured


def _full_size(results: Sequence[Result]) -> list[Result]:
    """Of `refllm bench cpu`, those of the shape that the targets mean."""
    return [result for result in results if str(result.get("checkpoint", "")).startswith("helium-220m")]


def _load(results: Sequence[Result]) -> str:
    result = find(_full_size(results), "cpu", backend="numpy", dtype="float32")
    return "" if result is None else f"{result['memory']['refllm']['load_peak'] / result['weights']['total']:.2f} x"


def _low_memory(results: Sequence[Result]) -> str:
    for result in results:
        if result["bench"] == "memory" and result["parameters"] > 2e9:
            peak = max(result["modes"]["low_memory"][name] for name in ("load_peak", "run_peak"))
            return f"{peak / 2**30:.2f} GiB ({2 * result['layer_bytes'] / 2**30:.2f} GiB are two layers)"
    return ""


def _rows(results: Sequence[Result], bench: str) -> list[dict[str, Any]]:
    result = find(results, bench)
    return [row for row in result["rows"] if row["time"]] if result else []


def _calls(rows: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Per call: form -> row."""
    calls: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        calls.setdefault((row["what"], row["panel"], row["group"], row["dtype"]), {})[row["form"]] = row
    return list(calls.values())


def speedup(forms: dict[str, dict[str, Any]], ours: str, peers: Sequence[str]) -> float | None:
    """Time of the fastest of `peers` over ours; None if either was not timed."""
    others = [forms[name]["time"]["median"] for name in peers if name in forms]
    return min(others) / forms[ours]["time"]["median"] if others and ours in forms else None


def _streaming(results: Sequence[Result]) -> str:
    rows = [row for row in _rows(results, "kernels") if row["what"] in STREAMING and row["form"] == "triton"]
    shares = sorted(row["figures"]["share"] for row in rows if row["sizes"]["B"] * row["sizes"]["S"] >= MANY_TOKENS)
    return _range([100 * share for share in shares], "%")


def _streaming_peers(results: Sequence[Result]) -> str:
    """Only where both were timed in one way: a peer that no graph can record has Python's time in its own."""
    rows = [row for row in _rows(results, "kernels") if row["what"] in STREAMING]
    calls = _calls([row for row in rows if row["sizes"]["B"] * row["sizes"]["S"] >= MANY_TOKENS])
    alike = [_timed_as(call, "triton") for call in calls]
    return _range([f for c in alike if (f := speedup(c, "triton", ("compile", "liger"))) is not None], "x")


def _timed_as(forms: dict[str, dict[str, Any]], ours: str) -> dict[str, dict[str, Any]]:
    method = forms[ours]["time"]["method"] if ours in forms else ""
    return {name: row for name, row in forms.items() if row["time"]["method"] == method}


def _attention(dims: tuple[int, ...], peers: tuple[str, ...], lengths: range) -> Callable[[Sequence[Result]], str]:
    def measured(results: Sequence[Result]) -> str:
        rows = [
            row
            for row in _rows(results, "attention")
            if row["what"] == "attention" and row["sizes"]["D"] in dims and row["sizes"]["S"] in lengths
        ]
        return _range([f for c in _calls(rows) if (f := speedup(c, "triton", peers)) is not None], "x")

    return measured


def _decode_attention(results: Sequence[Result]) -> str:
    rows = [row for row in _rows(results, "attention") if row["what"] == "decode_attention" and row["form"] == "triton"]
    return _range([100 * row["figures"]["share"] for row in rows if row["sizes"]["N"] == 32768], "%")


def _decode(results: Sequence[Result]) -> str:
    rows = [row for row in _rows(results, "decode") if row["form"] == "triton" and row["sizes"]["batch"] == 1]
    return _range([100 * row["figures"]["share"] for row in rows], "%")


def _decode_peers(results: Sequence[Result]) -> str:
    rows = [row for row in _rows(results, "decode") if row["sizes"]["batch"] == 1]
    return _range([f for c in _calls(rows) if (f := speedup(c, "triton", ("transformers",))) is not None], "x")


def _range(values: Sequence[float], unit: str) -> str:
    """Smallest to largest, with how many there are."""
    if not values:
        return ""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return f"{low} to {high} {unit} ({len(values)} calls)" if len(values) > 1 else f"{low} {unit}"


_SDPA = ("sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn")
CPU, TORCH_CPU = "refllm bench cpu", "refllm bench cpu --backend torch"

TARGETS = (
    Target("NumPy float32 prefill, 512 tokens, over Transformers", "0.80 x", "cpu", CPU, _cpu("prefill", "ratio")),
    Target("NumPy float32 decode, over Transformers", "0.50 x", "cpu", CPU, _cpu("decode", "ratio")),
    Target("the same, over reading the weights once", "1.15 x", "cpu", CPU, _cpu("decode", "ratio_to_read")),
    Target(
        "torch backend float32, prefill, over Transformers",
        "1.00 x",
        "cpu",
        TORCH_CPU,
        _cpu("prefill", "ratio", "torch"),
    ),
    Target(
        "torch backend float32, decode, over Transformers", "1.00 x", "cpu", TORCH_CPU, _cpu("decode", "ratio", "torch")
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
        _streaming,
    ),
    Target(
        "the same, speed over the faster of torch.compile and Liger-Kernel",
        "1.0 x",
        "cuda",
        "refllm bench kernels",
        _streaming_peers,
    ),
    Target(
        "attention, causal, D 128, 4k to 16k: speed over cuDNN",
        "1.0 x",
        "cuda",
        "refllm bench attention",
        _attention((128,), ("sdpa cudnn",), range(4096, 16385)),
    ),
    Target(
        "attention, causal, D 80 and 160: speed over the fastest SDPA backend",
        "1.3 x",
        "cuda",
        "refllm bench attention",
        _attention((80, 160), _SDPA, range(1024, 32769)),
    ),
    Target(
        "decode attention, 32k slots: share of the copy bandwidth",
        "85 %",
        "cuda",
        "refllm bench attention",
        _decode_attention,
    ),
    Target(
        "decode end to end, batch 1: share of the bandwidth that reading the weights needs",
        "80 %",
        "cuda",
        "refllm bench decode",
        _decode,
    ),
    Target(
        "decode end to end, batch 1: speed over Transformers' generate",
        "3.0 x",
        "cuda",
        "refllm bench decode",
        _decode_peers,
    ),
)
