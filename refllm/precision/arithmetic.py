"""How numbers are rounded: exact float64, or the emulation of a smaller format under a named policy.

Every operator of `refllm.ops` is written once, over an `Arithmetic`: it calls `ar.matmul`, `ar.exp`, ... for what a
machine can do in more than one way, and `ar.round(x, "point")` at each place where an implementation may round. In
exact mode both are plain float64 and the identity. Under emulation values live in float32 arrays whose elements lie on
the grid of the emulated format, and a *policy* says at which of the named points they are put back onto it.

========================== ============================================================================================
rounding point             the value rounded there
========================== ============================================================================================
linear                     x W^T + b, accumulated in float32
rms_norm.normalized        x / rms(x), before the weight
rms_norm, layer_norm       the norm's result
rope.table                 cos and sin
rope.product               each product x * cos and rotated x * sin
rope                       their sum
attention.scores           q k^T
attention.scaled           ... times the scale
attention.masked           ... plus the mask
attention.weights          softmax weights (normalised first, or unnormalised: see `Policy.normalize_first`)
attention                  weights times v
activation                 act(x)
glu.activation             act(gate)
glu                        act(gate) * up
add                        residual sums
========================== ============================================================================================

In the backward pass (`refllm.ops`, names that end in `_backward`; G stands for the gradient of a result):

========================== ============================================================================================
rounding point             the value rounded there
========================== ============================================================================================
linear.grad                G W, G^T x and the sum of G
rms_norm.grad.scaled       G times the weight
rms_norm.grad.terms        each row's term of the weight's gradient
rms_norm.grad              gradients of x and weight; layer_norm.grad: those of x, weight and bias
layer_norm.grad.statistics mean and 1 / standard deviation as the forward pass kept them (torch's CPU kernel: rounded)
layer_norm.grad.sum        the sums over rows, after every addition (as that kernel adds, on one thread)
rope.grad.product          each product G * cos and G * sin; rope.grad: their sum
attention.grad.weights     G v^T
attention.grad.scores      gradient of the softmax's argument; attention.grad.scaled: ... times the scale
attention.grad.heads       each query head's part of the gradients of k and v
attention.grad.blocks      or their sum, after every block of queries of every head (torch's CPU kernel)
attention.grad             gradients of q, k and v
activation.grad            G act'(x)
glu.grad.activation        G times up
glu.grad                   gradients of gate and up
add.grad                   the sum of the gradients of a value that two operators read
embedding.grad.sum         the sum over the places of one id, after every addition; embedding.grad: at the end
cross_entropy.grad         gradient of the logits; loss.grad: the same of the other losses
========================== ============================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from refllm.errors import InputError
from refllm.precision import torch_cpu
from refllm.precision.dtype_names import dtype_name

DTYPES = ("float64", "float32", "bfloat16", "float16")
Dtype = str
_GRADIENTS = frozenset(
    f"{name}.grad"
    for name in ("linear", "rms_norm", "layer_norm", "rope", "attention", "activation", "glu", "add", "embedding")
) | {"cross_entropy.grad", "loss.grad"}
_ON_THE_WAY_BACK = {"rms_norm.normalized": ("rms_norm.grad.scaled", "rms_norm.grad.terms")}
"""Where code does not round backwards that does not round forwards. (A rotation in float32 does: each of its products
hands its own gradient back to the input, in the format of that.)"""
_OUTPUTS = frozenset({"linear", "rms_norm", "layer_norm", "rope", "attention.weights", "attention", "add"})


@dataclass(frozen=True)
class Policy:
    """Where an implementation rounds.

    points: the names of the rounding points (module docstring) at which it does.
    normalize_first: softmax weights are divided by their sum before they are rounded (eager code) or the result is
        after the product with v (flash-style kernels).
    torch_order: in bfloat16 and float16, sums, exp and LayerNorm run in the order of torch's CPU kernels
        (`refllm.precision.torch_cpu`). What is promised with it: see `HF_EAGER`.
    masked_rows_are_zero: a query with no key to attend to yields 0; otherwise masked scores are pushed down by the
        smallest finite number, and such a row becomes the mean of all values, as in Transformers' eager attention.
    """

    name: str
    points: frozenset[str]
    normalize_first: bool
    torch_order: bool
    masked_rows_are_zero: bool

    @property
    def forward_points(self) -> frozenset[str]:
        """Those of the forward pass."""
        return frozenset(point for point in self.points if ".grad" not in point)

    def without(self, points: frozenset[str]) -> "Policy":
        """The same policy, not rounding at `points`: how a model page states what its family does differently. What is
        multiplied in float32 is so on the way back as well."""
        back = {point for forward in points for point in _ON_THE_WAY_BACK.get(forward, ())}
        return replace(self, points=self.points - points - back)


HF_EAGER = Policy(
    name="hf-eager",
    points=_OUTPUTS
    | {"rms_norm.normalized", "rope.table", "rope.product", "attention.scores", "attention.scaled", "attention.masked"}
    | {"activation", "glu.activation", "glu"}
    | _GRADIENTS
    | {"rms_norm.grad.scaled", "rms_norm.grad.terms", "layer_norm.grad.statistics", "layer_norm.grad.sum"}
    | {"rope.grad.product", "glu.grad.activation", "embedding.grad.sum"}
    | {"attention.grad.weights", "attention.grad.scores", "attention.grad.scaled", "attention.grad.heads"},
    normalize_first=True,
    torch_order=True,
    masked_rows_are_zero=False,
)
"""Transformers with attn_implementation="eager": every torch call rounds its result to the model's dtype.

On every CPU: the rounding points are Transformers'. In bfloat16 and float16 an operator's result on the same inputs
therefore differs from Transformers' only where another order of float32 additions, or another float32 function of the
math library, crosses a rounding boundary, and then by one step of the format; in float32, by the error of the float32
sums themselves. On the CPUs whose orders `refllm.precision.torch_cpu` has (`refllm info` compares): in bfloat16 and
float16, on one thread, the same bits, but for rotary tables, of whose entries about 1 in 100,000 (float16) or 1,000,000
(bfloat16) is rounded correctly here and not by torch's cos.
"""

HF_SDPA = replace(
    HF_EAGER,
    name="hf-sdpa",
    points=HF_EAGER.points
    - {"attention.scores", "attention.scaled", "attention.masked", "attention.grad.weights", "attention.grad.scaled"}
    | {"attention.grad.blocks"},
    normalize_first=False,
    masked_rows_are_zero=True,
)
"""Transformers with attn_implementation="sdpa", its default: one attention kernel, float32 inside, as in `FUSED`. On
the way back torch's kernel rounds the gradient of the scores before its products, and sums over queries in blocks."""

FUSED = Policy(
    name="fused",
    points=_OUTPUTS | {"rope.table", "activation", "glu"} | _GRADIENTS | {"attention.grad.scores"},
    normalize_first=False,
    torch_order=False,
    masked_rows_are_zero=True,
)
"""A good fused kernel: float32 inside, one rounding at each kernel's output, softmax weights rounded before P V; and
on the way back the gradient of the scores before its products with k and q, which tensor cores take in one format."""

NATIVE = Policy("native", frozenset(), normalize_first=False, torch_order=False, masked_rows_are_zero=True)
"""Plain NumPy in the working precision: float64 when exact, float32 when speed matters."""

POLICIES = {policy.name: policy for policy in (HF_EAGER, HF_SDPA, FUSED)}


_LARGEST_FLOAT16, _LEAST_NORMAL_FLOAT16 = np.float32(65504), np.float32(2.0**-14)
_EXPONENT_BITS = np.uint32(0xFF << 23)  # of a float32
_WORTH_ROUNDING_BY_SUMS = 2048  # numbers: with fewer, nine calls of NumPy cost more than they save


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as float32. NaN stays NaN, overflow becomes infinity."""
    with np.errstate(invalid="ignore"):  # of a NaN that signals
        return np.asarray(x, np.float32, order="C").astype(ml_dtypes.bfloat16).astype(np.float32)


def round_float16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest float16, ties to even, as float32. Overflow (above 65504) becomes infinity."""
    if x.size < _WORTH_ROUNDING_BY_SUMS or not (x.min() >= -_LARGEST_FLOAT16 and x.max() <= _LARGEST_FLOAT16):
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(np.float16).astype(np.float32)
    # No vector instruction of NumPy's makes a float16. But a float32 sum is rounded to the spacing of the sum, which is
    # that of the float16 beside x where the other term is 1.5 * 2^13 times the power of two below x.
    shift = np.array(x, np.float32)
    bits = shift.view(np.uint32)
    bits &= _EXPONENT_BITS
    np.maximum(shift, _LEAST_NORMAL_FLOAT16, out=shift)
    shift *= np.float32(1.5 * 2**13)
    out = x + shift
    out -= shift
    return np.copysign(out, x, out=out)  # what vanishes keeps its sign


_ROUND: dict[Dtype, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": round_bfloat16,
    "float16": round_float16,
    "float32": lambda x: np.asarray(x, np.float32),
    "float64": lambda x: np.asarray(x, np.float64),
}


def rounding(dtype: Dtype) -> Callable[[np.ndarray], np.ndarray]:
    """The function that puts an array onto the grid of `dtype` (float64 for "float64", else held in float32)."""
    return _ROUND[check_dtype(dtype)]


def check_dtype(dtype: Any) -> Dtype:
    """The one of `DTYPES` that `dtype` names, in any of the ways of `dtype_name`, else InputError."""
    if type(dtype) is str and dtype in DTYPES:
        return dtype
    name = dtype_name(dtype)
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return name


@lru_cache
def largest(dtype: Dtype) -> float:
    """The largest finite number of a format: 65504 for float16, about 3.4e38 for bfloat16 and float32."""
    return float(ml_dtypes.finfo(dtype).max)


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that operators compute with: a format, the policy for it, and the matrix product.

    dtype: one of `DTYPES`. "float64" is exact mode: nothing is rounded anywhere.
    policy: `HF_EAGER`, `FUSED`, `NATIVE`, or one of your own.
    product: replaces the matrix product, [..., M, K] x [..., K, N]; None takes the policy's.
    """

    dtype: Dtype = "float64"
    policy: Policy = NATIVE
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def exact(self) -> bool:
        return self.dtype == "float64"

    @property
    def work(self) -> type[np.floating]:
        """The NumPy type that values are held in."""
        return np.float64 if self.exact else np.float32

    @property
    def emulates_torch(self) -> bool:
        """Whether sums run in torch's order: where it shows. In float32 every CPU and every version has its own."""
        return self.policy.torch_order and self.dtype in ("bfloat16", "float16")

    def array(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x, self.work)

    def round(self, x: np.ndarray, point: str) -> np.ndarray:
        """x on the grid of the format if the policy rounds at `point`, else x itself."""
        if self.dtype in ("float64", "float32") or point not in self.policy.points:
            return x
        return _ROUND[self.dtype](x)

    def matmul(self, a: np.ndarray, b: np.ndarray, *, heads: int = 1) -> np.ndarray:
        """a @ b, [..., M, K] x [..., K, N], accumulated in the working precision.

        heads: how many products with the same b the rows of a are made of (grouped heads); the sums do not depend on
        it, but the order in which torch adds them does.
        """
        if self.product is not None:
            return self.product(a, b)
        if not self.emulates_torch:
            return np.matmul(a, b)
        return self._half_product(a, np.swapaxes(b, -1, -2), None, heads, transposed=False)

    def matmul_t(self, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None, *, heads: int = 1) -> np.ndarray:
        """a b^T + bias, [..., M, K] x [..., N, K] + [N]: every row of a with every row of b. heads: see `matmul`."""
        if self.product is None and self.emulates_torch:
            return self._half_product(a, b, bias, heads, transposed=True)
        y = self.matmul(a, np.swapaxes(b, -1, -2))
        return y if bias is None else y + bias

    def _half_product(
        self, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None, heads: int, *, transposed: bool
    ) -> np.ndarray:
        (M, K), N = a.shape[-2:], b.shape[-2]
        order = torch_cpu.half_order(self.dtype, M // heads, K, N, transposed=transposed, batched=a.ndim > 2)
        return torch_cpu.half_product(a, b, bias, order, _ROUND[self.dtype])

    def exp(self, x: np.ndarray) -> np.ndarray:
        """e^x, as activations compute it."""
        return torch_cpu.exp_elementwise(x) if self.emulates_torch else np.exp(x)

    def softmax_exp(self, x: np.ndarray) -> np.ndarray:
        """e^x, as softmax computes it. May overwrite x."""
        return torch_cpu.exp(x) if self.emulates_torch else np.exp(x, out=x)

    def mean(self, x: np.ndarray) -> np.ndarray:
        """Mean over the last axis, kept."""
        if self.emulates_torch:
            return (torch_cpu.row_sum(x) / np.float32(x.shape[-1]))[..., None]
        return np.add.reduce(x, axis=-1, keepdims=True) / x.dtype.type(x.shape[-1])  # np.mean without its detours

    def softmax_sum(self, e: np.ndarray) -> np.ndarray:
        """Sum of softmax weights over the last axis, kept."""
        return torch_cpu.softmax_sum(e) if self.emulates_torch else np.sum(e, axis=-1, keepdims=True)

    def standardize(self, x: np.ndarray, eps: float) -> np.ndarray:
        """(x - mean) / sqrt(var + eps) over the last axis, var the biased variance."""
        if self.emulates_torch:
            mean, var = torch_cpu.moments(x, self.dtype)
            scale = 1 / np.sqrt(var + np.float32(eps))
            return torch_cpu.fma(x, scale, -scale * mean)  # torch's kernel multiplies before it subtracts
        centred = x - np.mean(x, axis=-1, keepdims=True)
        return centred * (1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps))

    def scale_and_shift(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """x * weight + bias; torch's LayerNorm kernel fuses the two."""
        if bias is None:
            return x * weight
        return torch_cpu.fma(x, weight, bias) if self.emulates_torch else x * weight + bias


EXACT = Arithmetic()
"""Exact mode: float64 everywhere, also where Transformers forces float32."""


def arithmetic(dtype: Dtype, policy: str | Policy | None = None) -> Arithmetic:
    """The arithmetic that `refllm.load(dtype=..., policy=...)` means.

    policy None: exact for float64, plain NumPy for float32, "hf-eager" for bfloat16 and float16. With float32,
    "hf-eager" is the same steps as Transformers' eager forward (weights of attention are normalised before the product
    with v, a query without keys averages all values), each in NumPy's float32.
    Raises InputError for an unknown name, or for a policy with float64, where there is nothing to round.
    """
    dtype = check_dtype(dtype)
    if policy is not None and not isinstance(policy, Policy):
        if policy not in POLICIES:
            raise InputError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
        policy = POLICIES[policy]
    if dtype == "float64":
        if policy is not None:
            raise InputError(f"policy={policy.name!r} rounds, and dtype='float64' is exact; leave the policy out")
        return EXACT
    if policy is None:
        policy = NATIVE if dtype == "float32" else HF_EAGER
    return Arithmetic(dtype, policy)
