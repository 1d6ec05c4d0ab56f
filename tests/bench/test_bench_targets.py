"""The figures to reach: read off whole runs on the machine that they are for, like compared with like."""

from dataclasses import asdict
from typing import Any

import pytest

from refllm.bench import kernels, models, page, results, targets
from refllm.bench.gpu_benchmarks import PASSES
from refllm.bench.timer import spread
from refllm.bench.workloads import attention_jobs, operator_jobs
from refllm.kernels.calls import LAYERS

PEER_FORMS = ("triton", "eager", "compile", "liger", "sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn")


def fake(bench: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "bench": bench,
        "date": "2026-01-02",
        "command": f"refllm bench {bench}",
        "verdict": "holds",
        "machine": {"device": "cuda", "gpu": "NVIDIA H200", "processor": "x"},
        "settings": {},
        "ceilings": {"copy_bytes_per_second": 4e12, "flops_per_second": {"bfloat16": 8e14}},
        "rows": rows,
        "left_out": [],
        **changes,
    }


def row(what: str, form: str, seconds: float, share: float, method: str = "x", **sizes: int) -> dict[str, Any]:
    made = results.Row(what, "layer", str(sizes), form, form.startswith("triton"), "bfloat16", sizes, 8, 8)
    made.time = spread([seconds], method)
    made.figures = {"share": share, "bound": "memory", "bytes_per_second": 1e12, "flops_per_second": 1e12}
    return made.to_dict()


NORM = row("rms_norm", "triton", 2.0, 0.93, B=1, S=4096)


def measured(*found: dict[str, Any]) -> set[str]:
    """What the targets say of these results."""
    fitting = [(t, [result for result in found if targets.counts_for(t, result)]) for t in targets.TARGETS]
    return {text for target, some in fitting if (text := target.measured(some))}


def test_targets_are_read_off_the_results() -> None:
    found = {
        "kernels.json": fake(
            "kernels",
            [
                NORM,
                row("rms_norm", "liger", 3.0, 0.6, B=1, S=4096),
                row("rope", "triton", 2.0, 0.88, B=1, S=4096),
                row("rope", "triton", 2.0, 0.11, B=1, S=1),
            ],
        ),
        "attention.json": fake(
            "attention",
            [
                row("attention", "triton", 2.0, 0.5, B=1, S=8192, D=80),
                row("attention", "sdpa flash", 3.0, 0.3, B=1, S=8192, D=80),
                row("attention", "sdpa cudnn", 5.0, 0.3, B=1, S=8192, D=80),
            ],
        ),
    }
    text = page.render(found)
    assert "88 to 93 % (2 calls)" in text
    assert "| 1.0 x | 1.5 x | `refllm bench kernels`" in text
    assert "| 1.3 x | 1.5 x | `refllm bench attention`" in text
    line = next(line for line in text.splitlines() if "D 128, 4k to 16k" in line)
    assert "| not measured |" in line
    assert "## decode on a GPU\n\nnot measured" in text
    assert "## kernels on a GPU" not in text


def test_without_any_result_every_target_is_not_measured() -> None:
    text = page.render({})
    assert text.count(f"| {page.NOT_MEASURED} |") == len(targets.TARGETS)


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": {"device": "cpu", "gpu": None, "processor": "x"}},
        {"machine": {"device": "cuda", "gpu": "NVIDIA A100-SXM4-80GB", "processor": "x"}},
        {"settings": {"layers": ["stablelm-3b-4e1t"]}},
        {"settings": {"sizes": [[1, 4096]]}},
        {"settings": {"operators": ["rms_norm"]}},
        {"settings": {"peers": []}},
        {"settings": {"dtype": "float32"}},
        {"settings": {"seconds": 0.001}},
    ],
    ids=str,
)
def test_another_machine_and_a_part_of_the_run_do_not_count(changes: dict[str, Any]) -> None:
    whole = fake("kernels", [NORM], date="2025-01-01", settings={"device": "cuda", "dtype": "bfloat16", "minutes": 3.0})
    assert measured(whole) == {"93 %"}
    part = fake("kernels", [row("rms_norm", "triton", 2.0, 0.5, B=1, S=4096)], **changes)
    assert measured(part) == set()
    assert measured(whole, part) == {"93 %"}  # though the part is newer


@pytest.mark.parametrize("bench", ["kernels", "attention", "decode"])
def test_the_run_of_make_gpu_counts(bench: str) -> None:
    settings = models.Settings if bench == "decode" else kernels.Settings
    first = {name: tuple(value) if isinstance(value, list) else value for name, value in PASSES[bench][0].items()}
    assert targets.is_whole(fake(bench, [], settings=asdict(settings(device="cpu", minutes=1.0, **first))))


def test_what_there_was_no_time_for_is_said() -> None:
    assert measured(fake("kernels", [NORM], left_out=["a", "b"])) == {"93 %; 2 left out"}


def test_a_peer_counts_only_where_it_was_timed_in_the_same_way_and_the_call_is_large() -> None:
    graph, ours = "graph replay", timed_by(NORM, "graph replay")
    small = (
        row("rms_norm", "triton", 2.0, 0.2, graph, B=64, S=1),
        row("rms_norm", "compile", 9.0, 0.1, graph, B=64, S=1),
    )
    by_events = row("rms_norm", "liger", 8.0, 0.6, "events", B=1, S=4096)
    assert measured(fake("kernels", [ours, by_events, *small])) == {"93 %"}
    replayed = row("rms_norm", "compile", 3.0, 0.6, graph, B=1, S=4096)
    assert measured(fake("kernels", [ours, by_events, *small, replayed])) == {"93 %", "1.5 x"}
    assert "| compile, 1.50 x |" in page.render({"kernels.json": fake("kernels", [ours, by_events, replayed])})


def timed_by(made: dict[str, Any], method: str) -> dict[str, Any]:
    return made | {"time": made["time"] | {"method": method}}


def test_generation_is_compared_by_whole_calls_and_its_step_by_its_share() -> None:
    sizes = {"batch": 1, "prompt": 512, "new": 128}
    rows = [
        row("decode", "triton", 1.0, 0.81, "differences", **sizes),
        row("decode", "triton, whole call", 10.0, 0.5, **sizes),
        row("decode", "transformers", 9.0, 0.1, "differences", **sizes),
        row("decode", "transformers, whole call", 20.0, 0.1, **sizes),
    ]
    assert measured(fake("decode", rows)) == {"81 %", "2 x"}


def cpu_result(**settings: Any) -> dict[str, Any]:
    usual = {"backend": "torch", "dtype": "bfloat16", "prompt_tokens": 512}
    jobs = {"prefill": {"ratio": 0.91}, "decode": {"ratio": 0.82}}
    machine = {"processor": "x"}
    return fake("cpu", [], checkpoint="helium-220m (random weights)", settings=usual | settings, machine=machine) | jobs


def test_bfloat16_on_a_cpu_has_targets_of_its_own_and_a_short_prompt_does_not_count() -> None:
    assert measured(cpu_result()) == {"0.91 x", "0.82 x"}
    assert measured(cpu_result(prompt_tokens=32)) == set()
    float32 = {t.what for t in targets.TARGETS if t.measured([cpu_result(dtype="float32")])}
    assert float32
    assert float32.isdisjoint(t.what for t in targets.TARGETS if t.measured([cpu_result()]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.99967, "1 s"),
        (0.99949, "999 ms"),
        (1.0, "1 s"),
        (9.996e-4, "1 ms"),
        (1.2345e-5, "12.3 us"),
        (3e-8, "0.03 us"),
        (0.0, "0 us"),
        (12.345, "12.3 s"),
        (1234.5, "1234 s"),
    ],
)
def test_a_time_has_three_digits_and_the_unit_that_fits_them(seconds: float, text: str) -> None:
    assert results.span(seconds) == text


def test_what_a_target_names_is_what_targets_read() -> None:
    """So that the order of the plan cannot drift away from the figures that it is for."""
    every = {
        "kernels": list(operator_jobs(LAYERS, [(1, 4096), (2, 2048), (64, 1), (1, 4095)], None, "bfloat16", "meta")),
        "attention": list(
            attention_jobs(range(64, 168, 8), (512, 1024, 4096, 16384, 32768), (1, 16), "bfloat16", "meta", 16384)
        ),
    }
    for bench, some in every.items():
        assert {kernels.named_by_a_target(job) for job in some} == {True, False}
        for job in some:
            rows = [row(job.operator, form, 1.0, 0.5, **job.sizes) for form in PEER_FORMS]
            read = [t for t in targets.TARGETS if t.device == "cuda" and t.measured([fake(bench, rows)])]
            assert bool(read) == kernels.named_by_a_target(job), job.name
