"""Generation where text is involved: stop strings and streaming, against Transformers with the same tokenizer."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from generation_adapter import TorchAdapter, both, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers import TextIteratorStreamer as WitnessIterator
from transformers import TextStreamer as WitnessStreamer
from transformers.generation.stopping_criteria import StopStringCriteria as Witness

import refllm.text.tokenizer
from refllm import AutoTokenizer
from refllm.errors import InputError
from refllm.generation import streamers
from refllm.generation.generate import generate, stream_text
from refllm.generation.stopping import StopStringCriteria, byte_of_character
from refllm.generation.streamers import BaseStreamer, TextIteratorStreamer, TextStreamer
from refllm.golden import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ALPHABET = "abs é\n!日"
PIECES = [*"abcdef", *"s é\n!日", "ab", "abs", "ba", "sé", " a", " ab", "s!", "a\n", "!a", "日日", "bsa", "  ", "é!"]


def byte_level() -> Tokenizer:
    """Tokens are byte strings, also parts of characters, written in the alphabet of GPT-2."""
    character = {byte: char for char, byte in byte_of_character().items()}
    words = [piece.encode() for piece in PIECES] + [bytes([byte]) for byte in "é日".encode()] + ["日".encode()[:2]]
    vocab = {token: n for n, token in enumerate(dict.fromkeys("".join(character[b] for b in word) for word in words))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """The kind of tokenizer that Llama 2 has: spaces as a visible mark, missing characters as <0xNN>."""
    tokens = [piece.replace(" ", "▁") for piece in PIECES] + [f"<0x{byte:02X}>" for byte in [*"é日".encode(), 10]]
    vocab = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def characters() -> Tokenizer:
    """No bytes: a visible mark in front of words."""
    vocab = {token: n for n, token in enumerate(dict.fromkeys(piece.replace(" ", "▁") for piece in PIECES))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def word_pieces() -> Tokenizer:
    """Continuations are marked by ## and spaces are not tokens."""
    vocab = {
        t: n
        for n, t in enumerate(
            dict.fromkeys(["abcdef", "[UNK]", *(f"{m}{p.strip()}" for p in PIECES for m in ("", "##"))])
        )
    }
    vocab.pop("", None)
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {
    f.__name__: PreTrainedTokenizerFast(tokenizer_object=f())
    for f in (byte_level, byte_fallback, characters, word_pieces)
}
OWN = {f.__name__: refllm.text.tokenizer.Tokenizer(f()) for f in (byte_level, byte_fallback, characters, word_pieces)}


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=120)
@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_stop_strings_equal_transformers(kind: str, strings: list[str], length: int, seed: int) -> None:
    size = max(KINDS[kind].get_vocab().values()) + 1
    ids = np.random.default_rng(seed).integers(0, size + 1, size=(40, length))  # the last id is no token
    try:
        witness = Witness(KINDS[kind], strings)
    except ValueError:  # no token can end any of the strings: Transformers refuses, here they just never match
        expected = np.zeros(40, bool)
    else:
        expected = witness(torch.tensor(ids), None).numpy()
    for tokenizer in (KINDS[kind], OWN[kind]):
        np.testing.assert_array_equal(StopStringCriteria(tokenizer, strings)(ids, None), expected)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("string", ["é", "日", "sé", "日!"])
def test_stop_string_is_found_where_a_character_is_split_over_tokens(kind: str, string: str) -> None:
    character = {byte: char for char, byte in byte_of_character().items()}
    vocab = KINDS[kind].get_vocab()
    spelled = [character[b] if kind == "byte_level" else f"<0x{b:02X}>" if b > 127 else chr(b) for b in string.encode()]
    ids = np.array([[vocab["a"], *(vocab[token] for token in spelled)]])
    for end in range(1, ids.shape[1] + 1):
        expected = Witness(KINDS[kind], string)(torch.tensor(ids[:, :end]), None).numpy()
        assert expected[0] == (end == ids.shape[1])
        np.testing.assert_array_equal(StopStringCriteria(OWN[kind], string)(ids[:, :end], None), expected)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"word_pieces"}))  # which put a space between
def test_no_stop_string_goes_through_an_id_that_is_no_token(kind: str) -> None:
    """What follows such an id is looked at all the same."""
    vocab = KINDS[kind].get_vocab()
    a, b, foreign = vocab["a"], vocab["b"], max(vocab.values()) + 7
    criterion = StopStringCriteria(OWN[kind], ["ab", "ssss"])
    rows = np.array([[a, b, a, b], [a, a, foreign, b], [foreign, foreign, a, b], [a, b, b, foreign]])
    assert criterion(rows, None).tolist() == [True, False, True, False]


def test_stop_string_must_reach_into_the_last_token_and_may_hang_over() -> None:
    vocab = ["s", "to", "stop", "st", "op", "opera", "las", "topper", "pped", "at", *"abcdef"]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(vocab)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    criterion = StopStringCriteria(refllm.text.tokenizer.Tokenizer(tokenizer), "stop")

    def stops(*tokens: str) -> bool:
        return bool(criterion(np.array([[vocab.index(t) for t in tokens]]), None)[0])

    assert stops("st", "op")
    assert stops("stop")
    assert stops("st", "opera")
    assert stops("las", "topper")
    assert stops("s", "to", "pped")
    assert not stops("stop", "at")
    assert not stops("st", "opera", "at")
    assert not stops("s", "to")


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_generation_stops_at_strings_as_in_transformers(kind: str, num_beams: int) -> None:
    tokenizer = KINDS[kind]
    vocab = len(tokenizer)
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, vocab, size=(2, 3))
        values = {"max_new_tokens": 25, "num_beams": num_beams, "stop_strings": ["a", "é!", "!"]}
        own, witness = both(tiny_model(vocab, seed), ids, tokenizer=tokenizer, **values)
        np.testing.assert_array_equal(own.sequences, witness.sequences.numpy())
        assert own.sequences.shape[1] < 28


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="stop_strings need the tokenizer"):
        generate(TorchAdapter(tiny_model()), [[1]], stop_strings="a")
    with pytest.raises(InputError, match="stop_strings"):
        generate(TorchAdapter(tiny_model()), [[1]], stop_strings=[""], tokenizer=KINDS["byte_level"])
    with pytest.raises(InputError, match="stop_strings"):
        StopStringCriteria(KINDS["byte_level"], [])


# ------------------------------------------------------------------------------------------------------------ streaming


class Collected:
    """Mixed into a streamer: keeps the pieces instead of printing them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pieces: list[tuple[str, bool]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append((text, stream_end))


class OwnCollector(Collected, TextStreamer):
    pass


class WitnessCollector(Collected, WitnessStreamer):
    pass


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "characters"])
@pytest.mark.parametrize("skip_prompt", [True, False])
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_pieces_of_streamed_text_equal_transformers(kind: str, skip_prompt: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    prompt, tokens = random.integers(0, len(PIECES), (1, 4)), random.integers(0, len(PIECES), 20)
    own = OwnCollector(OWN[kind], skip_prompt=skip_prompt, skip_special_tokens=True)
    witness = WitnessCollector(KINDS[kind], skip_prompt=skip_prompt, skip_special_tokens=True)
    for _ in range(2):  # a streamer can be used again
        own.put(prompt)
        witness.put(torch.tensor(prompt))
        for token in tokens:
            own.put(np.array([token]))
            witness.put(torch.tensor([token]))
        own.end()
        witness.end()
    # Where Transformers forgets a blank after a line break, or a run of bytes that turns out to be no text, it differs.
    if "".join(text for text, _ in witness.pieces[: len(witness.pieces) // 2]) == decoded(kind, prompt, tokens, own):
        assert [text for text, _ in own.pieces if text] == [text for text, _ in witness.pieces if text]
    assert [end for _, end in own.pieces] == [end for _, end in witness.pieces]


def decoded(kind: str, prompt: np.ndarray, tokens: np.ndarray, own: TextStreamer) -> str:
    ids = tokens if own.skip_prompt else np.concatenate([prompt[0], tokens])
    return str(OWN[kind].decode(ids.tolist(), **own.decode_kwargs))


def with_decoder(decoder: decoders.Decoder, **config: Any) -> refllm.text.tokenizer.Tokenizer:
    """A tokenizer whose tokens are what decoders treat in a special way."""
    tokens = [piece.replace(" ", "▁") for piece in PIECES] + [
        f"<0x{byte:02X}>" for byte in [*"é日".encode(), 10, 32, 255]
    ]
    tokens += [".", ",", "'", "▁'", "▁.", "▁n't", "n't", "</w>", "a</w>", "|", "##b", "##.", "▁", "▁▁"]
    made = Tokenizer(models.WordLevel({t: n for n, t in enumerate(dict.fromkeys(tokens))}, unk_token="a"))
    made.decoder = decoder
    made.add_special_tokens(["<|end|>"])
    return refllm.text.tokenizer.Tokenizer(made, **config)


BLANKS = decoders.Replace("▁", " ")
ODD = {
    "bytes not fused": lambda: with_decoder(decoders.ByteFallback()),
    "bytes of a llama": lambda: with_decoder(
        decoders.Sequence([BLANKS, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "a longer piece replaced": lambda: with_decoder(
        decoders.Sequence([BLANKS, decoders.Fuse(), decoders.Replace("a b", "x")])
    ),
    "metaspace": lambda: with_decoder(decoders.Metaspace(prepend_scheme="always")),
    "word pieces cleaned up": lambda: with_decoder(decoders.WordPiece(), clean_up_tokenization_spaces=True),
    "text cleaned up": lambda: with_decoder(
        decoders.Sequence([BLANKS, decoders.Fuse()]), clean_up_tokenization_spaces=True
    ),
    "ends of words": lambda: with_decoder(decoders.BPEDecoder("</w>")),
    "ctc": lambda: with_decoder(decoders.CTC("a", "|", True)),
    **{name: (lambda name=name: OWN[name]) for name in OWN},
    **{name: (lambda folder=folder: AutoTokenizer.from_pretrained(folder)) for name, folder in checkpoints().items()},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("window", [512, 6])
def test_streamed_text_is_the_decoded_text(kind: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random tokens, those that are no token included; also where earlier tokens are let go."""
    monkeypatch.setattr(streamers, "_WINDOW", window)
    tokenizer = ODD[kind]()
    for seed in range(40):
        tokens = np.random.default_rng(seed).integers(0, len(tokenizer) + 1, 24)
        own = OwnCollector(tokenizer, skip_special_tokens=seed % 2 == 1)
        own.put(tokens[None, :1])
        for token in tokens[1:]:
            own.put(np.array([token]))
        own.end()
        assert "".join(text for text, _ in own.pieces) == tokenizer.decode(tokens.tolist(), **own.decode_kwargs)


def test_streamed_text_keeps_the_blank_after_a_line_break_and_comes_in_pieces() -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints()["helium-tiny"])
    own = OwnCollector(tokenizer)
    own.put(np.array([[706]]))
    for token in (586, 14, 684, 44):
        own.put(np.array([token]))
    own.end()
    assert [text for text, _ in own.pieces if text] == ["memory ", "first\n ", "wor("]


def test_a_long_stream_decodes_no_more_than_a_window_at_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, longest = OWN["byte_level"], []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: longest.append(len(ids)) or decode(ids, **options))
    own = OwnCollector(tokenizer)
    tokens = np.random.default_rng(0).integers(0, len(tokenizer) - 1, 1500)
    own.put(tokens[None, :1])
    for token in tokens[1:]:
        own.put(np.array([token]))
    own.end()
    assert max(longest) <= 520
    assert "".join(text for text, _ in own.pieces) == decode(tokens.tolist())


def test_streamer_prints_the_text_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = OWN["characters"]
    model = tiny_model(len(tokenizer))
    out = generate(TorchAdapter(model), [[3, 4]], max_new_tokens=15, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(out[0]) + "\n"
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=15, streamer=WitnessStreamer(KINDS["characters"]))
    assert capsys.readouterr().out == tokenizer.decode(out[0]) + "\n"


def test_streamer_gets_prompt_tokens_and_end() -> None:
    events: list[Any] = []

    class Recorder(BaseStreamer):
        def put(self, value: np.ndarray) -> None:
            events.append(value.tolist())

        def end(self) -> None:
            events.append("end")

    out = generate(TorchAdapter(tiny_model()), [[3, 4], [5, 6]], max_new_tokens=3, streamer=Recorder())
    assert events == [[[3, 4], [5, 6]], *(out[:, 2 + n].tolist() for n in range(3)), "end"]


@pytest.mark.parametrize("more", [{}, {"skip_prompt": True}])
def test_iterator_streamer_gives_the_same_pieces_as_transformers_from_a_thread(more: dict[str, bool]) -> None:
    kind = "characters"
    model = tiny_model(len(KINDS[kind]))
    own = TextIteratorStreamer(OWN[kind], timeout=30, **more)
    arguments = {"max_new_tokens": 20, "streamer": own}
    thread = threading.Thread(target=generate, args=(TorchAdapter(model), [[3, 4]]), kwargs=arguments)
    thread.start()
    found = list(own)
    thread.join()
    witness = WitnessIterator(KINDS[kind], **more)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=20, streamer=witness)
    assert found == list(witness)
    with pytest.raises(queue.Empty, match=r"0\.01"):
        next(TextIteratorStreamer(OWN[kind], timeout=0.01))


def test_stream_text_yields_the_text_piece_by_piece() -> None:
    tokenizer = OWN["characters"]
    model = TorchAdapter(tiny_model(len(tokenizer)))
    out = generate(model, [[3, 4]], max_new_tokens=20)
    pieces = list(stream_text(model, tokenizer, [[3, 4]], max_new_tokens=20))
    assert "".join(pieces) == tokenizer.decode(out[0, 2:])
    assert len(pieces) > 1


def test_stream_text_raises_errors_of_generate_in_the_reader() -> None:
    with pytest.raises(InputError, match="unknown argument"):
        list(stream_text(TorchAdapter(tiny_model()), OWN["characters"], [[3]], max_tokens=2))
    with pytest.raises(InputError, match="streams one row"):
        list(stream_text(TorchAdapter(tiny_model()), OWN["characters"], [[3], [4]], max_new_tokens=2))


def test_an_abandoned_stream_stops_the_model() -> None:
    tokenizer = OWN["characters"]
    model = TorchAdapter(tiny_model(len(tokenizer)))
    start = time.monotonic()
    pieces = stream_text(model, tokenizer, [[3, 4]], max_new_tokens=100_000, eos_token_id=None)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 20
    assert not any(thread.name.startswith("refllm") for thread in threading.enumerate())
