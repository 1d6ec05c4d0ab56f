"""One side of a benchmark, in a process of its own, so that its memory and its threads are its own.

The first request is (side, folder, prompt_tokens, new_tokens, threads, dtype, backend), where the side is "refllm",
"transformers" or "memory": the process loads the checkpoint. The others are a command and its numbers: "prefill",
"decode", "products", "prefill_of" tokens, "decode_at" context, "outputs", and of "memory" only "read".
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refllm.apart import Channel
from refllm.inputs import to_numpy

Job = Callable[..., dict[str, Any]]


class Side(Protocol):
    """A model that can be timed."""

    def forward(self, input_ids_BS: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Logits [B, V] of the last position, and the cache to go on with. cache: None to start."""
        ...


class RefllmSide:
    """The reference, or a fast model on the CPU."""

    @staticmethod
    def imports(backend: str) -> None:
        """Everything that is imported before the clock and the memory count start."""
        import refllm.models.auto

        if backend != "numpy":
            import refllm.kernels.models.fast_model  # noqa: F401

    def __init__(self, folder: Path, threads: int, dtype: str, backend: str) -> None:
        import refllm

        if backend != "numpy":
            import torch

            torch.set_num_threads(threads)
        self.backend, device = backend, None if backend == "numpy" else "cpu"
        self.model = refllm.load(folder, dtype=dtype, backend=backend, device=device)

    def forward(self, input_ids_BS: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """See `Side.forward`."""
        out = self.model(input_ids=input_ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return to_numpy(out.logits[:, -1]), out.past_key_values

    def products(self, input_ids_BS: np.ndarray) -> Callable[[], None]:
        """A job that does the matrix products of `forward` on these ids, and nothing else: same sizes, same weights,
        same library and threads."""
        from refllm.bench import own_products

        def forward() -> None:
            self.forward(input_ids_BS, None)

        numpy = self.backend == "numpy"
        return own_products.of_numpy(self.model, forward) if numpy else own_products.of_torch(forward)


class TransformersSide:
    """Transformers with its default (fused) attention."""

    @staticmethod
    def imports(backend: str) -> None:
        """Everything that is imported before the clock and the memory count start."""
        from refllm.check.adapters.transformers import quiet_transformers

        quiet_transformers()
        from transformers import AutoModelForCausalLM  # noqa: F401

    def __init__(self, folder: Path, threads: int, dtype: str, backend: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()

    def forward(self, input_ids_BS: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """See `Side.forward`."""
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(input_ids_BS)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return to_numpy(out.logits[:, -1]), out.past_key_values


class Work:
    """The timed jobs: the same forced tokens on either side."""

    def __init__(self, side: Side, vocab_size: int, prompt_tokens: int, new_tokens: int) -> None:
        self.side = side
        ids = np.random.default_rng(0).integers(0, vocab_size, size=(1, prompt_tokens + new_tokens))
        self.prompt, self.rest = ids[:, :prompt_tokens], [ids[:, i : i + 1] for i in range(prompt_tokens, ids.shape[1])]
        self._vocab_size = vocab_size
        self._cache: Any = None
        self._held = 0
        self._products: Callable[[], None] | None = None

    def prefill(self) -> float:
        """Seconds for the whole prompt at once."""
        start = time.perf_counter()
        self.side.forward(self.prompt, None)
        return time.perf_counter() - start

    def decode(self) -> float:
        """Seconds per token for single tokens behind the prompt."""
        _, cache = self.side.forward(self.prompt, None)
        start = time.perf_counter()
        for token in self.rest:
            _, cache = self.side.forward(token, cache)
        return (time.perf_counter() - start) / len(self.rest)

    def products(self) -> float:
        """Seconds for the matrix products of `prefill` alone."""
        if self._products is None:
            self._products = self.side.products(self.prompt)  # type: ignore[attr-defined]
            self._products()
        start = time.perf_counter()
        self._products()
        return time.perf_counter() - start

    def prefill_of(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens at once."""
        ids = self._some(tokens)
        start = time.perf_counter()
        self.side.forward(ids, None)
        return time.perf_counter() - start

    def decode_at(self, context: int) -> float:
        """Seconds per token (median) behind a context of so many tokens, to which the cache of the last call is filled
        up: contexts must grow from call to call."""
        if context > self._held:
            _, self._cache = self.side.forward(self._some(context - self._held), self._cache)
        seconds = []
        for token in self.rest:
            start = time.perf_counter()
            _, self._cache = self.side.forward(token, self._cache)
            seconds.append(time.perf_counter() - start)
        self._held = max(context, self._held) + len(self.rest)
        return float(np.median(seconds))

    def _some(self, tokens: int) -> np.ndarray:
        """Random ids [1, tokens]."""
        return np.random.default_rng(tokens).integers(0, self._vocab_size, size=(1, tokens))

    def outputs(self) -> np.ndarray:
        """Logits [1 + new_tokens, V] of the prompt's last position and of every decoded one."""
        logits, cache = self.side.forward(self.prompt, None)
        rows = [np.array(logits[0])]
        for token in self.rest:
            logits, cache = self.side.forward(token, cache)
            rows.append(np.array(logits[0]))
        return np.stack(rows)


class Peak:
    """Largest anonymous memory of this process while a job runs (what a memory-mapped file holds does not count)."""

    def __init__(self) -> None:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process now; 0 where the system does not tell (not Linux)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def read_seconds(size: int, threads: int) -> Callable[[], float]:
    """A job that reads `size` bytes of float32 once with `threads` threads, and its time: the bound of a decode step.

    Two ways, the faster counts: BLAS matrix times vector, and a sum of one slice per thread.
    """
    from concurrent.futures import ThreadPoolExecutor

    columns = 1024
    matrix = np.ones((max(threads, size // (4 * columns)), columns), dtype=np.float32)
    vector, pool, slices = (
        np.ones(columns, dtype=np.float32),
        ThreadPoolExecutor(threads),
        np.array_split(matrix, threads),
    )

    def job() -> float:
        start = time.perf_counter()
        _ = matrix @ vector
        by_blas = time.perf_counter() - start
        start = time.perf_counter()
        list(pool.map(np.sum, slices))
        return min(by_blas, time.perf_counter() - start)

    return job


def serve(channel: Channel) -> None:
    """Loads what the first request says, answers it with what that took, and then does the jobs of the others."""
    job: Job | None = None
    for request in channel.requests():
        if job is None:
            job, ready = begin(*request)
            channel.answer("ready", ready)
        else:
            channel.answer("done", job(*request))


def begin(
    side_name: str, folder: str, prompt_tokens: int, new_tokens: int, threads: int, dtype: str, backend: str
) -> tuple[Job, dict[str, Any]]:
    """The side, loaded, as a function of a command and its numbers; and what loading took."""
    if side_name == "memory":
        read = read_seconds(prompt_tokens, threads)  # here the number is a size in bytes
        return lambda _: {"seconds": read()}, {}
    side_class: Any = {"refllm": RefllmSide, "transformers": TransformersSide}[side_name]
    vocab_size = int(json.loads((Path(folder) / "config.json").read_text())["vocab_size"])
    side_class.imports(backend)
    before = anonymous_bytes()
    start = time.perf_counter()
    with Peak() as load_peak:
        side = side_class(Path(folder), threads, dtype, backend)
    load_seconds = time.perf_counter() - start
    work = Work(side, vocab_size, prompt_tokens, new_tokens)

    def job(command: str, *numbers: int) -> dict[str, Any]:
        if command != "outputs":
            return {"seconds": getattr(work, command)(*numbers)}
        with Peak() as run_peak:
            logits = work.outputs()
        return {"logits": logits, "peak_bytes": run_peak.bytes}

    return job, {"load_seconds": load_seconds, "before_bytes": before, "load_peak_bytes": load_peak.bytes}
