"""`refllm bench decode` and `prefill` on a CPU: nothing wrong gets a time, and what one form does is its own affair."""

import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from refllm.bench import model_forms, models, whole_models
from refllm.bench.measure import Bench
from refllm.bench.model_forms import Subject
from refllm.bench.timer import Timed
from refllm.bench.traffic import decode_step
from refllm.kernels.models.cache import TorchLayerCache
from refllm.kernels.models.decode import DecodeStep
from refllm.kernels.models.fast_model import FastModel

SMALL: dict[str, Any] = {"device": "cpu", "seconds": 0.001, "scale": 0.002, "cache_bytes": 4096}
CEILINGS = {"copy_bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}, "launch_seconds": 1e-9}
TWO = ("torch", "transformers")
Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repeats, and a clock in which every call takes longer than the one before."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(models, "REPEATS", 1)
    monkeypatch.setattr(models, "measure_ceilings", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(models, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks) ** 2)))


def decoded(**settings: Any) -> tuple[dict[str, Any], Rows]:
    """A result, and its rows by (form, group)."""
    usual = {"batches": (1,), "prompt": 5, "new": 4, "forms": TWO}
    result = models.bench_decode(models.Settings(**SMALL, **usual | settings))
    return result, {(row["form"], row["group"]): row for row in result["rows"]}


def timed(rows: Rows) -> set[str]:
    return {form for (form, _), row in rows.items() if row["time"]}


ALL = {"torch", "torch, whole call", "torch, step alone", "transformers", "transformers, whole call"}


# -- right ones get a time ---------------------------------------------------------------------------------------------


def test_every_form_is_timed_per_token_and_as_a_whole_and_ours_step_alone() -> None:
    result, rows = decoded()
    assert result["verdict"] == "holds"
    assert timed(rows) == ALL
    assert all(row["checked"] and row["error"] is not None for row in rows.values())
    assert rows["torch", "batch 1"]["checked"].endswith("every token it generated against the logits of torch")
    whole = rows["torch, whole call", "batch 1"]
    assert whole["tokens"] == 4
    assert whole["figures"]["tokens_per_second"] == pytest.approx(4 / whole["time"]["median"])
    assert {row["time"]["method"] for row in rows.values()} == {
        *("wall clock", "generate, wall clock", "differences of generate, wall clock")
    }  # so that a token of one form is never held against a whole call of another


def test_the_traffic_of_the_step_alone_is_that_of_its_own_context() -> None:
    _, rows = decoded(prompt=64)
    sizes = whole_models.Whole("helium-1m", "float32", "cpu").sizes()
    alone, token = (rows[form, "batch 1"]["bytes"] for form in ("torch, step alone", "torch"))
    weights = sizes.layers + sizes.head
    assert alone == decode_step(weights, sizes.cache, sizes.group, 1, 4, 64 + 1).bytes
    assert token == decode_step(weights, sizes.cache, sizes.group, 1, 4, 64 + 4 // 2).bytes
    steps = sizes.prefill(1, 4, 64).bytes + 3 * token
    assert rows["torch, whole call", "batch 1"]["bytes"] == steps


def test_our_generation_has_its_cache_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    slots: set[int] = set()
    right = TorchLayerCache._grown

    def grown(self: TorchLayerCache, old: Any, like: torch.Tensor, capacity: int) -> torch.Tensor:
        assert not self.length, "a cache grew while it was timed"
        slots.add(capacity)
        return right(self, old, like, capacity)

    model = whole_models.Whole("helium-1m", "float32", "cpu").fast("torch")
    monkeypatch.setattr(TorchLayerCache, "_grown", grown)
    sequence = model_forms.generation(model, np.arange(5, 305)[None])(20)
    assert sequence.shape == (1, 320)
    assert slots == {319}  # the last token is not read again


@pytest.mark.parametrize("name", [name for name in whole_models.MODELS if name not in ("helium-220m", "helium-1m")])
def test_published_models_are_built_and_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, sizes = whole_models.MODELS[name]
    narrow = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if sizes["num_key_value_heads"] >= 20 else 2}
    reduced = {**sizes, **narrow, **heads, "bos_token_id": 1, "eos_token_id": 2}
    reduced |= {"head_dim": 16} if "head_dim" in sizes else {}
    monkeypatch.setitem(whole_models.MODELS, "narrow", (cls, reduced))
    whole = whole_models.Whole("narrow", "float32", "cpu")
    error, problem = whole.check("torch")
    assert not problem
    assert 0 < error < 1e-5
    ids = whole.prompt(2, 9)
    ours, theirs = (model_forms.last_logits(model, ids) for model in (whole.fast("torch"), whole.transformers()))
    assert whole_models.relative_error(ours, theirs) < 1e-5


def test_the_exact_run_is_made_once_for_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    right, made = whole_models.Whole.exact, []
    monkeypatch.setattr(whole_models.Whole, "exact", lambda self, layers: made.append(layers) or right(self, layers))
    whole = whole_models.Whole("helium-1m", "float32", "cpu")
    assert whole.check("torch") == whole.check("torch")
    assert made == [whole_models.CHECKED_LAYERS]


# -- wrong ones get none -----------------------------------------------------------------------------------------------


def test_a_model_whose_decoding_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchLayerCache.append
    monkeypatch.setattr(TorchLayerCache, "append", lambda self, k, v: right(self, k * 1.05, v))
    monkeypatch.setattr(models, "generated", lambda *_: pytest.fail("timed"))
    settings = models.Settings(**SMALL, batches=(1,), prompt=4, new=4, forms=("torch",))
    result = models.bench_decode(settings)
    (row,) = result["rows"]
    assert result["verdict"] == "fails"
    assert "logits of 2 layers off by" in row["finding"]
    assert row["time"] is None


def test_a_step_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DecodeStep.forward
    monkeypatch.setattr(DecodeStep, "forward", lambda self: right(self) * 0.0)
    result, rows = decoded()
    assert timed(rows) == ALL - {"torch, step alone"}
    assert rows["torch, step alone", "batch 1"]["finding"].startswith("its logits and those of the same text read at")
    assert result["verdict"] == "fails"


@pytest.mark.parametrize("form", TWO)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda ids: ids * 0, "not the prompt and 4 tokens behind it"),
        (lambda ids: ids[:, :-1], "not the prompt and 4 tokens behind it"),
        (lambda ids: np.where(np.arange(ids.shape[1]) == 6, 0, ids), "a generated token is"),
        (lambda ids: np.where(np.arange(ids.shape[1]) == 8, 0, ids), "a generated token is"),
    ],
    ids=["zeros", "too few", "another in the middle", "another at the end"],
)
def test_a_form_that_generates_other_tokens_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, form: str, wrong: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    right = models.generation

    def generation(model: Any, ids: np.ndarray) -> Callable[[int], Any]:
        one = right(model, ids)
        spoiled = isinstance(model, FastModel) == (form == "torch")
        return lambda n: wrong(np.asarray(one(n))) if spoiled else one(n)

    monkeypatch.setattr(models, "generation", generation)
    result, rows = decoded()
    assert timed(rows) == {other for other in ALL if not other.startswith(form)}
    row = rows[form, "batch 1"]
    assert said in row["note"]
    assert (said in row["finding"]) == (form == "torch")
    assert result["verdict"] == ("fails" if form == "torch" else "holds")


class Fixed:
    """A model whose logits at every position are these."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor(logits)

    def new_cache(self, slots: int) -> None: ...

    def __call__(self, input_ids: np.ndarray, logits_to_keep: int, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), logits_to_keep, -1))


def test_forms_may_part_at_a_near_tie_and_nowhere_else() -> None:
    ids, sequences = np.zeros((1, 2), np.int64), [np.array([[0, 0, 2, 2]]), np.array([[0, 0, 3, 2]])]
    unit, limit = float(np.sqrt(np.mean(np.square([0.0, 1.0, 5.0, 5.0])))), 0.01
    for below, near in ((0.9, True), (1.1, False)):
        gap = below * model_forms.NEAR * limit * unit
        problem = model_forms.wrong_tokens(Fixed([0.0, 1.0, 5.0, 5.0 - gap]), ids, sequences, 2, limit)
        assert (problem == "") == near
    assert "nan" in model_forms.wrong_tokens(Fixed([0.0, 1.0, 5.0, float("nan")]), ids, sequences, 2, limit)


def test_a_forward_pass_that_goes_wrong_while_it_is_timed_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.clock

    def clock(*arguments: Any) -> Any:
        watch = right(*arguments)
        time = watch.time

        def spoiled(*calls: Any) -> Timed:
            found = time(*calls)
            return Timed(found.spread, [SimpleNamespace(logits=found.outputs[0].logits * 1.5)])

        watch.time = spoiled  # type: ignore[method-assign]
        return watch

    monkeypatch.setattr(models, "clock", clock)
    result = models.bench_prefill(models.Settings(**SMALL, batches=(1,), lengths=(4,), forms=TWO))
    assert [row["time"] for row in result["rows"]] == [None, None]
    notes = [row["note"] for row in result["rows"]]
    assert all(note.startswith("not timed: while timed, its logits and those of torch differ by 0.5") for note in notes)
    assert [bool(row["finding"]) for row in result["rows"]] == [True, False]


def test_a_peer_alone_has_nothing_to_be_compared_with() -> None:
    _, rows = decoded(forms=("transformers",))
    assert timed(rows) == set()
    assert rows["transformers", "batch 1"]["note"] == "not timed: no other form runs that it could be compared with"
    assert timed(decoded(forms=("transformers", "torch"))[1]) == ALL


# -- what one form does is its own affair ------------------------------------------------------------------------------


def _fails(model: Any, ours: bool, when: bool, error: Exception) -> None:
    if isinstance(model, FastModel) == ours and when:
        raise error


MEMORY, BAD = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("bad\nmore")


# Each form at each place, each error at each place and of each form: what an error is called does not depend on both.
@pytest.mark.parametrize(
    ("error", "place", "form"),
    [
        (BAD, "forward", "torch"),
        (MEMORY, "forward", "transformers"),
        (MEMORY, "generation", "torch"),
        (BAD, "generation", "transformers"),
    ],
)
def test_a_form_that_raises_takes_no_other_row_with_it(
    monkeypatch: pytest.MonkeyPatch, place: str, form: str, error: Exception
) -> None:
    """At the second of three batches: in the forward pass that is compared, or in generate."""
    module = model_forms if place == "forward" else models
    right = getattr(module, place)

    def made(model: Any, ids: np.ndarray, *rest: Any, **more: Any) -> Callable[..., Any]:
        call = right(model, ids, *rest, **more)
        return lambda *n: _fails(model, form == "torch", len(ids) == 2, error) or call(*n)

    monkeypatch.setattr(module, place, made)
    result, rows = decoded(batches=(1, 2, 3))
    lost = {(f, "batch 2") for f in ALL if f.startswith(form)}
    if (place, form) == ("forward", "torch"):  # what is left is a peer alone
        lost = {(f, "batch 2") for f in ALL}
    assert {key for key, row in rows.items() if row["time"]} == {
        (f, f"batch {b}") for f in ALL for b in (1, 2, 3)
    } - lost
    memory = isinstance(error, torch.OutOfMemoryError)
    note = "not timed: not enough memory" if memory else "not timed: it raised RuntimeError: bad"
    assert rows[form, "batch 2"]["note"] == note
    finding = "RuntimeError: bad" if form == "torch" and not memory else ""
    assert rows[form, "batch 2"]["finding"] == finding
    assert result["verdict"] == ("fails" if finding else "holds")


def test_too_little_memory_for_a_fast_model_is_no_finding() -> None:
    """It says so in a sentence of its own, for its users."""
    error = ValueError("this call: out of memory on cuda")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert model_forms.excuse(error, ours=True) == ("not timed: not enough memory", "")


def test_a_model_that_cannot_be_made_is_a_row_and_the_next_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.prepare

    def prepare(name: str, *rest: Any) -> Any:
        if name == "helium-220m":
            raise RuntimeError("an illegal memory access was encountered")
        return right(name, *rest)

    monkeypatch.setattr(models, "prepare", prepare)
    names = ("helium-220m", "helium-1m")
    settings = models.Settings(**SMALL, models=names, batches=(1,), lengths=(4,), forms=("torch",))
    result = models.bench_prefill(settings)
    assert [row["panel"] for row in result["rows"]] == list(names)
    assert "illegal memory access" in result["rows"][0]["finding"]
    assert result["rows"][1]["time"]
    assert result["verdict"] == "fails"


@pytest.mark.parametrize("raises", [False, True])
def test_the_weights_of_a_model_are_gone_before_the_next_one_is_made(
    monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    right, before = models.prepare, []

    def prepare(*arguments: Any) -> Subject:
        assert [one() for one in before] == [None] * len(before)
        subject = right(*arguments)
        before.append(weakref.ref(subject.whole))
        return subject

    def raising(*_: Any) -> None:
        raise RuntimeError("bad")

    monkeypatch.setattr(models, "prepare", prepare)
    if raises:
        monkeypatch.setattr(models, "agree", raising)
    result, rows = decoded(models=("helium-1m", "helium-1m"), forms=("torch",))
    assert len(before) == 2
    assert result["verdict"] == ("fails" if raises else "holds")
    assert len(rows) == (1 if raises else 3)


def test_without_transformers_the_models_are_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result, rows = decoded()
    assert rows["transformers", "batch 1"]["note"] == "not timed: transformers is not installed"
    assert result["verdict"] == "holds"
    assert timed(rows) == {form for form in ALL if form.startswith("torch")}


# -- the clock of generation -------------------------------------------------------------------------------------------


def generated(monkeypatch: pytest.MonkeyPatch, per_token: float) -> models.Generated:
    clock = {"now": 0.0}
    watch: Any = SimpleNamespace(synchronize=lambda: None)

    def generate(n: int) -> np.ndarray:
        clock["now"] += 7.0 + (0.5 if n > 1 else 0.0) + per_token * (n - 1)  # prompt, recording, steps
        return np.zeros((1, 5 + n))

    monkeypatch.setattr(models.time, "perf_counter", lambda: clock["now"])
    return models.generated(generate, 32, Bench(watch, CEILINGS, 0.0))


def test_rate_of_generation_leaves_out_prompt_and_recording_and_the_whole_call_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "REPEATS", 3)
    found = generated(monkeypatch, 0.01)
    assert found.token.median == pytest.approx(0.01)
    assert found.first == pytest.approx(0.5)
    assert found.whole.median == pytest.approx(7.0 + 0.5 + 31 * 0.01)
    assert [one.shape for one in found.sequences] == [(1, 37)] * 4  # of the first call, and of three that are timed


def test_tokens_that_the_clock_cannot_see_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(models.time, "perf_counter", lambda: float(next(ticks)))  # whatever a call makes
    _, rows = decoded(forms=("torch",))
    assert rows["torch", "batch 1"]["note"] == "not timed: its tokens take less than the noise of the clock"
