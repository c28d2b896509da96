"""What configures a run: fields with their ranges, shared by all kinds. Each kind adds its own in `tasks/`."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..data.batches import DATASETS
from ..data.conditions import KINDS as CONDITIONS
from ..fields import (
    AT_LEAST_1,
    COLOUR,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    Bounds,
    OneOf,
    as_value,
    check_fields,
    find_problem,
    from_record,
)
from ..files import read_json
from ..models.classifier import Classifier
from ..process import DiffusionConfig
from ..randomness import TIMESTEP_SAMPLING
from ..runtime import UserError
from .lora import Targets
from .step import OptimizerName, power_of_length

# Fields that had another name once: flags and config.json files of then are still read
RENAMED = {
    "diffusion.timesteps": "diffusion.num_timesteps",
    "model.timesteps": "model.num_embeddings",
    "model.words": "model.vocab_size",
    "model.length": "model.max_length",
    "train.timesteps": "train.timestep_sampling",
    "train.betas": "train.adam_betas",
}


@dataclass(frozen=True)
class DataConfig:
    """The images to train on."""

    name: Annotated[str, OneOf(DATASETS)] = "fashion-mnist"
    """Data set: fashion-mnist, fashion-mnist-mini (bundled with the package) or image-folder."""
    dir: str | None = None
    """Folder of the data. Fashion-MNIST is also looked for in the usual places and downloaded if it is in none."""
    size: Annotated[int, AT_LEAST_1] = 28
    """Height and width in pixels."""
    flip: bool = True
    """Flip half of the images left to right."""
    condition: Literal[CONDITIONS] = "none"
    """Image that conditions the network: lowres (super-resolution), gray (colorization), mask (inpainting) or none."""
    lowres_size: Annotated[int, AT_LEAST_1] = 7
    """Height and width of the lowres condition in pixels."""
    matte: Annotated[str, COLOUR] = "white"
    """Colour that is seen through the transparent pixels of an image folder: a name, or #rrggbb."""
    validation: Annotated[float, Bounds(0, 1, high_open=True)] = 0.0
    """Share of an image folder that is held back as test images, chosen by the content of the files. With 0 the test images
    are those that are trained on."""

    def options(self) -> dict[str, Any]:
        """What the data set's loader may take beside name, folder and size."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "dir", "size")}


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained."""

    total_steps: Annotated[int, Bounds(0, 2**31 - 1)] = 20000  # which the optimizer counts in int32
    """Number of training steps."""
    batch_size: Annotated[int, AT_LEAST_1] = 128
    """Images or points per step on each device; see also accumulate."""
    lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate of Adam, reached after the warm-up."""
    lr_decay: bool = True
    """Decay the learning rate to 0 along a cosine after the warm-up; otherwise keep it constant."""
    warmup_steps: Annotated[int, NON_NEGATIVE] = 200
    """Steps of linear warm-up."""
    clip_norm: Annotated[float, POSITIVE] = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    ema_decay: Annotated[float, Bounds(0, 1, high_open=True)] = 0.999
    """Decay of the moving average of the weights (EMA) that samples are drawn with."""
    seed: Annotated[int, NON_NEGATIVE] = 0
    """Seed of every random number of the run."""
    log_every: Annotated[int, AT_LEAST_1] = 20
    """Steps between two lines of metrics.jsonl."""
    sample_every: Annotated[int, AT_LEAST_1] = 1000
    """Steps between two preview pictures."""
    save_every: Annotated[int, AT_LEAST_1] = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 3
    """Number of newest checkpoints to keep."""
    sample_num: Annotated[int, AT_LEAST_1] = 64
    """Images or points in a preview."""
    weight_decay: Annotated[float, NON_NEGATIVE] = 0.0
    """Decoupled weight decay (AdamW). Biases, norms and other parameters with one axis do not decay, nor does the
    discriminator of an autoencoder."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """K: each step sums the gradients of K batches. It is a step of K times batch_size in the memory of one batch."""

    validate_every: Annotated[int, NON_NEGATIVE] = 0
    """Steps between two losses of held-out data; without FID scores, the checkpoint with the lowest is kept. 0 is never."""
    validate_num: Annotated[int, AT_LEAST_1] = 1000
    """Held-out images or points in such a loss."""
    epochs: Annotated[float, POSITIVE] | None = None
    """Length in passes over the data, in place of total_steps, which is computed from it."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl and the previews for TensorBoard too, which must be installed."""
    optimizer: OptimizerName = "adam"
    """adam, or muon, which needs fewer steps, each of them slower: it moves weights of convolutions and linear layers along
    their orthogonalised momentum. Adam moves the rest, and the discriminator of an autoencoder."""

    @property
    def rows_per_step(self) -> int:
        """Images or points per step on each device."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class DiffusionTrainConfig(TrainConfig):
    """How a denoiser is trained."""

    steps_per_call: Annotated[int, AT_LEAST_1] = 1
    """Training steps in one call of the compiled function. More than 1 pays off for small networks."""
    timestep_sampling: Literal[TIMESTEP_SAMPLING] = "uniform"
    """Distribution of the timesteps: uniform, antithetic (pairs t, T - 1 - t), importance (by their recent losses) or
    log-normal (log(sigma / alpha) is normal; for flow the times are logit-normal)."""
    offset_noise: Annotated[float, NON_NEGATIVE] = 0.0
    """Strength of an additional noise that is constant over each channel."""
    learn_logvar: bool = False
    """Learn a log-variance of the error at each timestep, and weight the loss by it."""
    ema_lengths: tuple[float, ...] = ()
    """Lengths of additional power-function averages. With two, such as 0.05 0.1, sample --ema-length can choose any."""
    lora_rank: Annotated[int, NON_NEGATIVE] = 0
    """Train updates of this rank of the weights of --init-from (LoRA), which are frozen; 0 trains all weights."""
    lora_targets: Targets = "attention"
    """Layers with such updates: attention, the projections of attention layers, or all convolutions and linear layers."""
    sample_steps: Annotated[int, AT_LEAST_1] = 50
    """Steps of the ancestral sampler for a preview. Its noise corrects a young network's errors, which DDIM keeps."""
    timestep_mean: float = 0.0
    """Mean of log(sigma / alpha), for log-normal timesteps: 0 for flow, -1.2 for edm."""
    timestep_std: Annotated[float, POSITIVE] = 1.0
    """Standard deviation of log(sigma / alpha), for log-normal timesteps: 1 for flow, 1.2 for edm."""
    consistency: tuple[Annotated[float, POSITIVE], ...] = ()
    """Tune --init-from to predict the end of its own path, for samples in one or two network calls: the stages of
    consistency tuning, of equal length, such as 2 3 4. Stage s makes the predictions at times t and (1 - 2^-s) t agree."""
    teacher_guidance: Annotated[float, NON_NEGATIVE] = 1.0
    """Guidance of that path, with the weights of --init-from."""
    teacher_guidance_interval: tuple[int, int] | None = None
    """First and last timestep at which that guidance is applied; by default all."""


@dataclass(frozen=True)
class ImageTrainConfig(DiffusionTrainConfig):
    """How a denoiser of images or latents is trained."""

    label_dropout: Annotated[float, FRACTION] = 0.1
    """Fraction of labels replaced by "no label", so that guidance has an unconditional network."""
    sample_guidance: Annotated[float, NON_NEGATIVE] = 1.0
    """Default guidance scale for previews, scores and the sample command: 1 is the plain conditional network."""
    sample_guidance_interval: tuple[int, int] | None = None
    """First and last timestep at which that guidance is applied; by default all."""
    score_every: Annotated[int, NON_NEGATIVE] = 0
    """Steps between two FID scores; the best checkpoint is kept. For gray 28 x 28 images only. 0 disables scoring."""
    score_num: Annotated[int, Bounds(Classifier.num_features + 1)] = 1000
    """Images in such a score, drawn with dpmpp_2m in 15 steps and compared with as many training images."""


@dataclass(frozen=True)
class Config:
    """A run: data + model + train, and what its kind adds. Each kind is a subclass; `kind` names it in config.json."""

    data: Any = field(default_factory=DataConfig)
    model: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: str | None = None
    """Run whose averaged weights a new run starts from: a folder, or a bundled model. Or a file of weights, ours, of CompVis
    or of diffusers: .safetensors, or .ckpt with PyTorch."""
    init_ema: bool = False
    """Take CompVis's moving averages (model_ema) from that file."""
    init_ignore: tuple[str, ...] = ()
    """Prefixes of names in that file to leave out."""
    init_partial: bool = False
    """Load the weights that fit, instead of all or none."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of convolutions and linear layers; weights, norms and softmax stay float32. fp16 scales the loss."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type["Config"]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kind:
            Config.kinds[cls.kind] = cls

    def task(self, data: Any = None) -> Any:
        """The `tasks.base.Task` that knows everything about this kind of run; `data` are arrays to train on."""
        raise NotImplementedError(f"{type(self).__name__} must define task()")

    def with_data(self, data: Any) -> tuple[Any, Any]:
        """The configuration for training data that a user passes to `train`, and the data as its task takes them."""
        raise UserError(f"runs of {self.kind} take no data from Python: leave out data")

    def check(self) -> None:
        """Refuse values out of range, or that do not fit each other: UserError names the flag, its value and what to do."""
        check_fields(self)
        if self.train.total_steps == 0 and not self.init_from:
            raise UserError("--train.total-steps is 0: it must be at least 1, except with --init-from")
        if not self.init_from and (self.init_ignore or self.init_partial or self.init_ema):
            raise UserError("--init-ignore, --init-partial and --init-ema apply to a file of weights: add --init-from")

    def to_record(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"version": len(MIGRATIONS), "kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(path: str | Path) -> "Config":
        """Read a run's config.json. Raises UserError if the file is missing or is no such record, or a value has another
        type or is out of its range."""
        try:
            return config_from_record(read_json(path))
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from e
        except ValueError as e:
            raise UserError(f"{path} is not the config.json of a run: {e}") from e


@dataclass(frozen=True)
class DiffusionRunConfig(Config):
    """What all runs of a denoiser share."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)

    def check(self) -> None:
        super().check()
        if self.train.lora_rank and not self.init_from:
            raise UserError(f"--train.lora-rank is {self.train.lora_rank}: it needs trained weights, add --init-from")
        if self.train.lora_rank and self.train.optimizer != "adam":
            raise UserError("--train.optimizer muon trains whole weights: leave out --train.lora-rank, or train with adam")
        if self.train.consistency and not self.init_from:
            raise UserError("--train.consistency needs a trained network: add --init-from")
        if self.train.consistency and (self.train.learn_logvar or getattr(self.model, "self_condition", False)):
            raise UserError(
                "--train.consistency works without --train.learn-logvar and --model.self-condition: leave them out"
            )
        (first, last), most = self.train.teacher_guidance_interval or (0, 0), self.diffusion.num_timesteps - 1
        if not 0 <= first <= last <= most:
            raise UserError(
                f"--train.teacher-guidance-interval is {first} {last}: give two timesteps in 0..{most}, the lower first"
            )
        for length in self.train.ema_lengths:
            try:
                power_of_length(length)
            except ValueError as e:
                raise UserError(f"--train.ema-lengths: {e}") from e
        steps, most = self.train.sample_steps, self.diffusion.num_timesteps
        if steps > most:
            raise UserError(f"--train.sample-steps is {steps}: choose at most {most}, the number of timesteps")


def config_from_record(record: Any) -> Config:
    """The configuration in a config.json, of this version or an older one. Raises ValueError if no kind has these fields, a
    value has another type or is out of its range, or the version is a newer one."""
    try:
        if problem := find_problem(record, dict[str, Any]):
            raise ValueError(problem)
        version = record.get("version", 0)
        if problem := find_problem(version, Annotated[int, NON_NEGATIVE]):
            raise ValueError(f"version is {version!r:.200}: {problem}")
        if version > len(MIGRATIONS):
            raise ValueError(
                f"it has version {version}, and this program reads up to {len(MIGRATIONS)}: update ms_diffusion"
            )
        for migrate in MIGRATIONS[version:]:
            record = migrate(record)
        kind, record = record.get("kind"), {key: value for key, value in record.items() if key not in ("version", "kind")}
        if kind not in list(Config.kinds):
            raise ValueError(f"unknown kind {kind!r:.200}: choose one of {', '.join(Config.kinds)}")
        if isinstance(process := record.get("diffusion"), dict) and process.get("betas_file"):
            raise ValueError("diffusion.betas_file names a file, where a run keeps the betas themselves")
        config = from_record(Config.kinds[kind], record)
        check_fields(config, "")
        return config
    except (UserError, RecursionError) as e:
        raise ValueError(str(e)) from e


def name_kind(record: dict[str, Any]) -> dict[str, Any]:
    """A record of version 0 as one of version 1: fields that had other names, and a `kind` where there is none, the first
    that has the model's fields; such a record has fields of all kinds."""
    record = {key: dict(value) if isinstance(value, dict) else value for key, value in record.items()}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(values := record.get(section), dict) and name in values:
            values[new.split(".")[1]] = values.pop(name)
    if "kind" in record:
        return record
    trains = [DiffusionTrainConfig, *(type(cls().train) for cls in Config.kinds.values())]
    obsolete = {"diffusion", *(f.name for cls in Config.kinds.values() for f in fields(cls))}
    obsolete |= {f"train.{f.name}" for train in trains for f in fields(train)}
    problems = []
    for cls in Config.kinds.values():
        try:
            return {"kind": cls.kind, **asdict(from_record(cls, record, obsolete))}
        except ValueError as e:
            problems.append(e)
    raise problems[0]


# What makes a record of version i one of version i + 1. A change that older records do not fit adds one
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (name_kind,)


def check_one_length(names: Iterable[str]) -> None:
    """Refuse two lengths of a run among the names of fields, or flags, that a user gives."""
    names = {name.split("=")[0].split(".")[-1].replace("-", "_") for name in names}
    if {"epochs", "total_steps"} <= names:
        raise UserError("--train.epochs and --train.total-steps both say how long to train: leave out one of them")


def override(config: Config, **values: Any) -> Config:
    """The configuration with other values: override(config, lr=1e-3, total_steps=100), or by section, {"data.size": 32}.
    A name without its section is looked for in train, then data, model, diffusion and the run's own fields. Raises UserError
    if no field has such a name."""
    sections = [name for name in ("train", "data", "model", "diffusion") if hasattr(config, name)]
    owners: dict[str, str] = {}
    for section in [*sections, ""]:
        for f in fields(getattr(config, section) if section else config):
            owners[f"{section}.{f.name}" if section else f.name] = section
            owners.setdefault(f.name, section)
    check_one_length(values)
    for name, value in values.items():
        name = RENAMED.get(name, name)
        if name not in owners:
            close = difflib.get_close_matches(name, owners, 1)
            raise UserError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
        section, last = owners[name], name.split(".")[-1]
        try:
            part: Any = replace(getattr(config, section) if section else config, **{last: as_value(value)})
        except TypeError as e:  # an earlier override has put something else in place of the section
            raise UserError(f"{name!r} cannot be set in {getattr(config, section)!r}") from e
        config = replace(config, **{section: part}) if section else part
    return config
