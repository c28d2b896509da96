"""Averages of power functions, and their length chosen after training: Karras et al. 2024, section 3."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Parameter, Tensor, nn

from ms_diffusion import kernels
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.checkpoint import Checkpoint, checkpoints
from ms_diffusion.training.config import ImageTrainConfig
from ms_diffusion.training.runs import Run
from ms_diffusion.training.step import EMA, average_after_training, make_optimizer, make_train_step, power_of_length
from ms_diffusion.training.tasks.pixels import PixelConfig


class Walk(nn.Cell):
    def __init__(self):
        super().__init__()
        self.place = Parameter(Tensor(np.array([1.0, -2.0], np.float32)), name="place")

    def construct(self, x):
        return (self.place * x).sum()


def average(path, length):
    """The paper's eq. 3 by its integral: weights tau^gamma between the steps, in closed form."""
    edges = (np.arange(len(path) + 1) / len(path)) ** (power_of_length(length) + 1)
    return np.diff(edges) @ path


def test_lengths_of_the_paper():
    """Section 3.1: sigma_rel of 0.05 and 0.10 are gamma of 16.97 and 6.94."""
    assert power_of_length(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_of_length(0.10) == pytest.approx(6.94, abs=0.005)


@settings(deadline=None)
@given(st.floats(0.01, 0.28))
def test_length_is_the_standard_deviation_of_the_weights(length):
    """Of the density (gamma + 1) tau^gamma on [0, 1], by its moments."""
    gamma = power_of_length(length)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, math.nan])
def test_impossible_length_is_refused(length):
    with pytest.raises(ValueError, match="length"):
        power_of_length(length)


def loss_of(net):
    def loss_fn(x):
        return net(x)

    return loss_fn


@pytest.mark.parametrize("fused", [True, False])
def test_each_average_has_its_own_decay(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(kernels, "available", lambda: False)
    net = Walk()
    ema, extra_emas = EMA(net, 0.9), [EMA(net, length=length) for length in (0.05, 0.2)]
    optimizer = make_optimizer(net, 0.1, 0, 40)
    step = make_train_step(loss_of(net), optimizer, ema, extra_emas=extra_emas)
    path, decayed = [], net.place.asnumpy()
    for n in range(1, 21):
        step(Tensor(np.array([1.0, math.sin(n)], np.float32)))
        path.append(net.place.asnumpy().astype(np.float64))
        decay = min(0.9, (1 + n) / (10 + n))
        decayed = decay * decayed + (1 - decay) * path[-1]
    assert abs(path[-1] - path[0]).max() > 0.5
    np.testing.assert_allclose(ema.averages[0].asnumpy(), decayed, rtol=1e-5)
    for extra, length in zip(extra_emas, (0.05, 0.2), strict=True):
        by_steps = path[0]
        for n, place in enumerate(path[1:], 2):  # the paper's algorithm: decay (1 - 1 / n)^(gamma + 1)
            decay = (1 - 1 / n) ** (power_of_length(length) + 1)
            by_steps = decay * by_steps + (1 - decay) * place
        np.testing.assert_allclose(extra.averages[0].asnumpy(), by_steps, rtol=1e-4)
        np.testing.assert_allclose(by_steps, average(np.array(path), length), rtol=1e-9)


def test_a_saved_average_is_found_again_exactly():
    steps, lengths = [100, 200, 300] * 2, [0.05] * 3 + [0.1] * 3
    np.testing.assert_allclose(average_after_training(steps, lengths, 300, 0.1), [0, 0, 0, 0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(average_after_training(steps, lengths, 200, 0.05), [0, 1, 0, 0, 0, 0], atol=1e-9)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.12, 0.15])
def test_another_length_is_made_of_two(length):
    """A random walk, whose averages differ: the made one is far nearer to the true one than those it is made of."""
    path = np.cumsum(np.random.default_rng(0).standard_normal((4000, 50)), 0)
    steps, lengths = list(range(250, 4001, 250)) * 2, [0.05] * 16 + [0.1] * 16
    saved = np.array([average(path[:step], each) for step, each in zip(steps, lengths, strict=True)])
    made, true = average_after_training(steps, lengths, 4000, length) @ saved, average(path, length)
    nearest = min(np.linalg.norm(saved[i] - true) for i in (15, 31))
    assert np.linalg.norm(made - true) < nearest / 4


SMALL = UnetConfig(dim=8, init_dim=8, dim_mults=(1,), use_convnext=False, resnet_block_groups=4)


@pytest.fixture
def run(tmp_path):
    """A run of three checkpoints with two averages of known values."""
    config = PixelConfig(model=SMALL, train=ImageTrainConfig(ema_lengths=(0.05, 0.1)))
    net = SMALL.build()
    emas = [EMA(net, length=length) for length in (0.05, 0.1)]
    for step in (10, 20, 30):
        for i, each in enumerate(emas):
            each.averages[0].set_data(Tensor(np.full(each.averages[0].shape, 100 * i + step, np.float32)))
        Checkpoint(tmp_path, net, None, EMA(net), extra_emas=emas).save(step)
    (tmp_path / "config.json").write_text(json.dumps(config.to_record()))
    return tmp_path


def test_a_run_makes_the_average(run):
    coefficients = average_after_training([10, 10, 20, 20, 30, 30], [0.05, 0.1] * 3, 30, 0.08)
    loaded = Run(run, ema_length=0.08)
    first = next(iter(loaded.net.get_parameters()))
    expected = coefficients @ [10, 110, 20, 120, 30, 130]
    np.testing.assert_allclose(first.asnumpy(), np.full(first.shape, expected), rtol=1e-5)
    assert loaded.step == 30 and 30 < expected < 130
    loaded = Run(checkpoints(run)[1], ema_length=0.05)  # of an earlier checkpoint, from those up to it
    first = next(iter(loaded.net.get_parameters()))
    np.testing.assert_allclose(first.asnumpy(), np.full(first.shape, 20.0), rtol=1e-5)


def test_a_run_makes_the_average_without_a_spoilt_checkpoint(run, capsys):
    (checkpoints(run)[1] / "ema-0.1.safetensors").write_bytes(b"spoilt")
    coefficients = average_after_training([10, 10, 30, 30], [0.05, 0.1] * 2, 30, 0.08)
    first = next(iter(Run(run, ema_length=0.08).net.get_parameters()))
    expected = coefficients @ [10, 110, 30, 130]
    np.testing.assert_allclose(first.asnumpy(), np.full(first.shape, expected), rtol=1e-5)
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_run_without_averages_says_how_to_get_them(run):
    with pytest.raises(UserError, match="below 0.289"):
        Run(run, ema_length=0.5)
    (run / "config.json").write_text(json.dumps(PixelConfig(model=SMALL).to_record()))
    with pytest.raises(UserError, match="--train.ema-lengths"):
        Run(run, ema_length=0.1)
