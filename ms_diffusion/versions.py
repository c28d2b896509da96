"""Which MindSpore this package takes: the one place that says so. MindSpore itself is not imported."""

import functools
import re
import resource
from importlib.util import find_spec
from pathlib import Path

from .runtime import UserError

OLDEST = "2.7.1"
# Address space that training takes: 2.0 GiB for the first operator, 2.9 with `quick` (2.10 on one core), of which most is
# never used: MindSpore reserves memory by the GiB. It uses 0.4 and 0.7 GB
ADDRESSES = 3 << 30


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


def check_limit() -> None:
    """Raise UserError if the process may not take the address space that MindSpore needs: it could end without a word."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < ADDRESSES:
        raise UserError(
            f"a process may take {limit / 2**30:.1f} GiB of address space (ulimit -v), and MindSpore needs 3 GiB, or more "
            "on many cores: raise that limit"
        )


@functools.cache
def check() -> None:
    """Raise UserError if there is no MindSpore, or one that is too old: with 2.7.0 the first training step ends in "The prim
    is not a PrimitivePy"."""
    if mindspore_folder() is None:
        raise UserError(f'MindSpore is not installed: pip install "mindspore>={OLDEST}"')
    version = mindspore_version()
    if version and numbers(version) < numbers(OLDEST):
        raise UserError(f'MindSpore {version} is too old: pip install "mindspore>={OLDEST}"')
