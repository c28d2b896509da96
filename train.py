"""Train a diffusion model: python train.py --preset quick. The same command again goes on where a run stopped."""

from ms_diffusion import runtime

STOP = runtime.catch_interrupts() if __name__ == "__main__" else None  # must precede the import of MindSpore

# ruff: noqa: E402
import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from ms_diffusion import cli, draws, images, modelarts, plane
from ms_diffusion.checkpoint import Checkpoint, best_checkpoint, read_state
from ms_diffusion.data.conditions import condition_image
from ms_diffusion.data.pipeline import load_images, make_dataset
from ms_diffusion.data.toy import Frame, load_points, read_kept_points
from ms_diffusion.evaluation import frechet_distance, mean_and_covariance
from ms_diffusion.features import Features
from ms_diffusion.generation import Sampling
from ms_diffusion.models.classifier import Classifier
from ms_diffusion.models.layers import set_compute_type
from ms_diffusion.presets import PRESETS, Config
from ms_diffusion.runtime import DEVICES, UserError
from ms_diffusion.samplers import generate
from ms_diffusion.training import EMA, make_optimizer, make_train_step

STREAM_NOISE = 2  # of np.random.default_rng((seed, stream, rank, step)); the data pipeline has its own


@dataclass
class Args:
    """Train a diffusion model. The same command again goes on where a run stopped."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Literal[tuple(PRESETS)] = "quick"
    """The named run that the other flags change."""
    run_dir: str | None = None
    """Folder of the run; runs/PRESET if not given."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    data_url: str | None = None
    """ModelArts: folder of the data, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder that receives the run, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_args(argv=None) -> Args:
    """The command line over the preset that it names; in ModelArts, data_url and train_url become folders."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick", nargs="?")
    name = first.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    args = cli.parse(Args, Args(PRESETS[name], name), argv)
    if args.data_url:
        args.config = replace(args.config, data=replace(args.config.data, dir=str(modelarts.fetch(args.data_url))))
    args.run_dir = Path(args.run_dir or modelarts.output_folder(args.train_url) or f"runs/{args.preset}")
    return args


def check_run(run_dir: Path, config: Config) -> None:
    """Refuse a folder that holds another run: of its parts only the place of the data and the training may change."""

    def fixed(c: Config) -> dict:
        data = replace(c.data, dir=None)
        return {"model": c.model, "diffusion": c.diffusion, "data": data, "precision": c.precision, "seed": c.train.seed}

    record = run_dir / "config.json"
    if record.exists():
        old, new = fixed(Config.from_json(record)), fixed(config)
        for name in old:
            if old[name] != new[name]:
                raise UserError(
                    f"{run_dir} holds a run with another {name}: use another --run-dir, or the same command as then"
                )


def keep_points(path: Path, train: np.ndarray, test: np.ndarray) -> None:
    """Keep a run's points with it, for `sample.py`; refuse other points than those that it has."""
    if path.exists() and not all(map(np.array_equal, read_kept_points(path), (train, test))):
        raise UserError(f"the points are not those of the run in {path.parent}: use another --run-dir for them")
    images.write(path, lambda f: np.savez(f, train=train, test=test))


class Metrics:
    """metrics.jsonl: a line of numbers every `log_every` steps; lines after the resumed step are dropped."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows = path, []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a crash cut the last line
                    break
                if row["step"] <= start:
                    self.rows.append(row)
        images.write(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in self.rows).encode()))

    def append(self, **row) -> None:
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def draw(self, path: Path) -> None:
        steps, losses = ([row[key] for row in self.rows if "loss" in row] for key in ("step", "loss"))
        scores = [(row["step"], row["fid"]) for row in self.rows if "fid" in row]
        if steps:
            images.save_loss_curve(path, steps, losses, scores)


def main() -> int:
    args = parse_args()
    config, run_dir, train = args.config, args.run_dir, args.config.train
    device = runtime.set_device(args.device)
    rank, world_size = runtime.initialise_ranks()

    # Network, optimizer, and what a checkpoint restores
    net, diffusion = config.build()
    sampling = Sampling(sampler="ddpm", steps=train.sample_steps)
    sampling.settle(config, diffusion.T)
    loss_scaler = None
    if config.precision != "fp32":
        if config.precision == "bf16" and device == "CPU":
            raise UserError("MindSpore has no bf16 on the CPU: use --precision fp16 or fp32")
        set_compute_type(net, {"fp16": ms.float16, "bf16": ms.bfloat16}[config.precision])
        if config.precision == "fp16":
            loss_scaler = ms.amp.DynamicLossScaler(scale_value=2.0**16, scale_factor=2, scale_window=2000)
    ema, more_emas = EMA(net, train.ema_decay), [EMA(net, length=length) for length in train.ema_lengths]
    logvar = Parameter(Tensor(np.zeros(diffusion.T, np.float32)), name="logvar") if train.learn_logvar else None
    more = [logvar] if train.learn_logvar else []
    optimizer = make_optimizer(net, train.lr, train.warmup_steps, train.total_steps, more, train.lr_decay)
    importance = draws.ImportanceTimesteps(diffusion.T) if train.timesteps == "importance" else None
    others = importance.parameters if importance else []
    checkpoint = Checkpoint(run_dir, net, optimizer, ema, loss_scaler, train.keep_checkpoints, others, more_emas)

    # Data, and the step to go on from
    classes = config.model.num_classes
    if config.is_points:
        points, test_points = load_points(config.data.name, config.data.dir, config.data.num, train.seed)
        frame = Frame.of(points)
        data, labels = frame.to_unit(points), np.zeros(len(points), np.int32)
    else:
        data, labels = load_images(config.data.name, config.data.dir, "train", config.data.size, config.model.channels)
    if classes is not None and labels.max() >= classes:
        raise UserError(f"the data has labels up to {labels.max()}: set --model.num-classes {labels.max() + 1}")
    if train.score_every and len(data) <= Classifier.num_features:
        raise UserError(f"{len(data)} images are too few for --train.score-every: leave it out")
    check_run(run_dir, config)
    state = checkpoint.load_latest()
    start = state["step"] if state else 0
    if start:
        print(f"resuming at step {start} of {train.total_steps} in {run_dir}")
    batches, per_call = (), 1
    if not (importance or more_emas or loss_scaler):  # these need the host, or a graph of their own, after each step
        every = (train.total_steps, train.log_every, train.sample_every, train.save_every, train.score_every)
        per_call = math.gcd(train.steps_per_call, *every, start)
    if start < train.total_steps:
        batches = make_dataset(
            data,
            labels,
            train.batch_size,
            train.total_steps,
            start,
            train.seed,
            config.data.flip,
            rank,
            world_size,
            per_call,
        ).create_tuple_iterator(num_epochs=1, output_numpy=True)
    if config.is_points:
        keep_points(run_dir / "points.npz", points, test_points)
    images.write(run_dir / "config.json", lambda f: f.write(config.to_json().encode()))
    steps_per_epoch = len(data) // (train.batch_size * world_size)
    metrics = Metrics(run_dir / "metrics.jsonl", start) if rank == 0 else None

    # What a step draws, all of it from (seed, rank, step); nothing that it does not need, for each input costs time
    def draw_batch(x_start, labels, step: int):
        rng = np.random.default_rng((train.seed, STREAM_NOISE, rank, step))
        n, more = train.batch_size, []
        if importance:
            t, weights = importance.draw(rng, n)
            more.append(weights)
        elif train.timesteps == "antithetic":
            t = draws.antithetic_timesteps(rng, diffusion.T, n)
        else:
            t = draws.uniform_timesteps(rng, diffusion.T, n)
        noise = draws.offset_noise(rng, x_start.shape, train.offset_noise)
        if config.model.self_condition:
            more.append(rng.integers(0, 2, n).astype(np.float32))
        if classes is not None:
            more.append(draws.drop_labels(rng, labels, train.label_dropout, classes))
        if config.data.condition != "none":
            more.append(condition_image(config.data.condition, x_start, config.data.lowres_size, rng))
        return [x_start, t, noise, *more]

    # The compiled step, and the sampler that draws the grids
    def loss_fn(x_start, t, noise, *more):
        weights, more = (more[0], more[1:]) if importance else (None, more)
        remembers, cond = (more[0], more[1:]) if config.model.self_condition else (None, more)
        losses = diffusion.losses(net, x_start, t, noise, cond, logvar, remembers)
        return (ops.mean(weights * losses), losses) if importance else ops.mean(losses)

    train_step = make_train_step(
        loss_fn, optimizer, ema, train.clip_norm, loss_scaler, world_size, importance is not None, more_emas, per_call
    )
    denoise = sampling.make_denoiser(ema.net, diffusion, classes)

    def conditions(num: int) -> list[np.ndarray]:
        """Each class in turn, and the first images' conditions."""
        cond = []
        if classes is not None:
            cond.append(np.arange(num, dtype=np.int32) % classes)
        if config.data.condition != "none":
            originals = images.to_float(data[np.arange(num) % len(data)])
            rng = np.random.default_rng((train.seed, STREAM_NOISE))
            cond.append(condition_image(config.data.condition, originals, config.data.lowres_size, rng))
        return cond

    def draw(sampling: Sampling, num: int, batch_size: int = 64) -> np.ndarray:
        """`num` samples (num, ...) of the average."""
        sampler, timesteps = sampling.make_sampler(config.model.self_condition), sampling.timesteps(diffusion)
        cond = conditions(num)
        return generate(sampler, denoise, diffusion, timesteps, config.shape, num, train.seed, batch_size, cond=cond)

    def draw_samples(step: int) -> Path:
        """A grid of samples. Points beside the data."""
        path, num = run_dir / "samples" / f"step-{step:07d}.png", train.sample_num
        x = draw(sampling, num, num if config.is_points else 64)
        if config.is_points:
            plane.save_samples(path, frame.to_points(x), test_points[:num], f"step {step}")
        else:
            images.save_grid(path, images.to_uint8(x), columns=classes)
        return path

    scored = train.score_every and rank == 0 and start < train.total_steps
    if scored:
        features, chosen = Features(), np.random.default_rng(train.seed).permutation(len(data))[: train.score_num]
        reference = mean_and_covariance(features(data[chosen])["features"])

    def score(step: int) -> float:
        """The FID of a few images of the average."""
        x = draw(replace(sampling, sampler="dpmpp_2m", steps=min(15, diffusion.T)), train.score_num)
        if not np.isfinite(x).all():
            raise UserError(
                f"samples are not finite at step {step}: resume with a lower --train.lr from the last checkpoint"
            )
        fid = frechet_distance(*mean_and_covariance(features(images.to_uint8(x))["features"]), *reference)
        metrics.append(step=step, fid=fid)
        return fid

    def save(step: int, fid: float | None = None) -> None:
        if rank == 0:
            record = json.loads(config.to_json())
            checkpoint.save(step, epoch=step // steps_per_epoch, seed=train.seed, fid=fid, config=record)
            metrics.draw(run_dir / "loss.png")
            modelarts.publish(run_dir, args.train_url)

    # Train
    step, losses, last_grid, clock = start, [], None, time.perf_counter()
    rates = optimizer.learning_rate(Tensor(np.arange(train.total_steps, dtype=np.int32))).asnumpy()
    bar = tqdm(total=train.total_steps, initial=start, unit="step", disable=rank > 0, dynamic_ncols=True)
    bar.set_postfix_str("compiling" if batches else "finished")
    for x_start, label in batches:
        if per_call == 1:
            batch = draw_batch(x_start, label, step)
        else:
            drawn = [draw_batch(x_start[k], label[k], step + k) for k in range(per_call)]
            batch = [np.stack(values) for values in zip(*drawn, strict=True)]
        loss, norm, *aux = train_step(*map(Tensor, batch))
        losses.append(loss)
        if importance:
            importance.update(batch[1], aux[0].asnumpy())
        step += per_call
        bar.update(per_call)
        if step % train.log_every == 0 or step == train.total_steps or STOP.is_set():
            mean = float(np.mean([value.asnumpy() for value in losses]))
            rate = len(losses) * per_call * train.batch_size * world_size / (time.perf_counter() - clock)
            if not np.isfinite(mean):
                raise UserError(
                    f"the loss is {mean} at step {step}: resume with a lower --train.lr from the last checkpoint"
                )
            bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} {'points' if config.is_points else 'img'}/s")
            if rank == 0:
                metrics.append(
                    step=step,
                    loss=mean,
                    grad_norm=float(norm.asnumpy()),
                    lr=float(rates[step - 1]),
                    img_per_s=rate,
                    epoch=step / steps_per_epoch,
                )
            losses, clock = [], time.perf_counter()
        if STOP.is_set():
            break
        if rank == 0 and (step % train.sample_every == 0 or step == train.total_steps):
            bar.set_postfix_str("sampling")
            last_grid = draw_samples(step)
            clock = time.perf_counter()
        fid, is_best = None, False
        if scored and (step % train.score_every == 0 or step == train.total_steps):
            bar.set_postfix_str("scoring")
            fid, best = score(step), best_checkpoint(run_dir)
            is_best = best is None or fid < read_state(best)["fid"]
            clock = time.perf_counter()
        if step % train.save_every == 0 or step == train.total_steps or is_best:
            save(step, fid)
            clock = time.perf_counter()
    bar.close()

    if STOP.is_set():
        if step > start:
            save(step)
        if rank == 0:
            command = shlex.join(["python", *sys.argv])
            print(f"stopped at step {step} of {train.total_steps}, all saved. To go on: {command}")
        return 130
    if rank == 0:
        if start >= train.total_steps:
            print(f"{run_dir} is finished: raise --train.total-steps to train on, or choose another --run-dir for a new run")
        last_grid = last_grid or draw_samples(step)
        modelarts.publish(run_dir, args.train_url)
        best = best_checkpoint(run_dir)
        if best:
            print(f"best FID    {read_state(best)['fid']:.2f}, in {best}")
        print(f"samples     {last_grid}\nloss curve  {run_dir / 'loss.png'}\nmetrics     {run_dir / 'metrics.jsonl'}")
        print(f"{'pictures, scores' if config.is_points else 'more images'}: python sample.py {run_dir}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
