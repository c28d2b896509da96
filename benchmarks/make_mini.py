"""Make the embedded subset from the full set of Fashion-MNIST: ``python -m ms_diffusion.data.make_mini``."""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np

from ms_diffusion.data.fashion_mnist import FILES, MINI, load_fashion_mnist
from ms_diffusion.runtime import run_program

PER_CLASS = {"train": 200, "test": 50}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the first ``count`` of each class in labels (N,)."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as a gzipped IDX file; neither time nor name goes into it, so the bytes repeat."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as zipped:
        zipped.write(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))  # the type 8: uint8
        zipped.write(array.tobytes())


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data.dir", dest="directory", help="folder with the full set")
    parser.add_argument("--out", type=Path, default=MINI, help="folder to write to (default: the one in the library)")
    options = parser.parse_args(args)

    options.out.mkdir(parents=True, exist_ok=True)
    for split, (images_name, labels_name) in FILES.items():
        images, labels = load_fashion_mnist(split, options.directory)
        chosen = first_of_each_class(labels, PER_CLASS[split])
        write_idx(options.out / f"{images_name}.gz", images[chosen, :, :, 0])
        write_idx(options.out / f"{labels_name}.gz", labels[chosen].astype(np.uint8))
        print(f"{split}: {len(chosen)} images in {options.out}")


if __name__ == "__main__":
    run_program(main)
