"""Score samples against real images: `evaluate runs/quick-class`, or images.npz, or train, the real images themselves.
Every score stands beside its floor: what as many real images of the other split score in the same comparison."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import runtime
from ..data.batches import DATASETS
from ..fields import AT_LEAST_1, OneOf, check_fields
from ..files import check_output, write_json
from ..metrics.features import Features
from ..metrics.scores import OTHER_SPLIT, Reference, format_report, read_npz
from ..runtime import UserError, command
from ..sampling import Sampling
from ..training.pipeline import load
from ..training.runs import default_run
from .parse import parse


@dataclass
class Args:
    """Score images against real ones: FID, KID, precision and recall, density and coverage, class accuracy and balance."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder or checkpoint, the name of a bundled model, or an .npz file with the array `images`, uint8 (N, H, W,
    C), and optionally `labels` (N,); train or test are the real images themselves. By default a bundled model."""
    num: Annotated[int, AT_LEAST_1] = 10_000
    """Number of images; of a file all, if there are fewer."""
    against: Literal[tuple(OTHER_SPLIT)] = "test"
    """Split of the real images to compare with."""
    against_num: Annotated[int, AT_LEAST_1] | None = None
    """Number of real images; by default as many as are scored, or all if there are fewer."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    data: Annotated[str, OneOf(DATASETS)] | None = None
    """Data set of the real images; by default the run's own, or fashion-mnist."""
    data_dir: str | None = None
    """Folder of the data set."""
    inception: str | None = None
    """Weights of the FID's InceptionV3 as PyTorch projects use them (.pth or .safetensors), to use its features in place of
    the bundled classifier's."""
    json: str | None = None
    """Path of the scores; by default evaluation.json beside the run or the file."""
    out: str | None = None
    """Path of the picture; by default evaluation.png beside the run or the file."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args, clock = parse(Args, argv, prog=command("evaluate")), time.perf_counter()
    check_fields(args.sampling)  # by the names of its flags
    check_fields(args)
    source = args.source or default_run()
    if source == args.against:
        raise UserError(f"{source} against {source} are the same images: add --against {OTHER_SPLIT[source]}")
    device, (rank, _) = runtime.set_device(args.sampling.device), runtime.initialise_ranks()
    features = Features(args.inception, bar=True)
    name, folder, options = args.data or "fashion-mnist", args.data_dir, (args.against, args.against_num)
    originals = None

    def outputs(beside: Path | str) -> tuple[Path, Path]:
        """The paths of the scores and the picture, if they can be written."""
        paths = Path(args.json or f"{beside}.json"), Path(args.out or f"{beside}.png")
        if not rank:
            check_output(*paths)
        return paths

    if source.endswith(".npz"):
        samples = read_npz(source, args.num)
        report, picture = outputs(f"{source.removesuffix('.npz')}-evaluation")
        num, (size, channels) = len(samples.images), samples.images.shape[2:]
        reference = Reference(features, name, folder, size, channels, num, *options, num_name=source)
    elif source in OTHER_SPLIT:
        report, picture = outputs("evaluation")
        reference = Reference(features, name, folder, 28, 1, args.num, *options)
        samples = reference.real_samples(source)
    else:
        path = Path(source)
        run = load(source, args.sampling.weights, args.sampling.ema_length, args.sampling.device)
        report, picture = outputs((path if path.is_dir() else path.parent) / "evaluation")
        reference = run.reference(features, args.num, *options, name=args.data, folder=args.data_dir)
        samples, originals = run.task.samples_to_score(run, args.sampling, args.num, reference)
    record = reference.score(samples, originals)
    if rank:
        return 0  # rank 0 writes
    record["seconds"] = round(time.perf_counter() - clock, 1)
    print(f"{format_report(record)}; {record['seconds']:.0f} s on {device}")
    write_json(report, record)
    reference.save_picture(picture, samples)
    print(runtime.one_line(f"{report}, {picture}"))
    return 0
