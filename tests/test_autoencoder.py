"""The autoencoders against PyTorch networks written here; codebook and Gaussian against float64 formulas and Monte Carlo."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import draw_weights, uniform
from scipy import stats

import mindspore as ms
from mindspore import Tensor, nn

from ms_diffusion.convert import load_into
from ms_diffusion.models import layers
from ms_diffusion.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    Decoder,
    Downsample,
    Encoder,
    ResnetBlock,
    VQConfig,
    VQModel,
    codebook_use,
    gaussian_kl,
    gaussian_mode,
    gaussian_nll,
    gaussian_sample,
    mean_and_logvar,
    normal_kl,
)
from ms_diffusion.models.layers import Masks
from ms_diffusion.runtime import UserError, compiled

TOLERANCE = 1e-4  # relative to the largest entry
every_mode = pytest.mark.parametrize("mode", ["graph", "pynative"])

TINY = dict(ch=4, ch_mult=(1,), num_res_blocks=1, resolution=8, z_channels=3, embed_dim=2, groups=2, attention="none")
SMALL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, resolution=8, z_channels=3, embed_dim=2, groups=4)
CONFIGS = {
    "vanilla": AutoencoderConfig(**SMALL, attn_resolutions=(4,)),
    "linear": AutoencoderConfig(**SMALL, attn_resolutions=(8, 4), attention="linear", channels=1, tanh_out=True),
    "vq": VQConfig(**SMALL, attn_resolutions=(4,), n_embed=11, out_channels=5),
    "vq-corrected": VQConfig(**SMALL, attention="none", n_embed=11, legacy=False, beta=0.3),
    "none": AutoencoderConfig(**SMALL | dict(ch_mult=(2, 1, 3), num_res_blocks=2), attention="none", resamp_with_conv=False),
}


def f32(a) -> np.ndarray:
    return np.asarray(a, np.float32)


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def shapes_of(net) -> dict[str, tuple]:
    return {p.name: p.shape for p in net.get_parameters()}


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def assert_close(ours, reference, scale=None, name=None):
    """To TOLERANCE of the largest entry of `reference`, or of `scale`."""
    assert ours.shape == reference.shape, name
    assert np.isfinite(ours).all(), name
    assert abs(ours - reference).max() < TOLERANCE * abs(reference if scale is None else scale).max(), name


# The networks of PyTorch


@functools.cache
def peers():
    """The constructors encoder(config, double_z), decoder(config, give_pre_end) and autoencoder(config), in float64."""
    torch = pytest.importorskip("torch")
    from torch.nn import AvgPool2d, Conv2d, GroupNorm, Identity, Module, ModuleDict, ModuleList
    from torch.nn.functional import pad, silu, softmax

    class Residual(Module):
        def __init__(self, config, c, d):
            super().__init__()
            self.norm1, self.norm2 = (GroupNorm(config.groups, n, eps=1e-6) for n in (c, d))
            self.conv1, self.conv2 = (Conv2d(n, d, 3, padding=1) for n in (c, d))
            if c != d:
                self.nin_shortcut = Conv2d(c, d, 1)

        def forward(self, x):
            h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
            return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Vanilla(Module):
        def __init__(self, config, c):
            super().__init__()
            self.norm = GroupNorm(config.groups, c, eps=1e-6)
            for name in ("q", "k", "v", "proj_out"):
                setattr(self, name, Conv2d(c, c, 1))

        def forward(self, x):
            h = self.norm(x)
            q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
            weights = softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), 2)
            return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))

    class LinearForm(Module):
        def __init__(self, _, c):
            super().__init__()
            self.to_qkv, self.to_out = Conv2d(c, 3 * c, 1, bias=False), Conv2d(c, c, 1)

        def forward(self, x):
            q, k, v = self.to_qkv(x).flatten(2).chunk(3, 1)
            weights = torch.einsum("bci,bcj->bij", q, softmax(k, 2))  # the N x N matrix that the other order avoids
            return self.to_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))

    class Shrink(Module):
        def __init__(self, c, with_conv):
            super().__init__()
            self.conv = Conv2d(c, c, 3, 2) if with_conv else AvgPool2d(2)
            self.with_conv = with_conv

        def forward(self, x):
            return self.conv(pad(x, (0, 1, 0, 1)) if self.with_conv else x)

    class Grow(Module):
        def __init__(self, c, with_conv):
            super().__init__()
            self.conv = Conv2d(c, c, 3, padding=1) if with_conv else Identity()

        def forward(self, x):
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))

    def attention(config, c):
        return dict(vanilla=Vanilla, linear=LinearForm, none=lambda *_: Identity())[config.attention](config, c)

    def center_crop(config, c):
        return ModuleDict(dict(block_1=Residual(config, c, c), attn_1=attention(config, c), block_2=Residual(config, c, c)))

    def stage(config, i, c, d, blocks, **resample):
        here = config.resolution // 2**i in config.attn_resolutions
        block = ModuleList([Residual(config, c if j == 0 else d, d) for j in range(blocks)])
        attn = ModuleList([attention(config, d) for _ in range(blocks) if here])
        return ModuleDict(dict(block=block, attn=attn, **resample))

    def run(stage, x):
        for j, block in enumerate(stage["block"]):
            x = block(x)
            if len(stage["attn"]):
                x = stage["attn"][j](x)
        for name in ("downsample", "upsample"):
            if name in stage:
                x = stage[name](x)
        return x

    class Down(Module):
        def __init__(self, config, double_z=True):
            super().__init__()
            self.conv_in, self.down, c = Conv2d(config.channels, config.ch, 3, padding=1), ModuleList(), config.ch
            for i, mult in enumerate(config.ch_mult):
                d, last = config.ch * mult, i + 1 == len(config.ch_mult)
                resample = {} if last else dict(downsample=Shrink(d, config.resamp_with_conv))
                self.down.append(stage(config, i, c, d, config.num_res_blocks, **resample))
                c = d
            self.mid, self.norm_out = center_crop(config, c), GroupNorm(config.groups, c, eps=1e-6)
            self.conv_out = Conv2d(c, config.z_channels * (1 + double_z), 3, padding=1)

        def forward(self, x):
            x = self.conv_in(x)
            for stage in self.down:
                x = run(stage, x)
            for part in self.mid.values():
                x = part(x)
            return self.conv_out(silu(self.norm_out(x)))

    class Up(Module):
        def __init__(self, config, give_pre_end=False):
            super().__init__()
            c = config.ch * config.ch_mult[-1]
            self.conv_in, self.mid = Conv2d(config.z_channels, c, 3, padding=1), center_crop(config, c)
            stages = []
            for i, mult in reversed(list(enumerate(config.ch_mult))):
                d = config.ch * mult
                resample = dict(upsample=Grow(d, config.resamp_with_conv)) if i else {}
                stages.append(stage(config, i, c, d, config.num_res_blocks + 1, **resample))
                c = d
            self.up = ModuleList(reversed(stages))
            self.norm_out = GroupNorm(config.groups, c, eps=1e-6)
            self.conv_out = Conv2d(c, config.out_channels or config.channels, 3, padding=1)
            self.end = Identity() if give_pre_end else lambda x: self.conv_out(silu(self.norm_out(x)))
            self.squash = torch.tanh if config.tanh_out else Identity()

        def forward(self, z):
            x = self.conv_in(z)
            for part in self.mid.values():
                x = part(x)
            for stage in reversed(self.up):
                x = run(stage, x)
            return self.squash(self.end(x))

    class Quantizer(Module):
        """With the nearest entries by their differences, and the two terms of the loss apart."""

        def __init__(self, config):
            super().__init__()
            self.embedding, self.config = torch.nn.Embedding(config.n_embed, config.embed_dim), config

        def forward(self, z):
            vectors, table = z.movedim(1, 3), self.embedding.weight
            ids = ((vectors[..., None, :] - table) ** 2).sum(-1).argmin(-1)
            entries = table[ids].movedim(3, 1)
            to_encoder, to_codebook = ((entries.detach() - z) ** 2).mean(), ((entries - z.detach()) ** 2).mean()
            beta, legacy = self.config.beta, self.config.legacy
            loss = to_encoder + beta * to_codebook if legacy else beta * to_encoder + to_codebook
            return z + (entries - z).detach(), loss, ids

    class Autoencoder(Module):
        def __init__(self, config):
            super().__init__()
            parts = 1 if isinstance(config, VQConfig) else 2
            self.encoder, self.decoder = Down(config, parts == 2), Up(config)
            self.quant_conv = Conv2d(parts * config.z_channels, parts * config.embed_dim, 1)
            self.post_quant_conv = Conv2d(config.embed_dim, config.z_channels, 1)
            if parts == 1:
                self.quantize = Quantizer(config)

        def forward(self, x, noise=None):
            encoded = self.quant_conv(self.encoder(x))
            if hasattr(self, "quantize"):
                quantized, loss, ids = self.quantize(encoded)
                return self.decoder(self.post_quant_conv(quantized)), loss, ids
            mean, logvar = encoded.chunk(2, 1)
            z = mean if noise is None else mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise
            return self.decoder(self.post_quant_conv(z)), encoded

    return tuple(lambda *args, kind=kind: kind(*args).double() for kind in (Down, Up, Autoencoder))


def torch_answer(twin, weights, inputs, cotangents):
    """Outputs, and the gradients of sum(outputs * cotangents) by the inputs and by name, of a PyTorch network."""
    import torch

    twin.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    twin.zero_grad()
    inputs = [torch.from_numpy(a).double().requires_grad_() for a in inputs]
    outputs = as_tuple(twin(*inputs))
    sum((y * torch.from_numpy(c)).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in twin.named_parameters()}
    return [y.detach().numpy() for y in outputs], [x.grad.numpy() for x in inputs], gradients


class Case:
    """A network of ours with the weights of ``draw_weights``, its twin, and what compares them."""

    def __init__(self, net, twin, num_inputs: int):
        load_into(net, draw_weights(shapes_of(net)))
        parameters = net.trainable_params()

        def forward(*args):
            outputs = as_tuple(net(*args[:num_inputs]))
            loss = 0.0
            for i in range(len(outputs)):
                loss = loss + (outputs[i] * args[num_inputs + i]).sum()
            return loss, outputs

        gradient = ms.value_and_grad(forward, tuple(range(num_inputs)), parameters, has_aux=True)
        self.net, self.twin, self.parameters = net, twin, parameters
        self.functions = {"graph": compiled(gradient), "pynative": gradient}

    def compare(self, mode, *inputs):
        shapes = [y.shape for y in self.twin_outputs(inputs)]
        cotangents = [f32(uniform([7, i], shape)) for i, shape in enumerate(shapes)]
        (_, outputs), (by_inputs, by_parameters) = self.functions[mode](*map(Tensor, (*inputs, *cotangents)))
        expected = torch_answer(self.twin, values(self.net), inputs, cotangents)
        for i, output in enumerate(outputs):
            assert_close(output.asnumpy(), expected[0][i], name=f"output {i}")
        for i, gradient in enumerate(as_tuple(by_inputs)):
            assert_close(gradient.asnumpy(), expected[1][i], name=f"input {i}")
        gradients = {p.name: g.asnumpy() for p, g in zip(self.parameters, by_parameters, strict=True)}
        assert gradients.keys() == expected[2].keys()
        for name, reference in expected[2].items():
            if name.endswith(".k.bias"):  # 0 but for rounding: softmax does not see what all keys share
                assert_close(gradients[name], reference, expected[2][name.replace(".k.", ".q.")], name)
            elif not reference.any():
                assert not gradients[name].any(), name
            else:
                parts = 3 if name.endswith(".to_qkv.weight") else 1  # each of which has its own size
                for ours, part in zip(np.split(gradients[name], parts), np.split(reference, parts), strict=True):
                    assert_close(ours, part, name=name)
        return expected[2]

    def twin_outputs(self, inputs):
        import torch

        with torch.no_grad():
            return as_tuple(self.twin(*[torch.from_numpy(a).double() for a in inputs]))


@functools.cache
def case(name: str, num_inputs: int = 2) -> Case:
    return Case(CONFIGS[name].build(), peers()[2](CONFIGS[name]), num_inputs)


def images(config, batch, size=None):
    size = size or config.resolution
    return f32(uniform([5, batch], (batch, config.channels, size, size)))


def noise_of(config, batch):
    size = config.resolution // config.size_multiple
    return np.random.default_rng(batch).standard_normal((batch, config.embed_dim, size, size), np.float32)


# The whole network

PARITY = [
    ("vanilla", "graph", 13),
    ("vanilla", "graph", 1),
    ("vanilla", "pynative", 13),
    ("linear", "graph", 13),
    ("linear", "pynative", 1),
    ("none", "graph", 1),
    ("none", "pynative", 13),
    ("vq", "graph", 13),
    ("vq", "pynative", 1),
    ("vq-corrected", "graph", 1),
]


@pytest.mark.parametrize(("name", "mode", "batch"), PARITY)
def test_outputs_and_gradients_like_pytorch(name, mode, batch):
    pytest.importorskip("torch")
    config = CONFIGS[name]
    inputs = [images(config, batch), noise_of(config, batch)][: 1 if isinstance(config, VQConfig) else 2]
    gradients = case(name, len(inputs)).compare(mode, *inputs)
    assert all(gradients[key].any() for key in gradients)  # nothing is compared with 0 alone


@every_mode
def test_without_noise_it_goes_by_way_of_the_mode(mode):
    pytest.importorskip("torch")
    case("linear", 1).compare(mode, images(CONFIGS["linear"], 2))


def test_images_of_another_size_and_shape():
    pytest.importorskip("torch")
    config = CONFIGS["vanilla"]
    x, noise = images(config, 2, 16)[:, :, :12], np.random.default_rng(0).standard_normal((2, 2, 6, 8), np.float32)
    case("vanilla").compare("pynative", x, noise)


@pytest.mark.parametrize("double_z", [True, False])
def test_encoder_alone(double_z):
    pytest.importorskip("torch")
    config = CONFIGS["vanilla"]
    net = Encoder(config, double_z)
    layers.name_and_initialise(net, 0)
    assert net(Tensor(images(config, 2))).shape == (2, 6 if double_z else 3, 4, 4)
    Case(net, peers()[0](config, double_z), 1).compare("pynative", images(config, 2))


@pytest.mark.parametrize("give_pre_end", [True, False])
def test_decoder_alone(give_pre_end):
    pytest.importorskip("torch")
    config = CONFIGS["none"]
    net = Decoder(config, give_pre_end)
    layers.name_and_initialise(net, 0)
    z = f32(uniform(0, (2, 3, 2, 2)))
    assert net(Tensor(z)).shape == (2, 16 if give_pre_end else 3, 8, 8)
    gradients = Case(net, peers()[1](config, give_pre_end), 1).compare("pynative", z)
    assert gradients["conv_out.weight"].any() != give_pre_end


@pytest.mark.parametrize("config", [*CONFIGS.values(), AutoencoderConfig()], ids=[*CONFIGS, "default"])
def test_names_and_shapes_are_those_of_pytorch(config):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in peers()[2](config).state_dict().items()}
    net = config.build()
    assert shapes_of(net) == expected
    assert len(net.trainable_params()) == len(expected)  # no name twice
    if config == AutoencoderConfig():  # as Stable Diffusion's is known to have
        assert len(expected) == 248
        assert sum(p.size for p in net.get_parameters()) == 83_653_863


def test_names_of_the_original():
    names = """
        encoder.conv_in.weight encoder.down.0.block.0.norm1.weight encoder.down.0.block.0.conv2.bias
        encoder.down.1.block.0.nin_shortcut.weight encoder.down.1.attn.0.q.weight encoder.down.0.downsample.conv.weight
        encoder.mid.block_1.conv1.weight encoder.mid.attn_1.proj_out.bias encoder.mid.block_2.norm2.bias
        encoder.norm_out.weight encoder.conv_out.weight decoder.conv_in.weight decoder.mid.attn_1.norm.weight
        decoder.up.1.upsample.conv.weight decoder.up.0.block.1.conv1.weight decoder.up.0.block.0.nin_shortcut.weight
        decoder.up.1.attn.1.k.weight decoder.norm_out.bias decoder.conv_out.weight quant_conv.weight post_quant_conv.bias
    """.split()
    found = shapes_of(CONFIGS["vanilla"].build())
    assert set(names) <= found.keys()
    assert found["encoder.down.1.block.0.nin_shortcut.weight"] == (16, 8, 1, 1)
    assert found["decoder.up.0.block.0.nin_shortcut.weight"] == (8, 16, 1, 1)
    assert not any(
        name.startswith(("encoder.down.1.downsample", "decoder.up.0.upsample", "encoder.down.0.attn")) for name in found
    )
    assert "encoder.mid.attn_1.to_qkv.weight" in shapes_of(CONFIGS["linear"].build())


def test_the_constructor_takes_the_configuration():
    config = AutoencoderConfig(**TINY)
    first, second = values(AutoencoderKL(config, 3)), values(config.build(3))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("levels", [1, 3])
def test_z_is_smaller_by_f(levels):
    config = AutoencoderConfig(**TINY | dict(ch_mult=(1,) * levels, resolution=12), channels=2)
    net, x = config.build(), Tensor(images(config, 3, 12))
    size = 12 // 2 ** (levels - 1)
    assert config.size_multiple == 2 ** (levels - 1)
    moments = net.encode(x)
    assert moments.shape == (3, 4, size, size)
    assert net.decode(gaussian_mode(moments)).shape == (3, 2, 12, 12)


def test_norms_have_the_epsilon_of_the_original():
    """Which the comparisons hardly see: theirs is the PyTorch default's tenth, beside variances near 1."""
    cells = [cell for _, cell in CONFIGS["vanilla"].build().cells_and_names()]
    assert {cell.eps for cell in cells if isinstance(cell, layers.GroupNorm)} == {1e-6}


def test_tanh_bounds_the_images():
    config = CONFIGS["linear"]
    net = config.build()
    net.last_layer.set_data(Tensor(1e3 * net.last_layer.asnumpy()))
    z = Tensor(noise_of(config, 2))
    assert 0.99 < abs(net.decode(z).asnumpy()).max() <= 1


def test_last_layer_ends_the_decoder():
    net = CONFIGS["vanilla"].build()
    assert net.last_layer.name == "decoder.conv_out.weight"
    assert any(p is net.last_layer for p in net.trainable_params())


def test_seed_decides_the_weights():
    first, again, other = (values(CONFIGS["vanilla"].build(seed)) for seed in (3, 3, 4))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if ".norm" in name:
            assert (value == name.endswith("weight")).all()
        else:
            assert (value != other[name]).any(), name
            bound = first[name.replace("bias", "weight")][0].size ** -0.5
            assert abs(value).max() <= bound * (1 + 1e-6)
            assert abs(value).max() > bound * (0.8 if value.size > 20 else 0.1), name


def test_float16_stays_close():
    config = AutoencoderConfig(**TINY)
    net, half = config.build(), config.build()
    layers.set_compute_type(half, ms.float16)
    x, noise = Tensor(images(config, 2)), Tensor(noise_of(config, 2))
    for ours, exact in zip(compiled(half)(x, noise), net(x, noise), strict=True):
        assert ours.dtype == ms.float32
        assert 0 < np.linalg.norm((ours - exact).asnumpy()) < 1e-2 * np.linalg.norm(exact.asnumpy())


# The codebook

CODEBOOK = VQConfig(**TINY | dict(embed_dim=3), n_embed=11)


def quantizer(**options):
    """With entries from N(0, 1)."""
    net = dataclasses.replace(CODEBOOK, **options).build().quantize
    table = f32(np.random.default_rng(3).standard_normal(net.embedding.weight.shape))
    net.embedding.weight.set_data(Tensor(table))
    return net, table.astype(np.float64)


@every_mode
@pytest.mark.parametrize(("batch", "legacy", "beta"), [(1, False, 0.3), (13, True, 0.25)])
def test_the_nearest_entries(mode, batch, legacy, beta):
    net, table = quantizer(legacy=legacy, beta=beta)
    z = f32(np.random.default_rng(batch).standard_normal((batch, 3, 4, 5)))
    vectors = z.transpose(0, 2, 3, 1).astype(np.float64)
    expected = ((vectors[..., None, :] - table) ** 2).sum(-1).argmin(-1)
    entries = table[expected].transpose(0, 3, 1, 2)
    quantized, loss, ids = (compiled(net) if mode == "graph" else net)(Tensor(z))
    np.testing.assert_array_equal(ids.asnumpy(), expected)
    assert ids.dtype == ms.int32
    np.testing.assert_allclose(quantized.asnumpy(), entries, atol=1e-6)
    assert float(loss) == pytest.approx((1 + beta) * ((entries - z) ** 2).mean(), rel=1e-5)
    by_z, (by_table,) = ms.grad(lambda z: net(z)[1], 0, net.trainable_params())(Tensor(z))
    to_encoder, to_codebook = (1, beta) if legacy else (beta, 1)
    np.testing.assert_allclose(by_z.asnumpy(), to_encoder * 2 * (z - entries) / z.size, rtol=1e-3, atol=1e-6)
    moved = np.zeros_like(table)
    np.add.at(moved, expected, to_codebook * 2 * (table[expected] - vectors) / z.size)
    np.testing.assert_allclose(by_table.asnumpy(), moved, rtol=1e-3, atol=1e-6)


def test_of_two_equal_entries_the_first_is_used():
    net, table = quantizer()
    table[5] = table[9] = 7
    net.embedding.weight.set_data(Tensor(f32(table)))
    assert net(Tensor(f32(np.full((1, 3, 1, 1), 6.5))))[2].asnumpy().item() == 5


def test_ids_in_a_remap(tmp_path):
    used, unknown = np.array([7, 2, 5]), np.array([[[4, 0, 0, 1, 2]]])
    np.save(tmp_path / "used.npy", used)
    ids = np.array([[[2, 7, 1, 5, 10]]])
    for rule, expected in (("random", [1, 0, 0, 2, 2]), ("extra", [1, 0, 3, 2, 3]), (1, [1, 0, 1, 2, 1])):
        net, table = quantizer(remap=str(tmp_path / "used.npy"), unknown_index=rule)
        random = [Tensor(unknown, ms.int32)] if rule == "random" else []
        found = net.remap_to_used(Tensor(ids, ms.int32), *random)
        np.testing.assert_array_equal(found.asnumpy().ravel(), expected)
        back = [used[i] if i < 3 else used[0] for i in expected]
        np.testing.assert_array_equal(net.unmap_to_all(found).asnumpy().ravel(), back)
        z = Tensor(f32(table[ids].transpose(0, 3, 1, 2)))
        np.testing.assert_array_equal(net(z, *random)[2].asnumpy().ravel(), expected)
        entries = net.get_codebook_entry(found, (1, 1, 5, 3)).asnumpy()
        np.testing.assert_allclose(entries, f32(table[back]).T.reshape(1, 3, 1, 5))
        np.testing.assert_allclose(net.get_codebook_entry(found.reshape(-1)).asnumpy(), f32(table[back]))
        flat = quantizer(remap=str(tmp_path / "used.npy"), unknown_index=rule, sane_index_shape=False)[0]
        assert flat(z, *random)[2].shape == (5, 1)
    with pytest.raises(ValueError, match="unknown_index is random"):
        quantizer(remap=str(tmp_path / "used.npy"))[0].remap_to_used(Tensor(ids, ms.int32))
    assert quantizer(sane_index_shape=False)[0](z)[2].shape == (5,)


@pytest.mark.parametrize("used", [np.array([11]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), int), np.zeros(0, int)])
def test_a_remap_that_is_no_list_of_ids(tmp_path, used):
    np.save(tmp_path / "used.npy", used)
    with pytest.raises(UserError, match="used.npy is not a list of ids of a codebook: .* from 0 to 10"):
        quantizer(remap=str(tmp_path / "used.npy"))
    with pytest.raises(UserError, match="gone.npy cannot be read"):
        quantizer(remap=str(tmp_path / "gone.npy"))


@every_mode
def test_use_of_a_codebook(mode):
    def use(ids):
        return codebook_use(ids, 11)

    for ids, occur in ((np.arange(11), 11), (np.full((2, 3), 4), 1), (np.array([[0, 0, 3], [3, 3, 9]]), 3)):
        shares = np.bincount(ids.ravel(), minlength=11) / ids.size
        perplexity, number = (compiled(use) if mode == "graph" else use)(Tensor(ids, ms.int32))
        expected = np.exp(-(shares * np.log(np.maximum(shares, 1e-30))).sum())
        assert float(perplexity) == pytest.approx(expected, rel=1e-5) and float(number) == occur


def test_as_a_first_stage_it_quantizes_in_the_decoder():
    net = VQModel(dataclasses.replace(CODEBOOK, channels=2), seed=2)
    table, x = net.quantize.embedding.weight, Tensor(f32(uniform(3, (2, 2, 8, 8))))
    assert abs(table.asnumpy()).max() <= 1 / 11 < abs(table.asnumpy()).max() + 0.02
    z, (reconstruction, _, ids) = net.encode(x), net(x)
    assert z.shape == (2, 3, 8, 8) and ids.shape == (2, 8, 8)
    np.testing.assert_array_equal(net.ids(x).asnumpy(), ids.asnumpy())
    for image in (net.decode(z), net.decode_ids(ids)):
        np.testing.assert_allclose(image.asnumpy(), reconstruction.asnumpy(), atol=1e-6)
    plain = net.decode(z, force_not_quantize=True).asnumpy()
    np.testing.assert_allclose(plain, net.decode_latent(z).asnumpy())
    assert abs(plain - reconstruction.asnumpy()).max() > 1e-3


# Dropout


@every_mode
def test_dropout_only_in_training(mode):
    config = AutoencoderConfig(**TINY, dropout=0.5)
    net, plain = config.build(), AutoencoderConfig(**TINY).build()
    x = Tensor(images(config, 2))
    kept = plain(x)[0].asnumpy()
    np.testing.assert_array_equal(plain.set_train()(x)[0].asnumpy(), kept)
    np.testing.assert_allclose(net.set_train(False)(x)[0].asnumpy(), kept, atol=1e-5)
    masks, found = Masks(net.set_train(), 2, x.shape[2:]), []
    function = compiled(net) if mode == "graph" else net
    for step in (0, 1, 0):
        masks.draw(0, step)
        found.append(function(x)[0].asnumpy())
    assert abs(found[0] - kept).max() > 1e-2 and abs(found[0] - found[1]).max() > 1e-2
    np.testing.assert_array_equal(found[0], found[2])


def test_dropout_stands_before_the_second_convolution():
    """With a sigmoid in the convolution's place the block adds to x either sigmoid(0) or that of the rest over 0.75."""
    block = ResnetBlock(8, 8, groups=4, dropout=0.25)
    block.conv2 = nn.Sigmoid()
    x = np.random.default_rng(0).standard_normal((13, 8, 16, 16), np.float32)
    Masks(block, 13, (16, 16)).draw(0, 0)
    whole, dropped = (block.set_train(train)(Tensor(x)).asnumpy() - x for train in (False, True))
    zero = abs(dropped - 0.5) < 1e-6
    assert abs(zero.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.size)
    scaled = np.log(whole / (1 - whole)) / 0.75
    np.testing.assert_allclose(dropped[~zero], 1 / (1 + np.exp(-scaled[~zero])), atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(resolution=30, ch_mult=(1, 2, 4)), "resolution of 30 cannot be halved 2 times: choose a multiple of 4"),
        (dict(ch=12, groups=8), "12 channels are not divisible into 8 groups"),
        (dict(attention="quadratic"), "attention is 'quadratic': choose one of vanilla, linear, none"),
        (dict(dropout=-0.1), r"dropout is -0.1: it must be in \[0, 1\)"),
        (dict(embed_dim=0), "embed_dim is 0: it must be at least 1"),
        (dict(n_embed=0), "n_embed is 0: it must be at least 1"),
        (dict(beta=-1.0), "beta is -1.0: it must be at least 0"),
        (dict(unknown_index=-1), "unknown_index is -1"),
        (dict(unknown_index="none"), "unknown_index is 'none': choose one of random, extra"),
        (dict(out_channels=0), "out_channels is 0: it must be at least 1"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(options, said):
    with pytest.raises((ValueError, UserError), match=said):
        VQConfig(**SMALL | options).build()


# The Gaussian


def draw_moments(seed, batch=3, channels=2, size=3) -> np.ndarray:
    """(B, 2C, h, w): means of standard deviation 2, logvars in [-6, 6]."""
    rng = np.random.default_rng(seed)
    shape = (batch, channels, size, size)
    return f32(np.concatenate([2 * rng.standard_normal(shape), rng.uniform(-6, 6, shape)], 1))


def halves(moments):
    return np.split(moments.astype(np.float64), 2, 1)


def kl64(moments, other):
    """Of float64 moments: log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1 / 2, summed."""
    (m1, v1), (m2, v2) = halves(moments), halves(other)
    s1, s2 = np.exp(v1 / 2), np.exp(v2 / 2)
    return (np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5).sum((1, 2, 3))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 2), st.sampled_from([(1, 3, 1), (13, 2, 3)]))
def test_kl_and_nll_like_float64(seed, shape):
    moments, other = draw_moments(seed, *shape), draw_moments(seed + 1, *shape)
    mean, logvar = halves(moments)
    z = f32(halves(other)[0])
    found = gaussian_kl(Tensor(moments)).asnumpy()
    assert found.shape == (len(moments),)
    np.testing.assert_allclose(found, kl64(moments, 0 * moments), rtol=1e-5, atol=1e-4)
    found = gaussian_kl(Tensor(moments), Tensor(other)).asnumpy()
    np.testing.assert_allclose(found, kl64(moments, other), rtol=1e-5, atol=1e-4)
    expected = -stats.norm.logpdf(z, mean, np.exp(logvar / 2)).sum((1, 2, 3))
    np.testing.assert_allclose(gaussian_nll(Tensor(moments), Tensor(z)).asnumpy(), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gaussian_kl(Tensor(moments), Tensor(moments)).asnumpy(), 0, atol=1e-4)


def test_kl_is_the_mean_of_the_log_ratio():
    """Over samples of the first Gaussian."""
    n = 20_000
    rng = np.random.default_rng(0)
    shape = (1, 2, 2, 2)
    first, second = (f32(np.concatenate([rng.normal(size=shape), rng.uniform(-1, 1, shape)], 1)) for _ in range(2))
    many = [Tensor(np.repeat(m, n, 0)) for m in (first, second, 0 * first)]
    z = gaussian_sample(many[0], Tensor(rng.standard_normal((n, 2, 2, 2), np.float32)))
    for i, other in [(1, Tensor(second)), (2, None)]:
        ratios = (gaussian_nll(many[i], z) - gaussian_nll(many[0], z)).asnumpy()
        expected = gaussian_kl(Tensor(first), other).asnumpy()[0]
        assert expected > 1
        assert abs(ratios.mean() - expected) < 5 * ratios.std() / math.sqrt(n)


def test_samples_have_mean_and_variance():
    moments = draw_moments(1, 1, 2, 1)
    mean, logvar = halves(moments)
    n = 50_000
    noise = np.random.default_rng(2).standard_normal((n, 2, 1, 1), np.float32)
    z = gaussian_sample(Tensor(np.repeat(moments, n, 0)), Tensor(noise)).asnumpy().astype(np.float64)
    variance = np.exp(logvar[0])
    assert (abs(z.mean(0) - mean[0]) < 5 * np.sqrt(variance / n)).all()
    assert (abs(z.var(0) / variance - 1) < 5 * math.sqrt(2 / n)).all()
    np.testing.assert_array_equal(gaussian_mode(Tensor(moments)).asnumpy(), moments[:, :2])


def test_logvar_is_clipped():
    logvar = f32([-100, -30, 0, 20, 100]).reshape(1, 5, 1, 1)
    moments = Tensor(np.concatenate([np.ones_like(logvar), logvar], 1))
    mean, clipped = mean_and_logvar(moments)
    np.testing.assert_array_equal(mean.asnumpy().ravel(), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(clipped.asnumpy().ravel(), [-30, -30, 0, 20, 20])
    noise = Tensor(f32([1, 1, 1, 1, -1]).reshape(1, 5, 1, 1))
    ends = 1 + np.array([0, 0, 1, math.exp(10), -math.exp(10)])
    np.testing.assert_allclose(gaussian_sample(moments, noise).asnumpy().ravel(), ends, rtol=1e-5)
    expected = (1 + np.exp([-30.0, -30, 0, 20, 20]) - 1 - np.array([-30, -30, 0, 20, 20])).sum() / 2
    np.testing.assert_allclose(gaussian_kl(moments).asnumpy(), [expected], rtol=1e-5)
    expected = -stats.norm.logpdf(0, 1, np.exp([-15.0, -15, 0, 10, 10])).sum()
    np.testing.assert_allclose(gaussian_nll(moments, Tensor(0 * logvar)).asnumpy(), [expected], rtol=1e-5)


def objective(moments, other, noise, z):
    """All functions at once, each weighted otherwise."""
    kls = 2 * gaussian_kl(moments) + 3 * gaussian_kl(moments, other)
    sample = (gaussian_sample(moments, noise) * noise).sum() + (gaussian_mode(moments) * z).sum()
    return kls.sum() + 5 * gaussian_nll(moments, z).sum() + sample


@every_mode
def test_gradients_of_the_gaussian(mode):
    """In a graph, too, where those of an object would be 0; logvar gets none where it is clipped."""
    moments, other, noise, z = draw_moments(0), draw_moments(1), *(f32(uniform(i, (3, 2, 3, 3))) for i in (2, 3))
    moments[0, 2:, 0], other[1, 2:, 0] = 21, -31
    (mean, raw), (mean2, raw2) = halves(moments), halves(other)
    logvar, logvar2 = raw.clip(-30, 20), raw2.clip(-30, 20)
    error, error2 = (mean - z) / np.exp(logvar), (mean - mean2) / np.exp(logvar2)
    by_mean = 2 * mean + 3 * error2 + 5 * error + noise + z
    by_logvar = (np.exp(logvar) - 1) + 1.5 * (np.exp(logvar - logvar2) - 1) + 2.5 * (1 - error * (mean - z))
    by_logvar += noise**2 * np.exp(logvar / 2) / 2
    by_z = -5 * error + mean
    by_logvar2 = 1.5 * (1 - np.exp(logvar - logvar2) - error2 * (mean - mean2))
    gradient = ms.grad(objective, (0, 1, 3))
    found = (compiled(gradient) if mode == "graph" else gradient)(*map(Tensor, (moments, other, noise, z)))
    expected = [
        np.concatenate([by_mean, by_logvar * (raw == logvar)], 1),
        np.concatenate([-3 * error2, by_logvar2 * (raw2 == logvar2)], 1),
        by_z,
    ]
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.asnumpy(), reference, rtol=1e-4, atol=1e-3)


@every_mode
def test_normal_kl_of_numbers(mode):
    """Each entry against the integral of p log(p / q) on a grid."""

    def entries(mean, logvar):
        return normal_kl(mean, -1.0, 0.5, logvar) + normal_kl(0.0, logvar, mean, logvar + 1)

    mean, logvar = f32([-1, 0.25, 2]), f32([-0.5, 0, 1.5])
    grid = np.linspace(-40, 40, 400_001)

    def integral(m1, v1, m2, v2):
        p, q = (stats.norm(m, math.exp(v / 2)).logpdf(grid) for m, v in ((m1, v1), (m2, v2)))
        return (np.exp(p) * (p - q)).sum() * (grid[1] - grid[0])

    expected = [integral(m, -1, 0.5, v) + integral(0, v, m, v + 1) for m, v in zip(mean, logvar, strict=True)]
    found = (compiled(entries) if mode == "graph" else entries)(Tensor(mean), Tensor(logvar)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_of_a_smaller_image_again_and_again():
    """MindSpore 2.10 once stayed in the gradient of its padding for good, at the 18th call, with these shapes."""
    net = Downsample(32)
    layers.name_and_initialise(net, 0)

    def total(x):
        return (net(x) ** 2).sum()

    gradient = compiled(ms.grad(total))
    x = Tensor(f32(uniform(0, (16, 32, 16, 16))))
    first = gradient(x).asnumpy()
    for _ in range(25):
        np.testing.assert_array_equal(gradient(x).asnumpy(), first)
