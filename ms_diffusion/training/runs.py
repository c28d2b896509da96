"""Trained runs: where they are, how one is loaded, and what can be done with it in Python."""

import sys
from collections.abc import Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from ..convert import load_into
from ..fields import AT_LEAST_1, find_problem
from ..metrics.features import Features
from ..metrics.scores import Reference, halve
from ..runtime import UserError, command
from ..sampling import Generator, sampling_from
from .checkpoint import Intact, read_config, read_newest, read_state, read_weights, readable
from .step import average_after_training

SIGNS = ("checkpoints", "state.json")  # what is in a run's folder, or in that of a checkpoint
WEIGHTS = Path(__file__).parents[1] / "weights"
# Bundled models: for whatever is drawn, for plain samples in two network calls, and the best by its scores
DEFAULT, FAST, BEST = "fashion-mnist-large", "fashion-mnist-fast", "fashion-mnist-xlarge"


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def default_run(fast: bool = False) -> str:
    """The bundled model for whatever is drawn or, with `fast`, the one that draws in two network calls. Raises UserError if
    it is missing."""
    name = FAST if fast and FAST in bundled_models() else DEFAULT
    if name not in bundled_models():
        raise UserError("no run is given and no model is bundled with this package: give a run's folder, such as runs/quick")
    return name


def open_run(path: str | Path, names: Sequence[str] = ("ema",)) -> tuple[Path, Intact]:
    """The folder of a run, and its newest checkpoint of which the files with these names are intact, or the one that `path`
    is or holds a file of. A bundled model goes by its name; its folder is run and checkpoint in one. Nothing in the folder
    changes. Raises UserError if there is no such run, or it has no such checkpoint."""
    run = Path(path)
    if not run.exists() and str(run) in bundled_models():
        run = WEIGHTS / run
    if run.suffix == ".safetensors":
        run = run.parent
    if not run.is_dir():
        known = ", ".join(bundled_models())
        raise UserError(f"{run} is not a folder: give a run's folder, such as runs/quick, or a bundled model: {known}")
    if (run / "state.json").exists():
        state = read_state(run)
        found = Intact(run, state, {name: read_weights(run, name, state) for name in names})
        return run if (run / "config.json").exists() else run.resolve().parent.parent, found
    if not (found := read_newest(run, names)):
        raise UserError(f"{run} holds no checkpoint: train it first with {command('train')} --run-dir {run}")
    return run, found


def is_run(path: str | Path | None) -> bool:
    """Whether `path` is that of a run, of a checkpoint or of a file in one, or the name of a bundled model."""
    folder = Path(path or "")
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    return bool(path) and (str(path) in bundled_models() or any((folder / name).exists() for name in SIGNS))


def previews(run_dir: Path) -> dict[str, list[tuple[int, Path]]]:
    """The pictures that training has drawn: for each kind, such as "step" or "denoise-row", (step, path) in the order of the
    steps. One without a step in its name is of step 0."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in (run_dir / "samples").glob("*.png"):
        kind, _, step = path.stem.rpartition("-")
        kind, step = (kind, int(step)) if kind and step.isdecimal() else (path.stem, 0)
        kinds.setdefault(kind, []).append((step, path))
    return {kind: sorted(kinds[kind]) for kind in sorted(kinds)}


class Run:
    """A trained run: `md.load("runs/mine")`, or what `md.train` returns. Raises UserError if there is no such run, or it
    cannot be read, or it keeps no averages.

    Args:
        path: A run's folder, for its newest checkpoint; one of its checkpoints; or the name of a bundled model.
        weights: "ema", the moving average, or "model", as trained.
        ema_length: Use the average of this length instead, computed from those that the run's checkpoints keep
            (`average_after_training`).

    Attributes:
        net, diffusion: The network in evaluation mode and its process (None for an autoencoder).
        config, task, step: Its configuration, its kind, and the step of the checkpoint."""

    def __init__(self, path: str | Path, weights: str = "ema", ema_length: float | None = None):
        if not isinstance(path, str | Path) or not str(path).strip():
            raise UserError(f"the run is {path!r}: give a run's folder, or the name of a bundled model")
        self.name, (self.home, found) = str(path), open_run(path, [weights] if ema_length is None else [])
        if not (config := read_config(self.home)):
            raise UserError(f"{self.home} has no config.json: copy the whole run")
        self.config, self.step = config, found.state["step"]
        arrays = found.arrays[weights] if ema_length is None else self.average(ema_length)
        self.task: Any = self.config.task()
        self.net, self.diffusion = self.task.build()
        load_into(self.net, arrays)
        self.net.set_train(False)
        self.task.open(self.home, found.state)

    def average(self, length: float, without: Set[Path] = frozenset()) -> dict[str, np.ndarray]:
        """The weights' average of this length, from the averages in the run's checkpoints up to its step, but for those
        `without`. Raises UserError if the run keeps none, or the length is out of range."""
        if not (lengths := getattr(self.config.train, "ema_lengths", ())):
            raise UserError("this run keeps no averages for --ema-length: train with --train.ema-lengths 0.05 0.1")
        found = [(state["step"], folder) for folder, state in readable(self.home).items() if folder not in without]
        kept = [(step, each, folder) for step, folder in found if step <= self.step for each in lengths]
        if not kept:
            raise UserError("this run has no checkpoint with averages for --ema-length: leave it out")
        steps, lengths, folders = zip(*kept, strict=True)
        try:
            coefficients = average_after_training(steps, lengths, self.step, length)
        except ValueError as e:
            raise UserError(f"--ema-length: {e}") from e
        total: dict[str, Any] = {}
        for coefficient, each, folder in zip(coefficients, lengths, folders, strict=True):
            try:
                weights = read_weights(folder, f"ema-{each:g}")
            except UserError as e:
                if folder.exists():  # else the process that trains the run has deleted it meanwhile
                    print(f"warning: {e}; the average is made without it", file=sys.stderr)
                return self.average(length, without | {folder})
            for name, values in weights.items():
                total[name] = total.get(name, 0) + np.float32(coefficient) * values
        return total

    @cached_property
    def generator(self) -> Generator:
        """The network ready to draw; graphs are compiled once for all calls."""
        if self.diffusion is None:
            raise UserError(f"{self.name} is no diffusion model and draws no samples: evaluate it, or train on its latents")
        return self.task.generator(self.net, self.diffusion)

    def sample(self, num: int = 64, *, labels: Any = None, prompt: str | None = None, negative_prompt: str | None = None,
            pictures: np.ndarray | None = None, raw: bool = False, callback: Any = None,
            **options: Any) -> np.ndarray:  # fmt: skip
        """Draw `num` samples: images (num, H, W, C) uint8, or points (num, 2) in the data's units. Several ranks share the
        work: all of them call this, or one of them `runtime.alone`, and each gets all samples. Raises UserError if an
        option is unknown, out of range, or does not fit the run.

        Args:
            labels: A class's number or name, or (num,) of numbers; by default each class in turn.
            prompt: A caption, for a run of captions.
            negative_prompt: A caption to keep away from, with guidance above 1.
            pictures: Images (N, H, W, C) uint8 that an image condition is made of; by default test images.
            raw: Return floats, (num, C, H, W) in [-1, 1].
            callback: callback(i, x, x_start) after each step.
            options: Fields of `Sampling`: sampler, steps, seed, guidance, batch_size, ..."""
        if problem := find_problem(num, Annotated[int, AT_LEAST_1]):
            raise UserError(f"num is {num!r}: {problem}")
        generator = self.generator
        sampling = sampling_from(options).resolve(self.task)
        cond = self.task.conditions(num, labels, prompt, pictures, sampling.seed)
        null = {} if negative_prompt is None else {"null": self.task.negative(negative_prompt, sampling)}
        x = self.task.decode(generator.draw(sampling, num, self.task.in_order(cond), callback, **null))
        return x if raw else self.task.to_output(x)

    def evaluate(self, num: int = 10_000, *, against: str = "test", against_num: int | None = None,
            inception: str | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
        """Score `num` samples (or reconstructions) against real images: {"protocol", "samples", "floor", ...}. Raises
        UserError if the run has no images, or there are too few.

        Args:
            against: The split of real images, "test" or "train".
            against_num: How many of them; by default `num`.
            inception: File of InceptionV3's weights, to use its features in place of the bundled classifier's.
            options: Fields of `Sampling`; by default dpmpp_2m in 20 steps."""
        sampling = sampling_from(options)
        reference = self.reference(Features(inception), num, against, against_num)
        return reference.score(*self.task.samples_to_score(self, sampling, num, reference))

    def reference(self, features: Features, num: int, against: str = "test", against_num: int | None = None,
            name: str | None = None, folder: str | None = None) -> Reference:  # fmt: skip
        """The real images that this run's samples are scored against: its own data set, or the one of this name."""
        size, channels = self.task.image_format()
        data, arrays = self.config.data, self.task.given_data
        splits = halve(*arrays) if arrays is not None and name is None else None
        where = name or data.name, folder or data.dir
        return Reference(features, *where, size, channels, num, against, against_num, splits, options=data.options())

    def show(self, x: np.ndarray) -> Image.Image:
        """A picture of samples as `sample` returns them; a notebook displays it."""
        return self.task.show(x)
