"""Samplers against other implementations: diffusers where it is installed, numbers computed from it, loops from the papers.

All on a smooth eps of no use to anyone and Stable Diffusion's betas, where sigma / alpha stays below 80.
"""

import math
import warnings
from functools import partial

import numpy as np
import pytest
from helpers import process_of

from ms_diffusion.process import Process
from ms_diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler_ancestral,
    sample_heun,
    sample_midpoint,
    sample_plms,
    sample_sde_dpmpp_2m,
    sample_unipc,
    sampling_timesteps,
)
from ms_diffusion.schedules import SCHEDULES, flow_path

# diffusers hands torch tensors to NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn:DeprecationWarning")


def ratio(alpha_bar):
    """sigma / alpha, the noise in the units of the data."""
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def stable_diffusion(T=1000):
    betas = SCHEDULES["sqrt_linear"](T, 0.00085, 0.012)
    return process_of(np.cumprod(1 - betas), betas=betas)


def eps(x, t):
    return 0.6 * np.sin(x + t / 30) + 0.3 * x


def eps_denoiser(diffusion):
    def denoise(x, t):
        alpha_bar = diffusion.alphas_cumprod[t]
        return (x - math.sqrt(1 - alpha_bar) * eps(x, t)) / math.sqrt(alpha_bar)

    return denoise


@pytest.mark.parametrize("sampler", [sample_heun, sample_plms])
@pytest.mark.parametrize("timesteps", [[85, 70, 42, 30, 15, 3], [99, 50], [99]], ids=str)
def test_heun_and_plms_in_the_units_of_the_data(sampler, timesteps):
    """In y = x / alpha the ODE is dy / ds = eps, s = sigma / alpha, and the methods read as in EDM's algorithm 1 and in
    latent diffusion's plms.py, down to s = 0."""
    diffusion, x = stable_diffusion(100), np.linspace(-2, 2, 13)
    s = [*ratio(diffusion.alphas_cumprod[timesteps]), 0]

    def slope(y, i):
        return eps(y / math.sqrt(1 + s[i] ** 2), timesteps[i])

    y, old = x * math.sqrt(1 + s[0] ** 2), []
    for i in range(len(timesteps)):
        d, h = slope(y, i), s[i + 1] - s[i]
        old = [d, *old]
        if s[i + 1] > 0 and (sampler is sample_heun or i == 0):
            d = (d + slope(y + h * d, i + 1)) / 2
        elif sampler is sample_plms and i == 1:
            d = (3 * old[0] - old[1]) / 2
        elif sampler is sample_plms and i == 2:
            d = (23 * old[0] - 16 * old[1] + 5 * old[2]) / 12
        elif sampler is sample_plms and i > 2:
            d = (55 * old[0] - 59 * old[1] + 37 * old[2] - 9 * old[3]) / 24
        y = y + h * d
    np.testing.assert_allclose(sampler(eps_denoiser(diffusion), x, diffusion, timesteps), y, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def schedulers():
    """diffusers' (name, diffusion) -> scheduler, with noise levels and arithmetic in float64 where it lets us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")

    def make(name, diffusion, **config):
        scheduler = getattr(diffusers, name)(diffusion.num_timesteps, trained_betas=diffusion.betas, **config)
        scheduler.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
        return scheduler

    torch.set_default_dtype(torch.float64)
    yield make
    torch.set_default_dtype(torch.float32)


def run_scheduler(scheduler, x, steps, **options):
    """Its loop over `eps` -> x_0, its timesteps."""
    import torch

    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    if hasattr(scheduler, "sigmas"):
        a = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - a) / a) ** 0.5, torch.zeros(1)])
    x = torch.from_numpy(x)
    for t in timesteps:
        x = scheduler.step(torch.from_numpy(eps(x.numpy(), t)), t, x, **options).prev_sample
    return x.numpy(), list(dict.fromkeys(timesteps))  # PNDM names its second twice


CLIP, SIGMAS = {"clip_sample": False}, {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
DPMPP = SIGMAS | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
SDE = DPMPP | {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize(
    ("name", "config", "sampler"),
    [
        *(("DDIM", CLIP, partial(sample_ddim, eta=eta)) for eta in (0.0, 0.7, 1.0)),
        *(("DDPM", CLIP | {"variance_type": name}, sample_ddpm) for name in ("fixed_small", "fixed_large")),
        ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}, sample_plms),
        ("DPMSolverMultistep", DPMPP | {"solver_order": 1}, sample_ddim),
        ("DPMSolverMultistep", DPMPP | {"solver_order": 2}, sample_dpmpp_2m),
        ("DPMSolverMultistep", SDE | {"solver_order": 1}, sample_ddpm),
        ("DPMSolverMultistep", SDE | {"solver_order": 2}, sample_sde_dpmpp_2m),
        *(("UniPCMultistep", SIGMAS | {"solver_order": n}, partial(sample_unipc, order=n)) for n in (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("steps", [2, 3, 5, 20, 100])
def test_samplers_agree_with_diffusers(schedulers, name, config, sampler, steps):
    """On the scheduler's own timesteps. Its PNDM and DDIM step evenly, so "leading"; its DPM-Solver rounds x to float32."""
    import torch

    diffusion, x, options, noise = stable_diffusion(100), np.linspace(-2, 2, 13)[:, None], {}, torch.Generator()
    if name.startswith("DD"):
        options = {"generator": torch.Generator().manual_seed(0)} | getattr(sampler, "keywords", {})
        noise.manual_seed(0)
        diffusion.v_posterior = float(config.get("variance_type") == "fixed_large")
    if "sde" in config.get("algorithm_type", ""):  # torch draws the same numbers in float32 and float64
        options = {"generator": torch.Generator().manual_seed(0)}
        noise.manual_seed(0)
    theirs, timesteps = run_scheduler(schedulers(f"{name}Scheduler", diffusion, **config), x, steps, **options)
    assert len(timesteps) == steps

    def randn_like(x):
        return torch.randn(x.shape, generator=noise).numpy()

    ours = sampler(eps_denoiser(diffusion), x, diffusion, timesteps, randn_like)
    tolerance = 1e-5 if name == "DPMSolverMultistep" else 1e-8
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("sampler", "golden", "atol"),
    [
        (sample_dpmpp_2m, [-12.0158553, -6.9952497, -0.8204079, 7.1537117, 11.6464528], 2e-6),
        (partial(sample_unipc, order=2), [-11.5014171, -6.7896059, -0.8387919, 7.0373391, 11.4002722], 2e-7),
        (partial(sample_unipc, order=3), [-11.7154612, -6.7399308, -0.8258180, 7.1646057, 11.4669607], 2e-7),
    ],
)
def test_samplers_give_what_diffusers_gave(sampler, golden, atol):
    """diffusers 0.35.2, torch 2.13: run_scheduler(<as in the test above>, np.linspace(-2, 2, 5)[:, None], steps=8)."""
    diffusion, timesteps = stable_diffusion(100), sampling_timesteps(100, 8, "trailing")
    ours = sampler(eps_denoiser(diffusion), np.linspace(-2, 2, 5), diffusion, timesteps)
    np.testing.assert_allclose(ours, golden, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
def test_ancestral_euler_steps_agree_with_diffusers(schedulers, steps):
    """Its samples are y = x / alpha."""
    import torch

    diffusion, x = stable_diffusion(100), np.linspace(-2, 2, 13)[:, None]
    scheduler = schedulers("EulerAncestralDiscreteScheduler", diffusion, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.int().tolist()
    s = ratio(diffusion.alphas_cumprod[timesteps])
    scheduler.sigmas = torch.tensor([*s, 0.0])
    y, generator = torch.from_numpy(x * math.sqrt(1 + s[0] ** 2)), torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(eps(y.numpy() / math.sqrt(1 + s[i] ** 2), timesteps[i]))
        scheduler.scale_model_input(y, t)
        y = scheduler.step(output, t, y, generator=generator).prev_sample
    noise = torch.Generator().manual_seed(0)
    ours = sample_euler_ancestral(
        eps_denoiser(diffusion), x, diffusion, timesteps, lambda x: torch.randn(x.shape, generator=noise).numpy()
    )
    np.testing.assert_allclose(ours, y.numpy(), rtol=1e-5, atol=1e-5)


def velocity(x, s):
    return 0.6 * np.sin(x + s) - 0.3 * x


def flow(T, shift=1.0):
    """The process, and the denoiser x_0 = x - s v of `velocity`."""
    process = Process(*flow_path(T, shift)[:2])
    return process, lambda x, t: x - process.sigmas[t] * velocity(x, process.sigmas[t])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_flow_agrees_with_diffusers(schedulers, shift, steps):
    """FlowMatchEulerDiscreteScheduler: its times, and its Euler steps along the velocity."""
    import diffusers
    import torch

    process, denoise = flow(1000, shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    np.testing.assert_allclose(scheduler.sigmas.numpy()[::-1], process.sigmas, rtol=1e-6)
    timesteps = sampling_timesteps(1000, steps, "trailing")
    scheduler.set_timesteps(sigmas=(np.array(timesteps) + 1) / 1000)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*process.sigmas[timesteps], 0], rtol=1e-6)
    x = np.linspace(-2, 2, 13)[:, None]
    y = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(torch.from_numpy(velocity(y.numpy(), process.sigmas[timesteps[i]])), t, y).prev_sample
    np.testing.assert_allclose(sample_ddim(denoise, x, process, timesteps), y.numpy(), rtol=1e-5, atol=1e-5)


def test_flow_agrees_with_flow_matching():
    """The path of facebookresearch/flow_matching (its time is 1 - s), and its midpoint rule up to the last step."""
    paths = pytest.importorskip("flow_matching.path.scheduler")
    solvers, torch = pytest.importorskip("flow_matching.solver"), pytest.importorskip("torch")
    process, denoise = flow(1000)
    (alphas, sigmas), slopes = (process.alphas, process.sigmas), flow_path(1000).slopes
    theirs = paths.CondOTScheduler()(torch.from_numpy(1 - sigmas))
    for ours, name in ((alphas, "alpha_t"), (sigmas, "sigma_t"), (-slopes[0], "d_alpha_t"), (-slopes[1], "d_sigma_t")):
        np.testing.assert_allclose(ours, np.broadcast_to(getattr(theirs, name).numpy(), 1000), rtol=1e-6, err_msg=name)

    timesteps, states = list(range(999, 99, -100)), []
    x = np.linspace(-2, 2, 13)[:, None]
    sample_midpoint(denoise, x, process, timesteps, None, lambda i, x, _: states.append(x))
    solver = solvers.ODESolver(lambda x, t: torch.from_numpy(-velocity(x.numpy(), 1 - float(t))))
    grid = torch.tensor(1 - sigmas[timesteps])
    y = solver.sample(torch.from_numpy(x), step_size=None, method="midpoint", time_grid=grid)
    np.testing.assert_allclose(states[-2], y.numpy(), rtol=1e-5, atol=1e-5)


def test_timesteps_are_what_diffusers_gave():
    """diffusers 0.35.2: as in the test below."""
    alpha_bar = stable_diffusion().alphas_cumprod
    assert sampling_timesteps(1000, 7, "karras", alpha_bar) == [999, 868, 687, 427, 146, 18, 0]
    assert sampling_timesteps(1000, 7, "logsnr", alpha_bar) == [999, 803, 538, 233, 52, 7, 0]


def test_timesteps_agree_with_diffusers(schedulers):
    diffusion = stable_diffusion()
    for steps in (2, 5, 10, 13, 50):
        for spacing in ("linspace", "leading", "trailing"):
            scheduler = schedulers("DDIMScheduler", diffusion, timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            assert sampling_timesteps(1000, steps, spacing) == scheduler.timesteps.tolist()
    for steps in (2, 5, 10, 13):  # with more, its timesteps repeat
        for spacing, option in (("karras", "use_karras_sigmas"), ("logsnr", "use_lu_lambdas")):
            scheduler = schedulers("DPMSolverMultistepScheduler", diffusion, **{option: True}, **DPMPP)
            scheduler.set_timesteps(steps)
            assert sampling_timesteps(1000, steps, spacing, diffusion.alphas_cumprod) == scheduler.timesteps.tolist()
