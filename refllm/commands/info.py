"""`refllm info`: what a checkpoint is, from its config.json and the headers of its files; no weight is read.

A config.json alone is enough for everything but the comparison with the stored tensors.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refllm.config import AutoConfig, ModelConfig
from refllm.config.traits import traits_of
from refllm.kernels.fusions import ALWAYS_IN_STEPS, fusions

Shape = tuple[int, ...]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# First of these that occurs in a tensor's name decides the group it is counted in.
GROUPS = {
    "norm": "norms",
    "embed_tokens": "embeddings",
    "self_attn": "attention",
    "mlp": "mlp",
    "": "head",
}


@dataclass(frozen=True)
class Info:
    """What `describe` found. Shapes are the config's, stored the files' (name -> (dtype, shape)); None: no files.

    quantized: how weights are quantised, in words, "" if none is. nbytes: of all stored tensors. missing, unexpected
    and mismatched name tensors as they are called in files.
    """

    path: str
    config: ModelConfig
    head: str
    shapes: dict[str, Shape]
    stored: dict[str, tuple[str, Shape]] | None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    quantized: str = ""
    nbytes: int = 0

    @property
    def parameters(self) -> int:
        """How many the model has that config.json describes, its head included; tied weights count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def groups(self) -> dict[str, int]:
        """Parameters by part of the model."""
        counts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head"), 0)
        for name, shape in self.shapes.items():
            counts[next(group for part, group in GROUPS.items() if part in name)] += math.prod(shape)
        return counts

    @property
    def fused(self) -> bool:
        """Whether the torch and triton backends compute it: not by a page from outside."""
        return self.config.traits is None

    @property
    def cache_numbers_per_token(self) -> int:
        """Keys and values of one token in all layers: 2 L K D."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim

    @property
    def findings(self) -> list[str]:
        """Why the checkpoint cannot be loaded as what its config says, one sentence each."""
        found = [f"missing: {name}" for name in self.missing]
        found += [
            f"wrong shape: {name} is {list(stored)}, expected {list(expected)}"
            for name, (expected, stored) in self.mismatched.items()
        ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "config": self.config.to_dict(),
            "unused_keys": self.config.unused_keys,
            "quantized": self.quantized,
            "head": self.head,
            "features": features(self.config),
            "parameters": self.parameters,
            "parameters_by_group": self.groups,
            "weight_bytes": {dtype: self.parameters * size for dtype, size in BYTES.items()},
            "cache_bytes_per_token": {dtype: self.cache_numbers_per_token * size for dtype, size in BYTES.items()},
            "fusions": [vars(fusion) for fusion in fusions(self.config)] if self.fused else [],
            "tensors": self.shapes,
            "stored": None
            if self.stored is None
            else {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in self.stored.items()},
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": {
                name: {"expected": expected, "found": found} for name, (expected, found) in self.mismatched.items()
            },
        }


def describe(path: Path) -> Info:
    """Describes a checkpoint folder or a config.json. Raises a RefllmError for what is unreadable."""
    from refllm.models.auto import model_class

    config = AutoConfig.from_pretrained(path)
    head = model_class(config).head
    shapes = expected_shapes(config, head)
    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        return Info(str(path), config, head, shapes, None)
    return _compare_with_files(path, config, head, shapes)


def _compare_with_files(path: Path, config: ModelConfig, head: str, shapes: dict[str, Shape]) -> Info:
    from refllm.models.auto import model_class
    from refllm.storage.load_report import compare
    from refllm.storage.quantized import DequantizedCheckpoint, open_checkpoint

    cls = model_class(config, head)
    bare = cls.tensors(config)
    quantized = ""
    with open_checkpoint(path) as checkpoint:
        size = checkpoint.nbytes
        stored = {name: (checkpoint.dtype(name), tuple(checkpoint.shape(name))) for name in checkpoint.names}
        if isinstance(checkpoint, DequantizedCheckpoint):
            stored = {name: (checkpoint.stored_as(name), shape) for name, (_, shape) in stored.items()}
            quantized = f"{checkpoint.in_words}: {len(checkpoint.quantized)} of {len(stored)} tensors"
    optional = [name for name in bare if name.endswith(".bias") and "norm" in name]
    report, _ = compare({name: shape for name, (_, shape) in stored.items()}, bare, optional, cls.tied(config), path)
    missing = [name for name in report.missing if name not in report.zeroed]
    found = report.unexpected, report.mismatched
    return Info(str(path), config, head, shapes, stored, missing, *found, quantized=quantized, nbytes=size)


def expected_shapes(config: ModelConfig, head: str) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, under the names of a checkpoint file."""
    from refllm.models.auto import model_class
    from refllm.storage.load_report import file_name

    prefix = {"base": "", "question_answering": "transformer."}.get(head, "model.")
    named = model_class(config, head).tensors(config)
    return {file_name(name, prefix): tuple(shape) for name, shape in named.items()}


def features(config: ModelConfig) -> dict[str, str]:
    """What the architecture is, in words, in the order of the forward pass."""
    c, rope, traits = config, config.rope_parameters, traits_of(config)
    group = c.num_attention_heads // c.num_key_value_heads
    sharing = "one key/value head per query head" if group == 1 else f"{group} query heads share a key/value head"
    norm = f"LayerNorm, eps {c.layer_norm_eps:g}" if traits.layer_norm else f"RMSNorm, eps {c.rms_norm_eps:g}"
    pairs = "interleaved pairs (2i, 2i+1)" if traits.interleaved else "pairs (i, i + R/2)"
    scaling = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta", "partial_rotary_factor")}
    biases = [name for name in ("attention_bias", "use_qkv_bias", "mlp_bias") if getattr(c, name, False)]
    extras = [
        name for name in ("qk_layernorm", "use_parallel_residual", "tie_word_embeddings") if getattr(c, name, False)
    ]
    return {
        "family": c.model_type,
        "vocabulary": f"{c.vocab_size}",
        "layers": f"{c.num_hidden_layers} of width {c.hidden_size}",
        "norm": norm,
        "attention": f"{c.num_attention_heads} heads of {c.head_dim}; {sharing}",
        **_windows(config),
        "rope": f"{rope['rope_type']}, theta {rope['rope_theta']:g}, {c.rotary_dim} of {c.head_dim} dims, {pairs}",
        "rope scaling": ", ".join(f"{key} {_number(value)}" for key, value in scaling.items()) or "none",
        "mlp": f"{'gated ' if traits.gated else ''}{c.hidden_act}, width {c.intermediate_size}",
        "biases": ", ".join(biases) or "none",
        "switched on": ", ".join(extras) or "nothing",
        "context": f"{c.max_position_embeddings} tokens",
        "special tokens": f"bos {c.bos_token_id}, eos {c.eos_token_id}, pad {c.pad_token_id}",
    }


def _windows(config: ModelConfig) -> dict[str, str]:
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    seen = [window for window in windows if window is not None]
    return {"window": f"in {len(seen)} of {len(windows)} layers a query sees the last {seen[0]} keys"} if seen else {}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_info(info: Info, *, tensors: bool = False) -> Any:
    """The description as tables; a line per tensor if `tensors`."""
    from rich.console import Group
    from rich.text import Text

    from refllm.terminal.fitted_table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in features(info.config).items():
        facts.add_row(Text(name, style="dim"), value)
    facts.add_row(Text("parameters", style="dim"), f"{info.parameters:,}")
    parts = ", ".join(f"{name} {count:,}" for name, count in info.groups.items() if count)
    facts.add_row("", parts)
    weights = ", ".join(f"{dtype} {_size(info.parameters * size)}" for dtype, size in BYTES.items())
    facts.add_row(Text("weights in memory", style="dim"), weights)
    cache = ", ".join(f"{dtype} {_size(info.cache_numbers_per_token * size)}" for dtype, size in BYTES.items())
    facts.add_row(Text("cache per token", style="dim"), cache)
    if info.config.unused_keys:
        facts.add_row(Text("keys without effect", style="dim"), ", ".join(info.config.unused_keys))
    if info.quantized:
        facts.add_row(Text("quantised", style="dim"), info.quantized)
    facts.add_row(Text("files", style="dim"), _files_line(info))
    lines: list[Any] = [Text(f"{info.path} ({info.head})", style="bold"), facts]
    lines += _fusion_lines(info.config) if info.fused else []
    lines += [Text(finding, style="bold red") for finding in info.findings]
    lines += [Text(f"not used: {name}", style="yellow") for name in info.unexpected]
    if tensors:
        lines += ["", _tensor_table(info)]
    return Group(*lines)


def _fusion_lines(config: ModelConfig) -> list[Any]:
    from rich.text import Text

    from refllm.terminal.fitted_table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for fusion in fusions(config):
        table.add_row(f"  {fusion.operator}", fusion.fuses, Text(fusion.instead and f"not used: {fusion.instead}"))
    for asked, instead in ALWAYS_IN_STEPS.items():
        table.add_row("  attention", f"for {asked}", Text(f"not used: {instead}"))
    return [Text("fused in the torch and triton backends", style="dim"), table]


def _files_line(info: Info) -> str:
    if info.stored is None:
        return "no safetensors file: described from config.json alone"
    dtypes = sorted({dtype for dtype, _ in info.stored.values()})
    verdict = "all as expected" if not info.findings and not info.unexpected else "not as expected"
    return f"{len(info.stored)} tensors, {', '.join(dtypes)}, {_size(info.nbytes)}: {verdict}"


def _tensor_table(info: Info) -> Any:
    from refllm.terminal.fitted_table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tensor")
    table.add_column("shape")
    table.add_column("stored")
    for name in [*info.shapes, *info.unexpected]:
        dtype, shape = (info.stored or {}).get(name, ("", ()))
        table.add_row(name, str(list(info.shapes.get(name, shape))), dtype or "-")
    return table


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
