"""Steps that sum the gradients of parts of a batch: against the same steps on whole batches."""

import numpy as np
import pytest
from resume_job import AUTOENCODER, CLASSES, FIRST, IMAGES, MINI, NET, SMALL
from runs import PIXELS, assert_refused, call, metrics, weights

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import kernels, runtime
from ms_diffusion.models import layers
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train_task
from ms_diffusion.training.pack import Pack
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

EXACT = {"rtol": 1e-5, "atol": 1e-6}


def trained(how, accumulate, rows=12, steps=5, overflow=2):
    """What steps return, and what they leave; the batch of step `overflow` is not finite in its last row."""
    net, rng = nn.SequentialCell(layers.Linear(3, 5), layers.Linear(5, 2, "silu")), np.random.default_rng(0)
    layers.name_and_initialise(net, seed=0)
    scaler = ms.amp.DynamicLossScaler(2.0**10, 2, 2) if how == "scaled" else None

    def loss_fn(x, y, weight=1.0):
        losses = ops.square(net(x) - y).mean(1)
        return weight * losses.mean(), (losses, losses.mean())

    optimizer, averages = make_optimizer(net, 0.05, 2, 6), [EMA(net, 0.9), EMA(net, length=0.1)]
    pack = Pack(net, optimizer) if how == "packed" else None
    options = {"extra_emas": averages[1:], "loss_scaler": scaler, "clip_norm": 0.5, "pack": pack, "weight_decay": 0.1}
    step = make_train_step(loss_fn, optimizer, averages[0], has_aux=True, accumulate=accumulate, **options)
    outputs = []
    for i in range(steps):
        x, y = (rng.standard_normal((rows, n), np.float32) for n in (3, 2))
        x[-1] *= np.inf if i == overflow else 1
        loss, norm, (losses, mean) = step(x, weight=Tensor(np.float32(2)), y=y)
        assert losses.size == rows and losses.shape[:-1] == mean.shape == ((accumulate,) if accumulate > 1 else ())
        outputs.append(np.hstack([float(loss), float(norm), losses.asnumpy().ravel(), mean.asnumpy().mean()]))
    if pack:
        pack.write_back()
    state = [*optimizer.get_parameters(), *averages[0].averages, *averages[1].averages]
    state += [scaler.scale_value, scaler.counter] if scaler else []
    return np.array(outputs), [p.asnumpy().copy() for p in state]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "parts"), [("kernels", 2), *(pytest.param(how, 3, marks=SLOW) for how in ("operators", "packed", "scaled"))]
)
def test_parts_make_the_step_of_the_whole_batch(how, parts, monkeypatch):
    """Losses, what is logged, weights, moments, averages and loss scale; a row that is not finite skips the whole step."""
    if how == "operators":
        monkeypatch.setattr(kernels, "available", lambda: False)
    outputs, state = trained(how, 1)
    assert np.isnan(outputs[2, 0]) and np.isfinite(np.delete(outputs, 2, 0)).all()
    found, found_state = trained(how, parts)
    np.testing.assert_allclose(found, outputs, **EXACT)
    for a, b in zip(found_state, state, strict=True):
        np.testing.assert_allclose(a, b, **EXACT)


def test_masks_of_parts_are_those_of_the_whole_batch():
    net = nn.SequentialCell(layers.Dropout(0.4, 3, 0), layers.Dropout(0.7, 2, 1))
    whole = layers.Masks(net, 6, (4, 4))
    whole.draw(3, 5, rank=1)
    wanted = [whole(i).asnumpy() for i in range(2)]
    masks = layers.Masks(net, 2, (4, 4), 3)
    masks.draw(3, 5, rank=1)
    for part in range(3):
        masks.use(part)
        for i in range(2):
            np.testing.assert_array_equal(masks(i).asnumpy(), wanted[i][2 * part : 2 * part + 2])


STEPS = {"total_steps": 3, "log_every": 1, "save_every": 3, "sample_every": 3, "warmup_steps": 0}
KINDS = {
    "classes": override(CLASSES, **IMAGES | STEPS, offset_noise=0.1, ema_lengths=(0.1,)),
    "lora": override(CLASSES, **IMAGES | STEPS, lora_rank=2),
    "importance": override(PIXELS, **IMAGES | STEPS, timestep_sampling="importance", num_timesteps=2),
    "points": override(PRESETS["scurve"], **SMALL | STEPS, steps_per_call=2, sample_steps=2, **{"data.num": 200}),
    "actnorm": override(AUTOENCODER, disc_norm="act", **FIRST | STEPS | {"disc_start": 1, "model.dropout": 0.2}),
    "latents": override(PRESETS["latent"], **IMAGES | STEPS, **NET, **MINI, **{"model.dropout": 0.2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accumulate")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_each_kind(kind, folder):
    """The same log and the same weights as with batches of twice the size; and a run may change from one to the other."""
    extra = {"init_from": str(folder / "classes-1")} if kind == "lora" else {}
    extra |= {"first_stage": str(folder / "actnorm-1")} if kind == "latents" else {}
    for parts in (1, 2):
        config = override(KINDS[kind], batch_size=8 // parts, accumulate=parts, **extra)
        train_task(config.task(), folder / f"{kind}-{parts}", "CPU", runtime.STOP)
    rows = [metrics(folder / f"{kind}-{parts}") for parts in (1, 2)]
    for whole, parts in zip(*rows, strict=True):
        assert parts == pytest.approx(whole, rel=2e-3, abs=1e-5)
    for name in ("model", "ema"):
        whole, parts = (weights(folder / f"{kind}-{n}", 3, name) for n in (1, 2))
        for key in whole:
            if not key.endswith(".k.bias"):  # softmax does not depend on it: its gradient is what rounding leaves
                np.testing.assert_allclose(parts[key], whole[key], rtol=2e-3, atol=5e-4, err_msg=key)


def test_batch_norms_of_parts_are_refused(tmp_path):
    end = call("train", "--preset", "autoencoder", "--train.accumulate", 2, "--run-dir", tmp_path / "run")
    assert_refused(end, "--train.accumulate is 2", "--train.disc-norm act")
