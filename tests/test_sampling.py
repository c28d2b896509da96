"""sampling.py: options, guidance, seeds, and the order of the conditions, with denoisers that are simple functions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Affine

from mindspore import Tensor

from ms_diffusion.process import GaussianDiffusion
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SAMPLERS, SPACINGS, SeededNoise, sampling_timesteps
from ms_diffusion.sampling import Generator, Sampling, sample, sampling_from
from ms_diffusion.schedules import cosine_beta_schedule
from ms_diffusion.training.config import DiffusionTrainConfig, ImageTrainConfig

T = 20
DIFFUSION = GaussianDiffusion(cosine_beta_schedule(T), "x0")
NULL = 3
LEVELS = np.array([-0.3, 0.05, 0.4, 0.1], np.float32)  # of each label; the last is that of no class


def task_of(null_label=NULL, train=None, **options):
    train = train or ImageTrainConfig(**options)
    return SimpleNamespace(
        config=SimpleNamespace(train=train, diffusion=SimpleNamespace(num_timesteps=T)),
        null_label=null_label,
        has_codebook=False,
    )


class Toy(Generator):
    """x_0 = 0.2 x + the level of the label; `calls` has timestep, batch, conditions and whether x_0 was to be clipped."""

    def __init__(self, shape=(1, 2, 2), **options):
        super().__init__(None, DIFFUSION, shape, NULL, **options)
        self.calls = []

    def raw_denoiser(self, clip):
        def denoise(x, t, labels, *cond):
            self.calls.append((t, len(x), [labels.asnumpy(), *(each.asnumpy() for each in cond)], clip))
            level = LEVELS[labels.asnumpy()].reshape((-1,) + (1,) * (x.ndim - 1))
            x_start = Tensor((0.2 * x.asnumpy() + level).astype(np.float32))
            return x_start.clip(-1, 1) if clip else x_start

        return denoise


def labels_of(num):
    return np.arange(num, dtype=np.int32) % NULL


# Options


def test_defaults_are_those_of_the_run():
    own = task_of(sample_guidance=2.0, sample_guidance_interval=(3, 9))
    resolved = Sampling(steps=5).resolve(own)
    assert (resolved.guidance, resolved.guidance_interval) == (2.0, (3, 9))
    resolved = Sampling(steps=5, guidance_interval=(0, 5)).resolve(own)
    assert (resolved.guidance, resolved.guidance_interval) == (2.0, (0, 5))
    resolved = Sampling(steps=5, guidance=4.0).resolve(own)  # the interval belongs to the run's own scale
    assert (resolved.guidance, resolved.guidance_interval) == (4.0, None)
    for task in (task_of(), task_of(None, DiffusionTrainConfig())):
        resolved = Sampling(steps=5).resolve(task)
        assert (resolved.guidance, resolved.guidance_interval) == (1.0, None)
    assert Sampling(steps=5, guidance=1).resolve(task_of(label_dropout=0)).guidance == 1


CLASSES, NO_CLASSES, NO_DROPOUT = task_of(), task_of(None), task_of(label_dropout=0)
POINTS = task_of(None, DiffusionTrainConfig())


@pytest.mark.parametrize(
    "task, options, flag",
    [
        (CLASSES, {"seed": -1}, "--seed is -1"),
        (CLASSES, {"batch_size": 0}, "--batch-size is 0"),
        (CLASSES, {"sampler": "nonsense"}, "--sampler is 'nonsense'"),
        (CLASSES, {"spacing": "nonsense"}, "--spacing is 'nonsense'"),
        (CLASSES, {"steps": 0}, "--steps is 0"),
        (CLASSES, {"steps": T + 1}, f"--steps is {T + 1}"),
        (POINTS, {"steps": T + 1}, f"--steps is {T + 1}"),
        *((CLASSES, {"eta": eta}, "--eta is") for eta in (-0.1, 1.1, float("nan"))),
        *((CLASSES, {"eta": 0.5, "sampler": name}, "--eta is an option of ddim") for name in ("ddpm", "heun", "unipc")),
        (CLASSES, {"s_churn": 9.0}, "--s-churn is an option of heun, not of ddim"),
        (CLASSES, {"s_churn": -1.0, "sampler": "heun"}, "--s-churn is -1"),
        (CLASSES, {"s_noise": 1.01, "sampler": "heun"}, "need --s-churn"),
        (CLASSES, {"s_churn": 9.0, "s_tmin": 2.0, "s_tmax": 1.0, "sampler": "heun"}, "--s-tmin is 2, above --s-tmax 1"),
        (CLASSES, {"v_posterior": 2.0, "sampler": "ddpm"}, "--v-posterior is 2"),
        (CLASSES, {"v_posterior": 0.0}, "--v-posterior is an option of ddpm"),
        *((CLASSES, {"guidance": scale}, "--guidance is") for scale in (-1.0, float("nan"), float("inf"))),
        (CLASSES, {"guidance": 2.0, "guidance_rescale": 2.0}, "--guidance-rescale is 2"),
        (CLASSES, {"guidance": 2.0, "guidance_rescale": -0.1}, "--guidance-rescale is -0.1"),
        (CLASSES, {"guidance_rescale": 0.5}, "--guidance-rescale"),
        (CLASSES, {"guidance_interval": (0, 9)}, "--guidance-interval"),
        (CLASSES, {"guidance": 2.0, "guidance_interval": (9, 0)}, "--guidance-interval is 9 0"),
        (CLASSES, {"guidance": 2.0, "guidance_interval": (0, T)}, f"0..{T - 1}"),
        (CLASSES, {"guidance": 2.0, "guidance_interval": (-1, 3)}, "--guidance-interval is -1 3"),
        (NO_CLASSES, {"guidance": 2.0}, "--guidance is 2"),
        (NO_CLASSES, {"guidance": 0.0}, "--guidance is 0"),
        (POINTS, {"guidance": 2.0}, "--guidance is 2"),
        (NO_DROPOUT, {"guidance": 2.0}, "--train.label-dropout 0"),
        (task_of(None, sample_guidance=3.0), {}, "--train.sample-guidance is 3"),
        (task_of(sample_guidance=3.0, label_dropout=0), {}, "--train.label-dropout 0"),
        (task_of(sample_guidance_interval=(0, 9)), {}, "--guidance-interval"),
        (task_of(sample_guidance=3.0, sample_guidance_interval=(0, T)), {}, "--guidance-interval"),
        (CLASSES, {"device": "tpu"}, "--device is 'tpu'"),
        (CLASSES, {"quantize_denoised": True}, "--quantize-denoised is for runs on latents of a VQ autoencoder"),
        (CLASSES, {"quantize_denoised": True, "sampler": "unipc"}, "is an option of ddpm, ddim, .*, not of unipc"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(task, options, flag):
    with pytest.raises(UserError, match=flag):
        Sampling(**{"steps": 5} | options).resolve(task)


def test_a_sampler_gets_its_own_options(monkeypatch):
    assert Sampling(eta=0.5).make_sampler().keywords == {"eta": 0.5}
    assert Sampling(sampler="ddpm", v_posterior=0.3).make_sampler().keywords == {"v_posterior": 0.3}
    assert Sampling().make_sampler().keywords == Sampling(sampler="euler_ancestral").make_sampler().keywords == {}
    churn = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    assert Sampling(sampler="heun", **churn).make_sampler().keywords == churn

    def mine(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, eta=0.0, other=1):
        return denoise(x, timesteps[0]) + eta

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    sampling = Sampling(sampler="mine", eta=0.25, steps=3).resolve(CLASSES)
    assert sampling.make_sampler().keywords == {"eta": 0.25}
    assert sampling.timesteps(DIFFUSION) == sampling_timesteps(T, 3, "logsnr", DIFFUSION.alphas_cumprod)
    x = Toy().draw(sampling, 1, [labels_of(1)])
    np.testing.assert_allclose(x, 0.2 * SeededNoise(0, [0])((1, 2, 2)) - 0.05, atol=1e-6)


def test_the_spacing_is_the_samplers_unless_one_is_chosen():
    for name in SAMPLERS:
        own = {"ddpm": "linspace", "ddim": "linspace", "euler": "linspace", "consistency": "trailing"}.get(name, "logsnr")
        for spacing in (None, *SPACINGS):
            expected = sampling_timesteps(T, 6, spacing or own, DIFFUSION.alphas_cumprod)
            assert Sampling(sampler=name, steps=6, spacing=spacing).timesteps(DIFFUSION) == expected


# Guidance: in one step from T - 1 to the end the sample is x_0 itself


def one_step(**options):
    return Toy().draw(Sampling(steps=1, **options), 3, [labels_of(3)])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance(scale):
    noise = SeededNoise(0, range(3))((1, 2, 2))
    cond, uncond = 0.2 * noise + LEVELS[:3].reshape(3, 1, 1, 1), 0.2 * noise + LEVELS[NULL]
    expected = (uncond + scale * (cond - uncond)).clip(-1, 1)
    np.testing.assert_allclose(one_step(guidance=scale), expected, atol=1e-6)
    if scale == 1:
        np.testing.assert_array_equal(one_step(), one_step(guidance=1.0))


def test_an_interval_may_be_a_list():
    options = {"guidance": 2.0, "guidance_interval": [150, 750]}
    assert sampling_from(options) == Sampling(guidance=2.0, guidance_interval=(150, 750))


def test_guidance_in_an_interval():
    plain, guided = one_step(), one_step(guidance=3.0)
    np.testing.assert_allclose(one_step(guidance=3.0, guidance_interval=(0, T - 2)), plain, atol=1e-6)
    np.testing.assert_array_equal(one_step(guidance=3.0, guidance_interval=(T - 1, T - 1)), guided)
    toy = Toy()
    toy.draw(Sampling(steps=T, guidance=3.0, guidance_interval=(5, 7)), 1, [labels_of(1)])
    unguided = [t for t, _, (labels,), _ in toy.calls if labels[0] == NULL]
    assert unguided == [7, 6, 5] and len(toy.calls) == T + 3


def test_rescaled_guidance_keeps_the_contrast():
    toy, noise = Toy((1, 8, 8)), SeededNoise(0, range(3))((1, 8, 8))
    x = toy.draw(Sampling(steps=1, guidance=1.5, guidance_rescale=1.0), 3, [labels_of(3)])
    cond, uncond = 0.2 * noise + LEVELS[:3].reshape(3, 1, 1, 1), 0.2 * noise + LEVELS[NULL]
    guided = uncond + 1.5 * (cond - uncond)
    expected = guided * (cond.std((1, 2, 3)) / guided.std((1, 2, 3))).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(x, expected.clip(-1, 1), atol=1e-5)
    half = toy.draw(Sampling(steps=1, guidance=1.5, guidance_rescale=0.5), 3, [labels_of(3)])
    np.testing.assert_allclose(half, ((expected + guided) / 2).clip(-1, 1), atol=1e-5)


def test_x_0_is_clipped_once_and_after_guidance():
    toy = Toy()
    toy.draw(Sampling(steps=2, guidance=2.0), 1, [labels_of(1)])
    assert [clip for *_, clip in toy.calls] == [False] * 4
    toy.calls.clear()
    toy.draw(Sampling(steps=2), 1, [labels_of(1)])
    assert [clip for *_, clip in toy.calls] == [True] * 2
    free = Toy()
    free.diffusion = GaussianDiffusion(cosine_beta_schedule(T), "x0", clip_denoised=False)
    assert abs(free.draw(Sampling(steps=1, guidance=9.0), 3, [labels_of(3)])).max() > 1
    assert abs(one_step(guidance=9.0)).max() == 1


def test_guidance_needs_a_label_for_no_class():
    toy = Toy()
    toy.null_label = None
    with pytest.raises(UserError, match="null_label"):
        toy.denoiser(Sampling(guidance=2.0))


# Seeds, batches, conditions


@pytest.mark.parametrize("options", [*({"sampler": name} for name in SAMPLERS), {"eta": 1.0}], ids=str)
def test_sample_i_of_a_seed_depends_on_neither_number_nor_batch_size(options):
    sampling = Sampling(steps=4, guidance=1.2, **options)

    def draw(num, **changes):
        return Toy((2,)).draw(replace(sampling, **changes), num, [labels_of(num)])

    x = draw(7)
    assert x.shape == (7, 2) and x.dtype == np.float32 and len(np.unique(x, axis=0)) == 7
    np.testing.assert_array_equal(draw(7), x)
    for num, batch_size in ((7, 3), (7, 1), (4, 64), (1, 1)):
        np.testing.assert_allclose(draw(num, batch_size=batch_size), x[:num], atol=1e-6)
    assert (draw(7, seed=1) != x).all(1).all()


def test_images_come_64_a_batch_and_points_all_at_once():
    for shape, num, batches in (((1, 2, 2), 65, [64, 64]), ((1, 2, 2), 5, [5]), ((2,), 200, [200])):
        toy = Toy(shape)
        assert len(toy.draw(Sampling(steps=1), num, [labels_of(num)])) == num
        assert [size for _, size, _, _ in toy.calls] == batches


def test_conditions_reach_the_network_in_order_row_by_row():
    toy, other = Toy((2,), self_condition=True), np.arange(10, dtype=np.float32).reshape(5, 2)
    seen = []
    sampling = Sampling(steps=3, batch_size=2)
    x = toy.draw(sampling, 5, [labels_of(5), other], lambda i, x, x_start: seen.append((i, x_start.asnumpy())))
    assert x.shape == (5, 2) and [i for i, _ in seen] == [0, 1, 2] * 3
    for call, (t, size, (labels, cond, last), _) in enumerate(toy.calls):
        batch, step = divmod(call, 3)
        rows = np.minimum([2 * batch, 2 * batch + 1], 4)  # the last batch is filled up
        assert size == 2 and t == sampling.timesteps(DIFFUSION)[step]
        np.testing.assert_array_equal(labels, labels_of(5)[rows])
        np.testing.assert_array_equal(cond, other[rows])
        expected = np.zeros((2, 2)) if step == 0 else seen[call - 1][1]  # the last x_0; nothing in a batch's first call
        np.testing.assert_array_equal(last, expected)


def test_what_replaces_the_options():
    toy, start = Toy((2,)), np.full((3, 2), 0.5, np.float32)

    def sampler(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
        return x + denoise(x, timesteps[0])

    found = toy.draw(
        Sampling(), 3, [labels_of(3)], start=start, timesteps=[7], sampler=sampler, denoise=lambda x, t, labels: 0 * x + t
    )
    np.testing.assert_array_equal(found, start + 7)


# Any network


def test_any_network_can_be_sampled():
    noise = SeededNoise(5, range(4))((2,))
    x = sample(Affine(0.3, 0.1), DIFFUSION, (2,), 4, steps=1, seed=5)
    np.testing.assert_allclose(x, (0.3 * noise + 0.1).clip(-1, 1), atol=1e-6)


@pytest.mark.parametrize(
    "num, options, word",
    [
        (4, {"stpes": 3}, "stpes"),
        (4, {"steps": T + 1}, "--steps"),
        (4, {"eta": 2.0}, "--eta"),
        (4, {"guidance": 2.0, "steps": 2}, "null_label"),
        (0, {}, "num is 0"),
    ],
)
def test_sample_refuses(num, options, word):
    with pytest.raises(UserError, match=word):
        sample(Affine(0.3, 0.1), DIFFUSION, (2,), num, **options)
