"""Log-probabilities of tokens, from a trainer or a server, against the page: is their error rounding, and whose is it?

A policy gradient divides the probability that a trainer gives a token by the one that the rollout engine gave it. Where
the two differ, either may be wrong; each is measured by itself against the exact value, in sigma of the rounding error
that is predicted for its precision.

Of log p_t = z_t - log sum_j e^(z_j), with z the logits over the temperature, the first-order error is
d log p_t = sum_j (delta_tj - p_j) dz_j. The error of the logits is that of the head's input x, the same for all tokens,
and what the head's own product adds, taken as independent from token to token. With g_j = delta_tj - p_j, z = W x + r:
var = sum_k (sum_j g_j W_jk)^2 var x_k + sum_j g_j^2 var r_j.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.measure import row_blocks
from refllm.accuracy.propagation import Uncertain, ulp
from refllm.accuracy.verdicts import SCHEMA, Verdict, verdict, worst
from refllm.check.asked import Asked
from refllm.check.functions import DTYPES
from refllm.check.inputs import Inputs
from refllm.check.oracle import predict
from refllm.check.trace import format_of
from refllm.errors import CheckpointError, InputError
from refllm.forward.model import Model
from refllm.precision import FUSED, HF_EAGER, Arithmetic, Policy
from refllm.precision.dtype_names import dtype_name
from refllm.storage import input_file
from refllm.storage.json_text import show
from refllm.storage.safetensors_format import read_header

_BEFORE_HEAD, _HEAD = "model.norm", "lm_head"
_FLOAT32_ROUNDINGS = 4  # of a log-softmax: over the temperature, less the largest, the logarithm, the difference
_KEYS = {"ids", "input_ids", "logprobs", "mask", "attention_mask", "temperature", "source", "dtype"}


@dataclass(frozen=True)
class LogProbs:
    """What one program says of the tokens of some sequences.

    ids [B, S], padded on the right. logprobs [B, S]: float64, of each token given those before it; NaN where none is
    said, as of the first token of a sequence and of padding. lengths: of the sequences. temperature: by which the
    logits were divided. dtype: in which it computed, "" where nobody says.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    lengths: tuple[int, ...]
    temperature: float
    source: str
    dtype: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a safetensors file, or JSON lines with one sequence in each (docs/recording.md).

        Raises InputError, naming the file, for anything else.
        """
        path = Path(path)
        try:
            if not os.path.exists(path):
                raise InputError("no such file")
            rows, about = _of_safetensors(path) if path.suffix == ".safetensors" else _of_lines(path)
            return cls._of_rows(rows, about, path.name)
        except (CheckpointError, InputError) as error:
            raise InputError(f"--logprobs {path}: {str(error).removeprefix(f'{path}: ')}") from None
        except OSError as error:
            raise InputError(f"--logprobs {path}: {error.strerror or error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"--logprobs {path}: not readable ({error})") from None

    @classmethod
    def _of_rows(cls, rows: list[tuple[np.ndarray, np.ndarray]], about: dict[str, Any], name: str) -> Self:
        if not rows or not all(len(ids) for ids, _ in rows):
            raise InputError("it holds no tokens, or a sequence without any")
        longest = max(len(ids) for ids, _ in rows)
        ids, logprobs = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), np.nan)
        for i, (row, said) in enumerate(rows):
            ids[i, : len(row)] = row
            logprobs[i, 1 : len(row)] = said[1:]
        temperature = float(about.get("temperature", 1.0))
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature is {temperature:g}; expected a number above 0")
        if not np.isfinite(logprobs).any() and not np.isinf(logprobs).any():
            raise InputError("it says no log-probability of any token that comes after another")
        dtype = str(about.get("dtype", ""))
        lengths = tuple(len(row) for row, _ in rows)
        return cls(ids, logprobs, lengths, temperature, str(about.get("source", name)), dtype_name(dtype))

    @property
    def said(self) -> np.ndarray:
        """[B, S]: where there is a log-probability to judge."""
        return ~np.isnan(self.logprobs)

    @property
    def inputs(self) -> Inputs:
        """The run that they are of."""
        mask = (np.arange(self.ids.shape[1]) < np.array(self.lengths)[:, None]).astype(np.int64)
        return Inputs(self.ids, None if mask.all() else mask, label="log-probabilities")


def _of_safetensors(path: Path) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    from safetensors import safe_open

    input_file.must_be_regular(path)
    with open(path, "rb") as raw:
        infos, about = read_header(raw, str(path))
    with safe_open(str(path), framework="numpy") as file:
        values = {name: file.get_tensor(name) for name in infos if name in _KEYS}
    return _rows(values), {"source": path.name, **about}


def _of_lines(path: Path) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    text = input_file.read_text(path)
    input_file.count_values(text)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    about: dict[str, Any] = {}
    for i, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {i + 1} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"line {i + 1} holds {show(values)}, not an object of ids and logprobs")
        said = {key: values[key] for key in ("temperature", "source", "dtype") if key in values}
        if rows and said != about:
            raise InputError(f"line {i + 1} says {show(said)}, and the lines before it {show(about)}; use two files")
        about = said
        rows += _rows({key: _numbers(key, value) for key, value in values.items() if key in _KEYS - set(said)})
    return rows, about


def _numbers(key: str, value: Any) -> np.ndarray:
    """A list of JSON, or of such lists; null is NaN."""
    found = np.array(value, object)
    return np.where(found == None, np.nan, found).astype(np.float64)  # noqa: E711 (element by element)


def _rows(values: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids and log-probabilities of every sequence, without padding."""
    ids, said = values.get("ids", values.get("input_ids")), values.get("logprobs")
    if ids is None or said is None:
        raise InputError("expected ids [B, S] and logprobs [B, S], of each token given those before it")
    ids, said = np.atleast_2d(ids), np.atleast_2d(said).astype(np.float64)
    mask = np.atleast_2d(values.get("mask", values.get("attention_mask", np.ones(ids.shape)))) != 0
    if ids.ndim != 2 or said.shape != ids.shape or mask.shape != ids.shape:
        raise InputError(
            f"ids {list(ids.shape)}, logprobs {list(said.shape)}, mask {list(mask.shape)}: expected [B, S]"
        )
    whole = ids[mask].astype(np.int64)
    if not np.array_equal(whole, ids[mask]) or (whole < 0).any():
        raise InputError("ids: expected integers from 0 on")
    if (said[mask] > 0).any():
        raise InputError(f"logprobs: {said[mask].max():g} is above 0, so it is no log-probability")
    if _has_holes(mask):
        raise InputError("mask: there is padding inside a sequence; it may stand at either end")
    return [(row[at].astype(np.int64), values[at]) for row, values, at in zip(ids, said, mask, strict=True)]


def _has_holes(mask: np.ndarray) -> bool:
    first, last = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return bool((mask.sum(axis=1) != np.where(mask.any(axis=1), last - first, 0)).any())


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
    """One file against the page.

    tokens: how many were judged. ratio: rms(error) / rms(sigma), with its limit. worst: the index of the token that is
    furthest off in sigma, with its log-probability, the exact one, and how many sigma. token_limit: of one token.
    unexplained: how many tokens are beyond it. untested: whether the log-probabilities of the neighbouring tokens would
    hold as well. error, variance: [B, S], NaN where nothing was said. carried: see `Expected`.
    """

    checkpoint: str
    source: str
    dtype: str
    policy: str
    temperature: float
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
    error: np.ndarray
    variance: np.ndarray

    @property
    def verdict(self) -> Verdict:
        """It fails where rounding does not explain the whole, or any one token."""
        return verdict(not self.ratio <= self.limit or self.unexplained, missing=self.untested)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {key: value for key, value in vars(self).items() if key not in ("error", "variance")}
        return _plain({**values, "verdict": self.verdict})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, and "inf" or "nan" for the numbers that JSON does not have."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def judge(model: Model, said: LogProbs, dtype: str, asked: Asked, checkpoint: str = "") -> LogProbReport:
    """The report on one program's log-probabilities. model: with weights on the grid of `dtype`, in which it computed.

    Without a policy it may round as often as Transformers does: the largest error that is honest. Raises InputError for
    a model without next tokens, and tokens outside its vocabulary.
    """
    if model.head != "causal_lm":
        raise InputError(f"log-probabilities are of a model with next tokens; the head of this one is {model.head!r}")
    if int(said.ids.max()) >= model.config.vocab_size:
        raise InputError(
            f"{said.source}: token id {said.ids.max()} is outside the vocabulary of {model.config.vocab_size}"
        )
    policy = asked.policy or (FUSED if dtype == "float32" else HF_EAGER)
    expected = expect(model, said.inputs, dtype, policy, said.temperature)
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
    return LogProbReport(
        checkpoint,
        said.source,
        dtype,
        policy.name,
        said.temperature,
        int(said.said.sum()),
        ratio,
        float(limit),
        (int(at[0]), int(at[1])),
        float(said.logprobs[at]),
        float(expected.exact[at]),
        float(sigmas[at]),
        float(token_limit),
        int((sigmas > token_limit).sum()),
        bool(moved <= limit and moved_sigmas.max() <= token_limit),
        expected.carried,
        error,
        variance,
    )


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
    z = np.asarray(logits, np.float64) / said.temperature
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


def disagreement(a: LogProbReport, b: LogProbReport) -> Disagreement:
    """The difference of two reports, each against the truth. Raises InputError where they have no token in common."""
    both = ~np.isnan(a.error) & ~np.isnan(b.error)
    if not both.any():
        raise InputError(f"{a.source} and {b.source} have no token in common of which both say a log-probability")
    difference = np.where(both, a.error - np.where(both, b.error, 0), 0)
    variance = (a.variance + b.variance)[both]
    at = np.unravel_index(int(np.argmax(np.abs(difference))), difference.shape)
    ratio = float(np.sqrt(np.square(difference[both]).mean() / variance.mean()))
    fault = tuple(report.source for report in (a, b) if report.verdict == "fails")
    mean, largest = float(difference[both].mean()), float(difference[at])
    return Disagreement(a.source, b.source, int(both.sum()), ratio, mean, largest, (int(at[0]), int(at[1])), fault)


@dataclass(frozen=True)
class Found:
    """The reports on one file or two, and of two their difference."""

    reports: tuple[LogProbReport, ...]
    difference: Disagreement | None = None

    @property
    def verdict(self) -> Verdict:
        return worst(report.verdict for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as docs/schema/logprobs.json describes them."""
        difference = None
        if self.difference is not None:
            difference = _plain({**vars(self.difference), "text": self.difference.in_words})
        reports = [report.to_dict() for report in self.reports]
        return {"schema": SCHEMA, "verdict": self.verdict, "reports": reports, "difference": difference}


def check_logprobs(folder: Path | None, files: list[Path], dtypes: tuple[str, ...], asked: Asked) -> Found:
    """Judge one file or two of the same tokens, which `refllm check CHECKPOINT --logprobs F` names.

    dtypes: of the files that do not say theirs, one for both or one for each. Raises InputError for files that are not
    as docs/recording.md says, and for other tokens in the second.
    """
    from refllm.check.run import folders_to_check, load

    if folder is None or len(files) > 2:
        raise InputError("--logprobs needs the CHECKPOINT, and one file or two: refllm check CHECKPOINT --logprobs F")
    (folder,) = folders_to_check(folder)
    said = [LogProbs.load(file) for file in files]
    if len(said) == 2 and said[0].source == said[1].source:
        said = [replace(one, source=f"{one.source} ({file.name})") for one, file in zip(said, files, strict=True)]
    if len(said) == 2 and (said[0].lengths != said[1].lengths or not np.array_equal(said[0].ids, said[1].ids)):
        raise InputError(f"--logprobs {files[1]}: its tokens are others than those of {files[0]}")
    reports = []
    for i, one in enumerate(said):
        dtype = one.dtype or (dtype_name(dtypes[min(i, len(dtypes) - 1)]) if dtypes else "")
        if dtype not in DTYPES:
            which = f"{dtype!r} cannot be checked" if dtype else "nothing says in which dtype it computed"
            raise InputError(f"--logprobs {files[i]}: {which}; say --dtype with one of {', '.join(DTYPES)}")
        reports.append(judge(load(folder, dtype), one, dtype, asked, folder.name))
    return Found(tuple(reports), disagreement(*reports) if len(reports) == 2 else None)
