"""Samplers on data whose exact denoiser is known, in float64: known answers, orders, and other implementations."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import diffusion_of, process_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from mindspore import Tensor

from ms_diffusion.denoiser import self_conditioned
from ms_diffusion.process import DATA, GaussianDiffusion, Level
from ms_diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    ddim_step,
    default_spacing,
    is_stochastic,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler_ancestral,
    sample_heun,
    sample_midpoint,
    sample_plms,
    sample_sde_dpmpp_2m,
    sample_unipc,
    sampler_options,
    sampling_timesteps,
)
from ms_diffusion.schedules import SCHEDULES, linear_beta_schedule, rescale_zero_terminal_snr

M, S = 0.3, 0.5  # the data's mean and standard deviation
examples = settings(deadline=None, max_examples=100)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
ODE_SAMPLERS = {name: sampler for name, sampler in SAMPLERS.items() if not is_stochastic(sampler)}
every_ode_sampler = pytest.mark.parametrize("sampler", ODE_SAMPLERS.values(), ids=ODE_SAMPLERS)


def ratio(alpha_bar):
    """sigma / alpha, the noise in the units of the data."""
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def variance_of(alpha_bar):
    """Of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise with x_0 ~ N(m, s^2)."""
    return alpha_bar * S**2 + 1 - alpha_bar


def exact_denoiser(diffusion):
    """E[x_0 | x_t] by conditioning the joint Gaussian of x_0 and x_t."""

    def denoise(x, t):
        alpha_bar = float(diffusion.alphas_cumprod[t])
        return M + math.sqrt(alpha_bar) * S**2 / variance_of(alpha_bar) * (x - math.sqrt(alpha_bar) * M)

    return denoise


def mixture_mean(y, noise):
    """E[x_0 | x_0 + noise z = y] for data 0.3 N(-0.7, 0.15^2) + 0.5 N(0.1, 0.1^2) + 0.2 N(0.8, 0.2^2)."""
    share, mean, std = np.array([0.3, 0.5, 0.2]), np.array([-0.7, 0.1, 0.8]), np.array([0.15, 0.1, 0.2])
    y, variance = y[..., None], std**2 + noise**2
    p = share * np.exp(-((y - mean) ** 2) / (2 * variance)) / np.sqrt(variance)
    return (p * (mean + std**2 / variance * (y - mean))).sum(-1) / p.sum(-1)


def mixture_denoiser(diffusion):
    alpha_bar = diffusion.alphas_cumprod
    return lambda x, t: mixture_mean(x / math.sqrt(alpha_bar[t]), ratio(alpha_bar[t]))


def ode_solution(x_t, alpha_bar, alpha_bar_next=1.0):
    """The probability-flow ODE (Song et al. 2021, eq. 13) keeps (x_t - mean_t) / std_t; at alpha_bar 1 that is data."""
    unit = (x_t - math.sqrt(alpha_bar) * M) / math.sqrt(variance_of(alpha_bar))
    return math.sqrt(alpha_bar_next) * M + math.sqrt(variance_of(alpha_bar_next)) * unit


def affine_map(sampler, diffusion, timesteps=None, **options):
    """(b, A, C): the sampler's x_0 = b + A x_T + sum_k C_k z_k for its noises z_k, exact with an affine denoiser.

    One run of many numbers: x_T = 0, x_T = 1, and x_T = 0 with the unit noise of one step each.
    """
    n = diffusion.num_timesteps if timesteps is None else len(timesteps)
    x = np.zeros(2 + n)
    x[1] = 1
    calls = iter(range(n))

    def randn_like(x):
        z = np.zeros_like(x)
        z[2 + next(calls)] = 1
        return z

    out = sampler(exact_denoiser(diffusion), x, diffusion, timesteps, randn_like, **options)
    return out[0], out[1] - out[0], out[2:] - out[0]


# Timesteps


@examples
@given(data=st.data(), T=st.integers(2, 4000), spacing=st.sampled_from(SPACINGS), schedule=st.sampled_from([*SCHEDULES]))
def test_any_spacing_gives_distinct_timesteps(data, T, spacing, schedule):
    """Descending ints in [0, T), as many as asked for, from T - 1 but for leading and to 0 but for trailing."""
    steps, zero_terminal_snr = data.draw(st.integers(1, T)), data.draw(st.booleans())
    timesteps = sampling_timesteps(T, steps, spacing, diffusion_of(schedule, T, zero_terminal_snr).alphas_cumprod)
    assert len(timesteps) == steps and all(type(t) is int for t in timesteps)
    assert (np.diff(timesteps) < 0).all() and 0 <= timesteps[-1] and timesteps[0] < T
    if spacing != "leading":
        assert timesteps[0] == T - 1
    if spacing == "leading" or (spacing == "linspace" and steps > 1):
        assert timesteps[-1] == 0
    even = {"linspace": np.linspace(T - 1, 0, steps), "trailing": T - 1 - np.arange(steps) * T / steps}
    if spacing in even:
        assert abs(timesteps - even[spacing]).max() <= 0.5 + 1e-9


def test_timesteps_by_hand():
    assert sampling_timesteps(5, 5) == [4, 3, 2, 1, 0]
    assert sampling_timesteps(1000, 1) == [999]
    assert sampling_timesteps(1000, 4) == [999, 666, 333, 0]
    assert sampling_timesteps(9, 4) == [8, 5, 3, 0]
    assert sampling_timesteps(1000, 4, "leading") == [750, 500, 250, 0]
    assert sampling_timesteps(11, 3, "leading") == [6, 3, 0]
    assert sampling_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert sampling_timesteps(11, 3, "trailing") == [10, 6, 3]


@pytest.mark.parametrize(
    ("spacing", "ratios", "timesteps"),  # for 5 steps
    [
        ("logsnr", 0.1 * 2.0 ** np.arange(9), [8, 6, 4, 2, 0]),
        ("karras", (0.5 + np.arange(9) / 6) ** 7, [8, 6, 4, 2, 0]),
        ("logsnr", 5 * 2.0 ** np.arange(9), [8, 3, 2, 1, 0]),  # 5 to 80, then 160 to 1280, which count as 80
        ("logsnr", np.append(0.1 * 1.1 ** np.arange(8), 79.0), [8, 7, 6, 5, 0]),  # 8, 8, 7, 7, 0: the next free are taken
        ("karras", np.append(1.0, 70 + 0.1 * np.arange(8)), [8, 3, 2, 1, 0]),  # so are they at the other end
    ],
)
def test_timesteps_by_noise_by_hand(spacing, ratios, timesteps):
    assert sampling_timesteps(9, 5, spacing, 1 / (1 + ratios**2)) == timesteps


def test_impossible_timesteps_are_refused():
    for steps in (0, -1, 11):
        with pytest.raises(ValueError, match=f"steps is {steps}: choose from 1 to 10"):
            sampling_timesteps(10, steps)
    with pytest.raises(ValueError, match="unknown spacing 'even': choose one of linspace, leading, "):
        sampling_timesteps(10, 5, "even")
    for spacing in ("karras", "logsnr"):
        with pytest.raises(ValueError, match=f"{spacing} needs alphas_cumprod"):
            sampling_timesteps(10, 5, spacing)


def test_zero_terminal_snr_by_hand():
    """alpha_bar 0.81, 0.36, 0.09 has the roots 0.9, 0.6, 0.3, which become 0.9, 0.45, 0."""
    betas = 1 - np.array([0.81, 0.36 / 0.81, 0.09 / 0.36])
    np.testing.assert_allclose(rescale_zero_terminal_snr(betas), [0.19, 0.75, 1], rtol=1e-12)


# DDPM


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_over_all_steps_samples_the_data(schedule):
    """Mean exactly m; the variance follows the recursion of q's own regression of x_{t-1} on x_t, and comes near s^2."""
    diffusion = diffusion_of(schedule)
    b, A, C = affine_map(sample_ddpm, diffusion)
    alpha_bar = diffusion.alphas_cumprod
    assert b + A * math.sqrt(alpha_bar[-1]) * M == pytest.approx(M, abs=1e-10)  # for x_T from q(x_T)

    variance = 1.0  # of x_T ~ N(0, 1)
    for t in range(diffusion.num_timesteps - 1, -1, -1):
        previous = alpha_bar[t - 1] if t else 1.0
        alpha = alpha_bar[t] / previous
        slope = math.sqrt(alpha) * variance_of(previous) / variance_of(alpha_bar[t])  # Cov(x_{t-1}, x_t) / Var(x_t)
        variance = slope**2 * variance + (1 - alpha) * (1 - previous) / (1 - alpha_bar[t])
    assert A**2 + (C**2).sum() == pytest.approx(variance, rel=1e-8)
    # The posterior's variance leaves out that of x_0 given x_t: too little by O(1 / T) (Ho et al., section 3.2)
    assert A**2 + (C**2).sum() == pytest.approx(S**2, rel=0.03)
    assert b == pytest.approx(M, abs=1e-3)


@examples
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    pair=st.lists(st.integers(0, 99), min_size=2, max_size=2, unique=True),
    x_start=st.floats(-1, 1),
    x=st.floats(-3, 3),
    z=st.floats(-3, 3),
)
def test_one_ddpm_step_is_bayes_rule(schedule, pair, x_start, x, z):
    """q(x_r | x_t, x_0), r < t: the product of the Gaussians q(x_t | x_r) and q(x_r | x_0), for neighbours and leaps."""
    diffusion, (t, r) = diffusion_of(schedule, 100), sorted(pair, reverse=True)
    seen = []
    sample_ddpm(
        lambda x, t: np.float64(x_start),
        np.float64(x),
        diffusion,
        [t, r],
        lambda x: z,
        lambda i, x, x_start: seen.append(x),
    )
    a_t, a_r = diffusion.alphas_cumprod[[t, r]]
    alpha = a_t / a_r
    precision = alpha / (1 - alpha) + 1 / (1 - a_r)
    mean = (math.sqrt(alpha) / (1 - alpha) * x + math.sqrt(a_r) / (1 - a_r) * x_start) / precision
    assert seen[0] == pytest.approx(mean + z / math.sqrt(precision), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3])
def test_ddpm_samples_from_p_mean_variance(v_posterior):
    """A step of the sampler is N(mean, variance) of `GaussianDiffusion.p_mean_variance`, at every t."""
    T = 20
    diffusion = GaussianDiffusion(linear_beta_schedule(T), "x0", v_posterior=v_posterior)
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((13, 2)).astype(np.float32) for _ in range(2))

    def net(x, t):
        return 0.4 * x

    def denoise(x, t):
        return np.clip(0.4 * x, -1, 1)

    steps, ts = [], np.arange(1, T)
    for t in ts:
        sample_ddpm(denoise, x, diffusion, [t, t - 1], lambda x: z, lambda i, *x: steps.append(x) if i == 0 else None)
    found, starts = (np.concatenate(values) for values in zip(*steps, strict=True))
    times = Tensor(np.repeat(ts, 13).astype(np.int32))
    mean, variance, _, x_start = diffusion.p_mean_variance(net, Tensor(np.tile(x, (T - 1, 1))), times)
    np.testing.assert_allclose(starts, x_start.asnumpy(), rtol=1e-6)
    expected = mean.asnumpy() + np.sqrt(variance.asnumpy()) * np.tile(z, (T - 1, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
def test_the_option_v_posterior_stands_for_the_diffusions(v_posterior):
    by_option = affine_map(sample_ddpm, diffusion_of(T=20, v_posterior=0.7), v_posterior=v_posterior)
    np.testing.assert_equal(by_option, affine_map(sample_ddpm, diffusion_of(T=20, v_posterior=v_posterior)))


@pytest.mark.parametrize("v_posterior", [-0.1, 1.1, math.nan])
def test_impossible_v_posterior_is_refused(v_posterior):
    with pytest.raises(ValueError, match=r"v_posterior is .*: it must be in \[0, 1\]"):
        sample_ddpm(exact_denoiser(diffusion_of()), np.ones(2), diffusion_of(), v_posterior=v_posterior)


# DDIM


@examples
@given(
    pair=st.lists(st.integers(0, 99), min_size=2, max_size=2, unique=True),
    x_start=st.floats(-1, 1),
    noise=st.floats(-3, 3),
    z=st.floats(-3, 3),
    eta=st.floats(0, 1),
)
def test_one_ddim_step_is_eqs_12_and_16(pair, x_start, noise, z, eta):
    """sqrt(a_r) x_0 + sqrt(1 - a_r - sigma^2) eps + sigma z, sigma of eq. 16, for the x_0 and eps that make x_t."""
    diffusion, (t, r) = diffusion_of("cosine", 100), sorted(pair, reverse=True)
    a_t, a_r = diffusion.alphas_cumprod[[t, r]]
    x = np.float64(math.sqrt(a_t) * x_start + math.sqrt(1 - a_t) * noise)
    seen = []
    sample_ddim(lambda x, t: x_start, x, diffusion, [t, r], lambda x: z, lambda i, x, x_start: seen.append(x), eta=eta)
    sigma = eta * math.sqrt((1 - a_r) / (1 - a_t)) * math.sqrt(1 - a_t / a_r)
    expected = math.sqrt(a_r) * x_start + math.sqrt(max(1 - a_r - sigma**2, 0)) * noise + sigma * z
    assert seen[0] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert seen[1] == x_start  # the step to the data


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_ddim_at_eta_1_is_ddpm(steps):
    """Song et al., section 4.1: the same affine map, so the same samples from the same noise, and the same variance."""
    diffusion = diffusion_of("linear", 100)
    timesteps = sampling_timesteps(100, steps)
    ddim, ddpm = affine_map(sample_ddim, diffusion, timesteps, eta=1.0), affine_map(sample_ddpm, diffusion, timesteps)
    for ours, theirs in zip(ddim, ddpm, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    if steps > 1:
        assert (ddim[2][:-1] != 0).all() and ddim[2][-1] == 0  # noise at every step but the last


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta is .*: it must be in \[0, 1\]"):
        sample_ddim(exact_denoiser(diffusion_of()), np.ones(2), diffusion_of(), eta=eta)


# Those that solve the ODE


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (sample_ddim, 1),
        (sample_heun, 2),
        (sample_midpoint, 2),
        (sample_plms, 2),  # Adams-Bashforth's weights are for even steps of sigma / alpha; these are even in its logarithm
        (sample_dpmpp_2m, 2),
        (partial(sample_unipc, order=1), 2),  # the corrector adds one (Zhao et al. 2023, theorem 3.1)
        (partial(sample_unipc, order=2), 3),
        (partial(sample_unipc, order=3), 4),
    ],
)
@pytest.mark.parametrize("denoiser", [exact_denoiser, mixture_denoiser])
def test_order(sampler, order, denoiser):
    """The error at one timestep falls like steps^-order. The steps go on beyond, so that those of low order at the end
    do not count; T is so large that whole timesteps are even enough."""
    T, first, last = 100_000, 60_000, 10_000
    diffusion = diffusion_of("linear", T)
    ratios, alpha_bar = ratio(diffusion.alphas_cumprod), diffusion.alphas_cumprod[[first, last]]
    x = np.linspace(-2, 2, 13)
    if denoiser is exact_denoiser:
        exact = ode_solution(x, *alpha_bar)
    else:  # in y = x / alpha: dy / d ratio = (y - x_0) / ratio
        span, y = ratios[[first, last]], x / math.sqrt(alpha_bar[0])
        solution = solve_ivp(lambda s, y: (y - mixture_mean(y, s)) / s, span, y, method="DOP853", rtol=1e-12, atol=1e-12)
        exact = math.sqrt(alpha_bar[1]) * solution.y[:, -1]

    steps, errors = np.array([40, 80, 160]), []
    for n in steps:
        start, end = np.log(ratios[[first, last]])
        places = start + (end - start) * np.arange(n + 4) / n
        timesteps = np.round(np.interp(places, np.log(ratios), np.arange(T))).astype(int)
        assert timesteps[n] == last
        states = []
        sampler(denoiser(diffusion), x, diffusion, timesteps, callback=lambda i, x, _, states=states: states.append(x))
        errors.append(abs(states[n - 1] - exact).max())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    if sampler is sample_midpoint and denoiser is exact_denoiser:
        order = 3  # for Gaussian data the midpoint rule's errors of order 2 cancel in this time
    assert slope == pytest.approx(order, abs=0.15 if order < 4 else 0.3)


@every_ode_sampler
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_all_steps_transport_the_noise_to_the_data(sampler, schedule, zero_terminal_snr):
    diffusion = diffusion_of(schedule, zero_terminal_snr=zero_terminal_snr)
    x_T = np.linspace(-3, 3, 13)
    x = sampler(exact_denoiser(diffusion), x_T, diffusion)
    atol = 0.012 if sampler is sample_ddim else 0.005
    np.testing.assert_allclose(x, ode_solution(x_T, diffusion.alphas_cumprod[-1]), atol=atol)


@every_sampler
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_denoiser_that_knows_is_followed_exactly(sampler, spacing, zero_terminal_snr):
    """The same x_0 at every call: x_t keeps to the line through x_0 and the noise that x_T holds, and ends in x_0."""
    diffusion = diffusion_of("linear", 1000, zero_terminal_snr, v_posterior=0.5)
    alpha_bar, x_start, states = diffusion.alphas_cumprod, np.linspace(-1, 1, 5), []
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(5)
    timesteps = sampling_timesteps(1000, 10, spacing, alpha_bar)
    a = alpha_bar[timesteps, None]
    line = np.sqrt(a) * x_start + np.sqrt(1 - a) * noise

    def randn_like(x):
        return rng.standard_normal(x.shape)

    out = sampler(lambda x, t: x_start, line[0], diffusion, timesteps, randn_like, lambda i, x, _: states.append(x))
    np.testing.assert_allclose(out, x_start, atol=1e-12)
    if not is_stochastic(sampler):
        np.testing.assert_allclose(states[:-1], line[1:], atol=1e-12)


# Those with noise


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_ancestral_euler_step_is_ddims(eta):
    """Down to the noise sigma_down, then up with sigma_up, in y = x / alpha (k-diffusion's get_ancestral_step): the affine
    map of DDIM with this eta."""
    diffusion, timesteps = diffusion_of("linear", 100), [80, 55, 30, 10, 2]
    s = [*ratio(diffusion.alphas_cumprod[timesteps]), 0.0]

    def in_units_of_the_data(denoise, x, diffusion, timesteps, randn_like):
        y = x * math.sqrt(1 + s[0] ** 2)
        for i, t in enumerate(timesteps):
            d = (y - denoise(y / math.sqrt(1 + s[i] ** 2), t)) / s[i]
            up = min(s[i + 1], eta * s[i + 1] * math.sqrt(1 - (s[i + 1] / s[i]) ** 2))
            y = y + d * (math.sqrt(s[i + 1] ** 2 - up**2) - s[i])
            y = y + up * randn_like(y) if up else y
        return y

    theirs = affine_map(in_units_of_the_data, diffusion, timesteps)
    for sampler in (sample_euler_ancestral, sample_ddim):
        for found, expected in zip(affine_map(sampler, diffusion, timesteps, eta=eta), theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    for found, default in zip(
        affine_map(sample_euler_ancestral, diffusion), affine_map(sample_ddpm, diffusion), strict=True
    ):
        np.testing.assert_allclose(found, default, rtol=1e-9, atol=1e-12)


def moments(sampler, steps, **options):
    """Mean and variance of x_0 for x_T from q(x_T), in steps that are even in log(sigma / alpha)."""
    diffusion = diffusion_of("linear", 100_000)
    timesteps, alpha_bar = (
        sampling_timesteps(100_000, steps, "logsnr", diffusion.alphas_cumprod),
        diffusion.alphas_cumprod[-1],
    )
    b, A, C = affine_map(sampler, diffusion, timesteps, **options)
    return b + A * math.sqrt(alpha_bar) * M, A**2 * variance_of(alpha_bar) + (C**2).sum()


@pytest.mark.parametrize(
    ("sampler", "order"), [(sample_euler_ancestral, 1), (sample_sde_dpmpp_2m, 2), (partial(sample_heun, s_churn=4.0), 2)]
)
def test_noise_leads_to_the_data_with_an_order(sampler, order):
    """The variance that comes out of the data N(m, s^2) is s^2 but for an error that falls like steps^-order."""
    steps = np.array([40, 80, 160])
    means, variances = zip(*(moments(sampler, n) for n in steps), strict=True)
    np.testing.assert_allclose(means, M, atol=1e-3)
    slope = -np.polyfit(np.log(steps), np.log(np.abs(np.array(variances) - S**2)), 1)[0]
    assert slope == pytest.approx(order, abs=0.3)
    assert abs(variances[-1] - S**2) < (0.02 if order == 1 else 6e-4)


def test_churn_by_hand():
    """A step of algorithm 2 of Karras et al. 2022: up to s_hat, the nearest of the levels, then Heun's step from there."""
    ratios = 0.1 * 1.1 ** np.arange(60)
    diffusion, timesteps = process_of(1 / (1 + ratios**2)), [50, 30, 12]
    z, states, calls = 0.7, [], []

    def denoise(x, t):
        calls.append(t)
        return exact_denoiser(diffusion)(x, t)

    x = np.linspace(-2, 2, 13)
    sample_heun(denoise, x, diffusion, timesteps, lambda x: z, lambda i, x, _: states.append(x), s_churn=0.9, s_noise=1.1)
    assert calls == [53, 30, 33, 12, 15]  # 1.3 = 1.1^2.75

    def slope(y, t):
        return (y - exact_denoiser(diffusion)(y / math.sqrt(1 + ratios[t] ** 2), t)) / ratios[t]

    y = x * math.sqrt(1 + ratios[50] ** 2) + math.sqrt(ratios[53] ** 2 - ratios[50] ** 2) * 1.1 * z
    h, first = ratios[30] - ratios[53], slope(y, 53)
    y = y + h * (first + slope(y + h * first, 30)) / 2
    np.testing.assert_allclose(states[0], y / math.sqrt(1 + ratios[30] ** 2), rtol=1e-9)


def test_where_churn_adds_noise():
    """From s_tmin to s_tmax, by at most the root of 2; none at the first timestep, and none at all by default."""
    ratios = 0.1 * 1.1 ** np.arange(60)
    diffusion = process_of(1 / (1 + ratios**2))

    def calls(**options):
        seen = []
        sample_heun(lambda x, t: seen.append(t) or x, np.ones(2), diffusion, [59, 40, 20, 3], np.zeros_like, **options)
        return seen[::2]

    assert calls() == calls(s_churn=0.0) == [59, 40, 20, 3]
    assert calls(s_churn=1000) == [59, 44, 24, 7]
    assert calls(s_churn=1000, s_tmin=ratios[20], s_tmax=ratios[40] + 1e-9) == [59, 44, 24, 3]
    assert calls(s_churn=1000, s_tmax=0.5) == [59, 40, 20, 7]


# The midpoint rule


def test_midpoint_of_rectified_flow_by_hand():
    """x + (s' - s) v((s + s') / 2) with the velocity v = (x - x_0) / s, where the middle is a timestep."""
    s = np.arange(1, 21) / 20
    levels = [*map(Level, 1 - s, s)]
    diffusion, states, calls = SimpleNamespace(num_timesteps=20, level=levels.__getitem__), [], []

    def denoise(x, t):
        calls.append(t)
        return np.tanh(x) * (1 - s[t])

    def velocity(x, t):
        return (x - np.tanh(x) * (1 - s[t])) / s[t]

    x = np.linspace(-2, 2, 13)
    out = sample_midpoint(denoise, x, diffusion, [19, 9, 3], None, lambda i, x, _: states.append(x))
    assert calls == [19, 14, 9, 6, 3]
    for i, (t, middle, following) in enumerate(((19, 14, 9), (9, 6, 3))):
        h = (following - t) / 20
        x = x + h * velocity(x + h / 2 * velocity(x, t), middle)
        np.testing.assert_allclose(states[i], x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(out, np.tanh(x) * (1 - s[3]), rtol=1e-9)


# Quantized x_0


def to_fifths(x):
    return np.round(5 * x) / 5


def test_ddpm_takes_the_quantized_x_0():
    diffusion, z = diffusion_of("cosine", 20), np.random.default_rng(0).standard_normal((20, 13))
    denoise = exact_denoiser(diffusion)
    found = sample_ddpm(denoise, z[0], diffusion, None, lambda x: z[1], quantize=to_fifths)
    expected = sample_ddpm(lambda x, t: to_fifths(denoise(x, t)), z[0], diffusion, None, lambda x: z[1])
    np.testing.assert_array_equal(found, expected)
    assert abs(found - sample_ddpm(denoise, z[0], diffusion, None, lambda x: z[1])).max() > 0.01


@pytest.mark.parametrize(
    ("sampler", "options"),
    [(sample_ddim, {}), (sample_ddim, {"eta": 0.6}), (sample_plms, {})],
    ids=["ddim", "noise", "plms"],
)
def test_quantized_x_0_with_the_noise_of_the_network(sampler, options):
    """As published: the x_0 of a step is quantized, and its direction is the eps before it, written out here."""
    diffusion, x, z = diffusion_of("linear", 100), np.random.default_rng(0).standard_normal(13), 0.7
    denoise, timesteps, seen, past = exact_denoiser(diffusion), [70, 60, 45, 30, 20, 10, 3], [], []
    sampler(denoise, x, diffusion, timesteps, lambda x: z, lambda i, *x: seen.append(x), quantize=to_fifths, **options)

    def alpha_bar_of(i):
        return diffusion.alphas_cumprod[timesteps[i]] if i < len(timesteps) else 1.0

    def eps_of(x, i):
        return (x - math.sqrt(alpha_bar_of(i)) * denoise(x, timesteps[i])) / math.sqrt(1 - alpha_bar_of(i))

    def step(x, eps, i):
        a, b = alpha_bar_of(i), alpha_bar_of(i + 1)
        sigma = options.get("eta", 0) * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x_start = to_fifths((x - math.sqrt(1 - a) * eps) / math.sqrt(a))
        return math.sqrt(b) * x_start + math.sqrt(1 - b - sigma**2) * eps + sigma * z, x_start

    for i in range(len(timesteps)):
        eps = eps_of(x, i)
        if sampler is sample_plms:
            past = [eps, *past[:3]]
            weights = {2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}.get(len(past))
            if weights is None:
                eps = (eps + eps_of(step(x, eps, i)[0], i + 1)) / 2
            else:
                eps = np.dot(weights, past) / sum(weights)
        x, x_start = step(x, eps, i)
        np.testing.assert_allclose(seen[i][0], x, atol=1e-9)
        np.testing.assert_allclose(seen[i][1], x_start, atol=1e-12)


# All


def test_samplers_describe_themselves():
    options = {name: sampler_options(sampler) for name, sampler in SAMPLERS.items() if sampler_options(sampler)}
    noise, churn = {"eta", "quantize"}, {"s_churn", "s_tmin", "s_tmax", "s_noise"}
    known = {"ddpm": {"v_posterior", "quantize"}, "plms": {"quantize"}, "unipc": {"order"}, "heun": churn}
    assert options == known | {"ddim": noise, "euler": noise, "euler_ancestral": noise}
    stochastic = {name for name, sampler in SAMPLERS.items() if is_stochastic(sampler)}
    assert stochastic == {"ddpm", "sde_dpmpp_2m", "euler_ancestral", "consistency"}
    even = {name for name, sampler in SAMPLERS.items() if default_spacing(sampler) == "linspace"}
    assert even == {"ddpm", "ddim", "euler"}
    for sampler in SAMPLERS.values():  # also with self-conditioning
        wrapped = self_conditioned(sampler)
        for describe in (sampler_options, default_spacing, is_stochastic):
            assert describe(wrapped) == describe(sampler)


def test_a_function_is_a_sampler_as_it_is():
    """Without attributes and with options of any kind."""

    def mine(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, strength=1.0, *, exact=False, **others):
        return denoise(x, timesteps[0])

    assert sampler_options(mine) == {"strength", "exact"}
    assert default_spacing(mine) == "logsnr" and not is_stochastic(mine)


@every_sampler
def test_one_step_gives_the_denoisers_answer(sampler):
    diffusion = diffusion_of("cosine", 100)
    x = np.linspace(-2, 2, 13)
    out = sampler(exact_denoiser(diffusion), x, diffusion, [99])
    np.testing.assert_allclose(out, exact_denoiser(diffusion)(x, 99), rtol=1e-12)


@every_sampler
def test_the_callback_sees_each_step_in_order(sampler):
    """Heun calls the network twice a step but in the last, PLMS in its first; but once where sigma / alpha is above 80. The
    midpoint rule calls it twice a step but in the last."""
    alpha_bar = 1 / (1 + np.array([1000.0, 81, 79, 2, 0.1]) ** 2)
    levels = [*map(Level, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)), DATA]
    diffusion = SimpleNamespace(num_timesteps=5, v_posterior=0.0, level=levels[4::-1].__getitem__)
    timesteps, events = [4, 3, 2, 1, 0], []
    calls = {sample_heun: [[4], [3], [2, 1], [1, 0], [0]], sample_plms: [[4], [3], [2, 1], [1], [0]]}
    calls[sample_midpoint] = [[4, 3], [3, 2], [2, 1], [1, 0], [0]]

    def denoise(x, t):
        events.append((t, x))
        return 0.5 * x

    def callback(i, x, x_start):
        events.append((f"step {i}", x, x_start))

    out = sampler(denoise, np.ones((1, 2)), diffusion, timesteps, np.zeros_like, callback)
    expected = calls.get(sampler, [[t] for t in timesteps])
    assert [e[0] for e in events] == [e for i, called in enumerate(expected) for e in (*called, f"step {i}")]
    x = np.ones((1, 2))
    for i, called in enumerate(expected):
        (_, x_given), *_, (_, x_next, x_start) = events[: len(called) + 1]
        del events[: len(called) + 1]
        assert i == 0 or x_given is x
        if len(called) == 1 and (
            i == 0 or sampler not in calls
        ):  # the network's answer; those three report the x_0 that they made of it
            np.testing.assert_array_equal(x_start, 0.5 * x_given)
        else:
            np.testing.assert_allclose(x_next, ddim_step(x, x_start, *levels[i : i + 2]))
        x = x_next
    assert out is x


@every_sampler
def test_all_timesteps_by_default(sampler):
    seen = []
    diffusion = diffusion_of("linear", 20)
    sampler(lambda x, t: seen.append(t) or x, np.ones(2), diffusion, randn_like=np.zeros_like)
    assert list(dict.fromkeys(seen)) == list(range(19, -1, -1))


@every_sampler
@pytest.mark.parametrize("shape", [(1, 2), (13, 3, 2, 2, 2)], ids=str)
def test_tensors_give_what_numpy_gives(sampler, shape):
    """float32 on the device against float64 on the host, with the same noise."""
    diffusion, timesteps = diffusion_of("linear", 100), sampling_timesteps(100, 5)
    draws = np.random.default_rng(0).standard_normal((6, *shape)).astype(np.float32)

    def run(convert):
        noises = iter(draws[1:])
        return sampler(exact_denoiser(diffusion), convert(draws[0]), diffusion, timesteps, lambda x: convert(next(noises)))

    ours = run(Tensor)
    np.testing.assert_allclose(ours.asnumpy(), run(np.float64), rtol=1e-4, atol=1e-5)
    assert ours.asnumpy().dtype == np.float32
