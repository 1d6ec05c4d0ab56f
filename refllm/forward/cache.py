"""The KV cache: keys (normed and rotated) and values of the tokens that went before, per layer.

A forward pass appends its own keys and values and attends to all of them. Prefill, chunked prefill and decode are one
operation. Sizes: B batch, K key/value heads, T cached tokens, D head_dim; 2 L K T D B numbers in all.
"""

from typing import Any

import numpy as np

from refllm.errors import InputError

_FIRST_CAPACITY = 64


class LayerCache:
    """Keys and values of one layer, each [B, K, T, D], in buffers that grow by doubling: O(1) per appended token."""

    def __init__(self, capacity: int | None = None) -> None:
        self._fixed = capacity
        self._keys = self._values = np.empty((0, 0, 0, 0))
        self.length = 0

    @property
    def keys(self) -> np.ndarray:
        """[B, K, T, D], a view: valid until the cache changes."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> np.ndarray:
        """[B, K, T, D], a view: valid until the cache changes."""
        return self._values[:, :, : self.length]

    def append(self, k_BKSD: np.ndarray, v_BKSD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values, the new ones last. Raises InputError if they do not fit (shape, dtype, capacity)."""
        self._make_room(k_BKSD, v_BKSD)
        new = slice(self.length, self.length + k_BKSD.shape[2])
        self._keys[:, :, new] = k_BKSD
        self._values[:, :, new] = v_BKSD
        self.length = new.stop
        return self.keys, self.values

    def _make_room(self, k: np.ndarray, v: np.ndarray) -> None:
        needed, capacity = self.length + k.shape[2], self._keys.shape[2]
        if self._fixed is not None and needed > self._fixed:
            raise InputError(f"cache: {needed} tokens do not fit into the {self._fixed} slots it was made with")
        held, new = _layout(self._keys), _layout(k)
        if self.length and held != new:
            layout = "{} rows, {} heads of {}, {}"
            raise InputError(f"cache: holds {layout.format(*held)}; the new keys have {layout.format(*new)}")
        if needed <= capacity and held == new:
            return
        if needed > capacity:
            capacity = self._fixed or max(_FIRST_CAPACITY, 2 * capacity, needed)
        self._keys, self._values = (
            _grown(old[:, :, : self.length], new, capacity) for old, new in ((self._keys, k), (self._values, v))
        )

    def select(self, rows: np.ndarray) -> None:
        """Keep these batch rows, in this order; a row may occur more than once."""
        if self.length:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)


def _layout(x: np.ndarray) -> tuple[int, int, int, np.dtype]:
    return x.shape[0], x.shape[1], x.shape[3], x.dtype


def _grown(old: np.ndarray, new: np.ndarray, capacity: int) -> np.ndarray:
    buffer = np.zeros((*new.shape[:2], capacity, new.shape[3]), new.dtype)
    if old.shape[2]:
        buffer[:, :, : old.shape[2]] = old
    return buffer


class DynamicCache:
    """A cache that grows with its contents. Method names are those of transformers.DynamicCache."""

    def __init__(self, config: Any = None) -> None:
        self._layers: list[LayerCache] = []

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer, made when first asked for."""
        while len(self._layers) <= index:
            self._layers.append(self._new_layer())
        return self._layers[index]

    def _new_layer(self) -> LayerCache:
        return LayerCache()

    def __len__(self) -> int:
        return len(self._layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens, the same for every row; padding counts."""
        return self._layers[layer_idx].length if layer_idx < len(self._layers) else 0

    def crop(self, max_length: int) -> None:
        """Forget all but the first max_length tokens; a negative number forgets the last -max_length."""
        length = self.get_seq_length()
        keep = max(0, length + max_length) if max_length < 0 else max_length
        for layer in self._layers:
            layer.crop(keep)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in place: rows 0, 1 become 0, 0, 1, 1 (beams)."""
        if repeats < 1:
            raise InputError(f"cache: repeats={repeats} must be at least 1")
        for layer in self._layers:
            layer.select(np.repeat(np.arange(layer.keys.shape[0]), repeats))

    def batch_select_indices(self, indices: np.ndarray) -> None:
        """Keep the rows `indices` [N], in that order. Raises InputError for a row that is not there."""
        rows = np.asarray(indices)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise InputError(f"cache: expected row numbers [N], found {rows.dtype} of shape {rows.shape}")
        for layer in self._layers:
            batch = layer.keys.shape[0]
            if layer.length and rows.size and (rows.min() < 0 or rows.max() >= batch):
                raise InputError(f"cache: row {rows.min() if rows.min() < 0 else rows.max()} is outside 0..{batch - 1}")
        for layer in self._layers:
            layer.select(rows)

    def reorder_cache(self, beam_idx: np.ndarray) -> None:
        """`batch_select_indices` under the name that beam search uses."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Forget all tokens."""
        self.crop(0)


class StaticCache(DynamicCache):
    """A cache of max_cache_len slots, allocated once, when the first tokens arrive. Running over raises InputError."""

    def __init__(self, config: Any = None, max_cache_len: int = 0) -> None:
        super().__init__(config)
        if not isinstance(max_cache_len, int | np.integer) or max_cache_len < 1:
            raise InputError(f"StaticCache: max_cache_len={max_cache_len!r} must be an integer of at least 1")
        self.max_cache_len = max_cache_len

    def _new_layer(self) -> LayerCache:
        return LayerCache(self.max_cache_len)


class NoCache:
    """What a forward pass without a cache uses: keys and values are those of this call."""

    def layer(self, index: int) -> "NoCache":
        return self

    def append(self, k_BKSD: np.ndarray, v_BKSD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return k_BKSD, v_BKSD
