"""A fast model: a family and head of the reference, computed by Torch or Triton.

    model = refllm.load("folder", dtype="bfloat16", backend="triton", device="cuda")
    out = model(input_ids=ids)              # arrays or tensors in, tensors on the device out
    tokens = model.generate(ids, max_new_tokens=20)

It is the reference's own `Model` (the same checks of arguments, masks, positions, rotary tables, heads, generation)
with other weights, operators, pages and cache behind it.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch

from refllm import kernels
from refllm.config import ModelConfig
from refllm.errors import InputError
from refllm.forward.cache import DynamicCache
from refllm.forward.gradients import Gradients, gradients_of
from refllm.forward.model import Model, norm_biases
from refllm.forward.operators import Recorder
from refllm.forward.outputs import ModelOutput
from refllm.forward.rotary import RotaryEmbedding
from refllm.inputs import as_array, to_numpy
from refllm.kernels.models import pages
from refllm.kernels.models.cache import NoCache, TorchCache
from refllm.kernels.models.decode import DecodeStep
from refllm.kernels.models.gradients import loss_and_gradients
from refllm.kernels.models.operators import BACKENDS, TorchOperators
from refllm.kernels.models.weights import TorchWeights, to_device
from refllm.precision import FUSED, Arithmetic, check_dtype
from refllm.storage.checkpoint import Checkpoint
from refllm.storage.weights import fresh_weights, load_weights

Progress = Callable[[int, int], None]
DTYPES = ("float32", "bfloat16", "float16")


class FastModel(Model):
    """A `Model` whose forward pass runs on Torch tensors. Made by `refllm.load(..., backend="torch" | "triton")`.

    backend: "torch" or "triton". device: where weights, cache and results are.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: TorchWeights,
        *,
        dtype: str,
        backend: str,
        device: torch.device,
        generation_config: Any = None,
    ) -> None:
        self.config, self.weights = config, weights  # type: ignore[assignment]
        self.arithmetic = Arithmetic(dtype, FUSED)
        self.backend, self._device, self._seed = backend, device, 0
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.rotary = RotaryEmbedding(config, exact=False)
        self.records_decoding = device.type == "cuda"
        # A step pins tensors of its cache and a graph: both go when the caller's cache goes.
        self._steps: WeakKeyDictionary[TorchCache, DecodeStep] = WeakKeyDictionary()
        self._generation_config = generation_config

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint,
        generation_config: Any = None,
        *,
        dtype: str = "float32",
        backend: str = "torch",
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        seed: int = 0,
    ) -> "FastModel":
        """Read the weights straight to the device, in `dtype`. device None: the first GPU, else the CPU.

        Raises CheckpointError with what is wrong, InputError for a dtype, backend or device that is not there, or if
        the device has too little memory.
        """
        dtype, where = _check(dtype, backend, device)
        source = load_weights(
            checkpoint,
            cls.tensors(config),
            optional_zero=norm_biases(cls.tensors(config)),
            tied=cls.tied(config),
            low_memory=True,
            seed=seed,
            initializer_range=config.initializer_range,
        )
        with _memory_of(where, f"the weights of {checkpoint.path}"):
            weights = to_device(source, getattr(torch, dtype), where, progress)
        return cls(config, weights, dtype=dtype, backend=backend, device=where, generation_config=generation_config)

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: str = "float32",
        backend: str = "torch",
        device: str | torch.device | None = None,
    ) -> "FastModel":
        """A model that was never trained, with the weights that the reference's `from_config` has for that seed."""
        dtype, where = _check(dtype, backend, device)
        source = fresh_weights(cls.tensors(config), config, seed=seed, tied=cls.tied(config), low_memory=True)
        return cls(config, to_device(source, getattr(torch, dtype), where), dtype=dtype, backend=backend, device=where)

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        dtype: str | None = None,
        backend: str = "torch",
        device: str | torch.device | None = None,
    ) -> "FastModel":
        """A fast model with the weights of a reference model; dtype None: the reference's own."""
        dtype, where = _check(dtype or model.dtype, backend, device)
        weights = to_device(model.weights, getattr(torch, dtype), where)
        fast = fast_class(type(model))
        return fast(
            model.config,
            weights,
            dtype=dtype,
            backend=backend,
            device=where,
            generation_config=model.generation_config,
        )

    @property
    def device(self) -> torch.device:
        """Where weights, cache and results are."""
        return self._device

    def _move(self, device: str) -> None:
        _, where = _check(self.dtype, self.backend, device)
        if where != self._device:
            with _memory_of(where, "the weights"):
                self.weights = to_device(self.weights.as_source(), self.torch_dtype, where)  # type: ignore
            self._device, self.records_decoding = where, where.type == "cuda"
            self._steps.clear()

    def _attention(self) -> str:
        return f"backend {self.backend}, one kernel with float32 inside (policy {self.policy})"

    def new_cache(self, max_cache_len: int | None = None) -> TorchCache:
        """An empty cache for this model; max_cache_len: of that many slots, allocated once."""
        return TorchCache(self.config, max_cache_len)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """`Model.__call__` with arrays or tensors in, tensors on the model's device out. Nothing is differentiated:
        `gradients` is for that."""
        if self.follow is not None:
            return super().__call__(*arguments, **keywords)
        arguments = tuple(map(_from_tensor, arguments))
        keywords = {name: _from_tensor(value) for name, value in keywords.items()}
        interpreted = self.backend == "triton" and self.device.type == "cpu"
        with (
            torch.no_grad(),
            kernels.interpreted() if interpreted else contextlib.nullcontext(),
            _memory_of(self.device, "this call"),
        ):
            logits = self._decoded(keywords) if self.records_decoding and not arguments else None
            if logits is not None:
                return ModelOutput(logits=logits, past_key_values=keywords["past_key_values"])
            return super().__call__(*arguments, **keywords)

    def _decoded(self, call: dict[str, Any]) -> torch.Tensor | None:
        """The logits of a call that is one step of decoding (`refllm.kernels.models.decode`), else None."""
        cache: Any = call.get("past_key_values")
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        plain = {"past_key_values", "input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
        known = self.head == "causal_lm" and isinstance(cache, TorchCache) and call.keys() <= plain
        if not known or ids is None or np.shape(ids)[1:] != (1,) or call.get("use_cache") is False:
            return None
        if not cache.get_seq_length() or (mask is not None and not (np.ndim(mask) == 2 and np.all(mask))):
            return None
        ids_B1 = self._check_ids(ids, None)
        if ids_B1 is None or len(ids_B1) != cache.layer(0).keys.shape[0]:
            return None
        step = self._steps.get(cache)
        if step is None or not step.fits(cache):
            step = self._steps[cache] = DecodeStep(self, cache)
        positions = self._positions(call.get("position_ids"), len(ids_B1), 1, cache.get_seq_length())
        return step.run(cache, ids_B1, positions)

    @staticmethod
    def greedy_tokens(logits_BV: torch.Tensor) -> np.ndarray:
        """Ids of the largest logits, int64 [B], as `np.argmax` finds them: the lowest among equals, NaN the largest.

        Chosen on the device: at batch 64 the logits take longer to reach the host than a step takes to compute them.
        """
        return to_numpy(logits_BV.argmax(dim=-1))

    def gradients(
        self,
        *arguments: Any,
        frozen: Collection[str] = (),
        accumulated: Mapping[str, Any] | None = None,
        recorder: Recorder | None = None,
        **keywords: Any,
    ) -> Gradients:
        """`Model.gradients` by Torch's autograd: tensors on the model's device. Raises InputError for a recorder.

        backend="triton": by the backward kernels, which a model on the CPU interprets.
        """
        if recorder is not None:
            raise InputError(
                f"gradients: backend {self.backend} shows no named values; load the model with backend='numpy'"
            )
        names = [*signature(Model.__call__).parameters][1:]
        return gradients_of(
            self,
            (),
            {**dict(zip(names, arguments, strict=False)), **keywords},
            frozen=frozen,
            accumulated=accumulated,
            recorder=None,
            differentiate=loss_and_gradients,
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> NoReturn:
        """Raises InputError."""
        raise InputError(
            f"gradient_checkpointing_enable: backend {self.backend} keeps every value; load the model with "
            "backend='numpy'"
        )

    def _operators(self, recorder: Recorder | None) -> Any:
        operators: Any = TorchOperators(self.backend, recorder)
        return operators if self.follow is None else self.follow(operators)

    def _cache(self, past: Any, use_cache: bool | None) -> tuple[DynamicCache | None, int]:
        if past is not None and not isinstance(past, TorchCache):
            raise InputError(
                f"past_key_values: a {self.backend} model needs the cache that its new_cache() makes, found "
                f"{type(past).__name__}"
            )
        return super()._cache(past, use_cache)

    def _embed(self, op: Any, ids_BS: np.ndarray | None, inputs_embeds: Any) -> Any:
        if ids_BS is not None:
            return op.tap("model.embed_tokens", self.weights.rows("embed_tokens.weight", ids_BS))
        given = inputs_embeds if isinstance(inputs_embeds, torch.Tensor) else self._tensor(inputs_embeds)
        return op.tap("model.embed_tokens", given.to(self.torch_dtype))

    def _run_page(self, op: Any, x_BSE: Any, positions_BS: np.ndarray, masking: dict[str, Any], cache: Any) -> Any:
        cos, sin = self.tables(positions_BS)
        on_device = {name: self._tensor(x) if isinstance(x, np.ndarray) else x for name, x in masking.items()}
        store = NoCache() if cache is None else cache  # not `cache or`: an empty cache has length 0
        return pages.forward(op, self.config, self.weights, x_BSE, cos, sin, on_device, store)

    def tables(self, positions_BS: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, S, R/2] for these positions, in the model's dtype, on its device."""
        cos, sin = (self._tensor(table).to(self.torch_dtype) for table in self.rotary.tables(positions_BS))
        return cos, sin

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles make the class again, as it is made at run time, and what was recorded of decoding."""
        state = {name: value for name, value in vars(self).items() if name != "_steps"}
        return _of_state, (type(self).__bases__[1], state)

    def plain_operators(self) -> TorchOperators:
        """The backend's operators, with nobody recording."""
        return TorchOperators(self.backend)

    def _tensor(self, x: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(as_array("array", x))).to(self.device)


_FAST_CLASSES: dict[Any, type[FastModel]] = {}


def fast_class(reference: type[Model]) -> type[FastModel]:
    """The fast class for a family and head of the reference, by the same name."""
    if reference not in _FAST_CLASSES:
        _FAST_CLASSES[reference] = type(
            reference.__name__, (FastModel, reference), {"__doc__": f"{reference.__name__} on Torch tensors."}
        )
    return _FAST_CLASSES[reference]


def _of_state(reference: type[Model], state: dict[str, Any]) -> FastModel:
    model = object.__new__(fast_class(reference))
    vars(model).update(state, _steps=WeakKeyDictionary())
    return model


def _check(dtype: str, backend: str, device: str | torch.device | None) -> tuple[str, torch.device]:
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is not known; use one of numpy, {', '.join(BACKENDS)}")
    dtype = check_dtype(dtype)
    if dtype not in DTYPES:
        raise InputError(
            f"dtype={dtype!r}: backend {backend!r} computes in {', '.join(DTYPES)}; float64 is the reference's"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise InputError(f"device={device!r} is not known; use cpu, cuda or cuda:0") from None
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} is not supported; use cpu or cuda")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={device!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu")
    if where.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise InputError(f"dtype='bfloat16': {torch.cuda.get_device_name(where)} has none; use float16 or float32")
    return dtype, where


@contextlib.contextmanager
def _memory_of(device: torch.device, what: str) -> Any:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise InputError(
            f"{what}: out of memory on {device} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free); use a shorter "
            "input, a smaller batch or a narrower dtype"
        ) from error


def _from_tensor(value: Any) -> Any:
    """Tensors as arrays, which is what the checks of the reference read; anything else as it is."""
    return to_numpy(value) if isinstance(value, torch.Tensor) else value
