"""How a torch module calls what refllm names: a map from the names of `refllm.forward.taps` to places in the module.

A map is a JSON object, `{i}` is the number of a layer:

    {
      "model.embed_tokens": "transformer.wte",
      "model.layers.{i}.self_attn.q_proj": "transformer.h.{i}.attn.qkv, q of q k v",
      "model.layers.{i}.self_attn.context": "input of transformer.h.{i}.attn.proj",
      "rotation": "apply_rope",
      "model.norm": null
    }

A place is the path of a module, for what it returns; `input of` one, for what it is given; or a part of a fused
projection, which holds its parts after one another or `in groups`: for q k v by key/value heads (the queries of one
group, its key, its value, the next group), for gate up alternately. A list has alternatives, of which the first counts
that the module has. `rotation` names functions of the module's own files, or parts of it, which are given queries and
keys and return them rotated. What is null is not shown. Two maps are shipped (`names/`); what a map leaves out is
looked for in the module's weights (`refllm.check.adapters.torch_guess`).
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refllm.config import ModelConfig
from refllm.errors import InputError
from refllm.forward.taps import axes_of_values, sizes_of_axes

ROTATION = "rotation"
"""The key of what rotates."""
_PLACE = re.compile(r"(?:(input) of )?([^\s,]+)(?:, (\w+) of ([\w ]+?)( in groups)?)?")
_FUSED = ({"q", "k", "v"}, {"gate", "up"})
_BACKBONE = re.compile(r"^model\.")


@dataclass(frozen=True)
class Place:
    """Where a value is seen. path: of a module. side: "output" or "input". channels: which of the last axis, in order;
    None all."""

    path: str
    side: str = "output"
    channels: np.ndarray | None = field(default=None, compare=False)


@dataclass
class Names:
    """The places of the values that are known, by their full names, and the functions and parts that rotate. heads: of
    queries, and of keys. said: which map it is. notes: sentences on what was not found."""

    places: dict[str, Place] = field(default_factory=dict)
    rotations: tuple[str, ...] = ()
    heads: tuple[int, int] = (0, 0)
    said: str = ""
    notes: list[str] = field(default_factory=list)


def shipped(name: str) -> dict[str, Any]:
    """A map that comes with refllm, "transformers" or "litgpt"."""
    text = (Path(__file__).parent / "names" / f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def fits(written: Mapping[str, Any], modules: Mapping[str, Any]) -> bool:
    """Whether a module is laid out as a shipped map says: it has the embedding and the parts of layer 0."""
    asked = ("model.embed_tokens", "model.layers.{i}", "model.layers.{i}.self_attn.q_proj", "model.layers.{i}.mlp.act")
    return all(_first(written[name], 0, modules) is not None for name in asked)


def resolve(
    written: Mapping[str, Any],
    modules: Mapping[str, Any],
    config: ModelConfig,
    head: str,
    where: str = "",
) -> Names:
    """The map with the paths of a module's layers. where: what to call a map whose every path has to be there; "" one
    of which the module may have a part. Raises InputError for a value or a path that there is none of."""
    values = axes_of_values(config, head)
    sizes, layers = sizes_of_axes(config, head), config.num_hidden_layers
    names = Names(rotations=tuple(_listed(written.get(ROTATION))), heads=(sizes["H"], sizes["K"]))
    for key, place in written.items():
        if key == ROTATION:
            continue
        numbers: Iterable[int] = range(layers) if "{i}" in key else (0,)
        for i in numbers:
            name = key.replace("{i}", str(i))
            if name not in values:
                if where:
                    raise InputError(f"{where}: {_no_value(key, values)}")
                continue
            found = _first(place, i, modules, where)
            if found is not None:
                names.places[name] = _with_channels(found, config, where)
            elif where and place is not None:
                raise InputError(f"{where}: {name}: {_no_module(_listed(place), i, modules)}")
    return names


@dataclass(frozen=True)
class _Written:
    """A place as it is written."""

    path: str
    side: str
    part: str
    order: tuple[str, ...]
    groups: bool


def _first(place: Any, layer: int, modules: Mapping[str, Any], where: str = "") -> _Written | None:
    """The first of several places that the module has."""
    for text in _listed(place):
        match = _PLACE.fullmatch(text)
        if match is None:
            raise InputError(f"{where}: {text!r} is no place: expected PATH, 'input of PATH' or 'PATH, q of q k v'")
        side, path, part, order, groups = match.groups()
        path = path.replace("{i}", str(layer))
        for tried in (path, _BACKBONE.sub("", path)):
            if modules.get(tried) is not None:
                return _Written(tried, side or "output", part or "", tuple((order or "").split()), bool(groups))
    return None


def _with_channels(place: _Written, config: ModelConfig, where: str) -> Place:
    if not place.part:
        return Place(place.path, place.side)
    if place.part not in place.order or set(place.order) not in _FUSED or len(place.order) > 3:
        words = "q k v, in any order, or gate and up"
        said = f"{place.part} of {' '.join(place.order)}"
        raise InputError(f"{where}: {place.path}, {said!r}: the parts of a fused projection are {words}")
    return Place(place.path, place.side, channels(place.part, place.order, place.groups, config))


def channels(part: str, order: tuple[str, ...], groups: bool, config: ModelConfig) -> np.ndarray:
    """[n] int: which outputs of a fused projection are those of one part."""
    sizes = sizes_of_axes(config, "base")
    H, K, D, F = (sizes[axis] for axis in "HKDF")
    width = {"q": H * D, "k": K * D, "v": K * D, "gate": F, "up": F}
    many = 1 if not groups else K if part in "qkv" else F
    whole = sum(width[name] for name in order) // many
    before = sum(width[name] for name in order[: order.index(part)]) // many
    within = np.arange(width[part] // many) + before
    return np.asarray((np.arange(many)[:, None] * whole + within).reshape(-1))


def not_found(names: Iterable[str]) -> list[str]:
    """What to say of values that have no place: a sentence, or none."""
    short = dict.fromkeys(re.sub(r"^model\.(layers\.\d+\.)?", "", name) for name in names)
    return [f"not found: {', '.join(short)}; --names F.json tells where they are"] if short else []


def template(name: str) -> str:
    """ "model.layers.3.mlp.act" -> "model.layers.{i}.mlp.act"."""
    return re.sub(r"\.\d+", ".{i}", name)


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _no_value(key: str, values: Iterable[str]) -> str:
    known = list(dict.fromkeys(map(template, values)))
    close = difflib.get_close_matches(key, known, 2, 0.4)
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{key!r} is no name of a value of this model{meant}"


def _no_module(texts: list[str], layer: int, modules: Mapping[str, Any]) -> str:
    path = (_PLACE.fullmatch(texts[0]) or [""] * 3)[2].replace("{i}", str(layer))
    close = difflib.get_close_matches(path, [name for name in modules if name], 3, 0.4)
    meant = f"; there are {', '.join(map(repr, close))}" if close else ""
    return f"the module has no part {path!r}{meant}"
