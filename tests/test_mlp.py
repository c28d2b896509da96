"""Networks for points in the plane against PyTorch and float64 formulas, their training, and sampling with them."""

import functools
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from make_golden import draw_weights
from test_unet import gradient_function, relative, shapes_of

import mindspore as ms
from mindspore import Tensor, nn

from ms_diffusion import kernels
from ms_diffusion.convert import load_into
from ms_diffusion.denoiser import make_denoiser
from ms_diffusion.models import layers
from ms_diffusion.models.mlp import MLP, MLPConfig, ResidualMLP, ResidualMLPConfig
from ms_diffusion.process import OBJECTIVES, DiffusionConfig, predict
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SAMPLERS, generate, sampling_timesteps
from ms_diffusion.training.step import make_optimizer, make_train_step

NETS = {
    "MLP": MLPConfig(dim=19, num_embeddings=9),
    "narrow MLP": MLPConfig(dim=1, num_embeddings=1),
    "residual": ResidualMLPConfig(dim=18, depth=2, frequencies=3, num_embeddings=9),
    "no frequencies": ResidualMLPConfig(dim=6, depth=1, frequencies=0, num_embeddings=5),
    "no blocks": ResidualMLPConfig(dim=4, depth=0, frequencies=1, num_embeddings=1),
}
every_net = pytest.mark.parametrize("name", NETS)


def build(name, seed=0):
    return NETS[name].build(seed)


def twin_of(name):
    """The network in PyTorch."""
    from benchmarks import torch_peer

    config = NETS[name]
    return getattr(torch_peer, type(config).__name__.removesuffix("Config"))(*astuple(config))


def points(batch, T):
    """x in [-2, 2], timesteps from the last one down, the target."""
    rng = np.random.default_rng(batch)
    t = (T - 1 - np.arange(batch) % T).astype(np.int32)
    return rng.uniform(-2, 2, (batch, 2)).astype(np.float32), t, rng.standard_normal((batch, 2), np.float32)


@pytest.fixture(params=["kernels", "mindspore"])
def operators(request, monkeypatch):
    """Build networks with our CPU kernels, then with MindSpore's operators."""
    if request.param == "mindspore":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif kernels.library() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


# Against PyTorch


@every_net
@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_output_and_gradients_like_pytorch(name, mode, operators):
    """Of the mean squared loss; PyTorch in float64."""
    torch = pytest.importorskip("torch")
    net, twin = build(name), twin_of(name).double()
    load_into(net, draw_weights(shapes_of(net)))
    assert {type(cell.kernel) for _, cell in net.cells_and_names() if isinstance(cell, layers.Linear)} == {
        kernels.Linear if operators == "kernels" else type(None)
    }
    twin.load_state_dict({p.name: torch.from_numpy(p.asnumpy()) for p in net.get_parameters()})
    gradient = gradient_function(net)
    for batch in (1, 13):
        x, t, target = points(batch, NETS[name].num_embeddings)
        reference = twin(torch.from_numpy(x).double(), torch.from_numpy(t).long())
        cotangent = (reference.detach() - torch.from_numpy(target)) / batch
        twin.zero_grad()
        torch.nn.functional.mse_loss(reference, torch.from_numpy(target).double()).backward()
        output, gradients = gradient(mode, x, t, cotangent.numpy().astype(np.float32))
        assert output.shape == (batch, 2)
        assert relative(output, reference.detach().numpy()) < 1e-5
        assert gradients.keys() == dict(twin.named_parameters()).keys()
        for key, parameter in twin.named_parameters():
            wanted = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()  # None: it is not used
            assert abs(gradients[key] - wanted).max() <= 1e-5 * max(abs(wanted).max(), 0.01), key


@every_net
def test_names_and_shapes_are_those_of_pytorch(name):
    pytest.importorskip("torch")
    net, twin = build(name), twin_of(name)
    assert shapes_of(net) == {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    assert len(net.trainable_params()) == len(shapes_of(net))  # no name twice


# Against float64 formulas


def silu(x):
    return x / (1 + np.exp(-x))


def weights_of(net):
    """f(name, x): the linear layer of this name; f(name): an embedding."""
    arrays = {p.name: p.asnumpy().astype(np.float64) for p in net.get_parameters()}

    def apply(name, x=None):
        return arrays[f"{name}.weight"] if x is None else x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    return apply


def sinusoids(T, dim):
    angles = np.arange(T)[:, None] * 1e4 ** -(np.arange(dim // 2) / (dim // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def mlp_formula(net, x, t):
    layer = weights_of(net)
    for i in range(3):
        x = np.maximum(layer(f"linears.{i}", x) + layer(f"step_embeddings.{i}")[t], 0)
    return layer("linears.3", x)


def residual_formula(net, x, t, dim, depth, frequencies, num_embeddings):
    layer = weights_of(net)
    emb = layer("time_mlp", sinusoids(num_embeddings, dim)[t])
    waves = [f(np.pi / 2 * 2**k * x[:, i]) for f in (np.sin, np.cos) for i in range(2) for k in range(frequencies)]
    x = layer("first", np.concatenate([x, np.reshape(waves, (-1, len(x))).T], 1))
    for i in range(depth):
        h = layer(f"blocks.{i}.linear1", silu(x)) + layer(f"blocks.{i}.time", silu(emb))
        x = x + layer(f"blocks.{i}.linear2", silu(h))
    return layer("last", silu(x))


@every_net
def test_outputs_are_the_formulas(name, operators):
    config = NETS[name]
    net, (x, t, _) = build(name), points(13, config.num_embeddings)
    x64 = x.astype(np.float64)
    wanted = mlp_formula(net, x64, t) if type(net) is MLP else residual_formula(net, x64, t, *astuple(config))
    np.testing.assert_allclose(net(Tensor(x), Tensor(t)).asnumpy(), wanted, atol=3e-6)


@pytest.mark.parametrize(("dim", "T", "tolerance"), [(4, 1, 1e-7), (128, 100, 1e-5), (6, 1000, 1e-4)])
def test_time_embeddings_are_sinusoids(dim, T, tolerance):
    net = ResidualMLPConfig(dim, 0, 0, T).build()
    np.testing.assert_allclose(net.time_embeddings.asnumpy(), sinusoids(T, dim), atol=tolerance)


def test_periods_are_4_2_1():
    """Without the coordinates themselves the output has period 4 in both; without the sines of period 4, period 2."""
    net = ResidualMLPConfig(12, depth=1, frequencies=2, num_embeddings=3).build()
    load_into(net, draw_weights(shapes_of(net)))
    weight = net.first.weight.asnumpy().copy()
    weight[:, :2] = 0
    net.first.weight.set_data(Tensor(weight))
    x, t, _ = points(13, 3)

    def moved(*by):
        return net(Tensor(x + np.float32(by)), Tensor(t)).asnumpy()

    for by in [(4, 0), (0, -4)]:
        np.testing.assert_allclose(moved(*by), moved(0, 0), atol=1e-5)
    assert min(abs(moved(*by) - moved(0, 0)).max() for by in [(2, 0), (0, 2), (1, 0), (0, 1)]) > 0.01
    weight[:, [2, 4, 6, 8]] = 0  # of period 4, for each coordinate, in sines and cosines
    net.first.weight.set_data(Tensor(weight))
    for by in [(2, 0), (0, 2)]:
        np.testing.assert_allclose(moved(*by), moved(0, 0), atol=1e-5)
    assert min(abs(moved(*by) - moved(0, 0)).max() for by in [(1, 0), (0, 1)]) > 0.01


@pytest.mark.parametrize("name", ["MLP", "residual"])
def test_each_timestep_counts(name):
    net, T = build(name), NETS[name].num_embeddings
    x, t = np.tile(np.float32([0.3, -0.7]), (T, 1)), np.arange(T, dtype=np.int32)
    outputs = net(Tensor(x), Tensor(t)).asnumpy()
    for i in range(T):
        assert min((abs(outputs[i] - outputs[j]).max() for j in range(i)), default=1) > 1e-5
    np.testing.assert_allclose(net(Tensor(x), Tensor(t[::-1].copy())).asnumpy(), outputs[::-1], atol=1e-6)


def test_without_blocks_no_timestep_counts():
    net = ResidualMLPConfig(8, depth=0, frequencies=2, num_embeddings=5).build()
    x, t, _ = points(5, 5)
    np.testing.assert_array_equal(net(Tensor(x), Tensor(t)).asnumpy(), net(Tensor(x), Tensor(t * 0)).asnumpy())


@pytest.mark.parametrize("name", ["MLP", "residual"])
def test_float16_stays_close(name, operators):
    net, half = build(name), build(name)
    layers.set_compute_type(half, ms.float16)
    x, t, _ = points(13, 9)
    wanted, found = (predict(each, Tensor(x), Tensor(t)) for each in (net, half))
    assert found.dtype == ms.float32
    assert 0 < relative(found.asnumpy(), wanted.asnumpy()) < 1e-2


# Initialisation


@pytest.mark.parametrize("config", [MLPConfig(120, 90), ResidualMLPConfig(96, 2, 3, 10)], ids=["MLP", "residual"])
def test_initial_weights_follow_pytorch(config):
    """Linear layers U(-1, 1) / sqrt(inputs): mean 0, variance 1/3, fourth moment 1/5. Embeddings N(0, 1): 0, 1, 3."""
    net, counted = config.build(), 0
    for path, cell in net.cells_and_names():
        moments = {layers.Linear: (1 / 3, 1 / 5), layers.Embedding: (1, 3)}.get(type(cell))
        for p in cell.get_parameters(expand=False) if moments else ():
            bound = 1 / math.sqrt(cell.weight.shape[1]) if isinstance(cell, nn.Dense) else 1
            values, counted = p.asnumpy().ravel() / bound, counted + 1
            assert abs(values.mean()) < 5 * math.sqrt(moments[0] / values.size), path
            error = math.sqrt((moments[1] - moments[0] ** 2) / values.size)
            assert abs((values**2).mean() - moments[0]) < 5 * error, path
            assert len(np.unique(values)) > 0.99 * values.size
            if isinstance(cell, nn.Dense):
                assert abs(values).max() <= 1 + 1e-6
                assert values.size < 100 or abs(values).max() > 0.9
            else:
                assert abs(values).max() > 3
    assert counted == len(net.trainable_params())


@every_net
def test_seed_decides_the_weights(name):
    first, again, other = ({p.name: p.asnumpy() for p in build(name, seed).get_parameters()} for seed in (3, 3, 4))
    for key, values in first.items():
        np.testing.assert_array_equal(values, again[key])
        assert (values != other[key]).any(), key
    flat = [values.ravel()[0] for values in first.values()]
    assert len(set(flat)) == len(flat)  # no number is drawn twice


def test_parameter_counts():
    """Of the networks that the presets have; the constructors have the defaults of the configurations."""
    square = 128 * 128 + 128
    for config, net, count in [
        (MLPConfig(), MLP(), 3 * 128 + 2 * square + 2 * 128 + 2 + 3 * 100 * 128),
        (ResidualMLPConfig(), ResidualMLP(), 19 * 128 + (1 + 3 * 3) * square + 2 * 128 + 2),
    ]:
        assert config.cond_fields == ()
        for network in (net, config.build()):
            assert sum(p.size for p in network.trainable_params()) == count


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("MLP", {"dim": 0}, "at least 1"),
        ("MLP", {"num_embeddings": 0}, "at least 1"),
        ("residual", {"dim": 2}, "at least 4"),
        ("residual", {"dim": 7}, "even"),
        ("residual", {"depth": -1}, "in .0, 1000"),
        ("residual", {"frequencies": -1}, "in .0, 100"),
        ("residual", {"num_embeddings": 0}, "at least 1"),
    ],
)
def test_bad_sizes_are_refused(kind, options, message):
    ((name, value),) = options.items()
    with pytest.raises((ValueError, UserError), match=f"^{name} is {value}: it must be {message}"):
        replace(NETS[kind], **options).build()


# Diffusion of points


def alpha_bars(diffusion, t):
    return diffusion.alphas_cumprod[t][:, None]


@functools.cache
def small_net():
    return ResidualMLPConfig(8, 1, 1, num_embeddings=60).build()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_points_are_the_formula(objective):
    diffusion = DiffusionConfig(num_timesteps=60, schedule="cosine", objective=objective, loss="l2").build()
    net = small_net()
    for batch in (1, 13):
        x, t, noise = points(batch, 60)
        a, b = np.sqrt(alpha_bars(diffusion, t)), np.sqrt(1 - alpha_bars(diffusion, t))
        output = net(Tensor((a * x + b * noise).astype(np.float32)), Tensor(t)).asnumpy()
        target = {"eps": noise, "x0": x, "v": a * noise - b * x}[objective]
        losses = diffusion.losses(net, *map(Tensor, (x, t, noise))).asnumpy()
        np.testing.assert_allclose(losses, ((output - target) ** 2).mean(1), rtol=1e-4, atol=1e-6)
        loss = diffusion.p_losses(net, *map(Tensor, (x, t, noise)))
        assert loss.shape == () and loss.asnumpy() == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize(("name", "objective", "schedule"), [("MLP", "eps", "sigmoid"), ("residual", "x0", "cosine")])
def test_training_lowers_the_loss_of_points(name, objective, schedule):
    net = replace(NETS[name], dim=32, num_embeddings=60).build()
    diffusion = DiffusionConfig(num_timesteps=60, schedule=schedule, objective=objective, loss="l2").build()

    def loss_fn(x, t, noise):
        return diffusion.p_losses(net, x, t, noise)

    step = make_train_step(loss_fn, make_optimizer(net, 1e-2, 0, 1000), steps_per_call=10)
    batch = [Tensor(np.stack([values] * 10)) for values in points(13, 60)]
    losses = [float(step(*batch)[0].asnumpy().mean()) for _ in range(4)]
    assert np.isfinite(losses).all()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.4 * losses[0], losses


@functools.cache
def denoiser_of(objective):
    diffusion = DiffusionConfig(num_timesteps=60, schedule="cosine", objective=objective, loss="l2").build()
    return diffusion, make_denoiser(diffusion, small_net())


@pytest.mark.parametrize(("objective", "name"), [*(("v", name) for name in SAMPLERS), ("eps", "ddim"), ("x0", "ddim")])
def test_samplers_draw_points(objective, name):
    diffusion, denoise = denoiser_of(objective)
    first, again, others = (
        generate(SAMPLERS[name], denoise, diffusion, sampling_timesteps(60, 5), (2,), num, batch_size=5) for num in (5, 5, 8)
    )
    assert first.shape == (5, 2) and first.dtype == np.float32 and np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(others[:5], first, atol=1e-5)  # a point is the same in any batch
    assert others.shape == (8, 2) and np.isfinite(others).all()
    assert len(np.unique(others.round(5), axis=0)) > 1
