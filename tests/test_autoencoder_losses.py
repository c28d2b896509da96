"""The losses of an autoencoder and its discriminator, held to float64 formulas, and both training steps to PyTorch's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion.losses import (
    D_LOSSES,
    adaptive_weight,
    adopt_weight,
    autoencoder_loss,
    discriminator_loss,
    generator_loss,
    hinge_d_loss,
    vanilla_d_loss,
)
from ms_diffusion.models.discriminator import NLayerDiscriminator
from ms_diffusion.models.layers import conv2d, name_and_initialise
from ms_diffusion.runtime import compiled

TOLERANCE = 1e-4
seeds, batches, scales = st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 13]), st.sampled_from([0.1, 1, 30])
quick = settings(deadline=None, max_examples=20)


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


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_adopt_weight(mode):
    def adopted(step):
        return adopt_weight(0.5, step, 3), adopt_weight(0.5, step, 3, value=0.25)

    call = ms.jit(adopted) if mode == "graph" else adopted
    found = [[number(w) for w in call(Tensor(step, ms.int32))] for step in (0, 2, 3, 100)]
    assert found == [[0, 0.25], [0, 0.25], [0.5, 0.5], [0.5, 0.5]]


# Both steps of a training, on an autoencoder of two convolutions

KL_WEIGHT, PERCEPTUAL_WEIGHT, DISC_WEIGHT, DISC_FACTOR, DISC_START, LR = 1e-2, 0.7, 0.6, 0.8, 2, 1e-3


class Encoder(nn.Cell):
    """x, noise (B, 1, 8, 8), (B, 2, 8, 8) -> latents like noise, KL (B,)."""

    def __init__(self):
        super().__init__()
        self.conv = conv2d(1, 4, 3, padding=1)
        name_and_initialise(self, 0)

    def construct(self, x, noise):
        mean, logvar = ops.chunk(self.conv(x), 2, 1)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1 - logvar).sum((1, 2, 3))
        return mean + ops.exp(0.5 * logvar) * noise, kl


def perceptual(x, y):
    """Stands for LPIPS: mean squared differences of neighbours, in either framework."""
    return (((x[..., 1:] - x[..., :-1]) - (y[..., 1:] - y[..., :-1])) ** 2).mean((1, 2, 3))


def make_networks(conditional):
    encoder, decoder = Encoder(), nn.SequentialCell(conv2d(2, 1, 3, padding=1))
    name_and_initialise(decoder, 1)
    discriminator = NLayerDiscriminator(1 + conditional, 4, 1)
    for p in discriminator.trainable_params():
        p.set_data(Tensor(10 * p.asnumpy() if p.ndim == 4 else p.asnumpy()))  # so that the weight is not cut at 1e4
    for kind, net in (("encoder", encoder), ("decoder", decoder), ("discriminator", discriminator)):
        for p in net.get_parameters():
            p.name = f"{kind}.{p.name}"
    return encoder, decoder, discriminator, Parameter(Tensor(np.float32(0.2)), name="logvar")


def make_steps(encoder, last, discriminator, logvar, d_loss):
    """autoencoder_step(x, noise, cond, step) and discriminator_step(x, reconstruction, cond, step), as losses.py tells."""
    body_parameters = ms.ParameterTuple(encoder.trainable_params())
    last_parameters = ms.ParameterTuple([*last.trainable_params(), logvar])
    optimizer = nn.SGD([*body_parameters, *last_parameters], LR)
    d_optimizer = nn.SGD(discriminator.trainable_params(), LR)

    def judge(images, cond):
        return discriminator(images if cond is None else ops.concat((images, cond), 1))

    def likelihood(h, kl, x):
        reconstruction = last(h)
        distance = PERCEPTUAL_WEIGHT * perceptual(x, reconstruction)
        return autoencoder_loss(x, reconstruction, kl, logvar, KL_WEIGHT, distance), reconstruction

    def adversarial(h, cond):
        return generator_loss(judge(last(h), cond))

    def body(x, noise, h_gradient, kl_gradient):
        h, kl = encoder(x, noise)
        return (h * h_gradient).sum() + (kl * kl_gradient).sum()

    likelihood_gradients = ms.value_and_grad(likelihood, (0, 1), last_parameters, has_aux=True)
    adversarial_gradients = ms.value_and_grad(adversarial, 0, last_parameters)
    body_gradients = ms.grad(body, None, body_parameters)

    def autoencoder_step(x, noise, cond, step):
        h, kl = encoder(x, noise)
        (loss, reconstruction), ((h_gradient, kl_gradient), gradients) = likelihood_gradients(h, kl, x)
        g_loss, (g_h_gradient, g_gradients) = adversarial_gradients(h, cond)
        weight = adaptive_weight(gradients[0], g_gradients[0], DISC_WEIGHT) * adopt_weight(DISC_FACTOR, step, DISC_START)
        all_gradients = body_gradients(x, noise, h_gradient + weight * g_h_gradient, kl_gradient)
        for a, b in zip(gradients, g_gradients):  # noqa: B905, since a graph's zip takes no strict
            all_gradients += (a + weight * b,)
        loss = ops.depend(loss + weight * g_loss, optimizer(all_gradients))
        return loss, weight, reconstruction, all_gradients

    def of_discriminator(x, reconstruction, cond, step):
        factor = adopt_weight(DISC_FACTOR, step, DISC_START)
        return discriminator_loss(judge(x, cond), judge(reconstruction, cond), factor, d_loss)

    d_gradients = ms.value_and_grad(of_discriminator, None, d_optimizer.parameters)

    def discriminator_step(x, reconstruction, cond, step):
        loss, gradients = d_gradients(x, reconstruction, cond, step)
        return ops.depend(loss, d_optimizer(gradients)), gradients

    return autoencoder_step, discriminator_step


class Peer:
    """The same training in PyTorch: one loss, and the weight by autograd.grad within it."""

    def __init__(self, arrays, d_loss):
        import torch
        import torch.nn.functional as F

        self.torch, self.F, self.d_loss = torch, F, d_loss
        self.w = {name: torch.from_numpy(a.copy()).requires_grad_("running" not in name) for name, a in arrays.items()}

    def judge(self, images, cond):
        images = images if cond is None else self.torch.cat([images, cond], 1)
        w = {name.removeprefix("discriminator.main."): a for name, a in self.w.items()}
        h = self.F.leaky_relu(self.F.conv2d(images, w["0.weight"], w["0.bias"], 2, 1), 0.2)
        h = self.F.conv2d(h, w["2.weight"], None, 1, 1)
        h = self.F.batch_norm(h, w["3.running_mean"], w["3.running_var"], w["3.weight"], w["3.bias"], True)
        return self.F.conv2d(self.F.leaky_relu(h, 0.2), w["5.weight"], w["5.bias"], 1, 1)

    def descend(self, loss, names):
        gradients = self.torch.autograd.grad(loss, [self.w[name] for name in names])
        with self.torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                self.w[name] -= LR * gradient
        return [g.numpy() for g in gradients]

    def autoencoder_step(self, x, noise, cond, step, names):
        w, F, grad = self.w, self.F, self.torch.autograd.grad
        mean, logvar = F.conv2d(x, w["encoder.conv.weight"], w["encoder.conv.bias"], padding=1).chunk(2, 1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        z = mean + (logvar / 2).exp() * noise
        reconstruction = F.conv2d(z, w["decoder.0.weight"], w["decoder.0.bias"], padding=1)
        rec = (x - reconstruction).abs() + PERCEPTUAL_WEIGHT * perceptual(x, reconstruction).view(-1, 1, 1, 1)
        nll = (rec / w["logvar"].exp() + w["logvar"]).sum() / len(x)
        g_loss = -self.judge(reconstruction, cond).mean()
        norms = [grad(loss, w["decoder.0.weight"], retain_graph=True)[0].norm() for loss in (nll, g_loss)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4) * DISC_WEIGHT * (DISC_FACTOR if step >= DISC_START else 0)
        loss = nll + KL_WEIGHT * kl / len(x) + weight * g_loss
        gradients = self.descend(loss, names)
        return loss.item(), weight.item(), reconstruction.detach(), gradients

    def discriminator_step(self, x, reconstruction, cond, step, names):
        real, fake = self.judge(x, cond), self.judge(reconstruction, cond)
        if self.d_loss == "hinge":
            loss = 0.5 * (self.F.relu(1 - real).mean() + self.F.relu(1 + fake).mean())
        else:
            loss = 0.5 * (self.F.softplus(-real).mean() + self.F.softplus(fake).mean())
        loss = loss * (DISC_FACTOR if step >= DISC_START else 0)
        gradients = self.descend(loss, names)
        return loss.item(), gradients


def assert_close(ours, reference, name=""):
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, name
    assert abs(ours - reference).max() <= TOLERANCE * abs(reference).max(), name


@pytest.mark.parametrize(
    ("mode", "batch", "conditional", "d_loss"),
    [("graph", 13, False, "hinge"), ("graph", 1, True, "vanilla"), ("pynative", 13, True, "hinge")],
)
def test_steps_that_take_turns_like_pytorch(mode, batch, conditional, d_loss):
    torch = pytest.importorskip("torch")
    encoder, decoder, discriminator, logvar = make_networks(conditional)
    parameters = [p for net in (encoder, decoder, discriminator) for p in net.get_parameters()] + [logvar]
    peer = Peer({p.name: p.asnumpy() for p in parameters}, d_loss)
    names = [p.name for net in (encoder, decoder) for p in net.trainable_params()] + ["logvar"]
    d_names = [p.name for p in discriminator.trainable_params()]
    steps = make_steps(encoder, decoder, discriminator, logvar, D_LOSSES[d_loss])
    autoencoder_step, discriminator_step = map(compiled, steps) if mode == "graph" else steps

    rng = np.random.default_rng(batch)
    for step in range(DISC_START + 2):
        x, noise, cond = (rng.standard_normal((batch, c, 8, 8), np.float32) for c in (1, 2, 1))
        count = Tensor(step, ms.int32)
        cond, t_cond = (Tensor(cond), torch.from_numpy(cond)) if conditional else (None, None)

        loss, weight, reconstruction, gradients = autoencoder_step(Tensor(x), Tensor(noise), cond, count)
        t_loss, t_weight, t_reconstruction, t_gradients = peer.autoencoder_step(
            torch.from_numpy(x), torch.from_numpy(noise), t_cond, step, names
        )
        assert_close(reconstruction.asnumpy(), t_reconstruction)
        assert_close([number(loss), number(weight)], [t_loss, t_weight])
        for name, a, b in zip(names, gradients, t_gradients, strict=True):
            assert_close(a.asnumpy(), b, name)

        d_loss_value, d_gradients = discriminator_step(Tensor(x), reconstruction, cond, count)
        t_d_loss, t_d_gradients = peer.discriminator_step(torch.from_numpy(x), t_reconstruction, t_cond, step, d_names)
        assert_close(number(d_loss_value), t_d_loss)
        for name, a, b in zip(d_names, d_gradients, t_d_gradients, strict=True):
            assert_close(a.asnumpy(), b, name)
        if step < DISC_START:
            assert number(weight) == number(d_loss_value) == 0
            assert all((g.asnumpy() == 0).all() for g in d_gradients)
        else:
            assert 0 < number(weight) < 0.99e4 * DISC_WEIGHT * DISC_FACTOR and number(d_loss_value) > 0
    for p in parameters:
        assert_close(p.asnumpy(), peer.w[p.name].detach().numpy(), p.name)


def test_without_the_adversarial_part_the_gradients_are_those_of_one_loss():
    """Before its start: the cut at the last layer changes nothing."""
    encoder, decoder, discriminator, logvar = make_networks(False)
    parameters = ms.ParameterTuple([*encoder.trainable_params(), *decoder.trainable_params(), logvar])
    rng = np.random.default_rng(0)
    x, noise = (Tensor(rng.standard_normal((2, c, 8, 8), np.float32)) for c in (1, 2))

    def whole(x, noise):
        h, kl = encoder(x, noise)
        reconstruction = decoder(h)
        return autoencoder_loss(x, reconstruction, kl, logvar, KL_WEIGHT, PERCEPTUAL_WEIGHT * perceptual(x, reconstruction))

    expected = ms.grad(whole, None, parameters)(x, noise)
    step = make_steps(encoder, decoder, discriminator, logvar, hinge_d_loss)[0]
    gradients = step(x, noise, None, Tensor(0, ms.int32))[3]
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-5, atol=1e-5)
