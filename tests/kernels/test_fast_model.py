"""The fast models: every family and head on Torch and on (interpreted) Triton, against the reference."""

import copy
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model

import refllm
from refllm import golden
from refllm.check.api import compare
from refllm.errors import InputError
from refllm.forward.cache import DynamicCache
from refllm.forward.model import Model
from refllm.generation import decoding
from refllm.inputs import to_numpy
from refllm.kernels.fusions import fusions
from refllm.kernels.models.decode import DecodeStep
from refllm.kernels.models.fast_model import FastModel
from refllm.models.families import CLASSES

DEVICE = os.environ.get("REFLLM_TEST_DEVICE", "cpu")
BACKENDS = ("torch", "triton")
CHECKPOINTS = sorted(golden.checkpoints())
PAD = 3


@cache
def pair(name: str, backend: str, **changes: Any) -> tuple[Model, FastModel]:
    """A small reference model in float32, and the fast model with its weights."""
    if not name.startswith("StableLm"):
        changes = {"head_dim": 8, **changes}  # the smallest that kernels take
    reference = tiny_model(name, dtype="float32", **{"hidden_size": 32, **changes})
    return reference, FastModel.of(reference, backend=backend, device=DEVICE)


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(PAD + 1, VOCAB, shape)


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal up to float32 roundings of a two-layer model whose values are of the order of one."""
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def causal(request: pytest.FixtureRequest, backend: str) -> tuple[Model, FastModel]:
    return pair(f"{request.param}ForCausalLM", backend)


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_error_is_that_of_the_fused_policy(checkpoint: str, dtype: str, backend: str) -> None:
    folder = golden.checkpoints()[checkpoint]
    emulated = refllm.load(folder, dtype=dtype, policy="fused")
    exact = type(emulated)(emulated.config, emulated.weights, refllm.precision.EXACT)
    tokens = np.random.default_rng(1).integers(0, exact.config.vocab_size, (1, 17) if backend == "triton" else (2, 32))
    truth = exact(input_ids=tokens).logits
    fast = refllm.load(folder, dtype=dtype, backend=backend, device=DEVICE)

    def error(logits: Any) -> float:
        return float(np.sqrt(np.mean((to_numpy(logits) - truth) ** 2)))

    ratio = error(fast(input_ids=tokens).logits) / error(emulated(input_ids=tokens).logits)
    assert ratio < 1.25, ratio


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_check_holds_with_every_value_judged_in_isolation(checkpoint: str, backend: str) -> None:
    tokens = np.arange(17 if backend == "triton" else 64)[None] * 7 % 500
    (report,) = compare(
        golden.checkpoints()[checkpoint], backend, dtype="bfloat16", policy="fused", input_ids=tokens, isolate=False
    )
    assert [tap.name for tap in report.taps if tap.broken] == []
    judged = {tap.name.rsplit(".", 1)[-1] for tap in report.taps if tap.isolated is not None}
    assert {"q_rope", "k_rope", "context", "o_proj", "residual_mid", "act", "norm", "lm_head"} <= judged


@pytest.mark.parametrize("name", sorted(name for name in CLASSES if name.startswith(FAMILIES)))
def test_every_head_and_its_loss(name: str, backend: str) -> None:
    reference, fast = pair(name, backend, num_labels=3)
    tokens, rng = ids(3, 6), np.random.default_rng(2)
    mask = np.ones((3, 6), int)
    mask[1, 4:], tokens[1, 4:] = 0, PAD
    labels: dict[str, Any] = {
        "base": {},
        "causal_lm": {"labels": np.where(mask, tokens, -100)},
        "sequence_classification": {"labels": rng.integers(0, 3, 3)},
        "token_classification": {"labels": rng.integers(0, 3, (3, 6))},
        "question_answering": {"start_positions": np.array([0, 2, 9]), "end_positions": np.array([3, 2, 1])},
    }[fast.head]
    call = {"input_ids": tokens, "attention_mask": mask, **labels}
    expected, found = reference(**call), fast(**call)
    assert found.keys() == expected.keys()
    for key in set(found.keys()) - {"past_key_values"}:
        seen = mask.astype(bool) if np.ndim(expected[key]) > 1 and np.shape(expected[key])[:2] == (3, 6) else ...
        close(to_numpy(found[key])[seen], np.asarray(expected[key])[seen])


def test_hidden_states_attentions_and_logits_to_keep(causal: tuple[Model, FastModel]) -> None:
    reference, fast = causal
    call = {"input_ids": ids(2, 5), "output_hidden_states": True, "output_attentions": True, "logits_to_keep": 2}
    expected, found = reference(**call), fast(**call)
    close(found.logits, expected.logits)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name])
        for a, b in zip(found[name], expected[name], strict=True):
            close(a, b)


def test_positions_per_row_packed_sequences_embeddings_and_masks_of_pairs(causal: tuple[Model, FastModel]) -> None:
    reference, fast = causal
    tokens = ids(2, 6)
    packed = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    pairs = np.tril(np.random.default_rng(0).random((2, 1, 6, 6)) < 0.7) | np.eye(6, dtype=bool)
    embeds = np.random.default_rng(1).standard_normal((2, 6, 32)).astype(np.float32)
    calls: list[dict[str, Any]] = [
        {"input_ids": tokens, "position_ids": np.array([[9, 3, 4, 30, 2, 2], [0, 1, 2, 3, 4, 5]]), "use_cache": True},
        {"input_ids": tokens, "position_ids": packed, "use_cache": False},
        {"input_ids": tokens, "attention_mask": pairs},
        {"input_ids": tokens, "attention_mask": np.where(pairs, 0, -np.inf).astype(np.float32)},
        {"inputs_embeds": embeds},
    ]
    for call in calls:
        close(fast(**call).logits, reference(**call).logits)


def test_tensors_and_arrays_are_the_same_input_and_results_are_tensors(backend: str) -> None:
    _, fast = pair("LlamaForCausalLM", backend)
    tokens = ids(1, 4)
    a = fast(input_ids=tokens).logits
    b = fast(input_ids=torch.tensor(tokens, device=DEVICE)).logits
    assert isinstance(a, torch.Tensor)
    assert torch.equal(a, b)
    assert not a.requires_grad


# ----------------------------------------------------------------------------------------------------------- properties


def test_decode_and_chunks_equal_prefill(causal: tuple[Model, FastModel]) -> None:
    _, fast = causal
    tokens = ids(2, 9)
    whole = fast(input_ids=tokens).logits
    store, parts, start = fast.new_cache(), [], 0
    for size in (1, 4, 1, 1, 2):
        parts.append(fast(input_ids=tokens[:, start : start + size], past_key_values=store).logits)
        start += size
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_greedy_generation_is_the_reference_s(checkpoint: str, backend: str) -> None:
    folder = golden.checkpoints()[checkpoint]
    reference, fast = refllm.load(folder), refllm.load(folder, backend=backend, device=DEVICE)
    prompt = np.random.default_rng(3).integers(5, reference.config.vocab_size, (2, 6))
    mask = np.ones((2, 6), int)
    mask[0, :2] = 0
    few = 2 if backend == "triton" else 10
    # Interpreted once, with padding; what is read at once and in steps without a mask is compared above and below.
    ways: list[dict[str, Any]] = [{"attention_mask": mask}]
    if backend == "torch":
        ways += [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
        ways += [{"use_cache": False}]
    for way in ways:
        expected = reference.generate(prompt, max_new_tokens=few, do_sample=False, **way)
        assert np.array_equal(fast.generate(prompt, max_new_tokens=few, do_sample=False, **way), expected), way


def test_recorded_step_of_decoding_is_the_ordinary_call(causal: tuple[Model, FastModel]) -> None:
    """What a CUDA graph repeats, run without one: the same numbers, and the cache goes on in step."""
    _, fast = causal
    tokens = ids(2, 7)
    ordinary, stepped = fast.new_cache(), fast.new_cache()
    for store in (ordinary, stepped):
        fast(input_ids=tokens[:, :4], past_key_values=store)
    step = DecodeStep(fast, stepped)
    with refllm.kernels.interpreted() if fast.backend == "triton" and DEVICE == "cpu" else torch.no_grad():
        for i in range(4, 7):
            expected = fast(input_ids=tokens[:, i : i + 1], past_key_values=ordinary).logits
            assert step.fits(stepped)
            found = step.run(stepped, tokens[:, i : i + 1], np.full((2, 1), i))
            close(found, expected)
            assert stepped.get_seq_length() == ordinary.get_seq_length() == i + 1
    stepped.reorder_cache(np.array([1, 0]))
    assert step.fits(stepped)
    stepped.batch_repeat_interleave(2)
    assert not step.fits(stepped)


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({}, True),
        ({"attention_mask": np.ones((2, 5))}, True),
        ({"position_ids": np.full((2, 1), 4)}, True),
        ({"use_cache": True, "logits_to_keep": 1}, True),
        ({"attention_mask": np.array([[1] * 5, [0, 1, 1, 1, 1]])}, False),
        ({"attention_mask": np.ones((2, 1, 1, 5), bool)}, False),
        ({"use_cache": False}, False),
        ({"output_attentions": True}, False),
        ({"input_ids": ids(2, 2)}, False),
        ({"past_key_values": None}, False),
        ({"past_key_values": "empty"}, False),
    ],
)
def test_one_token_after_a_cache_is_a_recorded_step_and_gives_what_a_call_gives(
    given: dict[str, Any], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast = pair("LlamaForCausalLM", "torch")
    steps: list[int] = []
    right = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self, *rest: steps.append(1) or right(self, *rest))
    logits = []
    for records in (False, True):
        monkeypatch.setattr(fast, "records_decoding", records)
        store = fast.new_cache(8)
        fast(input_ids=ids(2, 4), past_key_values=store)
        call: dict[str, Any] = {"input_ids": ids(2, 1, seed=5), "past_key_values": store, **given}
        if call["past_key_values"] == "empty":
            call["past_key_values"] = fast.new_cache(8)
        logits.append(fast(**call).logits)
    assert len(steps) == recorded
    close(logits[1], logits[0])


def test_a_copy_of_a_model_has_its_weights_and_no_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair("LlamaForCausalLM", "torch")
    monkeypatch.setattr(fast, "records_decoding", True)
    store = fast.new_cache(8)
    for count in (3, 1):
        fast(input_ids=ids(1, count), past_key_values=store)
    twin = copy.deepcopy(fast)
    assert (len(fast._steps), len(twin._steps)) == (1, 0)
    assert type(twin) is type(fast)
    close(twin(input_ids=ids(1, 3)).logits, fast(input_ids=ids(1, 3)).logits)


def test_a_recorded_step_goes_when_its_cache_goes_and_serves_it_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a graph and the tensors of the cache: gigabytes, of a conversation that is over."""
    _, fast = pair("LlamaForCausalLM", "torch")
    monkeypatch.setattr(fast, "records_decoding", True)
    made: list[DecodeStep] = []
    right = DecodeStep.__init__
    monkeypatch.setattr(DecodeStep, "__init__", lambda self, *rest: made.append(self) or right(self, *rest))
    one, other = fast.new_cache(8), fast.new_cache(8)
    for store in (one, other):
        fast(input_ids=ids(1, 3), past_key_values=store)
    for i in range(3):
        for store in (one, other):  # in turns
            fast(input_ids=ids(1, 1, seed=i), past_key_values=store)
    assert len(made) == 2
    steps = [weakref.ref(step) for step in made]
    made.clear()
    del store, other
    assert [step() is None for step in steps] == [False, True]
    del one
    assert steps[0]() is None
    fast.generate(ids(1, 3), max_new_tokens=4, do_sample=False)
    assert len(made) == 1
    assert len(fast._steps) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_tokens_are_those_of_argmax_on_the_host(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.integers(-3, 4, (64, 1000)).astype(np.float32)).to(dtype)  # many equal ones
    logits[0] = -torch.inf
    logits[1] = 0.0
    logits[2, 400:] = -0.0
    logits[3, 7] = logits[3, 900] = torch.inf
    logits[4:20, 900] = torch.nan
    logits[12:20, 30] = torch.nan
    logits[20] = torch.nan
    for some in (logits, logits.t().contiguous().t(), logits[:, 1::3]):
        found = FastModel.greedy_tokens(some.to(DEVICE))
        assert found.dtype == np.int64
        assert np.array_equal(found, np.argmax(to_numpy(some), axis=-1))


def test_greedy_generation_reads_no_logits_on_the_host_unless_something_else_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, fast = pair("LlamaForCausalLM", "torch")
    prompt = ids(2, 5)
    read: list[Any] = []
    right = decoding.to_numpy
    monkeypatch.setattr(decoding, "to_numpy", lambda logits: read.append(logits) or right(logits))
    tokens = fast.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=int(prompt[0, 0]), pad_token_id=0)
    assert not read
    ways: list[dict[str, Any]] = [
        {"logits_processor": [lambda ids, scores: scores]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "seed": 0},
        {"num_beams": 2},
    ]
    for way in ways:
        read.clear()
        settings = {"do_sample": False, "eos_token_id": int(prompt[0, 0]), "pad_token_id": 0, **way}
        found = fast.generate(prompt, max_new_tokens=6, **settings)
        assert read, way
        if "logits_processor" in way or "return_dict_in_generate" in way:
            assert np.array_equal(getattr(found, "sequences", found), tokens), way


# -------------------------------------------------------------------------------------------------------------- weights


def test_projections_lie_in_one_matrix_and_keep_their_names() -> None:
    _, fast = pair("StableLmForCausalLM", "torch")
    w, c = fast.weights.layer(1), fast.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, rows in (("q", slice(0, q)), ("k", slice(q, q + kv)), ("v", slice(q + kv, None))):
        part = w["self_attn.qkv.weight"][rows]
        assert part.data_ptr() == w[f"self_attn.{name}_proj.weight"].data_ptr()
        assert torch.equal(part, w[f"self_attn.{name}_proj.weight"])
    assert torch.equal(w["self_attn.k_layernorm.weight"][1], w["self_attn.k_layernorm.norms.1.weight"])
    assert torch.equal(w["mlp.gate_up.weight"][c.intermediate_size :], w["mlp.up_proj.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_the_model(family: str, tmp_path: Path) -> None:
    _, fast = pair(f"{family}ForCausalLM", "torch")
    fast.save_pretrained(tmp_path, dtype="float32")
    again = refllm.load(tmp_path, backend="torch", device=DEVICE)
    assert torch.equal(again(input_ids=ids(1, 5)).logits, fast(input_ids=ids(1, 5)).logits)


def test_tied_head_is_the_embedding_itself() -> None:
    _, fast = pair("LlamaForCausalLM", "torch", tie_word_embeddings=True)
    assert fast.weights["lm_head.weight"] is fast.weights["embed_tokens.weight"]


def test_fresh_model_has_the_reference_s_weights() -> None:
    config = tiny_model("HeliumForCausalLM").config
    a = CLASSES["HeliumForCausalLM"].from_config(config, seed=5)
    b = refllm.kernels.fast_class(CLASSES["HeliumForCausalLM"]).fresh(config, seed=5, device=DEVICE)
    assert set() < set(a.weights) <= set(b.weights)
    for name, value in a.weights.items():
        assert np.array_equal(to_numpy(b.weights[name]), value), name


# ------------------------------------------------------------------------------------------------- fallbacks and errors


@pytest.mark.parametrize("family", FAMILIES)
def test_fallbacks_are_named(family: str) -> None:
    config = tiny_model(f"{family}ForCausalLM").config
    assert "gelu" not in str(fusions(config))
    other = tiny_model(f"{family}ForCausalLM", hidden_act="gelu").config
    assert [f.operator for f in fusions(other) if "gelu" in f.instead] == [
        "relu2" if family == "Arcee" else "swiglu",
    ]


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "relu2", "quick_gelu", "mish", "laplace", "silu"])
def test_activations_without_a_kernel_are_the_reference_s(act: str) -> None:
    for family in ("Arcee", "Helium"):
        reference, fast = pair(f"{family}ForCausalLM", "torch", hidden_act=act)
        close(fast(input_ids=ids(1, 4)).logits, reference(input_ids=ids(1, 4)).logits)


def test_a_cache_that_is_too_short_says_so_and_keeps_what_it_held(backend: str) -> None:
    _, fast = pair("HeliumForCausalLM", backend)
    store = fast.new_cache(max_cache_len=5)
    fast(input_ids=ids(1, 4), past_key_values=store)
    with pytest.raises(InputError, match="6 tokens do not fit into the 5 slots"):
        fast(input_ids=ids(1, 2), past_key_values=store)
    assert store.get_seq_length() == 4
    again = fast(input_ids=ids(1, 5)[:, 4:], past_key_values=store).logits
    close(again, fast(input_ids=ids(1, 5)).logits[:, 4:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "jax"}, "numpy, torch, triton"),
        ({"backend": "torch", "dtype": "float64"}, "float32, bfloat16, float16"),
        ({"backend": "torch", "device": "tpu"}, "device='tpu'"),
        ({"backend": "torch", "device": "cuda:77"}, "torch sees"),
        ({"backend": "torch", "policy": "hf-eager"}, "policy fused"),
        ({"backend": "triton", "low_memory": True}, "low_memory"),
        ({"backend": "numpy", "device": "cuda"}, "runs on the CPU"),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_loaded_is_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        refllm.load(golden.checkpoints()["llama-tiny"], **options)
    assert "\n" not in str(raised.value)


def test_a_cache_of_another_backend_is_refused() -> None:
    _, fast = pair("HeliumForCausalLM", "torch")
    with pytest.raises(InputError, match="needs the cache that its new_cache"):
        fast(input_ids=ids(1, 2), past_key_values=DynamicCache())


def test_out_of_memory_is_one_sentence_and_the_cache_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair("HeliumForCausalLM", "torch")
    store = fast.new_cache()
    fast(input_ids=ids(1, 3), past_key_values=store)

    def no_memory(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("refllm.models.heads.causal_lm", no_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    with pytest.raises(InputError, match=r"out of memory on .* \(1\.0 of 8\.0 GiB free\); use a shorter input"):
        fast(input_ids=ids(1, 2), past_key_values=store)
    assert store.get_seq_length() == 3


def test_one_row_is_shared_out_among_threads_and_the_same_product() -> None:
    from refllm.kernels.models.operators import TorchOperators

    x, weight, bias = torch.randn(1, 1, 96), torch.randn(64, 96), torch.randn(64)
    close(TorchOperators.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):  # 64 rows fall into two parts, not into three
            torch.set_num_threads(count)
            close(TorchOperators.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
