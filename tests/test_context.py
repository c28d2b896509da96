"""The network conditioned on a class or a text: every kind of condition, in graph mode and PyNative, batch 1 and 13."""

from dataclasses import replace

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from ms_diffusion.models.context import LatentUnetConfig, TextEncoder
from ms_diffusion.models.layers import name_and_initialise
from ms_diffusion.models.unet_ldm import UNetModel
from ms_diffusion.runtime import UserError, compiled

SMALL = dict(model_channels=8, groups=4, channel_mult=(1,), attention_resolutions=(), num_head_channels=8, latent_size=4)
CONFIGS = {
    "none": LatentUnetConfig(**SMALL, condition="none", num_classes=None, context_dim=None),
    "class": LatentUnetConfig(**SMALL, num_classes=3, context_dim=6),
    "adm": LatentUnetConfig(**SMALL, condition="adm", num_classes=3, context_dim=None),
    "text": LatentUnetConfig(**SMALL, condition="text", num_classes=None, context_dim=8, vocab_size=5, max_length=3),
}
VALUES = {  # two conditions, and the null condition
    "none": [None],
    "class": (0, 2, 3),
    "adm": (0, 2, 3),
    "text": ([1, 2, 0], [2, 1, 0], [0, 0, 0]),
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
        cond = () if value is None else (Tensor(np.array([value] * 13, np.int32)),)
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
    assert [CONFIGS[kind].null_label for kind in ("none", "class", "adm", "text")] == [None, 3, 3, 0]
    fields = {kind: replace(config, cond_channels=1).cond_fields for kind, config in CONFIGS.items()}
    image = ("cond_image",)
    assert fields == {"none": image, "class": ("labels", *image), "adm": ("labels", *image), "text": ("tokens", *image)}
    assert CONFIGS["text"].cond_fields == ("tokens",) and CONFIGS["none"].cond_fields == ()


def test_the_order_of_words_counts():
    net = TextEncoder(vocab_size=5, max_length=3, dim=8, heads=2)
    name_and_initialise(net, 0)
    a, b = net(Tensor(np.array([[1, 2, 3], [3, 2, 1]], np.int32))).asnumpy()
    assert a.shape == (3, 8) and abs(a - b[::-1]).max() > 1e-3
    alone = net(Tensor(np.array([[1, 2, 3]], np.int32))).asnumpy()[0]
    np.testing.assert_allclose(alone, a, atol=1e-5)


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
