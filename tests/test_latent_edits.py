"""Edits of images with runs of latents, by class and by caption, and latents that are conditioned on images."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from runs import assert_refused, assert_same_run, call, checkpoint, draw, metrics, picture, request, untrained

from mindspore import Tensor

from ms_diffusion import images
from ms_diffusion.data.batches import ImageSet
from ms_diffusion.data.captions import FASHION_WORDS, tokens
from ms_diffusion.data.conditions import condition_image, latent_condition
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.randomness import Stream, antithetic_timesteps, of_step
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SeededNoise
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.labels import Captions, Classes, Nothing
from ms_diffusion.training.tasks.latents import resolve_first_stage

T, SCALE = 20, 0.7
SMALL = {"data.name": "fashion-mnist-mini", "total_steps": 2, "save_every": 1, "log_every": 1, "batch_size": 8}
SMALL |= {"sample_num": 4, "warmup_steps": 0, "lr": 0.01}
AUTOENCODER = override(PRESETS["autoencoder"], **SMALL, **{"model.ch": 8, "model.ch_mult": (1, 1, 1), "model.groups": 4})
NET = {"model_channels": 8, "channel_mult": (1,), "groups": 4, "num_head_channels": 8, "attention_resolutions": (1,)}
NET |= {"num_timesteps": T, "sample_steps": 4, "sample_guidance_interval": None}
LATENT, TEXT, UPSCALE, INPAINT = (
    override(PRESETS[f"latent{name}"], **SMALL, **NET) for name in ("", "-text", "-upscale", "-inpaint")
)
LATENT, TEXT, INPAINT = (override(config, context_dim=8) for config in (LATENT, TEXT, INPAINT))
TEST_IMAGES = np.pad(load_fashion_mnist_mini("test")[0], ((0, 0), (2, 2), (2, 2), (0, 0)))
LEFT = np.zeros((1, 1, 32, 32), np.float32)
LEFT[..., 16:] = 1  # kept


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("autoencoder") / "run", AUTOENCODER, step=1, noise=0.02)


@pytest.fixture(scope="module")
def make(autoencoder, tmp_path_factory):
    """make(config): an untrained run of latents."""

    def make(config):
        run = tmp_path_factory.mktemp("run") / "run"
        resolve_first_stage(replace(config, first_stage=str(autoencoder)), run)
        return Run(untrained(run, config, step=4, noise=0.1, latent_scale=SCALE))

    return make


@pytest.fixture(scope="module")
def text(make):
    return make(TEXT)


@pytest.fixture(scope="module")
def inpainting(make, text):
    run = make(INPAINT)
    run.task.first_stage = text.task.first_stage  # the same, with its graphs
    return run


def mean_latent(run, pictures):
    """Images (N, H, W, C) uint8 -> scaled means (N, 2, 8, 8)."""
    moments = [run.task.first_stage._encode(x[None])[0] for x in images.to_float(pictures)]  # a graph that edits have too
    return SCALE * np.stack(moments)[:, :2]


def decoded(run, x):
    """Scaled latents (4, 2, 8, 8) -> images (4, 1, 32, 32)."""
    return run.task.first_stage._decode(np.float32(x) / np.float32(SCALE))


def ddim(run, x, timesteps, cond, change=lambda x_start: x_start):
    """DDIM in float64 (Song et al. 2020, eq. 12), without guidance; `change` is applied to each x_0."""
    denoise = run.generator.raw_denoiser(False)
    alpha_bars = [*run.diffusion.alphas_cumprod[timesteps].astype(np.float64), 1.0]
    for t, a, b in zip(timesteps, alpha_bars, alpha_bars[1:], strict=False):
        x_start = change(denoise(Tensor(np.float32(x)), t, *map(Tensor, cond)).asnumpy())
        x = np.sqrt(b) * x_start + np.sqrt(1 - b) * (x - np.sqrt(a) * x_start) / np.sqrt(1 - a)
    return x


def boots(num=4):
    return tokens(["an ankle boot"]).repeat(num, 0)


# Edits


def test_inpainting_by_hand(text, tmp_path):
    """Latents are replaced in whole cells that are kept, and the kept pixels are the image's."""
    flags = ["--inpaint", "left", "test:2", "--prompt", "an ankle boot", "--guidance", 1]
    drawn, labels = draw(text, tmp_path, *flags, "--gif", tmp_path / "x.gif", "--denoise-row", tmp_path / "row.png")
    assert labels is None and picture(tmp_path / "x.gif")[1] == 3
    z, kept = mean_latent(text, TEST_IMAGES[2:3]), np.zeros((8, 8))
    kept[:, 4:] = 1
    noise = SeededNoise(0, range(4))((2, 8, 8))
    x = ddim(text, noise, [19, 10, 0], [boots()], lambda x_start: kept * z + (1 - kept) * x_start)
    expected = LEFT * images.to_float(TEST_IMAGES[2:3]) + (1 - LEFT) * decoded(text, x)
    assert abs(drawn.astype(int) - images.to_uint8(expected)).max() <= 1
    np.testing.assert_array_equal(drawn[:, :, 16:], np.stack([TEST_IMAGES[2][:, 16:]] * 4))
    assert len({image.tobytes() for image in drawn}) == 4
    with Image.open(tmp_path / "x.gif") as gif:  # its last frame has what is drawn
        gif.seek(2)
        assert abs(np.asarray(gif.convert("L"))[::2, ::2].astype(int) - images.grid(drawn, 2)[..., 0]).max() <= 1
    row = picture(tmp_path / "row.png")[0][::2, ::2].astype(int)
    assert abs(row[2:34, -34:-2] - drawn[0, ..., 0]).max() <= 1


def test_a_cell_that_a_mask_touches_is_painted(text, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[5, 30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(TEST_IMAGES[0, ..., 0]).save(tmp_path / "image.png")
    drawn, _ = draw(text, tmp_path, "--inpaint", tmp_path / "mask.png", tmp_path / "image.png")
    changed = (drawn != TEST_IMAGES[0]).any((0, 3))
    assert changed.sum() <= 1 and not changed[mask == 0].any()
    plan = text.task.plan(text, request("--steps", 3, "--inpaint", tmp_path / "mask.png", tmp_path / "image.png"))
    x_start = plan.denoise(Tensor(np.zeros((4, 2, 8, 8), np.float32)), 10, Tensor(plan.cond["tokens"][:4])).asnumpy()
    z = mean_latent(text, TEST_IMAGES[:1])
    off = (abs(x_start - z) > 1e-5).any((0, 1))
    assert off[1, 7] and off.sum() == 1


def test_image_to_image_by_hand(text, tmp_path):
    """From the noised mean of the latents; without a prompt, the network sees no caption."""
    noise = SeededNoise(0, range(4))((2, 8, 8))
    z, a = mean_latent(text, TEST_IMAGES[3:4]), text.diffusion.alphas_cumprod[10].astype(np.float64)
    start = np.sqrt(a) * z + np.sqrt(1 - a) * noise
    for flags, cond in ((["--prompt", "an ankle boot", "--guidance", 1], boots()), ([], 0 * boots())):
        drawn, _ = draw(text, tmp_path, "--init", "test:3", *flags)
        expected = images.to_uint8(decoded(text, ddim(text, start, [10, 0], [cond])))
        assert abs(drawn.astype(int) - expected).max() <= 1


def test_inpainting_from_the_noised_image(text, tmp_path):
    flags = ["--inpaint", "left", "test:2", "--prompt", "a dress", "--guidance", 1]
    plan = text.task.plan(text, request("--steps", 3, *flags, "--strength", 0.6, "--num", 3))
    assert plan.timesteps == [10, 0] and plan.start.shape == (3, 2, 8, 8)
    assert text.task.plan(text, request("--steps", 3, *flags)).start is None


def test_guidance_and_negative_prompts_of_an_edit(text, tmp_path):
    flags = ["--init", "test:3", "--prompt", "a dress"]
    plain, strong, away = (
        draw(text, tmp_path, *flags, "--guidance", 3, *more)[0]
        for more in (["--negative-prompt", "a dress"], [], ["--negative-prompt", "an ankle boot"])
    )
    by_default = draw(text, tmp_path, *flags, "--guidance", 1)[0]
    assert abs(plain.astype(int) - by_default).max() <= 1  # away from the same, there is no direction
    assert (strong != away).any() and (strong != by_default).any()


@pytest.mark.slow
def test_interpolation_of_latents(text, tmp_path, capsys):
    """It begins and ends at the reconstructions of both images."""
    flags = ["--interpolate", "test:0", "test:1", "--strength", 0.2, "--steps", T, "--class", "ankle boot"]
    drawn, labels = draw(text, tmp_path, *flags, "--num", 4)
    ends = images.to_uint8(decoded(text, mean_latent(text, TEST_IMAGES[[0, 0, 1, 1]]))[::2]).astype(int)
    np.testing.assert_array_equal(labels, [9] * 4)
    far = abs(ends[0] - ends[1]).mean()
    assert abs(drawn[0] - ends[0]).mean() < 0.1 * far and abs(drawn[-1] - ends[1]).mean() < 0.1 * far
    assert "reconstruction error" in capsys.readouterr().out


def test_rows_of_no_condition():
    captions = Captions([["a boot"], ["a bag"]], FASHION_WORDS)
    rows = captions.null_rows(3)
    assert rows.shape == captions.rows(3).shape and rows.dtype == np.int32 and not rows.any()
    np.testing.assert_array_equal(Classes(10, 10).null_rows(3), [10] * 3)
    assert Nothing().null_rows(3).shape == (3, 0)


# Image conditions


def test_the_condition_of_one_image(inpainting):
    """The image that the batch has by its number, without a rectangle, encoded, and its label."""
    task = inpainting.task
    task.originals, task.ids = TEST_IMAGES[:16], np.arange(16, dtype=np.int32) % 10
    drawn = task.draw_conditions(np.random.default_rng(3), {"noise": np.zeros((1, 2, 8, 8))}, np.array([12]))
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(drawn["latent_noise"], rng.standard_normal((1, 2, 8, 8), np.float32))
    shown = condition_image("mask", images.to_float(TEST_IMAGES[12:13]), 8, rng)
    np.testing.assert_allclose(drawn["cond_image"][:, :2], SCALE * task.first_stage._encode(shown[:, :1])[:, :2], atol=1e-6)
    np.testing.assert_array_equal(drawn["cond_image"][:, 2:], blocks(shown[:, 1:]).max((3, 5)))
    assert drawn["labels"] == [2] and len(np.unique(drawn["cond_image"][:, 2])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", [UPSCALE, INPAINT], ids=["upscale", "inpaint"])
def test_the_condition_of_a_batch(config, autoencoder, tmp_path):
    """It is made of the batch's images and encoded; rectangles depend on (seed, step) alone."""
    pictures, labels = TEST_IMAGES[:16], np.arange(16, dtype=np.int32) % 10
    task = replace(config, first_stage=str(autoencoder)).task(ImageSet(pictures, labels))
    task.start(tmp_path / "run")
    batch = next(task.batches())
    order = np.random.default_rng((0, Stream.ORDER, 0)).permutation(16)[:8]
    rng = of_step(0, Stream.NOISE, 0, 8)
    drawn = [antithetic_timesteps(rng, T, 8), *(rng.standard_normal((8, 2, 8, 8), np.float32) for _ in range(2))]
    np.testing.assert_array_equal(batch["latent_noise"], drawn[-1])
    shown = condition_image(config.data.condition, images.to_float(pictures[order]), 8, rng)
    assert set(batch) == {"x_start", "t", "noise", "latent_noise", *task.cond_fields}
    if "labels" in batch:
        kept = batch["labels"] != 10
        np.testing.assert_array_equal(batch["labels"][kept], labels[order][kept])
        z = [task.first_stage._encode(x[None, :1])[0] for x in shown]
        expected = np.concatenate([task.first_stage.scale * np.stack(z)[:, :2], blocks(shown[:, 1:]).max((3, 5))], 1)
    else:
        expected = blocks(shown).mean((3, 5))
    np.testing.assert_allclose(batch["cond_image"], expected, atol=1e-4)
    folder = tmp_path / "run/samples"
    assert {path.name for path in folder.iterdir()} == {"first-stage.png", "prior.png", "diffusion-row.png", "condition.png"}
    assert picture(folder / "diffusion-row.png")[0].shape == (2 * (4 * 34 + 2), 2 * (10 * 34 + 2))


def blocks(x):
    return x.reshape(len(x), -1, 8, 4, 8, 4)


def test_a_network_of_masks_fills_the_users_mask(inpainting, tmp_path):
    """--inpaint conditions it on the image and the mask; what is kept is pasted back."""
    drawn, _ = draw(inpainting, tmp_path, "--inpaint", "left", "test:2", "--class", 3, "--guidance", 1)
    original = images.to_float(TEST_IMAGES[2:3])
    hidden = np.ones((8, 8), np.float32)
    hidden[:, 4:] = -1
    z = mean_latent(inpainting, images.to_uint8(original * LEFT))  # gray 128, next to 0
    plan = inpainting.task.plan(inpainting, request("--steps", 3, "--inpaint", "left", "test:2"))
    np.testing.assert_allclose(plan.cond["cond_image"][:, :2], z.repeat(8, 0), atol=0.02)
    np.testing.assert_array_equal(plan.cond["cond_image"][:, 2], [hidden] * 8)
    cond = [np.full(4, 3, np.int32), plan.cond["cond_image"][:4]]
    x = ddim(inpainting, SeededNoise(0, range(4))((2, 8, 8)), [19, 10, 0], cond)
    expected = LEFT * original + (1 - LEFT) * decoded(inpainting, x)
    assert abs(drawn.astype(int) - images.to_uint8(expected)).max() <= 1


def test_images_beside_their_conditions(inpainting, tmp_path):
    """Rows of condition, sample and original, also of a file of another size; in Python the same."""
    Image.fromarray(np.full((50, 70), 90, np.uint8)).save(tmp_path / "photo.png")
    drawn, _ = draw(inpainting, tmp_path, "--image", tmp_path / "photo.png", "--class", 3)
    sheet = picture(tmp_path / "out.png")[0][::2, ::2].astype(int)
    assert abs(sheet[2:34, 36:68] - drawn[0, ..., 0]).max() == 0 and abs(sheet[2:34, 70:102] - 90).max() <= 1
    assert {90, 128} <= set(np.unique(sheet[2:34, 2:34]))
    photo = np.full((1, 32, 32, 1), 90, np.uint8)
    again = inpainting.sample(4, pictures=photo, labels=3, steps=3, batch_size=4)
    assert abs(again.astype(int) - drawn).max() <= 1


def test_conditions_of_latents_by_hand():
    x = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4) / 100

    def encode(pictures):
        assert pictures.shape == (2, 3, 4, 4)
        return pictures[:, :2, ::2, ::2]

    small = latent_condition("lowres", x.repeat(2, 2).repeat(2, 3), (4, 4), 3, encode)
    np.testing.assert_array_equal(small, x)
    gray = latent_condition("gray", x[:, :1], (2, 2), 3, encode)
    np.testing.assert_array_equal(gray, x[:, [0, 0], ::2, ::2])
    hidden = np.full((2, 1, 4, 4), -1, np.float32)
    hidden[1, 0, 1, 2] = 1
    masked = latent_condition("mask", np.concatenate([x, hidden], 1), (2, 2), 3, encode)
    np.testing.assert_array_equal(masked[:, :2], x[:, :2, ::2, ::2])
    np.testing.assert_array_equal(masked[:, 2], [[[-1, -1], [-1, -1]], [[-1, 1], [-1, -1]]])


@pytest.mark.slow
def test_a_resumed_run_with_an_image_condition_equals_an_uninterrupted_one(autoencoder, tmp_path):
    config = override(INPAINT, total_steps=2)
    run = train(config, tmp_path / "run", first_stage=str(autoencoder))
    copy = shutil.copytree(run.home, tmp_path / "copy")
    shutil.rmtree(checkpoint(copy, 2))
    for path in copy.glob("samples/*0000002.png"):
        path.unlink()
    train(config, copy)
    assert_same_run(copy, run.home, 2)
    assert metrics(copy) == metrics(run.home)
    row, again = (picture(home / "samples/denoise-row-0000002.png")[0] for home in (run.home, copy))
    np.testing.assert_array_equal(row, again)
    assert row.shape == (2 * (4 * 34 + 2), 2 * (4 * 34 + 2))
    samples = picture(run.home / "samples/step-0000002.png")[0][::2, ::2]
    assert abs(row[::2, ::2][2:34, -34:-2].astype(int) - samples[2:34, 2:34]).max() <= 1


# Bad input


def test_what_does_not_fit_is_refused(text, inpainting, make, tmp_path):
    upscale = make(UPSCALE)
    for run, flags, words in (
        (text, "--init test:0 --class 1 --prompt dress", "--prompt and --class"),
        (text, "--init test:0 --prompt zeppelin", "zeppelin"),
        (text, "--init test:0 --negative-prompt dress", "--guidance"),
        (text, "--image test:0", "--image"),
        (text, "--init test:999", "test:999"),
        (text, "--inpaint nowhere.png test:0", "nowhere.png"),
        (text, "--resample 2", "--resample"),
        (text, "--strength 0.5", "--strength"),
        (inpainting, "--init test:0", "--image"),
        (upscale, "--inpaint left test:0", "--image"),
        (upscale, "--interpolate test:0 test:1", "--image"),
        (upscale, "--image nowhere.png", "nowhere.png"),
    ):
        with pytest.raises(UserError) as error:
            draw(run, tmp_path, *flags.split())
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="conditioned on images"):
        upscale.evaluate(200)
    assert list(tmp_path.iterdir()) == []


def test_training_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in (
        ("--preset latent --data.condition gray", "--model.cond-channels 2"),
        ("--preset latent-inpaint --model.cond-channels 1", "--model.cond-channels 3"),
        ("--preset latent-upscale --data.lowres-size 3", "--data.lowres-size is 3"),
        ("--preset latent-upscale --data.lowres-size 16", "--data.lowres-size is 16"),
        ("--preset latent --model.cond-channels 1", "--model.cond-channels 0"),
    ):
        assert_refused(call("train", *flags.split(), "--first-stage", "nowhere"), words)
