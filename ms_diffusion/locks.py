"""One writer of a folder at a time: on a local disk, on network disks with and without locks, and after a writer's crash."""

import contextlib
import fcntl
import getpass
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .files import create, is_running, machine, open_file, started, temporary_path
from .runtime import UserError

BEAT = 5.0  # seconds between two signs of life of a writer
LOST = 30.0  # seconds without one after which the writer is taken for dead, if its process cannot be asked for
NAME = ".lock"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Let this process alone write to a folder, which is made if it does not exist.

    Call the function that is returned before writing: it raises UserError if another process has taken the folder over,
    after this one was suspended or cut off from the disk, and makes the folder again if it was removed.

    The file `.lock` names the writer, and the writer holds a lock (flock) on it, which the system frees when a process ends,
    however it ends. Some network disks have no locks, or none that other machines see. So the writer also counts up in the
    file every five seconds: a process of the same machine is asked for by its number and start, one of another machine is
    taken for dead after 30 seconds without a count.

    Raises:
        UserError: another process writes to the folder.
        OSError: the folder cannot be written to.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    writer = Writer(folder)
    try:
        writer.take()
        writer.thread.start()
        yield writer.check
    finally:
        writer.release()
        with contextlib.suppress(OSError):  # what stays empty goes again
            for each in new:
                each.rmdir()


class Writer:
    """This process as the writer of a folder."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.token, self.count = folder, folder / NAME, secrets.token_hex(8), 0
        self.descriptor: int | None = None
        self.mutex, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._live, daemon=True)

    def take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor, has_locks = _take(self.path, self.folder)
        self._write()
        if not has_locks:  # another process may have come at the same moment: the last to write has it
            time.sleep(1)
            if not self._is_mine():
                raise _held(self.folder, self.descriptor)

    def check(self) -> None:
        with self.mutex:
            if not self.path.exists():  # the folder was removed
                self._close()
                self.take()
            elif not self._is_mine():
                raise UserError(
                    f"{self.folder} was taken over while this process did not answer: it writes nothing more there"
                )

    def release(self) -> None:
        self.ended.set()
        with self.mutex, contextlib.suppress(OSError):
            if self.descriptor is not None and self._is_mine():
                self.path.unlink()  # while the lock is held, so nobody else has it
        self._close()

    def _live(self) -> None:
        """Count up in the file until this process ends, or another has taken over."""
        while not self.ended.wait(BEAT):
            with self.mutex, contextlib.suppress(OSError):  # a network disk that is away for a moment
                if not self.ended.is_set() and self._is_mine():
                    self._write()

    def _is_mine(self) -> bool:
        assert self.descriptor is not None
        return _is_same(self.descriptor, self.path) and _read(self.descriptor).get("token") == self.token

    def _write(self) -> None:
        assert self.descriptor is not None
        user = os.environ.get("USER", "")
        with contextlib.suppress(KeyError, OSError, ImportError):  # a container may have no entry for its user
            user = getpass.getuser()
        record = {"process": os.getpid(), "started": started(os.getpid()), "machine": machine(), "host": platform.node()}
        text = json.dumps(record | {"user": user, "token": self.token, "count": self.count}).encode().ljust(512)
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))
        self.count += 1

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _take(path: Path, folder: Path) -> tuple[int, bool]:
    """The descriptor of the lock file, and whether the disk has locks, once no other process writes to the folder. Raises
    UserError if one does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            has_locks = _lock(descriptor)
            if has_locks is None:
                raise _held(folder, descriptor)
            if not _is_same(descriptor, path):  # the writer before has removed it meanwhile
                os.close(descriptor)
                continue
            _wait_for_end(descriptor, path, folder, has_locks)
            return descriptor, has_locks
        except BaseException:
            os.close(descriptor)
            raise


def _lock(descriptor: int) -> bool | None:
    """Whether the disk has locks; None if another process holds this one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return None
    except OSError:
        return False


def _wait_for_end(descriptor: int, path: Path, folder: Path, has_locks: bool) -> None:
    """Return when the writer that the file names has ended. Raises UserError if it gives a sign of life."""
    record = _read(descriptor)
    if record.get("machine") == machine():
        if not has_locks and is_running(record["process"], record["started"]):
            raise _held(folder, descriptor)
        return
    if not record or _now(path) - os.fstat(descriptor).st_mtime > LOST:
        return
    end = time.monotonic() + LOST
    while time.monotonic() < end and _is_same(descriptor, path):
        if _read(descriptor).get("count") != record["count"]:
            raise _held(folder, descriptor)
        time.sleep(0.2)


def _now(path: Path) -> float:
    """The time by the clock of the disk, which may be another machine's."""
    probe = temporary_path(path)
    try:
        with create(probe) as file:
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(descriptor: int) -> dict[str, Any]:
    """What the lock file says; {} if nothing that makes sense."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        numbers = [record["process"], record["started"], record["count"]]
        return record if all(type(number) is int for number in numbers) else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _held(folder: Path, descriptor: int) -> UserError:
    holder = _name(_read(descriptor))
    return UserError(f"{folder} is being written by {holder}: wait until it has ended, or use another --run-dir")


def _name(record: dict[str, Any]) -> str:
    return "{user}'s process {process} on {host}".format(**record) if "user" in record else "another process"


def find_writer(folder: Path) -> str | None:
    """Who writes to a folder, in words, as far as its lock file tells, which is only read; None if nobody does."""
    try:
        with open_file(folder / NAME) as file:
            record, changed = _read(file.fileno()), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    if record.get("machine") == machine():
        lives = is_running(record["process"], record["started"])
    else:
        lives = bool(record) and time.time() - changed < LOST
    return _name(record) if lives else None
