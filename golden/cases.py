"""Which goldens exist: a name, what it is for, and how its inputs are made. Nothing here computes an output.

A name is operator or family, slash, case: "rms_norm/mean-1000", "helium/left-padding". All inputs follow from the name
(its hash is the seed), and lie on the grid of bfloat16 and of float16 alike, so that one exact answer serves bfloat16,
float16 and float32; a few have float32 values, which only float32 can hold.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.precision import round_bfloat16

DTYPES = ("bfloat16", "float16", "float32")
POLICIES = ("fused", "hf-eager")


@dataclass(frozen=True)
class Case:
    """name: "rms_norm/mean-1000". what: one phrase. dtypes: in which a candidate may be compared."""

    name: str
    what: str
    dtypes: tuple[str, ...] = DTYPES

    @property
    def group(self) -> str:
        """The operator or family: cases of one group share a file."""
        return self.name.split("/")[0]

    @property
    def short(self) -> str:
        """The name within its group."""
        return self.name.split("/")[1]

    @property
    def seed(self) -> int:
        """32 bits of the hash of the name."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")


@dataclass(frozen=True)
class OperatorCase(Case):
    """make: draws the call. eager: whether eager code is defined on it (it lets NaN through a mask)."""

    make: Callable[["Draw"], "OperatorCall"] = field(default=lambda draw: OperatorCall(()), repr=False)
    eager: bool = True

    def call(self) -> "OperatorCall":
        """The inputs."""
        return self.make(Draw(self.seed, grid="float32" if self.dtypes == ("float32",) else "bfloat16"))


@dataclass(frozen=True)
class OperatorCall:
    """refllm.ops.<operator>(*arguments, **keywords)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Arrays from one seed: float32 that lies on the grid of bfloat16 and float16, or any float32."""

    def __init__(self, seed: int, grid: str = "bfloat16") -> None:
        self.rng, self.grid = np.random.Generator(np.random.PCG64(seed)), grid

    def on_grid(self, x: np.ndarray) -> np.ndarray:
        """x as float32. On both narrow grids: eight digits, and 0 for what is subnormal in float16."""
        x = x.astype(np.float32)
        return x if self.grid == "float32" else round_bfloat16(np.where(np.abs(x) < 2.0**-14, 0, x).astype(np.float32))

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return self.on_grid(scale * self.rng.standard_normal(shape) + mean)

    def weight(self, *shape: int) -> np.ndarray:
        """Norm weights: around 1, all distinct."""
        return self.on_grid(np.clip(1 + 0.3 * self.rng.standard_normal(shape), 0.2, 2))

    def below(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, shape)

    def labels(self, n: int, classes: int, ignored: int = -100) -> np.ndarray:
        """Every fourth one is ignored."""
        labels = self.below(classes, n)
        labels[1::4] = ignored
        return labels

    def tables(self, S: int, R: int, first: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [S, R/2] for positions from `first` on: position 0 hides what is wrong."""
        angle = np.arange(first, first + S)[:, None] * 1e4 ** (-np.arange(0, R, 2) / R)
        return self.on_grid(np.cos(angle)), self.on_grid(np.sin(angle))


@cache
def all_cases() -> dict[str, Case]:
    """Every golden by its name, operators first."""
    from refllm.golden import model_cases, operator_cases

    with quiet():
        cases: Sequence[Case] = (*operator_cases.cases(), *model_cases.cases())
    return {case.name: case for case in cases}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without the warnings about odd configs and far positions: goldens are odd on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def groups() -> dict[str, list[Case]]:
    """Operator or family -> its cases."""
    found: dict[str, list[Case]] = {}
    for case in all_cases().values():
        found.setdefault(case.group, []).append(case)
    return found


def select(names: Sequence[str], known: Sequence[str] | None = None) -> list[str]:
    """The names asked for: whole ones, or a group's; all if none is. Raises InputError for one that is not known."""
    known = list(all_cases()) if known is None else list(known)
    chosen = []
    for name in names:
        found = [k for k in known if name in (k, k.split("/")[0])]
        if not found:
            shown = dict.fromkeys(k.split("/")[0] for k in known)
            raise InputError(
                f"no golden is called {name!r}; there are {', '.join(shown)}, and refllm golden show lists all"
            )
        chosen += found
    return list(dict.fromkeys(chosen)) if names else known
