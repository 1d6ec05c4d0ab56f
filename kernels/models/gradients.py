"""The gradients of a fast model: its own pages by Torch's autograd.

The operators of `torch_forms` write into arrays of their own and time several ways, which autograd does not follow; so
on backend="torch" every step is a call that it knows. On backend="triton" the operators are the kernels, forward and
backward. The matrices of merged projections are put together from the tensors of the file, which get the gradients.
"""

import contextlib
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F

from refllm import kernels
from refllm.forward.gradients import EMBEDDINGS, loss_of
from refllm.kernels import plain
from refllm.kernels.models.operators import TorchOperators
from refllm.kernels.models.weights import TorchWeights, merged


class FollowedOperators(TorchOperators):
    """The operators of a backend in steps that autograd follows. Nothing is recorded."""

    def __getattr__(self, name: str) -> Any:
        if self.backend == "torch" and name in plain.EAGER:
            return plain.EAGER[name]
        return super().__getattr__(name)

    def within(self, scope: str) -> "FollowedOperators":
        """These operators: nothing has a name here."""
        return self

    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, in Torch's own way alone."""
        return F.linear(x, weight, bias)

    def rms_norm_qkv_rope(self, *arguments: Any, cache: None, **how: Any) -> Any:
        """The operator without its cache: what is written into one has no gradient."""
        form = plain.EAGER["rms_norm_qkv_rope"] if self.backend == "torch" else kernels.rms_norm_qkv_rope
        return form(*arguments, **how)

    def attention(
        self,
        q_BHSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        causal: bool,
        key_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The kernel, or Torch's own attention on backend="torch" and for a mask of pairs of positions, which no kernel
        takes. A row without a key gives 0, and has a gradient of 0."""
        if self.backend == "triton" and mask is None:
            return kernels.attention(q_BHSD, k_BKTD, v_BKTD, causal=causal, key_mask=key_mask)
        grouped, options = q_BHSD.shape[1] != k_BKTD.shape[1], {"is_causal": causal}
        if key_mask is not None or mask is not None:
            options = {"attn_mask": _who_sees_whom(q_BHSD, k_BKTD.shape[2], causal, key_mask, mask)}
        o_BHSD: torch.Tensor = F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, enable_gqa=grouped, **options)
        return o_BHSD


def _who_sees_whom(
    q_BHSD: torch.Tensor, T: int, causal: bool, key_mask: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """What attention is told: bool, True = attend, or what is added to the scores."""
    S, where = q_BHSD.shape[2], q_BHSD.device
    if mask is not None and mask.is_floating_point():  # stands alone, without causality
        return mask.to(q_BHSD.dtype)
    seen = torch.ones(S, T, dtype=torch.bool, device=where)
    seen = (seen.tril(T - S) if causal else seen)[None, None]
    seen = seen if key_mask is None else seen & key_mask[:, None, None, :]
    return seen if mask is None else seen & mask


class _FollowedWeights(TorchWeights):
    """The tensors of a model as leaves of autograd, and what is merged of them as values that depend on them.

    padding: the row of the embeddings that learns nothing from being looked up, as in Transformers.
    """

    def __init__(self, weights: TorchWeights, leaves: Mapping[str, torch.Tensor], padding: int | None) -> None:
        tied = {name: leaves[of] for name, of in weights.tied.items()}
        super().__init__({**leaves, **merged(leaves), **tied}, weights.shapes, weights.report)
        self._padding = padding

    def rows(self, name: str, ids: Any) -> torch.Tensor:
        """Embedding lookup."""
        table = self[name]
        return F.embedding(torch.as_tensor(ids, device=table.device), table, padding_idx=self._padding)


def loss_and_gradients(
    model: Any,
    given: dict[str, Any],
    wanted: set[str],
    so_far: Mapping[str, Any],
    padding: int | None,
    _: None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, name -> gradient) for those of `wanted` that the loss reads, with the gradients so far added: the
    `Differentiate` of `refllm.forward.gradients` on Torch tensors."""
    leaves = {name: model.weights[name].detach().requires_grad_(name in wanted) for name in model.weights.shapes}
    followed = copy(model)
    followed.rotary = copy(model.rotary)
    followed.follow = lambda _: FollowedOperators(model.backend)
    if model.backend == "torch":  # one table for all heads
        followed.tables = lambda at: [x.unsqueeze(-3) for x in type(model).tables(followed, at)]
    interpreted = model.backend == "triton" and model.device.type == "cpu"
    with torch.enable_grad(), kernels.interpreted() if interpreted else contextlib.nullcontext():
        followed.weights = _FollowedWeights(model.weights, leaves, padding)
        if EMBEDDINGS in wanted:
            embeddings = torch.tensor(given[EMBEDDINGS], dtype=model.torch_dtype, device=model.device)
            given = {**given, EMBEDDINGS: embeddings.requires_grad_()}
            leaves[EMBEDDINGS] = embeddings
        loss = loss_of(followed, given)
        model.rotary = followed.rotary
        asked = [name for name, leaf in leaves.items() if leaf.requires_grad]
        if not loss.requires_grad:
            return loss, {}
        found = torch.autograd.grad(loss, [leaves[name] for name in asked], allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(asked, found, strict=True) if gradient is not None}
    for name in gradients.keys() & so_far.keys():
        gradients[name] = gradients[name] + torch.as_tensor(so_far[name], device=model.device)
    return loss.detach(), gradients
