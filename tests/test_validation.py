"""The loss of held-out data."""

import math

import numpy as np
import pytest
from helpers import Linear
from runs import metrics

from mindspore import Tensor, ops

from ms_diffusion import runtime
from ms_diffusion.data.batches import load_images
from ms_diffusion.runtime import UserError
from ms_diffusion.training import validation
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train_task
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.validation import Validation, even_timesteps, in_batches_of


def test_even_timesteps():
    for T, n in ((1000, 100), (7, 7), (5, 13), (100, 3)):
        t = even_timesteps(np.random.default_rng(0), T, n)
        assert t.dtype == np.int32 and np.ptp(np.bincount(t * min(n, T) // T, minlength=min(n, T))) <= 1
        np.testing.assert_array_equal(np.sort(t), (np.arange(n) * 2 + 1) * T // (2 * n))


def test_batches():
    fields = {"x": np.arange(13), "y": np.arange(26).reshape(13, 2)}
    for size, count in ((13, 1), (5, 2), (100, 1), (1, 13)):
        batches = in_batches_of(size, fields)
        assert len(batches) == count and all(len(batch["x"]) == min(size, 13) for batch in batches)
        np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in batches]), fields["y"][: count * size])


def test_the_loss_with_any_weights_and_shared_by_ranks(monkeypatch):
    net, rng = Linear(), np.random.default_rng(1)
    x, y = rng.standard_normal((12, 3), np.float32), rng.standard_normal((12, 2), np.float32)

    def make_loss(net):
        def loss_fn(x, weights=None, y=None):
            return ops.square(net(x) - y).mean()

        return loss_fn

    held = Validation(net, make_loss, in_batches_of(4, {"x": x, "y": y}))
    shares = []
    monkeypatch.setattr(validation, "gather", lambda share: shares.append(share) or share[None])
    for _ in range(2):
        weight, bias = rng.standard_normal((3, 2), np.float32), rng.standard_normal(2, np.float32)
        given = [Tensor(weight), Tensor(bias)]
        wanted = np.square(x.astype(np.float64) @ weight + bias - y).mean()
        assert held(given) == pytest.approx(wanted, rel=1e-5)
        shares.clear()
        with monkeypatch.context() as patch:
            for rank in range(2):
                patch.setattr(validation, "ranks", lambda rank=rank: (rank, 2))
                held(given)
        total, count = np.sum(shares, 0)
        assert count == 3 and total / count == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="val_loss is not finite"):
        held([Tensor(weight * np.float32(math.inf)), Tensor(bias)])


def test_a_run_of_points(tmp_path):
    """The loss falls with training; it is that of held-out points with even timesteps, the same at each step."""
    short = {"total_steps": 40, "validate_every": 20, "validate_num": 40, "batch_size": 16, "sample_steps": 2}
    config = override(PRESETS["scurve"], **short, sample_num=4, warmup_steps=0, **{"data.num": 200}, steps_per_call=100)
    task = config.task()
    train_task(task, tmp_path / "run", "CPU", runtime.STOP)
    assert task.steps_per_call == 20
    first, last = (row for row in metrics(tmp_path / "run") if "val_loss" in row)
    assert 0 < last["val_loss"] < first["val_loss"] < 2 and 0 < last["val_loss_ema"] < first["val_loss_ema"]
    again = task.validate(40)
    assert again == {name: last[name] for name in ("val_loss", "val_loss_ema")}
    fields = {name: np.concatenate([b[name] for b in task.validation.batches]) for name in ("x_start", "t")}
    test = task.normalizer.normalize(task.test)
    assert len(fields["t"]) == 32 and all((test == x).all(1).any() for x in fields["x_start"])


def test_images_are_those_of_the_test_split_with_their_labels():
    config = override(PRESETS["quick-class"], validate_every=1, validate_num=50, batch_size=16, label_dropout=0.0)
    task = config.task()
    task.run_dir, task.rank = None, 0
    task.labelling = task.make_labelling(task.load_set("train"))
    held = task.held_out()
    images, labels = load_images("fashion-mnist-mini", None, "test", 28, 1)
    assert len(held.data) == 50
    for x, label in zip(held.data, held.labels, strict=True):
        assert label in labels[(images == x).all((1, 2, 3))]


def test_arrays_have_no_held_out_images():
    config, given = PRESETS["quick"].with_data(np.zeros((64, 28, 28, 1), np.uint8))
    with pytest.raises(UserError, match="--train.validate-every"):
        override(config, validate_every=2).task(given).held_images()
