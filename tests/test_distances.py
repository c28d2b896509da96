"""Distances between sets of points against scipy, scikit-learn, loops and closed forms; what compare() reports."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import linalg, stats
from scipy.spatial.distance import cdist

from ms_diffusion.metrics.distances import (
    DIRECTIONS,
    compare,
    energy_distance,
    frechet_distance,
    kernel_distance,
    maximum_mean_discrepancy,
    mean_and_covariance,
    mean_over_pairs,
    median_distance,
    precision_recall,
    psnr,
    sliced_wasserstein,
    square_root,
    squared_distance_blocks,
    ssim,
)

DISTANCES = [sliced_wasserstein, energy_distance, maximum_mean_discrepancy]
PAIRWISE = DISTANCES[1:]
NAMES = ("sliced_wasserstein", "mmd", "energy")
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-100, 100)


def drawn(seed, n, m, d):
    """Two sets with some points in common, the second wider."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + 0.5
    b[: min(n, m) // 3] = a[: min(n, m) // 3]
    return a, b


def mmd(a, b, bandwidth=1.5):
    return maximum_mean_discrepancy(a, b, bandwidth)


# Against scipy and loops. A root magnifies the rounding of a number near 0, so squares are compared


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_energy_on_a_line_is_scipys(data):
    a, b = (data.draw(arrays(float, st.integers(1, 30), elements=numbers)) for _ in range(2))
    seen, expected = energy_distance(a[:, None], b[:, None]), stats.energy_distance(a, b)
    assert seen**2 == pytest.approx(expected**2, rel=1e-9, abs=1e-11)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 5))
def test_sliced_wasserstein_is_the_mean_of_scipys(seed, n, d, count):
    a, b = drawn(seed, n, n, d)
    directions = np.random.default_rng(seed).standard_normal((d, count))
    expected = [stats.wasserstein_distance(a @ v, b @ v) for v in directions.T]
    assert sliced_wasserstein(a, b, directions) == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-12)


def test_directions_are_unit_vectors_evenly_over_a_half_turn():
    angles = np.arctan2(DIRECTIONS[1], DIRECTIONS[0])
    np.testing.assert_allclose(np.linalg.norm(DIRECTIONS, axis=0), 1, rtol=1e-15)
    np.testing.assert_allclose(np.diff([*angles, angles[0] + np.pi]), np.pi / 32, rtol=1e-12)
    a, b = drawn(0, 20, 20, 2)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b, DIRECTIONS)


def mean_of_loops(function, a, b):
    """Mean of function(distance), a pair at a time."""
    return sum(function(math.dist(x, y)) for x in a for y in b) / (len(a) * len(b))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.floats(0.1, 5))
def test_pairwise_distances_are_those_of_loops(seed, n, m, d, bandwidth):
    a, b = drawn(seed, n, m, d)

    def energy(x, y):
        return mean_of_loops(lambda r: r, x, y)

    def kernel(x, y):
        return mean_of_loops(lambda r: math.exp(-r * r / (2 * bandwidth**2)), x, y)

    expected = 2 * energy(a, b) - energy(a, a) - energy(b, b)
    assert energy_distance(a, b) ** 2 == pytest.approx(expected, abs=1e-12)
    expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    assert mmd(a, b, bandwidth) ** 2 == pytest.approx(expected, abs=1e-13)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_bandwidth_is_by_default_the_median_distance_of_all_points(seed, n, m, d):
    a, b = drawn(seed, n, m, d)
    points = [*a, *b]
    median = np.median([math.dist(x, y) for i, x in enumerate(points) for y in points[:i]])
    if median > 0:
        assert median_distance(a, b) == pytest.approx(median, rel=1e-12)
        assert maximum_mean_discrepancy(a, b) == pytest.approx(mmd(a, b, median), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("n", [1001, 2500])
def test_median_of_many_is_of_some_evenly(n):
    """1000 of each, over all rows: of a line from 0 to 1, so many points' median distance is 1 - sqrt(1/2)."""
    line = np.linspace(0, 1, n)[:, None]
    assert median_distance(line) == pytest.approx(1 - math.sqrt(0.5), abs=2e-3)
    few = np.full((1, 1), 100.0)  # outweighed by no more than 1000
    assert median_distance(line, few) == pytest.approx(1 - math.sqrt(0.5), abs=4e-3)
    far = np.full((3000, 1), 100.0)  # half of all pairs then are (near, far)
    assert median_distance(line, far) == pytest.approx(99.1, abs=0.9)


# Closed forms. Over all pairs, n of the n^2 are a point with itself: so many means are exact at finite n too


def repeated(distance, draw, repeats=200):
    """Mean of distance^2 over draws of both sets, and four standard errors of it."""
    rng = np.random.default_rng(0)
    squares = [distance(*draw(rng)) ** 2 for _ in range(repeats)]
    return np.mean(squares), 4 * np.std(squares) / math.sqrt(repeats)


@pytest.mark.parametrize(
    ("shift", "std", "bandwidth"), [((0.0, 0.0), 1.0, 1.0), ((1.5, -0.5), 0.7, 0.8), ((3.0, 0.0), 2.0, 3.0)]
)
def test_mmd_of_two_gaussians(shift, std, bandwidth):
    """X - Y ~ N(shift, 2 std^2 I), so E k(X, Y) = (h^2 / v)^(d/2) exp(-|shift|^2 / (2 v)), v = h^2 + 2 std^2."""
    n, m, d, v = 60, 100, 2, bandwidth**2 + 2 * std**2
    own = (bandwidth**2 / v) ** (d / 2)
    both = own * math.exp(-np.dot(shift, shift) / (2 * v))

    def draw(rng):
        return std * rng.standard_normal((n, d)), std * rng.standard_normal((m, d)) + shift

    seen, tolerance = repeated(lambda a, b: mmd(a, b, bandwidth), draw)
    expected = 2 * (own - both) + (1 - own) * (1 / n + 1 / m)
    assert seen == pytest.approx(expected, abs=tolerance) and tolerance < 0.2 * expected


@pytest.mark.parametrize(("stds", "d"), [((1.0, 1.0), 2), ((1.0, 2.0), 1), ((0.5, 2.0), 3), ((1.0, 3.0), 20)])
def test_energy_of_two_gaussians_about_0(stds, d):
    """E|N(0, v I)| = sqrt(2 v) gamma((d + 1) / 2) / gamma(d / 2)."""
    n, m = 60, 100
    norm = math.sqrt(2) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    own = [norm * math.sqrt(2) * s for s in stds]

    def draw(rng):
        return stds[0] * rng.standard_normal((n, d)), stds[1] * rng.standard_normal((m, d))

    seen, tolerance = repeated(energy_distance, draw)
    expected = 2 * norm * math.hypot(*stds) - own[0] * (1 - 1 / n) - own[1] * (1 - 1 / m)
    assert seen == pytest.approx(expected, abs=tolerance) and tolerance < 0.2 * expected


@pytest.mark.parametrize(("shift", "std"), [(1.0, 1.0), (1.5, 2.0), (-4.0, 0.5)])
def test_energy_of_shifted_gaussians_on_a_line(shift, std):
    """E|N(shift, v)| = sqrt(2 v / pi) exp(-shift^2 / (2 v)) + shift erf(shift / sqrt(2 v)); here v = 2 std^2."""
    n = 80
    own = 2 * std / math.sqrt(math.pi)
    both = own * math.exp(-(shift**2) / (4 * std**2)) + shift * math.erf(shift / (2 * std))

    def draw(rng):
        return std * rng.standard_normal((n, 1)), std * rng.standard_normal((n, 1)) + shift

    seen, tolerance = repeated(energy_distance, draw)
    expected = 2 * both - 2 * own * (1 - 1 / n)
    assert seen == pytest.approx(expected, abs=tolerance) and tolerance < 0.2 * expected


def test_of_single_points():
    """sqrt(2 r), sqrt(2 - 2 exp(-r^2 / (2 h^2))) and r |cos|: for r = 5, h = 5 (the median distance) and cos = 3/5."""
    a, b = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    assert energy_distance(a, b) == pytest.approx(math.sqrt(10), rel=1e-15)
    assert maximum_mean_discrepancy(a, b) == pytest.approx(math.sqrt(2 - 2 * math.exp(-0.5)), rel=1e-14)
    assert sliced_wasserstein(a, b, np.array([[1.0], [0.0]])) == 3


# Properties


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_symmetry_and_order(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = drawn(seed, n, m, 2)
    for distance in (energy_distance, mmd):
        assert distance(a, b) ** 2 == pytest.approx(distance(b, rng.permutation(a)) ** 2, abs=1e-12)
    c = drawn(seed, n, n, 2)[1]
    assert sliced_wasserstein(a, c) == pytest.approx(sliced_wasserstein(c, rng.permutation(a)), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(arrays(float, st.tuples(st.integers(2, 20), st.just(2)), elements=numbers), seeds)
def test_equal_sets_are_at_0(a, seed):
    shuffled = np.random.default_rng(seed).permutation(a)
    assert sliced_wasserstein(a, a) == energy_distance(a, a) == mmd(a, a) == 0
    assert sliced_wasserstein(a, shuffled) < 1e-12 and energy_distance(a, shuffled) < 1e-6 and mmd(a, shuffled) < 1e-7
    assert energy_distance(a, np.tile(a, (3, 1))) < 1e-6 and mmd(a, np.tile(a, (3, 1))) < 1e-7  # equal as distributions


@pytest.mark.parametrize("distance", [sliced_wasserstein, energy_distance, lambda a, b: mmd(a, b, 0.5)])
def test_other_sets_are_not(distance):
    """Equal means, then equal means and covariances, which MMD by the median bandwidth would hardly tell apart."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((500, 2)), rng.standard_normal((500, 2))
    sign = rng.choice([-1.0, 1.0], (500, 2))
    assert distance(a, 2 * b) > 2 * distance(a, b) > 0
    assert distance(a, sign) > 2 * distance(a, b)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 20), st.integers(2, 20), st.integers(1, 4), st.floats(0.01, 100))
def test_motion_changes_nothing_and_scale_by_its_power(seed, n, m, d, scale):
    a, b = drawn(seed, n, m, d)
    rng = np.random.default_rng(seed)
    turn, shift = np.linalg.qr(rng.standard_normal((d, d)))[0], 10 * rng.standard_normal(d)
    energy, kernel, by_median = energy_distance(a, b) ** 2, mmd(a, b) ** 2, maximum_mean_discrepancy(a, b) ** 2
    moved = a @ turn + shift, b @ turn + shift
    assert energy_distance(*moved) ** 2 == pytest.approx(energy, abs=1e-11)
    assert mmd(*moved) ** 2 == pytest.approx(kernel, abs=1e-11)
    assert maximum_mean_discrepancy(*moved) ** 2 == pytest.approx(by_median, abs=1e-10)
    scaled = scale * a, scale * b
    assert energy_distance(*scaled) ** 2 == pytest.approx(scale * energy, abs=1e-12 * scale)
    assert mmd(*scaled, 1.5 * scale) ** 2 == pytest.approx(kernel, abs=1e-12)
    assert maximum_mean_discrepancy(*scaled) ** 2 == pytest.approx(by_median, abs=1e-12)


@pytest.mark.parametrize("distance", PAIRWISE)
def test_far_from_the_origin_near_points_stay_apart(distance):
    """Which |x|^2 + |y|^2 - 2 x y would not tell; these numbers are exact in float64."""
    a, b = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.5], [2.0, 0.0]])
    assert distance(a + 2**40, b + 2**40) == distance(a, b) > 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_float32_and_lists_are_computed_in_float64(distance):
    a, b = (points.astype(np.float32) for points in drawn(0, 50, 50, 2))
    assert distance(a, b) == distance(a.astype(float), b.astype(float)) == distance(a.tolist(), b.tolist())
    assert type(distance(a, b)) is float


def test_blocks_of_rows_are_all_pairs():
    """Fewer rows in a block than points, and more."""
    for n, m in ((300, 1000), (5, 20_000), (20_000, 5)):
        a, b = drawn(0, n, m, 1)
        assert mean_over_pairs(np.sqrt, a, b) == pytest.approx(cdist(a, b).mean(), rel=1e-12)


# compare()


def rng(seed=0):
    return np.random.default_rng(seed)


def ring(seed, n):
    """Points about a circle."""
    angle = rng(seed).uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng(seed + 1).standard_normal((n, 2))


def test_samples_like_the_data_score_the_floor():
    """On average over samples and data."""
    runs = [compare(ring(4 * i, 80), ring(4 * i + 2, 160), rng(i), repeats=3) for i in range(150)]
    for name in NAMES:
        scores, floors = (np.array([run[name][key] for run in runs]) for key in ("score", "floor"))
        error = np.std(scores - floors) / math.sqrt(len(runs))
        assert abs(np.mean(scores - floors)) < 4 * error < 0.15 * np.mean(floors)


def squeezed(points):
    return points * [1.0, 0.7]


@pytest.mark.parametrize(
    "spoil", [lambda x: x + 0.3, lambda x: 1.3 * x, squeezed, lambda x: 0 * x, lambda x: x[:20].repeat(25, 0)]
)
def test_samples_unlike_the_data_score_above_the_floor(spoil):
    """Shifted, wide, flat, collapsed to a point, repeated."""
    for result in compare(spoil(ring(0, 500)), ring(2, 1000), rng()).values():
        assert result["score"] > 1.5 * result["floor_most"]


def test_samples_that_are_the_data_score_below_the_floor():
    data = ring(0, 400)
    for result in compare(data, data, rng()).values():
        assert result["score"] < 0.9 * result["floor"]


def test_what_compare_computes():
    """By hand: the data's orders are drawn before the samples'. n = 30 for the sliced distance, 25 for the others."""
    samples, data = ring(0, 35), 1.1 * ring(2, 61)
    seen, generator = compare(samples, data, rng(5), repeats=3, most=25), rng(5)
    orders, bandwidth = [generator.permutation(61) for _ in range(3)], median_distance(data)
    functions = (
        sliced_wasserstein,
        lambda a, b: mmd(a[:25], b[:25], bandwidth),
        lambda a, b: energy_distance(a[:25], b[:25]),
    )
    pairs = [(generator.choice(samples, 30, replace=False), data[o[:30]], data[o[30:60]]) for o in orders]
    for name, distance in zip(NAMES, functions, strict=True):
        floors = [distance(a, b) for _, a, b in pairs]
        score, most = np.mean([distance(s, a) for s, a, _ in pairs]), max(floors)
        assert seen[name] == pytest.approx({"score": score, "floor": np.mean(floors), "floor_most": most}, rel=1e-12)
    assert tuple(seen) == NAMES
    assert {type(value) for result in seen.values() for value in result.values()} == {float}


def test_a_repeat_parts_all_data_in_two():
    """Four data and two samples: a row in both sets, or one drawn twice, would give other numbers."""
    data, line = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 7.0]]), np.array([[0.0], [1.0]])
    floors = {compare(data[:2], data, rng(i), 1, directions=line)["sliced_wasserstein"]["floor"] for i in range(20)}
    assert floors == {4.5, 2.5}  # {0, 1 | 3, 7}, and {0, 3 | 1, 7} or {0, 7 | 1, 3}


def test_compare_repeats_by_its_rng():
    samples, data = ring(0, 60), ring(2, 150)
    kept = samples.copy(), data.copy()
    assert compare(samples, data, rng(1), 2) == compare(samples, data, rng(1), 2) != compare(samples, data, rng(2), 2)
    assert np.array_equal(samples, kept[0]) and np.array_equal(data, kept[1])


@pytest.mark.parametrize("samples", [ring(4, 50) + 3, 0 * ring(4, 50), ring(4, 80), ring(4, 5000)])
def test_the_floor_does_not_depend_on_the_samples(samples):
    """Nor on their number, where half the data are fewer."""
    data = ring(2, 100)
    expected, seen = compare(ring(0, 50), data, rng()), compare(samples, data, rng())
    for name in NAMES:
        assert (seen[name]["floor"], seen[name]["floor_most"]) == (expected[name]["floor"], expected[name]["floor_most"])
        assert seen[name]["score"] != expected[name]["score"]


def test_fewer_samples_than_half_the_data():
    """n = 2: the floor is that of two data from two."""
    few, many = compare(ring(0, 2), ring(2, 400), rng(), 30), compare(ring(0, 200), ring(2, 400), rng(), 30)
    for name in NAMES:
        assert few[name]["floor"] > 3 * many[name]["floor"]


@pytest.mark.parametrize("d", [1, 3])
def test_compare_in_other_dimensions(d):
    samples, data = rng(0).standard_normal((100, d)), 4 * rng(1).standard_normal((200, d))
    result = compare(samples, data, rng(), directions=np.eye(d))
    assert all(r["score"] > r["floor_most"] > 0 for r in result.values())
    with pytest.raises(ValueError, match=f"dimension {d}, the directions 2"):
        compare(samples, data, rng())


# Errors


@pytest.mark.parametrize(
    "distance", [*DISTANCES, lambda a, b: compare(a, b, rng()), lambda a, b: kernel_distance(a, b, rng()), precision_recall]
)
def test_what_are_no_points_is_refused(distance):
    for shapes in (((5,), (5,)), ((5, 2), (5, 3)), ((5, 2, 1), (5, 2, 1)), ((0, 2), (5, 2)), ((5, 0), (5, 0))):
        with pytest.raises(ValueError, match=r"^points \(n, d\) and \(m, d\) are needed"):
            distance(*map(np.zeros, shapes))


def test_sliced_wasserstein_needs_equal_numbers():
    with pytest.raises(ValueError, match="5 and 1"):
        sliced_wasserstein(np.zeros((5, 2)), np.zeros((1, 2)))


def test_the_bandwidth_is_above_0():
    for bandwidth in (0.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth must be above 0"):
            mmd(*drawn(0, 5, 5, 2), bandwidth)
    with pytest.raises(ValueError, match="bandwidth must be above 0.* do they differ"):
        maximum_mean_discrepancy(np.ones((5, 2)), np.ones((6, 2)))
    assert mmd(np.ones((5, 2)), np.ones((6, 2))) == 0


@pytest.mark.parametrize("distance", [sliced_wasserstein, energy_distance, mmd])
def test_nan_is_not_near(distance):
    a, b = drawn(0, 20, 20, 2)
    b[3, 1] = math.nan
    assert math.isnan(distance(a, b)) and math.isnan(distance(b, b))


def test_too_few():
    for n, m in ((1, 4), (2, 3)):
        with pytest.raises(ValueError, match=f"not {n} and {m}$"):
            compare(ring(0, n), ring(2, m), rng())
    compare(ring(0, 2), ring(2, 4), rng())


def test_what_is_not_finite_is_counted():
    corrupt = ring(0, 30)
    corrupt[[3, 7, 7], [0, 0, 1]] = math.nan, math.inf, -math.inf
    with pytest.raises(ValueError, match="^2 of 30 samples are not finite$"):
        compare(corrupt, ring(2, 60), rng())
    with pytest.raises(ValueError, match="^2 of 30 data are not finite$"):
        compare(ring(2, 60), corrupt, rng())
    with pytest.raises(ValueError, match="^the features of 2 of 30 images are not finite$"):
        mean_and_covariance(corrupt)


# Frechet distance


def turn(seed, d):
    """A rotation, or one with a mirror."""
    return np.linalg.qr(rng(seed).standard_normal((d, d)))[0]


def gaussian(seed, d, rank=None):
    """A mean and a covariance, of full rank by default."""
    generator = rng(seed)
    factor = generator.standard_normal((d, 2 * d if rank is None else rank))
    return generator.standard_normal(d), factor @ factor.T / d


def close_to(value, scale=1.0):
    """Roots of what rounding leaves of 0 are 1e-8."""
    return pytest.approx(value, rel=1e-9, abs=1e-6 * scale)


dimensions = st.integers(1, 8)


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions, st.integers(0, 8))
def test_frechet_of_one_covariance_is_that_of_the_means(seed, d, rank):
    mean, covariance = gaussian(seed, d, rank)
    step = rng(seed + 1).standard_normal(d)
    assert frechet_distance(mean, covariance, mean, covariance) == close_to(0)
    assert frechet_distance(mean, covariance, mean + step, covariance) == close_to(step @ step)


@settings(deadline=None, max_examples=30)
@given(st.data(), dimensions, seeds)
def test_frechet_of_commuting_covariances(data, d, seed):
    """|m_a - m_b|^2 + sum (s_a - s_b)^2, with s the standard deviations along common axes; some may be 0."""
    stds = st.one_of(st.just(0.0), st.floats(1e-6, 100))
    a, b = (data.draw(arrays(float, d, elements=stds)) for _ in range(2))
    means, axes = rng(seed).standard_normal((2, d)), turn(seed, d)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((a - b) ** 2)
    found = frechet_distance(means[0], (axes * a**2) @ axes.T, means[1], (axes * b**2) @ axes.T)
    assert found == close_to(expected, scale=max(1, *a, *b) ** 2)
    assert frechet_distance(means[0], np.diag(a**2), means[1], np.diag(b**2)) == close_to(expected)


@pytest.mark.parametrize(("a", "b", "expected"), [((0, 1), (3, 2), 10), ((1, 0), (1, 5), 25), ((-1, 3), (1, 3), 4)])
def test_frechet_on_a_line(a, b, expected):
    """(m_a - m_b)^2 + (s_a - s_b)^2."""
    found = frechet_distance(np.array([a[0]]), np.array([[a[1] ** 2]]), np.array([b[0]]), np.array([[b[1] ** 2]]))
    assert found == pytest.approx(expected, rel=1e-14) and type(found) is float


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions, st.integers(1, 16), st.floats(0.01, 100))
def test_frechet_is_symmetric_moves_along_and_scales_by_the_square(seed, d, rank, scale):
    (mean_a, a), (mean_b, b) = gaussian(seed, d), gaussian(seed + 1, d, rank)
    expected, axes = frechet_distance(mean_a, a, mean_b, b), turn(seed, d)
    assert expected > 0
    assert frechet_distance(mean_b, b, mean_a, a) == close_to(expected)
    moved = [3 + axes @ mean_a, axes @ a @ axes.T, 3 + axes @ mean_b, axes @ b @ axes.T]
    assert frechet_distance(*moved) == close_to(expected)
    scaled = [scale * mean_a, scale**2 * a, scale * mean_b, scale**2 * b]
    assert frechet_distance(*scaled) == close_to(scale**2 * expected, scale**2)


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions)
def test_frechet_by_scipys_root(seed, d):
    (mean_a, a), (mean_b, b) = gaussian(seed, d), gaussian(seed + 1, d)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(mean_a, a, mean_b, b) == close_to(expected)


def test_frechet_stays_real_and_right_where_scipys_root_turns_complex():
    """Five and ten standard deviations of twenty are not nearly 0."""
    turned_complex = 0
    for seed in range(10):
        stds, axes = rng(seed).uniform(0.5, 1, (2, 20)), turn(seed, 20)
        stds[0, 5:] = stds[1, :10] = 1e-10
        a, b = (axes * stds[0] ** 2) @ axes.T, (axes * stds[1] ** 2) @ axes.T
        turned_complex += np.iscomplexobj(linalg.sqrtm(a @ b))
        found = frechet_distance(np.zeros(20), a, np.zeros(20), b)
        assert type(found) is float and found == close_to(np.sum((stds[0] - stds[1]) ** 2))
    assert turned_complex > 0


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions, st.integers(1, 16))
def test_square_root_is_symmetric_and_squares_to_the_covariance(seed, d, rank):
    covariance = gaussian(seed, d, rank)[1]
    root = square_root(covariance)
    np.testing.assert_allclose(root, root.T, atol=1e-12)
    np.testing.assert_allclose(root @ root, covariance, atol=1e-10)
    assert np.linalg.eigvalsh(root)[0] > -1e-7


@pytest.mark.parametrize("bad", [np.diag([1.0, -1e-3]), -np.eye(2), np.array([[1.0, 2.0], [2.0, 1.0]])])
def test_what_is_no_covariance_is_refused(bad):
    good, mean = np.eye(2), np.zeros(2)
    for covariances in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="^a covariance has no negative eigenvalue, such as -"):
            frechet_distance(mean, covariances[0], mean, covariances[1])
    assert frechet_distance(mean, np.zeros((2, 2)), mean, np.diag([1, -1e-12])) == close_to(1)  # by rounding


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions, st.integers(1, 10))
def test_mean_and_covariance_by_loops(seed, d, more):
    points = rng(seed).standard_normal((d + more, d)).astype(np.float32)
    mean, covariance = mean_and_covariance(points)
    expected = [math.fsum(map(float, column)) / len(points) for column in points.T]
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-13)
    steps = [[float(value) - m for value, m in zip(point, expected, strict=True)] for point in points]
    sums = [[math.fsum(step[i] * step[j] for step in steps) for j in range(d)] for i in range(d)]
    np.testing.assert_allclose(covariance, np.array(sums) / (len(points) - 1), rtol=1e-11, atol=1e-12)
    assert mean.shape == (d,) and covariance.shape == (d, d) and covariance.dtype == np.float64


def test_frechet_of_many_draws_nears_that_of_their_gaussians():
    (mean_a, a), (mean_b, b) = gaussian(0, 4), gaussian(1, 4)
    points = [rng(2 + i).multivariate_normal(*g, 100_000) for i, g in enumerate([(mean_a, a), (mean_b, b)])]
    found = frechet_distance(*mean_and_covariance(points[0]), *mean_and_covariance(points[1]))
    assert found == pytest.approx(frechet_distance(mean_a, a, mean_b, b), rel=0.03)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 2), (5, 9), (128, 128)])
def test_too_few_images_for_the_features(n, d):
    message = f"^{n} images are too few for {d} features: they span {n - 1} dimensions .*; take at least {d + 1},"
    with pytest.raises(ValueError, match=message):
        mean_and_covariance(rng().standard_normal((n, d)))
    covariance = mean_and_covariance(rng().standard_normal((d + 1, d)))[1]
    assert np.linalg.eigvalsh(covariance)[0] > 0


# Kernel distance


def kernel_by_loops(a, b):
    def mean(x, y, skip):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip and i == j)]
        return sum((float(x[i] @ y[j]) / a.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 12), st.integers(1, 5))
def test_kernel_distance_by_loops(seed, n, d):
    """Where a subset is the whole set, all subsets give the same."""
    a, b = drawn(seed, n, n, d)
    mean, std = kernel_distance(a, b, rng(), subsets=3)
    expected = kernel_by_loops(a, b)
    assert mean == pytest.approx(expected, rel=1e-9, abs=1e-9) and std == pytest.approx(0, abs=1e-9 * (1 + abs(expected)))
    assert type(mean) is type(std) is float


def test_kernel_distance_by_scikit_learn():
    kernel = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    a, b = drawn(0, 60, 60, 16)
    off = ~np.eye(60, dtype=bool)
    own, both = [kernel(x, x, degree=3, coef0=1)[off].mean() for x in (a, b)], kernel(a, b, degree=3, coef0=1).mean()
    assert kernel_distance(a, b, rng(), 1)[0] == pytest.approx(sum(own) - 2 * both, rel=1e-9)


@pytest.mark.parametrize(("shift", "std"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.5), (-1.0, 0.5)])
def test_kernel_distance_is_unbiased(shift, std):
    """On a line (x y + 1)^3 compares three moments: MMD^2 = 3 (m_1 - m_1')^2 + 3 (m_2 - m_2')^2 + (m_3 - m_3')^2."""
    n, repeats, generator = 20, 4000, rng()
    found = []
    for _ in range(repeats):
        a, b = generator.standard_normal((n, 1)), shift + std * generator.standard_normal((n, 1))
        found.append(kernel_distance(a, b, generator, 1)[0])
    moments = shift, shift**2 + std**2, shift**3 + 3 * shift * std**2
    expected = 3 * moments[0] ** 2 + 3 * (moments[1] - 1) ** 2 + moments[2] ** 2
    error = np.std(found) / math.sqrt(repeats)
    assert np.mean(found) == pytest.approx(expected, abs=4 * error)
    assert error < 0.2 * (28 - 4) / n  # a point with itself would add far more: E (x^2 + 1)^3 - E (x y + 1)^3 over n
    if not shift and std == 1:
        assert min(found) < 0


def test_kernel_distance_of_subsets_spreads():
    """Less for larger ones, about the value of all points."""
    a, b = drawn(0, 200, 250, 8)
    whole, spreads = kernel_by_loops(a, b), []
    for size in (15, 50, 160):
        mean, std = kernel_distance(a, b, rng(), 200, size)
        assert mean == pytest.approx(whole, abs=4 * std / math.sqrt(200) + 0.05 * whole)
        spreads.append(std)
    assert spreads[0] > 1.5 * spreads[1] > 1.5**2 * spreads[2] > 0
    again = kernel_distance(a, b, rng(), 5, 50)
    assert again == kernel_distance(a, b, rng(), 5, 50) != kernel_distance(a, b, rng(1), 5, 50)


def test_kernel_distance_needs_two_points_of_each():
    for n, m in ((1, 5), (5, 1)):
        with pytest.raises(ValueError, match=f"^at least 2 points of each are needed, not {n} and {m}$"):
            kernel_distance(np.ones((n, 2)), np.ones((m, 2)), rng())
    assert kernel_distance(np.ones((5, 2)), np.ones((9, 2)), rng()) == pytest.approx((0, 0), abs=1e-12)


# Precision and recall


def square(x, y):
    return sum((p - q) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True))


def precision_by_loops(samples, data, k):
    def radius(i, points):
        return sorted(square(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    sample_radii, data_radii = ([radius(i, points) for i in range(len(points))] for points in (samples, data))
    balls = [sum(square(x, y) <= r for y, r in zip(data, data_radii, strict=True)) for x in samples]
    reached = [any(square(x, y) <= r for x, r in zip(samples, sample_radii, strict=True)) for y in data]
    covered = [any(square(x, y) <= r for x in samples) for y, r in zip(data, data_radii, strict=True)]
    shares = [sum(b > 0 for b in balls) / len(samples), sum(reached) / len(data), sum(balls) / len(samples) / k]
    return dict(zip(("precision", "recall", "density", "coverage"), [*shares, sum(covered) / len(data)], strict=True))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_precision_recall_by_loops(seed, n, m, d, k, on_grid):
    """Also for points that coincide and tie: on the grid nothing is rounded."""
    generator = rng(seed)
    if on_grid:
        samples, data = generator.integers(0, 4, (n, d)), generator.integers(0, 4, (m, d))
    else:
        samples, data = 1.3 * generator.standard_normal((n, d)) + 0.5, generator.standard_normal((m, d))
    found = precision_recall(samples, data, k)
    assert found == pytest.approx(precision_by_loops(samples.astype(float), data.astype(float), k), rel=1e-12)
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize("d", [2, 128])
def test_samples_that_are_the_data_have_precision_and_recall_1(d):
    """Each of the balls holds k points and its centre."""
    data = rng().standard_normal((300, d))
    found = precision_recall(rng(1).permutation(data), data, 5)
    assert found == {"precision": 1, "recall": 1, "density": pytest.approx(1.2, abs=2e-3), "coverage": 1}


def test_far_samples_have_neither():
    a, b = rng(0).standard_normal((100, 3)), rng(1).standard_normal((120, 3)) + 100
    assert precision_recall(a, b) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0)


def test_samples_like_the_data_have_about_1_of_density_and_coverage():
    """Coverage is 1 - C(n, k) / C(2 n, k) ~ 1 - 2^-k for fresh data (Naeem et al. 2020, section 3.3)."""
    found = precision_recall(rng(0).standard_normal((2000, 4)), rng(1).standard_normal((2000, 4)), 5)
    assert found["density"] == pytest.approx(1, abs=0.05) and found["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)
    assert min(found.values()) > 0.9


def test_samples_of_one_cluster_of_two():
    data = np.concatenate([rng(0).standard_normal((300, 3)), rng(1).standard_normal((300, 3)) + 50])
    samples = 0.7 * rng(2).standard_normal((400, 3))
    found = precision_recall(samples, data)
    assert found["precision"] > 0.99 and 0.4 < found["recall"] <= 0.5 and found["coverage"] <= 0.5
    swapped = precision_recall(data, samples)
    assert (swapped["precision"], swapped["recall"]) == (found["recall"], found["precision"])


def test_an_outlier_sways_density_less_than_precision():
    """One datum far away makes a ball that holds all samples between: all are precise, and the density is 1 / k."""
    data = np.concatenate([rng(0).standard_normal((50, 2)), [[1000.0, 0.0]]])
    samples = rng(1).standard_normal((50, 2)) + [500, 0]
    found = precision_recall(samples, data, 5)
    assert found["precision"] == 1 and found["density"] == 1 / 5 and found["coverage"] == 1 / 51 and found["recall"] == 0


def test_points_that_coincide_reach_only_themselves():
    """Six of each of three points: every ball has a radius of 0."""
    data = np.repeat([[0.0, 0.0], [1.0, 0.0], [4.0, 4.0]], 6, 0)
    samples = np.repeat([[0.0, 0.0], [2.0, 0.0]], 6, 0)
    assert precision_recall(samples, data, 5) == {"precision": 1 / 2, "recall": 1 / 3, "density": 0.6, "coverage": 1 / 3}


def test_points_that_coincide_reach_themselves_after_rounding():
    for seed in range(60):
        n, d = 10 + seed % 20, 20 + 3 * seed
        points = rng(seed).standard_normal((n, d))
        found = precision_recall(np.repeat(points, 8, 0), np.repeat(points, 7, 0), 5)
        assert found["precision"] == found["recall"] == found["coverage"] == 1


def test_precision_recall_needs_more_than_k_points():
    for n, m in ((5, 30), (30, 5)):
        with pytest.raises(ValueError, match=f"not {n} and {m}$"):
            precision_recall(np.zeros((n, 2)), np.zeros((m, 2)))
    assert precision_recall(np.zeros((6, 2)), np.zeros((6, 2)))["precision"] == 1


def test_squared_distances_in_blocks():
    a, b = drawn(0, 23, 37, 3)
    for rows, blocks in ((1, 23), (7, 4), (1000, 1)):
        found = list(squared_distance_blocks(a, b, rows))
        assert len(found) == blocks
        np.testing.assert_allclose(np.concatenate(found), ((a[:, None] - b) ** 2).sum(-1), rtol=1e-12, atol=1e-13)


def test_precision_recall_in_several_blocks():
    samples, data = 1.1 * rng(0).standard_normal((1200, 2)), rng(1).standard_normal((1100, 2))
    sample_radii, data_radii = (np.sort(cdist(x, x))[:, 5] for x in (samples, data))
    distances = cdist(samples, data)
    inside, recalled = distances <= data_radii, distances.T <= sample_radii
    shares = [inside.any(1).mean(), recalled.any(1).mean(), inside.sum(1).mean() / 5, inside.any(0).mean()]
    assert list(precision_recall(samples, data).values()) == pytest.approx(shares, rel=1e-12)


# Pairs of images


def pairs(n, side, channels=1, seed=0):
    """Images (n, side, side, channels) uint8, and others that are more and more unlike them."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (n, side, side, channels))
    noise = rng.normal(0, np.linspace(0, 80, n), (side, side, channels, n)).transpose(3, 0, 1, 2)
    return a.astype(np.uint8), np.clip(a + noise, 0, 255).astype(np.uint8)


def test_psnr_is_its_formula():
    a, b = pairs(7, 5, 3)
    expected = [
        20 * math.log10(255 / math.sqrt(np.mean((x.astype(float) - y) ** 2))) for x, y in zip(a[1:], b[1:], strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), [math.inf, *expected])
    grays = np.full((1, 4, 4, 1), 7, np.uint8)
    np.testing.assert_allclose(psnr(grays, grays + 1), 48.1308, rtol=1e-5)


def test_ssim_is_its_formula():
    """Window by window: weighed means, variances and covariance of two images."""
    a, b = pairs(5, 13, 2)
    window = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    for x, y, found in zip(a.astype(float), b.astype(float), ssim(a, b), strict=True):
        values = []
        for top in range(3):
            for left in range(3):
                for c in range(2):
                    p, q = (each[top : top + 11, left : left + 11, c] for each in (x, y))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    value = (2 * mp * mq + 2.55**2) * (2 * cov + 7.65**2)
                    values.append(value / (mp**2 + mq**2 + 2.55**2) / (vp + vq + 7.65**2))
        assert found == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(a, b)[0] == pytest.approx(1) and (np.diff(ssim(a, b)) < 0).all()
    with pytest.raises(ValueError, match="10 x 13 are smaller than the window"):
        ssim(a[:, :10], b[:, :10])
