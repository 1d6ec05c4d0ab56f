"""The fast path (Torch and Triton), imported as `refllm.kernels`."""
