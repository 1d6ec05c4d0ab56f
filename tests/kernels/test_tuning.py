"""The table of tiles: complete, used by every plan, and what `refllm bench tune --write` makes of an empty one."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from refllm import kernels
from refllm.bench import tune
from refllm.bench import tune_measure as measure
from refllm.bench import tune_rank as rank
from refllm.commands import cli
from refllm.errors import InputError
from refllm.kernels import tuning
from refllm.kernels.aot import DoesNotCompile, gates
from refllm.kernels.aot.compile_code import compile_launches
from refllm.kernels.targets import TARGETS
from refllm.kernels.triton import BACKWARD_KERNELS, KERNELS
from refllm.kernels.tuning import table
from refllm.kernels.tuning.table import AHEAD_OF_TIME, ANY, BY_HAND, MEASURED, Entry
from refllm.kernels.tuning.tunables import Tunable, everything, meta_call, tunables

SM_90 = TARGETS["sm_90"]
TUNABLES = tunables()
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
    files = {each.__name__.rpartition(".")[2]: each for each in (*KERNELS, *BACKWARD_KERNELS)}
    own = {name for name, file in files.items() if file.TUNABLE.kernel == name}
    assert {each.kernel for each in TUNABLES.values()} == own >= {each.__name__.rpartition(".")[2] for each in KERNELS}
    assert files["rope_backward"].TUNABLE is files["rope"].TUNABLE, "one kernel, turned back"
    lines = table.read()
    assert [e.key for e in lines] == sorted((each.kernel, shape, gpu.name) for each, shape, gpu in everything())
    for entry in lines:
        assert tuple(entry.tile) == TUNABLES[entry.kernel].module.Tile._fields


def test_a_line_names_the_command_that_wrote_it_and_what_it_was_chosen_by() -> None:
    """Or it is an exception, whose reason has a figure in it."""
    assert {entry.chosen for entry in table.read()} >= {BY_HAND, AHEAD_OF_TIME}
    for entry in table.read():
        if entry.chosen == BY_HAND:
            assert re.search(r"\d", entry.by), entry
            continue
        assert re.search(r"\d{4}-\d\d-\d\d, refllm bench tune .*--write", entry.by), entry
        assert entry.triton
        assert entry.figures
        if entry.chosen == AHEAD_OF_TIME:
            assert entry.figures["spilled"] == 0, entry
            assert entry.figures["warps"] > 0, entry
            assert module(entry.kernel).Tile(**entry.tile) in TUNABLES[entry.kernel].candidates(
                entry.shape, TARGETS[entry.target]
            )


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
    named = {module("cross_entropy").shape_class(V, dtype) for V in (64, 65) for dtype in (BF16, F32)}
    assert named == set(TUNABLES["cross_entropy"].shapes)
    named = {module("rms_norm").shape_class(E) for E in (1, 4096, 4097, 16_384, 16_385)}
    assert named == set(TUNABLES["rms_norm"].shapes) == set(TUNABLES["layer_norm"].shapes)
    named = {module("norm_backward").shape_class(E) for E in (1, 8192, 8193)}
    assert named == set(TUNABLES["norm_backward"].shapes)
    assert set(TUNABLES["cross_entropy_backward"].shapes) == set(TUNABLES["cross_entropy"].shapes)
    backward = module("linear_cross_entropy_backward")
    named = {backward.shape_class(E, dtype) for E in (64, 100) for dtype in (BF16, F32)}
    assert named == set(TUNABLES["linear_cross_entropy_backward"].shapes)
    assert {module("rope").shape_class(128, R) for R in (128, 20)} == set(TUNABLES["rope"].shapes)


def test_float16_has_the_tiles_of_bfloat16() -> None:
    assert module("attention").choose_tile(80, torch.float16, SM_90) == module("attention").choose_tile(80, BF16, SM_90)


@pytest.mark.parametrize("kernel", TUNABLES)
def test_a_plan_takes_its_tile_from_the_table(kernel: str, own_table: Path) -> None:
    each = TUNABLES[kernel]
    shape = next(iter(each.shapes))
    before = each.launch(meta_call(kernel, shape), SM_90, None)[0]
    other = each.near(shape, SM_90)[1]
    table.write([Entry(kernel, shape, "sm_90", other._asdict(), AHEAD_OF_TIME, "a test")])
    after = each.launch(meta_call(kernel, shape), SM_90, None)[0]
    given = each.launch(meta_call(kernel, shape), SM_90, other)[0]
    facts = [(launch.constants, launch.num_warps, launch.num_stages, launch.grid) for launch in (before, after, given)]
    assert facts[0] != facts[1] == facts[2]


def test_what_the_table_does_not_know_is_one_sentence_with_the_command_that_makes_it() -> None:
    with pytest.raises(InputError, match=r"no tile of sort for any on sm_90; refllm bench tune --kernel sort --target"):
        tuning.tile("sort", ANY, SM_90)


def test_tiles_to_be_judged_are_in_the_table_only_meanwhile() -> None:
    before, tile = dict(tuning.entries()), tuning.tile("rope", "R = D", SM_90)
    with table.instead("rope", SM_90, {"R = D": {"numbers": 8}}):
        assert tuning.tile("rope", "R = D", SM_90) == {"numbers": 8}
    assert (tuning.entries(), tuning.tile("rope", "R = D", SM_90)) == (before, tile)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is no table of tiles"),
        ('{"tiles": [{"kernel": "rope"}]}', "is no table of tiles"),
        ('{"tiles": [LINE, LINE]}', "has two lines for the same kernel"),
        ('{"tiles": [BAD]}', "the line of rope / any / sm_90 needs a tile of whole numbers above 0"),
        ('{"tiles": [NONE]}', "the line of rope / any / sm_90 must say how it was chosen"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    line = {"kernel": "rope", "shape": ANY, "target": "sm_90", "tile": {"numbers": 64}, "chosen": MEASURED, "by": "x"}
    file = tmp_path / "tiles.json"
    for word, changed in (("LINE", {}), ("BAD", {"tile": {"numbers": 0}}), ("NONE", {"by": ""})):
        text = text.replace(word, json.dumps({**line, **changed}))
    file.write_text(text)
    with pytest.raises(InputError, match=sentence):
        table.read(file)


# --- ranking


def test_ranking_refuses_what_spills_and_orders_the_rest() -> None:
    """A tile that gets fewer registers than it needs is out; fewer instructions in all come first among the others."""
    each, call = TUNABLES["swiglu"], meta_call("swiglu", ANY)
    tile = each.module.Tile
    good, smaller = (each.launch(call, SM_90, tile(bytes, 4))[0] for bytes in (64, 32))
    launches = [good, replace(good, options={"maxnreg": 24}), smaller]
    reports = compile_launches(launches, SM_90)
    found = [
        rank.judge(each, call, tile(1, 1), replace(launch, wide_loads=False), report, SM_90)
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


def test_on_a_gpu_the_present_tile_is_tried_first_and_then_its_neighbours() -> None:
    assert list(everything())
    for each, shape, target in everything():
        tiles, now = each.near(shape, target), tuning.tile(each.kernel, shape, target)
        assert tiles[0]._asdict() == now
        assert len(set(tiles)) == len(tiles) > 1
        assert all(sum(new[name] != now[name] for name in now) <= 2 for new in (tile._asdict() for tile in tiles))


def test_what_reads_less_per_flop_comes_first_and_the_rest_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation and what ships are played: 64 keys do not compile, then what ships spills in 2 stages."""
    compiled, each = list[dict[str, int]](), TUNABLES["attention"]

    def played(tunable: Tunable, call: Any, tiles: list[Any], target: Any) -> list[rank.Candidate]:
        compiled.extend(tile._asdict() for tile in tiles)
        return [rank.Candidate(tile._asdict(), "spills" if tile.N == 64 else "", (tile.stages,), {}) for tile in tiles]

    monkeypatch.setattr(rank, "_compiled", played)
    monkeypatch.setattr(rank, "shipped_problem", lambda *given: "D=256 spills" if given[2]["stages"] == 2 else "")
    found = rank.rank(each, "16-bit, D <= 128", SM_90)
    assert (found[0].tile["M"], found[0].tile["N"], found[0].tile["stages"]) == (128, 32, 3)
    assert {(tile["M"], tile["N"]) for tile in compiled} == {(128, 64), (128, 32)}
    assert {c.refused for c in found if c.tile["N"] == 32 and c.tile["stages"] == 2} == {"D=256 spills"}


def test_a_tile_is_judged_in_the_configurations_that_ship_of_its_class() -> None:
    """A head of 256 belongs to no other class than its own, and every dtype of 16 bits to the same."""
    each = TUNABLES["attention"]
    named = {
        shape: {name for name, _ in rank.shipped(each, shape, each.candidates(shape, SM_90)[0]._asdict(), SM_90)}
        for shape in each.shapes
    }
    assert "attention bfloat16 D=256 causal" in named["16-bit, D <= 256"]
    assert {"attention bfloat16 D=128 causal", "attention float16 D=96 causal"} <= named["16-bit, D <= 128"]
    everyone = [name for names in named.values() for name in names]
    assert sorted(everyone) == sorted(name for name, _ in each.module.launches(SM_90))


# --- checking on what runs


def test_a_candidate_with_wrong_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    each = TUNABLES["rope"]
    monkeypatch.setitem(each.shapes, "R < D", {"H": 4, "K": 2, "D": 32, "R": 16, "S": 9, "interleaved": 0})
    with kernels.interpreted():
        check = measure.Check(each, "R < D", "cpu")
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
    now = Entry("norm_rope", ANY, "sm_90", {"numbers": 1024}, AHEAD_OF_TIME, "a test")
    monkeypatch.setattr("refllm.kernels.tuning.tunables.entries", lambda: {now.key: now})
    monkeypatch.setattr(tune, "entries", lambda: {now.key: now})
    found = tune._result(each, ANY, SM_90, tune.measured(each, ANY, SM_90), MEASURED)
    assert [candidate.tile["numbers"] for candidate in found.candidates] == [4096, 1024, 512, 2048]
    assert {c.tile["numbers"]: c.refused for c in found.candidates if c.refused} == {
        512: "RuntimeError: out of resources", 2048: "RMS error 9 times",
    }  # fmt: skip
    figures = {"microseconds": 1e6}
    by = f"a GPU, {MEASURED}", triton.__version__, figures
    assert found.best == Entry("norm_rope", ANY, "sm_90", {"numbers": 4096}, MEASURED, *by)
    took[4096] = 1.99
    found = tune._result(each, ANY, SM_90, tune.measured(each, ANY, SM_90), MEASURED)
    assert (found.best, found.note) == (None, "the best is faster by less than two runs differ")


def test_a_measured_line_is_not_replaced_by_a_ranked_one(own_table: Path) -> None:
    each = TUNABLES["norm_rope"]
    now = tuning.entries()["norm_rope", ANY, "sm_90"]
    table.write([replace(now, tile={"numbers": 1024}, chosen=MEASURED)])
    present, other = (rank.Candidate({"numbers": n}, "", (float(order),), {}) for n, order in ((1024, 2), (512, 1)))
    found = tune._result(each, ANY, SM_90, [other, present], AHEAD_OF_TIME)
    assert (found.best, found.note) == (None, "the present tile was measured, which counts for more")
    assert tune._result(each, ANY, SM_90, [present, other], AHEAD_OF_TIME).best is None  # nor what it says of itself


def test_an_exception_stays_until_it_is_measured(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_by", lambda chosen: f"a GPU, {chosen}")
    each, now = TUNABLES["norm_rope"], Entry("norm_rope", ANY, "sm_90", {"numbers": 1024}, BY_HAND, "9 barriers less")
    table.write([now])
    present, other = (rank.Candidate({"numbers": n}, "", (float(order),), {}) for n, order in ((1024, 2), (512, 1)))
    found = tune._result(each, ANY, SM_90, [other, present], AHEAD_OF_TIME)
    assert (found.best, found.note) == (None, "by hand: 9 barriers less")
    assert tune._result(each, ANY, SM_90, [present, other], AHEAD_OF_TIME).best is None
    found = tune._result(each, ANY, SM_90, [other, present], MEASURED)
    assert found.best is not None
    assert found.best.tile == {"numbers": 512}


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
    """And from a table without its lines it makes the committed ones again, with their figures."""
    monkeypatch.setattr(tune, "rank", ranked_once(tune.rank))
    committed = tuning.entries()["relu2", ANY, "sm_90"]
    table.write([replace(committed, tile={"bytes": 8, "warps": 1}, figures={})])
    before = own_table.read_text()
    code, out, err = refllm("--kernel", "relu2", "--json", tmp_path / "out.json")
    assert (code, err, own_table.read_text()) == (0, "", before)
    assert all(f"{name}={value}" in out for name, value in (("bytes", 8), ("warps", 1), *committed.tile.items()))
    assert "ahead of time, not measured" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["chosen"], found["classes"][0]["best"]) == ("ahead of time", committed.tile)
    without_it(own_table, "relu2")
    code, out, _ = refllm("--kernel", "relu2", "--write")
    assert "1 lines of the table written" in out
    entry = tuning.entries()["relu2", ANY, "sm_90"]
    assert entry.by.endswith("refllm bench tune --kernel relu2 --write")
    if triton.__version__ == committed.triton:  # another makes other code
        assert replace(entry, by=committed.by) == committed
    _, out, _ = refllm("--kernel", "relu2", "--write")
    assert "0 lines of the table written" in out


def without_it(file: Path, kernel: str) -> None:
    """Takes the lines of a kernel out of a table."""
    kept = json.loads(file.read_text())["tiles"]
    file.write_text(json.dumps({"tiles": [line for line in kept if line["kernel"] != kernel]}))
    table.entries.cache_clear()
    table.tile.cache_clear()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--kernel", "sort"), "--kernel 'sort' is no kernel; use one of rms_norm, layer_norm"),
        (("--target", "sm_70"), "target 'sm_70' is not known; use one of sm_80, sm_90, sm_100, gfx942"),
        (("--kernel", "rope", "--shape", "zzz"), "--shape 'zzz' names no class; there are 'R = D', 'R < D'"),
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
