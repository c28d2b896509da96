"""Denoisers and what composes around them; seeded generation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion.denoiser import (
    evaluation_mode,
    exact_denoiser,
    guide,
    inpaint,
    make_denoiser,
    self_conditioned,
    with_label,
    with_self_conditioning,
)
from ms_diffusion.process import OBJECTIVES, DiffusionConfig, GaussianDiffusion
from ms_diffusion.samplers import SAMPLERS, SeededNoise, generate, sample_ddim, sample_plms, sampling_timesteps
from ms_diffusion.schedules import cosine_beta_schedule, linear_beta_schedule

examples = settings(deadline=None, max_examples=100)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def never(*args):
    raise AssertionError("called")


# From the data


@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
def test_the_exact_denoiser_is_the_mean_of_the_posterior(schedule):
    """By Bayes' rule, point by point; under little noise it is the nearest point."""
    rng, process = np.random.default_rng(0), DiffusionConfig(100, schedule, "v", "l2").build(clip_denoised=False)
    data, x = rng.normal(size=(7, 2)), rng.normal(size=(13, 2))
    denoise = exact_denoiser(data, process)
    for t in (0, 40, 99):
        alpha, sigma = process.level(t)
        for found, each in zip(denoise(x, t), x, strict=True):
            log_p = np.array([-((each - alpha * point) ** 2).sum() / (2 * sigma**2) for point in data])
            p = np.exp(log_p - log_p.max())
            np.testing.assert_allclose(found, (p[:, None] * data).sum(0) / p.sum(), rtol=1e-9, atol=1e-9)
    alpha, _ = process.level(0)
    np.testing.assert_allclose(denoise(alpha * (data + 0.01), 0), data, atol=0.01)


# From the network


class Toy(nn.Cell):
    """0.8 x + 0.01 t, + cond, * other."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.float32(0.8)), "w")

    def construct(self, x, t, cond=None, other=None):
        out = self.w * x + 0.01 * t.reshape((-1, 1, 1, 1))
        if cond is not None:
            out = out + cond
        return out if other is None else out * other.reshape((-1, 1, 1, 1))


@pytest.mark.parametrize(
    ("objective", "clip", "batch", "conditional"),
    [
        *((objective, clip, 13, False) for objective in OBJECTIVES for clip in (True, False)),
        ("v", True, 13, True),
        ("v", False, 1, True),
    ],
)
def test_make_denoiser(objective, clip, batch, conditional):
    """x_0 of each objective from its equation, at several t of one graph; PyNative agrees."""
    T = 50
    diffusion = GaussianDiffusion(cosine_beta_schedule(T), objective)
    x = 3 * normal(batch, 1, 2, 2)
    cond = normal(*x.shape, seed=1) if conditional else None
    net, ms_cond = Toy(), Tensor(cond) if conditional else None
    denoise = make_denoiser(diffusion, net, ms_cond, clip)
    beyond = False  # [-1, 1], so that clipping has something to do
    for t in (0, 25, 45):
        alpha_bar = float(np.prod(1 - diffusion.betas[: t + 1]))
        out = 0.8 * x.astype(np.float64) + 0.01 * t + (cond if conditional else 0)
        x_start = {
            "eps": (x - math.sqrt(1 - alpha_bar) * out) / math.sqrt(alpha_bar),
            "x0": out,
            "v": math.sqrt(alpha_bar) * x - math.sqrt(1 - alpha_bar) * out,
        }[objective]
        beyond |= (abs(x_start) > 1).any()
        expected = np.clip(x_start, -1, 1) if clip else x_start
        ours = denoise(Tensor(x), t)
        np.testing.assert_allclose(ours.asnumpy(), expected, rtol=2e-5, atol=2e-5)

        times = Tensor(np.full(batch, t, np.int32))
        eager = diffusion.predict_start(net(Tensor(x), times, ms_cond), Tensor(x), times).asnumpy()
        np.testing.assert_allclose(ours.asnumpy(), np.clip(eager, -1, 1) if clip else eager, rtol=1e-5, atol=1e-5)
    assert beyond


@pytest.mark.parametrize("clip_denoised", [True, False])
def test_the_diffusion_says_whether_the_denoiser_clips(clip_denoised):
    diffusion = GaussianDiffusion(linear_beta_schedule(50), "x0", clip_denoised=clip_denoised)
    x = np.full((1, 1, 2, 2), -9, np.float32)
    found = make_denoiser(diffusion, Toy())(Tensor(x), 3).asnumpy()
    np.testing.assert_allclose(found, -1 if clip_denoised else 0.8 * x + 0.03, rtol=1e-6)


class Dropping(nn.Cell):
    """Two dropouts, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(p=0.5), nn.Dropout(p=0.5)

    def construct(self, x, t):
        return self.second(self.first(x))


def test_evaluation_mode_lasts_for_the_call_alone():
    """Each cell has its own flag again afterwards, also after an error; the network itself drops as its flags say."""
    net, x = Dropping(), Tensor(np.ones((1, 1000), np.float32))
    denoise = make_denoiser(GaussianDiffusion(linear_beta_schedule(50), "x0"), net)
    net.set_train()
    net.second.set_train(False)
    flags = [net.training, net.first.training, net.second.training]
    assert flags == [True, True, False]

    def shares():
        return (net(x, 0).asnumpy() == 0).mean(), (denoise(x, 3).asnumpy() == 0).mean()

    for _ in range(2):
        trained, evaluated = shares()
        assert 0.4 < trained < 0.6 and evaluated == 0
    assert [net.training, net.first.training, net.second.training] == flags
    with pytest.raises(AttributeError):
        denoise(None, 3)
    with pytest.raises(ZeroDivisionError), evaluation_mode(net):
        assert not (net.training or net.first.training or net.second.training)
        _ = 1 / 0
    assert [net.training, net.first.training, net.second.training] == flags


def test_several_conditions_reach_the_network_in_order(batch=13):
    """Those of the call where it gives any, else those of `make_denoiser`."""
    x, cond, other = normal(batch, 1, 2, 2), normal(batch, 1, 2, 2, seed=1), normal(batch, seed=2)
    diffusion = GaussianDiffusion(linear_beta_schedule(50), "x0")
    denoise = make_denoiser(diffusion, Toy(), (Tensor(cond), Tensor(other)), clip=False)

    def expected(cond, other):
        return (0.8 * x + 0.07 + cond) * other.reshape(-1, 1, 1, 1)

    np.testing.assert_allclose(denoise(Tensor(x), 7).asnumpy(), expected(cond, other), rtol=1e-5, atol=1e-6)
    ours = denoise(Tensor(x), 7, Tensor(2 * cond), Tensor(-other)).asnumpy()
    np.testing.assert_allclose(ours, expected(2 * cond, -other), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(denoise(Tensor(x), 7, Tensor(cond)).asnumpy(), 0.8 * x + 0.07 + cond, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def zero_snr_denoisers():
    diffusions = [
        DiffusionConfig(100, objective=name, zero_terminal_snr=True).build(clip_denoised=False) for name in ("x0", "v")
    ]
    return [(diffusion, make_denoiser(diffusion, Toy())) for diffusion in diffusions]


@every_sampler
def test_zero_terminal_snr_through_the_network(sampler, zero_snr_denoisers):
    """The step from pure noise is finite in float32, whatever the sampler."""
    for diffusion, denoise in zero_snr_denoisers:
        x = generate(sampler, denoise, diffusion, sampling_timesteps(100, 5), (1, 2, 2), 5)
        assert np.isfinite(x).all() and 0 < x.std() < 10


# Guidance

X, C, U = (normal(13, 3, 4, 4, seed=seed) for seed in range(3))  # x_t, and the x_0 that two denoisers see in it


@pytest.mark.parametrize("convert", [np.asarray, Tensor])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("clip", [True, False])
def test_guide(convert, scale, clip):
    """uncond + scale (cond - uncond); both see the same x_t, t and conditions."""
    calls = []

    def denoiser(answer):
        return lambda *args: calls.append(args) or convert(answer)

    guided = guide(denoiser(C), denoiser(U), scale, clip=clip)
    given = (convert(X), 7, "label", "other")
    x_start = np.asarray(guided(*given))
    expected = U + scale * (C - U)
    assert abs(expected).max() > 1
    np.testing.assert_allclose(x_start, np.clip(expected, -1, 1) if clip else expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2 and all(a is b for call in calls for a, b in zip(call, given, strict=True))


def test_scale_1_is_the_conditional_denoiser_alone():
    np.testing.assert_array_equal(guide(lambda x, t: C, never, 1.0, rescale=0.7, clip=False)(X, 7), C)
    np.testing.assert_array_equal(guide(lambda x, t: C, never, 1.0)(X, 7), np.clip(C, -1, 1))


def test_guidance_is_the_same_in_eps():
    """As Ho & Salimans state it: (1 + w) eps_cond - w eps_uncond, w = scale - 1."""
    a, s = 0.6, 0.8  # alpha, sigma
    eps_cond, eps_uncond = (X - a * C) / s, (X - a * U) / s
    expected = (X - s * (3 * eps_cond - 2 * eps_uncond)) / a
    ours = guide(lambda x, t: C, lambda x, t: U, 3.0, clip=False)(X, 7)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [np.asarray, Tensor])
def test_rescaled_guidance_has_the_conditional_standard_deviation(convert):
    """Of each sample by itself; between 0 and 1, a weighted mean of the rescaled and the plain."""

    def run(rescale):
        return np.asarray(guide(lambda x, t: convert(C), lambda x, t: convert(U), 4.0, rescale, clip=False)(convert(X), 7))

    np.testing.assert_allclose(run(1.0).std((1, 2, 3)), C.std((1, 2, 3)), rtol=1e-5)
    factor = C.std((1, 2, 3), keepdims=True) / run(0.0).std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(run(1.0), factor * run(0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(0.7), 0.7 * run(1.0) + 0.3 * run(0.0), rtol=1e-5, atol=1e-6)


def test_guidance_keeps_to_its_interval():
    """Both ends belong to it; outside, the unconditional denoiser is not called."""
    calls = []
    guided = guide(lambda x, t: C, lambda x, t: calls.append(t) or U, 3.0, interval=(20, 40), clip=False)
    for t in (0, 19, 20, 30, 40, 41, 99):
        expected = U + 3 * (C - U) if 20 <= t <= 40 else C
        np.testing.assert_allclose(guided(X, t), expected, rtol=1e-5, atol=1e-6)
    assert calls == [20, 30, 40]


@pytest.mark.parametrize("batch", [1, 13])
def test_with_label(batch):
    """All labels become this one, int32; the rest is handed on."""
    x, labels, other = normal(batch, 2), Tensor(np.arange(batch, dtype=np.int32)), object()

    def denoise(x_t, t, labels, cond):
        assert x_t is x and t == 7 and cond is other and labels.asnumpy().dtype == np.int32
        return labels.asnumpy()

    np.testing.assert_array_equal(with_label(denoise, 10)(x, 7, labels, other), np.full(batch, 10))


# Inpainting


@every_sampler
def test_inpainting_keeps_what_is_known(sampler):
    """All of it; elsewhere the sampler gives what it gives without, for a denoiser that looks at single pixels."""
    diffusion = GaussianDiffusion(linear_beta_schedule(1000), "x0")
    rng = np.random.default_rng(0)
    x, known = rng.standard_normal((13, 1, 4, 4)), rng.uniform(-1, 1, (13, 1, 4, 4))
    mask = np.zeros((1, 1, 4, 4))
    mask[..., :3] = 1

    def denoise(x, t):
        return np.tanh(x)

    def run(denoise):
        noise = np.random.default_rng(1)
        return sampler(denoise, x, diffusion, sampling_timesteps(1000, 10), lambda x: noise.standard_normal(x.shape))

    ours, without = run(inpaint(denoise, known, mask)), run(denoise)
    if sampler is sample_plms:  # eps, not x_0, is what it puts together in the last step
        np.testing.assert_allclose(ours[..., :3], known[..., :3], atol=1e-12)
    else:
        np.testing.assert_array_equal(ours[..., :3], known[..., :3])
    np.testing.assert_array_equal(ours[..., 3:], without[..., 3:])


def test_inpainting_by_ddim_noises_the_known_with_one_noise():
    diffusion, timesteps = GaussianDiffusion(linear_beta_schedule(100), "x0"), [90, 60, 25, 3]
    noise, known, states = normal(13, 2), normal(13, 2, seed=1), []
    a = diffusion.alphas_cumprod[timesteps, None, None]
    x_t = np.sqrt(a) * known + np.sqrt(1 - a) * noise
    denoise = inpaint(lambda x, t: 0.5 * x, known, np.array([1, 0]))
    sample_ddim(denoise, x_t[0], diffusion, timesteps, callback=lambda i, x, x_start: states.append(x))
    np.testing.assert_allclose(np.array(states)[:-1, :, 0], x_t[1:, :, 0], rtol=1e-6, atol=1e-6)


# Self-conditioning


@every_sampler
def test_a_denoiser_remembers_its_last_answer(sampler):
    """Zeros, then its own answer of the call before, after the other conditions; each wrapper begins with zeros."""
    calls = []

    def denoise(x, t, label, last):
        calls.append((last, 0.5 * x + 0.1 * last))
        assert label == "label"
        return calls[-1][1]

    diffusion, timesteps = GaussianDiffusion(linear_beta_schedule(100), "x0"), [80, 50, 20]
    outputs = []
    for _ in range(2):
        calls.clear()
        conditioned = with_self_conditioning(denoise)
        sampling = (lambda x, t, d=conditioned: d(x, t, "label"), np.ones((13, 2)), diffusion, timesteps, np.ones_like)
        outputs.append(sampler(*sampling))
        np.testing.assert_array_equal(calls[0][0], np.zeros((13, 2)))
        assert all(later[0] is earlier[1] for earlier, later in zip(calls[:-1], calls[1:], strict=True))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("batch_size", [4, 13])
def test_self_conditioning_begins_anew_in_each_batch(batch_size):
    """With `self_conditioned` an image depends on no other; through the compiled network."""
    diffusion = GaussianDiffusion(linear_beta_schedule(100), "x0")
    denoise = make_denoiser(diffusion, Toy())
    x = generate(self_conditioned(sample_ddim), denoise, diffusion, [99, 50, 10], (1, 2, 2), 13, 3, batch_size)
    last, expected = 0, SeededNoise(3, range(13))((1, 2, 2))
    a = [*diffusion.alphas_cumprod[[99, 50, 10]], 1.0]
    for i, t in enumerate((99, 50, 10)):
        last = np.clip(0.8 * expected + 0.01 * t + last, -1, 1)
        eps = (expected - math.sqrt(a[i]) * last) / math.sqrt(1 - a[i])
        expected = math.sqrt(a[i + 1]) * last + math.sqrt(1 - a[i + 1]) * eps
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


# Generation


@examples
@given(seed=st.integers(0, 2**40), first=st.integers(0, 100), batch=st.sampled_from([1, 4, 13]))
def test_noise_belongs_to_its_image(seed, first, batch):
    """Image i draws the same numbers, draw after draw, whatever else is in its batch."""
    together = SeededNoise(seed, range(first, first + batch))
    alone = SeededNoise(seed, [first + batch - 1])
    for shape in ((2,), (1, 4, 4)):
        x = together(shape)
        assert x.shape == (batch, *shape) and x.dtype == np.float32
        np.testing.assert_array_equal(x[-1:], alone(shape))


def test_noise_is_standard_normal_and_never_the_same():
    noise = SeededNoise(0, range(50))
    x = np.stack([noise((1000,)), noise((1000,)), SeededNoise(1, range(50))((1000,))]).reshape(150, 1000)
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / x.size)
    correlation = np.corrcoef(x) - np.eye(150)  # of images, of draws and of seeds
    assert abs(correlation).max() < 6 / math.sqrt(1000)


class Mixing(nn.Cell):
    """tanh of a mixture of all numbers of a sample, normalised: each of its pixels depends on all of them, on no others."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(normal(64, 64) / 8), "w")

    def construct(self, x, t):
        h = ops.matmul(x.reshape(x.shape[0], -1), self.w) + 0.01 * t.reshape(-1, 1)
        return ops.tanh(h / ops.sqrt((h * h).mean(1, keep_dims=True))).reshape(x.shape)


@pytest.fixture(scope="module")
def mixing_denoiser():
    diffusion = GaussianDiffusion(linear_beta_schedule(20))
    return diffusion, make_denoiser(diffusion, Mixing())


@every_sampler
def test_an_image_depends_on_its_seed_and_index_alone(sampler, mixing_denoiser):
    """The same image i for any batch size and number of images, through a compiled network."""
    diffusion, denoise = mixing_denoiser
    timesteps, shape = sampling_timesteps(20, 3), (1, 8, 8)

    def images(num, batch_size, seed=3):
        return generate(sampler, denoise, diffusion, timesteps, shape, num, seed, batch_size)

    reference = images(13, 64)
    assert reference.shape == (13, *shape) and reference.dtype == np.float32
    assert reference.std() > 0.1
    if sampler is not sample_plms:  # which extrapolates eps in its last step too; the others end in a clipped x_0
        assert abs(reference).max() <= 1
    assert all(abs(a - b).max() > 0.1 for a, b in zip(reference[:-1], reference[1:], strict=True))
    for num, batch_size in ((13, 4), (2, 1)):
        x = images(num, batch_size)
        assert x.shape == (num, *shape)
        np.testing.assert_allclose(x, reference[:num], atol=1e-5)
    assert abs(images(4, 4, seed=4) - reference[:4]).max() > 0.1


@every_sampler
@pytest.mark.parametrize(("num", "batch_size", "sizes"), [(5, 4, [4, 4]), (13, 64, [13]), (1, 1, [1])])
def test_generate_draws_equal_batches(sampler, num, batch_size, sizes):
    """One size, so one graph; each image the sampler's own result on its own noise, exactly."""
    diffusion, timesteps = GaussianDiffusion(cosine_beta_schedule(50), "x0"), [49, 20, 0]
    called, steps = set(), []

    def denoise(x, t):
        called.add(x.shape[0])
        return 0.5 * x + 0.01 * t

    x = generate(
        sampler, denoise, diffusion, timesteps, (2, 3), num, 7, batch_size, lambda i, x, x_start: steps.append((i, len(x)))
    )
    assert called == set(sizes)
    assert steps == [(i, size) for size in sizes for i in range(3)]
    assert x.shape == (num, 2, 3) and x.dtype == np.float32
    for i in range(num):
        rng = np.random.default_rng((7, i))
        start = rng.standard_normal((2, 3), dtype=np.float32).astype(float)
        noise = [rng.standard_normal((2, 3), dtype=np.float32) for _ in timesteps]
        alone = sampler(lambda x, t: 0.5 * x + 0.01 * t, start, diffusion, timesteps, lambda x, noise=noise: noise.pop(0))
        np.testing.assert_allclose(x[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64])
def test_conditions_reach_their_images(batch_size):
    """Row i of each goes with image i, in batches of one size, before what the sampler's own denoiser adds."""
    diffusion = GaussianDiffusion(linear_beta_schedule(50), "x0")
    labels, shifts, seen = np.arange(13, dtype=np.int32), normal(13, 2, 2), []

    def denoise(x, t, labels, shifts, more):
        seen.append((x.shape[0], labels.shape[0], shifts.shape[0], more))
        assert labels.asnumpy().dtype == np.int32
        return labels.reshape((-1, 1, 1)) + shifts + 0 * x

    def sampler(denoise, *args):
        return sample_ddim(lambda x, t: denoise(x, t, "more"), *args)

    x = generate(sampler, denoise, diffusion, [49, 20], (2, 2), 13, batch_size=batch_size, cond=(labels, shifts))
    np.testing.assert_allclose(x, labels[:, None, None] + shifts, rtol=1e-6)
    assert set(seen) == {(min(batch_size, 13),) * 3 + ("more",)}


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64])
def test_generation_begins_with_what_is_given(batch_size):
    """Row i for image i, float32; the sampler's noise is what it is without."""
    diffusion, start = GaussianDiffusion(linear_beta_schedule(50), "x0"), normal(13, 2, 2, seed=1)

    def sampler(denoise, x, diffusion, timesteps, randn_like, callback):
        assert x.asnumpy().dtype == np.float32
        return 2 * x + randn_like(x)

    x = generate(sampler, never, diffusion, [49, 0], (2, 2), 13, 3, batch_size, start=start)
    np.testing.assert_allclose(x, 2 * start + SeededNoise(3, range(13))((2, 2)), rtol=1e-6, atol=1e-6)
    assert x.dtype == np.float32
