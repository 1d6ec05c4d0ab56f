"""Every operator against an independent formulation in Torch's float64, and every clause of its contract."""

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.activations import ACT2FN

from refllm import ops
from refllm.errors import InputError
from refllm.precision import EXACT, Arithmetic, arithmetic

ARITHMETICS = (EXACT, arithmetic("float32"), arithmetic("bfloat16"), arithmetic("float16", "fused"))
HEAD_DIMS = (8, 16, 32, 64, 80, 96, 128, 160, 256)
EDGES = (1, 2, 3, 7, 8, 127, 128, 129)

seeds = st.integers(0, 2**32 - 1)
lengths = st.one_of(st.integers(1, 9), st.sampled_from(EDGES))
scales = st.sampled_from((1e-3, 1.0, 1e3))
Arrays = tuple[np.ndarray, ...]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal up to `tolerance` times the largest number expected; NaN and infinities at the same places."""
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    found = np.asarray(found)
    assert found.shape == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * finite.max(initial=1e-300))


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


# ---------------------------------------------------------------------------------------------------------------- norms


@given(seeds, lengths, st.sampled_from((1, 2, 5, 64, 100, 769)), scales, st.sampled_from((0.0, 1e-8, 1e-5, 0.1)))
@settings(max_examples=60)
def test_rms_norm_equals_torch(seed: int, rows: int, width: int, scale: float, eps: float) -> None:
    rng = np.random.default_rng(seed)
    x, weight = scale * normal(rng, 2, rows, width), normal(rng, width)
    close(ops.rms_norm(x, weight, eps), F.rms_norm(tensor(x), (width,), tensor(weight), eps))


@given(seeds, lengths, st.sampled_from((2, 5, 64, 100, 769)), scales, st.sampled_from((0.0, 1e3)), st.booleans())
@settings(max_examples=60)
def test_layer_norm_equals_torch(seed: int, rows: int, width: int, scale: float, mean: float, biased: bool) -> None:
    rng = np.random.default_rng(seed)
    x, weight = scale * (normal(rng, 2, rows, width) + mean), normal(rng, width)
    bias = normal(rng, width) if biased else None
    expected = F.layer_norm(tensor(x), (width,), tensor(weight), None if bias is None else tensor(bias), 1e-5)
    # Subtracting a mean of m standard deviations costs m units in the last place; width 2 has narrow rows.
    close(ops.layer_norm(x, weight, bias, 1e-5), expected, 1e-8 if mean else 1e-10 if width == 2 else 1e-12)


def test_a_row_of_zeros_norms_to_the_bias() -> None:
    weight, bias = np.arange(1.0, 9.0), np.arange(8.0)
    np.testing.assert_array_equal(ops.rms_norm(np.zeros((2, 8)), weight, 1e-8), np.zeros((2, 8)))
    np.testing.assert_array_equal(ops.layer_norm(np.zeros((2, 8)), weight, bias, 1e-8), [bias, bias])


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@given(seed=seeds, rows=st.integers(0, 5), width=st.integers(1, 40))
@settings(max_examples=10)
def test_add_norms_equal_their_parts(ar: Arithmetic, seed: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, residual = (ar.round(ar.array(normal(rng, rows, width)), "add") for _ in range(2))
    weight, bias = (ar.round(ar.array(normal(rng, width)), "add") for _ in range(2))
    total = ops.add(residual, x, ar=ar)
    y, r = ops.add_rms_norm(x, residual, weight, 1e-5, ar=ar)
    np.testing.assert_array_equal(r, total)
    np.testing.assert_array_equal(y, ops.rms_norm(total, weight, 1e-5, ar=ar))
    y, r = ops.add_layer_norm(x, residual, weight, bias, 1e-5, ar=ar)
    np.testing.assert_array_equal(r, total)
    np.testing.assert_array_equal(y, ops.layer_norm(total, weight, bias, 1e-5, ar=ar))


# ----------------------------------------------------------------------------------------------------------------- rope


def tables(rng: np.random.Generator, *shape: int, largest: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    angles = rng.integers(0, largest, (*shape[:-1], 1)) * 10000.0 ** -np.linspace(0, 1, shape[-1])
    return np.cos(angles), np.sin(angles)


def rotated_by_complex_numbers(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    R = 2 * cos.shape[-1]
    turn = torch.complex(tensor(cos), tensor(sin)).unsqueeze(-3)
    head, rest = tensor(x[..., :R]), x[..., R:]
    pairs = head.unflatten(-1, (R // 2, 2)) if interleaved else head.unflatten(-1, (2, R // 2)).transpose(-1, -2)
    turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return np.concatenate([turned.flatten(-2).numpy(), rest], axis=-1)


rope_shapes = st.tuples(
    st.integers(0, 3),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((1, 2)),
    st.integers(0, 5),
    st.sampled_from(HEAD_DIMS),
)


@given(seeds, rope_shapes, st.booleans(), st.booleans(), st.sampled_from((1.0, 0.5, 0.25)))
@settings(max_examples=80)
def test_rope_is_a_complex_multiplication_of_pairs(
    seed: int, shape: tuple[int, ...], interleaved: bool, per_row: bool, part: float
) -> None:
    rng = np.random.default_rng(seed)
    B, H, K, S, D = shape
    q, k = normal(rng, B, H, S, D), normal(rng, B, K, S, D)
    cos, sin = tables(rng, *((B, S) if per_row else (S,)), int(D * part) // 2)
    found = ops.rope(q, k, cos, sin, interleaved=interleaved)
    for x, y in zip((q, k), found, strict=True):
        close(y, rotated_by_complex_numbers(x, cos, sin, interleaved))


@given(seeds, st.booleans(), st.sampled_from((8, 80, 160)), st.sampled_from(ARITHMETICS))
@settings(max_examples=20)
def test_rope_passes_the_other_lanes_bit_for_bit(seed: int, interleaved: bool, D: int, ar: Arithmetic) -> None:
    rng = np.random.default_rng(seed)
    q, k = (ar.array(normal(rng, 2, 2, 3, D)) for _ in range(2))
    q[0, 0, 0, -4:] = np.nan, -np.inf, -0.0, np.finfo(ar.work).smallest_subnormal
    cos, sin = tables(rng, 2, 3, D // 8)
    for x, y in zip((q, k), ops.rope(q, k, cos, sin, interleaved=interleaved, ar=ar), strict=True):
        assert y[..., D // 4 :].tobytes() == x[..., D // 4 :].tobytes()
        assert np.isfinite(y[..., : D // 4]).all()


@given(seeds, st.booleans())
@settings(max_examples=20)
def test_rope_tables_with_and_without_a_batch_axis_agree(seed: int, interleaved: bool) -> None:
    rng = np.random.default_rng(seed)
    q, k = normal(rng, 3, 4, 5, 8), normal(rng, 3, 2, 5, 8)
    cos, sin = tables(rng, 5, 4)
    shared = ops.rope(q, k, cos, sin, interleaved=interleaved)
    each = ops.rope(q, k, *(np.broadcast_to(t, (3, 5, 4)) for t in (cos, sin)), interleaved=interleaved)
    for a, b in zip(shared, each, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@pytest.mark.parametrize("norm", ["rms", "layer"])
@given(seed=seeds, interleaved=st.booleans(), S=st.integers(0, 4))
@settings(max_examples=8)
def test_norm_rope_equals_its_parts(ar: Arithmetic, norm: str, seed: int, interleaved: bool, S: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = (ar.round(ar.array(normal(rng, 2, heads, S, 16)), "add") for heads in (4, 2))
    weights = [ar.round(ar.array(normal(rng, heads, 16)), "add") for heads in (4, 2)]
    cos, sin = (ar.round(ar.array(t), "rope.table") for t in tables(rng, S, 4))
    normed = [np.empty_like(q), np.empty_like(k)]
    for x, weight, out in zip((q, k), weights, normed, strict=True):
        for head in range(x.shape[1]):
            row = x[:, head], weight[head]
            out[:, head] = ops.rms_norm(*row, 1e-6, ar=ar) if norm == "rms" else ops.layer_norm(*row, None, 1e-6, ar=ar)
    expected = ops.rope(*normed, cos, sin, interleaved=interleaved, ar=ar)
    found = ops.norm_rope(q, k, *weights, cos, sin, 1e-6, norm=norm, interleaved=interleaved, ar=ar)
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_norm_rope_refuses_an_unknown_norm() -> None:
    x, weight, table = np.ones((1, 1, 1, 4)), np.ones((1, 4)), np.ones((1, 2))
    with pytest.raises(InputError, match='norm=\'group\' is not known; use "rms" or "layer"'):
        ops.norm_rope(x, x, weight, weight, table, table, 1e-6, norm="group", interleaved=True)


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@given(seed=seeds, interleaved=st.booleans(), biased=st.booleans(), S=st.integers(1, 4))
@settings(max_examples=8)
def test_rms_norm_qkv_rope_equals_its_parts(ar: Arithmetic, seed: int, interleaved: bool, biased: bool, S: int) -> None:
    rng = np.random.default_rng(seed)
    E, H, K, D = 12, 4, 2, 8
    x, norm_weight = (ar.round(ar.array(a), "add") for a in (normal(rng, 2, S, E), normal(rng, E)))
    w_qkv, b_qkv = (
        ar.round(ar.array(a), "add") for a in (normal(rng, (H + 2 * K) * D, E), normal(rng, (H + 2 * K) * D))
    )
    cos, sin = (ar.round(ar.array(t), "rope.table") for t in tables(rng, S, 4))
    normed = ops.rms_norm(x, norm_weight, 1e-6, ar=ar)
    q, k, v = (
        ops.split_heads(ops.linear(normed, w_qkv[rows], b_qkv[rows] if biased else None, ar=ar), heads)
        for rows, heads in (
            (slice(0, H * D), H),
            (slice(H * D, (H + K) * D), K),
            (slice((H + K) * D, (H + 2 * K) * D), K),
        )
    )
    q, k = ops.rope(q, k, cos, sin, interleaved=interleaved, ar=ar)
    found = ops.rms_norm_qkv_rope(
        x,
        norm_weight,
        w_qkv,
        b_qkv if biased else None,
        cos,
        sin,
        1e-6,
        num_heads=H,
        num_kv_heads=K,
        interleaved=interleaved,
        ar=ar,
    )
    for a, b in zip(found, (q, k, v), strict=True):
        close(a, b, 1e-12 if ar.exact else 0.02)  # one product or three: BLAS may add in another order


# ------------------------------------------------------------------------------------------------------------ attention


def visible(S: int, T: int, causal: bool) -> torch.Tensor:
    """[S, T], True where query s may see key t: the last query sees all keys, the one before it all but one, ..."""
    return (
        torch.tensor([[not causal or S - 1 - s <= T - 1 - t for t in range(T)] for s in range(S)]).bool().reshape(S, T)
    )


def torch_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> torch.Tensor:
    """Torch's scaled_dot_product_attention on repeated keys and values and one additive mask."""
    (B, H, S, _), (K, T) = q.shape, k.shape[1:3]
    bias = torch.zeros(B, H, S, T, dtype=torch.float64).masked_fill(~visible(S, T, causal), -torch.inf)
    if key_mask is not None:
        bias = bias.masked_fill(~tensor(key_mask != 0)[:, None, None, :], -torch.inf)
    if mask is not None:
        full = tensor(np.broadcast_to(mask, (B, H, S, T)))
        bias = bias.masked_fill(~full, -torch.inf) if mask.dtype == bool else bias + full
    k_repeated, v_repeated = (tensor(x).repeat_interleave(H // K, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(tensor(q), k_repeated, v_repeated, attn_mask=bias, scale=scale)
    return out.masked_fill(torch.isneginf(bias).all(-1, keepdim=True), 0.0)


@st.composite
def attention_cases(draw: st.DrawFn) -> tuple[Arrays, dict[str, Any]]:
    """(q, k, v) and keyword arguments: every kind of mask, alone and together."""
    rng = np.random.default_rng(draw(seeds))
    B, K, g = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4)))
    S, T, D = draw(lengths), draw(lengths), draw(st.sampled_from(HEAD_DIMS if B * K == 1 else HEAD_DIMS[:4]))
    scale = draw(scales)
    q, k, v = scale * normal(rng, B, K * g, S, D), normal(rng, B, K, T, D), normal(rng, B, K, T, D)
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.0, 0.3, 1.0)))
    if draw(st.booleans()):
        options["key_mask"] = rng.random((B, T)) < draw(st.sampled_from((0.0, 0.3, 0.9)))
    kind = draw(st.sampled_from(("none", "none", "bool", "float", "float with -inf")))
    shape = tuple(n if draw(st.booleans()) else 1 for n in (B, K * g)) + (S, T)
    if kind == "bool":
        options["mask"] = rng.random(shape) < 0.7
    elif kind != "none":
        options["mask"] = np.where((rng.random(shape) < 0.3) & (kind != "float"), -np.inf, normal(rng, *shape))
    return (q, k, v), options


@given(attention_cases())
@settings(max_examples=150)
def test_attention_equals_torch(case: tuple[Arrays, dict[str, Any]]) -> None:
    qkv, options = case
    # An error of one unit in the last place of a score of size s is a relative error of s units in its weight.
    tolerance = 1e-14 * max(100.0, np.abs(qkv[0]).max() * np.abs(qkv[1]).max())
    close(ops.attention(*qkv, **options), torch_attention(*qkv, **options), tolerance)


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@pytest.mark.parametrize(("S", "T"), [(1, 1), (5, 5), (3, 40), (150, 150), (1, 300)])
def test_a_window_is_a_mask_of_the_last_keys_that_causality_shows(S: int, T: int, ar: Arithmetic) -> None:
    rng = np.random.default_rng(S + T)
    q, k, v = (ar.array(normal(rng, 2, heads, n, 8)) for heads, n in ((4, S), (2, T), (2, T)))
    key_mask = rng.random((2, T)) < 0.8
    ago = np.arange(T - S, T)[:, None] - np.arange(T)
    for window in (1, 2, 7, T, T + 3):
        seen = (ago >= 0) & (ago < window)
        for padding in (None, key_mask):
            expected = ops.attention(q, k, v, key_mask=padding, mask=seen, ar=ar)
            found = ops.attention(q, k, v, key_mask=padding, window=window, ar=ar)
            np.testing.assert_array_equal(found, expected)
            if window >= T:
                np.testing.assert_array_equal(found, ops.attention(q, k, v, key_mask=padding, ar=ar))
    np.testing.assert_array_equal(
        ops.attention(q, k, v, causal=False, window=1, ar=ar), ops.attention(q, k, v, causal=False, ar=ar)
    )


@given(attention_cases())
@settings(max_examples=60)
def test_lse_is_the_logsumexp_of_the_masked_scores(case: tuple[Arrays, dict[str, Any]]) -> None:
    (q, k, v), options = case
    (S, D), T, g = q.shape[2:], k.shape[2], q.shape[1] // k.shape[1]
    o, lse = ops.attention(q, k, v, return_lse=True, **options)
    scores = tensor(q) @ tensor(k).repeat_interleave(g, dim=1).mT * options.get("scale", D**-0.5)
    scores = scores.masked_fill(~visible(S, T, options["causal"]), -torch.inf)
    if "key_mask" in options:
        scores = scores.masked_fill(~tensor(options["key_mask"])[:, None, None, :], -torch.inf)
    if "mask" in options:
        mask = tensor(options["mask"])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    close(lse, torch.logsumexp(scores, dim=-1))
    np.testing.assert_array_equal(o, ops.attention(q, k, v, **options))
    assert (o[np.isneginf(lse)] == 0).all()


@pytest.mark.parametrize(("S", "T"), [*itertools.product((127, 128, 129, 256, 257), (1, 64, 128, 300)), (400, 200)])
def test_blocks_of_queries_join_without_a_seam(S: int, T: int) -> None:
    rng = np.random.default_rng(S * T)
    q, k, v = normal(rng, 1, 2, S, 8), normal(rng, 1, 1, T, 8), normal(rng, 1, 1, T, 8)
    for causal in (True, False):
        close(ops.attention(q, k, v, causal=causal), torch_attention(q, k, v, causal=causal))


@pytest.mark.parametrize(
    ("S", "g", "T"), [(50, 2, 6001), (3, 1, (1 << 18) - 1), (3, 1, (1 << 18) + 1), (2, 3, 100_000)]
)
def test_many_keys_make_smaller_blocks_and_the_same_result(S: int, g: int, T: int) -> None:
    rng = np.random.default_rng(T)
    q, k, v = normal(rng, 1, g, S, 8), normal(rng, 1, 1, T, 8), normal(rng, 1, 1, T, 8)
    found = ops.attention(q, k, v)
    s = q[0] @ k[0].swapaxes(-1, -2) / np.sqrt(8)
    s[:, np.arange(T) > np.arange(S)[:, None] + T - S] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    close(found[0], p @ v[0] / p.sum(-1, keepdims=True))


@given(seeds, st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=40)
def test_causal_is_aligned_at_the_end(seed: int, S: int, T: int) -> None:
    """Query s alone over keys 0 .. T-S+s; a query before the first key gives 0 and an lse of -inf."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, 1, 2, S, 8), normal(rng, 1, 2, T, 8), normal(rng, 1, 2, T, 8)
    o, lse = ops.attention(q, k, v, return_lse=True)
    for s in range(S):
        seen = max(0, T - S + s + 1)
        one, one_lse = ops.attention(q[:, :, s : s + 1], k[:, :, :seen], v[:, :, :seen], causal=False, return_lse=True)
        close(o[:, :, s : s + 1], one)
        close(lse[:, :, s : s + 1], one_lse)
        assert (np.isneginf(one_lse).all() and not one.any()) if seen == 0 else np.isfinite(one_lse).all()


@given(attention_cases(), st.sampled_from((np.nan, np.inf, -np.inf)))
@settings(max_examples=100)
def test_what_masked_keys_and_values_hold_reaches_no_valid_row(
    case: tuple[Arrays, dict[str, Any]], poison: float
) -> None:
    """A key that no query of a batch row and key head may see; the result is the same to the last bit."""
    (q, k, v), options = case
    (B, H, S, _), (K, T) = q.shape, k.shape[1:3]
    seen = np.broadcast_to(visible(S, T, options["causal"]).numpy(), (B, H, S, T)).copy()
    if "key_mask" in options:
        seen &= options["key_mask"][:, None, None, :]
    if "mask" in options:
        seen &= options["mask"] if options["mask"].dtype == bool else ~np.isneginf(options["mask"])
    unseen = ~seen.reshape(B, K, -1, T).any(axis=2)  # [B, K, T]
    k_poisoned, v_poisoned = (np.where(unseen[..., None], poison, x) for x in (k, v))
    clean = ops.attention(q, k, v, return_lse=True, **options)
    assert len(clean) == 2
    with np.errstate(invalid="ignore"):
        found = ops.attention(q, k_poisoned, v_poisoned, return_lse=True, **options)
    for a, b in zip(found, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@given(seeds, st.sampled_from((np.nan, np.inf, -np.inf)), st.integers(2, 140))
@settings(max_examples=40)
def test_the_causal_future_may_hold_anything(seed: int, poison: float, S: int) -> None:
    """The last key and value are poisoned, and every row but the last one is as before."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, 1, 2, S, 8), normal(rng, 1, 2, S, 8), normal(rng, 1, 2, S, 8)
    clean = ops.attention(q, k, v)
    k[:, :, -1], v[:, :, -1] = poison, poison
    with np.errstate(invalid="ignore"):
        found = ops.attention(q, k, v)
    close(found[:, :, :-1], clean[:, :, :-1], 1e-14)
    assert not np.isfinite(found[:, :, -1]).all()


def test_a_visible_nan_is_not_hidden() -> None:
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, 1, 3, 8), normal(rng, 1, 1, 3, 8), normal(rng, 1, 1, 3, 8)
    v[0, 0, 1, 4] = np.nan
    o = ops.attention(q, k, v)
    assert np.isfinite(o[0, 0, 0]).all()
    assert np.isnan(o[0, 0, 1:, 4]).all()
    assert np.isfinite(np.delete(o[0, 0], 4, axis=-1)).all()


def test_scores_of_any_size_select_the_largest_without_overflow() -> None:
    rng = np.random.default_rng(1)
    q, k, v = 1e8 * normal(rng, 1, 1, 5, 16), 1e8 * normal(rng, 1, 1, 7, 16), normal(rng, 1, 1, 7, 16)
    best = (q[0, 0] @ k[0, 0].T).argmax(axis=-1)
    np.testing.assert_array_equal(ops.attention(q, k, v, causal=False)[0, 0], v[0, 0, best])


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_any_head_dim_and_its_default_scale(D: int) -> None:
    rng = np.random.default_rng(D)
    q, k, v = normal(rng, 2, 4, 5, D), normal(rng, 2, 2, 9, D), normal(rng, 2, 2, 9, D)
    close(ops.attention(q, k, v), torch_attention(q, k, v, scale=D**-0.5))
    close(ops.attention(q, k, v), ops.attention(q, k, v, scale=D**-0.5), 0)


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_to_attend_is_no_error(ar: Arithmetic, B: int, S: int, T: int, causal: bool) -> None:
    q, k = np.ones((B, 4, S, 8)), np.ones((B, 2, T, 8))
    o, lse = ops.attention(q, k, k, causal=causal, key_mask=np.ones((B, T), bool), return_lse=True, ar=ar)
    assert o.shape == q.shape
    assert not o.any()
    assert lse.shape == (B, 4, S)
    assert np.isneginf(lse).all()


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k = np.ones((1, 4, 2, 8)), np.ones((1, 3, 2, 8))
    with pytest.raises(InputError, match="4 query heads are not a multiple of 3 key/value heads"):
        ops.attention(q, k, k)


# ----------------------------------------------------------------------------------------------------- decode attention


@given(seeds, st.integers(1, 8), st.integers(1, 24), st.sampled_from((1, 2, 4)), st.sampled_from((8, 80)), st.data())
@settings(max_examples=60)
def test_decode_attention_reads_nothing_past_the_lengths(
    seed: int, S: int, N: int, g: int, D: int, data: st.DataObject
) -> None:
    """Against attention of each row over its own slots; the slots behind hold NaN and infinity."""
    rng = np.random.default_rng(seed)
    B = 3
    filled = np.array(data.draw(st.lists(st.integers(0, N), min_size=B, max_size=B)))
    q, k, v = normal(rng, B, 2 * g, S, D), normal(rng, B, 2, N, D), normal(rng, B, 2, N, D)
    behind = np.arange(N)[None, None, :, None] >= filled[:, None, None, None]
    k_cache, v_cache = np.where(behind, np.nan, k), np.where(behind, np.inf, v)
    found = ops.decode_attention(q, k_cache, v_cache, filled)
    assert np.isfinite(found).all()
    for b, T in enumerate(filled):
        close(found[b : b + 1], torch_attention(q[b : b + 1], k[b : b + 1, :, :T], v[b : b + 1, :, :T]))
        assert not found[b, :, : max(0, S - T)].any()  # tokens before the first slot see nothing


def test_decode_attention_takes_a_scale_and_an_empty_batch() -> None:
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 2, 1, 8), normal(rng, 2, 1, 5, 8), normal(rng, 2, 1, 5, 8)
    found = ops.decode_attention(q, k, v, np.array([5, 5]), scale=0.7)
    close(found, torch_attention(q, k, v, scale=0.7))
    assert ops.decode_attention(q[:0], k[:0], v[:0], np.zeros(0, int)).shape == (0, 2, 1, 8)


@pytest.mark.parametrize("length", [-1, 6])
def test_decode_attention_refuses_lengths_that_the_cache_does_not_have(length: int) -> None:
    q, k = np.ones((2, 2, 1, 8)), np.ones((2, 1, 5, 8))
    with pytest.raises(InputError, match=rf"lengths_B\[1\]={length} is outside 0\.\.5"):
        ops.decode_attention(q, k, k, np.array([5, length]))


# -------------------------------------------------------------------------------------------------------------- softmax


@given(seeds, st.integers(0, 4), st.integers(1, 130), scales, st.floats(-1e5, 1e5))
@settings(max_examples=40)
def test_softmax_equals_torch_and_does_not_see_a_shift(
    seed: int, rows: int, width: int, scale: float, shift: float
) -> None:
    x = scale * normal(np.random.default_rng(seed), rows, width)
    found = ops.softmax(x)
    close(found, torch.softmax(tensor(x), dim=-1))
    close(found.sum(-1), np.ones(rows), 1e-14)
    close(ops.softmax(x + shift), found, 1e-9)


# ---------------------------------------------------------------------------------------------------------- activations

# Transformers writes some constants with few digits, and Torch's softplus is x itself beyond 20.
_LOOSER = {"gelu_fast": 1e-11, "gelu_new": 1e-12, "gelu_accurate": 1e-12, "mish": 1e-11, "sqrtsoftplus": 1e-9}


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations_equal_those_of_transformers(name: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-30, 30, 4001), 1e3 * normal(rng, 50), [0.0, -0.0, 6.0, 3.0, -3.0, 1e300, -1e300]])
    with np.errstate(over="ignore"):
        found = ops.activation(x, name)
    with torch.no_grad():
        expected = ACT2FN[name](tensor(x)).numpy()
    tolerance = _LOOSER.get(name, 1e-13)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_an_activation_of_nothing_is_nothing(name: str) -> None:
    for dtype in (np.float32, np.float64):
        found = ops.activation(np.zeros((0, 4), dtype), name)
        assert (found.shape, found.dtype) == ((0, 4), np.float64)


def test_every_activation_without_weights_is_there() -> None:
    assert set(ops.ACTIVATIONS) == set(ACT2FN) - {"prelu", "xielu"}


def test_an_unknown_activation_is_refused_with_the_names_that_are_known() -> None:
    for call in (lambda: ops.activation(np.ones(2), "sulu"), lambda: ops.glu(np.ones(2), np.ones(2), "sulu")):
        with pytest.raises(InputError, match="activation 'sulu' is not known; use one of silu, swish"):
            call()


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@given(seed=seeds, name=st.sampled_from(("silu", "gelu", "relu2")))
@settings(max_examples=10)
def test_gated_units_equal_their_parts(ar: Arithmetic, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    gate, up = (ar.round(ar.array(normal(rng, 3, 17)), "add") for _ in range(2))
    unrounded = Arithmetic(ar.dtype, ar.policy.without(frozenset({"activation"})))
    inner = ar.round(ops.activation(gate, name, ar=unrounded), "glu.activation")
    expected = ar.round(inner * up, "glu")
    np.testing.assert_array_equal(ops.glu(gate, up, name, ar=ar), expected)
    np.testing.assert_array_equal(ops.swiglu(gate, up, ar=ar), ops.glu(gate, up, "silu", ar=ar))
    np.testing.assert_array_equal(ops.relu2(gate, ar=ar), ops.activation(gate, "relu2", ar=ar))


@given(seeds, scales)
@settings(max_examples=20)
def test_swiglu_and_relu2_equal_torch(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    gate, up = scale * normal(rng, 2, 3, 11), normal(rng, 2, 3, 11)
    close(ops.swiglu(gate, up), F.silu(tensor(gate)) * tensor(up))
    close(ops.relu2(gate), F.relu(tensor(gate)) ** 2)


# --------------------------------------------------------------------------------------------------- products and heads


@given(seeds, st.integers(0, 3), st.integers(0, 4), st.integers(1, 20), st.integers(1, 20), st.booleans())
@settings(max_examples=30)
def test_linear_equals_torch(seed: int, B: int, S: int, inner: int, outer: int, biased: bool) -> None:
    rng = np.random.default_rng(seed)
    x, weight, bias = normal(rng, B, S, inner), normal(rng, outer, inner), normal(rng, outer)
    expected = F.linear(tensor(x), tensor(weight), tensor(bias) if biased else None)
    close(ops.linear(x, weight, bias if biased else None), expected)


@given(seeds, st.integers(0, 3), st.integers(0, 4), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=30)
def test_heads_are_consecutive_columns_and_merging_undoes_splitting(seed: int, B: int, S: int, H: int, D: int) -> None:
    x = normal(np.random.default_rng(seed), B, S, H * D)
    heads = ops.split_heads(x, H)
    for h in range(H):
        np.testing.assert_array_equal(heads[:, h], x[:, :, h * D : (h + 1) * D])
    np.testing.assert_array_equal(ops.merge_heads(heads), x)


def test_embedding_is_rows_of_the_table() -> None:
    table = normal(np.random.default_rng(0), 7, 3)
    ids = np.array([[0, 6], [6, 2]])
    np.testing.assert_array_equal(ops.embedding(ids, table), F.embedding(tensor(ids), tensor(table)).numpy())


# --------------------------------------------------------------------------------------------------------------- losses


@given(
    seeds,
    st.integers(1, 9),
    st.integers(1, 40),
    scales,
    st.sampled_from((-100, 0, 3, -1)),
    st.sampled_from(("mean", "sum", "none")),
    st.floats(0, 1),
)
@settings(max_examples=100)
@example(seed=0, N=4, V=5, scale=1.0, ignored=-100, reduction="mean", part=1.0)
def test_cross_entropy_equals_torch(
    seed: int, N: int, V: int, scale: float, ignored: int, reduction: str, part: float
) -> None:
    """Part of the labels is ignored; where all are, the mean is NaN and the sum 0."""
    rng = np.random.default_rng(seed)
    logits, labels = scale * normal(rng, N, V), rng.integers(0, V, N)
    labels[rng.random(N) < part] = ignored
    found = ops.cross_entropy(logits, labels, ignore_index=ignored, reduction=reduction)
    expected = F.cross_entropy(tensor(logits), tensor(labels), ignore_index=ignored, reduction=reduction)
    # A loss is the difference of two numbers of the size of the logits.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-13, atol=1e-14 * N * max(1.0, np.abs(logits).max()))
    if (labels == ignored).all():
        assert np.isnan(found) if reduction == "mean" else not np.any(found)


@given(seeds, st.sampled_from(("mean", "sum", "none")))
@settings(max_examples=20)
def test_linear_cross_entropy_equals_its_parts(seed: int, reduction: str) -> None:
    rng = np.random.default_rng(seed)
    x, weight, labels = normal(rng, 6, 5), normal(rng, 9, 5), rng.integers(0, 9, 6)
    labels[2] = 7
    for ar in ARITHMETICS:
        logits = ops.linear(x, weight, ar=ar)
        expected = ops.cross_entropy(logits, labels, ignore_index=7, reduction=reduction, ar=ar)
        found = ops.linear_cross_entropy(x, weight, labels, ignore_index=7, reduction=reduction, ar=ar)
        np.testing.assert_array_equal(found, expected)


def test_cross_entropy_of_confident_shifted_and_excluded_classes() -> None:
    logits = np.array([[1e5, 0.0, -1e5], [-1e5, -1e5 + 1, -1e5], [-np.inf, 2.0, 1.0], [40.0, 0.0, 0.0]])
    labels = np.array([0, 1, 1, 0])
    expected = F.cross_entropy(tensor(logits), tensor(labels), reduction="none")
    close(ops.cross_entropy(logits, labels, reduction="none"), expected)
    assert ops.cross_entropy(logits[2:3], np.array([0])) == np.inf


def test_ignored_rows_may_hold_anything() -> None:
    logits = normal(np.random.default_rng(0), 4, 5)
    labels = np.array([1, -100, 2, -100])
    expected = ops.cross_entropy(logits, labels)
    logits[1], logits[3] = np.nan, np.inf
    assert ops.cross_entropy(logits, labels) == expected


def test_no_rows_have_no_mean() -> None:
    assert np.isnan(ops.cross_entropy(np.zeros((0, 5)), np.zeros(0, int)))
    assert ops.cross_entropy(np.zeros((0, 5)), np.zeros(0, int), reduction="sum") == 0


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_labels_outside_the_classes_are_refused(bad: int) -> None:
    with pytest.raises(InputError, match=rf"labels: {bad} is outside 0\.\.4; use -100 for a position that does not"):
        ops.cross_entropy(np.zeros((3, 5)), np.array([0, bad, 1]))


@pytest.mark.parametrize("labels", [np.array([0.0, 1.0]), np.array([True, False])])
def test_labels_that_are_not_integers_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(InputError, match=f"labels: expected integers, found {labels.dtype}"):
        ops.cross_entropy(np.zeros((2, 5)), labels)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(InputError, match='reduction=\'max\' is not known; use "mean", "sum" or "none"'):
        ops.cross_entropy(np.zeros((2, 5)), np.zeros(2, int), reduction="max")


@given(seeds, scales)
@settings(max_examples=20)
def test_regression_and_multi_label_losses_equal_torch(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, target = scale * normal(rng, 3, 4), rng.random((3, 4))
    close(ops.mean_squared_error(x, target), F.mse_loss(tensor(x), tensor(target)))
    close(ops.binary_cross_entropy(x, target), F.binary_cross_entropy_with_logits(tensor(x), tensor(target)))


# ------------------------------------------------------------------------------------ what every operator has in common

q_, k_, table_ = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 2)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    # name -> (shapes of array arguments, or other values), keyword arguments
    "rms_norm": (((2, 5, 8), (8,), 1e-5), {}),
    "add_rms_norm": (((2, 5, 8), (2, 5, 8), (8,), 1e-5), {}),
    "layer_norm": (((2, 5, 8), (8,), (8,), 1e-5), {}),
    "add_layer_norm": (((2, 5, 8), (2, 5, 8), (8,), (8,), 1e-5), {}),
    "rope": ((q_, k_, table_, table_), {"interleaved": True}),
    "norm_rope": ((q_, k_, (4, 8), (2, 8), table_, table_, 1e-5), {"norm": "rms", "interleaved": False}),
    "rms_norm_qkv_rope": (
        ((2, 5, 8), (8,), (64, 8), (64,), table_, table_, 1e-5),
        {"num_heads": 4, "num_kv_heads": 2, "interleaved": True},
    ),
    "attention": ((q_, (2, 2, 9, 8), (2, 2, 9, 8)), {"return_lse": True}),
    "attention, masked": ((q_, (2, 2, 9, 8), (2, 2, 9, 8)), {"key_mask": "key_mask", "mask": "bias"}),
    "decode_attention": ((q_, (2, 2, 9, 8), (2, 2, 9, 8), "lengths"), {}),
    "softmax": (((2, 5, 8),), {}),
    "activation": (((2, 5, 8), "gelu"), {}),
    "glu": (((2, 5, 8), (2, 5, 8), "silu"), {}),
    "swiglu": (((2, 5, 8), (2, 5, 8)), {}),
    "relu2": (((2, 5, 8),), {}),
    "linear": (((2, 5, 8), (6, 8), (6,)), {}),
    "add": (((2, 5, 8), (2, 5, 8)), {}),
    "embedding": (("ids", (9, 8)), {}),
    "split_heads": (((2, 5, 8), 4), {}),
    "merge_heads": ((q_,), {}),
    "cross_entropy": (((6, 9), "labels"), {"reduction": "none"}),
    "linear_cross_entropy": (((6, 8), (9, 8), "labels"), {}),
    "mean_squared_error": (((2, 5), (2, 5)), {}),
    "binary_cross_entropy": (((2, 5), (2, 5)), {}),
}


def arguments(name: str, array: Callable[..., np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
    """The call of CALLS with `array(shape)` for each shape and fixed indices and masks for their names."""
    rng = np.random.default_rng(7)
    named = {
        "ids": np.array([[0, 8], [3, 3]]),
        "labels": np.array([0, 8, -100, 2, 3, 3]),
        "lengths": np.array([9, 3]),
        "key_mask": rng.random((2, 9)) < 0.6,
        "bias": normal(rng, 2, 4, 5, 9),
    }
    shapes, options = CALLS[name]
    values = [array(v) if isinstance(v, tuple) else named.get(v, v) if isinstance(v, str) else v for v in shapes]
    return values, {key: named.get(v, v) if isinstance(v, str) else v for key, v in options.items()}


def call(name: str, positional: list[Any], options: dict[str, Any], ar: Arithmetic = EXACT) -> Arrays:
    result = getattr(ops, name.split(",")[0])(*positional, **options, ar=ar)
    return result if isinstance(result, tuple) else (result,)


def test_every_operator_is_called_here() -> None:
    """The backward passes: tests/ops/test_backward.py."""
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and not name.endswith("_backward")}
    assert {name.split(",")[0] for name in CALLS} == functions


@pytest.mark.parametrize("ar", ARITHMETICS, ids=lambda ar: f"{ar.dtype}-{ar.policy.name}")
@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_never_modified_and_a_second_call_gives_the_same(name: str, ar: Arithmetic) -> None:
    """The inputs have the working dtype, so that no conversion makes a copy of them."""
    rng = np.random.default_rng(3)
    positional, options = arguments(name, lambda shape: normal(rng, *shape).astype(ar.work))
    arrays = [x for x in (*positional, *options.values()) if isinstance(x, np.ndarray)]
    before = [hashlib.sha256(x.tobytes()).digest() for x in arrays]
    first = [np.array(x) for x in call(name, positional, options, ar)]
    assert [hashlib.sha256(x.tobytes()).digest() for x in arrays] == before
    for a, b in zip(first, call(name, positional, options, ar), strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T).T


def _reversed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def _spread(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape[:-1], 3 * x.shape[-1] + 5), np.nan)
    wide[..., 2:-3:3] = x
    return wide[..., 2:-3:3]


def _backwards(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[::-1])[::-1]


@pytest.mark.parametrize("layout", [_transposed, _reversed, _spread, _backwards], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_any_strides_give_the_same_result(name: str, layout: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(5)
    positional, options = arguments(name, lambda shape: normal(rng, *shape))
    strided = [layout(x) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for x in positional]
    strided_options = {k: layout(x) if isinstance(x, np.ndarray) and k == "mask" else x for k, x in options.items()}
    for a, b in zip(call(name, strided, strided_options), call(name, positional, options), strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_expanded_arrays_of_stride_0_give_the_same_result(name: str) -> None:
    rng = np.random.default_rng(6)

    def expanded(shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(normal(rng, *(1 if axis == 0 else n for axis, n in enumerate(shape))), shape)

    positional, options = arguments(name, expanded)
    copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in positional]
    for a, b in zip(call(name, positional, options), call(name, copies, options), strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_called_plainly_an_operator_is_exact_whatever_its_inputs_are(name: str) -> None:
    """float32 inputs are taken as the float64 numbers that they are, and nothing is rounded afterwards."""
    rng = np.random.default_rng(8)
    positional, options = arguments(name, lambda shape: normal(rng, *shape).astype(np.float32))
    wide = [x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x for x in positional]
    for a, b in zip(call(name, positional, options), call(name, wide, options), strict=True):
        np.testing.assert_array_equal(a, b)
