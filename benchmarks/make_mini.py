"""Make the data set fashion-mnist-mini of the package from Fashion-MNIST: ``python -m benchmarks.make_mini``."""

import gzip
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ms_diffusion.commands.parse import parse
from ms_diffusion.data.fashion_mnist import FILES, MINI, load_fashion_mnist
from ms_diffusion.runtime import run_program

PER_CLASS = {"train": 200, "test": 50}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the first ``count`` items of each class in labels (N,)."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as a gzipped IDX file, without time and name, so that equal arrays give equal files."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as zipped:
        zipped.write(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))  # the type 8: uint8
        zipped.write(array.tobytes())


@dataclass
class Args:
    """Write the first images of each class as gzipped IDX files."""

    dir: str | None = None
    """Folder of the full data set; by default it is searched for, or downloaded."""
    out: Path = MINI
    """Folder to write to."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, (images_name, labels_name) in FILES.items():
        images, labels = load_fashion_mnist(split, args.dir)
        chosen = first_of_each_class(labels, PER_CLASS[split])
        write_idx(args.out / f"{images_name}.gz", images[chosen, :, :, 0])
        write_idx(args.out / f"{labels_name}.gz", labels[chosen].astype(np.uint8))
        print(f"{split}: {len(chosen)} images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
