"""What a student has done: one file, progress.json, in the folder of the course.

It is read before every change and replaced in one piece, so a kill or a full disk costs the last step at most. A file
that cannot be read is put aside, and checking the answers again brings back what is done.
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refllm.errors import InputError
from refllm.learn.coach import Review
from refllm.storage import output_file
from refllm.storage.json_text import json_text

NAME = "progress.json"
BROKEN = "progress.unreadable.json"
SCHEMA = 1
MOST_HINTS = 3


@dataclass(frozen=True)
class Done:
    """What is known of one exercise. verdict: of the last check; "" before the first. done: when it was right for the
    first time, "" if never. tries: checks of what was not right. mistake: that was named last. hints: how many of its
    hints were asked for."""

    verdict: str = ""
    done: str = ""
    tries: int = 0
    mistake: str = ""
    hints: int = 0


class Progress:
    """The file in the folder of a course. put_aside: whether there was one that could not be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.put_aside = folder, folder / NAME, False

    def __getitem__(self, name: str) -> Done:
        return self.read().get(name, Done())

    def read(self) -> dict[str, Done]:
        """Every exercise that was begun, by name."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {name: _done(entry) for name, entry in found["exercises"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            self.file.replace(self.folder / BROKEN)
            self.put_aside = True
            return {}

    def write(self, entries: dict[str, Done]) -> None:
        """Replaces the file. Raises InputError where it cannot be written."""
        content = {"schema": SCHEMA, "exercises": {name: asdict(entry) for name, entry in sorted(entries.items())}}
        output_file.write("progress", self.file, json_text(content) + "\n")

    def checked(self, review: Review, tried: bool = True) -> Done:
        """Notes the outcome of a check. Hints begin anew with another mistake. tried: whether it counts as a try."""
        entries = self.read()
        before = entries.get(review.exercise, Done())
        mistake = review.named[0].name if review.named else ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries[review.exercise] = replace(
            before,
            verdict=review.verdict,
            done=before.done or (now if review.done else ""),
            tries=before.tries + (tried and review.verdict == "fails"),
            mistake=mistake,
            hints=before.hints if mistake == before.mistake and not review.done else 0,
        )
        self.write(entries)
        return entries[review.exercise]

    def asked(self, name: str) -> Done:
        """Notes that one more hint was asked for."""
        entries = self.read()
        before = entries.get(name, Done())
        entries[name] = replace(before, hints=min(MOST_HINTS, before.hints + 1))
        self.write(entries)
        return entries[name]

    def reset(self, name: str) -> None:
        """Forgets an exercise."""
        entries = self.read()
        entries.pop(name, None)
        self.write(entries)


def _done(entry: dict[str, Any]) -> Done:
    kinds = {"verdict": str, "done": str, "tries": int, "mistake": str, "hints": int}
    if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
        raise ValueError("another form")
    return Done(**{name: entry[name] for name in kinds})
