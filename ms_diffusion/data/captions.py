"""Captions of Fashion-MNIST's classes ("a pair of sneakers"), and their tokens."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from ..fields import Bounds, find_problem
from ..runtime import UserError
from .tokenizers import Tokenizer

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
LENGTH = max(len(caption.split()) for captions in CAPTIONS for caption in captions)
LENGTHS = Annotated[int, Bounds(1, 10_000)]  # of a caption in words


class Words(Tokenizer):
    """A tokenizer of whole words, which refuses those that it does not know; 0 pads a caption, and only 0 is no caption.

    Args:
        words: The words, in lower case; their tokens are 1, 2, ...
        max_length: The most words in a caption."""

    kind = "words"

    def __init__(self, words: Sequence[str], max_length: int):
        self.words, self.max_length, self.vocab_size = list(words), max_length, len(words)
        self.number_of = {word: number for number, word in enumerate(words, 1)}

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """The tokens of N captions: (N, max_length) int32 in [0, vocab_size], with 0 after the last word. Case and
        punctuation are ignored. Raises UserError if a caption has no words, too many, or one that is not known."""
        numbers = np.zeros((len(captions), self.max_length), np.int32)
        for row, caption in zip(numbers, captions, strict=True):
            words = [stripped for word in caption.lower().split() if (stripped := word.strip(".,;:!?\"'"))]
            if not words:
                raise UserError('a caption has no words: write one such as "an ankle boot"')
            for word in words:
                if word not in self.number_of:
                    close = difflib.get_close_matches(word, self.words, 1)
                    hint = f"did you mean {close[0]}?" if close else f"use only {', '.join(self.words)}"
                    raise UserError(f"the word {word!r} is in no caption of the training data: {hint}")
            if len(words) > self.max_length:
                raise UserError(f"{caption!r} has {len(words)} words: use at most {self.max_length}")
            row[: len(words)] = [self.number_of[word] for word in words]
        return numbers

    def to_record(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length, "words": self.words}

    @classmethod
    def read_record(cls, record: dict[str, Any]) -> "Words":
        if problem := find_problem(record, dict[str, str | int | list]) or find_problem(record.get("max_length"), LENGTHS):
            raise ValueError(problem)
        if not all(isinstance(word, str) for word in record.get("words", [0])):
            raise ValueError("its words are no list of texts")
        return cls(record["words"], record["max_length"])


FASHION_WORDS = Words(WORDS, LENGTH)
tokens = FASHION_WORDS.encode
