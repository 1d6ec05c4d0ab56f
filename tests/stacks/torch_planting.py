"""Bugs in torch modules: functions that change a model where its code is not ours to edit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Plant = Callable[[Any], Any]
IDS = [[int(i) for i in torch.randint(4, 600, (48,), generator=torch.Generator().manual_seed(1))]]


def setting(part: str, **values: Any) -> Plant:
    """Sets attributes of a part."""

    def plant(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(model.get_submodule(part), name, value)

    return plant


def weight(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """Changes the first parameter of a part, which may have been another's as well."""

    def plant(model: nn.Module) -> None:
        of = model.get_submodule(part)
        name, parameter = next(of.named_parameters())
        setattr(of, name, nn.Parameter(change(parameter.data).to(parameter.dtype)))

    return plant


def returning(part: str, change: Callable[..., Any]) -> Plant:
    """Changes what a part returns: change(its result, what it was given)."""

    def plant(model: nn.Module) -> None:
        of = model.get_submodule(part)
        forward = of.forward
        of.forward = lambda *args: change(forward(*args), *args)  # type: ignore[method-assign]

    return plant


def rounded_to_int8(table: torch.Tensor) -> torch.Tensor:
    step = table.float().abs().amax(1, keepdim=True) / 127
    return (table.float() / step).round() * step
