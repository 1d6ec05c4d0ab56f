"""Numbers as pages print them: so few digits that no processor changes them, and what counts as the same print."""

import re
from decimal import Decimal
from itertools import product

import numpy as np

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_NOTHING = 1e-9  # what is left of a zero after float64 rounding


def number(x: float) -> str:
    """A number with four digits; what is only left of a zero is 0."""
    if not np.isfinite(x):
        return {"inf": "inf", "-inf": "-inf"}.get(str(float(x)), "NaN")
    return "0" if abs(x) < _NOTHING else f"{x:.4g}"


def array(x: np.ndarray) -> str:
    """Rows of numbers in columns; further axes as blocks with their indices before them."""
    x = np.asarray(x)
    if x.ndim < 2:
        return "  ".join(number(v) if x.dtype.kind == "f" else str(v) for v in np.atleast_1d(x).tolist())
    words = np.vectorize(number if x.dtype.kind == "f" else str, otypes=[object])(x) if x.size else x.astype(object)
    width = max((len(w) for w in words.ravel()), default=1)
    blocks = []
    for place in product(*map(range, x.shape[:-2])):
        label = [f"[{', '.join(map(str, place))}]"] if x.shape[:-2] != (1,) * (x.ndim - 2) else []
        rows = ["  ".join(w.rjust(width) for w in row) for row in words[place]]
        blocks.append("\n".join([*label, *rows]))
    return "\n".join(blocks)


def same_print(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but the last printed digit of numbers with a point."""
    return one == other or (_split(one)[0] == _split(other)[0] and all(map(_close, _split(one)[1], _split(other)[1])))


def _split(text: str) -> tuple[list[str], list[str]]:
    return _NUMBER.split(re.sub(r" +", " ", text)), _NUMBER.findall(text)


def _close(one: str, other: str) -> bool:
    if one == other:
        return True
    digits = [Decimal(1).scaleb(int(Decimal(w).as_tuple().exponent)) for w in (one, other) if "." in w]
    return bool(digits) and abs(Decimal(one) - Decimal(other)) <= max(digits)
