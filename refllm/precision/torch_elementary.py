"""float32 powers as torch's CPU code computes them, in NumPy: the frequencies of Transformers' rotary tables.

An ulp in a frequency becomes a visible angle at a large position, so that frequencies which are correctly rounded (they
differ from torch's in 1 of 60) would be further from Transformers' than its own rounding of cos and sin is. torch calls
SLEEF's powf on every CPU with AVX2 or better for full pairs of vectors (Shibata and Petrogalli 2020, "SLEEF: A Portable
Vectorized Library of C Standard Mathematical Functions", https://sleef.org), and the C library's for the elements that
are left over. The first is emulated here, bit for bit; the second rounds correctly but for 1 case in 1000, and is
computed so.

cos and sin need no such care: in `refllm.ops.rope_tables` they are correctly rounded, where torch's are so in 95 %.
"""

import numpy as np

from refllm.precision.torch_cpu import F32, F64, fma, this_cpu


def power(base: float, exponents: np.ndarray) -> np.ndarray:
    """base^y in float32 for a positive base and a vector of float32 exponents, as torch's `base ** tensor`."""
    exponents, base32 = np.asarray(exponents, F32), F32(base)
    if not np.finfo(F32).tiny <= base32 < np.inf:
        return np.power(base32, exponents)
    step = 2 * this_cpu().lanes  # torch's loop takes two vectors at a time
    split = exponents.size // step * step if step else 0
    rest = (F64(base32) ** exponents[split:].astype(F64)).astype(F32)
    return np.concatenate([_sleef_power(base32, exponents[:split]), rest])


def power_of_scalar(base: np.floating, exponent: float) -> np.floating:
    """base^y for one positive float32 base, as `tensor ** y` gives it in torch for one element."""
    return F32(base) * F32(base) if exponent == 2 else F32(F64(base) ** F64(exponent))


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Horner's rule from the highest coefficient down, in float32 fused multiply-adds."""
    value = np.full(x.shape, F32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = fma(value, x, F32(coefficient))
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
