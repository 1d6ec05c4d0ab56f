"""What is raised when a page no longer fits the code that it shows."""

from refllm.errors import RefllmError


class BookError(RefllmError):
    """A page of the book and the code disagree: an anchor fits no line, or a formula gives other numbers."""
