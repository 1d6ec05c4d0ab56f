"""Whether policy `hf-eager` has torch's bits on the CPU at hand: `refllm.precision.torch_cpu` against torch's kernels.

On every CPU the policy rounds where Transformers' eager forward does; whether its float32 sums between two roundings
are the same to the last bit depends on the kernels that torch and oneDNN choose for the processor. So a few of each
kind are run here and compared. The inputs are sharp: little is left of sums of large numbers, so that another order
shows in the leading digits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from refllm import ops
from refllm.precision import Arithmetic, arithmetic, rounding, torch_cpu

DTYPES = ("bfloat16", "float16")


def compare(dtype: str) -> dict[str, bool]:
    """Kind of kernel -> whether its results are the same, in "bfloat16" or "float16", on one thread. About 0.1 s."""
    with _one_thread(), np.errstate(over="ignore"):
        return {kind: kernels_agree(dtype) for kind, kernels_agree in KINDS.items()}


def products(dtype: str) -> bool:
    """Linear layers of one row and of many, and both products of attention, over short and long sums."""
    ar = arithmetic(dtype, "hf-eager")
    for seed, (rows, inner, columns) in enumerate(
        [(16, 96, 48), (1, 96, 64), (16, 600, 48), (1, 600, 96), (16, 1500, 24), (1, 1500, 96)]
    ):
        rng = np.random.default_rng(seed)
        a = _cancelling(rng, dtype, 3, rows, inner)
        b = rounding(dtype)((1 + 0.004 * rng.standard_normal((3, columns, inner))).astype(np.float32))
        A, B = _tensor(a, dtype), _tensor(b, dtype)
        across = B.transpose(1, 2).contiguous()
        pairs = (
            (torch.nn.functional.linear(A[0], B[0]), ar.matmul_t(a[0], b[0])),
            (torch.matmul(A[None], B.transpose(1, 2)[None])[0], ar.matmul_t(a, b)),
            (torch.matmul(A[None], across[None])[0], ar.matmul(a, b.swapaxes(1, 2))),
        )
        if not all(_equal(theirs, ar.round(ours, "linear")) for theirs, ours in pairs):
            return False
    return True


def softmax(dtype: str) -> bool:
    """Softmax is float32 inside whatever the format; compared before it is rounded."""
    rng = np.random.default_rng(0)
    for keys in (5, 20, 96, 300):
        x = (3 * rng.standard_normal((40, keys))).astype(np.float32)
        e = torch_cpu.exp(x - x.max(axis=-1, keepdims=True))
        if not _equal(torch.softmax(torch.from_numpy(x), -1), e * (np.float32(1) / torch_cpu.softmax_sum(e))):
            return False
    return True


def norms(dtype: str) -> bool:
    """The mean of an RMSNorm in float32, and LayerNorms whose bias takes nearly all away that the weight gives."""
    rng, put = np.random.default_rng(0), rounding(dtype)
    ar: Arithmetic = arithmetic(dtype, "hf-eager")
    for width in (5, 96, 250, 2560):
        row = put((3 * rng.standard_normal(width)).astype(np.float32))
        if not _equal(torch.from_numpy(row * row).mean(-1, keepdim=True), ar.mean(row * row)):
            return False
        x = put(row + 0.05 * rng.standard_normal((40, width)).astype(np.float32))
        weight = put(rng.standard_normal(width).astype(np.float32))
        bias = -put(ops.layer_norm(row, weight, None, 1e-5).astype(np.float32))
        theirs = torch.nn.functional.layer_norm(
            _tensor(x, dtype), (width,), _tensor(weight, dtype), _tensor(bias, dtype), 1e-5
        )
        if not _equal(theirs, ops.layer_norm(x, weight, bias, 1e-5, ar=ar)):
            return False
    return True


def exp(dtype: str) -> bool:
    """silu of every finite number of the format, and of a few that fill no vector."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    every = every[torch.isfinite(every)]
    ar = arithmetic(dtype, "hf-eager")
    return all(
        _equal(torch.nn.functional.silu(x), ops.activation(x.float().numpy(), "silu", ar=ar))
        for x in (every, every[20_000:20_037])
    )


KINDS: dict[str, Callable[[str], bool]] = {"products": products, "softmax": softmax, "norms": norms, "exp": exp}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cancelling(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Rows that are nearly orthogonal to rows of ones."""
    x = rng.standard_normal(shape).astype(np.float32)
    half = shape[-1] // 2
    x[..., half : 2 * half] = -x[..., :half]
    return rounding(dtype)(np.ascontiguousarray(x[..., rng.permutation(shape[-1])]))


def _tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def _equal(theirs: torch.Tensor, ours: np.ndarray) -> bool:
    """The same numbers; the sign of a zero, which no later step can tell, does not count."""
    return np.array_equal(theirs.float().numpy(), ours, equal_nan=True)
