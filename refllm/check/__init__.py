"""Measuring other implementations against the reference: whole models value by value, and single operators.

    from refllm.check import assert_matches, assert_operator

    def test_my_port():
        assert_matches("path/to/checkpoint", my_forward, dtype="bfloat16")

    def test_my_kernel():
        assert_operator("rms_norm", my_rms_norm, dtype="bfloat16")

`my_forward(checkpoint, input_ids, attention_mask, position_ids, tap)` returns logits, and calls tap(name, value) for
whatever else it can show (`refllm.forward.taps` lists the names). With arguments `dtype` and `cache` it is told more
(`refllm.check.functions.Forward`). A Transformers model object is taken as it is. A test fails where something is
wrong, and where something was not seen.
`my_rms_norm(x, weight, eps)` takes and returns Torch tensors (NumPy arrays with arrays="numpy"), as `refllm.kernels`
does; `check_op` returns the report that `assert_operator` raises. `check_logprobs` judges log-probabilities of tokens,
of a trainer and of a rollout engine.
"""

from typing import Any

from refllm.check.api import assert_matches, compare

__all__ = ["RankTrace", "assert_matches", "assert_operator", "check_dumped", "check_logprobs", "check_op", "compare"]


def __getattr__(name: str) -> Any:
    if name == "RankTrace":
        from refllm.check import rank_trace

        return rank_trace.RankTrace
    if name == "check_dumped":
        from refllm.opcheck import dumped

        return dumped.check_dumped
    if name == "check_logprobs":
        from refllm.check import logprobs

        return logprobs.check_logprobs
    if name in ("assert_operator", "check_op"):
        from refllm.opcheck import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
