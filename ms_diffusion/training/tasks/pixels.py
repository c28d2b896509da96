"""Images in pixel space: the annotated U-Net or a transformer, with classes, image conditions and edits."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.conditions import condition_channels
from ...models.dit import DiTConfig
from ...models.unet import UnetConfig
from ...randomness import Random
from ...runtime import UserError
from ..config import DataConfig, DiffusionRunConfig, ImageTrainConfig
from .base import Arrays
from .images import ImageData, ImageTask, check_image_size, check_scored


@dataclass(frozen=True)
class PixelConfig(ImageData, DiffusionRunConfig):
    """A run of images in pixel space."""

    data: DataConfig = field(default_factory=DataConfig)
    model: UnetConfig | DiTConfig = field(default_factory=UnetConfig)
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
    """A U-Net or a transformer on images."""

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

    def likelihood_data(self, split: str) -> tuple[np.ndarray, Arrays]:
        if "cond_image" in self.cond_fields or self.self_condition:
            raise UserError("the likelihood is not defined for a network with an image condition or self-conditioning")
        image_set = self.load_set(split)
        labelling = self.make_labelling(image_set)
        ids = labelling.ids(image_set)
        return image_set.images, {labelling.field: labelling.rows(len(ids), ids)} if labelling.field else {}
