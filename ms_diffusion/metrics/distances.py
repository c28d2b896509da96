"""Distances between two sets of points, such as samples and data: points in the plane, or features of images.

All is computed in float64. a (n, d) and b (m, d) are n and m points of d numbers.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist, pdist

ANGLES = np.arange(32) * np.pi / 32
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)])  # (2, 32), evenly over a half turn
BLOCK = 2**14  # pairs of points at a time: 128 KiB stay in a core's cache
MEDIAN_POINTS = 1000  # points of a set, at most, that count in the median distance


def as_points(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b in float64; ValueError if they are not (n, d) and (m, d), or empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"points (n, d) and (m, d) are needed, not {a.shape} and {b.shape}")
    return a, b


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, directions: np.ndarray = DIRECTIONS) -> float:
    """Mean Wasserstein-1 distance of points a and b (n, d) along `directions` (d, P) (Bonneel et al. 2015, "Sliced and Radon
    Wasserstein barycenters"). On a line it is the mean distance of the sorted points. ValueError if a and b differ in
    number, or the points do not have the dimension d of the directions."""
    a, b = as_points(a, b)
    if len(a) != len(b):
        raise ValueError(f"a and b must have the same number of points, not {len(a)} and {len(b)}")
    if len(directions) != a.shape[1]:
        raise ValueError(f"the points have dimension {a.shape[1]}, the directions {len(directions)}: pass other directions")
    return float(np.abs(np.sort((a @ directions).T) - np.sort((b @ directions).T)).mean())


def mean_over_pairs(function: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
    """Mean of function(|x - y|^2) over all n m pairs, a block of rows at a time."""
    rows = max(1, BLOCK // len(b))
    blocks = (cdist(a[i : i + rows], b, "sqeuclidean") for i in range(0, len(a), rows))
    return float(sum(function(block).sum() for block in blocks)) / (len(a) * len(b))


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), with means over all pairs, those of a point with itself included (the
    V-statistic, Szekely & Rizzo 2013, "Energy statistics"); scipy.stats.energy_distance is the same for d = 1.

    Its unit is the square root of a's unit. Rounding may turn 0 into 1e-8."""
    a, b = as_points(a, b)
    square = 2 * mean_over_pairs(np.sqrt, a, b) - mean_over_pairs(np.sqrt, a, a) - mean_over_pairs(np.sqrt, b, b)
    return math.sqrt(max(square, 0.0))  # nan stays nan


def median_distance(*sets: np.ndarray) -> float:
    """Median distance between two points of the union of the sets (n, d) (Gretton et al. 2012, section 8). Of a larger set
    MEDIAN_POINTS points, evenly spaced over its rows, are used."""
    counts = [min(len(points), MEDIAN_POINTS) for points in sets]
    points = np.concatenate([points[np.arange(k) * len(points) // k] for points, k in zip(sets, counts, strict=True)])
    return float(np.median(pdist(points)))


def maximum_mean_discrepancy(a: np.ndarray, b: np.ndarray, bandwidth: float | None = None) -> float:
    """The root of the biased estimate of MMD^2, E k(X, X') + E k(Y, Y') - 2 E k(X, Y) over all pairs (Gretton et al. 2012,
    "A kernel two-sample test", eq. 5), with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)). It has no unit and is at most
    sqrt(2).

    The default bandwidth is `median_distance(a, b)`. Values with different bandwidths cannot be compared. ValueError if the
    bandwidth is not above 0; the default one is 0 where half of all pairs of points coincide."""
    a, b = as_points(a, b)
    bandwidth = median_distance(a, b) if bandwidth is None else bandwidth
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth must be above 0, not {bandwidth:g}: are the points finite, and do they differ?")

    def kernel(square: np.ndarray) -> np.ndarray:
        return np.exp(square / (-2 * bandwidth**2))

    square = mean_over_pairs(kernel, a, a) + mean_over_pairs(kernel, b, b) - 2 * mean_over_pairs(kernel, a, b)
    return math.sqrt(max(square, 0.0))  # nan stays nan


def compare(
    samples: np.ndarray,
    data: np.ndarray,
    rng: np.random.Generator,
    repeats: int = 10,
    most: int = 2000,
    directions: np.ndarray = DIRECTIONS,
) -> dict[str, dict[str, float]]:
    """Distances of samples (N, d) from held-out data (M, d), and of the data from each other: {"sliced_wasserstein", "mmd",
    "energy": {"score", "floor", "floor_most"}}.

    Each repeat draws two disjoint sets A and B of n = min(N, M // 2) data. The score is the mean distance of n samples from
    A, the floor the mean distance of B from A, and floor_most the largest of these. The floor is therefore the expected
    score of a perfect sampler, whose samples are fresh data; no sampler reaches 0. A score within floor_most is as good as
    data; a score well below the floor means that the samples are copies of these data. The floor falls as n grows, so
    scores compare only for equal N, M and `most`.

    The sliced Wasserstein distance, along `directions` (d, P), uses all n points, the pairwise distances `most` of them. The
    bandwidth of the MMD is always the median distance of the data, so the floor depends on the samples only through n.
    ValueError if there are fewer than 2 samples or 4 data, or some are not finite."""
    samples, data = as_points(samples, data)
    if len(samples) < 2 or len(data) < 4:
        raise ValueError(f"at least 2 samples and 4 data are needed, not {len(samples)} and {len(data)}")
    for name, points in (("samples", samples), ("data", data)):
        if bad := len(points) - np.isfinite(points).all(1).sum():
            raise ValueError(f"{bad} of {len(points)} {name} are not finite")
    n, bandwidth = min(len(samples), len(data) // 2), median_distance(data)
    distances = {
        "sliced_wasserstein": lambda a, b: sliced_wasserstein(a, b, directions),
        "mmd": lambda a, b: maximum_mean_discrepancy(a[:most], b[:most], bandwidth),
        "energy": lambda a, b: energy_distance(a[:most], b[:most]),
    }
    orders = [rng.permutation(len(data)) for _ in range(repeats)]  # first, so that they do not depend on N
    scores, floors = {name: [] for name in distances}, {name: [] for name in distances}
    for order in orders:
        a, b, drawn = data[order[:n]], data[order[n : 2 * n]], rng.choice(samples, n, replace=False)
        for name, distance in distances.items():
            scores[name].append(distance(drawn, a))
            floors[name].append(distance(a, b))
    return {
        name: {"score": float(np.mean(scores[name])), "floor": float(np.mean(floors[name])), "floor_most": max(floors[name])}
        for name in distances
    }


# Features of images: a are those of samples, b those of data


def check_number(n: int, d: int) -> None:
    """ValueError if the covariance of n points of d numbers is singular, since they span n - 1 dimensions at most."""
    if n <= d:
        why = f"they span {n - 1} dimensions at most, so the covariance is singular"
        advice = f"take at least {d + 1}, and thousands for a reliable score"
        raise ValueError(f"{n} images are too few for {d} features: {why}; {advice}")


def mean_and_covariance(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d) of points (n, d); ValueError if they are not finite, or n <= d."""
    a, _ = as_points(a, a)
    if bad := len(a) - np.isfinite(a).all(1).sum():
        raise ValueError(f"the features of {bad} of {len(a)} images are not finite")
    check_number(*a.shape)
    return a.mean(0), np.cov(a, rowvar=False).reshape(a.shape[1], -1)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (d, d); ValueError if an eigenvalue is negative by more than rounding."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-8 * max(values[-1], 0):
        raise ValueError(f"a covariance has no negative eigenvalue, such as {values[0]:g}")
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians (Dowson &
    Landau 1982); for Gaussians of features the Frechet inception distance (Heusel et al. 2017, eq. 6).

    The eigenvalues of C_a C_b are those of the symmetric R C_b R, where R is the root of C_a. So none becomes complex, as
    with scipy.linalg.sqrtm(C_a C_b), and those that rounding makes negative count as 0. ValueError if a matrix is not a
    covariance."""
    root = square_root(covariance_a)
    square_root(covariance_b)  # raises if it is not a covariance
    values = np.linalg.eigvalsh(root @ covariance_b @ root)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets of `size` points of a and of b, of the unbiased MMD^2 with the kernel
    (x y / d + 1)^3: the kernel inception distance (Binkowski et al. 2018, section 4). It may be negative by chance.
    ValueError if a or b has fewer than 2 points."""
    a, b = as_points(a, b)
    n = min(size, len(a), len(b))
    if n < 2:
        raise ValueError(f"at least 2 points of each are needed, not {len(a)} and {len(b)}")

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = rng.choice(a, n, replace=False), rng.choice(b, n, replace=False)
        within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
        values.append(within - 2 * kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def squared_distance_blocks(a: np.ndarray, b: np.ndarray, rows: int = 1000) -> Iterator[np.ndarray]:
    """|x - y|^2 of all pairs, `rows` rows of a at a time: (rows, m). Distances that may be rounding errors are 0.

    By |x|^2 + |y|^2 - 2 x y, a matrix product: 4 times as fast as scipy's cdist for 128 numbers, 12 times for 784."""
    squares = (b * b).sum(1)
    for i in range(0, len(a), rows):
        x = a[i : i + rows]
        both = (x * x).sum(1)[:, None] + squares
        square = both - 2 * (x @ b.T)
        yield np.where(square > 100 * np.finfo(x.dtype).eps * both, square, 0)


def precision_recall(samples: np.ndarray, data: np.ndarray, k: int = 5) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of samples (N, d): whether they look like data (M, d), and how much of
    the data they cover.

    The ball around a point reaches to its k-th nearest neighbour in its own set. Precision is the share of samples in a ball
    of the data, recall the share of data in a ball of the samples (Kynkaanniemi et al. 2019, eq. 1). Density is the mean
    number of data balls that contain a sample, divided by k; coverage is the share of data balls that contain a sample
    (Naeem et al. 2020, eqs. 3 and 4). Outliers affect these two less. The best value is 1; density may exceed it.
    ValueError for k points or fewer."""
    samples, data = as_points(samples, data)
    if min(len(samples), len(data)) <= k:
        raise ValueError(f"more than {k} samples and data are needed, not {len(samples)} and {len(data)}")

    def radii(points: np.ndarray) -> np.ndarray:
        rows = [np.partition(square, k, 1)[:, k] for square in squared_distance_blocks(points, points)]  # 0: itself
        return np.concatenate(rows) * (1 + 1e-9)  # so that rounding excludes no equal distance

    sample_radii, data_radii = radii(samples), radii(data)
    balls = np.concatenate([(square <= data_radii).sum(1) for square in squared_distance_blocks(samples, data)])
    rows = [((square <= sample_radii).any(1), square.min(1)) for square in squared_distance_blocks(data, samples)]
    recalled, nearest = (np.concatenate(column) for column in zip(*rows, strict=True))
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls.mean() / k),
        "coverage": float((nearest <= data_radii).mean()),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of images a and b (N, H, W, C) uint8, in dB: (N,); infinite where they are equal."""
    square = ((np.asarray(a, np.float64) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / square)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of images a and b (N, H, W, C) uint8, at most 1: (N,) means over channels and over the windows
    of 11 x 11, Gaussian of deviation 1.5, that lie within an image (Wang et al. 2004, section III-B). ValueError if there
    are none."""
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"images of {a.shape[1]} x {a.shape[2]} are smaller than the window, 11 x 11")

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5)[:, 5:-5, 5:-5]  # 5 = round(3.5 x 1.5)

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean((1, 2, 3))
