"""`check_op` of candidates that lack optional arguments, and what it says to those that take others."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import opcheck_candidates as candidates  # noqa: E402
from hypothesis import strategies  # noqa: E402
from opcheck_tools import HERE, command, shown  # noqa: E402

from refllm.check import check_op  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.opcheck.without import left_out  # noqa: E402
from refllm.strategies import Array, Call  # noqa: E402

LACKING = {"without": ("return_lse", "key_mask"), "max_examples": 20, "isolate": False}


def test_what_a_candidate_lacks_can_be_left_out() -> None:
    report = check_op("attention", candidates.attention_alone, **LACKING)
    assert (report.verdict, report.without, report.untested) == ("holds", ("return_lse", "key_mask"), ()), str(report)
    assert report.examples > 30
    assert re.search("not asked +return_lse, key_mask", str(report))
    one = check_op("layer_norm", candidates.no_bias, without="bias", max_examples=20, isolate=False)
    assert (one.verdict, one.examples > 30) == ("holds", True), str(one)
    assert check_op("layer_norm", candidates.no_bias, max_examples=0, shrink=False, isolate=False).verdict == "fails"


def test_another_bug_is_found_where_something_is_left_out() -> None:
    """It shows only where causal is False, which is still asked."""
    report = check_op("attention", candidates.always_causal, **LACKING)
    assert report.property == "value", str(report)
    assert not {"return_lse", "key_mask"} & set(dict(report.finding.call.keywords))
    shown(report)


def test_calls_that_are_left_out_and_calls_that_lose_an_argument() -> None:
    x, mask = Array((1, 1, 2, 8), "float32"), Array((1, 2), "bool", "ones")
    plain_call = Call("attention", "float32", (x, x, x), (("causal", True),))
    both = Call("attention", "float32", (x, x, x), (("causal", False), ("return_lse", True)))
    masked = Call("attention", "float32", (x, x, x), (("key_mask", mask),))
    assert left_out(both, ("return_lse",)) == replace(both, keywords=(("causal", False),))
    assert left_out(both, ("causal",)) is None
    assert left_out(plain_call, ("causal",)) == replace(plain_call, keywords=())
    assert left_out(masked, ("key_mask",)) is None
    given = {"calls": [masked, both], "dtype": "float32", "isolate": False}
    assert check_op("attention", candidates.attention_alone, without=("return_lse", "key_mask"), **given).examples == 1
    given["calls"] = [masked]
    with pytest.raises(InputError, match="every call needs it"):
        check_op("attention", candidates.attention_alone, without="key_mask", **given)
    given["calls"] = strategies.just(masked)
    with pytest.raises(InputError, match="draws no call that can be checked"):
        check_op("attention", candidates.attention_alone, without="key_mask", **given)


def test_a_finding_says_what_to_leave_out_and_what_the_arguments_should_be() -> None:
    x = Array((1, 1, 2, 8), "float32")
    mask, lse = ("key_mask", Array((1, 2), "bool", "ones")), ("return_lse", True)
    contract = "; the contract is attention(q_BHSD, k_BKTD, v_BKTD, *, scale=None, causal=True, key_mask=None"
    for function, keyword, text in (
        (candidates.attention_alone, mask, "unexpected keyword argument 'key_mask'; --without key_mask leaves it out"),
        (candidates.never_lse, lse, "the contract has 2: o, lse; --without return_lse leaves it out"),
        (candidates.two_tensors, ("causal", False), "argument 'causal'; --without causal leaves it out"),
        (candidates.two_tensors, None, contract),
        (torch.abs, None, contract),
    ):
        call = Call("attention", "float32", (x, x, x), (keyword,) if keyword else ())
        given = {"calls": [call], "dtype": "float32", "isolate": False, "shrink": False}
        report = check_op("attention", function, **given)
        assert text in report.finding.text, report.finding.text
    assert "contract is" not in check_op("rms_norm", candidates.inner_mistake, isolate=False).finding.text


def test_without_on_the_command_line(monkeypatch: Any, capsys: Any) -> None:
    words = f"attention --candidate {HERE / 'opcheck_candidates.py'}:attention_alone --max-examples 3 --json -".split()
    assert command(monkeypatch, *words, "--without", "return_lse", "--without", "key_mask") == 0
    assert json.loads(capsys.readouterr().out)["without"] == ["return_lse", "key_mask"]


def test_float32_weights_beside_narrower_activations_can_be_left_out() -> None:
    report = check_op("rms_norm", candidates.one_dtype, isolate=False)
    assert report.property == "raises"
    assert "--without mixed_dtypes" in report.finding.text
    report = check_op("rms_norm", candidates.one_dtype, without="mixed_dtypes", max_examples=20, isolate=False)
    assert report.verdict == "holds", str(report)
    assert re.search("not asked +mixed_dtypes", str(report))
