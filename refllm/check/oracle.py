"""The judgement of a trace: every named value against what the page predicts, end to end and operator by operator.

The page is run twice on values that carry their predicted error (`refllm.accuracy.propagation`). *End to end* it starts
from the token ids, so its error grows as the candidate's may. *Isolated* it takes over the candidate's own value at
every name, so that each operator is judged on the candidate's own inputs, and a defect shows where it is and nowhere
after.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from refllm.accuracy import tables
from refllm.accuracy.cancellation import SIGMOIDS, nothing_left
from refllm.accuracy.cancellation import in_words as in_words_of_lost
from refllm.accuracy.judge import broken_isolated
from refllm.accuracy.layerwise import EMBEDDING, InLayers, border
from refllm.accuracy.limits import CANCELS, TF32_AT_LEAST
from refllm.accuracy.measure import Measure, measure, ulp_histogram
from refllm.accuracy.page import predict_page
from refllm.accuracy.profiled import Profiled
from refllm.accuracy.profiles import ONCE, Profile, in_words, most, of_policy
from refllm.accuracy.propagation import BLOCKS, ONE_CHAIN, ONE_PASS, Uncertain, ulp
from refllm.accuracy.recognise import NOT_ASKED, Made, Recogniser, known, undecided
from refllm.accuracy.verdicts import Verdict, verdict
from refllm.accuracy.wrong_answers import undetected
from refllm.check import formulas
from refllm.check.asked import Asked
from refllm.check.backward import judge_backward, tables_on_grid
from refllm.check.error_map import error_map
from refllm.check.explained import explained
from refllm.check.explained import in_words as explained_in_words
from refllm.check.gradient_formulas import is_gradient
from refllm.check.inputs import Inputs
from refllm.check.keeper import in_words_of_time
from refllm.check.last import Before, last_positions
from refllm.check.layout import no_name
from refllm.check.misbehaviour import Misbehaviour
from refllm.check.next_tokens import TokenReport, compare_tokens
from refllm.check.record import Habit, Record, chosen
from refllm.check.reordered import REORDERED, ROWS, by_words, order_of, put_in_order, readers
from refllm.check.second_opinion import honest_ratios
from refllm.check.tap_report import NOTHING, TapReport
from refllm.check.trace import Trace
from refllm.check.unseen import never_read, never_shown
from refllm.check.weights import FormatError
from refllm.config import ModelConfig
from refllm.config.digest import config_hash
from refllm.config.traits import traits_of
from refllm.errors import InputError
from refllm.forward.dry_run import names_of
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.hypotheses.explain import Explanation
from refllm.hypotheses.setup import is_small
from refllm.models.own_page import current
from refllm.precision import FUSED, HF_EAGER, Policy, largest

_OF_THE_TAP = "and put in order: it is the tap's, not the model's, since what reads it holds"
_OF_THE_MODEL = "and what reads them does not hold: the order is the model's, or something else is wrong as well"
Step = Callable[..., None]
_LAYERS_OF_TABLES = 8  # layers whose rotations are averaged for the tables


def _to_no_bit(x: Uncertain) -> Uncertain:
    """x, of which nobody knows where it is rounded."""
    return replace(x, rounded=None, before=None if x.before is None else replace(x.before, rounded=None))


def _orders(operator: str, reads: tuple[str, ...]) -> list[Profile]:
    """The orders of float32 sums, from the smallest error to the largest. reads: what a product may read in place of
    its input, each in every order."""
    orders = [BLOCKS, ONE_CHAIN, *([ONE_PASS] if operator == "layer_norm" else [])]
    if operator in ("rope", "glu", "activation", "add"):
        orders = [BLOCKS]
    found = [ONCE if order == BLOCKS else Profile(order=order) for order in orders]
    if operator == "linear" and len(reads) > 1:
        return [replace(profile, inputs=reading) for reading in reads for profile in found]
    return [*found, Profile(tf32=True)] if operator in ("linear", "attention") else found


def predict(
    model: Model, inputs: Inputs, dtype: str, policy: Policy, at_tap: Callable[[str, Uncertain], Uncertain], **how: Any
) -> Uncertain:
    """Run the page of `model` on `inputs`; at_tap sees every named value. Returns the head's output or the last norm's.

    model: its weights must lie on the grid of `dtype`; its own arithmetic is not used. how: op, tables, head_of, before
    and mask, as `predict_page` takes them.
    """
    return predict_page(
        model,
        inputs.input_ids,
        inputs.positions,
        how.pop("mask", inputs.given_mask),
        dtype,
        policy,
        at_tap,
        embeds=inputs.embedded if inputs.feeds_embeddings else None,
        packed=inputs.given_mask is None,
        **how,
    )


class Judge:
    """Collects the two runs over one trace. asked.policy: where the candidate has to round; None: wherever it may.

    reorder: whether to put in order what is in another one (`refllm.check.reordered`). orders: value -> what was.
    keeper: of what was judged so far. layers: those that are judged; alone_until, in_line_until: how many are behind
    the two runs.
    """

    def __init__(
        self,
        model: Model,
        trace: Trace,
        asked: Asked,
        guess: tables.Tables | None = None,
        reorder: bool = True,
        keeper: Any = None,
    ) -> None:
        _require_same(model, trace)
        self.before: Before | None = None
        self.mask, self.shown = trace.inputs.given_mask, trace
        whole = trace
        trace = replace(trace, taps=trace.taps.copy()) if asked.last is None else last_positions(trace, asked.last)
        offset = whole.inputs.input_ids.shape[1] - trace.inputs.input_ids.shape[1]
        if offset:
            self.before = Before(whole.taps, model.config, trace.source, offset)
        self.reorder, self.orders = reorder, dict[str, np.ndarray]()
        self.model, self.trace, self.asked, self.policy = model, trace, asked, asked.policy
        self.valid, self.keys = trace.inputs.valid, whole.inputs.valid
        self.places = np.argwhere(self.valid)
        self.offset = np.array([0, offset])
        self.overflow = largest(trace.dtype)
        self.narrow = trace.dtype != "float32"
        self.reports: dict[str, TapReport] = {}
        self.isolated: dict[str, TapReport] = {}
        self.next_tokens: TokenReport | None = None
        self.shares: dict[str, float] = {}
        self.record = Record(self.narrow, asked.kinds)
        self.tables = guess
        self._recognise = Recogniser(trace.dtype, self.places, asked.splits)
        rows, self.last = np.arange(len(self.valid)), trace.inputs.last if trace.last_alone else None
        if self.last is not None:
            self.last_places = np.stack([rows, self.last], axis=1)
            self._recognise_last = Recogniser(trace.dtype, np.stack([rows, 0 * rows], axis=1), asked.splits)
        self._last: tuple[Made, Profiled, Profile] | None = None
        self._made: tuple[Made, Profiled] | None = None
        self._measured: tuple[str, Measure] = "", NOTHING
        self._names: dict[str, bool] = {}
        self._spoilt: set[str] = set()
        self._cancels: dict[str, str] = {}
        self._wide: set[str] = set()
        self.keeper = keeper
        self.count = model.config.num_hidden_layers
        self.layers = asked.layers.within(self.count)
        self.alone_until = self.in_line_until = 0
        self.stream: Uncertain | None = None
        names: dict[str, Any] = {"names": self._names, "spoilt": self._spoilt, "cancels": self._cancels}
        self.found_by = names | {"wide": self._wide}

    def alone(self, step: Step) -> list[TapReport]:
        """The first run, each operator alone."""
        step("predicting, each operator alone")
        if self.tables is None:
            positions = self.trace.inputs.positions
            self.tables = tables.solve(self.model.config, positions, self.turned(), self.trace.dtype)
        first, start = self._begin_alone()
        work = self._work_out_alone
        if self.alone_until <= self.count:
            self._predict(self._isolated, work, True, first, start, self._reached("alone", step))
        self._drop_others()
        self.alone_until = self.count + 1
        if self.layers.all:
            foreign = [name for name in self.trace.taps if name not in self._names]
            if foreign:
                raise InputError(no_name(self.trace.source, foreign, self._names))
        self._compare_layers()
        return list(self.isolated.values())

    def in_line(self, step: Step) -> list[TapReport]:
        """The second run; the reports are in order of computation, for the values that the candidate recorded. Where
        the first layers or positions are left out there is none."""
        if self.layers.first or self.before is not None:
            self.reports = dict(self.isolated)
            return list(self.reports.values())
        step("predicting, end to end")
        first, start = (self.in_line_until, self.stream) if self.in_line_until else (0, None)
        work = self._work_out_in_line
        output = self._predict(self._end_to_end, work, False, first, start, self._reached("in line", step))
        self.in_line_until = self.count + 1
        if isinstance(output, Uncertain):
            self._compare_last(output)
        return list(self.reports.values())

    def _compare_last(self, output: Uncertain) -> None:
        """What the last value says of next tokens, and where its error comes from."""
        self.shares = output.shares
        name = HEAD_TAPS.get(self.model.head)
        if name == "lm_head" and name in self.trace.taps:
            exact, variance, candidate = map(self._rows, (output.value, output.variance, self.trace.taps[name]))
            exact, variance = self._expected(name, exact, variance, alone=False)
            places = self.places if self.last is None else self.last_places
            self.next_tokens = compare_tokens(exact, variance, candidate, places)

    def _begin_alone(self) -> tuple[int, Uncertain | None]:
        """How many layers are passed over, and the stream behind them: where an earlier run was ended; else behind the
        last value that is shown one layer before those that are judged, or earlier: what stands before a rounding is
        known one layer later."""
        if self.keeper is not None and self.keeper.load(self):
            return self.alone_until, self.stream
        shown = [k for k in range(self.layers.first) if border(k) in self.trace.taps]
        if not shown:
            return 0, None
        at = border(shown[-1])
        self._names[at] = True
        value = np.asarray(self.trace.taps[at], np.float64)
        taken = np.where(np.isfinite(value), value, 0)
        spoilt = not np.isfinite(value).all()
        return shown[-1], Uncertain(taken, np.zeros(value.shape, np.float32), spoilt=spoilt)

    def _drop_others(self) -> None:
        """Forgets what was judged on the way to the layers that are asked for."""
        for name in [*self.isolated] if self.layers.first else []:
            layer, _ = formulas.split(name)
            if name == EMBEDDING or (layer is not None and layer < self.layers.first):
                del self.isolated[name]
                self.record.forget(name)

    def _reached(self, phase: str, step: Step) -> Callable[[int, Uncertain], None]:
        """What is done at the end of a layer: it is said what is left, and what was judged is kept."""
        begin, before = time.monotonic(), 0 if phase == "alone" else self.count
        total = (self.layers.stop or self.count) * (1 if self.layers.first or self.before is not None else 2)
        first: list[int] = []

        def reached(layers: int, x: Uncertain) -> None:
            self.stream = x
            if phase == "alone":
                self.alone_until = layers
            else:
                self.in_line_until = layers
            first.append(layers)
            passed, words = layers - first[0], "each operator alone" if phase == "alone" else "end to end"
            left = (time.monotonic() - begin) / passed * (total - layers - before) if passed else 0.0
            about = f", about {in_words_of_time(left)} left" if left > 2 else ""
            step(f"{words}, layer {layers} of {self.count}{about}", layers + before, total)
            if self.keeper is not None and not self.orders:
                self.keeper.save(self)

        return reached

    def guesses(self) -> list[tables.Tables | None]:
        """The tables to try in float32, where they count, if the turning is not shown."""
        if self.narrow or next(self.turned(), None) is not None:
            return [None]
        return [*tables.guesses(self.model.config, self.trace.inputs.positions)]

    def _predict(
        self,
        at_tap: Callable[[str, Uncertain], Uncertain],
        work_out: Callable[[str, Made, Profiled], Uncertain],
        bits: bool,
        first: int,
        start: Uncertain | None,
        reached: Callable[[int, Uncertain], None],
    ) -> Uncertain:
        assumed = (self.policy or FUSED).without(self.model.page.NOT_ROUNDED)
        op = Profiled(self.trace.dtype, assumed, at_tap, lambda name: True, work_out, bits)
        assert self.tables is not None
        some = InLayers(op, first, start, self.layers.stop, reached)
        how: dict[str, Any] = {"op": some, "tables": self.tables.uncertain, "head_of": self.last}
        how |= {"before": self.before, "mask": self.mask}
        return predict(self.model, self.trace.inputs, self.trace.dtype, assumed, at_tap, **how)

    def turned(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Heads before and after the rotation, as far as the candidate shows both: (positions, before, after)."""
        c: Any = self.model.config
        named = names_of(self.model.page, c)
        interleaved, layers = traits_of(c).interleaved, range(c.num_hidden_layers)
        for layer in list(layers)[:: max(1, len(layers) // _LAYERS_OF_TABLES)]:
            for letter in "qk":
                at = f"model.layers.{layer}.self_attn.{letter}_"
                after = self.trace.taps.get(f"{at}rope")
                normed = next((name for name in (f"{at}layernorm", f"{at}norm") if name in named), f"{at}proj")
                before = self.trace.taps.get(normed)
                if after is None or before is None or after.ndim != 4:
                    continue
                heads = after.shape[1]
                if before.ndim == 3 and before.shape[-1] == heads * c.head_dim:
                    before = before.reshape(*before.shape[:2], heads, -1).transpose(0, 2, 1, 3)
                if before.shape[:3] != after.shape[:3] or after.shape[-1] < c.rotary_dim:
                    continue
                rows = (tables.in_pairs(self._rows(x), c.rotary_dim, interleaved) for x in (before, after))
                yield (self.trace.inputs.positions[self.valid], *rows)

    # --------------------------------------------------------------------------------------------- each operator alone

    def _work_out_alone(self, name: str, made: Made, op: Profiled) -> Uncertain:
        candidate, self._made = self.trace.taps.get(name), (made, op)
        if any(i.spoilt for i in made.inputs):
            self._spoilt.add(name)
        if candidate is None:
            return self._not_shown(name, made, op)
        if not self.narrow:
            return self._in_an_order(name, made, op, self._fitted(name, candidate, made))
        found = NOT_ASKED
        if np.isfinite(candidate).all():
            recognise = self._recognise_last if self._is_of_last_tokens(candidate) else self._recognise
            found = recognise(made, self._fitted(name, candidate, made), self.record.tried_first(name))
        self.record.keep(name, made.operator, found)
        if self.policy is not None:
            profile = of_policy(made.operator, op.policy)
            self._last = made, op, profile
            return op.under(made, profile)
        profile = chosen(found.profile or self.record.profile_of(name, made.operator), made.operator, self.narrow)
        if found.asked and not found.fits and made.operator != "attention":
            profile = most(made.operator)
        if found.blurred:
            made = replace(made, inputs=tuple(self._before_rounding(i) for i in made.inputs))
        if found.fits and not profile.stored and (x := self._in_float32(name, made, op, profile, candidate)):
            return x
        # By the format, if float32 arithmetic does not explain it: some accumulators cut off what others round.
        profile = replace(profile, stored=True)
        self._last = made, op, profile
        x = op.under(made, profile, certain_inputs=bool(found.fits))
        x = x if found.profile is None or found.profile.stored else replace(x, rounded=None)
        return x if found.fits else _to_no_bit(x)

    def _in_float32(
        self, name: str, made: Made, op: Profiled, profile: Profile, candidate: np.ndarray
    ) -> Uncertain | None:
        """A value that is shown as float32 though the format is narrow, by the error of float32; None if that is more
        than honest sums have."""
        rows = self._rows(self._fitted(name, candidate, made))
        for order in (BLOCKS, ONE_CHAIN):
            x = op.held_in_float32(made, profile, order)
            found = self._measure(rows, self._rows(x.value, candidate), self._rows(x.variance, candidate))
            if not broken_isolated(found, "float32"):
                self._measured, self._last = (name, found), (made, op, profile)
                self._wide.add(name)
                return replace(x, rounded=None)
        return None

    def _before_rounding(self, x: Uncertain) -> Uncertain:
        """x with the rounding that may have come after what is read."""
        if x.before is None or known(x.before) is not None:
            return x
        return replace(x, variance=x.variance + ulp(x.value, self.trace.dtype) ** 2 / 12)

    def _not_shown(self, name: str, made: Made, op: Profiled) -> Uncertain:
        """A value that may exist only inside a kernel. What was rounded there is known of sums, or by the policy."""
        if self.policy is not None:
            x = op.under(made, of_policy(made.operator, op.policy))
            return _to_no_bit(x) if self.policy.name == FUSED.name else x
        profile = self.record.profile_of(name, made.operator)
        if made.operator == "add":  # three terms have no sum of two
            return op.under(made, ONCE if profile is None or profile.together else profile)
        return _to_no_bit(op.under(made, chosen(profile, made.operator, self.narrow)))

    def _in_an_order(self, name: str, made: Made, op: Profiled, candidate: np.ndarray) -> Uncertain:
        """The value in that order of float32 sums which has the smallest error that holds; if none does, of the ways
        to read the input that which leaves the least."""
        least, nearest = np.inf, None
        for profile in _orders(made.operator, self.record.readings(name)):
            x = op.under(made, profile)
            rows = self._rows(candidate)
            found = self._measure(rows, self._rows(x.value, candidate), self._rows(x.variance, candidate))
            if not broken_isolated(found, self.trace.dtype) and (not profile.tf32 or found.ratio > TF32_AT_LEAST):
                self.record.keep_order(name, made.operator, profile)
                self._measured = name, found
                if profile.order == ONE_PASS:
                    self._cancels[name] = self._cancellation(made.inputs[0].value)
                return x
            if nearest is None or (profile.order == ONCE.order and not profile.tf32 and found.ratio < least):
                least, nearest = found.ratio, x
        assert nearest is not None
        return nearest

    def _cancellation(self, read: np.ndarray) -> str:
        """What to say of a variance in one pass over such rows; "" where their means are small enough for it."""
        rows = self._rows(read)
        largest_mean = float(np.max(np.abs(rows.mean(axis=-1)) / np.maximum(rows.std(axis=-1), 1e-30)))
        if largest_mean < CANCELS:
            return ""
        return (
            "the variance is computed in one pass, as E x^2 - (E x)^2, which cancels: the mean of a row is "
            f"{largest_mean:.3g} of its standard deviations; take the mean off first"
        )

    def _cancelled(self, name: str, candidate: np.ndarray, x: Uncertain) -> str:
        """What to say of an activation whose sigmoid has cancelled; "" where its gate is not shown."""
        if self._made is None or not name.endswith(".act") or self._made[0].how.get("name") not in SIGMOIDS:
            return ""
        gate = self._made[0].inputs[0]
        if gate.variance.any():
            return ""
        of_gate, found, exact = (self._rows(values) for values in (gate.value, candidate, x.value))
        lost = nothing_left(of_gate, found, exact, self.trace.dtype)
        return in_words_of_lost(of_gate, found, exact, lost) if lost.any() else ""

    def _isolated(self, name: str, x: Uncertain) -> Uncertain:
        candidate = self._candidate(name, x)
        if candidate is not None and self._put_in_order(name, x, candidate):
            assert self._made is not None
            x = self._work_out_alone(name, *self._made).named(name)
            candidate = self._candidate(name, x)
        self._names[name] = candidate is not None
        if candidate is None:
            return replace(x, spoilt=name in self._spoilt)
        dtype = "float32" if name in self._wide else self.trace.dtype
        report = self.isolated[name] = TapReport(name, NOTHING, dtype=dtype)
        rows, shown = self._rows(candidate), self._shown_rounded(name, x, candidate)
        exact, variance = self._rows(x.value, candidate), self._rows(shown.variance, candidate)
        exact, variance = self._expected(name, exact, variance, alone=True)
        misrounded = self._misrounded(candidate, x.rounded)
        if misrounded and self._made is not None:
            misrounded = max(0.0, misrounded - undecided(self._made[0], self.trace.dtype))
        measured = self._measured[1] if self._measured[0] == name else self._measure(rows, exact, variance)
        report.isolated = replace(measured, misrounded=misrounded)
        report.named = self._cancels.get(name, "")
        found = self.record.found.get(name)
        if found is not None:
            report.profiled = self.policy is None and bool(found.fits)
            report.named = f"{found.defect}: that predicts it to the bit" if found.defect else found.shared
            if self.policy is not None and broken_isolated(report.isolated, self.trace.dtype) and not report.named:
                report.place = self._elsewhere(name, candidate)
        report.named = report.named or self._cancelled(name, candidate, x)
        report.zmap = error_map(rows, exact, variance, self.overflow)
        if name.endswith(".context") and self.before is None:
            first = np.unique(self.places[:, 0], return_index=True)[1]
            report.alone = self._measure(rows[first], exact[first], variance[first]).ratio
        report.untested = undetected(exact, variance, dtype)
        report.fed, report.overflow = name in self._spoilt, self._overflow(rows, exact)
        report.hidden = tuple(hidden for hidden in self._names if hidden in x.shares and hidden != name)
        if report.hidden:
            earlier = list(self._names)[: list(self._names).index(report.hidden[0])]
            report.since = next((n for n in reversed(earlier) if self._names[n]), "")
        taken = x.value.copy()
        np.copyto(taken[..., : candidate.shape[-1]], candidate, where=np.isfinite(candidate))
        spoilt = report.fed or not np.isfinite(rows).all()
        return Uncertain(taken, np.zeros(x.shape, np.float32), before=x.before, sum_of=x.sum_of, spoilt=spoilt)

    def _expected(
        self, name: str, exact: np.ndarray, variance: np.ndarray, alone: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a value is measured against, and the variance of the error that is expected: what the page has. alone:
        on the candidate's own inputs, and not end to end."""
        return exact, variance

    def _put_in_order(self, name: str, x: Uncertain, candidate: np.ndarray) -> bool:
        """Puts the channels of a value in order, if that is all that is wrong with it."""
        if not self.reorder or formulas.short(name) not in REORDERED:
            return False
        order = order_of(self._some_rows(candidate), self._some_rows(x.value[..., : candidate.shape[-1]]))
        if order is None:
            return False
        self.orders[name] = order
        self.trace.taps[name] = put_in_order(self.trace.taps[name], order)
        return True

    def _some_rows(self, values: np.ndarray) -> np.ndarray:
        """[N, n] or [N, H, n]: at most `ROWS` of the positions that are not padding, from all over."""
        some = np.unique(np.linspace(0, len(self.places) - 1, ROWS).astype(int))
        row, position = self.places[some].T
        return values[row, position] if values.ndim == 3 else values[row, :, position]

    def _overflow(self, rows: np.ndarray, exact: np.ndarray) -> float:
        """The largest exact number past what the format holds, where the candidate has an infinity for it."""
        if not np.isinf(rows).any():
            return 0.0
        beyond = np.isinf(rows) & np.isfinite(exact) & (np.abs(exact) > self.overflow)
        return float(np.abs(exact[beyond]).max()) if beyond.any() else 0.0

    def _elsewhere(self, name: str, candidate: np.ndarray) -> str:
        """The profile of a value that does not round where the named policy says, if it is right under its own."""
        found = self.record.found[name]
        if not found.fits or self._last is None:
            return ""
        made, op, _ = self._last
        x = op.under(made, found.fits[0], certain_inputs=True)
        measured = self._measure(
            self._rows(candidate), self._rows(x.value, candidate), self._rows(x.variance, candidate)
        )
        measured = replace(measured, misrounded=self._misrounded(candidate, x.rounded))
        right = not broken_isolated(measured, self.trace.dtype)
        return in_words(made.operator, found.fits[0]) if right else ""

    def _shown_rounded(self, name: str, x: Uncertain, candidate: np.ndarray) -> Uncertain:
        """Scores and weights may be shown rounded by a kernel that does not round them."""
        if not self.narrow or self.policy is not None or not name.endswith((".scores", ".probs")):
            return x
        return replace(x, variance=x.variance + ulp(x.value, self.trace.dtype) ** 2 / 12)

    def _compare_layers(self) -> None:
        """What only all layers together say: where one differs from the others, and where none is recognised."""
        for name, report in self.isolated.items():
            if self.policy is not None or name not in self.record.found:
                continue
            another = self.record.another(name)
            if another is not None:
                report.another = in_words(self.record.operators[name], another)
            # Where values that were not shown lie before it, it may be they that round elsewhere (a norm that reads the
            # sum before its rounding): by its size its error is judged all the same.
            hidden = bool(report.hidden)
            report.unrecognised = self.record.unrecognised(name) and not self.record.nowhere(name) and not hidden

    # ------------------------------------------------------------------------------------------------------ end to end

    def _work_out_in_line(self, name: str, made: Made, op: Profiled) -> Uncertain:
        if self.policy is not None and self.narrow:
            return op.under(made, of_policy(made.operator, op.policy))
        profile = chosen(self.record.profile_of(name, made.operator), made.operator, self.narrow)
        x = op.under(made, profile)
        return op.with_float32_noise(made, profile, x) if self.narrow and not profile.stored else x

    def _end_to_end(self, name: str, x: Uncertain) -> Uncertain:
        candidate = self._candidate(name, x)
        if candidate is None:
            return x
        exact, variance = self._rows(x.value, candidate), self._rows(x.variance, candidate)
        exact, variance = self._expected(name, exact, variance, alone=False)
        rows = self._rows(candidate)
        report = self.isolated.get(name) or TapReport(name, NOTHING, dtype=self.trace.dtype)
        report.end_to_end = self._measure(rows, exact, variance)
        report.ulps = ulp_histogram(rows, exact, self.trace.dtype)
        self.reports[name] = report
        return x

    def nearest_policy(self) -> Policy:
        """The policy of the candidate: the named one, else the one that rounds about as often as its profiles."""
        if self.policy is not None:
            return self.policy
        often = self.record.profile_of("self_attn.context", "attention")
        return HF_EAGER if self.narrow and (often is None or "scores" in often.points) else FUSED

    def unsaid(self) -> list[str]:
        """What the candidate does that it should do on purpose only, and nobody said so."""
        # Where a policy was named, its own rules say whether that is kept; nothing else has to be known.
        places = self.record.unknown_places() if self.policy is None else []
        said = [f"{values}: {words}" for values, words in places]
        for values, parts in self.record.split_products():
            if parts != self.asked.splits:
                said.append(f"{values}: products of {parts} parts, each rounded; say --splits {parts} if that is meant")
        tf32 = [short for short, profile in self.record.orders.items() if profile.tf32]
        if tf32 and not self.asked.tf32:
            said.append(f"{', '.join(tf32)}: products of 11-bit factors (TF32); say --tf32 if that is meant")
        return said

    def habits(self) -> list[Habit]:
        """Where the candidate rounds, in words."""
        exact_scale = np.frexp(self.model.config.head_dim**-0.5)[0] == 0.5
        found = self.record.habits(self.model.page.NOT_ROUNDED, bool(exact_scale))
        assert self.tables is not None
        return [*found, Habit("rope", "tables", self.tables.name)] if self.tables.solved else found

    def _measure(self, rows: np.ndarray, exact: np.ndarray, variance: np.ndarray) -> Measure:
        """The measure, with indices that name the batch row and the position, padding counted."""
        found = measure(rows, exact, variance, self.overflow)
        places = self.places if self.last is None or len(rows) != len(self.last) else self.last_places
        named = {
            name: self._place(getattr(found, name), places + self.offset) for name in ("row", "at", "nonfinite_at")
        }
        return replace(found, **named)  # type: ignore[arg-type]

    def _misrounded(self, candidate: np.ndarray, rounded: np.ndarray | None) -> float:
        if rounded is None:
            return 0.0
        found, policy = self._rows(candidate), self._rows(rounded, candidate)
        return float(np.mean((found != policy) & ~(np.isnan(found) & np.isnan(policy))))

    @staticmethod
    def _place(index: tuple[int, ...], places: np.ndarray) -> tuple[int, ...]:
        return (*(int(i) for i in places[index[0]]), *index[1:]) if index else ()

    def _is_of_last_tokens(self, values: np.ndarray) -> bool:
        """Whether these are logits of one token per row: [B, 1, V]."""
        return self.last is not None and values.ndim == 3 and values.shape[1] == 1 < self.valid.shape[1]

    def _fitted(self, name: str, candidate: np.ndarray, made: Made) -> np.ndarray:
        """What was shown, if it has the shape of what the operator makes."""
        first = made.inputs[0].shape
        last = len(made.how["weight"]) if made.operator == "linear" else first[-1]
        return self._of_shape(name, candidate, (*first[:-1], last))

    def _candidate(self, name: str, x: Uncertain) -> np.ndarray | None:
        candidate = self.trace.taps.get(name)
        if candidate is None:
            return None
        candidate = self._of_shape(name, candidate, x.shape)
        if name.endswith(".scores") and not self.keys.all():  # against keys of padding, which nobody attends to
            candidate = np.where(self.keys[:, None, None, :], candidate, x.value)
        return candidate

    def _of_shape(self, name: str, candidate: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        partial = name.endswith("_rope") and candidate.shape[:-1] == shape[:-1] and candidate.shape[-1] <= shape[-1]
        if candidate.shape != shape and not partial:
            raise InputError(f"{self.trace.source}: {name} has shape {list(candidate.shape)}, expected {list(shape)}")
        return candidate

    def _rows(self, values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """[B, S, n] or [B, H, S, n] -> [N, n] or [N, H, n]: the positions that are not padding."""
        if like is not None:
            values = values[..., : like.shape[-1]]
        by_position = values if values.ndim == 3 else values.transpose(0, 2, 1, 3)
        if self._is_of_last_tokens(values):
            return by_position[:, 0]
        if self.valid.all():  # no copy of what lies so already
            return np.ascontiguousarray(by_position).reshape(-1, *by_position.shape[2:])
        return by_position[self.valid]


def _require_same(model: Model, trace: Trace) -> None:
    if trace.config_hash not in ("", config_hash(model.config)):
        raise InputError(
            f"trace of {trace.source}: its config ({trace.config_hash}) is not that of the checkpoint "
            f"({config_hash(model.config)}); trace the same checkpoint"
        )
    if not trace.taps:
        raise InputError(f"trace of {trace.source}: it holds no values")
    if int(trace.inputs.input_ids.max()) >= model.config.vocab_size:
        raise InputError(f"trace of {trace.source}: token id {trace.inputs.input_ids.max()} is outside the vocabulary")


@dataclass
class Report:
    """One candidate on one checkpoint and one input.

    attribution: named value -> part of the predicted variance of the last value that comes from making it; the parts
    sum to 1. notes: sentences a reader should know. config: of the model, for the formulas in a report. misbehaviour:
    what the candidate did in place of a forward pass; then nothing was measured. habits: where it rounds. unsaid: what
    it may do on purpose only, and nobody said that it does. unseen: sentences on what the run does not show.
    copies: what ranks have of one replicated value that is not the same bits. blamed: which rank made what is wrong.
    format_error: what the weights cost that it was judged with, where they are not the checkpoint's. explanation: what
    the reference has to do to give what the candidate has. judged: of some layers alone, the judgement itself; part:
    what a file says of it, to be merged with others (`refllm.check.merged`).
    """

    checkpoint: str
    candidate: str
    dtype: str
    policy: str | None
    inputs: str
    tokens: int
    taps: list[TapReport]
    next_tokens: TokenReport | None
    attribution: dict[str, float]
    notes: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    misbehaviour: Misbehaviour | None = None
    habits: list[Habit] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)
    format_error: FormatError | None = None
    explanation: Explanation | None = None
    judged: Judge | None = None
    part: dict[str, Any] | None = None

    @property
    def verdict(self) -> Verdict:
        """The run fails if the candidate misbehaves, or any value, copy of a rank or next token fails; one with an
        untested value, or that something was not seen of, is incomplete."""
        values = {tap.verdict for tap in self.taps}
        wrong = self.misbehaviour or self.copies or "fails" in values or (self.next_tokens and self.next_tokens.defects)
        return verdict(wrong, missing=self.unseen or self.unsaid or "untested" in values)

    @property
    def last_value(self) -> str:
        """The last value of the forward pass that was shown, "" if none was."""
        return next((tap.name for tap in reversed(self.taps) if not is_gradient(tap.name)), "")

    @property
    def first_failure(self) -> TapReport | None:
        """Where to look: the first operator that is wrong on its own inputs, else the first value over its budget."""
        ranks = (
            lambda tap: tap.defect_here,
            lambda tap: tap.verdict == "fails" and not tap.place,
            lambda tap: tap.place,
        )
        return next((tap for rank in ranks for tap in self.taps if rank(tap)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, verdicts included. Infinities and NaN are strings: float() reads every figure back."""
        first = self.first_failure
        values = {
            "checkpoint": self.checkpoint,
            "candidate": self.candidate,
            "dtype": self.dtype,
            "policy": self.policy,
            "inputs": self.inputs,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "first_failure": None if first is None else first.name,
            "misbehaviour": None if self.misbehaviour is None else asdict(self.misbehaviour),
            "habits": [str(habit) for habit in self.habits],
            "unsaid": self.unsaid,
            "unseen": self.unseen,
            "copies": self.copies,
            "blamed": self.blamed,
            "taps": [
                {
                    "name": tap.name,
                    "cause": tap.cause,
                    "verdict": tap.verdict,
                    "broken": tap.broken,
                    "untested": tap.untested,
                    "end_to_end": tap.end_to_end.to_dict() if tap.end_to_end.elements else None,
                    "isolated": None if tap.isolated is None else tap.isolated.to_dict(),
                    "ulps": tap.ulps,
                }
                for tap in self.taps
            ],
            "next_tokens": None
            if self.next_tokens is None
            else {**asdict(self.next_tokens), "unexplained": len(self.next_tokens.defects)},
            "attribution": self.attribution,
            "format_error": None
            if self.format_error is None
            else {**asdict(self.format_error), "relative": self.format_error.relative},
            "explanation": None if self.explanation is None else self.explanation.to_dict(),
            "notes": self.notes,
            **({} if self.part is None else {"part": self.part}),
        }
        return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """The value with "inf", "-inf" and "nan" for the numbers that JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


J = TypeVar("J", bound=Judge)


def explained_best(
    make: Callable[[tables.Tables | None], J], step: Step = lambda *_: None
) -> tuple[J, list[TapReport]]:
    """The judgement with the first tables under which everything holds; under none, with those that leave the fewest
    operators wrong, by the least. Where an operator is wrong by itself, the run end to end waits for that choice.

    make: a judge with such tables, or None for those that what is shown tells.
    """
    tried: list[tuple[tuple[int, float, int], J, list[TapReport]]] = []
    for guess in make(None).guesses():
        collected = make(guess)
        alone = _unless_interrupted(collected, collected.alone, step)
        wrong, taps = sum(tap.wrong_here for tap in alone), list[TapReport]()
        if not wrong:
            taps = _unless_interrupted(collected, collected.in_line, step)
            if not any(tap.broken for tap in taps):
                return collected, taps
        if guess is None or guess.solved:  # beside what may be anything, every error is small
            worst = max(tap.isolated.ratio for tap in alone if tap.isolated is not None)
            tried.append(((wrong, worst, len(tried)), collected, taps))
    _, collected, taps = min(tried, key=lambda entry: entry[0])
    return collected, taps or _unless_interrupted(collected, collected.in_line, step)


class JudgedSoFarError(KeyboardInterrupt):
    """Ctrl-C, or the end of the time, in the middle of a judgement."""

    def __init__(self, collected: Judge) -> None:
        super().__init__()
        self.collected = collected


def _unless_interrupted(collected: Judge, work: Callable[[Step], list[TapReport]], step: Step) -> list[TapReport]:
    try:
        return work(step)
    except KeyboardInterrupt:
        raise JudgedSoFarError(collected) from None


def _whose_order(
    model: Model, trace: Trace, asked: Asked, step: Step, first: Judge
) -> tuple[Judge, list[TapReport], list[str]]:
    """The judgement of a trace some of whose values are in another order, and sentences on it. first: what found it.

    Of what was put in order, if the values that read it then hold; else of the trace as it is.
    """
    words = by_words(first.orders, model.config.head_dim)
    collected, taps = explained_best(lambda guess: Judge(model, first.trace, asked, guess, reorder=False), step)
    shown = list(collected.reports)
    read = [readers(name, shown, first.orders) for name in first.orders]
    if all(names and not any(collected.reports[name].wrong_here for name in names) for names in read):
        return collected, taps, [f"{', '.join(names)}: shown in {said}, {_OF_THE_TAP}" for said, names in words.items()]
    collected, taps = explained_best(lambda guess: Judge(model, trace, asked, guess, reorder=False), step)
    for tap in taps:
        said = next((said for said, names in words.items() if formulas.short(tap.name) in names), "")
        if said and tap.defect_here and not tap.named:
            tap.named = f"its channels are the page's in {said}, {_OF_THE_MODEL}"
    return collected, taps, []


def ask_again(model: Model, trace: Trace, policy: Policy, taps: list[TapReport], step: Step, runs: int = 1) -> None:
    """Measure an honest run where a value is over its end-to-end budget and no operator is wrong by itself.

    runs: of how many independent runs the errors are.
    """
    if any(tap.wrong_here for tap in taps):
        return
    over = {tap.name: tap.end_to_end for tap in taps if tap.verdict == "fails" and not tap.end_to_end.nonfinite}
    if not over:
        return
    step("an honest run, for comparison")
    over = {name: replace(found, rms_sigma=found.rms_sigma / runs**0.5) for name, found in over.items()}
    ratios = honest_ratios(model, trace.inputs, trace.dtype, policy, over)
    for tap in taps:
        if tap.name in ratios:
            tap.end_to_end = replace(tap.end_to_end, honest=ratios[tap.name])


def judge(
    model: Model,
    trace: Trace,
    policy: Policy | Asked | None = None,
    *,
    checkpoint: str = "",
    step: Step = lambda *_: None,
    explain: bool | None = False,
    keeper: Any = None,
) -> Report:
    """The report on a trace. model: the checkpoint's, with weights on the grid of the trace's dtype. explain: whether
    to look for what a wrong run did (`refllm.check.explained`); None: where it fails, and where nothing but the last
    value was shown, of a model that is small. keeper: of what was judged so far, where a check that is killed is to go
    on from there.

    Raises InputError where trace and model do not fit: another config, unknown names, other shapes. Raises
    PartlyJudgedError, with the report so far, for Ctrl-C in the middle.
    """
    asked = Asked.of(policy)
    if trace.dtype == "float64":
        return _of_float64(model, trace, asked, checkpoint, step)
    try:
        # What was judged under one guess at the tables says nothing under another.
        collected, taps = explained_best(
            lambda guess: Judge(model, trace, asked, guess, keeper=keeper if guess is None else None), step
        )
        if collected.orders:
            collected, taps, notes = _whose_order(model, trace, asked, step, collected)
        else:
            notes = []
        ask_again(model, trace, collected.nearest_policy(), taps, step)
    except JudgedSoFarError as error:
        raise PartlyJudgedError(_so_far(model, trace, asked, error.collected, checkpoint)) from None
    report = _report(model, trace, asked, collected, taps, checkpoint)
    report.notes += notes
    if trace.inputs.learning is not None:
        _add_backward(report, model, trace, asked, collected, step)
    whole = asked.layers.all and collected.before is None
    if explain is not False and whole and (explain or report.verdict == "fails" or is_small(model)):
        report.explanation = _explanation(model, collected, report, step)
        report.notes += explained_in_words(report.explanation) if report.verdict != "fails" else []
    report.notes += trace.doubts if report.verdict == "fails" else []
    if keeper is not None:
        keeper.done()
    if not asked.layers.all:
        report.judged = collected
    return report


class PartlyJudgedError(KeyboardInterrupt):
    """Ctrl-C, or the end of the time, in the middle of a judgement. report: on what was judged until then."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def _so_far(model: Model, trace: Trace, asked: Asked, collected: Judge, checkpoint: str) -> Report:
    """The report on what was judged before it was interrupted."""
    taps = [*{**collected.isolated, **collected.reports}.values()]
    report = _report(model, trace, asked, collected, taps, checkpoint)
    alone, in_line = collected.alone_until, collected.in_line_until
    if alone <= collected.count:
        report.unseen.append(f"it was interrupted: nothing from {_at(alone, collected.count)} on was judged to its end")
    report.unseen.append(f"the values end to end were not measured from {_at(in_line, collected.count)} on")
    return report


def _at(layer: int, count: int) -> str:
    return f"layer {layer}" if layer < count else "the norm after the layers"


def _report(
    model: Model, trace: Trace, asked: Asked, collected: Judge, taps: list[TapReport], checkpoint: str
) -> Report:
    """What was judged, before anything else is looked for."""
    by_page = [f"read by the page {current()}"] if current() else []
    return Report(
        checkpoint=checkpoint,
        candidate=trace.source,
        dtype=trace.dtype,
        policy=asked.name,
        inputs=trace.inputs.label,
        tokens=int(trace.inputs.valid.sum()),
        taps=taps,
        next_tokens=collected.next_tokens,
        attribution=dict(sorted(collected.shares.items(), key=lambda item: -item[1])),
        notes=[*trace.notes, *by_page],
        config=model.config,
        habits=collected.habits() if collected.tables is not None else [],
        unsaid=collected.unsaid(),
        unseen=[*never_shown(model.head, trace), *never_read(model), *_left_out(collected)],
    )


def _left_out(collected: Judge) -> list[str]:
    """Sentences on the layers and positions that were not asked for."""
    layers, count, said = collected.layers, collected.count, list[str]()
    if not layers.all:
        stop = count if layers.stop is None else layers.stop
        which = f"layer {layers.first}" if stop == layers.first + 1 else f"layers {layers.first} to {stop - 1}"
        said.append(f"{which} of {count} alone, as --layers says: nothing else was judged")
    if collected.before is not None:
        said.append(f"positions before {collected.before.count}, as --last says")
    if said and (layers.first or collected.before is not None):
        said.append("the values end to end were not measured, since they begin with the first token")
    return said


def _of_float64(model: Model, trace: Trace, asked: Asked, checkpoint: str, step: Step) -> Report:
    """The report on the gradients of a run in float64. Its values are what they are made of, and not judged."""
    if trace.inputs.learning is None:
        raise InputError(f"{trace.source}: in float64 gradients are checked, and no values: add --backward")
    collected = Judge(model, trace, asked)
    collected.tables = tables.solve(model.config, trace.inputs.positions, collected.turned(), "float32")
    report = Report(
        checkpoint=checkpoint,
        candidate=trace.source,
        dtype=trace.dtype,
        policy=asked.name,
        inputs=trace.inputs.label,
        tokens=int(trace.inputs.valid.sum()),
        taps=[],
        next_tokens=None,
        attribution={},
        notes=[*trace.notes],
        config=model.config,
    )
    _add_backward(report, model, trace, asked, collected, step)
    return report


def _add_backward(report: Report, model: Model, trace: Trace, asked: Asked, collected: Judge, step: Step) -> None:
    """Puts what was found about the gradients behind the values of the forward pass."""
    narrow = trace.dtype in ("bfloat16", "float16")
    profile = collected.record.profile_of("model.layers.0.self_attn.q_rope", "rope") if narrow else None
    named = None if asked.policy is None else asked.policy.without(model.page.NOT_ROUNDED)
    of_policy = named is not None and "rope.table" in named.points
    rounded = of_policy or (asked.policy is None and (profile is None or "tables" in profile.points))
    assert collected.tables is not None
    cos, sin = tables_on_grid(*collected.tables.values(), trace.dtype, rounded)
    found = judge_backward(model, trace, asked, (cos, sin), collected.nearest_policy(), step)
    report.taps += found.taps
    report.habits += found.habits
    report.unseen += found.unseen
    report.notes += found.notes


def _explanation(model: Model, collected: Judge, report: Report, step: Step) -> Explanation | None:
    """What explains the first failure; and where nothing but the last value was shown, whether its error has the shape
    of a hypothesis although it holds."""
    head, first = HEAD_TAPS.get(model.head, "model.norm"), report.first_failure
    name, alone = (head, False) if first is None else (first.name, first.defect_here)
    hidden = not any(name.startswith("model.layers.") for name in collected.trace.taps)
    if first is None and (report.verdict != "fails" and not hidden):
        return None
    if first is not None and first.place and not first.defect_here:
        return None
    found = explained(model, collected.trace, collected.nearest_policy(), name, alone, step)
    return found if found is not None and (found.causes or report.verdict == "fails") else None
