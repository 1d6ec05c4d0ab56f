"""A GGUF file in llama.cpp as a candidate: `--candidate gguf:FILE --library libllama.so`.

The user's own library computes; its callback for every node of the graph shows the values. What is told of it:

    the cache of keys and values is asked for in float32 (llama.cpp's default is float16), and flash attention is off,
    which would hide the weights of attention
    the heads of q and k of llama and arcee have their channels in pairs (2i, 2i+1): they are put back to (i, i + D/2)
    every token's logits are asked for

llama.cpp computes in float32. Where the file's matrices are not F32, a product rounds what it reads as well, to
float16, bfloat16 or blocks of int8 (`refllm.accuracy.readings`), and the candidate is judged with its file's weights.
"""

from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.readings import READ_BESIDE
from refllm.check.adapters.llama_library import LlamaLibrary, Seen
from refllm.check.inputs import Inputs
from refllm.check.stacks import Opening
from refllm.check.taps import ALWAYS, Candidate, Sink
from refllm.check.weights import Given
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.storage.gguf_file import PAIRED, GgufFile, in_halves

NO_LIBRARY = (
    "--candidate gguf needs llama.cpp's shared library, --library F: libllama.so (.dylib, .dll) with its ggml "
    "libraries beside it, from a build of llama.cpp (cmake -B build -DBUILD_SHARED_LIBS=ON && cmake --build build "
    "--target llama), or from the folder llama_cpp/lib of an installed llama-cpp-python"
)
_SUMS = ("MUL_MAT", "ADD")
_OF_LAYERS = {
    "attn_norm": "input_layernorm",
    "kq": "self_attn.scores",
    "kq_soft_max": "self_attn.probs",
    "kqv_out": "self_attn.context",
    "attn_out": "self_attn.o_proj",
    "ffn_inp": "residual_mid",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_gate_b": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_up_b": "mlp.up_proj",
    "ffn_gate_par": "mlp.act",
    "ffn_swiglu": "mlp.act",
    "ffn_sqr(relu)": "mlp.act",
    "ffn_out": "mlp.down_proj",
    "l_out": "",
}
"""Name of a node -> value of the layer. Of nodes of one name the last counts: a product, then the bias added to it."""
_OTHERS = {
    "embd": "model.embed_tokens",
    "inp_embd": "model.embed_tokens",
    "result_norm": "model.norm",
    "result_output": "lm_head",
}
_HEADS = {"Qcur": "q", "Kcur": "k", "Vcur": "v"}


def open_candidate(opening: Opening) -> Candidate:
    """The file after the colon, in the library that `--library` names.

    Raises InputError without one, and for a file that is not of the checkpoint.
    """
    if opening.library is None:
        raise InputError(NO_LIBRARY)
    if opening.head != "causal_lm":
        raise InputError(f"--candidate gguf has the head causal_lm alone, not {opening.head}")
    path = Path(opening.given)
    file = GgufFile.open(path)
    must_be_of(file, opening.folder)
    must_be_known(file)
    return GgufCandidate(LlamaLibrary.open(opening.library), path, AutoConfig.from_pretrained(opening.folder), file)


def weights(opening: Opening) -> Given:
    """The weights of the file. Raises InputError for a file that is not of the checkpoint."""
    file = GgufFile.open(Path(opening.given))
    must_be_of(file, opening.folder)
    return Given(file.path.name, file, rounded=True, own=True)


def wrap(model: Any, opening: Opening) -> Candidate:
    """Nothing of llama.cpp is a live object of Python."""
    raise InputError(f"a {type(model).__name__} cannot be checked; give --candidate gguf:FILE --library F")


def must_be_of(file: GgufFile, folder: Path) -> None:
    """Raises InputError for a file of another model than the checkpoint's, naming the first thing that differs."""
    c: Any = AutoConfig.from_pretrained(folder)
    found, arch = file.metadata, file.architecture
    expected = {
        "general.architecture": c.model_type,
        f"{arch}.block_count": c.num_hidden_layers,
        f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.attention.head_count": c.num_attention_heads,
        f"{arch}.attention.head_count_kv": c.num_key_value_heads,
        f"{arch}.feed_forward_length": c.intermediate_size,
    }
    for key, value in expected.items():
        if key in found and found[key] != value:
            raise InputError(f"{file.path}: {key} is {found[key]}, the checkpoint {folder} has {value}")


def must_be_known(file: GgufFile) -> None:
    """Raises InputError for a file with tensors in a format of which is not known what their products read."""
    other = sorted(set(file.kinds.values()) - {"F32", *READ_BESIDE})
    if other:
        raise InputError(
            f"{file.path}: tensors are in {', '.join(other)}, and what llama.cpp's products with them read is not "
            f"known here; known are F32, {', '.join(READ_BESIDE)}"
        )


class GgufCandidate:
    """A model in llama.cpp. See the module for what it is told."""

    takes = ("cache", *ALWAYS)

    def __init__(self, library: LlamaLibrary, path: Path, config: Any, file: GgufFile) -> None:
        kinds = dict.fromkeys(file.kinds.values())
        self.config, self.dtype = config, "float32"
        self.name = f"llama.cpp, {path.name} ({', '.join(kinds)})"
        self.details = {"library": str(library.path), "cache": "float32", "flash attention": "off"}
        self._model = library.load(path)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Tokens of padding are not fed; their rows are zeros."""
        B, S = inputs.input_ids.shape
        with self._model.context(rows=B, tokens=S) as context:
            for piece in inputs.pieces():
                shown: dict[str, dict[int, np.ndarray]] = {}
                for row in np.flatnonzero(inputs.valid[:, piece].any(axis=1)).tolist():
                    valid, keys = inputs.valid[row, piece], inputs.valid[row, : piece.stop]
                    ids, positions = (x[row, piece][valid] for x in (inputs.input_ids, inputs.positions))
                    values = _Values(self.config)
                    context.decode(row, ids, positions, values.see)
                    for name, value in values.taps(int(keys.sum())).items():
                        of_keys = keys if name.endswith((".scores", ".probs")) else None
                        shown.setdefault(name, {})[row] = _spread(value, valid, of_keys)
                for name in in_order(shown, self.config.num_hidden_layers):
                    nothing = np.zeros_like(next(iter(shown[name].values())))
                    sink(name, np.stack([shown[name].get(row, nothing) for row in range(B)]))


def in_order(names: Any, layers: int) -> list[str]:
    """Names of values in the order of a forward pass."""
    order = ["model.embed_tokens"]
    inner = ("input_layernorm", *(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "q_layernorm", "k_layernorm",
             "q_rope", "k_rope", "scores", "probs", "context", "o_proj")), "residual_mid", "post_attention_layernorm",
             *(f"mlp.{n}" for n in ("gate_proj", "up_proj", "act", "down_proj")))  # fmt: skip
    for i in range(layers):
        order += [*(f"model.layers.{i}.{name}" for name in inner), f"model.layers.{i}"]
    return [name for name in [*order, "model.norm", "lm_head"] if name in names]


def _spread(value: np.ndarray, valid: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
    """A value of the tokens that were fed, [S, n] or [heads, S, n], as one of all positions, with zeros at those of
    padding. keys: of scores and weights, which positions of the last axis are tokens."""
    axes = {value.ndim - 2: valid, **({} if keys is None else {value.ndim - 1: keys})}
    for axis, there in axes.items():
        if not there.all():
            whole = np.zeros([*value.shape[:axis], len(there), *value.shape[axis + 1 :]], value.dtype)
            whole[(slice(None),) * axis + (there,)] = value
            value = whole
    return value


class _Values:
    """Collects the nodes of one pass over the tokens of a row."""

    def __init__(self, config: Any) -> None:
        self.config: Any = config
        self._seen: dict[str, Seen] = {}

    def see(self, node: Seen) -> None:
        """Keeps a node that has a name in the vocabulary; a later one of that name takes its place."""
        name, _, layer = node.name.rpartition("-")
        if not name:
            name, layer = node.name, ""
        if not layer.isdecimal():
            tap = _OTHERS.get(node.name)
        elif name in _HEADS:
            tap = self._of_heads(f"model.layers.{layer}.self_attn.{_HEADS[name]}", node.operator)
        else:
            inner = _OF_LAYERS.get(name)
            tap = None if inner is None else f"model.layers.{layer}.{inner}".rstrip(".")
        if tap is not None:
            self._seen[tap] = node

    def _of_heads(self, stem: str, operator: str) -> str | None:
        if operator == "ROPE":
            return f"{stem}_rope"
        if operator in _SUMS:
            return f"{stem}_proj"
        return f"{stem}_layernorm" if operator == "MUL" else None  # the rest only reshapes

    def taps(self, keys: int) -> dict[str, np.ndarray]:
        """The values in the shapes of the vocabulary, without the batch. keys: tokens of the row so far."""
        return {name: self._shaped(name, node.value, keys) for name, node in self._seen.items()}

    def _shaped(self, name: str, value: np.ndarray, keys: int) -> np.ndarray:
        c, last = self.config, name.rpartition(".")[2]
        if last in ("scores", "probs"):  # [1, H, S, slots of the cache]
            value = value[0, :, :, :keys]
            return value * np.float32(c.head_dim**-0.5) if last == "scores" else value
        N = {"k": c.num_key_value_heads}.get(last[0], c.num_attention_heads)
        if last == "context" or (last[:2] in ("q_", "k_") and last != "q_proj" and last != "k_proj"):
            value = value.reshape(-1, N, c.head_dim).transpose(1, 0, 2)
        else:
            value = value.reshape(-1, value.shape[-1])
        if c.model_type in PAIRED and last in ("q_proj", "k_proj", "q_rope", "k_rope"):
            channels = np.moveaxis(value, -1, 0)
            value = np.moveaxis(in_halves(channels, len(channels) // c.head_dim), 0, -1)
        return value
