"""The orders in which torch's CPU kernels add numbers of bfloat16 and float16, written in NumPy.

Transformers' eager forward is a list of torch kernels. Each of them computes in float32, in an order of its own, and
rounds its result once. The order decides a result only where the float32 sum lies within its own error of the middle
between two numbers of the narrow format, which is one element in some thousands; but what differs in one element
differs in most of them a layer later. Policy `hf-eager` (`refllm.precision`) adds in these orders, so that its results
are torch's to the bit on the CPUs whose kernels they are: those with AVX2, or with AVX-512 and its bfloat16 products
(not with AMX), on one thread. `refllm info` compares them with torch on the CPU at hand, `refllm.kernels.same_bits`
says how. Other policies, and float32, use NumPy's own sums, which are as accurate.

Established against torch 2.13 on x86-64. In the functions that add, the axis which is summed comes first.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike

Round = Callable[[np.ndarray], np.ndarray]
F32 = np.float32
F64 = np.float64
_LANES = 8  # of the sums, of LayerNorm and of products: torch runs their 256-bit versions with AVX-512 too


@dataclass(frozen=True)
class Cpu:
    """What decides between the orders: the kernels that torch selects on this CPU.

    lanes: float32 numbers in a register of the vector code, 16 with AVX-512, 8 with AVX2, else 0. onednn: bfloat16
    matrices are multiplied by oneDNN, which does so from AVX-512 on, and not by a kernel of torch's own.
    """

    lanes: int
    onednn: bool


@lru_cache(maxsize=1)
def this_cpu() -> Cpu:
    """The CPU at hand, as NumPy finds it, less what ATEN_CPU_CAPABILITY (torch) and ONEDNN_MAX_CPU_ISA hide."""
    try:  # not part of NumPy's public interface, and without type stubs
        from numpy._core._multiarray_umath import __cpu_features__ as found  # type: ignore[import-not-found]
    except ImportError:
        return Cpu(lanes=16, onednn=True)
    avx512 = all(found.get(name) for name in ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "FMA3"))
    avx2 = bool(found.get("AVX2") and found.get("FMA3"))
    allowed = os.environ.get("ATEN_CPU_CAPABILITY", "")
    lanes = 16 if avx512 and allowed not in ("avx2", "default") else 8 if avx2 and allowed != "default" else 0
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return Cpu(lanes, onednn=avx512 and isa not in ("SSE41", "AVX", "AVX2", "AVX2_VNNI"))


# ------------------------------------------------------------------------------------------------ orders of additions


def chain(terms: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Sum over the first axis, one after another."""
    # Laid out in memory as the terms are.
    total = np.zeros_like(terms[0]) if len(terms) else np.zeros(np.shape(terms)[1:], F32)
    for term in terms:
        total += term
    return total


def _tree(terms: np.ndarray) -> np.ndarray:
    """Sum over a first axis of 2^n elements, the upper half onto the lower, again and again."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = terms[:half] + terms[half:]
    return terms[0]


def _registers(x: np.ndarray, *shape: int) -> np.ndarray:
    """[..., n] -> [n / prod(shape), ..., *shape], without what does not fill a register of that shape. A view."""
    whole = x.shape[-1] - x.shape[-1] % math.prod(shape)
    return np.moveaxis(x[..., :whole].reshape(*x.shape[:-1], whole // math.prod(shape), *shape), x.ndim - 1, 0)


def _left_over(x: np.ndarray, width: int) -> np.ndarray:
    """What does not fill a register: [..., n] -> [n % width, ...]. A view."""
    return np.moveaxis(x[..., x.shape[-1] - x.shape[-1] % width :], -1, 0)


def _dealt(terms: np.ndarray, *shape: int) -> np.ndarray:
    """[n, ...] -> [n / prod(shape), *shape, ...]: term after term to the next of `shape`."""
    return terms.reshape(len(terms) // math.prod(shape), *shape, *terms.shape[1:])


# ---------------------------------------------------------------------------------------------- elementwise functions


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """a * b + c with one rounding to float32, as the hardware instruction does.

    The product of two float32 is exact in float64; the float64 sum is rounded once more to float32, which differs from
    a single rounding only where the exact sum lies within 2^-29 of a tie.
    """
    return (np.multiply(a, b, dtype=F64) + c).astype(F32)


def exp(x: np.ndarray) -> np.ndarray:
    """e^x in float32: `Sleef_expf_u10` of the SLEEF vector library, which torch's softmax, silu and sigmoid call.

    x = q ln 2 + s with |s| <= ln(2)/2, the polynomial 1 + s + s^2 P(s), times 2^q; within 1 ulp.
    """
    x = np.asarray(x, F32)
    with np.errstate(over="ignore"):  # in the polynomial of a masked score, whose result is 0 all the same
        q = np.rint(np.clip(x, -200, 200) * F32(1.4426950408889634))
        s = fma(q, F32(-0.693145751953125), x)
        s = fma(q, F32(-1.428606765330187045e-06), s)
        p = np.full(x.shape, 0.000198527617612853646278381, F32)
        for c in (0.00139304355252534151, 0.00833336077630519867, 0.0416664853692054749, 0.166666671633720398, 0.5):
            p = fma(p, s, F32(c))
        y = np.ldexp(F32(1) + fma(s * s, p, s), q.astype(np.int32))
        return np.where(x < F32(-104), F32(0), np.where(x > F32(100), F32(np.inf), y)).astype(F32, order="C")


def exp_elementwise(x: np.ndarray) -> np.ndarray:
    """e^x as an elementwise kernel (silu, sigmoid) computes it.

    Whole steps of the vector loop use `exp`, the elements left over at the end the C library's, which rounds correctly
    but for one case in a thousand.
    """
    out, step = exp(x), 4 * this_cpu().lanes
    left = x.size % step if step else x.size
    if left:
        with np.errstate(over="ignore", under="ignore"):
            out.reshape(-1)[-left:] = np.exp(x.reshape(-1)[-left:], dtype=F64).astype(F32)
    return out


# ------------------------------------------------------------------------------------------------ norms and softmax


def row_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis, [..., n] -> [...], in the order of torch.sum and torch.mean on contiguous rows.

    Rows of lanes are dealt to four accumulators, each a cascade of blocks; then the four are added, then what is left
    of the row and the lanes, one after another. Rows shorter than the lanes are summed the same way as one lane.
    """
    lanes = _LANES if x.shape[-1] >= _LANES else 1
    rows = _registers(x, lanes)
    steps = len(rows) // 4
    first, *others = _cascade(_dealt(rows[: 4 * steps], 4))
    of_lanes = chain([first, *rows[4 * steps :], *others])
    return chain([*_left_over(x, lanes), *np.moveaxis(of_lanes, -1, 0)])


def _cascade(terms: np.ndarray) -> np.ndarray:
    """Sum over the first axis: blocks of 16, of whose sums again blocks of 16, four levels in all; what fills no block
    is summed for itself on each level, and the levels are added from the lowest up."""
    levels: list[np.ndarray] = []
    while len(levels) < 3 and len(terms) >= 16:
        whole = len(terms) - len(terms) % 16
        levels.append(chain(terms[whole:]))
        terms = chain(_dealt(terms[:whole], 16).swapaxes(0, 1))
    return chain([*levels, chain(terms)])


def softmax_sum(e: np.ndarray) -> np.ndarray:
    """Sum over the last axis, kept, in the order of torch's softmax kernel: lane by lane, then the lanes as a tree."""
    lanes = this_cpu().lanes or _LANES
    if e.shape[-1] < lanes:
        return chain(np.moveaxis(e, -1, 0))[..., None]
    total = np.moveaxis(chain(_registers(e, lanes)), -1, 0)
    rest = _left_over(e, lanes)
    total[: len(rest)] += rest
    return _tree(total)[..., None]


_Moments = tuple[int, np.ndarray, np.ndarray]  # count, mean, sum of squared deviations
_CHUNK = 16  # registers that the LayerNorm kernel sums before it merges


def moments(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over the last axis, kept, as torch's LayerNorm kernel computes them.

    A row is read two registers at a time: Welford's update down chunks of 16, chunks merged pairwise, then what is left
    one by one, then lane by lane (Chan, Golub, LeVeque 1979). Only in the code for float16 did the compiler fuse the
    multiplication and the addition of what is left.
    """
    count, mean, m2 = 0, np.zeros(x.shape[:-1], F32), np.zeros(x.shape[:-1], F32)
    for term in _left_over(x, 2 * _LANES):
        delta, count = term - mean, count + 1
        mean = mean + delta / F32(count)
        m2 = fma(delta, term - mean, m2) if dtype == "float16" else m2 + delta * (term - mean)
    lane_count, lane_mean, lane_m2 = _lane_moments(_registers(x, 2, _LANES))
    for k in range(_LANES):
        count, mean, m2 = _merge_scalar((lane_count, lane_mean[..., k], lane_m2[..., k]), (count, mean, m2))
    return mean[..., None], (m2 / F32(x.shape[-1]))[..., None]


def _lane_moments(pairs_of_registers: np.ndarray) -> _Moments:
    """[rows, ..., 2, lanes] -> [..., lanes]. Level j of the stack holds 2^j chunks, or nothing."""
    zero = np.zeros((*pairs_of_registers.shape[1:-2], _LANES), F32)
    stack: list[_Moments] = [(0, zero, zero)] * (2 + len(pairs_of_registers).bit_length())
    for done, start in enumerate(range(0, len(pairs_of_registers), _CHUNK), 1):
        chunk, level = pairs_of_registers[start : start + _CHUNK], 0
        for half in (0, 1):
            stack[0] = _merge_lanes(_welford(chunk[..., half, :]), stack[0])
        while done >> level & 1 == 0:
            stack[level + 1], stack[level] = _merge_lanes(stack[level], stack[level + 1]), (0, zero, zero)
            level += 1
    for higher in stack[1:]:
        stack[0] = _merge_lanes(higher, stack[0])
    return stack[0]


def _welford(registers: np.ndarray) -> _Moments:
    mean = m2 = np.zeros(registers.shape[1:], F32)
    for j, x in enumerate(registers, 1):
        delta = x - mean
        mean = fma(delta, F32(1) / F32(j), mean)
        m2 = fma(delta, x - mean, m2)
    return len(registers), mean, m2


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


# ----------------------------------------------------------------------------------------------------------- products

# A product of two numbers of bfloat16 or float16 is exact in float32, so all that distinguishes the kernels is the
# order in which they add. An `Order` is that: the sum of terms a_k b_k over their first axis.
Order = Callable[[np.ndarray], np.ndarray]
_SMALL = 4096
"""A bfloat16 product of so many multiplications or fewer is never oneDNN's."""
_SMALL_BATCHED = 400
"""torch.bmm runs a plain loop where one product has fewer multiplications than this."""
_SETTLE_AT_ONCE = 1 << 18  # numbers gathered at a time: 1 MiB
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
        settled = order((a[i] * b[j]).T)
        y[i, j] = settled if bias is None else settled + bias[j]
    return y


def half_order(dtype: str, rows: int, inner: int, columns: int, *, transposed: bool, batched: bool) -> Order:
    """The order in which torch adds up one product [rows, inner] x [inner, columns] of bfloat16 or float16 matrices.

    transposed: the second matrix is stored as [columns, inner]. batched: one of several, as in attention. (What counts
    for a batch of bfloat16 products is the multiplications of the batch: it is taken to have more than `_SMALL`.)
    """
    if dtype == "bfloat16" and this_cpu().onednn and (batched or rows * inner * columns > _SMALL):
        return partial(pairs, block=512 if rows == 1 or inner <= 1024 else 1024)
    if batched and rows * inner * columns < _SMALL_BATCHED:
        return chain
    return registers if transposed else four_chains


def pairs(terms: np.ndarray, block: int = 512) -> np.ndarray:
    """oneDNN, bfloat16: pair after pair, the odd element first; blocks of the axis are summed for themselves and then
    added. This is the AVX-512 instruction `vdpbf16ps`. (The AMX units of some CPUs add in another order;
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 turns them off.)"""
    terms = np.ascontiguousarray(terms)
    blocks = [terms[start : start + block] for start in range(0, len(terms), block)]
    return chain([chain([part[min(k ^ 1, len(part) - 1)] for k in range(len(part))]) for part in blocks])


def registers(terms: np.ndarray) -> np.ndarray:
    """torch, both matrices along their rows: eight registers of eight lanes each take every 64th product.

    The registers are added as a tree, the lanes as a tree, then what is left: whole pairs of registers, and single
    elements.
    """
    whole = len(terms) - len(terms) % (8 * _LANES)
    paired = len(terms) - (len(terms) - whole) % (2 * _LANES)
    total = _tree(_tree(chain(_dealt(terms[:whole], 8, _LANES))))
    if paired > whole:
        total = total + _tree(chain(_dealt(terms[whole:paired], _LANES)))
    return chain([total, *terms[paired:]])


def four_chains(terms: np.ndarray) -> np.ndarray:
    """torch, the second matrix across its rows: four chains, k = 0, 4, 8, ... and so on, then what is left."""
    terms = np.ascontiguousarray(terms)
    whole = len(terms) - len(terms) % 4
    first, *others = chain(_dealt(terms[:whole], 4))
    return chain([first, *terms[whole:]]) + others[0] + others[1] + others[2]
