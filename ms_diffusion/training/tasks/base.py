"""What every kind of run has to know: one object, asked by the training loop, sampling, evaluation and likelihood.
`config.task()` makes it. Training, sampling and scoring never ask what kind a run is: they call these methods."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.amp import DynamicLossScaler

from ...convert import LoadReport, load_pretrained
from ...data.batches import check_enough, check_values, fingerprint, make_dataset
from ...metrics.scores import Reference, Samples
from ...models.layers import set_compute_type
from ...process import Process
from ...randomness import Random, Stream, of_step
from ...runtime import UserError, command, on_ascend, ranks
from ...sampling import Sampling
from ..checkpoint import Checkpoint, checkpoints, read_config, readable
from ..config import Config
from ..pack import Pack
from ..runs import Run, is_run, open_run
from ..step import EMA
from ..validation import Validation

Arrays = dict[str, np.ndarray]
Logged = dict[tuple[str, ...], Tensor]  # numbers (n,) to log, or one (), by their names
Scored = tuple[Samples, np.ndarray | None]  # images to score, and the originals of which they are reconstructions, or None


@dataclass
class Request:
    """The pictures that the sample command is asked for; its flags."""

    num: int | None = None
    """Number of images or points; by default 64 images, 8 of an edit, 10,000 points."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class to draw, by number or name; by default each class in turn, in columns."""
    prompt: str | None = None
    """Caption to draw, for a run trained on captions, such as "an ankle boot"; by default one of each class in turn."""
    negative_prompt: str | None = None
    """Caption to keep away from, with --prompt and --guidance above 1."""
    image: tuple[str, ...] = ()
    """IMAGEs to upscale, colorize or fill in, for a run with an image condition; by default its own test images."""
    inpaint: tuple[str, str] | None = None
    """MASK IMAGE: repaint what is white in the file MASK, or the left, right, top, bottom or center of the image."""
    resample: int = 1
    """RePaint for --inpaint, with --sampler ddpm: network calls per step. The paper uses 10; 1 is plain replacement."""
    interpolate: tuple[str, str] | None = None
    """IMAGE IMAGE: interpolate between two images through their noise."""
    init: str | None = None
    """IMAGE to start from (SDEdit); see --strength."""
    strength: float | None = None
    """How much noise is added before sampling, in (0, 1]; by default 0.6 for --init and 1 for --interpolate."""
    out: str | None = None
    """Path of the PNG grid; by default sample.png in the run's folder."""
    gif: str | None = None
    """Path of an animated GIF of the denoising."""
    denoise_row: str | None = None
    """Path of a PNG that shows, for the first 8 images, the predicted x_0 at ten of the steps, a row each."""
    npz: str | None = None
    """Path of an .npz file: `images`, uint8 (N, H, W, C), and `labels`, int32 (N,); or `points`, float32 (N, 2)."""

    @property
    def plain(self) -> bool:
        """Whether samples of a class are all that it asks for: no edit, no denoising to watch, no sampling of its own."""
        edits = self.image or self.inpaint or self.interpolate or self.init or self.gif or self.denoise_row
        plain = Sampling(self.sampling.seed, batch_size=self.sampling.batch_size, device=self.sampling.device)
        return not edits and (self.sampling == plain or self.sampling.sampler == "consistency")


class Task:
    """One kind of run: its data, networks, batches, step, previews and scores, and how a sample becomes a picture.
    `data` are training data given as an array, in place of the data set that the configuration names."""

    noun = "images"  # what one sample is called
    unit = "img"  # its abbreviation in the progress bar
    flip = False
    steps_per_call = 1
    packs: Sequence[Pack] = ()  # what is trained in buffers
    run_dir: Any = None  # the folder of the run, once there is one
    checkpoint: Checkpoint
    optimizer: nn.Optimizer
    ema: EMA
    validation: Validation

    def __init__(self, config: Config, data: np.ndarray | None = None):
        self.config, self.given_data = config, data

    # Networks

    def build(self) -> tuple[nn.Cell, Any]:
        """The network with its initial weights, and the process. Raises UserError if the values do not fit together."""
        self.config.check()
        try:
            return self.build_parts()
        except ValueError as e:
            raise UserError(str(e)) from e

    def build_parts(self) -> tuple[nn.Cell, Process | None]:
        return self.config.model.build(self.config.train.seed), None

    # Training

    def start(self, run_dir: Path, device: str = "CPU", rank: int = 0, world_size: int = 1) -> None:
        """Make everything that training needs, and restore the newest checkpoint, whose state goes into `.state`.
        Bad input is refused here, before anything is written."""
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        loaded = self.load_data() if self.config.train.epochs else None
        if loaded:
            self.set_length(len(loaded[0]))  # which the networks' optimizers have to know
        self.make_networks(device)
        self.data, self.labels = loaded or self.load_data()
        if rank == 0:
            check_values(self.data, self.noun)
        self.check_data()
        self.state = self.checkpoint.load_latest()
        self.note_other_data()
        self.keep_batch()
        check_enough(self.data, self.config.train.rows_per_step if self.config.train.total_steps else 1, world_size)
        self.prepare()
        train = self.config.train
        if train.validate_every and (self.start_step < train.total_steps or (self.state or {}).get("unfinished")):
            self.validation = self.make_validation()

    def note_other_data(self) -> None:
        """Say so where a run goes on with other data than it had, such as a folder in which images were added."""
        self.fingerprint = fingerprint(self.data, self.labels)
        known = self.state and self.state.get("data_sha256")
        if self.rank == 0 and known and known != self.fingerprint:
            then, now = self.state.get("data_num"), len(self.data)
            print(
                f"note: the training data are not those of step {self.start_step}: {then} {self.noun} then, {now} now; "
                "training goes on with those of now",
                file=sys.stderr,
            )

    def set_length(self, num: int) -> None:
        """Compute total_steps for --train.epochs passes over `num` data."""
        train, latest = self.config.train, next(reversed(readable(self.run_dir).values()), None)
        rows = self.kept_batch(latest) or train.rows_per_step * self.world_size
        steps = max(round(train.epochs * (num // rows)), 1)
        self.config = replace(self.config, train=replace(train, total_steps=steps))

    def kept_batch(self, state: dict[str, Any] | None) -> int | None:
        """The batch of all ranks that a run had, if the user has not changed --train.batch-size."""
        if not state or "world_size" not in state or state["config"]["train"]["batch_size"] != self.config.train.batch_size:
            return None
        return state["batch_size"] * state["world_size"]

    def keep_batch(self) -> None:
        """Where a run goes on with another number of ranks, and the user has not changed --train.batch-size, let the ranks
        share the batch that it had. Raises UserError if they cannot."""
        state, train = self.state, self.config.train
        if not state or not (total := self.kept_batch(state)):
            return
        before = state["world_size"]
        size, rest = divmod(total, self.world_size * train.accumulate)
        if rest:
            raise UserError(
                f"the batch of this run, {total}, cannot be divided by {self.world_size} ranks: choose another number of "
                "ranks, or another --train.batch-size"
            )
        if self.rank == 0 and before != self.world_size:
            print(f"{self.world_size} ranks instead of {before}: the batch is still {total}, {size} on each rank")
        self.config = replace(self.config, train=replace(train, batch_size=size))

    def make_networks(self, device: str) -> None:
        """Set `.checkpoint`, `.optimizer` and the compiled step."""
        raise NotImplementedError

    def load_data(self) -> tuple[np.ndarray, np.ndarray]:
        """Training data (N, ...) and labels (N,) int32."""
        raise NotImplementedError

    def check_data(self) -> None:
        """Refuse data that the network does not fit."""

    def prepare(self) -> None:
        """What can be made only when the data and the checkpoint are there."""

    def keep_data(self) -> None:
        """Write what a run needs beside its checkpoints and config.json."""

    @property
    def start_step(self) -> int:
        return self.state["step"] if self.state else 0

    def batches(self) -> Iterator[Arrays]:
        """The batches from the step after the checkpoint on: named arrays, drawn from (seed, stream, step) alone. Each is of
        `steps_per_call` steps, (steps_per_call, B, ...) where these are more than one."""
        train, count = self.config.train, self.steps_per_call
        if self.start_step >= train.total_steps:
            return
        options = (train.total_steps, self.start_step, train.seed, self.flip, self.rank, self.world_size)
        rows = make_dataset(self.data, self.labels, train.rows_per_step, *options, count)
        for i, (x, labels) in enumerate(rows.create_tuple_iterator(num_epochs=1, output_numpy=True)):
            step = self.start_step + i * count
            if count == 1:
                yield self.draw_batch(x, labels, step)
            else:
                drawn = [self.draw_batch(x[k], labels[k], step + k) for k in range(count)]
                yield {name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]}

    def random(self, step: int) -> Random:
        """The generator of a step's timesteps, noise and conditions."""
        train = self.config.train
        return of_step(train.seed, Stream.NOISE, step, train.rows_per_step, self.rank, self.world_size)

    def draw_batch(self, x: np.ndarray, labels: np.ndarray, step: int) -> Arrays:
        """What the compiled step takes, from data x (B, ...) and labels (B,)."""
        raise NotImplementedError

    def advance(self, batch: Arrays, step: int) -> tuple[Tensor, Tensor, Logged]:
        """Train on a batch of `batches`: loss (), gradient norm (), and other numbers to log."""
        raise NotImplementedError

    def write_back(self) -> None:
        """Set the parameters from the buffers in which they are trained, before anything else reads them."""
        for pack in self.packs:
            pack.write_back()

    def preview(self, step: int) -> Path:
        """Draw samples of the averaged network, all ranks together; returns the picture's path. Rank 0 writes it."""
        raise NotImplementedError

    def is_scored(self, step: int) -> bool:
        """Whether a score belongs to this step."""
        return False

    def score(self, step: int) -> float:
        """FID of a few samples, which all ranks draw together."""
        raise NotImplementedError

    def is_validated(self, step: int) -> bool:
        """Whether a loss of held-out data belongs to this step."""
        train = self.config.train
        return bool(train.validate_every) and step > 0 and (step % train.validate_every == 0 or step == train.total_steps)

    def make_validation(self) -> Validation:
        """The loss of held-out data."""
        raise NotImplementedError

    def validate(self, step: int) -> dict[str, float]:
        """The loss of held-out data with the weights and with their average, which all ranks compute together."""
        self.write_back()
        return {"val_loss": self.validation(self.ema.sources), "val_loss_ema": self.validation(self.ema.averages)}

    def choose_held(self, num: int) -> np.ndarray:
        """Which of `num` held-out samples the loss is of."""
        train = self.config.train
        return np.random.default_rng((train.seed, Stream.VALIDATION, 0)).permutation(num)[: train.validate_num]

    def checkpoint_record(self) -> dict[str, Any]:
        """Additional content of a checkpoint's state.json."""
        return {"data_num": len(self.data), "data_sha256": self.fingerprint}

    def next_commands(self) -> dict[str, str]:
        """What a user may do when training has ended: purpose -> command and arguments."""
        return {f"more {self.noun}": f"sample {self.run_dir}"}

    # Sampling from a trained run

    def open(self, home: Path, state: dict[str, Any]) -> None:
        """Load what a run keeps beside its weights: `home` is the run's folder, `state` its checkpoint's state.json."""

    def conditions(
        self, num: int, labels: Any = None, prompt: str | None = None, pictures: np.ndarray | None = None, seed: Any = 0
    ) -> Arrays:
        """What the network is conditioned on for `num` samples: arrays (num, ...) by the names in `cond_fields`.

        Args:
            labels: A class's number or name, or an array (num,) of numbers; by default each class in turn.
            prompt: A caption; by default one of each class in turn.
            pictures: Images (N, H, W, C) uint8 for an image condition; by default the run's test images.
            seed: A number or numbers, which draw what an image condition hides.

        Raises UserError if the network is not conditioned on one that is given."""
        for name, value in {"class": labels, "prompt": prompt, "image": pictures}.items():
            if value is not None:
                raise UserError(f"this run is not conditioned on anything that --{name} could set: leave it out")
        return {}

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Samples of the process -> samples of the data, floats."""
        return x

    def codes(self, x: np.ndarray) -> Arrays:
        """What else an .npz file keeps of samples of the process, arrays (num, ...)."""
        return {}

    def to_output(self, x: np.ndarray) -> np.ndarray:
        """What `decode` returns, as users keep it."""
        return x

    def show(self, x: np.ndarray) -> Image.Image:
        """A picture of samples as `to_output` returns them."""
        raise NotImplementedError

    def render(self, run: Run, request: Request, folder: Path) -> list[Path]:
        """Draw what the sample command is asked for; returns the files written, pictures first."""
        raise UserError(f"this run's {self.noun} cannot be drawn by the sample command")

    # Scores

    def image_format(self) -> tuple[int, int]:
        """Height and width, and number of channels, of the images that are scored."""
        raise UserError(f"this run's {self.noun} are scored by {command('sample')}, not by {command('evaluate')}")

    def samples_to_score(self, run: Run, sampling: Sampling, num: int, reference: Reference) -> Scored:
        """Images to score against `reference`."""
        raise NotImplementedError

    def likelihood_data(self, split: str) -> tuple[np.ndarray, Arrays]:
        """Images (N, H, W, C) uint8 of a split, and the network's conditions for them."""
        raise UserError(f"the likelihood is that of images in pixel space, and this run is one of {self.config.kind}")


def set_precision(precision: str, net: nn.Cell) -> DynamicLossScaler | None:
    """Compute the convolutions and linear layers of `net` in fp32, fp16 or bf16; returns the loss scaler that fp16 needs.
    Raises UserError for bf16 on other devices than Ascend."""
    if precision == "bf16" and not on_ascend():
        raise UserError("MindSpore has bf16 on Ascend alone: use --precision fp16 or fp32")
    set_compute_type(net, {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}[precision])
    return DynamicLossScaler(scale_value=2.0**16, scale_factor=2, scale_window=2000) if precision == "fp16" else None


def load_initial_weights(config: Config, run_dir: Path, net: nn.Cell) -> LoadReport | None:
    """Give the network of a new run the weights of --init-from and print a report; None without them, or for an old run."""
    if not config.init_from or checkpoints(run_dir):
        return None
    path, scale = Path(config.init_from), None
    if is_run(path):
        name = path.stem if path.is_file() else "ema"
        home, found = open_run(path, [name])
        path, scale = found.folder / f"{name}.safetensors", found.state.get("latent_scale")
        note_differences(config, read_config(home))
    report = load_pretrained(net, path, None, config.init_ignore, config.init_partial, config.init_ema)
    report = replace(report, scale_factor=scale or report.scale_factor)
    if ranks()[0] == 0:
        print(f"{config.init_from}: {report}")
    return report


def note_differences(config: Any, other: Any) -> None:
    """Say so where the run that a new one starts from had another process, or other options of the network."""
    changed = []
    for part in ("diffusion", "model"):
        ours, theirs = (asdict(getattr(each, part)) if hasattr(each, part) else {} for each in (config, other))
        names = [name for name in theirs if name in ours and ours[name] != theirs[name]]
        changed += [f"--{part}.{name.replace('_', '-')} {theirs[name]}" for name in names]
    if changed and ranks()[0] == 0:
        print(f"note: {config.init_from} was trained with {', '.join(changed)}, unlike this run", file=sys.stderr)
