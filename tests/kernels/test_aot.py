"""The ahead-of-time gate: it compiles what a start would run, every gate can fire, and our kernels pass them all."""

import functools
import importlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from refllm.bench import layers
from refllm.errors import InputError, MissingExtraError
from refllm.kernels.aot import DoesNotCompile, Report, batch, compile_code, compile_launch, disassemble, gates, record
from refllm.kernels.aot.batch import Checked, check, collect
from refllm.kernels.aot.gates import WIDE_SHARE, Finding
from refllm.kernels.aot.machine_code import Resources, read_dots, read_ptxas_log, read_sass
from refllm.kernels.aot.occupancy import occupancy
from refllm.kernels.aot.sources import FileSource, our_sources
from refllm.kernels.calls import LAYERS
from refllm.kernels.launch import Launch
from refllm.kernels.targets import TARGETS, Target

NVIDIA = ("sm_80", "sm_90", "sm_100")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- our kernels


RECORD = Path(__file__).parent / "shipped_configurations.json"
RENEW = "run `refllm kernels check-aot --record tests/kernels/shipped_configurations.json`"


@pytest.fixture(scope="module")
def kept() -> dict[str, Report]:
    """What the compiler made of every shipped configuration, by digest. {}: that of another Triton."""
    return record.read(RECORD)


@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_configuration_is_within_the_gates(target: str, kept: dict[str, Report]) -> None:
    """Every one is judged. Compiled are those that the record does not have, because the kernel, its tile, its launch
    or Triton is another than when all were compiled: an equal input of the compiler has an equal result.

    That the record is true is shown by the next tests, and by `refllm kernels check-aot`, which compiles them all.
    """
    configurations = collect(our_sources(), [TARGETS[target]])
    assert {row.source for row in configurations} == set(our_sources())
    new = [row for row in configurations if record.digest(row) not in kept]
    findings = [(row.configuration.name, finding) for row in check(new) for finding in row.findings]
    for row in configurations:
        if (report := kept.get(record.digest(row))) is not None:
            findings += [(row.name, finding) for finding in gates(row.launch, report, row.target)]
    assert [f"{name}: {finding.sentence}" for name, finding in findings] == []


def test_the_record_has_exactly_the_configurations_that_ship(kept: dict[str, Report]) -> None:
    if not kept:
        pytest.skip(f"the record is not of triton {triton.__version__}")
    shipped = {record.digest(row): row.name for row in collect(our_sources(), list(TARGETS.values()))}
    assert [name for key, name in shipped.items() if key not in kept] == [], RENEW
    assert set(kept) == set(shipped), RENEW


@pytest.mark.parametrize("target", TARGETS)
def test_the_record_is_what_the_compiler_makes_today_of_every_kernel(target: str, kept: dict[str, Report]) -> None:
    """Of every kernel the configuration that is compiled in the shortest time; the kernels take turns on the targets.

    What a kernel is made of is in its digest, which the test before compares on every target. Here it is what compiles
    and what reads the code that could have changed: they depend on the target and not on the kernel, except that every
    target has to show a product of tensor cores as well.
    """
    if not kept:
        pytest.skip(f"the record is not of triton {triton.__version__}")
    configurations = [row for row in collect(our_sources(), [TARGETS[target]]) if record.digest(row) in kept]
    slowest_first = sorted(configurations, key=lambda row: -kept[record.digest(row)].seconds)
    fastest = {
        (row.source.module, row.kernel): row for row in slowest_first
    }  # a backward pass may use a forward kernel
    assert {row.source for row in fastest.values()} == set(our_sources()), RENEW
    in_turn = sorted(fastest)[list(TARGETS).index(target) :: len(TARGETS)]
    product = [row for row in slowest_first if row.launch.tensor_cores][-1]
    chosen = {**{name: fastest[name] for name in in_turn}, (product.source.module, product.kernel): product}
    for row in check(list(chosen.values())):
        assert row.report is not None
        assert replace(row.report, seconds=0.0) == replace(kept[record.digest(row.configuration)], seconds=0.0), RENEW


CHANGES = (
    ("TIMES * x", "TIMES * x + 1"),  # what the kernel calls
    ("constexpr(2)", "constexpr(3)"),  # a constant that it names
    ("i < n", "i <= n"),
    ('"n": 48', '"n": 47'),  # what may be assumed of an argument
    ('"BLOCK": 64', '"BLOCK": 128'),
    ("num_warps=4", "num_warps=8"),
    ("num_warps=4", "num_stages=4"),
    ("num_warps=4", "options={'maxnreg': 96}"),
)


@pytest.mark.parametrize(("old", "new"), [*CHANGES, ("# here", "# there\n\n\n")])
def test_what_changes_the_compiled_kernel_takes_it_out_of_the_record(old: str, new: str, tmp_path: Path) -> None:
    """And a comment and another place in the file do not."""

    def digests(folder: str, text: str) -> list[str]:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "naming.py"
        path.write_text(text)
        return [record.digest(row) for row in collect([FileSource(str(path))], [TARGETS["sm_80"], TARGETS["sm_90"]])]

    assert old in NAMING
    before, after = digests("before", NAMING), digests("after", NAMING.replace(old, new))
    assert len(set(before)) == 2
    assert before == after if old.startswith("#") else set(before).isdisjoint(after)


NAMING = """
import torch, triton, triton.language as tl
from refllm.kernels.launch import Launch

TIMES = tl.constexpr(2)
# here
@triton.jit
def scaled(x):
    return TIMES * x

@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, scaled(tl.load(x_ptr + i, mask=i < n)), mask=i < n)

def launches(target):
    x = torch.empty(4096, device="meta")
    yield "one", Launch(copy, (1,), {"x_ptr": x, "y_ptr": x, "n": 48}, {"BLOCK": 64}, num_warps=4)
"""


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    """Every number, of both makers' reports: the gates judge what was read."""
    launches = collect([source for source in our_sources() if source.module.endswith("cross_entropy")], NARROWED)
    rows = check([row for row in launches if "sum" in row.name])
    record.write(tmp_path / "record.json", rows)
    read = record.read(tmp_path / "record.json")
    assert len(read) == 2
    assert [read[record.digest(row.configuration)] for row in rows] == [row.report for row in rows]


NARROWED = [TARGETS["sm_90"], TARGETS["gfx942"]]


def test_a_record_of_another_kind_or_version_does_not_count(tmp_path: Path) -> None:
    text, file = RECORD.read_text(), tmp_path / "record.json"
    file.write_text(text.replace(f'"triton": "{triton.__version__}"', '"triton": "0.1"'))
    assert record.read(file) == {}
    for wrong in ("{}", "[", '{"format": 9}', text.replace('"registers"', '"register"', 1)):
        file.write_text(wrong)
        with pytest.raises(InputError, match="holds no record of check-aot"):
            record.read(file)


@pytest.mark.parametrize("target", TARGETS)
def test_configurations_have_names_of_their_own(target: str) -> None:
    names = [name for source in our_sources() for name, _ in source.launches(TARGETS[target])]
    assert len(names) == len(set(names))


def test_every_kernel_file_is_in_the_gate() -> None:
    from refllm.kernels import triton as package

    folder = Path(str(package.__file__)).parent
    starters = {path.stem for path in folder.glob("*.py") if "\ndef launches(" in path.read_text()}
    assert {source.module.rpartition(".")[2] for source in our_sources()} == starters


KEPT = Path(__file__).parents[2] / "docs/benchmarks/ahead_of_time.json"


def test_the_kept_figures_of_real_layers_are_what_the_compiler_says_today() -> None:
    """A small part of them, quick to compile. Another Triton makes other code."""
    kept = layers.read(KEPT)
    if kept["versions"]["triton"] != triton.__version__:
        pytest.skip(f"the figures are of triton {kept['versions']['triton']}, here is {triton.__version__}")
    targets = [TARGETS["sm_90"]]
    for name, operator in (("afm-4.5b", "relu2"), ("stablelm-2-12b", "norm_rope"), ("afm-4.5b", "rms_norm")):
        today = layers.rows(targets, layers=[name], operator=operator)
        assert today == [
            row for row in kept["rows"] if (row["layer"], row["operator"], row["target"]) == (name, operator, "sm_90")
        ]


def test_the_kept_figures_have_every_layer_size_and_target_and_their_page_is_rendered_from_them() -> None:
    """One finding is known: of StableLM-2-12B's 40 rotated dims per head an MI300 loads the pairs in narrow pieces."""
    kept = layers.read(KEPT)
    assert {call["layer"] for call in kept["calls"]} == {layer.name for layer in LAYERS}
    assert {call["size"] for call in kept["calls"]} == {
        "1 x 1 tokens", "64 x 1 tokens", "1 x 2048 tokens", "1 x 32768 tokens",
    }  # fmt: skip
    calls = {(target, call["layer"], call["operator"], call["size"]) for target in TARGETS for call in kept["calls"]}
    rows = {(row["target"], row["layer"], row["operator"], size) for row in kept["rows"] for size in row["programs"]}
    assert calls == rows
    found = {(row["target"], row["layer"], row["operator"]) for row in kept["rows"] if row["findings"]}
    assert found == {("gfx942", "stablelm-2-12b", "norm_rope")}
    assert KEPT.with_suffix(".md").read_text() == layers.page(kept)


def test_what_a_call_cannot_do_without_is_what_it_says_today() -> None:
    """Bytes and flops of every layer, operator and size: arithmetic on shapes."""
    assert layers.read(KEPT)["calls"] == layers.calls()


def test_a_kernel_of_the_memory_loads_16_bytes_at_a_time_or_says_why_not() -> None:
    """Where neither the size of a head nor the vocabulary forbids it."""
    kept, products = layers.read(KEPT), {"attention", "decode_attention", "rms_norm_qkv_rope", "linear_cross_entropy"}
    of_memory = [row for row in kept["rows"] if row["operator"] not in products]
    for row in of_memory:
        assert row["wide_share"] >= WIDE_SHARE or row["narrow"] or row["findings"], row
    narrow = {(row["layer"], row["operator"]) for row in of_memory if row["narrow"]}
    assert narrow == {("stablelm-3b-4e1t", "rope"), ("afm-4.5b", "cross_entropy")}


def test_figures_of_another_kind_or_layer_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="holds no figures of check-aot --layers"):
        layers.read(tmp_path / "x.json")
    with pytest.raises(InputError, match="layer 'gpt-2' is not known; use one of helium-1-preview-2b"):
        layers.rows([TARGETS["sm_90"]], layers=["gpt-2"])


# --- kernels made for the gates: one that is as it should be, and what is wrong with the others


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, M, N, K, a_stride, b_stride, c_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + k < K
        a = tl.load(a_ptr + m[:, None] * a_stride + (start + k)[None, :], (m < M)[:, None] & inner[None, :], 0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * b_stride + n[None, :], inner[:, None] & (n < N)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * c_stride + n[None, :], total, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def three_products(a_ptr, b_ptr, c_ptr, K):
    m, n, k = tl.arange(0, 128)[:, None], tl.arange(0, 256)[None, :], tl.arange(0, 32)
    first = tl.zeros([128, 256], tl.float32)
    second, third = first, first
    for start in range(0, K, 32):
        a, b = tl.load(a_ptr + m * K + start + k[None, :]), b_ptr + (start + k)[:, None] * 256 + n
        first = tl.dot(a, tl.load(b), first)
        second = tl.dot(a, tl.load(b + 256 * K), second)
        third = tl.dot(a, tl.load(b + 512 * K), third)
    tl.store(c_ptr + m * 256 + n, first + 2 * second + 3 * third)


@triton.jit
def printing_product(a_ptr, b_ptr, c_ptr):
    tile = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    c = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.device_print("c", c)
    tl.store(c_ptr + tile, c)


@triton.jit
def scaled(x_ptr, y_ptr, n, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < n).to(tl.float32)
    if WIDE:
        x = (x.to(tl.float64) + tl.full([BLOCK], 0.1, tl.float64)).to(tl.float32)
    tl.store(y_ptr + columns, x * (tl.sum(x, 0) * scale), mask=columns < n)


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1)


def product_launch(
    dtype: torch.dtype = torch.bfloat16, M: int = 128, N: int = 128, K: int = 32, **settings: Any
) -> Launch:
    x = meta(1024, 1024, dtype=dtype)
    given = {"a_ptr": x, "b_ptr": x, "c_ptr": x, "M": 1024, "N": 1024, "K": 1024}
    given |= {"a_stride": 1024, "b_stride": 1024, "c_stride": 1024}
    tiles = {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K}
    return Launch(product, (8,), given, tiles, **{"num_warps": 8, **settings})


def scaled_launch(n: int = 4096, block: int = 4096, wide: bool = False, **settings: Any) -> Launch:
    given = {"x_ptr": meta(n, dtype=torch.float32), "y_ptr": meta(n, dtype=torch.float32), "n": n, "scale": 0.5}
    return Launch(scaled, (1,), given, {"WIDE": wide, "BLOCK": block}, **settings)


def spilling_launch(target: str) -> Launch:
    """256 numbers and more per thread, all of them needed again after their sum."""
    block = 32_768 if target == "gfx942" else 16_384
    return scaled_launch(block, block, num_warps=1)


def crowded_launch(target: str) -> Launch:
    return scaled_launch(num_warps=2048 // TARGETS[target].warp_size)


def printing_launch() -> Launch:
    return Launch(printing_product, (1,), {name: meta(64, 64) for name in ("a_ptr", "b_ptr", "c_ptr")}, {})


def three_products_launch() -> Launch:
    given = {"a_ptr": meta(128, 64), "b_ptr": meta(3, 64, 256), "c_ptr": meta(128, 256), "K": 64}
    return Launch(three_products, (1,), given, {}, num_stages=2)


SINGLE_PRECISION: dict[str, Any] = {"dtype": torch.float32, "M": 64, "N": 64}
TOO_LARGE: dict[str, Any] = {"N": 256, "K": 128, "num_stages": 4}


def judged_launches(target: str) -> list[Launch]:
    """What the tests judge on a target."""
    launches = [product_launch(), product_launch(**TOO_LARGE), product_launch(num_stages=1)]
    launches += [scaled_launch(), scaled_launch(wide=True), scaled_launch(4095, 4096), spilling_launch(target)]
    launches += [product_launch(**SINGLE_PRECISION)] if target in NVIDIA else []
    launches += [crowded_launch(target)] if target in ("sm_80", "gfx942") else []
    launches += [printing_launch()] if target in ("sm_80", "sm_90") else []
    launches += [product_launch(options={"maxnreg": 96})] if target == "sm_80" else []
    launches += [product_launch(num_warps=16), three_products_launch()] if target == "sm_100" else []
    return launches


@functools.cache
def compiled(target: str) -> tuple[dict[str, Report], list[tuple[bytes, list[str]]]]:
    """Reports by specialisation, and what was read together: (code, opcodes). All at once: nvdisasm starts slowly."""
    read: list[tuple[bytes, list[str]]] = []

    def opcodes_of(cubins: list[bytes], gpu: Target) -> list[list[str]]:
        found = disassemble.opcodes_of(cubins, gpu)
        read.extend(zip(cubins, found, strict=True))
        return found

    launches = judged_launches(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_code, "opcodes_of", opcodes_of)
        results = compile_code.compile_launches(launches, TARGETS[target])
    reports = {}
    for launch, report in zip(launches, results, strict=True):
        assert isinstance(report, Report), report
        reports[compile_code.specialise(launch, TARGETS[target]).key] = report
    return reports, read


def judged(launch: Launch, target: str) -> tuple[Report, dict[str, Finding]]:
    report = compiled(target)[0][compile_code.specialise(launch, TARGETS[target]).key]
    return report, {finding.gate: finding for finding in gates(launch, report, TARGETS[target])}


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_product_has_no_finding_and_a_full_report(target: str) -> None:
    launch = product_launch(tensor_cores=True, async_copies=True, wide_loads=True)
    report, found = judged(launch, target)
    assert found == {}
    opcode = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[target]
    assert all(name.startswith(opcode) for name in report.instructions.tensor)
    assert (report.kernel, report.target, report.num_warps) == ("product", target, 8)
    assert 32 < report.resources.registers <= 255
    assert 16_384 < report.shared <= TARGETS[target].shared_bytes
    assert (report.instructions.async_copies > 0) == (target != "gfx942")
    assert report.instructions.wide_share == 1.0
    assert (report.tensor_memory == 128) == (target == "sm_100")
    assert report.occupancy.programs >= 1
    assert report.instructions.count > 100
    assert report.instructions.code_bytes > 4 * report.instructions.count
    assert [(dot.M, dot.N, dot.K, dot.dtype, dot.pipelined) for dot in report.dots] == [(128, 128, 32, "bf16", True)]
    assert 0 < report.seconds < 600


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_found(target: str) -> None:
    report, found = judged(spilling_launch(target), target)
    assert found["spills"].value == report.resources.spill_bytes > 0
    assert report.instructions.local > 0
    assert "more warps than 1" in found["spills"].sentence
    assert "stack" not in found  # the stack holds what was spilled: one thing is said once


def test_a_stack_without_spills_is_found() -> None:
    report, found = judged(printing_launch(), "sm_80")
    assert set(found) == {"stack", "fp64"}  # numbers are printed as float64
    assert found["stack"].value == report.resources.stack > 0


def test_products_that_wait_for_each_other_are_found() -> None:
    assert "serialized" in judged(printing_launch(), "sm_90")[1]


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_found(target: str) -> None:
    report, found = judged(product_launch(**TOO_LARGE), target)
    assert found["shared memory"].value == report.shared > TARGETS[target].shared_bytes
    assert f"{TARGETS[target].shared_bytes:,}" in found["shared memory"].sentence
    assert report.occupancy.programs == 0
    assert report.occupancy.limit == "shared memory"


def test_too_much_tensor_memory_is_found() -> None:
    report, found = judged(three_products_launch(), "sm_100")
    assert found["tensor memory"].value == report.tensor_memory == 768


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_too_many_threads_are_found(target: str) -> None:
    assert judged(crowded_launch(target), target)[1]["threads"].value == 2048


@pytest.mark.parametrize("target", NVIDIA)
def test_missing_tensor_cores_are_found(target: str) -> None:
    assert set(judged(product_launch(**SINGLE_PRECISION, tensor_cores=True), target)[1]) == {"tensor cores"}


def test_missing_matrix_instructions_are_found_on_amd() -> None:
    assert set(judged(scaled_launch(tensor_cores=True), "gfx942")[1]) == {"tensor cores"}


def test_older_tensor_instructions_are_found() -> None:
    """16 warps are too many for tcgen05, and Triton falls back to the instructions of sm_80."""
    report, found = judged(product_launch(num_warps=16), "sm_100")
    assert set(found) == {"tensor generation"}
    assert "HMMA.16816" in found["tensor generation"].sentence
    assert "128 x 128 x 32" in found["tensor generation"].sentence
    assert not any(name.startswith("UTC") for name in report.instructions.tensor)


@pytest.mark.parametrize("target", TARGETS)
def test_missing_asynchronous_copies_are_found(target: str) -> None:
    found = judged(product_launch(num_stages=1, async_copies=True), target)[1]
    assert set(found) == (set() if target == "gfx942" else {"async copies"})


@pytest.mark.parametrize("target", TARGETS)
def test_float64_is_found(target: str) -> None:
    found = judged(scaled_launch(wide=True), target)[1]
    assert set(found) == {"fp64"}
    assert ("v_" if target == "gfx942" else "DADD") in found["fp64"].sentence


@pytest.mark.parametrize("target", TARGETS)
def test_narrow_loads_are_found(target: str) -> None:
    """A length that 16 does not divide: the mask can end anywhere, so every number is loaded alone."""
    report, found = judged(scaled_launch(4095, 4096, wide_loads=True), target)
    assert set(found) == {"wide loads"}
    assert set(report.instructions.loads) == {4}
    assert judged(scaled_launch(4096, 4096, wide_loads=True), target)[1] == {}


def test_what_does_not_compile_is_one_sentence_with_the_line() -> None:
    launch = Launch(wrong, (1,), {"x_ptr": meta(4)}, {"BLOCK": 3})
    with pytest.raises(DoesNotCompile) as error:
        compile_launch(launch, TARGETS["sm_90"])
    number = Path(__file__).read_text().split("\n").index("    tl.store(x_ptr + tl.arange(0, BLOCK), 1)") + 1
    assert str(error.value) == (
        f"wrong does not compile for sm_90: test_aot.py:{number} `tl.store(x_ptr + tl.arange(0, BLOCK), 1)`: "
        "arange's range must be a power of 2"
    )


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(InputError, match="wrong cannot be compiled without BLOCK"):
        compile_launch(Launch(wrong, (1,), {"x_ptr": meta(4)}, {}), TARGETS["sm_90"])


def test_a_function_that_is_no_kernel_is_named() -> None:
    with pytest.raises(InputError, match=r"meta is no @triton\.jit function"):
        compile_launch(Launch(meta, (1,), {}, {}), TARGETS["sm_90"])


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        @property
        def nvdisasm(self) -> None:
            raise RuntimeError("Cannot find nvdisasm")

    monkeypatch.setattr(disassemble.knobs, "nvidia", Without())
    with pytest.raises(MissingExtraError, match=r"has no nvdisasm.*TRITON_NVDISASM_PATH"):
        disassemble.tool("nvdisasm")


# --- the specialisation is that of a start


class NoGpu:
    """A driver for a GPU that is not there: as far as Triton's own start gets before it compiles."""

    def __init__(self, target: Target) -> None:
        self.gpu = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Launch, Target], dict[str, Any]]]:
    """What Triton is about to compile when a launch is started on a target: told by the hook that may stop it."""
    seen: list[dict[str, Any]] = []

    def stop(*, compile: dict[str, Any], **_: Any) -> bool:
        seen.append(compile)
        return True

    def start(launch: Launch, target: Target) -> dict[str, Any]:
        monkeypatch.setattr(driver, "_active", NoGpu(target))
        launch.kernel.device_caches.clear()
        launch.run()
        return seen.pop()

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = stop
        yield start


def awkward_launch() -> Launch:
    """Every kind of argument: aligned and not, 1, divisible by 16 and not, past 2^31, float, bool, None."""
    x = meta(4096)
    given = {"a_ptr": x, "b_ptr": x[1:], "c_ptr": None, "M": 1, "N": 48, "K": 17}
    given |= {"a_stride": 2**31, "b_stride": 0.5, "c_stride": True}
    return Launch(product, (1,), given, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}, 8, 5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [product_launch, scaled_launch, awkward_launch])
def test_the_specialisation_is_that_of_a_start(
    make: Callable[[], Launch], target: str, started: Callable[[Launch, Target], dict[str, Any]]
) -> None:
    run, special = started(make(), TARGETS[target]), compile_code.specialise(make(), TARGETS[target])
    assert special.source.signature == run["signature"]
    assert special.source.constants == run["constants"]
    assert special.source.attrs == run["configs"][0]
    assert (special.options.num_warps, special.options.num_stages) == (run["num_warps"], run["num_stages"])


def test_the_specialisation_knows_what_may_be_assumed() -> None:
    special = compile_code.specialise(awkward_launch(), TARGETS["sm_90"])
    assert special.source.signature == {
        "a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "constexpr", "M": "constexpr", "N": "i32", "K": "i32",
        "a_stride": "i64", "b_stride": "fp32", "c_stride": "u1",
        "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr",
    }  # fmt: skip
    divisible = [index for (index,), known in special.source.attrs.items() if ["tt.divisibility", 16] in known]
    assert divisible == [0, 4, 6]  # a_ptr, N, a_stride


def test_options_of_a_launch_reach_the_compiler() -> None:
    report, _ = judged(product_launch(options={"maxnreg": 96}), "sm_80")
    assert report.resources.registers <= 96


# --- caches, processes, the interpreter


def test_nothing_is_left_in_the_cache_and_nothing_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_launch(scaled_launch(), TARGETS["sm_80"])
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_a_process_that_interprets_can_compile() -> None:
    from refllm import kernels

    module = importlib.import_module("refllm.kernels.triton.rms_norm")
    before = [compile_launch(launch, TARGETS["sm_90"]) for _, launch in list(module.launches(TARGETS["sm_90"]))[:1]]
    with kernels.interpreted():
        kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
    after = [compile_launch(launch, TARGETS["sm_90"]) for _, launch in list(module.launches(TARGETS["sm_90"]))[:1]]
    assert [report.instructions for report in after] == [report.instructions for report in before]


CARRIED = """
import os, multiprocessing
import torch, triton, triton.language as tl
from refllm.kernels.launch import Launch

@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

def launches(target):
    x = torch.empty(4096, device="meta")
    for n in SIZES:
        if n == 1 and DIES and multiprocessing.parent_process():
            os._exit(1)
        yield f"n={n}", Launch(copy, (1,), {"x_ptr": x, "y_ptr": x, "n": n}, {"BLOCK": 1024})
"""


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    path = tmp_path / "torch.py"  # the name of a module that exists: it must not be taken for that
    path.write_text(CARRIED.replace("DIES", "False").replace("SIZES", "(4096, 4080, 4095, 1, 2**40)"))
    return path


def test_equal_specialisations_are_compiled_once_and_processes_change_nothing(
    carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FEW", 0)
    configurations, steps = collect([FileSource(str(carried))], [TARGETS["sm_80"], TARGETS["gfx942"]]), []
    together = check(configurations, 2, lambda what, done, total: steps.append((what, done, total)))
    assert len(configurations) == 10
    assert steps[-1][1:] == (8, 8)  # 16 divides 4096 and 4080: one specialisation
    assert [row.configuration for row in together] == configurations

    def figures(rows: list[Checked]) -> list[Any]:
        return [row.report and (row.report.resources, row.report.instructions) for row in rows]

    assert figures(together) == figures(check(configurations, 1))
    assert together[0].report is not None
    assert together[2].report is not None
    assert set(together[0].report.instructions.loads) == {16}
    assert set(together[2].report.instructions.loads) == {4}


def test_a_compiler_that_crashes_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FEW", 0)
    path = tmp_path / "dies.py"
    path.write_text(CARRIED.replace("DIES", "True").replace("SIZES", "(4096, 1)"))  # few: each takes a process
    rows = check(collect([FileSource(str(path), ours=True)], [TARGETS["gfx942"]]), 2)
    assert [[finding.sentence for finding in row.findings] for row in rows] == (
        [["copy for gfx942: the compiler crashes"]] * 2
    )


# --- reading


@pytest.mark.parametrize("target", NVIDIA)
def test_code_read_together_is_what_nvdisasm_lists_for_each_file(target: str, tmp_path: Path) -> None:
    """Of the first, the last and one between."""
    read = compiled(target)[1]
    assert len(read) > 5
    for cubin, opcodes in (read[0], read[4], read[-1]):
        (tmp_path / "one.cubin").write_bytes(cubin)
        command = [disassemble.tool("nvdisasm"), "-c", str(tmp_path / "one.cubin")]
        listed = disassemble.read_listing(subprocess.run(command, capture_output=True, text=True).stdout)
        assert opcodes == listed != []


def test_registers_are_the_most_and_spills_the_sum_over_functions() -> None:
    log = """
ptxas info    : Function properties for f
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Function properties for g
    0 bytes stack frame, 1 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
    assert read_ptxas_log(log) == Resources(40, 8, 7)
    assert read_ptxas_log("") is None


def test_loads_are_counted_by_width() -> None:
    opcodes = ("LDG.E.128", "@P0 LDG.E.U16", "@!UP1 LDGSTS.E.BYPASS.LTC128B.64", "LDGSTS.E.LTC128B", "NOP", "BRA",
               "STG.E.U16", "@P0 STG.E.64", "STS.128")  # fmt: skip
    listing = "".join(f"        /*{16 * i:04x}*/                   {op} R4 ;\n" for i, op in enumerate(opcodes))
    mix = read_sass(disassemble.read_listing(listing))
    assert mix.loads == {2: 1, 4: 1, 8: 1, 16: 1}
    assert mix.stores == {2: 1, 8: 1}
    assert mix.wide_share == 16 / 30
    assert (mix.count, mix.code_bytes, mix.async_copies) == (8, 144, 2)


def test_products_are_read_with_the_loop_they_are_in() -> None:
    dot = "%c = tt.dot %a, %b, %d : tensor<64x32x{0}> * tensor<32x16x{0}> -> tensor<64x16xf32>"
    text = f"""
    {dot.format("f16")}
    scf.for %i = %x to %y {{
      scf.if %q {{
        %a = tt.load %p
      }} else {{
        {dot.format("bf16")}
      }}
    }}
    {dot.format("f32")}
    {dot.format("f32").replace(" :", ", inputPrecision = tf32 :")}
    """
    found = [(dot.M, dot.N, dot.K, dot.dtype, dot.pipelined) for dot in read_dots(text)]
    assert found == [(64, 16, 32, "f16", False), (64, 16, 32, "bf16", True), (64, 16, 32, "f32", False)]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        # NVIDIA's occupancy calculator, by hand: 65,536 registers in granules of 256 per warp.
        ("sm_80", 32, 0, 4, 0, (16, "warps")),
        ("sm_80", 33, 0, 4, 0, (12, "registers")),
        ("sm_80", 255, 0, 8, 0, (1, "registers")),
        ("sm_80", 32, 0, 1, 0, (32, "programs")),
        ("sm_80", 32, 81_920, 4, 0, (2, "shared memory")),
        ("sm_90", 128, 98_304, 8, 0, (2, "registers")),
        ("sm_90", 64, 115_713, 4, 0, (1, "shared memory")),
        ("sm_100", 64, 1024, 4, 256, (2, "tensor memory")),
        ("gfx942", 64, 0, 4, 0, (8, "warps")),
        ("gfx942", 129, 0, 4, 0, (3, "registers")),
        ("gfx942", 512, 0, 8, 0, (0, "registers")),
        ("gfx942", 64, 65_536, 4, 0, (1, "shared memory")),
    ],
)
def test_occupancy(
    target: str, registers: int, shared: int, warps: int, columns: int, expected: tuple[int, str]
) -> None:
    fits = occupancy(TARGETS[target], registers, shared, warps, columns)
    assert (fits.programs, fits.limit) == expected
    assert fits.warps == fits.programs * warps
