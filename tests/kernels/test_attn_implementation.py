"""`attn_implementation="refllm"`: our attention under Transformers models, and what it refuses or leaves to SDPA."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

import refllm.kernels.transformers
from refllm import golden, kernels
from refllm.check import assert_matches
from refllm.errors import InputError, RefllmError
from refllm.extras import install_command
from refllm.kernels.transformers import attention, masks
from refllm.kernels.verify import assert_meets_contract

CHECKPOINTS = sorted(golden.checkpoints())
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Logits of these models are of the order of one; the two attentions add in different orders in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _every_warning() -> None:
    """What is said once per process, is said again in every test."""
    attention._warn_once.cache_clear()


def load(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    folder = golden.path(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()


def tiny(model_type: str, implementation: str, **changes: Any) -> Any:
    """A model with random weights, the same for every implementation."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 64, (rows, length)))


def padded(ids: torch.Tensor, side: str) -> torch.Tensor:
    """A mask that hides 3 tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask if side == "left" else mask.flip(1)


def both(left: Any, right: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> None:
    """Two models agree wherever a token counts."""
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask, **options).logits for model in (left, right))
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[counts], expected[counts], **CLOSE)


@pytest.mark.parametrize(("name", "dtype"), [("llama-tiny", "float32"), *((name, "bfloat16") for name in CHECKPOINTS)])
def test_attention_holds_against_the_reference(name: str, dtype: str) -> None:
    model = load(name, "refllm", getattr(torch, dtype))
    assert_matches(golden.path(name), model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_generates_the_tokens_of_eager_attention(name: str) -> None:
    ids = tokens(2, 11)
    expected, found = load(name, "eager"), load(name, "eager")
    found.set_attn_implementation("refllm")
    for mask in (torch.ones_like(ids), padded(ids, "left")):
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        wanted = expected.generate(ids, **options)
        assert torch.equal(found.generate(ids, **options), wanted)
        assert torch.equal(found.generate(ids, cache_implementation="static", **options), wanted)
        assert torch.equal(found.generate(ids, use_cache=False, **options), wanted)
    both(found, expected, ids, padded(ids, "right"))


@pytest.mark.parametrize(
    "model_type", ["qwen2", "qwen3", "mistral", "gemma", "olmo2", "phi3", "granite", "gpt2", "gpt_neox", "opt"]
)
def test_other_causal_models(model_type: str) -> None:
    changes: dict[str, Any] = {"mistral": {"sliding_window": None}, "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2}}
    eager, ours = (tiny(model_type, i, **changes.get(model_type, {})) for i in ("eager", "refllm"))
    ids = tokens(2, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(ours, eager, ids)
        both(ours, eager, ids, padded(ids, "left"))


class TestMasks:
    @settings(max_examples=200)
    @given(data=st.data())
    def test_say_what_sdpa_masks_say(self, data: st.DataObject) -> None:
        """In pairs, every form equals the mask that Transformers makes for SDPA, padding and caches included."""
        B, S, past = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(0, 6))
        static = data.draw(st.booleans())
        T = past + S + (data.draw(st.integers(0, 5)) if static else 0)
        width = data.draw(st.sampled_from([None, past + S, max(1, past + S - 2), T]))
        mask = None
        if width is not None:
            hidden = data.draw(st.lists(st.integers(0, B * width - 1), max_size=4))
            mask = torch.ones(B * width, dtype=torch.bool)
            mask[hidden] = False
            mask = mask.view(B, width)
        asked: dict[str, Any] = {
            "batch_size": B, "q_length": S, "kv_length": T, "kv_offset": 0, "attention_mask": mask,
            "q_offset": torch.tensor(past) if static else past,
        }  # fmt: skip
        expected = sdpa_mask(**asked, allow_is_causal_skip=False)
        found = masks.visible_keys(**asked)
        assert torch.equal(masks.pairs(found, S, T, True, "cpu").expand(B, 1, S, T), expected)
        if found is not None and found.ndim == 2:  # what generate passes back as attention_mask
            again = masks.visible_keys(**(asked | {"attention_mask": found}))
            assert torch.equal(masks.pairs(again, S, T, True, "cpu").expand(B, 1, S, T), expected)

    def test_forms(self) -> None:
        def form(S: int, T: int, q_offset: Any = 0, mask: Any = None) -> Any:
            found = masks.visible_keys(2, S, T, q_offset, attention_mask=mask)
            return None if found is None else (str(found.dtype).removeprefix("torch."), list(found.shape))

        ones, holes = torch.ones(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool).tril(8)
        assert form(16, 16) is None
        assert form(16, 16, mask=ones) is None
        assert form(9, 16, 7) is None
        assert form(8, 16, 8) == ("int64", [2, 1, 1, 1])
        assert form(9, 20, torch.tensor(7)) == ("int64", [1, 1, 1, 1])
        assert form(16, 16, mask=holes) == ("bool", [2, 16])
        assert form(9, 20, torch.tensor(7), mask=holes) == ("bool", [2, 16])
        assert form(1, 20, torch.tensor(15), mask=holes) == ("bool", [2, 1, 1, 20])

    def test_of_another_pattern_are_pairs(self) -> None:
        config, x = tiny("qwen2", "refllm").config, torch.zeros(2, 5, 4)
        config.sliding_window = 3
        common = {"config": config, "inputs_embeds": x, "attention_mask": None, "past_key_values": None}
        packed = torch.tensor([[0, 1, 2, 0, 1]] * 2)
        made = [
            create_sliding_window_causal_mask(**common, position_ids=None),
            create_causal_mask(**common, position_ids=packed),
            create_causal_mask(**common, and_mask_function=lambda b, h, q, k: k != 1),
            create_bidirectional_mask(**common),
        ]
        for mask in made:
            assert mask is not None
            assert mask.shape[-2:] == (5, 5)

    def test_without_an_offset_the_queries_are_the_first_tokens(self) -> None:
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
        found = masks.visible_keys(2, 4, 4, attention_mask=mask)
        expected = mask[:, None, None] & torch.ones(4, 4, dtype=torch.bool).tril()
        assert torch.equal(masks.pairs(found, 4, 4, True, "cpu").expand(2, 1, 4, 4), expected)

    def test_refuses_a_mask_of_another_batch(self) -> None:
        with pytest.raises(InputError, match=r"attention_mask: shape \[1, 4\]; expected \[2, tokens\]"):
            masks.visible_keys(2, 4, 4, attention_mask=torch.ones(1, 4))

    def test_traced_static_decoding_needs_no_number(self) -> None:
        """Under tracing the number of cached tokens is not known, and the keys seen are a computed mask."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            mask = masks.visible_keys(2, 1, 20, torch.tensor(7), attention_mask=torch.ones(2, 8, dtype=torch.bool))
            assert mask is not None
            assert list(mask.shape) == [2, 1, 1, 20]
            pairs = masks.visible_keys(2, 3, 20, torch.tensor(7), attention_mask=torch.ones(2, 10, dtype=torch.bool))
            assert pairs is not None
            assert list(pairs.shape) == [2, 1, 3, 20]


class Module(torch.nn.Module):
    """An attention module, as far as an attention function looks at it."""

    is_causal, num_key_value_groups = True, 2


def heads(S: int, T: int, seed: int = 0, B: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    shapes = ((B, 4, S, 16), (B, 2, T, 16), (B, 2, T, 16))
    return [torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype) for shape in shapes]


def run(implementation: str, *args: Any, **options: Any) -> torch.Tensor:
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[implementation]
    return function(Module(), *args, **options)[0].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["refllm", "refllm-plain", "refllm-triton"])
def test_every_form_meets_the_contract(device: str, implementation: str, dtype: torch.dtype) -> None:
    def check(S: int, T: int, past: Any, mask: torch.Tensor | None, contract: Any) -> None:
        q, k, v = (x.to(device) for x in heads(S, T, dtype=dtype))
        form = masks.visible_keys(2, S, T, past, attention_mask=mask, device=device)
        out = run(implementation, q, k, v, form, scaling=0.3)
        operator, args, options = contract(q, k, v)
        assert_meets_contract(operator, out, *args, scale=0.3, **options)

    holes = torch.ones(2, 12, dtype=torch.bool, device=device)
    holes[0, :3] = False
    check(10, 10, 0, None, lambda q, k, v: ("attention", (q, k, v), {}))
    check(10, 12, 2, holes, lambda q, k, v: ("attention", (q, k, v), {"key_mask": holes}))
    check(10, 15, torch.tensor(2), None, lambda q, k, v: ("attention", (q, k[:, :, :12], v[:, :, :12]), {}))
    filled = torch.tensor([12, 12])
    check(1, 15, torch.tensor(11), None, lambda q, k, v: ("decode_attention", (q, k, v, filled), {}))
    check(4, 12, 8, None, lambda q, k, v: ("decode_attention", (q, k, v, filled), {}))
    used = torch.nn.functional.pad(holes, (0, 3))
    check(1, 15, torch.tensor(11), holes, lambda q, k, v: ("attention", (q, k, v), {"key_mask": used}))


class TestWhereItRuns:
    def spied(self, monkeypatch: pytest.MonkeyPatch, implementation: str) -> list[str]:
        """The backends that were asked for `decode_attention`."""
        asked: list[str] = []

        def fake(backend: str) -> Any:
            return lambda q, *rest, **options: asked.append(backend) or torch.zeros_like(q)

        monkeypatch.setattr(kernels.plain, "decode_attention", fake("plain"))
        monkeypatch.setattr(kernels, "decode_attention", fake("triton"), raising=False)
        run(implementation, *heads(1, 4), masks.visible_keys(2, 1, 4, 3))
        return asked

    def test_plain_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.spied(monkeypatch, "refllm") == ["plain"]

    def test_triton_inside_interpreted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with kernels.interpreted():
            assert self.spied(monkeypatch, "refllm") == ["triton"]
            assert self.spied(monkeypatch, "refllm-plain") == ["plain"]

    def test_triton_by_name_is_an_error_without_a_gpu(self) -> None:
        with pytest.raises(RefllmError, match="interpreted"):
            run("refllm-triton", *heads(1, 4), masks.visible_keys(2, 1, 4, 3))

    def test_registering_again_changes_nothing(self) -> None:
        kernels.register()
        assert {"refllm", "refllm-plain", "refllm-triton"} <= set(
            transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
        )


class TestCaches:
    @pytest.mark.parametrize("padding", [False, True])
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("pieces", [(11, 1, 1), (3, 9, 1), (1, 12)])
    def test_in_pieces_as_at_once(self, cache: str, pieces: tuple[int, ...], padding: bool) -> None:
        model = load("llama-tiny", "refllm")
        ids = tokens(2, 13)
        mask = padded(ids, "left") if padding else torch.ones_like(ids)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=positions).logits
            store = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=17)
            parts, start = [], 0
            for length in pieces:
                stop, part = start + length, slice(start, start + length)
                options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, part]}
                parts.append(model(ids[:, part], past_key_values=store, use_cache=True, **options).logits)
                start = stop
        torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], **CLOSE)

    def test_decoding_compiles_to_one_graph(self, device: str) -> None:
        """With a static cache, as `generate` compiles it on a GPU: one graph for every token."""
        from torch._dynamo.testing import CompileCounter  # takes most of a second

        plain = tiny("llama", "refllm-plain", num_hidden_layers=1).to(device)
        model = tiny("llama", "refllm", num_hidden_layers=1).to(device)
        graphs = CompileCounter()
        compiled = torch.compile(model.forward, backend=graphs, fullgraph=True)
        ids, cache = tokens(1, 6).to(device), StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            expected = plain(ids).logits
            plain(ids[:, :4], past_key_values=cache)
            for length in (5, 6):
                mask = torch.ones(1, length, device=device)
                given = model.prepare_inputs_for_generation(
                    ids[:, :length], past_key_values=cache, attention_mask=mask, next_sequence_length=1
                )
                assert given["attention_mask"].shape == (1, 1, 1, 1)
                found = compiled(
                    ids[:, length - 1 : length], past_key_values=cache, attention_mask=given["attention_mask"]
                )
                torch.testing.assert_close(found.logits, expected[:, length - 1 : length], **CLOSE)
        assert graphs.frame_count == 1


class TestFallback:
    """What our operators cannot express runs on SDPA, and says so."""

    def test_sliding_window(self) -> None:
        models = [tiny("mistral", i, sliding_window=4) for i in ("refllm", "sdpa")]
        with pytest.warns(UserWarning, match="dot-product attention runs instead, because of a mask in pairs"):
            both(*models, tokens(2, 11))

    def test_packed_sequences(self) -> None:
        models = [load("llama-tiny", i) for i in ("refllm", "sdpa")]
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]] * 2)
        with pytest.warns(UserWarning, match="packed sequences"):
            both(*models, tokens(2, 11), position_ids=positions, use_cache=False)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks_of_four_axes(self, kind: str) -> None:
        models = [load("llama-tiny", i) for i in ("refllm", "sdpa")]
        seen = (torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.7) | torch.eye(11).bool()
        mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf)
        with pytest.warns(UserWarning, match="4-D mask"), torch.no_grad():
            found, expected = (m(tokens(2, 11), attention_mask=mask).logits for m in models)
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_float64(self) -> None:
        models = [load("llama-tiny", i, torch.float64) for i in ("refllm", "sdpa")]
        with pytest.warns(UserWarning, match="float64"):
            both(*models, tokens(2, 4), padded(tokens(2, 4), "left"))

    @pytest.mark.parametrize("form", ["none", "lengths", "keys"])
    def test_cut_keys_stay_cut(self, form: str) -> None:
        """A fallback for another reason keeps the meaning of every form: here, values narrower than keys."""
        q, k, v = heads(10, 15)
        mask = torch.ones(2, 12, dtype=torch.bool).tril(8) if form == "keys" else None
        seen = masks.visible_keys(2, 10, 15, 5 if form == "none" else torch.tensor(2), attention_mask=mask)
        expected = run("refllm", q, k, v, seen)[..., :8]
        with pytest.warns(UserWarning, match="keys 16 and values 8 wide"):
            found = run("refllm", q, k, v[..., :8], seen)
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_warns_once(self) -> None:
        model, ids = tiny("mistral", "refllm", sliding_window=4), tokens(1, 11)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model(ids)
            model(ids)
        assert len(caught) == 1


class TestRefuses:
    """What neither our operators nor SDPA compute as the model means it."""

    @pytest.mark.parametrize(
        ("model_type", "words"), [("gemma2", "softcap was given"), ("gpt_oss", "attention sinks cannot be computed")]
    )
    def test_models_with_more_in_their_softmax(self, model_type: str, words: str) -> None:
        with pytest.raises(InputError, match=words):
            tiny(model_type, "refllm")(tokens(1, 5))

    def test_models_that_take_no_attention_function(self) -> None:
        """Bloom would add our masks to its scores."""
        with pytest.raises(InputError, match="BloomConfig computes attention by itself"):
            tiny("bloom", "refllm", n_head=4)(tokens(1, 5))

    def test_dropout(self) -> None:
        model = tiny("qwen2", "refllm", attention_dropout=0.5).train()
        with pytest.raises(InputError, match=r"dropout of 0\.5 .* attention_dropout = 0 to train, or call"):
            model(tokens(1, 5))

    def test_lengths_of_packed_sequences(self) -> None:
        with pytest.raises(InputError, match="cu_seq_lens_q was given; pass position_ids that start again"):
            load("llama-tiny", "refllm")(tokens(1, 12), cu_seq_lens_q=torch.tensor([0, 4, 12]))

    @pytest.mark.parametrize("name", ["s_aux", "cache", "head_mask", "block_indices"])
    def test_arguments(self, name: str) -> None:
        with pytest.raises(InputError, match=f"in Module: {name} was given"):
            run("refllm", *heads(9, 9), None, **{name: torch.ones(1)})

    def test_a_window_without_its_mask(self) -> None:
        with pytest.raises(InputError, match="a sliding window of 4 over 9 keys"):
            run("refllm", *heads(9, 9), None, sliding_window=4)
        run("refllm", *heads(9, 9), None, sliding_window=9)

    def test_a_causal_mask_where_nothing_is_causal(self) -> None:
        with pytest.raises(InputError, match="not causal was given a causal mask"):
            run("refllm", *heads(9, 9), torch.ones(2, 9, dtype=torch.bool), is_causal=False)

    @pytest.mark.parametrize(
        "mask", [torch.ones(2, 9, 9, dtype=torch.bool), torch.ones(2, 9), torch.ones(2, 1, 9, 9, dtype=torch.int64)]
    )
    def test_other_masks(self, mask: torch.Tensor) -> None:
        with pytest.raises(InputError, match=r"attention_mask is \[2, .*; expected bool, \[B, T\] or \[B, 1, S, T\]"):
            run("refllm", *heads(9, 9), mask)

    def test_unknown_arguments_are_named(self) -> None:
        with pytest.warns(UserWarning, match="'fancy_new_option' is not known and is left out"):
            run("refllm", *heads(9, 9), None, fancy_new_option=1)


def test_gradients() -> None:
    """Those of Torch's attention: a model trains with ours in its place."""
    ids, found = tokens(1, 12), []
    for implementation in ("refllm", "sdpa"):
        model = load("llama-tiny", implementation)
        model(ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_full_attention() -> None:
    """Without a mask, is_causal=False is attention over all keys, as of an encoder or across sequences."""
    q, k, v = heads(9, 12)
    assert_meets_contract("attention", run("refllm", q, k, v, None, is_causal=False), q, k, v, causal=False)


def test_a_module_that_does_not_say_is_causal() -> None:
    """As Transformers takes it."""
    q, k, v = heads(9, 9)
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["refllm"]
    out = function(torch.nn.Module(), q, k, v, None)[0].transpose(1, 2)
    assert_meets_contract("attention", out, q, k, v, causal=True)


class TestWeights:
    @pytest.mark.parametrize("name", ["llama-tiny", "stablelm-tiny-parallel"])
    @pytest.mark.parametrize("side", [None, "left"])
    def test_as_eager_shows_them(self, name: str, side: str | None) -> None:
        """StableLM does not even pass the wish on to its attention."""
        ids = tokens(2, 11)
        mask = torch.ones_like(ids) if side is None else padded(ids, side)
        with torch.no_grad():
            expected = load(name, "eager")(ids, attention_mask=mask, output_attentions=True).attentions
            with pytest.warns(UserWarning, match="attention weights were asked for"):
                found = load(name, "refllm")(ids, attention_mask=mask, output_attentions=True).attentions
        assert len(found) == len(expected) > 0
        counts = mask.bool()[:, None, :, None].expand_as(expected[0])
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[counts], eager[counts], **CLOSE)
            assert not ours[~counts].any(), "a query that sees no key has no weights"

    def test_none_unless_wanted(self) -> None:
        assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["refllm"](Module(), *heads(9, 9), None)[1] is None


def test_the_mask_function_knows_the_causal_pattern() -> None:
    """It is told apart by identity: a version of Transformers that wraps it would send everything to SDPA."""
    config = tiny("qwen2", "refllm").config
    made = create_causal_mask(config, torch.zeros(2, 12, 4), None, None, torch.arange(12)[None])
    assert made is None
    assert causal_mask_function is masks.causal_mask_function
    assert refllm.kernels.transformers.register is kernels.register


WITHOUT = """
import sys
from refllm import kernels
for missing in ("transformers", "transformers.utils.output_capturing"):
    sys.modules[missing] = None
    try:
        kernels.patch
    except Exception as error:
        print(type(error).__name__, error)
    del sys.modules[missing]
    for name in [name for name in sys.modules if name.startswith("refllm.kernels.transformers")]:
        del sys.modules[name]
"""


def test_without_the_right_transformers_it_says_what_to_install() -> None:
    """Without the package, and with one too old to have what is needed."""
    found = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    said = found.stdout.splitlines()
    assert len(said) == 2, found.stderr
    for line in said:
        assert line.startswith("MissingExtraError refllm.kernels.transformers")
        assert line.endswith(install_command("transformers"))
