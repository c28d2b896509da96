"""Pictures of points: what is drawn where, unusual points, files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_hex
from PIL import Image, ImageSequence

from ms_diffusion import plots2d
from ms_diffusion.plots2d import (
    grid_points,
    limits,
    points_image,
    save_panels,
    save_points_gif,
    save_samples,
    save_score_field,
    save_trajectories,
)


def cloud(n, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in order; their files are written as well."""
    drawn, save = [], plots2d._save
    monkeypatch.setattr(plots2d, "_save", lambda path, figure: (drawn.append(figure), save(path, figure)))
    return drawn


def picture(path):
    with Image.open(path) as image:
        return image.format, image.size


def files(folder):
    return sorted(p.name for p in folder.iterdir())


# Limits and grids


def points(bound):
    elements = st.floats(-bound, bound, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
    return arrays(np.float32, st.tuples(st.integers(0, 30), st.just(2)), elements=elements)


@given(st.lists(points(8) | points(2.0**100), max_size=3), st.sampled_from([0.0, 1e6]))
@settings(deadline=None, max_examples=60)
def test_limits_are_square_and_hold_few_points_whole(sets, offset):
    """Of fewer than 500 points, 99.8 % are all; on every side 4 % of the width between the farthest are left."""
    sets = [np.float64(s) + offset for s in sets]
    (left, right), (bottom, top) = limits(*sets)
    assert np.isfinite([left, right, bottom, top]).all() and left < right and bottom < top
    assert right - left == pytest.approx(top - bottom, rel=1e-6)
    finite = np.concatenate([np.zeros((0, 2)), *(s[np.isfinite(s).all(1)] for s in sets)])
    assert ((finite > [left, bottom]) & (finite < [right, top])).all()


@pytest.mark.parametrize("offset", [0, -1e6])
def test_limits_by_hand(offset):
    """The wider side, 2.0 long, and 8 % of it; the other as long, about its own middle."""
    box = np.array([[0, 0], [2, 1]]) + offset
    np.testing.assert_allclose(limits(box), np.array([[-0.08, 2.08], [-0.58, 1.58]]) + offset, rtol=1e-14)
    np.testing.assert_allclose(limits(box[:1], box[1:]), limits(box), rtol=1e-14)


def test_limits_leave_out_the_tails():
    """2 of 10,000 points far away do not count; as a set of their own they do."""
    near, far = cloud(10000), np.array([[1e4, 0], [0, -1e4]])
    (left, right), (bottom, top) = limits(np.concatenate([near, far]))
    assert -5 < left < -2.8 and 2.8 < right < 5 and -5 < bottom < -2.8 and 2.8 < top < 5
    inside = ((near > [left, bottom]) & (near < [right, top])).all(1)
    assert inside.mean() > 0.996
    (left, right), (bottom, top) = limits(near, far)
    assert right > 1e4 and bottom < -1e4


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6, -1e30, 1e-40])
def test_limits_of_one_place_have_a_width(value):
    for n in (1, 7):
        for low, high in limits(np.full((n, 2), value)):
            assert low < value < high and np.nextafter(low, high) < (low + high) / 2 < high


def test_limits_of_nothing():
    assert limits() == limits(np.zeros((0, 2)), [[np.nan, 0]]) == ((-1, 1), (-1, 1))


def test_grid_points_by_hand():
    """The centres of the cells, as the rows of a picture from below."""
    grid = grid_points(((0, 4), (10, 12)), 2)
    assert grid.dtype == np.float32
    assert grid.tolist() == [[1, 10.5], [3, 10.5], [1, 11.5], [3, 11.5]]
    assert grid_points(((-1, 1), (-1, 1))).shape == (400, 2)


# What is drawn


def axes_of(figure):
    """The panels, which have the same limits and the same square size."""
    panels = figure.axes
    assert len({(a.get_xlim(), a.get_ylim()) for a in panels}) == 1
    boxes = [a.get_window_extent() for a in panels]
    assert all(b.width == pytest.approx(b.height, abs=0.5) for b in boxes)
    assert not any(b.overlaps(other) for i, b in enumerate(boxes) for other in boxes[:i])
    return panels


@pytest.mark.parametrize(("n", "size"), [(1, 100), (7, 2000)])
def test_panels(tmp_path, figures, n, size):
    """In order, all the points of each, on axes that hold the widest."""
    clouds = [cloud(size, i, 1 + i) for i in range(n)]
    save_panels(tmp_path / "new" / "a.png", clouds, [f"t = {i}" for i in range(n)])
    panels = axes_of(figures[0])
    assert [a.get_title() for a in panels] == [f"t = {i}" for i in range(n)]
    for axes, points in zip(panels, clouds, strict=True):
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), points)
    np.testing.assert_allclose((panels[0].get_xlim(), panels[0].get_ylim()), limits(*clouds))
    assert picture(tmp_path / "new" / "a.png")[0] == "PNG"
    assert files(tmp_path / "new") == ["a.png"]


def test_columns(tmp_path, figures):
    """The last row may be short; where nothing is below, the ticks have labels."""
    save_panels(tmp_path / "a.png", [cloud(9, i) for i in range(5)], list("abcde"), columns=3)
    panels = axes_of(figures[0])
    rows = [round(a.get_window_extent().y0) for a in panels]
    assert rows[0] == rows[1] == rows[2] > rows[3] == rows[4]
    assert [a.xaxis.get_tick_params()["labelbottom"] for a in panels] == [False, False, True, True, True]
    assert [a.yaxis.get_tick_params()["labelleft"] for a in panels] == [True, False, False, True, False]


def test_points_image():
    """Blue points above gray data, on the data's axes."""
    image = points_image(cloud(300), cloud(3000, 1))
    pixels = np.asarray(image.convert("RGB")).astype(int)
    blue, gray = pixels[..., 2] - pixels[..., 0] > 60, np.ptp(pixels, axis=-1) < 5
    assert blue.mean() > 0.005 and (gray & (pixels[..., 0] < 240)).mean() > 0.01 and (pixels == 255).all(-1).mean() > 0.3
    assert points_image(cloud(3)).size == image.size


def test_samples_outside_are_counted(tmp_path, figures):
    """The axes are the data's, however far away a sample is; samples that are not finite count as outside."""
    data, samples = cloud(500), 0.5 * cloud(40, 1)
    samples[:5] = [[100, 0], [0, -100], [np.nan, 0], [0, np.inf], [-1e38, 1e38]]
    save_samples(tmp_path / "a.png", samples, data, "DDIM")
    left, right = axes_of(figures[0])
    assert right.texts[0].get_text() == "5 of 40 outside"
    np.testing.assert_allclose((right.get_xlim(), right.get_ylim()), limits(data))
    np.testing.assert_array_equal(left.lines[0].get_xydata(), data)
    assert figures[0].get_suptitle() == "DDIM"
    assert picture(tmp_path / "a.png")[0] == "PNG"


def test_density_is_where_the_points_are():
    """[y, x] from below; a Gaussian about one point, 1 at most."""
    density = plots2d._density([[0.76, 9.51]] * 3, ((-1, 1), (9, 11)))
    assert density.shape == (80, 80) and density.max() == 1
    assert np.unravel_index(density.argmax(), density.shape) == (20, 70)
    assert density[20, 73] == pytest.approx(np.exp(-2)) and density[23, 70] == pytest.approx(np.exp(-2))
    assert not plots2d._density(np.zeros((0, 2)), ((-1, 1), (-1, 1))).any()


@pytest.mark.parametrize("offset", [0, 1e6])
def test_arrows_follow_the_score(tmp_path, figures, offset):
    """Its direction and the cube root of its length, by the panel's 95 %: a factor in a panel's scores changes nothing."""
    data = np.float64(cloud(300)) + offset
    grid = np.float64(grid_points(limits(cloud(300)), 20)) + offset
    score = offset - grid
    score[7] = np.nan
    score[8] = 0
    save_score_field(tmp_path / "a.png", [(data, grid, 500 * score), (data, grid, score)], ["t = 0", "t = 9"])
    image = figures[0].axes[0].images[0]
    assert image.origin == "lower" and image.get_extent() == pytest.approx(np.ravel(limits(data)).tolist())
    arrows = [next(c for c in a.collections if hasattr(c, "U")) for a in axes_of(figures[0])]
    np.testing.assert_allclose(arrows[0].U, arrows[1].U, rtol=1e-9)
    np.testing.assert_allclose(arrows[0].V, arrows[1].V, rtol=1e-9)
    keep = np.arange(400) != 7
    np.testing.assert_array_equal(arrows[0].XY, grid[keep])
    score, drawn = score[keep], np.stack([arrows[0].U, arrows[0].V], -1)
    length = np.linalg.norm(score, axis=1)
    expected = np.cbrt(np.minimum(length / np.quantile(length, 0.95), 1)) / 20  # of the panel's width
    np.testing.assert_allclose(drawn * length[:, None], score * expected[:, None], atol=1e-9)
    assert (drawn[7] == 0).all()


def test_paths_have_their_ends(tmp_path, figures):
    """From a circle at x_T to a dot at x_0, in a point's colour, above the data; only the first points."""
    rng = np.random.default_rng(0)
    paths = {"ddpm": rng.standard_normal((11, 30, 2)), "ddim": np.linspace(cloud(30, 1), cloud(30, 2, 9), 5)}
    data = cloud(200)
    save_trajectories(tmp_path / "a.png", paths, data, count=4)
    panels = axes_of(figures[0])
    assert [a.get_title() for a in panels] == ["ddpm", "ddim"]
    colors = []
    for axes, path in zip(panels, paths.values(), strict=True):
        cloud_drawn, *lines = axes.lines
        np.testing.assert_array_equal(cloud_drawn.get_xydata(), data)
        assert len(lines) == 3 * 4
        for i in range(4):
            way, start, end = lines[3 * i : 3 * i + 3]
            np.testing.assert_array_equal(way.get_xydata(), path[:, i])
            np.testing.assert_array_equal(start.get_xydata(), path[:1, i])
            np.testing.assert_array_equal(end.get_xydata(), path[-1:, i])
            assert start.get_markerfacecolor() == "white" and to_hex(end.get_markerfacecolor()) == to_hex(way.get_color())
            assert start.zorder == end.zorder > way.zorder
        colors.append([to_hex(line.get_color()) for line in lines])
        for (low, high), ends in zip((axes.get_xlim(), axes.get_ylim()), path[[0, -1], :4].reshape(-1, 2).T, strict=True):
            assert low < ends.min() and ends.max() < high
    assert colors[0] == colors[1] and len(set(colors[0])) == 4


def test_ends_of_few_paths_are_not_a_tail_of_the_data(tmp_path, figures):
    path = np.zeros((1001, 1, 2))
    path[0] = 9
    save_trajectories(tmp_path / "a.png", {"ddim": path}, cloud(20000, 0, 0.1))
    assert figures[0].axes[0].get_xlim()[1] > 9


# Animations


@pytest.mark.parametrize(("n", "frames"), [(1, 1), (2000, 4), (1, 40)])
def test_gif_moves(tmp_path, n, frames):
    """Each frame is drawn, the last for two seconds; the points move from left to right."""
    moving = [0.2 * cloud(n) + [8 * i / frames, 0] for i in range(frames)]
    save_points_gif(tmp_path / "a.gif", moving, cloud(200, 1), [f"t = {i}" for i in range(frames)])
    middles, durations = [], []
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.format, gif.size, getattr(gif, "n_frames", 1)) == ("GIF", (360, 360), frames)
        for frame in ImageSequence.Iterator(gif):
            pixels = np.asarray(frame.convert("RGB")).astype(int)
            middles.append(np.nonzero(pixels[..., 2] - pixels[..., 0] > 80)[1].mean())
            durations.append(frame.info.get("duration"))
        assert frames == 1 or durations == [60] * (frames - 1) + [2000] and gif.info["loop"] == 0
    assert (np.diff(middles) > 2).all()
    assert files(tmp_path) == ["a.gif"]


def test_gif_has_one_palette(tmp_path):
    """What does not move keeps its pixels, whatever the rest does: nothing flickers."""
    frames = [cloud(500, i, 1 + i / 3) for i in range(9)]
    frames = [np.concatenate([f[f[:, 0] > 0.5], [[-9, -9], [9, 9]]]) for f in frames]
    save_points_gif(tmp_path / "a.gif", frames, cloud(3000, 10) - [4, 0])
    with Image.open(tmp_path / "a.gif") as gif:
        pixels = np.stack([np.asarray(frame.convert("RGB"))[30:340, 20:130] for frame in ImageSequence.Iterator(gif)])
    assert len(pixels) == 9 and (pixels == pixels[0]).all()
    assert len(np.unique(pixels[0])) > 3


# Odd points, files


ODD = {
    "one": np.zeros((1, 2)),
    "equal": np.full((9, 2), 3.0),
    "none": np.zeros((0, 2)),
    "not finite": np.full((3, 2), np.nan),
    "some not finite": np.array([[np.nan, 1], [np.inf, 1], [0, -np.inf], [1, 2], [3, 4], [1e300, -1e300]]),
    "far": cloud(50) + np.array([1e6, -1e6]),
    "huge": np.float32([[1e38, -1e38], [3e38, 1e38]]),
    "far and near": np.float32([[1e38, -1e38], [0, 1]]),
    "tiny": np.float32([[1e-40, 0], [0, 2e-40]]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_points(tmp_path, name):
    """Every picture is drawn, beside other points or alone, without a warning (an error in these tests)."""
    points, other = ODD[name], cloud(20)
    save_samples(tmp_path / "samples.png", points, other)
    save_score_field(tmp_path / "score.png", [(points, points, points)], ["alone"])
    if name in ("one", "none", "some not finite", "huge"):
        save_trajectories(tmp_path / "trajectories.png", {"a": np.stack([points, -points, points])}, other)
        save_points_gif(tmp_path / "moving.gif", [points, -points, other], points)
    for name in files(tmp_path):
        with Image.open(tmp_path / name) as image:
            image.load()


def test_points_that_are_not_finite_are_left_out(tmp_path, figures):
    save_panels(tmp_path / "a.png", [ODD["some not finite"], ODD["not finite"]], ["a", "b"])
    some, none = axes_of(figures[0])
    assert some.lines[0].get_xydata().tolist() == [[1, 2], [3, 4]]
    assert len(none.lines[0].get_xydata()) == 0


def test_a_failure_leaves_the_old_file(tmp_path):
    """Whether it fails before the file is opened or while it is written."""
    for name in ("a.png", "a.gif"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ValueError):
        save_panels(tmp_path / "a.png", [cloud(5)] * 2, ["a", "b", "c"])
    with pytest.raises(IndexError):
        save_points_gif(tmp_path / "a.gif", [cloud(5, i) for i in range(4)], titles=["a", "b", "c"])
    assert files(tmp_path) == ["a.gif", "a.png"] and all(p.read_bytes() == b"old" for p in tmp_path.iterdir())


def test_matplotlib_is_loaded_late_and_pyplot_never(tmp_path):
    """pyplot keeps its figures, and looks for a display."""
    code = """
import sys, numpy as np
from ms_diffusion import plots2d
assert "matplotlib" not in sys.modules and "mindspore" not in sys.modules
p = np.eye(2)
plots2d.points_image(p, p)
plots2d.save_score_field("c.png", [(p, p, p)], ["c"])
plots2d.save_trajectories("d.png", {"d": p[None]}, p)
plots2d.save_points_gif("e.gif", [p])
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(plots2d.__file__).parents[1])}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert files(tmp_path) == ["c.png", "d.png", "e.gif"]
