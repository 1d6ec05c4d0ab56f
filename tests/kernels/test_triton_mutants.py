"""The mutants of the Triton kernels: each is a change that still fits, builds, and names where it comes from.

That the check of operators finds each of them is shown in test_audit.py.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from refllm import kernels
from refllm.kernels import OPERATORS
from refllm.kernels.interpreter import IntegerOverflowError, OutOfBoundsError, RaceError
from refllm.kernels.mutants import Mutant, catalogue
from refllm.kernels.mutants.changed_source import (
    Change,
    ChangedKernel,
    StaleChangeError,
    changed_source,
    planted,
    source_of,
)
from refllm.kernels.mutants.known_bugs import KNOWN_BUGS
from refllm.kernels.mutants.not_applicable import NOT_APPLICABLE
from refllm.kernels.triton import KERNELS
from refllm.kernels.verify import ContractBrokenError, assert_meets_contract

MUTANTS = catalogue(form="triton")
FILES = {Path(str(file.__file__)).stem for file in KERNELS}
REFERENCE = re.compile(r"[\w.-]+/[\w.-]+(#\d+| [0-9a-f]{7,8}| [A-Z_]{9,})")
ONE_LINE = (
    "norm",
    "RoPE",
    "attention",
    "MLP",
    "block",
    "head and loss",
    "extra rounding",
    "precision",
    "overflow",
    "NaN",
)


def kernel(mutant: Mutant) -> ChangedKernel:
    assert isinstance(mutant.build, ChangedKernel)
    return mutant.build


def named(operator: str, name: str) -> Mutant:
    (found,) = (m for m in MUTANTS if (m.operator, m.name) == (operator, name))
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_change_fits_exactly_once_and_every_mutant_builds(operator: str) -> None:
    mutants = catalogue(operator, "triton")
    assert len(mutants) >= 6
    for mutant in mutants:
        made = kernel(mutant)
        for file in {change.file for change in made.changes}:
            assert changed_source(file, made.changes) != source_of(file), mutant.name
        function = mutant.build()
        assert callable(function)
        assert function is not getattr(kernels, operator)
        assert function is mutant.build(), "built once"


def test_every_kernel_file_and_every_operator_has_mutants() -> None:
    assert {kernel(m).file for m in MUTANTS} == FILES
    assert {m.operator for m in MUTANTS} == set(OPERATORS)


def test_names_are_unique_and_every_mutant_says_what_it_is() -> None:
    assert max(Counter(m.slug for m in MUTANTS).values()) == 1
    for m in MUTANTS:
        assert m.form == "triton"
        assert 3 <= len(m.name) <= 60, m.name
        assert len(m.what.split()) > 4, m.name
        assert not m.what.endswith("."), m.name
        assert set(m.dtypes) <= {"bfloat16", "float16", "float32"}, m.name
        assert m.dtypes, m.name
        kind = m.source.removeprefix("one-line: ")
        assert kind in ONE_LINE if kind != m.source else REFERENCE.fullmatch(m.source), m.source


def test_every_reference_is_that_of_a_known_bug() -> None:
    known = {reference for bug in KNOWN_BUGS for reference in bug.references}
    assert [m.source for m in MUTANTS if not m.source.startswith("one-line: ") and m.source not in known] == []


def test_every_known_bug_has_a_mutant_or_a_reason_why_not() -> None:
    sources = {m.source for m in MUTANTS if not m.equivalent}
    reasons = dict(NOT_APPLICABLE)
    assert len(KNOWN_BUGS) == 39
    for bug in KNOWN_BUGS:
        planted_here = not sources.isdisjoint(bug.references)
        assert planted_here != (bug.references[0] in reasons), bug.trigger
    others = {source for source in reasons if not source.startswith("one-line: ")}
    assert others <= {bug.references[0] for bug in KNOWN_BUGS}
    assert len(reasons) == len(NOT_APPLICABLE)
    assert all(len(reason.split()) > 5 for reason in reasons.values())


KINDS: dict[str, tuple[set[str], str]] = {
    "offsets in 32 bits": (
        set(OPERATORS) - {"add_layer_norm"},
        "in 32 bits",
    ),
    "accesses out of bounds": (
        {"rms_norm", "add_layer_norm", "swiglu", "relu2", "rope", "rms_norm_qkv_rope", "attention", "decode_attention"},
        "without a mask|read whole|past the (end|length)|past R|as many heads",
    ),
    "strides of one for another": (
        {"rms_norm", "add_rms_norm", "add_layer_norm", "swiglu", "relu2", "rope", "norm_rope", "attention",
         "decode_attention", "cross_entropy", "linear_cross_entropy"},
        "strides? of|as dense|laid out as",
    ),
    "a tail left out": (
        {"rms_norm", "add_rms_norm", "add_layer_norm", "swiglu", "relu2", "rms_norm_qkv_rope", "attention",
         "decode_attention", "cross_entropy", "linear_cross_entropy"},
        "tail|dropped|stored once",
    ),
    "padding that counts": (
        {"rms_norm", "layer_norm", "norm_rope", "attention", "decode_attention", "cross_entropy",
         "linear_cross_entropy"},
        "[Pp]adding|over the tile|past the length counted",
    ),
    "wrong pairs": ({"rope", "rms_norm_qkv_rope", "norm_rope"}, "pairs|in halves"),
    "one table for all sequences": ({"rope", "rms_norm_qkv_rope", "norm_rope"}, "one table"),
    "heads": ({"attention", "decode_attention"}, "heads tiled"),
    "no rescale": ({"attention", "decode_attention", "cross_entropy", "linear_cross_entropy"}, "not rescaled"),
    "ignored rows": ({"cross_entropy", "linear_cross_entropy"}, "mean over all rows"),
    "a result over an input": ({"add_rms_norm", "add_layer_norm"}, "sum over"),
    "eps": ({"rms_norm", "add_layer_norm", "norm_rope"}, "eps outside"),
    "rounding": (
        {"rms_norm", "add_rms_norm", "layer_norm", "swiglu", "rope", "norm_rope", "attention", "linear_cross_entropy"},
        "rounded|bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_has_the_kinds_of_mistakes_that_can_be_made_in_it(kind: str) -> None:
    operators, pattern = KINDS[kind]
    have = {m.operator for m in MUTANTS if re.search(pattern, m.name) and not m.equivalent}
    assert operators <= have, operators - have


def test_a_change_that_no_longer_fits_is_named() -> None:
    with pytest.raises(StaleChangeError, match=r"kernels/triton/relu2\.py holds .* 0 times.*'no such line'"):
        planted("relu2", "relu2", "n", "w", "s", ("no such line", "x")).build()
    with pytest.raises(StaleChangeError, match="2 times, not once: 'import triton'"):
        planted("relu2", "relu2", "n", "w", "s", ("import triton", "x")).build()
    with pytest.raises(StaleChangeError, match=r"relu2\.py imports nothing from rope\.py"):
        planted("relu2", "relu2", "n", "w", "s", Change("SIZES = [", "SIZES = [  #", "rope")).build()
    with pytest.raises(StaleChangeError, match=r"kernels/triton/nothing\.py does not exist"):
        planted("relu2", "nothing", "n", "w", "s", ("a", "b")).build()


def test_the_kernels_themselves_stay_as_they_are(device: str) -> None:
    """Also those that a changed kernel imports: the walk over the keys is shared by two files."""
    q, k = torch.ones(1, 2, 1, 16, device=device), torch.linspace(0, 9, 70 * 16, device=device).view(1, 1, 70, 16)
    before = kernels.attention(q, k, k), kernels.decode_attention(q, k, k, torch.tensor([70], device=device))
    wrong = named("decode_attention", "output not rescaled").build()(q, k, k, torch.tensor([70], device=device))
    after = kernels.attention(q, k, k), kernels.decode_attention(q, k, k, torch.tensor([70], device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(wrong, after[1])


def test_an_unchanged_kernel_gives_the_same_bits(device: str) -> None:
    """What is left out of the module, its registration with Torch, does not touch a result."""
    x, w = torch.randn(5, 40, device=device).bfloat16(), torch.randn(40, device=device).bfloat16()
    same = planted("add_rms_norm", "rms_norm", "n", "w", "s", ("ROW = 16_384", "ROW = 16_383")).build()
    for a, b in zip(same(x, x, w, 1e-5), kernels.add_rms_norm(x, x, w, 1e-5), strict=True):
        assert torch.equal(a, b)


FOUND: list[tuple[str, str, type[Exception], Any]] = [
    ("relu2", "row offset in 32 bits", IntegerOverflowError, lambda: (far_rows(),)),
    ("relu2", "store without a mask", OutOfBoundsError, lambda: (torch.ones(3, 17),)),
    ("relu2", "square without relu", ContractBrokenError, lambda: (torch.linspace(-1, 1, 9),)),
    ("relu2", "last tile dropped", ContractBrokenError, lambda: (torch.ones(1, 8193),)),
    ("attention", "all sequences onto the first", RaceError, lambda: tuple(torch.ones(2, 1, 1, 8) for _ in range(3))),
]


def far_rows() -> torch.Tensor:
    """Three rows of which the last lies beyond 2^31 elements; only the pages that are touched take memory."""
    memory = torch.UntypedStorage(2 * (2**31 + 16))
    far = torch.empty(0, dtype=torch.bfloat16).set_(memory, 0, (3, 16), (2**30, 1))
    return far.copy_(torch.randn(3, 16))


@pytest.mark.parametrize(("operator", "name", "error", "arguments"), FOUND, ids=[f"{o} {n}" for o, n, *_ in FOUND])
def test_mutants_do_what_they_say(operator: str, name: str, error: type[Exception], arguments: Any) -> None:
    given = arguments()
    with kernels.interpreted():
        assert_meets_contract(operator, getattr(kernels, operator)(*given), *given)
        with pytest.raises(error):
            assert_meets_contract(operator, named(operator, name).build()(*given), *given)
