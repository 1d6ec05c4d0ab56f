"""One step of decoding with nothing in it that Python decides: a CUDA graph can repeat it.

The ordinary call prepares positions, masks and views of the cache on the host, in every step, and starts each kernel by
itself: at batch 1 that takes longer than the kernels. Here the token ids, the rotary tables and the lengths of the
cache are read from tensors that stay where they are, so that the whole step is recorded once and started as one.

Used by `FastModel` for one new token per row, no padding, on a GPU. Without a GPU the same step runs unrecorded
(`DecodeStep.forward`), which is how it is tested.
"""

from typing import Any

import numpy as np
import torch

from refllm.kernels.models import pages
from refllm.kernels.models.cache import SlotLayer, TorchCache

_WARM_UP = 3
"""Runs before the recording, in which kernels are compiled and libraries allocate. Source: PyTorch, "CUDA Graphs"."""


class DecodeStep:
    """A step for one model and one cache, valid while the cache's tensors stay in place (`fits`).

    It holds those tensors, but not the cache: whoever drops the cache can drop the step with it. Raises InputError if
    the cache has no free slot.
    """

    def __init__(self, model: Any, cache: TorchCache) -> None:
        self._model = model
        layers = [cache.layer(i) for i in range(model.config.num_hidden_layers)]
        slots = [layer.room(layer.keys, 1) for layer in layers]
        B = slots[0][0].shape[0]
        device, half = model.device, model.config.rotary_dim // 2
        self._ids_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._before_B = torch.zeros(B, dtype=torch.int32, device=device)
        self._after_B = torch.zeros_like(self._before_B)
        self._cos, self._sin = (torch.zeros(B, 1, half, dtype=model.torch_dtype, device=device) for _ in range(2))
        self._layers = [SlotLayer(keys, values, self._before_B, self._after_B) for keys, values in slots]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def fits(self, cache: TorchCache) -> bool:
        """Whether this step writes into the tensors that `cache` has now, and a slot is free."""
        return all(cache.layer(i).holds(layer.keys, layer.values) for i, layer in enumerate(self._layers))

    def run(self, cache: TorchCache, ids_B1: np.ndarray, positions_B1: np.ndarray) -> torch.Tensor:
        """Logits [B, 1, V] of one more token per row, which the cache (one that this step `fits`) then holds."""
        self._ids_B1.copy_(torch.from_numpy(ids_B1))
        length = cache.get_seq_length()
        self._before_B.fill_(length)
        self._after_B.fill_(length + 1)
        for buffer, table in zip((self._cos, self._sin), self._model.tables(positions_B1), strict=True):
            buffer.copy_(table)
        if self._model.device.type == "cuda":
            if self._graph is None:
                self._record()
            assert self._graph is not None
            self._graph.replay()
        else:
            self._logits = self.forward()
        for i in range(len(self._layers)):
            cache.layer(i).length += 1
        return self._logits.clone()

    def forward(self) -> torch.Tensor:
        """The step itself, on what the buffers hold. Repeating it changes nothing: it writes the same slot."""
        model = self._model
        op = model.plain_operators()
        x_BSE = model.weights["embed_tokens.weight"][self._ids_B1]
        x_BSE = pages.forward(op, model.config, model.weights, x_BSE, self._cos, self._sin, {}, self)
        return model.heads.causal_lm(op, model.config, model.weights, x_BSE)

    def layer(self, index: int) -> SlotLayer:
        """The cache of one layer, as a page asks for it."""
        return self._layers[index]

    def _record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.forward()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self.forward()
