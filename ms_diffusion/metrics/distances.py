"""How far one set of points is from another, as samples from data: points in the plane, or features of images.

float64 numpy throughout. a (n, d), b (m, d): n and m points of d numbers; ValueError if they are not, or empty.
"""

import math

import numpy as np

ANGLES = np.arange(32) * np.pi / 32
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)])  # (2, 32), evenly over a half turn
BLOCK = 2**14  # pairs of points at a time: 128 KiB stay in a core's cache
MEDIAN_OF = 1000  # points of a set, at most, among which the median distance is sought


def as_points(a, b) -> tuple[np.ndarray, np.ndarray]:
    """a and b in float64; ValueError if they are not (n, d) and (m, d), or empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"points (n, d) and (m, d) are needed, not {a.shape} and {b.shape}")
    return a, b


def sliced_wasserstein(a, b, directions=DIRECTIONS) -> float:
    """Mean Wasserstein-1 distance of points a and b (n, d) along `directions` (d, P) (Bonneel et al. 2015, "Sliced and Radon
    Wasserstein barycenters"): on a line, that is the mean distance of the sorted points. ValueError if a and b differ in
    number, or `directions` are not of d numbers; those by default are of 2."""
    a, b = as_points(a, b)
    if len(a) != len(b):
        raise ValueError(f"as many points a as b are needed, not {len(a)} and {len(b)}")
    if len(directions) != a.shape[1]:
        raise ValueError(f"points of {a.shape[1]} numbers need directions of as many, not of {len(directions)}")
    return float(np.abs(np.sort((a @ directions).T) - np.sort((b @ directions).T)).mean())


def squared_distances(a, b) -> np.ndarray:
    """|x - y|^2 of each pair (n, m). Not by |x|^2 + |y|^2 - 2 x y, which is wrong by rounding for near points."""
    square = np.zeros((len(a), len(b)))
    for x, y in zip(a.T, b.T, strict=True):
        step = np.subtract.outer(x, y)
        step *= step
        square += step
    return square


def mean_over_pairs(function, a, b) -> float:
    """Mean of function(|x - y|^2) over all n m pairs, a block of rows at a time."""
    rows = max(1, BLOCK // len(b))
    blocks = (squared_distances(a[i : i + rows], b) for i in range(0, len(a), rows))
    return float(sum(function(block).sum() for block in blocks)) / (len(a) * len(b))


def energy_distance(a, b) -> float:
    """sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), the means over all pairs, a point with itself too (the V-statistic,
    Szekely & Rizzo 2013, "Energy statistics"): scipy.stats.energy_distance where d = 1. In units of the root of a's; what
    rounding leaves of 0 may be 1e-8 of that."""
    a, b = as_points(a, b)
    square = 2 * mean_over_pairs(np.sqrt, a, b) - mean_over_pairs(np.sqrt, a, a) - mean_over_pairs(np.sqrt, b, b)
    return math.sqrt(max(square, 0.0))  # nan stays nan


def median_distance(*sets) -> float:
    """Median distance between two points of the sets (n, d) together (Gretton et al. 2012, section 8); of a larger set those
    of MEDIAN_OF points, evenly over its rows."""
    counts = [min(len(points), MEDIAN_OF) for points in sets]
    points = np.concatenate([points[np.arange(k) * len(points) // k] for points, k in zip(sets, counts, strict=True)])
    pairs = np.tri(len(points), k=-1, dtype=bool)  # each once, none of a point with itself
    return float(np.median(np.sqrt(squared_distances(points, points)[pairs])))


def maximum_mean_discrepancy(a, b, bandwidth=None) -> float:
    """The root of the biased estimate of MMD^2, E k(X, X') + E k(Y, Y') - 2 E k(X, Y) over all pairs (Gretton et al. 2012,
    "A kernel two-sample test", eq. 5), with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)): a pure number, sqrt(2) at most.

    `bandwidth`, in units of a, is by default `median_distance(a, b)`; distances by different ones do not compare. ValueError
    if it is not above 0, as where half the pairs of points coincide."""
    a, b = as_points(a, b)
    bandwidth = median_distance(a, b) if bandwidth is None else bandwidth
    if not bandwidth > 0:
        raise ValueError(f"a bandwidth above 0 is needed, not {bandwidth:g}: are the points finite, and do they differ?")

    def kernel(square):
        return np.exp(square / (-2 * bandwidth**2))

    square = mean_over_pairs(kernel, a, a) + mean_over_pairs(kernel, b, b) - 2 * mean_over_pairs(kernel, a, b)
    return math.sqrt(max(square, 0.0))  # nan stays nan


# Points in the plane


def compare(samples, data, rng, repeats=10, most=2000, directions=DIRECTIONS) -> dict:
    """How far samples (N, d) are from data (M, d), and how far such data are from each other: {"sliced_wasserstein", "mmd",
    "energy": {"score", "floor", "floor_most"}}, all floats.

    `data` are held out: nothing was trained on them. In each repeat two disjoint sets A and B of n = min(N, M // 2) data are
    drawn; the score is the mean distance of n samples from A, the floor that of B from A, `floor_most` the largest of these.
    So the floor is what a perfect sampler, one whose samples are fresh data, would score on average, and 0 is out of reach:
    a score within `floor_most` is one that data have too, and one well below the floor means samples that are these data.
    The floor falls as n grows, so scores compare for equal N, M and `most` alone.

    Sliced Wasserstein, along `directions` (d, P), takes all n, the pairwise ones `most` of them. MMD's bandwidth is the
    median distance of the data throughout: of the samples the floor knows only their number, through n. ValueError for fewer
    than 2 samples or 4 data, or any that are not finite."""
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
    orders = [rng.permutation(len(data)) for _ in range(repeats)]  # before what the samples draw
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


# Features of images: a are those of samples, b of data


def check_number(n: int, d: int) -> None:
    """ValueError if n points of d numbers have a singular covariance: they span n - 1 dimensions at most."""
    if n <= d:
        raise ValueError(
            f"{n} images are too few for {d} features: they span {n - 1} dimensions at most, so the covariance is singular; "
            f"take at least {d + 1}, and thousands for a score that means something"
        )


def mean_and_covariance(a) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d) of points (n, d); ValueError if they are not finite, or n <= d."""
    a, _ = as_points(a, a)
    if bad := len(a) - np.isfinite(a).all(1).sum():
        raise ValueError(f"the features of {bad} of {len(a)} images are not finite")
    check_number(*a.shape)
    return a.mean(0), np.cov(a, rowvar=False).reshape(a.shape[1], -1)


def square_root(covariance) -> np.ndarray:
    """The symmetric square root of a covariance (d, d); ValueError if it has an eigenvalue below what rounding leaves of
    0."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-8 * max(values[-1], 0):
        raise ValueError(f"a covariance has no eigenvalue below 0, such as {values[0]:g}")
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians (Dowson &
    Landau 1982); of features' Gaussians the Frechet inception distance (Heusel et al. 2017, eq. 6).

    The eigenvalues of C_a C_b are those of R C_b R, with R the root of C_a, which is symmetric: nothing becomes complex, and
    what rounding leaves below 0 is 0. ValueError for a matrix that is no covariance."""
    root = square_root(covariance_a)
    values = np.linalg.eigvalsh(root @ covariance_b @ root)
    square_root(covariance_b)  # which refuses what is no covariance
    cross = np.sqrt(np.maximum(values, 0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def kernel_distance(a, b, rng, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation, over `subsets` of `size` points of each, of the unbiased MMD^2 with the kernel (x y / d +
    1)^3: the kernel inception distance (Binkowski et al. 2018, section 4). Below 0 where chance has it so."""
    a, b = as_points(a, b)
    n = min(size, len(a), len(b))
    if n < 2:
        raise ValueError(f"at least 2 points of each are needed, not {len(a)} and {len(b)}")

    def mean_of_pairs(x, y, same):
        k = (x @ y.T / x.shape[1] + 1) ** 3
        return (k.sum() - np.trace(k)) / (n * (n - 1)) if same else k.mean()

    values = []
    for _ in range(subsets):
        x, y = rng.choice(a, n, replace=False), rng.choice(b, n, replace=False)
        values.append(mean_of_pairs(x, x, True) + mean_of_pairs(y, y, True) - 2 * mean_of_pairs(x, y, False))
    return float(np.mean(values)), float(np.std(values))


def squared_distance_blocks(a, b, rows: int = 1000):
    """|x - y|^2 of each pair, `rows` of a at a time: (first row, (rows, m)). By |x|^2 + |y|^2 - 2 x y, fast for many
    numbers; what rounding may leave of 0 is 0."""
    squares = (b * b).sum(1)
    for i in range(0, len(a), rows):
        x = a[i : i + rows]
        both = (x * x).sum(1)[:, None] + squares
        square = both - 2 * (x @ b.T)
        yield i, np.where(square > 100 * np.finfo(x.dtype).eps * both, square, 0)


def precision_recall(samples, data, k: int = 5) -> dict:
    """{"precision", "recall", "density", "coverage"}: how real samples (N, d) look, and how much of the data (M, d) they
    show.

    Around each point lies the ball that reaches to its k-th nearest neighbour of its own set. Precision is the share of
    samples in a ball of data, recall the share of data in a ball of samples (Kynkaanniemi et al. 2019, eq. 1); density the
    number of data balls a sample lies in, over k, coverage the share of data whose ball holds a sample (Naeem et al. 2020,
    eqs. 3 and 4), which outliers sway less. All are 1 at best, density a little more at times. ValueError for k points or
    fewer."""
    samples, data = as_points(samples, data)
    if min(len(samples), len(data)) <= k:
        raise ValueError(f"more than {k} samples and data are needed, not {len(samples)} and {len(data)}")

    def radii(points):
        found = [
            np.partition(square, k, 1)[:, k] for _, square in squared_distance_blocks(points, points)
        ]  # the 0th is the point
        return np.concatenate(found) * (1 + 1e-9)  # which rounding leaves in: of equal distances all count

    sample_radii, data_radii = radii(samples), radii(data)
    balls, reached, covered = [], [], np.full(len(data), np.inf)
    for _, square in squared_distance_blocks(samples, data):
        balls.append((square <= data_radii).sum(1))
        covered = np.minimum(covered, square.min(0))
    for _, square in squared_distance_blocks(data, samples):
        reached.append((square <= sample_radii).any(1))
    balls = np.concatenate(balls)
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(np.concatenate(reached).mean()),
        "density": float(balls.mean() / k),
        "coverage": float((covered <= data_radii).mean()),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of images a and b (N, H, W, C) uint8, in dB: (N,); infinite where they are equal."""
    square = ((np.asarray(a, np.float64) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / square)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of images a and b (N, H, W, C) uint8, at most 1, the mean over windows that lie within them and
    over channels: (N,) (Wang et al. 2004, section III-B: 11 x 11, Gaussian of deviation 1.5)."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x):
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, len(window), axis) @ window
        return x

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean((1, 2, 3))
