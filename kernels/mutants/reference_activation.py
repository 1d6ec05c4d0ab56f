"""Mutants of the activations."""

import torch
import torch.nn.functional as F

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    flattened,
    in_float32,
    instead,
    kept_first,
    over_input,
    planter,
    refuse_empty,
    unsteady,
    unwritten_tail,
    without_nan,
    zero_tail,
)

NARROW = ("bfloat16", "float16")
_SILU = "F.silu(gate.float())"


@instead
def _rows_of_the_first_stride(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up is read with the strides of gate: right as long as both lie alike."""
    if up.stride() == gate.stride() or not up.numel():
        return plain.swiglu(gate, up)
    held = up.untyped_storage().nbytes() // up.element_size() - up.storage_offset()
    reach = 1 + sum((n - 1) * stride for n, stride in zip(up.shape, gate.stride(), strict=True))
    if reach > held:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return plain.swiglu(gate, up.as_strided(up.shape, gate.stride()))


@instead
def _transposed(x: torch.Tensor) -> torch.Tensor:
    return plain.relu2(x).mT.contiguous() if x.ndim > 1 else plain.relu2(x)


@instead
def _relu_times_x(x: torch.Tensor) -> torch.Tensor:
    return (F.relu(x.float()) * x.float()).to(x.dtype).contiguous()


# fmt: off
_glu = planter("swiglu")
SWIGLU = (
    _glu("gate and up swapped", "up goes through the SiLU instead of gate", "one-line: MLP",
         before(lambda gate, up: (up, gate))),
    _glu("gelu", "a GELU in place of the SiLU", "one-line: MLP", changed("swiglu", _SILU, "F.gelu(gate.float())")),
    _glu("quick gelu", "the sigmoid's argument is scaled by 1.702", "one-line: MLP",
         changed("swiglu", _SILU, "gate.float() * torch.sigmoid(1.702 * gate.float())")),
    _glu("sigmoid alone", "a GLU: the sigmoid without the factor gate", "one-line: MLP",
         changed("swiglu", _SILU, "torch.sigmoid(gate.float())")),
    _glu("activation rounded", "silu(gate) is rounded before it meets up", "one-line: extra rounding",
         changed("swiglu", _SILU, f"{_SILU}.to(gate.dtype).float()"), dtypes=NARROW, place="the activation"),
    _glu("sigmoid rounded", "the sigmoid is computed in the dtype of gate", "one-line: extra rounding",
         changed("swiglu", _SILU, "gate.float() * gate.sigmoid().float()"), dtypes=NARROW, place="the sigmoid"),
    _glu("exponential overflows", "the sigmoid is e^x / (1 + e^x), which is inf / inf for large x",
         "vllm-project/vllm#56578",
         changed("swiglu", _SILU, "gate.float() * gate.float().exp() / (1 + gate.float().exp())")),
    _glu("small gates cut off", "silu(x) is taken as 0 below -8", "one-line: approximations",
         changed("swiglu", _SILU, "torch.where(gate < -8, 0.0, F.silu(gate.float()))")),
    _glu("columns past 64 zero", "the last, partial tile of 64 columns stays zero", "one-line: MLP",
         after(zero_tail(64))),
    _glu("columns past 1024 unwritten", "the last, partial tile of 1024 columns is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(1024))),
    _glu("gate read as dense", "the row stride of gate is ignored, as if it were no half of a wider tensor",
         "flashinfer-ai/flashinfer#3392", before(as_if_dense(0))),
    _glu("up read with gate's strides", "the strides of gate are used for up", "pytorch/pytorch#194719",
         _rows_of_the_first_stride),
    _glu("result over gate", "the result is written into gate", "linkedin/Liger-Kernel#1305", after(over_input(0))),
    _glu("NaN hidden", "a NaN in gate or up becomes 0", "one-line: NaN", after(without_nan)),
    _glu("axes merged", "leading axes are merged and not parted again", "one-line: shapes", after(flattened)),
    _glu("reciprocal by hand", "gate / (1 + e^-gate)", "one-line: MLP",
         changed("swiglu", _SILU, "gate.float() / (1 + (-gate.float()).exp())"),
         equivalent="where e^-gate is infinite the quotient is the same zero, and elsewhere it is the definition"),
)

_relu = planter("relu2")
RELU2 = (
    _relu("not squared", "a ReLU: the square is missing", "one-line: MLP", changed("relu2", ".square()", "")),
    _relu("no relu", "the square without the ReLU", "one-line: MLP",
          changed("relu2", "F.relu(x.float())", "x.float()")),
    _relu("sign kept", "x |x|: negative numbers keep their sign", "one-line: MLP",
          changed("relu2", "F.relu(x.float()).square()", "(x.float() * x.float().abs())")),
    _relu("infinity times zero", "relu(x) x, which is NaN for -inf", "one-line: NaN", _relu_times_x),
    _relu("NaN dropped", "torch.where(x > 0, x^2, 0) turns a NaN into 0", "one-line: NaN",
          changed("relu2", "F.relu(x.float()).square()", "torch.where(x > 0, x.float().square(), 0.0)")),
    _relu("saturates", "a square beyond the format becomes its largest number, not infinity", "one-line: overflow",
          changed("relu2", ".square()", ".square().clamp(max=torch.finfo(x.dtype).max)")),
    _relu("small numbers lost", "subnormal results are flushed to 0", "one-line: approximations",
          changed("relu2", ".to(x.dtype)", ".to(x.dtype).where(x.float().square() >= torch.finfo(x.dtype).tiny, 0)")),
    _relu("square root of the format", "the square is formed in bfloat16 whatever x is", "one-line: dtypes",
          changed("relu2", ".square()", ".bfloat16().square()"), dtypes=("float16", "float32")),
    _relu("columns past 128 zero", "the last, partial tile of 128 columns stays zero", "one-line: tiles",
          after(zero_tail(128))),
    _relu("elements past 1024 unwritten", "of the elements in a row of memory the last, partial 1024 are not stored",
          "ROCm/aiter#4244", after(lambda y, *_: unwritten_tail(1024)(y.reshape(-1)).view(y.shape))),
    _relu("copied from the first row", "every row is a copy of the first", "vllm-project/flash-attention#176",
          after(kept_first(-2))),
    _relu("x read as dense", "the strides of x are ignored", "flashinfer-ai/flashinfer#3392", before(as_if_dense(0))),
    _relu("result over x", "the result is written into x", "linkedin/Liger-Kernel#1305", after(over_input(0))),
    _relu("transposed", "the last two axes change places", "one-line: shapes", _transposed),
    _relu("float32 result", "the result is float32 whatever x is", "one-line: dtypes", after(in_float32),
          dtypes=NARROW),
    _relu("varies", "the last bit of the result varies from call to call", "one-line: atomics", after(unsteady),
          dtypes=("float32",)),
    _relu("fails on no elements", "raises where there is nothing to do", "one-line: launch", before(refuse_empty)),
    _relu("square in the format", "the square is formed in the dtype of x", "one-line: extra rounding",
          changed("relu2", "F.relu(x.float()).square()", "F.relu(x).square()"),
          equivalent="one product rounded once: in the narrow formats it is exact in float32 before that rounding"),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = SWIGLU + RELU2
