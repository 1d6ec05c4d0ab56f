"""Bugs planted into whole models, and the measurement of how many of them the check names.

Bugs of single operators stand beside the kernels that they quote (`refllm.kernels.mutants`).
"""
