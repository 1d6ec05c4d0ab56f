"""A forward pass of Llama in plain NumPy, with the writer of docs/recording.md: a program that knows no refllm.

    python llama_numpy.py FOLDER run.safetensors right|unscaled < ids, a JSON list of lists

unscaled: the scores of layer 1 are not divided by sqrt(D). Heads stay after the sequence, and keys are repeated to all.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

folder, out, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
ids = np.array(json.load(sys.stdin))
c = json.loads((folder / "config.json").read_text())
raw = (folder / "model.safetensors").read_bytes()
start = 8 + int.from_bytes(raw[:8], "little")
index = json.loads(raw[8:start])
H, K, D, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], np.float32(c["rms_norm_eps"])
(B, S), shown = ids.shape, {"input_ids": ids}


def weight(name: str) -> np.ndarray:
    begin, end = index[f"{name}.weight"]["data_offsets"]
    return np.frombuffer(raw[start + begin : start + end], np.float32).reshape(index[f"{name}.weight"]["shape"])


def show(name: str, x: np.ndarray) -> np.ndarray:
    shown[name] = x
    return x


def linear(name: str, x: np.ndarray) -> np.ndarray:
    return show(name, x @ weight(name).T)


def norm(name: str, x: np.ndarray) -> np.ndarray:
    return show(name, x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight(name))


def rotate(x: np.ndarray) -> np.ndarray:  # [B, S, heads, D]
    angles = np.arange(S)[:, None] * c["rope_parameters"]["rope_theta"] ** (-np.arange(0, D, 2) / D)
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


x = show("model.embed_tokens", weight("model.embed_tokens")[ids])
for layer in range(c["num_hidden_layers"]):
    at = f"model.layers.{layer}"
    a = norm(f"{at}.input_layernorm", x)
    q, k, v = (linear(f"{at}.self_attn.{p}_proj", a).reshape(B, S, -1, D) for p in "qkv")
    q, k = show(f"{at}.self_attn.q_rope", rotate(q)), np.repeat(rotate(k), H // K, axis=2)
    show(f"{at}.self_attn.k_rope", k)
    scores = np.einsum("bshd,bthd->bhst", q, k)
    if not (kind == "unscaled" and layer == 1):
        scores = scores / np.sqrt(np.float32(D))
    scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    o = np.einsum("bhst,bthd->bshd", p / p.sum(axis=-1, keepdims=True), np.repeat(v, H // K, axis=2))
    show(f"{at}.self_attn.context", o)
    x = show(f"{at}.residual_mid", x + linear(f"{at}.self_attn.o_proj", o.reshape(B, S, -1)))
    b = norm(f"{at}.post_attention_layernorm", x)
    gate, up = linear(f"{at}.mlp.gate_proj", b), linear(f"{at}.mlp.up_proj", b)
    x = show(at, x + linear(f"{at}.mlp.down_proj", show(f"{at}.mlp.act", gate / (1 + np.exp(-gate)) * up)))
linear("lm_head", norm("model.norm", x))
import_module("trace_writer").write_trace(out, shown, source="plain NumPy")
assert not any(name.startswith(("refllm", "safetensors")) for name in sys.modules)
