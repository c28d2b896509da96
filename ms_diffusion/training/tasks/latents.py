"""Latent diffusion (Rombach et al. 2022): a denoiser on the latents of a trained autoencoder, its first stage."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
import tyro

from mindspore import Tensor

from ... import images
from ...convert import load_pretrained
from ...data.batches import ImageSet, check_values
from ...data.conditions import condition_channels, latent_condition
from ...data.tokenizers import Tokenizer, WordPieces
from ...fields import AT_LEAST_1, POSITIVE
from ...files import read_bytes, share_files, sweep, write, write_json
from ...images import to_float
from ...latent import FirstStage
from ...models.autoencoder import AutoencoderConfig, VQConfig, gaussian_sample
from ...models.context import LatentUnetConfig
from ...randomness import Random, Stream
from ...runtime import UserError, alone, broadcast, command, given_up
from ..checkpoint import read_config, read_state, readable
from ..config import DataConfig, DiffusionRunConfig, ImageTrainConfig
from ..runs import is_run, open_run
from ..text_encoder import FOLDER, Contexts, keep_text_encoder, load_text_encoder
from .autoencoder import AutoencoderRunConfig, load_first_stage, save_reconstructions
from .base import Arrays
from .images import ROW_STEPS, DenoiseRow, ImageData, ImageTask, check_image_size, check_scored, save_rows
from .labels import Nothing, caption_names, caption_table, read_kept

ROWS = 4  # images in a training run's rows of noising and denoising


@dataclass(frozen=True)
class LatentConfig(ImageData, DiffusionRunConfig):
    """A run of latents."""

    data: DataConfig = field(default_factory=lambda: DataConfig(size=32, flip=False))
    model: LatentUnetConfig = field(default_factory=LatentUnetConfig)
    train: ImageTrainConfig = field(default_factory=ImageTrainConfig)
    first_stage: str | None = None
    """Run of the autoencoder whose latents are learned; the new run keeps a copy of it. With --config also a file of its
    weights; by default these are in the file of --init-from."""
    first_stage_model: Annotated[AutoencoderConfig | VQConfig | None, tyro.conf.Suppress] = None
    """The autoencoder of which such a file has the weights."""
    vocab: str | None = None
    """BERT's vocab.txt, for the conditions text and bert; the new run keeps its words. By default a tokenizer is trained."""
    text_encoder: str | None = None
    """Folder of Stable Diffusion, or another with text_encoder and tokenizer in it, whose frozen CLIP encodes the captions,
    for the condition context; the new run keeps a copy of the encoder."""
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
        if model.num_classes is not None and model.null_label is None and self.train.label_dropout:
            raise UserError("without --model.null-class there is no row for no class: set --train.label-dropout to 0")
        needed = condition_channels(data.condition, model.channels, model.in_channels)
        if model.cond_channels != needed:
            raise UserError(f"--data.condition {data.condition} has {needed} channels: set --model.cond-channels {needed}")
        if data.condition == "lowres" and model.latent_size % data.lowres_size:
            most = f"it must divide the side of the latents, {model.latent_size}"
            raise UserError(f"--data.lowres-size is {data.lowres_size}: {most}")
        if data.flip:
            raise UserError("latents are computed once, of images that are not flipped: add --data.no-flip")


class LatentTask(ImageTask):
    """A UNetModel on latents, conditioned on the class, a caption or nothing, and perhaps on an image."""

    config: LatentConfig
    clip_denoised = False
    first_stage: FirstStage

    def __init__(self, config: LatentConfig, data: Any = None):
        super().__init__(config, data)
        model = config.model
        self.shape = (model.in_channels, model.latent_size, model.latent_size)
        self.null_label: Any = model.null_label
        self.cond_fields = model.cond_fields

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of the run, or of the one that it starts from, or of --vocab."""
        config = self.config
        return super().tokenizer or (WordPieces.read(config.vocab, config.model.max_length) if config.vocab else None)

    def make_networks(self, device: str) -> None:
        if "context" in self.cond_fields:
            self.null_label = self.contexts.null
        if "tokens" in self.cond_fields and self.null_label is None:
            if not self.tokenizer:
                raise UserError("the text encoder needs its vocabulary: give BERT's vocab.txt by --vocab")
            self.null_label = self.tokenizer.encode([""])[0]
        super().make_networks(device)

    @cached_property
    def contexts(self) -> Contexts:
        """The frozen text encoder of the run, of the run that it starts from, or of --text-encoder."""
        given, initial, width = self.config.text_encoder, self.config.init_from, self.config.model.context_dim or 0
        if self.run_dir and (self.run_dir / FOLDER / "config.json").exists():
            return load_text_encoder(self.run_dir, width)
        if initial and not given and is_run(initial):
            home, _ = open_run(initial, [])
            if (home / FOLDER / "config.json").exists():
                return load_text_encoder(home, width)
        if not given:
            raise UserError("--model.condition context needs a frozen CLIP: give its folder by --text-encoder")
        return load_text_encoder(Path(given), width)

    def keep_text_encoder(self) -> None:
        """Write a copy of the text encoder to the run's folder. Raises UserError if --text-encoder is another one."""
        given, contexts = self.config.text_encoder, self.contexts
        known = self.state.get("text_encoder", contexts.sha256) if self.state else contexts.sha256
        other = contexts
        if given and Path(given).is_dir() and (self.run_dir / FOLDER).exists():
            other = load_text_encoder(Path(given), self.config.model.context_dim or 0)
        if known != contexts.sha256 or other.sha256 != contexts.sha256:
            raise UserError(f"the text encoder of the run in {self.run_dir} is another one: leave out --text-encoder")
        if self.rank == 0:
            keep_text_encoder(self.run_dir, contexts)

    def make_labelling(self, image_set: ImageSet | None = None) -> Nothing:
        if "context" not in self.cond_fields:
            return super().make_labelling(image_set)
        kept = read_kept(self.run_dir) if self.run_dir else {}
        table = caption_table(image_set, kept)
        return self.contexts.describe(table, caption_names(table, image_set, kept))

    def load_set(self, split: str) -> ImageSet:
        if self.has_pictures:
            return super().load_set(split)
        size, channels = self.image_format()
        ramp = np.linspace(0, 255, size).astype(np.uint8)[:, None]
        none = np.zeros(1, np.int32)
        return ImageSet(np.tile(ramp, (1, size, 1, channels)), none, captions=(("",),), caption_ids=none)

    @property
    def has_pictures(self) -> bool:
        """False for a run that is not trained and has no images; a gray ramp stands for them."""
        config = self.config
        named = config.data.name != "image-folder" or config.data.dir is not None
        return bool(config.train.total_steps) or named or self.given_data is not None

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
        if not known and not self.has_pictures:
            raise UserError("there are no images to compute the latents' scale of: give --latent-scale or --data.dir")
        scale = known or scale_of(self.data, config.train, self.world_size, self.first_stage.net.sample_latent)
        self.first_stage.scale = json.loads(broadcast(json.dumps(scale).encode()))  # rank 0's, should they differ by a bit
        if not state:
            path = self.run_dir / "samples" / "first-stage.png"
            save_reconstructions(path, self.first_stage, self.originals[: config.train.sample_num])
            self.save_start(path.parent)
        if "context" in self.cond_fields:
            self.keep_text_encoder()
        self.number_images()

    def number_images(self) -> None:
        """Where an image condition is made of the images, let their numbers take the place of the labels in a batch."""
        if "cond_image" in self.cond_fields:
            self.ids, self.labels = self.labels, np.arange(len(self.labels), dtype=np.int32)

    def held_out(self) -> "LatentTask":
        held: Any = super().held_out()
        held.data = self.first_stage.cached_moments(held.originals, self.config.data.dir)
        held.number_images()
        return held

    def save_start(self, folder: Path) -> None:
        """Write what the process begins and ends with: pictures of noise, and of a few images with more and more noise.
        Beside these, the images that condition the previews, each with its original."""
        num, T = min(self.config.train.sample_num, len(self.originals)), self.diffusion.num_timesteps
        noise = np.random.default_rng(self.preview_seed).standard_normal((num, *self.shape), np.float32)
        prior = self.decode(noise)
        if self.rank:
            return
        images.save_grid(folder / "prior.png", images.to_uint8(prior))
        x_start = Tensor(self.first_stage.scale * self.data[: min(ROWS, num), : self.shape[0]])  # the means
        noise, times = Tensor(noise[: len(x_start)]), np.linspace(0, T - 1, ROW_STEPS, dtype=np.int32)
        at = [Tensor(np.full(len(x_start), t)) for t in times]
        noisy = [self.diffusion.q_sample(x_start, t, noise).asnumpy() for t in at]
        save_rows(folder / "diffusion-row.png", noisy, self.decode, num)
        if "cond_image" in self.cond_fields:
            originals = to_float(self.originals[:num])
            shown = self.cond_image(originals, np.random.default_rng(self.preview_seed))
            pairs = np.stack([np.broadcast_to(shown[:, : originals.shape[1]], originals.shape), originals], 1)
            images.save_grid(folder / "condition.png", images.to_uint8(pairs.reshape(-1, *originals.shape[1:])), 16)

    def preview(self, step: int) -> Path:
        num, path = self.config.train.sample_num, self.run_dir / "samples" / f"denoise-row-{step:07d}.png"
        row = DenoiseRow(min(ROWS, num), len(self.preview_sampling.timesteps(self.diffusion)))
        drawn = super().preview(step, row)
        if self.rank == 0:
            row.save(path, self.decode, num)
        return drawn

    def keep_data(self) -> None:
        super().keep_data()
        if "context" in self.cond_fields:
            keep_text_encoder(self.run_dir, self.contexts)
        resolve_first_stage(self.config, self.run_dir, self.weights_hash)

    def checkpoint_record(self) -> dict[str, Any]:
        own = {"latent_scale": self.first_stage.scale, "first_stage": self.weights_hash}
        own |= {"text_encoder": self.contexts.sha256} if "context" in self.cond_fields else {}
        return own | super().checkpoint_record()

    def make_x_start(self) -> Any:
        scale, sample = self.first_stage.scale, self.first_stage.net.sample_latent
        return lambda moments, noise: scale * sample(moments, noise)

    def draw_conditions(self, rng: Random, batch: Arrays, labels: np.ndarray) -> Arrays:
        shape, needs_noise = batch["noise"].shape, self.first_stage.net.needs_noise
        drawn = {"latent_noise": rng.standard_normal(shape, np.float32)} if needs_noise else {}
        if "cond_image" in self.cond_fields:
            shown, labels = self.cond_image(to_float(self.originals[labels]), rng), self.ids[labels]
            with alone(), given_up(lambda: False):  # a batch of this rank; a step is not given up halfway
                drawn["cond_image"] = self.encode_condition(shown)
        return drawn | self.draw_labels(rng, labels)

    def open(self, home: Path, state: dict[str, Any]) -> None:
        super().open(home, state)
        self.null_label = self.labelling.null
        scale = state.get("latent_scale")
        if scale is None or not (home / "first_stage").exists():
            missing = "latent_scale in its state.json" if scale is None else "first_stage beside its config.json"
            raise UserError(f"the run in {home} has no {missing}: copy the whole run")
        self.first_stage = load_first_stage(home / "first_stage", self.config.first_stage_patch)
        self.first_stage.scale = scale

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        return self.first_stage.encode(pictures)

    def encode_condition(self, cond: np.ndarray) -> np.ndarray:
        model = self.config.model
        return latent_condition(self.config.data.condition, cond, self.shape[1:], model.channels, self.encode)

    def decode(self, x: np.ndarray) -> np.ndarray:
        return self.first_stage.decode(x)

    def codes(self, x: np.ndarray) -> Arrays:
        return {"codebook_ids": self.first_stage.codebook_ids(x)} if self.has_codebook else {}

    @property
    def has_codebook(self) -> bool:
        return self.first_stage.has_codebook

    def quantize(self, x: Tensor) -> Tensor:
        return self.first_stage.quantize(x)


def resolve_first_stage(config: LatentConfig, run: Path, kept: str | None = None) -> FirstStage:
    """The first stage that a run of latents has saved, or the one of --first-stage or in --init-from, of which it keeps a
    copy; a damaged copy is made again. `kept` is the SHA-256 of its weights, where a checkpoint knows it. Raises UserError
    if there is none, or another one, or one whose latents the network does not take."""
    saved, requested = run / "first_stage", config.first_stage
    sweep(saved)
    with contextlib.suppress(UserError):
        kept = kept or hash_of(read_state(saved))
    is_saved = is_copy(saved, kept)
    if config.init_from and not (is_saved or requested) and is_run(config.init_from):
        requested = str(open_run(config.init_from, [])[0] / "first_stage")
    if config.first_stage_model and not (requested and Path(requested).is_dir()):
        if not is_saved and (file := requested or config.init_from):
            check_fits(config, config.first_stage_model, file)
            keep_first_stage(saved, *first_stage_in(file, config), 0)
            kept = kept or hash_of(read_state(saved))
            is_saved = is_copy(saved, kept)
        requested = None
    if is_saved and requested and not Path(requested).exists():
        requested = None  # it was needed only for the copy
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
    check_fits(config, autoencoder.model, name)
    if not is_saved:
        keep_first_stage(saved, autoencoder, content, read_state(source)["step"])
    return first_stage


def check_fits(config: LatentConfig, autoencoder: AutoencoderConfig, name: str | Path) -> None:
    """Refuse a first stage, called `name`, whose latents the network does not take."""
    model, size, side, f = config.model, config.data.size, config.model.latent_size, autoencoder.size_multiple
    if size % f:
        sizes = f"sizes divisible by {f}, such as {side * f}"
        raise UserError(f"--data.size is {size}: the first stage {name} takes {sizes}")
    made, taken = (autoencoder.embed_dim, size // f, size // f), (model.in_channels, side, side)
    if made != taken or autoencoder.channels != model.channels:
        raise UserError(
            f"the first stage {name} makes latents {made} of images with {autoencoder.channels} channels, the network "
            f"takes {taken} and {model.channels}: set --model.in-channels, --model.out-channels, --model.latent-size, "
            "--model.channels and --data.size to fit"
        )


def first_stage_in(file: str, config: LatentConfig) -> tuple[AutoencoderRunConfig, bytes]:
    """The first stage in a file of weights, such as that of a whole LatentDiffusion: its run and its weights."""
    model: Any = config.first_stage_model
    net = model.build()
    load_pretrained(net, file)
    content = safetensors.numpy.save({p.name: p.asnumpy() for p in net.get_parameters()})
    return AutoencoderRunConfig(data=replace(config.data, dir=None), model=model), content


def keep_first_stage(saved: Path, autoencoder: AutoencoderRunConfig, content: bytes, step: int) -> None:
    """Write the copy of a first stage, whose averaged weights at this step are `content`, that a run of latents keeps."""
    files = {"config.json": json.dumps(autoencoder.to_record(), indent=1).encode(), "ema.safetensors": content}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for name, data in files.items():
        write(saved / name, lambda file, data=data: file.write(data))
    write_json(saved / "state.json", {"step": step, "sha256": hashes})  # last: now it is complete


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


def scale_of(encoded: np.ndarray, train: ImageTrainConfig, world_size: int = 1, sample: Callable = gaussian_sample) -> float:
    """1 / the standard deviation of the latents of a first batch of all ranks (Rombach et al. 2022, appendix G), where
    sample(encoded, noise) makes a latent of what the encoder gives."""
    rng = np.random.default_rng((train.seed, Stream.NOISE))
    batch = encoded[rng.permutation(len(encoded))[: train.rows_per_step * world_size]]
    noise = rng.standard_normal((len(batch), batch.shape[1] // 2, *batch.shape[2:]), np.float32)
    return float(1 / sample(Tensor(batch), Tensor(noise)).asnumpy().std())
