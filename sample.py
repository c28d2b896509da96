"""Draw samples from a run: python sample.py runs/quick --num 64 --out grid.png --gif denoise.gif."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from ms_diffusion import cli, images, modelarts, runtime
from ms_diffusion.checkpoint import checkpoints, read_state, read_weights
from ms_diffusion.convert import load_into
from ms_diffusion.denoiser import make_denoiser
from ms_diffusion.presets import Config
from ms_diffusion.runtime import DEVICES, UserError
from ms_diffusion.samplers import SAMPLERS, generate, sampling_timesteps

GIF_FRAMES = 40


@dataclass
class Args:
    """Draw samples from a trained run."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder, or one of its checkpoints."""
    num: int = 64
    """How many images."""
    seed: int = 0
    """Image i of a seed is the same whatever the number and the batch size."""
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """ddpm is the ancestral sampler, ddim the deterministic one."""
    steps: int = 50
    """Network calls an image; at most the timesteps of training."""
    out: str | None = None
    """PNG grid; sample.png in the run's folder if not given."""
    gif: str | None = None
    """Animated GIF of the denoising."""
    npz: str | None = None
    """Raw images: array `images`, uint8 (N, H, W, C)."""
    batch_size: int = 64
    """Images at once."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, or the weights as trained."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    data_url: str | None = None
    """ModelArts: the run's folder, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder for the results, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def find_checkpoint(run: Path) -> tuple[Path, Config]:
    """The newest checkpoint of a run's folder, or the one given, and the configuration it was trained with."""
    if run.suffix == ".safetensors":
        run = run.parent
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: give a run's folder, such as runs/quick, or train one with train.py")
    if (run / "state.json").exists():
        return run, Config.from_json(run.parent.parent / "config.json")
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint: train it first, with python train.py --run-dir {run}")
    return found[-1], Config.from_json(run / "config.json")


def main() -> int:
    args = cli.parse(Args)
    if args.num < 1 or args.batch_size < 1 or args.seed < 0:
        raise UserError("--num and --batch-size must be at least 1, --seed at least 0")
    if not (args.run or args.data_url):
        raise UserError("which run? Give its folder: python sample.py runs/quick")
    run = Path(args.run) if args.run else modelarts.fetch(args.data_url)
    folder, config = find_checkpoint(run)
    step = read_state(folder)["step"]
    arrays = read_weights(folder, args.weights)

    device = runtime.set_device(args.device)
    net, diffusion = config.build()
    load_into(net, arrays)
    if not 1 <= args.steps <= diffusion.T:
        raise UserError(f"--steps {args.steps}: choose from 1 to {diffusion.T}, the timesteps this run was trained with")
    timesteps = sampling_timesteps(diffusion.T, args.steps)
    shape = (config.model.channels, config.data.size, config.data.size)

    frames, every = [], max(args.steps // GIF_FRAMES, 1)
    bar = tqdm(total=-(-args.num // args.batch_size) * args.steps, unit="step", desc=f"{args.sampler} on {device}")

    def watch(i, x, x_start):
        bar.update()
        if args.gif and bar.n <= args.steps and (i % every == 0 or i == args.steps - 1):
            frames.append(images.to_uint8(x.asnumpy()))

    clock = time.perf_counter()
    denoise = make_denoiser(diffusion, net)
    x = generate(SAMPLERS[args.sampler], denoise, diffusion, timesteps, shape, args.num, args.seed, args.batch_size, watch)
    bar.close()
    pictures = images.to_uint8(x)

    folder_out = modelarts.output_folder(args.train_url) or (run if run.is_dir() else run.parent)
    out = Path(args.out or folder_out / "sample.png")
    images.save_grid(out, pictures)
    written = [out]
    if args.gif:
        images.save_gif(args.gif, frames)
        written.append(Path(args.gif))
    if args.npz:
        images.write(args.npz, lambda f: np.savez_compressed(f, images=pictures))
        written.append(Path(args.npz))
    print(f"{args.num} images of step {step} in {time.perf_counter() - clock:.1f} s: {', '.join(map(str, written))}")
    for path in written:
        modelarts.publish(path, args.train_url and f"{args.train_url.rstrip('/')}/{path.name}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
