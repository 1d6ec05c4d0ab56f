"""The KV cache in tensors: preallocated slots, written in place, with the methods of `refllm.forward.cache`."""

from typing import Any

import numpy as np
import torch

from refllm.errors import InputError
from refllm.forward.cache import DynamicCache

_FIRST_CAPACITY = 256


class TorchLayerCache:
    """Keys and values of one layer, each [B, K, T, D], in tensors of `capacity` slots.

    capacity: fixed, or None to grow by doubling. Slots past `length` hold anything; nothing reads them.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._fixed = capacity
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> torch.Tensor:
        """[B, K, T, D], a view: valid until the cache changes."""
        return self._filled(self._keys)

    @property
    def values(self) -> torch.Tensor:
        """[B, K, T, D], a view: valid until the cache changes."""
        return self._filled(self._values)

    def _filled(self, slots: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(0, 0, 0, 0) if slots is None else slots[:, :, : self.length]

    def append(self, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones last. Raises InputError if they do not fit (shape, dtype, capacity)."""
        keys, values = self.room(k_BKSD, k_BKSD.shape[2])
        new = slice(self.length, self.length + k_BKSD.shape[2])
        keys[:, :, new] = k_BKSD
        values[:, :, new] = v_BKSD
        self.length = new.stop
        return self.keys, self.values

    def slots(self) -> None:
        """No slots that a kernel could write into: keys and values arrive through `attend`."""

    def attend(
        self, op: Any, q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, masking: dict[str, Any]
    ) -> torch.Tensor:
        """Append the new keys and values, and attend to all."""
        return op.attention(q_BHSD, *self.append(k_BKSD, v_BKSD), **masking)

    def room(self, like: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors [B, K, N, D] themselves, with room for `count` more tokens laid out as `like` [B, K, ., D]."""
        needed, old = self.length + count, self._keys
        if self._fixed is not None and needed > self._fixed:
            raise InputError(f"cache: {needed} tokens do not fit into the {self._fixed} slots it was made with")
        fits = old is not None and _layout(old) == _layout(like)
        if old is not None and self.length and not fits:
            layout = "{} rows, {} heads of {}, {} on {}"
            held, new = layout.format(*_layout(old)), layout.format(*_layout(like))
            raise InputError(f"cache: holds {held}; the new keys have {new}")
        if old is None or not fits or needed > old.shape[2]:
            capacity = self._fixed or max(
                _FIRST_CAPACITY, needed, 2 * (old.shape[2] if fits and old is not None else 0)
            )
            self._keys, self._values = (self._grown(x, like, capacity) for x in (self._keys, self._values))
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor, capacity: int) -> torch.Tensor:
        B, K, _, D = like.shape
        grown = like.new_zeros(B, K, capacity, D)
        if old is not None and self.length:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def holds(self, keys: Any, values: Any) -> bool:
        """Whether these are the tensors of this layer, with a free slot after the last."""
        same = self._keys is not None and self._keys is keys and self._values is values
        return bool(same and self.length < keys.shape[2])

    def select(self, rows: np.ndarray) -> None:
        """Keep these batch rows, in this order; a row may occur more than once."""
        if self._keys is not None and self._values is not None:
            index = torch.as_tensor(np.ascontiguousarray(rows), device=self._keys.device)
            if len(index) == len(self._keys):  # in place: a recorded step goes on with the same tensors
                self._keys.copy_(self._keys[index])
                self._values.copy_(self._values[index])
            else:
                self._keys, self._values = self._keys[index], self._values[index]

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape[0], x.shape[1], x.shape[3], x.dtype, x.device


class NoCache:
    """What a forward pass without a cache uses: keys and values are those of this call."""

    def layer(self, index: int) -> "NoCache":
        return self

    def slots(self) -> None:
        """None."""

    def attend(
        self, op: Any, q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, masking: dict[str, Any]
    ) -> torch.Tensor:
        """Attend to the new keys and values."""
        return op.attention(q_BHSD, k_BKSD, v_BKSD, **masking)


class SlotLayer:
    """One layer of a cache whose lengths are on the device, for steps that a CUDA graph repeats: nothing in it depends
    on a number that Python knows.

    keys, values: [B, K, N, D]. lengths_B: filled slots before this step; lengths_after_B: with its tokens.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, lengths_B: torch.Tensor, lengths_after_B: torch.Tensor
    ) -> None:
        self.keys, self.values, self._before, self._after = keys, values, lengths_B, lengths_after_B

    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where a kernel writes keys and values itself: the caches and, per row, the first free slot."""
        return self.keys, self.values, self._before

    def attend(
        self, op: Any, q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, masking: dict[str, Any]
    ) -> torch.Tensor:
        """Write the new keys and values if no kernel has, and attend to the filled slots."""
        if k_BKSD is not self.keys:
            B, _, S, _ = k_BKSD.shape
            rows = torch.arange(B, device=k_BKSD.device)[:, None]
            places = self._before[:, None] + torch.arange(S, device=k_BKSD.device)
            self.keys[rows, :, places] = k_BKSD.transpose(1, 2)
            self.values[rows, :, places] = v_BKSD.transpose(1, 2)
        return op.decode_attention(q_BHSD, self.keys, self.values, self._after)


class TorchCache(DynamicCache):
    """The cache of a fast model. max_cache_len: allocate that many slots once; None grows with the contents."""

    def __init__(self, config: Any = None, max_cache_len: int | None = None) -> None:
        super().__init__(config)
        if max_cache_len is not None and (not isinstance(max_cache_len, int | np.integer) or max_cache_len < 1):
            raise InputError(f"TorchCache: max_cache_len={max_cache_len!r} must be an integer of at least 1, or None")
        self.max_cache_len = max_cache_len

    def layer(self, index: int) -> Any:
        """The cache of one layer, made when first asked for: a `TorchLayerCache`."""
        return super().layer(index)

    def _new_layer(self) -> Any:
        return TorchLayerCache(self.max_cache_len)
