"""Findings of kinds that were missed once, or said in words that nobody understood."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from refllm.accuracy.expected import remembered  # noqa: E402
from refllm.accuracy.forms import on_grid  # noqa: E402
from refllm.accuracy.judge import judge  # noqa: E402
from refllm.check import assert_operator, check_op  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.verify import ContractBrokenError, assert_meets_contract  # noqa: E402
from refllm.opcheck import roundings  # noqa: E402
from refllm.opcheck.observe import Result  # noqa: E402
from refllm.opcheck.roundings import Evaluated, Roundings, profiles  # noqa: E402
from refllm.ops.contracts import contract_of  # noqa: E402
from refllm.strategies import Array, Call, calls, corners  # noqa: E402

NOW: dict[str, Any] = {"isolate": False, "max_examples": 0}


# -- element by element ------------------------------------------------------------------------------------------------


def sigmoid_by_its_mirror(gate: Any, up: Any) -> Any:
    g = gate.float()
    return (g * torch.where(g < 0, 1 - torch.sigmoid(-g), torch.sigmoid(g)) * up.float()).to(gate.dtype)


def test_an_element_is_not_granted_the_noise_of_its_row_where_nothing_is_summed() -> None:
    """In float32 1 - sigmoid(20) is 0, and the right value is of the order of 1e-7."""
    report = check_op("swiglu", sigmoid_by_its_mirror, dtype="float32", **NOW)
    assert report.property == "value", str(report)
    gate, up = Array((1, 8), "float32", planted=(((0, 3), -20.0),)), Array((1, 8), "float32", "ones", scale=3.0)
    one = [Call("swiglu", "float32", (gate, up))]
    assert check_op("swiglu", sigmoid_by_its_mirror, dtype="float32", calls=one, **NOW).verdict == "fails"
    assert check_op("swiglu", plain.swiglu, dtype="float32", calls=one, **NOW).verdict == "holds"


def test_one_element_of_many_breaks_the_contract() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(256, 640, dtype=torch.bfloat16), torch.randn(640, dtype=torch.bfloat16)
    y = plain.rms_norm(x, weight, 1e-6)
    assert_meets_contract("rms_norm", y, x, weight, 1e-6)
    for place in ((17, 33), (255, 639)):
        wrong = y.clone()
        wrong[place] = 0
        with pytest.raises(ContractBrokenError, match=rf"at \({place[0]}, {place[1]}\)(:| is) 0, exact"):
            assert_meets_contract("rms_norm", wrong, x, weight, 1e-6)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    o = plain.attention(q, k, v)
    assert_meets_contract("attention", o, q, k, v)
    o[0, 1, 39, 15] += 1e-4
    with pytest.raises(ContractBrokenError):
        assert_meets_contract("attention", o, q, k, v)


@pytest.mark.parametrize(
    ("operator", "arguments", "sentence"),
    [
        ("rmsnorm", (0, 1, 2, 1e-6), "'rmsnorm' is no operator"),
        ("rms_norm", (0, 1, 2), "missing a required argument: 'eps'; the contract is rms_norm\\(x, weight, eps\\)"),
        ("rms_norm", (0, 1, 2, 1e-6, 3), "too many positional arguments"),
        ("rms_norm", (0, 1, 1e-6, 1e-6), "weight is a float; expected a tensor \\[E\\]"),
        ("rms_norm", (0, 1, 3, 1e-6), "weight has the shape \\[5\\]; expected \\[E\\] with E = 8, as of x"),
        ("norm_rope", (0, 4, 4, 2, 2, 5, 5, 1e-6), "q_weight has the shape \\[8\\]; expected \\[H, D\\]"),
    ],
)
def test_what_is_no_call_is_one_sentence(operator: str, arguments: tuple[Any, ...], sentence: str) -> None:
    tensors = [torch.ones(n) for n in ((2, 8), (2, 8), (8,), (5,), (1, 2, 3, 8), (3, 4))]
    given = [tensors[x] if isinstance(x, int) else x for x in arguments]
    keywords = {"norm": "rms", "interleaved": True} if operator == "norm_rope" else {}
    with pytest.raises(InputError, match=sentence) as error:
        assert_meets_contract(operator, *given, **keywords)
    assert "\n" not in str(error.value)


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_of_clamped_labels(logits: Any, labels: Any, *, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """The logit of an ignored row is looked up where its label says, if only that is not below 0."""
    z, keep = logits.float(), labels != ignore_index
    wanted = z.gather(1, labels.clamp(min=0)[:, None])[:, 0] if len(z) else z.sum(-1)
    each = torch.where(keep, torch.logsumexp(z, -1) - wanted, 0.0)
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.sum() / keep.sum()


def linear_loss_of_clamped_labels(x: Any, weight: Any, labels: Any, **how: Any) -> Any:
    return loss_of_clamped_labels(x.float() @ weight.float().T, labels, **how)


@pytest.mark.parametrize(
    ("operator", "function"),
    [("cross_entropy", loss_of_clamped_labels), ("linear_cross_entropy", linear_loss_of_clamped_labels)],
)
def test_an_ignored_label_that_is_no_class_is_not_looked_up(operator: str, function: Any) -> None:
    report = check_op(operator, function, dtype="float32", isolate=False, max_examples=0)
    assert report.property == "raises", str(report)
    assert dict(report.finding.call.keywords)["ignore_index"] == 255
    ignored = {dict(call.keywords).get("ignore_index", -100) for call in corners(operator, "float32")}
    assert {-100, -1, 255, 7} <= ignored
    drawn = calls(operator, dtype="float32", kind="another label is ignored")
    assert check_op(operator, getattr(plain, operator), dtype="float32", calls=drawn, isolate=False).verdict == "holds"


def test_a_loss_that_fails_has_a_report(tmp_path: Path) -> None:
    """A single number has no place that could be named."""

    def loss(*arguments: Any, **how: Any) -> Any:
        return plain.cross_entropy(*arguments, **how) * 1.01

    report = check_op("cross_entropy", loss, dtype="float32", **NOW)
    assert (report.verdict, report.property) == ("fails", "value")
    assert report.to_dict()["counterexample"]["begins"] == []


def test_a_single_number_that_changes_is_seen_from_another_process() -> None:
    """Where the candidate runs apart, what is sent back of it is an array of no axes, and no crash."""
    times = iter(range(1000))

    def loss(*arguments: Any, **how: Any) -> Any:
        return plain.cross_entropy(*arguments, **how) + next(times)

    only = [call for call in corners("cross_entropy", "float32") if call.kind == "plain"]
    report = check_op("cross_entropy", loss, dtype="float32", calls=only, shrink=False, max_examples=0)
    assert report.property == "determinism", str(report)


# -- compilers ---------------------------------------------------------------------------------------------------------


def slow_compiler(graph: Any, inputs: Any) -> Any:
    time.sleep(0.8)
    return graph.forward


@torch.compile(backend=slow_compiler, dynamic=False)
def _compiled(x: Any, weight: Any, eps: float) -> Any:
    return plain.rms_norm(x, weight, eps)


def compiled(x: Any, weight: Any, eps: float) -> Any:
    return _compiled(x, weight, eps)


def test_compiling_is_not_hanging() -> None:
    only = [corners("rms_norm", "float32")[0]]
    report = check_op("rms_norm", compiled, dtype="float32", calls=only, time_limit=0.4)
    assert report.verdict == "holds", str(report)


def test_a_load_without_other_is_named() -> None:
    pytest.importorskip("triton")
    from opcheck_triton import load_without_other

    only = [Call("rms_norm", "float32", (Array((1, 5), "float32"), Array((5,), "float32", mean=1.0), 1e-5))]
    report = check_op("rms_norm", load_without_other, dtype="float32", calls=only, **NOW)
    assert report.property == "unwritten", str(report)
    assert "the tl.load of `x_ptr` at opcheck_triton.py:" in report.finding.text
    assert report.finding.text.endswith("has a mask and no `other`")


def test_every_configuration_of_an_autotuned_kernel_can_be_asked() -> None:
    pytest.importorskip("triton")
    from opcheck_triton import second_configuration

    only = [Call("rms_norm", "float32", (Array((1, 600), "float32"), Array((600,), "float32", mean=1.0), 1e-5))]
    given: dict[str, Any] = {"dtype": "float32", "calls": only, "shrink": False, **NOW}
    assert check_op("rms_norm", second_configuration, **given).verdict == "holds"
    report = check_op("rms_norm", second_configuration, configs="all", **given)
    assert report.property == "configurations", str(report)
    assert "`y_ptr` differs between the configurations BLOCK: 1024" in report.finding.text
    assert 'interpreted(configs="all")' in report.repro
    with pytest.raises(InputError, match="--configs all"):
        check_op("rms_norm", plain.rms_norm, configs="all")


def test_a_kernel_behind_two_decorators_is_interpreted() -> None:
    pytest.importorskip("triton")
    from opcheck_triton import decorated

    from refllm.opcheck.candidate import load

    decorated.__module__ = "elsewhere"
    assert load(decorated).interpreted


def test_a_candidate_imports_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_candidate.py").write_text("from refllm.kernels.plain import rms_norm\n")
    (tmp_path / "mine.py").write_text("from beside_the_candidate import rms_norm\n")
    assert check_op("rms_norm", f"{tmp_path}/mine.py:rms_norm", **NOW).verdict == "holds"


# -- words -------------------------------------------------------------------------------------------------------------


def rounded_twice(x: Any, weight: Any, eps: float) -> Any:
    return weight * plain.rms_norm(x, torch.ones_like(weight), eps)


def test_a_second_rounding_is_said_in_plain_words() -> None:
    report = check_op("rms_norm", rounded_twice, policy="fused", **NOW)
    assert "rounded more than once" in report.first.text, report.first.text
    assert "float32 inside explains" not in str(report)


def test_a_report_is_short_where_it_is_one_of_many_things() -> None:
    report = check_op("rms_norm", rounded_twice, policy="fused", **NOW)
    assert len(repr(report)) < 300
    assert report.repro.splitlines()[-1] not in str(report)
    assert "--repro" in str(report)
    assert report._repr_html_().startswith("<pre>rms_norm")
    with pytest.raises(AssertionError) as error:
        assert_operator("rms_norm", rounded_twice, policy="fused", **NOW)
    assert str(error.value).splitlines()[0].startswith("rms_norm rounded_twice, bfloat16: fails, value: y: ")
    assert np.isfinite(report.worst.ratio)


# -- what a candidate offers -------------------------------------------------------------------------------------------


def attention_of_a_beginner(q: Any, k: Any, v: Any) -> Any:
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return s.masked_fill(later, float("-inf")).softmax(-1) @ v


def norm_of_transformers(x: Any, weight: Any, eps: float) -> Any:
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


BEGINNERS: list[tuple[str, Any]] = [
    ("rms_norm", norm_of_transformers),
    ("attention", attention_of_a_beginner),
    ("attention", lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ("cross_entropy", lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels)),
    ("swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", BEGINNERS, ids=lambda case: case[0])
def test_what_a_beginner_writes_passes_at_the_first_level(case: tuple[str, Any], dtype: str) -> None:
    report = check_op(*case, dtype=dtype, level="basic", isolate=False, max_examples=10, shrink=False)
    assert report.verdict == "holds", str(report)
    basic, contract, hostile = report.levels
    assert (basic.verdict, basic.counts, contract.counts, hostile.counts) == ("holds", True, False, False)
    assert basic.examples >= 2
    dead = {"rms_norm": 1.02, "attention": 1.05, "cross_entropy": 1.1, "swiglu": 1.02}[case[0]]
    wrong = check_op(case[0], lambda *x: case[1](*x) * dead, dtype=dtype, level="basic", shrink=False, **NOW)
    assert wrong.verdict == "fails"


def test_a_textbook_triton_kernel_passes_at_the_first_level() -> None:
    pytest.importorskip("triton")
    from opcheck_triton import textbook

    report = check_op("rms_norm", textbook, level="basic", **NOW)
    assert report.verdict == "holds", str(report)


def test_levels_have_a_line_each_and_the_exit_code_counts_two() -> None:
    """It reads between the elements of an array, which no beginner is asked about."""
    from opcheck_candidates import reads_beside

    hostile = check_op("rms_norm", reads_beside, level="hostile", **NOW)
    assert (hostile.verdict, hostile.findings[0].level) == ("fails", "hostile"), str(hostile)
    report = check_op("rms_norm", reads_beside, **NOW)
    assert report.verdict == "holds", str(report)
    assert [one.level for one in report.findings] == ["hostile"]
    assert "beside it" in str(report)
    assert [line.split()[1] for line in str(report).splitlines() if line.startswith("level ")] == [
        "basic",
        "contract",
        "hostile",
    ]
    told = report.to_dict()
    assert [(one["level"], one["counts"]) for one in told["levels"]] == [
        ("basic", True),
        ("contract", True),
        ("hostile", False),
    ]
    assert told["findings"][0]["counts"] is False


def widths_of_256(x: Any, weight: Any, eps: float) -> Any:
    assert x.shape[-1] % 256 == 0, "widths that 256 divides"
    return plain.rms_norm(x, weight, eps)


def test_sizes_that_are_offered() -> None:
    report = check_op("rms_norm", widths_of_256, sizes="E%256==0", isolate=False, max_examples=20)
    assert report.verdict == "holds", str(report)
    assert report.examples > 25
    assert "holds, without E%256==0" in str(report)
    found = check_op("rms_norm", lambda *a: plain.rms_norm(*a) * 1.1, sizes="E%256==0", isolate=False, max_examples=0)
    assert found.finding.call.arguments[0].shape[-1] == 256
    for rule, sentence in (
        ("E%256", "--sizes E%256: expected an axis"),
        ("__import__('os')", "expected an axis"),
        ("Z<3", "expected an axis"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_op("rms_norm", plain.rms_norm, sizes=rule)


def test_what_is_left_out_is_never_asked() -> None:
    from refllm.opcheck.offers import find_offers

    offers = find_offers("attention", ("key_mask", "fewer_queries", "no_keys", "strides", "far_offsets"), "D<=64", "")
    asked = offers.of(corners("attention", "bfloat16"))
    assert len(asked) > 3
    for call in asked:
        q, k = call.arguments[0].shape, call.arguments[1].shape
        assert q[2] >= k[2] or dict(call.keywords).get("causal") is False
        assert q[3] <= 64
        assert {x.layout for x in call.arguments} == {"dense"}
        assert "key_mask" not in dict(call.keywords)


def test_what_is_left_out_is_not_asked_of_a_row_alone_either() -> None:
    def nothing_is_0(*given: Any, **how: Any) -> Any:
        loss = plain.cross_entropy(*given, **how)
        return torch.zeros_like(loss) if (given[1] == how.get("ignore_index", -100)).all() else loss

    asked = {"without": ("nothing_counted", "empty"), "level": "hostile", "dtype": "float32", **NOW}
    report = check_op("cross_entropy", nothing_is_0, **asked)
    assert report.verdict == "holds", str(report)
    assert check_op("cross_entropy", nothing_is_0, **(asked | {"without": ()})).property == "NaN pattern"


def by_the_stride_of_a_token(x: Any) -> Any:
    """Rows one after the other, as far apart as two tokens: but an axis of length 1 may have any stride."""
    dense = x.transpose(1, 2).contiguous()
    B, S, H, D = dense.shape
    return dense.as_strided((B * S, H, D), (dense.stride(1), D, 1)).reshape(B, S, H, D).transpose(1, 2)


@pytest.mark.parametrize("operator", ["rope", "norm_rope"])
def test_the_stride_of_one_token_says_nothing(operator: str) -> None:
    """As in Liger-Kernel 0.8.5, whose rotation of contiguous [B, H, 1, D] takes a head for the next row."""

    def wrong(*given: Any, **how: Any) -> Any:
        return getattr(plain, operator)(*map(by_the_stride_of_a_token, given[:2]), *given[2:], **how)

    report = check_op(operator, wrong, shrink=False, **NOW)
    assert (report.property, report.first.call.arguments[0].shape[2]) == ("value", 1), str(report)


def test_products_that_are_rounded_before_they_are_summed() -> None:
    """As in SGLang 0.5.23, one token against a cache: the sum is in float32, and its terms are not."""

    def narrow(q: Any, k: Any, v: Any, lengths: Any, *, scale: float | None = None) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        rows = []
        for b, n in enumerate(lengths.tolist()):
            scores = (q[b] * k[b, :, :n]).float().sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
            rows.append((scores.softmax(-1)[:, None] @ v[b, :, :n].float()).to(q.dtype))
        return torch.stack(rows)

    basic: dict[str, Any] = {"calls": corners("decode_attention", "bfloat16")[-4:], "shrink": False, **NOW}
    report = check_op("decode_attention", narrow, **basic)
    assert (report.property, report.first.call.kind) == ("value", "products between two numbers"), str(report)
    wide = check_op("decode_attention", lambda q, k, *of: narrow(q.float(), k.float(), *of).to(q.dtype), **basic)
    assert wide.verdict == "holds", str(wide)


def _eager_attention(q: Any, k: Any, v: Any, *, top: bool = False, **how: Any) -> Any:
    """Rounds q k, scaled scores, weights and result, as Transformers' eager form does. top: causal from the top."""
    S, T, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * (how.get("scale") or q.shape[-1] ** -0.5)
    if how.get("causal", True):
        later = torch.ones(S, T, dtype=torch.bool).triu(1 + (0 if top else T - S))
        scores = scores.masked_fill(later, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def _attention_call(S: int, T: int, scale: float) -> Call:
    arrays = tuple(Array((1, 2, n, 32), "bfloat16", seed=seed) for seed, n in enumerate((S, T, T)))
    first = next(c for c in corners("attention", "bfloat16") if c.kind == "plain")
    return replace(first, arguments=arrays, keywords=(("scale", scale),))


def test_eager_attention_holds_where_its_rounded_scores_choose_another_key() -> None:
    """The predicted error says nothing there, and the bits of its profile say all."""
    calls = [_attention_call(96, 96, scale) for scale in (2.0, 300.0)]
    report = check_op("attention", _eager_attention, calls=calls, **NOW)
    assert report.verdict == "holds", str(report)
    assert report.examples == len(calls)
    assert "the weights and the result" in str(report)
    wrong = check_op("attention", lambda *a, **h: _eager_attention(*a, **h) * 1.5, calls=calls[-1:], **NOW)
    assert wrong.verdict == "fails"


def test_torch_conventions() -> None:
    def from_the_top(q: Any, k: Any, v: Any, **how: Any) -> Any:
        """Causal as torch has it."""
        scores = q.double() @ k.double().transpose(-1, -2) * (how.get("scale") or q.shape[-1] ** -0.5)
        if how.get("causal", True):
            scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v.double()).to(q.dtype)

    left = {"without": ("key_mask", "return_lse", "grouped_heads", "hidden_nan", "empty"), "isolate": False}
    report = check_op("attention", from_the_top, convention="torch", max_examples=10, **left)
    assert report.verdict == "holds", str(report)
    other = check_op("attention", from_the_top, max_examples=0, **left)
    assert other.verdict == "fails"
    assert "--convention torch" in str(other)
    loss = torch.nn.functional.cross_entropy
    report = check_op("cross_entropy", loss, convention="torch", max_examples=20, isolate=False, level="hostile")
    assert report.verdict == "holds", str(report)
    eager = partial(_eager_attention, top=True)
    few = [_attention_call(16, 40, 3.0)]
    report = check_op("attention", eager, convention="torch", calls=few, max_examples=0, **left)
    assert report.verdict == "holds", str(report)  # its roundings are looked for among the keys that it sees
    assert report.examples == 1
    silu = check_op("swiglu", BEGINNERS[-1][1], policy="fused", convention="torch", **NOW)
    assert silu.verdict == "holds", str(silu)
    asked = check_op("cross_entropy", loss, max_examples=0, isolate=False)
    assert (asked.property, "--convention torch" in str(asked)) == ("result", True), str(asked)


# -- all findings ------------------------------------------------------------------------------------------------------


def wrong_twice(x: Any, weight: Any, eps: float) -> Any:
    """Columns past 1000 are 0, and no rows are too few."""
    if not x.numel():
        raise ValueError("no rows")
    y = plain.rms_norm(x, weight, eps)
    y[..., 1000:] = 0
    return y


def test_all_findings_each_made_small() -> None:
    report = check_op("rms_norm", wrong_twice, keep_going=True, isolate=False, max_examples=0)
    kinds = {(one.finding.property, one.finding.call.arguments[0].shape) for one in report.findings}
    assert {("value", (1, 1001)), ("raises", (0, 1))} <= kinds, str(report)
    assert len(report.to_dict()["findings"]) == len(report.findings)
    assert all(one.repro for one in report.findings)
    assert len(check_op("rms_norm", wrong_twice, isolate=False, max_examples=0).findings) == 1


def test_shrinking_does_not_slip_to_another_finding() -> None:
    """NaN in later keys stays that, and becomes no query without keys."""

    def textbook(q: Any, k: Any, v: Any, **how: Any) -> Any:
        s = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        return (s.masked_fill(later, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)

    only = [call for call in corners("attention", "bfloat16") if call.kind == "NaN in later keys"]
    report = check_op("attention", textbook, calls=only, level="hostile", isolate=False)
    assert (report.property, report.findings[0].level) == ("NaN pattern", "hostile")
    q, k, _ = report.finding.call.arguments
    assert q.shape[2] <= k.shape[2]


def test_a_pairing_stays_one_of_several_pairs() -> None:
    """Tables repeated for neighbours beside a rotation of halves: with one pair of dims there is no difference."""

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        half, R = cos.shape[-1], 2 * cos.shape[-1]
        cos, sin = (t.float().repeat_interleave(2, -1).unsqueeze(-3) for t in (cos, sin))
        part = x[..., :R].float()
        turned = torch.cat((-part[..., half:], part[..., :half]), -1)
        return torch.cat(((part * cos + turned * sin).to(x.dtype), x[..., R:]), -1)

    def rope(q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
        return rotated(q, cos, sin), rotated(k, cos, sin)

    report = check_op("rope", rope, without="interleaved", isolate=False, max_examples=0)
    assert report.property == "value", str(report)
    assert report.finding.call.arguments[2].shape[-1] == 2


# -- where it rounds ---------------------------------------------------------------------------------------------------


def test_a_candidate_may_round_wherever_honest_code_does_and_is_told_where() -> None:
    report = check_op("rms_norm", norm_of_transformers, without="mixed_dtypes", isolate=False, max_examples=10)
    assert report.verdict == "holds", str(report)
    assert report.rounds.startswith("twice: before the weight, and the result; up to ")
    assert "where one rounding gives 0.5" in str(report)
    named = check_op("rms_norm", norm_of_transformers, policy="fused", **NOW)
    assert named.property == "value"
    assert check_op("rms_norm", plain.rms_norm, **NOW).rounds == "once, at the end"


def test_what_lies_between_two_numbers_may_fall_to_either_side_inside_alone() -> None:
    """Subnormal x over the root of eps, of few bits: float32 moves them across a boundary, and their product with the
    weight is exact."""
    x = Array((1, 552), "bfloat16", scale=1e-39, seed=30000)
    weight = Array((552,), "bfloat16", scale=0.3, mean=1.0, seed=30002)
    only = [Call("rms_norm", "bfloat16", (x, weight, 1e-6), kind="subnormal")]
    report = check_op("rms_norm", norm_of_transformers, calls=only, **NOW)
    assert (report.verdict, "before the weight" in report.rounds) == ("holds", True), str(report)
    wrong = check_op("rms_norm", lambda *of: norm_of_transformers(*of) * 1.01, calls=only, **NOW)
    assert wrong.property == "value"


def test_the_ulp_that_are_told_are_those_of_the_format() -> None:
    """Of the output in it, and not of a log-sum-exp in float32 beside it."""

    def rounded(q: Any, k: Any, v: Any, **how: Any) -> Any:
        s = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).to(q.dtype).float()
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (s.softmax(-1) @ v.float()).to(q.dtype), s.logsumexp(-1)

    q, k, v = (Array((1, 2, 5, 8), "bfloat16", seed=seed) for seed in range(3))
    only = [Call("attention", "bfloat16", (q, k, v), (("return_lse", True),))]
    report = check_op("attention", rounded, calls=only, **NOW)
    assert report.verdict == "holds", str(report)
    assert float(report.rounds.split("up to ")[1].split(" ulp")[0]) < 20, report.rounds


def test_every_mutant_is_a_defect_or_a_place_and_a_place_is_told() -> None:
    from refllm.kernels.mutants import catalogue

    places = [m for m in catalogue(form="torch") if m.place]
    assert len(places) >= 6
    for mutant in places:
        report = check_op(mutant.operator, mutant.function(), shrink=False, level="basic", **NOW)
        assert report.verdict == "holds", str(report)
        assert mutant.place in report.rounds or mutant.operator == "attention", (mutant.slug, report.rounds)
        assert check_op(mutant.operator, mutant.function(), policy="fused", shrink=False, **NOW).verdict == "fails"


# -- real tensors ------------------------------------------------------------------------------------------------------


def test_a_call_that_was_dumped(tmp_path: Path, monkeypatch: Any) -> None:
    from opcheck_tools import command
    from safetensors.torch import save_file

    from refllm.check import check_dumped

    torch.manual_seed(0)
    x, weight = torch.randn(5, 33, dtype=torch.bfloat16), torch.randn(33, dtype=torch.bfloat16)
    y = plain.rms_norm(x, weight, 1e-6)
    file = tmp_path / "call.safetensors"
    save_file({"x": x, "weight": weight, "y": y}, file, {"eps": "1e-6"})
    assert check_dumped("rms_norm", file, output="y").verdict == "holds"
    words = ["rms_norm", "--inputs", str(file)]
    assert command(monkeypatch, *words, "--output", "y") == 0
    assert command(monkeypatch, *words, "--candidate", "refllm.kernels.plain:rms_norm") == 0
    assert command(monkeypatch, *words, "--output", "y", "--value", "eps=1") == 1
    assert command(monkeypatch, *words) == 2
    wrong = y.clone()
    wrong[3, 4] *= 1.1
    save_file({"x": x, "weight": weight, "y": wrong}, file)
    report = check_dumped("rms_norm", file, output="y", values={"eps": 1e-6})
    assert (report.property, report.finding.judgement.worst) == ("value", (3, 4)), str(report)
    for given, sentence in (
        ({"output": "z"}, "z: expected the arguments of rms_norm"),
        ({"output": "y"}, "eps is missing"),
        ({"candidate": plain.rms_norm, "output": "y", "values": {"eps": 1e-6}}, "name a candidate"),
        ({"output": "y", "values": {"epsilon": 1e-6}}, "epsilon: expected the arguments"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_dumped("rms_norm", file, **given)
    with pytest.raises(InputError, match="cannot be read as tensors"):
        check_dumped("rms_norm", tmp_path / "nothing", output="y")


# -- where a candidate of many possible profiles rounds ----------------------------------------------------------------


def test_every_profile_of_many_holds_and_what_is_far_off_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is far off is told at once, by its size beside the error of eager code; nobody who rounds is told so."""
    call = next(call for call in corners("attention", "bfloat16") if call.kind == "fewer queries than keys")
    arguments, keywords = call.arrays()
    given, expected = contract_of("attention").bound(arguments, keywords), remembered(call, "fused")

    def judged(values: list[np.ndarray]) -> tuple[bool, bool]:
        """Whether they hold by the policy, and by any profile."""
        results = tuple(Result(on_grid(value, "bfloat16"), value.shape, "bfloat16", "cpu") for value in values)
        first = [judge(result.value, e) for result, e in zip(results, expected, strict=True)]
        found = Roundings("fused").judged(call, arguments, keywords, results, expected, first)
        return all(j.holds for j in first), all(j.holds for j in found)

    way = roundings._WAYS["attention"][0]
    made = [judged(way(Evaluated(given, "bfloat16", points))) for points in profiles("attention")[::12]]
    assert [by_any for _, by_any in made] == [True] * len(made)
    assert (False, True) in made  # some need a profile of their own
    monkeypatch.setattr(roundings, "_under", lambda *_: pytest.fail("it was compared"))
    assert judged([e.exact * 1.2 for e in expected]) == (False, False)
