"""What a call, a step of decoding or a prefill cannot do without: bytes that have to move, and flops.

Bytes: every number that the definition reads is read once and every number of the result is written once. A kernel that
reads something twice, or writes something in between, moves more and is slower for it: that is the point. Those of one
operator follow from the shapes in its record (`refllm.ops.contracts`), where its flops stand too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from refllm.ops.contracts import CONTRACTS, Contract

FLOAT32 = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Traffic:
    """bytes: moved between the chip and its memory, at least. flops: done."""

    bytes: int
    flops: int


def traffic(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Traffic:
    """The traffic of one call, from the shapes and dtypes of its tensors. Raises KeyError for another operator."""
    known = CONTRACTS[operator]
    given = known.bound(arguments, keywords)
    return Traffic(
        _read(known, given) + _written(known, given, arguments, keywords), known.flops(*arguments, **keywords)
    )


def _read(known: Contract, given: dict[str, Any]) -> int:
    """Bytes of the arguments, of caches the filled slots."""
    size = 0
    for name, axes in known.arguments.items():
        if (x := given[name]) is None:
            continue
        if "lengths" in given and axes[-2:] == ("N", "D"):
            size += x.element_size() * x.shape[1] * x.shape[-1] * int(given["lengths"].sum())
        else:
            size += x.element_size() * prod(x.shape)
    return size


def _written(known: Contract, given: dict[str, Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> int:
    """Bytes of the results, in the dtype of the first argument unless the record says float32. All rows count."""
    width = given[next(iter(known.arguments))].element_size()
    names = zip(known.outputs, known.result_shapes(arguments, keywords), strict=False)
    return sum((FLOAT32 if name in known.float32 else width) * prod(shape) for name, shape in names)


def decode_step(weights: int, cache: int, group: int, batch: int, width: int, context: int) -> Traffic:
    """One step of decoding: `weights` numbers read once, and of each of `batch` sequences `cache` numbers per position.

    weights: without the embedding table, of which a step reads a row. group: query heads per key/value head. flops: 2
    per weight and sequence, and of attention 2 per number of the cache and query head that reads it.
    """
    held = cache * batch * context
    return Traffic(width * (weights + held), 2 * weights * batch + 2 * group * held)


def prefill(weights: int, head: int, cache: int, group: int, batch: int, width: int, tokens: int) -> Traffic:
    """The forward pass over `tokens` positions of `batch` sequences, logits of the last one only.

    weights: of the layers; head: of lm_head; cache: numbers of keys and values per position, all layers; group: query
    heads per key/value head. Bytes: the weights, and the cache written once. flops: 2 per weight and token, 2 per
    number of the head and sequence, and attention over every earlier position.
    """
    pairs = tokens * (tokens + 1) // 2
    flops = 2 * weights * batch * tokens + 2 * head * batch + 2 * cache * group * batch * pairs
    return Traffic(width * (weights + head + cache * batch * tokens), flops)
