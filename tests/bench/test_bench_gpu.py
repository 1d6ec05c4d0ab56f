"""Benchmarks of kernels and models, as far as they go without a GPU: all of it runs, and nothing wrong gets a time."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from refllm import kernels
from refllm.bench import (
    ceilings,
    gpu,
    gpu_benchmarks,
    growth,
    model_forms,
    page,
    process,
    results,
    timer,
    whole_models,
)
from refllm.bench import forms as forms_module
from refllm.bench import kernels as kernel_bench
from refllm.bench import models as model_bench
from refllm.bench.forms import Form, forms
from refllm.bench.measure import Bench, Truth, measure
from refllm.bench.probes import Checker, loss_contract
from refllm.bench.timer import CpuClock, GpuClock, Timed, spread
from refllm.bench.traffic import decode_step, prefill, traffic
from refllm.bench.workloads import Job, attention_jobs, operator_jobs
from refllm.commands import cli
from refllm.extras import install_command
from refllm.kernels.calls import REDUCED
from refllm.kernels.verify import Contract

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"device": "cpu", "seconds": 0.001, "scale": 0.002, "cache_bytes": 4096}
CEILINGS = {"copy_bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}, "launch_seconds": 1e-9}


def jobs(*operators: str, dtype: str = "float32", size: tuple[int, int] = (2, 6), layer: Any = REDUCED[1]) -> list[Job]:
    return list(operator_jobs([layer], [size], operators, dtype, "cpu", context=16))


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["refllm", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "cpu_cache_bytes", lambda: 4096)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (32,)})
    monkeypatch.setattr(kernel_bench, "SECONDS", {"cpu": 0.001})


# -- bytes and flops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [name for name in kernels.OPERATORS if name != "decode_attention"])
def test_bytes_are_those_of_all_arguments_and_results(operator: str) -> None:
    (job,) = jobs(operator)
    arguments, keywords = job.draw(0)
    results = getattr(kernels.plain, operator)(*arguments, **keywords)
    tensors = [*arguments, *(results if isinstance(results, tuple) else (results,))]
    assert traffic(operator, arguments, keywords).bytes == sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def test_decode_attention_counts_filled_slots_and_not_the_others() -> None:
    q, cache = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8)
    lengths = torch.tensor([7, 2])
    pairs = sum(slot <= n - 3 + s for n in (7, 2) for s in range(3) for slot in range(n))
    cost = traffic("decode_attention", (q, cache, cache, lengths), {})
    assert cost.flops == 4 * 4 * 8 * pairs
    assert cost.bytes == 2 * q.nbytes + 2 * 4 * 2 * 8 * 9 + lengths.nbytes


@pytest.mark.parametrize(("S", "T", "causal"), [(5, 5, True), (3, 7, True), (6, 4, True), (5, 5, False)])
def test_attention_counts_the_pairs_that_it_sees(S: int, T: int, causal: bool) -> None:
    q, k = torch.randn(2, 4, S, 8), torch.randn(2, 2, T, 8)
    pairs = sum(not causal or t <= T - S + s for s in range(S) for t in range(T))
    products = 2  # q k and p v, a multiplication and an addition per dim each
    assert traffic("attention", (q, k, k), {"causal": causal}).flops == 2 * 4 * pairs * 8 * 2 * products


@contextmanager
def counted_products(where: str = "torch.nn.functional.linear") -> Iterator[list[int]]:
    """Flops of every product x W^T that runs through this function: one multiplication and one addition per weight."""
    module, name = where.rsplit(".", 1)
    right, flops = getattr(importlib.import_module(module), name), []

    def counts(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        flops.append(2 * x.numel() * len(weight))
        return right(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, counts)
        yield flops


@pytest.mark.parametrize("operator", ["rms_norm_qkv_rope", "linear_cross_entropy"])
def test_flops_of_products_are_those_that_run(operator: str) -> None:
    (job,) = jobs(operator)
    arguments, keywords = job.draw(0)
    with counted_products() as flops:
        kernels.plain.EAGER[operator](*arguments, **keywords)
    beside = {"rms_norm_qkv_rope": 5 * arguments[0].numel(), "linear_cross_entropy": 8 * 12 * REDUCED[1].V}
    assert traffic(operator, arguments, keywords).flops == sum(flops) + beside[operator]


def test_flops_and_bytes_of_a_model_are_those_of_its_products_and_tensors() -> None:
    whole = whole_models.Whole("helium-1m", "float32", "cpu")
    sizes, model, S = whole.sizes(), whole.fast("torch"), 16
    cost = prefill(sizes.layers, sizes.head, sizes.cache, sizes.group, 1, 4, S)
    with counted_products("refllm.kernels.models.products.linear") as flops:
        model_forms.forward(model, whole.prompt(1, S))()
    norms = 2 * S * sum(int(np.prod(s)) for name, s in whole.weights.shapes.items() if name.endswith("norm.weight"))
    attention = 4 * 2 * 2 * 64 * S * (S + 1) // 2  # 2 layers of 2 heads of 64
    assert len(flops) == 2 * 5 + 1  # q, k and v; o; gate; up; down; the head
    assert cost.flops == sum(flops) + norms + attention
    held = sum(t.nbytes for name, t in whole.weights.items() if name in whole.weights.shapes)
    table = whole.weights["embed_tokens.weight"].nbytes
    step = decode_step(sizes.layers + sizes.head, sizes.cache, sizes.group, 1, 4, 10)
    assert step.bytes == held - table + 10 * 2 * 2 * 2 * 64 * 4
    assert step.flops == 2 * (held - table) // 4 + 10 * 2 * 4 * 2 * 64


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_spread_is_of_samples_in_any_order() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0], "x")
    assert (found.p20, found.median, found.p80, found.samples) == (1.0, 3.0, 4.0, 5)


def test_sets_exceed_the_cache_or_are_as_many_as_there_may_be() -> None:
    cache = 50 << 20
    for size in (1 << 10, 10 << 20, 60 << 20, 1 << 30):
        count = timer.sets_needed(size, cache)
        low, high = timer.SETS
        assert low <= count <= high
        assert count == high or count * size >= timer.CACHE_MULTIPLE * cache


def test_buffers_rotate_and_the_cache_is_emptied_before_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs("rms_norm")
    drawn = [job.draw(seed)[0] for seed in range(4)]
    assert len({x[0].data_ptr() for x in drawn}) == 4
    assert not any(torch.equal(a[0], b[0]) for a, b in pairwise(drawn))
    assert all(x[0].abs().min() > 0 for x in drawn)  # never on zeros
    events: list[Any] = []
    watch = CpuClock(4096)
    monkeypatch.setattr(watch, "evict", lambda: events.append("evict"))

    def call(x: Any) -> Callable[[], Any]:
        return lambda: events.append(x[0].data_ptr())

    timed = watch.time([call(x) for x in drawn], 0.0)
    rounds = [x[0].data_ptr() for x in drawn]
    timing = events[2 * len(drawn) + 1 :]  # after the warm-up and the pilot, which counts what emptying takes
    assert timing == ["evict", *rounds] * timed.spread.samples
    assert timed.spread.samples >= timer.SAMPLES[0]


def test_what_is_read_between_rounds_exceeds_the_cache() -> None:
    assert CpuClock(1 << 20)._other.nbytes >= timer.CACHE_MULTIPLE << 20


def test_a_job_is_drawn_as_often_as_the_cache_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs("relu2")
    watch = CpuClock(4096)
    seen: list[int] = []
    monkeypatch.setattr(watch, "time", lambda calls, *_, **__: seen.append(len(calls)) or _timed(calls))
    list(measure(job, [_plain("relu2")], Bench(watch, CEILINGS, 0.0)))
    assert seen == [timer.sets_needed(traffic("relu2", *job.draw(0)).bytes, 4096)]
    assert seen[0] > 1


class FakeCuda:
    """As much of torch.cuda as the clock uses; time passes by one millisecond per call."""

    def __init__(self, refuse: str = "") -> None:
        self.log: list[str] = []
        self.now, self.refuse, self.recording = 0.0, refuse, False
        self.cuda = self
        self.CUDAGraph = self._graph
        self.Stream = self.current_stream
        self.Event = self._event

    def work(self) -> str:
        if self.recording and self.refuse:
            raise RuntimeError(self.refuse)
        self.now += 0.0 if self.recording else 1.0
        self.log.append("record" if self.recording else "call")
        return "output"

    def _graph(self) -> Any:
        def replay() -> None:
            self.log.append("replay")
            self.now += 4.0

        return SimpleNamespace(replay=replay)

    def _event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def graph(self, graph: Any) -> Any:
        return _Recording(self)

    def stream(self, stream: Any) -> Any:
        return _Nothing()

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def synchronize(self) -> None:
        self.log.append("synchronize")


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...


class _Recording:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.recording = True

    def __exit__(self, *exception: object) -> None:
        self.cuda.recording = False


def gpu_clock(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> GpuClock:
    watch = object.__new__(GpuClock)
    watch._torch = cuda
    watch.cache_bytes = 4096
    monkeypatch.setattr(watch, "evict", lambda: cuda.log.append("evict"))
    return watch


def test_gpu_clock_replays_a_graph_behind_an_emptied_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    timed = gpu_clock(monkeypatch, cuda).time([cuda.work] * 4, 0.05)
    assert timed.spread.method == "graph replay"
    assert timed.spread.median == pytest.approx(1e-3)  # 4 ms per replay of 4 calls
    assert timed.outputs == ["output"] * 4
    tail = cuda.log[cuda.log.index("evict") : -1]
    assert tail == ["evict", "replay"] * timed.spread.samples
    assert cuda.log.index("call") < cuda.log.index("record")  # warmed up before it is recorded


@pytest.mark.parametrize("graph", [True, False])
def test_gpu_clock_says_when_it_could_not_record(monkeypatch: pytest.MonkeyPatch, graph: bool) -> None:
    cuda = FakeCuda(refuse="operation not permitted when stream is capturing\nmore")
    timed = gpu_clock(monkeypatch, cuda).time([cuda.work] * 2, 0.0, graph=graph)
    assert timed.spread.method == ("events (operation not permitted when stream is capturing)" if graph else "events")
    assert timed.spread.median == pytest.approx(1e-3)
    assert "replay" not in cuda.log


# -- nothing wrong gets a time -----------------------------------------------------------------------------------------


def _plain(operator: str, function: Any = None, ours: bool = True) -> Form:
    function = function or getattr(kernels.plain, operator)
    return Form("mine", ours, lambda a, k: lambda: function(*a, **k))


def _timed(calls: Sequence[Callable[[], Any]]) -> Timed:
    return Timed(spread([1e-3], "fake"), [call() for call in calls])


def _raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("misaligned address\nlong text")


def _last_row_unwritten(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[:, :-1] = kernels.plain.relu2(x)[:, :-1]
    return y


WRONG: dict[str, Any] = {
    "times that of the contract": lambda x: kernels.plain.relu2(x) * 1.02,
    "NaN or infinite": _last_row_unwritten,
    "shapes": lambda x: kernels.plain.relu2(x)[:1],
    "RuntimeError: misaligned address": _raises,
}


# The memory of a peer is not poisoned.
@pytest.mark.parametrize(("said", "ours"), [(s, o) for s in WRONG for o in (True, False) if o or "NaN" not in s])
def test_a_wrong_output_gets_no_time(monkeypatch: pytest.MonkeyPatch, said: str, ours: bool) -> None:
    (job,) = jobs("relu2", dtype="bfloat16")
    watch = CpuClock(4096)
    monkeypatch.setattr(watch, "time", lambda *_, **__: pytest.fail("timed"))
    (row,) = measure(job, [_plain("relu2", WRONG[said], ours)], Bench(watch, CEILINGS, 0.0))
    assert row.time is None
    assert not row.figures
    if ours:
        assert said in row.finding
    else:
        assert not row.finding  # a row that says so, not a finding of this project
        assert said.replace("times that of the contract", "relative error") in row.note


def test_an_output_that_goes_wrong_while_it_is_timed_gets_no_time() -> None:
    calls = []

    def tires(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return kernels.plain.relu2(x) * (1.0 if len(calls) < 6 else 0.5)

    (job,) = jobs("relu2")
    (row,) = measure(job, [_plain("relu2", tires)], Bench(CpuClock(4096), CEILINGS, 0.001))
    assert row.time is None
    assert row.finding.startswith("while timed: ")


def test_an_output_that_is_wrong_for_the_last_set_of_inputs_alone_gets_no_time() -> None:
    (job,) = jobs("relu2")
    last = max(timer.sets_needed(traffic("relu2", *job.draw(0)).bytes, 4096) - 1, 1)
    wrong = job.draw(last)[0][0]

    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.plain.relu2(x) * (0.5 if torch.equal(x, wrong) else 1.0)

    (row,) = measure(job, [_plain("relu2", function)], Bench(CpuClock(4096), CEILINGS, 0.001))
    assert row.time is None
    assert f"set {last}, are not those of eager float32" in row.finding


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_one_wrong_row_between_the_parts_is_seen_by_the_witness(operator: str) -> None:
    """The middle of what the definition does not get through, a fifth too large."""
    (job,) = jobs(operator, size=(40, 1) if operator == "decode_attention" else (1, 90))
    calls = [job.draw(0)]
    truth = Truth(operator, calls)
    right = getattr(kernels.plain, operator)(*calls[0][0], **calls[0][1])
    right = right if isinstance(right, tuple) else (right,)
    assert truth.judge(right, 0, True).problem == ""
    assert "every element of 1 sets of inputs against" in truth.judge(right, 0, True).checked
    for number in range(len(right)):
        wrong = tuple(x.clone() for x in right)
        x = wrong[number]
        rows = x if x.ndim == 1 or operator == "decode_attention" else x.transpose(0, x.ndim - 2)
        rows[20] *= 1.2
        assert f"output {number}, set 0, are not those of" in truth.judge(wrong, 0, True).problem


def test_a_witness_without_memory_is_said_and_not_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(kernels.plain.EAGER, "relu2", full)
    (job,) = jobs("relu2")
    (row,) = measure(job, [_plain("relu2")], Bench(CpuClock(4096), CEILINGS, 0.001))
    assert row.time is not None
    assert "the rest unseen (eager float32: OutOfMemoryError)" in row.checked


def test_the_loss_contract_is_that_of_the_definition() -> None:
    for dtype in ("float32", "bfloat16"):
        (job,) = jobs("linear_cross_entropy", dtype=dtype)
        arguments, keywords = job.draw(0)
        quick = loss_contract(arguments, keywords)
        slow = Contract("linear_cross_entropy", arguments, keywords)
        np.testing.assert_allclose(quick.exact[0], slow.exact[0], rtol=1e-13)
        np.testing.assert_allclose(quick.same_precision[0], slow.same_precision[0], rtol=1e-6)


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_the_parts_that_are_checked_see_an_error_at_either_end(operator: str) -> None:
    size = (2, 1) if operator == "decode_attention" else (2, 40)
    (job,) = jobs(operator, size=size)
    arguments, keywords = job.draw(0)
    checker = Checker(operator, arguments, keywords)
    right = getattr(kernels.plain, operator)(*arguments, **keywords)
    right = right if isinstance(right, tuple) else (right,)
    assert checker.judge(right, True).problem == ""
    assert "against the definition in float64" in checker.what
    for end in (0, -1):
        wrong = tuple(x.clone() for x in right)
        for x in wrong:
            # The end of the rows; of heads [B, H, S, D] the end of the positions.
            part = x[:, :, end] if x.ndim == 4 else x.flatten(0, -2)[end] if x.ndim > 1 else x[end]
            part *= 1.3
        assert checker.judge(wrong, True).problem, end


def test_every_form_of_every_operator_is_right_and_leaves_its_inputs_alone() -> None:
    pytest.importorskip("liger_kernel")
    bench = Bench(CpuClock(4096), CEILINGS, 0.001)
    seen = set()
    for job in [*jobs(*kernels.OPERATORS, size=(2, 3)), *jobs("decode_attention", size=(2, 1))]:
        before = job.draw(0)[0]
        rows = list(measure(job, forms(job.operator, "cpu", ("plain", "eager", "liger", "sdpa")), bench))
        seen |= {(row.form, row.what) for row in rows if row.error is not None}
        assert [row.finding for row in rows if row.finding] == []
        assert not [row.note for row in rows if "wrong" in row.note or "raised" in row.note]
        for row in rows:
            assert (row.time is None) == row.note.startswith("not timed")
        for a, b in zip(before, job.draw(0)[0], strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    assert {what for form, what in seen if form == "triton"} == set(kernels.OPERATORS)
    assert {"rms_norm", "rope", "swiglu", "cross_entropy"} <= {what for form, what in seen if form == "liger"}
    assert {form for form, _ in seen} >= {"eager", "plain", "sdpa math", "sdpa flash"}


def test_a_call_that_cannot_be_prepared_is_a_row_and_the_next_one_counts() -> None:
    def breaks(seed: int) -> Any:
        raise RuntimeError("an illegal memory access was encountered\nmore")

    (job,) = jobs("relu2")
    bench = Bench(CpuClock(4096), CEILINGS, 0.001)
    broken = Job(job.operator, job.panel, job.group, job.dtype, job.sizes, breaks)
    rows = [row for one in (broken, job) for row in measure(one, [_plain("relu2")], bench)]
    assert "illegal memory access" in rows[0].finding
    assert (rows[1].finding, rows[1].time is None) == ("", False)


# -- peers that are not there ------------------------------------------------------------------------------------------


def test_a_missing_peer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    (job,) = jobs("rms_norm")
    found = list(forms("rms_norm", "cpu", ("liger",)))[1:]
    (row,) = measure(job, found, Bench(CpuClock(4096), CEILINGS, 0.001))
    assert row.note == "not timed: liger_kernel.transformers is not installed"
    assert not row.finding


def test_a_peer_without_the_operator_and_a_backend_without_the_call_are_rows() -> None:
    bench = Bench(CpuClock(4096), CEILINGS, 0.001)
    (job,) = jobs("norm_rope")
    notes = {row.form: row.note for row in measure(job, list(forms("norm_rope", "cpu", ("liger",))), bench)}
    assert notes["liger"] == "not timed: Liger-Kernel has no such operator"
    (job,) = attention_jobs([64], [8], [], "float32", "cpu", 8, one_in=8)
    assert job.panel == "D 64, 4 heads over 4"
    rows = {row.form: row for row in measure(job, list(forms("attention", "cpu", ("sdpa",)))[1:], bench)}
    assert rows["sdpa cudnn"].note == "not timed: it does not take this call"
    assert rows["sdpa math"].time is not None


def test_heads_that_are_repeated_for_a_backend_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forms_module._sdpa

    def refuses(backend: str, q: Any, k: Any, v: Any, causal: bool, grouped: bool) -> Any:
        return _raises if grouped else right(backend, q, k, v, causal, grouped)

    monkeypatch.setattr(forms_module, "_sdpa", refuses)
    (job,) = jobs("attention", layer=REDUCED[0])
    (row,) = measure(job, [forms_module.sdpa_form("attention", "math")], Bench(CpuClock(4096), CEILINGS, 0.001))
    assert row.time is not None
    assert row.note == "key/value heads repeated beforehand, untimed: 2 x their bytes to read"


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_share_is_the_least_time_over_the_measured_one() -> None:
    row = results.Row("x", "", "", "triton", True, "float32", {}, bytes=10**9, flops=10**9)
    row.time = spread([0.2], "x")
    row.rate(CEILINGS)
    assert row.figures["share"] == pytest.approx(0.1 / 0.2)  # 1 GB at 10 GB/s
    assert (row.figures["bound"], row.figures["bytes_per_second"]) == ("memory", 5e9)
    row.flops = 10**11
    row.rate(CEILINGS)
    assert (row.figures["share"], row.figures["bound"]) == (pytest.approx(1.0 / 0.2), "arithmetic")
    row.rate(CEILINGS | {"launch_seconds": 2.0})
    assert row.figures["bound"] == "launch"


def _not_blank(file: Path) -> None:
    from matplotlib.image import imread

    if file.suffix == ".png":
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert 0.02 < np.mean(pixels < 0.95) < 0.6  # neither empty nor full
    else:
        text = file.read_text()
        assert text.count("<path") + text.count("<use") > 20
        assert "refllm bench" in text


def _run_and_read(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> dict[str, Any]:
    file = folder / f"{arguments[0]}-here.json"
    assert run_cli(monkeypatch, *arguments, "--json", file, "--plots", folder / "plots") == 0
    return dict(json.loads(file.read_text()))


COMMANDS: dict[str, list[object]] = {
    "kernels": ["--layer", "reduced", "--operator", "relu2", "--operator", "rope", "--size", "1x8"],
    "attention": ["--tokens", "16", "--head-dim", "64", "--batch", "2"],
    "decode": ["--batch", "1", "--prompt-tokens", "6", "--new-tokens", "4"],
    "prefill": ["--tokens", "8"],
}


PICTURES = {
    "kernels": ["roofline", "shares-1-x-8-tokens"],
    "attention": ["roofline", "shares-attention", "shares-decode_attention"],
    "decode": ["roofline", "shares-decode"],
    "prefill": ["roofline", "shares-prefill"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_end_to_end(
    small: None, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_bench, "REPEATS", 1)
    result = _run_and_read(monkeypatch, tmp_path, name, "--device", "cpu", *COMMANDS[name])
    out = capsys.readouterr().out
    assert result["bench"] == name
    assert result["verdict"] == "holds"
    assert result["machine"]["device"] == "cpu"
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert result["command"].startswith(f"refllm bench {name}")
    assert set(result) == {
        *("bench", "format", "date", "command", "verdict", "machine", "versions"),
        *("settings", "seconds", "ceilings", "rows", "left_out"),
    }
    keys = set(results.Row.__dataclass_fields__)
    for row in result["rows"]:
        assert set(row) == keys
        assert row["bytes"] > 0
        assert row["flops"] > 0
        if row["time"]:
            assert row["time"]["p20"] <= row["time"]["median"] <= row["time"]["p80"]
            assert row["checked"]
            assert row["figures"]["share"] > 0
        else:
            assert row["note"].startswith("not timed: ")
    assert {row["note"] for row in result["rows"] if row["form"] == "triton"} == {"not timed: interpreted"}
    assert any(row["time"] for row in result["rows"] if row["ours"]) or name == "attention"
    assert "of the ceiling" in out
    assert "holds" in out
    pictures = sorted((tmp_path / "plots").iterdir())
    assert {file.stem for file in pictures} == {f"{name}-here-{part}" for part in PICTURES[name]}
    assert len(pictures) == 2 * len(PICTURES[name])
    for file in pictures:
        _not_blank(file)


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_call_can_be_planned_without_memory(operator: str) -> None:
    from refllm.bench.layers import launches
    from refllm.kernels.targets import TARGETS

    size = (3, 1) if operator == "decode_attention" else (2, 6)
    (job,) = operator_jobs([REDUCED[1]], [size], (operator,), "bfloat16", "meta", context=16)
    (same,) = jobs(operator, dtype="bfloat16", size=size)
    assert traffic(operator, *job.draw(0)) == traffic(operator, *same.draw(0))
    planned = launches(operator, job.draw(0), TARGETS["sm_90"])
    assert len(planned) == (2 if operator in ("decode_attention", "linear_cross_entropy") else 1)
    assert all(launch.grid[0] > 0 for launch in planned)


def test_a_wrong_kernel_ends_with_exit_code_1(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kernels.plain.relu2
    monkeypatch.setattr(kernels.plain, "relu2", lambda x: right(x) * 1.01)
    command = ["kernels", "--device", "cpu", "--peers", "plain", *COMMANDS["kernels"][:4], "--size", "1x8"]
    assert run_cli(monkeypatch, *command) == 1
    out = capsys.readouterr().out
    assert "wrong output" in out
    assert "fails: 0 of 2 timed" in out


def test_growth_fits_exponents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = growth.series_of("prefill", "numpy", {1: [3.0], 2: [12.0], 4: [48.0], 8: [192.0]})
    assert line["exponent"] == pytest.approx(2)
    assert line["factor"] == pytest.approx(3)
    bent = growth.series_of("prefill", "numpy", {1: [1.0, 0.9, 7.0], 2: [2.0], 4: [8.0]})
    assert (bent["exponent"], bent["exponent_at_the_end"]) == (pytest.approx(1.5), pytest.approx(2))
    assert [bent[name][0] for name in ("seconds", "lowest", "highest", "passes")] == [1.0, 0.9, 7.0, 3]
    monkeypatch.setattr(growth, "REPEATS", 1)
    options = ["--shape", "helium-1m", "--tokens", "8,16", "--layers", "1,2", "--new-tokens", "1", "--threads", "1"]
    result = _run_and_read(monkeypatch, tmp_path, "growth", *options, "--side", "numpy")
    assert [(one["what"], one["side"]) for one in result["series"]] == [
        ("prefill", "numpy"),
        ("decode", "numpy"),
        ("check", "numpy"),
    ]
    assert all(len(one["seconds"]) == len(one["n"]) == 2 and min(one["seconds"]) > 0 for one in result["series"])
    for kind in ("png", "svg"):
        _not_blank(tmp_path / "plots" / f"growth-here.{kind}")


def test_worker_fills_the_cache_up_to_each_context() -> None:
    from refllm.bench.worker import Work

    lengths: list[tuple[int, int]] = []

    class Side:
        def forward(self, ids: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
            lengths.append((cache or 0, ids.shape[1]))
            return np.zeros((1, 3)), (cache or 0) + ids.shape[1]

    work = Work(Side(), 100, 4, 2)
    work.decode_at(5)
    work.decode_at(10)
    assert lengths == [(0, 5), (5, 1), (6, 1), (7, 3), (10, 1), (11, 1)]
    assert work.prefill_of(9) > 0
    assert lengths[-1] == (0, 9)


def test_no_time_left_is_said_and_not_a_finding() -> None:
    settings = kernel_bench.Settings(**SMALL, sizes=((1, 4),), operators=("relu2",), peers=("plain",), minutes=0)
    result = kernel_bench.bench_kernels(settings)
    assert result["rows"] == []
    assert result["verdict"] == "holds"
    assert len(result["left_out"]) == len(REDUCED)
    assert all("relu2" in name and "plain" in name for name in result["left_out"])
    models = model_bench.bench_prefill(model_bench.Settings(**SMALL, minutes=0))
    assert models["left_out"] == ["helium-1m"]


def test_calls_that_a_target_names_come_first_and_compiling_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "MANY_TOKENS", 8)
    sizes = [(1, 4), (1, 8)]
    some = list(operator_jobs(REDUCED, sizes, ("relu2", "rms_norm", "linear_cross_entropy"), "float32", "cpu"))
    monkeypatch.setitem(kernel_bench.DEFAULT_PEERS, "cpu", ("eager", "compile"))
    order = [
        (some[i].group[4], some[i].panel, some[i].operator, "compile" in [form.name for form in found])
        for i, found in kernel_bench.plan(some, "cpu", None)
    ]
    assert order[:4] == [
        ("8", "reduced", "relu2", True),
        ("8", "reduced", "rms_norm", True),
        ("8", "reduced partial", "relu2", False),
        ("8", "reduced partial", "rms_norm", False),
    ]
    assert [call[2] for call in order if call[3]].count("linear_cross_entropy") == 1
    assert len(order) == len(some) == len({call[:3] for call in order})
    asked = kernel_bench.plan(some, "cpu", ("compile",))
    assert all("compile" in [form.name for form in found] for _, found in asked)


# -- make gpu ----------------------------------------------------------------------------------------------------------


def test_make_gpu_runs_benchmarks_in_processes_and_keeps_their_files(warm_python: None, tmp_path: Path) -> None:
    small = {"seconds": 0.001, "scale": 0.001, "cache_bytes": 4096, "peers": ["plain"], "layers": ["reduced"]}
    passes = [{**small, "sizes": [[1, 4]], "operators": [name]} for name in ("relu2", "swiglu")]
    (row,) = gpu_benchmarks.run_benchmarks(
        ("kernels",), "cpu", "NVIDIA H200", tmp_path / "new", 200, lambda text: None, {"kernels": passes}
    )
    assert (row["problem"], row["missing"], row["verdict"]) == ("", "", "holds")
    file = tmp_path / "new" / "kernels-nvidia-h200.json"
    assert row["file"] == str(file)
    result = json.loads(file.read_text())
    assert result["command"].startswith("refllm bench kernels --device cpu --minutes")
    assert {row["what"] for row in result["rows"]} == {"relu2", "swiglu"}
    assert list((tmp_path / "new").glob("kernels-nvidia-h200*.png"))
    assert page.load(tmp_path / "new")


def test_make_gpu_says_what_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = gpu_benchmarks.run_benchmarks(("decode",), "cpu", "x", tmp_path, 1, lambda text: None)
    assert (row["problem"], row["missing"]) == ("", "not run: 1 s are left for it")

    class Ended:
        code, output, errors, seconds, last_line = 139, "", "", 1.0, "Segmentation fault"

        def __init__(self, arguments: list[str], seconds: float) -> None:
            assert float(arguments[arguments.index("--minutes") + 1]) * 60 < seconds < 100

        def wait(self) -> Any:
            return self

    monkeypatch.setattr(gpu_benchmarks, "Batch", Ended)
    (row,) = gpu_benchmarks.run_benchmarks(("decode",), "cpu", "x", tmp_path, 100, lambda text: None)
    assert row["problem"] == "ended with 139: Segmentation fault"


def test_a_benchmark_that_is_ended_has_left_its_rows_and_names_what_is_missing(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = kernel_bench.measure, []

    def ended(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(kernel_bench, "measure", ended)
    passes = [{**{k: v for k, v in SMALL.items() if k != "device"}, "peers": ["plain"], "operators": ["relu2"]}, {}]
    file = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        process.run("kernels", "cpu", 1.0, passes, file)
    result = json.loads(file.read_text())
    assert result["verdict"] == "incomplete"
    assert [row["form"] for row in result["rows"]] == ["triton", "plain"]
    assert "relu2, reduced partial, 1 x 20 tokens, float32: triton, plain" in result["left_out"]
    assert result["left_out"][-1] == "{}"  # the second pass


def test_models_are_saved_row_by_row(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    settings = model_bench.Settings(**SMALL, batches=(1,), lengths=(4, 8), forms=("torch",))
    model_bench.bench_prefill(settings, save=saved.append)
    assert [len(result["rows"]) for result in saved] == [1, 2]
    assert saved[0]["left_out"] == ["helium-1m: what follows"]


def test_what_is_compiled_ahead_are_the_calls_of_the_plan() -> None:
    settings = kernel_bench.Settings(device="cpu", operators=("relu2",), sizes=((1, 4),), peers=("plain",))
    some = kernel_bench.kernel_jobs(settings)
    counts = [kernel_bench.compile_ahead(settings, some, share, 2) for share in range(2)]
    assert counts == [1, 1]  # each a layer; plain Torch has nothing to compile
    broken = Job("relu2", "", "", "float32", {"B": 1, "S": 4}, lambda seed: 1 / 0)  # type: ignore[arg-type, return-value]
    assert kernel_bench.compile_ahead(settings, [broken, *some[:1]], 0, 1) == 1


def test_the_process_that_compiles_ahead_times_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert process.main(["attention", "--device", "cpu", "--compile-ahead", "0/100"]) == 0
    assert capsys.readouterr().out == "attention: 1 calls compiled\n"
    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_benchmarks, "Batch", lambda arguments, seconds: started.append(arguments))
        gpu_benchmarks.start_compilers(("kernels", "decode"), "cuda", 1.0)
        gpu_benchmarks.start_compilers(("kernels",), "cpu", 1.0)
    parts = [arguments[-1] for arguments in started]
    assert parts == [f"{part}/{len(parts)}" for part in range(gpu_benchmarks.COMPILERS["kernels"])]


def test_the_process_of_a_benchmark_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.dumps({"layers": ["gpt"]})
    arguments = ["kernels", "--device", "cpu", "--json", str(tmp_path / "a.json"), "--settings", settings]
    assert process.main(arguments) == 2
    assert "--layer gpt is not known" in capsys.readouterr().err


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_is_what_the_command_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "docs" / "benchmarks"
    text = page.render(page.load(folder), page.pictures(folder), page.pages(folder))
    assert (folder / page.PAGE).read_text(encoding="utf-8") == text, "run: refllm bench page"


# -- mistakes of the user ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--device", "tpu"], "use cuda or cpu"),
        (["kernels", "--device", "cpu", "--operator", "gelu"], "--operator gelu is not known"),
        (["kernels", "--device", "cpu", "--layer", "gpt2"], "--layer gpt2 is not known"),
        (["kernels", "--device", "cpu", "--size", "4096"], "expected sequences x tokens"),
        (["kernels", "--device", "cpu", "--dtype", "int8"], "--dtype int8"),
        (["kernels", "--device", "cpu", "--peers", "jax"], "--peers jax is not known"),
        (["attention", "--device", "cpu", "--head-dim", "512"], "outside 8..256"),
        (["attention", "--device", "cpu", "--tokens", "1k"], "expected whole numbers"),
        (["decode", "--device", "cpu", "--model", "gpt2"], "--model gpt2 is not known"),
        (["decode", "--device", "cpu", "--new-tokens", "2"], "at least 4"),
        (["decode", "--device", "cpu", "--peers", "vllm"], "--peers vllm is not known"),
        (["growth", "--shape", "gpt2"], "--shape gpt2 is not known"),
        (["growth", "--tokens", "64"], "at least two numbers that grow"),
        (["growth", "--tokens", "64,32"], "at least two numbers that grow"),
        (["growth", "--side", "jax"], "--side jax is not known"),
        (["page", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_bench, "measure_ceilings", lambda *_, **__: pytest.fail("began"))
    assert run_cli(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("refllm: ")
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "decode", "--device", "cuda") == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"notes\.json is no result of `refllm bench`"):
        page.load(tmp_path)
    (tmp_path / "notes.json").write_text("{")
    with pytest.raises(ValueError, match=r"notes\.json cannot be read as JSON"):
        page.load(tmp_path)


def test_without_matplotlib_plots_say_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(kernel_bench, "run", lambda *_: pytest.fail("began"))
    assert run_cli(monkeypatch, "kernels", "--device", "cpu", "--plots", tmp_path) == 2
    assert install_command("matplotlib") in capsys.readouterr().err


def test_make_gpu_takes_all_benchmarks_on_a_gpu_and_none_elsewhere() -> None:
    assert gpu._benchmarks(None, "cuda") == tuple(gpu_benchmarks.BENCHMARKS) == process.BENCHES
    assert gpu._benchmarks(None, "cpu") == gpu._benchmarks("none", "cuda") == ()
    with pytest.raises(ValueError, match="--benchmarks memory is not known"):
        gpu._benchmarks("memory", "cuda")
