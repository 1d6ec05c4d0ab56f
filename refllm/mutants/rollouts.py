"""Is that one of a trainer and a rollout engine blamed whose positions are wrong, and neither for its rounding?

    python -m refllm.mutants.rollouts

Random models of about 20 million parameters, weights as those of trained models. Both programs are the port of
`refllm.mutants.honest`, which shares no code with the check: the trainer rounds as Transformers' eager code, the
rollout engine as a fused one. A mistake in positions is planted into neither, either or both.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.logprobs import Found, LogProbReport, check_logprobs
from refllm.config import CONFIG_CLASSES
from refllm.mutants.honest import FUSED, HF, Honest
from refllm.strategies import small_models

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHAPE, SEEDS = (1, 64), 3
FORMATS = (("bfloat16", "bfloat16"), ("float32", "bfloat16"))
"""The formats of trainer and rollout."""
MISTAKES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one later from position 8 on": lambda p: p + (p >= 8),
    "restart after 32": lambda p: p % 32,
    "the first position twice": lambda p: np.maximum(p - 1, 0),
}


@dataclass(frozen=True)
class Blamed:
    """One pair of runs. planted: where the mistake is, "" for nowhere; said: who was blamed, in the same words. ratios:
    of trainer and rollout, in sigma of predicted rounding."""

    family: str
    seed: int
    formats: tuple[str, str]
    mistake: str
    planted: str
    said: str
    ratios: tuple[float, float]

    @property
    def right(self) -> bool:
        """Whether those were blamed that are wrong, and nobody else."""
        return self.planted == self.said


def save_model(family: str, seed: int, folder: Path, sizes: dict[str, Any]) -> int:
    """Write a random checkpoint. Returns its number of parameters."""
    kind, cls = CONFIG_CLASSES[family], small_models.model_class(family)
    more: dict[str, Any] = {"rope_parameters": {"partial_rotary_factor": 0.5}} if kind.partial_rotation else {}
    if "head_dim" in kind.__annotations__:
        more["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = kind(**sizes, **more)
    small_models.build(cls, config, seed, "float32").save_pretrained(folder, dtype="float32")
    return sum(int(np.prod(shape)) for shape in cls.tensors(config).values())


def said_by(how: Honest, folder: Path, dtype: str, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The log-probabilities [B, S] of a port, in float32 from its logits; the first of a row is NaN."""
    import torch

    run = how.but(names=()).in_dtype(dtype)
    logits = run(str(folder), ids, np.ones_like(ids), positions, lambda *_: None).float()
    found = np.full(ids.shape, np.nan)
    log_p = torch.log_softmax(logits, -1).numpy()
    found[:, 1:] = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return found


def pairs(
    family: str,
    seed: int,
    formats: tuple[str, str],
    mistakes: tuple[str, ...] = tuple(MISTAKES),
    sizes: dict[str, Any] | None = None,
) -> Iterator[Blamed]:
    """Right runs of both, and every mistake in the trainer, in the rollout and in both. sizes: of the model, where they
    are not `SIZES`."""
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), SIZES | (sizes or {})
        save_model(family, seed, folder, sizes)
        ids = np.random.default_rng(seed).integers(0, sizes["vocab_size"], SHAPE)
        right = np.broadcast_to(np.arange(SHAPE[1]), SHAPE)
        ports = {"trainer": (HF, formats[0]), "rollout": (FUSED, formats[1])}

        def report(who: str, kind: str) -> LogProbReport:
            how, dtype = ports[who]
            said = said_by(how, folder, dtype, ids, MISTAKES[kind](right) if kind else right)
            return check_logprobs(folder, {"ids": ids, "logprobs": said, "source": who, "dtype": dtype}).reports[0]

        reports = {(who, kind): report(who, kind) for who in ports for kind in ("", *mistakes)}

        def blamed(mistake: str, planted: tuple[str, ...]) -> Blamed:
            both = [reports[who, mistake if who in planted else ""] for who in ports]
            difference = Found.of(both).difference
            assert difference is not None
            said, ratios = " and ".join(difference.fault), (both[0].ratio, both[1].ratio)
            return Blamed(family, seed, formats, mistake, " and ".join(planted), said, ratios)

        yield blamed("", ())
        for mistake in mistakes:
            for planted in (("trainer",), ("rollout",), ("trainer", "rollout")):
                yield blamed(mistake, planted)


def in_words(found: list[Blamed]) -> list[str]:
    """What was found, in lines of Markdown."""
    wrong, none = [one for one in found if one.planted], [one for one in found if not one.planted]
    lines = [
        "| formats (trainer, rollout) | runs with a mistake | the right one blamed | right pairs | blamed | "
        "largest error of a right run, in sigma | least of a wrong one |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for formats in dict.fromkeys(one.formats for one in found):
        w, n = [o for o in wrong if o.formats == formats], [o for o in none if o.formats == formats]
        least = min(
            (r for o in w for who, r in zip(("trainer", "rollout"), o.ratios, strict=True) if who in o.planted),
            default=0.0,
        )
        cells = [", ".join(formats), len(w), sum(o.right for o in w), len(n), sum(not o.right for o in n)]
        largest = max((r for o in n for r in o.ratios), default=0.0)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {largest:.2f} | {least:.3g} |")
    return lines


def swept(family: str) -> list[Blamed]:
    """All pairs of one family: every seed with formats of its own."""
    return [one for seed in range(SEEDS) for one in pairs(family, seed, FORMATS[seed % len(FORMATS)])]


def main() -> int:
    """Measure, print the table and what was blamed wrongly; 1 where anything was."""
    found = [one for family in small_models.FAMILIES for one in swept(family)]
    print("\n".join(in_words(found)))
    wrong = [one for one in found if not one.right]
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
