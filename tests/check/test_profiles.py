"""Right ports hold wherever they round, and say so; a mistake on top of any of them is named first."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from refllm import golden
from refllm.accuracy.forms import on_grid
from refllm.accuracy.measure import measure
from refllm.accuracy.parts import ONE_BY_ONE, Parts, possible
from refllm.accuracy.profiled import Profiled
from refllm.accuracy.profiles import DEFECTS, Profile, in_words
from refllm.accuracy.propagation import ONE_CHAIN, Uncertain, certain
from refllm.accuracy.recognise import Made, Recogniser
from refllm.check import html
from refllm.check.api import compare
from refllm.check.asked import Asked
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.chosen_embeddings import chosen
from refllm.check.inputs import Inputs
from refllm.check.oracle import Report, TapReport, judge
from refllm.check.report import show_report
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.models.auto import load
from refllm.mutants.honest import FUSED, HF, Honest
from refllm.mutants.profiles import Port
from refllm.precision import FUSED as FUSED_POLICY
from refllm.precision import HF_EAGER, Policy, rounding

FOLDERS = {name: Path(path) for name, path in golden.checkpoints().items()}
LLAMA, STABLE, STABLE_TWO, HELIUM, ARCEE = (
    "llama-tiny",
    "stablelm-tiny-parallel",
    "stablelm-tiny-sequential",
    "helium-tiny",
    "arcee-tiny",
)
TOKENS = 61


@functools.cache
def model_of(name: str, dtype: str) -> Model:
    return load(FOLDERS[name], head="causal_lm", dtype=dtype)


def run(
    name: str, how: Honest, dtype: str, asked: Asked | Policy | None = None, first: int = 0, tokens: int = TOKENS
) -> Report:
    """The report on a port. first: the position of the first token."""
    model = model_of(name, dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    inputs = Inputs(ids, None, np.arange(first, first + tokens)[None])
    return judge(model, record(Port(how, FOLDERS[name], dtype), model, inputs), asked)


def told(report: Report) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(show_report(report))
    return captured.get()


def tap(report: Report, name: str) -> TapReport:
    return next(tap for tap in report.taps if tap.name == name)


# --------------------------------------------------------------------------------------------------- right ports hold

RIGHT = {  # each with a checkpoint and a format: all families and formats have their turn
    "as Transformers": (HF, LLAMA, "bfloat16", ()),
    "float32 inside": (FUSED, HELIUM, "float16", ("attention: float32 inside",)),
    "float32 SwiGLU": (HF.but(act="once"), LLAMA, "bfloat16", ("glu: float32 inside (Transformers: ",)),
    "float32 rotation": (HF.but(rotation="float32"), STABLE_TWO, "bfloat16", ("rope: float32 inside (Transformers: ",)),
    "norms once": (HF.but(norm="once"), ARCEE, "bfloat16", ("rms_norm: once (Transformers: twice",)),
    "float32 stream": (HF.but(stream="float32"), LLAMA, "bfloat16", ("read unrounded",)),
    "float32 stream, parallel": (HF.but(stream="float32"), STABLE, "float16", ("read unrounded",)),
    "sums shown rounded": (FUSED.but(stream="read unrounded"), ARCEE, "bfloat16", ("read unrounded",)),
    "attention and MLP first": (HF.but(stream="together"), STABLE, "bfloat16", ("attention and MLP added first",)),
    "float32 head": (FUSED.but(head="float32"), LLAMA, "float16", ("linear (lm_head): not at all",)),
    "scale folded into q": (HF.but(attention="scale in q"), ARCEE, "float16", ()),
    "scale rounded": (FUSED.but(attention="scale rounded"), STABLE, "bfloat16", ("attention: rounds the scale",)),
    "one kernel for attention": (HF.but(attention="sdpa"), HELIUM, "bfloat16", ()),
    "exact tables": (FUSED.but(tables="exact"), LLAMA, "float32", ("rope (tables): exact tables",)),
    "exp2": (FUSED.but(tables="exp2"), HELIUM, "float32", ("float32 ulp of the exact frequencies",)),
    "one chain": (FUSED.but(sums="chain", tables="products"), STABLE_TWO, "float32", ()),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_port_holds_and_says_where_it_rounds(case: str) -> None:
    how, checkpoint, dtype, words = RIGHT[case]
    report = run(checkpoint, how, dtype)
    said = "\n".join(str(habit) for habit in report.habits)
    assert report.verdict in ("holds", "incomplete"), told(report)
    assert not report.unsaid
    assert not any(tap.broken for tap in report.taps)
    assert [word for word in words if word not in said] == []
    assert all(habit in " ".join(told(report).split()) for habit in words)
    # The sigma is that of its own profile: not only below a limit.
    found = [tap.isolated.ratio for tap in report.taps if tap.isolated and tap.isolated.ratio > 0.01]
    assert 0.55 < min(found) <= max(found) < 1.3


@pytest.mark.parametrize("case", ["exact tables", "exp2"])
def test_far_positions_hold_with_better_tables_than_those_of_transformers(case: str) -> None:
    how, checkpoint, dtype, _ = RIGHT[case]
    report = run(checkpoint, how, dtype, first=30000)
    assert not any(tap.broken for tap in report.taps), told(report)


@pytest.mark.parametrize(("dtype", "first", "tokens"), [("bfloat16", 0, 8), ("float16", 0, 8), ("bfloat16", 4000, 40)])
def test_the_sigma_of_a_narrow_rotation_is_right_at_small_positions_too(dtype: str, first: int, tokens: int) -> None:
    """There many tables round to 1, whose products are not rounded at all: it was 0.6 of what was predicted."""
    report = run(LLAMA, HF, dtype, first=first, tokens=tokens)
    found = [t.isolated.ratio for t in report.taps if t.isolated and t.name.endswith("_rope")]
    assert 0.75 < min(found) <= max(found) < 1.25  # few tables of few tokens: by chance
    assert 0.93 < sum(found) / len(found) < 1.07


@pytest.mark.parametrize("name", [LLAMA, STABLE])
def test_the_sigma_of_float32_is_right_in_a_short_run_too(name: str) -> None:
    """At position 0 nothing is turned, and a key that is alone has the weight 1: it was 0.68 of what was predicted."""
    reports = [run(name, HF, "float32", tokens=tokens) for tokens in (5, 6, 7)]
    for end in ("q_rope", "k_rope", "context"):
        found = [t.isolated.ratio for r in reports for t in r.taps if t.isolated and t.name.endswith(end)]
        assert 0.75 < float(np.sqrt(np.mean(np.square(found)))) < 1.1, end


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_value_that_is_not_rounded_is_judged_by_the_error_of_float32(dtype: str) -> None:
    head = tap(run(LLAMA, FUSED.but(head="float32"), dtype), "lm_head")
    assert head.isolated is not None
    assert (head.dtype, head.verdict) == ("float32", "holds")
    assert 0.85 < head.isolated.ratio < 1.15  # 0.00 of the format's sigma, 0.36 of a float32 sum of any numbers
    assert tap(run(LLAMA, FUSED, dtype), "lm_head").dtype == dtype


@pytest.mark.parametrize("tables", ["torch", "exact"])
def test_tables_that_are_not_shown_are_those_that_explain_the_logits(tables: str) -> None:
    """Were their error only allowed for, every error in float32 would be small beside it."""
    report = run(LLAMA, FUSED.but(tables=tables, names=()), "float32", first=4000)
    assert report.verdict == "holds", told(report)
    assert 0.7 < report.taps[-1].end_to_end.ratio < 1.3


def test_a_stream_read_unrounded_holds_though_its_terms_are_not_shown() -> None:
    shown = ("residual_mid", "layernorm", "layers.0", "layers.1", "layers.2", "norm")
    report = run(LLAMA, FUSED.but(stream="float32", names=shown), "bfloat16")
    assert not any(tap.broken for tap in report.taps), told(report)
    assert not report.unsaid


@pytest.mark.parametrize(("name", "dtype"), [(LLAMA, "bfloat16"), (ARCEE, "float16")])
def test_a_norm_that_is_not_shown_may_read_its_sum_unrounded(name: str, dtype: str) -> None:
    """The products after it have other bits then, from the second layer on: a matter of what was hidden, no defect."""
    fast = ReferenceCandidate.fast(FOLDERS[name], head="causal_lm", dtype=dtype, backend="torch")
    model = model_of(name, dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, TOKENS))
    report = judge(model, record(fast, model, Inputs(ids)))
    assert report.verdict == "holds", told(report)


def test_only_a_named_policy_makes_a_habit_a_finding() -> None:
    report = run(LLAMA, HF.but(act="once"), "bfloat16", HF_EAGER)
    first = report.first_failure
    assert first is not None
    assert (first.name, first.cause) == ("model.layers.0.mlp.act", "place")
    assert "right, but not rounded where policy hf-eager says: float32 inside" in told(report)
    assert run(LLAMA, HF, "bfloat16", HF_EAGER).first_failure is None


@pytest.mark.parametrize("policy", [None, "hf-eager"])
def test_one_default_whoever_asks(policy: str | None) -> None:
    """As a function or by its name; in Python or on the command line."""
    from refllm.check.run import Settings

    ids, how = list(range(5, 50)), HF.but(act="once", norm="once")
    function = compare(FOLDERS[LLAMA], how.in_dtype("bfloat16"), dtype="bfloat16", input_ids=ids, policy=policy)[0]
    assert (function.verdict == "fails") is (policy is not None)
    assert Settings("port.py:forward", policy=policy).rounding == Asked(HF_EAGER if policy else None)
    assert function.policy == policy


# -------------------------------------------------------------------------------------------------- mistakes are named


def at(operator: str, change: Callable[[dict[str, Any]], None], layer: int = 1) -> Callable[..., None]:
    def plant(where: str, index: int, arguments: dict[str, Any]) -> None:
        if (where, index) == (operator, layer):
            change(arguments)

    return plant


def put(**changes: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda a: a.update({name: change(a[name]) for name, change in changes.items()})


def narrow(x: Any) -> Any:
    return x.to(torch.bfloat16).to(x.dtype)


def swapped(a: dict[str, Any]) -> None:
    a["gate"], a["up"] = a["up"], a["gate"]


PLANTED: dict[str, tuple[Callable[..., None], str, str]] = {
    "swapped": (at("act", swapped), "mlp.act", "gate and up are swapped"),
    "root rounded": (
        at("input_layernorm", put(narrow=lambda _: narrow)),
        "input_layernorm",
        "1 / root, which a row shares",
    ),
    "eps times 10": (at("input_layernorm", put(eps=lambda eps: eps * 10)), "input_layernorm", "eps is 10 times"),
    "factor": (at("o_proj", put(w=lambda w: w * 1.01)), "self_attn.o_proj", "on its own inputs"),
    "scale": (at("attention", put(scale=lambda s: s * 0.99)), "self_attn.context", "on its own inputs"),
    "v rounded once more": (
        at("attention", put(v=lambda v: (v * 0.7).to(v.dtype) / 0.7)),
        "self_attn.context",
        "it rounds as no honest code does",
    ),
    "positions": (
        at("q_rope", put(cos=lambda t: t.roll(-1, 1), sin=lambda t: t.roll(-1, 1))),
        "self_attn.q_rope",
        "on its own inputs",
    ),
    "hidden rounding": (
        at("act", put(up=lambda u: (u * 0.7).to(u.dtype) / 0.7)),
        "mlp.act",
        "it rounds as no honest code does",
    ),
}
PLACES = {
    "v rounded once more": (HF.but(rotation="float32"), STABLE, "bfloat16"),
    "swapped": (HF.but(act="once"), LLAMA, "bfloat16"),
    "root rounded": (FUSED, LLAMA, "bfloat16"),
    "eps times 10": (HF.but(norm="once"), LLAMA, "bfloat16"),
    "factor": (FUSED.but(stream="read unrounded"), ARCEE, "bfloat16"),
    "scale": (HF.but(stream="float32"), STABLE, "bfloat16"),
    "positions": (FUSED.but(tables="exact"), HELIUM, "float32"),
    "hidden rounding": (HF.but(stream="float32"), HELIUM, "bfloat16"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_on_top_of_a_habit_is_named_first(mistake: str) -> None:
    plant, value, words = PLANTED[mistake]
    how, checkpoint, dtype = PLACES[mistake]
    report = run(checkpoint, how.but(plant=plant), dtype)
    first, text = report.first_failure, told(report)
    assert first is not None
    assert (first.name, first.cause) == (f"model.layers.1.{value}", "defect"), text
    assert f"model.layers.1.{value} (" in text.split("\n")[1]
    assert words in text.split("\n")[2]
    assert "the error has a sign" not in text or not first.named
    if "rounds  " in text:  # the habits come after it
        assert text.index("rounds  ") > text.index(words)
    assert all(tap.cause != "defect" for tap in report.taps if tap is not first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_row_shares_is_named_where_everything_is_computed_in_the_format(dtype: str) -> None:
    """Code without a cast, as it is written first."""
    rng, places = np.random.default_rng(0), np.argwhere(np.ones((1, 48)))

    def recognised(operator: str, arrays: tuple[Any, ...], how: dict[str, Any], y: Any) -> str:
        made = Made(operator, tuple(certain(a.double().numpy()) for a in arrays), how)
        return Recogniser(dtype, places)(made, y.float().numpy()).defect

    x, q, k, v = (torch.from_numpy(rng.normal(size=s)).to(getattr(torch, dtype))
                  for s in ((1, 48, 80), (1, 4, 48, 24), (1, 4, 48, 24), (1, 4, 48, 24)))  # fmt: skip
    weight = torch.from_numpy(1 + 0.1 * rng.normal(size=80)).to(x.dtype)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * weight
    how = {"weight": weight.double().numpy(), "eps": 1e-3}
    assert recognised("rms_norm", (x,), how, y) == "everything that a row shares is rounded (narrow statistics)"
    s = (q @ k.mT * 24**-0.5).masked_fill(~torch.ones(48, 48, dtype=torch.bool).tril(), -torch.inf)
    e = (s - s.amax(-1, keepdim=True)).exp()
    o = (e / e.sum(-1, keepdim=True)) @ v
    words = "the denominator of the softmax, which a row shares, is rounded"
    assert recognised("attention", (q, k, v), {"scale": 24**-0.5, "key_mask": None}, o) == words
    e = (s.float() - s.float().amax(-1, keepdim=True)).exp()
    o = (e / e.sum(-1, keepdim=True)).to(q.dtype) @ v
    assert recognised("attention", (q, k, v), {"scale": 24**-0.5, "key_mask": None}, o) == ""


def test_a_long_product_in_float16_is_recognised_in_any_order_of_its_sums() -> None:
    """What is left of 8192 terms that cancel: float32 sums in one chain move 2 % of the elements across a boundary."""
    rng, K = np.random.default_rng(0), 8192
    x, w = on_grid(rng.normal(size=(64, K)), "float16"), rng.normal(size=(64, K)) / K**0.5
    w = on_grid(w - 0.7 * (w @ x.T) @ np.linalg.solve(x @ x.T, x), "float16")
    xt, wt = (torch.from_numpy(a).float() for a in (x, w))
    chain = torch.zeros(64, 64)
    for k in range(K):
        chain = torch.addcmul(chain, xt[:, k, None], wt[:, k])
    recogniser = Recogniser("float16", np.argwhere(np.ones((1, 64))))
    hidden = torch.from_numpy(x @ (on_grid(0.7 * w, "float16") / 0.7).T)
    for y, right in ((chain, True), (xt @ wt.T, True), (hidden, False)):
        made = Made("linear", (certain(x[None]),), {"weight": w, "bias": None})
        found = recogniser(made, y.half().double().numpy()[None])
        assert found.asked
        assert bool(found.fits) is right, found.mismatch
        assert not found.defect
        assert not found.shared or not right


def test_a_mistake_comes_before_habits_under_a_named_policy_too() -> None:
    report = run(LLAMA, HF.but(act="once", plant=PLANTED["swapped"][0]), "bfloat16", HF_EAGER)
    assert report.first_failure is tap(report, "model.layers.1.mlp.act")
    assert "rounded elsewhere than hf-eager:" in told(report)


def test_another_honest_profile_in_one_layer_is_a_finding() -> None:
    report = run(LLAMA, HF.but(plant=at("act", lambda a: a.update(kind="once"))), "bfloat16")
    assert tap(report, "model.layers.1.mlp.act").another == "float32 inside"
    assert "it rounds otherwise than in the other layers" in told(report)


def test_values_that_are_not_shown_make_a_span() -> None:
    shown = ("layers.0", "layers.1", "layers.2", "lm_head")
    report = run(LLAMA, FUSED.but(names=shown, plant=PLANTED["swapped"][0]), "bfloat16")
    assert "between layer 0 output and layer 1 output; 14 values not shown" in told(report)


# ---------------------------------------------------------------------------------------------- on purpose, or not so


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_split_products_are_recognised_and_hold_where_they_were_said(parts: int) -> None:
    how = HF.but(splits=parts)
    report = run(LLAMA, how, "bfloat16")
    assert report.verdict == "incomplete"
    assert report.unsaid == [
        f"o_proj, down_proj: products of {parts} parts, each rounded; say --splits {parts} if that is meant"
    ]
    assert not run(LLAMA, how, "bfloat16", Asked(splits=parts)).unsaid
    assert run(LLAMA, HF, "bfloat16", Asked(splits=parts)).verdict == run(LLAMA, HF, "bfloat16").verdict


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        (ARCEE, HF.but(splits=2, biased=True), "2 parts, each rounded, added one after another, the bias in the first"),
        (ARCEE, HF.but(splits=3, tile=32), "3 parts, each rounded, added one after another, cut at multiples of 32"),
        (
            HELIUM,
            HF.but(splits=3, biased=True),
            "3 parts, each rounded, added one after another, the bias in the first",
        ),
    ],
)
def test_a_bias_in_the_first_part_and_parts_that_differ_in_size_are_recognised(
    name: str, how: Honest, said: str
) -> None:
    report = run(name, how, "bfloat16", Asked(splits=how.splits))
    assert not any(tap.broken for tap in report.taps), told(report)
    assert report.verdict == "holds", report.unsaid
    assert any(said in str(habit) for habit in report.habits), report.habits
    assert f"say --splits {how.splits}" in run(name, how, "bfloat16").unsaid[0]
    first = run(name, how, "bfloat16", HF_EAGER).first_failure
    assert first is not None
    assert (first.name, first.cause) == ("model.layers.0.self_attn.o_proj", "place")


@pytest.mark.parametrize("terms", [10, 80, 4096])
def test_every_way_to_cut_a_row_covers_it_once(terms: int) -> None:
    every = possible(terms, True, (2, 3, 4, 7))
    for parts in every:
        cuts = [np.arange(terms)[cut] for cut in parts.cuts(terms)]
        assert len(cuts) == parts.count
        assert np.array_equal(np.concatenate(cuts), np.arange(terms))
    assert len({(parts.cuts(terms)[0].stop, parts) for parts in every}) == len(every)
    assert Parts(4, ONE_BY_ONE).cuts(10) == (slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10))
    assert Parts(4, ONE_BY_ONE, tile=1).cuts(10) == (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10))


def test_tf32_is_recognised_and_holds_where_it_was_said() -> None:
    how = FUSED.but(tf32=True)
    report = run(LLAMA, how, "float32")
    assert not any(tap.broken for tap in report.taps), told(report)
    assert "TF32" in report.unsaid[0]
    assert not run(LLAMA, how, "float32", Asked(tf32=True)).unsaid
    with pytest.raises(InputError, match="--splits 0"):
        Asked(splits=0)


def test_words_of_profiles() -> None:
    assert in_words("rms_norm", Profile()) == "once"
    assert in_words("glu", Profile(frozenset({"activation"}))) == "twice: the activation, and the result"
    assert all(points for known in DEFECTS.values() for points in known)


def test_an_unknown_place_in_every_layer_is_incomplete_and_in_one_layer_wrong() -> None:
    def rounded_first(where: str, index: int, a: dict[str, Any]) -> None:
        if where == "act":
            a["up"] = (a["up"] * 0.7).to(a["up"].dtype) / 0.7

    report = run(HELIUM, HF.but(plant=rounded_first), "bfloat16")
    assert report.first_failure is None
    assert report.unsaid == [
        "act: rounds in a place that is not known, in every layer; judged by the largest error of honest code"
    ]
    assert report.verdict == "incomplete"


# -------------------------------------------------------------------------------------------------- overflow, any order


def test_an_overflow_is_named_and_what_reads_it_is_not_accused(tmp_path: Path) -> None:
    """Stock code in float16, with weights that make one product pass 65504."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(FOLDERS[LLAMA], tmp_path / "large")
    file = next((tmp_path / "large").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2e5 / 20
    save_file(tensors, file, {"format": "pt"})
    model = load(tmp_path / "large", head="causal_lm", dtype="float16")
    inputs = Inputs(np.random.default_rng(0).integers(0, 640, (1, 30)))
    report = judge(model, record(Port(HF, tmp_path / "large", "float16"), model, inputs), HF_EAGER)
    first = report.first_failure
    assert first is not None
    assert first.name == "model.layers.1.mlp.down_proj"
    assert "past 65504, the largest number of float16" in told(report)
    assert {tap.cause for tap in report.taps if tap is not first} == {"", "consequence"}


def test_a_layer_norm_in_one_float32_chain_holds_and_a_wrong_one_does_not() -> None:
    """Its error is that of n additions, which is twice that of sums in blocks."""
    rng = np.random.default_rng(2)
    n, weight, bias = 4096, rng.standard_normal(4096) + 2, rng.standard_normal(4096)
    x = Uncertain(np.float64(np.float32(rng.standard_normal((1, 16, n)) + 0.5)), np.zeros((1, 16, n), np.float32))
    made = Made("layer_norm", (x,), {"weight": weight, "bias": bias, "eps": 1e-5})
    op = Profiled("float32", FUSED_POLICY, lambda _, value: value, lambda _: True, lambda *_: x, bits=False)

    def normed(n_minus: int = 0) -> np.ndarray:
        a = x.value.astype(np.float32)
        centred = a - np.cumsum(a, axis=-1, dtype=np.float32)[..., -1:] / np.float32(n)
        squares = np.cumsum(centred * centred, axis=-1, dtype=np.float32)[..., -1:]
        scale = 1 / np.sqrt(squares / np.float32(n - n_minus) + np.float32(1e-5))
        return (centred * scale * weight.astype(np.float32) + bias.astype(np.float32)).astype(np.float64)

    in_blocks, in_one_chain = (op.under(made, Profile(order=order)) for order in ("", ONE_CHAIN))
    ratios = [measure(normed()[0], u.value[0], u.variance[0]).ratio for u in (in_blocks, in_one_chain)]
    assert ratios[0] > 1.8 > 1.3 > ratios[1] > 0.3
    assert measure(normed(1)[0], in_one_chain.value[0], in_one_chain.variance[0]).ratio > 5


def in_one_pass(a: dict[str, Any]) -> None:
    read: list[Any] = []

    def mean_of(x: Any) -> Any:
        read.append(x)
        mean = read[0].mean(-1, keepdim=True)
        return mean if len(read) == 1 else (read[0] * read[0]).mean(-1, keepdim=True) - mean * mean

    a["mean"] = mean_of


@pytest.mark.parametrize("mean", [0.5, 20.0])
def test_a_variance_in_one_pass_is_honest_until_the_means_are_large(mean: float, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(FOLDERS[STABLE_TWO], tmp_path / "shifted")
    file = next((tmp_path / "shifted").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] += mean * tensors["model.embed_tokens.weight"].std()
    save_file(tensors, file, {"format": "pt"})

    model = load(tmp_path / "shifted", head="causal_lm", dtype="float32")
    inputs = Inputs(np.random.default_rng(0).integers(0, 640, (1, 30)))
    for plant in (None, at("input_layernorm", in_one_pass, layer=0)):
        report = judge(model, record(Port(FUSED.but(plant=plant), tmp_path / "shifted", "float32"), model, inputs))
        first = report.first_failure
        assert (first is None) is (plant is None or mean < 3), told(report)
        if first is not None:
            assert first.name == "model.layers.0.input_layernorm"
            assert "E x^2 - (E x)^2, which cancels: the mean of a row is 2" in " ".join(told(report).split())


@pytest.mark.parametrize("layer", [1, -1])
def test_a_small_stream_at_every_norm_shows_an_eps_that_no_token_shows(layer: int) -> None:
    """Right code holds there; eps is 1e-5, and the stream of later layers has a mean square of 10."""
    model, folder = model_of(LLAMA, "bfloat16"), FOLDERS[LLAMA]
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, TOKENS))
    (inputs,) = chosen(model, ids)
    where = "input_layernorm" if layer > 0 else "norm"
    plant = at(where, put(eps=lambda eps: eps * 4), layer)
    for how, given, found in ((FUSED, inputs, ""), (FUSED.but(plant=plant), inputs, where)):
        report = judge(model, record(Port(how, folder, "bfloat16"), model, given))
        first = report.first_failure
        assert ("" if first is None else first.name.rpartition(".")[2]) == found, told(report)
    if layer < 0:
        assert run(LLAMA, FUSED.but(plant=plant), "bfloat16").verdict == "holds"


def test_what_no_scale_makes_small_is_left_out_and_a_layer_norm_gets_rows_with_a_mean() -> None:
    """The layers of this Helium add biases."""
    assert chosen(model_of(HELIUM, "bfloat16"), np.arange(9)[None]) == []
    (inputs,) = chosen(model_of(STABLE, "bfloat16"), np.arange(9)[None])
    assert inputs.embeds is not None
    assert (inputs.embeds.mean(axis=-1) > 3 * inputs.embeds.std(axis=-1)).all()
    assert np.array_equal(rounding("bfloat16")(inputs.embeds), inputs.embeds)


def test_a_variance_in_one_pass_shows_in_embeddings_with_a_large_mean() -> None:
    model = model_of(STABLE, "float32")
    (inputs,) = chosen(model, np.arange(9)[None])
    for plant in (None, at("input_layernorm", in_one_pass, layer=0)):
        trace = record(Port(FUSED.but(plant=plant), FOLDERS[STABLE], "float32"), model, inputs)
        assert ("which cancels" in told(judge(model, trace))) is (plant is not None)


# ------------------------------------------------------------------------------------------------------- in the reports


def test_every_form_of_the_report_has_the_profile() -> None:
    report = run(LLAMA, HF.but(act="once"), "bfloat16")
    words = "glu: float32 inside (Transformers: twice: the activation, and the result)"
    assert words in report.to_dict()["habits"]
    assert words in html.render([report])
    assert words in " ".join(told(report).split())
    assert "as Transformers: rms_norm, linear, rope, attention, add" in " ".join(told(report).split())


def test_hints_say_what_helps_and_nothing_else() -> None:
    plant = PLANTED["v rounded once more"][0]
    assert "is about sqrt(2): one rounding too many" in told(run(LLAMA, FUSED.but(plant=plant), "bfloat16"))
    heads = at("attention", put(v=lambda v: v.roll(1, 1)))
    assert "sees itself alone, is wrong too: look at v" in told(run(LLAMA, FUSED.but(plant=heads), "bfloat16"))
    scaled = at("attention", put(scale=lambda s: 0.4 * s))
    assert "sees itself alone, is right: look at the scores" in told(run(LLAMA, FUSED.but(plant=scaled), "bfloat16"))
    report = run(LLAMA, FUSED.but(plant=PLANTED["factor"][0]), "bfloat16")
    wrong = tap(report, "model.layers.1.self_attn.o_proj")
    assert wrong.zmap is not None
    wrong.zmap[...] = 0
    wrong.zmap[:, ::2] = 100  # in every other block of channels: no range is worth a word
    assert "only part of it" not in told(report)
    wrong.zmap[:, ::2] = 0
    wrong.zmap[:, -1] = 100
    assert "only part of it is wrong: channel" in told(report)
