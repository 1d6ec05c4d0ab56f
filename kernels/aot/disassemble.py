"""Turns NVIDIA's machine code into lists of opcodes with nvdisasm, many kernels at a time.

nvdisasm takes a quarter of a second to start and next to nothing per kernel; so the code of all kernels goes to it as
one raw binary, and its listing is cut where one ends and the next begins.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence

from triton import knobs

from refllm.errors import MissingExtraError
from refllm.kernels.targets import Target

INSTRUCTION = 16
"""Bytes of every instruction since Volta (CUDA Binary Utilities)."""


def opcodes_of(cubins: Sequence[bytes], target: Target) -> list[list[str]]:
    """The opcodes of every cubin in order, e.g. `LDG.E.128`. Raises MissingExtraError without a working nvdisasm."""
    codes = [_code(cubin) for cubin in cubins]
    if not codes:
        return []
    architecture = f"SM{target.arch}{'a' if int(target.arch) >= 90 else ''}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [tool("nvdisasm"), "--binary", architecture, "--no-dataflow", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
    opcodes, lengths = read_listing(listing.stdout), [len(code) // INSTRUCTION for code in codes]
    if listing.returncode or len(opcodes) != sum(lengths):
        raise MissingExtraError(f"{command[0]} cannot read the code for {target.name}: {listing.stderr.strip()}")
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return [opcodes[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def read_listing(listing: str) -> list[str]:
    """The opcodes of a listing with lines such as `/*0a10*/  @!P0 LDG.E.128 R4, [R2] ;`."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)


def tool(name: str) -> str:
    """The path of one of NVIDIA's tools that come with Triton. Raises MissingExtraError if this build has none."""
    try:
        return str(getattr(knobs.nvidia, name).path)
    except RuntimeError:
        raise MissingExtraError(
            f"this build of Triton has no {name.replace('_', '-')}, which reading NVIDIA code needs; install the "
            f"wheel from PyPI, or name the tool of a CUDA toolkit in TRITON_{name.upper()}_PATH"
        ) from None


def _code(cubin: bytes) -> bytes:
    """The sections .text.* of an ELF file of 64 bits (System V ABI: ELF header, section header)."""
    (table,), (count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
    # Of each header: where its name is among the names, where the section is in the file, how long it is.
    headers = [struct.unpack_from("<I20xQQ", cubin, table + 64 * index) for index in range(count)]
    first_name = headers[names][1]
    return b"".join(
        cubin[start : start + size] for name, start, size in headers if cubin.startswith(b".text.", first_name + name)
    )
