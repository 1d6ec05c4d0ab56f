"""Why a run is wrong: the first wrong value of a report, handed to the search for a hypothesis that explains it."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refllm.check import formulas
from refllm.check.inputs import Inputs
from refllm.check.trace import Trace
from refllm.forward.dry_run import names_of
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.hypotheses.explain import Explanation, explain
from refllm.hypotheses.search import Search
from refllm.hypotheses.setup import DoesNotApplyError, Tokens
from refllm.precision import Policy

SECONDS = 30.0
"""How long hypotheses are tried."""

BY_DEFAULT = True
"""Whether a run that fails is explained where nobody said whether it should be."""

_INSIDE = (".scores", ".probs")


def by_default(explain: bool | None) -> bool | None:
    """What was asked for, or the default: None, where a run fails."""
    return explain if explain is not None or BY_DEFAULT else False


def tokens_of(inputs: Inputs, dtype: str) -> Tokens:
    """What was run, as a set-up takes it."""
    starts = tuple(piece.start for piece in inputs.pieces())
    return Tokens(inputs.input_ids, inputs.mask, inputs.positions, starts, inputs.embeds_scale, dtype)


def explained(
    model: Model,
    trace: Trace,
    policy: Policy,
    wrong: str,
    alone: bool,
    step: Callable[..., None] = lambda *_: None,
    seconds: float = SECONDS,
) -> Explanation | None:
    """What explains a wrong value; None where that cannot be asked.

    wrong: its name. alone: it is wrong on the candidate's own inputs, so that the values shown before it are taken
    over; else everything counts from the token ids on. policy: where the candidate rounds, about.
    """
    if trace.last_alone:
        return None  # the page that is changed computes the logits of all tokens
    names = [name for name in names_of(model.page, model.config) if name != HEAD_TAPS.get(model.head)]
    names += [HEAD_TAPS[model.head]] if model.head in HEAD_TAPS else []
    target = _whole_operator(wrong, trace)
    if target not in names or target not in trace.taps or not np.isfinite(trace.taps[target]).all():
        return None
    before = names[: names.index(target)]
    shown = {name: trace.taps[name] for name in before if name in trace.taps and not name.endswith(_INSIDE)}
    shown = shown if alone else {}
    last = max((before.index(name) for name in shown if formulas.split(name)[1] == formulas.LAYER_OUTPUT), default=0)
    hidden = tuple(name for name in before[last:] if name not in shown)
    tokens = tokens_of(trace.inputs, trace.dtype)
    try:
        search = Search(model, tokens, target, trace.taps[target], shown, policy, trace.dtype, seconds)
        found = explain(search, model.config, hidden, step, is_all=not shown)
    except DoesNotApplyError:
        return None
    return replace(found, value=wrong)


def _whole_operator(name: str, trace: Trace) -> str:
    """The value at which a run can end: scores and weights are inside of attention, whose result is the context."""
    for inside in _INSIDE:
        if name.endswith(inside):
            return name.removesuffix(inside) + ".context"
    return name


def in_words(found: Explanation | None) -> list[str]:
    """What a report says of an explanation, in sentences without a full stop; [] where there is nothing to say."""
    if found is None:
        return []
    if not found.causes:
        return _unexplained(found)
    best, whose = found.causes[0], _whose(found.value)
    if found.kind == "nearly":
        left = f"{100 * (1 - found.share):.1f}% of the error, and {best.sigma:.3g} sigma remain"
        return [f"nearly explained: with {best.says} the reference gives {left}"]
    several = ", or with ".join(cause.says for cause in found.causes)
    if found.kind == "slope":
        shape = f"the error of {whose} is small, but it has the shape of what {best.says} makes"
        return [f"{shape} (slope {best.slope:.2f}, effect {best.effect:.2f} sigma)"]
    words = [f"explained: with {several} the reference gives {whose} to {_figure(best.sigma)} sigma"]
    if len(found.causes) > 1:
        words.append(f"{whose[5:]} cannot tell {'both' if len(found.causes) == 2 else 'these'} apart")
    return words


def _unexplained(found: Explanation) -> list[str]:
    """What is certain all the same, and that not all was tried."""
    first, *more = found.facts or ("",)
    if found.out_of_time:
        tried = f"not explained by {found.tried} of {found.of} hypotheses, tried for {SECONDS:.0f} s"
        return [f"{tried}: {first}" if first else tried, *more]
    return [f"not explained by {found.tried} hypotheses: {first}", *more] if first else []


def _whose(value: str) -> str:
    return "your logits" if value == "lm_head" else f"your {formulas.spoken(value)}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) and value < 100 else f"{value:.3g}"
