"""Where kernel tests run: on the repaired interpreter, or compiled on a GPU with REFLLM_TEST_DEVICE=cuda."""

import contextlib
import os
from typing import Any

DEVICE = os.environ.get("REFLLM_TEST_DEVICE", "cpu")


def running() -> Any:
    """A context in which kernels run on tensors of `DEVICE`. For tests that Hypothesis repeats; others take the fixture
    `device`."""
    if DEVICE != "cpu":
        return contextlib.nullcontext()
    from refllm import kernels

    return kernels.interpreted()
