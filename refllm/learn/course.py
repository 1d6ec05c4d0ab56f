"""A course: a folder of plain .py files, one per exercise, and what was done in them."""

from pathlib import Path

from refllm.errors import InputError
from refllm.learn.exercise import TRACKS, Exercise
from refllm.learn.exercises import exercises
from refllm.learn.progress import NAME, Done, Progress
from refllm.storage import output_file


class Course:
    """The folder and its exercises. Raises InputError for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        if not (folder / NAME).is_file() and not any((folder / file_name(one)).is_file() for one in listed()):
            raise InputError(
                f"{folder} is no course: `refllm learn new COURSE` makes one, and --course says where it is"
            )
        self.folder, self.progress = folder, Progress(folder)

    @classmethod
    def new(cls, folder: Path) -> "Course":
        """Writes every file that is not there yet, and leaves those that are. Raises InputError."""
        output_file.must_be_folder("COURSE", folder)
        for one in listed():
            path = folder / file_name(one)
            output_file.must_be_folder("COURSE", path.parent)
            if not path.exists():
                output_file.write("COURSE", path, one.skeleton)
        if not (folder / NAME).is_file():
            Progress(folder).write({})
        return cls(folder)

    def path(self, one: Exercise) -> Path:
        """Where the answer to an exercise is written."""
        return self.folder / file_name(one)

    def next(self) -> Exercise | None:
        """The first exercise that is not done; None where all are."""
        done = self.progress.read()
        return next((one for one in listed() if not done.get(one.name, Done()).done), None)

    def reset(self, one: Exercise) -> Path:
        """Puts the skeleton back. What was there is kept beside it, and the path of that is returned."""
        path = self.path(one)
        kept = path.with_suffix(".py.before-reset")
        if path.is_file():
            output_file.write("reset", kept, path.read_bytes())
        output_file.must_be_folder("COURSE", path.parent)
        output_file.write("reset", path, one.skeleton)
        self.progress.reset(one.name)
        return kept


def listed() -> list[Exercise]:
    """All exercises in their order."""
    return list(exercises().values())


def file_name(one: Exercise) -> str:
    """The file of an exercise in a course: its track, its number in it, and its name."""
    track = [other for other in listed() if other.track == one.track]
    number = track.index(one) + 1
    assert one.track in TRACKS
    return f"{one.track}/{number:02d}_{one.name}.py"
