"""The Python API: the README's example as it stands, md.train, md.load, Run.sample, evaluate and show, md.sample."""

import ast
import contextlib
import io
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Affine
from PIL import Image

import ms_diffusion as md
from ms_diffusion.training.config import override
from ms_diffusion.training.tasks.points import PointsConfig

ROOT = Path(__file__).parents[1]
NET = {"dim": 8, "init_dim": 8, "dim_mults": (1,), "resnet_block_groups": 4}
TINY = {"batch_size": 8, "sample_num": 64, "sample_steps": 2, "num_timesteps": 20}


def tiny(preset, **values):
    return override(md.PRESETS[preset], **TINY, **values)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """What the README's example leaves in its variables, after few steps of a small network with classes; and its output."""
    text = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    smaller = {
        "total_steps=500": "total_steps=2",
        "steps=15": "steps=3",
        "num=1000": "num=130, steps=2, batch_size=64",  # the graph of run.sample
        "dim=28": "dim=8, dim_mults=(1,)",
        "num=16": "num=16, steps=2",
    }
    for number, other in smaller.items():
        assert number in text
        text = text.replace(number, other)
    training, loading, later = text.partition("run = md.load(")
    variables, out, folder = {}, io.StringIO(), tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setitem(md.PRESETS, "quick", tiny("quick-class", **NET))
        exec(training, variables)
        variables["trained"] = variables["run"]
        exec(loading + later, variables)
    return variables, out.getvalue(), folder


@pytest.fixture(scope="module")
def run(readme):
    """The run that the README's example trains."""
    return readme[0]["trained"]


def test_the_example_of_the_readme(readme):
    variables, out, folder = readme
    with Image.open(folder / "samples.png") as picture:
        assert min(picture.size) > 8 * 28
    scores = ast.literal_eval(out.splitlines()[-1])
    assert {"protocol", "samples", "floor"} <= set(scores)
    assert scores["samples"]["fid"] > scores["floor"]["fid"] > 0
    assert variables["x"].shape == (16, 1, 28, 28) and variables["x"].dtype == np.float32
    assert variables["run"].step == 2 and (folder / "runs/mine/checkpoints/step-0000002").is_dir()


def test_samples_of_a_run(run):
    seen = []
    options = {"sampler": "dpmpp_2m", "steps": 2}
    x = run.sample(64, **options, callback=lambda i, x, x_start: seen.append((i, x.shape)))
    assert x.shape == (64, 28, 28, 1) and x.dtype == np.uint8 and seen == [(0, (64, 1, 28, 28)), (1, (64, 1, 28, 28))]
    raw = run.sample(64, raw=True, **options)
    assert raw.shape == (64, 1, 28, 28) and raw.dtype == np.float32 and abs(raw).max() <= 1
    np.testing.assert_array_equal(md.to_uint8(raw), x)
    few = run.sample(5, raw=True, **options, batch_size=64)  # a smaller number, the same noise
    np.testing.assert_allclose(few, raw[:5], atol=2e-3)
    assert abs(run.sample(5, raw=True, seed=1, **options, batch_size=64) - few).max() > 0.1
    picture = run.show(x)
    assert isinstance(picture, Image.Image) and min(picture.size) > 8 * 28


def test_labels(run):
    options = {"num": 64, "steps": 1, "raw": True}
    in_turn = run.sample(**options)
    np.testing.assert_array_equal(run.sample(labels=np.arange(64) % 10, **options), in_turn)
    boots = run.sample(labels=9, **options)
    np.testing.assert_array_equal(run.sample(labels="Ankle boot", **options), boots)
    np.testing.assert_array_equal(boots[9], in_turn[9])
    assert (boots[0] != in_turn[0]).any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num": 0}, "num is 0"),
        ({"num": "3"}, "num is '3'"),
        ({"num": 2.5}, "num is 2.5"),
        ({"stesp": 3}, "stesp"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 21}, "20"),
        ({"sampler": "eulr"}, "eulr"),
        ({"seed": -1}, "seed is -1"),
        ({"eta": 0.5, "sampler": "heun"}, "eta"),
        ({"guidance_interval": (0, 5), "guidance": 1.0}, "guidance"),
        ({"labels": 11}, "11"),
        ({"labels": "hat"}, "hat"),
        ({"labels": np.arange(3)}, "labels"),
        ({"labels": 0.5}, "labels"),
        ({"prompt": "a hat"}, "prompt"),
        ({"pictures": np.zeros((1, 28, 28, 1), np.uint8)}, "image condition"),
    ],
)
def test_bad_options_of_sample(run, options, word):
    with pytest.raises(md.UserError, match=word):
        run.sample(**{"steps": 2} | options)


def test_load(readme, run, tmp_path):
    folder = readme[2] / "runs/mine"
    for which in (folder, folder / "checkpoints/step-0000002", folder / "checkpoints/step-0000002/ema.safetensors"):
        again = md.load(which)
        assert again.step == 2 and again.config == run.config and not again.net.training
    model = md.load(folder, weights="model")
    weights = [{p.name: p.asnumpy() for p in each.net.get_parameters()} for each in (run, model)]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(md.UserError, match=str(wrong)):
            md.load(wrong)
    with pytest.raises(md.UserError, match="--train.ema-lengths"):
        md.load(folder, ema_length=0.1)


def test_the_bundled_model():
    assert "fashion-mnist-large" in md.bundled_models()
    run = md.load("fashion-mnist-large")
    assert run.config.model == md.PRESETS["fashion-mnist-large"].model and run.step == run.config.train.total_steps
    assert sum(p.size for p in run.net.trainable_params()) == 2_482_372
    assert run.task.labelling.label_array("trouser", 2).tolist() == [1, 1] and run.task.image_format() == (28, 1)


# Training on the user's own data


def test_train_on_arrays(tmp_path):
    rng, saved = np.random.default_rng(0), []
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8), rng.integers(0, 3, 40)
    config = tiny("quick-class", **NET, num_classes=3, flip=False)
    stop = threading.Event()
    stop.set()  # after the first step, without a preview
    run = md.train(config, tmp_path / "run", (images, labels), stop=stop, on_save=saved.append)
    assert saved == [tmp_path / "run"] and run.step == 1
    assert (run.config.data.name, run.config.data.size, run.config.model.channels) == ("arrays", 8, 3)
    assert run.sample(4, steps=1).shape == (4, 8, 8, 3)
    with pytest.raises(md.UserError, match="28 x 28"):
        run.evaluate(200)
    with pytest.raises(md.UserError, match="arrays"):
        md.load_images("arrays", None, "test", 8, 3)
    task = md.load(tmp_path / "run").config.task((images, labels))
    np.testing.assert_array_equal(task.load_data()[0], images)


def test_train_on_points(tmp_path):
    points = np.random.default_rng(0).normal((100, -5), (20, 0.1), (100, 2))
    config = tiny("scurve", dim=8, depth=1, steps_per_call=1, objective="v")
    run = md.train(config, tmp_path / "run", points, total_steps=2)
    x = run.sample(64, steps=2)
    assert x.shape == (64, 2) and np.isfinite(x).all() and 40 < x[:, 0].mean() < 160  # in the data's units
    assert isinstance(run.show(x), Image.Image) and isinstance(run.config, PointsConfig)
    kept = np.load(tmp_path / "run/points.npz")
    np.testing.assert_allclose(np.sort(np.concatenate([kept["train"], kept["test"]]), 0), np.sort(points, 0), rtol=1e-6)
    with pytest.raises(md.UserError, match="points"):
        run.evaluate(200)


def test_train_on_a_folder_or_a_data_set_by_name(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((40, 30), i, np.uint8)).save(tmp_path / f"{i}.png")
    config, given = md.PRESETS["quick"].with_data(tmp_path)
    assert given is None and (config.data.name, config.data.dir) == ("image-folder", str(tmp_path))
    assert config.task().load_data()[0].shape == (3, 28, 28, 1)
    config, given = md.PRESETS["fashion-mnist"].with_data("fashion-mnist-mini")
    assert given is None and len(config.task().load_data()[0]) == 2000
    config, _ = md.PRESETS["scurve"].with_data("spiral")
    assert config.data.name == "spiral"
    config, _ = md.PRESETS["scurve"].with_data("mine.csv")
    assert (config.data.name, config.data.dir) == ("points-file", "mine.csv")


IMAGES = np.zeros((20, 28, 28, 1), np.uint8)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (IMAGES.astype(np.float32), "uint8"),
        (IMAGES[:, :20], "square"),
        (IMAGES[..., 0], "shape"),
        ((IMAGES, np.zeros(19, np.int32)), "labels"),
        ((IMAGES, np.zeros(20)), "labels"),
        (np.zeros((20, 30, 30, 1), np.uint8)[:, :29, :29], "--data.size"),
        ("nowhere", "nowhere"),
        (IMAGES[:3], "3 images"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, data, word):
    with pytest.raises(md.UserError, match=word):
        md.train("quick", tmp_path / "run", data, total_steps=1)
    assert not (tmp_path / "run").exists()


def test_bad_arguments_of_train(tmp_path):
    for config, values, word in (
        ("quik", {}, "quik"),
        ("quick", {"total_step": 1}, "total_steps"),
        ("quick", {"lr": -1.0}, "--train.lr"),
        ("quick", {"cond_channels": "x"}, "--model.cond-channels"),
        ("autoencoder", {"ch_mult": 4}, "--model.ch-mult"),
        ("quick", {"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(md.UserError, match=word):
            md.train(config, tmp_path / "run", **values)
    with pytest.raises(md.UserError, match="run_dir"):
        md.train(md.PRESETS["quick"])
    for run in (None, "", 5):
        with pytest.raises(md.UserError, match="folder"):
            md.load(run)
        with pytest.raises(md.UserError, match="run_dir"):
            md.train(md.PRESETS["quick"], run)
    assert not (tmp_path / "run").exists()


# Any network


def test_sample_with_any_cell():
    """A network that always predicts x_0 = 0.3 draws 0.3, whatever the sampler."""
    net, diffusion = Affine(0, 0.3), md.GaussianDiffusion(md.cosine_beta_schedule(50), objective="x0")
    for sampler in ("ddim", "dpmpp_2m"):
        x = md.sample(net, diffusion, (2, 3), num=4, sampler=sampler, steps=5)
        assert x.shape == (4, 2, 3)
        np.testing.assert_allclose(x, np.full((4, 2, 3), 0.3), atol=1e-5)
    with pytest.raises(md.UserError, match="null_label"):
        md.sample(net, diffusion, (2, 3), guidance=2.0)
    with pytest.raises(md.UserError, match="50"):
        md.sample(net, diffusion, (2, 3), steps=51)
    with pytest.raises(md.UserError, match="stesp"):
        md.sample(net, diffusion, (2, 3), stesp=1)


def test_configurations_are_values():
    config = replace(md.PRESETS["quick"], precision="fp16")
    assert config != md.PRESETS["quick"] and replace(config, precision="fp32") == md.PRESETS["quick"]
