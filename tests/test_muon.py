"""Muon against singular values in float64, PyTorch's optimizer, and its own steps in other forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Tensor, nn, ops

from ms_diffusion.models import layers
from ms_diffusion.training.muon import COEFFICIENTS, ITERATIONS, RMS, make_orthogonalise, matrices
from ms_diffusion.training.pack import Pack
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

LR, WARMUP, STEPS = 0.05, 2, 6
SHAPES = [(4, 4), (7, 3), (3, 7), (5, 2, 3, 3), (1, 6), (6, 1)]


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6), st.sampled_from([1e-4, 1, 1e4]), st.integers(0, 100))
def test_only_the_singular_values_change(shapes, scale, seed):
    """By the polynomial, applied to them as numbers. All but small ones come between 0.6 and 1.3."""
    rng, (a, b, c) = np.random.default_rng(seed), COEFFICIENTS
    values = [scale * rng.standard_normal(shape) for shape in shapes]
    found = make_orthogonalise(shapes)(tuple(Tensor(x.astype(np.float32)) for x in values))
    for x, y in zip(values, found, strict=True):
        u, s, v = np.linalg.svd(x.reshape(x.shape[0], -1), full_matrices=False)
        s = start = s / np.sqrt((s**2).sum())
        for _ in range(ITERATIONS):
            s = a * s + b * s**3 + c * s**5
        assert all(0.6 < s[start > 0.02]) and all(s < 1.3)
        assert y.shape == x.shape
        np.testing.assert_allclose(y.asnumpy().reshape(u.shape[0], -1), (u * s) @ v, atol=2e-4)


def test_the_orthogonal_form_of_nothing_is_nothing():
    (found,) = make_orthogonalise([(3, 5)])((Tensor(np.zeros((3, 5), np.float32)),))
    np.testing.assert_array_equal(found.asnumpy(), np.zeros((3, 5)))


def small_net():
    net = nn.SequentialCell(layers.Linear(3, 5), layers.Linear(5, 2, "silu"))
    layers.name_and_initialise(net, seed=0)
    return net


def trained(packed=False, poisoned=None, **options):
    """The losses of six steps of a small network, and what they leave. Batch `poisoned` comes once more, with NaN."""
    net, rng = small_net(), np.random.default_rng(1)
    optimizer = make_optimizer(net, LR, WARMUP, STEPS, name="muon")
    pack = Pack(net, optimizer) if packed else None

    def loss_fn(x, y):
        return ops.square(net(x) - y).mean()

    step = make_train_step(loss_fn, optimizer, ema := EMA(net, 0.3), weight_decay=0.7, pack=pack, clip_norm=1e9, **options)
    losses = []
    for i in range(STEPS):
        x, y = rng.standard_normal((4, 3), np.float32), rng.standard_normal((4, 2), np.float32)
        losses.append(float(step(x, y)[0]))
        if i == poisoned:
            assert math.isnan(float(step(x, y * np.float32("nan"))[0]))
    if pack is not None:
        assert pack.count == 2  # the biases
        pack.write_back()
    state = [*optimizer.get_parameters(), *ema.averages]
    return losses, {p.name: p.asnumpy().copy() for p in state}


def test_steps_equal_pytorch():
    """Whose products have 8 bits, so that an update is right to some per cent, and Adam's part to rounding."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs PyTorch 2.9")
    peer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 2))
    with torch.no_grad():
        for p, value in zip(peer.parameters(), small_net().get_parameters(), strict=True):
            p.copy_(torch.from_numpy(value.asnumpy()))
    start = [p.detach().clone() for p in peer.parameters()]
    weights, biases = ([p for p in peer.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    muon = torch.optim.Muon(weights, lr=1.0, weight_decay=0.7, adjust_lr_fn="match_rms_adamw")
    optimizers, rng, losses = (muon, torch.optim.Adam(biases, lr=1.0)), np.random.default_rng(1), []
    for i in range(STEPS):
        lr = LR * min((i + 1) / (WARMUP + 1), 1) * 0.5 * (1 + np.cos(np.pi * max(i - WARMUP, 0) / (STEPS - WARMUP)))
        x, y = rng.standard_normal((4, 3), np.float32), rng.standard_normal((4, 2), np.float32)
        loss = torch.square(peer(torch.from_numpy(x)) - torch.from_numpy(y)).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = lr
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    found, state = trained()
    np.testing.assert_allclose(found, losses, rtol=0.01)
    for p, ours, before in zip(peer.parameters(), small_net().get_parameters(), start, strict=True):
        moved = np.abs((p.detach() - before).numpy()).max()
        np.testing.assert_allclose(state[ours.name], p.detach().numpy(), atol=0.04 * moved)


@pytest.mark.parametrize("how", [{"packed": True}, {"accumulate": 2}, {"poisoned": 2}], ids=str)
def test_the_same_in_other_forms(how):
    """Biases in a buffer, as on cards; a batch in parts; and a step that is not finite, which changes nothing."""
    losses, state = trained()
    found, found_state = trained(**how)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for name, value in state.items():
        np.testing.assert_allclose(found_state[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_update_is_as_large_as_adam_would_make_it():
    net = small_net()
    before = [p.asnumpy().copy() for p in net.get_parameters()]
    optimizer = make_optimizer(net, LR, 0, 10, name="muon", decay=False)

    def loss_fn(x):
        return ops.square(net(x)).mean()

    make_train_step(loss_fn, optimizer)(np.random.default_rng(0).standard_normal((64, 3), np.float32))
    for p, value in zip(net.get_parameters(), before, strict=True):
        rms = np.sqrt(np.square(p.asnumpy() - value).mean())
        assert rms == pytest.approx(LR, rel=0.01) if p.ndim == 1 else 0.6 * RMS * LR < rms < 1.3 * RMS * LR


def test_embeddings_norms_grouped_and_frozen_layers_are_left_to_adam():
    convolutions = layers.conv2d(4, 4, 3), layers.conv2d(4, 4, 3, groups=4), layers.Upsample(4)
    net = nn.SequentialCell(*convolutions, layers.GroupNorm(2, 4), layers.Linear(4, 4))
    net.insert_child_to_cell("embedding", layers.Embedding(3, 4))
    layers.name_and_initialise(net, seed=0)
    net[4].weight.requires_grad = False
    assert matrices(net) == [net[0].weight, net[2].weight]
    optimizer = make_optimizer(net, LR, 0, 10, name="muon")
    assert optimizer.count == 2 and list(optimizer.parameters[-2:]) == matrices(net)
    assert {p.name for p in optimizer.parameters} == {p.name for p in net.trainable_params()}
