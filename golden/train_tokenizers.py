"""Trains the tokenizers of the embedded checkpoints on corpus.txt: the same bytes on every run.

Each copies the make of a published tokenizer of its family (normalizer, pre-tokenizer, byte handling, where BOS comes
from, where the chat template is stored), with a vocabulary of a few hundred pieces.
"""

from __future__ import annotations

import json
from collections import Counter

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from refllm.text.tokenizer import Tokenizer

from . import corpus

HEADER_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("the role " + message.role + " is unknown; use system, user or assistant") }}
    {%- endif %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

TURN_TEMPLATE = """\
{% for message in messages %}
{{ "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>" }}
{% endfor %}
{% if add_generation_prompt %}
{{ "<|im_start|>assistant\\n" }}
{% endif %}
"""

ALTERNATING_TEMPLATE = """\
{%- set ns = namespace(expected="user") %}
{%- if messages[0].role == "system" %}
    {%- set conversation = messages[1:] %}
    {{- "<|im_start|>system\\n" ~ messages[0].content ~ "<|im_end|>\\n" }}
{%- else %}
    {%- set conversation = messages %}
    {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif %}
{%- for message in conversation %}
    {%- if message.role != ns.expected %}
        {{- raise_exception("conversation roles must alternate user/assistant/user/assistant") }}
    {%- endif %}
    {%- set ns.expected = "assistant" if message.role == "user" else "user" %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

TOOL_TEMPLATE = """\
{{- "<|im_start|>system\\nYou may call these tools:\\n" }}
{%- for tool in tools %}
    {{- tool | tojson }}{{ "\\n" }}
{%- endfor %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson(indent=2) }}{{ "\\n" if not loop.last }}
        {%- endfor %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

# Words with an optional sign or blank before them, numbers in groups of three digits, runs of signs, line ends, blanks:
# the split rule of the GPT-4 and Llama 3 tokenizers.
_SPLIT_RULE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces_with_byte_fallback(vocab_size: int) -> Tokenizer:
    """BPE on text whose blanks are written "▁", unknown characters spelled in bytes, BOS before every text: the
    make of the SentencePiece tokenizers (Helium, Llama 2)."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Backend(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner.train_from_iterator(
        [_common_characters(line) for line in corpus().splitlines()],
        trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=special, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = [piece for piece in sorted(learned["vocab"], key=learned["vocab"].__getitem__) if piece not in special]
    vocab = {piece: index for index, piece in enumerate([*special, *in_bytes, *pieces])}
    merges = [(left, right) for left, right in learned["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = learner.normalizer
    backend.pre_tokenizer = learner.pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special)
    backend.post_processor = _before_every_text("<s>", 1)
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _bytes_after(special: list[str], vocab_size: int) -> Backend:
    """Byte-level BPE with these tokens at the end of the vocabulary, of which the first comes before every text."""
    backend = _byte_level(vocab_size - len(special))
    backend.add_special_tokens(special)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _before_every_text(special[0], vocab_size - len(special))]
    )
    return backend


def bytes_with_bos(vocab_size: int) -> Tokenizer:
    """Byte-level BPE, special tokens at the end of the vocabulary, BOS before every text: the make of Llama 3. The
    chat template is a file of its own."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return Tokenizer(
        _bytes_after(special, vocab_size),
        bos_token=special[0],
        eos_token="<|eot_id|>",
        model_max_length=512,
        chat_template=HEADER_TEMPLATE,
    )


def bytes_with_named_templates(vocab_size: int) -> Tokenizer:
    """The tokenizer of `bytes_with_bos`, with AFM's special tokens and two chat templates, one of them for tools."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>"]
    return Tokenizer(
        _bytes_after(special, vocab_size),
        bos_token=special[0],
        eos_token="<|im_end|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        chat_template={"default": ALTERNATING_TEMPLATE, "tool_use": TOOL_TEMPLATE},
    )


def bytes_plain(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's split rule, runs of blanks as added tokens, nothing put around a text, no padding
    token: the make of GPT-NeoX and StableLM."""
    blanks = [AddedToken(" " * n, normalized=True) for n in (8, 4, 2)]
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(corpus().splitlines(keepends=True), _byte_trainer(vocab_size - 3, ["<|endoftext|>"]))
    backend.add_tokens(blanks)
    return Tokenizer(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def bytes_with_turns(vocab_size: int) -> Tokenizer:
    """`bytes_plain` with the tokens of a chat format added, and <|endoftext|> for padding: the make of the
    StableLM-2 chat models."""
    backend = bytes_plain(vocab_size - 2).backend_tokenizer
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(
        backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TURN_TEMPLATE,
    )


def _byte_level(vocab_size: int) -> Backend:
    backend = Backend(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_RULE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(corpus().splitlines(keepends=True), _byte_trainer(vocab_size, []))
    return backend


def _byte_trainer(vocab_size: int, special: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _before_every_text(token: str, index: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )


def _common_characters(line: str) -> str:
    """The line without characters that the corpus has fewer than five of: those will be spelled in bytes. (The
    trainer's own limit breaks ties at random.)"""
    count = Counter(corpus())
    return "".join(character for character in line if count[character] >= 5)
