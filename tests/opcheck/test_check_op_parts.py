"""What `check_op` is made of: the judgement of values, the formulas of reproductions, sizes, and tiles in words."""

import importlib
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import opcheck_candidates as candidates  # noqa: E402
from opcheck_tools import run_alone, shown  # noqa: E402

from refllm import ops  # noqa: E402
from refllm.accuracy import expected as expected_module  # noqa: E402
from refllm.accuracy import limits  # noqa: E402
from refllm.accuracy.expected import expect  # noqa: E402
from refllm.accuracy.judge import judge  # noqa: E402
from refllm.accuracy.operator import predict  # noqa: E402
from refllm.check import check_op  # noqa: E402
from refllm.kernels.interpreter.poison import ALLOCATORS  # noqa: E402
from refllm.opcheck import api, poison  # noqa: E402
from refllm.opcheck.candidate import Candidate, uses_triton  # noqa: E402
from refllm.opcheck.examine import Examiner, Finding  # noqa: E402
from refllm.opcheck.observe import Task  # noqa: E402
from refllm.opcheck.offers import Offers  # noqa: E402
from refllm.opcheck.repro import reproduction  # noqa: E402
from refllm.opcheck.repro.unread import filled_memory, unread_changed  # noqa: E402
from refllm.opcheck.shrink import axis_lengths, resized, shrink  # noqa: E402
from refllm.opcheck.tile import begin, tile  # noqa: E402
from refllm.opcheck.worker import InProcess, TimeIsUpError  # noqa: E402
from refllm.ops.contracts import CONTRACTS, contract_of  # noqa: E402
from refllm.precision import FUSED, rounding  # noqa: E402
from refllm.strategies import Array, Call, corners  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")


# -- the judgement -----------------------------------------------------------------------------------------------------


def wanted(dtype: str, x: Array, operator: str = "relu2") -> Any:
    return expect(Call(operator, dtype, (x,)))[0]


def test_one_wrong_element_in_a_hundred_thousand() -> None:
    for dtype in DTYPES:
        e = wanted(dtype, Array((100, 1000), dtype))
        assert judge(e.contract, e).holds
        wrong = e.contract.copy()
        at = tuple(int(i) for i in np.argwhere(wrong > 0.5)[17])
        wrong[at] *= 1.05
        found = judge(wrong, e)
        assert found.worst == at
        assert found.wrong.sum() == 1
        assert {f.rule for f in found.faults} >= {"element"}


def test_a_coherent_bias_and_a_second_rounding() -> None:
    for dtype, factor in (("bfloat16", 1.003), ("float16", 1.0005), ("float32", 1.000001)):
        e = wanted(dtype, Array((40, 100), dtype))
        assert not judge(rounding(dtype)((e.exact * factor).astype(np.float32)), e).holds
    e = expect(Call("swiglu", "bfloat16", (Array((40, 100), "bfloat16"), Array((40, 100), "bfloat16", seed=1))))[0]
    twice = rounding("bfloat16")((e.exact * 1.7).astype(np.float32)) / np.float32(1.7)
    assert "rms" in {f.rule for f in judge(rounding("bfloat16")(twice), e).faults}


def test_nan_and_infinity_stand_where_they_belong() -> None:
    nan, inf = float("nan"), float("inf")
    e = wanted("bfloat16", Array((2, 4), "bfloat16", "ones", planted=(((0, 1), nan), ((1, 2), inf))))
    right = e.contract.copy()
    assert judge(right, e).holds
    for at, value in (((0, 1), 1.0), ((1, 2), nan), ((1, 2), -inf), ((0, 0), nan), ((0, 0), inf)):
        wrong = right.copy()
        wrong[at] = value
        found = judge(wrong, e)
        assert [f.property for f in found.faults] == ["NaN pattern"]
        assert found.worst == at


def test_a_nan_that_signals_is_judged_without_a_warning() -> None:
    """As memory that nobody wrote may hold."""
    call = Call("relu2", "float32", (Array((2, 4), "float32"),))
    e = expect(call)[0]
    signalling = np.full((2, 4), 0x7F800001, np.uint32).view(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not judge(signalling, e).holds


def test_at_the_border_of_a_format_infinity_and_the_largest_number_are_one() -> None:
    e = wanted("float16", Array((1, 2), "float16", "ones", scale=200.0))
    for exact, contract in ((65519.99, 65504.0), (65520.01, np.inf)):  # 65520 is between 65504 and what is too large
        border = replace(e, exact=np.full((1, 2), exact), contract=np.full((1, 2), contract))
        for value in (65504.0, np.inf):
            assert judge(np.full((1, 2), value, np.float32), border).holds
        for value in (-np.inf, np.nan, 60000.0):
            assert not judge(np.full((1, 2), value, np.float32), border).holds


def test_limits_are_those_of_the_kernel_tests() -> None:
    from refllm.kernels import verify

    assert verify.rms_limit is limits.rms_limit
    assert limits.rms_limit("rms_norm") == verify.ELEMENTWISE_LIMIT == 1.1
    assert limits.rms_limit("attention") == verify.PRODUCT_LIMIT == 1.25
    assert limits.PRODUCT_LIMIT == limits.ISOLATED["bfloat16"] == limits.ISOLATED["float16"]
    # The largest that a uniform last rounding and Gaussian errors before it reach, times 1.25.
    assert pytest.approx(1.25 * np.sqrt(3 + 6.1**2), rel=0.02) == limits.ELEMENT_LIMIT


def test_chance_is_five_times_the_spread_of_a_size_and_of_a_ratio_of_two() -> None:
    one, other = np.sqrt(np.square(np.random.default_rng(0).standard_normal((2, 4000, 100))).mean(axis=-1))
    assert limits.chance(100) == pytest.approx(5 * one.std(), rel=0.05)
    assert limits.chance(100, measured=2) == pytest.approx(5 * (one / other).std(), rel=0.05)
    assert limits.chance(0) == limits.chance(1)


def test_only_the_rules_that_are_asked_are_judged() -> None:
    e = wanted("bfloat16", Array((100, 1000), "bfloat16"))
    off = e.contract.copy()
    at = tuple(int(i) for i in np.argwhere(off > 0.5)[17])
    off[at] *= 1.05
    assert {f.rule for f in judge(off, e).faults} == {"element", "one rounding"}
    for rule in ("element", "one rounding"):
        assert {f.rule for f in judge(off, e, [rule]).faults} == {rule}
    calm = judge(off, e, ("not finite", "rms"))
    assert calm.holds
    assert calm.worst == at
    far = judge(off, e, ["rms"], limit=0.01)
    assert [f.rule for f in far.faults] == ["rms"]
    assert far.limit == 0.01
    assert far.size == pytest.approx(np.sqrt(np.mean((off - e.exact) ** 2)))


def test_kernels_verify_is_as_lenient_at_the_border_of_a_format_as_check_op() -> None:
    """65520 lies between the largest float16 and what is too large: one rounding decides."""
    from refllm.kernels.verify import judge as verified

    x, one = torch.full((1, 2), 65504.0, dtype=torch.float16), torch.full((1, 2), 16.0, dtype=torch.float16)
    for value, holds in ((65504.0, True), (float("inf"), True), (-float("inf"), False), (float("nan"), False)):
        result = torch.full((1, 2), value, dtype=torch.float16)
        found = verified("add_rms_norm", (torch.ones_like(x), result), x, one, torch.ones(2, dtype=torch.float16), 1e-6)
        assert found[1].holds == holds, value


def test_no_number_of_a_verdict_stands_outside_the_table() -> None:
    """Whoever judges values gives names to no limits of its own."""
    package, kernels, golden = (importlib.import_module(f"refllm{part}") for part in ("", ".kernels", ".golden"))
    root = Path(str(package.__file__)).parent
    files = [*root.glob("check/**/*.py"), *root.glob("opcheck/**/*.py"), *root.glob("accuracy/*.py")]
    files += [Path(str(kernels.__file__)).parent / "verify.py", *Path(str(golden.__file__)).parent.glob("*.py")]
    names = "LIMIT|CHANCE|ISOLATED|ROW|ELEMENT|MISROUNDED|FLIP|FLOOR|SIGMA|WITHIN|VOTES|NEARLY|WORSE|CLEARLY"
    number = re.compile(rf"^(?!TIME)\w*(?:{names}) = [\d.]", re.MULTILINE)
    found = {file.name: number.findall(file.read_text()) for file in files}
    assert len(found.pop("limits.py")) > 5
    assert {name: numbers for name, numbers in found.items() if numbers} == {}


@pytest.mark.parametrize("values", ["ones", "normal"])
def test_a_float32_sum_of_one_chain_of_additions_holds(values: str) -> None:
    """Twice the error that one chain has on average, in all elements; of ones the definition's own sums are exact."""
    x, weight = Array((4, 1024), "float32", values), Array((1024,), "float32", values, seed=1)
    e = expect(Call("rms_norm", "float32", (x, weight, 1e-6)))[0]
    off = 2 * limits.CHAIN * np.sqrt(1024 / 3) * 2.0**-24
    found = judge(e.exact * (1 + off), e)
    assert found.holds
    assert found.ratio == pytest.approx(1.9 if values == "ones" else 1.5, abs=0.1)
    assert not judge(e.exact * (1 + 4 * off), e).holds


@pytest.mark.parametrize(
    ("operator", "dtype", "size", "counts"),
    [
        ("relu2", "bfloat16", (1, 8), False),  # rounded once: few errors are no luck, they are known
        ("relu2", "bfloat16", (40, 100), False),
        ("relu2", "float32", (1, 8), True),
        ("relu2", "float32", (40, 100), True),  # in any order of additions
        ("attention", "bfloat16", (1, 1, 2, 8), True),  # a product: few errors may be small by luck
        ("attention", "bfloat16", (1, 4, 40, 64), False),
    ],
)
def test_the_predicted_sigma_is_the_unit_only_where_the_contract_s_own_error_may_be_luck(
    operator: str, dtype: str, size: tuple[int, ...], counts: bool
) -> None:
    """And the ratio that is told is the one that is judged."""
    arguments = tuple(Array(size, dtype, seed=i) for i in range(3 if operator == "attention" else 1))
    e = expect(Call(operator, dtype, arguments))[0]
    value = e.contract * 1.5
    told, calm = judge(value, e), judge(value, replace(e, variance=e.variance * 1e8))
    assert (calm.ratio < told.ratio / 100) == counts
    assert counts or calm.ratio == told.ratio
    (text,) = [f.text for f in told.faults if f.rule == "rms"]
    assert f"is {told.ratio:.3g} times" in text
    assert f"(limit {told.limit:.3g})" in text


@pytest.mark.parametrize(("dtype", "counts"), [("bfloat16", 1), ("float32", 0)])
def test_of_what_is_rounded_once_the_error_of_float32_inside_is_expected_too(dtype: str, counts: int) -> None:
    """In float32 it is the error itself; and under hf-eager the steps in between are rounded, which is far more."""
    call = Call("swiglu", dtype, (Array((4, 8), dtype), Array((4, 8), dtype, seed=1)))
    fused, eager = (expect(call, policy)[0].inner for policy in ("fused", "hf-eager"))
    inside = predict(call.operator, *call.arrays(), dtype="float32", policy=FUSED)[0].sigma
    assert (inside > 0).all()
    np.testing.assert_allclose(np.square(fused), np.square(eager) + counts * np.square(limits.INNER * inside))


def test_the_sigma_that_is_told_is_the_one_judged_by() -> None:
    """Of the worst element; the score is the worst of all rules."""
    e = wanted("bfloat16", Array((20, 100), "bfloat16"))
    wrong, place = e.contract.copy(), (7, int(e.exact[7].argmax()))
    wrong[place] += 1
    found = judge(wrong, e)
    assert found.worst == place
    assert (found.value, found.exact, found.contract) == (wrong[place], e.exact[place], e.contract[place])
    (text,) = [f.text for f in found.faults if f.rule == "element"]
    assert text == f"an element is {found.sigma:.3g} sigma off (limit 8)"
    assert found.score >= found.sigma / limits.ELEMENT_LIMIT > 1


# -- its parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", CONTRACTS)
def test_formulas_of_reproductions_are_the_definitions(operator: str) -> None:
    space: dict[str, Any] = {"np": np}
    exec(contract_of(operator).program, space)
    compared = 0
    for call in corners(operator, "float32"):
        arguments, keywords = call.arrays()
        if any(x.size > 20_000 for x in arguments if isinstance(x, np.ndarray)) or "offsets" in call.kind:
            continue
        arguments = [
            x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in arguments
        ]
        with np.errstate(all="ignore"):
            wanted = getattr(ops, operator)(*arguments, **keywords)
            if not all(x.size for x in arguments if isinstance(x, np.ndarray)):
                continue
            made = space["definition"](*arguments, **keywords)
        compared += 1
        for a, b in zip(made, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            finite = np.isfinite(b) & np.isfinite(a)
            np.testing.assert_allclose(np.asarray(a)[finite], np.asarray(b)[finite], rtol=1e-9, atol=1e-12)
    assert compared >= 5


def test_every_number_is_moved_by_a_rounding_of_its_size_whatever_its_sign() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([[0.0, 0.0], np.ones(4000), -8 * np.ones(4000)]).astype(np.float32)
    moved = expected_module._moved(x, rng).astype(np.float64) - x
    assert not moved[:2].any()
    for part, size in ((moved[2:4002], 1), (moved[4002:], 8)):
        assert part.std() == pytest.approx(size * 2.0**-24, rel=0.05)
        assert abs(part.mean()) < 0.1 * part.std()
    assert expected_module._moved(np.arange(3), rng).tolist() == [0, 1, 2]
    assert expected_module._moved(None, rng) is None


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_a_reproduction_changes_the_rows_whose_label_is_ignored(operator: str) -> None:
    x, labels = torch.ones(4, 6), torch.tensor([1, -100, 7, 0])
    arguments = [x, labels] if operator == "cross_entropy" else [x, torch.ones(9, 6), labels]
    for keywords, ignored in (({}, 1), ({"ignore_index": 7}, 2)):
        x[:] = 3
        call = Call(operator, "float32", ())
        exec("\n".join(unread_changed(call)), {"torch": torch, "arguments": arguments, "keywords": keywords})
        assert [row for row in range(4) if (x[row] == -2).all()] == [ignored]
        assert (x == 3).sum() == 18


@pytest.mark.parametrize("run", [0, 1])
def test_new_memory_of_every_kind_but_complex_is_filled_another_way_in_every_run(run: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool):
        filled = [torch.zeros(3, dtype=dtype) for _ in range(2)]
        poison.fill(filled[0], run)
        poison.fill(filled[1], 1 - run)
        assert not torch.equal(*filled), dtype
        assert filled[0].unique().numel() == 1 or filled[0].isnan().all(), dtype
    untouched = torch.ones(2, dtype=torch.complex64)
    poison.fill(untouched, run)
    assert (untouched == 1).all()


def test_resizing_keeps_what_belongs_together() -> None:
    call = next(c for c in corners("rms_norm_qkv_rope", "bfloat16") if dict(c.keywords)["num_kv_heads"] > 0)
    smaller = resized(call, {"H": 1, "K": 1, "D": 4, "S": 1, "B": 1, "E": 3})
    assert dict(smaller.keywords)["num_heads"] == 1
    shape = {n: x.shape for n, x in zip(smaller.names, smaller.arguments, strict=True) if isinstance(x, Array)}
    assert shape["w_qkv"] == (12, 3)
    assert shape["x"] == (1, 1, 3)
    expect(smaller)
    labels = Array((5,), "int64", "integers", scale=9, planted=(((2,), -100), ((3,), 8)))
    loss = resized(Call("cross_entropy", "float32", (Array((5, 9), "float32"), labels)), {"V": 3, "N": 4})
    assert loss.arrays()[0][1].max() <= 2
    expect(loss)


@pytest.mark.parametrize(
    "lengths",
    [
        Array((2,), "int64", "ones", scale=9),
        Array((2,), "int64", "zeros", mean=9),
        Array((2,), "int64", "zeros", planted=(((0,), 9), ((1,), 2))),
        Array((2,), "int64", "integers", scale=5, mean=5),
        Array((2,), "int64", "integers", scale=10, mean=0),
    ],
)
def test_integers_stay_within_the_axis_that_bounds_them(lengths: Array) -> None:
    q, cache = Array((2, 1, 1, 8), "float32"), Array((2, 1, 9, 8), "float32")
    call = Call("decode_attention", "float32", (q, cache, cache, lengths))
    for slots in (1, 2, 4, 8):
        smaller = resized(call, {"N": slots})
        found = smaller.arrays()[0][3]
        assert found.max() <= slots
        assert found.min() >= 0
        assert smaller.arguments[1].shape == (2, 1, slots, 8)
    assert (resized(call, {"N": 9}).arrays()[0][3] == lengths.array()).all()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("size", [40, 64])
def test_a_size_shrinks_to_the_smallest_that_fails(size: int, step: int) -> None:
    """Also where only even sizes fail: halving ends at an odd size, and it goes on past that."""

    def smallest(threshold: int) -> tuple[int, int]:
        def retry(call: Call) -> Finding | None:
            columns = axis_lengths(call)["E"]
            return Finding("value", "", call) if columns >= threshold and columns % step == 0 else None

        call = Call("rms_norm", "float32", (Array((3, size), "float32"), Array((size,), "float32"), 1e-5))
        found, tried = shrink(Finding("value", "", call), retry, time.monotonic() + 60)
        return axis_lengths(found.call)["E"], tried

    thresholds = range(step, size + 1, step)
    assert [smallest(t)[0] for t in thresholds] == list(thresholds)
    assert max(smallest(t)[1] for t in thresholds) < 100


@pytest.mark.parametrize(
    ("part", "plain"),
    [
        ({"layout": "shifted"}, {"layout": "dense"}),
        ({"planted": (((1,), 7.0),)}, {"planted": ()}),
        ({"scale": 3.0}, {"scale": 1.0}),
        ({"mean": 4.0}, {"mean": 0.0}),
        ({"values": "ones"}, {"values": "normal"}),
    ],
)
def test_of_two_arrays_only_what_the_failure_needs_is_kept(part: dict[str, Any], plain: dict[str, Any]) -> None:
    x, weight = Array((3, 4), "float32", **part | {"planted": ()}), Array((4,), "float32", **part)
    if "planted" in part:
        x = replace(x, planted=(((1, 1), 7.0),))

    def retry(call: Call) -> Finding | None:
        kept = call.arguments[1]
        return Finding("value", "", call) if all(getattr(kept, name) == part[name] for name in part) else None

    call = Call("rms_norm", "float32", (x, weight, 1e-5))
    found, _ = shrink(Finding("value", "", call), retry, time.monotonic() + 60)
    first, second = found.call.arguments[:2]
    assert {name: getattr(first, name) for name in part} == plain
    assert {name: getattr(second, name) for name in part} == part


@pytest.mark.parametrize(
    ("bad", "size", "words"),
    [
        ([0], 1, "column 0"),
        ([0, 1, 2, 3], 4, "all 4 columns"),
        ([2], 4, "column 2 (of 4)"),
        ([1, 2], 4, "columns 1..2 (of 4)"),
        ([2, 3], 4, "columns 2.. (of 4)"),
        ([1, 4, 7], 9, "every third of the columns from 1 (of 9)"),
        ([1, 2, 7], 9, "3 of 9 columns from 1"),
    ],
)
def test_part_of_an_axis_in_words(bad: list[int], size: int, words: str) -> None:
    where = np.zeros((3, size), bool)
    where[:, bad] = True
    assert tile(where, contract_of("rms_norm").outputs["y"]) == f"{words} of all 3 rows"
    assert begin(where) == (0, bad[0])
    assert tile(np.zeros((3, size), bool), contract_of("rms_norm").outputs["y"]) == ""
    assert begin(np.zeros((3, size), bool)) == ()


def test_several_axes_of_rows_are_numbered() -> None:
    where = np.zeros((2, 3, 4), bool)
    where[1, 2, 3] = True
    said = tile(where, contract_of("rms_norm").outputs["y"])
    assert said == "column 3 (of 4) of row (axis 1) 2 (of 3) of row (axis 0) 1 (of 2)"


def test_tiles_in_words() -> None:
    where = np.zeros((4, 2048), bool)
    where[1:, 1024:] = True
    assert tile(where, contract_of("rms_norm").outputs["y"]) == "columns 1024.. (of 2048) of rows 1.. (of 4)"
    heads = np.zeros((2, 4, 3, 8), bool)
    heads[:, 1::2, :, 2] = True
    said = tile(heads, ("B", "H", "S", "D"))
    assert (
        said
        == "head dim 2 (of 8) of all 3 positions of every second of the query heads from 1 (of 4) of all 2 batch rows"
    )


def test_kernels_of_another_package_are_found_through_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "somebodys_kernels.py").write_text("import triton\n\n\ndef relu2(x):\n    return x\n")
    (tmp_path / "my_wrapper.py").write_text(
        "from somebodys_kernels import relu2\n\n\ndef mine(x):\n    return relu2(x)\n"
    )
    (tmp_path / "my_torch.py").write_text("import torch\n\n\ndef mine(x):\n    return torch.relu(x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, found in (("my_wrapper", True), ("my_torch", False)):
        assert uses_triton(importlib.import_module(name).mine) == found
        monkeypatch.delitem(sys.modules, name)


# -- reproductions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", CONTRACTS)
def test_code_makes_arrays_on_the_device_that_the_search_had(operator: str) -> None:
    """Without a GPU: on the device "meta", which has shapes, strides and no values."""
    some = corners(operator, "bfloat16")
    assert len(some) >= 5
    for call in some:
        space: dict[str, Any] = {"np": np, "torch": torch}
        exec("\n".join(call.code("meta")), space)
        arguments, keywords = call.tensors("meta")
        made = (*space["arguments"], *space["keywords"].values())
        for a, b in zip(made, (*arguments, *keywords.values()), strict=True):
            if isinstance(b, torch.Tensor):
                placed = (a.device, a.dtype, a.shape, a.stride(), a.storage_offset(), a.untyped_storage().nbytes())
                assert placed == (
                    b.device, b.dtype, b.shape, b.stride(), b.storage_offset(), b.untyped_storage().nbytes(),
                )  # fmt: skip


GAPS = Call("rms_norm", "bfloat16", (Array((2, 8), "bfloat16", layout="gaps"), Array((8,), "bfloat16"), 1e-5))


def program_for(device: str, function: Any, call: Call, property: str, text: str, **more: Any) -> str:
    """Of a finding that nobody made, for a candidate on a device that is not there."""
    candidate = Candidate(
        function.__name__, function, f"opcheck_candidates:{function.__name__}", "torch", device, False
    )
    return reproduction(Finding(property, text, call, **more), candidate, "fused", 10.0)


def test_a_program_for_a_gpu_waits_for_it_and_makes_nothing_elsewhere() -> None:
    """Run on the CPU with its device put in place; and every line that makes memory names the device."""
    text = "what lies between the elements of x changes the result"
    program = program_for("cuda", candidates.reads_beside, GAPS, "invariance", text)
    assert "torch.cuda.synchronize()" in program
    assert all("device=" in line for line in program.splitlines() if "torch.full(" in line or "torch.empty(" in line)
    here = program.replace("'cuda'", "'cpu'").replace("torch.cuda.synchronize()", "pass")
    code, said = run_alone(here)
    assert code == 1, said
    assert "cuda" not in program_for("cpu", candidates.reads_beside, GAPS, "invariance", text)
    mask = Array((1, 2), "bool", "ones", planted=(((0, 1), 0),))
    q = Array((1, 1, 2, 8), "float32")
    masked = Call("attention", "float32", (q, q, q), (("key_mask", mask),))
    lengths = Array((1,), "int64", "ones")
    decode = Call("decode_attention", "float32", (q, q, q, lengths))
    for call in (masked, decode):
        lines = program_for("cuda", candidates.masked_values, call, "invariance", "what they hold").splitlines()
        assert all("device=" in line for line in lines if "torch.arange(" in line)


def test_a_crash_is_shown_by_a_process_that_makes_its_own_arrays() -> None:
    """A GPU that the first process uses does not survive the fork."""
    lines = program_for("cuda", candidates.aborts, GAPS, "crashes", "its process ended").splitlines()
    made = [i for i, line in enumerate(lines) if "'cuda'" in line]
    assert made
    assert min(made) > next(i for i, line in enumerate(lines) if "os.fork()" in line)


def test_a_program_fills_whatever_the_search_fills() -> None:
    words = re.findall(r"\w+", "\n".join(filled_memory(numpy=False)))
    assert {name for _, name in ALLOCATORS} <= set(words)


def test_a_program_needs_ml_dtypes_for_bfloat16_alone() -> None:
    for dtype in DTYPES:
        report = check_op("rms_norm", candidates.numpy_in_place, arrays="numpy", dtype=dtype, isolate=False)
        assert ("ml_dtypes" in report.repro) == (dtype == "bfloat16")
        shown(report)


def test_a_program_without_a_candidate_does_not_look_like_a_failure() -> None:
    report = check_op("rms_norm", lambda x, weight, eps: x * 2, isolate=False, shrink=False)
    code, said = run_alone(report.repro)
    assert (code, "put your function here" in said) == (2, True)


def test_where_nothing_is_rounded_no_sigma_is_told() -> None:
    e = wanted("float32", Array((1, 4), "float32", "ones", scale=-1.0))
    off = e.contract.copy()
    off[0, 2] = 0.5
    text = next(f.text for f in judge(off, e).faults if f.rule == "element")
    assert text.startswith("an element is 0.5, and has to be 0 exactly (limit"), text


class Waiting:
    """An examiner of a candidate that hangs. left: seconds of the search. answer: what the last look at it gives."""

    def __init__(self, left: float, answer: Finding | Exception | None, limit: float = 10.0) -> None:
        self.limit, self.until, self.slowest, self.answer = limit, time.monotonic() + left, 0.01, answer
        self.limits: list[float] = []

    def __call__(self, call: Call, limit: float) -> Finding | None:
        self.limits.append(limit)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_of_a_hang_the_small_call_is_told_only_where_it_hangs_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    first, small = (Finding("hangs", f"it hangs {name}", corners("relu2", "float32")[i]) for i, name in enumerate("ab"))
    again, other = replace(small, text="for long"), replace(small, property="crashes")
    made: list[Finding] = [small]
    monkeypatch.setattr(api, "_made_small", lambda *_: made[0])

    def told(examine: Waiting) -> Finding:
        return api._smallest_that_hangs(examine, Offers(), first, examine.until, lambda *_: None)  # type: ignore[arg-type]

    for left, answer in ((100.0, None), (100.0, other), (100.0, TimeIsUpError("")), (0.2, again)):
        assert told(Waiting(left, answer)) is first
    assert told(whole := Waiting(100.0, again)) is again
    assert whole.limits == [10.0]
    assert told(Waiting(5.0, again)).text == "for long; the first call: it hangs a"
    made[0] = first
    assert told(none := Waiting(100.0, again)) is first
    assert none.limits == []


def test_the_score_of_a_call_is_its_error_over_what_is_allowed() -> None:
    call = corners("rms_norm", "float32")[0]
    for factor, least, most in ((1.0, 0.0, 1.0), (1.001, 10.0, np.inf)):

        def scaled(x: Any, weight: Any, eps: float, factor: float = factor) -> Any:
            return candidates.right(x, weight, eps) * factor

        named = Candidate("scaled", scaled, "", "torch", "cpu", triton=False)
        task = Task(call, "cpu", "torch", False, "fused", True, False)
        examine = Examiner(InProcess(named), task, 10.0, time.monotonic() + 100)
        assert (examine(call) is None) == (factor == 1)
        assert least <= examine.score < most
        assert (examine.examples, examine.slowest > 0) == (1, True)
