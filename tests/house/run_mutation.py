"""How strong the suite is: changes of the product, drawn with a seed, each against the tests that reach it.

    python tests/house/run_mutation.py --mutants 60 --seed 7   # what `make mutation MUTANTS=60 SEED=7` does

Works on copies of the tree in build/mutation. The tests that run the changed line come first, then those that run
anything of its file, then those that run a file that imports it, then those of files that are named alike, which may
run it in a process of its own. Of each those named alike come first, then the quick ones, one of every test function
before a second, for at most --seconds of their time. A mutant is killed by the first that fails or does not end; a kill
by a test that fails without the mutant too does not count.
Mutants that are listed in equivalent_mutants.json change no behaviour: others are drawn in their place. What was run is
kept, so that a run that was ended goes on where it stopped.

Exit codes: 0 there is a score, 2 wrong use.
"""

import argparse
import hashlib
import json
import re
import secrets
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from mutation_map import PRODUCT, ROOT, TIMED_OUT, Map, bring_up_to_date, lay_out, run_apart, run_pytest, start_server
from mutation_sites import Mutant, draw

FOLDER = ROOT / "build" / "mutation"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
STEPS = (8.0, 40.0, float("inf"))  # seconds of tests after which one looks whether the mutant is dead
STARTING = 40.0  # seconds of CPU that pytest may need before the first test
NO_TESTS_LEFT, NOT_RUN = 5, (3, 4)  # exit codes of pytest; of NOT_RUN, its own error and wrong use


def main(arguments: list[str] | None = None) -> int:
    """Draws, runs and reports."""
    options = _options(arguments)
    server, trees = start_server(), [FOLDER / f"tree{i}" for i in range(options.jobs)]
    for tree in trees:
        lay_out(tree)
    bring_up_to_date(server, trees, FOLDER / "map")
    run = Run(server, trees, Map(FOLDER / "map"), options.seed, options.seconds)
    wanted = list(islice((m for m in draw(ROOT, options.seed) if known(m) is None), options.mutants))
    print(f"seed {options.seed}: {len(wanted)} mutants", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run.result, wanted))
    results = run.confirmed(results)
    for result in results:
        if result["outcome"] == "survived":
            print(f"survived, {result['tests']} tests: {result['name']}")
    killed = sum(result["outcome"] != "survived" for result in results)
    ended = sum(result["outcome"] == "no end" for result in results)
    print(
        f"seed {options.seed}: {killed} of {len(results)} killed, {killed / len(results):.0%} "
        f"({ended} of them by the time limit)"
    )
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=None, help="of what is drawn; without it a random one")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of tests for each mutant, as they take alone (120)"
    )
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="processes (2)")
    options = parser.parse_args(arguments)
    if options.mutants < 1 or options.seconds <= 0:
        parser.error(f"--mutants {options.mutants} --seconds {options.seconds:g}; both have to be above 0")
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    return options


def known(mutant: Mutant) -> str | None:
    """Why a mutant changes no behaviour, if that was found."""
    for entry in json.loads(EQUIVALENT.read_text()):
        if (entry["file"], entry["before"], entry["after"]) == (mutant.file, mutant.before, mutant.after):
            return str(entry["why"])
    return None


class Run:
    """The mutants of one seed, on copies of the tree that wait in `_free`."""

    def __init__(self, server: Any, trees: list[Path], reach: Map, seed: int, seconds: float) -> None:
        self.server, self.reach, self.seconds = server, reach, seconds
        self._free, self._lock = list(trees), threading.Lock()
        self._importers = _importers()
        self._kept = FOLDER / f"results-{seed}-{seconds:g}-{_state()}.jsonl"
        lines = self._kept.read_text().splitlines() if self._kept.exists() else []
        self._done = {result["name"]: result for result in map(json.loads, lines)}

    def result(self, mutant: Mutant) -> dict[str, Any]:
        """outcome: "killed", "no end" or "survived"; by: the test; tests: how many were run."""
        if str(mutant) in self._done:
            return self._done[str(mutant)]
        with self._lock:
            tree = self._free.pop()
        begun = time.monotonic()
        try:
            found = self._run(mutant, tree)
        finally:
            shutil.copy2(ROOT / mutant.file, tree / mutant.file)
            with self._lock:
                self._free.append(tree)
        found |= {"name": str(mutant), **mutant.to_dict(), "took": round(time.monotonic() - begun, 1)}
        with self._lock, self._kept.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{found['outcome']} in {found['took']:.0f} s: {mutant}", flush=True)
        return found

    def _run(self, mutant: Mutant, tree: Path) -> dict[str, Any]:
        path = tree / mutant.file
        path.write_text(mutant.source(ROOT))
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()  # it may be as old and as long as the changed file
        tests = 0
        for chosen in self._steps(mutant):
            tests += len(chosen)
            code, failed = self.run_tests(tree, chosen)
            if code == TIMED_OUT:
                return {"outcome": "no end", "by": "", "tests": tests}
            if code in NOT_RUN:
                raise RuntimeError(f"the tests cannot be run; see {tree}/output.txt")
            if code not in (0, NO_TESTS_LEFT):
                return {"outcome": "killed", "by": failed, "tests": tests}
        return {"outcome": "survived", "by": "", "tests": tests}

    def run_tests(self, tree: Path, chosen: list[str]) -> tuple[int, str]:
        """The exit code of pytest, and the name of the test that failed; "" where pytest itself did."""
        answer = tree / "failed.txt"
        answer.write_text("")
        clean = sum(self.reach.seconds[name] for name in chosen)
        cpu = STARTING + 3 * clean
        code = run_apart(self.server, run_chosen, tree, chosen, answer, cpu=cpu, wall=60 + 8 * cpu)
        return code, answer.read_text()

    def _steps(self, mutant: Mutant) -> Iterator[list[str]]:
        """The tests in the order in which they are run, in a few portions."""
        left, taken, portion, steps = self.seconds, 0.0, list[str](), iter(STEPS)
        until = next(steps)
        for name in self._order(mutant):
            seconds = self.reach.seconds[name] + 0.01
            if seconds > left:
                continue
            left, taken = left - seconds, taken + seconds
            portion.append(name)
            if taken > until:
                yield portion
                portion, until = [], next(steps)
        if portion:
            yield portion

    def _order(self, mutant: Mutant) -> Iterator[str]:
        seen: set[str] = set()
        for tests in (
            self.reach.reaching(mutant.file, [mutant.line]),
            self.reach.reaching(mutant.file),
            set().union(*(self.reach.reaching(name) for name in self._importers.get(mutant.file, ()))),
            {name for name in self.reach.seconds if _words(name.partition("::")[0]) & _words(mutant.file)},
        ):
            named = {name for name in tests - seen if _words(name.partition("::")[0]) & _words(mutant.file)}
            yield from _quick_and_different(named, self.reach.seconds)
            yield from _quick_and_different(tests - seen - named, self.reach.seconds)
            seen |= tests

    def confirmed(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same; a mutant whose killer fails without it too has survived."""
        killers, unsound = {result["by"] for result in results if result["by"]}, set[str]()
        while killers - unsound:
            code, failed = self.run_tests(self._free[0], sorted(killers - unsound))
            if code == 0:
                break
            if failed not in killers:
                raise RuntimeError(f"the tests cannot be run on the unchanged tree; see {self._free[0]}/output.txt")
            print(f"fails without a mutant: {failed}", flush=True)
            unsound.add(failed)
        return [result | {"outcome": "survived"} if result["by"] in unsound else result for result in results]


def _words(file: str) -> set[str]:
    """What a file is about, by its name: {"forward", "rope", "table"} of tests/forward/test_rope_tables.py."""
    parts = re.split(r"[/_]", file.removesuffix(".py"))
    return {part.rstrip("s") for part in parts} - {"refllm", "kernel", "golden", "test", "op", "model", "init", ""}


def _quick_and_different(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """The quickest of every test function, then the second of each, and so on."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(tests, key=lambda name: (seconds[name], name)):
        groups[name.partition("[")[0]].append(name)
    ranked = [(i, seconds[name], name) for group in groups.values() for i, name in enumerate(group)]
    return [name for _, _, name in sorted(ranked)]


def run_chosen(tree: Path, chosen: list[str], answer: Path) -> int:
    """Runs these tests in their order until one fails, whose name is written to `answer`. Run apart."""
    return run_pytest(sorted({name.partition("::")[0] for name in chosen}), _Chosen(chosen, answer), "-x")


class _Chosen:
    """Plugin of pytest."""

    def __init__(self, chosen: list[str], answer: Path) -> None:
        self.rank, self.answer = {name: i for i, name in enumerate(chosen)}, answer

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(kept, key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.answer.write_text(report.nodeid)


def _importers() -> dict[str, list[str]]:
    """File of the product -> the files of the product that import it."""
    files = [path.relative_to(ROOT).as_posix() for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    found: dict[str, list[str]] = defaultdict(list)
    lines = {file: re.findall(r"^\s*(?:from|import) .*", (ROOT / file).read_text(), re.MULTILINE) for file in files}
    for file in files:
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        name = name if name.startswith("refllm") else f"refllm.{name}"
        package, _, module = name.rpartition(".")
        pattern = re.compile(rf"(?:from|import) {re.escape(name)}\b|from {re.escape(package)} import .*\b{module}\b")
        found[file] = [other for other in files if any(map(pattern.search, lines[other]))]
    return found


def _state() -> str:
    """A hash of the product and of the tests."""
    files = sorted(path for folder in (*PRODUCT, "tests") for path in (ROOT / folder).rglob("*.py"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
