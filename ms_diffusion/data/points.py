"""Points in the plane: seven toy distributions, the user's own file, and the frame in which a network sees them."""

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..randomness import Stream
from ..runtime import UserError

# The toys are functions (rng, n) -> (n, 2) float64. Each row is drawn on its own, arm or blob included, so that any slice
# is a fair sample.


def s_curve(rng: np.random.Generator, n: int) -> np.ndarray:
    """The letter S: (sin t, sign(t) (cos t - 1)), |t| < 3 pi / 2, and noise 0.1 (scikit-learn's make_s_curve, end on)."""
    t = 3 * np.pi * (rng.random(n) - 0.5)
    return _noisy(rng, np.sin(t), np.sign(t) * (np.cos(t) - 1), 0.1)


def swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """A spiral (t cos t, t sin t), 3 pi / 2 < t < 9 pi / 2, and noise 0.5 (scikit-learn's make_swiss_roll, end on)."""
    t = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return _noisy(rng, t * np.cos(t), t * np.sin(t), 0.5)


def two_moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Arcs (cos t, sin t) and (1 - cos t, 1/2 - sin t), 0 < t < pi, and noise 0.05 (scikit-learn's make_moons)."""
    t, lower = np.pi * rng.random(n), rng.random(n) < 0.5
    return _noisy(rng, np.where(lower, 1 - np.cos(t), np.cos(t)), np.where(lower, 0.5 - np.sin(t), np.sin(t)), 0.05)


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight blobs of deviation 0.5 on a circle of radius 4, all over sqrt 2 (FFJORD, Grathwohl et al. 2019)."""
    angle = np.pi / 4 * rng.integers(8, size=n)
    return _noisy(rng, 4 * np.cos(angle), 4 * np.sin(angle), 0.5) / np.sqrt(2)


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on the dark squares of a 4 x 4 board, that at (-4, -4) one of them, without noise (FFJORD): [-4, 4)^2."""
    column, upper = np.divmod(rng.integers(8, size=n), 2)  # each column has two dark squares
    corner = np.stack([column, 2 * upper + column % 2], 1)
    return 2 * (corner + rng.random((n, 2))) - 4


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five blobs at radius 2, deviation 0.6 along it and 0.2 across; at radius 2 r turned by exp(r) / 4 (FFJORD)."""
    along, across = 1 + 0.3 * rng.standard_normal(n), 0.1 * rng.standard_normal(n)
    turn = 2 * np.pi / 5 * rng.integers(5, size=n) + 0.25 * np.exp(along)
    z = 2 * (along + 1j * across) * np.exp(-1j * turn)  # clockwise
    return np.stack([z.real, z.imag], 1)


def spiral(rng: np.random.Generator, n: int) -> np.ndarray:
    """Arms +-(u - t cos t, v + t sin t) / 3, t = 3 pi sqrt(uniform), u and v uniform in [0, 0.5), noise 0.1 (FFJORD)."""
    t, arm = 3 * np.pi * np.sqrt(rng.random(n)), 2 * rng.integers(2, size=n) - 1
    u, v = rng.random((2, n)) / 2
    return _noisy(rng, arm * (u - t * np.cos(t)) / 3, arm * (v + t * np.sin(t)) / 3, 0.1)


def _noisy(rng, x, y, deviation):
    return np.stack([x, y], 1) + deviation * rng.standard_normal((len(x), 2))


TOYS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "scurve": s_curve,
    "swiss-roll": swiss_roll,
    "two-moons": two_moons,
    "eight-gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "spiral": spiral,
}
POINTS_FILE = "points-file"
SUFFIXES = (".npy", ".csv")


def load_points(name: str, path: str | None, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points to train on (N, 2) and to test against (M, 2), float32 in the data's own units, C-contiguous.

    Of a toy, N = ``num`` and M = 2 ``num``, drawn apart. Of the set ``points-file``, a fifth of the points of the file at
    ``path`` (at least one) is held out as the test, both in an order that the seed shuffles; ``num`` plays no part.

    Raises:
        UserError: there is no such set, ``num`` is below 1, ``path`` is missing, or a file for a toy; or see read_points.
    """
    if name == POINTS_FILE:
        if not path:
            raise UserError(f"--data.name {POINTS_FILE} needs --data.dir, a .npy or .csv file")
        points = read_points(path).astype(np.float32)
        points = points[np.random.default_rng((seed, Stream.POINTS_SPLIT)).permutation(len(points))]
        held_out = max(1, len(points) // 5)
        return points[held_out:], points[:held_out]

    if name not in TOYS:
        raise UserError(f"unknown set of points {name!r}: choose one of {', '.join([*TOYS, POINTS_FILE])}")
    if path and (os.path.isfile(path) or str(path).lower().endswith(SUFFIXES)):
        raise UserError(f"--data.name {name} reads no file: to use {path}, set --data.name {POINTS_FILE}")
    if num < 1:
        raise UserError(f"--data.num {num}: set the number of points to train on to 1 or more")
    train, test = (
        TOYS[name](np.random.default_rng((seed, word)), n).astype(np.float32)
        for word, n in ((Stream.POINTS_TRAIN, num), (Stream.POINTS_TEST, 2 * num))
    )
    return train, test


def read_saved_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The points of `load_points` that a run keeps in its points.npz.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            train, test = kept["train"], kept["test"]
        if train.shape[1:] != (2,) or test.shape[1:] != (2,):
            raise ValueError("no points")
        return train, test
    except Exception as e:  # a damaged archive raises anything
        raise UserError(f"{path} cannot be read: delete it, and run the training command again, which writes it") from e


def read_points(path: str | Path) -> np.ndarray:
    """Points (N, 2) float64, N >= 2, of a .npy or .csv file, or of the only such file in the folder ``path``.

    A .csv is UTF-8, a point a line, its two numbers apart by a comma, semicolon or white space; a first line without any
    number is a header. In a folder, names that start with a dot are passed over.

    Raises:
        UserError: there is no such file or not exactly one in the folder, it cannot be read, it holds anything but two
            columns of finite real numbers that float32 can hold, fewer than two points, or one point again and again.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"--data.dir {path}: no such file; pass a .npy or .csv file of points")
    try:
        if path.is_dir():
            path = _only_file(path)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise UserError(f"--data.dir {path}: its name ends in neither .npy nor .csv; save the points as one of them")
        points = _read_npy(path) if suffix == ".npy" else _read_csv(path)
    except OSError as e:
        raise UserError(f"--data.dir {path}: cannot be read ({e.strerror or e}); make it readable or pass another") from e

    where = f"--data.dir {path}"
    if points.dtype.kind not in "fiu":
        raise UserError(f"{where}: its numbers are of type {points.dtype}; save real ones, by points.astype(float)")
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"{where}: its shape is {points.shape}, not (N, 2); {_shape_hint(points.shape)}")
    if len(points) < 2:
        raise UserError(f"{where}: too few points, {len(points)}; pass 2 or more")
    with np.errstate(over="ignore"):
        points = np.array(points, np.float64, order="C")
    bad = ~(np.abs(points) <= np.finfo(np.float32).max).all(1)  # so that NaN is bad too
    if bad.any():
        raise UserError(
            f"{where}: {bad.sum()} of its {len(points)} points are NaN, infinite or beyond float32, the first in row "
            f"{bad.argmax()} (counted from 0); leave them out"
        )
    if (points == points[0]).all():
        raise UserError(f"{where}: all its {len(points)} points are equal, so there is nothing to learn; pass others")
    return points


def _only_file(folder):
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
    if len(names) != 1:
        found = f"{len(names)} of them, such as {names[0]} and {names[1]}" if names else "none"
        raise UserError(f"--data.dir {folder}: a folder must hold exactly one .npy or .csv file, not {found}; pass the file")
    return folder / names[0]


def _read_npy(path):
    try:
        with path.open("rb") as file:
            points = np.load(file, allow_pickle=False)
        if not isinstance(points, np.ndarray):
            raise ValueError("it is an archive of arrays, an .npz")
    except OSError:
        raise
    except Exception as e:  # a damaged header raises anything
        cause = textwrap.shorten(str(e), 100)  # on one line
        raise UserError(f"--data.dir {path}: not a whole .npy file of numbers ({cause}); write it anew by np.save") from e
    return points


def _read_csv(path):
    where = f"--data.dir {path}"
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not a text file in UTF-8; save it as CSV in UTF-8") from e
    lines = [(number, _cells(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and all(_number(cell) is None for cell in lines[0][1]):
        del lines[0]
    if not lines:
        raise UserError(f"{where}: holds no numbers; write a point a line, such as 0.5,1.5")
    (first, width), rows = (lines[0][0], len(lines[0][1])), []
    for number, cells in lines:
        row = [_number(cell) for cell in cells]
        if None in row:
            cell = cells[row.index(None)][:30]
            raise UserError(f"{where}: line {number}: {cell!r} is no number; write a point a line, such as 0.5,1.5")
        if len(row) != width:
            raise UserError(f"{where}: line {number}: {len(row)} numbers, where line {first} has {width}; make them alike")
        rows.append(row)
    return np.array(rows, np.float64)


def _cells(line):
    """With semicolons a comma is no separator: it may be the decimal one, which is then named as no number."""
    return line.split(next((mark for mark in ";," if mark in line), None))


def _number(cell):
    try:
        return float(cell)
    except ValueError:
        return None


def _shape_hint(shape):
    if len(shape) == 2 and shape[0] == 2 and shape[1] > 3:
        return "save its transpose"
    if len(shape) == 2 and shape[1] > 2:
        return "choose two of the columns, such as points[:, :2]"
    return "save two numbers, x and y, for each point"


@dataclass(frozen=True)
class Normalizer:
    """Where the data lie: x = (points - center) / scale is in [-1, 1]^2 and keeps their shape."""

    center: np.ndarray  # (2,) float64
    scale: float

    @classmethod
    def of(cls, points: np.ndarray) -> "Normalizer":
        """The middle of the range of points (N, 2), and half of its wider side.

        Raises:
            UserError: the points are all equal.
        """
        low, high = (np.asarray(end, np.float64) for end in (points.min(0), points.max(0)))
        scale = float((high - low).max() / 2)
        if not scale > 0:
            raise UserError(
                f"the {len(points)} points to train on are all equal, so there is nothing to learn; use more (--data.num) "
                "or others (--data.dir)"
            )
        return cls((low + high) / 2, scale)

    def normalize(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in the data's units to x float32; in float64 on the way, for data far from 0."""
        return ((np.asarray(points, np.float64) - self.center) / self.scale).astype(np.float32)

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """The way back: x (..., 2) to points float32 in the data's units."""
        return (np.asarray(x, np.float64) * self.scale + self.center).astype(np.float32)
