"""`refllm check-op`: the search for an input on which somebody's operator breaks its contract.

    from refllm.check import assert_operator

    def test_my_rms_norm():
        assert_operator("rms_norm", my_rms_norm, dtype="bfloat16")

The way of one example: `search` takes calls from `refllm.strategies`, `worker` runs the candidate on them in a process
of its own, where `observe` writes down what it does; `examine` and `judge` compare that with what `expected` says;
`looks_like` says which mistake gives a candidate's numbers; `shrink` makes a failing call small; `tile` says where it
fails, `repro` how to see it.
"""
