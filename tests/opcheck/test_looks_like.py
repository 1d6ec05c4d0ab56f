"""`check_op` says what a wrong operator looks like: beginners' mistakes, rightly; nothing of right operators."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import opcheck_candidates as candidates  # noqa: E402
from beginners import every  # noqa: E402
from beginners.right_names import BEGINNERS, PLANTED  # noqa: E402
from beginners.scoring import Asked, answers_of, falsely, score  # noqa: E402

from refllm.check import check_op  # noqa: E402
from refllm.hypotheses.operators.catalogue import catalogue  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.mutants import catalogue as planted  # noqa: E402
from refllm.opcheck.candidate import load  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs/looks-like.md"


def asked(name: str) -> Asked:
    one = next(one for one in every() if one.name == name)
    answers = answers_of(one.operator, one.function, "float32", one.arrays)
    return Asked(one.operator, one.name, one.mistake, frozenset({BEGINNERS[name]}), answers)


def test_beginners_are_named_rightly_and_by_no_other_name_without_their_own() -> None:
    """Every fifth; all of them by the command that writes docs/looks-like.md."""
    scores = [score(asked(one.name), "float32", removed=True) for one in every()[::5]]
    assert len(scores) > 30
    wrong = [f"{s.asked.name}: {s.named}" for s in scores if s.verdict == "wrongly"]
    assert not wrong, wrong
    assert sum(s.verdict == "rightly" for s in scores) >= 0.9 * len(scores)
    assert [f"{s.asked.name}: {falsely(s)}" for s in scores if falsely(s)] == []


def test_right_names_are_names() -> None:
    assert set(BEGINNERS) == {one.name for one in every()}
    for one in every():
        assert BEGINNERS[one.name] in {h.name for h in catalogue(one.operator)}
        assert one.mistake.endswith(".")
    mutants = planted()
    for name, right in PLANTED.items():
        operators = {m.operator for m in mutants if m.name == name}
        assert operators, name
        assert any({h.name for h in catalogue(o)} & {name, *right} for o in operators), name


def test_the_report_has_the_name_and_the_line_before_anything_is_small() -> None:
    """A candidate of a process of its own, in a narrow format, by its name; the smallest call has one column."""

    def eps_outside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rms = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        return (weight.float() * x.float() / (rms + eps)).to(x.dtype)

    report = check_op("rms_norm", eps_outside, dtype="bfloat16")
    (guess,) = report.guesses
    assert guess.name == "eps outside the root"
    said = str(report)
    assert "looks like      eps is added outside the root, and not under it (allenai/OLMo#281)" in said
    assert "with that       return weight * x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)" in said
    told = json.loads(json.dumps(report.to_dict()))
    assert told["looks_like"] == told["findings"][0]["looks_like"] == [vars(guess)]
    assert told["findings"][0]["wrong_in"] is None


def test_where_nothing_fits_it_says_where_it_is_wrong_and_no_cause() -> None:
    def second_row(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = plain.rms_norm(x, weight, eps)
        y[1:2] = y[1:2] * 1.25 + 0.125
        return y

    report = check_op("rms_norm", second_row, dtype="float32", isolate=False)
    assert report.guesses == ()
    assert "wrong in        y: all 11 columns of row 1 (of 3) (designed: eps of the size of the squares)" in str(report)
    assert "looks like" not in str(report)


def test_what_is_not_asked_is_not_run_for_a_name() -> None:
    seen = []

    def no_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, causal: bool = True):
        seen.append((q.shape[1] == k.shape[1], q.shape[2] == k.shape[2]))
        return plain.attention(q, k, v, scale=1.0, causal=causal)

    without = ("key_mask", "return_lse", "grouped_heads", "fewer_queries")
    report = check_op("attention", no_mask, dtype="float32", isolate=False, without=without)
    assert [guess.name for guess in report.guesses] == ["no scale"]
    assert all(all(one) for one in seen)


def test_by_torchs_convention_its_choices_are_not_named() -> None:
    def sdpa(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
        g = q.shape[1] // k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat(1, g, 1, 1), v.repeat(1, g, 1, 1), is_causal=causal, scale=scale
        )

    options = {"convention": "torch", "without": ("key_mask", "return_lse"), "isolate": False, "dtype": "float32"}
    report = check_op("attention", sdpa, **options)
    assert [guess.name for guess in report.guesses] == ["heads by modulo"]


def test_misbehaviour_is_not_named_by_its_values() -> None:
    for function in (candidates.in_place, candidates.two_results, candidates.raises):
        assert check_op("rms_norm", function, isolate=False).guesses == ()


def test_a_planted_bug_keeps_its_issue() -> None:
    function = load("refllm.kernels.mutants.built:layer_norm_padding_in_the_variance").function
    report = check_op("layer_norm", function, dtype="float32", isolate=False)
    assert [guess.source for guess in report.guesses] == ["Dao-AILab/quack 9310d47"]


def test_the_page_has_what_it_promises() -> None:
    """Written by a command; its first line of rates is that of beginners in float32."""
    text = PAGE.read_text(encoding="utf-8")
    for words, least in (("beginners', float32", 70.0), ("planted in Torch, float32", 80.0)):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {words} |")).split(" | ")
        shares = [float(cell.partition("(")[2].rstrip(" %)")) for cell in (cells[2], cells[4])]
        assert shares[0] >= least
        assert shares[1] <= 2.0
    for name in ("float32", "bfloat16", "float16"):
        assert f"in {name}" in text
