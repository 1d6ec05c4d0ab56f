"""Runs a golden on a backend: the reference in NumPy, plain Torch, or the Triton kernels (interpreted on a CPU)."""

import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm import extras, golden, ops
from refllm.accuracy.measure import errors
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.golden.cases import DTYPES, OperatorCase
from refllm.golden.model_cases import ModelCase, config_of, embedded
from refllm.inputs import to_numpy
from refllm.models import families
from refllm.ops.contracts import contract_of
from refllm.precision import EXACT, FUSED, Arithmetic, arithmetic, largest, rounding
from refllm.storage.weights import Weights

if TYPE_CHECKING:
    from refllm.golden.exact import Golden

Arrays = dict[str, np.ndarray]
BACKENDS = ("numpy", "torch", "triton")


def output_names(operator: str, keywords: dict[str, Any]) -> tuple[str, ...]:
    """What its results are called: as in the contract, a sum by its first term."""
    names = (name.partition(" ")[0] for name in contract_of(operator).outputs)
    return tuple(name for name in names if name != "lse" or keywords.get("return_lse"))


def evaluate(one: "Golden", backend: str, dtype: str, device: str | None = None) -> Arrays:
    """Output -> float64 array of what the backend computes for a golden's inputs.

    dtype: float64 (numpy alone) is exact; a narrow one is emulated by numpy under the policy fused. Raises InputError
    for a backend or dtype that there is not.
    """
    check(backend, dtype)
    if isinstance(one.case, OperatorCase):
        return _evaluate_operator(one, backend, dtype, device or "cpu")
    assert isinstance(one.case, ModelCase)
    if backend == "numpy":
        return run_model(reference(one.case, one.weights, dtype), one.case, one.inputs)
    return run_model(_fast(one.case, one.weights, backend, dtype, device or "cpu"), one.case, one.inputs)


def check(backend: str, dtype: str, device: str | None = None) -> None:
    """Raises InputError for a backend or a device that there is not, or a dtype that the backend does not have."""
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend} is not known: use {', '.join(BACKENDS)}")
    if dtype not in DTYPES and (dtype, backend) != ("float64", "numpy"):
        also = " (float64 is numpy's alone)" if dtype == "float64" else ""
        raise InputError(f"--dtype {dtype} cannot be verified with {backend}: use {', '.join(DTYPES)}{also}")
    extras.require(f"--backend {backend}", *{"triton": ("torch", "triton")}.get(backend, (backend,)))
    if device is None:
        return
    if backend == "numpy":
        raise InputError(f"--device {device}: numpy runs on the CPU; leave it out")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0].split('.')[0]}; use cpu") from None


# ----------------------------------------------------------------------------------------------------------- operators


def _evaluate_operator(one: "Golden", backend: str, dtype: str, device: str) -> Arrays:
    operator, about = one.about["operator"], one.about

    def given(value: Any) -> Any:
        return one.inputs[value["tensor"]] if isinstance(value, dict) else value

    arguments = [given(value) for value in about["arguments"]]
    keywords = {name: given(value) for name, value in about["keywords"].items()}
    if backend == "numpy":
        ar = EXACT if dtype == "float64" else Arithmetic(dtype, FUSED)
        with np.errstate(all="ignore"):
            out = getattr(ops, operator)(*arguments, **keywords, ar=ar)
    else:
        out = _on_tensors(operator, arguments, keywords, backend, dtype, device)
    results = out if isinstance(out, tuple) else (out,)
    names = output_names(operator, keywords)
    return {name: np.asarray(to_numpy(y), np.float64) for name, y in zip(names, results, strict=True)}


def _on_tensors(operator: str, arguments: Any, keywords: Any, backend: str, dtype: str, device: str) -> Any:
    import torch

    from refllm import kernels

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        t = torch.from_numpy(x.copy()).to(device)
        return t.to(getattr(torch, dtype)) if t.is_floating_point() else t

    forms: Any = kernels if backend == "triton" else kernels.plain
    interpreted = backend == "triton" and device == "cpu"
    with torch.no_grad(), kernels.interpreted() if interpreted else contextlib.nullcontext():
        return getattr(forms, operator)(*map(tensor, arguments), **{k: tensor(v) for k, v in keywords.items()})


# -------------------------------------------------------------------------------------------------------------- models


def reference(case: ModelCase, weights: Arrays, dtype: str) -> Model:
    """The reference model of a case, in a dtype (float64 is exact, narrow ones are emulated under fused)."""
    policy = "fused" if dtype in ("bfloat16", "float16") else None
    if embedded(case.model):
        return _checkpoint(case.model, case.head, dtype, policy)
    config = config_of(case.model)
    cls = families.find(config.model_type, case.head)
    assert cls is not None
    onto = rounding(dtype)
    held = {name: onto(x.astype(np.float64 if dtype == "float64" else np.float32)) for name, x in weights.items()}
    return cls(config, Weights(cls.tensors(config), held, tied=cls.tied(config)), arithmetic(dtype, policy))


@lru_cache(maxsize=2)
def _checkpoint(name: str, head: str, dtype: str, policy: str | None) -> Model:
    from refllm.models.auto import load

    return load(golden.path(name), head=head, dtype=dtype, policy=policy)


@lru_cache(maxsize=2)
def _fast_checkpoint(name: str, head: str, backend: str, dtype: str, device: str) -> Any:
    from refllm.models.auto import load

    return load(golden.path(name), head=head, dtype=dtype, backend=backend, device=device)


def _fast(case: ModelCase, weights: Arrays, backend: str, dtype: str, device: str) -> Any:
    from refllm import kernels

    if embedded(case.model):
        return _fast_checkpoint(case.model, case.head, backend, dtype, device)
    model = reference(case, weights, "float32")
    return kernels.fast_class(type(model)).of(model, dtype=dtype, backend=backend, device=device)


class _Kept:
    """A recorder of some named values."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.values = names, {}  # type: ignore[var-annotated]

    def wants(self, name: str) -> bool:
        return name in self.names

    def record(self, name: str, value: Any) -> None:
        self.values[name] = np.array(to_numpy(value), np.float64)


def run_model(model: Any, case: ModelCase, inputs: Arrays) -> Arrays:
    """Output -> float64: logits and taps at the positions that are not padding, [N, ...]; the loss; of a sequence
    classification the logits [B, C]. With chunks the pieces are fed one after another."""
    rows = valid_rows(inputs)
    if case.chunks:
        return {"logits": by_position(_in_pieces(model, case, inputs), rows)}
    kept = _Kept(case.taps)
    out = model(**_call(inputs), use_cache=False, recorder=kept)
    names = [n for n in ("logits", "start_logits", "end_logits", "loss") if getattr(out, n, None) is not None]
    found = {name: np.asarray(to_numpy(out[name]), np.float64) for name in names}
    if case.head != "sequence_classification":
        found = {name: x if name == "loss" else by_position(x, rows) for name, x in found.items()}
    return found | {name: by_position(kept.values[name], rows) for name in case.taps}


def _call(inputs: Arrays) -> Arrays:
    """Positions that are those of a call without any are left out: given, they mean packed sequences."""
    plain = np.arange(inputs["input_ids"].shape[1])
    if "attention_mask" not in inputs and (inputs["position_ids"] == plain).all():
        return {name: x for name, x in inputs.items() if name != "position_ids"}
    return inputs


def _in_pieces(model: Any, case: ModelCase, inputs: Arrays) -> np.ndarray:
    cache, start, pieces = model.new_cache(), 0, []
    for size in case.chunks:
        piece = slice(start, start + size)
        start = piece.stop
        called = {name: inputs[name][:, piece] for name in ("input_ids", "position_ids")}
        out = model(**called, past_key_values=cache, use_cache=True)
        pieces.append(np.asarray(to_numpy(out.logits), np.float64))
    return np.concatenate(pieces, axis=1)


def valid_rows(inputs: Arrays) -> np.ndarray:
    """[B, S] bool: positions that are not padding."""
    mask = inputs.get("attention_mask")
    return mask != 0 if mask is not None and mask.ndim == 2 else np.ones(inputs["input_ids"].shape, bool)


def by_position(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[B, S], [B, S, n] or [B, H, S, D] -> [N], [N, n] or [N, H, D]: the positions that are not padding."""
    return (values.transpose(0, 2, 1, 3) if values.ndim == 4 else values)[rows]


# ------------------------------------------------------------------------------------------------------------- measures


def rms(x: np.ndarray) -> float:
    """Root mean square, 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def in_sigma(got: np.ndarray, exact: np.ndarray, sigma: np.ndarray, dtype: str) -> tuple[float, float]:
    """(rms error over rms sigma, largest |error| / sigma); infinite where NaN, infinity or an exact value differs.

    dtype: exact values beyond its largest number are infinite there.
    """
    error, V, wrong, _ = errors(got, exact, np.square(sigma, dtype=np.float64), largest(dtype))
    if wrong.any() or error[V == 0].any():
        return np.inf, np.inf
    z = np.abs(error[V > 0]) / np.sqrt(V[V > 0])
    return (rms(error) / np.sqrt(V.mean()), float(z.max())) if z.size else (0.0, 0.0)
