"""List the runs below a folder: `runs`, `runs elsewhere`. Weights are not read, and nothing is written."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..files import read_bytes, read_json
from ..locks import find_writer
from ..runtime import UserError, command, describe, one_line, say
from ..training.checkpoint import SCORES, checkpoints, read_config, read_state, readable
from ..training.config import Config
from ..training.loop import parse_rows
from .parse import parse
from .train import command_of

INSIDE = {"checkpoints", "samples", "text_encoder", "export"}  # folders of a run that hold no run
TITLES = {"fid": "FID", "val_loss_ema": "val_loss_ema"}


@dataclass
class Args:
    """List the runs below a folder: step, loss, scores, size, last change, and how an unfinished one goes on."""

    folder: Annotated[str, tyro.conf.Positional] = "runs"
    """Folder to look in, with all folders below it; or a run."""
    json: bool = False
    """Print a list of JSON objects."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Summary:
    """What the files of a run say, without its weights."""

    run: str
    """Its folder."""
    kind: str = ""
    data: str = ""
    step: int = 0
    """The last step that was logged or saved."""
    total_steps: int = 0
    loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """The last and the best fid, or val_loss_ema, of training, and the FID of evaluation.json."""
    bytes: int = 0
    changed: float = 0.0
    """When a file of it was last written, in seconds since 1970."""
    problem: str | None = None
    """Why it cannot be read."""
    writer: str | None = None
    """The process that trains it."""
    command: str | None = None
    """What goes on with it, if it is not finished and nobody trains it."""

    @property
    def note(self) -> str:
        if self.writer:
            return f"being trained by {self.writer}"
        return self.problem or (f"to continue: {self.command}" if self.command else "")


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("runs"))
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that your runs are in")
    found = [summarize(path) for path in find_runs(folder)]
    if args.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    elif found:
        print(table(found))
    else:
        print(one_line(f"there is no run below {folder}"))
    return 0


def find_runs(folder: Path) -> Iterator[Path]:
    """The runs below a folder, sorted, and itself if it is one; also those in another run, such as its first stage."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=warn):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        names = {*folders, *files}
        is_run = bool(names & {"checkpoints", "metrics.jsonl"}) or {"config.json", "state.json"} <= names
        folders[:] = sorted(name for name in folders if name[0] != "." and not (is_run and name in INSIDE))
        if is_run:
            yield Path(parent)


def warn(e: OSError) -> None:
    say(f"warning: {e.filename}: {e.strerror}")


def summarize(path: Path) -> Summary:
    """What the files of a run say. What cannot be read becomes its `problem`."""
    found = Summary(str(path))
    try:
        found.bytes, found.changed = measure(path)
        config, rows, state = read(path)
        found.kind, found.data, found.total_steps = config.kind, config.data.name, config.train.total_steps
        found.step = max([row["step"] for row in rows] + [state.get("step", 0)])
        found.loss = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
        found.scores, found.writer = scores_of(path, rows), find_writer(path)
        is_part = (path / "state.json").exists()  # a bundled model, or the first stage that a run keeps
        is_finished = state.get("step", -1) >= found.total_steps and not state.get("unfinished")
        if not is_part and checkpoints(path) and not state:
            found.problem = "no checkpoint can be read"
        elif not is_part and not is_finished and not found.writer:
            found.command = command_of(config, path)
            found.problem = None if found.command else "not finished, and only Python can go on with it: md.train"
    except (UserError, OSError) as e:
        found.problem = describe(e)
    return found


def read(path: Path) -> tuple[Config, list[dict[str, Any]], dict[str, Any]]:
    """The configuration of a run, the rows of its metrics.jsonl, and its newest state.json; {} if there is none that can be
    read. Raises UserError if it has no configuration, or one that cannot be read."""
    if not (config := read_config(path)):
        raise UserError(f"{path} has no config.json: it is no run of this program, or a part of one")
    metrics, whole = path / "metrics.jsonl", path / "state.json"
    rows = parse_rows(read_bytes(metrics)) if metrics.exists() else []
    state = read_state(path) if whole.exists() else next(reversed(readable(path).values()), {})
    return config, rows, state


def scores_of(path: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The last and the best score of training, and the FID of the evaluate command."""
    scores = {}
    for name in SCORES:
        if values := [row[name] for row in rows if name in row]:
            scores |= {name: values[-1], f"best_{name}": min(values)}
            break
    if fid := read_scores(path).get("samples", {}).get("fid"):
        scores["evaluated_fid"] = fid
    return scores


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a run's evaluation.json; {} if there is none, or it is none of ours."""
    try:
        record = read_json(path / "evaluation.json")
        kinds = [(record[name], kind) for name, kind in (("protocol", str), ("samples", dict), ("floor", dict))]
        numbers = [value for part in (record["samples"], record["floor"]) for value in part.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    is_ours = all(isinstance(value, kind) for value, kind in kinds) and all(type(n) in (int, float) for n in numbers)
    return record if is_ours else {}


def measure(path: Path) -> tuple[int, float]:
    """The bytes of all files of a run, and when one was last written."""
    size, changed = 0, path.stat().st_mtime
    for parent, _, files in os.walk(path):
        for name in files:
            try:
                found = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:  # the process that trains it has deleted it meanwhile
                continue
            size, changed = size + found.st_size, max(changed, found.st_mtime)
    return size, changed


def table(found: Sequence[Summary]) -> str:
    """A line for each run, below one of titles."""
    rows = [["run", "kind", "data", "step", "loss", "score", "MB", "last change", ""]]
    for each in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        loss = "-" if each.loss is None else f"{each.loss:.4g}"
        step = f"{each.step}/{each.total_steps}" if each.kind else "-"
        columns = [each.run, each.kind or "-", each.data or "-", step, loss, show_scores(each.scores) or "-"]
        rows.append([one_line(text) for text in (*columns, f"{each.bytes / 1e6:.1f}", when, each.note)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, [*widths[:-1], 0])).rstrip() for row in rows)


def show_scores(scores: dict[str, float]) -> str:
    parts = [f"FID {scores['evaluated_fid']:.4g} (evaluated)"] if "evaluated_fid" in scores else []
    for name, title in TITLES.items():
        if name in scores:
            last, best = scores[name], scores[f"best_{name}"]
            parts.append(f"{title} {last:.4g}" + (f", best {best:.4g}" if best < last else ""))
    return "; ".join(parts)
