"""Reads what a compiler made: the instructions, the log of ptxas, the notes of LLVM for AMD.

Every function takes text and returns numbers; nothing here runs a tool.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from refllm.kernels.aot.disassemble import INSTRUCTION

# Opcodes by prefix. NVIDIA: CUDA Binary Utilities, "Instruction Set Reference" per architecture. AMD: CDNA3 ISA.
_TENSOR_NVIDIA = re.compile(r"(UTC\w*MMA|[HQIB]GMMA|[HQIB]MMA)(\.|$)")
_TENSOR_AMD = re.compile(r"v_(s?mfma)_(?!f64)")
_ASYNC = re.compile(r"(LDGSTS|UTMALDG|UBLKCP)(\.|$)")
_FP64_NVIDIA = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)(\.|$)|.*\.F64(\.|$)|MUFU\.\w*64H")
_FP64_AMD = re.compile(r"v_\w*_f64(_|$)")
_LOCAL_NVIDIA = re.compile(r"(LDL|STL)(\.|$)")
_LOCAL_AMD = re.compile(r"scratch_(load|store)_")

# Bytes that one thread loads, by the token of the opcode that says so; without a token it is 4.
_WIDTHS_NVIDIA = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_WIDTHS_AMD = {"byte": 1, "ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
_WIDTHS_AMD |= {f"dwordx{count}": 4 * count for count in (2, 3, 4)}

# The classes of instructions that a report counts, for whoever reads it; the gates use their own patterns above.
_CLASSES_NVIDIA = (
    *("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "LDS", "LDSM", "STS", "STSM", "LDL", "STL", "SHFL", "BAR", "SYNCS"),
    *("MUFU", "FFMA", "FFMA2", "FMUL", "FADD", "CALL"),
)
_CLASSES_AMD = (
    *("global_load", "global_store", "buffer_load", "buffer_store", "ds_read", "ds_write", "ds_bpermute", "scratch"),
    *("s_barrier", "v_exp", "v_fma", "v_pk_fma", "v_accvgpr"),
)


@dataclass(frozen=True)
class Resources:
    """What one thread and one program take, as the compiler reports it.

    registers: per thread; on AMD vector registers, those for accumulation included.
    stack: bytes of local memory per thread. spill_bytes: written to and read from it because registers ran out.
    wgmma_serialized: ptxas had to wait after every wgmma, because something touches its registers in between.
    """

    registers: int
    stack: int
    spill_bytes: int
    wgmma_serialized: bool = False


@dataclass(frozen=True)
class Instructions:
    """The instruction mix of one kernel, counted in the listing and not by how often each runs.

    count, code_bytes: instructions without padding; size of the code with it.
    classes: how many of each kind that is worth a look. tensor, fp64: by opcode.
    async_copies: copies from global into shared memory that nobody waits for. local: loads from and stores to
    local memory, be it for spills or a stack. loads, stores: number of loads from global memory and of stores to it, by
    their bytes per thread.
    """

    count: int
    code_bytes: int
    classes: dict[str, int]
    tensor: dict[str, int]
    fp64: dict[str, int]
    async_copies: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int] = field(default_factory=dict, compare=False)

    @property
    def wide_share(self) -> float:
        """Share of the loaded bytes that come in loads of 16 bytes or more; 1 if nothing is loaded."""
        return share_of_wide(self.loads)


def share_of_wide(widths: dict[int, int]) -> float:
    """Share of the bytes that move 16 or more at a time, of numbers of accesses by their width; 1 of none."""
    total = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width >= 16) / total if total else 1.0


def read_ptxas_log(log: str) -> Resources | None:
    """What `ptxas -v` printed; the worst of the functions in it. None if it says nothing about registers."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not frames:
        return None
    stack = max(int(stack) for stack, _, _ in frames)
    spilled = sum(int(stores) + int(loads) for _, stores, loads in frames)
    return Resources(max(registers), stack, spilled, "wgmma.mma_async instructions are serialized" in log)


def read_sass(listed: list[str]) -> Instructions:
    """The opcodes of one kernel in order, as `disassemble.opcodes_of` returns them."""
    every = Counter(listed)
    opcodes = Counter({opcode: count for opcode, count in every.items() if opcode != "NOP"})
    heads = Counter[str]()
    for opcode, count in opcodes.items():
        heads[opcode.split(".")[0]] += count
    return Instructions(
        count=opcodes.total(),
        code_bytes=INSTRUCTION * every.total(),
        classes={name: heads[name] for name in _CLASSES_NVIDIA if heads[name]},
        tensor=_matching(opcodes, _TENSOR_NVIDIA),
        fp64=_matching(opcodes, _FP64_NVIDIA),
        async_copies=sum(_matching(opcodes, _ASYNC).values()),
        local=sum(_matching(opcodes, _LOCAL_NVIDIA).values()),
        loads=_widths(opcodes, lambda opcode: _width_nvidia(opcode, *_LOADS_NVIDIA)),
        stores=_widths(opcodes, lambda opcode: _width_nvidia(opcode, *_STORES_NVIDIA)),
    )


def read_amdgcn(assembly: str) -> tuple[Resources, Instructions]:
    """The assembly that LLVM writes for AMD, with the notes at its end."""

    def note(name: str) -> int:
        return int(_only(rf"\.{name}:\s+(\d+)", assembly))

    # vgpr_count is the whole: ordinary and accumulation registers share one file (LLVM, AMDGPUUsage, gfx90a and later).
    resources = Resources(note("vgpr_count"), note("private_segment_fixed_size"), 4 * note("vgpr_spill_count"))
    body = assembly.split(".Lfunc_end0:")[0]
    opcodes = Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)(?:\s|$)", body, re.MULTILINE))
    classes = {name: sum(n for opcode, n in opcodes.items() if opcode.startswith(name)) for name in _CLASSES_AMD}
    return resources, Instructions(
        count=opcodes.total() - opcodes["s_nop"],
        code_bytes=int(_only(r"codeLenInByte = (\d+)", assembly)),
        classes={name: count for name, count in classes.items() if count},
        tensor=_matching(opcodes, _TENSOR_AMD),
        fp64=_matching(opcodes, _FP64_AMD),
        async_copies=0,
        local=sum(_matching(opcodes, _LOCAL_AMD).values()),
        loads=_widths(opcodes, lambda opcode: _width_amd(opcode, "load")),
        stores=_widths(opcodes, lambda opcode: _width_amd(opcode, "store")),
    )


def _matching(opcodes: Counter[str], pattern: re.Pattern[str]) -> dict[str, int]:
    return {opcode: count for opcode, count in sorted(opcodes.items()) if pattern.match(opcode)}


def _widths(opcodes: Counter[str], width_of: Callable[[str], int | None]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        if (width := width_of(opcode)) is not None:
            found[width] += count
    return dict(sorted(found.items()))


_LOADS_NVIDIA = ("LDG", "LDGSTS"), ("UTMALDG", "UBLKCP")
_STORES_NVIDIA = ("STG",), ("UTMASTG",)
"""Instructions of a thread, and of the copy engine, which moves whole tiles."""


def _width_nvidia(opcode: str, of_threads: tuple[str, ...], of_tiles: tuple[str, ...]) -> int | None:
    head, *tokens = opcode.split(".")
    if head in of_tiles:
        return 16
    if head not in of_threads:
        return None
    return next((_WIDTHS_NVIDIA[token] for token in tokens if token in _WIDTHS_NVIDIA), 4)


def _width_amd(opcode: str, which: str) -> int | None:
    match = re.match(rf"(?:global|buffer|flat)_{which}_(?:lds_)?([a-z]+?(?:x\d)?)(?:_|$)", opcode)
    return _WIDTHS_AMD.get(match.group(1)) if match else None


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} does not occur in the output of the compiler")
    return match.group(1)


@dataclass(frozen=True)
class Dot:
    """A tl.dot of [M, K] and [K, N] in the program, and whether it is in a loop that also loads."""

    M: int
    N: int
    K: int
    dtype: str
    pipelined: bool


def read_dots(ttir: str) -> list[Dot]:
    """The products of narrow numbers in Triton's own form of the program: those that tensor cores can take.

    float32 counts where it may be rounded to tf32 first, and not where it is asked for exactly ("ieee").
    """
    dots: list[Dot] = []
    for line, loop in _lines_with_loop(ttir):
        match = re.search(r"= tt\.dot .*: tensor<(?:\d+x)?(\d+)x(\d+)x(\w+)> \* tensor<(?:\d+x)?\d+x(\d+)x", line)
        if match is None:
            continue
        M, K, dtype, N = match.groups()
        if (dtype == "f32" and "tf32" not in line and "bf16x" not in line) or dtype == "f64":
            continue
        dots.append(Dot(int(M), int(N), int(K), dtype, "tt.load" in loop or "tt.descriptor_load" in loop))
    return dots


def _lines_with_loop(ttir: str) -> list[tuple[str, str]]:
    """Every line with the text of the innermost loop around it ("" outside of loops)."""
    lines = ttir.splitlines()
    loop_of = [""] * len(lines)
    opened: list[tuple[int, bool]] = []
    for index, line in enumerate(lines):
        if line.lstrip().startswith("}") and opened:
            start, is_loop = opened.pop()
            if is_loop:
                text = "\n".join(lines[start:index])
                loop_of[start:index] = [inner or text for inner in loop_of[start:index]]
        if line.rstrip().endswith("{"):
            opened.append((index, "scf.for" in line or "scf.while" in line or line.strip() == "} do {"))
    return list(zip(lines, loop_of, strict=True))


def read_traffic(ttir: str, threads: int) -> tuple[float, float]:
    """(loads, stores): what share of the bytes that the program names could move 16 at a time in each of its threads.

    Not those of scalars, of blocks with fewer bytes for a thread, and of blocks whose addresses were loaded themselves.
    """
    moved = {"load": [0, 0], "store": [0, 0]}
    loaded: set[str] = set()
    for line in ttir.splitlines():
        made, _, right = line.partition(" = ") if re.match(r"\s*%", line) else ("", "", line)
        for inner, outer in re.findall(r"(%[\w.]+) = (%[\w.]+)", right):  # the iter_args of a loop
            loaded |= {inner} if outer in loaded else set()
        operands = re.findall(r"%[\w.]+", right)
        access = re.search(r"tt\.(descriptor_)?(load|store) ", right)
        if access is None:
            if loaded.intersection(operands):
                loaded.add(made.strip().split(":")[0])
            continue
        of_tiles, which = access.groups()
        size = _bytes_of(right)
        moved[which][0] += size
        gathered = operands[:1] and operands[0] in loaded
        moved[which][1] += size if of_tiles or (size >= 16 * threads and not gathered) else 0
        if which == "load" and "tensor<" in right:
            loaded.add(made.strip())
    shares = [wide / total if total else 0.0 for total, wide in moved.values()]
    return shares[0], shares[1]


_SIZES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}


def _bytes_of(line: str) -> int:
    """Bytes of the value that a load or store moves, by the last type on its line."""
    shape, kind = re.findall(r"(?:tensor<((?:\d+x)*))?(?:!tt\.ptr<)?((?:bf|f|i)\d+\w*)", line)[-1]
    count = 1
    for length in re.findall(r"\d+", shape):
        count *= int(length)
    return count * _SIZES.get(kind, 1)
