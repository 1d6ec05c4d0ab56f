"""Runs split over ranks: put together, compared where they are copies, judged, and the rank named that is wrong."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm import golden
from refllm.check.asked import Asked
from refllm.check.oracle import Report
from refllm.check.rank_trace import RankTrace
from refllm.check.ranks import Ranks
from refllm.check.recorded import check_ranks
from refllm.check.run import load
from refllm.commands.cli import app
from refllm.errors import InputError

NAME, IDS = "model.layers.0.mlp.act", np.arange(8).reshape(2, 4)


# ------------------------------------------------------------------------------------------------------- put together


def written(folder: Path, mesh: dict[str, int], pieces: dict[tuple[int, ...], Any], **placements: str) -> Path:
    """A file per rank, each with one value."""
    for rank, (at, piece) in enumerate(pieces.items()):
        trace = RankTrace(mesh, dict(zip(mesh, at, strict=True)), rank=rank, dtype="float32")
        trace.tap(NAME, np.asarray(piece, np.float32), **placements)
        trace.save(folder, IDS)
    return folder


def cut(x: np.ndarray, mesh: dict[str, int], axes: dict[str, int], at: tuple[int, ...]) -> np.ndarray:
    """A rank's piece, outer dimensions of the mesh first."""
    for (name, size), c in zip(mesh.items(), at, strict=True):
        x = np.array_split(x, size, axis=axes[name])[c] if name in axes else x
    return x


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    axes=st.dictionaries(st.sampled_from(["dp", "tp"]), st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_pieces_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int], axes: dict[str, int], seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 5, 7)).astype(np.float32)
    mesh = dict(zip(("dp", "tp"), sizes, strict=True))
    pieces = {at: cut(x, mesh, axes, at) for at in np.ndindex(*sizes)}
    folder = written(
        tmp_path_factory.mktemp("ranks"), mesh, pieces, **{name: f"Shard({axis})" for name, axis in axes.items()}
    )
    whole, differ = Ranks.load(folder).whole()
    np.testing.assert_array_equal(whole.taps[NAME], x)
    np.testing.assert_array_equal(whole.inputs.input_ids, IDS)
    assert differ == []


def test_zigzag_and_partial_sums(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(1, 8, 3)
    a, b, c, d = np.split(x, 4, axis=1)
    zigzag = written(
        tmp_path / "z",
        {"cp": 2},
        {(0,): np.concatenate([a, d], 1), (1,): np.concatenate([b, c], 1)},
        cp="Shard(1) zigzag",
    )
    np.testing.assert_array_equal(Ranks.load(zigzag).whole()[0].taps[NAME], x)
    parts = written(tmp_path / "p", {"tp": 2}, {(0,): x, (1,): 2 * x}, tp="Partial(sum)")
    np.testing.assert_array_equal(Ranks.load(parts).whole()[0].taps[NAME], 3 * x)


def test_copies_that_differ_in_a_bit_are_named_with_their_ranks(tmp_path: Path) -> None:
    x = np.ones((1, 4, 3), np.float32)
    other = x.copy()
    other[0, 2, 1] = np.nextafter(np.float32(1), np.float32(2))
    folder = written(tmp_path, {"dp": 1, "tp": 3}, {(0, 0): x, (0, 1): x, (0, 2): other})
    ranks = Ranks.load(folder)
    whole, differ = ranks.whole()
    assert [one.text for one in differ] == [
        f"{NAME} is replicated, and rank 2 has other bits than rank 0 in 1 of 12 numbers"
    ]
    np.testing.assert_array_equal(whole.taps[NAME], x)
    np.testing.assert_array_equal(ranks.whole(last_copies=True)[0].taps[NAME], other)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    x = np.ones((1, 4, 3), np.float32)
    with pytest.raises(InputError, match=r"no \.safetensors file in it; expected one per rank"):
        Ranks.load(tmp_path)
    one = written(tmp_path / "one", {"tp": 2}, {(0,): x})
    with pytest.raises(InputError, match="files of 1 ranks for a mesh of 2; that of tp 1 is not there"):
        Ranks.load(one)
    twice = written(tmp_path / "twice", {"tp": 2}, {(0,): x, (1,): x})
    (twice / "rank-00001.safetensors").write_bytes((twice / "rank-00000.safetensors").read_bytes())
    with pytest.raises(InputError, match="another file has its coordinates too, tp 0"):
        Ranks.load(twice)
    strange = written(tmp_path / "strange", {"tp": 2}, {(0,): x, (1,): x}, tp="_StridedShard(dim=1, sf=2)")
    with pytest.raises(InputError, match=r"is placed as '_StridedShard\(dim=1, sf=2\)'; what can be put together is"):
        Ranks.load(strange)
    uneven = written(tmp_path / "uneven", {"tp": 2}, {(0,): x, (1,): x[:, :2]}, tp="Shard(2)")
    with pytest.raises(InputError, match="do not fit together along axis 2"):
        Ranks.load(uneven).whole()
    with pytest.raises(InputError, match="placed along cp, which the mesh"):
        RankTrace({"tp": 2}, {}).tap(NAME, x, cp="Shard(1)")


# -------------------------------------------------------------------------------------------------- real runs, by gloo

CHECKPOINT = "arcee-tiny"
RIGHT = ("tp/bfloat16/right", "tp/bfloat16/float32 sums", "cp/bfloat16/right")
WRONG = {
    "tp/bfloat16/down_proj's part of rank 1 is missing": (
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.down_proj: the part of rank 1 is missing",
    ),
    "tp/bfloat16/rank 1 loads the first piece of q_proj": (
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj: wrong in the piece of rank 1, right in the others",
    ),
    "tp/bfloat16/o_proj's bias on every rank": (
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj: its bias is added 2 times, by 2 ranks",
    ),
    "cp/bfloat16/parts of equal weight": (
        "model.layers.0.self_attn.context",
        "model.layers.0.self_attn.context: wrong in the piece of rank 1, right in the others",
    ),
}
DROPS = "tp/bfloat16/rank 1 drops out"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote of every variant, in one start of torchrun."""
    pytest.importorskip("torch")
    from split_page import run_variants

    out = tmp_path_factory.mktemp("runs")
    run_variants(golden.path(CHECKPOINT), out, (*RIGHT, *WRONG, DROPS), ranks=2, tokens=16)
    return out


def judged(runs: Path, variant: str) -> Report:
    folder = golden.path(CHECKPOINT)
    ranks = Ranks.load(runs / variant.replace("/", "-"))
    with pytest.warns(UserWarning, match="factor"):  # of that checkpoint, which says so
        return check_ranks(partial(load, folder), ranks, Asked(), CHECKPOINT, explain=False)


@pytest.mark.parametrize("variant", RIGHT)
def test_right_runs_over_ranks_hold(runs: Path, variant: str) -> None:
    report = judged(runs, variant)
    assert report.verdict == "holds", report.first_failure
    assert report.copies == report.blamed == []
    assert any("put together from 2 ranks" in note for note in report.notes)
    ratios = [tap.isolated.ratio for tap in report.taps if tap.isolated is not None and "proj" in tap.name]
    assert min(ratios) > 0.6
    assert max(ratios) < 1.3


@pytest.mark.parametrize("variant", WRONG)
def test_a_wrong_rank_is_named_at_the_operator(runs: Path, variant: str) -> None:
    report = judged(runs, variant)
    name, said = WRONG[variant]
    assert report.verdict == "fails"
    assert report.first_failure is not None
    assert report.first_failure.name == name
    assert report.blamed == [said]


def test_a_rank_that_goes_its_own_way_is_seen_by_its_copies(runs: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    file = tmp_path / "report.json"
    folder = runs / DROPS.replace("/", "-")
    with pytest.warns(UserWarning, match="factor"):
        done = CliRunner().invoke(
            app, ["check", str(golden.path(CHECKPOINT)), "--trace", str(folder), "--json", str(file)]
        )
    assert done.exit_code == 1
    assert "model.layers.1.mlp.down_proj is replicated, and rank 1 has other bits" in " ".join(done.output.split())
    (report,) = json.loads(file.read_text())["reports"]
    assert report["copies"][0].startswith("model.layers.1.mlp.down_proj is replicated")


def test_dtensors_say_their_placement_themselves(tmp_path: Path) -> None:
    """In a process of its own, since it begins a group of one."""
    pytest.importorskip("torch")
    program = f"""
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from refllm.check.rank_trace import RankTrace
dist.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
trace = RankTrace.of(mesh)
trace.tap("a", distribute_tensor(torch.ones(2, 4).bfloat16(), mesh, [Shard(0), Replicate()]))
trace.tap("b", torch.ones(2), tp="Partial(sum)")
print(trace.placements, trace.mesh, trace.coordinates)
trace.save("{tmp_path}/out", torch.zeros(1, 2, dtype=torch.int64))
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = "{'a': {'dp': 'Shard(0)'}, 'b': {'tp': 'Partial(sum)'}} {'dp': 1, 'tp': 1} {'dp': 0, 'tp': 0}"
    assert done.stdout.strip() == said
    whole, differ = Ranks.load(tmp_path / "out").whole()
    assert whole.taps["a"].shape == (2, 4)
    assert differ == []
