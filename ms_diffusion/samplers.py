"""Samplers: from x_T to x_0 through `denoise(x_t, t) -> x_0`.

x is a Tensor or a numpy array of any shape; a sampler only adds and scales, with float64 coefficients. `timesteps` are
descending ints in [0, T), by default all T; x belongs to the noise level of the first. `randn_like(x)` draws N(0, 1);
`callback(i, x, x_start)` sees each step. A step calls the network once where nothing else is said.

With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma), half the log-SNR: all that solve the
probability-flow ODE take the same step, `ddim_step`, and differ in the x_0 that they put into it.
"""

import math

import numpy as np

from mindspore import Tensor

SPACINGS = ("linspace", "leading", "trailing", "karras", "logsnr")
SIGMA_MAX = 80  # noise / signal beyond which x_t says nothing of data in [-1, 1] (sigma_max of Karras et al. 2022, table 1)


def sampling_timesteps(T: int, steps: int, spacing: str = "linspace", alphas_cumprod=None) -> list[int]:
    """`steps` descending timesteps in [0, T). The spacings (the first three: Lin et al. 2024, table 2):

    linspace: evenly from T - 1 to 0 (one step: T - 1 alone). leading: multiples of T // steps from 0, short of T - 1 unless
    steps = T. trailing: T - 1 and down by T / steps, to T / steps - 1. karras: sigma^(1/7) evenly, sigma the noise / signal
    ratio (Karras et al. 2022, eq. 5). logsnr: the logarithm of that ratio evenly (Lu et al. 2022, section 3.4).

    karras and logsnr go by `alphas_cumprod` (T,), take sigma above 80 for 80, and the nearest free timesteps.

    Raises:
        ValueError: steps is not in [1, T], an unknown spacing, or alphas_cumprod is missing.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: choose from 1 to {T}, the timesteps of training")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    i = np.arange(steps)
    if spacing == "leading":
        return [int(t) for t in i[::-1] * (T // steps)]
    if spacing == "trailing":
        return [int(t) for t in np.round(T - i * (T / steps)) - 1]
    if spacing == "linspace":
        return [int(t) for t in np.round(np.linspace(T - 1, 0, steps))]

    if alphas_cumprod is None:
        raise ValueError(f"spacing {spacing} needs alphas_cumprod, the diffusion's noise levels")
    alphas_cumprod = np.maximum(alphas_cumprod, 1 / (1 + SIGMA_MAX**2))
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    if spacing == "karras":
        wanted = np.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps) ** 7
    else:
        wanted = np.exp(np.linspace(np.log(sigmas[-1]), np.log(sigmas[0]), steps))
    nearest = np.round(np.interp(np.log(wanted), np.log(sigmas), np.arange(T))).astype(int)
    timesteps = [T - 1]
    for left, t in zip(range(steps - 2, -1, -1), nearest[1:], strict=True):  # distinct, with room for those to come
        timesteps.append(min(max(int(t), left), timesteps[-1] - 1))
    return timesteps


def noise_levels(diffusion, timesteps):
    """(i, t, alpha_bar_t, alpha_bar of the next, less noisy time); after the last comes the data, alpha_bar 1."""
    timesteps = list(range(diffusion.num_timesteps - 1, -1, -1) if timesteps is None else timesteps)
    alpha_bars = [float(diffusion.alphas_cumprod[t]) for t in timesteps]
    return list(zip(range(len(timesteps)), timesteps, alpha_bars, [*alpha_bars[1:], 1.0], strict=True))


def _lambda(alpha_bar: float) -> float:
    if not 0 < alpha_bar < 1:
        return math.inf if alpha_bar else -math.inf
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def ddim_step(x, x_start, alpha_bar, alpha_bar_next, sigma: float = 0.0):
    """alpha_next x_0 plus the eps that x_0 leaves in x, scaled to sigma_next less the noise of `sigma` that is still to come
    (Song et al. 2020, eq. 12, without its last term): without that noise, exact where x_0 stays the same."""
    keep = math.sqrt(max(1 - alpha_bar_next - sigma**2, 0) / (1 - alpha_bar))
    return (math.sqrt(alpha_bar_next) - keep * math.sqrt(alpha_bar)) * x_start + keep * x


def _noise_in(x, x_start, alpha_bar):
    return (x - math.sqrt(alpha_bar) * x_start) / math.sqrt(1 - alpha_bar)


def ddpm_step(x, x_start, alpha_bar, alpha_bar_next, v_posterior, randn_like):
    """A draw from q(x_next | x, x_0) (Ho et al. 2020, eq. 7), with v_posterior of beta in the variance."""
    alpha = alpha_bar / alpha_bar_next
    mean = (
        math.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar) * x_start
        + math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar) * x
    )
    if alpha_bar_next == 1:
        return mean
    v = v_posterior
    return mean + math.sqrt((1 - alpha) * ((1 - v) * (1 - alpha_bar_next) / (1 - alpha_bar) + v)) * randn_like(x)


def sample_ddpm(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on fewer steps by the posterior between them (Nichol & Dhariwal
    2021, section 4). The variance is the posterior's, or beta, or between: `diffusion.v_posterior`."""
    for i, t, alpha_bar, alpha_bar_next in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        x = ddpm_step(x, x_start, alpha_bar, alpha_bar_next, diffusion.v_posterior, randn_like)
        if callback:
            callback(i, x, x_start)
    return x


def sample_ddim(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, eta: float = 0.0):
    """DDIM (Song et al. 2020, eq. 12): deterministic at eta = 0, DDPM's noise at eta = 1.

    Raises:
        ValueError: eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it must lie in [0, 1], from DDIM to DDPM")
    for i, t, alpha_bar, alpha_bar_next in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        sigma = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
        x = ddim_step(x, x_start, alpha_bar, alpha_bar_next, sigma)
        if sigma > 0:
            x = x + sigma * randn_like(x)
        if callback:
            callback(i, x, x_start)
    return x


def sample_heun(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
    """Heun's method in sigma / alpha (Karras et al. 2022, algorithm 1), order 2. Two calls a step, one in the last.

    Above sigma / alpha = 80 its step is DDIM's: the average of two eps there is divided by next to nothing.
    """
    steps = noise_levels(diffusion, timesteps)
    for i, t, alpha_bar, alpha_bar_next in steps:
        x_start = denoise(x, t)
        new = ddim_step(x, x_start, alpha_bar, alpha_bar_next)
        if alpha_bar_next < 1 and _lambda(alpha_bar) > -math.log(SIGMA_MAX):
            eps = _noise_in(x, x_start, alpha_bar)
            eps_next = _noise_in(new, denoise(new, steps[i + 1][1]), alpha_bar_next)
            x_start = (x - math.sqrt(1 - alpha_bar) / 2 * (eps + eps_next)) / math.sqrt(alpha_bar)
            new = ddim_step(x, x_start, alpha_bar, alpha_bar_next)
        x = new
        if callback:
            callback(i, x, x_start)
    return x


def sample_plms(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
    """Pseudo linear multistep: Adams-Bashforth on eps up to order 4, then DDIM's step (Liu et al. 2022, eqs. 9 and 12). The
    weights are those of steps even in sigma / alpha; on others the order is 2.

    As latent diffusion's reference does, it begins with an improved Euler step, which calls the network twice; above
    sigma / alpha = 80 with DDIM's, for the reason in `sample_heun`.
    """
    weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    steps, past = noise_levels(diffusion, timesteps), []  # of eps, newest first
    for i, t, alpha_bar, alpha_bar_next in steps:
        x_start = denoise(x, t)
        eps = _noise_in(x, x_start, alpha_bar)
        if _lambda(alpha_bar) > -math.log(SIGMA_MAX):
            past = [eps, *past[:3]]
            if len(past) > 1:
                mean = sum(w * e for w, e in zip(weights[len(past)], past, strict=True))
            elif alpha_bar_next < 1:
                euler = ddim_step(x, x_start, alpha_bar, alpha_bar_next)
                mean = 0.5 * (eps + _noise_in(euler, denoise(euler, steps[i + 1][1]), alpha_bar_next))
            else:
                mean = eps
            x_start = (x - math.sqrt(1 - alpha_bar) * mean) / math.sqrt(alpha_bar)
        x = ddim_step(x, x_start, alpha_bar, alpha_bar_next)
        if callback:
            callback(i, x, x_start)
    return x


def sample_dpmpp_2m(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): x_0 extrapolated from two calls, order 2."""
    last = None  # (lambda, x_0) of the step before
    for i, t, alpha_bar, alpha_bar_next in noise_levels(diffusion, timesteps):
        x_start = denoise(x, t)
        now, guess = _lambda(alpha_bar), x_start
        if last is not None and alpha_bar_next < 1:
            r = (now - last[0]) / (_lambda(alpha_bar_next) - now)
            guess = (1 + 0.5 / r) * x_start - 0.5 / r * last[1]
        last = now, x_start
        x = ddim_step(x, guess, alpha_bar, alpha_bar_next)
        if callback:
            callback(i, x, x_start)
    return x


def _unipc_guess(h: float, points: list):
    """The x_0 of a UniPC step of length h in lambda, from points (lambda - lambda now, x_0), that of now first: x_0 now plus
    rho . D / r (Zhao et al. 2023, theorem 3.1, with B(h) = e^h - 1 and x_0 for eps, appendix A.2)."""
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


def sample_unipc(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, order: int = 3):
    """UniPC (Zhao et al. 2023, algorithms 5 to 8): a multistep predictor over `order` points, whose answer is then corrected
    by the next call's x_0."""
    past, before = [], None  # [(lambda, x_0)] newest first; x and alpha_bar of the last step
    steps = noise_levels(diffusion, timesteps)
    for i, t, alpha_bar, alpha_bar_next in steps:
        x_start, now = denoise(x, t), _lambda(alpha_bar)
        if past:  # correct x with what the network says of it
            points = [(place - past[0][0], x_0) for place, x_0 in [*past, (now, x_start)]]
            x = ddim_step(before[0], _unipc_guess(now - past[0][0], points), before[1], alpha_bar)
        if now > -math.inf:
            past = [(now, x_start), *past[: order - 1]]
        before = x, alpha_bar
        depth = min(order, len(past), len(steps) - i)  # the last steps of low order: the end is all but noiseless
        points = [(place - now, x_0) for place, x_0 in past[:depth]] or [(0, x_start)]
        guess = _unipc_guess(_lambda(alpha_bar_next) - now, points) if alpha_bar_next < 1 else x_start
        x = ddim_step(x, guess, alpha_bar, alpha_bar_next)
        if callback:
            callback(i, x, x_start)
    return x


SAMPLERS = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "heun": sample_heun,
    "plms": sample_plms,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
}


class SeededNoise:
    """Standard normal noise for the images `indices` of a seed: image i draws the same numbers in any batch."""

    AHEAD = 256  # numbers that each draws at least at a time: of points, two by two would take longer than all else

    def __init__(self, seed: int, indices):
        self.generators = [np.random.default_rng((seed, i)) for i in indices]
        self.left = np.empty((len(self.generators), 0), np.float32)

    def __call__(self, shape) -> np.ndarray:
        """One draw of `shape` for each image -> (len(indices), *shape) float32."""
        size = math.prod(shape)
        missing = size - self.left.shape[1]
        if missing > 0:
            more = max(missing, self.AHEAD)
            drawn = np.stack([g.standard_normal(more, dtype=np.float32) for g in self.generators])
            self.left = np.concatenate([self.left, drawn], 1)
        taken, self.left = self.left[:, :size], self.left[:, size:]
        return taken.reshape(-1, *shape)


def generate(
    sampler,
    denoise,
    diffusion,
    timesteps,
    shape,
    num,
    seed=0,
    batch_size=64,
    callback=None,
    cond=(),
    start=None,
) -> np.ndarray:
    """`num` samples of `shape` -> (num, *shape) float32, in equal batches, so that the network is compiled once.

    Args:
        cond: arrays (num, ...), whose rows are handed to `denoise` after t.
        start: the first x (num, *shape) float32, at the noise level of timesteps[0], where that is not pure noise.
    """
    batch_size = min(batch_size, num)
    batches = []
    for first in range(0, num, batch_size):
        rows = range(first, first + batch_size)
        noise = SeededNoise(seed, rows)
        chosen = np.minimum(rows, num - 1)  # the last batch is filled up
        x = noise(shape) if start is None else start[chosen]
        given = [Tensor(values[chosen]) for values in cond]

        def denoise_batch(x, t, *more, given=given):
            return denoise(x, t, *given, *more)

        x = sampler(
            denoise_batch,
            Tensor(x),
            diffusion,
            timesteps,
            lambda x, noise=noise: Tensor(noise(x.shape[1:])),
            callback,
        )
        batches.append(x.asnumpy())
    return np.concatenate(batches)[:num]
