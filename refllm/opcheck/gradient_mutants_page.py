"""The measured part of docs/mutants-backward.md: bugs of gradients, and how many of them a test finds.

What writes it, and the catalogue below it: `mutants_page.py`.
"""

from collections.abc import Mapping

from refllm.opcheck import mutants_page
from refllm.opcheck.mutants_measured import Results
from refllm.opcheck.mutants_page import by_level, places_told, rate, share_found, table

_COMMAND = "python -m refllm.opcheck.mutants_page docs/mutants-backward.md --json docs/mutants-backward.json --backward"


def measured_part(results: Results) -> str:
    """What was measured, without the catalogue."""
    from refllm.kernels.mutants import catalogue

    bugs = [(m, one) for m in catalogue(backward=True) if not m.equivalent and (one := results.of(m)) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    real = len({m.source for m, _ in bugs if not m.source.startswith("one-line")})
    lines = [
        "# How good is a test of gradients?",
        "",
        "Every bug of a catalogue is planted in the backward operator that has it, and a test is asked, as for forward",
        "operators ([docs/mutants.md](../"
        + "docs/mutants.md)). Whoever writes a test of gradients can ask the same of it:",
        "",
        "    refllm audit rms_norm_backward --test my_tests.py:test_my_gradients",
        "",
        "where `test_my_gradients(fn)` calls `fn(dy, x, weight, eps)` for dx and dweight. Written by",
        "",
        f"    {_COMMAND}",
        "",
        f"Measured with {versions}. The bugs come from {real} issues of other projects, and from one-line mistakes.",
        "",
        "## Kill rates",
        "",
        "The share of bugs that are found, and how many there are. `check-op` is `refllm check-op OPERATOR_backward`",
        "on its fixed calls and up to 100 drawn ones; a bug counts as found if it is in every dtype in which it makes",
        "a difference. The others are the gradient tests of other projects: inputs drawn as theirs, in shapes of their",
        "lists, compared by their limits, in the dtype that is named (flash-linear-attention: float32 for norms,",
        "rotations and SwiGLU, bfloat16 for losses, float16 for attention). There are fewer rows and words than they",
        "take, which makes absolute limits stricter. `gradcheck` is torch.autograd.gradcheck as it comes, on a few",
        "rows: differences of the forward pass in float64 against gradients in float32. An empty place: that project",
        "does not test it. They are asked for the bugs in plain Torch that make a difference in their dtype.",
        "",
        *_kill_rates(results, bugs),
        "",
        *by_level(bugs),
        *places_told(bugs),
        "## False alarms",
        "",
        "Right gradients, written in other ways: by autograd of Torch's functions, by loops, in float64, with the sums",
        "in another order, in NumPy. How many of them each test rejects, and how many there are.",
        "",
        *_false_alarms(results),
        "",
    ]
    lines += _wrong(results, bugs)
    return "\n".join(lines)


def _kill_rates(results: Results, bugs: mutants_page.Bugs) -> list[str]:
    names = _names(results.typical)
    forms = [form for form in mutants_page.TARGETS if any(m.form == form for m, _ in bugs)]
    rows = []
    for operator, theirs in results.typical.items():
        own = [(m, one) for m, one in bugs if m.operator == operator]
        by_form = (share_found(one for m, one in own if m.form == form) for form in forms)
        rows.append((operator, *by_form, *(rate(*theirs.get(name, (0, 0))) for name in names)))
    every = [share_found(one for m, one in bugs if m.form == form) for form in forms]
    rows.append(("**all**", *every, *(rate(*_sums(results.typical, name)) for name in names)))
    return table(("operator", *(f"check-op, {form}" for form in forms), *names), rows)


def _false_alarms(results: Results) -> list[str]:
    names = _names(results.alarms)
    rows = []
    for operator, theirs in results.alarms.items():
        ours = [said for name, said in results.right.items() if name.startswith(f"{operator}: ")]
        rows.append((operator, f"{sum(map(bool, ours))} of {len(ours)}", *(_of(theirs.get(name)) for name in names)))
    every = f"{sum(map(bool, results.right.values()))} of {len(results.right)}"
    rows.append(("**all**", every, *(_of(_sums(results.alarms, name)) for name in names)))
    return table(("operator", "check-op, every dtype", *names), rows)


def _of(counted: tuple[int, int] | None) -> str:
    return f"{counted[0]} of {counted[1]}" if counted else ""


def _names(by_operator: Mapping[str, Mapping[str, tuple[int, int]]]) -> list[str]:
    """The tests, in the order in which they were listed: a project is missing where it does not test an operator."""
    from refllm.opcheck.gradient_tests import GRADCHECK, PROJECTS

    measured = {name for by in by_operator.values() for name in by}
    return [name for name in (*PROJECTS, GRADCHECK) if name in measured]


def _sums(by_operator: Mapping[str, Mapping[str, tuple[int, int]]], name: str) -> tuple[int, int]:
    own = [by[name] for by in by_operator.values() if name in by]
    return sum(n for n, _ in own), sum(of for _, of in own)


def _wrong(results: Results, bugs: mutants_page.Bugs) -> list[str]:
    """What our own check misses, and what it calls wrong though it is not."""
    missed = [f"- {m.operator}, {m.form}: {m.what}" for m, one in bugs if not one.found]
    rejected = [f"- {name}: {said}" for name, said in results.right.items() if said]
    found = ["Survived:", "", *missed, ""] if missed else []
    return found + (["Rejected though nothing is wrong:", "", *rejected, ""] if rejected else [])
