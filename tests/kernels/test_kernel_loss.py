"""What cross-entropy, of logits and of a product that is never stored, has to keep beside what all operators do
(test_operators.py)."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from refllm import kernels, ops
from refllm.kernels import arguments
from refllm.kernels.launch import Launch
from refllm.kernels.targets import TARGETS
from refllm.kernels.verify import assert_meets_contract

DTYPES = arguments.FLOATS
ce = importlib.import_module("refllm.kernels.triton.cross_entropy")
linear_ce = importlib.import_module("refllm.kernels.triton.linear_cross_entropy")
FORMS = ["triton", "plain"]


def form_of(form: str) -> Any:
    return kernels if form == "triton" else kernels.plain


def normal(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def draw_labels(device: str, N: int, V: int, *, ignored: int | None = None, seed: int = 0) -> torch.Tensor:
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    if ignored is not None:
        labels[::3] = ignored
    return labels.to(device)


def product(
    device: str, dtype: torch.dtype, N: int, V: int, E: int, *, ignored: int | None = -100, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w = (normal(device, dtype, n, E, scale=E**-0.25, seed=seed + n) for n in (N, V))
    return x, w, draw_labels(device, N, V, ignored=ignored, seed=seed)


# ---------------------------------------------------------------------------------------------------- of logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_at_the_edges_of_tiles(device: str, dtype: torch.dtype) -> None:
    tile = ce.choose_tile(9999, dtype, TARGETS["sm_90"]).logits
    for V in (tile - 1, tile, tile + 1, 2 * tile + 1):
        edges = [0, 1, 7, 8, tile - 2, tile - 1, tile, V - 2, V - 1]
        labels = torch.tensor([j for j in edges if j < V], device=device)
        logits = normal(device, dtype, len(labels), V, seed=V)
        logits[:, 0] = 9  # a tile that is left out, or a label that stays in the sum, shows in every row
        logits[:, -1] = 10
        logits[torch.arange(len(labels)), labels] = 11
        loss = kernels.cross_entropy(logits, labels, reduction="none")
        assert_meets_contract("cross_entropy", loss, logits, labels, reduction="none", limit=1.6)  # nine rows


def _strange() -> tuple[torch.Tensor, torch.Tensor]:
    """Every way to place infinities and NaN beside a label: rows of 40 logits."""
    inf, nan = float("inf"), float("nan")
    rows, labels = [], []
    for rest in (0.5, -inf, inf, nan):
        for at_label in (0.25, -inf, inf, nan):
            for one_other in (0.75, -inf, inf, nan):
                row = torch.full((40,), rest)
                row[39], row[3] = one_other, at_label
                rows.append(row)
                labels.append(3)
    return torch.stack(rows), torch.tensor(labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_as_in_the_definition(device: str, dtype: torch.dtype, form: str) -> None:
    logits, labels = _strange()
    logits, labels = logits.to(device, dtype), labels.to(device)
    loss = form_of(form).cross_entropy(logits, labels, reduction="none")
    assert_meets_contract("cross_entropy", loss, logits, labels, reduction="none", limit=2.0)  # few different rows
    for alone in (0.5, float("inf"), -float("inf"), float("nan")):
        one = torch.full((1, 1), alone, device=device, dtype=dtype)
        loss = form_of(form).cross_entropy(one, labels[:1] * 0)
        assert (loss == 0) if alone == 0.5 else loss.isnan()


@pytest.mark.parametrize("shift", [1e5, -1e5])
def test_huge_logits(device: str, shift: float) -> None:
    logits = normal(device, torch.float32, 60, 300, scale=3) + shift
    labels = draw_labels(device, 60, 300)
    loss = kernels.cross_entropy(logits, labels, reduction="none")
    assert_meets_contract("cross_entropy", loss, logits, labels, reduction="none")
    logits[:, 1::2] = -shift  # 2e5 apart
    loss = kernels.cross_entropy(logits, labels, reduction="none")
    assert_meets_contract("cross_entropy", loss, logits, labels, reduction="none")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_that_are_all_huge(device: str, sign: float) -> None:
    """Where every logit of a row is below -100, an exponential that is not relative to the largest is 0."""
    x = normal(device, torch.float32, 5, 16).abs() + 40
    weight = sign * (normal(device, torch.float32, 70, 16, seed=1).abs() + 1)
    labels = draw_labels(device, 5, 70)
    loss = kernels.linear_cross_entropy(x, weight, labels, reduction="none")
    assert_meets_contract("linear_cross_entropy", loss, x, weight, labels, reduction="none")


def test_a_confident_row_keeps_its_digits(device: str) -> None:
    """1 + 1e-9 is 1 in float32: the definition itself, in float32, loses such a loss altogether."""
    logits = normal(device, torch.float32, 60, 300)
    labels = draw_labels(device, 60, 300)
    logits[torch.arange(60), labels] = torch.linspace(5, 40, 60, device=device)
    loss = kernels.cross_entropy(logits, labels, reduction="none").double().cpu().numpy()
    exact = _exact_small_loss(logits, labels)
    assert exact.min() < 1e-14
    assert np.abs(loss / exact - 1).max() < 5e-6  # e^-d for d up to 40: 40 times the rounding of d


def _exact_small_loss(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    z = logits.double().cpu().numpy()
    own = z[np.arange(len(z)), labels.cpu().numpy()]
    z[np.arange(len(z)), labels.cpu().numpy()] = -np.inf
    return np.log1p(np.exp(z - own[:, None]).sum(1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_reductions(device: str, operator: str, form: str) -> None:
    x, w, labels = product(device, torch.float32, 50, 70, 24)
    arrays = (x @ w.T,) if operator == "cross_entropy" else (x, w)
    call = getattr(form_of(form), operator)
    rows = call(*arrays, labels, reduction="none")
    counted = int((labels != -100).sum())
    assert rows.shape == (50,)
    total = float(rows.double().sum())
    for reduction, expected in (("sum", total), ("mean", total / counted)):
        loss = call(*arrays, labels, reduction=reduction)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert abs(float(loss) / expected - 1) < 2e-7
    assert torch.equal(call(*arrays, labels), call(*arrays, labels, reduction="mean"))
    nothing = torch.full_like(labels, -100)
    assert call(*arrays, nothing).isnan()
    assert call(*arrays, nothing, reduction="sum") == 0
    assert (call(*arrays, nothing, reduction="none") == 0).all()
    empty = [arrays[0][:0], *arrays[1:], labels[:0]]
    assert call(*empty).isnan()
    assert call(*empty, reduction="sum") == 0
    assert call(*empty, reduction="none").shape == (0,)


def test_the_sum_of_many_rows(device: str) -> None:
    N = 2 * ce.SUM_TILE + 3
    losses = normal(device, torch.float32, N).abs()
    labels = torch.arange(N, device=device) - 5
    losses[labels == 7] = 0
    steps, mean = ce.plan_reduction(losses, labels, 7, "mean")
    steps[0].run()
    assert abs(float(mean) / (float(losses.double().sum()) / (N - 1)) - 1) < 2e-7


def _run(launch: Launch, programs: int, **arguments: Any) -> None:
    replace(launch, grid=(programs,), arguments={**launch.arguments, **arguments}).run()


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_an_ignored_row_is_not_read(device: str, operator: str) -> None:
    """Rows 1 and 2 lie outside of all memory."""
    x, w, labels = product(device, torch.float32, 1, 40, 24, ignored=None)
    arrays = (x @ w.T,) if operator == "cross_entropy" else (x, w)
    steps, _ = _plan_of(operator, arrays, labels)
    loss, far = torch.empty(3, device=device), {"logits_stride": 2**30, "x_stride": 2**30, "N": 3}
    given = {"labels_ptr": torch.cat([labels, labels.new_full((2,), -100)]), "loss_ptr": loss} | far
    for step in steps:
        programs = 1 if "x_ptr" in step.arguments else 3
        _run(step, programs, **{name: x for name, x in given.items() if name in step.arguments})
    assert torch.equal(loss, torch.cat([getattr(kernels, operator)(*arrays, labels, reduction="none"), loss[1:] * 0]))


def _plan_of(operator: str, arrays: tuple[torch.Tensor, ...], labels: torch.Tensor) -> Any:
    module = ce if operator == "cross_entropy" else linear_ce
    return module.plan(*arrays, labels, -100, "none")


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_a_label_outside_the_vocabulary_is_nan_where_it_cannot_be_refused(device: str, operator: str) -> None:
    """As on a GPU, where labels cannot be looked at: straight to the launches."""
    x, w, labels = product(device, torch.float32, 8, 70, 24, ignored=None)
    arrays = (x @ w.T,) if operator == "cross_entropy" else (x, w)
    expected = getattr(kernels, operator)(*arrays, labels, reduction="none")
    labels[1], labels[3], labels[4], labels[6] = -1, 70, 2**40, -(2**40)
    steps, loss = _plan_of(operator, arrays, labels)
    for step in steps:
        step.run()
    bad = torch.tensor([False, True, False, True, True, False, True, False], device=device)
    assert loss[bad].isnan().all()
    assert torch.equal(loss[~bad], expected[~bad])


# --------------------------------------------------------------------------------------------------- of a product


@pytest.mark.parametrize("V", [1000, 1030, 3000])
def test_the_chunks_of_a_row_meet(device: str, V: int) -> None:
    """Every chunk holds the maximum of some row and the label of some row, in all pairs."""
    at = sorted({0, V // 2, V - 1, min(linear_ce.CHUNK - 1, V - 1), min(linear_ce.CHUNK, V - 1)})
    x = torch.zeros(len(at) ** 2, len(at), device=device)
    w = torch.zeros(V, len(at), device=device)
    labels = torch.empty(len(x), dtype=torch.int64, device=device)
    for i, largest in enumerate(at):
        w[largest, i] = 1
        for j, label in enumerate(at):
            x[i * len(at) + j, i], labels[i * len(at) + j] = 12, label
    loss = kernels.linear_cross_entropy(x, w, labels, reduction="none")
    exact = ops.linear_cross_entropy(*(t.cpu().numpy() for t in (x, w, labels)), reduction="none")
    np.testing.assert_allclose(loss.cpu().numpy(), exact, rtol=1e-6)  # 12 log2 e in float32 is off by up to 7e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_may_hold_anything(device: str, dtype: torch.dtype, form: str) -> None:
    call = form_of(form).linear_cross_entropy
    x, w, labels = product(device, dtype, 140, 70, 24)
    labels[:130] = -100  # a whole tile
    expected = call(x, w, labels, reduction="none")
    x[labels == -100] = float("nan")
    assert torch.equal(call(x, w, labels, reduction="none"), expected)
    assert (expected[labels == -100] == 0).all()
    assert call(x, w, labels).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_in_a_product(device: str, dtype: torch.dtype) -> None:
    x, w, labels = product(device, dtype, 60, 70, 24)
    x[1, 3], x[2, 4], w[9, 5] = float("nan"), float("inf"), -float("inf")
    loss = kernels.linear_cross_entropy(x, w, labels, reduction="none")
    assert_meets_contract("linear_cross_entropy", loss, x, w, labels, reduction="none")


def test_logits_are_never_stored() -> None:
    x, w = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (4096, 128_256))
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    steps, _ = _plan_of("linear_cross_entropy", (x, w), labels)
    tensors = {id(t): t for step in steps for t in step.arguments.values() if isinstance(t, torch.Tensor)}
    others = sum(t.numel() for t in tensors.values() if t is not x and t is not w)
    assert others < 4096 * 128_256 / 400
