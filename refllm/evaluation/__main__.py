"""`python -m refllm.evaluation ...`: the command line of lm-evaluation-harness, which then knows the model `refllm`."""

import sys

from refllm import extras
from refllm.errors import RefllmError


def main() -> int:
    """The harness's own command, with exit code 2 and one sentence for wrong use of the model."""
    try:
        extras.require("refllm.evaluation", "lm_eval")
        from lm_eval.__main__ import cli_evaluate

        from refllm.evaluation.harness import register

        register()
        cli_evaluate()
    except RefllmError as error:
        print(f"refllm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
