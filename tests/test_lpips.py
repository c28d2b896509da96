"""LPIPS against a PyTorch network written here, through its files, and the classifier's distance."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor

from ms_diffusion.models.classifier import Classifier
from ms_diffusion.models.lpips import LPIPS, classifier_distance, differences, load_lpips
from ms_diffusion.runtime import UserError, compiled

TOLERANCE = 1e-4
# torchvision's numbers of VGG16's convolutions, their channels, and after which of them a stage ends
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
CONVOLUTIONS = dict(zip(NUMBERS, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6, strict=True))
ENDS = (2, 7, 14, 21, 28)


@functools.cache
def files() -> dict[str, dict[str, np.ndarray]]:
    """What VGG16's file and the linear layers' hold, with activations that keep their size, and of the head a little."""
    rng, vgg, c_in = np.random.default_rng(0), {}, 3
    for n, c in CONVOLUTIONS.items():
        vgg[f"features.{n}.weight"] = rng.standard_normal((c, c_in, 3, 3), np.float32) * np.float32((2 / 9 / c_in) ** 0.5)
        vgg[f"features.{n}.bias"] = 0.3 * rng.standard_normal(c, np.float32)
        c_in = c
    vgg["classifier.6.bias"] = np.zeros(1000, np.float32)
    lins = {f"lin{i}.model.1.weight": rng.random((1, CONVOLUTIONS[n], 1, 1), np.float32) for i, n in enumerate(ENDS)}
    return {"vgg": vgg, "lpips": lins}


def peer(x, y, added=1e-10):
    """The distances by PyTorch, of tensors."""
    import torch
    import torch.nn.functional as F

    vgg, lins = ({name: torch.from_numpy(a) for name, a in files()[kind].items()} for kind in ("vgg", "lpips"))

    def stages(image):
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]))
        h = (image.repeat(1, 3 // image.shape[1], 1, 1) - shift) / scale
        for n in CONVOLUTIONS:
            h = F.max_pool2d(h, 2) if n - 3 in ENDS else h
            h = F.relu(F.conv2d(h, vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"], padding=1))
            if n in ENDS:
                yield h / (h.norm(dim=1, keepdim=True) + added)

    distance = 0
    for i, (a, b) in enumerate(zip(stages(x), stages(y), strict=True)):
        distance = distance + F.conv2d((a - b) ** 2, lins[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return distance


def answer(distance, x, y, cotangent):
    """The distances and the gradients of x and y, by PyTorch."""
    import torch

    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, y)]
    out = distance(*tensors)
    (out * torch.from_numpy(cotangent)).sum().backward()
    return [out.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def gradient_functions(distance):
    """(x, y, cotangent) -> distances, gradients of x and y; by the graph and in PyNative."""

    def forward(x, y, cotangent):
        out = distance(x, y)
        return (out * cotangent).sum(), out

    gradient = ms.value_and_grad(forward, (0, 1), has_aux=True)
    functions = {"graph": compiled(gradient), "pynative": gradient}

    def call(mode, *arrays):
        (_, out), gradients = functions[mode](*map(Tensor, arrays))
        return [a.asnumpy() for a in (out, *gradients)]

    return call


def draw(batch, channels, size, seed=0):
    """Images in [-1, 1], others a little away from them, and a cotangent."""
    rng = np.random.default_rng(seed + batch)
    x = rng.uniform(-1, 1, (batch, channels, size, size))
    y = np.clip(x + rng.normal(0, 0.3, x.shape), -1, 1)
    return [a.astype(np.float32) for a in (x, y, rng.uniform(0.5, 1.5, batch))]


def assert_like(ours, reference):
    for found, expected in zip(ours, reference, strict=True):
        assert found.shape == expected.shape and found.dtype == np.float32
        assert abs(found - expected).max() < TOLERANCE * abs(expected).max()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The network from files: PyTorch's own for VGG16, .safetensors for the rest."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("lpips")
    vgg, lpips = folder / "vgg16.pth", folder / "vgg.safetensors"
    torch.save({name: torch.from_numpy(a) for name, a in files()["vgg"].items()}, vgg)
    lpips.write_bytes(safetensors.numpy.save(files()["lpips"]))
    net = load_lpips(vgg, lpips)
    return SimpleNamespace(net=net, gradient=gradient_functions(net), vgg=vgg, lpips=lpips)


# LPIPS


@pytest.mark.parametrize(
    ("mode", "batch", "channels", "size"),
    [("graph", 13, 3, 16), ("graph", 1, 1, 28), ("pynative", 1, 3, 28), ("pynative", 13, 1, 16)],
)
def test_distances_and_gradients_like_pytorch(loaded, mode, batch, channels, size):
    arrays = draw(batch, channels, size)
    reference = answer(peer, *arrays)
    assert reference[0].min() > 0.01
    assert_like(loaded.gradient(mode, *arrays), reference)


def test_a_distance_is_0_or_more_and_symmetric(loaded):
    x, y, _ = draw(5, 3, 16)
    y[2] = x[2]
    ab, ba = (loaded.net(Tensor(a), Tensor(b)).asnumpy() for a, b in ((x, y), (y, x)))
    assert ab[2] == 0 and (np.delete(ab, 2) > 0.01).all()
    np.testing.assert_allclose(ab, ba, rtol=1e-5)


def test_gray_images_are_three_equal_channels(loaded):
    x, y, _ = draw(2, 1, 16)
    expected = loaded.net(Tensor(x.repeat(3, 1)), Tensor(y.repeat(3, 1))).asnumpy()
    np.testing.assert_allclose(loaded.net(Tensor(x), Tensor(y)).asnumpy(), expected, rtol=1e-5)


def test_all_is_frozen_and_named_as_in_taming():
    net = LPIPS()
    assert net.trainable_params() == []
    slices = {n: 1 + sum(n > end for end in ENDS) for n in CONVOLUTIONS}
    expected = {f"net.slice{slices[n]}.{n}.{kind}" for n in CONVOLUTIONS for kind in ("weight", "bias")}
    expected |= {f"lin{i}.model.1.weight" for i in range(5)}
    assert {p.name for p in net.get_parameters()} == expected
    for i in range(5):
        assert (getattr(net, f"lin{i}").model[1].weight.asnumpy() == 1).all()


def test_loaded_values(loaded):
    ours = {p.name.split(".", 2)[2]: p.asnumpy() for p in loaded.net.net.get_parameters()}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, files()["vgg"][f"features.{name}"])
    assert len(ours) == 26


def test_activations_that_are_all_0_have_a_finite_gradient():
    """The gradient of the length is not finite there. An image of the mean colour has such activations without biases."""
    net = LPIPS()
    for p in net.get_parameters():
        if p.name.endswith("bias"):
            p.set_data(Tensor(np.zeros(p.shape, np.float32)))
    x, y, cotangent = draw(2, 3, 16)
    x[0] = net.shift.asnumpy()
    out, *gradients = gradient_functions(net)("pynative", x, y, cotangent)
    assert out[0] > 1 and np.isfinite(out).all()
    assert all(np.isfinite(g).all() for g in gradients)
    assert abs(gradients[1]).max() > 0


def test_images_that_are_too_small(loaded):
    x = Tensor(np.zeros((1, 3, 15, 20), np.float32))
    with pytest.raises(ValueError, match="at least 16 x 16 pixels: use larger ones"):
        loaded.net(x, x)


# Files


def complaint(at_fault, *paths) -> str:
    with pytest.raises(UserError) as caught:
        load_lpips(*paths)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{at_fault}: ")
    return message


def test_other_files_are_refused(loaded, tmp_path):
    path, none = tmp_path / "net.safetensors", tmp_path / "none.pth"
    assert "no such file" in complaint(none, none, loaded.lpips)
    assert "no such file" in complaint(none, loaded.vgg, none)
    path.write_bytes(b"<html>")
    assert "not a complete .safetensors file" in complaint(path, path, loaded.lpips)

    vgg = dict(files()["vgg"])
    vgg["features.30.weight"] = vgg.pop("features.28.weight")
    vgg["features.0.weight"] = vgg["features.0.weight"][:, :1].copy()
    path.write_bytes(safetensors.numpy.save(vgg))
    message = complaint(path, path, loaded.lpips)
    assert "missing: net.slice5.28.weight; unexpected: features.30.weight" in message
    assert "net.slice1.0.weight (64, 1, 3, 3) instead of (64, 3, 3, 3)" in message
    assert message.endswith("give torchvision's vgg16-397923af.pth")

    lins = dict(files()["lpips"])
    lins["lin1.model.1.weight"] = np.zeros((1, 192, 1, 1), np.float32)  # AlexNet's
    path.write_bytes(safetensors.numpy.save(lins))
    message = complaint(path, loaded.vgg, path)
    assert "lin1.model.1.weight (1, 192, 1, 1) instead of (1, 128, 1, 1)" in message
    assert message.endswith("give the lpips package's weights/v0.1/vgg.pth")


# Without VGG16


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 8), st.floats(-3, 3))
def test_differences_are_of_unit_vectors(seed, batch, channels, scale):
    rng = np.random.default_rng(seed)
    x, y = (10**scale * rng.standard_normal((batch, channels, 2, 3)) for _ in range(2))
    x[0, :, 0, 0] = 0
    a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (x, y))
    single, double = differences(lambda v: (v, 2 * v), *(Tensor(v.astype(np.float32)) for v in (x, y)))
    np.testing.assert_allclose(single.asnumpy(), (a - b) ** 2, atol=1e-5)
    np.testing.assert_allclose(double.asnumpy(), (a - b) ** 2, atol=1e-5)


@pytest.mark.parametrize(("mode", "batch", "size"), [("graph", 13, 28), ("pynative", 1, 32)])
def test_classifier_distance_like_pytorch(mode, batch, size):
    torch = pytest.importorskip("torch")
    from torch.nn.functional import conv2d, group_norm, silu

    net, rng = Classifier(seed=3), np.random.default_rng(3)
    for p in net.get_parameters():
        if ".norm." in p.name:
            p.set_data(Tensor(p.asnumpy() + 0.3 * rng.standard_normal(p.shape, dtype=np.float32)))
    w = {p.name: torch.from_numpy(p.asnumpy()) for p in net.get_parameters()}

    def block(name, h, stride=1):
        h = conv2d(h, w[f"{name}.conv.weight"], stride=stride, padding=1)
        return silu(group_norm(h, 8, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]))

    def stages(x):
        h = block("conv1.1", block("conv1.0", x))
        yield h
        for i in (2, 3):
            h = block(f"down{i}", h, 2)
            h = h + block(f"conv{i}.1", block(f"conv{i}.0", h))
            yield h

    def distance(x, y):
        x, y = [each[:, :, 2:30, 2:30] if size == 32 else each for each in (x, y)]
        pairs = [[h / h.norm(dim=1, keepdim=True) for h in pair] for pair in zip(stages(x), stages(y), strict=True)]
        return sum(((a - b) ** 2).sum(1).mean((1, 2)) for a, b in pairs) / 3

    arrays = draw(batch, 1, size)
    reference = answer(distance, *arrays)
    assert reference[0].min() > 0.01
    assert_like(gradient_functions(classifier_distance(net))(mode, *arrays), reference)
