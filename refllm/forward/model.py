"""A model: a config, its weights, the page that computes it, and one head. Named classes: `refllm.models.families`.

    model = HeliumForCausalLM.from_pretrained("folder", dtype="bfloat16")
    out = model(input_ids=np.array([[1, 2, 3]]))
    out.logits                       # [1, 3, V]

A call checks its inputs, prepares positions, masks and rotary tables, and hands over to the page
(`refllm/models/<family>.py`), which is where the mathematics is.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from refllm.config import ModelConfig
from refllm.errors import InputError
from refllm.forward.cache import DynamicCache, NoCache, StaticCache
from refllm.forward.masks import masking
from refllm.forward.operators import Operators, Recorder
from refllm.forward.outputs import ModelOutput
from refllm.forward.rotary import RotaryEmbedding
from refllm.inputs import as_array, as_integers
from refllm.precision import Arithmetic, Policy, arithmetic, rounding
from refllm.precision.dtype_names import dtype_name
from refllm.storage.checkpoint import one_model
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.storage.quantized import open_checkpoint
from refllm.storage.weights import Weights, fresh_weights, load_weights

Progress = Callable[[int, int], None]


class Model:
    """One family with one head. Instances come from `from_pretrained` or `from_config`; calling them is `forward`.

    config, weights: what was loaded. generation_config: the defaults of `generate`. arithmetic: the precision. rotary:
    the rotary tables, whose state (rope_type "dynamic" only) lives as long as the model.
    """

    # Filled in by `refllm.models.families`: the mathematics, and the class that computes it on another backend.
    config_class: type[ModelConfig]
    page: ModuleType
    heads: ModuleType
    head: str
    fast_class: Callable[[str, str | Policy | None, bool], Any]

    def __init__(self, config: ModelConfig, weights: Weights, ar: Arithmetic, generation_config: Any = None) -> None:
        self.config = config
        self.weights = weights
        self.arithmetic = replace(ar, policy=ar.policy.without(self.page.NOT_ROUNDED))
        self.rotary = RotaryEmbedding(config, exact=ar.exact)
        self._generation_config = generation_config

    # ------------------------------------------------------------------------------------------------ making and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        policy: str | Policy | None = None,
        low_memory: bool = False,
        progress: Progress | None = None,
        seed: int = 0,
        backend: str = "numpy",
        device: str | None = None,
    ) -> "Model":
        """Read a checkpoint folder in Hugging Face format (config.json, model.safetensors or shards).

        dtype, policy: see `refllm.precision.arithmetic`. low_memory: weights stay in the memory-mapped file and are
        converted when used. progress: called with (bytes done, bytes in all). seed: for head tensors that the file
        lacks, which are initialised at random with a warning. backend, device: see `refllm.load`.
        Raises ConfigError or CheckpointError with what is wrong, or InputError for an unknown dtype or policy.
        """
        if backend != "numpy":
            fast = cls.fast_class(backend, policy, low_memory)
            return fast.load(folder, dtype=dtype, backend=backend, device=device, progress=progress, seed=seed)
        if device not in (None, "cpu"):
            raise InputError(f"device={device!r}: the NumPy backend runs on the CPU; leave device out")
        ar = arithmetic(dtype, policy)
        from refllm.generation.config import GenerationConfig

        with one_model(folder):
            config = cls.config_class.from_pretrained(folder)
            checkpoint = open_checkpoint(folder)
            defaults = GenerationConfig.from_checkpoint(Path(folder))
        weights = load_weights(
            checkpoint,
            cls.tensors(config),
            optional_zero=norm_biases(cls.tensors(config)),
            tied=cls.tied(config),
            round=rounding(ar.dtype),
            low_memory=low_memory,
            progress=progress,
            seed=seed,
            initializer_range=config.initializer_range,
        )
        return cls(config, weights, ar, defaults)

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, seed: int = 0, dtype: str = "float32", policy: str | Policy | None = None
    ) -> Self:
        """A fresh model: linear and embedding weights N(0, initializer_range), biases 0, norms 1, padding row 0."""
        if not isinstance(config, cls.config_class):
            raise InputError(f"{cls.__name__}: expected a {cls.config_class.__name__}, found {type(config).__name__}")
        ar = arithmetic(dtype, policy)
        weights = fresh_weights(cls.tensors(config), config, seed=seed, round=rounding(ar.dtype), tied=cls.tied(config))
        return cls(config, weights, ar)

    @classmethod
    def tensors(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, backbone and head, without the prefix that files put before the backbone."""
        return {**cls.page.tensors(config), **cls.heads.tensors(config, cls.head)}

    @classmethod
    def tied(cls, config: ModelConfig) -> dict[str, str]:
        """Tensor -> the tensor that it is the same as."""
        tied = cls.head == "causal_lm" and config.tie_word_embeddings
        return {"lm_head.weight": "embed_tokens.weight"} if tied else {}

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Write config.json, generation_config.json and the weights, as Transformers reads them.

        Over another model, who reads finds that one or this one, or no config.json: also after a kill at any moment.
        dtype: of the file; None takes the model's own. Raises CheckpointError if the folder cannot be written.
        """
        dtype = dtype_name(dtype or self.dtype)
        architectures = [type(self).__name__]
        texts = {
            "generation_config.json": self.generation_config.to_json_string(),
            "config.json": self.config.to_json_string(architectures=architectures, dtype=dtype),
        }
        save_checkpoint(folder, self.weights.renamed(self.prefix), dtype, texts=texts)
        self.config.architectures, self.config.dtype = architectures, dtype

    @property
    def prefix(self) -> str:
        """What files put before the backbone's tensor names."""
        return {"base": "", "question_answering": "transformer."}.get(self.head, "model.")

    # ------------------------------------------------------------------------------------------------------- properties

    @property
    def dtype(self) -> str:
        return self.arithmetic.dtype

    @property
    def policy(self) -> str | None:
        """The name of the rounding policy; None where nothing is emulated (float64, or NumPy's own float32)."""
        name = self.arithmetic.policy.name
        return None if name == "native" else name

    @property
    def generation_config(self) -> Any:
        """The defaults of `generate`: of generation_config.json, else of config.json."""
        if self._generation_config is None:
            from refllm.generation.config import GenerationConfig

            self._generation_config = GenerationConfig.from_model_config(self.config)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._generation_config = value

    def num_parameters(self) -> int:
        """Numbers in all tensors; a tied tensor counts once."""
        return sum(int(np.prod(shape)) for shape in self.tensors(self.config).values())

    def new_cache(self, max_cache_len: int | None = None) -> DynamicCache:
        """An empty cache for this model; max_cache_len: one of that many slots, which does not grow."""
        return DynamicCache(self.config) if max_cache_len is None else StaticCache(self.config, max_cache_len)

    # ---------------------------------------------------------------------------------------------------------- forward

    def __call__(
        self,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        *,
        start_positions: np.ndarray | None = None,
        end_positions: np.ndarray | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | np.ndarray = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        recorder: Recorder | None = None,
        **loss_options: Any,
    ) -> Any:
        """One forward pass; arguments and results are those of the Hugging Face class of the same name.

        input_ids: int [B, S]; or inputs_embeds: float [B, S, E]. attention_mask, position_ids: `refllm.forward.masks`.
        past_key_values: a cache, which this call extends; a failed call leaves it as it was. logits_to_keep: see
        `refllm.models.heads.select`. labels (start_positions, end_positions): see the losses of `refllm.models.heads`;
        loss_options are shift_labels, num_items_in_batch and ignore_index. recorder: is shown every named value
        (`refllm.forward.operators`). Returns a `ModelOutput`, or with return_dict=False the tuple of what it holds.
        Raises InputError for inputs that contradict each other or the model.
        """
        options = {
            **loss_options,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "logits_to_keep": logits_to_keep if np.any(logits_to_keep) else None,
        }
        self.heads.check_arguments(self.head, {name for name, value in options.items() if value is not None})
        ids_BS = self._check_ids(input_ids, inputs_embeds)
        cache, cached = self._cache(past_key_values, use_cache)
        collector = _Collector(self.config.num_hidden_layers, output_hidden_states, output_attentions, recorder)
        op, rotary = self._operators(collector if collector.listens else None), copy(self.rotary)
        try:
            with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                x_BSE = self._embed(op, ids_BS, inputs_embeds)
                x_BSE = self._backbone(op, x_BSE, attention_mask, position_ids, cache, cached)
                out = self._apply_head(
                    op, x_BSE, ids_BS, labels, start_positions, end_positions, logits_to_keep, loss_options
                )
        except BaseException:
            self.rotary = rotary
            if cache is not None:
                cache.crop(cached)
            raise
        out.past_key_values = cache
        out.hidden_states, out.attentions = collector.hidden_states(), collector.attentions()
        return out if return_dict else out.to_tuple()

    def generate(self, input_ids: np.ndarray | None = None, **options: Any) -> Any:
        """Continue a prompt: `refllm.generation.generate.generate` with this model."""
        from refllm.generation.generate import generate

        return generate(self, input_ids, **options)

    def _operators(self, recorder: Recorder | None) -> Any:
        """What the page computes with. A backend other than NumPy has its own."""
        return Operators(self.arithmetic, recorder)

    def _check_ids(self, input_ids: Any, inputs_embeds: Any) -> np.ndarray | None:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        what, axes = (
            ("input_ids", "[batch, sequence]") if inputs_embeds is None else ("inputs_embeds", "[batch, sequence, E]")
        )
        given = as_array(what, input_ids if inputs_embeds is None else inputs_embeds)
        if given.ndim != len(axes.split(",")):
            raise InputError(f"{what}: expected {axes}, found shape {given.shape}")
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise InputError(f"{what}: shape {given.shape} has no tokens; at least one is needed")
        if inputs_embeds is not None:
            if given.shape[2] != self.config.hidden_size:
                raise InputError(
                    f"inputs_embeds: last axis is {given.shape[2]}, hidden_size is {self.config.hidden_size}"
                )
            return None
        given = as_integers(what, given)
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"input_ids: token id {bad} is outside 0..{self.config.vocab_size - 1} (vocab_size)")
        return given.astype(np.int64)

    def _cache(self, past: Any, use_cache: bool | None) -> tuple[DynamicCache | None, int]:
        if past is not None and not isinstance(past, DynamicCache):
            raise InputError(f"past_key_values: expected a refllm.forward.cache object, found {type(past).__name__}")
        if past is None and (self.config.use_cache if use_cache is None else use_cache):
            past = self.new_cache()
        return past, past.get_seq_length() if past is not None else 0

    def _embed(self, op: Operators, ids_BS: np.ndarray | None, inputs_embeds: Any) -> np.ndarray:
        if ids_BS is not None:
            return op.tap("model.embed_tokens", self.weights.rows("embed_tokens.weight", ids_BS))
        values = rounding(self.dtype)(np.asarray(inputs_embeds, self.arithmetic.work))
        return op.tap("model.embed_tokens", values)

    def _backbone(
        self, op: Operators, x_BSE: np.ndarray, mask: Any, position_ids: Any, cache: DynamicCache | None, cached: int
    ) -> np.ndarray:
        B, S, _ = x_BSE.shape
        positions_BS = self._positions(position_ids, B, S, cached)
        who_sees_whom = masking(
            mask,
            None if position_ids is None else positions_BS,
            batch=B,
            queries=S,
            cached=cached,
            has_cache=cache is not None,
            heads=self.config.num_attention_heads,
        )
        return self._run_page(op, x_BSE, positions_BS, who_sees_whom, cache)

    def _run_page(
        self, op: Any, x_BSE: Any, positions_BS: np.ndarray, masking: dict[str, Any], cache: DynamicCache | None
    ) -> Any:
        cos, sin = (op.ar.round(table, "rope.table") for table in self.rotary.tables(positions_BS))
        store = NoCache() if cache is None else cache  # not `cache or`: an empty cache has length 0
        return self.page.forward(op, self.config, self.weights, x_BSE, cos, sin, masking, store)

    def _positions(self, position_ids: Any, B: int, S: int, cached: int) -> np.ndarray:
        default = np.arange(cached, cached + S)[None]
        positions = default if position_ids is None else as_integers("position_ids", position_ids)
        if positions.ndim != 2 or positions.shape[0] not in (1, B) or positions.shape[1] != S:
            raise InputError(f"position_ids: expected [{B} or 1, {S}], found shape {positions.shape}")
        limit = self.config.max_position_embeddings
        if int(positions.max()) >= limit:
            # The text names no position: one that changes would be shown again for every token of a generation.
            warnings.warn(
                f"positions reach beyond max_position_embeddings={limit}, what the model was made for; they are "
                "computed all the same",
                UserWarning,
                stacklevel=4,
            )
        return np.broadcast_to(positions, (B, S))

    def _apply_head(
        self,
        op: Operators,
        x_BSE: np.ndarray,
        ids_BS: np.ndarray | None,
        labels: Any,
        start_positions: Any,
        end_positions: Any,
        logits_to_keep: Any,
        options: Mapping[str, Any],
    ) -> ModelOutput:
        c, w, heads = self.config, self.weights, self.heads
        if self.head == "base":
            return ModelOutput(last_hidden_state=x_BSE)
        if self.head == "causal_lm":
            logits = heads.causal_lm(op, c, w, heads.select(x_BSE, logits_to_keep))
            wanted = labels is not None or options.get("shift_labels") is not None
            return ModelOutput(heads.causal_lm_loss(op, logits, labels, **options) if wanted else None, logits=logits)
        if self.head == "sequence_classification":
            logits = heads.sequence_logits(op, c, w, x_BSE, ids_BS)
            return ModelOutput(None if labels is None else heads.sequence_loss(op, c, logits, labels), logits=logits)
        if self.head == "token_classification":
            logits = op.tap("score", op.linear(x_BSE, w["score.weight"], w["score.bias"]))
            return ModelOutput(
                None if labels is None else heads.token_loss(op, logits, labels, **options), logits=logits
            )
        logits = op.tap("qa_outputs", op.linear(x_BSE, w["qa_outputs.weight"], w["qa_outputs.bias"]))
        start, end = logits[..., 0], logits[..., 1]
        both = start_positions is not None and end_positions is not None
        loss = heads.question_loss(op, start, end, start_positions, end_positions, **options) if both else None
        return ModelOutput(loss, start_logits=start, end_logits=end)


class _Collector:
    """Keeps what `output_hidden_states` and `output_attentions` ask for; the rest goes to the caller's recorder."""

    def __init__(self, layers: int, hidden: bool, attention: bool, other: Recorder | None) -> None:
        self._hidden = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(layers - 1)), "model.norm"]
        self._attention = [f"model.layers.{i}.self_attn.probs" for i in range(layers)]
        self._hidden, self._attention = self._hidden * hidden, self._attention * attention
        self._names = {*self._hidden, *self._attention}
        self._kept: dict[str, np.ndarray] = {}
        self._other = other

    @property
    def listens(self) -> bool:
        """Whether any value could be wanted."""
        return bool(self._names) or self._other is not None

    def wants(self, name: str) -> bool:
        return name in self._names or (self._other is not None and self._other.wants(name))

    def record(self, name: str, value: np.ndarray) -> None:
        if name in self._names:
            self._kept[name] = value
        if self._other is not None and self._other.wants(name):
            self._other.record(name, value)

    def hidden_states(self) -> tuple[np.ndarray, ...] | None:
        return tuple(self._kept[name] for name in self._hidden) or None

    def attentions(self) -> tuple[np.ndarray, ...] | None:
        return tuple(self._kept[name] for name in self._attention) or None


def norm_biases(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """LayerNorm biases, which some files leave out: StableLM-2-12B's config speaks of norms without bias."""
    return {name for name in shapes if name.endswith(".bias") and "norm" in name}
