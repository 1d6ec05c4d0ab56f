"""The table of tiles: complete, used by every plan, changed by nobody but `refllm bench tune --write`."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from refllm import cli, kernels
from refllm.errors import InputError
from refllm.kernels import tuning
from refllm.kernels.aot import DoesNotCompile, gates
from refllm.kernels.aot.compile_code import compile_launches
from refllm.kernels.targets import TARGETS
from refllm.kernels.tuning import measure, rank, table, tune
from refllm.kernels.tuning.table import AHEAD_OF_TIME, ANY, MEASURED, Entry
from refllm.kernels.tuning.tunables import TUNABLES, Tunable, everything, meta_call

SM_90 = TARGETS["sm_90"]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the table, in the place of the committed one."""
    file = tmp_path / "tiles.json"
    file.write_text(table.FILE.read_text())
    monkeypatch.setattr(table.read, "__defaults__", (file,))
    monkeypatch.setattr(table.write, "__defaults__", (file,))
    table.entries.cache_clear()
    table.tile.cache_clear()
    yield file
    monkeypatch.undo()
    table.entries.cache_clear()
    table.tile.cache_clear()


@pytest.fixture
def refllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", "bench", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


# --- the table


def test_the_table_has_a_line_for_every_class_on_every_target() -> None:
    for each in TUNABLES.values():
        for target in TARGETS.values():
            assert each.classes(target) == list(each.shapes), (each.kernel, target.name)
    lines = table.read()
    assert {entry.kernel for entry in lines} == set(TUNABLES)
    for entry in lines:
        assert entry.shape in (*TUNABLES[entry.kernel].shapes, ANY)
        assert entry.target in (*TARGETS, ANY)
        assert tuple(entry.tile) == TUNABLES[entry.kernel].module.Tile._fields
        assert entry.by


def module(kernel: str) -> Any:
    return import_module(f"refllm.kernels.triton.{kernel}")


def test_every_class_that_a_kernel_names_has_a_line() -> None:
    attention, decode = module("attention"), module("decode_attention")
    assert {attention.shape_class(D, t) for D in range(8, 257) for t in (BF16, F32)} == set(
        TUNABLES["attention"].shapes
    )
    named = {decode.shape_class(rows, dtype) for rows in range(1, 300) for dtype in (BF16, F32)}
    assert named == set(TUNABLES["decode_attention"].shapes)
    qkv = module("rms_norm_qkv_rope")
    named = {qkv.shape_class(S, E, h, t) for S in (1, 17) for E in (64, 100) for h in (8, 9) for t in (BF16, F32)}
    assert named == set(TUNABLES["rms_norm_qkv_rope"].shapes)
    loss = module("linear_cross_entropy")
    named = {loss.shape_class(E, V, dtype) for E in (64, 100) for V in (64, 65) for dtype in (BF16, F32)}
    assert named == set(TUNABLES["linear_cross_entropy"].shapes)


def test_float16_has_the_tiles_of_bfloat16() -> None:
    assert module("attention").choose_tile(80, torch.float16, SM_90) == module("attention").choose_tile(80, BF16, SM_90)


@pytest.mark.parametrize("kernel", TUNABLES)
def test_a_plan_takes_its_tile_from_the_table(kernel: str, own_table: Path) -> None:
    each = TUNABLES[kernel]
    shape = next(iter(each.shapes))
    before = each.launch(meta_call(kernel, shape), SM_90, None)[0]
    other = each.candidates(shape, SM_90)[1]
    table.write([Entry(kernel, shape, "sm_90", other._asdict(), AHEAD_OF_TIME, "a test")])
    after = each.launch(meta_call(kernel, shape), SM_90, None)[0]
    given = each.launch(meta_call(kernel, shape), SM_90, other)[0]
    facts = [(launch.constants, launch.num_warps, launch.num_stages, launch.grid) for launch in (before, after, given)]
    assert facts[0] != facts[1] == facts[2]


def test_what_the_table_does_not_know_falls_to_the_line_for_any_shape() -> None:
    known = tuning.entries()
    assert tuning.tile("attention", "128-bit", SM_90) == known["attention", ANY, ANY].tile
    newer = replace(SM_90, name="sm_130")
    assert tuning.tile("attention", "16-bit, D <= 64", newer) == known["attention", ANY, ANY].tile
    assert tuning.tile("attention", "float32", newer) == known["attention", "float32", ANY].tile
    with pytest.raises(InputError, match="there is no tile for sort; the table knows attention, "):
        tuning.tile("sort", ANY, SM_90)


def test_a_tile_never_depends_on_the_batch() -> None:
    """Through plan itself: one sequence and 64 of them."""

    def constants(B: int) -> list[Any]:
        q, kv = (torch.empty(B, 300, heads, 80, dtype=BF16, device="meta").transpose(1, 2) for heads in (8, 2))
        lengths = torch.empty(B, dtype=torch.int64, device="meta")
        found = [module("attention").plan(q, kv, kv, 0.1, True, None)[0]]
        found += module("decode_attention").plan(q[:, :, :2], kv, kv, lengths, 0.1)[0]
        table = torch.empty(300, 10, device="meta")
        found += [module("rope").plan(q, kv, table, table, False)[0]]
        x, w = torch.empty(B, 300, 640, dtype=BF16, device="meta"), torch.empty(960, 640, dtype=BF16, device="meta")
        given = (x, w[0], w, None, torch.empty(300, 40, device="meta"), torch.empty(300, 40, device="meta"), 1e-5)
        found += [module("rms_norm_qkv_rope").plan(*given, 8, 2, False)[0]]
        return [(launch.constants, launch.num_warps, launch.num_stages) for launch in found]

    assert constants(1) == constants(64)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is no table of tiles"),
        ('{"tiles": [{"kernel": "rope"}]}', "is no table of tiles"),
        ('{"tiles": [LINE, LINE]}', "has two lines for the same kernel"),
        ('{"tiles": [BAD]}', "the line of rope / any / any needs a tile of whole numbers above 0"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    line = {"kernel": "rope", "shape": ANY, "target": ANY, "tile": {"numbers": 64}, "chosen": MEASURED, "by": "x"}
    file = tmp_path / "tiles.json"
    file.write_text(text.replace("LINE", json.dumps(line)).replace("BAD", json.dumps({**line, "tile": {"numbers": 0}})))
    with pytest.raises(InputError, match=sentence):
        table.read(file)


# --- ranking


def test_ranking_refuses_what_spills_and_orders_the_rest() -> None:
    """A tile that gets fewer registers than it needs is out; fewer instructions in all come first among the others."""
    each, call = TUNABLES["norm_rope"], meta_call("norm_rope", ANY)
    tile = each.module.Tile
    good, smaller = (each.launch(call, SM_90, tile(numbers))[0] for numbers in (1024, 512))
    launches = [good, replace(good, options={"maxnreg": 40}), smaller]
    reports = compile_launches(launches, SM_90)
    found = [
        rank.judge(each, call, tile(1), replace(launch, wide_loads=False), report, SM_90)
        for launch, report in zip(launches, reports, strict=True)
    ]
    assert "bytes are spilled" in found[1].refused
    assert found[1].figures["spilled"] > 0
    assert [found[0].refused, found[2].refused] == ["", ""]
    assert found[0].order < found[2].order
    assert gates(launches[0], reports[0], SM_90) == []


def test_ranking_refuses_what_does_not_compile() -> None:
    each, call = TUNABLES["norm_rope"], meta_call("norm_rope", ANY)
    launch = each.launch(call, SM_90, None)[0]
    found = rank.judge(each, call, each.module.Tile(8), launch, DoesNotCompile("norm_rope does not fit"), SM_90)
    assert (found.refused, found.order) == ("norm_rope does not fit", ())


def test_every_candidate_has_the_fields_of_its_tile_and_the_present_one_is_the_first() -> None:
    for each, shape, target in everything():
        tiles = each.candidates(shape, target)
        assert tiles[0]._asdict() == tuning.tile(each.kernel, shape, target)
        assert len(set(tiles)) == len(tiles) > 1
        assert set(each.fields) == set(each.module.Tile._fields)


# --- checking on what runs


def test_a_candidate_with_wrong_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    each = TUNABLES["rope"]
    monkeypatch.setitem(each.shapes, ANY, {"H": 4, "K": 2, "D": 32, "R": 16, "S": 9})
    with kernels.interpreted():
        check = measure.Check(each, ANY, "cpu")
        assert check.problem(each.module.Tile(512), SM_90) == ""
        assert check.problem(each.module.Tile(64), SM_90) == ""
        sizes = each.module.sizes_and_tiles

        def wrong(*given: Any) -> Any:
            grid, strides, tiles, warps = sizes(*given)
            return grid, strides, {**tiles, "HALF": tiles["HALF"] - 1}, warps

        monkeypatch.setattr(each.module, "sizes_and_tiles", wrong)
        assert check.problem(each.module.Tile(512), SM_90).startswith("rope, output 0, bfloat16: ")


def test_the_fastest_right_candidate_wins_and_a_wrong_or_failing_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is played: 2048 numbers are fastest but wrong, 512 do not start, 4096 are faster than 1024, as now."""
    took = {4096: 1.0, 2048: 0.1, 1024: 2.0}

    class Played:
        def __init__(self, *_: Any) -> None: ...

        def problem(self, tile: Any, target: Any) -> str:
            return "RMS error 9 times" if tile.numbers == 2048 else ""

    def seconds(each: Tunable, shape: str, tile: Any, *_: Any) -> float:
        if tile.numbers not in took:
            raise RuntimeError("out of resources")
        return took[tile.numbers]

    monkeypatch.setattr(measure, "Check", Played)
    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr("refllm.bench.timer.clock", lambda device: None)
    monkeypatch.setattr(tune, "_by", lambda chosen: f"a GPU, {chosen}")
    each = TUNABLES["norm_rope"]
    found = tune._result(each, ANY, SM_90, tune.measured(each, ANY, SM_90), MEASURED)
    assert [candidate.tile["numbers"] for candidate in found.candidates] == [4096, 1024, 512, 2048]
    assert {c.tile["numbers"]: c.refused for c in found.candidates if c.refused} == {
        512: "RuntimeError: out of resources", 2048: "RMS error 9 times",
    }  # fmt: skip
    assert found.best == Entry("norm_rope", ANY, "sm_90", {"numbers": 4096}, MEASURED, f"a GPU, {MEASURED}")
    took[4096] = 1.99
    found = tune._result(each, ANY, SM_90, tune.measured(each, ANY, SM_90), MEASURED)
    assert (found.best, found.note) == (None, "the best is faster by less than two runs differ")


def test_a_measured_line_is_not_replaced_by_a_ranked_one(own_table: Path) -> None:
    each = TUNABLES["norm_rope"]
    now = tuning.entries()["norm_rope", ANY, ANY]
    table.write([replace(now, target="sm_90", chosen=MEASURED)])
    present, other = (rank.Candidate({"numbers": n}, "", (float(order),), {}) for n, order in ((1024, 2), (512, 1)))
    found = tune._result(each, ANY, SM_90, [other, present], AHEAD_OF_TIME)
    assert (found.best, found.note) == (None, "the present tile was measured, which counts for more")


# --- the command


def ranked_once(rank: Callable[..., Any]) -> Callable[..., Any]:
    """As `rank`, compiling only when it is first called: the second run is about what is written."""
    found: list[Any] = []

    def ranked(*given: Any) -> Any:
        if not found:
            found.append(rank(*given))
        return found[0]

    return ranked


def test_tune_prints_the_change_and_writes_only_when_asked(
    refllm: Callable[..., tuple[int, str, str]], own_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "rank", ranked_once(tune.rank))
    now = tuning.entries()["norm_rope", ANY, ANY]
    table.write([replace(now, tile={"numbers": 512})])
    before = own_table.read_text()
    code, out, err = refllm("--kernel", "norm_rope", "--json", tmp_path / "out.json")
    assert (code, err, own_table.read_text()) == (0, "", before)
    assert "numbers=512" in out
    assert "numbers=1024" in out
    assert "ahead of time, not measured" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["chosen"], found["classes"][0]["best"]) == ("ahead of time", {"numbers": 1024})
    code, out, _ = refllm("--kernel", "norm_rope", "--write")
    assert "1 lines of the table written" in out
    added = [line for line in own_table.read_text().splitlines() if line not in before.splitlines()]
    gone = [line for line in before.splitlines() if line not in own_table.read_text().splitlines()]
    assert len(added) - len(gone) == 1  # the last line of before got a comma
    (entry,) = [e for e in table.read() if e.key == ("norm_rope", ANY, "sm_90")]
    assert (entry.tile, entry.chosen) == ({"numbers": 1024}, AHEAD_OF_TIME)
    assert entry.by.endswith("refllm bench tune --kernel norm_rope --write")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--kernel", "swiglu"), "--kernel 'swiglu' has no tiles to choose; use one of attention, decode_attention"),
        (("--target", "sm_70"), "target 'sm_70' is not known; use one of sm_80, sm_90, sm_100, gfx942"),
        (("--kernel", "rope", "--shape", "zzz"), "--shape 'zzz' names no class; there are 'any'"),
        (("--device", "cpu"), "--device cpu: tiles are timed on a GPU; use cuda, or leave it out to compile"),
    ],
)
def test_mistakes_are_one_sentence(
    refllm: Callable[..., tuple[int, str, str]], words: tuple[str, ...], sentence: str
) -> None:
    code, out, err = refllm(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(refllm: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = refllm("--device", "cuda")
    assert (code, err) == (
        2,
        "refllm: --device cuda: there is no GPU here; without --device candidates are compiled\n",
    )
