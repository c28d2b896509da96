"""TensorBoard's event files beside metrics.jsonl, for `--train.tensorboard`. They are written and never read: metrics.jsonl
is the record of a run.

MindSpore's own SummaryRecord writes scalars in a field that TensorBoard does not know. tensorboard's EventFileWriter would
import TensorFlow where it is installed, and start a thread; its records and messages alone do neither."""

import contextlib
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import read_bytes
from ..images import picture_size
from ..runtime import UserError
from .runs import previews

PREFIX = "events.out.tfevents."
VERSION = "brain.Event:2"  # what each file begins with


def import_tensorboard() -> tuple[Any, Any, Any]:
    """Its messages of events and of summaries, and its writer of records. Raises UserError if it is not installed."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # pyright: ignore[reportMissingImports]
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        package = 'pip install "ms_diffusion[tensorboard]"'
        raise UserError(f"--train.tensorboard needs the tensorboard package: {package}, or leave it out") from e
    return event_pb2, summary_pb2, RecordWriter


class Events:
    """The event file of one call of training; a run that is resumed gets one more.

    It begins by telling TensorBoard to forget what earlier files say of the step `start` and those after it, which a killed
    run may have logged, and repeats `rows` of that step. Where there is no earlier file, it has all rows and pictures.

    Args:
        rows: the rows of metrics.jsonl up to `start`.
        is_finished: whether the preview of `start` is there already."""

    def __init__(self, run_dir: Path, rows: Sequence[dict[str, Any]], start: int, is_finished: bool):
        self.messages, self.summaries, self.writer = import_tensorboard()
        first = start if any(run_dir.glob(f"{PREFIX}*")) else 0
        self.run_dir, self.path = run_dir, run_dir / f"{PREFIX}{time.time():.6f}.{platform.node()}"
        self.write(step=first, session_log=self.messages.SessionLog(status=self.messages.SessionLog.START))
        for row in rows:
            if row["step"] >= first:
                self.add(row)
        for step in sorted({step for files in previews(run_dir).values() for step, _ in files}):
            if first <= step < start + is_finished:
                self.add_pictures(step)

    def add(self, row: dict[str, Any]) -> None:
        """Write the numbers of a row of metrics.jsonl, each under its own name."""
        self.summarize(row["step"], [{"tag": name, "simple_value": row[name]} for name in row if name != "step"])

    def add_pictures(self, step: int) -> None:
        """Write the previews of a step, each under `samples/` and its kind. What cannot be read is left out."""
        values = []
        for kind, path in ((kind, path) for kind, files in previews(self.run_dir).items() for n, path in files if n == step):
            with contextlib.suppress(OSError, ValueError, UserError):
                (height, width), data = picture_size(path), read_bytes(path)
                picture = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": data}
                values.append({"tag": f"samples/{kind}", "image": self.summaries.Summary.Image(**picture)})
        self.summarize(step, values)

    def summarize(self, step: int, values: list[dict[str, Any]]) -> None:
        summary = self.summaries.Summary
        self.write(step=step, summary=summary(value=[summary.Value(**value) for value in values]))

    def write(self, **content: Any) -> None:
        with open(self.path, "ab") as file:
            writer, event, now = self.writer(file), self.messages.Event, time.time()
            if not file.tell():  # a new file, also where the folder was removed or renamed
                writer.write(event(wall_time=now, file_version=VERSION).SerializeToString())
            writer.write(event(wall_time=now, **content).SerializeToString())
