"""What test_ranks.py lets ranks do: `python ranks_job.py FOLDER JOB...`, under msrun or alone. A job is a function below."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from ms_diffusion import runtime  # noqa: E402

runtime.set_device("cpu")
RANK, WORLD_SIZE = runtime.initialise_ranks()

import numpy as np  # noqa: E402
from runs import PIXELS, UNET  # noqa: E402

from ms_diffusion.__main__ import main  # noqa: E402
from ms_diffusion.training.config import override  # noqa: E402
from ms_diffusion.training.loop import train_task  # noqa: E402
from ms_diffusion.training.presets import PRESETS  # noqa: E402

BATCH = 8  # of all ranks
SMALL = {"total_steps": 10, "warmup_steps": 0, "log_every": 5, "save_every": 5, "sample_num": 4}
IMAGES = {**SMALL, "sample_steps": 2}
FIRST = {"model.ch": 8, "model.ch_mult": (1, 2, 2), "model.groups": 4, "disc_start": 2, "disc_channels": 8, "disc_layers": 1}
NET = {"model_channels": 8, "groups": 4, "num_head_channels": 8, "num_res_blocks": 1, "attention_resolutions": (2,)}
MINI = {"data.name": "fashion-mnist-mini"}
AUTOENCODER = override(PRESETS["autoencoder"], **SMALL, **FIRST, **MINI)
CLASSES = replace(PIXELS, model=replace(UNET, num_classes=10, self_condition=True))
KINDS = {
    "pixels": override(PIXELS, **IMAGES, offset_noise=0.1),
    "classes": override(CLASSES, **IMAGES, timestep_sampling="antithetic"),
    "fp16": override(PIXELS, **IMAGES, precision="fp16"),
    "lora": override(CLASSES, **IMAGES, lora_rank=2),
    "importance": override(PIXELS, **IMAGES, timestep_sampling="importance", num_timesteps=4),
    "points": override(PRESETS["scurve"], **SMALL, steps_per_call=5, sample_steps=2, **{"data.num": 200}),
    "autoencoder": AUTOENCODER,
    "actnorm": override(AUTOENCODER, disc_norm="act"),
    "latents": override(PRESETS["latent"], **IMAGES, **NET, **MINI, **{"context_dim": 8, "model.dropout": 0.2}),
}


def train(folder: Path, kind: str, name: str = "", batch_size: int = BATCH // WORLD_SIZE, **options: Any) -> None:
    """Train a run in FOLDER/NAME, by default its kind, and write the parameters of this rank to FOLDER/NAME-RANK.npz."""
    config = override(KINDS[kind], batch_size=batch_size, **options)
    if kind == "latents":
        config = replace(config, first_stage=str(folder / "autoencoder"))
    if kind == "lora":
        config = replace(config, init_from=str(folder / "classes"))
    task = config.task()
    if name == "spoilt":
        task.draw_batch = partial(spoilt_batch, task.draw_batch, batch_size)
    train_task(task, folder / (name or kind), "CPU", runtime.STOP)
    files = task.checkpoint.files
    arrays = {f"{file}.{key}": p.asnumpy() for file, parameters in files.items() for key, p in parameters.items()}
    np.savez(folder / f"{name or kind}-{RANK}.npz", **arrays)
    runtime.barrier()  # what rank 0 has written is there


def spoilt_batch(draw: Any, batch_size: int, x: Any, labels: Any, step: int) -> Any:
    """What `draw` returns; in step 3, the noise of row 5 of all ranks' batch, which one rank has, is infinite."""
    batch, row = draw(x, labels, step), 5 - RANK * batch_size
    if step == 3 and 0 <= row < batch_size:
        batch["noise"][row] = np.inf
    return batch


def spoilt(folder: Path) -> None:
    train(folder, "pixels", "spoilt")


def all_kinds(folder: Path) -> None:
    for kind in KINDS:
        train(folder, kind)


def resume(folder: Path) -> None:
    """Continue from the checkpoints in FOLDER/of-2 and FOLDER/of-1, which have trained at 4 and 8 images a rank."""
    train(folder, "pixels", "of-2", 4)
    train(folder, "pixels", "of-1", 8)


def own_folders(folder: Path) -> None:
    """Train 5 steps, and 5 more, in a folder for each rank, of which rank 0's alone gets checkpoints."""
    train(folder, "pixels", f"own-{RANK}")


def commands(folder: Path) -> None:
    """Sample from and evaluate FOLDER/classes, and measure the likelihood under FOLDER/pixels, which are there already."""
    run, small = str(folder / "classes"), ["--batch-size", "5", "--steps", "3"]
    assert main(["sample", run, "--num", "20", *small, "--npz", str(folder / "sample.npz")]) == 0
    gif = ["--out", str(folder / "gif.png"), "--gif", str(folder / "x.gif")]
    assert main(["sample", run, "--num", "10", *small, "--npz", str(folder / "gif.npz"), *gif]) == 0
    assert main(["evaluate", run, "--num", "200", *small, "--json", str(folder / "evaluation.json")]) == 0
    likelihood = ["likelihood", str(folder / "pixels"), "--num", "5", "--batch-size", "3"]
    assert main([*likelihood, "--method", "ode", "--steps", "3"]) == 0


if __name__ == "__main__":
    for job in sys.argv[2:]:
        globals()[job](Path(sys.argv[1]))
