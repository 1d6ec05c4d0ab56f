"""What is right: the predicted rounding error of every value, measures of an error, and the limits of both.

Below the checks of models (`refllm.check`) and operators (`refllm.opcheck`), the goldens and the benchmarks.
"""
