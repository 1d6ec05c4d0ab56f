"""`interpreted()` as a context: kernels of any library, compiling in the same process, autotuning, what it leaves."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.language import load, store  # noqa: E402
from triton.language import math as tlm  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from refllm.kernels import interpreter  # noqa: E402
from refllm.kernels.interpreter import KernelError, autotune, cuda_stand_in, interpreted  # noqa: E402

HALF = tl.constexpr(0.5)


@triton.jit
def normalize(x, y, n, BLOCK: tl.constexpr):
    """Uses what setting TRITON_INTERPRET breaks for the compiler: tl.sum, tl.zeros, tl.cdiv and a method."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(n, BLOCK)):
        total += load(x + i * BLOCK + at, mask=i * BLOCK + at < n, other=0.0)
    for i in range(tl.cdiv(n, BLOCK)):
        v = load(x + i * BLOCK + at, mask=i * BLOCK + at < n, other=0.0)
        store(y + i * BLOCK + at, HALF * v / tlm.sqrt(total.sum() + tl.sum(total)), mask=i * BLOCK + at < n)


def run() -> None:
    x, y = torch.rand(40), torch.empty(40)
    normalize[(1,)](x, y, 40, BLOCK=16)
    torch.testing.assert_close(y, 0.5 * x / (2 * x.sum()).sqrt())


def compile_it() -> str:
    source = triton.compiler.ASTSource(
        normalize, {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {(3,): 16}
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles anew each time: a cache would report a stale success."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def forget() -> None:
    for file in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*"):
        if file.is_file():
            file.unlink()


@pytest.mark.usefixtures("fresh_cache")
def test_compiling_works_before_between_inside_and_after() -> None:
    first = compile_it()
    assert ".target sm_90" in first
    for _ in range(2):
        with interpreted():
            run()
            forget()
            assert compile_it() == first
            run()
        forget()
        assert compile_it() == first


def snapshot() -> dict[str, Any]:
    """Everything that interpreting might change: Triton's modules and classes, Torch's allocators, these globals."""
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("triton.") and hasattr(m, "__dict__")]
    owners = [*modules, tl.tensor, tl.dtype, tl.core.dtype, JITFunction, Autotuner, sys.modules[__name__]]
    state = {f"{getattr(o, '__name__', o)}.{k}": id(v) for o in owners for k, v in list(vars(o).items())}
    torch_names = {k: id(v) for o in (torch, torch.Tensor) for k, v in vars(o).items() if "empty" in k}
    return state | torch_names | {"env": os.environ.get("TRITON_INTERPRET")}


def test_nothing_is_left_behind() -> None:
    with interpreted():
        run()  # imports what is imported late
    before = snapshot()
    with interpreted():
        run()
        assert snapshot() != before
    assert snapshot() == before
    assert "new_empty" not in vars(torch.Tensor)  # inherited, as ever
    with pytest.raises(KernelError), interpreted():
        normalize[(1,)](torch.rand(4), torch.rand(4), 40, BLOCK=16)
    assert snapshot() == before


def test_the_language_is_not_patched_inside() -> None:
    before = {k: id(v) for m in (tl, tl.core, tl.math, tl.standard, tl.tensor) for k, v in vars(m).items()}
    with interpreted():
        run()
        assert {k: id(v) for m in (tl, tl.core, tl.math, tl.standard, tl.tensor) for k, v in vars(m).items()} == before
    assert "TRITON_INTERPRET" not in os.environ


def test_contexts_nest_and_the_innermost_decides() -> None:
    assert not interpreter.active()
    with interpreted():
        with interpreted(poison=False):
            assert interpreter.active()
            assert not interpreter.unwritten(torch.empty(4)).any()
            run()
        assert interpreter.unwritten(torch.empty(4)).all()
        run()
    assert not interpreter.active()


def test_bad_settings() -> None:
    with pytest.raises(KernelError, match="configs='some'; expected"), interpreted(configs="some"):
        pass
    with pytest.raises(KernelError, match="bounds='tensor'; expected"), interpreted(bounds="tensor"):
        pass
    assert not interpreter.active()


def test_triton_interpret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="unset TRITON_INTERPRET"), interpreted():
        pass
    assert not interpreter.active()


LIBRARY = '''
import triton
from triton import language as T
from triton.language import constexpr

@triton.jit
def double(v):
    """A helper that is imported by name, from a module that names the language T."""
    return v * 2

def make(factor):
    @triton.jit
    def scale(x, y, FACTOR: constexpr, ACTIVATION: constexpr, N: constexpr):
        at = T.arange(0, N)
        v = T.load(x + at) * FACTOR * captured
        T.store(y + at, ACTIVATION(v))
    captured = factor
    return scale
'''


def test_kernels_of_another_library(tmp_path: Path) -> None:
    path = tmp_path / "some_library.py"
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("some_library", path)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    names = set(vars(library))
    kernel = library.make(tl.constexpr(3.0))  # a closure, with a jit function as an argument
    x, y = torch.arange(4.0), torch.empty(4)
    with interpreted():
        kernel[(1,)](x, y, FACTOR=5.0, ACTIVATION=library.double, N=4)
    assert torch.equal(y, 30 * x)
    assert set(vars(library)) == names


# -- autotuning --------------------------------------------------------------------------------------------------------


def configurations(*blocks: int) -> list[Any]:
    return [triton.Config({"BLOCK": b}, num_warps=w) for b in blocks for w in (1, 4)]


@triton.autotune(configs=configurations(4, 8, 16), key=["n"])
@triton.jit
def tuned(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0) + 1, mask=at < n)


@triton.autotune(configs=configurations(4, 16), key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def wrong_for_16(x, y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y + at, tl.load(x + at))
    else:
        tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n - 1)


def grid(meta: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(meta["n"], meta["BLOCK"]),)


@pytest.mark.parametrize("configs", ["first", "all"])
def test_autotuned_kernels_run(configs: str) -> None:
    x = torch.arange(21.0)
    with interpreted(configs=configs):
        y = torch.empty(21)
        tuned[grid](x, y, 21)
    assert torch.equal(y, x + 1)
    assert tuned.best_config.kwargs == {"BLOCK": 4}
    assert not tuned.cache  # nothing was timed, so nothing is remembered


def test_a_wrong_configuration_is_found() -> None:
    x = torch.arange(12.0)
    with interpreted():
        y = torch.empty(12)
        wrong_for_16[grid](x, y, 12)
        assert torch.equal(x, y)
    with interpreted(configs="all"):
        y = torch.empty(12)
        with pytest.raises(
            KernelError, match=r"wrong_for_16: `y` differs between .*BLOCK: 4.* and BLOCK: 16, .*1 / 12"
        ):
            wrong_for_16[grid](x, y, 12)
        assert interpreter.unwritten(y).all()  # the comparison ran on copies


def test_configurations_may_round_elsewhere() -> None:
    """A number near 0 in a row of large ones has their error; what is missing has a larger one."""
    row = torch.tensor([[0.7, 1e-4, float("nan")], [1e-4, 0.0, 0.0]], dtype=torch.float16)
    other = row.clone()
    other[0, 1] += 2e-4
    autotune._must_agree(other, row)
    for wrong, value in (((0, 1), 0.01), ((1, 1), 2e-4), ((0, 2), 0.0)):
        changed = row.clone()
        changed[wrong] = value
        with pytest.raises(AssertionError):
            autotune._must_agree(changed, row)


def test_pytest_shows_the_launch_that_failed_and_nothing_of_the_interpreter() -> None:
    x, short = torch.arange(12.0), torch.zeros(8)
    for configs, kernel in (("first", tuned), ("all", tuned), ("first", tuned.fn)):
        how = {} if kernel is tuned else {"BLOCK": 4}
        with interpreted(configs=configs), pytest.raises(KernelError) as caught:
            kernel[(3,)](x, short, 12, **how)
        own = [frame.frame.f_globals["__name__"] for frame in caught.traceback.filter(caught)]
        assert __name__ in own
        assert [name for name in own if name.startswith("refllm.kernels.interpreter")] == []


@triton.autotune([triton.Config({"BLOCK": 4}, pre_hook=lambda named: seen.append(named))], key=["n"])
@triton.jit
def hooked(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


seen: list[dict[str, Any]] = []


def test_hooks_see_the_arguments_by_their_names() -> None:
    seen.clear()
    x, y, before = torch.arange(4.0), torch.zeros(4), list[tuple[Any, ...]]()
    with interpreted():
        hooked[(1,)](x, y, n=4)
        hook = lambda *args, **kwargs: before.append((args, kwargs))  # noqa: E731
        hooked.fn.add_pre_run_hook(hook)
        try:
            hooked.fn[(1,)](x, y, 4, BLOCK=4)
        finally:
            hooked.fn.pre_run_hooks.remove(hook)
    ((args, kwargs),) = before
    assert args[0] is x
    assert args[2] == 4
    assert kwargs["BLOCK"] == 4
    (named,) = seen
    assert named["x"] is x
    assert named["y"] is y
    assert (named["n"], named["BLOCK"]) == (4, 4)
    assert torch.equal(x, y)


# -- Torch -------------------------------------------------------------------------------------------------------------


def test_torch_compile_inside() -> None:
    @torch.library.custom_op("refllm_test::plus_one", mutates_args=())
    def plus_one(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        tuned[grid](x, y, x.numel())
        return y

    plus_one.register_fake(lambda x: torch.empty_like(x))
    compiled = torch.compile(lambda x: plus_one(x) + torch.empty(3).shape[0], fullgraph=True, backend="aot_eager")
    with interpreted():
        assert torch.equal(compiled(torch.arange(5.0)), torch.arange(5.0) + 4)


def test_changes_of_a_kernel_are_seen() -> None:
    x, y = torch.arange(4.0), torch.empty(4)

    @triton.jit
    def changing(x, y, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, tl.load(x + at) + 1)

    with interpreted():
        changing[(1,)](x, y, N=4)
        assert torch.equal(y, x + 1)
        changing._unsafe_update_src(changing.src.replace("+ 1", "+ 2"))
        changing[(1,)](x, y, N=4)
        assert torch.equal(y, x + 2)


def test_a_stand_in_for_cuda_leaves_nothing_behind() -> None:
    from torch.overrides import _get_current_function_mode_stack
    from triton.runtime import driver

    from refllm.kernels.interpreter import cuda_tensors

    kind = torch.amp.autocast_mode.autocast
    owners = (torch, torch.cuda, torch.cuda.nvtx, torch.accelerator, torch.version, kind, driver, torch.autograd)
    before = [dict(vars(owner)) for owner in owners]
    with cuda_stand_in():
        torch.ones(3, device="cuda").cpu()
    with pytest.raises(ZeroDivisionError), cuda_stand_in():
        raise ZeroDivisionError
    assert [
        {n: v for n, v in vars(o).items() if old.get(n) is not v} for o, old in zip(owners, before, strict=True)
    ] == ([{}] * len(owners))
    assert _get_current_function_mode_stack() == []
    assert not cuda_tensors._host
    assert not torch.ones(3).is_cuda


def test_a_context_for_a_device_is_the_same_after_and_inside() -> None:
    """`with torch.device(...)` remembers the functions that allocate when it is first used, which is in here."""
    script = (
        "import torch; from refllm.kernels import interpreted\n"
        "with interpreted(), torch.device('meta'): assert torch.empty(3).is_meta\n"
        "with torch.device('meta'): assert torch.empty(3).is_meta"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
