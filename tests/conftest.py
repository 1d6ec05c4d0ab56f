"""Settings of the whole test run. Read before any test module, and so before NumPy and Torch start their threads."""

import compileall
import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What is imported for the tests stays: Torch, Transformers and Triton are a million objects, and the collector would
# walk over them again and again, in imports, in tests and at every gc.collect() of the product.
gc.disable()

# Memory that is freed stays here for the next array: to hand it back to the system and to get it again, page by page,
# takes as long as to compute what is in it. (M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; glibc alone has them.)
with contextlib.suppress(AttributeError, OSError):
    for parameter, size in ((-1, 1 << 30), (-3, 1 << 25)):
        ctypes.CDLL(None).mallopt(parameter, size)

# The tests run in several processes, one per core: more threads in each would only take turns. Subprocesses inherit
# this. Set and not defaulted, because Torch's sums depend on the number of threads.
for variable in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
):
    os.environ[variable] = "1"
# No test may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

# A warm cache of compiled kernels would report what an earlier version of a kernel was.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="refllm-triton-")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from warm_python import WarmPopen  # noqa: E402
from where_kernels_run import DEVICE, running  # noqa: E402

# "ci" draws the same examples on every run, so that a red run means a change; "long" looks for new ones, where a test
# does not say how many, and gets its seeds from run_long.py.
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("default"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


_KEEPS_NOTHING = sys.dont_write_bytecode


def pytest_configure(config: pytest.Config) -> None:
    """Sources and tests are compiled once, and not in every run and by every process that a test starts, where Python
    is told to keep nothing (PYTHONDONTWRITEBYTECODE)."""
    sys.dont_write_bytecode = False
    if not hasattr(config, "workerinput"):
        for folder in ("refllm", "kernels", "golden"):
            compileall.compile_dir(Path(__file__).parents[1] / folder, quiet=2)


def pytest_collection_finish() -> None:
    """Every module is imported: from here on the collector looks at what tests make."""
    sys.dont_write_bytecode = _KEEPS_NOTHING
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)
    fastest: Any = sys.modules.get("refllm.kernels.models.fastest")
    if fastest is not None:  # to empty a cache between measurements takes longer than the small models of the tests
        fastest._FORGOTTEN_BYTES = 4


@pytest.fixture
def warm_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """New interpreters are forks of this process, for tests of what they do and not of how they start."""
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)


@pytest.fixture(autouse=True)
def _no_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails in a test is only explained where the test asks for it: each takes a second."""
    explained: Any = sys.modules.get("refllm.check.explained")
    if explained is not None:
        monkeypatch.setattr(explained, "BY_DEFAULT", False)


@pytest.fixture
def device() -> Iterator[str]:
    """Where the tensors of a kernel test go; kernels run there for as long as the test lasts."""
    with running():
        yield DEVICE
