"""Checkpoints that survive a crash and a full disk, and detect corrupt files.

A checkpoint is a folder `checkpoints/step-0001000` with safetensors files and `state.json`, which has the SHA-256 of each
file. It is written under a temporary name, synced to disk, and renamed when it is complete.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, nn

from ..convert import load_into
from ..files import sync_folder, write_json, write_synced
from ..runtime import UserError, broadcast, gather, ranks
from .step import EMA


class Checkpoint:
    """The checkpoints of one run: `save(step)` and `load_latest()`.

    Args:
        run_dir: the run's folder.
        net, optimizer, ema, loss_scaler: what is saved and restored; all but net may be None.
        keep: number of newest checkpoints that are kept.
        extra_parameters: parameters of neither the network nor the optimizer, saved in the optimizer's file.
        extra_emas: averages besides `ema`, in files of their own.

    Raises ValueError if two of these parameters have the same name."""

    def __init__(self, run_dir: str | os.PathLike, net: nn.Cell, optimizer: nn.Optimizer | None = None,
            ema: EMA | None = None, *, loss_scaler: ms.amp.DynamicLossScaler | None = None, keep: int = 3,
            extra_parameters: Iterable[Parameter] = (), extra_emas: Sequence[EMA] = ()):  # fmt: skip
        self.folder, self.keep = Path(run_dir) / "checkpoints", keep
        self.files = {"model": {p.name: p for p in net.get_parameters()}}
        for average in [*([ema] if ema is not None else []), *extra_emas]:
            self.files[average.name] = {s.name: a for s, a in zip(average.sources, average.averages, strict=True)}
        if optimizer is not None:
            parameters = [p for p in [*optimizer.get_parameters(), *extra_parameters] if p.name not in self.files["model"]]
            state, names = {p.name: p for p in parameters}, [p.name for p in parameters]
            if len(state) < len(names):
                raise ValueError(f"two parameters are named {max(names, key=names.count)}: rename one of them")
            if loss_scaler is not None:
                state |= {"loss_scale.value": loss_scaler.scale_value, "loss_scale.counter": loss_scaler.counter}
            self.files["optimizer"] = state

    def save(self, step: int, **state: Any) -> Path:
        """Write the checkpoint of `step`, with `state` (JSON values) in its state.json, and return its folder. Then delete
        all but the `keep` newest checkpoints and the one whose state has the lowest "fid".

        Raises UserError if the disk is full or not writable; earlier checkpoints are unchanged."""
        target = self.folder / f"step-{step:07d}"
        temporary = self.folder / f".{target.name}.{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            hashes = {}
            for name, parameters in self.files.items():
                data = safetensors.numpy.save({key: p.asnumpy() for key, p in parameters.items()})
                hashes[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
                write_synced(temporary / f"{name}.safetensors", data)
            versions = {"mindspore": ms.__version__, "numpy": np.__version__, "python": platform.python_version()}
            state = {"step": step, **state, "versions": versions, "sha256": hashes}
            write_synced(temporary / "state.json", json.dumps(state, indent=1).encode())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync_folder(self.folder)
        except OSError as e:
            raise UserError(f"cannot write {target}: {e.strerror}; free some space or choose another --run-dir") from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        best = best_checkpoint(self.folder.parent)
        for old in checkpoints(self.folder.parent)[: -self.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def update(self, step: int, **state: Any) -> None:
        """Change `state` in the state.json of the checkpoint of `step`."""
        folder = self.folder / f"step-{step:07d}"
        write_json(folder / "state.json", read_state(folder) | state)

    def load_latest(self) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint and return its state, or None if there are no checkpoints. All ranks return
        the same: where they find different ones, in folders of their own, that of the highest step.

        A corrupt checkpoint is skipped with a warning on stderr, and the previous one is used. Raises UserError if all are
        corrupt or belong to another network."""
        return self._agree(self._load_latest())

    def _load_latest(self) -> dict[str, Any] | None:
        found = checkpoints(self.folder.parent)
        for folder in reversed(found):
            try:
                state = read_state(folder)
                arrays = {name: read_weights(folder, name) for name in self.files}
            except UserError as e:
                print(f"warning: {e}; using the previous checkpoint", file=sys.stderr)
                continue
            for name, parameters in self.files.items():
                if missing := parameters.keys() ^ arrays[name].keys():
                    raise UserError(f"{folder} belongs to another network ({min(missing)} differs): use another --run-dir")
                load_into(parameters.values(), {p.name: arrays[name][key] for key, p in parameters.items()})
            return state
        if found:
            raise UserError(f"no checkpoint in {self.folder} can be read: delete that folder or use another --run-dir")
        return None

    def _agree(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state of all ranks. If they differ in it or in a parameter, those of the highest step are sent to all."""
        rank, world_size = ranks()
        if world_size == 1:
            return state
        record = json.dumps(state).encode()
        content = {name: b"".join(p.asnumpy().tobytes() for p in file.values()) for name, file in self.files.items()}
        digest = hashlib.sha256(b"".join([record, *content.values()])).digest()
        found = gather(np.array([state["step"] if state else -1, *np.frombuffer(digest, np.int32)], np.int32))
        if (found == found[0]).all():
            return state
        root = int(found[:, 0].argmax())
        if rank == 0:
            which = f"step {found[root, 0]}" if found[root, 0] >= 0 else "the start"
            print(f"the ranks have found different checkpoints: all of them continue from {which}, which rank {root} has")
        for name, parameters in self.files.items():
            data = broadcast(content[name], root)
            if rank != root:
                arrays, first = {}, 0
                for p in parameters.values():
                    array = np.frombuffer(data, p.asnumpy().dtype, p.size, first).reshape(p.shape)
                    arrays[p.name], first = array, first + array.nbytes
                load_into(parameters.values(), arrays)
        return json.loads(broadcast(record, root))


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p.parent for p in Path(run_dir).glob("checkpoints/step-*/state.json")]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def best_checkpoint(run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint with the lowest FID, the first among equals; None if none has an FID."""
    scores = []
    for folder in checkpoints(run_dir):
        with contextlib.suppress(UserError):
            scores.append((read_state(folder).get("fid"), folder))
    return min((s for s in scores if s[0] is not None), key=lambda s: s[0], default=(None, None))[1]


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError if it is missing or corrupt."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not (isinstance(state, dict) and isinstance(state.get("step"), int) and isinstance(state.get("sha256"), dict)):
            raise ValueError("no step or no sha256")
        return state
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} is not a complete checkpoint: its state.json cannot be read") from e


def read_weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Parameter name -> array of one file of a checkpoint ("model", "ema", "ema-0.05", "optimizer"), checked by its SHA-256.
    Raises UserError if the file is missing, truncated or changed."""
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    if hashlib.sha256(data).hexdigest() != read_state(folder)["sha256"].get(path.name):
        raise UserError(f"{path} is truncated or changed: its SHA-256 is not the one in state.json")
    return safetensors.numpy.load(data)
