"""A file of what another machine must run: token ids, masks and positions, and the values that are expected of it.

docs/recording.md shows programs that write what comes out.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs, stressed
from refllm.check.layout import groups_of
from refllm.check.runs import changes_on_the_way
from refllm.check.trace import INPUTS_FORMAT, write_tensors
from refllm.config import ModelConfig
from refllm.config.digest import config_hash
from refllm.forward.taps import axes_of_values, sizes_of_axes


def runs_of(config: ModelConfig, input_ids: np.ndarray, stress: bool) -> list[Inputs]:
    """The plain run, and with `stress` the stressed ones that have one right answer."""
    more = [inputs for inputs in stressed(input_ids) if not changes_on_the_way(config, inputs)] if stress else []
    return [Inputs(input_ids), *more]


def write_inputs(path: Path, config: ModelConfig, head: str, runs: list[Inputs], checkpoint: str) -> None:
    """Write the runs to a safetensors file. Raises InputError where it cannot be written.

    Tensors: `input_ids`, `attention_mask`, `position_ids`, int64 [B, S], of the first run; of the others the same with
    the run's prefix. Metadata, in JSON: `runs`, with prefix, label, shape, chunks (sizes of the pieces to feed with a
    cache) and embeds_scale (what the embeddings are multiplied by); `values`, name -> shape with "B" and "S".
    """
    tensors: dict[str, np.ndarray] = {}
    described: list[dict[str, Any]] = []
    for i, inputs in enumerate(runs):
        prefix = f"{inputs.label.replace(' ', '_')}." if i else ""
        shown = {"input_ids": inputs.input_ids, "attention_mask": inputs.mask, "position_ids": inputs.positions}
        tensors |= {prefix + name: np.ascontiguousarray(value, np.int64) for name, value in shown.items()}
        described.append(
            {
                "prefix": prefix,
                "label": inputs.label,
                "shape": list(inputs.input_ids.shape),
                "chunks": list(inputs.chunks),
                "embeds_scale": inputs.embeds_scale,
            }
        )
    metadata = {
        "format": INPUTS_FORMAT,
        "checkpoint": checkpoint,
        "config_hash": config_hash(config),
        "runs": json.dumps(described),
        "values": json.dumps(_shapes(config, head)),
    }
    write_tensors(path, tensors, metadata)


def _shapes(config: ModelConfig, head: str) -> dict[str, list[int | str]]:
    """Name -> its shape in every run; "B" and "S" are the run's."""
    sizes: dict[str, int] = sizes_of_axes(config, head)

    def length(group: list[str]) -> int | str:
        of_run = {"B": "B", "S": "S", "T": "S"}
        return of_run[group[0]] if group[0] in of_run else math.prod(sizes[axis] for axis in group)

    return {name: [length(group) for group in groups_of(axes)] for name, axes in axes_of_values(config, head).items()}
