"""Points in the plane: a network that learns in seconds, and pictures of the whole way from noise to data."""

from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from mindspore import Tensor

from ... import plots2d
from ...data.points import POINTS_FILE, TOYS, Normalizer, load_points, read_saved_points
from ...fields import AT_LEAST_1, POSITIVE, OneOf
from ...files import check_output, write, write_json
from ...metrics.distances import compare
from ...models.mlp import MLPConfig, ResidualMLPConfig
from ...progress import ProgressBar
from ...runtime import UserError, alone, initialise_ranks
from ...samplers import SAMPLERS, SeededNoise, sampling_timesteps
from ..config import DiffusionRunConfig, DiffusionTrainConfig
from ..runs import Run
from .base import Request
from .diffusion import DiffusionTask

GIF_FRAMES = 40
PANELS = 10
PICTURES = ("forward", "reverse", "score", "trajectories")  # in the run's folder, beside the samples
SHOWN = 2000  # points in a panel


@dataclass(frozen=True)
class PointsDataConfig:
    """The points in the plane to train on."""

    name: Annotated[str, OneOf(TOYS, (POINTS_FILE,))] = "scurve"
    """A toy distribution, or points-file for your own points."""
    dir: str | None = None
    """The points-file: .npy or .csv with two columns, or a folder that holds one such file."""
    num: Annotated[int, AT_LEAST_1] = 10_000
    """Number of points drawn for training; not used for a points-file."""
    scale: Annotated[float, POSITIVE] | None = None
    """Divide the points by this for the network; by default their range is mapped to [-1, 1]."""


@dataclass(frozen=True)
class PointsConfig(DiffusionRunConfig):
    """A run of points in the plane."""

    data: PointsDataConfig = field(default_factory=PointsDataConfig)
    model: MLPConfig | ResidualMLPConfig = field(default_factory=ResidualMLPConfig)
    train: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)

    kind = "points"

    def task(self, data: Any = None) -> "PointsTask":
        return PointsTask(self, data)

    def with_data(self, data: Any) -> tuple["PointsConfig", np.ndarray | None]:
        """The configuration for these points, and the array, if it is one. `data` are the name of a toy distribution, a
        file of points, or an array (N, 2)."""
        if isinstance(data, str | Path):
            chosen = {"name": str(data)} if str(data) in TOYS else {"name": POINTS_FILE, "dir": str(data)}
            return replace(self, data=replace(self.data, **chosen)), None
        return replace(self, data=replace(self.data, name=POINTS_FILE)), np.asarray(data)

    def check(self) -> None:
        super().check()
        found, needed = self.model.num_embeddings, self.diffusion.num_timesteps
        if found < needed:
            raise UserError(f"--model.num-embeddings is {found}: set it to {needed} or more, the number of timesteps")


class PointsTask(DiffusionTask):
    """An MLP on points (N, 2)."""

    config: PointsConfig
    noun = unit = "points"
    shape = (2,)

    def load_data(self) -> tuple[np.ndarray, np.ndarray]:
        data = self.config.data
        source = data.dir if self.given_data is None else self.given_data
        self.points = load_points(data.name, source, data.num, self.config.train.seed)
        train, self.test = self.points
        self.normalizer = Normalizer.of(train, data.scale)
        return self.normalizer.normalize(train), np.zeros(len(train), np.int32)

    def held_out(self) -> "PointsTask":
        held, x = copy(self), self.normalizer.normalize(self.test)
        held.data = x[self.choose_held(len(x))]
        held.labels = np.zeros(len(held.data), np.int32)
        return held

    def prepare(self) -> None:
        """Keep the points with the run, and refuse other points than those that it has."""
        path = self.run_dir / "points.npz"
        if path.exists() and not all(map(np.array_equal, read_saved_points(path), self.points)):
            raise UserError(f"{path} holds other points than these: use another --run-dir for them")
        if self.rank == 0:
            self.keep_data()
        super().prepare()

    def keep_data(self) -> None:
        write(self.run_dir / "points.npz", partial(np.savez, train=self.points[0], test=self.points[1]))

    def preview(self, step: int) -> Path:
        num, path = self.config.train.sample_num, self.run_dir / "samples" / f"step-{step:07d}.png"
        x = self.draw(num, batch_size=num)
        if self.rank == 0:
            plots2d.save_samples(path, x, self.test[:num], f"step {step}")
        return path

    def next_commands(self) -> dict[str, str]:
        return {"pictures, scores": f"sample {self.run_dir}"}

    def open(self, home: Path, state: dict[str, Any]) -> None:
        train, self.test = read_saved_points(home / "points.npz")
        self.normalizer = Normalizer.of(train, self.config.data.scale)

    def decode(self, x: np.ndarray) -> np.ndarray:
        return self.normalizer.denormalize(x)

    def show(self, x: np.ndarray) -> Image.Image:
        return plots2d.points_image(x, self.test[: len(x)])

    @alone()
    def render(self, run: Run, request: Request, folder: Path) -> list[Path]:
        """Samples, all pictures of the way there and back, and scores against held-out data."""
        if initialise_ranks()[0]:
            return []  # points are few: rank 0 draws them
        names = "class_", "prompt", "image", "inpaint", "resample", "interpolate", "init", "strength", "denoise_row"
        for name in names:
            if getattr(request, name) != getattr(Request, name):
                flag = name.strip("_").replace("_", "-")
                raise UserError(f"--{flag} works on images, and this run draws points in the plane: leave it out")
        num, sampling = request.num or 10_000, request.sampling.resolve(self)
        sampling = replace(sampling, batch_size=sampling.batch_size or num)
        diffusion, data, timesteps = run.diffusion, self.test, sampling.timesteps(run.diffusion)
        out, gif = Path(request.out or folder / "sample.png"), Path(request.gif or folder / "denoise.gif")
        pictures, report = [folder / f"{name}.png" for name in PICTURES], folder / "scores.json"
        check_output(out, gif, request.npz, report, *pictures)

        def draw(sampler: Any, timesteps: list[int], n: int) -> tuple[np.ndarray, np.ndarray]:
            """Points (n, 2), and the paths of those of the first batch, (steps + 1, B, 2), in the data's units."""
            size, calls = min(sampling.batch_size or n, n), len(timesteps)
            path = [SeededNoise(sampling.seed, range(size))((2,))]
            bar = ProgressBar(total=-(-n // size) * calls, unit="step", desc=f"{n} points")

            def watch(i: int, x: Any, x_start: Any) -> None:
                bar.update()
                if len(path) <= calls:
                    path.append(x.asnumpy())

            x = run.generator.draw(sampling, n, (), watch, timesteps=timesteps, sampler=sampler)
            bar.close()
            return self.decode(x), self.decode(np.stack(path))

        samples, path = draw(sampling.make_sampler(), timesteps, num)
        title = f"{sampling.sampler}, {len(timesteps)} steps"
        plots2d.save_samples(out, samples, data[:num], title)
        names = [*(f"t = {t}" for t in timesteps), "x_0"]
        panels = np.linspace(0, len(path) - 1, PANELS).round().astype(int)
        plots2d.save_panels(folder / "reverse.png", [path[i][:SHOWN] for i in panels], [names[i] for i in panels])
        frames = np.linspace(0, len(path) - 1, min(len(path), GIF_FRAMES)).round().astype(int)
        plots2d.save_points_gif(gif, [path[i][:SHOWN] for i in frames], data[:SHOWN], [names[i] for i in frames])
        self.draw_fields(run, sampling.seed, folder)
        few = sampling_timesteps(diffusion.num_timesteps, min(50, diffusion.num_timesteps))  # more would hide ddpm's zigzag
        paths = {f"{name}, {len(few)} steps": draw(SAMPLERS[name], few, 8)[1] for name in ("ddpm", "ddim")}
        plots2d.save_trajectories(folder / "trajectories.png", paths, data[:SHOWN])

        written = [out, gif, *pictures]
        if request.npz:
            write(request.npz, lambda f: np.savez_compressed(f, points=samples))
            written.append(Path(request.npz))
        try:
            distances = compare(samples, data, np.random.default_rng(sampling.seed))
        except ValueError as e:
            print(f"no score: {e}")
            report.unlink(missing_ok=True)  # it would be of other points
            return written
        print(f"{title}: distance of {num} points from held-out data, and of such data from each other")
        for name, d in distances.items():
            print(f"  {name:18} {d['score']:8.4f}   data {d['floor']:8.4f}, at most {d['floor_most']:8.4f}")
        record = {"sampler": sampling.sampler, "steps": len(timesteps), "num": num, **distances}
        write_json(report, record)
        return [*written, report]

    def draw_fields(self, run: Run, seed: int, folder: Path) -> None:
        """forward.png, the data noised at ten times, and score.png, density and score at these times."""
        diffusion, x_test = run.diffusion, self.normalizer.normalize(self.test[:SHOWN])
        ts = np.linspace(0, diffusion.num_timesteps - 1, PANELS).round().astype(int)
        noise = np.random.default_rng(seed).standard_normal(x_test.shape, np.float32)
        alphas, sigmas = (table[ts, None, None] for table in (diffusion.alphas, diffusion.sigmas))
        noised = alphas * x_test + sigmas * noise  # (10, n, 2)
        titles = [f"t = {t}" for t in ts]
        plots2d.save_panels(folder / "forward.png", [self.decode(x) for x in noised], titles)
        # score = (alpha x_0 - x) / sigma^2; the axes are those of a third of the way: later is only noise
        limits = plots2d.limits(noised[3])
        grid, denoise = plots2d.grid_points(limits), run.generator.raw_denoiser(clip=False)
        x_start = np.stack([denoise(Tensor(grid), int(t)).asnumpy() for t in ts])
        scores = (alphas * x_start - grid) / sigmas**2 / self.normalizer.scale
        fields = [(self.decode(x), self.decode(grid), score) for x, score in zip(noised, scores, strict=True)]
        x, y = self.decode(np.transpose(limits)).T.tolist()
        plots2d.save_score_field(folder / "score.png", fields, titles, bounds=(tuple(x), tuple(y)))
