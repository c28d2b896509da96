"""Noise schedules: T -> betas (T,) float64, the variance that each diffusion step adds (Ho et al. 2020, eq. 2), or T -> a
`Path`, for processes that are not defined by betas.

The schedules with a range of betas are defined for T = 1000 and scaled by 1000 / T, so that x_T is noise at any T.
unscaled_linear is the exception, for comparison.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


def _scaled(values: np.ndarray, max_beta: float) -> np.ndarray:
    return np.minimum(values * (1000 / len(values)), max_beta)


def linear_beta_schedule(T: int, beta_start: float = 1e-4, beta_end: float = 0.02, max_beta: float = 0.999) -> np.ndarray:
    """Ho et al. 2020, section 4."""
    return _scaled(np.linspace(beta_start, beta_end, T), max_beta)


def unscaled_linear_beta_schedule(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """The range of Ho et al. at any T, as in the annotated diffusion model: at T = 200 x_T still holds much of the data."""
    return np.linspace(beta_start, beta_end, T)


def quadratic_beta_schedule(T: int, beta_start: float = 1e-4, beta_end: float = 0.02, max_beta: float = 0.999) -> np.ndarray:
    """Linear in the square root of beta ("quad" in the code of DDPM and DDIM, "scaled_linear" in diffusers)."""
    return _scaled(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2, max_beta)


def sqrt_linear_beta_schedule(
    T: int, beta_start: float = 1.5e-3, beta_end: float = 0.0195, max_beta: float = 0.999
) -> np.ndarray:
    """The schedule that latent diffusion calls "linear": quadratic, with its own range (Rombach et al. 2022, appendix E)."""
    return quadratic_beta_schedule(T, beta_start, beta_end, max_beta)


def sigmoid_beta_schedule(T: int, beta_start: float = 1e-4, beta_end: float = 0.02, max_beta: float = 0.999) -> np.ndarray:
    """A logistic curve over [-6, 6] (the annotated diffusion model; GeoDiff, Xu et al. 2022)."""
    return _scaled(beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T))), max_beta)


def cosine_beta_schedule(T: int, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """alpha_bar(t) = cos^2((t / T + s) / (1 + s) pi / 2), with beta at most max_beta (Nichol & Dhariwal 2021, eq. 17)."""
    alpha_bar = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def log_snr_beta_schedule(T: int, log_snr_max: float = 13.3, log_snr_min: float = -5.0) -> np.ndarray:
    """log(alpha^2 / sigma^2) falls evenly from log_snr_max to log_snr_min, as variational diffusion models do before they
    learn it (Kingma et al. 2021, arXiv 2107.00630, section 6 and appendix B). The plain loss of eps is then the variational
    bound of T steps, up to a factor: the schedule for likelihoods. At log_snr_max the 256 levels of a pixel are apart."""
    alpha_bar = 1 / (1 + np.exp(-np.linspace(log_snr_min, log_snr_max, T)[::-1]))
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def given_betas(T: int, betas: Sequence[float] = ()) -> np.ndarray:
    """Betas of one's own. Raises ValueError if there are not T of them."""
    if len(betas) != T:
        raise ValueError(f"{len(betas)} betas are given for {T} timesteps: give as many, by --diffusion.betas-file FILE")
    return np.array(betas, np.float64)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that x_T is pure noise (Lin et al. 2024, algorithm 1).

    The last beta becomes 1. The objective must then be x0 or v: eps at T - 1 is x_T itself and does not determine x_0."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return 1 - np.append(root[0], root[1:] / root[:-1]) ** 2


SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": linear_beta_schedule,
    "unscaled_linear": unscaled_linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "quadratic": quadratic_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
    "sqrt_linear": sqrt_linear_beta_schedule,
    "log_snr": log_snr_beta_schedule,
}
GIVEN: dict[str, Callable[..., np.ndarray]] = {"betas": given_betas}
# Names in diffusers -> what they are here
ELSEWHERE = {
    "scaled_linear": "quadratic; Stable Diffusion has it with --diffusion.beta-start 0.00085 --diffusion.beta-end 0.012",
    "squaredcos_cap_v2": "cosine",
}


class Path(NamedTuple):
    """x_t = alpha x_0 + sigma noise for t = 0..T-1, and v = alpha' x_0 + sigma' noise: float64 arrays (T,)."""

    alphas: np.ndarray
    sigmas: np.ndarray
    slopes: tuple[np.ndarray, np.ndarray]  # (alpha', sigma')


def flow_path(T: int, shift: float = 1.0) -> Path:
    """Rectified flow (Liu et al. 2023; Lipman et al. 2023, with sigma_min = 0): x_t = (1 - s) x_0 + s noise, a straight
    line whose velocity is v = noise - x_0, at the times s = 1 / T, ..., 1. `shift` moves them towards the noise, to
    shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23)."""
    even = np.arange(1, T + 1) / T
    s = shift * even / (1 + (shift - 1) * even)
    return Path(1 - s, s, (-np.ones(T), np.ones(T)))


def edm_path(T: int, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """The noise levels and the preconditioning of EDM (Karras et al. 2022, eq. 5 and table 1): y = x_0 + s noise with s^(1 /
    rho) even. Their network F sees x_t = y / sqrt(s^2 + sigma_data^2), and x_0 = c_skip y + c_out F; so v = -F, where v =
    (sigma_data alpha) noise - (sigma / sigma_data) x_0 has variance 1 for data of the standard deviation sigma_data."""
    s = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), T) ** rho
    scale = np.hypot(s, sigma_data)
    alphas, sigmas = 1 / scale, s / scale
    return Path(alphas, sigmas, (-sigmas / sigma_data, sigma_data * alphas))


PATHS: dict[str, Callable[..., Any]] = {"flow": flow_path, "edm": edm_path}
