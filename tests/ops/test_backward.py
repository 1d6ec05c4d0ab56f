"""The definitions of the backward pass: against Torch's autograd in float64, finite differences, and identities.

Every case is a forward definition with its arguments; the incoming gradients are drawn along the results, one-signed,
zero in some rows, and at random.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm import ops
from refllm.ops.activation import ACTIVATIONS
from refllm.precision import EXACT, arithmetic

RNG = np.random.default_rng(5)
B, S, H, K, D, E, N, V = 2, 5, 4, 2, 6, 12, 7, 11
EPS = 1e-5


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def tables() -> tuple[np.ndarray, np.ndarray]:
    angles = normal(S, 2)
    return np.cos(angles), np.sin(angles)


COS, SIN = tables()
LABELS = np.array([3, -100, 0, 10, 3, -100, 7])


@dataclass(frozen=True)
class Case:
    """An operator on arguments, of which the first `arrays` have gradients. results: how many of them are given one.

    fixed: the further arguments by place, those of the forward definition and of its backward pass.
    """

    name: str
    arrays: tuple[np.ndarray | None, ...]
    fixed: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        out = getattr(ops, self.name)(*arrays, *self.fixed, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def back(self, grads: tuple[np.ndarray, ...]) -> tuple[np.ndarray | None, ...]:
        arrays = () if self.name == "rope" else self.arrays  # a rotation back needs nothing of what was turned
        out = getattr(ops, f"{self.name}_backward")(*grads, *arrays, *self.fixed, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def __str__(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.options.values() if isinstance(v, str | bool | float))])


HEADS = (normal(B, H, S, D), normal(B, K, S, D))
CASES = [
    Case("linear", (normal(B, S, E), normal(N, E), normal(N))),
    Case("linear", (normal(B, S, E), normal(N, E), None)),
    Case("rms_norm", (normal(B, S, E), normal(E)), (EPS,)),
    Case("layer_norm", (normal(B, S, E) + 3, normal(E), normal(E)), (EPS,)),
    Case("layer_norm", (normal(B, S, E), normal(E), None), (EPS,)),
    Case("add_rms_norm", (normal(B, S, E), normal(B, S, E), normal(E)), (EPS,)),
    Case("add_layer_norm", (normal(B, S, E), normal(B, S, E), normal(E), normal(E)), (EPS,)),
    *(Case("rope", HEADS, (COS, SIN), {"interleaved": flag}) for flag in (False, True)),
    *(Case("norm_rope", (*HEADS, normal(H, D), normal(K, D)), (COS, SIN, EPS), {"norm": norm, "interleaved": True})
      for norm in ("rms", "layer")),
    Case("rms_norm_qkv_rope", (normal(B, S, E), normal(E), normal((H + 2 * K) * D, E), normal((H + 2 * K) * D)),
         (COS, SIN, EPS), {"num_heads": H, "num_kv_heads": K, "interleaved": False}),
    Case("swiglu", (normal(B, S, E), normal(B, S, E))),
    Case("relu2", (normal(B, S, E),)),
    *(Case("activation", (normal(B, S, E) * 2,), (name,)) for name in ACTIVATIONS),
    *(Case("glu", (normal(B, S, E), normal(B, S, E)), (name,)) for name in ("silu", "gelu", "relu2")),
    *(Case("cross_entropy", (normal(N, V),), (LABELS,), {"reduction": how}) for how in ("mean", "sum", "none")),
    *(Case("linear_cross_entropy", (normal(N, E), normal(V, E)), (LABELS,), {"reduction": how})
      for how in ("mean", "sum")),
    Case("mean_squared_error", (normal(N, 3),), (normal(N, 3),)),
    Case("binary_cross_entropy", (normal(N, 3),), (np.abs(normal(N, 3)) % 1,)),
]  # fmt: skip


def incoming(results: tuple[np.ndarray, ...], how: str) -> tuple[np.ndarray, ...]:
    """Gradients of the results: along them, one-signed, zero in the first row, at random."""
    rng = np.random.default_rng(1)
    drawn = [rng.standard_normal(np.shape(r)) for r in results]
    if how == "along":
        drawn = [np.array(r) for r in results]
    elif how == "one-signed":
        drawn = [np.abs(d) + 1 for d in drawn]
    elif how == "zero rows":
        drawn = [np.where(np.arange(d.shape[0]).reshape(-1, *[1] * (d.ndim - 1)) == 0, 0, d) if d.ndim else d
                 for d in drawn]  # fmt: skip
    return tuple(drawn)


def differences(case: Case, grads: tuple[np.ndarray, ...], which: int, at: tuple[int, ...]) -> float:
    """The derivative of <results, grads> by one element, by differences of six points."""
    arrays = [None if a is None else a.copy() for a in case.arrays]
    step, values = 2e-3, []
    for shift in (-3, -2, -1, 1, 2, 3):
        moved = arrays[which].copy()  # type: ignore[union-attr]
        moved[at] += shift * step
        results = case.run(*arrays[:which], moved, *arrays[which + 1 :])
        values.append(sum(float(np.sum(r * g)) for r, g in zip(results, grads, strict=True)))
    weights = (-1, 9, -45, 45, -9, 1)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / (60 * step)


@pytest.mark.parametrize("how", ["along", "one-signed", "zero rows", "random"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_finite_differences(case: Case, how: str) -> None:
    grads = incoming(case.run(*case.arrays), how)
    found = case.back(grads)
    rng = np.random.default_rng(2)
    for which, array in enumerate(case.arrays):
        if array is None:
            assert found[which] is None
            continue
        gradient = found[which]
        assert gradient is not None
        assert gradient.shape == array.shape
        for _ in range(3):
            at = tuple(int(rng.integers(n)) for n in array.shape)
            exact = differences(case, grads, which, at)
            if abs(array[at]) > 0.01 or case.fixed[:1] not in [("relu",), ("relu2",), ("leaky_relu",)]:  # corners
                assert abs(gradient[at] - exact) < 1e-9 * max(1, np.abs(gradient).max()), (which, at)


def torch_of(name: str, fixed: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any] | None:
    """Torch's own form, of those that it has."""
    import torch.nn.functional as F

    if name == "layer_norm":
        return lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS)
    if name == "rms_norm":
        return lambda x, w: F.rms_norm(x, w.shape, w, EPS)
    if name == "linear":
        return F.linear
    if name == "swiglu":
        return lambda g, u: F.silu(g) * u
    if name == "cross_entropy":
        import torch

        return lambda x: F.cross_entropy(x, torch.from_numpy(fixed[0]), reduction=options["reduction"])
    if name == "activation":
        from transformers.activations import ACT2FN

        return ACT2FN[fixed[0]]
    return None


@pytest.mark.parametrize("case", [c for c in CASES if c.name in
                                  ("layer_norm", "rms_norm", "linear", "swiglu", "cross_entropy", "activation")],
                         ids=lambda c: f"{c}-{c.fixed[:1] if c.name == 'activation' else ''}")  # fmt: skip
def test_gradients_are_those_of_autograd(case: Case) -> None:
    import torch

    theirs = torch_of(case.name, case.fixed, case.options)
    assert theirs is not None
    arrays = [None if a is None else torch.from_numpy(a).requires_grad_() for a in case.arrays]
    result = theirs(*arrays)
    (grad,) = incoming((result.detach().numpy(),), "random")
    result.backward(torch.from_numpy(np.asarray(grad)))
    for found, array in zip(case.back((grad,)), arrays, strict=True):
        if array is not None:
            expected = array.grad.numpy()
            assert found is not None
            assert np.abs(found - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_those_of_autograd_at_corners_and_in_the_tails(name: str) -> None:
    """Where an activation has a corner the choice is Torch's; where one saturates the slope is a number, also where the
    quotient that autograd takes is 0 / 0."""
    import torch
    from transformers.activations import ACT2FN

    places = [0.0, -0.0, 1e-30, 3, -3, 6, 10, -10, 35, -35, -45, 90, -90, 104, -104, 750, -750, 1e5, -1e5]
    exact = 1e-11 if name == "gelu_fast" else 1e-12  # Transformers has sqrt(2 / pi) to ten digits there
    for dtype, tolerance in ((np.float64, exact), (np.float32, 1e-5)):  # 1 - tanh^2 cancels, and is multiplied by x^3
        x = np.array([*places, *np.linspace(-12, 12, 101)], dtype)
        tensor = torch.from_numpy(x).requires_grad_()
        ACT2FN[name](tensor).sum().backward()
        expected = tensor.grad.numpy()
        ar = arithmetic("float32") if dtype == np.float32 else arithmetic("float64")
        found = ops.activation_backward(np.ones_like(x), x, name, ar=ar)
        assert found.dtype == dtype
        assert np.isfinite(found).all()
        known = np.isfinite(expected)
        assert (known | (x < -100)).all()
        assert np.abs(found - expected)[known].max() <= tolerance, x[known][np.abs(found - expected)[known].argmax()]
        assert np.abs(found[~known]).max(initial=0) < 1e-20


# -- attention ---------------------------------------------------------------------------------------------------------


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and options of a call: more keys than queries, grouped heads, padding, windows, no causal mask."""
    group, kv, s = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    return {
        "shape": (draw(st.integers(1, 2)), group * kv, kv, s, s + draw(st.integers(0, 3)), draw(st.integers(1, 4))),
        "causal": draw(st.booleans()),
        "padded": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 3)),
        "scale": draw(st.none() | st.floats(0.1, 2)),
        "lse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def drawn_attention(call: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    b, h, k, s, t, d = call["shape"]
    rng = np.random.default_rng(call["seed"])
    q, key, v = (rng.standard_normal(shape) for shape in ((b, h, s, d), (b, k, t, d), (b, k, t, d)))
    options = {"causal": call["causal"], "scale": call["scale"], "window": call["window"] if call["causal"] else None}
    if call["padded"]:
        options["key_mask"] = np.arange(t) >= rng.integers(0, t + 1, (b, 1))
    return [q, key, v], options


@given(attentions())
@settings(max_examples=40)
def test_attention_against_autograd_of_its_formula(call: dict[str, Any]) -> None:
    import torch

    arrays, options = drawn_attention(call)
    (b, h, k, s, t, d), rng = call["shape"], np.random.default_rng(call["seed"] + 1)
    q, key, v = (torch.from_numpy(a).requires_grad_() for a in arrays)
    seen = torch.ones(b, 1, s, t, dtype=torch.bool)
    if options["causal"]:
        behind = torch.arange(t - s, t)[:, None] - torch.arange(t)
        seen = seen & (behind >= 0) & (behind < (options["window"] or t))
    if "key_mask" in options:
        seen = seen & torch.from_numpy(options["key_mask"])[:, None, None]
    repeated = [x.repeat_interleave(h // k, 1) for x in (key, v)]
    scores = q @ repeated[0].transpose(-1, -2) * (options["scale"] or d**-0.5)
    none = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(none, 0.0)
    probs = torch.softmax(scores, -1).masked_fill(none, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(none[..., 0], 0.0)
    do = rng.standard_normal(q.shape)
    dlse = rng.standard_normal((b, h, s)) * (~none[..., 0]).numpy() if call["lse"] else None
    loss = (probs @ repeated[1] * torch.from_numpy(do)).sum()
    loss = loss + (lse * torch.from_numpy(dlse)).sum() if dlse is not None else loss
    loss.backward()
    kept: list[Any] = list(ops.attention(*arrays, **options, return_lse=True)) if call["seed"] % 2 else [None, None]
    found = ops.attention_backward(do, *arrays, *kept, dlse_BHS=dlse, **options)
    for mine, tensor in zip(found, (q, key, v), strict=True):
        assert np.abs(mine - tensor.grad.numpy()).max(initial=0) <= 1e-12 * max(1.0, float(tensor.grad.abs().max()))


@given(attentions())
@settings(max_examples=20)
def test_what_nobody_sees_has_no_gradient_and_reaches_nothing(call: dict[str, Any]) -> None:
    arrays, options = drawn_attention({**call, "padded": True})
    do = np.random.default_rng(0).standard_normal(arrays[0].shape)
    hidden = ~options["key_mask"]
    dirty = [arrays[0], *(np.where(hidden[:, None, :, None], np.nan, x) for x in arrays[1:])]
    clean, found = (ops.attention_backward(do, *given, **options) for given in (arrays, dirty))
    for a, b in zip(clean, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert not any(gradient.transpose(0, 2, 1, 3)[hidden].any() for gradient in found[1:])


def test_decode_attention_is_attention_over_the_slots_in_use() -> None:
    q, keys, values, do = normal(2, H, 3, D), normal(2, K, 9, D), normal(2, K, 9, D), normal(2, H, 3, D)
    found = ops.decode_attention_backward(do, q, keys, values, np.array([4, 0]))
    one = ops.attention_backward(do[:1], q[:1], keys[:1, :, :4], values[:1, :, :4])
    np.testing.assert_array_equal(found[0][:1], one[0])
    np.testing.assert_array_equal(found[1][:1, :, :4], one[1])
    assert not found[1][0, :, 4:].any()
    assert not any(f[1].any() for f in found)


# -- where it rounds ---------------------------------------------------------------------------------------------------

NARROW = arithmetic("bfloat16", "hf-eager")


def grid(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Numbers of bfloat16."""
    import ml_dtypes

    return (normal(*shape) * scale).astype(ml_dtypes.bfloat16).astype(np.float32)


def eager(name: str) -> tuple[Callable[..., Any], list[np.ndarray], Callable[..., Any]]:
    """Transformers' eager code of an operator, its arrays, and our backward pass of (gradient, *arrays)."""
    import torch
    from transformers.models.llama import modeling_llama as llama

    rows, width = 64, 96
    if name == "rms_norm":

        def norm(x: Any, w: Any) -> Any:
            module = llama.LlamaRMSNorm(width, 1e-5).to(torch.bfloat16)
            return torch.func.functional_call(module, {"weight": w}, x)

        return (norm, [grid(rows, width), grid(width)], lambda g, x, w: ops.rms_norm_backward(g, x, w, 1e-5, ar=NARROW))
    if name == "layer_norm":
        import torch.nn.functional as F

        return (
            lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-5),
            [grid(rows, width), grid(width), grid(width)],
            lambda g, x, w, b: ops.layer_norm_backward(g, x, w, b, 1e-5, ar=NARROW),
        )
    if name == "glu":
        return (
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            [grid(rows, width), grid(rows, width)],
            lambda g, gate, up: ops.glu_backward(g, gate, up, "silu", ar=NARROW),
        )
    if name == "relu2":
        return (
            lambda x: torch.square(torch.relu(x)),
            [grid(rows, width)],
            lambda g, x: (ops.relu2_backward(g, x, ar=NARROW),),
        )
    if name == "linear":
        return (
            torch.nn.functional.linear,
            [grid(rows, width), grid(32, width)],
            lambda g, x, w: ops.linear_backward(g, x, w, ar=NARROW)[:2],
        )
    cos, sin = (grid(rows, 16) for _ in range(2))
    if name == "rope":
        both = [torch.from_numpy(np.concatenate([t, t], -1)).to(torch.bfloat16)[None] for t in (cos, sin)]
        return (
            lambda q: llama.apply_rotary_pos_emb(q, q, *both)[0],
            [grid(1, 2, rows, 32)],
            lambda g, q: ops.rope_backward(g, g, cos[None], sin[None], interleaved=False, ar=NARROW)[:1],
        )

    class Module(torch.nn.Module):
        num_key_value_groups, training = 3, False

    def attention(q: Any, k: Any, v: Any) -> Any:
        mask = torch.full((rows, rows), torch.finfo(torch.bfloat16).min).triu(1).to(torch.bfloat16)[None, None]
        return llama.eager_attention_forward(Module(), q, k, v, mask, 32**-0.5)[0].transpose(1, 2)

    return (
        attention,
        [grid(1, 6, rows, 32), grid(1, 2, rows, 32), grid(1, 2, rows, 32)],
        lambda g, q, k, v: ops.attention_backward(g, q, k, v, ar=NARROW),
    )


@pytest.mark.parametrize(("name", "most"), [("rms_norm", 0.01), ("layer_norm", 0.02), ("glu", 0.02), ("relu2", 0.0),
                                            ("linear", 0.01), ("rope", 0.0), ("attention", 0.05)])  # fmt: skip
def test_bfloat16_gradients_round_where_autograd_rounds(name: str, most: float) -> None:
    """Of all elements at most so many are not Torch's bits: where the order of a float32 sum crosses a boundary."""
    import torch

    forward, arrays, backward = eager(name)
    tensors = [torch.from_numpy(a).to(torch.bfloat16).requires_grad_() for a in arrays]
    result = forward(*tensors)
    grad = grid(*result.shape)
    result.backward(torch.from_numpy(grad).to(torch.bfloat16))
    for mine, tensor in zip(backward(grad, *arrays), tensors, strict=True):
        theirs = tensor.grad.float().numpy()
        assert np.mean(np.asarray(mine) != theirs) <= most, name


# -- identities --------------------------------------------------------------------------------------------------------


ROUNDING = 4e-15
"""Of the size of what is summed."""


def cancel(terms: np.ndarray, axis: Any = -1) -> None:
    """Sums along an axis that are 0."""
    assert (np.abs(terms.sum(axis)) <= ROUNDING * np.abs(terms).sum(axis)).all()


def agree(one: np.ndarray, other: np.ndarray, axis: Any = None, other_axis: Any = None) -> None:
    """Sums of two arrays that are equal."""
    size = np.abs(one).sum(axis) + np.abs(other).sum(other_axis)
    assert (np.abs(one.sum(axis) - other.sum(other_axis)) <= ROUNDING * size).all()


def test_identities_of_norms() -> None:
    """dx is orthogonal to each row; the weight's gradient along the weight is the result's along the result. After a
    sum both terms have that gradient, and what comes in beside the norm is added."""
    x, w, dy = normal(9, E), normal(E), normal(9, E)
    dx, dw = ops.rms_norm_backward(dy, x, w, 0.0)
    cancel(dx * x)
    agree(dw * w, dy * ops.rms_norm(x, w, 0.0))
    dx, dw, db = ops.layer_norm_backward(dy, x, w, np.zeros(E), 0.0)
    cancel(dx)
    cancel(dx * x)
    agree(dw * w, dy * ops.layer_norm(x, w, np.zeros(E), 0.0))
    agree(db, dy, (), 0)
    residual, beside = normal(9, E), normal(9, E)
    dx, dresidual, _ = ops.add_rms_norm_backward(dy, beside, x, residual, w, 0.0)
    np.testing.assert_array_equal(dx, dresidual)
    cancel((dx - beside) * (x + residual))


def test_identities_of_rotations() -> None:
    """A rotation back keeps lengths, of whole heads and of what is not rotated."""
    dq, dk = (normal(*x.shape) for x in HEADS)
    for interleaved in (False, True):
        for back, grad in zip(ops.rope_backward(dq, dk, COS, SIN, interleaved=interleaved), (dq, dk), strict=True):
            agree(np.square(back), np.square(grad), -1, -1)
            np.testing.assert_array_equal(back[..., 4:], grad[..., 4:])


def test_identities_of_softmax_and_losses() -> None:
    """A shift of all logits changes nothing, so their gradients cancel; ignored rows have none."""
    cancel(ops.softmax_backward(normal(4, 9), ops.softmax(normal(4, 9))))
    logits, x = normal(N, V), normal(N, E)
    for reduction in ("mean", "sum", "none"):
        dloss = normal(N) if reduction == "none" else 1.5
        dlogits = ops.cross_entropy_backward(dloss, logits, LABELS, reduction=reduction)
        cancel(dlogits[LABELS >= 0])
        assert not dlogits[LABELS == -100].any()
        assert dlogits[LABELS >= 0].any()
    dx, dweight = ops.linear_cross_entropy_backward(1.0, x, normal(V, E), LABELS)
    cancel(dweight, 0)
    assert not dx[LABELS == -100].any()


def test_identities_of_products_and_activations() -> None:
    """What is homogeneous has its degree: <du, u> = 2 <dy, y> for relu2, <dW, W> = <dy, W x> for a product."""
    u, g, w = normal(9, E), normal(9, E), normal(N, E)
    agree(ops.relu2_backward(g, u) * u, 2 * g * ops.relu2(u))
    dy = normal(9, N)
    dx, dweight, db = ops.linear_backward(dy, u, w, normal(N))
    agree(dweight * w, dy * ops.linear(u, w))
    agree(dx * u, dweight * w)
    agree(db, dy, (), 0)
    ids = np.array([[3, 1, 3], [3, 0, 1]])
    agree(ops.embedding_backward(dy := normal(2, 3, E), ids, np.zeros((5, E))), dy, 0, (0, 1))


@given(attentions())
@settings(max_examples=20)
def test_identities_of_attention(call: dict[str, Any]) -> None:
    """For each key/value head: <dQ, Q> = <dK, K>; dV sums to dO of the rows that have a key; without a mask that cuts
    dK sums to 0, as a vector added to every key moves all scores of a row alike."""
    (q, k, v), options = drawn_attention(call)
    b, h, kv, s, _, d = call["shape"]
    do = np.random.default_rng(call["seed"] + 1).standard_normal(q.shape)
    _, lse = ops.attention(q, k, v, **options, return_lse=True)
    dq, dk, dv = ops.attention_backward(do, q, k, v, **options)
    groups = (b, kv, h // kv, s, d)
    size = np.abs(q * do).sum() * np.abs(k).max() * np.abs(v).max() * (options["scale"] or 1.0)
    inner = (dq * q).reshape(groups).sum((2, 3, 4)) - (dk * k).sum((2, 3))
    assert np.abs(inner).max(initial=0) <= 1e-13 * max(size, 1e-3)
    seeing = np.where(np.isfinite(lse)[..., None], do, 0).reshape(groups)
    assert np.abs(dv.sum(2) - seeing.sum((2, 3))).max(initial=0) <= 1e-13 * np.abs(do).sum()
    assert np.abs(dk.sum(2)).max(initial=0) <= 1e-13 * max(size, 1e-3)


def test_the_gradient_of_an_embedding_is_a_sum_over_its_places() -> None:
    ids, dy = np.array([[3, 1, 3], [3, 0, 1]]), normal(2, 3, E)
    found = ops.embedding_backward(dy, ids, np.zeros((5, E)))
    expected = np.zeros((5, E))
    np.add.at(expected, ids, dy)
    np.testing.assert_allclose(found, expected, atol=1e-15)
    ones = ops.embedding_backward(np.ones((1000, 2)), np.zeros(1000, int), np.zeros((3, 2)),
                                  ar=arithmetic("bfloat16", "hf-eager"))  # fmt: skip
    assert ones[0].tolist() == [256, 256]  # torch adds row by row, and 256 + 1 is 256 in bfloat16
    fused = ops.embedding_backward(np.ones((1000, 2)), np.zeros(1000, int), np.zeros((3, 2)),
                                   ar=arithmetic("bfloat16", "fused"))  # fmt: skip
    assert fused[0].tolist() == [1000, 1000]


def test_gradients_add_up_over_rows() -> None:
    """What several rows share has the sum of their gradients; each row of the rest is its own."""
    x, w, dy = normal(6, E), normal(E), normal(6, E)
    dx, dw = ops.rms_norm_backward(dy, x, w, EPS)
    parts = [ops.rms_norm_backward(dy[i : i + 2], x[i : i + 2], w, EPS) for i in (0, 2, 4)]
    np.testing.assert_array_equal(dx, np.concatenate([part[0] for part in parts]))
    np.testing.assert_allclose(dw, sum(part[1] for part in parts), rtol=1e-12)


def test_every_backward_pass_is_called_here() -> None:
    called = {case.name for case in CASES} | {"attention", "decode_attention", "softmax", "embedding"}
    moved = {"add", "merge_heads", "split_heads"}
    forward = {name for name in ops.__all__ if callable(getattr(ops, name)) and not name.endswith("_backward")}
    backward = {name.removesuffix("_backward") for name in ops.__all__ if name.endswith("_backward")}
    assert backward == forward
    assert called | moved == backward


def test_what_moves_moves_back() -> None:
    x = normal(B, S, E)
    np.testing.assert_array_equal(ops.split_heads_backward(ops.split_heads(x, H)), x)
    np.testing.assert_array_equal(ops.merge_heads_backward(x, H), ops.split_heads(x, H))
    assert all(part is dsum for dsum in [np.asarray(x)] for part in ops.add_backward(dsum))


def test_an_unknown_activation_and_a_label_outside_are_refused() -> None:
    from refllm.errors import InputError

    with pytest.raises(InputError, match="activation 'no' is not known"):
        ops.activation_backward(np.ones(2), np.ones(2), "no")
    with pytest.raises(InputError, match=r"labels: 11 is outside 0\.\.10"):
        ops.cross_entropy_backward(1.0, normal(1, V), np.array([V]))
    with pytest.raises(InputError, match="reduction='max' is not known"):
        ops.cross_entropy_backward(1.0, normal(1, V), np.array([0]), reduction="max")


def test_a_row_without_a_key_learns_as_autograd_of_the_eager_code_has_it() -> None:
    """Scores are pushed down by the largest number: all keys count alike, and adding a constant has the slope 1."""
    import torch

    key_mask = np.ones((B, S), bool)
    key_mask[0, :2] = False  # the first two queries see no key
    q, k, v, do = normal(B, H, S, D), normal(B, H, S, D), normal(B, H, S, D), normal(B, H, S, D)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    seen = np.tril(np.ones((S, S), bool)) & key_mask[:, None, None, :]
    pushed = torch.tensor(np.where(seen, 0.0, np.finfo(np.float64).min))
    scores = leaves[0] @ leaves[1].transpose(2, 3) * D**-0.5 + pushed
    (torch.softmax(scores, -1) @ leaves[2]).backward(torch.tensor(do))
    eager = replace(EXACT, policy=replace(EXACT.policy, masked_rows_are_zero=False))
    found = ops.attention_backward(do, q, k, v, key_mask=key_mask, ar=eager)
    for ours, leaf in zip(found, leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), rtol=0, atol=1e-12 * np.abs(ours).max())
    zero = ops.attention_backward(do, q, k, v, key_mask=key_mask)  # where such rows are 0, they learn nothing
    assert not zero[0][0, :, :2].any()
    assert found[0][0, :, :2].any()
