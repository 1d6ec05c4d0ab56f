"""What holds for models whatever their weights and inputs are: every family, on NumPy, on Torch and on Triton.

Two calls that should give the same logits are compared in units of the error that float32 makes of either: the model is
evaluated in float64 and as a good float32 implementation, and their largest difference is the unit. The definition in
float64 has 2^-29 of that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import Chosen, how_many
from where_kernels_run import DEVICE

from refllm.config import ModelConfig
from refllm.forward.model import Model
from refllm.inputs import to_numpy
from refllm.kernels.models.fast_model import FastModel
from refllm.precision import EXACT
from refllm.strategies.models import (
    WholeInput,
    configs,
    cuts,
    inputs,
    key_masks,
    packed_positions,
    paddings,
    whole_inputs,
)
from refllm.strategies.small_models import FAMILIES, build, model_class, random_tensors, small_config

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond max_position_embeddings", "ignore:.*factor=.* is used")

BACKENDS = ("numpy", "torch", "triton")
STEADY = ("default", "linear", "yarn", "llama3", "proportional")
"""RoPE types whose frequencies do not depend on the length of the call."""
EXAMPLES = {"numpy": 4, "torch": 4, "triton": 2}
"""Per run; the first is the plainest of all."""
LIMIT = 8.0
"""Units that two results may differ by: each has an error of about one, its largest value a few."""

TWELVE_TOKENS = np.array([[5, 71, 2, 33, 90, 14, 5, 11, 68, 30, 42, 7], [8, 8, 61, 40, 3, 27, 95, 52, 1, 19, 77, 8]])
"""More than a kernel for decoding takes at once: with fewer keys the fast models do not use it."""

data, seeds = st.data(), st.integers(0, 1000)


class Subject:
    """One model on one backend, and what float32 makes of it.

    model: takes and returns what the models of `refllm` do. With backend "numpy" it is the definition in float64.
    """

    def __init__(self, backend: str, config: ModelConfig, tensors: dict[str, np.ndarray] | int) -> None:
        cls = model_class(config.model_type)
        self.config, self.backend = config, backend
        self.single = build(cls, config, tensors, "float32", "fused")
        self.exact: Model = type(self.single)(config, self.single.weights, EXACT)
        fast = backend != "numpy"
        self.model: Any = FastModel.of(self.single, backend=backend, device=DEVICE) if fast else self.exact

    def logits(self, input_ids: np.ndarray, **options: Any) -> np.ndarray:
        """[B, S, V], float64."""
        return np.float64(to_numpy(self.model(input_ids=input_ids, **options).logits))

    def unit(self, input_ids: np.ndarray, **options: Any) -> float:
        """The largest error of a good float32 implementation on this input, and not less than one rounding."""
        exact = self.exact(input_ids=input_ids, **options).logits
        error = np.abs(self.single(input_ids=input_ids, **options).logits - exact).max(initial=0)
        return float(max(error, 2.0**-24 * np.abs(exact).max(initial=0))) * (1 if self.backend != "numpy" else 2.0**-24)


def agree(a: np.ndarray, b: np.ndarray, unit: float) -> None:
    """a and b are the same logits, up to errors of a few units."""
    assert a.shape == b.shape
    difference = np.abs(a - b).max(initial=0)
    assert difference <= LIMIT * unit, f"differs by {difference / unit:.3g} units of {unit:.3g}"


def tokens(config: ModelConfig) -> st.SearchStrategy[np.ndarray]:
    """ids [B, S], long enough for a prompt and some tokens more."""
    return inputs(config, shortest=4, longest=12).map(lambda made: made.ids)


def of_every_family(
    *, steady: bool = True, draws: Callable[[ModelConfig], Any] = tokens, known: Sequence[Chosen] = ()
) -> Any:
    """Make f(subject, given, data) a test of every family on every backend.

    steady: every type of `STEADY`, else the default one alone. draws: a config -> the strategy of `given`, its ids if
    nothing else is said. known: what is drawn in examples that come first, on twelve tokens of two sequences and on a
    small model with grouped heads, in which StableLM rotates half of the dims. Interpreted, one more is drawn.
    """

    def decorate(f: Callable[[Subject, Any, Any], None]) -> Any:
        @pytest.mark.hypothesis
        @pytest.mark.parametrize("family", FAMILIES)
        @pytest.mark.parametrize("backend", BACKENDS)
        def test(backend: str, family: str) -> None:
            def property_holds(data: st.DataObject, seed: int) -> None:
                config = data.draw(configs(family, STEADY if steady else ("default",), smallest_head=8, **few))
                f(Subject(backend, config, seed), data.draw(draws(config)), data)

            few = {"num_hidden_layers": 1} if backend == "triton" else {}
            for chosen in known:
                f(Subject(backend, small_config(family, **few), 0), TWELVE_TOKENS, chosen)
            property_holds.__name__ = f"{f.__name__}_{backend}_{family}"  # each draws examples of its own
            run = given(data=data, seed=seeds)(property_holds)
            count = examples(1, 2) if backend == "triton" and known else EXAMPLES[backend]
            how_many(count if DEVICE == "cpu" else 4)(run)()

        test.__name__, test.__doc__ = f.__name__, f.__doc__
        return test

    return decorate


PADDED = np.array([[1] * 12, [0] * 2 + [1] * 10])
TOKEN_BY_TOKEN = [slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)]


def masks(B: int, S: int) -> st.SearchStrategy[Any]:
    """None, padding, or any mask in which every sequence has two tokens that see each other."""
    return st.none() | paddings(B, S) | key_masks(B, S).filter(lambda mask: (mask.sum(1) > 1).all())


@of_every_family(
    known=[
        Chosen(mask=None, static=False, pieces=TOKEN_BY_TOKEN),
        Chosen(mask=PADDED, static=True, pieces=[slice(0, 4), slice(4, 12)]),
    ]
)
def test_a_sequence_in_pieces_is_the_sequence(subject: Subject, ids: np.ndarray, data: Any) -> None:
    """Chunked prefill for any split, and decoding token by token; with padding and holes in the mask; both caches."""
    B, S = ids.shape
    mask = data.draw(masks(B, S), "mask")
    cache = subject.model.new_cache(*([S] if data.draw(st.booleans(), "static") else []))
    options = {} if mask is None else {"attention_mask": mask}
    parts = []
    for piece in data.draw(cuts(S).filter(lambda pieces: len(pieces) > 1), "pieces"):
        so_far = {} if mask is None else {"attention_mask": mask[:, : piece.stop]}
        parts.append(subject.logits(ids[:, piece], past_key_values=cache, **so_far))
    agree(np.concatenate(parts, axis=1), subject.logits(ids, **options), subject.unit(ids, **options))
    assert cache.get_seq_length() == S


def rows_of_any_kind(config: ModelConfig) -> st.SearchStrategy[WholeInput]:
    """Inputs of two or more sequences: plain, padded, with holes, packed, at positions in any order."""
    return whole_inputs(config, longest=12).filter(lambda whole: len(whole.ids) > 1)


@of_every_family(steady=False, draws=rows_of_any_kind)
def test_a_row_alone_is_the_row_in_a_batch(subject: Subject, whole: WholeInput, data: Any) -> None:
    given, b = whole.arguments(), data.draw(st.integers(0, len(whole.ids) - 1), "row")
    alone = {name: x[b : b + 1] for name, x in given.items()}
    agree(subject.logits(**given)[b : b + 1], subject.logits(**alone), subject.unit(**given))


@of_every_family(known=[Chosen(padding=3)])
def test_padding_on_either_side_is_no_padding(subject: Subject, ids: np.ndarray, data: Any) -> None:
    (B, S), n = ids.shape, data.draw(st.integers(1, 5), "padding")
    filler, ones, zeros = np.full((B, n), ids[0, 0]), np.ones((B, S), int), np.zeros((B, n), int)
    plain, unit = subject.logits(ids), subject.unit(ids)
    left = {
        "attention_mask": np.concatenate([zeros, ones], axis=1),
        "position_ids": np.concatenate([zeros, np.broadcast_to(np.arange(S), (B, S))], axis=1),
    }
    agree(subject.logits(np.concatenate([filler, ids], axis=1), **left)[:, n:], plain, unit)
    right = {"attention_mask": np.concatenate([ones, zeros], axis=1)}
    agree(subject.logits(np.concatenate([ids, filler], axis=1), **right)[:, :S], plain, unit)


@of_every_family(steady=False)
def test_later_tokens_change_no_bit_of_earlier_logits(subject: Subject, ids: np.ndarray, data: Any) -> None:
    s = data.draw(st.integers(1, ids.shape[1] - 1), "first that differs")
    other = ids.copy()
    other[:, s:] = (other[:, s:] + 1) % subject.config.vocab_size
    a, b = subject.logits(ids), subject.logits(other)
    np.testing.assert_array_equal(a[:, :s], b[:, :s])
    assert not np.array_equal(a[:, s:], b[:, s:])


@of_every_family()
def test_only_differences_of_positions_matter(subject: Subject, ids: np.ndarray, data: Any) -> None:
    shift = data.draw(st.integers(1, 300), "shift")
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    moved = {"position_ids": positions + shift, "use_cache": True}
    unit = max(subject.unit(ids), subject.unit(ids, **moved))
    unit *= 1 if subject.backend != "numpy" else 2.0**9  # of an angle of 300 radians float64 has 9 bits less
    agree(subject.logits(ids, **moved), subject.logits(ids), unit)


@of_every_family()
def test_packed_sequences_do_not_see_each_other(subject: Subject, ids: np.ndarray, data: Any) -> None:
    positions = data.draw(packed_positions(*ids.shape), "positions")
    options = {"position_ids": positions, "use_cache": False}
    packed, unit = subject.logits(ids, **options), subject.unit(ids, **options)
    for b, row in enumerate(positions):
        starts = np.flatnonzero(row == 0)
        start, stop = starts[-1], len(row)  # the last one has the most before it
        agree(packed[b : b + 1, start:stop], subject.logits(ids[b : b + 1, start:stop]), unit)


@of_every_family(steady=False)
def test_grouped_heads_are_repeated_keys_and_values(subject: Subject, ids: np.ndarray, data: Any) -> None:
    """A model with as many key/value heads as query heads, each a copy: query head j reads head j // (H / K)."""
    config = subject.config
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tensors = dict(subject.single.weights.items())
    wide = type(config)(**(config.to_dict() | {"num_key_value_heads": H}))

    def repeated(name: str, x: np.ndarray) -> np.ndarray:
        return np.repeat(x.reshape(K, D, *x.shape[1:]), H // K, axis=0).reshape(H * D, *x.shape[1:])

    for name in [n for n in tensors if ".k_proj." in n or ".v_proj." in n]:
        tensors[name] = repeated(name, tensors[name])
    for name in model_class(config.model_type).tensors(wide):
        if ".k_layernorm.norms." in name:
            front, head, rest = name.partition(".norms.")[0], *name.partition(".norms.")[2].split(".")
            source = subject.single.weights[f"{front}.norms.{int(head) * K // H}.{rest}"]
            tensors[name] = np.array(source)
    wide_subject = Subject(subject.backend, wide, {name: np.array(x) for name, x in tensors.items()})
    agree(wide_subject.logits(ids), subject.logits(ids), subject.unit(ids))


@of_every_family(steady=False)
def test_tokens_have_no_names(subject: Subject, ids: np.ndarray, data: Any) -> None:
    """Renumbering the vocabulary renumbers the logits, and changes nothing else."""
    seed = data.draw(st.integers(0, 99), "order")
    order = np.random.default_rng(seed).permutation(subject.config.vocab_size)
    tensors = {name: np.array(x) for name, x in subject.single.weights.items()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][order]
    renumbered = Subject(subject.backend, subject.config, tensors)
    found = renumbered.logits(np.argsort(order)[ids])
    agree(found, subject.logits(ids)[..., order], subject.unit(ids))


@of_every_family()
def test_a_cache_that_was_cropped_copied_and_reordered_goes_on_right(
    subject: Subject, ids: np.ndarray, data: Any
) -> None:
    """Some operations on a cache, then one more token: as if the tokens that it holds had been given at once."""
    ids = np.concatenate([ids, (ids[:1] + 1) % subject.config.vocab_size])  # two rows that differ
    cache, held, rest = subject.model.new_cache(), ids[:, :-1], ids[:, -1:]
    subject.logits(held, past_key_values=cache)
    kinds = st.lists(st.sampled_from(["crop", "repeat", "reorder", "append"]), max_size=2)
    for kind in ["reorder", *data.draw(kinds, "operations")]:
        if kind == "crop" and held.shape[1] > 1:
            keep = data.draw(st.integers(1, held.shape[1] - 1), "keep")
            cache.crop(keep)
            held = held[:, :keep]
        elif kind == "reorder":
            rows = np.array(data.draw(st.permutations(range(len(held))), "rows"))[::-1]
            cache.reorder_cache(rows)
            held, rest = held[rows], rest[rows]
        elif kind == "repeat" and len(held) < 4:
            cache.batch_repeat_interleave(2)
            held, rest = held.repeat(2, axis=0), rest.repeat(2, axis=0)
        elif kind == "append":
            subject.logits(rest, past_key_values=cache)
            held = np.concatenate([held, rest], axis=1)
    found = subject.logits(rest, past_key_values=cache)
    whole = np.concatenate([held, rest], axis=1)
    agree(found, subject.logits(whole)[:, -1:], subject.unit(whole))


@of_every_family(steady=False, draws=rows_of_any_kind)
def test_a_second_call_gives_the_same_bits_and_inputs_stay(subject: Subject, whole: WholeInput, data: Any) -> None:
    given = whole.arguments()
    before = {name: x.copy() for name, x in given.items()}
    first = subject.logits(**given)
    weights = {name: np.array(to_numpy(x)) for name, x in subject.single.weights.items()}
    np.testing.assert_array_equal(subject.logits(**given), first)
    for name, x in before.items():
        np.testing.assert_array_equal(given[name], x)
    for name, x in weights.items():
        np.testing.assert_array_equal(to_numpy(subject.model.weights[name]), x)


@of_every_family(steady=False)
def test_logits_to_keep_are_those_of_the_whole(subject: Subject, ids: np.ndarray, data: Any) -> None:
    keep = data.draw(st.integers(1, ids.shape[1]), "keep")
    agree(subject.logits(ids, logits_to_keep=keep), subject.logits(ids)[:, -keep:], subject.unit(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unit_is_that_of_float32(family: str) -> None:
    """A unit far too large would let everything agree."""

    @settings(max_examples=4)
    @given(config=configs(family, ("default",), smallest_head=8), seed=seeds)
    def check(config: ModelConfig, seed: int) -> None:
        ids = np.arange(8)[None] % config.vocab_size
        subject = Subject("torch", config, random_tensors(model_class(family).tensors(config), seed))
        exact = subject.exact(input_ids=ids).logits
        assert 2.0**-26 < subject.unit(ids) / np.abs(exact).max() < 2.0**-14
        with pytest.raises(AssertionError):
            agree(subject.logits(ids)[:, ::-1], exact, subject.unit(ids))

    check()
