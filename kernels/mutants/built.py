"""Every mutant as a function: `refllm check-op rms_norm --candidate refllm.kernels.mutants.built:rms_norm_no_eps`.

Built when it is asked for; its name is `Mutant.slug`.
"""

from collections.abc import Callable
from typing import Any

from refllm.kernels.mutants import catalogue


def __getattr__(name: str) -> Callable[..., Any]:
    form = "triton" if name.startswith("triton_") else "torch"
    for mutant in () if name.startswith("__") else catalogue(form=form):
        if mutant.slug == name:
            return mutant.function()
    raise AttributeError(f"there is no mutant {name!r}; refllm.kernels.mutants.catalogue() lists them")
