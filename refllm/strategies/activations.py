"""Calls of the activations: SwiGLU and squared ReLU."""

from dataclasses import replace

from hypothesis import strategies as st

from refllm.strategies.call import Call
from refllm.strategies.draws import VALUES, Seeds, layouts, plant, row_shape, seeded, spot, values

KINDS = {
    "swiglu": (*VALUES, "large gates"),
    "relu2": (*VALUES, "near overflow", "all negative"),
}
"""large gates: up to +-1e3 (in float16 too), where e^-x overflows float32. near overflow: float16 squares reach 65504,
float32 and bfloat16 ones 3.4e38. all negative: relu2 is 0."""


def swiglu(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """swiglu: gate and up of one shape [..., F], drawn independently."""
    shape = row_shape(draw)
    kind = kind or draw(st.sampled_from(KINDS[operator]))
    lie = layouts(draw, shape, shape)
    on_gate = draw(st.booleans())  # which of the two is special
    special = values(draw, kind, shape, dtype, lie[0 if on_gate else 1])
    plain = values(draw, "plain", shape, dtype, lie[1 if on_gate else 0])
    gate, up = (special, plain) if on_gate else (plain, special)
    if kind == "large gates":
        gate = replace(gate, scale=draw(st.sampled_from([30.0, 100.0, 300.0])))
        gate = gate if 0 in shape else plant(gate, (spot(draw, shape), draw(st.sampled_from([-1000.0, 1000.0]))))
    gate, up = seeded(Seeds(draw), gate, up)
    return Call(operator, dtype, (gate, up), kind=kind)


def relu2(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """relu2: x of any shape [..., F]."""
    shape = row_shape(draw)
    kind = kind or draw(st.sampled_from(KINDS[operator]))
    x = values(draw, kind, shape, dtype, layouts(draw, shape)[0])
    if kind == "near overflow":
        x = replace(x, values="uniform", mean=250.0, scale=10.0)
        x = x if dtype == "float16" else replace(x, mean=1.8e19, scale=1e18)
    if kind == "all negative":
        x = replace(x, values="uniform", mean=-3.0, scale=2.0)
    (x,) = seeded(Seeds(draw), x)
    return Call(operator, dtype, (x,), kind=kind)
