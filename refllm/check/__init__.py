"""Measuring another implementation against the reference, value by value.

    from refllm.check import assert_matches

    def test_my_port():
        assert_matches("path/to/checkpoint", my_forward, dtype="bfloat16")

`my_forward(checkpoint, input_ids, attention_mask, position_ids, tap)` returns logits, and calls tap(name, value) for
whatever else it can show (`refllm.check.taps` lists the names). A Transformers model object is taken as it is.
"""

from refllm.check.api import assert_matches, compare

__all__ = ["assert_matches", "compare"]
