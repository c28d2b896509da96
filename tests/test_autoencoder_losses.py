"""The losses of an autoencoder and its discriminator against float64 formulas, and against a training in PyTorch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import draw_weights
from test_autoencoder import peers
from test_discriminator import peer as discriminator_peer

import mindspore as ms
from mindspore import Tensor, ops

from ms_diffusion.convert import load_into
from ms_diffusion.losses import (
    D_LOSSES,
    adaptive_weight,
    autoencoder_loss,
    discriminator_loss,
    generator_loss,
    hinge_d_loss,
    l1,
    l2,
    vanilla_d_loss,
    vq_loss,
)
from ms_diffusion.models.autoencoder import AutoencoderConfig, VQConfig
from ms_diffusion.models.discriminator import NLayerDiscriminator
from ms_diffusion.runtime import compiled
from ms_diffusion.training.tasks.autoencoder import OBJECTIVES, AutoencoderTrainConfig, autoencoder_losses

TOLERANCE = 1e-4
seeds, batches, scales = st.integers(0, 2**32 - 1), st.sampled_from([1, 13]), st.sampled_from([0.1, 1, 30])
quick = settings(deadline=None, max_examples=10)


def tensors(*arrays):
    return [Tensor(np.asarray(a, np.float32)) for a in arrays]


def number(tensor) -> float:
    assert tensor.shape == () and tensor.dtype == ms.float32
    return float(tensor.asnumpy())


# Against the formulas


@quick
@given(seeds, batches, scales)
def test_losses_of_logits(seed, batch, scale):
    real, fake = (scale * np.random.default_rng(seed).standard_normal((2, batch, 1, 3, 2))).astype(np.float32)
    r, f = real.astype(np.float64), fake.astype(np.float64)
    hinge = (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean()) / 2
    vanilla = (np.logaddexp(0, -r).mean() + np.logaddexp(0, f).mean()) / 2
    assert number(hinge_d_loss(*tensors(real, fake))) == pytest.approx(hinge, rel=1e-5, abs=1e-6)
    assert number(vanilla_d_loss(*tensors(real, fake))) == pytest.approx(vanilla, rel=1e-5, abs=1e-6)
    assert number(generator_loss(*tensors(fake))) == pytest.approx(-f.mean(), rel=1e-5, abs=1e-5 * scale)
    for kind, value in (("hinge", hinge), ("vanilla", vanilla)):
        found = discriminator_loss(*tensors(real, fake), 0.3, D_LOSSES[kind])
        assert number(found) == pytest.approx(0.3 * value, rel=1e-5, abs=1e-6)
    assert number(discriminator_loss(*tensors(real, fake), 0.5)) == pytest.approx(0.5 * hinge, rel=1e-5, abs=1e-6)


def test_large_logits_stay_finite():
    logits = np.array([-1e4, -100, 100, 1e4], np.float32)
    assert number(vanilla_d_loss(*tensors(logits, logits))) == pytest.approx(10100 / 4, rel=1e-6)
    gradient = ms.grad(vanilla_d_loss, (0, 1))(*tensors(logits, logits))
    np.testing.assert_allclose(gradient[0].asnumpy(), np.array([-1, -1, 0, 0]) / 8, atol=1e-6)
    np.testing.assert_allclose(gradient[1].asnumpy(), np.array([0, 0, 1, 1]) / 8, atol=1e-6)


@quick
@given(seeds, batches, scales, st.floats(-2, 2), st.sampled_from([0, 1e-6, 0.5]), st.booleans())
def test_autoencoder_loss(seed, batch, scale, logvar, kl_weight, with_perceptual):
    rng = np.random.default_rng(seed)
    x, reconstruction = scale * rng.standard_normal((2, batch, 2, 3, 4))
    kl, perceptual = 10 * rng.random(batch), rng.random(batch) * with_perceptual
    elements = (abs(x - reconstruction) + perceptual.reshape(-1, 1, 1, 1)) / np.exp(logvar) + logvar
    expected = elements.sum() / batch + kl_weight * kl.sum() / batch
    more = tensors(perceptual) if with_perceptual else []
    found = autoencoder_loss(*tensors(x, reconstruction, kl, logvar), kl_weight, *more)
    assert number(found) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@quick
@given(seeds, batches, st.floats(-2, 2), st.floats(0, 3), st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 3, 4), (2, 3, 4)]))
def test_weights_of_pixels_and_of_the_likelihood(seed, batch, logvar, pixel_weight, shape):
    rng = np.random.default_rng(seed)
    x, reconstruction = rng.standard_normal((2, batch, 2, 3, 4))
    kl, perceptual, weights = 10 * rng.random(batch), rng.random(batch), rng.random((batch, *shape))
    elements = (pixel_weight * abs(x - reconstruction) + perceptual.reshape(-1, 1, 1, 1)) / np.exp(logvar) + logvar
    expected = (weights * elements).sum() / batch + 0.1 * kl.sum() / batch
    options = *tensors(perceptual), pixel_weight, *tensors(weights)
    found = autoencoder_loss(*tensors(x, reconstruction, kl, logvar), 0.1, *options)
    assert number(found) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@quick
@given(seeds, batches, scales, st.sampled_from([0, 0.3]), st.sampled_from(["l1", "l2"]))
def test_vq_loss(seed, batch, scale, codebook_weight, pixel_loss):
    rng = np.random.default_rng(seed)
    x, reconstruction = scale * rng.standard_normal((2, batch, 2, 3, 4))
    perceptual, codebook_loss = rng.random(batch), rng.random()
    error = abs(x - reconstruction) if pixel_loss == "l1" else (x - reconstruction) ** 2
    expected = 0.4 * error.mean() + perceptual.mean() + codebook_weight * codebook_loss
    arrays, loss = tensors(x, reconstruction, codebook_loss), {"l1": l1, "l2": l2}[pixel_loss]
    found = vq_loss(*arrays, codebook_weight, *tensors(perceptual), loss, 0.4)
    assert number(found) == pytest.approx(expected, rel=1e-4)


def test_the_best_logvar_is_the_log_of_the_mean_error():
    x, reconstruction, kl, logvar = tensors(np.zeros((2, 1, 2, 2)), np.full((2, 1, 2, 2), 0.3), np.zeros(2), np.log(0.3))
    gradient = ms.grad(autoencoder_loss, 3)(x, reconstruction, kl, logvar, 0.0)
    assert abs(number(gradient)) < 1e-5


@quick
@given(seeds, st.floats(-9, 9), st.floats(0.1, 2))
def test_adaptive_weight(seed, scale, disc_weight):
    nll, g = np.random.default_rng(seed).standard_normal((2, 3, 2, 3, 3)) * np.array([1, 10**scale]).reshape(2, 1, 1, 1, 1)
    expected = min(np.linalg.norm(nll) / (np.linalg.norm(g) + 1e-4), 1e4) * disc_weight
    assert number(adaptive_weight(*tensors(nll, g), disc_weight)) == pytest.approx(expected, rel=1e-4)


def test_adaptive_weight_of_no_gradient():
    nothing, something = tensors(np.zeros((2, 2)), np.ones((2, 2)))
    assert number(adaptive_weight(nothing, something)) == number(adaptive_weight(nothing, nothing)) == 0
    assert number(adaptive_weight(something, nothing)) == 1e4
    assert number(adaptive_weight(something, something)) == pytest.approx(2 / 2.0001)


# As a training has them, with both networks

SIZES = dict(ch=4, ch_mult=(1,), num_res_blocks=1, channels=1, resolution=8, z_channels=3, embed_dim=2, groups=2)
GAUSSIAN = AutoencoderConfig(**SIZES, attention="none")
CODEBOOK = VQConfig(**SIZES, attention="none", n_embed=7)
LR = 1e-3  # of plain descent, in either framework


def perceptual(x, y):
    """Stands for LPIPS: mean squared differences of neighbours, in either framework."""
    return (((x[..., 1:] - x[..., :-1]) - (y[..., 1:] - y[..., :-1])) ** 2).mean((1, 2, 3))


class Peer:
    """The same training in PyTorch, as published: one loss, and the weight by autograd within, which is 0 at first."""

    def __init__(self, config, parameters, channels, train, distance):
        import torch

        self.torch, self.train, self.distance = torch, train, distance
        self.net, self.discriminator = peers()[2](config), discriminator_peer(channels, 4, 1, "batch").double()
        self.logvar = torch.nn.Parameter(torch.tensor(0.0).double())
        self.w = dict(self.net.named_parameters())
        self.w |= {} if isinstance(config, VQConfig) else {"logvar": self.logvar}
        self.d_w = dict(self.discriminator.named_parameters())
        with torch.no_grad():
            for p in parameters:
                (self.w | self.d_w)[p.name].copy_(torch.tensor(p.asnumpy()))

    def judge(self, images, cond):
        return self.discriminator(self.torch.cat([images, *cond], 1))

    def descend(self, loss, w):
        gradients = dict(zip(w, self.torch.autograd.grad(loss, list(w.values())), strict=True))
        with self.torch.no_grad():
            for name in w:
                w[name] -= LR * gradients[name]
        return {name: gradient.numpy() for name, gradient in gradients.items()}

    def autoencoder_step(self, x, noise, cond, started):
        torch, train = self.torch, self.train
        reconstruction, *latent = self.net(x, *noise)
        apart = self.distance(x, reconstruction) if self.distance else torch.zeros(len(x)).double()
        error = (x - reconstruction).abs() if train.pixel_loss == "l1" else (x - reconstruction) ** 2
        error = error + train.perceptual_weight * apart.view(-1, 1, 1, 1)
        if noise:
            mean, log = latent[0].chunk(2, 1)
            penalty, weight, more = 0.5 * (mean**2 + log.exp() - 1 - log).sum() / len(x), train.kl_weight, []
            nll = (error / self.logvar.exp() + self.logvar).sum() / len(x)
        else:
            penalty, ids = latent
            shares = torch.nn.functional.one_hot(ids, 7).double().view(-1, 7).mean(0)
            more = [(-(shares * (shares + 1e-10).log()).sum()).exp(), (shares > 0).sum()]
            weight, nll = train.codebook_weight, error.mean()
        g_loss = -self.judge(reconstruction, cond).mean()
        last = self.net.decoder.conv_out.weight
        a, b = (self.torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (nll, g_loss))
        d_weight = train.disc_weight * (a / (b + 1e-4)).clamp(0, 1e4)
        loss = nll + weight * penalty + started * train.disc_factor * d_weight * g_loss
        numbers = [nll, error.mean(), apart.mean(), penalty, *more, *[g_loss, torch.tensor(train.disc_factor)] * started]
        numbers = [number.item() for number in numbers]
        return d_weight.item(), loss.item(), numbers, reconstruction.detach(), self.descend(loss, self.w)

    def discriminator_step(self, x, reconstruction, cond):
        real, fake = self.judge(x, cond), self.judge(reconstruction, cond)
        if self.train.disc_loss == "hinge":
            loss = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        else:
            loss = -(self.torch.sigmoid(real).log().mean() + (1 - self.torch.sigmoid(fake)).log().mean())
        loss = self.train.disc_factor * loss / 2
        return loss.item(), [real.mean().item(), fake.mean().item()], self.descend(loss, self.d_w)


def assert_close(ours, reference, name=""):
    """To TOLERANCE of the largest entry; nothing is compared with 0 alone."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, name
    assert abs(ours - reference).max() <= TOLERANCE * abs(reference).max() > 0, name


def assert_same_and_descend(parameters, gradients, expected):
    for p, gradient in zip(parameters, gradients, strict=True):
        assert_close(gradient.asnumpy(), expected.pop(p.name), p.name)
        ops.assign(p, p - LR * gradient)
    assert not expected


@pytest.mark.parametrize(
    ("mode", "batch", "kind", "conditional", "distance", "config", "pixel_loss"),
    [
        ("graph", 13, "hinge", False, perceptual, GAUSSIAN, "l1"),
        ("graph", 1, "vanilla", True, None, GAUSSIAN, "l1"),
        ("pynative", 13, "hinge", True, perceptual, GAUSSIAN, "l1"),
        ("graph", 13, "hinge", False, perceptual, CODEBOOK, "l1"),
        ("pynative", 1, "vanilla", True, perceptual, CODEBOOK, "l2"),
    ],
)
def test_losses_of_a_training_like_pytorch(mode, batch, kind, conditional, distance, config, pixel_loss):
    """Before the discriminator's start, and in two turns after it. The running statistics of its norms are left out: `weigh`
    adds to them once more than PyTorch, and nothing reads them."""
    torch = pytest.importorskip("torch")
    weights = dict(kl_weight=0.1, codebook_weight=0.9, perceptual_weight=0.7, disc_weight=0.6, disc_factor=0.8)
    train = AutoencoderTrainConfig(disc_loss=kind, logvar_init=0.2, pixel_loss=pixel_loss, **weights)
    net, discriminator = config.build(), NLayerDiscriminator(1 + conditional, 4, 1)
    objective = OBJECTIVES[type(net)](net, train)
    parameters, d_parameters = [*net.trainable_params(), *objective.parameters], discriminator.trainable_params()
    load_into(net, draw_weights({p.name: p.shape for p in net.get_parameters()}))
    arrays = draw_weights({p.name: p.shape for p in d_parameters})
    for p in d_parameters:  # large, so that logits lie on both sides of the hinges
        p.set_data(Tensor(3 * arrays[p.name] if p.ndim == 4 else arrays[p.name]))
    peer = Peer(config, [*parameters, *d_parameters], 1 + conditional, train, distance)

    make = compiled if mode == "graph" else lambda fn: fn
    likelihood, adversarial, last_gradients, weigh, d_loss = autoencoder_losses(
        net, discriminator, objective, distance, train
    )
    likelihood_step = make(ms.value_and_grad(likelihood, None, parameters, has_aux=True))
    adversarial_step = make(ms.value_and_grad(adversarial, None, parameters, has_aux=True))
    d_step, weigh = make(ms.value_and_grad(d_loss, None, d_parameters, has_aux=True)), make(weigh)

    rng = np.random.default_rng(batch)
    for started in (False, True, True):
        drawn = [rng.standard_normal((batch, c, 8, 8), np.float32) for c in (1, 2, 1)[: 2 + conditional]]
        (x, noise, *cond), (t_x, t_noise, *t_cond) = map(Tensor, drawn), (torch.from_numpy(a).double() for a in drawn)
        noise, t_noise = ([noise], [t_noise]) if net.needs_noise else ([None], [])
        t_weight, t_loss, t_numbers, t_reconstruction, t_gradients = peer.autoencoder_step(t_x, t_noise, t_cond, started)
        if started:
            weight = weigh(*last_gradients(x, *noise, *cond))
            assert_close(number(weight), t_weight)
            assert number(weight) < 0.99e4 * train.disc_weight  # it is not cut
            (loss, (reconstruction, numbers)), gradients = adversarial_step(x, *noise, weight, *cond)
        else:
            (loss, (reconstruction, numbers)), gradients = likelihood_step(x, *noise)
        assert_close(number(loss), t_loss)
        assert len(objective.logged) + 2 * started == len(t_numbers)
        np.testing.assert_allclose(numbers.asnumpy(), t_numbers, rtol=TOLERANCE, atol=1e-7)
        assert_close(reconstruction.asnumpy(), t_reconstruction)
        assert_same_and_descend(parameters, gradients, t_gradients)
        if started:
            (loss, logits), gradients = d_step(x, reconstruction, *cond)
            t_loss, t_logits, t_gradients = peer.discriminator_step(t_x, t_reconstruction, t_cond)
            assert_close(number(loss), t_loss)
            np.testing.assert_allclose(logits.asnumpy(), t_logits, rtol=TOLERANCE)
            assert_same_and_descend(d_parameters, gradients, t_gradients)
