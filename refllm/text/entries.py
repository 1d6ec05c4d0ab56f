"""Reading the entries of tokenizer_config.json; what no tokenizer can have is a TokenizerError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from refllm.errors import TokenizerError
from refllm.text.files import ROLES


def with_stored_padding(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, completed by the padding and truncation that tokenizer.json itself may hold."""
    stored: dict[str, Any] = {}
    if backend.truncation is not None:
        stored["truncation_side"] = backend.truncation["direction"]
    if backend.padding is not None:
        stored |= {"pad_token": backend.padding["pad_token"], "padding_side": backend.padding["direction"]}
    return stored | {key: value for key, value in config.items() if key not in ("add_bos_token", "add_eos_token")}


def read_side(config: Mapping[str, Any], key: str) -> str:
    """ "left" or "right", which is the default."""
    side = config.get(key, "right")
    if side not in ("left", "right"):
        raise TokenizerError(f"{key}={side!r} is neither 'left' nor 'right'")
    return str(side)


def read_number(value: Any, key: str) -> int | float:
    """A number that is not negative and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise TokenizerError(f"tokenizer_config.json: {key}={value!r} is not a number of tokens")
    return value


def read_templates(templates: Any) -> str | dict[str, str] | None:
    """One template, or several by name: the file format stores several as a list of {"name", "template"}."""
    if isinstance(templates, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in templates}
        except (TypeError, KeyError):
            raise TokenizerError(
                "chat_template: a list of templates needs a name and a template in each entry"
            ) from None
    if templates is None or isinstance(templates, str):
        return templates
    if not isinstance(templates, dict) or not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise TokenizerError("chat_template must be text, or a table of names and texts")
    return templates


def read_token(value: Any, key: str) -> AddedToken:
    """A token given as text (then it is special) or as a table of its text and flags."""
    if isinstance(value, AddedToken):
        return value
    content = value.get("content") if isinstance(value, Mapping) else value
    if isinstance(content, str) and content.encode("utf-8", "replace") != content.encode("utf-8", "surrogatepass"):
        raise TokenizerError(f"tokenizer_config.json: {key}={value!a} holds half a surrogate pair, which is no text")
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})
    raise TokenizerError(f"tokenizer_config.json: {key}={value!r} is neither a token nor null")


def read_added_tokens(entries: Any) -> dict[int, AddedToken]:
    """The entry added_tokens_decoder: id -> token, the ids as JSON keys."""
    if not isinstance(entries, Mapping | None):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder is not a table of ids and tokens")
    try:
        return {int(i): read_token(token, "added_tokens_decoder") for i, token in (entries or {}).items()}
    except ValueError as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder has a key that is no id: {error}") from error


def read_extra_tokens(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Special tokens beyond the usual roles: those with a role name of their own, and those without one."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, (str, AddedToken))
    }
    if isinstance(extra, Mapping):
        return named | dict(extra), []
    if not isinstance(extra, (list, tuple)):
        raise TokenizerError("tokenizer_config.json: additional_special_tokens is not a list of tokens")
    return named, list(extra)
