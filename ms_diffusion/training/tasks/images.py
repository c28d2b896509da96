"""What runs of pixels and of latents share: images, classes, previews and scores, and the grids of the sample command."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ... import images
from ...data.batches import CLASS_NAMES, DATASETS, ImageSet, check_images, check_labels, load_image_set, with_captions
from ...data.conditions import condition_image
from ...data.fashion_mnist import center_crop
from ...data.tokenizers import Tokenizer
from ...files import check_output, in_batches, write
from ...images import to_float
from ...metrics.distances import frechet_distance, mean_and_covariance
from ...metrics.features import Features
from ...metrics.scores import Reference, Samples
from ...models.classifier import Classifier
from ...progress import ProgressBar
from ...randomness import Random, Stream
from ...runtime import UserError, alone, ranks
from ...sampling import Sampling
from ..checkpoint import checkpoints
from ..runs import Run, is_run, open_run
from . import edits
from .base import Arrays, Request, Scored
from .diffusion import DiffusionTask
from .edits import Plan
from .labels import Nothing, keep, make_labelling, old_class_names, read_kept

GIF_FRAMES = 40
ROW_STEPS = 10


class ImageData:
    """What configurations of images share."""

    data: Any
    model: Any

    def with_data(self, data: Any) -> tuple[Any, ImageSet | None]:
        """The configuration for these training data, and the images, if they are given. `data` are the name of a data set, a
        folder of images, an array (N, H, W, C) uint8, (images, labels), or (images, captions), with a text or several for
        each image. Raises UserError if they are none of these."""
        config: Any = self
        if isinstance(data, str | Path):
            name = str(data)
            chosen = {"name": name} if name in DATASETS else {"name": "image-folder", "dir": name}
            return replace(config, data=replace(config.data, **chosen)), None
        pictures, labels = data if isinstance(data, tuple) else (data, np.zeros(len(data), np.int32))
        check_images(pictures := np.asarray(pictures))
        if len(labels) and isinstance(labels[0], str | list | tuple):
            image_set = with_captions(pictures, np.zeros(len(pictures), np.int32), list(labels))
        else:
            check_labels(labels := np.asarray(labels), len(pictures))
            image_set = ImageSet(pictures, labels.astype(np.int32))
        size, channels = pictures.shape[2:]
        data, model = replace(config.data, name="arrays", size=size), replace(config.model, channels=channels)
        return replace(config, data=data, model=model), image_set


class Images:
    """What tasks of images share, those of an autoencoder too."""

    config: Any
    given_data: Any
    choose_held: Callable[[int], np.ndarray]

    def load_data(self) -> tuple[np.ndarray, np.ndarray]:
        image_set = self.load_set("train")
        return image_set.images, image_set.labels

    def load_set(self, split: str) -> ImageSet:
        """The images of the run's data set, or those that training was given."""
        data = self.config.data
        if self.given_data is not None and split == "train":
            given = self.given_data
            return given if isinstance(given, ImageSet) else ImageSet(*given)
        return load_image_set(data.name, data.dir, split, *self.image_format(), **data.options())

    def held_images(self) -> ImageSet:
        """The test images that the loss of held-out data is of. Raises UserError if the data were given as arrays."""
        data = self.config.data
        if self.given_data is not None or data.name == "arrays":
            raise UserError("--train.validate-every needs a data set with test images, which arrays are not: set it to 0")
        if data.name == "image-folder" and not data.validation and ranks()[0] == 0:
            what = "no images are held back, so val_loss is of training images"
            print(f"note: {what}: set --data.validation to 0.1 or so", file=sys.stderr)
        image_set = self.load_set("test")
        return image_set.take(self.choose_held(len(image_set.images)))

    def image_format(self) -> tuple[int, int]:
        return self.config.data.size, self.config.model.channels

    def show(self, x: np.ndarray) -> Image.Image:
        return images.show_grid(x)


class DenoiseRow:
    """The x_0 that is predicted for the first `num` samples at ten of the steps, as a callback of a sampler."""

    def __init__(self, num: int, calls: int):
        self.num, self.picked, self.found = num, set(np.linspace(0, calls - 1, ROW_STEPS, dtype=int)), []

    def __call__(self, i: int, x: Any, x_start: Any) -> None:
        if i in self.picked and len(self.found) < len(self.picked):  # of the first batch
            self.found.append(x_start.asnumpy()[: self.num])

    def save(self, path: str | Path, decode: Callable[[np.ndarray], np.ndarray], size: int | None = None) -> None:
        """Write a grid, a row for each sample, decoded in batches of `size`."""
        save_rows(path, self.found, decode, size or len(self.found[0]))


def save_rows(path: str | Path, columns: list[np.ndarray], decode: Callable[[np.ndarray], np.ndarray], size: int) -> None:
    """Write a grid of x (N, ...) at several steps, a column each, decoded in batches of `size`. One rank calls this."""
    rows = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    with alone():
        shown = images.to_uint8(in_batches(lambda batch: [decode(batch)], rows, size)[0])
    images.save_grid(path, shown, len(columns))


class ImageTask(Images, DiffusionTask):
    """Images of a data set, perhaps with classes or captions, and perhaps conditioned on an image.

    The network sees x (N, *shape), which `encode` makes of images in [-1, 1], and `decode` images of it."""

    labelling: Nothing  # what the network is conditioned on beside images: classes or captions

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or of rows in the table of captions, that the network is conditioned on; None without."""
        return self.labelling.count

    def make_labelling(self, image_set: ImageSet | None = None) -> Nothing:
        """What the network is conditioned on, from what the run has kept, and from its images."""
        data, kept = self.config.data, read_kept(self.run_dir) if self.run_dir else {}
        if not kept and image_set and data.name == "image-folder" and self.run_dir and checkpoints(self.run_dir):
            kept = {"class_names": old_class_names(image_set)}
        return make_labelling(self.config.model, image_set, kept, CLASS_NAMES.get(data.name), self.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the run, or of the one that it starts from, whose network knows no other tokens; None without captions."""
        if "tokens" not in self.cond_fields:
            return None
        initial, kept = self.config.init_from, read_kept(self.run_dir).get("tokenizer") if self.run_dir else None
        return kept or (read_kept(open_run(initial, [])[0]).get("tokenizer") if is_run(initial) else None)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return (self.config.data.size,) * 2

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) in [-1, 1] -> x (N, *shape)."""
        return pictures

    def cond_image(self, pictures: np.ndarray, rng: Random) -> np.ndarray:
        """The image condition (B, k, H, W) of images (B, C, H, W) in [-1, 1], as it is shown."""
        return condition_image(self.config.data.condition, pictures, self.config.data.lowres_size, rng)

    def encode_condition(self, cond: np.ndarray) -> np.ndarray:
        """What `cond_image` returns, as the network takes it."""
        return cond

    def open(self, home: Path, state: dict[str, Any]) -> None:
        self.run_dir = home
        self.labelling = self.make_labelling()

    # Training

    def load_data(self) -> tuple[np.ndarray, np.ndarray]:
        image_set = self.load_set("train")
        self.labelling = self.make_labelling(image_set)
        return image_set.images, self.labelling.ids(image_set)

    def check_data(self) -> None:
        self.labelling.check_ids(self.labels)

    def keep_data(self) -> None:
        keep(self.run_dir, self.labelling)

    def prepare(self) -> None:
        train = self.config.train
        self.originals = self.data
        if train.score_every and (self.start_step < train.total_steps or (self.state or {}).get("unfinished")):
            if len(self.data) <= Classifier.num_features:
                raise UserError(f"{len(self.data)} images are too few for --train.score-every: leave it out")
            self.features = Features()
            chosen = np.random.default_rng(train.seed).permutation(len(self.data))[: train.score_num]
            self.reference = self.mean_and_covariance(self.data[chosen])
        self.prepare_data()
        if self.rank == 0:
            keep(self.run_dir, self.labelling)
        super().prepare()

    def held_out(self) -> "ImageTask":
        held, image_set = copy(self), self.held_images()
        held.labelling = self.make_labelling(image_set)
        held.data = held.originals = image_set.images
        held.labels = held.labelling.ids(image_set)
        return held

    def draw_labels(self, rng: Random, ids: np.ndarray) -> Arrays:
        """The class or caption of images, or none, by its name in a batch."""
        field, dropout = self.labelling.field, self.config.train.label_dropout
        return {field: self.labelling.draw(rng, ids, dropout)} if field else {}

    def test_images(self) -> np.ndarray:
        """The run's test images (N, H, W, C) uint8."""
        return self.load_set("test").images

    def prepare_data(self) -> None:
        """What the kind does to the data before training."""

    def mean_and_covariance(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return mean_and_covariance(self.features(center_crop(pictures))["features"])

    def preview(self, step: int, watch: Callable | None = None) -> Path:
        path = self.run_dir / "samples" / f"step-{step:07d}.png"
        x = self.draw(self.config.train.sample_num, watch=watch)
        if self.rank == 0:
            images.save_grid(path, images.to_uint8(x), columns=self.labelling.columns)
        return path

    def is_scored(self, step: int) -> bool:
        train = self.config.train
        return bool(train.score_every) and step > 0 and (step % train.score_every == 0 or step == train.total_steps)

    def score(self, step: int) -> float:
        train = self.config.train
        steps = min(15, self.diffusion.num_timesteps)
        quick = {} if train.consistency else {"sampler": "dpmpp_2m", "steps": steps}
        x = self.draw(train.score_num, replace(self.preview_sampling, **quick))
        if not np.isfinite(x).all():
            what = f"samples are not finite at step {step}"
            raise UserError(f"{what}: resume from the last checkpoint with a lower --train.lr")
        return frechet_distance(*self.mean_and_covariance(images.to_uint8(x)), *self.reference)

    # Samples

    def preview_conditions(self, num: int) -> Arrays:
        pictures = self.originals if "cond_image" in self.cond_fields else None
        return self.conditions(num, pictures=pictures, seed=self.preview_seed)

    @property
    def preview_seed(self) -> tuple[int, int]:
        """The seed of what previews hide of their images."""
        return self.config.train.seed, Stream.NOISE

    def conditions(self, num: int, labels: Any = None, prompt: Any = None, pictures: Any = None, seed: Any = 0) -> Arrays:
        if "cond_image" not in self.cond_fields:
            if pictures is not None:
                raise UserError("this run has no image condition, which --image needs: leave it out")
            return self.class_conditions(num, labels, prompt)
        originals = self.test_images()[:num] if pictures is None else pictures
        originals = to_float(originals[np.arange(num) % len(originals)])
        cond = self.encode_condition(self.cond_image(originals, np.random.default_rng(seed)))
        return self.class_conditions(num, labels, prompt) | {"cond_image": cond}

    def class_conditions(self, num: int, labels: Any = None, prompt: str | None = None) -> Arrays:
        """The class or caption of each sample."""
        if prompt is not None and labels is not None:
            raise UserError("choose one of --prompt and --class")
        field, rows = self.labelling.field, self.labelling.rows(num, labels, prompt)
        return {field: rows} if field else {}

    def no_conditions(self, num: int) -> Arrays:
        """No class or caption, for each sample."""
        field = self.labelling.field
        return {field: self.labelling.null_rows(num)} if field else {}

    def to_output(self, x: np.ndarray) -> np.ndarray:
        return images.to_uint8(x)

    def render(self, run: Run, request: Request, folder: Path) -> list[Path]:
        plan, (rank, world_size) = self.plan(run, request), ranks()
        out = Path(request.out or folder / "sample.png")
        if not rank:
            check_output(out, request.gif, request.denoise_row, request.npz)
        in_steps = bool(request.gif or request.denoise_row)  # these show the first batch as one rank draws it
        if rank and in_steps:
            return []
        sampling, calls = plan.sampling, len(plan.timesteps) * plan.calls_per_step
        frames, every = [], max(calls // GIF_FRAMES, 1)
        row = DenoiseRow(8, calls)
        size = (sampling.batch_size or run.generator.batch_size) * (1 if in_steps else world_size)
        bar = ProgressBar(total=-(-plan.num // size) * calls, unit="step", desc=sampling.sampler, disable=rank > 0)

        def watch(i: int, x: Any, x_start: Any) -> None:
            bar.update()
            if bar.n > calls:  # the first batch alone
                return
            if request.gif and (i % every == 0 or i == calls - 1):
                frame = self.decode(x.asnumpy())
                frames.append(images.to_uint8(plan.paste(frame) if i == calls - 1 else frame))
            if request.denoise_row:
                row(i, x, x_start)

        with alone() if in_steps else nullcontext():
            drawn = self.draw_plan(run, plan, watch)
            x = plan.paste(self.decode(drawn))
        bar.close()
        if rank:
            return []
        images.save_grid(out, images.to_uint8(plan.arrange(x)), plan.columns, plan.scale, plan.captions)
        if request.gif:
            images.save_gif(request.gif, frames, plan.gif_columns)
        if request.denoise_row:
            row.save(request.denoise_row, lambda x: plan.paste(self.decode(x)))
        if request.npz:
            arrays: dict[str, Any] = {"images": images.to_uint8(x), **self.codes(drawn)}
            if plan.labels is not None and plan.labels.max() < self.num_classes:
                arrays["labels"] = plan.labels
            write(request.npz, lambda f: np.savez_compressed(f, **arrays))
        return [out, *(Path(path) for path in (request.gif, request.denoise_row, request.npz) if path)]

    def draw_plan(self, run: Run, plan: Plan, callback: Callable | None = None) -> np.ndarray:
        """The samples of a plan, x (num, *shape)."""
        how = plan.start, plan.timesteps, plan.denoise, plan.sampler, plan.null
        return run.generator.draw(plan.sampling, plan.num, self.in_order(plan.cond), callback, *how)

    def plan(self, run: Run, request: Request) -> Plan:
        """How to draw a request. Raises UserError if the request does not fit the run."""
        return edits.plan(self, run, request)

    def plan_grid(self, run: Run, request: Request) -> Plan:
        sampling, num = request.sampling.resolve(self), request.num or 64
        plan = Plan(num, sampling, self.class_conditions(num, request.class_, request.prompt))
        plan.timesteps, plan.null = sampling.timesteps(run.diffusion), self.negative(request.negative_prompt, sampling)
        if request.prompt is None and self.labelling.field:
            plan.labels, columns = self.labelling.label_array(request.class_, num), self.labelling.columns
            if request.class_ is None and columns and num % columns == 0:
                plan.columns = plan.gif_columns = columns
            if request.class_ is None and (titles := self.labelling.titles(plan.labels)):
                plan.captions, plan.scale = titles, 3
        return plan

    def negative(self, prompt: str | None, sampling: Sampling) -> np.ndarray | None:
        """The row of the condition that guidance leads away from, in place of the null label."""
        if prompt is None:
            return None
        if sampling.guidance == 1:
            raise UserError("--negative-prompt needs --guidance above 1: add --guidance 3, for example")
        return self.labelling.rows(1, None, prompt)[0]

    # Scores

    def samples_to_score(self, run: Run, sampling: Sampling, num: int, reference: Reference) -> Scored:
        if "cond_image" in self.cond_fields:
            raise UserError(
                f"{run.name} is conditioned on images ({self.config.data.condition}): evaluate the .npz file that the "
                "sample command writes"
            )
        sampling = sampling.resolve(self, "dpmpp_2m", 20)
        batch_size = min(sampling.batch_size or 100, num)
        sampling = replace(sampling, batch_size=batch_size)
        timesteps, cond = sampling.timesteps(run.diffusion), self.in_order(self.conditions(num))
        rank, world_size = ranks()
        total = -(-num // (batch_size * world_size)) * len(timesteps)
        with ProgressBar(total=total, unit="step", desc=sampling.sampler, disable=rank > 0) as bar:
            x = self.decode(run.generator.draw(sampling, num, cond, lambda *_: bar.update()))
        if bad := num - np.isfinite(x).all((1, 2, 3)).sum():
            raise UserError(f"{bad} of {num} samples are not finite, so training has diverged: use an earlier checkpoint")
        made = f"{sampling.sampler}, {len(timesteps)} steps, guidance {sampling.guidance:g}"
        if sampling.guidance_interval:
            made += " from t = {} to {}".format(*sampling.guidance_interval)
        made = f"{run.name} at step {run.step}, {sampling.weights} weights; {made}, seed {sampling.seed}"
        labels = self.labelling.label_array(None, num)
        return Samples(images.to_uint8(x), labels, made), None


def check_scored(config: Any) -> None:
    """Refuse --train.score-every for images that the classifier does not take."""
    if config.train.score_every and not (
        config.data.name.startswith("fashion-mnist") or (config.model.channels, config.data.size) == (1, 28)
    ):
        raise UserError("--train.score-every is for gray images of 28 x 28 pixels: leave it out")


def check_image_size(size: int, multiple: int, flag: str) -> None:
    """Refuse sizes that the network would change."""
    if size < multiple or size % multiple:
        fit = max(round(size / multiple), 1) * multiple
        raise UserError(f"--{flag} is {size}: it must be divisible by {multiple} for this network, such as {fit}")
