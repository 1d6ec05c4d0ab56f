"""The faults of docs/findings.md, each on its smallest call: what the released kernel gives, and what is right.

    REFLLM_CHECKOUTS=~/checkouts python tests/released/reproduced.py              # those whose libraries are there
    REFLLM_CHECKOUTS=~/checkouts python tests/released/reproduced.py liger_rope

What is right is computed in float64 by `in_float64.py`. Exit code 1 if one of them is no longer wrong.
"""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from in_float64 import far_off, right
from wrapping import CHECKOUTS, answer_for_a_gpu, checkout

from refllm.kernels import interpreted

Shown = tuple[str, torch.Tensor, torch.Tensor]
"""What it is, what the kernel gives, and what is right."""
FAULTS: list[Callable[[], Iterator[Shown]]] = []


def fault(function: Callable[[], Iterator[Shown]]) -> Callable[[], Iterator[Shown]]:
    """Enters the function below."""
    FAULTS.append(function)
    return function


@fault
def liger_rope() -> Iterator[Shown]:
    """Liger-Kernel: contiguous [B, H, 1, D] and more than one row. Transposed it still counts as contiguous, and the
    stride of its axis of length 1, a head, is taken for that of a row: row 1 is written into row 0."""
    import of_liger

    q, k = (torch.linspace(1, 2, 2 * n * 4).view(2, n, 1, 4) for n in (2, 1))
    tables = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    with interpreted(races=False):
        got = of_liger.rope(q, k, *tables, interleaved=False)
    yield "q, row 1", got[0][1], right("rope", [q, k, *tables], {"interleaved": False})[0][1]


@fault
def flash_attention_labels() -> Iterator[Shown]:
    """flash-attention: labels with a stride, such as a column of a matrix. They are read as dense ones."""
    import of_flash_attention

    logits = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    labels = torch.tensor([[1, 0], [1, 0]])[:, 0]
    with interpreted():
        got = of_flash_attention.cross_entropy(logits, labels, reduction="none")
    yield "loss of each row", got, right("cross_entropy", [logits, labels], {"reduction": "none"})[0]


@fault
def sglang_scores() -> Iterator[Shown]:
    """SGLang: one token against a cache, as many key heads as query heads. The products q k are rounded to bfloat16
    before they are summed in float32. Two keys with the same score: of one every product lies between two numbers."""
    import of_sglang

    q, k, v = torch.full((1, 1, 1, 64), 8.0625), torch.full((1, 1, 2, 64), 1.5), torch.zeros(1, 1, 2, 64)
    k[..., 1, :32], k[..., 1, 32:], v[..., 0, :] = 1.0, 2.0, 1.0
    given = [q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.tensor([2])]
    with interpreted():
        got = of_sglang.decode_attention(*given)
    yield "the mean of the two values", got[0, 0], right("decode_attention", given, {})[0][0, 0]


@fault
def triton_tutorial() -> Iterator[Shown]:
    """Triton's tutorial 06: without a causal mask its autotuner may take blocks of more keys than there are. Keys past
    the end count: they are those of the next head, or nobody's."""
    import of_tutorials

    q, k, v = (torch.full((1, 2, 64, 128), value, dtype=torch.float16) for value in (0.0, 1.0, 1.0))
    v[:, 1] = 3.0
    tuner = of_tutorials.fused._attn_fwd
    tuner.configs = [c for c in tuner.configs if (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]) == (64, 128)]
    with interpreted():
        got = of_tutorials.attention(q, k, v, causal=False)
    yield "head 0, whose values are all 1", got[0, 0, 0], torch.ones(128, dtype=torch.float64)


@fault
def flag_gems_backward() -> Iterator[Shown]:
    """FlagGems 3.0, commit 532ff438c: a gradient that is one number with strides of 0, as that of a sum. The backward
    pass of rms_norm reads it as a dense array, past its end. Version 5.0.2 copies it first, and is right."""
    os.environ.setdefault("GEMS_VENDOR", "nvidia")
    checkout("FlagGems/src")
    import flag_gems

    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, -1.0, 0.5]], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    with interpreted():
        flag_gems.rms_norm(x, (4,), weight, 1e-6).backward(torch.arange(1.0, 9.0)[0].expand(2, 4))
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    (x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight64).sum().backward()
    yield "gradient of the weight", weight.grad, weight64.grad


@fault
def flag_gems_loss() -> Iterator[Shown]:
    """FlagGems 5.0.2: cross entropy of a row whose logits are all far below 0. The largest logit is looked for from 0
    on, so that every exponential underflows."""
    import of_flag_gems

    logits, labels = torch.tensor([[-200.0, -201.0]]), torch.tensor([0])
    with interpreted():
        got = of_flag_gems.cross_entropy(logits, labels)
    yield "loss", got, right("cross_entropy", [logits, labels], {})[0]


def _twice(function: Callable[..., torch.Tensor], given: list[torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
    """The gradient of `asked` at the second backward pass through one graph, which was kept."""
    with interpreted():
        out = function(*given)
        torch.autograd.grad(out, asked, torch.ones_like(out), retain_graph=True)
        return torch.autograd.grad(out, asked, torch.ones_like(out))[0]


@fault
def liger_swiglu_twice() -> Iterator[Shown]:
    """Liger-Kernel: a second backward pass through SwiGLU. The first one wrote its gradients over gate and up, which
    autograd had kept, and it does not notice."""
    import of_liger

    gate, up = (torch.tensor([[1.0, -0.5, 2.0, 0.25]]) * n for n in (1, 2))
    gate.requires_grad_()
    wide = gate.detach().double().requires_grad_()
    right_one = torch.autograd.grad((wide * torch.sigmoid(wide) * up.double()).sum(), wide)[0]
    yield "gradient of gate, the second time", _twice(of_liger.swiglu, [gate, up], gate), right_one


@fault
def liger_loss_twice() -> Iterator[Shown]:
    """Liger-Kernel: a second backward pass through cross entropy whose incoming gradient is 2. The gradient that the
    forward pass kept is scaled where it lies, and so twice."""
    import of_liger

    logits, labels = torch.tensor([[0.0, 1.0], [2.0, 0.0]], requires_grad=True), torch.tensor([0, 1])

    def doubled(logits: torch.Tensor) -> torch.Tensor:
        return 2 * of_liger.cross_entropy(logits, labels)

    wide = logits.detach().double().requires_grad_()
    right_one = torch.autograd.grad(2 * right("cross_entropy", [wide, labels], {})[0], wide)[0]
    yield "gradient of the logits, the second time", _twice(doubled, [logits], logits), right_one


@fault
def fla_loss_twice() -> Iterator[Shown]:
    """flash-linear-attention: the same of the loss that makes its logits itself."""
    import of_fla

    x, weight = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1])

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * of_fla.linear_cross_entropy(x, weight, labels)

    wide = x.detach().double().requires_grad_()
    loss = right("linear_cross_entropy", [wide, weight, labels], {})[0]
    yield "gradient of x, the second time", _twice(doubled, [x], x), torch.autograd.grad(2 * loss, wide)[0]


@fault
def liger_rope_incoming() -> Iterator[Shown]:
    """Liger-Kernel: the backward pass of rope turns the gradient that came in where it lies; another function that was
    handed the same one gets it turned."""
    import of_liger

    q, k = (torch.linspace(-1, 1, 8).view(1, 1, 2, 4).requires_grad_() for _ in range(2))
    tables = torch.tensor([[0.6, 0.8]] * 2), torch.tensor([[0.8, 0.6]] * 2)
    incoming = [torch.arange(8.0).view(1, 1, 2, 4) for _ in range(2)]
    with interpreted(races=False):
        torch.autograd.grad(of_liger.rope(q, k, *tables, interleaved=False), (q, k), incoming)
    yield "the gradient that came in, afterwards", incoming[0], torch.arange(8.0, dtype=torch.float64).view(1, 1, 2, 4)


@fault
def flash_attention_label_gradients() -> Iterator[Shown]:
    """flash-attention: the gradient of cross entropy whose labels have a stride. They are read as dense ones."""
    import of_flash_attention

    logits = torch.tensor([[0.0, 4.0], [0.0, 4.0]], requires_grad=True)
    labels = torch.tensor([[1, 0], [1, 0]])[:, 0]
    with interpreted():
        got = torch.autograd.grad(of_flash_attention.cross_entropy(logits, labels, reduction="sum"), logits)[0]
    wide = logits.detach().double().requires_grad_()
    loss = right("cross_entropy", [wide, labels], {"reduction": "sum"})[0]
    yield "gradient of the logits", got, torch.autograd.grad(loss, wide)[0]


def _by_a_column(rms_norm: Callable[..., torch.Tensor]) -> Iterator[Shown]:
    x, weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 9.0]] * 4)[:, 0]
    with interpreted():
        got = rms_norm(x, weight, 1e-6)
    yield "y", got, right("rms_norm", [x, weight, 1e-6], {})[0]


@fault
def lightllm_weight() -> Iterator[Shown]:
    """LightLLM: a weight with a stride. It is read as a dense one."""
    import of_lightllm

    yield from _by_a_column(of_lightllm.rms_norm)


@fault
def unsloth_weight() -> Iterator[Shown]:
    """Unsloth: the same."""
    import of_unsloth

    yield from _by_a_column(of_unsloth.rms_norm)


def main() -> int:
    """The command; see the module docstring."""
    answer_for_a_gpu()
    torch.set_printoptions(precision=4, linewidth=110, threshold=16, edgeitems=4)
    healed = False
    for one in FAULTS:
        if sys.argv[1:] and one.__name__ not in sys.argv[1:]:
            continue
        print(f"{one.__name__}: {one.__doc__}")
        try:
            for what, got, wanted in one():
                off, _ = far_off(got.detach(), wanted, got.dtype)
                print(f"    {what}: {got.detach().flatten().float()}\n    is right: {wanted.flatten().float()}")
                print(f"    off by up to {off:.3g} units in the last place of {got.dtype}")
                healed |= off < 2
        except ImportError as error:
            print(f"    not tried: {error} ({CHECKOUTS})")
    return int(healed)


if __name__ == "__main__":
    sys.exit(main())
