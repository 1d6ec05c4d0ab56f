"""The tests of other people's stacks, each in an environment of its own; `make test-stacks`.

    python tests/house/run_stacks.py                      # all of tests/stacks/environments.py that have tests
    python tests/house/run_stacks.py litgpt mlx           # these
    python tests/house/run_stacks.py --here torch_module  # in this Python, which has what the stack needs
    python tests/house/run_stacks.py --page               # write docs/stacks.md again, and run nothing

An environment is build/stacks/NAME; it is made again when its pins or pyproject.toml change, which needs a network.
Results go to docs/stacks/NAME.json, and docs/stacks.md is made of those of all stacks.
Exit codes: 0 all hold, 1 a test failed or an environment could not be made, 2 wrong use.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STACKS = ROOT / "tests" / "stacks"
sys.path.insert(0, str(STACKS))

from environments import ENVIRONMENTS, Environment, extras  # noqa: E402

RESULTS, PAGE = ROOT / "docs/stacks", ROOT / "docs/stacks.md"
BASE = ("check", "fast", "witness")
"""The extras that every environment has."""
FIRST = "refllm-first.pth"
"""With it the installed refllm is found before the folder of that name; the Makefile's variable FINDER is its text."""
INTRODUCTION = """# Other people's stacks

What `make test-stacks` found, each stack in an environment of its own with the versions that are named. *Right*: models
that the stack loads from the embedded checkpoints, unchanged; they have to hold in every format that it computes in.
*Planted*: bugs in such models; the check has to name them first, at the operator where they are. The tests, the bugs
among them, are in `tests/stacks/`; a file per stack in `docs/stacks/` has what is below, and a script reads it.
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stacks", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--here", action="store_true", help="no environment: run in this Python")
    parser.add_argument("--page", action="store_true", help="write docs/stacks.md of the results that there are")
    options = parser.parse_args(arguments)
    tested = [name for name in ENVIRONMENTS if (STACKS / f"test_{name}.py").exists()]
    unknown = [name for name in options.stacks if name not in tested]
    if unknown:
        print(f"there are no tests of a stack {unknown[0]!r}; there are: {', '.join(tested)}", file=sys.stderr)
        return 2
    names = [] if options.page else options.stacks or tested
    failed = [name for name in names if not holds(name, options.here)]
    PAGE.write_text(page())
    if names:
        print(f"{len(names) - len(failed)} of {len(names)} hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def holds(name: str, here: bool = False) -> bool:
    """Whether the tests of a stack pass; says how long they took. Its results are then in docs/stacks."""
    start = time.monotonic()
    try:
        python = sys.executable if here else str(made(name, ENVIRONMENTS[name]))
    except subprocess.CalledProcessError as error:
        print(f"{name}: {' '.join(map(str, error.cmd[3:]))}: exit code {error.returncode}")
        return False
    environment = os.environ | {"REFLLM_STACK_RESULTS": str(RESULTS / f"{name}.json")}
    environment |= {"HYPOTHESIS_PROFILE": "ci"}
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", str(STACKS / f"test_{name}.py")]
    ready = time.monotonic()
    code = subprocess.run(pytest, cwd=ROOT, env=environment, check=False).returncode
    said = "holds" if code == 0 else f"exit code {code}"
    print(f"{name}: {said}, {time.monotonic() - ready:.0f} s ({ready - start:.0f} s to set up)", flush=True)
    return code == 0


def made(name: str, environment: Environment) -> Path:
    """The interpreter of a stack's environment, which is made if it is not what it should be."""
    folder = ROOT / "build" / "stacks" / name
    python, stamp = folder / "bin" / "python", folder / "made-for"
    wanted = made_for(environment)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"{name}: making build/stacks/{name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for arguments in installs(environment):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True, cwd=ROOT)
    finder = re.search(r"^FINDER := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert finder is not None
    (folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / FIRST).write_text(finder[1] + "\n")
    stamp.write_text(wanted)
    return python


def installs(environment: Environment) -> list[list[str]]:
    """The arguments of each `pip install`. Torch comes first: without a GPU that takes the small build."""
    torch = [requirement for requirement in extras()["witness"] if requirement.startswith("torch==")]
    tests = [requirement for requirement in extras()["test"] if requirement.startswith(("pytest>", "triton=="))]
    pins = [*(["--no-deps"] if environment.alone else []), *environment.pins, *environment.besides]
    return [torch, ["--editable", f".[{','.join(BASE)}]", *tests], *([pins] if environment.pins else [])]


def made_for(environment: Environment) -> str:
    """What an environment follows from, as one line."""
    text = json.dumps([installs(environment), extras()]) + sys.version
    return hashlib.sha256(text.encode()).hexdigest()


def page() -> str:
    """docs/stacks.md, of the results in docs/stacks."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    lines = [INTRODUCTION, "| stack | versions | formats | right models hold | planted bugs named |"]
    lines += ["|---|---|---|---|---|", *(_row(stack) for stack in found), ""]
    for stack in found:
        lines += [f"## {stack['stack']}", "", *_right(stack), *_bugs(stack)]
    return "\n".join(lines).rstrip() + "\n"


def _row(stack: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stack["versions"].items())
    exactly = sum(bug["of"] == 1 for bug in stack["bugs"])
    spans = "" if exactly == len(stack["bugs"]) else f", {exactly} of them to the operator"
    return (
        f"| {stack['stack']} | {versions} | {', '.join(stack['dtypes'])} | {len(stack['right'])} | "
        f"{len(stack['bugs'])}{spans} |"
    )


def _right(stack: dict[str, Any]) -> list[str]:
    lines = ["| right model | format | inputs | values shown | end to end, sigma |", "|---|---|---|---|---|"]
    for run in stack["right"]:
        inputs = ", ".join(run["inputs"])
        lines.append(f"| {run['checkpoint']} | {run['dtype']} | {inputs} | {run['values']} | {run['sigma']:.2f} |")
    return [*lines, ""]


def _bugs(stack: dict[str, Any]) -> list[str]:
    lines = ["| planted bug | in | format | named first | because |", "|---|---|---|---|---|"]
    for bug in stack["bugs"]:
        span = "" if bug["of"] == 1 else f", last of {bug['of']} values together"
        where = f"`{bug['named']}`{span}"
        lines.append(f"| {bug['bug']} | {bug['checkpoint']} | {bug['dtype']} | {where} | {bug['said']} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
