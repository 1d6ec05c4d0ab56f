"""How sharp the check of gradients is, and that it raises no false alarm: writes docs/gradients.md case by case.

    python -m refllm.mutants.gradient_validation docs/gradients.md

What was done stands in the JSON file beside the page, and is not done again: a run that was ended goes on where it was.
Needs Torch and Transformers, and a C++ compiler for the compiled cases.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refllm.accuracy.verdicts import verdict
from refllm.mutants.gradient_runs import LAYERS, cases, planted, run_case
from refllm.mutants.gradients_page import page
from refllm.storage import output_file

PLANTED_IN = ("bfloat16", "float32")
"""The formats in which bugs are planted."""
Log = Callable[[str], None]


def parts() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what measures it) of all that is measured."""
    for model in LAYERS:
        for dtype in PLANTED_IN:
            name = f"planted in {model}, {dtype}"
            yield name, lambda m=model, d=dtype: [asdict(found) for found in planted(m, d)]  # type: ignore[misc]
    for case in cases():
        yield case.key, lambda case=case: asdict(run_case(case))  # type: ignore[misc]


def validate(markdown: Path, log: Log = lambda text: None, only: str = "") -> dict[str, Any]:
    """Measures what is missing and writes both files after each part. only: of what has this in its name."""
    state = markdown.with_suffix(".json")
    done: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    for name, measure in parts():
        if name in done or only not in name:
            continue
        done[name] = measure()
        output_file.replace(state, json.dumps(done, indent=0) + "\n")
        output_file.replace(markdown, page(done))
        log(name)
    output_file.replace(markdown, page(done))
    return done


def main() -> int:
    """The command. Exit code 1 where anything is outside of what docs/gradients.md says."""
    from refllm.check.adapters.transformers import quiet_transformers
    from refllm.mutants.gradients_page import holds

    parser = argparse.ArgumentParser(description="Measure the check of gradients.")
    parser.add_argument("markdown", type=Path, help="the page; its JSON stands beside it")
    parser.add_argument("--only", default="", help="what has this in its name")
    arguments = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on tiny products its threads wait longer than they work
    quiet_transformers()
    import torch

    torch.set_num_threads(1)
    found = validate(arguments.markdown, lambda text: print(text, flush=True), arguments.only)
    print(verdict(not holds(found)))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
