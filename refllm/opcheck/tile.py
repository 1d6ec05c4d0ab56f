"""Where in a result the wrong elements begin: "columns 1024.. of all rows". Blocks of a kernel show in it."""

import numpy as np

from refllm.ops.contracts import axis_names

_WORDS = {
    "E": "columns",
    "F": "columns",
    "V": "columns",
    "D": "head dims",
    "S": "positions",
    "H": "query heads",
    "K": "key/value heads",
    "B": "batch rows",
    "N": "rows",
}


def tile(where: np.ndarray, axes: tuple[str, ...]) -> str:
    """The wrong elements in words, last axis first; "" for a single number. axes: of `signatures`."""
    if not where.ndim or not where.any():
        return ""
    parts = []
    for axis, name in reversed(list(enumerate(axis_names(axes, where.ndim)))):
        others = tuple(i for i in range(where.ndim) if i != axis)
        bad = np.flatnonzero(where.any(axis=others))
        word = "classes" if name == "V" and axis < where.ndim - 1 else _word(name)
        parts.append(_part(bad, where.shape[axis], word))
    return " of ".join(parts)


def begin(where: np.ndarray) -> tuple[int, ...]:
    """The first wrong index of every axis: where the first failing tile begins."""
    return tuple(int(i.min()) for i in np.nonzero(where)) if where.ndim and where.any() else ()


def _word(name: str) -> str:
    if name.startswith("rows") and name != "rows":
        return f"rows (axis {name[4:]})"
    return _WORDS.get(name, name)


def _part(bad: np.ndarray, size: int, word: str) -> str:
    """One axis: which of its entries have a wrong element."""
    first, last, step = int(bad[0]), int(bad[-1]), np.diff(bad)
    if size == 1:
        return f"{_singular(word)} 0"
    if len(bad) == size:
        return f"all {size} {word}"
    if len(bad) == 1:
        return f"{_singular(word)} {first} (of {size})"
    if (step == 1).all():
        return f"{word} {first}.." + ("" if last == size - 1 else f"{last}") + f" (of {size})"
    if (step == step[0]).all():
        return f"every {_ordinal(int(step[0]))} of the {word} from {first} (of {size})"
    return f"{len(bad)} of {size} {word} from {first}"


def _singular(word: str) -> str:
    head, _, tail = word.partition(" (")
    head = {"classes": "class"}.get(head, head.removesuffix("s"))
    return head + (f" ({tail}" if tail else "")


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
