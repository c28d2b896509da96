"""The train command and its loop: the run's folder, resuming, interruptions, refusals, scores, the disk."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import assert_refused, call, checkpoint, metrics, picture, tree, weights

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import runtime
from ms_diffusion.__main__ import COMMANDS, main
from ms_diffusion.commands.train import parse_args
from ms_diffusion.data.conditions import condition_image
from ms_diffusion.runtime import UserError
from ms_diffusion.training import loop as training_loop
from ms_diffusion.training.checkpoint import Checkpoint, read_state
from ms_diffusion.training.config import Config, override
from ms_diffusion.training.loop import check_same_run, train_task
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA, make_optimizer
from ms_diffusion.training.tasks.base import Task

ROOT = Path(__file__).parents[1]
MODEL = "--model.dim 8 --model.init-dim 8 --model.dim-mults 1 --model.resnet-block-groups 4".split()
TINY = [*MODEL, *"--train.batch-size 8 --train.sample-steps 2 --train.log-every 1".split()]
# Importance-sampled timesteps, a learned log-variance, classes, self-conditioning, more averages, and scores
EVERYTHING = [
    *"--preset quick-class --diffusion.objective eps --model.self-condition --train.timestep-sampling importance".split(),
    *"--train.learn-logvar --train.ema-lengths 0.05 0.1".split(),
    *TINY,
    *"--diffusion.num-timesteps 5 --train.batch-size 64 --train.total-steps 6 --train.save-every 2".split(),
    *"--train.score-every 2 --train.score-num 130".split(),
]


def fids(run):
    """step -> the FID in each checkpoint's state."""
    states = [read_state(folder) for folder in sorted((Path(run) / "checkpoints").iterdir())]
    return {state["step"]: state["fid"] for state in states}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6, and what its command printed; leave it as it is."""
    run = tmp_path_factory.mktemp("trained") / "run"
    code, out, err = call("train", "--run-dir", run, *EVERYTHING)
    assert code == 0 and "Traceback" not in err, err
    return run, out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return shutil.copytree(trained[0], tmp_path / "run")


# A run from end to end


def test_a_run_folder(trained):
    run, out = trained
    names = {str(name) for name, content in tree(run).items() if content is not None}
    parts = {f"{name}.safetensors" for name in ("model", "ema", "ema-0.05", "ema-0.1", "optimizer")}
    files = {f"checkpoints/step-000000{step}/{name}" for step in (2, 4, 6) for name in parts | {"state.json"}}
    assert names == files | {"config.json", "labels.json", "metrics.jsonl", "loss.png", "samples/step-0000006.png"}
    for step in (2, 4, 6):
        state = read_state(checkpoint(run, step))
        assert (state["step"], state["seed"], state["epoch"]) == (step, 0, 0)
        assert state["sha256"] == {
            name: hashlib.sha256((checkpoint(run, step) / name).read_bytes()).hexdigest() for name in parts
        }
    config = Config.from_json(run / "config.json")
    assert config == parse_args(EVERYTHING).config and config.train.timestep_sampling == "importance"
    state = weights(run, 4, "optimizer")
    assert (state["timesteps.counts"] >= 10).all() and state["timesteps.counts"].sum() == 4 * 64  # no longer uniform
    assert np.ptp(state["logvar"]) > 0
    assert picture(run / "samples/step-0000006.png")[0].shape[:2] == (2 * (7 * 30 + 2), 2 * (10 * 30 + 2))  # 10 classes
    for words in (f"samples     {run}/samples/step-0000006.png", f"loss curve  {run}/loss.png", f"sample {run}"):
        assert words in out


def test_metrics_and_scores(trained):
    run, out = trained
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    scores = {row["step"]: row["fid"] for row in rows if "fid" in row}
    rows = [row for row in rows if "loss" in row]
    assert all(np.isfinite(list(row.values())).all() for row in rows) and rows[-1]["epoch"] == 6 / (2000 // 64)
    schedule = [PRESETS["quick"].train.lr * step / 51 for step in range(1, 7)]  # its warm-up takes 50 steps
    np.testing.assert_allclose([row["lr"] for row in rows], schedule, rtol=1e-5)
    assert list(scores) == [2, 4, 6] and np.isfinite(list(scores.values())).all() and min(scores.values()) > 1
    assert fids(run) == scores
    best = min(scores, key=scores.get)
    assert f"best FID    {scores[best]:.2f}, in {checkpoint(run, best)}" in out


def test_a_resumed_run_equals_an_uninterrupted_one(trained, run):
    """Bit for bit; and a score changes nothing in the training."""
    for step in (4, 6):
        shutil.rmtree(checkpoint(run, step))
    shutil.rmtree(run / "samples")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # as a crash leaves it
    code, out, err = call("train", "--run-dir", run, *EVERYTHING, "--train.score-every", 0)
    assert code == 0 and f"resuming at step 2 of 6 in {run}" in out, err
    for name in ("model", "ema", "ema-0.05", "ema-0.1", "optimizer"):
        a, b = weights(trained[0], 6, name), weights(run, 6, name)
        assert a.keys() == b.keys() and a
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name} {key}")
    whole = [row for row in metrics(trained[0]) if "loss" in row or row["step"] == 2]
    assert metrics(run) == whole
    assert tree(run / "samples") == tree(trained[0] / "samples")


# Interruptions


@pytest.mark.slow
def test_ctrl_c_in_a_process_saves_and_the_same_command_continues(tmp_path):
    net = "--preset scurve --run-dir run --model.dim 8 --model.depth 1 --data.num 200 --diffusion.num-timesteps 12".split()
    few = "--train.batch-size 32 --train.sample-num 20 --train.sample-steps 2 --train.steps-per-call 1".split()
    late = "--train.log-every 1 --train.save-every 100000 --train.sample-every 100000 --train.total-steps 1000000".split()
    args = [*net, *few, *late]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background job would ignore it
    try:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        run, deadline = tmp_path / "run", time.monotonic() + 240
        path = run / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline and not (path.exists() and path.read_bytes()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    last = max((run / "checkpoints").iterdir())
    step, rows = read_state(last)["step"], metrics(run)
    assert [row["step"] for row in rows] == list(range(1, step + 1)) and step >= 1
    again = out.split(f"stopped at step {step} of 1000000, all saved. To continue: python train.py ")[1].strip()
    assert shlex.split(again) == args and (run / "loss.png").exists()

    task = override(parse_args(args).config, total_steps=step + 2).task()
    assert train_task(task, run, "CPU", threading.Event())[0] == step + 2
    assert metrics(run)[:step] == rows and task.start_step == step


# The loop, of any task


class ToyTask(Task):
    """A task without a network to speak of: its losses and scores are given, its preview is an empty file."""

    def __init__(self, config, losses=lambda step: 1.0, scores=(), held=()):
        super().__init__(config)
        self.losses, self.scores, self.held, self.previews = losses, dict(scores), dict(held), []

    def make_networks(self, device):
        train, net = self.config.train, nn.Dense(2, 2)
        self.optimizer = make_optimizer(net, train.lr, train.warmup_steps, train.total_steps, decay=train.lr_decay)
        self.checkpoint = Checkpoint(self.run_dir, net, self.optimizer, EMA(net), keep=train.keep_checkpoints)

    def load_data(self):
        return np.arange(128, dtype=np.float32).reshape(64, 2), np.arange(64, dtype=np.int32)

    def draw_batch(self, x, labels, step):
        return {"labels": labels, "step": np.array(step)}

    def advance(self, batch, step):
        assert batch["step"] == step and len(set(batch["labels"])) == self.config.train.rows_per_step
        ops.assign_add(self.optimizer.global_step, Tensor([1], ms.int32))
        return Tensor(np.float32(self.losses(step))), Tensor(np.float32(1)), {("other",): Tensor(np.float32(step))}

    def preview(self, step):
        self.previews.append(step)
        return self.run_dir / f"{step}.png"

    def is_scored(self, step):
        return step in self.scores

    def score(self, step):
        return self.scores[step]

    def make_validation(self):
        return self.held

    def validate(self, step):
        return {"val_loss": 2 * self.held[step], "val_loss_ema": self.held[step]}


def loop(run, losses=lambda step: 1.0, scores=(), stop=None, on_save=None, held=(), **values):
    """Train a ToyTask of 6 steps; the task and what train_task returns."""
    short = {"total_steps": 6, "batch_size": 8, "log_every": 1, "save_every": 2, "sample_every": 4, "sample_steps": 2}
    short = {name: value for name, value in short.items() if name != "total_steps" or "epochs" not in values}
    task = ToyTask(override(PRESETS["quick"], **short | values), losses, scores, held)
    return task, train_task(task, run, "CPU", stop or threading.Event(), on_save)


def test_when_the_loop_logs_saves_and_previews(tmp_path):
    saved = []
    task, end = loop(tmp_path, losses=lambda step: step, log_every=4, on_save=lambda folder: saved.append(folder))
    assert end == (6, tmp_path / "6.png") and task.previews == [4, 6] and saved == [tmp_path] * 3
    rows = metrics(tmp_path)
    assert [(row["step"], row["loss"], row["other"]) for row in rows] == [(4, 1.5, 3), (6, 4.5, 5)]  # means since the last
    assert [row["epoch"] for row in rows] == [0.5, 0.75]
    task, end = loop(tmp_path, losses=None)  # it is finished, so no step is made
    assert end == (6, tmp_path / "6.png") and task.start_step == 6 and task.previews == [6] and metrics(tmp_path) == rows


def test_a_stop_in_the_loop_saves_and_makes_no_preview(tmp_path):
    stop = threading.Event()
    losses = lambda step: (step == 2 and stop.set()) or 1.0  # noqa: E731
    task, end = loop(tmp_path, losses=losses, stop=stop, log_every=6, save_every=6)
    assert end == (3, None) and not task.previews
    assert not metrics(tmp_path) and list(fids(tmp_path)) == [3]
    stop.clear()
    assert loop(tmp_path, stop=stop)[0].start_step == 3 and list(fids(tmp_path)) == [3, 4, 6]


@pytest.mark.parametrize(
    ("scores", "kept"), [((5, 3, 4), {4: 3, 6: 4}), ((3, 4, 5), {2: 3, 6: 5}), ((5, 4, 3), {6: 3})], ids=str
)
def test_the_best_checkpoint_stays(tmp_path, scores, kept):
    """Besides the newest; also where no checkpoint was due. A resumed run knows which was the best."""
    options = {"keep_checkpoints": 1, "save_every": 100}
    loop(tmp_path, scores=zip((2, 4, 6), scores, strict=True), **options)
    assert fids(tmp_path) == kept
    assert [row["fid"] for row in metrics(tmp_path) if "fid" in row] == list(scores)
    loop(tmp_path, scores={8: 2.5, 10: 6}, total_steps=10, **options)
    assert fids(tmp_path) == {8: 2.5, 10: 6}


def test_a_run_killed_after_its_score_was_logged_logs_it_once(tmp_path, monkeypatch):
    scores, options = {4: 3.0, 8: 2.0}, {"total_steps": 8, "save_every": 4, "sample_every": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "update", lambda *_, **__: exec("raise KeyError"))
        with pytest.raises(KeyError):
            loop(tmp_path, scores=scores, **options)
    loop(tmp_path, scores=scores, **options)
    assert [(row["step"], row["fid"]) for row in metrics(tmp_path) if "fid" in row] == [*scores.items()]
    assert fids(tmp_path) == scores


def held_losses(run):
    return {row["step"]: (row["val_loss"], row["val_loss_ema"]) for row in metrics(run) if "val_loss" in row}


@pytest.mark.parametrize(
    ("held", "scores", "kept"),
    [((5, 3, 4), {}, [4, 6]), ((5, 4, 3), {}, [6]), ((3, 4, 5), {4: 2.0, 6: 3.0}, [4, 6]), ((3, 4, 5), {6: 3.0}, [6])],
    ids=str,
)
def test_the_loss_of_held_out_data(tmp_path, held, scores, kept):
    """It says which checkpoint is the best, but where there is an FID. A killed run has the same rows."""
    held, options = dict(zip((2, 4, 6), held, strict=True)), {"keep_checkpoints": 1, "save_every": 100, "validate_every": 2}
    loop(tmp_path, held=held, scores=scores, **options)
    assert held_losses(tmp_path) == {step: (2 * loss, loss) for step, loss in held.items()}
    assert [int(name[5:]) for name in sorted(os.listdir(tmp_path / "checkpoints"))] == kept
    for step in kept:
        state = read_state(checkpoint(tmp_path, step))
        assert (state["val_loss_ema"], state["fid"]) == (held[step], scores.get(step)) and not state["unfinished"]


def test_a_run_killed_after_its_validation_was_logged_logs_it_once(tmp_path, monkeypatch):
    held, options = {4: 3.0, 8: 2.0}, {"total_steps": 8, "save_every": 4, "sample_every": 100, "validate_every": 4}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "update", lambda *_, **__: exec("raise KeyError"))
        with pytest.raises(KeyError):
            loop(tmp_path, held=held, **options)
    loop(tmp_path, held=held, **options)
    assert held_losses(tmp_path) == {4: (6, 3), 8: (4, 2)} and [row["step"] for row in metrics(tmp_path)].count(4) == 2


def test_the_length_in_epochs(tmp_path):
    """64 data in batches of 8 on one device; a run goes on for more of them."""
    task, end = loop(tmp_path, epochs=0.5)
    assert end[0] == 4 and Config.from_json(tmp_path / "config.json").train.total_steps == 4
    assert metrics(tmp_path)[-1]["epoch"] == 0.5 and metrics(tmp_path)[-1]["lr"] < task.config.train.lr
    assert loop(tmp_path, epochs=2)[1][0] == 16
    assert loop(tmp_path / "parts", epochs=2, batch_size=4, accumulate=4)[1][0] == 8


def test_two_lengths_are_refused(tmp_path):
    words = "--train.epochs and --train.total-steps both say how long to train"
    assert_refused(call("train", "--train.epochs", 2, "--train.total_steps=5", "--run-dir", tmp_path / "run"), words)
    with pytest.raises(UserError, match=words):
        override(PRESETS["quick"], epochs=2, **{"train.total_steps": 5})


@pytest.mark.parametrize("falls", [True, False])
def test_the_learning_rate(tmp_path, falls):
    loop(tmp_path, warmup_steps=2, lr=0.3, lr_decay=falls)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)) if falls else np.ones(4)
    np.testing.assert_allclose([row["lr"] for row in metrics(tmp_path)], [0.1, 0.2, *(0.3 * cosine)], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_many_losses_in_a_row_that_are_not_finite_end_a_run(tmp_path, bad, monkeypatch):
    """Nothing is saved of the weights that made them; the last good checkpoint stays, and the run goes on from there."""
    monkeypatch.setattr(training_loop, "MOST_SKIPPED", 5)
    many = {"total_steps": 20, "save_every": 6, "log_every": 10, "sample_every": 1000}
    with pytest.raises(UserError, match="step 5.*nothing was saved.*--train.lr"):
        loop(tmp_path / "new", losses=lambda step: bad, **many)
    assert not list(tmp_path.rglob("*.safetensors")) and not metrics(tmp_path / "new")
    with pytest.raises(UserError, match="checkpoint of step 6 stands"):
        loop(tmp_path, losses=lambda step: bad if step > 6 else 1.0, **many)
    assert list(fids(tmp_path)) == [6]
    assert loop(tmp_path, **many)[1][0] == 20 and [row["loss"] for row in metrics(tmp_path)] == [1, 1]


def test_a_skipped_step_is_counted_and_a_checkpoint_waits_for_a_good_one(tmp_path):
    bad = {2: np.nan, 3: np.inf, 6: np.nan}
    loop(tmp_path, losses=lambda step: bad.get(step, step), total_steps=8, log_every=4, save_every=4, sample_every=8)
    assert [(row["step"], row["loss"], row["skipped"]) for row in metrics(tmp_path)] == [(4, 0.5, 2), (8, 16 / 3, 1)]
    assert list(fids(tmp_path)) == [5, 8]


def test_a_preview_that_cannot_be_written_loses_no_step(tmp_path, monkeypatch):
    def unwritable(self, step):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ToyTask, "preview", unwritable)
    with pytest.raises(OSError):
        loop(tmp_path, save_every=100, sample_every=3)
    assert list(fids(tmp_path)) == [3]
    monkeypatch.undo()
    assert loop(tmp_path, save_every=100, sample_every=3)[0].previews == [3, 6]  # that of step 3 is made up for


def test_a_stop_in_a_preview_saves_and_the_next_call_makes_it(tmp_path, monkeypatch):
    def interrupted(self, step):
        raise runtime.Interrupted

    monkeypatch.setattr(ToyTask, "score", interrupted)
    scores = {3: 1.5, 6: 1.0}
    assert loop(tmp_path, scores=scores, save_every=3, log_every=3, sample_every=100)[1] == (3, None)
    assert fids(tmp_path) == {3: None}
    monkeypatch.undo()
    loop(tmp_path, scores=scores, save_every=3, log_every=3, sample_every=100)
    assert fids(tmp_path) == scores and [row["step"] for row in metrics(tmp_path)] == [3, 3, 6, 6]


@pytest.mark.parametrize("name", ["preview", "score"])
def test_a_preview_and_a_score_are_given_up_at_a_stop(tmp_path, monkeypatch, name):
    """Also those of the last step: the run is then not at its end."""
    stop = threading.Event()

    def long(self, step):
        stop.set()
        runtime.check_interrupted()  # as sampling, decoding and features do
        raise AssertionError

    monkeypatch.setattr(ToyTask, name, long)
    options = {"total_steps": 3, "sample_every": 3, "save_every": 100, "scores": {3: 1.5}}
    assert loop(tmp_path, stop=stop, **options)[1] == (3, None)
    assert fids(tmp_path) == {3: None}
    monkeypatch.undo()
    task, end = loop(tmp_path, **options)
    assert end == (3, tmp_path / "3.png") and task.start_step == 3 and fids(tmp_path) == {3: 1.5}


def test_the_log_of_a_resumed_run_is_that_of_one_run(tmp_path):
    """Also where a line of the log is of steps on both sides of the checkpoint."""
    options = {"log_every": 4, "save_every": 3, "sample_every": 100, "total_steps": 12}
    losses = lambda step: 1 / (1 + step)  # noqa: E731
    loop(tmp_path / "whole", losses=losses, **options)
    stop = threading.Event()
    loop(tmp_path / "parts", losses=lambda step: (step == 5 and stop.set()) or losses(step), stop=stop, **options)
    loop(tmp_path / "parts", losses=losses, **options)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "whole")) == 3


def test_lines_of_the_log_that_cannot_be_read_are_dropped(tmp_path):
    loop(tmp_path)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    bad = [b"\xff\n", b"{\n", b"[]\n", b'{"step": "x"}\n', b'{"step": 3, "loss": null}\n', b"[" * 100_000 + b"\n", b"\0\n"]
    path.write_bytes(b"".join([*bad, *good[:3], *bad, *good[3:], b'{"step": 6, "lo']))
    loop(tmp_path)
    assert path.read_bytes().splitlines(keepends=True) == good


def test_a_run_whose_folder_is_removed_or_renamed_is_saved_anew(tmp_path):
    """What is known in memory is not lost: the next checkpoint, the configuration and the whole log."""

    def losses(step):
        if step == 3:
            (tmp_path / "run").rename(tmp_path / "renamed")
        return 1.0

    loop(tmp_path / "run", losses=losses)
    assert list(fids(tmp_path / "run")) == [4, 6] and list(fids(tmp_path / "renamed")) == [2]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert Config.from_json(tmp_path / "run" / "config.json").train.total_steps == 6


def test_a_full_disk_is_one_line_of_error(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert runtime.run_program(lambda argv: loop(tmp_path), []) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "No space left on device" in error and str(checkpoint(tmp_path, 2)) in error
    assert not list((tmp_path / "checkpoints").iterdir()) and [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_weights_at_step_0_are_saved_before_training(tmp_path):
    loop(tmp_path, total_steps=0, init_from="weights.safetensors")
    assert list(fids(tmp_path)) == [0] and not metrics(tmp_path)


# What a step draws, and its loss, without a graph


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """started(flags): a task that is ready to train."""

    def started(flags):
        task = parse_args([*TINY, "--train.batch-size", "64", *flags.split()]).config.task()
        task.start(tmp_path_factory.mktemp("started"))
        return task

    return started


def batch_of(task, step=0):
    x = np.random.default_rng(9).uniform(-1, 1, (64, 1, 28, 28)).astype(np.float32)
    return task.draw_batch(x, np.arange(64, dtype=np.int32) % 10, step)


@pytest.mark.parametrize(
    "flags",
    [
        "--train.seed 5",
        "--train.timestep-sampling antithetic --train.offset-noise 3",
        "--preset quick-class --train.label-dropout 0.5 --model.self-condition --data.condition mask --model.cond-channels "
        "2",
        "--preset quick-upscale",
        "--train.timestep-sampling importance",
    ],
)
def test_what_a_step_draws(started, flags):
    """All of it from (seed, 2, 0, step), in this order, so that runs of before continue with the same numbers; the second of
    two ranks has the second half of it."""
    task, step = started(flags), 3
    task.rank, task.world_size = 1, 2
    train, found = task.config.train, batch_of(task, step)
    rng, n = np.random.default_rng((train.seed, 2, 0, step)), 128
    if train.timestep_sampling == "antithetic":
        half = rng.integers(0, 1000, n // 2)
        expected = {"t": np.concatenate([half, 999 - half])}
    elif train.timestep_sampling == "importance":  # uniform at first
        expected = {"t": rng.choice(1000, n, p=np.full(1000, 1 / 1000)), "weights": np.ones(n)}
    else:
        expected = {"t": rng.integers(0, 1000, n)}
    expected["noise"] = rng.standard_normal((n, 1, 28, 28), np.float32)
    if train.offset_noise:
        expected["noise"] = expected["noise"] + np.float32(3) * rng.standard_normal((n, 1, 1, 1), np.float32)
    if task.config.model.self_condition:
        expected["self_cond_mask"] = rng.integers(0, 2, n)
    if task.config.model.num_classes:
        expected["labels"] = np.where(rng.random(n) < train.label_dropout, 10, np.tile(np.arange(64) % 10, 2))
    if (kind := task.config.data.condition) != "none":
        expected["cond_image"] = condition_image(kind, np.concatenate([found["x_start"]] * 2), 7, rng)
    assert found.keys() - {"x_start"} == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values[64:], err_msg=name)
    assert {value.dtype for value in found.values()} <= {np.dtype(np.float32), np.dtype(np.int32)}
    assert (batch_of(task, step + 1)["noise"] != found["noise"]).any()


def test_the_loss_of_a_step(started):
    """The mean of weight times loss, and the losses; x_0 is guessed first for the samples of the mask."""
    task = started("--model.self-condition --train.timestep-sampling importance")
    batch = batch_of(task)
    np.testing.assert_array_equal(batch["weights"], np.ones(64, np.float32))  # uniform at first
    batch = {name: Tensor(value) for name, value in batch.items()}
    batch["weights"] = Tensor(np.linspace(0, 3, 64, dtype=np.float32))
    loss_fn, mask = task.make_loss(), batch.pop("self_cond_mask")
    loss, losses = loss_fn(**batch, self_cond_mask=mask)
    losses = losses.asnumpy()
    assert losses.shape == (64,) and losses.std() > 0
    np.testing.assert_allclose(loss.asnumpy(), np.mean(batch["weights"].asnumpy() * losses), rtol=1e-5)
    with_guess, without = (loss_fn(**batch, self_cond_mask=Tensor(np.full(64, n, np.float32)))[1].asnumpy() for n in (1, 0))
    np.testing.assert_allclose(losses, np.where(mask.asnumpy() == 1, with_guess, without), rtol=1e-4)
    assert (abs(with_guess - without) > 1e-4 * without).mean() > 0.9
    del batch["weights"]
    np.testing.assert_allclose(loss_fn(**batch, self_cond_mask=mask).asnumpy(), losses.mean(), rtol=1e-5)


def test_samples_that_are_not_finite_end_a_run_with_scores(started):
    task = started("--train.score-every 2 --train.score-num 130")
    task.draw = lambda num, *_: np.full((num, 1, 28, 28), np.nan, np.float32)
    assert not task.is_scored(1) and task.is_scored(2)
    with pytest.raises(UserError, match="not finite at step 2"):
        task.score(2)


# Bad input: exit code 2, one line that names what is wrong, nothing written


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--train.lrr 1", ["--train.lrr"]),
        ("--data.size 30", ["--data.size", "32"]),
        ("--data.size 24", ["24"]),
        ("--data.name nonsense", ["nonsense"]),
        ("--data.name image-folder --data.dir nowhere", ["nowhere"]),
        ("--data.name image-folder", ["--data.dir"]),
        ("--data.name fashion-mnist --data.dir nowhere", ["nowhere"]),
        ("--model.dim 12", ["12"]),
        ("--train.batch-size 5000", ["--train.batch-size"]),
        ("--train.ema-decay 1", ["--train.ema-decay"]),
        ("--precision bf16 --device cpu", ["bf16"]),
        ("--run-dir file", ["file"]),
        ("--run-dir file/below", ["file"]),
        ("--preset quick-class --model.num-classes 9", ["--model.num-classes 10"]),
        ("--preset quick-class --model.no-with-time-emb", ["num_classes"]),
        ("--train.sample-guidance 3", ["--preset quick-class"]),
        ("--preset quick-class --train.sample-guidance 3 --train.label-dropout 0", ["--train.label-dropout 0"]),
        ("--preset quick-class --train.sample-guidance-interval 0 9", ["--guidance-interval"]),
        ("--preset quick-class --train.sample-guidance 3 --train.sample-guidance-interval 0 1000", ["0 1000", "999"]),
        ("--data.name image-folder --data.dir pictures --train.score-every 2", ["100 images", "--train.score-every"]),
        ("--init-from nowhere.safetensors", ["nowhere.safetensors"]),
    ],
)
def test_bad_input(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    if "pictures" in args:
        (tmp_path / "pictures").mkdir()
        for i in range(100):
            Image.fromarray(np.full((28, 28), i, np.uint8)).save(tmp_path / f"pictures/{i}.png")
    before = tree(tmp_path)
    assert_refused(call("train", "--train.total-steps", 1, *args.split()), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("--model.dim 16", "model"),
        ("--diffusion.objective eps", "diffusion"),
        ("--precision fp16", "precision"),
        ("--data.no-flip", "data"),
        ("--train.seed 1", "seed"),
        ("--preset scurve", "kind"),
        ("--preset latent", "kind"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, args, word):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["quick"].to_record()))
    before = tree(tmp_path)
    code, out, err = call("train", "--run-dir", tmp_path, *args.split())
    assert_refused((code, out, err), str(tmp_path), "--run-dir")
    assert f"another {word}" in err or word == "kind"  # a run of another kind differs in all parts
    assert tree(tmp_path) == before


def test_what_may_change_in_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["quick"].to_record()))
    check_same_run(tmp_path, override(PRESETS["quick"], total_steps=9, lr=1.0, batch_size=2, **{"data.dir": "elsewhere"}))
    check_same_run(tmp_path / "new", PRESETS["latent"])
    record = override(PRESETS["latent"], latent_scale=0.5).to_record()
    (tmp_path / "config.json").write_text(json.dumps(record))
    for changes in ({"latent_scale": 0.6}, {"latent_scale": 0.5, "first_stage_patch": 8}):
        with pytest.raises(UserError, match=f"--{list(changes)[-1].replace('_', '-')}"):
            check_same_run(tmp_path, override(PRESETS["latent"], **changes))
    check_same_run(tmp_path, override(PRESETS["latent"], latent_scale=0.5, first_stage="elsewhere"))
    (tmp_path / "config.json").write_text('{"data": 3}')
    with pytest.raises(UserError, match=r"config\.json"):
        check_same_run(tmp_path, PRESETS["quick"])


def test_a_run_whose_checkpoints_are_all_corrupt_is_refused(run):
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    before = tree(run)
    code, _, err = call("train", "--run-dir", run, *EVERYTHING)
    assert code == 2 and [line.split(":")[0] for line in err.splitlines()] == ["warning"] * 3 + ["error"]
    assert tree(run) == before


@pytest.mark.skipif(ms.device_context.gpu.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there(tmp_path):
    assert_refused(call("train", "--run-dir", tmp_path / "new", "--device", "gpu"), "GPU", "--device cpu")
    assert not (tmp_path / "new").exists()


# The command


@pytest.mark.parametrize(
    ("program", "train"),
    [
        ("/a/clone/train.py", "python train.py"),
        ("/a/clone/sample.py", "python train.py"),
        ("/site-packages/ms_diffusion/__main__.py", "python -m ms_diffusion train"),
        ("/usr/bin/ms-diffusion", "ms-diffusion train"),
    ],
)
def test_messages_name_the_command_as_it_was_called(tmp_path, monkeypatch, program, train):
    monkeypatch.setattr(sys, "argv", [program])
    assert_refused(call("train", "--preset", "quick", "--train.sample-guidance", "3", "--run-dir", tmp_path / "x"), train)


def test_help():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert not end.value.code
    assert all(flag in out.getvalue() for flag in ("--preset", "--run-dir", "--train.lr", "--data.dir", "--model.dim"))
    code, out, _ = call("--help")
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS)
    assert_refused(call("trian"), "trian")


def test_debug_shows_the_traceback():
    with pytest.raises(UserError, match="quik"):
        call("train", "--preset", "quik", "--debug")
