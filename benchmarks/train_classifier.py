"""Train the classifier behind the scores: python -m benchmarks.train_classifier. The bundled one was trained by this."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from mindspore import Tensor, nn, ops

from ms_diffusion import images, runtime
from ms_diffusion.commands.parse import parse
from ms_diffusion.convert import load_into, save_torch_state_dict
from ms_diffusion.data.batches import check_enough, load_images, make_dataset
from ms_diffusion.fields import AT_LEAST_1, NON_NEGATIVE, POSITIVE, check_fields
from ms_diffusion.models.classifier import Classifier
from ms_diffusion.runtime import DEVICES, UserError
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step

MAX_SHIFT = 2  # pixels


@dataclass
class Args:
    """Train the small Fashion-MNIST classifier whose features and classes the evaluation uses."""

    out: str = "classifier.safetensors"
    """Path of the weights, in float16."""
    epochs: Annotated[int, AT_LEAST_1] = 10
    """Passes over the training images, which are shifted but not flipped, so that the features tell left from right."""
    batch_size: Annotated[int, AT_LEAST_1] = 128
    """Images per step."""
    lr: Annotated[float, POSITIVE] = 2e-3
    """Peak learning rate of Adam, with a warm-up of an epoch and a cosine to 0."""
    name: str = "fashion-mnist"
    """Data set: fashion-mnist or fashion-mnist-mini."""
    dir: str | None = None
    """Folder of the data."""
    seed: Annotated[int, NON_NEGATIVE] = 0
    """Seed of the weights and of every draw."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def shift(rng: np.random.Generator, x: np.ndarray, most: int = MAX_SHIFT) -> np.ndarray:
    """Move each image of x (B, C, H, W) by up to `most` pixels in both directions; the new border is black (-1)."""
    height, width = x.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (most, most), (most, most)), constant_values=-1)
    tops, lefts = rng.integers(0, 2 * most + 1, (2, len(x)))
    return np.stack(
        [image[:, top : top + height, left : left + width] for image, top, left in zip(x, tops, lefts, strict=True)]
    )


def accuracy(net, pictures, labels, batch_size: int = 500) -> float:
    """Fraction of images (N, H, W, C) uint8 whose largest logit is that of their label."""
    graph, hits = runtime.compiled(net), 0
    for i in range(0, len(pictures), batch_size):
        logits = graph(Tensor(images.to_float(pictures[i : i + batch_size]))).asnumpy()
        hits += int((logits.argmax(1) == labels[i : i + batch_size]).sum())
    return hits / len(pictures)


def fit(net: nn.Cell, pictures: np.ndarray, labels: np.ndarray, epochs: int = 10, batch_size: int = 128, lr: float = 2e-3,
        seed: int = 0, name: str = "classifier") -> None:  # fmt: skip
    """Train `net` to name the class of `pictures` (N, H, W, C) uint8, and leave the averaged weights in it."""
    per_epoch = len(pictures) // batch_size
    steps = epochs * per_epoch
    ema, optimizer = EMA(net, 0.998), make_optimizer(net, lr, per_epoch, steps)

    def loss_fn(x, label):
        return ops.cross_entropy(net(x), label)

    step, losses = make_train_step(loss_fn, optimizer, ema), []
    batches = make_dataset(pictures, labels, batch_size, steps, seed=seed)
    with tqdm(batches.create_tuple_iterator(num_epochs=1, output_numpy=True), total=steps, unit="step", desc=name) as bar:
        for i, (x, label) in enumerate(bar):
            losses.append(step(Tensor(shift(np.random.default_rng((seed, i)), x)), Tensor(label))[0])
            if (i + 1) % per_epoch == 0:
                bar.set_postfix_str(f"loss {np.mean([loss.asnumpy() for loss in losses]):.3f}")
                losses = []
    load_into(net, {p.name: a.asnumpy() for p, a in zip(ema.sources, ema.averages, strict=True)})


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    check_fields(args)
    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out}: give a path that ends in .safetensors")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    device = runtime.set_device(args.device)
    pictures, labels = load_images(args.name, args.dir, "train", 28, 1)
    check_enough(pictures, args.batch_size, 1)
    net, clock = Classifier(seed=args.seed), time.perf_counter()
    fit(net, pictures, labels, args.epochs, args.batch_size, args.lr, args.seed, f"classifier on {device}")
    load_into(net, {p.name: p.asnumpy().astype(np.float16) for p in net.get_parameters()})  # what the file holds
    save_torch_state_dict(net, args.out, np.float16)
    share = accuracy(net, *load_images(args.name, args.dir, "test", 28, 1))
    print(f"{args.out}: {share:.2%} of the test images right; {time.perf_counter() - clock:.0f} s on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run_program(main, sys.argv[1:]))
