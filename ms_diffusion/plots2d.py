"""Pictures of diffusion in the plane: clouds of points, their scores, the paths of samplers.

Points are arrays (n, 2) in the data's own units. The panels of a picture share square axes. Points that are not finite are
left out; a panel of nothing else stays empty.
"""

import io

import numpy as np
from PIL import Image

from .files import write

DPI = 120
BLUE, GRAY, DARK = "#1f4e9c", "#b8b8b8", "#222222"
HUGE = 1e100  # what lies beyond counts as not finite: no sum or square of the rest overflows


def _finite(points) -> np.ndarray:
    points = np.asarray(points, np.float64)
    return points[(np.abs(points) < HUGE).all(-1)]  # False for nan


def limits(*sets):
    """Square axis limits ((left, right), (bottom, top)) with the central 99.8 % of each set's x and of its y, and 8 % more.

    Set by set, so that a few points (the ends of paths) are not the tail of many. No points at all: [-1, 1].
    """
    sets = [points for points in map(_finite, sets) if len(points)] or [np.array([[-1.0, -1.0], [1.0, 1.0]]) / 1.08]
    low = np.min([np.quantile(points, 0.001, axis=0, method="lower") for points in sets], axis=0)
    high = np.max([np.quantile(points, 0.999, axis=0, method="higher") for points in sets], axis=0)
    middle, half = (low + high) / 2, 1.08 * (high - low).max() / 2
    far = np.abs(middle).max()
    if half <= max(1e-9 * far, 1e-30):  # one point, or too narrow for ticks that differ
        half = max(0.5, 1e-3 * far)
    return tuple((float(m - half), float(m + half)) for m in middle)


def grid_points(limits, n: int = 20) -> np.ndarray:
    """(n * n, 2) float32: the centres of n x n equal cells of the limits, row by row from the bottom left."""
    centres = (np.arange(n) + 0.5) / n
    x, y = (low + (high - low) * centres for low, high in limits)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)


def _figure(titles, limits, columns: int, inches: float):
    """A figure and its axes, one for each title, `inches` wide, all with the same limits; ticks at the left and below."""
    from matplotlib.figure import Figure  # takes a second to import, and only here and for the GIF

    n, columns = len(titles), min(columns, len(titles))
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * inches + 0.3, rows * (inches + 0.15) + 0.2), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axes in enumerate(panels[:n]):
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.set_title(titles[i], fontsize=9, pad=3)
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7, length=2, pad=2, labelleft=i % columns == 0, labelbottom=i + columns >= n)
        for axis, shown in ((axes.xaxis, i + columns >= n), (axes.yaxis, i % columns == 0)):
            axis.offsetText.set(visible=shown, fontsize=7)  # "+1e6"
        axes.spines[:].set(linewidth=0.6, color=GRAY)
    for axes in panels[n:]:
        axes.remove()
    return figure, panels[:n]


def _save(path, figure) -> None:
    write(path, lambda f: figure.savefig(f, format="png", dpi=DPI))


def _dots(axes, points, color, n: int | None = None, scale: float = 1.0):
    """The points as dots, the smaller and paler the more of them (n, by default as many as there are) are in a panel of
    `scale` times the small panels' width; returns the artist."""
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


def save_panels(path, panels, titles, columns: int = 5) -> None:
    """Clouds of points side by side, a list of (n, 2), row by row: say noising at ten times, or its reversal. PNG."""
    figure, all_axes = _figure(titles, limits(*panels), columns, 1.8)
    for axes, points in zip(all_axes, panels, strict=True):
        _dots(axes, points, BLUE)
    _save(path, figure)


def save_samples(path, samples, data, title: str = "") -> None:
    """Data at the left, samples at the right, both (n, 2), on axes that hold the data. PNG.

    How many samples lie outside the axes, those that are not finite among them, is written in the right panel's corner.
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


def _density(points, limits, bins: int = 80) -> np.ndarray:
    """(bins, bins), [y, x]: counts of the points, smoothed by a Gaussian of 1.5 bins, the largest 1."""
    counts = np.histogram2d(*_finite(points).T[::-1], bins, limits[::-1])[0]
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 1.5) ** 2)
    for axis in (0, 1):
        counts = np.apply_along_axis(np.convolve, axis, counts, kernel, "same")
    return counts / (counts.max() or 1)


def save_score_field(path, panels, titles, columns: int = 5, bounds=None) -> None:
    """The points' density in orange, the score as arrows; panels: a list of (points (n, 2), grid (m, 2), score (m, 2)). PNG.

    Scores near t = 0 are hundreds of times those near T: in each panel an arrow is as long as the cube root of the score's
    length over its 95 % quantile there, at most 1, which is the space between the points of a grid that fills the panel.
    So lengths compare within a panel only. The arrows' middles lie on the grid. `bounds` are the axes' limits, those of all
    points if not given.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", ["white", "#fdb863", "#f17c0e"])
    bounds = bounds or limits(*(points for points, _, _ in panels))
    figure, all_axes = _figure(titles, bounds, columns, 2.4)
    for axes, (points, grid, score) in zip(all_axes, panels, strict=True):
        look = {"origin": "lower", "cmap": colors, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
        axes.imshow(np.sqrt(_density(points, bounds)), extent=np.ravel(bounds), **look)
        x, y, u, v = _finite(np.concatenate([grid, score], -1)).T
        if not len(x):
            continue
        length = np.hypot(u, v)
        longest = np.quantile(length, 0.95) or length.max() or 1
        factor = np.cbrt(np.minimum(length / longest, 1)) / np.where(length > 0, length, 1) / np.sqrt(len(grid))
        arrows = {"angles": "uv", "scale_units": "width", "scale": 1, "pivot": "mid", "units": "width", "width": 0.0045}
        axes.quiver(x, y, u * factor, v * factor, color=DARK, headwidth=3.5, headlength=3.5, headaxislength=3, **arrows)
    _save(path, figure)


def save_trajectories(path, paths, data, count: int = 12) -> None:
    """The ways of the first `count` points from x_T (circle) to x_0 (dot), above the data (n, 2) in gray; a panel for each
    of `paths`, name -> (steps + 1, n, 2) from x_T to x_0. A point's colour is the same in all panels. PNG.
    """
    from matplotlib import colormaps

    paths = {name: np.asarray(way, np.float64)[:, :count] for name, way in paths.items()}
    ends = [way[i] for way in paths.values() for i in (0, -1)]  # by themselves: all of them must be seen
    bounds = limits(data, *ends, *(way.reshape(-1, 2) for way in paths.values()))
    figure, all_axes = _figure(list(paths), bounds, 2 if len(paths) == 4 else 3, 3.5)
    for axes, way in zip(all_axes, paths.values(), strict=True):
        _dots(axes, data, GRAY, scale=2)
        for i, color in enumerate(colormaps["turbo"](np.linspace(0.05, 0.95, way.shape[1]))):
            axes.plot(*_finite(way[:, i]).T, color=color, linewidth=0.7, alpha=0.7)
            end = {"marker": "o", "color": color, "markersize": 5.5, "zorder": 3}  # above all lines
            axes.plot(*_finite(way[:1, i]).T, **end, markerfacecolor="white")
            axes.plot(*_finite(way[-1:, i]).T, **end, markeredgecolor="white", markeredgewidth=0.5)
    _save(path, figure)


def save_points_gif(path, frames, data=None, titles=None, milliseconds: int = 60) -> None:
    """Points that move: frames, a list of (n, 2), as an animated GIF of 360 x 360 pixels, above `data` (n, 2) in gray.

    The axes hold the first frame, the last and the data. The last frame stays for two seconds.
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

    def draw(i):
        dots.set_data(*_finite(frames[i]).T)
        title.set_text(titles[i] if titles else "")
        canvas.draw()
        levels = np.round(np.asarray(canvas.buffer_rgba())[..., :3] / 17) * 17  # 16: few colours, white among them
        return Image.fromarray(levels.astype(np.uint8))

    # One palette for all frames, of three of them: colours of its own in each would flicker.
    some = Image.fromarray(np.concatenate([draw(i) for i in (0, len(frames) // 2, len(frames) - 1)]))
    colors = [color for _, color in sorted(some.getcolors(some.width * some.height), reverse=True)[:255]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.ravel(colors).tolist())
    pictures = (draw(i).quantize(palette=palette, dither=Image.Dither.NONE) for i in range(len(frames)))
    options = {"duration": [milliseconds] * (len(frames) - 1) + [2000], "loop": 0, "optimize": False}
    write(path, lambda f: next(pictures).save(f, "GIF", save_all=True, append_images=pictures, **options))
