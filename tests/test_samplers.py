"""Samplers on data N(m, s^2), whose exact denoiser and solutions are known, in float64; denoisers; seeded generation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Parameter, Tensor, nn

from ms_diffusion.denoiser import make_denoiser
from ms_diffusion.diffusion import OBJECTIVES, GaussianDiffusion
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.samplers import SAMPLERS, SeededNoise, generate, sample_ddim, sample_ddpm, sampling_timesteps
from ms_diffusion.schedules import SCHEDULES, cosine_beta_schedule, linear_beta_schedule

M, S = 0.3, 0.5  # the data's mean and standard deviation
examples = settings(deadline=None, max_examples=100)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def diffusion_of(schedule="linear", T=1000):
    """What a sampler needs of the process, from the definition of alpha_bar."""
    return SimpleNamespace(T=T, v_posterior=0.0, alphas_cumprod=np.array(np.cumprod(1 - SCHEDULES[schedule](T))))


def variance_of(alpha_bar):
    """Of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise with x_0 ~ N(m, s^2)."""
    return alpha_bar * S**2 + 1 - alpha_bar


def exact_denoiser(diffusion):
    """E[x_0 | x_t] by conditioning the joint Gaussian of x_0 and x_t."""

    def denoise(x, t):
        alpha_bar = float(diffusion.alphas_cumprod[t])
        return M + math.sqrt(alpha_bar) * S**2 / variance_of(alpha_bar) * (x - math.sqrt(alpha_bar) * M)

    return denoise


def ode_solution(x_T, alpha_bar_T):
    """The probability-flow ODE (Song et al. 2021, eq. 13) keeps (x_t - mean_t) / std_t; at t = 0 that is data."""
    return M + S * (x_T - math.sqrt(alpha_bar_T) * M) / math.sqrt(variance_of(alpha_bar_T))


def affine_map(sampler, diffusion, timesteps=None, **options):
    """(b, A, C): the sampler's x_0 = b + A x_T + sum_k C_k z_k for its noises z_k, exact with an affine denoiser.

    One run of many numbers: x_T = 0, x_T = 1, and x_T = 0 with the unit noise of one step each.
    """
    n = diffusion.T if timesteps is None else len(timesteps)
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
@given(data=st.data(), T=st.integers(1, 4000))
def test_sampling_timesteps(T, data):
    """Strictly descending from T - 1 to 0, each the whole number nearest to its even place."""
    steps = data.draw(st.integers(1, T))
    timesteps = sampling_timesteps(T, steps)
    gaps = -np.diff(timesteps)
    assert len(timesteps) == steps and timesteps[0] == T - 1
    assert all(type(t) is int for t in timesteps)
    assert (gaps > 0).all()
    if steps > 1:
        assert timesteps[-1] == 0
        assert all(abs(t - (T - 1) * (1 - i / (steps - 1))) <= 0.5 + 1e-9 for i, t in enumerate(timesteps))


def test_sampling_timesteps_by_hand():
    assert sampling_timesteps(5, 5) == [4, 3, 2, 1, 0]
    assert sampling_timesteps(1000, 1) == [999]
    assert sampling_timesteps(1000, 4) == [999, 666, 333, 0]
    assert sampling_timesteps(9, 4) == [8, 5, 3, 0]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps: choose from 1 to 10"):
        sampling_timesteps(10, steps)


# DDPM


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_over_all_steps_samples_the_data(schedule):
    """Mean exactly m; the variance follows the recursion of q's own regression of x_{t-1} on x_t, and comes near s^2."""
    diffusion = diffusion_of(schedule)
    b, A, C = affine_map(sample_ddpm, diffusion)
    alpha_bar = diffusion.alphas_cumprod
    assert b + A * math.sqrt(alpha_bar[-1]) * M == pytest.approx(M, abs=1e-10)  # for x_T from q(x_T)

    variance = 1.0  # of x_T ~ N(0, 1)
    for t in range(diffusion.T - 1, -1, -1):
        previous = alpha_bar[t - 1] if t else 1.0
        alpha = alpha_bar[t] / previous
        slope = math.sqrt(alpha) * variance_of(previous) / variance_of(alpha_bar[t])  # Cov(x_{t-1}, x_t) / Var(x_t)
        variance = slope**2 * variance + (1 - alpha) * (1 - previous) / (1 - alpha_bar[t])
    assert A**2 + (C**2).sum() == pytest.approx(variance, rel=1e-8)
    # The posterior's variance leaves out that of x_0 given x_t: too little by O(1 / T) (Ho et al., section 3.2)
    assert A**2 + (C**2).sum() == pytest.approx(S**2, rel=0.03)
    assert b == pytest.approx(M, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_ddpm_samples_have_the_data_moments(seed):
    """The same by Monte Carlo, noise drawn as a user would."""
    n, rng, diffusion = 20_000, np.random.default_rng(seed), diffusion_of("cosine", 200)
    x = sample_ddpm(
        exact_denoiser(diffusion), rng.standard_normal(n), diffusion, randn_like=lambda x: rng.standard_normal(x.shape)
    )
    b, A, C = affine_map(sample_ddpm, diffusion)
    variance = A**2 + (C**2).sum()
    assert abs(x.mean() - b) < 5 * math.sqrt(variance / n)
    assert abs(x.var() - variance) < 5 * math.sqrt(2 / n) * variance


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

    for t in range(1, T):
        steps = []
        sample_ddpm(denoise, x, diffusion, [t, t - 1], lambda x: z, lambda i, *x, steps=steps: steps.append(x))
        mean, variance, _, x_start = diffusion.p_mean_variance(net, Tensor(x), Tensor(np.full(13, t, np.int32)))
        np.testing.assert_allclose(steps[0][1], x_start.asnumpy(), rtol=1e-6)
        expected = mean.asnumpy() + np.sqrt(variance.asnumpy()) * z
        np.testing.assert_allclose(steps[0][0], expected, rtol=1e-4, atol=1e-5)


# DDIM


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic", "sigmoid"])
def test_ddim_solves_the_ode_with_order_1(schedule):
    """At eta = 0 the error against the exact solution falls like 1 / steps."""
    diffusion = diffusion_of(schedule)
    x_T = np.array([-1.5, 0.2, 2.0])
    exact = ode_solution(x_T, diffusion.alphas_cumprod[-1])
    steps = np.array([25, 50, 100, 200, 400])
    errors = []
    for n in steps:
        x = sample_ddim(exact_denoiser(diffusion), x_T, diffusion, sampling_timesteps(diffusion.T, n))
        errors.append(abs(x - exact).max())
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9
    assert errors[-1] < 0.02 * S


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_over_all_steps_transports_the_noise_to_the_data(schedule):
    diffusion = diffusion_of(schedule, 4000)
    x_T = np.linspace(-3, 3, 13)
    x = sample_ddim(exact_denoiser(diffusion), x_T, diffusion)
    np.testing.assert_allclose(x, ode_solution(x_T, diffusion.alphas_cumprod[-1]), atol=0.01)


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


# Both


@every_sampler
def test_one_step_gives_the_denoisers_answer(sampler):
    diffusion = diffusion_of("cosine", 100)
    x = np.linspace(-2, 2, 13)
    out = sampler(exact_denoiser(diffusion), x, diffusion, [99])
    np.testing.assert_allclose(out, exact_denoiser(diffusion)(x, 99), rtol=1e-12)


@every_sampler
def test_the_callback_sees_each_step_in_order(sampler):
    diffusion, timesteps, events = diffusion_of("linear", 50), [49, 20, 3], []

    def denoise(x, t):
        events.append(("denoise", t, x))
        return 0.5 * x

    def callback(i, x, x_start):
        events.append(("callback", i, x, x_start))

    out = sampler(denoise, np.ones((1, 2)), diffusion, timesteps, np.zeros_like, callback)
    assert [e[:2] for e in events] == [(w, v) for i, t in enumerate(timesteps) for w, v in (("denoise", t), ("callback", i))]
    calls, answers = events[::2], events[1::2]
    for call, answer in zip(calls, answers, strict=True):
        np.testing.assert_array_equal(answer[3], 0.5 * call[2])
    for call, answer in zip(calls[1:], answers, strict=False):
        assert call[2] is answer[2]
    assert out is answers[-1][2]


@every_sampler
def test_all_timesteps_by_default(sampler):
    seen = []
    diffusion = diffusion_of("linear", 20)
    sampler(lambda x, t: seen.append(t) or x, np.ones(2), diffusion, randn_like=np.zeros_like)
    assert seen == list(range(19, -1, -1))


@every_sampler
@pytest.mark.parametrize("shape", [(1, 2), (13, 1, 4, 4), (13, 3, 2, 2, 2)], ids=str)
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


# Denoiser


class Toy(nn.Cell):
    """0.8 x + 0.01 t (+ cond)."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.float32(0.8)), "w")

    def construct(self, x, t, cond=None):
        out = self.w * x + 0.01 * t.reshape((-1, 1, 1, 1))
        return out if cond is None else out + cond


@every_objective
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("conditional", [False, True])
def test_make_denoiser(objective, clip, batch, conditional):
    """x_0 of each objective from its equation, at several t of one graph; PyNative agrees."""
    T = 50
    diffusion = GaussianDiffusion(cosine_beta_schedule(T), objective)
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((batch, 1, 2, 2)).astype(np.float32)
    cond = rng.standard_normal(x.shape).astype(np.float32) if conditional else None
    net, ms_cond = Toy(), Tensor(cond) if conditional else None
    denoise = make_denoiser(diffusion, net, ms_cond, clip)
    beyond = False  # [-1, 1], so that clipping has something to do
    for t in (0, 25, 45):
        alpha_bar = float(np.prod(1 - diffusion.betas[: t + 1]))
        out = 0.8 * x.astype(np.float64) + 0.01 * t + (cond if conditional else 0)
        x_start = {
            "eps": (x - math.sqrt(1 - alpha_bar) * out) / math.sqrt(alpha_bar),
            "x0": out,
            "v": math.sqrt(alpha_bar) * x - math.sqrt(1 - alpha_bar) * out,
        }[objective]
        beyond |= (abs(x_start) > 1).any()
        expected = np.clip(x_start, -1, 1) if clip else x_start
        ours = denoise(Tensor(x), t)
        np.testing.assert_allclose(ours.asnumpy(), expected, rtol=2e-5, atol=2e-5)

        times = Tensor(np.full(batch, t, np.int32))
        eager = diffusion.predict_start(net(Tensor(x), times, ms_cond), Tensor(x), times).asnumpy()
        np.testing.assert_allclose(ours.asnumpy(), np.clip(eager, -1, 1) if clip else eager, rtol=1e-5, atol=1e-5)
    assert beyond


def test_make_denoiser_clips_by_default_and_leaves_training():
    net = Toy().set_train(True)
    denoise = make_denoiser(GaussianDiffusion(linear_beta_schedule(50), "x0"), net)
    assert not net.training
    np.testing.assert_array_equal(denoise(Tensor(np.full((1, 1, 2, 2), -9, np.float32)), 3).asnumpy(), -1)


# Generation


@examples
@given(seed=st.integers(0, 2**40), first=st.integers(0, 100), batch=st.sampled_from([1, 4, 13]))
def test_noise_belongs_to_its_image(seed, first, batch):
    """Image i draws the same numbers, draw after draw, whatever else is in its batch."""
    together = SeededNoise(seed, range(first, first + batch))
    alone = SeededNoise(seed, [first + batch - 1])
    for shape in ((2,), (1, 4, 4)):
        x = together(shape)
        assert x.shape == (batch, *shape) and x.dtype == np.float32
        np.testing.assert_array_equal(x[-1:], alone(shape))


def test_noise_is_standard_normal_and_never_the_same():
    noise = SeededNoise(0, range(50))
    x = np.stack([noise((1000,)), noise((1000,)), SeededNoise(1, range(50))((1000,))]).reshape(150, 1000)
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / x.size)
    correlation = np.corrcoef(x) - np.eye(150)  # of images, of draws and of seeds
    assert abs(correlation).max() < 6 / math.sqrt(1000)


@pytest.fixture(scope="module")
def unet_denoiser():
    diffusion = GaussianDiffusion(linear_beta_schedule(20))
    return diffusion, make_denoiser(diffusion, UnetConfig(dim=8, dim_mults=(1, 2)).build())


@every_sampler
def test_an_image_depends_on_its_seed_and_index_alone(sampler, unet_denoiser):
    """The same image i for any batch size and number of images, through a Unet."""
    diffusion, denoise = unet_denoiser
    timesteps, shape = sampling_timesteps(20, 3), (1, 8, 8)

    def images(num, batch_size, seed=3):
        return generate(sampler, denoise, diffusion, timesteps, shape, num, seed, batch_size)

    reference = images(13, 64)
    assert reference.shape == (13, *shape) and reference.dtype == np.float32
    assert abs(reference).max() <= 1 and reference.std() > 0.1
    assert all(abs(a - b).max() > 0.1 for a, b in zip(reference[:-1], reference[1:], strict=True))
    for num, batch_size in ((13, 4), (13, 1), (13, 13), (5, 4), (5, 1)):
        x = images(num, batch_size)
        assert x.shape == (num, *shape)
        np.testing.assert_allclose(x, reference[:num], atol=1e-5)
    assert abs(images(4, 4, seed=4) - reference[:4]).max() > 0.1


@every_sampler
@pytest.mark.parametrize(("num", "batch_size", "sizes"), [(5, 4, [4, 4]), (13, 4, [4] * 4), (13, 64, [13]), (1, 1, [1])])
def test_generate_draws_equal_batches(sampler, num, batch_size, sizes):
    """One size, so one graph; each image the sampler's own result on its own noise, exactly."""
    diffusion, timesteps, seen = diffusion_of("cosine", 50), [49, 20, 0], []

    def denoise(x, t):
        seen.append(x.shape[0])
        return exact_denoiser(diffusion)(x, t)

    x = generate(sampler, denoise, diffusion, timesteps, (2, 3), num, 7, batch_size)
    assert seen == [size for size in sizes for _ in timesteps]
    assert x.shape == (num, 2, 3) and x.dtype == np.float32
    for i in range(num):
        rng = np.random.default_rng((7, i))
        alone = sampler(
            exact_denoiser(diffusion),
            rng.standard_normal((2, 3), dtype=np.float32).astype(float),
            diffusion,
            timesteps,
            lambda x, rng=rng: rng.standard_normal(x.shape, dtype=np.float32),
        )
        np.testing.assert_allclose(x[i], alone, rtol=1e-5, atol=1e-5)


def test_generate_hands_on_the_callback():
    steps = []
    diffusion = diffusion_of("cosine", 50)
    generate(
        sample_ddim,
        exact_denoiser(diffusion),
        diffusion,
        [49, 9],
        (2,),
        5,
        batch_size=4,
        callback=lambda i, x, x_start: steps.append((i, x.shape, x_start.shape)),
    )
    assert steps == [(0, (4, 2), (4, 2)), (1, (4, 2), (4, 2))] * 2
