"""Whole models with random weights, drawn on the device: the same tensors for this project and for Transformers.

    Whole("helium-1-preview-2b", "bfloat16", "cuda")

Whether a model is computed rightly is asked twice. Its first layers, with the embedding and the head, are run by the
reference in float64 and by the backend, decoding included. And all forms of the whole model have to agree on it.
"""

import tempfile
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refllm import bench
from refllm.bench import traffic
from refllm.bench.traffic import Traffic
from refllm.config import published
from refllm.errors import InputError
from refllm.storage.weights import Weights

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **published.MODELS,
    **{name: ("HeliumForCausalLM", dict(sizes)) for name, sizes in bench.SHAPES.items()},
}
POSITIONS = 65_536
"""max_position_embeddings of all of them: what is timed may be longer than what was trained."""

# Relative rms of logits. Two right implementations of 10 layers differ by a few roundings: in float32 by 1e-6, in
# bfloat16 by a few times 2^-8. A defect: by far more. Errors of layers add up like their squares.
LIMITS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
LIMIT_LAYERS = 10
CHECKED_LAYERS, CHECKED_TOKENS, CHECKED_STEPS = 2, 24, 4


class _Unfilled(Weights):
    """Shapes alone: the tensors are made on the device and filled there."""

    def chunks(self, name: str, rows: int) -> Iterator[Any]:
        return iter(())


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model: weights of its layers, of lm_head, of keys and values per position; H / K; layers."""

    layers: int
    head: int
    cache: int
    group: int
    depth: int

    def decode_step(self, batch: int, width: int, context: int) -> Traffic:
        """The traffic of one step behind `context` positions, its own included; width: bytes of a number."""
        return traffic.decode_step(self.layers + self.head, self.cache, self.group, batch, width, context)

    def prefill(self, batch: int, width: int, tokens: int) -> Traffic:
        """The traffic of the forward pass over a prompt, logits of its last position."""
        return traffic.prefill(self.layers, self.head, self.cache, self.group, batch, width, tokens)


class Whole:
    """A model by name with random weights in `dtype` on `device`. Raises InputError for an unknown name."""

    def __init__(self, name: str, dtype: str, device: str, seed: int = 0) -> None:
        import torch

        from refllm.kernels.models.weights import to_device
        from refllm.models.families import CLASSES

        if name not in MODELS:
            raise InputError(f"--model {name} is not known: use {', '.join(MODELS)}")
        cls_name, sizes = MODELS[name]
        self.name, self.dtype, self.device, self.reference = name, dtype, device, CLASSES[cls_name]
        self.config = self.reference.config_class(**sizes, max_position_embeddings=POSITIONS)
        shapes = self.reference.tensors(self.config)
        unfilled = _Unfilled(shapes, {}, tied=self.reference.tied(self.config))
        self.weights = to_device(unfilled, getattr(torch, dtype), torch.device(device))
        self._fill(torch.Generator(device).manual_seed(seed))

    def _fill(self, generator: Any) -> None:
        """N(0, 1 / inputs) for a matrix, so that values stay near 1; norms near 1, biases near 0."""
        for name in self.weights.shapes:
            tensor = self.weights[name]
            if name.endswith("bias"):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif "norm" in name:
                tensor.normal_(1.0, 0.1, generator=generator)
            else:
                spread = 1.0 if name.startswith("embed") else tensor.shape[-1] ** -0.5
                tensor.normal_(0.0, spread, generator=generator)

    def sizes(self) -> Sizes:
        """What its traffic follows from."""
        c = self.config
        count = {name: int(np.prod(shape)) for name, shape in self.weights.shapes.items()}
        head = count.get("lm_head.weight", c.vocab_size * c.hidden_size)
        layers = sum(n for name, n in count.items() if not name.startswith(("embed_tokens", "lm_head")))
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        return Sizes(layers, head, cache, c.num_attention_heads // c.num_key_value_heads, c.num_hidden_layers)

    def fast(self, backend: str, layers: int | None = None) -> Any:
        """The fast model on these weights; layers: only the first so many."""
        import torch

        from refllm.kernels.models.fast_model import fast_class

        cls = fast_class(self.reference)
        return cls(
            self._config(layers), self.weights, dtype=self.dtype, backend=backend, device=torch.device(self.device)
        )

    def exact(self, layers: int) -> Any:
        """The reference in float64 on the first `layers` layers."""
        from refllm.precision import arithmetic

        config = self._config(layers)
        shapes = self.reference.tensors(config)
        arrays = {name: self.weights[name].double().cpu().numpy() for name in shapes}
        return self.reference(config, Weights(shapes, arrays), arithmetic("float64"))

    def _config(self, layers: int | None) -> Any:
        config = copy(self.config)
        config.num_hidden_layers = layers or config.num_hidden_layers
        return config

    def transformers(self) -> Any:
        """The model of Transformers on these weights, with its default attention. NotTakenError if it cannot be had."""
        import torch

        from refllm.bench.forms import NotTakenError
        from refllm.storage.load_report import file_name

        try:
            import transformers
        except ModuleNotFoundError:
            raise NotTakenError("transformers is not installed") from None
        with tempfile.TemporaryDirectory() as folder:
            self.config.architectures = [self.reference.__name__]
            self.config.save_pretrained(folder)
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        tensors = {file_name(name, "model."): self.weights[name] for name in self.weights.shapes}
        different = model.load_state_dict(tensors, strict=False, assign=True)
        if different.missing_keys or different.unexpected_keys:
            raise NotTakenError(f"its tensors are others: {different.missing_keys} {different.unexpected_keys}"[:160])
        return model.eval()

    def prompt(self, batch: int, tokens: int, seed: int = 0) -> np.ndarray:
        """Random token ids [B, S]."""
        return np.random.default_rng(seed).integers(5, self.config.vocab_size, (batch, tokens))

    def check(self, backend: str) -> tuple[float, str]:
        """(relative error, what is wrong or "") of the first layers, prefill and decoding, against the reference."""
        layers, ids, exact = self._exactly
        error = relative_error(decoded_logits(self.fast(backend, layers), ids, CHECKED_STEPS), exact)
        limit = limit_of(self.dtype, layers)
        return error, "" if error <= limit else f"logits of {layers} layers off by {error:.2g} (limit {limit:.2g})"

    @cached_property
    def _exactly(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Layers, ids and exact logits of `check`: once for all backends, because float64 weights take gigabytes."""
        layers = min(CHECKED_LAYERS, self.config.num_hidden_layers)
        ids = self.prompt(1, CHECKED_TOKENS, seed=1)
        return layers, ids, self.exact(layers)(input_ids=ids, logits_to_keep=CHECKED_STEPS + 1).logits


def decoded_logits(model: Any, ids: np.ndarray, steps: int) -> np.ndarray:
    """Logits [B, steps + 1, V] of the last positions of `ids`, the last `steps` of them decoded one by one."""
    from refllm.inputs import to_numpy

    first = ids.shape[1] - steps
    out = model(input_ids=ids[:, :first], past_key_values=model.new_cache(), use_cache=True, logits_to_keep=1)
    logits = [to_numpy(out.logits)]
    for i in range(first, ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        logits.append(to_numpy(out.logits))
    return np.concatenate(logits, axis=1)


def relative_error(got: Any, exact: Any) -> float:
    """Root mean square of the difference, over that of `exact`; NaN and infinities anywhere make it infinite."""
    a, b = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def limit_of(dtype: str, layers: int) -> float:
    """The limit of the relative error of logits after so many layers."""
    return LIMITS[dtype] * max(1.0, layers / LIMIT_LAYERS) ** 0.5
