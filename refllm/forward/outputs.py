"""What a call returns: named arrays, readable as attributes, by key or by position, as in Transformers."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from refllm.inputs import as_tensor


@dataclass
class ModelOutput:
    """Fields that the call did not produce are None; `to_tuple`, `keys` and integer indices leave them out.

    loss: a number. logits: [B, S', V] (causal LM), [B, C] (sequence) or [B, S, C] (token classification).
    start_logits, end_logits: [B, S] (question answering). last_hidden_state: [B, S, E] (base).
    past_key_values: the cache. hidden_states: L + 1 arrays [B, S, E]: embeddings, the residual stream after each layer
    but the last, the final norm. attentions: L arrays [B, H, S, T].
    """

    loss: np.floating | None = None
    last_hidden_state: np.ndarray | None = None
    logits: np.ndarray | None = None
    start_logits: np.ndarray | None = None
    end_logits: np.ndarray | None = None
    past_key_values: Any = None
    hidden_states: tuple[np.ndarray, ...] | None = None
    attentions: tuple[np.ndarray, ...] | None = None

    def keys(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def as_tensors(self, dtype: str) -> "ModelOutput":
        """The same as tensors of Torch in `dtype`, which the values lie on the grid of; the loss keeps its own."""
        arrays = {name: as_tensor(getattr(self, name), dtype) for name in self.keys() if name != "loss"}
        return replace(self, **arrays, loss=None if self.loss is None else as_tensor(self.loss))

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self.keys())
