"""An independent witness for every golden: Torch's own functions and Transformers, in float64.

Transformers computes norms, rotary tables and eager softmax in float32 whatever the model's dtype. To compare formulas
far below float32 noise, `to_torch(widened=True)` builds the model from a private copy of its source in which these
islands are float64. Asked when goldens are made, and again by the tests.
"""

import importlib
import re
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from refllm.forward.model import Model
from refllm.golden import run
from refllm.golden.cases import OperatorCase
from refllm.golden.model_cases import ModelCase
from refllm.kernels import plain
from refllm.ops.contracts import contract_of

if TYPE_CHECKING:
    from refllm.golden.exact import Golden

Arrays = dict[str, np.ndarray]

_ISLANDS = (
    (r"torch\.float32", "torch.float64"),
    (r"dtype=torch\.float\b(?!\d)", "dtype=torch.float64"),
    (r"\.float\(\)", ".double()"),
)


def witness(golden: "Golden") -> tuple[str, Arrays]:
    """(who it is, what it computes for the golden's inputs); outputs that it does not know are left out."""
    if isinstance(golden.case, OperatorCase):
        operator = golden.case.group
        arguments, keywords = _tensors(golden)
        out = (_OTHERS.get(operator) or plain.EAGER[operator])(*arguments, **keywords)
        results = out if isinstance(out, tuple) else (out,)
        names = run.output_names(operator, golden.about["keywords"])
        values = {name: y.numpy() for name, y in zip(names, results, strict=False)}  # lse is not always asked for
        return f"{contract_of(operator).witness}, float64", values
    assert isinstance(golden.case, ModelCase)
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # about odd configs, which are odd on purpose
    try:
        values = _model(golden, golden.case)
    finally:
        transformers.utils.logging.set_verbosity(before)
    return f"Transformers {golden.about['class']}, float64 throughout", values


# -------------------------------------------------------------------------------------------------------------- models


def to_torch(model: Model, *, dtype: str = "float32", attention: str = "sdpa", widened: bool = False) -> Any:
    """The Transformers model with the weights of `model`, in eval mode."""
    config = transformers.AutoConfig.for_model(**model.config.to_dict())
    config._attn_implementation = attention
    name = type(model).__name__
    torch_dtype = getattr(torch, dtype)
    hf = getattr(_widened(model.config.model_type), name)(config) if widened else getattr(transformers, name)(config)
    backbone_name = model.prefix.rstrip(".")
    if widened and backbone_name and model.head != "causal_lm":  # the generic heads look their backbone up by config
        setattr(hf, backbone_name, getattr(_widened(model.config.model_type), _backbone_class(name))(config))
    rotary = (getattr(hf, backbone_name) if backbone_name else hf).rotary_emb
    if widened:  # the library's initialisation of weights has put float32 frequencies there
        rotary.__init__(config)
    tables = {key: value.clone() for key, value in rotary.named_buffers()}
    hf = hf.to(torch_dtype).eval()
    for key, value in tables.items():  # a blanket cast rounds the rotary frequencies, loading a checkpoint does not
        setattr(rotary, key, value)
    state = {name: torch.from_numpy(np.array(value)).to(torch_dtype) for name, value in tensors_of(model).items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    hf.tie_weights()
    return hf


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """The tensors of a refllm model under the names that files use."""
    return dict(model.weights.renamed(model.prefix))


def numpy_of(x: torch.Tensor) -> np.ndarray:
    """A torch tensor as NumPy; bfloat16 and float16 become float32, which holds them exactly."""
    x = x.detach()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def _backbone_class(name: str) -> str:
    return re.sub(r"For\w+", "Model", name)


@cache
def _widened(model_type: str) -> types.ModuleType:
    _copy("transformers.modeling_rope_utils", "transformers.modeling_rope_utils_float64", ())
    return _copy(
        f"transformers.models.{model_type}.modeling_{model_type}",
        f"transformers.models.{model_type}.modeling_{model_type}_float64",
        ((r"modeling_rope_utils import", "modeling_rope_utils_float64 import"),),
    )


def _copy(original: str, name: str, changes: tuple[tuple[str, str], ...]) -> types.ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    source_module = importlib.import_module(original)
    assert source_module.__file__ is not None
    with open(source_module.__file__) as file:
        source = file.read()
    for pattern, replacement in (*_ISLANDS, *changes):
        source = re.sub(pattern, replacement, source)
    module = types.ModuleType(name)
    module.__package__ = original.rpartition(".")[0]
    module.__file__ = source_module.__file__
    sys.modules[name] = module
    exec(compile(source, source_module.__file__, "exec"), module.__dict__)
    return module


def _model(golden: "Golden", case: ModelCase) -> Arrays:
    """All tokens at once, also where the case feeds pieces. Of the loss Transformers takes the logits in float32."""
    model = run.reference(case, golden.weights, "float64")
    hf = to_torch(model, dtype="float64", attention="eager", widened=True)
    given = dict(golden.inputs)
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 4:  # its eager attention adds a mask
        given["attention_mask"] = np.where(mask, 0.0, np.finfo(np.float64).min)
    kept: dict[str, torch.Tensor] = {}
    # RoPE type "dynamic" divides an integer tensor by a number, which gives the default dtype: one more float32 island.
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            for name in case.taps:
                if not name.endswith("_rope"):
                    _keep(hf, name, kept)
            out = hf(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in given.items()})
    finally:
        torch.set_default_dtype(torch.float32)
    rows = run.valid_rows(golden.inputs)
    found = {name: numpy_of(out[name]) for name in golden.exact if name in out}
    if case.head != "sequence_classification":
        found = {name: x if name == "loss" else run.by_position(x, rows) for name, x in found.items()}
    return found | {name: run.by_position(numpy_of(x), rows) for name, x in kept.items()}


def _keep(hf: Any, name: str, kept: dict[str, torch.Tensor]) -> None:
    """Record the tap `name` (`refllm.forward.taps`): the output of the module of that name; `mlp.act` is what down_proj
    receives."""
    module = name.replace(".mlp.act", ".mlp.down_proj")

    def after(_: Any, received: Any, result: Any) -> None:
        value = received[0] if name != module else result
        kept[name] = value[0] if isinstance(value, tuple) else value

    hf.get_submodule(module).register_forward_hook(after)


# ----------------------------------------------------------------------------------------------------------- operators


def _tensors(golden: "Golden") -> tuple[list[Any], dict[str, Any]]:
    """The call, in float64. What is poison by contract is 0 here: Torch's functions let it through."""

    def given(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        x = golden.inputs[value["tensor"]]
        return torch.from_numpy(np.nan_to_num(x.astype(np.float64)) if x.dtype == np.float32 else x.copy())

    about = golden.about
    return [given(x) for x in about["arguments"]], {name: given(x) for name, x in about["keywords"].items()}


def _rope(q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> tuple[Any, Any]:
    """Transformers' own functions of Helium (interleaved) and Llama on the rotated part of every head."""
    family = "helium" if interleaved else "llama"
    apply = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    B, R = q.shape[0], 2 * cos.shape[-1]
    cos, sin = (torch.cat([t, t], -1).expand(B, -1, -1) for t in (cos, sin))
    turned = apply(q[..., :R], k[..., :R], cos, sin)
    return tuple(torch.cat([y, x[..., R:]], -1) for y, x in zip(turned, (q, k), strict=True))


def _norm_rope(
    q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float, *, norm: str, interleaved: bool
) -> Any:
    no_bias = (None,) if norm == "layer" else ()

    def heads(x: Any, weight: Any) -> Any:
        one = (plain.EAGER[f"{norm}_norm"](x[:, h], weight[h], *no_bias, eps) for h in range(x.shape[1]))
        return torch.stack([*one], 1)

    return _rope(heads(q, q_weight), heads(k, k_weight), cos, sin, interleaved=interleaved)


def _projected(
    x: Any,
    weight: Any,
    w: Any,
    b: Any,
    cos: Any,
    sin: Any,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    **how: Any,
) -> Any:
    H, K = num_heads, num_kv_heads
    y = F.linear(F.rms_norm(x, x.shape[-1:], weight, eps), w, b)
    heads = y.unflatten(-1, (H + 2 * K, -1)).transpose(1, 2)
    q, k = _rope(heads[:, :H], heads[:, H : H + K], cos, sin, **how)
    return q, k, heads[:, H + K :]


def _attend(q: Any, k: Any, v: Any, *, scale: Any = None, causal: bool = True, key_mask: Any = None, **_: Any) -> Any:
    """scaled_dot_product_attention with the mask written out, 0 where a query sees nothing; and the log-sum-exp."""
    S, T, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(S, T, dtype=torch.bool).tril(T - S) if causal else torch.ones(S, T, dtype=torch.bool)
    seen = seen[None, None].expand(q.shape[0], 1, S, T)
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0), scores.logsumexp(-1)


def _decode(q: Any, k: Any, v: Any, lengths: Any, **keywords: Any) -> Any:
    rows = [
        _attend(q[b, None], k[b, None, :, :n], v[b, None, :, :n], **keywords)[0] if n else torch.zeros_like(q[b, None])
        for b, n in enumerate(lengths.tolist())
    ]
    return torch.cat(rows)


_OTHERS: dict[str, Callable[..., Any]] = {
    "rope": _rope,
    "norm_rope": _norm_rope,
    "rms_norm_qkv_rope": _projected,
    "attention": _attend,
    "decode_attention": _decode,
}
"""The operators that Torch or Transformers has as one call. Every other operator is confirmed by its eager form."""
