"""The parameters as one buffer, which Ascend and GPU train: against the same steps without it."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor, nn

from ms_diffusion.models import layers
from ms_diffusion.runtime import compiled
from ms_diffusion.training.pack import Pack, make_pack
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step


class Net(nn.Cell):
    """x (B, 3, 6, 6), labels (B,) -> (B, 2), with a layer of each sort and a parameter that no layer reads from a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = layers.conv2d(3, 4, 3, padding=1), layers.GroupNorm(2, 4, activation="silu-after")
        self.up, self.linear = layers.Upsample(4), layers.Linear(4, 2, "silu")
        self.embedding = layers.Embedding(5, 2)
        self.shift = ms.Parameter(Tensor(np.zeros(2, np.float32)), name="shift")
        layers.name_and_initialise(self, 0)

    def construct(self, x, labels):
        x = self.up(self.norm(self.conv(x))).mean((2, 3))
        return self.linear(x.astype(ms.float32), self.embedding(labels)) + self.shift


def train(packed, precision=ms.float32, overflow=None):
    """What five steps return and leave behind; the images of step `overflow` are beyond float16."""
    net, rng = Net(), np.random.default_rng(0)
    layers.set_compute_type(net, precision)
    scaler = None if precision == ms.float32 else ms.amp.DynamicLossScaler(2.0**10, 2, 2)

    def loss_fn(x, y, labels=None):
        return (net(x, labels) - y).square().mean()

    averages = EMA(net, 0.9), EMA(net, length=0.1)
    optimizer = make_optimizer(net, 1e-2, 2, 10)
    pack = Pack(net, optimizer) if packed else None
    options = {"extra_emas": averages[1:], "loss_scaler": scaler, "clip_norm": 0.5, "pack": pack}
    step, outputs = make_train_step(loss_fn, optimizer, averages[0], **options), []
    for i in range(5):
        x = rng.standard_normal((4, 3, 6, 6), np.float32) * (1e30 if i == overflow else 1)
        batch = {"y": rng.standard_normal((4, 2), np.float32), "x": x, "labels": rng.integers(0, 5, 4).astype(np.int32)}
        outputs.append([float(each) for each in step(**batch)])
    if packed:
        assert pack.count == 9 and pack.trained[9] is net.shift
        pack.write_back()
    state = [*optimizer.parameters, *optimizer.moment1, *optimizer.moment2, *averages[0].averages, *averages[1].averages]
    scalars = [optimizer.beta1_power, optimizer.beta2_power, optimizer.global_step]
    scalars += [scaler.scale_value, scaler.counter] if scaler else []
    return net, np.array(outputs), [p.asnumpy().copy() for p in state], [float(p.asnumpy().item()) for p in scalars]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [ms.float32, ms.float16], ids=str)
def test_a_buffer_changes_nothing(precision):
    _, outputs, state, scalars = train(False, precision, overflow=2)
    net, packed_outputs, packed_state, packed_scalars = train(True, precision, overflow=2)
    loose = dict(rtol=1e-5, atol=1e-6) if precision == ms.float32 else dict(rtol=2e-2, atol=2e-4)
    np.testing.assert_allclose(packed_outputs, outputs, **loose)
    assert packed_scalars == scalars
    for found, wanted in zip(packed_state, state, strict=True):
        np.testing.assert_allclose(found, wanted, **loose)
    if precision == ms.float16:
        assert np.isnan(outputs[2, 0]) and scalars[2] == 4 and scalars[3] == 2.0**11  # doubled, halved, doubled
    assert not any("packed" in p.name for p in net.get_parameters())


@pytest.mark.slow
def test_what_is_compiled_later_reads_the_buffer_and_what_was_before_reads_the_parameters():
    net, x, labels = Net(), np.ones((2, 3, 6, 6), np.float32), Tensor([1, 2], ms.int32)
    optimizer = make_optimizer(net, 1e-2, 0, 10)

    def before(x):
        return net(x, labels)

    def later(x):
        return net(x, labels)

    def loss_fn(x):
        return net(x, labels).square().mean()

    old = compiled(before)
    start = old(Tensor(x)).asnumpy()
    pack = Pack(net, optimizer)
    make_train_step(loss_fn, optimizer, pack=pack)(x)
    moved = compiled(later)(Tensor(x)).asnumpy()
    shift = net.shift.asnumpy()  # is not packed
    np.testing.assert_allclose(old(Tensor(x)).asnumpy(), start + shift, atol=1e-6)
    assert np.abs(moved - start - shift).max() > 1e-4
    pack.write_back()
    np.testing.assert_allclose(old(Tensor(x)).asnumpy(), moved, atol=1e-5)


def test_the_cpu_needs_no_buffer():
    net = Net()
    assert make_pack(net, make_optimizer(net, 1e-2, 0, 10)) is None
    assert net.conv.weight_slot is None
