"""Kill a process, or let a call of it fail, at every change of a file that it makes, and look at what is left.

    python -m tests.faults.driver FILE [--all]

writes a record of all cases to FILE, {case: {"points", "faults", "problems"}}; `test_faults.py` builds the library that this
needs (`shim.c`) and runs it. A fork does the work at each point. With --all each point has a kill before the change, one
after half of it, and each of four errors; by default it has one of these in turn, and long cases only some points."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import without_mindspore  # noqa: F401  # before the first module that imports MindSpore

# isort: split
from ms_diffusion import images, kernels
from ms_diffusion.commands import modelarts
from ms_diffusion.data.points import read_saved_points
from ms_diffusion.files import TEMPORARY, load_or_compute, temporary_path, write, write_json
from ms_diffusion.locks import sole_writer
from ms_diffusion.runtime import UserError
from ms_diffusion.training import checkpoint as checkpoints
from ms_diffusion.training.checkpoint import Checkpoint, best_checkpoint, read_newest, read_state
from ms_diffusion.training.loop import Metrics, parse_rows
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.tasks import latents

KILL, KILL_HALFWAY, ERROR = range(3)
ERRORS = {"ENOSPC": True, "EROFS": False, "EIO": False, "EDQUOT": True}  # name -> whether it lasts
LONG = 50  # changes
CONFIG, AUTOENCODER = PRESETS["quick"], PRESETS["autoencoder"]
LATENT: Any = replace(PRESETS["latent"], data=replace(PRESETS["latent"].data, name="fashion-mnist-mini"))


@dataclass
class Case:
    """What a process does to a folder, and what must hold wherever it ends.

    Args:
        prepare: prepare(folder) makes the state before.
        act: act(folder) changes it; the next writer does the same.
        look: look(folder) is what a reader finds. It must be what it was before, or what it is after an undisturbed act.
        may_do_without: where a write fails, the act may end well all the same."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    look: Callable[[Path], Any]
    may_do_without: bool = False


# Checkpoints


def saver(run: Path, value: float, keep: int = 2) -> Checkpoint:
    """The checkpoints of a run whose weights are all `value`."""
    weights = np.full(5000, value, np.float32)
    parameters = {name: SimpleNamespace(name=name, asnumpy=lambda: weights) for name in ("weight", "bias")}
    checkpoint = Checkpoint(run, SimpleNamespace(get_parameters=parameters.values), keep=keep)  # type: ignore[arg-type]
    checkpoint.files["ema"] = checkpoint.files["optimizer"] = parameters  # type: ignore[assignment]
    return checkpoint


def save(run: Path, *steps: int, value: float = 0.5, keep: int = 2, **state: Any) -> None:
    for step in steps:
        saver(run, step + value, keep).save(step, config=CONFIG.to_record(), **state)


def newest(run: Path) -> Any:
    """The step and every value of the newest checkpoint, and the best score. None is no checkpoint."""
    if not (found := read_newest(run, ["model", "ema", "optimizer"])):
        return None
    best = best_checkpoint(run)
    values = {name: {key: a.tobytes() for key, a in arrays.items()} for name, arrays in found.arrays.items()}
    return found.state["step"], found.state.get("fid"), values, best and read_state(best)["fid"]


def spoil(run: Path) -> None:
    """Two checkpoints, of which the newer one is damaged."""
    save(run, 1, 2)
    path = run / "checkpoints/step-0000002/ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def save_twice(run: Path) -> None:
    """What a crash leaves while a step is saved again: the old checkpoint alone."""
    save(run, 1, 2)
    (run / "checkpoints/step-0000002").rename(run / "checkpoints/step-0000002.old")


def best_goes(run: Path) -> None:
    save(run, 1, fid=3.0)
    save(run, 2, fid=4.0)


# Files beside them


def content(name: str, folder: Path) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).exists() else None


def rows(folder: Path) -> Any:
    """The rows up to the step that the run goes on from; later ones go."""
    return [row for row in parse_rows(content("metrics.jsonl", folder) or b"") if row["step"] <= 2]


def log(folder: Path) -> None:
    metrics = Metrics(folder / "metrics.jsonl", 2)
    for step in (3, 4):
        metrics.append(step=step, loss=0.5)
    metrics.sync()


def log_of_before(folder: Path) -> None:
    text = "".join(json.dumps({"step": step, "loss": step / 4}) + "\n" for step in (1, 2, 3))
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "lo')


def points(value: float, folder: Path) -> None:
    arrays = {name: np.full((300, 2), value, np.float32) for name in ("train", "test")}
    write(folder / "points.npz", lambda file: np.savez(file, **arrays))


def saved_points(folder: Path) -> Any:
    return [array.tobytes() for array in read_saved_points(folder / "points.npz")]


def first_stage(original: Path, run: Path) -> None:
    latents.resolve_first_stage(replace(LATENT, first_stage=str(original)), run, original_hash(original))


def original_hash(original: Path) -> str:
    return read_state(original / "checkpoints/step-0000002")["sha256"]["ema.safetensors"]


def damaged_first_stage(original: Path, run: Path) -> None:
    first_stage(original, run)
    os.truncate(run / "first_stage/ema.safetensors", 100)


def lock(folder: Path) -> None:
    with sole_writer(folder / "new/run") as check:
        write(folder / "new/run/data", lambda file: file.write(b"data"))
        check()


# Caches

KEY, SHAPES = "0123456789abcdef" * 4, {"features": (100, 20), "logits": (100, 3)}
ARRAYS = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in SHAPES.items()}


def compute(folder: Path) -> Any:
    return load_or_compute(folder / "cache.bin", KEY, SHAPES, lambda: ARRAYS)


def computed(folder: Path) -> Any:
    """Whatever there is in the cache, the arrays are right; reading alone changes nothing."""
    before = content("cache.bin", folder)
    found = compute(folder)
    assert all((found[name] == ARRAYS[name]).all() for name in SHAPES)
    if before is None:
        (folder / "cache.bin").unlink()
    else:
        (folder / "cache.bin").write_bytes(before)


def build(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    kernels._build()


def compiler(command: list, *_: Any) -> None:
    """Stands in for the compiler, and for the process that tries a library."""
    if "-o" in command:
        Path(command[-1]).write_bytes(b"library" * 3000)


def libraries(folder: Path) -> Any:
    """The libraries that would be loaded: the others' names are not their hashes."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    cache = folder / "ms_diffusion/kernels"
    found = [kernels._find(cache, path.stem.split("-")[0]) for path in cache.glob("*-*.so")] if cache.exists() else []
    return [path.name for path in found if path]


# Copies of a run


def fetch(source: Path, run: Path) -> None:
    modelarts.restore(run, str(source), CONFIG)


def upload(run: Path, folder: Path) -> None:
    (run / modelarts.RECORD).unlink(missing_ok=True)
    modelarts.Uploads(run, str(folder), 10).upload()


def cases(scratch: Path) -> dict[str, Case]:
    """All cases, by name; what they read lies in `scratch`."""
    (scratch / "autoencoder").mkdir()
    save(scratch / "autoencoder", 1, 2)
    write_json(scratch / "autoencoder/config.json", AUTOENCODER.to_record())
    save(scratch / "run", 2, 3)
    write_json(scratch / "run/config.json", CONFIG.to_record())
    write_json(scratch / "run/metrics.jsonl", {"step": 3})
    original = scratch / "autoencoder"
    record, grid = {"samples": {"fid": 1.5}, "text": "x" * 20000}, np.zeros((4, 28, 28, 1), np.uint8)
    report = Case(
        lambda f: write_json(f / "a.json", {"old": 1}),
        lambda f: write_json(f / "a.json", record),
        partial(content, "a.json"),
    )
    copied = partial(lambda run: latents.is_copy(run / "first_stage", original_hash(original)))
    return {
        "checkpoint and rotation": Case(lambda run: save(run, 1, 2), lambda run: save(run, 3), newest),
        "first checkpoint": Case(lambda run: None, lambda run: save(run, 1), newest),
        "checkpoint saved again": Case(lambda run: save(run, 1, 2), lambda run: save(run, 2, value=0.75, fid=1.0), newest),
        "checkpoint saved again after a crash": Case(save_twice, lambda run: save(run, 2, value=0.75), newest),
        "a better checkpoint": Case(best_goes, lambda run: save(run, 3, fid=1.0, keep=1), newest),
        "score of a checkpoint": Case(best_goes, lambda run: saver(run, 0, 1).update(2, fid=1.0), newest),
        "spoilt checkpoint set aside": Case(spoil, lambda run: saver(run, 0).load_latest(), newest),
        "resume after a crash": Case(save_twice, lambda run: saver(run, 0).load_latest(), newest),
        "config.json": replace(report, act=lambda f: write_json(f / "a.json", CONFIG.to_record())),
        "metrics.jsonl": Case(log_of_before, log, rows),
        "points.npz": Case(partial(points, 1.0), partial(points, 2.0), saved_points),
        "first-stage copy": Case(lambda run: None, partial(first_stage, original), copied),
        "first-stage copy renewed": Case(partial(damaged_first_stage, original), partial(first_stage, original), copied),
        "feature and latent caches": Case(lambda folder: None, compute, computed, True),
        "damaged cache": Case(lambda f: (f / "cache.bin").write_bytes(KEY.encode() * 9), compute, computed, True),
        "kernel library": Case(lambda folder: None, build, libraries, True),
        "picture": Case(lambda f: None, lambda f: images.save_grid(f / "new/a.png", grid), partial(content, "new/a.png")),
        "animation": Case(lambda f: None, lambda f: images.save_gif(f / "a.gif", [grid] * 3), partial(content, "a.gif")),
        "report": report,
        "lock": Case(lambda folder: None, lock, partial(content, "new/run/data")),
        "run fetched": Case(lambda run: save(run, 1, 2), partial(fetch, scratch / "run"), newest),
        "run uploaded": Case(lambda run: save(run, 1, 2), partial(upload, scratch / "run"), newest),
    }  # fmt: skip


class Trial:
    """One case at one point after another, each from the same state before."""

    def __init__(self, name: str, case: Case, place: Path):
        self.name, self.case, self.problems, self.faults = name, case, [], 0
        self.template, self.folder = place / "template", place / "folder"
        self.template.mkdir(mode=0o700)
        case.prepare(self.template)
        self.before, self.count = case.look(self.template), self.points()
        self.after = case.look(self.folder)

    def points(self) -> int:
        """How many changes an undisturbed act makes."""
        return self.fork(-1, KILL)[1]

    def fork(self, k: int, mode: int, error: str = "EIO") -> tuple[int, int, int]:
        """Act in a process of its own, with a fault at change k: (its end, changes, whether removing something failed)."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir() and "step-" not in path.name)]
        self.live = {temporary_path(folder / "live") for folder in folders}  # a process that still writes there
        for path in self.live:
            path.touch()
        read, written = os.pipe()
        if not (child := os.fork()):
            os.close(read)
            code = 1
            try:
                SHIM.fault_arm(os.fsencode(self.folder), k, mode, getattr(errno, error), ERRORS[error])
                self.case.act(self.folder)
                code = 0
            except (UserError, OSError):
                code = 2
            except BaseException:
                os.write(written, traceback.format_exc()[-1000:].encode())
            os.write(written, json.dumps([SHIM.fault_count(), SHIM.fault_hit_removal()]).encode())
            os._exit(code)
        os.close(written)
        with os.fdopen(read, "rb") as file:
            text = file.read().decode()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return -os.WTERMSIG(status), k, False
        if (code := os.WEXITSTATUS(status)) == 1:
            raise AssertionError(text)
        return code, *json.loads(text)

    def check(self, k: int, mode: int, error: str = "EIO") -> None:
        self.faults += 1
        try:
            code, _, removing = self.fork(k, mode, error)
            assert code == -signal.SIGKILL or mode == ERROR, f"it went on to code {code}"
            found = self.case.look(self.folder)
            assert found in (self.before, self.after), "what is left is neither old nor new"
            assert code or found == self.after or self.case.may_do_without, "it says that all went well"
            if mode == ERROR and not removing:
                self.check_temporaries("an error left")
            self.case.act(self.folder)
            assert self.case.look(self.folder) == self.after, "the next process does not come to the same end"
            self.check_temporaries("the next process left")
        except Exception:
            what = error if mode == ERROR else ("killed", "killed halfway")[mode]
            self.problems.append(f"{self.name}, change {k} of {self.count}, {what}: {traceback.format_exc()[-700:]}")

    def check_temporaries(self, who: str) -> None:
        found = {path for path in self.folder.rglob("*") if TEMPORARY.fullmatch(path.name)}
        assert found <= self.live, f"{who} {found - self.live}"
        assert found >= self.live, f"{who} nothing of a process that lives: {self.live - found}"


def main(path: str, *flags: str) -> None:
    kernels._run = compiler
    latents.load_first_stage = lambda *_: None  # what is copied is files
    checkpoints.load_into = lambda *_: None  # a fork cannot run operators
    result = {}
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder, contextlib.redirect_stderr(open(os.devnull, "w")):
        os.environ["XDG_CACHE_HOME"] = folder
        (Path(folder) / "scratch").mkdir()
        for i, (name, case) in enumerate(cases(Path(folder) / "scratch").items()):
            (Path(folder) / str(i)).mkdir()
            trial = Trial(name, case, Path(folder) / str(i))
            faults = [(KILL, "EIO"), (KILL_HALFWAY, "EIO"), *((ERROR, error) for error in ERRORS)]
            for k in range(0, trial.count, 1 if "--all" in flags or trial.count < LONG else 5):
                for mode, error in faults if "--all" in flags else [faults[(k + i) % len(faults)]]:
                    trial.check(k, mode, error)
            result[name] = {"points": trial.count, "faults": trial.faults, "problems": trial.problems}
    Path(path).write_text(json.dumps(result))


SHIM = ctypes.CDLL(None)
if __name__ == "__main__":
    main(*sys.argv[1:])
