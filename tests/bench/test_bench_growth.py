"""How cost grows: several passes per point, over a side that was compared with the reference first."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from refllm import bench
from refllm.bench import growth

SETTINGS = growth.Settings(
    shape="helium-1m", tokens=(4, 8), layers=(1, 2), sides=("numpy", "torch"), measures=("prefill", "decode")
)


class FakeWorker:
    """A side that answers at once. `started` lists every process, each with what it was asked."""

    started: ClassVar[list["FakeWorker"]] = []
    wrong: ClassVar[str] = ""
    """The backend whose outputs are off."""

    def __init__(self, side: str, folder: Path, first_number: int, settings: bench.Settings) -> None:
        self.side, self.backend, self.asked = side, settings.backend, []  # type: ignore[var-annotated]
        FakeWorker.started.append(self)

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def ask(self, command: str) -> dict[str, Any]:
        self.asked.append(command)
        return {"logits": np.ones((2, 3)) * (1.01 if self.backend == self.wrong else 1.0), "peak_bytes": 0}

    def seconds(self, *command: str | int) -> float:
        self.asked.append(" ".join(map(str, command)))
        return float(len(FakeWorker.started))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "write_shape", lambda *_: None)
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(growth, "ENOUGH_SECONDS", 100.0)
    return FakeWorker


def test_every_pass_is_a_process_of_its_own_and_the_first_is_compared(workers: type[FakeWorker]) -> None:
    result = json.loads(json.dumps(growth.bench_growth(SETTINGS)))
    timed = ["decode", "prefill_of 4", "prefill_of 8", "decode_at 4", "decode_at 8"]
    assert [(one.backend, one.asked) for one in workers.started] == [
        *[("numpy", timed)] * 3,
        ("torch", ["outputs", *timed]),
        ("numpy", ["outputs"]),  # the reference, closed again before anything is timed
        *[("torch", timed)] * 2,
    ]
    numpy_prefill = result["series"][0]
    names = ("seconds", "lowest", "highest", "passes")
    assert [numpy_prefill[name] for name in names] == [[2.0, 2.0], [1.0, 1.0], [3.0, 3.0], [3, 3]]


def test_a_side_that_is_wrong_is_not_timed(workers: type[FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "wrong", "torch")
    with pytest.raises(bench.BenchError, match=r"torch and the reference disagree by 9\.90e-03 .*: not timed"):
        growth.bench_growth(SETTINGS)
    assert all(one.asked == ["outputs"] for one in workers.started[3:])


def test_a_point_that_took_long_is_not_repeated() -> None:
    times: growth.Times = {1: [], 2: []}
    for _ in range(3):
        growth._pass(times, lambda n: 0.1 if n == 1 else growth.ENOUGH_SECONDS, "x", lambda text: None)
    assert {n: len(found) for n, found in times.items()} == {1: 3, 2: 1}


def test_every_panel_names_the_model_that_it_is_about() -> None:
    plt = pytest.importorskip("refllm.bench.plots").pyplot()
    from refllm.bench.plots import growth_figure

    kinds = ("decode", "check")
    series = [growth.series_of(what, "numpy", {1: [1.0, 2.0], 2: [2.0, 3.0]}) for what in kinds]
    result = {
        "bench": "growth",
        "date": "2026-01-02",
        "machine": {"gpu": None, "processor": "x"},
        "settings": {"shape": "helium-220m", "check_shape": "helium-1m"},
        "series": series,
    }
    figure = growth_figure(plt, result)
    assert [axes.get_title() for axes in figure.axes] == ["decode, helium-220m", "check, helium-1m"]
    assert "helium" not in figure.get_suptitle()
    assert all(len(axes.containers) == 1 for axes in figure.axes)  # error bars
    plt.close(figure)
