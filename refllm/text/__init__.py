"""The parts of `refllm.text.tokenizer`: its files, its arguments, and chat templates in a sandbox."""
