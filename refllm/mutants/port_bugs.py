"""Mistakes in a port that shows its logits alone (`refllm.mutants.port`), and the hypotheses that are right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Fields = dict[str, Any]
_ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")  # fmt: skip


@dataclass(frozen=True)
class Bug:
    """fields: of the port, of a config. right: names of hypotheses, any of which is right; () where none is, since the
    mistake is not in the catalogue. number: the one that is solved for."""

    name: str
    fields: Callable[[Any], Fields]
    right: tuple[str, ...]
    number: float | None = None


def _bug(name: str, right: str, number: float | None = None, **fields: Any) -> Bug:
    return Bug(name, lambda config: fields, tuple(right.split(" | ")) if right else (), number)


def _with(name: str, right: str, fields: Callable[[Any], Fields]) -> Bug:
    return Bug(name, fields, tuple(right.split(" | ")) if right else ())


def _interleave(config: Any) -> Fields:
    return {"interleaved": config.model_type != "helium"}


def _gguf(rows: Array, head_dim: int) -> Array:
    """Halves to pairs, as converters for llama.cpp write q and k."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)


def _two_norms(config: Any) -> bool:
    return not getattr(config, "use_parallel_residual", False)


def _permuted(which: str) -> Callable[[Any], Fields]:
    def fields(config: Any) -> Fields:
        if not _whole_heads(config):
            return {}
        change = lambda a: _gguf(a, config.head_dim)  # noqa: E731
        return {"change": {f"{n}_proj.{kind}": change for n in which for kind in ("weight", "bias")}}

    return fields


def _whole_heads(config: Any) -> bool:
    return bool(config.rotary_dim == config.head_dim)


_EXCHANGED = {
    f"{a}.{kind}": f"{b}.{kind}"
    for kind in ("weight", "bias")
    for a, b in (("input_layernorm", "post_attention_layernorm"), ("post_attention_layernorm", "input_layernorm"))
}


def _steps(a: Array, bits: int, group: int) -> Array:
    """Rounded to 2^bits - 1 levels about 0, every group of a row for itself."""
    blocks = a.reshape(a.shape[0], -1, group if group and a.shape[1] % group == 0 else a.shape[1])
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.max(np.abs(blocks), axis=2, keepdims=True) / top
    return (np.rint(blocks / scale) * scale).reshape(a.shape).astype(np.float32)


def _half(a: Array) -> Array:
    return a.astype(np.float16).astype(np.float32)


def _dims(part: float) -> Callable[[Any], Fields]:
    return lambda c: {"dims": int(c.rotary_dim * part) // 2 * 2}


def _capped(cap: float) -> Callable[[Array], Array]:
    return lambda y: cap * np.tanh(y / cap)


def _log_softmax(y: Array) -> Array:
    y = y - y.max(-1, keepdims=True)
    return y - np.log(np.exp(y).sum(-1, keepdims=True))


def _unlisted() -> Iterator[Bug]:
    """Mistakes that no hypothesis describes: to name a cause of one is wrong."""
    yield _bug("angles cut to 8 bits", "", cut_angles=True)
    yield _bug("a gap in the positions", "", place=lambda p: p + 3 * (p > 20))
    yield _bug("every eighth position twice", "", place=lambda p: p - p // 8)
    yield _with("two dims not turned", "", lambda c: {"dims": c.rotary_dim - 2} if c.rotary_dim > 4 else {})
    yield _bug("sees every other key", "", sees=lambda t, u: (u <= t) & ((t - u) % 2 == 0))
    yield _bug("window 8 and four sinks", "", sees=lambda t, u: (u <= t) & ((t - u < 8) | (u < 4)))
    yield _bug("key 5 hidden", "", sees=lambda t, u: (u <= t) & ((u != 5) | (t == 5)))
    yield _bug("heads by turns", "", groups=lambda h, H, K: (h + h // K) % K)
    yield _bug("stream x 0.9", "", keep=0.9)
    yield _bug("act softsign", "", act="softsign")
    yield _bug("act softplus", "", act="softplus")
    yield _bug("norm weight + 0.37, no scale", "", scale=lambda c: 1.0, plus=0.37)
    yield _bug("head capped and shifted", "", head=lambda y: _capped(11)(y + 1.0))
    yield _bug("logits + their column", "", head=lambda y: y + np.linspace(0, 0.2, y.shape[-1]))
    yield _bug("ids + 5", "", roll=-5)
    tensors: dict[str, tuple[str, Callable[[Array], Array]]] = {
        "half of a matrix 0": ("down_proj.weight", lambda a: a * (np.arange(a.shape[0]) % 2)[:, None]),
        "a zero column block": ("v_proj.weight", lambda a: a * (np.arange(a.shape[1]) > 7)),
        "rows of down one late": ("down_proj.weight", lambda a: np.roll(a, 1, 0)),
        "rows of q one late": ("q_proj.weight", lambda a: np.roll(a, 1, 0)),
        "columns of o one late": ("o_proj.weight", lambda a: np.roll(a, 1, 1)),
        "rows of up reversed": ("up_proj.weight", lambda a: a[::-1]),
        "weights in int3": ("proj.weight", lambda a: _steps(a, 3, 0)),
        "weights cut at 2 sigma": ("proj.weight", lambda a: np.clip(a, -2 * a.std(), 2 * a.std())),
        "norm weights cut at 1": ("norm.weight", lambda a: np.minimum(a, 1)),
        "one weight 0": ("down_proj.weight", lambda a: a * (np.arange(a.size).reshape(a.shape) != 77)),
    }
    for name, (ending, change) in tensors.items():
        yield _bug(name, "", change={ending: change})


BUGS: list[Bug] = [
    _bug("RoPE scaling lost", "rope scaling ignored", scaling="none"),
    _bug("RoPE scaling linear", "rope scaling as linear", scaling="linear"),
    *(_bug(f"theta {v:g}", f"theta {v:g}", theta=v) for v in (1e4, 1e5, 5e5, 1e6)),
    _with("theta times 10", "theta times 10 | theta 100000 | theta 1e+06 | theta 1e+07",
          lambda c: {"theta": 10 * c.rope_parameters["rope_theta"]}),
    _bug("theta 1234567", "theta 1.23457e+06", 1234567.0, theta=1234567.0),
    _bug("theta 30000", "theta 30000", 30000.0, theta=3e4),
    _with("other pairs", "the other pairing", _interleave),
    _bug("other direction", "sign of sin", sign=-1.0),
    _bug("not turned", "no rotation", turn=""),
    _bug("q alone turned", "only q turned", turn="q"),
    _bug("k alone turned", "only k turned", turn="k"),
    _bug("v turned too", "v turned", turn="qkv"),
    _bug("turned twice", "turned twice", twice=True),
    _with("half of the dims", "1/2 of the dims turned", _dims(0.5)),
    _with("a quarter of the dims", "1/4 of the dims turned", _dims(0.25)),
    _with("all dims", "all dims turned", lambda c: {"dims": c.head_dim} if c.rotary_dim < c.head_dim else {}),
    _bug("positions restart at 16", "positions restart after 16", place=lambda p: p % 16),
    _bug("positions restart at 32", "positions restart after 32", place=lambda p: p % 32),
    _bug("positions doubled", "positions doubled", place=lambda p: 2 * p),
    _bug("positions halved", "positions halved", place=lambda p: p // 2),
    _bug("position 0 twice", "first position twice", place=lambda p: np.maximum(p - 1, 0)),
    _bug("q one behind", "q one position behind", shift_q=1),
    _bug("attention factor lost", "attention factor dropped", factor=1.0),
    *(_bug(f"eps {v:g}", f"norm eps {v:g}", eps=v) for v in (1e-12, 1e-6, 1e-5, 1e-3, 1e-2)),
    _bug("eps 3e-5", "norm eps 3e-05", 3e-5, eps=3e-5),
    _bug("eps outside", "eps outside the root", eps_outside=True),
    _bug("weight + 1", "norm weight plus one", plus=1.0),
    _bug("norms without weight", "norm weight dropped", weightless=True),
    _with("other norm", "LayerNorm for RMSNorm | RMSNorm for LayerNorm",
          lambda c: {"centred": not hasattr(c, "layer_norm_eps")}),
    _bug("norms without bias", "norm bias dropped", biasless_norm=True),
    _bug("no last norm", "the last norm: skipped", unfinished=True),
    _bug("last norm twice", "last norm twice", finish_twice=True),
    _bug("no head norms", "head norms of q and k skipped", headless="qk"),
    _bug("no head norm of k", "head norms of k skipped", headless="k"),
    _with("norms after", "norms after the sum", lambda c: {"post_norm": True} if _two_norms(c) else {}),
    _bug("no scale", "scale missing", scale=lambda c: 1.0),
    _bug("scale of the width", "scale from the hidden size", scale=lambda c: c.hidden_size**-0.5),
    _bug("scale twice", "scale twice", scale=lambda c: 1 / c.head_dim),
    _bug("scale without log2", "softmax to the base 2", scale=lambda c: np.log(2) * c.head_dim**-0.5),
    _bug("scale 3 % less", "scale", -0.97, scale=lambda c: 0.97 * c.head_dim**-0.5),
    _bug("sees all", "not causal", sees=lambda t, u: (t + u) >= 0),
    _bug("sees the next", "mask 1 too wide", sees=lambda t, u: u <= t + 1),
    _bug("does not see itself", "diagonal masked", sees=lambda t, u: (u < t) | ((u == 0) & (t == 0))),
    *(_bug(f"sees {n} keys", f"window {n}", sees=lambda t, u, n=n: (u <= t) & (t - u < n)) for n in (4, 16, 32)),
    _bug("sees 11 keys", "window 11", 11.0, sees=lambda t, u: (u <= t) & (t - u < 11)),
    _bug("chunks of 16", "chunks of 16", sees=lambda t, u: (u <= t) & (t // 16 == u // 16)),
    _bug("heads tiled", "K/V heads tiled", groups=lambda h, H, K: h % K),
    _bug("one head for all", "first K/V head for all", groups=lambda h, H, K: 0),
    _bug("k for v", "k as v", k_for_v=True),
    _bug("k and v swapped", "k and v swapped", swap_kv=True),
    _bug("scores capped", "scores capped at 20", cap_scores=20.0),
    _bug("a sink", "sink", sink=True),
    _bug("merged crosswise", "heads merged crosswise", merge="crosswise"),
    *(_bug(f"act {n}", f"activation {right}", act=n) for n, right in (
        ("gelu", "gelu"), ("tanh gelu", "gelu_pytorch_tanh"), ("quick", "quick_gelu"), ("relu", "relu"),
        ("relu2", "relu2"), ("silu", "silu"), ("none", "linear"), ("tanh", "tanh"), ("mish", "mish"))),
    _bug("act square", "square without relu", act="square"),
    _bug("gate and up", "gate and up swapped", gate="up"),
    _bug("no up", "up dropped", gate="alone"),
    _bug("no gate", "gate dropped", gate="unused"),
    _bug("gate added", "gate added", gate="sum"),
    _bug("16 channels short", "last 16 of the MLP", tail=16),
    _bug("parallel", "parallel residual", parallel="same norm"),
    _bug("parallel, two norms", "parallel residual of two norms", parallel="own norm"),
    _bug("sequential", "sequential residual", parallel="sequential"),
    _bug("half of the MLP", "factor of what MLP adds 0.5", add_mlp=0.5),
    _bug("attention twice", "attention added twice", add_attention=2.0),
    _bug("no attention", "attention dropped", add_attention=0.0),
    _bug("attention x 0.9", "factor of what attention adds 0.9", 0.9, add_attention=0.9),
    *(_bug(f"no {n} bias", f"{n} bias dropped", drop=(f"{m}.bias",))
      for n, m in zip(("q", "k", "v", "o", "gate", "up", "down"), _ALL, strict=True)),
    _bug("no biases", "biases of all dropped", drop=tuple(f"{m}.bias" for m in _ALL)),
    _with("q and k as in GGUF", "rows of q and k: halves to pairs, as in GGUF", _permuted("qk")),
    _with("q as in GGUF", "rows of q: halves to pairs, as in GGUF", _permuted("q")),
    _with("k as in GGUF", "rows of k: halves to pairs, as in GGUF", _permuted("k")),
    _with("o transposed", "o_proj transposed", lambda c: {"change": {"o_proj.weight": np.transpose}}
          if c.head_dim * c.num_attention_heads == c.hidden_size else {}),
    _with("norms exchanged", "norms swapped", lambda c: {"renamed": _EXCHANGED} if _two_norms(c) else {}),
    _bug("weights in int8", "int8 weights in rows", change={"proj.weight": lambda a: _steps(a, 8, 0)}),
    _bug("weights in int4 by 32", "int4 weights in groups of 32", change={"proj.weight": lambda a: _steps(a, 4, 32)}),
    _bug("cache in float16", "cache in float16", cache=_half),
    _bug("first layer skipped", "layer 0 skipped", layers=lambda order: order[1:]),
    _bug("second layer skipped", "layer 1 skipped", layers=lambda order: order[:1] + order[2:]),
    _bug("first layer twice", "layer 0 twice", layers=lambda order: [0, *order]),
    _bug("layers reversed", "layers reversed | layers 0 and 1 swapped", layers=lambda order: order[::-1]),
    _with("embeddings x sqrt(E)", "embedding times sqrt(E)", lambda c: {"embed": c.hidden_size**0.5}),
    _bug("embeddings x 3", "factor of embeddings 3", 3.0, embed=3.0),
    _bug("ids + 1", "the embedding rows of the token ids + 1", roll=-1),
    _bug("logits capped", "logits capped at 30", head=_capped(30)),
    _bug("logits capped at 7", "cap of logits 7", 7.0, head=_capped(7)),
    _bug("log-probabilities", "log-probabilities", head=_log_softmax),
    _bug("logits / 8", "factor of logits 0.125", 0.125, head=lambda y: y / 8),
    _bug("logits a row late", "logits one late", head=lambda y: np.roll(y, 1, 0)),
    _bug("tied", "tied head", untie="embed"),
    _bug("gelu in layer 1", "activation gelu, layer 1", act="gelu", only_layer=1),
    _bug("window 8 in layer 0", "window 8, layer 0", sees=lambda t, u: (u <= t) & (t - u < 8), only_layer=0),
    *_unlisted(),
]  # fmt: skip
"""Every one leaves most models wrong; where it changes nothing (a bias that is not there), it is not visible."""
