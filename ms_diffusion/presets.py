"""What a run is made of, and the table of named runs."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from .diffusion import DiffusionConfig
from .models.unet import UnetConfig
from .runtime import UserError


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


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    total_steps: int = 20000
    """Training steps."""
    batch_size: int = 128
    """Images a step, on each device."""
    lr: float = 1e-3
    """Peak learning rate of Adam, reached after the warm-up; then a cosine to 0."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """The global norm of the gradients is scaled down to this."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which samples are drawn from."""
    seed: int = 0
    """Seed of every random number of the run."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between two sample grids."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    sample_num: int = 64
    """Images in a grid."""
    sample_steps: int = 50
    """Steps of the ancestral sampler for a grid: its noise mends what a young network gets wrong, where DDIM keeps it."""


@dataclass(frozen=True)
class Config:
    """A run: data + diffusion + model + train."""

    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    model: UnetConfig = field(default_factory=UnetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of convolutions and linear layers; weights, norms and softmax stay float32. fp16 scales the loss."""

    def build(self):
        """The (network, diffusion) of this run.

        Raises:
            UserError: values that do not fit together.
        """
        multiple = self.model.size_multiple
        if self.data.size < multiple or self.data.size % multiple:
            fit = max(round(self.data.size / multiple), 1) * multiple
            raise UserError(
                f"image size {self.data.size} is not divisible by {multiple}, as the network needs: try --data.size {fit}"
            )
        for name in (
            "total_steps",
            "batch_size",
            "lr",
            "clip_norm",
            "log_every",
            "sample_every",
            "save_every",
            "keep_checkpoints",
        ):
            if not getattr(self.train, name) > 0:
                raise UserError(f"--train.{name.replace('_', '-')} is {getattr(self.train, name)}: it must be above 0")
        if not 0 <= self.train.ema_decay < 1 or self.train.warmup_steps < 0 or self.train.seed < 0:
            raise UserError("--train.ema-decay must be in [0, 1), --train.warmup-steps and --train.seed at least 0")
        if not 1 <= self.train.sample_steps <= self.diffusion.timesteps or self.train.sample_num < 1:
            raise UserError(f"--train.sample-steps must be in 1..{self.diffusion.timesteps}, --train.sample-num at least 1")
        try:
            return self.model.build(self.train.seed), self.diffusion.build()
        except ValueError as e:
            raise UserError(str(e)) from e

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, path) -> "Config":
        """Read a run's config.json.

        Raises:
            UserError: the file is missing or not such a record.
        """
        try:
            record = json.loads(Path(path).read_text())
            parts = {f.name: f.default_factory for f in fields(cls) if f.name != "precision"}
            for name, part in parts.items():
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in record[name].items()}
                record[name] = part(**values)
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not the config.json of a run: {e}") from e


# The seeds' networks and data; quick is sized for a few minutes on two CPU cores.
PRESETS = {
    "quick": Config(
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
    ),
    "fashion-mnist": Config(),
    "fashion-mnist-resnet": Config(model=UnetConfig(dim=32, use_convnext=False)),
}
