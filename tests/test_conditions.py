"""Conditions made of images: their shapes, and each kind by its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_diffusion.data.conditions import KINDS, condition_channels, condition_image

examples = settings(deadline=None, max_examples=50)
kinds = st.sampled_from([kind for kind in KINDS if kind != "none"])


def images(b, c, height, width, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (b, c, height, width)).astype(np.float32)


def test_channels_by_hand():
    assert {kind: [condition_channels(kind, c) for c in (1, 3)] for kind in KINDS} == {
        "none": [0, 0],
        "lowres": [1, 3],
        "gray": [1, 1],
        "mask": [2, 4],
    }


@examples
@given(
    kind=kinds,
    b=st.sampled_from([1, 4, 13]),
    c=st.sampled_from([1, 3]),
    lowres_size=st.integers(1, 6),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**32),
)
def test_shape_range_and_repetition(kind, b, c, lowres_size, blocks, seed):
    """As many channels as said, float32 in [-1, 1], the same from the same rng; the images themselves stay as they are."""
    x = images(b, c, lowres_size * blocks[0], lowres_size * blocks[1])
    before = x.copy()
    shown = condition_image(kind, x, lowres_size, np.random.default_rng(seed))
    assert shown.shape == (b, condition_channels(kind, c), *x.shape[2:]) and shown.dtype == np.float32
    assert abs(shown).max() <= 1
    np.testing.assert_array_equal(shown, condition_image(kind, x, lowres_size, np.random.default_rng(seed)))
    np.testing.assert_array_equal(x, before)


@examples
@given(kind=kinds, b=st.integers(1, 5), more=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_an_image_owes_nothing_to_those_after_it(kind, b, more, seed):
    x = images(b + more, 2, 8, 8)
    few, many = (condition_image(kind, part, 4, np.random.default_rng(seed)) for part in (x[:b], x))
    np.testing.assert_array_equal(few, many[:b])


# Low resolution


def test_low_resolution_by_hand():
    x = np.array([[0, 1, -1, -1], [0.5, 0.5, 1, 0]], np.float32)[None, None]
    shown = condition_image("lowres", x, 1, None)[0, 0]
    np.testing.assert_array_equal(shown, [[0.125] * 4] * 2)
    shown = condition_image("lowres", x, 2, None)[0, 0]  # 2 x 2 blocks of 1 x 2 pixels
    np.testing.assert_array_equal(shown, [[0.5, 0.5, -1, -1], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize("lowres_size", [1, 2, 7, 14, 28])
def test_low_resolution_is_the_mean_of_blocks(lowres_size):
    x, block = images(3, 3, 28, 28), 28 // lowres_size
    shown = condition_image("lowres", x, lowres_size, None)
    for top in range(0, 28, block):
        for left in range(0, 28, block):
            part = np.s_[:, :, top : top + block, left : left + block]
            mean = x[part].astype(np.float64).mean((2, 3), keepdims=True)
            np.testing.assert_allclose(shown[part], np.broadcast_to(mean, x[part].shape), atol=1e-6)
    again = condition_image("lowres", shown, lowres_size, None)
    np.testing.assert_allclose(again, shown, atol=1e-6)
    if lowres_size == 28:
        np.testing.assert_array_equal(shown, x)


@pytest.mark.parametrize("shape, lowres_size", [((2, 1, 28, 28), 7), ((5, 3, 32, 64), 8), ((1, 2, 12, 18), 6)])
def test_low_resolution_is_pytorchs(shape, lowres_size):
    torch = pytest.importorskip("torch")
    x = images(*shape)
    small = torch.nn.functional.avg_pool2d(torch.tensor(x), (shape[2] // lowres_size, shape[3] // lowres_size))
    large = torch.nn.functional.interpolate(small, size=shape[2:], mode="nearest")
    np.testing.assert_allclose(condition_image("lowres", x, lowres_size, None), large.numpy(), atol=1e-6)


# Gray


def test_gray_is_the_mean_of_the_channels():
    x = images(4, 3, 6, 8)
    shown = condition_image("gray", x, 7, None)
    np.testing.assert_allclose(shown[:, 0], (x[:, 0] + x[:, 1] + x[:, 2]) / 3, atol=1e-6)
    np.testing.assert_array_equal(condition_image("gray", x[:, :1], 7, None), x[:, :1])


# Mask


def rectangle(hidden):
    """(top, left, height, width) of the one rectangle of ones in hidden (H, W), which is -1 elsewhere."""
    rows, columns = np.flatnonzero((hidden == 1).any(1)), np.flatnonzero((hidden == 1).any(0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    expected = -np.ones_like(hidden)
    expected[top : top + height, left : left + width] = 1
    np.testing.assert_array_equal(hidden, expected)
    return top, left, height, width


@examples
@given(
    c=st.sampled_from([1, 3]),
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    seed=st.integers(0, 2**32),
)
def test_a_mask_hides_a_rectangle(c, height, width, seed):
    """From a quarter to three quarters of each side, 0 in the image, 1 in the last channel; all else is left as it was."""
    x = images(5, c, height, width)
    x[x == 0] = 0.5
    shown = condition_image("mask", x, 7, np.random.default_rng(seed))
    for image, original in zip(shown, x, strict=True):
        _, _, h, w = rectangle(image[-1])
        assert height // 4 <= h <= height * 3 // 4 and width // 4 <= w <= width * 3 // 4
        hidden = image[-1] == 1
        assert (image[:-1, hidden] == 0).all()
        np.testing.assert_array_equal(image[:-1, ~hidden], original[:, ~hidden])


def test_masks_are_of_every_size_and_everywhere():
    x = images(4000, 1, 8, 12)
    found = [rectangle(image[-1]) for image in condition_image("mask", x, 7, np.random.default_rng(0))]
    assert {h for _, _, h, _ in found} == {2, 3, 4, 5, 6} and {w for _, _, _, w in found} == set(range(3, 10))
    for h in range(2, 7):
        assert {top for top, _, height, _ in found if height == h} == set(range(8 - h + 1))
    for w in range(3, 10):
        assert {left for _, left, _, width in found if width == w} == set(range(12 - w + 1))
    assert abs(np.corrcoef([h for _, _, h, _ in found], [w for _, _, _, w in found])[0, 1]) < 5 / np.sqrt(4000)
