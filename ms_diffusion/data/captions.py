"""Captions of Fashion-MNIST's classes ("a pair of sneakers"), and their tokens."""

import difflib
from collections.abc import Sequence

import numpy as np

from ..randomness import Random
from ..runtime import UserError

# Three names of each class, in the order of `fashion_mnist.CLASSES`, and three ways to begin a caption
NAMES = (
    ("a t-shirt", "a top with short sleeves", "a tee"),
    ("a pair of trousers", "trousers", "a pair of pants"),
    ("a pullover", "a sweater", "a jumper"),
    ("a dress", "a gown", "a summer dress"),
    ("a coat", "a jacket", "a warm coat"),
    ("a sandal", "a pair of sandals", "an open shoe"),
    ("a shirt", "a blouse", "a shirt with buttons"),
    ("a sneaker", "a pair of sneakers", "a running shoe"),
    ("a bag", "a handbag", "a purse"),
    ("an ankle boot", "a boot", "a pair of boots"),
)
BEGINNINGS = ("{}", "a photo of {}", "a picture of {}")
CAPTIONS = tuple(tuple(beginning.format(name) for beginning in BEGINNINGS for name in names) for names in NAMES)

WORDS = sorted({word for captions in CAPTIONS for caption in captions for word in caption.split()})
NUMBER_OF = {word: number for number, word in enumerate(WORDS, 1)}  # 0 pads a caption; only 0 is no caption
LENGTH = max(len(caption.split()) for captions in CAPTIONS for caption in captions)


def tokens(captions: Sequence[str]) -> np.ndarray:
    """The tokens of N captions: (N, LENGTH) int32 in [0, len(WORDS)], with 0 after the last word.

    Case and punctuation are ignored. Raises UserError if a caption has no words, more than LENGTH, or one not in `WORDS`.
    """
    numbers = np.zeros((len(captions), LENGTH), np.int32)
    for row, caption in zip(numbers, captions, strict=True):
        words = [stripped for word in caption.lower().split() if (stripped := word.strip(".,;:!?\"'"))]
        if not words:
            raise UserError('a caption has no words: write one such as "an ankle boot"')
        for word in words:
            if word not in NUMBER_OF:
                close = difflib.get_close_matches(word, WORDS, 1)
                hint = f"did you mean {close[0]}?" if close else f"use only {', '.join(WORDS)}"
                raise UserError(f"the word {word!r} is in no caption of the training data: {hint}")
        if len(words) > LENGTH:
            raise UserError(f"{caption!r} has {len(words)} words: use at most {LENGTH}")
        row[: len(words)] = [NUMBER_OF[word] for word in words]
    return numbers


TOKENS = np.stack([tokens(captions) for captions in CAPTIONS])  # (classes, captions a class, LENGTH)


def plain_captions(labels: np.ndarray) -> np.ndarray:
    """Tokens (B, LENGTH) int32 of the first caption of each label's class; the labels (B,) are taken modulo 10."""
    return TOKENS[labels % len(TOKENS), 0]


def draw_captions(rng: Random, labels: np.ndarray) -> np.ndarray:
    """Tokens (B, LENGTH) int32 of a random caption of the class of each label (B,)."""
    return TOKENS[labels, rng.integers(0, TOKENS.shape[1], len(labels))]
