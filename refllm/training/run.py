"""A training run: windows of a text, AdamW, and a folder from which it goes on where it was.

    run = TrainingRun(model, ids, folder, Settings())
    for step, loss in run.steps(500):
        ...                                       # folder/model.safetensors is a checkpoint, loss.svg the curve so far

Step n reads windows that are drawn from the seed and n, so a run that was stopped and goes on is the same run. What it
goes on from, training.npz, holds tensors, optimiser and losses in one file, which is replaced as a whole.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.inputs import to_numpy
from refllm.storage import output_file
from refllm.training.curve import loss_curve
from refllm.training.optimisers import AdamW

STATE, CURVE = "training.npz", "loss.svg"


@dataclass(frozen=True)
class Settings:
    """What decides a run beside model and text. batch: windows per step. context: tokens of a window. lr: learning
    rate. weight_decay: of AdamW. seed: of the windows."""

    batch: int = 8
    context: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0


class TrainingRun:
    """A model that learns a text. losses: of all steps so far, in nats per token.

    model: a causal language model in float32 or float64, whose tensors are changed; one of backend="torch" or "triton"
    is trained by Torch. ids: [N] tokens of the text. folder: where it is kept; what an earlier run of the same settings
    left there is gone on from. Raises InputError for a text shorter than a window, another dtype, and the folder of a
    run with other settings or of another model.
    """

    def __init__(self, model: Any, ids: np.ndarray, folder: Path, settings: Settings) -> None:
        if model.dtype not in ("float32", "float64"):
            raise InputError(f"training: this model is {model.dtype}, too coarse for small steps; load it as float32")
        if settings.context < 2 or settings.batch < 1:
            raise InputError("training: a window needs at least 2 tokens, and a step at least 1 window")
        if len(ids) < settings.context:
            raise InputError(f"training: the text has {len(ids)} tokens, fewer than one window of {settings.context}")
        self.model, self.ids, self.folder, self.settings = model, np.asarray(ids), folder, settings
        self.text = hashlib.sha256(self.ids.astype(np.int64).tobytes()).hexdigest()
        self.optimiser = _adamw(model, settings)
        self.tensors = self.optimiser.parameters
        self.losses: list[float] = []
        self._go_on()

    def windows(self, step: int) -> np.ndarray:
        """The tokens of a step, [batch, context]. step: 0 for the first."""
        s = self.settings
        starts_B = np.random.default_rng([s.seed, step]).integers(0, len(self.ids) - s.context + 1, s.batch)
        return self.ids[starts_B[:, None] + np.arange(s.context)]

    def steps(self, total: int, save_every: int = 100) -> Iterator[tuple[int, float]]:
        """Trains until `total` steps are done, those of earlier runs counted: (steps done, loss) after each.

        The folder is written after every `save_every` steps and at the end. Raises InputError for a loss that is not
        finite; the folder then holds the last good state.
        """
        while len(self.losses) < total:
            ids_BS = self.windows(len(self.losses))
            found, gradients = self.model.gradients(ids_BS, labels=ids_BS)
            loss = float(found)
            if not np.isfinite(loss):
                raise InputError(
                    f"training: the loss of step {len(self.losses) + 1} is {loss}; a smaller --lr than "
                    f"{self.settings.lr:g} may help"
                )
            self.optimiser.step(gradients)
            self.losses.append(loss)
            done = len(self.losses)
            if done % save_every == 0 or done == total:
                self.save()
            yield done, self.losses[-1]

    def save(self) -> None:
        """Writes the checkpoint, the curve and, last, what a later run goes on from."""
        output_file.must_be_folder("--output", self.folder)
        self.model.save_pretrained(self.folder)
        output_file.write("--output", self.folder / CURVE, loss_curve(self.losses))
        arrays = {f"tensor/{name}": to_numpy(x) for name, x in self.tensors.items()}
        arrays |= {f"optimiser/{name}": x for name, x in self.optimiser.state_dict().items()}
        content = io.BytesIO()
        about = np.array(json.dumps({**self._about(), "text": self.text}))
        np.savez(content, allow_pickle=False, losses=np.array(self.losses), about=about, **arrays)
        output_file.write("--output", self.folder / STATE, content.getvalue())

    def _about(self) -> dict[str, Any]:
        """What decides the bits of a run, by the names of the command's options."""
        return {**asdict(self.settings), "backend": _backend(self.model)}

    def _go_on(self) -> None:
        file = self.folder / STATE
        if not file.exists():
            return
        try:
            with np.load(file, allow_pickle=False) as state:
                arrays = dict(state)
            before = {"backend": "numpy", **json.loads(str(arrays.pop("about")))}
            losses = arrays.pop("losses").tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise InputError(f"{file} is no state of a training run; give another folder, or remove it") from None
        for name, value in self._about().items():
            if before.get(name) != value:
                raise InputError(f"{file} is of a run with {name}={before.get(name)}, not {value}; give another folder")
        if before.get("text") != self.text:
            raise InputError(f"{file} is of a run on another text; give another folder")
        tensors = {name.removeprefix("tensor/"): x for name, x in arrays.items() if name.startswith("tensor/")}
        if {name: x.shape for name, x in tensors.items()} != {n: tuple(x.shape) for n, x in self.tensors.items()}:
            raise InputError(f"{file} is of a run with another model; give another folder")
        self.optimiser.load_parameters(tensors)
        kept = {name.removeprefix("optimiser/"): x for name, x in arrays.items() if name.startswith("optimiser/")}
        self.optimiser.load_state_dict(kept)
        self.losses = losses


def _backend(model: Any) -> str:
    return getattr(model, "backend", "numpy")


def _adamw(model: Any, settings: Settings) -> Any:
    """AdamW on the tensors of the model, of its own backend."""
    tensors = dict(model.named_parameters())
    if _backend(model) == "numpy":
        return AdamW(tensors, lr=settings.lr, weight_decay=settings.weight_decay)
    from refllm.kernels.models.optimiser import TorchAdamW

    return TorchAdamW(tensors, lr=settings.lr, weight_decay=settings.weight_decay)
