"""Captions of Fashion-MNIST's classes ("a pair of sneakers"), and their words as numbers."""

import difflib

import numpy as np

from ..runtime import UserError

# Three ways to name each class, in the order of `fashion_mnist.CLASSES`, and to begin
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
NUMBER_OF = {word: number for number, word in enumerate(WORDS, 1)}  # 0 stands after the last word; all 0 is no caption
LENGTH = max(len(caption.split()) for captions in CAPTIONS for caption in captions)


def tokens(captions) -> np.ndarray:
    """The numbers of the words of N captions: (N, LENGTH) int32 in [0, len(WORDS)], 0 after the last word.

    Capitals and punctuation do not matter.

    Raises:
        UserError: there is no word, one is not among `WORDS`, or there are more than LENGTH.
    """
    numbers = np.zeros((len(captions), LENGTH), np.int32)
    for row, caption in zip(numbers, captions, strict=True):
        words = [word.strip(".,;:!?\"'") for word in caption.lower().split()]
        words = [word for word in words if word]
        if not words:
            raise UserError('a caption has no words: give one such as "an ankle boot"')
        for word in words:
            if word not in NUMBER_OF:
                close = difflib.get_close_matches(word, WORDS, 1)
                instead = f"did you mean {close[0]}?" if close else f"it knows {', '.join(WORDS)}"
                raise UserError(f"the word {word!r} is in no caption that the network saw: {instead}")
        if len(words) > LENGTH:
            raise UserError(f"{caption!r} has {len(words)} words: use at most {LENGTH}")
        row[: len(words)] = [NUMBER_OF[word] for word in words]
    return numbers


TOKENS = np.stack([tokens(captions) for captions in CAPTIONS])  # (classes, captions of each, LENGTH)


def plain_captions(numbers) -> np.ndarray:
    """Tokens (B, LENGTH) int32 of the first caption of class i mod 10, for each i of `numbers`."""
    return TOKENS[numbers % len(TOKENS), 0]


def draw_captions(rng: np.random.Generator, labels) -> np.ndarray:
    """Tokens (B, LENGTH) int32 of a caption of each label's class, drawn from all of them."""
    return TOKENS[labels, rng.integers(0, TOKENS.shape[1], len(labels))]
