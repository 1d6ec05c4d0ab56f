"""Hypotheses on operators: every edit applies and changes something; a mistake is named by its own name alone."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm.hypotheses.operators.catalogue import catalogue, every
from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.edits import NoSuchTextError, changed_lines, compiled, edited
from refllm.hypotheses.operators.fit import Answers, fitting, is_right, wrong_elements
from refllm.hypotheses.operators.hypothesis import OpHypothesis, Variant, mistake
from refllm.hypotheses.operators.outcomes import outcomes
from refllm.ops.contracts import CONTRACTS, OPERATORS

sys.path.insert(0, str(Path(__file__).parents[1] / "opcheck"))

from beginners.twins import TWINS, are_twins


def answers_of(variant: Variant, dtype: str = "float32") -> Answers:
    """What a candidate with just this mistake returns, in its format."""
    operator = variant.hypothesis.operator
    known = outcomes(operator, dtype)
    shapes = [[x.shape for x in known.results(known.right, n) or ()] for n in range(len(known.calls))]
    found = {n: known.results(variant, n) for n in range(len(known.calls))}
    return {n: tuple(np.asarray(x, np.float32).astype(np.float64) for x in out) for n, out in found.items()
            if out is not None and [x.shape for x in out] == shapes[n]}  # fmt: skip


def named(operator: str, answers: Answers, dtype: str = "float32", without: tuple[str, ...] = ()) -> list[str]:
    return [fit.hypothesis.name for fit in fitting(operator, dtype, answers, without)]


def of(operator: str, name: str) -> OpHypothesis:
    return next(h for h in catalogue(operator) if h.name == name)


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_large_and_names_are_of_one() -> None:
    names = [(h.operator, h.name) for h in every()]
    assert len(names) == len(set(names)) >= 800
    assert min(len(catalogue(operator)) for operator in OPERATORS if designed(operator, "float32")) >= 25
    assert sum(len(h.codes) > 1 for h in every()) > 200


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_edit_stands_in_the_definition_and_changes_a_number_of_a_designed_input(operator: str) -> None:
    known = outcomes(operator, "float32")
    assert catalogue(operator)
    for hypothesis in catalogue(operator):
        variants = hypothesis.variants or [
            Variant(hypothesis, code).at(number) for code in hypothesis.codes for number in hypothesis.solved[:6]
        ]
        for code in hypothesis.codes:
            mine = [v for v in variants if v.code == code]
            assert any(_differs(known, v) for v in mine), f"{operator}: {hypothesis.name}: {code} changes nothing"


def _differs(known: Any, variant: Variant) -> bool:
    compiled(variant.text)  # raises where the edit does not stand in the text, or makes no program of it
    for n in range(len(known.calls)):
        out, truth = known.results(variant, n), known.results(known.right, n)
        if out is not None and any(not np.array_equal(x, y, equal_nan=True) for x, y in zip(out, truth, strict=False)):
            return True
    return False


def test_an_edit_of_what_is_not_there_says_so_with_the_text() -> None:
    lost = mistake("relu2", "lost", "it is lost", (("np.maximum(x, 1)", "x"),))
    with pytest.raises(NoSuchTextError, match=r"there is no 'np.maximum\(x, 1\)' in the definition:\n"):
        lost.variants[0].text  # noqa: B018


def test_edits_compose_and_show_the_line_that_they_change() -> None:
    text = CONTRACTS["layer_norm"].program
    both = edited(text, (("weight * x", "(1 + weight) * x"), (" + eps", "")))
    x, ones = np.array([[1.0, 3.0]]), np.ones(2)
    np.testing.assert_allclose(compiled(both)(x, ones, None, 9.0)[0], [[-2.0, 2.0]])
    old, new = changed_lines(text, both)
    assert old == "y = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)"
    assert new == "y = (1 + weight) * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_designed_inputs_are_small_calls_of_the_contract(dtype: str) -> None:
    """The definitions take them, and give what the programs give that are edited."""
    for operator, contract in CONTRACTS.items():
        known = outcomes(operator, dtype)
        assert sum(call.kind.startswith("designed: ") for call in designed(operator, dtype)) >= 4
        for n, call in enumerate(designed(operator, dtype)):
            out = contract.definition(*call.arrays()[0], **call.arrays()[1])
            truth = compiled(contract.program)(*known.arrays(n)[0], **known.arrays(n)[1])
            for x, y in zip(out if isinstance(out, tuple) else (out,), truth, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


# -- what is named -----------------------------------------------------------------------------------------------------

_EACH = 19
"""One of so many ways to be wrong is asked here; all of them are by the command that writes docs/looks-like.md."""


def test_a_mistake_is_named_by_its_own_name_and_by_its_twins_alone() -> None:
    asked = 0
    for variant in [v for h in every() for v in h.variants][::_EACH]:
        operator, name = variant.hypothesis.operator, variant.hypothesis.name
        answers = answers_of(variant)
        if not is_right(operator, "float32", answers):
            found = named(operator, answers)
            assert name in found, f"{operator}: {name} {variant.number}"
            odd = [other for other in found if other != name and not are_twins(operator, name, other)]
            assert not odd, f"{operator}: {name} {variant.number} is {odd} as well"
            asked += 1
    assert asked > 80


def test_twins_are_twins() -> None:
    """What is listed is so for some number: nothing stands there that could be told apart."""
    assert TWINS
    for operator, pairs in TWINS.items():
        for one, other in pairs:
            variants = [v for name in (one, other) for v in of(operator, name).variants]
            found = (set(named(operator, answers_of(v))) for v in variants)
            assert any({one, other} <= names for names in found), f"{operator}: {one} and {other}"


def test_what_is_right_is_not_named() -> None:
    for operator in OPERATORS:
        for dtype in ("float32", "bfloat16"):
            known = outcomes(operator, dtype)
            answers = {n: known.results(known.right, n) or () for n in range(len(known.calls))}
            assert is_right(operator, dtype, answers)
            assert fitting(operator, dtype, answers) == []


def test_two_mistakes_at_once_are_not_named_by_one_of_them() -> None:
    text = edited(CONTRACTS["rms_norm"].program, (("weight * x", "(1 + weight) * x"), (" + eps", "")))
    known = outcomes("rms_norm", "float32")
    answers = {n: compiled(text)(*known.arrays(n)[0]) for n in range(len(known.calls))}
    assert named("rms_norm", answers) == []


def test_a_number_is_solved_for_and_said_by_the_lengths_of_the_inputs() -> None:
    def result(operator: str, old: str, new: str) -> list[str]:
        known = outcomes(operator, "float32")
        text = edited(CONTRACTS[operator].program, ((old, new),))
        answers = {n: compiled(text)(*known.arrays(n)[0], **known.arrays(n)[1]) for n in range(len(known.calls))}
        return [fit.says for fit in fitting(operator, "float32", answers)]

    scale = "(D**-0.5 if scale is None else scale)"
    assert result("attention", scale, "0.123") == ["the scores are multiplied by 0.123"]
    assert result("rms_norm", " + eps", " + 3e-4") == ["eps is 0.0003, whatever the argument says"]
    assert result("relu2", "np.maximum(x, 0) ** 2", "np.maximum(x, 0) ** 2 / x.shape[-1] ** 0.5") == [
        "the result is 1/sqrt(F) times what it should be"
    ]
    assert result("relu2", "** 2", "** 2.5") == []


def test_a_mistake_in_one_result_or_with_one_argument_is_named_there() -> None:
    known = outcomes("rope", "float32")
    wrong = of("rope", "sign of sin").variants[0]
    k_alone = {n: (known.results(known.right, n)[0], known.results(wrong, n)[1]) for n in range(len(known.calls))}
    assert [f.says for f in fitting("rope", "float32", k_alone)] == [f"{wrong.says}; in k alone"]
    pairs = {n: known.results(wrong if dict(known.calls[n].keywords)["interleaved"] else known.right, n)
             for n in range(len(known.calls))}  # fmt: skip
    assert [f.says for f in fitting("rope", "float32", pairs)] == [f"{wrong.says}; with interleaved=True alone"]


def test_nan_everywhere_is_no_evidence() -> None:
    for operator in ("rms_norm", "attention", "cross_entropy"):
        known = outcomes(operator, "float32")
        truth = {n: known.results(known.right, n) for n in range(len(known.calls))}
        answers = {n: tuple(np.full_like(x, np.nan) for x in out) for n, out in truth.items()}
        assert named(operator, answers) == []


def test_the_wrong_elements_are_where_they_are() -> None:
    known = outcomes("rms_norm", "float32")
    (y,) = known.results(known.right, 0)
    y = y.copy()
    y[1, 4:] += 1e-3
    (where,) = wrong_elements(known, 0, (y,))
    assert np.array_equal(np.argwhere(where)[:, 0], [1] * 7)
    assert where[1, 4:].all()
