"""The catalogue of mutants: plants change one layer, leave no trace, and are named; what is equivalent is shown to be.

The whole table is made by `python -m refllm.mutants.validation`; every kind, once, is planted and named here.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from refllm import golden
from refllm.check.inputs import Inputs
from refllm.check.oracle import judge
from refllm.config import AutoConfig
from refllm.mutants import validation_page
from refllm.mutants.idle import idle
from refllm.mutants.models import Mutant, catalogue
from refllm.mutants.profiles import MISTAKES, PROFILES, Planted, planted_runs
from refllm.mutants.runs import Outcome, Run
from refllm.mutants.validation import Case, Pair, Validation, sharpness
from refllm.mutants.validation_page import TRAINED, calibration_rows, joined, page
from refllm.text.tokenizer import AutoTokenizer

CHECKPOINTS = {name: Path(path) for name, path in golden.checkpoints().items()}
CASES = [
    pytest.param(name, mutant, id=f"{name}-{mutant.name}")
    for name, folder in CHECKPOINTS.items()
    for mutant in catalogue()
    if mutant.applies(AutoConfig.from_pretrained(folder))
]


@functools.cache
def opened(name: str, dtype: str, attention: str) -> Pair:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Pair(CHECKPOINTS[name], dtype, attention)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids), use_cache=False).logits.float().numpy()


def state(model: Any) -> dict[str, Any]:
    """Everything of the modules that a plant may touch."""
    return {
        path: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize(("name", "mutant"), CASES)
def test_a_plant_is_taken_out_again_bit_for_bit(name: str, mutant: Mutant) -> None:
    model = opened(name, mutant.dtype, mutant.attention).candidate.model
    ids = np.random.default_rng(0).integers(0, 600, (1, 37))
    before, shape = logits(model, ids), state(model)
    with mutant.planted(model, 1):
        planted = logits(model, ids)
    np.testing.assert_array_equal(logits(model, ids), before)
    assert state(model) == shape
    if mutant.place:
        with mutant.everywhere(model):
            assert not np.array_equal(logits(model, ids), before)
        np.testing.assert_array_equal(logits(model, ids), before)
        assert state(model) == shape
    if not mutant.equivalent and mutant.name not in ("cache written before rotation", "wrong eps"):
        assert not np.array_equal(planted, before)


@pytest.mark.parametrize(
    "mutant",
    [m for m in catalogue() if m.name in ("sign of sin", "scale missing", "layer skipped")],
    ids=lambda mutant: mutant.name,
)
def test_a_plant_is_taken_out_after_an_error_too(mutant: Mutant) -> None:
    model = opened("llama-tiny", "bfloat16", "eager").candidate.model
    ids = np.random.default_rng(0).integers(0, 600, (1, 9))
    before, shape = logits(model, ids), state(model)
    with pytest.raises(ZeroDivisionError), mutant.planted(model, 1):
        raise ZeroDivisionError
    np.testing.assert_array_equal(logits(model, ids), before)
    assert state(model) == shape


@pytest.mark.parametrize("mutant", [m for m in catalogue() if m.equivalent], ids=lambda mutant: mutant.name)
def test_an_equivalent_mutant_leaves_the_logits_within_their_error(mutant: Mutant) -> None:
    (case,) = sharpness({"llama-tiny": CHECKPOINTS["llama-tiny"]}, [mutant])
    assert case.result_holds


def test_names_are_unique_and_expected_values_exist() -> None:
    names = [mutant.name for mutant in catalogue()]
    assert len(set(names)) == len(names) > 40
    for name in CHECKPOINTS:
        pair = opened(name, "bfloat16", "eager")
        known = {tap.name for tap in pair.check(Inputs(pair.tokens(0, length=9))).taps}
        for mutant in catalogue():
            if mutant.applies(pair.model.config):
                assert known & set(mutant.reported_at(1)), (name, mutant.name)


def one_of_each_area(name: str) -> list[Mutant]:
    """The first kind of each area that this checkpoint can have, in bfloat16 and with eager attention."""
    config, found = AutoConfig.from_pretrained(CHECKPOINTS[name]), dict[str, Mutant]()
    for mutant in catalogue():
        if mutant.applies(config) and mutant.dtype == "bfloat16" and mutant.attention == "eager":
            found.setdefault(mutant.area, mutant)
    return list(found.values())


def share(name: str) -> list[Mutant]:
    """The kinds of bugs that are planted in this checkpoint here: those of its turn among the checkpoints that can have
    them, and one of each area besides. All plants are those of `python -m refllm.mutants.validation`."""
    configs = {other: AutoConfig.from_pretrained(folder) for other, folder in CHECKPOINTS.items()}
    mine = one_of_each_area(name)
    for turn, mutant in enumerate(m for m in catalogue() if m.kind == "defect"):
        hosts = [other for other, config in configs.items() if mutant.applies(config)]
        if hosts[turn % len(hosts)] == name and mutant not in mine:
            mine.append(mutant)
    return mine


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_kind_is_named_somewhere_and_every_area_in_every_family(name: str) -> None:
    """By the command's own code, layer and operator: one of each area with plain inputs, the others with stressed ones
    at the latest."""
    cases = sharpness({name: CHECKPOINTS[name]}, share(name), by_policy=False)
    assert [(case.mutant, case.plain.reported) for case in cases if not case.found] == []
    plain = {mutant.name for mutant in one_of_each_area(name)}
    assert len(plain) == 6
    assert [case.plain.reported for case in cases if case.mutant in plain and not case.plain.right] == []


def test_every_kind_has_its_turn() -> None:
    planted = {mutant.name for name in CHECKPOINTS for mutant in share(name)}
    assert planted == {mutant.name for mutant in catalogue() if mutant.kind == "defect"}


PLACES = [mutant for mutant in catalogue() if mutant.place]


@pytest.mark.parametrize("mutant", PLACES, ids=lambda mutant: mutant.name)
def test_a_place_holds_and_is_said_and_is_a_finding_where_a_policy_is_named(mutant: Mutant) -> None:
    hosts = ("llama-tiny", "stablelm-tiny-sequential")
    host = next(name for name in hosts if mutant.applies(AutoConfig.from_pretrained(CHECKPOINTS[name])))
    (case,) = sharpness({host: CHECKPOINTS[host]}, [mutant])
    assert (case.kind, case.plain.reported, case.plain.right) == ("place", "", True)
    assert case.plain.said
    assert (case.named.reported in mutant.reported_at(0), case.named.cause) == (True, "place")
    assert case.plain.said[0] not in said_without_a_plant(host, mutant.dtype, mutant.attention)


@functools.cache
def said_without_a_plant(name: str, dtype: str, attention: str) -> list[str]:
    """The lines on where the Transformers model rounds."""
    pair = opened(name, dtype, attention)
    return [str(habit) for habit in judge(pair.model, pair.trace(Inputs(pair.tokens(0)))).habits]


def test_a_mistake_on_top_of_a_profile_is_named() -> None:
    (case,) = planted_runs("llama-tiny", CHECKPOINTS["llama-tiny"], "bfloat16", every=1000)
    assert (case.mistake, case.profile, case.stressed) == (next(iter(MISTAKES)), next(iter(PROFILES)), None)
    assert (case.plain.right, case.plain.cause) == (True, "defect")


def test_stressed_inputs_show_what_plain_ones_cannot() -> None:
    mutant = next(m for m in catalogue() if m.name == "cache written before rotation")
    (case,) = sharpness({"helium-tiny": CHECKPOINTS["helium-tiny"]}, [mutant])
    assert case.plain.reported == ""
    assert case.stressed is not None
    assert case.stressed.right
    assert case.stressed.inputs == "cached decode"


def test_the_page_states_what_was_measured() -> None:
    mutant = next(m for m in catalogue() if m.name == "sign of sin")
    cases = sharpness({"llama-tiny": CHECKPOINTS["llama-tiny"]}, [mutant])
    runs = [
        Run("llama-tiny", "bfloat16", "eager", "tokens", 1, 0, "holds", "", {"lm_head": (1.0, 0.9)}),
        Run("llama-tiny", "bfloat16", "eager", "tokens", 1, 1, "fails", "lm_head: error", {"lm_head": (3.0, 0.9)}),
    ]
    lost = Outcome("", False, False, [], "tokens")
    planted = [
        Planted("eps times 10", "sdpa", "llama-tiny", "bfloat16", lost),
        Planted("eps times 10", "sdpa", "llama-tiny", "bfloat16", lost, cases[0].plain),
    ]
    ports = [replace(runs[0], attention="sdpa", elsewhere=True), replace(runs[1], attention="sdpa")]
    found = Validation(cases, [], runs, 1.0, {"torch": "2"}, ports, planted)
    assert not found.holds
    text = page(found)
    assert "1 of 1 found in the right operator" in text
    assert "2 runs, 1 of them reported" in text
    assert "2 runs, 1 of them elsewhere, 1 reported" in text
    assert "| eps times 10 | 0 of 2 (0.0 %) | 1 of 1 (100.0 %) |" in text
    assert "nothing reported; not named at all" in text
    assert "| false alarms | 0 | 2 |" in text
    assert "lm_head, bfloat16, end to end: 1 of 2 values, 1.00 to 3.00" in text
    json.dumps(found.to_dict())
    assert {row["operator"] for row in calibration_rows(runs)} == {"lm_head", "all"}


def test_each_half_of_the_page_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_page, "_idle", lambda: ["(idle)"])
    mutant = next(m for m in catalogue() if m.name == "sign of sin")
    right = Outcome("x", True, True, [], "tokens")
    case = Case(
        "sign of sin", mutant.area, "", "llama-trained", 1, "bfloat16", "eager", ("x",), "", right, "defect", right
    )
    lost = replace(case, mutant="wrong eps", plain=replace(right, right=False, reported=""), stressed=right)
    designed = Validation([case], [], [], 1.0, {"torch": "2"}, asked={"seeds": 1})
    trained = replace(designed, cases=[case, lost], weights="trained", seconds=2.0)
    first, second = page(designed), page(trained)
    assert second.startswith(TRAINED)
    assert "--json docs/validation-trained.json --weights trained --seeds 1" in second
    assert "| defects in Transformers models, plain inputs | 95 % | 1 of 2 (50.0 %) |" in second
    assert "- wrong eps, llama-trained: reported at no value" in second
    assert "sign of sin" not in second
    both = joined(first, second)
    assert both == f"{first}\n{second}"
    assert joined(both, page(replace(trained, seconds=9.0))) == f"{first}\n{page(replace(trained, seconds=9.0))}"
    assert joined(both, page(replace(designed, seconds=9.0))) == f"{page(replace(designed, seconds=9.0))}\n{second}"
    assert joined("", second) == f"\n{second}"
    assert joined("", first) == first


def test_training_leaves_directions_idle_and_is_certain() -> None:
    designed, trained = (idle(golden.path(name)) for name in ("llama-tiny", "llama-trained"))
    assert designed.certain < 0.5 < 0.9 < trained.certain < 1
    assert trained.directions < 0.5 * designed.directions
    assert trained.weight > designed.weight
    assert 1 < designed.keys < 256


def test_a_trained_checkpoint_is_judged_on_words_that_it_knows() -> None:
    pair = Pair(golden.path("llama-trained"), "bfloat16", "eager")
    ids = pair.tokens(seed=3, batch=2, length=30)
    said = AutoTokenizer.from_pretrained(golden.path("llama-trained")).decode(ids[0][:10], skip_special_tokens=True)
    assert said.strip() in golden.corpus()
    report = pair.check(Inputs(ids))
    assert report.verdict == "holds"
    assert 0.6 < np.median([tap.isolated.ratio for tap in report.taps if tap.isolated]) < 1.3
