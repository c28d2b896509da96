"""The diffusion transformer against PyTorch, and what follows from adaLN-Zero and from its symmetries."""

import functools
import math
from dataclasses import asdict

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from ms_diffusion import kernels
from ms_diffusion.convert import load_into, load_pretrained
from ms_diffusion.models.dit import DiTConfig, positions
from ms_diffusion.runtime import UserError, compiled

SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 3}
KINDS = {
    "class": DiTConfig(**SMALL, num_classes=4),
    "text": DiTConfig(**SMALL, vocab_size=9, max_length=3, text_dim=8),
    "image": DiTConfig(**SMALL, patch_size=4, channels=3, out_dim=6, cond_channels=1, self_condition=True),
}
SIZE = 12, 8  # H and W


def inputs(config, batch, seed=0):
    """x, t, the conditions and a cotangent of the output."""
    rng = np.random.default_rng((seed, batch))

    def normal(channels):
        return rng.standard_normal((batch, channels, *SIZE), np.float32)

    tokens = rng.integers(0, 9, (batch, config.max_length)).astype(np.int32)
    tokens[-1] = 0  # no caption
    cond = {"labels": rng.integers(0, 5, batch).astype(np.int32), "tokens": tokens, "cond_image": normal(1)}
    arrays = [cond[name] for name in config.cond_fields] + [normal(config.channels)] * config.self_condition
    return normal(config.channels), rng.integers(0, 1000, batch).astype(np.int32), *arrays, normal(config.out_dim or 1)


@functools.cache
def drawn(kind, native=False):
    """A network with random weights, and its compiled output with gradients, by the CPU kernels or without."""
    config = KINDS[kind]
    if native:
        with kernels.disabled():
            net = config.build()
    else:
        net = config.build()
    rng = np.random.default_rng(1)
    load_into(net, {p.name: rng.normal(0, 0.1, p.shape).astype(np.float32) for p in net.get_parameters()})

    def forward(*args):
        output = net(*args[:-1])
        return (output * args[-1]).sum(), output

    gradient = compiled(ms.value_and_grad(forward, 0, net.trainable_params(), has_aux=True))

    def call(*arrays):
        (_, output), (dx, gradients) = gradient(*map(Tensor, arrays))
        found = {p.name: g.asnumpy() for p, g in zip(net.trainable_params(), gradients, strict=True)}
        return {"output": output.asnumpy(), "x": dx.asnumpy(), **found}

    return net, call


def twin_of(config, net):
    """The network in PyTorch with the same weights; for captions it has an encoder of its own (`Caption`)."""
    import torch

    from benchmarks.torch_peer import DiT as Twin

    twin = Twin(**asdict(config))
    if config.vocab_size:
        twin.text_emb = caption(config)
    twin.load_state_dict({p.name: torch.from_numpy(p.asnumpy()) for p in net.get_parameters()})
    return twin


def caption(config):
    """The mean of a small transformer over the tokens that are not 0, projected to the network's width."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    dim = config.text_dim

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
            self.to_out = nn.Sequential(nn.Linear(dim, dim))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
            return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            first = nn.Module()
            first.proj = nn.Linear(dim, 8 * dim)
            self.net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * dim, dim))

        def forward(self, x):
            x, gate = self.net[0].proj(x).chunk(2, dim=-1)
            return self.net[2](x * F.gelu(gate))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.norm2, self.ff = nn.LayerNorm(dim), Attention(), nn.LayerNorm(dim), FeedForward()

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.ff(self.norm2(x))

    class Caption(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Module()
            self.encoder.token_emb = nn.Embedding(config.vocab_size + 1, dim)
            self.encoder.pos_emb = nn.Embedding(config.max_length, dim)
            self.encoder.blocks, self.encoder.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(dim)
            self.proj = nn.Linear(dim, config.hidden_size)

        def forward(self, tokens):
            x = self.encoder.token_emb(tokens) + self.encoder.pos_emb.weight
            x, used = self.encoder.norm(self.encoder.blocks(x)), (tokens != 0)[..., None]
            return self.proj((x * used).sum(1) / torch.clamp(used.sum(1), min=1))

    return Caption()


def torch_answers(config, net, x, t, *rest):
    import torch

    twin = twin_of(config, net)
    x, t, *cond, cotangent = (torch.from_numpy(a) for a in (x, t, *rest))
    x.requires_grad_(True)
    output = twin(x, t.float(), *cond)
    (output * cotangent).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    return {"output": output.detach().numpy(), "x": x.grad.numpy(), **gradients}


def assert_alike(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.linalg.norm(found[name] - value) <= tolerance * np.linalg.norm(value), name


@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_like_pytorch(kind, batch):
    pytest.importorskip("torch")
    net, answers = drawn(kind)
    arrays = inputs(KINDS[kind], batch)
    assert_alike(answers(*arrays), torch_answers(KINDS[kind], net, *arrays), 3e-5)


def test_mindspores_operators_give_the_same():
    (_, ours), (_, theirs), arrays = drawn("class"), drawn("class", native=True), inputs(KINDS["class"], 3)
    assert_alike(theirs(*arrays), ours(*arrays), 3e-5)


def test_images_are_independent_of_their_batch():
    """A permutation of the batch permutes the output and the gradient of x."""
    _, answers = drawn("class")
    arrays, order = inputs(KINDS["class"], 13), np.random.default_rng(0).permutation(13)
    plain, permuted = answers(*arrays), answers(*[a[order] for a in arrays])
    for name in ("output", "x"):
        np.testing.assert_allclose(permuted[name], plain[name][order], rtol=1e-4, atol=1e-4)


def test_a_new_network_returns_zero_and_can_learn():
    """adaLN-Zero (section 3.2): every block is the identity, and the last layer returns 0. Its gradient is not 0."""
    net = KINDS["class"].build(3)
    *arrays, cotangent = inputs(KINDS["class"], 2)

    def loss(*args):
        return (net(*args) * Tensor(cotangent)).sum()

    assert not net(*map(Tensor, arrays)).asnumpy().any()
    gradients = ms.grad(loss, None, net.trainable_params())(*map(Tensor, arrays))
    found = {p.name: g.asnumpy() for p, g in zip(net.trainable_params(), gradients, strict=True)}
    assert all(np.isfinite(g).all() for g in found.values())
    assert [name for name, g in found.items() if g.any()] == ["final_layer.linear.weight", "final_layer.linear.bias"]


def test_initial_weights_follow_the_seed():
    a, b, other = ({p.name: p.asnumpy() for p in KINDS["text"].build(seed).get_parameters()} for seed in (1, 1, 2))
    np.testing.assert_equal(a, b)
    assert (a["x_embedder.proj.weight"] != other["x_embedder.proj.weight"]).all()
    bound = math.sqrt(6 / (24 + 72))  # Glorot & Bengio 2010, eq. 16
    assert 0.9 * bound < abs(a["blocks.1.attn.qkv.weight"]).max() <= bound


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = positions(3, 5, 8).reshape(3, 5, 8)
    row, column = 2, 3
    wanted = [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos) for frequency in (1, 0.01)]
    np.testing.assert_allclose(table[row, column], wanted, atol=1e-7)


@pytest.fixture(scope="module")
def state():
    """The state dict of a square network in PyTorch, with the table of positions that the paper's code stores."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_peer import DiT as Twin

    torch.manual_seed(0)
    twin = Twin(**asdict(KINDS["class"]))
    return twin, twin.state_dict() | {"pos_embed": twin.positions(4, 4, "cpu")}


def test_a_checkpoint_of_pytorch_is_loaded(state, tmp_path):
    import torch

    twin, arrays = state
    torch.save({"ema": arrays}, tmp_path / "DiT.pt")
    net = KINDS["class"].build()
    report = load_pretrained(net, tmp_path / "DiT.pt")
    assert len(report.loaded) == len(arrays) - 1 and not report.missing and not report.unexpected
    x, t, labels, _ = inputs(KINDS["class"], 2)
    wanted = twin(torch.from_numpy(x), torch.from_numpy(t).float(), torch.from_numpy(labels)).detach().numpy()
    np.testing.assert_allclose(net(*map(Tensor, (x, t, labels))).asnumpy(), wanted, rtol=1e-4, atol=1e-5)


def test_other_positions_are_not_left_out(state, tmp_path):
    import torch

    arrays = state[1] | {"pos_embed": state[1]["pos_embed"] + 0.1}
    torch.save(arrays, tmp_path / "DiT.pt")
    with pytest.raises(UserError, match="pos_embed"):
        load_pretrained(KINDS["class"].build(), tmp_path / "DiT.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 26, "num_heads": 2}, "hidden_size is 26"),
        ({"hidden_size": 28, "num_heads": 3}, "num_heads, 3"),
        ({"vocab_size": 5}, "max_length"),
        ({"vocab_size": 5, "max_length": 2, "num_classes": 3}, "num_classes"),
        ({"depth": 0}, "depth"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, UserError), match=message):
        DiTConfig(**options).build()
