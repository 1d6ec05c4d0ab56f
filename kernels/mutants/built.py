"""Every mutant as a function: `refllm check-op rms_norm --candidate refllm.kernels.mutants.built:rms_norm_no_eps`.

Built when it is asked for; its name is `Mutant.slug`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from refllm.kernels.mutants import Mutant, catalogue


def __getattr__(name: str) -> Callable[..., Any]:
    form = "triton" if name.startswith("triton_") else "torch"
    mutant = None if name.startswith("__") else _by_slug(form, "_backward_" in name).get(name)
    if mutant is None:
        raise AttributeError(f"there is no mutant {name!r}; refllm.kernels.mutants.catalogue() lists them")
    return mutant.function()


@cache
def _by_slug(form: str, backward: bool) -> dict[str, Mutant]:
    return {mutant.slug: mutant for mutant in catalogue(form=form, backward=backward)}
