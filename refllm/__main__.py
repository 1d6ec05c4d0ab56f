"""`python -m refllm` is the command `refllm`."""

from refllm.commands.cli import main

if __name__ == "__main__":
    main()
