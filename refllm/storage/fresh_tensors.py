"""Random initial values of tensors, as for a model before its training."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from refllm.parallel import blocks

# Elements that one thread draws at a time.
TASK = 1 << 20


def fresh_tensor(
    name: str, shape: tuple[int, ...], initializer_range: float, seed: int, pad_token_id: int | None = None
) -> NDArray[np.float32]:
    """Float32 values as Transformers initialises them (`PreTrainedModel._init_weights`): N(0, initializer_range) for
    linear maps and embeddings with a zero row for the padding token, 0 for biases, 1 for the weights of norms.

    The random numbers depend on `seed` and `name` only, so that models of one seed share their backbone whatever
    their head is, and any tensor can be made alone. Each block of a tensor has a stream of its own, so that the blocks
    can be drawn by several threads.
    """
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if "norm" in name:
        return np.ones(shape, np.float32)
    values = np.empty(shape, np.float32)
    flat = values.reshape(-1)
    key = zlib.crc32(name.encode())

    def draw(part: slice) -> None:
        generator = np.random.Generator(np.random.SFC64([seed, key, part.start]))
        generator.standard_normal(dtype=np.float32, out=flat[part])
        flat[part] *= np.float32(initializer_range)

    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(draw, blocks(flat.size, TASK)))
    if name == "embed_tokens.weight" and pad_token_id is not None:
        values[pad_token_id] = 0
    return values


def default_threads() -> int:
    """Cores that this process may use, up to four: more do not read memory faster."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
