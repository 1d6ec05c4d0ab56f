"""Text to token ids and back: the files of a Hugging Face tokenizer, run by the `tokenizers` library.

`tokenizer.json` defines everything about the encoding: normalizer, pre-tokenizer, model, decoder, and the
post-processor that puts BOS and EOS around a text. `tokenizer_config.json` (older folders: `special_tokens_map.json`,
`added_tokens.json`) adds the roles of the special tokens, the padding side, the length limit and the chat template.
The Python class named in `tokenizer_config.json` is not consulted, and no code of a checkpoint is ever executed.
Behaviour follows transformers 5 (`tokenization_utils_tokenizers.py`, class TokenizersBackend).
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from refllm import devices
from refllm.errors import InputError, RefllmError, TokenizerError
from refllm.inputs import is_tensor, refuse_unknown
from refllm.storage import hub_cache, input_file
from refllm.storage.not_a_checkpoint import explain
from refllm.text import growth
from refllm.text.arguments import as_array, as_ids, check_pair, check_text, check_unicode
from refllm.text.entries import (
    read_added_tokens,
    read_extra_tokens,
    read_number,
    read_side,
    read_templates,
    read_token,
    with_stored_padding,
)
from refllm.text.files import ROLES, read_config, write_files

NO_LENGTH_LIMIT = int(1e30)
"""`model_max_length` of a tokenizer that states none; the value Transformers writes into files for the same meaning."""

_LONGEST_REAL_LIMIT = int(1e20)
_LARGEST_FILE, _MOST_VALUES = 1 << 27, 1 << 23
"""The limits of a tokenizer.json: four times what the vocabularies of a quarter of a million tokens need."""
_OTHER_FORMATS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json")

Text = str | Sequence[str]


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose entries are attributes too (`encoding.input_ids`).

    `encodings` holds the `tokenizers.Encoding` of each text, for offsets and words.
    """

    def __init__(self, values: Mapping[str, Any], encodings: Sequence[tokenizers.Encoding] = ()) -> None:
        super().__init__(values)
        self.encodings = list(encodings)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}, only {', '.join(self)}") from None

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """This encoding, its tensors moved to a device; arrays and lists are on none. See `refllm.devices.found`."""
        where = devices.found(device)
        self.update({name: value.to(where) for name, value in self.items() if is_tensor(value)})
        return self

    def tokens(self, index: int = 0) -> list[str]:
        """The tokens of text `index`, as strings of the vocabulary."""
        return list(self.encodings[index].tokens)


class _Role:
    """A special token by its role: `tokenizer.pad_token` reads or sets the token (None: there is none)."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Tokenizer, owner: type) -> str | None:
        return tokenizer.special_tokens_map.get(self.name)

    def __set__(self, tokenizer: Tokenizer, token: str | None) -> None:
        tokenizer._set_role(self.name, token)


class _RoleId:
    """The id of a special token by its role: `tokenizer.pad_token_id`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role = name.removesuffix("_id")

    def __get__(self, tokenizer: Tokenizer, owner: type) -> int | None:
        token = tokenizer.special_tokens_map.get(self.role)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: Tokenizer, token_id: int | None) -> None:
        tokenizer._set_role(self.role, None if token_id is None else tokenizer.convert_ids_to_tokens(token_id))


class Tokenizer:
    """A tokenizer with the call and the attributes of Transformers' fast tokenizers, NumPy arrays out.

    Args:
        backend: the `tokenizers.Tokenizer` that does the work; it belongs to this object from now on.
        config: the entries of tokenizer_config.json: `bos_token` ... `mask_token`, `additional_special_tokens`,
            `added_tokens_decoder`, `padding_side`, `truncation_side`, `model_max_length`, `chat_template`,
            `clean_up_tokenization_spaces`, `split_special_tokens`, `model_input_names`. Others are kept and written
            back.

    Raises TokenizerError for entries that no tokenizer can have.
    """

    bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token = (_Role() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, sep_token_id = _RoleId(), _RoleId(), _RoleId(), _RoleId()
    pad_token_id, cls_token_id, mask_token_id = _RoleId(), _RoleId(), _RoleId()

    def __init__(self, backend: tokenizers.Tokenizer, /, **config: Any) -> None:
        self.backend_tokenizer = backend
        self._config = with_stored_padding(backend, config)
        self.padding_side = read_side(self._config, "padding_side")
        self.truncation_side = read_side(self._config, "truncation_side")
        limit = self._config.get("model_max_length")
        self.model_max_length = NO_LENGTH_LIMIT if limit is None else int(read_number(limit, "model_max_length"))
        self.model_input_names = list(self._config.get("model_input_names", ("input_ids", "attention_mask")))
        self.clean_up_tokenization_spaces = bool(self._config.get("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(self._config.get("split_special_tokens", False))
        self.chat_template = read_templates(self._config.get("chat_template"))
        self.special_tokens_map: dict[str, str] = {}
        self.additional_special_tokens: list[str] = []
        self._add_special_tokens()
        self._growth, self._growth_of_ids = growth.of_text(backend), growth.of_ids(backend)
        if "add_bos_token" in config or "add_eos_token" in config:
            self._set_bos_and_eos(bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))

    # --- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, or of a model of the hub that is in its local cache.

        `overrides` win over the entries of tokenizer_config.json; those of `hub_cache.KEYWORDS` say where the folder
        is. Raises TokenizerError for a folder without a tokenizer.json that the `tokenizers` library can read.
        """
        folder = hub_cache.local_folder(folder, overrides)
        # There is one kind of tokenizer here, and the model's config and class say nothing about it.
        nothing_to_choose = hub_cache.KEYWORDS | {"use_fast", "config", "tokenizer_type", "legacy", "device_map"}
        overrides = {name: value for name, value in overrides.items() if name not in nothing_to_choose}
        backend = _read_backend(folder)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        return cls(backend, **(read_config(folder, known) | overrides))

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates; the names."""
        config = self._config | {
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }
        for role in ROLES:
            config.pop(role, None)
        config.pop("chat_template", None)
        config.pop("added_tokens_decoder", None)
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return write_files(
            Path(folder),
            backend=self.backend_tokenizer,
            config=config,
            special_tokens=self.special_tokens_map,
            additional_special_tokens=self.additional_special_tokens,
            chat_template=self.chat_template,
        )

    # --- special tokens -----------------------------------------------------------------------------------------------

    def _add_special_tokens(self) -> None:
        """Tell the backend about every token of the configuration that it does not know as an added token yet."""
        decoder = read_added_tokens(self._config.get("added_tokens_decoder"))
        roles = {key: value for key, value in self._config.items() if key in ROLES and value is not None}
        named, extra = read_extra_tokens(self._config)
        pending = [decoder[index] for index in sorted(decoder)]
        known = {token.content for token in self.backend_tokenizer.get_added_tokens_decoder().values()}
        known |= {token.content for token in pending}
        for key, value in (roles | named).items():
            token = read_token(value, key)
            self.special_tokens_map[key] = token.content
            pending += [] if token.content in known else [token]
            known.add(token.content)
        for value in extra:
            token = read_token(value, "additional_special_tokens")
            self.additional_special_tokens.append(token.content)
            pending += [] if token.content in known else [token]
            known.add(token.content)
        for token in pending:
            token.special = token.special or token.content in self.special_tokens_map.values()
        self.backend_tokenizer.add_tokens(pending)
        for index, token in decoder.items():
            got = self.backend_tokenizer.token_to_id(token.content)
            if got != index:
                warnings.warn(
                    f"tokenizer_config.json gives the token {token.content!r} the id {index}, tokenizer.json {got}; "
                    f"the latter is used",
                    stacklevel=4,
                )

    def _set_role(self, role: str, token: str | None) -> None:
        if token is None:
            self.special_tokens_map.pop(role, None)
            return
        if not isinstance(token, str):
            raise InputError(f"{role} must be a string or None, not {type(token).__name__}")
        self.special_tokens_map[role] = token

    def _set_bos_and_eos(self, bos: bool, eos: bool) -> None:
        """Replace the post-processor by one that adds BOS and EOS as asked for in the call to from_pretrained."""
        before = [(self.bos_token, self.bos_token_id)] if bos and self.bos_token else []
        after = [(self.eos_token, self.eos_token_id)] if eos and self.eos_token else []

        def sequence(name: str, segment: int) -> str:
            parts = [*(token for token, _ in before), f"${name}", *(token for token, _ in after)]
            return " ".join(f"{part}:{segment}" for part in parts)

        self.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=sequence("A", 0), pair=f"{sequence('A', 0)} {sequence('B', 1)}", special_tokens=[*before, *after]
        )

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once: the roles first, then the additional ones."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.additional_special_tokens]))

    @property
    def extra_special_tokens(self) -> list[str]:
        """The name of Transformers 5 for `additional_special_tokens`."""
        return self.additional_special_tokens

    @property
    def all_special_ids(self) -> list[int]:
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]

    # --- vocabulary ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, special tokens {self.special_tokens_map})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the model inside the tokenizer, without the added ones."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token (the unknown token's, or None, for what is no token), or a list of ids for a list."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        check_unicode(tokens, "the token")
        index = self.backend_tokenizer.token_to_id(tokens)
        if index is None and self.unk_token is not None:
            index = self.backend_tokenizer.token_to_id(self.unk_token)
        return index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id (None for an id that no token has), or a list of tokens for a list or array of ids."""
        values = as_ids(ids)
        if isinstance(values, int):
            return self.backend_tokenizer.id_to_token(values)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(index) for index in values if index not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens given as strings of the vocabulary."""
        for token in tokens:
            check_unicode(token, "the token")
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    # --- text to ids --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: Text,
        text_pair: Text | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        **unknown: Any,
    ) -> BatchEncoding:
        """Token ids of one text or of a batch of texts.

        `input_ids` and `attention_mask` (1 for a token, 0 for padding), as lists; with `return_tensors="np"` as int64
        arrays [B, S], with "pt" as tensors of Torch, for one text too. `padding` is False, True or "longest",
        "max_length"; `truncation` is False, True or one of "longest_first", "only_first", "only_second". A `max_length`
        alone truncates. Special tokens are added as the post-processor of tokenizer.json says.

        Raises InputError for arguments that do not fit together: no text, padding without a pad token, texts of
        several lengths for one array.
        """
        refuse_unknown(unknown, _ARGUMENTS, "tokenizer")
        batched = check_text(text, "text", is_split_into_words)
        if text_pair is not None:
            check_pair(text, text_pair, batched, is_split_into_words)
        pad_to, cut_to, strategy = self._lengths(padding, truncation, max_length, pad_to_multiple_of)
        self._set_truncation(cut_to, strategy, stride)
        self._set_padding(padding, pad_to, pad_to_multiple_of, padding_side)
        self.backend_tokenizer.encode_special_tokens = self.split_special_tokens
        for one in [*(text if batched else [text]), *(text_pair if batched and text_pair else [text_pair or ""])]:
            growth.refuse("a text", len(one) if isinstance(one, str) else sum(map(len, one)), self._growth)
        batch: list[Any] = list(text) if batched else [text]
        if text_pair:
            batch = list(zip(batch, text_pair if batched else [text_pair], strict=True))
        with _library_errors_as(InputError, "the text cannot be encoded in this way"):
            encodings = self.backend_tokenizer.encode_batch(
                batch, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        names = self.model_input_names
        values: dict[str, Any] = {"input_ids": [e.ids for e in encodings]}
        if return_token_type_ids or (return_token_type_ids is None and "token_type_ids" in names):
            values["token_type_ids"] = [e.type_ids for e in encodings]
        if return_attention_mask or (return_attention_mask is None and "attention_mask" in names):
            values["attention_mask"] = [e.attention_mask for e in encodings]
        if return_special_tokens_mask:
            values["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets_mapping:
            values["offset_mapping"] = [e.offsets for e in encodings]
        if return_length:
            values["length"] = [len(e.ids) for e in encodings]
        if verbose and max_length is None:
            self._warn_if_too_long(values["input_ids"])
        if return_tensors is not None:
            values = {name: as_array(name, rows, return_tensors) for name, rows in values.items()}
        elif not batched:
            values = {name: rows[0] for name, rows in values.items()}
        return BatchEncoding(values, encodings)

    def encode(self, text: Text, text_pair: Text | None = None, **options: Any) -> Any:
        """The token ids of a text: `tokenizer(text, ...).input_ids`."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as strings of the vocabulary."""
        return self(text, add_special_tokens=add_special_tokens, verbose=False).tokens()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens the post-processor adds to a text, or to a pair of texts."""
        return int(self.backend_tokenizer.num_special_tokens_to_add(pair))

    def _lengths(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None, multiple: int | None
    ) -> tuple[int | None, int | None, str]:
        """Length to pad to (None: the longest of the batch), length to cut to (None: do not), truncation strategy."""
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise InputError(f"padding={padding!r} is not one of False, True, 'longest', 'max_length', 'do_not_pad'")
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        if padding is True and max_length is not None and not truncation:
            warnings.warn("max_length has no effect with padding=True: use padding='max_length'", stacklevel=4)
        strategy = "longest_first" if truncation is True else truncation or "do_not_truncate"
        if strategy not in ("longest_first", "only_first", "only_second", "do_not_truncate"):
            raise InputError(
                f"truncation={truncation!r} is not one of False, True, 'longest_first', 'only_first', 'only_second'"
            )
        limit = self.model_max_length if self.model_max_length <= _LONGEST_REAL_LIMIT else None
        length = limit if max_length is None else max_length
        cut_to = None if strategy == "do_not_truncate" else length
        pad_to = length if padding == "max_length" else None
        if cut_to and multiple and padding not in (False, "do_not_pad") and cut_to % multiple:
            raise InputError(f"max_length={cut_to} is not a multiple of pad_to_multiple_of={multiple}")
        return pad_to, cut_to, strategy

    def _set_truncation(self, length: int | None, strategy: str, stride: int) -> None:
        if length is None:
            self.backend_tokenizer.no_truncation()
            return
        with _library_errors_as(InputError, f"max_length={length} with stride={stride} cannot be truncated to"):
            self.backend_tokenizer.enable_truncation(
                length, stride=stride, strategy=strategy, direction=self.truncation_side
            )

    def _set_padding(self, padding: bool | str, length: int | None, multiple: int | None, side: str | None) -> None:
        if padding in (False, "do_not_pad") or (padding == "max_length" and length is None):
            self.backend_tokenizer.no_padding()
            return
        if side not in (None, "left", "right"):
            raise InputError(f"padding_side={side!r} is neither 'left' nor 'right'")
        if self.pad_token is None or self.pad_token_id is None:
            raise InputError("padding needs a pad token, and this tokenizer has none: set tokenizer.pad_token first")
        self.backend_tokenizer.enable_padding(
            length=length,
            direction=self.padding_side if side is None else side,
            pad_id=self.pad_token_id,
            pad_token=self.pad_token,
            pad_type_id=0,
            pad_to_multiple_of=multiple,
        )

    def _warn_if_too_long(self, rows: list[list[int]]) -> None:
        longest = max(map(len, rows), default=0)
        if longest > self.model_max_length:
            warnings.warn(
                f"the text has {longest} tokens, more than the tokenizer's model_max_length={self.model_max_length}",
                stacklevel=3,
            )

    # --- ids to text --------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """The text of token ids: of an int, a list or a 1-D array one string; of nested lists or a 2-D array a list.

        Ids that no token has are left out. Raises InputError for what is no id.
        """
        refuse_unknown(unknown, ("skip_special_tokens", "clean_up_tokenization_spaces"), "decode")
        values = as_ids(token_ids)
        if isinstance(values, int):
            values = [values]
        if values and isinstance(values[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in values]
        growth.refuse("what tokens stand for,", 16 * len(values), self._growth_of_ids)
        with _library_errors_as(InputError, "these ids cannot be decoded"):
            text = str(self.backend_tokenizer.decode(values, skip_special_tokens=skip_special_tokens))
        asked = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if asked is None else asked:
            text = self._without_token_spaces(text)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **unknown: Any,
    ) -> list[str]:
        """The texts of a batch of token id sequences."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces, **unknown)
        return [texts] if isinstance(texts, str) else texts

    def _without_token_spaces(self, text: str) -> str:
        """Undo the blanks that a word-level tokenizer puts before punctuation. A BPE tokenizer keeps its blanks in the
        tokens, and removing them would damage the text, so there it only happens when the configuration insists."""
        insists = self._config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        if isinstance(self.backend_tokenizer.model, tokenizers.models.BPE) and not insists:
            return text
        text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
        return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)

    # --- chat ---------------------------------------------------------------------------------------------------------

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template for a call: a named one, the text given, the one for tools if there is one, or the default."""
        if isinstance(self.chat_template, dict):
            named = self.chat_template
            wanted = chat_template or ("tool_use" if tools is not None and "tool_use" in named else "default")
            if wanted in named:
                return named[wanted]
            if chat_template is None:
                raise TokenizerError(f"this tokenizer has no default chat template: name one of {sorted(named)}")
            return chat_template
        template = self.chat_template if chat_template is None else chat_template
        if template is None:
            raise TokenizerError("this tokenizer has no chat template: pass the prompt as text, or a chat_template")
        return template

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The prompt of a conversation, or of a list of conversations, by the model's chat template.

        `conversation` is a list of messages `{"role": ..., "content": ...}`. Returns the text with `tokenize=False`,
        else what calling the tokenizer on it returns (`return_dict=False`: the ids alone). `variables` are further
        names that the template sees.

        Raises InputError for messages that are none, TokenizerError for a missing or a misbehaving template.
        """
        for name in ("sanitize_control_tokens", "return_assistant_tokens_mask"):
            if variables.pop(name, False):
                raise InputError(f"apply_chat_template: {name} is not supported")
        from refllm.text.chat_template import render

        batched = isinstance(conversation, Sequence) and len(conversation) > 0 and isinstance(conversation[0], list)
        template = self.get_chat_template(chat_template, tools)
        texts = [
            render(
                template,
                chat,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(self.special_tokens_map | variables),
            )
            for chat in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(
            texts if batched else texts[0],
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoding if return_dict else encoding["input_ids"]


_ARGUMENTS = frozenset(inspect.signature(Tokenizer.__call__).parameters) - {"self", "unknown"}


class AutoTokenizer:
    """The tokenizer of a checkpoint, whatever the family."""

    @staticmethod
    def from_pretrained(folder: str | Path, **overrides: Any) -> Tokenizer:
        """`Tokenizer.from_pretrained`: raises TokenizerError for a folder without a readable tokenizer.json."""
        return Tokenizer.from_pretrained(folder, **overrides)


def warn_about_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Warn if the tokenizer has ids for which a model of `vocab_size` has no embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        warnings.warn(
            f"the tokenizer has ids up to {largest}, but the model's vocab_size is {vocab_size}: some texts will be "
            f"refused (are they of the same checkpoint?)",
            stacklevel=3,
        )


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: {explain(folder)}")
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        others = (name for name in _OTHER_FORMATS if (folder / name).is_file())
        hint = next((f" (a {name} has to be converted: save the tokenizer with Transformers)" for name in others), "")
        raise TokenizerError(f"{folder}: no tokenizer.json{hint}")
    try:
        content = input_file.read_bytes(file, _LARGEST_FILE)
        input_file.count_values(content, _MOST_VALUES)
        growth.refuse_file(content)
    except OSError as error:
        raise TokenizerError(f"{folder}: no tokenizer.json can be read: {error.strerror or error}") from None
    except ValueError as error:
        raise TokenizerError(f"{file}: {error}") from None
    with _library_errors_as(TokenizerError, f"{file}: not a tokenizer that the tokenizers library can read"):
        return tokenizers.Tokenizer.from_buffer(content)


@contextmanager
def _library_errors_as(kind: type[RefllmError], what: str) -> Iterator[None]:
    """The Rust library raises plain Exception, and where it panics something that is no Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise kind(f"{what}: {reason}") from error
