"""Adding a data set, a sampler, a preset or a kind of run from outside: each as a user writes it, without another file."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pytest
from PIL import Image
from runs import call, request

from mindspore import nn, ops

import ms_diffusion as md
from ms_diffusion.data.batches import CLASS_NAMES
from ms_diffusion.fields import AT_LEAST_1
from ms_diffusion.images import grid
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.training.config import DiffusionRunConfig, override
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.base import Request
from ms_diffusion.training.tasks.diffusion import DiffusionTask

FEW = {"total_steps": 2, "batch_size": 8, "sample_num": 4, "sample_steps": 2}


@pytest.fixture(autouse=True)
def registries():
    """What a test adds is gone after it."""
    tables = (md.DATASETS, CLASS_NAMES, md.SAMPLERS, md.PRESETS, md.Config.kinds)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.slow
def test_a_data_set_a_preset_and_a_sampler(tmp_path):
    # A data set: a function
    def load_squares(directory, split, size, channels):
        labels = np.arange(40, dtype=np.int32) % 2
        images = np.zeros((40, size, size, channels), np.uint8)
        images[labels == 1, 2:-2, 2:-2] = 255
        return images, labels

    md.DATASETS["squares"] = load_squares
    CLASS_NAMES["squares"] = ("nothing", "square")

    # A preset: a configuration
    md.PRESETS["squares"] = md.PixelConfig(
        data=md.DataConfig("squares", size=8),
        diffusion=md.DiffusionConfig(schedule="cosine", objective="x0", num_timesteps=20),
        model=UnetConfig(dim=8, dim_mults=(1,), use_convnext=False, resnet_block_groups=4, num_classes=2),
        train=md.ImageTrainConfig(**FEW),
    )

    # A sampler: a function; its options are its parameters
    def sample_jump(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, eta=0.0):
        """The first prediction of x_0, to which `eta` is added."""
        x_start = denoise(x, timesteps[0])
        if callback is not None:
            callback(0, x, x_start)
        return x_start + eta

    sample_jump.spacing = "linspace"
    md.SAMPLERS["jump"] = sample_jump

    assert call("train", "--preset", "squares", "--run-dir", tmp_path / "run")[0] == 0
    run, options = md.load(tmp_path / "run"), "--num 4 --batch-size 4 --sampler jump --steps 3 --class square".split()
    run.task.render(run, request(*options, "--npz", tmp_path / "x.npz"), tmp_path)
    file = np.load(tmp_path / "x.npz")
    assert file["images"].shape == (4, 8, 8, 1) and file["labels"].tolist() == [1] * 4
    jump = {"num": 4, "sampler": "jump", "labels": "square", "raw": True, "steps": 3}
    x = run.sample(**jump)
    np.testing.assert_array_equal(md.to_uint8(x), file["images"])
    np.testing.assert_allclose(run.sample(**jump, eta=0.5), x + 0.5, atol=1e-6)
    for args, word in (
        (("train", "--preset", "circles"), "squares"),
        (("sample", tmp_path / "run", "--sampler", "x"), "jump"),
    ):
        assert word in call(*args)[2]  # the names that there are


def add_signals():
    """A kind of run: signals (1, N), such as sounds. It returns the configuration's class; 60 lines."""

    @dataclass(frozen=True)
    class SignalData:
        """Sines of random phase."""

        name: str = "sines"
        """Name of the data set."""
        length: Annotated[int, AT_LEAST_1] = 16
        """Samples in a signal."""
        dir: str | None = None

    @dataclass(frozen=True)
    class SignalNetConfig:
        """Configuration of a SignalNet."""

        width: Annotated[int, AT_LEAST_1] = 8
        """Channels."""
        cond_fields = ()

        def build(self, seed=0):
            return SignalNet(self)

    class SignalNet(nn.Cell):
        """x (B, 1, N), t (B,) -> (B, 1, N)."""

        def __init__(self, config):
            super().__init__()
            self.time = nn.Dense(1, config.width)
            self.first, self.last = nn.Conv1d(1, config.width, 3), nn.Conv1d(config.width, 1, 3)

        def construct(self, x, t):
            emb = self.time(t.reshape(-1, 1).astype(x.dtype) / 1000).expand_dims(-1)
            return self.last(ops.relu(self.first(x) + emb))

    @dataclass(frozen=True)
    class SignalConfig(DiffusionRunConfig):
        """A run of signals."""

        data: SignalData = field(default_factory=SignalData)
        model: SignalNetConfig = field(default_factory=SignalNetConfig)

        kind = "signals"

        def task(self, data: Any = None) -> "SignalTask":
            return SignalTask(self, data)

    class SignalTask(DiffusionTask):
        noun = "signals"

        def __init__(self, config, data=None):
            super().__init__(config, data)
            self.shape = (1, config.data.length)

        def load_data(self):
            phase = np.random.default_rng(self.config.train.seed).uniform(0, 6.28, (100, 1, 1))
            signals = np.sin(phase + np.linspace(0, 6.28, self.config.data.length))
            return signals.astype(np.float32), np.zeros(100, np.int32)

        def show(self, x):
            return Image.fromarray(grid(md.to_uint8(np.repeat(x[:, None], 4, 2)))[..., 0])

        def preview(self, step):
            path = self.run_dir / f"{step}.png"
            self.show(self.draw(self.config.train.sample_num)).save(path)
            return path

        def render(self, run: Run, request: Request, folder):
            path = folder / "sample.png"
            self.show(run.sample(request.num or 64, steps=request.sampling.steps)).save(path)
            return [path]

    return SignalConfig


def test_a_kind_of_run(tmp_path):
    config = add_signals()()
    run = md.train(config, tmp_path / "a", width=4, **FEW)
    x = run.sample(4, steps=2)
    assert x.shape == (4, 1, 16) and x.dtype == np.float32 and isinstance(run.show(x), Image.Image)
    again = md.load(tmp_path / "a")
    assert again.config == override(config, width=4, **FEW) == md.Config.from_json(tmp_path / "a/config.json")
    np.testing.assert_array_equal(again.sample(4, steps=2), x)
    with pytest.raises(md.UserError, match="data"):
        md.train(config, tmp_path / "b", np.zeros((3, 1, 16)))
    with pytest.raises(md.UserError, match="signals"):
        run.evaluate()

    md.PRESETS["sines"] = override(config, **FEW)
    code, out, err = call("train", "--preset", "sines", "--run-dir", tmp_path / "c", "--data.length", 12, "--model.width", 3)
    assert code == 0 and "more signals: " in out, err
    code, out, err = call("sample", tmp_path / "c", "--num", 3, "--steps", 2)
    assert code == 0 and str(tmp_path / "c/sample.png") in out, err
    assert "--model.width" in call("train", "--preset", "sines", "--model.width", 0)[2]
