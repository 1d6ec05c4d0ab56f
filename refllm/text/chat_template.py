"""Chat templates: from a list of messages to the prompt text that the model was trained on.

The template is a jinja2 program stored with the tokenizer. It runs in the sandbox of `template_sandbox.py`, in a
process of its own whose time and memory are limited (`template_process.py`), and sees plain data only: strings,
numbers, lists and dicts. Everything that can go wrong in it is a TokenizerError that says what and, where it is known,
in which line of the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refllm.errors import InputError, TokenizerError
from refllm.text.template_process import NoProcessError, TemplateProcess, warn_of_weaker_limits

MAX_TEMPLATE_CHARS = 1_000_000
_PROCESS = TemplateProcess()
_END_MARK = "\ue000end-of-the-message-to-continue\ue001"  # private-use characters: no message contains them
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, str]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The prompt text of one conversation.

    `variables` are further names that the template sees (`bos_token`, `eos_token`, ...). With
    `continue_final_message` (True for the field "content", or the field's name) the text ends inside the last
    message, so that the model continues it. Raises InputError for messages that are none, TokenizerError for a
    template that does not compile, raises an exception, tries to leave its sandbox, or takes more time, memory or text
    than `template_process.Limits`.
    """
    if continue_final_message and add_generation_prompt:
        raise InputError("continue_final_message and add_generation_prompt exclude each other: set one of them")
    chat = [_with_reasoning_names(message) for message in _plain_messages(messages)]
    field = "content" if continue_final_message is True else continue_final_message
    if field:
        _mark_end(chat[-1], field)
    text = _run(
        template,
        {
            **_plain(variables, "the template variables"),
            "messages": chat,
            "tools": None if tools is None else [_tool_schema(tool) for tool in tools],
            "documents": None if documents is None else _plain(list(documents), "documents"),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut_at_mark(text, field) if field else text


def _run(template: str, variables: dict[str, Any]) -> str:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(f"chat template: it has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}")
    try:
        return _PROCESS.render(template, variables)
    except NoProcessError as error:
        warn_of_weaker_limits(str(error))
        return _run_here(template, variables)


def _run_here(template: str, variables: dict[str, Any]) -> str:
    from refllm.text.template_meter import MeteredEnvironment
    from refllm.text.template_sandbox import rendered, sentence

    try:
        return rendered(MeteredEnvironment, template, variables)
    except Exception as error:
        raise TokenizerError(sentence(error)) from error


# --- plain data in ----------------------------------------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
    """A copy made of exact JSON types, so that no method of a caller's object is within reach of the template."""
    try:
        return _copied(value, where)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a chat template, or a container that holds itself") from None


def _copied(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _copied(value.item(), where)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_copied(key, where): _copied(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copied(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _copied(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    raise InputError(
        f"{where} is of type {type(value).__name__}, but a chat template sees only text, numbers, lists and dicts"
    )


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list of dicts with a role and a content, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages is empty: a conversation has at least one message")
    chat = _plain(list(messages), "messages")
    for i, message in enumerate(chat):
        if not isinstance(message, dict):
            raise InputError(f"messages[{i}] must be a dict with a role and a content, not {type(message).__name__}")
    # None means "absent" in the chat formats of the well-known APIs; templates test for absence only
    return [{key: value for key, value in message.items() if value is not None} for message in chat]


def _with_reasoning_names(message: Message) -> Message:
    """A message's reasoning under every name that templates read it by."""
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tool_schema(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        raise InputError(f"tools must be JSON schemas (dicts), not {type(tool).__name__}")
    return _plain(tool, "tools")


# --- continuing the last message --------------------------------------------------------------------------------------


def _mark_end(message: Message, field: str) -> None:
    text = message.get(field)
    blocks = [block for block in text if isinstance(block, dict) and "text" in block] if isinstance(text, list) else []
    if isinstance(text, str):
        message[field] = text + _END_MARK + " "  # the blank shows whether the template trims the message
    elif blocks:
        blocks[-1]["text"] += _END_MARK + " "
    else:
        raise InputError(f"continue_final_message: the last message has no text under {field!r}")
    if field in _REASONING_NAMES:
        for name in _REASONING_NAMES:
            if message.get(name) == text:
                message[name] = message[field]


def _cut_at_mark(text: str, field: str) -> str:
    end = text.rfind(_END_MARK)
    if end < 0:
        raise TokenizerError(f"chat template: it does not show {field!r} of the last message, which was to continue")
    kept_blank = text.startswith(_END_MARK + " ", end)
    return text[:end] if kept_blank else text[:end].rstrip()
