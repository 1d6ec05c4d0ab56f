"""What a hypothesis may change: the set-up of a page, from its config and tensors to what is made of its output.

    setup = Setup(model, tokens, Arrays(model.weights))
    setup.operate("glu", lambda call, gate, up, name: call.base(up, gate, name))
    setup.run(Operators(EXACT))                     # an array
    setup.run(Propagation(dtype, policy, ...))      # the same, with the variance of its error

A change holds in all layers, or in those of `setup.layers`, and later changes lie on top of earlier ones.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from refllm.accuracy.propagation import Propagation, certain
from refllm.config.traits import traits_of
from refllm.forward.cache import NoCache
from refllm.forward.masks import masking
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.hypotheses.rotation import Rotation
from refllm.precision import rounding

_KEPT_AT_MOST = 1 << 24  # numbers of a model whose tensors are kept as float64, 128 MiB


class DoesNotApplyError(Exception):
    """A hypothesis has no meaning for this model or this input."""


@dataclass(frozen=True)
class Tokens:
    """What is run: ids, mask and positions, each [B, S]; pieces: where each piece that was fed with a cache begins;
    embeds_scale: what the embedded rows are multiplied by, and then rounded to `dtype`."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    pieces: tuple[int, ...] = (0,)
    embeds_scale: float | None = None
    dtype: str = "float32"

    @property
    def valid(self) -> np.ndarray:
        """[B, S] bool: what is no padding."""
        return self.mask != 0

    def first(self, tokens: int) -> "Tokens":
        """The first so many of every row: what comes later does not reach them."""
        pieces = tuple(p for p in self.pieces if p < tokens)
        ids, mask, positions = (a[:, :tokens] for a in (self.ids, self.mask, self.positions))
        return replace(self, ids=ids, mask=mask, positions=positions, pieces=pieces)


def is_small(model: Model) -> bool:
    """Whether a run of the model takes milliseconds, so that hundreds of them are nothing."""
    return model.num_parameters() <= _KEPT_AT_MOST


class Arrays(Mapping[str, np.ndarray]):
    """The tensors of a model as float64, which are kept where they are small."""

    def __init__(self, model: Model) -> None:
        self._weights, self._kept = model.weights, dict[str, np.ndarray]()
        self.small = is_small(model)
        self.names = [*self._weights.shapes, *self._weights.tied]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._kept:
            return self._kept[name]
        found = self._weights[name]
        if not self.small:
            return found
        self._kept[name] = np.asarray(found, np.float64)
        return self._kept[name]

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """tensor[ids]."""
        return self[name][ids] if self.small else self._weights.rows(name, ids)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return tuple(self._weights.shapes[self._weights.tied.get(name, name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


Edit = Callable[[np.ndarray], np.ndarray]


class EditedWeights(Mapping[str, np.ndarray]):
    """Tensors of which some are changed when they are read. order: layer i of the page has the tensors of order[i].

    aliases: (name -> the tensor that is read in its place, layers), short within layers. stacks: name -> tensors
    of which rows are taken, which rows, and in which layers.
    """

    def __init__(self, arrays: Arrays, layers: int) -> None:
        self._arrays, self.order = arrays, list(range(layers))
        self.edits: list[tuple[str, Edit, frozenset[int] | None]] = []
        self.aliases: list[tuple[dict[str, str], frozenset[int] | None]] = []
        self.stacks: dict[str, tuple[list[str], np.ndarray, frozenset[int] | None]] = {}
        self._named: dict[int, tuple[str, np.ndarray]] = {}
        self.low_memory = False

    def _read(self, layer: int | None, name: str) -> np.ndarray:
        source, prefix = name, "" if layer is None else f"layers.{layer}."
        for others, layers in reversed(self.aliases):
            if layers is None or layer in layers:
                source = others.get(source, source)
        value = self._stacked(layer, prefix, name)
        value = self._arrays[prefix + source] if value is None else value
        for ending, edit, layers in self.edits:
            if name.endswith(ending) and (layers is None or layer in layers):
                value = edit(value)
        if value.ndim == 1:  # the page hands on the vector alone, and which norm it is of has to be known
            self._named[id(value)] = name.rpartition(".")[0], value
        return value

    def _stacked(self, layer: int | None, prefix: str, name: str) -> np.ndarray | None:
        """The rows of a tensor, if they are taken from several that lie on top of each other."""
        names, index, layers = self.stacks.get(name, ([], np.empty(0), None))
        if not names or (layers is not None and layer not in layers):
            return None
        return np.concatenate([self._arrays[prefix + n] for n in names])[index]

    def owner(self, vector: Any) -> str:
        """The name of the module that a vector is of, "" where it was made on the way."""
        return self._named.get(id(vector), ("", None))[0]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(None, name)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """tensor[ids]."""
        changed = any(name.endswith(e[0]) for e in self.edits) or any(name in others for others, _ in self.aliases)
        return self[name][ids] if changed else self._arrays.rows(name, ids)

    def layer(self, index: int) -> "Layer":
        """The tensors of a layer by their short names."""
        return Layer(self, self.order[index])

    def has(self, ending: str) -> bool:
        """Whether any tensor ends so."""
        return any(name.endswith(ending) for name in self._arrays)

    def shape(self, ending: str) -> tuple[int, ...]:
        """The shape of the first tensor that ends so."""
        return self._arrays.shape(next(name for name in self._arrays if name.endswith(ending)))

    def __contains__(self, name: object) -> bool:
        return name in self._arrays.names or any(name in others for others, _ in self.aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Layer(Mapping[str, np.ndarray]):
    """The tensors of one layer."""

    def __init__(self, weights: EditedWeights, index: int) -> None:
        self._weights, self._index = weights, index
        self._prefix = f"layers.{index}."

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights._read(self._index, name)

    def __iter__(self) -> Iterator[str]:
        return (name[len(self._prefix) :] for name in self._weights if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


Wrong = Callable[..., Any]
"""wrong(call, *arguments of the operator, **its choices)."""


@dataclass(frozen=True)
class Call:
    """What a changed operator may use. base: the operator as it was. op: the others, unchanged. layer: its index, None
    outside. seen: what calls in the same layer have left behind."""

    base: Callable[..., Any]
    op: Any
    setup: "Setup"
    layer: int | None
    seen: dict[str, Any]

    def owner(self, vector: Any) -> str:
        """The name of the module that a vector is of: input_layernorm, norm, ...; "" where that is not known."""
        return self.setup.weights.owner(vector)


class ReachedError(Exception):
    """The value was made at which a run ends."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True)
class Until:
    """Where a run ends, and what is read on the way. name: of the value, "" for the end. shown: values of a candidate
    that are taken over. columns: of the head's output."""

    name: str = ""
    shown: Mapping[str, np.ndarray] = field(default_factory=dict)
    columns: np.ndarray | None = None


class Setup:
    """One model and input, to be changed and run once."""

    def __init__(self, model: Model, tokens: Tokens, arrays: Arrays) -> None:
        self.c: Any = copy.copy(model.config)
        self.page, self.head, self.tokens = model.page, HEAD_TAPS.get(model.head, ""), tokens
        self.ids, self.mask, self.drop = tokens.ids, tokens.mask, 0
        self.weights = EditedWeights(arrays, self.c.num_hidden_layers)
        self.rotation = Rotation(model.config, tokens.positions)
        self._rotations: list[tuple[frozenset[int], Rotation]] = []
        self._operators: dict[str, list[tuple[Wrong, frozenset[int] | None]]] = {}
        self.embedded: list[Callable[[Any], Any]] = []
        self.headed: list[Callable[[Any], Any]] = []
        self.layers: frozenset[int] | None = None

    # --------------------------------------------------------------------------------------------------------- changes

    def operate(self, name: str, wrong: Wrong) -> None:
        """Another operator in the place of `name`."""
        self._operators.setdefault(name, []).append((wrong, self.layers))

    def edit(self, ending: str, function: Edit) -> None:
        """function(tensor) in the place of the tensors whose names end so. Raises DoesNotApplyError where there are
        none."""
        if not self.weights.has(ending):
            raise DoesNotApplyError
        self.weights.edits.append((ending, function, self.layers))

    def read(self, others: dict[str, str]) -> None:
        """Other tensors in the place of some: name -> the one that is read. Raises DoesNotApplyError where one is
        missing or of another shape."""
        weights = self.weights
        for name, other in others.items():
            if not weights.has(other) or (weights.has(name) and weights.shape(name) != weights.shape(other)):
                raise DoesNotApplyError
        weights.aliases.append((others, self.layers))

    def rotate(self) -> Rotation:
        """The rotation to be changed."""
        if self.layers is None:
            return self.rotation
        self._rotations.append((self.layers, self.rotation.copy()))
        return self._rotations[-1][1]

    def everywhere(self) -> None:
        """Raises DoesNotApplyError where a change is asked for in some layers, that has no layers."""
        if self.layers is not None:
            raise DoesNotApplyError

    # ------------------------------------------------------------------------------------------------------------ runs

    def run(self, inner: Any, until: Until = Until(), tables: str = "exact") -> Any:
        """The value at which it ends; the head's output, or the last norm's. inner: the operators. tables: how cos and
        sin are made (`Rotation.tables`)."""
        op = Edited(inner, self, until, tables)
        try:
            return self._through(op, until)
        except ReachedError as reached:
            return reached.value

    def _through(self, op: "Edited", until: Until) -> Any:
        x: Any = self.weights.rows("embed_tokens.weight", self.ids)
        if self.tokens.embeds_scale is not None:
            x = rounding(self.tokens.dtype)(np.asarray(x * self.tokens.embeds_scale, np.float32))
        x = certain(x) if op.uncertain else np.asarray(x, op.work)
        for change in self.embedded:
            x = change(x)
        x = op.tap("model.embed_tokens", x)
        self.c.num_hidden_layers = len(self.weights.order)
        cos, sin = op.tables(self.rotation)
        x = self.page.forward(op, self.c, self.weights, x, cos, sin, self._masking(), NoCache())
        if self.head:
            x = self._headed(op, x, until.columns)
        return x

    def _masking(self) -> dict[str, Any]:
        B, S = self.ids.shape
        heads = self.c.num_attention_heads
        return masking(self.mask, None, batch=B, queries=S, cached=0, has_cache=False, heads=heads)

    def _headed(self, op: "Edited", x: Any, columns: np.ndarray | None) -> Any:
        whole = columns is None or bool(self.headed)  # a softmax needs all of them
        weight, name = self.weights[f"{self.head}.weight"], f"{self.head}.bias"
        bias = self.weights.get(name)
        if not whole:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        y = op.linear(x, weight, bias)
        for change in self.headed:
            y = change(y)
        y = y[:, self.drop :]
        return op.tap(self.head, y if whole and columns is None else y if not whole else y[..., columns])

    def rotation_in(self, layer: int | None) -> Rotation:
        """The rotation of a layer."""
        return next((r for layers, r in reversed(self._rotations) if layer in layers), self.rotation)

    def operators(self, name: str, layer: int | None) -> list[Wrong]:
        """What is in the place of an operator in a layer, the innermost first."""
        return [f for f, layers in self._operators.get(name, ()) if layers is None or layer in layers]

    @property
    def c_is_layer_norm(self) -> bool:
        """Whether the family has LayerNorm."""
        return traits_of(self.c).layer_norm

    @property
    def has_rotations(self) -> bool:
        """Whether some layers turn otherwise than the others."""
        return bool(self._rotations)


class Edited:
    """The operators of a page, some of them changed. They are those of arrays or of values with an error."""

    def __init__(
        self, inner: Any, setup: Setup, until: Until, how: str, scope: str = "", layer: int | None = None
    ) -> None:
        self._inner, self._setup, self._until, self._how = inner, setup, until, how
        self._scope, self._layer = scope, layer
        self.uncertain = isinstance(inner, Propagation)
        self.work: Any = np.float64 if self.uncertain else inner.ar.work
        self._seen: dict[str, Any] = {}
        self._tables: dict[int, tuple[Any, Any]] = {}

    def within(self, scope: str) -> "Edited":
        number = scope.rpartition(".")[2]
        layer = self._setup.weights.order[int(number)] if number.isdigit() else self._layer
        found = Edited(self._inner.within(scope), self._setup, self._until, self._how, f"{scope}.", layer)
        found._tables = self._tables
        return found

    def tap(self, name: str, x: Any) -> Any:
        name = self._scope + name
        if name == self._until.name:
            raise ReachedError(x)
        taken = self._until.shown.get(name)
        if taken is None:
            return x
        value = np.array(x.value if self.uncertain else x, np.float64)
        if value.shape[:-1] != taken.shape[:-1]:  # another number of tokens
            raise DoesNotApplyError
        np.copyto(value[..., : taken.shape[-1]], taken, where=np.isfinite(taken))
        return certain(value) if self.uncertain else value.astype(self.work, copy=False)

    def wanted(self, *names: str) -> bool:
        """No value inside an operator is wanted."""
        return False

    def tables(self, rotation: Rotation) -> tuple[Any, Any]:
        """cos and sin, made once for each rotation."""
        if id(rotation) not in self._tables:
            self._tables[id(rotation)] = rotation.tables(self._inner, self._how)
        return self._tables[id(rotation)]

    def rope(self, q: Any, k: Any, cos: Any, sin: Any, **how: Any) -> Any:
        if self._setup.has_rotations:
            cos, sin = self.tables(self._setup.rotation_in(self._layer))
        return self._changed("rope")(q, k, cos, sin, **how)

    def _changed(self, name: str) -> Callable[..., Any]:
        found = getattr(self._inner, name)
        for wrong in self._setup.operators(name, self._layer):
            found = partial(wrong, Call(found, self._inner, self._setup, self._layer, self._seen))
        return found

    def __getattr__(self, name: str) -> Any:
        return self._changed(name)
