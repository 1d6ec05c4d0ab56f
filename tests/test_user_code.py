"""Functions of a user's own, by name: what there is not is one sentence, and its cause is what their module raised."""

from pathlib import Path

import pytest

from refllm.errors import InputError
from refllm.user_code import find_function


def test_a_function_is_found_by_its_file_and_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_a_user.py").write_text("def f(): return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_function(f"{tmp_path / 'of_a_user.py'}:f")() == 3
    assert find_function("of_a_user:f")() == 3


@pytest.mark.parametrize(
    ("source", "sentence", "cause"),
    [
        (None, "FileNotFoundError: no such file", None),
        ("1 / 0", "ZeroDivisionError: division by zero", ZeroDivisionError),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'", ModuleNotFoundError),
        ("raise SystemExit(4)", "it ends the program, with 4", SystemExit),
        ("g = 1", "has no function 'f'", None),
        ("f = 1", "has no function 'f'", None),
    ],
)
def test_what_is_no_function_is_one_sentence_with_its_cause(
    source: str | None, sentence: str, cause: type[BaseException] | None, tmp_path: Path
) -> None:
    if source is not None:
        (tmp_path / "of_another.py").write_text(source + "\n")
    with pytest.raises(InputError) as caught:
        find_function(f"{tmp_path / 'of_another.py'}:f")
    assert sentence in str(caught.value)
    assert type(caught.value.__cause__) is (cause or type(None))


def test_a_module_that_is_not_there_is_not_told_from_its_parts() -> None:
    for name in ("no_such_module:f", "no_such_package.module:f"):
        with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError") as caught:
            find_function(name)
        assert caught.value.__cause__ is None
