"""Pictures: values, layout, and what another program reads from the files."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ms_diffusion.images import CAPTION, GAP, picture_size, save_gif, save_grid, save_loss_curve, show_grid, to_uint8
from ms_diffusion.images import grid as make_grid


def numbered(n, height=2, width=3, channels=1):
    """Image i is filled with i + 1 times 10, so that none is the black between."""
    values = 10 * np.arange(1, n + 1, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (n, height, width, channels)).copy()


def files(folder):
    return sorted(p.name for p in folder.iterdir())


# Values


def test_to_uint8_gives_known_values():
    """[-1, 1] to [0, 255], rounded, clipped."""
    x = np.array([-1, 1, -0.5, 0.5, 0.2, -9, 9, -np.inf, np.inf], np.float32)
    assert to_uint8(x.reshape(1, 1, 1, 9)).ravel().tolist() == [0, 255, 64, 191, 153, 0, 255, 0, 255]


def test_to_uint8_undoes_the_scaling_of_pixels():
    pixels = np.arange(256, dtype=np.uint8)
    x = pixels / np.float32(127.5) - 1
    np.testing.assert_array_equal(to_uint8(x.reshape(1, 1, 16, 16)).ravel(), pixels)


@pytest.mark.parametrize("n", [1, 13])
def test_to_uint8_puts_channels_last(n):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 4, 5))
    images = to_uint8(pixels / 127.5 - 1)
    assert images.shape == (n, 4, 5, 3) and images.dtype == np.uint8
    for c in range(3):
        np.testing.assert_array_equal(images[..., c], pixels[:, c])


# Layout


def test_grid_by_hand():
    """Three 1x2 images in two columns, two black pixels around each; the fourth place stays black."""
    sheet = make_grid(np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.uint8)[..., None], columns=2)
    expected = [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 2, 0, 0, 3, 4, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 5, 6, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert sheet.dtype == np.uint8
    assert sheet[..., 0].tolist() == expected


@pytest.mark.parametrize(
    ("n", "columns", "rows_columns"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (13, None, (4, 4)), (13, 5, (3, 5)), (2, 5, (1, 5))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_goes_row_by_row(n, columns, rows_columns, channels):
    """By default as square as it can be. Every image fills its place, and nothing else is lit."""
    rows, wide = rows_columns
    sheet = make_grid(numbered(n, channels=channels), columns)
    assert sheet.shape == (2 + 4 * rows, 2 + 5 * wide, channels)
    for i in range(n):
        row, column = divmod(i, wide)
        assert (sheet[2 + 4 * row : 4 + 4 * row, 2 + 5 * column : 5 + 5 * column] == 10 * (i + 1)).all()
    assert (sheet > 0).sum() == n * 2 * 3 * channels


# Files


@pytest.mark.parametrize(("channels", "mode", "scale"), [(1, "L", 1), (3, "RGB", 3)])
def test_png_reads_back_equal(tmp_path, channels, mode, scale):
    images = np.random.default_rng(0).integers(0, 256, (13, 4, 5, channels)).astype(np.uint8)
    path = tmp_path / "new" / "folder" / "grid.png"
    save_grid(path, images, scale=scale)
    expected = make_grid(images).repeat(scale, 0).repeat(scale, 1)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        np.testing.assert_array_equal(picture, expected[..., 0] if channels == 1 else expected)
        np.testing.assert_array_equal(picture, show_grid(images, scale=scale))
    assert files(path.parent) == ["grid.png"] and picture_size(path) == expected.shape[:2]


@pytest.mark.parametrize(("n", "columns", "scale", "channels"), [(4, None, 3, 1), (10, 4, 2, 3)])
def test_captions_are_below_their_images(n, columns, scale, channels):
    """The pixels of the images do not change, and only they and something white in the strip below each are not black."""
    images = np.random.default_rng(0).integers(0, 256, (n, 28, 26, channels)).astype(np.uint8)
    names = ["T-shirt", "bag", "ankle boot", "pullover"]
    pixels = np.asarray(show_grid(images, columns, scale, [names[i % 4] for i in range(n)]).convert("RGB"))
    wide = columns or 2
    height, width = 28 + CAPTION + GAP, 26 + GAP
    assert pixels.shape == (scale * (-(-n // wide) * height + GAP), scale * (wide * width + GAP), 3)
    rest = pixels.copy()
    for i, image in enumerate(images):
        top, left = scale * (GAP + i // wide * height), scale * (GAP + i % wide * width)
        place = slice(top, top + scale * 28), slice(left, left + scale * 26)
        expected = np.broadcast_to(image, (28, 26, 3)).repeat(scale, 0).repeat(scale, 1)
        np.testing.assert_array_equal(pixels[place], expected)
        strip = slice(place[0].stop, place[0].stop + scale * CAPTION), place[1]
        assert pixels[strip].max() > 200 and 0.02 < (pixels[strip] > 60).mean() < 0.5
        assert (pixels[strip] == pixels[strip][..., :1]).all()  # gray
        rest[place] = rest[strip] = 0
    assert not rest.any()


def test_captions_differ_and_may_be_empty_or_fewer():
    images, strips = numbered(3, 28, 28), []
    for captions in (["bag", "bag", "coat"], ["bag", ""], []):
        pixels = np.asarray(show_grid(images, 3, 2, captions))
        strips.append([pixels[60:70, 4 + 60 * i : 60 + 60 * i] for i in range(3)])
    bag, bag_again, coat = strips[0]
    np.testing.assert_array_equal(bag, bag_again)
    np.testing.assert_array_equal(bag, strips[1][0])
    assert not np.array_equal(bag, coat)
    assert not any(strip.any() for strip in (*strips[1][1:], *strips[2]))


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_its_frames(tmp_path, frames, channels):
    """As many as given, of the grid's size, in order, without end; the last stays for two seconds."""
    pictures = [numbered(4, 4, 5, channels) + np.uint8(20 * i) for i in range(frames)]
    save_gif(tmp_path / "a.gif", pictures, columns=2, scale=2, milliseconds=50)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.format == "GIF" and gif.size == (2 * (2 + 7 * 2), 2 * (2 + 6 * 2))
        assert getattr(gif, "n_frames", 1) == frames
        durations = []
        for picture, frame in zip(pictures, ImageSequence.Iterator(gif), strict=True):
            expected = make_grid(picture, 2).repeat(2, 0).repeat(2, 1)
            np.testing.assert_array_equal(
                np.asarray(frame.convert("RGB")), np.broadcast_to(expected, (*expected.shape[:2], 3))
            )
            durations.append(frame.info.get("duration"))
        if frames > 1:
            assert durations == [50] * (frames - 1) + [2000]
            assert gif.info["loop"] == 0
    assert files(tmp_path) == ["a.gif"]


@pytest.mark.parametrize(("n", "scores"), [(1, ()), (200, [(50, 90.0), (100, 30.0), (200, 8.0)])])
def test_curve_is_written(tmp_path, n, scores):
    """With too few points to smooth and with enough; the scores are dots."""
    losses = list(np.exp(-np.linspace(0, 3, n)))
    save_loss_curve(tmp_path / "loss.png", list(range(1, n + 1)), losses, scores)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    orange, green = (abs(pixels - color).sum(-1) < 30 for color in ([255, 127, 14], [44, 160, 44]))  # matplotlib's C1, C2
    assert orange.any() == (n >= 20) and green.any() == bool(scores)
    assert files(tmp_path) == ["loss.png"]
