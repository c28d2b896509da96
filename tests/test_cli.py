"""train.py and sample.py as a user meets them: what they leave, resuming, Ctrl-C, ModelArts, and bad input."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import mindspore as ms
from mindspore import Tensor

import sample
import train
from ms_diffusion import runtime
from ms_diffusion.commands import modelarts
from ms_diffusion.commands import parse as cli
from ms_diffusion.runtime import UserError
from ms_diffusion.training.presets import PRESETS, Config
from ms_diffusion.training.tasks import everything as tasks

ROOT = Path(__file__).parents[1]
STEPS = 6
MODEL = "--model.dim 8 --model.init-dim 8 --model.dim-mults 1 --model.resnet-block-groups 4".split()
TINY = [*MODEL, *"--train.batch-size 8 --train.sample-num 4 --train.sample-steps 2 --train.log-every 1".split()]
SHORT = [*TINY, *f"--train.total-steps {STEPS} --train.save-every 2 --train.sample-every {STEPS}".split()]
LONG = [*TINY, *"--train.total-steps 100000 --train.save-every 100000 --train.sample-every 100000".split()]


def start(script, *args, cwd, **options):
    """The program in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process, timeout=300):
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def call(monkeypatch, capsys):
    """The program in this process: (exit code, stdout, stderr)."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        monkeypatch.setattr(train, "STOP", threading.Event())
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runtime.run_program(module.main)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6, and what its command said; leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", finish(start("train.py", "--run-dir", "run", *SHORT, cwd=folder))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return shutil.copytree(trained[0], tmp_path / "run")


def checkpoint(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:07d}"


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tree(folder):
    """Every file below a folder, and what is in it."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def picture(path):
    with Image.open(path) as image:
        image.load()
        return image.size, np.asarray(image), getattr(image, "n_frames", 1)


# A run from end to end


def test_train_leaves_a_run_folder(trained):
    run, (code, out, err) = trained
    assert code == 0 and "Traceback" not in err and "arning" not in err
    names = {str(name) for name, data in tree(run).items() if data is not None}
    weights = {f"{name}.safetensors" for name in ("model", "ema", "optimizer")}
    files = {f"checkpoints/step-000000{step}/{name}" for step in (2, 4, 6) for name in weights | {"state.json"}}
    assert names == files | {"config.json", "metrics.jsonl", "loss.png", "samples/step-0000006.png"}

    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(list(row.values())).all() and row["img_per_s"] > 0 and row["loss"] > 0 for row in rows)
    assert rows[-1]["epoch"] == STEPS * 8 / 2000
    schedule = [PRESETS["quick"].train.lr * step / 51 for step in range(1, 7)]  # its warm-up takes 50 steps
    np.testing.assert_allclose([row["lr"] for row in rows], schedule, rtol=1e-5)

    for step in (2, 4, 6):
        state = json.loads((checkpoint(run, step) / "state.json").read_text())
        assert state["step"] == step and state["seed"] == 0 and state["epoch"] == 0
        found = {name: hashlib.sha256((checkpoint(run, step) / name).read_bytes()).hexdigest() for name in weights}
        assert state["sha256"] == found

    assert picture(run / "samples/step-0000006.png")[0] == (2 * (2 * 30 + 2),) * 2  # 2 x 2 images, gaps, twice as large
    for line in ("samples     run/samples/step-0000006.png", "loss curve  run/loss.png", "python sample.py run"):
        assert line in out


def test_the_record_of_a_run_comes_back(trained):
    config = Config.from_json(trained[0] / "config.json")
    assert config == train.parse_args(SHORT).config
    assert (config.model.dim, config.model.dim_mults, config.train.total_steps) == (8, (1,), 6)
    assert config.data.name == "fashion-mnist-mini"


def test_a_resumed_run_equals_an_uninterrupted_one(trained, run):
    for step in (4, 6):
        shutil.rmtree(checkpoint(run, step))
    shutil.rmtree(run / "samples")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # as a crash leaves it
    code, out, err = finish(start("train.py", "--run-dir", "run", *SHORT, cwd=run.parent))
    assert code == 0 and "Traceback" not in err
    assert "resuming at step 2 of 6 in run" in out

    for name in ("model", "ema", "optimizer"):
        a, b = (safetensors.numpy.load_file(checkpoint(r, 6) / f"{name}.safetensors") for r in (trained[0], run))
        assert a.keys() == b.keys() and a
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    for a, b in zip(metrics(trained[0]), metrics(run), strict=True):
        assert a | {"img_per_s": 0} == b | {"img_per_s": 0}
    assert (run / "samples/step-0000006.png").read_bytes() == (trained[0] / "samples/step-0000006.png").read_bytes()


def test_a_finished_run_says_so(run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(run)
    code, out, err = call(train, "--run-dir", "run", *SHORT)
    assert code == 0 and "run is finished: raise --train.total-steps" in out
    assert tree(run) == before


# Ctrl-C


def stop_after_a_step(run_dir, number, rows=0):
    """Train on and send the signal as soon as metrics.jsonl has more than so many rows."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background job would ignore it
    try:
        process = start("train.py", "--run-dir", run_dir.name, *LONG, cwd=run_dir.parent)
    finally:
        signal.signal(signal.SIGINT, before)
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and not (path.exists() and len(path.read_bytes().splitlines()) > rows)
    ):
        time.sleep(0.1)
    process.send_signal(number)
    return finish(process, 60)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("interrupted") / "run"
    return run, stop_after_a_step(run, signal.SIGINT)


def assert_stopped(run, code, out, err):
    assert code == 130 and "Traceback" not in err
    last = max(checkpoint(run, 0).parent.iterdir())
    step = json.loads((last / "state.json").read_text())["step"]
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, step + 1))  # saved where it stopped, nothing lost in between
    assert f"stopped at step {step} of 100000, all saved. To go on: python " in out
    assert " ".join(["--run-dir run", *LONG]) in out
    assert (run / "loss.png").exists()
    return step


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted):
    run, end = interrupted
    assert assert_stopped(run, *end) >= 1


def test_sigterm_does_the_same_to_a_resumed_run(interrupted):
    run = interrupted[0]
    rows = metrics(run)
    code, out, err = stop_after_a_step(run, signal.SIGTERM, len(rows))
    assert f"resuming at step {len(rows)} of 100000" in out
    assert assert_stopped(run, code, out, err) > len(rows)
    assert metrics(run)[: len(rows)] == rows


# Scores while it trains

SCORED = [*TINY, *"--train.total-steps 6 --train.save-every 2 --train.sample-every 6".split()]
SCORED += "--train.score-every 2 --train.score-num 130 --diffusion.num_timesteps 20".split()


def kept(run_dir):
    """step -> the FID of each checkpoint's state."""
    folders = sorted((run_dir / "checkpoints").iterdir())
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    return {state["step"]: state["fid"] for state in states}


def test_a_run_with_scores_and_its_resumption(call, tmp_path):
    whole = tmp_path / "whole"
    code, out, err = call(train, "--run-dir", whole, *SCORED)
    assert code == 0 and "Traceback" not in err, err
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    scores = {row["step"]: row["fid"] for row in rows if "fid" in row}
    assert all(set(row) == {"step", "fid"} for row in rows if "fid" in row)
    assert list(scores) == [2, 4, 6] and np.isfinite(list(scores.values())).all() and min(scores.values()) > 1
    assert kept(whole) == scores
    best = min(scores, key=scores.get)
    assert f"best FID    {scores[best]:.2f}, in {checkpoint(whole, best)}" in out
    pixels = picture(whole / "loss.png")[1][..., :3].reshape(-1, 3)
    assert (pixels == (44, 160, 44)).all(1).sum() > 50  # their curve

    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(checkpoint(run, 6))
    code, out, err = call(train, "--run-dir", run, *SCORED)
    assert code == 0 and f"resuming at step 4 of 6 in {run}" in out, err
    for a, b in zip(metrics(whole), metrics(run), strict=True):  # no score comes twice
        assert a | {"img_per_s": 0} == b | {"img_per_s": 0}
    assert kept(run) == scores
    for name in ("model", "ema", "optimizer"):
        a, b = (safetensors.numpy.load_file(checkpoint(r, 6) / f"{name}.safetensors") for r in (whole, run))
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)

    plain = tmp_path / "plain"  # a score changes nothing of the training
    assert call(train, "--run-dir", plain, *SCORED, "--train.score-every", 0)[0] == 0
    assert (checkpoint(plain, 6) / "model.safetensors").read_bytes() == (
        checkpoint(whole, 6) / "model.safetensors"
    ).read_bytes()
    assert set(kept(plain).values()) == {None}


# sample.py


def draw(call, run, tmp_path, *args, num=5, name="images"):
    """uint8 images (N, H, W, C) that sample.py draws from a run in 2 steps."""
    where = ["--out", tmp_path / "out.png", "--npz", tmp_path / f"{name}.npz"]
    code, out, err = call(sample, run, "--num", num, "--steps", 2, *where, *args)
    assert code == 0, err
    return np.load(tmp_path / f"{name}.npz")["images"]


def test_sample_as_a_command(trained, tmp_path):
    code, out, err = finish(
        start("sample.py", trained[0], "--num", 3, "--steps", 4, "--out", "a/b.png", "--gif", "c.gif", cwd=tmp_path)
    )
    assert code == 0 and "Traceback" not in err
    assert "3 images of step 6 in " in out and "a/b.png, c.gif" in out
    assert picture(tmp_path / "a/b.png")[0] == (2 * (2 * 30 + 2),) * 2
    assert picture(tmp_path / "c.gif")[2] == 4
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["b.png", "c.gif"]


def test_sample_writes_raw_images_by_default_beside_the_run(run, call, tmp_path):
    code, out, _ = call(sample, run, "--num", 5, "--steps", 2, "--npz", tmp_path / "x.npz")
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.dtype == np.uint8 and images.shape == (5, 28, 28, 1)
    assert len({image.tobytes() for image in images}) == 5
    sheet = picture(run / "sample.png")[1][::2, ::2]  # 3 columns, gaps of 2
    np.testing.assert_array_equal(sheet[2:30, 32:60], images[1, ..., 0])
    np.testing.assert_array_equal(sheet[32:60, 2:30], images[3, ..., 0])


def test_images_do_not_depend_on_batch_size_and_number(trained, call, tmp_path):
    whole = draw(call, trained[0], tmp_path, "--batch-size", 5).astype(int)
    for args, num in ((["--batch-size", 2], 5), (["--batch-size", 1], 2)):
        assert np.abs(draw(call, trained[0], tmp_path, *args, num=num) - whole[:num]).max() <= 1
    assert np.abs(draw(call, trained[0], tmp_path, "--seed", 1) - whole).max() > 1


def test_samplers_weights_and_checkpoints(trained, call, tmp_path):
    run = trained[0]
    images = draw(call, run, tmp_path)
    for same in (checkpoint(run, 6), checkpoint(run, 6) / "ema.safetensors"):
        np.testing.assert_array_equal(draw(call, same, tmp_path), images)
    for other in ([checkpoint(run, 2)], [run, "--weights", "model"], [run, "--sampler", "ddpm"]):
        assert (draw(call, other[0], tmp_path, *other[1:]) != images).any()


# ModelArts

MOXING = """
import shutil
from pathlib import Path


def local(path):
    return Path(path.replace("obs://", {bucket!r} + "/"))


class file:
    @staticmethod
    def copy_parallel(source, target):  # folders alone, as the real one
        assert local(source).is_dir()
        shutil.copytree(local(source), local(target), dirs_exist_ok=True)

    @staticmethod
    def copy(source, target):
        local(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local(source), local(target))
"""


@pytest.fixture
def obs(tmp_path, monkeypatch):
    """The folder behind obs://, and the cache volume in place of /cache."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python/moxing.py").write_text(MOXING.format(bucket=str(tmp_path / "obs")))
    monkeypatch.syspath_prepend(tmp_path / "python")
    monkeypatch.setattr(modelarts.fetch, "__defaults__", (str(tmp_path / "cache"),))
    (tmp_path / "obs/bucket/data").mkdir(parents=True)
    (tmp_path / "obs/bucket/data/file").write_text("data")
    yield tmp_path / "obs"
    sys.modules.pop("moxing", None)


def test_fetch_and_publish(obs, tmp_path):
    folder = modelarts.fetch("obs://bucket/data/")
    assert folder == tmp_path / "cache/bucket_data" and (folder / "file").read_text() == "data"
    assert modelarts.fetch("some/where") == Path("some/where")
    modelarts.publish(folder, "obs://bucket/new")
    modelarts.publish(folder / "file", "obs://bucket/one/file")
    modelarts.publish(folder, None)
    modelarts.publish(folder, str(tmp_path / "local"))
    assert (obs / "bucket/new/file").read_text() == (obs / "bucket/one/file").read_text() == "data"
    assert not (tmp_path / "local").exists()


def test_only_the_first_process_of_a_machine_fetches(obs, tmp_path, monkeypatch):
    monkeypatch.setenv("DEVICE_ID", "3")
    waited = []

    def first_process(seconds):  # it copies while the other sleeps
        waited.append(seconds)
        monkeypatch.setenv("DEVICE_ID", "0")
        modelarts.fetch("obs://bucket/data")

    monkeypatch.setattr(time, "sleep", first_process)
    assert (modelarts.fetch("obs://bucket/data") / "file").read_text() == "data"
    assert len(waited) == 1


def test_without_moxing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "moxing", None)
    code, _, err = call(train, "--data_url", "obs://bucket/data")
    assert code == 2 and "moxing" in err and err.count("\n") == 1


def test_local_urls_and_flags_of_the_platform(run, call):
    code, out, err = call(train, "--data_url", run.parent, "--train_url", run, "--num_gpus", "8", *SHORT)
    assert code == 0 and f"{run} is finished" in out
    assert "passing over arguments of the platform: --num_gpus 8" in err


def test_obs_urls(run, obs, call, tmp_path):
    urls = ["--data_url", "obs://bucket/data", "--train_url", "obs://bucket/out"]
    code, _, err = call(train, "--run_dir", run, *urls, *SHORT)
    assert code == 0, err
    assert tree(obs / "bucket/out") == tree(run)
    assert (tmp_path / "cache/bucket_data/file").exists()

    urls = ["--data_url", "obs://bucket/out", "--train_url", "obs://bucket/images"]
    code, _, err = call(sample, *urls, "--num", 2, "--steps", 2, "--gif", tmp_path / "a.gif")
    assert code == 0, err
    assert sorted(p.name for p in (obs / "bucket/images").iterdir()) == ["a.gif", "sample.png"]


def test_sample_to_a_local_train_url_that_is_new(trained, call, tmp_path):
    code, _, _ = call(sample, "--data_url", trained[0], "--train_url", tmp_path / "new", "--num", 2, "--steps", 2)
    assert code == 0 and (tmp_path / "new/sample.png").exists()


@dataclass
class Flags:
    size: int = 3
    data_url: str | None = None


def test_flags_of_the_platform_pass_only_there(monkeypatch, capsys):
    for name in ("MA_JOB_DIR", "MA_NUM_HOSTS", "MA_NUM_GPUS"):
        monkeypatch.delenv(name, raising=False)
    argv = ["--size", "4", "--num_gpus", "8"]
    with pytest.raises(UserError, match="unknown argument --num_gpus"):
        cli.parse(Flags, argv=argv)
    monkeypatch.setenv("MA_JOB_DIR", "/job")
    assert cli.parse(Flags, argv=argv) == Flags(4)
    assert capsys.readouterr().err == "passing over arguments of the platform: --num_gpus 8\n"
    with pytest.raises(UserError, match="unknown argument --data.siz"):
        cli.parse(Flags, argv=["--data.siz", "8"])


# The command line


def test_flags_over_a_preset():
    args = train.parse_args("--preset=fashion-mnist --train.lr 1e-4 --train.batch_size 4 --model.dim-mults 1 2".split())
    assert (args.config.train.lr, args.config.train.batch_size, args.config.model.dim_mults) == (1e-4, 4, (1, 2))
    assert args.config.model.use_convnext and args.run_dir == Path("runs/fashion-mnist")


@pytest.mark.parametrize(
    "module, flags", [(train, ["--preset", "--train.lr", "--data.dir"]), (sample, ["--sampler", "--gif"])]
)
def test_help(call, module, flags):
    code, out, _ = call(module, "--help")
    assert code == 0 and all(flag in out for flag in flags)


# Bad input: exit code 2, one line that names what is wrong, nothing written


def truncate(run):
    file = checkpoint(run, 6) / "ema.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def other_model(run):
    record = json.loads((run / "config.json").read_text())
    record["model"]["dim"] = 16
    (run / "config.json").write_text(json.dumps(record))


def no_record(run):
    (run / "config.json").unlink()


def garbage_record(run):
    (run / "config.json").write_text('{"data": 3}')


def no_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def spoil_all(run):
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{}")


def nothing(run):
    pass


@pytest.mark.parametrize(
    "args, word",
    [
        ("--preset quik", "quik"),
        ("--preset", "preset"),
        ("--train.lrr 1", "--train.lrr"),
        ("--train.lr abc", "abc"),
        ("--train.lr", "--train.lr"),
        ("surplus", "surplus"),
        ("--num_gpus 8", "--num_gpus"),
        ("--device tpu", "tpu"),
        ("--data.size 30", "--data.size 32"),
        ("--data.size 24", "24"),
        ("--data.name nonsense", "nonsense"),
        ("--data.name image-folder --data.dir nowhere", "nowhere"),
        ("--data.name fashion-mnist --data.dir nowhere", "nowhere"),
        ("--model.dim 12", "12"),
        ("--train.total-steps 0", "--train.total-steps"),
        ("--train.sample-steps 5000", "--train.sample-steps"),
        ("--train.batch-size 5000", "--train.batch-size"),
        ("--train.ema-decay 1", "--train.ema-decay"),
        ("--train.score-every -1", "--train.score-every"),
        ("--train.score-every 2 --train.score-num 128", "--train.score-num above 128"),
        ("--preset scurve --train.score-every 2", "--train.score-every is for gray images of 28 x 28"),
        ("--diffusion.schedule nonsense", "nonsense"),
        ("--diffusion.objective nonsense", "nonsense"),
        ("--diffusion.loss nonsense", "nonsense"),
        ("--precision fp8", "fp8"),
        ("--precision bf16 --device cpu", "bf16"),
        ("--run-dir file", "file"),
        ("--run-dir file/below", "file"),
    ],
)
def test_bad_input_to_train(call, tmp_path, monkeypatch, args, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    before = tree(tmp_path)
    assert_refused(call(train, *args.split()), word)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "spoil, args, word",
    [
        (nothing, ["--model.dim", "16"], "another model"),
        (nothing, ["--diffusion.objective", "eps"], "another diffusion"),
        (nothing, ["--precision", "fp16"], "another precision"),
        (nothing, ["--data.no-flip"], "other data"),
        (nothing, ["--train.seed", "1"], "seed"),
        (garbage_record, [], "config.json"),
    ],
)
def test_train_refuses_the_folder_of_another_run(run, call, spoil, args, word):
    spoil(run)
    before = tree(run)
    assert_refused(call(train, "--run-dir", run, *SHORT, *args), word)
    assert tree(run) == before


def test_train_refuses_a_run_whose_checkpoints_are_all_spoilt(run, call):
    spoil_all(run)
    before = tree(run)
    code, _, err = call(train, "--run-dir", run, *SHORT)
    lines = err.splitlines()
    assert code == 2 and [line.split(":")[0] for line in lines] == ["warning"] * 3 + ["error"]
    assert tree(run) == before


@pytest.mark.parametrize(
    "spoil, args, word",
    [
        (no_checkpoint, [], "no checkpoint"),
        (truncate, [], "ema.safetensors"),
        (spoil_all, [], "state.json"),
        (other_model, [], "not this network's"),
        (no_record, [], "config.json"),
        (garbage_record, [], "config.json"),
        (nothing, ["--steps", "5000"], "5000"),
        (nothing, ["--steps", "0"], "--steps 0"),
        (nothing, ["--num", "0"], "--num"),
        (nothing, ["--batch-size", "0"], "--batch-size"),
        (nothing, ["--seed", "-1"], "--seed"),
        (nothing, ["--sampler", "nonsense"], "nonsense"),
        (nothing, ["--weights", "nonsense"], "nonsense"),
        (nothing, ["--device", "tpu"], "tpu"),
        (nothing, ["--nmu", "4"], "--num"),
        (nothing, ["--num", "1", "--steps", "1", "--out", "file/x.png"], "file"),
    ],
)
def test_bad_input_to_sample(run, call, tmp_path, monkeypatch, spoil, args, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    spoil(run)
    before = tree(tmp_path)
    code, out, err = call(sample, run, *args)
    assert_refused((code, out, "\n".join(line for line in err.split("\n") if "step/s" not in line)), word)
    assert tree(tmp_path) == before


def test_sample_of_a_run_that_is_not_there(call, tmp_path):  # without one see test_cli_sample.py
    assert_refused(call(sample, tmp_path / "nowhere"), "nowhere")


@pytest.mark.skipif(ms.device_context.gpu.is_available(), reason="has a GPU")
@pytest.mark.parametrize("module", [train, sample])
def test_a_device_that_is_not_there(run, call, tmp_path, module):
    where = ["--run-dir", tmp_path / "new"] if module is train else [run]
    assert_refused(call(module, *where, "--device", "gpu"), "GPU")
    assert not (tmp_path / "new").exists()


def assert_refused(end, word):
    code, out, err = end
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert word in err and "Traceback" not in out


@pytest.mark.parametrize("script, args", [("train.py", ["--train.lrr", "1"]), ("sample.py", ["nowhere"])])
def test_bad_input_to_a_real_process(tmp_path, script, args):
    code, out, err = finish(start(script, *args, cwd=tmp_path))
    assert_refused((code, out, err), args[0])
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "nowhere", "--debug"])
    with pytest.raises(UserError, match="nowhere"):
        runtime.run_program(sample.main)


# What goes wrong later; the compiled step is replaced, which changes nothing here and saves its compilation


@pytest.fixture
def step_that_returns(monkeypatch):
    def returns(loss):
        out = (Tensor(np.float32(loss)), Tensor(np.float32(1)), None)
        monkeypatch.setattr(tasks, "make_train_step", lambda *_, **options: lambda *_: out)

    return returns


@pytest.fixture
def scores_of(monkeypatch, step_that_returns):
    """scores_of(a, b, ...): the FIDs of the scores to come, of images that are not drawn. `scores_of.left` are to come."""

    def scores_of(*fids):
        scores_of.left = list(fids)
        monkeypatch.setattr(tasks, "frechet_distance", lambda *_: scores_of.left.pop(0))
        monkeypatch.setattr(tasks, "generate", lambda *args, **_: np.zeros((args[5], *args[4]), np.float32))

    step_that_returns(1)
    return scores_of


@pytest.mark.parametrize("fids, best, left", [((5, 3, 4), 4, {4, 6}), ((3, 4, 5), 2, {2, 6}), ((5, 4, 3), 6, {6})])
def test_the_best_checkpoint_stays(call, tmp_path, scores_of, fids, best, left):
    """Of one that is kept; also where no checkpoint was due."""
    run, args = tmp_path / "run", [*SCORED, "--train.keep-checkpoints", 1, "--train.save-every", 100]
    scores_of(*fids)
    code, out, err = call(train, "--run-dir", run, *args)
    assert code == 0, err
    assert [row["fid"] for row in metrics(run) if "fid" in row] == list(fids) and not scores_of.left
    assert kept(run) == {step: fids[step // 2 - 1] for step in left}
    assert f"best FID    {min(fids):.2f}, in {checkpoint(run, best)}" in out

    scores_of()
    code, out, err = call(train, "--run-dir", run, *args)
    assert code == 0 and f"best FID    {min(fids):.2f}, in {checkpoint(run, best)}" in out, err
    scores_of(2.5, 6)  # it goes on, and knows what was best
    code, out, err = call(train, "--run-dir", run, *args, "--train.total-steps", 10)
    assert code == 0 and f"best FID    2.50, in {checkpoint(run, 8)}" in out, err
    assert kept(run) == {8: 2.5, 10: 6}


def test_samples_that_are_not_finite_end_the_run(call, tmp_path, scores_of, monkeypatch):
    scores_of()
    monkeypatch.setattr(tasks, "generate", lambda *args, **_: np.full((args[5], *args[4]), np.nan, np.float32))
    code, _, err = call(train, "--run-dir", tmp_path / "run", *SCORED)
    assert code == 2 and "samples are not finite at step 2" in last_line(err) and "Traceback" not in err
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_scores_of_images_that_the_classifier_does_not_know(call, tmp_path):
    code, out, err = call(train, "--run-dir", tmp_path / "run", *SCORED, "--data.name", "image-folder", "--data.size", 32)
    assert_refused((code, out, err), "28")
    assert "--inception" not in err and list(tmp_path.iterdir()) == []


def test_scores_of_too_few_images(call, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(100):
        Image.fromarray(np.full((28, 28), i, np.uint8)).save(tmp_path / f"images/{i}.png")
    data = ["--data.name", "image-folder", "--data.dir", tmp_path / "images"]
    assert_refused(call(train, "--run-dir", tmp_path / "run", *SCORED, *data), "100")


@pytest.mark.parametrize("args, falls", [([], True), (["--train.no-lr-decay"], False)])
def test_the_learning_rate(call, tmp_path, step_that_returns, args, falls):
    step_that_returns(1)
    warm = ["--train.warmup-steps", 2, "--train.lr", 0.3, "--train.sample-steps", 1, *args]
    assert call(train, "--run-dir", tmp_path / "run", *SHORT, *warm)[0] == 0
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)) if falls else np.ones(4)
    np.testing.assert_allclose(rates, [0.1, 0.2, *(0.3 * cosine)], rtol=1e-5)


def test_the_process_to_compare_with(call, tmp_path):
    """fashion-mnist-seed: 200 timesteps, its betas unscaled, one rate, and no average. A warning says what that leaves."""
    preset = PRESETS["fashion-mnist-seed"]
    with pytest.warns(UserWarning, match="alpha_bar_T is 0.132"):
        _, diffusion = preset.build()
    assert diffusion.num_timesteps == 200
    np.testing.assert_allclose(diffusion.betas, np.linspace(1e-4, 0.02, 200), rtol=1e-6)
    assert 0.1 < diffusion.alphas_cumprod[-1] < 0.2  # much of the data is left
    run, mini = tmp_path / "run", ["--data.name", "fashion-mnist-mini", "--train.total-steps", 2]
    with pytest.warns(UserWarning, match="alpha_bar_T is 0.132"):
        code, _, err = call(train, "--preset", "fashion-mnist-seed", "--run-dir", run, *TINY, *mini)
    assert code == 0, err
    model, ema = (safetensors.numpy.load_file(checkpoint(run, 2) / f"{name}.safetensors") for name in ("model", "ema"))
    assert model.keys() == ema.keys() and model
    for name in model:
        np.testing.assert_array_equal(model[name], ema[name], err_msg=name)
    assert [row["lr"] for row in metrics(run)] == pytest.approx([preset.train.lr] * 2)


def last_line(err):
    return err.splitlines()[-1]


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(call, tmp_path, step_that_returns, loss):
    step_that_returns(loss)
    code, _, err = call(train, "--run-dir", tmp_path / "run", *SHORT)
    assert code == 2 and "the loss is" in last_line(err) and "at step 1" in last_line(err) and "Traceback" not in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_ends_the_run_with_a_word(call, tmp_path, step_that_returns, monkeypatch):
    step_that_returns(1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = call(train, "--run-dir", tmp_path / "run", *SHORT)
    assert code == 2 and "No space left on device" in last_line(err) and "Traceback" not in err
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
