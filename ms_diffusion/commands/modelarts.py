"""Huawei ModelArts: --data_url and --train_url, local paths or OBS, and arguments that only the platform knows."""

import os
import time
from pathlib import Path

from ..runtime import UserError

OBS = ("obs://", "s3://")


def on_modelarts() -> bool:
    return any(name in os.environ for name in ("MA_JOB_DIR", "MA_NUM_HOSTS", "MA_NUM_GPUS"))


def _moxing():
    try:
        import moxing  # exists on ModelArts alone
    except ImportError as e:
        raise UserError("obs:// addresses need moxing, which only ModelArts has: give a local path instead") from e
    return moxing


def fetch(url: str, cache: str = "/cache") -> Path:
    """The local folder of a --data_url; OBS is copied to the cache volume, once on each machine, by its first process."""
    if not url.startswith(OBS):
        return Path(url)
    local = Path(cache) / url.split("://")[1].strip("/").replace("/", "_")
    done = local.with_name(f"{local.name}.done")
    if int(os.environ.get("DEVICE_ID") or os.environ.get("ASCEND_DEVICE_ID") or 0) == 0:
        _moxing().file.copy_parallel(url, str(local))
        done.touch()
    while not done.exists():
        time.sleep(1)
    return local


def output_folder(train_url: str | None) -> Path | None:
    """The folder of a local --train_url; None for OBS, or where there is none."""
    return Path(train_url) if train_url and not train_url.startswith(OBS) else None


def publish(path: Path, url: str | None) -> None:
    """Copy a folder or a file to a --train_url in OBS; a local --train_url is written directly and needs no copy."""
    if url and url.startswith(OBS):
        file = _moxing().file
        copy = file.copy_parallel if Path(path).is_dir() else file.copy  # copy_parallel takes folders alone
        copy(str(path), url)
