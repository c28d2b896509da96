"""What several test files share."""

import math
from types import SimpleNamespace

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion.process import Level
from ms_diffusion.runtime import compiled
from ms_diffusion.schedules import SCHEDULES, linear_beta_schedule, rescale_zero_terminal_snr

MODES = {"graph": compiled, "pynative": lambda fn: fn}

# The process by its formulas, in float64: eq. numbers are those of Ho et al. 2020

T = 50
BETAS = linear_beta_schedule(T)


def diffusion_of(schedule="linear", T=1000, zero_terminal_snr=False, v_posterior=0.0):
    """What a sampler needs of the process, from the definition of alpha_bar."""
    betas = SCHEDULES[schedule](T)
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    return process_of(np.cumprod(1 - betas), v_posterior=v_posterior)


def process_of(alpha_bar, **attributes):
    """What a sampler needs of a process with these alpha_bar (T,)."""
    alpha_bar = np.asarray(alpha_bar)
    levels = [*map(Level, np.sqrt(alpha_bar).tolist(), np.sqrt(1 - alpha_bar).tolist())]
    attributes = {"v_posterior": 0.0, **attributes}
    return SimpleNamespace(num_timesteps=len(levels), alphas_cumprod=alpha_bar, level=levels.__getitem__, **attributes)


def alpha_bar_of(t, betas=BETAS, like=None):
    """prod_{s <= t} (1 - beta_s) by its definition; shaped to multiply `like` (B, ...)."""
    values = np.array([math.prod(1 - float(b) for b in betas[: s + 1]) for s in np.atleast_1d(t)])
    return values if like is None else values.reshape((-1,) + (1,) * (like.ndim - 1))


def draw(shape, T=T, seed=0):
    """x_0, noise of this shape and t (B,) that covers both ends, as numpy."""
    rng = np.random.default_rng((seed, *shape))
    t = rng.integers(0, T, shape[0])
    t[-1:], t[:1] = T - 1, 0 if shape[0] > 1 else T // 2
    return rng.uniform(-1, 1, shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32), t.astype(np.int32)


def noised(x_start, noise, t):
    """x_t, eq. 4."""
    alpha_bar = alpha_bar_of(t, like=x_start)
    return np.sqrt(alpha_bar) * x_start + np.sqrt(1 - alpha_bar) * noise


def v_of(x_start, noise, t):
    """v = alpha eps - sigma x (Salimans & Ho 2022, section 4)."""
    alpha_bar = alpha_bar_of(t, like=x_start)
    return np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x_start


def target_of(objective, x_start, noise, t):
    return {"eps": noise, "x0": x_start, "v": v_of(x_start, noise, t)}[objective]


def close(ours, reference, atol=2e-6):
    assert ours.shape == reference.shape
    assert ours.dtype == ms.float32
    np.testing.assert_allclose(ours.asnumpy(), reference, rtol=2e-5, atol=atol)


class Affine(nn.Cell):
    """w x_t + c t + b."""

    def __init__(self, w, b, c=0.0):
        super().__init__()
        self.w, self.c, self.b = (
            Parameter(Tensor(value, ms.float32), name) for value, name in ((w, "w"), (c, "c"), (b, "b"))
        )

    def construct(self, x, t):
        return self.w * x + self.c * t.reshape((-1,) + (1,) * (x.ndim - 1)).astype(ms.float32) + self.b


class Linear(nn.Cell):
    """x (B, 3) -> (B, 2)."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight = Parameter(Tensor(rng.standard_normal((3, 2), dtype=np.float32)), name="weight")
        self.bias = Parameter(Tensor(rng.standard_normal(2, dtype=np.float32)), name="bias")

    def construct(self, x):
        return ops.matmul(x, self.weight) + self.bias
