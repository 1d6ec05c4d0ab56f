"""What the fast model's pages call besides kernels: attention in steps, products, losses; and which kernel is asked."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tiny import tiny_model  # noqa: E402

from refllm import ops  # noqa: E402
from refllm.kernels.fusions import fusions  # noqa: E402
from refllm.kernels.models.operators import TorchOperators  # noqa: E402

B, H, K, S, T, D = 2, 4, 2, 3, 5, 8
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.standard_normal(shape) for shape in ((B, H, S, D), (B, K, T, D), (B, K, T, D)))
SEEN = np.array([[True, True, False, True, True], [False] * 4 + [True]])
PAIRS = RNG.random((B, 1, S, T)) > 0.4
BIAS = np.where(PAIRS, RNG.standard_normal((B, 1, S, T)), -np.inf)


class Kept:
    """A recorder that wants everything."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def wants(self, name: str) -> bool:
        return True

    def record(self, name: str, value: Any) -> None:
        self.values[name] = value.numpy()


def tensor(x: Any) -> Any:
    return None if x is None else torch.from_numpy(x if x.dtype == bool else x.astype(np.float32))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_mask", [None, SEEN])
@pytest.mark.parametrize("mask", [None, PAIRS, BIAS], ids=["none", "pairs", "bias"])
def test_attention_in_steps_is_the_definition_with_its_scores_and_weights(
    causal: bool, key_mask: Any, mask: Any
) -> None:
    asked: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "mask": mask}
    exact: dict[str, np.ndarray] = {}
    o = ops.attention(Q, KEYS, VALUES, tap=lambda name, value: exact.__setitem__(name, value), **asked)
    kept, given = Kept(), {"causal": causal, "key_mask": tensor(key_mask), "mask": tensor(mask)}
    out = TorchOperators("torch", kept, "layer.").attention(*map(tensor, (Q, KEYS, VALUES)), **given)
    np.testing.assert_allclose(out.numpy(), o, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept.values["layer.self_attn.probs"], exact["probs"], rtol=1e-5, atol=1e-6)
    scores = Q @ KEYS.repeat(H // K, axis=1).swapaxes(2, 3) / D**0.5
    np.testing.assert_allclose(kept.values["layer.self_attn.scores"], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "new", "keys", "causal", "masked", "asked"),
    [
        ("triton", 1, 9, True, False, "decode_attention"),
        ("triton", 8, 9, True, False, "decode_attention"),
        ("triton", 9, 20, True, False, "attention"),
        ("triton", 8, 8, True, False, "attention"),  # nothing comes before them
        ("triton", 1, 9, False, False, "attention"),
        ("triton", 1, 9, True, True, "attention"),
        ("torch", 1, 9, True, False, "attention"),
    ],
)
def test_few_tokens_after_a_cache_share_out_the_keys(
    backend: str, new: int, keys: int, causal: bool, masked: bool, asked: str
) -> None:
    calls: list[tuple[str, Any]] = []
    operators = TorchOperators(backend)
    operators._kernels = SimpleNamespace(
        attention=lambda *given, **how: calls.append(("attention", how)),
        decode_attention=lambda *given: calls.append(("decode_attention", given[-1].tolist())),
    )
    key_mask = torch.ones(B, keys, dtype=torch.bool) if masked else None
    q, k = torch.zeros(B, H, new, D), torch.zeros(B, K, keys, D)
    operators.attention(q, k, k, causal=causal, key_mask=key_mask)
    ((name, how),) = calls
    assert name == asked
    assert how == ([keys] * B if asked == "decode_attention" else {"causal": causal, "key_mask": key_mask})


@pytest.mark.parametrize("rows", [1, 8, 9, 30])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_are_their_projections_however_they_are_computed(rows: int, biased: bool) -> None:
    gate, up = torch.randn(6, 4), torch.randn(6, 4)
    biases = (torch.randn(6), torch.randn(6)) if biased else (None, None)
    weights = {"mlp.gate_up.weight": torch.cat([gate, up])}
    weights |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    if biased:
        weights |= {"mlp.gate_up.bias": torch.cat(biases)}
        weights |= {"mlp.gate_proj.bias": biases[0], "mlp.up_proj.bias": biases[1]}
    x = torch.randn(1, rows, 4)
    found = TorchOperators("torch").gate_and_up(x, weights)
    for y, weight, bias in zip(found, (gate, up), biases, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


def test_losses_of_heads_are_those_of_the_reference() -> None:
    x, target = RNG.standard_normal((5, 3)), RNG.integers(0, 2, (5, 3)) * 1.0
    for name in ("mean_squared_error", "binary_cross_entropy"):
        found = getattr(TorchOperators("torch"), name)(tensor(x).bfloat16(), target)
        exact = getattr(ops, name)(tensor(x).bfloat16().double().numpy(), target)
        assert float(found) == pytest.approx(float(exact), rel=1e-6)
        assert found.dtype == torch.float32
    labels = np.array([0, 2, -100, 1, 1])
    found = TorchOperators("torch").cross_entropy(tensor(x), labels, reduction="sum")
    assert float(found) == pytest.approx(float(ops.cross_entropy(x, labels, reduction="sum")), rel=1e-6)


SILU = ["rms_norm_qkv_rope", "attention", "add_rms_norm", "swiglu"]
LAYER_NORM = ["layer_norm", "rope", "attention", "add_layer_norm", "swiglu"]
PER_HEAD = ["layer_norm", "norm_rope", *LAYER_NORM[2:]]


@pytest.mark.parametrize(
    ("family", "changes", "operators", "instead"),
    [
        ("Llama", {}, SILU, []),
        ("Helium", {}, SILU, []),
        ("Arcee", {}, [*SILU[:3], "relu2"], []),
        ("StableLm", {"qk_layernorm": False, "use_parallel_residual": False}, LAYER_NORM, []),
        ("StableLm", {"qk_layernorm": False, "use_parallel_residual": True}, LAYER_NORM, [3]),
        ("StableLm", {"qk_layernorm": True, "use_parallel_residual": False}, PER_HEAD, []),
        ("Llama", {"hidden_act": "swish"}, SILU, []),
        ("Llama", {"hidden_act": "relu2"}, SILU, [3]),
        ("Arcee", {"hidden_act": "silu"}, [*SILU[:3], "relu2"], [3]),
    ],
)
def test_fused_operators_of_a_layer_in_their_order(
    family: str, changes: dict[str, Any], operators: list[str], instead: list[int]
) -> None:
    found = fusions(tiny_model(f"{family}ForCausalLM", **changes).config)
    assert [fusion.operator for fusion in found] == operators
    assert [i for i, fusion in enumerate(found) if fusion.instead] == instead
