"""The recipe of one array: nothing but numbers and names, from which the values, a tensor or its source are made.

The bulk of the values comes from NumPy and a seed; a few are planted by hand. The same recipe lies in memory in any
`layout`, and then everything between its elements holds NaN, so that who reads beside them is seen.
"""

import math
import mmap
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from refllm.errors import InputError
from refllm.precision import rounding

FLOATS = ("bfloat16", "float16", "float32", "float64")
VALUES = ("normal", "uniform", "zeros", "ones", "ramp", "index", "eighths", "integers", "softmax", "cos", "sin")
"""What an `Array`'s values may be; its docstring says what each is."""
LAYOUTS = ("dense", "wider", "shifted", "gaps", "step", "transposed", "heads", "expanded", "constant", "far")
"""How its elements may lie in memory; its docstring says what each is."""

Index = tuple[Any, ...]
"""Where a value is planted: per axis an integer, or (start, stop) or (start, stop, step) with None as in a slice; axes
that are not named are taken whole."""
FIRST_DIM: Index = ((None, None), (None, None), (None, None), 0)
"""The index in an array [B, heads, positions, D] of dim 0 of all heads and positions."""

_PADDING = {"int64": -(2**40), "bool": True}
_FAR = 2**30
_WORTH_KEEPING = 1 << 14
"""Numbers of an array whose values are kept for the next candidate that is given the same call."""


@dataclass(frozen=True)
class Array:
    """One array of a call.

    shape, dtype: of the tensor; dtype is one of `FLOATS`, "int64" or "bool".
    values: base values x, then x * scale + mean, then rounded to dtype.
        normal: N(0, 1) from seed. uniform: [0, 1) from seed. zeros, ones. ramp: 0 .. 1 in order, all distinct.
        index: 0 .. n-1 along the last axis. integers: 0 .. scale-1 from seed (+ mean).
        softmax: the softmax over the last axis of N(0, scale^2) from seed.
        cos, sin: the rotary tables [S, R/2] or [B, S, R/2] with base 10000 * scale, at the positions `mean` + 0 .. S-1
        if seed is 0, else at `mean` + integers below 5000 from seed: another order in every row of the batch.
    planted: (index, value) pairs, written in order after all that.
    layout: of the tensor. dense. wider: a view of [..., 2 n + 3], the first n of its last axis. shifted: the same, from
        element 1 on. gaps: every second row of the second-to-last axis. step: every second element of the last one.
        transposed: the last two axes change places in memory. heads: axes 1 and 2 do (tokens before heads). expanded:
        stride 0 on the first axis, whose entries are all the first. constant: stride 0 on every axis, as the gradient
        of a sum has it; all elements are the first. far: the first axis longer than 1 has a stride
        of 2^30 (less if it is longer than 3), so that its last entry lies at 2^31 elements or beyond.
        NaN (in integers -2^40, in booleans True) lies between the elements, except where that would fill gigabytes.
    """

    shape: tuple[int, ...]
    dtype: str
    values: str = "normal"
    scale: float = 1.0
    mean: float = 0.0
    seed: int = 0
    planted: tuple[tuple[Index, float], ...] = ()
    layout: str = "dense"

    def __post_init__(self) -> None:
        if self.values not in VALUES or self.layout not in LAYOUTS or self.dtype not in (*FLOATS, *_PADDING):
            raise InputError(
                f"Array: values={self.values!r}, layout={self.layout!r} or dtype={self.dtype!r} is unknown"
            )
        needed = {
            "constant": 1,
            "gaps": 2,
            "transposed": 2,
            "heads": 3,
            "expanded": 1,
            "far": 2,
            "wider": 1,
            "shifted": 1,
            "step": 1,
        }
        if len(self.shape) < needed.get(self.layout, 0):
            raise InputError(f"Array: layout={self.layout!r} needs {needed[self.layout]} axes, found {self.shape}")

    def array(self) -> np.ndarray:
        """The values: on the grid of dtype, held in float32 (float64 for float64), or int64, or bool."""
        if math.prod(self.shape) > _WORTH_KEEPING or not self.scale:
            return self._made()
        return _kept(self, repr(self.planted)).copy()

    def _made(self) -> np.ndarray:
        x = np.asarray(self._base())[self._first]
        if self.dtype == "float64":
            x = x.astype(np.float64)
        elif self.dtype in FLOATS:
            with np.errstate(over="ignore", under="ignore"):
                x = np.asarray(rounding(self.dtype)(x.astype(np.float32)))
        else:
            x = x.astype(self.dtype)
        return x if x.shape == self.shape else np.array(np.broadcast_to(x, self.shape))

    def tensor(self, device: str = "cpu") -> Any:
        """A torch tensor of that shape, dtype and layout, of its own memory."""
        import torch

        dtype = getattr(torch, self.dtype)
        x = torch.from_numpy(self.array()).to(device=device, dtype=dtype)
        if self.layout == "dense":
            return x
        if self.layout in ("expanded", "constant"):
            dense = torch.contiguous_format if x.numel() else torch.preserve_format  # also along axes of length 1
            return x[self._first].clone(memory_format=dense).expand(self.shape)
        if self.layout == "far":
            return _far(x)
        base_shape, view = self._placement()
        base = torch.full(base_shape, _PADDING.get(self.dtype, float("nan")), dtype=dtype, device=device)
        out = view(base)
        out.copy_(x)
        return out

    def placed(self) -> np.ndarray:
        """The same as a NumPy array (bfloat16: that of ml_dtypes), over bytes of its own: `memory_of` returns them."""
        x = self.array().astype(getattr(ml_dtypes, self.dtype) if self.dtype == "bfloat16" else self.dtype)
        if self.layout == "dense":
            out = _over_memory(x.shape, x.dtype)
        elif self.layout in ("expanded", "constant"):
            first = _over_memory(
                tuple(len(range(n)[part]) for n, part in zip(self.shape, self._first, strict=True)), x.dtype
            )
            repeated = (0, *first.strides[1:]) if self.layout == "expanded" else (0,) * len(self.shape)
            out = np.ndarray(self.shape, x.dtype, memory_of(first), strides=repeated)
            if not out.size:
                return out
        elif self.layout == "far":
            strides = _far_strides(self.shape)
            memory = _over_memory((_far_size(self.shape, strides),), x.dtype)
            bytes_apart = tuple(stride * x.itemsize for stride in strides)
            out = np.ndarray(self.shape, x.dtype, memory_of(memory), strides=bytes_apart)
        else:
            base_shape, view = self._placement()
            base = _over_memory(base_shape, x.dtype)
            base[...] = _PADDING.get(self.dtype, float("nan"))
            out = view(base)
        out[...] = x
        return out

    def code(self, name: str, device: str = "cpu", numpy: bool = False) -> list[str]:
        """Python lines that make the same tensor as `name`, bit for bit; they need numpy as np and torch.

        numpy: lines that make what `placed` does instead, with numpy, and ml_dtypes for bfloat16.
        """
        there = "" if device == "cpu" else f", device={device!r}"
        lines = [f"{name} = {self._base_code()}"]
        if self.scale != 1 and self.values not in ("integers", "softmax", "cos", "sin"):
            lines[0] += f" * {self.scale!r}"
        if self.mean and self.values not in ("cos", "sin"):
            lines[0] += f" + {self.mean!r}"
        lines[:0] = self._positions_code(name)
        lines += [] if self.shape else [f"{name} = np.array({name})"]  # arithmetic makes a number of it
        lines += [f"{name}[{_index_code(index)}] = {_number_code(value)}" for index, value in self.planted]
        if numpy:
            return [*lines, *self._numpy_code(name)]
        if self.dtype in FLOATS:
            cast = "" if self.dtype == "float64" else ".astype(np.float32)"
            place = f"{device!r}, " if there else ""
            lines.append(f"{name} = torch.from_numpy({name}{cast}).to({place}torch.{self.dtype})")
        else:
            place = f".to({device!r})" if there else ""
            kind = "int64" if self.dtype == "int64" else "bool_"
            lines.append(f"{name} = torch.from_numpy({name}.astype(np.{kind})){place}")
        return lines + self._placement_code(name, there)

    # ------------------------------------------------------------------------------------------------------- values

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of what is made: of an expanded array its first entry alone."""
        return (min(1, self.shape[0]), *self.shape[1:]) if self.layout == "expanded" else self.shape

    @property
    def _first(self) -> tuple[slice, ...]:
        """The index of what is kept of that, and repeated."""
        repeated = {"expanded": 1, "constant": len(self.shape)}.get(self.layout, 0)
        return (slice(0, 1),) * repeated + (slice(None),) * (len(self.shape) - repeated)

    def _base(self) -> np.ndarray:
        shape, rng = self._shape, np.random.default_rng(self.seed)
        if self.values in ("cos", "sin"):
            x = getattr(np, self.values)(self._positions(rng)[..., None] * self._frequencies())
        elif self.values == "softmax":
            e = np.exp(rng.standard_normal(shape) * self.scale)
            x = e / e.sum(axis=-1, keepdims=True)
        elif self.values == "integers":
            x = rng.integers(0, max(1, int(self.scale)), shape).astype(np.float64)
        else:
            x = {
                "normal": lambda: rng.standard_normal(shape),
                "uniform": lambda: rng.random(shape),
                "zeros": lambda: np.zeros(shape),
                "ones": lambda: np.ones(shape),
                "ramp": lambda: np.linspace(0, 1, int(np.prod(shape))).reshape(shape),
                "index": lambda: np.zeros(shape) + np.arange(shape[-1]),
                "eighths": lambda: rng.integers(-8, 9, shape) / 8,
            }[self.values]()
            x = x * self.scale if self.scale != 1 else x
        x = np.array(x)
        if self.mean and self.values not in ("cos", "sin"):
            x = np.array(x + self.mean)
        for index, value in self.planted:
            x[tuple(slice(*i) if isinstance(i, tuple) else i for i in index)] = value
        return x

    def _positions(self, rng: np.random.Generator) -> np.ndarray:
        shape = self._shape[:-1]
        return self.mean + (rng.integers(0, 5000, shape) if self.seed else np.zeros(shape) + np.arange(shape[-1]))

    def _frequencies(self) -> np.ndarray:
        half = self.shape[-1]
        return (1e4 * self.scale) ** (-np.arange(half) / max(1, half))

    def _numpy_code(self, name: str) -> list[str]:
        """Lines that turn the values into an array of the right dtype and layout."""
        cast = "" if self.dtype not in FLOATS or self.dtype == "float64" else ".astype(np.float32)"
        kind = {"bfloat16": "ml_dtypes.bfloat16", "bool": "np.bool_"}.get(self.dtype, f"np.{self.dtype}")
        lines = [f"{name} = {name}{cast}.astype({kind})"]
        if self.layout == "dense":
            return lines
        view = "np.lib.stride_tricks.as_strided"
        if self.layout == "expanded":
            return [*lines, f"{name} = {view}({name}[:1].copy(), {self.shape}, (0, *{name}.strides[1:]))"]
        if self.layout == "constant":
            one = ", ".join(["0:1"] * len(self.shape))
            return [*lines, f"{name} = {view}({name}[{one}].copy(), {self.shape}, {(0,) * len(self.shape)})"]
        if self.layout == "far":
            strides = _far_strides(self.shape)
            memory = f"np.zeros({_far_size(self.shape, strides)}, {name}.dtype)"
            place = f"{view}({memory}, {self.shape}, [n * {name}.itemsize for n in {strides}])"
        else:
            padding = _number_code(_PADDING.get(self.dtype, float("nan")))
            place = f"np.full({self._placement()[0]}, {padding}, {name}.dtype){self._view_code()}"
        return [*lines, f"place = {place}", f"place[...] = {name}", f"{name} = place"]

    def _base_code(self) -> str:
        shape, rng = self._shape, f"np.random.default_rng({self.seed})"
        half = self.shape[-1] if self.shape else 0
        exponentials = f"np.exp({rng}.standard_normal({shape}) * {self.scale!r})"
        table = f"positions[..., None] * {1e4 * self.scale!r} ** (-np.arange({half}) / {max(1, half)})"
        return {
            "normal": f"{rng}.standard_normal({shape})",
            "uniform": f"{rng}.random({shape})",
            "zeros": f"np.zeros({shape})",
            "ones": f"np.ones({shape})",
            "ramp": f"np.linspace(0, 1, {int(np.prod(shape))}).reshape({shape})",
            "index": f"np.zeros({shape}) + np.arange({half})",
            "eighths": f"{rng}.integers(-8, 9, {shape}) / 8",
            "integers": f"{rng}.integers(0, {max(1, int(self.scale))}, {shape}).astype(np.float64)",
            "softmax": f"(lambda e: e / e.sum(-1, keepdims=True))({exponentials})",
            "cos": f"np.cos({table})",
            "sin": f"np.sin({table})",
        }[self.values]

    def _positions_code(self, name: str) -> list[str]:
        if self.values not in ("cos", "sin"):
            return []
        shape = self._shape[:-1]
        drawn = f"np.random.default_rng({self.seed}).integers(0, 5000, {shape})"
        return [
            f"positions = {self.mean!r} + {drawn if self.seed else f'(np.zeros({shape}) + np.arange({shape[-1]}))'}"
        ]

    # ------------------------------------------------------------------------------------------------------- layout

    def _placement(self) -> tuple[tuple[int, ...], Any]:
        """The shape of the memory, and the function from it to the view that is the array."""
        *front, n = self.shape
        if self.layout in ("wider", "shifted"):
            first = int(self.layout == "shifted")
            return (*front, 2 * n + 3), lambda base: base[..., first : first + n]
        if self.layout == "step":
            return (*front, 2 * n), lambda base: base[..., ::2]
        if self.layout == "gaps":
            return (*front[:-1], 2 * front[-1], n), lambda base: base[..., ::2, :]
        if self.layout == "transposed":
            return (*front[:-1], n, front[-1]), lambda base: base.swapaxes(-1, -2)
        swapped = (self.shape[0], self.shape[2], self.shape[1], *self.shape[3:])
        return swapped, lambda base: base.swapaxes(1, 2)

    def _placement_code(self, name: str, there: str) -> list[str]:
        """there: the argument `device` of what makes memory, with a comma before it; "" on the CPU."""
        if self.layout == "dense":
            return []
        if self.layout == "expanded":
            return [f"{name} = {name}[:1].clone().expand({self.shape})"]
        if self.layout == "constant":
            one = ", ".join(["0:1"] * len(self.shape))
            return [f"{name} = {name}[{one}].clone().expand({self.shape})"]
        if self.layout == "far":
            strides = _far_strides(self.shape)
            return [
                f"memory = torch.UntypedStorage({_far_size(self.shape, strides)} * {name}.element_size(){there})",
                f"far = torch.empty(0, dtype={name}.dtype{there}).set_(memory, 0, {self.shape}, {strides})",
                f"{name} = far.copy_({name})",
            ]
        padding = _number_code(_PADDING.get(self.dtype, float("nan")))
        base = f"torch.full({self._placement()[0]}, {padding}, dtype=torch.{self.dtype}{there})"
        return [f"{name} = {base}{self._view_code()}.copy_({name})"]

    def _view_code(self) -> str:
        """What is put behind the memory to get the array, of tensors and of NumPy arrays."""
        n = self.shape[-1]
        return {
            "wider": f"[..., :{n}]",
            "shifted": f"[..., 1:{1 + n}]",
            "step": "[..., ::2]",
            "gaps": "[..., ::2, :]",
            "transposed": ".swapaxes(-1, -2)",
            "heads": ".swapaxes(1, 2)",
        }[self.layout]


@dataclass(frozen=True)
class Kept(Array):
    """What the forward pass kept of a call of a backward operator: it follows from the other arguments, so only the
    call can make it (`refllm.strategies.call`). result: "o" or "lse" of attention."""

    result: str = ""

    def holding(self, values: np.ndarray) -> "Array":
        """The same place in memory with these values in it."""
        names = ("shape", "dtype", "layout")
        return _Held(**{name: getattr(self, name) for name in names}, held=np.asarray(values, np.float64))

    def _base(self) -> np.ndarray:
        raise InputError(f"{self.result}: only a call can make what its forward pass kept")

    def code(self, name: str, device: str = "cpu", numpy: bool = False) -> list[str]:
        """Lines that put `kept_NAME`, its values, into a tensor of the right dtype and layout."""
        plain = Array(self.shape, self.dtype, "zeros", layout=self.layout)
        _, *rest = plain.code(name, device, numpy)
        return [f"{name} = kept_{name}", *rest]


@dataclass(frozen=True, eq=False)
class _Held(Array):
    """An array of given values."""

    held: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def _base(self) -> np.ndarray:
        return self.held

    def array(self) -> np.ndarray:
        """They are one array for each call, and not kept."""
        return self._made()


@lru_cache(maxsize=1024)
def _kept(array: Array, planted: str) -> np.ndarray:
    """The values of an array. planted: in words, which tell 0 from -0."""
    return array._made()


def _far_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dense but for the first axis longer than 1, whose last entry lies at 2^31 if it has three or more."""
    axis = next((i for i, n in enumerate(shape[:-1]) if n > 1), 0)
    apart = min(_FAR, -(-(2**31) // (16 * max(1, shape[axis] - 1))) * 16)
    inner = [int(np.prod(shape[i + 1 :])) for i in range(axis + 1, len(shape))]
    return (*[apart] * (axis + 1), *inner)


def _far_size(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum(max(0, n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _over_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array of zeros over bytes of its own that start at a page, as aligned as a tensor's. Only the pages that are
    touched take memory."""
    count = int(np.prod(shape)) * dtype.itemsize
    memory = np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8, count)
    return np.ndarray(shape, dtype, memory)


def memory_of(x: np.ndarray) -> np.ndarray:
    """All bytes of the memory that an array of `Array.placed`, or a view of it, lies in."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _far(x: Any) -> Any:
    """x in the layout `far`. Only the pages that are touched take memory."""
    import torch

    strides = _far_strides(tuple(x.shape))
    memory = torch.UntypedStorage(_far_size(tuple(x.shape), strides) * x.element_size(), device=x.device)
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, 0, x.shape, strides).copy_(x)


def _number_code(value: Any) -> str:
    number = value if isinstance(value, bool) else float(value)
    return repr(number) if np.isfinite(number) else f'float("{number}")'


def _index_code(index: Index) -> str:
    if not index:
        return "..."
    return ", ".join(
        ":".join("" if i is None else str(i) for i in part) if isinstance(part, tuple) else str(part) for part in index
    )
