"""One walk through a model's page on values that carry their predicted error, from token ids to the head's output.

`refllm check` walks it twice over a candidate's values (`refllm.check.oracle`); the goldens walk it once, for the error
that stands beside their exact results.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from refllm.accuracy.propagation import Propagation, Substitute, Uncertain, certain
from refllm.config import ModelConfig
from refllm.forward.cache import NoCache
from refllm.forward.masks import masking
from refllm.forward.model import Model
from refllm.forward.rotary import RotaryEmbedding
from refllm.forward.taps import HEAD_TAPS
from refllm.precision import Policy, rounding


def predict_page(
    model: Model,
    input_ids_BS: np.ndarray,
    positions_BS: np.ndarray,
    mask: np.ndarray | None,
    dtype: str,
    policy: Policy,
    at_tap: Substitute,
    *,
    wants: Callable[[str], bool] = lambda name: True,
    embeds: Callable[[Callable[[np.ndarray], np.ndarray]], np.ndarray] | None = None,
    exact_tables: bool = False,
    op: Any = None,
    tables: Callable[[Propagation], tuple[Uncertain, Uncertain]] | None = None,
    packed: bool = False,
    head_of: np.ndarray | None = None,
    before: Any = None,
) -> Uncertain:
    """The page of `model`, run for an implementation in `dtype` under `policy`; at_tap sees every named value that is
    wanted, and what it returns is passed on. Returns the head's output, or the last norm's of a model without a head.

    model: its weights must lie on the grid of `dtype`; its own arithmetic is not used. embeds: makes what is fed of a
    function from ids to their rows, which is then rounded; None: those rows. exact_tables: see `rotary_tables`. op:
    other operators than those of the policy, a `Propagation` or one in some layers (`refllm.accuracy.layerwise`).
    tables: cos and sin for these operators, other ones than `rotary_tables` makes. head_of: [B], the one position of
    every row of which the head is computed; None: all. packed: sequences in one row begin where positions do anew;
    there is no mask then. before: keys and values of `before.count` positions that come before these and are not
    computed, in the place of a cache; then the mask is of all.
    """
    op = op or Propagation(dtype, policy.without(model.page.NOT_ROUNDED), at_tap, wants)
    c, w = model.config, model.weights.unread() if model.weights.low_memory else model.weights
    cos, sin = tables(op) if tables else rotary_tables(op, c, positions_BS, exact_tables)
    rows = w.rows("embed_tokens.weight", input_ids_BS)
    if embeds is not None:
        rows = rounding(dtype)(embeds(lambda ids: rows))
    x = op.tap("model.embed_tokens", certain(rows))
    B, S = input_ids_BS.shape
    who = masking(
        mask,
        positions_BS if packed else None,
        batch=B,
        queries=S,
        cached=0 if before is None else before.count,
        has_cache=before is not None,
        heads=c.num_attention_heads,
    )
    x = model.page.forward(op, c, w, x, cos, sin, who, before or NoCache())
    head = HEAD_TAPS.get(model.head)
    if head is None:
        return x
    if head_of is not None:
        x = x[np.arange(B)[:, None], head_of[:, None]]
    return op.tap(head, op.linear(x, w[f"{head}.weight"], w.get(f"{head}.bias")))


def rotary_tables(
    op: Propagation, config: ModelConfig, positions_BS: np.ndarray, exact: bool = False
) -> tuple[Uncertain, Uncertain]:
    """cos and sin, and what an implementation's may be off by.

    Every implementation at hand makes frequencies, angles and tables in float32 by one convention, so their error is
    known and no noise: it is 0 beside the same float32 tables, which are what is taken here. Beside exact tables
    (exact=True), as those of a golden are, its variance is the square of that known error. Then comes the rounding to
    the format.
    """
    float32 = [op.table(table) for table in RotaryEmbedding(config, exact=False).tables(positions_BS)]
    if not exact:
        return float32[0], float32[1]
    true = RotaryEmbedding(config, exact=True).tables(positions_BS)
    cos, sin = (
        Uncertain(value, np.asarray(made.variance + np.square(made.value - value), op.width))
        for value, made in zip(true, float32, strict=True)
    )
    return cos, sin
