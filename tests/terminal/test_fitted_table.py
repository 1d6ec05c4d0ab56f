"""Tables on a narrow terminal: they fit, and lose nothing."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from refllm import golden
from refllm.commands import info
from refllm.golden import show
from refllm.golden.manifest import read_manifest
from refllm.golden.verify import Verified, goldens_of
from refllm.kernels.aot import commands
from refllm.kernels.aot import show as aot
from refllm.opcheck.report import show_operators
from refllm.terminal.fitted_table import Table

WIDTH = 80


def printed(item: RenderableType, width: int = WIDTH) -> str:
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(item)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


words = st.text("abcdefghij", min_size=1, max_size=9)
prose = st.lists(words, min_size=1, max_size=8).map(" ".join)


@settings(max_examples=30)
@given(st.data(), st.integers(30, 100), st.integers(1, 9), st.integers(1, 4))
def test_a_table_fits_and_every_word_of_it_is_there_whole(data: Any, width: int, columns: int, rows: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    cells = [[data.draw(words if index % 2 else prose) for index in range(columns)] for _ in range(rows)]
    for index in range(columns):
        table.add_column(data.draw(words), justify="right" if index % 2 else "left", no_wrap=index == 1)
    for row in cells:
        table.add_row(*row)
    text = printed(table, width)
    assert max(map(len, text.splitlines())) <= width
    shown = text.split()
    for word in {word for row in cells for cell in row for word in cell.split()}:
        assert shown.count(word) >= sum(word in cell.split() for row in cells for cell in row)


def test_a_table_that_fits_is_as_rich_shows_it_and_one_that_does_not_repeats_its_first_column() -> None:
    def table(kind: Any) -> Any:
        made = kind(box=None, padding=(0, 2, 0, 0))
        for name in ("value", *(f"figure {n}" for n in range(8))):
            made.add_column(name, justify="left" if name == "value" else "right")
        for row in range(3):
            made.add_row(f"row {row}", *(f"{1000.0 + row * n:.4f}" for n in range(8)))
        return made

    from rich.table import Table as RichTable

    assert printed(table(Table), 200) == printed(table(RichTable), 200)
    narrow = printed(table(Table), 50)
    assert narrow.count("row 0") == 2
    assert narrow.count("1000.0000") == printed(table(RichTable), 200).count("1000.0000")
    assert narrow != printed(table(RichTable), 50)


def tables() -> dict[str, RenderableType]:
    manifest = read_manifest(golden.FOLDER)
    (one,) = goldens_of(golden.FOLDER, manifest, ["attention/masked-nan"])
    verified = Verified("triton", "bfloat16", 86, 1.2, 5.5, "stablelm/tiny-parallel-cache logits")
    return {
        "golden show": show.table_of_cases(manifest, list(manifest["cases"])),
        "golden show NAME": show.table_of_tensors(one),
        "golden verify": show.table_of_verified([verified]),
        "info": info.show_info(info.describe(Path(golden.path("arcee-tiny"))), tensors=True),
        "check-op --list": show_operators(),
        "kernels list": aot.show_list(commands.describe(), True),
    }


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return {name: printed(table) for name, table in tables().items()}


@pytest.mark.filterwarnings("ignore:.*factor=20")
@pytest.mark.parametrize(
    "name", ["golden show", "golden show NAME", "golden verify", "info", "check-op --list", "kernels list"]
)
def test_what_a_command_prints_fits_eighty_columns_uncut(name: str, rendered: dict[str, str]) -> None:
    assert max(map(len, rendered[name].splitlines())) <= WIDTH
    assert "\N{HORIZONTAL ELLIPSIS}" not in rendered[name]
