"""The commands of a course: what a student types, what an autograder reads, and what survives a bad day."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import Result
from typer.testing import CliRunner

from refllm.commands import cli
from refllm.errors import InputError
from refllm.learn.course import Course, file_name, listed
from refllm.learn.exercises import find
from refllm.learn.progress import BROKEN, NAME, Progress
from refllm.learn.score_solutions import markdown, score
from refllm.learn.watch import saves

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/learn.json").read_text())
WRONG = (
    "import numpy as np\n\n\ndef softmax(x):\n    e = np.exp(x - x.max(-1, keepdims=True))\n    return e / e.mean()\n"
)
NOT_DIVIDED = WRONG.replace(" / e.mean()", "")


def learn(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["learn", *map(str, words)])


def as_json(*words: object) -> Any:
    return json.loads(learn(*words, "--json", "-").stdout)


def valid(values: Any) -> Any:
    jsonschema.validate(values, SCHEMA)
    return values


@pytest.fixture
def course(tmp_path: Path) -> Path:
    assert learn("new", tmp_path / "course").exit_code == 0
    return tmp_path / "course"


def answer(course: Path, name: str) -> Path:
    return course / file_name(find(name))


def test_a_new_course_has_a_plain_file_for_each_exercise_and_says_where_to_begin(course: Path) -> None:
    files = sorted(str(path.relative_to(course)) for path in course.rglob("*.py"))
    assert files == sorted(file_name(one) for one in listed())
    first = listed()[0]
    assert (course / file_name(first)).read_text() == first.skeleton
    text = learn("next", "--course", course).stdout
    assert first.title in text
    assert "What counts" in text
    assert file_name(first) in "".join(text.split())


def test_making_a_course_again_leaves_answers_as_they_are(course: Path) -> None:
    answer(course, "softmax").write_text("mine")
    answer(course, "rope").unlink()
    assert learn("new", course).exit_code == 0
    assert answer(course, "softmax").read_text() == "mine"
    assert answer(course, "rope").read_text() == find("rope").skeleton


def test_check_says_it_in_its_exit_code_and_in_json(course: Path) -> None:
    assert learn("check", "softmax", "--course", course).exit_code == 1
    answer(course, "softmax").write_text(NOT_DIVIDED)
    found = learn("check", "softmax", "--course", course, "--json", "-")
    assert found.exit_code == 1
    values = valid(json.loads(found.stdout))
    assert (values["verdict"], values["done"]) == ("fails", False)
    assert values["stages"] == {"basic": "fails", "contract": "fails"}
    assert [named["name"] for named in values["named"]] == ["not divided"]
    assert len(values["hints"]) == 3
    answer(course, "softmax").write_text(find("softmax").whole)
    right = learn("check", "numpy/02_softmax.py", "--course", course)
    assert right.exit_code == 0
    assert "holds" in right.stdout
    assert as_json("list", "--course", course)["done"] == 1


def test_without_a_name_it_is_the_next_that_is_not_done(course: Path) -> None:
    first, second = listed()[:2]
    (course / file_name(first)).write_text(first.whole)
    assert as_json("check", "--course", course)["exercise"] == first.name
    assert as_json("check", "--course", course)["exercise"] == second.name
    assert second.title in learn("next", "--course", course).stdout


def test_hints_come_one_by_one_and_begin_anew_with_another_mistake(course: Path) -> None:
    answer(course, "softmax").write_text(NOT_DIVIDED)
    told = [as_json("hint", "softmax", "--course", course)["hints"] for _ in range(4)]
    assert [len(hints) for hints in told] == [1, 2, 3, 3]
    assert "not divided" not in told[0][0]
    assert "the largest of each row is 1" in told[1][1]
    assert as_json("list", "--course", course)["exercises"][1]["tries"] == 0
    answer(course, "softmax").write_text(WRONG)
    assert as_json("check", "softmax", "--course", course)["hints_told"] == 0
    assert "hint 3" in learn("check", "softmax", "--course", course, "--tell").stdout
    answer(course, "softmax").write_text(find("softmax").whole)
    assert as_json("hint", "softmax", "--course", course)["hints"] == []


def test_a_solution_is_shown_when_the_exercise_is_done_or_when_asked_twice(course: Path) -> None:
    refused = learn("solution", "softmax", "--course", course)
    assert isinstance(refused.exception, InputError)
    assert "softmax is not done yet" in str(refused.exception)
    assert learn("solution", "softmax", "--course", course, "--anyway").stdout == find("softmax").whole
    answer(course, "softmax").write_text(find("softmax").whole)
    learn("check", "softmax", "--course", course)
    assert learn("solution", "softmax", "--course", course).stdout == find("softmax").whole


def test_reset_keeps_what_was_written(course: Path) -> None:
    answer(course, "softmax").write_text(find("softmax").whole)
    learn("check", "softmax", "--course", course)
    assert learn("reset", "softmax", "--course", course).exit_code == 0
    assert answer(course, "softmax").read_text() == find("softmax").skeleton
    kept = answer(course, "softmax").with_suffix(".py.before-reset")
    assert kept.read_text() == find("softmax").whole
    assert as_json("list", "--course", course)["done"] == 0


def test_an_autograder_needs_no_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "softmax.py"
    file.write_text(find("softmax").whole)
    assert learn("check", "softmax", "--file", file).exit_code == 0
    file.write_text(WRONG)
    assert valid(as_json("check", "--file", file))["named"][0]["name"]
    file.write_text("1 / 0\n")
    assert valid(as_json("check", "softmax", "--file", file))["trouble"]["kind"] == "raises"
    assert isinstance(learn("check", "softmax").exception, InputError)
    assert isinstance(learn("next").exception, InputError)
    assert "Softmax along the last axis" in learn("show", "softmax").stdout
    assert isinstance(learn("show", "sotfmax").exception, InputError)


def test_all_of_a_course_is_checked_at_once(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [find("swiglu"), find("softmax"), find("rope")]
    monkeypatch.setattr("refllm.learn.course.listed", lambda: kept)
    for one in kept[:2]:
        (course / f"numpy/{kept.index(one) + 1:02d}_{one.name}.py").write_text(one.whole)
    (course / "numpy/03_rope.py").write_text(find("rope").skeleton)
    found = learn("check", "--all", "--course", course, "--json", "-")
    values = valid(json.loads(found.stdout))
    assert (found.exit_code, values["done"], values["of"]) == (1, 2, 3)
    assert [one["verdict"] for one in values["exercises"]] == ["holds", "holds", "incomplete"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"exercises": 7}', '{"exercises": {"softmax": {"verdict": 1}}}', '{"exercises": {"softmax": 3}}'],
)
def test_progress_that_cannot_be_read_is_put_aside_and_comes_back_with_a_check(course: Path, content: str) -> None:
    answer(course, "softmax").write_text(find("softmax").whole)
    (course / NAME).write_text(content)
    text = learn("list", "--course", course).stdout
    assert "refllm learn check --all" in text
    assert (course / BROKEN).read_text() == content
    learn("check", "softmax", "--course", course)
    assert as_json("list", "--course", course)["done"] == 1


def test_progress_survives_a_restart_and_a_disk_that_cannot_be_written(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(course, "softmax").write_text(find("softmax").whole)
    learn("check", "softmax", "--course", course)
    before = (course / NAME).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refllm.storage.output_file.replace", full)
    failed = learn("check", "swiglu", "--course", course)
    assert isinstance(failed.exception, InputError)
    assert "No space left on device" in str(failed.exception)
    assert (course / NAME).read_bytes() == before
    assert Progress(course)["softmax"].done


def test_a_folder_that_is_no_course_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no course"):
        Course(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        Course.new(tmp_path / "file")


def test_watch_checks_at_once_and_after_every_save(course: Path) -> None:
    path = answer(course, "softmax")
    path.write_text(WRONG)

    def save() -> None:
        time.sleep(0.8)
        new = path.with_suffix(".new")
        new.write_text(find("softmax").whole)
        new.replace(path)

    saver = threading.Thread(target=save)
    saver.start()
    text = learn("watch", "softmax", "--course", course, "--time", 2.5).stdout
    saver.join()
    assert text.index("softmax: fails") < text.index("softmax: holds")


def test_a_file_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    assert list(saves(path, until=0.3)) == []
    path.write_text("x")
    assert len(list(saves(path, until=0.4))) == 1


def test_a_folder_of_answers_is_scored(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.py").write_text(f"# softmax: divided by the mean of everything\n{WRONG}")
    (tmp_path / "b.py").write_text(f"# softmax: no sum\n{NOT_DIVIDED}")
    (tmp_path / "c.py").write_text(f"# softmax: right\n{find('softmax').whole}")
    (tmp_path / "d.py").write_text(f"# softmax: right\n{NOT_DIVIDED}")
    (tmp_path / "e.py").write_text(f"# softmax: does nothing wrong that is seen\n{find('softmax').whole}")
    (tmp_path / "f.py").write_text("# softmax: raises\n1 / 0\n")
    found = {one.file: one.outcome for one in score(tmp_path, {"b.py": True}, forked=False)}
    assert found == {
        "b.py": "named rightly", "c.py": "accepted rightly", "d.py": "refused wrongly", "e.py": "accepted wrongly",
        "f.py": "raises", "deep/a.py": found["deep/a.py"],
    }  # fmt: skip
    assert found["deep/a.py"] in ("silent", "named, not judged")
    assert "| accepted rightly | 1 |" in markdown(score(tmp_path, {}, forked=False))
    (tmp_path / "g.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"g\.py: the first line should be"):
        score(tmp_path, {})
