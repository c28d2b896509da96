"""Schedules, losses and GaussianDiffusion, held to float64 formulas of the papers, to Bayes' rule and to known numbers."""

import inspect
import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
from helpers import BETAS, MODES, Affine, T, alpha_bar_of, close, draw, noised, target_of, v_of
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from ms_diffusion.losses import LOSSES
from ms_diffusion.process import OBJECTIVES, DiffusionConfig, GaussianDiffusion, predict
from ms_diffusion.runtime import UserError
from ms_diffusion.schedules import (
    SCHEDULES,
    cosine_beta_schedule,
    linear_beta_schedule,
    quadratic_beta_schedule,
    unscaled_linear_beta_schedule,
)

SHAPES = [(1, 2), (13, 2), (1, 1, 4, 4), (13, 1, 4, 4), (1, 3, 2, 2, 2), (13, 3, 2, 2, 2)]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
examples = settings(deadline=None, max_examples=50)
DIFFUSION = GaussianDiffusion(BETAS)


def bayes(x_start, x_t, t, betas=BETAS):
    """Mean and variance of q(x_{t-1} | x_t, x_0): the product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    mean, variance = np.empty(x_t.shape), np.zeros((len(t),) + (1,) * (x_t.ndim - 1))
    for i, s in enumerate(t):
        if s == 0:  # q(x_{-1} | x_0) is a point at x_0
            mean[i] = x_start[i]
            continue
        beta, prior = betas[s], float(alpha_bar_of(s - 1, betas)[0])
        precision = (1 - beta) / beta + 1 / (1 - prior)
        mean[i] = (math.sqrt(1 - beta) / beta * x_t[i] + math.sqrt(prior) / (1 - prior) * x_start[i]) / precision
        variance[i] = 1 / precision
    return mean, variance


# Schedules


def paper_betas(name, T):
    """The formulas, beta by beta, before their scale."""
    part = [i / (T - 1) for i in range(T)]
    if name == "linear":
        return [1e-4 + p * (0.02 - 1e-4) for p in part]
    if name == "sigmoid":
        return [1e-4 + (0.02 - 1e-4) * 0.5 * (1 + math.tanh((12 * p - 6) / 2)) for p in part]  # the logistic function
    low, high = {"quadratic": (1e-4, 0.02), "sqrt_linear": (0.0015, 0.0195)}[name]
    return [(math.sqrt(low) * (1 - p) + math.sqrt(high) * p) ** 2 for p in part]


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"cosine", "unscaled_linear", "log_snr"}))
@examples
@given(T=st.integers(2, 4000))
def test_scaled_schedule_is_the_papers(name, T):
    """1000 / T times the paper's, at most 0.999; the paper's own at T = 1000."""
    expected = [min(b * 1000 / T, 0.999) for b in paper_betas(name, T)]
    np.testing.assert_allclose(SCHEDULES[name](T), expected, rtol=1e-12)


@examples
@given(T=st.integers(1, 4000))
def test_cosine_schedule_is_the_papers(T):
    """Nichol & Dhariwal eq. 17: prod (1 - beta) is f(t) / f(0) until beta is cut at 0.999."""

    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = cosine_beta_schedule(T)
    uncut = int((betas < 0.999).sum())
    assert uncut >= T - 1
    expected = [f(t) / f(0) for t in range(1, uncut + 1)]
    np.testing.assert_allclose(np.cumprod(1 - betas)[:uncut], expected, rtol=1e-9)
    assert (betas[uncut:] == 0.999).all()


@examples
@given(T=st.integers(2, 4000))
def test_log_snr_is_even(T):
    alpha_bar = np.cumprod(1 - SCHEDULES["log_snr"](T))
    np.testing.assert_allclose(np.log(alpha_bar / (1 - alpha_bar)), np.linspace(13.3, -5, T), atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
@examples
@given(T=st.integers(1, 4000))
def test_schedule_lies_in_0_1_and_ends_in_noise(name, T):
    """alpha_bar_T <= 0.01 for every T from 2 to 4000 (T = 1 has one small beta in most schedules), unscaled_linear apart."""
    betas = SCHEDULES[name](T)
    assert betas.shape == (T,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert (np.diff(betas[name == "log_snr" :]) >= 0).all()  # the first beta of log_snr makes the first level
    if T > 1 and name != "unscaled_linear":
        assert math.prod(1 - betas) <= 0.01


@examples
@given(T=st.integers(1, 4000))
def test_unscaled_schedule_has_its_range_at_any_T(T):
    np.testing.assert_array_equal(SCHEDULES["unscaled_linear"](T), np.linspace(1e-4, 0.02, T))


def test_unscaled_schedule_leaves_data_in_x_T():
    """alpha_bar_T of the annotated model's 200 steps is 0.13; at T = 1000 the schedule is DDPM's."""
    betas = unscaled_linear_beta_schedule(200)
    np.testing.assert_allclose(betas, [1e-4 + i / 199 * 0.0199 for i in range(200)], rtol=1e-12)
    assert math.prod(1 - betas) == pytest.approx(0.132, abs=0.002)
    np.testing.assert_array_equal(unscaled_linear_beta_schedule(1000), linear_beta_schedule(1000))


def test_options_of_schedules():
    T, s = 50, 0.1
    alpha_bar = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    wanted = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.3)
    found = DiffusionConfig(T, "cosine", cosine_s=s, max_beta=0.3).build().betas
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found.max() == 0.3
    betas = DiffusionConfig(T, "linear", max_beta=0.2).build().betas
    np.testing.assert_allclose(betas, np.minimum(20 * np.linspace(1e-4, 0.02, T), 0.2), rtol=1e-12)
    for wrong in ({"cosine_s": 0.1}, {"schedule": "unscaled_linear", "max_beta": 0.5}, {"schedule": "betas"}):
        with pytest.raises(ValueError, match="has no cosine_s|has no max_beta|0 betas are given"):
            DiffusionConfig(**wrong).build()


def test_betas_of_a_file(tmp_path):
    """In each format; the configuration is whole without the file."""
    betas = linear_beta_schedule(200)
    np.save(tmp_path / "b.npy", betas)
    (tmp_path / "b.json").write_text(json.dumps(betas.tolist()))
    (tmp_path / "b.txt").write_text("\n".join(map(repr, betas.tolist())))
    for path in list(tmp_path.iterdir()):
        config = DiffusionConfig(betas_file=str(path))
        path.unlink()
        assert (config.schedule, config.num_timesteps, config.betas_file) == ("betas", 200, None)
        kept = DiffusionConfig(**json.loads(json.dumps(asdict(config))) | {"betas": tuple(config.betas)})
        np.testing.assert_array_equal(kept.build().betas, betas)
    for text in ("", "[]", "[0.1, 2]", '["a"]', '{"a": 1}', "0.1", "[[0.1]]", "[NaN]"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match="--diffusion.betas-file .*b.json.* must hold"):
            DiffusionConfig(betas_file=str(tmp_path / "b.json"))
    with pytest.raises(UserError, match="cannot be read"):
        DiffusionConfig(betas_file=str(tmp_path / "no.npy"))


@pytest.mark.parametrize(("name", "ours"), [("scaled_linear", "quadratic"), ("squaredcos_cap_v2", "cosine")])
def test_names_of_schedules_in_diffusers(name, ours):
    with pytest.raises(UserError, match=f"--?schedule is '{name}': here it is called {ours}"):
        DiffusionConfig(schedule=name).build()


def test_schedule_gives_published_numbers():
    """Stable Diffusion's sigmas (0.0292, 14.6146); alpha_bar_T of DDPM."""
    alpha_bar = np.cumprod(1 - quadratic_beta_schedule(1000, 0.00085, 0.012))
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    assert sigma[[0, -1]] == pytest.approx([0.0292, 14.6146], abs=5e-5)
    assert math.prod(1 - linear_beta_schedule(1000)) == pytest.approx(4.0358e-5, rel=1e-4)


# Construction


def test_given_betas_are_kept():
    betas = [0.1, 0.5, 0.3, 0.99]
    d = GaussianDiffusion(betas)
    assert d.num_timesteps == 4
    np.testing.assert_array_equal(d.betas, betas)
    np.testing.assert_allclose(d.alphas_cumprod, [0.9, 0.45, 0.315, 0.00315], rtol=1e-13)
    np.testing.assert_allclose(d.alphas_cumprod_prev, [1, 0.9, 0.45, 0.315], rtol=1e-13)


def test_warns_where_x_T_is_not_noise():
    """Betas made for T = 1000 at T = 200 keep 0.13 of the signal's variance; the limit is 0.01."""
    with pytest.warns(UserWarning, match=r"alpha_bar_T is 0\.132\b"):
        GaussianDiffusion(np.linspace(1e-4, 0.02, 200))
    with pytest.warns(UserWarning, match="still holds data"):
        GaussianDiffusion([0.9899])
    GaussianDiffusion([0.9901])  # a warning would be an error


@pytest.mark.parametrize(
    "arguments",
    [
        {"betas": []},
        {"betas": 0.5},
        {"betas": [[0.5, 0.995]]},
        {"betas": [0.0, 0.995]},
        {"betas": [0.5, 1.0]},
        {"betas": [-0.1, 0.995]},
        {"betas": [float("nan"), 0.995]},
        {"objective": "noise"},
        {"loss": "mse"},
        {"v_posterior": -0.1},
        {"v_posterior": 1.1},
        {"v_posterior": float("nan")},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        GaussianDiffusion(**{"betas": [0.5, 0.995], **arguments})


def test_config_builds_what_it_says():
    d = DiffusionConfig(num_timesteps=20, schedule="cosine", objective="v", loss="l1", v_posterior=1.0).build()
    np.testing.assert_array_equal(d.betas, cosine_beta_schedule(20))
    np.testing.assert_array_equal(d.posterior_variance, d.betas)
    assert (d.objective, d.loss) == ("v", LOSSES["l1"])


@pytest.mark.parametrize(
    "bad",
    [
        {"schedule": "linar"},
        {"num_timesteps": 0},
        {"num_timesteps": 9.5},
        {"objective": "x"},
        {"loss": "x"},
        {"weighting": "snr"},
        {"v_posterior": 1.1},
        {"gamma": 0.0},
        {"l_simple_weight": -0.1},
        {"original_elbo_weight": math.nan},
    ],
    ids=str,
)
def test_config_refuses_values_by_flag(bad):
    name = next(iter(bad))
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is "):
        DiffusionConfig(**bad).build()


def test_process_and_config_have_the_same_defaults():
    defaults = inspect.signature(GaussianDiffusion).parameters
    shared = [field for field in fields(DiffusionConfig) if field.name in defaults and field.name != "betas"]
    assert len(shared) == 7
    assert all(field.default == defaults[field.name].default for field in shared)
    default, cosine = defaults["clip_denoised"].default, DiffusionConfig(20, "cosine")
    assert cosine.build().clip_denoised is default is True
    assert not cosine.build(clip_denoised=False).clip_denoised


# Forward process


@every_shape
def test_q_mean_variance(shape):
    """Eq. 4: N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I)."""
    x_start, _, t = draw(shape)
    mean, variance, log_variance = DIFFUSION.q_mean_variance(Tensor(x_start), Tensor(t))
    alpha_bar = alpha_bar_of(t, like=x_start)
    close(mean, np.sqrt(alpha_bar) * x_start)
    close(variance, 1 - alpha_bar)
    close(log_variance, np.log(1 - alpha_bar))


@pytest.mark.parametrize(
    ("mode", "shape"), [*(("pynative", shape) for shape in SHAPES), ("graph", (1, 2)), ("graph", (13, 3, 2, 2, 2))], ids=str
)
def test_q_sample(shape, mode):
    """Eq. 4."""
    x_start, noise, t = draw(shape)
    q_sample = MODES[mode](DIFFUSION.q_sample)
    close(q_sample(Tensor(x_start), Tensor(t), Tensor(noise)), noised(x_start, noise, t))


def test_q_sample_is_the_chain_of_single_steps():
    """Monte Carlo: mean and variance of T steps x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z (eq. 2), and of q_sample."""
    n, x0, last = 200_000, 0.7, 12
    rng = np.random.default_rng(0)
    chain = np.full(n, x0)
    for beta in BETAS[: last + 1]:
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * rng.standard_normal(n)
    noise = Tensor(rng.standard_normal((n, 1), dtype=np.float32))
    jump = DIFFUSION.q_sample(Tensor(np.full((n, 1), x0, np.float32)), Tensor(np.full(n, last, np.int32)), noise)
    jump = jump.asnumpy().astype(np.float64)
    assert abs(jump.mean() - chain.mean()) < 5 * math.sqrt(2 * chain.var() / n)
    assert abs(jump.var() - chain.var()) < 5 * math.sqrt(2 * 2 / n) * chain.var()


# Posterior


@every_shape
def test_q_posterior_is_bayes_rule(shape):
    """Eqs. 6 and 7."""
    x_start, noise, t = draw(shape)
    x_t = noised(x_start, noise, t).astype(np.float32)
    mean, variance, log_variance = DIFFUSION.q_posterior(*map(Tensor, (x_start, x_t, t)))
    expected_mean, expected_variance = bayes(x_start, x_t, t)
    close(mean, expected_mean)
    close(variance, expected_variance, atol=1e-9)
    close(log_variance, np.log(np.maximum(expected_variance, 1e-20)))


@settings(deadline=None, max_examples=15)
@given(betas=st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=20))
def test_posterior_tables_are_bayes_rule(betas):
    """For any betas, in float64; the last is large to end in noise."""
    betas = [*betas, 0.999]
    d, t = GaussianDiffusion(betas), np.arange(len(betas))
    for x_start, x_t in ((1.0, 0.0), (0.0, 1.0), (-0.3, 2.0)):
        mean, variance = (
            values[:, 0] for values in bayes(np.full((len(t), 1), x_start), np.full((len(t), 1), x_t), t, betas)
        )
        ours = d.posterior_mean_coef1 * x_start + d.posterior_mean_coef2 * x_t
        np.testing.assert_allclose(ours, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(d.posterior_variance, variance, rtol=1e-9)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
def test_v_posterior_mixes_the_two_variances(v_posterior):
    """Section 3.2: sigma^2 = beta_tilde at 0, beta at 1; the device's tables hold the same."""
    d = GaussianDiffusion(BETAS, v_posterior=v_posterior)
    t = np.arange(T, dtype=np.int32)
    x = np.zeros((T, 1), np.float32)
    _, beta_tilde = bayes(x, x, t)
    expected = (1 - v_posterior) * beta_tilde + v_posterior * BETAS[:, None]
    np.testing.assert_allclose(d.posterior_variance, expected[:, 0], rtol=1e-9)
    _, variance, log_variance = d.q_posterior(Tensor(x), Tensor(x), Tensor(t))
    close(variance, expected, atol=1e-9)
    close(log_variance, np.log(np.maximum(expected, 1e-20)))


# From one prediction to another


@every_shape
def test_predictions_solve_eq_4(shape):
    x_start, noise, t = draw(shape)
    d = DIFFUSION
    x_t = noised(x_start, noise, t)
    # float32 carries x_t with an error of 6e-8 |x_t|, which the formula divides by sqrt(alpha_bar), sqrt(1 - alpha_bar)
    alpha_bar = alpha_bar_of(t)
    low, high = 1e-6 / math.sqrt(alpha_bar.min()), 1e-6 / math.sqrt(1 - alpha_bar.max())
    ms_x, ms_noise, ms_x_t, ms_t = Tensor(x_start), Tensor(noise), Tensor(x_t.astype(np.float32)), Tensor(t)
    v = v_of(x_start, noise, t)
    close(d.predict_start_from_noise(ms_x_t, ms_t, ms_noise), x_start, low)
    close(d.predict_noise_from_start(ms_x_t, ms_t, ms_x), noise, high)
    close(d.predict_v(ms_x, ms_t, ms_noise), v)
    close(d.predict_start_from_v(ms_x_t, ms_t, Tensor(v.astype(np.float32))), x_start)
    for objective in OBJECTIVES:
        answer = Tensor(target_of(objective, x_start, noise, t).astype(np.float32))
        close(GaussianDiffusion(BETAS, objective).predict_start(answer, ms_x_t, ms_t), x_start, low)


def test_round_trips():
    """noise -> x_0 -> noise, x_0 -> noise -> x_0 and x_0 -> noise -> v -> x_0 return, from any x_t and prediction."""
    d = DIFFUSION
    grid = np.meshgrid(np.arange(T), [-3, -1, -0.1, 0, 1e-3, 0.7, 3], [-3, -1, -1e-3, 0, 0.2, 1, 3])
    t, x_t, p = (values.reshape(-1, 1) for values in grid)
    alpha_bar = alpha_bar_of(np.arange(T))[t]
    snr = np.sqrt(alpha_bar / (1 - alpha_bar))
    ms_x_t, ms_p, ms_t = Tensor(np.float32(x_t)), Tensor(np.float32(p)), Tensor(np.int32(t[:, 0]))

    def returns(value, tolerance):
        assert (abs(value.asnumpy() - p) <= 2e-5 * abs(p) + 1e-5 * tolerance).all()

    returns(d.predict_noise_from_start(ms_x_t, ms_t, d.predict_start_from_noise(ms_x_t, ms_t, ms_p)), 1 + snr)
    noise = d.predict_noise_from_start(ms_x_t, ms_t, ms_p)
    returns(d.predict_start_from_noise(ms_x_t, ms_t, noise), 1 + 1 / snr)
    returns(d.predict_start_from_v(ms_x_t, ms_t, d.predict_v(ms_p, ms_t, noise)), 1)


# Reverse process


@every_objective
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (13, 1, 4, 4)], ids=str)
def test_p_mean_variance_of_the_exact_answer(objective, clip, v_posterior, shape):
    """Eq. 11 is the posterior of the x_0 predicted, which clipping keeps in [-1, 1]."""
    x_start, noise, t = draw(shape)
    x_start = 2 * x_start  # half of it out of [-1, 1]
    x_t = noised(x_start, noise, t).astype(np.float32)
    answer = Tensor(target_of(objective, x_start, noise, t).astype(np.float32))
    d = GaussianDiffusion(BETAS, objective, v_posterior=v_posterior, clip_denoised=clip)
    mean, variance, log_variance, predicted = d.p_mean_variance(lambda x_t, t: answer, Tensor(x_t), Tensor(t))
    expected_start = np.clip(x_start, -1, 1) if clip else x_start
    expected_mean, beta_tilde = bayes(expected_start, x_t, t)
    expected_variance = (1 - v_posterior) * beta_tilde + v_posterior * BETAS[t].reshape(beta_tilde.shape)
    atol = 1e-6 / math.sqrt(alpha_bar_of(t).min())
    close(predicted, expected_start, atol)
    close(mean, expected_mean, atol)
    close(variance, expected_variance, 1e-9)
    close(log_variance, np.log(np.maximum(expected_variance, 1e-20)))


def test_p_mean_variance_clips_by_default():
    x = Tensor(np.full((2, 1), 5, np.float32))
    predicted = GaussianDiffusion(BETAS, "x0").p_mean_variance(lambda x, t: x, x, Tensor([0, 3], ms.int32))[3]
    np.testing.assert_array_equal(predicted.asnumpy(), np.ones((2, 1)))


def test_condition_is_passed_on_only_when_given():
    def unconditional(x, t):
        return x

    def conditional(x, t, cond):
        return x + cond

    x, t, cond = Tensor([[1.0]], ms.float32), Tensor([3], ms.int32), Tensor([[10.0]], ms.float32)
    d = GaussianDiffusion(BETAS, "x0", "l1", clip_denoised=False)
    assert predict(unconditional, x, t).asnumpy() == 1
    assert predict(conditional, x, t, cond).asnumpy() == 11
    assert d.p_mean_variance(unconditional, x, t)[3].asnumpy() == 1
    assert d.p_mean_variance(conditional, x, t, cond)[3].asnumpy() == 11
    x_t = math.sqrt(float(alpha_bar_of(3)[0]))
    zero = ops.zeros_like(x)
    assert float(d.p_losses(unconditional, x, t, zero)) == pytest.approx(1 - x_t, rel=1e-5)
    assert float(d.p_losses(conditional, x, t, zero, cond)) == pytest.approx(9 + x_t, rel=1e-5)
    with pytest.raises(TypeError):
        predict(unconditional, x, t, cond)


def test_prediction_is_float32():
    """A network in half precision does not make its loss one."""
    out = predict(lambda x, t: ops.cast(x, ms.float16), Tensor([[0.5]], ms.float32), Tensor([0], ms.int32))
    assert out.dtype == ms.float32 and out.asnumpy() == 0.5


# Weights of the variational bound


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
def test_lvlb_weights_of_eps_are_eq_12(v_posterior):
    """beta^2 / (2 sigma^2 alpha (1 - alpha_bar)); where t = 0 has no variance it takes its neighbour's."""
    weights = GaussianDiffusion(BETAS, "eps", v_posterior=v_posterior).lvlb_weights
    expected = []
    for t, beta in enumerate(BETAS):
        alpha_bar, previous = float(alpha_bar_of(t)[0]), float(alpha_bar_of(t - 1)[0]) if t else 1.0
        sigma2 = (1 - v_posterior) * beta * (1 - previous) / (1 - alpha_bar) + v_posterior * beta
        expected.append(beta**2 / (2 * sigma2 * (1 - beta) * (1 - alpha_bar)) if sigma2 else None)
    if v_posterior == 0:
        expected[0] = expected[1]
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


def test_lvlb_weights_of_x0_are_the_loss_of_snr():
    """(SNR(t - 1) - SNR(t)) / 2 (Kingma et al. 2021, eq. 13); the same bound in v has (1 - alpha_bar) times that."""
    snr = np.array([a / (1 - a) for a in alpha_bar_of(np.arange(T))])
    expected = (snr[:-1] - snr[1:]) / 2
    x0, v = (GaussianDiffusion(BETAS, objective).lvlb_weights for objective in ("x0", "v"))
    np.testing.assert_allclose(x0[1:], expected, rtol=1e-9)
    np.testing.assert_allclose(v[1:], expected / (1 + snr[1:]), rtol=1e-9)  # v's error is sqrt(1 + SNR) times x_0's
    assert x0[0] == x0[1] and v[0] == v[1]


@every_objective
def test_lvlb_weight_is_the_divergence_of_the_posteriors(objective):
    """weight * (error of the prediction)^2 = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), means over 2 sigma^2 (eq. 8)."""
    x_start, noise, t = draw((13, 1))
    x_start, noise, t = x_start.astype(float), noise.astype(float), np.maximum(t, 1)
    x_t = noised(x_start, noise, t)
    wrong = x_start + 0.1
    d = GaussianDiffusion(BETAS, objective)
    (mean, variance), (wrong_mean, _) = bayes(x_start, x_t, t), bayes(wrong, x_t, t)
    alpha_bar = alpha_bar_of(t, like=x_start)
    wrong_noise = (x_t - np.sqrt(alpha_bar) * wrong) / np.sqrt(1 - alpha_bar)
    error = target_of(objective, wrong, wrong_noise, t) - target_of(objective, x_start, noise, t)
    np.testing.assert_allclose(d.lvlb_weights[t][:, None] * error**2, (mean - wrong_mean) ** 2 / (2 * variance), rtol=1e-6)


# Losses


def test_huber_gives_torchs_numbers():
    """torch.nn.functional.smooth_l1_loss(pred, target, reduction="none")."""
    errors = np.array([0, 0.25, -0.5, 1, -1, 3, -10], np.float32)
    loss = LOSSES["huber"](Tensor(errors + 2), Tensor(np.full(7, 2, np.float32)))
    np.testing.assert_array_equal(loss.asnumpy(), [0, 0.03125, 0.125, 0.5, 0.5, 2.5, 9.5])


LOSS_FORMULAS = {  # of the error e = pred - target: value, derivative
    "l1": (np.abs, np.sign),
    "l2": (lambda e: e**2, lambda e: 2 * e),
    "huber": (lambda e: np.where(abs(e) < 1, e**2 / 2, abs(e) - 0.5), lambda e: np.clip(e, -1, 1)),
}


@pytest.mark.parametrize("loss", LOSS_FORMULAS)
def test_loss_is_its_formula(loss):
    pred, target = (values.ravel() for values in np.meshgrid(*[np.linspace(-4, 4, 33, dtype=np.float32)] * 2))
    ours = LOSSES[loss](Tensor(pred), Tensor(target))
    close(ours, LOSS_FORMULAS[loss][0](pred.astype(np.float64) - target), 1e-6)


def loss_and_gradient(diffusion, net, x_start, t, noise):
    """In PyNative."""
    gradient = ms.value_and_grad(lambda *batch: diffusion.p_losses(net, *batch), None, net.trainable_params())
    loss, gradients = gradient(Tensor(x_start), Tensor(t), Tensor(noise))
    return float(loss), [float(g) for g in gradients]


CASES = [(objective, loss) for objective in OBJECTIVES for loss in LOSS_FORMULAS]
NET = Affine(0.6, -0.2, 0.01)


def p_losses_by_hand(objective, loss, x_start, noise, t):
    """Eq. 14 of NET, and its derivatives in w, c and b."""
    x_t = noised(x_start, noise, t)
    times = np.broadcast_to(t.reshape((-1,) + (1,) * (x_t.ndim - 1)), x_t.shape)
    error = 0.6 * x_t + 0.01 * times - 0.2 - target_of(objective, x_start, noise, t)
    f, df = LOSS_FORMULAS[loss]
    return f(error).mean(), [(df(error) * x_t).mean(), (df(error) * times).mean(), df(error).mean()]


@pytest.mark.parametrize(
    ("objective", "loss", "shape"),
    [
        *((*case, (13, 1, 4, 4)) for case in CASES),
        *((*case, shape) for case in CASES[::4] for shape in [(1, 2), (13, 3, 2, 2, 2)]),
    ],
    ids=str,
)
def test_p_losses_and_its_gradient(objective, loss, shape):
    x_start, noise, t = draw(shape)
    value, gradients = loss_and_gradient(GaussianDiffusion(BETAS, objective, loss), NET, x_start, t, noise)
    wanted, slopes = p_losses_by_hand(objective, loss, x_start, noise, t)
    assert value == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradients, slopes, rtol=1e-4, atol=1e-5)


def test_p_losses_and_its_gradient_in_a_graph():
    """One graph with each objective and each loss."""
    cases = CASES[::4]
    diffusions = [GaussianDiffusion(BETAS, objective, loss) for objective, loss in cases]

    def losses(x_start, t, noise):
        values = ()
        for diffusion in diffusions:
            values = values + (diffusion.p_losses(NET, x_start, t, noise),)
        return sum(values), values

    (x_start, noise, t), gradient = (
        draw((13, 1, 4, 4)),
        ms.value_and_grad(losses, None, NET.trainable_params(), has_aux=True),
    )
    (_, values), gradients = MODES["graph"](gradient)(Tensor(x_start), Tensor(t), Tensor(noise))
    by_hand = [p_losses_by_hand(*case, x_start, noise, t) for case in cases]
    np.testing.assert_allclose([float(v) for v in values], [value for value, _ in by_hand], rtol=1e-5)
    np.testing.assert_allclose([float(g) for g in gradients], sum(np.array(g) for _, g in by_hand), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "t"), [*((name, 10) for name in OBJECTIVES), ("v", 0), ("v", T - 1)])
def test_the_exact_denoiser_minimises_the_loss(objective, t):
    """Data N(m, s^2): E[. | x_t] is affine in x_t; its gradient is 0, its loss the conditional variance, and off it more.

    The four points m +- s, +-1 are the Gauss-Hermite quadrature of x_0 and noise, exact for squares.
    """
    m, s = 0.3, 0.5
    x_start = np.array([[m + s], [m + s], [m - s], [m - s]], np.float32)
    noise = np.array([[1], [-1], [1], [-1]], np.float32)
    alpha_bar = float(alpha_bar_of(t)[0])
    mean, variance = math.sqrt(alpha_bar) * m, alpha_bar * s**2 + 1 - alpha_bar  # of x_t
    covariance = {
        "x0": math.sqrt(alpha_bar) * s**2,
        "eps": math.sqrt(1 - alpha_bar),
        "v": math.sqrt(alpha_bar * (1 - alpha_bar)) * (1 - s**2),
    }[objective]
    own = {"x0": s**2, "eps": 1, "v": alpha_bar + (1 - alpha_bar) * s**2}[objective]
    centre = {"x0": m, "eps": 0, "v": -math.sqrt(1 - alpha_bar) * m}[objective]
    w = covariance / variance
    least = own - covariance**2 / variance

    diffusion = GaussianDiffusion(BETAS, objective, "l2")
    times = np.full(4, t, np.int32)
    value, (grad_w, _, grad_b) = loss_and_gradient(diffusion, Affine(w, centre - w * mean), x_start, times, noise)
    assert value == pytest.approx(least, rel=1e-4, abs=1e-7)
    assert (grad_w, grad_b) == pytest.approx((0, 0), abs=1e-5)
    for dw, db in ((0.1, 0), (0, -0.1), (0.1, -0.1)):
        net = Affine(w + dw, centre - (w + dw) * mean + db)
        value = float(diffusion.p_losses(net, Tensor(x_start), Tensor(times), Tensor(noise)))
        assert value == pytest.approx(least + dw**2 * variance + db**2, rel=1e-4, abs=1e-6)
