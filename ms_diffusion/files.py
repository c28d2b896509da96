"""Files that no reader ever sees half-written, and where what can be computed again is kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a temporary file beside `path`, then rename it: no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            save(f)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def cache_folder(beside: str | os.PathLike | None = None) -> Path:
    """The folder `beside`, if it exists and can be written to, or else the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if beside and os.access(beside, os.W_OK | os.X_OK):
        return Path(beside)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms_diffusion"
