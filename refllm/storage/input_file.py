"""Every text that refllm reads whole: regular files only, and no more of them than fits into memory many times over.

A named pipe would be waited for, a device or a link to one read without end, and a file of 300 MB of `[],[],` becomes
gigabytes of lists. So the kind of file and its size are asked before it is read, and JSON is counted before it is
parsed. What is refused is an OSError or a ValueError whose text is the reason; the caller says which file it was.
"""

import errno
import json
import os
import stat
import warnings
from typing import Any

from refllm.errors import RefllmError
from refllm.storage.json_text import show
from refllm.storage.output_file import kind_of_file

TEXT_LIMIT = 64 << 20
"""Bytes of a configuration, an index or a template. The largest published ones have a few MB."""
VALUES_LIMIT = 4_000_000
"""Values of a JSON file: each takes 100 bytes of memory or so."""


def read_bytes(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> bytes:
    """A regular file's content. Raises OSError for another kind of file and for one of more than `limit` bytes."""
    # Asked before it is opened: to open a device may already do something.
    must_be_regular(path)
    # Without O_NONBLOCK a named pipe that has come in between would be waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        _must_be_regular(os.fstat(handle).st_mode, path)
        size = os.fstat(handle).st_size
        content = b"" if size > limit else file.read(size + 1)
        if len(content) > size:  # it has grown, or is of a kind that tells no size
            content += file.read(limit + 1 - len(content))
        if max(size, len(content)) > limit:
            size = max(size, len(content))
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {limit} are read", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """A regular file's text, with "\\n" at the ends of lines. Raises OSError as `read_bytes`, ValueError if it is not
    UTF-8."""
    try:
        text = read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> Any:
    """What a JSON file holds. Raises OSError and ValueError as `read_text`, and ValueError for what is not JSON.

    Of a key that an object has twice the last counts, as everywhere; here with a warning that names both values.
    """
    text = read_text(path, limit)
    count_values(text)

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            _warn_of_repeated_keys(os.fspath(path), pairs)
        return found

    try:
        return json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: str | os.PathLike[str], error: type[RefllmError]) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error`, with the file and the reason, for whatever is wrong."""
    where = os.fspath(path)
    try:
        values = read_json(path)
    except OSError as reason:
        raise error(f"{where}: the file cannot be read ({reason.strerror or reason})") from reason
    except ValueError as reason:  # JSON, UTF-8, numbers of thousands of digits, nesting
        raise error(f"{where}: the file is not valid JSON ({reason})") from reason
    if not isinstance(values, dict):
        raise error(f"{where}: the file holds {show(values)}, not a JSON object")
    return values


def count_values(text: str | bytes, limit: int = VALUES_LIMIT) -> None:
    """Raises ValueError for JSON of more than `limit` values; counted without parsing it, commas in strings too."""
    if isinstance(text, str):
        found = sum(text.count(mark) for mark in ",[{")
    else:
        found = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if found > limit:
        raise ValueError(f"it holds about {found} values, and at most {limit} are read")


def must_be_regular(path: str | os.PathLike[str]) -> None:
    """Raises OSError for what is not a regular file, or a link to one."""
    _must_be_regular(os.stat(path).st_mode, path)


def _must_be_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of_file(mode)}", os.fspath(path))


def _warn_of_repeated_keys(path: str, pairs: list[tuple[str, Any]]) -> None:
    values: dict[str, list[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    for key, given in values.items():
        if len(given) > 1:
            told = " and ".join(show(value) for value in given[:4])
            text = f"{path}: the key {show(key)} stands there {len(given)} times, with {told}; the last one counts"
            warnings.warn(text, UserWarning, stacklevel=2)
