"""Hypotheses on what surrounds attention: the MLP, the residual stream, and the order of layers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refllm.config.traits import traits_of
from refllm.hypotheses.hypothesis import Hypothesis, free, one_of
from refllm.hypotheses.norms import operate
from refllm.hypotheses.setup import Call, DoesNotApplyError, Setup
from refllm.hypotheses.values import mapped, product, rounded, times

_ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "tanh",
    "linear",
    "mish",
    "hardswish",
    "leaky_relu",
    "laplace",
    "sqrtsoftplus",
    "gelu_10",
)
_SAME = {"swish": "silu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"
)
_BETA = {"silu": 1.0, "quick_gelu": 1.702}
"""Activations of the form x sigmoid(beta x)."""

_STREAM = "residual_mid layer"
_LAYERS_AT_MOST = 8


def hypotheses(config: Any) -> Iterator[Hypothesis]:
    """All that have a meaning for a config."""
    yield from _activations(config)
    if traits_of(config).gated:
        yield from _gates()
    else:
        yield from _ungated()
    yield from _sums(config)
    yield from _orders(int(config.num_hidden_layers))


# ----------------------------------------------------------------------------------------------------------------- MLP


def _act(name: str, says: str, glu: Callable[..., Any], activation: Callable[..., Any], **how: bool) -> Hypothesis:
    def edit(setup: Setup) -> None:
        setup.operate("glu", glu)
        setup.operate("activation", activation)

    return one_of(name, says, "glu", "act", edit, **how)


def _activations(config: Any) -> Iterator[Hypothesis]:
    right = _SAME.get(config.hidden_act, config.hidden_act)

    def edit(setup: Setup, beta: float) -> None:
        setup.operate("glu", lambda call, g, u, name: product(mapped(g, lambda a: a / (1 + np.exp(-beta * a))), u))
        setup.operate("activation", lambda call, x, name: mapped(x, lambda a: a / (1 + np.exp(-beta * a))))

    grid = [0.25, 0.5, 0.9, 1.1, 1.5, 2.0, 4.0]
    says_beta = lambda v: f"x sigmoid({v:.6g} x) instead of {config.hidden_act}"  # noqa: E731
    family = free("silu's factor", "glu", "act", edit, grid, says_beta)
    yield family
    for other in _ACTIVATIONS:
        if other == right:
            continue
        if other in _BETA:
            yield family.at(_BETA[other], f"activation {other}", f"{other} instead of {config.hidden_act}")
            continue
        glu = lambda call, g, u, name, other=other: call.base(g, u, other)  # noqa: E731
        alone = lambda call, x, name, other=other: call.base(x, other)  # noqa: E731
        says = f"{other} instead of {config.hidden_act}" if other != "linear" else "no activation"
        yield _act(f"activation {other}", says, glu, alone)

    squared = lambda call, g, u, name: product(mapped(g, np.square), u)  # noqa: E731
    yield _act("square without relu", "the square without relu", squared, lambda call, x, name: mapped(x, np.square))
    for n in (8, 16, 32, 64):
        if n < config.intermediate_size:
            dropped = _tail(n)
            yield one_of(f"last {n} of the MLP", f"the last {n} channels of the MLP dropped", "glu", "act", dropped)


def _tail(n: int) -> Callable[[Setup], None]:
    def kept(call: Call, *args: Any) -> Any:
        out = call.base(*args)
        return times(out, (np.arange(out.shape[-1]) < out.shape[-1] - n).astype(float))

    def edit(setup: Setup) -> None:
        setup.operate("glu", kept)
        setup.operate("activation", kept)

    return edit


def _gates() -> Iterator[Hypothesis]:
    none = lambda call, x, name: call.base(x, name)  # noqa: E731
    found: dict[str, tuple[str, Callable[..., Any]]] = {
        "gate and up swapped": ("gate and up swapped", lambda call, g, u, n: call.base(u, g, n)),
        "gate dropped": ("no gate: the activation of up", lambda call, g, u, n: call.op.activation(u, n)),
        "up dropped": ("no up: the activation of the gate", lambda call, g, u, n: call.op.activation(g, n)),
        "gate added": (
            "gate and up added instead of multiplied",
            lambda call, g, u, n: call.op.add(call.op.activation(g, n), u),
        ),
        "activation of the product": (
            "the activation of gate times up",
            lambda call, g, u, n: _act_of_product(call, g, u, n),
        ),
        "activation of both": (
            "the activation of gate and of up",
            lambda call, g, u, n: call.base(g, call.op.activation(u, n), n),
        ),
        "gate for up": ("the gate in the place of up", lambda call, g, u, n: call.base(g, g, n)),
        "up for gate": ("up in the place of the gate", lambda call, g, u, n: call.base(u, u, n)),
        "up plus one": (
            "up + 1 for up",
            lambda call, g, u, n: call.op.add(call.base(g, u, n), call.op.activation(g, n)),
        ),
        "gate capped at 7": ("the gate capped at 7 and up at 7 to either side", _capped),
        "activation twice": (
            "the activation applied twice",
            lambda call, g, u, n: call.base(call.op.activation(g, n), u, n),
        ),
    }
    for name, (says, glu) in found.items():
        yield _act(name, says, glu, none)


def _capped(call: Call, gate: Any, up: Any, name: str) -> Any:
    return call.base(mapped(gate, lambda a: np.minimum(a, 7)), mapped(up, lambda a: np.clip(a, -7, 7)), name)


def _act_of_product(call: Call, gate: Any, up: Any, name: str) -> Any:
    return call.op.activation(product(gate, up), name)


def _ungated() -> Iterator[Hypothesis]:
    def glu(call: Call, *args: Any) -> Any:
        return call.base(*args)

    cube = lambda a: np.maximum(a, 0) ** 3  # noqa: E731
    yield _act("relu to the third", "the third power of relu", glu, lambda call, x, n: mapped(x, cube))
    minus = lambda a: -np.square(np.maximum(a, 0))  # noqa: E731
    yield _act("minus relu2", "the other sign of relu2", glu, lambda call, x, n: mapped(x, minus))
    below = lambda a: np.square(np.minimum(a, 0))  # noqa: E731
    yield _act("square of what is below 0", "the square of what is below 0", glu, lambda call, x, n: mapped(x, below))
    twice = lambda call, x, n: call.base(call.base(x, n), n)  # noqa: E731
    yield _act("activation twice", "the activation applied twice", glu, twice)


# ----------------------------------------------------------------------------------------------------- residual stream


def _sum(name: str, says: str, which: str, wrong: Callable[[Call, Any, Any], Any], **how: bool) -> Hypothesis:
    """A hypothesis on the sum after attention ("attention"), after the MLP ("MLP"), or on both."""
    return one_of(name, says, "add", _STREAM, lambda s: s.operate("add", _at(which, wrong)), **how)


def _at(which: str, wrong: Callable[[Call, Any, Any], Any]) -> Callable[..., Any]:
    def chosen(call: Call, x: Any, y: Any) -> Any:
        turn = call.seen["sums"] = call.seen.get("sums", 0) + 1
        at = "attention" if turn == 1 else "MLP"
        return wrong(call, x, y) if call.layer is not None and which in (at, "both") else call.base(x, y)

    return chosen


def _sums(config: Any) -> Iterator[Hypothesis]:
    for which in ("attention", "MLP"):
        yield _sum(f"no residual at {which}", f"no residual stream past {which}", which, lambda call, x, y: y)
        normed = _from_normed(which)
        yield one_of(
            f"normed residual at {which}",
            f"the normed value for the residual stream past {which}",
            "add",
            _STREAM,
            normed,
        )

        def edit(setup: Setup, value: float, which: str = which) -> None:
            setup.operate("add", _at(which, lambda call, x, y: call.base(x, times(y, value))))

        says = lambda v, which=which: f"what {which} adds times {v:.6g}"  # noqa: E731
        grid = [0.1, 0.25, 0.5, 0.7, 0.9, 0.97, 1.03, 1.1, 1.4, 4.0]
        family = free(f"factor of what {which} adds", "add", _STREAM, edit, grid, says)
        for words, value in (("dropped", 0.0), ("subtracted", -1.0), ("added twice", 2.0)):
            yield family.at(value, f"{which} {words}", f"what {which} adds {words}")
        yield family
    layers = int(config.num_hidden_layers)

    def edit_both(setup: Setup, value: float) -> None:
        setup.operate("add", _at("both", lambda call, x, y: call.base(x, times(y, value))))

    grid, says = [0.2, 0.5, 0.8, 0.95, 1.05, 1.3, 2.0], lambda v: f"what layers add times {v:.6g}"
    family = free("factor of what layers add", "add", _STREAM, edit_both, grid, says)
    factors = {0.5**0.5: "sqrt(1/2)", (2 * layers) ** -0.5: f"1 / sqrt({2 * layers})", 0.5: "1/2"}
    for value, words in factors.items():
        yield family.at(value, f"what layers add times {words}", f"what layers add times {words}")
    yield family
    halves = lambda call, x, y: times(call.base(x, y), 0.5**0.5)  # noqa: E731
    yield _sum("sums times sqrt(1/2)", "residual sums times sqrt(1/2)", "both", halves)
    for dtype in ("bfloat16", "float16"):
        narrow = lambda call, x, y, d=dtype: rounded(call.base(x, y), d)  # noqa: E731
        yield _sum(f"stream in {dtype}", f"the residual stream in {dtype}", "both", narrow, places=True)
    if getattr(config, "use_parallel_residual", False):
        yield one_of("sequential residual", "a sequential layer instead of a parallel one", "add", _STREAM, _sequential)
    else:
        yield one_of(
            "parallel residual",
            "a parallel layer, whose MLP reads the norm before attention",
            "norm",
            "post_attention_layernorm",
            _shared_norm,
        )
        yield one_of(
            "parallel residual of two norms",
            "a parallel layer: the MLP's norm reads what attention's read",
            "norm",
            "post_attention_layernorm",
            _shared_input,
        )


def _from_normed(which: str) -> Callable[[Setup], None]:
    def norm(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
        out = f(x, w, b, e)
        if len(out.shape) == 3:
            call.seen["normed"] = out
        return out

    def edit(setup: Setup) -> None:
        operate(setup, norm)
        setup.operate("add", _at(which, lambda call, x, y: call.base(call.seen["normed"], y)))

    return edit


def _shared_norm(setup: Setup) -> None:
    def norm(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
        if call.layer is None or len(x.shape) != 3:
            return f(x, w, b, e)
        if "first norm" not in call.seen:
            call.seen["first norm"] = f(x, w, b, e)
        return call.seen["first norm"]

    operate(setup, norm)


def _shared_input(setup: Setup) -> None:
    def norm(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
        if call.layer is None or len(x.shape) != 3:
            return f(x, w, b, e)
        return f(call.seen.setdefault("first input", x), w, b, e)

    operate(setup, norm)


def _sequential(setup: Setup) -> None:
    setup.everywhere()
    names = {f"post_attention_layernorm.{kind}": f"input_layernorm.{kind}" for kind in ("weight", "bias")}
    setup.weights.aliases.append((names, None))
    setup.c.use_parallel_residual = False


# -------------------------------------------------------------------------------------------------------------- layers


def _orders(count: int) -> Iterator[Hypothesis]:
    def ordered(name: str, says: str, order: list[int]) -> Hypothesis:
        def edit(setup: Setup) -> None:
            setup.everywhere()
            if order == list(range(count)):
                raise DoesNotApplyError
            setup.weights.order = order

        return one_of(name, says, "layer", "", edit, alone=True)

    every = list(range(count))
    some = every if count <= _LAYERS_AT_MOST else [*every[:3], *every[-3:]]
    for i in some:
        yield ordered(f"layer {i} skipped", f"layer {i} skipped", every[:i] + every[i + 1 :])
        yield ordered(f"layer {i} twice", f"layer {i} run twice", every[: i + 1] + every[i:])
        if i + 1 < count:
            swapped = [*every[:i], i + 1, i, *every[i + 2 :]]
            yield ordered(f"layers {i} and {i + 1} swapped", f"layers {i} and {i + 1} swapped", swapped)
            same = [*every[: i + 1], i, *every[i + 2 :]]
            yield ordered(f"layer {i} for {i + 1}", f"the tensors of layer {i} in layer {i + 1}", same)
    if count > 2:
        yield ordered("layers reversed", "the layers in reverse order", every[::-1])
        yield ordered("the first layer everywhere", "the tensors of layer 0 in every layer", [0] * count)
