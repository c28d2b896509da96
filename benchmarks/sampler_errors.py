"""How far off each sampler is after so many network calls: python -m ms_diffusion.benchmark --samplers.

The data are a mixture of Gaussians in the plane, for which E[x_0 | x_t], what a perfect network answers, is a formula: all
error is the sampler's. float64 numpy throughout, for a sampler only adds and scales. x (n, d): n points of d numbers.
"""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from ms_diffusion.metrics.distances import sliced_wasserstein
from ms_diffusion.samplers import SAMPLERS, sampling_timesteps
from ms_diffusion.schedules import linear_beta_schedule

CALLS = (5, 8, 10, 15, 20, 30, 50, 100, 200)  # of the network, at most
ORDER_CALLS = (50, 100, 200)  # where errors fall as a power of the calls
SOLVERS = {name: (sampler, 0.0) for name, sampler in SAMPLERS.items() if name != "ddpm"}  # (sampler, v_posterior)
DDPM, DDIM = SAMPLERS["ddpm"], SAMPLERS["ddim"]
STOCHASTIC = {"ddpm v=0": (DDPM, 0.0), "ddpm v=1": (DDPM, 1.0), "ddim eta=1": (partial(DDIM, eta=1.0), 0.0)}
TEXTS = {
    "ode": """\
Solvers: RMS distance from the exact solution of the probability-flow ODE for the same x_T, at so many network calls.
Data: a mixture of Gaussians in [-1, 1]^2. Network: its exact denoiser. Linear schedule, T = 1000. * is the best of a column.
The step from t = 0 to data costs {floor:.1e}; trailing takes it from t = T / steps.
The reference is {reference_error:.0e} off. Order: errors fall as calls^-order, from 50 to 200 calls at T = 100,000.
""",
    "data": """
Distributions: sliced Wasserstein-1 distance of 20,000 samples from as many data; at 1000 calls all timesteps are taken.
Reached: at so many calls it is one that fresh data have, {floor:.4f} on average, {floor_most:.4f} at most.
""",
}


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], stds[k]^2 I): weights and stds (K,), means (K, d)."""

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray

    def sample(self, rng, n: int) -> np.ndarray:
        """n draws -> (n, d)."""
        k = rng.choice(len(self.weights), n, p=self.weights)
        return self.means[k] + self.stds[k, None] * rng.standard_normal((n, self.means.shape[1]))

    def posterior_mean(self, x, alpha_bar: float) -> np.ndarray:
        """E[x_0 | x_t = x] (n, d): the regression of each component, weighted by its share in the density at x."""
        alpha = math.sqrt(alpha_bar)
        variance = alpha_bar * self.stds**2 + 1 - alpha_bar  # (K,) of x_t
        gain = alpha * self.stds**2 / variance
        square = np.einsum("nd,nd->n", x, x) - 2 * alpha * self.means @ x.T + alpha_bar * (self.means**2).sum(1)[:, None]
        log_share = (np.log(self.weights) - x.shape[1] / 2 * np.log(variance))[:, None] - square / (2 * variance)[:, None]
        share = np.exp(log_share - log_share.max(0))
        share /= share.sum(0)  # (K, n)
        return share.T @ ((1 - gain * alpha)[:, None] * self.means) + (gain @ share)[:, None] * x

    def denoiser(self, diffusion):
        """`denoise(x_t, t) -> x_0`, as a sampler takes it."""
        return lambda x, t: self.posterior_mean(x, float(diffusion.alphas_cumprod[t]))


DATA = Mixture(
    weights=np.array([0.1, 0.15, 0.2, 0.25, 0.3]),
    means=np.array([[-0.6, -0.5], [0.5, -0.6], [0.65, 0.4], [-0.1, 0.7], [-0.05, 0.0]]),
    stds=np.array([0.1, 0.15, 0.12, 0.2, 0.18]),
)


def process(T: int = 1000, v_posterior: float = 0.0):
    """What a sampler needs of a diffusion with the linear schedule."""
    return SimpleNamespace(T=T, v_posterior=v_posterior, alphas_cumprod=np.cumprod(1 - linear_beta_schedule(T)))


def solve_ode(mixture: Mixture, x, alpha_bar: float, alpha_bar_end: float, steps: int) -> np.ndarray:
    """The probability-flow ODE from alpha_bar to alpha_bar_end, by the classical Runge-Kutta method: dy/du = y - E[x_0 | x],
    y = x / alpha, u = log(sigma / alpha) (Karras et al. 2022, eqs. 1 and 3)."""

    def slope(y, u):
        alpha_bar = 1 / (1 + math.exp(2 * u))
        return y - mixture.posterior_mean(y * math.sqrt(alpha_bar), alpha_bar)

    start, end = (0.5 * math.log((1 - a) / a) for a in (alpha_bar, alpha_bar_end))
    h, y = (end - start) / steps, x / math.sqrt(alpha_bar)
    for i in range(steps):
        u = start + i * h
        k1 = slope(y, u)
        k2 = slope(y + h / 2 * k1, u + h / 2)
        k3 = slope(y + h / 2 * k2, u + h / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, u + h))
    return y * math.sqrt(alpha_bar_end)


def rms(a, b) -> float:
    """Root of the mean squared distance of points (n, d) from their partners."""
    return math.sqrt(((a - b) ** 2).sum(1).mean())


def count_calls(sampler, diffusion, timesteps) -> int:
    calls = []
    sampler(lambda x, t: calls.append(t) or x, np.zeros(1), diffusion, timesteps, np.zeros_like)
    return len(calls)


def choose_timesteps(sampler, diffusion, spacing: str, calls: int) -> tuple[list[int], int]:
    """The most timesteps on which the sampler calls the network no more than `calls` times, and how often it does."""
    steps = calls
    while True:
        timesteps = sampling_timesteps(diffusion.num_timesteps, steps, spacing, diffusion.alphas_cumprod)
        made = count_calls(sampler, diffusion, timesteps)
        if made <= calls:
            return timesteps, made
        steps -= max(1, (made - calls) // 2)  # a timestep costs two calls at most


def measure_calls(sampler, mixture, x, diffusion, spacing, allowed, distance) -> dict:
    """The calls made and the distance of the samples from the truth, for each number of calls allowed."""
    rng, denoise = np.random.default_rng(1), mixture.denoiser(diffusion)
    record = {"allowed": list(allowed), "calls": [], "errors": []}
    for n in allowed:
        timesteps, calls = choose_timesteps(sampler, diffusion, spacing, n)
        samples = sampler(denoise, x, diffusion, timesteps, lambda x: rng.standard_normal(x.shape))
        record["calls"].append(calls)
        record["errors"].append(distance(samples))
    return record


def fit_order(calls, errors) -> float:
    """p where the errors fall as calls^-p, by least squares."""
    return -float(np.polyfit(np.log(calls), np.log(errors), 1)[0])


def measure_ode(mixture=DATA, n=2000, spacings=("linspace", "trailing", "karras", "logsnr"), allowed=CALLS) -> list[dict]:
    """RMS distance of each solver from the exact solution for the same n x_T, at T = 1000; `floor` is what the step from
    t = 0 to data costs. The order is fitted at T = 100,000, the same curve of alpha_bar, with that step in the truth."""
    x = np.random.default_rng(0).standard_normal((n, 2))
    coarse, fine = process(), process(100_000)

    def solve(diffusion, steps):
        """Data by a sampler's last step from the exact x at t = 0, and exact data."""
        at_0 = solve_ode(mixture, x, *diffusion.alphas_cumprod[[-1, 0]], steps)
        return mixture.denoiser(diffusion)(at_0, 0), solve_ode(mixture, at_0, diffusion.alphas_cumprod[0], 1 - 1e-10, steps)

    (stepped, truth), (fine_stepped, _) = solve(coarse, 1000), solve(fine, 1000)
    common = {"measure": "ode", "floor": rms(stepped, truth), "reference_error": rms(solve(coarse, 500)[1], truth)}
    records = []
    for spacing in spacings:
        for name, (sampler, _) in SOLVERS.items():
            errors = measure_calls(sampler, mixture, x, coarse, spacing, allowed, partial(rms, truth))
            falling = measure_calls(sampler, mixture, x, fine, spacing, ORDER_CALLS, partial(rms, fine_stepped))
            order = fit_order(falling["calls"], falling["errors"])
            records.append({"sampler": name, "spacing": spacing, **errors, "order": order, **common})
    return records


def measure_data(mixture=DATA, n=20_000, spacings=("linspace", "trailing", "logsnr"), allowed=CALLS) -> list[dict]:
    """Sliced Wasserstein-1 distance of n samples from n data at T = 1000; `floor` is that of fresh data, the mean and the
    most of 20 draws, `reached` the first number of calls at which a sampler is no farther."""
    rng = np.random.default_rng(0)
    x, data = rng.standard_normal((n, 2)), mixture.sample(rng, n)
    fresh = [sliced_wasserstein(data, mixture.sample(rng, n)) for _ in range(20)]
    common = {"measure": "data", "floor": float(np.mean(fresh)), "floor_most": max(fresh)}

    records = []
    for spacing in spacings:
        for name, (sampler, v_posterior) in (STOCHASTIC | SOLVERS).items():
            also = [1000] if name in STOCHASTIC and spacing == spacings[-1] else []  # all timesteps, the same in any spacing
            diffusion, distance = process(v_posterior=v_posterior), partial(sliced_wasserstein, data)
            errors = measure_calls(sampler, mixture, x, diffusion, spacing, [*allowed, *also], distance)
            good = [calls for calls, error in zip(errors["calls"], errors["errors"], strict=True) if error <= max(fresh)]
            reached = good[0] if good else None
            records.append({"sampler": name, "spacing": spacing, **errors, "reached": reached, **common})
    return records


def measure_samplers() -> list[dict]:
    """A record for each sampler and spacing of both measures: "ode", a solver's error, and "data", a distribution's."""
    return measure_ode() + measure_data()


def print_table(records: list[dict]) -> None:
    """A table for each measure, a row for each record; * marks the least error of a column."""
    for measure, last in (("ode", "order"), ("data", "reached")):
        rows = [r for r in records if r["measure"] == measure]
        allowed = max((r["allowed"] for r in rows), key=len)
        print(TEXTS[measure].format(**rows[0]))
        print(f"{'sampler':12}{'spacing':9}{''.join(f'{n:8} ' for n in allowed)}{last:>8}")
        least = [min(r["errors"][i] for r in rows if i < len(r["errors"])) for i in range(len(allowed))]
        for r in rows:
            cells = "".join(f"{e:8.2g}{'*' if e == best else ' '}" for e, best in zip(r["errors"], least, strict=False))
            end = f"{r['order']:.1f}" if last == "order" else r["reached"] or f"> {r['calls'][-1]}"
            print(f"{r['sampler']:12}{r['spacing']:9}{cells:{9 * len(allowed)}}{end:>8}")


def draw(records: list[dict], path) -> None:
    """Errors over network calls on logarithmic axes: the solvers' on two spacings, and the distances from the data."""
    from matplotlib.figure import Figure

    figure, lines = Figure(figsize=(14, 4.5), layout="constrained"), {}
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)
    titles = {"ode": "RMS distance from the ODE's solution", "data": "sliced Wasserstein-1 from the data"}
    for axes, measure, spacing in ((left, "ode", "linspace"), (middle, "ode", "logsnr"), (right, "data", "logsnr")):
        rows = [r for r in records if (r["measure"], r["spacing"]) == (measure, spacing)]
        for r in rows:
            i = [*SOLVERS, *STOCHASTIC].index(r["sampler"])
            line, fill = ("--", "none") if r["sampler"] in STOCHASTIC else ("-", "full")
            style = {"color": f"C{i}", "linestyle": line, "marker": "os^Dvsdx"[i % 8], "fillstyle": fill, "markersize": 5}
            lines[r["sampler"]] = axes.loglog(r["calls"], r["errors"], **style)[0]
        lines["floor"] = axes.axhline(rows[0]["floor"], color="black", linestyle=":")
        ticks = [n for n in (5, 10, 20, 50, 100, 200, 1000) if n <= max(r["calls"][-1] for r in rows)]
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set(title=f"{titles[measure]}\nspacing {spacing}", xlabel="network calls")
        axes.grid(alpha=0.3)
    lines["floor"] = lines.pop("floor")  # last in the legend
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.savefig(path, dpi=100)
