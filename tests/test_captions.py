"""Captions of Fashion-MNIST's classes, and their words as numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_diffusion.data.captions import CAPTIONS, FASHION_WORDS, LENGTH, WORDS, tokens
from ms_diffusion.data.fashion_mnist import CLASSES
from ms_diffusion.runtime import UserError
from ms_diffusion.training.tasks.labels import Captions

TABLE = Captions(CAPTIONS, FASHION_WORDS)


def words(numbers) -> str:
    """The caption of one row of tokens."""
    return " ".join(WORDS[number - 1] for number in numbers if number)


def test_captions_come_back_from_their_tokens():
    assert len(CAPTIONS) == len(CLASSES)
    for captions in CAPTIONS:
        rows = tokens(captions)
        assert rows.shape == (len(captions), LENGTH) and rows.dtype == np.int32
        assert [words(row) for row in rows] == list(captions)
        for row in rows:  # nothing between the words and the end
            used = np.count_nonzero(row)
            assert (row[:used] > 0).all() and (row[used:] == 0).all()


def test_each_class_has_captions_of_its_own():
    every = [caption for captions in CAPTIONS for caption in captions]
    assert len(set(every)) == len(every)
    assert len({len(captions) for captions in CAPTIONS}) == 1
    assert "an ankle boot" in CAPTIONS[CLASSES.index("ankle boot")]
    assert "a pair of sneakers" in CAPTIONS[CLASSES.index("sneaker")]


def test_no_caption_is_zeros_and_case_does_not_matter():
    assert tokens([]).shape == (0, LENGTH)
    np.testing.assert_array_equal(tokens(["An Ankle  BOOT "]), tokens(["an ankle boot"]))


@pytest.mark.parametrize(
    "caption, words",
    [
        ("an ankle bootz.", "did you mean boot?"),
        ("", "has no words"),
        (" . ", "has no words"),
        ("a zeppelin", "'zeppelin' is in no caption"),
        ("a " * 9, "9 words: use at most 8"),
    ],
)
def test_words_that_were_never_seen(caption, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        tokens([caption])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 99))
def test_drawn_captions_are_of_their_class(labels, seed):
    drawn = TABLE.draw(np.random.default_rng(seed), np.array(labels), 0.0)
    assert drawn.shape == (len(labels), LENGTH) and drawn.dtype == np.int32
    assert all(words(row) in CAPTIONS[label] for row, label in zip(drawn, labels, strict=True))
    np.testing.assert_array_equal(drawn, TABLE.draw(np.random.default_rng(seed), np.array(labels), 0.0))


def test_all_captions_are_drawn_alike():
    drawn = [words(row) for row in TABLE.draw(np.random.default_rng(0), np.full(9000, 3), 0.0)]
    counts = np.array([drawn.count(caption) for caption in CAPTIONS[3]])
    assert counts.sum() == 9000 and (abs(counts - 1000) < 150).all()


def test_captions_in_turn():
    assert [words(row) for row in TABLE.rows(12)] == [CAPTIONS[i % 10][0] for i in range(12)]
