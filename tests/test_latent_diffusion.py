"""The classes that users of CompVis latent-diffusion know, against formulas and the functions that they stand on."""

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Affine

from mindspore import Tensor

import ms_diffusion as md
from ms_diffusion.latent import FirstStage
from ms_diffusion.models.autoencoder import AutoencoderConfig, VQConfig
from ms_diffusion.models.context import LatentUnetConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.latent_diffusion import array, grid
from ms_diffusion.training.runs import Run

T = 6
SIZES = dict(model_channels=8, groups=4, channel_mult=(1,), attention_resolutions=(), num_head_channels=8, latent_size=4)
STAGE = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, channels=3, resolution=8, z_channels=2, embed_dim=2, groups=4)
MODEL = LatentUnetConfig(**SIZES, num_classes=3, context_dim=6, channels=3)
rng = np.random.default_rng(0)


def draw(*shape):
    return rng.standard_normal(shape, np.float32)


def run_of(net, process, shape, config, **task) -> Run:
    """A run that was never saved."""
    run = object.__new__(Run)
    task = SimpleNamespace(shape=shape, **task)
    vars(run).update(net=net, diffusion=process, task=task, config=SimpleNamespace(model=config), name="a run")
    return run


@cache
def face(codebook: bool = False) -> md.LatentDiffusion:
    """A LatentDiffusion conditioned on classes, with weights that no zero hides."""
    net = MODEL.build()
    for p in net.get_parameters():
        if not p.asnumpy().any():
            p.set_data(Tensor(0.3 * draw(*p.shape)))
    stage = VQConfig(**STAGE, n_embed=7) if codebook else AutoencoderConfig(**STAGE)
    first_stage = FirstStage(stage.build(), 0.5, stage.size_multiple)
    process = md.GaussianDiffusion(np.linspace(0.1, 0.9, T), "eps", "l2", clip_denoised=False)
    options = {"first_stage": first_stage, "has_codebook": codebook, "quantize": first_stage.quantize}
    return md.LatentDiffusion(run_of(net.set_train(False), process, (2, 4, 4), MODEL, **options), log_every_t=2)


def test_a_gaussian():
    moments, other, z = draw(3, 4, 2, 5), draw(3, 4, 2, 5), draw(3, 2, 2, 5).astype(np.float64)
    found = md.DiagonalGaussianDistribution(moments)
    (mean, logvar), (mean2, logvar2) = (np.split(a.astype(np.float64), 2, 1) for a in (moments, other))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found.mode(), mean, **close)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3))
    np.testing.assert_allclose(found.kl(), kl, **close)
    ratio = ((mean - mean2) ** 2 + np.exp(logvar)) / np.exp(logvar2)
    both = 0.5 * (ratio - 1 - logvar + logvar2).sum((1, 2, 3))
    np.testing.assert_allclose(found.kl(md.DiagonalGaussianDistribution(other)), both, **close)
    nll = 0.5 * (math.log(2 * math.pi) + logvar + (z - mean) ** 2 / np.exp(logvar)).sum((1, 2, 3))
    np.testing.assert_allclose(found.nll(z), nll, **close)
    noise = (found.sample(seed=3) - mean) / np.exp(logvar / 2)
    assert (found.sample(seed=3) == found.sample(seed=3)).all() and 0.5 < noise.std() < 1.5
    certain = md.DiagonalGaussianDistribution(moments, deterministic=True)
    np.testing.assert_array_equal(certain.sample(), certain.mode())
    assert not certain.kl().any() and not certain.std.any()


def test_conditions_and_the_network():
    latent, labels, x, t = face(), np.array([2, 0], np.int32), draw(2, 2, 4, 4), np.array([1, 5], np.int32)
    context = latent.get_learned_conditioning({"class_label": labels})
    assert context.shape == (2, 1, 6)
    expected = latent.model(Tensor(x), Tensor(t), Tensor(labels)).asnumpy()
    for cond in (context, [context], {"c_crossattn": [context]}):
        np.testing.assert_allclose(latent.apply_model(x, t, cond), expected, atol=1e-5)
    latent.patch = 4
    np.testing.assert_allclose(latent.apply_model(x, t, context), expected, atol=1e-5)
    wide = draw(2, 2, 4, 8)
    assert latent.apply_model(wide, t, context).shape == wide.shape
    latent.patch = None


@pytest.mark.slow
def test_the_first_stage():
    x = rng.uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)
    latent = face()
    posterior = latent.encode_first_stage(x)
    z = latent.get_first_stage_encoding(posterior, seed=1)
    np.testing.assert_allclose(z, 0.5 * posterior.sample(1), atol=1e-6)
    decoded = latent.first_stage_model.decode(Tensor(z / 0.5)).asnumpy()
    np.testing.assert_allclose(latent.decode_first_stage(z), decoded, atol=1e-5)
    quantized = face(codebook=True)
    model, encoded = quantized.first_stage_model, quantized.encode_first_stage(x)
    np.testing.assert_allclose(encoded, model.encode(Tensor(x)).asnumpy(), atol=1e-5)
    z = quantized.get_first_stage_encoding(encoded)
    unquantized = model.decode_latent(Tensor(encoded)).asnumpy()
    np.testing.assert_allclose(quantized.decode_first_stage(z, force_not_quantize=True), unquantized, atol=1e-5)
    assert abs(quantized.decode_first_stage(z) - unquantized).max() > 1e-4
    logits = draw(2, 7, 4, 4)
    expected = model.decode_ids(Tensor(logits.argmax(1).astype(np.int32))).asnumpy()
    np.testing.assert_allclose(quantized.decode_first_stage(logits, predict_cids=True), expected, atol=1e-5)


def test_the_loss():
    latent, x, noise, t = face(), draw(2, 2, 4, 4), draw(2, 2, 4, 4), np.array([2, 4], np.int32)
    cond = latent.get_learned_conditioning(np.array([1, 2], np.int32))
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 0.9, T))[t].reshape(-1, 1, 1, 1)
    noised = np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * noise
    np.testing.assert_allclose(latent.q_sample(x, t, noise), noised, atol=1e-5)
    error = ((latent.apply_model(noised, t, cond) - noise) ** 2).mean((1, 2, 3))
    loss, log = latent.p_losses(x, cond, t, noise)
    assert loss == log["loss"] == pytest.approx(error.mean(), rel=1e-4)
    assert log["loss_vlb"] == pytest.approx((latent.diffusion.lvlb_weights[t] * error).mean(), rel=1e-4)


def test_samples_are_those_of_the_samplers():
    """DDIM ends at the first timestep, as the original's; guidance is that of the noise."""
    latent, x_T = face(), draw(2, 2, 4, 4)
    cond, null = (latent.get_learned_conditioning(np.full(2, label, np.int32)) for label in (1, 3))
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": null}
    found, steps = latent.sample_log(cond, 2, ddim_steps=2, x_T=x_T, **guided)
    x, alpha_bars = x_T, np.cumprod(1 - np.linspace(0.1, 0.9, T))
    for t, following in ((4, 1), (1, 0)):
        eps, plain = (latent.apply_model(x, np.full(2, t), c) for c in (cond, null))
        eps = plain + 3 * (eps - plain)
        start = (x - np.sqrt(1 - alpha_bars[t]) * eps) / np.sqrt(alpha_bars[t])
        x = np.sqrt(alpha_bars[following]) * start + np.sqrt(1 - alpha_bars[following]) * eps
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(steps["x_inter"][0], x_T)
    again = [latent.sample(cond, 2, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert abs(again[0] - again[2]).max() > 1e-3
    known, mask = draw(2, 2, 4, 4), np.ones((2, 1, 4, 4), np.float32)
    np.testing.assert_allclose(latent.sample(cond, 2, mask=mask, x0=known), known, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("codebook", [False, True])
def test_pictures_of_a_batch(codebook):
    latent = face(codebook)
    batch = {"image": rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32), "class_label": np.array([0, 1, 2])}
    log = latent.log_images(batch, N=2, n_row=1, ddim_steps=2, plot_denoise_rows=True)
    shapes = {name: picture.shape for name, picture in log.items()}
    images = dict.fromkeys(
        ["inputs", "reconstruction", "samples", "samples_inpainting", "samples_outpainting"], (2, 3, 8, 8)
    )
    quantized = {"samples_x0_quantized": (2, 3, 8, 8)} if codebook else {}
    rows = {"diffusion_row": (3, 8, 4 * 8), "denoise_row": (3, 16, 3 * 8), "progressive_row": (3, 16, 4 * 8)}
    assert shapes == {**images, **quantized, **rows, "mask": (2, 1, 4, 4)}
    assert all(np.isfinite(picture).all() for picture in log.values())
    np.testing.assert_array_equal(log["inputs"], batch["image"][:2].transpose(0, 3, 1, 2))
    few = latent.log_images(batch, N=2, sample=False, plot_progressive_rows=False, return_keys=["inputs", "diffusion_row"])
    assert [*few] == ["inputs", "diffusion_row"]


@pytest.mark.slow
def test_losses_of_an_autoencoder_and_its_discriminator():
    """Against formulas, and the weight of the training's own losses."""
    net = AutoencoderConfig(**STAGE | {"resolution": 16}).build()
    x = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    moments = net.encode(Tensor(x))
    features = net.decoder.features(net.post_quant_conv(moments[:, :2]))
    images, posterior = net.decoder.last(features), md.DiagonalGaussianDistribution(moments)
    loss_of = md.LPIPSWithDiscriminator(5, 0.3, 1e-3, disc_num_layers=1, disc_factor=0.9, disc_weight=0.7)
    loss_of.discriminator.set_train(False)
    logits = [loss_of.discriminator(Tensor(array(a))).asnumpy() for a in (x, images)]
    error = abs(x - images.asnumpy()).astype(np.float64)
    nll, kl = (error / np.exp(0.3) + 0.3).sum((1, 2, 3)).mean(), posterior.kl().mean()
    for step, factor in ((4, 0), (5, 0.9)):
        loss, log = loss_of(x, images, posterior, 0, step, (net.decoder, features))
        weight = log.pop("train/d_weight")
        total = nll + 1e-3 * kl - weight * factor * logits[1].mean()
        expected = {"nll_loss": nll, "kl_loss": kl, "rec_loss": error.mean(), "g_loss": -logits[1].mean(), "logvar": 0.3}
        expected |= {"disc_factor": factor, "total_loss": total}
        assert log == {f"train/{name}": pytest.approx(value, rel=1e-3) for name, value in expected.items()}
        assert float(loss) == pytest.approx(total, rel=1e-3) and 0 < weight <= 0.7e4
        d_loss, log = loss_of(x, images, posterior, 1, step, split="val")
        hinge = (np.maximum(1 - logits[0], 0).mean() + np.maximum(1 + logits[1], 0).mean()) / 2
        assert float(d_loss) == log["val/disc_loss"] == pytest.approx(factor * hinge, rel=1e-4)
    assert loss_of(x, images, posterior, 0, 9)[1]["train/d_weight"] == 0


def test_pixels():
    """A network that predicts x_0 = x / 2 leads to 0, and its loss is known."""
    process = md.GaussianDiffusion(np.linspace(0.1, 0.9, T), "x0", "l1")
    pixels = md.DDPM(run_of(Affine(0.5, 0.0), process, (1, 4, 4), None, has_codebook=False), log_every_t=2)
    x, noise, t = draw(2, 1, 4, 4), draw(2, 1, 4, 4), np.array([0, 5], np.int32)
    loss, log = pixels.p_losses(x, t, noise)
    error = abs(0.5 * pixels.q_sample(x, t, noise) - x).mean()
    assert (loss, log["loss_simple"]) == (pytest.approx(error, rel=1e-4), pytest.approx(error, rel=1e-4))
    log = pixels.log_images({"image": x.transpose(0, 2, 3, 1)}, n_row=1)
    assert {name: picture.shape for name, picture in log.items()} == {
        "inputs": x.shape,
        "diffusion_row": (1, 4, 4 * 4),
        "samples": x.shape,
        "denoise_row": (1, 8, 5 * 4),
    }
    assert abs(log["samples"]).max() <= 1  # a clipped x_0


def test_rows_of_a_grid():
    """A row for each image, a column for each step."""
    steps = [np.full((2, 1, 2, 3), 10 * step) + np.arange(2).reshape(2, 1, 1, 1) for step in range(4)]
    picture = grid(steps)
    assert picture.shape == (1, 4, 12)
    np.testing.assert_array_equal(picture[0, ::2, ::3], [[0, 10, 20, 30], [1, 11, 21, 31]])
    np.testing.assert_array_equal(array(Tensor(picture.astype(np.float32))), picture)


def test_runs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="no diffusion model"):
        md.DDPM(run_of(None, None, (1, 2, 2), MODEL))
    with pytest.raises(UserError, match="no first stage"):
        md.LatentDiffusion(run_of(None, face().diffusion, (1, 2, 2), MODEL))
    with pytest.raises(UserError, match="quantize_denoised"):
        face().sample(None, 1, quantize_denoised=True)
