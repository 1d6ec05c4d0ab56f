"""What a page of `refllm.kernels.models.pages` calls: one backend's operators, products, and `tap` to name values.

Where a fusion cannot be used, the steps it would fuse are done one by one, and that is not silent:
`refllm.kernels.fusions` says which and why, and `refllm info` prints it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from refllm import kernels
from refllm.forward.operators import Recorder, Taps
from refllm.kernels.models import products, torch_forms
from refllm.kernels.models.activations import activation

BACKENDS = ("torch", "triton")
_DECODED_AT_ONCE = 8
"""New tokens up to which `decode_attention` is meant: it shares out the keys, `attention` the queries."""

_FEW_ROWS = 8


class TorchOperators(Taps):
    """The operators of one backend, and `tap`.

    backend: "triton" (`refllm.kernels`) or "torch" (`refllm.kernels.models.torch_forms`). scope: what `tap` puts
    before a name.
    """

    def __init__(self, backend: str, recorder: Recorder | None = None, scope: str = "") -> None:
        self.backend, self.recorder, self.scope = backend, recorder, scope
        self._kernels: Any = kernels if backend == "triton" else torch_forms

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in kernels.OPERATORS:
            return getattr(self._kernels, name)
        raise AttributeError(f"there is no operator {name!r}")

    def within(self, scope: str) -> "TorchOperators":
        """The same operators, whose taps are named `scope` + "." + name."""
        return TorchOperators(self.backend, self.recorder, f"{scope}.")

    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b: [..., I] -> [..., O]."""
        # As a matrix: of a part of a batch Torch makes a batched product, for which it copies the weight.
        y = products.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], len(weight))

    def gate_and_up(self, x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The two projections of a gated MLP: one product; two for many rows on a CPU, where a result that is twice as
        wide costs more in fresh memory than the second call."""
        if x.device.type == "cpu" and x.numel() > _FEW_ROWS * x.shape[-1]:
            gate, up = (self.linear(x, w[f"mlp.{n}_proj.weight"], w.get(f"mlp.{n}_proj.bias")) for n in ("gate", "up"))
        else:
            gate, up = self.linear(x, w["mlp.gate_up.weight"], w.get("mlp.gate_up.bias")).chunk(2, dim=-1)
        return gate, up

    @staticmethod
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + y, a step of the residual stream."""
        return x + y

    @staticmethod
    def merged(x_BHSD: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] -> [B, S, H * D]; a view where the heads lie beside each other."""
        return x_BHSD.transpose(1, 2).flatten(2)

    def glu(self, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        """act(gate) * up: the fused operator for SiLU, two steps of Torch for every other activation."""
        if name in ("silu", "swish"):
            return self.swiglu(gate, up)
        return (activation(gate.float(), name) * up.float()).to(up.dtype)

    def activation(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """act(x): the fused operator for relu2, Torch for every other activation."""
        return self.relu2(x) if name == "relu2" else activation(x.float(), name).to(x.dtype)

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
        """Attention under what `refllm.forward.masks.masking` says. A mask of pairs of positions, or recorded weights,
        need it in steps: no kernel takes the one or keeps the other."""
        wanted = self.wanted("self_attn.scores", "self_attn.probs")
        B, _, S, _ = q_BHSD.shape
        T = k_BKTD.shape[2]
        if (
            mask is None
            and not wanted
            and key_mask is None
            and causal
            and self.backend == "triton"
            and S <= _DECODED_AT_ONCE < T
        ):
            lengths_B = torch.full((B,), T, dtype=torch.int32, device=q_BHSD.device)
            return self._kernels.decode_attention(q_BHSD, k_BKTD, v_BKTD, lengths_B)
        if mask is None and not wanted:
            return self._kernels.attention(q_BHSD, k_BKTD, v_BKTD, causal=causal, key_mask=key_mask)
        return self._attention_in_steps(q_BHSD, k_BKTD, v_BKTD, causal, key_mask, mask)

    def _attention_in_steps(
        self,
        q_BHSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        causal: bool,
        key_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The definition, with scores and weights as whole tensors in float32: for masks of pairs and for recording."""
        (S, T), groups = (q_BHSD.shape[2], k_BKTD.shape[2]), q_BHSD.shape[1] // k_BKTD.shape[1]
        k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=1).float() for x in (k_BKTD, v_BKTD))
        s_BHST = q_BHSD.float() @ k_BHTD.transpose(2, 3) * q_BHSD.shape[-1] ** -0.5
        self.tap("self_attn.scores", s_BHST)
        hidden = torch.zeros(1, 1, S, T, dtype=torch.bool, device=s_BHST.device)
        if causal:
            hidden = hidden | ~torch.ones(S, T, dtype=torch.bool, device=s_BHST.device).tril(T - S)
        if key_mask is not None:
            hidden = hidden | ~key_mask[:, None, None, :]
        if mask is not None and mask.dtype == torch.bool:
            hidden = hidden | ~mask
        elif mask is not None:
            s_BHST, hidden = s_BHST + mask, hidden | (mask == -torch.inf)
        s_BHST = s_BHST.masked_fill(hidden, -torch.inf)
        top = s_BHST.amax(dim=-1, keepdim=True)
        e_BHST = torch.exp(s_BHST - top.masked_fill(top == -torch.inf, 0.0))
        total = e_BHST.sum(dim=-1, keepdim=True)
        scale = torch.where(total > 0, 1 / total, 0.0)  # a query with no key to attend to yields 0
        self.tap("self_attn.probs", e_BHST * scale)
        return (e_BHST.to(q_BHSD.dtype).float() @ v_BHTD * scale).to(q_BHSD.dtype)

    # Of the heads.

    def cross_entropy(self, logits: torch.Tensor, labels: Any, **options: Any) -> torch.Tensor:
        """The operator, for labels that come as an array."""
        return self._kernels.cross_entropy(logits, torch.as_tensor(labels, device=logits.device), **options)

    @staticmethod
    def mean_squared_error(x: torch.Tensor, target: Any) -> torch.Tensor:
        """mean (x - target)^2, in float32."""
        return F.mse_loss(x.float(), torch.as_tensor(np.asarray(target), device=x.device).float())

    @staticmethod
    def binary_cross_entropy(logits: torch.Tensor, target: Any) -> torch.Tensor:
        """mean of -y log s(z) - (1 - y) log(1 - s(z)), in float32."""
        y = torch.as_tensor(np.asarray(target), device=logits.device).float()
        return F.binary_cross_entropy_with_logits(logits.float(), y)
