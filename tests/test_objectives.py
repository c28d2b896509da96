"""Loss weights, learned variances, self-conditioning and zero terminal SNR, held to the papers' formulas and to PyTorch."""

import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers import BETAS, MODES, Affine, T, alpha_bar_of, close, draw, noised, target_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_process import LOSS_FORMULAS, every_objective

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.process import OBJECTIVES, WEIGHTINGS, DiffusionConfig, GaussianDiffusion
from ms_diffusion.schedules import SCHEDULES, quadratic_beta_schedule, rescale_zero_terminal_snr
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

eager = [("pynative", 1), ("pynative", 13)]
without_eps = pytest.mark.parametrize("objective", ["x0", "v"])
FEW = [0.1, 0.5, 0.9, 0.99]  # betas


def per_sample(values):
    return values.reshape(-1, 1, 1, 1)


def run(mode, forward, parameters, *arrays):
    """Losses (B,) of forward(*arrays), and the gradients of their mean in a row."""

    def mean(*arrays):
        losses = forward(*arrays)
        return losses.mean(), losses

    gradient = MODES[mode](ms.value_and_grad(mean, None, parameters, has_aux=True))
    (_, losses), gradients = gradient(*map(Tensor, arrays))
    return losses, np.concatenate([g.asnumpy().reshape(-1) for g in gradients])


# Weights of the timesteps


def snr_of(t):
    alpha_bar = alpha_bar_of(t)
    return alpha_bar / (1 - alpha_bar)


def weight_of(objective, t, weighting="none", gamma=None):
    """Of the error of this prediction, (B,), as the papers state it."""
    snr = snr_of(t)
    if weighting == "min-snr":  # Hang et al. 2023, section 3.4
        clipped = np.minimum(snr, gamma or 5)
        return {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}[objective]
    if weighting == "p2":  # Choi et al. 2022, eq. 8, for eps; its error is sqrt(SNR) times x_0's, v's sqrt(SNR + 1) times
        return {"eps": 1, "x0": snr, "v": snr / (snr + 1)}[objective] / (1 + snr) ** (gamma or 1)
    if weighting == "velocity":  # Li & He 2025: v = (alpha x_t - x_0) / sigma with a bounded divisor
        sigma = np.sqrt(1 - alpha_bar_of(t))
        return {"eps": 1 / snr, "x0": 1, "v": sigma**2}[objective] / np.maximum(sigma, gamma or 0.05) ** 2
    return np.ones(len(snr))


def bound_of(objective, t):
    """Of the same error in the variational bound, (B,): Kingma et al. 2021, eq. 13; t = 0 takes its neighbour's."""
    t = np.maximum(t, 1)
    snr = snr_of(t)
    return (snr_of(t - 1) - snr) / 2 / {"eps": snr, "x0": 1, "v": snr + 1}[objective]


@every_objective
@pytest.mark.parametrize(
    ("weighting", "gamma"), [("none", None), *((name, g) for name in WEIGHTINGS[1:] for g in (None, 0.1, 1, 5, 30))]
)
def test_weights_are_the_papers(objective, weighting, gamma):
    d = GaussianDiffusion(BETAS, objective, weighting=weighting, gamma=gamma)
    np.testing.assert_allclose(d.simple_weights, weight_of(objective, np.arange(T), weighting, gamma), rtol=1e-9)
    assert not d.elbo_weights.any()


def echo(x_t, t, answer):
    """A network whose condition is its prediction."""
    return answer


@pytest.mark.parametrize(
    ("weighting", "mode", "batch"),
    [
        *((name, *case) for name in ("min-snr", "p2", "bound") for case in eager),
        ("min-snr", "graph", 13),
        ("bound", "graph", 13),
    ],
)
def test_one_mistake_weighs_the_same_in_every_objective(weighting, batch, mode):
    """A wrong x_0, and the noise and the v that go with it by eq. 4: weight times squared error is x_0's."""
    x_start, noise, t = draw((batch, 2))
    t = np.maximum(t, 1)
    alpha_bar, wrong = alpha_bar_of(t, like=x_start), x_start + np.float32(0.3)
    wrong_noise = (noised(x_start, noise, t) - np.sqrt(alpha_bar) * wrong) / np.sqrt(1 - alpha_bar)
    answers = [target_of(objective, wrong, wrong_noise, t).astype(np.float32) for objective in OBJECTIVES]
    if weighting == "bound":
        options, weights = {"l_simple_weight": 0.0, "original_elbo_weight": 1.0}, bound_of("x0", t)
    else:
        options, weights = {"weighting": weighting, "gamma": 0.5}, weight_of("x0", t, weighting, 0.5)
    diffusions = [GaussianDiffusion(BETAS, objective, "l2", **options) for objective in OBJECTIVES]

    def losses(x_start, t, noise, *answers):
        values = ()
        for i in range(3):
            values = values + (diffusions[i].losses(echo, x_start, t, noise, answers[i]),)
        return values

    for found in MODES[mode](losses)(*map(Tensor, (x_start, t, noise, *answers))):
        np.testing.assert_allclose(found.asnumpy(), 0.09 * weights, rtol=1e-3)


# The whole loss and its gradient

LOSSES = {  # objective, loss, weighting, gamma, l_simple_weight, original_elbo_weight, whether the variances are learned
    "min-snr": ("eps", "l2", "min-snr", 5.0, 1.0, 0.0, False),
    "min-snr, bound": ("v", "huber", "min-snr", 2.0, 1.0, 0.1, False),
    "p2, logvar": ("x0", "l1", "p2", 0.5, 1.0, 0.0, True),
    "all": ("eps", "l2", "none", None, 0.5, 2.0, True),
    "bound, logvar": ("v", "l2", "none", None, 0.0, 1.0, True),
}
W, C, B = 0.6, 0.01, -0.2
LOGVAR = np.random.default_rng(1).uniform(-1, 1, T).astype(np.float32)


def answer_of(name, batch, mode):
    """Losses (B,) of the network w x_t + c t + b, and the gradients of their mean in w, c, b and the log-variances."""
    objective, loss, *weights, learned = LOSSES[name]
    names = ("weighting", "gamma", "l_simple_weight", "original_elbo_weight")
    diffusion = GaussianDiffusion(BETAS, objective, loss, **dict(zip(names, weights, strict=True)))
    net = Affine(W, B, C)
    logvar = Parameter(Tensor(LOGVAR), name="logvar") if learned else None
    x_start, noise, t = draw((batch, 1, 4, 4))

    def forward(x_start, t, noise):
        return diffusion.losses(net, x_start, t, noise, None, logvar)

    return run(mode, forward, net.trainable_params() + [logvar] * learned, x_start, t, noise)


@pytest.mark.parametrize(
    ("name", "mode", "batch"),
    [*((name, *case) for name in LOSSES for case in eager), *((name, "graph", 13) for name in ("all", "min-snr, bound"))],
)
def test_loss_and_gradient_are_the_formula(name, batch, mode):
    """l_simple_weight * weight * (e / exp(logvar) + logvar) + original_elbo_weight * bound * e, and its derivatives."""
    objective, loss, weighting, gamma, l_simple, elbo, learned = LOSSES[name]
    x_start, noise, t = draw((batch, 1, 4, 4))
    x_t, times = noised(x_start, noise, t), np.broadcast_to(per_sample(t), x_start.shape)
    difference = W * x_t + C * times + B - target_of(objective, x_start, noise, t)
    f, df = LOSS_FORMULAS[loss]
    e, logvar = f(difference).mean((1, 2, 3)), LOGVAR[t].astype(float) * learned
    simple, bound = l_simple * weight_of(objective, t, weighting, gamma), elbo * bound_of(objective, t)
    slopes = per_sample(simple * np.exp(-logvar) + bound) * df(difference) / x_t.size
    wanted = [(slopes * factor).sum() for factor in (x_t, times, 1)]
    if learned:
        wanted += np.bincount(t, simple * (1 - e * np.exp(-logvar)) / batch, T).tolist()

    losses, gradients = answer_of(name, batch, mode)
    close(losses, simple * (e * np.exp(-logvar) + logvar) + bound * e)
    np.testing.assert_allclose(gradients, wanted, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def scheduler():
    """diffusers' DDPMScheduler, noise levels in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        scheduler = diffusers.DDPMScheduler(T, trained_betas=BETAS)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(BETAS), 0)
    return scheduler


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_like_pytorch(scheduler, name):
    """By diffusers' noise, velocity and SNR, and PyTorch's errors and gradients."""
    import torch
    from diffusers.training_utils import compute_snr

    objective, loss, weighting, gamma, l_simple, elbo, learned = LOSSES[name]
    x_start, noise, t = (torch.from_numpy(a) for a in draw((13, 1, 4, 4)))
    x_start, noise, t = x_start.double(), noise.double(), t.long()
    w, c, b, logvar = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (W, C, B, LOGVAR))
    x_t = scheduler.add_noise(x_start, noise, t)
    target = {"eps": noise, "x0": x_start, "v": scheduler.get_velocity(x_start, noise, t)}[objective]
    error = {"l1": torch.nn.L1Loss, "l2": torch.nn.MSELoss, "huber": torch.nn.SmoothL1Loss}[loss](reduction="none")
    error = error(w * x_t + c * t.view(-1, 1, 1, 1) + b, target).flatten(1).mean(1)

    def parts(t):
        snr = compute_snr(scheduler, t).double()
        return snr, {"eps": snr, "x0": 1, "v": snr + 1}[objective]

    (snr, scale), (late, late_scale) = parts(t), parts(t.clamp(min=1))
    gamma = gamma or 1.0
    weights = {"min-snr": snr.clamp(max=gamma) / scale, "p2": snr / scale / (1 + snr) ** gamma, "none": 1}[weighting]
    bound = (parts(t.clamp(min=1) - 1)[0] - late) / late_scale / 2
    likelihood = error / logvar[t].exp() + logvar[t] if learned else error
    losses = l_simple * weights * likelihood + elbo * bound * error
    gradients = torch.autograd.grad(losses.mean(), [w, c, b] + [logvar] * learned)

    ours, our_gradients = answer_of(name, 13, "pynative")
    close(ours, losses.detach().numpy(), 1e-5)
    np.testing.assert_allclose(our_gradients, torch.cat([g.reshape(-1) for g in gradients]), rtol=1e-4, atol=2e-5)


def test_importance_weights_bring_back_the_mean():
    """The mean of w * losses, w = 1 / (T p_t), and its gradient are those of uniform timesteps: here 1, 2, 3, 4 of each."""
    diffusion, net = GaussianDiffusion(FEW, "x0", "l2"), Affine(W, B, C)

    def forward(x_start, t, noise, weights):
        return weights * diffusion.losses(net, x_start, t, noise)

    def answer(counts):
        t, p = np.repeat(np.arange(4, dtype=np.int32), counts), np.array(counts) / sum(counts)
        x_start, noise = (np.full((len(t), 2), pair, np.float32) for pair in ([0.5, -0.7], [1.1, 0.3]))
        losses, gradients = run(
            "pynative", forward, net.trainable_params(), x_start, t, noise, (0.25 / p[t]).astype(np.float32)
        )
        return [losses.asnumpy().mean(), *gradients]

    np.testing.assert_allclose(answer([1, 2, 3, 4]), answer([1, 1, 1, 1]), rtol=1e-5)


# Learned variances in training


class Constant(nn.Cell):
    """b, whatever is asked."""

    def __init__(self):
        super().__init__()
        self.b = Parameter(Tensor([0.5], ms.float32), name="b")

    def construct(self, x, t):
        return self.b + ops.zeros_like(x)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_trained_variances_reach_the_log_of_the_mean_error(fused, monkeypatch):
    """x_0 = +-s_t: b goes to 0, logvar_t to log s_t^2 whatever the weights are, and the average follows b alone."""
    if fused and not kernels.available():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(kernels, "available", lambda: fused)
    s, steps = np.array([0.1, 0.3, 1, 3], np.float32), 150
    t, x_start = np.tile(np.arange(4, dtype=np.int32), 2), np.concatenate([s, -s]).reshape(8, 1)
    diffusion = GaussianDiffusion(FEW, "x0", "l2", weighting="min-snr", l_simple_weight=0.5)
    net, logvar = Constant(), Parameter(Tensor(np.zeros(4, np.float32)), name="logvar")
    ema = EMA(net, 0.9)

    def loss_fn(x_start, t, noise):
        losses = diffusion.losses(net, x_start, t, noise, None, logvar)
        return losses.mean(), losses

    step = make_train_step(loss_fn, make_optimizer(net, 0.2, 5, steps, extra_parameters=[logvar]), ema, has_aux=True)
    b = average = 0.5
    for n in range(1, steps + 1):
        loss, _, losses = step(*map(Tensor, (x_start, t, 0 * x_start)))
        if n == 1:
            weights = 0.5 * np.minimum([9, 9 / 11, 9 / 191, 9 / 19991], 5)[t]  # SNR, where alpha_bar is 0.9, 0.45, ..
            np.testing.assert_allclose(losses.asnumpy(), weights * (b - x_start[:, 0]) ** 2, rtol=1e-5)
            assert float(loss.asnumpy()) == pytest.approx(losses.asnumpy().mean(), rel=1e-5)
        b, decay = float(net.b.asnumpy()[0]), min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * b
        assert float(ema.net.b.asnumpy()[0]) == pytest.approx(average, abs=1e-6)
    np.testing.assert_allclose(logvar.asnumpy(), np.log(s**2), atol=0.01)
    assert abs(b) < 0.01 and len(ema.averages) == 1


# Self-conditioning


@pytest.mark.parametrize(
    ("objective", "mode", "clip", "batch"),
    [*((name, "pynative", *case) for name in OBJECTIVES for case in ((True, 1), (False, 13))), ("v", "graph", True, 13)],
)
def test_self_conditioning_and_its_gradient(objective, batch, mode, clip):
    """Chen et al. 2022, algorithm 1: the guess made from zeros is a constant to the gradient, and zero where not shown."""
    x_start, noise, t = draw((batch, 1, 2, 2))
    t = np.minimum(t, T // 2)  # later, a guess of x_0 from eps multiplies float32's error
    cond, self_cond_mask = 6 * draw((batch, 1, 2, 2), seed=1)[0], (np.arange(batch) % 3 != 1).astype(np.float32)
    diffusion = GaussianDiffusion(BETAS, objective, "l2", clip_denoised=clip)
    w, u, b = (Parameter(Tensor(value, ms.float32), name) for value, name in ((0.9, "w"), (0.7, "u"), (0.3, "b")))

    def net(x_t, t, cond, last):
        return w * x_t + u * last + b * cond

    def forward(x_start, t, noise, cond, self_cond_mask):
        return diffusion.losses(net, x_start, t, noise, cond, None, self_cond_mask)

    losses, gradients = run(mode, forward, [w, u, b], x_start, t, noise, cond, self_cond_mask)
    x_t, alpha_bar = noised(x_start, noise, t), alpha_bar_of(t, like=x_start)
    out = 0.9 * x_t + 0.3 * cond
    from_noise, from_v = (x_t - np.sqrt(1 - alpha_bar) * out) / np.sqrt(alpha_bar), np.sqrt(alpha_bar) * x_t
    guess = {"eps": from_noise, "x0": out, "v": from_v - np.sqrt(1 - alpha_bar) * out}[objective]
    assert (abs(guess) > 1).any()
    last = (np.clip(guess, -1, 1) if clip else guess) * per_sample(self_cond_mask)
    error = out + 0.7 * last - target_of(objective, x_start, noise, t)
    close(losses, (error**2).mean((1, 2, 3)), 1e-5)
    np.testing.assert_allclose(gradients, [(2 * error * d).mean() for d in (x_t, last, cond)], rtol=1e-4, atol=1e-5)


def test_what_the_network_is_shown():
    """Conditions in their order, then zeros; in the second call its own guess where `self_cond_mask` is 1, else zeros."""
    seen = []

    def net(x_t, t, *cond):
        seen.append([c.asnumpy() for c in cond])
        return x_t + 5 * len(seen)

    x_start, noise, t = draw((13, 2))
    labels, self_cond_mask = Tensor(np.arange(13, dtype=np.int32)), np.arange(13, dtype=np.float32) % 2
    arguments = (net, Tensor(x_start), Tensor(t), Tensor(noise))
    GaussianDiffusion(BETAS, "x0").losses(*arguments, (labels, Tensor(noise)), None, Tensor(self_cond_mask))
    guess = np.clip(noised(x_start, noise, t) + 5, -1, 1)
    for shown, wanted in zip(seen, (0 * guess, guess * self_cond_mask[:, None]), strict=True):
        np.testing.assert_array_equal(shown[0], labels.asnumpy())
        np.testing.assert_array_equal(shown[1], noise)
        np.testing.assert_allclose(shown[2], wanted, rtol=1e-5, atol=1e-6)
    seen.clear()
    GaussianDiffusion(BETAS, "x0").losses(*arguments)
    assert seen == [[]]  # called once, with nothing


# Zero terminal SNR


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(deadline=None, max_examples=25)
@given(T=st.integers(2, 1000))
def test_rescaled_schedule(schedule, T):
    """Betas in (0, 1], the first kept, the last 1; sqrt(alpha_bar) is the old one shifted and stretched."""
    betas = SCHEDULES[schedule](T)
    rescaled = rescale_zero_terminal_snr(betas)
    assert (rescaled > 0).all() and (rescaled[:-1] < 1).all() and rescaled[-1] == 1
    assert rescaled[0] == pytest.approx(betas[0], rel=1e-9)
    old, new = (np.sqrt(np.cumprod(1 - b)) for b in (betas, rescaled))
    np.testing.assert_allclose(np.diff(new), old[0] / (old[0] - old[-1]) * np.diff(old), rtol=1e-7, atol=1e-12)


def test_rescaled_schedule_gives_known_numbers():
    """sqrt(alpha_bar) of 0.9, 0.5, 0.1, less 0.1, times 0.9 / 0.8; diffusers 0.35.2's alpha_bar of Stable Diffusion."""
    rescaled = rescale_zero_terminal_snr(1 - np.array([0.9, 0.5 / 0.9, 0.1 / 0.5]) ** 2)
    np.testing.assert_allclose(np.cumprod(1 - rescaled), [0.9**2, 0.45**2, 0], rtol=1e-12)
    alpha_bar = np.cumprod(1 - rescale_zero_terminal_snr(quadratic_beta_schedule(1000, 0.00085, 0.012)))
    golden = [0.99915, 0.652457015341, 0.241018782757, 0.0327991181287, 1.96788805662e-07, 0]
    np.testing.assert_allclose(alpha_bar[[0, 250, 500, 750, 998, 999]], golden, rtol=1e-9)


def test_rescaled_schedule_like_diffusers(scheduler):
    import torch
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as theirs

    for schedule in SCHEDULES.values():
        betas = schedule(1000)
        np.testing.assert_allclose(rescale_zero_terminal_snr(betas), theirs(torch.from_numpy(betas)), 1e-9, 1e-15)


def zero_snr(objective, T=T, schedule="linear", **options):
    return DiffusionConfig(T, schedule, objective, "l2", zero_terminal_snr=True, **options).build()


@pytest.mark.parametrize(
    ("objective", "mode", "batch"), [*((name, *case) for name in ("x0", "v") for case in eager), ("v", "graph", 13)]
)
def test_the_last_step_is_noise_alone(objective, batch, mode):
    """At T - 1, x_t is the noise and v is -x_0; x_{T-2} has nothing to go by but x_0, so its posterior is eq. 4 at T - 2."""
    diffusion = zero_snr(objective)
    x_start, noise, _ = draw((batch, 1, 2, 2))
    answer, t = 2 * x_start * (-1 if objective == "v" else 1), np.full(batch, T - 1, np.int32)

    def process(x_start, noise, t, answer):
        x_t = diffusion.q_sample(x_start, t, noise)
        back = diffusion.predict_start(answer, x_t, t), diffusion.predict_noise_from_start(x_t, t, x_start)
        return (
            x_t,
            *back,
            diffusion.losses(echo, x_start, t, noise, answer),
            *diffusion.p_mean_variance(echo, x_t, t, answer),
        )

    found = MODES[mode](process)(*map(Tensor, (x_start, noise, t, answer)))
    x_t, start, eps, losses, mean, variance, log_variance, clipped = found
    for ours, wanted in ((x_t, noise), (eps, noise), (start, 2 * x_start), (clipped, np.clip(2 * x_start, -1, 1))):
        np.testing.assert_array_equal(ours.asnumpy(), wanted)
    close(losses, (x_start**2).mean((1, 2, 3)))
    alpha_bar = alpha_bar_of(np.full(batch, T - 2), diffusion.betas, like=x_start)
    close(mean, np.sqrt(alpha_bar) * np.clip(2 * x_start, -1, 1))
    close(variance, 1 - alpha_bar)
    close(log_variance, np.log(1 - alpha_bar))


@without_eps
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_is_finite_at_every_step(schedule, objective):
    """All tables but those of 1 / alpha_bar, which only eps needs."""
    for steps, weighting in ((2, "none"), (50, "min-snr"), (1000, "p2")):
        diffusion = zero_snr(objective, steps, schedule, weighting=weighting, original_elbo_weight=0.5)
        assert diffusion.alphas_cumprod[-1] == 0 and diffusion.alphas_cumprod[-2] > 0
        tables = {name: value for name, value in vars(diffusion).items() if isinstance(value, np.ndarray | Tensor)}
        assert len(tables) > 10
        for name, value in tables.items():
            assert "recip" in name or np.isfinite(Tensor(value).asnumpy()).all(), name


@without_eps
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_losses_and_posteriors_are_finite_at_zero_snr(weighting, objective):
    diffusion, net = zero_snr(objective, weighting=weighting, original_elbo_weight=0.5), Affine(W, B)
    t = Tensor(np.arange(T, dtype=np.int32))
    x, noise = (Tensor(np.full((T, 1), value, np.float32)) for value in (0.5, -2))
    for value in (diffusion.losses(net, x, t, noise), *diffusion.p_mean_variance(net, diffusion.q_sample(x, t, noise), t)):
        assert np.isfinite(value.asnumpy()).all()


def test_zero_terminal_snr_refuses_eps_and_a_single_step():
    for build in (lambda: zero_snr("eps"), lambda: GaussianDiffusion([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"^betas end in 1 \(zero terminal SNR\), .*: use objective v or x0$"):
            build()
    with pytest.raises(ValueError, match="zero_terminal_snr needs num_timesteps of at least 2"):
        zero_snr("v", 1)


# Arguments

NAN = float("nan")
BAD = [("gamma", 1.0), ("gamma", 0.0), ("gamma", -1.0), ("gamma", NAN), ("l_simple_weight", 0.0)]
BAD += [(name, value) for name in ("l_simple_weight", "original_elbo_weight") for value in (-0.1, NAN)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_arguments_are_refused_by_name(name, value):
    weighting = "none" if value == 1.0 else "p2"  # gamma 1 is valid, but not without a weighting
    with pytest.raises(ValueError, match=name):
        GaussianDiffusion(BETAS, **{"weighting": weighting, name: value})


def test_the_bound_of_a_single_step():
    """Without variance there is none; with beta's, eq. 12 of Ho et al. is 1 / (2 alpha), for 1 - alpha_bar is beta."""
    with pytest.raises(ValueError, match="original_elbo_weight"):
        GaussianDiffusion([0.995], original_elbo_weight=0.1)
    assert GaussianDiffusion([0.995]).elbo_weights == 0
    diffusion = GaussianDiffusion([0.995], v_posterior=1.0, original_elbo_weight=0.1)
    assert diffusion.elbo_weights == pytest.approx(0.1 / (2 * 0.005))


def test_config_passes_every_field_on():
    """Each field, changed alone, changes what is built; together they give the numbers that the formulas give."""
    base = DiffusionConfig(T, "cosine", "v", "l1", weighting="p2")
    changed = {"num_timesteps": 40, "schedule": "linear", "objective": "x0", "loss": "l2", "v_posterior": 0.5, "gamma": 0.7}
    changed |= {"zero_terminal_snr": True, "weighting": "none", "l_simple_weight": 0.5, "original_elbo_weight": 0.01}
    changed |= {"cosine_s": 0.02, "max_beta": 0.5}
    ends = {"beta_start": 2e-4, "beta_end": 0.03}  # which the cosine has not
    paths = {"shift": "flow", "sigma_data": "edm"}
    given = {"betas", "betas_file"}  # which test_process.py reads and builds
    assert changed.keys() | ends.keys() | paths.keys() | given == {field.name for field in fields(DiffusionConfig)}

    def built(config):
        d = config.build()
        return d.objective, d.loss, *(v.tolist() for v in (d.betas, d.posterior_variance, d.simple_weights, d.elbo_weights))

    for name, value in changed.items():
        assert built(replace(base, **{name: value})) != built(base), name
    linear = replace(base, schedule="unscaled_linear", num_timesteps=1000)
    for name, value in ends.items():
        assert built(replace(linear, **{name: value})) != built(linear), name
        with pytest.raises(ValueError, match=name):
            replace(base, **{name: value}).build()

    for name, schedule in paths.items():
        path = replace(base, schedule=schedule, weighting="none")
        assert (replace(path, **{name: 2.0}).build().alphas != path.build().alphas)[:-1].all()

    d = DiffusionConfig(T, objective="v", weighting="p2", gamma=0.7, l_simple_weight=0.5, original_elbo_weight=0.01).build()
    np.testing.assert_allclose(d.simple_weights, 0.5 * weight_of("v", np.arange(T), "p2", 0.7), rtol=1e-9)
    np.testing.assert_allclose(d.elbo_weights, 0.01 * bound_of("v", np.arange(T)), rtol=1e-9)
