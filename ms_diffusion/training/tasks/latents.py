"""Latent diffusion (Rombach et al. 2022): a denoiser on the latents of a trained autoencoder, its first stage."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from mindspore import Tensor

from ...data.batches import check_values
from ...fields import AT_LEAST_1, POSITIVE
from ...files import read_bytes, share_files, sweep, write, write_json
from ...latent import FirstStage
from ...models.autoencoder import gaussian_sample
from ...models.context import LatentUnetConfig
from ...randomness import Random, Stream
from ...runtime import UserError, broadcast, command
from ..checkpoint import read_config, read_state, readable
from ..config import DataConfig, DiffusionRunConfig, ImageTrainConfig
from ..runs import is_run, open_run
from .autoencoder import load_first_stage, save_reconstructions
from .base import Arrays
from .images import ImageData, ImageTask, check_image_size, check_scored


@dataclass(frozen=True)
class LatentConfig(ImageData, DiffusionRunConfig):
    """A run of latents."""

    data: DataConfig = field(default_factory=lambda: DataConfig(size=32, flip=False))
    model: LatentUnetConfig = field(default_factory=LatentUnetConfig)
    train: ImageTrainConfig = field(default_factory=ImageTrainConfig)
    first_stage: str | None = None
    """Run of the autoencoder whose latents are learned; the new run keeps a copy of it."""
    latent_scale: Annotated[float, POSITIVE] | None = None
    """Factor of the latents; by default 1 / the standard deviation of the latents of a first batch."""
    first_stage_patch: Annotated[int, AT_LEAST_1] | None = None
    """Side in pixels of the overlapping patches that the first stage works on one by one; by default whole images."""

    kind = "latents"

    def task(self, data: Any = None) -> "LatentTask":
        return LatentTask(self, data)

    def check(self) -> None:
        super().check()
        data, model, patch = self.data, self.model, self.first_stage_patch
        check_image_size(model.latent_size, model.size_multiple, "model.latent-size")
        check_scored(self)
        if model.out_channels != model.in_channels or model.n_embed:
            both = "set --model.out-channels to --model.in-channels, and leave out n-embed"
            raise UserError(f"the network predicts latents: {both}")
        if patch is not None and patch > data.size:
            raise UserError(f"--first-stage-patch is {patch}: choose at most the size of the images, {data.size}")
        if data.condition != "none":
            raise UserError(f"--data.condition {data.condition} is for networks in pixel space: leave it out")
        if model.cond_channels:
            raise UserError(f"--model.cond-channels is {model.cond_channels}: it must be 0, there is no image condition")
        if data.flip:
            raise UserError("latents are computed once, of images that are not flipped: add --data.no-flip")


class LatentTask(ImageTask):
    """A UNetModel on latents, conditioned on the class, a caption or nothing."""

    config: LatentConfig
    clip_denoised = False
    first_stage: FirstStage

    def __init__(self, config: LatentConfig, data: Any = None):
        super().__init__(config, data)
        model = config.model
        self.shape = (model.in_channels, model.latent_size, model.latent_size)
        self.null_label, self.cond_fields = model.null_label, model.cond_fields

    def prepare_data(self) -> None:
        """Encode the images, and find the scale of the latents."""
        config, state = self.config, self.state
        if self.rank == 0:
            self.first_stage = resolve_first_stage(config, self.run_dir, (state or {}).get("first_stage"))
        saved = self.run_dir / "first_stage"
        share_files([saved / name for name in ("config.json", "ema.safetensors", "state.json")])
        self.weights_hash = hash_of(read_state(saved))
        if self.rank:
            self.first_stage = load_first_stage(saved, config.first_stage_patch)
        self.data = self.first_stage.cached_moments(self.originals, config.data.dir)
        check_values(self.data, f"latents of the first stage {config.first_stage or saved}")
        if state and "latent_scale" not in state:
            which = f"the checkpoint of step {self.start_step} in {self.run_dir}"
            raise UserError(f"{which} has no latent_scale: remove it, or use another --run-dir")
        known = state["latent_scale"] if state else config.latent_scale or (self.loaded and self.loaded.scale_factor)
        scale = known or scale_of(self.data, config.train, self.world_size)
        self.first_stage.scale = json.loads(broadcast(json.dumps(scale).encode()))  # rank 0's, should they differ by a bit
        if not state:
            path = self.run_dir / "samples" / "first-stage.png"
            save_reconstructions(path, self.first_stage, self.originals[: config.train.sample_num])

    def keep_data(self) -> None:
        super().keep_data()
        resolve_first_stage(self.config, self.run_dir, self.weights_hash)

    def checkpoint_record(self) -> dict[str, Any]:
        own = {"latent_scale": self.first_stage.scale, "first_stage": self.weights_hash}
        return own | super().checkpoint_record()

    def make_x_start(self) -> Any:
        scale = self.first_stage.scale
        return lambda moments, noise: scale * gaussian_sample(moments, noise)

    def draw_conditions(self, rng: Random, batch: Arrays, labels: np.ndarray) -> Arrays:
        drawn = {"latent_noise": rng.standard_normal(batch["noise"].shape, np.float32)}
        return drawn | self.draw_labels(rng, labels)

    def open(self, home: Path, state: dict[str, Any]) -> None:
        super().open(home, state)
        scale = state.get("latent_scale")
        if scale is None or not (home / "first_stage").exists():
            missing = "latent_scale in its state.json" if scale is None else "first_stage beside its config.json"
            raise UserError(f"the run in {home} has no {missing}: copy the whole run")
        self.first_stage = load_first_stage(home / "first_stage", self.config.first_stage_patch)
        self.first_stage.scale = scale

    def decode(self, x: np.ndarray) -> np.ndarray:
        return self.first_stage.decode(x)


def resolve_first_stage(config: LatentConfig, run: Path, kept: str | None = None) -> FirstStage:
    """The first stage that a run of latents has saved, or the one of --first-stage, of which it keeps a copy; a damaged copy
    is made again. `kept` is the SHA-256 of its weights, where a checkpoint knows it. Raises UserError if there is none, or
    another one, or one whose latents the network does not take."""
    saved, requested = run / "first_stage", config.first_stage
    sweep(saved)
    with contextlib.suppress(UserError):
        kept = kept or hash_of(read_state(saved))
    is_saved = is_copy(saved, kept)
    if is_saved and requested and not Path(requested).exists():
        requested = None  # it was needed only for the copy
    if config.init_from and not (is_saved or requested) and is_run(config.init_from):
        requested = str(open_run(config.init_from, [])[0] / "first_stage")
    if not requested and not is_saved:
        trained = f"the run of {command('train')} --preset autoencoder"
        missing = f"{saved} is missing or damaged" if kept else "no autoencoder is given"
        raise UserError(f"{missing}: add --first-stage runs/autoencoder, {trained}")
    name, source = requested or saved, saved
    if requested:
        home, found = open_run(requested, [] if is_saved else ["ema"])
        if not is_saved:  # where the autoencoder has been trained on, the copy is of an earlier checkpoint
            source = next((each for each, state in readable(home).items() if kept == hash_of(state)), found.folder)
        if kept and kept != hash_of(found.state if is_saved else read_state(source)):
            raise UserError(f"--first-stage {requested} is not the first stage that the run in {run} has kept: leave it out")
    try:
        first_stage, content = load_first_stage(source, config.first_stage_patch), read_bytes(source / "ema.safetensors")
        autoencoder: Any = read_config(open_run(source, [])[0])
    except (UserError, OSError):
        if source.exists():
            raise
        return resolve_first_stage(config, run, kept)  # the autoencoder's training has deleted this checkpoint meanwhile
    model, size, side, f = config.model, config.data.size, config.model.latent_size, autoencoder.model.size_multiple
    if size % f:
        sizes = f"sizes divisible by {f}, such as {side * f}"
        raise UserError(f"--data.size is {size}: the first stage {name} takes {sizes}")
    made, taken = (autoencoder.model.embed_dim, size // f, size // f), (model.in_channels, side, side)
    if made != taken or autoencoder.model.channels != model.channels:
        raise UserError(
            f"the first stage {name} makes latents {made} of images with {autoencoder.model.channels} channels, the network "
            f"takes {taken} and {model.channels}: set --model.in-channels, --model.out-channels, --model.latent-size, "
            "--model.channels and --data.size to fit"
        )
    if not is_saved:
        record = json.dumps(autoencoder.to_record(), indent=1).encode()
        files = {"config.json": record, "ema.safetensors": content}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            write(saved / name, lambda file, data=data: file.write(data))
        write_json(saved / "state.json", {"step": read_state(source)["step"], "sha256": hashes})  # last: now it is complete
    return first_stage


def hash_of(state: dict[str, Any]) -> str | None:
    """The SHA-256 of the averaged weights of a checkpoint with this state.json."""
    return state["sha256"].get("ema.safetensors")


def is_copy(folder: Path, weights: str | None) -> bool:
    """Whether a folder is a whole copy of the first stage whose weights have this SHA-256."""
    try:
        hashes = read_state(folder)["sha256"]
        files = {name: hashlib.sha256(read_bytes(folder / name)).hexdigest() for name in hashes}
    except (UserError, OSError):
        return False
    return files == hashes and hashes.get("ema.safetensors") == weights


def scale_of(moments: np.ndarray, train: ImageTrainConfig, world_size: int = 1) -> float:
    """1 / the standard deviation of the latents of a first batch of all ranks (Rombach et al. 2022, appendix G)."""
    rng = np.random.default_rng((train.seed, Stream.NOISE))
    batch = moments[rng.permutation(len(moments))[: train.batch_size * world_size]]
    noise = rng.standard_normal((len(batch), batch.shape[1] // 2, *batch.shape[2:]), np.float32)
    return float(1 / gaussian_sample(Tensor(batch), Tensor(noise)).asnumpy().std())
