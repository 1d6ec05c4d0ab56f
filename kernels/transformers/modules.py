"""The forward passes that a patch puts in place of those of single modules of a Transformers model.

Each class stands behind one module: it holds the module and the backend, and its `forward` has the signature and the
meaning of the forward that it replaces. Weights stay where they are and are read at every call, so that loading,
moving and casting a patched model works. Submodules are called as modules, so that hooks on them see what they saw
before; only the activation's own module is skipped.

Shapes: B batch, S queries, E hidden size, H and K heads, D head dim, R rotated dims.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refllm.errors import InputError
from refllm.kernels.transformers.operators import call


class Swapped:
    """A module's stand-in: `forward` is set on the module `module` itself, never on its class."""

    def __init__(self, module: Any, backend: str | None) -> None:
        self.module, self.backend = module, backend

    forward: Callable[..., Any]

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """An operator on the patch's backend."""
        return call(name, self.backend, *args, **options)


class RmsNorm(Swapped):
    """Any RMSNorm of Transformers with `weight` and `variance_epsilon`."""

    operator = "rms_norm"

    def forward(self, hidden_states: torch.Tensor, given: Any = None) -> torch.Tensor:
        """given: (x, y) where y is known to be the norm of x; hooks that put another x in its place are heeded."""
        if given is not None and given[0] is hidden_states:
            return given[1]
        return self.call("rms_norm", hidden_states, self.module.weight, self.module.variance_epsilon)

    def after_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of residual + x, residual + x)."""
        return self.call("add_rms_norm", x, residual, self.module.weight, self.module.variance_epsilon)


class LayerNorm(Swapped):
    """`torch.nn.LayerNorm` over one axis, with a weight."""

    operator = "layer_norm"

    def forward(self, input: torch.Tensor, given: Any = None) -> torch.Tensor:
        """What `RmsNorm.forward` computes, or what was computed for this very input already."""
        if given is not None and given[0] is input:
            return given[1]
        return self.call("layer_norm", input, self.module.weight, self.module.bias, self.module.eps)

    def after_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of residual + x, residual + x)."""
        return self.call("add_layer_norm", x, residual, self.module.weight, self.module.bias, self.module.eps)


class Swiglu(Swapped):
    """An MLP down(silu(gate(x)) * up(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, E] -> [B, S, E]"""
        m = self.module
        return m.down_proj(self.call("swiglu", m.gate_proj(x), m.up_proj(x)))


class Relu2(Swapped):
    """An MLP down(relu(up(x))^2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, E] -> [B, S, E]"""
        return self.module.down_proj(self.call("relu2", self.module.up_proj(x)))


class Attention(Swapped):
    """Projections, per-head norm where there is one, rotation, cache, attention, output projection.

    interleaved: whether pairs (2i, 2i+1) are rotated (Helium) or (i, i + R/2).
    fused: the norm before the projections and their weights as one, or None: see `FusedQkv`.
    """

    def __init__(self, module: Any, backend: str | None, *, interleaved: bool, fused: "FusedQkv | None" = None) -> None:
        super().__init__(module, backend)
        self.interleaved, self.fused = interleaved, fused
        self.watchers: list[Callable[..., None]] = []
        """Called with rotated q and k, and v, each [B, heads, S, D]: no module's output shows them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([B, S, E], attention weights or None) for the normed hidden states; not yet normed ones if `fused`."""
        m = self.module
        cos, sin = (_half(table, len(hidden_states)) for table in position_embeddings)
        heads = self._fused_heads if self.fused else self._heads
        q_BHSD, k_BKSD, v_BKSD = heads(hidden_states, cos, sin)
        for watcher in self.watchers:
            watcher(q_BHSD, k_BKSD, v_BKSD)
        if past_key_values is not None:
            k_BKSD, v_BKSD = past_key_values.update(k_BKSD, v_BKSD, m.layer_idx)
        # By name, as the module itself does: set_attn_implementation keeps its meaning on a patched model.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(m.config._attn_implementation, _eager(m))
        dropout = m.attention_dropout if m.training else 0.0
        out, weights = attend(m, q_BHSD, k_BKSD, v_BKSD, attention_mask, dropout=dropout, scaling=m.scaling, **options)
        return m.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def _heads(self, x_BSE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated q and k, and v, each [B, heads, S, D]."""
        m, shape = self.module, (*x_BSE.shape[:-1], -1, self.module.head_dim)
        q_BHSD, k_BKSD, v_BKSD = (p(x_BSE).view(shape).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
        if not getattr(m, "qk_layernorm", False):
            q_BHSD, k_BKSD = self.call("rope", q_BHSD, k_BKSD, cos, sin, interleaved=self.interleaved)
            return q_BHSD, k_BKSD, v_BKSD
        # One small copy per call: views would have to be kept true to weights that others load, move and cast.
        q_weight, k_weight = (torch.stack([n.weight for n in x.norms]) for x in (m.q_layernorm, m.k_layernorm))
        eps, kind = m.q_layernorm.norms[0].eps, {"norm": "layer", "interleaved": self.interleaved}
        q_BHSD, k_BKSD = self.call("norm_rope", q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, eps, **kind)
        return q_BHSD, k_BKSD, v_BKSD

    def _fused_heads(self, x_BSE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.fused is not None
        norm, (weight, bias), D = self.fused.norm, self.fused.parts(), self.module.head_dim
        heads = {
            "num_heads": self.module.q_proj.out_features // D,
            "num_kv_heads": self.module.k_proj.out_features // D,
        }
        eps, options = norm.variance_epsilon, {**heads, "interleaved": self.interleaved}
        return self.call("rms_norm_qkv_rope", x_BSE, norm.weight, weight, bias, cos, sin, eps, **options)


_LAYER_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
"""What a decoder layer takes after the hidden states, in order."""


class Layer(Swapped):
    """A decoder layer x + attention, + MLP, in which the first sum and the norm after it are one operator.

    fused: whether attention norms its own input.
    """

    def __init__(self, module: Any, backend: str | None, norm: RmsNorm | LayerNorm, *, fused: bool = False) -> None:
        super().__init__(module, backend)
        self.norm, self.fused = norm, fused

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """The residual stream [B, S, E] after this layer; every other argument is for attention."""
        m = self.module
        options |= dict(zip(_LAYER_ARGUMENTS, args, strict=False))
        normed = hidden_states if self.fused else m.input_layernorm(hidden_states)
        attended, _ = m.self_attn(hidden_states=normed, **options)
        if attended.dtype == hidden_states.dtype and not self._sum_is_watched(attended):
            normed, total = self.norm.after_sum(attended, hidden_states)
            normed = m.post_attention_layernorm(total, given=(total, normed))
        else:  # under autocast, too: the stream is wider than what is added to it
            total = hidden_states + attended
            normed = m.post_attention_layernorm(total)
        out = m.mlp(normed)
        return total + (m.dropout(out) if hasattr(m, "dropout") else out)

    def _sum_is_watched(self, attended: torch.Tensor) -> bool:
        """Whether a hook may look at the gradient of the sum. As a second result of one operator the sum would have
        what comes back around the norm alone, and not what comes through it."""
        norm = self.module.post_attention_layernorm
        return attended.requires_grad and bool(norm._forward_pre_hooks or norm._forward_hooks)


class FusedQkv:
    """The weights of q_proj, k_proj and v_proj as one matrix, of which they become views: no second copy stays.

    norm: the module whose norm comes before them.
    """

    def __init__(self, attention: Any, norm: Any) -> None:
        self.norm, self.linears = norm, (attention.q_proj, attention.k_proj, attention.v_proj)
        self.weight = self._joined("weight")
        self.bias = None if self.linears[0].bias is None else self._joined("bias")

    def _joined(self, name: str) -> torch.Tensor:
        parts = [getattr(linear, name) for linear in self.linears]
        joined = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = view
        return joined

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [(H + 2K) D, E], bias or None). Raises InputError if the model no longer uses them."""
        if not torch.compiler.is_compiling():
            start = 0
            for linear in self.linears:
                if linear.weight.data_ptr() != self.weight[start:].data_ptr():
                    raise InputError(
                        "refllm.kernels.patch(fuse_qkv=True): the weights of this model were moved, cast or replaced "
                        "afterwards; undo the patch and patch again"
                    )
                start += len(linear.weight)
        weight = self._with_gradients(self.weight, "weight")
        return weight, None if self.bias is None else self._with_gradients(self.bias, "bias")

    def _with_gradients(self, joined: torch.Tensor, name: str) -> torch.Tensor:
        """The matrix as a value whose gradient is handed on to the parameters that are its views."""
        parameters = [getattr(linear, name) for linear in self.linears]
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in parameters):
            return joined
        whole: torch.Tensor = _Whole.apply(joined, *parameters)
        return whole

    def split(self) -> None:
        """Gives every projection storage of its own again."""
        for linear in self.linears:
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter.data = parameter.data.clone()


class _Whole(torch.autograd.Function):
    """A tensor that lies where its parts lie, one after the other."""

    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.rows = [len(part) for part in parts]
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        (gradient,) = incoming
        return (None, *gradient.split(ctx.rows))


class CausalLoss:
    """The loss of a causal language model, in the signature of `transformers.loss.loss_utils.ForCausalLMLoss`."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Mean over the labels that count, each the next token's; or their sum / num_items_in_batch."""
        if shift_labels is None:
            assert labels is not None
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        logits_NV, labels_N = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
        options = {"ignore_index": ignore_index, "reduction": "mean" if num_items_in_batch is None else "sum"}
        loss = call("cross_entropy", self.backend, logits_NV, labels_N, **options)  # float32, whatever the logits are
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def _half(table: torch.Tensor, batch: int) -> torch.Tensor:
    """cos or sin with each angle once: [B, S, R] -> [B, S, R/2]; [1, S, R] -> [S, R/2] where rows share positions."""
    table = table[..., : table.shape[-1] // 2]
    return table[0] if len(table) == 1 != batch else table


def _eager(module: Any) -> Any:
    """What Transformers runs for "eager": a function in the file of the module's class."""
    return sys.modules[type(module).__module__].eager_attention_forward
