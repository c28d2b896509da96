"""How good are a run's samples: python -m ms_diffusion.evaluate runs/quick-class, or images.npz, or train, real images.

Every score stands beside its floor: what as many real images, of the other split, get from the same comparison.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from .. import images, runtime
from ..data.batches import DATASETS, load_images
from ..latent import FirstStage
from ..metrics.distances import (
    check_number,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
    psnr,
    rows_of_squares,
    ssim,
)
from ..metrics.features import Features
from ..runtime import UserError
from ..sampling import Sampling, make_draw
from ..training.presets import default_run, first_stage_of, load_run
from . import parse as cli

OTHER = {"train": "test", "test": "train"}  # the splits of real images
SHOWN = 30  # images of each kind in the picture
NEIGHBOURS = 500  # samples, at most, whose nearest training image is sought


@dataclass
class Args:
    """Score images against real ones: FID, KID, precision and recall, density and coverage, class accuracy and balance."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder or checkpoint, the name of a model that comes with the package, or an .npz file with the array
    `images`, uint8 (N, H, W, C), and perhaps `labels` (N,); train or test are the real images themselves. If not given, the
    model that comes with the package."""
    num: int = 10_000
    """How many images; of a file all, if there are fewer."""
    against: Literal[tuple(OTHER)] = "test"
    """The real images that are compared with."""
    against_num: int | None = None
    """How many of them; if not given as many as are scored, or all where there are fewer."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Sampling(sampler="dpmpp_2m", steps=20)
    )
    data: Literal[tuple(DATASETS)] | None = None
    """Data set; the run's own if not given, or fashion-mnist."""
    data_dir: str | None = None
    """Folder of the data."""
    inception: str | None = None
    """Weights of the FID's InceptionV3, as PyTorch's projects use them (.pth or .safetensors), to use its features instead
    of those of the classifier that comes with the package."""
    json: str | None = None
    """Where the scores go; evaluation.json beside the run or the file, if not given."""
    out: str | None = None
    """Where the picture goes; evaluation.png beside the run or the file, if not given."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Samples:
    """What is scored."""

    images: np.ndarray
    """(N, H, W, C) uint8."""
    labels: np.ndarray | None
    """(N,), the classes that they were meant to be, or None."""
    made: str
    """How they were made, in words."""


def read_npz(path: Path, num: int) -> Samples:
    """The first `num` images of an .npz file, and their labels, if it has any."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            arrays = {name: arrays[name] for name in arrays if name in ("images", "labels")}
    except Exception as e:  # a damaged file raises a dozen kinds
        raise UserError(f"{path} cannot be read as an .npz file: {e}") from e
    if "images" not in arrays:
        raise UserError(f"{path} does not hold the array `images`: see sample.py --npz")
    found, labels = arrays["images"], arrays.get("labels")
    if found.ndim != 4 or found.shape[-1] not in (1, 3) or 0 in found.shape:
        raise UserError(f"{path}: images are (N, H, W, C) with C = 1 or 3, these are {found.shape}")
    if found.dtype != np.uint8:
        nan = " with NaN" if found.dtype.kind == "f" and np.isnan(found).any() else ""
        raise UserError(
            f"{path}: images are uint8, 0 to 255, these are {found.dtype}{nan}: save them as sample.py --npz does"
        )
    if labels is not None and (labels.shape != found.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: labels are {len(found)} integers, these are {labels.shape} of {labels.dtype}")
    return Samples(found[:num], None if labels is None else labels[:num], str(path))


def draw_samples(sampling: Sampling, num: int, device: str, name: str, net, diffusion, config, step: int) -> Samples:
    """Draw `num` images from a run, each class in turn."""
    steps, batch_size = len(sampling.timesteps(diffusion)), min(sampling.batch_size or 100, num)
    draw = make_draw(sampling, net, diffusion, config, first_stage_of(Path(name)) if config.is_latent else None)
    with tqdm(total=-(-num // batch_size) * steps, unit="step", desc=f"{sampling.sampler} on {device}") as bar:
        x, labels = draw(num, batch_size, lambda *_: bar.update())
    if bad := num - np.isfinite(x).all((1, 2, 3)).sum():
        raise UserError(f"{bad} of {num} samples are not finite: this training went astray; take an earlier checkpoint")
    made = f"{sampling.sampler}, {steps} steps, guidance {sampling.guidance:g}"
    if sampling.guidance_interval:
        made += " from t = {} to {}".format(*sampling.guidance_interval)
    made += f", seed {sampling.seed}"
    return Samples(images.to_uint8(x), labels, f"{name} at step {step}, {sampling.weights} weights; {made}")


def real_images(name: str, folder: str | None, size: int, channels: int) -> dict:
    """{"train", "test": (images, labels)}; a set with one split is halved."""
    found = {split: load_images(name, folder, split, size, channels) for split in OTHER}
    if name == "image-folder":
        order = np.random.default_rng(0).permutation(len(found["train"][0]))
        found = {s: tuple(values[order[i::2]] for values in found["train"]) for i, s in enumerate(OTHER)}
    return found


def choose(pictures, labels, num: int):
    """`num` of them at random, or all, always the same."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(pictures))[:num])
    return pictures[chosen], labels[chosen]


def score(found: dict, reference: dict, labels=None) -> dict:
    """All scores of images by their features and logits, against those of the reference."""
    a, b = found["features"], reference["features"]
    kid, spread = kernel_distance(a, b, np.random.default_rng(0), size=min(1000, len(a) // 2, len(b) // 2))
    scores = {"fid": frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b)), "kid": kid, "kid_spread": spread}
    scores |= precision_recall(a, b)
    if "logits" in found:
        classes, others = found["logits"].argmax(1), reference["logits"].argmax(1)
        shares, wanted = (np.bincount(c, minlength=found["logits"].shape[1]) / len(c) for c in (classes, others))
        if labels is not None:
            scores["class_accuracy"] = float((classes == labels).mean())
        scores["class_balance"] = float(1 - np.abs(shares - wanted).sum() / 2)
    return scores


def nearest(pictures, train) -> tuple[np.ndarray, np.ndarray]:
    """The index of each one's nearest training image, and how far it is: root mean square of the pixels' distances,
    0..255."""
    x, data = (np.asarray(each, np.float32).reshape(len(each), -1) for each in (pictures, train))
    found = [(square.argmin(1), square.min(1)) for _, square in rows_of_squares(x, data, 100)]
    index, square = (np.concatenate(column) for column in zip(*found, strict=True))
    return index, np.sqrt(square / x.shape[1])


def draw_picture(path: Path, samples, real, neighbours) -> None:
    """Real images, the samples, and the samples above their nearest training images."""
    from matplotlib.figure import Figure

    pairs = np.concatenate([samples[: len(neighbours)], neighbours])
    panels = {"real": real, "samples": samples, "samples, and below each its nearest training image": pairs}
    figure = Figure(figsize=(7, 6.6), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(len(panels), 1), panels.items(), strict=True):
        sheet = images.grid(shown, 10)
        axes.imshow(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=255)
        axes.set(title=title, xticks=[], yticks=[])
    write(path, lambda f: figure.savefig(f, format="png", dpi=110))


ROWS = {  # name -> what it is, and how it is printed
    "fid": ("FID", "{:.4f}"),
    "kid": ("KID", "{:.5f}"),
    "kid_spread": ("  its spread over subsets", "{:.5f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.2%}"),
    "class_balance": ("class balance", "{:.3f}"),
    "psnr": ("PSNR of reconstructions (dB)", "{:.2f}"),
    "ssim": ("SSIM of reconstructions", "{:.4f}"),
    "nearest_train": ("nearest training image (RMS of 0..255)", "{:.1f}"),
}


def main() -> int:
    args, clock = cli.parse(Args), time.perf_counter()
    source, against = args.source or default_run(), args.against
    if args.num < 1:
        raise UserError(f"--num {args.num}: choose at least 1")
    if args.against_num is not None and args.against_num < 1:
        raise UserError(f"--against-num {args.against_num}: choose at least 1")
    if source == against:
        raise UserError(f"{source} against {source} are the same images: add --against {OTHER[against]}")
    device = runtime.set_device(args.sampling.device)
    features = Features(args.inception, bar=True)

    # Where the images come from, and what real ones they are like
    name, folder, size, channels = args.data or "fashion-mnist", args.data_dir, 28, 1
    samples, first_stage, beside, num = None, None, Path("evaluation"), args.num
    if source.endswith(".npz"):
        samples = read_npz(Path(source), num)
        size, channels = samples.images.shape[2:]
        beside, num = Path(f"{source.removesuffix('.npz')}-evaluation"), len(samples.images)
        if samples.images.shape[1] != size:
            raise UserError(f"{source}: images are square, these are {samples.images.shape[1]} x {size}")
    elif source not in OTHER:
        run = load_run(Path(source), args.sampling.weights, args.sampling.ema_length)
        config, path = run[2], Path(source)
        if config.is_points:
            raise UserError(f"{source} is of points in the plane: python sample.py {source} scores them")
        if config.data.condition != "none":
            raise UserError(f"{source} is shown images ({config.data.condition}): score what sample.py --npz draws from it")
        if config.is_autoencoder:
            first_stage = FirstStage(run[0])
        args.sampling.settle(config, run[1].T)
        beside = (path if path.is_dir() else path.parent) / "evaluation"
        name, folder = args.data or config.data.name, args.data_dir or config.data.dir
        size, channels = config.data.size, config.model.channels
    inner = middle if name.startswith("fashion-mnist") else np.asarray
    features.check(inner(np.zeros((1, size, size, channels))).shape[1:])
    real = real_images(name, folder, size, channels)
    against_num = args.against_num or num
    numbers = {source if samples else "--num": num, "--against-num": against_num}
    for what, n in (numbers | {f"{name}, {split}": len(real[split][0]) for split in real}).items():
        try:
            check_number(n, features.num)
        except ValueError as e:
            raise UserError(f"{what}: {e}") from e
    chosen = {split: choose(*pair, against_num if split == against else num) for split, pair in real.items()}
    if source in OTHER:
        samples = Samples(*chosen[source], f"real {source} images")
    if first_stage:
        originals, labels = choose(*real["test"], num)
        made = f"reconstructions of test images by {source} at step {run[3]}"
        samples = Samples(images.to_uint8(first_stage.reconstruct(originals)), labels, made)
    if samples is None:
        samples = draw_samples(args.sampling, num, device, source, *run)

    # Scores, and what real images score
    found = {split: features.cached(inner(pictures), folder) for split, (pictures, _) in chosen.items()}
    other = OTHER[against]
    seen = found[source] if source in OTHER else features(inner(samples.images))
    if not name.startswith("fashion-mnist"):  # whose classes alone the classifier knows
        for answers in (*found.values(), seen):
            answers.pop("logits", None)
    scores = score(seen, found[against], samples.labels)
    if first_stage:
        pair = inner(samples.images), inner(originals)
        scores |= {"psnr": psnr(*pair).mean(), "ssim": ssim(*pair).mean()}
    floor = score(found[other], found[against], chosen[other][1])
    train = real["train"][0]
    index, far = nearest(samples.images[:NEIGHBOURS], train)
    scores["nearest_train"] = float(far.mean())
    floor["nearest_train"] = float(nearest(chosen["test"][0][:NEIGHBOURS], train)[1].mean())  # of test images, in any case

    # The report
    protocol = (
        f"{features.name}, {features.num} features; {samples.made}; N = {len(samples.images)} against "
        f"{len(chosen[against][0])} {against} images of {name}; floor: {len(chosen[other][0])} real {other} images"
    )
    print(f"{'':40} {'samples':>10} {'floor':>10}")
    for key, (title, form) in ROWS.items():
        if key in floor or key in scores:
            columns = [form.format(each[key]) if key in each else "-" for each in (scores, floor)]
            print("{:40} {:>10} {:>10}".format(title, *columns))
    seconds = time.perf_counter() - clock
    print(f"{protocol}; {seconds:.0f} s on {device}")
    record = {"protocol": protocol, "samples": scores, "floor": floor, "seconds": round(seconds, 1)}
    report, picture = Path(args.json or f"{beside}.json"), Path(args.out or f"{beside}.png")
    write(report, lambda f: f.write(json.dumps(record, indent=1).encode()))
    draw_picture(picture, samples.images[:SHOWN], chosen[against][0][:SHOWN], train[index[:10]])
    print(f"{report}, {picture}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
