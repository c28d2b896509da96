"""What test_ranks.py lets two ranks do: python ranks_job.py FOLDER BATCH_SIZE KIND..., under msrun or alone."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from ms_diffusion import runtime  # noqa: E402

runtime.set_device("cpu")
RANK, WORLD_SIZE = runtime.initialise_ranks()

import numpy as np  # noqa: E402
from runs import PIXELS, UNET  # noqa: E402

from ms_diffusion.training.config import override  # noqa: E402
from ms_diffusion.training.loop import train_task  # noqa: E402
from ms_diffusion.training.presets import PRESETS  # noqa: E402

SMALL = {"total_steps": 10, "warmup_steps": 0, "log_every": 5, "sample_num": 4}
IMAGES = {**SMALL, "sample_steps": 2}
FIRST = {"model.ch": 8, "model.ch_mult": (1, 2, 2), "model.groups": 4, "disc_start": 2, "disc_channels": 8, "disc_layers": 1}
NET = {"model_channels": 8, "groups": 4, "num_head_channels": 8, "num_res_blocks": 1, "attention_resolutions": (2,)}
AUTOENCODER = override(PRESETS["autoencoder"], **SMALL, **FIRST, **{"data.name": "fashion-mnist-mini"})
LATENT = override(PRESETS["latent"], **IMAGES, **NET, **{"data.name": "fashion-mnist-mini", "context_dim": 8})
CLASSES = replace(PIXELS, model=replace(UNET, num_classes=10, self_condition=True))
KINDS = {
    "pixels": override(PIXELS, **IMAGES, offset_noise=0.1),
    "classes": override(CLASSES, **IMAGES, timestep_sampling="antithetic"),
    "fp16": override(PIXELS, **IMAGES, precision="fp16"),
    "importance": override(PIXELS, **IMAGES, timestep_sampling="importance", num_timesteps=4),
    "points": override(PRESETS["scurve"], **SMALL, steps_per_call=5, sample_steps=2, **{"data.num": 200}),
    "autoencoder": AUTOENCODER,
    "actnorm": override(AUTOENCODER, disc_norm="act"),
    "latents": LATENT,
}


def train(folder: Path, kind: str, batch_size: int, **options: Any) -> None:
    """Train a run in FOLDER/KIND and write the parameters that this rank has at the end to FOLDER/KIND-RANK.npz."""
    config = override(KINDS[kind], batch_size=batch_size, **options)
    if kind == "latents":
        config = replace(config, first_stage=str(folder / "autoencoder"))
    task = config.task()
    train_task(task, folder / kind, "CPU", runtime.STOP)
    parameters = {f"{name}.{p}": value.asnumpy() for name, file in task.checkpoint.files.items() for p, value in file.items()}
    np.savez(folder / f"{kind}-{RANK}.npz", **parameters)
    runtime.barrier()  # what rank 0 has written is there


if __name__ == "__main__":
    for name in sys.argv[3:]:
        train(Path(sys.argv[1]), name, int(sys.argv[2]))
