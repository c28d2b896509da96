"""RePaint, DDIM inversion and slerp on Gaussian data, whose exact denoiser and conditionals are known, in float64."""

import math

import numpy as np
import pytest
from helpers import diffusion_of, process_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_diffusion.denoiser import inpaint
from ms_diffusion.editing import invert_ddim, sample_repaint, slerp
from ms_diffusion.samplers import sample_ddim, sample_ddpm, sampling_timesteps

FACTOR = np.array([[0.5, 0, 0], [0.35, 0.3, 0], [-0.2, 0.3, 0.25]])
MEAN, COVARIANCE = np.array([0.3, -0.4, 0.2]), FACTOR @ FACTOR.T  # of the data: three numbers that depend on each other
D = len(MEAN)
MASK, KNOWN = np.array([1.0, 1.0, 0.0]), np.array([0.9, 0.1, 0.0])  # the third is painted anew
examples = settings(deadline=None, max_examples=50)


def geometric_diffusion(T, v_posterior=1.0):
    """sigma / alpha from 0.01 to 30: small steps where the data is made, with beta as the variance."""
    return process_of(1 / (1 + np.geomspace(0.01, 30, T) ** 2), v_posterior=v_posterior)


def exact_denoiser(diffusion):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE)."""

    def denoise(x, t):
        alpha_bar = float(diffusion.alphas_cumprod[t])
        gain = math.sqrt(alpha_bar) * COVARIANCE @ np.linalg.inv(alpha_bar * COVARIANCE + (1 - alpha_bar) * np.eye(D))
        return MEAN + (x - math.sqrt(alpha_bar) * MEAN) @ gain.T

    return denoise


def data(n=50):
    return MEAN + np.random.default_rng(0).standard_normal((n, D)) @ FACTOR.T


def rms(error):
    return math.sqrt(np.mean(error**2))


# RePaint


def moments(sampler, denoise, diffusion, draws, **options):
    """The exact mean (D,) and covariance (D, D) of a sampler's x, which is affine in what it draws: one run of x_T = 0, of
    x_T = each unit vector, and of x_T = 0 with each unit vector in the place of each draw of noise."""
    x = np.zeros((1 + D + draws * D, D))
    x[1 : 1 + D] = np.eye(D)
    calls = iter(range(draws))

    def randn_like(x):
        z = np.zeros_like(x)
        first = 1 + D + next(calls) * D
        z[first : first + D] = np.eye(D)
        return z

    out = sampler(denoise, x, diffusion, None, randn_like, **options)
    return out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])


def conditional():
    """Mean and variance of the painted number given the two known ones."""
    gain = np.linalg.solve(COVARIANCE[:2, :2], COVARIANCE[:2, 2])
    return MEAN[2] + gain @ (KNOWN - MEAN)[:2], COVARIANCE[2, 2] - gain @ COVARIANCE[:2, 2]


@pytest.mark.parametrize("jump_length", [1, 5])
def test_resampling_approaches_the_conditional_distribution(jump_length):
    """Replacing is off by 0.06 in a mean of 0.04 and doubles the variance; RePaint is off by less with each doubling."""
    diffusion = geometric_diffusion(80)
    denoise = inpaint(exact_denoiser(diffusion), KNOWN, MASK)

    def errors(sampler, repeats=1, **options):
        draws = diffusion.num_timesteps * repeats + diffusion.num_timesteps * (repeats - 1) // jump_length
        mean, covariance = moments(sampler, denoise, diffusion, draws, **options)
        np.testing.assert_allclose(mean[:2], KNOWN[:2], atol=1e-12)
        np.testing.assert_allclose(covariance[:2], 0, atol=1e-12)
        return np.array([mean[2], covariance[2, 2]]) - conditional()

    plain = errors(sample_ddpm)
    np.testing.assert_allclose(conditional(), [0.04, 0.0625])
    assert (plain > [0.06, 0.06]).all()

    repainted = [errors(sample_repaint, n, jump_length=jump_length, jump_n_sample=n) for n in (1, 2, 4, 8, 16)]
    np.testing.assert_allclose(repainted[0], plain, atol=1e-12)
    for fewer, more in zip(repainted[:-1], repainted[1:], strict=True):
        assert (abs(more) < 0.65 * fewer).all()
    assert (abs(repainted[-1]) < 0.1 * plain).all()


def test_samples_of_repaint_follow_the_conditional_distribution():
    """The same by drawing: 20,000 samples, within 5 standard errors of the exact moments of this sampler."""
    diffusion, rng, n = geometric_diffusion(40), np.random.default_rng(0), 20000
    options = {"jump_length": 4, "jump_n_sample": 3}
    denoise = inpaint(exact_denoiser(diffusion), KNOWN, MASK)
    x = sample_repaint(
        denoise, rng.standard_normal((n, D)), diffusion, None, lambda x: rng.standard_normal(x.shape), **options
    )
    mean, covariance = moments(sample_repaint, denoise, diffusion, 140, **options)
    np.testing.assert_array_equal(x[:, :2], np.broadcast_to(KNOWN[:2], (n, 2)))
    assert abs(x[:, 2].mean() - mean[2]) < 5 * math.sqrt(covariance[2, 2] / n)
    assert abs(x[:, 2].var() / covariance[2, 2] - 1) < 5 * math.sqrt(2 / n)


@examples
@given(
    seed=st.integers(0, 2**32),
    known=st.lists(st.booleans(), min_size=6, max_size=6),
    jump_length=st.integers(1, 7),
    jump_n_sample=st.integers(1, 4),
)
def test_the_known_part_is_kept_exactly(seed, known, jump_length, jump_n_sample):
    rng, mask = np.random.default_rng(seed), np.array(known, float)
    given = rng.uniform(-1, 1, (2, 6))
    x = sample_repaint(
        inpaint(lambda x, t: np.tanh(x + 0.01 * t), given, mask),
        rng.standard_normal((2, 6)),
        diffusion_of(T=5),
        None,
        lambda x: rng.standard_normal(x.shape),
        jump_length=jump_length,
        jump_n_sample=jump_n_sample,
    )
    np.testing.assert_array_equal(x[:, mask == 1], given[:, mask == 1])
    assert (x[:, mask == 0] != given[:, mask == 0]).all()


@pytest.mark.parametrize(
    ("jump_length", "jump_n_sample", "called"),
    [
        (2, 1, [9, 7, 5, 3, 1]),
        (2, 2, [9, 7, 9, 7, 5, 3, 5, 3, 1, 1]),
        (1, 3, [9, 9, 9, 7, 7, 7, 5, 5, 5, 3, 3, 3, 1, 1, 1]),
        (3, 2, [9, 7, 5, 9, 7, 5, 3, 1, 3, 1]),
        (10, 2, [9, 7, 5, 3, 1, 9, 7, 5, 3, 1]),
    ],
)
def test_order_of_the_calls_by_hand(jump_length, jump_n_sample, called):
    """The timesteps that the network sees, those that the callback counts, and x where each call begins: the last step's
    outcome, or after a jump what q(x_t | x_s) makes of it with the noise drawn for it."""
    diffusion, timesteps = diffusion_of(T=10), [9, 7, 5, 3, 1]
    level = {**dict(zip(timesteps, diffusion.alphas_cumprod[timesteps], strict=True)), None: 1.0}
    rng, noises, begun, ended = np.random.default_rng(0), [], [], []

    def randn_like(x):
        noises.append(rng.standard_normal(x.shape))
        return noises[-1]

    def denoise(x, t):
        begun.append((t, x, len(noises)))
        return 0.3 * x

    start = np.ones(4)
    out = sample_repaint(
        denoise,
        start,
        diffusion,
        timesteps,
        randn_like,
        lambda i, x, x_start: ended.append((i, x, x_start)),
        jump_length=jump_length,
        jump_n_sample=jump_n_sample,
    )
    assert [t for t, _, _ in begun] == called
    assert [i for i, _, _ in ended] == list(range(len(called)))
    assert begun[0][1] is start and out is ended[-1][1]
    below = dict(zip(timesteps, [*timesteps[1:], None], strict=True))
    for (last, _, _), (t, x, drawn), (_, reached, _) in zip(begun[:-1], begun[1:], ended[:-1], strict=True):
        alpha = level[t] / level[below[last]]  # 1 on the way down
        assert alpha == 1 if t == below[last] else alpha < 1
        noise = noises[drawn - 1] if alpha < 1 else 0
        np.testing.assert_allclose(x, math.sqrt(alpha) * reached + math.sqrt(1 - alpha) * noise, rtol=1e-12)
    for (_, x, _), (_, _, x_start) in zip(begun, ended, strict=True):
        np.testing.assert_array_equal(x_start, 0.3 * x)


def test_a_jump_back_keeps_the_marginals():
    """At every call x has the moments of q(x_t): the jump adds as much noise as the steps took away. The denoiser knows x_0
    = c, so each step is a draw from q(x_s | x_t, c) and x ~ N(sqrt(alpha_bar) c, 1 - alpha_bar) throughout."""
    diffusion, seen = diffusion_of("cosine", T=12), []
    c = np.full(D, 0.7)

    def denoise(x, t):
        mean, factor = x[0], x[1:] - x[0]
        seen.append(t)
        np.testing.assert_allclose(mean, math.sqrt(diffusion.alphas_cumprod[t]) * c, rtol=1e-9)
        np.testing.assert_allclose(factor.T @ factor, (1 - diffusion.alphas_cumprod[t]) * np.eye(D), atol=1e-9)
        return c + 0 * x

    alpha_bar = diffusion.alphas_cumprod[-1]

    def sampler(denoise, x, *rest, **options):  # begins at q(x_T | c) itself
        return sample_repaint(denoise, math.sqrt(alpha_bar) * c + math.sqrt(1 - alpha_bar) * x, *rest, **options)

    mean, covariance = moments(sampler, denoise, diffusion, 12 * 3 + 8, jump_length=4, jump_n_sample=3)
    assert seen == 3 * [11, 10, 9, 8] + 3 * [7, 6, 5, 4] + 3 * [3, 2, 1, 0]
    np.testing.assert_allclose(mean, c)
    np.testing.assert_allclose(covariance, 0, atol=1e-12)


@pytest.mark.parametrize("options", [{"jump_length": 0}, {"jump_n_sample": 0}, {"jump_length": -1}, {"v_posterior": 1.1}])
def test_repaint_refuses_impossible_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        sample_repaint(lambda x, t: x, np.ones(3), diffusion_of(T=5), **options)


# DDIM inversion


def round_trip(diffusion, timesteps, iterations, x):
    denoise = exact_denoiser(diffusion)
    noise = invert_ddim(denoise, x, diffusion, timesteps, iterations)
    assert np.isfinite(noise).all()
    return rms(sample_ddim(denoise, noise, diffusion, timesteps) - x)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion_comes_back_as_exactly_as_it_iterates(schedule, zero_terminal_snr):
    """Ten more iterations, a thousandth of the error, down to float64's end; at zero SNR and next to it too."""
    diffusion = diffusion_of(schedule, zero_terminal_snr=zero_terminal_snr)
    errors = [round_trip(diffusion, sampling_timesteps(1000, 50), n, data()) for n in (1, 2, 4, 8, 16, 40)]
    assert errors[0] < 0.03
    for few, more, doubled in zip(errors[:3], errors[1:4], (1, 2, 4), strict=True):
        assert more < 0.35**doubled * few
    assert errors[4] < 1e-9 and errors[5] < 1e-14


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_one_iteration_is_of_first_order(schedule):
    """Half the error with twice the steps."""
    diffusion = diffusion_of(schedule)
    errors = np.array([round_trip(diffusion, sampling_timesteps(1000, n), 1, data()) for n in (25, 50, 100, 200)])
    assert (abs(np.log2(errors[:-1] / errors[1:]) - 1) < 0.25).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion_leads_to_the_noise_of_the_flow(schedule):
    """The probability-flow ODE keeps (x - mean) / std along each principal axis: so that is what x_T holds of x_0."""
    diffusion, x = diffusion_of(schedule), data()
    variance, axes = np.linalg.eigh(COVARIANCE)
    alpha_bar = diffusion.alphas_cumprod[-1]
    ratio = np.sqrt((alpha_bar * variance + 1 - alpha_bar) / variance)
    exact = math.sqrt(alpha_bar) * MEAN + (x - MEAN) @ axes * ratio @ axes.T
    errors = [
        abs(invert_ddim(exact_denoiser(diffusion), x, diffusion, sampling_timesteps(1000, n), 20) - exact).max()
        for n in (50, 100, 200, 400)
    ]
    assert errors[-1] < 0.05 * abs(exact).max()
    assert all(half < 0.7 * whole for whole, half in zip(errors[:-1], errors[1:], strict=True))


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_calls_of_an_inversion(iterations):
    """From the cleanest timestep to the noisiest, `iterations` at each; the first sees the image itself."""
    diffusion, calls, image = diffusion_of(T=50), [], np.ones((2, D))

    def denoise(x, t):
        calls.append((t, x))
        return 0.9 * x

    invert_ddim(denoise, image, diffusion, [49, 20, 3], iterations)
    assert [t for t, _ in calls] == [3] * iterations + [20] * iterations + [49] * iterations
    np.testing.assert_array_equal(calls[0][1], image)


def test_inversion_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="iterations is 0"):
        invert_ddim(lambda x, t: x, np.ones(3), diffusion_of(T=5), iterations=0)
    with pytest.raises(ValueError, match="use more timesteps"):
        invert_ddim(lambda x, t: x, np.ones(3), diffusion_of(T=5, zero_terminal_snr=True), [4])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_one_iteration_is_to_first_order_diffusers_inversion(schedule):
    """DDIMInverseScheduler keeps the eps of (x, the noisier timestep) for the whole step. It differs from the exact inverse
    and from one iteration here by half as much with twice the steps."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    x, distances = data(), []
    for steps in (50, 100, 200):
        scheduler = diffusers.DDIMInverseScheduler(beta_schedule=schedule, clip_sample=False)
        scheduler.set_timesteps(steps)
        diffusion = process_of(scheduler.alphas_cumprod.double().numpy())
        denoise, theirs = exact_denoiser(diffusion), x
        for t in scheduler.timesteps.tolist():
            alpha_bar = diffusion.alphas_cumprod[t]
            eps = (theirs - math.sqrt(alpha_bar) * denoise(theirs, t)) / math.sqrt(1 - alpha_bar)
            theirs = scheduler.step(torch.tensor(eps), t, torch.tensor(theirs)).prev_sample.numpy()
        timesteps = scheduler.timesteps.tolist()[::-1]
        ours, exact = (invert_ddim(denoise, x, diffusion, timesteps, n) for n in (1, 40))
        distances.append([rms(ours - theirs), rms(ours - exact), rms(theirs - exact)])
    distances = np.array(distances)
    assert (abs(np.log2(distances[:-1] / distances[1:]) - 1) < 0.15).all()
    assert distances[-1, 0] < 0.02 and (distances[:, 1] < distances[:, 2]).all()


# Slerp

vectors = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4).map(np.array).filter(lambda v: np.abs(v).max() > 0.1)


@examples
@given(a=vectors, b=vectors)
def test_slerp_begins_and_ends_at_its_ends(a, b):
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)


@examples
@given(a=vectors, b=vectors, share=st.floats(0, 1))
def test_slerp_keeps_the_length_and_turns_evenly(a, b, share):
    """Between vectors of one length: as long as they are, and share of the angle away from the first."""
    a, b = 2 * a / np.linalg.norm(a), 2 * b / np.linalg.norm(b)
    if abs(a @ b) > 4 * math.cos(1e-3):
        return  # (all but) parallel: see below
    c = slerp(a, b, share)
    np.testing.assert_allclose(np.linalg.norm(c), 2, rtol=1e-6)
    np.testing.assert_allclose(np.arccos(np.clip(a @ c / 4, -1, 1)), share * np.arccos(a @ b / 4), atol=1e-4)


def test_slerp_by_hand():
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    np.testing.assert_allclose(slerp(a, b, 0.5), [[math.sqrt(0.5)] * 2], rtol=1e-12)
    np.testing.assert_allclose(slerp(a, b, 1 / 3), [[math.sqrt(3) / 2, 1 / 2]], rtol=1e-12)
    np.testing.assert_allclose(slerp(3 * a, 4 * b, 0.5), [[3 * math.sqrt(0.5), 4 * math.sqrt(0.5)]], rtol=1e-12)


@examples
@given(a=vectors, scale=st.sampled_from([1.0, -1.0, 1 + 1e-9, -1 - 1e-9, 0.5, -2.0]), share=st.floats(0, 1))
def test_slerp_of_parallel_and_opposite_vectors_is_straight(a, scale, share):
    for dtype in (np.float32, np.float64):
        c = slerp(a.astype(dtype), (scale * a).astype(dtype), share)
        assert np.isfinite(c).all()
        if scale > 0:  # between opposite ones any way over the sphere would do
            np.testing.assert_allclose(c, (1 - share + share * scale) * a, atol=1e-2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_slerp_between_noises_is_noise(share):
    """Of the variance of noise, where the straight line would have share^2 + (1 - share)^2."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 100, 100)).astype(np.float32)
    c = slerp(a, b, share)
    assert c.shape == a.shape and c.dtype == np.float32
    assert abs((c**2).mean() - 1) < 5 * math.sqrt(2 / c.size)
