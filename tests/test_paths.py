"""Rectified flow and EDM: levels, what v is, and the samplers on them, against the formulas of the papers in float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Tensor

from ms_diffusion.editing import invert_ddim
from ms_diffusion.process import DATA, DiffusionConfig, GaussianDiffusion, Level, Process
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SAMPLERS, ddim_step, sampling_timesteps
from ms_diffusion.schedules import PATHS, cosine_beta_schedule, edm_path, flow_path

T = 1000
FLOW = DiffusionConfig(T, "flow", "v", "l2").build(False)
EDM = DiffusionConfig(T, "edm", "v", "l2").build(False)
examples = settings(deadline=None, max_examples=30)
numbers = st.floats(-3, 3)


# The levels


def test_flow_is_a_straight_line_whose_velocity_is_constant():
    alphas, sigmas, (a, b) = flow_path(T)
    np.testing.assert_allclose(alphas + sigmas, 1, rtol=1e-15)
    assert (alphas[-1], sigmas[-1], sigmas[0]) == (0, 1, 1 / T)
    np.testing.assert_allclose(np.diff(alphas) * T, a[1:], rtol=1e-9)
    np.testing.assert_allclose(np.diff(sigmas) * T, b[1:], rtol=1e-9)


def test_shift_is_esser_et_al_eq_23():
    """The SNR of m times as many pixels is m times as high: sigma / alpha grows by the root of m."""
    plain, shifted = [path.sigmas[:-1] / path.alphas[:-1] for path in (flow_path(T), flow_path(T, shift=3.0))]
    np.testing.assert_allclose(shifted, 3 * plain, rtol=1e-9)


def test_edm_has_the_levels_of_karras():
    alphas, sigmas, _ = edm_path(18)
    i, rho = np.arange(18)[::-1], 7
    wanted = (80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho  # eq. 5
    np.testing.assert_allclose(sigmas / alphas, wanted, rtol=1e-12)


@examples
@given(t=st.integers(0, T - 1), x_start=numbers, noise=numbers, output=numbers)
def test_edm_is_its_preconditioning(t, x_start, noise, output):
    """c_in, c_skip and c_out of table 1: the network sees c_in y, and D = c_skip y + c_out F with v = -F."""
    (alpha, sigma), data = EDM.level(t), 0.5
    s = sigma / alpha
    y = x_start + s * noise
    c_in, c_skip = 1 / math.hypot(s, data), data**2 / (s**2 + data**2)
    c_out = s * data / math.hypot(s, data)
    assert alpha * x_start + sigma * noise == pytest.approx(c_in * y, rel=1e-9, abs=1e-12)
    x_t, times = Tensor(np.float32([[c_in * y]])), Tensor(np.int32([t]))
    found = EDM.predict_start(Tensor(np.float32([[-output]])), x_t, times).asnumpy()[0, 0]
    assert found == pytest.approx(c_skip * y + c_out * output, rel=1e-5, abs=1e-4)
    # The weight lambda = 1 / c_out^2 makes the loss that of F: no weights here
    assert (EDM.simple_weights == 1).all()


@pytest.mark.parametrize("process", [FLOW, EDM], ids=["flow", "edm"])
@examples
@given(t=st.integers(0, T - 1), seed=st.integers(0, 99))
def test_predictions_agree(process, t, seed):
    rng = np.random.default_rng(seed)
    x_start, noise = (Tensor(rng.standard_normal((13, 2)).astype(np.float32)) for _ in range(2))
    times = Tensor(np.full(13, t, np.int32))
    x_t = process.q_sample(x_start, times, noise)
    (alpha, sigma), v = process.level(t), process.predict_v(x_start, times, noise)
    np.testing.assert_allclose(x_t.asnumpy(), alpha * x_start.asnumpy() + sigma * noise.asnumpy(), atol=1e-5)
    np.testing.assert_allclose(process.predict_start_from_v(x_t, times, v).asnumpy(), x_start.asnumpy(), atol=2e-4)
    if sigma > 0.05:
        found = process.predict_noise_from_start(x_t, times, x_start).asnumpy()
        np.testing.assert_allclose(found, noise.asnumpy(), atol=1e-3)


def test_the_velocity_of_flow_is_noise_minus_data():
    x, z = Tensor(np.float32([[0.3]])), Tensor(np.float32([[2.0]]))
    assert FLOW.predict_v(x, Tensor(np.int32([7])), z).asnumpy() == pytest.approx(1.7)


@pytest.mark.parametrize("objective", ["v", "x0"])
def test_the_loss_of_x0_with_weights_of_velocity_is_that_of_velocity(objective):
    """Where sigma is at least the bound: the error of (x_t - x_0) / s."""
    process = Process(*flow_path(20)[:2], objective, weighting="velocity", slopes=flow_path(20).slopes, gamma=0.01)
    rng = np.random.default_rng(0)
    x, z, answer = (rng.standard_normal((20, 3)).astype(np.float32) for _ in range(3))
    t = np.arange(20, dtype=np.int32)
    found = process.losses(lambda x_t, t: Tensor(answer), Tensor(x), Tensor(t), Tensor(z)).asnumpy()
    s = (t[:, None] + 1) / 20
    velocity = answer if objective == "v" else ((1 - s) * x + s * z - answer) / s
    np.testing.assert_allclose(found, ((velocity - (z - x)) ** 2).mean(1), rtol=1e-4)


def test_a_process_of_levels_is_that_of_its_betas():
    betas = cosine_beta_schedule(50)
    theirs = GaussianDiffusion(betas, "v")
    ours = Process(np.sqrt(np.cumprod(1 - betas)), np.sqrt(1 - np.cumprod(1 - betas)), "v", "huber")
    for name in ("added", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "lvlb_weights"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-8, err_msg=name)
    np.testing.assert_allclose(ours.added, betas, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "flow", "objective": "eps"}, "zero terminal"),
        ({"schedule": "flow", "objective": "v", "beta_start": 0.1}, "no beta_start"),
        ({"schedule": "linear", "shift": 3.0}, "no shift"),
        ({"schedule": "edm", "objective": "v", "zero_terminal_snr": True}, "schedules of betas"),
        ({"schedule": "flow", "objective": "v", "shift": 0.0}, "shift"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises((ValueError, UserError), match=words):
        DiffusionConfig(**options).build()


# Samplers


def gaussian_denoiser(process, mean, std):
    """E[x_0 | x_t] for data N(mean, std^2)."""

    def denoise(x, t):
        alpha, sigma = process.level(t)
        return mean + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


@examples
@given(pair=st.lists(st.integers(1, T), min_size=2, max_size=2, unique=True), x=numbers, x_start=numbers)
def test_ddim_is_eulers_step_along_the_velocity(pair, x, x_start):
    s, t = max(pair) / T, min(pair) / T
    velocity = (x - x_start) / s
    found = ddim_step(x, x_start, Level(1 - s, s), Level(1 - t, t))
    assert found == pytest.approx(x + (t - s) * velocity, rel=1e-9, abs=1e-9)
    assert ddim_step(x, x_start, Level(1 - s, s), DATA) == pytest.approx(x_start, abs=1e-9)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"consistency"}))  # which needs a network that is tuned for it
@pytest.mark.parametrize("process", [FLOW, EDM], ids=list(PATHS))
def test_samplers_reach_the_data(process, name):
    """Data N(1.5, 0.3^2): the exact map of the ODE is linear, and a sampler with noise has the right mean and variance."""
    mean, std = 1.5, 0.3
    rng = np.random.default_rng(0)
    z = rng.standard_normal(20_000)
    timesteps = (
        list(range(T - 1, -1, -1)) if name == "ddpm" else sampling_timesteps(T, 200, "logsnr", process.alphas_cumprod)
    )
    alpha, sigma = process.level(T - 1)
    x = alpha * (mean + std * rng.standard_normal(z.shape)) + sigma * z
    drawn = SAMPLERS[name](
        gaussian_denoiser(process, mean, std), x, process, timesteps, lambda x: rng.standard_normal(x.shape)
    )
    assert drawn.mean() == pytest.approx(mean, abs=0.01) and drawn.std() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("process", [FLOW, EDM], ids=list(PATHS))
def test_an_inversion_leads_back(process):
    denoise = gaussian_denoiser(process, 0.2, 0.5)
    x, timesteps = np.linspace(-1, 1, 13), sampling_timesteps(T, 100, "logsnr", process.alphas_cumprod)
    noise = invert_ddim(denoise, x, process, timesteps, 20)
    np.testing.assert_allclose(SAMPLERS["ddim"](denoise, noise, process, timesteps), x, atol=1e-4)
