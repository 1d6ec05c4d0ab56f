"""How many examples a drawn test takes, where many are cheap to have and few are enough for what they have found."""

import os


def examples(every_time: int, searching: int) -> int:
    """The first on every run of the tests (profile "ci", the same ones each time), the second where new ones are
    looked for (`make test-long`, or pytest alone)."""
    return every_time if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else searching
