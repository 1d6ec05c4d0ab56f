"""Pictures of benchmarks of full size: what stands in them, without looking at them."""

from collections.abc import Iterator
from typing import Any

import pytest

from refllm.bench import charts, plots
from refllm.bench import kernels as kernel_bench
from refllm.bench.forms import forms
from refllm.bench.model_forms import FORMS
from refllm.bench.results import Row
from refllm.bench.timer import spread
from refllm.bench.workloads import attention_jobs, operator_jobs, traffic_of
from refllm.kernels.calls import LAYERS

pytest.importorskip("matplotlib")
CEILINGS = {
    "copy_bytes_per_second": 4e12,
    "flops_per_second": {"bfloat16": 8e14},
    "launch_seconds": 2e-6,
}


def _result(bench: str, jobs: list[Any]) -> dict[str, Any]:
    rows = []
    for index, chosen in kernel_bench.plan(jobs, "cuda", None):
        job = jobs[index]
        cost = traffic_of(job, job.draw(0))
        for number, form in enumerate(chosen):
            row = Row(job.operator, job.panel, job.group, form.name, form.ours, job.dtype, job.sizes, *_both(cost))
            row.time = spread([2e-6 + (1.2 + 0.3 * number) * max(cost.bytes / 4e12, cost.flops / 8e14)], "graph replay")
            row.rate(CEILINGS)
            rows.append(row.to_dict())
    machine = {"gpu": "NVIDIA H200", "processor": "x"}
    return {"bench": bench, "date": "2026-01-02", "machine": machine, "ceilings": CEILINGS, "rows": rows}


def _both(cost: Any) -> tuple[int, int]:
    return cost.bytes, cost.flops


def _drawn(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    plt = plots.pyplot()
    for name, figure in plots._figures(plt, result, result["rows"]):
        yield name, figure
        plt.close(figure)


@pytest.fixture(scope="module")
def kernels_result() -> dict[str, Any]:
    return _result("kernels", list(operator_jobs(LAYERS[:2], [(1, 4096), (64, 1)], None, "bfloat16", "meta")))


def test_forms_that_stand_in_one_picture_look_different() -> None:
    of_kernels = [
        f.name for name in ("rope", "attention") for f in forms(name, "cuda", ("eager", "compile", "liger", "sdpa"))
    ]
    of_models = [*FORMS, *(f"{form}, step alone" for form in FORMS[:2])]
    for together in (set(of_kernels), set(of_models)):
        assert together <= set(charts.FORMS)
        assert len({charts.FORMS[name] for name in together}) == len(together)
        assert len({charts.FORMS[name][1] for name in together}) == len(together)  # without colours too


def test_every_picture_of_shares_holds_one_size_and_says_which(kernels_result: dict[str, Any]) -> None:
    found = {name: figure.get_suptitle() for name, figure in _drawn(kernels_result)}
    for size in ("1 x 4096 tokens", "64 x 1 tokens"):
        assert found[f"shares-{size.replace(' ', '-')}"].endswith(f": {size}")
    assert set(found) == {"shares-1-x-4096-tokens", "shares-64-x-1-tokens", "roofline"}


def test_every_row_is_a_marker_and_has_its_share(kernels_result: dict[str, Any]) -> None:
    names = []
    for name, figure in _drawn(kernels_result):
        names.append(name)
        size = name.removeprefix("shares-").replace("-", " ")
        rows = [row for row in kernels_result["rows"] if row["group"] == size]
        if name != "roofline":
            drawn = [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_marker() != "None"]
            assert sorted(drawn) == pytest.approx(sorted(100 * row["figures"]["share"] for row in rows))
    assert len(names) > 1


def test_roofline_has_a_panel_per_operator_and_no_point_above_the_roof(kernels_result: dict[str, Any]) -> None:
    figure = dict(_drawn(kernels_result))["roofline"]
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert [title.split("\n")[0] for title in titles] == list(
        dict.fromkeys(row["what"] for row in kernels_result["rows"])
    )
    assert "decode_attention\n64 x 1 tokens" in titles  # its size is another one, and said
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        roof, *points = axes.lines
        assert points
        assert max(point.get_ydata()[0] for point in points) <= max(roof.get_ydata())
        low, high = axes.get_ylim()
        assert all(low < point.get_ydata()[0] < high for point in points)


def test_lengths_and_head_sizes_stand_in_their_order() -> None:
    jobs = list(attention_jobs((128, 80, 64), (4096, 16384, 1024), (16, 1), "bfloat16", "meta", 16384))
    names = []
    for name, figure in _drawn(_result("attention", jobs)):
        names.append(name)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        if name == "roofline":
            continue
        assert [axes.get_title().split(",")[0] for axes in shown] == ["D 64", "D 80", "D 128"]
        labels = [label.get_text() for label in shown[0].get_yticklabels()]
        if name == "shares-attention":
            assert labels == ["16 x 1024 tokens", "4 x 4096 tokens", "1 x 16384 tokens"]
        else:
            slots = (1024, 4096, 16384)
            assert labels == [f"{B} x {N} slots" for B in (1, 16) for N in slots]
    assert len(names) > 2
