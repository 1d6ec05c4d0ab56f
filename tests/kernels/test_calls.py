"""Calls of every operator on real shapes: what is in them follows from the operator's record."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.calls import FIRST_POSITION, LAYERS, MOST_WORDS, REDUCED, Source, call, calls  # noqa: E402

B, S, T, N, LAYER = 2, 3, 5, 7, REDUCED[1]
E, F, H, K, D, R, V = (getattr(LAYER, axis) for axis in "EFHKDRV")
HEADS = {"q": (B, H, S, D), "k": (B, K, S, D)}
TABLES = {"cos": (S, R // 2), "sin": (S, R // 2)}
ROWS = {"x": (B, S, E), "residual": (B, S, E), "weight": (E,), "bias": (E,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rms_norm": {name: ROWS[name] for name in ("x", "weight")},
    "layer_norm": {name: ROWS[name] for name in ("x", "weight", "bias")},
    "add_rms_norm": {name: ROWS[name] for name in ("x", "residual", "weight")},
    "add_layer_norm": ROWS,
    "rope": HEADS | TABLES,
    "norm_rope": HEADS | {"q_weight": (H, D), "k_weight": (K, D)} | TABLES,
    "rms_norm_qkv_rope": {
        "x": (B, S, E), "weight": (E,), "w_qkv": ((H + 2 * K) * D, E), "b_qkv": ((H + 2 * K) * D,), **TABLES,
    },
    "attention": {"q": (B, H, S, D), "k": (B, K, T, D), "v": (B, K, T, D)},
    "decode_attention": {"q": (B, H, S, D), "k_cache": (B, K, N, D), "v_cache": (B, K, N, D), "lengths": (B,)},
    "swiglu": {"gate": (B, S, F), "up": (B, S, F)},
    "relu2": {"x": (B, S, F)},
    "cross_entropy": {"logits": (B * S, V), "labels": (B * S,)},
    "linear_cross_entropy": {"x": (B * S, E), "weight": (V, E), "labels": (B * S,)},
}  # fmt: skip


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_arrays_have_the_shapes_of_the_record(operator: str) -> None:
    arguments, keywords = call(operator, LAYER.sizes(B=B, S=S, T=T, N=N), Source("float16", "meta", 0))
    arrays = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
    assert [tuple(x.shape) for x in arrays] == [*SHAPES[operator].values()]
    assert {x.dtype for x in arrays} <= {torch.float16, torch.int64}


def test_numbers_are_those_of_the_layer_and_vectors_may_be_left_out() -> None:
    sizes, source = LAYER.sizes(B=B, S=S), Source("float32", "meta", 0)
    arguments, keywords = call("rms_norm_qkv_rope", sizes, source, bias=False, interleaved=True)
    assert [x for x in arguments if not isinstance(x, torch.Tensor)] == [None, 1e-5]
    assert keywords == {"num_heads": H, "num_kv_heads": K, "interleaved": True}
    assert call("norm_rope", sizes, source)[1] == {"norm": "layer", "interleaved": False}
    assert call("rms_norm", sizes, source, eps=0.5)[0][-1] == 0.5


def test_values_have_the_size_that_their_kind_has_in_a_model() -> None:
    sizes, source = {**LAYER.sizes(B=2, S=64, N=64), "V": 512}, Source("float32", "cpu", 3)
    (x, weight, labels), _ = call("linear_cross_entropy", sizes, source)
    (logits, _), _ = call("cross_entropy", sizes, source)
    (gate, up), _ = call("swiglu", sizes, source)
    scales = {"x": (x, 1), "weight": (weight, E**-0.5), "logits": (logits, 3), "gate": (gate, 2), "up": (up, 2)}
    for name, (values, scale) in scales.items():
        assert float(values.std()) == pytest.approx(scale, rel=0.05), name
        assert abs(float(values.mean())) < 0.05 * scale, name
    assert float(source.normal(100, 100, mean=1000.0).mean()) == pytest.approx(1000, abs=0.1)
    assert (int(labels.min()), int(labels.max())) == (pytest.approx(0, abs=30), pytest.approx(511, abs=30))
    (*_, lengths), _ = call("decode_attention", sizes, source)
    assert lengths.tolist() == [64, 64]
    (q, *_), _ = call("rope", sizes, source)
    assert q.transpose(1, 2).is_contiguous()  # in memory as a projection leaves it
    again = call("swiglu", sizes, Source(torch.float32, "cpu", 3))[0][0]
    assert torch.equal(again, call("swiglu", sizes, Source("float32", "cpu", 3))[0][0])


def test_tables_begin_far_from_the_first_position() -> None:
    cos, sin = Source("float32", "cpu", 0).table(S, R)
    for s, i in ((0, 0), (2, 0), (1, 3), (2, R // 2 - 1)):
        angle = (FIRST_POSITION + s) * 1e4 ** (-2 * i / R)
        assert (float(cos[s, i]), float(sin[s, i])) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-6)


@pytest.mark.parametrize("layer", REDUCED)
def test_every_call_can_be_computed_and_has_a_name_of_its_own(layer: Any) -> None:
    made = list(calls(layer, "float32", "cpu", tokens=4))
    assert {one.operator for one in made} == set(kernels.OPERATORS)
    assert len({(one.operator, one.name) for one in made}) == len(made)
    for one in made:
        out = getattr(plain, one.operator)(*one.arguments, **one.keywords)
        for y in out if isinstance(out, tuple) else (out,):
            assert torch.isfinite(y).all(), (one.operator, one.name)


def test_calls_are_what_their_names_say() -> None:
    named = {(one.operator, one.name): one for one in calls(REDUCED[0], "float32", "cpu", tokens=6)}
    for operator in ("layer_norm", "add_layer_norm"):
        one = named[operator, "mean 1000"]
        assert float(one.arguments[0].mean()) == pytest.approx(1000, rel=0.01)
        assert None in one.arguments
    assert named["rms_norm_qkv_rope", "1 token"].arguments[0].shape[1] == 1
    assert None in named["rms_norm_qkv_rope", "1 token"].arguments
    for tokens in (1, 3):
        one = named["decode_attention", f"{tokens} token{'s' * (tokens > 1)}"]
        assert one.arguments[0].shape[2] == tokens
        assert one.arguments[-1].tolist() == [19, 6]
    for operator, reduction in (("cross_entropy", "mean"), ("linear_cross_entropy", "none")):
        labels, keywords = named[operator, reduction].arguments[-1], named[operator, reduction].keywords
        assert keywords["reduction"] == reduction
        assert (labels == -100).nonzero().flatten().tolist() == [0, 5, 10]
    assert named["attention", ""].keywords["return_lse"] is True
    assert named["attention", "all keys"].keywords == {"causal": False, "scale": 0.2}
    mask = named["attention", "key mask"].keywords["key_mask"]
    assert mask.shape == (2, 19)
    assert 0 < int(mask.sum()) < mask.numel()
    for pairs, interleaved in (("interleaved", True), ("half-split", False)):
        assert named["rope", pairs].keywords == {"interleaved": interleaved}
        assert named["norm_rope", f"rms, {pairs}"].keywords == {"norm": "rms", "interleaved": interleaved}


def test_a_vocabulary_is_cut_where_a_matrix_would_be_too_large() -> None:
    widest = max(LAYERS, key=lambda layer: layer.V)
    assert widest.V > MOST_WORDS
    made = {one.operator: one.arguments for one in calls(widest, "float16", "meta", tokens=2)}
    assert made["cross_entropy"][0].shape == (4, widest.V)
    assert made["linear_cross_entropy"][1].shape == (MOST_WORDS, widest.E)


def test_layers_are_possible_and_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="float64"):
        next(calls(LAYER, "float64", "cpu", tokens=2))
    for layer in (*LAYERS, *REDUCED):
        assert layer.H % layer.K == 0
        assert 0 < layer.R <= layer.D
