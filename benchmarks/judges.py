"""Score samples by two networks that nothing in this repository was chosen by: ``python -m benchmarks.judges SAMPLES.npz``.

The bundled classifier chose presets, samplers and guidance, so its FID flatters them. These networks are trained here, from
a fixed seed, for scores of finished models alone. Neither has a norm or a shortcut, and their features are not averages over
the image, as the bundled classifier's are. SAMPLES.npz is what `sample --npz` writes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tyro

from mindspore import Tensor, nn, ops

from ms_diffusion.commands.parse import parse
from ms_diffusion.data.batches import load_images
from ms_diffusion.fields import AT_LEAST_1, check_fields
from ms_diffusion.files import in_batches, write_json
from ms_diffusion.images import to_float
from ms_diffusion.metrics.distances import frechet_distance, mean_and_covariance
from ms_diffusion.metrics.scores import choose, read_npz
from ms_diffusion.models.layers import Linear, conv2d, name_and_initialise
from ms_diffusion.runtime import DEVICES, UserError, compiled, run_program, set_device

from .train_classifier import accuracy, fit

SEED, FEATURES = 20261127, 128


class Convolutions(nn.Cell):
    """Two convolutions with ReLU and max pooling, and a layer of `FEATURES` units over the whole image (LeCun et al. 1998):
    images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.pool = conv2d(1, 32, 5), conv2d(32, 64, 5), nn.MaxPool2d(2, 2)
        self.hidden, self.head = Linear(64 * 4 * 4, FEATURES), Linear(FEATURES, 10)
        name_and_initialise(self, SEED)

    def features(self, x: Tensor) -> Tensor:
        x = self.pool(ops.relu(self.conv1(x)))  # (B, 32, 12, 12)
        x = self.pool(ops.relu(self.conv2(x)))  # (B, 64, 4, 4)
        return ops.relu(self.hidden(x.reshape(x.shape[0], -1)))

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Perceptron(nn.Cell):
    """Three layers over all pixels, which know nothing of their neighbourhood: images (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.hidden = Linear(784, 512), Linear(512, 512), Linear(512, FEATURES)
        self.head = Linear(FEATURES, 10)
        name_and_initialise(self, SEED + 1)

    def features(self, x: Tensor) -> Tensor:
        x = ops.relu(self.layer1(x.reshape(x.shape[0], -1)))
        return ops.relu(self.hidden(ops.relu(self.layer2(x))))

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


JUDGES = {"convolutions": Convolutions, "perceptron": Perceptron}


@dataclass
class Args:
    """Train two networks, and score samples of Fashion-MNIST by their features: FID against the test images."""

    samples: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files .npz of samples."""
    num: Annotated[int, AT_LEAST_1] = 10_000
    """Samples of each file, and real training images of the floor."""
    epochs: Annotated[int, AT_LEAST_1] = 10
    """Passes over the training images."""
    name: str = "fashion-mnist"
    """Data set: fashion-mnist or fashion-mnist-mini."""
    dir: str | None = None
    """Folder of the data."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    json: str | None = None
    """Path of the scores."""
    debug: bool = False
    """Show the traceback of an error."""


def gaussian(graph, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features of images (N, 28, 28, 1) uint8."""
    (features,) = in_batches(lambda x: [graph(Tensor(to_float(x))).asnumpy()], pictures, 500)
    return mean_and_covariance(features)


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    check_fields(args)
    set_device(args.device)
    files = {path: read_npz(path, args.num).images for path in args.samples}
    for path, pictures in files.items():
        if pictures.shape != (args.num, 28, 28, 1):
            raise UserError(
                f"{path} holds images {pictures.shape}: give {args.num} of 28 x 28 gray pixels, or another --num"
            )
    train, test = (load_images(args.name, args.dir, split, 28, 1) for split in ("train", "test"))
    files = {"real training images": choose(*train, args.num)[0], **files}
    scores: dict = {"seed": SEED, "epochs": args.epochs, "num": args.num}
    for name, judge in JUDGES.items():
        net = judge()
        fit(net, *train, epochs=args.epochs, seed=SEED, name=name)
        graph = compiled(net.set_train(False).features)
        scores[name] = {"accuracy": accuracy(net, *test)}
        print(f"{name}: {scores[name]['accuracy']:.2%} of the test images right")
        real, floor = gaussian(graph, test[0]), None
        for path, pictures in files.items():
            fid = frechet_distance(*gaussian(graph, pictures), *real)
            floor = floor or fid
            scores[name][path] = fid
            print(f"  {path}: FID {fid:.4f}, {fid / floor:.2f} times that of real images")
    if args.json:
        write_json(args.json, scores)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
