"""`set_seed`: the random numbers of a program, for whoever names no seed of their own."""

import random
import sys
from typing import Any

import numpy as np

from refllm.errors import InputError

_generator: list[np.random.Generator] = []


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Makes `generate` without `seed` draw the same tokens in every run of the program from here on.

    As in Transformers, Python's `random`, NumPy and, where it is loaded, Torch are seeded too. deterministic: also asks
    Torch for deterministic algorithms; those here are. Raises InputError for what is no seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"set_seed: seed={seed!r} must be an integer from 0 to {2**32 - 1}")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)  # the program's own draws, which may well be of the older kind
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
        if deterministic:
            torch.use_deterministic_algorithms(True)
    _generator[:] = [np.random.default_rng(seed)]


def generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """The generator for a `seed` of `generate`: of None that of `set_seed`, or fresh randomness. Raises InputError."""
    if seed is None and _generator:
        return _generator[0]
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise InputError(f"generate: seed={seed!r} must be an integer of at least 0, or None") from None
