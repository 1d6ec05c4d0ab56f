"""Inputs that operators are checked with: each kind occurs, is valid, is what it says, shrinks to the plainest."""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from refllm import ops
from refllm.errors import InputError
from refllm.extras import install_command
from refllm.inputs import to_numpy
from refllm.kernels import OPERATORS, plain
from refllm.opcheck.without import is_mixed
from refllm.ops.contracts import CONTRACTS
from refllm.strategies import Array, Call, calls, corners, kinds
from refllm.strategies.arrays import FLOATS, LAYOUTS, VALUES
from refllm.strategies.models import FAMILIES as MODEL_FAMILIES
from refllm.strategies.models import configs, cuts, packed_positions, paddings, whole_inputs

DTYPES = ("bfloat16", "float16", "float32")
EVERY_KIND = [(operator, kind) for operator in OPERATORS for kind in kinds(operator)]


def few(examples: int) -> settings:
    """Drawn and not shrunk, without a database."""
    return settings(
        max_examples=examples,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Without Phase.explain, whose variations of the shrunk call `find` would return instead of it.
SHRINK = settings(max_examples=500, phases=(Phase.generate, Phase.shrink), derandomize=True, database=None)


@cache
def drawn(
    operator: str, kind: str | None, dtype: str = "bfloat16", policy: str = "fused", count: int = examples(100, 200)
) -> tuple[Call, ...]:
    """Eight calls of one kind, or `count` of any, the same on every run."""
    found: list[Call] = []

    @settings(few(8 if kind else count), derandomize=True)
    @given(calls(operator, dtype=dtype, policy=policy, kind=kind))
    def collect(call: Call) -> None:
        found.append(call)

    collect()
    return tuple(found)


MANY = examples(500, 800)
"""Calls in which the rarest of sizes, one in about 60, occurs; Hypothesis draws some calls twice."""


def of(operator: str, kind: str, **options: Any) -> Iterator[tuple[Call, list[Any], dict[str, Any]]]:
    """The calls of a kind in which nothing has size 0, with their arrays."""
    for call in drawn(operator, kind, **options):
        arguments, keywords = call.arrays()
        if not any(isinstance(x, np.ndarray) and not x.size for x in arguments):
            yield call, arguments, keywords


def accepted(call: Call) -> None:
    """The definition and the plain Torch form take it, agree on shapes, and leave the tensors as they were."""
    arguments, keywords = call.arrays()
    with np.errstate(all="ignore"):
        expected = getattr(ops, call.operator)(*arguments, **keywords)
    tensors, options = call.tensors()
    found = getattr(plain, call.operator)(*tensors, **options)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert tuple(a.shape) == np.shape(b)


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", [*FLOATS, "int64", "bool"])
def test_values_tensor_and_code_are_one(dtype: str) -> None:
    assert len({*LAYOUTS} - {"far"}) > 5
    for values, layout in product(VALUES, LAYOUTS):
        planted = () if layout == "expanded" else (((0, (1, None)), 7.0), (((None, None, 2), 2), -0.25))
        scale = 0.37 if values == "normal" else 3.0
        if layout != "far":
            assert_one(Array((3, 4, 6), dtype, values, scale, mean=2.0, seed=3, planted=planted, layout=layout))


def test_the_far_layout_and_empty_arrays_are_one_too() -> None:
    assert_one(Array((3, 4), "bfloat16", layout="far"))
    for layout in LAYOUTS:
        assert_one(Array((0, 2, 3), "float16", layout=layout))


def assert_one(array: Array) -> None:
    tensor, values = array.tensor(), array.array()
    scope: dict[str, Any] = {"np": np, "torch": torch}
    exec("\n".join(array.code("x")), scope)
    assert scope["x"].stride() == tensor.stride()
    for x in (tensor, scope["x"]):
        assert (tuple(x.shape), x.dtype) == (array.shape, getattr(torch, array.dtype))
        assert to_numpy(x.contiguous()).tobytes() == values.tobytes()


@pytest.mark.parametrize("layout", ["wider", "shifted", "gaps", "step"])
def test_nan_lies_between_the_elements(layout: str) -> None:
    x = Array((3, 4), "float32", layout=layout).tensor()
    memory = torch.empty(0).set_(x.untyped_storage())
    assert x.isfinite().all()
    assert memory.numel() > 12
    assert int(memory.isnan().sum()) == memory.numel() - 12


def test_layouts_have_the_strides_that_they_say() -> None:
    strides = {layout: Array((3, 4, 6), "float32", layout=layout).tensor().stride() for layout in LAYOUTS}
    assert strides == {
        "dense": (24, 6, 1),
        "wider": (60, 15, 1),
        "shifted": (60, 15, 1),
        "gaps": (48, 12, 1),
        "step": (48, 12, 2),
        "transposed": (24, 1, 4),
        "heads": (24, 1, 4),
        "expanded": (0, 6, 1),
        "constant": (0, 0, 0),
        "far": (2**30, 6, 1),
    }
    assert Array((3, 4, 6, 2), "float32", layout="heads").tensor().stride() == (48, 2, 8, 1)
    assert Array((3, 4), "float32", layout="shifted").tensor().storage_offset() == 1


def test_values_lie_on_the_grid_of_their_dtype() -> None:
    for dtype, step in (("bfloat16", 8.0), ("float16", 1.0)):
        x = Array((500,), dtype, "uniform", scale=1000.0, mean=1024.0).array()
        assert (x % step == 0).all()
    assert Array((4,), "float16", planted=(((0,), 1e6),)).array()[0] == np.inf
    assert Array((4,), "float64").array().dtype == np.float64


def test_a_recipe_is_a_value() -> None:
    a, b = (drawn("attention", None)[-1] for _ in range(2))
    assert len({a, b}) == 1
    assert pickle.loads(pickle.dumps(a)) == a
    assert eval(repr(a), {"Call": Call, "Array": Array}) == a


@pytest.mark.parametrize("wrong", [{"values": "gaussian"}, {"layout": "diagonal"}, {"dtype": "float8"}])
def test_an_unknown_recipe_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong.values()))):
        Array(**({"shape": (2, 2), "dtype": "float32"} | wrong))
    with pytest.raises(InputError, match="needs 3 axes"):
        Array((2, 2), "float32", layout="heads")


# ---------------------------------------------------------------------------------------------------------------- calls


ASKED = [(operator, "fused") for operator in OPERATORS]
ASKED += [(operator, "hf-eager") for operator in ("attention", "decode_attention")]


@pytest.mark.parametrize(("operator", "policy"), ASKED)
def test_every_call_is_accepted(operator: str, policy: str) -> None:
    assert len(kinds(operator, policy)) > 2
    for kind in kinds(operator, policy):
        assert drawn(operator, kind, policy=policy)
        for call in drawn(operator, kind, policy=policy):
            assert (call.operator, call.kind) == (operator, kind)
            accepted(call)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_corner_is_accepted(operator: str, dtype: str) -> None:
    for policy in ("fused", "hf-eager"):
        fixed = corners(operator, dtype, policy)
        assert 6 <= len(fixed) <= 25
        assert len({call.kind for call in fixed}) >= len(fixed) - 1
        for call in fixed:
            if "past 2^31" not in call.kind or operator == "rms_norm":
                accepted(call)


@pytest.mark.parametrize("operator", OPERATORS)
def test_code_makes_the_same_tensors(operator: str) -> None:
    some = [*(drawn(operator, kind)[-1] for kind in kinds(operator)), *corners(operator)]
    some = [call for call in some if "past 2^31" not in call.kind]
    assert len(some) > 5
    for call in some:
        scope: dict[str, Any] = {"np": np, "torch": torch}
        exec("\n".join(call.code()), scope)
        arguments, keywords = call.tensors()
        assert list(scope["keywords"]) == list(keywords)
        pairs = zip((*scope["arguments"], *scope["keywords"].values()), (*arguments, *keywords.values()), strict=True)
        for a, b in pairs:
            if isinstance(b, torch.Tensor):
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
                assert to_numpy(a.contiguous()).tobytes() == to_numpy(b.contiguous()).tobytes()
            else:
                assert a == b


@pytest.mark.parametrize("operator", ["rms_norm", "rope", "attention", "cross_entropy"])
def test_nearly_every_family_comes_without_being_asked_for(operator: str) -> None:
    """Hypothesis likes some choices better than others, so that a few of 200 calls may lack one."""
    found = {call.kind for call in drawn(operator, None, count=200)}
    assert len(found) >= len(kinds(operator)) - 2, set(kinds(operator)) - found


def test_dtypes_and_names_that_are_not_known_are_refused() -> None:
    for mistake, words in (
        ({"operator": "softmax"}, "softmax"),
        ({"dtype": "int8"}, "int8"),
        ({"policy": "eager"}, "eager"),
        ({"kind": "unheard of"}, "unheard of"),
    ):
        with pytest.raises(InputError, match=words):
            calls(**({"operator": "rms_norm"} | mistake))
    with pytest.raises(InputError, match="softmax"):
        corners("softmax")


def test_fixed_calls_need_no_hypothesis_and_drawn_ones_say_what_is_missing() -> None:
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from refllm.strategies import corners\n"
        "assert corners('rms_norm') and corners('attention')\n"
        "from refllm.strategies import calls"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    said = "MissingExtraError: refllm.strategies.calls needs hypothesis, which is not installed; install with: "
    assert said + install_command("hypothesis") in result.stderr


# ------------------------------------------------------------------------------------ what the kinds say they are


ON_ROWS = [operator for operator in OPERATORS if "mean 1000" in kinds(operator)]


@pytest.mark.parametrize("operator", ON_ROWS)
def test_families_of_values(operator: str) -> None:
    of_heads = operator in ("attention", "decode_attention")
    several = sum(kind in ("halves", "heads") for kind in CONTRACTS[operator].kinds.values())
    count = 3 if of_heads else max(1, several)  # one of so many is special
    tests: dict[str, Callable[[np.ndarray], bool]] = {
        "mean 1000": lambda a: abs(a.mean() - 1000) < 20,
        "outlier 10000": lambda a: 9000 < np.abs(a).max() < 11000 and (np.abs(a) > 100).sum() >= 1,
        "NaN": lambda a: np.isnan(a).any(),
        "infinity": lambda a: np.isinf(a).any(),
        "subnormal": lambda a: np.abs(a).max() < np.finfo(np.float32).tiny,
        "all equal": lambda a: (a == 2).all(),
        "zero rows": lambda a: (a == 0).all(-1).any(),
    }
    assert len(tests.keys() & kinds(operator)) > 3
    for kind, right in tests.items():
        if kind in kinds(operator) and not (of_heads and kind in ("NaN", "infinity")):  # where one is visible
            found = list(of(operator, kind))
            assert found, kind
            assert all(any(right(np.float64(x)) for x in args[:count]) for _, args, _ in found), kind


WITH_WEIGHTS = ("rms_norm", "add_layer_norm", "rope", "norm_rope", "rms_norm_qkv_rope")


@pytest.mark.parametrize("operator", WITH_WEIGHTS)
def test_weights_and_tables_are_float32_beside_narrower_activations_now_and_then(operator: str) -> None:
    share = np.mean([is_mixed(call) for call in drawn(operator, None)])
    assert 0.05 < share < 0.7
    assert not any(is_mixed(call) for call in drawn(operator, None, policy="hf-eager"))
    mixed = next(call for call in drawn(operator, None) if is_mixed(call) and len(call.arguments[0].shape) > 1)
    assert mixed.arguments[0].dtype == "bfloat16"
    accepted(mixed)


def test_scales_span_six_orders_of_magnitude() -> None:
    xs = [call.arguments[0] for call in drawn("rms_norm", "scale")]
    assert {round(math.log10(x.scale)) for x in xs} <= {-3, -2, -1, 1, 2, 3}
    assert len({x.scale for x in xs}) >= 4


def test_weights_of_one_call_are_all_distinct() -> None:
    for call, arguments, _ in of("norm_rope", "plain"):
        q_weight, k_weight = arguments[2], arguments[3]
        shared = min(len(q_weight), len(k_weight))
        assert not np.array_equal(q_weight[:shared], k_weight[:shared]), call
        assert len({x.seed for x in call.arguments[:4]}) == 4
    for _, (gate, up), _ in of("swiglu", "plain"):
        assert gate.size < 3 or not np.array_equal(gate, up)


def visible(call: Call, keywords: dict[str, Any]) -> np.ndarray:
    """bool [B, T]: keys that some query may see, by the mask alone."""
    B, _, T, _ = call.arguments[1].shape
    return keywords["key_mask"] if "key_mask" in keywords else np.ones((B, T), bool)


@pytest.mark.parametrize(("kind", "is_poison"), [("NaN", np.isnan), ("10000", lambda x: x > 9000)])
def test_poison_lies_exactly_behind_the_mask(kind: str, is_poison: Any) -> None:
    seen = 0
    for call, (_, k, v), keywords in of("attention", f"masked values hold {kind}"):
        hidden = ~visible(call, keywords)
        for x in (k, v):
            assert (is_poison(x).all((1, 3)) == hidden).all(), call
            assert (is_poison(x).any((1, 3)) == hidden).all(), call
        seen += int(hidden.any())
    assert seen >= 3


@pytest.mark.parametrize(("kind", "is_poison"), [("NaN", np.isnan), ("10000", lambda x: x > 9000)])
def test_poison_lies_exactly_past_the_lengths(kind: str, is_poison: Any) -> None:
    seen = 0
    for call, (_, k, v, lengths), _ in of("decode_attention", f"slots past the length hold {kind}"):
        past = np.arange(k.shape[2]) >= lengths[:, None]
        for x in (k, v):
            assert (is_poison(x).all((1, 3)) == past).all(), call
            assert (is_poison(x).any((1, 3)) == past).all(), call
        seen += int(past.any())
    assert seen >= 3


def test_rows_without_a_key_have_none() -> None:
    for call, _, keywords in of("attention", "rows without a key"):
        assert (~visible(call, keywords)).all(-1).any(), call


def test_shifted_logits_are_there_and_exact() -> None:
    for dtype in DTYPES:
        for _, (q, k, _), keywords in of("attention", "logits shifted by -100000", dtype=dtype):
            scores = np.repeat(k, q.shape[1] // k.shape[1], 1) @ q.swapaxes(-1, -2) * np.float32(keywords["scale"])
            assert (np.abs(scores + 100352) < 200).all()
            assert (scores * 64 % 1 == 0).all()
        for _, (logits, _), _ in of("cross_entropy", "logits shifted by -100000", dtype=dtype):
            assert np.isfinite(logits).all()
            assert (logits < -5e4).all()


def test_queries_of_zero_and_equal_logits() -> None:
    assert all(not q.any() for _, (q, _, _), _ in of("attention", "q is 0"))
    for call, (_, k, v), _ in of("attention", "equal logits"):
        assert np.ptp(k) == 0
        assert v.size < 200 or abs(v.mean() - 0.5) < 0.3, call


def test_logits_are_huge_and_confident() -> None:
    for _, (q, k, _), keywords in of("attention", "huge logits"):
        assert q.size < 20 or np.abs(q).max() * np.abs(k).max() * keywords["scale"] > 30
    for call, (logits, labels), _ in of("cross_entropy", "confident rows"):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        assert p[np.arange(len(labels)), labels].max() > 0.9, call


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_labels(operator: str) -> None:
    for call, arguments, _ in of(operator, "labels ignored"):
        assert (arguments[-1] == -100).any()
        assert (np.isnan(arguments[0]).all(-1) == (arguments[-1] == -100)).all(), call
    assert all((arguments[-1] == -100).all() for _, arguments, _ in of(operator, "all labels ignored"))
    ends = set()
    for call, arguments, keywords in of(operator, "first and last class"):
        classes = call.arguments[-2].shape[-2 if operator.startswith("linear") else -1]
        classes = call.arguments[0].shape[1] if operator == "cross_entropy" else classes
        ends |= {"first"} if (arguments[-1] == 0).any() else set()
        ends |= {"last"} if (arguments[-1] == classes - 1).any() else set()
        ends |= {"class ignored"} if "ignore_index" in keywords else set()
    assert ends == {"first", "last", "class ignored"}
    reductions = {c.keywords[0][1] if c.keywords else "mean" for f in kinds(operator) for c in drawn(operator, f)}
    assert {"mean", "sum", "none"} <= reductions


@pytest.mark.parametrize("operator", ["rope", "norm_rope", "rms_norm_qkv_rope"])
def test_tables(operator: str) -> None:
    at = {"rope": 2, "norm_rope": 4, "rms_norm_qkv_rope": 4}[operator]
    for call, arguments, _ in of(operator, "positions in any order"):
        cos, sin = (np.asarray(x, np.float64) for x in arguments[at : at + 2])
        np.testing.assert_allclose(cos**2 + sin**2, 1, atol=0.02)
        assert cos.ndim == 3
        assert (
            cos.shape[0] * cos.shape[1] < 3 or np.abs(np.diff(cos.reshape(-1, cos.shape[-1]), axis=0)).max() > 0.01
        ), call
    for call, _, _ in of(operator, "far positions"):
        assert call.arguments[at].mean >= 1000
    for call, _, _ in of(operator, "tables end at R"):
        cos = call.arguments[at].tensor()
        memory = torch.empty(0, dtype=cos.dtype).set_(cos.untyped_storage())
        assert memory.isnan().any()
        assert memory[cos.shape[-1]].isnan()
    for _, arguments, _ in of(operator, "tables of random numbers"):
        cos, sin = arguments[at : at + 2]
        assert cos.size < 8 or np.abs(np.asarray(cos) ** 2 + np.asarray(sin) ** 2 - 1).max() > 0.1


def test_nan_past_r_is_past_r() -> None:
    seen = 0
    for call, (q, _, cos, _), _ in of("rope", "NaN past R"):
        R = 2 * cos.shape[-1]
        assert np.isfinite(q[..., :R]).all()
        seen += int(np.isnan(q[..., R:]).any())
        assert np.isnan(q).any() == (q.shape[-1] > R), call
    assert seen


def test_relu2_reaches_the_end_of_the_format() -> None:
    for dtype in DTYPES:
        found = [ops.relu2(x) for _, (x,), _ in of("relu2", "near overflow", dtype=dtype)]
        largest = float(torch.finfo(getattr(torch, dtype)).max)
        assert all((y > 0.9 * largest).all() for y in found)
        assert any((y > 1.001 * largest).any() for y in found)
    assert all((x < 0).all() for _, (x,), _ in of("relu2", "all negative"))


def test_eager_code_gets_no_nan_behind_a_mask_and_a_key_for_every_row() -> None:
    for operator in ("attention", "decode_attention"):
        assert len(kinds(operator, "hf-eager")) > 2
        for kind in kinds(operator, "hf-eager"):
            for call in drawn(operator, kind, policy="hf-eager"):
                arguments, keywords = call.arrays()
                assert all(np.isfinite(x).all() for x in arguments)
                options = {"return_lse": True} if operator == "attention" else {}
                if operator == "attention":
                    _, lse = ops.attention(*arguments, **(keywords | options))
                    assert call.arguments[1].shape[2] == 0 or not np.isneginf(lse).any(), call
                else:
                    assert (arguments[-1] >= arguments[0].shape[2]).all(), call


@pytest.mark.parametrize(
    ("operator", "of_call", "wanted"),
    [
        ("rms_norm", lambda c: c.arguments[0].shape[-1], {15, 16, 17, 127, 128, 129, 1025, 4097}),
        ("attention", lambda c: c.arguments[0].shape[2], {0, 1, 2, 127, 128, 129, 257}),
        ("attention", lambda c: c.arguments[1].shape[2], {0, 1, 2, 127, 128, 129, 257}),
        ("attention", lambda c: c.arguments[0].shape[3], {8, 40, 72, 80, 160, 256}),
        ("attention", lambda c: c.arguments[0].shape[1] // c.arguments[1].shape[1], {1, 2, 3, 5}),
        ("attention", lambda c: c.arguments[0].shape[0], {0, 1, 3}),
        ("attention", lambda c: c.arguments[2].layout, set(LAYOUTS) - {"far", "constant"}),
        ("decode_attention", lambda c: c.arguments[0].shape[2], set(range(1, 9))),
        ("decode_attention", lambda c: c.arguments[1].shape[2], {0, 1, 128, 129, 513}),
        ("rope", lambda c: 2 * c.arguments[2].shape[-1] / c.arguments[0].shape[-1], {1.0, 0.5, 0.25}),
        ("cross_entropy", lambda c: c.arguments[0].shape[1], {1, 2, 1023, 1025}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sizes_and_layouts_at_edges_occur(operator: str, of_call: Any, wanted: set[Any]) -> None:
    assert not wanted - {of_call(call) for call in drawn(operator, None, count=MANY)}


# ------------------------------------------------------------------------------------------------------------ shrinking


@pytest.mark.parametrize("operator", OPERATORS)
def test_shrinking_reaches_the_plainest_call(operator: str) -> None:
    call = find(calls(operator), lambda _: True, settings=SHRINK)
    assert call.kind == "plain"
    arrays = [x for x in (*call.arguments, *dict(call.keywords).values()) if isinstance(x, Array)]
    assert all(x.layout == "dense" for x in arrays)
    assert all(not x.planted for x in arrays if x.dtype != "int64")
    assert min(x.seed for x in arrays) == 0
    sizes = {n for x in arrays for n in x.shape}
    assert max(sizes) <= 24, call  # heads of 8 dims, and of the projections three of them
    assert 1 in sizes


@pytest.mark.parametrize("block", [16, 64, 1024])
def test_a_wrong_tail_shrinks_to_one_row_and_a_block_and_one(block: int) -> None:
    def broken(call: Call) -> bool:
        return call.arguments[0].shape[-1] > block and math.prod(call.arguments[0].shape) > 0

    call = find(calls("rms_norm"), broken, settings=SHRINK)
    assert call.arguments[0].shape == (1, block + 1)
    assert call.kind == "plain"


def test_a_batch_that_is_needed_shrinks_to_two_rows_of_one_key() -> None:
    def broken(call: Call) -> bool:
        B, K, T, _ = call.arguments[1].shape
        return B > 1 and K > 0 and T > 1

    call = find(calls("attention"), broken, settings=SHRINK)
    assert call.arguments[1].shape == (2, 1, 2, 8)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.filterwarnings("ignore:.*factor=.* is used")
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_configs_are_of_the_family_and_whole_inputs_fit(family: str) -> None:
    seen = set()

    @settings(few(60), derandomize=True)
    @given(configs(family).flatmap(whole_inputs))
    def collect(given_input: Any) -> None:
        assert given_input.config.model_type == family
        B, S = given_input.ids.shape
        assert given_input.ids.max() < given_input.config.vocab_size
        assert [piece.start for piece in given_input.pieces] == [0, *(p.stop for p in given_input.pieces[:-1])]
        assert given_input.pieces[-1].stop == S
        for name in ("attention_mask", "position_ids"):
            value = getattr(given_input, name)
            assert value is None or value.shape == (B, S)
            seen.add(name if value is not None else "plain")

    collect()
    assert seen == {"attention_mask", "position_ids", "plain"}


@settings(few(30), derandomize=True)
@given(st.data(), st.integers(1, 3), st.integers(1, 12))
def test_masks_positions_and_pieces_are_what_they_say(data: st.DataObject, batch: int, length: int) -> None:
    mask = data.draw(paddings(batch, length))
    assert mask.any(-1).all()
    assert all((np.diff(row) >= 0).all() for row in mask) or all((np.diff(row) <= 0).all() for row in mask)
    positions = data.draw(packed_positions(batch, length))
    assert (positions[:, 0] == 0).all()
    assert ((np.diff(positions) == 1) | (positions[:, 1:] == 0)).all()
    pieces = data.draw(cuts(length))
    assert sum(piece.stop - piece.start for piece in pieces) == length
