"""Log-probabilities of tokens, from a trainer or a server, against the page: is their error rounding, and whose is it?

    from refllm.check import check_logprobs

    found = check_logprobs(CHECKPOINT, {"ids": ids, "logprobs": trainer, "dtype": "bfloat16"}, "rollout.jsonl")
    assert found.verdict == "holds", found.difference.in_words

A policy gradient divides the probability that a trainer gives a token by the one that the rollout engine gave it. Where
the two differ, either may be wrong; each is measured by itself against the exact value, in sigma of the rounding error
that is predicted for its precision.

Of log p_t = z_t - log sum_j e^(z_j), with z the logits over the temperature, the first-order error is
d log p_t = sum_j (delta_tj - p_j) dz_j. The error of the logits is that of the head's input x, the same for all tokens,
and what the head's own product adds, taken as independent from token to token. With g_j = delta_tj - p_j, z = W x + r:
var = sum_k (sum_j g_j W_jk)^2 var x_k + sum_j g_j^2 var r_j.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.measure import row_blocks
from refllm.accuracy.propagation import Uncertain, ulp
from refllm.accuracy.verdicts import SCHEMA, Verdict, verdict, worst
from refllm.check.functions import DTYPES
from refllm.check.inputs import Inputs
from refllm.check.logprobs_file import LogProbs
from refllm.check.oracle import predict
from refllm.check.trace import format_of
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.precision import FUSED, HF_EAGER, Arithmetic, Policy
from refllm.precision.dtype_names import dtype_name

_BEFORE_HEAD, _HEAD = "model.norm", "lm_head"
_FLOAT32_ROUNDINGS = 4  # of a log-softmax: over the temperature, less the largest, the logarithm, the difference
Given = str | os.PathLike[str] | Mapping[str, Any] | LogProbs

# -------------------------------------------------------------------------------------------------------- what is right


@dataclass(frozen=True)
class Expected:
    """The exact log-probability of every token [B, S] but the first of a row, and the variance of its predicted error.

    carried: whether the error of the head's input went through the head; else the variance is a bound, that of logits
    whose errors all push the same way.
    """

    exact: np.ndarray
    variance: np.ndarray
    carried: bool


def expect(model: Model, inputs: Inputs, dtype: str, policy: Policy, temperature: float) -> Expected:
    """What the page makes of the tokens of `inputs`. model: its weights lie on the grid of `dtype`."""
    kept: dict[str, Uncertain] = {}

    def keep(name: str, x: Uncertain) -> Uncertain:
        if name == _BEFORE_HEAD:
            kept[name] = x
        return x

    logits = predict(model, inputs, dtype, policy, keep)
    before, head = kept.get(_BEFORE_HEAD), np.asarray(model.weights[f"{_HEAD}.weight"], np.float64)
    exact, variance = np.full(inputs.input_ids.shape, np.nan), np.full(inputs.input_ids.shape, np.nan)
    for b, ids in enumerate(inputs.input_ids):
        z, own = logits.value[b, :-1] / temperature, logits.variance[b, :-1].astype(np.float64)
        inner = None if before is None else before.variance[b, :-1].astype(np.float64)
        for rows in row_blocks(z):
            of_inner = None if inner is None else inner[rows]
            found = _of_rows(z[rows], own[rows], of_inner, head, ids[1:][rows], temperature)
            exact[b, 1:][rows], variance[b, 1:][rows] = found
    return Expected(exact, variance, before is not None)


def _of_rows(
    z_NV: np.ndarray,
    variance_NV: np.ndarray,
    inner_NE: np.ndarray | None,
    head_VE: np.ndarray,
    ids_N: np.ndarray,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N] and the variance of their error. variance_NV: of the logits before the temperature."""
    n = np.arange(len(z_NV))
    shifted = z_NV - z_NV.max(axis=-1, keepdims=True)
    log_p_NV = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    g_NV = -np.exp(log_p_NV)
    g_NV[n, ids_N] = -np.expm1(log_p_NV[n, ids_N])  # 1 - p, exactly where p is near 1
    g_NV /= temperature
    if inner_NE is None:
        error_N = np.square((np.abs(g_NV) * np.sqrt(variance_NV)).sum(axis=-1))
    else:
        own_NV = np.maximum(variance_NV - inner_NE @ np.square(head_VE).T, 0)
        error_N = (np.square(g_NV @ head_VE) * inner_NE).sum(axis=-1) + (np.square(g_NV) * own_NV).sum(axis=-1)
    largest = np.maximum(np.abs(z_NV).max(axis=-1), np.abs(shifted).max(axis=-1))
    rounding_N = _FLOAT32_ROUNDINGS * np.square(ulp(largest, "float32", np.float64)) / 12
    return log_p_NV[n, ids_N], error_N + rounding_N


# ---------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class LogProbReport:
    """What one program says of sequences that it computed alike, against the page.

    sequences: which of the file's they are. tokens: how many were judged. ratio: rms(error) / rms(sigma), with its
    limit. worst: sequence and position of the token that is furthest off in sigma, with its log-probability, the exact
    one, and how many sigma. token_limit: of one token. unexplained: how many tokens are beyond it. untested: whether
    the log-probabilities of the neighbouring tokens would hold as well. ids, error, variance, of_token: [B, S] of the
    whole file: its tokens, and where there is something to judge the error, its predicted variance and the error in
    sigma, else NaN. carried: see `Expected`.
    """

    checkpoint: str
    source: str
    dtype: str
    policy: str
    temperature: float
    sequences: tuple[int, ...]
    tokens: int
    ratio: float
    limit: float
    worst: tuple[int, int]
    value: float
    exact: float
    sigmas: float
    token_limit: float
    unexplained: int
    untested: bool
    carried: bool
    ids: np.ndarray
    error: np.ndarray
    variance: np.ndarray
    of_token: np.ndarray

    @property
    def verdict(self) -> Verdict:
        """It fails where rounding does not explain the whole, or any one token."""
        return verdict(not self.ratio <= self.limit or self.unexplained, missing=self.untested)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {key: value for key, value in vars(self).items() if not isinstance(value, np.ndarray)}
        return _plain({**values, "verdict": self.verdict})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, and "inf" or "nan" for the numbers that JSON does not have."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def judge(
    model: Model, whole: LogProbs, sequences: list[int], dtype: str, policy: Policy | None = None, checkpoint: str = ""
) -> LogProbReport:
    """The report on some of one program's sequences, of one temperature. model: with weights on the grid of `dtype`, in
    which it computed.

    Without a policy it may round as often as Transformers does: the largest error that is honest. Raises InputError for
    a model without next tokens, and tokens outside its vocabulary.
    """
    if model.head != "causal_lm":
        raise InputError(f"log-probabilities are of a model with next tokens; the head of this one is {model.head!r}")
    if int(whole.ids.max()) >= model.config.vocab_size:
        raise InputError(
            f"{whole.source}: token id {whole.ids.max()} is outside the vocabulary of {model.config.vocab_size}"
        )
    policy = policy or (FUSED if dtype == "float32" else HF_EAGER)
    said, temperature = whole.part(sequences), whole.temperatures[sequences[0]]
    expected = expect(model, said.inputs, dtype, policy, temperature)
    variance = expected.variance
    shown = format_of({"logprobs": said.logprobs})
    if shown != "float32":
        variance = variance + np.square(ulp(expected.exact, shown, np.float64)) / 12
    error, scale = _compared(said.logprobs, expected.exact, variance, said.said)
    ratio, sigmas = scale
    limit = limits.END_TO_END + limits.chance(int(said.said.sum()))
    token_limit, honest = limits.LOG_PROBABILITY, 1.0
    if ratio > limit or sigmas.max() > token_limit:
        honest = max(1.0, _honest(model, said, dtype, policy, expected, variance))
        limit, token_limit = limit * honest, token_limit * honest
    other = np.roll(expected.exact, 1, axis=1)
    comparable = said.said & ~np.isnan(other)
    _, (moved, moved_sigmas) = _compared(other, expected.exact, variance, comparable)
    at = np.unravel_index(int(np.argmax(sigmas)), sigmas.shape)
    of_token = np.where(said.said, sigmas, np.nan)
    return LogProbReport(
        checkpoint,
        said.source,
        dtype,
        policy.name,
        temperature,
        tuple(sequences),
        int(said.said.sum()),
        ratio,
        float(limit),
        (sequences[int(at[0])], int(at[1])),
        float(said.logprobs[at]),
        float(expected.exact[at]),
        float(sigmas[at]),
        float(token_limit),
        int((sigmas > token_limit).sum()),
        bool(moved <= limit and moved_sigmas.max() <= token_limit),
        expected.carried,
        whole.ids,
        *(_in_place(values, sequences, whole.ids.shape) for values in (error, variance, of_token)),
    )


def _in_place(values: np.ndarray, sequences: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Values of some sequences among those of all, NaN elsewhere."""
    whole = np.full(shape, np.nan)
    whole[sequences, : values.shape[1]] = values
    return whole


def _compared(
    found: np.ndarray, exact: np.ndarray, variance: np.ndarray, where: np.ndarray
) -> tuple[np.ndarray, tuple[float, np.ndarray]]:
    """The error [B, S], NaN elsewhere; and in sigma the rms of the whole, and the size of each, 0 elsewhere."""
    error = np.where(where, found - np.where(where, exact, 0), np.nan)
    if not where.any():
        return error, (0.0, np.zeros(error.shape))
    square, budget = np.square(error[where]), variance[where]
    # A token whose error is predicted to be far below the others' is measured by a part of theirs.
    floor = limits.ROW_FLOOR * budget.mean()
    sigmas = np.zeros(error.shape)
    sigmas[where] = np.sqrt(square / np.maximum(budget, floor))
    return error, (float(np.sqrt(square.mean() / budget.mean())), sigmas)


def _honest(
    model: Model, said: LogProbs, dtype: str, policy: Policy, expected: Expected, variance: np.ndarray
) -> float:
    """The ratio of the reference's own run in this precision."""
    emulated = type(model)(model.config, model.weights, Arithmetic(dtype, replace(policy, torch_order=False)))
    inputs = said.inputs
    logits = emulated(inputs.input_ids, attention_mask=inputs.mask, position_ids=inputs.positions).logits
    z = np.asarray(logits, np.float64) / said.temperatures[0]
    z = z - z.max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    own = np.full(said.ids.shape, np.nan)
    own[:, 1:] = np.take_along_axis(log_p[:, :-1], said.ids[:, 1:, None], axis=-1)[..., 0]
    return _compared(own, expected.exact, variance, said.said)[1][0]


@dataclass(frozen=True)
class Disagreement:
    """Two programs on the same tokens. ratio: rms(difference) / rms(sigma of it). largest: the difference that is
    furthest off, at `worst`. mean: of the differences, first less second. fault: the sources that are wrong."""

    first: str
    second: str
    tokens: int
    ratio: float
    mean: float
    largest: float
    worst: tuple[int, int]
    fault: tuple[str, ...]

    @property
    def in_words(self) -> str:
        """Whose fault it is."""
        if not self.fault:
            return "rounding explains what both say"
        if len(self.fault) == 2:
            return "both are wrong"
        right = self.second if self.fault[0] == self.first else self.first
        return f"{self.fault[0]} is wrong: rounding explains what {right} says, and not what it says"


def disagreement(first: Sequence[LogProbReport], second: Sequence[LogProbReport]) -> Disagreement:
    """The difference of two programs, each against the truth: all reports on each. Raises InputError where they have no
    token in common."""
    (error_a, variance_a), (error_b, variance_b) = _together(first), _together(second)
    both = ~np.isnan(error_a) & ~np.isnan(error_b)
    a, b = first[0].source, second[0].source
    if not both.any():
        raise InputError(f"{a} and {b} have no token in common of which both say a log-probability")
    difference = np.where(both, error_a - np.where(both, error_b, 0), 0)
    variance = (variance_a + variance_b)[both]
    at = np.unravel_index(int(np.argmax(np.abs(difference))), difference.shape)
    ratio = float(np.sqrt(np.square(difference[both]).mean() / variance.mean()))
    fault = tuple(reports[0].source for reports in (first, second) if any(one.verdict == "fails" for one in reports))
    mean, largest = float(difference[both].mean()), float(difference[at])
    return Disagreement(a, b, int(both.sum()), ratio, mean, largest, (int(at[0]), int(at[1])), fault)


def _together(reports: Sequence[LogProbReport]) -> tuple[np.ndarray, np.ndarray]:
    """Error and variance [B, S] of all sequences."""
    error, variance = reports[0].error, reports[0].variance
    for one in reports[1:]:
        error = np.where(np.isnan(error), one.error, error)
        variance = np.where(np.isnan(variance), one.variance, variance)
    return error, variance


@dataclass(frozen=True)
class Found:
    """The reports on one program or two, one for each dtype and temperature; and of two programs their difference."""

    reports: tuple[LogProbReport, ...]
    difference: Disagreement | None = None

    @classmethod
    def of(cls, reports: Sequence[LogProbReport]) -> Self:
        """All reports on one program or on two, which differ in their sources."""
        sources = list(dict.fromkeys(report.source for report in reports))
        each = [[report for report in reports if report.source == source] for source in sources]
        return cls(tuple(reports), disagreement(*each) if len(each) == 2 else None)

    @property
    def verdict(self) -> Verdict:
        """That of the worst report."""
        return worst(report.verdict for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as docs/schema/logprobs.json describes them."""
        difference = None
        if self.difference is not None:
            difference = _plain({**vars(self.difference), "text": self.difference.in_words})
        reports = [report.to_dict() for report in self.reports]
        return {"schema": SCHEMA, "verdict": self.verdict, "reports": reports, "difference": difference}


def check_logprobs(
    checkpoint: str | os.PathLike[str],
    *said: Given,
    dtype: str | Sequence[str] | None = None,
    policy: str | None = None,
) -> Found:
    """Judge the log-probabilities that a program gave the tokens of some sequences, or two programs gave the same ones.

    said: of each program a file (safetensors or JSON lines, docs/recording.md); or arrays by the same names: ids [B, S]
    and logprobs [B, S] (NaN where none is known), perhaps mask [B, S], temperature (a number, or [B]), source and
    dtype. logprobs are natural logarithms over the whole vocabulary, of each token given those before it. dtype: in
    which those computed that do not say it, one for both or one for each. policy: where they round, "hf-eager",
    "hf-sdpa" or "fused"; None: as often as honest code may. Every dtype and temperature has a report of its own.

    `Found.difference.fault` names the sources that are wrong. Raises InputError for what is not as docs/recording.md
    says, and for other tokens in the second.
    """
    dtypes = [dtype] if isinstance(dtype, str) else list(dtype or [])
    return Found.of(list(judged(checkpoint, list(said), dtypes, policy)))


def judged(
    checkpoint: str | os.PathLike[str],
    given: Sequence[Given],
    dtypes: Sequence[str] = (),
    policy: str | None = None,
    step: Callable[..., None] = lambda *_: None,
) -> Iterator[LogProbReport]:
    """The reports of `check_logprobs` as they are done. step: told what is being done."""
    from refllm.check.run import find_policy, folders_to_check, load

    if not 1 <= len(given) <= 2:
        raise InputError(f"log-probabilities of {len(given)} programs: expected those of one, or of two")
    (folder,) = folders_to_check(Path(checkpoint))
    asked = None if policy is None else find_policy(policy)
    every = [_taken(one, dtypes[min(i, len(dtypes) - 1)] if dtypes else "") for i, one in enumerate(given)]
    if len(every) == 2:
        _must_be_of_the_same_tokens(every, given)
        if every[0].source == every[1].source:
            every = [
                replace(one, source=f"{one.source} ({_name(g, i)})")
                for i, (one, g) in enumerate(zip(every, given, strict=True))
            ]
    for one in every:
        for (of, _), sequences in one.alike().items():
            step(f"{folder.name} {of}: log-probabilities of {one.source}")
            yield judge(load(folder, of), one, sequences, of, asked, folder.name)


def _taken(given: Given, dtype: str) -> LogProbs:
    """What was given, with a dtype wherever it says none."""
    if isinstance(given, LogProbs):
        said = given
    else:
        said = LogProbs.of(given) if isinstance(given, Mapping) else LogProbs.load(given)
    dtypes = tuple(of or dtype_name(dtype) for of in said.dtypes)
    wrong = next((of for of in dtypes if of not in DTYPES), None)
    if wrong is not None:
        which = f"{wrong!r} cannot be checked" if wrong else "nothing says in which dtype it computed"
        raise InputError(f"{_name(given, 0)}: {which}; say --dtype (dtype=) with one of {', '.join(DTYPES)}")
    return replace(said, dtypes=dtypes)


def _must_be_of_the_same_tokens(every: Sequence[LogProbs], given: Sequence[Given]) -> None:
    a, b = every
    if a.lengths != b.lengths or not np.array_equal(a.ids, b.ids):
        raise InputError(f"{_name(given[1], 1)}: its tokens are others than those of {_name(given[0], 0)}")


def _name(given: Given, i: int) -> str:
    """What a message calls it."""
    if isinstance(given, (LogProbs, Mapping)):
        return ("the first", "the second")[i]
    return f"--logprobs {given}"
