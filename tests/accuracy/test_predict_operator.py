"""The predicted error of one operator is the error that right implementations make."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from refllm import kernels, ops
from refllm.accuracy.judge import rounding_error
from refllm.accuracy.operator import OPERATORS, Predicted, _Steps, predict
from refllm.errors import InputError
from refllm.kernels import plain
from refllm.ops.contracts import CONTRACTS
from refllm.precision import FUSED, HF_EAGER, Arithmetic, Policy, rounding

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
DTYPES = ("bfloat16", "float16", "float32")
E, F, H, K, D, R, S, T, V = 96, 40, 4, 2, 16, 12, 24, 40, 300
INDEPENDENT = ("normal", "small", "large")
LATTICE = ("mean 1000", "outlier 1e4")
"""In a narrow format these have few distinct values, or one that fixes a norm: errors repeat, are not independent."""


def values(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape)
    if kind == "outlier 1e4":
        x.reshape(-1, shape[-1])[:, 3] *= 1e4
    return x * {"small": 1e-3, "large": 30.0}.get(kind, 1.0) + (1000.0 if kind == "mean 1000" else 0.0)


def calls(operator: str, kind: str, seed: int = 0) -> Iterator[Call]:
    """Calls of the operator with the kind's values where the operator's own input goes."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    x, residual, weight, bias = values(rng, kind, 2, S, E), normal((2, S, E)), 1 + 0.3 * normal(E), normal(E)
    angle = np.arange(1000, 1000 + S)[:, None] * 1e4 ** (-np.arange(0, R, 2) / R)
    table = np.cos(angle), np.sin(angle)
    q, k = values(rng, kind, 2, H, S, D), values(rng, kind, 2, K, S, D)
    keys, v = normal((2, K, T, D)), values(rng, kind, 2, K, T, D)
    if operator in ("rms_norm", "layer_norm"):
        yield operator, (x, weight, 1e-6) if operator == "rms_norm" else (x, weight, bias, 1e-6), {}
    elif operator in ("add_rms_norm", "add_layer_norm"):
        yield operator, (x, residual, weight, *([None] if "layer" in operator else []), 1e-6), {}
    elif operator == "rope":
        yield operator, (q, k, *table), {"interleaved": True}
    elif operator == "norm_rope":
        weights = 1 + 0.3 * normal((H, D)), 1 + 0.3 * normal((K, D))
        for norm in ("rms", "layer"):
            yield operator, (q, k, *weights, *table, 1e-5), {"norm": norm, "interleaved": False}
    elif operator == "rms_norm_qkv_rope":
        projection, heads = normal(((H + 2 * K) * D, E)) / E**0.5, {"num_heads": H, "num_kv_heads": K}
        for b in (None, 3 * normal((H + 2 * K) * D)):
            yield operator, (x, weight, projection, b, *table, 1e-6), {**heads, "interleaved": False}
    elif operator == "attention":
        queries = normal((2, H, S, D))
        yield operator, (queries, keys, v), {}
        yield operator, (6 * queries, keys, v), {"return_lse": True}
        seen = rng.random((2, T)) > 0.3
        seen[:, 0] = True
        yield operator, (queries, keys, v), {"key_mask": seen, "causal": False, "scale": 0.4}
    elif operator == "decode_attention":
        yield operator, (normal((2, H, 3, D)), keys, v, np.array([T, 7])), {}
    elif "halves" in CONTRACTS[operator].kinds.values():
        yield operator, (3 * values(rng, kind, S, F), normal((S, F))), {}
    elif "labels" in CONTRACTS[operator].arguments:
        yield from losses(rng, operator, kind, "none")
    else:
        yield operator, ((0.2 if kind in LATTICE else 1.0) * values(rng, kind, S, F),), {}


def losses(rng: np.random.Generator, operator: str, kind: str, reduction: str) -> Iterator[Call]:
    labels, scale = rng.integers(0, V, 60), {"normal": 5.0, "outlier 1e4": 0.1}.get(kind, 1.0)
    labels[::7] = -100
    if operator == "cross_entropy":
        yield operator, (scale * values(rng, kind, 60, V), labels), {"reduction": reduction}
    else:
        x, weight = values(rng, kind, 60, E), 3 * rng.standard_normal((V, E)) / E**0.5
        x = 0.01 * x if kind in LATTICE else x
        yield operator, (x, weight, labels), {"reduction": reduction}


def on_grid(value: Any, dtype: str) -> Any:
    floats = isinstance(value, np.ndarray) and value.dtype == np.float64
    return rounding(dtype)(value.astype(np.float32)) if floats else value


def tensor(value: Any, dtype: str) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    t = torch.from_numpy(value)
    return t.to(getattr(torch, dtype)) if t.is_floating_point() else t


def both(call: Call, dtype: str, policy: Policy) -> tuple[tuple[Predicted, ...], dict[str, tuple[np.ndarray, ...]]]:
    """The prediction, and what the definition and the plain Torch form compute in that precision."""
    operator, given, named = call
    arguments, keywords = [on_grid(a, dtype) for a in given], {k: on_grid(a, dtype) for k, a in named.items()}
    with np.errstate(all="ignore"):
        results = {"definition": getattr(ops, operator)(*arguments, **keywords, ar=Arithmetic(dtype, policy))}
    if policy is FUSED:
        tensors = [tensor(a, dtype) for a in arguments], {k: tensor(a, dtype) for k, a in keywords.items()}
        results["plain"] = getattr(plain, operator)(*tensors[0], **tensors[1])
    return predict(operator, arguments, keywords, dtype=dtype, policy=policy), {
        who: tuple(
            np.asarray(y.double().numpy() if isinstance(y, torch.Tensor) else y, np.float64)
            for y in (out if isinstance(out, tuple) else (out,))
        )
        for who, out in results.items()
    }


def tail(dtype: str) -> float:
    """How many sigma one element of thousands may be off. In float32 the error depends on the partial sums of a
    product, whose size is predicted for a random order of the terms; a few have far larger ones."""
    return 10.0 if dtype == "float32" else 6.0


def compared(call: Call, dtype: str, policy: Policy) -> Iterator[tuple[str, float, float]]:
    """(who and what, rms error over rms sigma, largest |error| / sigma) of every output. Where nothing may be wrong,
    nothing is."""
    predicted, results = both(call, dtype, policy)
    for who, outputs in results.items():
        for i, (y, p) in enumerate(zip(outputs, predicted, strict=True)):
            finite = np.isfinite(y) & np.isfinite(p.exact)
            error, sigma = np.zeros(y.shape), np.where(finite, p.sigma, 0.0)
            np.subtract(y, p.exact, out=error, where=finite)
            assert not error[sigma == 0].any(), (call[0], who, dtype, policy.name)
            if not sigma.any():
                continue  # everything overflows float16
            z = np.abs(error[sigma > 0]) / sigma[sigma > 0]
            ratio = float(np.sqrt(np.mean(error**2) / np.mean(sigma**2)))
            yield f"{call[0]} {i}, {who}, {dtype} {policy.name}", ratio, float(z.max())


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_error_of_right_implementations_is_the_predicted_one(operator: str) -> None:
    for kind in INDEPENDENT:
        assert list(calls(operator, kind))
        for call in calls(operator, kind):
            for dtype in DTYPES:
                for policy in (FUSED, HF_EAGER):
                    for what, ratio, largest in compared(call, dtype, policy):
                        # The log-sum-exp of bfloat16 values is better than predicted: their products have 16 digits,
                        # so float32 sums of a few of them are exact.
                        least = 0.35 if what.startswith("attention 1") and dtype != "float32" else 0.6
                        assert least < ratio < 1.4, (what, kind, ratio)
                        assert largest < tail(dtype), (what, kind, largest)


@pytest.mark.parametrize("operator", OPERATORS)
def test_where_errors_repeat_they_are_still_bounded(operator: str) -> None:
    for kind in LATTICE:
        assert list(calls(operator, kind))
        for call in calls(operator, kind):
            for dtype in DTYPES:
                for policy in (FUSED, HF_EAGER):
                    for what, ratio, largest in compared(call, dtype, policy):
                        assert ratio < 2.0, (what, kind, ratio)
                        assert largest < tail(dtype), (what, kind, largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_the_error_of_a_mean_loss_is_the_predicted_one(operator: str, reduction: str, dtype: str) -> None:
    z: dict[str, list[float]] = {}
    for seed in range(24):
        (call,) = losses(np.random.default_rng(seed), operator, "normal", reduction)
        (p,), results = both(call, dtype, FUSED)
        for who, (y,) in results.items():
            z.setdefault(who, []).append(float((y - p.exact) / p.sigma))
    for who, scores in z.items():
        assert 0.4 < np.sqrt(np.mean(np.square(scores))) < 1.6, who
        assert np.abs(scores).max() < 4.5, who


def test_equal_rows_make_equal_errors_and_their_mean_has_the_error_of_one() -> None:
    rng = np.random.default_rng(0)
    rows, weight = (on_grid(rng.standard_normal(shape), "bfloat16") for shape in ((64, E), (V, E)))

    def sigma(x: np.ndarray) -> float:
        arguments = (x, weight, np.zeros(len(x), np.int64))
        return float(predict("linear_cross_entropy", arguments, {}, dtype="bfloat16", policy=FUSED)[0].sigma)

    one = sigma(rows[:1])
    assert sigma(np.repeat(rows[:1], 64, axis=0)) == pytest.approx(one, rel=0.01)
    assert sigma(rows) < 0.3 * one


def test_the_error_of_a_long_sum_of_losses_is_that_of_its_additions() -> None:
    """64 losses of 1 without an error of their own, the figure by hand: 16 chains of 4 that are added in pairs on 4
    levels, and of a vector of 8 half is left over on average. 0.541 is what the square of an ulp is on average."""
    total = _Steps("float32", FUSED)._reduced(np.ones(64), np.zeros(64), 64, "sum")
    squares = 63**2 * (4**2 / (3 * 64) + 2 + 8 / 2) + (4 + 4)
    assert float(total.value) == 64
    assert float(total.variance) == pytest.approx(squares * 0.541 * 2.0**-46 / 12, rel=1e-12)


def test_a_rounding_is_off_by_a_twelfth_of_the_squared_spacing() -> None:
    exact = np.array([1.0, -1.9, 3.0, 0.0])
    spacing = np.array([2.0**-7, 2.0**-7, 2.0**-6, 2.0**-133])
    np.testing.assert_allclose(rounding_error(exact, "bfloat16"), spacing / 12**0.5, rtol=1e-6)


def test_one_rounding_too_many_is_seen() -> None:
    ((_, (x, weight, eps), _),) = calls("rms_norm", "normal")
    x, weight = on_grid(x, "bfloat16"), on_grid(weight, "bfloat16")
    (p,) = predict("rms_norm", (x, weight, eps), {}, dtype="bfloat16", policy=FUSED)
    y = ops.rms_norm(x, weight, eps, ar=Arithmetic("bfloat16", HF_EAGER))
    assert np.sqrt(np.mean((y - p.exact) ** 2) / np.mean(p.variance)) > 1.3


def test_exact_is_the_definition_and_what_is_copied_has_no_error() -> None:
    ((_, arguments, keywords),) = calls("rope", "normal")
    predicted = predict("rope", arguments, keywords, dtype="bfloat16", policy=FUSED)
    assert len(predicted) == 2
    for p, exact in zip(predicted, ops.rope(*arguments, **keywords), strict=True):
        np.testing.assert_array_equal(p.exact, exact)
        assert (p.variance[..., R:] == 0).all()
        assert (p.variance[..., :R] > 0).all()


def test_tiny_values_have_a_tiny_error_not_none() -> None:
    ((_, (q, k, *tables), keywords),) = calls("rope", "normal")
    for dtype in ("bfloat16", "float32"):
        for _, ratio, _ in compared(("rope", (q * 1e-25, k * 1e-25, *tables), keywords), dtype, FUSED):
            assert 0.7 < ratio < 1.4


def test_numpy_in_another_order_has_the_error_predicted_for_float64() -> None:
    ((_, (x, weight, eps), _),) = calls("rms_norm", "normal")
    (p,) = predict("rms_norm", (x, weight, eps), {}, dtype="float64", policy=FUSED)
    y = weight * (x / np.sqrt(np.cumsum(x**2, axis=-1)[..., -1:] / E + eps))
    assert 0.1 < np.sqrt(np.mean((y - p.exact) ** 2) / np.mean(p.variance)) < 2


def assert_sound(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Predicted, ...]:
    for dtype in (*DTYPES, "float64"):
        for policy in (FUSED, HF_EAGER):
            predicted = predict(operator, arguments, keywords, dtype=dtype, policy=policy)
            for p in predicted:
                assert p.exact.dtype == np.float64
                assert p.exact.shape == p.variance.shape
                assert np.isfinite(p.variance).all()
                assert (p.variance >= 0).all()
                assert not p.variance[~np.isfinite(p.exact)].any()
    return predicted


@pytest.mark.filterwarnings("error")
def test_nan_infinity_and_overflow_are_carried() -> None:
    x = np.random.default_rng(0).standard_normal((4, E)).astype(np.float32)
    x[0, 3], x[1, 2], x[2] = np.nan, -np.inf, x[2] * 1e30
    ones = np.ones(E, np.float32)
    (y,) = assert_sound("rms_norm", (x, ones, 1e-6), {})
    assert np.isnan(y.exact[0]).all()
    assert (y.variance[3] > 0).all()
    assert_sound("layer_norm", (x, ones, ones, 0.0), {})
    assert_sound("layer_norm", (0 * ones[None], ones, None, 0.0), {})
    assert_sound("add_rms_norm", (x, x, ones, 1e-6), {})
    assert_sound("relu2", (1e20 * x[3:],), {})
    assert_sound("swiglu", (-1e3 * x, x), {})
    logits = x.copy()
    logits[3, 7] = -np.inf
    (loss,) = assert_sound("cross_entropy", (logits, np.array([0, 1, -100, 5])), {"reduction": "none"})
    assert np.isnan(loss.exact[0])
    assert loss.variance[3] > 0
    for operator in ("cross_entropy", "linear_cross_entropy"):
        arguments = (logits, logits, np.full(4, -100)) if "linear" in operator else (logits, np.full(4, -100))
        (mean,) = assert_sound(operator, arguments, {})
        assert np.isnan(mean.exact)


def test_a_logit_of_minus_infinity_is_as_good_as_none() -> None:
    logits = on_grid(np.random.default_rng(0).standard_normal((6, 40)) - 50, "float32")
    with_hole = np.insert(logits, 7, -np.inf, axis=1)
    for reduction in ("none", "mean"):
        (p,), (q,) = (
            predict("cross_entropy", (x, np.arange(6)), {"reduction": reduction}, dtype="float32", policy=FUSED)
            for x in (logits, with_hole)
        )
        np.testing.assert_allclose(q.exact, p.exact, rtol=1e-12)
        np.testing.assert_allclose(q.variance, p.variance, rtol=0.1)


@pytest.mark.filterwarnings("error")
def test_what_masked_keys_hold_changes_no_prediction() -> None:
    ((_, (q, k, v), keywords),) = (c for c in calls("attention", "normal") if "key_mask" in c[2])
    keywords = {**keywords, "return_lse": True, "causal": True}
    hidden = ~keywords["key_mask"][:, None, :, None]
    clean = predict("attention", (q, k, v), keywords, dtype="bfloat16", policy=FUSED)
    assert len(clean) == 2
    for poison in (np.nan, np.inf, 1e30):
        dirty = (q, np.where(hidden, poison, k), np.where(hidden, poison, v))
        for p, expected in zip(
            predict("attention", dirty, keywords, dtype="bfloat16", policy=FUSED), clean, strict=True
        ):
            np.testing.assert_array_equal(p.exact, expected.exact)
            np.testing.assert_allclose(p.variance, expected.variance, rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_nothing_to_attend_to_and_nothing_at_all() -> None:
    ((_, (q, k, v), _), *_) = calls("attention", "normal")
    nobody = np.ones((2, T), bool)
    nobody[1] = False
    out, lse = assert_sound("attention", (q, k, v), {"key_mask": nobody, "return_lse": True})
    assert not out.exact[1].any()
    assert not out.variance[1].any()
    assert np.isneginf(lse.exact[1]).all()
    assert_sound("attention", (q, k[:, :, :3], v[:, :, :3]), {"return_lse": True})  # more queries than keys
    assert_sound("attention", (q, k[:, :, :0], v[:, :, :0]), {"return_lse": True})
    assert_sound("attention", (q[:, :, :0], k, v), {})
    assert_sound("attention", (q, k, v), {"scale": 0.0})
    assert_sound("decode_attention", (q[:, :, :2], k, v, np.array([0, T])), {})
    for shape in ((0, E), (2, 0, E)):
        assert_sound("rms_norm", (np.zeros(shape), np.ones(E), 1e-6), {})
    assert_sound("cross_entropy", (np.zeros((0, V)), np.zeros(0, np.int64)), {})


def test_every_operator_of_the_kernels_is_known_and_others_are_refused() -> None:
    assert set(OPERATORS) == set(kernels.OPERATORS)
    with pytest.raises(InputError, match=r"operator 'gelu' is not known; there are rms_norm, "):
        predict("gelu", (), {}, dtype="float32", policy=FUSED)
    with pytest.raises(InputError, match=r"dtype='int8' is not known; use one of float64, "):
        predict("relu2", (np.ones(2),), {}, dtype="int8", policy=FUSED)
