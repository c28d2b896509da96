"""Samplers: from x_T to x_0 through `denoise(x_t, t) -> x_0`.

    sampler(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, **options) -> x_0

x is a Tensor or a numpy array of any shape; a sampler only adds and scales it, with float64 coefficients. `timesteps` are
descending ints in [0, T), by default all T; x has the noise level of the first. `randn_like(x)` draws N(0, 1).
`callback(i, x, x_start)` is called after each step. A step calls the network once unless the docstring says otherwise.

With x_t = alpha x_0 + sigma noise and lambda = log(alpha / sigma), half the log-SNR, all samplers of the probability-flow
ODE take the same step, `ddim_step`; they differ in the x_0 that they pass to it.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mindspore import Tensor

from .denoiser import Array, Denoiser
from .files import in_batches
from .process import DATA, Level, Process
from .runtime import on_device

Sampler = Callable[..., Array]
Timesteps = Sequence[int] | None
RandnLike = Any  # x -> N(0, 1) noise of the same shape; None is enough for samplers that add no noise
Callback = Callable[[int, Array, Array], Any] | None
Quantize = Callable[[Array], Array] | None  # of an x_0

SPACINGS = ("linspace", "leading", "trailing", "karras", "logsnr")
SIGMA_MAX = 80  # sigma / alpha above which x_t has no information about data in [-1, 1] (Karras et al. 2022, table 1)


def sampling_timesteps(
    T: int, steps: int, spacing: str = "linspace", alphas_cumprod: np.ndarray | None = None, offset: int = 0
) -> list[int]:
    """`steps` descending timesteps in [0, T).

    Args:
        spacing: linspace: even from T - 1 to 0; a single step is T - 1. leading: the multiples of T // steps from 0, which
            reach T - 1 only if steps = T. trailing: from T - 1 in steps of T / steps (Lin et al. 2024, table 2, for these
            three). karras: even in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5). logsnr: even in log(sigma / alpha) (Lu
            et al. 2022, section 3.4). The last two limit sigma / alpha to 80 and take the nearest unused timesteps.
        alphas_cumprod: (T,), needed by karras and logsnr.
        offset: added to the timesteps of leading, up to T - 1.

    Raises ValueError if steps is not in [1, T], the spacing is unknown, or alphas_cumprod is missing."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: choose from 1 to {T}, the number of timesteps in training")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    i = np.arange(steps)
    even = {
        "leading": np.minimum(i[::-1] * (T // steps) + offset, T - 1),
        "linspace": np.round(np.linspace(T - 1, 0, steps)),
    }
    even["trailing"] = np.round(T - i * (T / steps)) - 1
    if spacing in even:
        return even[spacing].astype(int).tolist()
    if alphas_cumprod is None:
        raise ValueError(f"spacing {spacing} needs alphas_cumprod: pass diffusion.alphas_cumprod")
    alphas_cumprod = np.maximum(alphas_cumprod, 1 / (1 + SIGMA_MAX**2))
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    if spacing == "karras":
        wanted = np.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps) ** 7
    else:
        wanted = np.exp(np.linspace(np.log(sigmas[-1]), np.log(sigmas[0]), steps))
    nearest = np.round(np.interp(np.log(wanted), np.log(sigmas), np.arange(T))).astype(int)
    timesteps = [T - 1]
    for left, t in zip(range(steps - 2, -1, -1), nearest[1:], strict=True):  # distinct, with room for the later ones
        timesteps.append(min(max(int(t), left), timesteps[-1] - 1))
    return timesteps


def noise_levels(diffusion: Process, timesteps: Timesteps, last: Level = DATA) -> list[tuple[int, int, Level, Level]]:
    """(i, t, level of t, level of the next timestep) for each step; the last step leads to data, or to a level `last`."""
    timesteps = list(range(diffusion.num_timesteps - 1, -1, -1) if timesteps is None else timesteps)
    levels = [diffusion.level(t) for t in timesteps]
    return list(zip(range(len(timesteps)), timesteps, levels, [*levels[1:], last], strict=True))


def ddim_step(x: Array, x_start: Array, level: Level, following: Level, noise: float = 0.0) -> Array:
    """Song et al. 2020, eq. 12, from one level to the following, without its last term, the noise of standard deviation
    `noise`, which the caller adds.

    Without noise the step is exact if x_0 is constant along it."""
    keep = math.sqrt(max(following.sigma**2 - noise**2, 0)) / level.sigma
    return (following.alpha - keep * level.alpha) * x_start + keep * x


def quantized_step(x: Array, x_start: Array, level: Level, following: Level, noise: float,
        quantize: Quantize) -> tuple[Array, Array]:  # fmt: skip
    """The step of `ddim_step`, and its x_0; with `quantize`, to quantize(x_0), but with the noise that x_0 leaves in x, as
    in the code of latent diffusion."""
    new = ddim_step(x, x_start, level, following, noise)
    if quantize is None:
        return new, x_start
    nearest = quantize(x_start)
    return new + following.alpha * (nearest - x_start), nearest


def _noise_in(x: Array, x_start: Array, level: Level) -> Array:
    return (x - level.alpha * x_start) / level.sigma


def ddpm_step(x: Array, x_start: Array, level: Level, following: Level, v: float, randn_like: RandnLike) -> Array:
    """A draw from q(x_next | x, x_0) (Ho et al. 2020, eq. 7) with variance (1 - v) posterior variance + v beta, where beta
    is the variance that the forward process adds between the two levels."""
    if not 0 <= v <= 1:
        raise ValueError(f"v_posterior is {v}: it must be in [0, 1]")
    ratio, beta = level.alpha / following.alpha, level.variance_after(following)
    mean = following.alpha * beta / level.sigma**2 * x_start + ratio * following.sigma**2 / level.sigma**2 * x
    if following.sigma == 0:
        return mean
    return mean + math.sqrt(beta * ((1 - v) * following.sigma**2 / level.sigma**2 + v)) * randn_like(x)


def sample_ddpm(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, v_posterior: float | None = None,
        quantize: Quantize = None) -> Array:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, algorithm 2; with fewer timesteps Nichol & Dhariwal 2021, section 4).
    `v_posterior` is the v of `ddpm_step`; None is `diffusion.v_posterior`. Raises ValueError if it is not in [0, 1].
    `quantize` replaces each x_0, by the nearest entries of a codebook for example."""
    v_posterior = diffusion.v_posterior if v_posterior is None else v_posterior
    for i, t, level, following in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t) if quantize is None else quantize(denoise(x, t))
        x = ddpm_step(x, x_start, level, following, v_posterior, randn_like)
        if callback:
            callback(i, x, x_start)
    return x


def sample_ddim(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, eta: float = 0.0,
        quantize: Quantize = None) -> Array:  # fmt: skip
    """DDIM (Song et al. 2020, eq. 12): deterministic with eta = 0; eta = 1 adds the noise of DDPM.
    Raises ValueError if eta is not in [0, 1]. `quantize` is that of `quantized_step`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it must be in [0, 1], from DDIM to DDPM")
    for i, t, level, following in noise_levels(diffusion, timesteps, getattr(diffusion, "last_level", DATA)):
        x_start = denoise(x, t)
        noise = eta * following.sigma / level.sigma * math.sqrt(level.variance_after(following))
        x, x_start = quantized_step(x, x_start, level, following, noise, quantize)
        if noise > 0:
            x = x + noise * randn_like(x)
        if callback:
            callback(i, x, x_start)
    return x


def sample_euler_ancestral(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, eta: float = 1.0,
        quantize: Quantize = None) -> Array:  # fmt: skip
    """Ancestral sampling with Euler steps in sigma / alpha (Crowson, k-diffusion): to less noise than the next level has,
    then up to it with new noise. In other words DDIM: both names stand for the same step, only eta is 1 by default."""
    return sample_ddim(denoise, x, diffusion, timesteps, randn_like, callback, eta, quantize)


def nearest_timestep(diffusion: Process, timesteps: range, wanted: float, place: Callable) -> int:
    """The timestep whose place(level) is nearest to `wanted`."""
    return min(timesteps, key=lambda t: abs(place(diffusion.level(t)) - wanted))


def churn(x: Array, t: int, diffusion: Process, gamma: float, s_noise: float,
        randn_like: RandnLike) -> tuple[Array, int]:  # fmt: skip
    """x with noise added up to the timestep whose sigma / alpha is nearest to 1 + gamma times that of t, and this timestep
    (Karras et al. 2022, algorithm 2, lines 4 to 6, rounded as in their code)."""
    level = diffusion.level(t)
    noisier = range(t, diffusion.num_timesteps)
    raised = nearest_timestep(diffusion, noisier, (1 + gamma) * level.ratio, lambda level: level.ratio)
    if raised == t:
        return x, t
    more = diffusion.level(raised)
    return more.alpha / level.alpha * x + s_noise * math.sqrt(more.variance_after(level)) * randn_like(x), raised


def sample_heun(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = math.inf, s_noise: float = 1.0) -> Array:  # fmt: skip
    """Heun's method in sigma / alpha (Karras et al. 2022, algorithm 1), order 2. The last step calls the network once, each
    other step twice.

    With `s_churn`, which is spread over the steps, each step whose sigma / alpha is from s_tmin to s_tmax begins with new
    noise, `s_noise` times as large as would be right (algorithm 2; at the first timestep there is no level above).

    Above sigma / alpha = 80 a step is DDIM's: Heun's would divide the mean of two eps by nearly 0."""
    steps = noise_levels(diffusion, timesteps)
    gamma = min(s_churn / len(steps), math.sqrt(2) - 1)
    for i, t, level, following in steps:
        if gamma and s_tmin <= level.ratio <= s_tmax:
            x, t = churn(x, t, diffusion, gamma, s_noise, randn_like)
            level = diffusion.level(t)
        x_start = denoise(x, t)
        new = ddim_step(x, x_start, level, following)
        if following.sigma and level.log_snr > -math.log(SIGMA_MAX):
            eps = _noise_in(x, x_start, level)
            eps_next = _noise_in(new, denoise(new, steps[i + 1][1]), following)
            x_start = (x - level.sigma / 2 * (eps + eps_next)) / level.alpha
            new = ddim_step(x, x_start, level, following)
        x = new
        if callback:
            callback(i, x, x_start)
    return x


def sample_plms(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, quantize: Quantize = None) -> Array:  # fmt: skip
    """Pseudo linear multistep: Adams-Bashforth on eps up to order 4, then DDIM's step (Liu et al. 2022, eqs. 9 and 12). The
    weights assume steps even in sigma / alpha; with other steps the order is 2.

    As in the code of latent diffusion, the first step is an improved Euler step, which calls the network twice. Steps above
    sigma / alpha = 80 are DDIM's, as in `sample_heun`. `quantize` is that of `quantized_step`."""
    weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    steps, past = noise_levels(diffusion, timesteps), []  # past eps, newest first
    for i, t, level, following in steps:
        x_start = denoise(x, t)
        eps = _noise_in(x, x_start, level)
        if level.log_snr > -math.log(SIGMA_MAX):
            past = [eps, *past[:3]]
            if len(past) > 1:
                mean = sum(w * e for w, e in zip(weights[len(past)], past, strict=True))
            elif following.sigma:
                euler, _ = quantized_step(x, x_start, level, following, 0.0, quantize)
                mean = 0.5 * (eps + _noise_in(euler, denoise(euler, steps[i + 1][1]), following))
            else:
                mean = eps
            x_start = (x - level.sigma * mean) / level.alpha
        x, x_start = quantized_step(x, x_start, level, following, 0.0, quantize)
        if callback:
            callback(i, x, x_start)
    return x


def sample_midpoint(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None) -> Array:  # fmt: skip
    """The midpoint rule in the time of rectified flow, sigma / (alpha + sigma), order 2. The last step calls the network
    once, each other step twice.

    The point between is the timestep nearest to the middle of a step. The velocity is extrapolated from it to the middle, so
    the order holds wherever it lies; where the steps are neighbours, the rule is Heun's."""
    steps = noise_levels(diffusion, timesteps)
    for i, t, level, following in steps:
        x_start = denoise(x, t)
        if following.sigma:
            wanted, between = (level.time + following.time) / 2, range(steps[i + 1][1], t)
            middle = nearest_timestep(diffusion, between, wanted, lambda level: level.time)
            lower = diffusion.level(middle)
            velocity = _velocity(x, x_start, level)
            euler = ddim_step(x, x_start, level, lower)
            share = (level.time - following.time) / (2 * (level.time - lower.time))
            mean = (1 - share) * velocity + share * _velocity(euler, denoise(euler, middle), lower)
            x_start = (x - level.sigma * mean) / (level.alpha + level.sigma)
        x = ddim_step(x, x_start, level, following)
        if callback:
            callback(i, x, x_start)
    return x


def _velocity(x: Array, x_start: Array, level: Level) -> Array:
    """noise - x_0, the velocity of x / (alpha + sigma) in the time of rectified flow."""
    return (x - (level.alpha + level.sigma) * x_start) / level.sigma


def _extrapolated(x_start: Array, last: tuple[float, Array] | None, level: Level, following: Level) -> Array:
    """The x_0 of a step of DPM-Solver++(2M), from the x_0 at its start and (lambda, x_0) of the last step."""
    if last is None or not following.sigma:
        return x_start
    r = (level.log_snr - last[0]) / (following.log_snr - level.log_snr)
    return (1 + 0.5 / r) * x_start - 0.5 / r * last[1]


def sample_dpmpp_2m(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None) -> Array:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): x_0 is extrapolated from two calls, order 2."""
    last = None  # (lambda, x_0) of the previous step
    for i, t, level, following in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        x = ddim_step(x, _extrapolated(x_start, last, level, following), level, following)
        last = level.log_snr, x_start
        if callback:
            callback(i, x, x_start)
    return x


def sample_sde_dpmpp_2m(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None) -> Array:  # fmt: skip
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", the solvers of diffusion SDEs): DDPM's step, with the posterior
    variance, from an x_0 that is extrapolated from two calls."""
    last = None  # (lambda, x_0) of the previous step
    for i, t, level, following in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        x = ddpm_step(x, _extrapolated(x_start, last, level, following), level, following, 0.0, randn_like)
        last = level.log_snr, x_start
        if callback:
            callback(i, x, x_start)
    return x


def _unipc_guess(h: float, points: list[tuple[float, Array]]) -> Array:
    """The x_0 of a UniPC step of length h in lambda: the current x_0 plus rho . D / r (Zhao et al. 2023, theorem 3.1, with
    B(h) = e^h - 1 and x_0 in place of eps, appendix A.2). The points are (lambda - current lambda, x_0), current first."""
    (_, x_start), *others = points
    if not others:
        return x_start
    r = np.array([offset / h for offset, _ in others])
    phi, b = math.expm1(-h) / -h - 1, []
    for k in range(1, len(r) + 1):
        b.append(phi * math.factorial(k) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(k + 1)
    rho = [0.5] if len(r) == 1 else np.linalg.solve(np.power.outer(r, np.arange(len(r))).T, b)  # 1/2: section 3.3
    return x_start + sum(float(w / q) * (x_other - x_start) for w, q, (_, x_other) in zip(rho, r, others, strict=True))


def sample_unipc(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, order: int = 3) -> Array:  # fmt: skip
    """UniPC (Zhao et al. 2023, algorithms 5 to 8): a multistep predictor over `order` points, whose result is corrected with
    the x_0 of the next call."""
    past, before = [], (x, DATA)  # [(lambda, x_0)] newest first; (x, level) of the previous step
    steps = noise_levels(diffusion, timesteps)
    for i, t, level, following in steps:
        x_start, now = denoise(x, t), level.log_snr
        if past:  # correct x with the network's prediction at x
            points = [(place - past[0][0], x_0) for place, x_0 in [*past, (now, x_start)]]
            x = ddim_step(before[0], _unipc_guess(now - past[0][0], points), before[1], level)
        if now > -math.inf:
            past = [(now, x_start), *past[: order - 1]]
        before = x, level
        depth = min(order, len(past), len(steps) - i)  # low order in the last steps: they are nearly free of noise
        points = [(place - now, x_0) for place, x_0 in past[:depth]] or [(0, x_start)]
        guess = _unipc_guess(following.log_snr - now, points) if following.sigma else x_start
        x = ddim_step(x, guess, level, following)
        if callback:
            callback(i, x, x_start)
    return x


def sample_consistency(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None) -> Array:  # fmt: skip
    """For a network that consistency tuning has taught to predict an end of the path: each step takes its x_0 whole and
    adds new noise of the following level (Song et al. 2023, "Consistency models", algorithm 1)."""
    for i, t, _, following in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        x = following.alpha * x_start
        if following.sigma:
            x = x + following.sigma * randn_like(x)
        if callback:
            callback(i, x, x_start)
    return x


# What a sampler prefers is an attribute of the function; the defaults are spacing "logsnr" and stochastic False
vars(sample_ddpm).update(spacing="linspace", stochastic=True)
vars(sample_ddim).update(spacing="linspace")
vars(sample_euler_ancestral).update(stochastic=True)
vars(sample_sde_dpmpp_2m).update(stochastic=True)
vars(sample_consistency).update(spacing="trailing", stochastic=True)

SAMPLERS: dict[str, Sampler] = {  # SAMPLERS["mine"] = function adds a sampler
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "heun": sample_heun,
    "plms": sample_plms,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
    "sde_dpmpp_2m": sample_sde_dpmpp_2m,
    "euler_ancestral": sample_euler_ancestral,
    "midpoint": sample_midpoint,
    "euler": sample_ddim,  # the same step: Euler's in sigma / alpha, and for rectified flow along the velocity
    "consistency": sample_consistency,
}


def default_spacing(sampler: Sampler) -> str:
    """The spacing of timesteps that suits the sampler: its attribute `spacing`, else "logsnr"."""
    return getattr(sampler, "spacing", "logsnr")


def is_stochastic(sampler: Sampler) -> bool:
    """Whether the sampler adds noise with its default options: its attribute `stochastic`, else False."""
    return getattr(sampler, "stochastic", False)


def sampler_options(sampler: Sampler) -> set[str]:
    """The names of the sampler's own options: its parameters after the six that all samplers have."""
    parameters = list(inspect.signature(sampler).parameters.values())[6:]
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


class SeededNoise:
    """Standard normal noise for the samples `indices` of a seed: sample i gets the same numbers in any batch."""

    MIN_DRAW = 256  # numbers a generator draws at once: drawing two at a time, for a 2-D point, would dominate the run

    def __init__(self, seed: int, indices: Iterable[int]):
        self.generators = [np.random.default_rng((seed, i)) for i in indices]
        self.unused = np.empty((len(self.generators), 0), np.float32)

    def __call__(self, shape: Sequence[int]) -> np.ndarray:
        """The next noise of each sample, (len(indices), *shape) float32."""
        size = math.prod(shape)
        if size > self.unused.shape[1]:
            count = max(size - self.unused.shape[1], self.MIN_DRAW)
            drawn = np.stack([g.standard_normal(count, dtype=np.float32) for g in self.generators])
            self.unused = np.concatenate([self.unused, drawn], 1)
        noise, self.unused = self.unused[:, :size], self.unused[:, size:]
        return noise.reshape(-1, *shape)


def generate(sampler: Sampler, denoise: Denoiser, diffusion: Process, timesteps: Timesteps, shape: Sequence[int],
        num: int, seed: int = 0, batch_size: int = 64, callback: Callback = None, cond: Sequence[np.ndarray] = (),
        start: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """`num` samples of `shape` -> (num, *shape) float32. All batches have one size, so the network is compiled once.

    Args:
        cond: arrays (num, ...); the rows of a batch are passed to `denoise` after t.
        start: the first x (num, *shape) float32, at the noise level of timesteps[0], instead of N(0, 1)."""

    def batch(rows):
        noise, batch_cond = SeededNoise(seed, rows), [on_device(values[rows]) for values in cond]

        def denoise_batch(x, t, *last):  # last: the x_0 of self-conditioning
            return denoise(x, t, *batch_cond, *last)

        x = Tensor(noise(shape) if start is None else start[rows])
        return [sampler(denoise_batch, x, diffusion, timesteps, lambda x: Tensor(noise(x.shape[1:])), callback).asnumpy()]

    return in_batches(batch, np.arange(num), batch_size)[0]
