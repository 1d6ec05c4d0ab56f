"""The cache of a fast model holds what was appended, however it grew, was cropped and was reordered."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm.errors import InputError  # noqa: E402
from refllm.kernels.models.cache import NoCache, SlotLayer, TorchCache, TorchLayerCache  # noqa: E402

K, D = 2, 4


def tokens(count: int, rows: int = 2, dtype: Any = torch.float32) -> Any:
    return torch.randn(rows, K, count, D).to(dtype)


@pytest.mark.parametrize("capacity", [None, 400])
def test_what_was_appended_is_there_after_growing_cropping_and_reordering(capacity: int | None) -> None:
    cache, keys, values = TorchLayerCache(capacity), tokens(0), tokens(0)
    assert cache.keys.shape == cache.values.shape == (0, 0, 0, 0)
    for count, crop, rows in ((3, 9, [0, 1]), (60, 50, [1, 0]), (40, 90, [1, 1]), (200, 300, [0, 1, 1]), (1, 200, [2])):
        k, v = tokens(count, len(keys)), tokens(count, len(keys))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        for found, wanted in zip(cache.append(k, v), (keys, values), strict=True):
            assert torch.equal(found, wanted)
        cache.crop(crop)
        keys, values = keys[:, :, :crop], values[:, :, :crop]
        cache.select(np.array(rows))
        keys, values = keys[rows], values[rows]
        assert cache.length == keys.shape[2]
        assert torch.equal(cache.keys, keys)
        assert torch.equal(cache.values, values)
    assert cache.slots() is None


def test_room_is_doubled_and_kept_where_it_suffices() -> None:
    cache = TorchLayerCache()
    first, _ = cache.room(tokens(1), 5)
    assert first.shape[2] >= 5
    assert cache.room(tokens(1), first.shape[2])[0] is first
    assert torch.count_nonzero(first) == 0
    cache.append(tokens(5), tokens(5))
    assert cache.holds(first, cache.room(tokens(1), 1)[1])
    assert not cache.holds(first, first)
    twice, _ = cache.room(tokens(1), first.shape[2])
    assert twice.shape[2] == 2 * first.shape[2]
    assert not cache.holds(first, first)
    cache.crop(0)  # what is empty takes keys of another layout
    assert cache.room(tokens(1, 3, torch.bfloat16), 1)[0].dtype == torch.bfloat16
    fixed = TorchLayerCache(7)
    keys, values = fixed.room(tokens(1), 2)
    assert keys.shape[2] == 7
    fixed.append(tokens(7), tokens(7))
    assert not fixed.holds(keys, values)  # no slot is free


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    cache = TorchLayerCache(4)
    cache.append(held := tokens(3), held)
    with pytest.raises(InputError, match="cache: 5 tokens do not fit into the 4 slots it was made with"):
        cache.append(tokens(2), tokens(2))
    said = (
        "cache: holds 2 rows, 2 heads of 4, torch.float32 on cpu; the new keys have 3 rows, 2 heads of 4, torch.float16"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        cache.append(tokens(1, 3, torch.float16), tokens(1, 3, torch.float16))
    assert torch.equal(cache.keys, held)


@pytest.mark.parametrize("size", [0, -1, 2.0, "8"])
def test_a_size_that_cannot_be_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="must be an integer of at least 1, or None"):
        TorchCache(max_cache_len=size)
    for possible in (None, 1, np.int64(9)):
        assert TorchCache(max_cache_len=possible).layer(1)._fixed == possible


def test_attention_sees_what_the_cache_holds() -> None:
    op = SimpleNamespace(attention=lambda q, k, v, **masking: (q, k, v, masking))
    q, k, v = tokens(2), tokens(2), tokens(2)
    for cache, before in ((NoCache(), 0), (TorchLayerCache(), 3)):
        if isinstance(cache, TorchLayerCache):
            cache.append(tokens(before), tokens(before))
        seen = cache.attend(op, q, k, v, {"causal": True})
        assert seen[0] is q
        assert seen[1].shape[2] == before + 2
        assert torch.equal(seen[1][:, :, before:], k)
        assert torch.equal(seen[2][:, :, before:], v)
        assert seen[3] == {"causal": True}
    assert NoCache().layer(3).slots() is None


def test_slots_are_written_row_by_row_behind_what_is_filled() -> None:
    keys, values, before = tokens(6), tokens(6), torch.tensor([1, 3])
    old, k, v = keys.clone(), tokens(2), tokens(2)
    layer = SlotLayer(keys, values, before, before + 2)
    op = SimpleNamespace(decode_attention=lambda q, k, v, lengths: (k, v, lengths))
    assert layer.slots() == (keys, values, before)
    found = layer.attend(op, tokens(2), k, v, {})
    assert found[0] is keys
    assert found[2].tolist() == [3, 5]
    for b, start in enumerate((1, 3)):
        assert torch.equal(keys[b, :, start : start + 2], k[b])
        assert torch.equal(values[b, :, start : start + 2], v[b])
        assert torch.equal(keys[b, :, :start], old[b, :, :start])
        assert torch.equal(keys[b, :, start + 2 :], old[b, :, start + 2 :])
    written = keys.clone()
    layer.attend(op, tokens(2), keys, values, {})  # a kernel has written them itself
    assert torch.equal(keys, written)
