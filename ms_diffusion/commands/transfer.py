"""Files on this machine and in OBS: folders that are read and written in the same way, copies that one process of a machine
makes for all, and archives. moxing, ModelArts' way to OBS, is imported only for obs:// and s3:// addresses."""

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .. import runtime
from ..files import cache_folder, open_file, read_json, write, write_json
from ..runtime import UserError

OBS = ("obs://", "s3://")
CACHE = "/cache"  # ModelArts mounts its scratch disk there
WAITS = (1, 4, 16)  # seconds between the attempts of a transfer
PATIENCE = 3600.0  # seconds without progress after which nobody waits for another process or for an upload
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
Version = list[int]  # of a file: its size in bytes, and when it was changed
Progress = Callable[[], None]


class Folder:
    """The files below a folder, by their relative names. What fails in OBS is tried four times. All methods raise UserError
    if the folder cannot be accessed, the constructor if moxing is missing."""

    def __init__(self, url: str | Path):
        self.url, self.obs = str(url).rstrip("/"), None
        if self.url.startswith(OBS):
            try:
                import moxing
            except ImportError as e:
                raise UserError(f"{url} needs moxing, which only ModelArts has: give a local path instead") from e
            self.obs = moxing.file

    def is_file(self) -> bool:
        """Whether there is a file instead of a folder. Raises UserError if there is neither."""
        exists, is_file = (self.obs.exists, self._is_file) if self.obs else (os.path.exists, os.path.isfile)
        if not self._attempt(exists, self.url):
            raise UserError(f"{self.url}: there is no such file or folder; check the address and the right to read it")
        return self._attempt(is_file, self.url)

    def version(self, name: str) -> Version | None:
        """The version of a file; None of a folder."""
        return self._attempt(self._version, name)

    def list(self) -> dict[str, Version]:
        """Name -> version of all files but hidden ones and those in hidden folders; {} if there is no such folder."""
        if not self.obs:
            names = [str(path.relative_to(self.url)) for path in visible_files(Path(self.url))]
            return {name: version for name in names if (version := self._version(name))}
        if not self._attempt(self.obs.exists, self.url):
            return {}
        names = [name.strip("/") for name in self._attempt(self.obs.list_directory, self.url, recursive=True)]
        folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
        names = [check_inside(name, self.url) for name in names if name not in folders and not is_hidden(name)]
        versions = zip(names, in_threads(self.version, names), strict=True)
        return {name: version for name, version in versions if version}

    def get(self, name: str, path: Path) -> None:
        """Copy a file from here to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._attempt(self._get, name, path)

    def put(self, path: Path, name: str) -> None:
        """Copy the file `path` to here."""
        self._attempt(self._put, path, name)

    def remove(self, name: str) -> None:
        """Delete a file; nothing if there is none."""
        self._attempt(self.obs.remove if self.obs else partial(Path.unlink, missing_ok=True), self._path(name))

    def _path(self, name: str) -> Any:
        return f"{self.url}/{name}" if self.obs else Path(self.url, name)

    def _attempt(self, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        for wait in [*(WAITS if self.obs else ()), None]:
            try:
                return action(*args, **options)
            except Exception as e:  # moxing raises many kinds
                if wait is None:
                    raise UserError(f"{self.url} cannot be accessed: {textwrap.shorten(str(e) or repr(e), 200)}") from e
                time.sleep(wait)

    def _is_file(self, url: str) -> bool:
        return not self.obs.stat(url).is_directory

    def _version(self, name: str) -> Version | None:
        if self.obs:
            found = self.obs.stat(self._path(name))
            return None if found.is_directory else [found.length, found.mtime_nsec]
        with contextlib.suppress(FileNotFoundError):  # the run has deleted it meanwhile
            found = self._path(name).stat()
            return [found.st_size, found.st_mtime_ns]

    def _get(self, name: str, path: Path) -> None:
        (self.obs.copy if self.obs else shutil.copyfile)(self._path(name), str(path))
        self._compare(path, name)

    def _put(self, path: Path, name: str) -> None:
        if self.obs:
            self.obs.copy(str(path), self._path(name))  # an object appears when it is whole
        else:
            with open(path, "rb") as source:
                write(self._path(name), lambda target: shutil.copyfileobj(source, target))
        self._compare(path, name)

    def _compare(self, path: Path, name: str) -> None:
        version, size = self._version(name), path.stat().st_size
        if not version or version[0] != size:
            raise OSError(f"{name} has {version and version[0]} bytes there and {size} here")


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones and those in hidden folders, sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(found)


def is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def check_inside(name: str, where: Any) -> str:
    """The relative name of a file. Raises UserError if it leads out of its folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{where} holds {name!r}, a name that leads out of its folder: leave that file out")
    return name


def in_threads(action: Callable[[Any], Any], items: Iterable[Any], progress: Progress = lambda: None) -> list[Any]:
    """action(item) of each item; `progress` is called after each and may raise to end it."""
    pool, results = ThreadPoolExecutor(16), []
    try:
        for result in pool.map(action, items):
            results.append(result)
            progress()
    finally:
        pool.shutdown(cancel_futures=True)
    return results


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[Progress]:
    """One process of this machine at a time is inside. It gets a function to call now and then, by which the waiting ones
    see that it gets on. Raises UserError if the process before this one failed or does not get on, SystemExit at SIGTERM."""
    started = time.time()
    lock.parent.mkdir(parents=True, exist_ok=True)

    def progress() -> None:
        stop_if_asked()
        os.utime(lock)

    with open(lock, "a+") as file:
        while True:
            with contextlib.suppress(BlockingIOError):  # the system frees the lock of a process that has ended
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            stop_if_asked()
            if time.time() - max(started, os.path.getmtime(lock)) > PATIENCE:
                raise UserError(f"another process holds {lock} and does not get on: end it, then run the command again")
            time.sleep(0.1)
        file.seek(0)
        if (failure := file.read()) and os.path.getmtime(lock) >= started:
            raise UserError(failure)
        file.truncate(0)
        try:
            yield progress
        except UserError as e:
            file.write(str(e))
            raise


def stop_if_asked() -> None:
    if runtime.STOP.is_set():
        print("stopped before training", file=sys.stderr)
        raise SystemExit(130)


def cached(source: str, version: Callable[[], Any], fill: Callable[[Path, Any, Progress], None]) -> Path:
    """The folder in the cache that fill(folder, version, progress) makes from `source`, once on each machine, and again when
    version(), a JSON value, or one of its files in the folder has changed; other files there, such as caches, may change."""
    started = time.time()
    folder = cache_of(source)
    marker = folder.with_suffix(".json")
    with locked(folder.with_suffix(".lock")) as progress:
        if marker.exists() and marker.stat().st_mtime >= started:  # another process has just made or checked it
            return folder
        wanted, record, files = version(), read_record(marker), Folder(folder).list()
        made = record.get("files")
        is_same = isinstance(made, dict) and made == {name: files.get(name) for name in made}
        if record.get("source") != wanted or not is_same:
            marker.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fill(folder, wanted, progress)
            record = {"source": wanted, "files": Folder(folder).list()}
        write_json(marker, record)
    return folder


def cache_of(source: str) -> Path:
    """A path in the cache whose name is readable and belongs to `source` alone."""
    name = re.sub(r"\W+", "-", source).strip("-")[-60:]
    return cache_folder(CACHE) / "modelarts" / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if it is missing or corrupt."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(record := read_json(path), dict):
            return record
    return {}


def check_space(folder: Path, needed: int, what: Any) -> None:
    """Raise UserError if the disk of a folder has less than `needed` bytes left."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{what} needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left: free some space")


def fetch(url: str) -> Path:
    """The local path of a file or a folder; OBS is copied to the cache, once on each machine. Raises UserError if there is
    nothing, or it cannot be copied."""
    source, name = Folder(url), ""
    is_file = source.is_file()
    if not source.obs:
        return Path(url)
    if is_file:
        parent, name = source.url.rsplit("/", 1)
        source = Folder(parent)

    def version() -> dict[str, Any]:
        if not (found := {name: source.version(name)} if name else source.list()):
            raise UserError(f"{url} holds no files: check the address")
        return found

    def fill(folder: Path, found: dict[str, Any], progress: Progress) -> None:
        check_space(folder, sum(size for size, _ in found.values()), url)
        in_threads(lambda each: source.get(each, folder / each), found, progress)

    return cached(url.rstrip("/"), version, fill) / name


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


def unpack(archives: list[Path]) -> Path:
    """The folder in the cache with the contents of these archives, each in a folder of its own. Raises UserError if one is
    corrupt, needs more space than there is, or holds a link or a name that leads out of its folder."""

    def fill(folder: Path, _: Any, progress: Progress) -> None:
        for archive in archives:
            try:
                with contextlib.ExitStack() as stack:
                    members, total = [], 0
                    for member in members_of(archive, stack):
                        members.append(member)
                        total += member[1]
                        check_space(folder, total, archive)  # before the next one, for which a tar is unpacked so far
                        progress()
                    for name, _, open_member in members:
                        target = folder / archive.name.split(".")[0] / check_inside(name, archive)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with open_member() as source, open(target, "wb") as file:
                            shutil.copyfileobj(source, file)
                        progress()
            except UserError:
                raise
            except Exception as e:  # a corrupt archive raises many kinds
                raise UserError(f"{archive} cannot be unpacked: {textwrap.shorten(str(e) or repr(e), 200)}") from e

    versions = {str(archive.resolve()): Folder(archive.parent).version(archive.name) for archive in archives}
    return cached(f"unpacked {' '.join(versions)}", lambda: versions, fill)


class Pieces:
    """An open file that is read in pieces of a few MB, and not at once where a damaged header says so."""

    def __init__(self, file: Any):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 1 << 24:
            raise ValueError(f"a header says {size} bytes")
        return self.file.read(size)


def members_of(archive: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """(name, size, open) of each file in an archive, which stays open as long as `stack`. Raises UserError at a link or a
    device, and at a file that is packed in a way that Python does not unpack piece by piece."""
    packed: Any
    file: Any = stack.enter_context(open_file(archive))
    if zipfile.is_zipfile(file):
        packed = stack.enter_context(zipfile.ZipFile(file))
        found = ((i, i.filename, i.file_size, i.is_dir(), stat.S_ISLNK(i.external_attr >> 16)) for i in packed.infolist())
        open_member = packed.open
        if any(i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for i in packed.infolist()):
            raise UserError(f"{archive} is compressed in an unusual way: pack it again, by zip without options")
    else:
        file.seek(0)
        start = file.peek(6)
        kinds = (b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)
        unpacked = next((unpacked(file) for magic, unpacked in kinds if start.startswith(magic)), file)
        pieces: Any = Pieces(unpacked)
        packed = stack.enter_context(tarfile.open(fileobj=pieces, mode="r:"))
        found = ((m, m.name, m.size, m.isdir(), not m.isreg()) for m in packed)
        open_member = packed.extractfile
    for member, name, size, is_folder, is_special in found:
        if size < 0 or (is_special and not is_folder):
            raise UserError(f"{archive} holds {name!r}, which is a link or a device: leave it out")
        if not is_folder:
            yield name, size, partial(open_member, member)
