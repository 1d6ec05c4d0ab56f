"""Find the bug: solutions of other exercises with a mistake planted, which has to be named and mended."""

from dataclasses import replace

from refllm.learn.exercise import Exercise
from refllm.learn.exercises import backward, numpy_generation, numpy_operators, triton_rows, triton_tiles

_CHOICES = 7

# Where mistakes like these were made: by the operator and the name of a planted bug in `refllm.kernels.mutants`.
SEEN = {
    "bug_attention": ("attention", "heads by modulo"),
    "bug_layer_norm_kernel": ("layer_norm", "padding in the variance"),
    "bug_rms_norm_kernel": ("rms_norm", "mean over the tile"),
    "bug_flash_row": ("attention", "padding in the denominator"),
    "bug_decode_kernel": ("decode_attention", "length of the first sequence"),
}
_REAL = {
    "bug_layer_norm_kernel": "Dao-AILab/quack (commit 9310d47)",
    "bug_rms_norm_kernel": "flashinfer-ai/flashinfer (issue 3717)",
    "bug_flash_row": "flashinfer-ai/flashinfer (issue 3717)",
    "bug_decode_kernel": "vllm-project/flash-attention (issue 176)",
}


def _bug(base: Exercise, planted: str, *edits: str) -> Exercise:
    """The exercise with a mistake of its list planted. edits: of its solution, where that is not the definition."""
    name = f"bug_{base.name}"
    real = f"\n    A kernel of {_REAL[name]} had this bug." if name in _REAL else ""
    statement = f"""
    Below is an answer with one mistake in it. Find it: write its letter into BUG, and mend the code. The seven
    sentences above BUG are what may be wrong; one of them is.{real}

    The exercise was:
    {base.statement.rstrip()}
    """
    return replace(
        base,
        name=name,
        track="bugs",
        title=f"Find the bug: {base.title}",
        statement=statement,
        planted=planted,
        choices=_choices(base, planted),
        bug=edits,
    )


def _choices(base: Exercise, planted: str) -> tuple[str, ...]:
    """The planted one among others of the list, by the alphabet, which says nothing about which it is."""
    others = [m.name for m in base.mistakes if m.name != planted]
    step = max(1, len(others) // (_CHOICES - 1))
    return tuple(sorted([planted, *others[::step][: _CHOICES - 1]]))


EXERCISES = (
    _bug(numpy_operators.ATTENTION, "heads tiled"),
    _bug(numpy_generation.BLOCK, "heads not put side by side"),
    _bug(numpy_generation.GENERATE, "position plus one"),
    _bug(backward.TRAIN, "last one wins"),
    _bug(triton_rows.RMS_NORM_KERNEL, "mean over BLOCK", "tl.sum(x * x, 0) / E", "tl.sum(x * x, 0) / BLOCK"),
    _bug(triton_rows.LAYER_NORM_KERNEL, "padding in the variance", "tl.where(mask, x - mean, 0.0)", "x - mean"),
    _bug(
        triton_tiles.FLASH_ROW,
        "key tail not hidden",
        'tl.where(t < T, tl.sum(q[None, :] * k, 1) * scale, -float("inf"))',
        "tl.sum(q[None, :] * k, 1) * scale",
    ),
    _bug(triton_tiles.FLASH_KERNEL, "accumulator not rescaled", "acc = acc * alpha[:, None] +", "acc = acc +"),
    _bug(triton_tiles.DECODE_KERNEL, "first length for all", "tl.load(lengths_ptr + b)", "tl.load(lengths_ptr)"),
)
