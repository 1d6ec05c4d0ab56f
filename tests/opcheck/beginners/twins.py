"""Hypotheses that some designed inputs, or all, cannot tell apart, with the number or in the way of writing that they
share: they are named together."""

_TILES = (
    ("only the first tile in the mean", "last tile not in the mean"),  # of a row shorter than two tiles
    ("eps fixed", "eps as a floor"),  # of an eps that is next to nothing
)
_ZERO = (("last columns zero", "all zero"), ("last rows zero", "all zero"), ("last columns zero", "last rows zero"))

TWINS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": _TILES,
    "add_rms_norm": _TILES,
    "layer_norm": _TILES,
    "add_layer_norm": _TILES,
    "rope": _ZERO[:1],
    "norm_rope": (*_TILES, *_ZERO[:1]),
    "rms_norm_qkv_rope": (*_TILES, *_ZERO[:1]),
    "attention": (
        ("last keys left out", "first keys alone"),  # of fewer than two tiles
    ),
    "decode_attention": (
        ("value of an extra key", "padding in the denominator"),  # of one lane
        *_ZERO,
    ),
    "relu2": (("square in bfloat16", "result rounded"),),  # the square is the result
    "linear_cross_entropy": (("last classes left out", "only the first classes"),),
}


def are_twins(operator: str, one: str, other: str) -> bool:
    """Whether two hypotheses are listed, in either order."""
    return any({one, other} == set(pair) for pair in TWINS.get(operator, ()))
