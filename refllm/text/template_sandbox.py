"""The jinja2 environment in which chat templates run: a chat template is a program that came with a downloaded file.

It is jinja2's own immutable sandbox (no private attributes, no mutation of lists and dicts), made stricter: touching a
forbidden attribute is an error at once instead of an empty value. It bounds neither time nor memory. That is done by
the operating system, since templates run in a process of their own (`template_process.py`), and where there is no such
process by counting their work (`template_meter.py`).

The dialect is the one of Hugging Face chat templates: `trim_blocks`, `lstrip_blocks`, loop controls, `tojson` without
HTML escapes, `raise_exception`, `strftime_now` and the `{% generation %}` block (transformers,
`utils/chat_template_utils.py`). This module needs jinja2 and little else, so that the process is there in no time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SENTENCE_CHARS = 1000
"""Longest sentence about what a template did. Templates put messages, and themselves, into what they raise."""


class OverLimitError(BaseException):
    """A limit was reached, and this sentence says which. No `Exception`, which jinja2 would catch where it folds
    constants."""


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(pattern: str) -> str:
    """The function `strftime_now`: the local time, formatted."""
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _DictFactory:
    """`dict` in a template: makes dicts, but is not the type, whose unbound methods could change the messages."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _PublicNamespace(Namespace):
    """jinja2's namespace() without private attributes, which could shadow what the interpreter looks up."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named `self`, so that namespace(self=1) works
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # the values stay out: namespaces can hold each other
        return "<Namespace>"


def _require_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores the private attribute {name!r} in a namespace")


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - the jinja2 API wants a plain class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": strftime_now,
            "dict": _DictFactory(),
            "namespace": _PublicNamespace,
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """A forbidden attribute: refuse now. (jinja2 would return a value that only fails when it is used.)"""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    @staticmethod
    def begin() -> None:
        """Called before each rendering, compiling included."""


def rendered(environment: type[ChatTemplateEnvironment], template: str, variables: dict[str, Any]) -> str:
    """The text. Raises whatever goes wrong in the template; `sentence` says it in words."""
    environment.begin()
    program = _compiled(cast(Any, environment), template)  # a class is hashable, whatever its instances are
    try:
        return program.render(variables)
    except OverLimitError:
        program.environment.handle_exception()  # which jinja2 itself does for any other: lines become the template's


@functools.lru_cache(maxsize=32)
def _compiled(environment: type[ChatTemplateEnvironment], template: str) -> jinja2.Template:
    return environment().from_string(template)


def sentence(error: BaseException) -> str:
    """What went wrong and, where it is known, in which line of the template."""
    line = _template_line(error)
    where = "chat template" if line is None else f"chat template, line {line}"
    return f"{where}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it recurses without end"
    text = " ".join(str(error)[: MAX_SENTENCE_CHARS + 1].split()).rstrip(".")
    if len(text) > MAX_SENTENCE_CHARS:
        text = text[:MAX_SENTENCE_CHARS] + " ..."
    if isinstance(error, (jinja2.TemplateError, OverLimitError)):
        return text or "it raised an exception without a message"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _template_line(error: BaseException) -> int | None:
    """The line of the template in which the error arose: jinja2 puts frames named "<template>" into the traceback."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
