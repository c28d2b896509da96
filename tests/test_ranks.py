"""Several ranks train, stop, resume, sample and score as one process does: threads that stand for ranks, and, with --slow,
processes on the CPU that msrun starts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import PIXELS, checkpoint, metrics, picture, weights

from mindspore import communication

from ms_diffusion import runtime
from ms_diffusion.files import in_batches, load_or_compute, share_files
from ms_diffusion.randomness import RowsRandom, Stream, antithetic_timesteps, of_step
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import StopOfAnyRank

examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# What a step draws


@examples
@given(rows=st.integers(1, 12), world_size=st.integers(1, 60), step=st.integers(0, 9))
def test_draws_do_not_depend_on_the_number_of_ranks(rows, world_size, step):
    """Ranks draw what one draws with all their rows, of one block or several."""

    def draw(rank, size, n):
        rng = of_step(3, Stream.NOISE, step, n, rank, size)
        drawn = [antithetic_timesteps(rng, 100, n), rng.standard_normal((n, 2), np.float32), rng.random(n)]
        return [*drawn, rng.integers(0, 9, n), rng.choice(5, n, p=np.full(5, 0.2))]

    whole = draw(0, 1, rows * world_size)
    parts = zip(*(draw(rank, world_size, rows) for rank in range(world_size)), strict=True)
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)
    rng, n = np.random.default_rng((3, Stream.NOISE, 0, step)), min(rows * world_size, 256)
    np.testing.assert_array_equal(whole[0][:n], antithetic_timesteps(rng, 100, n))  # the numbers of runs made before
    np.testing.assert_array_equal(whole[1][:n], rng.standard_normal((n, 2), np.float32))


def test_any_rows_of_a_draw():
    rng, wanted = RowsRandom([(np.random.default_rng(5), 7, np.array([6, 2, 2]))]), np.array([6, 2, 2])
    plain = np.random.default_rng(5)
    np.testing.assert_array_equal(rng.random((3, 4)), plain.random((7, 4))[wanted])
    np.testing.assert_array_equal(rng.choice([-1.0, 1.0], (3, 2)), plain.choice([-1.0, 1.0], (7, 2))[wanted])


# Threads that stand for ranks


@pytest.fixture
def on_ranks(monkeypatch):
    """A function that calls fn(rank) on so many ranks: what each returns."""

    def run(world_size, fn):
        here, board, meet = threading.local(), [None] * world_size, threading.Barrier(world_size, timeout=20)

        def all_gather(numbers):
            assert numbers.dtype == np.int32
            board[here.rank] = numbers
            meet.wait()
            found = np.concatenate(board)
            meet.wait()
            return found

        def work(rank):
            here.rank = rank
            try:
                return fn(rank)
            except Exception:
                meet.abort()
                raise

        monkeypatch.setattr(runtime, "initialise_ranks", lambda: (here.rank, world_size))
        monkeypatch.setattr(runtime, "all_gather", all_gather)
        monkeypatch.setattr(runtime, "from_rank", lambda root, numbers: np.split(all_gather(numbers), world_size)[root])
        with ThreadPoolExecutor(world_size) as pool:
            ends = [pool.submit(work, rank) for rank in range(world_size)]
        first = [end.exception() for end in ends if not isinstance(end.exception(), threading.BrokenBarrierError)]
        assert first == [None] * world_size
        return [end.result() for end in ends]

    return run


@examples
@given(world_size=st.integers(1, 4), n=st.integers(1, 20), size=st.integers(1, 8))
def test_batches_are_shared(on_ranks, world_size, n, size):
    rows = np.random.default_rng(n).normal(size=(n, 3))
    seen = []

    def fn(x):
        assert runtime.ranks() == (0, 1) and len(x) <= size
        seen.append(len(x))
        (nested,) = in_batches(lambda x: [x.sum(1)], x, 2)  # of this rank alone
        return [np.float32(x), nested]

    for x, sums in on_ranks(world_size, lambda rank: in_batches(fn, rows, size)):
        np.testing.assert_array_equal(x, np.float32(rows))
        np.testing.assert_array_equal(sums, rows.sum(1))
    assert len(set(seen)) == 1 and sum(seen) < n + world_size * size


@examples
@given(size=st.integers(0, 50), world_size=st.integers(2, 3), root=st.integers(0, 1))
def test_bytes_of_one_rank_reach_all(on_ranks, monkeypatch, size, world_size, root):
    monkeypatch.setattr(runtime, "CHUNK", 3)
    data = np.random.default_rng(size).bytes(size)
    found = on_ranks(world_size, lambda rank: runtime.broadcast(data if rank == root else b"x" * rank, root))
    assert found == [data] * world_size


def test_a_cache_that_one_rank_misses_is_computed_by_all_and_written_by_rank_0(on_ranks, tmp_path):
    paths, computed = [tmp_path / "0.bin", tmp_path / "1.bin"], []

    def load(rank):
        arrays = load_or_compute(paths[rank], "key", {"x": (3,)}, lambda: computed.append(rank) or {"x": np.arange(3)})
        return arrays["x"].tolist()

    assert on_ranks(2, load) == [[0, 1, 2]] * 2 and sorted(computed) == [0, 1]
    assert paths[0].exists() and not paths[1].exists()
    on_ranks(2, load)
    assert len(computed) == 4
    shutil.copy(*paths)
    assert on_ranks(2, load) == [[0, 1, 2]] * 2 and len(computed) == 4


def test_files_of_rank_0_reach_other_disks(on_ranks, tmp_path):
    paths = [tmp_path / str(rank) / "a" for rank in range(3)]
    paths[0].parent.mkdir()
    paths[0].write_bytes(b"new")
    paths[2].parent.mkdir()
    paths[2].write_bytes(b"old")
    on_ranks(3, lambda rank: share_files([paths[rank]]))
    assert [path.read_bytes() for path in paths] == [b"new"] * 3


@pytest.mark.parametrize("asked", [0, 2])
def test_a_stop_of_any_rank_stops_all_at_one_step(on_ranks, asked):
    events = [threading.Event() for _ in range(3)]

    def train(rank):
        stopping = StopOfAnyRank(events[rank], 0)
        for step in range(1, 10_000):
            if step == 7 and rank == asked:
                events[rank].set()
            if stopping(step):
                return step
        return None

    steps = on_ranks(3, train)
    assert len(set(steps)) == 1 and 7 <= steps[0] <= 1010 and all(event.is_set() for event in events)


@pytest.mark.parametrize(("now", "size"), [(1, 24), (3, 8), (6, 4)])
def test_the_batch_of_all_ranks_is_kept_unless_the_user_changes_it(now, size):
    task = override(PIXELS, batch_size=8).task()
    task.rank, task.world_size = 0, now
    task.state = {"batch_size": 12, "world_size": 2, "config": task.config.to_record()}  # it ran on 3 ranks, then on 2
    task.keep_batch()
    assert task.config.train.batch_size == size
    task.config = replace(task.config, train=replace(task.config.train, batch_size=5))
    task.keep_batch()
    assert task.config.train.batch_size == 5


def test_ranks_that_do_not_divide_the_batch_are_refused():
    task = override(PIXELS, batch_size=8).task()
    task.rank, task.world_size = 0, 3
    task.state = {"batch_size": 8, "world_size": 2, "config": task.config.to_record()}
    with pytest.raises(UserError, match="16, cannot be divided by 3 ranks"):
        task.keep_batch()


@pytest.mark.parametrize(
    ("environment", "launched"),
    [({}, False), ({"RANK_SIZE": "1"}, False), ({"MS_WORKER_NUM": "4"}, True), ({"OMPI_COMM_WORLD_SIZE": "4"}, True)],
)
def test_who_is_launched_as_a_rank(monkeypatch, environment, launched):
    for name in ("RANK_SIZE", "MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialise = runtime.initialise_ranks.__wrapped__
    monkeypatch.setattr(communication, "init", lambda: None)
    monkeypatch.setattr(communication, "get_rank", lambda: 3)
    monkeypatch.setattr(communication, "get_group_size", lambda: 4)
    assert initialise() == ((3, 4) if launched else (0, 1))

    def fail():
        raise RuntimeError("no such host\n\n- C++ Call Stack")

    monkeypatch.setattr(communication, "init", fail)
    if launched:
        with pytest.raises(UserError, match="not connected: no such host$"):
            initialise()


# Processes

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
KINDS = "pixels classes fp16 importance points autoencoder actnorm latents".split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, ranks, *command, port=None):
    """The process of a program in `folder` on so many ranks; what it prints goes to log.txt there."""
    folder.mkdir(exist_ok=True, parents=True)
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "GLOG_v": "2"}  # msrun calls "python"
    launch = [sys.executable]
    if ranks > 1:
        launch = [BIN / "msrun", f"--worker_num={ranks}", f"--local_worker_num={ranks}", "--join=True"]
        launch += ["--master_addr=127.0.0.1", f"--master_port={port or free_port()}", f"--log_dir={folder / 'logs'}"]
        launch += ["--cluster_time_out=20"] if port else []
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(trained, kind):
    """Ten steps: both ranks have the same parameters bit for bit, and those of one process with both their batches."""
    two, one = trained
    first, second, alone = (np.load(path) for path in (two / f"{kind}-0.npz", two / f"{kind}-1.npz", one / f"{kind}-0.npz"))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert_close(dict(first), dict(alone), 2e-3 if kind == "fp16" else 1e-5)  # fp16: each rank rounds its gradients
    initial = weights(one / kind, 5)
    assert max(abs(alone[f"model.{name}"] - initial[name]).max() for name in initial) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_of_all_ranks(trained, kind):
    for ours, theirs in zip(*(metrics(folder / kind) for folder in trained), strict=True):
        assert ours == pytest.approx(theirs, rel=0.01 if kind == "fp16" else 1e-3)


@pytest.mark.slow
def test_all_ranks_skip_a_step_that_is_bad_on_one(tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    finish(job(folders[0], 2, "spoilt"), job(folders[1], 1, "spoilt"))
    arrays = [np.load(folder / f"spoilt-{rank}.npz") for folder, rank in ((folders[0], 0), (folders[0], 1), (folders[1], 0))]
    first, second, alone = map(dict, arrays)
    assert_close(first, second, 0)
    assert_close(first, alone, 1e-5)
    for folder in folders:
        assert [row.get("skipped") for row in metrics(folder / "spoilt")] == [1, None]


@pytest.mark.slow
def test_previews_are_those_of_one(trained):
    for kind in ("pixels", "classes", "autoencoder", "points"):
        ours, theirs = (picture(folder / kind / "samples/step-0000010.png")[0].astype(int) for folder in trained)
        assert ours.shape == theirs.shape and (abs(ours - theirs) <= 2).mean() > 0.99


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_commands_of_two_ranks_do_what_those_of_one_do(trained, tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder in folders:
        for kind in ("classes", "pixels"):
            shutil.copytree(trained[1] / kind, folder / kind)
    finish(job(folders[0], 2, "commands"), job(folders[1], 1, "commands"))
    for name in ("sample", "gif"):
        ours, theirs = (dict(np.load(folder / f"{name}.npz")) for folder in folders)
        for key in ("images", "labels"):
            np.testing.assert_array_equal(ours[key], theirs[key])
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


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path, train_long):
    process, rank_1 = train_long()
    os.kill(rank_1, signal.SIGTERM)
    assert process.wait(60) != 0
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert len(steps) == 1 and metrics(tmp_path / "run")[-1]["step"] == steps[0]
    assert f"stopped at step {steps[0]} of 100000" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_one_rank_killed_ends_all_and_the_run_resumes(tmp_path, train_long):
    process, rank_1 = train_long("--train.save-every", 2)
    os.kill(rank_1, signal.SIGKILL)
    assert process.wait(60) != 0
    assert "Error code: -9" in (tmp_path / "log.txt").read_text()
    step = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    finish(start(tmp_path, 2, HERE.parent / "train.py", *FLAGS.split(), "--train.total-steps", step + 2))
    assert f"resuming at step {step}" in (tmp_path / "log.txt").read_text()
    assert metrics(tmp_path / "run")[-1]["step"] == step + 2


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path):
    """And ends both ranks; 2,000 images are too few for two ranks at 1,500 each."""
    assert start(tmp_path, 2, HERE.parent / "train.py", "--preset", "quick", "--train.batch-size", 1500).wait(120) != 0
    text = (tmp_path / "log.txt").read_text()
    assert "error: 2000 images are too few for a step of 1500 x 2" in text and "worker_0.log" in text
    assert "UserError" not in text


@pytest.mark.slow
def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start(tmp_path, 2, HERE.parent / "train.py", "--preset", "quick", port=port)
        assert process.wait(300) != 0
    text = (tmp_path / "log.txt").read_text()
    assert f"error: the ranks are not connected: not all have started, or another program has port {port}" in text
    assert "UserError" not in text
