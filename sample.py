"""Draw samples from a run: python sample.py runs/quick --num 64 --out grid.png --gif denoise.gif."""

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from ms_diffusion import images, runtime
from ms_diffusion.commands import modelarts
from ms_diffusion.commands import parse as cli
from ms_diffusion.data.batches import load_images
from ms_diffusion.data.captions import NAMES, tokens
from ms_diffusion.data.conditions import condition_image
from ms_diffusion.data.fashion_mnist import CLASSES
from ms_diffusion.data.image_folder import read_image
from ms_diffusion.data.points import Normalizer, read_saved_points
from ms_diffusion.denoiser import inpaint, make_denoiser, self_conditioned, with_self_conditioning
from ms_diffusion.editing import invert_ddim, sample_repaint, slerp
from ms_diffusion.metrics.distances import compare
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import SAMPLERS, SeededNoise, generate, sampling_timesteps
from ms_diffusion.sampling import Sampling
from ms_diffusion.training.presets import WEIGHTS, bundled_models, default_run, first_stage_of, load_run, run_folders

GIF_FRAMES = 40


@dataclass
class Args:
    """Draw samples from a trained run, or edit images with it.

    IMAGE is a file, or test:N, the run's own test image N. A run of points gets all its pictures and scores.
    """

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder, or one of its checkpoints, or the name of a model that comes with the package: see --list."""
    num: int | None = None
    """How many images or points; if not given 64 images, 8 of an edit, 10,000 points."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """The class to draw; if not given each in turn, in columns."""
    prompt: str | None = None
    """The caption to draw, for a run that was told captions: "an ankle boot"; if not given one of each class in turn."""
    image: tuple[str, ...] = ()
    """IMAGEs to upscale, colour or fill in, for a run with a condition; its own test images if not given."""
    inpaint: tuple[str, str] | None = None
    """MASK IMAGE: what is white in the file MASK, or its left, right, top, bottom or center half, is painted anew."""
    resample: int = 1
    """RePaint for --inpaint, with ddpm's steps: 10 is the paper's, for 10 times the network calls; 1 is plain replacing."""
    interpolate: tuple[str, str] | None = None
    """IMAGE IMAGE to go between, through their noises."""
    init: str | None = None
    """IMAGE to begin from (SDEdit): see --strength."""
    strength: float | None = None
    """How far to go back into noise, in (0, 1]; 0.6 for --init and 1 for --interpolate if not given."""
    out: str | None = None
    """PNG grid; sample.png in the run's folder if not given."""
    gif: str | None = None
    """Animated GIF of the denoising."""
    denoise_row: str | None = None
    """PNG with a row for each of the first 8 images: what the network takes it for, x_0, at ten of the steps."""
    npz: str | None = None
    """Raw images: array `images`, uint8 (N, H, W, C), and `labels`, int32 (N,), of classes; or `points`, float32 (N, 2)."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Say what models come with the package, and how good they are."""
    data_url: str | None = None
    """ModelArts: the run's folder, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder for the results, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def check(args: Args, config, T: int) -> None:
    """Refuse what does not fit together, or not to the run."""
    edits = [name for name in ("inpaint", "interpolate", "init") if getattr(args, name)]
    classes, dropout = config.model.num_classes, config.train.label_dropout
    if config.is_autoencoder:
        raise UserError("this run is an autoencoder's: python -m ms_diffusion.evaluate scores it, --preset latent uses it")
    if config.is_latent and (edits or args.image):
        raise UserError(f"this run is of latents, and --{(edits or ['image'])[0]} works on pixels: leave it out")
    if args.prompt is not None and not config.is_text:
        raise UserError("this run was told no captions, which --prompt needs: train --preset latent-text")
    if args.prompt is not None and args.class_ is not None:
        raise UserError("choose one of --prompt and --class")
    if config.is_points and (edits or args.image or args.denoise_row):
        flag = (edits or (["image"] if args.image else ["denoise-row"]))[0]
        raise UserError(f"this run is of points in the plane, and --{flag} of images: leave it out")
    if args.sampling.guidance is None and (args.interpolate or (edits and args.class_ is None)):
        args.sampling.guidance = 1.0  # a guided inversion does not lead back, and without a class there is no direction
    args.sampling.settle(config, T)
    if args.interpolate and (args.sampling.sampler == "ddpm" or args.sampling.eta or args.sampling.steps < 2):
        raise UserError("--interpolate needs a deterministic sampler, not ddpm or --eta above 0, and --steps of at least 2")
    if len(edits) > 1:
        raise UserError(f"choose one of --{' and --'.join(edits)}")
    if classes is None and args.class_ is not None:
        raise UserError("this run knows no classes, which --class needs: train --preset quick-class")
    if classes is not None and args.class_ is not None and not 0 <= args.class_ < classes:
        raise UserError(f"--class {args.class_}: choose from 0 to {classes - 1}")
    if classes is not None and not dropout and edits and args.class_ is None:
        raise UserError("this run was trained with --train.label-dropout 0: give a --class")
    if config.data.condition != "none" and edits:
        raise UserError(f"this run's network is shown a condition ({config.data.condition}): use --image, not --{edits[0]}")
    if config.data.condition == "none" and args.image:
        raise UserError("this run's network is shown no image beside x: --init, --inpaint or --interpolate edit one")
    if args.strength is not None and (not 0 < args.strength <= 1 or not (args.init or args.interpolate)):
        raise UserError(f"--strength {args.strength}: choose above 0 and up to 1, with --init or --interpolate")
    if args.resample < 1 or (args.resample > 1 and not args.inpaint):
        raise UserError(f"--resample {args.resample}: choose 1 or more, with --inpaint")
    if args.resample > 1 and args.sampling.sampler != "ddpm":
        raise UserError(f"--resample goes back and forth by ddpm's steps, not {args.sampling.sampler}'s: add --sampler ddpm")


def read_images(names, config) -> np.ndarray:
    """Files, or test:N for images of the run's test set -> (N, C, H, W) in [-1, 1]."""
    test = test_set(config) if any(name.startswith("test:") for name in names) else ()
    found = []
    for name in names:
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not (number.isdecimal() and int(number) < len(test)):
                raise UserError(f"{name}: the test set has images test:0 to test:{len(test) - 1}")
            found.append(test[int(number)])
            continue
        try:
            found.append(read_image(name, config.data.size, config.model.channels))
        except Exception as e:  # PIL's decoders raise anything on a damaged file
            raise UserError(f"{name} cannot be read as an image: {e}") from e
    return images.to_float(np.stack(found))


def test_set(config) -> np.ndarray:
    """The run's test images (N, H, W, C) uint8."""
    data = config.data
    return load_images(data.name, data.dir, "test", data.size, config.model.channels)[0]


def read_mask(name: str, image: str, config) -> np.ndarray:
    """(1, 1, H, W): 1 where the image is kept, 0 where it is painted, which is white in the file."""
    size = config.data.size
    half, quarter = size // 2, size // 4
    painted = {"left": np.s_[:, :half], "right": np.s_[:, half:], "top": np.s_[:half], "bottom": np.s_[half:]}
    painted["center"] = np.s_[quarter : size - quarter, quarter : size - quarter]
    if name in painted:
        known = np.ones((1, 1, size, size), np.float32)
        known[0, 0][painted[name]] = 0
        return known
    mask = read_images([name], replace(config, model=replace(config.model, channels=1)))
    shapes = [(size, size) if file.startswith("test:") else images.picture_size(file) for file in (name, image)]
    if shapes[0] != shapes[1]:
        raise UserError("the mask {} is {} x {} pixels, the image {} {} x {}".format(name, *shapes[0], image, *shapes[1]))
    return (mask < 0).astype(np.float32)


def conditions(args: Args, config, num: int, in_turn: bool):
    """What the network is told, arrays (num, ...): labels, an image; and the originals of the images, or None."""
    cond, originals, null = [], None, config.model.null_label
    if in_turn:
        cond += sampling.in_turn(config, num)[1]
    elif config.is_text:
        cond.append(tokens([args.prompt] * num))
    elif null is not None:
        cond.append(np.full(num, null if args.class_ is None else args.class_, np.int32))
    if config.data.condition != "none":
        originals = read_images(args.image, config) if args.image else images.to_float(test_set(config)[:num])
        originals = originals[np.arange(num) % len(originals)]
        rng = np.random.default_rng(args.sampling.seed)
        cond.append(condition_image(config.data.condition, originals, config.data.lowres_size, rng))
    return cond, originals


def sample_images(args: Args, folder: Path, device: str, net, diffusion, config) -> list[Path]:
    """Draw a grid of images, or edit some; the files written."""
    from mindspore import Tensor  # which `runtime` must precede

    sampling, classes, shape, num = args.sampling, config.model.num_classes, config.shape, args.num
    decode = first_stage_of(Path(args.run)).decode if config.is_latent else np.asarray
    editing = bool(args.inpaint or args.interpolate or args.init)

    # The denoiser, the sampler and its steps
    in_turn = config.classes is not None and args.class_ is None and args.prompt is None and not editing
    cond, originals = conditions(args, config, num, in_turn)
    denoise = sampling.make_denoiser(net, diffusion, config.model.null_label, clip=not config.is_latent)
    if args.inpaint:
        mask, image = args.inpaint
        given, known = read_images([image], config), read_mask(mask, image, config)
        denoise = inpaint(denoise, Tensor(given), Tensor(known))
    sampler = sampling.make_sampler(config.model.self_condition)
    if args.resample > 1:
        sampler = partial(sample_repaint, jump_n_sample=args.resample)
        sampler = self_conditioned(sampler) if config.model.self_condition else sampler
    strength = args.strength or (0.6 if args.init else 1)
    timesteps = [t for t in sampling.timesteps(diffusion) if t < strength * diffusion.num_timesteps]
    if not timesteps:
        raise UserError(f"--strength {strength} leaves none of the {sampling.steps} steps: raise one of them")

    # Where it begins, if not at noise
    start = None
    if args.init:
        given = read_images([args.init], config)
        t = Tensor(np.full(num, timesteps[0], np.int32))
        noise = SeededNoise(sampling.seed, range(num))(shape)
        start = diffusion.q_sample(Tensor(given.repeat(num, 0)), t, Tensor(noise)).asnumpy()
    if args.interpolate:
        given = read_images(args.interpolate, config)
        labels = [Tensor(values[:1].repeat(2, 0)) for values in cond]
        begin = with_self_conditioning(denoise) if config.model.self_condition else denoise
        ends = invert_ddim(lambda x, t: begin(x, t, *labels), Tensor(given), diffusion, timesteps).asnumpy()
        start = np.stack([slerp(*ends, share) for share in np.linspace(0, 1, num)])

    # Sample
    calls = len(timesteps) * args.resample
    frames, every = [], max(calls // GIF_FRAMES, 1)
    rows, picked = [], set(np.linspace(0, calls - 1, 10, dtype=int))
    bar = tqdm(total=-(-num // sampling.batch_size) * calls, unit="step", desc=f"{sampling.sampler} on {device}")

    def watch(i, x, x_start):
        bar.update()
        if args.gif and bar.n <= calls and (i % every == 0 or i == calls - 1):
            frames.append(images.to_uint8(decode(x.asnumpy())))
        if args.denoise_row and bar.n <= calls and i in picked:
            rows.append(images.to_uint8(decode(x_start.asnumpy()[:8])))

    x = generate(sampler, denoise, diffusion, timesteps, shape, num, sampling.seed, sampling.batch_size, watch, cond, start)
    x = decode(x)
    bar.close()

    # The picture: what was given beside what came of it
    columns = config.classes if in_turn and num % config.classes == 0 else None
    labels = sampling.in_turn(config, num)[0] if in_turn else cond[0] if classes is not None else None
    if originals is not None:
        shown = np.broadcast_to(cond[-1][:, : shape[0]], x.shape)  # one channel where it is gray
        sheet = np.stack([shown, x, originals], 1).reshape(-1, *shape)
        columns = 12 if num > 3 else 3
    elif args.init:
        sheet = np.concatenate([given, x])
    elif args.inpaint:
        sheet = np.concatenate([given, given * known, x])
    elif args.interpolate:
        sheet = np.concatenate([given[:1], x, given[1:]])
        print(f"reconstruction error of both ends (RMS in [-1, 1]): {rms(x[0], given[0]):.3f}, {rms(x[-1], given[1]):.3f}")
    else:
        sheet = x
    out = Path(args.out or folder / "sample.png")
    if editing:
        columns = min(len(sheet), 12)
    named = in_turn and originals is None and config.data.name.startswith("fashion-mnist") and config.classes == len(CLASSES)
    captions = [NAMES[label][0] if config.is_text else CLASSES[label] for label in labels] if named else None
    images.save_grid(out, images.to_uint8(sheet), columns, 4 if editing else 3 if captions else 2, captions)
    written = [out]
    if args.gif:
        images.save_gif(args.gif, frames, columns if in_turn else None)
        written.append(Path(args.gif))
    if args.denoise_row:
        images.save_grid(args.denoise_row, np.stack(rows, 1).reshape(-1, *rows[0].shape[1:]), len(rows))
        written.append(Path(args.denoise_row))
    if args.npz:
        kept = {"labels": labels} if labels is not None and labels.max() < config.classes else {}
        images.write(args.npz, lambda f: np.savez_compressed(f, images=images.to_uint8(x), **kept))
        written.append(Path(args.npz))
    return written


def sample_points(args: Args, home: Path, folder: Path, device: str, net, diffusion) -> list[Path]:
    """Draw points, all pictures of a run of points, and its scores against held-out data; the files written."""
    from mindspore import Tensor

    sampling = args.sampling
    train, data = read_saved_points(home / "points.npz")
    frame = Normalizer.of(train)
    x_test = frame.to_unit(data[:2000])
    denoise, timesteps = sampling.make_denoiser(net, diffusion, None), sampling.timesteps(diffusion)

    def draw(sampler, timesteps, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2), and the ways of those of the first batch, (steps + 1, B, 2), in the data's units."""
        size, calls = min(sampling.batch_size, n), len(timesteps)
        way = [SeededNoise(sampling.seed, range(size))((2,))]
        bar = tqdm(total=-(-n // size) * calls, unit="step", desc=f"{n} points on {device}")

        def watch(i, x, x_start):
            bar.update()
            if len(way) <= calls:
                way.append(x.asnumpy())

        x = generate(sampler, denoise, diffusion, timesteps, (2,), n, sampling.seed, size, watch)
        bar.close()
        return frame.to_points(x), frame.to_points(np.stack(way))

    samples, way = draw(sampling.make_sampler(), timesteps, args.num)
    out, gif = Path(args.out or folder / "sample.png"), Path(args.gif or folder / "denoise.gif")
    title = f"{sampling.sampler}, {len(timesteps)} steps"
    plots2d.save_samples(out, samples, data[: args.num], title)

    # There and back, in ten panels each
    ts = np.linspace(0, diffusion.num_timesteps - 1, 10).round().astype(int)
    noise = np.random.default_rng(sampling.seed).standard_normal(x_test.shape, np.float32)
    alphas_cumprod = diffusion.alphas_cumprod[ts, None, None]
    noised = np.sqrt(alphas_cumprod) * x_test + np.sqrt(1 - alphas_cumprod) * noise  # (10, n, 2)
    plots2d.save_panels(folder / "forward.png", [frame.to_points(x) for x in noised], [f"t = {t}" for t in ts])
    stages = np.linspace(0, len(way) - 1, 10).round().astype(int)
    names = [f"t = {timesteps[i]}" if i < len(timesteps) else "x_0" for i in range(len(way))]
    plots2d.save_panels(folder / "reverse.png", [way[i][:2000] for i in stages], [names[i] for i in stages])
    moments = np.linspace(0, len(way) - 1, min(len(way), GIF_FRAMES)).round().astype(int)
    plots2d.save_points_gif(gif, [way[i][:2000] for i in moments], data[:2000], [names[i] for i in moments])

    # The field that the samplers follow, score = (sqrt(alpha_bar) x_0 - x) / (1 - alpha_bar)
    bounds = plots2d.limits(noised[3])  # at a third of the way: later all is a cloud, and the data would be too small to see
    grid, unclipped = plots2d.grid_points(bounds), make_denoiser(diffusion, net, clip=False)
    x_start = np.stack([unclipped(Tensor(grid), int(t)).asnumpy() for t in ts])
    scores = (np.sqrt(alphas_cumprod) * x_start - grid) / (1 - alphas_cumprod) / frame.scale
    fields = [(frame.to_points(x), frame.to_points(grid), score) for x, score in zip(noised, scores, strict=True)]
    bounds = tuple(map(tuple, frame.to_points(np.transpose(bounds)).T.tolist()))
    plots2d.save_score_field(folder / "score.png", fields, [f"t = {t}" for t in ts], bounds=bounds)
    few = sampling_timesteps(
        diffusion.num_timesteps, min(50, diffusion.num_timesteps)
    )  # of more, ddpm's zigzag hides itself
    ways = {f"{name}, {len(few)} steps": draw(SAMPLERS[name], few, 8)[1] for name in ("ddpm", "ddim")}
    plots2d.save_trajectories(folder / "trajectories.png", ways, data[:2000])

    written = [out, gif, *(folder / f"{name}.png" for name in ("forward", "reverse", "score", "trajectories"))]
    if args.npz:
        images.write(args.npz, lambda f: np.savez_compressed(f, points=samples))
        written.append(Path(args.npz))

    # How far from data, and how far data are from data
    try:
        distances = compare(samples, data, np.random.default_rng(sampling.seed))
    except ValueError as e:
        print(f"no score: {e}")
        (folder / "scores.json").unlink(missing_ok=True)  # of other points
        return written
    print(f"{title}: distance of {args.num} points from data held out, and of such data from each other")
    for name, d in distances.items():
        print(f"  {name:18} {d['score']:8.4f}   data {d['floor']:8.4f}, at most {d['floor_most']:8.4f}")
    record = {"sampler": sampling.sampler, "steps": len(timesteps), "num": args.num, **distances}
    images.write(folder / "scores.json", lambda f: f.write(json.dumps(record, indent=1).encode()))
    return [*written, folder / "scores.json"]


def main() -> int:
    args = cli.parse(Args)
    if args.num is not None and args.num < 1:
        raise UserError(f"--num {args.num}: choose at least 1")
    if args.list_:
        print("\n".join(f"{name:24} {describe(name)}" for name in bundled_models()))
        return 0
    run = modelarts.fetch(args.data_url) if args.data_url and not args.run else Path(args.run or default_run())
    args.run, device = str(run), runtime.set_device(args.sampling.device)
    net, diffusion, config, step = load_run(run, args.sampling.weights, args.sampling.ema_length)
    check(args, config, diffusion.num_timesteps)
    folder = modelarts.output_folder(args.train_url) or (run if run.is_dir() else run.parent)
    clock = time.perf_counter()
    if config.is_points:
        args.num = args.num or 10_000
        args.sampling.batch_size = args.sampling.batch_size or args.num
        written = sample_points(args, run_folders(run)[1], folder, device, net, diffusion)
    else:
        args.num = args.num or (8 if args.inpaint or args.interpolate or args.init else 64)
        args.sampling.batch_size = args.sampling.batch_size or 64
        written = sample_images(args, folder, device, net, diffusion, config)
    kind = "points" if config.is_points else "images"
    print(f"{args.num} {kind} of step {step} in {time.perf_counter() - clock:.1f} s: {', '.join(map(str, written))}")
    for path in written:
        modelarts.publish(path, args.train_url and f"{args.train_url.rstrip('/')}/{path.name}")
    return 0


def describe(name: str) -> str:
    """A line on a model that comes with the package."""
    scores = json.loads((WEIGHTS / name / "evaluation.json").read_text())
    size = (WEIGHTS / name / "ema.safetensors").stat().st_size / 1e6
    fid, floor, accuracy = scores["samples"]["fid"], scores["floor"]["fid"], scores["samples"]["class_accuracy"]
    return f"{size:.1f} MB, FID {fid:.2f} (of real images {floor:.2f}), class accuracy {accuracy:.1%}"


def rms(a, b) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


if __name__ == "__main__":
    runtime.run_program(main)
