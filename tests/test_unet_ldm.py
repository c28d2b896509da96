"""The conditional U-Net of latent diffusion against a PyTorch network written here, diffusers' network, and formulas."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import draw_weights

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import runtime
from ms_diffusion.convert import load_into
from ms_diffusion.models import layers, unet_ldm
from ms_diffusion.models.unet_ldm import UNetModel, UNetModelConfig
from ms_diffusion.runtime import UserError, compiled
from ms_diffusion.training.step import EMA

TOLERANCE = 1e-4
SMALL = {
    "in_channels": 3,
    "model_channels": 8,
    "out_channels": 2,
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "groups": 4,
}
ADM = {
    "num_classes": 3,
    "num_heads": None,
    "num_head_channels": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
LDM = {"use_spatial_transformer": True, "transformer_depth": 2, "context_dim": 6, "attention_resolutions": (2,)}
NETWORKS = {
    "ADM": ADM,
    "LDM": LDM,
    "LDM recomputed, with classes": {**LDM, "num_classes": 3, "recompute": True},
    "unconditional recomputed": {"recompute": True, "num_heads": 4},
    "codebook": {"conv_resample": False, "n_embed": 5, "num_res_blocks": 2, "attention_resolutions": ()},
    "heads on the way up": {"num_heads_upsample": 4},
    "heads narrower than the width": {**LDM, "num_heads": 3, "transformer_depth": 1},
    "heads of a given width": {**LDM, "num_heads": None, "num_head_channels": 3, "legacy": False, "transformer_depth": 1},
    "series": {"dims": 1, "num_classes": 3, "resblock_updown": True},
    "series without convolution": {"dims": 1, "conv_resample": False},
    "odd": {"model_channels": 9, "groups": 3, "num_heads": 3},
}


def config_of(name: str, **more) -> UNetModelConfig:
    return UNetModelConfig(**{**SMALL, **NETWORKS[name], **more})


def shapes_of(net) -> dict[str, tuple]:
    return {p.name: p.shape for p in net.get_parameters()}


def drawn(config: UNetModelConfig) -> UNetModel:
    """A network with no weight 0."""
    net = config.build()
    load_into(net, draw_weights(shapes_of(net)))
    return net


def draw_inputs(config: UNetModelConfig, batch: int) -> list:
    """x, t, context and y; None for those that the network does not take."""
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, config.in_channels, *(8, 12)[2 - config.dims :]), np.float32)
    context = rng.standard_normal((batch, 5, config.context_dim), np.float32) if config.context_dim else None
    y = rng.integers(0, config.num_classes, batch).astype(np.int32) if config.num_classes else None
    return [x, rng.integers(0, 1000, batch).astype(np.int32), context, y]


def tensors(arrays) -> list:
    return [None if a is None else Tensor(a) for a in arrays]


def assert_close(ours, reference, what=""):
    assert ours.shape == reference.shape, what
    assert abs(ours - reference).max() < TOLERANCE * abs(reference).max(), what


# The same in PyTorch


@functools.cache
def torch_network():
    """The class of the network, of a UNetModelConfig."""
    torch = pytest.importorskip("torch")
    from torch.nn import Conv1d, Conv2d, GroupNorm, Identity, Linear, Module, ModuleList, Sequential, SiLU
    from torch.nn import functional as F

    def enlarge(x):
        x = x.repeat_interleave(2, -1)
        return x if x.ndim == 3 else x.repeat_interleave(2, -2)

    def reduce(x):
        x = (x[..., ::2] + x[..., 1::2]) / 2
        return x if x.ndim == 3 else (x[..., ::2, :] + x[..., 1::2, :]) / 2

    def convolution(config):
        return Conv1d if config.dims == 1 else Conv2d

    class ResBlock(Module):
        def __init__(self, config, c_in, c_out, resample=None):
            super().__init__()
            Conv2d = convolution(config)
            self.scale_shift, self.resample = config.use_scale_shift_norm, resample
            self.in_layers = Sequential(GroupNorm(config.groups, c_in), SiLU(), Conv2d(c_in, c_out, 3, padding=1))
            self.emb_layers = Sequential(SiLU(), Linear(4 * config.model_channels, c_out * (2 if self.scale_shift else 1)))
            self.out_layers = Sequential(
                GroupNorm(config.groups, c_out), SiLU(), Identity(), Conv2d(c_out, c_out, 3, padding=1)
            )
            self.skip_connection = Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

        def forward(self, x, emb, context):
            h = self.in_layers[:2](x)
            if self.resample:
                h, x = self.resample(h), self.resample(x)
            h, emb = self.in_layers[2](h), self.emb_layers(emb)[(..., *[None] * (x.ndim - 2))]
            if self.scale_shift:
                scale, shift = emb.tensor_split(2, 1)
                h = self.out_layers[1:](self.out_layers[0](h) * (scale + 1) + shift)
            else:
                h = self.out_layers(h + emb)
            return h + self.skip_connection(x)

    class Resample(Module):
        def __init__(self, config, channels, name):
            super().__init__()
            self.up = name == "conv"
            self.with_conv = config.conv_resample
            if self.with_conv:
                self.add_module(name, convolution(config)(channels, channels, 3, stride=1 if self.up else 2, padding=1))

        def forward(self, x, emb, context):
            if self.up:
                return self.conv(enlarge(x)) if self.with_conv else enlarge(x)
            return self.op(x) if self.with_conv else reduce(x)

    class AttentionBlock(Module):
        def __init__(self, config, channels, heads):
            super().__init__()
            self.new_order, self.heads = config.use_new_attention_order, heads
            self.norm = GroupNorm(config.groups, channels)
            self.qkv, self.proj_out = Conv1d(channels, 3 * channels, 1), Conv1d(channels, channels, 1)

        def forward(self, x, emb, context):
            b, c = x.shape[:2]
            qkv = self.qkv(self.norm(x).flatten(2))
            axes = (3, self.heads) if self.new_order else (self.heads, 3)
            qkv = qkv.reshape(b, *axes, c // self.heads, -1).mT
            out = F.scaled_dot_product_attention(*qkv.unbind(1 if self.new_order else 2))  # (b, h, n, d)
            return x + self.proj_out(out.mT.reshape(b, c, -1)).reshape(x.shape)

    class CrossAttention(Module):
        def __init__(self, dim, context_dim, heads, inner):
            super().__init__()
            self.heads = heads
            self.to_q, self.to_out = Linear(dim, inner, bias=False), Sequential(Linear(inner, dim))
            self.to_k, self.to_v = Linear(context_dim, inner, bias=False), Linear(context_dim, inner, bias=False)

        def forward(self, x, context):
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
            q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
            return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class GEGLU(Module):
        def __init__(self, dim):
            super().__init__()
            self.proj = Linear(dim, 8 * dim)

        def forward(self, x):
            a = self.proj(x)
            half = a.shape[-1] // 2
            return a[..., :half] * F.gelu(a[..., half:])

    class FeedForward(Module):
        def __init__(self, dim):
            super().__init__()
            self.net = Sequential(GEGLU(dim), Identity(), Linear(4 * dim, dim))

        def forward(self, x):
            return self.net(x)

    class TransformerBlock(Module):
        def __init__(self, dim, context_dim, heads):
            super().__init__()
            self.attn1, self.attn2 = CrossAttention(dim, dim, heads, dim), CrossAttention(dim, context_dim, heads, dim)
            self.ff = FeedForward(dim)
            self.norm1, self.norm2, self.norm3 = (torch.nn.LayerNorm(dim) for _ in range(3))

        def forward(self, x, context):
            h = self.norm1(x)
            x = self.attn1(h, h) + x
            x = self.attn2(self.norm2(x), context) + x
            return self.ff(self.norm3(x)) + x

    class SpatialTransformer(Module):
        def __init__(self, config, channels, heads):
            super().__init__()
            self.norm = GroupNorm(config.groups, channels, eps=1e-6)
            inner = heads * (channels // heads if config.legacy else config.num_head_channels)
            self.proj_in, self.proj_out = Conv2d(channels, inner, 1), Conv2d(inner, channels, 1)
            blocks = [TransformerBlock(inner, config.context_dim, heads) for _ in range(config.transformer_depth)]
            self.transformer_blocks = ModuleList(blocks)

        def forward(self, x, emb, context):
            h = self.proj_in(self.norm(x)).flatten(2).mT
            for block in self.transformer_blocks:
                h = block(h, context)
            return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))

    class Network(Module):
        def __init__(self, config):
            super().__init__()
            c, width, factor = config, config.model_channels, 1
            widths = [mult * width for mult in c.channel_mult]
            Conv2d = convolution(c)

            def attention(channels, up=False):
                heads = channels // c.num_head_channels if c.num_head_channels else c.num_heads
                heads = c.num_heads_upsample if up and c.num_heads_upsample else heads
                return (SpatialTransformer if c.use_spatial_transformer else AttentionBlock)(c, channels, heads)

            def blocks(c_in, c_out, up=False):
                return [ResBlock(c, c_in, c_out), *([attention(c_out, up)] if factor in c.attention_resolutions else [])]

            def resample(channels, name):
                if c.resblock_updown:
                    return ResBlock(c, channels, channels, enlarge if name == "conv" else reduce)
                return Resample(c, channels, name)

            self.width = width
            self.time_embed = Sequential(Linear(width, 4 * width), SiLU(), Linear(4 * width, 4 * width))
            if c.num_classes:
                self.label_emb = torch.nn.Embedding(c.num_classes, 4 * width)
            down, at = [[Conv2d(c.in_channels, width, 3, padding=1)]], [width]
            for i, after in enumerate(widths):
                for _ in range(c.num_res_blocks):
                    down.append(blocks(at[-1], after))
                    at.append(after)
                if i < len(widths) - 1:
                    down.append([resample(after, "op")])
                    at.append(after)
                    factor = factor * 2
            last = widths[-1]
            middle = [ResBlock(c, last, last), attention(last), ResBlock(c, last, last)]
            up = []
            for i in range(len(widths) - 1, -1, -1):
                for j in range(c.num_res_blocks + 1):
                    up.append(blocks(last + at.pop(), widths[i], up=True))
                    last = widths[i]
                    if i > 0 and j == c.num_res_blocks:
                        up[-1].append(resample(last, "conv"))
                        factor = factor // 2
            self.input_blocks, self.output_blocks = (ModuleList(map(ModuleList, blocks)) for blocks in (down, up))
            self.middle_block = ModuleList(middle)
            self.out = Sequential(GroupNorm(c.groups, last), SiLU(), Conv2d(last, c.out_channels, 3, padding=1))
            if c.n_embed:
                self.id_predictor = Sequential(GroupNorm(c.groups, last), Conv2d(last, c.n_embed, 1))

        def forward(self, x, t, context=None, y=None):
            half = self.width // 2
            angles = t.double()[:, None] * 1e4 ** (-torch.arange(half).double() / half)
            emb = F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, self.width % 2))
            emb = self.time_embed(emb.to(x.dtype))
            if y is not None:
                emb = emb + self.label_emb.weight[y.long()]
            skips = []
            for i, block in enumerate(self.input_blocks):
                for layer in block:
                    x = layer(x, emb, context) if i else layer(x)
                skips.append(x)
            for layer in self.middle_block:
                x = layer(x, emb, context)
            for block in self.output_blocks:
                x = torch.cat([x, skips.pop()], 1)
                for layer in block:
                    x = layer(x, emb, context)
            return self.id_predictor(x) if hasattr(self, "id_predictor") else self.out(x)

    return Network


def torch_answer(config, weights, arrays, cotangent):
    """The output, and the gradients of x, of the context if there is one, and of each parameter, in float64."""
    import torch

    twin = torch_network()(config).double()
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    x, t, context, y = (None if a is None else torch.from_numpy(a) for a in arrays)
    floats = [a.double().requires_grad_() for a in (x, context) if a is not None]
    output = twin(floats[0], t, floats[1] if context is not None else None, y)
    (output * torch.from_numpy(cotangent)).sum().backward()
    of_parameters = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    return output.detach().numpy(), [a.grad.numpy() for a in floats], {name: g.numpy() for name, g in of_parameters.items()}


def our_answer(net, mode, arrays, cotangent):
    """The same of ours."""
    parameters = net.trainable_params()
    takes_context, takes_label = arrays[2] is not None, arrays[3] is not None

    def forward(x, t, *rest):
        context = rest[0] if takes_context else None
        y = rest[-2] if takes_label else None
        output = net(x, t, context, y)
        return (output * rest[-1]).sum(), output

    gradient = ms.value_and_grad(forward, (0, 2) if takes_context else 0, parameters, has_aux=True)
    function = compiled(gradient) if mode == "graph" else gradient
    (_, output), (floats, gradients) = function(*[Tensor(a) for a in (*arrays, cotangent) if a is not None])
    floats = floats if takes_context else [floats]
    named = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}
    return output.asnumpy(), [a.asnumpy() for a in floats], named


PARITY = [
    ("ADM", 1, "graph"),
    ("ADM", 13, "pynative"),
    ("LDM", 1, "pynative"),
    ("LDM recomputed, with classes", 13, "graph"),
    ("unconditional recomputed", 13, "pynative"),
    ("codebook", 1, "graph"),
    ("codebook", 13, "pynative"),
    *[
        pytest.param(name, batch, "graph", marks=pytest.mark.slow)
        for name, batch in {
            "heads on the way up": 13,
            "heads narrower than the width": 1,
            "heads of a given width": 13,
            "series": 13,
            "series without convolution": 1,
            "odd": 1,
        }.items()
    ],
]


@pytest.mark.parametrize(("name", "batch", "mode"), PARITY)
def test_output_and_gradients_like_pytorch(name, batch, mode):
    torch_network()
    config = config_of(name)
    net, arrays = drawn(config), draw_inputs(config, batch)
    cotangent = np.random.default_rng(0).standard_normal((batch, config.n_embed or 2, *arrays[0].shape[2:]), np.float32)
    reference, of_inputs, of_parameters = torch_answer(
        config, {p.name: p.asnumpy() for p in net.get_parameters()}, arrays, cotangent
    )
    output, our_inputs, our_parameters = our_answer(net, mode, arrays, cotangent)
    assert_close(output, reference)
    for ours, gradient in zip(our_inputs, of_inputs, strict=True):
        assert_close(ours, gradient)
    unused = our_parameters.keys() - of_parameters.keys()
    assert all(name.startswith("out.") for name in unused) and bool(unused) == (config.n_embed is not None)
    for name, gradient in of_parameters.items():
        assert_close(our_parameters[name], gradient, name)


@settings(max_examples=12, deadline=None)
@given(
    num_res_blocks=st.integers(1, 2),
    channel_mult=st.sampled_from([(1,), (2, 1), (1, 2, 2)]),
    attention_resolutions=st.sets(st.sampled_from([1, 2, 4])).map(tuple),
    network=st.sampled_from(list(NETWORKS)),
    conv_resample=st.booleans(),
    resblock_updown=st.booleans(),
)
def test_names_and_shapes_are_those_of_pytorch(network, **options):
    config = config_of(network, **options)
    net, twin = config.build(), torch_network()(config)
    assert shapes_of(net) == {name: tuple(p.shape) for name, p in twin.state_dict().items()}
    assert len(net.trainable_params()) == len(shapes_of(net))  # no name twice
    assert config.size_multiple == 2 ** (len(config.channel_mult) - 1)


def test_names_are_those_of_compvis():
    shapes = shapes_of(config_of("LDM", num_classes=3).build())
    for name, shape in {
        "time_embed.0.weight": (32, 8),
        "time_embed.2.bias": (32,),
        "label_emb.weight": (3, 32),
        "input_blocks.0.0.weight": (8, 3, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (8, 32),
        "input_blocks.2.0.op.weight": (8, 8, 3, 3),
        "input_blocks.3.0.skip_connection.weight": (16, 8, 1, 1),
        "input_blocks.3.1.proj_in.weight": (16, 16, 1, 1),
        "middle_block.1.transformer_blocks.1.attn2.to_k.weight": (16, 6),
        "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (16,),
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (128, 16),
        "middle_block.1.transformer_blocks.0.ff.net.2.weight": (16, 64),
        "middle_block.1.transformer_blocks.0.norm3.bias": (16,),
        "output_blocks.0.0.out_layers.3.weight": (16, 16, 3, 3),
        "output_blocks.1.2.conv.weight": (16, 16, 3, 3),
        "out.2.weight": (2, 8, 3, 3),
    }.items():
        assert shapes[name] == shape, name
    assert shapes_of(config_of("ADM").build())["middle_block.1.qkv.weight"] == (48, 16, 1)
    assert shapes_of(config_of("codebook").build())["id_predictor.1.weight"] == (5, 8, 1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_output_like_diffusers():
    """diffusers' network, by its own reading of CompVis's names."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = config_of("LDM", num_classes=3, attention_resolutions=(1, 2), num_res_blocks=2)
    net, arrays = drawn(config), draw_inputs(config, 2)
    peer = diffusers.UNet2DConditionModel(
        in_channels=3,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        cross_attention_dim=6,
        attention_head_dim=2,  # which is the number of heads there
        transformer_layers_per_block=2,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    weights = {f"model.diffusion_model.{p.name}": torch.from_numpy(p.asnumpy()) for p in net.get_parameters()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(weights, peer.config))
    x, t, context, y = map(torch.from_numpy, arrays)
    with torch.no_grad():
        reference = peer(x, t, context, class_labels=y.long()).sample.numpy()
    assert_close(net(*tensors(arrays)).asnumpy(), reference)


# Initial values


@pytest.mark.parametrize("name", ["ADM", "LDM"])
def test_a_new_network_returns_zero(name):
    config = config_of(name, transformer_depth=1, attention_resolutions=())
    net = config.build()
    assert (net(*tensors(draw_inputs(config, 2))).asnumpy() == 0).all()
    zero = {p.name for p in net.get_parameters() if not p.asnumpy().any()}
    norms = [path for path, cell in net.cells_and_names() if isinstance(cell, layers.GroupNorm | unet_ldm.LayerNorm)]
    last = [name.rpartition(".")[0] for name in shapes_of(net) if "out_layers.3." in name or "proj_out." in name]
    ends = {f"{path}.{kind}" for path in [*last, "out.2"] for kind in ("weight", "bias")}
    assert zero == ends | {f"{path}.bias" for path in norms}


def test_seed_decides_the_weights():
    first, again, other = (
        {p.name: p.asnumpy() for p in config_of("ADM").build(seed).get_parameters()} for seed in (3, 3, 4)
    )
    assert all((first[name] == again[name]).all() for name in first)
    assert not (first["label_emb.weight"] == other["label_emb.weight"]).any()
    assert not (first["middle_block.1.qkv.weight"] == other["middle_block.1.qkv.weight"]).any()
    assert abs(first["middle_block.1.qkv.weight"]).max() == pytest.approx(1 / math.sqrt(16), rel=0.02)


# Layers, against float64 formulas


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 40), odd=st.integers(0, 1), t=st.lists(st.integers(0, 1000), min_size=1, max_size=13))
def test_timestep_embedding(half, odd, t):
    frequencies = np.array([1e4 ** (-i / half) for i in range(half)])
    angles = np.array(t)[:, None] * frequencies
    out = unet_ldm.TimestepEmbedding(2 * half + odd)(Tensor(np.array(t, np.float32))).asnumpy()
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((len(t), odd))], 1)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


NORMS = {
    "ResBlock, first": (1e-5, lambda: unet_ldm.ResBlock(6, 6, 4, groups=2).in_layers[0]),
    "ResBlock, second": (1e-5, lambda: unet_ldm.ResBlock(6, 6, 4, groups=2).out_layers[0]),
    "AttentionBlock": (1e-5, lambda: unet_ldm.AttentionBlock(6, 1, groups=2).norm),
    "SpatialTransformer": (1e-6, lambda: unet_ldm.SpatialTransformer(6, 1, groups=2).norm),
    "network": (1e-5, lambda: config_of("codebook").build().out[0]),
    "codebook": (1e-5, lambda: config_of("codebook").build().id_predictor[0]),
}


@pytest.mark.parametrize("name", NORMS)
def test_epsilon_of_the_norms(name):
    """Of images so small that it counts."""
    eps, norm = NORMS[name][0], NORMS[name][1]()
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, norm.weight.size, 4, 6), np.float32)
    grouped = x.astype(np.float64).reshape(2, norm.groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    expected = (centred / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(x.shape)
    if norm.activation == "silu-after":
        expected = expected / (1 + np.exp(-expected))
    np.testing.assert_allclose(norm(Tensor(x)).asnumpy(), expected, atol=1e-5)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("with_context", "with_mask"), [(True, False), (False, False), (True, True)])
def test_cross_attention(with_context, with_mask):
    net = unet_ldm.CrossAttention(6, 4 if with_context else 6, heads=2, dim_head=3)
    layers.name_and_initialise(net, seed=0)
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((13, 7, 6), np.float32), rng.standard_normal((13, 5, 4), np.float32)
    mask = rng.random((13, 5)) < 0.6 if with_mask else np.ones((13, 5), bool)
    mask[0] = not with_mask  # nothing to attend to: the mean of all
    given = (Tensor(mask),) if with_mask else ()
    out = net(Tensor(x), Tensor(context) if with_context else None, *given).asnumpy()
    weights = {p.name: p.asnumpy().astype(np.float64) for p in net.get_parameters()}
    seen = context if with_context else x
    q, k, v = (a @ weights[f"to_{name}.weight"].T for name, a in {"q": x, "k": seen, "v": seen}.items())
    hidden = np.where(mask, 0, -1e9)[:, None] if with_mask else 0
    heads = []
    for h in (slice(3), slice(3, 6)):
        scores = q[..., h] @ k[..., h].swapaxes(1, 2) / math.sqrt(3)
        heads.append(softmax(scores * (hidden == 0) + hidden) @ v[..., h])
    expected = np.concatenate(heads, -1) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_shortcut_and_feed_forward_of_other_kinds():
    """The shortcut of a ResBlock with a 3 x 3 convolution, and a feed-forward without gate."""
    wide = unet_ldm.ResBlock(4, 6, 8, groups=2, use_conv=True)
    assert wide.skip_connection.weight.shape == (6, 4, 3, 3)
    plain = unet_ldm.FeedForward(3, gated=False)
    layers.name_and_initialise(plain, seed=0)
    weights = {p.name: p.asnumpy().astype(np.float64) for p in plain.get_parameters()}
    assert {name: w.shape for name, w in weights.items() if w.ndim == 2} == {
        "net.0.0.weight": (12, 3),
        "net.2.weight": (3, 12),
    }
    x = np.random.default_rng(0).standard_normal((2, 5, 3), np.float32)
    h = x @ weights["net.0.0.weight"].T + weights["net.0.0.bias"]
    h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    expected = h @ weights["net.2.weight"].T + weights["net.2.bias"]
    np.testing.assert_allclose(plain(Tensor(x)).asnumpy(), expected, atol=1e-5)


def test_layer_norm_of_float16_is_float32():
    net = unet_ldm.LayerNorm(5)
    load_into(net, {"weight": np.arange(1, 6.0), "bias": np.arange(5.0)})
    x = (1 + 0.01 * np.random.default_rng(0).standard_normal((2, 3, 5))).astype(np.float16)  # small, so that eps counts
    out = net(Tensor(x)).asnumpy()
    assert out.dtype == np.float32
    x = x.astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, normed * np.arange(1, 6) + np.arange(5), atol=1e-3)


def test_orders_of_the_heads_differ_by_a_permutation():
    """Channel (head, q k v, d) of the one is channel (q k v, head, d) of the other."""
    legacy, new = (unet_ldm.AttentionBlock(12, 3, groups=4, new_order=order) for order in (False, True))
    layers.name_and_initialise(legacy, seed=0)
    layers.name_and_initialise(new, seed=0)
    weights = {p.name: p.asnumpy() for p in legacy.get_parameters()}
    x = Tensor(np.random.default_rng(0).standard_normal((2, 12, 4, 6), np.float32))
    expected = legacy(x).asnumpy()
    load_into(new, weights)
    assert abs(new(x).asnumpy() - expected).max() > 0.01
    permutation = np.arange(36).reshape(3, 3, 4).swapaxes(0, 1).ravel()
    load_into(new, {name: value[permutation] if name.startswith("qkv") else value for name, value in weights.items()})
    np.testing.assert_allclose(new(x).asnumpy(), expected, atol=1e-6)


# Options that parity does not show


def test_dropout_only_in_training():
    options = {"recompute": False, "channel_mult": (1,), "attention_resolutions": ()}
    config = config_of("unconditional recomputed", **options)
    plain, net = drawn(config), drawn(config_of("unconditional recomputed", **options, dropout=0.5))
    inputs = tensors(draw_inputs(config, 2))
    expected = plain(*inputs).asnumpy()
    np.testing.assert_array_equal(net(*inputs).asnumpy(), expected)
    np.testing.assert_array_equal(plain.set_train()(*inputs).asnumpy(), expected)
    net.set_train()
    with pytest.raises(ValueError, match="needs masks"):
        net(*inputs)
    masks, found = layers.Masks(net, 2, inputs[0].shape[2:]), []
    for step in (0, 1, 0):
        masks.draw(0, step)
        found.append(net(*inputs).asnumpy())
    assert abs(found[0] - expected).max() > 0.01 and abs(found[0] - found[1]).max() > 0.01
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(net.set_train(False)(*inputs).asnumpy(), expected)
    assert not any("masks" in p.name for p in net.get_parameters())


@pytest.mark.parametrize("network", ["ADM", "LDM"])
def test_masks_fit_each_block(network):
    """Where blocks resample too, and where they do not; of another size than the smallest, and with several levels."""
    config = config_of(network, dropout=0.5, resblock_updown=network == "ADM", recompute=True)
    net, inputs = drawn(config).set_train(), tensors(draw_inputs(config, 2))
    masks = layers.Masks(net, 2, inputs[0].shape[2:])
    assert len(masks.layers) == len({cell.index for cell in masks.layers}) > 4
    masks.draw(0, 0)
    assert np.isfinite(net(*inputs).asnumpy()).all()


@pytest.mark.slow
def test_recomputed_blocks_have_the_same_masks(monkeypatch):
    """The gradient of a network that recomputes is that of the one that stores, on MindSpore's operators."""
    monkeypatch.setattr(layers.kernels, "available", lambda: False)

    def gradients(recompute):
        options = {"channel_mult": (1,), "attention_resolutions": (), "recompute": recompute}
        config = config_of("unconditional recomputed", dropout=0.5, **options)
        net, inputs = drawn(config).set_train(), tensors(draw_inputs(config, 2))
        layers.Masks(net, 2, inputs[0].shape[2:]).draw(0, 3)

        def loss(*inputs):
            return ops.square(net(*inputs)).mean()

        return ms.jit(ms.grad(loss, None, ms.ParameterTuple(net.trainable_params())))(*inputs)

    for a, b in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("network", "kinds"),
    [
        ("LDM", {"ResBlock": 8, "BasicTransformerBlock": 8}),
        ("ADM", {"ResBlock": 10, "AttentionBlock": 7}),
    ],
)
def test_recompute_is_asked_of_each_block(monkeypatch, network, kinds):
    asked = []
    monkeypatch.setattr(nn.Cell, "recompute", lambda cell: asked.append(type(cell).__name__))
    config_of(network).build()
    assert not asked
    net = config_of(network, recompute=True).build()
    assert {name: asked.count(name) for name in asked} == kinds
    assert all(cell.lean for _, cell in net.cells_and_names() if hasattr(cell, "lean"))


def test_a_network_that_recomputes_is_averaged():
    config = config_of("LDM", recompute=True, transformer_depth=1, channel_mult=(1,), attention_resolutions=(1,))
    net, inputs = drawn(config), tensors(draw_inputs(config, 1))
    average = EMA(net).net
    np.testing.assert_array_equal(average(*inputs).asnumpy(), net(*inputs).asnumpy())
    for p in average.get_parameters():
        ops.assign(p, p * 0)
    assert not average(*inputs).asnumpy().any()  # by its own weights


def taken_memory(recompute: bool, path: str) -> None:
    """In a process of its own: print the memory that compiling and running a gradient takes, in MB, and save the results."""

    def megabytes(entry):  # ru_maxrss would count the process that this one was forked from
        return int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0]) / 1024

    runtime.set_device("cpu")
    attended = {**LDM, "transformer_depth": 1, "attention_resolutions": (1,), "channel_mult": (1,)}
    net = drawn(UNetModelConfig(**{**SMALL, **attended, "model_channels": 32, "groups": 8, "recompute": recompute}))
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((4, c, 32, 32), np.float32) for c in (3, 2))
    context = rng.standard_normal((4, 5, 6), np.float32)
    (Tensor(x) + 1).asnumpy()  # starts MindSpore's runtime
    before = megabytes("VmRSS")
    output, of_inputs, of_parameters = our_answer(net, "graph", [x, np.arange(4, dtype=np.int32), context, None], cotangent)
    print(megabytes("VmHWM") - before)
    np.savez(path, output, *of_inputs, **of_parameters)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory where Linux accounts for it")
def test_recompute_takes_less_memory(tmp_path):
    """Of four transformers on 1024 positions."""
    taken, answers = [], []
    for recompute in (False, True):
        path = str(tmp_path / f"{recompute}.npz")
        folders = [str(folder) for folder in Path(__file__).parents[:2]]  # the tests' and the package's
        code = f"import sys; sys.path[:0] = {folders}; import test_unet_ldm as t; t.taken_memory({recompute}, {path!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        taken.append(float(done.stdout.split()[-1]))
        answers.append(np.load(path))
    without, recomputed = answers
    assert without.files == recomputed.files and len(without.files) > 50
    for name in without.files:
        assert_close(recomputed[name], without[name], name)
    assert taken[1] < 0.75 * taken[0], taken


@pytest.mark.parametrize("name", ["ADM", "LDM"])
def test_float16_stays_close(name):
    config = config_of(name, transformer_depth=1, channel_mult=(1,), attention_resolutions=())
    net, half, inputs = drawn(config), drawn(config), tensors(draw_inputs(config, 1))
    layers.set_compute_type(half, ms.float16)
    output, half_output = net(*inputs).asnumpy(), half(*inputs).asnumpy()
    assert half_output.dtype == np.float32
    assert 0 < abs(half_output - output).max() < 2e-2 * abs(output).max()


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_dim": 6}, "context_dim 6: set both or neither"),
        ({"use_spatial_transformer": True}, "context_dim None: set both or neither"),
        ({"num_heads": None}, "set num_heads or num_head_channels"),
        ({"num_heads": 3}, "8 channels are not divisible into heads by num_heads 3"),
        ({"num_head_channels": 5}, "8 channels are not divisible into heads by num_head_channels 5"),
        ({"groups": 3}, "8 channels are not divisible into 3 groups"),
        ({"num_heads_upsample": 3}, "channels are not divisible into heads by num_heads_upsample 3"),
        ({"dims": 3}, r"dims is 3: it must be in \[1, 2\]"),
        ({**LDM, "dims": 1}, "a SpatialTransformer is for images"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must be in \[0, 1\)"),
        ({"channel_mult": (1, 0)}, "channel_mult is .*: it must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, UserError), match=message):
        UNetModelConfig(**{**SMALL, **options}).build()


@functools.cache
def two_networks():
    return config_of("ADM").build(), config_of("LDM").build()


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize(
    ("which", "size", "inputs", "message"),
    [
        (0, (8, 7), "xty", "divisible by 2: choose another image size"),
        (0, (9, 8), "xty", "divisible by 2: choose another image size"),
        (0, (8, 8), "xt", "y is required by a network with num_classes"),
        (1, (8, 8), "xt", "context is required by a network with context_dim"),
        (0, (8, 8), "xtcy", "context is required .* by no other"),
        (1, (8, 8), "xtcy", "y is required .* by no other"),
    ],
)
def test_bad_inputs_are_named(which, size, inputs, message, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a graph that does not compile leaves a folder rank_0
    net = two_networks()[which]
    arrays = {"x": np.zeros((2, 3, *size), np.float32), "t": np.zeros(2, np.int32), "c": np.zeros((2, 5, 6), np.float32)}
    arrays["y"] = np.zeros(2, np.int32)
    x, t, context, y = (Tensor(arrays[name]) if name in inputs else None for name in "xtcy")

    def call(x, t):
        return net(x, t, context, y)

    with pytest.raises(ValueError, match=message):
        (ms.jit(call) if mode == "graph" else call)(x, t)
