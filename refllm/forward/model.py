"""A model: a config, its weights, the page that computes it, and one head. Named classes: `refllm.models.families`.

    model = HeliumForCausalLM.from_pretrained("folder", dtype="bfloat16")
    out = model(input_ids=np.array([[1, 2, 3]]))
    out.logits                       # [1, 3, V]

A call checks its inputs, prepares positions, masks and rotary tables, and hands over to the page
(`refllm/models/<family>.py`), which is where the mathematics is.
"""

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any, Self

import numpy as np

from refllm.config import ModelConfig, as_config
from refllm.devices import CPU, Device, backend, found
from refllm.errors import InputError
from refllm.forward.cache import DynamicCache, NoCache, StaticCache
from refllm.forward.gradients import Gradients, gradients_of
from refllm.forward.loading import shard_bytes, understood
from refllm.forward.masks import masking
from refllm.forward.operators import Operators, Recorder
from refllm.forward.outputs import ModelOutput
from refllm.forward.rotary import RotaryEmbedding
from refllm.inputs import as_array, as_integers, is_tensor, refuse_unknown, to_numpy
from refllm.precision import DTYPES, Arithmetic, Policy, arithmetic, check_dtype, rounding
from refllm.precision.dtype_names import DtypeName, dtype_name
from refllm.storage.checkpoint import one_model
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.storage.fresh_tensors import fresh_tensor
from refllm.storage.hub_cache import local_folder
from refllm.storage.load_report import file_name
from refllm.storage.quantized import open_checkpoint
from refllm.storage.weights import Weights, free_memory, fresh_weights, load_weights

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

    attention_asked_for: str | None = None
    training = False
    is_gradient_checkpointing = False
    follow: Callable[[Operators], Any] | None = None  # what a tape makes of the operators

    def __init__(
        self,
        config: Any,
        weights: Weights | None = None,
        ar: Arithmetic | None = None,
        generation_config: Any = None,
        *,
        seed: int = 0,
    ) -> None:
        """A model of these weights, or of a config alone, Transformers' or one of this package: then a fresh one in
        float32, as `from_config` makes it. Raises InputError for the config of another family."""
        self.config = as_config(type(self).__name__, config, self.config_class)
        if weights is not None:
            self.weights = weights
        ar = arithmetic("float32") if ar is None else ar
        self._seed = seed
        self.arithmetic = replace(ar, policy=ar.policy.without(self.page.NOT_ROUNDED))
        self.rotary = RotaryEmbedding(self.config, exact=ar.exact)
        self._generation_config = generation_config

    @cached_property
    def weights(self) -> Weights:
        """The tensors. Of a model made from its config alone they are made when they are first needed; where they do
        not fit into memory, at every use, with a warning."""
        numbers = self.num_parameters()
        fits = numbers * np.dtype(self.arithmetic.work).itemsize < free_memory()
        if not fits:
            warnings.warn(
                f"{type(self).__name__}: {numbers:,} random weights do not fit into the free memory, so each tensor is "
                "made at every use, which is slow; a config of fewer or smaller layers is faster",
                UserWarning,
                stacklevel=3,
            )
        shapes, tied, onto_grid = self.tensors(self.config), self.tied(self.config), rounding(self.dtype)
        return fresh_weights(shapes, self.config, self._seed, tied=tied, round=onto_grid, low_memory=not fits)

    # ------------------------------------------------------------------------------------------------ making and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        policy: str | Policy | None = None,
        low_memory: bool = False,
        progress: Progress | None = None,
        seed: int = 0,
        backend: str = "numpy",
        device: Any = None,
        **keywords: Any,
    ) -> "Model":
        """Read a checkpoint folder in Hugging Face format (config.json, model.safetensors or shards), or the one that
        the local cache has for a name of the hub.

        dtype, policy: see `refllm.precision.arithmetic`; dtype "auto" is the checkpoint's own. low_memory: weights stay
        in the memory-mapped file and are converted when used. progress: called with (bytes done, bytes in all). seed:
        for head tensors that the file lacks, which are initialised at random with a warning. backend, device: see
        `refllm.load`. keywords: keys of the config (num_labels, ...) and Transformers' arguments
        (`refllm.forward.loading`). Raises ConfigError or CheckpointError with what is wrong, or InputError for an
        argument that is unknown or not possible.
        """
        folder = local_folder(folder, keywords)
        own = {"dtype": dtype, "policy": policy, "backend": backend, "device": device}
        asked = understood(f"{cls.__name__}.from_pretrained", cls.config_class, keywords, **own, folder=folder)
        numpy = asked.backend == "numpy"
        if numpy and asked.device is not None and str(asked.device) != "cpu":
            raise InputError(f"device={device!r}: the NumPy backend runs on the CPU; leave device out")
        fast = None if numpy else cls.fast_class(asked.backend, policy, low_memory)
        from refllm.generation.config import GenerationConfig

        with one_model(folder):
            config = asked.read_config(cls.config_class, folder)
            checkpoint = open_checkpoint(folder)
            given = asked.generation_config
            defaults = GenerationConfig.from_checkpoint(folder) if given is None else GenerationConfig.of(given)
        dtype = asked.dtype_for(config, checkpoint.dtype(checkpoint.names[0]))
        if fast is not None:
            where = {"backend": asked.backend, "device": asked.device}
            model: Model = fast.load(config, checkpoint, defaults, dtype=dtype, **where, progress=progress, seed=seed)
        else:
            ar = arithmetic(dtype, asked.policy_for(dtype))
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
            model = cls(config, weights, ar, defaults)
        model.attention_asked_for = asked.attention
        return model

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        seed: int = 0,
        dtype: Any = "float32",
        policy: str | Policy | None = None,
        **keywords: Any,
    ) -> Self:
        """A fresh model: linear and embedding weights N(0, initializer_range), biases 0, norms 1, padding row 0.

        config: of this package or of Transformers. The weights are made when they are first needed. keywords: those of
        `from_pretrained` that have a meaning without a checkpoint. Raises InputError.
        """
        asked = understood(f"{cls.__name__}.from_config", cls.config_class, keywords, dtype=dtype, policy=policy)
        config = as_config(cls.__name__, config, cls.config_class)
        if asked.changes:
            config = type(config).from_dict({**config.to_dict(), **asked.changes})
        dtype = asked.dtype_for(config)
        model = cls(config, None, arithmetic(dtype, asked.policy_for(dtype)), seed=seed)
        model.attention_asked_for = asked.attention
        return model if asked.device is None else model.to(asked.device)

    @classmethod
    def tensors(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, backbone and head, without the prefix that files put before the backbone."""
        return {**cls.page.tensors(config), **cls.heads.tensors(config, cls.head)}

    @classmethod
    def tied(cls, config: ModelConfig) -> dict[str, str]:
        """Tensor -> the tensor that it is the same as."""
        tied = cls.head == "causal_lm" and config.tie_word_embeddings
        return {"lm_head.weight": "embed_tokens.weight"} if tied else {}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: Any = None,
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **unknown: Any,
    ) -> None:
        """Write config.json, generation_config.json and the weights, as Transformers reads them.

        Over another model, who reads finds that one or this one, or no config.json: also after a kill at any moment.
        dtype: of the file; None takes the model's own. max_shard_size: of one file. Raises CheckpointError if the
        folder cannot be written, InputError for an argument that is unknown or not possible.
        """
        refuse_unknown(unknown, ("dtype", "max_shard_size", "safe_serialization"), "save_pretrained")
        if not safe_serialization:
            raise InputError("save_pretrained: safe_serialization=False asks for a pickle; leave it out")
        dtype = dtype_name(dtype or self.dtype)
        architectures = [type(self).__name__]
        texts = {
            "generation_config.json": self.generation_config.to_json_string(),
            "config.json": self.config.to_json_string(architectures=architectures, dtype=dtype),
        }
        tensors, limit = self.weights.renamed(self.prefix), shard_bytes(max_shard_size)
        save_checkpoint(folder, tensors, dtype, texts=texts, max_shard_bytes=limit)
        self.config.architectures, self.config.dtype = architectures, dtype

    @property
    def prefix(self) -> str:
        """What files put before the backbone's tensor names."""
        return {"base": "", "question_answering": "transformer."}.get(self.head, "model.")

    # ------------------------------------------------------------------------------------------------------- properties

    @property
    def dtype(self) -> str:
        """The name of the dtype, which is equal to Torch's dtype of that name."""
        return DtypeName(self.arithmetic.dtype)

    @property
    def device(self) -> Any:
        """Where the model computes."""
        return CPU

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
        from refllm.generation.config import GenerationConfig

        self._generation_config = GenerationConfig.of(value)

    def num_parameters(self) -> int:
        """Numbers in all tensors; a tied tensor counts once."""
        return sum(int(np.prod(shape)) for shape in self.tensors(self.config).values())

    def new_cache(self, max_cache_len: int | None = None) -> DynamicCache:
        """An empty cache for this model; max_cache_len: one of that many slots, which does not grow."""
        return DynamicCache(self.config) if max_cache_len is None else StaticCache(self.config, max_cache_len)

    def report(self) -> str:
        """What computes this model, where it rounds, and what is unusual about its weights; one line each."""
        asked = f"{self.attention_asked_for} was asked for: " if self.attention_asked_for else ""
        return (
            f"{type(self).__name__}, {self.dtype} on {self.device}\n"
            f"attention  {asked}{self._attention()}\n"
            f"weights    {self.num_parameters():,} numbers, {self._kept()}"
        )

    def _kept(self) -> str:
        if "weights" not in vars(self):
            return "random, to be made when they are needed"
        kept = "read or made at every use" if self.weights.low_memory else "in memory"
        report = self.weights.report
        unusual = {"random": report.fresh, "not used": report.unexpected, "NaN or infinite in": [*report.nonfinite]}
        return "; ".join([kept, *(f"{what}: {', '.join(names)}" for what, names in unusual.items() if names)])

    def _attention(self) -> str:
        if self.policy is None:
            return "NumPy, exact" if self.arithmetic.exact else "NumPy, nothing rounded but by float32 itself"
        steps = "after every step" if self.arithmetic.policy.normalize_first else "its result alone, float32 inside"
        return f"NumPy, rounded as policy {self.policy} says: {steps}"

    # ------------------------------------------------------------------------------------------- as a torch.nn.Module

    def to(self, *where: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
        """This model, moved to a device: on a GPU the fast model of the same name. A device that is not here is the
        CPU (`refllm.devices.found`). Raises InputError for another dtype: that is chosen when a model is loaded."""
        for value in where:
            if dtype_name(value) in DTYPES:
                dtype = value
            else:
                device = value
        if dtype is not None and check_dtype(dtype) != self.dtype:
            raise InputError(f"to: this model is {self.dtype}; load it again with dtype={check_dtype(dtype)!r} instead")
        if device is not None:
            self._move(found(device))
        return self

    def _move(self, device: Device) -> None:
        if device == CPU:
            return
        fast = self.fast_class(backend(), None, False).of(self, backend=backend(), device=device)
        fast.attention_asked_for = self.attention_asked_for
        self.__class__, self.__dict__ = type(fast), vars(fast)

    def cuda(self, device: int = 0) -> Self:
        """`to` a GPU."""
        return self.to(device)

    def cpu(self) -> Self:
        """`to` the CPU."""
        return self.to(CPU)

    def half(self) -> Self:
        """`to` float16."""
        return self.to("float16")

    def bfloat16(self) -> Self:
        """`to` bfloat16."""
        return self.to("bfloat16")

    def float(self) -> Self:
        """`to` float32."""
        return self.to("float32")

    def eval(self) -> Self:
        """This model, which never drops anything out."""
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """This model. Raises InputError if training it would mean dropout, which is not computed."""
        c = self.config
        drops = ("attention_dropout", "hidden_dropout", "classifier_dropout")
        asked = [f"{name}={getattr(c, name)}" for name in drops if getattr(c, name, None)]
        if mode and asked:
            raise InputError(f"train: nothing is dropped out here, and the config has {', '.join(asked)}; set it to 0")
        self.training = mode
        return self

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Each tensor with its name in a file, a tied one once: arrays, on a fast backend tensors."""
        for name in self.weights.shapes:
            yield file_name(name, self.prefix), self.weights[name]

    def parameters(self) -> Iterator[Any]:
        """The tensors of `named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Name in a file -> tensor, tied ones under all their names."""
        return dict(self.named_parameters()) | {name: self.weights[name] for name in self.tied(self.config)}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Makes the vocabulary larger or smaller, in the embeddings and in lm_head, and returns the embeddings [V, E].

        New rows are the mean of the old ones; with mean_resizing=False they are drawn as those of a fresh model.
        """
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        rows += -rows % (pad_to_multiple_of or 1)
        if rows < 1:
            raise InputError(f"resize_token_embeddings: {new_num_tokens} tokens are no vocabulary")
        names = [name for name in ("embed_tokens.weight", "lm_head.weight") if name in self.weights.shapes]
        self.weights = self.weights.resized({name: self._resized(name, rows, mean_resizing) for name in names})
        self.config.vocab_size = rows
        return self.weights["embed_tokens.weight"]

    def _resized(self, name: str, rows: int, mean: bool) -> np.ndarray:
        old = to_numpy(self.weights[name])
        if rows <= len(old):
            return old[:rows]
        shape = (rows, old.shape[1])
        new = old.mean(axis=0) if mean else fresh_tensor(name, shape, self.config.initializer_range, self._seed)
        added = np.broadcast_to(new, shape)[len(old) :]
        return np.concatenate([old, rounding(self.dtype)(added.astype(self.arithmetic.work))])

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Makes `gradients` keep of every layer what goes in, and compute the rest again: less memory, one more forward
        pass, the same bits. gradient_checkpointing_kwargs: Transformers' argument for Torch, of no use here."""
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Makes `gradients` keep all that it reads."""
        self.is_gradient_checkpointing = False

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
        Tensors of Torch in give tensors out. Raises InputError for inputs that contradict each other or the model.
        """
        loss_options.pop("token_type_ids", None)  # some tokenizers make them, and no model of these families reads them
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
        if any(map(is_tensor, (input_ids, inputs_embeds, attention_mask, labels, start_positions))):
            out = out.as_tensors(self.dtype)
        return out if return_dict else out.to_tuple()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The call itself."""
        return self(*arguments, **keywords)

    def gradients(
        self,
        *arguments: Any,
        frozen: Collection[str] = (),
        accumulated: Mapping[str, Any] | None = None,
        recorder: Recorder | None = None,
        **keywords: Any,
    ) -> Gradients:
        """The loss of a forward pass, and its gradient by every tensor: (loss, name as in a file -> array).

        arguments, keywords: those of the forward pass, with the labels; there is no cache, so position_ids without a
        mask pack sequences. A tensor that the loss does not read has no gradient, as in Torch; tied weights have one,
        the sum of both uses; inputs_embeds have one of that name. The row of the padding id learns nothing from being
        looked up, as in Transformers.
        frozen: names, or patterns such as "model.layers.0.*", of what needs no gradient and costs none. accumulated:
        gradients of earlier micro-batches, which these are added to; with num_items_in_batch, the counted labels of all
        of them, the sum is the gradient of the whole batch. recorder: is shown every named value as by a call, then the
        gradient of each, last to first, as "grad:" + name. Gradients are rounded where the policy says.
        Tensors of Torch in give tensors out. Raises InputError as a call does, for a model without a head, and where
        there are no labels.
        """
        return gradients_of(self, arguments, keywords, frozen=frozen, accumulated=accumulated, recorder=recorder)

    def generate(self, input_ids: Any = None, generation_config: Any = None, **options: Any) -> Any:
        """Continue a prompt: `refllm.generation.generate.generate` with this model.

        input_ids may be all that a tokenizer returned.
        """
        from refllm.generation.generate import generate

        if isinstance(input_ids, Mapping):
            input_ids, options = None, {**input_ids, **options}

        input_ids = options.pop("input_ids", input_ids)
        return generate(self, input_ids, generation_config=generation_config, **options)

    def _operators(self, recorder: Recorder | None) -> Any:
        """What the page computes with. A backend other than NumPy has its own."""
        operators = Operators(self.arithmetic, recorder)
        return operators if self.follow is None else self.follow(operators)

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
        values = rounding(self.dtype)(to_numpy(inputs_embeds).astype(self.arithmetic.work))
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
