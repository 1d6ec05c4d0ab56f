"""Cross-entropy, of logits and of a product that is never stored: both forms against the definition."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from where_kernels_run import DEVICE, running

from refllm import kernels, ops
from refllm.errors import InputError
from refllm.kernels import arguments, interpreted
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


@settings(max_examples=10)
@given(data=st.data())
def test_cross_entropy_meets_contract(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    V = data.draw(st.sampled_from([2, 3, 31, 33, 127, 255, 257, 1000, 2049, 8191, 8193]), "V")
    scale = data.draw(st.sampled_from([1.0, 5.0, 30.0]), "scale")
    ignore_index = data.draw(st.sampled_from([-100, 1, -1]), "ignore_index")
    seed = data.draw(st.integers(0, 1000), "seed")
    logits = normal(DEVICE, dtype, 60, V, scale=scale, seed=seed)
    labels = draw_labels(DEVICE, 60, V, ignored=ignore_index, seed=seed)
    labels = labels.to(data.draw(st.sampled_from([torch.int32, torch.int64]), "labels"))
    keywords = {"ignore_index": ignore_index, "reduction": "none"}
    with running():
        loss = kernels.cross_entropy(logits, labels, **keywords)
    assert loss.dtype == torch.float32
    assert (loss[labels == ignore_index] == 0).all()
    assert_meets_contract("cross_entropy", loss, logits, labels, **keywords)


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


def test_offsets_past_2_to_the_31(device: str) -> None:
    """The interpreter raises where int32 overflows; rows of no logits need no memory."""
    labels, loss = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(3, device=device)
    launch = ce.plan(normal(device, torch.float32, 3, 40), labels, -100, "none")[0][0]
    _run(launch, 3, logits_stride=2**30, V=0, loss_ptr=loss)
    assert loss.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device: str, dtype: torch.dtype, form: str) -> None:
    operators = form_of(form)
    logits, labels = normal(device, dtype, 6, 100, scale=3), draw_labels(device, 6, 100, ignored=-100)
    expected = operators.cross_entropy(logits, labels, reduction="none")
    spread = torch.stack([labels, labels * 0], 1)[:, 0]
    sliced = torch.cat([logits + 1, logits, logits - 1], 1)[:, 100:200]
    assert torch.equal(operators.cross_entropy(sliced, spread, reduction="none"), expected)
    transposed = logits.T.contiguous().T
    torch.testing.assert_close(operators.cross_entropy(transposed, labels, reduction="none"), expected)
    same = operators.cross_entropy(logits[1:2].expand(5, 100), labels[1:2].expand(5), reduction="none")
    assert torch.equal(same, expected[1:2].expand(5))


def _plan_of(operator: str, arrays: tuple[torch.Tensor, ...], labels: torch.Tensor, target: Any = None) -> Any:
    module = ce if operator == "cross_entropy" else linear_ce
    return module.plan(*arrays, labels, -100, "none", *([] if target is None else [target]))


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


@settings(max_examples=10)
@given(data=st.data())
def test_linear_cross_entropy_meets_contract(data: st.DataObject) -> None:
    x, w, labels = product(
        DEVICE,
        data.draw(st.sampled_from(DTYPES), "dtype"),
        data.draw(st.sampled_from([60, 129]), "N"),
        data.draw(st.sampled_from([1, 2, 127, 129, 255, 257, 1023, 1025]), "V"),
        data.draw(st.sampled_from([1, 16, 40, 65, 144]), "E"),
        ignored=data.draw(st.sampled_from([-100, 0, -1]), "ignore_index"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    ignore_index = int(labels[0])
    labels = labels.to(data.draw(st.sampled_from([torch.int32, torch.int64]), "labels"))
    keywords = {"ignore_index": ignore_index, "reduction": "none"}
    with running():
        loss = kernels.linear_cross_entropy(x, w, labels, **keywords)
    assert loss.dtype == torch.float32
    assert_meets_contract("linear_cross_entropy", loss, x, w, labels, **keywords)


@pytest.mark.parametrize("E", [16, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_every_target(device: str, dtype: torch.dtype, E: int) -> None:
    x, w, labels = product(device, dtype, 70, 1100, E)
    labels[1:6] = torch.tensor([0, 1023, 1024, 1099, 128], device=device)
    seen = []
    for target in TARGETS.values():
        steps, loss = _plan_of("linear_cross_entropy", (x, w), labels, target)
        if steps[0].constants not in seen:
            seen.append(steps[0].constants)
            for step in steps:
                step.run()
            assert_meets_contract("linear_cross_entropy", loss, x, w, labels, reduction="none")
    assert seen


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_a_product(device: str, dtype: torch.dtype) -> None:
    x, w, labels = product(device, dtype, 6, 70, 24)
    expected = kernels.linear_cross_entropy(x, w, labels, reduction="none")
    wide = [torch.cat([t + 1, t, t - 1], 1)[:, 24:48] for t in (x, w)]
    turned = [t.T.contiguous().T for t in (x, w)]
    for pair in (wide, turned):
        assert torch.equal(kernels.linear_cross_entropy(*pair, labels, reduction="none"), expected)
    same = kernels.linear_cross_entropy(x[1:2].expand(5, 24), w, labels[1:2].expand(5), reduction="none")
    assert torch.equal(same, expected[1:2].expand(5))


def test_offsets_of_a_product_past_2_to_the_31(device: str) -> None:
    """One row and one word need no memory for the strides to the others; the interpreter raises on overflow."""
    x, w, labels = product(device, torch.float32, 1, 1, 24, ignored=None)
    far = [t.as_strided((1, 24), (2**30, 1)) for t in (x, w)]
    assert kernels.linear_cross_entropy(*far, labels) == 0


def test_logits_are_never_stored() -> None:
    x, w = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (4096, 128_256))
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    steps, _ = _plan_of("linear_cross_entropy", (x, w), labels)
    tensors = {id(t): t for step in steps for t in step.arguments.values() if isinstance(t, torch.Tensor)}
    others = sum(t.numel() for t in tensors.values() if t is not x and t is not w)
    assert others < 4096 * 128_256 / 400


# ----------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_feel_its_batch(device: str, dtype: torch.dtype, operator: str) -> None:
    x, w, labels = product(device, dtype, 130, 300, 24, ignored=None)
    arrays = (normal(device, dtype, 130, 1030, scale=4),) if operator == "cross_entropy" else (x, w)
    call = getattr(kernels, operator)
    together = call(*arrays, labels, reduction="none")
    assert torch.equal(call(*arrays, labels, reduction="none"), together)
    for n in (0, 77, 129):
        alone = call(arrays[0][n : n + 1].clone(), *arrays[1:], labels[n : n + 1], reduction="none")
        assert torch.equal(alone, together[n : n + 1])


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_the_configuration_does_not_depend_on_the_batch(operator: str) -> None:
    for target in TARGETS.values():
        seen = []
        for N in (1, 3, 7000):
            x, w = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (N, 128_256))
            labels = torch.empty(N, dtype=torch.int64, device="meta")
            steps, _ = _plan_of(operator, (x, w)[: 2 if operator == "linear_cross_entropy" else 1], labels, target)
            seen.append([(step.constants, step.num_warps, step.num_stages) for step in steps])
        assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_inputs_unchanged(device: str, operator: str) -> None:
    x, w, labels = product(device, torch.bfloat16, 20, 70, 24)
    arrays = [x @ w.T, labels] if operator == "cross_entropy" else [x, w, labels]
    before = [t.clone() for t in arrays]
    getattr(kernels, operator)(*arrays)
    assert all(torch.equal(t, old) for t, old in zip(arrays, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_mistake_is_an_input_error(form: str) -> None:
    x, w, labels = torch.zeros(4, 8), torch.zeros(6, 8), torch.tensor([0, 1, -100, 5])
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("cross_entropy", (x[0], labels), {}, "logits is [8] torch.float32 on cpu; expected 2 axes"),
        ("cross_entropy", (x.double(), labels), {}, "expected a float32, float16 or bfloat16 tensor"),
        ("cross_entropy", (x, labels[:3]), {}, "labels is [3] torch.int64"),
        ("cross_entropy", (x, labels.float()), {}, "expected [4] torch.int32 or torch.int64"),
        ("cross_entropy", (x, labels), {"reduction": "average"}, 'use "mean", "sum" or "none"'),
        ("cross_entropy", (x, labels + 3), {}, "labels holds -97, outside 0..7"),
        ("cross_entropy", (x, labels), {"ignore_index": -1}, "use -1 for a position that does not count"),
        ("linear_cross_entropy", (x, w[:, :7], labels), {}, "weight is [6, 7] torch.float32 on cpu; expected [6, 8]"),
        ("linear_cross_entropy", (x, w.half(), labels), {}, "weight is [6, 8] torch.float16"),
        ("linear_cross_entropy", (x, w, torch.tensor([0, 6, 0, 0])), {}, "labels holds 6, outside 0..5"),
    ]
    for operator, arrays, keywords, words in cases:
        with interpreted(), pytest.raises(InputError, match=f"^{operator}: ") as error:
            getattr(form_of(form), operator)(*arrays, **keywords)
        assert words in str(error.value)


def test_opcheck(device: str) -> None:
    x, w, labels = product(device, torch.float32, 5, 70, 24)
    for reduction in ("mean", "none"):
        torch.library.opcheck(torch.ops.refllm.cross_entropy.default, (x @ w.T, labels, -100, reduction))
        torch.library.opcheck(torch.ops.refllm.linear_cross_entropy.default, (x, w, labels, -100, reduction))


def test_torch_compile(device: str) -> None:
    x, w, labels = product(device, torch.float32, 5, 70, 24)

    def both(x: torch.Tensor) -> torch.Tensor:
        return kernels.linear_cross_entropy(x * 2, w, labels) + kernels.cross_entropy(x @ w.T, labels)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    torch.testing.assert_close(compiled(x), both(x))
