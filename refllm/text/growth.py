"""How much longer the rules of a tokenizer.json can make a text: nine rules that write ten letters for one make 10^9.

A bound for every step that can lengthen what it is given; the product over all of them is the bound of the whole. What
no real tokenizer has is refused where the text would come out too long, before the library fills the memory with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import tokenizers

from refllm.errors import InputError

ORDINARY = 32.0
"""What the rules of published tokenizers stay far below; they are never refused."""
LIMIT = 4_000_000
"""Characters that rules beyond the ordinary may make of a text: some seconds, some hundreds of MB."""

Rule = dict[str, Any]


def refuse_file(content: bytes) -> None:
    """Raises InputError for a tokenizer.json whose normalizer would make its own added tokens too long.

    The library runs it over them as it reads the file. Most of a file is the vocabulary, which comes last and is not
    parsed here, unless the name of the normalizer stands in it, in letters or in their escapes.
    """
    head, _, tail = content.partition(b'"model"')
    try:
        if b"normalizer" in tail or re.search(rb"\\u00[4-7]", tail):
            table = json.loads(content)
        else:
            table = json.loads(head + b'"model":{}}')
        longest = max((len(token["content"]) for token in table["added_tokens"] if token["normalized"]), default=0)
        growth = _of_rule(table["normalizer"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # it has neither, or is no tokenizer.json, which the library says better
    refuse("an added token", longest, growth)


def of_text(backend: tokenizers.Tokenizer) -> float:
    """The factor by which encoding can lengthen a text, at most."""
    return _growth(backend.normalizer) * _growth(backend.pre_tokenizer) * _growth(backend.post_processor)


def of_ids(backend: tokenizers.Tokenizer) -> float:
    """The factor by which decoding can lengthen the strings of the tokens, at most."""
    return _growth(backend.decoder)


def refuse(what: str, length: int, growth: float) -> None:
    """Raises InputError where `length` characters may become too many. what: "a text"."""
    if growth > ORDINARY and length * growth > LIMIT:
        raise InputError(
            f"{what} of {length} characters could become {growth:.0e} times as long by the rules of this tokenizer.json"
        )


def _growth(step: Any) -> float:
    try:
        rule = json.loads(step.__getstate__())
    except Exception:  # there is no such step, or it is written in Python, by the caller
        return 1.0
    return _of_rule(rule)


def _of_rule(rule: Rule) -> float:
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        if isinstance(rule.get(name), list):
            return math.prod((_of_rule(inner) for inner in rule[name]), start=1.0)
    return _RULES.get(str(rule.get("type")), lambda _: 1.0)(rule)


def _of_replace(rule: Rule) -> float:
    pattern, content = rule["pattern"], rule["content"]
    if "String" in pattern:
        return max(1.0, len(content) / max(1, len(pattern["String"])))
    return 1.0 + len(content)  # a regular expression may match nothing, and so before every character


def _of_template(rule: Rule) -> float:
    return float(max(sum("Sequence" in piece for piece in rule[name]) for name in ("single", "pair")))


_RULES: dict[str, Callable[[Rule], float]] = {
    "Replace": _of_replace,
    "Prepend": lambda rule: 1.0 + len(rule["prepend"]),
    "Precompiled": lambda rule: 4.0,
    "NFKC": lambda rule: 2.0,
    "NFKD": lambda rule: 2.0,
    "BertNormalizer": lambda rule: 3.0,
    "ByteLevel": lambda rule: 2.0,  # a byte above 127 becomes a character of two
    "TemplateProcessing": _of_template,
}
