"""What each rank of a distributed program writes, so that `refllm check CHECKPOINT --trace FOLDER` can judge the whole.

trace = RankTrace({"tp": world_size}, {"tp": rank}, rank=rank)      # or RankTrace.of(device_mesh)
trace.tap("model.layers.0.mlp.up_proj", up, tp="Shard(-1)")         # a DTensor says its placement itself
trace.save(folder, input_ids)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.ranks import REPLICATE
from refllm.check.trace import write_tensors
from refllm.errors import InputError
from refllm.inputs import to_numpy


class RankTrace:
    """The values of one rank. mesh: names and sizes of its dimensions, the outermost first. coordinates: this rank's
    place along each, 0 where nothing is said. rank: its number, for the report. about: source, dtype and other
    metadata of a trace.
    """

    def __init__(self, mesh: Mapping[str, int], coordinates: Mapping[str, int], *, rank: int = 0, **about: str) -> None:
        self.mesh, self.coordinates, self.rank, self.about = dict(mesh), dict(coordinates), rank, about
        self.values: dict[str, Any] = {}
        self.placements: dict[str, dict[str, str]] = {}

    @classmethod
    def of(cls, mesh: Any, **about: str) -> "RankTrace":
        """The trace of this rank in a `torch.distributed.device_mesh.DeviceMesh` whose dimensions have names."""
        names = mesh.mesh_dim_names
        if names is None:
            raise InputError("the mesh has no names: init_device_mesh(..., mesh_dim_names=('tp',))")
        sizes = {name: mesh.size(i) for i, name in enumerate(names)}
        at = mesh.get_coordinate()
        return cls(sizes, dict(zip(names, at, strict=True)), rank=mesh.get_rank(), **about)

    def tap(self, name: str, value: Any, **placements: str) -> None:
        """Keeps a value: an array, a tensor, or a DTensor, which says its placements itself. placements: dimension of
        the mesh -> "Shard(axis)", "Partial(sum)" or "Replicate()"."""
        if hasattr(value, "to_local") and hasattr(value, "placements"):
            placements = dict(_of_dtensor(value)) | placements
            value = value.to_local()
        unknown = placements.keys() - self.mesh.keys()
        if unknown:
            raise InputError(f"{name}: placed along {min(unknown)}, which the mesh {self.mesh} does not have")
        self.values[name] = _stored(value)
        placements = {along: str(where) for along, where in placements.items() if str(where) != REPLICATE}
        if placements:
            self.placements[name] = placements

    def save(self, folder: str | Path, input_ids: Any, **placements: str) -> Path:
        """Writes this rank's file into a folder, which is made if need be. input_ids: [B, S], those of this rank where
        placements cut them. Returns its path; raises InputError where it cannot be written."""
        self.tap("input_ids", np.asarray(to_numpy(input_ids)), **placements)
        said = {"mesh": self.mesh, "coordinates": self.coordinates, "placements": self.placements}
        metadata = self.about | {key: json.dumps(value) for key, value in said.items()} | {"rank": str(self.rank)}
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror or error}") from None
        path = path / f"rank-{self.rank:05d}.safetensors"
        write_tensors(path, {name: np.ascontiguousarray(value) for name, value in self.values.items()}, metadata)
        return path


def _of_dtensor(value: Any) -> dict[str, str]:
    names = value.device_mesh.mesh_dim_names
    if names is None:
        raise InputError("the mesh of a DTensor has no names: init_device_mesh(..., mesh_dim_names=('tp',))")
    return {name: _words(where) for name, where in zip(names, value.placements, strict=True)}


def _words(placement: Any) -> str:
    if placement.is_shard():
        return f"Shard({placement.dim})" if type(placement).__name__ == "Shard" else repr(placement)
    return (
        "Partial(sum)"
        if placement.is_partial() and placement.reduce_op == "sum"
        else (REPLICATE if placement.is_replicate() else repr(placement))
    )


def _stored(value: Any) -> np.ndarray:
    """An array in the format that the value has: two bytes of a narrow one."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if value.is_floating_point() and value.element_size() == 2:
        import ml_dtypes
        import torch

        narrow = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}[value.dtype]
        return np.asarray(value.contiguous().view(torch.int16).numpy().view(narrow))
    return np.asarray(value.numpy())
