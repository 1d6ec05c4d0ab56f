"""A whole model in every form that runs here and agrees with the others: this project's backends, and Transformers.

What a form returns is compared three times, each time with something that was computed in another way:

    its first layers     with the definition in float64, decoding included (`prepare`; this project's forms only)
    all layers           its logits behind a prompt with those of the first form that runs (`agree`)
    what it generates    every token with the logits that the first form has for that text read at once (`wrong_tokens`)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refllm.bench.faults import excuse, guarded
from refllm.bench.forms import NotTakenError
from refllm.bench.results import Row
from refllm.bench.whole_models import Whole, limit_of, relative_error
from refllm.inputs import to_numpy

FORMS = ("triton", "torch", "transformers")
NEAR = 6.0
"""A generated token may be so many roundings of a logit below the largest: each of the two logits is off by one of
them (rms), and over thousands of tokens the largest difference is four times that of two of them, sqrt 2."""


@dataclass
class Subject:
    """A model, its forms as far as they run here, and why the others do not (or what is wrong with them)."""

    whole: Whole
    models: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """The limit of the relative error of logits after all layers."""
        return limit_of(self.whole.dtype, self.whole.sizes().depth)


@dataclass(frozen=True)
class Agreed:
    """The form that the others are compared with, and its logits [B, V] behind the prompt."""

    form: str
    logits: np.ndarray


def prepare(name: str, dtype: str, device: str, forms: tuple[str, ...]) -> Subject:
    """The model in every form; a backend whose first layers are not what the reference says gets a finding."""
    subject = Subject(Whole(name, dtype, device))
    for form in forms:
        try:
            if form == "transformers":
                subject.models[form] = subject.whole.transformers()
            elif form == "triton" and device == "cpu":
                raise NotTakenError("interpreted")
            else:
                subject.errors[form], problem = subject.whole.check(form)
                if problem:
                    subject.findings[form] = problem
                    raise NotTakenError("wrong output")
                subject.models[form] = subject.whole.fast(form)
        except Exception as error:  # whatever a library raises is this form's; the others still count
            note, finding = excuse(error, form != "transformers")
            subject.reasons[form] = note
            subject.findings.setdefault(form, finding)
    return subject


def refuse(row: Row, problem: str) -> None:
    """A row without a time, because what was computed is wrong."""
    row.time, row.note = None, f"not timed: {problem}"
    row.finding = problem if row.ours else ""


def agree(subject: Subject, ids: np.ndarray, rows: Sequence[Row]) -> Agreed | None:
    """Compares the last logits of all forms with those of the first that runs, this project's before a peer's; says in
    each row what was checked, or why it must not be timed. None if no form runs."""
    agreed: Agreed | None = None
    for row in sorted(rows, key=lambda row: not row.ours):
        row.note, row.finding = subject.reasons.get(row.form, ""), subject.findings.get(row.form, "")
        if row.form not in subject.models:
            continue
        with guarded(row):
            logits = last_logits(subject.models[row.form], ids)
            agreed = agreed or Agreed(row.form, logits)
            _compare(row, subject, logits, agreed)
    return agreed


def _compare(row: Row, subject: Subject, logits: np.ndarray, agreed: Agreed) -> None:
    row.error = relative_error(logits, agreed.logits)
    checks = []
    if row.form in subject.errors:
        checks.append(f"its first layers against the definition in float64 ({subject.errors[row.form]:.1e})")
    if row.form != agreed.form:
        checks.append(f"its logits after all layers against {agreed.form}")
    row.checked = ", ".join(checks)
    if not checks:
        raise NotTakenError("no other form runs that it could be compared with")
    if not row.error <= subject.limit:
        refuse(row, f"its logits and those of {agreed.form} {differ(row.error, subject.limit)}")


def differ(error: float, limit: float) -> str:
    """ "differ by 0.3 (limit 0.05)"."""
    return f"differ by {error:.2g} (limit {limit:.2g})"


def last_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """[B, V] of the last position, of any of the forms."""
    return last_of(forward(model, ids)())


def last_of(output: Any) -> np.ndarray:
    """Logits [B, V] of the last position of what a call returned."""
    return to_numpy(output.logits[:, -1])


def forward(model: Any, ids: np.ndarray, keep: int = 1) -> Callable[[], Any]:
    """The forward pass over a prompt into a new cache, with the logits of its last `keep` positions, as a call without
    arguments."""
    import torch

    if hasattr(model, "new_cache"):
        length = ids.shape[1]
        return lambda: model(
            input_ids=ids, past_key_values=model.new_cache(length), use_cache=True, logits_to_keep=keep
        )
    tensor = torch.from_numpy(ids).to(model.device)

    def call() -> Any:
        with torch.inference_mode():
            return model(input_ids=tensor, use_cache=True, logits_to_keep=keep)

    return call


def generation(model: Any, ids: np.ndarray) -> Callable[[int], Any]:
    """generate(n): greedy, exactly n new tokens; ours into a cache that has its size from the start."""
    import torch

    if hasattr(model, "new_cache"):
        ours = {"do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
        return lambda n: model.generate(ids, max_new_tokens=n, **ours)
    tensor = torch.from_numpy(ids).to(model.device)
    mask = torch.ones_like(tensor)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda n: model.generate(tensor, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **options)


def wrong_tokens(model: Any, ids: np.ndarray, sequences: Sequence[np.ndarray], new: int, limit: float) -> str:
    """What is wrong with greedy continuations [B, S + new] of ids [B, S], or "".

    Each is read by `model` at once: every new token has to have its largest logit, but for a near-tie (`NEAR` times
    `limit`, a relative error). So two forms may part at a near-tie, and what each says after it is checked too.
    """
    for sequence in {one.tobytes(): one for one in sequences}.values():
        if sequence.shape != (len(ids), ids.shape[1] + new) or not np.array_equal(sequence[:, : ids.shape[1]], ids):
            return f"what it returned, {list(sequence.shape)}, is not the prompt and {new} tokens behind it"
        behind = _behind(forward(model, sequence[:, :-1], keep=new)().logits, sequence[:, -new:])
        if not behind <= NEAR * limit:
            return f"a generated token is {behind:.2g} rms below the largest logit (limit {NEAR * limit:.2g})"
    return ""


def _behind(logits_BNV: Any, tokens_BN: np.ndarray) -> float:
    """How far the logit of a token is below the largest, at most, over the rms of the logits; NaN if one is there."""
    import torch

    tokens = torch.from_numpy(tokens_BN).to(logits_BNV.device)
    worst = []
    for logits_NV, tokens_N in zip(logits_BNV, tokens, strict=True):  # by row: the whole in float32 takes gigabytes
        wide_NV = logits_NV.float()
        below_N = wide_NV.amax(-1) - wide_NV.gather(-1, tokens_N[:, None])[:, 0]
        worst.append(below_N.amax() / wide_NV.square().mean().sqrt())
    return float(torch.stack(worst).amax())
