"""`refllm score`: how likely a model finds a text.

    nll_t = -log p(token_t | tokens before it)          nats
    perplexity = exp(mean nll)        bits per byte = sum nll / (ln 2 * bytes of the text)

The first token has nothing before it and is not scored (where a tokenizer begins with a beginning-of-text token, that
is the one). A text longer than the context is cut into windows that overlap: each token is scored once, by the window
that gives it the most context, at least context - stride tokens.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.storage.weights import free_memory

Step = Callable[..., None]

# Longer windows cost time with the square of their length; what they add to the prediction is small.
DEFAULT_CONTEXT = 4096
# Tokens of logits held at a time: at a vocabulary of 128,000 this is 130 MB of float32.
CHUNK = 256
# RoPE whose angles depend on the length of the call: cutting a window into chunks would change the model.
WHOLE_WINDOW_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Score:
    """ids: [S]. nll: [S - 1], of tokens 1 .. S-1 in nats. pieces: the tokens as text. bytes: of the text, if known."""

    ids: np.ndarray
    nll: np.ndarray
    pieces: list[str] | None
    bytes: int | None

    @property
    def log_likelihood(self) -> float:
        """Sum over the scored tokens, in nats."""
        return -float(self.nll.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean()))

    @property
    def bits_per_byte(self) -> float | None:
        """None where the text is not known (token ids were given)."""
        return float(self.nll.sum() / (np.log(2.0) * self.bytes)) if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tokens": len(self.ids),
            "scored": len(self.nll),
            "log_likelihood": self.log_likelihood,
            "mean_nll": float(self.nll.mean()),
            "perplexity": self.perplexity,
            "bytes": self.bytes,
            "bits_per_byte": self.bits_per_byte,
            "ids": self.ids,
            "nll": self.nll,
            "pieces": self.pieces,
        }


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, stop) of each window: together they score tokens 1 .. tokens-1, each once.

    Every window but the first begins `context - stride` tokens before the first token that it scores.
    """
    scored, start = 1, 0
    while scored < tokens:
        stop = min(start + context, tokens)
        yield start, scored, stop
        scored = stop
        start = max(stop - (context - stride), 0)


def score_tokens(model: Any, ids: np.ndarray, *, context: int, stride: int, step: Step = lambda *_: None) -> np.ndarray:
    """Negative log-likelihoods [S - 1] (float64, nats) of ids [S].

    Raises InputError for fewer than two tokens, a context below 2, or a stride outside 1 .. context - 1.
    """
    if len(ids) < 2:
        raise InputError(f"scoring needs at least 2 tokens, found {len(ids)}: the first one has nothing before it")
    _check_windows(context, stride)
    nll = np.full(len(ids) - 1, np.nan)
    step("scoring", 0, len(ids))
    for start, first, stop in windows(len(ids), context, stride):
        for position, logits in _window_logits(model, ids[start:stop]):
            # The logits at `position` are of the token after it.
            targets = np.arange(start + position + 1, start + position + 1 + len(logits))
            wanted = (targets >= first) & (targets < stop)
            nll[targets[wanted] - 1] = negative_log_likelihood(logits[wanted], ids[targets[wanted]])
            step("scoring", int(targets[-1]), len(ids))
    return nll


def _check_windows(context: int, stride: int) -> None:
    if context < 2:
        raise InputError(f"--context {context} leaves nothing to score: it must be at least 2")
    if not 1 <= stride < context:
        raise InputError(f"--stride {stride} must be in 1..{context - 1}, below the context of {context}")


def negative_log_likelihood(logits_NV: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] per row, in float64: logsumexp(logits) - logits[label]."""
    logits = np.asarray(logits_NV, dtype=np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    log_sum = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=-1))
    return np.asarray(log_sum - logits[np.arange(len(logits)), labels_N])


def _window_logits(model: Any, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(position, logits [n, V]) of consecutive parts of one window, through the cache where that changes nothing."""
    whole = model.config.rope_parameters["rope_type"] in WHOLE_WINDOW_ROPE
    size, cache = (len(ids) if whole else CHUNK), None
    for position in range(0, len(ids), size):
        chunk = ids[None, position : position + size]
        out = model(input_ids=chunk, past_key_values=cache, use_cache=not whole)
        cache = out.past_key_values
        yield position, np.asarray(out.logits[0])


def score_source(
    folder: Path,
    tokens: dict[str, Any],
    how: dict[str, Any],
    *,
    file: Path | None,
    context: int | None,
    stride: int | None,
    step: Step,
) -> Score:
    """Scores the one source that is given. Raises InputError if none or several are, and for what they hold.

    tokens: as `read_tokens` takes them (prompt, ids, ids_file). how: what `refllm.load` is told beside the head.
    """
    import refllm
    from refllm.text.token_input import TEXT_LIMIT, read_text, read_tokens

    if file is not None and any(value is not None for value in tokens.values()):
        raise InputError("--file excludes --prompt, --ids and --ids-file: give one of them")
    text = read_text(file, TEXT_LIMIT) if file is not None else tokens["prompt"]
    config = refllm.AutoConfig.from_pretrained(folder)
    context = min(config.max_position_embeddings, DEFAULT_CONTEXT) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    _check_windows(context, stride)
    with warnings.catch_warnings():
        # The tokenizer warns of a text longer than the model's context; windows are the answer to that.
        warnings.filterwarnings("ignore", message=".*model_max_length")
        ids_1S = read_tokens(folder, config.vocab_size, **tokens | {"prompt": text})
    if ids_1S is None:
        raise InputError("nothing to score: give --prompt, --ids, --ids-file or --file")
    step("loading")
    model = refllm.load(folder, head="causal_lm", **how | {"low_memory": how["low_memory"] or not fits(config, how)})
    nll = score_tokens(model, ids_1S[0], context=context, stride=stride, step=step)
    pieces = None
    if text is not None:
        tokenizer = refllm.AutoTokenizer.from_pretrained(folder)
        pieces = [tokenizer.decode([int(token)]) for token in ids_1S[0]]
    return Score(ids_1S[0], nll, pieces, len(text.encode()) if text is not None else None)


def fits(config: Any, how: dict[str, Any]) -> bool:
    """Whether the float32 weights of the NumPy backend fit into the memory that is free, and need not be read layer by
    layer, which takes longer. Those of another backend lie on a device."""
    from refllm.models.auto import model_class

    numbers = sum(math.prod(shape) for shape in model_class(config, "causal_lm").tensors(config).values())
    return how["backend"] != "numpy" or 4 * numbers < free_memory()


def show_score(score: Score, most: int = 40) -> Any:
    """The figures, then a line per token; of a long text the tokens that surprised the model most."""
    from rich.console import Group
    from rich.text import Text

    from refllm.terminal.fitted_table import Table

    figures = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    figures.add_row("tokens scored", f"{len(score.nll)} of {len(score.ids)}")
    figures.add_row("log-likelihood", f"{score.log_likelihood:.4f} nats")
    figures.add_row("per token", f"{score.nll.mean():.4f} nats")
    figures.add_row("perplexity", f"{score.perplexity:.4f}")
    if score.bits_per_byte is not None:
        figures.add_row("bits per byte", f"{score.bits_per_byte:.4f}")
    tokens = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("position", "id", "nats"):
        tokens.add_column(name, justify="right")
    tokens.add_column("token")
    order = np.arange(len(score.nll)) if len(score.nll) <= most else np.argsort(-score.nll, kind="stable")[:most]
    for index in order:
        piece = "" if score.pieces is None else repr(score.pieces[index + 1])
        tokens.add_row(str(index + 1), str(score.ids[index + 1]), f"{score.nll[index]:.4f}", Text(piece))
    title = "every token" if len(score.nll) <= most else f"the {most} least expected tokens"
    return Group(figures, "", Text(title, style="dim"), tokens)
