"""`refllm.kernels.patch`: a Transformers model on our operators, and back again."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from refllm import golden, kernels
from refllm.check import assert_matches
from refllm.check.adapters.transformers_taps import hooks
from refllm.config.traits import TRAITS
from refllm.errors import InputError, RefllmError
from refllm.kernels.transformers import attention, modules
from refllm.mutants.patched_training import points

CHECKPOINTS = sorted(golden.checkpoints())
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Every tiny model has the odd features of its family on: what is left out then cannot be right.
FEATURES: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "arcee": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
}
# Logits of these models are of the order of one; our operators add in another order in float32.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
HEADS = {
    "AutoModel": TRAITS,
    "AutoModelForCausalLM": TRAITS,
    "AutoModelForSequenceClassification": TRAITS,
    "AutoModelForTokenClassification": TRAITS,
    "AutoModelForQuestionAnswering": ("llama", "arcee"),
}


def tiny(family: str, head: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A model in which every weight is random, of norms too, so that none is left out unseen."""
    config = AutoConfig.for_model(family, **{**SIZES, **FEATURES[family], **changes})
    model = getattr(transformers, head).from_config(config, attn_implementation="sdpa").eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(rng.standard_normal(parameter.shape, np.float32))
            norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + values / 5 if norm_weight else values / parameter.shape[-1] ** 0.5)
    return model


def load(name: str, dtype: torch.dtype = torch.float32, implementation: str = "eager", **changes: Any) -> Any:
    options = {"dtype": dtype, "attn_implementation": implementation, **changes}
    return AutoModelForCausalLM.from_pretrained(golden.path(name), **options).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 64, (rows, length)))


def padded(ids: torch.Tensor, side: str) -> torch.Tensor:
    """A mask that hides 3 tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask if side == "left" else mask.flip(1)


def results(model: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Every tensor that a call returns, by its name."""
    with torch.no_grad():
        out = model(*args, **options)
    return {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}


def state(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """What every module of a model holds: shallow copies, to be compared by identity."""
    return [
        (path, {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()})
        for path, module in model.named_modules()
    ]


def same_state(model: Any, before: list[tuple[str, dict[str, Any]]]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        return a is b or (isinstance(a, int | float | str | tuple) and a == b)

    after = state(model)
    return [path for path, _ in after] == [path for path, _ in before] and all(
        same(new, old) for (_, new), (_, old) in zip(after, before, strict=True)
    )


class TestSameAnswers:
    @pytest.mark.parametrize(("dtype", "fuse_qkv"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_holds_against_the_reference(self, name: str, dtype: str, fuse_qkv: bool) -> None:
        model = load(name, getattr(torch, dtype))
        kernels.patch(model, fuse_qkv=fuse_qkv)
        assert_matches(golden.path(name), model, policy="fused")

    @pytest.mark.parametrize("fuse_qkv", [False, True])
    def test_the_check_sees_rotated_heads(self, fuse_qkv: bool) -> None:
        """No module's output shows them, and without them attention could not be judged on its own inputs."""
        model, seen = load("llama-tiny"), []
        kernels.patch(model, fuse_qkv=fuse_qkv)
        with hooks(model, lambda name, _: seen.append(name)):
            results(model, tokens(1, 9))
        first = [name.removeprefix("model.layers.0.self_attn.") for name in seen if "layers.0.self_attn" in name]
        projections = ["v_proj"] if fuse_qkv else ["k_proj", "q_proj", "v_proj"]
        assert sorted(first) == sorted(["context", "k_rope", "o_proj", "q_rope", *projections])
        assert not model.model.layers[0].self_attn.forward.__self__.watchers

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_generates_the_same_tokens(self, name: str) -> None:
        model, ids = load(name), tokens(2, 9)
        for mask in (torch.ones_like(ids), padded(ids, "left")):
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            expected = model.generate(ids, **options)
            beams = model.generate(ids, num_beams=2, **options)
            for fuse_qkv in (False, True):
                with kernels.patch(model, fuse_qkv=fuse_qkv):
                    assert torch.equal(model.generate(ids, **options), expected)
                    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
                    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
                    assert torch.equal(model.generate(ids, num_beams=2, **options), beams)

    @pytest.mark.parametrize(("name", "fuse_qkv"), [*((name, False) for name in CHECKPOINTS), ("helium-tiny", True)])
    def test_generates_the_same_tokens_on_triton(self, device: str, name: str, fuse_qkv: bool) -> None:
        """Of the first layer alone: the interpreter takes its time."""
        model, ids = load(name, num_hidden_layers=1).to(device), tokens(1, 9).to(device)
        options = {"attention_mask": padded(ids, "left"), "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        expected, logits = model.generate(ids, **options), results(model, ids)["logits"]
        with kernels.patch(model, fuse_qkv=fuse_qkv):
            assert torch.equal(model.generate(ids, **options), expected)
            torch.testing.assert_close(results(model, ids)["logits"], logits, **CLOSE)

    @pytest.mark.parametrize(("head", "family"), [(head, f) for head, families in HEADS.items() for f in families])
    def test_every_head(self, head: str, family: str) -> None:
        model, ids = tiny(family, head), tokens(3, 11)
        options: dict[str, Any] = {"attention_mask": padded(ids, "right")}
        if "Causal" in head:
            options["labels"] = ids.masked_fill(options["attention_mask"] == 0, -100)
        elif "Sequence" in head:
            options["labels"] = torch.tensor([0, 1, 1])
            ids = ids.masked_fill(options["attention_mask"] == 0, 0)
        elif "Token" in head:
            options["labels"] = ids % 2
        elif "Question" in head:
            options |= {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 1, 5])}
        expected = results(model, ids, **options)
        with kernels.patch(model):
            found = results(model, ids, **options)
        assert list(found) == list(expected)
        valid = options["attention_mask"].bool()
        for key, value in expected.items():
            per_token = value.shape[:2] == ids.shape
            rows = (slice(None),) if not per_token else (valid,)
            if value.ndim:
                torch.testing.assert_close(found[key][rows], value[rows], **CLOSE)
            elif "Token" not in head:  # whose loss counts padding, which no two implementations need agree on
                torch.testing.assert_close(found[key], value, **CLOSE)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", TRAITS)
    def test_padding(self, family: str, side: str) -> None:
        model, ids = tiny(family), tokens(2, 11)
        mask = padded(ids, side)
        expected = results(model, ids, attention_mask=mask)["logits"]
        with kernels.patch(model):
            found = results(model, ids, attention_mask=mask)["logits"]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("family", TRAITS)
    def test_cache(self, family: str, cache: str) -> None:
        """In pieces as at once, to rounding."""
        model, ids = tiny(family), tokens(2, 13)
        kernels.patch(model)
        whole = results(model, ids)["logits"]
        store = StaticCache(config=model.config, max_cache_len=17) if cache == "static" else None
        parts = []
        with torch.no_grad():
            for piece in ids.split([9, 1, 3], dim=1):
                out = model(piece, past_key_values=store, use_cache=True)
                store, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)

    @pytest.mark.parametrize("family", TRAITS)
    @pytest.mark.parametrize("parallel", [False, True])
    def test_hidden_states_and_attentions(self, family: str, parallel: bool) -> None:
        if parallel and family != "stablelm":
            pytest.skip("only StableLM has parallel layers")
        model, ids = tiny(family, **({"use_parallel_residual": True} if parallel else {})), tokens(2, 9)
        model.set_attn_implementation("eager")
        wanted = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            expected = model(ids, **wanted)
            attention._warn_once.cache_clear()
            with kernels.patch(model), pytest.warns(UserWarning, match="attention weights were asked for"):
                found = model(ids, **wanted)
        for name in ("hidden_states", "attentions"):
            assert len(found[name]) == len(expected[name]) >= 2
            for ours, theirs in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)

    def test_other_activations_and_missing_biases(self) -> None:
        for family in TRAITS:
            plain = {"attention_bias": False, "mlp_bias": False, "use_qkv_bias": False, "qk_layernorm": False}
            known = {key: value for key, value in plain.items() if key in FEATURES[family]}
            model, ids = tiny(family, hidden_act="gelu", **known), tokens(2, 9)
            expected = results(model, ids)["logits"]
            with kernels.patch(model, fuse_qkv=True) as patch:
                assert "mlp: its activation is GELUActivation; there is an operator for" in patch.report()
                torch.testing.assert_close(results(model, ids)["logits"], expected, **CLOSE)


class TestLoss:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_items_in_batch": 7},
            {"num_items_in_batch": torch.tensor(7)},
            {"ignore_index": 5},
            {"shift_labels": tokens(2, 11, seed=3)},
        ],
        ids=lambda options: "-".join(options) or "mean",
    )
    def test_is_that_of_transformers(self, options: dict[str, Any]) -> None:
        model, ids = tiny("llama"), tokens(2, 11)
        ids[0, 4] = 5
        expected = results(model, ids, labels=ids, **options)["loss"]
        with kernels.patch(model):
            found = results(model, ids, labels=ids, **options)["loss"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_of_the_users_own_stays(self) -> None:
        model = tiny("llama")
        model.loss_function = lambda **_: torch.tensor(42.0)
        with kernels.patch(model) as patch:
            assert results(model, tokens(1, 4), labels=tokens(1, 4))["loss"] == 42
            assert "loss: the model has been given a loss function of its own" in patch.report()
        assert results(model, tokens(1, 4), labels=tokens(1, 4))["loss"] == 42


class TestWhatRuns:
    """The operators are really called, and as often as the report says."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
        seen: list[tuple[str, str | None]] = []
        real = modules.call

        def spy(name: str, backend: str | None, *args: Any, **options: Any) -> Any:
            seen.append((name, backend))
            return real(name, backend, *args, **options)

        for module in (modules, attention):
            monkeypatch.setattr(module, "call", spy)
        return seen

    @pytest.mark.parametrize(
        ("family", "changes", "expected"),
        [
            ("helium", {}, {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "swiglu": 2}),
            ("llama", {}, {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "swiglu": 2}),
            ("arcee", {}, {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "relu2": 2}),
            ("stablelm", {}, {"layer_norm": 3, "add_layer_norm": 2, "norm_rope": 2, "swiglu": 2}),
            ("stablelm", {"use_parallel_residual": True}, {"layer_norm": 3, "norm_rope": 2, "swiglu": 2}),
            ("stablelm", {"qk_layernorm": False}, {"layer_norm": 3, "add_layer_norm": 2, "rope": 2, "swiglu": 2}),
        ],
    )
    @pytest.mark.parametrize("fuse_qkv", [False, True])
    def test_operators(
        self, family: str, changes: dict[str, Any], expected: dict[str, int], fuse_qkv: bool, calls: list[Any]
    ) -> None:
        model, ids = tiny(family, **changes), tokens(2, 9)
        kernels.patch(model, backend="torch", fuse_qkv=fuse_qkv)
        results(model, ids, labels=ids)
        expected = expected | {"attention": 2, "cross_entropy": 1}
        if fuse_qkv and family != "stablelm":
            del expected["rope"]
            expected |= {"rms_norm": 1, "rms_norm_qkv_rope": 2}
        assert {name: [n for n, _ in calls].count(name) for name, _ in calls} == expected
        assert {backend for _, backend in calls} == {"torch"}
        calls.clear()
        results(model, ids[:, :1])
        assert [name for name, _ in calls].count("decode_attention") == 2

    def test_the_backend_is_chosen_by_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny("llama")
        kernels.patch(model)
        monkeypatch.setattr(kernels, "rms_norm", lambda *_: 1 / 0, raising=False)
        results(model, tokens(1, 3))
        with kernels.interpreted(), pytest.raises(ZeroDivisionError):
            results(model, tokens(1, 3))

    def test_triton_by_name_is_an_error_without_a_gpu(self) -> None:
        model = tiny("llama")
        kernels.patch(model, backend="triton")
        with pytest.raises(RefllmError, match="interpreted"):
            results(model, tokens(1, 3))

    def test_report(self) -> None:
        with kernels.patch(tiny("arcee"), fuse_qkv=True) as patch:
            assert patch.report().splitlines()[:7] == [
                "ArceeForCausalLM on refllm.kernels (Triton on a GPU, plain Torch elsewhere)",
                "swapped",
                "    2 x input_layernorm, self_attn     rms_norm_qkv_rope, attention, decode_attention",
                "    2 x mlp                            relu2",
                "    2 x sum, post_attention_layernorm  add_rms_norm",
                "    1 x norm                           rms_norm",
                "    1 x loss                           cross_entropy",
            ]
        report = kernels.patch(tiny("stablelm", "AutoModel", use_parallel_residual=True), fuse_qkv=True).report()
        for line in (
            "q, k, v projections: fuse_qkv: there is an operator for RMSNorm before them, not for LayerNorm",
            "sums of parallel layers: no norm follows them directly",
            "loss: there is an operator for that of causal language models",
            "linear layers and embeddings: ",
        ):
            assert f"\n  {line}" in report


class TestUndo:
    @pytest.mark.parametrize("fuse_qkv", [False, True])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_restores_everything(self, name: str, implementation: str, fuse_qkv: bool) -> None:
        model, ids = load(name, implementation=implementation), tokens(2, 9)
        expected, before = results(model, ids, labels=ids), state(model)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        for undo in ("method", "function", "context"):
            patch = kernels.patch(model, fuse_qkv=fuse_qkv)
            assert not same_state(model, before)
            results(model, ids)
            if undo == "method":
                patch.undo()
                patch.undo()
            elif undo == "function":
                kernels.unpatch(model)
            else:
                with patch:
                    pass
            assert same_state(model, before)
        assert model.config._attn_implementation == implementation
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        found = results(model, ids, labels=ids)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_separate_storage_again(self) -> None:
        model = tiny("llama")
        with kernels.patch(model, fuse_qkv=True):
            q, k = model.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.k_proj.weight
            assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        assert q is model.model.layers[0].self_attn.q_proj.weight

    def test_a_patch_that_fails_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny("llama")
        before = state(model)
        monkeypatch.setattr("refllm.kernels.transformers.patching.CausalLoss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kernels.patch(model, fuse_qkv=True)
        assert same_state(model, before)

    def test_other_models_are_untouched(self) -> None:
        """Not even one made with the same config object."""
        one = tiny("llama")
        other = type(one)(one.config).eval()
        assert other.config is one.config
        expected, before, classes = results(other, tokens(2, 9)), state(other), dict(vars(type(one)))
        functions = dict(vars(transformers.models.llama.modeling_llama))
        with kernels.patch(one):
            assert same_state(other, before)
            assert torch.equal(results(other, tokens(2, 9))["logits"], expected["logits"])
            assert dict(vars(type(one))) == classes
            assert dict(vars(transformers.models.llama.modeling_llama)) == functions
            assert one.config is not other.config


class TestLiving:
    """A patched model can be used as any other."""

    def test_hooks_see_what_they_saw(self) -> None:
        model, ids = tiny("stablelm"), tokens(2, 9)

        def recorded() -> dict[str, torch.Tensor]:
            seen, handles = {}, []
            for path, module in model.named_modules():
                if path.endswith(("layernorm", "norm", "_proj", "mlp")) and "norms" not in path:

                    def hook(_: Any, args: Any, out: Any, path: str = path) -> None:
                        seen[path], seen[f"{path} in"] = out, args[0]

                    handles.append(module.register_forward_hook(hook))
            results(model, ids)
            for handle in handles:
                handle.remove()
            return seen

        expected = recorded()
        with kernels.patch(model):
            found = recorded()
        assert {path for path in expected if path not in found} == {
            f"model.layers.{i}.self_attn.{name}_layernorm{end}" for i in (0, 1) for name in "qk" for end in ("", " in")
        }, "norms of heads are part of norm_rope"
        for path, value in found.items():
            torch.testing.assert_close(value, expected[path], **CLOSE)

    @pytest.mark.parametrize("family", ["llama", "stablelm"])
    def test_a_hook_that_changes_the_input_of_a_norm(self, family: str) -> None:
        """The sum and the norm are one operator, yet what a hook puts in between counts."""
        model, ids = tiny(family), tokens(2, 9)
        norm = model.model.layers[0].post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))
        expected = results(model, ids)["logits"]
        with kernels.patch(model):
            torch.testing.assert_close(results(model, ids)["logits"], expected, **CLOSE)

    def test_new_weights_count(self) -> None:
        for fuse_qkv in (False, True):
            model, other, ids = tiny("stablelm"), tiny("stablelm"), tokens(2, 9)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.copy_(parameter.flip(-1))
            kernels.patch(model, fuse_qkv=fuse_qkv)
            model.load_state_dict(other.state_dict())
            torch.testing.assert_close(results(model, ids)["logits"], results(other, ids)["logits"], **CLOSE)

    def test_another_dtype(self) -> None:
        model, ids = tiny("llama"), tokens(2, 9)
        kernels.patch(model)
        logits = results(model, ids)["logits"]
        found = results(model.to(torch.bfloat16), ids)["logits"]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), logits, rtol=0.1, atol=0.1)

    def test_another_dtype_under_fused_projections_is_an_error(self) -> None:
        model = tiny("llama")
        kernels.patch(model, fuse_qkv=True)
        with pytest.raises(InputError, match="moved, cast or replaced afterwards; undo the patch and patch again"):
            results(model.to(torch.bfloat16), tokens(2, 9))
        kernels.unpatch(model)
        with kernels.patch(model, fuse_qkv=True):
            results(model, tokens(2, 9))

    def test_autocast(self) -> None:
        model, ids = tiny("llama"), tokens(2, 9)
        with torch.autocast("cpu", torch.bfloat16):
            expected = results(model, ids)["logits"]
            with kernels.patch(model):
                found = results(model, ids)["logits"]
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)

    def test_a_deep_copy_is_patched_and_independent(self) -> None:
        model, ids = tiny("llama"), tokens(2, 9)
        kernels.patch(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.norm.weight.zero_()
        assert results(model, ids)["logits"].any()
        assert not results(twin, ids)["logits"].any()
        kernels.unpatch(twin)
        assert twin.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "refllm"

    @pytest.mark.parametrize("fuse_qkv", [False, True])
    def test_saving(self, tmp_path: Path, fuse_qkv: bool) -> None:
        model, ids = tiny("helium"), tokens(2, 9)
        expected = results(model, ids)["logits"]
        kernels.patch(model, fuse_qkv=fuse_qkv)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert torch.equal(results(again, ids)["logits"], expected)

    def test_another_attention_can_be_set(self) -> None:
        model, ids = tiny("llama"), tokens(2, 9)
        expected = results(model, ids)["logits"]
        with kernels.patch(model):
            for name in ("eager", "sdpa"):
                model.set_attn_implementation(name)
                torch.testing.assert_close(results(model, ids)["logits"], expected, **CLOSE)

    def test_compiles_to_one_graph(self, device: str) -> None:
        model, ids = tiny("llama", num_hidden_layers=1).to(device), tokens(1, 9).to(device)
        expected = results(model, ids)["logits"]
        kernels.patch(model)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        with torch.no_grad():
            # With a mask: without, a traced forward takes its position ids for those of packed sequences.
            found = compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            torch.testing.assert_close(found, expected, **CLOSE)


def gradients(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Those of the loss on a padded batch."""
    ids = tokens(2, 11)
    model.zero_grad(set_to_none=True)
    model(ids, attention_mask=padded(ids, "left"), labels=ids, **options).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(x, expected[name]) for name, x in found.items())


class TestTraining:
    @pytest.mark.parametrize("family", FEATURES)
    def test_gradients_are_those_of_the_unpatched_model(self, family: str) -> None:
        model = tiny(family).train()
        expected = gradients(model)
        for fuse_qkv in (False, True) if family != "stablelm" else (False,):
            with kernels.patch(model, fuse_qkv=fuse_qkv):
                found = gradients(model)
                for name, right in expected.items():
                    scale = float(right.abs().max())
                    torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-5 * scale, msg=name)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                assert equal(gradients(model, use_cache=False), found), "recomputed is kept"
                model.gradient_checkpointing_disable()
        assert equal(gradients(model), expected), "undone"

    def test_a_part_that_is_frozen_has_no_gradient_and_all_others_have_theirs(self) -> None:
        model = tiny("llama").train()
        kernels.patch(model, fuse_qkv=True)
        every = gradients(model)
        frozen = [name for name in every if "k_proj" in name or "norm" in name]
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        found = gradients(model)
        assert found.keys() == every.keys() - set(frozen)
        assert equal(found, {name: every[name] for name in found})

    def test_a_hook_on_the_norm_after_a_sum_sees_the_whole_gradient_of_the_sum(self) -> None:
        """As one result of two, the sum would have what comes back around the norm alone."""
        model, seen = tiny("helium").train(), list[torch.Tensor]()

        def look(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            args[0].register_hook(seen.append)

        hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(look)
        gradients(model)
        with kernels.patch(model):
            gradients(model)
        hook.remove()
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-6)

    def test_along_a_run_every_gradient_is_within_the_prediction(self) -> None:
        found = list(points(2, steps_each=1))
        assert all(point.verdict != "fails" and 0.7 < point.ratio < 1.4 for point in found), found
        assert found[1].step == 1
        assert found[1].loss != found[0].loss

    def test_a_gradient_that_is_wrong_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = kernels.plain.attention_backward

        def wrong(*args: Any, **options: Any) -> Any:
            first, *others = right(*args, **options)
            return 1.05 * first, *others

        monkeypatch.setattr(kernels.plain, "attention_backward", wrong)
        (found,) = points(1)
        assert found.verdict == "fails"
        assert found.why.startswith("grad:"), found


class TestRefuses:
    @pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "mistral"])
    def test_other_families(self, model_type: str) -> None:
        sizes = {**SIZES, "n_embd": 32, "n_head": 4, "n_layer": 2} if model_type == "gpt2" else SIZES
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
        words = rf"\(model_type '{model_type}'\) is not known; known are helium, llama, .* attn_implementation=.refllm"
        with pytest.raises(InputError, match=words):
            kernels.patch(model)

    @pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), "llama", None])
    def test_what_is_no_transformers_model(self, what: Any) -> None:
        with pytest.raises(InputError, match=f"patch: model is a {type(what).__name__}; expected a Transformers model"):
            kernels.patch(what)

    def test_a_patched_model(self) -> None:
        model = tiny("llama")
        kernels.patch(model)
        for part in (model, model.model):
            with pytest.raises(InputError, match=r"is patched already; refllm\.kernels\.unpatch\(model\) undoes that"):
                kernels.patch(part)
        kernels.unpatch(model)
        kernels.patch(model.model)
        with pytest.raises(InputError, match="is patched already"):
            kernels.patch(model)

    def test_unpatching_what_is_not_patched(self) -> None:
        with pytest.raises(InputError, match="unpatch: this LlamaForCausalLM is not patched"):
            kernels.unpatch(tiny("llama"))

    def test_a_model_without_weights(self) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
        with pytest.raises(InputError, match="weights on the meta device"):
            kernels.patch(model)

    def test_float64(self) -> None:
        with pytest.raises(InputError, match=r"is torch\.float64; the operators take"):
            kernels.patch(tiny("llama").double())

    def test_a_module_of_another_class(self) -> None:
        model = tiny("llama")
        model.model.layers[1].input_layernorm = torch.nn.LayerNorm(32)
        with pytest.raises(InputError, match=r"layers\.1\.input_layernorm of .* is a LayerNorm, not LlamaRMSNorm"):
            kernels.patch(model)

    def test_a_forward_of_somebody_else(self) -> None:
        model = tiny("llama")
        model.model.layers[1].mlp.forward = lambda x: x
        with pytest.raises(InputError, match=r"layers\.1\.mlp of this LlamaForCausalLM has a forward of its own"):
            kernels.patch(model)

    def test_an_unknown_backend(self) -> None:
        with pytest.raises(InputError, match="backend='cuda' is not known; use 'triton', 'torch' or None"):
            kernels.patch(tiny("llama"), backend="cuda")


def test_other_linear_layers_are_fine() -> None:
    """Quantised ones, say: they are called as modules; only fuse_qkv needs plain ones, and says so."""

    class Halved(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model, ids = tiny("llama"), tokens(2, 9)
    model.model.layers[0].self_attn.q_proj.__class__ = Halved
    expected = results(model, ids)["logits"]
    with kernels.patch(model, fuse_qkv=True) as patch:
        assert "q, k, v projections: fuse_qkv: they are not all torch.nn.Linear" in patch.report()
        assert "1 x self_attn " in patch.report()
        torch.testing.assert_close(results(model, ids)["logits"], expected, **CLOSE)
