"""`refllm bench decode` and `refllm bench prefill`: whole models, against what their weights and products allow.

    decode     one token at a time behind a prompt. A call of `generate` for n tokens less one for two, over n - 2: what
               stays is the step itself, with everything that Python does around it. Beside it the recorded step alone.
    prefill    a whole prompt at once, logits of its last position

Peers: this project's torch backend, and Transformers' generate and forward pass with the same weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refllm.bench import results
from refllm.bench.ceilings import measure_ceilings
from refllm.bench.kernels import DTYPE, Save, Step, check_device
from refllm.bench.measure import Bench, clause
from refllm.bench.model_forms import FORMS, Subject, agree, forward, generation, prepare
from refllm.bench.results import Row
from refllm.bench.timer import Deadline, Spread, clock, spread
from refllm.bench.traffic import Traffic, decode_step, prefill
from refllm.bench.whole_models import MODELS
from refllm.errors import InputError

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
        try:
            subject = prepare(model, dtype, device, settings.forms)
            for row in rows_of(subject, settings, bench, deadline, left_out, step):
                row.rate(bench.ceilings)
                rows.append(row)
                save(result([f"{model}: what follows", *models[number + 1 :]]))
            del subject  # before the next model's weights are made
            _give_memory_back(device)
        except Exception as error:  # the models after this one still count
            said = f"not timed: {clause(error)}"
            rows.append(Row(name, model, "", "all forms", True, dtype, {}, 0, 0, note=said, finding=said))
    return result()


def _give_memory_back(device: str) -> None:
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _rows(subject: Subject, what: str, group: str, sizes: dict[str, int], cost: Traffic, forms: Any) -> list[Row]:
    whole = subject.whole
    return [
        Row(what, whole.name, group, form, form != "transformers", whole.dtype, sizes, cost.bytes, cost.flops)
        for form in forms
    ]


def _decode_rows(
    subject: Subject, settings: Settings, bench: Bench, deadline: Deadline, left_out: list[str], step: Step
) -> Iterator[Row]:
    device, sizes = settings.device, subject.whole.sizes()
    prompt, new = settings.prompt or PROMPT[device], settings.new or NEW[device]
    for batch in settings.batches or BATCHES[device]:
        name = f"{subject.whole.name}, batch {batch}"
        if deadline.passed:
            left_out.append(name)
            continue
        step(f"decode: {name}")
        cost = decode_step(
            sizes.layers + sizes.head, sizes.cache, sizes.group, batch, _ELEMENT[subject.whole.dtype], prompt + new // 2
        )
        numbers = {"batch": batch, "prompt": prompt, "new": new}
        rows = _rows(subject, "decode", f"batch {batch}", numbers, cost, settings.forms)
        ids = subject.whole.prompt(batch, prompt)
        agree(subject, ids, rows)
        for row in rows:
            row.tokens = batch
            runs = not row.note
            if runs:
                row.time, first = generated(generation(subject.models[row.form], ids), new, bench)
                row.note = f"the first step takes {results.span(first)} more"
            yield row
            if runs and row.ours:
                yield _step_alone(row, subject.models[row.form], ids, new, bench)


def generated(generate: Callable[[int], Any], new: int, bench: Bench) -> tuple[Spread, float]:
    """Seconds per token of a long generation, and what the first decoding step costs beyond that (a graph's recording).

    Both from differences of whole calls: with n, 2 and 1 new tokens.
    """

    def seconds(count: int) -> float:
        bench.watch.synchronize()
        start = time.perf_counter()
        generate(count)
        bench.watch.synchronize()
        return time.perf_counter() - start

    seconds(new)
    rates, firsts = [], []
    for _ in range(REPEATS):
        one, two, many = seconds(1), seconds(2), seconds(new)
        rates.append(max(many - two, 1e-9) / (new - 2))
        firsts.append(two - one)
    found = spread(rates, "wall clock of generate")
    return found, max(0.0, sorted(firsts)[REPEATS // 2] - found.median)


def _step_alone(row: Row, model: Any, ids: Any, new: int, bench: Bench) -> Row:
    """One step of decoding without the host's share of it: recorded and replayed on a GPU."""
    import numpy as np
    import torch

    from refllm.kernels.models.decode import DecodeStep

    batch, prompt = ids.shape
    alone = Row(row.what, row.panel, row.group, f"{row.form}, step alone", True, row.dtype, row.sizes, 0, 0)
    alone.bytes, alone.flops, alone.tokens, alone.checked = row.bytes, row.flops, batch, row.checked
    try:
        with torch.no_grad():
            cache = model.new_cache(prompt + new)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            decode = DecodeStep(model, cache)
            decode.run(ids[:, -1:], np.full((batch, 1), prompt))
            alone.time = bench.watch.time([decode.forward], bench.seconds).spread
    except Exception as error:  # a finding of this run; the others still count
        alone.finding = clause(error)
        alone.note = "not timed: it raised"
    return alone


def _prefill_rows(
    subject: Subject, settings: Settings, bench: Bench, deadline: Deadline, left_out: list[str], step: Step
) -> Iterator[Row]:
    device, sizes = settings.device, subject.whole.sizes()
    for batch in settings.batches or (1,):
        for length in settings.lengths or LENGTHS[device]:
            name = f"{subject.whole.name}, {batch} x {length} tokens"
            if deadline.passed:
                left_out.append(name)
                continue
            step(f"prefill: {name}")
            width = _ELEMENT[subject.whole.dtype]
            cost = prefill(sizes.layers, sizes.head, sizes.cache, sizes.group, batch, width, length)
            rows = _rows(subject, "prefill", f"{batch} x {length}", {"batch": batch, "S": length}, cost, settings.forms)
            ids = subject.whole.prompt(batch, length)
            agree(subject, ids, rows)
            for row in rows:
                row.tokens = batch * length
                if not row.note:
                    row.time = bench.watch.time([forward(subject.models[row.form], ids)], bench.seconds, False).spread
                yield row
