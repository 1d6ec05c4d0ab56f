"""The mutation run: what is drawn, in which order tests run against it, and that no mutant runs for ever."""

import ast
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import mutation_map
import mutation_sites
import pytest
import run_mutation
from mutation_sites import Mutant, draw

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
"""Half of it."""

LIMIT = 3


def half(x):
    if x > LIMIT and x:
        return x // 2
    return 0
'''
NO_CODE = """
from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from math import sqrt as root


@cache
def shown(x: int | None, *more: int | str) -> str | None:
    y: list[int | None] = x
    raise ValueError(f"{x + 1:>{3}} of {not x}", 3, x == 2)


if __name__ == "__main__":
    shown(3)
"""


def tree(folder: Path, **files: str) -> Path:
    (folder / "refllm").mkdir()
    for name, source in files.items():
        (folder / "refllm" / f"{name}.py").write_text(source)
    return folder


def test_a_seed_draws_the_same_mutants_each_with_one_line_changed(tmp_path: Path) -> None:
    root = tree(tmp_path, half=SOURCE)
    some = list(islice(draw(root, 5), 20))
    assert some == list(islice(draw(root, 5), 20))
    assert some != list(islice(draw(root, 6), 20))
    assert len({str(mutant) for mutant in some}) == 20
    assert {m.before for m in some} == {"LIMIT = 3", "if x > LIMIT and x:", "return x // 2", "return 0"}
    for mutant in some:
        old, new = SOURCE.splitlines(), mutant.source(root).splitlines()
        ast.parse(mutant.source(root))
        assert [i for i, (a, b) in enumerate(zip(old, new, strict=True), 1) if a != b] == [mutant.line]
        assert (old[mutant.line - 1].strip(), new[mutant.line - 1].strip()) == (mutant.before, mutant.after)


def test_text_types_and_programs_are_not_mutated(tmp_path: Path) -> None:
    root = tree(tmp_path, text=NO_CODE)
    assert mutation_sites._places(root, "refllm/text.py") == {}
    assert mutation_sites.product(root) == ["refllm/text.py"]


def test_what_is_left_out_is_there() -> None:
    """A name that is no longer there would leave nothing out."""
    files = [
        path.relative_to(ROOT).as_posix() for folder in mutation_sites.PRODUCT for path in (ROOT / folder).rglob("*.py")
    ]
    assert [name for name in mutation_sites.LEFT_OUT if not any(f.startswith(name) for f in files)] == []
    assert [name for name in mutation_map.LEFT_OUT if not list((ROOT / "tests").rglob(name))] == []
    assert len(mutation_sites.product(ROOT)) > 100


def test_the_quickest_of_every_test_comes_before_the_second_of_one() -> None:
    seconds = {"a[1]": 1.0, "a[2]": 0.1, "a[3]": 0.2, "b": 3.0, "c[1]": 0.3, "c[2]": 0.2}
    assert run_mutation._quick_and_different(set(seconds), seconds) == ["a[2]", "c[2]", "b", "a[3]", "c[1]", "a[1]"]


def test_who_imports_a_file_is_found() -> None:
    importers = run_mutation._importers()
    assert "refllm/accuracy/judge.py" in importers["refllm/accuracy/limits.py"]
    assert "golden/exact.py" in importers["golden/run.py"]
    assert "kernels/triton/attention.py" not in importers["refllm/accuracy/limits.py"]


def test_every_equivalent_mutant_is_of_a_line_that_is_there_and_has_its_reason() -> None:
    entries = json.loads(run_mutation.EQUIVALENT.read_text())
    assert entries
    for entry in entries:
        lines = [line.strip() for line in (ROOT / entry["file"]).read_text().splitlines()]
        assert entry["before"] in lines, entry
        assert entry["after"] not in lines, entry
        assert len(entry["why"]) > 20, entry
    one = entries[0]
    assert run_mutation.known(Mutant(one["file"], 1, "", 0, one["before"], one["after"])) == one["why"]
    assert run_mutation.known(Mutant(one["file"], 1, "", 0, one["before"], one["before"])) is None


def test_what_was_measured_of_tests_that_are_gone_is_forgotten(monkeypatch: Any, tmp_path: Path) -> None:
    here = Path(__file__).relative_to(ROOT).as_posix()
    kept, gone = (mutation_map._stem(tmp_path, name) for name in (here, "tests/test_that_was_moved.py"))
    for stem in (kept, gone):
        for suffix in ("json", "txt", "coverage"):
            Path(f"{stem}.{suffix}").write_text("{}")
    monkeypatch.setattr(mutation_map, "_is_fresh", lambda stem: True)
    mutation_map.bring_up_to_date(None, [tmp_path], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{kept.name}.{s}" for s in ("json", "txt", "coverage")}


@pytest.mark.parametrize(("code", "outcome"), [(1, "killed"), (2, "killed"), (0, "survived"), (3, None), (4, None)])
def test_a_run_that_could_not_be_begun_kills_nothing(
    monkeypatch: Any, tmp_path: Path, code: int, outcome: str | None
) -> None:
    root = tree(tmp_path, a=SOURCE)
    monkeypatch.setattr(run_mutation, "ROOT", root)
    run = object.__new__(run_mutation.Run)
    monkeypatch.setattr(run, "_steps", lambda mutant: iter([["test"]]), raising=False)
    monkeypatch.setattr(run, "run_tests", lambda tree, chosen: (code, ""), raising=False)
    mutant = next(draw(root, 5))
    if outcome is None:
        with pytest.raises(RuntimeError, match=r"cannot be run; see .*output\.txt"):
            run._run(mutant, root)
    else:
        assert run._run(mutant, root)["outcome"] == outcome


def loop(tree: Path) -> int:
    while True:
        pass


def sleep(tree: Path) -> int:
    os.system("sleep 60 & echo $! > sleeper")
    time.sleep(60)
    return 0


def here(tree: Path, answer: int) -> int:
    print(Path.cwd())
    return answer


@pytest.fixture(scope="module")
def server() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutation_map, "IMPORTED_ONCE", [])
        before = dict(os.environ)
        yield mutation_map.start_server()
        os.environ.clear()
        os.environ.update(before)


def test_a_mutant_runs_in_its_tree_and_ends_in_time_with_all_that_it_started(server: Any, tmp_path: Path) -> None:
    assert mutation_map.run_apart(server, here, tmp_path, 3, cpu=10, wall=60) == 3
    assert (tmp_path / "output.txt").read_text() == f"{tmp_path}\n"
    assert mutation_map.run_apart(server, loop, tmp_path, cpu=0, wall=60) == mutation_map.TIMED_OUT
    for wall in (1, 5, 25):  # a busy machine may not have come to start what is to be ended
        assert mutation_map.run_apart(server, sleep, tmp_path, cpu=10, wall=wall) == mutation_map.TIMED_OUT
        if (tmp_path / "sleeper").exists() and (tmp_path / "sleeper").read_text():
            break
    sleeper = Path("/proc") / (tmp_path / "sleeper").read_text().strip()
    end = time.monotonic() + 10
    while sleeper.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not sleeper.exists()


@pytest.mark.parametrize("arguments", [["--mutants", "0"], ["--seconds", "0"], ["--jobs", "9"], ["--seed", "x"]])
def test_wrong_use_is_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_mutation._options(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err
