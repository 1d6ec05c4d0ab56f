"""mlx-lm as a candidate: its models of MLX, recorded without a change of what they compute. Needs `mlx` and `mlx_lm`.

Its modules have the names of Transformers, which are those of `refllm.forward.taps`. A module that is watched gets, for
the time of a run, a class that is its own with another `__call__`. What is not the output of a module is the input of
one (the context of o_proj, the activation of down_proj, the residual stream of the second norm), or what the attention
function receives (rotated queries and keys).

A quantised model hands over the weights that it has, dequantised, and is judged with those.

mlx-lm takes neither a mask nor positions, but its cache for batches does: it says where the padding on the left ends,
and where each row begins to count.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import MisbehavesError, raised
from refllm.check.stacks import Opening
from refllm.check.taps import ALWAYS, Candidate, Sink
from refllm.check.weights import HANDED
from refllm.errors import InputError
from refllm.precision.dtype_names import dtype_name

_HEAD = "lm_head"
_LAYER = re.compile(r"model\.layers\.\d+$")
_WATCHED = re.compile(
    r"model\.(?:embed_tokens|norm|layers\.\d+(?:|\.(?:input_layernorm|post_attention_layernorm|self_attn"
    r"|self_attn\.(?:[qkvo]_proj|[qk]_layernorm)|mlp\.(?:gate|up|down)_proj)))$"
)
_OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Where mlx-lm looks for what newer checkpoints keep under `rope_parameters`."""


def open_candidate(opening: Opening) -> Candidate:
    """The model in the checkpoint folder, or in a folder that mlx-lm made of it, quantised perhaps (`mlx:FOLDER`), as
    mlx-lm loads it, in the dtype asked for."""
    if opening.head != "causal_lm":
        raise InputError(f"{opening.folder}: mlx-lm has causal language models only, and this one has {opening.head}")
    folder = Path(opening.given or opening.folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--candidate {opening.name}: there is no {folder / 'config.json'}; expected a model of mlx-lm"
        )
    import mlx.core as mx
    from mlx_lm import utils

    config = utils.load_config(folder)
    try:
        model, _ = utils.load_model(folder)
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        kind = config["model_type"]
        raise InputError(f"{folder}: mlx-lm {_version()} has no model of model_type {kind}") from None
    except Exception as error:
        raise _with_a_reason(raised(error), config) from None
    model.set_dtype(getattr(mx, opening.dtype))
    candidate = MlxCandidate(model)
    if unread := _unread(config, getattr(model, "args", None)):
        candidate.details["note"] = f"{_does_not_read(unread)}; it took what it has by default"
    return candidate


def wrap(model: Any, opening: Opening) -> Candidate:
    """A model of mlx-lm, or one of somebody's own whose modules have the same names and take the same."""
    extras.require("a model of MLX", "mlx", "mlx_lm")
    if not hasattr(model, "named_modules") or not hasattr(model, "layers"):
        raise InputError(f"a {type(model).__name__} of MLX is no language model: expected one like those of mlx-lm")
    return MlxCandidate(model)


def _unread(config: dict[str, Any], arguments: Any = None) -> list[str]:
    """The keys in which mlx-lm looks for rotary settings that a checkpoint has under `rope_parameters` alone."""
    rope = {} if hasattr(arguments, "rope_parameters") else config.get("rope_parameters") or {}
    said = {**rope, "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}
    return [key for key in _OLD_KEYS if said.get(key) is not None and config.get(key) is None]


def _does_not_read(keys: list[str]) -> str:
    return f"mlx-lm {_version()} does not read rope_parameters of config.json, but {', '.join(keys)} beside it"


def _with_a_reason(error: MisbehavesError, config: dict[str, Any]) -> MisbehavesError:
    """An error of loading, with what is likely behind it: a config whose rotary settings are not read."""
    unread = [key for key in _unread(config) if f"'{key}'" in error.found.text]
    if not unread:
        return error
    return MisbehavesError(replace(error.found, text=f"{error.found.text}: {_does_not_read(unread)}"))


def _version(package: str = "mlx-lm") -> str:
    return metadata.version(package)


class MlxCandidate:
    """A language model of MLX."""

    def __init__(self, model: Any) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self.model = model.eval()
        floats = [w for _, w in tree_flatten(model.parameters()) if mx.issubdtype(w.dtype, mx.floating)]
        self.dtype = dtype_name(str(floats[0].dtype).removeprefix("mlx.core."))
        self.name = f"mlx-lm {_version()}"
        self.details = {"mlx-lm": _version(), "mlx": _version("mlx"), "device": str(mx.default_device())}
        plain = all(type(cache) is KVCache for cache in make_prompt_cache(model))
        self.takes = ("dtype", "cache", "embeddings", *(ALWAYS if plain else ("batch",)))
        self._handed_over = False

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises InputError for masks and positions that a cache of mlx-lm cannot say."""
        import mlx.core as mx

        if not self._handed_over:
            self._hand_over(sink)
        caches = self._caches(inputs)
        for piece in inputs.pieces():
            watcher = _Watcher(sink, inputs, piece)
            with watcher.watching(self.model):
                out = self.model(mx.array(inputs.input_ids[:, piece].astype(np.int32)), cache=caches)
            watcher.show(_HEAD, out)

    def _hand_over(self, sink: Sink) -> None:
        """The weights of quantised modules, once: every run has the same."""
        import mlx.core as mx

        for path, module in self.model.named_modules():
            if "scales" in module:
                how = {"group_size": module.group_size, "bits": module.bits, "mode": getattr(module, "mode", "affine")}
                weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **how)
                sink(f"{HANDED}{path}.weight", _as_numpy(weight))
        self._handed_over = True

    def _caches(self, inputs: Inputs) -> list[Any] | None:
        from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

        counted = (inputs.positions == np.arange(inputs.input_ids.shape[1])).all()
        if inputs.valid.all() and counted:
            return make_prompt_cache(self.model) if inputs.chunks else None
        padding, begins = _rows(inputs)
        caches = [BatchKVCache(padding) for _ in self.model.layers]
        for cache in caches:
            cache.offset = cache.offset + _array(begins)
        return caches


def _rows(inputs: Inputs) -> tuple[list[int], np.ndarray]:
    """How many tokens of padding each row has on its left, and the position of the first one after it."""
    padding, begins, columns = [], [], np.arange(inputs.input_ids.shape[1])
    for valid, positions in zip(inputs.valid, inputs.positions, strict=True):
        seen = columns[valid]
        if not len(seen) or (np.diff(seen) != 1).any() or (np.diff(positions[valid]) != 1).any():
            raise InputError(
                "a cache of mlx-lm has padding on the left or the right of a row, and counts positions one by one; "
                "attention_mask or position_ids say something else"
            )
        padding.append(int(seen[0]))
        begins.append(positions[seen[0]])
    return padding, np.array(begins)


def _array(x: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(x.astype(np.int32))


def _as_numpy(value: Any) -> np.ndarray:
    """An array of NumPy, which has no bfloat16: as float32, which holds all of its numbers."""
    import mlx.core as mx

    return np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)


class _Watcher:
    """Sees the values of one pass of a model and names them. inputs, piece: where they feed embeddings, those take the
    place of the model's own."""

    def __init__(self, sink: Sink, inputs: Inputs, piece: slice) -> None:
        self.inputs, self.piece, self.layer, self.heads = inputs, piece, "", 0
        self._sink, self._shown = sink, set[str]()

    def show(self, name: str, value: Any) -> None:
        """Hands on a value. Of a module that is called again in the same pass, its name is the first call's."""
        if name not in self._shown:
            self._shown.add(name)
            self._sink(name, _as_numpy(value))

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """A context in which the modules of a model are watched, and the functions that they call for attention."""
        with ExitStack() as stack:
            homes = set()
            for path, module in model.named_modules():
                if _WATCHED.match(path):
                    stack.enter_context(_called_by_way_of(module, self._call(path)))
                if path.endswith(".self_attn"):
                    homes.add(type(module).__module__)
            for home in {_where_attention_is(sys.modules[name]) for name in homes}:
                stack.enter_context(self._attention(home))
            yield

    def _call(self, path: str) -> "Call":
        def call(original: Callable[..., Any], x: Any, *more: Any, **named: Any) -> Any:
            self._before(path, x)
            out = original(x, *more, **named)
            if path == "model.embed_tokens" and self.inputs.feeds_embeddings:
                out = self._embedded(out)
            return self._after(path, out)

        return call

    def _embedded(self, rows: Any) -> Any:
        import mlx.core as mx

        whole = self.inputs.embedded(lambda _: _as_numpy(rows))
        embeds = whole if self.inputs.embeds is None else whole[:, self.piece]
        return mx.array(np.asarray(embeds, np.float32)).astype(rows.dtype)

    def _before(self, path: str, x: Any) -> None:
        layer, _, inner = path.rpartition(".")
        if inner == "self_attn":
            self.layer, self.heads = path, 0
        elif inner == "o_proj" and self.heads:
            heads = x.reshape(*x.shape[:2], self.heads, -1)
            self.show(f"{layer}.context", heads.transpose(0, 2, 1, 3))
        elif inner == "down_proj":
            self.show(f"{layer}.act", x)
        elif inner == "post_attention_layernorm":
            self.show(f"{layer}.residual_mid", x)

    def _after(self, path: str, out: Any) -> Any:
        if path.endswith(("q_layernorm", "k_layernorm")):  # of heads [B, S, H, D]
            self.show(path, out.transpose(0, 2, 1, 3))
        elif not path.endswith(".self_attn"):
            self.show(path, out)
        return out

    @contextmanager
    def _attention(self, home: Any) -> Iterator[None]:
        """Sees the queries and the new keys that the attention function of a module is given."""
        original = home.scaled_dot_product_attention

        def seen(q: Any, k: Any, *more: Any, **named: Any) -> Any:
            self.heads = q.shape[1]
            self.show(f"{self.layer}.q_rope", q)
            self.show(f"{self.layer}.k_rope", k[..., -q.shape[2] :, :])
            return original(q, k, *more, **named)

        home.scaled_dot_product_attention = seen
        try:
            yield
        finally:
            home.scaled_dot_product_attention = original


Call = Callable[..., Any]
"""Takes the call that a module makes of itself, and its arguments."""


def _where_attention_is(home: Any) -> Any:
    """The module whose attention function a class calls: its own home, or MLX's."""
    import mlx.core as mx

    return home if hasattr(home, "scaled_dot_product_attention") else mx.fast


@contextmanager
def _called_by_way_of(module: Any, call: Call) -> Iterator[None]:
    """A context in which a module of MLX is called by `call`. Python finds `__call__` in the class of an object, so it
    has a class of its own for so long."""
    kind = type(module)
    inside = {
        "__call__": lambda self, *given, **named: call(lambda *g, **n: kind.__call__(self, *g, **n), *given, **named)
    }
    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), inside | {"__module__": kind.__module__}))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", kind)
