"""Where a candidate rounds, over all layers: the profile of every operator, and the layers that differ.

An implementation runs the same code in every layer, so an operator has one profile. Where one layer has another, that
layer is different: a finding, though the profile may be an honest one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from refllm.accuracy.limits import CONTEXT_EXACTLY, CONTEXT_FAR_WORSE, CONTEXT_NEARLY
from refllm.accuracy.profiles import ONCE, Profile, in_words, most, of_policy
from refllm.accuracy.propagation import BLOCKS, ONE_CHAIN, ONE_PASS
from refllm.accuracy.readings import AS_IT_IS, READ_BESIDE, in_no_certain_way
from refllm.accuracy.readings import in_words as readings_in_words
from refllm.accuracy.recognise import Recognition
from refllm.check import formulas
from refllm.precision import HF_EAGER

_ORDERS = ("", BLOCKS, ONE_CHAIN, ONE_PASS)


@dataclass(frozen=True)
class Habit:
    """What one operator does. values: the short names of its values; "" all that have this operator. words: the
    profile. expected: that of Transformers' eager code, where it is another."""

    operator: str
    values: str
    words: str
    expected: str = ""

    def __str__(self) -> str:
        where = self.operator if not self.values else f"{self.operator} ({self.values})"
        return f"{where}: {self.words}" + (f" (Transformers: {self.expected})" if self.expected else "")


@dataclass(frozen=True)
class Record:
    """What was recognised, value by value. narrow: whether the format is one in which it can be. kinds: of
    `refllm.check.asked`. reads: product -> what it reads in place of its input."""

    narrow: bool
    kinds: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, Recognition] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Profile] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, operator: str, found: Recognition) -> None:
        """What a value has shown."""
        self.found[name], self.operators[name] = found, operator

    def forget(self, name: str) -> None:
        """A value is judged elsewhere."""
        self.found.pop(name, None)
        self.operators.pop(name, None)
        self.reads.pop(name, None)

    def keep_order(self, name: str, operator: str, profile: Profile) -> None:
        """What float32 has to say: the order of sums that fits, the one of the largest error over the layers; and what
        a product reads."""
        key, self.operators[name] = formulas.short(name), operator
        self.reads[name], profile = profile.inputs, replace(profile, inputs=AS_IT_IS)
        self.orders[key] = larger(self.orders.get(key, profile), profile)

    def readings(self, name: str) -> tuple[str, ...]:
        """What the product of that name may read in place of its input; first what one with such a weight did."""
        kind = self.kinds.get(name, "")
        before = [reading for other, reading in self.reads.items() if self.kinds.get(other) == kind]
        return tuple(dict.fromkeys((*before[-1:], *READ_BESIDE.get(kind, (AS_IT_IS,)))))

    def _in_float32(self, name: str) -> Profile | None:
        """A profile; of a product that was not shown, or holds in no way, with the reading that rounds most."""
        rounded = in_no_certain_way(READ_BESIDE.get(self.kinds.get(name, ""), (AS_IT_IS,))[-1])
        order, reads = self.orders.get(formulas.short(name)), self.reads.get(name, rounded)
        return replace(order or ONCE, inputs=reads) if reads else order

    def tried_first(self, name: str) -> tuple[Profile, ...]:
        """The profiles that earlier layers had, the most frequent first."""
        counts = Counter(p for r in self._of(formulas.short(name)) for p in r.fits[:1])
        return tuple(profile for profile, _ in counts.most_common())

    def profile_of(self, name: str, operator: str) -> Profile | None:
        """That of a value over all layers, else of another one of the same operator; None if nothing was recognised."""
        short = formulas.short(name)
        if not self.narrow:
            return self._in_float32(name)
        found = self._common(short)
        if found is None and operator != "linear":
            others = {formulas.short(n) for n, o in self.operators.items() if o == operator}
            found = next((p for other in sorted(others) if (p := self._common(other)) is not None), None)
        here = self.found.get(name)
        return (
            replace(found, stored=here.fits[0].stored)
            if found is not None and here is not None and here.fits
            else found
        )

    def another(self, name: str) -> Profile | None:
        """The profile of a value that is not that of the same value in most layers."""
        here, common = self.found[name], self._common(formulas.short(name))
        if not here.fits or common is None or any(replace(p, stored=common.stored) == common for p in here.fits):
            return None  # whether a value is stored or handed on in float32, compilers decide node by node
        if self.operators[name] == "attention" and max(here.mismatch, self._usual_mismatch(name)) > CONTEXT_EXACTLY:
            return None  # nothing that is told by the best of several approximate agreements
        return here.fits[0]

    def unrecognised(self, name: str) -> bool:
        """Whether a value fits no profile; of a context, whether it does so far worse than in the other layers."""
        here = self.found.get(name)
        if here is not None and self.operators[name] == "attention":
            return here.asked and here.mismatch > CONTEXT_FAR_WORSE and self._usual_mismatch(name) <= CONTEXT_NEARLY
        return here is not None and here.asked and not here.fits

    def _usual_mismatch(self, name: str) -> float:
        """The median over the other layers; 1 where there are none."""
        short = formulas.short(name)
        others = [r.mismatch for n, r in self.found.items() if formulas.short(n) == short and n != name and r.asked]
        return float(np.median(others)) if others else 1.0

    def nowhere(self, name: str) -> bool:
        """Whether no layer fits any profile: it rounds in a place that nobody listed, rather than wrongly in one layer.
        What there is but once is compared with the other values of its operator."""
        alike = self._of(formulas.short(name))
        if len(alike) == 1:
            alike = [r for n, r in self.found.items() if self.operators[n] == self.operators[name]]
        return self.operators[name] != "attention" and all(r.asked and not r.fits for r in alike)

    def unknown_places(self) -> list[tuple[str, str]]:
        """(values, words) of what rounds in a place that no profile has, in every layer."""
        found = dict.fromkeys(formulas.short(name) for name in self.found if self.nowhere(name))
        words = "rounds in a place that is not known, in every layer; judged by the largest error of honest code"
        return [(", ".join(found), words)] if found else []

    def split_products(self) -> list[tuple[str, int]]:
        """(values, parts) of the products that are sums of products of parts, each rounded."""
        parts: dict[int, list[str]] = {}
        for short in dict.fromkeys(formulas.short(name) for name in self.found):
            profile = self._common(short)
            if profile is not None and profile.parts.count > 1:
                parts.setdefault(profile.parts.count, []).append(short)
        return [(", ".join(values), n) for n, values in parts.items()]

    def _of(self, short: str) -> list[Recognition]:
        return [r for n, r in self.found.items() if formulas.short(n) == short]

    def _common(self, short: str, rather: Profile | None = None) -> Profile | None:
        """The profile that fits in most layers; of those that do, `rather` if it is one."""
        counts: Counter[Profile] = Counter()
        for recognition in self._of(short):
            counts.update(recognition.fits)
        if not counts:
            return None
        first = Counter(r.fits[0] for r in self._of(short) if r.fits)
        return min(counts, key=lambda p: (-counts[p], p != rather, -first[p], p.size()))

    def habits(self, not_rounded: frozenset[str], exact_scale: bool) -> list[Habit]:
        """A line per operator, or per value where they differ. not_rounded: of the family's page. exact_scale: scores
        are scaled by a power of two, which rounds nothing."""
        by_operator: dict[str, dict[str, list[str]]] = {}
        policy = HF_EAGER.without(not_rounded)

        def said_of(operator: str, profile: Profile) -> str:
            if operator == "attention" and exact_scale:
                profile = replace(profile, points=profile.points - {"scores"})
            return in_words(operator, profile)

        for short, operator in {formulas.short(n): o for n, o in self.operators.items()}.items():
            profile = self._common(short, of_policy(operator, policy)) if self.narrow else self.orders.get(short)
            if profile is None or not (words := said_of(operator, profile)):
                continue
            if self.narrow or profile != ONCE:
                by_operator.setdefault(operator, {}).setdefault(words, []).append(short)
        for name, reading in self.reads.items():
            if reading:
                values = by_operator.setdefault("linear", {}).setdefault(readings_in_words(reading), [])
                values += [] if formulas.short(name) in values else [formulas.short(name)]
        said = []
        for operator, found in by_operator.items():
            eager = said_of(operator, of_policy(operator, policy)) if self.narrow else ""
            usual = max(found, key=lambda words: len(found[words]))
            for words, values in found.items():
                where = "" if (words == usual and len(found[words]) > 1) or len(found) == 1 else ", ".join(values)
                said.append(Habit(operator, where, words, eager if eager != words else ""))
        return said


def larger(one: Profile, other: Profile) -> Profile:
    """The one of two orders of float32 sums with the larger error."""
    return other if _rank(other) > _rank(one) else one


def _rank(profile: Profile) -> tuple[bool, int]:
    return profile.tf32, _ORDERS.index(profile.order)


def chosen(found: Profile | None, operator: str, narrow: bool) -> Profile:
    """found, or what errs most of what is admissible."""
    if found is not None:
        return found
    return most(operator) if narrow else ONCE
