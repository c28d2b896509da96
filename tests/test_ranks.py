"""Several ranks, as processes on the CPU that msrun starts: they train, stop, resume, sample and score as one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import checkpoint, metrics, picture, weights

pytestmark = pytest.mark.slow
HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
KINDS = "pixels classes fp16 importance points autoencoder actnorm latents".split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, ranks, *command):
    """The process of a program in `folder` on so many ranks; what it prints goes to log.txt there."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "GLOG_v": "2"}  # msrun calls "python"
    launch = [sys.executable]
    if ranks > 1:
        launch = [BIN / "msrun", f"--worker_num={ranks}", f"--local_worker_num={ranks}", "--join=True"]
        launch += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--log_dir={folder / 'logs'}"]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            [*map(str, (*launch, *command))], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def finish(*processes, timeout=1500):
    for process in processes:
        assert process.wait(timeout) == 0


def job(folder, ranks, *jobs):
    return start(folder, ranks, HERE / "ranks_job.py", folder, *jobs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders with the runs of all kinds: of two ranks, and of one."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    finish(job(two, 2, "all_kinds"), job(one, 1, "all_kinds"))
    return two, one


def assert_close(found, expected, atol):
    """Parameters agree, but for the key's bias in an attention: its gradient is rounding noise, which Adam enlarges."""
    assert found.keys() == expected.keys() and found
    for name in found:
        if not name.endswith("attn_1.k.bias") and ".moment" not in name:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(trained, kind):
    """Ten steps: both ranks have the same parameters bit for bit, and those of one process with both their batches."""
    two, one = trained
    first, second, alone = (np.load(path) for path in (two / f"{kind}-0.npz", two / f"{kind}-1.npz", one / f"{kind}-0.npz"))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    tolerance = {"fp16": 2e-3, "latents": 1e-4}.get(kind, 1e-5)  # fp16: the gradients are rounded on each rank
    assert_close(dict(first), dict(alone), tolerance)
    initial = weights(one / kind, 5)
    assert max(abs(alone[f"model.{name}"] - initial[name]).max() for name in initial) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_of_all_ranks(trained, kind):
    for ours, theirs in zip(*(metrics(folder / kind) for folder in trained), strict=True):
        assert ours == pytest.approx(theirs, rel=0.01 if kind == "fp16" else 1e-3)


def test_previews_are_those_of_one(trained):
    for kind in ("pixels", "classes", "autoencoder", "points"):
        ours, theirs = (picture(folder / kind / "samples/step-0000010.png")[0].astype(int) for folder in trained)
        assert ours.shape == theirs.shape and (abs(ours - theirs) <= 2).mean() > 0.99


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_on_as_many_ranks_or_others(trained, tmp_path, ranks):
    """From step 5: bit for bit on as many ranks, to rounding otherwise; the batch of all ranks stays as it was."""
    for number, folder in zip((2, 1), trained, strict=True):
        shutil.copytree(folder / "pixels", tmp_path / f"of-{number}")
        shutil.rmtree(checkpoint(tmp_path / f"of-{number}", 10))
    finish(job(tmp_path, ranks, "resume"))
    for number, folder in zip((2, 1), trained, strict=True):
        found, expected = np.load(tmp_path / f"of-{number}-0.npz"), np.load(folder / "pixels-0.npz")
        assert_close(dict(found), dict(expected), 0 if number == ranks else 1e-5)
        state = json.loads((checkpoint(tmp_path / f"of-{number}", 10) / "state.json").read_text())
        assert (state["batch_size"], state["world_size"]) == (8 // ranks, ranks)
    assert "the batch is still 8" in (tmp_path / "log.txt").read_text()


def test_a_folder_for_each_rank(trained, tmp_path):
    """Rank 1 finds no checkpoint on its own disk and gets rank 0's; the other way round if the ranks have changed places."""
    for rank in (0, 1):
        folder = tmp_path / f"of-{rank}"
        shutil.copytree(trained[0] / "pixels", folder / f"own-{rank}")
        shutil.rmtree(checkpoint(folder / f"own-{rank}", 10))
        finish(job(folder, 2, "own_folders"))
        assert f"continue from step 5, which rank {rank} has" in (folder / "log.txt").read_text()
        for each in (0, 1):
            found, expected = np.load(folder / f"own-{each}-{each}.npz"), np.load(trained[0] / "pixels-0.npz")
            assert_close(dict(found), dict(expected), 0)
        assert checkpoint(folder / "own-0", 10).exists() and not checkpoint(folder / "own-1", 10).exists()


def test_the_commands_of_two_ranks_do_what_those_of_one_do(trained, tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder in folders:
        shutil.copytree(trained[1] / "classes", folder / "classes")
    finish(job(folders[0], 2, "commands"), job(folders[1], 1, "commands"))
    for name, exact in {"sample": True, "gif": True}.items():
        (ours, labels), (theirs, their_labels) = (np.load(folder / f"{name}.npz").values() for folder in folders)
        assert (labels == their_labels).all()
        np.testing.assert_array_equal(ours, theirs) if exact else None
    np.testing.assert_array_equal(picture(folders[0] / "x.gif")[0], picture(folders[1] / "x.gif")[0])
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in folders)
    for part in ("samples", "floor"):
        assert ours[part] == pytest.approx(theirs[part], rel=1e-5)
    ours, theirs = ((folder / "log.txt").read_text() for folder in folders)
    bits = [line for line in theirs.splitlines() if "bits per dimension" in line]
    assert bits and all(ours.count(line) == 1 for line in bits)


# Ends


FLAGS = "--preset quick --run-dir run --train.batch-size 4 --train.sample-steps 2 --train.log-every 1 --model.dim 8 "
FLAGS += "--model.init-dim 8 --model.dim-mults 1 --model.no-use-convnext --model.resnet-block-groups 4 --model.patch-size 2"


def children(process):
    """The process ids of msrun's scheduler, ranks and their logs' tails."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def read(pid, name):
    return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")


@pytest.fixture
def train_long(tmp_path):
    """A function that trains with the train command on two ranks until they have made some steps of many: (msrun, process id
    of rank 1)."""
    started = []

    def train(*flags):
        process = start(tmp_path, 2, HERE.parent / "train.py", *FLAGS.split(), "--train.total-steps", 100_000, *flags)
        started.append(process)
        until = time.monotonic() + 300
        while len(metrics(tmp_path / "run") if (tmp_path / "run/metrics.jsonl").exists() else ()) < 5:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log.txt").read_text()
            time.sleep(0.5)
        workers = [pid for pid in children(process) if b"MS_ROLE=MS_WORKER" in read(pid, "environ")]
        ranks = [pid for pid in workers if b"RANK_ID=1" in read(pid, "environ") and b"--preset" in read(pid, "cmdline")]
        assert len(ranks) == 1
        return process, ranks[0]

    yield train
    for process in started:
        if process.poll() is None:
            for pid in [*children(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def test_a_signal_to_one_rank_stops_all(tmp_path, train_long):
    process, rank_1 = train_long()
    os.kill(rank_1, signal.SIGTERM)
    assert process.wait(60) != 0
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(steps) == 1 and metrics(tmp_path / "run")[-1]["step"] == steps[0]
    assert f"stopped at step {steps[0]} of 100000" in (tmp_path / "log.txt").read_text()


def test_one_rank_killed_ends_all_and_the_run_resumes(tmp_path, train_long):
    process, rank_1 = train_long("--train.save-every", 2)
    os.kill(rank_1, signal.SIGKILL)
    assert process.wait(60) != 0
    assert "Error code: -9" in (tmp_path / "log.txt").read_text()
    step = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").iterdir())
    finish(start(tmp_path, 2, HERE.parent / "train.py", *FLAGS.split(), "--train.total-steps", step + 2))
    assert f"resuming at step {step}" in (tmp_path / "log.txt").read_text()
    assert metrics(tmp_path / "run")[-1]["step"] == step + 2


def test_bad_input_is_one_line(tmp_path):
    """And ends both ranks; 2,000 images are too few for two ranks at 1,500 each."""
    assert start(tmp_path, 2, HERE.parent / "train.py", "--preset", "quick", "--train.batch-size", 1500).wait(120) != 0
    text = (tmp_path / "log.txt").read_text()
    assert "error: 2000 images are too few for a step of 1500 x 2" in text and "worker_0.log" in text
    assert "UserError" not in text
