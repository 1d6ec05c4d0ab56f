"""Liger-Kernel: `pip install liger-kernel`."""

import torch
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from wrapping import and_gradients, installed, released

NAME, VERSION = "Liger-Kernel", installed("liger-kernel")


@and_gradients()
@released(NAME, "rms_norm", "LigerRMSNormFunction")
def rms_norm(x, weight, eps):
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


@and_gradients()
@released(NAME, "layer_norm", "LigerLayerNormFunction", without="no_bias")
def layer_norm(x, weight, bias, eps):
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


@and_gradients()
@released(NAME, "add_rms_norm", "LigerFusedAddRMSNormFunction")
def add_rms_norm(x, residual, weight, eps):
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


@and_gradients()
@released(NAME, "rope", "LigerRopeFunction", without=("interleaved", "tables_per_row", "partial_rotation", "empty"))
def rope(q, k, cos, sin, *, interleaved):
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))  # it writes over them
    return LigerRopeFunction.apply(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None])


@and_gradients()
@released(NAME, "swiglu", "LigerSiLUMulFunction")
def swiglu(gate, up):
    return LigerSiLUMulFunction.apply(gate, up)


@and_gradients()
@released(NAME, "relu2", "LigerReLUSquaredFunction")
def relu2(x):
    return LigerReLUSquaredFunction.apply(x)


@and_gradients()
@released(NAME, "cross_entropy", "LigerCrossEntropyFunction", convention="torch", without=("empty", "nothing_counted"))
def cross_entropy(logits, labels, *, ignore_index=-100, reduction="mean"):
    return LigerCrossEntropyFunction.apply(logits.clone(), labels, None, ignore_index, 0.0, 0.0, reduction)[0]


@and_gradients()
@released(NAME, "linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", without=("empty", "nothing_counted"))
def linear_cross_entropy(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    given = (x, weight, labels, None, None, ignore_index, 0.0, 0.0, reduction)
    return LigerFusedLinearCrossEntropyFunction.apply(*given)[0]
