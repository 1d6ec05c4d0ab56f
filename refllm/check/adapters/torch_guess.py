"""Which part of a torch module makes which value, found in its weights, whatever the parts are called.

A row of a weight is a fingerprint: where the rows of a module's weight are those of a tensor of the checkpoint, the
module makes that tensor's value. Fused projections, interleaved groups and permuted rows come out the same way, since
every row says which output channel it is. All layers vote, so that a layer with a wrong weight is looked at in the same
place as the others. What is no output of a module is the input of one: the context is what o_proj receives.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.check.adapters.torch_names import Names, Place
from refllm.check.taps import as_array
from refllm.config import ModelConfig
from refllm.forward.taps import axes_of_values

_COLUMNS = 16
"""So many numbers of a row tell it from all others."""
_ALMOST = 0.98
"""Share of a tensor's rows that a module has to have: rows may be equal, and the last of a vocabulary may be new."""
NO_PLACE = ("_rope", ".scores", ".probs")
"""What is no input or output of a part in most modules."""
_ROTATES = re.compile(r"(?!.*(half|freq|cache|build|compute|table|init|get)).*(rot|rope)", re.IGNORECASE)
"""Names of what may rotate heads; whether it does, its arguments and results tell."""
_HINTS = {
    "input_layernorm": r"(in|att|pre|1)",
    "post_attention_layernorm": r"(post|ff|mlp|2)",
    "self_attn.q_proj": r"(^|[._])(w?q|query)",
    "self_attn.k_proj": r"(^|[._])(w?k|key)",
    "self_attn.v_proj": r"(^|[._])(w?v|value)",
    "self_attn.o_proj": r"(att\w*|mixer)\..*(o|proj|dense)",
    "mlp.gate_proj": r"(gate|w1|fc_?1)",
    "mlp.up_proj": r"(up|w3|fc_?2)",
    "mlp.down_proj": r"(down|w2|(ff|mlp)\w*\..*proj)",
}
"""What the parts of a layer are called by many: the word where weights tell nothing."""
_INPUTS = {
    "self_attn.context": ("self_attn.o_proj",),
    "mlp.act": ("mlp.down_proj",),
    "residual_mid": ("post_attention_layernorm",),
    "input_layernorm": ("self_attn.q_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Value -> of which other's module it is the input, where no module is known that returns it."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A module with a weight. rows: [out, at most 16] numbers of it, or the vector of a norm as one row."""

    path: str
    table: bool
    shape: tuple[int, ...]
    rows: np.ndarray


@dataclass(frozen=True)
class _Found:
    """A part that has a tensor of the checkpoint. value: the name of what it makes."""

    value: str
    part: _Part
    channels: np.ndarray | None


def guess(module: Any, weights: Mapping[str, Any], config: ModelConfig, head: str) -> Names:
    """The places of values in a torch module. weights: the checkpoint's tensors by their page names, on the grid of the
    module's dtype."""
    parts = list(_parts(module))
    values = axes_of_values(config, head)
    tensors = {_value_of(name): name for name in _names(weights) if _value_of(name) in values}
    found = list(_matched(parts, tensors, weights))
    names = Names(rotations=rotating(module), said="found in its weights")
    names.places |= _outside(found, parts, tensors, weights, names.notes)
    layers = _Layers(config.num_hidden_layers, {part.path: part for part in parts}, names.notes)
    names.places |= layers.places(found, tensors, weights)
    names.places = {name: names.places[name] for name in values if name in names.places}
    _followed(names, values)
    names.places |= _blocks(names.places, config.num_hidden_layers)
    return names


def _names(weights: Any) -> list[str]:
    """The tensors, tied ones too."""
    return [*weights, *getattr(weights, "tied", ())]


def _value_of(tensor: str) -> str:
    """ "layers.0.mlp.up_proj.weight" -> the value that it makes; "" for a bias."""
    name, _, last = tensor.rpartition(".")
    if last != "weight":
        return ""
    return name if name in ("lm_head", "score", "qa_outputs") else f"model.{name}"


def _parts(module: Any) -> Iterator[_Part]:
    """The modules with one weight of their own, of one or two axes; other parameters of theirs have one axis."""
    for path, part in module.named_modules():
        own = [p.detach() for p in part.parameters(recurse=False)]
        tables = [p for p in own if p.ndim == 2]
        if path and own and len(tables) <= 1 and all(p.ndim <= 2 for p in own):
            weight = tables[0] if tables else own[0]
            rows = weight[:, :_COLUMNS] if tables else weight[None]
            embeds = "embed" in type(part).__name__.lower()
            yield _Part(path, embeds, tuple(weight.shape), as_array(rows))


def _keys(rows: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in np.asarray(rows[:, :_COLUMNS] + 0.0, np.float32)]  # -0 is 0


def _tensor_rows(tensor: np.ndarray) -> np.ndarray:
    return np.atleast_2d(tensor)


def _matched(parts: list[_Part], tensors: Mapping[str, str], weights: Mapping[str, Any]) -> Iterator[_Found]:
    """Which part has which tensor. One may have several, and two may have the same: vectors of ones, a tied head."""
    where: dict[tuple[int, bytes], list[tuple[int, int]]] = defaultdict(list)
    for number, part in enumerate(parts):
        for row, key in enumerate(_keys(part.rows)):
            where[len(part.shape), key].append((number, row))
    for value, name in tensors.items():
        tensor = np.asarray(weights[name])
        keys = _keys(_tensor_rows(tensor))
        places = [where.get((tensor.ndim, key), []) for key in keys]
        for number, count in Counter(number for there in places for number in {n for n, _ in there}).items():
            part = parts[number]
            if count >= _ALMOST * len(keys) and part.shape[1:] == tensor.shape[1:] and _kind(value, part):
                yield _Found(value, part, None if tensor.ndim == 1 else _channels(number, places, part))


def _kind(value: str, part: _Part) -> bool:
    """A table that is looked up is no head, and the other way round."""
    return part.table == (value == "model.embed_tokens")


def _channels(number: int, places: list[list[tuple[int, int]]], part: _Part) -> np.ndarray | None:
    """Which output channel of a part each row of a tensor is; None if they are all, in this order."""
    used: set[int] = set()
    rows = []
    for expected, there in enumerate(places):
        free = [row for n, row in there if n == number and row not in used]
        row = expected if expected in free or not free else free[0]
        used.add(row)
        rows.append(row)
    channels = np.array(rows)
    same = len(channels) == part.shape[0] and (channels == np.arange(len(channels))).all()
    return None if same else channels


def _outside(
    found: list[_Found], parts: list[_Part], tensors: Mapping[str, str], weights: Any, notes: list[str]
) -> dict[str, Place]:
    """The values outside the layers. Parts of layers stand in a numbered list. What has no weight of the checkpoint is
    the only part of that kind and shape."""
    places: dict[str, Place] = {}
    outside = [part for part in parts if not any(word.isdigit() for word in part.path.split("."))]
    for each in found:
        if _split(each.value)[0] < 0 and each.part in outside:
            places.setdefault(each.value, Place(each.part.path, channels=each.channels))
    for value, name in tensors.items():
        if _split(value)[0] < 0 and value not in places:
            shape = weights.shapes[weights.tied.get(name, name)]
            alike = [p for p in outside if p.shape[1:] == shape[1:] and len(p.shape) == len(shape) and _kind(value, p)]
            if len(alike) == 1:
                places[value] = Place(alike[0].path)
                notes.append(f"{alike[0].path}: its weight is not {value} in the checkpoint")
    return places


class _Layers:
    """The parts of the layers: what most of them agree on."""

    def __init__(self, count: int, parts: Mapping[str, _Part], notes: list[str]) -> None:
        self.count, self.parts, self.notes = count, parts, notes

    def places(self, found: list[_Found], tensors: Mapping[str, str], weights: Mapping[str, Any]) -> dict[str, Place]:
        """The places of the values in layers that have a weight."""
        votes: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
        of: dict[tuple[str, str, int], list[_Found]] = defaultdict(list)
        for each in found:
            layer, role = _split(each.value)
            for template, offset in _templates(each.part.path, layer) if role else ():
                votes[role][template, offset] += 1
                of[role, template, offset].append(each)
        roles = list(dict.fromkeys(role for value in tensors if (role := _split(value)[1])))
        chosen = {role: best for role in roles if (best := self._most(votes[role], votes, role)) is not None}
        self._by_name(chosen, roles, tensors, weights)
        places: dict[str, Place] = {}
        for role, (template, offset) in chosen.items():
            same = Counter(_as_bytes(each.channels) for each in of[role, template, offset])
            most = same.most_common(1)[0][0] if same else None
            matched = {_split(each.value)[0] for each in of[role, template, offset]}
            for layer in range(self.count):
                path = template.replace("{i}", str(layer + offset))
                if path not in self.parts:
                    continue
                channels = None if most is None else np.frombuffer(most, np.int64).copy()
                places[f"model.layers.{layer}.{role}"] = Place(path, channels=channels)
                if matched and layer not in matched:
                    self.notes.append(f"{path}: its weight is not {role} of layer {layer} in the checkpoint")
        return places

    def _most(
        self, votes: Counter[tuple[str, int]], others: Mapping[str, Counter[tuple[str, int]]], role: str
    ) -> tuple[str, int] | None:
        """The place that most layers vote for; None if another value is as likely there, or another place."""
        if not votes:
            return None
        (best, count), *rest = votes.most_common(2)
        if count <= self.count / 2 or (rest and rest[0][1] == count):
            return None
        rivals = [other for other, theirs in others.items() if other != role and theirs[best] >= count]
        return None if rivals and len(self.parts[self._path(best)].shape) == 1 else best

    def _path(self, place: tuple[str, int]) -> str:
        template, offset = place
        return next(p for i in range(self.count) if (p := template.replace("{i}", str(i + offset))) in self.parts)

    def _by_name(
        self, chosen: dict[str, tuple[str, int]], roles: list[str], tensors: Mapping[str, str], weights: Any
    ) -> None:
        """What no weight tells: a part of the right shape in every layer, the only one or the only one so called."""
        taken = {template for template, _ in chosen.values()}
        offset = next((offset for _, offset in chosen.values()), 0)
        numbered = Counter(t for path in self.parts for t, o in _templates(path, None) if o == 0)
        for role in roles:
            if role in chosen:
                continue
            shape = weights.shapes[tensors[f"model.layers.0.{role}"]]
            fitting = [
                template
                for template in numbered
                if template not in taken
                and numbered[template] == self.count
                and self.parts[self._path((template, offset))].shape == shape
            ]
            called = [t for t in fitting if re.search(_HINTS.get(role, "$^"), t.partition("{i}.")[2], re.IGNORECASE)]
            named = fitting if len(fitting) == 1 else called
            if len(named) == 1:
                chosen[role] = named[0], offset
                taken.add(named[0])
                by = "shape" if len(fitting) == 1 else "name"
                self.notes.append(f"{named[0]}: its weight is not {role} in the checkpoint; taken for it by its {by}")
            elif fitting:
                self.notes.append(f"{role} may be {' or '.join(named or fitting)}")


def _as_bytes(channels: np.ndarray | None) -> bytes | None:
    return None if channels is None else channels.astype(np.int64).tobytes()


def _split(value: str) -> tuple[int, str]:
    """ "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj"); (-1, "") for what is in no layer."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", value)
    return (int(match[1]), match[2]) if match else (-1, "")


def _templates(path: str, layer: int | None) -> Iterator[tuple[str, int]]:
    """The path with `{i}` in the place of each of its numbers in turn, and that number less the layer's."""
    words = path.split(".")
    for at, word in enumerate(words):
        if word.isdigit():
            yield ".".join([*words[:at], "{i}", *words[at + 1 :]]), 0 if layer is None else int(word) - layer


def _followed(names: Names, values: Mapping[str, str]) -> None:
    """The values that are what a known module is given."""
    for name in values:
        layer, role = _split(name)
        if name in names.places or (name != "model.norm" and role not in _INPUTS):
            continue
        heads = ("lm_head", "score", "qa_outputs")
        readers = heads if name == "model.norm" else [f"model.layers.{layer}.{r}" for r in _INPUTS[role]]
        reader = next((r for r in readers if r in names.places), None)
        if reader is not None and names.places[reader].side == "output":
            names.places[name] = Place(names.places[reader].path, "input")


def _blocks(places: Mapping[str, Place], count: int) -> dict[str, Place]:
    """The layers themselves: of each the smallest module that has all its parts, and none of another's."""
    paths: dict[int, set[str]] = defaultdict(set)
    for name, place in places.items():
        layer, role = _split(name)
        if role:
            paths[layer].add(place.path)
    found: dict[str, Place] = {}
    for layer in range(count):
        common = _common(paths[layer])
        foreign = any(path.startswith(f"{common}.") for other, ps in paths.items() if other != layer for path in ps)
        if common and not foreign:
            found[f"model.layers.{layer}"] = Place(common)
    return found


def _common(paths: set[str]) -> str:
    """The path of the module that has them all."""
    found: list[str] = []
    for words in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(words)) > 1:
            break
        found.append(words[0])
    return ".".join(found)


def rotating(module: Any) -> tuple[str, ...]:
    """What may rotate queries and keys, by its name: functions of the module's own files, and parts of it."""
    import inspect
    import sys

    files = {sys.modules.get(type(part).__module__) for part in module.modules()}
    own = [vars(file) for file in files if file is not None and not file.__name__.startswith("torch.")]
    functions = {name for names in own for name, f in names.items() if inspect.isfunction(f) and _ROTATES.match(name)}
    parts = [path for path, part in module.named_modules() if path and _ROTATES.match(type(part).__name__)]
    return (*sorted(functions), *parts)
