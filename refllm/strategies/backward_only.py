"""Calls of the backward operators, drawn: those of the forward operator, with gradients of any kind; and the forward
calls of the operators that have no forward record of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

from hypothesis import strategies as st

from refllm.ops.activation import ACTIVATIONS
from refllm.ops.backward_contracts import BACKWARD, forward_name
from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.draws import SHORT_ROWS, VALUES, Seeds, layouts, row_shape, seeded, values
from refllm.strategies.gradients import GRADIENTS, backward_call, stands

KINDS = tuple(kind for kind in VALUES if kind not in ("NaN", "infinity", "subnormal"))
"""What is drawn for the operators that are here: products of subnormal numbers are 0 in instructions of some CPUs."""


def gradients(operator: str, forward: st.SearchStrategy[Call]) -> st.SearchStrategy[Call]:
    """Calls of a backward operator. forward: those of its forward operator."""
    kept = st.booleans().map(lambda none: not none) if BACKWARD[operator].kept else st.just(True)

    @st.composite
    def drawn(draw: st.DrawFn) -> Call:
        call = draw(forward.filter(stands))
        return backward_call(call, draw(st.sampled_from(list(GRADIENTS))), draw(kept))

    return drawn()


def only(operator: str, dtype: str, kind: str | None) -> st.SearchStrategy[Call]:
    """Calls of a forward operator that has a definition and no kernel."""
    function = _DRAWN[forward_name(operator)]

    @st.composite
    def drawn(draw: st.DrawFn) -> Call:
        return function(draw, dtype, kind or draw(st.sampled_from(KINDS)))

    return drawn()


def _linear(draw: st.DrawFn, dtype: str, kind: str) -> Call:
    shape, F = row_shape(draw, SHORT_ROWS), draw(st.sampled_from((1, 2, 3, 8, 17, 33, 65)))
    E = shape[-1]
    lie = layouts(draw, shape, (F, E))
    x = values(draw, kind, shape, dtype, lie[0])
    weight = Array((F, E), dtype, scale=float(max(1, E)) ** -0.5, layout=lie[1])
    x, weight, bias = seeded(Seeds(draw), x, weight, Array((F,), dtype))
    return Call("linear", dtype, (x, weight, bias if draw(st.booleans()) else None), kind=kind)


def _embedding(draw: st.DrawFn, dtype: str, kind: str) -> Call:
    V, E = draw(st.sampled_from((1, 2, 5, 33, 257))), draw(st.sampled_from(SHORT_ROWS))
    front = draw(st.sampled_from([(3,), (1,), (2, 5), (17,), (3, 65), (0,)]))
    ids = Array(front, "int64", "integers", scale=float(draw(st.sampled_from(sorted({1, max(1, V // 2), V})))))
    ids, weight = seeded(Seeds(draw), ids, Array((V, E), dtype))
    return Call("embedding", dtype, (ids, weight), kind="plain")


def _softmax(draw: st.DrawFn, dtype: str, kind: str) -> Call:
    shape = row_shape(draw)
    x = Array(shape, dtype, scale=draw(st.sampled_from([1.0, 0.1, 4.0])), layout=layouts(draw, shape)[0])
    (x,) = seeded(Seeds(draw), x)
    return Call("softmax", dtype, (x,), kind="plain")


def _activation(draw: st.DrawFn, dtype: str, kind: str) -> Call:
    shape = row_shape(draw)
    kind = "plain" if kind in ("mean 1000", "outlier 10000", "scale") else kind
    (x,) = seeded(Seeds(draw), replace(values(draw, kind, shape, dtype, layouts(draw, shape)[0]), scale=2.0))
    return Call("activation", dtype, (x, draw(st.sampled_from(sorted(ACTIVATIONS)))), kind=kind)


def _glu(draw: st.DrawFn, dtype: str, kind: str) -> Call:
    call = _activation(draw, dtype, kind)
    gate, name = call.arguments
    assert isinstance(gate, Array)
    (up,) = seeded(Seeds(draw), Array(gate.shape, dtype))
    return Call("glu", dtype, (gate, replace(up, seed=gate.seed + 1), name), kind=call.kind)


def _regression(operator: str) -> Callable[[st.DrawFn, str, str], Call]:
    def drawn(draw: st.DrawFn, dtype: str, kind: str) -> Call:
        shape = row_shape(draw, SHORT_ROWS)
        lie = layouts(draw, shape, shape)
        target = Array(shape, dtype, "uniform" if operator.startswith("binary") else "normal", layout=lie[1])
        x, target = seeded(Seeds(draw), Array(shape, dtype, layout=lie[0]), target)
        return Call(operator, dtype, (x, target) if prod(shape) else (replace(x, layout="dense"), target), kind="plain")

    return drawn


_DRAWN: dict[str, Callable[[st.DrawFn, str, str], Call]] = {
    "linear": _linear,
    "embedding": _embedding,
    "softmax": _softmax,
    "activation": _activation,
    "glu": _glu,
    "mean_squared_error": _regression("mean_squared_error"),
    "binary_cross_entropy": _regression("binary_cross_entropy"),
}
