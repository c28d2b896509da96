"""TensorBoard's event files, read by TensorBoard itself: they say what metrics.jsonl says, also after a crash."""

import contextlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from runs import assert_refused, call, checkpoint, metrics, succeed

from ms_diffusion.training.events import PREFIX, Events
from ms_diffusion.training.loop import Metrics

POINTS = "train --preset scurve --model.dim 8 --train.steps-per-call 1".split()
POINTS += "--train.batch-size 8 --train.sample-num 4 --train.sample-steps 2 --data.num 64 --train.log-every 1".split()
POINTS += "--train.sample-every 2 --train.save-every 2 --train.validate-every 2 --train.tensorboard".split()


def read(run):
    """({tag: [(step, value)]}, {tag: [(step, PNG)]}), as TensorBoard reads a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with contextlib.redirect_stderr(None):
        events = accumulator.EventAccumulator(str(run), {"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {tag: [(each.step, each.encoded_image_string) for each in events.Images(tag)] for tag in tags["images"]}
    return tuple({tag: values for tag, values in found.items() if values} for found in (scalars, pictures))


def assert_same(run):
    """The events have the numbers of metrics.jsonl, each once, in float32, and the previews."""
    scalars, pictures = read(run)
    rows = Metrics(run / "metrics.jsonl", 10**9).rows
    names = {name for row in rows for name in row} - {"step"}
    assert scalars.keys() == names
    for name in names:
        expected = [(row["step"], np.float32(row[name])) for row in rows if name in row]
        assert scalars[name] == expected, name
    drawn = [(int(path.stem[-7:]), path.read_bytes()) for path in sorted((run / "samples").glob("step-*.png"))]
    assert pictures == ({"samples/step": drawn} if drawn else {})


def draw(run, step):
    (run / "samples").mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 6), step, np.uint8)).save(run / "samples" / f"step-{step:07d}.png")


def test_a_run_that_is_killed_and_resumed(tmp_path):
    """What was logged after the checkpoint is forgotten; the checkpoint's own step is there once, with its picture."""
    pytest.importorskip("tensorboard")
    log = Metrics(tmp_path / "metrics.jsonl", 0)
    log.events = Events(tmp_path, log.rows, 0, True)
    for step in range(1, 8):
        log.append(step=step, loss=1 / step, lr=1e-3 * step)
        if step % 2 == 0:
            draw(tmp_path, step)
            log.append(step=step, fid=step / 3)
            log.events.add_pictures(step)
    assert_same(tmp_path)
    for start, is_finished in ((4, True), (4, False), (0, True)):
        log = Metrics(tmp_path / "metrics.jsonl", start)
        log.events = Events(tmp_path, log.rows, start, is_finished)
        for path in (tmp_path / "samples").glob("*.png"):
            if int(path.stem[-7:]) >= start + is_finished:
                path.unlink()
        assert_same(tmp_path)
        if not is_finished:
            draw(tmp_path, start)
            log.events.add_pictures(start)
        log.append(step=start + 1, loss=0.5)
        assert_same(tmp_path)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 4


def test_events_that_begin_late_or_are_removed(tmp_path):
    """They have all that was logged and drawn before; where a file is removed, its header is written again."""
    pytest.importorskip("tensorboard")
    log = Metrics(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.append(step=step, loss=1 / step)
        draw(tmp_path, step)
    damaged = tmp_path / "samples" / "denoise-row-0000002.png"
    damaged.write_bytes(b"no picture")
    log.events = Events(tmp_path, log.rows, 3, True)
    assert_same(tmp_path)
    log.events.path.unlink()
    log.append(step=4, loss=0.1)
    assert read(tmp_path)[0] == {"loss": [(4, np.float32(0.1))]}


@pytest.mark.slow
def test_training(tmp_path):
    """Off, nothing is written; on from step 2, all is there, and a run that resumes before its end has nothing twice."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    succeed(*POINTS[:-1], "--run-dir", run, "--train.total-steps", 2)
    assert not list(run.glob(f"{PREFIX}*"))
    succeed(*POINTS, "--run-dir", run, "--train.total-steps", 6)
    assert_same(run)
    before = metrics(run)
    shutil.rmtree(checkpoint(run, 6))
    succeed(*POINTS, "--run-dir", run, "--train.total-steps", 6)
    assert_same(run)
    assert metrics(run) == before and len(list(run.glob(f"{PREFIX}*"))) == 2


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    end = call(*POINTS, "--run-dir", tmp_path / "run", "--train.total-steps", 2)
    assert_refused(end, "--train.tensorboard", 'pip install "ms_diffusion[tensorboard]"')
    assert not (tmp_path / "run").exists()
