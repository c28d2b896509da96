"""obs://bucket/name is the file bucket/name below $STAND_IN_OBS. A copy takes $STAND_IN_SECONDS, and the first
$STAND_IN_FAILURES calls of each function for each address fail. All calls are in `calls` and in the file $STAND_IN_LOG."""

import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

seconds = float(os.environ.get("STAND_IN_SECONDS") or 0)
failures = int(os.environ.get("STAND_IN_FAILURES") or 0)
log = os.environ.get("STAND_IN_LOG")
calls: list[tuple[str, ...]] = []
counts: Counter[tuple[str, ...]] = Counter()
lock = threading.Lock()


class MoxFileRespException(Exception):
    pass


def call(*names):
    with lock:
        calls.append(names)
        key = (names[0], *(name for name in names if "://" in name))
        counts[key] += 1
        if log:
            with open(log, "a") as f:
                f.write(" ".join(names) + "\n")
    if counts[key] <= failures:
        raise MoxFileRespException(f"stat:503 of {names[0]}\nin the stand-in")


def local(url):
    for prefix in ("obs://", "s3://"):
        if url.startswith(prefix):
            return Path(os.environ["STAND_IN_OBS"], url.removeprefix(prefix))
    return Path(url)


def copy(src_url, dst_url):
    call("copy", src_url, dst_url)
    source, target = local(src_url), local(dst_url)
    if not source.is_file():
        raise MoxFileRespException(f"stat:404 {src_url}")
    time.sleep(seconds)
    if dst_url != str(target):  # an object appears whole, and its folder need not exist
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, f"{target}.{threading.get_ident()}")
        os.replace(f"{target}.{threading.get_ident()}", target)
    else:
        shutil.copyfile(source, target)


def exists(url):
    call("exists", url)
    return local(url).exists()


def list_directory(url, recursive=False):
    call("list_directory", url)
    assert recursive
    root = local(url)
    return [str(path.relative_to(root)) for path in root.rglob("*")]


def remove(url):
    call("remove", url)
    local(url).unlink(missing_ok=True)


def stat(url):
    call("stat", url)
    if not local(url).exists():
        raise MoxFileRespException(f"stat:404 {url}")
    found = local(url).stat()
    return SimpleNamespace(length=found.st_size, mtime_nsec=found.st_mtime_ns, is_directory=local(url).is_dir())
