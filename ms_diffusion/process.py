"""The diffusion process as tables and formulas; the network is always an argument.

x (B, ...): float32 data in [-1, 1] or noised data, of any shape; t (B,): int32 timesteps in [0, T).
"""

import warnings
from dataclasses import dataclass

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from .losses import LOSSES
from .schedules import SCHEDULES, rescale_zero_terminal_snr

OBJECTIVES = ("eps", "x0", "v")
WEIGHTINGS = ("none", "min-snr", "p2")


def at(table, t, x):
    """The table's values at t (B,), shaped to multiply x (B, ...)."""
    return ops.gather(table, t, 0).reshape((t.shape[0],) + (1,) * (x.ndim - 1))


def as_tuple(cond):
    """None, a condition or a tuple of them -> a tuple."""
    if cond is None:
        return ()
    return cond if isinstance(cond, tuple) else (cond,)


class GaussianDiffusion:
    """Denoising diffusion with Gaussian noise (Ho et al. 2020), in the notation of the latent-diffusion reference.

    Tables are float64 numpy on the host (`betas`, `alphas_cumprod`, ... are attributes, (T,)) and float32 on the device.

    Args:
        betas: (T,), in (0, 1); the last may be 1 where the objective is not "eps".
        objective: what the network predicts: "eps" the noise, "x0" the data, "v" = sqrt(alpha_bar) eps - sqrt(1 -
            alpha_bar) x_0 (Salimans & Ho 2022).
        loss: "l1", "l2" or "huber".
        v_posterior: the reverse variance is (1 - v) posterior variance + v beta (Ho et al. 2020, section 3.2).
        clip_denoised: clip the predicted x_0 to [-1, 1] in `p_mean_variance`.
        weighting: of the timesteps in the loss, stated here for eps, with SNR = alpha_bar / (1 - alpha_bar); the same error
            squared is SNR times smaller in x_0, alpha_bar times smaller in v. "min-snr": min(SNR, gamma) / SNR (Hang et al.
            2023, section 3.4); "p2": (1 + SNR)^-gamma (Choi et al. 2022, eq. 8, k = 1). At zero SNR both are 0 in x_0 and v.
        gamma: of min-snr (5 in its paper) or p2 (1 in its paper); None is the paper's.
        l_simple_weight, original_elbo_weight: the loss is the former times the weighted error plus the latter times the
            error weighted by `lvlb_weights`, as in latent diffusion's reference (L_hybrid, Nichol & Dhariwal 2021, eq. 16).

    Raises:
        ValueError: betas outside (0, 1), an unknown objective, loss or weighting.
    Warns:
        UserWarning: alpha_bar_T > 0.01: x_T is no noise yet, samples will be poor.
    """

    def __init__(
        self,
        betas,
        objective="eps",
        loss="huber",
        v_posterior=0.0,
        clip_denoised=True,
        weighting="none",
        gamma=None,
        l_simple_weight=1.0,
        original_elbo_weight=0.0,
    ):
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1))[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError("betas must be a list of numbers between 0 and 1")
        if objective == "eps" and betas[-1] == 1:
            raise ValueError("betas end in 1 (zero terminal SNR), where eps says nothing of x_0: choose objective v or x0")
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
        if not 0 <= v_posterior <= 1:
            raise ValueError(f"v_posterior is {v_posterior}: it must lie in [0, 1]")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
        if gamma is not None and not (gamma > 0 and weighting != "none"):
            raise ValueError(f"gamma is {gamma}: it must be above 0, and belongs to a weighting")
        if not (l_simple_weight >= 0 and original_elbo_weight >= 0 and l_simple_weight + original_elbo_weight > 0):
            raise ValueError("l_simple_weight and original_elbo_weight must be at least 0, and not both 0")
        self.objective, self.loss, self.clip_denoised = objective, LOSSES[loss], clip_denoised
        self.v_posterior = v_posterior

        # Forward process q(x_t | x_0)
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        if self.alphas_cumprod[-1] > 0.01:
            warnings.warn(
                f"alpha_bar_T is {self.alphas_cumprod[-1]:.3g}, so x_T is not noise: use larger betas or more steps",
                stacklevel=2,
            )

        # Posterior q(x_{t-1} | x_t, x_0), eqs. 6 and 7
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - self.alphas_cumprod)
        q_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = (1 - v_posterior) * q_variance + v_posterior * betas

        # What a squared error of the prediction weighs: in the bound (eq. 12), where t = 0 has no variance and takes its
        # neighbour's weight, and in the loss
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):
            in_x0 = {"x0": np.ones(self.num_timesteps), "eps": 1 / snr, "v": 1 - self.alphas_cumprod}[objective]
            self.lvlb_weights = self.posterior_mean_coef1**2 / (2 * self.posterior_variance) * in_x0
        if v_posterior == 0 and self.num_timesteps > 1:
            self.lvlb_weights[0] = self.lvlb_weights[1]
        if original_elbo_weight > 0 and not np.isfinite(self.lvlb_weights).all():
            raise ValueError("a single step has no variance to weigh by: use more timesteps, or no original_elbo_weight")
        if weighting == "min-snr":
            weights = np.minimum(snr, gamma or 5) * in_x0
        elif weighting == "p2":
            weights = (1 + snr) ** -(gamma or 1) * snr * in_x0
        else:
            weights = np.ones(self.num_timesteps)
        self.simple_weights = l_simple_weight * weights
        self.elbo_weights = (
            original_elbo_weight * self.lvlb_weights if original_elbo_weight else np.zeros(len(betas))
        )

        def device(values):
            return Tensor(values.astype(np.float32))

        self._sqrt_alphas_cumprod = device(np.sqrt(self.alphas_cumprod))
        self._sqrt_one_minus_alphas_cumprod = device(np.sqrt(1 - self.alphas_cumprod))
        self._log_one_minus_alphas_cumprod = device(np.log(1 - self.alphas_cumprod))
        with np.errstate(divide="ignore"):  # infinite at zero SNR, where the objective is not eps
            self._sqrt_recip_alphas_cumprod = device(np.sqrt(1 / self.alphas_cumprod))
            self._sqrt_recipm1_alphas_cumprod = device(np.sqrt(1 / self.alphas_cumprod - 1))
        self._posterior_mean_coef1 = device(self.posterior_mean_coef1)
        self._posterior_mean_coef2 = device(self.posterior_mean_coef2)
        self._posterior_variance = device(self.posterior_variance)
        self._posterior_log_variance_clipped = device(np.log(np.maximum(self.posterior_variance, 1e-20)))
        # None where they are all 1 and all 0, for each operator in a graph takes time
        self._simple_weights = None if (self.simple_weights == 1).all() else device(self.simple_weights)
        self._elbo_weights = device(self.elbo_weights) if original_elbo_weight else None

    # The forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_0), eq. 4; the latter two (B, 1, ...)."""
        mean = at(self._sqrt_alphas_cumprod, t, x_start) * x_start
        variance = ops.square(at(self._sqrt_one_minus_alphas_cumprod, t, x_start))
        return mean, variance, at(self._log_one_minus_alphas_cumprod, t, x_start)

    def q_sample(self, x_start, t, noise):
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, noise ~ N(0, 1), eq. 4."""
        signal = at(self._sqrt_alphas_cumprod, t, x_start) * x_start
        return signal + at(self._sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start, x_t, t):
        """Mean, variance and log-variance (clipped at 1e-20) of q(x_{t-1} | x_t, x_0), eqs. 6 and 7."""
        mean = at(self._posterior_mean_coef1, t, x_t) * x_start + at(self._posterior_mean_coef2, t, x_t) * x_t
        return mean, at(self._posterior_variance, t, x_t), at(self._posterior_log_variance_clipped, t, x_t)

    # From one prediction to another

    def predict_start_from_noise(self, x_t, t, noise):
        """x_0 that x_t comes from with this noise: eq. 4 solved for x_0."""
        return at(self._sqrt_recip_alphas_cumprod, t, x_t) * x_t - at(self._sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_noise_from_start(self, x_t, t, x_start):
        """The noise that turns x_start into x_t: eq. 4 solved for the noise."""
        signal = at(self._sqrt_alphas_cumprod, t, x_t) * x_start
        return (x_t - signal) / at(self._sqrt_one_minus_alphas_cumprod, t, x_t)

    def predict_v(self, x_start, t, noise):
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)."""
        return (
            at(self._sqrt_alphas_cumprod, t, x_start) * noise - at(self._sqrt_one_minus_alphas_cumprod, t, x_start) * x_start
        )

    def predict_start_from_v(self, x_t, t, v):
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v (Salimans & Ho 2022, appendix D)."""
        return at(self._sqrt_alphas_cumprod, t, x_t) * x_t - at(self._sqrt_one_minus_alphas_cumprod, t, x_t) * v

    def predict_start(self, model_output, x_t, t):
        """x_0 from the network's output, whatever the objective."""
        if self.objective == "eps":
            return self.predict_start_from_noise(x_t, t, model_output)
        if self.objective == "v":
            return self.predict_start_from_v(x_t, t, model_output)
        return model_output

    # The reverse process and its loss

    def p_mean_variance(self, net, x_t, t, cond=None):
        """Mean, variance, log-variance of p(x_{t-1} | x_t), eq. 11, and the x_0 they come from."""
        x_start = self.predict_start(predict(net, x_t, t, cond), x_t, t)
        if self.clip_denoised:
            x_start = ops.clamp(x_start, -1.0, 1.0)
        mean, variance, log_variance = self.q_posterior(x_start, x_t, t)
        return mean, variance, log_variance, x_start

    def losses(self, net, x_start, t, noise, cond=None, logvar=None, self_cond_mask=None):
        """Weighted error (B,) of the network's prediction at x_t: eq. 14 and what `weighting` and its like make of it.

        Args:
            cond: conditions (B, ...), a Tensor or a tuple, handed to the network after t.
            logvar: log-variance (T,) of the errors, learned with the network: error / exp(logvar) + logvar is then what
                `weighting` weighs (Kendall & Gal 2017, eq. 8; `learn_logvar` of latent diffusion's reference).
            self_cond_mask: (B,) 0 or 1, whether a sample is shown a first guess of x_0 in self-conditioning (Chen et al. 2022,
                algorithm 1), else zeros.
        """
        x_t = self.q_sample(x_start, t, noise)
        if self.objective == "eps":
            target = noise
        elif self.objective == "v":
            target = self.predict_v(x_start, t, noise)
        else:
            target = x_start
        cond = as_tuple(cond)
        if self_cond_mask is not None:
            guess = self.predict_start(predict(net, x_t, t, cond + (ops.zeros_like(x_t),)), x_t, t)
            guess = ops.stop_gradient(ops.clamp(guess, -1.0, 1.0) if self.clip_denoised else guess)
            cond = cond + (guess * self_cond_mask.reshape((-1,) + (1,) * (x_t.ndim - 1)),)
        error = self.loss(predict(net, x_t, t, cond), target)
        error = ops.mean(error.reshape(x_t.shape[0], -1), 1)
        simple = error
        if logvar is not None:
            logvar_t = ops.gather(logvar, t, 0)
            simple = error * ops.exp(-logvar_t) + logvar_t
        if self._simple_weights is not None:
            simple = ops.gather(self._simple_weights, t, 0) * simple
        return simple if self._elbo_weights is None else simple + ops.gather(self._elbo_weights, t, 0) * error

    def p_losses(self, net, x_start, t, noise, cond=None, logvar=None, self_cond_mask=None):
        """The mean () of `losses`."""
        return ops.mean(self.losses(net, x_start, t, noise, cond, logvar, self_cond_mask))


def predict(net, x_t, t, cond=None):
    """The network's output, float32; conditions, a Tensor or a tuple, are passed on where there are any."""
    return ops.cast(net(x_t, t, *as_tuple(cond)), ms.float32)


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that data is noised by, and what the network learns of it."""

    num_timesteps: int = 1000
    """T, the number of diffusion steps."""
    schedule: str = "linear"
    """Noise schedule: linear, cosine, quadratic, sigmoid or sqrt_linear."""
    objective: str = "eps"
    """What the network predicts: eps, x0 or v."""
    loss: str = "huber"
    """Error of the prediction: l1, l2 or huber."""
    v_posterior: float = 0.0
    """Share of beta in the reverse variance; 0 is the posterior's."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that x_T is nothing but noise (Lin et al. 2024); needs objective x0 or v."""
    weighting: str = "none"
    """Weights of the timesteps in the loss: none, min-snr or p2."""
    gamma: float | None = None
    """gamma of min-snr (5 if not given) or p2 (1 if not given)."""
    l_simple_weight: float = 1.0
    """Share of the weighted error in the loss."""
    original_elbo_weight: float = 0.0
    """Share of the error as the variational bound weighs it in the loss."""

    def build(self) -> GaussianDiffusion:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps is {self.num_timesteps}: it must be at least 1")
        betas = SCHEDULES[self.schedule](self.num_timesteps)
        if self.zero_terminal_snr:
            if self.num_timesteps < 2:
                raise ValueError("zero_terminal_snr needs at least 2 timesteps")
            betas = rescale_zero_terminal_snr(betas)
        return GaussianDiffusion(
            betas,
            self.objective,
            self.loss,
            self.v_posterior,
            weighting=self.weighting,
            gamma=self.gamma,
            l_simple_weight=self.l_simple_weight,
            original_elbo_weight=self.original_elbo_weight,
        )
