"""The gradients of attention with grouped key/value heads, without ever storing the scores.

    p = e^(scale q k^T + mask - lse)         once more, from the logarithm of the denominator that the forward pass kept
    delta = sum(do o) - dlse                 over the dims: what sum(p dp) over the keys is
    dv = p^T do,   dp = do v^T,   ds = p (dp - delta),   dq = scale ds k,   dk = scale ds^T q

p and ds are rounded to the dtype of q before their products, as tensor cores want it; the rest is float32, and dq, dk
and dv are rounded once.

Tiles: three kernels, none of which adds to what another program wrote, so that every run gives the same bits.
rows_kernel forms delta and the shift of the exponent for every query. keys_kernel: a program holds BLOCK_M keys and
values of one key/value head and walks over the queries that see them, BLOCK_N at a time, head after head of its group,
so that dk and dv are sums in a fixed order. queries_kernel: a program holds BLOCK_M queries and walks over the keys
that they see, for dq. The scores and dp are so formed twice, 7 products where 5 would do if dq were added up in memory,
in whatever order programs end. A head dimension is held in two parts (attention.py).
Masks: tiles that are seen in full come without one, as in attention.py.
NaN: a program whose sums are not finite forms them again with care, as in attention.py: a weight of 0 silences what it
is multiplied with.
Traffic: do and o once; k, v, dk and dv once, and q and do of the group once per BLOCK_M keys; q, do and dq once, and k
and v once per BLOCK_M queries (what is read again mostly from L2). 14 B H S T D flops, half of it if causal.
Source: Dao 2023, "FlashAttention-2", algorithm 2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, stands_for_others
from refllm.kernels.layout import CHUNK, chunk_length, dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.attention import (
    LOG2_E,
    SLICE,
    WIDTHS,
    Head,
    add_apart,
    any_not_finite,
    careful_product,
    constants_of,
    fold,
    load_rows,
    shape_class,
    store_rows,
)
from refllm.kernels.triton.attention import plan as forward_plan
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.decode_attention import read_length
from refllm.kernels.tuning.tunables import Tunable

_ALL = (True, True)
"""What is needed: the gradient of q, and those of k and v, which are found together."""
BLOCK_ROWS = 32
"""Queries per program of `rows_kernel`."""


class Queries(NamedTuple):
    """Queries and the gradients of their results: S of each head from the first one on.

    count: rows of a walk over them. shift, rest, delta: what `rows_kernel` wrote.
    """

    q_ptr: Any
    q_head: Any
    q_row: Any
    do_ptr: Any
    do_head: Any
    do_row: Any
    shift_ptr: Any
    rest_ptr: Any
    delta_ptr: Any
    S: Any
    count: Any


class Keys(NamedTuple):
    """Keys and values of one head and the key mask of its batch row (None: no mask). T: how many there are."""

    k_ptr: Any
    k_row: Any
    v_ptr: Any
    v_row: Any
    mask_ptr: Any
    mask_row: Any
    T: Any


class Form(NamedTuple):
    """What is known when a kernel is compiled, beside the `Head`.

    GROUPED: the rows of all heads of a group stand after each other, so that a tile holds few queries of several heads;
    else a walk goes from head to head.
    """

    CAUSAL: Any
    GROUPED: Any


class Rows(NamedTuple):
    """Some rows of a matrix with D columns: where they begin, which of them exist, both parts of their dims."""

    ptr: Any
    offsets: Any
    inside: Any
    low: Any
    high: Any


@triton.jit
def _rows(ptr, offsets, inside, head):
    """The rows at these offsets. Where products are summed over slices, those load them."""
    low, high = None, None
    if not head.SLICED:
        low = load_rows(ptr, offsets, inside, 0, head.D, head.LOW, False)
        if head.HIGH:
            high = load_rows(ptr, offsets, inside, head.LOW, head.D, head.HIGH, False)
    return Rows(ptr, offsets, inside, low, high)


@triton.jit
def _places(h, i, queries, form):
    """(head, token) of the rows i: of the head h, or of all heads of a group after each other."""
    if form.GROUPED:
        return i // queries.S, i % queries.S
    return h, i


@triton.jit
def _load_queries(h, i, queries, head, form):
    """q, do, shift, rest and delta of the rows i. A row that does not exist has the shift inf, and so no weight."""
    inside = i < queries.count
    h, s = _places(h, i, queries, form)
    h, s = h.to(tl.int64), s.to(tl.int64)  # index * stride passes 2^31 in large tensors
    q = _rows(queries.q_ptr, h * queries.q_head + s * queries.q_row, inside, head)
    do = _rows(queries.do_ptr, h * queries.do_head + s * queries.do_row, inside, head)
    shift = tl.load(queries.shift_ptr + h * queries.S + s, mask=inside, other=float("inf"))
    rest = tl.load(queries.rest_ptr + h * queries.S + s, mask=inside, other=0.0) if head.SLICED else shift
    delta = tl.load(queries.delta_ptr + h * queries.S + s, mask=inside, other=0.0)
    return q, do, shift, rest, delta


@triton.jit
def _load_keys(n, keys, head):
    """k, v and whether they may be attended to, for the keys n."""
    inside = n < keys.T
    k = _rows(keys.k_ptr, n.to(tl.int64) * keys.k_row, inside, head)
    v = _rows(keys.v_ptr, n.to(tl.int64) * keys.v_row, inside, head)
    attend = inside
    if keys.mask_ptr is not None:
        attend = tl.load(keys.mask_ptr + n.to(tl.int64) * keys.mask_row, mask=inside, other=0) != 0
    return k, v, attend


@triton.jit
def _limits(i, queries, keys, form):
    """The rows i see the keys below these: causal attention is aligned at the end."""
    if form.CAUSAL:
        s = i % queries.S if form.GROUPED else i
        return tl.minimum(keys.T, keys.T - queries.S + s + 1)
    return tl.full([i.shape[0]], keys.T, tl.int32)


@triton.jit
def _pairs(a, b, head):
    """a b^T over the dims, [rows of a, rows of b]."""
    if head.SLICED:
        s = tl.zeros([a.offsets.shape[0], b.offsets.shape[0]], tl.float32)
        for dim in range(0, head.D, SLICE):
            a_part = load_rows(a.ptr, a.offsets, a.inside, dim, head.D, SLICE, False)
            b_part = load_rows(b.ptr, b.offsets, b.inside, dim, head.D, SLICE, False)
            s = add_apart(s, a_part, tl.trans(b_part))
    else:
        s = tl.dot(a.low, tl.trans(b.low))
        if head.HIGH:
            s = tl.dot(a.high, tl.trans(b.high), s) if head.CHAINED else add_apart(s, a.high, tl.trans(b.high))
    return s


@triton.jit
def _weights_and_slopes(x, y, over_x, over_y, shift, rest, delta, visible, scale, head):
    """p and ds of a tile. x, y: the rows held, over_x, over_y: those walked over; these are (k, v) and (q, do), or the
    other way round. shift, rest, delta: along the axis of the queries. visible: who sees whom, None: all see all."""
    s = _pairs(x, over_x, head)
    power = tl.fma(-s if head.NEGATE else s, scale, -shift)  # fma: a rounded product is off by 1 % for scores of 1e5
    p = tl.exp2(power - rest if head.SLICED else power)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    ds = p * (_pairs(y, over_y, head) - delta)
    if visible is not None:
        ds = tl.where(p == 0, 0.0, ds)  # dp may be NaN behind a mask
    return p, ds


@triton.jit
def _add_product(low, high, weights, rows, head):
    """low and high + weights times the rows, with the weights rounded to the dtype of those. In float32 tiles are
    summed by themselves (see attention.py)."""
    if head.SLICED:
        low = add_apart(low, weights, load_rows(rows.ptr, rows.offsets, rows.inside, 0, head.D, head.LOW, False))
        if head.HIGH:
            part = load_rows(rows.ptr, rows.offsets, rows.inside, head.LOW, head.D, head.HIGH, False)
            high = add_apart(high, weights, part)
    else:
        low = tl.dot(weights.to(rows.low.dtype), rows.low, low)
        if head.HIGH:
            high = tl.dot(weights.to(rows.high.dtype), rows.high, high)
    return low, high


@triton.jit
def _zeros(ROWS: tl.constexpr, head):
    """Both parts of a sum. Where there is no second, a single column that nothing is added to: a loop carries no None,
    and the compiler drops it."""
    HIGH: tl.constexpr = head.HIGH if head.HIGH else 1
    return tl.zeros([ROWS, head.LOW], tl.float32), tl.zeros([ROWS, HIGH], tl.float32)


@triton.jit
def _not_finite(low, high, head):
    odd = any_not_finite(low)
    if head.HIGH:
        odd = odd | any_not_finite(high)
    return odd


@triton.jit
def _store(ptr, offsets, inside, low, high, factor, head):
    store_rows(ptr, offsets, inside, 0, head.D, low * factor, head.LOW)
    if head.HIGH:
        store_rows(ptr, offsets, inside, head.LOW, head.D, high * factor, head.HIGH)


@triton.jit
def _careful_part(acc, weights, rows, dim, head):
    """acc + weights times a slice of the rows from dim on, where a weight of 0 silences what a row holds."""
    part = load_rows(rows.ptr, rows.offsets, rows.inside, dim, head.D, SLICE, False)
    return careful_product(weights.to(part.dtype), part, acc)


@triton.jit
def rows_kernel(
    do_ptr, o_ptr, lse_ptr, dlse_ptr, shift_ptr, rest_ptr, delta_ptr,
    do_batch, do_head, do_row, o_batch, o_head, o_row, H, S, unit, unit_rest,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta, shift and rest of BLOCK queries of one head: p = 2^(scale s - shift - rest). The rest is what rounding the
    shift took, and counts in float32. A row without a key has the shift inf."""
    tiles = tl.cdiv(S, BLOCK)
    b, h = (tl.program_id(0) // tiles // H).to(tl.int64), (tl.program_id(0) // tiles % H).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = rows < S
    do = load_rows(do_ptr + b * do_batch + h * do_head, rows.to(tl.int64) * do_row, inside, 0, D, WIDTH, False)
    o = load_rows(o_ptr + b * o_batch + h * o_head, rows.to(tl.int64) * o_row, inside, 0, D, WIDTH, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    place = (b * H + h) * S + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + place, mask=inside, other=0.0)
    none = lse == float("-inf")
    lse = tl.where(none, 0.0, lse)
    shift = tl.fma(lse, unit, lse * unit_rest)
    tl.store(shift_ptr + place, tl.where(none, float("inf"), shift), mask=inside)
    tl.store(rest_ptr + place, tl.fma(lse, unit, -shift) + lse * unit_rest, mask=inside)
    tl.store(delta_ptr + place, delta, mask=inside)


@triton.jit
def _visible_to(attend, n, i, queries, keys, form):
    """[keys, queries]: which of the keys n the rows i see."""
    visible = attend[:, None] & (i < queries.count)[None, :]
    if form.CAUSAL:
        visible = visible & (n[:, None] < _limits(i, queries, keys, form)[None, :])
    return visible


@triton.jit
def _walk_queries(
    k_low, k_high, v_low, v_high, k, v, attend, n, queries, keys, heads, start, stop, scale, head, form,
    BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The sums for dk and dv after the rows start .. stop of all heads. ALL: each that exists sees all keys held."""
    tiles = tl.maximum(0, tl.cdiv(stop - start, BLOCK_N))
    for step in range(heads * tiles):
        i = start + step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        q, do, shift, rest, delta = _load_queries(step // tiles, i, queries, head, form)
        visible = None if ALL else _visible_to(attend, n, i, queries, keys, form)
        p, ds = _weights_and_slopes(k, v, q, do, shift[None, :], rest[None, :], delta[None, :], visible, scale, head)
        v_low, v_high = _add_product(v_low, v_high, p, do, head)
        k_low, k_high = _add_product(k_low, k_high, ds, q, head)
    return k_low, k_high, v_low, v_high


@triton.jit
def _store_keys_carefully(
    dk_ptr, dv_ptr, offsets, inside, k, v, attend, n, queries, keys, start, heads, scale, factor, head, form,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv once more, a slice of D at a time: rare, and so it must not be fast but small."""
    tiles = tl.maximum(0, tl.cdiv(queries.count - start, BLOCK_N))
    for dim in range(0, head.D, SLICE):
        dk = tl.zeros([n.shape[0], SLICE], tl.float32)
        dv = tl.zeros([n.shape[0], SLICE], tl.float32)
        for step in tl.range(heads * tiles, num_stages=1):
            i = start + step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            q, do, shift, rest, delta = _load_queries(step // tiles, i, queries, head, form)
            visible = _visible_to(attend, n, i, queries, keys, form)
            p, ds = _weights_and_slopes(
                k, v, q, do, shift[None, :], rest[None, :], delta[None, :], visible, scale, head
            )
            dv = _careful_part(dv, p, do, dim, head)
            dk = _careful_part(dk, ds, q, dim, head)
        store_rows(dv_ptr, offsets, inside, dim, head.D, dv, SLICE)
        store_rows(dk_ptr, offsets, inside, dim, head.D, dk * factor, SLICE)


@triton.jit(do_not_specialize=["N"])  # a row's bits must not depend on the size of a cache
def keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, do_ptr, shift_ptr, rest_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_row, lengths_stride,
    do_batch, do_head, do_row, K, group, S, N, tiles, scale, factor,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SLICED: tl.constexpr, CHAINED: tl.constexpr,
    NEGATE: tl.constexpr, CAUSAL: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of BLOCK_M keys of one key/value head, over the queries of its group."""
    programs = tl.num_programs(0) // tiles
    first = tl.program_id(0) // programs * BLOCK_M  # early keys are seen by the most queries: they start first
    b = (tl.program_id(0) % programs // K).to(tl.int64)
    kv = (tl.program_id(0) % programs % K).to(tl.int64)
    head: tl.constexpr = Head(D, LOW, HIGH, SLICED, CHAINED, NEGATE)
    form: tl.constexpr = Form(CAUSAL, GROUPED)
    T, heads, count = N, group, S
    if GROUPED:
        T, _ = read_length(lengths_ptr, b, lengths_stride, N)
        heads, count = 1, group * S
    row_0 = (b * K + kv) * group * S
    queries = Queries(
        q_ptr + b * q_batch + kv * group * q_head, q_head, q_row, do_ptr + b * do_batch + kv * group * do_head,
        do_head, do_row, shift_ptr + row_0, rest_ptr + row_0, delta_ptr + row_0, S, count,
    )  # fmt: skip
    mask = None if mask_ptr is None else mask_ptr + b * mask_batch
    keys = Keys(k_ptr + b * k_batch + kv * k_head, k_row, v_ptr + b * v_batch + kv * v_head, v_row, mask, mask_row, T)
    n = first + tl.arange(0, BLOCK_M)
    k, v, attend = _load_keys(n, keys, head)

    # Rows before `start` see none of the keys held, those from `full` on see all of them.
    start, full = 0, 0
    if CAUSAL:
        start = tl.maximum(0, first - (T - S)) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(0, first + BLOCK_M - 1 - (T - S)), BLOCK_N) * BLOCK_N
    if GROUPED:
        start = 0
    if GROUPED or mask_ptr is not None:
        full = count
    start = tl.where(first < T, start, count)  # of a cache, slots that are not used
    full = tl.where(first + BLOCK_M <= T, tl.minimum(count, full), count)
    k_low, k_high = _zeros(BLOCK_M, head)
    v_low, v_high = _zeros(BLOCK_M, head)
    k_low, k_high, v_low, v_high = _walk_queries(
        k_low, k_high, v_low, v_high, k, v, attend, n, queries, keys, heads, start, full, scale, head, form, BLOCK_N,
        False,
    )  # fmt: skip
    k_low, k_high, v_low, v_high = _walk_queries(
        k_low, k_high, v_low, v_high, k, v, attend, n, queries, keys, heads, full, count, scale, head, form, BLOCK_N,
        True,
    )  # fmt: skip

    place = b * N * K * D + kv * D
    dk_ptr += place
    dv_ptr += place
    offsets, inside = n.to(tl.int64) * (K * D), n < N
    if _not_finite(k_low, k_high, head) | _not_finite(v_low, v_high, head):
        _store_keys_carefully(
            dk_ptr, dv_ptr, offsets, inside, k, v, attend, n, queries, keys, start, heads, scale, factor, head, form,
            BLOCK_N,
        )  # fmt: skip
    else:
        _store(dk_ptr, offsets, inside, k_low, k_high, factor, head)
        _store(dv_ptr, offsets, inside, v_low, v_high, 1.0, head)


@triton.jit
def _walk_keys(
    low, high, q, do, shift, rest, delta, limit, keys, start, stop, scale, head,
    BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The sum for dq after the keys start .. stop. ALL: every row sees all of them."""
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k, v, attend = _load_keys(n, keys, head)
        visible = None if ALL else attend[None, :] & (n[None, :] < limit[:, None])
        _, ds = _weights_and_slopes(q, do, k, v, shift[:, None], rest[:, None], delta[:, None], visible, scale, head)
        low, high = _add_product(low, high, ds, k, head)
    return low, high


@triton.jit
def _store_queries_carefully(
    dq_ptr, offsets, inside, q, do, shift, rest, delta, limit, keys, stop, scale, factor, head, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dq once more, a slice of D at a time."""
    for dim in range(0, head.D, SLICE):
        dq = tl.zeros([limit.shape[0], SLICE], tl.float32)
        for first in tl.range(0, stop, BLOCK_N, num_stages=1):
            n = first + tl.arange(0, BLOCK_N)
            k, v, attend = _load_keys(n, keys, head)
            visible = attend[None, :] & (n[None, :] < limit[:, None])
            _, ds = _weights_and_slopes(
                q, do, k, v, shift[:, None], rest[:, None], delta[:, None], visible, scale, head
            )
            dq = _careful_part(dq, ds, k, dim, head)
        store_rows(dq_ptr, offsets, inside, dim, head.D, dq * factor, SLICE)


@triton.jit(do_not_specialize=["N"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, do_ptr, shift_ptr, rest_ptr, delta_ptr, dq_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_row, lengths_stride,
    do_batch, do_head, do_row, K, group, S, N, tiles, scale, factor,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SLICED: tl.constexpr, CHAINED: tl.constexpr,
    NEGATE: tl.constexpr, CAUSAL: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: dq of BLOCK_M queries of one head, or of the heads of a group, over the keys that they see."""
    programs = tl.num_programs(0) // tiles
    first = (tiles - 1 - tl.program_id(0) // programs) * BLOCK_M  # late queries see the most keys: they start first
    together, count = 1, S
    if GROUPED:
        together, count = group, group * S
    heads = K * group // together
    b = (tl.program_id(0) % programs // heads).to(tl.int64)
    h = (tl.program_id(0) % programs % heads * together).to(tl.int64)
    kv = h // group
    head: tl.constexpr = Head(D, LOW, HIGH, SLICED, CHAINED, NEGATE)
    form: tl.constexpr = Form(CAUSAL, GROUPED)
    T = N
    if GROUPED:
        T, possible = read_length(lengths_ptr, b, lengths_stride, N)
        factor = tl.where(possible, factor, float("nan"))
    row_0 = (b * K * group + h) * S
    queries = Queries(
        q_ptr + b * q_batch + h * q_head, q_head, q_row, do_ptr + b * do_batch + h * do_head, do_head, do_row,
        shift_ptr + row_0, rest_ptr + row_0, delta_ptr + row_0, S, count,
    )  # fmt: skip
    mask = None if mask_ptr is None else mask_ptr + b * mask_batch
    keys = Keys(k_ptr + b * k_batch + kv * k_head, k_row, v_ptr + b * v_batch + kv * v_head, v_row, mask, mask_row, T)
    rows = first + tl.arange(0, BLOCK_M)
    q, do, shift, rest, delta = _load_queries(0 * kv, rows, queries, head, form)

    # Row `rows` sees the keys below `limit`; all rows those below `full`, no row those from `stop` on.
    limit = _limits(rows, queries, keys, form)
    full, stop = T, T
    if CAUSAL:
        least = 0 if GROUPED else first
        full = tl.maximum(0, tl.minimum(T, T - S + least + 1))
        if not GROUPED:
            stop = tl.maximum(0, tl.minimum(T, T - S + first + BLOCK_M))
    full = full // BLOCK_N * BLOCK_N if mask_ptr is None else 0

    low, high = _zeros(BLOCK_M, head)
    low, high = _walk_keys(low, high, q, do, shift, rest, delta, limit, keys, 0, full, scale, head, BLOCK_N, True)
    low, high = _walk_keys(low, high, q, do, shift, rest, delta, limit, keys, full, stop, scale, head, BLOCK_N, False)

    dq_ptr += b * S * K * group * D + h * D
    offsets = rows.to(tl.int64) * (K * group * D)
    if GROUPED:
        offsets = (rows % S).to(tl.int64) * (K * group * D) + rows // S * D
    if _not_finite(low, high, head):
        _store_queries_carefully(
            dq_ptr, offsets, rows < count, q, do, shift, rest, delta, limit, keys, stop, scale, factor, head, BLOCK_N
        )
    else:
        _store(dq_ptr, offsets, rows < count, low, high, factor, head)


class Tile(NamedTuple):
    """Keys that keys_kernel holds and queries per step of its walk; queries that queries_kernel holds and keys per step
    of its; warps per program, stages of the pipeline that loads what is walked over."""

    keys: int
    queries_step: int
    queries: int
    keys_step: int
    warps: int
    stages: int


_LAYER = {"S": 4096, "H": 32, "K": 8}
TUNABLE = Tunable(
    "attention_backward", "attention_backward",
    {**{f"16-bit, D <= {D}": {**_LAYER, "D": D} for D in WIDTHS}, "float32": {"S": 1024, "H": 8, "K": 2, "D": 128}},
    {"keys": (32, 64, 128), "queries_step": (16, 32, 64), "queries": (64, 128), "keys_step": (32, 64), "warps": (4, 8),
     "stages": (2,)},
    {"float32": {"keys": (32,), "queries_step": (16,), "queries": (32,), "keys_step": (16,)}},
    outer=("keys",), inner=("queries_step",), sums=(("keys", "D"), ("keys", "D"), ("keys", "queries_step")), about=1,
)  # fmt: skip


def choose_tile(D: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json, of the classes of attention.py: as large as registers allow without spills. Two
    sums per key live as long as the walk of keys_kernel, one per query as long as that of queries_kernel, which can so
    hold twice as many. D = 128 on an H100: 128 keys and 32 queries per step, 128 queries and 32 keys per step, 8 warps.
    """
    return Tile(**tuning.tile("attention_backward", shape_class(D, dtype), target))


def back_to_log2(scale: float) -> dict[str, float]:
    """`unit` + `unit_rest`: what leads from an lse to the log2 of weights, in the scale as `fold` rounds it. (In two
    numbers: see there.)"""
    unit = fold(scale)["scale"] / abs(scale) if scale else LOG2_E
    rounded = torch.tensor(unit, dtype=torch.float32).item()
    return {"unit": rounded, "unit_rest": unit - rounded}


def plan(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor | None,
    lse: torch.Tensor | None, dlse: torch.Tensor | None, scale: float | None, causal: bool,
    key_mask: torch.Tensor | None, target: Target = DEFAULT, tile: Tile | None = None, needed: Sequence[bool] = _ALL,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launches in their order, and dq, dk, dv, which lie as [B, S, heads, D] in memory.

    Without o or lse the first launch is the forward pass. needed: whether dq is, and whether dk and dv are; in the
    place of the others is an empty tensor.
    """
    before = []
    if o is None or lse is None:
        again, *computed = forward_plan(q, k, v, scale, causal, key_mask, target)
        before, o, lse = [again], computed[0] if o is None else o, computed[1] if lse is None else lse
    steps, *gradients = plan_gradients(do, q, k, v, o, lse, dlse, scale, causal, key_mask, None, needed, target, tile)
    return [*before, *steps], gradients[0], gradients[1], gradients[2]


def plan_gradients(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    dlse: torch.Tensor | None, scale: float | None, causal: bool, key_mask: torch.Tensor | None,
    lengths: torch.Tensor | None, needed: Sequence[bool], target: Target, tile: Tile | None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`plan` after the forward pass. lengths: of the sequences, where k and v are caches: decode_attention_backward.py,
    whose queries are few, so that those of a group's heads are one walk."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    dq, dk, dv = results(q, k, v, needed)
    do, q, k, v, o, lse = dense(do), dense(q), dense(k), dense(v), dense(o), lse.contiguous()
    shift, rest, delta = torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse)
    tile = tile or choose_tile(D, q.dtype, target)
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    strides = {
        f"{name}_{axis}": stride
        for name, x in (("q", q), ("k", k), ("v", v), ("do", do), ("o", o))
        for axis, stride in zip(("batch", "head", "row"), x.stride(), strict=False)
    }
    rows = Launch(
        rows_kernel, (B * H * triton.cdiv(S, BLOCK_ROWS),),
        {
            "do_ptr": do, "o_ptr": o, "lse_ptr": lse, "dlse_ptr": None if dlse is None else dlse.contiguous(),
            "shift_ptr": shift, "rest_ptr": rest, "delta_ptr": delta, "H": H, "S": S, **back_to_log2(scale),
            **{name: stride for name, stride in strides.items() if name.startswith(("do_", "o_"))},
        },
        {"D": D, "WIDTH": triton.next_power_of_2(D), "BLOCK": BLOCK_ROWS},
        wide_loads=chunk_length(D, do, o) == CHUNK,
    )  # fmt: skip
    given = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask, "lengths_ptr": lengths, "do_ptr": do,
        "shift_ptr": shift, "rest_ptr": rest, "delta_ptr": delta,
        **{name: stride for name, stride in strides.items() if not name.startswith("o_")},
        "mask_batch": 0 if mask is None else mask.stride(0), "mask_row": 0 if mask is None else mask.stride(1),
        "lengths_stride": 0 if lengths is None else lengths.stride(0),
        "K": K, "group": H // K, "S": S, "N": T, "scale": fold(scale)["scale"], "factor": scale,
    }  # fmt: skip
    form = {**constants_of(D, q.dtype, scale, target), "CAUSAL": causal, "GROUPED": lengths is not None}
    narrow = q.dtype != torch.float32
    how: dict[str, Any] = {
        "num_warps": tile.warps, "num_stages": tile.stages, "tensor_cores": narrow,
        "async_copies": narrow and chunk_length(D, q, k, v, do) == CHUNK,
        # Left alone, ptxas for sm_100 spills to fit one more program; under a limit it does not. That for sm_80 does.
        "options": {"maxnreg": 255} if target.name == "sm_100" else {},
    }  # fmt: skip
    steps = [rows]
    if needed[1]:
        tiles = triton.cdiv(T, tile.keys)
        constants = {**form, "BLOCK_M": tile.keys, "BLOCK_N": tile.queries_step}
        mine = {**given, "dk_ptr": dk, "dv_ptr": dv, "tiles": tiles}
        steps.append(Launch(keys_kernel, (tiles * B * K,), mine, constants, **how))
    if needed[0]:
        heads, count = (H, S) if lengths is None else (K, H // K * S)
        tiles = triton.cdiv(count, tile.queries)
        constants = {**form, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys_step}
        mine = {**given, "dq_ptr": dq, "tiles": tiles}
        steps.append(Launch(queries_kernel, (tiles * B * heads,), mine, constants, **how))
    return steps, dq, dk, dv


def results(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for dq, dk and dv, each [B, S, heads, D] in memory, or empty where it is not needed."""
    dq, dk, dv = (
        x.new_empty((B, rows, heads, D) if asked else (0, 0, 0, 0)).transpose(1, 2)
        for x, asked in ((q, needed[0]), (k, needed[1]), (v, needed[1]))
        for B, heads, rows, D in (x.shape,)
    )
    return dq, dk, dv


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships: each tile, with and without a split head dimension, causal or not, masked."""
    half, full = torch.bfloat16, torch.float32
    for D in (64, 80, 128, 160, 192, 256):
        yield from _example(half, D, target)
    yield from _example(half, 128, target, causal=False, masked=True)
    if stands_for_others(target):
        for dtype, D in ((torch.float16, 96), (full, 64), (full, 256)):
            yield from _example(dtype, D, target)


def _example(
    dtype: torch.dtype, D: int, target: Target, causal: bool = True, masked: bool = False
) -> Iterator[tuple[str, Launch]]:
    """The launches on tensors that lie as projections leave them, [B, S, H, D] in memory, and a name for each."""
    q, kv = (torch.empty(2, 1000, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (8, 2))
    key_mask = torch.empty(2, 1000, dtype=torch.bool, device="meta") if masked else None
    lse = torch.empty(2, 8, 1000, device="meta")
    words = (str(dtype).removeprefix("torch."), f"D={D}", "causal" if causal else "all keys")
    name = " ".join(["attention_backward", *words, *["key mask"] * masked])
    every = plan(q, q, kv, kv, q, lse, None, 0.1, causal, key_mask, target)[0]
    for launch in every if masked else every[1:]:  # what rows_kernel does is the same for every head dimension
        yield f"{name}, {launch.kernel.__name__.removesuffix('_kernel')}", launch


@torch.library.custom_op("refllm::attention_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor | None,
    dlse: torch.Tensor | None,
    scale: float,
    causal: bool,
    key_mask: torch.Tensor | None,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device("attention_backward", q):
        target = target_of(q.device)
        steps, *gradients = plan(do, q, k, v, o, lse, dlse, scale, causal, key_mask, target, None, needed)
        for step in steps:
            step.run()
    return gradients[0], gradients[1], gradients[2]


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, dlse, scale, causal, key_mask, needed):
    return results(q, k, v, needed)


only_once("attention_backward")


def _kept(inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
    q, k, v, scale, causal, key_mask = inputs
    return q, k, v, *output, scale, causal, key_mask


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    (do, dlse), (q, k, v, o, lse, scale, causal, key_mask) = incoming, kept
    do = torch.zeros_like(o) if do is None else do
    asked = [needed[0], needed[1] or needed[2]]
    found = _attention_backward(do, q, k, v, o, lse, dlse, scale, causal, key_mask, asked)
    return (*(if_needed(*each) for each in zip(needed, found, strict=False)), None, None, None)


differentiable("attention", _kept, _gradients)


def attention_backward(
    do_BHSD: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    o_BHSD: torch.Tensor | None = None,
    lse_BHS: torch.Tensor | None = None,
    *,
    dlse: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_BHSD, dk_BKTD, dv_BKTD of `attention`, in the dtype of q; they lie as [B, S, heads, D] in memory.

    As `refllm.ops.attention_backward`. o_BHSD, lse_BHS (float32): of the forward pass; None: computed again. dlse:
    float32 [B, H, S], the gradient of lse where that was returned. scale, causal, key_mask: as `attention`. What no
    query sees has the gradient 0, and what it holds, NaN included, reaches nothing. Any strides, copied only where the
    last axis is not dense. The bits of a row's dq and of a sequence's dk and dv do not depend on the batch.
    Raises InputError for arguments that do not fit together.
    """
    operator = "attention_backward"
    arguments.attention(operator, q_BHSD, k_BKTD, v_BKTD, key_mask)
    arguments.incoming(operator, q_BHSD, do=do_BHSD)
    arguments.kept(operator, q_BHSD, o_BHSD, lse_BHS, dlse)
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else float(scale)
    given = do_BHSD, q_BHSD, k_BKTD, v_BKTD, o_BHSD, lse_BHS, dlse, scale, causal, key_mask
    return _attention_backward(*given, list(_ALL))
