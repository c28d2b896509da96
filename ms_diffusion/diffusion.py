"""The diffusion process as tables and formulas; the network is always an argument.

x (B, ...): float32 data in [-1, 1] or noised data, of any shape; t (B,): int32 timesteps in [0, T).
"""

import warnings
from dataclasses import dataclass

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from .losses import LOSSES
from .schedules import SCHEDULES

OBJECTIVES = ("eps", "x0", "v")


def at(table, t, x):
    """The table's values at t (B,), shaped to multiply x (B, ...)."""
    return ops.gather(table, t, 0).reshape((t.shape[0],) + (1,) * (x.ndim - 1))


class GaussianDiffusion:
    """Denoising diffusion with Gaussian noise (Ho et al. 2020), in the notation of the latent-diffusion reference.

    Tables are float64 numpy on the host (`betas`, `alphas_cumprod`, ... are attributes, (T,)) and float32 on the device.

    Args:
        betas: (T,), in (0, 1).
        objective: what the network predicts: "eps" the noise, "x0" the data, "v" = sqrt(alpha_bar) eps - sqrt(1 -
            alpha_bar) x_0 (Salimans & Ho 2022).
        loss: "l1", "l2" or "huber".
        v_posterior: the reverse variance is (1 - v) posterior variance + v beta (Ho et al. 2020, section 3.2).
        clip_denoised: clip the predicted x_0 to [-1, 1] in `p_mean_variance`.

    Raises:
        ValueError: betas outside (0, 1), an unknown objective or loss.
    Warns:
        UserWarning: alpha_bar_T > 0.01: x_T is no noise yet, samples will be poor.
    """

    def __init__(self, betas, objective="eps", loss="huber", v_posterior=0.0, clip_denoised=True):
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a list of numbers between 0 and 1")
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
        if not 0 <= v_posterior <= 1:
            raise ValueError(f"v_posterior is {v_posterior}: it must lie in [0, 1]")
        self.objective, self.loss, self.clip_denoised = objective, LOSSES[loss], clip_denoised
        self.v_posterior = v_posterior

        # Forward process q(x_t | x_0)
        self.betas = betas
        self.T = len(betas)
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

        # Weights of the squared error in the variational bound, eq. 12; t = 0 has no variance and takes its neighbour's
        with np.errstate(divide="ignore"):
            x0_weights = self.posterior_mean_coef1**2 / (2 * self.posterior_variance)
        one_minus = 1 - self.alphas_cumprod  # an error d in eps is sqrt((1 - a) / a) d in x_0, in v sqrt(1 - a) d
        self.lvlb_weights = x0_weights * {"x0": 1, "eps": one_minus / self.alphas_cumprod, "v": one_minus}[objective]
        if v_posterior == 0 and self.T > 1:
            self.lvlb_weights[0] = self.lvlb_weights[1]

        def device(values):
            return Tensor(values.astype(np.float32))

        self._sqrt_alphas_cumprod = device(np.sqrt(self.alphas_cumprod))
        self._sqrt_one_minus_alphas_cumprod = device(np.sqrt(one_minus))
        self._log_one_minus_alphas_cumprod = device(np.log(one_minus))
        self._sqrt_recip_alphas_cumprod = device(np.sqrt(1 / self.alphas_cumprod))
        self._sqrt_recipm1_alphas_cumprod = device(np.sqrt(1 / self.alphas_cumprod - 1))
        self._posterior_mean_coef1 = device(self.posterior_mean_coef1)
        self._posterior_mean_coef2 = device(self.posterior_mean_coef2)
        self._posterior_variance = device(self.posterior_variance)
        self._posterior_log_variance_clipped = device(np.log(np.maximum(self.posterior_variance, 1e-20)))

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
        scaled = at(self._sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (scaled - x_start) / at(self._sqrt_recipm1_alphas_cumprod, t, x_t)

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

    def p_losses(self, net, x_start, t, noise, cond=None):
        """Mean error () of the network's prediction at x_t, eq. 14."""
        x_t = self.q_sample(x_start, t, noise)
        if self.objective == "eps":
            target = noise
        elif self.objective == "v":
            target = self.predict_v(x_start, t, noise)
        else:
            target = x_start
        return ops.mean(self.loss(predict(net, x_t, t, cond), target))


def predict(net, x_t, t, cond=None):
    """The network's output, float32; a condition is passed on only where there is one."""
    out = net(x_t, t) if cond is None else net(x_t, t, cond)
    return ops.cast(out, ms.float32)


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that data is noised by, and what the network learns of it."""

    timesteps: int = 1000
    """T, the number of diffusion steps."""
    schedule: str = "linear"
    """Noise schedule: linear, cosine, quadratic, sigmoid or sqrt_linear."""
    objective: str = "eps"
    """What the network predicts: eps, x0 or v."""
    loss: str = "huber"
    """Error of the prediction: l1, l2 or huber."""
    v_posterior: float = 0.0
    """Share of beta in the reverse variance; 0 is the posterior's."""

    def build(self) -> GaussianDiffusion:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.timesteps < 1:
            raise ValueError(f"timesteps is {self.timesteps}: it must be at least 1")
        return GaussianDiffusion(SCHEDULES[self.schedule](self.timesteps), self.objective, self.loss, self.v_posterior)
