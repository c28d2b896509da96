"""Likelihoods on data N(m, s^2) and on small discrete data, whose own are known, in float64; divergences."""

import math

import numpy as np
import pytest
from helpers import process_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from mindspore import Parameter, Tensor, nn

from ms_diffusion.denoiser import make_denoiser
from ms_diffusion.likelihood import (
    bits_per_dim,
    dequantised_bits_per_dim,
    log_level,
    make_divergence,
    ode_log_likelihood,
    ode_timesteps,
    random_terms,
)
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.process import GaussianDiffusion, Process
from ms_diffusion.schedules import SCHEDULES, cosine_beta_schedule, edm_path, flow_path, linear_beta_schedule

M, S = 0.3, 0.5  # the data's mean and standard deviation
LEVELS = np.arange(256) / 127.5 - 1
examples = settings(deadline=None, max_examples=25)
pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar_T is")


def optimal_gain(alpha_bar, s=S):
    """d E[x_0 | x_t] / d x_t for x_0 ~ N(m, s^2)."""
    return math.sqrt(alpha_bar) * s**2 / (alpha_bar * s**2 + 1 - alpha_bar)


def exact_denoiser(diffusion, s=S):
    def denoise(x, t):
        alpha_bar = diffusion.alphas_cumprod[t]
        return M + optimal_gain(alpha_bar, s) * (x - math.sqrt(alpha_bar) * M)

    return denoise


def exact_with_divergence(diffusion, s=S):
    def both(x, t):
        return exact_denoiser(diffusion, s)(x, t), np.full(len(x), x[0].size * optimal_gain(diffusion.alphas_cumprod[t], s))

    return both


class Signs:
    """Noise of alternating signs along the batch: over each pair, the mean of a quadratic function is its expectation."""

    def standard_normal(self, shape):
        return (-1.0) ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape)


# The variational bound


@examples
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    T=st.integers(1, 60),
    v=st.sampled_from([0.0, 0.3, 1.0]),
    n=st.integers(0, 255),
)
def test_terms_of_gaussian_data(schedule, T, v, n):
    """E over x_t of each KL, from q by Bayes' rule as products of Gaussians and p the same with the exact denoiser's x_0."""
    diffusion, x_0 = GaussianDiffusion(SCHEDULES[schedule](T), v_posterior=v), n / 127.5 - 1
    bound = bits_per_dim(exact_denoiser(diffusion), diffusion, np.full((2, 3), x_0), Signs())
    for t in range(1, T):
        alpha, a_t, a_r = 1 - diffusion.betas[t], *diffusion.alphas_cumprod[[t, t - 1]]
        precision = alpha / (1 - alpha) + 1 / (1 - a_r)  # of q(x_{t-1} | x_t) times q(x_{t-1} | x_0)
        gain = optimal_gain(a_t)
        expected_mse = ((x_0 - M) * (1 - gain * math.sqrt(a_t))) ** 2 + gain**2 * (1 - a_t)
        q, p = 1 / precision, (1 - v) / precision + v * (1 - alpha)
        mean_shift = (math.sqrt(a_r) / (1 - a_r) / precision) ** 2 * expected_mse
        kl = 0.5 * (q / p + mean_shift / p - 1 + math.log(p / q))
        assert bound.terms[:, t].mean() == pytest.approx(kl / math.log(2), rel=1e-6, abs=1e-9)
        assert bound.mse[:, t].mean() == pytest.approx(expected_mse, rel=1e-9)
    mean, variance = math.sqrt(diffusion.alphas_cumprod[-1]) * x_0, 1 - diffusion.alphas_cumprod[-1]
    prior = (variance + mean**2 - 1 - math.log(variance)) / 2 / math.log(2)  # KL of a Gaussian from N(0, 1)
    np.testing.assert_allclose(bound.prior, prior, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bound.total, bound.prior + bound.terms.sum(1), rtol=1e-12)
    assert bound.terms.shape == bound.mse.shape == (2, T) and np.isfinite(bound.total).all()


@pytest.mark.parametrize("T", [1, 5])
def test_zero_terminal_snr(T):
    """alpha_bar_T = 0: no prior cost at all, and nothing is nan; at T = 1 one decoder of variance beta is the model."""
    betas = np.append(np.full(T - 1, 0.3), 1.0)
    diffusion, seen = GaussianDiffusion(betas, "x0"), []
    x = np.tile(LEVELS, (3, 1))
    bound = bits_per_dim(lambda x_t, t: 0.5 + 0 * x_t, diffusion, x, np.random.default_rng(0), seen.append)
    assert seen == list(range(T))[::-1]
    assert np.isfinite(bound.terms).all() and (bound.prior == 0).all()
    std = math.sqrt(1.0 if T == 1 else 0.3 * 0.3 / (1 - 0.49))  # the posterior's at t = 1, where alpha_bar is 0.7^2
    np.testing.assert_allclose(bound.terms[:, 0], -log_level(LEVELS, 0.5, std).mean() / math.log(2), rtol=1e-12)


def test_it_bounds_the_models_own_likelihood():
    """One pixel, data of three levels and the exact posterior mean: p(x_0) by quadrature over the whole reverse chain."""
    levels, weights = LEVELS[[40, 128, 230]], np.array([0.5, 0.2, 0.3])
    diffusion = GaussianDiffusion(cosine_beta_schedule(12), v_posterior=0.5)

    def denoise(x, t):  # E[x_0 | x_t]
        alpha_bar = diffusion.alphas_cumprod[t]
        log_p = -((x[..., None] - math.sqrt(alpha_bar) * levels) ** 2) / (2 * (1 - alpha_bar))
        p = weights * np.exp(log_p - log_p.max(-1, keepdims=True))
        return (p * levels).sum(-1) / p.sum(-1)

    grid, width = np.linspace(-6, 6, 2401, retstep=True)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)  # of x_T
    for t in range(11, 0, -1):
        mean = diffusion.posterior_mean_coef1[t] * denoise(grid, t) + diffusion.posterior_mean_coef2[t] * grid
        variance = diffusion.posterior_variance[t]
        step = np.exp(-((grid[:, None] - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        density = step @ density * width
    assert density.sum() * width == pytest.approx(1, abs=1e-6)
    std, means = math.sqrt(diffusion.posterior_variance[1]), denoise(grid, 0)
    p_x0 = np.array([(np.exp(log_level(x, means, std)) * density).sum() * width for x in LEVELS])
    assert p_x0.sum() == pytest.approx(1, abs=1e-6)

    rng, draws = np.random.default_rng(0), 20_000
    for x in levels:
        bound = bits_per_dim(denoise, diffusion, np.full((draws, 1), x), rng).total
        error, truth = bound.std() / math.sqrt(draws), -math.log2(p_x0[round((x + 1) * 127.5)])
        assert truth - 4 * error < bound.mean() < truth + 0.7  # and not by far


@examples
@given(data=st.data(), T=st.integers(2, 50))
def test_random_terms_are_right_on_average(data, T):
    """Each draw counts T terms in all, each timestep once on average; the terms that count are those of the whole bound."""
    steps, rng = data.draw(st.integers(2, T)), np.random.default_rng(0)
    counts = np.array([random_terms(T, steps, rng) for _ in range(2000)])
    assert ((counts > 0).sum(1) == steps).all() and (counts.sum(1) == T).all() and (counts[:, 0] == 1).all()
    assert (abs(counts.mean(0) - 1) <= 5 * counts.std(0) / math.sqrt(2000)).all()
    diffusion, x = GaussianDiffusion(cosine_beta_schedule(T)), np.tile(LEVELS[[3, 200]], (2, 1))
    whole = bits_per_dim(exact_denoiser(diffusion), diffusion, x, Signs())
    some = bits_per_dim(exact_denoiser(diffusion), diffusion, x, Signs(), counts=counts[0])
    np.testing.assert_allclose(some.terms, counts[0] * whole.terms, rtol=1e-12)
    for wrong in (1, T + 1):
        with pytest.raises(ValueError, match=f"2 to {T}"):
            random_terms(T, wrong, rng)


@examples
@given(T=st.integers(2, 2000))
def test_the_plain_loss_of_log_snr_is_its_bound(T):
    """The weight of the squared error of eps is (SNR(t - 1) / SNR(t) - 1) / 2 (Kingma et al. 2021, eq. 14), the same at all
    t; the levels of a pixel are 6 standard deviations apart at t = 0, and the prior costs next to nothing."""
    diffusion = GaussianDiffusion(SCHEDULES["log_snr"](T), "eps")
    np.testing.assert_allclose(diffusion.lvlb_weights[1:], math.expm1(18.3 / (T - 1)) / 2, rtol=1e-6)
    assert 2 / 255 / diffusion.level(0).ratio > 6 and diffusion.alphas_cumprod[-1] < 0.007


def test_levels_only():
    diffusion = GaussianDiffusion(cosine_beta_schedule(3))
    for x in (0.5, 1.01, -1.01, 257 / 127.5 - 1, math.nan):
        with pytest.raises(ValueError, match="256 levels"):
            bits_per_dim(exact_denoiser(diffusion), diffusion, np.full((1, 2), x), Signs())
    images = np.float32(LEVELS).reshape(1, 1, 16, 16)  # as the pipeline gives them
    assert np.isfinite(bits_per_dim(exact_denoiser(diffusion), diffusion, images, Signs()).total).all()


# The decoder


@examples
@given(mean=st.floats(-3, 3), log_std=st.floats(-9, 9))
def test_the_levels_share_all_mass(mean, log_std):
    """Symmetric under x -> -x, and of mass 1, also where one level holds all or the two open ones half each."""
    log_p = log_level(LEVELS, mean, math.exp(log_std))
    assert np.isfinite(log_p).all() and (log_p <= 0).all()
    assert np.exp(log_p).sum() == pytest.approx(1, rel=1e-9)
    np.testing.assert_allclose(log_level(-LEVELS, -mean, math.exp(log_std)), log_p, rtol=1e-6, atol=1e-12)


@examples
@given(n=st.integers(0, 255), mean=st.floats(-2, 2), log_std=st.floats(-7, 4))
def test_levels_match_scipy(n, mean, log_std):
    """log-masses from 0 to -100,000 and beyond, by the tails of SciPy's normal distribution."""
    norm, x = stats.norm(mean, math.exp(log_std)), n / 127.5 - 1
    low, high = (-math.inf if n == 0 else x - 1 / 255), (math.inf if n == 255 else x + 1 / 255)
    if x < mean:  # the mirror image
        expected = norm.logcdf(high) + special.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))
    else:
        expected = norm.logsf(low) + special.log1p(-np.exp(norm.logsf(high) - norm.logsf(low)))
    assert log_level(np.array(x), mean, math.exp(log_std)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("z", [10, 30, 35, 40, 100, 1e4])
def test_extreme_tails(z):
    """The mass of -1, which is open below, from a mean z standard deviations above it: the asymptotic series of erfc."""
    series = 1 - 1 / z**2 + 3 / z**4 - 15 / z**6 + 105 / z**8
    expected = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log(series)
    for sign in (1, -1):
        mass = log_level(np.array(-1.0 * sign), sign * (-1 + 1 / 255 + z * 1e-3), 1e-3)
        assert mass == pytest.approx(expected, rel=1e-6)


# An independent implementation


@pytest.mark.parametrize("v", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (13, 3, 2, 2)], ids=str)
def test_the_loop_in_pytorch(v, shape):
    """The same draws through torch.distributions: every term is the KL of two Normals, the decoder a difference of cdfs."""
    torch = pytest.importorskip("torch")
    Normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    T, rng = 20, np.random.default_rng(0)
    betas = linear_beta_schedule(T) / 4  # so that the prior is no trifle
    diffusion = GaussianDiffusion(betas, v_posterior=v)
    images = rng.integers(0, 256, shape)
    images.flat[:2] = 0, 255
    x = torch.tensor(images) / torch.tensor(127.5, dtype=torch.float64) - 1
    beta = torch.tensor(betas)
    alpha_bar = torch.cumprod(1 - beta, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])

    def predict(x_t, t):
        return (0.9 * x_t + 0.01 * t).clip(-1, 1)

    def posterior(x_0, x_t, t):
        mean = (previous[t].sqrt() * beta[t] * x_0 + (1 - beta[t]).sqrt() * (1 - previous[t]) * x_t) / (1 - alpha_bar[t])
        return mean, beta[t] * (1 - previous[t]) / (1 - alpha_bar[t])

    noise, (terms, mse) = np.random.default_rng(5), torch.zeros(2, shape[0], T, dtype=torch.float64)
    for t in reversed(range(T)):
        q_t = Normal(alpha_bar[t].sqrt() * x, (1 - alpha_bar[t]).sqrt())
        x_t = q_t.mean + q_t.stddev * torch.tensor(noise.standard_normal(shape))
        x_0 = predict(x_t, t)
        q_mean, q_variance = posterior(x, x_t, t)
        variance = (1 - v) * posterior(x, x_t, max(t, 1))[1] + v * beta[max(t, 1)]
        p = Normal(posterior(x_0, x_t, t)[0], variance.sqrt())
        if t:
            nats = kl(Normal(q_mean, q_variance.sqrt()), p)
        else:
            upper, lower = p.cdf(x + 1 / 255), p.cdf(x - 1 / 255)
            upper[torch.tensor(images == 255)], lower[torch.tensor(images == 0)] = 1, 0
            nats = -(upper - lower).log()
        terms[:, t] = nats.flatten(1).mean(1) / math.log(2)
        mse[:, t] = ((x_0 - x) ** 2).flatten(1).mean(1)
    prior = kl(q_t_last := Normal(alpha_bar[-1].sqrt() * x, (1 - alpha_bar[-1]).sqrt()), Normal(0 * q_t_last.mean, 1.0))

    bound = bits_per_dim(
        lambda x_t, t: predict(torch.tensor(x_t), t).numpy(), diffusion, images / 127.5 - 1, np.random.default_rng(5)
    )
    np.testing.assert_allclose(bound.terms, terms, rtol=1e-7)
    np.testing.assert_allclose(bound.mse, mse, rtol=1e-9)
    np.testing.assert_allclose(bound.prior, prior.flatten(1).mean(1) / math.log(2), rtol=1e-9)


# The probability-flow ODE


def log_normal(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


def even_diffusion(T, low=0.01, high=1e5):
    """A process whose sigma = sqrt((1 - alpha_bar) / alpha_bar) is evenly spaced in log sigma."""
    return process_of(1 / (1 + np.geomspace(low, high, T) ** 2))


@pytest.mark.parametrize("s", [0.5, 0.05])
@pytest.mark.parametrize("batch", [1, 13])
def test_ode_on_gaussian_data(batch, s):
    """The closed form of the noised data, and errors that fall like 1 / steps^2."""
    diffusion = even_diffusion(1025)
    x = M + s * np.random.default_rng(0).uniform(-2, 2, (batch, 2, 3))
    alpha_bar = diffusion.alphas_cumprod[0]
    exact = log_normal(x, math.sqrt(alpha_bar) * M, alpha_bar * s**2 + 1 - alpha_bar).sum((1, 2))
    model = exact_with_divergence(diffusion, s)
    assert ode_log_likelihood(model, diffusion, x) == pytest.approx(exact, abs=1e-3)

    far = 10 * s * np.ones((1, 1)) + M  # where errors show, and N(0, 1) at sigma = 1e5 makes none
    limit = log_normal(far[0, 0], math.sqrt(alpha_bar) * M, alpha_bar * s**2 + 1 - alpha_bar)
    errors = [abs(ode_log_likelihood(model, diffusion, far, range(0, 1025, k))[0] - limit) for k in (8, 4, 2, 1)]
    assert errors[-1] < 4e-3
    assert np.log2(errors[0] / errors[-1]) / 3 == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_ode_on_the_schedules(schedule):
    """100 timesteps of 1000 suffice; what is left is that q(x_T) is not yet N(0, 1), least so for log_snr."""
    diffusion, x = GaussianDiffusion(SCHEDULES[schedule](1000)), np.linspace(-0.7, 1.3, 13).reshape(13, 1)
    timesteps, alpha_bar = ode_timesteps(diffusion, 100), diffusion.alphas_cumprod[0]
    exact = log_normal(x[:, 0], math.sqrt(alpha_bar) * M, alpha_bar * S**2 + 1 - alpha_bar)
    ours = ode_log_likelihood(exact_with_divergence(diffusion), diffusion, x, timesteps)
    np.testing.assert_allclose(ours, exact, atol=0.07 if schedule == "log_snr" else 0.025)


@pytest.mark.parametrize("path", [flow_path, edm_path])
def test_ode_on_other_processes(path):
    """Rectified flow ends at pure noise, from where the ODE cannot start: at the timestep before."""
    process, x = Process(*path(1000)[:2]), np.linspace(-0.7, 1.3, 13).reshape(13, 1)
    timesteps = ode_timesteps(process, 100)
    assert timesteps[0] == 0 and timesteps[-1] == (998 if path is flow_path else 999)

    def model(x, t):
        alpha, sigma = process.level(t)
        gain = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
        return M + gain * (x - alpha * M), np.full(len(x), gain)

    alpha, sigma = process.level(0)
    exact = log_normal(x[:, 0], alpha * M, alpha**2 * S**2 + sigma**2)
    np.testing.assert_allclose(ode_log_likelihood(model, process, x, timesteps), exact, atol=0.025)


def test_ode_on_a_mixture():
    """Two modes, so that x_0 bends: the density on a grid, the divergence by differences."""
    diffusion, modes, s = even_diffusion(801), np.array([-0.5, 0.6]), 0.1
    weights = np.array([0.3, 0.7])

    def parts(x, t):  # log of weight times density, and E[x_0 | x_t, mode], of each mode
        alpha_bar = diffusion.alphas_cumprod[t]
        means, variance = math.sqrt(alpha_bar) * modes, alpha_bar * s**2 + 1 - alpha_bar
        return np.log(weights) + log_normal(x, means, variance), modes + optimal_gain(alpha_bar, s) * (x - means)

    def denoise(x, t):  # (B, 1)
        log_p, x_0 = parts(x, t)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return (p * x_0).sum(1, keepdims=True) / p.sum(1, keepdims=True)

    def both(x, t):
        h = 1e-5
        return denoise(x, t), ((denoise(x + h, t) - denoise(x - h, t)) / (2 * h))[:, 0]

    x = np.linspace(-1, 1, 41).reshape(-1, 1)
    ours = ode_log_likelihood(both, diffusion, x)
    np.testing.assert_allclose(ours, np.logaddexp(*parts(x, 0)[0].T), atol=0.01)


def test_ode_calls_and_refusals():
    diffusion, seen = GaussianDiffusion(cosine_beta_schedule(9)), []
    model = exact_with_divergence(diffusion)
    x = np.ones((2, 3))
    ode_log_likelihood(model, diffusion, x, [0, 4, 8], seen.append)
    assert seen == [0, 4, 4, 8]  # Heun: both ends of each step
    ones = ode_log_likelihood(model, diffusion, x, [8])
    np.testing.assert_allclose(ones, 3 * log_normal(1.0, 0.0, 1.0))
    for timesteps in ([], [8, 0], [0, 0, 8], [-1, 8], [0, 9]):
        with pytest.raises(ValueError, match="ascending ints from 0 to 8"):
            ode_log_likelihood(model, diffusion, x, timesteps)
    terminal = GaussianDiffusion([0.3, 0.5, 1.0], "v")
    with pytest.raises(ValueError, match="alpha is 0"):
        ode_log_likelihood(exact_with_divergence(terminal), terminal, x)
    assert np.isfinite(ode_log_likelihood(exact_with_divergence(terminal), terminal, x, [0, 1])).all()


@examples
@given(schedule=st.sampled_from(sorted(SCHEDULES)), T=st.integers(2, 300), data=st.data())
def test_ode_timesteps(schedule, T, data):
    diffusion, steps = GaussianDiffusion(SCHEDULES[schedule](T)), data.draw(st.integers(2, T))
    timesteps = ode_timesteps(diffusion, steps)
    assert timesteps[0] == 0 and timesteps[-1] == T - 1 and len(timesteps) <= steps
    assert all(type(t) is int for t in timesteps) and (np.diff(timesteps) > 0).all()
    log_sigma = np.log(1 / diffusion.alphas_cumprod - 1) / 2
    gaps, widest = np.diff(log_sigma[timesteps]), np.diff(log_sigma).max()
    assert (gaps[np.diff(timesteps) > 1] <= (log_sigma[-1] - log_sigma[0]) / (steps - 1) + widest + 1e-9).all()


@pytest.mark.parametrize("dims", [1, 784])
def test_dequantised_bits(dims):
    """The uniform density over all 256 levels, half a level beyond -1 and 1, is 8 bits; a quarter of it, 6."""
    volume = dims * math.log(2 + 2 / 255)
    np.testing.assert_allclose(
        dequantised_bits_per_dim(-volume + np.array([0, dims * math.log(4)]), dims), [8, 6], rtol=1e-12
    )


# The divergence of a network


class Dense(nn.Cell):
    """(W x + 0.1 t (+ label))^2 / 10 of flattened images of 4 pixels."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)), "w")

    def construct(self, x, t, *cond):
        h = (x.reshape(-1, 4) @ self.w.T) + 0.1 * t.reshape(-1, 1)
        if len(cond) > 0:
            h = h + cond[0].reshape(-1, 1)
        return (0.1 * h * h).reshape(x.shape)


@pytest.mark.parametrize(("objective", "batch", "conditional"), [("eps", 1, True), ("x0", 13, False), ("v", 13, True)])
def test_divergence_of_a_dense_network(objective, batch, conditional):
    """e^T J e for each image's own e, with J in closed form; over all 16 vectors of signs its mean is the trace."""
    diffusion, rng, net = GaussianDiffusion(cosine_beta_schedule(20), objective), np.random.default_rng(1), Dense()
    net.set_train(True)
    x, label = 2 * rng.standard_normal((batch, 1, 2, 2)), rng.integers(0, 3, batch)
    cond, function = (Tensor(label.astype(np.float32)),) if conditional else (), make_divergence(diffusion, net)
    for t in (0, 7, 18):
        alpha_bar, w = diffusion.alphas_cumprod[t], net.w.asnumpy().astype(np.float64)
        h = x.reshape(batch, 4) @ w.T + 0.1 * t + label[:, None] * conditional
        a, b = {
            "eps": (1 / math.sqrt(alpha_bar), -math.sqrt(1 / alpha_bar - 1)),
            "x0": (0, 1),
            "v": (math.sqrt(alpha_bar), -math.sqrt(1 - alpha_bar)),
        }[objective]
        jacobian = a * np.eye(4) + b * 0.2 * h[:, :, None] * w
        probes = rng.standard_normal(x.shape)
        x_0, divergence = function(x, t, probes, *cond)
        assert x_0.dtype == divergence.dtype == np.float64 and x_0.shape == x.shape
        np.testing.assert_allclose(x_0.reshape(batch, 4), a * x.reshape(batch, 4) + b * 0.1 * h**2, rtol=1e-4, atol=1e-5)
        e = probes.reshape(batch, 4)
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * abs(jacobian).max()}
        np.testing.assert_allclose(divergence, np.einsum("bi,bij,bj->b", e, jacobian, e), **tolerance)
        signs = [(-1.0) ** (k >> np.arange(4) & 1) for k in range(16)]
        mean = np.mean([function(x, t, np.tile(e, (batch, 1)).reshape(x.shape), *cond)[1] for e in signs], 0)
        np.testing.assert_allclose(mean, np.trace(jacobian, axis1=1, axis2=2), **tolerance)
    assert net.training


@pytest.mark.slow
def test_divergence_of_a_unet():
    """A basis of probes gives the trace: each against differences of the unclipped denoiser."""
    net = UnetConfig(dim=8, init_dim=8, dim_mults=(1,), num_classes=3, use_convnext=False, resnet_block_groups=4).build()
    diffusion, rng, t, h = GaussianDiffusion(linear_beta_schedule(20), "v"), np.random.default_rng(0), 4, 2e-2
    function, denoise = make_divergence(diffusion, net), make_denoiser(diffusion, net, clip=False)
    x, labels = rng.standard_normal((13, 1, 4, 4)), Tensor(np.arange(13, dtype=np.int32) % 3)
    ours, theirs = np.zeros((2, 13))
    for e in np.eye(16).reshape(16, 1, 1, 4, 4).repeat(13, 1):
        x_0, divergence = function(x, t, e, labels)
        ahead, behind = (denoise(Tensor(np.float32(x + s * h * e)), t, labels).asnumpy() for s in (1, -1))
        difference = ((ahead - behind) * e).sum((1, 2, 3)) / (2 * h)
        np.testing.assert_allclose(divergence, difference, rtol=1e-2, atol=2e-3)
        ours, theirs = ours + divergence, theirs + difference
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    np.testing.assert_allclose(x_0, denoise(Tensor(np.float32(x)), t, labels).asnumpy(), rtol=1e-4, atol=1e-5)
