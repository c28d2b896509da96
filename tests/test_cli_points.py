"""train.py and sample.py on points in the plane, as a user meets them: presets, the user's own file, many steps in a call,
resuming, Ctrl-C, scores and pictures, ModelArts, bad input, and how good the samples are."""

import gc
import inspect
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import test_cli
from test_cli import assert_refused, checkpoint, finish, metrics, picture, start, tree
from test_cli_sample import call

import sample
import train
from ms_diffusion import likelihood
from ms_diffusion import plots2d as plane
from ms_diffusion.data.points import TOYS, Normalizer, load_points
from ms_diffusion.metrics.distances import compare
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.samplers import SAMPLERS, SPACINGS
from ms_diffusion.training.presets import PRESETS, Config, DataConfig, PointsConfig
from ms_diffusion.training.tasks import everything as tasks

obs = test_cli.obs  # a fixture

T = 12
DATA = f"--diffusion.num_timesteps {T} --train.batch-size 32 --data.num 200 --train.sample-num 20 --train.sample-steps 2".split()
NET = "--model.dim 8 --model.depth 1".split()
OFTEN = "--train.log-every 10 --train.save-every 20 --train.sample-every 60".split()
LONG = ["--preset", "scurve", *DATA, *NET, *OFTEN]
V = ["--diffusion.objective", "v"]  # where eps puts what an untrained network draws into the corners of the clipping
FEW = [*DATA, *V, *"--train.total-steps 4 --train.steps-per-call 2 --train.log-every 2 --train.save-every 2".split()]
SHORT = ["--preset", "scurve", *FEW, *NET]
FILE = [*SHORT, "--data.name", "points-file", "--data.dir"]
PICTURES = {name: getattr(plane, name) for name in dir(plane) if name.startswith("save_")}
TABLE = PRESETS["scurve"].model.num_embeddings
KINDS = ("sliced_wasserstein", "mmd", "energy")


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    """In this process pictures are empty files."""

    def save(path, *_, **options):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()

    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(plane, name, save)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Real ones."""
    for name, function in PICTURES.items():
        monkeypatch.setattr(plane, name, function)


def learn(run, *args):
    """Train in this process; what it printed."""
    code, out, err = call(train, "--run-dir", run, *args)
    assert code == 0 and "Traceback" not in err, err
    return out


@pytest.fixture(scope="module")
def scurve(tmp_path_factory):
    """A run of the preset, of 60 steps, and what train.py and then sample.py said, each a process; leave it as it is."""
    folder = tmp_path_factory.mktemp("scurve")
    short = "--train.total-steps 60 --train.sample-num 50 --model.dim 16".split()
    trained = finish(start("train.py", "--preset", "scurve", "--run-dir", "run", *short, cwd=folder))
    sampled = finish(start("sample.py", "run", "--num", 200, "--steps", 5, "--npz", "x.npz", cwd=folder))
    return folder / "run", trained, sampled


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4; leave it as it is."""
    run = tmp_path_factory.mktemp("small") / "run"
    learn(run, *SHORT)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 60 steps, 10 in a call, over 6 batches an epoch; leave it as it is."""
    run = tmp_path_factory.mktemp("whole") / "run"
    learn(run, *LONG, "--train.steps-per-call", 10, "--train.total-steps", 60)
    return run


@pytest.fixture
def draw(tmp_path):
    """draw(run, *args): the points (N, 2) that sample.py draws, 50 in 5 steps if nothing else is said, with all else that it
    writes in the folder `draw.folder`; what was printed is `draw.out`."""

    def draw(run, *args):
        draw.folder = tmp_path / "drawn"
        shutil.rmtree(draw.folder, ignore_errors=True)
        where = ["--train_url", draw.folder, "--npz", tmp_path / "x.npz"]
        code, draw.out, err = call(sample, run, "--num", 50, "--steps", 5, *where, *args)
        assert code == 0 and "Traceback" not in err, err
        points = np.load(tmp_path / "x.npz")["points"]
        assert points.dtype == np.float32 and points.shape[1:] == (2,) and np.isfinite(points).all()
        return points

    return draw


def kept(run):
    """The (training, held-out) points of a run."""
    with np.load(run / "points.npz") as points:
        return points["train"], points["test"]


def assert_in_frame(points, data):
    """Samples of a network that has learnt nothing yet: in the square that its x_0 is clipped to, and all over it."""
    frame = Normalizer.of(data)
    x = frame.to_unit(points)
    assert abs(x).max() <= 1 + 1e-5 * (1 + abs(frame.centre).max() / frame.scale) and (np.ptp(x, 0) > 0.5).all()


def assert_same_weights(a, b, step):
    for name in ("model", "ema", "optimizer"):
        first, second = (safetensors.numpy.load_file(checkpoint(run, step) / f"{name}.safetensors") for run in (a, b))
        assert first.keys() == second.keys() and first
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=f"{name} {key}")


# A run from end to end


def test_train_leaves_a_run_folder(scurve):
    run, (code, out, err), _ = scurve
    assert code == 0 and "Traceback" not in err and "arning" not in err, err
    weights = {f"checkpoints/step-0000060/{name}.safetensors" for name in ("model", "ema", "optimizer")}
    files = {"config.json", "points.npz", "metrics.jsonl", "loss.png", "samples/step-0000060.png"}
    files |= weights | {"checkpoints/step-0000060/state.json"}
    assert files <= {str(name) for name, data in tree(run).items() if data is not None}
    for line in ("samples     run/samples/step-0000060.png", "pictures, scores: python sample.py run", "metrics"):
        assert line in out
    assert "points/s" in err and "img/s" not in err

    (row,) = metrics(run)  # of the last step: 100 steps lie between two others
    assert row["step"] == 60 and np.isfinite(list(row.values())).all() and row["loss"] > 0
    np.testing.assert_allclose(row["lr"], 2e-3 * 60 / 201, rtol=1e-5)
    for name in ("loss.png", "samples/step-0000060.png"):
        assert np.ptp(picture(run / name)[1]) > 100
    for points, expected in zip(kept(run), load_points("scurve", None, 10_000, 0), strict=True):
        np.testing.assert_array_equal(points, expected)
    config = Config.from_json(run / "config.json")
    assert config.is_points and config.shape == (2,)
    assert (config.data, config.model) == (PointsConfig(), ResidualMLPConfig(dim=16))


def test_sample_leaves_all_pictures_and_the_scores(scurve):
    run, _, (code, out, err) = scurve
    assert code == 0 and "Traceback" not in err and "arning" not in err, err
    names = [*(f"{name}.png" for name in ("sample", "forward", "reverse", "score", "trajectories")), "denoise.gif"]
    for name in names:
        size, pixels, frames = picture(run / name)
        assert min(size) >= 300 and np.ptp(pixels) > 20 and frames == (6 if name == "denoise.gif" else 1)
    written = out.splitlines()[-1].split(": ")[1].split(", ")
    assert written == [*(f"run/{name}" for name in ("sample.png", "denoise.gif", *names[1:5])), "x.npz", "run/scores.json"]
    assert "200 points of step 60 in " in out

    points, record = np.load(run.parent / "x.npz")["points"], json.loads((run / "scores.json").read_text())
    assert points.dtype == np.float32 and points.shape == (200, 2)
    assert_in_frame(points, kept(run)[0])
    assert (record.pop("sampler"), record.pop("steps"), record.pop("num")) == ("ddim", 5, 200)
    assert list(record) == list(KINDS)
    for name, distance in record.items():
        assert list(distance) == ["score", "floor", "floor_most"] and np.isfinite(list(distance.values())).all()
        assert 0 < distance["floor"] <= distance["floor_most"] < distance["score"]
        assert f"{name:18} {distance['score']:8.4f}" in out
    expected = compare(points, kept(run)[1], np.random.default_rng(0))
    for name in KINDS:
        assert record[name] == pytest.approx(expected[name], rel=1e-5)


# sample.py


def test_pictures_elsewhere(small, tmp_path, pictures, monkeypatch):
    run = shutil.copytree(small, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(sample, "run", "--num", 50, "--steps", 3, "--out", "a/b.png", "--gif", "c.gif", "--npz", "d/e.npz")
    assert code == 0, err
    assert np.ptp(picture(tmp_path / "a/b.png")[1]) > 100 and picture(tmp_path / "c.gif")[2] == 4
    assert np.load("d/e.npz")["points"].shape == (50, 2)
    new = {str(name) for name in tree(run).keys() - tree(small).keys()}
    assert new == {*(f"{name}.png" for name in ("forward", "reverse", "score", "trajectories")), "scores.json"}


@pytest.mark.parametrize("args", [["--sampler", "ddpm"], []], ids=str)
def test_points_do_not_depend_on_batch_size_and_number(small, draw, args):
    points = draw(small, *args)
    assert_in_frame(points, kept(small)[0])
    assert len(np.unique(points.round(3), axis=0)) > 20
    for size, num in ((20, 50), (1, 3)):
        others = draw(small, *args, "--num", num, "--batch-size", size)
        np.testing.assert_allclose(others, points[:num], atol=1e-4)
    np.testing.assert_array_equal(draw(small, *args), points)
    assert (abs(draw(small, *args, "--seed", 1) - points) > 1e-2).mean() > 0.5


def test_every_sampler_and_spacing(small, draw):
    args = ["--steps", 5]  # for which no two spacings are the same
    by_sampler = {name: draw(small, *args, "--sampler", name) for name in SAMPLERS}
    assert json.loads((draw.folder / "scores.json").read_text())["sampler"] == list(SAMPLERS)[-1]
    by_spacing = {name: draw(small, *args, "--spacing", name) for name in SPACINGS}
    for found in (by_sampler, by_spacing):
        assert all(points.shape == (50, 2) and (points.std(0) > 0.1).all() for points in found.values())
        assert len({points.tobytes() for points in found.values()}) == len(found)
    np.testing.assert_array_equal(by_sampler["ddim"], by_spacing["linspace"])


def test_a_single_step(small, draw, pictures):
    assert_in_frame(draw(small, "--steps", 1), kept(small)[0])
    assert picture(draw.folder / "denoise.gif")[2] == 2


def test_noise_of_ddim_and_ddpm(small, draw):
    ddim, ddpm = draw(small), draw(small, "--sampler", "ddpm")
    np.testing.assert_array_equal(draw(small, "--eta", 0), ddim)
    full = draw(small, "--eta", 1)
    assert (full != ddim).any() and (draw(small, "--eta", 0.5) != full).any()
    np.testing.assert_allclose(full, ddpm, atol=1e-4)  # eta 1 is DDPM
    assert (draw(small, "--sampler", "ddpm", "--v-posterior", 1) != ddpm).any()
    np.testing.assert_array_equal(draw(small, "--sampler", "ddpm", "--v-posterior", 0), ddpm)


def test_weights_and_checkpoints(small, draw):
    points = draw(small)
    for same in (checkpoint(small, 4), checkpoint(small, 4) / "ema.safetensors"):
        np.testing.assert_array_equal(draw(same), points)
    for run, *args in ([checkpoint(small, 2)], [small, "--weights", "model"]):
        assert (draw(run, *args) != points).any()


def test_pictures_of_a_checkpoint_lie_in_it(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    code, _, err = call(sample, checkpoint(run, 2), "--num", 50, "--steps", 2)
    assert code == 0, err
    new = {name.name for name in tree(run).keys() - tree(small).keys() if name.parts[:2] == ("checkpoints", "step-0000002")}
    assert new >= {"sample.png", "denoise.gif", "scores.json"}
    assert not (run / "sample.png").exists() and not (run / "scores.json").exists()


def test_one_point_has_no_score(small, draw, pictures):
    assert draw(small, "--num", 1).shape == (1, 2)
    first, second = draw.out.splitlines()
    assert first.startswith("no score: ") and second.startswith("1 points of step 4 in")
    assert not (draw.folder / "scores.json").exists() and (draw.folder / "score.png").exists()


def test_how_many_points_if_nothing_is_said(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "compare", lambda *_: {})
    code, out, _ = call(sample, small, "--steps", 2, "--train_url", tmp_path, "--npz", tmp_path / "x.npz")
    assert code == 0 and "10000 points of step 4 in" in out
    assert np.load(tmp_path / "x.npz")["points"].shape == (10_000, 2)


# Presets and ways to train


@pytest.mark.parametrize("preset", [*TOYS, "scurve-seed"])
def test_every_preset_trains(tmp_path, preset):
    args = ["--preset", preset, *FEW, *NET[: 2 if preset == "scurve-seed" else None]]
    learn(tmp_path / "run", *args)
    rows, config = metrics(tmp_path / "run"), Config.from_json(tmp_path / "run/config.json")
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(list(row.values())).all() for row in rows)
    assert config == train.parse_args(args).config
    name = preset.removesuffix("-seed")
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == {"name": name, "dir": None, "num": 200}
    expected = MLPConfig(8) if preset == "scurve-seed" else ResidualMLPConfig(8, 1)
    assert config.model == expected
    for points, other in zip(kept(tmp_path / "run"), load_points(name, None, 200, 0), strict=True):
        np.testing.assert_array_equal(points, other)


def test_the_presets_are_what_they_are_called():
    for name in TOYS:
        assert PRESETS[name] == replace(PRESETS["scurve"], data=PointsConfig(name))
    assert PRESETS["scurve-seed"].data == PointsConfig("scurve") and PRESETS["scurve-seed"].model == MLPConfig()
    assert [name for name, config in PRESETS.items() if config.is_points] == [*TOYS, "scurve-seed"]


@pytest.fixture
def steps_per_call(monkeypatch):
    """What train.py gives as `steps_per_call`, run by run."""
    given, make = [], tasks.make_train_step

    def spy(*args, **options):
        given.append(inspect.signature(make).bind(*args, **options).arguments.get("steps_per_call", 1))
        return make(*args, **options)

    monkeypatch.setattr(tasks, "make_train_step", spy)
    return given


@pytest.mark.parametrize(
    "args, per_call",
    [
        ("--train.timestep_sampling importance", 1),
        ("--train.ema-lengths 0.05 0.1", 1),
        ("--precision fp16", 1),
        ("--train.learn-logvar --train.timestep_sampling uniform", 2),
        ("--diffusion.objective x0 --diffusion.schedule cosine", 2),
        ("--diffusion.objective v --diffusion.zero-terminal-snr", 2),
        ("--diffusion.objective eps --diffusion.schedule linear --diffusion.num_timesteps 30", 2),
        (f"--diffusion.num_timesteps {TABLE + 1} --model.num_embeddings {TABLE + 1}", 2),
        ("--model.frequencies 0 --model.depth 0 --diffusion.loss huber --diffusion.weighting min-snr", 2),
    ],
)
def test_ways_to_train(tmp_path, draw, steps_per_call, args, per_call):
    run = tmp_path / "run"
    learn(run, *SHORT, *args.split())
    assert steps_per_call == [per_call]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(list(row.values())).all() for row in rows)
    points = draw(run) if "objective" in args or "lengths" in args else None
    first, last = (safetensors.numpy.load_file(checkpoint(run, step) / "optimizer.safetensors") for step in (2, 4))
    if "importance" in args:
        assert first["timesteps.counts"].sum() == 2 * 32 and last["timesteps.counts"].sum() == 4 * 32
    if "logvar" in args:
        assert np.ptp(first["logvar"]) > 0 and (last["logvar"] != first["logvar"]).any()
    if "lengths" in args:
        other = draw(run, "--ema-length", 0.1)
        assert (other != points).any() and (draw(run, "--ema-length", 0.05) != other).any()


# The user's own points


def own_points(n=300):
    """(n, 2) float64: 100 wide and 50 high around (1000, -1000)."""
    return np.random.default_rng(5).uniform((950, -1025), (1050, -975), (n, 2))


def save_points(path, points):
    if path.suffix == ".npy":
        np.save(path, points)
    else:
        np.savetxt(path, points, delimiter=",", header="x,y", comments="")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_a_file_of_points_and_samples_in_its_units(tmp_path, draw, suffix):
    points, run = own_points(), tmp_path / "run"
    file = save_points(tmp_path / f"own{suffix}", points)
    learn(run, *FILE, file)
    train_points, test_points = kept(run)
    assert train_points.shape == (240, 2) and test_points.shape == (60, 2)
    together = np.concatenate([train_points, test_points])
    np.testing.assert_array_equal(together[np.argsort(together[:, 0])], np.float32(points[np.argsort(points[:, 0])]))
    file.unlink()  # the run keeps its points
    samples = draw(run, "--num", 500, "--steps", T)
    assert_in_frame(samples, train_points)
    assert abs(samples.mean(0) - (1000, -1000)).max() < 50 and (np.ptp(samples, 0) > 25).all()
    scores = json.loads((draw.folder / "scores.json").read_text())
    assert scores["sliced_wasserstein"]["floor"] > 1  # of 30 points, in units of the file
    assert scores["sliced_wasserstein"] == pytest.approx(
        compare(samples, test_points, np.random.default_rng(0))["sliced_wasserstein"], rel=1e-5
    )


def test_a_few_points_on_a_line(tmp_path, draw, pictures):
    file = save_points(tmp_path / "own.npy", own_points(10) * (0, 1))
    learn(tmp_path / "run", *FILE, file, "--train.batch-size", 8)
    draw(tmp_path / "run")
    assert draw.out.startswith("no score: at least 2 samples and 4 data are needed")


def test_another_file_needs_another_folder(tmp_path):
    file, run = save_points(tmp_path / "own.npy", own_points()), tmp_path / "run"
    learn(run, *FILE, file)
    learn(run, *FILE, save_points(tmp_path / "copy.csv", np.float32(own_points())))  # the same points are welcome
    save_points(file, own_points() + 1)
    before = tree(tmp_path)
    assert_refused(call(train, "--run-dir", run, *FILE, file), "another --run-dir")
    assert tree(tmp_path) == before


def spoil(path):
    path.write_bytes(b"garbage")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def other_arrays(path):
    np.savez(path, points=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("harm", [Path.unlink, spoil, truncate, other_arrays])
def test_points_of_a_run_that_are_lost(small, tmp_path, harm):
    """One line says so; training again, as it says, brings them back. No file is left open, which would be a warning."""
    run = shutil.copytree(small, tmp_path / "run")
    harm(run / "points.npz")
    before = tree(run)
    assert_refused(call(sample, run, "--num", 20, "--steps", 2), "points.npz")
    assert tree(run) == before
    if (run / "points.npz").exists():
        assert_refused(call(train, "--run-dir", run, *SHORT), "points.npz")
        assert tree(run) == before
        (run / "points.npz").unlink()
    assert "is finished" in learn(run, *SHORT)
    assert tree(run) == tree(small)
    assert call(sample, run, "--num", 20, "--steps", 2)[0] == 0
    gc.collect()


# Resuming, and steps in one call


@pytest.mark.parametrize(
    "per_call, totals, made",
    [
        (10, [20, 60], [10, 10]),
        (10, [25, 60], [5, 5]),
        (10, [24, 40, 60], [2, 2, 10]),
        (7, [60], [1]),
        (1, [60], [1]),
    ],
)
def test_stops_and_steps_per_call_change_nothing(whole, tmp_path, steps_per_call, per_call, totals, made):
    """Bit for bit. In the warm-up the learning rate does not depend on the number of steps, so that it may be raised."""
    run, said = tmp_path / "run", []
    for total in totals:
        said.append(learn(run, *LONG, "--train.steps-per-call", per_call, "--train.total-steps", total))
    assert steps_per_call == made
    for before, total, out in zip(totals[:-1], totals[1:], said[1:], strict=True):
        assert f"resuming at step {before} of {total} in {run}" in out
    assert_same_weights(whole, run, 60)
    assert (metrics(run)[-1] | {"img_per_s": 0}) == pytest.approx(metrics(whole)[-1] | {"img_per_s": 0}, rel=1e-5)
    if totals[0] != 20:
        return
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert a | {"img_per_s": 0} == b | {"img_per_s": 0}


def test_the_steps_of_a_run_whose_last_checkpoint_is_lost(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    for step in (40, 60):
        shutil.rmtree(checkpoint(run, step))
    assert "resuming at step 20 of 60" in learn(run, *LONG, "--train.steps-per-call", 10, "--train.total-steps", 60)
    assert_same_weights(whole, run, 60)
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert a | {"img_per_s": 0} == b | {"img_per_s": 0}


def test_ctrl_c_saves_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path):
    run, total = tmp_path / "run", 10_000_000
    rising = [
        *LONG,
        *f"--train.steps-per-call 10 --train.warmup-steps {total} --train.lr 100 --train.save-every {total}".split(),
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a background job would ignore it
    try:
        process = start("train.py", "--run-dir", "run", *rising, "--train.total-steps", total, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    path, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process, 60)
    assert code == 130 and "Traceback" not in err, err
    rows = metrics(run)
    step = rows[-1]["step"]
    assert [row["step"] for row in rows] == list(range(10, step + 1, 10))
    assert f"stopped at step {step} of {total}, all saved. To go on: python " in out
    assert (run / "loss.png").exists() and checkpoint(run, step).exists()

    end = ["--train.total-steps", step + 20]
    assert f"resuming at step {step} of {step + 20}" in learn(run, *rising, *end)
    learn(tmp_path / "other", *rising, *end)
    assert_same_weights(run, tmp_path / "other", step + 20)
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(tmp_path / "other")]


# ModelArts


def test_local_urls(tmp_path):
    (tmp_path / "data").mkdir()
    save_points(tmp_path / "data/own.csv", own_points())
    urls = ["--data_url", tmp_path / "data", "--train_url", tmp_path / "out", "--num_gpus", 8]
    code, out, err = call(train, *SHORT, "--data.name", "points-file", *urls)
    assert code == 0 and "passing over arguments of the platform: --num_gpus 8" in err, err
    assert (tmp_path / "out/samples/step-0000004.png").exists() and (tmp_path / "out/points.npz").exists()
    assert abs(kept(tmp_path / "out")[0].mean(0) - (1000, -1000)).max() < 20

    urls = ["--data_url", tmp_path / "out", "--train_url", tmp_path / "new"]
    code, _, err = call(sample, *urls, "--num", 20, "--steps", 2)
    assert code == 0, err
    assert {path.name for path in (tmp_path / "new").iterdir()} == RESULTS


RESULTS = {
    *(f"{name}.png" for name in ("sample", "forward", "reverse", "score", "trajectories")),
    "denoise.gif",
    "scores.json",
}


def test_obs_urls(tmp_path, obs):
    (obs / "bucket/points").mkdir()
    save_points(obs / "bucket/points/own.npy", own_points())
    urls = ["--data_url", "obs://bucket/points", "--train_url", "obs://bucket/out"]
    code, _, err = call(train, "--run_dir", tmp_path / "run", *SHORT, "--data.name", "points-file", *urls)
    assert code == 0, err
    assert tree(obs / "bucket/out") == tree(tmp_path / "run")
    assert "samples/step-0000004.png" in map(str, tree(obs / "bucket/out"))

    urls = ["--data_url", "obs://bucket/out", "--train_url", "obs://bucket/pictures"]
    code, _, err = call(sample, *urls, "--num", 20, "--steps", 2)
    assert code == 0, err
    assert {path.name for path in (obs / "bucket/pictures").iterdir()} == RESULTS


# The record of a run


@pytest.mark.parametrize("name", PRESETS)
def test_the_record_of_every_preset_comes_back(tmp_path, name):
    (tmp_path / "config.json").write_text(PRESETS[name].to_json())
    config = Config.from_json(tmp_path / "config.json")
    assert config == PRESETS[name]
    assert (type(config.data), type(config.model)) == (type(PRESETS[name].data), type(PRESETS[name].model))


def test_the_record_of_an_earlier_run_of_images_is_one(tmp_path):
    """It lacks what there is for points."""
    record = json.loads(PRESETS["quick"].to_json())
    del record["train"]["steps_per_call"], record["data"]["condition"], record["data"]["lowres_size"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    config = Config.from_json(tmp_path / "config.json")
    assert config == PRESETS["quick"] and not config.is_points and type(config.data) is DataConfig
    assert config.shape == (1, 28, 28)


# Bad input: exit code 2, one line that names what is wrong, nothing written


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in, with files of points, most of which are none."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("own.npy", rng.random((100, 2)))
    np.save("three.npy", rng.random((100, 3)))
    np.save("flat.npy", rng.random(100))
    np.save("nan.npy", np.where(rng.random((100, 2)) < 0.1, np.nan, 0.5))
    np.save("few.npy", rng.random((39, 2)))  # of which 7 are held out
    np.save("same.npy", np.ones((100, 2)))
    Path("words.csv").write_text("x,y\n1,2\nthree,four\n")
    Path("spoilt.npy").write_bytes(Path("own.npy").read_bytes()[:100])
    Path("file").write_text("in the way")
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "args, words",
    [
        *((f"--data.name points-file --data.dir {name}", name) for name in ("flat.npy", "same.npy", "empty", "missing.npy")),
        ("--data.name points-file --data.dir three.npy", "(100, 3)"),
        ("--data.name points-file --data.dir nan.npy", "NaN"),
        ("--data.name points-file --data.dir few.npy --train.batch-size 33", "32 points are fewer than a step's 33"),
        ("--data.num 20", "20 points are fewer than a step's 32"),
        ("--data.name points-file --data.dir words.csv", "line 3: 'three'"),
        ("--data.name points-file --data.dir spoilt.npy", "spoilt.npy"),
        ("--data.name points-file --data.dir .", "."),
        ("--data.name points-file", "--data.dir"),
        ("--data.dir words.csv", "--data.name points-file"),
        ("--data.dir missing.csv", "--data.name points-file"),
        ("--data.name nonsense", "nonsense"),
        ("--data.num 0", "--data.num 0"),
        (f"--diffusion.num_timesteps {TABLE + 1}", f"set --model.num_embeddings {TABLE + 1}"),
        ("--diffusion.num_timesteps 50 --model.num_embeddings 49", "set --model.num_embeddings 50"),
        ("--data.size 28", "unknown argument --data.size"),
        ("--data.no-flip", "unknown argument --data.no-flip"),
        ("--data.condition lowres", "unknown argument --data.condition"),
        ("--model.num-classes 10", "unknown argument --model.num-classes"),
        ("--model.self-condition", "unknown argument --model.self-condition"),
        ("--model.dim 7", "7"),
        ("--preset scurve-seed --model.depth 2", "unknown argument --model.depth"),
        ("--preset scurve-seed --model.dim 0", "0"),
        ("--preset quick --data.num 100", "unknown argument --data.num"),
        ("--preset quick --data.name scurve", "scurve"),
        ("--preset s-curve", "s-curve"),
        ("--train.steps-per-call 0", "--train.steps-per-call is 0"),
        ("--diffusion.num_timesteps 50 --train.sample-steps 51", "--train.sample-steps"),
        ("--train.sample-num 0", "--train.sample-num"),
        ("--precision bf16 --device cpu", "bf16"),
        ("--run-dir file/below", "file"),
    ],
)
def test_bad_input_to_train(files, args, words):
    before = tree(files)
    preset = [] if "--preset" in args else ["--preset", "scurve"]
    assert_refused(call(train, *preset, "--train.batch-size", 32, *args.split()), words)
    assert tree(files) == before


@pytest.mark.parametrize(
    "args, words",
    [
        ("--data.num 300", "another data"),
        ("--data.name spiral", "another data"),
        ("--model.depth 2", "another model"),
        ("--preset scurve-seed", "another model"),
        ("--diffusion.objective x0", "another diffusion"),
        ("--train.seed 1", "another seed"),
    ],
)
def test_train_refuses_the_folder_of_another_run(small, args, words):
    before = tree(small)
    net = NET[: 2 if "--preset" in args else None]
    assert_refused(call(train, "--preset", "scurve", "--run-dir", small, *FEW, *net, *args.split()), words)
    assert tree(small) == before


@pytest.mark.parametrize(
    "args, words",
    [
        ("--inpaint left test:0", "--inpaint"),
        ("--init test:0", "--init"),
        ("--image test:0", "--image"),
        ("--interpolate test:0 test:1", "--interpolate"),
        ("--class 1", "--class"),
        ("--guidance 3", "--guidance"),
        ("--guidance-rescale 0.5", "--guidance-rescale"),
        ("--guidance-interval 1 2", "--guidance-interval"),
        ("--resample 3", "--resample"),
        ("--strength 0.5", "--strength"),
        (f"--steps {T + 1}", f"--steps {T + 1}: choose from 1 to {T}"),
        ("--steps 0", "--steps 0"),
        ("--num 0", "--num"),
        ("--batch-size 0", "--batch-size"),
        ("--seed -1", "--seed"),
        ("--eta 2", "--eta 2"),
        ("--eta 0.5 --sampler ddpm", "--sampler ddim"),
        ("--v-posterior 0.5", "--sampler ddpm"),
        ("--sampler nonsense", "nonsense"),
        ("--ema-length 0.1", "--train.ema-lengths"),
    ],
)
def test_bad_input_to_sample(small, args, words):
    before = tree(small)
    assert_refused(call(sample, small, "--steps", 5, *args.split()), words)
    assert tree(small) == before


def test_points_have_no_likelihood(small):
    assert_refused(call(likelihood, small), "points")


# How good the samples are


def scores_after(run, draw, steps, *args):
    """kind -> {"score", "floor", "floor_most"} of 5,000 points of a run of the preset, in batches of 128."""
    learn(run, "--preset", "scurve", "--train.batch-size", 128, "--train.total-steps", steps, "--train.sample-steps", 2)
    draw(run, "--sampler", "ddpm", "--num", 5000, *args)
    return json.loads((draw.folder / "scores.json").read_text())


def test_the_s_curve_is_learnt(tmp_path, draw):
    """In 2,000 steps its samples are about as far from held-out data as such data from each other; at first they are far."""
    untrained = scores_after(tmp_path / "untrained", draw, 1, "--steps", 10)
    assert all(untrained[kind]["score"] > 10 * untrained[kind]["floor"] for kind in KINDS)
    scores = scores_after(tmp_path / "run", draw, 2000, "--steps", 100)
    assert scores["sliced_wasserstein"]["score"] < 2 * scores["sliced_wasserstein"]["floor"]
    assert scores["energy"]["score"] < 1.5 * scores["energy"]["floor_most"]
    assert scores["mmd"]["score"] < 1.5 * scores["mmd"]["floor_most"]
