"""The diffusion process as tables and formulas; the network is always an argument.

x (B, ...): float32 data in [-1, 1], or noised data, of any shape; t (B,): int32 timesteps in [0, T).
"""

import inspect
import json
import math
import warnings
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from .fields import AT_LEAST_1, FRACTION, NON_NEGATIVE, POSITIVE, AtMost, Bounds, OneOf, check_fields
from .files import check_memory, load_npy, read_bytes
from .losses import LOSSES
from .runtime import UserError, allow_numpy_2
from .schedules import ELSEWHERE, GIVEN, PATHS, SCHEDULES, Path, rescale_zero_terminal_snr

allow_numpy_2()

TABLES = 30  # float64 numbers of each timestep that a process keeps or computes
OBJECTIVES = ("eps", "x0", "v")
WEIGHTINGS = ("none", "min-snr", "p2", "velocity")
HUBER = 0.00054  # c of the pseudo-Huber distance, per square root of the dimension (Song & Dhariwal 2023, section 3.3)
ANCHOR = 0.1  # sigma / alpha up to which consistency tuning takes the x_0 of its teacher
BETA = Bounds(0, 1, low_open=True, high_open=True)
MOST_BETAS = 100_000  # of a file
MAPS: list[Any] = [SCHEDULES, PATHS, GIVEN]
KNOWN: ChainMap[str, Callable[..., Any]] = ChainMap(*MAPS)  # of these registries, also what is added to them later
Net = Callable[..., Tensor]
Cond = Tensor | tuple[Tensor, ...] | None  # what a network is conditioned on, (B, ...) each


def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The entries of `table` (T,) at t (B,), shaped (B, 1, ...) to multiply x (B, ...)."""
    return ops.gather_elements(table, 0, t).reshape((t.shape[0],) + (1,) * (x.ndim - 1))


def as_tuple(cond: Cond) -> tuple[Tensor, ...]:
    """No condition, one, or a tuple of them, as a tuple."""
    if cond is None:
        return ()
    return cond if isinstance(cond, tuple) else (cond,)


def predict(net: Net, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
    """The network's output, as float32; conditions are its arguments after t."""
    return ops.cast(net(x_t, t, *as_tuple(cond)), ms.float32)


class Level(NamedTuple):
    """A level of noise: x_t = alpha x_0 + sigma noise."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        if not (self.alpha and self.sigma):
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise in the units of the data."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def time(self) -> float:
        """The time from 0 (data) to 1 (noise) at which rectified flow has the same ratio."""
        return self.sigma / (self.alpha + self.sigma)

    def variance_after(self, less: "Level") -> float:
        """The variance of the noise that the forward process adds on its way here from a level with less noise."""
        return self.sigma**2 - (self.alpha / less.alpha * less.sigma) ** 2


DATA = Level(1.0, 0.0)


class Process:
    """Diffusion with Gaussian noise, x_t = alpha_t x_0 + sigma_t noise, in T levels of more and more noise.

    Tables are float64 numpy arrays on the host (`alphas`, `sigmas`, ... are attributes, (T,)) and float32 Tensors on the
    device. Both are computed once: do not assign attributes later.

    Args:
        alphas, sigmas: (T,), at least 0; sigma / alpha increases. The last alpha may be 0 if the objective is not "eps".
        objective: what the network predicts: "eps" the noise, "x0" the data, "v" = alpha' x_0 + sigma' noise.
        slopes: (alpha', sigma'), (T,) each, by default (-sigmas, alphas). If they are the derivatives of alpha and sigma by
            time, v is the velocity of x_t.
        loss: "l1", "l2" or "huber".
        v_posterior: the reverse variance is (1 - v) posterior variance + v beta, where beta is the variance of the noise
            that a step adds (Ho et al. 2020, section 3.2).
        clip_denoised: clip the predicted x_0 to [-1, 1], the range of images: in `p_mean_variance`, in the guess of
            self-conditioning, and in `make_denoiser` by default.
        weighting: weights of the timesteps in the loss. For eps, with SNR = alpha^2 / sigma^2, "min-snr" is min(SNR, gamma)
            / SNR (Hang et al. 2023, section 3.4) and "p2" is (1 + SNR)^-gamma (Choi et al. 2022, eq. 8, k = 1). "velocity"
            is the error of v, whatever is predicted (Li & He 2025, arXiv 2511.13720), with sigma at least gamma. The same
            squared error is SNR times smaller in x_0 than in eps, and (sigma / (alpha sigma' - alpha' sigma))^2 times
            smaller than in v. At zero SNR the first two weights are 0 in x_0 and v.
        gamma: the parameter of min-snr (None: 5, as in its paper), p2 (None: 1, as in its paper) or velocity (None: 0.05).
        l_simple_weight, original_elbo_weight: the loss is l_simple_weight times the weighted error plus original_elbo_weight
            times the error weighted by `lvlb_weights`, as in the code of latent diffusion (L_hybrid, Nichol & Dhariwal 2021,
            eq. 16).
        betas: (T,), the variances that the steps add, where they are known exactly.

    Three attributes are set where a network comes with its own rules for few timesteps (training/pipeline.py): `spacing`,
    by default that of ddpm and ddim; `steps_offset`, which is added to the timesteps of "leading"; and `last_level`, which
    ddim's last step leads to.

    Raises ValueError if an argument is outside its range or unknown. Warns (UserWarning) if alpha_T^2 > 0.01: x_T still
    contains data, so samples will be poor."""

    spacing, steps_offset, last_level = "linspace", 0, DATA

    def __init__(self, alphas: np.ndarray, sigmas: np.ndarray, objective: str = "v", loss: str = "l2",
            v_posterior: float = 0.0, clip_denoised: bool = True, weighting: str = "none", gamma: float | None = None,
            l_simple_weight: float = 1.0, original_elbo_weight: float = 0.0, *,
            slopes: tuple[np.ndarray, np.ndarray] | None = None, betas: np.ndarray | None = None):  # fmt: skip
        alphas, sigmas = np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64)
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or not (alphas[:-1] > 0).all() or not (sigmas > 0).all():
            raise ValueError("alphas and sigmas must be lists of one length, of numbers above 0")
        if objective == "eps" and alphas[-1] == 0:
            raise ValueError(
                "the last alpha is 0 (zero terminal SNR), where eps does not determine x_0: use objective v or x0"
            )
        choices = ("objective", objective, OBJECTIVES), ("loss", loss, LOSSES), ("weighting", weighting, WEIGHTINGS)
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        if not 0 <= v_posterior <= 1:
            raise ValueError(f"v_posterior is {v_posterior}: it must be in [0, 1]")
        if gamma is not None and not (gamma > 0 and weighting != "none"):
            raise ValueError(f"gamma is {gamma}: it must be above 0, and needs weighting min-snr, p2 or velocity")
        if not (l_simple_weight >= 0 and original_elbo_weight >= 0 and l_simple_weight + original_elbo_weight > 0):
            raise ValueError("l_simple_weight and original_elbo_weight must be at least 0, and not both 0")
        self.objective, self.loss, self.v_posterior, self.clip_denoised = objective, LOSSES[loss], v_posterior, clip_denoised

        # Forward process q(x_t | x_0)
        self.alphas, self.sigmas, self.num_timesteps = alphas, sigmas, len(alphas)
        self.slopes = slopes or (-sigmas, alphas)
        self.alphas_cumprod = alphas**2 / (alphas**2 + sigmas**2)  # the alpha_bar of the same ratio
        if self.alphas_cumprod[-1] > 0.01:
            warnings.warn(
                f"alpha_bar_T is {self.alphas_cumprod[-1]:.3g}, so x_T still holds data: use larger betas or more timesteps",
                stacklevel=3,
            )

        # Posterior q(x_{t-1} | x_t, x_0), eqs. 6 and 7
        before, noise_before = np.append(1.0, alphas[:-1]), np.append(0.0, sigmas[:-1])
        ratios = alphas / before
        self.added = sigmas**2 - (ratios * noise_before) ** 2 if betas is None else betas
        self.posterior_mean_coef1 = self.added * before / sigmas**2
        self.posterior_mean_coef2 = noise_before**2 * ratios / sigmas**2
        self.q_variance = self.added * noise_before**2 / sigmas**2
        self.posterior_variance = (1 - v_posterior) * self.q_variance + v_posterior * self.added

        # Weights of the prediction's squared error: in the variational bound (eq. 12), where the variance at t = 0 is 0 and
        # the weight of t = 1 is used, and in the loss
        snr, turn = (alphas / sigmas) ** 2, alphas * self.slopes[1] - sigmas * self.slopes[0]
        with np.errstate(divide="ignore"):
            in_x0 = {"x0": np.ones(self.num_timesteps), "eps": 1 / snr, "v": (sigmas / turn) ** 2}[objective]
            self.lvlb_weights = self.posterior_mean_coef1**2 / (2 * self.posterior_variance) * in_x0
        if v_posterior == 0 and self.num_timesteps > 1:
            self.lvlb_weights[0] = self.lvlb_weights[1]
        if original_elbo_weight > 0 and not np.isfinite(self.lvlb_weights).all():
            raise ValueError("original_elbo_weight needs a variance above 0 at each timestep: use more timesteps")
        of_x0 = {
            "min-snr": lambda: np.minimum(snr, gamma or 5),
            "p2": lambda: (1 + snr) ** -(gamma or 1) * snr,
            "velocity": lambda: (turn / np.maximum(sigmas, gamma or 0.05)) ** 2,
        }
        weights = np.ones(len(alphas)) if weighting == "none" else of_x0[weighting]() * in_x0
        self.simple_weights = l_simple_weight * weights
        self.elbo_weights = original_elbo_weight * self.lvlb_weights if original_elbo_weight else np.zeros(len(alphas))

        def device(values):
            return Tensor(values.astype(np.float32))

        self._alphas, self._sigmas = device(alphas), device(sigmas)
        self._alphas_before, self._sigmas_before = device(before), device(noise_before)  # at t - 1
        is_end = noise_before <= ANCHOR * before
        self._is_end = device(is_end)  # at t - 1
        self._log_variances = device(np.log(sigmas**2))
        with np.errstate(divide="ignore"):  # infinite at zero SNR, where the objective is not eps
            self._recip_alphas, self._recip_snr_roots = device(1 / alphas), device(sigmas / alphas)
        pace = 1 / np.maximum(np.arange(len(alphas)) + 1, is_end.sum())
        self._path_weights = device(pace / pace.mean())
        # (-alpha', sigma'); where they are the tables (sigma, alpha), a graph gathers them once
        self._slopes = (self._sigmas, self._alphas) if slopes is None else (device(-slopes[0]), device(slopes[1]))
        self._start_of_v = device(self.slopes[1] / turn), device(sigmas / turn)
        self._posterior_mean_coef1 = device(self.posterior_mean_coef1)
        self._posterior_mean_coef2 = device(self.posterior_mean_coef2)
        self._posterior_variance = device(self.posterior_variance)
        self._posterior_log_variance_clipped = device(np.log(np.maximum(self.posterior_variance, 1e-20)))
        # None if all weights are 1, or all 0: each operator in a graph takes time
        self._simple_weights = None if (self.simple_weights == 1).all() else device(self.simple_weights)
        self._elbo_weights = device(self.elbo_weights) if original_elbo_weight else None

    def level(self, t: int) -> Level:
        """The level of noise at timestep t."""
        return Level(float(self.alphas[t]), float(self.sigmas[t]))

    # The forward process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, ...), variance and log-variance (B, 1, ...) of q(x_t | x_0), eq. 4."""
        mean = at(self._alphas, t, x_start) * x_start
        return mean, ops.square(at(self._sigmas, t, x_start)), at(self._log_variances, t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise, noise ~ N(0, 1), eq. 4."""
        return at(self._alphas, t, x_start) * x_start + at(self._sigmas, t, x_start) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), eqs. 6 and 7; the log is at least log(1e-20)."""
        mean = at(self._posterior_mean_coef1, t, x_t) * x_start + at(self._posterior_mean_coef2, t, x_t) * x_t
        return mean, at(self._posterior_variance, t, x_t), at(self._posterior_log_variance_clipped, t, x_t)

    # From one prediction to another

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 from which `noise` leads to x_t: eq. 4 solved for x_0."""
        return at(self._recip_alphas, t, x_t) * x_t - at(self._recip_snr_roots, t, x_t) * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise that leads from x_start to x_t: eq. 4 solved for the noise."""
        return (x_t - at(self._alphas, t, x_t) * x_start) / at(self._sigmas, t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = alpha' x_0 + sigma' noise; by default alpha noise - sigma x_0 (Salimans & Ho 2022, section 4)."""
        return at(self._slopes[1], t, x_start) * noise - at(self._slopes[0], t, x_start) * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma); by default alpha x_t - sigma v (Salimans & Ho 2022,
        appendix D)."""
        return at(self._start_of_v[0], t, x_t) * x_t - at(self._start_of_v[1], t, x_t) * v

    def predict_start(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's output, for any objective."""
        if self.objective == "eps":
            return self.predict_start_from_noise(x_t, t, model_output)
        if self.objective == "v":
            return self.predict_start_from_v(x_t, t, model_output)
        return model_output

    # The reverse process and its loss

    def p_mean_variance(self, net: Net, x_t: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, ...]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), eq. 11, and the predicted x_0 that they are computed from."""
        x_start = self.predict_start(predict(net, x_t, t, cond), x_t, t)
        x_start = ops.clamp(x_start, -1.0, 1.0) if self.clip_denoised else x_start
        return self.q_posterior(x_start, x_t, t) + (x_start,)

    def losses(self, net: Net, x_start: Tensor, t: Tensor, noise: Tensor, cond: Cond = None, logvar: Tensor | None = None,
            self_cond_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        """The weighted error (B,) of the network's prediction at x_t: eq. 14 with the weights of the constructor.

        Args:
            cond: conditions (B, ...), passed to the network after t.
            logvar: log-variances (T,) of the errors, learned with the network: `weighting` then applies to error /
                exp(logvar) + logvar (Kendall & Gal 2017, eq. 8; `learn_logvar` in the code of latent diffusion).
            self_cond_mask: (B,): 1 passes the network a first guess of x_0 for self-conditioning (Chen et al. 2022,
                algorithm 1), 0 passes zeros."""
        x_t = self.q_sample(x_start, t, noise)
        target = noise if self.objective == "eps" else x_start
        if self.objective == "v":
            target = self.predict_v(x_start, t, noise)
        cond = as_tuple(cond)
        if self_cond_mask is not None:
            guess = self.predict_start(predict(net, x_t, t, cond + (ops.zeros_like(x_t),)), x_t, t)
            guess = ops.stop_gradient(ops.clamp(guess, -1.0, 1.0) if self.clip_denoised else guess)
            cond = cond + (guess * self_cond_mask.reshape((-1,) + (1,) * (x_t.ndim - 1)),)
        error = ops.mean(self.loss(predict(net, x_t, t, cond), target).reshape(x_t.shape[0], -1), 1)
        simple = error
        if logvar is not None:
            logvar_t = ops.gather_elements(logvar, 0, t)
            simple = error * ops.exp(-logvar_t) + logvar_t
        if self._simple_weights is not None:
            simple = ops.gather_elements(self._simple_weights, 0, t) * simple
        return simple if self._elbo_weights is None else simple + ops.gather_elements(self._elbo_weights, 0, t) * error

    def consistency_losses(self, net: Net, x_start: Tensor, t: Tensor, r: Tensor, noise: Tensor, cond: Cond = None,
            teacher: Callable[..., Tensor] | None = None) -> Tensor:  # fmt: skip
        """The distance (B,) of the network's x_0 at x_t from that at x_r, which gets no gradient and lies on the same path,
        nearer the data: consistency by finite differences (Geng et al. 2024, arXiv 2406.14548, eq. 9). Where x_r is so near
        the data that sigma / alpha is at most ANCHOR, the teacher's x_0 takes its place; a network without this anchor
        could predict the same everywhere. The distance is the pseudo-Huber one (Song & Dhariwal 2023, eq. 7) per square
        root of the dimension. Its weight is in proportion to 1 / (t + 1), since a path takes that many of these steps
        around the time t, but not more than where the teacher's x_0 begins; the mean weight is 1.

        Args:
            r: (B,) int32, less than t; at -1 x_r is x_0 itself.
            teacher: teacher(x_t, t, cond) -> the x_0 that the path leads to, by default x_start. With that of a trained
                network this is consistency distillation (Song et al. 2023, algorithm 2). The step to x_r is DDIM's with the
                mean of the teacher's x_0 at both its ends (Heun): with that of x_t alone, paths end too near the mean."""
        x_t, cond, s = self.q_sample(x_start, t, noise), as_tuple(cond), ops.relu(r)
        keep = at(self._sigmas_before, r + 1, x_t) / at(self._sigmas, t, x_t)
        gain, is_end = at(self._alphas_before, r + 1, x_t) - keep * at(self._alphas, t, x_t), at(self._is_end, r + 1, x_t)
        goal = x_start if teacher is None else ops.stop_gradient(teacher(x_t, t, cond))
        x_r = gain * goal + keep * x_t
        if teacher is not None:
            x_r = x_r + 0.5 * gain * (ops.stop_gradient(teacher(x_r, s, cond)) - goal)
        from_r = ops.stop_gradient(self.predict_start(predict(net, x_r, s, cond), x_r, s))
        nearer = from_r + is_end * (goal - from_r)
        nearer = ops.clamp(nearer, -1.0, 1.0) if self.clip_denoised else nearer
        apart = self.predict_start(predict(net, x_t, t, cond), x_t, t) - nearer
        square = ops.mean(ops.square(apart).reshape(x_t.shape[0], -1), 1)
        return ops.gather_elements(self._path_weights, 0, t) * (ops.sqrt(square + HUBER**2) - HUBER)

    def p_losses(self, net: Net, x_start: Tensor, t: Tensor, noise: Tensor, *options: Any) -> Tensor:
        """The mean () of `losses`; `options` are its other arguments."""
        return ops.mean(self.losses(net, x_start, t, noise, *options))


def read_betas(path: str) -> tuple[float, ...]:
    """The betas in a file: a list in .json, an array in .npy, or numbers in text. Raises UserError if there are none."""
    try:
        if path.endswith(".npy"):
            values = load_npy(path)
        else:
            text = read_bytes(path).decode()
            values = json.loads(text) if path.endswith(".json") else text.replace(",", " ").split()
        betas = tuple(map(float, np.asarray(values, np.float64).tolist()))
    except OSError as e:
        raise UserError(f"--diffusion.betas-file {path!r:.200} cannot be read: {e.strerror}") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"--diffusion.betas-file {path!r:.200} must hold a list of numbers between 0 and 1") from e
    if not betas or not all(0 < beta <= 1 for beta in betas):
        raise UserError(f"--diffusion.betas-file {path!r:.200} must hold numbers between 0 and 1, one for each timestep")
    return betas


class GaussianDiffusion(Process):
    """Denoising diffusion (Ho et al. 2020), in the notation of the latent-diffusion reference: alpha = sqrt(alpha_bar) and
    sigma = sqrt(1 - alpha_bar), where alpha_bar is the product of 1 - beta so far.

    Args:
        betas: (T,), in (0, 1); the last may be 1 if the objective is not "eps".

    The other arguments are those of `Process`. Raises ValueError if betas are out of range, and see `Process`."""

    def __init__(self, betas: np.ndarray, objective: str = "eps", loss: str = "huber", v_posterior: float = 0.0,
            clip_denoised: bool = True, weighting: str = "none", gamma: float | None = None, l_simple_weight: float = 1.0,
            original_elbo_weight: float = 0.0):  # fmt: skip
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1))[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError("betas must be a list of numbers between 0 and 1")
        if objective == "eps" and betas[-1] == 1:
            raise ValueError("betas end in 1 (zero terminal SNR), where eps does not determine x_0: use objective v or x0")
        self.betas, alpha_bar = betas, np.cumprod(1 - betas)
        options = v_posterior, clip_denoised, weighting, gamma, l_simple_weight, original_elbo_weight
        super().__init__(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), objective, loss, *options, betas=betas)
        self.alphas_cumprod, self.alphas_cumprod_prev = alpha_bar, np.append(1.0, alpha_bar[:-1])


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process, and what the network learns."""

    num_timesteps: Annotated[int, AT_LEAST_1] = 1000
    """T, the number of diffusion steps."""
    schedule: Annotated[str, OneOf(KNOWN, elsewhere=ELSEWHERE)] = "linear"
    """Noise schedule: linear, unscaled_linear, cosine, quadratic, sigmoid or sqrt_linear (which latent diffusion calls
    linear); betas, those of betas_file; flow, the straight line of rectified flow; edm, the noise levels and the
    preconditioning of EDM. The last two need objective v or x0."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = "eps"
    """What the network predicts: eps, x0 or v."""
    loss: Annotated[str, OneOf(LOSSES)] = "huber"
    """Error of the prediction: l1, l2 or huber."""
    v_posterior: Annotated[float, FRACTION] = 0.0
    """Share of beta in the reverse variance; 0 is the posterior's variance."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that x_T is pure noise (Lin et al. 2024); needs objective x0 or v."""
    weighting: Annotated[str, OneOf(WEIGHTINGS)] = "none"
    """Weights of the timesteps in the loss: none, min-snr, p2 or velocity (the error of the velocity v)."""
    gamma: Annotated[float, POSITIVE] | None = None
    """gamma of min-snr (default 5) or p2 (default 1), or the least sigma of velocity (default 0.05)."""
    l_simple_weight: Annotated[float, NON_NEGATIVE] = 1.0
    """Weight in the loss of the error that `weighting` weights."""
    original_elbo_weight: Annotated[float, NON_NEGATIVE] = 0.0
    """Weight in the loss of the error with the weights of the variational bound."""
    beta_start: Annotated[float, BETA] | None = None
    """First beta of a schedule that has a range of betas; by default the schedule's own."""
    beta_end: Annotated[float, BETA] | None = None
    """Last beta of a schedule that has a range of betas; by default the schedule's own."""

    shift: Annotated[float, POSITIVE] | None = None
    """Of the times of flow, towards the noise: 3 for many pixels (Esser et al. 2024); by default 1, none."""
    sigma_data: Annotated[float, POSITIVE] | None = None
    """Standard deviation of the data, for edm; by default 0.5."""
    cosine_s: Annotated[float, POSITIVE] | None = None
    """The offset s of cosine, which keeps the first betas from being too small; by default 0.008."""
    max_beta: Annotated[float, BETA] | None = None
    """Largest beta, to which larger ones are clipped; by default 0.999."""
    betas_file: str | None = None
    """File of betas, .json, .txt or .npy, one for each timestep. It sets schedule, num_timesteps and betas."""
    betas: Annotated[tuple[Annotated[float, Bounds(0, 1, low_open=True)], ...], AtMost(MOST_BETAS)] = ()
    """The betas of a file, which the run keeps."""

    def __post_init__(self) -> None:
        if isinstance(self.betas_file, str):  # what the file says takes its place, so that nothing needs it later
            betas = read_betas(self.betas_file)
            given = {"betas": betas, "num_timesteps": len(betas), "schedule": "betas", "betas_file": None}
            for name, value in given.items():
                object.__setattr__(self, name, value)

    def build(self, clip_denoised: bool = True) -> Process:
        """The process. Pass clip_denoised=False for data outside [-1, 1], such as latents.
        Raises UserError if a field is outside its range, and ValueError if fields do not fit together."""
        check_fields(self)
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr needs num_timesteps of at least 2")
        check_memory(TABLES * 8 * self.num_timesteps, f"a process of {self.num_timesteps} timesteps")
        names = "beta_start", "beta_end", "shift", "sigma_data", "cosine_s", "max_beta", "betas"
        schedule = KNOWN[self.schedule]
        given = {name: value for name in names if (value := getattr(self, name)) not in (None, ())}
        if "cosine_s" in given and self.schedule == "cosine":
            given["s"] = given.pop("cosine_s")
        if wrong := [name for name in given if name not in inspect.signature(schedule).parameters]:
            raise ValueError(f"the schedule {self.schedule} has no {' and '.join(wrong)}: leave it out")
        made = schedule(self.num_timesteps, **given)
        options = self.objective, self.loss, self.v_posterior, clip_denoised, self.weighting, self.gamma
        weights = self.l_simple_weight, self.original_elbo_weight
        if isinstance(made, Path):
            if self.zero_terminal_snr:
                raise ValueError(f"zero_terminal_snr is for schedules of betas, not for {self.schedule}: leave it out")
            return Process(made.alphas, made.sigmas, *options, *weights, slopes=made.slopes)
        betas = rescale_zero_terminal_snr(made) if self.zero_terminal_snr else made
        return GaussianDiffusion(betas, *options, *weights)
