"""What every gradient is, by its name: "grad:" and the name of a value (`refllm.forward.taps`) or of a tensor.

The gradient of a value is the sum over all that read it; the formula says which operators those are.
"""

from collections.abc import Iterable

GRADIENT = "grad:"
"""What stands before the name of a value, or of a tensor, in that of its gradient."""

Definition = tuple[str, str, str]
"""text, operator, convention"""

_PARAMETERS = (".weight", ".bias")


def is_gradient(name: str) -> bool:
    """Whether it is the name of a gradient."""
    return name.startswith(GRADIENT)


def of_tensor(name: str) -> bool:
    """Whether it is the gradient of a tensor of the checkpoint, and not of a value."""
    return is_gradient(name) and name.endswith(_PARAMETERS)


def in_reverse(names: Iterable[str]) -> list[str]:
    """The names of gradients in the order in which a backward pass has them: `names` has those of values in that order,
    and those of tensors anywhere; each comes after that of its module's result."""
    names = list(names)
    values = [name for name in names if not of_tensor(name)]
    behind: dict[str, list[str]] = {}
    for name in names:
        if of_tensor(name):
            behind.setdefault(_module(name, values), []).append(name)
    ordered = [one for name in values for one in (name, *sorted(behind.pop(name, [])))]
    return ordered + [name for rest in behind.values() for name in rest]


def _module(name: str, values: list[str]) -> str:
    """The value that the tensor's module makes: the longest name that its own begins with."""
    path = name.rpartition(".")[0]
    while path and path not in values:
        path = path.rpartition(".")[0]
    return path


def definition(suffix: str, norm: str, gated: bool = True) -> Definition:
    """The formula of a gradient by its name within a layer, "grad:" taken off. norm: "rms_norm" or "layer_norm".
    gated: whether the MLP has a gate."""
    last = suffix.rpartition(".")[2]
    if last in ("weight", "bias"):
        return _of_tensor(suffix, last, norm)
    if last in ("lm_head", "score", "qa_outputs"):
        return "dz = (softmax(z) - onehot) dloss / n", "cross_entropy_backward", "of the logits of every position"
    if last in ("q_rope", "k_rope"):
        return _ATTENTION[last[0]], "attention_backward", "of the rotated heads; scaled scores are inside"
    if last == "v_proj":
        return "dv = p^T do", "attention_backward", "heads side by side; summed over the query heads of a group"
    if last in ("q_proj", "k_proj", "q_layernorm", "k_layernorm", "q_norm", "k_norm"):
        return (
            "(da, db) -> (da cos + db sin, db cos - da sin)",
            "rope_backward",
            (
                "turned back; where heads are normed, through that norm as well"
                if last.endswith("_proj")
                else "turned back"
            ),
        )
    if last == "context":
        return "do = dy W_o", "linear_backward", "[B, H, S, D], of weights times values"
    if last in ("gate_proj", "up_proj"):
        text = "dg = dh u act'(g)" if last == "gate_proj" else "du = dh act(g)" if gated else "du = dh act'(u)"
        kind = "glu_backward" if gated else "activation_backward"
        return text, kind, "of the projection before the activation"
    if last == "act":
        return "dh = dy W_d", "linear_backward", "of what down_proj receives"
    if last in ("o_proj", "down_proj"):
        return "dy = dx", "add_backward", "the gradient of the residual stream, handed on as it is"
    if last == "norm":
        return "dx = dz W", "linear_backward", "of the final norm's result"
    if last.endswith("layernorm"):
        return "dx = sum of dy W over the projections that read it", "linear_backward", "rounded after every addition"
    text = "dx = dx_next + r (g - n mean(g n)), g = w dy, n = r x"
    if norm == "layer_norm":
        text = "dx = dx_next + r (g - mean(g) - n mean(g n)), g = w dy, n = r (x - mean(x))"
    return text, f"{norm}_backward", "of the residual stream: what the norm that reads it gives back, and the sum's own"


_ATTENTION = {
    "q": "dq = scale ds k,  ds = p (dp - sum p dp),  dp = do v^T",
    "k": "dk = scale ds^T q, summed over the group",
}


def _of_tensor(suffix: str, last: str, norm: str) -> Definition:
    if "embed_tokens" in suffix:
        return (
            "dE[t] = sum of dx where the token is t",
            "embedding_backward",
            ("where the head's weight is the table, the sum of both uses"),
        )
    if "norm" in suffix:
        text = "dw = sum of dy n over the rows" if last == "weight" else "db = sum of dy over the rows"
        return text, f"{norm}_backward", "summed over all positions of the batch"
    text = "dW = dy^T x" if last == "weight" else "db = sum of dy over the rows"
    return text, "linear_backward", "summed over all positions of the batch, and over micro-batches"
