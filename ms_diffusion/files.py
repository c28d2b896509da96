"""Files that are read whole and never seen half-written, the cache of computed arrays, and computation in batches.

A file is written under a temporary name in its folder, synced to the disk, and renamed. The temporary name says which
process writes it, so the next writer in that folder removes what a killed process has left (`sweep`)."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from .progress import ProgressBar
from .runtime import UserError, alone, available_memory, broadcast, gather, ranks

T = TypeVar("T")
DAY = 86400.0  # seconds after which a temporary file of another machine is of no live process: it is written in one go
TEMPORARY = re.compile(r"\..*\.msd-(\w+)-(\d+)-(\d+)-\w+\.tmp", re.DOTALL)
NAME_BYTES = 255  # of a file's name, on all common file systems
# What file systems answer that cannot sync a folder, or do not let it be opened
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)
JSON_BYTES = 1 << 26


# Writing


def write(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a temporary file in the folder of `path`, sync it to the disk, and rename it to `path`. A device or
    a pipe, such as /dev/null, is written to. Raises OSError; then `path` is as before."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            save(file)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = temporary_path(path)
    try:
        with create(temporary) as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Write a JSON value as a file, as `write` does."""
    write(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def create(path: Path) -> BinaryIO:
    """A new file, open for writing. Raises FileExistsError if there is anything of this name, such as a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")  # the umask takes its share of the mode


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in UNSYNCED:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in UNSYNCED:
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until its data are on the disk."""
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_output(*paths: str | os.PathLike | None) -> None:
    """Make the folders of the files that a program is going to write, before it works for hours. Raises OSError if a file
    cannot be written there, and does nothing for None."""
    for path in map(Path, filter(None, paths)):
        if path.is_dir():  # raises OSError for a name that is too long
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.exists() and not path.is_file():  # a device
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            create(temporary).close()
        finally:
            temporary.unlink(missing_ok=True)


# Temporary names


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, for a file or a folder that this process alone writes: nobody can guess it."""
    end = f".msd-{machine()}-{os.getpid()}-{started(os.getpid())}-{secrets.token_hex(4)}.tmp"
    name = os.fsencode(path.name)[: NAME_BYTES - len(end) - 1]
    return path.with_name(f".{name.decode(errors='ignore')}{end}")


def sweep(folder: Path) -> None:
    """Remove temporary files and folders of processes that have ended."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [each for each in entries if TEMPORARY.fullmatch(each.name)]:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if found.st_uid == os.geteuid() and is_stale(entry.name, found.st_mtime):
                    remove(Path(entry.path))


def is_stale(name: str, changed: float) -> bool:
    """Whether the process that writes under this temporary name has ended. `changed` is when that was last written to."""
    match = TEMPORARY.fullmatch(name)
    assert match, name
    if match[1] == machine():
        return not is_running(int(match[2]), int(match[3]))
    return time.time() - changed > DAY  # of another machine or container, or of this one before it was started anew


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder goes at once, by a temporary name: no reader sees half of it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not TEMPORARY.fullmatch(path.name):
        path = path.rename(temporary_path(path))
    shutil.rmtree(path, ignore_errors=True)


@functools.cache
def machine() -> str:
    """A name for the processes that know each other by their numbers: of this machine, since it was started, and of this
    container."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def started(process: int) -> int:
    """When a process of this machine was started, in the kernel's ticks; 0 where that is unknown."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_running(process: int, start: int) -> bool:
    """Whether the process of this machine with this number and start is still running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        pass  # another user's
    return started(process) == start


# Reading


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, open for reading. Raises OSError if it cannot be read or is a folder, a device or a pipe, which could
    be endless."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike, most: int | None = None) -> bytes:
    """The content of a regular file. Raises OSError as `open_file` does, UserError if it has more than `most` bytes, or more
    than there is memory."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{path} has {size / 1e6:.1f} MB, where at most {most / 1e6:.1f} MB are expected")
        check_memory(size, path)
        return file.read()


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises OSError if it cannot be read, ValueError if it is not JSON."""
    try:
        return json.loads(read_bytes(path, JSON_BYTES))
    except (RecursionError, UserError) as e:  # nested too deeply; too large
        raise ValueError(str(e)) from e


def check_memory(needed: int, what: Any) -> None:
    """Raise UserError if there is less memory than these bytes, which `what` needs."""
    if needed > (free := available_memory()):
        raise UserError(f"{what} needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")


# Shared by ranks and processes


def share_files(paths: Sequence[Path]) -> None:
    """Let all ranks have the files that rank 0 has; all call this. A rank on a disk of its own writes them there."""
    for path in paths:
        data = broadcast(path.read_bytes() if ranks()[0] == 0 else b"")
        if not (path.exists() and path.read_bytes() == data):
            write(path, lambda file, data=data: file.write(data))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time do what follows with a folder, such as a download."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """`folder` if it exists and can be written to, else ms_diffusion in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if folder and os.access(folder, os.W_OK | os.X_OK):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms_diffusion"


def load_or_compute(
    path: str | os.PathLike, load: Callable[[BinaryIO], T], compute: Callable[[], T], save: Callable[[BinaryIO, T], object]
) -> T:
    """load(file) of a cache file; if it is missing or corrupt, compute(), whose result save(file, result) writes to `path`.
    If the file cannot be written, the result is returned all the same. Several ranks compute together if one of them has no
    file, and rank 0 writes it."""
    found, (rank, _) = [], ranks()
    with contextlib.suppress(Exception), open(path, "rb") as file:  # a corrupt file raises many kinds of exceptions
        found.append(load(file))
    if gather(np.array([len(found)], np.int32)).all():
        return found[0]
    result = compute()
    if rank == 0:
        with contextlib.suppress(OSError):  # on a full or read-only disk the next call computes again
            write(path, lambda file: save(file, result))
    return result


def in_batches(
    fn: Callable[[np.ndarray], Sequence[np.ndarray]], rows: np.ndarray, size: int, name: str | None = None
) -> list[np.ndarray]:
    """The arrays that fn(rows) returns, computed in batches of one size, for which fn is compiled once.
    The last batch is filled up with the last row. With `name` there is a progress bar.

    Several ranks share the batches and all return the same: all of them call this with the same rows, or one of them
    `runtime.alone`. The batches are smaller than `size` where there would be fewer of them than ranks."""
    rank, world_size = ranks()
    size = max(min(size, -(-len(rows) // world_size)), 1)
    share = -(-len(rows) // (size * world_size)) * size  # rows of each rank
    found = []
    with alone():
        batches = range(rank * share, (rank + 1) * share, size)
        for first in ProgressBar(batches, unit="batch", desc=name, disable=name is None or rank > 0):
            found.append(fn(rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]))
    parts = (gather(np.concatenate(part)) for part in zip(*found, strict=True))
    return [part.reshape(-1, *part.shape[2:])[: len(rows)] for part in parts]
