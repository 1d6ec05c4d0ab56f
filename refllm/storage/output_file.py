"""Every file that refllm writes: refused before the work where it cannot be written, and at no moment half a file.

New content goes into a file of its own in the same folder, under a name that nobody else uses, and takes its place by
one rename when it is complete. Who reads meanwhile has all of the old content or all of the new; a full disk, a kill or
a second writer costs the new content at most. A symbolic link stays one: its target is replaced.

A writer holds a lock (flock) on its unfinished file. The lock goes with the process, however that ends, so an
unfinished file without one was left by a writer that is gone, and the next writer in the folder removes it.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from refllm.errors import InputError

_PREFIX, _SUFFIX = ".refllm-", ".tmp"


def must_be_writable(option: str, path: str | os.PathLike[str]) -> None:
    """Raises InputError for a path at which no file can be written. option: what named it, "--json".

    The folder must be there. What is at the path already must be a regular file, or a link to one.
    """
    try:
        _target(path)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {_reason(error)}") from None


def must_be_folder(option: str, path: str | os.PathLike[str]) -> None:
    """Makes the folder where it is missing. Raises InputError where that is not possible, or nothing fits in it."""
    try:
        os.makedirs(path, exist_ok=True)
        _target(Path(path, "new file"))
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder to write to: {_reason(error)}") from None


def write(option: str, path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file in one piece. Raises InputError for a file that cannot be written."""
    try:
        replace(path, content)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {_reason(error)}") from None


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file in one piece. Raises OSError if it cannot be written; what was there then stays."""
    with replacing(path) as file:
        file.write(encoded(content))


def encoded(content: str | bytes) -> bytes:
    """UTF-8. Half a surrogate pair, which no UTF-8 can hold, becomes the escape that JSON has for it."""
    return content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to. At the end of the block it takes the place of `path`; an exception leaves that as it was."""
    with NewFile(path) as new:
        yield new.file
        new.publish()


class NewFile:
    """The new content of a file, out of sight until `publish`. A context manager that removes what was not published.

    file: to write to; name: where it lies meanwhile; path: where it goes. Raises OSError where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _target(path)
        folder = os.path.dirname(self.path)
        _sweep(folder)
        self.file, self.name = _unfinished(folder)
        self._published = False
        with contextlib.suppress(OSError):  # as writing into the old file would have left it
            old = os.stat(self.path)
            _keep_owner_and_mode(self.file.fileno(), old)

    def write(self, content: str | bytes) -> Self:
        """Adds to the content."""
        self.file.write(encoded(content))
        return self

    def complete(self) -> None:
        """Everything is on the disk: what can fail for want of space has failed before this returns."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """The new content takes the place of the old."""
        self.complete()
        os.replace(self.name, self.path)
        self._published = True
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            with contextlib.suppress(OSError):
                os.unlink(self.name)
        with contextlib.suppress(OSError):  # closing writes what is buffered, to a disk that may be full
            self.file.close()


def publish_together(new: Sequence[NewFile], keys: Sequence[str | os.PathLike[str]], stale: Collection[Path]) -> None:
    """Publishes files that belong together, so that no reader ever finds some of the old beside some of the new.

    keys: the paths of those without which nobody reads the others (config.json of a model). The old ones go before
    anything else changes and the new ones come last, in the opposite order: a writer that is killed in between leaves
    files that are refused, not ones that are misread. stale: files of the old set that the new one does not have,
    removed before the keys come. Raises OSError.
    """
    order = [os.path.realpath(key) for key in keys]
    for one in new:  # a disk that is full says so here, where the old files still stand
        one.complete()
    for path in order:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    for one in new:
        if one.path not in order:
            one.publish()
    for entry in stale:
        entry.unlink(missing_ok=True)
    for one in sorted((one for one in new if one.path in order), key=lambda one: -order.index(one.path)):
        one.publish()


def replace_together(
    folder: str | os.PathLike[str], contents: Mapping[str, str | bytes], key: str, stale: Collection[Path] = ()
) -> None:
    """Files that belong together, by their paths in `folder`, as `publish_together` does it. Raises OSError."""
    with contextlib.ExitStack() as stack:
        new = [stack.enter_context(NewFile(Path(folder, name))).write(text) for name, text in contents.items()]
        publish_together(new, [Path(folder, key)], stale)


# ------------------------------------------------------------------------------------------------------- how it is done


def _target(path: str | os.PathLike[str]) -> str:
    """The file that a path leads to, through links. Raises OSError where no file can be written."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOENT, f"there is no folder {Path(path).parent}", str(path)) from None
        mode = None
    except NotADirectoryError:
        raise NotADirectoryError(errno.ENOTDIR, f"{Path(path).parent} is not a folder", str(path)) from None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of_file(mode)}", str(path))
    # A rename changes the folder, so that must be writable; and who may not write to the file may not replace it.
    for place in (folder, target) if mode is not None else (folder,):
        if not os.access(place, os.W_OK):
            of_folder = "" if place == target else f" in the folder {folder}"
            raise PermissionError(errno.EACCES, f"permission denied{of_folder}", str(path))
    return target


def kind_of_file(mode: int) -> str:
    """What a path that is no regular file is, in words. mode: st_mode."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return f"{kinds.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _unfinished(folder: str) -> tuple[BinaryIO, str]:
    """A new file in `folder`, locked, and its name. Its mode is what the umask leaves of rw-rw-rw-, as of any file."""
    while True:
        name = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        file = open(name, "xb")  # noqa: SIM115 (it is closed by NewFile)
        _lock(file.fileno(), wait=True)
        # A sweeper may have come before the lock; then this file has no name any more.
        if os.fstat(file.fileno()).st_nlink:
            return file, name
        file.close()


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is one that a writer has not published yet, or never will."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _sweep(folder: str) -> None:
    """Removes the unfinished files of writers that are gone."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [entry.path for entry in entries if is_unfinished(entry.name)]
        for name in left:
            with contextlib.suppress(OSError):
                handle = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle, wait=False):
                        os.unlink(name)
                finally:
                    os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether the lock was had; a file system without locks gives none."""
    try:
        import fcntl  # where there are no such locks, unfinished files of killed writers stay
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _keep_owner_and_mode(handle: int, old: os.stat_result) -> None:
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):  # only root may give files away
            os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))
