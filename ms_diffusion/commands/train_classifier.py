"""Train the classifier behind the scores: python -m ms_diffusion.train_classifier. The one in the package came of this."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from mindspore import Tensor, ops

from .. import images, runtime
from ..convert import load_into, save_torch_state_dict
from ..data.batches import load_images, make_dataset
from ..models.classifier import Classifier
from ..runtime import DEVICES, UserError
from ..training.step import EMA, make_optimizer, make_train_step
from . import parse as cli

MOST_SHIFT = 2  # pixels


@dataclass
class Args:
    """Train the small Fashion-MNIST classifier whose features and classes the evaluation uses."""

    out: str = "classifier.safetensors"
    """Weights, in float16."""
    epochs: int = 10
    """Passes over the training images, shifted at random, but not flipped: the features shall tell left from right."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 2e-3
    """Peak learning rate of Adam, with a warm-up of an epoch and a cosine to 0."""
    name: str = "fashion-mnist"
    """Data set: fashion-mnist or fashion-mnist-mini."""
    dir: str | None = None
    """Folder of the data."""
    seed: int = 0
    """Seed of the weights and of every draw."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def shift(rng: np.random.Generator, x: np.ndarray, most: int = MOST_SHIFT) -> np.ndarray:
    """Images (B, C, H, W), each moved by up to `most` pixels in both directions; black (-1) comes in."""
    height, width = x.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (most, most), (most, most)), constant_values=-1)
    tops, lefts = rng.integers(0, 2 * most + 1, (2, len(x)))
    return np.stack(
        [image[:, top : top + height, left : left + width] for image, top, left in zip(x, tops, lefts, strict=True)]
    )


def accuracy(net, pictures, labels, batch_size: int = 500) -> float:
    """Share of images (N, H, W, C) uint8 whose largest logit is their label's."""
    graph = runtime.compiled(net)
    hits = 0
    for i in range(0, len(pictures), batch_size):
        logits = graph(Tensor(images.to_float(pictures[i : i + batch_size]))).asnumpy()
        hits += int((logits.argmax(1) == labels[i : i + batch_size]).sum())
    return hits / len(pictures)


def main() -> int:
    args = cli.parse(Args)
    if min(args.epochs, args.batch_size) < 1 or args.seed < 0 or not args.lr > 0:
        raise UserError("--epochs and --batch-size must be at least 1, --lr above 0, --seed at least 0")
    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out}: give a path that ends in .safetensors")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    device = runtime.set_device(args.device)
    pictures, labels = load_images(args.name, args.dir, "train", 28, 1)
    per_epoch = len(pictures) // args.batch_size
    steps = args.epochs * per_epoch

    net = Classifier(seed=args.seed)
    ema, optimizer = EMA(net, 0.998), make_optimizer(net, args.lr, per_epoch, steps)

    def loss_fn(x, label):
        return ops.cross_entropy(net(x), label)

    step, losses, clock = make_train_step(loss_fn, optimizer, ema), [], time.perf_counter()
    batches = make_dataset(pictures, labels, args.batch_size, steps, seed=args.seed)
    batches = batches.create_tuple_iterator(num_epochs=1, output_numpy=True)
    with tqdm(batches, total=steps, unit="step", desc=f"classifier on {device}") as bar:
        for i, (x, label) in enumerate(bar):
            rng = np.random.default_rng((args.seed, i))
            losses.append(step(Tensor(shift(rng, x)), Tensor(label))[0])
            if (i + 1) % per_epoch == 0:
                mean = np.mean([loss.asnumpy() for loss in losses])
                bar.set_postfix_str(f"loss {mean:.3f}")
                losses = []
    load_into(net, {p.name: a.asnumpy().astype(np.float16) for p, a in zip(ema.sources, ema.averages, strict=True)})
    save_torch_state_dict(net, args.out, np.float16)
    share = accuracy(net, *load_images(args.name, args.dir, "test", 28, 1))
    print(f"{args.out}: {share:.2%} of the test images right; {time.perf_counter() - clock:.0f} s on {device}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
