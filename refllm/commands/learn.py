"""`refllm learn`: exercises with a coach, and what the words of the reports mean."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.accuracy.verdicts import SCHEMA
from refllm.commands.shared_options import FINDING, Json, console, more_than_none, to_stdout, write_json
from refllm.errors import InputError

if TYPE_CHECKING:
    from refllm.learn.coach import Review
    from refllm.learn.course import Course
    from refllm.learn.exercise import Exercise

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Exercises with a coach, and what helps to understand the reports and the models.",
)

_Folder = Annotated[
    Path | None,
    typer.Option("--course", metavar="COURSE", help="The folder of the course; else this one, or ./course."),
]
_Name = Annotated[
    str | None, typer.Argument(metavar="EXERCISE", help="Its name or its file; without it the next that is not done.")
]


@app.callback()
def describe() -> None:
    """Exercises with a coach, and what helps to understand the reports and the models."""


@app.command()
def new(course: Annotated[Path, typer.Argument(metavar="COURSE", help="The folder to make.")]) -> None:
    """Make a course: a folder of plain .py files. Files that are there stay as they are."""
    from refllm.learn.course import Course, listed

    made = Course.new(course)
    out = console(quiet=False)
    out.print(f"{len(listed())} exercises in {course}")
    _show_next(out, made)


@app.command("list")
def list_exercises(course: _Folder = None, json_file: Json = None) -> None:
    """All exercises, and what is done."""
    from rich.text import Text

    from refllm.learn.course import Course, file_name, listed
    from refllm.learn.exercise import TRACKS
    from refllm.learn.progress import Done
    from refllm.terminal.fitted_table import Table

    folder = _found(course)
    made = Course(folder) if folder else None
    done = made.progress.read() if made else {}
    table = Table(box=None)
    for word in ("exercise", "what it is", "verdict", "tries"):
        table.add_column(word)
    for track, what in TRACKS.items():
        table.add_row(Text(track, style="bold"), Text(what, style="bold"))
        for one in (one for one in listed() if one.track == track):
            entry = done.get(one.name, Done())
            said = "done" if entry.done else entry.verdict
            table.add_row(f"  {one.name}", one.title, said, str(entry.tries or ""))
    out = console(quiet=to_stdout(json_file))
    out.print(table)
    count = sum(1 for one in listed() if done.get(one.name, Done()).done)
    out.print(f"{count} of {len(listed())} done" if made else "no course here: refllm learn new COURSE makes one")
    if made:
        _say_put_aside(made, out)
    entries = [{"exercise": one.name, "track": one.track, "title": one.title, "file": file_name(one),
                **asdict(done.get(one.name, Done()))} for one in listed()]  # fmt: skip
    write_json({"schema": SCHEMA, "done": count, "of": len(entries), "exercises": entries}, json_file)


@app.command("next")
def next_exercise(course: _Folder = None) -> None:
    """The first exercise that is not done: its statement, and the file to write in."""
    _show_next(console(quiet=False), _course(course))


@app.command()
def show(name: _Name = None, course: _Folder = None) -> None:
    """The statement of an exercise."""
    from refllm.learn.course import Course
    from refllm.learn.exercises import find

    folder = _found(course)
    made = Course(folder) if folder else None
    one = find(name) if name else _pick(_course(course), None)
    _statement(console(quiet=False), one, made)


@app.command()
def check(
    name: _Name = None,
    course: _Folder = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE.PY", help="The answer, where it is in no course.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every exercise that is begun.")] = False,
    tell: Annotated[bool, typer.Option("--tell", help="Show all three hints at once.")] = False,
    seconds: Annotated[
        float | None, typer.Option("--time-limit", callback=more_than_none("--time-limit"), help="Seconds per answer.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Check an answer. Exit code 0 if it is right, 1 if not; with --all, 0 if every exercise is done."""
    out = console(quiet=to_stdout(json_file))
    if every:
        _check_all(_course(course), out, json_file, seconds)
        return
    review, entry, path = _checked(name, course, file, seconds)
    one = _exercise(review)
    _say(out, review, one, 3 if tell else entry)
    if not file:
        _say_put_aside(_course(course), out)
    write_json({"schema": SCHEMA, **_values(review, one, path, entry)}, json_file)
    if not review.done:
        raise typer.Exit(FINDING)


@app.command()
def watch(
    name: _Name = None,
    course: _Folder = None,
    seconds: Annotated[
        float | None, typer.Option("--time", callback=more_than_none("--time"), help="End after so many seconds.")
    ] = None,
) -> None:
    """Check an answer again whenever its file is saved, until Ctrl-C."""
    from refllm.learn.watch import saves

    made = _course(course)
    one = _pick(made, name)
    out = console(quiet=False)
    out.print(f"watching {made.path(one)}; Ctrl-C ends it", style="dim")
    for _ in saves(made.path(one), seconds):
        review, entry, _ = _checked(one.name, course, None, None)
        out.rule()
        _say(out, review, one, entry)


@app.command()
def hint(name: _Name = None, course: _Folder = None, json_file: Json = None) -> None:
    """One more hint on an answer as it stands: where to look, then what is wrong in a sentence, then the line."""
    from refllm.learn.drawing import hints_of, told
    from refllm.learn.exercises import find

    made = _course(course)
    one = find(name) if name else _pick(made, None)
    review, _, _ = _checked(one.name, course, None, None, tried=False)
    out = console(quiet=to_stdout(json_file))
    if review.done:
        out.print(f"{one.name} is done")
        write_json({"schema": SCHEMA, "exercise": one.name, "hints": []}, json_file)
        return
    hints = made.progress.asked(one.name).hints
    for line in told(review, one, hints):
        out.print(line)
    write_json({"schema": SCHEMA, "exercise": one.name, "hints": list(hints_of(review, one)[:hints])}, json_file)


@app.command()
def solution(
    name: Annotated[str, typer.Argument(metavar="EXERCISE")],
    course: _Folder = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Before the exercise is done too.")] = False,
) -> None:
    """The solution of an exercise that is done."""
    from refllm.learn.course import Course
    from refllm.learn.exercises import find

    one = find(name)
    folder = _found(course)
    if not anyway and not (folder and Course(folder).progress[one.name].done):
        raise InputError(
            f"{one.name} is not done yet; refllm learn hint {one.name} helps, --anyway shows it all the same"
        )
    print(one.whole, end="")


@app.command()
def reset(name: Annotated[str, typer.Argument(metavar="EXERCISE")], course: _Folder = None) -> None:
    """Put the file of an exercise back as it was. What was written is kept beside it."""
    from refllm.learn.exercises import find

    made = _course(course)
    one = find(name)
    kept = made.reset(one)
    console(quiet=False).print(f"{made.path(one)} is as it was; what was in it is in {kept.name}")


@app.command()
def term(
    name: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="A word of a report; without it, all.")
    ] = None,
    json_file: Json = None,
) -> None:
    """What a word of the reports means: `refllm learn term sigma`."""
    from rich.text import Text

    from refllm.learn.glossary import find, terms
    from refllm.terminal.fitted_table import Table

    out = console(quiet=to_stdout(json_file))
    if not name:
        table = Table.grid(padding=(0, 2, 0, 0))
        for one in terms().values():
            table.add_row(Text(one.name, style="bold"), Text(one.means))
        out.print(table)
        write_json({one.name: asdict(one) for one in terms().values()}, json_file)
        return
    found = find(" ".join(name))
    out.print(_entry(found))
    write_json(asdict(found), json_file)


@app.command()
def book(
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where the pages go.")] = Path("docs/book"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; compare with what stands in the folder. 1 if it differs.")
    ] = False,
) -> None:
    """The book: pages about operators, families and what a beginner needs, made from the code that they show."""
    from refllm.learn.book import make

    if not check:
        print(f"{make.write(output)} files in {output}; begin with {output / 'index.html'}")
        return
    if found := make.differences(make.pages(), output):
        print(*found, sep="\n")
        raise typer.Exit(1)
    print(f"{output} is what its sources make")


def _entry(found: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    others = f" (also: {', '.join(found.also)})" if found.also else ""
    lines = [Text.assemble((found.name, "bold"), (others, "dim")), Text(found.means)]
    lines += [Text(""), Text(found.more)] if found.more else []
    lines += [Text(""), Text(f"see {', '.join(found.see)}", style="dim")] if found.see else []
    return Group(*lines)


# ------------------------------------------------------------------------------------------------------ exercises


def _found(course: Path | None) -> Path | None:
    """The folder of the course that is meant; None where there is none and none was named."""
    from refllm.learn.progress import NAME

    if course is not None:
        return course
    return next((folder for folder in (Path(), Path("course")) if (folder / NAME).is_file()), None)


def _course(course: Path | None) -> "Course":
    from refllm.learn.course import Course

    folder = _found(course)
    if folder is None:
        raise InputError("there is no course here: `refllm learn new COURSE` makes one, and --course says where it is")
    return Course(folder)


def _pick(made: "Course", name: str | None) -> "Exercise":
    from refllm.learn.exercises import find

    if name is not None:
        return find(name)
    one = made.next()
    if one is None:
        raise InputError("every exercise is done; name one")
    return one


def _exercise(review: "Review") -> "Exercise":
    from refllm.learn.exercises import find

    return find(review.exercise)


def _checked(
    name: str | None, course: Path | None, file: Path | None, seconds: float | None, tried: bool = True
) -> tuple["Review", int, Path]:
    """(what the coach says, how many hints were asked for, the file). tried: whether it counts as a try."""
    from refllm.learn.attempt import SECONDS
    from refllm.learn.coach import review
    from refllm.learn.exercises import find

    limit = seconds or SECONDS
    if file is not None:
        return review(find(name or file.name), file, seconds=limit), 0, file
    made = _course(course)
    one = _pick(made, name)
    found = review(one, made.path(one), seconds=limit)
    return found, made.progress.checked(found, tried).hints, made.path(one)


def _check_all(made: "Course", out: Any, json_file: Path | None, seconds: float | None) -> None:
    from refllm.learn.attempt import SECONDS
    from refllm.learn.coach import review
    from refllm.learn.course import listed

    values, done = [], 0
    for one in listed():
        found = review(one, made.path(one), seconds=seconds or SECONDS)
        entry = made.progress.checked(found)
        done += found.done
        values.append(_values(found, one, made.path(one), entry.hints))
        said = "; ".join(named.name for named in found.named) or (found.trouble.text if found.trouble else "")
        out.print(f"{one.name}: {found.verdict}{f' ({said})' if said else ''}")
    out.print(f"{done} of {len(values)} done")
    write_json({"schema": SCHEMA, "done": done, "of": len(values), "exercises": values}, json_file)
    if done < len(values):
        raise typer.Exit(FINDING)


def _values(review: "Review", one: "Exercise", path: Path, hints: int) -> dict[str, Any]:
    from refllm.learn.drawing import hints_of, question

    return {
        "exercise": one.name,
        "track": one.track,
        "file": str(path),
        "verdict": review.verdict,
        "done": review.done,
        "stages": {stage: "holds" if ok else "fails" for stage, ok in review.stages.items()},
        "named": [asdict(named) for named in review.named],
        "where": review.where,
        "printed": review.printed,
        "trouble": asdict(review.trouble) if review.trouble else None,
        "question": question(review, one) if review.by_values and review.drawn else "",
        "hints": [] if review.done else list(hints_of(review, one)),
        "hints_told": hints,
        "seconds": round(review.seconds, 3),
    }


def _say(out: Any, review: "Review", one: "Exercise", hints: int) -> None:
    from refllm.learn.drawing import drawn

    out.print(drawn(review, one, hints))
    if review.verdict == "fails" and hints < 3:
        out.print(f"refllm learn hint {one.name} says more", style="dim")


def _show_next(out: Any, made: "Course") -> None:
    one = made.next()
    if one is None:
        out.print("every exercise is done")
        return
    _statement(out, one, made)


def _statement(out: Any, one: "Exercise", made: "Course | None") -> None:
    import textwrap

    from rich.text import Text

    out.print(Text(f"{one.title} ({one.name})", style="bold"))
    out.print(Text(textwrap.dedent(one.statement).strip()))
    if made is not None:
        out.print(f"write in {made.path(one)}, then: refllm learn check {one.name}")


def _say_put_aside(made: "Course", out: Any) -> None:
    if made.progress.put_aside:
        out.print("progress.json could not be read and is now progress.unreadable.json: refllm learn check --all")
