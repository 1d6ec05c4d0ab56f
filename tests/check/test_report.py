"""Reports of a check: complete, readable at their width, self-contained as a page, and true to what was planted."""

import json
import math
import re
import struct
import zlib
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from tiny import tiny_model

import refllm
from refllm import ops
from refllm.accuracy import limits
from refllm.check import charts, findings, formulas
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.error_map import LARGEST, column_edges, error_map, row_edges
from refllm.check.html import render, write_html
from refllm.check.inputs import Inputs
from refllm.check.next_tokens import Flip
from refllm.check.oracle import Report, judge
from refllm.check.report import WIDTH, closing_line, legend, show_report, show_summary
from refllm.check.trace import Trace
from refllm.forward.model import Model
from refllm.precision import POLICIES

LENGTH, HEADS, HEAD_DIM = 40, 4, 8
Defect = Callable[[Any], None]


def model_of(family: str, dtype: str) -> Model:
    changes: dict[str, Any] = {"hidden_size": HEADS * HEAD_DIM, "intermediate_size": 48, "vocab_size": 97}
    if family != "StableLm":
        changes["head_dim"] = HEAD_DIM
    return tiny_model(f"{family}ForCausalLM", dtype=dtype, policy="hf-eager", **changes)


def run(
    family: str = "Llama",
    *,
    dtype: str = "bfloat16",
    weights: Defect = lambda weights: None,
    trace: Defect = lambda trace: None,
    batch: int = 1,
    padding: int = 0,
) -> Report:
    """The reference in an emulated precision, with a defect in its weights or in what it recorded."""
    model, candidate = model_of(family, dtype), model_of(family, dtype)
    weights(candidate.weights)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, LENGTH))
    mask = np.ones(ids.shape, np.int64)
    mask[:, :padding] = 0
    inputs = Inputs(ids, mask, np.maximum(np.cumsum(mask, axis=-1) - 1, 0))
    recorded = record(ReferenceCandidate(candidate), model, inputs)
    trace(recorded)
    return judge(model, recorded, POLICIES["hf-eager"], checkpoint="tiny")


def scaled(name: str, factor: float, rows: slice = slice(None)) -> Defect:
    """A weight, or some rows of it, times a factor."""

    def plant(weights: Any) -> None:
        weights[name][rows] *= np.float32(factor)

    return plant


def put(name: str, index: tuple[int, ...], value: float) -> Defect:
    """One element of a recorded value."""

    def plant(trace: Trace) -> None:
        trace.taps[name][index] = value

    return plant


@cache
def holding() -> Report:
    return run()


@cache
def failing() -> Report:
    """Keys of head 1 of layer 1 are too large by a half."""
    return run(weights=scaled("layers.1.self_attn.k_proj.weight", 1.5, slice(HEAD_DIM, 2 * HEAD_DIM)))


DEFECT = "model.layers.1.self_attn.k_proj"


@cache
def with_nan() -> Report:
    return run(trace=put("lm_head", (0, 4, 5), math.nan))


@cache
def untested() -> Report:
    report = run()
    report.taps[3].untested = ["zeros", "times 1.01"]
    return report


@cache
def wrong_tokens() -> Report:
    """Values that all hold, and a next token that rounding does not explain."""
    report = run()
    assert report.next_tokens is not None
    flip = Flip(row=0, position=9, exact=4, candidate=7, margin=2.0, sigmas=math.inf)
    report.next_tokens = replace(report.next_tokens, flips=[flip])
    return report


@cache
def all_reports() -> list[Report]:
    return [holding(), failing(), with_nan(), untested(), wrong_tokens(), run("StableLm", dtype="float32", batch=2)]


def printed(item: RenderableType, width: int = WIDTH) -> str:
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(item)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def tap_names(text: str) -> list[str]:
    return re.findall(r"model\.layers\.\d+[\w.]*|lm_head", text)


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("family", ["Helium", "Llama", "StableLm", "Arcee"])
def test_every_tap_of_every_family_has_a_formula_and_a_convention(family: str) -> None:
    report = run(family)
    for tap in report.taps:
        formula = formulas.formula(tap.name, report.config)
        assert formula.text
        assert "\n" not in formula.text
        assert formula.convention
        assert formulas.formula(tap.name).operator in (formula.operator, "rms_norm", "glu")


OPERATORS = {
    "embed_tokens": "embedding",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"), "linear"),
    **dict.fromkeys(("q_rope", "k_rope"), "rope"),
    **dict.fromkeys(("scores", "probs", "context"), "attention"),
    **dict.fromkeys(("residual_mid", "0", "1"), "add"),
}
"""By the last part of a value's name; a norm and an activation are the family's own."""


@pytest.mark.parametrize("family", ["Helium", "Llama", "StableLm", "Arcee"])
def test_a_formula_has_the_operator_the_biases_and_the_sizes_of_its_model(family: str) -> None:
    model, report = model_of(family, "bfloat16"), run(family)
    config, norm = model.config, "layer_norm" if family == "StableLm" else "rms_norm"
    gated, eps = family != "Arcee", getattr(model.config, "rms_norm_eps", None) or model.config.layer_norm_eps
    activation = "glu" if gated else "activation"
    for name in [tap.name for tap in report.taps]:
        formula, last = formulas.formula(name, config), name.rpartition(".")[2]
        assert formula.operator == OPERATORS.get(last, activation if last == "act" else norm), name
        if formula.operator == "linear":
            assert (" + b" in formula.text) == (f"{name.removeprefix('model.')}.bias" in model.weights), name
        if formula.operator == norm:
            assert f" + {eps:g})" in formula.text, name
            read = [other for other in ("q_proj", "gate_proj", "up_proj") if f" {other}" in formula.convention]
            parallel = family == "StableLm"  # the tiny one
            first, second = ["q_proj"], ["gate_proj", "up_proj"] if gated else ["up_proj"]
            expected = {"input_layernorm": first + second * parallel, "post_attention_layernorm": second}
            assert read == expected.get(last, []), name
        if formula.operator == "rope":
            R = int(HEAD_DIM * (0.5 if family == "StableLm" else 1))
            assert f"R = {R} of D = {HEAD_DIM}: " in formula.convention
            assert ("every dim is rotated" in formula.convention) == (R == HEAD_DIM)
            assert ("(2i, 2i+1)" in formula.text) == (family == "Helium")
    (act,) = {formulas.formula(f"model.layers.{i}.mlp.act", config).text for i in range(2)}
    assert act == ("h = g / (1 + e^-g) * u" if gated else "h = max(u, 0)^2")


def test_source_of_a_formula_is_the_line_that_defines_its_operator() -> None:
    root = Path(refllm.__file__).parent.parent
    for tap in holding().taps:
        formula = formulas.formula(tap.name)
        file, line = formula.source.split(":")
        assert (root / file).read_text().splitlines()[int(line) - 1].startswith(f"def {formula.operator}(")


def test_formulas_tell_the_families_apart() -> None:
    texts = {
        family: [formulas.formula(f"model.layers.0.{name}", run(family).config).text for name in names]
        for family in ("Helium", "Llama", "StableLm", "Arcee")
        for names in [("input_layernorm", "self_attn.q_rope", "mlp.act")]
    }
    assert texts["Helium"][1] != texts["Llama"][1]
    assert "mean(x)" in texts["StableLm"][0]
    assert texts["Arcee"][2] == "h = max(u, 0)^2"


def test_rounding_points_are_those_of_the_policy_and_the_family() -> None:
    norm = formulas.formula("model.norm")
    assert norm.rounds_at("hf-eager", run("Llama").config) == ("rms_norm.normalized", "rms_norm")
    assert norm.rounds_at("hf-eager", run("Helium").config) == ("rms_norm",)
    assert norm.rounds_at("fused") == ("rms_norm",)


def test_unknown_tap_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        formulas.formula("model.layers.0.self_attn.nothing")


# ------------------------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("width", [WIDTH, 80])
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("index", range(6))
def test_terminal_report_fits_its_width_and_loses_nothing(index: int, verbose: bool, width: int) -> None:
    report = all_reports()[index]
    text = printed(show_report(report, verbose=verbose), width)
    assert max(map(len, text.splitlines())) <= width
    if verbose:
        assert len(re.findall(r" (?:holds|fails|untested) *$", text, re.MULTILINE)) >= len(report.taps)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text  # cells that were cut


@pytest.mark.parametrize("width", [WIDTH, 80, 60])
def test_summary_and_closing_line_fit_their_width(width: int) -> None:
    other = replace(holding(), checkpoint="stablelm-tiny-sequential", candidate="my.module:forward", dtype="float32")
    for reports in (all_reports(), [*all_reports(), other]):
        text = printed(show_summary(reports), width) + printed(closing_line(reports), width)
        assert max(map(len, text.splitlines())) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
    explained = printed(closing_line(all_reports()), width).splitlines()
    labels = [label for label, _ in legend()]
    # A line of it begins with its label, or goes on under what the label means: nothing comes back to the margin.
    start = max(map(len, labels)) + 2
    for line in [line for line in explained[1:-2] if line.strip()]:
        assert line[:start].strip() in ("", *labels)


def test_a_report_without_a_failure_has_a_line_per_layer() -> None:
    lines = printed(show_report(holding())).splitlines()
    assert sum(line.startswith("layer ") for line in lines) == 2
    assert len(lines) < 20


def test_verbose_report_has_a_line_per_tap() -> None:
    lines = printed(show_report(holding(), verbose=True)).splitlines()
    for tap in holding().taps:
        assert any(line.split()[:1] == [formulas.short(tap.name)] for line in lines), tap.name


def test_planted_defect_is_the_first_value_named_with_its_formula_and_source() -> None:
    text = printed(show_report(failing()))
    assert tap_names(text)[0] == DEFECT
    formula = formulas.formula(DEFECT, failing().config)
    assert formula.text in text
    assert formula.source in text


def test_values_before_the_defect_are_shown_innocent() -> None:
    text = " ".join(printed(show_report(failing())).replace("│", " ").split())
    innocent = re.search(r"innocent before it: (.*?) (?:also|consequences|╰)", text)
    assert innocent is not None
    assert re.findall(r"(\w+) \d", innocent[1]) == ["input_layernorm", "q_proj"]


def test_a_defect_in_one_head_is_said_to_be_there() -> None:
    first = failing().first_failure
    assert first is not None
    assert "only part of it is wrong: channels 8-15 of 16 (head 1)" in findings.hints(first, failing().config)


def test_a_common_factor_is_named() -> None:
    report = run(weights=scaled("layers.0.mlp.down_proj.weight", 1.1), dtype="float16")
    first = report.first_failure
    assert first is not None
    assert first.name == "model.layers.0.mlp.down_proj"
    factor = re.search(r"common factor of ([\d.]+) explains", " ".join(findings.hints(first)))
    assert factor is not None
    assert float(factor[1]) > 1.05


def test_nan_is_placed_by_its_position_in_the_padded_sequence() -> None:
    report = run(trace=put("lm_head", (0, 7, 5), math.nan), padding=3)
    assert "first at position 7, token id 5" in printed(show_report(report))


def test_batch_rows_are_named() -> None:
    report = run(trace=put("model.layers.1.self_attn.context", (1, 2, 20, 6), 1e4), batch=2)
    text = printed(show_report(report))
    assert tap_names(text)[0] == "model.layers.1.self_attn.context"
    assert "largest single error: sequence 1, position 20, head 2, channel 6" in text


def test_untested_values_are_named_with_what_would_pass() -> None:
    text = printed(show_report(untested()))
    assert untested().verdict == "incomplete"
    assert "k_proj of layer 0 (zeros, times 1.01 would hold)" in text


def test_flips_that_rounding_does_not_explain_are_listed() -> None:
    text = printed(show_report(wrong_tokens()))
    assert "first failure: next tokens" in text
    assert "position 9: token 4 became 7, margin inf sigma" in text


def test_an_error_that_no_operator_makes_alone_is_said_to_build_up() -> None:
    report = run()
    report.taps[10].end_to_end = replace(report.taps[10].end_to_end, ratio=1e3)
    assert (report.first_failure, report.taps[10].defect_here) == (report.taps[10], False)
    said = "no operator is wrong on its own inputs: the error is built up by the values before"
    for text in (printed(show_report(report)), render([report])):
        assert said in " ".join(text.split())
        assert "largest single error" not in text
        assert "consequences" not in text
    assert "end to end the error is 1000 sigma" in printed(show_report(report))
    assert said not in printed(show_report(failing()))


def test_of_many_flips_those_are_listed_that_are_farthest_from_being_explained() -> None:
    report, margins = run(), (7.0, 9.0, 8.0, 10.0, 6.0)
    assert report.next_tokens is not None
    flips = [Flip(row=0, position=i, exact=4, candidate=7, margin=2.0, sigmas=m) for i, m in enumerate(margins, 10)]
    report.next_tokens = replace(report.next_tokens, flips=flips)
    assert [flip.explained for flip in flips] == [False] * 5
    assert re.findall(r"position (\d+): token 4 became 7", printed(show_report(report))) == ["13", "11", "12"]


def test_summary_names_the_first_failure_and_what_was_not_seen() -> None:
    said = [printed(show_summary([report])) for report in (holding(), untested(), wrong_tokens(), failing())]
    assert said[0].split()[:4] == ["own", "end", "checkpoint", "dtype"]
    assert said[0].splitlines()[1].split() == ["checkpoint", "dtype", "input", "inputs", "to", "end", "flips"]
    assert re.search(r" 4/40 fails", " ".join(said[3].split()))
    ends = ("holds", "incomplete: 1 value untested", "fails: next tokens", "fails: layer 1 k_proj")
    for text, first in zip(said, ends, strict=True):
        assert text.splitlines()[-1].rstrip().endswith(first), text


def test_closing_line_counts_the_verdicts() -> None:
    said = printed(closing_line(all_reports()))
    assert "6 checked: 2 holds, 3 fails, 1 incomplete" in said
    assert "refllm learn term WORD" in said


def test_attribution_is_complete() -> None:
    report = holding()
    assert sum(findings.by_operator(report).values()) == pytest.approx(1)
    assert sum(sum(parts.values()) for parts in findings.by_layer(report).values()) == pytest.approx(1)
    assert list(findings.by_layer(report)) == [group.label for group in findings.groups(report)]


@given(st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf]))
def test_figures_are_short_and_true(value: float) -> None:
    text = findings.figure(value)
    assert len(text) <= 9
    if math.isnan(value):
        assert text == "nan"
    elif math.isinf(value):
        assert float(text) == value
    else:
        assert float(text) == pytest.approx(value, rel=0.06, abs=0.005)


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_reports_survive_json_with_infinities_as_strings() -> None:
    for report in all_reports():
        values = report.to_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
    flip = wrong_tokens().to_dict()["next_tokens"]["flips"][0]
    assert flip["sigmas"] == "inf"
    assert float(flip["sigmas"]) == math.inf


# ----------------------------------------------------------------------------------------------------------------- page

VOID = {"meta", "img", "br", "rect", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@cache
def page() -> tuple[str, Page]:
    text = render(all_reports(), {"command": "refllm check"})
    return text, Page(text)


def test_page_holds_every_tap_with_its_figures_formula_and_source() -> None:
    for report in (holding(), failing()):
        parsed = Page(render([report]))
        words = set(map(str.strip, parsed.text))
        for tap in report.taps:
            assert tap.name in words
            formula = formulas.formula(tap.name, report.config)
            assert {formula.text, formula.source, formula.convention} <= words
            for found in (tap.isolated, tap.end_to_end):
                assert found is not None
                assert {findings.figure(found.ratio), f"{found.rms_error:.3g}", f"{found.rms_sigma:.3g}"} <= words
            assert {f"{n:,}" for n in tap.ulps} <= words


def test_page_reports_verdict_first_failure_and_flips() -> None:
    text = " ".join(page()[1].text)
    assert "fails" in text
    assert DEFECT in text
    assert "NaN" in text
    assert "next tokens" in text


def test_page_needs_nothing_from_outside() -> None:
    text, parsed = page()
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    for tag, name, value in parsed.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_links_lead_to_places_on_the_page() -> None:
    parsed = page()[1]
    places = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(places) == len(set(places))
    assert {value[1:] for _, name, value in parsed.attributes if name == "href"} <= set(places)


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


def test_text_from_outside_is_escaped() -> None:
    report = replace(failing(), checkpoint=HOSTILE, candidate=HOSTILE, inputs=HOSTILE, notes=[HOSTILE], policy=HOSTILE)
    assert report.next_tokens is not None
    flip = Flip(0, 1, 2, 3, 1.0, 1.0)
    report.next_tokens = replace(report.next_tokens, flips=[flip])
    parsed = Page(render([report, report], {"prompt": HOSTILE, HOSTILE: 1}, lambda report, token: HOSTILE))
    assert "script" not in parsed.tags
    assert not any(name == "onerror" for _, name, _ in parsed.attributes)
    assert "".join(parsed.text).count(HOSTILE) >= 8


def test_page_is_written_as_one_file_in_utf8(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_html(file, [holding()], {"prompt": "\N{GREEK SMALL LETTER LAMDA}"})
    assert list(tmp_path.iterdir()) == [file]
    assert "\N{GREEK SMALL LETTER LAMDA}" in file.read_text(encoding="utf-8")


def test_a_report_of_logits_alone_is_shown_in_both_forms() -> None:
    def only_logits(trace: Trace) -> None:
        trace.taps = {"lm_head": trace.taps["lm_head"]}

    report = run(trace=only_logits)
    assert [tap.name for tap in report.taps] == ["lm_head"]
    assert "lm_head" in printed(show_report(report))
    Page(render([report]))


# --------------------------------------------------------------------------------------------------------------- charts


def test_marks_of_the_layer_chart_lie_inside_it() -> None:
    for report in all_reports():
        chart = charts.layer_chart(report)
        assert len(chart.slots) == len(report.taps)
        heights = [slot.dot for slot in chart.slots] + [slot.bar for slot in chart.slots if slot.bar is not None]
        heights += [y for y, _ in chart.ticks]
        assert all(0 <= y <= chart.bottom for y in heights)
        assert all(slot.x >= 0 and slot.x + slot.width <= charts.WIDTH for slot in chart.slots)


def test_failing_marks_of_the_layer_chart_are_the_failing_taps() -> None:
    chart = charts.layer_chart(failing())
    for slot, tap in zip(chart.slots, failing().taps, strict=True):
        assert slot.bar_fails == tap.defect_here
        assert slot.dot_fails == ("error end to end" in tap.broken)
    assert any(slot.bar_fails for slot in chart.slots)


@given(st.lists(st.floats(0, 1e30) | st.just(math.inf), min_size=1, max_size=6))
def test_scale_keeps_the_order_of_errors(values: list[float]) -> None:
    scale = charts.Scale.of(values)
    heights = [scale.y(value) for value in sorted(values)]
    assert heights == sorted(heights, reverse=True)


def test_columns_of_the_share_chart_add_up() -> None:
    chart = charts.share_chart(holding())
    assert chart is not None
    assert sum(column.share for column in chart.columns) == pytest.approx(1)
    for column in chart.columns:
        assert sum(share for *_, share in column.parts) == pytest.approx(column.share)
        assert all(0 <= y <= y + height <= chart.height for _, y, height, _ in column.parts)


@settings(max_examples=50)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 200), st.booleans(), st.data())
def test_error_map_is_small_and_shows_a_wrong_element_at_its_place(
    positions: int, heads: int, channels: int, split: bool, data: Any
) -> None:
    shape = (positions, heads, channels) if split else (positions, channels)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    exact = np.zeros(shape)
    candidate = exact.copy()
    candidate[at] = data.draw(st.sampled_from([3.0, math.nan, math.inf]))
    found = error_map(candidate, exact, np.ones(shape, np.float32))
    assert found is not None
    assert max(found.shape) <= LARGEST
    n, h, c = at if split else (at[0], 0, at[1])
    of_heads, of_channels = column_edges(heads if split else 1, channels)
    row = np.searchsorted(row_edges(positions), n, side="right") - 1
    column = np.searchsorted(of_heads, h, side="right") - 1
    column = column * (len(of_channels) - 1) + np.searchsorted(of_channels, c, side="right") - 1
    assert np.argwhere(found != 0).tolist() == [[row, column]]
    assert found.shape == (len(row_edges(positions)) - 1, (len(of_heads) - 1) * (len(of_channels) - 1))


def test_error_map_is_the_ratio_of_errors_over_the_whole_value() -> None:
    """Every block counts alike here, so that the mean of the squared map is the squared ratio."""
    for tap in holding().taps:
        assert tap.zmap is not None or tap.end_to_end.rms_sigma == 0
        if tap.zmap is not None and tap.isolated is not None and tap.name.endswith("_proj"):
            assert np.sqrt(np.mean(tap.zmap.astype(float) ** 2)) == pytest.approx(tap.isolated.ratio, rel=0.2)
    assert limits.ROW["bfloat16"] == 3  # the map's colours turn there


def test_picture_is_a_png_of_the_size_of_the_map() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4)).astype(np.uint8)
    data = b64decode(charts.png(pixels).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 5, 8, 6, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 29)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(rows[:, 1:].reshape(5, 7, 4), pixels)


def test_colours_turn_at_the_limit_and_mark_nan() -> None:
    below, above, nan = charts.colours(np.array([[2.9, 3.1, math.inf]]), 3.0)[0]
    assert below[2] > below[0]
    assert above[0] > above[2]
    assert nan.tolist() == [230, 0, 230, 255]


def test_every_operator_of_a_formula_exists() -> None:
    assert {formulas.operator(tap.name, r.config) for r in all_reports() for tap in r.taps} <= set(ops.__all__)
