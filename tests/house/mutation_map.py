"""Which test reaches which line of the product: every test file is run once under coverage, with a context per test.

What was measured lies in build/mutation/map, a pair of files for each test file: NAME.coverage, whose contexts are the
names of tests, and NAME.json with the seconds of each test that passes. A pair is measured again when its test file, a
module that the tests share, or a file of the product that it reaches has changed.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("refllm", "kernels", "golden")
# What these reach is text, the machine's speed, or code for GPUs as a compiler reads it.
LEFT_OUT = {"test_aot.py", "test_bench.py", "test_bench_gpu.py", "test_bench_growth.py", "test_bench_models.py",
            "test_bench_targets.py", "test_charts.py", "test_gpu.py", "test_house.py", "test_run_long.py",
            "test_run_mutation.py"}  # fmt: skip
LARGEST_MEMORY = 5 << 30  # resident bytes of a process
IMPORTED_ONCE = ["pytest", "hypothesis", "numpy", "torch", "transformers", "triton"]
TIMED_OUT = -1


def lay_out(tree: Path) -> None:
    """Makes `tree` a copy of what git knows here, with kernels and golden under the names they are imported by."""
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for folder in ("kernels", "golden"):
        (tree / "refllm" / folder).symlink_to(f"../{folder}")


# -- a process of its own ----------------------------------------------------------------------------------------------


def start_server() -> Any:
    """A context of multiprocessing whose processes have the large libraries imported, but nothing of refllm."""
    os.environ.update(HYPOTHESIS_PROFILE="ci", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def run_apart(context: Any, work: Callable[..., Any], tree: Path, *arguments: Any, cpu: float, wall: float) -> int:
    """The exit code of `work(tree, *arguments)`, run in `tree`; TIMED_OUT past so many seconds. Nothing is left.

    Seconds of CPU, so that a busy machine does not end it; those of the clock are for what waits.
    """
    process = context.Process(target=_settled, args=(work, tree, cpu, *arguments))
    process.start()
    end = time.monotonic() + wall
    while process.is_alive() and time.monotonic() < end and _resident(process.pid) < LARGEST_MEMORY:
        process.join(0.5)
    ended = process.exitcode
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also what the tests started
    except ProcessLookupError:
        process.kill()
    process.join()
    return TIMED_OUT if ended in (None, -signal.SIGXCPU, -signal.SIGKILL) else int(ended)


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds. Not a limit of the system's: some tests reserve addresses by terabytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _settled(work: Callable[..., int], tree: Path, cpu: float, *arguments: Any) -> None:
    """In the new process: everything that is imported from now on comes from `tree`."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 10))
    output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    here = [ROOT, *(ROOT / "tests").rglob("*")]
    sys.path[:] = [str(tree)] + [entry for entry in sys.path if entry and Path(entry).resolve() not in here]
    code = work(tree, *arguments)
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads that a test left


def run_pytest(files: Iterable[str], plugin: Any, *options: str) -> int:
    """The exit code of pytest in the current folder."""
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *options, *files], plugins=[plugin]))


# -- the map -----------------------------------------------------------------------------------------------------------


class _Contexts:
    """Plugin of pytest: the lines that run during a test are its own. Tests that fail here have no time."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.measured.switch_context(item.nodeid)
        result = yield
        self.measured.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def measure(tree: Path, test_file: str, stem: Path) -> int:
    """Runs one test file, and writes its pair of files. Run apart."""
    measured = coverage.Coverage(
        data_file=f"{stem}.coverage",
        include=[f"{tree / folder}/*" for folder in PRODUCT],
        config_file=False,
        messages=False,
    )
    measured.erase()
    plugin = _Contexts(measured)
    measured.start()
    run_pytest([test_file], plugin)
    measured.stop()
    measured.save()
    data = coverage.CoverageData(f"{stem}.coverage")
    data.read()
    names = [name for name in data.measured_files() if any(map(any, data.contexts_by_lineno(name).values()))]
    reached = sorted(str(Path(name).relative_to(tree)) for name in names)
    written = {
        "tree": str(tree),
        "hashes": {name: _hash(tree / name) for name in [test_file, *_shared(tree), *reached]},
        "seconds": {name: round(value, 4) for name, value in plugin.seconds.items() if name not in plugin.failed},
        "failed": sorted(plugin.failed),
    }
    Path(f"{stem}.json").write_text(json.dumps(written, indent=1))
    return 0


def bring_up_to_date(context: Any, trees: list[Path], folder: Path) -> None:
    """Measures the test files that have changed, in as many processes as there are trees."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    stale = [name for name in names if Path(name).name not in LEFT_OUT and not _is_fresh(_stem(folder, name))]
    known = {_stem(folder, name).name for name in names}
    for kept in folder.iterdir():  # of tests that were moved or are gone
        if kept.name.rpartition(".")[0] not in known:
            kept.unlink()
    free = list(trees)

    def one(name: str) -> None:
        tree, stem = free.pop(), _stem(folder, name)
        code = run_apart(context, measure, tree, name, stem, cpu=1800, wall=3600)
        shutil.copy2(tree / "output.txt", f"{stem}.txt")
        free.append(tree)
        how = f"ended with {code}"
        if code == 0:
            written = json.loads(Path(f"{stem}.json").read_text())
            how = f"{len(written['seconds'])} tests" + f", {len(written['failed'])} failed or skipped" * any(
                written["failed"]
            )
        print(f"{name}: {how}", flush=True)

    if stale:
        print(f"measuring which test reaches which line: {len(stale)} test files", flush=True)
    with ThreadPoolExecutor(len(trees)) as pool:
        list(pool.map(one, stale))


def _stem(folder: Path, test_file: str) -> Path:
    return folder / test_file.removesuffix(".py").replace("/", ".")


def _is_fresh(stem: Path) -> bool:
    try:
        hashes = json.loads(Path(f"{stem}.json").read_text())["hashes"]
    except (OSError, ValueError):
        return False
    return all((ROOT / name).is_file() and _hash(ROOT / name) == value for name, value in hashes.items())


def _shared(tree: Path) -> list[str]:
    return sorted(
        path.relative_to(tree).as_posix()
        for path in (tree / "tests").rglob("*.py")
        if not path.name.startswith(("test_", "run_", "mutation_"))
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Map:
    """What was measured: `seconds` of every test, and `reaching` a line or a file."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self._data = []
        for file in sorted(folder.glob("*.json")):
            written = json.loads(file.read_text())
            self.seconds |= written["seconds"]
            data = coverage.CoverageData(str(file.with_suffix(".coverage")))
            data.read()
            self._data.append((written["tree"], data))

    def reaching(self, file: str, lines: Iterable[int] | None = None) -> set[str]:
        """The tests that run one of these lines of a file; without lines, anything of it after its import."""
        found: set[str] = set()
        for tree, data in self._data:
            by_line = data.contexts_by_lineno(str(Path(tree) / file))
            for line in by_line if lines is None else lines:
                found |= set(by_line.get(line, ()))
        return found & set(self.seconds)
