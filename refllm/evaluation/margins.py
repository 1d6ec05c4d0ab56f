"""Which answers of a multiple choice hang on rounding.

A choice is made by the largest log-likelihood (a sum of log-probabilities of tokens), or by the largest per character.
Where the best two are closer than rounding makes them, another right implementation in the same format may answer
otherwise. The error of each log-likelihood is predicted as for `refllm check --logprobs`
(`refllm.check.logprobs.expect`); those of two continuations are taken as independent, so that of their difference has
the sum of both variances. Errors of the context that they share push both the same way: the margin is not less than
what is said.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.check.inputs import Inputs
from refllm.check.logprobs import expect
from refllm.check.run import load
from refllm.precision import HF_EAGER


@dataclass(frozen=True)
class Choice:
    """One continuation that could have been chosen.

    ids: tokens, context first. scored: how many of the last ones are the continuation. log_likelihood: in nats.
    characters: of the continuation, by which `acc_norm` divides.
    """

    ids: tuple[int, ...]
    scored: int
    log_likelihood: float
    characters: int


@dataclass(frozen=True)
class Margin:
    """The best two choices of a question, by one metric.

    metric: acc, or acc_norm (per character). best, next: their numbers. margin: the difference of their scores. sigmas:
    the same over the predicted error of that difference.
    """

    task: str
    question: int
    metric: str
    best: int
    next: int
    margin: float
    sigmas: float

    @property
    def hangs(self) -> bool:
        """Whether rounding alone may turn the answer: the limit of a flip of the next token."""
        return self.sigmas <= limits.FLIP

    @property
    def text(self) -> str:
        """The sentence that is printed."""
        return (
            f"{self.task}, question {self.question}, {self.metric}: choice {self.best} is {self.margin:.3g} nats "
            f"({self.sigmas:.1f} sigma of rounding) before choice {self.next}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"hangs": self.hangs}


Variance = Callable[[Choice], float]


def predicted_variance(folder: Path, dtype: str) -> Variance:
    """The variance of the rounding error of a log-likelihood, from the page and the weights of a checkpoint [nats^2].

    dtype: the format in which the model computes. The model is loaded once, in float64.
    """
    model = load(folder, dtype)

    def of(choice: Choice) -> float:
        inputs = Inputs(np.array([choice.ids]))
        expected = expect(model, inputs, dtype, HF_EAGER, temperature=1.0)
        return float(expected.variance[0, -choice.scored :].sum())

    return of


def margins(task: str, question: int, choices: Sequence[Choice], variance: Variance) -> list[Margin]:
    """The margin of a question by each metric; none where there is nothing to choose."""
    if len(choices) < 2:
        return []
    variances = [variance(choice) for choice in choices]
    return [
        _margin(task, question, metric, choices, variances, [c.characters if per else 1 for c in choices])
        for metric, per in (("acc", False), ("acc_norm", True))
        if not per or all(c.characters for c in choices)
    ]


def _margin(
    task: str,
    question: int,
    metric: str,
    choices: Sequence[Choice],
    variances: Sequence[float],
    lengths: Sequence[int],
) -> Margin:
    scores = [choice.log_likelihood / n for choice, n in zip(choices, lengths, strict=True)]
    best = max(range(len(scores)), key=scores.__getitem__)
    others = [i for i in range(len(scores)) if i != best]
    # The rival is the one that rounding can reach most easily, which need not be the second best.
    away = {i: _in_sigma(scores[best] - scores[i], variances, lengths, best, i) for i in others}
    rival = min(others, key=lambda i: (away[i], i))
    return Margin(task, question, metric, best, rival, scores[best] - scores[rival], away[rival])


def _in_sigma(difference: float, variances: Sequence[float], lengths: Sequence[int], a: int, b: int) -> float:
    sigma = math.sqrt(variances[a] / lengths[a] ** 2 + variances[b] / lengths[b] ** 2)
    return difference / sigma if sigma else (math.inf if difference else 0.0)
