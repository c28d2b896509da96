"""Huawei ModelArts: the data of a --data_url, and runs that go on after a job was stopped and started on another machine.

A run is brought back from its --train_url before training (`restore`), and copied there beside training (`Uploads`). Both
addresses may be local folders, too."""

import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import points
from ..data.fashion_mnist import FILES
from ..data.folder_labels import METADATA
from ..data.image_folder import EXTENSIONS
from ..files import load_npz, sweep, write_json
from ..locks import sole_writer
from ..metrics.scores import read_npz
from ..progress import ProgressBar
from ..runtime import UserError
from ..training.checkpoint import age, checkpoints, move_in, read_state, read_weights
from ..training.config import Config
from ..training.loop import check_same_run
from .transfer import (
    OBS,
    PATIENCE,
    Folder,
    Version,
    cache_of,
    fetch,
    in_threads,
    is_archive,
    locked,
    read_record,
    unpack,
    visible_files,
)

STEP = re.compile(r"checkpoints/step-(\d+)(?:\.old)?/")
RECORD = ".uploaded.json"  # in a run's folder: which versions of its files its --train_url holds


def output_folder(train_url: str | None) -> Path | None:
    """The folder of a local --train_url; None for OBS, or where there is none."""
    return Path(train_url) if train_url and not train_url.startswith(OBS) else None


def publish(path: Path, url: str | None) -> None:
    """Copy a file to an address in OBS; a file of a local --train_url is there already."""
    if url and url.startswith(OBS):
        folder, name = url.rsplit("/", 1)
        Folder(folder).put(Path(path), name)


# The data

EMBEDDED = ("fashion-mnist-mini", *points.TOYS)  # data sets that read no files
MARKS: dict[str, Callable[[Path], bool]] = {  # the files that show where a data set is
    "fashion-mnist": lambda path: path.name.removesuffix(".gz") == FILES["train"][0],
    "image-folder": lambda path: path.suffix.lower() in EXTENSIONS or path.name in METADATA,
    points.POINTS_FILE: lambda path: path.suffix.lower() in points.SUFFIXES,
}


def use_data(config: Config, url: str) -> tuple[Config, Any]:
    """The configuration that reads the data of a --data_url, and the arrays for its task, if they are in an .npz file. The
    data may lie in a nested folder or in archives. Raises UserError if there are none that the data set reads."""
    root, name = fetch(url), config.data.name
    if is_archive(root):
        root = unpack([root])
    if name not in (*MARKS, *EMBEDDED, "arrays"):  # a loader of the user's own
        return replace(config, data=replace(config.data, dir=str(root))), None
    files = [root] if root.is_file() else visible_files(root)
    if name not in EMBEDDED and not choose(files, name) and (archives := list(filter(is_archive, files))):
        files = visible_files(unpack(archives))
    found = choose(files, name)
    folders = sorted({path.parent for path in found})
    if found and found[0].suffix == ".npz":
        if len(found) > 1:
            raise UserError(f"--data-url {url} holds {found[0].name} and {found[1].name}: give the address of one")
        print(f"training on the arrays in {found[0]}", file=sys.stderr)
        return config.with_data(read_arrays(config, found[0]))
    if name == "fashion-mnist" and len(folders) > 1:
        raise UserError(f"--data-url {url}: {name} is in {folders[0]} and in {folders[1]}: give the address of one")
    if found:
        where = found[0] if name == points.POINTS_FILE and len(found) == 1 else os.path.commonpath(folders)
        return replace(config, data=replace(config.data, dir=str(where))), None
    if name in EMBEDDED:
        print(f"note: --data-url is not read, because {name} needs no files: choose others by --data.name", file=sys.stderr)
        return config, None
    raise UserError(f"--data-url {url} holds no data for --data.name {name}: check the address and the name")


def choose(files: list[Path], name: str) -> list[Path]:
    """Those of these files that show where the data set is; if there are none, the .npz files."""
    return [path for path in files if name in MARKS and MARKS[name](path)] or [p for p in files if p.suffix == ".npz"]


def read_arrays(config: Config, path: Path) -> Any:
    """What `with_data` takes, from an .npz file: `points` (N, 2), or `images` and perhaps `labels`."""
    if config.kind != "points":
        samples = read_npz(path)
        return samples.images if samples.labels is None else (samples.images, samples.labels)
    try:
        return load_npz(path, ["points"])["points"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} has no array `points`, or cannot be read: save it by np.savez(path, points=...)") from e


# The run


def check_writable(url: str) -> None:
    """Raise UserError if nothing can be written to a --train_url."""
    folder, name = Folder(url), f".write-test-{platform.node()}-{os.getpid()}"
    with tempfile.NamedTemporaryFile() as file:
        folder.put(Path(file.name), name)
    folder.remove(name)


def restore(run_dir: Path, url: str | None, config: Config) -> None:
    """Bring a run and its complete checkpoints from `url` to `run_dir`, where it is further than the run there. Raises
    UserError if it is another run than `config` asks for, cannot be fetched, none of its checkpoints is intact, or another
    process writes to the run here."""
    url = url and url.rstrip("/").removesuffix("/checkpoints")
    if not url or is_same(run_dir, url):
        return
    source, scratch = Folder(url), run_dir / f".fetch-{platform.node()}"
    lock = cache_of(str(run_dir.resolve())).with_suffix(".lock")
    with locked(lock) as progress:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        for folder in (run_dir, run_dir / "checkpoints"):
            sweep(folder)
        try:
            remote = source.list()
            states = [name for name in remote if STEP.match(name) and name.endswith("/state.json")]
            in_threads(lambda name: source.get(name, scratch / name), [*states, *{"config.json"} & remote.keys()], progress)
            check_same_run(scratch, config)
            there, here = checkpoints(scratch), checkpoints(run_dir)
            if not there:
                print(f"note: there is no run in {url} to continue", file=sys.stderr)
            elif not here or age(there[-1]) > age(here[-1]):
                print(f"fetching the run in {url}", file=sys.stderr)
                with sole_writer(run_dir):
                    in_threads(lambda name: source.get(name, scratch / name), remote, progress)
                    move(scratch, run_dir, url)
                    files = Folder(run_dir).list()
                    write_record(run_dir, url, {name: files[name] for name in remote if name in files})
        except UserError as e:
            raise UserError(str(e).replace(str(scratch), url).replace("another --run-dir", "another address")) from e
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def move(scratch: Path, run_dir: Path, url: str) -> None:
    """Move a run that was fetched from `url` to its place, with those of its checkpoints that are intact, the newest last.
    Raises UserError if none is intact."""
    intact = []
    for folder in checkpoints(scratch):
        try:
            for name in read_state(folder)["sha256"]:
                read_weights(folder, name.removesuffix(".safetensors"))
            intact.append(folder)
        except UserError as e:
            print(f"warning: {str(e).replace(str(scratch), url)}; the checkpoint is left out", file=sys.stderr)
    if not intact:
        raise UserError(f"no checkpoint in {url} can be read: remove them, or use another address")
    for path in [path for path in visible_files(scratch) if path.parent.parent != scratch / "checkpoints"]:
        target = run_dir / path.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    for folder in intact:
        move_in(folder, run_dir / "checkpoints" / folder.name)


def is_same(run_dir: Path, url: str) -> bool:
    return not url.startswith(OBS) and Path(url).resolve() == run_dir.resolve()


def write_record(run_dir: Path, url: str, sent: dict[str, Version]) -> None:
    write_json(run_dir / RECORD, {"url": url, "sent": sent})


def upload_order(name: str) -> tuple[int, bool, str]:
    """Sorts the files of a run: the newest checkpoint comes first after all other files, a state.json after its folder's."""
    found = STEP.match(name)
    return -int(found[1]) if found else -sys.maxsize, name.endswith("/state.json"), name


class Uploads:
    """Copies what is new in a run's folder to a --train_url, in a thread of its own: when asked, and every `minutes`. The
    newest checkpoint goes first, and its state.json last, so a checkpoint that has one there is whole; checkpoints that the
    run has deleted are then deleted there. A failure gives one warning, and the next copy makes up for it."""

    def __init__(self, run_dir: Path, url: str | None, minutes: float):
        self.run_dir, self.seconds, self.problem = run_dir, 60 * minutes, ""
        self.folder = Folder(url) if url and not is_same(run_dir, url) else None
        self.sent: dict[str, Version] | None = None  # name -> version here of what is there; [] if that is unknown
        self.asked, self.ending, self.last = threading.Event(), threading.Event(), False
        self.thread = threading.Thread(target=self._work, daemon=True)

    def ask(self, _: Path) -> None:
        """Copy soon; the caller does not wait. The first call starts the thread."""
        if self.folder:
            self.asked.set()
            if not self.thread.ident:
                self.thread.start()

    def finish(self) -> bool:
        """Wait for the copy that is being made and for a last one. Whether all has arrived; if not, stderr says why. Does
        nothing if nothing was asked for."""
        if self.thread.ident:
            self.ending.set()
            self.asked.set()
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                self.problem = f"it takes more than {PATIENCE:.0f} seconds"
            if self.problem:
                print(f"error: the last upload failed, so copy {self.run_dir} yourself: {self.problem}", file=sys.stderr)
        return not self.problem

    def _work(self) -> None:
        while not self.last:
            self.asked.wait(self.seconds)
            self.asked.clear()
            self.last = self.ending.is_set()
            try:
                self.upload()
                self.problem = ""
            except Exception as e:  # an upload must not end the training
                problem = textwrap.shorten(str(e) or repr(e), 300)
                if not self.problem and not self.last:
                    ProgressBar.write(
                        f"warning: {problem}; training goes on, and the upload is tried again", file=sys.stderr
                    )
                self.problem = problem

    def upload(self) -> None:
        """Make the folder there like the run's; it is left to the last copy where the run has ended meanwhile. Raises
        UserError if that fails."""
        assert self.folder
        if self.sent is None:
            record = read_record(self.run_dir / RECORD)
            sent = record.get("sent") if record.get("url") == self.folder.url else {}
            items = sent.items() if isinstance(sent, dict) else ()
            known = {name: version for name, version in items if isinstance(version, list)}
            there = self.folder.list().items()
            self.sent = {name: known[name] if known.get(name, [])[:1] == [size] else [] for name, (size, _) in there}
        files = Folder(self.run_dir).list()
        for name in sorted(files, key=upload_order):
            if self.ending.is_set() and not self.last:
                return
            if self.sent.get(name) != files[name] and (self.run_dir / name).exists():
                self._send(name)
                self.sent[name] = files[name]
        for name in sorted(self.sent, key=lambda name: not name.endswith("/state.json")):
            if name not in files and STEP.match(name):
                self.folder.remove(name)
                del self.sent[name]
        write_record(self.run_dir, self.folder.url, self.sent)

    def _send(self, name: str) -> None:
        assert self.folder
        path = self.run_dir / name
        try:
            if name.startswith("checkpoints/"):
                self.folder.put(path, name)
                return
            with tempfile.TemporaryDirectory() as snapshot:  # metrics.jsonl may grow while it is sent
                self.folder.put(Path(shutil.copyfile(path, Path(snapshot, path.name))), name)
        except (UserError, FileNotFoundError):
            if path.exists():  # else the run has deleted it meanwhile
                raise
