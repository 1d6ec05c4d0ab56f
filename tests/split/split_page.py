"""docs/split.md: real runs over ranks, right ones and planted bugs, beside what other projects' tests ask of them.

    python tests/split/split_page.py docs/split.md          # some minutes on one core

Each run is a program of torch.distributed over gloo (parallel_arcee.py beside this file). Exit code 1 where a right run
does not hold, or a bug is not found at its operator.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def run_variants(checkpoint: Path, out: Path, variants: Sequence[str], ranks: int, tokens: int = 24) -> None:
    """Runs all variants in `ranks` processes, which write their traces into folders of `out`."""
    import torch
    import transformers
    from transformers.models.arcee.modeling_arcee import ArceeRotaryEmbedding

    ids = _ids(tokens)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    cos, sin = ArceeRotaryEmbedding(config)(torch.zeros(1, 1), torch.arange(tokens)[None])
    half = cos.shape[-1] // 2
    inputs = out / "inputs.npz"
    np.savez(inputs, ids=ids, cos=cos[0, :, :half].numpy(), sin=sin[0, :, :half].numpy())
    program = [str(HERE / "parallel_arcee.py"), str(checkpoint), str(inputs), str(out), *variants]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    done = subprocess.run(
        torchrun, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def _ids(tokens: int) -> np.ndarray:
    """The tokens of every run, [2, tokens]."""
    return np.random.default_rng(0).integers(0, 640, (2, tokens))


@dataclass(frozen=True)
class Row:
    """One run. named: the operator named first, copies that differ before it; who: which rank. others: whether each
    criterion of others lets it pass."""

    variant: str
    verdict: str
    named: str
    who: str
    ratios: tuple[float, float]
    others: tuple[bool, ...]


CRITERIA = ("allclose 5e-3", "rtol 1.6e-2, atol 1e-5", "perturbed input, 10 x")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path)
    page = parser.parse_args(arguments).page
    rows = measured()
    page.write_text(text(rows))
    return 0 if all(is_told(row) for row in rows) else 1


def measured() -> list[Row]:
    """All variants in two dtypes over two ranks."""
    import parallel_arcee as program

    from refllm import golden

    folder = golden.path("arcee-tiny")
    variants = [f"tp/{d}/{bug}" for d in ("bfloat16", "float32") for bug in program.TENSOR_BUGS]
    variants += [f"cp/{d}/{bug}" for d in ("bfloat16", "float32") for bug in program.CONTEXT_BUGS]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        run_variants(folder, out, variants, ranks=2)
        return [_row(folder, out, variant) for variant in variants]


def _row(folder: Path, out: Path, variant: str) -> Row:
    from refllm.check.asked import Asked
    from refllm.check.ranks import Ranks
    from refllm.check.recorded import check_ranks
    from refllm.check.run import load

    print(variant, file=sys.stderr, flush=True)
    ranks = Ranks.load(out / variant.replace("/", "-"))
    report = check_ranks(partial(load, folder), ranks, Asked(), "arcee-tiny", explain=False)
    first = report.first_failure
    named = report.copies[0].partition(" ")[0] if report.copies else "" if first is None else first.name
    own = [tap.isolated.ratio for tap in report.taps if tap.isolated is not None and tap.isolated.ratio]
    who = "; ".join([*report.copies[:1], *report.blamed]).replace("model.", "")
    return Row(variant, report.verdict, named, who, (min(own), max(own)), _others(folder, ranks, variant))


def _others(folder: Path, ranks: "object", variant: str) -> tuple[bool, ...]:
    """Whether the logits pass the criteria of others, beside Transformers' of one process in the same format."""
    _, dtype, _ = variant.split("/")
    whole = ranks.whole()[0]  # type: ignore[attr-defined]
    known, moved = _known(folder, dtype, whole.inputs.input_ids.shape[1])
    found = whole.taps["lm_head"]
    norm = np.linalg.norm
    return (
        bool(np.allclose(found, known, rtol=5e-3, atol=5e-3)),
        bool(np.allclose(found, known, rtol=1.6e-2, atol=1e-5)),
        bool(norm(found - known) <= 10 * norm(moved - known)),
    )


@cache
def _known(folder: Path, dtype: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' logits, and those after a relative change of the input by one rounding: the estimate of TTrace, by
    its description."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.from_numpy(_ids(tokens))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0)) * torch.finfo(embeds.dtype).eps
        moved = (embeds.float() * (1 + noise)).to(embeds.dtype)
        return model(ids).logits.float().numpy(), model(inputs_embeds=moved).logits.float().numpy()


def is_right(row: Row) -> bool:
    """Whether nothing is planted in it; a float32 run has float32 sums anyway, and merging in bfloat16 is a bug."""
    return row.variant.split("/")[2] in ("right", "float32 sums")


def is_told(row: Row) -> bool:
    """Whether the verdict is true."""
    return (row.verdict == "holds") == is_right(row)


def text(rows: Sequence[Row]) -> str:
    """The page."""
    right, wrong = [r for r in rows if is_right(r)], [r for r in rows if not is_right(r)]
    lines = [
        "# Models split over ranks",
        "",
        "Each run below is a program of torch.distributed over gloo, in two processes: a hand-written Arcee model,",
        "tensor parallel (tp) or context parallel (cp), whose ranks write their values and placements",
        "([docs/recording.md](../" + "docs/recording.md)). `refllm check CHECKPOINT --trace FOLDER` puts them together",
        "and judges.",
        "Written by a command:",
        "",
        "    python tests/split/split_page.py docs/split.md",
        "",
        f"Right runs that hold: {sum(map(is_told, right))} of {len(right)}. Planted bugs that are found: "
        f"{sum(map(is_told, wrong))} of {len(wrong)}, with a sentence on the rank: {sum(bool(r.who) for r in wrong)}.",
        "",
        "Others' criteria, on the logits beside those of one process in the same format: bugs that they let pass, and",
        "right runs that they reject. The last is an estimate from a perturbed input, as in arXiv 2506.09280.",
        "",
        "| criterion | bugs that pass | right runs rejected |",
        "|---|---|---|",
        _others_row("ours", [not is_told(r) for r in wrong], [not is_told(r) for r in right]),
    ]
    for i, name in enumerate(CRITERIA):
        lines.append(_others_row(name, [r.others[i] for r in wrong], [not r.others[i] for r in right]))
    lines += ["", "| right run | error over predicted, own inputs |", "|---|---|"]
    lines += [f"| {r.variant} | {r.ratios[0]:.2f} to {r.ratios[1]:.2f} |" for r in right]
    lines += ["", "| planted | named first | whose |", "|---|---|---|"]
    lines += [f"| {r.variant} | {r.named.removeprefix('model.')} | {r.who} |" for r in wrong]
    return "\n".join(lines) + "\n"


def _others_row(name: str, passed: list[bool], rejected: list[bool]) -> str:
    return f"| {name} | {sum(passed)} of {len(passed)} | {sum(rejected)} of {len(rejected)} |"


if __name__ == "__main__":
    sys.exit(main())
