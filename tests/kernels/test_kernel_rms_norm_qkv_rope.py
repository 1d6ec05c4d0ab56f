"""What `rms_norm_qkv_rope` has to keep beside what all operators do (test_operators.py), and the KV cache it writes."""

import importlib
from typing import Any

import pytest
import torch
from same_precision import assert_as_the_definition

from refllm import kernels
from refllm.kernels import arguments
from refllm.kernels.launch import Launch
from refllm.kernels.verify import assert_meets_contract

OP = "rms_norm_qkv_rope"
module = importlib.import_module("refllm.kernels.triton.rms_norm_qkv_rope")
DTYPES = arguments.FLOATS


def problem(
    device: str,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    E: int = 40,
    heads: tuple[int, int] = (4, 2),
    D: int = 16,
    R: int | None = None,
    *,
    interleaved: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keywords of one call. All weights are drawn, so that no two rows of W or of a table are alike."""
    (B, S), (H, K), R = tokens, heads, D if R is None else R
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    width = (H + 2 * K) * D
    angles = torch.rand(S, R // 2, generator=g) * 2000
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    arrays = [normal(B, S, E), normal(E), normal(width, E, scale=E**-0.5), normal(width), cos, sin, 1e-5]
    return arrays, {"num_heads": H, "num_kv_heads": K, "interleaved": interleaved}


def run(arrays: list[Any], keywords: dict[str, Any], **more: Any) -> tuple[torch.Tensor, ...]:
    return kernels.rms_norm_qkv_rope(*arrays, **keywords, **more)


def check(arrays: list[Any], keywords: dict[str, Any]) -> None:
    assert_meets_contract(OP, run(arrays, keywords), *arrays, **keywords)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x.view(_bits(x)), y.view(_bits(y))) for x, y in zip(a, b, strict=True))


def _bits(x: torch.Tensor) -> torch.dtype:
    return torch.int32 if x.element_size() == 4 else torch.int16


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


def test_a_cache_past_2_to_the_31(device: str) -> None:
    """The interpreter raises where int32 overflows. One token needs no memory for the strides between the others."""
    arrays, keywords = problem(device, torch.float32, (1, 1), heads=(1, 1), D=2)
    expected, far = run(arrays, keywords), 2**30
    caches = [torch.empty(2, device=device).as_strided((1, 1, 1, 2), (far, far, far, 1)) for _ in range(2)]
    run(arrays, keywords, cache=(*caches, torch.zeros(1, dtype=torch.int32, device=device)))
    assert same((caches[0], caches[1]), expected[1:])


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


def test_torch_takes_the_write_into_a_cache_for_an_operator_of_its_own(device: str) -> None:
    arrays, keywords = problem(device, torch.float32, (2, 3))
    call = (*arrays, *keywords.values())
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


# -- gradients ---------------------------------------------------------------------------------------------------------


def incoming(arrays: list[Any], keywords: dict[str, Any]) -> list[torch.Tensor]:
    """dq, dk and dv of the shapes of its results."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in run(arrays, keywords)]


@pytest.mark.parametrize(("dtype", "interleaved"), [(torch.bfloat16, True), (torch.float16, False)])
def test_gradients_meet_the_contract_with_and_without_a_bias(
    dtype: torch.dtype, interleaved: bool, device: str
) -> None:
    arrays, keywords = problem(device, dtype, (2, 20), R=12, interleaved=interleaved)
    for bias in (arrays[3], None):
        given = [*incoming(arrays, keywords), *arrays[:3], bias, *arrays[4:]]
        found = kernels.rms_norm_qkv_rope_backward(*given, **keywords)
        assert (found[3] is None) == (bias is None)
        assert_as_the_definition("rms_norm_qkv_rope_backward", found, given, keywords)


def test_gradients_have_the_bits_of_a_sequence_alone_and_do_not_depend_on_strides(device: str) -> None:
    arrays, keywords = problem(device, torch.bfloat16, (3, 20))
    d = incoming(arrays, keywords)
    dx = kernels.rms_norm_qkv_rope_backward(*d, *arrays, **keywords)
    assert same(kernels.rms_norm_qkv_rope_backward(*(x.contiguous() for x in d), *arrays, **keywords), dx)
    alone = kernels.rms_norm_qkv_rope_backward(*(x[1:2] for x in d), arrays[0][1:2], *arrays[1:], **keywords)
    assert same((alone[0],), (dx[0][1:2],))


def test_autograd_asks_for_what_is_needed_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, keywords = problem(device, torch.float32, (1, 5))
    d = incoming(arrays, keywords)
    leaves = [x.clone().requires_grad_() for x in arrays[:4]]
    torch.autograd.backward(list(run([*leaves, *arrays[4:]], keywords)), d)
    assert same(tuple(x.grad for x in leaves), kernels.rms_norm_qkv_rope_backward(*d, *arrays, **keywords))
    started: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda launch: started.append(launch.kernel.__name__))
    weight = arrays[2].clone().requires_grad_()
    sum(x.sum() for x in run([*arrays[:2], weight, *arrays[3:]], keywords)).backward()
    assert started.count("product_kernel") == 1
    assert "norm_backward_kernel" not in started
