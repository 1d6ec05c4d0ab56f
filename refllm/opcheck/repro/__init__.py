"""Writes a program that shows a finding: with numpy, torch and the candidate alone, no part of refllm.

It makes the arrays of the smallest call, calls the candidate, prints what is wrong, and exits with 1 (0: it does not
fail any more). Kernels that need refllm's interpreter import that.
"""

from refllm.opcheck.repro.program import reproduction

__all__ = ["reproduction"]
