"""Transformers as the independent witness: the same weights in its classes, in any dtype, and widened to float64.

Transformers computes norms, rotary tables and eager softmax in float32 whatever the model's dtype. To compare formulas
far below float32 noise, `widened=True` builds the model from a private copy of its source in which these islands are
float64.
"""

import importlib
import re
import sys
import types
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from refllm.model import Model

_ISLANDS = (
    (r"torch\.float32", "torch.float64"),
    (r"dtype=torch\.float\b(?!\d)", "dtype=torch.float64"),
    (r"\.float\(\)", ".double()"),
)


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
