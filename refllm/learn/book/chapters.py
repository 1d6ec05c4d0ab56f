"""The chapters: Markdown whose Python blocks run when the page is made, with what they print below them.

    ```python            runs, and what it prints is shown below it
    ```python quiet      runs, and only what it prints or draws is shown
    ```source            a line such as `ops:norm.rms_norm`: the function as it stands in its file
    ```corpus            golden/corpus.txt, up to the line that stands there
    $...$                a formula in LaTeX; $$...$$ on a line of its own

The blocks of a chapter share their names. `show(drawing)` puts a drawing where what is printed goes. A block that
raises makes no page.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refllm import golden
from refllm.learn.book import formula, sources
from refllm.learn.book.errors import BookError
from refllm.storage import output_file

_FOLDER = Path(__file__).with_name("chapters")
_FENCE = re.compile(r"^```(\w*) ?(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_MATH = re.compile(r"(`[^`]*`)|\$\$(.+?)\$\$|\$([^$\n]+)\$")
_HEADING = re.compile(r"(?<=\n\n)([A-Z][^\n.:]{3,60})(?=\n\n)")


@dataclass(frozen=True)
class Chapter:
    """A chapter as it is written. name: of its page. about: a sentence for the contents. text: what follows."""

    name: str
    title: str
    about: str
    text: str


@cache
def chapters() -> tuple[Chapter, ...]:
    """All chapters in the order of their file names, which begin with a number."""
    return tuple(_read(path) for path in sorted(_FOLDER.glob("*.md")))


def _read(path: Path) -> Chapter:
    title, about, text = path.read_text(encoding="utf-8").split("\n\n", 2)
    return Chapter(path.stem.partition("-")[2], title.removeprefix("# "), " ".join(about.split()), text)


def page(chapter: Chapter, markdown: Callable[[str], Any]) -> str:
    """The chapter as HTML, with its code run. markdown: what makes HTML of prose."""
    parts, end = [], 0
    with _Runner(chapter.name) as runner:
        for found in _FENCE.finditer(chapter.text):
            parts.append(_prose(chapter.text[end : found.start()], markdown))
            parts.append(_block(chapter, runner, markdown, *found.groups()))
            end = found.end()
    return "\n".join([*parts, _prose(chapter.text[end:], markdown)])


def _prose(text: str, markdown: Callable[[str], Any]) -> str:
    return str(markdown(_MATH.sub(_formula, text)))


def _formula(found: re.Match[str]) -> str:
    if found[2]:
        return f'<div class="formula">{formula.from_latex(found[2], display=True)}</div>'
    return found[1] or formula.from_latex(found[3])


def _corpus(until: str) -> str:
    """golden/corpus.txt after its title and up to a line, as Markdown: its headings are lines alone."""
    text = Path(str(golden.__file__)).with_name("corpus.txt").read_text(encoding="utf-8")
    return _HEADING.sub(r"## \1", text.partition("\n")[2].partition(f"\n{until}")[0])


def _block(
    chapter: Chapter, runner: "_Runner", markdown: Callable[[str], Any], language: str, option: str, code: str
) -> str:
    if language == "source":
        folder, name = code.strip().split(":")
        one = sources.function(folder, name)
        return f'<p class="soft from">{one.name}, {one.where}</p>\n{_code(one.text, "block alone")}'
    if language == "corpus":
        return str(markdown(_corpus(code.strip())))
    if language != "python":
        return f'<pre class="block alone">{_escaped(code)}</pre>'
    printed, drawn = runner.run(code)
    shown = [] if option == "quiet" else [_code(code.rstrip("\n"), "block" if printed else "block alone")]
    shown += [f'<pre class="out" tabindex="0" role="region" aria-label="Output">{_escaped(printed)}</pre>'] * bool(
        printed
    )
    return "\n".join(
        [*shown, *(f'<figure class="drawing" tabindex="0" aria-label="Drawing">{one}</figure>' for one in drawn)]
    )


def _code(text: str, kind: str) -> str:
    lines = "\n".join(sources.coloured(text))
    return f'<pre class="{kind}" tabindex="0" role="region" aria-label="Code">{lines}</pre>'


def _escaped(text: str) -> str:
    return text.rstrip("\n").replace("&", "&amp;").replace("<", "&lt;")


class _Runner:
    """Runs the blocks of a chapter, in the folder that has `golden/` in it, from files: a Triton kernel needs one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._drawn: list[str] = []
        self._names: dict[str, Any] = {"__name__": f"chapter_{name}", "show": self._show}
        self._blocks = 0

    def __enter__(self) -> "_Runner":
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.enter_context(contextlib.chdir(Path(str(golden.__file__)).parents[1]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, code: str) -> tuple[str, list[str]]:
        """What the block prints, and what it draws. Raises BookError with the line where it raises."""
        self._blocks += 1
        path = self._folder / f"block_{self._blocks}.py"
        output_file.replace(path, code)
        self._drawn = []
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(code, str(path), "exec"), self._names)
        except Exception as error:
            line = _line(error, str(path))
            raise BookError(f"chapter {self.name}, block {self._blocks}, line {line}: {error!r}") from error
        return out.getvalue(), self._drawn

    def _show(self, drawing: str) -> None:
        self._drawn.append(drawing)


def _line(error: Exception, path: str) -> int:
    return max((line for file, line in _trace(error) if file == path), default=0)


def _trace(error: Exception) -> Iterator[tuple[str, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
