"""The inputs of a call as a candidate gets them; those parts of them that the contract does not read; one row alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refllm.inputs import to_numpy
from refllm.ops.contracts import contract_of, is_batched
from refllm.strategies.arrays import Array, memory_of
from refllm.strategies.call import Call
from refllm.strategies.levels import ignored_rows

_SMALL = 1 << 24
"""Bytes of memory up to which all of it is compared or changed, what lies between the elements included."""


def make(call: Call, device: str, arrays: str) -> tuple[list[Any], dict[str, Any]]:
    """New tensors for a call, or new NumPy arrays. With arrays="numpy" nothing in this module needs Torch."""
    return call.placed() if arrays == "numpy" else call.tensors(device)


def other_numbers(arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Other tensors or arrays of floats, each by a factor of its own: two signs, or two equal factors, may cancel."""

    def other(x: Any, factor: int) -> Any:
        floats = hasattr(x, "shape") and not str(x.dtype).removeprefix("torch.").startswith(("int", "bool", "uint"))
        return (x * factor).astype(x.dtype) if floats and isinstance(x, np.ndarray) else x * factor if floats else x

    return (
        [other(x, i + 2) for i, x in enumerate(arguments)],
        {name: other(x, 2) for name, x in keywords.items()},
    )


def named(call: Call, arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arrays or tensors among the arguments, by name."""
    given = {**dict(zip(call.names, arguments, strict=True)), **keywords}
    return {name: x for name, x in given.items() if hasattr(x, "shape")}


def memory(x: Any) -> Any:
    """A copy of all bytes of the memory of an array or a tensor; of its elements alone where that memory is huge."""
    if isinstance(x, np.ndarray):
        whole = memory_of(x)
        return (whole if whole.nbytes <= _SMALL else x.reshape(-1).view(np.uint8)).copy()
    import torch

    storage = x.untyped_storage()
    if storage.nbytes() > _SMALL:
        return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) if x.numel() else None
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage).clone()


# ------------------------------------------------------------------------------------------------------ what is unread


def change_padding(tensors: dict[str, Any]) -> list[str]:
    """Writes 3 between the elements of tensors; the names of those that had anything there."""
    return [name for name, x in tensors.items() if _change_padding(x)]


def _change_padding(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return _change_padding_of_array(x)
    import torch

    storage = x.untyped_storage()
    if storage.nbytes() > _SMALL or not x.numel() or storage.nbytes() == x.numel() * x.element_size():
        return False
    flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage)
    between = torch.ones_like(flat, dtype=torch.bool)
    between.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    flat[between] = 3
    return bool(between.any())


def _change_padding_of_array(x: np.ndarray) -> bool:
    whole = memory_of(x)
    if whole.nbytes > _SMALL or not x.size or whole.nbytes == x.nbytes:
        return False
    flat = whole.view(x.dtype)
    between = np.ones(flat.size, bool)
    offset = (x.ctypes.data - whole.ctypes.data) // x.itemsize
    np.ndarray(x.shape, bool, between, offset, tuple(stride // x.itemsize for stride in x.strides))[...] = False
    flat[between] = 3
    return bool(between.any())


def change_unread(call: Call, tensors: dict[str, Any]) -> list[str]:
    """Changes the elements that the contract says are not read; a phrase for each kind of them.

    Numbers become other numbers, and NaN stays: a call that has NaN there shows by itself who reads it, and right code
    may go another way then, and add in another order.
    """
    changed = []
    for phrase, x, where in _unread(call, tensors):
        if bool(where.any()) and _separate(x):
            where = where if isinstance(x, np.ndarray) else _as_tensor(where, x)
            x[where] = 1 - x[where]
            changed.append(phrase)
    return changed


def _separate(x: Any) -> bool:
    """Whether no two elements share memory."""
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    return all(stride or size <= 1 for size, stride in zip(x.shape, strides, strict=True))


def _as_tensor(where: np.ndarray, x: Any) -> Any:
    import torch

    return torch.from_numpy(where).to(x.device)


def _unread(call: Call, tensors: dict[str, Any]) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(phrase, array or tensor, which entries of its leading axes are not read)."""
    keywords, known = dict(call.keywords), contract_of(call.operator)
    kinds = known.kinds.values()
    if "mask" in kinds:
        q, k, v, mask = (tensors.get(name) for name in ("q", "k", "v", "key_mask"))
        assert q is not None
        assert k is not None
        if mask is not None:
            hidden = np.array(np.broadcast_to(~to_numpy(mask)[:, None, :], k.shape[:3]))
            yield "masked keys", k, hidden
            yield "masked values", v, hidden
        if keywords.get("causal", True) and q.shape[2] > k.shape[2]:
            blind = np.arange(q.shape[2]) < q.shape[2] - k.shape[2]
            yield "queries that see no key", q, np.array(np.broadcast_to(blind, q.shape[:3]))
    elif "lengths" in kinds:
        k, v, lengths = tensors["k_cache"], tensors["v_cache"], tensors["lengths"]
        beyond = np.arange(k.shape[2]) >= to_numpy(lengths)[:, None]
        for name, x in (("keys", k), ("values", v)):
            yield f"{name} past the length", x, np.array(np.broadcast_to(beyond[:, None, :], x.shape[:3]))
    elif "labels" in kinds:
        rows = next(name for name, axes in known.arguments.items() if axes[0] == "N" and len(axes) == 2)
        ignored = to_numpy(tensors["labels"]) == keywords.get("ignore_index", -100)
        yield "rows whose label is ignored", tensors[rows], ignored


# ------------------------------------------------------------------------------------------------------------ one row


def rows_of(call: Call) -> int:
    """How many rows there are that do not know of each other: the length of the first axis, 1 where there is none."""
    axes = contract_of(call.operator).arguments
    given = zip(call.names, call.arguments, strict=True)
    batched = (x.shape[0] for name, x in given if isinstance(x, Array) and is_batched(axes[name], len(x.shape)))
    return next(batched, 1)


def row_for_itself(call: Call) -> int:
    """The row that is computed alone: the last one; of a loss of all rows the last that counts, since calls without any
    are a family of their own, which may not be offered. -1 if there is none."""
    ignored = ignored_rows(call) if is_reduced(call) else None
    rows = np.arange(rows_of(call)) if ignored is None else np.flatnonzero(~ignored)
    return int(rows[-1]) if rows.size else -1


def row_alone(
    call: Call, arguments: Sequence[Any], keywords: dict[str, Any], row: int
) -> tuple[list[Any], dict[str, Any]]:
    """Views of the arguments (arrays or tensors) that hold one row of the batch, which keeps its axis."""
    return rows_alone(call, arguments, keywords, slice(row, row + 1))


def rows_alone(
    call: Call, arguments: Sequence[Any], keywords: dict[str, Any], part: slice
) -> tuple[list[Any], dict[str, Any]]:
    """The same of several rows."""
    axes = contract_of(call.operator).arguments

    def cut(name: str, x: Any) -> Any:
        batched = name in axes and hasattr(x, "shape") and is_batched(axes[name], x.ndim)
        return x[part] if batched else x

    return (
        [cut(name, x) for name, x in zip(call.names, arguments, strict=True)],
        {name: cut(name, x) for name, x in keywords.items()},
    )


def is_reduced(call: Call) -> bool:
    """Whether the result is one number for all rows together."""
    return "reduction" in contract_of(call.operator).choices and dict(call.keywords).get("reduction", "mean") != "none"


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Element by element; any NaN equals any other, and 0 equals -0 (0 times what is not read has its sign)."""
    return (a == b) | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else a == b
