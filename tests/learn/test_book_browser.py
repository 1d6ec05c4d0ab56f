"""The book in a browser: for everybody's eyes and hands, on a phone and on paper, and without a network.

Any Chromium will do: that of the system, or what `playwright install chromium` fetched. Without one they are skipped.
"""

import importlib.resources
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BOOK = Path(__file__).parents[2] / "docs" / "book"
PAGES = sorted(str(path.relative_to(BOOK)) for path in BOOK.rglob("*.html"))
KINDS = ("index.html", "chapters/rotation.html", "operators/swiglu.html", "families/arcee.html", "glossary.html")
COLOURFUL, CONTRAST = KINDS[1:3], {"runOnly": ["color-contrast"]}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP, PAPER = ({"width": width, "height": 900} for width in (420, 1280, 700))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    with playwright.sync_playwright() as p:
        found = next(filter(None, map(shutil.which, NAMES)), None) or p.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip("there is no Chromium here: install one, or run `playwright install chromium`")
        # In a container there is no sandbox for root; the pages are this repository's own.
        opened = p.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def opened(browser: Any, viewport: dict[str, int], **how: Any) -> Any:
    """A page of its own that remembers what it asked for and what went wrong."""
    page = browser.new_context(viewport=viewport, **how).new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    return page


def show(page: Any, name: str) -> None:
    page.goto((BOOK / name).as_uri())


def faults(page: Any, **options: Any) -> list[str]:
    """What axe-core calls serious or critical, with the first element of each."""
    axe = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(axe)
    found = page.evaluate("options => axe.run(document, options)", options)["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:160]}" for one in grave]


@pytest.mark.parametrize(("scheme", "kinds", "rules"), [("light", KINDS, {}), ("dark", COLOURFUL, CONTRAST)])
def test_axe_finds_no_serious_fault(browser: Any, scheme: str, kinds: tuple[str, ...], rules: dict[str, Any]) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    page = opened(browser, DESKTOP, color_scheme=scheme)
    for name in kinds:
        show(page, name)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert not faults(page, **rules), name


def test_axe_would_find_one(browser: Any) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    page = opened(browser, DESKTOP)
    page.set_content('<html lang="en"><title>x</title><main><h1>x</h1><p style="color: #eee">pale</p><img src="x">')
    assert {line.partition(":")[0] for line in faults(page)} == {"color-contrast", "image-alt"}


@pytest.mark.parametrize(("viewport", "media", "names"), [(PHONE, "screen", PAGES), (PAPER, "print", KINDS)])
def test_no_page_is_wider_than_a_phone_or_a_sheet_of_paper(
    browser: Any, viewport: dict[str, int], media: str, names: tuple[str, ...]
) -> None:
    page = opened(browser, viewport)
    page.emulate_media(media=media)
    wide = []
    for name in names:
        show(page, name)
        if page.evaluate("document.documentElement.scrollWidth") > viewport["width"]:
            wide.append(name)
    assert not wide
    assert not page.errors
    assert all(url.startswith("file:") for url in page.asked)
    assert {url.rpartition(".")[2] for url in page.asked} == {"html", "css"}


def test_the_three_columns_stand_side_by_side_and_below_one_another_on_a_phone(browser: Any) -> None:
    lefts = (
        """[...document.querySelectorAll('#s1 > .math, #s1 > .code')].map(one => one.getBoundingClientRect().left)"""
    )
    page = opened(browser, DESKTOP)
    show(page, "operators/attention.html")
    assert len(set(page.evaluate(lefts))) == 3
    page.set_viewport_size(PHONE)
    assert len(set(page.evaluate(lefts))) == 1


def test_formulas_are_drawn_and_not_spelled(browser: Any) -> None:
    page = opened(browser, DESKTOP)
    show(page, "operators/rms_norm.html")
    root = page.evaluate("document.querySelector('#s2 msqrt').getBoundingClientRect().height")
    assert root > page.evaluate("document.querySelector('#s2 mi').getBoundingClientRect().height")


def test_paper_shows_what_is_folded_and_no_links_to_other_pages(browser: Any) -> None:
    page = opened(browser, PAPER)
    show(page, "operators/relu2.html")
    page.emulate_media(media="print")
    height = "one => document.querySelector(one).getBoundingClientRect().height"
    assert page.evaluate(height, "details pre.whole") > 0
    assert page.evaluate(height, "header.top") == 0
