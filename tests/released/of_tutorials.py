"""Triton's tutorials: its repository on the path."""

import importlib.util
import re

from wrapping import CHECKOUTS, checkout, released

NAME, VERSION = "Triton's tutorials", checkout("triton")


def _tutorial(file):
    """The module of a tutorial without what it runs when it is imported: its tests and its benchmarks."""
    path = CHECKOUTS / "triton/python/tutorials" / file
    source = re.sub(r"^(test|bench)\w*(\.run)?\(.*$", "", path.read_text(), flags=re.MULTILINE)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path))
    exec(compile(source, str(path), "exec"), vars(module))
    return module


norm, fused = _tutorial("05-layer-norm.py"), _tutorial("06-fused-attention.py")


@released(NAME, "layer_norm", "05-layer-norm", without="no_bias")
def layer_norm(x, weight, bias, eps):
    return norm.layer_norm(x, x.shape[-1:], weight, bias, eps)


_LEFT, _SIZES = ("key_mask", "return_lse", "grouped_heads"), ("D==128", "T==64", "S==T")


@released(NAME, "attention", "06-fused-attention", "float16", without=_LEFT, sizes=_SIZES, configs="all")
def attention(q, k, v, *, scale=None, causal=True):
    return fused.attention(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, False)
