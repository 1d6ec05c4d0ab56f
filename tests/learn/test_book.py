"""The book is what its sources make, and a page that no longer fits them is not made."""

import re
from pathlib import Path

import numpy as np
import pytest

from refllm import extras
from refllm.learn.book import formula, make, numbers, operators, sources
from refllm.learn.book.calls import SmallCall
from refllm.learn.book.errors import BookError
from refllm.ops.contracts import OPERATORS

BOOK = Path(__file__).parents[2] / "docs" / "book"
SIX_MEGABYTES = 6_000_000


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
