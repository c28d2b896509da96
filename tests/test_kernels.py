"""The CPU's own kernels against float64 formulas in NumPy, MindSpore's operators and PyTorch; where they are missing."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.models import attention, layers
from ms_diffusion.models.unet import Unet
from ms_diffusion.runtime import compiled
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

LIBRARY = kernels.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs a C++ compiler")
every_mode = pytest.mark.parametrize("mode", ["graph", "pynative"])


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def native(build):
    """What `build` makes where there are no kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda: False)
        return build()


def drawn(net):
    """The network, with weights of `draw`."""
    for i, p in enumerate(net.get_parameters()):
        p.set_data(Tensor(draw(*p.shape, seed=i)))
    return net


def answers(net, x, mode="pynative"):
    """y = net(x) and the gradients of sum(y * draw) in x and in the parameters."""

    def loss(x, cotangent):
        y = net(x)
        return (y * cotangent).sum(), y

    parameters = net.trainable_params()
    gradient = ms.value_and_grad(loss, 0, parameters or None, has_aux=True)
    cotangent = Tensor(draw(*net(Tensor(x)).shape, seed=9))
    (_, y), gradients = (compiled(gradient) if mode == "graph" else gradient)(Tensor(x), cotangent)
    dx, dparameters = gradients if parameters else (gradients, ())
    return [value.asnumpy() for value in (y, dx, *dparameters)]


def formula_answers(formula, net, x):
    """The same of y = formula(x, *parameters), in float64, the gradients by differences."""
    arrays = [a.astype(np.float64) for a in (x, *(p.asnumpy() for p in net.trainable_params()))]
    y, gradients, h = formula(*arrays), [np.zeros_like(a) for a in arrays], 1e-4
    cotangent = draw(*y.shape, seed=9)
    for a, gradient in zip(arrays, gradients, strict=True):
        for i in np.ndindex(a.shape):
            middle = a[i]
            for a[i], factor in ((middle + h, 0.5 / h), (middle - h, -0.5 / h)):
                gradient[i] += factor * (formula(*arrays) * cotangent).sum()
            a[i] = middle
    return [y, *gradients]


def assert_close(ours, reference, tolerance=1e-5):
    for found, wanted in zip(ours, reference, strict=True):
        assert found.shape == wanted.shape
        scale = max(abs(wanted).max(), 0.01 * math.sqrt(ours[0].size))  # the terms of a sum may cancel
        assert abs(found - wanted).max() <= tolerance * scale


# Float64 formulas


def convolution(stride, padding, groups):
    def formula(x, weight, bias=0.0):
        n, o, k = len(x), len(weight), weight.shape[2]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        seen = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
        seen, weight = seen.reshape(n, groups, -1, *seen.shape[2:]), weight.reshape(groups, o // groups, -1, k, k)
        y = np.einsum("ngchwij,gocij->ngohw", seen, weight)
        return y.reshape(n, o, *y.shape[3:]) + np.reshape(bias, (-1, 1, 1))

    return formula


def gelu(x):
    return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def silu(x):
    return x / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def linear(before=np.array):
    return lambda x, weight, bias: before(x) @ weight.T + bias


def group_norm(groups, before=np.array, after=np.array):
    def formula(x, weight, bias):
        grouped = before(x).reshape(len(x), groups, -1)
        normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
        return after(normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None])

    return formula


def linear_attention(heads):
    def formula(qkv):
        n, c, h, w = qkv.shape
        q, k, v = qkv.reshape(n, 3, heads, -1, h * w).swapaxes(0, 1)
        q, k = (np.exp(a) / np.exp(a).sum(axis, keepdims=True) for a, axis in ((q, 2), (k, 3)))
        return np.einsum("bhdn,bhen,bhdm->bhem", k, v, q, optimize=True).reshape(n, c // 3, h, w) / math.sqrt(q.shape[2])

    return formula


class ScaledNorm(nn.Cell):
    """x -> norm(x), scaled and shifted by the means of x: each image by its own."""

    def __init__(self, *args, **options):
        super().__init__()
        self.norm = layers.GroupNorm(*args, **options)

    def construct(self, x):
        means = ops.mean(x, (2, 3))
        return self.norm(x, means, 2 * means)


def scaled(norm):
    def formula(x, weight, bias):
        means = x.mean((2, 3))
        rows = [norm(x[i : i + 1], weight * (1 + m), bias * (1 + m) + 2 * m) for i, m in enumerate(means)]
        return np.concatenate(rows)

    return formula


class NormConvolution(nn.Cell):
    def __init__(self, norm, conv):
        super().__init__()
        self.norm, self.conv = norm, conv

    def construct(self, x):
        return layers.norm_conv(self.norm, self.conv, x)


def norm_gelu_convolution():
    return NormConvolution(layers.GroupNorm(1, 4, activation="gelu-before"), layers.conv2d(4, 3, 3, padding=1))


def norm_silu_convolution():
    norm = layers.GroupNorm(2, 6, activation="silu-after")
    return NormConvolution(norm, layers.conv2d(6, 4, 4, 2, 1, groups=2, bias=False))


class Shortcut(nn.Cell):
    """x -> linear(x) + x, in one."""

    def __init__(self, width, activation):
        super().__init__()
        self.linear = layers.Linear(width, width, activation)

    def construct(self, x):
        return self.linear(x, x)


def convolution_of(norm, conv):
    return lambda x, weight, bias, *rest: conv(norm(x, weight, bias), *rest)


CASES = {  # name -> (layer, formula, shape of x)
    "convolution": (lambda: layers.conv2d(3, 17, 3, padding=1), convolution(1, 1, 1), (2, 3, 5, 7)),
    "strides": (lambda: layers.conv2d(3, 4, 4, 3, 2, bias=False), convolution(3, 2, 1), (2, 3, 9, 5)),
    "groups": (lambda: layers.conv2d(4, 6, 3, 2, 1, groups=2), convolution(2, 1, 2), (2, 4, 5, 6)),
    "depthwise": (lambda: layers.conv2d(5, 5, 7, 1, 3, groups=5), convolution(1, 3, 5), (2, 5, 4, 9)),
    "depthwise, strides": (lambda: layers.conv2d(3, 3, 5, 2, 1, groups=3), convolution(2, 1, 3), (2, 3, 8, 5)),
    "GroupNorm": (lambda: layers.GroupNorm(2, 6), group_norm(2), (2, 6, 5, 3)),
    "GELU, norm": (lambda: layers.GroupNorm(1, 3, activation="gelu-before"), group_norm(1, before=gelu), (2, 3, 5, 7)),
    "norm, SiLU": (lambda: layers.GroupNorm(3, 6, activation="silu-after"), group_norm(3, after=silu), (2, 6, 5, 3)),
    "norm, scaled": (lambda: ScaledNorm(2, 6), scaled(group_norm(2)), (3, 6, 5, 3)),
    "norm, scaled, SiLU": (
        lambda: ScaledNorm(3, 6, activation="silu-after"),
        scaled(group_norm(3, after=silu)),
        (6, 6, 5, 3),
    ),
    "norm, convolution": (
        norm_gelu_convolution,
        convolution_of(group_norm(1, before=gelu), convolution(1, 1, 1)),
        (2, 4, 5, 3),
    ),
    "norm, strides": (norm_silu_convolution, convolution_of(group_norm(2, after=silu), convolution(2, 1, 2)), (2, 6, 5, 6)),
    "GELU": (layers.GELU, gelu, (2, 3, 5, 7)),
    "SiLU": (layers.SiLU, silu, (2, 3, 5, 7)),
    "linear": (lambda: layers.Linear(3, 17), linear(), (2, 3)),
    "ReLU, linear": (lambda: layers.Linear(40, 70, "relu"), linear(relu), (3, 40)),
    "SiLU, linear": (lambda: layers.Linear(9, 2, "silu"), linear(silu), (2, 9)),
    "linear, shortcut": (lambda: Shortcut(5, "silu"), lambda x, *rest: linear(silu)(x, *rest) + x, (3, 5)),
    "attention, 4 heads": (lambda: kernels.LinearAttention(4), linear_attention(4), (1, 60, 5, 4)),
    "attention, 32 wide": (lambda: kernels.LinearAttention(2), linear_attention(2), (1, 192, 1, 5)),
}


@every_mode
@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_formulas(name, mode):
    build, formula, shape = CASES[name]
    net, x = drawn(build()), draw(*shape)
    assert_close(answers(net, x, mode), formula_answers(formula, net, x))


# Linear layers of all widths: blocks of rows, vectors of columns and what is left of both

BEFORE = {  # activation -> it and its slope
    None: (lambda x: x, np.ones_like),
    "relu": (relu, lambda x: (x > 0).astype(x.dtype)),
    "silu": (silu, lambda x: (1 + x / (1 + np.exp(x))) / (1 + np.exp(-x))),
}


def linear_arrays(batch, c_in, c_out, with_more):
    """x, weight, bias, and more if there is any."""
    return [draw(*shape) for shape in [(batch, c_in), (c_out, c_in), (c_out,), (batch, c_out)][: 3 + with_more]]


def linear_answers(activation, arrays, mode="pynative"):
    """y and the gradients of sum(y * draw) in all of the arrays."""
    layer = kernels.Linear(activation)

    def loss(cotangent, x, weight, bias, more=None):
        y = layer(x, weight, bias, more)
        return (y * cotangent).sum(), y

    gradient = ms.value_and_grad(loss, tuple(range(1, 1 + len(arrays))), has_aux=True)
    cotangent = draw(len(arrays[0]), len(arrays[1]), seed=9)
    (_, y), gradients = (compiled(gradient) if mode == "graph" else gradient)(*map(Tensor, (cotangent, *arrays)))
    return [value.asnumpy() for value in (y, *gradients)]


def linear_formulas(activation, arrays):
    """The same in float64."""
    x, weight, bias, *more = (a.astype(np.float64) for a in arrays)
    before, slope = BEFORE[activation]
    dy = draw(len(x), len(weight), seed=9).astype(np.float64)
    y = before(x) @ weight.T + bias + sum(more)
    return [y, dy @ weight * slope(x), dy.T @ before(x), dy.sum(0), *[dy for _ in more]]


BATCHES, WIDTHS = [1, 2, 13, 130], [1, 2, 3, 16, 17, 31, 64, 65, 100, 128, 200]
LINEAR = dict(activation=st.sampled_from(list(BEFORE)), with_more=st.booleans())


@settings(max_examples=70, deadline=None, derandomize=True)
@given(**LINEAR, batch=st.sampled_from(BATCHES), c_in=st.sampled_from(WIDTHS), c_out=st.sampled_from(WIDTHS))
def test_linear_is_the_formula(activation, with_more, batch, c_in, c_out):
    arrays = linear_arrays(batch, c_in, c_out, with_more)
    assert_close(linear_answers(activation, arrays), linear_formulas(activation, arrays))


@pytest.mark.parametrize("width", WIDTHS)
def test_linear_of_each_width(width):
    """Once in the graph as the input's, once as the output's."""
    i = WIDTHS.index(width)
    for sizes in [(width, WIDTHS[i - 4]), (WIDTHS[i - 5], width)]:
        arrays = linear_arrays(BATCHES[i % 4], *sizes, with_more=i % 2)
        activation = list(BEFORE)[i % 3]
        assert_close(linear_answers(activation, arrays, "graph"), linear_formulas(activation, arrays))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**LINEAR, batch=st.integers(1, 50), c_in=st.integers(1, 90), c_out=st.integers(1, 90))
def test_linear_of_any_shape(activation, with_more, batch, c_in, c_out):
    arrays = linear_arrays(batch, c_in, c_out, with_more)
    assert_close(linear_answers(activation, arrays), linear_formulas(activation, arrays))


@every_mode
@pytest.mark.parametrize("activation", BEFORE)
def test_linear_of_an_empty_batch(activation, mode):
    arrays = linear_arrays(0, 17, 3, True)
    for found, wanted in zip(linear_answers(activation, arrays, mode), linear_formulas(activation, arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)  # no row, and gradients of 0


@pytest.mark.parametrize("activation", BEFORE)
def test_linear_far_from_zero(activation):
    far = np.array([-1e30, -1e4, -500, -90, -88, -80, -1e-30, -0.0, 0, 1e-30, 80, 88, 90, 500, 1e4, 1e30], np.float32)
    x, weight, bias = np.tile(far, (17, 1)), draw(20, len(far)), draw(20)
    x[np.arange(17)[:, None] != np.arange(17)[: len(far)]] = 0  # one to a row, and a row of zeros
    with np.errstate(over="ignore"):
        wanted = linear_formulas(activation, [x, weight, bias])
    for found, value in zip(linear_answers(activation, [x, weight, bias]), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", BEFORE)
def test_linear_passes_nan_on(activation):
    for array in range(4):
        arrays = linear_arrays(7, 9, 18, True)
        arrays[array][3:4] = np.nan  # a row of x and of y, or a column of y
        y = linear_answers(activation, arrays)[0]
        wanted = np.zeros(y.shape, bool)
        wanted[(slice(None), 3) if array in (1, 2) else 3] = True
        np.testing.assert_array_equal(np.isnan(y), wanted)


# MindSpore's operators and PyTorch


def assert_like_mindspore(build, x, tolerance=1e-5):
    assert_close(answers(drawn(build()), x), answers(drawn(native(build)), x), tolerance)


PLAIN = dict(batch=2, size=(9, 5), c_in=3, c_out=3, kind="plain", kernel=3, padding=1, bias=True)
SAMPLED = dict(batch=st.sampled_from([1, 13]), c_in=st.sampled_from([1, 3, 17, 33]), c_out=st.sampled_from([1, 3, 17, 33]))
SAMPLED |= dict(kernel=st.integers(1, 7), stride=st.integers(1, 3), padding=st.integers(0, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@example(**PLAIN, stride=1)
@example(**PLAIN, stride=2)  # the shapes of x and weight are those of before
@given(
    **SAMPLED,
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kind=st.sampled_from(["plain", "groups", "depthwise"]),
    bias=st.booleans(),
)
def test_convolution_like_mindspore(batch, size, c_in, c_out, kind, kernel, stride, padding, bias):
    assume(kernel <= min(size) + 2 * padding)
    c_in, c_out, groups = {"plain": (c_in, c_out, 1), "groups": (2 * c_in, 2 * c_out, 2), "depthwise": (c_in,) * 3}[kind]
    x = draw(batch, c_in, *size)
    assert_like_mindspore(lambda: layers.conv2d(c_in, c_out, kernel, stride, padding, groups, bias), x)


@settings(max_examples=30, deadline=None, derandomize=True)
@example(batch=1, size=(4, 7), c_in=3, c_out=17, kernel=3, stride=1, padding=0)
@example(batch=13, size=(4, 7), c_in=17, c_out=3, kernel=4, stride=2, padding=1)
@example(batch=2, size=(4, 7), c_in=5, c_out=5, kernel=5, stride=3, padding=0)
@given(**SAMPLED, size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_transposed_convolution_like_pytorch_and_mindspore(batch, size, c_in, c_out, kernel, stride, padding):
    torch = pytest.importorskip("torch")
    assume((min(size) - 1) * stride + kernel > 2 * padding)
    x = draw(batch, c_in, *size)
    net = drawn(kernels.Conv2dTranspose(c_in, c_out, kernel, stride, padding))
    twin = nn.Conv2dTranspose(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, has_bias=True)
    arrays = [torch.tensor(a, requires_grad=True) for a in (x, net.weight.asnumpy(), net.bias.asnumpy())]
    y = torch.nn.functional.conv_transpose2d(*arrays, stride, padding)
    y.backward(torch.from_numpy(draw(*y.shape, seed=9)))
    assert_close(answers(net, x), [y.detach().numpy(), *(a.grad.numpy() for a in arrays)])
    assert_close(answers(net, x), answers(drawn(twin), x))


@pytest.mark.parametrize("groups", [1, 2, 4])  # 4 is depthwise
def test_a_frozen_convolution_spares_its_weights_gradient(groups):
    x, net = draw(13, 4, 5, 6), drawn(layers.conv2d(4, 4, 3, 1, 1, groups))
    y, dx, *_ = answers(net, x)
    weight = net.weight
    layers.freeze(net)
    assert_close(answers(net, x), [y, dx])
    gradient = ms.grad(lambda x: net(x).sum(), None, weight)(Tensor(x))
    np.testing.assert_array_equal(gradient.asnumpy(), np.zeros(weight.shape))


def test_larger_layers_like_mindspore():
    for activation in BEFORE:
        assert_like_mindspore(lambda f=activation: layers.Linear(33, 65, f), draw(13, 33))
        assert_like_mindspore(lambda f=activation: Shortcut(33, f), draw(13, 33))
    for groups in (1, 3, 33):
        assert_like_mindspore(lambda groups=groups: layers.GroupNorm(groups, 33), draw(13, 33, 19, 6))
    for heads, width, size in [(1, 5, (5, 7)), (3, 32, (7, 3)), (4, 32, (14, 14)), (2, 5, (1, 1))]:
        assert_like_mindspore(lambda h=heads, w=width: attention.LinearAttention(6, h, w), draw(3, 6, *size), 1e-4)


# Extreme values and other types


def test_group_norm_beside_a_large_mean():
    net, x = drawn(layers.GroupNorm(2, 8)), 1000 + draw(2, 8, 28, 28)
    wanted = group_norm(2)(x.astype(np.float64), net.weight.asnumpy(), net.bias.asnumpy())
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), wanted, atol=1e-3)
    y, *gradients = answers(net, np.full_like(x, 3))  # no deviation from the mean
    np.testing.assert_allclose(y, np.broadcast_to(net.bias.asnumpy()[:, None, None], y.shape), atol=1e-3)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(("layer", "formula"), [(layers.GELU, gelu), (layers.SiLU, silu)])
def test_activations_far_from_zero(layer, formula):
    x, h = np.concatenate([np.linspace(-30, 30, 6001), [0, -0.0, 1e-30, -80, 80, -500, 500]]).astype(np.float32), 1e-4
    y, above, below = (formula(x.astype(np.float64) + d) for d in (0, h, -h))
    for function, wanted in [(layer(), y), (ms.grad(layer()), (above - below) / (2 * h))]:
        np.testing.assert_allclose(function(Tensor(x)).asnumpy(), wanted, rtol=1e-6, atol=1e-6)
        assert np.isnan(function(Tensor(np.full(40, np.nan, np.float32))).asnumpy()).all()


def test_float16_is_refused_and_left_to_mindspore(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where a failing graph leaves rank_0/
    x = draw(1, 15, 5, 7)
    for core, arrays in [(kernels.LinearAttention(1), [x]), (kernels.Linear(), linear_arrays(2, 3, 4, True))]:
        for run in (core, ms.jit(core)):
            with pytest.raises(TypeError, match="takes float32"):
                run(*[Tensor(a, ms.float16) for a in arrays]).asnumpy()

    def build():
        return nn.SequentialCell(
            layers.conv2d(15, 4, 3, padding=1), layers.Upsample(4), nn.Flatten(), layers.Linear(560, 3, "relu")
        )

    ours, theirs = drawn(build()), drawn(native(build))
    layers.set_compute_type(ours, ms.float16)
    layers.set_compute_type(theirs, ms.float16)
    np.testing.assert_equal(answers(ours, x), answers(theirs, x))
    layers.set_compute_type(ours, ms.float32)
    np.testing.assert_equal(answers(ours, x), answers(drawn(build()), x))


MISFITS = {
    "channels": (lambda: layers.conv2d(3, 2, 3), (1, 5, 8, 8), "3 channels"),
    "transposed": (lambda: layers.Upsample(3), (1, 5, 3, 8), "3 channels"),
    "kernel": (lambda: layers.conv2d(3, 2, 5), (1, 3, 4, 8), "does not fit"),
    "axes": (lambda: layers.conv2d(3, 2, 3), (3, 8, 8), "shape"),
    "norm": (lambda: layers.GroupNorm(1, 4), (1, 5, 3, 8), "4 channels"),
    "norm, axes": (lambda: layers.GroupNorm(1, 4), (1, 4, 8), "shape"),
    "linear": (lambda: layers.Linear(3, 2), (4, 5), "3 inputs"),
    "linear, axes": (lambda: layers.Linear(3, 2), (2, 3, 3), "shape"),
    "heads": (lambda: kernels.LinearAttention(4), (1, 30, 4, 4), "4 heads"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    build, shape, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        build()(Tensor(draw(*shape))).asnumpy()


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (4,), (3, 4)], ids=str)
def test_linear_refuses_another_shape_of_more(shape, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    layer, x = layers.Linear(3, 4), Tensor(draw(2, 3))
    with pytest.raises(ValueError, match="shape"):
        layer(x, Tensor(draw(*shape))).asnumpy()


def test_an_empty_batch():
    for build, _, shape in CASES.values():
        y = build()(Tensor(np.zeros((0, *shape[1:]), np.float32)))
        assert len(y) == 0 and y.shape[1:] == build()(Tensor(draw(*shape))).shape[1:]


# Training


def trained(clip, follow, steps=5):
    """Losses, gradient norms, and what the steps leave in a small network, its optimizer and its average."""
    net = nn.SequentialCell(layers.conv2d(1, 5, 3, padding=1), layers.SiLU(), layers.conv2d(5, 1, 3, padding=1))
    layers.name_and_initialise(net, seed=0)
    optimizer, ema = make_optimizer(net, 0.05, 2, 6), EMA(net, 0.3) if follow else None

    def loss_fn(x):
        return ops.square(net(x) - 3).mean()

    step = make_train_step(loss_fn, optimizer, ema, clip)
    found = [value for i in range(steps) for value in step(Tensor(draw(4, 1, 5, 7, seed=i)))]
    state = [optimizer.global_step, *optimizer.parameters, *optimizer.moment1, *optimizer.moment2]
    state += [optimizer.beta1_power, optimizer.beta2_power, *(ema.averages if follow else ())]
    return [value.asnumpy().copy() for value in [*found, *state]]


@pytest.mark.parametrize(("clip", "follow"), [(0.5, True), (0.5, False), (1e3, True), (1e3, False)])
def test_steps_like_mindspore(clip, follow):
    ours, reference = trained(clip, follow), native(lambda: trained(clip, follow))
    assert (min(reference[1:10:2]) > clip) == (max(reference[1:10:2]) > clip) == (clip < 1)  # clipped always, or never
    for found, wanted in zip(ours, reference, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())


# The same each time


def everything():
    found = [answers(drawn(build()), draw(13, *shape[1:])) for build, _, shape in CASES.values()]
    return sum(found, trained(0.5, True, steps=2))


def test_same_results_again_and_on_one_core(tmp_path):
    first, folder = everything(), Path(__file__).parent
    np.testing.assert_equal(first, everything())
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "import conftest, numpy, test_kernels; numpy.savez('one.npz', *test_kernels.everything())"
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    with np.load(tmp_path / "one.npz") as one:
        for found, wanted in zip(one.values(), first, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * abs(wanted).max())


def test_a_copy_has_its_own_parameters():
    net, x = drawn(nn.SequentialCell(layers.conv2d(3, 3, 3), layers.GroupNorm(1, 3), layers.GELU())), draw(2, 3, 5, 4)
    before, twin = answers(net, x), copy.deepcopy(net)
    np.testing.assert_equal(answers(twin, x), before)
    for p in twin.get_parameters():
        p.set_data(p * 2)
    np.testing.assert_equal(answers(net, x), before)
    assert (answers(twin, x)[0] != before[0]).any()


# The compiled library and its absence


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A home folder where nothing has been compiled."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CXX", "MS_DIFFUSION_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    kernels.library.cache_clear()
    yield tmp_path
    kernels.library.cache_clear()


FALLBACKS = {
    "off": ({"MS_DIFFUSION_KERNELS": "off"}, ""),
    "no compiler": ({"PATH": "/nowhere"}, "no C++ compiler was found"),
    "compiler fails": ({"CXX": "false"}, "failed: no message"),
    "compiler makes nothing": ({"CXX": "true"}, "does not run here"),
    "nowhere to write": ({"CXX": "true", "HOME": "/dev/null"}, "Not a directory"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_mindspores_operators_where_the_kernels_are_missing(case, fresh, monkeypatch, capsys):
    changes, note = FALLBACKS[case]
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    net = Unet(8, dim_mults=(1, 2), channels=1)
    assert {type(c) for _, c in net.cells_and_names() if isinstance(c, nn.Conv2d)} == {nn.Conv2d}
    assert np.isfinite(net(Tensor(draw(2, 1, 8, 8)), Tensor(draw(2))).asnumpy()).all()
    assert not kernels.available()
    err = capsys.readouterr().err  # one line, once
    assert err == "" if note == "" else err.startswith("note: ") and err.count("\n") == 1 and note in err


def test_a_spoilt_library_is_built_anew(fresh, monkeypatch, capsys):
    builder, builds, good = fresh / "c++", fresh / "builds", Path(LIBRARY).read_bytes()
    builder.write_text(f"#!/bin/sh\necho >> {builds}\nwhile [ $1 != -o ]; do shift; done\ncp {LIBRARY} $2\n")
    builder.chmod(0o755)
    monkeypatch.setenv("CXX", str(builder))
    path = Path(kernels.library())
    for count, content in [(1, good), (2, b"garbage"), (3, good[: len(good) // 2]), (4, b"")]:
        path.write_bytes(content)
        kernels.library.cache_clear()
        assert kernels.library() == str(path) and path.read_bytes() == good
        assert builds.read_text().count("\n") == count
    assert list(fresh.glob(".cache/*/*/*")) == [path]  # nothing left beside it
    assert capsys.readouterr().err == ""
