"""Sampler errors: the formulas of the mixture, the distances and the orders agree with theory."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from benchmarks import sampler_errors
from benchmarks.sampler_errors import DATA, DDIM, SOLVERS, STOCHASTIC, Mixture, process, rms, solve_ode
from ms_diffusion.metrics.distances import sliced_wasserstein
from ms_diffusion.samplers import SAMPLERS, sampling_timesteps

ONE = Mixture(np.array([1.0]), np.array([[0.3, -0.2]]), np.array([0.15]))  # a Gaussian


def diffused(mixture, alpha_bar, x):
    """The exact solution for a single Gaussian: (x - mean) / std stays the same."""
    m, s = mixture.means[0], mixture.stds[0]
    return m + s * (x - math.sqrt(alpha_bar) * m) / math.sqrt(alpha_bar * s**2 + 1 - alpha_bar)


# The mixture


@pytest.mark.parametrize("alpha_bar", [1e-3, 0.3, 0.9, 0.999])
def test_posterior_mean_is_bayes_rule(alpha_bar):
    """int x_0 p(x_t | x_0) p(x_0) dx_0 / int p(x_t | x_0) p(x_0) dx_0, by the sum over a grid."""
    side = np.linspace(-2.5, 2.5, 1001)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    prior = sum(
        w / s**2 * np.exp(-((grid - m) ** 2).sum(1) / (2 * s**2))
        for w, m, s in zip(DATA.weights, DATA.means, DATA.stds, strict=True)
    )
    rng = np.random.default_rng(0)
    x = math.sqrt(alpha_bar) * DATA.sample(rng, 4) + math.sqrt(1 - alpha_bar) * rng.standard_normal((4, 2))
    seen = DATA.posterior_mean(x, alpha_bar)
    for i in range(len(x)):
        p = prior * np.exp(-((x[i] - math.sqrt(alpha_bar) * grid) ** 2).sum(1) / (2 * (1 - alpha_bar)))
        np.testing.assert_allclose(seen[i], p @ grid / p.sum(), atol=1e-8)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_denoiser_of_one_gaussian(t):
    """E[x_0 | x_t] = m + Cov(x_0, x_t) / Var(x_t) (x_t - E[x_t])."""
    diffusion, x = process(), np.random.default_rng(0).standard_normal((5, 2))
    alpha_bar, m, s = diffusion.alphas_cumprod[t], ONE.means[0], ONE.stds[0]
    slope = math.sqrt(alpha_bar) * s**2 / (alpha_bar * s**2 + 1 - alpha_bar)
    np.testing.assert_allclose(ONE.denoiser(diffusion)(x, t), m + slope * (x - math.sqrt(alpha_bar) * m), rtol=1e-12)


def test_posterior_mean_far_away_is_finite():
    x = np.array([[1e3, -1e3], [0.0, 80.0]])
    assert np.isfinite(DATA.posterior_mean(x, 0.9999)).all()


def test_samples_have_the_mixtures_moments():
    n = 100_000
    x = DATA.sample(np.random.default_rng(0), n)
    mean = DATA.weights @ DATA.means
    covariance = (DATA.weights[:, None] * DATA.means).T @ DATA.means - np.outer(mean, mean)
    covariance += DATA.weights @ DATA.stds**2 * np.eye(2)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * math.sqrt(covariance.max() / n))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=5 * math.sqrt(2 / n) * covariance.max())
    assert DATA.weights.sum() == pytest.approx(1) and (abs(DATA.means) + DATA.stds[:, None] <= 1).all()


# The reference


def test_reference_of_one_gaussian_is_exact():
    x, alpha_bars = np.random.default_rng(0).standard_normal((50, 2)), process().alphas_cumprod[[-1, 0]]
    at_0 = solve_ode(ONE, x, *alpha_bars, 1000)
    data = solve_ode(ONE, at_0, alpha_bars[1], 1 - 1e-10, 500)
    np.testing.assert_allclose(data, diffused(ONE, alpha_bars[0], x), atol=1e-8)


def test_reference_is_of_order_4():
    x, alpha_bars = np.random.default_rng(0).standard_normal((100, 2)), process().alphas_cumprod[[-1, 0]]
    exact, steps = solve_ode(DATA, x, *alpha_bars, 2000), np.array([100, 200, 400])
    errors = [rms(solve_ode(DATA, x, *alpha_bars, n), exact) for n in steps]
    assert sampler_errors.fit_order(steps, errors) == pytest.approx(4, abs=0.3) and errors[-1] < 1e-6


# The distances


def test_wasserstein_on_a_line_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((500, 1)), rng.exponential(size=(500, 1))
    expected = wasserstein_distance(a[:, 0], b[:, 0])
    assert sliced_wasserstein(a, b, np.ones((1, 1))) == pytest.approx(expected, rel=1e-12)
    rotated = [np.concatenate([np.zeros_like(p), p], 1) for p in (a, b)]
    assert sliced_wasserstein(*rotated, np.array([[0.0], [1.0]])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [(0.3, 0.0), (-0.1, 0.7)])
def test_wasserstein_of_a_shift(shift):
    """|shift . direction|, whose mean over the circle is 2 / pi |shift|; the order of the points does not matter."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1000, 2))
    assert sliced_wasserstein(a, rng.permutation(a) + shift) == pytest.approx(2 / math.pi * math.hypot(*shift), rel=2e-3)
    assert sliced_wasserstein(a, rng.permutation(a)) < 1e-12


def test_rms_by_hand():
    assert rms(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[3.0, 4.0], [1.0, 1.0]])) == pytest.approx(math.sqrt(12.5))


# Counting


@pytest.mark.parametrize(("name", "extra"), [("ddim", 0), ("ddpm", 0), ("dpmpp_2m", 0), ("unipc", 0), ("plms", 1)])
def test_calls_are_counted(name, extra):
    diffusion = process()
    timesteps = sampling_timesteps(diffusion.num_timesteps, 10)
    assert sampler_errors.count_calls(SAMPLERS[name], diffusion, timesteps) == 10 + extra
    assert len(sampler_errors.choose_timesteps(SAMPLERS[name], diffusion, "linspace", 10)[0]) == 10 - extra


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_more_timesteps_would_fit(name):
    for spacing, allowed in itertools.product(("linspace", "trailing", "karras", "logsnr"), (1, 5, 30)):
        check_no_more_timesteps_would_fit(name, spacing, allowed)


def check_no_more_timesteps_would_fit(name, spacing, allowed):
    diffusion = process()
    timesteps, calls = sampler_errors.choose_timesteps(SAMPLERS[name], diffusion, spacing, allowed)
    assert calls == sampler_errors.count_calls(SAMPLERS[name], diffusion, timesteps) <= allowed
    more = sampling_timesteps(diffusion.num_timesteps, len(timesteps) + 1, spacing, diffusion.alphas_cumprod)
    assert sampler_errors.count_calls(SAMPLERS[name], diffusion, more) > allowed


# What is measured


@pytest.fixture(scope="module")
def records():
    """Both measures with few points and calls."""
    ode = sampler_errors.measure_ode(n=200, spacings=("linspace", "logsnr"), allowed=(10, 40))
    return ode + sampler_errors.measure_data(n=1000, spacings=("logsnr",), allowed=(10, 40))


def find(records, measure, sampler, spacing="logsnr"):
    (record,) = [r for r in records if (r["measure"], r["sampler"], r["spacing"]) == (measure, sampler, spacing)]
    return record


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("ddim", 0.9, 1.1),
        ("heun", 1.9, 2.1),
        ("midpoint", 1.8, 2.1),
        ("dpmpp_2m", 1.85, 2.2),
        ("plms", 1.85, 4.3),
        ("unipc", 3.6, 4.4),
    ],
)
def test_orders_are_those_of_theory(records, name, least, most):
    """UniPC of three points is of order 3, and its corrector adds one (Zhao et al. 2023, theorem 3.1); PLMS begins with a
    method of order 2."""
    assert least < find(records, "ode", name)["order"] < most


def test_a_record_for_each_sampler(records):
    assert {(r["sampler"], r["spacing"]) for r in records if r["measure"] == "ode"} == {
        (name, spacing) for name in SOLVERS for spacing in ("linspace", "logsnr")
    }
    assert {r["sampler"] for r in records if r["measure"] == "data"} == {*SOLVERS, *STOCHASTIC}
    assert {name.split()[0] for name in {*SOLVERS, *STOCHASTIC}} == set(SAMPLERS) - {*DDIM, "consistency"}
    for r in records:
        assert len(r["allowed"]) == len(r["calls"]) == len(r["errors"]) and min(r["errors"]) > 0
        assert all(calls <= allowed for calls, allowed in zip(r["calls"], r["allowed"], strict=True))
    ode = find(records, "ode", "ddim")
    assert ode["reference_error"] < ode["floor"] / 1000
    assert find(records, "ode", "unipc")["errors"][-1] == pytest.approx(ode["floor"], rel=0.2)


def test_more_calls_come_closer_to_the_data(records):
    for name in {*SOLVERS, *STOCHASTIC}:
        errors = find(records, "data", name)["errors"]
        assert errors[1] < errors[0]
    assert find(records, "data", "unipc")["reached"] <= 40
    ddpm = find(records, "data", "ddpm v=0")
    assert ddpm["calls"] == [10, 40, 1000] and ddpm["errors"][-1] < 2 * ddpm["floor_most"]


def test_a_sampler_that_is_exact_is_at_the_floor():
    """Points that the exact flow brings to data are no farther from data than fresh data are."""
    rng = np.random.default_rng(1)
    x, data = rng.standard_normal((5000, 2)), DATA.sample(rng, 5000)
    alpha_bars = process().alphas_cumprod[[-1, 0]]
    fresh = [sliced_wasserstein(data, DATA.sample(rng, 5000)) for _ in range(20)]
    assert sliced_wasserstein(data, solve_ode(DATA, x, *alpha_bars, 100)) < 1.5 * max(fresh)


def test_the_command(records, tmp_path, monkeypatch, capsys):
    """A table with a best for each of 2 + 3 columns, a picture and a report."""
    monkeypatch.setattr(sampler_errors, "measure_ode", lambda: [r for r in records if r["measure"] == "ode"])
    monkeypatch.setattr(sampler_errors, "measure_data", lambda: [r for r in records if r["measure"] == "data"])
    picture, report = tmp_path / "new" / "out.png", tmp_path / "out.json"
    assert sampler_errors.main(["--picture", str(picture), "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 125
    for name in {*SOLVERS, *STOCHASTIC}:
        assert any(line.startswith(f"{name:13}logsnr") for line in lines)
    assert sum(line.count("*") for line in lines[6:]) >= 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {r["measure"] for r in json.loads(report.read_text())["records"]} == {"ode", "data"}
