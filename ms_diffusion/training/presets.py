"""What a run is made of, and the table of named runs."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from ..convert import load_into
from ..data.captions import CAPTIONS, LENGTH, WORDS
from ..data.conditions import KINDS, condition_channels
from ..data.points import POINTS_FILE, TOYS
from ..files import write
from ..latent import FirstStage
from ..losses import D_LOSSES
from ..models.autoencoder import AutoencoderConfig
from ..models.classifier import Classifier
from ..models.context import LatentUnetConfig
from ..models.discriminator import NORMS
from ..models.mlp import MLPConfig, ResidualMLPConfig
from ..models.unet import UnetConfig
from ..process import DiffusionConfig
from ..randomness import TIMESTEP_SAMPLING
from ..runtime import UserError
from .checkpoint import checkpoints, read_state, read_weights
from .step import average_after_training, power_of_length


@dataclass(frozen=True)
class DataConfig:
    """The images that are learnt."""

    name: str = "fashion-mnist"
    """Data set: fashion-mnist, fashion-mnist-mini (in the package) or image-folder."""
    dir: str | None = None
    """Folder of the data; fashion-mnist is looked for in more places, and else downloaded."""
    size: int = 28
    """Height and width in pixels."""
    flip: bool = True
    """Flip half of the images left to right."""
    condition: Literal[KINDS] = "none"
    """What the network is shown of an image: lowres (super-resolution), gray (colourisation), mask (inpainting) or none."""
    lowres_size: int = 7
    """Height and width of the lowres condition in pixels."""


@dataclass(frozen=True)
class PointsConfig:
    """The points in the plane that are learnt."""

    name: Literal[(*TOYS, POINTS_FILE)] = "scurve"
    """A known distribution, or points-file, your own points."""
    dir: str | None = None
    """The points-file: .npy or .csv, (N, 2), or a folder that holds one."""
    num: int = 10_000
    """Points that are drawn to learn from; not of a points-file."""

    condition: ClassVar[str] = "none"  # as an image's, for train.py
    flip: ClassVar[bool] = False


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    total_steps: int = 20000
    """Training steps."""
    batch_size: int = 128
    """Images, or points, a step, on each device."""
    steps_per_call: int = 1
    """Training steps that one call of the compiled function makes; more for small networks."""
    lr: float = 1e-3
    """Peak learning rate of Adam, reached after the warm-up."""
    lr_decay: bool = True
    """After the warm-up the learning rate falls in a cosine to 0; otherwise it stays."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """The global norm of the gradients is scaled down to this."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which samples are drawn from."""
    timestep_sampling: Literal[TIMESTEP_SAMPLING] = "uniform"
    """How timesteps are drawn: uniform, antithetic (t and T - 1 - t) or by importance (their last losses)."""
    offset_noise: float = 0.0
    """Strength of the noise that is one number for a whole channel."""
    label_dropout: float = 0.1
    """Share of labels that are withheld, so that guidance has an unconditional network (where model.num_classes is set)."""
    learn_logvar: bool = False
    """Learn the log-variance of each timestep's error, which then weighs it."""
    ema_lengths: tuple[float, ...] = ()
    """Lengths of power-function averages kept besides: with two, say 0.05 0.1, sample.py --ema-length can choose any."""
    seed: int = 0
    """Seed of every random number of the run, but for dropout's, which MindSpore draws."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between two sample grids."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    sample_num: int = 64
    """Images in a grid, or points in a picture."""
    sample_steps: int = 50
    """Steps of the ancestral sampler for a grid: its noise mends what a young network gets wrong, where DDIM keeps it."""
    sample_guidance: float = 1.0
    """Guidance towards the class of grids and scores, and of sample.py where it is not told: 1 is the plain network."""
    sample_guidance_interval: tuple[int, int] | None = None
    """First and last timestep that are guided so; if not given all."""
    score_every: int = 0
    """Steps between two FIDs by the classifier's features, for 28 x 28 gray images; the best checkpoint stays. 0: none."""
    score_num: int = 1000
    """Images in such a score, drawn by dpmpp_2m in 15 steps, against as many training images."""


@dataclass(frozen=True)
class AutoencoderTrainConfig(TrainConfig):
    """How an autoencoder is trained, and the discriminator that it has to deceive (Rombach et al. 2022, appendix G)."""

    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decays of the moments, also the discriminator's."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the latents from N(0, 1)."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS, beside the mean absolute error; 0: none."""
    vgg: str | None = None
    """torchvision's VGG16 weights for LPIPS; if not given, for gray images of 28 or 32 pixels the classifier's stages."""
    lpips: str | None = None
    """The linear layers of LPIPS, of the lpips package."""
    disc_start: int = 5000
    """The step from which the discriminator is trained and counts."""
    disc_lr: float = 1e-3
    """Its learning rate at first; it falls to 0 as the autoencoder's does."""
    disc_weight: float = 0.5
    """Its weight, of gradients as large as the likelihood's; 0: no discriminator."""
    disc_factor: float = 1.0
    """Factor of its losses."""
    disc_loss: Literal[tuple(D_LOSSES)] = "hinge"
    """The discriminator's loss."""
    disc_channels: int = 32
    """Channels after its first convolution."""
    disc_layers: int = 2
    """Its convolutions with a norm."""
    disc_norm: Literal[tuple(NORMS)] = "batch"
    """Its norms."""


@dataclass(frozen=True)
class Config:
    """A run: data + diffusion + model + train."""

    data: DataConfig | PointsConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    model: UnetConfig | MLPConfig | ResidualMLPConfig | AutoencoderConfig | LatentUnetConfig = field(
        default_factory=UnetConfig
    )
    train: TrainConfig | AutoencoderTrainConfig = field(default_factory=TrainConfig)
    first_stage: str | None = None
    """The autoencoder's run whose latents are learnt, for a latent preset; the run keeps a copy."""
    latent_scale: float | None = None
    """What latents are multiplied by; if not given 1 / the standard deviation of a first batch of them."""
    first_stage_patch: int | None = None
    """Side in pixels of overlapping patches that the first stage works on one by one; if not given, on whole images."""
    init_from: str | None = None
    """Weights that a new run begins with, of ours, CompVis or diffusers: .safetensors, or .ckpt where PyTorch is."""
    init_ema: bool = False
    """Take CompVis's moving averages (model_ema) from that file."""
    init_ignore: tuple[str, ...] = ()
    """Beginnings of names in that file to leave out."""
    init_partial: bool = False
    """Take what fits of that file, instead of all or nothing."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of convolutions and linear layers; weights, norms and softmax stay float32. fp16 scales the loss."""

    @property
    def is_points(self) -> bool:
        """Of points in the plane, not of images."""
        return isinstance(self.data, PointsConfig)

    @property
    def is_latent(self) -> bool:
        """Of latents of a first stage."""
        return isinstance(self.model, LatentUnetConfig)

    @property
    def is_text(self) -> bool:
        """Told of by captions."""
        return self.is_latent and self.model.condition == "text"

    @property
    def classes(self) -> int | None:
        """How many classes it is told of, by label or by caption; None: of none."""
        return len(CAPTIONS) if self.is_text else self.model.num_classes

    @property
    def is_autoencoder(self) -> bool:
        """A first stage."""
        return isinstance(self.model, AutoencoderConfig)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one x that is diffused: (2,), or (C, H, W)."""
        if self.is_points:
            return (2,)
        if self.is_latent:
            return (self.model.in_channels, self.model.latent_size, self.model.latent_size)
        return (self.model.channels, self.data.size, self.data.size)

    def build(self):
        """The (network, diffusion) of this run.

        Raises:
            UserError: values that do not fit together.
        """
        if self.is_points:
            self._check_points()
        else:
            self._check_images()
        self._check_training()
        try:
            return self.model.build(self.train.seed), self.diffusion.build()
        except ValueError as e:
            raise UserError(str(e)) from e

    def _check_points(self) -> None:
        if self.model.num_embeddings < self.diffusion.num_timesteps:
            raise UserError(
                f"the network has embeddings for {self.model.num_embeddings} timesteps: "
                f"set --model.num_embeddings {self.diffusion.num_timesteps}, as --diffusion.num_timesteps"
            )

    def _check_images(self) -> None:
        multiple = self.model.size_multiple
        size, flag = (self.model.latent_size, "model.latent-size") if self.is_latent else (self.data.size, "data.size")
        if size < multiple or size % multiple:
            fit = max(round(size / multiple), 1) * multiple
            raise UserError(f"image size {size} is not divisible by {multiple}, as the network needs: try --{flag} {fit}")
        model, patch = self.model, self.first_stage_patch
        if self.is_latent and (model.out_channels != model.in_channels or model.n_embed):
            raise UserError("a prediction is like a latent: set --model.out-channels as --model.in-channels, no n-embed")
        if self.latent_scale is not None and not 0 < self.latent_scale < np.inf:
            raise UserError(f"--latent-scale is {self.latent_scale}: it must be above 0")
        if self.is_text and not self.data.name.startswith("fashion-mnist"):
            raise UserError(f"there are captions of Fashion-MNIST alone, not of {self.data.name}: train --preset latent")
        if self.is_text and (model.vocab_size, model.max_length) != (len(WORDS), LENGTH):
            raise UserError(f"its captions need --model.vocab_size {len(WORDS)} --model.max_length {LENGTH}")
        if patch is not None and not 1 <= patch <= self.data.size:
            raise UserError(f"--first-stage-patch is {patch}: choose up to the images' size, {self.data.size}")
        if (self.is_latent or self.is_autoencoder) and self.data.condition != "none":
            raise UserError(f"--data.condition {self.data.condition} is for networks in pixel space: leave it out")
        if self.is_latent and self.data.flip:
            raise UserError("latents are made once, of images as they are: add --data.no-flip")
        needed = condition_channels(self.data.condition, self.model.channels)
        if self.model.cond_channels != needed:
            raise UserError(
                f"--data.condition {self.data.condition} has {needed} channels: set --model.cond-channels {needed}"
            )
        if self.data.condition == "lowres" and not 1 <= self.data.lowres_size <= self.data.size:
            raise UserError(f"--data.lowres-size is {self.data.lowres_size}: choose from 1 to {self.data.size}")
        if self.data.condition == "lowres" and self.data.size % self.data.lowres_size:
            raise UserError(f"--data.lowres-size {self.data.lowres_size} does not divide the image size {self.data.size}")

    def _check_training(self) -> None:
        train = self.train
        above_0 = "total_steps batch_size steps_per_call lr clip_norm log_every sample_every save_every keep_checkpoints"
        for name in above_0.split():
            if not getattr(train, name) > 0 and not (name == "total_steps" and self.init_from and train.total_steps == 0):
                raise UserError(f"--train.{name.replace('_', '-')} is {getattr(train, name)}: it must be above 0")
        if not (0 <= train.label_dropout <= 1 and train.offset_noise >= 0):
            raise UserError("--train.label-dropout must be in [0, 1], --train.offset-noise at least 0")
        for length in train.ema_lengths:
            try:
                power_of_length(length)
            except ValueError as e:
                raise UserError(f"--train.ema-lengths: {e}") from e
        if not 0 <= train.ema_decay < 1 or train.warmup_steps < 0 or train.seed < 0:
            raise UserError("--train.ema-decay must be in [0, 1), --train.warmup-steps and --train.seed at least 0")
        if not self.is_latent and any(v is not None for v in (self.first_stage, self.first_stage_patch, self.latent_scale)):
            raise UserError("--first-stage, --first-stage-patch and --latent-scale are for latents: add --preset latent")
        if self.is_autoencoder:
            self._check_adversary()
        if not self.init_from and (self.init_ignore or self.init_partial or self.init_ema):
            raise UserError("--init-ignore, --init-partial and --init-ema are for a file: add --init-from")
        if train.score_every < 0 or train.score_num <= Classifier.num_features:
            features = Classifier.num_features
            raise UserError(
                f"--train.score-every must be at least 0, --train.score-num above {features}, the features' number"
            )
        scored = self.data.name.startswith("fashion-mnist") or self.shape == (1, 28, 28)
        if train.score_every and (self.is_points or self.is_autoencoder or not scored):
            raise UserError("--train.score-every is for gray images of 28 x 28: leave it out")
        if not 1 <= train.sample_steps <= self.diffusion.num_timesteps or train.sample_num < 1:
            raise UserError(
                f"--train.sample-steps must be in 1..{self.diffusion.num_timesteps}, --train.sample-num at least 1"
            )

    def _check_adversary(self) -> None:
        train = self.train
        for name in "kl_weight perceptual_weight disc_weight disc_factor disc_start".split():
            if not getattr(train, name) >= 0:
                raise UserError(f"--train.{name.replace('_', '-')} is {getattr(train, name)}: it must be at least 0")
        for name in "disc_lr disc_channels disc_layers".split():
            if not getattr(train, name) > 0:
                raise UserError(f"--train.{name.replace('_', '-')} is {getattr(train, name)}: it must be above 0")
        if train.disc_weight and self.data.size // 2**train.disc_layers < 3:
            raise UserError(f"--train.disc-layers {train.disc_layers} leave nothing of {self.data.size} pixels: take fewer")
        if bool(train.vgg) != bool(train.lpips):
            raise UserError("LPIPS takes both of --train.vgg and --train.lpips")
        if not all(0 < beta < 1 for beta in train.adam_betas):
            raise UserError(f"--train.adam_betas are {train.adam_betas}: both must be between 0 and 1")
        plain = TrainConfig()
        for name in "ema_lengths learn_logvar timestep_sampling offset_noise steps_per_call".split():
            if getattr(train, name) != getattr(plain, name):
                raise UserError(f"--train.{name.replace('_', '-')} is for diffusion: leave it out")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, path) -> "Config":
        """Read a run's config.json; the fields of data and model tell which kind they are.

        Raises:
            UserError: the file is missing or not such a record.
        """
        kinds = {"data": (DataConfig, PointsConfig), "diffusion": (DiffusionConfig,)}
        kinds |= {"train": (TrainConfig, AutoencoderTrainConfig)}
        kinds["model"] = (UnetConfig, MLPConfig, ResidualMLPConfig, AutoencoderConfig, LatentUnetConfig)

        def with_tuples(values: dict) -> dict:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        try:
            record = with_tuples(json.loads(Path(path).read_text()))
            for name, choices in kinds.items():
                values = with_tuples(record[name])
                fitting = [kind for kind in choices if set(values) <= {f.name for f in fields(kind)}]
                record[name] = (fitting or choices)[0](**values)
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not the config.json of a run: {e}") from e


WEIGHTS = Path(__file__).parents[1] / "weights"


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def default_run() -> str:
    """The first of `bundled_models()`.

    Raises:
        UserError: there is none.
    """
    if not bundled_models():
        raise UserError("which run? No model came with this package: give a run's folder, such as runs/quick")
    return bundled_models()[0]


def run_folders(run: Path) -> tuple[Path, Path]:
    """(checkpoint, run): the newest checkpoint of a run's folder, or the one that is given, or its weights, and its run.

    A model that comes with the package goes by its name in `bundled_models()`; its folder is run and checkpoint in one.

    Raises:
        UserError: there is no such run, or nothing in it.
    """
    run = Path(run)
    if not run.exists() and str(run) in bundled_models():
        run = WEIGHTS / run
    if run.suffix == ".safetensors":
        run = run.parent
    if not run.is_dir():
        known = ", ".join(bundled_models())
        raise UserError(
            f"{run} is not a folder: give a run's, such as runs/quick, train one, or take what is there: {known}"
        )
    if (run / "state.json").exists():
        return run, run if (run / "config.json").exists() else run.resolve().parent.parent
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint: train it first, with python train.py --run-dir {run}")
    return found[-1], run


def load_run(run: Path, weights: str = "ema", ema_length: float | None = None):
    """(network, diffusion, config, step) of a run's folder, at its newest checkpoint, or of the checkpoint that is given.

    Args:
        weights: "ema", the moving average, or "model", as trained.
        ema_length: take the average of this length instead, made of those that the run's checkpoints keep
            (`average_after_training`).

    Raises:
        UserError: there is no such run, or it cannot be read, or it keeps no averages.
    """
    folder, home = run_folders(run)
    config = Config.from_json(home / "config.json")
    step = read_state(folder)["step"]
    arrays = read_weights(folder, weights) if ema_length is None else _average(home, config, step, ema_length)
    net, diffusion = config.build()
    load_into(net, arrays)
    return net, diffusion, config, step


def load_first_stage(run: Path, patch: int | None = None) -> FirstStage:
    """The autoencoder of a run, of whose latents a diffusion model is made, for patches of this size or whole images.

    Raises:
        UserError: there is no such run, or it is not an autoencoder's, or the patches do not fit it.
    """
    net, _, config, _ = load_run(run)
    if not config.is_autoencoder:
        raise UserError(f"{run} is not an autoencoder's run: train one, with python train.py --preset autoencoder")
    f = config.model.size_multiple
    if patch is not None and patch % f:
        raise UserError(f"--first-stage-patch {patch} is not divisible by {f}, as the first stage {run} needs")
    return FirstStage(net, 1.0, f, patch)


def first_stage_of(run: Path) -> FirstStage:
    """The first stage that a run of latents has kept, and the scale of its latents.

    Raises:
        UserError: either is missing.
    """
    folder, home = run_folders(run)
    scale = read_state(folder).get("latent_scale")
    if scale is None or not (home / "first_stage").exists():
        missing = "latent_scale in its state.json" if scale is None else "first_stage beside its config.json"
        raise UserError(f"{folder} is of latents, but has no {missing}: copy the whole run")
    first_stage = load_first_stage(home / "first_stage", Config.from_json(home / "config.json").first_stage_patch)
    first_stage.scale = scale
    return first_stage


def resolve_first_stage(config: Config, run: Path, rank: int = 0) -> FirstStage:
    """The first stage that a run of latents is given, of which it (rank 0) keeps a copy, or has kept.

    Raises:
        UserError: it has none, or another one, or one whose latents are not those that the network takes.
    """
    kept, given = run / "first_stage", config.first_stage
    is_kept = (kept / "state.json").exists()  # which is written last
    if is_kept and given and not Path(given).exists():
        given = None  # it was needed at first only
    if not given and not is_kept:
        raise UserError("latents of which autoencoder? Give its run: --first-stage runs/autoencoder")
    if given:
        folder, home = run_folders(Path(given))
        hashes = [read_state(f)["sha256"]["ema.safetensors"] for f in (folder, *[kept] * is_kept)]
        if len(set(hashes)) > 1:
            raise UserError(f"{given} is not the first stage of the run in {run}, which has kept its own: leave it out")
    source = kept if is_kept else Path(given)
    model, autoencoder = config.model, Config.from_json(run_folders(source)[1] / "config.json").model
    first_stage = load_first_stage(source, config.first_stage_patch)
    if config.data.size % autoencoder.size_multiple:
        raise UserError(
            f"the first stage {source} takes sizes divisible by {autoencoder.size_multiple}, not {config.data.size}: "
            f"set --data.size {model.latent_size * autoencoder.size_multiple}"
        )
    size = config.data.size // autoencoder.size_multiple
    makes, takes = (autoencoder.embed_dim, size, size), config.shape
    if makes != takes or autoencoder.channels != model.channels:
        raise UserError(
            f"the first stage {source} makes latents {makes} of images with {autoencoder.channels} channels, the network "
            f"takes {takes} and {model.channels}: set --model.in-channels, --model.out-channels, --model.latent-size, "
            "--model.channels and --data.size to fit"
        )
    if not is_kept and rank == 0:
        state = {"step": read_state(folder)["step"], "sha256": {}}
        for name in ("config.json", "ema.safetensors"):
            data = ((home if name == "config.json" else folder) / name).read_bytes()
            state["sha256"][name] = hashlib.sha256(data).hexdigest()
            write(kept / name, lambda f, data=data: f.write(data))
        write(kept / "state.json", lambda f: f.write(json.dumps(state, indent=1).encode()))
    return first_stage


def _average(run: Path, config: Config, step: int, length: float) -> dict:
    if not config.train.ema_lengths:
        raise UserError("this run keeps no averages to choose from: train it with --train.ema-lengths 0.05 0.1")
    kept = [(read_state(folder)["step"], each, folder) for folder in checkpoints(run) for each in config.train.ema_lengths]
    kept = [row for row in kept if row[0] <= step]
    if not kept:
        raise UserError("this run's averages were not kept: leave out --ema-length")
    steps, lengths, folders = zip(*kept, strict=True)
    try:
        coefficients = average_after_training(steps, lengths, step, length)
    except ValueError as e:
        raise UserError(f"--ema-length: {e}") from e
    total = {}
    for coefficient, each, folder in zip(coefficients, lengths, folders, strict=True):
        for name, values in read_weights(folder, f"ema-{each:g}").items():
            total[name] = total.get(name, 0) + np.float32(coefficient) * values
    return total


# Sized for a few minutes on two CPU cores
QUICK = Config(
    DataConfig("fashion-mnist-mini"),
    # x0 makes whole shapes much sooner than eps or v do
    DiffusionConfig(schedule="cosine", objective="x0", loss="l2"),
    UnetConfig(dim=32, init_dim=32, dim_mults=(1, 2), use_convnext=False, patch_size=2),
    TrainConfig(
        total_steps=4800,
        batch_size=16,
        lr=3e-3,
        warmup_steps=50,
        ema_decay=0.995,
        log_every=25,
        sample_every=1600,
        save_every=800,
    ),
)

# Points in the plane: a network that is good in seconds, and the S-curve experiment's network and training
SCURVE = Config(
    PointsConfig(),
    DiffusionConfig(schedule="sigmoid", loss="l2"),
    ResidualMLPConfig(),
    TrainConfig(
        total_steps=10_000,
        batch_size=256,
        steps_per_call=100,
        timestep_sampling="antithetic",
        lr=2e-3,
        log_every=100,
        sample_every=5000,
        save_every=5000,
        sample_num=2000,
        sample_steps=100,
    ),
)
SCURVE_SEED = replace(
    SCURVE,
    diffusion=replace(SCURVE.diffusion, num_timesteps=100),
    model=MLPConfig(),
    train=replace(SCURVE.train, total_steps=316_000, batch_size=128, lr=1e-3, sample_every=79_000, save_every=79_000),
)

# Told the class, on all images, none of them flipped: shoes face left. docs/quality.md says how this came about
CLASS = Config(
    DataConfig(flip=False),
    DiffusionConfig(schedule="cosine", objective="x0", loss="l2", weighting="min-snr"),
    UnetConfig(
        dim=48,
        init_dim=48,
        dim_mults=(1, 2),
        use_convnext=False,
        scale_shift=True,
        final_skip=True,
        patch_size=2,
        num_classes=10,
    ),
    TrainConfig(
        total_steps=6000,
        batch_size=64,
        lr=2e-3,
        ema_decay=0.998,
        sample_guidance=2.0,
        sample_guidance_interval=(150, 750),
    ),
)

# Images of 32 x 32 to latents of 8 x 8, an eighth as many numbers, and the diffusion of these
AUTOENCODER = Config(
    DataConfig(size=32, flip=False),
    model=AutoencoderConfig(
        ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, channels=1, resolution=32, z_channels=2, embed_dim=2, groups=8
    ),
    train=AutoencoderTrainConfig(
        total_steps=12_000,
        batch_size=16,
        lr=4e-3,
        clip_norm=1e4,  # of losses that are sums over an image
        ema_decay=0.998,
        kl_weight=1e-2,
        disc_start=9500,
    ),
)
LATENT = Config(
    DataConfig(size=32, flip=False),
    DiffusionConfig(schedule="cosine", objective="v", loss="l2", weighting="min-snr"),
    LatentUnetConfig(groups=8),
    TrainConfig(
        total_steps=10_000,
        batch_size=64,
        lr=2e-3,
        warmup_steps=500,
        timestep_sampling="antithetic",
        sample_guidance=2.0,
        sample_guidance_interval=(150, 750),
    ),
)

# The networks and data that the project came from, and the same with more of a condition
PRESETS = {
    "quick": QUICK,
    "quick-class": replace(QUICK, model=replace(QUICK.model, num_classes=10)),
    "quick-upscale": replace(
        QUICK, data=replace(QUICK.data, condition="lowres"), model=replace(QUICK.model, cond_channels=1)
    ),
    "fashion-mnist": Config(),
    # What the annotated diffusion model does, to be compared with: its process, its rate and no average
    "fashion-mnist-seed": Config(
        diffusion=DiffusionConfig(num_timesteps=200, schedule="unscaled_linear"),
        train=TrainConfig(lr_decay=False, warmup_steps=0, ema_decay=0.0, sample_steps=200),
    ),
    "fashion-mnist-resnet": Config(model=UnetConfig(dim=32, use_convnext=False)),
    "fashion-mnist-class": CLASS,
    "fashion-mnist-large": replace(
        CLASS,
        model=replace(CLASS.model, dim=64, init_dim=64),
        train=replace(
            CLASS.train, total_steps=22_000, lr=1.5e-3, warmup_steps=500, ema_decay=0.999, timestep_sampling="antithetic"
        ),
    ),
    **{name: replace(SCURVE, data=PointsConfig(name)) for name in TOYS},
    "scurve-seed": SCURVE_SEED,
    "autoencoder": AUTOENCODER,
    "autoencoder-kl-f8": Config(
        DataConfig("image-folder", size=256),
        model=AutoencoderConfig(),
        train=AutoencoderTrainConfig(
            total_steps=500_000,
            batch_size=4,
            lr=1.8e-5,
            lr_decay=False,
            warmup_steps=0,
            clip_norm=1e9,
            adam_betas=(0.5, 0.9),
            disc_start=50_001,
            disc_lr=1.8e-5,
            disc_channels=64,
            disc_layers=3,
        ),
    ),
    "latent": LATENT,
    "latent-text": replace(
        LATENT,
        model=replace(LATENT.model, condition="text", num_classes=None, vocab_size=len(WORDS), max_length=LENGTH),
        train=replace(LATENT.train, total_steps=6000),
    ),
}
