"""Small runs for the tests of the commands, and what they need to look at a run's folder."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from mindspore import Tensor

from ms_diffusion.__main__ import main
from ms_diffusion.commands.parse import parse
from ms_diffusion.commands.sample import Args
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.training.checkpoint import Checkpoint
from ms_diffusion.training.config import DataConfig
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA

# Patches, because attention over 784 positions takes gigabytes
UNET = UnetConfig(dim=8, init_dim=8, dim_mults=(1,), use_convnext=False, resnet_block_groups=4, patch_size=2)
MINI = DataConfig("fashion-mnist-mini")
PIXELS = replace(PRESETS["quick"], data=MINI, model=UNET, train=replace(PRESETS["quick"].train, sample_steps=2))


def untrained(run, config, step=0, noise=0.0, **record):
    """A run's folder with initial weights; the average's get normal noise, since zeros would hide what a network takes."""
    (net, _), rng = config.task().build(), np.random.default_rng(0)
    ema = EMA(net)
    for p in ema.net.get_parameters():
        p.set_data(Tensor(p.asnumpy() + np.float32(noise * rng.standard_normal(p.shape))))
    Checkpoint(run, net, ema=ema).save(step, **record)
    (run / "config.json").write_text(json.dumps(config.to_record()))
    return run


def call(*args):
    """The program in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return code, out.getvalue(), err.getvalue()


def succeed(*args):
    """What the program prints."""
    code, out, err = call(*args)
    assert code == 0, err
    return out


def assert_refused(end, *words):
    """Exit code 2 and one line of error, which names these words."""
    code, out, err = end
    assert code == 2 and not out
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    for word in words:
        assert str(word) in err


def request(*flags):
    """What the sample command makes of its flags."""
    return parse(Args, [str(flag) for flag in flags])


def checkpoint(run, step):
    return Path(run) / "checkpoints" / f"step-{step:07d}"


def weights(run, step, name="model"):
    return safetensors.numpy.load_file(checkpoint(run, step) / f"{name}.safetensors")


def metrics(run):
    """The rows of a run's metrics.jsonl, without the speed."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "img_per_s"} for row in rows]


def assert_same_run(a, b, step):
    """Two runs have the same weights, averages and optimizer, bit for bit, and have logged the same."""
    for name in ("model", "ema", "optimizer"):
        ours, theirs = weights(a, step, name), weights(b, step, name)
        assert ours.keys() == theirs.keys() and ours
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")
    assert metrics(a)[-1] == metrics(b)[-1]


def tree(folder):
    """Every file below a folder, and its content."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def picture(path):
    """(pixels, number of frames)."""
    with Image.open(path) as image:
        image.load()
        return np.asarray(image), getattr(image, "n_frames", 1)


def draw(run, folder, *flags):
    """The images and labels that a loaded run draws: 4 in 3 steps and batches of 4, where the flags say nothing else."""
    out, npz = folder / "out.png", folder / "x.npz"
    args = request("--num", 4, "--batch-size", 4, "--steps", 3, "--out", out, "--npz", npz, *flags)
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        written = run.task.render(run, args, folder)
    assert all(path.exists() for path in written) and written[0] == out
    with np.load(npz) as file:
        return file["images"], file.get("labels")
