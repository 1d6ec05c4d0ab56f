"""The drawn tests again and again, with another seed in every round, until the time is up or one fails.

    python tests/house/run_long.py --minutes 60            # what `make test-long` does
    python tests/house/run_long.py --seed 4711 --rounds 1 # one round again

Exit codes: 0 nothing failed, 1 a test failed (its seed, and Hypothesis's blob in the output above), 2 wrong use.
"""

import argparse
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
NOTHING_FAILED, FAILED, INTERRUPTED, NOTHING_COLLECTED = 0, 1, 2, 5  # exit codes of pytest


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Rounds are started for as long as there is time; the last one is stopped when it is up."""
    options = _options(arguments)
    end = time.monotonic() + 60 * options.minutes
    seeds = random.Random(options.seed)
    for number in range(1, options.rounds + 1):
        left = end - time.monotonic()
        if left <= 0:
            break
        seed = options.seed if number == 1 and options.seed is not None else seeds.randrange(2**32)
        print(f"round {number}: seed {seed}, {left / 60:.1f} minutes left", flush=True)
        code = _round(options.tests, seed, left)
        if code == FAILED:
            again = f"python tests/house/run_long.py --seed {seed} --rounds 1"
            print(f"failed in round {number}. Again: {again}", flush=True)
            return 1
        if code not in (NOTHING_FAILED, INTERRUPTED):
            print(f"pytest itself failed, with exit code {code}", file=sys.stderr)
            return 2
    print("no failure", flush=True)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; without it a random one")
    parser.add_argument("--rounds", type=int, default=10**9, help="at most so many rounds")
    parser.add_argument("--tests", type=Path, default=TESTS, help="the folder with the tests")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; give a number above 0")
    if options.seed is None:
        options.seed = secrets.randbelow(2**32)
    return options


def _round(tests: Path, seed: int, seconds: float) -> int:
    """One run of pytest over the drawn tests, its files in an order of their own; its exit code."""
    files = sorted(
        p for p in tests.rglob("test_*.py") if re.search(r"^(from|import) (hypothesis|prop)", p.read_text(), re.M)
    )
    random.Random(seed).shuffle(files)
    if not files:
        return NOTHING_COLLECTED
    command = [sys.executable, "-m", "pytest", "-x", "-m", "hypothesis", f"--hypothesis-seed={seed}", *map(str, files)]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "long"}
    process = subprocess.Popen(command, cwd=tests.parent, env=environment)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what it got through
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = INTERRUPTED
        return FAILED if code == FAILED else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
