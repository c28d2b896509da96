"""The U-Net and its blocks against PyTorch, stored answers of PyTorch, and float64 formulas in NumPy."""

import functools
import math

import numpy as np
import pytest
from make_golden import CASES, KINDS, PATH, draw_batch, draw_weights, gradient_rows

import mindspore as ms
from mindspore import Tensor, nn

from ms_diffusion.convert import load_into
from ms_diffusion.models import attention, layers, unet
from ms_diffusion.models.unet import Unet, UnetConfig
from ms_diffusion.runtime import UserError, compiled

TOLERANCE = 1e-4
every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("mode", ["graph", "pynative"])


def slow(case):
    return pytest.param(*case, marks=pytest.mark.slow)


def small_unet(seed=0, **options) -> Unet:
    return Unet(UnetConfig(**{"dim": 8, "dim_mults": (1, 2), **options}), seed)


def shapes_of(net) -> dict[str, tuple]:
    return {p.name: p.shape for p in net.get_parameters()}


def relative(ours, reference) -> float:
    """Norm of the difference over the norm of the reference."""
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def assert_output_close(ours, reference):
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all()
    assert relative(ours, reference) < TOLERANCE
    assert abs(ours - reference).max() < TOLERANCE * abs(reference).max()


def gradient_function(net):
    """(inputs..., cotangent) -> output, {name: gradient of sum(output * cotangent)}, for the graph and for PyNative."""
    parameters = net.trainable_params()

    def forward(*args):
        output = net(*args[:-1])
        return (output * args[-1]).sum(), output

    gradient = ms.value_and_grad(forward, None, parameters, has_aux=True)
    functions = {"graph": compiled(gradient), "pynative": gradient}

    def call(mode, *arrays):
        (_, output), gradients = functions[mode](*[Tensor(a) for a in arrays])
        return output.asnumpy(), {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}

    return call


@functools.cache
def drawn_unet(kind: str, dim: int):
    """A Unet with the weights of ``draw_weights`` and its gradient function, compiled once per shape."""
    net = UnetConfig(dim=dim, **KINDS[kind]).build()
    load_into(net, draw_weights(shapes_of(net)))
    return net, gradient_function(net)


def torch_answer(twin, weights, x, *rest):
    """The output and gradients of a PyTorch network with these weights; timesteps, which follow x, become floats."""
    import torch

    twin.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    x, *inputs, cotangent = (torch.from_numpy(a) for a in (x, *rest))
    output = twin(x, *(a.float() for a in inputs[:1]), *inputs[1:])
    (output * cotangent).sum().backward()
    return output.detach().numpy(), {name: p.grad.numpy() for name, p in twin.named_parameters()}


def assert_like_torch(net, gradient, twin, mode, arrays):
    output, gradients = gradient(mode, *arrays)
    weights = {p.name: p.asnumpy() for p in net.get_parameters()}
    reference, reference_gradients = torch_answer(twin, weights, *arrays)
    assert_output_close(output, reference)
    assert gradients.keys() == reference_gradients.keys()
    for name, value in reference_gradients.items():
        assert relative(gradients[name], value) < TOLERANCE, name


# The whole network


@every_kind
def test_names_and_shapes_are_those_of_pytorch(kind):
    pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    net = UnetConfig(**KINDS[kind]).build()
    assert shapes_of(net) == {name: tuple(p.shape) for name, p in Twin(28, **KINDS[kind]).state_dict().items()}
    assert len(net.trainable_params()) == len(shapes_of(net))  # no name twice


def test_parameter_count():
    """The constructor and the configuration have the same defaults."""
    for net in (Unet(), UnetConfig(dim=28).build()):
        assert sum(p.size for p in net.trainable_params()) == 2_996_315


PARITY = [(kind, 28, batch, size) for kind, batch, size in CASES]
NARROW = [(kind, 12, batch, size) for kind, batch, size in CASES]


@pytest.mark.parametrize(("kind", "dim", "batch", "size"), [*NARROW, *map(slow, PARITY)])
def test_output_and_gradients_like_pytorch(kind, dim, batch, size):
    pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    net, gradient = drawn_unet(kind, dim)
    assert_like_torch(net, gradient, Twin(dim, **KINDS[kind]), "graph", draw_batch(batch, size))


@every_kind
def test_output_and_gradients_like_pytorch_in_pynative(kind):
    pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    net, gradient = drawn_unet(kind, 12)
    assert_like_torch(net, gradient, Twin(12, **KINDS[kind]), "pynative", draw_batch(1, 28))


FAST_GOLDEN = [("convnext", 1, 28), ("resnet", 13, 28)]


@pytest.mark.parametrize(("kind", "batch", "size"), [*FAST_GOLDEN, *(slow(c) for c in CASES if c not in FAST_GOLDEN)])
def test_output_and_gradients_like_stored_answers(kind, batch, size):
    _, gradient = drawn_unet(kind, 28)
    output, gradients = gradient("graph", *draw_batch(batch, size))
    with np.load(PATH) as stored:
        assert_output_close(output, stored[f"{kind}-{batch}-{size}/output"])
        rows = stored[f"{kind}-{batch}-{size}/gradients"]
    differences = abs(gradient_rows(gradients) - rows) / rows[:, :1]  # both columns relative to the norm
    assert differences.max() < TOLERANCE


OPTIONS = {
    "rgb": {"channels": 3},
    "out_dim": {"out_dim": 2},
    "no time": {"with_time_emb": False},
    "init_dim": {"init_dim": 5},
    "convnext_mult": {"convnext_mult": 3},
    "final_skip": {"final_skip": True},
    "scale_shift": {"scale_shift": True, "use_convnext": False, "resnet_block_groups": 2},
    "all of a ResnetBlock": {
        "scale_shift": True,
        "use_convnext": False,
        "resnet_block_groups": 2,
        "final_skip": True,
        "init_dim": 5,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_like_pytorch(options):
    pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    options = {"dim": 8, "dim_mults": (1, 2), "channels": 1, **options}
    net, twin = UnetConfig(**options).build(), Twin(**options)
    arrays = draw_batch(2, 12, options["channels"], options.get("out_dim", options["channels"]))
    assert_like_torch(net, gradient_function(net), twin, "pynative", arrays)


def draw_conditional(batch, size):
    """x, t, labels from the null label down, an image of two channels, a previous x_0, the cotangent."""
    x, t, cotangent = draw_batch(batch, size)
    labels = (3 - np.arange(batch, dtype=np.int32)) % 4
    pictures = np.random.default_rng(batch).uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
    return x, t, labels, pictures[:, :2], pictures[:, 2:], cotangent


CONDITIONS = {"num_classes": 3, "cond_channels": 2, "self_condition": True}
CONDITIONAL = [("convnext", 1, "graph"), ("convnext", 2, "pynative"), ("resnet", 1, "pynative"), ("resnet", 2, "graph")]


@pytest.mark.parametrize(("kind", "patch_size", "mode"), CONDITIONAL)
def test_conditional_network_like_pytorch(kind, patch_size, mode):
    pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    options = {"dim": 8, "dim_mults": (1, 2), "channels": 1, "patch_size": patch_size, **KINDS[kind], **CONDITIONS}
    net = UnetConfig(**options).build()
    gradient = gradient_function(net)
    for batch in (1, 13):
        twin = Twin(**options)
        assert shapes_of(net) == {name: tuple(p.shape) for name, p in twin.state_dict().items()}
        assert_like_torch(net, gradient, twin, mode, draw_conditional(batch, 8))


def test_each_condition_counts():
    """The outputs for one image under every label, the null label among them, and under other images all differ."""
    net = small_unet(**CONDITIONS)
    x, t, _, image, last, _ = (np.repeat(a, 6, 0) for a in draw_conditional(1, 8))
    image[4], last[5] = 0, 0
    outputs = net(*map(Tensor, (x, t, np.array([0, 1, 2, 3, 3, 3], np.int32), image, last))).asnumpy()
    for i in range(6):
        for j in range(i):
            assert relative(outputs[i], outputs[j]) > 1e-3, (i, j)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_fourier_features_are_sines_of_the_levels(patch_size):
    """Of periods of 1 and 2 levels, between x and the conditions: as a network that gets them as a condition."""
    options = {"channels": 2, "cond_channels": 1, "patch_size": patch_size}
    net, other = small_unet(fourier_features=2, **options), small_unet(**(options | {"cond_channels": 9}))
    load_into(other, {p.name: p.asnumpy() for p in net.get_parameters()})
    rng = np.random.default_rng(0)
    levels, image = rng.uniform(0, 255, (3, 2, 8, 8)), rng.standard_normal((3, 1, 8, 8)).astype(np.float32)
    x, t = Tensor(np.float32(levels / 127.5 - 1)), Tensor(np.array([0, 5, 999], np.int32))
    waves = [f(2 * math.pi * levels / period) for period in (1, 2) for f in (np.sin, np.cos)]
    expected = other(x, t, Tensor(np.concatenate([*waves, image], 1).astype(np.float32))).asnumpy()
    for run in (net, compiled(net)):
        assert relative(run(x, t, Tensor(image)).asnumpy(), expected) < 1e-3  # levels are known to 1e-5 in float32


def test_the_conditions_in_order():
    assert UnetConfig().cond_fields == () and UnetConfig().null_label is None
    assert UnetConfig(self_condition=True).cond_fields == ()
    assert UnetConfig(**CONDITIONS).cond_fields == ("labels", "cond_image") and UnetConfig(num_classes=3).null_label == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0: it must be at least 1"),
        ({"dim": 3}, "dim is 3: it must be at least 4"),
        ({"dim_mults": (1, 0)}, r"dim_mults is \(1, 0\): it must be at least 1"),
        ({"cond_channels": -1}, "cond_channels is -1: it must be at least 0"),
        ({"patch_size": 1.5}, "patch_size is 1.5: it must be a whole number"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        UnetConfig(**options).build()


def test_labels_need_the_time_embedding():
    with pytest.raises(ValueError, match="set with_time_emb"):
        small_unet(num_classes=3, with_time_emb=False)


def test_patches_are_channels():
    options = {"init_dim": 8, "dim_mults": (1,)}
    patched, plain = small_unet(channels=3, patch_size=2, **options), small_unet(channels=12, **options)
    load_into(plain, {p.name: p.asnumpy() for p in patched.get_parameters()})
    x, t, _ = draw_batch(2, 16, 3)
    small = x.reshape(2, 3, 8, 2, 8, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)  # channel 4 c + 2 row + column
    out = plain(Tensor(small), Tensor(t)).asnumpy()
    large = out.reshape(2, 3, 2, 2, 8, 8).transpose(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    np.testing.assert_allclose(patched(Tensor(x), Tensor(t)).asnumpy(), large, atol=1e-6)


@pytest.mark.slow
def test_float16_stays_close():
    net, half = (small_unet(dim_mults=(1,)) for _ in range(2))
    layers.set_compute_type(half, ms.float16)
    arrays = draw_batch(2, 16)
    output, gradients = gradient_function(net)("pynative", *arrays)
    half_output, half_gradients = gradient_function(half)("pynative", *arrays)
    for found in (half_output, compiled(half)(*map(Tensor, arrays[:2])).asnumpy()):
        assert found.dtype == np.float32
        assert 0 < relative(found, output) < 1e-2
    for name, value in gradients.items():
        assert half_gradients[name].dtype == np.float32
        assert relative(half_gradients[name], value) < 5e-2, name


# Initialisation


@every_kind
def test_initial_values_follow_pytorch(kind):
    net = UnetConfig(**KINDS[kind]).build()
    for path, cell in net.cells_and_names():
        if isinstance(cell, layers.GroupNorm):
            assert (cell.weight.asnumpy() == 1).all()
            assert (cell.bias.asnumpy() == 0).all()
        elif isinstance(cell, layers.CONVOLUTIONS_AND_LINEAR):
            bound = 1 / math.sqrt(np.prod(cell.weight.shape[1:]))
            for p in cell.get_parameters():
                values = p.asnumpy().ravel() / bound  # U(-1, 1): mean 0, variance 1/3, fourth moment 1/5
                n = values.size
                assert abs(values).max() <= 1 + 1e-6
                assert abs(values.mean()) < 5 * math.sqrt(1 / 3 / n), path
                assert abs((values**2).mean() - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / n), path
                if n > 1:
                    assert len(np.unique(values)) > 0.99 * n


def test_initial_bounds_are_those_pytorch_draws():
    torch = pytest.importorskip("torch")
    for ours, twin in [
        (layers.conv2d(6, 12, 7, groups=6), torch.nn.Conv2d(6, 12, 7, groups=6)),
        (layers.Upsample(10), torch.nn.ConvTranspose2d(10, 10, 4, 2, 1)),
        (layers.Linear(50, 40), torch.nn.Linear(50, 40)),
    ]:
        net = nn.SequentialCell(ours)
        layers.name_and_initialise(net, seed=0)
        for p, (_, q) in zip(net.get_parameters(), twin.named_parameters(), strict=True):
            assert p.shape == tuple(q.shape)
            if p.name.endswith("weight"):
                assert p.asnumpy().std() == pytest.approx(q.detach().numpy().std(ddof=0), rel=0.15)
                assert abs(p.asnumpy()).max() == pytest.approx(q.abs().max().item(), rel=0.05)


def test_embeddings_are_normal():
    """N(0, 1): mean 0, variance 1, fourth moment 3 (eighth 105), in every row alike."""
    net = nn.SequentialCell(layers.Embedding(40, 500))
    layers.name_and_initialise(net, seed=0)
    values, n = net[0].weight.asnumpy(), 40 * 500
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs((values**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt((105 - 9) / n)
    assert (abs(values.mean(1)) < 5 / math.sqrt(500)).all() and len(np.unique(values)) > 0.99 * n
    rows = np.array([39, 0, 0], np.int32)
    np.testing.assert_array_equal(net(Tensor(rows)).asnumpy(), values[rows])


def test_scale_shift_needs_resnet_blocks():
    with pytest.raises(ValueError, match="set use_convnext to False"):
        small_unet(scale_shift=True)


def test_seed_decides_the_weights():
    first, again, other = (small_unet(seed, num_classes=3) for seed in (3, 3, 4))
    for a, b, c in zip(first.get_parameters(), again.get_parameters(), other.get_parameters(), strict=True):
        assert (a.asnumpy() == b.asnumpy()).all()
        if not np.isin(a.asnumpy(), (0, 1)).all():  # all but GroupNorm's
            assert (a.asnumpy() != c.asnumpy()).any(), a.name


# Blocks, against PyTorch: name -> (input channels, ours, the twin's); "timed" ones take an embedding of 6 numbers


def pre_norm_attention(layers, attention):
    return layers.Residual(layers.PreNorm(4, attention.Attention(4, 1, 5)))


BLOCKS = {
    "timed ConvNextBlock": (4, lambda: unet.ConvNextBlock(4, 6, 6), lambda twins, _: twins.ConvNextBlock(4, 6, 6)),
    "ConvNextBlock": (4, lambda: unet.ConvNextBlock(4, 4, mult=3), lambda twins, _: twins.ConvNextBlock(4, 4, mult=3)),
    "timed ResnetBlock": (4, lambda: unet.ResnetBlock(4, 6, 6, 3), lambda twins, _: twins.ResnetBlock(4, 6, 6, 3)),
    "timed ResnetBlock, scaled": (
        4,
        lambda: unet.ResnetBlock(4, 6, 6, 3, scale_shift=True),
        lambda twins, _: twins.ResnetBlock(4, 6, 6, 3, scale_shift=True),
    ),
    "ResnetBlock": (8, lambda: unet.ResnetBlock(8, 8, groups=2), lambda twins, _: twins.ResnetBlock(8, 8, groups=2)),
    "Attention": (4, lambda: attention.Attention(4), lambda twins, _: twins.Attention(4)),
    "LinearAttention": (4, lambda: attention.LinearAttention(4, 2, 3), lambda twins, _: twins.LinearAttention(4, 2, 3)),
    "Residual": (4, lambda: pre_norm_attention(layers, attention), lambda twins, _: pre_norm_attention(twins, twins)),
    "GroupNorm": (4, lambda: layers.GroupNorm(2, 4), lambda _, nn: nn.GroupNorm(2, 4)),
    "Downsample": (4, lambda: layers.Downsample(4), lambda _, nn: nn.Conv2d(4, 4, 4, 2, 1)),
    "Upsample": (4, lambda: layers.Upsample(4), lambda _, nn: nn.ConvTranspose2d(4, 4, 4, 2, 1)),
}


@every_mode
@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_like_pytorch(name, batch, mode):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peer

    channels, block, twin_block = BLOCKS[name]
    net, twin = Only(block()), only(twin_block(torch_peer, torch.nn))
    layers.name_and_initialise(net, seed=0)
    load_into(net, draw_weights(shapes_of(net)))
    rng = np.random.default_rng(batch)
    inputs = [rng.standard_normal((batch, channels, 6, 8), np.float32)]
    if name.startswith("timed"):
        inputs.append(rng.standard_normal((batch, 6), np.float32))
    cotangent = rng.standard_normal(net(*map(Tensor, inputs)).shape, np.float32)
    assert_like_torch(net, gradient_function(net), twin, mode, [*inputs, cotangent])


class Only(nn.Cell):
    """A block under the name "only", for a lone convolution has no path of its own."""

    def __init__(self, block):
        super().__init__()
        self.only = block

    def construct(self, x, time_emb=None):
        return self.only(x) if time_emb is None else self.only(x, time_emb)


def only(block):
    import torch

    class Holder(torch.nn.Module):
        def forward(self, *args):
            return self.only(*args)

    holder = Holder()
    holder.only = block
    return holder


# Blocks, against float64 formulas


def in_mode(net, mode):
    return compiled(net) if mode == "graph" else net


def images(batch, channels):
    return np.random.default_rng(batch).standard_normal((batch, channels, 6, 8), np.float32)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def group_norm(x, groups, eps=1e-5):
    grouped = x.astype(np.float64).reshape(len(x), groups, -1)
    mean, variance = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)


def convolve1x1(conv, x):
    weight = conv.weight.asnumpy().astype(np.float64)[:, :, 0, 0]
    bias = conv.bias.asnumpy() if conv.has_bias else np.zeros(len(weight))
    return np.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]


@every_mode
@pytest.mark.parametrize("batch", [1, 13])
def test_sinusoidal_position_embeddings(batch, mode):
    t = np.linspace(0, 999, batch).astype(np.float32)
    frequencies = np.array([1e4 ** (-i / 13) for i in range(14)])
    angles = t[:, None].astype(np.float64) * frequencies
    out = in_mode(layers.SinusoidalPositionEmbeddings(28), mode)(Tensor(t)).asnumpy()
    np.testing.assert_allclose(out, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=TOLERANCE)


@every_mode
@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups, batch, mode):
    x = 0.01 * (1 + images(batch, 6))  # small, so that eps counts
    out = in_mode(layers.GroupNorm(groups, 6), mode)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(out, group_norm(x, groups), atol=1e-5)


def test_group_norm_of_float16_is_float32():
    x = (100 + images(2, 4)).astype(np.float16)
    out = layers.GroupNorm(2, 4)(Tensor(x)).asnumpy()
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, group_norm(x, 2), atol=1e-4)


def test_groups_must_divide_the_channels():
    message = "28 channels are not divisible into 8 groups"
    with pytest.raises(ValueError, match=message):
        layers.GroupNorm(8, 28)
    with pytest.raises(ValueError, match=message):
        UnetConfig(use_convnext=False).build()


@every_mode
@pytest.mark.parametrize("batch", [1, 13])
def test_attention(batch, mode):
    net, x = attention.Attention(5, heads=2, dim_head=3), images(batch, 5)
    q, k, v = convolve1x1(net.to_qkv, x).reshape(batch, 3, 2, 3, 48).swapaxes(0, 1)
    weights = softmax(np.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(3), -1)
    out = np.einsum("bhij,bhdj->bhdi", weights, v).reshape(batch, 6, 6, 8)
    np.testing.assert_allclose(in_mode(net, mode)(Tensor(x)).asnumpy(), convolve1x1(net.to_out, out), atol=1e-5)


@every_mode
@pytest.mark.parametrize("batch", [1, 13])
def test_linear_attention(batch, mode):
    net, x = attention.LinearAttention(5, heads=2, dim_head=3), images(batch, 5)
    q, k, v = convolve1x1(net.to_qkv, x).reshape(batch, 3, 2, 3, 48).swapaxes(0, 1)
    weights = np.einsum("bhdi,bhdj->bhij", softmax(q, 2) / math.sqrt(3), softmax(k, 3))  # the N x N matrix it avoids
    out = np.einsum("bhij,bhdj->bhdi", weights, v).reshape(batch, 6, 6, 8)
    expected = group_norm(convolve1x1(net.to_out[0], out), 1)
    np.testing.assert_allclose(in_mode(net, mode)(Tensor(x)).asnumpy(), expected, atol=1e-4)


@every_mode
def test_residual_and_pre_norm(mode):
    x = images(13, 4)
    residual = in_mode(layers.Residual(nn.SiLU()), mode)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(residual, x + x / (1 + np.exp(-x.astype(np.float64))), atol=1e-6)
    normed = in_mode(layers.PreNorm(4, layers.Identity()), mode)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(normed, group_norm(x, 1), atol=1e-5)


@every_mode
def test_gelu_is_the_error_function_form(mode):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    np.testing.assert_allclose(in_mode(layers.GELU(), mode)(Tensor(x)).asnumpy(), expected, atol=1e-6)
