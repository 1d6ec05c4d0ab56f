"""Checks a candidate against the definition of its operator, and times it on a GPU."""

from collections.abc import Callable
from typing import Any

from refllm.kernels.calls import Source
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target
from refllm.kernels.tuning.tunables import Call, Tunable
from refllm.kernels.verify import Contract


def drawn(tunable: Tunable, shape: str, device: str, seed: int = 0, small: bool = False) -> Call:
    """The call of a class with random values on a device."""
    return tunable.make(shape, Source(tunable.dtype(shape), device, seed), small)


def prepared(tunable: Tunable, call: Call, target: Target, tile: Any) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """What starts every kernel of the call in this tile, and the results that it writes."""
    _, (first, *results) = tunable.launch(call, target, tile)
    launches = [first] if isinstance(first, Launch) else list(first)

    def run() -> None:
        for launch in launches:
            launch.run()

    return run, tuple(results)


class Check:
    """The definition of one small call, for any number of tiles."""

    def __init__(self, tunable: Tunable, shape: str, device: str) -> None:
        self.tunable, self.call = tunable, drawn(tunable, shape, device, small=True)
        self.contract = Contract(self.call.operator, self.call.arguments, self.call.keywords)

    def problem(self, tile: Any, target: Target) -> str:
        """What is wrong with the results in this tile; "" if they meet the contract."""
        run, results = prepared(self.tunable, self.call, target, tile)
        run()
        verdicts = self.contract.judge(results[: len(self.contract.exact)])
        return "; ".join(verdict.problem for verdict in verdicts if verdict.problem)


def seconds(tunable: Tunable, shape: str, tile: Any, target: Target, clock: Any, budget: float) -> float:
    """The median time of a call in this tile, over sets of inputs that the cache does not hold all together."""
    from refllm.bench.timer import sets_needed

    calls = [drawn(tunable, shape, clock.device, seed) for seed in range(2)]
    size = sum(x.element_size() * x.numel() for x in calls[0].arguments if hasattr(x, "element_size"))
    calls += [drawn(tunable, shape, clock.device, seed) for seed in range(2, sets_needed(size, clock.cache_bytes))]
    runs = [prepared(tunable, call, target, tile)[0] for call in calls]
    return float(clock.time(runs, budget).spread.median)
