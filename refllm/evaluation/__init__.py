"""The tables of model cards: refllm's models in lm-evaluation-harness, and which answers hang on rounding."""
