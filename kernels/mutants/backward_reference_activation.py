"""Mutants of the gradients of SwiGLU and squared ReLU."""

from functools import partial
from typing import Any

import torch

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    flattened,
    in_float32,
    in_memory_of,
    kept_first,
    missing,
    over_input,
    planter,
    refuse_empty,
    strides_of,
    unwritten_tail,
    without_nan,
)

NARROW = ("bfloat16", "float16")
_TERM, _SIGN, _SCALE = "one-line: missing term", "one-line: sign", "one-line: scale"
_SWAPPED, _EXTRA, _STRIDES = "one-line: swapped", "one-line: extra rounding", "one-line: strides"
_swiglu_changed = partial(changed, "swiglu_backward")
_relu2_changed = partial(changed, "relu2_backward")
_SLOPE = "s * (1 + x * (1 - s))"
_DX = "2 * F.relu(wide(x)) * wide(dy)"


def _first_row_of_dgate(y: torch.Tensor, *_: Any) -> torch.Tensor:
    return kept_first(-2)(y)


# fmt: off
_swiglu = planter("swiglu_backward")
SWIGLU = (
    _swiglu("slope of the logistic", "silu'(x) is taken for s (1 - s)", _TERM, _swiglu_changed(_SLOPE, "s * (1 - s)")),
    _swiglu("slope without its second term", "silu'(x) is taken for s(x)", _TERM, _swiglu_changed(_SLOPE, "s")),
    _swiglu("slope without the logistic", "silu'(x) lacks its factor s(x)", _TERM,
            _swiglu_changed(_SLOPE, "(1 + x * (1 - s))")),
    _swiglu("sign in the slope", "silu'(x) is s (1 - x (1 - s))", _SIGN,
            _swiglu_changed(_SLOPE, "s * (1 - x * (1 - s))")),
    _swiglu("slope squared", "silu'(x) has its logistic squared", _SCALE,
            _swiglu_changed(_SLOPE, "s * s * (1 + x * (1 - s))")),
    _swiglu("slope of gelu", "the slope is that of x s(1.702 x)", "one-line: MLP",
            _swiglu_changed(_SLOPE, "torch.sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - torch.sigmoid(1.702 * x)))")),
    _swiglu("up forgotten", "dgate lacks its factor up", _TERM, _swiglu_changed("d * u * s", "d * s")),
    _swiglu("dh forgotten", "dup lacks its factor dh", _TERM, _swiglu_changed("d * F.silu(x)", "F.silu(x)")),
    _swiglu("gate for silu(gate)", "dup is dh times gate", _TERM, _swiglu_changed("d * F.silu(x)", "d * x")),
    _swiglu("logistic for silu", "dup is dh times s(gate)", _TERM, _swiglu_changed("d * F.silu(x)", "d * s")),
    _swiglu("dgate in the place of dup", "the forward value is written where dup belongs", "unslothai/unsloth#3314",
            _swiglu_changed("d * F.silu(x)", "u * F.silu(x)")),
    _swiglu("results swapped", "dgate and dup are returned for each other", _SWAPPED,
            _swiglu_changed("return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()",
                            "return dup.to(up.dtype).contiguous(), dgate.to(gate.dtype).contiguous()")),
    _swiglu("gate for up", "gate and up are taken for each other", _SWAPPED,
            before(lambda dh, gate, up: (dh, up, gate))),
    _swiglu("row pointer not advanced", "the pointer of dgate stays at the first row",
            "ByteDance-Seed/Triton-distributed#180", after(_first_row_of_dgate)),
    _swiglu("row pointer of dup not advanced", "the pointer of dup stays at the first row",
            "ByteDance-Seed/Triton-distributed#180", after(kept_first(-2), 1)),
    _swiglu("silu from the result", "silu(gate) is found again as h / up, which is 0 / 0 where up is 0",
            "one-line: NaN",
            _swiglu_changed("d * F.silu(x)", "d * ((F.silu(x) * u) / u)")),
    _swiglu("logistic by exponentials", "s(x) is e^x / (1 + e^x), which overflows", "vllm-project/vllm#56578",
            _swiglu_changed("torch.sigmoid(x)", "torch.exp(x) / (1 + torch.exp(x))")),
    _swiglu("logistic rounded", "s(x) is rounded to bfloat16", "one-line: narrow",
            _swiglu_changed("torch.sigmoid(x)", "torch.sigmoid(x).bfloat16().to(x.dtype)"),
            dtypes=("float16", "float32")),
    _swiglu("dh up rounded", "dh up is rounded before the slope", _EXTRA,
            _swiglu_changed("dgate = d * u * s", "dgate = wide((d * u).to(gate.dtype)) * s"), dtypes=NARROW,
                            place="dh up"),
    _swiglu("silu rounded", "silu(gate) is rounded before dh", _EXTRA,
            _swiglu_changed("d * F.silu(x)", "d * wide(F.silu(x).to(gate.dtype))"), dtypes=NARROW,
                            place="the activation"),
    _swiglu("dgate over gate", "dgate is written over gate, which was kept", "linkedin/Liger-Kernel#272",
            after(over_input(1))),
    _swiglu("dup over up", "dup is written over up, which was kept", "unslothai/unsloth#3314", after(over_input(2), 1)),
    _swiglu("forward value over dh", "silu(gate) up is written over dh", "unslothai/unsloth#3314",
            after(lambda y, dh, gate, up: (y, over_input(0)(torch.nn.functional.silu(gate.float()) * up.float(),
            dh))[0])),
    _swiglu("dup in the memory of dh", "dup is written into dh, and is the same memory", "linkedin/Liger-Kernel#1305",
            after(in_memory_of(0), 1)),
    _swiglu("dh read with strides of gate", "dh is read with the strides of gate", "Dao-AILab/flash-attention#355",
            before(strides_of(0, 1))),
    _swiglu("dh read as dense", "the strides of dh are ignored, those of an expanded one too",
            "ROCm/TransformerEngine#623", before(as_if_dense(0))),
    _swiglu("gate read as dense", "the strides of gate, a half of a tensor, are ignored", _STRIDES,
            before(as_if_dense(1))),
    _swiglu("up read with strides of dh", "up is read with the strides of dh", "pytorch/pytorch#146377",
            before(strides_of(2, 0))),
    _swiglu("columns past 128 unwritten", "the last, partial tile of 128 columns of dup is never stored",
            "ROCm/aiter#4244",
            after(unwritten_tail(128), 1)),
    _swiglu("dup missing", "up gets no gradient", "one-line: missing gradient", after(missing, 1)),
    _swiglu("dgate in float32", "dgate is not in the dtype of gate", "one-line: dtype", after(in_float32),
            dtypes=NARROW),
    _swiglu("axes merged", "leading axes of dgate are merged", "one-line: shapes", after(flattened)),
    _swiglu("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)

_relu2 = planter("relu2_backward")
RELU2 = (
    _relu2("factor 2 forgotten", "dx is max(x, 0) dy", _SCALE, _relu2_changed(_DX, "F.relu(wide(x)) * wide(dy)")),
    _relu2("slope of relu", "dx is dy where x is positive", _TERM,
           _relu2_changed(_DX, "torch.where(x > 0, wide(dy), 0.0)")),
    _relu2("slope of a square", "dx is 2 x dy, for negative x too", _TERM,
           _relu2_changed(_DX, "2 * wide(x) * wide(dy)")),
    _relu2("slope of |x|", "dx is 2 |x| dy", _SIGN, _relu2_changed(_DX, "2 * wide(x).abs() * wide(dy)")),
    _relu2("result for x", "dx is 2 max(x, 0)^2 dy: the result was kept, not x", "one-line: saved value",
           _relu2_changed(_DX, "2 * F.relu(wide(x)).square() * wide(dy)")),
    _relu2("leaky", "dx is a hundredth of 2 x dy for negative x", _TERM,
           _relu2_changed(_DX, "2 * F.leaky_relu(wide(x)) * wide(dy)")),
    _relu2("dy forgotten", "dx is 2 max(x, 0)", _TERM, _relu2_changed(_DX, "2 * F.relu(wide(x))")),
    _relu2("dy positive only", "what comes in passes only where it is positive", _TERM,
           _relu2_changed(_DX, "2 * F.relu(wide(x)) * F.relu(wide(dy))")),
    _relu2("slope capped", "the slope is at most 6, as that of relu6", "one-line: MLP",
           _relu2_changed(_DX, "2 * F.relu6(wide(x)) * wide(dy)")),
    _relu2("slope in float16", "2 max(x, 0) is formed in float16, where it overflows", "one-line: overflow",
           _relu2_changed(_DX, "wide((2 * F.relu(wide(x))).half()) * wide(dy)")),
    _relu2("slope in bfloat16", "2 max(x, 0) is rounded to bfloat16", "one-line: narrow",
           _relu2_changed(_DX, "wide((2 * F.relu(wide(x))).bfloat16()) * wide(dy)"), dtypes=("float16", "float32")),
    _relu2("NaN swallowed", "a NaN in x gives 0", "one-line: NaN", after(without_nan)),
    _relu2("dx over x", "dx is written over x, which was kept", "linkedin/Liger-Kernel#272", after(over_input(1))),
    _relu2("dx in the memory of dy", "dx is written into dy, and is the same memory", "unslothai/unsloth#4533",
           after(in_memory_of(0))),
    _relu2("dy read with strides of x", "dy is read with the strides of x", "pytorch/pytorch#146377",
           before(strides_of(0, 1))),
    _relu2("dy read as dense", "the strides of dy are ignored, those of an expanded one too",
           "ROCm/TransformerEngine#623", before(as_if_dense(0))),
    _relu2("x read as dense", "the strides of x are ignored", _STRIDES, before(as_if_dense(1))),
    _relu2("columns past 128 unwritten", "the last, partial tile of 128 columns is never stored", "ROCm/aiter#4244",
           after(unwritten_tail(128))),
    _relu2("rows copied from the first", "every row gets the dx of the first", "vllm-project/flash-attention#176",
           after(kept_first(-2))),
    _relu2("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = SWIGLU + RELU2
