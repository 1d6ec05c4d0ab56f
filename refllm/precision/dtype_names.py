"""The ways in which people name a dtype: "bf16", "half", torch.bfloat16, "torch.bfloat16", numpy.float32."""

from typing import Any

IN_TORCH = {
    "float64": "float64",
    "double": "float64",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
"""The names of Torch, which a config.json may hold, and the name that is used here."""
_SHORT = {"fp64": "float64", "f64": "float64", "fp32": "float32", "f32": "float32", "single": "float32"}
_SHORT |= {"bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


class DtypeName(str):
    """The name of a dtype, "bfloat16". Torch's dtype of that name is equal to it."""

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other).removeprefix("torch.")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def dtype_name(dtype: Any) -> Any:
    """The one name of a dtype that a user gave as text, as a dtype of Torch, NumPy or ml_dtypes, or as a NumPy type.

    What is none of those comes back as it is, None too, for the caller to refuse with the names that are right there.
    """
    if isinstance(dtype, type):  # numpy.float32, ml_dtypes.bfloat16
        dtype = dtype.__name__
    given = str(dtype).strip().lower().removeprefix("torch.").removeprefix("numpy.").removeprefix("np.")
    return (IN_TORCH | _SHORT).get(given, dtype)
