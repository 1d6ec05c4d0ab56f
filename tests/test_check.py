"""The check: its rules hold for honest rounding, reject what is wrong, and say so where they could not tell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.check import tolerance
from refllm.check.compare import Report, compare_next_tokens, compare_tap, undetected
from refllm.check.report import closing_line, show_report, show_summary
from refllm.check.taps import hidden_taps
from refllm.json_text import json_text
from refllm.precision import rounding

pytestmark = pytest.mark.filterwarnings("ignore:.*factor=20")  # arcee-tiny has such a config, as AFM-4.5B does

ROWS, WIDTH = 64, 48


def exact_values(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, rows, WIDTH))


def honest(exact: np.ndarray, seed: int, dtype: str = "bfloat16") -> np.ndarray:
    """The exact values with the error of a few roundings to `dtype`, then rounded."""
    noise = np.random.default_rng(seed).normal(size=exact.shape)
    return rounding(dtype)((exact * (1 + tolerance.UNIT_ROUNDOFF[dtype] * noise)).astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "float16"]))
@settings(max_examples=200)
def test_another_honest_rounding_holds(seed: int, dtype: str) -> None:
    exact = exact_values(seed)
    tap = compare_tap("lm_head", exact, honest(exact, seed + 1, dtype), honest(exact, seed + 2, dtype))
    assert tap.verdict == "holds", tap.reasons


WRONG = {
    "zeros": lambda x: np.zeros_like(x),
    "times 1.01": lambda x: x * 1.01,
    "positions shifted": lambda x: np.roll(x, 1, axis=1),
    "transposed positions": lambda x: x[:, ::-1],
    "the mean": lambda x: np.full_like(x, x.mean()),
    "one position zero": lambda x: x * (np.arange(x.shape[1]) != 5)[:, None],
    "one tile of channels zero": lambda x: x * (np.arange(x.shape[2]) >= 8),
    "a few channels exchanged": lambda x: x[..., [1, 0, *range(2, x.shape[2])]],
    "one position off by 5 %": lambda x: x * (1 + 0.05 * (np.arange(x.shape[1]) == 5)[:, None]),
    "one NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, np.nan, x),
    "one infinity": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, np.inf, x),
    "last position missing": lambda x: x[:, :-1],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answer_fails(kind: str, dtype: str) -> None:
    exact = exact_values(0)
    wrong = WRONG[kind](honest(exact, 2, dtype))
    assert compare_tap("model.norm", exact, honest(exact, 1, dtype), wrong).verdict == "fails"


def test_an_answer_that_the_rules_could_not_reject_is_untested() -> None:
    """Equal positions: shifting them changes nothing, so agreement says nothing about their order."""
    exact = np.broadcast_to(exact_values(0)[:, :1], (1, ROWS, WIDTH)).copy()
    run = honest(exact[:, :1], 1) + np.zeros_like(exact)
    tap = compare_tap("model.norm", exact, run, run)
    assert tap.verdict == "untested"
    assert tap.reasons == ["positions shifted by one would pass"]


def test_a_yardstick_too_coarse_to_see_a_factor_is_untested() -> None:
    exact = exact_values(0, rows=4)
    coarse = exact * (1 + 0.05 * np.random.default_rng(1).normal(size=exact.shape))
    assert "times 1.01" in undetected(exact, coarse)


@given(st.integers(1, 60).filter(lambda exponent: exponent != 24))
@settings(max_examples=20)
def test_exact_reproduction_by_the_yardstick_allows_one_float32_rounding_only(exponent: int) -> None:
    exact = exact_values(3)
    off = exact * (1 + 2.0**-exponent)
    tap = compare_tap("model.embed_tokens", exact, exact, off)
    assert (tap.verdict == "holds") == (exponent > 24)


def test_overflow_at_the_yardsticks_places_is_no_finding() -> None:
    exact = exact_values(0)
    run = honest(exact, 1, "float16")
    run[0, 3, 7] = np.inf
    assert compare_tap("model.norm", exact, run, run).verdict == "holds"
    elsewhere = np.roll(run, 1, axis=2)
    tap = compare_tap("model.norm", exact, run, elsewhere)
    assert (tap.verdict, tap.reasons, tap.at) == ("fails", ["finite"], (0, 3, 7))


@pytest.mark.parametrize(("factor", "verdict"), [(1.7, "holds"), (2.5, "fails")])
def test_error_of_more_than_twice_the_rounding_fails_wherever_it_is(factor: float, verdict: str) -> None:
    exact = exact_values(0)
    noise = np.random.default_rng(1).normal(size=exact.shape) * 0.002
    other = np.random.default_rng(2).normal(size=exact.shape) * 0.002
    tap = compare_tap("model.norm", exact, exact + noise, exact + factor * other)
    assert tap.verdict == verdict
    assert tap.reasons == ([] if verdict == "holds" else ["error"])
    assert tap.ratio == pytest.approx(factor, rel=0.05)


def test_failure_names_the_worst_place() -> None:
    exact = exact_values(0)
    run = honest(exact, 1)
    wrong = run.copy()
    wrong[0, 17, 31] += 10
    tap = compare_tap("model.layers.0", exact, run, wrong)
    assert tap.at == (0, 17, 31)
    assert tap.max_error == pytest.approx(10, abs=0.1)
    assert tap.differing == 1


def test_flip_of_close_logits_is_explained_and_of_distant_ones_is_not() -> None:
    exact = np.zeros((1, 2, 5))
    exact[0, :, 0], exact[0, :, 1] = 10.0, 9.99
    yardstick = exact + 0.01 * np.random.default_rng(0).normal(size=exact.shape)
    close, far = exact.copy(), exact.copy()
    close[0, 0, 1], far[0, 1, 3] = 10.01, 11.0
    tokens = compare_next_tokens(exact, yardstick, close)
    assert (tokens.flips, tokens.verdict) == (1, "holds")
    tokens = compare_next_tokens(exact, yardstick, far)
    assert (tokens.flips, tokens.verdict, tokens.worst_position) == (1, "fails", 1)
    assert tokens.worst_margin == pytest.approx(10.0)


def report_of(run: np.ndarray) -> Report:
    exact = exact_values(0)
    taps = [compare_tap("model.norm", exact, honest(exact, 1), run)]
    return Report("tiny", "mine", "bfloat16", "hf-eager", ROWS, taps, None)


def test_reports_render_and_are_standard_json(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    exact = exact_values(0)
    reports = [report_of(honest(exact, 2)), report_of(np.full_like(exact, np.nan))]
    assert [report.verdict for report in reports] == ["holds", "fails"]
    for view in (*map(show_report, reports), show_summary(reports), closing_line(reports)):
        Console(width=160).print(view)
    shown = capsys.readouterr().out
    assert "first failure: model.norm" in shown
    assert "2 checked: 1 holds, 1 fails" in shown
    values = json.loads(json_text([report.to_dict() for report in reports]), parse_constant=pytest.fail)
    assert values[0]["taps"][0]["verdict"] == "holds"
    assert values[1]["taps"][0]["candidate"]["rms"] is None


def test_hidden_taps_are_the_hidden_states_of_transformers() -> None:
    assert hidden_taps(3) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]


def test_golden_paths_are_folders() -> None:
    from refllm.check.run import folders_to_check

    assert all(isinstance(folder, Path) and folder.is_dir() for folder in folders_to_check(None))


# ------------------------------------------------------------------ whole runs: Transformers, right and broken


def check(name: str, dtype: str, load: Any = None, tokens: int = 96, attention: str = "eager") -> Report:
    """The report on an embedded checkpoint; `load(candidate)` may break the candidate's torch model before it runs."""
    from refllm import golden
    from refllm.check.run import check_checkpoint
    from refllm.check.transformers_adapter import TransformersCandidate

    folder = golden.path(name)

    def candidate(head: str) -> TransformersCandidate:
        loaded = TransformersCandidate(folder, head=head, dtype=dtype, attention=attention)
        if load is not None:
            load(loaded.model)
        return loaded

    ids = ",".join(str(i) for i in np.random.default_rng(1).integers(5, 400, tokens))
    given_tokens = {"prompt": None, "ids": ids, "ids_file": None}
    return check_checkpoint(folder, candidate, dtype=dtype, policy="hf-eager", tokens=given_tokens)


NAMES = ["arcee-tiny", "helium-tiny", "llama-tiny", "stablelm-tiny-parallel", "stablelm-tiny-sequential"]


def test_every_embedded_checkpoint_is_checked() -> None:
    from refllm.check.run import folders_to_check

    assert [folder.name for folder in folders_to_check(None)] == NAMES


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_holds(name: str, dtype: str, attention: str) -> None:
    report = check(name, dtype, attention=attention)
    assert report.verdict == "holds", show(report)
    assert report.next_tokens is not None
    assert report.next_tokens.verdict == "holds"


def test_16_bit_candidate_is_checked_against_weights_on_its_own_grid() -> None:
    """llama-tiny is stored in float32: rounding the weights is no error of the candidate, so bits can agree."""
    embeddings = check("llama-tiny", "bfloat16").taps[0]
    assert (embeddings.candidate.rms, embeddings.differing) == (0.0, 0)


def show(report: Report) -> str:
    return "\n".join(f"{tap.name} {tap.ratio:.2f} {tap.verdict} {tap.reasons}" for tap in report.taps)


def layer(model: Any, index: int) -> Any:
    return model.model.layers[index]


def scale_attention(model: Any) -> None:
    layer(model, 1).self_attn.scaling *= 1.1


def drop_norm_eps_and_weight(model: Any) -> None:
    layer(model, 1).input_layernorm.weight.data.fill_(1.0)


def exchange_heads(model: Any) -> None:
    weight = layer(model, 1).self_attn.q_proj.weight.data
    weight.copy_(weight.roll(weight.shape[0] // 2, 0))


def zero_one_tile(model: Any) -> None:
    layer(model, 1).mlp.down_proj.weight.data[:16] = 0.0


def skip_mlp(model: Any) -> None:
    mlp = layer(model, 1).mlp
    forward = mlp.forward
    mlp.forward = lambda x: 0 * forward(x)


def shift_positions(model: Any) -> None:
    """Rotates as if the text began at position 1, and in one layer only: relative positions do not notice."""
    attention = layer(model, 1).self_attn
    forward = attention.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return forward(*args, **kwargs | {"position_embeddings": (cos.roll(1, 1), sin.roll(1, 1))})

    attention.forward = wrong


def see_the_future(model: Any) -> None:
    attention = layer(model, 1).self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": None})


def round_to_bfloat16(model: Any) -> None:
    """A layer that computes its MLP in a smaller format than it says."""
    import torch

    mlp = layer(model, 1).mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.to(torch.bfloat16).to(x.dtype))


DEFECTS = {
    defect.__name__: defect
    for defect in (
        scale_attention,
        drop_norm_eps_and_weight,
        exchange_heads,
        zero_one_tile,
        skip_mlp,
        shift_positions,
        see_the_future,
        round_to_bfloat16,
    )
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_found_in_its_layer(defect: str, name: str) -> None:
    report = check(name, "float32", DEFECTS[defect])
    assert report.verdict == "fails"
    assert report.first_failure is not None
    # The residual stream after the last layer is in no hidden_states: there the next value is the final norm's.
    assert report.first_failure.name in ("model.layers.1", "model.norm"), show(report)
    assert {tap.verdict for tap in report.taps if tap.name in ("model.embed_tokens", "model.layers.0")} == {"holds"}


@pytest.mark.parametrize("defect", [name for name in DEFECTS if name != "round_to_bfloat16"])
def test_defect_is_found_under_bfloat16_rounding(defect: str) -> None:
    assert check("helium-tiny", "bfloat16", DEFECTS[defect]).verdict == "fails"


@pytest.mark.parametrize(
    ("head", "last"),
    [
        ("ForSequenceClassification", "score"),
        ("ForTokenClassification", "score"),
        ("ForQuestionAnswering", "qa_outputs"),
        ("Model", "model.norm"),
    ],
)
def test_other_heads_are_checked_too(head: str, last: str, tmp_path: Path) -> None:
    import refllm
    from refllm.check.run import check_all

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = refllm.LlamaConfig(
        **sizes, num_attention_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=1, initializer_range=0.2
    )
    getattr(refllm, f"Llama{head}").from_config(config, seed=1).save_pretrained(tmp_path, dtype="float32")
    tokens = {"prompt": None, "ids": None, "ids_file": None}
    options = {"candidate": "transformers", "policy": "hf-eager", "attention": "eager", "tokens": tokens}
    for report in check_all([tmp_path], dtypes=["float32", "bfloat16"], **options):
        assert report.verdict == "holds", show(report)
        assert report.taps[-1].name == last
