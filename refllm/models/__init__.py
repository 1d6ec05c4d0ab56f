"""refllm."""
