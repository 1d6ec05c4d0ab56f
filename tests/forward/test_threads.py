"""What is cut into pieces for several threads gives the numbers that it gives in one piece."""

import os
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from refllm import ops, parallel
from refllm.forward import operators
from refllm.precision import EXACT, FUSED, Arithmetic

attention = import_module("refllm.ops.attention")  # the operator of that name hides it
THREADS = 3
THREADS_OF_THE_SYSTEM = parallel.threads.__wrapped__  # what is not remembered


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Three threads, for whom everything is worth it; what is given to them."""
    pool, given = ThreadPoolExecutor(THREADS - 1), list[Any]()

    def for_each(work: Any, items: Any) -> None:
        given.append(list(items))
        parallel.for_each(work, given[-1])

    monkeypatch.setattr(parallel, "_pool", lambda: pool)
    for module in (parallel, operators, attention):
        monkeypatch.setattr(module, "threads", lambda: THREADS)
    monkeypatch.setattr(operators, "for_each", for_each)
    monkeypatch.setattr(operators, "_WORTH_COMPUTING_TOGETHER", 0)
    monkeypatch.setattr(operators, "_NUMBERS_PER_PIECE", 20)
    return given


@pytest.mark.parametrize("outputs", [1, 2, 3, 7, 300])
def test_a_product_is_cut_along_its_outputs(outputs: int, pieces: list[Any]) -> None:
    rng = np.random.default_rng(outputs)
    x, weight = rng.standard_normal((2, 5, 16)), rng.standard_normal((outputs, 16))
    y = operators._product(x, weight, EXACT)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-12, atol=1e-12)
    ((*cuts,),) = pieces
    assert len(cuts) == THREADS
    assert max(cut.stop - cut.start for cut in cuts) == -(-outputs // THREADS)


def test_a_product_of_one_row_with_much_to_read_is_left_to_blas(pieces: list[Any], monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 1, 8)), rng.standard_normal((6, 8))
    monkeypatch.setattr(operators, "_WORTH_READING_TOGETHER", 48)
    np.testing.assert_array_equal(operators._product(x, weight, EXACT), ops.linear(x, weight))
    np.testing.assert_array_equal(
        operators._product(x, weight, Arithmetic("float32", FUSED)),
        ops.linear(x, weight, ar=Arithmetic("float32", FUSED)),
    )
    assert pieces == []
    np.testing.assert_allclose(operators._product(np.tile(x, (1, 2, 1)), weight, EXACT)[0, 1], x[0, 0] @ weight.T)
    assert len(pieces) == 1


@pytest.mark.parametrize(("B", "S", "E"), [(2, 7, 8), (1, 9, 16), (3, 1, 32), (2, 5, 4)])
def test_rows_are_cut_with_what_belongs_to_them(B: int, S: int, E: int, pieces: list[Any]) -> None:
    rng = np.random.default_rng(S)
    x, residual, weight = rng.standard_normal((B, S, E)), rng.standard_normal((B, S, E)), rng.standard_normal(E)

    def scaled(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, factor: float) -> np.ndarray:
        return (x + residual) * weight * factor

    np.testing.assert_array_equal(
        operators._in_pieces(scaled, x, residual, weight, 0.5), scaled(x, residual, weight, 0.5)
    )
    ((*cuts,),) = pieces
    assert all(cut.stop - cut.start == max(1, 20 // E) for _, cut in cuts)
    assert len(cuts) == B * -(-S // max(1, 20 // E))


def test_few_numbers_are_one_piece(pieces: list[Any]) -> None:
    x = np.ones((1, 3, 13))
    assert operators._in_pieces(np.negative, x)[0, 0, 0] == -1
    assert operators._in_pieces(np.negative, x.reshape(39))[0] == -1
    assert pieces == []


@pytest.mark.parametrize("worth", [0, 10**9])
@pytest.mark.parametrize(("B", "K", "S", "g", "T"), [(1, 8, 5, 2, 9), (2, 3, 130, 1, 4), (1, 1, 1, 4, 700)])
def test_blocks_of_attention_cover_everything_once(
    B: int, K: int, S: int, g: int, T: int, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_NUMBERS_WORTH_A_THREAD", worth)
    seen = np.zeros((B, K, S), int)
    blocks = list(attention._blocks(B, K, S, g, T, 16))
    for b, heads, rows in blocks:
        seen[b, heads, rows] += 1
    assert (seen == 1).all()
    if worth == 0:
        assert len(blocks) >= min(THREADS, B * K)
    else:
        assert len(blocks) == B * -(-S // attention._QUERIES_PER_BLOCK)


@pytest.mark.parametrize(
    ("named", "count"),
    [
        ({"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OPENBLAS_NUM_THREADS": "0", "OMP_NUM_THREADS": "5"}, 5),
        ({"OPENBLAS_NUM_THREADS": "all", "OMP_NUM_THREADS": "-1"}, 7),
        ({}, 7),
    ],
)
def test_the_number_of_threads_is_the_one_that_is_asked_for_or_that_of_the_cores(
    named: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in named.items():
        monkeypatch.setenv(variable, value)
    assert THREADS_OF_THE_SYSTEM() == count
