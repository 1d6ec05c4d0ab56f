"""A short fixed list of calls per operator, cheapest first: together they kill most known bugs.

Each names in its kind what it is for. Sizes are the smallest at which a bug shows: one row more than a block has, one
key more than a tile, three batch rows with different data.
"""

from collections.abc import Callable, Iterator

from refllm.errors import InputError
from refllm.ops.backward_contracts import forward_name, is_backward
from refllm.strategies import corners_backward, corners_basic, corners_heads, corners_rows, corners_tiles
from refllm.strategies.call import Call

_Listed = Callable[[str, str, str], Iterator[Call]]
CORNERS: dict[str, _Listed] = {**corners_rows.CORNERS, **corners_heads.CORNERS}
"""The function (operator, dtype, policy) -> calls of every operator."""


def corners(operator: str, dtype: str = "bfloat16", policy: str = "fused") -> list[Call]:
    """The fixed calls of an operator, valid under the policy; InputError for an operator that is not known."""
    if is_backward(operator):
        name = forward_name(operator)
        return list(corners_backward.corners(operator, dtype, corners(name, dtype, policy) if name in CORNERS else ()))
    if operator not in CORNERS:
        raise InputError(f"operator {operator!r} is not known; use one of {', '.join(CORNERS)}")
    listed = (module.CORNERS.get(operator) for module in (corners_tiles, corners_basic))
    more = [call for of in listed if of for call in of(operator, dtype, policy)]
    return [*CORNERS[operator](operator, dtype, policy), *more]
