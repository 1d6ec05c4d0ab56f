"""The law of every split: the parts together are the whole, forward and backward, in float64 to 1e-12.

Sizes are drawn so that ranks do not divide them, and some ranks hold nothing.
"""

from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm import ops, split
from refllm.errors import InputError
from refllm.precision.arithmetic import rounding

RANKS = st.integers(1, 8)
SEEDS = st.integers(0, 2**32 - 1)


def assert_close(found: Any, whole: Any, *, what: str = "") -> None:
    found, whole = np.asarray(found), np.asarray(whole)
    assert found.shape == whole.shape, what
    assert np.array_equal(np.isnan(found), np.isnan(whole)), what  # the mean of no tokens
    found, whole = np.nan_to_num(found), np.nan_to_num(whole)
    assert np.abs(found - whole).max(initial=0) <= 1e-12 * max(1, np.abs(whole).max(initial=0)), what


@given(RANKS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.booleans(), SEEDS)
def test_a_product_split_by_its_outputs(ranks: int, O: int, I: int, N: int, biased: bool, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    x, w, dy = rng.normal(size=(N, I)), rng.normal(size=(O, I)), rng.normal(size=(N, O))
    b = rng.normal(size=O) if biased else None
    weights, biases = split.cut(w, ranks), None if b is None else split.cut(b, ranks)
    y = split.column_parallel_linear(x, weights, biases)
    assert_close(np.concatenate(y, axis=-1), ops.linear(x, w, b))
    dx, dw, db = split.column_parallel_linear_backward(split.cut(dy, ranks, -1), x, weights, biases)
    whole = ops.linear_backward(dy, x, w, b)
    assert_close(dx, whole[0])
    assert_close(np.concatenate(dw), whole[1])
    assert (db is None) == (b is None)
    if db is not None:
        assert_close(np.concatenate(db), whole[2])


@given(RANKS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.booleans(), SEEDS)
def test_a_product_split_by_its_inputs(ranks: int, O: int, I: int, N: int, biased: bool, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    x, w, dy = rng.normal(size=(N, I)), rng.normal(size=(O, I)), rng.normal(size=(N, O))
    b = rng.normal(size=O) if biased else None
    xs, weights = split.cut(x, ranks, -1), split.cut(w, ranks, 1)
    assert_close(split.row_parallel_linear(xs, weights, b), ops.linear(x, w, b))
    dx, dw, db = split.row_parallel_linear_backward(dy, xs, weights, b)
    whole = ops.linear_backward(dy, x, w, b)
    assert_close(np.concatenate(dx, axis=-1), whole[0])
    assert_close(np.concatenate(dw, axis=1), whole[1])
    assert (db is None) == (b is None)
    if db is not None:
        assert_close(db, whole[2])


GROUPS = st.sampled_from([(1, 8, 1), (2, 8, 2), (2, 4, 4), (4, 8, 2), (8, 8, 2), (4, 4, 1), (3, 6, 3), (6, 12, 3)])
"""(ranks, query heads, key/value heads): ranks fewer than key/value heads, as many, and more."""


@settings(max_examples=examples(40, 200))
@given(GROUPS, st.integers(1, 3), SEEDS)
def test_a_layer_split_over_its_heads(sizes: tuple[int, int, int], D: int, seed: int) -> None:
    """From the fused projection through attention to the projection back, with what every weight learns."""
    ranks, H, K = sizes
    rng, (B, S, E) = np.random.default_rng(seed), (2, 4, 5)
    x, w = rng.normal(size=(B, S, E)), rng.normal(size=((H + 2 * K) * D, E))
    w_out, dy = rng.normal(size=(E, H * D)), rng.normal(size=(B, S, E))

    def heads(qkv: np.ndarray, h: int, k: int) -> list[np.ndarray]:
        parts = np.split(qkv, [h * D, (h + k) * D], axis=-1)
        return [ops.split_heads(part, n) for part, n in zip(parts, (h, k, k), strict=True)]

    q, k, v = heads(ops.linear(x, w), H, K)
    o = ops.attention(q, k, v)
    y = ops.linear(ops.merge_heads(o), w_out)
    do, dw_out, _ = ops.linear_backward(dy, ops.merge_heads(o), w_out)
    dqkv = ops.attention_backward(ops.split_heads(do, H), q, k, v)
    dx, dw, _ = ops.linear_backward(np.concatenate([ops.merge_heads(part) for part in dqkv], -1), x, w)

    weights, outs = split.cut_qkv(w, ranks, H, K), split.cut(w_out, ranks, 1)
    local = H // ranks, max(1, K // ranks)
    q_P, k_P, v_P = zip(*(heads(part, *local) for part in split.column_parallel_linear(x, weights)), strict=True)
    assert_close(np.concatenate(split.cut_heads(q, ranks, H, K, keys=False), 1), np.concatenate(q_P, 1))
    assert_close(np.concatenate(split.cut_heads(k, ranks, H, K, keys=True), 1), np.concatenate(k_P, 1))
    rows = [ops.merge_heads(part) for part in split.head_parallel_attention(q_P, k_P, v_P)]
    assert_close(split.row_parallel_linear(rows, outs), y)
    drows, douts, _ = split.row_parallel_linear_backward(dy, rows, outs)
    assert_close(np.concatenate(douts, 1), dw_out)
    do_P = [ops.split_heads(part, local[0]) for part in drows]
    dq_P, dk, dv = split.head_parallel_attention_backward(do_P, q_P, k_P, v_P, K)
    assert_close(np.concatenate(dq_P, 1), dqkv[0])
    assert_close(dk, dqkv[1])
    assert_close(dv, dqkv[2])
    own = [ops.attention_backward(d, *qkv) for d, *qkv in zip(do_P, q_P, k_P, v_P, strict=True)]
    dqkv_P = [np.concatenate([ops.merge_heads(part) for part in grads], -1) for grads in own]
    dx_split, dw_P, _ = split.column_parallel_linear_backward(dqkv_P, x, weights)
    assert_close(dx_split, dx)
    assert_close(split.cut_qkv_backward(dw_P, H, K), dw)


def test_heads_that_do_not_divide_are_refused() -> None:
    for ranks, H, K in ((3, 8, 2), (4, 12, 3), (2, 7, 2)):
        with pytest.raises(InputError, match=f"{H} query heads over {K} key/value heads cannot be split over {ranks}"):
            split.heads_of_rank(0, ranks, H, K)


@given(RANKS, st.integers(1, 9), SEEDS)
def test_a_fused_gate_and_up_keeps_its_pairs(ranks: int, F: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(3, 4)), rng.normal(size=(2 * F, 4))
    found = [ops.swiglu(*np.split(y, 2, -1)) for y in split.column_parallel_linear(x, split.cut_gate_up(w, ranks))]
    assert_close(np.concatenate(found, -1), ops.swiglu(*np.split(ops.linear(x, w), 2, -1)))


@given(RANKS, st.integers(1, 12), st.integers(0, 9), SEEDS)
def test_an_embedding_split_over_the_vocabulary(ranks: int, V: int, N: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, w, dy = rng.integers(0, V, (2, N)), rng.normal(size=(V, 3)), rng.normal(size=(2, N, 3))
    weights = split.cut(w, ranks)
    assert_close(split.vocabulary_parallel_embedding(ids, weights), ops.embedding(ids, w))
    assert_close(np.concatenate(split.vocabulary_parallel_embedding_backward(dy, ids, weights)),
                 ops.embedding_backward(dy, ids, w))  # fmt: skip


@given(RANKS, st.integers(1, 12), st.integers(0, 6), st.integers(0, 3), st.sampled_from(["mean", "sum", "none"]), SEEDS)
def test_cross_entropy_split_over_the_vocabulary(
    ranks: int, V: int, N: int, padding: int, reduction: str, seed: int
) -> None:
    """Logits are large, so that an exponential that is not shifted overflows; padded columns hold larger ones still."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, V)) * 300
    labels = np.where(rng.random(N) < 0.3, -100, rng.integers(0, V, N))
    filled = np.concatenate([logits, np.full((N, padding), 1e4)], axis=1)
    parts, how = split.cut(filled, ranks, 1), {"vocabulary": V if padding else None, "reduction": reduction}
    assert_close(split.vocabulary_parallel_cross_entropy(parts, labels, **how),
                 ops.cross_entropy(logits, labels, reduction=reduction))  # fmt: skip
    dloss = rng.normal(size=N) if reduction == "none" else np.float64(rng.normal())
    found = np.concatenate(split.vocabulary_parallel_cross_entropy_backward(dloss, parts, labels, **how), axis=1)
    assert_close(found[:, :V], ops.cross_entropy_backward(dloss, logits, labels, reduction=reduction))
    assert_close(found[:, V:], np.zeros((N, padding)))


@given(RANKS, st.integers(0, 12), SEEDS)
def test_the_loss_of_tokens_on_many_ranks_is_that_of_all(ranks: int, N: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(N, 5)), np.where(rng.random(N) < 0.4, -100, rng.integers(0, 5, N))
    z, y = split.cut(logits, ranks), split.cut(labels, ranks)
    assert_close(split.data_parallel_cross_entropy(z, y), ops.cross_entropy(logits, labels))
    assert_close(np.concatenate(split.data_parallel_cross_entropy_backward(np.float64(2), z, y)),
                 ops.cross_entropy_backward(np.float64(2), logits, labels))  # fmt: skip


@given(RANKS, st.integers(0, 9), st.booleans(), SEEDS)
def test_norms_of_rows_on_many_ranks(ranks: int, N: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy, w, b = (rng.normal(size=shape) for shape in ((N, 6), (N, 6), 6, 6))
    xs, dys, bias = split.cut(x, ranks), split.cut(dy, ranks), b if biased else None
    assert_close(np.concatenate(split.sequence_parallel_rms_norm(xs, w, 1e-5)), ops.rms_norm(x, w, 1e-5))
    dx_P, dw = split.sequence_parallel_rms_norm_backward(dys, xs, w, 1e-5)
    for found, whole in zip((np.concatenate(dx_P), dw), ops.rms_norm_backward(dy, x, w, 1e-5), strict=True):
        assert_close(found, whole)
    y = np.concatenate(split.sequence_parallel_layer_norm(xs, w, bias, 1e-5))
    assert_close(y, ops.layer_norm(x, w, bias, 1e-5))
    dx_P, dw, db = split.sequence_parallel_layer_norm_backward(dys, xs, w, bias, 1e-5)
    whole_dx, whole_dw, whole_db = ops.layer_norm_backward(dy, x, w, bias, 1e-5)
    assert_close(np.concatenate(dx_P), whole_dx)
    assert_close(dw, whole_dw)
    assert (db is None) == (whole_db is None)
    if db is not None:
        assert_close(db, whole_db)


@given(RANKS, st.sampled_from(["rms", "layer"]), SEEDS)
def test_norms_of_heads_on_many_ranks(ranks: int, norm: str, seed: int) -> None:
    rng, H, D = np.random.default_rng(seed), 9, 4
    x, dy, w = rng.normal(size=(2, H, 3, D)), rng.normal(size=(2, H, 3, D)), rng.normal(size=(H, D))
    xs, dys, ws = split.cut(x, ranks, 1), split.cut(dy, ranks, 1), split.cut(w, ranks)
    w_H1D = w[:, None]
    whole = ops.rms_norm(x, w_H1D, 1e-5) if norm == "rms" else ops.layer_norm(x, w_H1D, None, 1e-5)
    assert_close(np.concatenate(split.head_parallel_norm(xs, ws, 1e-5, norm=norm), 1), whole)
    back = (ops.rms_norm_backward(dy, x, w_H1D, 1e-5) if norm == "rms"
            else ops.layer_norm_backward(dy, x, w_H1D, None, 1e-5))  # fmt: skip
    dx_P, dw_P = split.head_parallel_norm_backward(dys, xs, ws, 1e-5, norm=norm)
    assert_close(np.concatenate(dx_P, 1), back[0])
    assert_close(np.concatenate(dw_P), back[1][:, 0])


@settings(max_examples=examples(40, 200))
@given(RANKS, st.integers(1, 13), st.sampled_from(["contiguous", "zigzag"]), st.booleans(), st.booleans(), SEEDS)
def test_attention_over_positions_on_many_ranks(
    ranks: int, S: int, order: str, causal: bool, packed: bool, seed: int
) -> None:
    """Of lengths that ranks do not divide, of packed documents, with scores so large that e^lse overflows."""
    rng = np.random.default_rng(seed)
    (B, H, K, D), scale = (2, 4, 2, 3), float(rng.choice([0.5, 400.0]))
    q, do = rng.normal(size=(B, H, S, D)), rng.normal(size=(B, H, S, D))
    k, v = rng.normal(size=(B, K, S, D)), rng.normal(size=(B, K, S, D))
    documents = np.sort(rng.integers(0, 3, (B, S)), axis=1) if packed else None
    mask = documents[:, None, :, None] == documents[:, None, None, :] if documents is not None else None
    options = {"scale": scale, "causal": causal, "mask": mask}
    o, lse = ops.attention(q, k, v, **options, return_lse=True)

    places = getattr(split, order)(S, ranks)
    assert_close(np.sort(np.concatenate(places)), np.arange(S))
    q_P, k_P, v_P, do_P = ([x[:, :, own] for own in places] for x in (q, k, v, do))
    how = {"documents": documents, "scale": scale, "causal": causal}
    o_P, lse_P = split.ring_attention(q_P, k_P, v_P, places, **how)
    gathered = split.all_gather_attention(q_P, k_P, v_P, places, **how)
    grads = split.ring_attention_backward(do_P, q_P, k_P, v_P, o_P, lse_P, places, **how)
    for rank, own in enumerate(places):
        assert_close(o_P[rank], o[:, :, own])
        assert_close(lse_P[rank], lse[:, :, own])
        assert_close(gathered[rank], o[:, :, own])
    whole = ops.attention_backward(do, q, k, v, **options)
    for found_P, exact in zip(grads, whole, strict=True):
        for found, own in zip(found_P, places, strict=True):
            size = max(1, float(np.abs(exact).max()))
            assert_close(found / size, exact[:, :, own] / size)


@given(RANKS, st.sampled_from(split.ORDERS), st.integers(0, 20), SEEDS)
def test_a_reduction_is_the_sum_in_any_order(ranks: int, order: str, N: int, seed: int) -> None:
    parts = np.random.default_rng(seed).normal(size=(ranks, N))
    assert_close(split.AllReduce(order)(list(parts)), parts.sum(axis=0))


def test_a_reduction_stores_every_partial_sum_in_its_format() -> None:
    """256 + 1 is 256 in bfloat16: one after another the ones are lost, in pairs they are not, and around a ring it
    depends on where a chunk begins."""
    parts = [np.array([x] * 4) for x in (256.0, 1.0, 1.0, 1.0)]
    assert split.AllReduce("one by one", "bfloat16")(parts).tolist() == [256] * 4
    assert split.AllReduce("tree", "bfloat16")(parts).tolist() == [258] * 4  # (256 + 1) + (1 + 1)
    assert split.AllReduce("ring", "bfloat16")(parts).tolist() == [260, 260, 256, 256]
    assert split.AllReduce("ring")(parts).tolist() == [259] * 4
    rounded = rounding("bfloat16")(np.array([0.1]))
    assert split.AllReduce("tree", "bfloat16")([np.array([0.1])]) == rounded


def test_what_is_not_known_of_a_reduction_is_refused() -> None:
    with pytest.raises(InputError, match="order='star' is not known; use one of ring, tree, one by one"):
        split.AllReduce("star")
    with pytest.raises(InputError, match="dtype='int8' is not known"):
        split.AllReduce("ring", "int8")
