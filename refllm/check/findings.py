"""What a report says, in words: the sentences that the terminal and the page share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.accuracy import limits, verdicts
from refllm.accuracy.measure import Measure
from refllm.accuracy.wrong_answers import NOT_FINITE
from refllm.check import formulas
from refllm.check.error_map import column_edges, row_edges
from refllm.check.gradient_formulas import is_gradient, of_tensor
from refllm.check.oracle import Report, TapReport
from refllm.config import ModelConfig
from refllm.precision import largest

_LAST_AXIS = {"lm_head": "token id", "score": "class", "qa_outputs": "output", "scores": "key", "probs": "key"}
_OF_TENSORS = ("row", "column")
_FAR = 5.0  # sigma: no rounding
_MOSTLY = 0.75  # of the squared error: from here on a common factor is worth naming
_CLEAR_BIAS = 5.0  # standard errors
_SQRT2 = (1.33, 1.5)
_RANGES = 3  # of what is wrong in so many places, none is worth naming


@dataclass(frozen=True)
class Group:
    """The taps of one layer, or one tap outside the layers; in order of computation."""

    label: str
    layer: int | None
    taps: list[TapReport]

    @property
    def verdict(self) -> verdicts.ValueVerdict:
        return verdicts.worst(tap.verdict for tap in self.taps)

    @property
    def worst_isolated(self) -> TapReport | None:
        """The tap closest to its limits, or furthest beyond them, on its own inputs."""
        return max((tap for tap in self.taps if tap.isolated), key=isolated_severity, default=None)

    @property
    def worst_end_to_end(self) -> TapReport:
        return max(self.taps, key=end_to_end_severity)


def groups(report: Report) -> list[Group]:
    """Layer by layer."""
    found: list[Group] = []
    for tap in report.taps:
        layer, suffix = formulas.split(tap.name)
        label = ("d " if is_gradient(tap.name) else "") + (suffix if layer is None else f"layer {layer}")
        if layer is None or not found or found[-1].label != label:
            found.append(Group(label, layer, []))
        found[-1].taps.append(tap)
    return found


def isolated_severity(tap: TapReport) -> float:
    """Error over limit by the rule that is worst; 0 without an isolated measure, infinite for a NaN."""
    found = tap.isolated
    if found is None:
        return 0.0
    if found.nonfinite:
        return math.inf
    return max(
        found.ratio / limits.isolated_limit(found, tap.dtype),
        found.row_ratio / limits.row_limit(found, tap.dtype),
        found.misrounded / limits.misrounded_limit(found.elements),
    )


def end_to_end_severity(tap: TapReport) -> float:
    """The same end to end."""
    found = tap.end_to_end
    return math.inf if found.nonfinite else found.ratio / limits.end_to_end_limit(found)


def severity(tap: TapReport) -> tuple[bool, float, float]:
    """The key that sorts taps, worst last: what fails on its own inputs is worse than what fails end to end only."""
    return tap.defect_here, isolated_severity(tap), end_to_end_severity(tap)


def figure(value: float) -> str:
    """A figure in sigma, to two decimals or three digits; infinities and NaN as such."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    if abs(value) < 1e4:
        return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(abs(value)))))}f}"
    return f"{value:.1e}"


def percent(share: float) -> str:
    """A share of 1 in percent; "<1%" for what is little."""
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else "<1%"


def count(n: int, noun: str) -> str:
    """ "1 flip", "2 flips"."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def place(name: str, index: tuple[int, ...]) -> str:
    """The index of an element of the tap `name` in words: batch row, position, head where there are heads, channel; row
    and column of a tensor's gradient."""
    if of_tensor(name):
        return ", ".join(f"{axis} {i}" for axis, i in zip(_OF_TENSORS[-len(index) :], index, strict=True))
    return f"{row_place(index[:-1])}, {last_axis(name)} {index[-1]}" if index else "nowhere"


def place_of_row(name: str, index: tuple[int, ...]) -> str:
    """The index of a row of the tap `name` in words."""
    return f"row {', '.join(map(str, index)) or 0}" if of_tensor(name) else row_place(index)


def row_place(index: tuple[int, ...]) -> str:
    """The index of a row in words. The first sequence of a batch is not named."""
    words = [f"sequence {index[0]}"] if index[0] else []
    words.append(f"position {index[1]}")
    words += [f"head {head}" for head in index[2:]]
    return ", ".join(words)


def last_axis(name: str) -> str:
    """What the last axis of the tap `name` counts."""
    if of_tensor(name):
        return "column"
    return _LAST_AXIS.get(formulas.short(name), "channel")


def broken_in_words(tap: TapReport) -> list[str]:
    """A sentence for each rule that the tap breaks, with the measured figure and the limit."""
    said = []
    isolated, end_to_end = tap.isolated, tap.end_to_end
    for rule in _worth_saying(tap.broken):
        if rule in _RECOGNISED:
            said.append(_RECOGNISED[rule](tap))
        elif rule == "NaN or infinity":
            found = isolated if isolated is not None and isolated.nonfinite else end_to_end
            are = "is" if found.nonfinite == 1 else "are"
            said.append(
                f"{found.nonfinite:,} of {count(found.elements, 'element')} {are} NaN or infinite on one side only, "
                f"first at {place(tap.name, found.nonfinite_at)}"
            )
        elif rule == "error" and isolated is not None:
            limit = limits.isolated_limit(isolated, tap.dtype)
            said.append(f"on its own inputs the error is {figure(isolated.ratio)} sigma (limit {figure(limit)})")
        elif rule == "one row" and isolated is not None:
            limit = limits.row_limit(isolated, tap.dtype)
            said.append(
                f"worst row on its own inputs: {place_of_row(tap.name, isolated.row)}, "
                f"{figure(isolated.row_ratio)} sigma (limit {figure(limit)})"
            )
        elif rule == "rounding points" and isolated is not None:
            limit = limits.misrounded_limit(isolated.elements)
            said.append(
                f"{percent(isolated.misrounded)} of its elements are not what {_expected(tap)} (limit "
                f"{100 * limit:.2g}%): a rounding too many, or one that is missing"
            )
        elif rule == "error end to end":
            limit = limits.end_to_end_limit(end_to_end)
            honest = f"; an honest run has {figure(end_to_end.honest)}" if end_to_end.honest else ""
            said.append(f"end to end the error is {figure(end_to_end.ratio)} sigma (limit {figure(limit)}{honest})")
        else:
            said.append(rule)
    return said


def _overflow(tap: TapReport) -> str:
    return (
        f"overflow: the exact value reaches {tap.overflow:.4g}, past {largest(tap.dtype):g}, the largest number of "
        f"{tap.dtype}; what reads it cannot be right"
    )


_RECOGNISED: dict[str, Callable[[TapReport], str]] = {
    "overflow": _overflow,
    "named": lambda tap: tap.named,
    "another profile": lambda tap: f"it rounds otherwise than in the other layers: {tap.another}",
    "unrecognised": lambda tap: "it rounds as no honest code does, and otherwise than in the other layers",
}
"""Rule -> its sentence: those that know where the candidate rounds."""


def _worth_saying(rules: list[str]) -> list[str]:
    """Not what follows from another rule: what has a name, or a large error, is of course not rounded as elsewhere."""
    stronger = {"overflow", "named", "error", "NaN or infinity"} & set(rules)
    return [rule for rule in rules if not (stronger and rule in ("unrecognised", "another profile"))]


def _expected(tap: TapReport) -> str:
    return "the policy's rounding points give" if tap.place or not tap.profiled else "its profile gives"


def hints(tap: TapReport, config: ModelConfig | None = None) -> list[str]:
    """What is peculiar about the error of a tap that fails on its own inputs: where it lies, and whether it has a
    common factor or sign."""
    found = tap.isolated
    if not tap.defect_here or found is None:
        return []
    if not {"error", "one row", "NaN or infinity"} & set(tap.broken):
        return []
    said = [f"largest single error: {place(tap.name, found.at)}, {figure(found.largest)} sigma", *_where(tap, config)]
    if tap.named:  # it has its reason
        return said
    return said + (_one_too_many(found) or _of_the_first(tap) or _character(found))


def _of_the_first(tap: TapReport) -> list[str]:
    """What the first token tells of a context: it sees itself alone, with a weight of 1."""
    if tap.alone is None or tap.hidden or tap.isolated is None or not tap.isolated.ratio > _FAR:
        return []
    if tap.alone > _FAR:
        why = "wrong too: look at v, at which head reads which, or whether it sees others; no scale explains it"
    else:
        why = "right: look at the scores (scale, mask, q, k)"
    return [f"the first token, which sees itself alone, is {why}"]


def _one_too_many(found: Measure) -> list[str]:
    """Two roundings of one size have sqrt(2) times the error of one."""
    if _SQRT2[0] <= found.ratio <= _SQRT2[1] and found.row_ratio < limits.ROW["bfloat16"]:
        return [f"{figure(found.ratio)} is about sqrt(2): one rounding too many"]
    return []


def _character(found: Measure) -> list[str]:
    """Whether the result is unrelated to the right one, or its error is mostly a common factor, or of one sign."""
    explained = (found.gain * found.scale / found.rms_error) ** 2 if found.rms_error else 0.0
    if explained > 0.99 and found.gain < -0.99:
        return ["it is zero, or nearly"]
    if found.gain < -0.9:
        return ["it has next to nothing in common with the right value: another value, or another order?"]
    if explained > _MOSTLY:
        return [f"a common factor of {1 + found.gain:.4g} explains {percent(explained)} of the squared error"]
    if abs(found.bias) > _CLEAR_BIAS:
        return [f"the error has a sign: its mean is {figure(found.bias)} standard errors from 0"]
    return []


def _where(tap: TapReport, config: ModelConfig | None) -> list[str]:
    """Which part of the value is wrong, where that is at most half of it."""
    if tap.zmap is None or tap.isolated is None:
        return []
    wrong = tap.zmap > limits.ROW[tap.dtype]
    positions, heads, channels = tap.isolated.shape
    of_heads, of_channels = column_edges(heads, channels)
    wrong_heads = wrong.reshape(len(wrong), len(of_heads) - 1, len(of_channels) - 1)
    axes: list[tuple[np.ndarray, np.ndarray, str]] = [
        (row_edges(positions), np.asarray(wrong_heads.any(axis=(1, 2))), "row" if of_tensor(tap.name) else "token"),
        (of_heads, np.asarray(wrong_heads.any(axis=(0, 2))), "head"),
        (of_channels, np.asarray(wrong_heads.any(axis=(0, 1))), last_axis(tap.name)),
    ]
    said = []
    for edges, bad, noun in axes:
        if 0 < bad.sum() <= len(bad) / 2 and len(_spans(bad)) <= _RANGES:
            said.append(f"{noun}{_ranges(edges, bad)}")
            if noun == "channel" and config is not None and formulas.short(tap.name) in ("q_proj", "k_proj", "v_proj"):
                inside = np.flatnonzero(np.repeat(bad, np.diff(edges))) // config.head_dim
                said[-1] += f" (head {', '.join(str(head) for head in sorted(set(inside.tolist())))})"
    return [f"only part of it is wrong: {', '.join(said)}"] if said else []


def _ranges(edges: np.ndarray, bad: np.ndarray) -> str:
    """ "s 0-3 and 8-11" of 16, for the blocks that are bad."""
    spans = [(int(edges[a]), int(edges[b]) - 1) for a, b in _spans(bad)]
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
    if len(words) > 3:
        words = [*words[:2], f"{len(words) - 2} more ranges"]
    plural = "" if len(spans) == 1 and spans[0][0] == spans[0][1] else "s"
    return f"{plural} {' and '.join(words)} of {int(edges[-1])}"


def _spans(bad: np.ndarray) -> np.ndarray:
    """[n, 2]: where runs of what is bad begin and end."""
    return np.flatnonzero(np.diff(np.concatenate([[0], bad.astype(int), [0]]))).reshape(-1, 2)


def before(report: Report, tap: TapReport) -> list[TapReport]:
    """The taps of the same layer that come before this one; of the layer before, if it is the first."""
    found = groups(report)
    at = next(i for i, group in enumerate(found) if any(other is tap for other in group.taps))
    earlier = found[at].taps[: next(i for i, other in enumerate(found[at].taps) if other is tap)]
    return earlier or (found[at - 1].taps if at else [])


def span(tap: TapReport) -> str:
    """The shown values between which a failure lies, where values in between are not shown; else ""."""
    if not tap.hidden:
        return ""
    since = formulas.spoken(tap.since) if tap.since else "the token ids"
    return f"between {since} and {formulas.spoken(tap.name)}; {count(len(tap.hidden), 'value')} not shown"


def other_defects(report: Report) -> list[TapReport]:
    """The operators, besides the first failure, that are wrong on their own inputs; not those that an infinity or NaN
    came into."""
    return [tap for tap in report.taps if tap.cause == "defect" and tap is not report.first_failure]


def elsewhere(report: Report) -> list[TapReport]:
    """The values, besides the first failure, that are right but do not round where the named policy says."""
    return [tap for tap in report.taps if tap.cause == "place" and tap is not report.first_failure]


def habits_in_words(report: Report) -> list[str]:
    """Where the candidate rounds: a line for each operator that is not as in Transformers, and one for the others."""
    other = [str(habit) for habit in report.habits if habit.expected or habit.values]
    same = [habit.operator for habit in report.habits if not habit.expected and not habit.values]
    return other + [f"as Transformers: {', '.join(same)}"] * bool(same and report.dtype != "float32")


def consequences(report: Report) -> int:
    """How many taps fail though their operators hold."""
    return sum(tap.cause == "consequence" and tap is not report.first_failure for tap in report.taps)


def untested(report: Report) -> list[str]:
    """Which taps are untested, with the wrong answers that would hold there: taps of the same name together."""
    found: dict[tuple[str, str], list[int | None]] = {}
    for tap in report.taps:
        if tap.untested:
            layer = formulas.split(tap.name)[0]
            found.setdefault((formulas.short(tap.name), ", ".join(tap.untested)), []).append(layer)
    said = []
    for (name, holding), layers in found.items():
        where = [str(layer) for layer in layers if layer is not None]
        of = "" if not where else f" of layer{'s' * (len(where) > 1)} {', '.join(where)}"
        why = holding if holding == NOT_FINITE else f"{holding} would hold"
        said.append(f"{name}{of} ({why})")
    return said


def tokens_in_words(report: Report) -> list[str]:
    """Agreement of the next tokens, and how far the distributions are apart; [] where nothing was compared."""
    tokens = report.next_tokens
    if tokens is None:
        return []
    flips, defects = tokens.flips, tokens.defects
    said = f"{tokens.positions - len(flips):,} of {tokens.positions:,} agree"
    if flips:
        worst = max(flip.sigmas for flip in flips)
        what = f"{len(defects)} of {count(len(flips), 'flip')} not explained by rounding" if defects else ""
        what = what or f"{count(len(flips), 'flip')} explained by rounding"
        said += f"; {what}: largest margin {figure(worst)} sigma, limit {limits.FLIP:g}"
    kl = f"KL {tokens.kl:.3g} +- {tokens.kl_error:.2g}, predicted {tokens.kl_predicted:.3g}"
    return [said, kl if math.isfinite(tokens.kl) else "KL is not finite: the candidate has logits that are not"]


def by_operator(report: Report) -> dict[str, float]:
    """Operator -> its part of the predicted variance of the last value, largest first."""
    found: dict[str, float] = {}
    for name, share in report.attribution.items():
        kind = formulas.operator(name, report.config)
        found[kind] = found.get(kind, 0.0) + share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_layer(report: Report) -> dict[str, dict[str, float]]:
    """Layer, or value outside the layers, in order of computation -> operator -> its part."""
    found: dict[str, dict[str, float]] = {group.label: {} for group in groups(report)}
    for name, share in report.attribution.items():
        layer, suffix = formulas.split(name)
        part = found.setdefault(suffix if layer is None else f"layer {layer}", {})
        kind = formulas.operator(name, report.config)
        part[kind] = part.get(kind, 0.0) + share
    return {label: part for label, part in found.items() if part}
