"""The tests whose outcome may depend on the processor, and `refllm check`, under every CPU that can be simulated here.

    python tests/house/run_cpus.py                # what `make test-cpus` does
    python tests/house/run_cpus.py --only "AVX2"  # the CPUs whose name contains that
    python tests/house/run_cpus.py --no-check     # without `refllm check`
    python tests/house/run_cpus.py FILE ...       # all tests of these files, to find out which depend on the processor

A CPU is simulated by the settings with which torch, oneDNN, MKL, OpenBLAS and NumPy are told to leave out newer
instructions: only a smaller one than the CPU at hand can be. Prints what was skipped and why.
Exit codes: 0 all holds, 1 a test or check failed or one was skipped that must not be, 2 wrong use.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
NUMPY_WITHOUT_AVX512 = "X86_V4 AVX512_ICL AVX512_SPR"
SIMULATED: dict[str, dict[str, str]] = {
    "as it is": {},
    "AVX2 only": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": NUMPY_WITHOUT_AVX512,
    },
    "AVX2 in torch, OpenBLAS for Zen": {"ATEN_CPU_CAPABILITY": "avx2", "OPENBLAS_CORETYPE": "Zen"},
    "no AVX2 in torch": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2 in oneDNN": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OPENBLAS_CORETYPE": "SkylakeX"},
    "AVX-512 with bfloat16, no AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX2 in MKL": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL that takes no notice of the CPU": {"MKL_CBWR": "COMPATIBLE"},
}
NOTHING_SKIPPED = "AVX2 only"
"""A CPU with known kernels, whatever it is simulated on: a test of the same bits that is skipped there is a failure."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Every CPU gets processes of its own, since libraries read their settings once."""
    options = _options(arguments)
    names = [name for name in SIMULATED if options.only.lower() in name.lower()]
    if not names:
        print(f"no simulated CPU is called {options.only!r}; there are: {', '.join(SIMULATED)}", file=sys.stderr)
        return 2
    failed = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # a test process runs one thread
        for name, (holds, report) in zip(names, pool.map(partial(_try, options=options), names), strict=True):
            print(report, flush=True)
            failed += [] if holds else [name]
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\nall {len(names)} hold", flush=True)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", type=Path, help="files; without any the tests that are marked cpu")
    parser.add_argument("--only", default="", help="a part of a CPU's name")
    parser.add_argument("--no-check", action="store_true", help="leave `refllm check` out")
    return parser.parse_args(arguments)


def _try(name: str, options: argparse.Namespace) -> tuple[bool, str]:
    """Whether all holds under one CPU, and the lines that say so."""
    settings = SIMULATED[name]
    lines = [f"\n{name}: {' '.join(f'{key}={value!r}' for key, value in settings.items()) or 'no settings'}"]
    # What decides already which CPU is seen does not count, but for OpenBLAS: there it may keep a machine working.
    known = set().union(*SIMULATED.values()) - {"OPENBLAS_CORETYPE"}
    environment = {key: value for key, value in os.environ.items() if key not in known}
    environment |= {"HYPOTHESIS_PROFILE": "ci", **settings}
    wanted = [str(file) for file in options.tests] or ["-m", "cpu", *_marked_files()]
    pytest = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", *wanted]
    holds, output = _run("tests", pytest, environment, lines)
    skipped = re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", output, re.MULTILINE)
    for reason in dict.fromkeys(reason for _, reason in skipped):
        lines.append(f"  skipped {sum(int(n) for n, r in skipped if r == reason)}: {reason}")
    if skipped and name == NOTHING_SKIPPED and not options.tests:
        lines.append("  nothing may be skipped on this CPU")
        holds = False
    if not options.no_check and not options.tests:
        holds &= _run("refllm check", [sys.executable, "-m", "refllm.commands.cli", "check"], environment, lines)[0]
    return holds, "\n".join(lines)


def _marked_files() -> list[str]:
    """Collecting every test file takes longer than running these tests."""
    return [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.cpu" in file.read_text()]


def _run(what: str, command: list[str], environment: dict[str, str], lines: list[str]) -> tuple[bool, str]:
    start = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1].strip()
    lines.append(f"  {what}: exit code {done.returncode}, {time.monotonic() - start:.0f} s; {last}")
    if done.returncode:
        lines += (done.stdout + done.stderr).splitlines()[-60:]
    return done.returncode == 0, done.stdout


if __name__ == "__main__":
    sys.exit(main())
