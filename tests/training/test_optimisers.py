"""The optimisers against those of Torch, in float64, on the same gradients."""

from typing import Any

import numpy as np
import pytest
import torch

from refllm.errors import InputError
from refllm.training.optimisers import SGD, AdamW

WAYS: list[tuple[Any, Any, dict[str, Any]]] = [
    (SGD, torch.optim.SGD, {"lr": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"lr": 0.05, "betas": (0.7, 0.95), "eps": 1e-4, "weight_decay": 0.3}),
    (AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.0}),
]
SHAPES = {"matrix": (4, 3), "vector": (5,), "scalar": (), "seldom": (2, 2)}


@pytest.mark.parametrize(("ours", "theirs", "options"), WAYS)
def test_a_hundred_steps_are_those_of_torch(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """... to 1e-12 of the largest element, at learning rates that change; "seldom" has a gradient every third step.
    Halfway the state is saved and taken over by another optimiser."""
    rng = np.random.default_rng(0)
    arrays = {name: np.array(rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    begun = {name: x.copy() for name, x in arrays.items()}
    mine, other = ours(arrays, **options), theirs(tensors.values(), **options)
    for step in range(100):
        gradients = {name: rng.standard_normal(x.shape) * 10.0 ** rng.integers(-3, 2) for name, x in arrays.items()}
        if step % 3:
            del gradients["seldom"]
        mine.lr = other.param_groups[0]["lr"] = options.get("lr", 1e-3) * (1 + step / 50)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name]) if name in gradients else None
        other.step()
        mine.step(gradients)
        if step == 50:
            state, mine = mine.state_dict(), ours(arrays, **{**options, "lr": 0})
            mine.load_state_dict(state)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        assert np.abs(expected - begun[name]).max() > 1e-2
        assert np.abs(arrays[name] - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max()), name


def test_float32_stays_float32() -> None:
    arrays = {"w": np.ones(3, np.float32)}
    for optimiser in (AdamW(arrays), SGD(arrays, momentum=0.9)):
        optimiser.step({"w": np.ones(3)})
        assert {x.dtype for x in [arrays["w"], *optimiser.state["w"].values()]} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: AdamW(w, lr=-1), "lr=-1 must be at least 0"),
        (lambda w: AdamW(w, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): each must be at least 0 and below 1"),
        (lambda w: SGD(w, nesterov=True), "nesterov=True: momentum must be above 0 and dampening 0"),
        (lambda w: SGD({"w": [1.0]}), "'w' is not a writable array of float32 or float64"),
        (lambda w: SGD(w).step({"x": np.ones(3)}), "gradients: 'x' is none of the parameters"),
        (lambda w: SGD(w).step({"w": np.ones((3, 1))}), r"'w' has shape \(3, 1\); expected \(3,\)"),
        (lambda w: SGD(w).load_state_dict({"momentum/x": np.ones(3)}), "state: 'x' is none of the parameters"),
    ],
)
def test_wrong_use_in_one_sentence(make: Any, said: str) -> None:
    weights = {"w": np.ones(3)}
    with pytest.raises(InputError, match=said):
        make(weights)
    assert weights["w"].tolist() == [1, 1, 1]
