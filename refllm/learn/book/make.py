"""All pages of the book: made in memory, written, and compared with those that were written before."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from refllm import extras
from refllm.learn.book import chapters, families, operators
from refllm.learn.book.numbers import same_print
from refllm.learn.glossary import find, terms
from refllm.parallel import one_blas_thread
from refllm.storage import output_file

_TEMPLATES = Path(__file__).with_name("templates")
_COLOURS = re.compile(r'<span class="[cskmfd]">|</span>')
PACKAGES = ("torch", "triton", "latex2mathml", "markdown_it", "pygments")
"""What making the book needs, by the names of their imports."""


def pages() -> dict[str, str]:
    """Every file of the book: its path in the folder -> its text. Raises BookError where code and pages disagree, and
    MissingExtraError without the packages that it needs."""
    extras.require("refllm learn book", *PACKAGES)
    with one_blas_thread():  # the calls are so small that a second thread only waits
        listed = list(_listed())
    files = {"book.css": (_TEMPLATES / "book.css").read_text(encoding="utf-8")}
    for i, (path, title, name, context) in enumerate(listed):
        around = {
            "up": "../" * path.count("/"),
            "before": listed[i - 1][:2] if i else None,
            "after": listed[i + 1][:2] if i + 1 < len(listed) else None,
        }
        files[path] = _template(name).render({**context, **around, "title": title})
    return files


def write(folder: str | Path) -> int:
    """Writes the book and takes away pages that it no longer has. The number of files."""
    folder, files = Path(folder), pages()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        output_file.write("the book", folder / path, text)
    for old in folder.rglob("*.html"):
        if str(old.relative_to(folder)) not in files:
            old.unlink()
    return len(files)


def differences(files: Mapping[str, str], folder: Path) -> list[str]:
    """How the pages in a folder differ from these: a line for each that does, with the first line in which it does."""
    found = []
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found += [f"{path}: is not written" for path in sorted(files.keys() - written)]
    found += [f"{path}: is no page of the book" for path in sorted(written - files.keys())]
    for path in sorted(files.keys() & written):
        ours, theirs = (_COLOURS.sub("", text) for text in (files[path], (folder / path).read_text(encoding="utf-8")))
        found += [f"{path}: {line}" for line in first_difference(theirs, ours)]
    return found


def first_difference(written: str, made: str) -> list[str]:
    """The first line in which two pages differ by more than the last printed digit of a number, if any."""
    before, after = written.splitlines(), made.splitlines()
    for i, (one, other) in enumerate(zip(before, after, strict=False), 1):
        if not same_print(one, other):
            return [f"line {i} is {one.strip()[:200]!r}, and now {other.strip()[:200]!r}"]
    return [f"has {len(before)} lines, and now {len(after)}"] if len(before) != len(after) else []


def _listed() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(path, title, template, what that needs), in the order of reading."""
    entries = operators.entries().items()
    cards = [(f"operators/{name}.html", entry["title"], _first_sentence(entry["says"])) for name, entry in entries]
    models = [(f"families/{name}.html", families.title(name), families.about(name)) for name in families.FAMILIES]
    written = chapters.chapters()
    texts = [(f"chapters/{one.name}.html", one.title, one.about) for one in written]
    yield "index.html", "The book", "index.html", {"chapters": texts, "operators": cards, "families": models}
    for chapter in written:
        context = {"about": chapter.about, "text": chapters.page(chapter, markdown)}
        yield f"chapters/{chapter.name}.html", chapter.title, "chapter.html", context
    for name, entry in entries:
        yield f"operators/{name}.html", entry["title"], "operator.html", operators.page(name)
    for name in families.FAMILIES:
        yield f"families/{name}.html", families.title(name), "family.html", families.page(name)
    yield "glossary.html", "Glossary", "glossary.html", {"terms": terms().values()}


def _first_sentence(text: str) -> str:
    """The first sentence of a paragraph, without its links and what only points to one."""
    text = re.sub(r" \(\[[^]]+\]\([^)]+\)\)", "", text)
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", re.split(r"(?<=[.:]) ", " ".join(text.split()))[0].rstrip(":"))


def _template(name: str) -> Any:
    return _environment().get_template(name)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"markdown": markdown, "inline": inline, "slug": slug}
    return environment


def markdown(text: str) -> Any:
    """Markdown as HTML. A link to `term:sigma` is one to the glossary."""
    from markupsafe import Markup

    return Markup(_markdown().render(_linked(text)))


def inline(text: str) -> Any:
    """A sentence of Markdown as HTML, without a paragraph around it."""
    from markupsafe import Markup

    return Markup(_markdown().renderInline(_linked(text)))


def slug(term: str) -> str:
    """Where a term stands on the page of the glossary."""
    return re.sub(r"\W+", "-", term.lower())


def _linked(text: str) -> str:
    return re.sub(r"\(term:([^)]+)\)", lambda found: f"(../glossary.html#{slug(find(found[1]).name)})", text)


def _markdown() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table")
