"""Which MindSpore this package takes: the one place that says so. MindSpore itself is not imported."""

import functools
import os
import re
import resource
import threading
from importlib.util import find_spec
from pathlib import Path

from .runtime import UserError, available_memory

OLDEST = "2.7.1"
# Address space that training takes: 2.0 GiB for the first operator, 2.9 with `quick` (2.10 on one core), of which most is
# never used: MindSpore reserves memory by the GiB
ADDRESSES = 3 << 30
MEMORY = 256 << 20  # 320 MB for points, 700 with `quick`; some of it are files that the system can read again


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.7.1.post1" -> (2, 7, 1)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def mindspore_folder() -> Path | None:
    """The folder of the installed MindSpore, or None."""
    spec = find_spec("mindspore")
    return Path(spec.origin).parent if spec and spec.origin else None


def mindspore_version() -> str | None:
    """The version of the installed MindSpore; None without one, or if it does not say."""
    folder = mindspore_folder()
    file = folder / "version.py" if folder else None
    found = re.search(r"__version__\s*=\s*['\"](.+?)['\"]", file.read_text()) if file and file.exists() else None
    return found and found[1]


def check_limits() -> None:
    """Raise UserError if the process may not take the memory or start the threads that MindSpore needs: it could end
    without a word, or hang."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < ADDRESSES:
        raise UserError(
            f"a process may take {limit / 2**30:.1f} GiB of address space (ulimit -v), and MindSpore needs 3 GiB, more on "
            "many cores: raise that limit"
        )
    if (free := available_memory()) < MEMORY:
        raise UserError(f"MindSpore needs {MEMORY / 1e6:.0f} MB of memory and more, and {free / 1e6:.0f} MB are free")
    end = threading.Event()
    count = 12 + 2 * (os.cpu_count() or 1)  # 12 on one core, 14 on two; MindSpore hangs where one cannot be started
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as e:
        wanted = f"MindSpore starts up to {count} threads"
        raise UserError(f"{wanted}, and this user may not ({e}): raise the limit (ulimit -u), or end other programs") from e
    finally:
        end.set()
        for thread in threads:
            if thread.ident:
                thread.join()


@functools.cache
def check() -> None:
    """Raise UserError if there is no MindSpore, or one that is too old: with 2.7.0 the first training step ends in "The prim
    is not a PrimitivePy"."""
    if mindspore_folder() is None:
        raise UserError(f'MindSpore is not installed: pip install "mindspore>={OLDEST}"')
    version = mindspore_version()
    if version and numbers(version) < numbers(OLDEST):
        raise UserError(f'MindSpore {version} is too old: pip install "mindspore>={OLDEST}"')
