"""The JSON and template files that surround tokenizer.json in a checkpoint folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from refllm.errors import TokenizerError
from refllm.storage import input_file, output_file

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may have, by the names of the configuration files."""

_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def read_config(folder: Path, known: Collection[str]) -> dict[str, Any]:
    """The entries of tokenizer_config.json, completed by the older files and by the chat template files.

    A folder that states `added_tokens_decoder` is complete; otherwise the roles of special_tokens_map.json and the
    tokens of added_tokens.json count too. A chat template file wins over an entry in tokenizer_config.json; the
    chat_template.json of multi-modal processors is the last resort. BOS and EOS are added as tokenizer.json says,
    whatever `add_bos_token` says, as in transformers 5. `known`: the added tokens of tokenizer.json, which it describes
    better than added_tokens.json does.

    Raises TokenizerError for files that are not JSON tables.
    """
    config = _read_table(folder / "tokenizer_config.json")
    for key in ("tokenizer_class", "init_inputs", "auto_map", "add_bos_token", "add_eos_token", "name_or_path"):
        config.pop(key, None)
    if "added_tokens_decoder" not in config:
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        config |= {key: _special(value) for key, value in _read_table(folder / "special_tokens_map.json").items()}
        named = [config.get(role) for role in ROLES]
        special = {_content(token) for token in [*named, *(extra if isinstance(extra, list) else [])]}
        config["added_tokens_decoder"] = {
            index: {"content": token, "special": token in special, "normalized": token not in special}
            for token, index in _read_table(folder / "added_tokens.json").items()
            if token not in known
        }
    templates = _read_templates(folder)
    if templates:
        config["chat_template"] = templates["default"] if [*templates] == ["default"] else templates
    if config.get("chat_template") is None:
        config["chat_template"] = _read_table(folder / "chat_template.json").get("chat_template")
    return config


def _special(value: Any) -> Any:
    """An entry of special_tokens_map.json; where it is a table instead of a string, the token is special too."""
    if isinstance(value, list):
        return [_special(entry) for entry in value]
    return {**value, "special": True} if isinstance(value, dict) and "content" in value else value


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_table(file: Path) -> dict[str, Any]:
    return input_file.read_object(file, TokenizerError) if os.path.lexists(file) else {}


def _read_templates(folder: Path) -> dict[str, str]:
    files = {"default": folder / _TEMPLATE_FILE}
    files |= {file.stem: file for file in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    try:
        return {name: input_file.read_text(file) for name, file in files.items() if os.path.lexists(file)}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(f"{folder}: a chat template file is not readable as text: {reason}") from error


def write_files(
    folder: Path,
    *,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    additional_special_tokens: Sequence[str],
    chat_template: str | dict[str, str] | None,
) -> tuple[str, ...]:
    """Write the folder in the layout that Transformers 4 and 5 read; returns the paths of the files."""
    table = dict(config) | dict(special_tokens) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    roles: dict[str, Any] = dict(special_tokens)
    table.pop("extra_special_tokens", None)
    if additional_special_tokens:
        table["additional_special_tokens"] = roles["additional_special_tokens"] = list(additional_special_tokens)
    texts = {
        "tokenizer.json": backend.to_str(pretty=True) + "\n",
        "tokenizer_config.json": _json(table),
        "special_tokens_map.json": _json(roles),
        **_template_texts(chat_template),
    }
    try:
        for name in texts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        stale = [file for file in _companions(folder) if str(file.relative_to(folder)) not in texts]
        # Without tokenizer.json nobody reads the rest.
        output_file.replace_together(folder, texts, "tokenizer.json", stale)
    except OSError as error:
        raise TokenizerError(f"{folder}: the tokenizer cannot be written: {error.strerror or error}") from None
    return tuple(str(folder / name) for name in texts)


def _companions(folder: Path) -> list[Path]:
    """What a tokenizer that was here before may have left beside tokenizer.json, and `read_config` would take in."""
    names = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", _TEMPLATE_FILE)
    return [*(folder / name for name in names), *(folder / _TEMPLATE_FOLDER).glob("*.jinja")]


def _template_texts(templates: str | dict[str, str] | None) -> dict[str, str]:
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {_TEMPLATE_FILE: templates}
    for name in templates:
        if not _TEMPLATE_NAME.fullmatch(name) or set(name) == {"."}:
            raise TokenizerError(f"chat_template: {name!r} cannot be the name of a template file")
    return {
        _TEMPLATE_FILE if name == "default" else f"{_TEMPLATE_FOLDER}/{name}.jinja": text
        for name, text in templates.items()
    }


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False, default=_token_entry) + "\n"


def _token_entry(value: Any) -> Any:
    if isinstance(value, tokenizers.AddedToken):
        return {"__type": "AddedToken", **value.__getstate__()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
