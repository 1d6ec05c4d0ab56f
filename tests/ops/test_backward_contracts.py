"""The records of the backward operators follow from the forward ones, and their programs are the definitions."""

import inspect
import math

import numpy as np
import pytest

from refllm import ops
from refllm.errors import InputError
from refllm.ops.activation import ACTIVATIONS
from refllm.ops.backward_contracts import BACKWARD, FORWARDS, forward_name, is_backward
from refllm.ops.contracts import CONTRACTS, OPERATORS, contract_of, without_axes

SIZES = {"B": 2, "S": 3, "T": 5, "H": 4, "K": 2, "D": 8, "R/2": 3, "N": 6, "E": 10, "F": 7, "V": 9}
SIZES["(H+2K)D"] = (SIZES["H"] + 2 * SIZES["K"]) * SIZES["D"]
VALUES = {"eps": 1e-3, "name": "silu", "interleaved": True, "norm": "layer", "num_heads": 4, "num_kv_heads": 2}


def made(operator, **given):
    """Arguments and keywords of a call with numbers that agree with the record."""
    known, rng = contract_of(operator), np.random.default_rng(5)
    values = dict(VALUES)
    for name, axes in known.arguments.items():
        shape = sum(((2, 3) if axis == "*" else (SIZES[axis],) for axis in axes), ())
        values[name] = rng.standard_normal(shape)
    values |= {"labels": np.array([0, 8, -100, 3, 3, 1]), "ids": np.array([[1, 1, 2], [0, 1, 8]])}
    values |= {"lengths": np.array([6, 4]), "o": None, "lse": None, "key_mask": np.arange(5) != np.array([[2], [4]])}
    values |= given
    if operator.endswith("cross_entropy_backward") and "labels" in known.arguments:
        values["dloss"] = np.array(0.7) if given.get("reduction", "mean") != "none" else values["dloss"]
    parameters = known.parameters.values()
    positional = [values[without_axes(p.name)] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = {without_axes(p.name): p for p in parameters if p.kind is p.KEYWORD_ONLY}
    return positional, {n: values[n] for n, p in keywords.items() if n in given or p.default is p.empty}


def called(operator, arguments, keywords):
    suffixes = {without_axes(p): p for p in inspect.signature(getattr(ops, operator)).parameters}
    out = getattr(ops, operator)(*arguments, **{suffixes[n]: x for n, x in keywords.items()})
    return out if isinstance(out, tuple) else (out,)


CALLS = [
    *((operator, {}) for operator in BACKWARD),
    ("layer_norm_backward", {"bias": None}),
    ("linear_backward", {"bias": None}),
    ("norm_rope_backward", {"norm": "rms", "interleaved": False}),
    ("cross_entropy_backward", {"reduction": "none"}),
    ("attention_backward", {"key_mask": np.arange(5) != np.array([[2], [4]]), "dlse": np.ones((2, 4, 3))}),
    ("attention_backward", {"causal": False, "scale": 0.3}),
    *(("activation_backward", {"name": name}) for name in ACTIVATIONS),
]


@pytest.mark.parametrize(("operator", "given"), CALLS, ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x)))
def test_the_program_is_the_definition(operator, given):
    arguments, keywords = made(operator, **given)
    space = {"np": np, "math": math}
    exec(contract_of(operator).program, space)
    close = 1e-6 if "central differences" in contract_of(operator).program else 1e-12
    wanted, found = called(operator, arguments, keywords), space["definition"](*arguments, **keywords)
    assert len(wanted) == len(found) == len(contract_of(operator).outputs)
    for a, b in zip(wanted, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(b, a, rtol=close, atol=close)


@pytest.mark.parametrize(("operator", "given"), CALLS[: len(BACKWARD) + 2], ids=str)
def test_the_record_says_the_shapes_of_what_the_definition_returns(operator, given):
    arguments, keywords = made(operator, **given)
    known = contract_of(operator)
    wanted = called(operator, arguments, keywords)
    there = [name for name, x in zip(known.outputs, wanted, strict=True) if x is not None]
    assert known.asked(arguments, keywords) == tuple(there)
    assert known.result_shapes(arguments, keywords) == [x.shape for x in wanted if x is not None]


def test_every_backward_operator_has_a_record_and_no_table_of_forward_ones_has_it():
    defined = {name for name in ops.__all__ if name.endswith("_backward")}
    moved = {f"{name}_backward" for name in ("add", "split_heads", "merge_heads")}  # nothing is computed
    assert set(BACKWARD) == defined - moved
    assert not any(is_backward(name) for name in OPERATORS)
    assert {forward_name(name) for name in BACKWARD} == set(FORWARDS) >= set(CONTRACTS)
    with pytest.raises(InputError, match="rms_norm_backward"):
        contract_of("rms_norm_backwards")
