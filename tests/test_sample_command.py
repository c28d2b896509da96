"""The sample command: what it draws, writes and refuses. Edits of images are in test_edits.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import MINI, PIXELS, UNET, assert_refused, call, checkpoint, draw, picture, request, succeed, tree, untrained

from mindspore import Tensor

from ms_diffusion import images
from ms_diffusion.data.fashion_mnist import CLASSES, load_fashion_mnist_mini
from ms_diffusion.data.image_folder import load_image_folder
from ms_diffusion.runtime import UserError
from ms_diffusion.training import runs as trained_runs
from ms_diffusion.training.checkpoint import Checkpoint
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run, open_run

T = 20
TEST_IMAGES = load_fashion_mnist_mini("test")[0]  # (N, 28, 28, 1) uint8


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run without classes."""
    return Run(untrained(tmp_path_factory.mktemp("plain") / "run", PIXELS, step=6))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def conditional(folder, photos, condition, channels):
    """A run on a folder of 3 colour images of 8 x 8 pixels, with an image condition."""
    data = replace(PIXELS.data, name="image-folder", dir=str(photos), size=8, condition=condition)
    return Run(untrained(folder, replace(PIXELS, data=data, model=replace(UNET, channels=3, cond_channels=channels))))


@pytest.fixture
def sheet(tmp_path):
    """The pixels of the grid that was drawn, and those of images in a grid with these options."""

    def sheet(shown, **options):
        images.save_grid(tmp_path / "expected.png", shown, **options)
        return picture(tmp_path / "out.png")[0], picture(tmp_path / "expected.png")[0]

    return sheet


# The command


def test_what_the_command_writes(class_run, tmp_path):
    """By the run's newest checkpoint; the same images as another process draws, in batches of another size."""
    run = shutil.copytree(class_run.home, tmp_path / "run")
    before = tree(run)
    files = {name: tmp_path / name for name in ("x.npz", "x.gif", "row.png")}
    flags = ["--npz", files["x.npz"], "--gif", files["x.gif"], "--denoise-row", files["row.png"]]
    out = succeed("sample", run, "--num", 10, "--batch-size", 10, "--steps", 3, *flags)
    for path in (run / "sample.png", *files.values()):
        assert path.exists() and str(path) in out
    assert "step 6" in out
    assert {str(name) for name in tree(run).keys() - before.keys()} == {"sample.png"}
    with np.load(files["x.npz"]) as file:
        drawn, labels = file["images"], file["labels"]
    assert drawn.shape == (10, 28, 28, 1) and drawn.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.arange(10))
    again, _ = draw(class_run, tmp_path, "--num", 10)
    assert abs(again.astype(int) - drawn).max() <= 1

    # One frame a step, whose last is the images; a row for each of the first 8 images, whose last is the image itself
    last, frames = picture(files["x.gif"])
    assert frames == 3
    with Image.open(files["x.gif"]) as gif:
        gif.seek(2)
        np.testing.assert_array_equal(np.asarray(gif.convert("L"))[::2, ::2], images.grid(drawn, 10)[..., 0])
    row = picture(files["row.png"])[0][::2, ::2]
    assert row.shape == images.grid(np.zeros((24, 28, 28, 1), np.uint8), 3)[..., 0].shape
    ends = images.grid(np.stack([drawn[:8]] * 3, 1).reshape(24, 28, 28, 1), 3)[..., 0]
    np.testing.assert_allclose(row[:, -30:].astype(int), ends[:, -30:], atol=1)


def test_a_folder_goes_before_a_bundled_model_of_its_name(class_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = trained_runs.bundled_models()[0]
    bundled = trained_runs.WEIGHTS / name
    for path in (name, bundled / "ema.safetensors"):
        home, found = open_run(path)
        assert home == found.folder == bundled
    shutil.copytree(class_run.home, name)
    home, found = open_run(name)
    assert (found.folder, home) == (checkpoint(name, 6), Path(name))
    home, found = open_run(checkpoint(name, 6))
    assert found.folder == checkpoint(name, 6) and home.samefile(name)


def test_a_spoilt_checkpoint_is_passed_over(tmp_path, capsys):
    """Also where config.json is lost. Reading changes nothing; a checkpoint that is asked for by its name is refused."""
    for step in (1, 2):
        run = untrained(tmp_path / "run", PIXELS, step)
        Checkpoint(run, PIXELS.task().build()[0]).update(step, config=PIXELS.to_record())
    (checkpoint(run, 2) / "ema.safetensors").write_bytes(b"spoilt")
    (run / "config.json").unlink()
    before = tree(run)
    assert Run(run).step == 1 and capsys.readouterr().err.count("warning: ") == 2
    assert Run(checkpoint(run, 1)).config == PIXELS
    assert tree(run) == before
    with pytest.raises(UserError, match="step-0000002"):
        Run(checkpoint(run, 2))


def test_bundled_models(tmp_path, monkeypatch):
    """They are listed with their scores, load, and denoise what is hardly noised; no run means one of them."""
    monkeypatch.chdir(tmp_path)
    listed = succeed("sample", "--list")
    for name in trained_runs.bundled_models():
        assert any(line.startswith(f"{name} ") and ("FID" in line or "bits" in line) for line in listed.splitlines())
        run = Run(name)
        noise, label = np.random.default_rng(0).standard_normal((2, 1, 28, 28)), Tensor(np.int32([9, 2]))
        x_start = images.to_float(TEST_IMAGES[:2])
        t = int(np.searchsorted(-run.diffusion.alphas_cumprod, -0.9))
        a = run.diffusion.alphas_cumprod[t]
        x_t = Tensor((np.sqrt(a) * x_start + np.sqrt(1 - a) * noise).astype(np.float32))
        predicted = run.net(x_t, Tensor([t, t]), *([label] if run.task.labelling.field else []))
        predicted = run.diffusion.predict_start(predicted, x_t, Tensor([t, t])).asnumpy()
        others = trained_runs.FAST, "fashion-mnist-likelihood"  # of few calls, and of likelihoods: more of the noise stays
        most = 0.4 if name in others else 0.2
        assert abs(predicted - x_start).mean() < most * abs(x_t.asnumpy() / np.sqrt(a) - x_start).mean()
        for flags, words in ((["--weights", "model"], "model.safetensors"), (["--ema-length", 0.1], "--train.ema-lengths")):
            assert_refused(call("sample", name, *flags), words)
    defaults = {trained_runs.default_run(), trained_runs.default_run(fast=True)}
    assert defaults == set(trained_runs.bundled_models()) - {"fashion-mnist-likelihood", trained_runs.BEST}
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(trained_runs, "WEIGHTS", tmp_path / "nothing")
    assert succeed("sample", "--list").strip() == ""
    assert_refused(call("sample"), "no run")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--num", 2, "--seed", 3, "--class", 4], trained_runs.FAST),
        (["--num", 1, "--sampler", "consistency", "--steps", 1], trained_runs.FAST),
        (["--num", 1, "--steps", 1], trained_runs.DEFAULT),
        (["--num", 1, "--guidance", 3, "--steps", 1], trained_runs.DEFAULT),
        (["--num", 1, "--init", "test:0", "--steps", 2], trained_runs.DEFAULT),
    ],
)
def test_no_run_means_a_bundled_model_that_can_do_it(tmp_path, monkeypatch, flags, name):
    """That of two network calls for plain samples, and says so; the default for all else. Pictures are those of its name."""
    monkeypatch.chdir(tmp_path)
    printed = succeed("sample", *flags, "--out", "without.png")
    assert (trained_runs.FAST in printed) == (name == trained_runs.FAST)
    succeed("sample", name, *flags, "--out", "with.png")
    np.testing.assert_array_equal(picture("without.png")[0], picture("with.png")[0])


@pytest.mark.slow
def test_the_bundled_models_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in trained_runs.bundled_models():
        before = tree(trained_runs.WEIGHTS)
        succeed("sample", name, "--num", 10, "--steps", 2, "--npz", "x.npz")
        assert np.load("x.npz")["images"].std() > 20
        assert tree(trained_runs.WEIGHTS) == before


def test_weights_and_checkpoints(tmp_path):
    """The average, the network as trained, a checkpoint before the newest."""
    run = untrained(tmp_path / "run", PIXELS, step=2)
    untrained(run, PIXELS, step=4, noise=0.1)

    def weights(*args):
        return {p.name: p.asnumpy() for p in Run(*args).net.get_parameters()}

    newest, first = weights(run), weights(checkpoint(run, 2))
    for same in (checkpoint(run, 4), checkpoint(run, 4) / "ema.safetensors"):
        assert all((values == newest[name]).all() for name, values in weights(same).items())
    assert all((values == first[name]).all() for name, values in weights(run, "model").items())
    assert any((values != newest[name]).any() for name, values in first.items())
    assert (Run(run).step, Run(checkpoint(run, 2)).step) == (4, 2)


def test_a_run_in_the_format_of_before(class_run, tmp_path):
    """A config.json without `kind`, with fields of all kinds and old names, is read."""
    config = replace(class_run.config, data=replace(class_run.config.data, dir=None))
    record = {name: value for name, value in config.to_record().items() if name not in ("kind", "version")}
    record["diffusion"]["timesteps"] = record["diffusion"].pop("num_timesteps")
    record["train"]["timesteps"] = record["train"].pop("timestep_sampling")
    record["train"] |= {"disc_start": 5000, "betas": [0.9, 0.999], "vgg": None, "kl_weight": 1e-6}
    record |= {"first_stage": None, "latent_scale": None, "first_stage_patch": None}
    run = shutil.copytree(class_run.home, tmp_path / "run")
    (run / "config.json").write_text(json.dumps(record))
    old = Run(run)
    assert old.config == config
    for p, q in zip(old.net.get_parameters(), class_run.net.get_parameters(), strict=True):
        np.testing.assert_array_equal(p.asnumpy(), q.asnumpy())


# Classes


def test_classes_in_turn(class_run, tmp_path, sheet):
    """Image i is of class i mod 10, the same as of that class alone; in column i mod 10, with the name below it."""
    in_turn, labels = draw(class_run, tmp_path, "--num", 20)
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    np.testing.assert_array_equal(*sheet(in_turn, columns=10, scale=3, captions=[*CLASSES] * 2))
    for label in (0, 9):
        alone, labels = draw(class_run, tmp_path, "--num", 12, "--class", label)
        np.testing.assert_array_equal(labels, [label] * 12)
        assert abs(alone[label].astype(int) - in_turn[label]).max() <= 1
        assert all(abs(alone[i].astype(int) - in_turn[i]).max() > 1 for i in range(12) if i % 10 != label)
        np.testing.assert_array_equal(*sheet(alone))
    twelve, _ = draw(class_run, tmp_path, "--num", 12)
    assert abs(twelve.astype(int) - in_turn[:12]).max() <= 1
    np.testing.assert_array_equal(*sheet(twelve, scale=3, captions=[*CLASSES, *CLASSES[:2]]))


def test_a_class_by_name(class_run, tmp_path):
    by_name, labels = draw(class_run, tmp_path, "--class", "Ankle Boot")
    np.testing.assert_array_equal(labels, [9] * 4)
    np.testing.assert_array_equal(draw(class_run, tmp_path, "--class", 9)[0], by_name)
    np.testing.assert_array_equal(class_run.sample(4, labels="ankle boot", steps=3), by_name)
    np.testing.assert_array_equal(class_run.sample(4, labels=np.full(4, 9), steps=3), by_name)


def test_where_there_are_no_names(plain_run, photos, tmp_path):
    """Without classes, and with classes of a folder, of which only the numbers are known."""
    plan = plain_run.task.plan(plain_run, request())
    assert plan.labels is None and plan.captions is None and plan.columns is None and plan.cond == {}
    data = replace(PIXELS.data, name="image-folder", dir=str(photos), size=8)
    run = Run(untrained(tmp_path / "run", replace(PIXELS, data=data, model=replace(UNET, channels=3, num_classes=3))))
    plan = run.task.plan(run, request("--num", 6))
    assert plan.captions is None and plan.columns == 3
    np.testing.assert_array_equal(plan.labels, [0, 1, 2] * 2)


def test_guidance_by_hand(class_run, tmp_path):
    """One step from the image's own noise: x_0 = uncond + 9 (cond - uncond), clipped at the end and nowhere before."""
    flags = ["--init", "test:0", "--strength", 1 / T, "--steps", T, "--class", 3, "--guidance", 9]
    found, _ = draw(class_run, tmp_path, *flags)
    a = class_run.diffusion.alphas_cumprod[0]
    noise = np.stack([np.random.default_rng((0, i)).standard_normal((1, 28, 28), dtype=np.float32) for i in range(4)])
    x = (np.sqrt(a) * images.to_float(TEST_IMAGES[:1]) + np.sqrt(1 - a) * noise).astype(np.float32)
    t, zeros = Tensor(np.zeros(4, np.int32)), Tensor(np.zeros_like(x))
    eps = [class_run.net(Tensor(x), t, Tensor(np.full(4, label, np.int32)), zeros).asnumpy() for label in (3, 10)]
    cond, uncond = ((x - np.sqrt(1 - a) * each) / np.sqrt(a) for each in eps)
    assert abs(found.astype(int) - images.to_uint8(uncond + 9 * (cond - uncond))).max() <= 1


def test_guidance_of_0_ignores_the_class(class_run, tmp_path):
    def drawn(*flags):
        return draw(class_run, tmp_path, *flags)[0]

    without = drawn("--class", 3, "--guidance", 0)
    np.testing.assert_array_equal(drawn("--class", 7, "--guidance", 0), without)
    assert (drawn("--class", 3) != without).any() and (drawn("--class", 3) != drawn("--class", 7)).any()
    edit = ["--init", "test:0", "--strength", 1]
    unlabelled, labels = draw(class_run, tmp_path, *edit)
    assert labels is None  # an edit without a class has none
    np.testing.assert_allclose(drawn(*edit, "--class", 3, "--guidance", 0).astype(int), unlabelled, atol=1)
    labelled, labels = draw(class_run, tmp_path, *edit, "--class", 7)
    np.testing.assert_array_equal(labels, [7] * 4)
    assert (labelled != unlabelled).any()


# Image conditions


def test_upscaling_shows_condition_sample_and_original(tmp_path, sheet):
    data = replace(MINI, condition="lowres")
    run = Run(untrained(tmp_path / "run", replace(PIXELS, data=data, model=replace(UNET, cond_channels=1)), noise=0.05))
    upscaled, labels = draw(run, tmp_path)
    assert labels is None
    means = TEST_IMAGES[:4].astype(float).reshape(4, 7, 4, 7, 4).mean((2, 4)).repeat(4, 1).repeat(4, 2)
    lowres = images.to_uint8((means / 127.5 - 1)[:, None])
    shown = np.stack([lowres, upscaled, TEST_IMAGES[:4]], 1).reshape(12, 28, 28, 1)
    found, expected = (pixels.astype(int) for pixels in sheet(shown, columns=12))
    assert abs(found - expected).max() <= 1
    one, _ = draw(run, tmp_path, "--image", "test:1")
    assert abs(one[1].astype(int) - upscaled[1]).max() <= 1  # the same image and noise
    assert len({image.tobytes() for image in one}) == 4
    np.testing.assert_array_equal(run.sample(4, pictures=TEST_IMAGES[1:2], steps=3), one)
    np.testing.assert_array_equal(run.sample(4, steps=3), upscaled)

    for flags in (["--init", "test:0"], ["--inpaint", "left", "test:0"], ["--interpolate", "test:0", "test:1"]):
        with pytest.raises(UserError, match=f"--image, not {flags[0]}"):
            draw(run, tmp_path, *flags)
    for flags, word in (
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", "test:0", "test:500"], "test:500"),
        (["--guidance", 2], "--guidance is 2"),
    ):
        with pytest.raises(UserError, match=word):
            draw(run, tmp_path, *flags)


def test_images_are_repeated_to_the_number_that_is_drawn(photos, tmp_path):
    """Given ones, and test images where there are too few; gray is shown in gray, and what a mask hides in mid-gray."""
    run = conditional(tmp_path / "gray", photos, "gray", 1)
    shapes = []
    for flags in ([], ["--image", *(photos / f"{i}.png" for i in range(3))]):
        plan = run.task.plan(run, request("--num", 4, *flags))
        assert plan.cond["cond_image"].shape == (4, 1, 8, 8)
        found = images.to_uint8(plan.arrange(np.zeros((4, 3, 8, 8), np.float32))).reshape(4, 3, 8, 8, 3)
        np.testing.assert_array_equal(found[:, 2], load_image_folder(photos, 8, 3).images[[0, 1, 2, 0]])
        assert (found[:, 1] == 128).all()
        assert abs(found[:, 0] - found[:, 2].mean(-1, keepdims=True)).max() <= 1
        shapes.append(found.shape)
    masked = conditional(tmp_path / "mask", photos, "mask", 4)
    plans = [masked.task.plan(masked, request("--num", num, "--seed", seed)) for num, seed in ((4, 0), (7, 0), (4, 1))]
    conds = [plan.cond["cond_image"] for plan in plans]
    shown, hidden = conds[0][:, :3], conds[0][:, 3:]
    assert set(np.unique(hidden)) == {-1, 1} and (shown[np.broadcast_to(hidden == 1, shown.shape)] == 0).all()
    np.testing.assert_array_equal(conds[1][:4], conds[0])  # a few are the first of many
    assert (conds[2] != conds[0]).any()


# What is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--class 10", ("--class 10", "9")),
        ("--class nonsense", ("--class nonsense", CLASSES[3])),
        ("--guidance 2 --guidance-interval 9", ("guidance-interval",)),
        ("--guidance nan", ("--guidance",)),
        ("--steps 21", ("--steps is 21", "20")),
        ("--eta 0.5 --sampler heun", ("--eta", "ddim")),
        ("--sampler nonsense", ("nonsense",)),
        ("--spacing nonsense", ("nonsense",)),
        ("--num x", ("num",)),
        ("--image test:0", ("--image", "no image condition")),
        ("--prompt boot", ("--prompt",)),
        ("--prompt boot --init test:0", ("--prompt",)),
        ("--strength 0.5", ("--strength",)),
        ("--resample 2", ("--resample",)),
    ],
)
def test_flags_that_do_not_fit(class_run, tmp_path, flags, words):
    with pytest.raises(UserError) as error:
        draw(class_run, tmp_path, *flags.split())
    for word in words:
        assert word in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num", 0], ["--num is 0"]),
        (["--num", -3], ["--num is -3"]),
        (["--stpes", 3], ["--stpes", "--steps"]),
        (["--steps", 21], ["--steps is 21"]),
        (["--ema-length", 0.1], ["--train.ema-lengths"]),
        (["--device", "tpu"], ["tpu"]),
    ],
)
def test_the_command_ends_with_one_line(class_run, flags, words):
    before = tree(class_run.home)
    assert_refused(call("sample", class_run.home, *flags), *words)
    assert tree(class_run.home) == before


@pytest.mark.parametrize("flags, flag", [("--class 0", "--class"), ("--guidance 2", "--guidance")])
def test_a_run_without_classes(plain_run, tmp_path, flags, flag):
    with pytest.raises(UserError, match=f"(no classes|{flag}).*(no classes|{flag})"):
        draw(plain_run, tmp_path, *flags.split())


def test_classes_without_dropout(tmp_path):
    """Nothing stands for no class: no guidance, and no edit without a class."""
    config = replace(PIXELS, model=replace(UNET, num_classes=10), train=replace(PIXELS.train, label_dropout=0.0))
    run = Run(untrained(tmp_path / "run", config))
    for flags in (["--guidance", 2], ["--guidance", 2, "--class", 1], ["--init", "test:0"]):
        with pytest.raises(UserError, match="--train.label-dropout 0"):
            draw(run, tmp_path, *flags)
    for flags in ([], ["--class", 3], ["--class", 3, "--init", "test:0"]):
        assert run.task.plan(run, request(*flags)).sampling.guidance == 1


def test_a_runs_own_guidance(class_run):
    """It is the default, with its interval; not of interpolation, and of an edit only with a class."""

    def guidance(*flags):
        sampling = class_run.task.plan(class_run, request("--steps", 4, *flags)).sampling
        return sampling.guidance, sampling.guidance_interval

    assert guidance() == guidance("--class", 3) == guidance("--init", "test:0", "--class", 3) == (2.0, (10, 19))
    assert guidance("--guidance", 2) == (2.0, None) and guidance("--guidance", 1) == (1.0, None)
    assert guidance("--guidance-interval", 0, 5) == (2.0, (0, 5))
    assert guidance("--init", "test:0") == (1.0, None)
    assert guidance("--interpolate", "test:0", "test:1", "--class", 3) == (1.0, None)


def test_how_many_if_no_number_is_given(class_run):
    numbers = [class_run.task.plan(class_run, request("--steps", 4, *flags)).num for flags in ([], ["--init", "test:0"])]
    assert numbers == [64, 8]
    assert PRESETS["quick-class"].model.num_classes == 10


def test_a_run_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert_refused(call("sample", "nowhere"), "nowhere")
    assert_refused(call("sample", "empty"), "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
