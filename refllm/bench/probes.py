"""Is a timed output right? The definition in float64, on parts of the call that it gets through quickly.

A part is a smaller call whose result is the same part of the whole result: a few rows of a norm; of attention a few
queries of the first and the last head with all keys that they see. Beyond these parts every element of the output has
to be finite, and the memory that it takes was filled with NaN before, so an element that nobody wrote is seen too;
whether it is right there too, `refllm.bench.witness` asks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refllm.ops.contracts import ROWS as ANY_ROWS
from refllm.ops.contracts import contract_of

ROWS = 2
"""Rows that are judged at each place: at the start, in the middle and at the end."""
QUERIES = 8
"""Queries of attention that are judged at each of the three places."""
HEADS = 4
"""Neighbouring heads, at each place: an error is judged by its size over all elements of a part, so there should be
many of them (512 of 128 dims: known to 3 %)."""
SEQUENCES = 4
"""Sequences that are judged, from the first one on; for the same reason."""
WORDS = 1 << 14
"""Rows of a matrix of words that are held in float64 at a time."""

# A peer computes the same function but may round more often. Of operands with 8 significant bits (bfloat16) a right
# product is off by 1e-3 to 1e-2 (relative rms), of 11 bits (float16; tf32, which some peers take for float32) by 3e-4.
PEER_LIMITS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-3}


@dataclass(frozen=True)
class Part:
    """A smaller call, and how to take its result out of the whole one (a tuple of tensors).

    what: in words, the same for parts of one kind. where: which of them this is.
    """

    what: str
    arguments: list[Any]
    keywords: dict[str, Any]
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    where: str = ""


@dataclass(frozen=True)
class Judgement:
    """error: over the contract's in the same precision, or relative for a peer; None if the definition was not asked.
    problem: "" if the output is right."""

    error: float | None
    problem: str
    checked: str


class Checker:
    """The definition of one drawn call, evaluated once for any number of forms."""

    def __init__(self, operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        from refllm.kernels.verify import Contract

        self._shapes = contract_of(operator).result_shapes(arguments, keywords)
        self._peer_limit = PEER_LIMITS[str(arguments[0].dtype).removeprefix("torch.")]
        contract = loss_contract if operator == "linear_cross_entropy" else partial(Contract, operator)
        self._parts = [(part, contract(part.arguments, part.keywords)) for part in parts(operator, arguments, keywords)]
        said = dict.fromkeys(part.what for part, _ in self._parts)
        self.what = f"{', '.join(said)} against the definition in float64"

    def judge(self, results: Any, ours: bool) -> Judgement:
        """Whether `results` (a tensor or a tuple) of the whole call is right; a peer may round more often than ours."""
        results = results if isinstance(results, tuple) else (results,)
        found = [tuple(result.shape) for result in results]
        if found != self._shapes:
            return Judgement(float("nan"), f"shapes {found}, expected {self._shapes}", self.what)
        unfinished = sum(int((~result.isfinite()).sum()) for result in results)
        if unfinished:
            return Judgement(float("nan"), f"{unfinished} elements are NaN or infinite (not written?)", self.what)
        worst = 0.0
        for part, contract in self._parts:
            picked = part.pick(results)
            error, problem = _ours(contract, picked) if ours else _peer(contract, picked, self._peer_limit)
            if problem:
                return Judgement(error, f"{part.where or part.what}: {problem}", self.what)
            worst = max(worst, error)
        return Judgement(worst, "", self.what)


def loss_contract(arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """`Contract("linear_cross_entropy", ...)` with the product in float64 on the device: NumPy takes seconds for it."""
    from refllm import ops
    from refllm.kernels.verify import Contract
    from refllm.precision import EXACT, FUSED, Arithmetic

    x, weight, labels = arguments
    product = [x.double() @ words.double().T for words in weight.split(WORDS)]
    logits, indices = np.concatenate([part.cpu().numpy() for part in product], axis=1), labels.cpu().numpy()
    narrow = Arithmetic(str(x.dtype).removeprefix("torch."), FUSED)
    rounded = narrow.round(logits.astype(np.float32), "linear")
    contract = Contract.__new__(Contract)
    contract.operator = "linear_cross_entropy"
    contract.exact = (ops.cross_entropy(logits, indices, **keywords, ar=EXACT),)
    contract.same_precision = (ops.cross_entropy(rounded, indices, **keywords, ar=narrow),)
    return contract


def _ours(contract: Any, results: tuple[Any, ...]) -> tuple[float, str]:
    verdicts = contract.judge(results)
    return max(float(v.ratio) for v in verdicts), next((v.problem for v in verdicts if v.problem), "")


def _peer(contract: Any, results: tuple[Any, ...], limit: float) -> tuple[float, str]:
    worst = 0.0
    for got, exact in zip(results, contract.exact, strict=True):
        y, exact = got.double().cpu().numpy(), np.asarray(exact, np.float64)
        error = float(np.sqrt(np.mean((y - exact) ** 2) / max(float(np.mean(exact**2)), 1e-300)))
        worst = max(worst, error)
        if not error <= limit:
            return error, f"relative error {error:.2g} (limit {limit:.0e})"
    return worst, ""


def parts(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Iterator[Part]:
    """The parts of a call that are checked."""
    if operator in ("attention", "decode_attention"):
        yield from _SPECIAL[operator](*arguments, **keywords)
    else:
        yield _SPECIAL.get(operator, _part(operator))(arguments, keywords)


def _places(length: int, size: int) -> list[slice]:
    """Up to three slices of at most `size`: at the start, in the middle and at the end; none twice."""
    starts = sorted({0, max(0, (length - size) // 2), max(0, length - size)})
    return [slice(start, min(start + size, length)) for start in starts]


def _indices(length: int, size: int = ROWS) -> list[int]:
    return sorted({i for place in _places(length, size) for i in range(place.start, place.stop)})


def _said(indices: list[int], length: int, of: str) -> str:
    return f"all {length} {of}" if len(indices) == length else f"{len(indices)} of {length} {of}"


def _sequences(x: Any) -> str:
    return f"{min(len(x), SEQUENCES)} of {len(x)} sequences"


def _rows_of(count: int) -> Callable[..., Part]:
    """Operators of independent rows [..., E], whose first `count` arguments are such rows."""

    def part(arguments: Sequence[Any], keywords: dict[str, Any]) -> Part:
        length = arguments[0].flatten(0, -2).shape[0]
        rows = _indices(length)
        fewer = [x.flatten(0, -2)[rows] for x in arguments[:count]] + list(arguments[count:])
        return Part(
            _said(rows, length, "rows"),
            fewer,
            keywords,
            lambda results: tuple(result.flatten(0, -2)[rows] for result in results),
        )

    return part


def _positions(arguments: Sequence[Any], keywords: dict[str, Any]) -> Part:
    """rope, norm_rope: q and k [B, H, S, D] first, then what applies to every position, tables [S, R/2] by position."""
    S = arguments[0].shape[2]
    rows = _indices(S)
    q, k, *rest = arguments
    table = len(rest) - (3 if isinstance(rest[-1], float) else 2)
    rest[table : table + 2] = [t[rows] for t in rest[table : table + 2]]
    return Part(
        f"{_said(rows, S, 'positions')} of {_sequences(q)}",
        [q[:SEQUENCES, :, rows], k[:SEQUENCES, :, rows], *rest],
        keywords,
        lambda results: tuple(result[:SEQUENCES, :, rows] for result in results),
    )


def _projection(arguments: Sequence[Any], keywords: dict[str, Any]) -> Part:
    """A few positions of the first sequences; of q, k and v some heads at three places."""
    import torch

    x, weight, w_qkv, b_qkv, cos, sin, eps = arguments
    H, K, S = keywords["num_heads"], keywords["num_kv_heads"], x.shape[1]
    D, rows = len(w_qkv) // (H + 2 * K), _indices(S)
    q_heads, k_heads = _indices(H, HEADS), _indices(K, HEADS)
    heads = q_heads + [H + k for k in k_heads] + [H + K + k for k in k_heads]
    taken = torch.cat([torch.arange(h * D, (h + 1) * D) for h in heads]).to(w_qkv.device)
    fewer = keywords | {"num_heads": len(q_heads), "num_kv_heads": len(k_heads)}
    bias = b_qkv if b_qkv is None else b_qkv[taken]

    def pick(results: tuple[Any, ...]) -> tuple[Any, ...]:
        chosen = zip(results, (q_heads, k_heads, k_heads), strict=True)
        return tuple(result[:SEQUENCES, which][:, :, rows] for result, which in chosen)

    what = f"{_said(rows, S, 'positions')} and {_said(heads, H + 2 * K, 'heads')} of {_sequences(x)}"
    return Part(what, [x[:SEQUENCES, rows], weight, w_qkv[taken], bias, cos[rows], sin[rows], eps], fewer, pick)


def _taking(*index: slice) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda results: tuple(result[index] for result in results)


def _attention(q: Any, k: Any, v: Any, **keywords: Any) -> Iterator[Part]:
    """A few queries at three places of the first and the last head, with the keys that they see."""
    (B, H, S, _D), (K, T) = q.shape, k.shape[1:3]
    places = _places(S, QUERIES)
    what = f"{len(_indices(S, QUERIES))} of {S} queries of the first and the last head"
    for b, h in sorted({(0, 0), (B - 1, H - 1)}):
        for place in places:
            one, group, keys = slice(b, b + 1), slice(h // (H // K), h // (H // K) + 1), slice(0, T - S + place.stop)
            yield Part(
                what,
                [q[one, h : h + 1, place], k[one, group, keys], v[one, group, keys]],
                keywords,
                _taking(one, slice(h, h + 1), place),
                f"queries {place.start}..{place.stop - 1} of head {h}, sequence {b}",
            )


def _decode_attention(q: Any, k: Any, v: Any, lengths: Any, **keywords: Any) -> Iterator[Part]:
    """The first few heads of the first sequence and the last few of the last one, over all of their slots."""
    (B, H), K = q.shape[:2], k.shape[1]
    some = min(K, HEADS)
    for b, first in sorted({(0, 0), (B - 1, K - some)}):
        one, group = slice(b, b + 1), slice(first, first + some)
        heads = slice(first * (H // K), (first + some) * (H // K))
        yield Part(
            f"the first and the last {some * (H // K)} of {H} heads, all slots",
            [q[one, heads], k[one, group], v[one, group], lengths[one]],
            keywords,
            _taking(one, heads, slice(None)),
            f"heads {heads.start}..{heads.stop - 1} of sequence {b}",
        )


def _losses(arguments: Sequence[Any], keywords: dict[str, Any]) -> Part:
    """A few rows with all words; the matrix of linear_cross_entropy stays whole."""
    N = len(arguments[-1])
    rows = _indices(N)
    fewer = [arguments[0][rows], *arguments[1:-1], arguments[-1][rows]]
    return Part(_said(rows, N, "rows"), fewer, keywords, lambda results: tuple(r[rows] for r in results))


_SPECIAL: dict[str, Callable[..., Any]] = {
    "rms_norm_qkv_rope": _projection,
    "attention": _attention,
    "decode_attention": _decode_attention,
}


def _part(operator: str) -> Callable[..., Part]:
    """How a part is cut out of a call, by what the axes of its arguments are."""
    arguments = contract_of(operator).arguments
    rows = sum(ANY_ROWS in axes for axes in arguments.values())
    return _rows_of(rows) if rows else _losses if "labels" in arguments else _positions
