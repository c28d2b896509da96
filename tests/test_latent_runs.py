"""Runs of autoencoders and of latents, by class and by caption: training, resuming, samples, scores, and bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from pipelines import write_pipeline
from runs import assert_refused, assert_same_run, call, checkpoint, draw, metrics, picture, succeed, tree, untrained, weights

from mindspore import Tensor

from ms_diffusion import images
from ms_diffusion.commands.export import describe
from ms_diffusion.data.captions import CAPTIONS, tokens
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.models.autoencoder import gaussian_sample
from ms_diffusion.models.lpips import LPIPS
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks import latents
from ms_diffusion.training.tasks.autoencoder import load_first_stage
from ms_diffusion.training.tasks.latents import resolve_first_stage, scale_of
from ms_diffusion.training.text_encoder import load_text_encoder

SHORT = {
    "data.name": "fashion-mnist-mini",
    "total_steps": 4,
    "save_every": 2,
    "log_every": 1,
    "batch_size": 8,
    "sample_num": 4,
}
AUTOENCODER = override(
    PRESETS["autoencoder"],
    **SHORT,
    **{"model.ch": 8, "model.ch_mult": (1, 2, 2), "model.groups": 4, "disc_start": 2, "disc_channels": 8, "disc_layers": 1},
    perceptual_weight=0.0,  # test_autoencoder_losses.py has it
)
CODEBOOK = override(
    PRESETS["autoencoder-vq"],
    **SHORT,
    **{"model.ch": 8, "model.ch_mult": (1, 2, 2), "model.groups": 4, "disc_start": 2, "disc_channels": 8, "disc_layers": 1},
    **{"perceptual_weight": 0.0, "model.n_embed": 16},
)
NET = {"model_channels": 8, "groups": 4, "num_head_channels": 8, "num_res_blocks": 1, "attention_resolutions": (2,)}
LATENT, TEXT = (
    override(
        PRESETS[name],
        **SHORT,
        **NET,
        # for conditions to make a difference so soon
        **{"context_dim": 8, "lr": 0.03, "warmup_steps": 0, "ema_decay": 0.0, "sample_steps": 2},
    )
    for name in ("latent", "latent-text")
)
IMAGES = np.pad(load_fashion_mnist_mini("train")[0], ((0, 0), (2, 2), (2, 2), (0, 0)))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Latents and features are cached in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("ms_diffusion.metrics.features.BATCH", 50)  # which bounds the memory of the graph
        yield


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An autoencoder's run; it stays as it is."""
    return train(AUTOENCODER, tmp_path_factory.mktemp("autoencoder") / "run")


@pytest.fixture(scope="module")
def text(autoencoder, tmp_path_factory):
    """A run of latents by caption."""
    return train(TEXT, tmp_path_factory.mktemp("text") / "run", first_stage=str(autoencoder.home))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a small CLIP."""
    return write_pipeline(tmp_path_factory.mktemp("clip") / "sd")


CONTEXT = override(TEXT, **{"model.condition": "context", "context_dim": 12})


@pytest.fixture(scope="module")
def context(autoencoder, clip, tmp_path_factory):
    """A run of latents by caption, with a frozen text encoder."""
    home, gone = tmp_path_factory.mktemp("context") / "run", shutil.copytree(clip, clip.with_name("gone"))
    train(CONTEXT, home, first_stage=str(autoencoder.home), text_encoder=str(gone))
    shutil.rmtree(gone)  # the run has all that it needs
    return Run(home)


@pytest.fixture(scope="module")
def latent(autoencoder, tmp_path_factory):
    """A run of latents by class, untrained."""
    run = tmp_path_factory.mktemp("latent") / "run"
    resolve_first_stage(replace(LATENT, first_stage=str(autoencoder.home)), run)
    return Run(untrained(run, LATENT, step=4, noise=0.1, latent_scale=0.7))


def resume(config, run, folder):
    """A copy of the run without its last checkpoint, trained on."""
    copy = shutil.copytree(run.home, folder / "run")
    shutil.rmtree(checkpoint(copy, 4))
    train(config, copy)
    assert_same_run(copy, run.home, 4)
    assert metrics(copy) == metrics(run.home)


# Autoencoders


def test_the_run_of_an_autoencoder(autoencoder):
    run = autoencoder.home
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    always = {"step", "loss", "grad_norm", "lr", "epoch", "logvar", "nll_loss", "rec_loss", "p_loss", "kl_loss"}
    later = {"g_loss", "disc_factor", "d_weight", "disc_loss", "logits_real", "logits_fake"}
    assert [set(row) for row in metrics(run)] == [always, always, always | later, always | later]
    for row in metrics(run):
        adversarial = row["disc_factor"] * row["d_weight"] * row["g_loss"] if "g_loss" in row else 0
        parts = row["nll_loss"] + AUTOENCODER.train.kl_weight * row["kl_loss"] + adversarial
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    pixels, _ = picture(run / "samples/step-0000004.png")
    pairs = pixels[::2, ::2][2:-2, 2:-2]  # 4 images, each beside its reconstruction
    for i in range(4):
        np.testing.assert_array_equal(pairs[:32, 68 * i : 68 * i + 32], IMAGES[i, ..., 0])
    before, after = (weights(run, step, "optimizer") for step in (2, 4))
    moved = [key for key in before if key.startswith("discriminator.") and not np.array_equal(before[key], after[key])]
    assert len(moved) > 5  # it is trained from step 2 on
    assert all(np.isfinite(values).all() for values in after.values())
    assert_refused(call("sample", run), "autoencoder", "--first-stage")
    with pytest.raises(UserError, match="autoencoder|no diffusion model"):
        autoencoder.sample(4)


@pytest.mark.slow
def test_a_resumed_autoencoder_equals_an_uninterrupted_one(autoencoder, tmp_path):
    resume(AUTOENCODER, autoencoder, tmp_path)


@pytest.mark.slow
def test_latents_of_a_codebook(tmp_path):
    """Training of a VQModel, its resuming, and a run of latents on it, whose samples have ids."""
    stage = train(CODEBOOK, tmp_path / "stage")
    rows = metrics(stage.home)
    assert all(1 <= row["perplexity"] <= row["cluster_usage"] + 1e-3 <= 16.1 for row in rows)
    for row in rows:
        adversarial = row["d_weight"] * row["g_loss"] if "g_loss" in row else 0
        assert row["loss"] == pytest.approx(row["nll_loss"] + row["quant_loss"] + adversarial, rel=1e-4)
    before, after = (weights(stage.home, step, "model")["quantize.embedding.weight"] for step in (2, 4))
    assert (before != after).any()
    (tmp_path / "resumed").mkdir()
    resume(CODEBOOK, stage, tmp_path / "resumed")
    channels = {"model.in_channels": 4, "model.out_channels": 4}
    run = train(override(LATENT, first_stage=str(stage.home), **channels), tmp_path / "run")
    assert run.task.first_stage.moments(IMAGES[:2]).shape == (2, 4, 8, 8)
    drawn = [call("sample", run.home, "--num", 4, "--steps", 3, "--npz", tmp_path / f"{flag}.npz", f"--{flag}")
             for flag in ("quantize-denoised", "no-quantize-denoised")]  # fmt: skip
    assert [code for code, *_ in drawn] == [0, 0]
    quantized, plain = (np.load(tmp_path / f"{flag}.npz") for flag in ("quantize-denoised", "no-quantize-denoised"))
    assert quantized["codebook_ids"].shape == (4, 8, 8) and quantized["codebook_ids"].max() < 16
    assert (quantized["images"] != plain["images"]).any()
    decoded = images.to_uint8(run.task.first_stage.decode_ids(plain["codebook_ids"]))
    assert abs(decoded.astype(int) - plain["images"]).max() <= 1


@pytest.mark.slow
def test_scores_of_reconstructions(autoencoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = succeed("evaluate", autoencoder.home, "--num", 150, "--json", "x.json", "--out", "x.png")
    record = json.loads((tmp_path / "x.json").read_text())
    assert 3 < record["samples"]["psnr"] < 30 and 0 < record["samples"]["ssim"] < 1
    assert "psnr" not in record["floor"] and "PSNR" in printed and "reconstructions of test images" in record["protocol"]


def test_a_run_begins_with_weights_from_elsewhere(autoencoder, text, tmp_path):
    """Without a step it is a run already, which may be another's first stage; a run that goes on keeps its own weights."""
    file, run = checkpoint(autoencoder.home, 4) / "ema.safetensors", tmp_path / "run"
    config = replace(AUTOENCODER, init_from=str(file))
    train(config, run, total_steps=0)
    ours, theirs = weights(run, 0), safetensors.numpy.load_file(file)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)
    assert load_first_stage(run).f == 4
    task = replace(config, init_from=str(checkpoint(autoencoder.home, 2) / "model.safetensors")).task()
    task.start(run)
    assert all((p.asnumpy() == theirs[p.name]).all() for p in task.checkpoint.files["model"].values())

    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"decoder\."):
        train(replace(config, init_ignore=("decoder.",)), other)
    assert not other.exists()
    task = replace(config, init_ignore=("decoder.",), init_partial=True).task()
    task.start(other)
    assert any((p.asnumpy() != theirs[p.name]).any() for p in task.checkpoint.files["model"].values())


@pytest.mark.slow
def test_the_sizes_of_the_reference(tmp_path):
    """A step of autoencoder-kl-f8 with its discriminator and LPIPS, whose weights are random here: 83,653,863 parameters as
    in Stable Diffusion's first stage."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    lpips = LPIPS()
    vgg = {f"features.{p.name.split('.', 2)[2]}": p.asnumpy() for p in lpips.net.get_parameters()}
    safetensors.numpy.save_file(vgg, tmp_path / "vgg.safetensors")
    layers = {p.name: p.asnumpy() for p in lpips.get_parameters() if p.name.startswith("lin")}
    safetensors.numpy.save_file(layers, tmp_path / "lpips.safetensors")
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("vgg", "lpips")}
    settings = {"data.dir": str(tmp_path / "images"), "batch_size": 1, "total_steps": 1, "disc_start": 0, "sample_num": 1}
    train("autoencoder-kl-f8", tmp_path / "run", **settings, **files)
    before, after = PRESETS["autoencoder-kl-f8"].model.build(0), weights(tmp_path / "run", 1)
    assert sum(values.size for values in after.values()) == 83_653_863
    still = {p.name for p in before.get_parameters() if (p.asnumpy() == after[p.name]).all()}
    assert still <= {f"{part}.mid.attn_1.k.bias" for part in ("encoder", "decoder")}  # softmax is invariant to it
    assert all(np.isfinite(values).all() for values in after.values())
    discriminator = [key for key in weights(tmp_path / "run", 1, "optimizer") if key.startswith("discriminator.main.")]
    assert len(discriminator) > 10
    size = images.grid(np.zeros((2, 256, 256, 3), np.uint8), 2).shape[:2]
    assert picture(tmp_path / "run/samples/step-0000001.png")[0].shape[:2] == tuple(2 * side for side in size)


# Latents


def test_a_run_of_latents_keeps_its_first_stage_and_scale(autoencoder, text):
    stage, first = text.task.first_stage, load_first_stage(autoencoder.home)
    for a, b in zip(stage.net.get_parameters(), first.net.get_parameters(), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())
    moments = first.moments(IMAGES[:500])
    noise = np.random.default_rng(0).standard_normal((500, 2, 8, 8)).astype(np.float32)
    z = gaussian_sample(*map(Tensor, (moments, noise))).asnumpy()
    assert stage.scale * z.std() == pytest.approx(1, rel=0.1)


@pytest.mark.slow
def test_a_preview_is_what_the_run_draws(text):
    """With the run's own guidance, and captions of each class in turn."""
    drawn = text.sample(4, sampler="ddpm", steps=2)
    images_of_preview = images.grid(drawn, 10)[..., 0]
    pixels = picture(text.home / "samples/step-0000004.png")[0][::2, ::2]
    assert pixels.shape == images_of_preview.shape
    np.testing.assert_allclose(pixels.astype(int), images_of_preview, atol=1)


@pytest.mark.slow
def test_a_resumed_run_of_latents_equals_an_uninterrupted_one(text, tmp_path):
    """Also without --first-stage, of which it keeps a copy."""
    resume(TEXT, text, tmp_path)


@pytest.mark.slow
def test_batches_of_classes_and_captions(autoencoder, latent, text, tmp_path):
    """Each batch has moments, latent noise, and the class or a caption of it, of which a tenth is dropped."""
    for config, field, null in ((LATENT, "labels", 10), (TEXT, "tokens", 0)):
        config = override(replace(config, first_stage=str(autoencoder.home)), batch_size=500)
        task = config.task()
        task.start(tmp_path / field)
        batch = next(task.batches())
        assert set(batch) == {"x_start", "t", "noise", "latent_noise", field}
        assert batch["x_start"].shape == (500, 4, 8, 8) and batch["latent_noise"].shape == (500, 2, 8, 8)
        values = batch[field].reshape(500, -1)
        dropped = (values == null).all(1)
        assert 0.04 < dropped.mean() < 0.2
        known = {row.tobytes() for names in CAPTIONS for row in tokens(names)} if field == "tokens" else set(range(10))
        assert {row.tobytes() if field == "tokens" else row[0] for row in values[~dropped]} <= known


@pytest.mark.slow
def test_class_by_class(latent, tmp_path):
    in_turn, labels = draw(latent, tmp_path, "--num", 10)
    assert in_turn.shape == (10, 32, 32, 1)
    np.testing.assert_array_equal(labels, np.arange(10))
    alone, labels = draw(latent, tmp_path, "--num", 10, "--class", 3)
    np.testing.assert_array_equal(labels, [3] * 10)
    assert abs(alone[3].astype(int) - in_turn[3]).max() <= 1
    assert abs(alone.astype(int) - in_turn).max() > 1
    np.testing.assert_array_equal(
        latent.sample(10, labels="Bag", steps=3), draw(latent, tmp_path, "--num", 10, "--class", 8)[0]
    )


def test_prompts(text, tmp_path):
    drawn = [draw(text, tmp_path, "--prompt", prompt) for prompt in ("an ankle boot", "An ankle boot.", "a dress")]
    assert all(labels is None for _, labels in drawn)
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    assert (drawn[0][0] != drawn[2][0]).any()
    by_class, labels = draw(text, tmp_path, "--class", "dress")  # its plain caption
    np.testing.assert_array_equal(by_class, drawn[2][0])
    np.testing.assert_array_equal(labels, [3] * 4)
    np.testing.assert_array_equal(text.sample(4, prompt="a dress", steps=3), by_class)


@pytest.mark.slow
def test_how_an_image_is_denoised(latent, tmp_path):
    """A row for each of the first 8 images; in the last column the image itself, since the last step goes to x_0."""
    row = tmp_path / "row.png"
    drawn, _ = draw(latent, tmp_path, "--num", 8, "--steps", 6, "--denoise-row", row, "--gif", tmp_path / "x.gif")
    pixels = picture(row)[0][::2, ::2].astype(int)
    ends = images.grid(np.stack([drawn[:4]] * 6, 1).reshape(24, 32, 32, 1), 6)[..., 0]  # the first batch has 4
    assert pixels.shape == ends.shape and picture(tmp_path / "x.gif")[1] == 6
    np.testing.assert_allclose(pixels[:, -34:], ends[:, -34:], atol=1)


@pytest.mark.slow
def test_a_run_with_a_frozen_text_encoder(context, autoencoder, tmp_path):
    resume(CONTEXT, context, tmp_path)
    encoder = load_text_encoder(context.home, 12)
    task = context.task
    np.testing.assert_array_equal(task.labelling.null, encoder.encode([""])[0])
    table = [caption for row in CAPTIONS for caption in row]
    np.testing.assert_array_equal(task.labelling.encoded, encoder.encode(table))
    rows = task.labelling.draw(np.random.default_rng(0), np.arange(10), 0.0)
    assert rows.shape == (10, 16, 12) and rows.dtype == np.float32
    for row, captions in zip(rows, CAPTIONS, strict=True):
        assert any((row == each).all() for each in encoder.encode(captions))
    assert (task.labelling.draw(np.random.default_rng(0), np.arange(10), 1.0) == task.labelling.null).all()
    drawn = [draw(context, tmp_path, "--prompt", prompt)[0] for prompt in ("an ankle boot", "any words at all")]
    assert (drawn[0] != drawn[1]).any()
    by_class, labels = draw(context, tmp_path, "--class", "dress")
    assert labels.tolist() == [3] * 4
    np.testing.assert_array_equal(context.sample(4, prompt="a dress", steps=3), by_class)
    away = ("--prompt", "a dress", "--guidance", 2, "--negative-prompt")
    assert (draw(context, tmp_path, *away, "a coat")[0] != draw(context, tmp_path, *away, "a bag")[0]).any()
    description, _ = describe(context)
    assert np.shape(description["examples"]["context"]) == (10, 16, 12) and json.dumps(description)
    assert np.shape(description["null"]) == (16, 12) and description["class_names"][3] == "a dress"
    other = train(CONTEXT, tmp_path / "other", init_from=str(context.home), total_steps=2)
    np.testing.assert_array_equal(other.task.labelling.null, task.labelling.null)
    files = [(home / "text_encoder" / "model.safetensors").read_bytes() for home in (context.home, tmp_path / "other")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_start_that_fails_and_another_text_encoder(autoencoder, context, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "latent-text", *NET_FLAGS, "--data.name", "fashion-mnist-mini", "--model.condition", "context"]
    flags += ["--model.context-dim", 12, "--text-encoder", clip, *"--train.total-steps 2 --train.batch-size 4".split()]
    flags += "--train.sample-every 2 --train.sample-num 2 --train.sample-steps 2".split()
    assert_refused(call("train", *flags, "--first-stage", "nowhere"), "nowhere")
    succeed("train", *flags, "--first-stage", autoencoder.home)
    other = write_pipeline(tmp_path / "other", text={"num_hidden_layers": 1})
    run = shutil.copytree(context.home, tmp_path / "run")
    with pytest.raises(UserError, match="another one"):
        train(CONTEXT, run, text_encoder=str(other), total_steps=5)
    path = run / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(UserError, match="damaged"):
        Run(run)


def test_a_text_encoder_is_needed_and_must_fit(autoencoder, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "latent-text", "--first-stage", autoencoder.home, *NET_FLAGS, "--data.name", "fashion-mnist-mini"]
    flags += ["--model.condition", "context"]
    assert_refused(call("train", *flags), "--text-encoder")
    assert_refused(call("train", *flags, "--text-encoder", clip), "hidden_size is 12", "takes 8")
    assert_refused(call("train", *flags, "--text-encoder", tmp_path), "text_encoder/config.json")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["latent", pytest.param("text", marks=pytest.mark.slow)])
def test_scores(name, request):
    run = request.getfixturevalue(name)
    record = run.evaluate(140, steps=2, batch_size=4)
    assert np.isfinite(record["samples"]["fid"]) and 0 <= record["samples"]["class_accuracy"] <= 1
    assert f"{run.name} at step 4" in record["protocol"]


def test_a_first_stage_in_patches(autoencoder, latent, tmp_path):
    """The run knows the side of the patches, which must fit; test_latent.py has what is computed."""
    run = shutil.copytree(latent.home, tmp_path / "run")
    (run / "config.json").write_text(json.dumps(replace(latent.config, first_stage_patch=16).to_record()))
    assert Run(run).task.first_stage.patch == 16
    for patch, word in ((18, "divisible by 4"), (64, "--first-stage-patch is 64")):
        with pytest.raises(UserError, match=word):
            train(LATENT, tmp_path / "b", first_stage=str(autoencoder.home), first_stage_patch=patch)
    assert not (tmp_path / "b").exists()


def start(config, run, **settings):
    override(config, **settings).task().start(run)


def test_a_run_has_what_it_needs_of_its_first_stage(autoencoder, text, tmp_path):
    """It goes on where the first stage is gone; a copy that a crash cut short is made again; another one is refused."""
    run, gone = shutil.copytree(text.home, tmp_path / "run"), str(tmp_path / "gone")
    start(TEXT, run, first_stage=gone)
    for flags, word in ((["--first-stage-patch", 16], "first-stage-patch"), (["--latent-scale", 0.5], "latent-scale")):
        end = call("train", "--preset", "latent-text", "--run-dir", run, *NET_FLAGS, "--first-stage", gone, *flags)
        assert_refused(end, f"another --{word}")

    half = shutil.copytree(text.home, tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints", "config.json"))
    (half / "first_stage/state.json").unlink()
    with pytest.raises(UserError, match="gone is not a folder"):
        start(TEXT, half, first_stage=gone)
    task = override(TEXT, first_stage=str(autoencoder.home), latent_scale=0.5).task()
    task.start(half)
    assert (half / "first_stage/state.json").exists() and task.checkpoint_record()["latent_scale"] == 0.5

    other = untrained(tmp_path / "other", override(AUTOENCODER, seed=1))
    before = tree(run)
    with pytest.raises(UserError, match="is not the first stage"):
        start(TEXT, run, first_stage=str(other), total_steps=6)
    assert tree(run) == before


def test_a_spoilt_copy_of_the_first_stage_is_made_again(tmp_path, monkeypatch):
    """From the checkpoint with the same weights, which need not be the newest; no other autoencoder takes its place."""
    monkeypatch.setattr(latents, "load_first_stage", lambda *_: None)  # what is copied is files
    run = tmp_path / "run"
    for step in (2, 4):
        original = untrained(tmp_path / "original", AUTOENCODER, step, noise=0.1 * step)
    config = replace(LATENT, first_stage=str(original))
    resolve_first_stage(config, run)
    copy = tree(run / "first_stage")
    kept = json.loads(copy[Path("state.json")])["sha256"]["ema.safetensors"]
    shutil.copytree(checkpoint(original, 2), checkpoint(original, 6))  # it has been trained on
    for name in ("config.json", "ema.safetensors", "state.json"):
        for damage in (lambda path: path.write_bytes(b"spoilt"), lambda path: path.unlink()):
            damage(run / "first_stage" / name)
            resolve_first_stage(config, run, kept)
            assert tree(run / "first_stage") == copy
    shutil.rmtree(checkpoint(original, 4))
    (run / "first_stage/ema.safetensors").write_bytes(b"spoilt")
    with pytest.raises(UserError, match="is not the first stage"):
        resolve_first_stage(config, run, kept)
    with pytest.raises(UserError, match="missing or damaged"):
        resolve_first_stage(LATENT, run, kept)


NET_FLAGS = "--data.name fashion-mnist-mini --model.model-channels 8 --model.groups 4 --model.num-head-channels 8".split()
NET_FLAGS += "--model.num-res-blocks 1 --model.attention-resolutions 2 --model.context-dim 8".split()


def test_the_default_scale_makes_the_latents_of_a_batch_vary_by_1(autoencoder, tmp_path):
    moments = np.random.default_rng(0).standard_normal((300, 4, 8, 8)).astype(np.float32) * 3
    moments[:, 2:] = -30  # no variance
    train_config = SimpleNamespace(seed=0, rows_per_step=200)
    assert scale_of(moments, train_config) == pytest.approx(1 / 3, rel=0.02)


# Bad input


def test_training_refuses(autoencoder, latent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = f"--first-stage {autoencoder.home}"
    for flags, words in (
        ("--preset latent", "--first-stage"),
        ("--preset latent --first-stage nowhere", "nowhere is not a folder"),
        (f"--preset latent --first-stage {latent.home}", "is not the run of an autoencoder"),
        (f"--preset latent {first} --model.in-channels 3 --model.out-channels 3", "latents (2, 8, 8)"),
        (f"--preset latent {first} --model.latent-size 16", "(2, 16, 16)"),
        (f"--preset latent {first} --data.flip", "--data.no-flip"),
        (f"--preset latent {first} --data.condition gray", "--data.condition gray"),
        (f"--preset latent {first} --model.condition text", "condition is 'text'"),
        (f"--preset latent {first} --data.size 33", "--data.size is 33"),
        (f"--preset latent {first} --model.out-channels 1", "--model.out-channels"),
        (f"--preset latent {first} --latent-scale 0", "--latent-scale is 0"),
        (f"--preset latent {first} --train.batch-size 3000", "2000 images"),
        (f"--preset latent-text {first} --data.name image-folder", "needs --data.dir"),
        (f"--preset latent-text {first} --model.vocab-size 5", "--model.vocab-size 39"),
        (f"--preset quick {first}", "--first-stage"),
        ("--preset autoencoder --precision bf16", "bf16"),
        ("--preset autoencoder --train.score-every 2", "--train.score-every"),
        ("--preset autoencoder --data.size 30", "--data.size is 30"),
        ("--preset autoencoder --train.adam-betas 1.5 2", "--train.adam-betas is (1.5, 2.0)"),
        ("--preset autoencoder --train.disc-layers 0", "--train.disc-layers is 0"),
        ("--preset autoencoder --train.disc-layers 4", "--train.disc-layers is 4"),
        ("--preset autoencoder --train.kl-weight -1", "--train.kl-weight is -1"),
        ("--preset autoencoder --train.vgg x.safetensors", "--train.lpips"),
        ("--preset autoencoder --train.ema-lengths 0.1", "--train.ema-lengths"),
        ("--preset autoencoder --init-partial", "--init-from"),
    ):
        data = [] if "--data.name" in flags else ["--data.name", "fashion-mnist-mini"]
        assert_refused(call("train", *data, *flags.split()), words)
        assert not (tmp_path / "runs").exists(), flags


def test_sampling_refuses(latent, text, tmp_path):
    for run, flags, word in (
        (latent, "--prompt boot", "--prompt"),
        (latent, "--image test:0", "--image"),
        (latent, "--strength 0.5", "--strength"),
        (text, "--class 30", "--class 30"),
        (text, "--class 3 --prompt dress", "--prompt and --class"),
        (text, "--prompt zeppelin", "zeppelin"),
        (text, "--prompt ,", "no words"),
    ):
        with pytest.raises(UserError, match=word):
            draw(run, tmp_path, *flags.split())
    assert list(tmp_path.iterdir()) == []
    assert_refused(call("likelihood", latent.home), "latents", "pixel space")


def test_a_run_without_its_first_stage_or_scale(latent, text, tmp_path):
    for harm, word in ((lambda run: shutil.rmtree(run / "first_stage"), "first_stage"), (remove_scale, "latent_scale")):
        run = shutil.copytree(latent.home, tmp_path / word)
        harm(run)
        assert_refused(call("sample", run), word)
    run = shutil.copytree(text.home, tmp_path / "again")
    remove_scale(run)
    with pytest.raises(UserError, match="latent_scale"):
        start(TEXT, run)


def remove_scale(run):
    for path in run.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["latent_scale"]
        path.write_text(json.dumps(state))


def test_the_presets_fit_each_other():
    stage, latent = PRESETS["autoencoder"], PRESETS["latent"]
    side = stage.data.size // stage.model.size_multiple
    assert latent.task().shape == PRESETS["latent-text"].task().shape == (stage.model.embed_dim, side, side)
    assert stage.model.channels == latent.model.channels
    assert stage.data.size**2 >= 8 * np.prod(latent.task().shape) and stage.model.size_multiple == 4
