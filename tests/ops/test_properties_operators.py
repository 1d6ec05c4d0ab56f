"""What holds for operators whatever the numbers are, on all three backends: definition, plain Torch, Triton."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import (
    DTYPES,
    LARGEST,
    NUMPY,
    PLAIN,
    Backend,
    Chosen,
    agree,
    for_every_backend,
    how_many,
    known_call,
    same,
    some_calls,
)

from refllm.inputs import to_numpy
from refllm.kernels import OPERATORS
from refllm.opcheck.inputs import row_alone, rows_of
from refllm.strategies import Call, kinds

NORMS = ("rms_norm", "layer_norm")
SUMS = ("add_rms_norm", "add_layer_norm")
dtypes, seeds = st.sampled_from(DTYPES), st.integers(0, 1000)


def eighths(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/8 up to 1: in every format, and their sums of products exact in any order."""
    return rng.integers(-8, 9, shape) / 8


def arrays_of(backend: Backend, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The arrays of a call; of a definition they are float64."""
    arguments, keywords = call.arrays()
    if backend.name == NUMPY:
        arguments = [np.float64(x) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x for x in arguments]
    return arguments, keywords


# ---------------------------------------------------------------------------------------------- what all definitions do


def quiet(operator: str) -> Any:
    """Calls of every kind without NaN, with two or more rows of a batch."""
    kept = [f for f in kinds(operator) if "NaN" not in f and "infinity" not in f and "subnormal" not in f]
    return some_calls(operator, *kept, where=lambda call: rows_of(call) > 1)


@pytest.mark.hypothesis
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_definition_treats_rows_alone(operator: str) -> None:
    """Of plain Torch and Triton, tests/kernels/test_operators.py asks that."""

    @how_many(5)
    @given(call=quiet(operator), data=st.data())
    def holds(call: Call, data: Any) -> None:
        backend = Backend(NUMPY, call.dtype)
        arguments, keywords = arrays_of(backend, call)
        keywords |= {"reduction": "none"} if "entropy" in operator else {}
        b = data.draw(st.integers(0, rows_of(call) - 1), "row")
        alone, options = row_alone(call, arguments, keywords, b)
        whole, one = backend(operator, *arguments, **keywords), backend(operator, *alone, **options)
        for x, y, sigma in zip(whole, one, backend.sigma(operator, *alone, **options), strict=True):
            agree(x[b : b + 1], y, sigma, sigma)

    holds()


# ---------------------------------------------------------------------------------------------------------------- norms


def normal(x: np.ndarray, dtype: str) -> np.ndarray:
    """Where x is 0 or a normal number of the format, which a power of two scales without rounding."""
    info, size = torch.finfo(getattr(torch, dtype)), np.abs(np.float64(x))
    return (size == 0) | ((info.smallest_normal <= size) & (size <= info.max))


norm_calls = st.one_of([some_calls(name, "plain", "outlier 10000") for name in NORMS])


@for_every_backend(call=norm_calls, factor=st.sampled_from([2.0, -0.5, 16.0]))
def test_at_eps_0_a_norm_does_not_see_the_scale(backend: Backend, call: Call, factor: float) -> None:
    """Powers of two scale without rounding, so to the last bit; a negative one turns the sign, as there is no bias."""
    (x, weight, *_), _ = arrays_of(backend, call)
    x[..., ::2] += 3  # no row is constant
    rest = [None, 0.0] if call.operator == "layer_norm" else [0.0]
    assume(call.operator != "layer_norm" or x.shape[-1] >= 3)
    assume(normal(factor * x, call.dtype).all())
    (a,), (b,) = (backend(call.operator, f * x, weight, *rest) for f in (1.0, factor))
    same(np.sign(factor) * a, b)


@for_every_backend(call=norm_calls)
def test_norms_are_linear_in_their_weight(backend: Backend, call: Call) -> None:
    (x, weight, *rest), _ = arrays_of(backend, call)
    rest = [None, rest[-1]] if call.operator == "layer_norm" else rest
    (a,), (b,) = (backend(call.operator, x, w, *rest) for w in (weight, -4 * weight))
    kept = normal(a, call.dtype) & normal(-4 * a, call.dtype)
    same((-4 * a)[kept], b[kept])


@for_every_backend(dtype=dtypes, seed=seeds, width=st.sampled_from([2, 17, 64, 129, 769]), shift=st.integers(-100, 100))
def test_layer_norm_does_not_see_a_shift(backend: Backend, dtype: str, seed: int, width: int, shift: int) -> None:
    """Of x and the shift on one grid, so that their sum is exact."""
    rng = np.random.default_rng(seed)
    x, weight, bias = eighths(rng, 3, width), eighths(rng, width), eighths(rng, width)
    x, shift = (np.round(x), np.float64(shift)) if dtype == "bfloat16" else (x, np.float64(shift))
    x[:, 0], x[:, 1] = 1, -1
    a, b = ((y, weight, bias, 0.01) for y in (x, x + shift))
    agree(*(backend("layer_norm", *c)[0] for c in (a, b)), *(backend.sigma("layer_norm", *c)[0] for c in (a, b)))


@for_every_backend(call=st.one_of([some_calls(name, "plain", "scale", "mean 1000") for name in SUMS]))
def test_the_residual_sum_is_symmetric_and_the_norm_is_that_of_the_sum(backend: Backend, call: Call) -> None:
    (x, residual, *rest), _ = arrays_of(backend, call)
    y, r = backend(call.operator, x, residual, *rest)
    for a, b in zip((y, r), backend(call.operator, residual, x, *rest), strict=True):
        same(a, b)
    (z,) = backend(call.operator.removeprefix("add_"), r, *rest)
    (sigma,) = backend.sigma(call.operator.removeprefix("add_"), r, *rest)
    agree(y, z, sigma, sigma)


# ------------------------------------------------------------------------------------------------------------ rotations

ropes = some_calls("rope", "plain", "scale", "far positions", "positions in any order", "tables end at R")
PARTIAL = [{"call": known_call("rope", f"partial rotation{pairing}")} for pairing in ("", ", interleaved")]


@for_every_backend(call=ropes, known=PARTIAL)
def test_a_rotation_keeps_the_length_of_every_pair_and_the_opposite_one_undoes_it(backend: Backend, call: Call) -> None:
    """Up to the rounding of cos and sin, which the arrays of a narrow dtype have on all backends."""
    (q, k, cos, sin), keywords = arrays_of(backend, call)
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23}[call.dtype]
    turned = backend("rope", q, k, cos, sin, **keywords)
    back = backend("rope", *turned, cos, -sin, **keywords)
    for x, y, z in zip((q, k), turned, back, strict=True):
        size = np.linalg.norm(np.float64(x), axis=-1)
        assert (np.abs(np.linalg.norm(np.float64(y), axis=-1) - size) <= 4 * unit * size).all()
        assert (np.linalg.norm(np.float64(z) - x, axis=-1) <= 6 * unit * size).all()


@for_every_backend(call=ropes, known=PARTIAL)
def test_interleaved_and_half_split_are_one_up_to_the_order_of_dims(backend: Backend, call: Call) -> None:
    (q, k, cos, sin), _ = arrays_of(backend, call)
    R, D = 2 * cos.shape[-1], q.shape[-1]
    order = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2), np.arange(R, D)])  # pairs (2i, 2i+1) to (i, i+R/2)
    interleaved = backend("rope", q, k, cos, sin, interleaved=True)
    half_split = backend("rope", q[..., order], k[..., order], cos, sin, interleaved=False)
    assert len(interleaved) == len(half_split) == 2
    for a, b in zip(interleaved, half_split, strict=True):
        same(a[..., order], b)


@for_every_backend(call=ropes, known=PARTIAL)
def test_q_and_k_are_rotated_alike_and_what_is_past_r_not_at_all(backend: Backend, call: Call) -> None:
    (q, k, cos, sin), keywords = arrays_of(backend, call)
    found, swapped = backend("rope", q, k, cos, sin, **keywords), backend("rope", k, q, cos, sin, **keywords)
    for x, a, b in zip((q, k), found, swapped[::-1], strict=True):
        same(a, b)
        same(a[..., 2 * cos.shape[-1] :], x[..., 2 * cos.shape[-1] :])


@for_every_backend(call=ropes, known=PARTIAL)
def test_an_angle_of_0_changes_nothing(backend: Backend, call: Call) -> None:
    (q, k, cos, sin), keywords = arrays_of(backend, call)
    for x, y in zip((q, k), backend("rope", q, k, np.ones_like(cos), np.zeros_like(sin), **keywords), strict=True):
        same(x, y)


@for_every_backend(
    dtype=st.just("float32"),
    seed=seeds,
    interleaved=st.booleans(),
    at=st.integers(0, 3000),
    shift=st.integers(1, 3000),
    known=[
        {"dtype": "float32", "seed": 1, "interleaved": pairing, "at": 7, "shift": 1000} for pairing in (False, True)
    ],
)
def test_scores_depend_on_relative_positions_only(
    backend: Backend, dtype: str, seed: int, interleaved: bool, at: int, shift: int
) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, 5, 16)), rng.standard_normal((2, 1, 5, 16))
    frequencies, scores = 1e4 ** -np.linspace(0, 1, 8), []
    for start in (at, at + shift):
        angle = (start + np.arange(5))[:, None] * frequencies
        turned = [np.float64(x) for x in backend("rope", q, k, np.cos(angle), np.sin(angle), interleaved=interleaved)]
        scores.append(turned[0] @ turned[1].swapaxes(-1, -2))
    unit = 2.0**-23 if backend.name != NUMPY else 2.0**-40  # of tables at angles of thousands, float64 has that left
    agree(*scores, 4 * unit * np.linalg.norm(q, axis=-1)[..., None] * np.linalg.norm(k, axis=-1)[..., None, :])


@for_every_backend(
    call=some_calls("norm_rope", "plain", "scale", "positions in any order"),
    known=[{"call": known_call("norm_rope", f"partial rotation{pairing}")} for pairing in ("", ", interleaved")],
)
def test_norm_rope_is_the_norm_and_then_the_rotation(backend: Backend, call: Call) -> None:
    (q, k, q_weight, k_weight, cos, sin, eps), keywords = arrays_of(backend, call)
    norm, normed = keywords.pop("norm"), []
    for x, weight in ((q, q_weight), (k, k_weight)):
        heads = [
            backend(f"{norm}_norm", x[:, h], weight[h], *([None, eps] if norm == "layer" else [eps]))[0]
            for h in range(x.shape[1])
        ]
        normed.append(np.stack(heads, axis=1))
    expected = backend("rope", *normed, cos, sin, **keywords)
    found = backend("norm_rope", q, k, q_weight, k_weight, cos, sin, eps, norm=norm, **keywords)
    sigmas = backend.sigma("norm_rope", q, k, q_weight, k_weight, cos, sin, eps, norm=norm, **keywords)
    for a, b, sigma in zip(found, expected, sigmas, strict=True):
        agree(a, b, sigma, sigma)


@for_every_backend(call=some_calls("rms_norm_qkv_rope", "plain", "mean 1000", "positions in any order"), interpreted=3)
def test_projected_heads_are_the_products_of_the_normed_rows(backend: Backend, call: Call) -> None:
    """At angle 0: every output is a row of the weight matrix with the norm of x, in its own head and dim."""
    (x, norm_weight, w_qkv, bias, cos, sin, eps), keywords = arrays_of(backend, call)
    straight = np.ones_like(cos), np.zeros_like(sin)
    q, k, v = backend("rms_norm_qkv_rope", x, norm_weight, w_qkv, bias, *straight, eps, **keywords)
    (y,) = backend("rms_norm", x, norm_weight, eps)
    product = np.float64(y) @ np.float64(w_qkv).T + (0 if bias is None else np.float64(bias))
    B, S, _ = x.shape
    found = np.concatenate([q, k, v], axis=1).transpose(0, 2, 1, 3).reshape(B, S, -1)
    sigmas = backend.sigma("rms_norm_qkv_rope", x, norm_weight, w_qkv, bias, *straight, eps, **keywords)
    agree(found, product, np.concatenate(sigmas, axis=1).transpose(0, 2, 1, 3).reshape(B, S, -1))


# ------------------------------------------------------------------------------------------------------------ attention

SEEN = ("plain", "scale", "near ties", "huge logits", "q is 0", "equal logits")
attentions = some_calls("attention", *SEEN)
unmasked = some_calls("attention", *SEEN, where=lambda c: "key_mask" not in dict(c.keywords))


def attention(backend: Backend, *qkv: np.ndarray, **keywords: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(o, sigma of o), (lse, sigma of lse)]."""
    keywords = keywords | {"return_lse": True}
    return list(zip(backend("attention", *qkv, **keywords), backend.sigma("attention", *qkv, **keywords), strict=True))


def all_agree(found: list[tuple[np.ndarray, np.ndarray]], expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert expected
    for (a, s), (b, t) in zip(found, expected, strict=True):
        agree(a, b, s, t)


@for_every_backend(
    call=unmasked, seed=seeds, known=[{"call": known_call("attention", "257 keys, head dim 160"), "seed": 1}]
)
def test_the_order_of_keys_does_not_matter_without_a_mask(backend: Backend, call: Call, seed: int) -> None:
    (q, k, v), keywords = arrays_of(backend, call)
    keywords["causal"] = False
    order = np.random.default_rng(seed).permutation(k.shape[2])
    all_agree(
        attention(backend, q, k, v, **keywords), attention(backend, q, k[:, :, order], v[:, :, order], **keywords)
    )


@for_every_backend(call=attentions)
def test_grouped_heads_are_repeated_keys_and_values(backend: Backend, call: Call) -> None:
    """Query head j reads key/value head j // (H / K): four heads, two groups, made of the call's first ones."""
    (q, k, v), keywords = arrays_of(backend, call)
    q = np.concatenate([q[:, :1], -q[:, :1], q[:, :1, :, ::-1], q[:, -1:]], axis=1)
    k, v = (np.concatenate([x[:, :1], x[:, -1:, :, ::-1]], axis=1) for x in (k, v))
    repeated = (np.repeat(x, 2, axis=1) for x in (k, v))
    all_agree(attention(backend, q, k, v, **keywords), attention(backend, q, *repeated, **keywords))


@for_every_backend(call=attentions, seed=seeds)
def test_uniform_values_come_out_as_they_are(backend: Backend, call: Call, seed: int) -> None:
    (q, k, v), keywords = arrays_of(backend, call)
    v = np.broadcast_to(v[:, :, :1], v.shape).copy()
    (o, sigma), (lse, _) = attention(backend, q, k, v, **keywords)
    expected = np.repeat(v[:, :, :1], q.shape[1] // k.shape[1], axis=1)
    # The additions of equal numbers round alike; together at most by one rounding each.
    together = v.shape[2] * (2.0**-53 if backend.name == NUMPY else 2.0**-24) * np.abs(expected)
    agree(o, np.where(np.isneginf(lse)[..., None], 0, expected), sigma, together / LARGEST)


@for_every_backend(call=attentions)
def test_a_query_of_0_gives_the_mean_of_what_it_sees(backend: Backend, call: Call) -> None:
    (q, k, v), keywords = arrays_of(backend, call)
    (o, sigma), (lse, s) = attention(backend, 0 * q, k, v, **keywords)
    (B, H, S, _), T = q.shape, k.shape[2]
    sees = np.ones((B, 1, S, T), bool)
    if keywords.get("causal", True):
        sees &= np.arange(T) <= np.arange(S)[:, None] + T - S
    if "key_mask" in keywords:
        sees &= keywords["key_mask"][:, None, None]
    count = sees.sum(-1)[..., None]
    values = np.repeat(np.float64(v), H // v.shape[1], axis=1)
    agree(o, sees @ values / np.maximum(count, 1), sigma)
    with np.errstate(divide="ignore"):
        agree(lse, np.broadcast_to(np.log(count[..., 0]), lse.shape), s)


@for_every_backend(
    dtype=dtypes, seed=seeds, shift=st.sampled_from([-100352.0, 1024.0]), T=st.sampled_from([1, 7, 40, 130]),
    known=[{"dtype": "bfloat16", "seed": 1, "shift": -100352.0, "T": 130}],
)  # fmt: skip
def test_a_shift_of_all_scores_shifts_only_the_lse(
    backend: Backend, dtype: str, seed: int, shift: float, T: int
) -> None:
    """Through one more dim, in which all queries hold 256 and all keys the same number."""
    rng = np.random.default_rng(seed)
    q, k, v = eighths(rng, 2, 2, 3, 16), eighths(rng, 2, 1, T, 16), rng.standard_normal((2, 1, T, 16)) + 0.5
    v = np.float64(to_numpy(backend.tensor(v)))
    q[..., 0], k[..., 0] = 256, 0
    plain = attention(backend, q, k, v, scale=1.0, causal=False)
    k[..., 0] = shift / 256
    (o, sigma), (lse, s) = attention(backend, q, k, v, scale=1.0, causal=False)
    agree(o, plain[0][0], sigma, plain[0][1])
    agree(lse - shift, plain[1][0], s, plain[1][1])


@for_every_backend(
    call=some_calls("attention", "plain", where=lambda c: c.arguments[0].shape[2] > 1),
    data=st.data(),
    known=[{"call": known_call("attention", "a tile and one, head dim 80"), "data": Chosen(first=60, last=128)}],
)
def test_an_earlier_query_is_what_it_is_without_the_later_ones(backend: Backend, call: Call, data: Any) -> None:
    """Causal prefix, and chunked prefill for any split: queries a .. b with the keys up to theirs."""
    (q, k, v), keywords = arrays_of(backend, call)
    S, T = q.shape[2], k.shape[2]
    keywords["causal"] = True
    a = data.draw(st.integers(0, S - 1), "first")
    b = data.draw(st.integers(a + 1, S), "last")
    seen = max(0, T - S + b)
    part = {name: x[:, :seen] if name == "key_mask" else x for name, x in keywords.items()}
    chunk = attention(backend, q[:, :, a:b], k[:, :, :seen], v[:, :, :seen], **part)
    whole = [(x[:, :, a:b], s[:, :, a:b]) for x, s in attention(backend, q, k, v, **keywords)]
    all_agree(chunk, whole)


@for_every_backend(
    call=some_calls("attention", *SEEN, where=lambda c: c.arguments[1].shape[2] > 1),
    data=st.data(),
    known=[{"call": known_call("attention", "257 keys, head dim 160"), "data": Chosen(split=128)}],
)
def test_parts_of_the_keys_merge_by_their_lse(backend: Backend, call: Call, data: Any) -> None:
    """What a kernel that splits the keys relies on: the number of splits is irrelevant."""
    (q, k, v), keywords = arrays_of(backend, call)
    keywords["causal"], T = False, k.shape[2]
    at = data.draw(st.integers(1, T - 1), "split")
    parts = []
    for keys in (slice(0, at), slice(at, T)):
        part = {name: x[:, keys] if name == "key_mask" else x for name, x in keywords.items()}
        parts.append(attention(backend, q, k[:, :, keys], v[:, :, keys], **part))
    (o, sigma), (lse, s) = attention(backend, q, k, v, **keywords)
    merged = np.logaddexp(*(np.float64(part[1][0]) for part in parts))
    # An error of the lse of a part is a relative error of its weight.
    with np.errstate(invalid="ignore"):
        weights = [np.exp(np.nan_to_num(part[1][0] - merged, nan=-np.inf))[..., None] for part in parts]
    average = sum(weight * part[0][0] for weight, part in zip(weights, parts, strict=True))
    errors = [weight * part[0][1] for weight, part in zip(weights, parts, strict=True)]
    largest = np.abs(np.float64(v)).max()
    errors += [weight * part[1][1][..., None] * largest for weight, part in zip(weights, parts, strict=True)]
    agree(lse, merged, s, *(part[1][1] for part in parts))
    agree(o, average, sigma, *errors)


@for_every_backend(call=some_calls("attention", "plain", "scale", "huge logits"), seed=seeds)
def test_masked_keys_are_as_if_they_were_not_there(backend: Backend, call: Call, seed: int) -> None:
    """Left, right and any other padding are the same as none."""
    (q, k, v), keywords = arrays_of(backend, call)
    keywords.pop("key_mask", None)
    keywords["causal"] = False
    T, rng = k.shape[2], np.random.default_rng(seed)
    kept = np.sort(rng.permutation(T)[: rng.integers(1, T + 1)])
    mask = np.zeros((len(q), T), bool)
    mask[:, kept] = True
    k_padded, v_padded = (np.where(mask[:, None, :, None], x, np.nan) for x in (k, v))
    padded = attention(backend, q, k_padded, v_padded, key_mask=mask, **keywords)
    if backend.dtype == "float64":  # the prediction is that of clean values
        padded = [(x, s) for (x, _), (_, s) in zip(padded, attention(backend, q, k, v, **keywords), strict=True)]
    all_agree(padded, attention(backend, q, k[:, :, kept], v[:, :, kept], **keywords))


@for_every_backend(call=attentions)
def test_attention_is_linear_in_values_and_sees_only_the_product_of_scale_and_query(
    backend: Backend, call: Call
) -> None:
    """To the last bit, because the factors are powers of two."""
    (q, k, v), keywords = arrays_of(backend, call)
    scale = keywords.pop("scale", None) or q.shape[-1] ** -0.5
    keywords |= {"return_lse": True}
    o, lse = backend("attention", q, k, v, scale=scale, **keywords)
    for factor, times in ((2.0, 1.0), (1.0, -4.0)):
        p, lse_p = backend("attention", q * factor, k, v * times, scale=scale / factor, **keywords)
        normal = (np.abs(o) > 1e-3) & (np.abs(o) < 1e4) if backend.dtype == "float16" else np.ones(o.shape, bool)
        same((times * o)[normal], p[normal])
        same(lse, lse_p)


decodes = some_calls("decode_attention", *SEEN, "slots past the length hold NaN", "slots past the length hold 10000")
LONG = known_call("decode_attention", "1025 slots")
"""A cache of several chunks, some of which hold nothing of a sequence."""
WIDER = (300, 3072)
"""Slots more: another chunk, and so many that they are not added up at once."""


def test_the_long_cache_is_split_and_a_wider_one_into_more_chunks_than_are_added_at_once() -> None:
    decoding = pytest.importorskip("refllm.kernels.triton.decode_attention")
    slots = [LONG.arguments[1].shape[2] + more for more in (0, *WIDER)]
    chunks = [-(-n // decoding.CHUNK) for n in slots]
    assert 2 < chunks[0] < chunks[1] <= decoding.COMBINED < chunks[2]


@for_every_backend(call=decodes, known=[{"call": LONG}])
def test_decoding_is_attention_over_the_filled_slots(backend: Backend, call: Call) -> None:
    (q, k, v, lengths), keywords = arrays_of(backend, call)
    (o,) = backend("decode_attention", q, k, v, lengths, **keywords)
    assert len(o) == len(lengths) > 0
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        (p, sigma), _ = attention(backend, q[one], k[one, :, :length], v[one, :, :length], **keywords)
        agree(o[one], p, sigma, sigma)


@for_every_backend(
    call=decodes, more=st.sampled_from([1, 63, 300]), known=[{"call": LONG, "more": more} for more in WIDER]
)
def test_slots_that_are_not_filled_change_no_bit(backend: Backend, call: Call, more: int) -> None:
    """The same cache with room for more: the number of splits may depend on it, the result may not."""
    (q, k, v, lengths), keywords = arrays_of(backend, call)
    wider = [np.concatenate([x, np.full((*x.shape[:2], more, x.shape[3]), np.nan, x.dtype)], axis=2) for x in (k, v)]
    (a,), (b,) = (backend("decode_attention", q, *cache, lengths, **keywords) for cache in ((k, v), wider))
    (sigma,) = backend.sigma("decode_attention", q, k, v, lengths, **keywords)
    same(a, b) if backend.name != PLAIN else agree(a, b, sigma, sigma)


# ---------------------------------------------------------------------------------------------------------- activations


@for_every_backend(
    call=st.one_of([some_calls(name, "plain", "scale", "outlier 10000") for name in ("swiglu", "relu2")])
)
def test_activations_know_no_neighbours(backend: Backend, call: Call) -> None:
    """As one row, and with the elements in another order: the same numbers, of Triton the same bits."""
    arguments, _ = arrays_of(backend, call)
    (y,), (sigma,) = backend(call.operator, *arguments), backend.sigma(call.operator, *arguments)
    order = np.random.default_rng(0).permutation(y.size)
    (z,) = backend(call.operator, *(x.reshape(-1)[order] for x in arguments))
    error = 0 if backend.name == "triton" else sigma.reshape(-1)[order]
    agree(y.reshape(-1)[order], z, error, error)


@for_every_backend(call=some_calls("swiglu", "plain", "scale", "large gates"))
def test_swiglu_is_linear_in_up_and_its_gates_of_both_signs_add_up(backend: Backend, call: Call) -> None:
    """silu(g) - silu(-g) = g."""
    (gate, up), _ = arrays_of(backend, call)
    (y,), (turned,), (z,) = (backend("swiglu", g, u) for g, u in ((gate, up), (gate, -up), (-gate, up)))
    same(y, -turned)
    (s,), (t,) = (backend.sigma("swiglu", g, up) for g in (gate, -gate))
    agree(np.float64(y) - np.float64(z), np.float64(gate) * up, s, t, np.abs(np.float64(gate) * up) * 2.0**-52)


@for_every_backend(call=some_calls("relu2", "plain", "scale"))
def test_relu2_is_0_below_0_and_grows_with_the_square(backend: Backend, call: Call) -> None:
    (x,), _ = arrays_of(backend, call)
    (y,), (negative,), (double,) = (backend("relu2", z) for z in (x, -np.abs(x), 2 * x))
    assert not negative.any()
    normal = (y > 1e-3) & (y < 1e4) if backend.dtype == "float16" else np.ones(y.shape, bool)
    same(4 * y[normal], double[normal])
    same(y, backend("relu2", np.maximum(x, 0))[0])


# --------------------------------------------------------------------------------------------------------------- losses

LOSSES = ("plain", "scale", "near ties", "confident rows", "equal logits")
losses = st.one_of([some_calls(name, *LOSSES) for name in ("cross_entropy", "linear_cross_entropy")])


@for_every_backend(call=losses, data=st.data())
def test_sums_and_means_are_those_of_the_rows_that_count(backend: Backend, call: Call, data: Any) -> None:
    """And a row that is ignored is as if it were not there."""
    (*rows, labels), _ = arrays_of(backend, call)
    N = len(labels)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=N, max_size=N), "kept"))
    labels = np.where(kept, labels, -100)
    keywords: dict[str, Any] = {"reduction": "none"}
    (each,) = backend(call.operator, *rows, labels, **keywords)
    (sigma,) = backend.sigma(call.operator, *rows, labels, **keywords)
    assert not each[~kept].any()
    total, spread = np.float64(each).sum(), np.sqrt(np.sum(sigma**2))
    (found,) = backend(call.operator, *rows, labels, reduction="sum")
    (s,) = backend.sigma(call.operator, *rows, labels, reduction="sum")
    agree(found, np.float64(total), s, spread)
    (mean,) = backend(call.operator, *rows, labels)
    if not kept.any():
        assert np.isnan(mean)
        return
    agree(mean, np.float64(total / kept.sum()), s / kept.sum(), spread / kept.sum())
    without = [rows[0][kept], *rows[1:]]
    (alone,) = backend(call.operator, *without, labels[kept])
    (t,) = backend.sigma(call.operator, *without, labels[kept])
    agree(mean, alone, s / kept.sum(), t)


@for_every_backend(dtype=dtypes, seed=seeds, shift=st.integers(-64, 64), V=st.sampled_from([1, 2, 33, 129, 1025]))
def test_a_loss_does_not_see_a_shift_of_its_logits(backend: Backend, dtype: str, seed: int, shift: int, V: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.integers(-8, 9, (4, V)).astype(np.float64), rng.integers(0, V, 4)
    a, b = ((x, labels) for x in (logits, logits + shift))
    agree(
        *(backend("cross_entropy", *c, reduction="none")[0] for c in (a, b)),
        *(backend.sigma("cross_entropy", *c, reduction="none")[0] for c in (a, b)),
    )


@for_every_backend(call=losses, seed=seeds)
def test_the_order_of_classes_does_not_matter(backend: Backend, call: Call, seed: int) -> None:
    (*rows, labels), _ = arrays_of(backend, call)
    V = rows[-1].shape[0 if call.operator.startswith("linear") else 1]
    order = np.random.default_rng(seed).permutation(V)
    moved = [*rows[:-1], rows[-1][order] if call.operator.startswith("linear") else rows[-1][:, order]]
    place = np.argsort(order)
    new_labels = np.where(labels >= 0, place[np.maximum(labels, 0)], labels)
    keywords: dict[str, Any] = {"reduction": "none"}
    (a,), (b,) = (
        backend(call.operator, *rows, labels, **keywords),
        backend(call.operator, *moved, new_labels, **keywords),
    )
    (s,) = backend.sigma(call.operator, *rows, labels, **keywords)
    agree(a, b, s, s)


@for_every_backend(call=some_calls("cross_entropy", "plain", "scale"))
def test_probabilities_of_all_classes_add_up_to_1(backend: Backend, call: Call) -> None:
    """e^-loss, summed over the labels that a row could have."""
    (logits, _), _ = arrays_of(backend, call)
    row = logits[:1, :64]
    V = row.shape[1]
    rows, labels = np.repeat(row, V, axis=0), np.arange(V)
    (loss,) = backend("cross_entropy", rows, labels, reduction="none")
    (sigma,) = backend.sigma("cross_entropy", rows, labels, reduction="none")
    p = np.exp(-np.float64(loss))
    agree(p.sum()[None], np.ones(1), np.sum(p * sigma), 2.0**-50)
