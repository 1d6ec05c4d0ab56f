"""What every backward kernel keeps, and how autograd finds it: a new one is asked all of it when it has a record."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import how_many
from torch.utils._python_dispatch import TorchDispatchMode
from where_kernels_run import DEVICE, running

from refllm import kernels, ops
from refllm.accuracy.limits import chance, rms_limit
from refllm.errors import InputError
from refllm.kernels import plain
from refllm.kernels.calls import Source
from refllm.kernels.calls import call as call_of_sizes
from refllm.kernels.targets import TARGETS
from refllm.kernels.triton import BACKWARD_FILES, plan
from refllm.kernels.tuning.tunables import tunables
from refllm.opcheck.api import assert_operator
from refllm.opcheck.inputs import row_alone
from refllm.ops.contracts import contract_of, is_batched
from refllm.precision import FUSED, Arithmetic
from refllm.strategies import Call, corners

DTYPES = ("bfloat16", "float16", "float32")
SIZES = {"B": 2, "S": 9, "T": 9, "N": 9, "H": 4, "K": 2, "D": 24, "R": 10, "E": 40, "F": 72, "V": 70}
WITH_ROWS = {"S": 60, "E": 96, "V": 150}
"""Sizes of which a root mean square says something."""
LOSSES = ("cross_entropy_backward", "linear_cross_entropy_backward")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "norm_rope_backward": [{"norm": "rms"}, {"norm": "layer", "interleaved": True}],
    **{name: [{"reduction": reduction} for reduction in ("mean", "sum", "none")] for name in LOSSES},
}

OF_THEIR_OWN = ("attention_backward", "decode_attention_backward", "rms_norm_qkv_rope_backward")
"""Their arguments hang together (o and lse are those of q, k and v), or they are made of the others: values, bits and
what is not asked for are tested in test_attention_backward.py and test_kernel_rms_norm_qkv_rope.py."""
every_operator = pytest.mark.parametrize("operator", BACKWARD_FILES)
operators = pytest.mark.parametrize("operator", [name for name in BACKWARD_FILES if name not in OF_THEIR_OWN])
losses = pytest.mark.parametrize("operator", LOSSES)

Arguments = tuple[list[Any], dict[str, Any]]


def call_of(operator: str, dtype: str = "float32", sizes: dict[str, int] | None = None, **options: Any) -> Arguments:
    """A call with a value for every array; of labels a third is ignored. Losses are those of each row."""
    n = SIZES | ({"S": 5} if operator == "decode_attention_backward" else {}) | (sizes or {})
    if operator in LOSSES:
        labels = torch.arange(n["B"] * n["S"], device=DEVICE) * 7 % n["V"]
        labels[::3] = -100
        options = {"labels": labels, "reduction": "none"} | options
    return call_of_sizes(operator, n, Source(dtype, DEVICE, seed=1), **options)


def run(operator: str, arguments: Any, keywords: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    found = getattr(kernels, operator)(*arguments, **keywords)
    return found if isinstance(found, tuple) else (found,)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN equals NaN."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(some: Any, others: Any) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))


# -- values ------------------------------------------------------------------------------------------------------------


def judge(operator: str, dtype: str, arguments: Any, keywords: Any, found: Any, limit: float | None = None) -> None:
    """Each gradient has an RMS error of at most `rms_limit` times the definition's in the same precision; in float32,
    where the order of additions counts, chance allows more for few rows. Those of the latter that are 0 are exact."""
    values = [x.cpu().double().numpy() if is_real(x) else x.cpu().numpy() if is_tensor(x) else x for x in arguments]
    named = {name: x.cpu().numpy() if is_tensor(x) else x for name, x in keywords.items()}
    definition = getattr(ops, operator)
    exact, same_precision = (each if isinstance(each, tuple) else (each,) for each in (
        definition(*values, **named), definition(*values, **named, ar=Arithmetic(dtype, FUSED))))  # fmt: skip
    for i, (got, right, close) in enumerate(zip(found, exact, same_precision, strict=True)):
        if right is None:  # a plan has an empty tensor there
            assert got is None or not got.numel()
            continue
        assert got.shape == right.shape
        error, unit = (np.sqrt(np.mean((np.float64(x) - right) ** 2)) if right.size else 0.0 for x in (
            got.cpu().double().numpy(), close))  # fmt: skip
        rows = right.size // right.shape[-1] if dtype == "float32" and right.size else 10**9
        most = limit or rms_limit(operator) * (1 + chance(rows, measured=2))
        assert error <= most * unit, f"{operator}, output {i}: {error / unit:.3g} times, at most {most:.3g}"


def is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def is_real(x: Any) -> bool:
    return is_tensor(x) and x.is_floating_point()


@operators
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_as_large_as_those_of_the_definition_in_the_same_precision(
    operator: str, dtype: str, device: str
) -> None:
    """At most 1.1 times, 1.25 times where there is a product; a gradient has the dtype of what it belongs to."""
    variants = VARIANTS.get(operator, [{}])
    assert variants
    for options in variants:
        arguments, keywords = call_of(operator, dtype, WITH_ROWS, **options)
        found = run(operator, arguments, keywords)
        judge(operator, dtype, arguments, keywords, found)
        given = dict(zip(contract_of(operator).parameters, arguments, strict=False)) | keywords
        like: Any = contract_of(operator)
        assert [x.dtype for x in found] == [given[like.like(name)].dtype for name in like.outputs]


@operators
def test_what_users_check_with_finds_nothing(operator: str) -> None:
    """Some of the fixed calls of `refllm check-op`: layouts, NaN, offsets past 2^31, nothing unwritten, the same
    bits."""
    some = corners(operator, "bfloat16")[1::6]
    with running():
        assert_operator(
            operator, getattr(kernels, operator), dtype="bfloat16", calls=some, device=DEVICE, bitwise=True,
            policy="fused", level="hostile", shrink=False, isolate=False, seconds=300.0,
        )  # fmt: skip


@operators
@pytest.mark.hypothesis
def test_any_call_keeps_the_contract(operator: str) -> None:
    """Other sizes, one token and none, strides with NaN between the numbers."""
    words = {name: st.sampled_from(choices) for name, choices in contract_of(operator).choices.items()}
    sizes = st.fixed_dictionaries({
        "B": st.integers(1, 3), "S": st.integers(0, 7), "K": st.integers(1, 2),
        "D": st.integers(5, 20).map(lambda d: 2 * d), "R": st.integers(1, 5).map(lambda r: 2 * r),
        "E": st.integers(16, 300), "F": st.integers(1, 50), "V": st.integers(2, 90),
    })  # fmt: skip

    @how_many(2)
    @given(sizes, st.fixed_dictionaries(words), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
    def holds(sizes: dict[str, int], words: dict[str, str], dtype: str, layout: str) -> None:
        with running():
            sizes |= {"H": 2 * sizes["K"], "T": sizes["S"], "N": max(1, sizes["S"])}
            arguments, keywords = call_of(operator, dtype, sizes, **words)
            arguments = [laid(x, layout) for x in arguments]
            judge(operator, dtype, arguments, keywords, run(operator, arguments, keywords), limit=4.0)

    holds()


LAYOUTS = ("dense", "gaps", "transposed")


def laid(x: Any, layout: str) -> Any:
    """The same values elsewhere in memory, with NaN beside them."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.ndim or layout == "dense":
        return x
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[:, 0]
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


@operators
def test_strides_do_not_matter_and_nothing_is_modified(operator: str, device: str) -> None:
    """Nor what lies between rows. `y.sum().backward()` hands in a gradient of strides 0."""
    arguments, keywords = call_of(operator, "bfloat16")
    wanted = run(operator, arguments, keywords)
    for layout in LAYOUTS[1:]:
        others = [laid(x, layout) for x in arguments]
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in others]
        assert same(run(operator, others, keywords), wanted), layout
        assert all(torch.equal(x, y) for x, y in zip(before, others, strict=True) if isinstance(x, torch.Tensor))
    known: Any = contract_of(operator)
    ones = [torch.ones_like(x) if i < len(known.incoming) else x for i, x in enumerate(arguments)]
    expanded = [
        torch.ones((), dtype=x.dtype, device=device).expand(x.shape) if i < len(known.incoming) else x
        for i, x in enumerate(arguments)
    ]
    assert same(run(operator, expanded, keywords), run(operator, ones, keywords))


@operators
def test_a_row_has_the_same_bits_alone_and_all_have_them_again(operator: str, device: str) -> None:
    """Of what is one row's own. A sum over rows has them in every run."""
    arguments, keywords = call_of(operator, sizes={"S": 17})
    together = run(operator, arguments, keywords)
    assert same(together, run(operator, arguments, keywords))
    axes = list(contract_of(operator).outputs.values())
    own = [i for i, y in enumerate(together) if is_batched(axes[i], y.ndim)]
    call = Call(operator, "float32", tuple(arguments))
    for row in (0, len(together[0]) - 1):
        alone, options = row_alone(call, arguments, keywords, row)
        found = run(operator, alone, options)
        assert same([found[i] for i in own], [together[i][row : row + 1] for i in own])


@operators
def test_a_configuration_and_the_order_of_its_sums_do_not_depend_on_the_batch(operator: str) -> None:
    """Nor on the GPU, of which a plan knows the target alone."""
    for target in TARGETS.values():
        seen = []
        for B in (1, 3, 700):
            sizes = SIZES | {"B": B, "S": 16, "E": 2560, "F": 7040, "V": 128_256, "D": 128, "N": 256 * B}
            options = {"reduction": "none"} if operator in LOSSES else {}
            call = call_of_sizes(operator, sizes, Source("bfloat16", "meta", seed=0), **options)
            planned = plan(operator, *call, target=target)[0]
            steps = planned if isinstance(planned, list) else [planned]
            seen.append([(x.kernel, x.constants, x.num_warps, x.num_stages) for x in steps])
        assert seen[0] == seen[1] == seen[2]


FEW = {"S": 40, "E": 300, "F": 700, "V": 600, "H": 4, "K": 2, "row": 300}
"""Sizes over one tile by a few. A remainder by 16 is added to them, so that the class of shapes stays."""


@pytest.mark.parametrize("kernel", [name for name in tunables() if name.endswith("_backward")])
def test_every_tile_that_ships_writes_every_element(kernel: str, device: str) -> None:
    """Over results and workspaces that hold NaN."""
    if device != "cpu":
        pytest.skip("a GPU runs the tiles of its own target")
    each, seen = tunables()[kernel], list[Any]()
    for shape, sizes in each.shapes.items():
        few = FEW | ({"row": 8200} if shape == "longer" else {})
        n = {axis: size if size <= few.get(axis, size) else few[axis] + size % 16 for axis, size in sizes.items()}
        n |= {axis: few[axis] for axis in "HK" if axis in n}  # whole groups of heads
        call = replace(each, shapes={shape: n}).make(shape, Source(each.dtype(shape), device, seed=0))
        if kernel == "attention_backward":  # what the forward pass would have kept is made again
            call = replace(call, arguments=[*call.arguments[:4], None, None])
        given = {x.untyped_storage().data_ptr() for x in call.arguments if isinstance(x, torch.Tensor)}
        for target in TARGETS.values():
            steps, *results = plan(call.operator, call.arguments, call.keywords, target=target)
            steps = steps if isinstance(steps, list) else [steps]
            if (found := (shape, [step.constants for step in steps])) in seen:
                continue
            seen.append(found)
            for step in steps:
                for x in step.arguments.values():
                    if is_real(x) and x.untyped_storage().data_ptr() not in given:
                        x.fill_(torch.nan)
            for step in steps:
                step.run()
            dtype = str(each.dtype(shape)).removeprefix("torch.")
            judge(call.operator, dtype, call.arguments, call.keywords, results, limit=1.5)
    assert len(seen) >= len(each.shapes)


@pytest.mark.parametrize("operator", ["rms_norm_backward", "add_layer_norm_backward"])
@pytest.mark.parametrize("E", [8192, 8193, 20_480])
def test_long_rows(operator: str, E: int, device: str) -> None:
    """More than one tile, the last one ragged; what the first tile holds is nothing like the rest."""
    arguments, keywords = call_of(operator, "bfloat16", {"B": 1, "S": 18, "E": E})
    arguments[-3 if "layer" not in operator else 2][..., :3000] += 100
    judge(operator, "bfloat16", arguments, keywords, run(operator, arguments, keywords))


def test_a_vocabulary_of_several_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx is added up in float32 from chunk to chunk, dW over all rows at once: in bfloat16 both would be rounded often,
    and stop growing."""
    monkeypatch.setattr(importlib.import_module(BACKWARD_FILES[LOSSES[1]].__name__), "WORDS", 256)
    arguments, keywords = call_of(LOSSES[1], "bfloat16", {"B": 4, "S": 150, "V": 700, "E": 16})
    arguments[0].fill_(1.0)
    judge(LOSSES[1], "bfloat16", arguments, keywords, run(LOSSES[1], arguments, keywords))


@losses
@pytest.mark.parametrize("ignored", [-100, 5])
def test_ignored_rows_are_0_whatever_they_hold(operator: str, ignored: int, device: str) -> None:
    """Exactly, also where the weights are infinite; the number of the others is what a mean is taken over."""
    arguments, keywords = call_of(operator, reduction="mean")
    labels = torch.where(arguments[-1] == -100, ignored, torch.where(arguments[-1] == ignored, 6, arguments[-1]))
    arguments[-1], keywords["ignore_index"] = labels, ignored
    wanted = run(operator, arguments, keywords)
    arguments[1] = arguments[1].masked_fill((labels == ignored)[:, None], torch.nan)
    found = run(operator, arguments, keywords)
    assert same(found, wanted)
    assert not found[0][labels == ignored].any()
    assert found[0][labels != ignored].abs().sum(-1).all()
    nothing = run(operator, [*arguments[:-1], torch.full_like(labels, ignored)], keywords)
    assert not any(x.any() for x in nothing)
    if operator == LOSSES[1]:
        arguments[2][0] = torch.inf
        assert not run(operator, arguments, keywords)[0][labels == ignored].any()


@losses
def test_a_confident_row_keeps_the_digits_of_its_gradient(operator: str, device: str) -> None:
    """Of p - 1 nothing is left in float32 where p is 1 - 1e-9."""
    labels = torch.arange(20, device=device)
    x = torch.linspace(5, 30, 20, device=device)[:, None] * torch.eye(20, 40, device=device)
    weight = torch.eye(40, device=device)
    given = (x,) if operator == LOSSES[0] else (x, weight)
    found = getattr(kernels, operator)(torch.tensor(1.0, device=device), *given, labels, reduction="sum")
    dlogits = (found if operator == LOSSES[0] else found[0])[labels, labels].double().cpu().numpy()
    top = np.linspace(5, 30, 20)
    exact = -39 / (np.exp(np.float32(top).astype(float)) + 39)
    assert np.abs(dlogits / exact - 1).max() < 1e-5


def test_a_loss_per_row_may_be_of_any_size(device: str) -> None:
    """What one row's gradient is does not reach the bits of another's; 0 everywhere gives 0."""
    arguments, keywords = call_of(LOSSES[1], "float16")
    wanted = run(LOSSES[1], arguments, keywords)[0]
    arguments[0] = arguments[0].clone()
    arguments[0][1], arguments[0][2] = 3e4, torch.inf
    found = run(LOSSES[1], arguments, keywords)[0]
    assert same([found[4:]], [wanted[4:]])
    assert found[1].isfinite().all()
    assert not any(x.any() for x in run(LOSSES[1], [torch.zeros_like(arguments[0]), *arguments[1:]], keywords))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_far_from_0(dtype: str, device: str) -> None:
    """Every element to a few units, also where 1 - sigmoid, taken as a difference, has no digit left."""
    gate = torch.cat([torch.linspace(2, 100, 900), torch.linspace(-2, -80, 900)]).to(device, getattr(torch, dtype))
    given = [torch.ones_like(gate), gate, torch.full_like(gate, 0.75)]
    exact = ops.swiglu_backward(*(x.cpu().double().numpy() for x in given))
    smallest = 6e-8 if dtype == "float16" else 1e-37
    found = kernels.swiglu_backward(*given)
    close = torch.finfo(gate.dtype).eps * (6 if dtype == "float32" else 1)
    for i in (0, 1):
        np.testing.assert_allclose(found[i].cpu().double().numpy(), exact[i], atol=smallest, rtol=close)


@pytest.mark.parametrize("operator", ["swiglu_backward", "relu2_backward"])
def test_nan_and_infinity_are_those_of_the_definition(operator: str, device: str) -> None:
    values = [torch.nan, torch.inf, -torch.inf, 0.0, 1.0, -1.0, 1e30, -1e30, -88.5, -104.0]
    x = torch.tensor(values, device=device)
    given = [torch.full_like(x, 0.5), x, *([torch.full_like(x, 2.0)] if operator == "swiglu_backward" else [])]
    wanted = getattr(ops, operator)(*(y.cpu().double().numpy() for y in given))
    for a, b in zip(run(operator, given, {}), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        np.testing.assert_allclose(a.cpu().numpy(), b, rtol=1e-5, atol=1e-36)


# -- autograd ----------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """What is called of the operators that are registered with Torch, with what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.namespace == "refllm":
            self.calls.append((function, args, found))
        return found


def forward_call(operator: str) -> tuple[list[torch.Tensor], Any, dict[str, Any], list[int]]:
    """Incoming gradients; the forward operator's arguments, keywords, and the places of those that have a gradient."""
    known: Any = contract_of(operator)
    arguments, keywords = call_of(operator)
    named = dict(zip(known.parameters, arguments, strict=False)) | keywords
    if operator == "rope_backward":
        named |= {name: named[f"d{name}"].flip(-1) for name in ("q", "k")}
    names = [name for name, p in known.forward.parameters.items() if p.kind is not p.KEYWORD_ONLY]
    smooth = [i for i, name in enumerate(names) if f"d{name}" in known.outputs]
    incoming = [named[name] for name in known.incoming if named.get(name) is not None]
    return incoming, [named[name] for name in names], {k: v for k, v in keywords.items() if k != "dlse"}, smooth


def leaves(arguments: list[Any], places: list[int]) -> list[Any]:
    return [x.detach().clone().requires_grad_() if i in places else x for i, x in enumerate(arguments)]


@operators
def test_autograd_finds_the_backward_kernel(operator: str, device: str) -> None:
    """Its gradients to the bit; and a second time. What it tells Torch of itself is true."""
    incoming, arguments, keywords, places = forward_call(operator)
    given, wanted = leaves(arguments, places), run(operator, *call_of(operator))
    results = getattr(kernels, operator.removesuffix("_backward"))(*given, **keywords)
    results = results if isinstance(results, tuple) else (results,)
    for retain in (True, False):
        found = torch.autograd.grad(results, [given[i] for i in places], incoming, retain_graph=retain)
        assert same(found, wanted)
    with Recorded() as recorded:
        run(operator, *call_of(operator))
    for registered, values, _ in recorded.calls:
        torch.library.opcheck(registered, values, test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_makes_one_graph_of_both_passes(device: str) -> None:
    """Of a model that has every kind of them: the gradients are those without it, and those of plain Torch."""
    calls = {name.removesuffix("_backward"): forward_call(name) for name in BACKWARD_FILES}
    given = {name: leaves(arguments, places) for name, (_, arguments, _, places) in calls.items()}

    def loss(form: Any, tensors: dict[str, list[Any]]) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for name, (_, _, keywords, _) in calls.items():
            results = getattr(form, name)(*tensors[name], **keywords)
            for y in results if isinstance(results, tuple) else (results,):
                total = total + y.float().square().sum()
        return total

    flat = [given[name][i] for name, (*_, places) in calls.items() for i in places]
    backend = "aot_eager" if device == "cpu" else "inductor"
    torch.compiler.reset()
    compiled = torch.compile(lambda tensors: loss(kernels, tensors), fullgraph=True, backend=backend)
    found, without, by_torch = (
        torch.autograd.grad(made, flat) for made in (compiled(given), loss(kernels, given), loss(plain, given))
    )
    assert len(found) == len(flat) > 2 * len(LOSSES)
    for a, b, c in zip(found, without, by_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if device == "cpu" else 1e-5, atol=0 if device == "cpu" else 1e-6)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


@operators
def test_what_is_not_asked_for_costs_nothing(operator: str, device: str) -> None:
    """One leaf at a time: its gradient has the same bits, and no other is made (the two terms of a sum share one)."""
    incoming, arguments, keywords, places = forward_call(operator)
    function = getattr(kernels, operator.removesuffix("_backward"))
    wanted = run(operator, *call_of(operator))
    for which, place in enumerate(places):
        given = leaves(arguments, [place])
        results = function(*given, **keywords)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(y, d) for y, d in zip(results, incoming, strict=True) if y.requires_grad]
        with Recorded() as recorded:
            torch.autograd.backward([y for y, _ in pairs], [d for _, d in pairs])
        assert same([given[place].grad], [wanted[which]])
        made = [x for _, _, found in recorded.calls for x in (found if isinstance(found, tuple) else (found,))]
        assert sum(x.numel() > 0 for x in made) == 1


@every_operator
def test_a_second_derivative_is_refused_and_so_is_that_of_a_table(operator: str, device: str) -> None:
    incoming, arguments, keywords, places = forward_call(operator)
    function = getattr(kernels, operator.removesuffix("_backward"))
    given = leaves(arguments, places)
    results = function(*given, **keywords)
    results = results if isinstance(results, tuple) else (results,)
    incoming = [d.clone().requires_grad_() for d in incoming]
    (first, *_) = torch.autograd.grad(results, [given[i] for i in places], incoming, create_graph=True)
    with pytest.raises(InputError, match=r"cannot be differentiated again; those of .* refllm\.kernels\.plain can"):
        torch.autograd.grad(first.sum(), incoming[0])
    if "cos" in contract_of(operator).arguments:
        table = next(
            i for i, name in enumerate(contract_of(operator.removesuffix("_backward")).parameters) if name == "cos"
        )
        results = function(*leaves(arguments, [table]), **keywords)
        with pytest.raises(InputError, match="cos has no gradient; detach it"):
            results[0].sum().backward()


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("operator", ["add_rms_norm", "add_layer_norm", "rope", "norm_rope"])
def test_a_result_that_is_not_used_has_no_part_in_the_gradients(operator: str, used: int, device: str) -> None:
    """As in plain Torch, whose gradients of what has no part are None, or 0."""
    _, arguments, keywords, places = forward_call(f"{operator}_backward")
    found = []
    for module in (kernels, plain):
        given = leaves(arguments, places)
        getattr(module, operator)(*given, **keywords)[used].square().sum().backward()
        found.append([torch.zeros_like(given[i]) if given[i].grad is None else given[i].grad for i in places])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_operator
def test_without_gpu_or_interpreter_the_error_says_what_to_do(operator: str) -> None:
    arguments, keywords = call_of(operator)
    with pytest.raises(InputError, match=rf"{operator}: the tensors are on cpu.*refllm\.kernels\.plain\.{operator}"):
        run(operator, arguments, keywords)


@every_operator
def test_an_incoming_gradient_that_does_not_fit_is_one_sentence(operator: str, device: str) -> None:
    arguments, keywords = call_of(operator, reduction="mean") if operator in LOSSES else call_of(operator)
    name, first = next(iter(contract_of(operator).parameters)), arguments[0]
    for wrong in (None, first.double(), first[None]):
        with pytest.raises(InputError, match=rf"^{operator}: {name} is .*; expected "):
            run(operator, [wrong, *arguments[1:]], keywords)
