"""Candidates for the tests of `check_op`: right, wrong, and badly behaved ones, each for rms_norm unless named else."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def right(x: Any, weight: Any, eps: float) -> Any:
    """The contract: float32 inside, one rounding at the end."""
    x32 = x.float()
    return (weight.float() * x32 / torch.sqrt((x32 * x32).mean(-1, keepdim=True) + eps)).to(x.dtype)


# -- wrong values ------------------------------------------------------------------------------------------------------


def tail(x: Any, weight: Any, eps: float) -> Any:
    y = right(x, weight, eps)
    y[..., 256:] = 0
    return y


def padding_lanes(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """layer_norm: the lanes past the end of a row count in the variance."""
    x32, E = x.float(), x.shape[-1]
    centred = x32 - x32.mean(-1, keepdim=True)
    pads = (1 << max(0, E - 1).bit_length()) - E
    variance = ((centred * centred).sum(-1, keepdim=True) + pads * x32.mean(-1, keepdim=True) ** 2) / E
    y = weight.float() * centred / torch.sqrt(variance + eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rounded_before_weight(x: Any, weight: Any, eps: float) -> Any:
    return (weight.float() * right(x, torch.ones_like(weight), eps).float()).to(x.dtype)


def bias_of_3_in_1000(x: Any, weight: Any, eps: float) -> Any:
    return (right(x.float(), weight.float(), eps) * 1.003).to(x.dtype)


def one_element(x: Any, weight: Any, eps: float) -> Any:
    """One of thousands of elements is 3 % off."""
    y = right(x, weight, eps).contiguous()
    if y.numel() > 4000:
        y.view(-1)[777] *= 1.03
    return y


def no_nan(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps).nan_to_num()


def nan_spreads(x: Any, weight: Any, eps: float) -> Any:
    """NaN of one row reaches all rows."""
    return right(x, weight, eps) + 0 * x.float().sum()


def last_key(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    """attention: from 65 keys on, the last one is not seen."""
    from refllm.kernels import plain

    if k.shape[2] > 64:
        mask = keywords.get("key_mask")
        mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask is None else mask.clone()
        mask[:, -1] = False
        keywords["key_mask"] = mask
    return plain.attention(q, k, v, **keywords)


def zero_for_no_rows(logits: Any, labels: Any, **keywords: Any) -> Any:
    """cross_entropy: the mean over no rows is 0 and not NaN."""
    from refllm.kernels import plain

    loss = plain.cross_entropy(logits, labels, **keywords)
    return loss.nan_to_num(0.0) if (labels < 0).all() else loss


def zero_for_one_row(logits: Any, labels: Any, **keywords: Any) -> Any:
    """cross_entropy: 0 of a single row."""
    from refllm.kernels import plain

    loss = plain.cross_entropy(logits, labels, **keywords)
    return loss * 0 if len(labels) == 1 else loss


def half_split(q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    """rope: always the same pairs."""
    from refllm.kernels import plain

    return plain.rope(q, k, cos, sin, interleaved=False)


# -- what others lack, or take else ------------------------------------------------------------------------------------


def attention_alone(q: Any, k: Any, v: Any, *, scale: float | None = None, causal: bool = True) -> Any:
    """attention without a key mask and without lse."""
    from refllm.kernels import plain

    return plain.attention(q, k, v, scale=scale, causal=causal)


def always_causal(q: Any, k: Any, v: Any, *, scale: float | None = None, causal: bool = True) -> Any:
    """The same, for which the queries of a batch always see the keys before them alone."""
    from refllm.kernels import plain

    return plain.attention(q, k, v, scale=scale, causal=True)


def never_lse(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    """attention that never returns lse."""
    return attention_alone(q, k, v)


def no_bias(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """layer_norm, without a bias."""
    from refllm.kernels import plain

    return plain.layer_norm(x, weight, None, eps)


def two_tensors(x: Any, y: Any) -> Any:
    return x + y


def inner_mistake(x: Any, weight: Any, eps: float) -> Any:
    """Its own call is wrong, and not the one that it gets."""
    return two_tensors(x, weight, eps)  # type: ignore[call-arg]


# -- bad behaviour -----------------------------------------------------------------------------------------------------


def raises(x: Any, weight: Any, eps: float) -> Any:
    if x.shape[-1] > 16:
        raise RuntimeError("only 16 columns")
    return right(x, weight, eps)


def exits(x: Any, weight: Any, eps: float) -> Any:
    sys.exit(3)


def hangs(x: Any, weight: Any, eps: float) -> Any:
    while x.shape[-1] > 30:
        time.sleep(0.01)
    return right(x, weight, eps)


def aborts(x: Any, weight: Any, eps: float) -> Any:
    if x.shape[-1] > 30:
        os.abort()
    return right(x, weight, eps)


def ends_quietly(x: Any, weight: Any, eps: float) -> Any:
    os._exit(0)


def hangs_late(x: Any, weight: Any, eps: float) -> Any:
    """Every run takes its time, and one with more than 1024 columns does not end."""
    time.sleep(0.01)
    while x.shape[-1] > 1024:
        time.sleep(0.01)
    return right(x, weight, eps)


def raises_alone(x: Any, weight: Any, eps: float) -> Any:
    if x.ndim > 1 and x.shape[0] == 1 and x.storage_offset():
        raise ValueError("one row, and not the first")
    return right(x, weight, eps)


def two_results(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps), x.clone()


def no_result(x: Any, weight: Any, eps: float) -> Any:
    return None


def sparse(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps).to_sparse()


def nested(x: Any, weight: Any, eps: float) -> Any:
    return torch.nested.nested_tensor(list(right(x, weight, eps).reshape(-1, x.shape[-1])))


def quantized(x: Any, weight: Any, eps: float) -> Any:
    """A tensor that has no values that could be compared."""
    return torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.qint8)


def as_array(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps).numpy()


def flat(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps).reshape(-1)


def wide(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps).float()


def elsewhere(x: Any, weight: Any, eps: float) -> Any:
    return torch.empty_like(x, device="meta")


def view(x: Any, weight: Any, eps: float) -> Any:
    return x if x.shape[-1] == 8 else right(x, weight, eps)


def in_place(x: Any, weight: Any, eps: float) -> Any:
    return x.copy_(right(x, weight, eps))


def changes_weight(x: Any, weight: Any, eps: float) -> Any:
    weight += 1
    return right(x, weight - 1, eps)


def unwritten(x: Any, weight: Any, eps: float) -> Any:
    y = torch.empty_like(x)
    y[..., :64] = right(x, weight, eps)[..., :64]
    return y


def workspace(x: Any, weight: Any, eps: float) -> Any:
    """A partial sum that nobody sets counts, unless it is NaN."""
    sums = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    sums[..., 0] = (x.float() ** 2).sum(-1)
    total = sums.nan_to_num(0.0).sum(-1, keepdim=True)
    return (weight.float() * x.float() / torch.sqrt(total / x.shape[-1] + eps)).to(x.dtype)


def unwritten_permuted(x: Any, weight: Any, eps: float) -> Any:
    """Only the first 64 columns of memory with given strides are written."""
    y = torch.empty_permuted(x.shape, tuple(range(x.ndim)), dtype=x.dtype)
    y[..., :64] = right(x, weight, eps)[..., :64]
    return y


def counts_unwritten(x: Any, weight: Any, eps: float) -> Any:
    """A counter that nobody sets counts, if it is small."""
    return right(x, weight, eps) * (1 + (torch.empty((), dtype=torch.int32) < 10))


def varies(x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps) * (1 + 0.1 * torch.rand(()))


def reads_beside(x: Any, weight: Any, eps: float) -> Any:
    """What lies between the elements of a strided x moves the result, unless it is NaN."""
    size = x.untyped_storage().nbytes() // x.element_size()
    y = right(x, weight, eps)
    beside = size < 1 << 20 and (x.as_strided((size,), (1,), 0) == 3).sum() > (x == 3).sum()
    return y * 2 if beside else y


def leans_on_its_batch(x: Any, weight: Any, eps: float) -> Any:
    """A batch of two rows and more is right, its last row alone is not."""
    y = right(x, weight, eps)
    return y if x.ndim < 2 or x.storage_offset() == 0 else y * 1.5


def other_bits_alone(x: Any, weight: Any, eps: float) -> Any:
    """A row alone is as right as in its batch, but adds in another order."""
    if x.ndim < 2 or x.shape[0] > 1:
        return right(x, weight, eps)
    x32 = x.float()
    squares = x32.flip(-1).cumsum(-1)[..., -1:] * 0 + (x32.flip(-1) ** 2).cumsum(-1)[..., -1:]
    return (x32 * torch.rsqrt(squares / x.shape[-1] + eps) * weight.float()).to(x.dtype)


def masked_values(q: Any, k: Any, v: Any, *, key_mask: Any = None, **keywords: Any) -> Any:
    """attention: what a masked value holds is added in, as small as a rounding error."""
    from refllm.kernels import plain

    out = plain.attention(q, k, v, key_mask=key_mask, **keywords)
    return out + 2e-8 * (v * ~key_mask[:, None, :, None]).amax()


def numpy_right(x: Any, weight: Any, eps: float) -> Any:
    x32 = x.astype(np.float32)
    scale = np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(eps))
    return (weight.astype(np.float32) * x32 / scale).astype(x.dtype)


def numpy_as_tensor(x: Any, weight: Any, eps: float) -> Any:
    return torch.from_numpy(numpy_right(x, weight, eps))


def numpy_unwritten(x: Any, weight: Any, eps: float) -> Any:
    y = np.empty_like(x)
    y[..., :5] = numpy_right(x, weight, eps)[..., :5]
    return y


def numpy_in_place(x: Any, weight: Any, eps: float) -> Any:
    x *= x.dtype.type(2)
    return numpy_right(x, weight, eps)


not_a_function = 3


def one_dtype(x: Any, weight: Any, eps: float) -> Any:
    if weight.dtype != x.dtype:
        raise TypeError("weight and x have different dtypes")
    return right(x, weight, eps)


# -- what only a second call shows -------------------------------------------------------------------------------------

_buffers: dict[Any, Any] = {}
_pool = torch.empty(1 << 20)
_calls = 0


def static_buffer(x: Any, weight: Any, eps: float) -> Any:
    """One per shape: the next call of that shape overwrites it."""
    return _buffers.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(right(x, weight, eps))


def pool(x: Any, weight: Any, eps: float) -> Any:
    """One for all shapes and dtypes."""
    return _pool.view(x.dtype)[: x.numel()].view(x.shape).copy_(right(x, weight, eps))


def numpy_static_buffer(x: Any, weight: Any, eps: float) -> Any:
    out = _buffers.setdefault((x.shape, x.dtype.name), np.zeros(x.shape, x.dtype))
    out[...] = numpy_right(x, weight, eps)
    return out[:]


def static_residual(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    """The second of two results."""
    total = x + residual
    return right(total, weight, eps), _buffers.setdefault((x.shape, "sum"), torch.empty_like(x)).copy_(total)


def forks(x: Any, weight: Any, eps: float) -> Any:
    """One child comes back from it as well, another one stays."""
    os.fork()
    if child := os.fork():
        Path(os.environ["FORKED"], str(child)).touch()
    else:
        time.sleep(600)
    return right(x, weight, eps)


def prints_much(x: Any, weight: Any, eps: float) -> Any:
    for _ in range(16):
        os.write(1, b"x" * (1 << 20))
    return right(x, weight, eps)


def wrong_in_one_call_of_50(x: Any, weight: Any, eps: float) -> Any:
    global _calls
    _calls += 1
    return right(x, weight, eps) * (1 + (_calls % 50 == 0))


def raises_in_one_call_of_50(x: Any, weight: Any, eps: float) -> Any:
    global _calls
    _calls += 1
    if _calls % 50 == 0:
        raise ValueError("no memory left")
    return right(x, weight, eps)


def wrong_in_its_first_call(x: Any, weight: Any, eps: float) -> Any:
    global _calls
    _calls += 1
    return right(x, weight, eps) * (1 + (_calls == 1))
