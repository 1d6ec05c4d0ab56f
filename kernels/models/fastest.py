"""Several ways to compute the same, of which the fastest on this machine is taken: measured, not assumed.

Which library multiplies faster depends on the processor: on an AMD Zen 5 oneDNN's float32 products take half the time
of MKL's, which `torch.nn.functional.linear` calls; on an Intel one they may well not. So each kind of call (its sizes,
its dtype) is timed in every way when it comes by for the first time, on its own arguments, and computed in the way that
won from then on. All are right; they differ in the order of their sums. Within one process a kind of call is always
computed in one way, so that equal calls have equal results.
"""

import time
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch

_ROUNDS = 2
_WORTH_IT = 0.95
"""Another way than the first, which is Torch's own, has to take less than this share of its time."""
_FORGOTTEN_BYTES = 64 << 20
"""Written in between, so that weights come from memory as they do in a model: more than most caches hold."""


class Fastest:
    """A function that is computed in the fastest of several ways.

    forms: by name, the usual one first; all take the same arguments. One that raises at its first call is left out.
    """

    def __init__(self, **forms: Callable[..., torch.Tensor]) -> None:
        self.forms = forms
        self.chosen: dict[Hashable, str] = {}
        self._lock = Lock()

    def __call__(self, kind: Hashable, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """The value for these arguments. kind: what the choice depends on, such as sizes in steps and a dtype."""
        name = self.chosen.get(kind)
        if name is None:
            with self._lock:  # two measurements at a time would measure each other
                name = self.chosen.get(kind) or self._choose(kind, arguments, keywords)
        return self.forms[name](*arguments, **keywords)

    def _choose(self, kind: Hashable, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        first = next(iter(self.forms))
        best: dict[str, float] = {}
        for name, form in self.forms.items():
            try:
                form(*arguments, **keywords)
            except (RuntimeError, NotImplementedError, AttributeError):
                if name == first:
                    raise
            else:
                best[name] = float("inf")
        other = torch.empty(_FORGOTTEN_BYTES // 4 if len(best) > 1 else 0)
        for _ in range(_ROUNDS if len(best) > 1 else 0):
            for name in best:
                other.fill_(0.0)
                start = time.perf_counter()
                self.forms[name](*arguments, **keywords)
                best[name] = min(best[name], time.perf_counter() - start)
        fastest = min(best, key=lambda name: best[name] if name == first else best[name] / _WORTH_IT)
        self.chosen[kind] = fastest
        return fastest


def step(count: int) -> int:
    """The power of two that holds `count`: what is fast for one number of rows is so for its neighbours."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
