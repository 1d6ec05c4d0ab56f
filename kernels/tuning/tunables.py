"""What `refllm bench tune` can choose between: of each kernel the classes of shapes, a call of each, and candidates.

A call is made of the sizes of a published layer. On the meta device it is compiled; on a GPU it runs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from refllm.errors import InputError
from refllm.kernels.launch import Launch
from refllm.kernels.targets import TARGETS, Target
from refllm.kernels.tuning.table import ANY, Entry, entries, tile

Arrays = Callable[..., torch.Tensor]

SMALL = {"S": 144, "N": 304, "V": 992, "E": 992}
"""Sizes of a small call: over one tile by a few. A remainder by 16 is added to them, so that the class stays."""


@dataclass(frozen=True)
class Call:
    """A call of an operator on one class of shapes: what its `plan` and its public function take.

    planned: the arguments of `plan` before the target. arguments, keywords: of the operator.
    work: flops of the call if products decide its speed, else 0: then it is bytes or instructions that do.
    """

    operator: str
    planned: tuple[Any, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    work: int


@dataclass(frozen=True)
class Tunable:
    """One kernel of the table.

    shapes: classes, as its `shape_class` names them, with the sizes of the call that stands for each.
    call: makes it from those sizes, a dtype and a function that makes arrays.
    fields: of its tile, with the values worth trying. outer: those that say how often an operand is read again.
    streamed: fields and constants whose product is what one step reads of the large operand (weights, keys).
    """

    kernel: str
    shapes: dict[str, dict[str, int]]
    call: Callable[[dict[str, int], torch.dtype, Arrays], Call]
    fields: dict[str, tuple[int, ...]]
    outer: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        return import_module(f"refllm.kernels.triton.{self.kernel}")

    def dtype(self, shape: str) -> torch.dtype:
        """bfloat16, or float32 where the class says so."""
        return torch.float32 if shape == "float32" else torch.bfloat16

    def make(self, shape: str, array: Arrays, small: bool = False) -> Call:
        """The call that stands for a class, or a small one of it, as the definition can compute.

        array(*sizes, dtype=...) makes one of its arrays.
        """
        sizes = self.shapes[shape]
        if small:
            sizes = {
                name: size if size <= SMALL.get(name, size) else SMALL[name] + size % 16 for name, size in sizes.items()
            }
        return self.call(sizes, self.dtype(shape), array)

    def launch(self, call: Call, target: Target, tile: Any) -> tuple[Launch, Any]:
        """The launch that the tile is about, and everything that `plan` returned."""
        planned = self.module.plan(*call.planned, target=target, tile=tile)
        first = planned[0]
        return (first if isinstance(first, Launch) else first[0]), planned

    def candidates(self, shape: str, target: Target) -> list[Any]:
        """The tile of the table first, then its neighbours: those that differ from it in one or two fields."""
        kind, now = self.module.Tile, tile(self.kernel, shape, target)
        tiles = [kind(*values) for values in itertools.product(*self.fields.values())]
        near = [each for each in tiles if 1 <= sum(each._asdict()[f] != now[f] for f in now) <= 2]
        return [kind(**now), *near]

    def classes(self, target: Target) -> list[str]:
        """Those that the table has lines for, on this target."""
        return [shape for shape in self.shapes if line(self.kernel, shape, target)]


def line(kernel: str, shape: str, target: Target) -> Entry | None:
    """The line of the table that serves a class on a target; None if only the one for any shape would."""
    table = entries()
    return table.get((kernel, shape, target.name)) or table.get((kernel, shape, ANY))


def _attention(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    q, k, v = (array(1, n["S"], heads, n["D"], dtype=dtype).transpose(1, 2) for heads in (n["H"], n["K"], n["K"]))
    work = 2 * n["H"] * n["S"] ** 2 * n["D"]
    return Call("attention", (q, k, v, 0.1, True, None), (q, k, v), {"scale": 0.1}, work)


def _decode_attention(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    q = array(4, n["S"], n["H"], n["D"], dtype=dtype).transpose(1, 2)
    k, v = (array(4, n["N"], n["K"], n["D"], dtype=dtype).transpose(1, 2) for _ in range(2))
    lengths = torch.full((4,), n["N"], dtype=torch.int64, device=q.device)
    return Call("decode_attention", (q, k, v, lengths, 0.1), (q, k, v, lengths), {"scale": 0.1}, 0)


def _qkv(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    E, H, K, D, S = (n[name] for name in "EHKDS")
    x, norm, w = array(1, S, E, dtype=dtype), array(E, dtype=dtype), array((H + 2 * K) * D, E, dtype=dtype)
    cos, sin = (array(S, D // 2, dtype=dtype) for _ in range(2))
    heads = {"num_heads": H, "num_kv_heads": K, "interleaved": False}
    given = (x, norm, w, None, cos, sin, 1e-5)
    work = 2 * S * E * len(w) if S > 16 else 0
    return Call("rms_norm_qkv_rope", (*given, H, K, False, None), given, heads, work)


def _linear_cross_entropy(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    x, weight = array(n["N"], n["E"], dtype=dtype), array(n["V"], n["E"], dtype=dtype)
    labels = torch.zeros(n["N"], dtype=torch.int64, device=x.device)
    given = (x, weight, labels)
    return Call(
        "linear_cross_entropy", (*given, -100, "none"), given, {"reduction": "none"}, 2 * n["N"] * len(weight) * n["E"]
    )


def _rotated(n: dict[str, int], dtype: torch.dtype, array: Arrays, norm: str | None = None) -> Call:
    H, K, D, R, S = (n[name] for name in "HKDRS")
    q, k = (array(1, S, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    cos, sin = (array(S, R // 2, dtype=dtype) for _ in range(2))
    if norm is None:
        return Call("rope", (q, k, cos, sin, False), (q, k, cos, sin), {"interleaved": False}, 0)
    weights = array(H, D, dtype=dtype), array(K, D, dtype=dtype)
    given = (q, k, *weights, cos, sin, 1e-5)
    return Call("norm_rope", (*given, norm, False), given, {"norm": norm, "interleaved": False}, 0)


def _norm_rope(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    return _rotated(n, dtype, array, "layer")


_ATTENTION = {f"16-bit, D <= {D}": {"S": 4096, "H": 32, "K": 8, "D": D} for D in (64, 128, 160, 192, 256)}
_DECODE = {f"16-bit, rows <= {8 * S}": {"S": S, "N": 8192, "H": 32, "K": 4, "D": 128} for S in (2, 4, 8)}
_LAYER = {"E": 2560, "H": 20, "K": 4, "D": 128}
_QKV = {
    "16-bit, prefill": {**_LAYER, "S": 2048},
    "16-bit, decode": {**_LAYER, "S": 1},
    "16-bit, ragged": {"E": 1000, "H": 8, "K": 2, "D": 72, "S": 512},
    "float32": {**_LAYER, "S": 512},
}
_LOSS = {
    "16-bit": {"N": 2048, "V": 48_000, "E": 2560},
    "16-bit, odd V": {"N": 2048, "V": 128_005, "E": 2560},
    "16-bit, ragged": {"N": 512, "V": 8000, "E": 1000},
    "float32": {"N": 512, "V": 48_000, "E": 2560},
}
_HEADS = {"H": 32, "K": 8, "D": 160, "R": 40, "S": 4096}
_STAGES, _WARPS = (2, 3, 4, 5), (4, 8)

TUNABLES = {
    tunable.kernel: tunable
    for tunable in (
        Tunable(
            "attention", {**_ATTENTION, "float32": {"S": 1024, "H": 8, "K": 2, "D": 128}}, _attention,
            {"M": (32, 64, 128), "N": (16, 32, 64, 128), "warps": _WARPS, "stages": (2, 3, 4)}, ("M",),
        ),
        Tunable(
            "decode_attention", {**_DECODE, "float32": {"S": 1, "N": 4096, "H": 32, "K": 8, "D": 128}},
            _decode_attention,
            {"M": (16, 32, 64), "N": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": _STAGES}, (), ("N", "D"),
        ),
        Tunable(
            "rms_norm_qkv_rope", _QKV, _qkv,
            {"M": (16, 32, 64, 128), "C": (32, 64, 128), "E": (16, 32, 64, 128), "warps": _WARPS, "stages": _STAGES},
            ("M", "C"), ("C", "E"),
        ),
        Tunable(
            "linear_cross_entropy", _LOSS, _linear_cross_entropy,
            {"N": (64, 128), "V": (64, 128, 256), "E": (16, 32, 64), "warps": _WARPS, "stages": _STAGES},
            ("N", "V"),
        ),
        Tunable("rope", {ANY: _HEADS}, _rotated, {"numbers": (512, 1024, 2048, 4096)}),
        Tunable("norm_rope", {ANY: _HEADS}, _norm_rope, {"numbers": (512, 1024, 2048, 4096)}),
    )
}  # fmt: skip
"""Kernels with tiles to choose, by name."""


def tunable(kernel: str) -> Tunable:
    """Of that name; InputError for another."""
    if kernel not in TUNABLES:
        raise InputError(f"--kernel {kernel!r} has no tiles to choose; use one of {', '.join(TUNABLES)}")
    return TUNABLES[kernel]


@cache
def meta_call(kernel: str, shape: str) -> Call:
    """The call of a class without any memory, to be compiled."""

    def array(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    return tunable(kernel).make(shape, array)


def everything() -> Iterator[tuple[Tunable, str, Target]]:
    """Every class of every kernel on every target."""
    for each in TUNABLES.values():
        for target in TARGETS.values():
            for shape in each.classes(target):
                yield each, shape, target
