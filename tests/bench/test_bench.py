"""The benchmark: it runs end to end, times only what agrees, and its figures follow from its measurements."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import bench
from refllm.apart import Process
from refllm.bench import check_memory
from refllm.bench import worker as bench_worker
from refllm.commands import cli
from refllm.commands.info import describe
from refllm.errors import InputError

SMALL = bench.Settings(prompt_tokens=8, new_tokens=3, threads=1, repeats=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helium-1m")
    bench.write_shape("helium-1m", folder)
    return folder


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> dict[str, Any]:
    return bench.bench_checkpoint_or_shape(checkpoint, "helium-220m", SMALL)


class Forked(bench.Worker):
    """The same worker in a fork, which has Torch and Transformers already. What a new process is, `result` shows."""

    @staticmethod
    def start(environment: dict[str, str]) -> Process:
        return Process.forked(bench_worker.serve)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", Forked)


def test_benchmark_runs_end_to_end(result: dict[str, Any], checkpoint: Path) -> None:
    assert result["output_difference"] < bench.AGREEMENT["float32"]
    assert result["weights"]["total"] == describe(checkpoint).parameters * 4
    for job in ("prefill", "decode"):
        for side in ("refllm", "transformers"):
            timing = result[job][side]
            assert 0 < timing["best"] <= timing["median"] <= timing["worst"]
        assert result[job]["ratio"] == result[job]["refllm"]["median"] / result[job]["transformers"]["median"]
    for side in ("refllm", "transformers"):
        assert result["load_seconds"][side] > 0
        if sys.platform == "linux":
            assert result["memory"][side]["run_peak"] > 0


def test_report_names_the_figures(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from refllm.bench.report import show_bench

    Console(width=160).print(show_bench(result))
    out = capsys.readouterr().out
    assert f"{result['prefill']['ratio']:.2f} x" in out
    assert f"{result['decode']['ratio_to_read']:.2f} x that" in out
    assert "prefill, 8 tokens" in out


def test_kernels_of_numpys_blas_are_named_and_who_chose_them(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels for an older processor the same NumPy takes half as long again."""
    import threadpoolctl

    from refllm.bench.report import show_bench

    def last_line() -> str:
        lib = {"user_api": "blas", "internal_api": "openblas", "version": "1.2", "architecture": "Zen"}
        own = lib | {"filepath": "/x/numpy.libs/libscipy_openblas64_.so"}
        other = lib | {"filepath": "/x/torch/lib/libopenblas.so", "architecture": "Other"}
        monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [other, own])
        machine = result["machine"] | {"blas": bench.numpy_blas()}
        return str(show_bench(result | {"machine": machine}).renderables[-1])

    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert last_line() == "NumPy's matrix products: openblas 1.2, Zen kernels"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    assert "because OPENBLAS_CORETYPE=Zen" in last_line()
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert bench.numpy_blas() is None


def test_memory_of_a_model_is_measured_with_and_without_low_memory() -> None:
    from refllm.bench.memory import bench_memory, show_memory

    found = bench_memory("helium-1m", 4)
    weights = 4 * found["parameters"]
    full, low = found["modes"]["float32"], found["modes"]["low_memory"]
    assert full["finite"]
    assert low["finite"]
    if bench_worker.anonymous_bytes():
        # Small as the model is, what loading imports counts too, on both sides.
        assert full["load_peak"] - low["load_peak"] > 0.5 * weights
    assert "0.9 million parameters" in str(show_memory(found).title)
    with pytest.raises(InputError, match="--shape helium-9b"):
        bench_memory("helium-9b", 4)


def test_memory_of_a_check_is_that_of_all_its_processes_over_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forked(serve: str) -> Process:
        module, _, name = serve.partition(":")
        return Process.forked(getattr(importlib.import_module(module), name))

    monkeypatch.setattr(Process, "fresh", forked)
    monkeypatch.setattr(check_memory, "CANDIDATES", {"numpy": ()})
    monkeypatch.setattr(check_memory, "_SECONDS", 0.002)
    found = check_memory.bench_check("helium-1m", 8)
    numpy = found["candidates"]["numpy"]
    assert numpy["verdict"] in ("holds", "incomplete")
    text = str([column._cells for column in check_memory.show_check(found).columns])
    if sys.platform == "linux":
        assert numpy["check"] > numpy["forward"] > 4 * found["parameters"]
        assert f"{numpy['check'] / numpy['forward']:.2f} x" in text
    with pytest.raises(InputError, match="--check-shape helium-9b"):
        check_memory.bench_check("helium-9b", 8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_resident_memory_counts_what_a_process_starts() -> None:
    """A process that starts another, which holds 64 MiB until its input ends."""
    inner = "import sys; held = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}])"
    command = [sys.executable, "-S", "-c", outer]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        with check_memory.Resident(process.pid) as resident:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            end = time.monotonic() + 10
            while resident.peak < 64 << 20 and time.monotonic() < end:
                time.sleep(0.01)
        process.communicate()
    assert 64 << 20 < resident.peak < 160 << 20


def test_weight_bytes_leave_out_the_embedding_table_but_not_a_tied_one(checkpoint: Path, tmp_path: Path) -> None:
    import refllm

    sizes = bench.weight_bytes(checkpoint)
    table = 4 * 2000 * 128
    assert sizes["total"] == 4 * describe(checkpoint).parameters
    assert sizes["read_per_token"] == sizes["total"] - table
    config = refllm.HeliumConfig(**bench.SHAPES["helium-1m"], tie_word_embeddings=True)
    refllm.HeliumForCausalLM.from_config(config).save_pretrained(tmp_path, dtype="bfloat16")
    tied = bench.weight_bytes(tmp_path)
    assert tied["read_per_token"] == tied["total"] == sizes["total"] - table


def test_named_shape_has_the_size_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "helium"} | bench.SHAPES["helium-220m"]))
    assert describe(tmp_path / "config.json").parameters == 226_776_064


def test_disagreement_is_a_finding_and_nothing_is_timed(
    checkpoint: Path, forked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "AGREEMENT", {"float32": 0.0})
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("timed"))
    options = ["--prompt-tokens", "4", "--new-tokens", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["refllm", "bench", "cpu", str(checkpoint), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "not timed" in capsys.readouterr().err


def test_torch_backend_is_timed_too(checkpoint: Path, forked: None) -> None:
    """In bfloat16, where everything differs from the benchmark above: the backend, what agrees, and the bytes."""
    settings = replace(SMALL, backend="torch", dtype="bfloat16")
    result = bench.bench_checkpoint_or_shape(checkpoint, "helium-1m", settings)
    assert result["settings"]["backend"] == "torch"
    assert result["output_difference"] < bench.AGREEMENT["bfloat16"]
    assert result["weights"]["total"] == describe(checkpoint).parameters * 2


@pytest.mark.parametrize(("options", "named"), [({"backend": "triton"}, "triton"), ({"dtype": "bfloat16"}, "bfloat16")])
def test_what_is_not_timed_is_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(SMALL, **options)


def test_side_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "helium", "vocab_size": 8}')
    with pytest.raises(bench.BenchError, match=r"refllm side of the benchmark ended: .*Error"):
        bench.Worker("refllm", tmp_path, 4, SMALL)


class CountingSide:
    """A model whose logits tell what it was given."""

    def forward(self, input_ids_BS: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        seen = [*(cache or []), *input_ids_BS[0]]
        return np.array([[len(seen), seen[-1], input_ids_BS.shape[1]]], dtype=np.float64), seen


def test_decode_feeds_single_tokens_behind_the_prompt() -> None:
    rows = bench_worker.Work(CountingSide(), 100, 5, 3).outputs()
    assert rows[:, 0].tolist() == [5, 6, 7, 8]
    assert rows[:, 2].tolist() == [5, 1, 1, 1]


def test_peak_sees_memory_that_is_gone_again() -> None:
    if bench_worker.anonymous_bytes() == 0:
        pytest.skip("this system does not tell anonymous memory")
    before = bench_worker.anonymous_bytes()
    with bench_worker.Peak() as peak:
        block = np.ones(16 * 2**20)  # 128 MiB
        for _ in range(10):
            block += 1
        del block
    assert peak.bytes - before > 120 * 2**20
    assert bench_worker.anonymous_bytes() - before < 64 * 2**20


def test_reading_is_timed_over_the_bytes_asked_for() -> None:
    small, large = bench_worker.read_seconds(2**22, 1), bench_worker.read_seconds(2**27, 1)
    assert min(large() for _ in range(5)) > 4 * min(small() for _ in range(5))
