"""Transformers as the independent witness: `refllm.golden.witness`, by the names that the tests use."""

from refllm.golden.witness import numpy_of, tensors_of, to_torch

__all__ = ["numpy_of", "tensors_of", "to_torch"]
