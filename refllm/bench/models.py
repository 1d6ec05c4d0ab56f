"""`refllm bench decode` and `refllm bench prefill`: whole models, against what their weights and products allow.

    decode     one token at a time behind a prompt, in three rows: a call of `generate` for n tokens less one for two,
               over n - 2, which leaves the step itself with all that Python does around it; the whole call, prompt and
               first step included; and the recorded step alone
    prefill    a whole prompt at once, logits of its last position

Peers: this project's torch backend, and Transformers' generate and forward pass with the same weights.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from refllm.bench import results
from refllm.bench.ceilings import measure_ceilings
from refllm.bench.faults import excuse, guarded
from refllm.bench.kernels import DTYPE, Save, Step, check_device
from refllm.bench.measure import Bench
from refllm.bench.model_forms import (
    FORMS,
    Agreed,
    Subject,
    agree,
    differ,
    forward,
    generation,
    last_logits,
    last_of,
    prepare,
    refuse,
    wrong_tokens,
)
from refllm.bench.results import STEP_ALONE, WHOLE_CALL, Row
from refllm.bench.timer import Deadline, Spread, clock, spread
from refllm.bench.traffic import Traffic
from refllm.bench.whole_models import MODELS, relative_error
from refllm.errors import InputError
from refllm.inputs import to_numpy
from refllm.precision.dtype_names import dtype_name

DEFAULT_MODELS = {
    "cuda": ("helium-1-preview-2b", "helium-1-2b", "stablelm-3b-4e1t", "afm-4.5b", "stablelm-2-12b"),
    "cpu": ("helium-1m",),
}
PROMPT, NEW = {"cuda": 512, "cpu": 16}, {"cuda": 128, "cpu": 8}
BATCHES = {"cuda": (1, 8, 64), "cpu": (1, 2)}
LENGTHS = {"cuda": (1024, 4096, 16384, 32768), "cpu": (16, 32)}
REPEATS = 3
_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Settings:
    """What to time; None and empty: what suits the device.

    models: names of `whole_models.MODELS`. batches: sequences at a time. prompt, new: tokens of the prompt and behind
    it (decode). lengths: of the prompt (prefill). forms: who computes, of `FORMS`. minutes, seconds, scale,
    cache_bytes: as in `refllm.bench.kernels.Settings`.
    """

    device: str = "cuda"
    dtype: str = ""
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    prompt: int = 0
    new: int = 0
    lengths: tuple[int, ...] = ()
    forms: tuple[str, ...] = FORMS
    minutes: float | None = None
    seconds: float = 0.3
    scale: float = 1.0
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        check_device(self.device)
        for name in self.models:
            if name not in MODELS:
                raise InputError(f"--model {name} is not known: use {', '.join(MODELS)}")
        for form in self.forms:
            if form not in FORMS:
                raise InputError(f"--peers {form} is not known: use {', '.join(FORMS)}")
        if self.new and self.new < 4:
            raise InputError(f"--new-tokens {self.new} is too few: at least 4, of which the first two are not counted")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in ("", *_ELEMENT):
            raise InputError(f"--dtype {self.dtype} is not a kernel's: use bfloat16, float16 or float32")


def bench_decode(settings: Settings, step: Step = lambda *_: None, save: Save = lambda _: None) -> dict[str, Any]:
    """Tokens per second of greedy generation behind a prompt."""
    return _run("decode", settings, _decode_rows, step, save)


def bench_prefill(settings: Settings, step: Step = lambda *_: None, save: Save = lambda _: None) -> dict[str, Any]:
    """Time of the forward pass over prompts of several lengths."""
    return _run("prefill", settings, _prefill_rows, step, save)


def _run(
    name: str, settings: Settings, rows_of: Callable[..., Iterator[Row]], step: Step, save: Save
) -> dict[str, Any]:
    deadline, device = Deadline(settings.minutes), settings.device
    dtype = settings.dtype or DTYPE[device]
    watch = clock(device, settings.cache_bytes)
    step("what this machine can do at best")
    bench = Bench(watch, measure_ceilings(device, (dtype,), scale=settings.scale, watch=watch), settings.seconds)
    rows: list[Row] = []
    left_out: list[str] = []
    rows_of_one = partial(rows_of, settings=settings, bench=bench, deadline=deadline, left_out=left_out, step=step)
    models = settings.models or DEFAULT_MODELS[device]

    def result(missing: Sequence[str] = ()) -> dict[str, Any]:
        return results.assemble(
            name,
            device,
            rows,
            ceilings=bench.ceilings,
            settings=asdict(settings),
            left_out=[*left_out, *missing],
            seconds=deadline.seconds,
        )

    for number, model in enumerate(models):
        if deadline.passed:
            left_out.append(model)
            continue
        step(f"{model}: random weights, and whether its first layers are right")
        for row in _model_rows(name, model, dtype, settings, rows_of_one):
            row.rate(bench.ceilings)
            rows.append(row)
            save(result([f"{model}: what follows", *models[number + 1 :]]))
        _give_memory_back(device)
    return result()


def _model_rows(
    name: str, model: str, dtype: str, settings: Settings, rows_of: Callable[[Subject], Iterator[Row]]
) -> Iterator[Row]:
    """The rows of one model. Its weights live in here, so that they are gone before the next model's are made."""
    try:
        yield from rows_of(prepare(model, dtype, settings.device, settings.forms))
    except Exception as error:  # the models after this one still count
        note, finding = excuse(error, ours=True)
        yield Row(name, model, "", "all forms", True, dtype, {}, 0, 0, note=note, finding=finding)


def _give_memory_back(device: str) -> None:
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        with contextlib.suppress(RuntimeError):  # a GPU that a kernel broke has said so in a row already
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Call:
    """What the rows of one call share. sizes: the numbers that make it up."""

    what: str
    group: str
    sizes: dict[str, int]
    subject: Subject

    def row(self, form: str, cost: Traffic, tokens: int, part: str = "") -> Row:
        """An empty row of a form, of `FORMS`; part: what of the call it is about, "" for the usual."""
        whole, name = self.subject.whole, f"{form}, {part}" if part else form
        ours = form != "transformers"
        group, dtype = self.group, whole.dtype
        return Row(self.what, whole.name, group, name, ours, dtype, self.sizes, cost.bytes, cost.flops, tokens=tokens)


def _decode_rows(
    subject: Subject, settings: Settings, bench: Bench, deadline: Deadline, left_out: list[str], step: Step
) -> Iterator[Row]:
    device = settings.device
    prompt, new = settings.prompt or PROMPT[device], settings.new or NEW[device]
    for batch in settings.batches or BATCHES[device]:
        name = f"{subject.whole.name}, batch {batch}"
        if deadline.passed:
            left_out.append(name)
            continue
        step(f"decode: {name}")
        call = Call("decode", f"batch {batch}", {"batch": batch, "prompt": prompt, "new": new}, subject)
        yield from _decode_call(call, subject.whole.prompt(batch, prompt), settings.forms, bench)


def _decode_call(call: Call, ids: np.ndarray, forms: Sequence[str], bench: Bench) -> Iterator[Row]:
    """Up to three rows per form: seconds per token, of the whole call, and (ours) of the recorded step alone."""
    subject, new, (batch, prompt) = call.subject, call.sizes["new"], ids.shape
    sizes, width = subject.whole.sizes(), _ELEMENT[subject.whole.dtype]
    token = sizes.decode_step(batch, width, prompt + new // 2)  # on average
    before, steps = sizes.prefill(batch, width, prompt), new - 1  # the prompt itself gives the first token
    everything = Traffic(before.bytes + steps * token.bytes, before.flops + steps * token.flops)
    rows = [call.row(form, token, batch) for form in forms]
    agreed = agree(subject, ids, rows)
    for row in rows:
        whole = call.row(row.form, everything, batch * new, WHOLE_CALL)
        if agreed is not None and not row.note:
            _time_generation(row, whole, subject, agreed, ids, new, bench)
        yield row
        if whole.time is not None:
            yield whole
        if whole.time is not None and row.ours:
            alone = call.row(row.form, sizes.decode_step(batch, width, prompt + 1), batch, STEP_ALONE)
            _time_step(alone, subject.models[row.form], ids, subject.limit, bench)
            yield alone


def _time_generation(
    row: Row, whole: Row, subject: Subject, agreed: Agreed, ids: np.ndarray, new: int, bench: Bench
) -> None:
    """Fills the row of a token and that of a whole call, if the tokens that came of it are right."""
    with guarded(row):
        found = generated(generation(subject.models[row.form], ids), new, bench)
        referee = subject.models[agreed.form]
        if problem := wrong_tokens(referee, ids, found.sequences, new, subject.limit):
            refuse(row, problem)
            return
        row.checked += f", every token it generated against the logits of {agreed.form}"
        whole.time, whole.error, whole.checked = found.whole, row.error, row.checked
        if found.token.median <= 0:  # on a busy machine, with few tokens
            row.note = "not timed: its tokens take less than the noise of the clock"
            return
        row.time, row.note = found.token, f"the first step takes {results.span(found.first)} more"


@dataclass(frozen=True)
class Generated:
    """Seconds per token, of the whole call, and what the first decoding step costs beyond a token (a graph's
    recording); and the sequences [B, S + new] that the timed calls returned."""

    token: Spread
    whole: Spread
    first: float
    sequences: list[np.ndarray]


def generated(generate: Callable[[int], Any], new: int, bench: Bench) -> Generated:
    """Times generation by differences of whole calls: with n, 2 and 1 new tokens."""
    sequences = []

    def seconds(count: int) -> float:
        bench.watch.synchronize()
        start = time.perf_counter()
        found = generate(count)
        bench.watch.synchronize()
        took = time.perf_counter() - start
        if count == new:
            sequences.append(to_numpy(found))
        return took

    seconds(new)
    wholes, rates, firsts = [], [], []
    for _ in range(REPEATS):
        one, two, many = seconds(1), seconds(2), seconds(new)
        wholes.append(many)
        rates.append((many - two) / (new - 2))
        firsts.append(two - one)
    token, whole = spread(rates, "differences of generate, wall clock"), spread(wholes, "generate, wall clock")
    return Generated(token, whole, max(0.0, sorted(firsts)[REPEATS // 2] - token.median), sequences)


def _time_step(row: Row, model: Any, ids: np.ndarray, limit: float, bench: Bench) -> None:
    """One step of decoding without the host's share of it, recorded and replayed on a GPU, if it gives the logits of
    the same text read at once."""
    import torch

    from refllm.kernels.models.decode import DecodeStep

    token, prompt = ids[:, -1:], ids.shape[1]
    with guarded(row), torch.no_grad():
        cache = model.new_cache(prompt + 1)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = DecodeStep(model, cache)
        step.run(cache, token, np.full(token.shape, prompt))
        timed = bench.watch.time([step.forward], bench.seconds)
        row.error = relative_error(to_numpy(timed.outputs[0][:, -1]), last_logits(model, np.hstack([ids, token])))
        row.checked = "its logits against those of the same text read at once"
        if not row.error <= limit:
            refuse(row, f"its logits and those of the same text read at once {differ(row.error, limit)}")
            return
        row.time = timed.spread


def _prefill_rows(
    subject: Subject, settings: Settings, bench: Bench, deadline: Deadline, left_out: list[str], step: Step
) -> Iterator[Row]:
    width = _ELEMENT[subject.whole.dtype]
    for batch in settings.batches or (1,):
        for length in settings.lengths or LENGTHS[settings.device]:
            name = f"{subject.whole.name}, {batch} x {length} tokens"
            if deadline.passed:
                left_out.append(name)
                continue
            step(f"prefill: {name}")
            call = Call("prefill", f"{batch} x {length}", {"batch": batch, "S": length}, subject)
            cost = subject.whole.sizes().prefill(batch, width, length)
            rows = [call.row(form, cost, batch * length) for form in settings.forms]
            ids = subject.whole.prompt(batch, length)
            agreed = agree(subject, ids, rows)
            for row in rows:
                if agreed is not None and not row.note:
                    _time_prefill(row, subject, agreed, ids, bench)
                yield row


def _time_prefill(row: Row, subject: Subject, agreed: Agreed, ids: np.ndarray, bench: Bench) -> None:
    """Fills the row, if what the timed calls returned is still what was agreed on."""
    with guarded(row):
        timed = bench.watch.time([forward(subject.models[row.form], ids)], bench.seconds, False)
        error = relative_error(last_of(timed.outputs[0]), agreed.logits)
        if not error <= subject.limit:
            refuse(row, f"while timed, its logits and those of {agreed.form} {differ(error, subject.limit)}")
            return
        row.time = timed.spread
