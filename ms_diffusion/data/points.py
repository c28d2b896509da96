"""Points in the plane: seven toy distributions, files of points, and their normalization for a network."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..files import check_memory, load_npy, load_npz, read_bytes, shown
from ..randomness import Stream
from ..runtime import UserError

# A toy distribution is a function (rng, n) -> (n, 2) float64. Its rows are independent, so any slice is a fair sample.


def scurve(rng: np.random.Generator, n: int) -> np.ndarray:
    """The letter S: (sin t, sign(t) (cos t - 1)), |t| < 3 pi / 2, and noise 0.1 (scikit-learn's make_s_curve in x, z)."""
    t = 3 * np.pi * (rng.random(n) - 0.5)
    return _noisy(rng, np.sin(t), np.sign(t) * (np.cos(t) - 1), 0.1)


def swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """A spiral (t cos t, t sin t), 3 pi / 2 < t < 9 pi / 2, noise 0.5 (scikit-learn's make_swiss_roll in x, z)."""
    t = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return _noisy(rng, t * np.cos(t), t * np.sin(t), 0.5)


def two_moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Arcs (cos t, sin t) and (1 - cos t, 1/2 - sin t), 0 < t < pi, and noise 0.05 (scikit-learn's make_moons)."""
    t, lower = np.pi * rng.random(n), rng.random(n) < 0.5
    return _noisy(rng, np.where(lower, 1 - np.cos(t), np.cos(t)), np.where(lower, 0.5 - np.sin(t), np.sin(t)), 0.05)


def eight_gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    """Eight Gaussians of deviation 0.5 on a circle of radius 4, all divided by sqrt 2 (FFJORD, Grathwohl et al. 2019)."""
    angle = np.pi / 4 * rng.integers(8, size=n)
    return _noisy(rng, 4 * np.cos(angle), 4 * np.sin(angle), 0.5) / np.sqrt(2)


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform on the dark squares of a 4 x 4 board in [-4, 4)^2, the one at (-4, -4) included, without noise (FFJORD)."""
    column, upper = np.divmod(rng.integers(8, size=n), 2)  # each column has two dark squares
    corner = np.stack([column, 2 * upper + column % 2], 1)
    return 2 * (corner + rng.random((n, 2))) - 4


def pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five Gaussians at radius 2, deviation 0.6 radially and 0.2 across, turned by exp(r) / 4 at radius 2 r (FFJORD)."""
    along, across = 1 + 0.3 * rng.standard_normal(n), 0.1 * rng.standard_normal(n)
    turn = 2 * np.pi / 5 * rng.integers(5, size=n) + 0.25 * np.exp(along)
    z = 2 * (along + 1j * across) * np.exp(-1j * turn)  # clockwise
    return np.stack([z.real, z.imag], 1)


def spiral(rng: np.random.Generator, n: int) -> np.ndarray:
    """Arms +-(u - t cos t, v + t sin t) / 3, t = 3 pi sqrt(uniform), u and v uniform in [0, 0.5), noise 0.1 (FFJORD)."""
    t, arm = 3 * np.pi * np.sqrt(rng.random(n)), 2 * rng.integers(2, size=n) - 1
    u, v = rng.random((2, n)) / 2
    return _noisy(rng, arm * (u - t * np.cos(t)) / 3, arm * (v + t * np.sin(t)) / 3, 0.1)


def _noisy(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, deviation: float) -> np.ndarray:
    return np.stack([x, y], 1) + deviation * rng.standard_normal((len(x), 2))


_TOYS = (scurve, swiss_roll, two_moons, eight_gaussians, checkerboard, pinwheel, spiral)
TOYS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {toy.__name__.replace("_", "-"): toy for toy in _TOYS}
POINTS_FILE = "points-file"
SUFFIXES = (".npy", ".csv")


def load_points(name: str, path: str | np.ndarray | None, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training points (N, 2) and test points (M, 2), float32 in the data's own units.

    For a toy distribution, N = `num` and M = 2 `num`, with independent random numbers. For "points-file", a fifth of the
    points in the file or array `path` (at least one), chosen at random by the seed, is held out as the test set; `num` is
    not used. Raises UserError if the set does not exist, `num` is below 1, `path` is missing, or is a file though `name` is
    a toy distribution; or if `read_points` fails.
    """
    if name == POINTS_FILE:
        if path is None or (isinstance(path, str) and not path):
            raise UserError(f"--data.name {POINTS_FILE} needs --data.dir, a .npy or .csv file")
        points = check_points(path, "data") if isinstance(path, np.ndarray) else read_points(path)
        order = np.random.default_rng((seed, Stream.POINTS_SPLIT)).permutation(len(points))
        points, held_out = points[order].astype(np.float32), max(1, len(points) // 5)
        return points[held_out:], points[:held_out]

    if name not in TOYS:
        raise UserError(f"unknown set of points {name!r}: choose one of {', '.join([*TOYS, POINTS_FILE])}")
    if isinstance(path, str) and (os.path.isfile(path) or path.lower().endswith(SUFFIXES)):
        raise UserError(f"--data.name {name} reads no file: to use {path}, set --data.name {POINTS_FILE}")
    if num < 1:
        raise UserError(f"--data.num {num}: set the number of points to train on to 1 or more")
    train = TOYS[name](np.random.default_rng((seed, Stream.POINTS_TRAIN)), num)
    test = TOYS[name](np.random.default_rng((seed, Stream.POINTS_TEST)), 2 * num)
    return train.astype(np.float32), test.astype(np.float32)


def read_saved_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training and test points that a run has saved in its points.npz; UserError if it is missing or corrupt."""
    try:
        arrays = load_npz(path, ("train", "test"))
        train, test = arrays["train"], arrays["test"]
        if not all(a.dtype == np.float32 and a.shape[1:] == (2,) and np.isfinite(a).all() for a in (train, test)):
            raise ValueError("the arrays are not points")
        return train, test
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} cannot be read: delete it, and run the training command again, which writes it") from e


def read_points(path: str | Path) -> np.ndarray:
    """Points (N, 2) float64, N >= 2, from a .npy or .csv file, or from the only such file in the folder `path`.

    A .csv file is UTF-8 text with one point per line: two numbers separated by a comma, a semicolon or white space. A first
    line without numbers is a header. In a folder, names that start with a dot are ignored. Raises UserError if there is no
    such file, or not exactly one in the folder; if it is corrupt; if it does not have two columns of finite real numbers in
    the range of float32; if it has fewer than two points, or only equal ones; or if it needs more memory than there is.
    Raises OSError if it cannot be read, or is a device or a pipe.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"--data.dir {path}: no such file; pass a .npy or .csv file of points")
    path = _only_file(path) if path.is_dir() else path
    where, suffix = f"--data.dir {path}", path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{where}: its name ends in neither .npy nor .csv; save the points as one of them")
    return check_points(_read_npy(path) if suffix == ".npy" else _read_csv(path), where)


def check_points(points: np.ndarray, where: str) -> np.ndarray:
    """The points (N, 2) as float64; the errors of `read_points` start with `where`."""
    if points.dtype.kind not in "fiu":
        raise UserError(f"{where}: its numbers are of type {points.dtype}; save real ones, by points.astype(float)")
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"{where}: its shape is {points.shape}, not (N, 2); save x and y of each point, one point a row")
    if len(points) < 2:
        raise UserError(f"{where}: too few points, {len(points)}; pass 2 or more")
    with np.errstate(over="ignore"):
        points = np.array(points, np.float64, order="C")
    bad = ~(np.abs(points) <= np.finfo(np.float32).max).all(1)  # true for NaN, too
    if bad.any():
        raise UserError(
            f"{where}: {bad.sum()} of its {len(points)} points are NaN, infinite or out of float32's range, the first in "
            f"row {bad.argmax()} (counted from 0); remove them"
        )
    if (points == points[0]).all():
        raise UserError(f"{where}: all its {len(points)} points are equal, so there is nothing to learn; pass others")
    return points


def _only_file(folder: Path) -> Path:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
    if len(names) != 1:
        found = f"{len(names)}, such as {names[0]} and {names[1]}" if names else "none"
        raise UserError(f"--data.dir {folder}: a folder must hold exactly one .npy or .csv file, not {found}; pass the file")
    return folder / names[0]


def _read_npy(path: Path) -> np.ndarray:
    try:
        return load_npy(path)
    except ValueError as e:
        raise UserError(f"--data.dir {path}: not a valid .npy file ({e}); save the points again by np.save") from e


def _read_csv(path: Path) -> np.ndarray:
    where = f"--data.dir {path}"
    content = read_bytes(path)
    check_memory(64 * len(content), path)  # lines of a few characters become objects of Python
    try:
        lines = [(i, line) for i, line in enumerate(content.decode("utf-8-sig").splitlines(), 1) if line.strip()]
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not a text file in UTF-8; save it as CSV in UTF-8") from e
    # If there are semicolons, a comma may be the decimal separator, and is then refused as part of a number
    second = "".join(line for _, line in lines[:2][-1:])  # the first line may be a header
    separator = next((mark for mark in ";," if mark in second), None)
    if lines and not any(map(_is_number, lines[0][1].split(separator))):
        del lines[0]
    if not lines:
        raise UserError(f"{where}: it holds no numbers; write one point a line, such as 0.5,1.5")
    parse = partial(np.loadtxt, delimiter=separator, comments=None, ndmin=2)
    try:
        return parse([line for _, line in lines])
    except ValueError as e:
        row = re.search(r" at row (\d+)", str(e))  # NumPy counts from 0 or 1, and without empty lines
        for number, line in lines[max(int(row[1]) - 1, 0) if row else 0 :]:
            try:
                parse([lines[0][1], line])
            except ValueError as e:
                problem = shown(str(e).split(" at row ")[0])[:100]
                raise UserError(f"{where}: line {number}: {problem}; write one point a line, such as 0.5,1.5") from e
        raise


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Normalizer:
    """Maps points to x = (points - center) / scale, in [-1, 1]^2 for the training data, and back; center is (2,) float64."""

    center: np.ndarray
    scale: float

    @classmethod
    def of(cls, points: np.ndarray, scale: float | None = None) -> "Normalizer":
        """The center is the middle of the range of points (N, 2), the scale half of the range's longer side. UserError if
        all points are equal. With a scale, the center is 0."""
        if scale is not None:
            return cls(np.zeros(2), scale)
        low, high = (np.asarray(end, np.float64) for end in (points.min(0), points.max(0)))
        scale = float((high - low).max() / 2)
        if not scale > 0:
            advice = "use more (--data.num) or others (--data.dir)"
            raise UserError(f"the {len(points)} points to train on are all equal, so there is nothing to learn; {advice}")
        return cls((low + high) / 2, scale)

    def normalize(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in the data's units -> x float32; computed in float64, for data far from 0."""
        return ((np.asarray(points, np.float64) - self.center) / self.scale).astype(np.float32)

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """x (..., 2) -> points float32 in the data's units."""
        return (np.asarray(x, np.float64) * self.scale + self.center).astype(np.float32)
