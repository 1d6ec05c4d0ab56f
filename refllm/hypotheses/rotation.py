"""The rotary tables of a set-up: parameters, positions and frequencies, each of which a hypothesis may change."""

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from refllm.accuracy.propagation import Propagation, Uncertain
from refllm.accuracy.tables import angles
from refllm.forward.rotary import RotaryEmbedding
from refllm.hypotheses.values import mapped

Kind = Literal["float32", "exact", "unknown"]
KINDS: tuple[Kind, ...] = ("float32", "exact", "unknown")
"""How honest code makes its tables: of float32 angles as Transformers, exactly, or by frequencies that are a few
float32 ulp off, which nobody knows."""

_UNKNOWN = 4.0 * 2.0**-24  # standard deviation of such an angle, relative
Array = Callable[[np.ndarray], np.ndarray]


class Rotation:
    """p: the rope parameters. positions [B, S]. dims: how many are turned.

    frequencies, angles, cos, sin: functions that change what was made, in their order. factor: cos and sin are
    multiplied by it once more.
    """

    def __init__(self, config: Any, positions: np.ndarray) -> None:
        self._config, self.p, self.positions = config, dict(config.rope_parameters), positions
        self.dims, self.factor = int(config.rotary_dim), 1.0
        self.frequencies: list[Array] = []
        self.angles: list[Array] = []
        self.cos: list[Array] = []
        self.sin: list[Array] = []

    def copy(self) -> "Rotation":
        """Another one, to be changed apart."""
        other = copy(self)
        other.p = dict(self.p)
        for name in ("frequencies", "angles", "cos", "sin"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def made(self, exact: bool) -> RotaryEmbedding:
        """What makes the tables, before frequencies and angles are changed."""
        c = SimpleNamespace(
            rope_parameters=self.p,
            max_position_embeddings=self._config.max_position_embeddings,
            rotary_dim=self.dims,
        )
        return RotaryEmbedding(c, exact=exact)  # type: ignore[arg-type]

    def tables(self, op: Any, how: str) -> tuple[Any, Any]:
        """cos and sin [B, S, R/2], as arrays for operators of arrays, else with the variance of their error."""
        narrow = how == "float32"
        made = self.made(exact=not narrow)
        made.tables(self.positions)
        found = np.asarray(made.inv_freq, np.float64)
        for change in self.frequencies:
            found = change(found)
        turned = angles(self.positions, found, narrow and not self.angles)
        for change in self.angles:
            turned = change(turned)
        factor = made.attention_factor * self.factor
        values = np.cos(turned) * factor, np.sin(turned) * factor
        if not isinstance(op, Propagation):
            return self._after(*values)
        slopes = np.sin(turned) * factor, np.cos(turned) * factor
        unknown = _UNKNOWN if how == "unknown" else 0.0
        out = []
        for value, slope in zip(values, slopes, strict=True):
            table = op.table(value)
            ulp = np.asarray(op._ulp(value, "float32"), np.float64)
            variance = table.variance + np.square(ulp) / 4 + np.square(slope * turned * unknown)
            variance = np.where((turned == 0) & (factor == 1), 0, variance)
            out.append(Uncertain(value, variance.astype(op.width)))
        return self._after(*out)

    def _after(self, cos: Any, sin: Any) -> tuple[Any, Any]:
        for change in self.cos:
            cos = mapped(cos, change)
        for change in self.sin:
            sin = mapped(sin, change)
        return cos, sin
