"""ModelArts: data and runs in OBS, jobs that start again on another machine, flags of the platform. OBS is a folder here."""

import contextlib
import fcntl
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from runs import assert_refused, call, checkpoint, metrics, tree

from ms_diffusion import runtime
from ms_diffusion.commands import modelarts, train, transfer
from ms_diffusion.commands.modelarts import Uploads, check_writable, restore, use_data
from ms_diffusion.commands.parse import parse, split_flags
from ms_diffusion.commands.sample import Args
from ms_diffusion.commands.transfer import Folder, fetch, locked, unpack
from ms_diffusion.files import write
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.presets import PRESETS

ROOT = Path(__file__).parents[1]
CONFIG = PRESETS["quick"]
OUT = "obs://bucket/out"
ALL = 10**9  # calls of the stand-in that fail
FASHION = replace(CONFIG, data=replace(CONFIG.data, name="fashion-mnist"))
PICTURES = replace(CONFIG, data=replace(CONFIG.data, name="image-folder"))
POINTS = override(PRESETS["scurve"], **{"data.name": "points-file"})


@pytest.fixture(autouse=True)
def obs(tmp_path, monkeypatch):
    """moxing, whose buckets are folders below this one; the cache volume is a folder too."""
    monkeypatch.syspath_prepend(ROOT / "tests/stand_in")
    monkeypatch.setenv("STAND_IN_OBS", str(tmp_path / "obs"))
    monkeypatch.setattr(transfer, "WAITS", (0, 0, 0))
    monkeypatch.setattr(transfer, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "STOP", threading.Event())
    for folder in ("obs/bucket", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    yield tmp_path / "obs"
    for name in ("moxing", "moxing.file"):
        sys.modules.pop(name, None)


@pytest.fixture
def moxing(obs):
    return importlib.import_module("moxing.file")


def copies(moxing):
    """The addresses that were copied to since the last time."""
    found = [names[-1] for names in moxing.calls if names[0] == "copy" and ".write-test" not in names[-1]]
    moxing.calls.clear()
    return found


# A run's folder, without a network


def save(run, step, keep=3):
    """A checkpoint, as `Checkpoint.save` leaves it."""
    data = safetensors.numpy.save({"w": np.full(50, step, np.float32)})
    folder = run / f"checkpoints/step-{step:07d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(data)
    state = {"step": step, "sha256": {"model.safetensors": hashlib.sha256(data).hexdigest()}}
    (folder / "state.json").write_text(json.dumps(state))
    with open(run / "metrics.jsonl", "a") as f:
        f.write(f'{{"step": {step}, "loss": 1}}\n')
    for old in sorted((run / "checkpoints").iterdir())[:-keep]:
        shutil.rmtree(old)


def start(run, *steps, config=CONFIG):
    """A new run with these checkpoints."""
    (run / "first_stage").mkdir(parents=True)
    (run / "first_stage/state.json").write_text("{}")
    (run / "points.npz").write_bytes(b"points")
    (run / "config.json").write_text(json.dumps(config.to_record()))
    for step in steps:
        save(run, step)
    return run


def upload(run, url=OUT):
    uploads = Uploads(run, url, 10)
    uploads.upload()
    return uploads


def shown(folder):
    """The files of a folder that are not hidden."""
    return {str(name): content for name, content in tree(folder).items() if content is not None and str(name)[0] != "."}


def steps(folder):
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/state.json"))


# A job that starts again


@pytest.mark.parametrize("url", [OUT, "s3://bucket/out/", "local"])
def test_a_run_goes_on_where_only_its_train_url_is_left(tmp_path, obs, monkeypatch, moxing, url):
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path / "run", 2, 4)
    upload(run, url)
    assert shown(tmp_path / url if url == "local" else obs / "bucket/out") == shown(run)
    for name in ("first", "second"):  # the same on a machine that has the newest already, with nothing to fetch
        restore(tmp_path / "new", url, CONFIG)
        assert shown(tmp_path / "new") == shown(run), name
    assert all((tmp_path / "new" / name).exists() for name in ("metrics.jsonl", "points.npz", "first_stage/state.json"))
    copies(moxing)
    upload(tmp_path / "new", url)  # nothing is sent again
    upload(run, url)
    assert not copies(moxing)
    save(tmp_path / "new", 6)
    upload(tmp_path / "new", url)
    assert url == "local" or [name.split("/out/")[1].strip("/") for name in copies(moxing)] == [
        "metrics.jsonl",
        "checkpoints/step-0000006/model.safetensors",
        "checkpoints/step-0000006/state.json",
    ]
    restore(run, url, CONFIG)  # the first machine comes back
    assert steps(run) == [2, 4, 6] and shown(run) == shown(tmp_path / "new")


def test_the_further_run_is_taken(tmp_path, obs, capsys):
    upload(start(tmp_path / "a", 2, 4), "obs://bucket/a")
    upload(start(tmp_path / "b", 2, 4, 6), "obs://bucket/b/")
    run = tmp_path / "run"
    restore(run, "obs://bucket/none", CONFIG)
    assert not run.exists()
    restore(run, "obs://bucket/a/checkpoints/", CONFIG)  # the folder of the checkpoints will do
    assert steps(run) == [2, 4]
    restore(run, "obs://bucket/b", CONFIG)
    assert steps(run) == [2, 4, 6] and len(metrics(run)) == 3
    before = tree(run)
    restore(run, "obs://bucket/a", CONFIG)
    assert tree(run) == before
    restore(run, None, CONFIG)
    restore(run, str(run), CONFIG)
    assert tree(run) == before
    upload(start(tmp_path / "c"), "obs://bucket/c")  # a job that was stopped before its first checkpoint
    restore(tmp_path / "new", "obs://bucket/c", CONFIG)
    assert not steps(tmp_path / "new")


def test_a_partial_upload_is_not_taken(tmp_path, obs, capsys):
    run, out = start(tmp_path / "run", 2, 4, 6), obs / "bucket/out"
    upload(run)
    (checkpoint(out, 6) / "state.json").unlink()  # the upload was interrupted
    restore(tmp_path / "first", OUT, CONFIG)
    assert steps(tmp_path / "first") == [2, 4] and not checkpoint(tmp_path / "first", 6).exists()
    shutil.copy(checkpoint(run, 6) / "state.json", checkpoint(out, 6))
    start(tmp_path / "second" / f".fetch-{platform.node()}", 7)  # a process was killed while it fetched
    (checkpoint(out, 6) / "model.safetensors").write_bytes(b"half")
    (checkpoint(out, 4) / "model.safetensors").unlink()
    capsys.readouterr()
    restore(tmp_path / "second", OUT, CONFIG)
    assert steps(tmp_path / "second") == [2] and capsys.readouterr().err.count("warning: obs://") == 2
    save(tmp_path / "second", 3)
    upload(tmp_path / "second")
    assert steps(out) == [2, 3] and len(list((out / "checkpoints").glob("*/*"))) == 4  # the rest has been removed
    (checkpoint(out, 2) / "state.json").write_text("{}")
    (checkpoint(out, 3) / "state.json").write_text("{")
    with pytest.raises(UserError, match="no checkpoint in obs://bucket/out"):
        restore(tmp_path / "third", OUT, CONFIG)
    assert not shown(tmp_path / "third")


def test_another_run_in_obs_is_refused(tmp_path, obs):
    upload(start(tmp_path / "other", 2, config=override(CONFIG, seed=5)))
    before = tree(obs)
    with pytest.raises(UserError, match="obs://bucket/out holds a run with another seed: use another address"):
        restore(tmp_path / "run", OUT, CONFIG)
    assert not tree(tmp_path / "run") and tree(obs) == before


def test_a_run_in_obs_that_cannot_be_fetched_does_not_start_anew(tmp_path, obs, moxing, monkeypatch):
    upload(start(tmp_path / "old", 2, 4))
    moxing.counts.clear()
    monkeypatch.setattr(moxing, "failures", 1)
    restore(tmp_path / "run", OUT, CONFIG)
    assert shown(tmp_path / "run") == shown(tmp_path / "old")
    monkeypatch.setattr(moxing, "failures", ALL)
    with pytest.raises(UserError, match="obs://bucket/out cannot be accessed: stat:503 of exists in the stand-in$"):
        restore(tmp_path / "new", OUT, CONFIG)
    assert not (tmp_path / "new").exists()


# Uploads


def test_the_order_of_an_upload_and_what_is_deleted_there(tmp_path, obs, moxing):
    run = start(tmp_path / "run", 2, 4, 6)
    uploads = upload(run)
    names = [name.removeprefix(f"{OUT}/") for name in copies(moxing)]
    others = [name for name in names if not name.startswith("checkpoints")]
    assert names[: len(others)] == others and others[-1] == "first_stage/state.json"
    assert [(name[23], name.endswith("state.json")) for name in names[len(others) :]] == [
        *[("6", False), ("6", True), ("4", False), ("4", True), ("2", False), ("2", True)]
    ]
    (obs / "bucket/out/log.txt").write_text("of the platform")
    for step in (8, 10):
        save(run, step)
    uploads.upload()
    removed = [names[1] for names in moxing.calls if names[0] == "remove"]
    assert [name.endswith("state.json") for name in removed] == [True] * 2 + [False] * 2
    assert steps(obs / "bucket/out") == [6, 8, 10] and len(list((obs / "bucket/out/checkpoints").glob("*/*"))) == 6
    assert shown(obs / "bucket/out") == shown(run) | {"log.txt": b"of the platform"}
    copies(moxing)
    uploads.upload()
    assert not moxing.calls  # not even a question
    upload(run)
    assert not copies(moxing)  # nor by another process on this machine
    (obs / "bucket/out/metrics.jsonl").unlink()
    upload(run)
    assert copies(moxing) == [f"{OUT}/metrics.jsonl"]


@pytest.fixture
def gate(moxing, monkeypatch):
    """Copies wait until this event is set."""
    copy, gate = moxing.copy, threading.Event()
    monkeypatch.setattr(moxing, "copy", lambda *names: gate.wait(10) and copy(*names))
    yield gate
    gate.set()


def test_training_does_not_wait_for_uploads_but_the_end_does(tmp_path, obs, moxing, gate, monkeypatch, capsys):
    """As at SIGTERM: the last checkpoint is saved while an upload is being made."""
    run = start(tmp_path / "run", 2)
    uploads = Uploads(run, OUT, 10)
    uploads.ask(run)
    save(run, 4)
    uploads.ask(run)
    assert not tree(obs / "bucket")
    join = uploads.thread.join
    monkeypatch.setattr(uploads.thread, "join", lambda seconds: (gate.set(), join(seconds)))
    assert uploads.finish() and shown(obs / "bucket/out") == shown(run)
    sent = [name for name in copies(moxing) if "/checkpoints/" in name]
    assert "step-0000004" in sent[0] and len(sent) == 4  # the last one does not wait for the one before
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_uploads_between_checkpoints(tmp_path, obs):
    run = start(tmp_path / "run", 2)
    uploads = Uploads(run, OUT, 0.02 / 60)
    uploads.ask(run)
    (run / "metrics.jsonl").write_text("longer")
    there, limit = obs / "bucket/out/metrics.jsonl", time.monotonic() + 10
    while not (there.exists() and there.read_text() == "longer") and time.monotonic() < limit:
        time.sleep(0.01)
    assert there.read_text() == "longer" and uploads.finish()


def test_a_failing_upload_does_not_end_training(tmp_path, obs, moxing, monkeypatch, capsys):
    run = start(tmp_path / "run", 2)
    monkeypatch.setattr(moxing, "failures", ALL)
    uploads = Uploads(run, OUT, 0.01 / 60)
    uploads.ask(run)
    limit = time.monotonic() + 10
    while len(moxing.calls) < 20 and time.monotonic() < limit:  # several uploads, of four attempts each
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: obs://bucket/out") and "stat:503" in lines[0]
    moxing.counts.clear()
    monkeypatch.setattr(moxing, "failures", 1)
    assert uploads.finish() and shown(obs / "bucket/out") == shown(run)
    assert not capsys.readouterr().err

    save(run, 4)
    monkeypatch.setattr(moxing, "failures", ALL)
    uploads = Uploads(run, OUT, 10)
    uploads.ask(run)
    assert not uploads.finish()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and str(run) in lines[-1] and "stat:503" in lines[-1]


def test_an_upload_that_never_ends(tmp_path, gate, monkeypatch, capsys):
    monkeypatch.setattr(modelarts, "PATIENCE", 0.05)
    run = start(tmp_path / "run", 2)
    uploads = Uploads(run, OUT, 10)
    uploads.ask(run)
    assert not uploads.finish() and "error: " in capsys.readouterr().err
    gate.set()
    uploads.thread.join(10)


def test_a_checkpoint_that_is_deleted_during_its_upload(tmp_path, obs, moxing, monkeypatch):
    run, copy = start(tmp_path / "run", 2, 4), moxing.copy

    def rotate(source, target):
        if "step-0000002" in source:
            shutil.rmtree(checkpoint(run, 2), ignore_errors=True)
        copy(source, target)

    monkeypatch.setattr(moxing, "copy", rotate)
    uploads = upload(run)
    assert not [name for name in copies(moxing) if "step-0000002/state" in name]  # nobody waits for it
    uploads.upload()
    assert shown(obs / "bucket/out") == shown(run)


def test_uploads_of_nothing(tmp_path, moxing):
    for url in (None, str(tmp_path)):  # a run that is written to its train_url
        uploads = Uploads(tmp_path, url, 10)
        uploads.ask(tmp_path)
        assert uploads.finish() and not uploads.thread.ident
    assert Uploads(tmp_path, OUT, 10).finish()  # nothing was saved
    assert not moxing.calls and not (tmp_path / modelarts.RECORD).exists()


# The command


@pytest.fixture
def trains(monkeypatch):
    """A training of 3 checkpoints, two steps each, that continues; a step sets STOP if it is asked to."""
    stop_at = []

    def train_task(task, run_dir, device, stop, on_save):
        task.rank, task.state, task.run_dir = 0, None, run_dir
        if found := steps(run_dir):
            task.state = {"step": found[-1]}
        else:
            start(run_dir, config=task.config)
        step = task.start_step
        while step < 6 and not stop.is_set():
            step += 2
            save(run_dir, step)
            if step in stop_at:
                stop.set()
            on_save(run_dir)
        return step, run_dir / "samples/last.png" if step == 6 else None

    monkeypatch.setattr(train, "train_task", train_task)
    return stop_at


def test_a_job_that_is_preempted_and_started_again(tmp_path, obs, moxing, monkeypatch, trains):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moxing, "seconds", 0.005)
    monkeypatch.setattr(moxing, "failures", 1)
    trains.append(4)
    flags = ["--train_url", f"{OUT}/", "--num_gpus", "8", "--init_method=tcp://10.0.0.1:66"]
    command = ["train", "--device", "cpu", "--train.total-steps", 6, *flags]
    code, out, err = call(*command, "--run-dir", "first")
    assert code == 130 and "stopped at step 4 of 6" in out and "--num_gpus 8" in err
    assert steps(obs / "bucket/out") == [2, 4] and shown(obs / "bucket/out") == shown(tmp_path / "first")
    trains.clear()
    runtime.STOP.clear()
    code, out, err = call(*command, "--run-dir", "second")
    assert code == 0 and steps(tmp_path / "second") == [2, 4, 6] and shown(obs / "bucket/out") == shown(tmp_path / "second")
    assert [row["step"] for row in metrics(tmp_path / "second")] == [2, 4, 6]
    code, out, err = call(*command, "--run-dir", "third")  # of a finished run
    assert code == 0 and "third is finished" in out and shown(tmp_path / "third") == shown(tmp_path / "second")
    code, out, err = call(
        "train", "--run-dir", "fourth", "--ckpt_url", OUT, "--train_url", "obs://bucket/new", *command[1:5]
    )
    assert code == 0 and shown(obs / "bucket/new") == shown(tmp_path / "second")
    before = tree(obs)
    assert_refused(call(*command, "--run-dir", "fifth", "--train.seed", 7), "obs://bucket/out", "seed")
    assert tree(obs) == before


def test_the_exit_code_where_the_last_state_does_not_arrive(tmp_path, obs, moxing, monkeypatch, trains):
    check = modelarts.check_writable
    monkeypatch.setattr(modelarts, "check_writable", lambda url: (check(url), setattr(moxing, "failures", ALL)))
    monkeypatch.setattr(modelarts, "restore", lambda *_: None)
    code, out, err = call("train", "--run-dir", tmp_path / "run", "--train_url", OUT, "--train.total-steps", 6)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert steps(tmp_path / "run") == [2, 4, 6]


def test_a_local_train_url_is_the_run_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_record()))
    assert_refused(call("train", "--train_url", tmp_path, "--train.seed", 1), tmp_path, "seed")
    assert modelarts.output_folder(None) is modelarts.output_folder(OUT) is None
    assert modelarts.output_folder("local") == Path("local")


def test_bad_addresses_are_one_line_of_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    assert_refused(call("train", "--run-dir", tmp_path / "run", "--train_url", "/proc/nowhere/below"), "/proc/nowhere/below")
    assert_refused(call("train", "--data.name", "fashion-mnist", "--data_url", "obs://bucket/no"), "obs://bucket/no")
    assert_refused(call("train", "--train_url", OUT, "--upload-minutes", 0), "--upload-minutes")
    for url in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=str(url)):
            check_writable(str(url))
    for url in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(UserError, match=str(url)):
            use_data(FASHION, str(url))
    assert tree(tmp_path) == before
    for name in ("moxing", "moxing.file"):
        monkeypatch.setitem(sys.modules, name, None)
    for action in (fetch, check_writable, lambda url: restore(tmp_path, url, CONFIG)):
        with pytest.raises(UserError, match="obs://bucket/data needs moxing"):
            action("obs://bucket/data")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_preempted_during_an_upload(tmp_path, obs, ranks):
    """With a real network: SIGTERM, then the same command on a machine that has nothing."""
    net = "--preset scurve --model.dim 8 --model.depth 1 --data.num 200 --diffusion.num-timesteps 12 --train.sample-num 9"
    few = "--train.steps-per-call 1 --train.batch-size 32 --train.sample-steps 2 --train.log-every 10"
    start = [sys.executable, ROOT / "train.py"] if ranks == 1 else ["bash", ROOT / "docs/modelarts.sh"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/stand_in'}", "STAND_IN_SECONDS": "0.5"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"

    def job(machine, *flags):
        run = tmp_path / machine
        variables = {"XDG_CACHE_HOME": run, "MA_LOG_DIR": run, "MA_NUM_GPUS": ranks, "MASTER_PORT": 18245}
        command = [
            *start,
            "--run-dir",
            run / "run",
            *f"{net} {few} --device cpu --train_url {OUT} --num_gpus 2".split(),
            *flags,
        ]
        more = {"cwd": tmp_path, "env": env | {name: str(value) for name, value in variables.items()}}
        return run / "run", subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **more)

    (run, process), limit = (
        job("first", "--train.total-steps", "9999", "--train.save-every", "100"),
        time.monotonic() + 240,
    )
    try:
        while process.poll() is None and not steps(run) and time.monotonic() < limit:
            time.sleep(0.1)
        process.terminate()  # the upload of the first checkpoint takes seconds
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (130 if ranks == 1 else 1) and "all saved" in out, out + err
    assert shown(obs / "bucket/out") == shown(run)
    last = steps(run)[-1]
    run, process = job("second", "--train.total-steps", str(last + 5))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and f"resuming at step {last} of {last + 5}" in out, out + err
    assert steps(run)[-1] == last + 5 and shown(obs / "bucket/out") == shown(run)
    assert [row["step"] for row in metrics(run)] == sorted({*range(10, last + 6, 10), last + 5})


# Data


def fashion(folder):
    folder.mkdir(parents=True)
    for path in (ROOT / "ms_diffusion/data/fashion-mnist-mini").glob("*.gz"):
        shutil.copy(path, folder)


def pack(folder, archive, kind):
    shutil.make_archive(str(archive), kind, folder)


@pytest.mark.parametrize("where", ["obs://bucket/data", "local"])
@pytest.mark.parametrize("kind", ["folder", "nested", "zip", "gztar", "zip inside", "tar alone"])
def test_fashion_mnist_is_found(tmp_path, obs, where, kind):
    root = tmp_path / "local" if where == "local" else obs / "bucket/data"
    url = str(root) if where == "local" else where
    fashion(root / "fashion/raw" if kind == "nested" else root)
    if kind not in ("folder", "nested"):
        shutil.move(root, tmp_path / "files/fashion/raw")
        root.mkdir()
        pack(tmp_path / "files", root / "data", {"gztar": "gztar", "tar alone": "tar"}.get(kind, "zip"))
    if kind == "tar alone":
        url = f"{url.rstrip('/')}/data.tar"
    config, arrays = use_data(FASHION, url)
    assert arrays is None and where != "local" or "folder" not in kind or config.data.dir == url
    images, labels = config.task().load_data()
    assert images.shape == (2000, 28, 28, 1) and set(labels) == set(range(10))


def test_image_folders_and_points_are_found(tmp_path, obs, capsys):
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png", ".hidden/3.png", "__MACOSX/._1.png"):
        path = obs / "bucket/data/all/pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((28, 28), 9, np.uint8)).save(path)
    images, labels = use_data(PICTURES, "obs://bucket/data")[0].task().load_data()
    assert len(images) == 3 and list(labels) == [0, 0, 1]
    for name in ("cats", "dogs"):
        pack(obs / "bucket/data/all/pictures" / name, obs / "bucket/two" / name, "zip")
    images, labels = use_data(PICTURES, "obs://bucket/two")[0].task().load_data()
    assert len(images) == 3 and list(labels) == [0, 0, 1]
    told = obs / "bucket/told/all"
    (told / "images").mkdir(parents=True)
    Image.new("L", (28, 28)).save(told / "images/1.png")
    (told / "metadata.jsonl").write_text('{"file_name": "images/1.png", "label": "cat"}\n')
    assert use_data(PICTURES, "obs://bucket/told")[0].data.dir.endswith("/all")
    (obs / "bucket/p/deep").mkdir(parents=True)
    np.save(obs / "bucket/p/deep/x.npy", np.random.default_rng(0).random((50, 2)))
    for url in ("obs://bucket/p", "obs://bucket/p/deep/x.npy"):
        assert len(use_data(POINTS, url)[0].task().load_data()[0]) == 40
    config = use_data(CONFIG, "obs://bucket/data")[0]  # Fashion-MNIST's subset is in the package
    assert config == CONFIG and "note: --data-url is not read" in capsys.readouterr().err
    with pytest.raises(UserError, match="--data.name fashion-mnist"):
        use_data(FASHION, "obs://bucket/data")
    for name in ("a", "b"):
        fashion(obs / "bucket/both" / name)
    with pytest.raises(UserError, match=r"both/a|-a.*both/b|-b"):
        use_data(FASHION, "obs://bucket/both")


def test_arrays_are_used(tmp_path, obs, capsys):
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    (obs / "bucket/npz").mkdir()
    np.savez(obs / "bucket/npz/x.npz", images=images, labels=np.arange(30))
    for url in ("obs://bucket/npz", "obs://bucket/npz/x.npz", str(obs / "bucket/npz")):
        config, arrays = use_data(CONFIG, url)
        task = config.task(arrays)
        assert (config.data.name, task.shape) == ("arrays", (3, 32, 32))
        np.testing.assert_array_equal(task.load_data()[0], images)
        np.testing.assert_array_equal(task.load_data()[1], np.arange(30))
    np.savez(tmp_path / "points.npz", points=np.random.default_rng(0).random((50, 2)))
    config, arrays = use_data(PRESETS["scurve"], str(tmp_path / "points.npz"))
    assert len(config.task(arrays).load_data()[0]) == 40
    with pytest.raises(UserError, match="points"):
        use_data(PRESETS["scurve"], "obs://bucket/npz")
    with pytest.raises(UserError, match="images"):
        use_data(CONFIG, str(tmp_path / "points.npz"))
    np.savez(obs / "bucket/npz/y.npz", images=images)
    with pytest.raises(UserError, match=r"x\.npz and y\.npz"):
        use_data(CONFIG, "obs://bucket/npz")


def test_archives_that_lead_out_of_their_folder_are_refused(tmp_path, monkeypatch):
    def tar(archive, **fields):
        member = tarfile.TarInfo("x")
        member.size = 3
        for key, value in fields.items():
            setattr(member, key, value)
        with tarfile.open(tmp_path / archive, "w:gz") as packed:
            packed.addfile(member, io.BytesIO(b"abc"))

    def zipped(name, member, mode=0):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            info = zipfile.ZipInfo(member)
            info.external_attr = mode << 16
            packed.writestr(info, "/etc/passwd")

    zipped("up.zip", "a/../../x")
    zipped("absolute.zip", "/tmp/x")
    zipped("link.zip", "x", 0o120777)
    tar("up.tar.gz", name="../x")
    tar("link.tar.gz", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)
    tar("hard.tar.gz", type=tarfile.LNKTYPE, linkname="/etc/passwd", size=0)
    tar("device.tar.gz", type=tarfile.CHRTYPE, size=0)
    (tmp_path / "corrupt.zip").write_bytes(b"PK nothing")
    fashion(tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "half", "zip")
    (tmp_path / "half.zip").write_bytes((tmp_path / "half.zip").read_bytes().replace(b"\x1f\x8b\x08", b"abc", 1))
    before = tree(tmp_path)
    archives = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(archives) == 9
    for path in archives:
        with pytest.raises(UserError, match=path.name):
            unpack([path])
    after = {name: content for name, content in tree(tmp_path).items() if name.parts[:2] != ("cache", "modelarts")}
    assert after == before and not Path("/tmp/x").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_symlink()]
    pack(tmp_path / "files", tmp_path / "good", "zip")
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="GB"):
        unpack([tmp_path / "good.zip"])


def test_archives_that_would_unpack_to_more_than_there_is_are_refused(tmp_path):
    """Before it is unpacked or takes memory."""

    def tar(name, open_file, member, content):
        with open_file(tmp_path / name, "wb") as file:
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + content)

    huge = tarfile.TarInfo("x")
    huge.size = 8**11 - 1
    tar("huge.tar", open, huge, b"abc")
    tar("huge.tgz", gzip.open, huge, bytes(10**7))
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, 10**8
    tar("extended.tar.xz", lzma.open, extended, bytes(3 * 10**7))
    for name, kind in (("bzip2.zip", zipfile.ZIP_BZIP2), ("lzma.zip", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("x", bytes(10**7))
    with zipfile.ZipFile(tmp_path / "lie.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(10**7))
    lie = bytearray((tmp_path / "lie.zip").read_bytes())
    size = lie.rindex(b"PK\1\2") + 24
    lie[size : size + 4] = (10).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(lie)
    archives = [path for path in tmp_path.iterdir() if path.is_file()]
    tracemalloc.start()
    for path in archives:
        with pytest.raises(UserError, match=path.name) as e:
            unpack([path])
        assert "\n" not in str(e.value)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2e7 and len(archives) == 6
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 1e6


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"[" * 10**5, b'{"source": 1, "files": 3}', b'{"url": "obs://bucket/out", "sent": {"a": 3}}']
)
def test_records_of_copies_that_are_damaged(tmp_path, obs, moxing, content):
    """Everything is copied again."""
    run = start(tmp_path / "run", 2)
    (run / modelarts.RECORD).write_bytes(content)
    upload(run)
    assert shown(obs / "bucket/out").keys() == shown(run).keys()

    (obs / "bucket/data").mkdir()
    (obs / "bucket/data/a").write_text("one")
    folder = fetch("obs://bucket/data")
    folder.with_suffix(".json").write_bytes(content)
    assert (fetch("obs://bucket/data") / "a").read_text() == "one"


def test_data_are_copied_once_and_again_when_they_have_changed(tmp_path, obs, moxing, monkeypatch):
    data = obs / "bucket/data"
    (data / "below").mkdir(parents=True)
    (data / "a").write_text("one")
    (data / "below/b").write_text("two")
    (data / "empty").mkdir()
    monkeypatch.setattr(moxing, "failures", 1)
    folder = fetch("obs://bucket/data")
    assert shown(folder) == {"a": b"one", "below/b": b"two"} and len(copies(moxing)) >= 2
    assert fetch("obs://bucket/data/") == folder and not copies(moxing)
    time.sleep(0.02)
    (data / "a").write_text("ONE")  # of the same size
    assert (fetch("obs://bucket/data") / "a").read_text() == "ONE"
    (folder / "below/b").write_text("t")  # damaged here
    assert (fetch("obs://bucket/data") / "below/b").read_text() == "two"
    (folder / "latents.npy").write_text("a cache")
    copies(moxing)
    assert (fetch("obs://bucket/data") / "latents.npy").exists() and not copies(moxing)
    (data / "a").unlink()
    assert shown(fetch("obs://bucket/data")) == {"below/b": b"two"}
    moxing.failures = ALL
    with pytest.raises(UserError, match="stat:503"):
        fetch("obs://bucket/data")
    assert fetch(str(tmp_path)) == tmp_path
    archive = tmp_path / "x.zip"
    pack(data, tmp_path / "x", "zip")
    assert (unpack([archive]) / "x/below/b").read_text() == "two"
    (data / "below/b").write_text("TWO")
    pack(data, tmp_path / "x", "zip")
    assert (unpack([archive]) / "x/below/b").read_text() == "TWO"


def test_a_copy_that_is_cut_is_made_again(tmp_path, obs, moxing, monkeypatch):
    (obs / "bucket/a").write_text("whole")
    copy, left = moxing.copy, [2]

    def cut(source, target):
        copy(source, target)
        left[0] -= 1
        if left[0] >= 0:
            moxing.local(target).write_text("wh")

    monkeypatch.setattr(moxing, "copy", cut)
    assert fetch("obs://bucket/a").read_text() == "whole"
    left[0] = 1
    Folder("obs://bucket").put(tmp_path / "cache/modelarts" / fetch("obs://bucket/a"), "b")
    assert (obs / "bucket/b").read_text() == "whole"
    left[0] = 9
    with pytest.raises(UserError, match="bytes"):
        Folder("obs://bucket").put(obs / "bucket/a", "c")


# Several processes on a machine

FETCH = """
import sys
from ms_diffusion import runtime
from ms_diffusion.commands import transfer
transfer.CACHE, transfer.WAITS = sys.argv[1], ()
sys.exit(runtime.run_program(lambda argv: print(transfer.fetch(argv[0])) or 0, sys.argv[2:]))
"""


def processes(tmp_path, count, **env):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/stand_in'}",
        "STAND_IN_LOG": str(tmp_path / "log"),
        **env,
    }
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), "obs://bucket/data"]
    started = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(count)]
    return [(*process.communicate(timeout=60), process.returncode) for process in started]


def test_one_copies_for_all_that_wait(tmp_path, obs, moxing, gate, monkeypatch):
    for name in "abc":
        write(obs / "bucket/data" / name, lambda file, name=name: file.write(name.encode()))
    waiting, sleep, found, limit = set(), time.sleep, [], time.monotonic() + 10
    monkeypatch.setattr(time, "sleep", lambda seconds: (waiting.add(threading.get_ident()), sleep(0.01)))
    threads = [threading.Thread(target=lambda: found.append(fetch("obs://bucket/data"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(waiting) < 2 and time.monotonic() < limit:
        sleep(0.01)
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(set(found)) == 1 and len(found) == 3 and shown(found[0]) == {name: name.encode() for name in "abc"}
    names = [names[0] for names in moxing.calls]
    assert names.count("copy") == 3 and names.count("list_directory") == 1


@pytest.mark.slow
def test_one_process_of_a_machine_copies_for_all(tmp_path, obs):
    for name in "abc":
        (obs / "bucket/data").mkdir(exist_ok=True)
        (obs / "bucket/data" / name).write_text(name)
    ends = processes(tmp_path, 2, STAND_IN_SECONDS="0.3")
    assert {end[2] for end in ends} == {0} and len({end[0] for end in ends}) == 1, ends
    assert (tmp_path / "log").read_text().count("copy") == 3
    assert shown(Path(ends[0][0].strip())) == {name: name.encode() for name in "abc"}


def test_where_one_process_fails_the_others_do_not_wait(tmp_path, monkeypatch):
    """The failure of one that they waited for is theirs; that of an earlier job is not."""
    lock, inside, waiting, sleep, entered = tmp_path / "lock", threading.Event(), threading.Event(), time.sleep, []

    def fail():
        with contextlib.suppress(UserError), locked(lock):
            inside.set()
            waiting.wait(10)
            sleep(0.05)
            raise UserError("no such bucket")

    monkeypatch.setattr(time, "sleep", lambda seconds: (waiting.set(), sleep(0.01)))
    thread = threading.Thread(target=fail)
    thread.start()
    inside.wait(10)
    with pytest.raises(UserError, match="no such bucket"), locked(lock):
        entered.append("too early")
    thread.join()
    sleep(0.05)
    with locked(lock):
        entered.append("later")
    assert entered == ["later"]


def test_a_waiting_process_heeds_sigterm_and_a_time_limit(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(transfer, "PATIENCE", 0.1)
        with pytest.raises(UserError, match="does not get on"), locked(tmp_path / "lock"):
            pass
        monkeypatch.setattr(transfer, "PATIENCE", 60)
        threading.Timer(0.05, runtime.STOP.set).start()
        with pytest.raises(SystemExit) as end, locked(tmp_path / "lock"):
            pass
        assert end.value.code == 130 and "stopped" in capsys.readouterr().err
    with pytest.raises(SystemExit), locked(tmp_path / "lock") as progress:
        progress()  # so does the one that copies


# Flags of the platform


@dataclass
class Section:
    size: int = 3


@dataclass
class Flags:
    data: Section = field(default_factory=Section)
    data_url: str | None = None


PLATFORM = (
    "--num_gpus -1 --init_method tcp://10.0.0.1:6666 --num_gpus -1 --master_ip=10.0.0.1 --s3_key= --x -0.5 --y=-1.5 --z"
)


def test_flags_of_the_platform_are_ignored_only_there(monkeypatch, capsys):
    for name in ("MA_JOB_DIR", "MA_NUM_HOSTS", "MA_NUM_GPUS"):
        monkeypatch.delenv(name, raising=False)
    argv = [*PLATFORM.split(), "--data.size", "4"]
    with pytest.raises(UserError, match="--num_gpus"):
        parse(Flags, argv)
    assert parse(Flags, [*argv, "--data_url", "x"]) == Flags(Section(4), "x")
    monkeypatch.setenv("MA_JOB_DIR", "/job")
    capsys.readouterr()
    assert parse(Flags, argv) == Flags(Section(4))
    assert PLATFORM in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--data\.siz\b.*--data\.size"):  # a flag of ours is never the platform's
        parse(Flags, [*argv, "--data.siz=8"])


def test_values_of_the_platform_are_not_taken_for_ours():
    argv = "--num_gpus 8 runs/mine --num 3 --x=-1 --y -2 4 --z".split()
    assert split_flags(argv, {"--num_gpus", "--x", "--y", "--z"}) == (
        "runs/mine --num 3 4".split(),
        "--num_gpus 8 --x=-1 --y -2 --z".split(),
    )
    assert parse(Args, ["--num_gpus", "8", "--data_url", "x"]).run is None
