"""Images in pixel space: the annotated U-Net, with classes, image conditions and edits."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.conditions import condition_channels, condition_image
from ...images import to_float
from ...models.unet import UnetConfig
from ...randomness import Random, Stream
from ...runtime import UserError
from ..config import DataConfig, DiffusionRunConfig, ImageTrainConfig
from ..runs import Run
from . import edits
from .base import Arrays, Request
from .images import ImageData, ImageTask, Plan, check_image_size, check_scored


@dataclass(frozen=True)
class PixelConfig(ImageData, DiffusionRunConfig):
    """A run of images in pixel space."""

    data: DataConfig = field(default_factory=DataConfig)
    model: UnetConfig = field(default_factory=UnetConfig)
    train: ImageTrainConfig = field(default_factory=ImageTrainConfig)

    kind = "pixels"

    def task(self, data: Any = None) -> "PixelTask":
        return PixelTask(self, data)

    def check(self) -> None:
        super().check()
        data, model = self.data, self.model
        check_image_size(data.size, model.size_multiple, "data.size")
        check_scored(self)
        needed = condition_channels(data.condition, model.channels)
        if model.cond_channels != needed:
            raise UserError(f"--data.condition {data.condition} has {needed} channels: set --model.cond-channels {needed}")
        if data.condition == "lowres" and (data.lowres_size > data.size or data.size % data.lowres_size):
            raise UserError(f"--data.lowres-size is {data.lowres_size}: it must divide the image size {data.size}")


class PixelTask(ImageTask):
    """A U-Net on images."""

    config: PixelConfig

    def __init__(self, config: PixelConfig, data: Any = None):
        super().__init__(config, data)
        model = config.model
        self.shape = (model.channels, config.data.size, config.data.size)
        self.null_label, self.self_condition = model.null_label, model.self_condition
        self.cond_fields, self.flip = model.cond_fields, config.data.flip

    def draw_conditions(self, rng: Random, batch: Arrays, labels: np.ndarray) -> Arrays:
        drawn = super().draw_conditions(rng, batch, labels) | self.draw_labels(rng, labels)
        if "cond_image" in self.cond_fields:
            drawn["cond_image"] = self.cond_image(batch["x_start"], rng)
        return drawn

    def cond_image(self, x: np.ndarray, rng: Random) -> np.ndarray:
        """The image condition (B, cond_channels, H, W) of images x (B, C, H, W)."""
        return condition_image(self.config.data.condition, x, self.config.data.lowres_size, rng)

    def preview_conditions(self, num: int) -> Arrays:
        pictures = self.originals if "cond_image" in self.cond_fields else None
        return self.conditions(num, pictures=pictures, seed=(self.config.train.seed, Stream.NOISE))

    def conditions(self, num: int, labels: Any = None, prompt: Any = None, pictures: Any = None, seed: Any = 0) -> Arrays:
        if "cond_image" not in self.cond_fields:
            return super().conditions(num, labels, prompt, pictures)
        originals = self.test_images()[:num] if pictures is None else pictures
        originals = to_float(originals[np.arange(num) % len(originals)])
        cond = {"cond_image": self.cond_image(originals, np.random.default_rng(seed))}
        return self.class_conditions(num, labels, prompt) | cond

    def plan(self, run: Run, request: Request) -> Plan:
        return edits.plan(self, run, request)

    def samples_to_score(self, run: Run, *args: Any) -> Any:
        if "cond_image" in self.cond_fields:
            raise UserError(
                f"{run.name} is conditioned on images ({self.config.data.condition}): evaluate the .npz file that the "
                "sample command writes"
            )
        return super().samples_to_score(run, *args)

    def likelihood_data(self, split: str) -> tuple[np.ndarray, Arrays]:
        if "cond_image" in self.cond_fields or self.self_condition:
            raise UserError("the likelihood is not defined for a network with an image condition or self-conditioning")
        image_set = self.load_set(split)
        labelling = self.make_labelling(image_set)
        ids = labelling.ids(image_set)
        return image_set.images, {labelling.field: labelling.rows(len(ids), ids)} if labelling.field else {}
