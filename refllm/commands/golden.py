"""`refllm golden`: verify the golden vectors, make them again, show them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.accuracy.verdicts import SCHEMA, verdict
from refllm.commands.shared_options import FINDING, Json, console, to_stdout, write_json
from refllm.errors import InputError
from refllm.extras import require
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Golden vectors: inputs, exact outputs and their predicted error, for every operator and family.",
)

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="An operator, a family, a golden; else all.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", metavar="DIR", help="Where manifest.json and vectors/ lie; default: our own.")
]


@app.command()
def verify(
    names: Names = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="numpy (the reference), torch or triton; repeat for more. Default: numpy."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="float64 (numpy alone), float32, bfloat16, float16; repeat for more. Default: all it has; of "
            "interpreted triton float32 and bfloat16.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Of torch and triton: cpu or cuda. Default: cpu.")
    ] = None,
    folder: Folder = None,
    json_file: Json = None,
) -> None:
    """Check the files' hashes, then compute every golden again: exactly, and in each dtype within its sigma."""
    from refllm.golden import show
    from refllm.golden import verify as work
    from refllm.golden.manifest import other_versions, read_manifest

    where, asked = _folder(folder), list(names or ())
    manifest = read_manifest(where)
    changed = work.verify_files(where, manifest, asked)
    results = []
    # What cannot be trusted is not computed: its group is left out.
    broken = {finding.name for finding in changed}
    with StatusLine(sys.stderr) as step:
        for one, kind in work.combinations(backend or ["numpy"], dtype or (), device):
            goldens = (g for g in work.goldens_of(where, manifest, asked, without=broken))
            results.append(work.verify(goldens, one, kind, device, step))
    out = console(quiet=to_stdout(json_file))
    versions = other_versions(manifest)
    if versions:  # no finding: whether it matters is what was computed
        out.print(versions, soft_wrap=True, markup=False)
    for finding in changed:
        out.print(finding.problem, soft_wrap=True, markup=False)
    for result in results:
        for finding in result.findings:
            out.print(f"{finding.name}: {finding.problem}", soft_wrap=True, markup=False)
    out.print(show.table_of_verified(results))
    out.print(show.closing_of_verified(results, changed), soft_wrap=True)
    found = verdict(changed or any(result.findings for result in results))
    write_json(
        {
            "schema": SCHEMA,
            "verdict": found,
            "versions": versions,
            "files": [finding.to_dict() for finding in changed],
            "results": [result.to_dict() for result in results],
        },
        json_file,
    )
    if found != "holds":
        raise typer.Exit(FINDING)


@app.command()
def make(
    names: Names = None,
    yes: Annotated[bool, typer.Option("--yes", help="Replace without asking.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace also what changed by no more than float64 rounding.")
    ] = False,
    folder: Folder = None,
    json_file: Json = None,
) -> None:
    """Compute goldens again with a witness beside them, print their change in sigma, and replace them if told to."""
    require("golden make", "torch", "transformers")
    from refllm.golden import make_vectors, show
    from refllm.golden.manifest import MANIFEST
    from refllm.golden.store import VECTORS

    where = _folder(folder)
    if yes:  # said before the work, not after it
        output_file.must_be_writable("--folder", where / MANIFEST)
        output_file.must_be_folder("--folder", where / VECTORS)
    with StatusLine(sys.stderr) as step:
        made = make_vectors.make(where, names or (), step)
    out = console(quiet=to_stdout(json_file))
    same = sum(change.kind == "same" for change in made.changes)
    if made.differs:
        out.print(show.table_of_changes(made.changes))
    out.print(f"{len(made.changes)} goldens made, {same} of them as they were (up to float64 rounding)")
    replaced = (made.differs or force) and (yes or _asked(made.changes))
    if replaced:
        made.replace()
        out.print(f"{where}: replaced", soft_wrap=True)
    changes: list[dict[str, Any]] = [change.to_dict() for change in made.changes]
    write_json({"replaced": replaced, "changes": changes}, json_file)
    if made.differs and not replaced:
        out.print("nothing was replaced; --yes does it")
        raise typer.Exit(FINDING)


@app.command("show")
def show_command(names: Names = None, folder: Folder = None, json_file: Json = None) -> None:
    """List the goldens, or show what one holds: its inputs, outputs and predicted errors."""
    from refllm.golden import show
    from refllm.golden.cases import select
    from refllm.golden.manifest import read_manifest
    from refllm.golden.verify import goldens_of

    where = _folder(folder)
    manifest = read_manifest(where)
    chosen = select(names or (), list(manifest["cases"]))
    out = console(quiet=to_stdout(json_file))
    if names and len(chosen) == 1:
        (one,) = goldens_of(where, manifest, chosen)
        for line in show.description(one):
            out.print(line, soft_wrap=True, markup=False)
        out.print(show.table_of_tensors(one))
    else:
        out.print(show.table_of_cases(manifest, chosen))
        out.print(show.closing_of_cases(manifest, chosen), soft_wrap=True)
    write_json({name: manifest["cases"][name] for name in chosen}, json_file)


def _folder(folder: Path | None) -> Path:
    """The folder given, or that of the package. Raises InputError for what is no folder."""
    from refllm import golden

    if folder is not None and not folder.is_dir():
        raise InputError(f"--folder {folder}: no such folder; expected one with manifest.json and vectors/")
    return folder or golden.FOLDER


def _asked(changes: Any) -> bool:
    """The answer of the user; no, where nobody is there to ask."""
    return sys.stdin.isatty() and typer.confirm(f"replace {sum(c.kind != 'same' for c in changes)} goldens?")
