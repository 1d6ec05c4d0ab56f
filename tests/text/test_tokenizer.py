"""The tokenizer agrees with Transformers on the embedded tokenizers and on others of every make, whatever the files."""

import inspect
import json
import shutil
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from refllm import golden
from refllm.errors import InputError, RefllmError, TokenizerError
from refllm.text.tokenizer import AutoTokenizer, Tokenizer, warn_about_vocabulary

GOLDEN = sorted(golden.checkpoints())
LINES = golden.corpus().splitlines()


# --- tokenizers of other makes, trained here --------------------------------------------------------------------------


def unigram() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    return Tokenizer(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def word_piece() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return Tokenizer(
        backend,
        **dict(zip(names, special, strict=True)),
        clean_up_tokenization_spaces=True,
        model_max_length=20,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        truncation_side="left",
    )


def byte_level_with_prefix_space() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("matrix", single_word=True), AddedToken("softmax", lstrip=True, rstrip=True)])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True), "<eos>"])
    backend.enable_truncation(12, direction="left")
    backend.enable_padding(direction="left", pad_id=backend.token_to_id("<eos>"), pad_token="<eos>")
    return Tokenizer(backend, eos_token="<eos>", mask_token="<mask>", clean_up_tokenization_spaces=True)


def word_level() -> Tokenizer:
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", "[PAD]", *golden.corpus().split()]))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, unk_token="[UNK]", pad_token="[PAD]", clean_up_tokenization_spaces=True)


MAKES: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (unigram, word_piece, byte_level_with_prefix_space, word_level)
}
NAMES = [*GOLDEN, *MAKES]


@cache
def folder_of(name: str) -> Path:
    if name in GOLDEN:
        return golden.path(name)
    folder = Path(mkdtemp())
    tokenizer = MAKES[name]()
    backend_text = tokenizer.backend_tokenizer.to_str()  # with the padding and truncation that save_pretrained removes
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(backend_text, encoding="utf-8")
    return folder


@cache
def ours(name: str) -> Tokenizer:
    return AutoTokenizer.from_pretrained(folder_of(name))


@cache
def theirs(name: str) -> Any:
    loader = transformers.AutoTokenizer if name in GOLDEN else transformers.PreTrainedTokenizerFast
    return loader.from_pretrained(folder_of(name))


def plain(encoding: Any) -> dict[str, Any]:
    return {key: np.asarray(value).tolist() if hasattr(value, "shape") else value for key, value in encoding.items()}


# --- text to ids ------------------------------------------------------------------------------------------------------

SPECIAL = sorted(
    {token for name in GOLDEN for token in ours(name).added_tokens_decoder.values() for token in [token.content]}
)
texts = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from([line[i : i + 30] for line in LINES if line for i in (0, 40)]),
        st.sampled_from(
            [*SPECIAL, "[MASK]", "<mask>", "matrix", " softmax ", "  ", "\n", "naïve", "e\u0301", "日本", "🙂"]
        ),
    ),
    max_size=4,
).map("".join)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:the text has")
@settings(max_examples=40)
@given(text=texts, special=st.booleans())
@example(text="", special=True)
@example(text="Is n't it , or ' s 't ? It 's . We 've ! I 'm x 're", special=True)
@example(text=" ", special=True)
@example(text="\x00\ufeff\u200b", special=True)
def test_ids_and_decoded_texts_are_those_of_transformers(name: str, text: str, special: bool) -> None:
    encoding = ours(name)(text, add_special_tokens=special)
    assert plain(encoding) == plain(theirs(name)(text, add_special_tokens=special))
    assert encoding.tokens() == theirs(name).tokenize(text, add_special_tokens=special)
    ids = encoding.input_ids
    for skip in (False, True):
        for clean in (None, False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            assert ours(name).decode(ids, **options) == theirs(name).decode(ids, **options)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(
    batch=st.lists(texts, min_size=1, max_size=4),
    padding=st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]),
    truncation=st.sampled_from([None, False, True, "longest_first", "only_first"]),
    max_length=st.sampled_from([None, 3, 8, 16]),
    side=st.sampled_from([None, "left", "right"]),
    multiple=st.sampled_from([None, 4]),
    pairs=st.booleans(),
    details=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_batches_are_padded_and_truncated_as_in_transformers(
    name: str, batch: Any, pairs: bool, **options: Any
) -> None:
    arguments = {
        "padding": options["padding"],
        "truncation": options["truncation"],
        "max_length": options["max_length"],
        "padding_side": options["side"],
        "pad_to_multiple_of": options["multiple"],
        "return_offsets_mapping": options["details"],
        "return_special_tokens_mask": options["details"],
        "return_token_type_ids": True if options["details"] else None,
    }
    second = batch[::-1] if pairs else None
    try:
        expected = plain(theirs(name)(batch, second, **arguments))
    except Exception:
        with pytest.raises(InputError):
            ours(name)(batch, second, **arguments)
        return
    assert plain(ours(name)(batch, second, **arguments)) == expected
    if len({len(row) for row in expected["input_ids"]}) == 1:
        arrays = ours(name)(batch, second, return_tensors="np", **arguments)
        assert arrays.input_ids.dtype == np.int64
        assert arrays.input_ids.shape == (len(batch), len(expected["input_ids"][0]))
        assert plain(arrays)["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_words_given_one_by_one_are_encoded_as_in_transformers(name: str) -> None:
    words = ["Attention", "moves", "information", "."]
    try:
        expected = plain(theirs(name)(words, is_split_into_words=True))
    except Exception as error:  # some pre-tokenizers refuse
        pytest.skip(str(error))
    assert plain(ours(name)(words, is_split_into_words=True)) == expected
    batch = [words, words[:2]]
    assert plain(ours(name)(batch, is_split_into_words=True)) == plain(theirs(name)(batch, is_split_into_words=True))


@pytest.mark.parametrize("name", ["llama-tiny", "arcee-tiny", "stablelm-tiny-sequential", "stablelm-tiny-parallel"])
@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_byte_level_tokenizers_give_every_text_back(name: str, text: str) -> None:
    ids = ours(name).encode(text, add_special_tokens=False)
    expected = unicodedata.normalize("NFC", text) if name.startswith("stablelm") else text
    assert ours(name).decode(ids) == expected


def test_a_call_leaves_no_trace_in_the_next_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("arcee-tiny"))
    text = "Attention moves information between positions."
    before = tokenizer.encode(text)
    tokenizer(text, truncation=True, max_length=3)
    tokenizer([text, "x"], padding="max_length", max_length=64)
    assert tokenizer.encode(text) == before


def test_one_text_as_an_array_is_a_batch_of_one() -> None:
    tokenizer = ours("helium-tiny")
    assert tokenizer("x", return_tensors="np").input_ids.shape == (1, 2)
    assert tokenizer("", add_special_tokens=False, return_tensors="np").input_ids.shape == (1, 0)


# --- special tokens and vocabulary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_and_vocabulary_are_those_of_transformers(name: str) -> None:
    a, b = ours(name), theirs(name)
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(a, f"{role}_token") == getattr(b, f"{role}_token")
        assert getattr(a, f"{role}_token_id") == getattr(b, f"{role}_token_id")
    assert a.special_tokens_map == b.special_tokens_map
    assert sorted(a.all_special_tokens) == sorted(b.all_special_tokens)
    assert sorted(a.all_special_ids) == sorted(b.all_special_ids)
    assert a.get_vocab() == b.get_vocab()
    assert (len(a), a.vocab_size, a.model_max_length) == (len(b), b.vocab_size, b.model_max_length)
    assert (a.padding_side, a.truncation_side) == (b.padding_side, b.truncation_side)
    assert a.num_special_tokens_to_add() == b.num_special_tokens_to_add()
    tokens = [*a.get_vocab()][::17] + ["no such token"]
    assert a.convert_tokens_to_ids(tokens) == b.convert_tokens_to_ids(tokens)
    ids = [*range(0, len(a), 13), len(a) + 5]
    assert a.convert_ids_to_tokens(ids) == b.convert_ids_to_tokens(ids)
    special = a.all_special_ids + ids[:3]
    assert a.convert_ids_to_tokens(special, True) == b.convert_ids_to_tokens(special, True)
    assert a.convert_tokens_to_string(tokens[:9]) == b.convert_tokens_to_string(tokens[:9])


def test_the_pad_token_can_be_set() -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("llama-tiny"))
    with pytest.raises(InputError, match="needs a pad token"):
        tokenizer(["a", "b c d e"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 639
    rows = tokenizer(["a", "b c d e"], padding=True, return_tensors="np")
    assert rows.input_ids[0, -1] == 639
    tokenizer.pad_token_id = 636
    assert tokenizer.pad_token == "<|end_of_text|>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize("name", NAMES)
def test_decode_takes_ints_arrays_and_batches(name: str) -> None:
    ids = ours(name).encode("Two vectors q and k.")
    text = ours(name).decode(ids)
    assert ours(name).decode(np.array(ids)) == text
    assert ours(name).decode(np.array([ids, ids])) == [text, text]
    assert ours(name).batch_decode([ids, ids[:2]]) == theirs(name).batch_decode([ids, ids[:2]])
    assert ours(name).decode(ids[1]) == theirs(name).decode(ids[1])
    assert ours(name).decode(np.int64(ids[1])) == theirs(name).decode(ids[1])
    assert ours(name).decode([]) == theirs(name).decode([]) == ""
    assert ours(name).decode([*ids, 10**6]) == text  # an id without a token adds nothing, as in Transformers


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_loads_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(folder_of(name)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Größe 128: " + LINES[2][:60] + "".join(ours(name).all_special_tokens)
    for tokenizer in (again, witness):
        assert tokenizer.encode(text) == ours(name).encode(text)
        assert tokenizer.special_tokens_map == ours(name).special_tokens_map
        assert sorted(tokenizer.all_special_tokens) == sorted(ours(name).all_special_tokens)
        assert tokenizer.chat_template == ours(name).chat_template
        assert tokenizer.padding_side == ours(name).padding_side
        assert tokenizer.model_max_length == ours(name).model_max_length
    again.save_pretrained(tmp_path / "b")
    files = [file.relative_to(tmp_path / "b") for file in (tmp_path / "b").rglob("*") if file.is_file()]
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_loads_here(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = LINES[2][:60] + "".join(ours(name).all_special_tokens)
    assert again.encode(text) == ours(name).encode(text)
    assert again.special_tokens_map == ours(name).special_tokens_map
    assert again.chat_template == ours(name).chat_template


def with_greedy_end_of_text() -> str:
    """tokenizer.json whose <|endoftext|> takes the blanks behind it along."""
    table = json.loads((golden.path("stablelm-tiny-sequential") / "tokenizer.json").read_text(encoding="utf-8"))
    table["added_tokens"][0]["rstrip"] = True
    return json.dumps(table)


CONFIGS: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "0": {"content": "<|endoftext|>", "special": True, "lstrip": True},
                "300": {"content": "<|tool|>", "special": False, "normalized": True},
                "620": {"content": "<|new|>", "special": True, "rstrip": True},
            },
            "eos_token": "<|endoftext|>",
            "pad_token": "<|new|>",
            "additional_special_tokens": ["<|tool|>"],
        },
        # ignored, because added_tokens_decoder is complete
        "special_tokens_map.json": {"bos_token": "matrix"},
    },
    "older files": {
        "tokenizer.json": with_greedy_end_of_text(),
        "tokenizer_config.json": {"model_max_length": 77},
        "special_tokens_map.json": {
            "bos_token": {
                "content": "<bos>",
                "lstrip": False,
                "normalized": False,
                "rstrip": True,
                "single_word": False,
            },
            "pad_token": "<e\u0301>",
            "additional_special_tokens": ["<one>", "<two>"],
        },
        "added_tokens.json": {"<extra>": 621, "<e\u0301>": 620, "<plain>": 622, "  ": 619, "<|endoftext|>": 0},
    },
    "tokens with names of their own": {
        "tokenizer_config.json": {
            "image_token": "<image>",
            "extra_special_tokens": {"audio_token": "<audio>"},
            "bos_token": {"__type": "AddedToken", "content": "<bos>", "lstrip": True},
        }
    },
    "a list of extra tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<x>", "<y>"], "unk_token": None}},
    "BOS flags in the file": {
        "tokenizer_config.json": {"bos_token": "<|endoftext|>", "add_bos_token": True, "add_eos_token": True}
    },
    "no other file": {},
    "limits and sides": {
        "tokenizer_config.json": {
            "padding_side": "left",
            "truncation_side": "left",
            "model_max_length": 6,
            "pad_token": "<|endoftext|>",
            "model_input_names": ["input_ids"],
            "split_special_tokens": True,
        }
    },
    "blanks before signs": {
        "tokenizer_config.json": {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        }
    },
}


def folder_with(files: dict[str, Any], folder: Path) -> Path:
    shutil.copy(golden.path("stablelm-tiny-sequential") / "tokenizer.json", folder)
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("files", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_every_layout_of_the_configuration_is_read_as_in_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_with(files, tmp_path)
    a = AutoTokenizer.from_pretrained(folder)
    b = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert a.get_vocab() == b.get_vocab()
    assert a.special_tokens_map == b.special_tokens_map
    assert sorted(a.all_special_tokens) == sorted(b.all_special_tokens)
    assert (a.model_max_length, a.padding_side, a.truncation_side) == (
        (b.model_max_length, b.padding_side, b.truncation_side)
    )
    text = "a matrix <bos>  x <|endoftext|>  \n <|tool|> <|new|> <image> <audio> <one> <two> <extra> <plain> y<x> z ."
    text += " It 's , she do n't ? a ' b ! <e\u0301> <\u00e9>"
    assert plain(a(text)) == plain(b(text))
    assert plain(a([text, "q"], truncation=True)) == plain(b([text, "q"], truncation=True))
    ids = a.encode(text)
    for skip in (False, True):
        assert a.decode(ids, skip_special_tokens=skip) == b.decode(ids, skip_special_tokens=skip)


def test_bos_and_eos_can_be_asked_for_when_loading() -> None:
    for flags in ({"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True}):
        folder = golden.path("stablelm-tiny-parallel")
        a = AutoTokenizer.from_pretrained(folder, **flags)
        b = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **flags)
        assert a.encode("x y") == b.encode("x y")
        assert plain(a("x", "y", return_token_type_ids=True)) == plain(b("x", "y", return_token_type_ids=True))


def test_arguments_win_over_the_file() -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        golden.path("helium-tiny"), padding_side="left", pad_token="</s>", use_fast=True, trust_remote_code=False
    )
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == 2


def test_chat_template_files_are_found_and_ranked(tmp_path: Path) -> None:
    folder = folder_with({"chat_template.json": {"chat_template": "from a processor"}}, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "from a processor"
    folder_with({"tokenizer_config.json": {"chat_template": "from the table"}}, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "from the table"
    named = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    folder_with({"tokenizer_config.json": {"chat_template": named}}, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": "one", "rag": "two"}
    folder_with({"chat_template.jinja": "from the file"}, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "from the file"
    folder_with({"additional_chat_templates/tool_use.jinja": "for tools"}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == {"default": "from the file", "tool_use": "for tools"}
    assert tokenizer.get_chat_template(tools=[{}]) == "for tools"
    assert tokenizer.get_chat_template() == "from the file"
    assert tokenizer.get_chat_template("a text of my own") == "a text of my own"
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.chat_template == witness.chat_template


# --- what is wrong is said in one sentence ----------------------------------------------------------------------------


def cut(folder: Path, file: str, size: int) -> None:
    (folder / file).write_bytes((golden.path("helium-tiny") / "tokenizer.json").read_bytes()[:size])


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: f.rmdir(), "no such folder"),
    "empty folder": (lambda f: None, "no tokenizer.json"),
    "sentencepiece only": (
        lambda f: (f / "tokenizer.model").write_bytes(b"\x0a"),
        "a tokenizer.model has to be converted",
    ),
    "truncated": (lambda f: cut(f, "tokenizer.json", 9000), "not a tokenizer"),
    "empty file": (lambda f: cut(f, "tokenizer.json", 0), "not a tokenizer"),
    "not UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe{}"), "not a tokenizer"),
    "JSON of something else": (lambda f: (f / "tokenizer.json").write_text("[1, 2]"), "not a tokenizer"),
    "a folder of that name": (lambda f: (f / "tokenizer.json").mkdir(), "no tokenizer.json"),
    "config truncated": (lambda f: folder_with({"tokenizer_config.json": '{"eos'}, f), "not valid JSON"),
    "config is a list": (lambda f: folder_with({"tokenizer_config.json": []}, f), "not a JSON object"),
    "config nested too deep": (
        lambda f: folder_with({"tokenizer_config.json": "[" * 100_000}, f),
        "not valid JSON",
    ),
    "side": (lambda f: folder_with({"tokenizer_config.json": {"padding_side": "up"}}, f), "padding_side='up'"),
    "length": (lambda f: folder_with({"tokenizer_config.json": {"model_max_length": "x"}}, f), "model_max_length='x'"),
    "role": (lambda f: folder_with({"tokenizer_config.json": {"eos_token": 7}}, f), "eos_token=7"),
    "added tokens": (
        lambda f: folder_with({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "y"}}}}, f),
        "a key that is no id",
    ),
    "added tokens are no table": (
        lambda f: folder_with({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, f),
        "not a table",
    ),
    "extra tokens": (
        lambda f: folder_with({"tokenizer_config.json": {"additional_special_tokens": 3}}, f),
        "not a list of tokens",
    ),
    "template": (lambda f: folder_with({"tokenizer_config.json": {"chat_template": 5}}, f), "chat_template must be"),
    "named templates": (
        lambda f: folder_with({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, f),
        "a name and a template",
    ),
    "template file": (
        lambda f: (folder_with({}, f) / "chat_template.jinja").write_bytes(b"\xff"),
        "not readable as text",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_broken_folder_is_one_sentence(damage: Callable[[Path], Any], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    damage(folder)
    with pytest.raises(TokenizerError, match=expected) as caught:
        AutoTokenizer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_tokenizer_json_never_escapes_as_another_exception(data: st.DataObject) -> None:
    original = (golden.path("stablelm-tiny-sequential") / "tokenizer.json").read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(original) - 1)) :]
    folder = Path(mkdtemp())
    try:
        (folder / "tokenizer.json").write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except RefllmError:
        pass
    else:
        assert isinstance(tokenizer.encode("x = 1"), list)
    finally:
        shutil.rmtree(folder)


BAD_CALLS: dict[str, tuple[Callable[[Tokenizer], Any], str]] = {
    "no texts": (lambda t: t([]), "empty list"),
    "a number": (lambda t: t(5), "must be a string"),
    "a list with a number": (lambda t: t(["a", 5]), "must be a string"),
    "None": (lambda t: t(None), "must be a string"),
    "pairs of different kinds": (lambda t: t(["a"], "b"), "both be one text or both be lists"),
    "pairs of different lengths": (lambda t: t(["a"], ["b", "c"]), "1 entries and text_pair has 2"),
    "padding": (lambda t: t("a", padding="most"), "padding='most'"),
    "truncation": (lambda t: t("a", truncation="some"), "truncation='some'"),
    "side": (lambda t: t(["a", "b c"], padding=True, padding_side="top"), "padding_side='top'"),
    "tensors of tensorflow": (lambda t: t("a", return_tensors="tf"), "return_tensors='tf'"),
    "ragged array": (lambda t: t(["a", "b c d"], return_tensors="np"), "pass padding=True"),
    "stride": (lambda t: t("a b c d", max_length=2, stride=5), "stride=5"),
    "multiple": (
        lambda t: t("a", truncation=True, max_length=5, padding=True, pad_to_multiple_of=4),
        "not a multiple of pad_to_multiple_of=4",
    ),
    "negative id": (lambda t: t.decode([-1]), "-1 is not a token id"),
    "huge id": (lambda t: t.decode([2**40]), "is not a token id"),
    "float id": (lambda t: t.decode([0.5]), "must be an integer"),
    "text id": (lambda t: t.decode("abc"), "must be an integer"),
    "role": (lambda t: setattr(t, "pad_token", 5), "pad_token must be a string"),
}


@pytest.mark.parametrize(("call", "expected"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_one_sentence(call: Callable[[Tokenizer], Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        call(ours("helium-tiny"))
    assert "\n" not in str(caught.value)


def test_a_template_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("arcee-tiny"))
    for name in ("../../evil", "a/b", "..", ""):
        tokenizer.chat_template = {name: "x"}
        with pytest.raises(TokenizerError, match="cannot be the name"):
            tokenizer.save_pretrained(tmp_path / "x" / "y")
    assert not list(tmp_path.rglob("evil*"))


def test_ids_beyond_the_model_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="ids up to 639, but the model's vocab_size is 639"):
        warn_about_vocabulary(ours("llama-tiny"), 639)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_vocabulary(ours("llama-tiny"), 640)


def test_a_text_beyond_the_length_limit_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="model_max_length=512"):
        ours("llama-tiny")("word " * 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours("llama-tiny")("word " * 600, truncation=True, max_length=512)


def test_an_id_that_tokenizer_json_contradicts_is_a_warning(tmp_path: Path) -> None:
    table = {"added_tokens_decoder": {"9999": {"content": "<far>"}}}
    with pytest.warns(UserWarning, match="the id 9999, tokenizer.json 620"):
        AutoTokenizer.from_pretrained(folder_with({"tokenizer_config.json": table}, tmp_path))


def test_encoding_has_attributes() -> None:
    encoding = ours("helium-tiny")("x")
    assert encoding.input_ids == encoding["input_ids"]
    with pytest.raises(AttributeError, match="no 'labels', only input_ids, attention_mask"):
        _ = encoding.labels


@pytest.mark.parametrize(
    "method",
    [
        "__call__", "encode", "decode", "batch_decode", "tokenize", "convert_ids_to_tokens", "get_chat_template",
        "apply_chat_template", "num_special_tokens_to_add",
    ],
)  # fmt: skip
def test_what_a_caller_leaves_out_is_what_it_is_in_transformers(method: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(cls, method)).parameters for cls in (Tokenizer, transformers.PreTrainedTokenizerFast)
    )
    shared = [name for name in ours if name in theirs and ours[name].default is not inspect.Parameter.empty]
    assert shared
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}
