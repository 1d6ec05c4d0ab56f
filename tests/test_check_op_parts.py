"""What `check_op` is made of: the judgement of values, the formulas of reproductions, sizes, and tiles in words."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("hypothesis")


from refllm import ops
from refllm.opcheck import limits
from refllm.opcheck.candidate import uses_triton
from refllm.opcheck.expected import expect
from refllm.opcheck.formulas import FORMULAS
from refllm.opcheck.judge import judge
from refllm.opcheck.shrink import resized
from refllm.opcheck.signatures import SIGNATURES, signature
from refllm.opcheck.tile import tile
from refllm.precision import rounding
from refllm.strategies import Array, Call, corners

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

    assert verify.LIMITS is limits.LIMITS
    assert limits.rms_limit("rms_norm") == verify.ELEMENTWISE_LIMIT == 1.1
    assert limits.rms_limit("attention") == verify.PRODUCT_LIMIT == 1.25
    # The largest that a uniform last rounding and Gaussian errors before it reach, times 1.25.
    assert pytest.approx(1.25 * np.sqrt(3 + 6.1**2), rel=0.02) == limits.ELEMENT_LIMIT


# -- its parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", SIGNATURES)
def test_formulas_of_reproductions_are_the_definitions(operator: str) -> None:
    space: dict[str, Any] = {"np": np}
    exec(FORMULAS[operator], space)
    for call in corners(operator, "float32"):
        arguments, keywords = call.arrays()
        if any(x.size > 20_000 for x in arguments if isinstance(x, np.ndarray)) or "offsets" in call.family:
            continue
        arguments = [
            x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in arguments
        ]
        with np.errstate(all="ignore"):
            wanted = getattr(ops, operator)(*arguments, **keywords)
            if not all(x.size for x in arguments if isinstance(x, np.ndarray)):
                continue
            made = space["definition"](*arguments, **keywords)
        for a, b in zip(made, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            finite = np.isfinite(b) & np.isfinite(a)
            np.testing.assert_allclose(np.asarray(a)[finite], np.asarray(b)[finite], rtol=1e-9, atol=1e-12)


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


def test_tiles_in_words() -> None:
    where = np.zeros((4, 2048), bool)
    where[1:, 1024:] = True
    assert tile(where, signature("rms_norm").outputs["y"]) == "columns 1024.. (of 2048) of rows 1.. (of 4)"
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
