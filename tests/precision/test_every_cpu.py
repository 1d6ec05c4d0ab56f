"""What policy "hf-eager" promises on every CPU: the rounding points of Transformers' eager forward, and between them no
other error than that of float32 arithmetic. Judged operator by operator on the candidate's own inputs (`bounds`)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bounds import Bounds, Found, Range, table
from witness import numpy_of, to_torch

from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.candidates import ReferenceCandidate
from refllm.check.inputs import Inputs
from refllm.check.taps import as_array
from refllm.forward.cache import NoCache
from refllm.forward.masks import masking
from refllm.precision import HF_EAGER, round_bfloat16
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, small_config

pytestmark = pytest.mark.cpu
LAYERS = [(family, flags) for family in FAMILIES for flags in EVERY_FLAG[family]]
every_layer = pytest.mark.parametrize(("family", "flags"), LAYERS, ids=lambda x: x if isinstance(x, str) else len(x))
SHAPES = [(2, 40), (1, 1)]  # one row has product kernels of its own
DECIDED = {"bfloat16": 0.97, "float16": 0.9}
"""At least so many elements are fixed to the bit: no rounding boundary lies within the error of their float32 sum."""


def pair(family: str, flags: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    ours = build(model_class(family), small_config(family, **flags), 1, dtype, "hf-eager")
    return ours, to_torch(ours, dtype=dtype, attention="eager")


def tables_of(theirs: Any, dtype: str, positions: np.ndarray) -> list[np.ndarray]:
    tables = theirs.model.rotary_emb(torch.zeros(1, dtype=getattr(torch, dtype)), torch.from_numpy(positions))
    return [numpy_of(t)[..., : t.shape[-1] // 2] for t in tables]


def judged(ours: Any, candidate: Any, shape: tuple[int, int], tables: list[np.ndarray]) -> dict[str, Found]:
    """What the candidate shows, against what its operators may return on its own inputs and tables."""
    given: dict[str, np.ndarray] = {}
    ids = np.random.default_rng(0).integers(0, 96, shape)

    def keep(name: str, value: Any) -> None:
        given[name] = as_array(value)

    candidate.run(Inputs(ids), keep)
    config, weights = ours.config, ours.weights
    op = Bounds(ours.dtype, HF_EAGER.without(ours.page.NOT_ROUNDED), given)
    heads = config.num_attention_heads
    who = masking(np.ones_like(ids), None, batch=shape[0], queries=shape[1], cached=0, has_cache=False, heads=heads)
    rows = weights["embed_tokens.weight"][ids].astype(np.float64)
    cos, sin = (Range(t, t) for t in (t.astype(np.float64) for t in tables))
    x = ours.page.forward(
        op, config, weights, op.tap("model.embed_tokens", Range(rows, rows)), cos, sin, who, NoCache()
    )
    op.tap("lm_head", op.linear(x, weights["lm_head.weight"], weights.get("lm_head.bias")))
    return op.found


def outside(found: dict[str, Found]) -> dict[str, int]:
    return {name: value.outside for name, value in found.items() if value.outside}


def positions_of(shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[1]), shape).copy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@every_layer
def test_every_operator_of_transformers_is_ours_but_for_the_order_of_float32_sums(
    family: str, flags: dict[str, Any], dtype: str, shape: tuple[int, int]
) -> None:
    """... and ours is within the same bounds. In bfloat16 and float16 nearly every element is fixed to the bit."""
    ours, theirs = pair(family, flags, dtype)
    tables = tables_of(theirs, dtype, positions_of(shape))
    found = judged(ours, TransformersCandidate(theirs), shape, tables)
    assert outside(found) == {}
    assert len(found) >= 2 + 15 * ours.config.num_hidden_layers
    if dtype in DECIDED and shape != (1, 1):
        assert sum(f.open for f in found.values()) < (1 - DECIDED[dtype]) * sum(f.elements for f in found.values())

    ours.rotary.tables = lambda positions: tables
    found = judged(ours, ReferenceCandidate(ours), shape, tables)
    assert outside(found) == {}
    assert any(name.endswith("scores") for name in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_of_the_tables_is_the_correctly_rounded_one_or_its_neighbour_in_float32(
    family: str, dtype: str
) -> None:
    ours, theirs = pair(family, EVERY_FLAG[family][0], dtype)
    positions = positions_of((1, 3000))
    exact_angles = positions[..., None].astype(np.float32) * ours.rotary.inv_freq
    for function, t, o in zip(
        (np.cos, np.sin), tables_of(theirs, dtype, positions), ours.rotary.tables(positions), strict=True
    ):
        exact = function(exact_angles.astype(np.float64))
        np.testing.assert_array_equal(o, exact.astype(np.float32))
        allowed = table(dtype, HF_EAGER, exact)
        assert ((allowed.lo <= t) & (t <= allowed.hi)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounding_point_that_is_left_out_shows(family: str) -> None:
    """... in one of the values, so that the bounds are sharp: with an implementation of ours, on every CPU."""
    ours, _ = pair(family, EVERY_FLAG[family][-1], "bfloat16")
    tables = [round_bfloat16(t) for t in ours.rotary.tables(positions_of((2, 40)))]
    unused = {"layer_norm"} if family != "stablelm" else {"rms_norm", "rms_norm.normalized"}
    unused |= {"glu", "glu.activation"} if family == "arcee" else {"activation"}
    assert outside(judged(ours, ReferenceCandidate(ours), (2, 40), tables)) == {}
    for point in sorted(ours.arithmetic.policy.forward_points - unused - {"attention.masked"}):
        policy = HF_EAGER.without(type(ours).page.NOT_ROUNDED | {point})
        ours.arithmetic = replace(ours.arithmetic, policy=policy)
        assert outside(judged(ours, ReferenceCandidate(ours), (2, 40), tables)), point
