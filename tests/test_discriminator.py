"""The PatchGAN discriminator against a PyTorch network written here, and its two norms."""

import functools
import math

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor, ops

from ms_diffusion.convert import load_into
from ms_diffusion.models.discriminator import ActNorm, BatchNorm, NLayerDiscriminator
from ms_diffusion.runtime import compiled

TOLERANCE = 1e-4
every_norm = pytest.mark.parametrize("norm", ["batch", "act"])
UNUSED = "num_batches_tracked"


def peer(channels, ndf, n_layers, norm):
    """The PyTorch network, in training mode."""
    torch = pytest.importorskip("torch")

    class Act(torch.nn.Module):
        def __init__(self, c):
            super().__init__()
            self.loc, self.scale = (torch.nn.Parameter(v * torch.ones(1, c, 1, 1)) for v in (0, 1))
            self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

        def forward(self, x):
            if self.training and not self.initialized:
                self.loc.data = -x.detach().mean((0, 2, 3), keepdim=True)
                self.scale.data = 1 / (x.detach().std((0, 2, 3), keepdim=True) + 1e-6)
                self.initialized.fill_(1)
            return self.scale * (x + self.loc)

    widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
    layers = [torch.nn.Conv2d(channels, ndf, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    for n in range(n_layers):
        stride = 1 if n == n_layers - 1 else 2
        layers.append(torch.nn.Conv2d(widths[n], widths[n + 1], 4, stride, 1, bias=norm == "act"))
        layers.append(Act(widths[n + 1]) if norm == "act" else torch.nn.BatchNorm2d(widths[n + 1]))
        layers.append(torch.nn.LeakyReLU(0.2))
    net = torch.nn.Module()
    net.main = torch.nn.Sequential(*layers, torch.nn.Conv2d(widths[-1], 1, 4, 1, 1))
    net.forward = net.main.forward
    return net


def arrays_of(twin) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in twin.state_dict().items() if not name.endswith(UNUSED)}


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in net.get_parameters()}


def draw(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_close(ours, reference, name=""):
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    assert abs(ours - reference).max() <= TOLERANCE * abs(reference).max(), name


@functools.cache
def drawn(norm, n_layers, channels=3):
    """The network with weights of some size, as arrays, and its gradient function, compiled once for each shape."""
    net, rng = NLayerDiscriminator(channels, 4, n_layers, norm), np.random.default_rng(5)
    arrays = values(net)
    for name, a in arrays.items():
        if a.ndim == 4 and a.shape[0] > 1 or name.endswith("weight"):
            arrays[name] = (a + rng.normal(0, 0.2, a.shape)).astype(np.float32)
        elif a.dtype == np.float32:
            arrays[name] = (a + rng.uniform(0, 0.3, a.shape)).astype(np.float32)  # a variance must stay positive
        else:
            arrays[name] = np.uint8(1)

    def forward(x, cotangent):
        out = net(x)
        return (out * cotangent).sum(), out

    gradient = ms.value_and_grad(forward, 0, net.trainable_params(), has_aux=True)
    return net, arrays, {"graph": compiled(gradient), "pynative": gradient}


@pytest.mark.parametrize(("n_layers", "size"), [(1, 8), (2, 16), (3, 32), (4, 48)])
@every_norm
def test_names_shapes_and_size_are_those_of_pytorch(norm, n_layers, size):
    net, twin = NLayerDiscriminator(2, 3, n_layers, norm), peer(2, 3, n_layers, norm)
    state = arrays_of(twin)
    assert {p.name: p.shape for p in net.get_parameters()} == {name: a.shape for name, a in state.items()}
    trainable = {name for name, _ in twin.named_parameters()}
    assert {p.name for p in net.trainable_params()} == trainable
    load_into(net, state)
    twin.load_state_dict({name: pytest.importorskip("torch").from_numpy(a) for name, a in values(net).items()}, strict=False)
    assert net(Tensor(draw((2, 2, size, size)))).shape == (2, 1, size // 2**n_layers - 2, size // 2**n_layers - 2)


@pytest.mark.parametrize(
    ("norm", "n_layers", "batch", "size", "mode"),
    [
        ("batch", 3, 13, 32, "graph"),
        ("batch", 2, 1, 16, "pynative"),
        ("batch", 2, 1, 16, "graph"),
        ("act", 2, 13, 16, "graph"),
        ("act", 3, 1, 32, "pynative"),
    ],
)
def test_output_and_gradients_like_pytorch(norm, n_layers, batch, size, mode):
    """In training; with the statistics that BatchNorm then keeps."""
    torch = pytest.importorskip("torch")
    net, arrays, functions = drawn(norm, n_layers)
    load_into(net, arrays)
    twin = peer(3, 4, n_layers, norm)
    twin.load_state_dict({name: torch.tensor(a) for name, a in arrays.items()}, strict=False)
    for seed in (1, 2):  # the second finds what the first has kept
        x = draw((batch, 3, size, size), seed)
        tx = torch.from_numpy(x).requires_grad_()
        expected = twin.main(tx)
        cotangent = draw(tuple(expected.shape), seed + 2)
        for p in twin.parameters():
            p.grad = None
        (expected * torch.from_numpy(cotangent)).sum().backward()
        (_, out), (x_gradient, gradients) = functions[mode](Tensor(x), Tensor(cotangent))
        assert_close(out.asnumpy(), expected.detach().numpy())
        assert_close(x_gradient.asnumpy(), tx.grad.numpy())
        reference = {name: p.grad.numpy() for name, p in twin.named_parameters()}
        for p, g in zip(net.trainable_params(), gradients, strict=True):
            assert_close(g.asnumpy(), reference[p.name], p.name)
    state, kept = arrays_of(twin), values(net)
    for name, a in state.items():
        assert_close(kept[name], a, name)
        assert np.array_equal(a, arrays[name]) != ("running" in name), name


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_batch_norm_out_of_training_uses_and_keeps_its_statistics(mode):
    torch = pytest.importorskip("torch")
    net, twin = NLayerDiscriminator(3, 4, 1), peer(3, 4, 1, "batch")
    arrays = drawn("batch", 1)[1]
    load_into(net, arrays)
    twin.load_state_dict({name: torch.tensor(a) for name, a in arrays.items()}, strict=False)
    net.set_train(False)
    twin.eval()
    x = draw((13, 3, 8, 8))
    out = (compiled(net) if mode == "graph" else net)(Tensor(x)).asnumpy()
    assert_close(out, twin.main(torch.from_numpy(x)).detach().numpy())
    for name, a in values(net).items():
        np.testing.assert_array_equal(a, arrays[name])
    net.set_train()
    assert abs(net(Tensor(x)).asnumpy() - out).max() > 0.1


# ActNorm's initialisation


def test_initialise_is_what_pytorch_does_at_its_first_batch():
    torch = pytest.importorskip("torch")
    net, twin = NLayerDiscriminator(3, 4, 2, "act"), peer(3, 4, 2, "act")
    graph = compiled(net)
    twin.load_state_dict({name: torch.from_numpy(a) for name, a in values(net).items()})
    first, second = 2 + 3 * draw((5, 3, 16, 16), 1), draw((5, 3, 16, 16), 2)
    before = graph(Tensor(first)).asnumpy()
    net.initialise(Tensor(first))
    for x in (first, second):
        expected = twin.main(torch.from_numpy(x)).detach().numpy()
        assert_close(net(Tensor(x)).asnumpy(), expected)
        assert_close(graph(Tensor(x)).asnumpy(), expected)  # the graph that was there before knows it too
    assert abs(graph(Tensor(first)).asnumpy() - before).max() > 0.1
    for name, a in arrays_of(twin).items():
        assert_close(values(net)[name], a, name)


def test_initialise_makes_mean_0_and_variance_1_and_does_so_once():
    norm, x = ActNorm(3), (5 + 2 * draw((4, 3, 6, 5))) * np.float32([1, 10, 100]).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(norm(Tensor(x)).asnumpy(), x)  # the identity before
    norm.initialise(Tensor(x))
    out = norm(Tensor(x)).asnumpy()
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.var((0, 2, 3), ddof=1), 1, rtol=1e-4)
    norm.initialise(Tensor(2 * x))
    np.testing.assert_array_equal(norm(Tensor(x)).asnumpy(), out)


def test_initialise_waits_for_finite_values():
    norm, x = ActNorm(3), draw((4, 3, 6, 5))
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[3, 2, 1, 0] = bad
        norm.initialise(Tensor(spoilt))
    assert norm.initialized.asnumpy() == 0 and np.isfinite(norm(Tensor(x)).asnumpy()).all()
    norm.initialise(Tensor(x))
    np.testing.assert_allclose(norm(Tensor(x)).asnumpy().mean((0, 2, 3)), 0, atol=1e-5)


def test_a_loaded_network_is_not_initialised_again():
    net, again = (NLayerDiscriminator(1, 4, 1, "act", seed) for seed in (0, 1))
    net.initialise(Tensor(draw((2, 1, 8, 8))))
    load_into(again, values(net))
    again.initialise(Tensor(draw((2, 1, 8, 8), 1)))
    for name, a in values(again).items():
        np.testing.assert_array_equal(a, values(net)[name])


def test_initialise_leaves_batch_norm_as_it_is():
    net = NLayerDiscriminator(1, 4, 1)
    trainable = {p.name: p.asnumpy().copy() for p in net.trainable_params()}
    net.initialise(Tensor(draw((2, 1, 8, 8))))
    for p in net.trainable_params():
        np.testing.assert_array_equal(p.asnumpy(), trainable[p.name])


# The network


def test_a_logit_sees_70_by_70_pixels():
    """At three layers (Isola et al. 2017, section 3.2); gradients of the other pixels are 0."""
    net = NLayerDiscriminator(1, 2, 3, "act")
    x = Tensor(draw((1, 1, 96, 96)))

    def logit(x):
        return net(x)[0, 0, 5, 5]

    seen = ms.grad(logit)(x).asnumpy()[0, 0] != 0
    assert net(x).shape == (1, 1, 10, 10)
    assert seen[17:87, 17:87].all() and seen.sum() == 70 * 70


def test_a_condition_is_more_channels():
    net = NLayerDiscriminator(3, 4, 1)
    images, cond, other = (Tensor(draw((2, c, 8, 8), c + 7)) for c in (1, 2, 2))
    a, b = (net(ops.concat((images, c), 1)).asnumpy() for c in (cond, -other))
    assert a.shape == (2, 1, 2, 2) and abs(a - b).max() > 1e-3


@every_norm
def test_initial_values(norm):
    """N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm, and PyTorch's uniform biases."""
    net = NLayerDiscriminator(3, 64, 3, norm)
    assert net.training
    for p in net.get_parameters():
        a, n = p.asnumpy(), p.size
        cell = net.main[int(p.name.split(".")[1])]
        if p.name.endswith("weight"):
            mean = 1 if isinstance(cell, BatchNorm) else 0
            assert abs(a.mean() - mean) < 5 * 0.02 / math.sqrt(n), p.name
            assert abs(a.std() / 0.02 - 1) < 5 / math.sqrt(2 * n), p.name
        elif isinstance(cell, BatchNorm | ActNorm):
            assert (a == (1 if p.name.endswith(("running_var", "scale")) else 0)).all(), p.name
        else:
            bound = 1 / math.sqrt(np.prod(cell.weight.shape[1:]))
            assert 0 < abs(a).max() <= bound and (n == 1 or abs(a).max() > 0.8 * bound)
    assert (norm == "act") == (net.main[2].bias is not None)


def test_seed_decides_the_weights():
    a, same, other = (values(NLayerDiscriminator(1, 4, 1, seed=seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a[name], same[name]) for name in a)
    drawn_ones = [name for name in a if not np.isin(a[name], (0, 1)).all()]
    assert len(drawn_ones) == 6 and all((a[name] != other[name]).all() for name in drawn_ones)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm is 'group': choose one of batch, act"):
        NLayerDiscriminator(1, 4, 1, norm="group")
