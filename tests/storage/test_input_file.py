"""A file is read up to a limit, whatever size the system tells of it."""

from pathlib import Path

import pytest

from refllm.storage.input_file import read_bytes


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_what_is_within_the_limit_is_read_whole(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert read_bytes(tmp_path / "file", 10) == b"x" * size


@pytest.mark.parametrize("size", [11, 4000])
def test_what_is_beyond_the_limit_is_refused_with_its_size(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    with pytest.raises(OSError, match=f"it has {size} bytes, and at most 10 are read"):
        read_bytes(tmp_path / "file", 10)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="there is no /proc")
def test_a_file_that_tells_no_size_is_read_whole_or_refused() -> None:
    assert Path("/proc/self/status").stat().st_size == 0
    content = read_bytes("/proc/self/status", 100_000)
    assert content.startswith(b"Name:")
    assert content.endswith(b"\n")
    assert b"voluntary_ctxt_switches" in content
    with pytest.raises(OSError, match="it has 21 bytes, and at most 20 are read"):
        read_bytes("/proc/self/status", 20)
