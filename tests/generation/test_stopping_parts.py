"""The bytes behind the tokens of a vocabulary, as the stopping at a text needs them."""

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from refllm.generation.stopping import _fallback_byte, _types_in, byte_of_character


def test_the_alphabet_of_bytes_is_that_of_transformers() -> None:
    assert {byte: character for character, byte in byte_of_character().items()} == bytes_to_unicode()


def test_a_fallback_token_is_its_byte() -> None:
    for byte in range(256):
        for token in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"):
            assert _fallback_byte(token) == bytes([byte])


@pytest.mark.parametrize("token", ["", "<0x0A", "<0x0A>>", "<0xA>", "<0x0G>", "<1x0A>", "[0x0A]", "<0x+1>", "<0x0A>\n"])
def test_what_only_looks_like_one_is_none(token: str) -> None:
    assert _fallback_byte(token) is None


def test_types_are_found_at_every_depth() -> None:
    tree = {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "_"}}, [{"type": "Fuse"}], 3, "type"],
    }
    assert _types_in(tree) == {"Sequence", "Replace", "Fuse"}
    assert _types_in([]) == _types_in("type") == _types_in(None) == set()
