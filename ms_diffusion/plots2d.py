"""Pictures of diffusion in the plane: points, score fields, trajectories of samplers.

Points are arrays (n, 2) in the data's own units. The panels of a picture have the same square axes. Points that are not
finite are not drawn.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from .files import write

Limits = tuple[tuple[float, float], tuple[float, float]]  # ((left, right), (bottom, top))
Field = tuple[np.ndarray, np.ndarray, np.ndarray]  # points (n, 2), grid (m, 2), score (m, 2) on the grid

DPI = 120
BLUE, GRAY, DARK = "#1f4e9c", "#b8b8b8", "#222222"
HUGE = 1e100  # larger numbers count as not finite, so that no sum or square overflows


def _finite(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    return points[(np.abs(points) < HUGE).all(-1)]  # False for nan


def limits(*sets: np.ndarray) -> Limits:
    """Square axis limits that hold the central 99.8 % of the x and of the y of each set of points, and 8 % margin.

    Each set counts by itself, so that a small set (the ends of trajectories) is not treated as the tail of a large one. The
    limits of no points are [-1, 1].
    """
    finite = [points for points in map(_finite, sets) if len(points)] or [np.array([[-1.0, -1.0], [1.0, 1.0]]) / 1.08]
    low = np.min([np.quantile(points, 0.001, 0, method="lower") for points in finite], 0)
    high = np.max([np.quantile(points, 0.999, 0, method="higher") for points in finite], 0)
    middle, half = (low + high) / 2, 1.08 * (high - low).max() / 2
    far = np.abs(middle).max()
    if half <= max(1e-9 * far, 1e-30):  # one point, or too narrow for distinct ticks
        half = max(0.5, 1e-3 * far)
    (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
    return (left, right), (bottom, top)


def grid_points(limits: Limits, n: int = 20) -> np.ndarray:
    """(n * n, 2) float32: the centers of n x n equal cells of the limits, row by row from the bottom left."""
    centers = (np.arange(n) + 0.5) / n
    x, y = (low + (high - low) * centers for low, high in limits)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)


def _figure(titles, limits, columns, inches):
    """A figure and one panel of `inches` for each title, all with the same limits; tick labels at the left and bottom."""
    from matplotlib.figure import Figure  # takes a second to import

    n, columns = len(titles), min(columns, len(titles))
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * inches + 0.3, rows * (inches + 0.15) + 0.2))
    figure.set_layout_engine("compressed", w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axes in enumerate(panels[:n]):
        left, bottom = i % columns == 0, i + columns >= n
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.set_title(titles[i], fontsize=9, pad=3)
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7, length=2, pad=2, labelleft=left, labelbottom=bottom)
        axes.xaxis.offsetText.set(visible=bottom, fontsize=7)  # "+1e6"
        axes.yaxis.offsetText.set(visible=left, fontsize=7)
        axes.spines[:].set(linewidth=0.6, color=GRAY)
    for axes in panels[n:]:
        axes.remove()
    return figure, list(panels[:n])


def _save(path, figure):
    write(path, lambda f: figure.savefig(f, format="png", dpi=DPI))


def _dots(axes, points, color, n=None, scale=1.0):
    """Draw points as dots. The more points (n, by default their number), the smaller and paler the dots; `scale` is the
    panel's width relative to the small panels."""
    points = _finite(points)
    crowd = max(n or len(points), 1) / scale**2
    alpha, size = np.clip((crowd / 100) ** -0.35, 0.15, 0.9), np.clip(6 * crowd**-0.2, 0.8, 3)
    return axes.plot(*points.T, "o", color=color, markersize=size, markeredgewidth=0, alpha=alpha)[0]


def points_image(points: np.ndarray, data: np.ndarray | None = None) -> Image.Image:
    """A picture of points (n, 2), above `data` (m, 2) in gray, whose axes hold the data, or else the points."""
    figure, (axes,) = _figure([""], limits(points if data is None else data), 1, 3.5)
    if data is not None:
        _dots(axes, data, GRAY, scale=2)
    _dots(axes, points, BLUE, scale=2)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=DPI)
    return Image.open(buffer)


def save_panels(path: str | Path, panels: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5) -> None:
    """Write a PNG of sets of points (n, 2), row by row, such as the noised data at ten timesteps."""
    figure, all_axes = _figure(titles, limits(*panels), columns, 1.8)
    for axes, points in zip(all_axes, panels, strict=True):
        _dots(axes, points, BLUE)
    _save(path, figure)


def save_samples(path: str | Path, samples: np.ndarray, data: np.ndarray, title: str = "") -> None:
    """Write a PNG with data at the left and samples at the right, both (n, 2), on axes that hold the data.

    A text in the right panel says how many samples lie outside the axes; those that are not finite count as outside.
    """
    low, high = np.transpose(bounds := limits(data))
    figure, (left, right) = _figure(["data", "samples"], bounds, 2, 3.5)
    _dots(left, data, DARK, scale=2)
    _dots(right, samples, BLUE, scale=2)
    inside = _finite(samples)
    outside = len(samples) - int(((low <= inside) & (inside <= high)).all(-1).sum())
    place = {"transform": right.transAxes, "ha": "right", "va": "bottom", "fontsize": 8, "color": DARK}
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    right.text(0.98, 0.02, f"{outside} of {len(samples)} outside", **place)
    if title:
        figure.suptitle(title, fontsize=10)
        figure.set_figheight(figure.get_figheight() + 0.2)
    _save(path, figure)


def _density(points: np.ndarray, limits: Limits, bins: int = 80) -> np.ndarray:
    """(bins, bins), [y, x]: counts of the points, smoothed by a Gaussian of 1.5 bins and divided by their maximum."""
    x, y = _finite(points).T
    counts = gaussian_filter(np.histogram2d(y, x, bins, limits[::-1])[0], 1.5, mode="constant")
    return counts / (counts.max() or 1)


def save_score_field(path: str | Path, panels: Sequence[Field], titles: Sequence[str], bounds: Limits | None = None) -> None:
    """Write a PNG with the density of points in orange and the score as arrows, which are centered on the grid.

    Scores near t = 0 are hundreds of times as large as those near T. Therefore the length of an arrow is the cube root of
    the score's length divided by the panel's 95 % quantile, at most 1, in units of the spacing of a grid that fills the
    panel: lengths can be compared within a panel only. `bounds` are the axes' limits, by default those of all points.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", ["white", "#fdb863", "#f17c0e"])
    bounds = bounds or limits(*(points for points, _, _ in panels))
    figure, all_axes = _figure(titles, bounds, 5, 2.4)
    for axes, (points, grid, score) in zip(all_axes, panels, strict=True):
        style = {"origin": "lower", "cmap": colors, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
        axes.imshow(np.sqrt(_density(points, bounds)), extent=(*bounds[0], *bounds[1]), **style)
        x, y, u, v = _finite(np.concatenate([grid, score], -1)).T
        if not len(x):
            continue
        length = np.hypot(u, v)
        longest = np.quantile(length, 0.95) or length.max() or 1
        factor = np.cbrt(np.minimum(length / longest, 1)) / np.where(length > 0, length, 1) / np.sqrt(len(grid))
        arrows = {"angles": "uv", "scale_units": "width", "scale": 1, "pivot": "mid", "units": "width", "width": 0.0045}
        axes.quiver(x, y, u * factor, v * factor, color=DARK, headwidth=3.5, headlength=3.5, headaxislength=3, **arrows)
    _save(path, figure)


def save_trajectories(path: str | Path, trajectories: Mapping[str, np.ndarray], data: np.ndarray, count: int = 12) -> None:
    """Write a PNG of the trajectories of the first `count` points from x_T (circle) to x_0 (dot), above data (n, 2) in gray.

    Each of the trajectories, name -> (steps + 1, n, 2) from x_T to x_0, has a panel. A point has the same colour in all.
    """
    from matplotlib import colormaps

    xs = {name: np.asarray(x, np.float64)[:, :count] for name, x in trajectories.items()}
    ends = [x[i] for x in xs.values() for i in (0, -1)]  # as sets of their own, so that all are inside the limits
    bounds = limits(data, *ends, *(x.reshape(-1, 2) for x in xs.values()))
    figure, all_axes = _figure(list(xs), bounds, 2 if len(xs) == 4 else 3, 3.5)
    for axes, x in zip(all_axes, xs.values(), strict=True):
        _dots(axes, data, GRAY, scale=2)
        for i, color in enumerate(colormaps["turbo"](np.linspace(0.05, 0.95, x.shape[1]))):
            axes.plot(*_finite(x[:, i]).T, color=color, linewidth=0.7, alpha=0.7)
            end = {"marker": "o", "color": color, "markersize": 5.5, "zorder": 3}  # above all lines
            axes.plot(*_finite(x[:1, i]).T, **end, markerfacecolor="white")
            axes.plot(*_finite(x[-1:, i]).T, **end, markeredgecolor="white", markeredgewidth=0.5)
    _save(path, figure)


def save_points_gif(
    path: str | Path, frames: Sequence[np.ndarray], data: np.ndarray | None = None, titles: Sequence[str] | None = None
) -> None:
    """Write moving points, a list of frames (n, 2), as an animated GIF of 360 x 360 pixels, above `data` (m, 2) in gray.

    The axes hold the first frame, the last frame and the data. A frame lasts 60 ms, the last one two seconds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bounds = limits(frames[0], frames[-1], *([] if data is None else [data]))
    canvas = FigureCanvasAgg(Figure(figsize=(3.6, 3.6), dpi=100))
    axes = canvas.figure.add_axes((0.04, 0.01, 0.92, 0.92), xlim=bounds[0], ylim=bounds[1], xticks=[], yticks=[])
    axes.spines[:].set(linewidth=0.6, color=GRAY)
    title = axes.set_title("", fontsize=9, pad=4)
    if data is not None:
        _dots(axes, data, GRAY, scale=2)
    dots = _dots(axes, frames[0], BLUE, max(map(len, frames)), scale=2)

    def draw(i: int) -> Image.Image:
        dots.set_data(*_finite(frames[i]).T)
        title.set_text(titles[i] if titles else "")
        canvas.draw()
        levels = np.round(np.asarray(canvas.buffer_rgba())[..., :3] / 17) * 17  # 16: few colours, white among them
        return Image.fromarray(levels.astype(np.uint8))

    # One palette for all frames, made from three of them: with a palette for each frame, colours would flicker
    some = Image.fromarray(np.concatenate([np.asarray(draw(i)) for i in (0, len(frames) // 2, len(frames) - 1)]))
    colors = [color for _, color in sorted(some.getcolors(some.width * some.height) or [], reverse=True)[:255]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.ravel(colors).tolist())
    pictures = (draw(i).quantize(palette=palette, dither=Image.Dither.NONE) for i in range(len(frames)))
    options = {"duration": [60] * (len(frames) - 1) + [2000], "loop": 0, "optimize": False}
    write(path, lambda f: next(pictures).save(f, "GIF", save_all=True, append_images=pictures, **options))
