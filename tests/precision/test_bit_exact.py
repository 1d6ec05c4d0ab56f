"""Policy "hf-eager" gives the logits of Transformers' eager forward to the last bit, in bfloat16 and float16.

On one thread, on a CPU whose kernels `refllm.precision.torch_cpu` knows (else skipped: `this_cpu`), and from the same
rotary tables (ours are correctly rounded: test_every_cpu has what that means). Activations: silu, sigmoid and those of
one rounding (relu, relu2, ...).
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from this_cpu import every_dtype
from witness import numpy_of, to_torch

from refllm.ops import rope_tables
from refllm.strategies.models import key_masks, seeds
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, small_config

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:.*beyond max_position_embeddings", "ignore:.*factor=.* is used"),
]

LAYERS = [(family, flags) for family in FAMILIES for flags in EVERY_FLAG[family]]
every_layer = pytest.mark.parametrize(("family", "flags"), LAYERS, ids=lambda x: x if isinstance(x, str) else len(x))
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 20.0, "original_max_position_embeddings": 8, "mscale": 1.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 20},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def tables_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def tables(inv_freq: np.ndarray, positions: np.ndarray, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        angles = torch.from_numpy(positions[..., None].astype(np.float32) * inv_freq)
        return angles.cos().numpy() * np.float32(factor), angles.sin().numpy() * np.float32(factor)

    monkeypatch.setattr(rope_tables, "cos_sin_tables", tables)


def pair(family: str, dtype: str, seed: int, **config: Any) -> tuple[Any, Any]:
    """A model of ours and theirs with the same weights."""
    ours = build(model_class(family), small_config(family, **config), seed, dtype, "hf-eager")
    return ours, to_torch(ours, dtype=dtype, attention="eager")


def differing(ours: Any, theirs: Any, ids: np.ndarray, mask: np.ndarray | None, pieces: list[slice]) -> int:
    """How many logits differ when the sequence is given in these pieces, with a cache."""
    count, cache, their_cache = 0, ours.new_cache(), None
    for piece in pieces:
        so_far = None if mask is None else mask[:, : piece.stop]
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(ids[:, piece]),
                attention_mask=None if so_far is None else torch.from_numpy(so_far),
                past_key_values=their_cache,
                use_cache=True,
            )
        their_cache = expected.past_key_values
        out = ours(ids[:, piece], attention_mask=so_far, past_key_values=cache)
        count += np.count_nonzero(out.logits != numpy_of(expected.logits))
    return count


def random_ids(seed: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, (batch, length))


@pytest.mark.parametrize("dtype", every_dtype())
@every_layer
@given(seeds, st.sampled_from([(1, 64), (2, 16), (2, 32), (3, 20), (4, 16), (1, 100)]), st.data())
@settings(max_examples=3)
def test_no_logit_differs(
    family: str, flags: dict[str, Any], dtype: str, seed: int, shape: tuple[int, int], data: st.DataObject
) -> None:
    """Without a mask and with any: queries that see nothing included, where eager code averages all values."""
    ours, theirs = pair(family, dtype, seed, **flags)
    mask = data.draw(st.none() | key_masks(*shape))
    assert differing(ours, theirs, random_ids(seed, *shape), mask, [slice(0, shape[1])]) == 0


@pytest.mark.parametrize("dtype", every_dtype())
@pytest.mark.parametrize("rope_type", sorted(ROPE))
@given(seeds, st.sampled_from(FAMILIES))
@settings(max_examples=2)
def test_no_logit_differs_for_any_rope_type(rope_type: str, dtype: str, seed: int, family: str) -> None:
    """... in calls shorter and longer than the lengths at which the frequencies change."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    rotary_dim = {"helium": 12, "llama": 20, "arcee": 20, "stablelm": 6}[family]
    if family == "stablelm":
        rope["partial_rotary_factor"] = 1.0 if rope_type == "proportional" else 0.5
    if rope_type == "longrope":
        rope |= {"short_factor": [1 + 0.1 * i for i in range(rotary_dim // 2)]}
        rope |= {"long_factor": [1.0 + i for i in range(rotary_dim // 2)]}
    flags = EVERY_FLAG[family][0]
    ours, theirs = pair(family, dtype, seed, rope_parameters=rope, max_position_embeddings=24, **flags)
    for length in (16, 48, 32):
        ids = random_ids(seed + length, 2, length)
        assert differing(ours, theirs, ids, None, [slice(0, length)]) == 0


@pytest.mark.parametrize("dtype", every_dtype())
@every_layer
@given(seeds, st.lists(st.sampled_from([16, 32]), min_size=2, max_size=3), st.data())
@settings(max_examples=2)
def test_no_logit_differs_in_cached_prefill(
    family: str, flags: dict[str, Any], dtype: str, seed: int, chunks: list[int], data: st.DataObject
) -> None:
    ours, theirs = pair(family, dtype, seed, **flags)
    ends = np.cumsum(chunks).tolist()
    mask = data.draw(st.none() | key_masks(2, ends[-1]))
    pieces = [slice(end - size, end) for end, size in zip(ends, chunks, strict=True)]
    assert differing(ours, theirs, random_ids(seed, 2, ends[-1]), mask, pieces) == 0


@pytest.mark.parametrize("dtype", every_dtype())
@every_layer
@given(seeds)
@settings(max_examples=2)
def test_no_logit_differs_in_decode(family: str, flags: dict[str, Any], dtype: str, seed: int) -> None:
    """One token at a time, where products of one row have other kernels, after a prompt of 96."""
    ours, theirs = pair(family, dtype, seed, **flags)
    pieces = [slice(0, 96), *(slice(i, i + 1) for i in range(96, 102))]
    assert differing(ours, theirs, random_ids(seed, 1, 102), None, pieces) == 0


@pytest.mark.parametrize("dtype", every_dtype())
@given(seeds)
@settings(max_examples=1)
def test_no_logit_differs_for_wide_models_and_long_sequences(dtype: str, seed: int) -> None:
    """Sums of more products than a kernel adds in one go, in every projection and over the keys."""
    ours, theirs = pair("helium", dtype, seed, hidden_size=1056, head_dim=264, intermediate_size=1104)
    assert (
        differing(ours, theirs, random_ids(seed, 1, 20), None, [slice(0, 16), *(slice(i, i + 1) for i in (16, 17))])
        == 0
    )
    ours, theirs = pair("arcee", dtype, seed, num_hidden_layers=1)
    assert differing(ours, theirs, random_ids(seed, 1, 1101), None, [slice(0, 1100), slice(1100, 1101)]) == 0


@every_layer
def test_policy_hf_sdpa_is_nearer_to_the_fused_attention_of_transformers(family: str, flags: dict[str, Any]) -> None:
    """Not bit-equal (its kernel adds block by block), but more logits agree than under "hf-eager"."""
    share = dict.fromkeys(("hf-sdpa", "hf-eager"), 0.0)
    for policy in share:
        for seed in range(4):
            ours = build(model_class(family), small_config(family, **flags), seed, "bfloat16", policy)
            theirs = to_torch(ours, dtype="bfloat16", attention="sdpa")
            share[policy] += differing(ours, theirs, random_ids(seed, 2, 32), None, [slice(0, 32)]) / (4 * 2 * 32 * 96)
    assert share["hf-sdpa"] < 0.95 * share["hf-eager"]
