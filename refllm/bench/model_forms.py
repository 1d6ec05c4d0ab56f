"""A whole model in every form that runs here and agrees with the others: this project's backends, and Transformers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from refllm.bench.forms import NotTakenError
from refllm.bench.measure import clause
from refllm.bench.results import Row
from refllm.bench.whole_models import Whole, limit_of, relative_error

FORMS = ("triton", "torch", "transformers")


@dataclass
class Subject:
    """A model, its forms as far as they run here, and why the others do not (or what is wrong with them)."""

    whole: Whole
    models: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


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
        except NotTakenError as error:
            subject.reasons[form] = f"not timed: {error}"
        except Exception as error:  # whatever a library raises is this form's; the others still count
            subject.reasons[form] = f"not timed: it raised {clause(error)}"
            if form != "transformers":
                subject.findings[form] = clause(error)
    return subject


def agree(subject: Subject, ids: Any, rows: list[Row]) -> None:
    """Compares the last logits of all forms with those of the first that runs; says what was checked, or a finding."""
    limit, first = limit_of(subject.whole.dtype, subject.whole.sizes().depth), ""
    logits: dict[str, Any] = {}
    for row in rows:
        row.note, row.finding = subject.reasons.get(row.form, ""), subject.findings.get(row.form, "")
        if row.form not in subject.models:
            continue
        logits[row.form] = last_logits(subject.models[row.form], ids)
        first = first or row.form
        row.error = relative_error(logits[row.form], logits[first])
        own = f"its first layers against the definition in float64 ({subject.errors.get(row.form, 0.0):.1e})"
        row.checked = own if row.form in subject.errors else "its logits"
        row.checked += f", all layers against {first}" if row.form != first else ""
        if not row.error <= limit:
            row.note = f"not timed: its logits and those of {first} differ by {row.error:.2g} (limit {limit:.2g})"
            row.finding = row.note if row.ours else ""


def last_logits(model: Any, ids: Any) -> Any:
    """[B, V] of the last position, of any of the forms."""
    from refllm.inputs import to_numpy

    return to_numpy(forward(model, ids)().logits)[:, -1]


def forward(model: Any, ids: Any) -> Callable[[], Any]:
    """The forward pass over a prompt into a new cache, as a call without arguments."""
    import torch

    if hasattr(model, "new_cache"):
        length = ids.shape[1]
        return lambda: model(input_ids=ids, past_key_values=model.new_cache(length), use_cache=True, logits_to_keep=1)
    tensor = torch.from_numpy(ids).to(model.device)

    def call() -> Any:
        with torch.inference_mode():
            return model(input_ids=tensor, use_cache=True, logits_to_keep=1)

    return call


def generation(model: Any, ids: Any) -> Callable[[int], Any]:
    """generate(n): greedy, exactly n new tokens."""
    import torch

    if hasattr(model, "new_cache"):
        return lambda n: model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None)
    tensor = torch.from_numpy(ids).to(model.device)
    mask = torch.ones_like(tensor)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda n: model.generate(tensor, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **options)
