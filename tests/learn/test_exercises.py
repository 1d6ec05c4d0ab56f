"""Every exercise refuses what is wrong, accepts what is right, and calls mistakes by their own names."""

import ast
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import answers
import numpy as np
import pytest

from refllm.errors import InputError
from refllm.hypotheses.operators.fit import fitting_among
from refllm.hypotheses.operators.hypothesis import OpHypothesis, Variant
from refllm.learn.attempt import Attempt
from refllm.learn.coach import judged, review
from refllm.learn.exercise import TRACKS, Exercise
from refllm.learn.exercises import exercises, find
from refllm.ops.activation_backward import swiglu_backward
from refllm.ops.attention import attention, softmax
from refllm.ops.attention_backward import softmax_backward
from refllm.ops.loss import cross_entropy
from refllm.ops.loss_backward import cross_entropy_backward
from refllm.ops.norm import layer_norm, rms_norm
from refllm.ops.norm_backward import layer_norm_backward, rms_norm_backward

EXERCISES = list(exercises().values())
OWN = [one for one in EXERCISES if not one.planted]
"""The exercises whose definition is no other's."""
NUMPY = [one for one in EXERCISES if not one.uses_triton]
RIGHT, WRONG = list(answers.right()), list(answers.wrong())
ENOUGH_WRONG, ENOUGH_RIGHT = 8, 3
SOME = 4
"""Every so-manieth of what takes long runs here; all of it in coach_page.py."""


def _here(one: Exercise) -> bool:
    if one.uses_triton:
        pytest.importorskip("triton")
    return True


def _given(hypothesis: OpHypothesis, one: Exercise) -> Attempt:
    """An answer that computes what a mistake computes."""
    found = {n: one.known.results(hypothesis.variants[0], n) for n in range(len(one.given))}
    return Attempt({n: results for n, results in found.items() if results is not None}, {}, ())


def test_there_are_four_tracks_and_enough_of_everything() -> None:
    tracks = Counter(one.track for one in EXERCISES)
    assert list(tracks) == list(TRACKS)
    assert len(EXERCISES) >= 30
    assert sum(len(one.mistakes) for one in OWN) >= 300
    assert all(len({m.name for m in one.mistakes}) == len(one.mistakes) for one in EXERCISES)
    found = Counter(answer.exercise.name for answer in WRONG)
    assert [one.name for one in OWN if found[one.name] < ENOUGH_WRONG] == []
    found = Counter(answer.exercise.name for answer in RIGHT)
    assert [one.name for one in OWN if found[one.name] < ENOUGH_RIGHT] == []


def test_the_readme_counts_them() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"\n{len(EXERCISES)} exercises in four tracks" in readme
    hundreds = sum(len(one.mistakes) for one in OWN) // 100 * 100
    assert f"(over {hundreds}, as edits of the definition" in readme


def test_the_page_about_the_coach_is_of_these_exercises() -> None:
    """`python tests/learn/coach_page.py docs/coach.md` makes it again."""
    page = (Path(__file__).parents[2] / "docs/coach.md").read_text()
    every = [*RIGHT, *WRONG, *answers.of_bugs()]
    wrong = sum(bool(answer.mistake) for answer in every)
    assert f"| mistakes that are known | {sum(len(one.mistakes) for one in OWN)} |" in page
    assert f"| wrong answers | {wrong}: " in page
    assert f"| right answers | {len(every) - wrong}, of which {len(every) - wrong} are accepted |" in page
    rows = [line.split(" | ")[0].strip("| ") for line in page.splitlines()[-len(EXERCISES) :]]
    assert rows == [one.name for one in EXERCISES]


@pytest.mark.parametrize("one", EXERCISES, ids=lambda one: one.name)
def test_statements_and_hints_say_enough(one: Exercise) -> None:
    assert "Example" in one.statement
    assert "What counts" in one.statement
    assert all(len(hint) > 20 for hint in one.hints)
    for mistake in one.mistakes:
        assert mistake.says[0].islower() or mistake.says.split()[0].rstrip(":").split("(")[0] not in ("The", "A", "It")
        assert not mistake.says.endswith(".")
        assert mistake.asks.endswith("?"), mistake.asks


@pytest.mark.parametrize("one", EXERCISES, ids=lambda one: one.name)
def test_skeleton_is_python_and_holds_nothing_of_the_solution(one: Exercise) -> None:
    tree = ast.parse(one.skeleton)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert one.function in names
    assert one.title in (ast.get_docstring(tree) or "")
    if one.planted:
        assert one.with_bug in one.skeleton
        assert one.letter
        assert len(one.choices) == len(set(one.choices)) == 7
    else:
        ast.parse(one.whole)
        assert one.solution.rstrip().splitlines()[-1 if not one.uses_triton else 3].strip() not in one.skeleton


@pytest.mark.parametrize("one", OWN, ids=lambda one: one.name)
def test_every_mistake_differs_from_the_truth_and_from_the_others(one: Exercise) -> None:
    """Twins may be listed together, and none is: an exercise has one name for them."""
    assert len(one.hypotheses) > ENOUGH_WRONG
    for hypothesis in one.hypotheses[:-1]:
        for variant in hypothesis.variants:
            found = {n: one.known.results(variant, n) for n in range(len(one.given))}
            assert None not in found.values(), hypothesis.name
            said = judged(one, Attempt(found, {}, ()))  # type: ignore[arg-type]
            assert (said.verdict, [named.name for named in said.named]) == ("fails", [hypothesis.name]), variant.lines


@pytest.mark.parametrize("one", [one for one in OWN if one.operator], ids=lambda one: one.name)
def test_mistakes_of_an_operator_can_be_asked_of_its_exercise(one: Exercise) -> None:
    """What is adapted is right where nothing is edited, and nothing that is edited raises what nobody expects."""
    right = Variant(OpHypothesis("right", "", one.name, ((),), definition=one.of_operator[0].text), ())
    found = {n: one.known.results(right, n) for n in range(len(one.given))}
    assert judged(one, Attempt(found, {}, ())).done  # type: ignore[arg-type]
    computed = [one.known.results(v, 0) for h in one.of_operator[::SOME] for v in h.variants]
    assert sum(results is not None for results in computed) > 10


@pytest.mark.parametrize("number", range(len(OWN)))
def test_a_mistake_whose_entry_is_removed_is_not_called_another(number: int) -> None:
    """A factor is said as a factor, and "in db alone" is true: those are no other names."""
    one = OWN[number]
    assert len(one.hypotheses) > ENOUGH_WRONG
    for hypothesis in one.hypotheses[number % SOME : -1 : SOME]:
        others = [other for other in one.hypotheses if other.name != hypothesis.name]
        for fit in fitting_among(others, [one.known], _given(hypothesis, one).results):
            assert fit.restricted or fit.hypothesis.name == "factor", (one.name, hypothesis.name, fit.says)


def test_right_answers_are_accepted(tmp_path: Path) -> None:
    refused = [
        (answer.exercise.name, said.verdict, said.trouble, said.where)
        for number, answer in enumerate(RIGHT)
        if _here(answer.exercise) and not (said := answers.reviewed(answer, tmp_path, number)).done
    ]
    assert refused == []


def _misjudged(answer: answers.Answer, folder: Path, number: int) -> str:
    """What is wrong about what the coach says of a wrong answer; "" for nothing."""
    said = answers.reviewed(answer, folder, number)
    if answer.mistake == answers.BY_INTERPRETER:
        assert said.trouble is not None
        return "" if said.trouble.line else f"{answer.exercise.name}: no line: {said.trouble.text}"
    names = [named.name for named in said.named]
    return "" if names == [answer.mistake] else f"{answer.exercise.name}: {answer.mistake} is called {names}"


def test_wrong_answers_in_numpy_are_refused_and_called_by_their_names(tmp_path: Path) -> None:
    told = [_misjudged(a, tmp_path, n) for n, a in enumerate(WRONG) if not a.exercise.uses_triton]
    assert [text for text in told if text] == []
    assert len(told) > 250


def test_wrong_answers_in_triton_are_refused_and_called_by_their_names(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    told = [_misjudged(a, tmp_path, n) for n, a in enumerate(WRONG) if a.exercise.uses_triton and not n % SOME]
    assert [text for text in told if text] == []
    assert len(told) > 30


def test_a_planted_bug_has_to_be_named_and_mended(tmp_path: Path) -> None:
    bugs = [one for one in NUMPY if one.planted]
    assert len(bugs) >= 4
    for number, one in enumerate(bugs):
        path = tmp_path / f"bug_{number}.py"
        path.write_text(one.skeleton.replace('BUG = ""', f'BUG = "{one.letter}"'))
        said = review(one, path, forked=False)
        assert [named.name for named in said.named] == [one.planted]
        path.write_text(one.whole.replace(f'BUG = "{one.letter}"', 'BUG = "x"'))
        misnamed = review(one, path, forked=False)
        assert (misnamed.verdict, misnamed.trouble.kind if misnamed.trouble else "") == ("fails", "misnamed")


def test_bugs_that_were_real_are_those_of_the_catalogue_of_planted_ones() -> None:
    pytest.importorskip("triton")
    from refllm.kernels.mutants import catalogue
    from refllm.learn.exercises.bugs import SEEN

    for name, (operator, mutant) in SEEN.items():
        assert name in exercises()
        assert mutant in {m.name for m in catalogue(operator)}, mutant


def test_exercises_are_found_by_name_and_by_file() -> None:
    assert find("softmax") is find("numpy/02_softmax.py") is find("course/numpy/02_softmax.py")
    with pytest.raises(InputError, match="did you mean softmax"):
        find("sofmax")


OPERATORS: dict[str, Callable[..., Any]] = {
    "softmax": softmax,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "attention": attention,
    "cross_entropy": partial(cross_entropy, reduction="none"),
    "swiglu_backward": swiglu_backward,
    "softmax_backward": lambda dp, x: softmax_backward(dp, softmax(x)),
    "rms_norm_backward": rms_norm_backward,
    "layer_norm_backward": lambda dy, x, w, eps: layer_norm_backward(dy, x, w, np.zeros_like(w), eps),
    "cross_entropy_backward": lambda z, y: cross_entropy_backward(np.float64(1), z, y),
}
"""The operator that an exercise asks for."""


@pytest.mark.parametrize("name", OPERATORS)
def test_definition_of_an_exercise_is_that_of_the_operator(name: str) -> None:
    one = exercises()[name]
    assert one.given
    for call in one.given:
        with np.errstate(all="ignore"):
            wanted = OPERATORS[name](*call.arrays()[0])
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for x, y in zip(wanted, one.expected(call), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-12)
