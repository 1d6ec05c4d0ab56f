"""Which device a tensor says it is on, where the CPU stands in for a GPU.

Every tensor lives on the CPU, and a mode of Torch hears of every call: `device="cuda"` becomes the CPU, and what was
made without it, or moved back, is remembered as the host's. So `x.device`, `x.is_cuda` and copies between the two are
those of a machine with one GPU, and a launch on a tensor of the host is found, as on a GPU. A result is the host's if
all tensors that it was made of are; whatever was made where no mode hears of it counts as the GPU's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _device as device_contexts

from refllm.kernels.interpreter.errors import KernelError

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")

_host: dict[int, StorageWeakRef] = {}
"""The storages of the host, by their address; a dead one is forgotten when its address is met again, or many are."""
_MANY = 10_000
_depth = 0


@contextlib.contextmanager
def one_gpu() -> Iterator[None]:
    """Within it, tensors say that they are on "cuda" or on the CPU, as on a machine with one GPU."""
    global _depth
    mode = _OneGpu()
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # Torch calls it with the mode off, and it calls the backward functions of a user
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = backward
    _depth += 1
    try:
        with mode:
            yield
    finally:
        _depth -= 1
        torch.autograd._engine_run_backward = engine
        if not _depth:
            _host.clear()


def as_they_are() -> Any:
    """A context in which tensors say where they really are."""
    return torch._C.DisableTorchFunction() if _depth else contextlib.nullcontext()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one that no GPU could reach; False outside of `one_gpu()`. Asked where the mode is off."""
    if not _host or (storage := _storage(tensor)) is None:
        return False
    known = _host.get(storage._cdata)
    if known is not None and known.expired():
        del _host[storage._cdata]
        return False
    return known is not None


def asks_for_gpu(device: Any) -> bool:
    """Whether "cuda", "cuda:0", a torch.device or a number means the GPU. Raises KernelError for a second one."""
    if isinstance(device, torch.device | str):
        kind, _, index = str(device).partition(":")
        if kind != "cuda":
            return False
        device = int(index or 0)
    if not isinstance(device, int) or isinstance(device, bool):
        return False
    if device > 0:
        raise KernelError(f"cuda:{device}: the stand-in for CUDA is one GPU, cuda:0")
    return True


def of_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function whose results are the host's; for one that no mode hears of."""

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = make(*args, **kwargs)
        with as_they_are():
            remember(result)
        return result

    return made


_PRODUCTS = (torch.mm, torch.bmm, torch.addmm, torch.baddbmm)


class _OneGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_DEVICES:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if kwargs.get("out_dtype") is not None and func in _PRODUCTS:
            args, kwargs = _added_up_in(kwargs["out_dtype"], args, kwargs)
        wanted, args, kwargs = _on_the_cpu(func, args, kwargs)
        result = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        if wanted is None:
            on_host = all(map(is_on_host, given))
            for tensor in _tensors(result) if on_host else ():
                remember(tensor)
            return result
        return _moved(result, wanted == HOST, given) if isinstance(result, torch.Tensor) else result


def _added_up_in(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a product whose sums and result have another format than its factors: only a GPU has that, and
    with the factors in that format it is the same product. The host's tensors are left, and Torch refuses them."""
    if all(map(is_on_host, _tensors((args, kwargs)))):
        return args, kwargs

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) else x

    others = {name: x if name == "out" else cast(x) for name, x in kwargs.items() if name != "out_dtype"}
    return tuple(map(cast, args)), others


def _on_the_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """(the device asked for, CUDA or HOST or None; the arguments of the same call for the CPU)."""
    wanted = None
    if func == torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
        wanted = HOST if is_on_host(args[1]) else CUDA
    places = [
        i for i, a in enumerate(args) if isinstance(a, torch.device | str) or (func == torch.Tensor.to and i == 1)
    ]
    for i in places:
        if asks_for_gpu(args[i]):
            wanted, args = CUDA, (*args[:i], HOST, *args[i + 1 :])
        elif str(args[i]) == "cpu":
            wanted = HOST
    device = kwargs.get("device")
    if device is None and func in device_contexts._device_constructors():
        device = device_contexts.CURRENT_DEVICE  # that of torch.set_default_device, which hears of calls after this
    if device is not None:
        if asks_for_gpu(device):
            wanted, kwargs = CUDA, kwargs | {"device": HOST}
        elif str(device) == "cpu":
            wanted = HOST
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    return wanted, args, kwargs


def _moved(result: torch.Tensor, to_host: bool, given: list[torch.Tensor]) -> torch.Tensor:
    """What a call returns that asked for a device: a copy where the result is still memory of the other."""
    storage = _storage(result)
    if storage is None:
        return result
    shared = any(storage._cdata == other._cdata for other in map(_storage, given) if other is not None)
    if shared and is_on_host(result) != to_host:
        result = result.clone()
    if to_host:
        remember(result)
    return result


def remember(tensor: torch.Tensor) -> None:
    """Counts the memory of a tensor as the host's."""
    storage = _storage(tensor)
    if storage is None or storage.device.type != "cpu":
        return
    if len(_host) > _MANY:
        for address in [a for a, known in _host.items() if known.expired()]:
            del _host[address]
    if storage._cdata not in _host or _host[storage._cdata].expired():
        _host[storage._cdata] = StorageWeakRef(storage)


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
        return None


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in arguments or results, of lists, tuples and dicts too."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


# -- what is asked of a tensor -----------------------------------------------------------------------------------------


def _device(tensor: torch.Tensor) -> torch.device:
    real = tensor.device
    return real if real.type != "cpu" or is_on_host(tensor) else CUDA


def _cuda(tensor: torch.Tensor, device: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    asks_for_gpu(device)
    return tensor.clone() if is_on_host(tensor) else tensor


def _cpu(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor if is_on_host(tensor) else _moved(tensor, True, [tensor])


def _type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        name = tensor.type()
        return name.replace("torch.", "torch.cuda.") if _device(tensor).type == "cuda" else name
    on_gpu = isinstance(dtype, str) and dtype.startswith("torch.cuda.")
    result = tensor.type(dtype.replace(".cuda", "") if on_gpu else dtype, *args, **kwargs)
    return _cuda(result) if on_gpu else result


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _device,
    torch.Tensor.is_cuda.__get__: lambda tensor: _device(tensor).type == "cuda",
    torch.Tensor.is_cpu.__get__: lambda tensor: _device(tensor).type == "cpu",
    torch.Tensor.get_device: lambda tensor: 0 if _device(tensor).type == "cuda" else -1,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: lambda tensor, *_, **__: tensor,
}
_ABOUT_DEVICES = (torch.device, torch._C._nn._parse_to)
"""What names a device and puts nothing there."""
