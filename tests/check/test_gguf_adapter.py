"""llama.cpp as a candidate, as far as it goes without the library: where the settings of a version are found, and how a
value of the graph is brought to the vocabulary. With the library: tests/stacks/test_gguf.py."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_writer import write_gguf

from refllm import golden
from refllm.accuracy.chained_angles import chains
from refllm.check.adapters.gguf import _Values, must_be_known
from refllm.check.adapters.llama_library import Landmarks, LlamaLibrary, Seen
from refllm.check.candidates import open_candidate
from refllm.check.reordered import readers
from refllm.check.stacks import Opening
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.forward.rotary import RotaryEmbedding
from refllm.storage.gguf_file import GgufFile, in_pairs


def defaults(between: tuple[int, ...], enums: int, flags: int = 8) -> bytes:
    """Defaults as llama_context_params has had them. between: what stands after n_seq_max. enums: that are -1."""
    data = struct.pack("<4I", 512, 2048, 512, 1) + struct.pack(f"<{len(between)}i", *between)
    data += struct.pack(f"<{enums}i", *[-1] * enums) + struct.pack("<6f", 0.0, 0.0, -1.0, 1.0, 32.0, 1.0)
    data += struct.pack("<If", 0, -1.0)
    data += bytes(-len(data) % 8) + struct.pack("<QQii", 0, 0, 1, 1) + bytes(16 + flags)
    return data.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("between", "enums", "flash"),
    [((4, 4), 3, None), ((4, 4), 4, 16 + 8 + 12), ((0, 0, 1, 4, 4, 0), 4, 16 + 24 + 12), ((4, 4, 0), 4, 16 + 12 + 12)],
)
def test_what_is_set_is_found_in_every_version(between: tuple[int, ...], enums: int, flash: int | None) -> None:
    data = defaults(between, enums)
    found = Landmarks.find(data, Path("libllama.so"))
    assert found.flash == flash
    assert struct.unpack_from("<QQii", data, found.callback) == (0, 0, 1, 1)
    assert found.types == found.callback + 16
    assert flash is None or struct.unpack_from("<i2f", data, flash) == (-1, 0.0, 0.0)


@pytest.mark.parametrize("change", ["first", "enums", "types", "twice"])
def test_an_unknown_version_is_refused(change: str) -> None:
    data = bytearray(defaults((4, 4), 4))
    if change == "first":
        data[4:8] = struct.pack("<I", 4096)
    elif change == "enums":
        data = bytearray(defaults((4, 4), 5))
    elif change == "types":
        found = Landmarks.find(bytes(data), Path("a"))
        data[found.types : found.types + 4] = struct.pack("<i", 8)
    else:
        found = Landmarks.find(bytes(data), Path("a"))
        data[found.types + 8 : found.types + 32] = struct.pack("<QQii", 0, 0, 1, 1)
    with pytest.raises(InputError, match="laid out as in no version"):
        Landmarks.find(bytes(data), Path("libllama.so"))


def test_values_of_the_graph_are_brought_to_the_vocabulary() -> None:
    """Heads in pairs are put back; the product and then its sum with a bias are one value; reshapes are none."""
    c: Any = SimpleNamespace(model_type="llama", head_dim=4, num_attention_heads=3, num_key_value_heads=1)
    rng = np.random.default_rng(0)
    q, bias, rope = rng.normal(size=(5, 12)), rng.normal(size=12), rng.normal(size=(3, 5, 4))
    values, node = _Values(c), lambda name, kind, x: Seen(name, kind, np.asarray(x, np.float32))

    def paired(x: np.ndarray, heads: int) -> np.ndarray:
        return in_pairs(np.moveaxis(x, -1, 0), heads).transpose(*range(1, x.ndim), 0)

    values.see(node("Qcur-1", "MUL_MAT", paired(q, 3)[None, None]))
    values.see(node("Qcur-1", "ADD", paired(q + bias, 3)[None, None]))
    values.see(node("Qcur-1", "RESHAPE", np.zeros((1, 5, 3, 4))))
    values.see(node("Qcur-1", "ROPE", paired(rope, 1).transpose(1, 0, 2)[None]))
    values.see(node("kq-1", "MUL_MAT", np.ones((1, 3, 5, 256))))
    values.see(node("leaf_7", "NONE", np.zeros((1, 1, 1, 1))))
    found = values.taps(keys=5)
    assert set(found) == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "q_rope", "scores")}
    np.testing.assert_array_equal(found["model.layers.1.self_attn.q_proj"], (q + bias).astype(np.float32))
    np.testing.assert_array_equal(found["model.layers.1.self_attn.q_rope"], rope.astype(np.float32))
    np.testing.assert_array_equal(found["model.layers.1.self_attn.scores"], np.full((3, 5, 5), 0.5, np.float32))


def test_without_a_library_it_is_said_how_to_get_one() -> None:
    opening = Opening("gguf:m.gguf", golden.path("llama-tiny"))
    with pytest.raises(
        InputError, match=r"needs llama.cpp's shared library, --library F: .* from a build of llama.cpp"
    ):
        open_candidate(opening)


def test_a_file_of_whose_products_is_not_known_what_they_read_is_refused(tmp_path: Path) -> None:
    files = {kind: write_gguf(golden.path("llama-tiny"), tmp_path / kind, kind) for kind in ("F32", "Q8_0", "Q4_1")}
    with pytest.raises(InputError, match=r"tensors are in Q4_1, and what .* with them read is not known here"):
        must_be_known(GgufFile.open(files.pop("Q4_1")))
    for file in files.values():
        must_be_known(GgufFile.open(file))


def test_a_library_is_looked_for_where_its_path_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name alone is one of this folder, and not of the system's."""
    monkeypatch.chdir(tmp_path)
    Path("libm.so.6").write_bytes(b"no library")
    with pytest.raises(InputError, match=f"--library {tmp_path}/libm.so.6: it cannot be loaded"):
        LlamaLibrary.open(Path("libm.so.6"))


@pytest.mark.filterwarnings("ignore:.*factor=20")
@pytest.mark.parametrize("name", ["llama-tiny", "arcee-tiny", "stablelm-tiny-sequential"])
def test_chained_angles_are_the_exact_ones_but_for_some_ulp(name: str) -> None:
    """Of every type of RoPE: within an ulp of float32 for every step of the chain, and at far positions too."""
    exact = RotaryEmbedding(AutoConfig.from_pretrained(golden.path(name)), exact=True)
    positions = np.array([0, 1, 7, 300, 5000])
    exact.tables(positions[None])
    truth = positions[:, None] * np.asarray(exact.inv_freq)
    allowed = (np.arange(truth.shape[1]) + 4) * 2.0**-24
    found = [chain.angles(positions) for chain in chains(exact)]
    assert len(found) in (3, 6)
    off = np.abs(found[0] - truth) / np.maximum(truth, 1e-30)
    assert (off <= allowed).all()
    assert off.max() > 2.0**-26  # they are no products


def test_whose_order_v_has_is_told_by_what_reads_it() -> None:
    """Not by scores and weights, which hold whatever v is."""
    names = ("q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "scores", "probs", "context", "o_proj")
    shown = [f"model.layers.1.self_attn.{name}" for name in names]
    v = "model.layers.1.self_attn.v_proj"
    assert readers(v, shown, [v])[-1].endswith(".context")
    assert readers(shown[0], shown, [shown[0]])[-1].endswith(".scores")
