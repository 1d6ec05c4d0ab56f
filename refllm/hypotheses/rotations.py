"""Hypotheses on rotary embeddings: frequencies, positions, pairs of dims, and what is turned."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refllm.config.traits import traits_of
from refllm.hypotheses.hypothesis import Hypothesis, decades, free, one_of
from refllm.hypotheses.rotation import Rotation
from refllm.hypotheses.setup import Call, DoesNotApplyError, Setup
from refllm.hypotheses.values import joined, moved, number, rounded, times

_TURNED = "q_rope k_rope"
_THETAS = (1e4, 1e5, 2.5e5, 5e5, 1e6, 1e7)
_SPECIAL = ("rope_type", "rope_theta", "partial_rotary_factor")
_NAMES = {"factor": "the scaling factor", "attention_factor": "the attention factor"}


def hypotheses(config: Any) -> Iterator[Hypothesis]:
    """All that have a meaning for a config."""
    yield from _scaling(config)
    yield from _bases(config)
    yield from _pairs(config)
    yield from _dims(config)
    yield from _positions()
    yield from _formats()


def _turn(name: str, says: str, change: Callable[[Rotation], Any], **how: bool) -> Hypothesis:
    def edit(setup: Setup) -> None:
        if change(setup.rotate()) is False:
            raise DoesNotApplyError

    return one_of(name, says, "rope", _TURNED, edit, **how)


def _set(**values: Any) -> Callable[[Rotation], None]:
    return lambda r: r.p.update(values)


# --------------------------------------------------------------------------------------------------------- frequencies


def _without_scaling(r: Rotation) -> None:
    r.p = {name: value for name, value in r.p.items() if name in _SPECIAL} | {"rope_type": "default"}


def _as_linear(r: Rotation) -> None:
    factor = r.p["factor"]
    _without_scaling(r)
    r.p |= {"rope_type": "linear", "factor": factor}


def _scaling(config: Any) -> Iterator[Hypothesis]:
    p = config.rope_parameters
    kind = p["rope_type"]
    if kind == "default":

        def linear(setup: Setup, v: float) -> None:
            setup.rotate().p.update(rope_type="linear", factor=v)

        says = lambda v: f"rope_type linear with factor {v:.6g}"  # noqa: E731
        family = free("linear scaling", "rope", _TURNED, linear, decades(1.5, 48), says)
        yield from (family.at(factor, f"linear scaling by {factor:g}") for factor in (2.0, 4.0, 8.0))
        yield family
        return
    yield _turn("rope scaling ignored", f"rope_type default instead of {kind}", _without_scaling)
    if kind != "linear" and p.get("factor"):
        yield _turn("rope scaling as linear", f"rope_type linear instead of {kind}", _as_linear)
    for key, value in p.items():
        if key in _SPECIAL or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        called = _NAMES.get(key, key)

        def edit(setup: Setup, v: float, key: str = key) -> None:
            setup.rotate().p[key] = v

        says_key = partial(lambda key, value, v: f"{key} {v:.6g} instead of {value:g}", key, value)
        family = free(f"rope {key}", "rope", _TURNED, edit, decades(value / 16, value * 16, 4), says_key)
        yield from (family.at(other, f"{called} {other:g}") for other in (value * 2, value / 2))
        yield family
    if kind == "llama3":
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        says = "low_freq_factor and high_freq_factor swapped"
        yield _turn(says, says, _set(low_freq_factor=high, high_freq_factor=low))
    if kind == "yarn":
        yield _turn("yarn not truncated", "yarn's ramp not truncated to whole pairs", _set(truncate=False))
        for key, value in (("beta_fast", 32), ("beta_slow", 1)):
            if (p.get(key) or value) == value:
                continue
            yield _turn(f"{key} by default", f"{key} {value} instead of its own", _set(**{key: value}))
    if kind in ("yarn", "longrope"):
        yield from _attention_factor()


def _attention_factor() -> Iterator[Hypothesis]:
    says = "the attention factor of its RoPE type dropped"
    yield _turn("attention factor dropped", says, _set(attention_factor=1.0))

    def squared(r: Rotation) -> None:
        r.factor *= r.made(exact=True).attention_factor

    yield _turn("attention factor twice", "the attention factor applied twice", squared)

    def halved(call: Call, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
        factor = float(np.sqrt(np.max(np.square(number(cos)) + np.square(number(sin)))))
        turned_q, turned_k = call.base(q, k, cos, sin, **how)
        return turned_q, times(turned_k, 1 / factor)

    says = "the attention factor on queries only"
    yield one_of(says, says, "rope", "k_rope", lambda s: s.operate("rope", halved))


def _bases(config: Any) -> Iterator[Hypothesis]:
    theta = float(config.rope_parameters["rope_theta"])

    def edit(setup: Setup, v: float) -> None:
        setup.rotate().p["rope_theta"] = v

    says = lambda v: f"rope_theta {v:.8g} instead of {theta:g}"  # noqa: E731
    family = free("theta", "rope", _TURNED, edit, decades(1e2, 1e9, 4), says)
    wanted = {f"theta {v:g}": v for v in _THETAS}
    wanted |= {f"theta times {m:g}": theta * m for m in (10, 0.1, 100, 2, 0.5)}
    seen = {theta}
    for name, value in wanted.items():
        if value in seen:
            continue
        seen.add(value)
        yield family.at(value, name, f"rope_theta {value:g} instead of {theta:g}")
    yield family
    yield _turn("frequencies by i", "rotary exponents i / R instead of 2 i / R", lambda r: _power(r, lambda f: f**0.5))
    yield _turn("frequencies by 2(i+1)", "rotary exponents that begin at 2 / R", _from_one)
    yield _turn("frequencies reversed", "the rotary frequencies in reverse order", lambda r: _power(r, _reversed))
    yield _turn("frequencies by pairs swapped", "the same frequency for every two pairs", lambda r: _power(r, _doubled))
    dims, head = int(config.rotary_dim), int(config.head_dim)
    if dims != head:
        says_over = "rotary exponents over head_dim instead of the rotated dims"
        yield _turn("exponent over D", says_over, lambda r: _power(r, lambda f: f ** (dims / head)))


def _power(r: Rotation, change: Callable[[np.ndarray], np.ndarray]) -> None:
    r.frequencies.append(change)


def _change_angles(r: Rotation, change: Callable[[np.ndarray], np.ndarray]) -> None:
    r.angles.append(change)


def _reversed(f: np.ndarray) -> np.ndarray:
    return f[::-1]


def _doubled(f: np.ndarray) -> np.ndarray:
    return np.repeat(f[: (len(f) + 1) // 2], 2)[: len(f)]


def _from_one(r: Rotation) -> None:
    step = float(r.p["rope_theta"]) ** (-2 / r.dims)
    r.frequencies.append(lambda f: f * step)


# ------------------------------------------------------------------------------------------------------ what is turned


def _rope(name: str, says: str, wrong: Callable[..., Any], values: str = _TURNED) -> Hypothesis:
    return one_of(name, says, "rope", values, lambda s: s.operate("rope", wrong))


def _pairs(config: Any) -> Iterator[Hypothesis]:
    kinds = "half-split", "interleaved"
    other, own = kinds if traits_of(config).interleaved else kinds[::-1]

    def paired(call: Call, *args: Any, interleaved: bool) -> Any:
        return call.base(*args, interleaved=not interleaved)

    yield _rope("the other pairing", f"{other} pairs of dims in RoPE instead of {own} ones", paired)

    def signed(call: Call, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
        return call.base(q, k, cos, times(sin, -1.0), **how)

    yield _rope("sign of sin", "the other sign of sin in RoPE", signed)
    yield _rope("no rotation", "no rotation of q and k", lambda call, q, k, *_, **__: (q, k))
    yield _rope(
        "only q turned", "RoPE on q only", lambda call, q, k, *a, **h: (call.base(q, k, *a, **h)[0], k), "k_rope"
    )
    yield _rope(
        "only k turned", "RoPE on k only", lambda call, q, k, *a, **h: (q, call.base(q, k, *a, **h)[1]), "q_rope"
    )
    yield _rope(
        "turned twice", "RoPE applied twice", lambda call, q, k, *a, **h: call.base(*call.base(q, k, *a, **h), *a, **h)
    )
    swapped = lambda call, q, k, cos, sin, **h: call.base(q, k, sin, cos, **h)  # noqa: E731
    yield _rope("cos and sin swapped", "cos and sin swapped in RoPE", swapped)

    def backwards(call: Call, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
        return call.base(q, k, cos, sin, **how)[0], call.base(q, k, cos, times(sin, -1.0), **how)[1]

    yield _rope("k turned the other way", "k turned the other way than q", backwards, "k_rope")
    yield _rope("no minus", "the minus of rotate_half missing", _without_minus)

    def turn_v(setup: Setup) -> None:
        setup.operate("rope", _keep_tables)
        setup.operate("attention", _turned_v)

    yield one_of("v turned", "RoPE on v as well", "rope", "context", turn_v)


def _without_minus(call: Call, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    """(a, b) -> (a c + b s, b c + a s)."""
    half = number(cos).shape[-1]
    first: Any = (..., slice(0, 2 * half, 2)) if interleaved else (..., slice(0, half))
    right = call.base(q, k, cos, sin, interleaved=interleaved)
    other = call.base(q, k, cos, times(sin, -1.0), interleaved=interleaved)
    q_out, k_out = (joined(r, o, first) for r, o in zip(right, other, strict=True))
    return q_out, k_out


def _keep_tables(call: Call, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
    call.seen["tables"] = cos, sin, how
    return call.base(q, k, cos, sin, **how)


def _turned_v(call: Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    cos, sin, how = call.seen["tables"]
    return call.base(q, k, call.op.rope(v, v, cos, sin, **how)[0], **masking)


def _dims(config: Any) -> Iterator[Hypothesis]:
    dims, head = int(config.rotary_dim), int(config.head_dim)
    if dims < head:
        yield _turn(
            "all dims turned", f"all {head} dims of a head rotated instead of {dims}", lambda r: _turn_dims(r, head)
        )
    for part in (2, 4):
        n = dims // part // 2 * 2
        if n >= 2:
            said = f"{n} of the {dims} dims rotated"
            yield _turn(f"1/{part} of the dims turned", said, partial(_turn_dims, dims=n))
            kept = lambda r, n=n: _power(r, lambda f: np.where(np.arange(len(f)) < n // 2, f, 0.0))  # noqa: E731
            yield _turn(f"first {n} dims at their frequencies", f"{said}, at the frequencies of {dims}", kept)
    if dims < head:
        last = lambda call, q, k, *a, **h: _rolled(call, q, k, head - dims, a, h)  # noqa: E731
        yield _rope("last dims turned", f"the last {dims} dims of a head rotated instead of the first", last)


def _turn_dims(r: Rotation, dims: int) -> None:
    r.dims = dims


def _rolled(call: Call, q: Any, k: Any, by: int, tables: Any, how: Any) -> Any:
    q, k = (moved(x, lambda a: np.roll(a, -by, -1)) for x in (q, k))
    q_out, k_out = (moved(x, lambda a: np.roll(a, by, -1)) for x in call.base(q, k, *tables, **how))
    return q_out, k_out


# ----------------------------------------------------------------------------------------------------------- positions


def _shifted(which: int, by: int) -> Callable[..., Any]:
    def wrong(call: Call, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
        earlier = np.maximum(np.arange(number(cos).shape[1]) - by, 0)
        late = [moved(t, lambda a: a[:, earlier]) for t in (cos, sin)]
        right, other = call.base(q, k, cos, sin, **how), call.base(q, k, *late, **how)
        return (other[0], right[1]) if which == 0 else (right[0], other[1])

    return wrong


def _move(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rotation], Any]:
    def edit(r: Rotation) -> Any:
        before, r.positions = r.positions, change(r.positions)
        return not np.array_equal(before, r.positions)

    return edit


def _positions() -> Iterator[Hypothesis]:
    yield _rope("q one position behind", "the positions of q one behind those of k", _shifted(0, 1), "q_rope")
    yield _rope("k one position behind", "the positions of k one behind those of q", _shifted(1, 1), "k_rope")
    ordinary = lambda p: np.broadcast_to(np.arange(p.shape[1]), p.shape)  # noqa: E731
    yield _turn("position_ids ignored", "position_ids ignored: 0, 1, 2, ... in every row", _move(ordinary))
    for n in (16, 32, 64):
        again = lambda p, n=n: p % n  # noqa: E731
        yield _turn(f"positions restart after {n}", f"positions that restart every {n} tokens", _move(again))
        capped = lambda p, n=n: np.minimum(p, n - 1)  # noqa: E731
        yield _turn(f"positions stop at {n}", f"positions that stop at {n - 1}", _move(capped))
    yield _turn("positions doubled", "positions 0, 2, 4, ...", _move(lambda p: p * 2))
    yield _turn("positions halved", "positions 0, 0, 1, 1, ...", _move(lambda p: p // 2))
    yield _turn(
        "positions one late from the middle",
        "positions one late in the second half of the rows",
        _move(_late),
        ahead=True,
    )
    yield _turn("first position twice", "position 0 for the first two tokens", _move(lambda p: np.maximum(p - 1, 0)))
    yield one_of(
        "positions of each piece restart",
        "positions that restart with every cached piece",
        "rope",
        _TURNED,
        _restarting,
    )


def _late(p: np.ndarray) -> np.ndarray:
    return p + (np.arange(p.shape[1]) >= p.shape[1] // 2)


def _restarting(setup: Setup) -> None:
    starts = np.array(setup.tokens.pieces)
    if len(starts) < 2:
        raise DoesNotApplyError
    at = np.arange(setup.ids.shape[1])
    r = setup.rotate()
    r.positions = r.positions - starts[np.searchsorted(starts, at, "right") - 1]


def _formats() -> Iterator[Hypothesis]:
    for dtype in ("bfloat16", "float16"):
        narrow = lambda x, dtype=dtype: rounded(x, dtype)  # noqa: E731
        yield _turn(f"angles in {dtype}", f"rotary angles in {dtype}", partial(_change_angles, change=narrow))
        yield _turn(f"frequencies in {dtype}", f"rotary frequencies in {dtype}", partial(_power, change=narrow))
        both = lambda r, f=narrow: (r.cos.append(f), r.sin.append(f))[0]  # noqa: E731
        yield _turn(f"tables in {dtype}", f"cos and sin in {dtype}", both, places=True)
