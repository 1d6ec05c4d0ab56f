"""The parts of `refllm.generation.generate`: settings, score processors, stopping rules, the loops."""
