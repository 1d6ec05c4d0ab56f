"""Checkpoints and weights on disk: the safetensors format, conversion, writing; and files that users name."""
