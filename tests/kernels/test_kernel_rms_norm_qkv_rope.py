"""The fused RMSNorm, projection and rotation against the definition, and the write into the KV cache."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from where_kernels_run import DEVICE, running

from refllm import kernels
from refllm.errors import InputError
from refllm.kernels import arguments, interpreted
from refllm.kernels.targets import TARGETS
from refllm.kernels.verify import assert_meets_contract

OP = "rms_norm_qkv_rope"
module = importlib.import_module("refllm.kernels.triton.rms_norm_qkv_rope")
DTYPES = arguments.FLOATS
TOKENS = ((48, 1), (16, 3), (3, 17), (1, 49))
"""B, S. About 50 tokens: the error of a token's norm is common to all its outputs, and few tokens are few draws."""


def problem(
    device: str,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    E: int = 40,
    heads: tuple[int, int] = (4, 2),
    D: int = 16,
    R: int | None = None,
    *,
    bias: bool = True,
    tables_per_sequence: bool = False,
    interleaved: bool = False,
    seed: int = 0,
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keywords of one call. All weights are drawn, so that no two rows of W or of a table are alike."""
    (B, S), (H, K), R = tokens, heads, D if R is None else R
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    width = (H + 2 * K) * D
    angles = torch.rand((B, S, R // 2) if tables_per_sequence else (S, R // 2), generator=g) * 2000
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    b_qkv = normal(width) if bias else None
    arrays = [normal(B, S, E), normal(E), normal(width, E, scale=E**-0.5), b_qkv, cos, sin, 1e-5]
    return arrays, {"num_heads": H, "num_kv_heads": K, "interleaved": interleaved}


def run(arrays: list[Any], keywords: dict[str, Any], **more: Any) -> tuple[torch.Tensor, ...]:
    return kernels.rms_norm_qkv_rope(*arrays, **keywords, **more)


def check(arrays: list[Any], keywords: dict[str, Any]) -> None:
    assert_meets_contract(OP, run(arrays, keywords), *arrays, **keywords)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x.view(_bits(x)), y.view(_bits(y))) for x, y in zip(a, b, strict=True))


def _bits(x: torch.Tensor) -> torch.dtype:
    return torch.int32 if x.element_size() == 4 else torch.int16


@settings(max_examples=15)
@given(data=st.data())
def test_meets_contract(data: st.DataObject) -> None:
    D = data.draw(st.sampled_from([8, 16, 24, 40]), "D")
    arrays, keywords = problem(
        DEVICE,
        data.draw(st.sampled_from(DTYPES), "dtype"),
        data.draw(st.sampled_from(TOKENS), "tokens"),
        data.draw(st.sampled_from([16, 40, 65, 144]), "E"),
        data.draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]), "heads"),
        D,
        2 * data.draw(st.integers(0, D // 2), "R/2"),
        bias=data.draw(st.booleans(), "bias"),
        tables_per_sequence=data.draw(st.booleans(), "tables per sequence"),
        interleaved=data.draw(st.booleans(), "interleaved"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    with running():
        check(arrays, keywords)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tokens", [(48, 1), (3, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_every_target(
    device: str, dtype: torch.dtype, tokens: tuple[int, int], interleaved: bool
) -> None:
    arrays, keywords = problem(device, dtype, tokens, 144, (6, 2), 24, 16, interleaved=interleaved)
    seen = set()
    for target in TARGETS.values():
        tile = module.choose_tile(arrays[0], 8, target)
        if tile not in seen:
            seen.add(tile)
            launch, *out = module.plan(*arrays, *keywords.values(), None, target)
            launch.run()
            assert_meets_contract(OP, tuple(out), *arrays, **keywords)
    assert seen


@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_of_one_pair(device: str, interleaved: bool) -> None:
    check(*problem(device, torch.float32, (200, 1), heads=(3, 1), D=2, interleaved=interleaved))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_views_of_tokens_then_heads(device: str, dtype: torch.dtype) -> None:
    q, k, v = run(*problem(device, dtype, (2, 3)))
    for x, heads in ((q, 4), (k, 2), (v, 2)):
        assert tuple(x.shape) == (2, heads, 3, 16)
        assert x.transpose(1, 2).is_contiguous()


def test_float32_weights_and_tables_beside_bfloat16(device: str) -> None:
    arrays, keywords = problem(device, torch.bfloat16, (16, 3))
    arrays[1], arrays[4], arrays[5] = (arrays[i].float() * 1.001 for i in (1, 4, 5))
    check(arrays, keywords)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims_that_are_not_rotated_are_those_of_the_product(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    arrays, keywords = problem(device, dtype, (2, 3), D=24, R=12, interleaved=interleaved)
    rotated, none = run(arrays, keywords), [*arrays[:4], arrays[4][:, :0], arrays[5][:, :0], 1e-5]
    plain = run(none, keywords)
    for x, y in zip(rotated[:2], plain[:2], strict=True):
        assert same((x[..., 12:].contiguous(),), (y[..., 12:].contiguous(),))
        assert not torch.equal(x[..., :12], y[..., :12])
    assert same(rotated[2:], plain[2:])


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_table_is_read_up_to_half_of_the_rotated_dims(device: str, interleaved: bool) -> None:
    arrays, keywords = problem(device, torch.float32, (2, 3), D=24, R=12, interleaved=interleaved)
    wide = []
    for table in arrays[4:6]:
        wide.append(torch.full((3, 30), float("nan"), device=device))
        wide[-1][:, :6] = table
    assert same(run([*arrays[:4], wide[0][:, :6], wide[1][:, :6], 1e-5], keywords), run(arrays, keywords))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_nan_spoils_only_itself(device: str, dtype: torch.dtype) -> None:
    arrays, keywords = problem(device, dtype, (2, 17))
    clean = run(arrays, keywords)
    arrays[0] = arrays[0].clone()
    arrays[0][1, 4, 7] = float("nan")
    for x, y in zip(run(arrays, keywords), clean, strict=True):
        assert x[1, :, 4].isnan().all()
        x[1, :, 4] = y[1, :, 4]
        assert torch.equal(x, y)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_where_the_definition_has_them(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    """A dim that passes through must not reach its neighbour: 0 times infinity is NaN."""
    arrays, keywords = problem(device, dtype, (16, 3), D=24, R=12, interleaved=interleaved)
    for column in (1, 23, 24 * 4 + 2, 24 * 4 + 13, 24 * 6 + 3, 24 * 7 + 14):
        arrays[3][column] = float("inf")
    arrays[0][12, 1, 5] = float("inf")
    check(arrays, keywords)


@pytest.mark.parametrize(("size", "weight"), [(3e4, 4.0), (4e-6, 0.01)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_at_the_ends_of_float16(device: str, dtype: torch.dtype, size: float, weight: float) -> None:
    """x times the norm's weight leaves float16 in both; the norm's result does not."""
    arrays, keywords = problem(device, dtype, (16, 3))
    arrays[0] = (arrays[0].float().clamp(-2, 2) * size).to(dtype)
    arrays[1] = (arrays[1].float() * weight).to(dtype)
    arrays[6] = 1e-13
    check(arrays, keywords)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device: str, dtype: torch.dtype) -> None:
    arrays, keywords = problem(device, dtype, (2, 5), tables_per_sequence=True)
    x, norm, w, b, cos, sin, eps = arrays
    expected = run(arrays, keywords)
    every_other = torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2]
    inside = torch.zeros(w.shape[0], w.shape[1] + 9, dtype=dtype, device=device)
    inside[:, 4:-5] = w
    transposed = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (cos, sin)]
    assert same(run([every_other, norm, inside[:, 4:-5], b, *transposed, eps], keywords), expected)
    last_axis = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(run([last_axis, norm, w.T.contiguous().T, b, cos, sin, eps], keywords), expected)
    shared = [x[:1].expand(3, 5, 40), norm, w, b, cos[:1].expand(3, 5, 8), sin[:1].expand(3, 5, 8), eps]
    assert same(run(shared, keywords), tuple(y[:1].expand(3, -1, -1, -1).contiguous() for y in expected))


def test_offsets_past_2_to_the_31(device: str) -> None:
    """The interpreter raises where int32 overflows. One token needs no memory for the strides between the others."""
    arrays, keywords = problem(device, torch.float32, (1, 1), heads=(1, 1), D=2, tables_per_sequence=True)
    expected = run(arrays, keywords)
    far = 2**30
    x, norm, w, b, cos, sin, eps = arrays
    x = x.as_strided((1, 1, 40), (far, far, 1))
    cos, sin = (t.as_strided((1, 1, 1), (far, far, far)) for t in (cos, sin))
    assert same(run([x, norm, w, b, cos, sin, eps], keywords), expected)
    caches = [torch.empty(2, device=device).as_strided((1, 1, 1, 2), (far, far, far, 1)) for _ in range(2)]
    run([x, norm, w, b, cos, sin, eps], keywords, cache=(*caches, torch.zeros(1, dtype=torch.int32, device=device)))
    assert same((caches[0], caches[1]), expected[1:])


def test_rows_of_the_weight_past_2_to_the_31(device: str) -> None:
    arrays, keywords = problem(device, torch.float32, (1, 2), E=16, heads=(1, 1), D=2)
    launch, *_ = module.plan(*arrays, *keywords.values())
    launch.arguments.update(w_stride=2**30, num_heads=0, num_kv_heads=0, b_ptr=None)  # no row of W exists
    launch.run()


@pytest.mark.parametrize("S", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_feel_its_batch(device: str, dtype: torch.dtype, S: int) -> None:
    arrays, keywords = problem(device, dtype, (19, S) if S == 1 else (3, S), 144, tables_per_sequence=True)
    together = run(arrays, keywords)
    for b in (0, 2, len(arrays[0]) - 1):
        alone = [arrays[0][b : b + 1].clone(), *arrays[1:4], arrays[4][b : b + 1], arrays[5][b : b + 1], 1e-5]
        assert same(run(alone, keywords), tuple(y[b : b + 1] for y in together))


@pytest.mark.parametrize("S", [1, 16, 17, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_configuration_does_not_depend_on_the_batch(dtype: torch.dtype, S: int) -> None:
    for target in TARGETS.values():
        seen = []
        for B in (1, 3, 700):
            arrays, keywords = problem("meta", dtype, (B, S), 2560, (1, 1), 128)
            launch = module.plan(*arrays, *keywords.values(), None, target)[0]
            seen.append((launch.constants, launch.num_warps, launch.num_stages))
        assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_same_bits_and_inputs_unchanged(device: str, dtype: torch.dtype) -> None:
    arrays, keywords = problem(device, dtype, (2, 3))
    before = [x.clone() for x in arrays[:6]]
    assert same(run(arrays, keywords), run(arrays, keywords))
    assert same(tuple(arrays[:6]), tuple(before))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_tokens(device: str, shape: tuple[int, int]) -> None:
    arrays, keywords = problem(device, torch.float32, shape)
    assert [tuple(x.shape) for x in run(arrays, keywords)] == [(shape[0], h, shape[1], 16) for h in (4, 2, 2)]


def test_rows_of_no_elements(device: str) -> None:
    arrays, keywords = problem(device, torch.float32, (2, 3))
    arrays[0], arrays[1], arrays[2] = arrays[0][..., :0], arrays[1][:0], arrays[2][:, :0]
    v = run(arrays, keywords)[2]
    assert torch.equal(v, arrays[3][-32:].view(2, 1, 16).expand(2, 2, 3, 16))


LAYOUTS = {
    "slots after heads": lambda x: x,
    "heads after slots": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a longer cache": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "dims not dense": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("form", ["triton", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_gets_the_bits_of_k_and_v_and_keeps_the_rest(
    device: str, dtype: torch.dtype, S: int, layout: str, form: str
) -> None:
    operator = getattr(kernels if form == "triton" else kernels.plain, OP)
    arrays, keywords = problem(device, dtype, (3, S), interleaved=S == 3)
    expected = operator(*arrays, **keywords)
    before = [torch.randn(3, 2, 24, 16).to(device, dtype) for _ in range(2)]
    before[0][0, 0, 0, 0] = float("nan")
    caches = [LAYOUTS[layout](x.clone()) for x in before]
    lengths = torch.tensor([0, 24 - S, 5], dtype=torch.int32 if S == 1 else torch.int64, device=device)
    q, k, v = operator(*arrays, **keywords, cache=(*caches, lengths))
    assert k is caches[0]
    assert v is caches[1]
    for cache, old, new in zip(caches, before, expected[1:], strict=True):
        for b, n in enumerate(lengths.tolist()):
            old[b, :, n : n + S] = new[b]
        assert same((cache.contiguous(),), (old,))
    assert same((q,), expected[:1])


def test_a_token_without_a_slot_is_not_written(device: str) -> None:
    """As on a GPU, where lengths cannot be looked at: straight to the launch."""
    arrays, keywords = problem(device, torch.float32, (4, 2))
    caches = [torch.zeros(4, 2, 3, 16, device=device) for _ in range(2)]
    lengths = torch.tensor([-1, 2, 2**40, 1], device=device)
    launch, q, _, _ = module.plan(*arrays, *keywords.values(), (*caches, lengths))
    launch.run()
    expected = run(arrays, keywords)
    for cache, new in zip(caches, expected[1:], strict=True):
        old = torch.zeros_like(cache)
        old[0, :, 0], old[1, :, 2], old[3, :, 1:] = new[0, :, 1], new[1, :, 0], new[3]
        assert torch.equal(cache, old)
    assert same((q,), expected[:1])


def _broken() -> dict[str, tuple[dict[int, Any], dict[str, Any], str]]:
    return {
        "dims of x": ({0: torch.zeros(3, 40)}, {}, "x is [3, 40] torch.float32 on cpu; expected 3 axes"),
        "norm": ({1: torch.zeros(41)}, {}, "norm_weight is [41]"),
        "dtype": ({2: torch.zeros(128, 40, dtype=torch.float16)}, {}, "w_qkv is [128, 40] torch.float16"),
        "rows": ({2: torch.zeros(127, 40)}, {}, "num_heads=4 and num_kv_heads=2"),
        "odd": ({2: torch.zeros(8 * 3, 40), 3: None}, {}, "an even head_dim, found 24 / 8 = 3"),
        "bias": ({3: torch.zeros(127)}, {}, "b_qkv is [127]"),
        "long table": ({4: torch.zeros(3, 9), 5: torch.zeros(3, 9)}, {}, "R <= D = 16: each angle once"),
        "table": ({4: torch.zeros(2, 8)}, {}, "cos is [2, 8]"),
        "tables differ": ({5: torch.zeros(3, 7)}, {}, "sin is [3, 7]"),
        "no heads": ({}, {"num_heads": 0}, "each at least 1"),
    }


@pytest.mark.parametrize("form", ["triton", "plain"])
@pytest.mark.parametrize("what", _broken())
def test_a_mistake_is_an_input_error(what: str, form: str) -> None:
    arrays, keywords = problem("cpu", torch.float32, (2, 3))
    changed, more, words = _broken()[what]
    call = [changed.get(i, x) for i, x in enumerate(arrays)]
    operator = getattr(kernels if form == "triton" else kernels.plain, OP)
    with interpreted(), pytest.raises(InputError) as error:
        operator(*call, **{**keywords, **more})
    assert OP in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_a_wrong_cache_is_an_input_error(form: str) -> None:
    arrays, keywords = problem("cpu", torch.float32, (2, 3))
    cache, lengths = torch.zeros(2, 2, 8, 16), torch.tensor([0, 6])
    operator = getattr(kernels if form == "triton" else kernels.plain, OP)
    for wrong, words in (
        ((cache, cache.clone(), lengths), "lengths holds 6; expected 0..5"),
        ((cache, cache.clone(), torch.tensor([0, -1])), "lengths holds -1"),
        ((cache, cache.clone(), torch.tensor([0.0, 1.0])), "lengths is [2] torch.float32"),
        ((cache, cache[:, :, :7], lengths), "v_cache is [2, 2, 7, 16]"),
        ((cache[:1], cache, lengths), "k_cache is [1, 2, 8, 16]"),
        ((cache, cache), "cache is tuple"),
    ):
        with interpreted(), pytest.raises(InputError, match=OP) as error:
            operator(*arrays, **keywords, cache=wrong)
        assert words in str(error.value)


def test_opcheck(device: str) -> None:
    arrays, keywords = problem(device, torch.float32, (2, 3))
    call = (*arrays, *keywords.values())
    torch.library.opcheck(torch.ops.refllm.rms_norm_qkv_rope.default, call)
    caches = [torch.zeros(2, 2, 8, 16, device=device) for _ in range(2)]
    lengths = torch.tensor([0, 4], device=device)
    torch.library.opcheck(torch.ops.refllm.rms_norm_qkv_rope_cache.default, (*call, *caches, lengths))


def test_torch_compile(device: str) -> None:
    arrays, keywords = problem(device, torch.float32, (2, 3))
    caches = [torch.zeros(2, 2, 8, 16, device=device) for _ in range(2)]
    lengths = torch.tensor([0, 4], device=device)

    def step(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*run([x * 2, *arrays[1:]], keywords), *run([x, *arrays[1:]], keywords, cache=(k, v, lengths)))

    expected = [y.clone() for y in step(arrays[0], *caches)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    fresh = [torch.zeros_like(c) for c in caches]
    out = compiled(arrays[0], *fresh)
    for x, y in zip(out, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert torch.equal(fresh[0], caches[0])
