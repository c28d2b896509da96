"""Measure the error of each sampler against its number of network calls: ``python -m benchmarks.sampler_errors``.

The data are a mixture of Gaussians in the plane. Its E[x_0 | x_t], the answer of a perfect network, is a formula, so the
whole error is the sampler's. Everything is float64 NumPy, because a sampler only adds and scales. x (n, d): n points of d
numbers. The figures are the same on every machine.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ms_diffusion.commands.parse import parse
from ms_diffusion.files import write
from ms_diffusion.metrics.distances import sliced_wasserstein
from ms_diffusion.process import Level
from ms_diffusion.runtime import run_program
from ms_diffusion.samplers import SAMPLERS, is_stochastic, sampling_timesteps
from ms_diffusion.schedules import linear_beta_schedule

CALLS = (5, 8, 10, 15, 20, 30, 50, 100, 200)  # limits on the number of network calls
ORDER_CALLS = (50, 100, 200)  # where errors fall as a power of the number of calls
DDIM = ("euler", "euler_ancestral")  # other names of ddim with eta = 0 and 1
SOLVERS = {name: sampler for name, sampler in SAMPLERS.items() if not is_stochastic(sampler) and name not in DDIM}
STOCHASTIC = {
    "ddpm v=0": partial(SAMPLERS["ddpm"], v_posterior=0.0),
    "ddpm v=1": partial(SAMPLERS["ddpm"], v_posterior=1.0),
    "ddim eta=1": partial(SAMPLERS["ddim"], eta=1.0),
    "sde_dpmpp_2m": SAMPLERS["sde_dpmpp_2m"],
    "heun churn=4": partial(SAMPLERS["heun"], s_churn=4.0),
}
TEXTS = {
    "ode": """\
Solvers: RMS distance from the exact solution of the probability-flow ODE for the same x_T, by number of network calls.
Data: a mixture of Gaussians in [-1, 1]^2. Network: its exact denoiser. Linear schedule, T = 1000. * marks a column's best.
The step from t = 0 to the data has an error of {floor:.1e}; with trailing it starts at t = T / steps.
The reference has an error of {reference_error:.0e}. Order: errors fall as calls^-order, from 50 to 200 calls at T = 100,000.
""",
    "data": """
Distributions: sliced Wasserstein-1 distance between 20,000 samples and as many data; 1000 calls use all timesteps.
Reached: number of calls at which the distance is that of new data: {floor:.4f} on average, {floor_most:.4f} at most.
""",
}


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], stds[k]^2 I): weights and stds (K,), means (K, d)."""

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n draws (n, d)."""
        k = rng.choice(len(self.weights), n, p=self.weights)
        return self.means[k] + self.stds[k, None] * rng.standard_normal((n, self.means.shape[1]))

    def posterior_mean(self, x: np.ndarray, alpha_bar: float) -> np.ndarray:
        """E[x_0 | x_t = x] (n, d): each component's regression, weighted by the component's share of the density at x."""
        alpha = math.sqrt(alpha_bar)
        variance = alpha_bar * self.stds**2 + 1 - alpha_bar  # (K,) of x_t
        gain = alpha * self.stds**2 / variance
        square = np.einsum("nd,nd->n", x, x) - 2 * alpha * self.means @ x.T + alpha_bar * (self.means**2).sum(1)[:, None]
        log_share = (np.log(self.weights) - x.shape[1] / 2 * np.log(variance))[:, None] - square / (2 * variance)[:, None]
        share = np.exp(log_share - log_share.max(0))
        share /= share.sum(0)  # (K, n)
        return share.T @ ((1 - gain * alpha)[:, None] * self.means) + (gain @ share)[:, None] * x

    def denoiser(self, diffusion: Any) -> Callable:
        """The denoise(x_t, t) -> x_0 that a sampler takes."""
        return lambda x, t: self.posterior_mean(x, float(diffusion.alphas_cumprod[t]))


DATA = Mixture(
    weights=np.array([0.1, 0.15, 0.2, 0.25, 0.3]),
    means=np.array([[-0.6, -0.5], [0.5, -0.6], [0.65, 0.4], [-0.1, 0.7], [-0.05, 0.0]]),
    stds=np.array([0.1, 0.15, 0.12, 0.2, 0.18]),
)


def process(num_timesteps: int = 1000) -> SimpleNamespace:
    """What a sampler needs of a diffusion process, with the linear schedule."""
    alphas_cumprod = np.cumprod(1 - linear_beta_schedule(num_timesteps))
    levels = [*map(Level, np.sqrt(alphas_cumprod).tolist(), np.sqrt(1 - alphas_cumprod).tolist())]
    tables = {"alphas_cumprod": alphas_cumprod, "level": levels.__getitem__}
    return SimpleNamespace(num_timesteps=num_timesteps, v_posterior=0.0, **tables)


def solve_ode(mixture: Mixture, x: np.ndarray, alpha_bar: float, alpha_bar_end: float, steps: int) -> np.ndarray:
    """The solution of the probability-flow ODE from alpha_bar to alpha_bar_end, by the classical Runge-Kutta method.

    dy/du = y - E[x_0 | x] with y = x / alpha, u = log(sigma / alpha) (Karras et al. 2022, eqs. 1 and 3).
    """

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


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared distance between points (n, d), pair by pair."""
    return math.sqrt(((a - b) ** 2).sum(1).mean())


def count_calls(sampler: Callable, diffusion: Any, timesteps: list[int]) -> int:
    """How often the sampler calls the network."""
    calls: list[int] = []
    sampler(lambda x, t: calls.append(t) or x, np.zeros(1), diffusion, timesteps, np.zeros_like)
    return len(calls)


def choose_timesteps(sampler: Callable, diffusion: Any, spacing: str, calls: int) -> tuple[list[int], int]:
    """As many timesteps as `calls` network calls allow, and the calls that the sampler makes for them."""
    steps = calls
    while True:
        timesteps = sampling_timesteps(diffusion.num_timesteps, steps, spacing, diffusion.alphas_cumprod)
        made = count_calls(sampler, diffusion, timesteps)
        if made <= calls:
            return timesteps, made
        steps -= max(1, (made - calls) // 2)  # a timestep takes at most two calls


def measure_calls(
    sampler: Callable, x: np.ndarray, diffusion: Any, spacing: str, allowed: Iterable[int], distance: Callable
) -> dict[str, Any]:
    """For each limit on the calls: the calls made and the distance of the samples from the truth."""
    rng, denoise = np.random.default_rng(1), DATA.denoiser(diffusion)
    chosen = [choose_timesteps(sampler, diffusion, spacing, n) for n in allowed]
    samples = (sampler(denoise, x, diffusion, t, lambda x: rng.standard_normal(x.shape)) for t, _ in chosen)
    return {"allowed": list(allowed), "calls": [calls for _, calls in chosen], "errors": [*map(distance, samples)]}


def fit_order(calls: Sequence[int], errors: Sequence[float]) -> float:
    """The p for which the errors fall as calls^-p, by least squares."""
    return -float(np.polyfit(np.log(calls), np.log(errors), 1)[0])


def measure_ode(
    n: int = 2000, spacings: Sequence[str] = ("linspace", "trailing", "karras", "logsnr"), allowed: Iterable[int] = CALLS
) -> list[dict[str, Any]]:
    """RMS distance of each solver from the exact solution for the same n x_T, at T = 1000.

    `floor` is the error of the step from t = 0 to the data. The order is fitted at T = 100,000, on the same curve of
    alpha_bar, against a solution that contains this step.
    """
    x = np.random.default_rng(0).standard_normal((n, 2))
    coarse, fine = process(), process(100_000)

    def solve(diffusion, steps):
        """Data by a sampler's last step from the exact x at t = 0, and the exact data."""
        at_0 = solve_ode(DATA, x, *diffusion.alphas_cumprod[[-1, 0]], steps)
        return DATA.denoiser(diffusion)(at_0, 0), solve_ode(DATA, at_0, diffusion.alphas_cumprod[0], 1 - 1e-10, steps)

    (stepped, truth), (fine_stepped, _) = solve(coarse, 1000), solve(fine, 1000)
    common = {"measure": "ode", "floor": rms(stepped, truth), "reference_error": rms(solve(coarse, 500)[1], truth)}
    records = []
    for spacing in spacings:
        for name, sampler in SOLVERS.items():
            errors = measure_calls(sampler, x, coarse, spacing, allowed, partial(rms, truth))
            falling = measure_calls(sampler, x, fine, spacing, ORDER_CALLS, partial(rms, fine_stepped))
            order = fit_order(falling["calls"], falling["errors"])
            records.append({"sampler": name, "spacing": spacing, **errors, "order": order, **common})
    return records


def measure_data(
    n: int = 20_000, spacings: Sequence[str] = ("linspace", "trailing", "logsnr"), allowed: Iterable[int] = CALLS
) -> list[dict[str, Any]]:
    """Sliced Wasserstein-1 distance between n samples and n data at T = 1000.

    `floor` and `floor_most` are the mean and the maximum for 20 sets of new data, `reached` is the smallest number of calls
    at which a sampler is within that maximum.
    """
    rng = np.random.default_rng(0)
    x, data = rng.standard_normal((n, 2)), DATA.sample(rng, n)
    fresh = [sliced_wasserstein(data, DATA.sample(rng, n)) for _ in range(20)]
    common = {"measure": "data", "floor": float(np.mean(fresh)), "floor_most": max(fresh)}

    records = []
    for spacing in spacings:
        for name, sampler in (STOCHASTIC | SOLVERS).items():
            also = [1000] if name in STOCHASTIC and spacing == spacings[-1] else []  # all timesteps: the same in any spacing
            distance = partial(sliced_wasserstein, data)
            errors = measure_calls(sampler, x, process(), spacing, [*allowed, *also], distance)
            good = (calls for calls, error in zip(errors["calls"], errors["errors"], strict=True) if error <= max(fresh))
            reached = next(good, None)
            records.append({"sampler": name, "spacing": spacing, **errors, "reached": reached, **common})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """Print one table per measure and one row per record; * marks the smallest error of a column."""
    for measure, last in (("ode", "order"), ("data", "reached")):
        rows = [r for r in records if r["measure"] == measure]
        allowed = max((r["allowed"] for r in rows), key=len)
        print(TEXTS[measure].format(**rows[0]))
        print(f"{'sampler':13}{'spacing':9}{''.join(f'{n:8} ' for n in allowed)}{last:>8}")
        least = [min(r["errors"][i] for r in rows if i < len(r["errors"])) for i in range(len(allowed))]
        for r in rows:
            cells = "".join(f"{e:8.2g}{'*' if e == best else ' '}" for e, best in zip(r["errors"], least, strict=False))
            end = f"{r['order']:.1f}" if last == "order" else r["reached"] or f"> {r['calls'][-1]}"
            print(f"{r['sampler']:13}{r['spacing']:9}{cells:{9 * len(allowed)}}{end:>8}")


def draw(records: list[dict[str, Any]], path: str | Path) -> None:
    """Draw errors over network calls on logarithmic axes: the solvers' with two spacings, and distances from the data."""
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


@dataclass
class Args:
    """Print the error of each sampler against its number of network calls."""

    picture: str | None = None
    """Also draw the errors in this PNG."""
    json: str | None = None
    """Also write all figures to this file."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    for path in filter(None, (args.picture, args.json)):
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    records = measure_ode() + measure_data()
    print_table(records)
    if args.picture:
        draw(records, args.picture)
    if args.json:
        text = json.dumps({"records": records}, indent=1)
        write(args.json, lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
