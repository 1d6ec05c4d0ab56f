"""The exercises, track by track, in the order in which they are meant to be done."""

import difflib
from functools import cache

from refllm.errors import InputError
from refllm.learn.exercise import Exercise

_ORDER = ("swiglu", "softmax", "rms_norm", "layer_norm", "rope_tables", "rope", "attention", "kv_cache",
"cross_entropy",
          "block", "generate", "top_p")  # fmt: skip


@cache
def exercises() -> dict[str, Exercise]:
    """All, by name."""
    from refllm.learn.exercises import backward, bugs, numpy_generation, numpy_operators, triton_rows, triton_tiles

    first = {one.name: one for one in numpy_operators.EXERCISES + numpy_generation.EXERCISES}
    tracks = (
        [first[name] for name in _ORDER],
        triton_rows.EXERCISES + triton_tiles.EXERCISES,
        backward.EXERCISES,
        bugs.EXERCISES,
    )
    return {one.name: one for track in tracks for one in track}


def find(name: str) -> Exercise:
    """The exercise of that name, or of the file of that name. Raises InputError where there is none."""
    known = exercises()
    plain = name.rsplit("/", 1)[-1].removesuffix(".py").strip()
    plain = plain.split("_", 1)[1] if plain.split("_", 1)[0].isdigit() and "_" in plain else plain
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1)
    raise InputError(f"{name!r} is no exercise; {f'did you mean {near[0]}?' if near else 'refllm learn list has all'}")
