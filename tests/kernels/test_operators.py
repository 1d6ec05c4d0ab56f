"""What every operator on Torch tensors keeps, plain and Triton: a new one is asked all of it when it has a record.

The contract is asked with the check that users run (`refllm.opcheck`): values within their predicted errors, inputs
left alone, nothing read between, behind or under a mask, nothing unwritten, the same bits again and for a row alone.
That this check finds what it should is shown by planted bugs in tests/opcheck. What only one operator has to keep is in
test_kernel_*.py, and laws about its numbers are in tests/ops/test_properties_operators.py.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from properties import how_many  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from where_kernels_run import DEVICE  # noqa: E402

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import OPERATORS, plain  # noqa: E402
from refllm.kernels.calls import REDUCED, Source  # noqa: E402
from refllm.kernels.calls import Call as CallOfLayer  # noqa: E402
from refllm.kernels.calls import call as call_of_sizes  # noqa: E402
from refllm.kernels.calls import calls as calls_on  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.triton import plan  # noqa: E402
from refllm.kernels.tuning.tunables import tunables  # noqa: E402
from refllm.kernels.verify import Contract, assert_meets_contract  # noqa: E402
from refllm.opcheck.api import assert_operator  # noqa: E402
from refllm.opcheck.inputs import row_alone  # noqa: E402
from refllm.ops.contracts import ROWS, axis_names, contract_of  # noqa: E402
from refllm.strategies import Array, Call, calls, corners  # noqa: E402
from refllm.strategies.arrays import LAYOUTS  # noqa: E402

FORMS = {"plain": plain, "triton": kernels}
DTYPES = ("bfloat16", "float16", "float32")
ROTATIONS = ("rope", "norm_rope")

operators = pytest.mark.parametrize("operator", OPERATORS)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def run(form: str, operator: str, arguments: Any, keywords: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    results = getattr(FORMS[form], operator)(*arguments, **keywords)
    return results if isinstance(results, tuple) else (results,)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN equals NaN and 0 differs from -0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))


# -- the contract ------------------------------------------------------------------------------------------------------


def keeps_its_contract(form: str, operator: str, dtype: str, some: list[Call]) -> None:
    assert_operator(
        operator, getattr(FORMS[form], operator), dtype=dtype, calls=some, device=DEVICE,
        bitwise=form == "triton", policy="fused", level="hostile", shrink=False, isolate=False, seconds=300.0,
    )  # fmt: skip


@operators
@forms
@dtypes
def test_every_fixed_call_keeps_the_contract(operator: str, form: str, dtype: str) -> None:
    """Those that kill most known bugs: ragged sizes, strides, NaN, empty rows, offsets past 2^31, large means.

    On the interpreter, which takes its time, the narrow dtypes take turns.
    """
    some = corners(operator, dtype)
    if form == "triton" and DEVICE == "cpu" and dtype != "float32":
        some = some[DTYPES.index(dtype) :: 2]
    keeps_its_contract(form, operator, dtype, some)


@operators
@forms
@pytest.mark.hypothesis
def test_any_call_keeps_the_contract(operator: str, form: str) -> None:
    drawn = st.sampled_from(DTYPES).flatmap(lambda dtype: calls(operator, dtype=dtype))

    @how_many(6 if form == "plain" or DEVICE != "cpu" else 3)
    @given(call=drawn)
    def holds(call: Call) -> None:
        keeps_its_contract(form, operator, call.dtype, [call])

    holds()


@cache
def calls_of_a_layer(dtype: str, tokens: int) -> tuple[CallOfLayer, ...]:
    """Every operator in every variant, for `tokens` tokens in each of 2 sequences. Each dtype has its own layer."""
    return tuple(calls_on(REDUCED[dtype == "float32"], dtype, DEVICE, tokens=tokens))


@operators
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_errors_are_as_large_as_those_of_the_definition_in_the_same_precision(
    operator: str, dtype: str, device: str
) -> None:
    """An error is judged by its mean square, which takes a few hundred rows. With heads, each token is several."""
    tokens = 150 if "D" not in {axis for axes in contract_of(operator).outputs.values() for axis in axes} else 20
    some = [call for call in calls_of_a_layer(dtype, tokens) if call.operator == operator]
    assert some
    for call in some:
        contract = Contract(operator, call.arguments, call.keywords)
        for form in FORMS:
            for verdict in contract.judge(run(form, operator, call.arguments, call.keywords)):
                assert verdict.holds, f"{form}, {call.name}: {verdict.problem}"


# -- sizes and layouts -------------------------------------------------------------------------------------------------

SIZES = {"B": 2, "S": 3, "T": 9, "N": 9, "H": 4, "K": 2, "D": 16, "R": 8, "E": 24, "F": 40, "V": 70}


def call_of(
    operator: str, dtype: str = "float32", where: str = DEVICE, sizes: dict[str, int] | None = None, **given: Any
) -> tuple[list[Any], dict[str, Any]]:
    """A call with a value for every array, the optional ones included. Of losses one number for each row."""
    n = SIZES | (sizes or {})
    if "key_mask" in contract_of(operator).arguments:
        given |= {"key_mask": torch.arange(n["B"] * n["T"], device=where).view(n["B"], n["T"]) % 4 > 0}
    every = {"reduction": "none", "return_lse": True}
    given |= {name: value for name, value in every.items() if name in contract_of(operator).parameters}
    return call_of_sizes(operator, n, Source(dtype, where, seed=0), **given)


def axes_that_may_be_empty(operator: str) -> list[str]:
    """Of the record, and rows0 and rows1 where there is any number of rows."""
    known = contract_of(operator).arguments
    axes = dict.fromkeys(axis for name in known for axis in axis_names(known[name], 3 if ROWS in known[name] else 9))
    most = {"D", "V", "(H+2K)D"} | (set() if operator in ROTATIONS else {"H", "K"})
    most |= {"E"} if contract_of(operator).product else set()  # a sum of no products
    return [axis for axis in axes if axis not in most and (operator, axis) != ("decode_attention", "S")]


def emptied(x: Any, axes: tuple[str, ...], axis: str) -> Any:
    """The first 0 of a tensor along that axis."""
    names = axis_names(axes, x.ndim)
    return x.narrow(names.index(axis), 0, 0) if axis in names else x


@forms
@pytest.mark.parametrize(
    ("operator", "axis"), [(name, axis) for name in OPERATORS for axis in axes_that_may_be_empty(name)]
)
def test_nothing_to_do_is_done(operator: str, axis: str, form: str, device: str) -> None:
    arguments, keywords = call_of(operator, "float16")
    known, whole = contract_of(operator), run(form, operator, arguments, keywords)
    named = dict(zip(known.parameters, arguments, strict=False)) | keywords
    if axis == "N" and "lengths" in named:
        named["lengths"] = torch.zeros_like(named["lengths"])
    given = {n: emptied(x, known.arguments[n], axis) if n in known.arguments else x for n, x in named.items()}
    arguments, keywords = list(given.values())[: len(arguments)], {name: given[name] for name in keywords}
    found = run(form, operator, arguments, keywords)
    wanted = [emptied(y, axes, axis) for y, axes in zip(whole, known.outputs.values(), strict=True)]
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in wanted]
    if any(y.numel() for y in found):
        assert_meets_contract(operator, found, *arguments, **keywords)


def relaid(call: Call, first: int) -> Call:
    """The call with each array laid out in another way, beginning with layout number `first`."""

    def lie(x: Any, number: int) -> Any:
        if not isinstance(x, Array):
            return x
        for i in range(len(LAYOUTS)):
            layout = LAYOUTS[(number + i) % len(LAYOUTS)]
            needed = {"far": 2, "gaps": 2, "transposed": 2, "heads": 3}
            fits = len(x.shape) >= needed.get(layout, 1) and not (layout == "expanded" and x.planted)
            if layout != "dense" and fits:
                break
        return replace(x, layout=layout)

    arguments = tuple(lie(x, first + i) for i, x in enumerate(call.arguments))
    return replace(call, arguments=arguments, kind=f"layouts from {LAYOUTS[first]} on")


@operators
def test_layouts_do_not_matter(operator: str, device: str) -> None:
    """Every array in every layout, far apart and expanded included: Triton gives the bits of dense ones."""
    plainest = next(call for call in corners(operator, "bfloat16") if call.arguments[0].shape[0] > 1)
    others = [relaid(plainest, first) for first in range(len(LAYOUTS))]
    for call in others:
        tensors, keywords = call.tensors(DEVICE)
        dense = [x.contiguous().clone() if isinstance(x, torch.Tensor) else x for x in tensors]
        assert same(run("triton", operator, tensors, keywords), run("triton", operator, dense, keywords)), call
    keeps_its_contract("plain", operator, "bfloat16", others)


@pytest.mark.parametrize(
    ("operator", "form"), [(o, f) for o in OPERATORS for f in FORMS if (o, f) != ("rms_norm_qkv_rope", "plain")]
)
def test_heads_of_a_result_merge_without_a_copy_and_all_else_is_dense(operator: str, form: str, device: str) -> None:
    arguments, keywords = call_of(operator, "bfloat16")
    results = run(form, operator, arguments, keywords)
    for name, y in zip(contract_of(operator).outputs, results, strict=True):
        merge = name != "lse" and ("attention" in operator or operator == "rms_norm_qkv_rope")
        assert (y.transpose(1, 2) if merge else y).is_contiguous(), name
        assert y.device.type == DEVICE


@operators
@pytest.mark.parametrize("S", [1, 17])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(operator: str, S: int, device: str) -> None:
    """Tokens that decode, and few sequences of more; and a second time."""
    S = min(S, 8) if operator == "decode_attention" else S
    arguments, keywords = call_of(operator, sizes={"B": 24 if S == 1 else 2, "S": S, "H": 2, "K": 1})
    together = run("triton", operator, arguments, keywords)
    assert same(together, run("triton", operator, arguments, keywords))
    call = Call(operator, "float32", tuple(arguments))
    for row in (0, len(together[0]) // 2, len(together[0]) - 1):
        alone, options = row_alone(call, arguments, keywords, row)
        assert same(run("triton", operator, alone, options), tuple(y[row : row + 1] for y in together))


# -- the configurations that ship --------------------------------------------------------------------------------------

FEW = {
    True: {"N": 272, "S": 144, "V": 272, "E": 96},
    False: {"N": 20, "S": 6, "V": 9000, "F": 1100},
}
"""Sizes over one tile by a few, for operators with products inside and for those that go row by row. A remainder by 16
is added to them, so that the class of shapes stays."""


def starts(planned: Any) -> list[Any]:
    """The launches of a plan, in their order."""
    return list(planned[0]) if isinstance(planned[0], list | tuple) else [planned[0]]


@pytest.mark.parametrize(
    "kernel", [name for name in tunables() if tunables()[name].operator in set(OPERATORS) - {"attention"}]
)
def test_every_tile_that_ships_writes_every_element(kernel: str, device: str) -> None:
    """Over results and workspaces that hold NaN. What differs in warps or stages alone computes the same. Tiles of
    attention go with head dims, of which test_kernel_attention.py takes every kind; those of gradients are in
    test_kernel_gradients.py."""
    if device != "cpu":
        pytest.skip("a GPU runs the tiles of its own target")
    each, seen = tunables()[kernel], list[Any]()
    few = FEW[contract_of(each.operator).product]
    for shape, sizes in each.shapes.items():
        n = {axis: size if size <= few.get(axis, size) else few[axis] + size % 16 for axis, size in sizes.items()}
        n |= {"H": 8, "K": 1} if "R" not in n and "H" in n else {}  # heads repeat what one of them does
        call = replace(each, shapes={shape: n}).make(shape, Source(each.dtype(shape), device, seed=0))
        contract = Contract(call.operator, call.arguments, call.keywords)
        given = {x.untyped_storage().data_ptr() for x in call.arguments if isinstance(x, torch.Tensor)}
        for target in TARGETS.values():
            planned = plan(call.operator, call.arguments, call.keywords, target=target)
            if (found := (shape, [step.constants for step in starts(planned)])) in seen:
                continue
            seen.append(found)
            for step in starts(planned):
                for x in step.arguments.values():
                    if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                        x.fill_(torch.nan)
            for step in starts(planned):
                step.run()
            for verdict in contract.judge(tuple(y for y in planned[1:] if y is not None)):
                assert verdict.holds, f"{shape}, {target.name}: {verdict.problem}"
    assert len(seen) >= len(each.shapes)


@pytest.mark.parametrize("S", [1, 16, 17, 512])
@operators
def test_a_configuration_does_not_depend_on_the_batch(operator: str, S: int) -> None:
    """Nor on the slots of a cache: else a row could have other bits in another. The plans themselves need no memory."""
    S = min(S, 8) if operator == "decode_attention" else S
    for target in TARGETS.values():
        seen = []
        for B in (1, 3, 700):
            sizes = SIZES | {"B": B, "N": 256 * B, "S": S, "E": 2560, "F": 7040, "V": 128_256, "D": 128}
            one_by_one = {"reduction": "none"} if "reduction" in contract_of(operator).parameters else {}
            call = call_of_sizes(operator, sizes, Source("bfloat16", "meta", seed=0), **one_by_one)
            seen.append(
                [(x.constants, x.num_warps, x.num_stages) for x in starts(plan(operator, *call, target=target))]
            )
        assert seen[0] == seen[1] == seen[2]


# -- operators of Torch ------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """What is called of the operators that are registered with Torch: (operator, arguments, keywords)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "refllm":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@operators
def test_torch_takes_it_for_an_operator_of_its_own(operator: str, device: str) -> None:
    """Schema, fake tensors with the strides of the real ones, and a graph without breaks."""
    arguments, keywords = call_of(operator)
    with Recorded() as recorded:
        expected = run("triton", operator, arguments, keywords)
    assert recorded.calls
    for registered, values, options in recorded.calls:
        torch.library.opcheck(registered, values, options)
    torch.compiler.reset()  # it compiles one function for so many shapes only
    compiled = torch.compile(
        lambda *x: run("triton", operator, x, keywords),
        fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor",
    )  # fmt: skip
    found = compiled(*arguments)
    assert [y.stride() for y in found] == [y.stride() for y in expected]
    assert same(found, expected)


@operators
def test_without_gpu_or_interpreter_the_error_says_what_to_do(operator: str) -> None:
    arguments, keywords = call_of(operator, where="cpu")
    with pytest.raises(InputError, match=rf"{operator}: the tensors are on cpu.*refllm\.kernels\.plain\.{operator}"):
        run("triton", operator, arguments, keywords)
