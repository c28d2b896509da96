"""Runs of points in the plane: training, resuming with many steps in a call, samples, pictures and scores."""

import gc
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import assert_refused, assert_same_run, call, checkpoint, metrics, picture, request, succeed, tree, weights

from ms_diffusion import plots2d
from ms_diffusion.data.points import TOYS, Normalizer, load_points, read_saved_points
from ms_diffusion.metrics.distances import compare, sliced_wasserstein
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train, train_task
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.points import PointsConfig, PointsDataConfig

T = 12
SMALL = override(  # v: of eps, clipping would put the samples of an untrained network into the corners
    replace(PRESETS["scurve"], model=ResidualMLPConfig(8, 1)),
    **{"diffusion.num_timesteps": T, "data.num": 200, "objective": "v", "batch_size": 32, "sample_num": 20},
    sample_steps=2,
)
LONG = override(SMALL, total_steps=60, steps_per_call=10, log_every=10, save_every=20, sample_every=60)
FLAGS = "--preset scurve --model.dim 8 --model.depth 1 --data.num 200 --train.batch-size 32 --train.sample-num 20".split()
FLAGS += f"--diffusion.num-timesteps {T} --diffusion.objective v --train.sample-steps 2 --train.total-steps 4".split()
FLAGS += "--train.steps-per-call 2 --train.log-every 2 --train.save-every 2".split()
PICTURES = [*(f"{name}.png" for name in ("sample", "forward", "reverse", "score", "trajectories")), "denoise.gif"]
KINDS = ("sliced_wasserstein", "mmd", "energy")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 60 steps, 10 in a call, over 6 batches an epoch; its folder is left as it is."""
    return train(LONG, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are empty files: they are not what a test is about, and take long."""

    def save(path, *_, **options):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()

    for name in dir(plots2d):
        if name.startswith("save_"):
            monkeypatch.setattr(plots2d, name, save)


def assert_in_square(points, data):
    """Samples of a network that has learned nothing: in the square that x_0 is clipped to, and all over it."""
    normalizer = Normalizer.of(data)
    x = normalizer.normalize(points)
    assert abs(x).max() <= 1 + 1e-5 * (1 + abs(normalizer.center).max() / normalizer.scale) and (np.ptp(x, 0) > 0.5).all()


# Training


def test_what_training_leaves(trained):
    run = trained.home
    names = {str(name) for name, content in tree(run).items() if content is not None}
    files = {"config.json", "points.npz", "metrics.jsonl", "loss.png", "samples/step-0000060.png"}
    assert files | {f"checkpoints/step-0000060/{name}.safetensors" for name in ("model", "ema", "optimizer")} <= names
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(10, 61, 10))
    assert all(np.isfinite(list(row.values())).all() and row["loss"] > 0 for row in rows)
    np.testing.assert_allclose([row["lr"] for row in rows], [2e-3 * row["step"] / 201 for row in rows], rtol=1e-5)
    for name in ("loss.png", "samples/step-0000060.png"):
        assert np.ptp(picture(run / name)[0]) > 100
    for points, expected in zip(read_saved_points(run / "points.npz"), load_points("scurve", None, 200, 0), strict=True):
        np.testing.assert_array_equal(points, expected)
    assert trained.config == LONG


def test_a_preview_is_drawn_as_the_sample_command_draws(trained):
    task = LONG.task()
    task.start(trained.home)
    ours = task.draw(20, batch_size=20)
    np.testing.assert_allclose(ours, trained.sample(20, sampler="ddpm", steps=2, seed=0), atol=1e-5)


def test_stopping_and_steps_per_call_change_nothing(trained, tmp_path):
    """Bit for bit. In the warm-up the learning rate does not depend on the number of steps, which may therefore grow."""
    run, stop, config = tmp_path / "run", threading.Event(), override(LONG, total_steps=40)
    task = config.task()
    assert train_task(task, run, "CPU", stop, lambda folder: stop.set())[0] == 30  # the step after a checkpoint
    assert task.steps_per_call == 10 and checkpoint(run, 30).exists()
    task = override(LONG, steps_per_call=7).task()
    assert train_task(task, run, "CPU", threading.Event())[0] == 60
    assert task.steps_per_call == 1 and task.start_step == 30
    assert_same_run(run, trained.home, 60)
    for row, expected in zip(metrics(run), metrics(trained.home), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)  # a call of 10 steps returns their mean loss


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, 10),
        ({"steps_per_call": 25}, 5),
        ({"total_steps": 25}, 5),
        ({"log_every": 4}, 2),
        ({"steps_per_call": 7}, 1),
        ({"timestep_sampling": "importance"}, 1),
        ({"ema_lengths": (0.05, 0.1)}, 1),
        ({"precision": "fp16"}, 1),
        ({"learn_logvar": True, "timestep_sampling": "uniform"}, 10),
    ],
    ids=str,
)
def test_how_many_steps_a_call_makes(tmp_path, settings, steps):
    """As many as divide what happens every so many steps; one, where the host or another graph is needed at each step."""
    task = override(LONG, **settings).task()
    task.start(tmp_path / "run")
    assert task.steps_per_call == steps
    batch = next(task.batches())
    assert batch["t"].shape == ((steps, 32) if steps > 1 else (32,)) and batch["x_start"].shape == (*batch["t"].shape, 2)


@pytest.mark.slow
def test_averages_of_other_lengths(tmp_path):
    run = train(override(LONG, ema_lengths=(0.05, 0.1), total_steps=20), tmp_path / "run").home
    kept = [weights(run, 20, f"ema-{length}") for length in ("0.05", "0.1")]
    for length, expected in ((0.05, kept[0]), (0.1, kept[1])):
        for p in Run(run, ema_length=length).net.get_parameters():
            np.testing.assert_allclose(p.asnumpy(), expected[p.name], rtol=1e-4, atol=1e-5)
    between = {p.name: p.asnumpy() for p in Run(run, ema_length=0.07).net.get_parameters()}
    assert any((between[name] != values).any() for name, values in kept[0].items())
    with pytest.raises(UserError, match="--ema-length"):
        Run(run, ema_length=0.5)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data.num 300", "data"),
        ("--data.name spiral", "data"),
        ("--model.depth 2", "model"),
        ("--diffusion.objective x0", "diffusion"),
        ("--train.seed 1", "seed"),
        ("--preset scurve-seed", "model"),
    ],
)
def test_the_folder_of_another_run_is_refused(trained, flags, words):
    before = tree(trained.home)
    given = [flag for flag in FLAGS if "--preset" not in flags or flag not in ("--model.depth", "1")]
    assert_refused(call("train", "--run-dir", trained.home, *given, *flags.split()), f"another {words}", "--run-dir")
    assert tree(trained.home) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        *((f"--data.name points-file --data.dir {name}", name) for name in ("flat.npy", "same.npy", "empty", "missing.npy")),
        ("--data.name points-file --data.dir words.csv", "line 3"),
        ("--data.name points-file --data.dir few.npy --train.batch-size 33", "32 points"),
        ("--data.num 20", "20 points"),
        ("--data.name points-file", "--data.dir"),
        ("--data.dir words.csv", "points-file"),
        ("--data.name nonsense", "--data.name"),
        ("--data.num 0", "--data.num is 0"),
        ("--diffusion.num-timesteps 1001", "--model.num-embeddings"),
        ("--data.size 28", "unknown argument --data.size"),
        ("--model.num-classes 10", "unknown argument --model.num-classes"),
        ("--preset scurve-seed --model.depth 2", "unknown argument --model.depth"),
        ("--model.dim 7", "7"),
        ("--preset quick --data.num 100", "unknown argument --data.num"),
        ("--train.steps-per-call 0", "--train.steps-per-call is 0"),
        ("--train.sample-steps 13", "--train.sample-steps is 13"),
        ("--precision bf16 --device cpu", "bf16"),
        ("--run-dir file/below", "file"),
    ],
)
def test_bad_input_to_training(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"flat": rng.random(100), "same": np.ones((100, 2)), "few": rng.random((39, 2))}  # 7 are held out
    for name, values in arrays.items():
        np.save(f"{name}.npy", values)
    Path("words.csv").write_text("x,y\n1,2\nthree,four\n")
    Path("file").touch()
    Path("empty").mkdir()
    before = tree(tmp_path)
    given = [] if "--preset" in flags else ["--preset", "scurve", "--diffusion.num-timesteps", T, "--train.sample-steps", 2]
    assert_refused(call("train", "--train.batch-size", 32, *given, *flags.split()), words)
    assert tree(tmp_path) == before


def test_the_presets_are_what_they_are_called():
    for name in TOYS:
        assert PRESETS[name] == replace(PRESETS["scurve"], data=PointsDataConfig(name))
    assert PRESETS["scurve-seed"].data == PointsDataConfig("scurve") and PRESETS["scurve-seed"].model == MLPConfig()
    points = [name for name, config in PRESETS.items() if isinstance(config, PointsConfig)]
    assert points == [*TOYS, "scurve-seed", "scurve-exact", "scurve-flow"]


def test_the_exact_preset_is_the_experiments():
    """As in its code: torch.sigmoid(torch.linspace(-6, 6, 100)) * (0.5e-2 - 1e-5) + 1e-5, and points divided by 10."""
    config = PRESETS["scurve-exact"]
    with pytest.warns(UserWarning, match="x_T still holds data"):
        betas = config.diffusion.build().betas
    np.testing.assert_allclose(betas, 1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 100))), rtol=1e-9)
    task, x = config.task(), np.float32([[1, -2], [0, 0.5]])
    data, _ = task.load_data()
    np.testing.assert_allclose(data, task.points[0] / 10, rtol=1e-6)
    np.testing.assert_allclose(task.decode(x / 10), x, rtol=1e-6)
    train = config.train
    assert (train.lr, train.batch_size, train.timestep_sampling) == (1e-3, 128, "antithetic")
    assert not train.lr_decay and not train.warmup_steps and not train.ema_decay and config.diffusion.loss == "l2"


# The sample command


def test_the_sample_command_makes_all_pictures_and_the_scores(trained, tmp_path):
    """From a folder on ModelArts into another."""
    out, npz = tmp_path / "results", tmp_path / "x.npz"
    printed = succeed("sample", "--data_url", trained.home, "--train_url", out, "--num", 200, "--steps", 5, "--npz", npz)
    for name in PICTURES:
        pixels, frames = picture(out / name)
        assert min(pixels.shape[:2]) >= 300 and np.ptp(pixels) > 20 and frames == (6 if name == "denoise.gif" else 1)
        assert name in printed
    points, record = np.load(npz)["points"], json.loads((out / "scores.json").read_text())
    assert points.dtype == np.float32 and points.shape == (200, 2)
    assert_in_square(points, trained.task.normalizer.denormalize(np.array([[-1, -1], [1, 1]])))
    assert (record.pop("sampler"), record.pop("steps"), record.pop("num")) == ("ddim", 5, 200)
    assert tuple(record) == KINDS
    expected = compare(points, trained.task.test, np.random.default_rng(0))
    for name, distance in record.items():
        assert distance == pytest.approx(expected[name], rel=1e-5)
        assert 0 < distance["floor"] <= distance["floor_most"] < distance["score"]
        assert f"{distance['score']:.4f}" in printed


def render(run, folder, *flags):
    """The points that a loaded run draws."""
    args = request("--num", 50, "--steps", 5, "--npz", folder / "x.npz", *flags)
    written = run.task.render(run, args, folder)
    assert all(path.exists() for path in written)
    return np.load(folder / "x.npz")["points"]


def test_pictures_at_other_places(trained, tmp_path, no_pictures):
    plain = render(trained, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*PICTURES, "scores.json", "x.npz"}
    folder = tmp_path / "other"
    folder.mkdir()
    flags = ["--out", folder / "a.png", "--gif", folder / "b.gif"]
    np.testing.assert_array_equal(render(trained, tmp_path, *flags), plain)
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.gif"]


def test_samples_in_python_are_those_of_the_command(trained, tmp_path, no_pictures):
    plain = render(trained, tmp_path)
    np.testing.assert_allclose(trained.sample(50, steps=5), plain, atol=1e-6)
    np.testing.assert_allclose(render(trained, tmp_path, "--num", 12, "--batch-size", 50), plain[:12], atol=1e-4)
    full = render(trained, tmp_path, "--eta", 1)
    np.testing.assert_allclose(full, render(trained, tmp_path, "--sampler", "ddpm"), atol=1e-4)  # eta 1 is DDPM
    assert (full != plain).any()
    assert json.loads((tmp_path / "scores.json").read_text())["sampler"] == "ddpm"
    image = trained.show(plain)
    assert np.ptp(np.asarray(image)) > 100


def test_one_point_has_no_score(trained, tmp_path, no_pictures, capsys):
    (tmp_path / "scores.json").touch()  # of other points
    assert render(trained, tmp_path, "--num", 1).shape == (1, 2)
    assert "no score" in capsys.readouterr().out and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "flags, flag",
    [
        ("--inpaint left test:0", "--inpaint"),
        ("--init test:0", "--init"),
        ("--image test:0", "--image"),
        ("--interpolate test:0 test:1", "--interpolate"),
        ("--class 0", "--class"),
        ("--prompt boot", "--prompt"),
        ("--denoise-row x.png", "--denoise-row"),
        ("--resample 3", "--resample"),
        ("--strength 0", "--strength"),
        ("--guidance 3", "--guidance"),
        ("--guidance-rescale 0.5", "--guidance-rescale"),
        (f"--steps {T + 1}", f"--steps is {T + 1}"),
    ],
)
def test_flags_that_points_do_not_have(trained, tmp_path, flags, flag):
    with pytest.raises(UserError, match=flag):
        render(trained, tmp_path, *flags.split())
    assert list(tmp_path.iterdir()) == []


def test_no_likelihood_and_no_evaluation(trained):
    before = tree(trained.home)
    assert_refused(call("likelihood", trained.home), "points", "pixel space")
    assert_refused(call("evaluate", trained.home), "points", "sample")
    assert tree(trained.home) == before


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


def start(run, file):
    """The task of a run on these points, ready to train; the run has a checkpoint."""
    config = override(SMALL, **{"data.name": "points-file", "data.dir": str(file)})
    task = config.task()
    task.start(run)
    task.checkpoint.save(0)
    (run / "config.json").write_text(json.dumps(config.to_record()))
    return task


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_a_file_of_points_and_samples_in_its_units(tmp_path, no_pictures, suffix):
    points, folder = own_points(), tmp_path / "run"
    file = save_points(tmp_path / f"own{suffix}", points)
    task = start(folder, file)
    file.unlink()  # the run keeps its points
    saved = read_saved_points(folder / "points.npz")
    assert [len(each) for each in saved] == [240, 60] and abs(task.data).max() == pytest.approx(1)
    together = np.concatenate(saved)
    np.testing.assert_array_equal(together[np.argsort(together[:, 0])], np.float32(points[np.argsort(points[:, 0])]))
    if suffix == ".csv":
        return
    samples = render(Run(folder), tmp_path, "--num", 500, "--steps", T)
    assert_in_square(samples, saved[0])
    assert abs(samples.mean(0) - (1000, -1000)).max() < 50 and (np.ptp(samples, 0) > 25).all()
    assert json.loads((tmp_path / "scores.json").read_text())["sliced_wasserstein"]["floor"] > 1  # in units of the file


def test_other_points_need_another_folder(tmp_path):
    file, run = save_points(tmp_path / "own.npy", own_points()), tmp_path / "run"
    start(run, file)
    start(run, save_points(tmp_path / "copy.csv", np.float32(own_points())))  # the same points are welcome
    before = tree(run)
    with pytest.raises(UserError, match="another --run-dir"):
        start(run, save_points(file, own_points() + 1))
    assert tree(run) == before


def corrupt(path):
    path.write_bytes(b"garbage")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def other_arrays(path):
    np.savez(path, points=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("harm", [Path.unlink, corrupt, truncate, other_arrays])
def test_points_of_a_run_that_are_lost(trained, tmp_path, harm):
    """One line says so; training again, as it says, restores them. No file is left open, which would be a warning."""
    run = shutil.copytree(trained.home, tmp_path / "run")
    harm(run / "points.npz")
    before = tree(run)
    assert_refused(call("sample", run), "points.npz")
    assert tree(run) == before
    if (run / "points.npz").exists():
        with pytest.raises(UserError, match=r"points\.npz"):
            LONG.task().start(run)
        assert tree(run) == before
        (run / "points.npz").unlink()
    LONG.task().start(run)
    for saved, points in zip(*(read_saved_points(each / "points.npz") for each in (run, trained.home)), strict=True):
        np.testing.assert_array_equal(saved, points)
    gc.collect()


# How good the samples are


@pytest.mark.slow
def test_the_s_curve_is_learned(tmp_path, no_pictures):
    """In 2,000 steps its samples are about as far from held-out data as such data from each other; at first they are far."""
    config = override(PRESETS["scurve"], batch_size=128, sample_steps=2)

    def scores(steps, sampling_steps):
        run = train(override(config, total_steps=steps), tmp_path / str(steps))
        render(run, tmp_path, "--sampler", "ddpm", "--num", 5000, "--steps", sampling_steps)
        return json.loads((tmp_path / "scores.json").read_text())

    far, near = scores(1, 10), scores(2000, 100)
    assert all(far[kind]["score"] > 10 * far[kind]["floor"] for kind in KINDS)
    assert near["sliced_wasserstein"]["score"] < 2 * near["sliced_wasserstein"]["floor"]
    assert near["energy"]["score"] < 1.5 * near["energy"]["floor_most"]
    assert near["mmd"]["score"] < 1.5 * near["mmd"]["floor_most"]


@pytest.mark.slow
def test_rectified_flow_in_ten_calls(tmp_path):
    """With steps even in time the points are about as far from held-out data as fresh data can be; even in log-SNR they are
    farther."""
    run = train(PRESETS["scurve-flow"], tmp_path / "run")
    held_out = np.split(run.task.test, 2)
    fresh = [load_points("scurve", None, 10_000, seed)[0] for seed in range(10, 15)]
    most = max(sliced_wasserstein(data, points) for data in held_out for points in fresh)

    def distance(spacing):
        x = run.sample(10_000, sampler="dpmpp_2m", steps=10, spacing=spacing)
        return np.mean([sliced_wasserstein(data, x) for data in held_out])

    even = distance("trailing")
    assert even < 1.5 * most and even < distance("logsnr") / 2
