"""Inputs that break operators: Hypothesis strategies for every operator and model, and short lists of fixed calls.

    from refllm.strategies import calls, corners
    @given(calls("rms_norm", dtype="bfloat16"))      # drawn: shapes, layouts, masks, planted values, scales, seeds
    def test_mine(call): ...
    for call in corners("rms_norm", "bfloat16"):     # fixed: the calls that kill most known bugs, cheapest first
        arguments, keywords = call.tensors()

A `Call` is a recipe of numbers and names: it makes arrays, tensors, or the Python lines of a reproduction. Only what
draws needs Hypothesis; `Array`, `Call` and `corners` do not. Strategies for whole models: `refllm.strategies.models`.
"""

import importlib
from typing import Any

from refllm.extras import missing_extra

_WHERE = {
    "Array": "refllm.strategies.arrays",
    "Call": "refllm.strategies.call",
    "corners": "refllm.strategies.fixed",
    "calls": "refllm.strategies.operators",
    "kinds": "refllm.strategies.operators",
    "families_of": "refllm.strategies.levels",
    "level_of": "refllm.strategies.levels",
    "families": "refllm.strategies.operators",
}

__all__ = ["Array", "Call", "calls", "corners", "families", "families_of", "kinds", "level_of"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise missing_extra(f"refllm.strategies.{name}", "hypothesis") from error


def __dir__() -> list[str]:
    return sorted(__all__)
