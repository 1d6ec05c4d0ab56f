"""Embeddings that no token has, for what tokens never show: small streams at every norm, and rows of a large mean."""

import numpy as np

from refllm.check.inputs import Inputs
from refllm.forward.model import Model
from refllm.precision import EXACT, rounding

_TOKENS = 8  # in a row
_SCALES = 10.0 ** np.arange(0, -13, -0.5)
_NEAR = 100.0  # times eps: a mean square so small shows an eps that is 10 times too large in any format
_MEAN = 8.0  # of the standard deviations of a row
_NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


def chosen(model: Model, ids: np.ndarray) -> list[Inputs]:
    """The inputs that say something of this model. model: its weights lie on the grid of `model.dtype`. ids: some."""
    rows = np.asarray(model.weights.rows("embed_tokens.weight", ids.ravel()[:_TOKENS]), np.float64)
    found = [_small_at_every_norm(model, rows), _with_a_large_mean(model, rows)]
    return [inputs for inputs in found if inputs is not None]


def _inputs(model: Model, embeds: np.ndarray, label: str) -> Inputs:
    rounded = np.asarray(rounding(model.dtype)(embeds.astype(np.float32)), np.float32)
    return Inputs(np.zeros(embeds.shape[:2], np.int64), embeds=rounded, label=label)


def _with_a_large_mean(model: Model, rows: np.ndarray) -> Inputs | None:
    """What a LayerNorm takes off first: a variance in one pass loses its digits there."""
    if not hasattr(model.config, "layer_norm_eps"):
        return None
    return _inputs(model, rows[None] + _MEAN * rows.std(axis=-1)[:, None], "embeddings with a large mean")


def _small_at_every_norm(model: Model, rows: np.ndarray) -> Inputs | None:
    """A row of tokens for every norm after the first whose stream is small if what goes in is.

    A norm divides by sqrt(mean(x^2) + eps), where no stream of the usual size tells whether eps is right. What is below
    sqrt(eps) it passes on as something small, times 1 / sqrt(eps), and so do the layers as long as they add nothing of
    their own: so every norm in turn has a scale of the embedding. A layer with biases has none.
    """
    embeds = _SCALES[:, None, None] * rows
    squares, eps = _mean_squares(type(model)(model.config, model.weights, EXACT), embeds), _eps(model)
    at = np.abs(np.log(squares / eps)).argmin(axis=1)
    near = squares[np.arange(len(squares)), at] < _NEAR * eps
    scales = np.unique(at[near & (at > 0)])
    return _inputs(model, embeds[scales], "a small stream at every norm") if scales.size else None


def _eps(model: Model) -> float:
    c = model.config
    return float(getattr(c, "layer_norm_eps", None) or c.rms_norm_eps)


def _mean_squares(model: Model, embeds: np.ndarray) -> np.ndarray:
    """The mean square of what each norm after the first reads [norms, N], of rows of tokens [N, S, E]."""
    streams: list[np.ndarray] = []
    normed: list[np.ndarray] = []

    class Recorder:
        """Keeps the last stream before each norm."""

        def wants(self, name: str) -> bool:
            return name.endswith((*_NORMS, "residual_mid")) or name.rpartition(".")[0] == "model.layers"

        def record(self, name: str, value: np.ndarray) -> None:
            if not name.endswith(_NORMS):
                streams.append(np.mean(np.square(value), axis=(1, 2)))
            elif streams:
                normed.append(streams[-1])

    model(inputs_embeds=embeds, use_cache=False, recorder=Recorder())
    return np.maximum(np.stack(normed), np.finfo(float).tiny)
