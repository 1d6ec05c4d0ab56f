"""Hypotheses on norms: eps, weight, bias, kind, and where they stand."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refllm.config.traits import traits_of
from refllm.hypotheses.hypothesis import Hypothesis, decades, free, one_of
from refllm.hypotheses.setup import Call, DoesNotApplyError, Setup
from refllm.hypotheses.values import certain_like, number, rounded, times, with_noise_of

_EPS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2)
_EVERY = "input_layernorm post_attention_layernorm norm q_layernorm k_layernorm"
_PLACES = {
    "the norm before attention": "input_layernorm",
    "the norm before the MLP": "post_attention_layernorm",
    "the last norm": "norm",
}

Norm = Callable[..., Any]
"""norm(call, again, x, weight, bias, eps): again(x, weight, bias, eps) is the norm as it is."""


def hypotheses(config: Any) -> Iterator[Hypothesis]:
    """All that have a meaning for a config."""
    layer = traits_of(config).layer_norm
    right = float(config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.rms_norm_eps)
    kind, other = ("LayerNorm", "RMSNorm") if layer else ("RMSNorm", "LayerNorm")

    def edit(setup: Setup, value: float) -> None:
        operate(setup, _with_eps(value))

    says = lambda v: f"a norm eps of {v:.6g} instead of {right:g}"  # noqa: E731
    family = free("norm eps", "norm", _EVERY, edit, decades(1e-7, 1.0, 2), says)
    yield from (family.at(eps) for eps in _EPS if eps != right)
    yield family
    yield _all("eps outside the root", "eps added outside the root", _eps_outside)
    yield _all("norm without a root", "norms divided by the mean square, without a root", _without_root)
    for words, (makes, change) in _CHANGES.items():
        yield _all(f"norm {words}", f"{makes} in every norm", change)
        for place, name in _PLACES.items():
            yield _all(f"{place}: {words}", f"{makes} in {place}", _at(name, change), name)
    swapped = f"{other} for {kind}"
    yield _all(swapped, swapped, _other_kind)
    for place, name in _PLACES.items():
        yield _all(f"{place}: {other}", f"{other} for {kind} in {place}", _at(name, _other_kind), name)
    if layer:
        yield _all("norm bias dropped", "norm biases dropped", lambda c, f, x, w, b, e: f(x, w, None, e))
        yield _all("unbiased variance", "the variance over n - 1 in LayerNorm", _unbiased)
        for place, name in _PLACES.items():
            dropped = _at(name, lambda c, f, x, w, b, e: f(x, w, None, e))
            yield _all(f"{place}: bias dropped", f"the bias of {place} dropped", dropped, name)
    if getattr(config, "qk_layernorm", False):
        yield from _per_head()
    yield _all("last norm twice", "the last norm applied twice", _at("norm", _twice), "norm")
    yield _all("norm weights in bfloat16", "norm weights in bfloat16", _narrow_weight, places=True)
    yield from _elsewhere(config)


def operate(setup: Setup, norm: Norm) -> None:
    """Another norm in the place of both kinds."""

    def rms(call: Call, x: Any, weight: Any, eps: float) -> Any:
        return norm(call, lambda x, w, b, e: call.base(x, w, e), x, weight, None, eps)

    def layer(call: Call, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return norm(call, call.base, x, weight, bias, eps)

    setup.operate("rms_norm", rms)
    setup.operate("layer_norm", layer)


def _all(name: str, says: str, norm: Norm, values: str = _EVERY, **how: bool) -> Hypothesis:
    return one_of(name, says, "norm", values, lambda s: operate(s, norm), **how)


def _at(name: str, norm: Norm) -> Norm:
    """The norm of one place; others are as they are."""
    return lambda call, f, x, w, b, e: norm(call, f, x, w, b, e) if call.owner(w) == name else f(x, w, b, e)


def _with_eps(eps: float) -> Norm:
    return lambda call, f, x, w, b, e: f(x, w, b, eps)


def _by_rows(call: Call, f: Any, x: Any, w: Any, b: Any, e: float, factor: Callable[[np.ndarray], np.ndarray]) -> Any:
    """The norm, with what it normalises by times factor(the mean square of a row)."""
    a = number(x)
    centred = a - a.mean(axis=-1, keepdims=True) if call.setup.c_is_layer_norm else a
    out = times(f(x, w, None, e), factor(np.mean(np.square(centred), axis=-1, keepdims=True)))
    return out if b is None else call.op.add(out, certain_like(out, np.broadcast_to(b, a.shape)))


def _eps_outside(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    return _by_rows(call, f, x, w, b, e, lambda m: np.sqrt(m + e) / (np.sqrt(m) + e))


def _without_root(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    return _by_rows(call, f, x, w, b, e, lambda m: 1 / np.sqrt(m + e))


def _unbiased(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    n = x.shape[-1]
    return _by_rows(call, f, x, w, b, e, lambda m: np.sqrt((m + e) / (m * n / (n - 1) + e)))


def _other_kind(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    if not call.setup.c_is_layer_norm:
        return call.op.layer_norm(x, w, None, e)
    out = call.op.rms_norm(x, w, e)
    return out if b is None else call.op.add(out, certain_like(out, np.broadcast_to(b, out.shape)))


def _twice(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    return f(f(x, w, b, e), w, b, e)


def _ones(w: Any) -> np.ndarray:
    return np.ones_like(w)


def _narrow_weight(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    return f(x, rounded(np.asarray(w, np.float64), "bfloat16"), b, e)


_CHANGES: dict[str, tuple[str, Norm]] = {
    "weight plus one": ("weight + 1 for the weight", lambda c, f, x, w, b, e: f(x, w + 1, b, e)),
    "weight minus one": ("weight - 1 for the weight", lambda c, f, x, w, b, e: f(x, w - 1, b, e)),
    "weight dropped": ("no weight", lambda c, f, x, w, b, e: f(x, _ones(w), b, e)),
    "weight twice": ("the weight applied twice", lambda c, f, x, w, b, e: f(x, w * w, b, e)),
    "skipped": ("no norm", lambda c, f, x, w, b, e: x),
}


def _per_head() -> Iterator[Hypothesis]:
    """StableLM's norms of queries and keys, which have four axes."""

    def heads(which: str, norm: Norm) -> Norm:
        def chosen(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
            if len(x.shape) != 4:
                return f(x, w, b, e)
            turn = call.seen["head norms"] = call.seen.get("head norms", 0) + 1
            return norm(call, f, x, w, b, e) if "qk"[(turn - 1) % 2] in which else f(x, w, b, e)

        return chosen

    names = {"qk": ("q and k", "q_layernorm k_layernorm"), "q": ("q", "q_layernorm"), "k": ("k", "k_layernorm")}
    for which, (said, values) in names.items():
        skipped = heads(which, lambda c, f, x, w, b, e: x)
        yield _all(f"head norms of {said} skipped", f"no norm of the heads of {said}", skipped, values)
    first = heads("qk", lambda c, f, x, w, b, e: f(x, np.broadcast_to(w[:1], w.shape), b, e))
    yield _all("first head's weight", "the norm weight of the first head for all heads", first, names["qk"][1])
    yield _all("norm over all heads", "q and k normed over all heads at once", heads("qk", _over_all), names["qk"][1])

    def weight_of_q(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
        if len(x.shape) != 4:
            return f(x, w, b, e)
        first = call.seen.setdefault("weight of q", w)
        return f(x, first[: len(w)], b, e)

    yield _all("q's head norm for k", "the norm weights of q for k", weight_of_q, "k_layernorm")


def _over_all(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
    a = number(x)
    by = lambda y, axis: (y.mean(axis=axis, keepdims=True), y.var(axis=axis, keepdims=True))  # noqa: E731
    mean, variance = by(a, (1, 3))
    return with_noise_of(f(x, w, b, e), (a - mean) / np.sqrt(variance + e) * w)


# -------------------------------------------------------------------------------------------------------- other places


def _elsewhere(config: Any) -> Iterator[Hypothesis]:
    if not getattr(config, "use_parallel_residual", False):
        yield _block("norms after the sum", "norms after the residual sums instead of before", _after_sums)
        yield _block("norms of what is added", "norms of what attention and MLP add, and none before", _of_added)


def _block(name: str, says: str, edit: Callable[[Setup], None]) -> Hypothesis:
    return one_of(name, says, "norm", "input_layernorm residual_mid", edit)


def _kept_back(setup: Setup) -> None:
    """Norms of a layer do nothing where they stand, and leave behind what they would have done."""

    def norm(call: Call, f: Any, x: Any, w: Any, b: Any, e: float) -> Any:
        if call.layer is None or len(x.shape) != 3:
            return f(x, w, b, e)
        call.seen.setdefault("norms", []).append(lambda y: f(y, w, b, e))
        return x

    operate(setup, norm)


def _after_sums(setup: Setup) -> None:
    def add(call: Call, x: Any, y: Any) -> Any:
        norms = call.seen.get("norms")
        if call.layer is None or not norms:
            raise DoesNotApplyError
        return norms.pop(0)(call.base(x, y))

    _kept_back(setup)
    setup.operate("add", add)


def _of_added(setup: Setup) -> None:
    def add(call: Call, x: Any, y: Any) -> Any:
        norms = call.seen.get("norms")
        if call.layer is None or not norms:
            raise DoesNotApplyError
        return call.base(x, norms.pop(0)(y))

    _kept_back(setup)
    setup.operate("add", add)
