"""Files that are read whole and never seen half-written, the cache of computed arrays, and computation in batches.

A file is written under a temporary name in its folder, synced to the disk, and renamed. The temporary name says which
process writes it, so the next writer in that folder removes what a killed process has left (`sweep`)."""

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .progress import ProgressBar
from .runtime import UserError, alone, available_memory, broadcast, check_interrupted, gather, ranks

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, Sequence[int]]
DAY = 86400.0  # seconds after which a temporary file of another machine is of no live process: it is written in one go
TEMPORARY = re.compile(r"\..*\.msd-(\w+)-(\d+)-(\d+)-\w+\.tmp", re.DOTALL)
NAME_BYTES = 255  # of a file's name, on all common file systems
# What file systems answer that cannot sync a folder, or do not let it be opened
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)
# What a run's folder cannot spare
RUN_FILES = (
    "config.json",
    "labels.json",
    "metrics.jsonl",
    "points.npz",
    "checkpoints",
    "first_stage",
    "text_encoder",
)
JSON_BYTES = 1 << 26
Source = str | os.PathLike | BinaryIO  # a file's path, or an open file that can seek
NPY_HEADER = 10_000  # bytes, at most, of the header of an .npy file: NumPy's bound
NPY_FIELDS = [rb"['\"]descr['\"]:\s*['\"]([<>|=]?[biufc]\d{1,2})['\"]", rb"['\"]fortran_order['\"]:\s*(True|False)"]
NPY_FIELDS += [rb"['\"]shape['\"]:\s*\(([\d,\s]*)\)"]


# Writing


def write(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a temporary file in the folder of `path`, sync it to the disk, and rename it to `path`. A device or
    a pipe, such as /dev/null, is written to. Raises OSError; then `path` is as before."""
    path = Path(path)
    if is_device(path):
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
        sync_folder(path.parent)
    except OSError as e:
        e.filename, e.filename2 = str(path), None  # the temporary name says nothing to a user
        raise
    finally:
        temporary.unlink(missing_ok=True)


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


def is_device(path: Path) -> bool:
    """Whether a path is no file that can be replaced: a device, a pipe, or a link to one, such as /dev/stdout, also where
    that is a file. Raises OSError if the path is not valid."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    is_stream = path.is_symlink() and os.path.realpath(path.parent).split(os.sep)[1] in ("dev", "proc")
    return is_stream or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_output(*paths: str | os.PathLike | None) -> None:
    """Make the folders of the files that a program is going to write, before it works for hours. Raises OSError if a file
    cannot be written there, UserError if two of the paths are one file, or one is a file that a run needs. Does nothing for
    None."""
    files = [path for path in map(Path, filter(None, paths)) if not is_device(path)]
    places = [os.path.realpath(path.parent) + os.sep + path.name for path in files]
    if twice := next((path for path, place in zip(files, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"two outputs would be written to {twice}: give each a path of its own")
    for path, place in zip(files, map(Path, places), strict=True):
        for folder in place.parents:
            if (folder / "checkpoints").is_dir() and place.relative_to(folder).parts[0] in RUN_FILES:
                raise UserError(f"{path} belongs to the run in {folder}: choose another path")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            create(temporary).close()
        except OSError as e:
            e.filename = str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


# Temporary names


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, for a file or a folder that this process alone writes: nobody can guess it."""
    end = f".msd-{machine()}-{os.getpid()}-{started(os.getpid())}-{secrets.token_hex(4)}.tmp"
    name = os.fsencode(path.name)[: NAME_BYTES - len(end) - 1]
    return path.with_name(f".{name.decode(errors='ignore')}{end}")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder that only this user can read, for the time of the block."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    folder = temporary_path(place / "ms_diffusion")
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    except (ProcessLookupError, OverflowError):
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


def shown(name: Any) -> str:
    """A path, or a name in a file, for a line of text: both may hold anything, such as line breaks."""
    text = str(name)
    return text if text.isprintable() and len(text) < 1000 else ascii(text)[:1000]


def load_npy(source: Source) -> np.ndarray:
    """The array in an .npy file. Its type, shape and size are checked before memory is taken, and nothing is unpickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds anything but plain numbers.
        UserError: there is not enough memory."""
    with opened(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return read_array(file, size, source)


def load_npz(source: Source, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that are in an .npz file; the others are not read. Checked and refused as by `load_npy`."""
    with opened(source) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {name: archive.NameToInfo.get(f"{name}.npy") for name in names}
                return {name: read_member(archive, member, source) for name, member in members.items() if member}
        except (OSError, ValueError, UserError):
            raise
        except Exception as e:  # a damaged archive raises many kinds of exceptions
            raise ValueError(textwrap.shorten(str(e) or repr(e), 100)) from e


def opened(source: Source) -> contextlib.AbstractContextManager[BinaryIO]:
    return open_file(source) if isinstance(source, str | os.PathLike) else contextlib.nullcontext(source)


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, what: Any) -> np.ndarray:
    """The array in a member of an archive. Python unpacks only these two kinds piece by piece, and NumPy writes no other."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in a way that NumPy does not use")
    with archive.open(member) as file:
        return read_array(file, member.file_size, what)


def read_array(file: Any, size: int, what: Any) -> np.ndarray:
    """The array in an open .npy file of `size` bytes."""
    magic = file.read(8)
    length = file.read(2 if magic[6:7] == b"\1" else 4)
    header = file.read(min(int.from_bytes(length, "little"), NPY_HEADER))
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it is not an .npy file")
    found = [re.search(field, header) for field in NPY_FIELDS]
    if not all(found):
        raise ValueError("its header is damaged, or it holds something else than plain numbers")
    descr, order, dimensions = (field[1].decode() for field in found if field)
    shape = tuple(int(each) for each in dimensions.split(",") if each.strip())
    try:
        dtype = np.dtype(descr)
        expected = math.prod(shape) * dtype.itemsize
        if expected != size - len(magic) - len(length) - len(header):
            raise ValueError(f"its header says shape {shape} of {dtype}, which is not its size")
        check_memory(expected, what)
        array = np.empty(math.prod(shape), dtype)
        array.reshape(shape)  # which may have too many axes
    except (TypeError, OverflowError) as e:
        raise ValueError(f"its header is damaged: {e}") from e
    content, piece = array.view(np.uint8), 1 << 20
    for first in range(0, len(content), piece):
        part = content[first : first + piece]
        if file.readinto(part) != len(part):
            raise ValueError("it is truncated")
    if file.read(1):  # in an archive, the end is where the checksum is looked at
        raise ValueError("it is longer than its header says")
    return array.reshape(shape, order="F" if order == "True" else "C")


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


# Caches


def private_folder(folder: str | os.PathLike) -> Path:
    """The folder, by its path without links; it is made, with mode 0700, if it does not exist. Raises PermissionError if
    another user but root could change what is in it, other kinds of OSError if it cannot be made."""
    folder = Path(os.path.abspath(folder))
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    there = missing[-1].parent if missing else folder
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    _check_owners(there, above=bool(missing))
    for each in reversed(missing):
        each.mkdir(0o700, exist_ok=True)  # another process may make it at the same moment
    _check_owners(folder)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "it belongs to another user", str(folder))
    return folder.resolve()


def _check_owners(folder: Path, above: bool = False) -> None:
    """Raise PermissionError if others can change what a folder holds or where its path leads to: they own a part of the path
    or may write to one. With `above` it may be one like /tmp, where all may write but none may change what is another's."""
    trusted = {0, os.geteuid(), os.stat("/").st_uid}  # root may have another number in a container
    for part in (folder, *folder.parents):
        found = part.lstat()
        if stat.S_ISLNK(found.st_mode):
            _check_owners(part.parent / part.readlink(), above or part != folder)
        elif found.st_mode & 0o022 and not (found.st_mode & stat.S_ISVTX and (above or part != folder)):
            raise PermissionError(errno.EACCES, "other users can write to it (chmod go-w mends that)", str(part))
        if found.st_uid not in trusted:
            raise PermissionError(errno.EACCES, "it belongs to another user", str(part))


def user_cache() -> Path:
    """The folder ms_diffusion in the user's cache ($XDG_CACHE_HOME or ~/.cache), which is a `private_folder`. Raises OSError
    if it cannot be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", cache)
    return private_folder(Path(cache) / "ms_diffusion")


@functools.cache
def process_folder(reason: str) -> Path:
    """A private folder among the system's temporary files, which is removed when this process ends. A line on stderr says
    the `reason` why it replaces the user's cache. Raises OSError if it cannot be made."""
    place, process = Path(tempfile.gettempdir()), os.getpid()
    sweep(place)  # a process that is killed leaves its folder
    folder = private_folder(temporary_path(place / "ms_diffusion"))
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))  # not in a fork
    print(f"note: caches end with this process: {reason}; set XDG_CACHE_HOME to a folder of your own", file=sys.stderr)
    return folder


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """`folder` if it exists and can be written to, else `user_cache`, or a `process_folder` where that is impossible. If all
    three are, the path is one where nothing can be written."""
    if folder and os.access(folder, os.W_OK | os.X_OK):
        return Path(folder)
    try:
        found = user_cache()
        if os.access(found, os.W_OK | os.X_OK):
            return found
        reason = f"{str(found)!r} cannot be written to"
    except OSError as e:
        reason = str(e)
    try:
        return process_folder(reason)
    except OSError:
        return Path(os.devnull, "ms_diffusion")


def load_or_compute(path: str | os.PathLike, key: str, shapes: Shapes, compute: Callable[[], Arrays]) -> Arrays:
    """The float32 arrays that compute() returns, from a cache file if it has those of this key.

    Args:
        path: the file. If it is missing, damaged, or another's, compute() is called, and its result written. If it cannot be
            written, the result is returned all the same.
        key: SHA-256, in hexadecimal, of all that the result depends on.
        shapes: name -> shape of each array.

    Several ranks compute together if one of them has no such file, and rank 0 writes it.
    """
    found, (rank, _) = None, ranks()
    with contextlib.suppress(OSError):
        found = _read_arrays(path, key, shapes)
    if gather(np.array([found is not None], np.int32)).all() and found:
        return found
    result = {name: np.ascontiguousarray(array, np.float32) for name, array in compute().items()}
    assert {name: array.shape for name, array in result.items()} == {name: tuple(shape) for name, shape in shapes.items()}
    if rank == 0 and (os.path.isfile(path) or not os.path.lexists(path)):  # a pipe could take it for ever
        with contextlib.suppress(OSError):  # on a full or read-only disk the next call computes again
            write(path, lambda file: file.writelines([_header(key, result), *(result[name].data for name in shapes)]))
    return result


def _header(key: str, arrays: Arrays) -> bytes:
    """What a cache file begins with: the key, and the SHA-256 of the arrays that follow and of their shapes."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(array.data)
    return f"{key} {digest.hexdigest()}\n".encode()


def _read_arrays(path: str | os.PathLike, key: str, shapes: Shapes) -> Arrays | None:
    """The arrays in a cache file; None if it is not intact or not of this key and these shapes. Raises OSError."""
    with open_file(path) as file:
        begin = file.readline(200)
        size = sum(4 * math.prod(shape) for shape in shapes.values())
        if not begin.startswith(key.encode()) or os.fstat(file.fileno()).st_size != len(begin) + size:
            return None
        arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        for array in arrays.values():
            file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        return arrays if _header(key, arrays) == begin else None


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
            check_interrupted()
            found.append(fn(rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]))
    parts = (gather(np.concatenate(part)) for part in zip(*found, strict=True))
    return [part.reshape(-1, *part.shape[2:])[: len(rows)] for part in parts]
