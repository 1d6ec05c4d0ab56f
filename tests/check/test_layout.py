"""Values as other programs lay them out, and channels in another order: what comes back is the vocabulary's own, to the
bit, or a sentence."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config, tiny_model

from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.inputs import Inputs
from refllm.check.layout import LAYOUTS, gguf_order, laid_out, put_together, words_of
from refllm.check.reordered import in_words, order_of, put_in_order, readers
from refllm.errors import InputError
from refllm.forward.taps import axes_of_values, sizes_of_axes

B, S, H, K, D = 2, 7, 4, 2, 8
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
INPUTS = Inputs(np.arange(B * S).reshape(B, S))
CONFIG = tiny_config("Llama")
PARTIAL = tiny_config("StableLm")
WAYS = ("", "tokens", "SBE", "BSHD")
QKV = "model.layers.0.self_attn.qkv_proj"
Taps = dict[str, np.ndarray]


def values(config: Any = CONFIG, inputs: Inputs = INPUTS) -> Taps:
    """Numbers, all of them different, in the shapes of the vocabulary."""
    model, rng = tiny_model(f"{type(config).__name__.removesuffix('Config')}ForCausalLM"), np.random.default_rng(0)
    taps = record(ReferenceCandidate(model), model, inputs).taps
    return {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in taps.items()}


LLAMA, STABLELM = values(), values(PARTIAL)


def streams(taps: Taps, change: Callable[[np.ndarray], np.ndarray]) -> Taps:
    return {name: change(value) if value.ndim == 3 else value for name, value in taps.items()}


def heads(taps: Taps, change: Callable[[np.ndarray], np.ndarray]) -> Taps:
    apart = {name for name in taps if name.endswith(("_rope", "context", "q_layernorm", "k_layernorm"))}
    return {name: change(value) if name in apart else value for name, value in taps.items()}


def tokens(taps: Taps, rows: Any = slice(None)) -> Taps:
    flat = streams(taps, lambda x: x.reshape(-1, x.shape[-1])[rows])
    return without_scores(heads(flat, lambda x: x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])[rows]))


def without_scores(taps: Taps) -> Taps:
    return {name: value for name, value in taps.items() if not name.endswith(("scores", "probs"))}


def sequence_first(taps: Taps) -> Taps:
    return heads(streams(taps, lambda x: x.swapaxes(0, 1)), lambda x: x.transpose(2, 0, 1, 3))


def repeated(taps: Taps, order: str = "repeated") -> Taps:
    def many(name: str, value: np.ndarray) -> np.ndarray:
        if not name.endswith(("v_proj", "k_rope", "k_layernorm", "k_proj")):
            return value
        apart = value.reshape(B, S, K, -1).swapaxes(1, 2) if value.ndim == 3 else value
        more = np.repeat(apart, H // K, axis=1) if order == "repeated" else np.concatenate([apart] * (H // K), axis=1)
        return more.swapaxes(1, 2).reshape(B, S, -1) if value.ndim == 3 else more

    return {name: many(name, value) for name, value in taps.items()}


def fused(taps: Taps, grouped: bool = False) -> Taps:
    out = dict(taps)
    for layer in range(2):
        at = f"model.layers.{layer}."
        q, k, v = (out.pop(f"{at}self_attn.{p}_proj").reshape(B, S, K, -1, D) for p in "qkv")
        parts = np.concatenate([q, k, v], axis=3) if grouped else None
        flat = [x.reshape(B, S, -1) for x in (q, k, v)]
        out[f"{at}self_attn.qkv_proj"] = np.concatenate(flat, axis=-1) if parts is None else parts.reshape(B, S, -1)
        out[f"{at}mlp.gate_up_proj"] = np.concatenate([out.pop(f"{at}mlp.{p}_proj") for p in ("gate", "up")], axis=-1)
    return out


def as_gguf(taps: Taps) -> Taps:
    def disorder(name: str, value: np.ndarray) -> np.ndarray:
        if not name.endswith(("q_proj", "k_proj", "q_rope", "k_rope")):
            return value
        pairs = value.reshape(*value.shape[:-1], -1, 2, D // 2).swapaxes(-1, -2)  # as llama.cpp's converter does
        return pairs.reshape(value.shape)

    return {name: disorder(name, value) for name, value in taps.items()}


def padded(taps: Taps) -> Taps:
    return taps | {"lm_head": np.pad(taps["lm_head"], [(0, 0), (0, 0), (0, 5)], constant_values=9)}


def merged(taps: Taps) -> Taps:
    return heads(taps, lambda x: x.transpose(0, 2, 1, 3).reshape(B, S, -1))


def split(taps: Taps) -> Taps:
    projections = {name: value for name, value in taps.items() if name.endswith(("q_proj", "k_proj", "v_proj"))}
    return taps | {name: value.reshape(B, S, -1, D) for name, value in projections.items()}


ARRANGED: dict[str, tuple[Taps, Taps, Inputs, tuple[str, ...], str]] = {
    "as it is": (LLAMA, LLAMA, INPUTS, (), ""),
    "tokens": (tokens(LLAMA), without_scores(LLAMA), INPUTS, (), "shown as [B*S, n]"),
    "sequence first": (sequence_first(LLAMA), LLAMA, INPUTS, (), "shown as [S, B, heads, D]"),
    "heads after": (heads(LLAMA, lambda x: x.swapaxes(1, 2)), LLAMA, INPUTS, (), "k_rope, context: shown as [B, S, h"),
    "heads side by side": (merged(LLAMA), LLAMA, INPUTS, (), "context: shown as [B, S, heads*D]"),
    "projections split": (split(LLAMA), LLAMA, INPUTS, (), "q_proj, k_proj, v_proj: shown as [B, S, heads, D]"),
    "repeated": (repeated(LLAMA), LLAMA, INPUTS, (), "v_proj, k_rope: repeated to 4 heads, one of each 2 taken"),
    "tiled": (repeated(LLAMA, "tiled"), LLAMA, INPUTS, (), "repeated to 4 heads"),
    "fused": (fused(LLAMA), LLAMA, INPUTS, (), "qkv_proj: split into q_proj, k_proj, v_proj"),
    "fused by group": (fused(LLAMA, grouped=True), LLAMA, INPUTS, ("grouped-qkv",), "gate_up_proj: split into"),
    "gguf": (as_gguf(LLAMA), LLAMA, INPUTS, ("gguf",), "rows in the order of a GGUF file"),
    "padded vocabulary": (padded(LLAMA), LLAMA, INPUTS, (), "lm_head: 5 columns of padding after the vocabulary"),
    "all at once": (
        tokens(padded(repeated(LLAMA))),
        without_scores(LLAMA),
        INPUTS,
        (),
        "shown as [B*S, heads, D], rep",
    ),
    "partial rotation": (sequence_first(STABLELM), STABLELM, INPUTS, (), "shown as [S, B, n]"),
}


@pytest.mark.parametrize("case", ARRANGED)
def test_what_is_laid_out_otherwise_comes_back_to_the_bit(case: str) -> None:
    taps, right, inputs, words, note = ARRANGED[case]
    config = PARTIAL if right is STABLELM else CONFIG
    found = laid_out(taps, config, "causal_lm", inputs, words)
    assert list(found.taps) == list(right)
    assert [name for name, value in right.items() if not np.array_equal(found.taps[name], value)] == []
    assert note in "; ".join(found.notes)
    assert (found.notes == []) == (note == "")
    assert found.doubts == []


def test_the_rotated_dims_alone_are_taken_in_any_layout() -> None:
    R = PARTIAL.rotary_dim
    assert PARTIAL.head_dim > R
    alone = {name: value[..., :R] for name, value in STABLELM.items() if name.endswith("_rope")}
    for change in (lambda taps: taps, sequence_first, tokens):
        found = laid_out(change(alone), PARTIAL, "causal_lm", INPUTS).taps
        assert all(np.array_equal(found[name], value) for name, value in alone.items())


def test_tokens_without_those_that_are_padding_are_put_in_their_places() -> None:
    inputs = Inputs(INPUTS.input_ids, MASK)
    found = laid_out(tokens(LLAMA, inputs.valid.reshape(-1)), CONFIG, "causal_lm", inputs)
    assert found.taps.keys() == without_scores(LLAMA).keys()
    for name, value in without_scores(LLAMA).items():
        rows = [x if x.ndim == 3 else x.swapaxes(1, 2) for x in (found.taps[name], value)]
        assert np.array_equal(rows[0][inputs.valid], rows[1][inputs.valid]), name


def test_one_sequence_needs_no_batch() -> None:
    one = {name: value[:1] for name, value in LLAMA.items()}
    found = laid_out({name: value[0] for name, value in one.items()}, CONFIG, "causal_lm", Inputs(INPUTS.input_ids[:1]))
    assert all(np.array_equal(found.taps[name], value) for name, value in one.items())


SIZES = st.sampled_from([1, 2, 3, 4])


@given(
    batch=SIZES, length=SIZES, group=SIZES, kv_heads=SIZES, head_dim=st.sampled_from([2, 4]), word=st.sampled_from(WAYS)
)
@settings(max_examples=40)
def test_sizes_that_coincide_never_spoil_what_is_right_or_named(
    batch: int, length: int, group: int, kv_heads: int, head_dim: int, word: str
) -> None:
    config = tiny_config(
        "Llama",
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=group * kv_heads * 2,
        intermediate_size=4,
        vocab_size=4,
        num_hidden_layers=1,
    )
    inputs = Inputs(np.zeros((batch, length), int))
    sizes = sizes_of_axes(config, "causal_lm") | {"B": batch, "S": length, "T": length}
    rng, taps = np.random.default_rng(0), {}
    for name, axes in axes_of_values(config, "causal_lm").items():
        side_by_side = re.sub(r"\((.) (.)\)", r"\1\2", axes).split()
        taps[name] = rng.random([math.prod(sizes[axis] for axis in axes) for axes in side_by_side])
    shown = {
        "": lambda: taps,
        "tokens": lambda: tokens(taps),
        "SBE": lambda: sequence_first(without_scores(taps)),
        "BSHD": lambda: heads(taps, lambda x: x.swapaxes(1, 2)),
    }[word]()
    found = laid_out(shown, config, "causal_lm", inputs, (word,) if word else ())
    assert found.taps.keys() == shown.keys()
    assert [name for name in shown if not np.array_equal(found.taps[name], taps[name])] == []


def test_what_the_shapes_do_not_tell_is_as_the_vocabulary_has_it_unless_it_is_named() -> None:
    inputs = Inputs(np.arange(9).reshape(3, 3))
    taps = {"model.norm": np.random.default_rng(0).random((3, 3, CONFIG.hidden_size))}
    found = laid_out(taps, CONFIG, "causal_lm", inputs)
    assert np.array_equal(found.taps["model.norm"], taps["model.norm"])
    assert found.doubts == [
        "the shapes do not tell [B, S, n] from [S, B, n] (B = S = 3): say --layout SBE if it is that"
    ]
    named = laid_out(taps, CONFIG, "causal_lm", inputs, ("SBE",))
    assert np.array_equal(named.taps["model.norm"], taps["model.norm"].swapaxes(0, 1))
    assert named.doubts == []


def test_as_many_heads_as_tokens_are_laid_out_as_the_other_heads_are() -> None:
    inputs = Inputs(np.arange(2 * H).reshape(2, H))
    rng, at = np.random.default_rng(0), "model.layers.0.self_attn."
    q, k = rng.random((2, H, H, D)), rng.random((2, H, K, D))
    alone = laid_out({f"{at}q_rope": q}, CONFIG, "causal_lm", inputs)
    assert np.array_equal(alone.taps[f"{at}q_rope"], q)
    assert "as many heads as tokens, 4): say --layout BSHD" in alone.doubts[0]
    both = laid_out({f"{at}q_rope": q, f"{at}k_rope": k}, CONFIG, "causal_lm", inputs)
    assert np.array_equal(both.taps[f"{at}q_rope"], q.swapaxes(1, 2))
    assert both.doubts == []


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("lm_head", (B, S), r"lm_head has shape \[2, 7\], expected \[2, 7, 23\] \(B, S, n\), or \[7, 2, 23\]"),
        ("lm_head", (B, 2, 23), r"expected \[2, 7, 23\]"),
        ("lm_head", (B, 1, 22), r"expected \[2, 7, 23\]"),
        ("model.norm", (), r"model.norm has shape \[\], expected \[2, 7, 16\]"),
        ("model.layers.1.mlp.act", (B, S, 23), r"mlp.act has shape .*, or .*\[14, 24\] \(B\*S, n\)"),
        (
            "model.layers.1.self_attn.k_rope",
            (B, 3, S, D),
            r"k_rope has shape .* expected \[2, 2, 7, 8\] \(B, heads, S, D",
        ),
        ("model.layers.1.self_attn.v_proj", (B, S, H * D), r"v_proj has 4 heads, expected 2, and they are not 2 that"),
        (
            QKV,
            (B, S, 40),
            r"qkv_proj has shape \[2, 7, 40\], expected 64 channels, 32 \+ 16 \+ 16 of q_proj, k_proj, v_p",
        ),
    ],
)
def test_a_shape_that_is_none_hears_which_would_be(name: str, shape: tuple[int, ...], words: str) -> None:
    taps = {name: np.random.default_rng(0).random(shape)}
    with pytest.raises(InputError, match=words):
        laid_out(taps, CONFIG, "causal_lm", INPUTS)


def test_a_value_that_is_shown_alone_and_fused_is_refused() -> None:
    with pytest.raises(InputError, match=r"q_proj is shown twice, alone and in model.layers.0.self_attn.qkv_proj"):
        laid_out(LLAMA | fused(LLAMA), CONFIG, "causal_lm", INPUTS)


def test_words_of_layouts_are_those_that_there_are() -> None:
    assert words_of("tokens, gguf", "here") == ("tokens", "gguf")
    assert words_of("", "here") == ()
    with pytest.raises(InputError, match=f"here: layout 'sbe' is not known; use {', '.join(LAYOUTS)}"):
        words_of("sbe", "here")
    with pytest.raises(InputError, match="the rows of helium are not reordered there"):
        laid_out({}, tiny_config("Helium"), "causal_lm", INPUTS, ("gguf",))


def test_parts_along_the_sequence_are_put_together() -> None:
    rng = np.random.default_rng(0)
    for shape, axis in (((B, S, 3), 1), ((B, H, S, D), 2), ((S, B, 3), 0), ((B, S, H, D), 1)):
        whole = rng.random(shape)
        for lengths in ([S], [1] * S, [4, 2, 1]):
            parts = np.split(whole, np.cumsum(lengths)[:-1], axis=axis)
            for calls in ([S], lengths):
                found = put_together(parts, calls, B)
                assert found is not None
                assert np.array_equal(found, whole), (shape, lengths, calls)
    assert np.array_equal(put_together([*whole[0].reshape(S, -1)], [S], 1), whole[0].reshape(S, -1))
    flat = whole.reshape(B, S, -1)
    parts = [flat[:, :4].reshape(B * 4, -1), flat[:, 4:].reshape(B * 3, -1)]
    assert np.array_equal(put_together(parts, [4, 3], B), flat)
    assert put_together([flat, flat], [S], B) is None
    assert put_together([flat[:, :4], flat[:, 4:, :5]], [4, 3], B) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_axes_are_those_of_the_page(family: str) -> None:
    for head in ("CausalLM", "TokenClassification"):
        model = tiny_model(f"{family}For{head}")
        taps = record(ReferenceCandidate(model), model, INPUTS).taps
        axes = axes_of_values(model.config, model.head)
        assert list(axes) == list(taps)
        assert {name: axes[name].replace("(", "").split()[1] in "HK" for name in taps} == {
            name: value.ndim == 4 for name, value in taps.items()
        }


# -- another order -----------------------------------------------------------------------------------------------------


def test_an_order_is_found_among_rounding_and_nothing_is_found_in_what_is_wrong() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((40, 64))
    order = rng.permutation(64)
    shown = np.empty_like(exact)
    shown[:, order] = exact * (1 + 2.0**-8 * rng.uniform(-1, 1, exact.shape))
    found = order_of(shown, exact)
    assert found is not None
    assert np.array_equal(found, order)
    assert order_of(exact, exact) is None
    assert order_of(shown * 1.2, exact) is None
    assert order_of(rng.standard_normal(exact.shape), exact) is None
    assert order_of(np.where(shown > 2, np.nan, shown), exact) is None
    heads = shown.reshape(1, 40, 4, 16).transpose(0, 2, 1, 3)
    assert np.array_equal(put_in_order(heads, order).transpose(0, 2, 1, 3).reshape(40, 64), shown[:, order])


def test_orders_have_words() -> None:
    at = "model.layers.0.self_attn.q_proj"
    gguf, whole = gguf_order(16, 8), np.arange(16).reshape(2, 8)[[1, 0]].reshape(-1)
    assert "of a GGUF file" in in_words(at, gguf, 8)
    assert "dims 2i and 2i + 1 of a head apart" in in_words(at, np.argsort(gguf), 8)
    assert in_words(at, whole, 8) == "another order of whole heads (1, 0)"
    assert in_words(at, np.concatenate([np.arange(8)[::-1], 8 + np.arange(8)[::-1]]), 8).endswith("within each head")
    assert in_words("model.layers.0.mlp.act", whole, 8) == "another order of its 16 channels"


def test_readers_are_what_tells_whose_an_order_is() -> None:
    names = list(axes_of_values(CONFIG, "causal_lm"))
    at = "model.layers.0.self_attn."
    assert readers(f"{at}k_proj", names, [])[-1] == f"{at}scores"
    blocks = [name for name in names if name.endswith(("q_proj", "layers.0"))]
    assert readers(f"{at}q_proj", blocks, []) == ["model.layers.0"]
    assert readers(f"{at}q_proj", blocks[:1], []) == []
    assert readers("model.layers.0.mlp.act", names, [])[-1] == "model.layers.0.mlp.down_proj"


def test_a_family_from_outside_may_have_other_shapes_and_lack_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "vocab_size": 23, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D}
    config: Any = SimpleNamespace(model_type="llama", num_hidden_layers=1, **sizes)
    axes = axes_of_values(config, "causal_lm")
    assert "model.layers.0.mlp.act" not in axes
    assert "model.layers.0.mlp.down_proj" in axes
    odd = {"lm_head": np.zeros((B, S, 2, 3)), "model.layers.0.mlp.act": np.zeros((B, S, 5))}
    with pytest.raises(InputError, match="lm_head has shape"):
        laid_out(odd, config, "causal_lm", INPUTS)
    monkeypatch.setattr("refllm.check.layout.current", lambda: "page.py")
    assert laid_out(odd, config, "causal_lm", INPUTS).taps == odd
