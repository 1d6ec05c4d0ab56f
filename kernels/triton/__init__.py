"""The operators as Triton kernels: one file per kernel, from the formula at its top to the launch at its end."""

from refllm.kernels.triton.rms_norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
