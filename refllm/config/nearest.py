"""The known family that a model_type without a page is nearest to, and what differs in the mathematics, field by field.

What is known of a checkpoint of another family: the keys of its config.json, the names of its tensors, and for the
types that many people have also what neither of the two says (`_TYPES`). Reading it by the page of a known family is
exact where nothing of that differs: a Mistral whose window is never reached is a Llama.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refllm.config.config import BOOKKEEPING_KEYS, CONFIG_CLASSES, DANGEROUS_KEYS, GENERATION_KEYS, ModelConfig
from refllm.config.rope_parameters import LEGACY_KEYS
from refllm.config.traits import TRAITS, Traits
from refllm.config.values import MAX_SIZE
from refllm.errors import ConfigError
from refllm.storage.json_text import show

PAGES = ("mistral", "olmo2", "qwen2")
"""The types that have a page in docs/pages."""

_SHOWN = 6  # names of one kind in a sentence

_QKV_BIASES = {"biases": "q, k and v have biases, o has none"}
_PLUS_ONE = {"norm weight": "a norm multiplies by 1 + its weight"}
_TIMES_ROOT = {"embedding": "the embedding is multiplied by sqrt(hidden_size)"}
_NORMS_AFTER = {"norms": "attention and MLP are normed after they ran and read what is not normed"}
_NORMS_AROUND = {"norms": "attention and MLP are normed before and after they ran"}
_QK_NORM = {"qk norm": "q and k are normed before the rotation"}
_PARALLEL = {"parallel": "attention and MLP read the same norm"}
_FUSED = {"fused": "q, k and v lie in one tensor, or gate and up do: the same mathematics under other names"}
_EXPERTS = {"experts": "a router chooses among several MLPs"}


@dataclass(frozen=True)
class _Type:
    """A model_type of Transformers. said: what its code does that a config does not say; kind -> clause. defaults: of
    keys that a config may leave out, where they are not those of the nearest family."""

    said: Mapping[str, str] = field(default_factory=dict)
    norm: str = ""
    interleaved: bool = False
    gated: bool | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_TYPES = {
    "mistral": _Type(
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        }
    ),
    "mixtral": _Type(_EXPERTS),
    "qwen2": _Type(_QKV_BIASES, defaults={"use_sliding_window": False}),
    "qwen2_moe": _Type(_QKV_BIASES | _EXPERTS, defaults={"use_sliding_window": False}),
    "qwen3": _Type(_QK_NORM, defaults={"use_sliding_window": False}),
    "qwen3_moe": _Type(_QK_NORM | _EXPERTS, defaults={"use_sliding_window": False}),
    "gemma": _Type(_PLUS_ONE | _TIMES_ROOT),
    "gemma2": _Type(_PLUS_ONE | _TIMES_ROOT | _NORMS_AROUND, defaults={"sliding_window": 4096}),
    "gemma3_text": _Type(_PLUS_ONE | _TIMES_ROOT | _NORMS_AROUND | _QK_NORM, defaults={"sliding_window": 4096}),
    "olmo": _Type({"norm weight": "its norms have no weight"}, norm="layer"),
    "olmo2": _Type(_NORMS_AFTER | _QK_NORM),
    "olmo3": _Type(_NORMS_AFTER | _QK_NORM, defaults={"sliding_window": 4096}),
    "phi": _Type(_PARALLEL | {"biases": "every projection has a bias"}, norm="layer", gated=False),
    "phi3": _Type(_FUSED),
    "gpt_neox": _Type(_FUSED | {"biases": "every projection has a bias"}, norm="layer", gated=False),
    "granite": _Type(defaults={"attention_multiplier": 1.0}),
    "cohere": _Type(_PARALLEL, norm="layer", interleaved=True, defaults={"logit_scale": 0.0625}),
    "starcoder2": _Type({"biases": "every projection has a bias"}, norm="layer", gated=False),
    "nemotron": _Type(_PLUS_ONE, norm="layer", gated=False),
    "glm": _Type(_FUSED | _QKV_BIASES, interleaved=True),
    "smollm3": _Type({"no rotation": "every fourth layer does not rotate q and k"}),
    "gpt_oss": _Type(_EXPERTS | {"sinks": "the softmax has a sink for every head"}),
    "deepseek_v3": _Type(_EXPERTS | {"latent": "keys and values are made of a latent vector"}),
}
"""What many people have."""

_ONE = (None, 1, 1.0)
_KEYS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "attn_logit_softcapping": ((None,), "softcap", "scores are capped by tanh"),
    "final_logit_softcapping": ((None,), "logits", "logits are capped by tanh"),
    "embedding_multiplier": (_ONE, "embedding", "the embedding is multiplied by it"),
    "scale_emb": (_ONE, "embedding", "the embedding is multiplied by it"),
    "residual_multiplier": (_ONE, "residual", "what is added to the residual stream is multiplied by it"),
    "scale_depth": (_ONE, "residual", "what is added to the residual stream is multiplied by it"),
    "logits_scaling": (_ONE, "logits", "logits are divided by it"),
    "logit_scale": (_ONE, "logits", "logits are multiplied by it"),
    "clip_qkv": ((None,), "clip", "q, k and v are clipped"),
    "num_local_experts": ((None, 0, 1), "experts", "a router chooses among several MLPs"),
    "num_experts": ((None, 0, 1), "experts", "a router chooses among several MLPs"),
    "n_routed_experts": ((None, 0, 1), "experts", "a router chooses among several MLPs"),
    "no_rope_layers": ((None, []), "no rotation", "some layers do not rotate q and k"),
    "use_qk_norm": ((None, False), "qk norm", "q and k are normed before the rotation"),
    "parallel_attn": ((None, False), "parallel", "attention and MLP read the same norm"),
    "alibi": ((None, False), "alibi", "scores have a bias of the distance"),
    "use_bidirectional_attention": ((None, False), "causal", "every query sees every key"),
    "hidden_activation": ((None,), "activation", "another name of hidden_act"),
    "norm_eps": ((None,), "eps", "another name of the norms' eps"),
    "norm_epsilon": ((None,), "eps", "another name of the norms' eps"),
    "layer_norm_epsilon": ((None,), "eps", "another name of the norms' eps"),
    "rotary_pct": (_ONE, "partial", "a part of every head is rotated"),
    "use_bias": ((None, False), "biases", "every projection has a bias"),
}
"""Key -> the values under which it asks for nothing, what kind of thing it changes, and how."""
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(.+)$")
_FUSED_NAMES = re.compile(r"\.(?:qkv_proj|query_key_value|c_attn|Wqkv|gate_up_proj)\.")
_ORDINARY = re.compile(
    r"self_attn\.([qkvo]_proj\.(weight|bias)|rotary_emb\.inv_freq)|mlp\.(gate|up|down)_proj\.(weight|bias)"
    r"|(input|post_attention)_layernorm\.(weight|bias)"
)


@dataclass(frozen=True)
class Nearest:
    """family: a known model_type. differs: clauses on the mathematics. unread: keys of the config that this family does
    not read, and that are not known to change nothing. known: whether its model_type is, so that no difference is.
    model_type: as the config has it."""

    family: str
    differs: tuple[str, ...]
    unread: tuple[str, ...]
    known: bool
    model_type: str = ""

    @property
    def _page(self) -> str:
        written = self.model_type in PAGES
        return f"such as docs/pages/{self.model_type}.py" if written else "and docs/pages says how to write one"

    @property
    def exact(self) -> bool:
        """Whether the page of that family computes this checkpoint exactly."""
        return self.known and not self.differs and not self.unread

    @property
    def sentence(self) -> str:
        """What is nearest, what differs, and what to do."""
        keys = f"; {self.family} does not read the keys {', '.join(self.unread)}" if self.unread else ""
        by_own = f"--page FILE.PY (page= in Python) reads it by a page of your own, {self._page}"
        by_this = f'--page {self.family} (page="{self.family}" in Python)'
        if self.differs:
            return f"the nearest is {self.family}, but not exactly: {'; '.join(self.differs)}{keys}; {by_own}"
        if self.exact:
            return f"it is {self.family} exactly, since nothing in its config differs: {by_this} reads it so"
        what = "it" if self.known else "what its model_type stands for"
        return (
            f"the nearest is {self.family}, and nothing that is known of its config and tensors differs{keys}; if you "
            f"know that {what} changes nothing else, {by_this} reads it so; else {by_own}"
        )


def nearest(values: Mapping[str, Any], names: Collection[str] = ()) -> Nearest:
    """The known family that a config.json is nearest to. names: of the tensors beside it, () where there are none."""
    suffixes = _suffixes(names)
    best = min(_OWN_ORDER, key=lambda family: _distance(values, suffixes, TRAITS[family]))
    return compared_with(best, values, names)


_OWN_ORDER = ("llama", "helium", "arcee", "stablelm")  # the plainest first: of several alike it is the nearest


def compared_with(family: str, values: Mapping[str, Any], names: Collection[str] = ()) -> Nearest:
    """What differs from a known family."""
    given = values.get("model_type")
    known = _TYPES.get(given) if isinstance(given, str) else None
    suffixes, values = _suffixes(names), {**(known.defaults if known else {}), **values}
    differs: dict[str, str] = {}
    for kind, clause in (
        *_in_the_traits(values, suffixes, TRAITS[family]),
        *_in_the_config(values, CONFIG_CLASSES[family]),
        *_in_the_names(suffixes, family),
        *(known.said.items() if known else ()),
    ):
        differs.setdefault(kind, clause)
    if not differs:
        differs |= _refused(family, values)
    return Nearest(family, tuple(differs.values()), _unread(values, family), known is not None, str(given))


def as_family(family: str, values: Mapping[str, Any], names: Collection[str], source: str) -> dict[str, Any]:
    """The config.json as one of a known family. Raises ConfigError where something is known to differ."""
    found = compared_with(family, values, names)
    if found.differs:
        raise ConfigError(
            f"{source}: model_type={show(values.get('model_type'))} cannot be read as {family}: "
            f"{'; '.join(found.differs)}"
        )
    return _renamed(family, values)


def _renamed(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    known = _TYPES.get(str(values.get("model_type")))
    renamed = {**(known.defaults if known else {}), **values, "model_type": family}
    architectures = renamed.get("architectures")
    if isinstance(architectures, list):
        prefix = TRAITS[family].class_prefix
        renamed["architectures"] = [re.sub(r"^\w+?(?=Model$|For[A-Z])", prefix, str(name)) for name in architectures]
    return {key: value for key, value in renamed.items() if key not in _WINDOW_KEYS}


# ------------------------------------------------------------------------------------------------------ what differs

Clauses = Iterable[tuple[str, str]]
"""(kind, clause): of one kind the first is said."""


def _suffixes(names: Collection[str]) -> set[str]:
    """What follows "layers.N." in the names of tensors."""
    return {match[1] for name in names if (match := _IN_LAYER.search(name))}


def _shape(values: Mapping[str, Any], suffixes: set[str]) -> Traits:
    """The traits of a family without a page, as far as they show."""
    known = _TYPES.get(str(values.get("model_type")), _Type())
    layer_norm = "rms_norm_eps" not in values and any(f"layer_norm_eps{more}" in values for more in ("", "ilon"))
    layer_norm = layer_norm or any("norm" in s and s.endswith(".bias") for s in suffixes)
    mlp = {s for s in suffixes if s.startswith("mlp.")}
    gated = any("gate" in s for s in suffixes) if mlp else values.get("hidden_act") != "relu2"
    return Traits(
        "",
        "",
        norm=known.norm or ("layer" if layer_norm else "rms"),
        interleaved=known.interleaved,
        gated=gated if known.gated is None else known.gated,
    )


def _partial(values: Mapping[str, Any]) -> bool:
    inner = [values.get(name) for name in ("rope_parameters", "rope_scaling")]
    stated = [v.get("partial_rotary_factor") for v in (values, *inner) if isinstance(v, Mapping)]
    return any(isinstance(factor, int | float) and factor < 1 for factor in [*stated, values.get("rotary_pct")])


def _distance(values: Mapping[str, Any], suffixes: set[str], traits: Traits) -> int:
    here, partial = _shape(values, suffixes), CONFIG_CLASSES[traits.model_type].partial_rotation
    return (
        2 * (here.norm != traits.norm)
        + (here.interleaved != traits.interleaved)
        + (here.gated != traits.gated)
        + (_partial(values) and not partial)
    )


def _in_the_traits(values: Mapping[str, Any], suffixes: set[str], traits: Traits) -> Clauses:
    here = _shape(values, suffixes)
    if here.norm != traits.norm:
        yield "norm", f"its norms are {'LayerNorms' if here.layer_norm else 'RMSNorms'}"
    if here.interleaved != traits.interleaved:
        yield "pairs", f"its rotary pairs are {'(2i, 2i+1)' if here.interleaved else '(i, i + R/2)'}"
    if here.gated != traits.gated:
        yield "gate", f"its MLP has {'a gate' if here.gated else 'no gate'}"
    if _partial(values) and not CONFIG_CLASSES[traits.model_type].partial_rotation:
        yield "partial", "partial_rotary_factor: a part of every head is rotated"


def _in_the_config(values: Mapping[str, Any], cls: type[ModelConfig]) -> Clauses:
    fields = {f.name for f in dataclasses.fields(cls)}
    yield from _window(values)
    scale = _number(values.get("head_dim")) or _ratio(values.get("hidden_size"), values.get("num_attention_heads"))
    for key, harmless in (("query_pre_attn_scalar", scale), ("attention_multiplier", scale**-0.5 if scale else None)):
        if values.get(key) is not None and values[key] != harmless:
            yield "scale", f"{key}={show(values[key])}: scores are scaled by it, not by head_dim^-1/2"
    for key, (nothing, kind, effect) in _KEYS.items():
        if key not in fields and values.get(key) not in nothing:
            yield kind, f"{key}={show(values[key])}: {effect}"
    for key, (nothing, effect) in DANGEROUS_KEYS.items():
        if key not in (*fields, *_WINDOW_KEYS) and values.get(key) not in nothing:
            yield key, f"{key}={show(values[key])}: {effect}"


def _window(values: Mapping[str, Any]) -> Clauses:
    """A window that hides a key at some length."""
    types, window = values.get("layer_types"), values.get("sliding_window")
    other = [t for t in types if t not in ("full_attention", "attention")] if isinstance(types, list) else []
    if other and set(map(str, other)) != {"sliding_attention"}:
        yield "layers", f"layer_types has {show(other[0])}"
        return
    off = values.get("use_sliding_window") is False or window is None or (isinstance(types, list) and not other)
    longest, stated = _number(values.get("max_position_embeddings")), show(values.get("max_position_embeddings"))
    if not off and not (_number(window) and longest and _number(window) >= longest):
        keys = f"sliding_window={show(window)} with max_position_embeddings={stated}"
        yield "window", f"{keys}: a query sees no more than the last so many keys"


def _in_the_names(suffixes: set[str], family: str) -> Clauses:
    if not suffixes:
        return
    biases = {s.split(".")[1][0] for s in suffixes if re.fullmatch(r"self_attn\.[qkvo]_proj\.bias", s)}
    if biases and biases != set("qkv" if family == "stablelm" else "qkvo"):
        with_bias = [letter for letter in "qkvo" if letter in biases]
        yield "biases", f"of q, k, v and o only {', '.join(with_bias)} have biases (self_attn.{with_bias[0]}_proj.bias)"
    if any(re.search(r"\.[qk]_(?:norm|layernorm)\.", s) for s in suffixes) and family != "stablelm":
        yield "qk norm", "q and k are normed before the rotation (self_attn.q_norm.weight)"
    if any("post_feedforward_layernorm" in s for s in suffixes):
        yield "norms", (_NORMS_AROUND if "input_layernorm.weight" in suffixes else _NORMS_AFTER)["norms"]
    if fused := sorted(s for s in suffixes if _FUSED_NAMES.search(f".{s}")):
        yield "fused", f"{_FUSED['fused']} ({fused[0]})"
    if experts := sorted(s for s in suffixes if "experts" in s or "block_sparse_moe" in s):
        yield "experts", f"{_EXPERTS['experts']} ({experts[0]})"
    told = re.compile(r"[qk]_(layer)?norm\.|feedforward_layernorm|experts|block_sparse_moe|\.gate\.")
    rest = sorted(s for s in suffixes if not (_ORDINARY.fullmatch(s) or told.search(s) or s in fused))
    if rest:
        more = ", ..." if len(rest) > _SHOWN else ""
        yield "tensors", f"layers have tensors that {family} has not: {', '.join(rest[:_SHOWN])}{more}"


def _refused(family: str, values: Mapping[str, Any]) -> dict[str, str]:
    """What the config class of the family has to say against it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CONFIG_CLASSES[family].from_dict(_renamed(family, values), source="")
    except ConfigError as error:
        return {"config": str(error).removeprefix(": ")}
    return {}


def _unread(values: Mapping[str, Any], family: str) -> tuple[str, ...]:
    read = {f.name for f in dataclasses.fields(CONFIG_CLASSES[family])}
    read |= {"model_type", "torch_dtype", "num_labels", *LEGACY_KEYS, *BOOKKEEPING_KEYS, *GENERATION_KEYS}
    read |= {*_KEYS, *DANGEROUS_KEYS, *_WINDOW_KEYS, "query_pre_attn_scalar", "attention_multiplier"}
    keys = [show(key).strip("'\"") for key in values if key not in read and not key.endswith(("dropout", "pdrop"))]
    return tuple(keys[:_SHOWN]) + (("...",) if len(keys) > _SHOWN else ())


def _number(value: Any) -> float:
    """The value if it is a number that a size can have, else 0."""
    ordinary = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SIZE
    return float(value) if ordinary else 0.0


def _ratio(a: Any, b: Any) -> float:
    return _number(a) / _number(b) if _number(b) else 0.0
