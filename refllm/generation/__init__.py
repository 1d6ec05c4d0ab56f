"""The parts of `refllm.generate`: settings, score processors, stopping rules, the loops."""
