"""The tensors of a fast model: read once, rounded to the dtype asked for, and put where they are used.

Projections that read the same input lie under each other in one matrix, so that one product computes them:

    layers.3.self_attn.qkv.weight       [(H + 2K) D, E]    q_proj, then k_proj, then v_proj
    layers.3.mlp.gate_up.weight         [2 F, E]           gate_proj, then up_proj
    layers.3.self_attn.q_layernorm.weight   [H, D]         the per-head norms, one row each

The names of the file remain: they are views of these.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from refllm.storage.load_report import LoadReport
from refllm.storage.weights import Weights

_FUSED = (
    (re.compile(r"(.*self_attn\.)(q|k|v)_proj\.(weight|bias)"), "{0}qkv.{2}"),
    (re.compile(r"(.*mlp\.)(gate|up)_proj\.(weight|bias)"), "{0}gate_up.{2}"),
)
_PER_HEAD = re.compile(r"(.*self_attn\.[qk]_layernorm)\.norms\.(\d+)\.weight")
_ROWS_AT_ONCE = 4096

Progress = Callable[[int, int], None]


class TorchWeights(Mapping[str, torch.Tensor]):
    """Name -> tensor on one device in one dtype; names of the file and of the fused matrices."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], report: LoadReport
    ) -> None:
        self._tensors, self.shapes, self.report = dict(tensors), dict(shapes), report
        self._layers: dict[int, dict[str, torch.Tensor]] = {}

    low_memory = False

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of layer `index` by what follows "layers.{index}."."""
        if index not in self._layers:
            prefix = f"layers.{index}."
            names = [name for name in self._tensors if name.startswith(prefix)]
            self._layers[index] = {name[len(prefix) :]: self._tensors[name] for name in names}
        return self._layers[index]

    def rows(self, name: str, ids: Any) -> torch.Tensor:
        """tensor[ids]: embedding lookup."""
        table = self._tensors[name]
        return table[torch.as_tensor(ids, device=table.device)]

    def resized(self, arrays: Mapping[str, np.ndarray]) -> "TorchWeights":
        """The same tensors but for those that `arrays` has by name, which are in no fused matrix."""
        tensors = dict(self._tensors)
        for name, array in arrays.items():
            old = self._tensors[name]
            new = torch.from_numpy(np.ascontiguousarray(array)).to(old.device, old.dtype)
            tensors |= {other: new for other, tensor in tensors.items() if tensor is old}  # tied ones too
        shapes = {**self.shapes, **{name: array.shape for name, array in arrays.items()}}
        return TorchWeights(tensors, shapes, self.report)

    def as_source(self) -> Weights:
        """The same for `to_device`: float32 arrays, made one at a time."""
        return Weights(self.shapes, {}, source=_Fetched(self._tensors), tied=self.tied, report=self.report)

    @property
    def tied(self) -> dict[str, str]:
        """A tied tensor's name -> the name of the tensor that it is."""
        others = [name for name in self._tensors if name not in self.shapes]
        return {name: of for name in others for of in self.shapes if self._tensors[name] is self._tensors[of]}

    def renamed(self, prefix: str) -> Mapping[str, np.ndarray]:
        """The tensors under the names of a file, as float32 arrays made at each access: for `save_checkpoint`."""
        from refllm.storage.load_report import file_name

        return _AsArrays({file_name(name, prefix): self._tensors[name] for name in self.shapes})


class _AsArrays(Mapping[str, np.ndarray]):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].float().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Fetched:
    """A `Source` of arrays that makes them of tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def fetch(self, name: str, index: Any = None) -> np.ndarray:
        tensor = self._tensors[name]
        return (tensor if index is None else tensor[index]).float().cpu().numpy()

    def reads_parts(self, name: str) -> bool:
        return True


def to_device(
    source: Weights, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> TorchWeights:
    """Every tensor of `source`, which should be one of low memory: then no second copy of the model ever exists.

    A tied tensor is the tensor that it is tied to. progress: called with (numbers done, numbers in all).
    """
    homes, tensors = _homes(source.shapes), {}
    fused: dict[str, torch.Tensor] = {}
    sizes: Counter[str] = Counter()
    for home, _, rows in homes.values():
        sizes[home] += rows
    done, total = 0, sum(int(np.prod(shape)) for shape in source.shapes.values())
    for name, shape in source.shapes.items():
        home, offset, rows = homes[name]
        if home not in fused:
            tail = shape if _PER_HEAD.fullmatch(name) else shape[1:]
            fused[home] = torch.empty((sizes[home], *tail), dtype=dtype, device=device)
        target = fused[home][offset] if _PER_HEAD.fullmatch(name) else fused[home][offset : offset + rows]
        _fill(target, source, name)
        tensors[name] = target
        done += target.numel()
        if progress is not None:
            progress(done, total)
    tensors |= fused
    tied = {target: tensors[name] for target, name in source.tied.items()}
    return TorchWeights(tensors | tied, source.shapes, source.report)


def merged(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices that hold several of these tensors each, as values that are computed of them."""
    parts: dict[str, list[str]] = {}
    for name, (home, _, _) in _homes({name: tuple(tensor.shape) for name, tensor in tensors.items()}).items():
        parts.setdefault(home, []).append(name)
    return {
        home: (torch.stack if _PER_HEAD.fullmatch(names[0]) else torch.cat)([tensors[name] for name in names])
        for home, names in parts.items()
        if names != [home]
    }


def _fill(target: torch.Tensor, source: Weights, name: str) -> None:
    start = 0
    for block in source.chunks(name, _ROWS_AT_ONCE):
        target[start : start + len(block)] = torch.from_numpy(block).to(target.dtype)
        start += len(block)


def _homes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int, int]]:
    """Name -> (the matrix that holds it, its first row there, its rows)."""
    alone = {home for home, count in Counter(map(_home, shapes)).items() if count == 1}
    homes: dict[str, tuple[str, int, int]] = {}
    filled: Counter[str] = Counter()
    for name in sorted(shapes, key=_place):
        home = name if _home(name) in alone and not _PER_HEAD.fullmatch(name) else _home(name)
        rows = 1 if _PER_HEAD.fullmatch(name) else shapes[name][0]
        homes[name] = (home, filled[home], rows)
        filled[home] += rows
    return homes


def _home(name: str) -> str:
    if match := _PER_HEAD.fullmatch(name):
        return f"{match[1]}.weight"
    for pattern, home in _FUSED:
        if match := pattern.fullmatch(name):
            return home.format(*match.groups())
    return name


def _place(name: str) -> tuple[str, int]:
    """Sorts the parts of a matrix as they lie in it: q, k, v; gate, up; head 0, 1, ..."""
    if match := _PER_HEAD.fullmatch(name):
        return _home(name), int(match[2])
    order = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
    for pattern, _ in _FUSED:
        if match := pattern.fullmatch(name):
            return _home(name), order[match[2]]
    return name, 0
