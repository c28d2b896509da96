"""Score a run of the preset emoji on captions that it has not seen: ``python -m benchmarks.score_emoji runs/emoji``.

A classifier of the categories ("Flags", "Food & Drink", ...) is trained on the run's training pictures, with shifts. It
says how often a sample for a held-out picture's name is of that picture's category, and its features give an FID. The run
was neither trained on the held-out pictures and names nor chosen by these scores.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mindspore import Tensor, ops

import ms_diffusion as md
from ms_diffusion.commands.parse import parse
from ms_diffusion.data.batches import load_image_set, make_dataset
from ms_diffusion.data.image_set import ImageSet
from ms_diffusion.files import write_json
from ms_diffusion.images import save_grid, to_float
from ms_diffusion.metrics.distances import frechet_distance, mean_and_covariance
from ms_diffusion.models.classifier import Classifier
from ms_diffusion.runtime import compiled, run_program
from ms_diffusion.training.step import make_optimizer, make_train_step

from .train_classifier import shift

STEPS, BATCH = 1500, 64


@dataclass
class Args:
    """Score the pictures that a run draws for held-out names."""

    run: Annotated[str, tyro.conf.Positional] = "runs/emoji"
    """Folder of the run."""
    per_name: int = 5
    """Samples of each name."""
    sampler: str = "dpmpp_2m"
    """Sampler."""
    steps: int = 20
    """Sampling steps."""
    guidance: float | None = None
    """Scale of guidance; by default the run's."""
    seed: int = 0
    """Seed of the samples."""
    json: str | None = None
    """Path of the scores."""
    out: str | None = None
    """Path of a PNG: for the first 16 held-out names the real picture, and samples beside it."""
    debug: bool = False
    """Show the traceback of an error."""


def train_classifier(data: ImageSet) -> Any:
    """A function from images (N, H, W, C) uint8 to features (N, 128) and logits (N, classes) of a trained classifier."""
    channels, classes = data.images.shape[-1], len(data.class_names or ())
    net = Classifier(classes, channels=channels)

    def loss_fn(x, label):
        return ops.cross_entropy(net(x), label, label_smoothing=0.1)

    step = make_train_step(loss_fn, make_optimizer(net, 2e-3, 50, STEPS))
    rows = make_dataset(data.images, data.labels, BATCH, STEPS).create_tuple_iterator(num_epochs=1, output_numpy=True)
    for i, (x, labels) in enumerate(rows):
        step(Tensor(-shift(np.random.default_rng(i), -x)), Tensor(labels))  # the border is white
    graph = compiled(net.set_train(False).features_and_logits)

    def outputs(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [graph(Tensor(to_float(pictures[i : i + 500]))) for i in range(0, len(pictures), 500)]
        features, logits = zip(*[[each.asnumpy() for each in part] for part in parts], strict=True)
        return np.concatenate(features), np.concatenate(logits)

    return outputs


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog="python -m benchmarks.score_emoji")
    run = md.load(args.run)
    data = run.config.data
    splits = {
        split: load_image_set(data.name, data.dir, split, data.size, run.config.model.channels, **data.options())
        for split in ("train", "test")
    }
    train, test = splits.values()
    outputs = train_classifier(train)

    names = [(test.captions or ())[row][0] for row in test.caption_ids]  # type: ignore[union-attr]
    options = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    rows = run.task.labelling.encode(names).repeat(args.per_name, 0)
    drawn = run.sample(len(rows), labels=rows, **options)
    wanted = test.labels.repeat(args.per_name)

    (features, logits), (real, real_logits) = outputs(drawn), outputs(test.images)
    reference = mean_and_covariance(outputs(train.images)[0])
    scores = {
        "held_out_names": len(names),
        "samples": len(drawn),
        "category_agreement": float((logits.argmax(1) == wanted).mean()),
        "category_agreement_of_real_pictures": float((real_logits.argmax(1) == test.labels).mean()),
        "category_agreement_by_chance": float((np.bincount(test.labels) ** 2).sum() / len(test.labels) ** 2),
        "fid": float(frechet_distance(*mean_and_covariance(features), *reference)),
        "fid_of_held_out_pictures": float(frechet_distance(*mean_and_covariance(real), *reference)),
        "step": run.step,
        **options,
    }
    print(json.dumps(scores, indent=1))
    if args.json:
        write_json(Path(args.json), scores)
    if args.out:
        beside = np.concatenate([test.images[:, None], drawn.reshape(len(names), args.per_name, *drawn.shape[1:])], 1)
        shown = beside[:: max(len(names) // 16, 1)][:16]
        save_grid(args.out, shown.reshape(-1, *drawn.shape[1:]), 2 * (args.per_name + 1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
