"""What `refllm bench tune` can choose between: of each kernel the classes of shapes, a call of each, and candidates.

A call is made of the sizes of a published layer. On the meta device it is compiled; on a GPU it runs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch

from refllm.errors import InputError
from refllm.kernels.launch import Launch
from refllm.kernels.targets import TARGETS, Target
from refllm.kernels.tuning.table import ANY, entries

Arrays = Callable[..., torch.Tensor]

SMALL = {"S": 144, "N": 304, "V": 992, "E": 992}
"""Sizes of a small call: over one tile by a few. A remainder by 16 is added to them, so that the class stays."""


HELD = 160
"""Sums per thread: with more of them the addresses and operands do not fit into its 255 registers beside them."""


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
    fields: of its tile, with the values worth trying; a field that is not among them is that size of the call.
    only: of some classes fewer: in float32 products become single multiplications, and large tiles endless code.
    outer, inner: fields that say how often an operand of a product is read again, from memory and from shared memory.
    sums: sizes and fields of the accumulators of its products.
    streamed: fields and constants whose product is what one step reads of the large operand (weights, keys, logits);
        none if a program reads all that it needs at once.
    """

    kernel: str
    shapes: dict[str, dict[str, int]]
    call: Callable[[dict[str, int], torch.dtype, Arrays], Call]
    fields: dict[str, tuple[int, ...]]
    only: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    outer: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()
    sums: tuple[tuple[str, str], ...] = ()

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
        """Every tile worth trying for a class: on AMD in 2 stages, since copies there pass through registers."""
        sizes, kind = self.shapes[shape], self.module.Tile
        fields = {**self.fields, **self.only.get(shape, {}), **({"stages": (2,)} if target.is_amd else {})}
        values = (fields.get(name) or (sizes[name],) for name in kind._fields)
        tiles = [kind(*each) for each in itertools.product(*values)]
        return [tile for tile in tiles if self._sums_per_thread(shape, tile, target) <= HELD]

    def _sums_per_thread(self, shape: str, tile: Any, target: Target) -> float:
        """Those that live as long as the loop over the products does; 0 without products."""
        sizes = {"warps": 1, **self.shapes[shape], **tile._asdict()}
        sums = sum(prod(sizes[name] for name in names) for names in self.sums)
        return sums / (sizes["warps"] * target.warp_size)

    def near(self, shape: str, target: Target) -> list[Any]:
        """The tile of the table first, then the candidates that differ from it in one or two fields; all without it."""
        entry = entries().get((self.kernel, shape, target.name))
        if entry is None:
            return self.candidates(shape, target)
        now = self.module.Tile(**entry.tile)
        differ = [
            (sum(a != b for a, b in zip(each, now, strict=True)), each) for each in self.candidates(shape, target)
        ]
        return [now, *(each for count, each in differ if 1 <= count <= 2)]


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


def _cross_entropy(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    logits = array(n["N"], n["V"], dtype=dtype)
    given = (logits, torch.zeros(n["N"], dtype=torch.int64, device=logits.device))
    return Call("cross_entropy", (*given, -100, "none"), given, {"reduction": "none"}, 0)


def _rotated(n: dict[str, int], dtype: torch.dtype, array: Arrays, norm: str | None = None) -> Call:
    H, K, D, R, S, interleaved = (n[name] for name in ("H", "K", "D", "R", "S", "interleaved"))
    q, k = (array(1, S, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    cos, sin = (array(S, R // 2, dtype=dtype) for _ in range(2))
    order = {"interleaved": bool(interleaved)}
    if norm is None:
        return Call("rope", (q, k, cos, sin, *order.values()), (q, k, cos, sin), order, 0)
    weights = array(H, D, dtype=dtype), array(K, D, dtype=dtype)
    given = (q, k, *weights, cos, sin, 1e-5)
    return Call("norm_rope", (*given, norm, *order.values()), given, {"norm": norm, **order}, 0)


def _norm_rope(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    return _rotated(n, dtype, array, "layer")


def _rms_norm(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    x, residual = (array(n["N"], n["row"], dtype=dtype) for _ in range(2))
    given = (x, residual, array(n["row"], dtype=dtype), 1e-5)
    return Call("add_rms_norm", given, given, {}, 0)


def _layer_norm(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    x, residual = (array(n["N"], n["row"], dtype=dtype) for _ in range(2))
    given = (x, residual, array(n["row"], dtype=dtype), array(n["row"], dtype=dtype), 1e-5)
    return Call("add_layer_norm", given, given, {}, 0)


def _swiglu(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    both = array(n["N"], 2 * n["F"], dtype=dtype)
    given = (both[:, : n["F"]], both[:, n["F"] :])
    return Call("swiglu", given, given, {}, 0)


def _relu2(n: dict[str, int], dtype: torch.dtype, array: Arrays) -> Call:
    given = (array(n["N"], n["F"], dtype=dtype),)
    return Call("relu2", given, given, {}, 0)


_ATTENTION = {f"16-bit, D <= {D}": {"S": 4096, "H": 32, "K": 8, "D": D} for D in (64, 128, 160, 192, 256)}
_DECODE = {f"16-bit, rows <= {8 * S}": {"S": S, "N": 8192, "H": 32, "K": 4, "D": 128, "M": 8 * S} for S in (2, 4, 8)}
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
_LOGITS = {"rows of 16 bytes": {"N": 2048, "V": 48_000}, "odd V": {"N": 2048, "V": 128_005}}
_ROWS = {"E <= 4096": 2560, "E <= 16384": 5120, "longer": 20_480}
_NORMS = {shape: {"N": 2048, "row": E} for shape, E in _ROWS.items()}
_ROPE = {
    "R = D": {"H": 20, "K": 20, "D": 128, "R": 128, "S": 2048, "interleaved": 1},
    "R < D": {"H": 32, "K": 32, "D": 80, "R": 20, "S": 2048, "interleaved": 0},
}
_NORM_ROPE = {ANY: {"H": 32, "K": 8, "D": 160, "R": 40, "S": 2048, "interleaved": 0}}
_WARPS, _NUMBERS = (4, 8), (512, 1024, 2048, 4096)
_STAGES = (3, 4)
"""Where every step waits for copies: in two stages they would have to arrive within one step."""

TUNABLES = {
    tunable.kernel: tunable
    for tunable in (
        # 128 keys per step take all 255 registers for D = 128 on sm_90, and 4,337 instructions instead of 3,148.
        Tunable(
            "attention", {**_ATTENTION, "float32": {"S": 1024, "H": 8, "K": 2, "D": 128}}, _attention,
            {"M": (32, 64, 128), "N": (16, 32, 64), "warps": _WARPS, "stages": (2, 3)},
            {"float32": {"M": (32,), "N": (16, 32), "stages": (2,)}}, ("M",), ("N",), sums=(("M", "D"), ("M", "N")),
        ),
        Tunable(
            "decode_attention", {**_DECODE, "float32": {"S": 1, "N": 4096, "H": 32, "K": 8, "D": 128, "M": 16}},
            _decode_attention, {"N": (32, 64), "warps": _WARPS, "stages": _STAGES},
            {"float32": {"N": (16, 32), "stages": (2,)}}, streamed=("N", "D"),
        ),
        Tunable(
            "rms_norm_qkv_rope", _QKV, _qkv,
            {"M": (32, 64, 128), "C": (32, 64, 128), "E": (32, 64), "warps": _WARPS, "stages": _STAGES},
            {
                "16-bit, decode": {"M": (16,), "C": (32, 64), "E": (128,), "stages": (3, 4, 5)},
                "float32": {"M": (32, 64), "C": (32, 64), "E": (16,), "stages": (2,)},
            },
            ("M", "C"), streamed=("C", "E"), sums=(("M", "C"),),
        ),
        Tunable(
            "linear_cross_entropy", _LOSS, _linear_cross_entropy,
            {"N": (64, 128), "V": (64, 128, 256), "E": (32, 64), "warps": _WARPS, "stages": _STAGES},
            {"float32": {"N": (32, 64), "V": (64, 128), "E": (16,), "stages": (2, 3)}}, ("N", "V"), sums=(("N", "V"),),
        ),
        Tunable("rms_norm", _NORMS, _rms_norm, {"per_thread": (8, 16, 32)}),
        Tunable("layer_norm", _NORMS, _layer_norm, {"per_thread": (8, 16, 32)}),
        Tunable("rope", _ROPE, _rotated, {"numbers": _NUMBERS}),
        Tunable("norm_rope", _NORM_ROPE, _norm_rope, {"numbers": _NUMBERS}),
        Tunable("swiglu", {ANY: {"N": 2048, "F": 7040}}, _swiglu, {"bytes": (16, 32, 64), "warps": _WARPS}),
        Tunable("relu2", {ANY: {"N": 2048, "F": 18_432}}, _relu2, {"bytes": (16, 32, 64), "warps": _WARPS}),
        Tunable(
            "cross_entropy", _LOGITS, _cross_entropy, {"logits": (4096, 8192), "warps": (4, 8, 16)},
            streamed=("LANES", "PER_LANE"),
        ),
    )
}  # fmt: skip
"""Every kernel, by name. Calls: layers of published models where their sizes serve the class."""


def tunable(kernel: str) -> Tunable:
    """The kernel of that name. Raises InputError for another."""
    if kernel not in TUNABLES:
        raise InputError(f"--kernel {kernel!r} is no kernel; use one of {', '.join(TUNABLES)}")
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
            for shape in each.shapes:
                yield each, shape, target
