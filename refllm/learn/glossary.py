"""The words of the reports and what they mean: glossary.toml, read and looked up."""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refllm.errors import InputError

FILE = Path(__file__).with_name("glossary.toml")


@dataclass(frozen=True)
class Term:
    """An entry. name: as reports have it. means: a sentence or two. more: how it comes about, or an example; may be
    empty. also: other words for it. see: the names of entries to read next."""

    name: str
    means: str
    more: str = ""
    also: tuple[str, ...] = ()
    see: tuple[str, ...] = ()


@cache
def terms() -> dict[str, Term]:
    """Every entry by its name, in the order of the file."""
    entries = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {name: _term(name, entry) for name, entry in entries.items()}


def _term(name: str, entry: dict[str, object]) -> Term:
    listed = {key: tuple(value) if isinstance(value, list) else str(value).strip() for key, value in entry.items()}
    return Term(name, **listed)  # type: ignore[arg-type]


def find(word: str) -> Term:
    """The entry for a word, whatever its case, spaces and final colon. Raises InputError for one that has none."""
    known = {_plain(other): term for term in terms().values() for other in (*term.also, term.name)}
    wanted = _plain(word)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "refllm learn term lists all"
    raise InputError(f"{word!r} is no term of the reports; {hint}")


def _plain(word: str) -> str:
    return " ".join(word.lower().removeprefix("grad:").rstrip(":").split())
