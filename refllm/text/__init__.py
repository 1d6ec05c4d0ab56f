"""The parts of `refllm.tokenizer`: its files, its arguments, and chat templates in a sandbox."""
