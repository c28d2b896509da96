"""Inception v3 against a PyTorch network written here, through its files."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from mindspore import Tensor

from ms_diffusion.convert import save_torch_state_dict
from ms_diffusion.models.inception import InceptionV3, load_inception
from ms_diffusion.runtime import UserError, compiled

TOLERANCE = 1e-4
every_mode = pytest.mark.parametrize("mode", ["graph", "pynative"])
every_kind = pytest.mark.parametrize("kind", ["gray", "rgb"])


@functools.cache
def images(kind: str) -> np.ndarray:
    """Two images in [-1, 1]: noise, and a ramp with a little noise."""
    shape = dict(gray=(2, 1, 28, 28), rgb=(2, 3, 40, 36))[kind]
    noise = np.random.default_rng(7).uniform(-1, 1, shape)
    ramp = np.linspace(-0.9, 0.9, shape[-1])
    return np.stack([noise[0], ramp + 0.1 * noise[1]]).astype(np.float32)


def peer(state: dict, x: np.ndarray, last_average=False, count_padding=False, eps=1e-3, align_corners=False) -> np.ndarray:
    """pool3 of x by PyTorch. What `state` lacks is drawn into it, so that activations keep their size: {} becomes a network.

    The options are mistakes that a port could make.
    """
    import torch
    import torch.nn.functional as F

    rng = torch.Generator().manual_seed(0)

    def draw(name, y, c, kernel):
        weight = torch.randn(c, y.shape[1], *kernel, generator=rng)
        state[f"{name}.conv.weight"] = weight / weight[0].numel() ** 0.5
        state[f"{name}.bn.weight"] = 0.5 + torch.rand(c, generator=rng)
        state[f"{name}.bn.bias"] = torch.randn(c, generator=rng) / 2

    def draw_statistics(name, y):
        var, mean = torch.var_mean(y, (0, 2, 3))
        state[f"{name}.bn.running_mean"] = mean + 0.1 * var.sqrt() * torch.randn(var.shape, generator=rng)
        state[f"{name}.bn.running_var"] = var * (0.5 + torch.rand(var.shape, generator=rng)) + 1e-2
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(9)

    def conv(name, y, c, kernel=(1, 1), stride=1, padding=0):
        if f"{name}.conv.weight" not in state:
            draw(name, y, c, kernel)
        y = F.conv2d(y, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        if f"{name}.bn.running_mean" not in state:
            draw_statistics(name, y)
        bn = (state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(y, *bn, eps=eps))

    def square(name, y, c):
        return conv(name, y, c, (3, 3), 1, 1)

    def halve(name, y, c):
        return conv(name, y, c, (3, 3), 2)

    def row(name, y, c):
        return conv(name, y, c, (1, 7), 1, (0, 3))

    def column(name, y, c):
        return conv(name, y, c, (7, 1), 1, (3, 0))

    def cross(name, y):
        return conv(f"{name}a", y, 384, (1, 3), 1, (0, 1)), conv(f"{name}b", y, 384, (3, 1), 1, (1, 0))

    def average(y):
        return F.avg_pool2d(y, 3, 1, 1, count_include_pad=count_padding)

    def block_a(name, y, c_pool):
        five = conv(f"{name}.branch5x5_2", conv(f"{name}.branch5x5_1", y, 48), 64, (5, 5), 1, 2)
        double = square(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", y, 64), 96)
        double = square(f"{name}.branch3x3dbl_3", double, 96)
        pooled = conv(f"{name}.branch_pool", average(y), c_pool)
        return torch.cat([conv(f"{name}.branch1x1", y, 64), five, double, pooled], 1)

    def block_b(name, y):
        double = square(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", y, 64), 96)
        double = halve(f"{name}.branch3x3dbl_3", double, 96)
        return torch.cat([halve(f"{name}.branch3x3", y, 384), double, F.max_pool2d(y, 3, 2)], 1)

    def block_c(name, y, c):
        seven = column(f"{name}.branch7x7_3", row(f"{name}.branch7x7_2", conv(f"{name}.branch7x7_1", y, c), c), 192)
        double = column(f"{name}.branch7x7dbl_2", conv(f"{name}.branch7x7dbl_1", y, c), c)
        double = column(f"{name}.branch7x7dbl_4", row(f"{name}.branch7x7dbl_3", double, c), c)
        double = row(f"{name}.branch7x7dbl_5", double, 192)
        pooled = conv(f"{name}.branch_pool", average(y), 192)
        return torch.cat([conv(f"{name}.branch1x1", y, 192), seven, double, pooled], 1)

    def block_d(name, y):
        three = halve(f"{name}.branch3x3_2", conv(f"{name}.branch3x3_1", y, 192), 320)
        seven = row(f"{name}.branch7x7x3_2", conv(f"{name}.branch7x7x3_1", y, 192), 192)
        seven = halve(f"{name}.branch7x7x3_4", column(f"{name}.branch7x7x3_3", seven, 192), 192)
        return torch.cat([three, seven, F.max_pool2d(y, 3, 2)], 1)

    def block_e(name, y, pooled):
        three = cross(f"{name}.branch3x3_2", conv(f"{name}.branch3x3_1", y, 384))
        double = square(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", y, 448), 384)
        double = cross(f"{name}.branch3x3dbl_3", double)
        pooled = conv(f"{name}.branch_pool", pooled, 192)
        return torch.cat([conv(f"{name}.branch1x1", y, 320), *three, *double, pooled], 1)

    y = torch.from_numpy(x).expand(-1, 3, -1, -1)
    y = F.interpolate(y, size=(299, 299), mode="bilinear", align_corners=align_corners)
    y = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", y, 32, (3, 3), 2), 32, (3, 3))
    y = F.max_pool2d(square("Conv2d_2b_3x3", y, 64), 3, 2)
    y = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", y, 80), 192, (3, 3)), 3, 2)
    for name, c in dict(Mixed_5b=32, Mixed_5c=64, Mixed_5d=64).items():
        y = block_a(name, y, c)
    y = block_b("Mixed_6a", y)
    for name, c in dict(Mixed_6b=128, Mixed_6c=160, Mixed_6d=160, Mixed_6e=192).items():
        y = block_c(name, y, c)
    y = block_d("Mixed_7a", y)
    y = block_e("Mixed_7b", y, average(y))
    y = block_e("Mixed_7c", y, F.avg_pool2d(y, 3, 1, 1) if last_average else F.max_pool2d(y, 3, 1, 1))
    return y.mean((2, 3)).numpy()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A network of PyTorch's: its state dict, that as a file, and ours from the file, also compiled."""
    torch = pytest.importorskip("torch")
    state = {}
    peer(state, images("rgb"))
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, path)
    net = load_inception(path)
    return SimpleNamespace(state=state, path=path, net=net, graph=compiled(net))


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def relative(ours, reference) -> float:
    """Norm of the difference over the norm of the reference."""
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


# Features


@every_kind
@every_mode
def test_features_like_pytorch(drawn, kind, mode):
    x = images(kind)
    ours = (drawn.graph if mode == "graph" else drawn.net)(Tensor(x)).asnumpy()
    reference = peer(drawn.state, x)
    assert ours.shape == (2, InceptionV3.features)
    assert ours.dtype == np.float32
    assert relative(ours, reference) < TOLERANCE
    assert relative(reference[0], reference[1]) > 0.1  # the comparison is of images, not of constants
    assert (reference > 0.01).mean() > 0.9


MISTAKES = [dict(last_average=True), dict(count_padding=True), dict(eps=1e-5), dict(align_corners=True)]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_would_be_seen(drawn, mistake):
    x = images("rgb")
    assert relative(drawn.graph(Tensor(x)).asnumpy(), peer(drawn.state, x, **mistake)) > 100 * TOLERANCE


# Files


def test_names_and_shapes_are_those_of_pytorch(drawn):
    dropped = ("fc.weight", "fc.bias", "num_batches_tracked")
    expected = {name: tuple(value.shape) for name, value in drawn.state.items() if not name.endswith(dropped)}
    assert {p.name: p.shape for p in InceptionV3().get_parameters()} == expected
    assert len(expected) == 94 * 5
    assert InceptionV3().trainable_params() == []


def test_safetensors_with_another_head_are_the_same(drawn, tmp_path):
    from safetensors.torch import save_file

    state = {name: value for name, value in drawn.state.items() if not name.startswith("fc.")}
    save_file({**state, "AuxLogits.fc.weight": state["Mixed_7c.branch1x1.bn.bias"].clone()}, tmp_path / "net.safetensors")
    ours = values(load_inception(tmp_path / "net.safetensors"))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, drawn.state[name].numpy())


@pytest.fixture(scope="module")
def fresh():
    return InceptionV3()


def test_our_own_file_without_pytorch(fresh, tmp_path):
    save_torch_state_dict(fresh, tmp_path / "net.safetensors")
    again = values(load_inception(tmp_path / "net.safetensors"))
    for name, value in values(fresh).items():
        np.testing.assert_array_equal(again[name], value)


# Errors: one line, what is wrong, what to do


def complaint(path) -> str:
    with pytest.raises(UserError) as caught:
        load_inception(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_another_network_is_refused(fresh, tmp_path):
    path = tmp_path / "net.safetensors"
    arrays = values(fresh)
    del arrays["Mixed_6e.branch7x7_2.conv.weight"]
    arrays["Conv2d_1a_3x3.conv.weight"] = arrays["Conv2d_1a_3x3.conv.weight"][:, :1].copy()
    arrays["layer.weight"] = np.zeros(3, np.float32)
    path.write_bytes(safetensors.numpy.save(arrays))
    message = complaint(path)
    assert "missing: Mixed_6e.branch7x7_2.conv.weight;" in message
    assert "unexpected: layer.weight;" in message
    assert "Conv2d_1a_3x3.conv.weight (32, 1, 3, 3) instead of (32, 3, 3, 3)" in message
    assert "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth" in message


def test_torchvisions_weights_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save({"fc.weight": np.zeros((1000, 2048), np.float32)}))
    assert "fc.weight is (1000, 2048) instead of (1008, 2048)" in complaint(path)


def test_no_weights_at_all(tmp_path):
    assert "no such file" in complaint(tmp_path / "none.pth")
    (tmp_path / "net.safetensors").write_bytes(b"<html>not found</html>")
    assert "not a complete .safetensors file" in complaint(tmp_path / "net.safetensors")
    (tmp_path / "net.txt").write_bytes(b"")
    assert "unknown kind of weights" in complaint(tmp_path / "net.txt")


def test_no_weights_in_a_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "net.pth").write_bytes(b"<html>not found</html>")
    assert "not a complete PyTorch state dict" in complaint(tmp_path / "net.pth")
    torch.save([1.0], tmp_path / "net.pth")
    assert "contains no state dict" in complaint(tmp_path / "net.pth")
