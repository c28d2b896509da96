"""The network conditioned on a class or a text: every kind of condition, in graph mode and PyNative, batch 1 and 13."""

from dataclasses import replace

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from ms_diffusion.convert import load_into
from ms_diffusion.models.context import BERTEmbedder, LatentUnetConfig, SpatialRescaler, TextEncoder
from ms_diffusion.models.layers import name_and_initialise
from ms_diffusion.models.unet_ldm import UNetModel
from ms_diffusion.runtime import UserError, compiled

SMALL = dict(model_channels=8, groups=4, channel_mult=(1,), attention_resolutions=(), num_head_channels=8, latent_size=4)
CONFIGS = {
    "none": LatentUnetConfig(**SMALL, condition="none", num_classes=None, context_dim=None),
    "class": LatentUnetConfig(**SMALL, num_classes=3, context_dim=6),
    "adm": LatentUnetConfig(**SMALL, condition="adm", num_classes=3, context_dim=None),
    "text": LatentUnetConfig(**SMALL, condition="text", num_classes=None, context_dim=8, vocab_size=5, max_length=3),
    "bert": LatentUnetConfig(**SMALL, condition="bert", num_classes=None, context_dim=8, vocab_size=5, max_length=3),
    "context": LatentUnetConfig(**SMALL, condition="context", num_classes=None, context_dim=2),
}
VALUES = {  # two conditions, and the null condition
    "none": [None],
    "class": (0, 2, 3),
    "adm": (0, 2, 3),
    "text": ([1, 2, 0], [2, 1, 0], [0, 0, 0]),
    "bert": ([1, 2, 0], [2, 1, 0], [0, 0, 0]),
    "context": ([[0.5, 1]], [[1, 0.5]], [[0, 0]]),
}


def without_zeros(config, seed=0):
    """The network, its zeros replaced by random weights."""
    net, rng = config.build(seed), np.random.default_rng(seed)
    for p in net.get_parameters():
        if not p.asnumpy().any():
            p.set_data(Tensor(rng.uniform(-0.3, 0.3, p.shape).astype(np.float32)))
    return net.set_train(False)


def inputs(config, batch):
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, config.in_channels, 4, 4)).astype(np.float32)
    return Tensor(x), Tensor(rng.integers(0, 1000, batch).astype(np.int32))


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_condition_changes_the_output(kind):
    """The outputs for all conditions differ, each row depends on itself alone, and graph and PyNative agree."""
    config = CONFIGS[kind]
    net = without_zeros(config)
    x, t = inputs(config, 13)
    graph = compiled(net)
    outputs = []
    for value in VALUES[kind]:
        cond = () if value is None else (Tensor(np.array([value] * 13, np.float32 if kind == "context" else np.int32)),)
        out = graph(x, t, *cond).asnumpy()
        assert out.shape == x.shape and np.isfinite(out).all()
        np.testing.assert_allclose(net(x[:1], t[:1], *[c[:1] for c in cond]).asnumpy(), out[:1], atol=1e-5)
        outputs.append(out)
    for i, a in enumerate(outputs):
        assert all(abs(a - b).reshape(13, -1).max(1).min() > 1e-4 for b in outputs[:i])


def test_an_image_is_concatenated_to_x():
    """CompVis's concat and hybrid."""
    config = replace(CONFIGS["class"], cond_channels=1)
    net = without_zeros(config)
    x, t = inputs(config, 2)
    image, labels = Tensor(np.ones((2, 1, 4, 4), np.float32)), Tensor(np.array([0, 3], np.int32))
    out = net(x, t, labels, image).asnumpy()
    context = net.cond_stage(labels)
    both = ms.ops.concat((x, image), 1)
    np.testing.assert_allclose(out, net.unet(both, t, context).asnumpy(), atol=1e-6)
    assert isinstance(net.unet, UNetModel) and context.shape == (2, 1, 6)


def test_the_conditions_and_the_null_label():
    assert {kind: config.null_label for kind, config in CONFIGS.items() if config.null_label is not None} == {
        "class": 3,
        "adm": 3,
        "text": 0,
    }
    assert replace(CONFIGS["adm"], null_class=False).null_label is None
    fields = {kind: replace(config, cond_channels=1).cond_fields for kind, config in CONFIGS.items()}
    image = ("cond_image",)
    firsts = {"class": "labels", "adm": "labels", "text": "tokens", "bert": "tokens", "context": "context"}
    assert fields == {"none": image} | {kind: (first, *image) for kind, first in firsts.items()}
    assert CONFIGS["text"].cond_fields == ("tokens",) and CONFIGS["none"].cond_fields == ()


def test_the_order_of_words_counts():
    net = TextEncoder(vocab_size=5, max_length=3, dim=8, heads=2)
    name_and_initialise(net, 0)
    a, b = net(Tensor(np.array([[1, 2, 3], [3, 2, 1]], np.int32))).asnumpy()
    assert a.shape == (3, 8) and abs(a - b[::-1]).max() > 1e-3
    alone = net(Tensor(np.array([[1, 2, 3]], np.int32))).asnumpy()[0]
    np.testing.assert_allclose(alone, a, atol=1e-5)


def test_a_table_without_null_class():
    """As CompVis's ClassEmbedder has it by default."""
    shapes = [p.shape for p in replace(CONFIGS["class"], null_class=False).build().cond_stage.get_parameters()]
    assert shapes == [(3, 6)]


def bert_peer(vocab_size, length, dim, depth):
    """The text encoder in PyTorch: x-transformers' names, PyTorch's own attention."""
    torch = pytest.importorskip("torch")
    from torch.nn import GELU, Embedding, Identity, LayerNorm, Linear, Module, ModuleList, Sequential

    class Attention(Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (Linear(dim, 512, bias=False) for _ in range(3))
            self.to_out = Linear(512, dim)

        def forward(self, x):
            q, k, v = (f(x).unflatten(2, (8, 64)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.to_out(out.transpose(1, 2).flatten(2))

    class FeedForward(Module):
        def __init__(self):
            super().__init__()
            self.net = Sequential(Sequential(Linear(dim, 4 * dim), GELU()), Identity(), Linear(4 * dim, dim))

        def forward(self, x):
            return self.net(x)

    class Peer(Module):
        def __init__(self):
            super().__init__()
            inner = self.transformer = Module()
            inner.token_emb, inner.pos_emb, inner.attn_layers = Embedding(vocab_size, dim), Module(), Module()
            inner.pos_emb.emb = Embedding(length, dim)
            kinds = [Attention, FeedForward] * depth
            inner.attn_layers.layers = ModuleList([ModuleList([LayerNorm(dim), kind()]) for kind in kinds])
            inner.norm = LayerNorm(dim)

        def forward(self, tokens):
            inner = self.transformer
            x = inner.token_emb(tokens) + inner.pos_emb.emb.weight
            for norm, layer in inner.attn_layers.layers:
                x = layer(norm(x)) + x
            return inner.norm(x)

    return Peer()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 13])
def test_text_encoder_of_latent_diffusion(batch):
    """Outputs and gradients of each parameter, in graph mode."""
    size = 7, 5, 16, 2
    peer, net, rng = bert_peer(*size), BERTEmbedder(*size), np.random.default_rng(batch)
    import torch

    name_and_initialise(net, 0)
    weights = {p.name: rng.normal(0.1, 0.3, p.shape).astype(np.float32) for p in net.get_parameters()}
    load_into(net, weights)
    peer.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    peer.double()
    tokens, cotangent = rng.integers(0, 7, (batch, 5)), rng.standard_normal((batch, 5, 16))
    out = peer(torch.from_numpy(tokens))
    (out * torch.from_numpy(cotangent)).sum().backward()
    parameters, factor = net.trainable_params(), Tensor(cotangent.astype(np.float32))

    def forward(tokens):
        out = net(tokens)
        return (out * factor).sum(), out

    gradient = compiled(ms.value_and_grad(forward, None, parameters, has_aux=True))
    (_, ours), gradients = gradient(Tensor(tokens.astype(np.int32)))
    np.testing.assert_allclose(ours.asnumpy(), out.detach().numpy(), atol=1e-5)
    expected = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    assert expected.keys() == weights.keys()
    for p, found in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(found.asnumpy(), expected[p.name], atol=1e-4 * abs(expected[p.name]).max(), rtol=1e-4)


RESCALERS = {
    "half": {},
    "twice half": {"n_stages": 2, "method": "bicubic"},
    "larger": {"multiplier": 1.7, "method": "bicubic"},
    "larger, bilinear": {"multiplier": 2.3},
    "means": {"multiplier": 0.3, "method": "area"},
    "nearest": {"multiplier": 0.4, "method": "nearest"},
    "channels": {"multiplier": 0.7, "out_channels": 2, "bias": True},
}


@pytest.mark.parametrize("name", RESCALERS)
def test_rescaler_resizes_as_pytorch_does(name):
    torch = pytest.importorskip("torch")
    options = RESCALERS[name]
    net, rng = SpatialRescaler(**options), np.random.default_rng(0)
    name_and_initialise(net, 0)
    x = rng.standard_normal((2, 3, 13, 22), np.float32)
    expected = torch.from_numpy(x).double()
    for _ in range(options.get("n_stages", 1)):
        method, factor = options.get("method", "bilinear"), options.get("multiplier", 0.5)
        expected = torch.nn.functional.interpolate(expected, scale_factor=factor, mode=method)
    if "out_channels" in options:
        weight, bias = (torch.from_numpy(p.asnumpy()).double() for p in net.get_parameters())
        expected = torch.nn.functional.conv2d(expected, weight, bias)
    assert [p.name for p in net.get_parameters()] == ["channel_mapper.weight", "channel_mapper.bias"][
        : 2 * ("out_channels" in options)
    ]
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), expected.numpy(), atol=1e-5)


def test_rescaler_in_a_graph():
    """Halving by a bilinear resize is the mean of 2 x 2."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6), np.float32)
    expected = x.reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    np.testing.assert_allclose(compiled(SpatialRescaler())(Tensor(x)).asnumpy(), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"n_stages": -1}, {"method": "trilinear"}])
def test_bad_rescalers_are_refused(options):
    with pytest.raises(ValueError, match="n_stages must be at least 0, method nearest"):
        SpatialRescaler(**options)


def test_images_that_a_rescaler_makes_too_small_are_refused():
    with pytest.raises(ValueError, match="choose larger images"):
        SpatialRescaler()(Tensor(np.zeros((1, 1, 1, 4), np.float32)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_seeds(kind):
    net, same, other = (CONFIGS[kind].build(seed) for seed in (0, 0, 1))
    names = [p.name for p in net.get_parameters()]
    assert len(set(names)) == len(names) and all(name.startswith(("unet.", "cond_stage.")) for name in names)
    values = [[p.asnumpy() for p in n.get_parameters()] for n in (net, same, other)]
    assert all(np.array_equal(a, b) for a, b in zip(values[0], values[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(values[0], values[2], strict=True))


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("class", dict(num_classes=None), "num_classes None"),
        ("text", dict(num_classes=3), "num_classes 3"),
        ("class", dict(context_dim=None), "context_dim None"),
        ("adm", dict(context_dim=4), "context_dim 4"),
        ("none", dict(condition="image"), "condition is 'image': choose one of none, class, adm, text"),
        ("text", dict(max_length=-1), "max_length is -1: it must be at least 0"),
    ],
)
def test_bad_configurations_are_refused(kind, change, message):
    with pytest.raises((ValueError, UserError), match=message):
        replace(CONFIGS[kind], **change).build()
