"""Edits of images with a run in pixel space: inpainting, image to image, interpolation."""

import numpy as np
import pytest
from PIL import Image
from runs import PIXELS, draw, picture, request, tree, untrained

from ms_diffusion import images
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SAMPLERS, is_stochastic
from ms_diffusion.training.config import override
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.edits import read_mask

T = 20
TEST_IMAGES = load_fashion_mnist_mini("test")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with pictures of several sizes and with files that are none."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("small.png", 14), ("photo.png", 28), ("large.png", 56)):
        Image.fromarray(np.full((size, size), 200, np.uint8)).save(name)
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "corrupt.png").write_bytes(whole[:33] + b"\0\0\0\1\1\1\1\1" + whole[41:])
    Image.new("L", (28, 28)).save("bomb.bmp")
    header = bytearray((tmp_path / "bomb.bmp").read_bytes())
    header[18:26] = (200_000).to_bytes(4, "little") * 2  # it claims to be 200,000 pixels wide and high
    (tmp_path / "bomb.bmp").write_bytes(header)
    (tmp_path / "directory").mkdir()
    return tmp_path


def assert_sheet(path, shown, columns):
    """The picture shows exactly these images."""
    images.save_grid(path.with_name("expected.png"), shown, columns, 4)
    np.testing.assert_array_equal(picture(path)[0], picture(path.with_name("expected.png"))[0])


def rms(a, b):
    return np.sqrt(np.mean((a.astype(float) - b) ** 2))


# Inpainting


@pytest.mark.parametrize(
    "mask, painted",
    [
        ("left", np.s_[:, :14]),
        ("right", np.s_[:, 14:]),
        ("top", np.s_[:14]),
        ("bottom", np.s_[14:]),
        ("center", np.s_[7:21, 7:21]),
        ("mask.png", np.s_[3:9, 20:]),
    ],
)
def test_masks(class_run, folder, mask, painted):
    hidden = np.zeros((28, 28), np.uint8)
    hidden[painted] = 255
    Image.fromarray(hidden).save("mask.png")
    np.testing.assert_array_equal(read_mask(class_run.task, mask, "test:2"), (hidden == 0)[None, None])


def test_a_mask_is_scaled_together_with_its_image(class_run, folder):
    mask = np.zeros((56, 56), np.uint8)
    mask[:, 28:] = 255
    Image.fromarray(mask).save("mask.png")
    known = read_mask(class_run.task, "mask.png", "large.png")[0, 0]
    assert known[:, :13].all() and not known[:, 15:].any()


EXTRAS = (["--sampler", "ddpm", "--resample", 3], ["--eta", 1])


@pytest.mark.parametrize("flags", [*(["--sampler", name] for name in SAMPLERS), *EXTRAS], ids=str)
def test_inpainting_keeps_the_known_pixels(class_run, folder, flags):
    original = TEST_IMAGES[2]
    painted, labels = draw(class_run, folder, "--inpaint", "left", "test:2", "--class", 1, "--guidance", 2, *flags)
    np.testing.assert_array_equal(labels, [1] * 4)
    np.testing.assert_array_equal(painted[:, :, 14:], np.stack([original[:, 14:]] * 4))
    assert all((image[:, :14] != original[:, :14]).mean() > 0.5 for image in painted)
    assert len({image.tobytes() for image in painted}) == 4
    hole = original.copy()
    hole[:, :14] = 128
    assert_sheet(folder / "out.png", np.concatenate([original[None], hole[None], painted]), 6)


def test_resampling_calls_the_network_more_often(class_run, folder):
    flags = ["--inpaint", "left", "test:2", "--gif", folder / "x.gif", "--sampler", "ddpm"]
    plain, labels = draw(class_run, folder, *flags)
    assert labels is None and picture("x.gif")[1] == 3
    resampled, _ = draw(class_run, folder, *flags, "--resample", 4)
    assert picture("x.gif")[1] == 12
    assert (resampled != plain).any()
    full, _ = draw(class_run, folder, *flags, "--resample", 4, "--v-posterior", 1)
    assert (full != resampled).any()


def test_a_network_that_is_conditioned_on_masks_sees_the_users_mask(tmp_path):
    run = Run(untrained(tmp_path / "run", override(PIXELS, **{"data.condition": "mask", "cond_channels": 2})))
    plan = run.task.plan(run, request("--inpaint", "left", "test:2", "--steps", 3))
    original = images.to_float(TEST_IMAGES[2:3])
    seen = np.where(np.arange(28) < 14, 0, original)
    np.testing.assert_array_equal(plan.cond["cond_image"], np.concatenate([seen, hidden(14)], 1).repeat(8, 0))
    assert plan.denoise is None and plan.start is None
    pasted = plan.paste(np.zeros((8, 1, 28, 28), np.float32))
    np.testing.assert_array_equal(pasted, seen.repeat(8, 0))
    with pytest.raises(UserError, match="--image, not --init"):
        run.task.plan(run, request("--init", "test:2", "--steps", 3))


def hidden(columns):
    return np.broadcast_to(np.where(np.arange(28) < columns, np.float32(1), np.float32(-1)), (1, 1, 28, 28))


# Image to image


def test_the_strength_of_image_to_image(class_run, folder):
    """At the last timestep there is next to no noise to remove; the earlier the start, the less is kept of the image."""
    image, flags = TEST_IMAGES[3], ["--init", "test:3", "--steps", 10]
    near, middle, far = (draw(class_run, folder, *flags, "--strength", s)[0] for s in (0.05, 0.3, 1))
    distances = [rms(drawn, image) for drawn in (near, middle, far)]
    assert 0 < distances[0] < 25 and 1.5 * distances[0] < distances[1] < distances[2]
    assert len({i.tobytes() for i in near}) == len({i.tobytes() for i in far}) == 4
    assert_sheet(folder / "out.png", np.concatenate([image[None], far]), 5)
    np.testing.assert_array_equal(draw(class_run, folder, *flags)[0], draw(class_run, folder, *flags, "--strength", 0.6)[0])
    seven, _ = draw(class_run, folder, *flags, "--num", 7)
    assert abs(seven[:4].astype(int) - draw(class_run, folder, *flags)[0]).max() <= 1  # a few are the first of many


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_with_every_sampler(class_run, folder, sampler):
    drawn, _ = draw(class_run, folder, "--init", "photo.png", "--sampler", sampler, "--strength", 0.5, "--steps", 6)
    assert len({image.tobytes() for image in drawn}) == 4
    assert_sheet(folder / "out.png", np.concatenate([np.full((1, 28, 28, 1), 200, np.uint8), drawn]), 5)


# Interpolation


def test_interpolation_leads_from_one_image_to_the_other(class_run, folder, capsys):
    """From little noise even an untrained network returns to the ends, whose errors are printed."""
    flags = ["--interpolate", "test:0", "test:1", "--strength", 0.2, "--steps", T, "--num", 5]
    drawn, _ = draw(class_run, folder, *flags)
    assert drawn.shape == (5, 28, 28, 1) and len({image.tobytes() for image in drawn}) == 5
    ends = TEST_IMAGES[0], TEST_IMAGES[1]
    errors = rms(drawn[0], ends[0]), rms(drawn[-1], ends[1])
    assert max(errors) < 0.2 * rms(*ends)
    printed = [float(word) for word in capsys.readouterr().out.splitlines()[0].split(": ")[1].split(", ")]
    np.testing.assert_allclose(printed, [error / 127.5 for error in errors], atol=0.01)
    distances = [rms(image, ends[1]) for image in drawn]
    assert all(later < earlier for earlier, later in zip(distances[:-1], distances[1:], strict=True))
    assert_sheet(folder / "out.png", np.stack([ends[0], *drawn, ends[1]]), 7)
    np.testing.assert_array_equal(draw(class_run, folder, *flags, "--seed", 7)[0], drawn)  # no noise is drawn
    one, _ = draw(class_run, folder, *flags, "--num", 1)
    np.testing.assert_allclose(one[0].astype(int), drawn[0], atol=1)


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if not is_stochastic(sampler)])
def test_interpolation_with_every_deterministic_sampler(class_run, folder, sampler):
    drawn, labels = draw(
        class_run, folder, "--interpolate", "test:0", "test:1", "--sampler", sampler, "--steps", 4, "--class", 2
    )
    assert len({image.tobytes() for image in drawn}) == 4
    np.testing.assert_array_equal(labels, [2] * 4)


# All of them


@pytest.mark.parametrize(
    "flags, frames",
    [
        (["--init", "test:0", "--class", 3], 2),
        (["--inpaint", "top", "test:0"], 3),
        (["--interpolate", "test:0", "test:1"], 3),
    ],
    ids=str,
)
def test_the_animation_of_an_edit(class_run, folder, flags, frames):
    """One frame a step, as square as possible; the last one has the images. The same flags draw the same images."""
    drawn, _ = draw(class_run, folder, "--gif", "x.gif", *flags)
    with Image.open("x.gif") as gif:
        assert gif.n_frames == frames
        gif.seek(frames - 1)
        np.testing.assert_array_equal(np.asarray(gif.convert("L"))[::2, ::2], images.grid(drawn, 2)[..., 0])
    np.testing.assert_array_equal(draw(class_run, folder, *flags)[0], drawn)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--inpaint left test:1 --init test:0", "--inpaint and --init"),
        ("--inpaint left test:1 --interpolate test:0 test:1 --init test:0", "choose one of"),
        ("--init test:0 --class 10", "--class 10"),
        ("--init test:0 --prompt boot", "--prompt"),
        *((f"--init test:0 --strength {value}", "--strength is") for value in (0, 1.5, -1, "nan")),
        ("--inpaint left test:0 --strength 2", "--strength is 2.0"),
        ("--init test:0 --strength 0.5 --steps 1", "none of the 1 steps"),
        ("--init test:0 --strength 0.05 --steps 5 --spacing trailing", "none of the 5 steps"),
        ("--interpolate test:0 test:1 --sampler ddpm", "--interpolate"),
        ("--interpolate test:0 test:1 --eta 0.5", "--interpolate"),
        ("--interpolate test:0 test:1 --steps 1", "--steps"),
        ("--interpolate test:0", "interpolate"),
        ("--inpaint left", "inpaint"),
        ("--inpaint left test:0 --resample 0", "--resample is 0"),
        ("--init test:0 --resample 2", "--resample is 2"),
        ("--inpaint left test:0 --resample 2", "--sampler ddpm"),
        ("--init test:0 --v-posterior 1", "ddpm"),
        ("--inpaint small.png photo.png", "small.png has 14 x 14 pixels, the image photo.png 28 x 28"),
        ("--inpaint large.png test:0", "large.png has 56 x 56 pixels, the image test:0 28 x 28"),
        ("--inpaint nowhere.png photo.png", "nowhere.png"),
        ("--inpaint text.png photo.png", "text.png"),
        ("--inpaint left test:500", "test:500"),
        *((f"--init {name}", name) for name in ("nowhere.png", "directory", "text.png", "cut.png", "corrupt.png")),
        *((f"--init {name}", name) for name in ("bomb.bmp", "test:500", "test:-1", "test:x", "test:")),
        ("--interpolate test:0 test:500", "test:500"),
    ],
)
def test_what_does_not_fit_is_refused(class_run, folder, flags, words):
    before = tree(folder)
    with pytest.raises(UserError) as error:
        draw(class_run, folder, *flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)
    assert tree(folder) == before


def test_the_steps_of_an_edit_begin_below_its_strength(class_run):
    plan = class_run.task.plan(class_run, request("--init", "test:0", "--steps", T, "--strength", 0.5))
    assert plan.timesteps == list(range(9, -1, -1)) and plan.start.shape == (8, 1, 28, 28)
