"""What test_resume.py lets processes do: `python tests/resume_job.py FOLDER KIND...`, for kinds of `KINDS`, in this order.

Each kind is trained in FOLDER/killed/KIND by a process that is killed on the way, continued there by a second one, and
trained without a break in FOLDER/straight/KIND."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from ms_diffusion import runtime  # noqa: E402

LAST = 10  # before what follows, which imports MindSpore

from runs import PIXELS, UNET  # noqa: E402

from ms_diffusion.training.checkpoint import Checkpoint  # noqa: E402
from ms_diffusion.training.config import override  # noqa: E402
from ms_diffusion.training.loop import train_task  # noqa: E402
from ms_diffusion.training.presets import PRESETS  # noqa: E402

SMALL = {"total_steps": LAST, "batch_size": 4, "warmup_steps": 2, "log_every": 3, "save_every": 4, "sample_every": 4}
SMALL |= {"sample_num": 4, "keep_checkpoints": 2}
IMAGES = {**SMALL, "sample_steps": 2}
HELD = {"validate_every": 4, "validate_num": 8, "weight_decay": 0.1}
FIRST = {"model.ch": 8, "model.ch_mult": (1, 2, 2), "model.groups": 4, "disc_start": 2, "disc_channels": 8, "disc_layers": 1}
NET = {"model_channels": 8, "groups": 4, "num_head_channels": 8, "attention_resolutions": (2,), "context_dim": 8}
MINI = {"data.name": "fashion-mnist-mini"}
FLIPPED = replace(PIXELS, data=replace(PIXELS.data, flip=True))
CLASSES = replace(PIXELS, model=replace(UNET, num_classes=10, self_condition=True))
AUTOENCODER = override(PRESETS["autoencoder"], **SMALL, **FIRST, **MINI)
KINDS = {
    "pixels": override(FLIPPED, **IMAGES, offset_noise=0.1, ema_lengths=(0.05, 0.1), learn_logvar=True),
    "scored": override(PIXELS, **IMAGES | {"keep_checkpoints": 1}, score_every=4, score_num=200),
    "classes": override(CLASSES, **IMAGES, **HELD, timestep_sampling="antithetic"),
    "lora": override(  # of the run of classes; other embeddings of classes are trained whole
        CLASSES,
        **IMAGES,
        lora_rank=2,
        lora_targets="all",
        precision="fp16",
        ema_lengths=(0.1,),
        init_partial=True,
        **{"model.num_classes": 12},
    ),
    "importance": override(PIXELS, **IMAGES, timestep_sampling="importance", num_timesteps=4, precision="fp16"),
    "points": override(
        PRESETS["scurve"], **SMALL, **HELD, optimizer="muon", steps_per_call=2, sample_steps=2, **{"data.num": 200}
    ),
    "autoencoder": AUTOENCODER,
    "actnorm": override(AUTOENCODER, **HELD, disc_norm="act", accumulate=2, **{"model.dropout": 0.2}),
    "text": override(PRESETS["latent-text"], **IMAGES, **HELD, **NET, **MINI, **{"model.dropout": 0.2}),
}
# The others are killed in step 7. `update` comes after the score is logged, and before the checkpoint says so
KILLED_IN = {"scored": ("update", 8), "classes": ("preview", 8), "importance": ("save", 8), "autoencoder": ("preview", 4)}


def killing(method: Callable, at: int) -> Callable:
    """The method, which kills the process where its last positional argument is the step `at` or a later one."""

    def call(*args: Any, **options: Any) -> Any:
        if args[-1] >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **options)

    return call


def train(folder: Path, kind: str, parent: str, killed: bool = False) -> None:
    config: Any = KINDS[kind]
    if config.kind == "latents":
        config = replace(config, first_stage=str(folder / "straight" / "autoencoder"))
    if kind == "lora":
        config = replace(config, init_from=str(folder / "straight" / "classes"))
    task = config.task()
    if killed:
        name, at = KILLED_IN.get(kind, ("advance", 7))
        owner = Checkpoint if hasattr(Checkpoint, name) else task
        setattr(owner, name, killing(getattr(owner, name), at))
    train_task(task, folder / parent / kind, "CPU", runtime.STOP)


def in_child(*works: Callable[[], None]) -> int:
    """The exit code of a process that does this, or minus the signal that has killed it."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        runtime.set_device("cpu")
        for work in works:
            work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def main(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        code = in_child(lambda kind=kind: train(folder, kind, "killed", killed=True))
        assert code == -signal.SIGKILL, f"{kind} was not killed, its exit code is {code}"
        code = in_child(lambda kind=kind: train(folder, kind, "killed"), lambda kind=kind: train(folder, kind, "straight"))
        assert code == 0, f"{kind}: exit code {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
