"""What a check will take, before it begins: memory, and about how long."""

import math
import time

import numpy as np

from refllm.check.asked import Asked
from refllm.check.inputs import Inputs
from refllm.check.keeper import in_words_of_time
from refllm.check.values import IN_MEMORY
from refllm.config import ModelConfig
from refllm.forward.model import Model
from refllm.forward.taps import sizes_of_axes
from refllm.storage.weights import free_memory

WORTH_SAYING = 20.0
"""Seconds: a check that takes less says nothing before."""
_GB = 1e9
_OF_THE_INTERPRETER = 0.15e9
_BYTES_OF_A_VALUE = 40
"""Memory for a number of the widest value of a layer: exact, its variance, its parts, the candidate's."""
_SECONDS_OF_A_WEIGHT = 4e-9
"""What it takes to convert a stored number, to square it and to read it again, on a slow core."""


def plan(model: Model, inputs: Inputs, asked: Asked, candidate: str, dtype: str) -> str:
    """A sentence without a full stop; "" for what is done at once. candidate: how it is called; "" for a recorded run,
    of which there is none."""
    seconds, needed = _seconds(model, inputs, asked), _bytes_judged(model.config, model.head, inputs)
    if seconds < WORTH_SAYING:
        return ""
    # A float32 matrix, the largest there is, stands beside the weights while they are made.
    numbers = [math.prod(shape) for shape in model.tensors(model.config).values()]
    own = 0.0
    if candidate:
        own = float(sum(numbers) * (4 if dtype == "float32" else 2) + 2 * max(numbers))
    said = f"about {(own + needed) / _GB:.1f} GB of memory" + f", {own / _GB:.1f} of them the candidate" * bool(own)
    free = free_memory()
    short = f"; {free / _GB:.1f} GB are free" if own + needed > free else ""
    few = ", and --layers 0:2 or --last 8 is a first look" if seconds > 3 * WORTH_SAYING and asked.layers.all else ""
    return f"{said}, and about {in_words_of_time(seconds)} to judge{short}{few}"


def _seconds(model: Model, inputs: Inputs, asked: Asked) -> float:
    """The time to judge, by the rate of float64 products here and now."""
    numbers = float(sum(math.prod(shape) for shape in model.tensors(model.config).values()))
    layers = asked.layers.within(model.config.num_hidden_layers)
    count = model.config.num_hidden_layers
    share = ((count if layers.stop is None else layers.stop) - layers.first) / count
    runs = 1.0 if layers.first or asked.last is not None else 2.0
    rows = inputs.input_ids.size if asked.last is None else len(inputs.input_ids) * asked.last
    if numbers * rows < 1e9:
        return 0.0
    a, b = np.ones((64, 1024)), np.ones((1024, 512))
    begin = time.perf_counter()
    for _ in range(4):
        a @ b
    rate = 4 * 2 * a.shape[0] * b.size / max(1e-6, time.perf_counter() - begin)
    return share * runs * numbers * (_SECONDS_OF_A_WEIGHT + 3 * rows / rate)


def _bytes_judged(config: ModelConfig, head: str, inputs: Inputs) -> float:
    """The memory of the process that judges: values of one layer, or the logits, and scores of all heads."""
    sizes = sizes_of_axes(config, head)
    B, S = inputs.input_ids.shape
    widest = B * S * (2 * max(sizes.values()) + 4 * sizes["E"])
    scores = B * sizes["H"] * S * S
    return float(_OF_THE_INTERPRETER + 2 * IN_MEMORY + _BYTES_OF_A_VALUE * (widest + scores))
