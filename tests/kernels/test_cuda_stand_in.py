"""`cuda_stand_in()`: what was written for "cuda" runs on the interpreter, and tensors say where they would be."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from refllm.kernels import cuda_stand_in
from refllm.kernels.interpreter import KernelError, NeedsGpuError, UninitializedError


@triton.jit
def added(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + 1)


class Added(torch.autograd.Function):
    """As libraries write it: with the device spelled out in both directions, and casts for autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.is_cuda
        y = torch.empty(4, device="cuda")
        added[(1,)](x.detach(), y, 4)
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(dy.device.index):
            dx = torch.empty(4, device=torch.device("cuda", torch.cuda.current_device()))
            added[(1,)](dy.contiguous(), dx, 4)
        return dx


@pytest.fixture(scope="module", autouse=True)
def _inside() -> Iterator[None]:
    with cuda_stand_in():
        yield


def kind(x: torch.Tensor) -> str:
    assert x.is_cuda == (x.device.type == "cuda") == (x.get_device() == 0) == (not x.is_cpu)
    return x.device.type


def test_a_function_and_its_gradient_run_as_on_a_gpu() -> None:
    x = torch.ones(4, device="cuda", requires_grad=True)
    y = Added.apply(x)
    y.sum().backward()
    assert (y == 2).all()
    assert x.grad is not None
    assert (x.grad == 2).all()
    assert (kind(x), kind(y), kind(x.grad)) == ("cuda", "cuda", "cuda")


def test_a_tensor_says_where_it_would_be() -> None:
    there, here = torch.ones(3, device="cuda:0"), torch.ones(3)
    on_gpu = (there * 2, there.cpu().to("cuda"), here.cuda(), here.to(there), there[torch.tensor([0])], there + 1,
              torch.empty_like(here, device="cuda"), torch.tensor([1], device=0), there.new_zeros(2), here.to(0),
              torch.stack([there, there]), *there.chunk(3))  # fmt: skip
    on_host = (here * 2, there.cpu(), there.to("cpu"), torch.zeros_like(here), torch.from_numpy(here.numpy()), here[:1],
               torch.cat([here, here]), there.to(device=torch.device("cpu")), there.to(here))  # fmt: skip
    assert {kind(x) for x in on_gpu} == {"cuda"}
    assert {kind(x) for x in on_host} == {"cpu"}
    model = torch.nn.Linear(2, 2)
    assert kind(model.weight) == "cpu"
    assert {kind(p) for p in model.to("cuda").parameters()} == {"cuda"}


def test_a_copy_between_the_two_is_a_copy_and_none_on_the_way() -> None:
    there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
    there.cpu().add_(1)
    here.cuda().add_(1)
    assert not there.any()
    assert not here.any()
    assert there.to("cuda") is there
    assert here.cpu() is here


def test_what_was_never_moved_cannot_be_launched_on() -> None:
    with pytest.raises(KernelError, match="`x` was never moved to cuda, and a GPU cannot reach it on the CPU"):
        added[(1,)](torch.ones(4), torch.empty(4, device="cuda"), 4)


def test_memory_that_nobody_wrote_is_still_found() -> None:
    with pytest.raises(UninitializedError):
        added[(1,)](torch.empty(4, device="cuda"), torch.empty(4, device="cuda"), 4)


def test_default_devices() -> None:
    with torch.device("cuda"):
        assert kind(torch.zeros(3)) == "cuda"
    torch.set_default_device("cuda")
    try:
        assert kind(torch.zeros(3)) == "cuda"
        assert kind(torch.zeros(3, device="cpu")) == "cpu"
    finally:
        torch.set_default_device(None)
    assert kind(torch.zeros(3)) == "cpu"


def test_autocast_rounds_and_says_so() -> None:
    x, w = torch.ones(2, 4, device="cuda"), torch.ones(4, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (x @ w).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (x @ w).dtype == torch.float32
        assert Added.apply(torch.ones(4, device="cuda", dtype=torch.bfloat16)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")
    assert (x @ w).dtype == torch.float32


def test_products_of_narrow_factors_are_added_up_in_the_format_that_is_asked_for() -> None:
    """Torch has that for GPUs alone."""
    x, w = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (3, 5))
    total = torch.randn(3, 5, device="cuda")
    exact = x.double() @ w.double().T
    for y in (torch.mm(x, w.T, out_dtype=torch.float32), torch.addmm(total, x, w.T, out_dtype=torch.float32) - total):
        assert (y.dtype, kind(y)) == (torch.float32, "cuda")
        assert (y.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    out = torch.empty(3, 5, device="cuda")
    assert torch.addmm(total, x, w.T, out_dtype=torch.float32, out=out) is out
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.mm(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16(), out_dtype=torch.float32)


def test_numbers_are_drawn_by_the_seed() -> None:
    torch.cuda.manual_seed(3)
    first = torch.randn(2, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert torch.equal(first, torch.randn(2, device="cuda", generator=generator))
    assert isinstance(generator, torch.Generator)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.randn(2), (torch.cuda.set_rng_state(state), torch.randn(2))[1])


def test_what_libraries_ask_at_import_is_answered() -> None:
    assert torch.cuda.is_available()
    assert (torch.cuda.device_count(), torch.cuda.get_device_capability()) == (1, (9, 0))
    assert torch.cuda.get_device_properties(0).shared_memory_per_block_optin == 232_448
    assert "H100" in torch.cuda.get_device_name(0)
    active = triton.runtime.driver.active
    assert active.get_current_target().arch == 90
    assert active.utils.get_device_properties(0)["multiprocessor_count"] == 132
    assert torch.compile(added) is added
    assert torch.compile(mode="max-autotune")(added) is added


def test_streams_and_events_are_harmless() -> None:
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
        start.record()
        torch.ones(3, device="cuda").record_stream(stream)
        end.record()
    stream.wait_stream(outer)
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() is outer
    assert end.query()
    assert start.elapsed_time(end) >= 0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("torch.cuda.memory_allocated", lambda: torch.cuda.memory_allocated()),
        ("torch.cuda.CUDAGraph", lambda: torch.cuda.CUDAGraph()),
        ("torch.cuda.mem_get_info", lambda: torch.cuda.mem_get_info()),
        ("load_binary of Triton's driver", lambda: triton.runtime.driver.active.utils.load_binary()),
        ("get_benchmarker of Triton's driver", lambda: triton.runtime.driver.active.get_benchmarker()),
    ],
)
def test_what_needs_a_gpu_says_so(name: str, call: Any) -> None:
    with pytest.raises(NeedsGpuError, match=f"{name} needs a GPU, and here refllm's interpreter stands in for one"):
        call()
    assert isinstance(torch.cuda.CUDAGraph | None, object)  # annotations may name it


def test_there_is_one_gpu_of_a_known_kind() -> None:
    with pytest.raises(KernelError, match="cuda:1: the stand-in for CUDA is one GPU"):
        torch.ones(3, device="cuda:1")
    with pytest.raises(KernelError, match="target='gfx942'; expected sm_80, sm_90 or sm_100"), cuda_stand_in("gfx942"):
        pass
    with cuda_stand_in("sm_80"):
        assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.get_device_capability() == (9, 0)
