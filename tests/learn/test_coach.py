"""What the coach says: what comes first, what is refused, what is drawn, hint by hint."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from refllm.errors import MissingExtraError
from refllm.learn.attempt import Attempt, Trouble
from refllm.learn.coach import Review, judged, review
from refllm.learn.drawing import drawn, hints_of
from refllm.learn.exercises import find

SOFTMAX = "import numpy as np\n\n\ndef softmax(x):\n    {}\n"
ADD = find("add").whole


def said(folder: Path, name: str, text: str, **how: object) -> Review:
    """What the coach says of a text."""
    path = folder / "answer.py"
    path.write_text(text)
    return review(find(name), path, **({"forked": False} | how))  # type: ignore[arg-type]


def kind(one: Review) -> str:
    """What came before any values; "" for nothing."""
    return one.trouble.kind if one.trouble else ""


def shown(one: Review, hints: int) -> str:
    """What stands on a terminal, on one line."""
    out = io.StringIO()
    Console(file=out, width=150).print(drawn(one, find(one.exercise), hints))
    return " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    ("body", "trouble", "words"),
    [
        ("return x.shapes", "raises", "AttributeError"),
        ("return x.sum(-1)", "form", "y has the shape [3]; [3, 5] would be right (inputs [3, 5])"),
        ("pass", "form", "softmax returned nothing (None); one array would be right"),
        ("return x, x", "form", "softmax returned 2 results; one array would be right"),
        ("return 'seven'", "form", "softmax returned a str, which is no array of numbers"),
        ("raise NotImplementedError('softmax: yours to write')", "not begun", "nothing is written yet"),
        ("return (", "syntax", "was never closed"),
        ("raise SystemExit(3)", "raises", "it ends the program"),
    ],
)
def test_what_is_no_array_comes_before_any_values(tmp_path: Path, body: str, trouble: str, words: str) -> None:
    found = said(tmp_path, "softmax", SOFTMAX.format(body))
    assert found.verdict == ("incomplete" if trouble == "not begun" else "fails")
    assert found.named == ()
    assert found.trouble is not None
    assert found.trouble.kind == trouble
    assert words in found.trouble.text
    assert not any(found.stages.values())


def test_a_raise_on_one_call_comes_first_though_others_have_numbers(tmp_path: Path) -> None:
    found = said(tmp_path, "softmax", SOFTMAX.format("return np.exp(x) if x.shape == (3, 5) else x.nothing"))
    assert (kind(found), found.named) == ("raises", ())
    assert found.trouble is not None
    assert found.trouble.line == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import refllm.ops\n" + SOFTMAX.format("return refllm.ops.softmax(x)"), "may not import refllm"),
        ("from scipy.special import softmax as s\n" + SOFTMAX.format("return s(x)"), "may not import scipy"),
        (SOFTMAX.format("return __import__('refllm').ops"), "__import__ has no place"),
        (SOFTMAX.format("import importlib; return importlib.import_module('refllm').ops"), "may not import importlib"),
        (SOFTMAX.format("return eval('np.exp(x)')"), "eval has no place"),
        ("import torch as t\n" + SOFTMAX.format("return t.tensor(x)"), "may not import torch"),
    ],
)
def test_what_is_ready_made_is_refused(tmp_path: Path, text: str, words: str) -> None:
    found = said(tmp_path, "softmax", text)
    assert kind(found) == "refused"
    assert found.trouble is not None
    assert words in found.trouble.text
    assert found.trouble.line


def test_imports_are_guarded_while_an_answer_runs_too(tmp_path: Path) -> None:
    hidden = "return __builtins__['__imp' + 'ort__']('refllm.ops', None, None, ['softmax']).softmax(x)"
    assert kind(said(tmp_path, "softmax", SOFTMAX.format(hidden))) == "refused"


@pytest.mark.parametrize(
    "line",
    [
        "torch.softmax(x, -1)",
        "x.softmax(-1)",
        "tl.softmax(x)",
        "torch.nn.functional.softmax(x)",
        "torch.compile(softmax)",
    ],
)
def test_what_torch_has_ready_is_refused_before_it_runs(tmp_path: Path, line: str) -> None:
    pytest.importorskip("triton")
    found = said(tmp_path, "softmax_kernel", f"import torch\n\n\ndef softmax(x, BLOCK):\n    return {line}\n")
    assert kind(found) == "refused"
    assert found.trouble is not None
    assert found.trouble.line == 5
    imported = said(tmp_path, "softmax_kernel", "from torch.nn import functional as F\n")
    assert kind(imported) == "refused"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("    return out", "    return x + y"), "of Torch computes"),
        (("    return out", "    return getattr(torch, 'a' + 'dd')(x, y)"), "add of Torch computes"),
        (("    n = x.numel()", "    out.copy_(x).add_(y)\n    return out"), "of Torch computes"),
    ],
)
def test_torch_may_not_compute_what_the_kernel_has_to(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    pytest.importorskip("triton")
    found = said(tmp_path, "add", ADD.replace(*change))
    assert kind(found) == "refused"
    assert found.trouble is not None
    assert words in found.trouble.text
    assert found.trouble.line


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("mask = i < n", "mask = i < n + 1", "OutOfBoundsError"),
        ("tl.program_id(0) * BLOCK +", "0 * tl.program_id(0) +", "RaceError"),
        ("tl.store(out_ptr + i, x + y, mask=mask)", "tl.store(out_ptr + i, x + y)", "OutOfBoundsError"),
    ],
)
def test_what_the_interpreter_finds_comes_first_with_its_line(tmp_path: Path, old: str, new: str, error: str) -> None:
    pytest.importorskip("triton")
    found = said(tmp_path, "add", ADD.replace(old, new))
    assert (kind(found), found.named) == ("raises", ())
    assert found.trouble is not None
    assert error in found.trouble.text
    assert "add_kernel, program" in found.trouble.text
    assert hints_of(found, find("add"))[0].startswith(("follow the lanes", "which elements"))


def test_an_argument_that_is_changed_is_said_and_the_answer_is_not_done(tmp_path: Path) -> None:
    body = "x -= x.max(-1, keepdims=True); e = np.exp(x); return e / e.sum(-1, keepdims=True)"
    found = said(tmp_path, "softmax", SOFTMAX.format(body))
    assert (kind(found), found.done) == ("changes", False)
    assert all(found.stages.values())
    assert "argument 1 of softmax was changed" in shown(found, 0)


def test_nan_everywhere_names_nothing() -> None:
    one = find("softmax")
    nothing = {n: tuple(np.full_like(x, np.nan) for x in one.expected(call)) for n, call in enumerate(one.given)}
    found = judged(one, Attempt(nothing, {}, ()))
    assert (found.verdict, found.named) == ("fails", ())


def test_stages_say_how_far_an_answer_has_come(tmp_path: Path) -> None:
    found = said(tmp_path, "softmax", SOFTMAX.format("e = np.exp(x); return e / e.sum(-1, keepdims=True)"))
    assert found.stages == {"basic": True, "contract": False}
    assert [one.name for one in found.named] == ["maximum not subtracted"]


def test_two_mistakes_at_once_are_said_as_if(tmp_path: Path) -> None:
    body = "E = x.shape[-1]; return (1 + weight) * x / np.sqrt((x * x).sum(-1, keepdims=True) / (E - 1) + eps)"
    text = f"import numpy as np\n\n\ndef rms_norm(x, weight, eps):\n    {body}\n"
    found = said(tmp_path, "rms_norm", text)
    assert [(one.name, one.as_if) for one in found.named] == [("weight plus one + n - 1", True)]
    assert "it is as if" in shown(found, 2)


def test_a_factor_is_solved_for_and_asked_about(tmp_path: Path) -> None:
    body = "e = np.exp(x - x.max(-1, keepdims=True)); return 0.3 * e / e.sum(-1, keepdims=True)"
    found = said(tmp_path, "softmax", SOFTMAX.format(body))
    assert [one.says for one in found.named] == [
        "every number is 0.3 times what it should be: which of your numbers is that?"
    ]


def test_what_is_not_known_is_not_named(tmp_path: Path) -> None:
    body = "e = np.exp(np.abs(x - x.max(-1, keepdims=True)) ** 1.5); return np.round(e / e.sum(-1, keepdims=True), 2)"
    found = said(tmp_path, "softmax", SOFTMAX.format(body))
    assert (found.verdict, found.named) == ("fails", ())
    assert hints_of(found, find("softmax")) == find("softmax").hints


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        (
            "swiglu",
            "gate / (1 + np.exp(-gate))",
            "gate * np.clip(gate + 3, 0, 6) / 6",
            "a hard swish in place of the SiLU",
        ),
        ("attention", "np.repeat(v, H // K, axis=1)", "np.tile(v, (1, H // K, 1, 1))", "the heads of v are tiled"),
        ("attention", "return p @ v", "return q + p @ v", "q is added to the result"),
        (
            "layer_norm",
            "np.sum(x, axis=-1, keepdims=True) / E",
            "np.median(x, axis=-1, keepdims=True)",
            "the median is",
        ),
        ("cross_entropy", "loss = lse -", "loss = 0.9 * lse + 0.1 * logits.mean(-1) -", ""),
    ],
)
def test_mistakes_that_are_known_of_the_operator_are_named_too(
    tmp_path: Path, name: str, old: str, new: str, sentence: str
) -> None:
    """The last is one that nobody knows."""
    one = find(name)
    assert old in one.whole
    found = said(tmp_path, name, one.whole.replace(old, new))
    assert found.verdict == "fails"
    assert [named.says.startswith(sentence) for named in found.named] == [True] * bool(sentence)


def test_hints_go_from_a_question_to_the_line(tmp_path: Path) -> None:
    found = said(tmp_path, "softmax", SOFTMAX.format("e = np.exp(x - x.max(-1, keepdims=True)); return e"))
    told = [shown(found, hints) for hints in range(4)]
    assert "What does each row of your result sum to?" in told[0]
    assert "hint 1" not in told[0]
    assert "look at y" in told[1]
    assert "the largest of each row is 1" not in told[1]
    assert "the exponentials are not divided by their sum: the largest of each row is 1" in told[2]
    assert "return e / e.sum(axis=-1, keepdims=True)" in told[3]
    assert all(told[hints] in told[hints + 1] for hints in range(3))


def test_wrong_cells_are_drawn_and_marked_on_a_call_of_simple_structure(tmp_path: Path) -> None:
    found = said(tmp_path, "attention", find("attention").whole.replace("np.arange(T) <=", "np.arange(T) <="))
    assert found.drawn is None
    answer = find("attention").whole.replace("s = np.where(seen, s, -np.inf)", "s = s")
    found = said(tmp_path, "attention", answer)
    assert found.drawn is not None
    assert "v is the identity" in found.drawn.call.words
    text = shown(found, 0)
    assert "query 0 yours 0.25! 0.25! 0.25! 0.25! right 1 0 0 0" in text
    assert text.count("right 0.") == 2  # of queries 1 and 2; query 3 is right
    assert "query 3 yours 0.25 0.25 0.25 0.25" in text


def test_a_table_fits_a_terminal_of_eighty_columns(tmp_path: Path) -> None:
    answer = find("block").whole.replace("return x + (silu", "return 1.001 * x + (silu")
    found = said(tmp_path, "block", answer)
    out = io.StringIO()
    Console(file=out, width=80).print(drawn(found, find("block"), 0))
    assert "…" not in out.getvalue()
    assert "query 0 yours" in " ".join(out.getvalue().split())


def test_an_answer_that_hangs_is_ended(tmp_path: Path) -> None:
    found = said(tmp_path, "softmax", SOFTMAX.format("while True: pass"), forked=True, seconds=0.5)
    assert kind(found) == "hangs"
    found = said(tmp_path, "softmax", SOFTMAX.format("import math; e = np.exp(x - x.max()); return e"), forked=True)
    assert found.verdict == "fails"


def test_what_an_answer_prints_is_shown_from_its_beginning(tmp_path: Path) -> None:
    text = SOFTMAX.format("print('row', x.shape); [print(i) for i in range(40)]; return x")
    found = said(tmp_path, "softmax", text, forked=True)
    assert found.printed.splitlines()[:2] == ["row (3, 5)", "0"]
    assert found.printed.endswith("lines more")
    assert "it prints: row (3, 5) 0 1" in shown(found, 0)


def test_files_that_are_no_text_are_said(tmp_path: Path) -> None:
    path = tmp_path / "answer.py"
    assert review(find("softmax"), path).trouble == Trouble(
        "syntax", "answer.py cannot be read: No such file or directory"
    )
    path.write_bytes(b"\xff\xfe\x00")
    found = review(find("softmax"), path).trouble
    assert found == Trouble("syntax", "answer.py is no UTF-8 text")
    path.write_bytes(b"x = 1\x00")
    assert kind(review(find("softmax"), path)) == "syntax"


def test_a_check_in_numpy_loads_neither_torch_nor_triton(tmp_path: Path) -> None:
    (tmp_path / "softmax.py").write_text(find("softmax").whole)
    code = (
        "import sys; from pathlib import Path; from refllm.learn.coach import review; "
        "from refllm.learn.exercises import find; "
        "print(review(find('softmax'), Path('softmax.py')).done, sorted({'torch', 'triton', 'scipy'} & {*sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "[]"]


def test_an_exercise_in_triton_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refllm.extras.find_spec", lambda name: None if name == "triton" else object())
    with pytest.raises(MissingExtraError, match="the exercise add needs triton, which is not installed"):
        said(tmp_path, "add", ADD)
