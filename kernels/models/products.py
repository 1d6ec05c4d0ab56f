"""Matrix products of a fast model. On a GPU they are the library's: cuBLAS on NVIDIA, hipBLASLt on AMD. On a CPU the
fastest of three, measured (`refllm.kernels.models.fastest`):

    torch    torch.nn.functional.linear: MKL's for float32, oneDNN's for bfloat16 and float16
    onednn   oneDNN's in every dtype
    parts    one row alone: a part of the weight for each thread, as a batch of products
"""

import torch
import torch.nn.functional as F

from refllm.kernels.models.fastest import Fastest, step

_TOO_SMALL = 1 << 20
"""Multiplications below which a product is done sooner than it is measured."""
_MEASURED_ROWS = 128


def linear(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: [N, I] -> [N, O]."""
    rows = len(x_NI)
    if x_NI.device.type != "cpu" or rows * weight_OI.numel() < _TOO_SMALL:
        return F.linear(x_NI, weight_OI, bias_O)
    kind = (min(step(rows), _MEASURED_ROWS), *weight_OI.shape, x_NI.dtype, bias_O is None)
    products = one_row if rows == 1 else many_rows
    if kind not in products.chosen:
        products(kind, x_NI[:_MEASURED_ROWS], weight_OI, bias_O)
    return products(kind, x_NI, weight_OI, bias_O)


def _onednn(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """What torch.compile calls for a product on a CPU; AttributeError where Torch was built without it."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return y


def _parts(x_1I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """The product [1, O] for one row: a part of the weight for each thread, as a batch that Torch shares out."""
    threads = torch.get_num_threads()
    if len(weight_OI) % threads:
        return F.linear(x_1I, weight_OI, bias_O)
    y = torch.bmm(weight_OI.unflatten(0, (threads, -1)), x_1I.t().expand(threads, -1, -1)).view(1, -1)
    return y if bias_O is None else y + bias_O


many_rows = Fastest(torch=F.linear, onednn=_onednn)
one_row = Fastest(torch=F.linear, onednn=_onednn, parts=_parts)
