"""Values as other programs lay them out, brought to the shapes of `refllm.forward.taps`.

Serving engines flatten a batch into tokens, training code puts the sequence first, kernels keep heads after the
sequence, repeat keys and values, fuse projections and pad the vocabulary; a GGUF file has the rows of q and k in
another order. None of this is mathematics. Where shapes tell what a value is, it is taken for that and said in a note.
Where they do not (a batch as long as its sequence), the words of `LAYOUTS` decide.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.check import formulas
from refllm.check.inputs import Inputs
from refllm.config import ModelConfig
from refllm.config.traits import traits_of
from refllm.errors import InputError
from refllm.forward.taps import axes_of_values, sizes_of_axes
from refllm.models.own_page import current

LAYOUTS = {
    "tokens": "the tokens of all sequences after one another, [B*S, ...], or only those that are no padding",
    "SBE": "the sequence before the batch, [S, B, ...]",
    "BSHD": "heads after the sequence, [B, S, heads, D]",
    "BHSD": "heads before the sequence, [B, heads, S, D]",
    "gguf": "the rows of q and k as a GGUF file has them: dims i and i + D/2 of a head side by side",
    "grouped-qkv": "a fused qkv_proj by key/value heads: the queries of a group, its key, its value, the next group",
}
"""The words of `--layout` and of a trace's metadata."""

_GROUP = re.compile(r"\(([^)]*)\)|(\S)")
_STREAM = ("B S n", "S B n", "(B S) n", "1 (B S) n")
_HEADS = ("B h S D", "B S h D", "S B h D", "(B S) h D", "1 (B S) h D", "h (B S) D")
_MERGED = ("B S (h D)", "S B (h D)", "(B S) (h D)", "1 (B S) (h D)")
_SCORES = ("B h S T", "h (B S) T")
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_ORDERED_BY_GGUF = ("q_proj", "k_proj", "q_rope", "k_rope")
_NAMED_AT_MOST = 4
_HEAD = "lm_head"

Taps = dict[str, np.ndarray]


@dataclass(frozen=True)
class Laid:
    """Values in the shapes of the vocabulary. notes: sentences on what was not shown so. doubts: sentences on what the
    shapes do not tell, for a reader whose values do not hold. last_alone: the logits are those of the last token of
    every sequence, [B, 1, V]."""

    taps: Taps
    notes: list[str]
    doubts: list[str]
    last_alone: bool = False


@dataclass(frozen=True)
class _Reading:
    """One way to read a shape. pattern: the axes as they are shown. sizes: of these axes; they differ from the model's
    where the vocabulary is padded, heads are repeated, or only the rotated dims are shown."""

    pattern: str
    sizes: dict[str, int]

    @property
    def words(self) -> set[str]:
        """The words of `LAYOUTS` that ask for it."""
        groups = groups_of(self.pattern)
        of_batch = {"tokens"} if ["B", "S"] in groups else {"SBE"} if groups[0] == ["S"] else set()
        if ["h"] not in groups:
            return of_batch
        sequence = next(i for i, group in enumerate(groups) if "S" in group)
        return of_batch | {"BSHD" if groups.index(["h"]) > sequence else "BHSD"}

    @property
    def order(self) -> list[str]:
        """The axes that have a length, in the order in which their numbers lie."""
        return [axis for axis in _axes(self.pattern) if self.sizes.get(axis, 1) != 1]


def words_of(text: str, where: str) -> tuple[str, ...]:
    """The layouts in a text like "tokens, gguf". Raises InputError for a word that there is none of."""
    words = tuple(word for word in re.split(r"[,\s]+", text) if word)
    for word in words:
        if word not in LAYOUTS:
            raise InputError(f"{where}: layout {word!r} is not known; use {', '.join(LAYOUTS)}")
    return words


def laid_out(
    taps: Taps,
    config: ModelConfig,
    head: str,
    inputs: Inputs,
    layout: Iterable[str] = (),
    source: str = "the candidate",
) -> Laid:
    """The values that somebody shows of a run of `inputs`, in the shapes that the model's page has. layout: words of
    `LAYOUTS`, where the shapes do not tell. A name that the model does not have is left as it is. Raises InputError,
    with what would fit, for a shape that is none.
    """
    notes: list[str] = []
    work = _Work(config, head, inputs, frozenset(layout), source)
    taps = work.split(taps, notes)
    last = work.of_last_tokens(taps.get(_HEAD))
    if last is not None:
        taps = {name: value for name, value in taps.items() if name != _HEAD}
        notes.append(f"{_HEAD}: of the last token of each sequence alone, judged for it; of the others it is not known")
    all_readings = {name: work.readings(name, value) for name, value in taps.items() if name in work.axes}
    readings = {name: found for name, found in all_readings.items() if found}
    work.decide(readings.values())
    laid: Taps = {}
    shown: dict[str, list[str]] = {}
    for name in filter(readings.__contains__, work.axes):
        reading = work.chosen(readings[name])
        laid[name] = work.taken(name, taps[name], reading)
        said = work.said(name, reading)
        if said:
            shown.setdefault(said, []).append(name)
    laid |= {name: value for name, value in taps.items() if name not in readings}
    laid |= {} if last is None else {_HEAD: last}
    notes += [f"{_listed(names)}: {said}" for said, names in shown.items()]
    notes += work.in_order(laid)
    return Laid(laid, notes, work.doubts(readings.values()), last is not None)


def put_together(parts: list[np.ndarray], lengths: list[int], batch: int) -> np.ndarray | None:
    """A value that was shown part after part along the sequence, as a cache is filled; None for what is none.

    lengths: how many positions the calls had; the parts may be shorter, if together they are as many.
    """
    parts = [part[None] for part in parts] if parts[0].ndim == 1 else parts  # one token each
    by_axis = {axis: [part.shape[axis] for part in parts if part.ndim >= -axis] for axis in (-2, -3, -4)}
    for axis, found in by_axis.items():  # [B, S, n] and [B, heads, S, D]; [B*S, heads, D]; [S, B, heads, D]
        if found == lengths or (len(found) == len(parts) and sum(found) == sum(lengths)):
            return _joined(parts, axis)
    if all(len(part) % batch == 0 for part in parts) and sum(map(len, parts)) == batch * sum(lengths):
        return _joined([part.reshape(batch, -1, *part.shape[1:]) for part in parts], 1)  # flattened, call by call
    return None


def _joined(parts: list[np.ndarray], axis: int) -> np.ndarray | None:
    try:
        return np.concatenate(parts, axis=axis)
    except ValueError:
        return None


class _Work:
    """What the layouts of one run are read with."""

    def __init__(self, config: ModelConfig, head: str, inputs: Inputs, layout: frozenset[str], source: str) -> None:
        self.config, self.layout, self.source, self.valid = config, layout, source, inputs.valid
        self.axes = axes_of_values(config, head)
        B, S = inputs.input_ids.shape
        self.sizes = sizes_of_axes(config, head) | {"B": B, "S": S, "T": S, "1": 1}
        self.usual: set[str] = set()

    # ------------------------------------------------------------------------------------------------- fused values

    def split(self, taps: Taps, notes: list[str]) -> Taps:
        """The values with fused projections taken apart."""
        out: Taps = {}
        for name, value in taps.items():
            parts = self._parts(name, value)
            for part, of in parts.items():
                if part in out or (part in taps and part != name):
                    raise InputError(f"{self.source}: {part} is shown twice, alone and in {name}; show it once")
                out[part] = of
        fused = dict.fromkeys(formulas.short(name) for name in taps if self._fused(name))
        notes += [f"{name}: split into {', '.join(_FUSED[name])}" for name in fused]
        return out

    def _fused(self, name: str) -> list[str]:
        """The names of what a fused projection holds; [] for one that this model has no place for."""
        at, _, last = name.rpartition(".")
        parts = [f"{at}.{part}" for part in _FUSED.get(last, ())]
        return parts if name not in self.axes and all(part in self.axes for part in parts) else []

    def _parts(self, name: str, value: np.ndarray) -> Taps:
        parts, last = self._fused(name), formulas.short(name)
        if not parts:
            return {name: value}
        H, K, D = (self.sizes[axis] for axis in "HKD")
        widths = [H * D, K * D, K * D] if last == "qkv_proj" else [self.sizes["F"]] * 2
        if value.shape[-1:] != (sum(widths),):
            raise InputError(
                f"{self.source}: {name} has shape {list(value.shape)}, expected {sum(widths)} channels, "
                f"{' + '.join(map(str, widths))} of {', '.join(_FUSED[last])}; show these one by one"
            )
        if last == "qkv_proj" and "grouped-qkv" in self.layout:
            groups = value.reshape(*value.shape[:-1], K, H // K + 2, D)
            pieces = [groups[..., : H // K, :], groups[..., H // K, :], groups[..., H // K + 1, :]]
            return {p: v.reshape(*value.shape[:-1], -1) for p, v in zip(parts, pieces, strict=True)}
        edges = np.cumsum(widths)[:-1]
        return dict(zip(parts, np.split(value, edges, axis=-1), strict=True))

    # ------------------------------------------------------------------------------------------------------- shapes

    def of_last_tokens(self, logits: np.ndarray | None) -> np.ndarray | None:
        """Logits [B, V], [B, 1, V] or, of one sequence, [V], as [B, 1, V]; None for what is not these."""
        B, S, V = (self.sizes.get(axis, 0) for axis in "BSV")
        if logits is None or S == 1 or _HEAD not in self.axes or not logits.ndim or logits.shape[-1] < V:
            return None
        fits = logits.shape[:-1] in ((B, 1), (B,), *([()] if B == 1 else []))
        tokens = int(self.valid.sum())
        return logits.reshape(B, 1, -1)[..., :V] if fits and tokens > B else None

    def readings(self, name: str, value: np.ndarray) -> list[_Reading]:
        """The ways to read a value's shape, the vocabulary's own first. Where there is none: InputError, or [] for a
        family from outside, whose page may have other shapes."""
        for shape in (value.shape, self._unpacked(value.shape)):
            for sizes in self._sizes(name, shape):
                found: list[_Reading] = []
                for pattern in _patterns(self.axes[name]):
                    reading = _Reading(pattern, sizes)
                    if shape == _shape(pattern, sizes) and all(reading.order != other.order for other in found):
                        found.append(reading)
                if found:
                    return found
        if current():
            return []
        raise InputError(self._no_shape(name, value.shape))

    def _unpacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with padding where only the other tokens are shown, one after another."""
        at = self._packed_axis(shape)
        return shape if at is None else (*shape[:at], self.valid.size, *shape[at + 1 :])

    def _packed_axis(self, shape: tuple[int, ...]) -> int | None:
        """The axis that counts the tokens that are no padding, where there is some; None if there is none."""
        tokens = int(self.valid.sum())
        if tokens == self.valid.size:
            return None
        return next((i for i in (0, 1) if shape[i : i + 1] == (tokens,) and shape[:i] in ((), (1,))), None)

    def _sizes(self, name: str, shape: tuple[int, ...]) -> list[dict[str, int]]:
        """The lengths of axes to try: the model's own, and those that take no guess to be told apart."""
        names = _axes(self.axes[name])
        own = {axis: self.sizes[axis] for axis in (*names, "B", "S", "1")}
        heads = next((axis for axis in "HK" if axis in names), "")
        if heads:
            own["h"] = self.sizes[heads]
        elif names[-1] in "EFVC":
            own["n"] = self.sizes[names[-1]]
        found = [own]
        rotary = getattr(self.config, "rotary_dim", None)
        if name.endswith("_rope") and rotary is not None and rotary < self.sizes["D"]:
            found.append(own | {"D": rotary})
        if heads == "K" and self.sizes["K"] < self.sizes["H"]:
            found += [sizes | {"h": self.sizes["H"]} for sizes in list(found)]
        if name == "lm_head" and shape and shape[-1] > self.sizes["V"]:
            found.append(own | {"n": shape[-1]})
        return found

    def decide(self, readings: Iterable[list[_Reading]]) -> None:
        """Finds the layout that the values have which leave no choice."""
        votes: Counter[str] = Counter()
        for found in readings:
            if len(found) == 1:
                votes.update(found[0].words)
        for words in (("SBE", "tokens"), ("BHSD", "BSHD")):
            most = max(words, key=lambda word: votes[word])
            self.usual |= {most} if votes[most] else set()

    def chosen(self, found: list[_Reading]) -> _Reading:
        """The reading that was named; else the one that the other values have; else the vocabulary's own."""
        return max(found, key=lambda r: (len(r.words & self.layout), len(r.words & self.usual), -found.index(r)))

    def taken(self, name: str, value: np.ndarray, reading: _Reading) -> np.ndarray:
        """The value in the vocabulary's shape."""
        axes = self.axes[name]
        shape, sizes = _shape(reading.pattern, reading.sizes), reading.sizes
        if value.shape != shape:
            value = self._with_padding(value, shape)
        target = _general(axes)
        if reading.pattern != target:
            value = _arranged(value, reading.pattern, target, sizes)
        if self._repeated(name, reading):
            value = self._once(name, value, "(" in axes)
        return value[..., : self.sizes["V"]] if name == "lm_head" else value

    def _with_padding(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        at = self._packed_axis(value.shape)
        assert at is not None
        out = np.zeros(shape, value.dtype)
        out[(slice(None),) * at + (self.valid.reshape(-1),)] = value
        return out

    def _repeated(self, name: str, reading: _Reading) -> bool:
        """Whether there are as many key/value heads as query heads, though the model has fewer."""
        return "K" in _axes(self.axes[name]) and reading.sizes["h"] > self.sizes["K"]

    def _once(self, name: str, value: np.ndarray, side_by_side: bool) -> np.ndarray:
        """Keys or values, or what they are made of, that are repeated to the number of query heads: one of each."""
        H, K, D = (self.sizes[axis] for axis in "HKD")
        heads = value.reshape(*value.shape[:2], H, D).swapaxes(1, 2) if side_by_side else value
        for repeated in (True, False):
            parts = (K, H // K) if repeated else (H // K, K)
            split = heads.reshape(len(heads), *parts, *heads.shape[2:])
            split = split if repeated else split.swapaxes(1, 2)
            once = split[:, :, 0]
            if np.array_equal(split, np.broadcast_to(once[:, :, None], split.shape), equal_nan=True):
                return once.swapaxes(1, 2).reshape(*value.shape[:2], K * D) if side_by_side else once
        raise InputError(
            f"{self.source}: {name} has {H} heads, expected {K}, and they are not {K} that are repeated; show the "
            f"{K} key/value heads"
        )

    # ---------------------------------------------------------------------------------------------------- sentences

    def said(self, name: str, reading: _Reading) -> str:
        """What to say of a value that is not shown as the vocabulary has it; "" where it is."""
        said = [] if reading.pattern == _general(self.axes[name]) else [f"shown as {_spoken(reading.pattern)}"]
        if name == "lm_head" and reading.sizes["n"] > self.sizes["V"]:
            said.append(f"{reading.sizes['n'] - self.sizes['V']} columns of padding after the vocabulary, left out")
        if self._repeated(name, reading):
            said.append(f"repeated to {self.sizes['H']} heads, one of each {self.sizes['H'] // self.sizes['K']} taken")
        return ", ".join(said)

    def doubts(self, readings: Iterable[list[_Reading]]) -> list[str]:
        """What was decided without a reason, in one sentence for the batch and one for the heads."""
        found: dict[str, str] = {}
        for each in readings:
            taken = self.chosen(each)
            for other in each:
                for word in other.words - taken.words - self.layout - {"tokens"}:
                    if not self.usual & _excluded(word):
                        found[word] = self._doubt(word, taken, other)
        return list(found.values())

    def _doubt(self, word: str, taken: _Reading, other: _Reading) -> str:
        S = self.sizes["S"]
        why = f"B = S = {S}" if word == "SBE" else f"as many heads as tokens, {S}"
        shapes = f"{_spoken(taken.pattern)} from {_spoken(other.pattern)}"
        return f"the shapes do not tell {shapes} ({why}): say --layout {word} if it is that"

    def in_order(self, taps: Taps) -> list[str]:
        """Puts the rows of q and k in the page's order, in place, where the layout says that they are a GGUF file's."""
        if "gguf" not in self.layout:
            return []
        if traits_of(self.config).interleaved:
            raise InputError(
                f"{self.source}: layout gguf: the rows of {self.config.model_type} are not reordered there"
            )
        for name in taps:
            if name.endswith(_ORDERED_BY_GGUF) and taps[name].shape[-1] % self.sizes["D"] == 0:
                taps[name] = taps[name][..., gguf_order(taps[name].shape[-1], self.sizes["D"])]
        return [f"{', '.join(_ORDERED_BY_GGUF)}: rows in the order of a GGUF file, as the layout says, put in order"]

    def _no_shape(self, name: str, shape: tuple[int, ...]) -> str:
        own = self._sizes(name, shape)[0]
        expected, *others = [(list(_shape(p, own)), p) for p in _patterns(self.axes[name])]
        fitting = dict.fromkeys(f"{size} ({_spoken(p)[1:-1]})" for size, p in others if size != expected[0])
        return (
            f"{self.source}: {name} has shape {list(shape)}, expected {expected[0]} ({_spoken(expected[1])[1:-1]}), or "
            f"{', '.join(list(fitting)[:_NAMED_AT_MOST])}; show it so, or leave it out"
        )


def no_name(source: str, foreign: Sequence[str], known: Iterable[str]) -> str:
    """The sentence on names that are none of this model, with the nearest ones."""
    known = list(known)
    close = difflib.get_close_matches(foreign[0], known, 3) or _alike(foreign[0], known)
    meant = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    said = f"{foreign[0]!r} is no name of a value of this model ({len(foreign)} such names)"
    return f"{source}: {said}{meant}" + (
        "" if meant else "; refllm trace CHECKPOINT --inputs-only -o F writes the names and shapes"
    )


def _alike(name: str, known: list[str]) -> list[str]:
    """Names that end as this one does, in the same layer if it has one."""
    last = name.rpartition(".")[2]
    number = re.search(r"\d+", name)
    ends = [k for k in known if k.endswith(f".{last}")]
    return [k for k in ends if number is None or f".{number[0]}." in k][:1]


def gguf_order(width: int, head_dim: int) -> np.ndarray:
    """[width] int: where in a row of q or k, of whole heads, as a GGUF file orders it, each of the page's channels is.

    llama.cpp rotates pairs of neighbours, so the converter puts dims i and i + D/2 of a head side by side.
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return np.asarray((np.arange(0, width, head_dim)[:, None] + within).reshape(-1))


def _patterns(axes: str) -> tuple[str, ...]:
    if axes.endswith("T"):
        return _SCORES
    if "(" in axes:
        return _MERGED + _HEADS[1:2] + _HEADS[:1] + _HEADS[2:]
    return _HEADS + _MERGED if axes.split()[1] in "HK" else _STREAM


def _general(axes: str) -> str:
    """The pattern of `_patterns` that is the vocabulary's own."""
    return _patterns(axes)[0]


def groups_of(pattern: str) -> list[list[str]]:
    """The axes of a pattern like "B S (H D)", those that lie in one together."""
    return [(match[1] or match[2]).split() for match in _GROUP.finditer(pattern)]


def _axes(pattern: str) -> list[str]:
    return [axis for group in groups_of(pattern) for axis in group if axis != "1"]


def _shape(pattern: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups_of(pattern))


def _arranged(value: np.ndarray, pattern: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    """The value with its axes taken apart as the pattern says, and put together as the target says."""
    axes = _axes(pattern)
    apart = value.reshape([sizes[axis] for axis in axes])
    moved = apart.transpose([axes.index(axis) for axis in _axes(target)])
    return moved.reshape(_shape(target, sizes))


def _spoken(pattern: str) -> str:
    """ "[B*S, heads, D]"."""
    words = {"h": "heads", "n": "n"}
    groups = ["*".join(words.get(axis, axis) for axis in group) for group in groups_of(pattern)]
    return f"[{', '.join(groups)}]"


def _excluded(word: str) -> set[str]:
    """The words of the layouts that one excludes, and itself."""
    return {"SBE", "tokens"} if word in ("SBE", "tokens") else {"BSHD", "BHSD"}


def _listed(names: list[str]) -> str:
    """The short names, once each."""
    short = list(dict.fromkeys(formulas.short(name) for name in names))
    more = f" and {len(short) - _NAMED_AT_MOST} more" if len(short) > _NAMED_AT_MOST else ""
    return ", ".join(short[:_NAMED_AT_MOST]) + more
