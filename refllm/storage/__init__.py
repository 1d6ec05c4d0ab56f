"""The parts of `refllm.checkpoint` and `refllm.weights`: the safetensors format, conversion, writing, fresh tensors."""
