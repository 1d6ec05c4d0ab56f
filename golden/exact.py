"""The content of a golden: inputs, exact outputs, and beside each element the error that a right implementation makes.

Operators are predicted by `refllm.accuracy.operator`. A model is run twice: exactly, and as a propagation of the
error through its page (`refllm.accuracy.page`), from exact weights and token ids to the result. The exact rotary tables
are float64; that every implementation makes them in float32 is part of the predicted error.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy.operator import predict, predict_loss
from refllm.accuracy.page import predict_page
from refllm.accuracy.propagation import Uncertain
from refllm.forward.model import Model
from refllm.golden import run
from refllm.golden.cases import Case, OperatorCase
from refllm.golden.model_cases import ModelCase, embedded, tensors_of
from refllm.models import families
from refllm.precision import POLICIES as BY_NAME
from refllm.precision import Policy
from refllm.strategies.call import argument_names

Arrays = dict[str, np.ndarray]
_LEAST = float(np.finfo(np.float32).smallest_subnormal)
_MUCH = 1.05
"""hf-eager is kept beside fused where its predicted rms error differs by more than this factor."""


@dataclass
class Golden:
    """One case, computed.

    inputs: name -> array. exact: output -> float64. sigma: "bfloat16.fused" -> output -> float32, the standard
    deviation of the rounding error. weights: of a small config, by the names of `Model.tensors`. about: its manifest.
    """

    case: Case
    inputs: Arrays
    exact: Arrays
    sigma: dict[str, Arrays]
    weights: Arrays = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def compute(case: Case) -> Golden:
    """The golden of a case, from its seed."""
    if isinstance(case, OperatorCase):
        return _operator(case)
    assert isinstance(case, ModelCase)
    return _model(case)


def settings(case: Case) -> Iterator[tuple[str, str]]:
    """(dtype, policy) for which a sigma is predicted. In float32 every policy is the same."""
    for dtype in case.dtypes:
        yield dtype, "fused"
        if dtype != "float32" and getattr(case, "eager", True):
            yield dtype, "hf-eager"


def _kept(sigma: dict[str, Arrays]) -> dict[str, Arrays]:
    """The predictions without those of hf-eager that are nearly those of fused."""

    def differs(key: str) -> bool:
        fused = sigma[key.replace("hf-eager", "fused")]
        sizes = [(run.rms(sigma[key][name]), run.rms(fused[name])) for name in fused]
        return any(max(a, b) > _MUCH * min(a, b) for a, b in sizes)

    return {key: values for key, values in sigma.items() if not key.endswith("hf-eager") or differs(key)}


def _stored(variance: np.ndarray) -> np.ndarray:
    """sigma as float32; the smallest float32 number where it is below that, since 0 means exact."""
    sigma = np.sqrt(variance, dtype=np.float64)
    return np.where(sigma > 0, np.maximum(sigma, _LEAST), 0).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- operators


def _operator(case: OperatorCase) -> Golden:
    call, operator = case.call(), case.group
    names = argument_names(operator)[: len(call.arguments)]
    given = dict(zip(names, call.arguments, strict=True)) | call.keywords
    inputs = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    outputs = run.output_names(operator, call.keywords)
    exact: Arrays = {}
    sigma = {}
    for dtype, policy in settings(case):
        predicted = predict(operator, call.arguments, call.keywords, dtype=dtype, policy=BY_NAME[policy])
        exact = {name: p.exact for name, p in zip(outputs, predicted, strict=True)}
        sigma[f"{dtype}.{policy}"] = {name: _stored(p.variance) for name, p in zip(outputs, predicted, strict=True)}
    about = {
        "kind": "operator",
        "operator": operator,
        "arguments": [{"tensor": n} if n in inputs else given[n] for n in names],
        "keywords": {n: {"tensor": n} if n in inputs else v for n, v in call.keywords.items()},
    }
    return Golden(case, inputs, exact, _kept(sigma), about=about)


# -------------------------------------------------------------------------------------------------------------- models


def _model(case: ModelCase) -> Golden:
    weights = {} if embedded(case.model) else small_weights(case)
    inputs = case.inputs()
    model = run.reference(case, weights, "float64")
    about = {
        "kind": "model",
        "class": type(model).__name__,
        "head": case.head,
        "checkpoint": case.model if embedded(case.model) else None,
        "model": case.model,
        "config": None if embedded(case.model) else model.config.to_dict(),
        "chunks": list(case.chunks),
        "taps": list(case.taps),
    }
    exact = run.run_model(model, case, inputs)
    sigma = {}
    for dtype, policy in settings(case):
        predicted = predict_model(model, case, inputs, dtype, BY_NAME[policy])
        assert predicted.keys() == exact.keys()
        sigma[f"{dtype}.{policy}"] = {name: _stored(V) for name, V in predicted.items()}
    return Golden(case, inputs, exact, _kept(sigma), weights, about)


def small_weights(case: ModelCase) -> Arrays:
    """The weights of a small config, drawn."""
    from refllm.golden.model_cases import config_of

    config = config_of(case.model)
    cls = families.find(config.model_type, case.head)
    assert cls is not None
    return tensors_of(case.model, cls.tensors(config))


def predict_model(model: Model, case: ModelCase, inputs: Arrays, dtype: str, policy: Policy) -> Arrays:
    """Output -> variance of its error, for the outputs of `run.run_model`. model: float64."""
    kept: dict[str, Uncertain] = {}

    def at_tap(name: str, x: Uncertain) -> Uncertain:
        kept[name] = x
        return x

    ids, positions, mask = inputs["input_ids"], inputs["position_ids"], inputs.get("attention_mask")
    logits = predict_page(
        model, ids, positions, mask, dtype, policy, at_tap, wants=lambda name: name in case.taps, exact_tables=True
    )
    rows = run.valid_rows(inputs)
    found = {name: run.by_position(kept[name].variance, rows) for name in case.taps}
    return _head_variance(model, case, inputs, logits, rows, Settings(dtype, policy)) | found


@dataclass(frozen=True)
class Settings:
    """What `predict_loss` is asked for."""

    dtype: str
    policy: Policy

    def loss(self, logits: Uncertain, labels: np.ndarray, ignore_index: int = ops.IGNORE_INDEX) -> np.ndarray:
        return predict_loss(
            logits.value, logits.variance, labels, dtype=self.dtype, policy=self.policy, ignore_index=ignore_index
        )


def _head_variance(
    model: Model, case: ModelCase, inputs: Arrays, logits: Uncertain, rows: np.ndarray, how: Settings
) -> Arrays:
    """The variance of logits and loss, by the head."""
    if case.head == "question_answering":
        found = {n: logits.variance[..., i][rows] for i, n in enumerate(("start_logits", "end_logits"))}
        S = logits.shape[1]
        parts = [how.loss(logits[..., i], inputs[n], S) for i, n in enumerate(("start_positions", "end_positions"))]
        return found | {"loss": np.asarray(sum(parts)) / 4}
    if case.head == "sequence_classification":
        last = ((inputs["input_ids"] != model.config.pad_token_id) * np.arange(logits.shape[1])).argmax(-1)
        pooled = logits[np.arange(len(last)), last]
        return {"logits": pooled.variance, "loss": how.loss(pooled, inputs["labels"])}
    found = {"logits": run.by_position(logits.variance, rows)}
    if "labels" not in inputs:
        return found
    labels = inputs["labels"]
    if case.head == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.map(lambda a: a.reshape(-1, a.shape[-1]))
    return found | {"loss": how.loss(flat, labels.reshape(-1))}


# -------------------------------------------------------------------------------------------------------------- honest


def honest(golden: Golden) -> dict[str, dict[str, list[float]]]:
    """What the reference's own emulation (policy fused) reaches, by dtype and output: rms error over rms sigma, and the
    largest |error| / sigma."""
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in golden.case.dtypes:
        values = run.evaluate(golden, "numpy", dtype)
        sigma = golden.sigma[f"{dtype}.fused"]
        found[dtype] = {
            name: [round(float(v), 3) for v in run.in_sigma(values[name], golden.exact[name], sigma[name], dtype)]
            for name in golden.exact
        }
    return found
