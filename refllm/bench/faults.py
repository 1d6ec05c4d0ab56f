"""What a form of a call raised, as what its row says: whose fault it is, and in how many words."""

from collections.abc import Iterator
from contextlib import contextmanager

from refllm.bench.forms import NotTakenError
from refllm.bench.results import Row


def clause(error: Exception) -> str:
    """Type and first line of whatever a library raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def excuse(error: Exception, ours: bool) -> tuple[str, str]:
    """(note, finding) of a form that raised this. Too little memory is nobody's mistake, nor is what a peer lacks."""
    import torch

    if isinstance(error, NotTakenError):
        return f"not timed: {error}", ""
    # A fast model says it in a sentence of its own, whose cause it is.
    if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
        return "not timed: not enough memory", ""
    said = clause(error)
    return f"not timed: it raised {said}", said if ours else ""


@contextmanager
def guarded(row: Row) -> Iterator[None]:
    """Whatever is raised inside becomes the row's note, and of ours its finding; the rows after it still count."""
    try:
        yield
    except Exception as error:
        row.time = None
        row.note, row.finding = excuse(error, row.ours)
