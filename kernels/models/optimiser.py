"""AdamW on the tensors of a fast model: torch.optim's, with the methods of `refllm.training.optimisers.AdamW`."""

from collections.abc import Mapping

import numpy as np
import torch

from refllm.inputs import to_numpy

_MEANS = ("exp_avg", "exp_avg_sq")


class TorchAdamW:
    """torch.optim.AdamW on named tensors, whose state is kept under the names that the one in NumPy gives it.

    parameters: name -> tensor, which is changed in place.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], lr: float, weight_decay: float) -> None:
        self.parameters = dict(parameters)
        self._adamw = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=weight_decay)

    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Moves every tensor that has a gradient; what has none stays as it is, its state too."""
        for name, tensor in self.parameters.items():
            tensor.grad = gradients.get(name)
        self._adamw.step()
        self._adamw.zero_grad()

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays, "exp_avg/model.norm.weight" say, and of every tensor its steps."""
        states = {name: self._adamw.state[tensor] for name, tensor in self.parameters.items()}
        kept = {f"{kind}/{name}": to_numpy(state[kind]) for name, state in states.items() if state for kind in _MEANS}
        return kept | {f"steps/{name}": np.array(int(state["step"])) for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state_dict` gave."""
        for name, tensor in self.parameters.items():
            if f"steps/{name}" in state:
                means = {kind: torch.from_numpy(state[f"{kind}/{name}"]).to(tensor) for kind in _MEANS}
                self._adamw.state[tensor] = {"step": torch.tensor(float(state[f"steps/{name}"])), **means}

    def load_parameters(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts other numbers into the tensors."""
        for name, array in arrays.items():
            self.parameters[name].copy_(torch.from_numpy(array))
