"""Mutants of the activation kernels: kernels/triton/swiglu.py and relu2.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, planted

_ROW = "row = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors"
_ROW_32 = "row = tl.program_id(0) // tiles"
_TILES = ("tiles = tl.cdiv(F, BLOCK_F)", "tiles = tl.maximum(1, F // BLOCK_F)")
_SILU_32 = "tl.div_rn(gate, 1.0 + exp_fp32(-gate))"
_SILU_16 = "gate / (1.0 + tl.exp(-gate))"
_SWIGLU_STORE = "tl.store(y_ptr + row * F + columns, (silu * up).to(y_ptr.dtype.element_ty), mask=columns < F)"
_RELU2_STORE = "tl.store(y_ptr + row * F + columns, (x * x).to(y_ptr.dtype.element_ty), mask=columns < F)"

_swiglu = partial(planted, "swiglu", "swiglu")
SWIGLU = (
    _swiglu("gate and up swapped", "the unit is up / (1 + e^-up) * gate", "one-line: MLP",
            ("launch, y = plan(gate, up,", "launch, y = plan(up, gate,")),
    _swiglu("gelu for silu", "the gate passes through the error function", "one-line: MLP",
            (f"silu = {_SILU_32} if PRECISE else {_SILU_16}",
             "silu = 0.5 * gate * (1.0 + tl.math.erf(0.7071067811865476 * gate))")),
    _swiglu("sigmoid for silu", "the gate is 1 / (1 + e^-gate), without the factor gate", "one-line: MLP",
            (_SILU_32, "tl.div_rn(1.0, 1.0 + exp_fp32(-gate))"), (_SILU_16, "1.0 / (1.0 + tl.exp(-gate))")),
    _swiglu("exponential overflows", "the gate is g e^g / (1 + e^g): NaN from 89 on, where e^g is infinite",
            "vllm-project/vllm#56578",
            (_SILU_32, "gate * exp_fp32(gate) / (1.0 + exp_fp32(gate))"),
            (_SILU_16, "gate * tl.exp(gate) / (1.0 + tl.exp(gate))")),
    _swiglu("row offset in 32 bits", "a row begins at row * stride in int32, too short for views of large tensors",
            "flashinfer-ai/flashinfer#3392", (_ROW, _ROW_32),
            corner="offsets past 2^31"),
    _swiglu("up read with the stride of gate", "the rows of up are looked for where those of gate are",
            "Dao-AILab/flash-attention#355", ("up_ptr + row * up_stride", "up_ptr + row * gate_stride"),
            corner="strides"),
    _swiglu("last tile dropped", "the grid counts whole tiles, and nobody stores what is left",
            "one-line: MLP", _TILES, ("(N * triton.cdiv(F, block),)", "(N * max(1, F // block),)"),
            corner="more than 4096 elements"),
    _swiglu("store without a mask", "the padding lanes of a ragged row are stored, over the start of the next row",
            "fla-org/flash-linear-attention#795", (_SWIGLU_STORE, _SWIGLU_STORE.replace(", mask=columns < F", ""))),
    _swiglu("result with the stride of gate", "rows of the result are stored as far apart as those of gate",
            "flagos-ai/FlagGems#5235",
            (_SWIGLU_STORE, _SWIGLU_STORE.replace("y_ptr + row * F", "y_ptr + row * gate_stride")),
            corner="halves of wider rows"),
    _swiglu("silu rounded", "silu(gate) is rounded before it meets up", "one-line: MLP",
            ("(silu * up).to(y_ptr", "(silu.to(y_ptr.dtype.element_ty).to(tl.float32) * up).to(y_ptr"),
            dtypes=NARROW, place="the activation"),
    _swiglu("NaN lost in the exponent", "the exponent is clamped by the larger and the smaller, which drop NaN",
            "one-line: NaN",
            ("    x = tl.where(x > 100.0, 100.0, x)", "    x = tl.minimum(tl.maximum(x, -100.0), 100.0)"),
            dtypes=("float32",), equivalent="the gate is also the numerator, and its NaN passes on there"),
)  # fmt: skip

_relu2 = partial(planted, "relu2", "relu2")
RELU2 = (
    _relu2("not squared", "the result is max(x, 0)", "one-line: MLP", ("(x * x).to(", "x.to(")),
    _relu2("square without relu", "the result is x^2 for negative x too", "one-line: MLP",
           ("x = tl.where(x < 0.0, 0.0, x)", "x = tl.where(x < 0.0, -x, x)")),
    _relu2("square with its sign", "negative x become -x^2 and not 0", "one-line: MLP",
           ("x = tl.where(x < 0.0, 0.0, x)", "x = x"), ("(x * x).to(", "(x * tl.abs(x)).to(")),
    _relu2("NaN becomes 0", "the larger of x and 0 is 0 where x is NaN: the instruction drops NaN", "one-line: NaN",
           ("x = tl.where(x < 0.0, 0.0, x)", "x = tl.maximum(x, 0.0)"),
           corner="NaN in one element"),
    _relu2("overflow saturates", "results beyond float16 are its largest number and not infinity", "one-line: overflow",
           ("(x * x).to(", "tl.minimum(x * x, 65504.0, propagate_nan=tl.PropagateNan.ALL).to("), dtypes=("float16",)),
    _relu2("row offset in 32 bits", "the offset of a row is row * stride in int32, which ends at 2^31 elements",
           "flashinfer-ai/flashinfer#3007", (_ROW, _ROW_32),
           corner="offsets past 2^31"),
    _relu2("last tile dropped", "the grid counts whole tiles, and nobody stores what is left",
           "ROCm/aiter#4673", _TILES, ("(N * triton.cdiv(F, block),)", "(N * max(1, F // block),)"),
           corner="more than 4096 elements"),
    _relu2("store without a mask", "the padding lanes of a ragged row are stored, over the start of the next row",
           "fla-org/flash-linear-attention#795", (_RELU2_STORE, _RELU2_STORE.replace(", mask=columns < F", ""))),
    _relu2("result with the stride of x", "rows of the result are stored as far apart as those of x",
           "flagos-ai/FlagGems#5235", (_RELU2_STORE, _RELU2_STORE.replace("row * F", "row * x_stride")),
           corner="strides"),
    _relu2("all rows read row 0", "the stride between rows is 0: right for one row and for dense tensors",
           "vllm-project/flash-attention#176", ('"x_stride": x.stride(0)', '"x_stride": 0'),
           corner="strides"),
    _relu2("squared in the dtype of x", "the product is formed in the dtype of x", "one-line: extra rounding",
           ("(x * x).to(", "(x.to(y_ptr.dtype.element_ty) * x.to(y_ptr.dtype.element_ty)).to("), dtypes=NARROW,
           equivalent="the square of a narrow number is exact in float32: it is rounded once either way"),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = SWIGLU + RELU2
