"""float32 power, cos and sin as torch's CPU wheels compute them, in NumPy: the same result, bit for bit.

Transformers builds its rotary tables in float32 from these three functions. Correctly rounded results would differ
from torch's in 1 % of the powers and 5 % of the cosines, and an ulp in a frequency becomes a visible angle at a large
position. So these are emulations of the three implementations behind torch on x86-64:

* `power`: SLEEF's powf (Shibata and Petrogalli 2020, "SLEEF: A Portable Vectorized Library of C Standard Mathematical
  Functions", https://sleef.org) for full pairs of vectors, and the C library's powf (glibc 2.28 and later, from Arm's
  optimized-routines) for the elements that are left over.
* `cos`, `sin` for |x| < 10000: Intel MKL's vector math, which reduces by pi and evaluates one odd polynomial of degree
  9 in double precision. Its coefficients were recovered from outputs alone: they solve the linear program that asks
  every output to be the rounded value of the polynomial, over 2.7e9 arguments.

Established against torch 2.13.0 (MKL 2024.2) on an AMD EPYC with AVX-512: 231,168 powers (also with torch restricted to
AVX2 and to scalar code) and 2.3e9 cosines and sines of arguments below 10000 that took no part in the recovery differed
in none. Beyond |x| = 10000 MKL takes another path, from which the correctly rounded value returned here differs in 1 %
of the arguments by one ulp.
"""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np

F32 = np.float32
F64 = np.float64

_SIN = tuple(map(float.fromhex, (
    "-0x1.55554bc836607p-3", "0x1.110ed3804e2efp-7", "-0x1.9f6ffeeab5593p-13", "0x1.5dbdf0e7f4e2ep-19",
)))  # fmt: skip
"""MKL's sin(r) = r + r^3 (s3 + r^2 (s5 + r^2 (s7 + r^2 s9))) on |r| <= pi/2, recovered as described above."""
_FAST_RANGE = 10000.0
_PI_PARTS = tuple(map(float.fromhex, ("0x1.921fb54p+1", "0x1.10b461p-29", "0x1.a62633145c06ep-57")))
"""pi as a sum of parts; the first two have so few bits that their products with half-integers up to 10^7 are exact."""


def sin(x: np.ndarray) -> np.ndarray:
    """sin(x) in float32, any shape, as `torch.sin` gives it (module docstring)."""
    x = np.asarray(x, F32)
    turns = np.rint(x * F32(1 / np.pi)).astype(F64)
    return _beyond_range(_sin_of_reduced(x, turns, turns), x, np.sin)


def cos(x: np.ndarray) -> np.ndarray:
    """cos(x) = sin(x + pi/2) in float32, any shape, as `torch.cos` gives it (module docstring)."""
    x = np.abs(np.asarray(x, F32))
    turns = np.rint((x + F32(np.pi / 2)) * F32(1 / np.pi)).astype(F64)
    return _beyond_range(_sin_of_reduced(x, turns - 0.5, turns), x, np.cos)


def _sin_of_reduced(x: np.ndarray, half_turns: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """(-1)^turns * p(x - half_turns * pi) in float64, with MKL's polynomial p."""
    r = x.astype(F64)
    for part in _PI_PARTS:
        r = r - half_turns * part
    r2 = r * r
    s3, s5, s7, s9 = _SIN
    value = r + r * (r2 * (s3 + r2 * (s5 + r2 * (s7 + r2 * s9))))
    half = turns * 0.5
    return np.where(half != np.floor(half), -value, value)


def _beyond_range(value: np.ndarray, x: np.ndarray, function: np.ufunc) -> np.ndarray:
    """`value` rounded to float32, with the correctly rounded function of x where |x| is out of the fast range."""
    result = value.astype(F32)
    far = ~(np.abs(x) < _FAST_RANGE)
    if far.any():
        result[far] = function(x[far].astype(F64))
    return result


def power(base: float, exponents: np.ndarray) -> np.ndarray:
    """base^y in float32 for a positive base and a vector of float32 exponents, as `base ** tensor` gives it in torch.

    torch's loop takes two vectors at a time; what is left over goes through the C library one by one.
    """
    exponents = np.asarray(exponents, F32)
    base32 = F32(base)
    if not np.finfo(F32).tiny <= base32 < np.inf:
        return np.power(base32, exponents)
    step = 2 * vector_lanes()
    split = exponents.size // step * step if step else 0
    return np.concatenate([_sleef_power(base32, exponents[:split]), _libm_power(base32, exponents[split:])])


def power_of_scalar(base: np.floating, exponent: float) -> np.floating:
    """base^y for one positive float32 base, as `tensor ** y` gives it in torch for one element."""
    return F32(base) * F32(base) if exponent == 2 else F32(F64(base) ** F64(exponent))


@lru_cache(maxsize=1)
def vector_lanes() -> int:
    """The float32 lanes of the vector code that torch selects on this CPU: 16 with AVX-512, 8 with AVX2, else 0."""
    try:  # not part of NumPy's public interface, and without type stubs
        from numpy._core._multiarray_umath import __cpu_features__ as found  # type: ignore[import-not-found]
    except ImportError:
        return 16
    selected = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if selected not in ("avx2", "default") and all(
        found.get(name) for name in ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "FMA3")
    ):
        return 16
    return 8 if selected != "default" and found.get("AVX2") and found.get("FMA3") else 0


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.floating) -> np.ndarray:
    return (np.multiply(a, b, dtype=F64) + c).astype(F32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Horner's rule from the highest coefficient down, in float32 fused multiply-adds."""
    value = np.full(x.shape, F32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = _fma(value, x, F32(coefficient))
    return value


def _sleef_power(base: np.floating, y: np.ndarray) -> np.ndarray:
    """exp(y log base) as SLEEF's powf: float32 polynomials inside double-float sums, which float64 stands in for here.

    log(m) = 2 atanh((m - 1)/(m + 1)) with m in [0.75, 1.5); exp(s) = 1 + s + s^2 u(s) with |s| <= ln(2)/2.
    """
    exponent = np.frexp(F64(base) * F64(F32(1 / 0.75)))[1] - 1
    m = np.full(y.shape, np.ldexp(F64(base), -exponent))
    x = (m - 1) / (m + 1)
    x2 = x * x
    t = _polynomial(
        x2.astype(F32), (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
    )
    third = 0.66666662693023681640625 + 3.69183861259614332084311e-09
    ln2 = 0.69314718246459960938 - 1.904654323148236017e-09
    d = (ln2 * exponent + 2 * x + x2 * x * (x2 * t + third)) * y
    q = np.rint(d.astype(F32) * F32(1.44269504088896340736))
    s = d + (q * F32(-0.693145751953125)).astype(F64) + (q * F32(-1.428606765330187045e-06)).astype(F64)
    coefficients = (
        0.00136324646882712841033936, 0.00836596917361021041870117, 0.0416710823774337768554688,
        0.166665524244308471679688, 0.499999850988388061523438,
    )  # fmt: skip
    u = _polynomial(s.astype(F32), coefficients)
    return np.ldexp((1 + (s + s * s * u)).astype(F32), q.astype(np.int32))


# log2 of the leading bits, in 16 intervals: 1/c and log2(c) of a point c of each.
_INV_C = tuple(map(float.fromhex, (
    "0x1.661ec79f8f3bep+0", "0x1.571ed4aaf883dp+0", "0x1.49539f0f010bp+0", "0x1.3c995b0b80385p+0",
    "0x1.30d190c8864a5p+0", "0x1.25e227b0b8eap+0", "0x1.1bb4a4a1a343fp+0", "0x1.12358f08ae5bap+0",
    "0x1.0953f419900a7p+0", "0x1p+0", "0x1.e608cfd9a47acp-1", "0x1.ca4b31f026aap-1",
    "0x1.b2036576afce6p-1", "0x1.9c2d163a1aa2dp-1", "0x1.886e6037841edp-1", "0x1.767dcf5534862p-1",
)))  # fmt: skip
_LOG2 = tuple(map(float.fromhex, (
    "0x1.27616c9496e0bp-2", "-0x1.71969a075c67ap-2", "0x1.ec70a6ca7baddp-2", "-0x1.7154748bef6c8p-1",
    "0x1.71547652ab82bp0",
)))  # fmt: skip
_EXP2 = tuple(map(float.fromhex, ("0x1.c6af84b912394p-5", "0x1.ebfce50fac4f3p-3", "0x1.62e42ff0c52d6p-1")))


def _libm_power(base: np.floating, y: np.ndarray) -> np.ndarray:
    """2^(y log2 base) as glibc's powf: float64 throughout, polynomials of degree 5 and 3 after table look-ups."""
    bits = int(np.asarray(base, F32).view(np.int32))
    offset = bits - 0x3F330000
    k, i = offset >> 23, (offset >> 19) % 16
    z = float(np.asarray(bits - (k << 23), np.int32).view(F32))
    a5, a4, a3, a2, a1 = _LOG2
    r = z * _INV_C[i] - 1
    log2 = (a5 * r + a4) * r**4 + ((a3 * r + a2) * r**2 + (a1 * r + (k - np.log2(_INV_C[i]))))
    v = y.astype(F64) * log2
    steps = np.rint(v * 32)
    r = v - steps / 32
    e3, e2, e1 = _EXP2
    return (((e3 * r + e2) * (r * r) + (e1 * r + 1)) * np.exp2(steps / 32)).astype(F32)
