"""What a call, a step of decoding or a prefill cannot do without: bytes that have to move, and flops.

Those of one operator stand in its record (`refllm.ops.contracts`); those of a whole model are here.
"""

from collections.abc import Sequence
from typing import Any

from refllm.ops.contracts import CONTRACTS
from refllm.ops.traffic import Traffic


def traffic(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Traffic:
    """The traffic of one call, from the shapes and dtypes of its tensors. Raises KeyError for another operator."""
    return CONTRACTS[operator].traffic(*arguments, **keywords)


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
