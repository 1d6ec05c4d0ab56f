"""FlashInfer's Triton kernels: its repository on the path, as its package wants to be compiled."""

import torch
from wrapping import checkout, released

NAME, VERSION = "FlashInfer", checkout("flashinfer", "flashinfer", "flashinfer.triton")

from flashinfer.triton import norm  # noqa: E402
from flashinfer.triton.activation import silu_and_mul  # noqa: E402


@released(NAME, "rms_norm", "triton.norm.rms_norm", without=("row_axes", "strides"))
def rms_norm(x, weight, eps):
    y = torch.empty_like(x)
    norm.rms_norm(x, weight, y, eps)
    return y


@released(NAME, "add_rms_norm", "triton.norm.rms_norm_add_residual", without=("row_axes", "strides"))
def add_rms_norm(x, residual, weight, eps):
    y, total = x.clone(), residual.clone()  # both are written over
    norm.rms_norm_add_residual(y, total, weight, eps, y)
    return y, total


@released(NAME, "swiglu", "triton.activation.silu_and_mul", without="row_axes")
def swiglu(gate, up):
    return silu_and_mul(torch.cat((gate, up), -1))
