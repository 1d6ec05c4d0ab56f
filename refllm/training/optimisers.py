"""SGD and AdamW: how gradients move tensors. Arguments and defaults are those of torch.optim.

weights = dict(model.named_parameters())
optimiser = AdamW(weights, lr=1e-3)
loss, gradients = model.gradients(input_ids, labels=input_ids)
optimiser.step(gradients)                                   # changes the arrays of `weights` in place
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from refllm.errors import InputError

State = dict[str, np.ndarray]


class _Optimiser(ABC):
    """What both have: arrays by name, a state for each, and the number of steps that each has taken.

    parameters: name -> float array that may be written to. lr: the learning rate, which may be set between steps.
    Raises InputError for arrays that are not float32 or float64: a narrow model would leave its grid.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray], lr: float) -> None:
        for name, p in parameters.items():
            if not isinstance(p, np.ndarray) or p.dtype.kind != "f" or not p.flags.writeable:
                raise InputError(f"parameters: {name!r} is not a writable array of float32 or float64")
        self.parameters, self.lr = dict(parameters), _above("lr", lr)
        self.state: dict[str, State] = {}
        self.steps: dict[str, int] = {}

    def step(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Moves every tensor that has a gradient, in place; what has none stays as it is, its state too.

        Raises InputError for a gradient of no parameter, or of another shape, before anything is moved.
        """
        for name, gradient in gradients.items():
            if name not in self.parameters:
                raise InputError(f"gradients: {name!r} is none of the parameters that this optimiser was made with")
            if np.shape(gradient) != self.parameters[name].shape:
                expected = self.parameters[name].shape
                raise InputError(f"gradients: {name!r} has shape {np.shape(gradient)}; expected {expected}")
        for name, gradient in gradients.items():
            p = self.parameters[name]
            self.steps[name] = self.steps.get(name, 0) + 1
            self._move(p, np.asarray(gradient, p.dtype), self.state.setdefault(name, {}), self.steps[name])

    @abstractmethod
    def _move(self, p: np.ndarray, g: np.ndarray, state: State, step: int) -> None:
        """Moves p in place. step: 1 for the first."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as arrays, "exp_avg/model.norm.weight" say, and of every tensor its steps."""
        kept = {f"{kind}/{name}": x for name, state in self.state.items() for kind, x in state.items()}
        return kept | {f"steps/{name}": np.array(n) for name, n in self.steps.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state_dict` gave. Raises InputError for the state of a tensor that is not here."""
        self.state, self.steps = {}, {}
        for key, x in state.items():
            kind, _, name = key.partition("/")
            if name not in self.parameters:
                raise InputError(f"state: {name!r} is none of the parameters that this optimiser was made with")
            if kind == "steps":
                self.steps[name] = int(x)
            else:
                self.state.setdefault(name, {})[kind] = np.array(x, self.parameters[name].dtype)

    def load_parameters(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts other numbers into the arrays."""
        for name, array in arrays.items():
            self.parameters[name][...] = array


class SGD(_Optimiser):
    """p <- p - lr d, with d = g + weight_decay p; with momentum d is b, b <- momentum b + (1 - dampening) d, which is
    d itself at first, or with nesterov d + momentum b.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the form of
    torch.optim.SGD, where the learning rate is outside of b.
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(parameters, lr)
        self.momentum, self.dampening = _above("momentum", momentum), dampening
        self.weight_decay, self.nesterov = _above("weight_decay", weight_decay), nesterov
        if nesterov and (momentum == 0 or dampening != 0):
            raise InputError("nesterov=True: momentum must be above 0 and dampening 0")

    def _move(self, p: np.ndarray, g: np.ndarray, state: State, step: int) -> None:
        d = g + self.weight_decay * p
        if self.momentum:
            b = self.momentum * state["momentum"] + (1 - self.dampening) * d if state else d.copy()
            state["momentum"] = b
            d = d + self.momentum * b if self.nesterov else b
        p -= self.lr * d


class AdamW(_Optimiser):
    """p <- (1 - lr weight_decay) p - lr m' / (sqrt(v') + eps), with the running means m <- b1 m + (1 - b1) g and
    v <- b2 v + (1 - b2) g^2, and m' = m / (1 - b1^t), v' = v / (1 - b2^t) at step t, since both begin at 0.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Kingma and Ba 2015,
    "Adam", algorithm 1.
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas={betas}: each must be at least 0 and below 1")
        self.betas, self.eps, self.weight_decay = betas, _above("eps", eps), _above("weight_decay", weight_decay)

    def _move(self, p: np.ndarray, g: np.ndarray, state: State, step: int) -> None:
        b1, b2 = self.betas
        m, v = (state.setdefault(kind, np.zeros_like(p)) for kind in ("exp_avg", "exp_avg_sq"))
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        p *= 1 - self.lr * self.weight_decay
        p -= self.lr * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + self.eps)


def _above(name: str, value: Any) -> float:
    if not value >= 0:
        raise InputError(f"{name}={value!r} must be at least 0")
    return float(value)
