"""docs/gradients.md: how gradients are checked, and what was measured."""

from collections import Counter
from typing import Any

LEAST, LEAST_FLOAT32, MOST = 0.6, 0.55, 1.3
"""The bounds of measured over predicted error of every parameter's gradient, pooled over the runs of a case."""
NAMED = 0.95
"""The share of planted bugs that have to be named at the right operator."""

_TEXT = """\
# Gradients

`refllm check CHECKPOINT --backward` runs a forward and a backward pass of a candidate, and judges the gradient of a
loss by every named value (`grad:model.layers.0.mlp.act`) and every tensor (`grad:model.layers.0.mlp.up_proj.weight`).
In Python it is `refllm.check.compare(checkpoint, candidate, backward=True)`.

- **Alone**, each backward operator is evaluated by its definition (`refllm.ops`, names that end in `_backward`) on the
  candidate's own saved values and incoming gradient. So the first operator that is wrong, in the order of the backward
  pass, is named, and what follows from it is not called wrong.
- **End to end**, the gradient is that of the exact pass. Its predicted error is that of the forward pass, which reaches
  every saved value and the loss, and of the backward pass. They are the same errors wherever a value is read, so they
  are not added up as if they were independent: the passes are made 8 times with each operator's result off by a random
  error of the size that is predicted for that operator alone.

Two runs are made: the tokens, and a batch of rows that are padded differently, in two micro-batches whose gradients are
added (`num_items_in_batch`), with labels of -100 in the padding and in one prompt. `--stress` adds far positions and
packed rows. float16 runs with a loss times 1024. `--frozen NAME` says which tensors learn nothing; a gradient of one of
them is a finding. A gradient that was not shown, or at which zeros, another sign, a factor of 1.01, other rows or a
missing tile would hold as well, makes the verdict `incomplete`.

- **Transformers** (`--candidate transformers`, or a model object): autograd of its own loss, seen by hooks on the
  tensors that the named values are; eager and sdpa; with gradient checkpointing if the model has it on.
- **A torch module** (`file.py:module`, `--names`): the same at the places of its names. The loss is the cross entropy
  of its logits in float32, of position s and the label of s + 1.
- **A function** with an argument `labels` returns `(logits, gradients)`, a mapping from names to arrays, and may also
  show gradients of values by `tap("grad:" + name, gradient)`; with an argument `loss_scale` the loss is times that
  (`refllm.check.functions`). Where it shows those of tensors alone, no operator is judged alone: `incomplete`.

The fast models of refllm show no gradients of their values yet, and say so. `--dtype float64` judges gradients alone;
Transformers computes norms, softmax and tables in float32 in every format, and is judged by the errors of float32 then
(with padding its eager attention gives NaN in float64, since its mask overflows in float32).

Rounding: Transformers has to round where `hf-eager` or `hf-sdpa` says, to the bit where float32 sums cannot matter;
others wherever one of the policies does, by operator, which the report then says. The losses of sequences and of
answers are computed in the narrow format itself by Transformers; their gradients are checked in float32 alone.
"""


def holds(found: dict[str, Any]) -> bool:
    """No false alarm, every ratio within its bounds, nearly all planted bugs named."""
    cases, planted = _cases(found), _planted(found)
    named = sum(one["right"] for one in planted)
    return (
        not any(case["alarms"] for case in cases.values())
        and all(not _outside(name, case) for name, case in cases.items())
        and named >= NAMED * len(planted)
    )


def page(found: dict[str, Any]) -> str:
    """The page on what was measured so far."""
    cases, planted = _cases(found), _planted(found)
    runs, alarms = sum(case["runs"] for case in cases.values()), sum(len(case["alarms"]) for case in cases.values())
    ratios = [ratio for case in cases.values() for ratio in case["ratios"].values()]
    outside = sum(len(_outside(name, case)) for name, case in cases.items())
    named, total = sum(one["right"] for one in planted), len(planted)
    lines = [_TEXT, "## Measured", ""]
    lines += ["`python -m refllm.mutants.gradient_validation docs/gradients.md`, which goes on where it was ended."]
    lines += ["", f"- False alarms: {alarms} in {runs} right runs."]
    if ratios:
        lines += [
            f"- Measured over predicted error of a parameter's gradient, end to end, pooled over the runs of a case: "
            f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios):,} parameters; {outside} outside of {LEAST} "
            f"(float32: {LEAST_FLOAT32}) to {MOST}."
        ]
    if total:
        lines += [f"- Planted bugs named at the right operator: {named} of {total} ({100 * named / total:.1f} %)."]
    lines += ["", "| right implementation | runs | false alarms | parameters, end to end | any gradient, alone |"]
    lines += ["|---|---|---|---|---|"]
    for name, case in cases.items():
        of = list(case["ratios"].values())
        alone = f"{case['alone'][0]:.2f} to {case['alone'][1]:.2f}"
        lines += [f"| {name} | {case['runs']} | {len(case['alarms'])} | {min(of):.2f} to {max(of):.2f} | {alone} |"]
    said = [f"- {name}: {alarm}" for name, case in cases.items() for alarm in case["alarms"]]
    said += [f"- {name}: {text}" for name, case in cases.items() for text in _outside(name, case)]
    lines += ["", *said] if said else []
    return "\n".join([*lines, *_of_planted(planted), ""])


def _of_planted(planted: list[dict[str, Any]]) -> list[str]:
    if not planted:
        return []
    lines = ["", "| planted bug | models and formats | named |", "|---|---|---|"]
    counts, named = Counter(one["mutant"] for one in planted), Counter(one["mutant"] for one in planted if one["right"])
    lines += [f"| {mutant} | {count} | {named[mutant]} |" for mutant, count in counts.items()]
    wrong = [one for one in planted if not one["right"]]
    lines += [""] + [
        f"- {one['mutant']}, {one['model']}, {one['dtype']}: reported {one['reported'] or 'nothing'}"
        + ("" if one["visible"] else " (it changes no gradient)")
        for one in wrong
    ]
    return lines


def _outside(name: str, case: dict[str, Any]) -> list[str]:
    """Parameters whose ratio is out of bounds, in words."""
    least = LEAST_FLOAT32 if "float32" in name else LEAST
    return [f"{key} {ratio:.2f}" for key, ratio in case["ratios"].items() if not least <= ratio <= MOST]


def _cases(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith("planted")}


def _planted(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for name, value in found.items() if name.startswith("planted") for one in value]
