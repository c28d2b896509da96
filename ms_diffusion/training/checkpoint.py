"""Checkpoints that survive a crash and a full disk, and detect corrupt files.

A checkpoint is a folder `checkpoints/step-0001000` with safetensors files and `state.json`, which has the SHA-256 of each
file. It is written under a temporary name, synced to disk, and renamed when it is complete. While it takes the place of
one of the same step, that one is `step-0001000.old`; so there is always one of that step, also after a crash.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, nn

from ..convert import load_into
from ..fields import AT_LEAST_1, NON_NEGATIVE, POSITIVE, Matches, find_problem
from ..files import read_bytes, read_json, remove, sweep, sync_folder, temporary_path, write_json, write_synced
from ..runtime import UserError, broadcast, gather, ranks
from .config import Config, config_from_record
from .step import EMA

State = dict[str, Any]  # the content of a state.json
Arrays = dict[str, np.ndarray]
Problems = Mapping[Path, UserError]  # what is wrong with spoilt checkpoints

NAME = re.compile(r"step-(\d+)(\.old)?")
SCORES = ("fid", "val_loss_ema")  # which say what checkpoint is the best: the first that there is; less is better
NO_SCORE = len(SCORES), 0.0
LARGEST_WEIGHT = 1e10  # a network with larger ones has diverged

Hash = Annotated[str, Matches("[0-9a-f]{64}")]
# The types of what this package reads of a state.json
FIELDS: dict[str, Any] = {
    "step": Annotated[int, NON_NEGATIVE],
    "sha256": dict[Annotated[str, Matches(r"\w[\w.-]*")], Hash],
    "fid": float | None,
    "val_loss": float,
    "val_loss_ema": float,
    "losses": dict[Literal["total", "steps", "skipped", "in_a_row"], float],
    "unfinished": bool,
    "latent_scale": Annotated[float, POSITIVE],
    "first_stage": Hash,
    "text_encoder": Hash,
    "trained_whole": str,
    "batch_size": Annotated[int, AT_LEAST_1],
    "world_size": Annotated[int, AT_LEAST_1],
    "config": dict[str, Any],
}


class Checkpoint:
    """The checkpoints of one run: `save(step)` and `load_latest()`.

    Args:
        run_dir: the run's folder.
        net, optimizer, ema, loss_scaler: what is saved and restored; all but net may be None.
        keep: number of newest checkpoints that are kept.
        extra_parameters: parameters of neither the network nor the optimizer, saved in the optimizer's file.
        extra_emas: averages besides `ema`, in files of their own.
        extra_files: other files of parameters, by their names.

    Raises ValueError if two of these parameters have the same name."""

    def __init__(self, run_dir: str | os.PathLike, net: nn.Cell, optimizer: nn.Optimizer | None = None,
            ema: EMA | None = None, *, loss_scaler: ms.amp.DynamicLossScaler | None = None, keep: int = 3,
            extra_parameters: Iterable[Parameter] = (), extra_emas: Sequence[EMA] = (),
            extra_files: Mapping[str, Iterable[Parameter]] | None = None):  # fmt: skip
        self.folder, self.keep = Path(run_dir) / "checkpoints", keep
        self.files = {"model": {p.name: p for p in net.get_parameters()}}
        self.files |= {name: {p.name: p for p in parameters} for name, parameters in (extra_files or {}).items()}
        saved = {name for file in self.files.values() for name in file}
        for average in [*([ema] if ema is not None else []), *extra_emas]:
            self.files[average.name] = {s.name: a for s, a in zip(average.sources, average.averages, strict=True)}
        if optimizer is not None:
            parameters = [p for p in [*optimizer.get_parameters(), *extra_parameters] if p.name not in saved]
            state, names = {p.name: p for p in parameters}, [p.name for p in parameters]
            if len(state) < len(names):
                raise ValueError(f"two parameters are named {max(names, key=names.count)}: rename one of them")
            if loss_scaler is not None:
                state |= {"loss_scale.value": loss_scaler.scale_value, "loss_scale.counter": loss_scaler.counter}
            self.files["optimizer"] = state

    def save(self, step: int, **state: Any) -> Path:
        """Write the checkpoint of `step`, with `state` (JSON values) in its state.json, and return its folder. Then delete
        all but it, the `keep` newest checkpoints and the best (`best_checkpoint`).

        Raises UserError if the disk is full or not writable, or a value is not finite, or a weight is beyond 1e10, because
        training has diverged; earlier checkpoints are unchanged."""
        target = self.folder / f"step-{step:07d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            temporary = temporary_path(target)
            try:
                temporary.mkdir()
                hashes = {}
                for name, parameters in self.files.items():
                    arrays = {key: p.asnumpy() for key, p in parameters.items()}
                    self._check_values(step, name, arrays)
                    data = safetensors.numpy.save(arrays)
                    hashes[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
                    write_synced(temporary / f"{name}.safetensors", data)
                versions = {"mindspore": ms.__version__, "numpy": np.__version__, "python": platform.python_version()}
                state = checked({"step": step, **state, "versions": versions, "sha256": hashes})
                write_synced(temporary / "state.json", json.dumps(state, indent=1).encode())
                sync_folder(temporary)
                move_in(temporary, target)
            finally:
                remove(temporary)
            sync_folder(self.folder)
        except OSError as e:
            problem = e.strerror or e
            raise UserError(f"cannot write {target}: {problem}; free some space or choose another --run-dir") from e
        self._prune(target)
        return target

    def _check_values(self, step: int, name: str, arrays: Arrays) -> None:
        if bad := find_bad_values(name, arrays):
            last = next(reversed(readable(self.folder.parent)), None)
            kept = f"{last} stands" if last else "nothing was saved"
            raise UserError(
                f"{bad}, so training has diverged, and step {step} is not saved; {kept}. Run the same command with a lower "
                "--train.lr, or look at the data"
            )

    def update(self, step: int, **state: Any) -> None:
        """Change `state` in the state.json of the checkpoint of `step`. Then delete checkpoints as `save` does."""
        folder = self.folder / f"step-{step:07d}"
        sweep(self.folder)
        write_json(folder / "state.json", checked(read_state(folder) | state))
        self._prune(folder)

    def _prune(self, written: Path) -> None:
        """Delete what is older than the newest checkpoints, but not the best nor the one just written. Spoilt ones do not
        count, and newer spoilt ones stay."""
        run = self.folder.parent
        found = list(readable(run))
        kept, newest = {written, best_checkpoint(run)}, found[-self.keep :]
        for folder in checkpoints(run):
            replaced = folder.suffix and folder.with_suffix("") in found
            if folder not in kept and (replaced or age(folder) < age(newest[0])):
                with contextlib.suppress(OSError):  # the new one is written all the same
                    remove(folder)

    def load_latest(self) -> State | None:
        """Restore the newest intact checkpoint and return its state, or None if there are no checkpoints. All ranks return
        the same: where they find different ones, in folders of their own, that of the highest step.

        Corrupt checkpoints are set aside under another name, with a warning on stderr, and the previous one is used. Raises
        UserError if all are corrupt or belong to another network."""
        return self._agree(self._load_latest())

    def _load_latest(self) -> State | None:
        found = read_newest(self.folder.parent, self.files, self._set_aside if ranks()[0] == 0 else warn)
        if not found:
            return None
        for name, parameters in self.files.items():
            if missing := parameters.keys() ^ found.arrays[name].keys():
                raise UserError(f"{found.folder} belongs to another network ({min(missing)} differs): use another --run-dir")
        for name, parameters in self.files.items():
            load_into(parameters.values(), {p.name: found.arrays[name][key] for key, p in parameters.items()})
        return found.state

    def _set_aside(self, loaded: Path, spoilt: Problems) -> None:
        """Give spoilt checkpoints that are newer than the loaded one another name, so that they count no more."""
        for folder, problem in spoilt.items():
            aside = folder.with_name(f"spoilt-{folder.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-again")
            try:
                folder.rename(aside)
                kept = f"; it is kept as {aside.name}"
            except OSError:  # the disk is not writable: training will say so
                kept = ""
            print(f"warning: {problem}{kept}; using {loaded.name}", file=sys.stderr)
        if loaded.suffix:  # what a crash has left while this step was saved again
            with contextlib.suppress(OSError):
                loaded.rename(loaded.with_suffix(""))

    def _agree(self, state: State | None) -> State | None:
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


def move_in(new: Path, target: Path) -> None:
    """Rename the folder of a checkpoint to `target`. One that is there is called `.old` until that is done."""
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        remove(old)
        target.rename(old)
    new.rename(target)
    remove(old)


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises OSError if their folder cannot be read."""
    try:
        with os.scandir(Path(run_dir) / "checkpoints") as entries:
            found = [Path(entry.path) for entry in entries if NAME.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder for folder in found if (folder / "state.json").exists()), key=age)


def age(folder: Path) -> tuple[int, bool]:
    """Sorts checkpoints, the oldest first."""
    match = NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1]), not match[2]


def readable(run_dir: str | os.PathLike) -> dict[Path, State]:
    """The checkpoints whose state.json can be read, and its content, oldest first: one of each step."""
    found = {}
    for folder in checkpoints(run_dir):
        with contextlib.suppress(UserError):
            found[age(folder)[0]] = folder, read_state(folder)
    return dict(found.values())


def best_checkpoint(run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint with the lowest FID, or the lowest `val_loss_ema` where none has an FID; the first among equals. None
    if none has a score."""
    scores = {folder: score for folder, state in readable(run_dir).items() if (score := score_of(state)) < NO_SCORE}
    return min(scores, key=scores.__getitem__, default=None)


def score_of(state: State) -> tuple[int, float]:
    """What orders checkpoints by what their state.json says, the best first: the number of the score in `SCORES`, and the
    score."""
    found = ((i, state[name]) for i, name in enumerate(SCORES) if state.get(name) is not None)
    return next(found, NO_SCORE)


class Unreadable(UserError):
    """A file that may be intact cannot be read now: the right to read it is missing, or memory, or its disk is away."""


DAMAGED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP)  # there is no such file


def cannot_be_read(path: Path, e: OSError) -> UserError:
    """What to raise where a file of a checkpoint cannot be read."""
    if e.errno in DAMAGED:
        return UserError(f"{path} cannot be read: {e.strerror}")
    return Unreadable(f"{path} cannot be read ({e.strerror}), but may be intact: mend that, then run the same command again")


def read_state(folder: Path) -> State:
    """A checkpoint's state.json. Raises UserError if it is missing or corrupt, or of another step than the folder."""
    try:
        state, name = checked(read_json(folder / "state.json")), NAME.fullmatch(folder.name)
        if name and int(name[1]) != state["step"]:
            raise UserError(f"the step is {state['step']}")
        return state
    except OSError as e:
        raise cannot_be_read(folder / "state.json", e) from e
    except ValueError as e:
        raise UserError(f"{folder} is not a complete checkpoint: its state.json cannot be read") from e
    except UserError as e:
        raise UserError(f"{folder} is not a complete checkpoint: in its state.json {e}") from e


def checked(state: State) -> State:
    """The content of a state.json. Raises UserError if it lacks something, or something has another type."""
    if problem := find_problem(state, dict[str, Any]):
        raise UserError(f"all is wrong: {problem}")
    for name in ("step", "sha256", *(("batch_size", "config") if "world_size" in state else ())):
        if name not in state:
            raise UserError(f"{name} is missing")
    for name in FIELDS.keys() & state.keys():
        if problem := find_problem(state[name], FIELDS[name]):
            raise UserError(f"{name} is {state[name]!r:.100}: {problem}")
    if "world_size" in state and find_problem(state["config"].get("train"), dict[str, Any]):
        raise UserError("config has no train")
    return state


def read_weights(folder: Path, name: str, state: State | None = None) -> Arrays:
    """Parameter name -> array of one file of a checkpoint ("model", "ema", "ema-0.05", "optimizer"), checked by its SHA-256.
    Raises UserError if the file is missing, truncated or changed, or holds values that are not finite, Unreadable if it may
    be intact."""
    path = folder / f"{name}.safetensors"
    try:
        data = read_bytes(path)
    except OSError as e:
        raise cannot_be_read(path, e) from e
    except UserError as e:  # not enough memory
        raise Unreadable(str(e)) from e
    if hashlib.sha256(data).hexdigest() != (state or read_state(folder))["sha256"].get(path.name):
        raise UserError(f"{path} is truncated or changed: its SHA-256 is not the one in state.json")
    try:
        arrays = safetensors.numpy.load(data)
    except MemoryError:
        raise
    except Exception as e:  # a damaged file raises many kinds
        raise UserError(f"{path} is not a complete .safetensors file") from e
    if bad := find_bad_values(name, arrays):
        raise UserError(f"{path} is of no use: {bad}")
    return arrays


def find_bad_values(name: str, arrays: Arrays) -> str | None:
    """Which array of a checkpoint's file is not finite, or has weights beyond 1e10; None if all are well."""
    for key, values in arrays.items():
        low, high = float(values.min(initial=0)), float(values.max(initial=0))  # NaN if one of the values is
        if not math.isfinite(low + high):
            return f"{key} is not finite"
        if max(-low, high) > LARGEST_WEIGHT and name != "optimizer":  # second moments may be larger
            return f"{key} is beyond {LARGEST_WEIGHT:g}"
    return None


class Intact(NamedTuple):
    """A checkpoint that was read: its folder, its state.json, and the arrays of its files, by their names."""

    folder: Path
    state: State
    arrays: dict[str, Arrays]


def warn(loaded: Path, spoilt: Problems) -> None:
    """Say on stderr which checkpoints are spoilt, and which one is used."""
    for problem in spoilt.values():
        print(f"warning: {problem}; using {loaded.name}", file=sys.stderr)


def read_newest(run_dir: str | os.PathLike, names: Iterable[str],
        on_spoilt: Callable[[Path, Problems], object] = warn) -> Intact | None:  # fmt: skip
    """The newest checkpoint of a run of which the files with these names are intact, or None if there are no checkpoints.
    on_spoilt(its folder, problems) is called with those that are newer. Where the process that trains the run replaces or
    deletes one meanwhile, the newest of then is read. Raises UserError if there are checkpoints, but none is intact, or one
    that may be intact cannot be read."""
    names = list(names)
    while found := checkpoints(run_dir) or checkpoints(run_dir):  # in one look a folder that is renamed may be missed
        spoilt, before = {}, {folder: version(folder) for folder in found}
        for folder in reversed(found):
            try:
                state = read_state(folder)
                arrays = {name: read_weights(folder, name, state) for name in names}
            except Unreadable:
                raise
            except UserError as e:
                if before[folder] is None or version(folder) != before[folder]:
                    break
                spoilt[folder] = e
                continue
            on_spoilt(folder, spoilt)
            return Intact(folder, state, arrays)
        else:
            for problem in spoilt.values():
                print(f"warning: {problem}", file=sys.stderr)
            folder = found[0].parent
            raise UserError(f"no checkpoint in {folder} can be read: delete that folder or use another --run-dir")
    return None


def version(folder: Path) -> tuple[int, int] | None:
    """What changes when another folder takes the place of this one; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def read_config(run_dir: str | os.PathLike) -> Config | None:
    """The configuration of a run; None where there is no run. If config.json is missing or cannot be read, it is the copy in
    a checkpoint, and stderr says so. Raises UserError if there is none that can be read."""
    path = Path(run_dir) / "config.json"
    try:
        return Config.from_json(path)
    except UserError as problem:
        for folder, state in reversed(readable(run_dir).items()):
            with contextlib.suppress(ValueError):
                config = config_from_record(state.get("config"))
                print(f"warning: {problem}; using the copy in {folder.name}", file=sys.stderr)
                return config
        if not path.exists() and not checkpoints(run_dir):
            return None
        raise
