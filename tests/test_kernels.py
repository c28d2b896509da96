"""The library's own CPU kernels against float64 formulas in NumPy, MindSpore's operators and PyTorch; threads, forks, the
compiled library and what happens without it. `kernels/driver.cc` checks the same operators under sanitizers."""

import copy
import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.files import private_folder, process_folder, temporary_path
from ms_diffusion.models import attention, layers
from ms_diffusion.runtime import compiled
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

LIBRARY = kernels.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs a C++ compiler")


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def native(build):
    """The result of `build` where the kernels are not available: layers of MindSpore's operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda: False)
        return build()


def drawn(net):
    """The network, with weights from `draw`."""
    for i, p in enumerate(net.get_parameters()):
        p.set_data(Tensor(draw(*p.shape, seed=i)))
    return net


def answers(net, x):
    """y = net(x) and the gradients of sum(y * draw) with respect to x and to the parameters, in PyNative mode."""

    def loss(x, cotangent):
        y = net(x)
        return (y * cotangent).sum(), y

    parameters = net.trainable_params()
    cotangent = Tensor(draw(*net(Tensor(x)).shape, seed=9))
    (_, y), gradients = ms.value_and_grad(loss, 0, parameters or None, has_aux=True)(Tensor(x), cotangent)
    dx, dparameters = gradients if parameters else (gradients, ())
    return [value.asnumpy() for value in (y, dx, *dparameters)]


def formula_answers(formula, net, x):
    """The same of y = formula(x, *parameters), in float64, with central differences as gradients."""
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


def softmax_attention(heads):
    def formula(qkv):
        b, n, c = qkv.shape
        q, k, v = qkv.reshape(b, n, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3]))
        return (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(b, n, c // 3)

    return formula


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class OfImages(nn.Cell):
    """x (6, dim) -> layer(x, ...), with `count` parameters (2, dim), of two images of three rows."""

    def __init__(self, layer, count, dim):
        super().__init__()
        self.layer, self.count = layer, count
        self.first, self.second = [Parameter(Tensor(np.zeros((2, dim), np.float32)), name) for name in ("first", "second")]
        self.second.requires_grad = count == 2

    def construct(self, x):
        return self.layer(x, self.first, self.second) if self.count == 2 else self.layer(x, 2 * x, self.first)


def ada_norm(x, scale, shift):
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.01)
    return normal * (1 + scale.repeat(3, 0)) + shift.repeat(3, 0)


class ScaledNorm(nn.Cell):
    """x -> norm(x), scaled and shifted by the means of x, which differ between the images."""

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
    """x -> linear(x) + x, in one operator."""

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
    "GELU, linear": (lambda: layers.Linear(9, 2, "gelu-tanh"), linear(gelu_tanh), (3, 9)),
    "adaptive norm": (lambda: OfImages(layers.AdaLayerNorm(0.01), 2, 19), ada_norm, (6, 19)),
    "gated sum": (lambda: OfImages(layers.GatedSum(), 1, 19), lambda x, gate: x + 2 * x * gate.repeat(3, 0), (6, 19)),
    "softmax attention": (lambda: kernels.Attention(2), softmax_attention(2), (2, 7, 18)),
    "softmax attention, 60 tokens": (lambda: kernels.Attention(1), softmax_attention(1), (1, 60, 9)),
    "attention, 4 heads": (lambda: kernels.LinearAttention(4), linear_attention(4), (1, 60, 5, 4)),
    "attention, 32 wide": (lambda: kernels.LinearAttention(2), linear_attention(2), (1, 192, 1, 5)),
}


@functools.cache
def case(name):
    """The layer, x and the formula's answers."""
    build, formula, shape = CASES[name]
    net, x = drawn(build()), draw(*shape)
    return net, x, formula_answers(formula, net, x)


@pytest.fixture(scope="module")
def graph_answers():
    """name -> what `answers` returns, from one graph of all layers."""
    nets, xs, wanted = zip(*map(case, CASES), strict=True)
    parameters = [net.trainable_params() for net in nets]
    for i, group in enumerate(parameters):
        for p in group:
            p.name = f"{i}.{p.name}"
    nets = nn.CellList(list(nets))

    def loss(cotangents, *xs):  # MindSpore returns no gradients for a tuple
        total, ys = 0, ()
        for i in range(len(nets)):
            y = nets[i](xs[i])
            total += (y * cotangents[i]).sum()
            ys += (y,)
        return total, ys

    places = tuple(range(1, 1 + len(nets)))
    gradient = compiled(ms.value_and_grad(loss, places, sum(parameters, []), has_aux=True))
    cotangents = tuple(Tensor(draw(*y.shape, seed=9)) for y, *_ in wanted)
    (_, ys), (dxs, dparameters) = gradient(cotangents, *map(Tensor, xs))
    rest = iter(dparameters)
    found = [(y, dx, *(next(rest) for _ in group)) for y, dx, group in zip(ys, dxs, parameters, strict=True)]
    return {name: [value.asnumpy() for value in values] for name, values in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_formulas(name):
    net, x, wanted = case(name)
    assert_close(answers(net, x), wanted)


@pytest.mark.parametrize("name", CASES)
def test_answers_in_graph_mode_are_the_formulas(name, graph_answers):
    assert_close(graph_answers[name], case(name)[2])


# Linear layers of all widths: whole and partial blocks of rows and vectors of columns

INPUT_ACTIVATIONS = {  # name -> function and derivative
    None: (lambda x: x, np.ones_like),
    "relu": (relu, lambda x: (x > 0).astype(x.dtype)),
    "silu": (silu, lambda x: (1 + x / (1 + np.exp(x))) / (1 + np.exp(-x))),
}


def linear_arrays(batch, c_in, c_out, with_residual):
    """x, weight, bias, and perhaps a residual."""
    return [draw(*shape) for shape in [(batch, c_in), (c_out, c_in), (c_out,), (batch, c_out)][: 3 + with_residual]]


@functools.cache
def linear_gradient(activation, count):
    """loss(cotangent, x, weight, bias, residual), where `count` arrays follow the cotangent, with gradients."""
    layer = kernels.Linear(activation)

    def loss(cotangent, x, weight, bias, residual=None):
        y = layer(x, weight, bias, residual)
        return (y * cotangent).sum(), y

    return ms.value_and_grad(loss, tuple(range(1, 1 + count)), has_aux=True)


def linear_answers(activation, arrays):
    """y and the gradients of sum(y * draw) with respect to all arrays."""
    cotangent = draw(len(arrays[0]), len(arrays[1]), seed=9)
    (_, y), gradients = linear_gradient(activation, len(arrays))(*map(Tensor, (cotangent, *arrays)))
    return [value.asnumpy() for value in (y, *gradients)]


def linear_formulas(activation, arrays):
    """The same in float64."""
    x, weight, bias, *residual = (a.astype(np.float64) for a in arrays)
    before, slope = INPUT_ACTIVATIONS[activation]
    dy = draw(len(x), len(weight), seed=9).astype(np.float64)
    y = before(x) @ weight.T + bias + sum(residual)
    return [y, dy @ weight * slope(x), dy.T @ before(x), dy.sum(0), *[dy for _ in residual]]


BATCHES, WIDTHS = [1, 2, 13, 130], [1, 2, 3, 16, 17, 31, 64, 65, 100, 128, 200]
SIZES = st.tuples(st.sampled_from(BATCHES), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS))
ANY_SIZES = st.tuples(st.integers(1, 50), st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=70, deadline=None, derandomize=True)
@given(activation=st.sampled_from(list(INPUT_ACTIVATIONS)), with_residual=st.booleans(), sizes=SIZES | ANY_SIZES)
def test_linear_is_the_formula(activation, with_residual, sizes):
    arrays = linear_arrays(*sizes, with_residual)
    assert_close(linear_answers(activation, arrays), linear_formulas(activation, arrays))


@pytest.mark.parametrize("width", WIDTHS)
def test_linear_of_each_width(width):
    """Each width occurs once as that of the input and once as that of the output."""
    i = WIDTHS.index(width)
    for sizes in [(width, WIDTHS[i - 4]), (WIDTHS[i - 5], width)]:
        arrays = linear_arrays(BATCHES[i % 4], *sizes, with_residual=i % 2)
        activation = list(INPUT_ACTIVATIONS)[i % 3]
        assert_close(linear_answers(activation, arrays), linear_formulas(activation, arrays))


@pytest.mark.parametrize("activation", INPUT_ACTIVATIONS)
def test_linear_of_an_empty_batch(activation):
    arrays = linear_arrays(0, 17, 3, True)
    for found, wanted in zip(linear_answers(activation, arrays), linear_formulas(activation, arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)  # no row, and gradients of 0


@pytest.mark.parametrize("activation", INPUT_ACTIVATIONS)
def test_linear_far_from_zero(activation):
    far = np.array([-1e30, -1e4, -500, -90, -88, -80, -1e-30, -0.0, 0, 1e-30, 80, 88, 90, 500, 1e4, 1e30], np.float32)
    x, weight, bias = np.tile(far, (17, 1)), draw(20, len(far)), draw(20)
    x[np.arange(17)[:, None] != np.arange(17)[: len(far)]] = 0  # one number in each row, and a row of zeros
    with np.errstate(over="ignore"):
        wanted = linear_formulas(activation, [x, weight, bias])
    for found, value in zip(linear_answers(activation, [x, weight, bias]), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", INPUT_ACTIVATIONS)
def test_linear_keeps_nan(activation):
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


@settings(max_examples=30, deadline=None, derandomize=True)
@example(**PLAIN, stride=1)
@example(**PLAIN, stride=2)  # x and weight have the shapes of the example above
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


@settings(max_examples=12, deadline=None, derandomize=True)
@example(batch=1, size=(4, 7), c_in=3, c_out=17, kernel=3, stride=1, padding=0)
@example(batch=13, size=(4, 7), c_in=17, c_out=3, kernel=4, stride=2, padding=1)
@example(batch=2, size=(4, 7), c_in=5, c_out=5, kernel=5, stride=3, padding=0)
@given(**SAMPLED, size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_transposed_convolution_like_pytorch_and_mindspore(batch, size, c_in, c_out, kernel, stride, padding):
    torch = pytest.importorskip("torch")
    assume((min(size) - 1) * stride + kernel > 2 * padding)
    x = draw(batch, c_in, *size)
    net = drawn(layers.Conv2dTranspose(c_in, c_out, kernel, stride, padding))
    twin = nn.Conv2dTranspose(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, has_bias=True)
    arrays = [torch.tensor(a, requires_grad=True) for a in (x, net.weight.asnumpy(), net.bias.asnumpy())]
    y = torch.nn.functional.conv_transpose2d(*arrays, stride, padding)
    y.backward(torch.from_numpy(draw(*y.shape, seed=9)))
    assert_close(answers(net, x), [y.detach().numpy(), *(a.grad.numpy() for a in arrays)])
    assert_close(answers(net, x), answers(drawn(twin), x))


@pytest.mark.parametrize("groups", [1, 2, 4])  # 4 is depthwise
def test_a_frozen_convolution_has_no_weight_gradient(groups):
    x, net = draw(13, 4, 5, 6), drawn(layers.conv2d(4, 4, 3, 1, 1, groups))
    y, dx, *_ = answers(net, x)
    weight = net.weight
    layers.freeze(net)
    assert_close(answers(net, x), [y, dx])
    gradient = ms.grad(lambda x: net(x).sum(), None, weight)(Tensor(x))
    np.testing.assert_array_equal(gradient.asnumpy(), np.zeros(weight.shape))


def test_larger_layers_like_mindspore():
    for activation in INPUT_ACTIVATIONS:
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
    y, *gradients = answers(net, np.full_like(x, 3))  # a variance of 0
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
    monkeypatch.chdir(tmp_path)  # a graph that fails writes rank_0/
    x = draw(1, 15, 5, 7)
    for cell, arrays in [(kernels.LinearAttention(1), [x]), (kernels.Linear(), linear_arrays(2, 3, 4, True))]:
        for run in (cell, ms.jit(cell)):
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
    "heads": (lambda: kernels.LinearAttention(4), (1, 30, 4, 4), "4 heads"),
    "softmax, heads": (lambda: kernels.Attention(4), (1, 5, 30), "4 heads"),
    "rows": (lambda: OfImages(layers.AdaLayerNorm(0.01), 2, 4), (3, 4), "each image"),
    "rows of a sum": (lambda: OfImages(layers.GatedSum(), 1, 4), (6, 5), "each image"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    build, shape, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        build()(Tensor(draw(*shape))).asnumpy()


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (4,), (3, 4)], ids=str)
def test_linear_refuses_another_shape_of_the_residual(shape, monkeypatch, tmp_path):
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
    """Losses and gradient norms of some steps, then the state of a small network, its optimizer and its average."""
    net = nn.SequentialCell(layers.conv2d(1, 5, 3, padding=1), layers.SiLU(), layers.conv2d(5, 1, 3, padding=1))
    layers.name_and_initialise(net, seed=0)
    optimizer, ema = make_optimizer(net, 0.05, 2, 6), EMA(net, 0.3) if follow else None

    def loss_fn(x):
        return ops.square(net(x) - 3).mean()

    step = make_train_step(loss_fn, optimizer, ema, clip_norm=clip)
    found = [value for i in range(steps) for value in step(Tensor(draw(4, 1, 5, 7, seed=i)))]
    state = [optimizer.global_step, *optimizer.parameters, *optimizer.moment1, *optimizer.moment2]
    state += [optimizer.beta1_power, optimizer.beta2_power, *(ema.averages if follow else ())]
    return [value.asnumpy().copy() for value in [*found, *state]]


@pytest.mark.parametrize(("clip", "follow"), [(0.5, True), (1e3, False)])
def test_steps_like_mindspore(clip, follow):
    ours, reference = trained(clip, follow), native(lambda: trained(clip, follow))
    assert (min(reference[1:10:2]) > clip) == (max(reference[1:10:2]) > clip) == (clip < 1)  # every norm is clipped, or none
    for found, wanted in zip(ours, reference, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())


# Threads, forks, failures


@pytest.fixture
def library():
    """The library; the number of its threads is restored afterwards."""
    library = ctypes.CDLL(LIBRARY)
    count = library.get_threads()
    yield library
    library.set_threads(count)


def test_the_number_of_threads_hardly_changes_results(library):
    nets = [(drawn(build()), draw(14, *shape[1:])) for build, _, shape in CASES.values()]
    library.set_threads(1)
    wanted = [answers(net, x) for net, x in nets]
    for count in (2, 5, 5):
        library.set_threads(count)
        found = [answers(net, x) for net, x in nets]
        for a, b in zip(sum(found, []), sum(wanted, []), strict=True):  # only sums over images differ
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * abs(b).max())
    np.testing.assert_equal(found, [answers(net, x) for net, x in nets])  # the same again with as many threads


CGROUPS = {  # name -> /proc/self/cgroup, files below /sys/fs/cgroup, CPUs
    "v2": ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
    "v2, in a container": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "v1": ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
    "v1, of the container": ("4:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    "v1, no quota": ("4:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    "other controllers": ("3:cpuset:/\n2:memory:/", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, math.inf),
    "none": ("", {}, math.inf),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_cpu_quota(name, tmp_path):
    groups, files, cpus = CGROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert kernels.cpu_quota(groups, tmp_path) == cpus


def test_thread_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(kernels, "cpu_quota", lambda *_: limit)
    monkeypatch.setattr(kernels, "OMP_FROM_MINDSPORE", False)
    cases = [("", math.inf, 8), ("3", math.inf, 3), ("4,2", 6, 4), ("64", 2.5, 3), ("x", 0.5, 1), ("0", 5, 5)]
    for value, quota, wanted in cases:
        limit = quota
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert kernels.thread_count() == wanted


@pytest.mark.slow
def test_mindspores_omp_num_threads_is_not_the_users():
    """MindSpore sets OMP_NUM_THREADS=1 in the C environment, which a child process may inherit."""
    code = "from ms_diffusion import kernels; print(kernels.OMP_FROM_MINDSPORE)"
    env = {k: v for k, v in os.environ.items() if k != kernels.MARK} | {"OMP_NUM_THREADS": "1"}
    for mark, wanted in [({kernels.MARK: "1"}, "True\n"), ({}, "False\n")]:
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=env | mark, capture_output=True, text=True
        )
        assert run.stdout == wanted, run.stderr


FORKS = """
import ctypes, os, sys, threading, time
import numpy as np

library = ctypes.CDLL(sys.argv[1])
library.set_threads(3)


def silu(n):
    x, y = np.ones(n, np.float32), np.zeros(n, np.float32)
    shape = (ctypes.c_int64 * 1)(n)
    data, ndims = (ctypes.c_void_p * 2)(x.ctypes.data, y.ctypes.data), (ctypes.c_int * 2)(1, 1)
    shapes, types = (ctypes.POINTER(ctypes.c_int64) * 2)(shape, shape), (ctypes.c_char_p * 2)(b"float32", b"float32")
    assert library.silu(2, data, ndims, shapes, types, None, None) == 0
    return abs(y - 0.7310586).max() < 1e-6


def compute():
    while True:
        silu(1 << 14)


threading.Thread(target=compute, daemon=True).start()
children = []
for _ in range(40):
    time.sleep(0.003)
    child = os.fork()
    if child == 0:
        os._exit(0 if silu(1000) else 1)
    children.append(child)
end, codes = time.time() + 60, {}
while len(codes) < len(children) and time.time() < end:
    time.sleep(0.01)
    for child in children:
        if child not in codes:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = status
for child in children:
    if child not in codes:
        os.kill(child, 9)
print(sum(status == 0 for status in codes.values()))
os._exit(0)
"""


def test_a_fork_while_another_thread_computes():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS, LIBRARY], capture_output=True, text=True, timeout=90)
    assert (run.stdout, run.stderr) == ("40\n", "")


def test_an_operator_that_fails_raises_within_seconds():
    """It does not wait for the event that `compiled` sets at the end of a graph. MindSpore itself takes 3 s."""
    table = Tensor(draw(4, 3))

    def gather(i):
        return ops.gather(table, i, 0)

    run = compiled(gather)
    np.testing.assert_array_equal(run(Tensor([1], ms.int32)).asnumpy(), table.asnumpy()[1:2])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="77"):
        run(Tensor([77], ms.int32)).asnumpy()
    assert time.monotonic() - start < 10
    np.testing.assert_array_equal(compiled(ops.neg)(table).asnumpy(), -table.asnumpy())


def test_compiled_waits_without_spinning_and_passes_keywords():
    def sleep(x):
        end = time.thread_time() + 0.7
        while time.thread_time() < end:  # longer than one wait for the event
            pass
        return x

    slow = ops.Custom(sleep, out_shape=lambda x: x, out_dtype=lambda x: x, func_type="pyfunc")

    def step(x, scale, shift=None):
        return slow(x * scale) if shift is None else slow(x * scale) + shift

    run, x = compiled(step), Tensor(draw(3))
    start = time.thread_time()
    y = run(x, shift=x, scale=x + 1)
    assert time.thread_time() - start < 0.5
    np.testing.assert_allclose(y.asnumpy(), x.asnumpy() * (x.asnumpy() + 1) + x.asnumpy(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_the_driver_under_sanitizers(sanitizers, tmp_path):
    """`kernels/driver.cc` compares all operators with loops in double, on random shapes and numbers of threads."""
    driver, here = tmp_path / "driver", Path(__file__).parent
    flags = [f for f in kernels.FLAGS if f not in ("-O3", "-shared", "-fPIC", "-fvisibility=hidden")]
    flags += "-O1 -g -Wall -Wextra -Wconversion -Werror -fno-sanitize-recover=all".split() + [f"-fsanitize={sanitizers}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, here / "kernels/driver.cc", kernels.SOURCES[0], "-o", driver], check=True)
    run = subprocess.run([driver, "0", "200"], capture_output=True, text=True)
    assert run.returncode == 0 and ", 0 failures" in run.stdout, run.stderr[-4000:]


def test_a_copy_has_its_own_parameters():
    net, x = drawn(nn.SequentialCell(layers.conv2d(3, 3, 3), layers.GroupNorm(1, 3), layers.GELU())), draw(2, 3, 5, 4)
    before, twin = answers(net, x), copy.deepcopy(net)
    np.testing.assert_equal(answers(twin, x), before)
    for p in twin.get_parameters():
        p.set_data(p * 2)
    np.testing.assert_equal(answers(net, x), before)
    assert (answers(twin, x)[0] != before[0]).any()


# The compiled library, and layers without it


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and an empty folder for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("CXX", "MS_DIFFUSION_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    for cached in (kernels.library, process_folder):
        cached.cache_clear()
    yield tmp_path
    for cached in (kernels.library, process_folder):
        cached.cache_clear()


@pytest.fixture
def compiler(fresh, monkeypatch):
    """compiler(script): the shell script is the C++ compiler. Without a script it copies the library, and notes that in the
    file `builds`."""

    def compiler(script=f"echo >> {fresh}/builds; while [ $1 != -o ]; do shift; done; cp {LIBRARY} $2"):
        (fresh / "c++").write_bytes(b"#!/bin/sh\n" + (script if isinstance(script, bytes) else script.encode()) + b"\n")
        (fresh / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(fresh / "c++"))

    compiler()
    return compiler


def builds(fresh):
    return (fresh / "builds").read_text().count("\n") if (fresh / "builds").exists() else 0


def left(fresh):
    """What lies in the cache and among the temporary files."""
    return [path for path in fresh.glob("*/*/**/*") if not path.is_dir()]


def assert_one_note(capsys, *words):
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


FALLBACKS = {
    "off": ({"MS_DIFFUSION_KERNELS": "off"}, ""),
    "no compiler": ({"PATH": "/nowhere"}, "no C++ compiler was found"),
    "compiler fails": ({"CXX": "false"}, "failed: no message"),
    "compiler makes nothing": ({"CXX": "true"}, "does not run here"),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_layers_use_mindspores_operators_without_the_library(reason, fresh, monkeypatch, capsys):
    changes, note = FALLBACKS[reason]
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert not kernels.available()
    net = nn.SequentialCell(layers.conv2d(3, 4, 3), layers.GELU(), layers.GroupNorm(2, 4), layers.Upsample(4))
    assert net[0].kernel is None
    assert np.isfinite(net(Tensor(draw(2, 3, 8, 8))).asnumpy()).all()
    if note:  # one line, once
        assert_one_note(capsys, note)
    assert capsys.readouterr().err == "" and left(fresh) == []


BAD_COMPILERS = {  # script -> the end of the note
    "echo 'kernels.cc:1: wrong' >&2; echo more >&2; exit 1": "failed: kernels.cc:1: wrong",
    b"echo 'Z\xe9ro \x1b[31mfaute\x00\xff' >&2; exit 1": "[31mfaute",
    "yes 'no end' >&2": "failed: no end",
    "yes '' >&2": "failed: no message",
    "kill -9 $$": "failed: it was ended by signal 9",
    "sleep 77.25 & echo $! >> pids; sleep 77.25": "failed: it does not end within 0.4 s",
    "trap '' TERM HUP INT; (sleep 77.25) & echo $! >> pids; exit 1": "failed: no message",
    "while [ $1 != -o ]; do shift; done; mkdir $2": "does not run here",
    "while [ $1 != -o ]; do shift; done; ln -s /dev/zero $2": "does not run here",
}


@pytest.mark.parametrize("script", BAD_COMPILERS)
def test_a_bad_compiler_costs_one_note(script, fresh, compiler, monkeypatch, capsys):
    """None of its processes and files is left."""
    monkeypatch.chdir(fresh)
    monkeypatch.setattr(kernels, "COMPILER_SECONDS", 0.4)
    compiler(script)
    assert kernels.library() is None
    assert_one_note(capsys, BAD_COMPILERS[script])
    assert left(fresh) == []
    pids = (fresh / "pids").read_text().split() if (fresh / "pids").exists() else []
    assert len(pids) == ("pids" in str(script)) and not any(is_alive(int(pid)) for pid in pids)


def is_alive(process):
    """Whether the process runs; a zombie that nobody waits for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + 10
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    assert value
    return value


def test_a_command_ends_with_its_caller_and_has_no_signals_blocked(tmp_path):
    """The caller is killed; its pipe to the supervisor is closed by that."""
    script = f"cd {tmp_path}; grep SigBlk /proc/self/status > mask; sleep 77.25 & echo $! > x; mv x pid; wait"
    code = f"""
import signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM, signal.SIGINT, signal.SIGHUP}})
subprocess.Popen([sys.executable, "-I", "-S", {kernels.SUPERVISOR!r}, "60", "sh", "-c", {script!r}], stdin=subprocess.PIPE)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as caller:
        wait_for((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid) and set((tmp_path / "mask").read_text().split()[1]) == {"0"}
        caller.kill()
    wait_for(lambda: not is_alive(pid))


def test_a_corrupt_or_outdated_library_is_built_again(fresh, compiler, monkeypatch, capsys):
    good, path = Path(LIBRARY).read_bytes(), kernels._build()
    assert kernels._build() == path and builds(fresh) == 1
    changes = [good[: len(good) // 2], b"", None]
    for count, content in enumerate(changes, 2):
        path.unlink() if content is None else path.write_bytes(content)
        assert kernels._build() == path and path.read_bytes() == good
        assert builds(fresh) == count
    assert left(fresh) == [path]  # no temporary file stays
    changed = fresh / "pool.h"
    changed.write_text("// another pool")
    monkeypatch.setattr(kernels, "SOURCES", [changed if s.name == "pool.h" else s for s in kernels.SOURCES])
    assert kernels._build() != path and builds(fresh) == len(changes) + 2
    assert capsys.readouterr().err == ""


def test_no_bit_flip_of_the_library_goes_unnoticed(fresh, compiler, monkeypatch):
    """A changed library is deleted, and not even tried."""
    path = kernels._build()
    key, good = path.stem.split("-")[0], path.read_bytes()
    assert kernels._find(path.parent, key) == path
    monkeypatch.setattr(kernels, "_works", lambda *_: pytest.fail("it was loaded"))
    for bit in np.random.default_rng(0).integers(0, 8 * len(good), 400).tolist():
        path.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        assert kernels._find(path.parent, key) is None and not path.exists()


PLANTED = """
extern "C" __attribute__((constructor)) void planted() { __builtin_trap(); }
extern "C" __attribute__((visibility("default"))) int self_test() { return 0; }
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A library that kills the process that loads it."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cc").write_text(PLANTED)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", folder / "planted.cc", "-o", folder / "planted.so"], check=True)
    return folder / "planted.so"


def plant_in(folder, planted):
    """Put the planted library there under a name that fits its content."""
    (library,) = folder.glob("*.so")
    return shutil.copy(
        planted, folder / f"{library.stem.split('-')[0]}-{hashlib.sha256(planted.read_bytes()).hexdigest()}.so"
    )


def over_it(path, planted):
    path.write_bytes(planted.read_bytes())


def as_link(path, planted):
    path.rename(path.parent.parent / "x.so")
    path.symlink_to(path.parent.parent / "x.so")


def open_to_others(path, planted):
    plant_in(path.parent, planted)
    path.parent.chmod(0o777)


def open_above(path, planted):
    plant_in(path.parent, planted)
    path.parent.parent.chmod(0o777)


def behind_a_link(path, planted):
    open_to_others(path, planted)
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to("moved")


def of_another_user(path, planted):
    if os.geteuid():
        pytest.skip("needs root, who can give files away")
    path.unlink()
    os.chown(shutil.copy(planted, path), 54321, -1)
    os.chown(
        path.rename(path.with_name(f"{path.stem[:17]}{hashlib.sha256(planted.read_bytes()).hexdigest()}.so")), 54321, -1
    )


def in_a_folder_of_another_user(path, planted):
    of_another_user(path, planted)
    os.chown(path.parent, 54321, -1)


PLANTS = [over_it, as_link, open_to_others, open_above, behind_a_link, of_another_user, in_a_folder_of_another_user]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_library_is_not_loaded(plant, fresh, compiler, planted, monkeypatch, capsys):
    """Not even by the process that tries it: that one would have no right to say so."""
    path, works, tried = kernels._build(), kernels._works, []
    plant(path, planted)
    monkeypatch.setattr(
        kernels, "_works", lambda library, folder: tried.append(library.read_bytes()) or works(library, folder)
    )
    built = Path(kernels.library())
    assert builds(fresh) == 2 and built.read_bytes() == Path(LIBRARY).read_bytes() and planted.read_bytes() not in tried
    is_safe = plant in (over_it, as_link, of_another_user)
    assert built.is_relative_to(fresh / ("cache" if is_safe else "tmp"))
    if is_safe:
        assert capsys.readouterr().err == "" and list(path.parent.iterdir()) == [built]
    else:
        assert_one_note(capsys, "XDG_CACHE_HOME")


def test_a_path_that_mindspore_would_split_is_not_used(fresh, compiler, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "a:b"))
    assert Path(kernels.library()).is_relative_to(fresh / "tmp")
    assert_one_note(capsys, "colon")
    assert np.isfinite(layers.GELU()(Tensor(draw(2, 3))).asnumpy()).all()
    kernels.library.cache_clear()
    process_folder.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "tmp:"))
    (fresh / "tmp:").mkdir()
    assert kernels.library() is None and builds(fresh) == 1


def test_what_a_killed_build_has_left_is_removed(fresh, compiler):
    folder = private_folder(fresh / "cache" / "ms_diffusion" / "kernels")
    stale, live = (temporary_path(folder / "build") for _ in range(2))
    stale = stale.with_name(stale.name.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1"))  # another start of this number
    for each in (stale, live):
        each.mkdir()
    built = kernels._build()
    assert sorted(folder.iterdir()) == sorted([live, built])
