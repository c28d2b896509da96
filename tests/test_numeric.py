"""A step whose loss, gradients or rate are not finite changes nothing, on every path; and what watches over this."""

import threading

import numpy as np
import pytest
import safetensors.numpy
from helpers import Linear
from runs import PIXELS

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.data.batches import check_values, fingerprint
from ms_diffusion.models.layers import Dropout, Masks
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train_task
from ms_diffusion.training.pack import Pack
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step


def batch(i, kind="good"):
    """x, y, z of step i. The square root of z, which is 1, has no derivative at 0, where the loss is finite."""
    rng = np.random.default_rng(i)
    x, y, z = rng.standard_normal((4, 3), np.float32), rng.standard_normal((4, 2), np.float32), np.ones(4, np.float32)
    x[1, 1] = {"nan": np.nan, "inf": -np.inf, "huge": 1e25}.get(kind, x[1, 1])  # 1e25 squared is beyond float32
    z[2] = 0 if kind == "gradient" else 1
    return x, y, z


BAD = ("nan", "inf", "huge", "gradient")


def trained(kinds, per_call=1, kernel=True, half=False, extra=False, packed=False):
    """Losses, norms and aux of the steps of these kinds, which are numbered without the bad ones, and what they leave."""
    net = Linear()
    emas = EMA(net, 0.5), *([EMA(net, length=0.1)] if extra else [])
    optimizer = make_optimizer(net, 0.1, 2, 100)
    scaler = ms.amp.DynamicLossScaler(2.0**10, 2, 100) if half else None
    has_aux = per_call == 1

    def loss_fn(x, y, z):
        errors = ops.square(net(x) - y).mean(1) + ops.sqrt(z * ops.square(net.bias[0]))
        return (errors.mean(), errors) if has_aux else errors.mean()

    options = {"extra_emas": emas[1:], "loss_scaler": scaler, "steps_per_call": per_call, "has_aux": has_aux}
    pack = Pack(net, optimizer) if packed else None
    step, outputs, good, batches = make_train_step(loss_fn, optimizer, emas[0], pack=pack, **options), [], 0, []
    for kind in kinds:
        batches.append(batch(good, kind))
        good += kind == "good"
    for i in range(0, len(kinds), per_call):
        columns = map(np.stack, zip(*batches[i : i + per_call], strict=True))
        outputs.append([value.asnumpy() for value in step(*(c if per_call > 1 else c[0] for c in columns))])
    if pack:
        pack.write_back()
    state = [*optimizer.get_parameters(), *optimizer.parameters, *(p for ema in emas for p in ema.averages)]
    return outputs, [p.asnumpy().copy() for p in state], scaler


PATHS = {
    "operators": {"kernel": False},
    "several in a call": {"per_call": 3},
    "scaled": {"half": True, "extra": True},
}
SLOW_PATHS = {
    "kernel": {},
    "several in a call, operators": {"per_call": 3, "kernel": False},
    "scaled operators": {"half": True, "extra": True, "kernel": False},
    "buffer": {"packed": True, "extra": True},
}


@pytest.mark.parametrize("path", [*PATHS, *(pytest.param(path, marks=pytest.mark.slow) for path in SLOW_PATHS)])
def test_a_step_that_is_not_finite_changes_nothing(path, monkeypatch):
    options = (PATHS | SLOW_PATHS)[path]
    if not options.get("kernel", True):
        monkeypatch.setattr(kernels, "available", lambda: False)
    kinds = ["good", "nan", "inf", "good", "huge", "gradient", "good", "good", "nan"]
    found, state, scaler = trained(kinds, **options)
    wanted, good_state, _ = trained([kind for kind in kinds if kind == "good"], **options | {"per_call": 1})
    losses = np.concatenate([np.atleast_1d(out[0]) for out in found])
    np.testing.assert_array_equal(np.isnan(losses), [kind != "good" for kind in kinds])
    exact = not scaler  # another scale rounds the gradients alike, unless they are very small
    np.testing.assert_allclose(losses[~np.isnan(losses)], [out[0] for out in wanted], rtol=0 if exact else 1e-6)
    for ours, theirs in zip(state, good_state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0 if exact else 1e-6)
    if options.get("per_call", 1) == 1:
        for out, kind in zip(found, kinds, strict=True):
            assert np.isnan(out[2]).all() if kind != "good" else np.isfinite(out[2]).all()
    if scaler:
        assert scaler.scale_value.asnumpy() == 2.0 ** (10 - sum(kind != "good" for kind in kinds))


@pytest.mark.parametrize("kernel", [True, False])
def test_a_rate_that_is_not_finite_changes_nothing(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(kernels, "available", lambda: False)
    net = Linear()
    before = [p.asnumpy().copy() for p in net.get_parameters()]

    def loss_fn(x):
        return ops.square(net(x)).mean()

    step = make_train_step(loss_fn, make_optimizer(net, 1e39, 0, 10), EMA(net))
    loss, _ = step(batch(0)[0])
    assert np.isnan(loss.asnumpy())
    for p, value in zip(net.get_parameters(), before, strict=True):
        np.testing.assert_array_equal(p.asnumpy(), value)


# The autoencoder: its discriminator has statistics that the forward pass changes

SMALL = {"model.ch": 8, "model.ch_mult": (1, 2), "model.groups": 4, "disc_channels": 8, "disc_layers": 1}
TINY = override(PRESETS["autoencoder"], **SMALL, total_steps=6, batch_size=2, disc_start=1, **{"data.size": 28})


def all_parameters(task):
    return {f"{file} {name}": p.asnumpy().copy() for file, ps in task.checkpoint.files.items() for name, p in ps.items()}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "act"])
def test_the_autoencoder_and_its_discriminator_take_nothing_from_a_bad_batch(norm, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), np.uint8)
    task = override(TINY, disc_norm=norm).task((pictures, np.zeros(8, np.int32)))
    task.start(tmp_path)
    batches = iter(task.batches())
    first, good = next(batches), next(batches)
    task.advance(first, 0)  # without the discriminator
    for fields in (["x"], list(good)):  # first while ActNorms have no scale yet, which they take from x
        before = all_parameters(task)
        for name in fields:
            bad = dict(good, **{name: good[name].copy()})
            bad[name][0, 0, 0, 0] = np.nan
            loss, _, extras = task.advance(bad, 1)
            assert np.isnan(float(loss)) and np.isnan(by_name(extras)["disc_loss"])
        for key, value in all_parameters(task).items():
            np.testing.assert_array_equal(value, before[key], err_msg=key)
        loss, _, extras = task.advance(good, 1)
        assert np.isfinite([float(loss), *by_name(extras).values()]).all()
        changed = {key for key, value in all_parameters(task).items() if (value != before[key]).any()}
        assert any("running_mean" in key for key in changed) == (norm == "batch")
        assert any("discriminator" in key and key.endswith("main.0.weight") for key in changed)


def by_name(extras):
    """What a step logs beside its loss."""
    return {name: x for names, numbers in extras.items() for name, x in zip(names, numbers.asnumpy().ravel(), strict=True)}


# Dropout's masks, which the host draws


class Dropped(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first, self.second = Dropout(0.25, 3, 0), Dropout(0.5, 2, 1)


def masks_of(batch_size, step, rank=0, seed=0):
    net = Dropped()
    masks = Masks(net, batch_size, (8, 6))
    masks.draw(seed, step, rank)
    return [masks(cell.index).asnumpy() for cell in (net.first, net.second)]


def test_masks_depend_on_seed_row_and_step_alone():
    first, second = masks_of(40, 3)
    assert first.shape == (40, 3, 8, 6) and second.shape == (40, 2, 4, 3)
    for mask, p in ((first, 0.25), (second, 0.5)):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1) / np.float32(1 - p)}
        assert abs(mask.mean() - 1) < 5 * np.sqrt(p / (1 - p) / mask.size)
        rows = mask.reshape(len(mask), -1)
        assert abs(np.mean((rows[1:] - 1) * (rows[:-1] - 1))) < 5 * p / (1 - p) / np.sqrt(rows.size)
    for rank in range(4):
        for mine, whole in zip(masks_of(10, 3, rank), (first, second), strict=True):
            np.testing.assert_array_equal(mine, whole[10 * rank : 10 * rank + 10])
    assert (masks_of(40, 4)[0] != first).any() and (masks_of(40, 3, seed=1)[0] != first).any()


def test_without_dropout_nothing_is_drawn_or_multiplied():
    net = Dropout(0.0, 3, 0).set_train()
    masks = Masks(net, 2, (8, 6))
    masks.draw(0, 0)
    x = Tensor(np.ones((2, 3, 8, 6), np.float32))
    assert masks.layers == () and net(x) is x


# Data are looked at once


def test_data_that_are_not_finite_are_refused():
    with pytest.raises(UserError) as error:
        check_values(np.float32([[1, 2], [3, np.nan], [np.inf, 2]]), "points")
    assert all(word in str(error.value) for word in ("2 of 3 points", "number 1")) and "\n" not in str(error.value)


def test_data_that_look_wrong_are_noted(capsys):
    pictures = np.zeros((2, 8, 8, 1), np.uint8)
    pictures[0, 0] = 1
    for wrong in (pictures, pictures[1:], np.full((4, 2), 3, np.float32)):
        check_values(wrong, "images")
        assert len(capsys.readouterr().err.splitlines()) == 1
    check_values(pictures * 255, "images")
    check_values(np.float32([[0, 1]]), "points")
    assert not capsys.readouterr().err


def test_a_fingerprint_is_of_values_types_shapes_and_labels():
    data, labels = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6, dtype=np.int32)
    known = fingerprint(data, labels)
    assert known == fingerprint(np.asfortranarray(data), labels.copy())
    for other in ((data + 1, labels), (data.reshape(3, 4), labels), (data[:5], labels[:5]), (data, labels[::-1])):
        assert fingerprint(*other) != known


def test_other_data_than_before_are_noted_at_a_resume(tmp_path, capsys):
    def start(num):
        pictures = np.random.default_rng(0).integers(0, 256, (num, 28, 28, 1), np.uint8)
        task = override(PIXELS, batch_size=2).task((pictures, np.zeros(num, np.int32)))
        task.start(tmp_path)
        return task

    task = start(9)
    assert not capsys.readouterr().err
    task.checkpoint.save(3, **task.checkpoint_record())
    start(9)
    assert not capsys.readouterr().err
    start(8)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("step 3", "9 images", "8 now"))


# Training with a rate that is far too high

HIGH = {"lr": 1e30, "warmup_steps": 0, "save_every": 10, "log_every": 100, "total_steps": 60, "batch_size": 4}
KINDS = {
    "pixels": override(PIXELS, **HIGH),
    "fp16": override(PIXELS, **HIGH | {"total_steps": 80}, precision="fp16"),
    "points": override(PRESETS["scurve"], **HIGH, sample_num=4, sample_steps=2, **{"data.num": 200}),
    "autoencoder": override(PRESETS["autoencoder"], **SMALL, **HIGH, sample_num=4, **{"data.name": "fashion-mnist-mini"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_that_is_far_too_high_ends_in_one_line_and_a_lower_one_goes_on(kind, tmp_path):
    """In the same folder. The autoencoder's discriminator comes later than these steps."""

    def train(config):
        return train_task(config.task(), tmp_path, "CPU", threading.Event())[0]

    with pytest.raises(UserError, match="--train.lr") as error:
        train(KINDS[kind])
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.safetensors"))
    assert train(override(KINDS[kind], lr=1e-3, total_steps=10)) == 10
    for path in tmp_path.rglob("*.safetensors"):
        for name, value in safetensors.numpy.load_file(path).items():
            assert np.isfinite(value).all() and abs(value.astype(np.float64)).max() < 1e6, name
