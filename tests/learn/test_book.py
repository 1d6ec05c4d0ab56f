"""The book is what its sources make, and a page that no longer fits them is not made."""

import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from refllm import AutoConfig, extras, golden
from refllm.config import ModelConfig
from refllm.errors import InputError
from refllm.forward.dry_run import names_of
from refllm.learn.book import architecture, chapters, families, formula, make, numbers, operators, sources
from refllm.learn.book.calls import SmallCall
from refllm.learn.book.errors import BookError
from refllm.learn.exercises import exercises
from refllm.models import families as families_of_models
from refllm.ops.contracts import OPERATORS

BOOK = Path(__file__).parents[2] / "docs" / "book"
SIX_MEGABYTES = 6_000_000


@pytest.mark.cpu
@pytest.mark.skipif(bool(extras.not_installed(make.PACKAGES)), reason="the book is made with Triton, which is not here")
def test_the_book_is_what_its_sources_make() -> None:
    """After a change of an operator, a kernel or a formula: refllm learn book."""
    found = make.differences(make.pages(), BOOK)
    assert not found, "\n".join(["the book is not made from these sources (refllm learn book):", *found])


def test_a_changed_line_is_a_difference_and_so_is_a_number_beyond_its_last_digit(tmp_path: Path) -> None:
    page = (BOOK / "operators" / "rms_norm.html").read_text()
    (tmp_path / "page.html").write_text(page)
    assert not make.differences({"page.html": page}, tmp_path)
    assert not make.differences({"page.html": page.replace("0.762<", "0.763<")}, tmp_path)
    for old, new in (("0.762", "0.764"), ("np.sqrt", "np.cbrt"), ("largest", "smallest"), ('id="s2"', 'id="s3"')):
        assert old in page
        (difference,) = make.differences({"page.html": page.replace(old, new)}, tmp_path)
        assert difference.startswith("page.html: line "), difference
    assert make.differences({}, tmp_path) == ["page.html: is no page of the book"]
    assert make.differences({"page.html": page, "more.html": ""}, tmp_path) == ["more.html: is not written"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.50 sigma", "0.51 sigma", True), ("0.50 sigma", "0.52 sigma", False), ("1", "0.9999", True),
        ("8 rows", "9 rows", False), ("1e-05", "1.3e-05", False), ("-0.1", "0.1", False), ("  1.5", "1.5 ", False),
        ("1.5   2", "1.5 2", True),
    ],
)  # fmt: skip
def test_only_the_last_printed_digit_may_differ(one: str, other: str, same: bool) -> None:
    assert numbers.same_print(one, other) is same


def test_every_operator_of_the_contract_has_a_page() -> None:
    assert {*OPERATORS, "linear", "embedding", "softmax"} == set(operators.entries())


def test_an_anchor_that_fits_no_line_or_two_is_named_with_its_page() -> None:
    column = [sources.function("ops", "norm.rms_norm")]
    with pytest.raises(BookError, match=r"rms_norm, step 2.*'np\.cbrt' stands on 0 lines of rms_norm"):
        sources.find("np.cbrt", column, "rms_norm, step 2")
    with pytest.raises(BookError, match=r"stands on 2 lines.*\n.*x, weight = ar\.array"):
        sources.find("ar.array(x)", [*column, sources.function("ops", "norm.layer_norm")], "norms")
    with pytest.raises(BookError, match=r"refllm/ops/norm\.py has no function rms_nrom"):
        sources.function("ops", "norm.rms_nrom")


def test_an_anchor_shows_its_statement_and_of_a_loop_the_first_line() -> None:
    column = [sources.function("ops", "attention.decode_attention")]
    (line,) = sources.shown(sources.find("for b, length", column, ""), column)
    assert re.sub("<[^>]*>", "", line) == "for b, length in enumerate(np.asarray(lengths_B).tolist()):"
    assert len(sources.shown(sources.find("q_BHSD[row], k_cache_BKND", column, ""), column)) == 3


def test_a_formula_that_gives_other_numbers_than_the_definition_makes_no_page() -> None:
    given = {"x": [[1.0, 2.0, 3.0, 5.0]], "weight": [1.0, 1.0, 2.0, 1.0], "eps": 0.25}
    right = ["r = 1 / sqrt(mean_e(x * x) + eps)", "y = weight * (x * r)"]
    assert SmallCall("norm", "rms_norm", given, right, ["y"]).by_formula[0].shape == (1, 4)
    for wrong in (["r = 1 / (sqrt(mean_e(x * x)) + eps)", right[1]], [right[0], "y = x * r"]):
        with pytest.raises(BookError, match="norm: the formula of y gives"):
            _ = SmallCall("norm", "rms_norm", given, wrong, ["y"]).by_formula


@pytest.mark.parametrize(
    ("text", "written", "value"),
    [
        ("y = a - (b - c)", r"y = a - \left(b - c\right)", 2.0 - (3.0 - 5.0)),
        ("y = a * (b + c)", r"y = a \cdot \left(b + c\right)", 16.0),
        ("y = (a + b) / c", r"y = \frac{a + b}{c}", 1.0),
        ("y = a * a", r"y = {a}^{2}", 4.0),
        ("y = -(a + b) * c", r"y = \left(-\left(a + b\right)\right) \cdot c", -25.0),
        ("y = a / (1 + exp(b - b))", r"y = \frac{a}{1 + e^{b - b}}", 1.0),
    ],
)
def test_what_a_formula_says_is_what_it_computes(text: str, written: str, value: float) -> None:
    assert formula.latex(text) == written
    assert formula.evaluate(text, {"a": 2.0, "b": 3.0, "c": 5.0}) == {"y": value}


def test_a_formula_names_the_axis_of_a_sum() -> None:
    x = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert formula.evaluate("y = sum_n(x)", {"x": x})["y"].tolist() == [4.0, 7.0]
    assert formula.evaluate("y = sum_e(x)", {"x": x})["y"].tolist() == [[3.0], [8.0]]
    assert formula.latex("y = sum_e(x) / 2") == r"y = \frac{\sum_{e} x}{2}"
    with pytest.raises(BookError, match="the function cbrt has no sign"):
        formula.latex("y = cbrt(x)")


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("activation.py", "np.maximum(x, 0)", "np.fmax(x, 0)", r"relu2, step 1, NumPy: the anchor 'return np.maximum"),
        ("activation.py", "np.maximum(x, 0)\n", "np.maximum(x, 0) + 0\n", ""),
    ],
)
def test_a_changed_line_of_an_operator_changes_its_page_or_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, found: str
) -> None:
    for package in make.PACKAGES:
        pytest.importorskip(package)
    shutil.copytree(sources.path_of("ops", ""), tmp_path / "ops")
    text = (tmp_path / "ops" / file).read_text()
    assert old in text
    (tmp_path / "ops" / file).write_text(text.replace(old, new))
    monkeypatch.setitem(sources._FOLDERS, "ops", tmp_path / "ops")
    if found:
        with pytest.raises(BookError, match=found):
            operators.page("relu2")
    else:
        shown = operators.page("relu2")["passes"][0].steps[0].columns[0][0].lines
        assert new.strip() in re.sub("<[^>]*>", "", "".join(shown))


def chapter(text: str) -> chapters.Chapter:
    return chapters.Chapter("tried", "Tried", "", text)


def test_a_chapter_shows_what_its_code_prints_and_draws() -> None:
    text = "Words with $x^2$.\n\n```python\na = 6\nprint(a * 7)\n```\n\n```python quiet\nshow('<svg></svg>')\n```\n"
    page = chapters.page(chapter(text), make.markdown)
    assert re.search(r'<pre class="out"[^>]*>42</pre>', page)
    assert page.index("42") < page.index("<svg></svg>")
    assert "<msup>" in page
    assert "quiet" not in page
    assert "show(" not in page


def test_a_chapter_whose_code_raises_makes_no_page_and_says_where() -> None:
    with pytest.raises(BookError, match=r"chapter tried, block 2, line 3: ZeroDivisionError"):
        chapters.page(chapter("```python\nx = 0\n```\n```python\n\n\n1 / x\n```\n"), make.markdown)


def test_a_chapter_shows_a_function_as_it_stands() -> None:
    page = chapters.page(chapter("```source\nops:norm.rms_norm\n```\n"), make.markdown)
    assert html.unescape(re.sub("<[^>]*>", "", page)).strip().endswith(sources.function("ops", "norm.rms_norm").text)


def test_a_word_that_is_no_term_makes_no_page() -> None:
    assert "../glossary.html#own-inputs" in make.markdown("[isolated](term:isolated)")
    with pytest.raises(InputError, match="is no term of the reports"):
        make.markdown("[x](term:sigmoid function)")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_drawing_of_a_layer_has_every_value_of_the_page(family: str) -> None:
    page = families_of_models.CLASSES[families._class_name(family)].page
    config = tiny(family)
    steps = architecture.layer(page, config)
    by_name = {step.name.rpartition(".")[2]: step for step in steps}
    drawn = {name.rpartition("model.layers.0.")[2] for name in names_of(page, config) if "layers.0." in name}
    rotated = {"self_attn.q_rope", "self_attn.k_rope"}
    assert drawn - rotated == {step.name for step in steps} - {"x", "", "self_attn.q_rope, k_rope"}
    read = {step.operator for step in by_name["context"].reads}
    assert read == {"rope", "linear"}
    assert steps[0] in by_name["residual_mid"].reads
    assert steps[-1].operator == "add"
    assert steps[-1].reads[0] is by_name["residual_mid"]


def tiny(family: str) -> ModelConfig:
    folder = next((Path(golden.__file__).parent / "checkpoints").glob(f"{family}-tiny*"))
    return AutoConfig.from_pretrained(folder)


def test_the_parameters_of_a_page_are_those_of_the_model() -> None:
    layer = 2560 * (20 + 2 * 4) * 128 + 20 * 128 * 2560 + 2 * 2560 * 18_432 + 2 * 2560  # q, k, v; o; up, down; norms
    known = {"helium-1-preview-2b": 2_172_643_840, "afm-4.5b": 2 * 128_005 * 2560 + 36 * layer + 2560}
    for name, total in known.items():
        one = families._published(name)
        assert one.total == sum(t.numbers for t in one.tensors) == total


def test_what_breaks_between_two_families_is_measured() -> None:
    breaks = {change.where: change.breaks for change in families.changes("llama", "arcee")}
    assert breaks["block"].startswith("The loss goes from")
    (rotation,) = (c for c in families.changes("llama", "helium") if "rope" in "".join(c.ours))
    assert re.search(r"[1-9]\d* of 48 next tokens are others", rotation.breaks)
    assert rotation.theirs == [rotation.ours[0].replace("False", "True")]


def test_every_exercise_that_the_book_names_exists() -> None:
    named = {name for path in BOOK.rglob("*.html") for name in re.findall(r"refllm learn show (\w+)", path.read_text())}
    assert {"rms_norm", "flash_kernel", "attention_backward"} <= named <= exercises().keys()


def test_the_book_is_small_and_fetches_nothing() -> None:
    pages = [*BOOK.rglob("*")]
    assert sum(path.stat().st_size for path in pages if path.is_file()) < SIX_MEGABYTES
    for path in pages:
        if path.suffix in (".html", ".css"):
            text = path.read_text()
            assert "<script" not in text
            assert "@import" not in text
            assert "url(http" not in text
            for word in ('src="http', 'link rel="stylesheet" href="http', "<iframe", "<img"):
                assert word not in text, path


def test_every_link_of_the_book_leads_somewhere() -> None:
    ids = {path: set(re.findall(r'\bid="([^"]+)"', path.read_text())) for path in BOOK.rglob("*.html")}
    broken = []
    for path in ids:
        for link in re.findall(r'href="([^"]+)"', path.read_text()):
            if link.startswith("https://"):
                continue
            file, _, place = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or (place and place not in ids.get(target, set())):
                broken.append(f"{path.relative_to(BOOK)}: {link}")
    assert not broken, "\n".join(broken)
