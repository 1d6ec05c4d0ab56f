"""Forward passes of somebody's own: what they are given, what is taken of what they return, which of their faults show,
and that what a run does not show is no pass."""

import re
import sys
import time
from array import array
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from rich.console import Console
from tiny import tiny_config, tiny_model

import refllm
from refllm.check import assert_matches, compare, unseen
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.functions import FunctionCandidate
from refllm.check.inputs import Inputs, every_token, stressed
from refllm.check.misbehaviour import floats
from refllm.check.oracle import Report, judge
from refllm.check.report import closing_line, show_report, show_summary
from refllm.check.run import Settings, check_all
from refllm.check.runs import changes_on_the_way
from refllm.check.taps import ALWAYS
from refllm.commands import cli
from refllm.errors import InputError
from refllm.precision import FUSED, rounding
from refllm.strategies import small_models
from refllm.strategies.models import WholeInput, whole_inputs

VOCAB = 97
IDS = np.random.default_rng(3).integers(4, 40, (1, 40))
LAST = "lm_head"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose embedding and head are two tables, of which the text above reads less than half."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=False)
    model.save_pretrained(folder, dtype="float32")
    return folder


@cache
def loaded(folder: str, dtype: str = "float32") -> Any:
    return refllm.load(folder, dtype=dtype, policy=None if dtype == "float32" else "fused")


class Shown:
    """A recorder that shows all values to a tap, or those that end in one of some names."""

    def __init__(self, tap: Callable[..., Any], *names: str) -> None:
        self.tap, self.names = tap, names

    def wants(self, name: str) -> bool:
        return name != LAST and (not self.names or name.endswith(self.names))

    def record(self, name: str, value: np.ndarray) -> None:
        self.tap(name, value)


Given = dict[str, Any]


def plain(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
    """A right port that computes in float32, shows everything and takes neither a dtype nor a cache."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return loaded(checkpoint)(**given, recorder=Shown(tap)).logits


def cached(
    checkpoint: str,
    ids: Any,
    mask: Any,
    positions: Any,
    tap: Any,
    dtype: str = "",
    cache: Any = None,
    *,
    plant: Callable[[Given], Given] = lambda given: given,
) -> Any:
    """A right port that takes both, or one that computes with what `plant` makes of what it was given."""
    model = loaded(checkpoint, dtype)
    store = model.new_cache() if cache is None else cache
    given = plant({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return model(**given, past_key_values=store, use_cache=True, recorder=Shown(tap)).logits, store


def verdicts(reports: list[Report]) -> dict[str, str]:
    return {report.inputs: report.verdict for report in reports}


PLAIN = ("tokens", "far positions")
CACHED = ("cached decode", "padding with a cache")


# -- what a function is given ------------------------------------------------------------------------------------------


def test_a_function_that_takes_dtype_and_cache_is_given_them_and_runs_all_that_a_function_can(folder: Path) -> None:
    told = []

    def forward(*given: Any, dtype: str, cache: Any) -> Any:
        told.append((dtype, cache, given[1].shape, given[2].shape))
        logits, store = cached(*given, dtype=dtype, cache=cache)
        return logits, {"of": store, "call": len(told)}

    def unwrapped(*given: Any, dtype: str, cache: Any) -> Any:
        return forward(*given, dtype=dtype, cache=None if cache is None else cache["of"])

    reports = compare(folder, unwrapped, input_ids=IDS, dtype="bfloat16", stress=True)
    assert verdicts(reports) == dict.fromkeys((*PLAIN, "rows padded differently", *CACHED), "holds")
    assert [dtype for dtype, *_ in told] == ["bfloat16"] * len(told)
    pieces = [(shape[1], keys[1]) for _, cache, shape, keys in told if cache is not None]
    assert {1, 3, 5} <= {new for new, _ in pieces}  # one and several tokens after history
    assert all(keys > new for new, keys in pieces)
    assert reports[0].notes[0].startswith("not run: small embeddings (it takes no embeddings), large embeddings (")
    assert "cache" not in reports[0].notes[0]


def test_what_a_function_cannot_do_is_skipped_and_named(folder: Path) -> None:
    reports = compare(folder, plain, input_ids=IDS, stress=True)
    assert verdicts(reports) == dict.fromkeys((*PLAIN, "rows padded differently"), "holds")
    assert "cached decode (it takes no cache), padding with a cache (it takes no cache)" in reports[0].notes[0]


def test_arguments_given_by_place_are_no_dtype_and_no_cache() -> None:
    def by_place(cache: Any, dtype: Any, mask: Any, positions: Any, tap: Any) -> None: ...

    def anything(*given: Any, **more: Any) -> None: ...

    def named(*given: Any, dtype: str) -> None: ...

    def last(a: Any, b: Any, c: Any, d: Any, tap: Any, cache: Any = None) -> None: ...

    def embeds(*given: Any, inputs_embeds: Any = None) -> None: ...

    functions = (by_place, anything, named, last, embeds)
    takes = [FunctionCandidate(f, Path(), head="base", dtype="bf16").takes for f in functions]
    assert [set(t) - set(ALWAYS) for t in takes] == [set(), set(), {"dtype"}, {"cache"}, {"embeddings"}]
    assert all(set(ALWAYS) <= set(t) for t in takes)


@pytest.mark.parametrize("factor", [1, 10])
def test_a_wrong_eps_shows_in_small_embeddings_which_a_function_may_take(factor: int, tmp_path: Path) -> None:
    """1e-7 for 1e-8 changes no element of what has a scale of 1. The precision is found: the rows lie on its grid."""
    given: list[np.ndarray | None] = []
    for folder, eps in (("right", 1e-8), ("wrong", factor * 1e-8)):
        model = tiny_model("HeliumForCausalLM", vocab_size=VOCAB, rms_norm_eps=eps)
        model.save_pretrained(tmp_path / folder, dtype="float32")
    port = loaded(str(tmp_path / "wrong"), "bfloat16")

    def forward(_: str, ids: Any, mask: Any, positions: Any, tap: Any, *, inputs_embeds: Any) -> Any:
        given.append(inputs_embeds)
        fed = {"input_ids": ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return port(**fed, attention_mask=mask, position_ids=positions, recorder=Shown(tap)).logits

    reports = compare(tmp_path / "right", forward, input_ids=IDS[:, :12], stress=True)
    wrong = "small embeddings" if factor > 1 else None
    assert {name for name, verdict in verdicts(reports).items() if verdict == "fails"} == ({wrong} - {None})
    assert {"small embeddings", "large embeddings"} <= verdicts(reports).keys()
    assert [rows.shape for rows in given if rows is not None] == [(1, 12, port.config.hidden_size)] * 2
    assert all((rounding("bfloat16")(rows) == rows).all() for rows in given if rows is not None)
    if wrong is not None:
        first = next(report for report in reports if report.inputs == wrong).first_failure
        assert first is not None
        assert (first.name, first.named.partition(":")[0]) == (
            "model.layers.0.input_layernorm",
            "eps is 10 times what the config says",
        )


def test_a_wrong_name_and_a_wrong_shape_are_told_of_the_function_with_what_was_meant(folder: Path) -> None:
    def misnamed(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        return plain(checkpoint, ids, mask, positions, lambda name, value: tap(name.replace("self_", ""), value))

    with pytest.raises(InputError, match=r"^misnamed: .*layers.0.attn.q_proj.*mean 'model.layers.0.self_attn.q_proj'"):
        compare(folder, misnamed, input_ids=IDS)
    short = lambda *given: plain(*given)[:, 1:]  # noqa: E731
    with pytest.raises(InputError, match=r"^<lambda>: lm_head has shape \[1, 39, 97\], expected \[1, 40, 97\]"):
        compare(folder, short, input_ids=IDS)


def test_a_cache_that_is_not_returned_is_a_finding(folder: Path) -> None:
    def forgets(*given: Any, cache: Any = None) -> Any:
        return plain(*given)

    reports = compare(folder, forgets, input_ids=IDS, stress=True)
    found = next(report for report in reports if report.inputs == "cached decode").misbehaviour
    assert found is not None
    assert found.text == "it takes a cache and returns none; expected (logits, cache)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_of_a_function_is_found_in_what_it_shows(dtype: str, folder: Path) -> None:
    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        return loaded(checkpoint, dtype)(input_ids=ids, recorder=Shown(tap)).logits

    (report,) = compare(folder, forward, input_ids=IDS)
    assert (report.dtype, report.verdict) == (dtype, "holds")
    assert report.notes == [f"judged as {dtype}, since what it shows is that; --dtype says another"]
    other = "float16" if dtype == "bfloat16" else "bfloat16"
    report = compare(folder, forward, input_ids=IDS, dtype=other)[0]
    assert (report.dtype, report.verdict) == (other, "fails")
    assert report.notes == [f"it takes no dtype, and what it shows is {dtype}: judged as {other}, as --dtype says"]


def test_the_command_judges_a_function_in_its_own_precision_or_in_those_that_it_is_told(folder: Path) -> None:
    tokens = {"prompt": None, "ids": ",".join(map(str, IDS[0])), "ids_file": None}
    for name, dtypes in (("plain", ["float32"]), ("cached", ["float32", "bfloat16"])):
        settings = Settings(f"{__name__}:{name}", isolate=False, tokens=tokens, policy="fused")
        reports = list(check_all([folder], settings))
        assert [report.dtype for report in reports] == dtypes
        assert {report.verdict for report in reports} == {"holds"}


# -- what it returns ---------------------------------------------------------------------------------------------------


class ByDlpack:
    """An array that offers DLPack alone."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **how: Any) -> Any:
        return self._tensor.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


class ByBuffer(array):
    """As arrays of MLX are: NumPy reads neither `__array__` nor DLPack of them in bfloat16, but they have bytes."""

    dtype = "mlx.core.bfloat16"

    def __array__(self, *_: Any, **how: Any) -> Any:
        raise ValueError("'bfloat16' is not a valid PEP 3118 buffer format string")


def of_every_kind(values: np.ndarray) -> dict[str, Any]:
    tensor = torch.from_numpy(values)
    return {
        "array": values,
        "float64": values.astype(np.float64),
        "ml_dtypes": values.astype(ml_dtypes.bfloat16),
        "torch": tensor.clone().requires_grad_(),
        "torch bfloat16": tensor.bfloat16(),
        "DLPack": ByDlpack(tensor),
        "DLPack bfloat16": ByDlpack(tensor.bfloat16()),
        "bytes": ByBuffer("H", values.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()),
        "a layer's tuple": (tensor, None),
    }


@pytest.mark.parametrize("kind", of_every_kind(np.ones(1, np.float32)))
def test_arrays_of_every_kind_are_read(kind: str) -> None:
    values = np.array([1.0, -2.5, 0.375], np.float32)  # the same in bfloat16
    read = floats("x", of_every_kind(values)[kind])
    assert read.dtype == (np.float64 if kind == "float64" else np.float32)
    assert np.array_equal(read, values)
    assert not np.shares_memory(read, values)


RETURNED: dict[str, Callable[[np.ndarray], Any]] = {
    "logits": lambda y: y,
    "a tuple": lambda y: (y, "whatever", 3),
    "an output object": lambda y: SimpleNamespace(logits=torch.from_numpy(y), loss=None),
    "a mapping": lambda y: {"logits": y},
}


@pytest.mark.parametrize("what", RETURNED)
def test_the_logits_are_found_in_what_is_returned(what: str, folder: Path) -> None:
    (report,) = compare(folder, lambda *given: RETURNED[what](plain(*given)), input_ids=IDS)
    assert (report.verdict, report.taps[-1].name) == ("holds", LAST)


def test_logits_that_are_named_and_returned_are_one_value(folder: Path) -> None:
    def both(*given: Any, factor: int = 1) -> Any:
        return factor * given[-1](LAST, plain(*given))

    assert compare(folder, both, input_ids=IDS)[0].verdict == "holds"
    found = compare(folder, partial(both, factor=2), input_ids=IDS)[0].misbehaviour
    assert found is not None
    assert found.text == "lm_head is named as one value and returned as another"


@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering"])
def test_the_results_of_other_heads_are_taken_as_transformers_returns_them(head: str, tmp_path: Path) -> None:
    tiny_model(f"Llama{head}", vocab_size=VOCAB).save_pretrained(tmp_path, dtype="float32")

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        inner = Shown(tap, "embed_tokens", "layers.0", "layers.1")
        return refllm.load(checkpoint, dtype="float32")(input_ids=ids, recorder=inner)

    (report,) = compare(tmp_path, forward, input_ids=IDS)
    assert report.verdict == "holds"
    assert report.taps[-1].name == {"Model": "model.norm", "ForQuestionAnswering": "qa_outputs"}[head]


# -- masks and positions -----------------------------------------------------------------------------------------------

MASK = np.ones((2, 20), int)
MASK[0, :3] = MASK[1, :9] = 0


def ignores_the_mask(*given: Any) -> Any:
    return plain(given[0], given[1], np.ones_like(given[2]), *given[3:])


def ignores_positions(*given: Any) -> Any:
    return plain(*given[:3], np.arange(given[1].shape[1])[None].repeat(len(given[1]), 0), given[4])


@pytest.mark.parametrize(("port", "place"), [(ignores_the_mask, "probs"), (ignores_positions, "q_rope")])
def test_masks_and_positions_are_given_and_judged(port: Any, place: str, folder: Path) -> None:
    given = {"input_ids": IDS.reshape(2, 20), "attention_mask": MASK, "position_ids": np.maximum(MASK.cumsum(1) - 1, 0)}
    assert_matches(folder, plain, **given)
    with pytest.raises(AssertionError, match=f"first failure: model.layers.0.self_attn.{place}"):
        assert_matches(folder, port, **given)


# -- faults that plain inputs hide -------------------------------------------------------------------------------------


def mask_ignored(given: Given) -> Given:
    return {**given, "attention_mask": np.ones_like(given["attention_mask"])}


def padding_of_row_0_for_all(given: Given) -> Given:
    mask = given["attention_mask"]
    return {**given, "attention_mask": np.broadcast_to(mask[:1], mask.shape)}


def padding_counted_in_all_rows_alike(given: Given) -> Given:
    """Every row is taken to begin where the most padded one does."""
    mask = given["attention_mask"]
    return {**given, "attention_mask": np.broadcast_to(mask.min(axis=0), mask.shape)}


def triangle(given: Given, diagonal: int) -> Given:
    """A mask [B, 1, S, T] that is a triangle, as if there were no history; or shifted by some keys."""
    keys, S = given["attention_mask"], given["input_ids"].shape[1]
    seen = np.tri(S, keys.shape[1], diagonal, dtype=bool)[None, None] & (keys[:, None, None, :] != 0)
    return {**given, "attention_mask": seen}


def triangle_from_the_first_key(given: Given) -> Given:
    return triangle(given, 0) if given["input_ids"].shape[1] > 1 else given


def everything_seen_after_history(given: Given) -> Given:
    """Whoever masks a prompt only: a piece of several tokens sees its own future."""
    S, T = given["input_ids"].shape[1], given["attention_mask"].shape[1]
    return triangle(given, T) if 1 < S < T else given


def history_forgotten_by_one_key(given: Given) -> Given:
    S, T = given["input_ids"].shape[1], given["attention_mask"].shape[1]
    return triangle(given, T - S - 1) if S < T and S == 1 else given


def positions_from_0_in_every_piece(given: Given) -> Given:
    B, S = given["input_ids"].shape
    return {**given, "position_ids": np.broadcast_to(np.arange(S), (B, S))}


def positions_of_row_0_for_all(given: Given) -> Given:
    return {**given, "position_ids": np.broadcast_to(given["position_ids"][:1], given["position_ids"].shape)}


def padding_forgotten_after_the_prompt(given: Given) -> Given:
    S, T = given["input_ids"].shape[1], given["attention_mask"].shape[1]
    return mask_ignored(given) if S < T else given


FAULTS: dict[Callable[[Given], Given], tuple[str, str]] = {
    mask_ignored: ("rows padded differently", "probs"),
    padding_of_row_0_for_all: ("rows padded differently", "probs"),
    padding_counted_in_all_rows_alike: ("rows padded differently", "probs"),
    triangle_from_the_first_key: ("cached decode", "context"),
    everything_seen_after_history: ("cached decode", "context"),
    history_forgotten_by_one_key: ("cached decode", "context"),
    positions_from_0_in_every_piece: ("far positions", "q_rope"),
    positions_of_row_0_for_all: ("rows padded differently", "q_rope"),
    padding_forgotten_after_the_prompt: ("padding with a cache", "context"),
}


STRESSED = {inputs.label: inputs for inputs in (Inputs(IDS), *stressed(IDS))}


def judged(folder: Path, plant: Callable[[Given], Given], label: str, shown: bool = True) -> Report:
    """The report on one input. shown: all values, or logits alone."""

    def forward(*given: Any, dtype: str, cache: Any) -> Any:
        tap = given[4] if shown else lambda name, value: value
        return cached(*given[:4], tap, dtype, cache, plant=plant)

    port = FunctionCandidate(forward, folder, head="causal_lm", dtype="float32")
    model = loaded(str(folder))
    return judge(model, record(port, model, STRESSED[label]), FUSED)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_that_plain_inputs_hide_is_found_under_stress(plant: Any, folder: Path) -> None:
    where, place = FAULTS[plant]
    assert judged(folder, plant, "tokens").verdict == "holds"
    found = judged(folder, plant, where).first_failure
    assert found is not None
    assert found.name == f"model.layers.0.self_attn.{place}"
    if place != "q_rope":  # logits hardly know where a sequence begins: rotation is relative
        assert judged(folder, plant, where, shown=False).verdict == "fails"


def test_no_stressed_input_is_called_wrong_by_its_logits(folder: Path) -> None:
    for label in ("rows padded differently", *CACHED):
        assert judged(folder, lambda given: given, label, shown=False).verdict == "holds"


def test_inputs_under_stress_are_what_they_are_called() -> None:
    by_label = {inputs.label: inputs for inputs in stressed(IDS)}
    rows = by_label["rows padded differently"]
    assert len({tuple(row) for row in rows.mask}) == len(rows.mask) == 4
    alone = np.flatnonzero(rows.valid.all(axis=1))
    assert np.array_equal(rows.input_ids[alone], IDS[:, : rows.input_ids.shape[1]])  # alone in the plain run
    for positions, valid in zip(rows.positions, rows.valid, strict=True):
        assert positions[valid].tolist() == list(range(valid.sum()))
    for label in CACHED:
        assert {1, 3} <= set(by_label[label].chunks[1:])
    for shape in ((1, 1), (1, 2), (1, 5), (3, 300)):
        assert all(inputs.valid.any(axis=1).all() for inputs in stressed(np.ones(shape, int)))
    every = every_token(VOCAB, 40)
    assert every is not None
    assert set(every.input_ids.ravel().tolist()) == set(range(VOCAB))
    assert every_token(50_000, 40) is None


def test_pieces_are_not_run_where_the_length_of_a_call_changes_the_frequencies() -> None:
    """Of type dynamic: a call of 20 tokens has other frequencies than one of 40, and both are right."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    config = partial(tiny_config, "Llama", rope_parameters=rope)
    pieces = Inputs(IDS, chunks=(20, 20))
    said = "its rotary frequencies change with the length of a call"
    assert changes_on_the_way(config(max_position_embeddings=16), pieces) == said
    assert changes_on_the_way(config(max_position_embeddings=40), pieces) == ""
    assert changes_on_the_way(config(max_position_embeddings=16), Inputs(IDS)) == ""


@given(whole_inputs())
@settings(max_examples=10)
def test_a_right_run_is_never_called_wrong_whatever_mask_positions_and_pieces(drawn: WholeInput) -> None:
    """Holes in the mask, packed sequences, positions in any order, all families, and a cache in any pieces."""
    chunks = tuple(piece.stop - piece.start for piece in drawn.pieces)
    inputs = Inputs(drawn.ids, drawn.attention_mask, drawn.position_ids, chunks if len(chunks) > 1 else ())
    assume(inputs.valid.any() and not changes_on_the_way(drawn.config, inputs))
    model = small_models.build(small_models.model_class(drawn.config.model_type), drawn.config, 7, "bfloat16", "fused")
    assert judge(model, record(ReferenceCandidate(model), model, inputs), FUSED).verdict != "fails"


# -- rows of the embedding ---------------------------------------------------------------------------------------------


def with_rows_replaced(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any, *names: str) -> Any:
    """The last 20 rows of the embedding are those before them."""
    taken = np.where(ids >= VOCAB - 20, ids - 20, ids)
    given = {"input_ids": taken, "attention_mask": mask, "position_ids": positions}
    return loaded(checkpoint)(**given, recorder=Shown(tap, *names)).logits


def test_rows_of_the_embedding_that_the_text_does_not_read_are_read(folder: Path) -> None:
    plain_run, rows = compare(folder, with_rows_replaced, input_ids=IDS)
    assert plain_run.verdict == "holds"
    assert (rows.inputs, rows.verdict) == ("every token id", "fails")
    assert rows.first_failure is not None
    assert rows.first_failure.name == "model.embed_tokens"
    assert "20 of 97 rows of the embedding are not those of the checkpoint: ids 77 to 96" in rows.notes
    with pytest.raises(AssertionError, match="ids 77 to 96"):
        assert_matches(folder, with_rows_replaced, input_ids=IDS)


def test_reading_every_row_costs_no_forward_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "_AT_ONCE", 16 * 40)  # one row of ids at a time
    shown: list[list[str]] = []

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        shown.append([])

        def noting(name: str, value: Any) -> Any:
            shown[-1].append(name)
            return tap(name, value)

        return with_rows_replaced(checkpoint, ids, mask, positions, noting)

    assert [report.verdict for report in compare(folder, forward, input_ids=IDS)] == ["holds", "fails"]
    assert len(shown) == 1 + 2  # 97 - 29 or so ids in rows of 40
    assert {tuple(names) for names in shown[1:]} == {("model.embed_tokens",)}


def test_an_embedding_that_is_not_shown_is_incomplete_and_under_stress_every_token_runs(folder: Path) -> None:
    def forward(*given: Any) -> Any:
        return with_rows_replaced(*given, "layers.0", "layers.1")

    (report,) = compare(folder, forward, input_ids=IDS)
    assert report.verdict == "incomplete"
    unread = VOCAB - len(set(IDS.ravel().tolist()))
    assert report.unseen == [
        f"{unread} of 97 rows of the embedding were never read: it does not show model.embed_tokens; show it, or "
        "stress its inputs"
    ]
    reports = compare(folder, forward, input_ids=IDS, stress=True)
    assert reports[0].verdict == "holds"
    assert (reports[-1].inputs, reports[-1].verdict) == ("every token id", "fails")


def test_a_batch_that_it_cannot_run_leaves_rows_unread_and_says_why(folder: Path) -> None:
    def forward(*given: Any) -> Any:
        if len(given[1]) > 1:
            raise ValueError("one sequence only")
        return plain(*given)

    (report,) = compare(folder, forward, input_ids=IDS[:, :8])
    assert report.verdict == "incomplete"
    said = (
        "of 97 rows of the embedding were never read: given 8 x 8 ids, it raises ValueError: one sequence only (test_"
    )
    assert said in report.unseen[0]


def test_who_computes_everything_before_showing_anything_is_not_asked_for_many_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unseen, "ALL_AT_MOST", 40)
    calls = []

    def forward(*given: Any) -> Any:
        calls.append(given[1].shape)
        values: dict[str, Any] = {}
        logits = plain(*given[:-1], values.__setitem__)
        time.sleep(0.1)
        for name, value in values.items():
            given[-1](name, value)
        return logits

    (report,) = compare(folder, forward, input_ids=IDS[:, :8])
    assert calls == [(1, 8), (1, 8)]
    assert report.unseen[0].endswith("were never read: it computes everything before it shows model.embed_tokens")


def test_what_an_embedding_holds_at_padding_is_not_compared(folder: Path) -> None:
    def forward(*given: Any) -> Any:
        def tap(name: str, value: Any) -> Any:
            return given[-1](name, value * given[2][..., None] if name == "model.embed_tokens" else value)

        return plain(*given[:-1], tap)

    assert_matches(folder, forward, input_ids=IDS.reshape(2, 20), attention_mask=MASK)


# -- what was not seen is no pass --------------------------------------------------------------------------------------


def without_a_head(*given: Any) -> None:
    plain(*given)


def test_a_head_that_is_not_shown_is_incomplete_in_one_sentence_everywhere(folder: Path) -> None:
    (report,) = reports = compare(folder, without_a_head, input_ids=IDS)
    assert {tap.verdict for tap in report.taps} == {"holds"}
    sentence = "lm_head was never shown, so that nothing after model.norm was judged"
    assert (report.verdict, report.unseen) == ("incomplete", [sentence])
    assert (report.to_dict()["verdict"], report.to_dict()["unseen"]) == ("incomplete", [sentence])
    console = Console(width=110)
    with console.capture() as captured:
        console.print(show_report(report), show_summary(reports), closing_line(reports))
    text = captured.get()
    assert re.search(rf"not seen +{sentence}", text)
    assert "incomplete: lm_head was never shown" in text
    assert "1 checked: 1 incomplete" in text
    with pytest.raises(AssertionError, match=sentence):
        assert_matches(folder, without_a_head, input_ids=IDS)


def test_incomplete_is_exit_code_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def forward(checkpoint, ids, mask, positions, tap):\n"
        "    import refllm\n"
        "    tap('model.embed_tokens', refllm.load(checkpoint).weights.rows('embed_tokens.weight', ids))\n"
    )
    words = f"refllm check {folder} --candidate {tmp_path / 'mine.py'}:forward --ids 5,6,7,8 --html {tmp_path / 'h'}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (1, "")
    assert "lm_head was never shown, so that nothing after model.embed_tokens was judged" in shown.out
    page = (tmp_path / "h").read_text()
    assert "not seen: lm_head was never shown" in page
    assert '<span class="badge incomplete">incomplete</span>' in page


def test_what_cancels_in_float32_is_not_asked_for_its_bits() -> None:
    """1 + erf of what is near -1 leaves little, which float32 knows to a part in ten: no rounding too many."""
    config = small_models.model_class("helium").config_class(
        vocab_size=8, hidden_size=2, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, hidden_act="laplace", head_dim=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 1.5},
    )  # fmt: skip
    model = small_models.build(small_models.model_class("helium"), config, 7, "bfloat16", "fused")
    inputs = Inputs(np.array([[5, 6], [0, 6], [3, 4]]))
    trace = record(ReferenceCandidate(model), model, inputs)
    assert judge(model, trace, FUSED).verdict != "fails"
    act = trace.taps["model.layers.0.mlp.act"]
    trace.taps["model.layers.0.mlp.act"] = np.where(np.abs(act) > 1e-3, act * np.float32(1 + 2**-7), act)
    assert judge(model, trace, FUSED).verdict == "fails"
