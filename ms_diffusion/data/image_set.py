"""What is known of the images of a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images, and what is known of each of them; `images, labels = image_set`."""

    images: np.ndarray
    """(N, H, W, C) uint8 in 0..255."""
    labels: np.ndarray
    """(N,) int32: the class of each image."""
    class_names: tuple[str, ...] | None = None
    """The names of the classes, in the order of the labels."""
    captions: tuple[tuple[str, ...], ...] | None = None
    """A table of captions: one of those in a row describes an image."""
    caption_ids: np.ndarray | None = None
    """(N,) int32: the row of `captions` for each image."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))

    def take(self, chosen: np.ndarray) -> "ImageSet":
        """The images with these numbers (n,), and their captions alone."""
        table, ids = self.captions, self.caption_ids
        captions = {} if table is None or ids is None else table_of([table[i] for i in ids[chosen]])
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], **captions)


def table_of(captions: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """The two fields of an `ImageSet` for the captions of each image: a table without repetition, and its rows."""
    number = {row: i for i, row in enumerate(dict.fromkeys(captions))}
    return {"captions": tuple(number), "caption_ids": np.array([number[row] for row in captions], np.int32)}
