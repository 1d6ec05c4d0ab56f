"""Hypotheses on tensors, inputs and the head: what a loader or a converter does wrong."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refllm.hypotheses.hypothesis import Hypothesis, decades, free, one_of
from refllm.hypotheses.setup import DoesNotApplyError, Edit, Setup
from refllm.hypotheses.values import mapped, moved, number, rounded, times, with_noise_of

_QKV = "q_proj k_proj v_proj"
_ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_PROJECTIONS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
                "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


def hypotheses(config: Any) -> Iterator[Hypothesis]:
    """All that have a meaning for a config."""
    yield from _biases(config)
    yield from _orders_of_rows(config)
    yield from _exchanged(config)
    yield from _formats()
    yield from _embeddings(config)
    yield from _heads(config)


def _edit(name: str, says: str, values: str, endings: str, function: Edit, **how: bool) -> Hypothesis:
    def edit(setup: Setup) -> None:
        found = [ending for ending in endings.split() if setup.weights.has(ending)]
        if not found:
            raise DoesNotApplyError
        for ending in found:
            setup.edit(ending, function)

    return one_of(name, says, "linear", values, edit, **how)


# -------------------------------------------------------------------------------------------------------------- biases


def _biases(config: Any) -> Iterator[Hypothesis]:
    zero: Edit = lambda a: np.zeros_like(a)  # noqa: E731
    for short, module in _PROJECTIONS.items():
        tap = module.rpartition(".")[2]
        yield _edit(f"{short} bias dropped", f"the bias of {short}_proj dropped", tap, f"{module}.bias", zero)
    several = {"q, k and v": "q k v", "q and k": "q k", "attention": "q k v o", "MLP": "gate up down",
               "gate and up": "gate up", "all": "q k v o gate up down"}  # fmt: skip
    for words, names in several.items():
        modules = [_PROJECTIONS[n] for n in names.split()]
        taps = " ".join(m.rpartition(".")[2] for m in modules)
        endings = " ".join(f"{m}.bias" for m in modules)
        yield _edit(f"biases of {words} dropped", f"the biases of {words} dropped", taps, endings, zero)
    yield _read("k's bias for v", "the bias of k_proj for v_proj", "v", "k", "bias")
    yield _read("v's bias for k", "the bias of v_proj for k_proj", "k", "v", "bias")
    twice: Edit = lambda a: 2 * a  # noqa: E731
    every = " ".join(f"{m}.bias" for m in _PROJECTIONS.values())
    yield _edit("biases twice", "all biases added twice", _ALL, every, twice)


def _read(name: str, says: str, target: str, source: str, kind: str = "weight") -> Hypothesis:
    def edit(setup: Setup) -> None:
        setup.read({f"{_PROJECTIONS[target]}.{kind}": f"{_PROJECTIONS[source]}.{kind}"})

    return one_of(name, says, "linear", _PROJECTIONS[target].rpartition(".")[2], edit)


# ------------------------------------------------------------------------------------------------------- order of rows


def _in_heads(a: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * D, ...] -> [heads, D, ...]."""
    return a.reshape(-1, head_dim, *a.shape[1:])


def _to_pairs(a: np.ndarray, head_dim: int, dims: int) -> np.ndarray:
    """Rows of two halves, as pairs: (0, R/2, 1, R/2 + 1, ...), head by head."""
    heads = _in_heads(a, head_dim)
    order = np.arange(head_dim)
    order[:dims] = np.arange(dims).reshape(2, -1).T.ravel()
    return heads[:, order].reshape(a.shape)


def _to_halves(a: np.ndarray, head_dim: int, dims: int) -> np.ndarray:
    """Rows of pairs, as two halves: (0, 2, 4, ..., 1, 3, ...), head by head."""
    heads = _in_heads(a, head_dim)
    order = np.arange(head_dim)
    order[:dims] = np.arange(dims).reshape(-1, 2).T.ravel()
    return heads[:, order].reshape(a.shape)


def _orders_of_rows(config: Any) -> Iterator[Hypothesis]:
    D, R = int(config.head_dim), int(config.rotary_dim)
    for words, order in (("halves to pairs, as in GGUF", _to_pairs), ("pairs to halves", _to_halves)):
        permuted = partial(order, head_dim=D, dims=R)
        for names in ("q k", "q", "k"):
            said = " and ".join(names.split())
            endings = " ".join(f"{_PROJECTIONS[n]}.{kind}" for n in names.split() for kind in ("weight", "bias"))
            taps = " ".join(f"{n}_proj" for n in names.split())
            yield _edit(f"rows of {said}: {words}", f"the rows of {said} permuted, {words}", taps, endings, permuted)
    for short in ("q", "k", "v", "o"):
        module = _PROJECTIONS[short]
        yield _edit(
            f"{short}_proj transposed", f"{short}_proj transposed", f"{short}_proj", f"{module}.weight", _transposed
        )
        reversed_heads: Edit = lambda a: _in_heads(a, D)[::-1].reshape(a.shape)  # noqa: E731
        if short != "o":
            yield _edit(
                f"heads of {short} reversed",
                f"the heads of {short}_proj in reverse",
                f"{short}_proj",
                f"{module}.weight {module}.bias",
                reversed_heads,
            )
    columns: Edit = lambda a: _in_heads(a.T, D)[::-1].reshape(a.T.shape).T  # noqa: E731
    yield _edit("heads of o reversed", "the heads that o_proj reads in reverse", "o_proj", "o_proj.weight", columns)
    crossed: Edit = lambda a: _crossed(a.T, D).T  # noqa: E731
    yield _edit("o_proj by dims", "o_proj with the dims of a head outside", "o_proj", "o_proj.weight", crossed)


def _crossed(a: np.ndarray, head_dim: int) -> np.ndarray:
    heads = _in_heads(a, head_dim)
    return heads.swapaxes(0, 1).reshape(a.shape)


def _transposed(a: np.ndarray) -> np.ndarray:
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise DoesNotApplyError
    return a.T


def _exchanged(config: Any) -> Iterator[Hypothesis]:
    for one, two in (("k", "v"), ("q", "k"), ("q", "o")):

        def swap(setup: Setup, one: str = one, two: str = two) -> None:
            _swap(setup, _PROJECTIONS[one], _PROJECTIONS[two])

        taps = " ".join(_PROJECTIONS[x].rpartition(".")[2] for x in (one, two))
        yield one_of(
            f"{one} and {two} swapped", f"the tensors of {one}_proj and {two}_proj swapped", "linear", taps, swap
        )
    yield _read("k's weight for v", "the weight of k_proj for v_proj", "v", "k")
    yield _read("v's weight for k", "the weight of v_proj for k_proj", "k", "v")
    yield _read("gate's weight for up", "the weight of gate_proj for up_proj", "up", "gate")
    yield _read("up's weight for gate", "the weight of up_proj for gate_proj", "gate", "up")
    yield one_of("q's rows for k", "the first rows of q_proj for k_proj", "linear", "k_proj", _rows_of_q)
    yield one_of(
        "norms swapped", "the weights of a layer's two norms swapped", "norm", "input_layernorm", _norms_swapped
    )
    yield one_of("qkv by groups", "a fused qkv cut into groups of query, key and value heads", "linear", _QKV, _grouped)
    yield one_of(
        "gate and up interleaved",
        "a fused gate and up cut into alternate rows",
        "linear",
        "gate_proj up_proj",
        _alternate,
    )


def _rows_of_q(setup: Setup) -> None:
    rows = setup.weights.shape("k_proj.weight")[0]
    if rows == setup.weights.shape("q_proj.weight")[0]:
        raise DoesNotApplyError
    setup.weights.aliases.append(({"self_attn.k_proj.weight": "self_attn.q_proj.weight"}, setup.layers))
    setup.edit("k_proj.weight", lambda a: a[:rows])


def _norms_swapped(setup: Setup) -> None:
    _swap(setup, "input_layernorm", "post_attention_layernorm")


def _swap(setup: Setup, one: str, two: str) -> None:
    """The tensors of two modules in each other's place."""
    kinds = [kind for kind in ("weight", "bias") if kind == "weight" or setup.weights.has(f"{one}.{kind}")]
    there = {f"{one}.{kind}": f"{two}.{kind}" for kind in kinds}
    setup.read(there | {other: name for name, other in there.items()})


def _from_stack(names: list[str], order: Callable[[Any, list[int]], np.ndarray]) -> Callable[[Setup], None]:
    """The rows of some products, stacked and taken apart in another order: order(config, rows of each) -> indices."""

    def edit(setup: Setup) -> None:
        weights = setup.weights
        if not all(weights.has(f"{name}.weight") for name in names):
            raise DoesNotApplyError
        rows = [weights.shape(f"{name}.weight")[0] for name in names]
        index = order(setup.c, rows)
        parts = np.split(index, np.cumsum(rows)[:-1])
        if np.array_equal(index, np.arange(sum(rows))):
            raise DoesNotApplyError
        for kind in ("weight", "bias"):
            if not weights.has(f"{names[0]}.{kind}"):
                continue
            for name, part in zip(names, parts, strict=True):
                weights.stacks[f"{name}.{kind}"] = ([f"{n}.{kind}" for n in names], part, setup.layers)

    return edit


def _by_group(c: Any, rows: list[int]) -> np.ndarray:
    """q, k and v stacked are read as if every group had its query heads, its key head and its value head together."""
    K, D, g = c.num_key_value_heads, c.head_dim, c.num_attention_heads // c.num_key_value_heads
    groups = np.arange(sum(rows)).reshape(K, g + 2, D)
    return np.concatenate([groups[:, :g].ravel(), groups[:, g].ravel(), groups[:, g + 1].ravel()])


def _by_turns(c: Any, rows: list[int]) -> np.ndarray:
    index = np.arange(sum(rows))
    return np.concatenate([index[::2], index[1::2]])


_grouped = _from_stack([_PROJECTIONS[n] for n in "qkv"], _by_group)
_alternate = _from_stack([_PROJECTIONS[n] for n in ("gate", "up")], _by_turns)


# ------------------------------------------------------------------------------------------------------------- formats


def quantized(a: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Every group of a row on a symmetric grid of its own, 2^(bits-1) - 1 steps to either side. group 0: a row. In
    float32, as everybody does it: a weight that lies between two steps goes where it goes there."""
    n = a.shape[-1]
    blocks = np.asarray(a, np.float32).reshape(len(a), -1, group if group and n % group == 0 else n)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    steps = np.round(blocks / np.where(step == 0, 1, step)) * step
    return np.asarray(steps.reshape(a.shape), np.float64)


def _formats() -> Iterator[Hypothesis]:
    for bits, group in ((8, 0), (8, 32), (8, 64), (8, 128), (4, 0), (4, 32), (4, 64), (4, 128)):
        per = f"groups of {group}" if group else "rows"
        said = f"int{bits} weights in {per}"
        function = partial(quantized, bits=bits, group=group)
        yield _edit(said, said, _ALL, "proj.weight", function)
    for dtype in ("bfloat16", "float16"):
        narrow = partial(rounded, dtype=dtype)
        yield _edit(f"weights in {dtype}", f"the weights of layers in {dtype}", _ALL, "proj.weight", narrow)
        every = "proj.weight norm.weight embed_tokens.weight lm_head.weight"
        yield _edit(f"all weights in {dtype}", f"all weights in {dtype}", _ALL, every, narrow, alone=True)
    yield _edit("weights in float8", "the weights of layers in float8_e4m3", _ALL, "proj.weight", _float8)


def _float8(a: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return a.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


# ----------------------------------------------------------------------------------------------- embeddings and inputs


def _outside(name: str, says: str, operator: str, values: str, edit: Callable[[Setup], Any], **how: bool) -> Hypothesis:
    def changed(setup: Setup) -> None:
        setup.everywhere()
        edit(setup)

    return one_of(name, says, operator, values, changed, alone=True, **how)


def _embeddings(config: Any) -> Iterator[Hypothesis]:
    E = int(config.hidden_size)

    def embed(name: str, says: str, change: Callable[[Any], Any], **how: bool) -> Hypothesis:
        return _outside(name, says, "embedding", "embed_tokens", lambda s: s.embedded.append(change), **how)

    yield _outside(
        "embeddings normed", "embeddings normed", "embedding", "embed_tokens", lambda s: s.embedded.append(_normed)
    )
    for dtype in ("bfloat16", "float16"):
        yield embed(f"embeddings in {dtype}", f"embeddings in {dtype}", partial(rounded, dtype=dtype), places=True)

    def edit(setup: Setup, value: float) -> None:
        setup.everywhere()
        setup.embedded.append(lambda x: times(x, value))

    grid = [*decades(0.01, 100, 3), 0.9, 0.97, 1.03, 1.1]
    says = lambda v: f"embeddings times {v:.6g}"  # noqa: E731
    family = free("factor of embeddings", "embedding", "embed_tokens", edit, grid, says, alone=True)
    yield family.at(E**0.5, "embedding times sqrt(E)", f"embeddings times sqrt({E})")
    yield family.at(E**-0.5, "embedding over sqrt(E)", f"embeddings divided by sqrt({E})")
    yield family
    for by in (1, -1):
        said = f"the embedding rows of the token ids {'+' if by > 0 else '-'} 1"
        roll = partial(np.roll, shift=-by, axis=0)
        yield _outside(
            said, said, "embedding", "embed_tokens", partial(Setup.edit, ending="embed_tokens.weight", function=roll)
        )
    if config.bos_token_id is not None and isinstance(config.bos_token_id, int):
        said = "one more beginning-of-sequence token in front"
        yield _outside("BOS in front", said, "embedding", "embed_tokens", _bos)
    yield _outside(
        "ids of row 0", "the token ids of the first row in every row", "embedding", "embed_tokens", _first_ids
    )


def _normed(x: Any) -> Any:
    a = number(x)
    return times(x, 1 / np.sqrt(np.mean(np.square(a), axis=-1, keepdims=True)))


def _bos(setup: Setup) -> None:
    bos = setup.c.bos_token_id
    if not 0 <= bos < setup.c.vocab_size:
        raise DoesNotApplyError
    setup.ids = np.pad(setup.ids, ((0, 0), (1, 0)), constant_values=bos)
    setup.mask = np.pad(setup.mask, ((0, 0), (1, 0)), constant_values=1)
    r = setup.rotation
    r.positions = np.pad(r.positions + 1, ((0, 0), (1, 0)))
    setup.drop = 1


def _first_ids(setup: Setup) -> None:
    if len(setup.ids) < 2:
        raise DoesNotApplyError
    setup.ids = np.broadcast_to(setup.ids[:1], setup.ids.shape)


# ---------------------------------------------------------------------------------------------------------------- head


def _heads(config: Any) -> Iterator[Hypothesis]:
    E = int(config.hidden_size)

    def head(name: str, says: str, change: Callable[[Any], Any], **how: bool) -> Hypothesis:
        def edit(setup: Setup) -> None:
            if not setup.head:
                raise DoesNotApplyError
            setup.headed.append(change)

        return _outside(name, says, "head", "lm_head score qa_outputs", edit, **how)

    yield head("log-probabilities", "log-probabilities for logits", lambda y: with_noise_of(y, _log_softmax(number(y))))
    yield head("probabilities", "probabilities for logits", _probabilities)
    yield head(
        "logits one late",
        "the logits of the position before",
        lambda y: moved(y, lambda a: np.roll(a, 1, 1)),
        ahead=True,
    )
    yield head(
        "logits one early",
        "the logits of the next position",
        lambda y: moved(y, lambda a: np.roll(a, -1, 1)),
        ahead=True,
    )
    yield head(
        "logits of ids + 1", "the logits of the next token ids", lambda y: moved(y, lambda a: np.roll(a, -1, -1))
    )
    yield head(
        "logits of ids - 1", "the logits of the token ids before", lambda y: moved(y, lambda a: np.roll(a, 1, -1))
    )
    yield head("logits centred", "logits less their mean", lambda y: with_noise_of(y, _centred(number(y))))
    for dtype in ("bfloat16", "float16"):
        yield head(f"logits in {dtype}", f"logits in {dtype}", partial(rounded, dtype=dtype), places=True)

    def free_head(
        name: str, change: Callable[[float], Callable[[Any], Any]], grid: list[float], says: Any
    ) -> Hypothesis:
        def edit(setup: Setup, value: float) -> None:
            setup.everywhere()
            if not setup.head:
                raise DoesNotApplyError
            setup.headed.append(change(value))

        return free(name, "head", "lm_head", edit, grid, says, alone=True)

    factors = free_head(
        "factor of logits",
        lambda v: lambda y: times(y, v),
        [*decades(0.01, 100, 3), 0.9, 0.97, 1.03, 1.1],
        lambda v: f"logits times {v:.6g}",
    )
    yield factors.at(E**-0.5, "logits over sqrt(E)", f"logits divided by sqrt({E})")
    yield factors.at(-1.0, "logits negated", "the other sign of all logits")
    yield factors
    caps = free_head("cap of logits", _cap, decades(1, 200, 5), lambda v: f"logits capped at {v:.6g} by tanh")
    yield from (caps.at(cap, f"logits capped at {cap:g}") for cap in (15.0, 30.0, 50.0))
    yield caps
    said = "the embedding for a head of its own"
    yield _outside("tied head", said, "head", "lm_head", _tied)
    quant: Edit = lambda a: quantized(a, 8, 0)  # noqa: E731
    yield _outside("int8 head", "an int8 head", "head", "lm_head", lambda s: s.edit("lm_head.weight", quant))
    yield _outside(
        "norms of layer 0 at the end", "the weight of the first norm for the last one", "norm", "norm", _first_norm
    )


def _cap(cap: float) -> Callable[[Any], Any]:
    return lambda y: mapped(y, lambda a: cap * np.tanh(a / cap))


def _log_softmax(a: np.ndarray) -> np.ndarray:
    shifted = a - a.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _probabilities(y: Any) -> Any:
    p = np.exp(_log_softmax(number(y)))
    return times(with_noise_of(y, np.ones_like(p)), p)


def _centred(a: np.ndarray) -> np.ndarray:
    return a - a.mean(axis=-1, keepdims=True)


def _tied(setup: Setup) -> None:
    weights = setup.weights
    if not weights.has("lm_head.weight") or setup.c.tie_word_embeddings:
        raise DoesNotApplyError
    setup.read({"lm_head.weight": "embed_tokens.weight"})


def _first_norm(setup: Setup) -> None:
    for kind in ("weight", "bias"):
        if kind == "weight" or setup.weights.has(f"norm.{kind}"):
            setup.weights.aliases.append(({f"norm.{kind}": f"layers.0.input_layernorm.{kind}"}, None))
