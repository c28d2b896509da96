"""Consistency tuning: its loss, the sampler of what it makes, and whole runs, against closed forms for Gaussian data."""

import math
import threading

import numpy as np
import pytest
from helpers import MODES, Affine
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, nn, ops

import ms_diffusion as md
from ms_diffusion.process import ANCHOR, HUBER, DiffusionConfig
from ms_diffusion.randomness import nearer_timesteps
from ms_diffusion.runtime import UserError, compiled
from ms_diffusion.samplers import SAMPLERS, sampling_timesteps
from ms_diffusion.training.checkpoint import read_newest

T, DATA_STD = 200, 0.6
PROCESSES = {
    "ddpm": DiffusionConfig(T, "cosine", "x0").build(False),
    "flow": DiffusionConfig(T, "flow", "v").build(False),
}


def teacher_of(process):
    """E[x_0 | x_t] and the end of the path through x_t, as factors of x_t (T,), where x_0 ~ N(0, DATA_STD^2)."""
    std = np.hypot(process.alphas * DATA_STD, process.sigmas)
    return process.alphas * DATA_STD**2 / std**2, DATA_STD / std


class Scaled(nn.Cell):
    """A network that multiplies x_t by a factor of its timestep (T,)."""

    def __init__(self, factors):
        super().__init__()
        self.factors = Tensor(factors.astype(np.float32))

    def construct(self, x, t):
        return ops.gather(self.factors, t, 0).reshape((-1,) + (1,) * (x.ndim - 1)) * x


# The timesteps


@settings(deadline=None, max_examples=100)
@given(t=st.integers(0, 10**6), stage=st.floats(0.1, 20))
def test_r_is_below_t_and_at_the_fraction_of_the_stage(t, stage):
    (r,) = nearer_timesteps(np.array([t]), stage)
    assert -1 <= r < t and r + 1 <= (1 - 2**-stage) * (t + 1)
    assert r == t - 1 or r + 1 > (1 - 2**-stage) * (t + 1) - 1


# The loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_and_its_gradient(mode, batch, taught):
    """In float64, of a network w x_t + c t + b that predicts x_0; the prediction at x_r gets no gradient."""
    process, rng, (w, b, c) = PROCESSES["ddpm"], np.random.default_rng(batch), (0.7, 0.1, 1e-3)
    t = rng.integers(1, T, batch).astype(np.int32)
    r = nearer_timesteps(t, 2)
    t[-1:], r[-1:] = 5, -1  # whose x_r is the data
    t[1:2], r[1:2] = 9, 6  # where the teacher's x_0 is the end
    x_start, noise = rng.uniform(-1, 1, (2, batch, 1, 2, 3)).astype(np.float32)
    net = Affine(w, b, c)

    def half(x_t, t, cond):
        return 0.5 * x_t + 0.25

    teacher = half if taught else None

    def loss_fn(x_start, t, r, noise):
        return ops.sum(process.consistency_losses(net, x_start, t, r, noise, None, teacher))

    inputs = Tensor(x_start), Tensor(t), Tensor(r), Tensor(noise)
    loss, gradient = MODES[mode](ms.value_and_grad(loss_fn, None, [net.w]))(*inputs)

    level = [values[t].reshape(-1, 1, 1, 1) for values in (process.alphas, process.sigmas)]
    lower = [
        np.append(first, values)[r + 1].reshape(-1, 1, 1, 1) for first, values in ((1, process.alphas), (0, process.sigmas))
    ]
    x_t = level[0] * x_start + level[1] * noise
    goal = 0.5 * x_t + 0.25 if taught else x_start
    x_r = lower[0] * goal + lower[1] * (x_t - level[0] * goal) / level[1]
    if taught:  # Heun's rule
        middle = (goal + 0.5 * x_r + 0.25) / 2
        x_r = lower[0] * middle + lower[1] * (x_t - level[0] * middle) / level[1]
    t, r = (each.reshape(-1, 1, 1, 1) for each in (t, r))
    nearer = np.where(lower[1] <= ANCHOR * lower[0], goal, w * x_r + c * r + b)
    apart = w * x_t + c * t + b - nearer
    distance = np.sqrt((apart**2).mean((1, 2, 3)) + HUBER**2)
    ratios = np.append(0, process.sigmas / process.alphas)[:-1]  # at t - 1
    pace = 1 / np.maximum(1 + np.arange(T), (ratios <= ANCHOR).sum())
    weight = pace[t.ravel()] / pace.mean()
    assert float(loss.asnumpy()) == pytest.approx((weight * (distance - HUBER)).sum(), rel=1e-5)
    slope = (weight * (apart * x_t).mean((1, 2, 3)) / distance).sum()
    assert float(gradient[0].asnumpy().squeeze()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_solution_is_consistent(name):
    """With the teacher E[x_0 | x_t] of Gaussian data, the ends of the exact paths: the loss is the error of the step, which
    is an eighth where the step is half as long. Those of E[x_0 | x_t] do not agree."""
    process = PROCESSES[name]
    mean, end = teacher_of(process)
    (a, b), alphas, sigmas = process.slopes, process.alphas, process.sigmas

    def network(x_0):
        """That predicts x_0 (T,) times x_t."""
        return Scaled(x_0 if process.objective == "x0" else (b - (alphas * b - sigmas * a) * x_0) / sigmas)

    exact, teacher = network(end), Scaled(mean)
    x_start, noise = np.random.default_rng(0).standard_normal((2, 512, 4)).astype(np.float32)
    t = np.linspace(T // 4, 3 * T // 4, 512).astype(np.int32)

    def taught(x_t, t, cond):
        return teacher(x_t, t)

    def loss_of(net, stage):
        def loss(x_start, t, r, noise):
            return ops.mean(process.consistency_losses(net, x_start, t, r, noise, None, taught))

        batch = DATA_STD * x_start, t, nearer_timesteps(t, stage), noise
        return float(compiled(loss)(*map(Tensor, batch)).asnumpy())

    first, second = loss_of(exact, 1), loss_of(exact, 2)
    assert first < 0.05 and second < first / 6
    assert loss_of(network(mean), 2) > 3 * second


# The sampler


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ends_of_exact_paths_have_the_deviation_of_the_data(name, steps):
    process = PROCESSES[name]
    timesteps = sampling_timesteps(T, steps, "trailing")
    end, rng, seen = teacher_of(process)[1], np.random.default_rng(steps), []
    level = process.level(timesteps[0])
    x = math.hypot(level.alpha * DATA_STD, level.sigma) * rng.standard_normal(40_000)
    x = SAMPLERS["consistency"](
        lambda x, t: end[t] * x,
        x,
        process,
        timesteps,
        lambda x: rng.standard_normal(x.shape),
        lambda *step: seen.append(step[0]),
    )
    assert seen == list(range(steps))
    assert x.std() == pytest.approx(DATA_STD, rel=0.02) and abs(x.mean()) < 0.02


# Runs


SMALL = {"dim": 16, "depth": 1, "data.num": 400, "batch_size": 64, "steps_per_call": 1, "log_every": 1}
TUNED = {"total_steps": 6, "save_every": 3, "sample_every": 6, "sample_steps": 1, "consistency": (1, 2), "sample_num": 50}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consistency")
    return md.train("scurve", folder / "start", **SMALL, total_steps=2, sample_steps=2, sample_num=50).home


@pytest.mark.slow
def test_a_tuned_run_resumes_exactly_and_is_sampled_in_its_own_way(trained, tmp_path):
    settings = SMALL | TUNED | {"init_from": str(trained)}
    whole = md.train("scurve", tmp_path / "whole", **settings)
    stop = threading.Event()
    md.train("scurve", tmp_path / "parts", **settings, stop=stop, on_save=lambda run: stop.set())
    assert read_newest(tmp_path / "parts", ["ema"]).state["step"] < 6
    parts = md.train("scurve", tmp_path / "parts", **settings)
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (read_newest(run.home, [name]).arrays[name] for run in (whole, parts))
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)
    start = read_newest(trained, ["ema"]).arrays["ema"]
    kept = {key.removeprefix("teacher."): value for key, value in ours.items() if key.startswith("teacher.")}
    assert kept.keys() == start.keys() and all((kept[key] == start[key]).all() for key in start)
    in_one = whole.sample(40, raw=True, seed=3)
    np.testing.assert_array_equal(in_one, whole.sample(40, raw=True, seed=3, sampler="consistency", steps=1))
    assert not np.array_equal(in_one, whole.sample(40, raw=True, seed=3, sampler="ddim"))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"init_from": None}, "--init-from"),
        ({"consistency": (0.0,)}, "consistency"),
        ({"learn_logvar": True}, "--train.learn-logvar"),
        ({"teacher_guidance_interval": (5, 2)}, "--train.teacher-guidance-interval is 5 2"),
        ({"teacher_guidance": 2.0}, "--train.teacher-guidance"),
    ],
)
def test_what_does_not_fit_is_refused(values, words, tmp_path):
    with pytest.raises(UserError, match=words):
        md.train("scurve", tmp_path, **(SMALL | TUNED | {"init_from": "fashion-mnist-large", "init_partial": True} | values))
