"""The float32 arithmetic of torch's CPU kernels, written in NumPy: the same result, bit for bit.

Transformers' eager forward is a list of torch kernels, and each kernel adds in its own order and has its own `exp`.
Policy `hf-eager` (`refllm.precision`) uses these functions, so that what it computes differs from the library in no
bit; every other policy uses NumPy's own sums and functions, which are faster and as accurate.

Established against torch 2.13 on x86-64 (`tests/test_torch_cpu.py` compares every function here with the kernel that it
mirrors). `LANES_*` are the numbers of float32 lanes of the vector code that torch runs.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

Round = Callable[[np.ndarray], np.ndarray]
F32 = np.float32
F64 = np.float64
LANES_SUM = 8
"""Lanes of the reduction and LayerNorm kernels: torch runs their 256-bit versions on every CPU with AVX2 or better."""
LANES_SOFTMAX = 16
"""Lanes of the softmax kernel on a CPU with AVX-512 (8 with AVX2)."""
_CHUNK = 16  # rows of lanes that the LayerNorm kernel sums before it merges (Welford, pairwise over chunks)
_LEVELS = 4  # levels of the cascade in torch's sum kernel


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """a * b + c with one rounding to float32, as the hardware instruction does.

    The product of two float32 is exact in float64; the float64 sum is rounded once more to float32, which differs from
    a single rounding only where the exact sum lies within 2^-29 of a tie.
    """
    return (np.multiply(a, b, dtype=F64) + c).astype(F32)


def exp(x: np.ndarray) -> np.ndarray:
    """e^x in float32: `Sleef_expf16_u10` of the SLEEF vector library, which torch's softmax, silu and sigmoid call.

    x = q ln 2 + s with |s| <= ln(2)/2, the polynomial 1 + s + s^2 P(s), times 2^q; within 1 ulp.
    """
    with np.errstate(over="ignore"):  # in the polynomial of a masked score, whose result is 0 all the same
        return _exp(np.asarray(x, F32))


def _exp(x: np.ndarray) -> np.ndarray:
    q = np.rint(np.clip(x, -200, 200) * F32(1.4426950408889634))
    s = fma(q, F32(-0.693145751953125), x)
    s = fma(q, F32(-1.428606765330187045e-06), s)
    p = np.full(x.shape, 0.000198527617612853646278381, F32)
    for c in (0.00139304355252534151, 0.00833336077630519867, 0.0416664853692054749, 0.166666671633720398, 0.5):
        p = fma(p, s, F32(c))
    y = np.ldexp(F32(1) + fma(s * s, p, s), q.astype(np.int32))
    return np.where(x < F32(-104), F32(0), np.where(x > F32(100), F32(np.inf), y)).astype(F32, order="C")


def exp_elementwise(x: np.ndarray, *, half_precision: bool) -> np.ndarray:
    """e^x as an elementwise kernel (silu, sigmoid) on one thread computes it.

    Whole steps of the vector loop use `exp`, the elements left over at the end the C library's, which rounds correctly
    but for one case in a thousand.
    """
    out = exp(x)
    left = x.size % (4 * LANES_SOFTMAX if half_precision else 2 * LANES_SOFTMAX)
    if left:
        with np.errstate(over="ignore", under="ignore"):
            out.reshape(-1)[-left:] = np.exp(x.reshape(-1)[-left:], dtype=F64).astype(F32)
    return out


def row_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis, [..., n] -> [...], in the order of torch.sum and torch.mean on contiguous rows.

    Rows of lanes are dealt to four accumulators, each a cascade of blocks; then the four are added, then what is left
    of the row and the lanes, one after another. Rows shorter than the lanes are summed the same way as one lane.
    """
    *lead, n = x.shape
    if n < LANES_SUM:
        return _lane_sums(x[..., None])[..., 0]
    whole = n - n % LANES_SUM
    total = _lane_sums(x[..., :whole].reshape(*lead, n // LANES_SUM, LANES_SUM))
    out = np.zeros(lead, F32)
    for i in range(whole, n):
        out = out + x[..., i]
    for k in range(LANES_SUM):
        out = out + total[..., k]
    return out


def _lane_sums(lanes: np.ndarray) -> np.ndarray:
    """[..., rows, lanes] -> [..., lanes]."""
    rows = lanes.shape[-2]
    steps = rows // 4
    partial = _cascade(lanes[..., : steps * 4, :].reshape(*lanes.shape[:-2], steps, 4, lanes.shape[-1]), steps)
    total = partial[..., 0, :]
    for i in range(steps * 4, rows):
        total = total + lanes[..., i, :]
    for k in range(1, 4):
        total = total + partial[..., k, :]
    return total


def _cascade(four: np.ndarray, steps: int) -> np.ndarray:
    """Sum [..., steps, 4, lanes] over steps: blocks of `step` rows, whose sums are added into ever higher levels."""
    power = max(4, _ceil_log2(steps) // _LEVELS)
    step = 1 << power
    zero = np.zeros(four.shape[:-3] + four.shape[-2:], F32)
    level = [zero] * _LEVELS
    for i in range(steps):
        level[0] = level[0] + four[..., i, :, :]
        if (i + 1) % step:
            continue
        for j in range(1, _LEVELS):
            level[j], level[j - 1] = level[j] + level[j - 1], zero
            if (i + 1) & ((step - 1) << (j * power)):
                break
    for j in range(1, _LEVELS):
        level[0] = level[0] + level[j]
    return level[0]


def softmax_sum(e: np.ndarray) -> np.ndarray:
    """Sum over the last axis, kept, in the order of torch's softmax kernel: lane by lane, then the lanes as a tree."""
    n = e.shape[-1]
    if not n:
        return np.zeros((*e.shape[:-1], 1), F32)
    if n < LANES_SOFTMAX:
        return np.add.accumulate(e, axis=-1, dtype=F32)[..., -1:]
    rows, rest = divmod(n, LANES_SOFTMAX)
    total = e[..., :LANES_SOFTMAX].copy()
    for i in range(1, rows):
        total += e[..., i * LANES_SOFTMAX : (i + 1) * LANES_SOFTMAX]
    total[..., :rest] += e[..., rows * LANES_SOFTMAX :]
    return _tree(total)[..., None]


def moments(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over the last axis, kept, as torch's LayerNorm kernel computes them.

    Welford's update down chunks of 16 rows of lanes, chunks merged pairwise, the remainder one by one, then lane by
    lane (Chan, Golub, LeVeque 1979). A bfloat16 or float16 row is read two registers at a time. Only in the
    code for float16 did the compiler fuse the multiplication and the addition of the remainder.
    """
    *lead, n = x.shape
    halves = 1 if dtype == "float32" else 2
    width = LANES_SUM * halves
    rows = n // width
    lanes = x[..., : rows * width].reshape(*lead, rows, halves, LANES_SUM)
    _, lane_mean, lane_m2 = _chunked_moments(lanes, rows, halves)
    count, mean, m2 = 0, np.zeros(lead, F32), np.zeros(lead, F32)
    for i in range(rows * width, n):
        delta = x[..., i] - mean
        count += 1
        mean = mean + delta / F32(count)
        rest = x[..., i] - mean
        m2 = fma(delta, rest, m2) if dtype == "float16" else m2 + delta * rest
    for k in range(LANES_SUM):
        count, mean, m2 = _merge_scalar((rows * halves, lane_mean[..., k], lane_m2[..., k]), (count, mean, m2))
    return mean[..., None], (m2 / F32(n))[..., None]


_Moments = tuple[int, np.ndarray, np.ndarray]  # count, mean, sum of squared deviations


def _chunked_moments(lanes: np.ndarray, rows: int, halves: int) -> _Moments:
    zero = np.zeros(lanes.shape[:-3] + (LANES_SUM,), F32)
    chunks = -(-rows // _CHUNK)
    depth = _ceil_log2(chunks)
    stack: list[_Moments] = [(0, zero, zero)] * depth
    for i in range(chunks):
        block = lanes[..., i * _CHUNK : (i + 1) * _CHUNK, :, :]
        for h in range(halves):
            stack[0] = _merge_lanes(_welford(block[..., h, :], zero), stack[0])
        done, j = i + 1, 1
        while j < depth and done & 1 == 0:
            stack[j], stack[j - 1] = _merge_lanes(stack[j - 1], stack[j]), (0, zero, zero)
            done, j = done >> 1, j + 1
    for j in range(1, depth):
        stack[0] = _merge_lanes(stack[j], stack[0])
    return stack[0]


def _welford(block: np.ndarray, zero: np.ndarray) -> _Moments:
    mean, m2 = zero, zero
    for j in range(block.shape[-2]):
        delta = block[..., j, :] - mean
        mean = fma(delta, F32(1) / F32(j + 1), mean)
        m2 = fma(delta, block[..., j, :] - mean, m2)
    return block.shape[-2], mean, m2


# The two merges are one formula; torch's compiler contracts it into fused multiply-adds differently in the vector code
# and in the scalar code, and the last bit shows it.
def _merge_lanes(new: _Moments, old: _Moments) -> _Moments:
    count, share = _share(new[0], old[0])
    delta = new[1] - old[1]
    return count, old[1] + share * delta, fma(delta * share, delta * F32(old[0]), old[2] + new[2])


def _merge_scalar(new: _Moments, old: _Moments) -> _Moments:
    count, share = _share(new[0], old[0])
    delta = new[1] - old[1]
    return count, fma(share, delta, old[1]), old[2] + fma(delta * delta * share, F32(old[0]), new[2])


def _share(new: int, old: int) -> tuple[int, np.floating]:
    return new + old, F32(0) if new + old == 0 else F32(F32(new) / F32(new + old))


def _ceil_log2(n: int) -> int:
    return 1 if n <= 2 else (n - 1).bit_length()


_INNER = 192  # terms that MKL sums before it starts anew


def matmul(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """a @ b + bias, [..., M, K] x [..., K, N] + [N] in float32, summed in the order of torch's product (MKL's).

    Each element is a chain of fused multiply-adds over k; the chains of blocks of 192 are added one after another, the
    first onto the bias, and a K between 192 and 384 makes two equal blocks. Established for one thread, M >= 4, N >= 12
    and a K that is even or not between 192 and 384. K passes over the result, so for small shapes.
    """
    K = a.shape[-1]
    block = max(1, -(-K // 2) if _INNER < K <= 2 * _INNER else _INNER)
    out = _chain(a[..., :block], b[..., :block, :])
    out = out if bias is None else out + bias
    for start in range(block, K, block):
        out = out + _chain(a[..., start : start + block], b[..., start : start + block, :])
    return out


def _chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]) + (a.shape[-2], b.shape[-1]), F32)
    for k in range(a.shape[-1]):
        out = fma(a[..., :, k, None], b[..., k, None, :], out)
    return out


# Products of bfloat16 or float16 matrices. A product of two such numbers is exact in float32, so all that distinguishes
# the kernels is the order in which they add. An `Order` is that: sum of a * b over the last axis, other axes broadcast.
Order = Callable[[np.ndarray, np.ndarray], np.ndarray]
_REGISTERS = 8
_LANES_DOT = 8
_SMALL = 4096
"""A bfloat16 product of so many multiplications or fewer goes to torch's own kernel, a larger one to oneDNN."""
_SMALL_BATCHED = 400
"""torch.bmm runs a plain loop where one product has fewer multiplications than this."""
_SETTLE_AT_ONCE = 1 << 20  # numbers gathered at a time: 4 MiB
_SETTLE_AT_MOST = 1 << 30  # multiplications beyond which exactness in the last bit would cost minutes


def half_product(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None, order: Order, round: Round) -> np.ndarray:
    """a b^T + bias, [..., M, K] x [..., N, K] + [N]: what rounds to the same numbers as with the sums in `order`.

    BLAS adds in an order of its own, which shows only where the sum is so near to the middle between two numbers of the
    narrow format that the order decides (some in a thousand): those are added again in `order`. Rounding errors of a
    chain of K additions are about 0.4 |a| |b| + 0.3 sqrt(K) |sum| units of 2^-24, from terms of mixed sign and of one
    sign; "near" is several times that.
    """
    if a.ndim > 2:
        return np.stack([half_product(x, y, bias, order, round) for x, y in zip(a, b, strict=True)])
    y = a @ b.T
    lengths = np.sqrt(np.einsum("mk,mk->m", a, a))[:, None] * np.sqrt(np.einsum("nk,nk->n", b, b))
    near = F32(2**-24) * (6 * lengths + F32(2 * np.sqrt(a.shape[-1])) * np.abs(y))
    y = y if bias is None else y + bias
    rows, columns = np.nonzero((round(y - near) != round(y + near)) & np.isfinite(y))
    if rows.size * a.shape[-1] > _SETTLE_AT_MOST:
        return y
    for start in range(0, rows.size, step := max(1, _SETTLE_AT_ONCE // a.shape[-1])):
        i, j = rows[start : start + step], columns[start : start + step]
        settled = order(a[i], b[j])
        y[i, j] = settled if bias is None else settled + bias[j]
    return y


def half_order(dtype: str, rows: int, inner: int, columns: int, *, transposed: bool, batched: bool) -> Order:
    """The order in which torch adds up one product [rows, inner] x [inner, columns] of bfloat16 or float16 matrices.

    transposed: the second matrix is stored as [columns, inner]. batched: one of several, as in attention. (What counts
    for a batch of bfloat16 products is the multiplications of the batch: it is taken to have more than `_SMALL`.)
    """
    if dtype == "bfloat16" and (batched or rows * inner * columns > _SMALL):
        return partial(pairs, block=512 if rows == 1 or inner <= 1024 else 1024)
    if batched and rows * inner * columns < _SMALL_BATCHED:
        return one_by_one
    return registers if transposed else four_chains


def pairs(a: np.ndarray, b: np.ndarray, block: int = 512) -> np.ndarray:
    """bfloat16: pair after pair, the odd element first; blocks of the axis are summed for themselves and then added.

    This is the AVX-512 instruction `vdpbf16ps` in oneDNN's kernel. (The AMX units of some CPUs add in another order;
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 turns them off.)
    """
    terms = _terms(a, b)
    total = np.zeros(terms.shape[1:], F32)
    for start in range(0, len(terms), block):
        stop = min(start + block, len(terms))
        part = np.zeros(terms.shape[1:], F32)
        for k in range(start, stop - 1, 2):
            part += terms[k + 1]
            part += terms[k]
        if (stop - start) % 2:
            part += terms[stop - 1]
        total += part
    return total


def registers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float16, both matrices along their rows: eight registers of eight lanes each take every 64th product.

    The registers are added as a tree, the lanes as a tree, then what is left: whole pairs of registers, and single
    elements.
    """
    K, width = a.shape[-1], _REGISTERS * _LANES_DOT
    whole = K - K % width
    paired = K - (K - whole) % (2 * _LANES_DOT)
    out = _tree(_tree(_lanes_of_products(a, b, 0, whole, (_REGISTERS, _LANES_DOT)), axis=-2))
    if paired > whole:
        out = out + _tree(_lanes_of_products(a, b, whole, paired, (_LANES_DOT,)))
    for k in range(paired, K):
        out = out + a[..., k] * b[..., k]
    return out


def four_chains(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float16, the second matrix across its rows: four chains, k = 0, 4, 8, ... and so on, then what is left."""
    terms = _terms(a, b)
    whole = len(terms) - len(terms) % 4
    chains = np.zeros((4, *terms.shape[1:]), F32)
    for k, term in enumerate(terms):
        chains[k % 4 if k < whole else 0] += term
    return ((chains[0] + chains[1]) + chains[2]) + chains[3]


def one_by_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float16, very small products of a batch: one chain, k = 0, 1, 2, ..."""
    out = np.zeros(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), F32)
    for term in _terms(a, b):
        out += term
    return out


def _terms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a * b, the axis to be summed first, so that every step of a sum reads contiguous memory."""
    return np.ascontiguousarray(np.moveaxis(a * b, -1, 0))


def _lanes_of_products(a: np.ndarray, b: np.ndarray, start: int, stop: int, lanes: tuple[int, ...]) -> np.ndarray:
    """Sum of a * b over steps of prod(lanes) elements: [..., *lanes]."""
    step = int(np.prod(lanes))
    shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    total = np.zeros((*shape, step), F32)
    for k in range(start, stop, step):
        total += a[..., k : k + step] * b[..., k : k + step]
    return total.reshape(*shape, *lanes)


def _tree(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum over an axis of 2^n elements, the upper half onto the lower, again and again."""
    x = np.moveaxis(x, axis, -1)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
