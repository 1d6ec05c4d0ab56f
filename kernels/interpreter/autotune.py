"""Autotuned kernels without a GPU to time them on: the first configuration runs, or each of them, compared."""

import contextlib
from typing import Any

import torch

from refllm.kernels.interpreter.errors import ConfigurationsDifferError, KernelError, StaticAssertionError

_ROUNDINGS = 2
"""Configurations may differ by so many roundings of the format, at the largest number of a row."""


def run(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], every: bool) -> Any:
    """What Autotuner.run does, without timing.

    every: run each distinct configuration on copies of all tensors first. Raises KernelError if two of them disagree
    by more than roundings explain.
    """
    __tracebackhide__ = True
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    try:
        configs = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
        if every:
            configs = _compare(tuner, _distinct(configs), args, kwargs)
        for config in configs:
            with contextlib.suppress(StaticAssertionError):
                tuner.best_config = config
                return _run_one(tuner, config, args, kwargs)
        raise _none_compiles(tuner)
    finally:
        tuner.nargs = None


def _run_one(tuner: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    if config.pre_hook is not None:
        names = dict(zip(tuner.arg_names, args, strict=False))
        config.pre_hook({**names, **kwargs, **config.all_kwargs()})
    return tuner.fn.run(*args, **kwargs, **config.all_kwargs())


def _distinct(configs: list[Any]) -> list[Any]:
    """Configurations that differ in more than warps and stages, which do not exist here."""
    return list({str(sorted(c.kwargs.items(), key=str)): c for c in reversed(configs)}.values())[::-1]


def _none_compiles(tuner: Any) -> KernelError:
    return KernelError(f"{tuner.base_fn.__name__}: in each of its configurations a tl.static_assert fails")


def _compare(tuner: Any, configs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The configurations that compile. One whose tl.static_assert fails is left out, as the autotuner leaves it out."""
    __tracebackhide__ = True
    first: dict[str, torch.Tensor] = {}
    usable: list[Any] = []
    for config in configs:
        copies = _Copies()
        own_args = tuple(copies.of(a) for a in args)
        own_kwargs = {k: copies.of(v) for k, v in kwargs.items()}
        try:
            _run_one(tuner, config, own_args, own_kwargs)
        except StaticAssertionError:
            continue
        usable.append(config)
        named = {**dict(zip(tuner.arg_names, own_args, strict=False)), **own_kwargs}
        results = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
        if not first:
            first = results
        for name, result in results.items():
            try:
                _must_agree(result, first[name])
            except AssertionError as error:
                reason = " ".join(str(error).split())
                raise ConfigurationsDifferError(
                    f"{tuner.base_fn.__name__}: `{name}` differs between the configurations {usable[0]} and {config}: "
                    f"{reason}"
                ) from None
    if not usable:
        raise _none_compiles(tuner)
    return usable


def _must_agree(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raises AssertionError for what is no rounding: of sums in another order, of weights that another maximum scales.
    Such an error is small beside the largest number of a row, not beside each."""
    try:
        torch.testing.assert_close(a, b, equal_nan=True)
    except AssertionError:
        if a.shape != b.shape or a.dtype != b.dtype or not b.is_floating_point() or not b.ndim:
            raise
        size = b.float().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
        near = (a.float() - b.float()).abs() <= _ROUNDINGS * torch.finfo(b.dtype).eps * size
        if not bool((near | (a == b) | (a.isnan() & b.isnan())).all()):
            raise


class _Copies:
    """Copies of tensors that share storage where the originals do."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.clone()
        copy = torch.empty(0, dtype=value.dtype)
        copy.set_(self.storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())
        return copy
