"""Toy distributions against their geometry and scikit-learn's; files of points, valid and invalid; normalization."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import cKDTree

from ms_diffusion import files
from ms_diffusion.data.points import POINTS_FILE, TOYS, Normalizer, load_points, read_points, read_saved_points
from ms_diffusion.files import write
from ms_diffusion.runtime import UserError

pytestmark = pytest.mark.filterwarnings("error")
N = 20_000


def draw(name, n=N, seed=0):
    return TOYS[name](np.random.default_rng(seed), n)


def refused(message, fn, *args):
    """fn raises a UserError of one line that matches the regular expression."""
    with pytest.raises(UserError, match=message) as raised:
        fn(*args)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def same_distribution(a, b, p=1e-3):
    """Two samples (n, 2) agree along four lines, in radius and in angle; with fixed seeds a pass is for good."""

    def features(z):
        x, y = z[:, 0], z[:, 1]
        return [x, y, x + y, x - y, np.hypot(x, y), np.arctan2(y, x)]

    return all(stats.ks_2samp(u, v).pvalue > p for u, v in zip(features(a), features(b), strict=True))


def is_uniform(counts, p=1e-3):
    return stats.chisquare(counts).pvalue > p


# The toys


@pytest.mark.parametrize("name", TOYS)
def test_exact_count(name):
    for n in (1, 8, 1001):
        points = draw(name, n)
        assert points.shape == (n, 2) and points.dtype == np.float64 and np.isfinite(points).all()
        assert len(np.unique(points, axis=0)) == n


@pytest.mark.parametrize("name", TOYS)
def test_drawn_from_rng_alone(name):
    rng = np.random.default_rng(5)
    first, second = TOYS[name](rng, 50), TOYS[name](rng, 50)
    np.testing.assert_array_equal(first, draw(name, 50, 5))
    assert not np.isin(second, first).any() and not np.isin(draw(name, 50, 6), first).any()


@pytest.mark.parametrize("name", TOYS)
def test_any_slice_is_a_fair_sample(name):
    points = draw(name)
    assert same_distribution(points[: N // 2], points[N // 2 :])
    assert same_distribution(points[::2], points[1::2])
    assert same_distribution(points[:500], points[500:])
    assert (
        abs(np.corrcoef(points[1:].T, points[:-1].T)[:2, 2:]).max() < 0.03
    )  # 4 standard deviations: neighbours are strangers


def test_same_distribution_sees_a_small_shift():
    points = draw("scurve")
    assert not same_distribution(points, draw("scurve", seed=1) + [0.04, 0])
    assert not same_distribution(points[:, ::-1], draw("scurve", seed=1))


def near(points, t, *arms):
    """Each point's distance to the curves ``arms``, each (len(t), 2), and the arm and t that it is nearest to."""
    distance, i = cKDTree(np.concatenate(arms)).query(points)
    return distance, i // len(t), t[i % len(t)]


def rms(x):
    return np.sqrt((x**2).mean())


def test_s_curve():
    """Two arcs of unit circles about (0, 1) and (0, -1)."""
    t = np.linspace(-1.5 * np.pi, 1.5 * np.pi, 20_001)
    upper, lower = t < 0, t >= 0
    curve = np.zeros((len(t), 2))
    curve[upper] = np.stack([np.sin(t[upper]), 1 - np.cos(t[upper])], 1)
    curve[lower] = np.stack([np.sin(t[lower]), np.cos(t[lower]) - 1], 1)
    assert np.allclose(np.hypot(curve[:, 0], np.abs(curve[:, 1]) - 1), 1)
    points = draw("scurve")
    distance, _, at = near(points, t, curve)
    assert distance.max() < 0.5 and rms(distance) == pytest.approx(0.1, rel=0.03)
    assert stats.kstest(at, stats.uniform(-1.5 * np.pi, 3 * np.pi).cdf).statistic < 0.02
    top = points[(abs(at + np.pi) < 0.3)]  # its apex is at (0, 2)
    assert top[:, 1].mean() > 1.9 and top[:, 1].std() > 0.09


def test_swiss_roll():
    t = np.linspace(1.5 * np.pi, 4.5 * np.pi, 40_001)
    points = draw("swiss-roll")
    distance, _, at = near(points, t, np.stack([t * np.cos(t), t * np.sin(t)], 1))
    assert distance.max() < 2.5 and rms(distance) == pytest.approx(0.5, rel=0.03)
    assert stats.kstest(at, stats.uniform(1.5 * np.pi, 3 * np.pi).cdf).statistic < 0.02
    assert 14 < abs(points).max() < 16


def test_two_moons():
    t = np.linspace(0, np.pi, 20_001)
    upper = np.stack([np.cos(t), np.sin(t)], 1)
    points = draw("two-moons")
    distance, arm, at = near(points, t, upper, [1, 0.5] - upper)
    assert distance.max() < 0.25 and rms(distance) == pytest.approx(0.05, rel=0.03)
    assert is_uniform(np.bincount(arm, minlength=2))
    for moon in (0, 1):
        assert stats.kstest(at[arm == moon], stats.uniform(0, np.pi).cdf).statistic < 0.02
    assert points[arm == 0].mean(0) == pytest.approx([0, 2 / np.pi], abs=0.03)  # the upper is where 0 <= x^2 + y^2 ~ 1
    assert points[arm == 1].mean(0) == pytest.approx([1, 0.5 - 2 / np.pi], abs=0.03)


def test_eight_gaussians():
    k = np.arange(8)
    centers = 4 / np.sqrt(2) * np.stack([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)], 1)
    points = draw("eight-gaussians")
    distance, i = cKDTree(centers).query(points)
    assert is_uniform(np.bincount(i, minlength=8))
    for blob in range(8):
        off = points[i == blob] - centers[blob]
        assert np.abs(off.mean(0)).max() < 0.03  # 4 standard errors; the std is 0.354
        assert np.allclose(off.std(0), 0.5 / np.sqrt(2), rtol=0.06) and abs(np.corrcoef(off.T)[0, 1]) < 0.08
        assert stats.kstest(off[:, 0] * np.sqrt(8), "norm").pvalue > 1e-3


def test_checkerboard():
    points = draw("checkerboard")
    assert points.min() >= -4 and points.max() < 4 and points.min() < -3.99 and points.max() > 3.99
    counts, _, _ = np.histogram2d(*points.T, bins=4, range=[[-4, 4], [-4, 4]])
    dark = np.add.outer(range(4), range(4)) % 2 == 0  # the square at (-4, -4) is
    assert (counts[~dark] == 0).all() and is_uniform(counts[dark])
    corner, inside = np.divmod(points, 2)
    assert all(stats.kstest(inside[:, axis], stats.uniform(0, 2).cdf).pvalue > 1e-3 for axis in (0, 1))
    assert abs(np.corrcoef(inside.T)[0, 1]) < 0.03
    fine, _, _ = np.histogram2d(*points.T, bins=16, range=[[-4, 4], [-4, 4]])
    assert is_uniform(fine[np.kron(dark, np.ones((4, 4), bool))])


def test_pinwheel():
    """Turned back, the blobs are normal along the radius and across it."""
    w = draw("pinwheel") @ [1, 1j] / 2
    k = np.arange(5)[:, None]
    along = np.abs(w)
    for _ in range(30):  # along = Re(w exp(i turn(along))), for each of five turns: a contraction
        turned = w * np.exp(1j * (2 * np.pi / 5 * k + 0.25 * np.exp(along)))
        along = turned.real
    blob = np.where(turned.real > 0, np.abs(turned.imag), np.inf).argmin(0)
    turned = turned[blob, np.arange(N)]
    assert is_uniform(np.bincount(blob, minlength=5))
    assert stats.kstest(turned.real, stats.norm(1, 0.3).cdf).statistic < 0.015
    assert stats.kstest(turned.imag, stats.norm(0, 0.1).cdf).statistic < 0.015


def test_spiral():
    """About its mean curve, what is off it has the variance of normal 0.1 and of uniform [0, 0.5) / 3."""
    t = np.linspace(0, 3 * np.pi, 20_001)
    arm = np.stack([0.25 - t * np.cos(t), 0.25 + t * np.sin(t)], 1) / 3
    points = draw("spiral")
    distance, side, at = near(points, t, arm, -arm)
    assert is_uniform(np.bincount(side, minlength=2))
    outer = at > 3  # within, the arms meet
    assert distance.max() < 0.6 and rms(distance[outer]) == pytest.approx(np.sqrt(0.1**2 + 0.25 / 9 / 12), rel=0.03)
    assert stats.kstest((at / (3 * np.pi)) ** 2, "uniform").statistic < 0.02
    for one, sign in ((0, 1), (1, -1)):
        chosen = outer & (side == one)
        u = np.searchsorted(t, at[chosen])
        assert np.abs((sign * points[chosen] - arm[u]).mean(0)).max() < 0.02
    assert abs(stats.kurtosis(distance[at > 6] * np.sign(np.hypot(*points.T) - at / 3)[at > 6])) < 0.5


@pytest.mark.parametrize(
    "name, make, noise, axes",
    [
        ("scurve", "make_s_curve", 0.1, [0, 2]),
        ("swiss-roll", "make_swiss_roll", 0.5, [0, 2]),
        ("two-moons", "make_moons", 0.05, 0),
    ],
)
def test_like_scikit_learn(name, make, noise, axes):
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = getattr(datasets, make)(N, noise=noise, random_state=0)[0]
    theirs = theirs[:, axes] if axes else theirs
    assert same_distribution(draw(name), theirs)
    assert not same_distribution(draw(name), theirs * [1, -1])


# Sets by name


@pytest.mark.parametrize("name", TOYS)
def test_load_toys(name):
    train, test = load_points(name, None, 301, 3)
    assert train.shape == (301, 2) and test.shape == (602, 2)
    for points in (train, test):
        assert points.dtype == np.float32 and points.flags.c_contiguous
    again = load_points(name, "", 301, 3)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(test, again[1])
    for others in (test, *load_points(name, None, 301, 4)):
        assert not np.isin(train, others).all(1).any()
    big = load_points(name, None, 10_000, 3)
    assert same_distribution(*big) and same_distribution(big[0], draw(name))  # in the data's own units
    assert [len(part) for part in load_points(name, None, 1, 3)] == [1, 2]


def test_toys_take_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos", "a.npy").write_bytes(b"")
    np.testing.assert_array_equal(load_points("spiral", "photos", 9, 0)[0], load_points("spiral", None, 9, 0)[0])
    np.testing.assert_array_equal(load_points("spiral", "not-there", 9, 0)[0], load_points("spiral", None, 9, 0)[0])
    Path("notes.txt").write_text("")
    for path in ("notes.txt", "not-there.npy", "not-there.CSV", "photos/a.npy"):
        refused(f"{path}.*--data.name points-file", load_points, "spiral", path, 9, 0)


def test_bad_names_and_numbers():
    refused("'circles'.*scurve, swiss-roll, .*, points-file", load_points, "circles", None, 10, 0)
    refused("--data.num 0", load_points, "spiral", None, 0, 0)
    refused("--data.name points-file needs --data.dir", load_points, POINTS_FILE, "", 10, 0)


@pytest.mark.parametrize("count, held_out", [(2, 1), (9, 1), (10, 2), (100, 20)])
def test_points_file_is_split(tmp_path, count, held_out):
    points = np.random.default_rng(0).normal(size=(count, 2)) * 100 + 1000
    path = str(tmp_path / "a.npy")
    np.save(path, np.asfortranarray(points))
    train, test = load_points(POINTS_FILE, path, 10, 0)
    assert train.shape == (count - held_out, 2) and test.shape == (held_out, 2)
    for part in (train, test):
        assert part.dtype == np.float32 and part.flags.c_contiguous
    both = np.concatenate([train, test])
    np.testing.assert_array_equal(np.sort(both, 0), np.sort(points.astype(np.float32), 0))
    assert set(map(tuple, both)) == set(map(tuple, points.astype(np.float32)))  # x stays with y
    np.testing.assert_array_equal(load_points(POINTS_FILE, path, 0, 0)[1], test)  # num is not used
    np.testing.assert_array_equal(load_points(POINTS_FILE, points, 0, 0)[1], test)  # an array instead of a file


def test_points_file_is_shuffled_by_the_seed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40.0).reshape(20, 2))
    splits = [load_points(POINTS_FILE, str(tmp_path), 1, seed) for seed in range(60)]
    held_out = [tuple(test[:, 0]) for _, test in splits]
    assert len(set(held_out)) > 50 and set(np.ravel(held_out)) == set(range(0, 40, 2))
    assert not any((np.diff(train[:, 0]) > 0).all() for train, _ in splits)
    assert np.bincount(np.ravel(held_out).astype(int) // 2).max() < 27  # 12 expected each; binomial, 4.8 deviations


# Files of points

coordinates = st.floats(-1e30, 1e30)
clouds = st.lists(st.tuples(coordinates, coordinates), min_size=2, max_size=12).filter(lambda rows: len(set(rows)) > 1)


@given(clouds, st.sampled_from(["<f8", ">f8", "<f4", ">f4"]), st.sampled_from("CF"), st.sampled_from(["a.npy", "a.NPY"]))
@settings(max_examples=30, deadline=None)
def test_npy_round_trip(tmp_path_factory, rows, dtype, order, name):
    array = np.array(rows, dtype, order=order)
    assume(not (array == array[0]).all())
    path = tmp_path_factory.mktemp("npy") / name
    with path.open("wb") as file:
        np.save(file, array)
    for given_path in (path, str(path), path.parent):
        points = read_points(given_path)
        assert points.dtype == np.float64 and points.flags.c_contiguous and points.dtype.isnative
        np.testing.assert_array_equal(points, array)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i8", "<u8", "<f2", "longdouble"])
def test_npy_of_any_real_type(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4], [250, 7]], dtype))
    points = read_points(tmp_path)
    assert points.dtype == np.float64 and points.tolist() == [[1, 2], [3, 4], [250, 7]]


@given(
    rows=clouds,
    mark=st.sampled_from([",", ";", " ", "\t", ", ", " ;\t", "   "]),
    header=st.sampled_from(
        [None, "x,y", "x;y", "# x y", '"length (m)","width, in m"', "longitude\tlatitude", ",x,y", "точка"]
    ),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
    last=st.booleans(),
    blank=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_csv_round_trip(tmp_path_factory, rows, mark, header, newline, bom, last, blank):
    lines = [header] * (header is not None) + [f"{x!r}{mark}{y!r}" for x, y in rows]
    text = newline.join(["", *lines, " "] if blank else lines) + newline * last
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    points = read_points(path)
    assert points.dtype == np.float64 and points.tolist() == [list(row) for row in rows]


def test_csv_as_numpy_writes_it(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 2))
    for options in ({}, {"delimiter": ","}, {"delimiter": ";", "header": "x;y"}, {"delimiter": "\t", "header": "x y"}):
        np.savetxt(tmp_path / "a.csv", array, **options)
        np.testing.assert_allclose(read_points(tmp_path), array, rtol=1e-15)


def test_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("1,2\n3,4")
    (tmp_path / "._a.csv").write_bytes(b"\0")
    (tmp_path / "folder.npy").mkdir()
    refused(f"{tmp_path}: .*exactly one.*not none", read_points, tmp_path)
    (tmp_path / "b.csv").write_text("1,2\n3,4")
    assert read_points(tmp_path).tolist() == [[1, 2], [3, 4]]
    np.save(tmp_path / "a.npy", np.eye(2))
    refused("not 2, such as a.npy and b.csv", read_points, str(tmp_path))


def test_no_file(tmp_path):
    refused("nowhere.npy: no such file", read_points, tmp_path / "nowhere.npy")
    refused("no such file", read_points, "a" * 300)  # longer than a name may be
    (tmp_path / "a.npz").write_text("1,2\n3,4")
    refused("a.npz: its name ends in neither .npy nor .csv", read_points, tmp_path / "a.npz")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = npy(np.arange(20.0).reshape(10, 2))
INVALID = "not a valid .npy file .*np.save"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", INVALID),
        (b"1,2\n3,4\n", INVALID),
        (GOOD[:-1], INVALID),
        (GOOD[:50], INVALID),
        (GOOD.replace(b"(10, 2), }       ", b"(9999999999999,2)"), INVALID),
        (GOOD[:8] + b"\x10\x27" + GOOD[10:] + b" " * 20_000, INVALID),  # NumPy's own message has two lines
        (npy(np.array([[1, 2.0], [3, None]], object)), INVALID),  # pickled
        (npy(np.eye(2) * 1j), "of type complex128; .*astype"),
        (npy(np.zeros(3, [("x", "f4"), ("y", "f4")])), INVALID),
        (npy(np.ones((4, 3))), r"shape is \(4, 3\), not \(N, 2\)"),
        (npy(np.float64(3)), r"shape is \(\), not \(N, 2\)"),
        (npy(np.ones((1, 2))), "too few points, 1; pass 2 or more"),
        (npy(np.full((7, 2), 3)), "all its 7 points are equal"),
        (npy(np.array([[0, 1], [2, -np.inf], [np.nan, np.inf]])), "2 of its 3 points .*first in row 1 "),
        (npy(np.array([[0, 1], [2, 3], [4, -3.5e38]])), "1 of its 3 points .*float32's range, the first in row 2 "),
        (npy(np.array([[0, 1], [2, 3], [4, np.longdouble("1e4000")]])), "1 of its 3 points .*in row 2 "),
    ],
)
def test_bad_npy(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    refused(f"--data.dir {tmp_path}/a.npy: .*({message})", read_points, tmp_path)


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.eye(2))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(f"{INVALID}|npz", read_points, tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n \n\n", "holds no numbers"),
        ("x,y\n", "holds no numbers"),
        ("x,y\n1,2\n3,four\n5,6", "line 3: .*'four'"),
        ("x,y\n\n\n1,2\n3,\n", "line 5: .*''"),
        ("x\ny\n1,2", "line 2: .*'y'"),
        ("1,x\n2,3", "line 1: .*'x'"),
        ("x y\n1,5;2,5\n", "line 2: .*'1,5'"),
        ("1 2\n3 " + "z" * 1000, "line 2: .*zzz"),
        ("x,y\n1,2\n3\n", "line 3: .* 2 to 1"),
        (",x,y\n0,1,2\n1,3,4\n", r"shape is \(2, 3\), not \(N, 2\)"),
        ("1\n2\n3\n", r"shape is \(3, 1\), not \(N, 2\)"),
        ("x,y\n1,2\n1,nan\ninf,2", r"2 of its 3 points are NaN.*first in row 1 \(counted from 0\)"),
        (b"\x93NUMPY", "not a text file in UTF-8"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"--data.dir {tmp_path}/a.csv: .*{message}", read_points, tmp_path / "a.csv")


def test_large_and_endless_text(tmp_path, monkeypatch):
    """The line that is wrong is found at once, and no more is read than there is memory for."""
    path = tmp_path / "a.csv"
    path.write_text("x,y\n\n" + "1,2\n" * 100_000 + "3,z\n")
    started = time.process_time()
    refused("line 100003: .*'z'", read_points, path)
    assert time.process_time() - started < 2
    path.write_bytes(b"1" * 10**6)
    refused("infinite|shape", read_points, path)
    path.write_bytes(b"1,2\n3,4\0\n")
    refused("line 2", read_points, path)
    monkeypatch.setattr(files, "available_memory", lambda: 10**6)
    path.write_text("1,2\n" * 10_000)
    refused("memory", read_points, path)
    path.unlink()
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        make()
        with pytest.raises(OSError, match="not a file"):
            read_points(path)
        path.unlink()


def test_saved_points_come_back(tmp_path):
    train, test = load_points("spiral", None, 7, 0)
    write(tmp_path / "points.npz", lambda f: np.savez(f, train=train, test=test))
    for found, expected in zip(read_saved_points(tmp_path / "points.npz"), (train, test), strict=True):
        np.testing.assert_array_equal(found, expected)
    write(tmp_path / "points.npz", lambda f: np.savez(f, train=train, test=np.zeros(3)))
    refused("points.npz cannot be read: delete it", read_saved_points, tmp_path / "points.npz")
    (tmp_path / "points.npz").unlink()
    refused("points.npz cannot be read: delete it", read_saved_points, tmp_path / "points.npz")


def test_points_at_the_edge_of_float32(tmp_path):
    top = float(np.finfo(np.float32).max)
    np.save(tmp_path / "a.npy", np.array([[top, -top], [-top, 0], [1e-300, 5]]))
    parts = load_points(POINTS_FILE, str(tmp_path), 1, 0)
    assert all(np.isfinite(part).all() for part in parts)
    everything = np.concatenate(parts)
    normalizer = Normalizer.of(everything)
    assert np.abs(normalizer.normalize(everything)).max() == 1
    np.testing.assert_array_equal(normalizer.denormalize(normalizer.normalize(everything))[:, 0], everything[:, 0])


# Normalization


def test_normalizer_known_values():
    normalizer = Normalizer.of(np.array([[0, 10], [4, 11], [1, 12]], np.float32))
    assert normalizer.center.tolist() == [2, 11] and normalizer.center.dtype == np.float64
    assert normalizer.scale == 2 and type(normalizer.scale) is float
    x = normalizer.normalize([[0, 10], [4, 11], [1, 12], [2, 11]])
    assert x.dtype == np.float32 and x.tolist() == [[-1, -0.5], [1, 0], [-0.5, 0.5], [0, 0]]
    points = normalizer.denormalize(np.array([[[1, 1], [-1, 0]]], np.float32))
    assert points.dtype == np.float32 and points.tolist() == [[[4, 13], [0, 11]]]
    with pytest.raises(AttributeError):
        normalizer.scale = 3


singles = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(st.tuples(singles, singles), min_size=2, max_size=20))
@settings(max_examples=100, deadline=None)
def test_normalizer_properties(rows):
    points = np.array(rows, np.float32)
    assume((points != points[0]).any())
    normalizer = Normalizer.of(points)
    x = normalizer.normalize(points)
    assert x.dtype == np.float32 and x.shape == points.shape
    wide = (points.max(0) - points.min(0).astype(np.float64)).argmax()
    assert np.abs(x).max() <= 1 and x[:, wide].min() == -1 and x[:, wide].max() == 1
    assert np.allclose(x.min(0) + x.max(0), 0, atol=1e-6)  # each axis in the middle

    tiny = 2.0**-149
    back = normalizer.denormalize(x)
    assert back.dtype == np.float32
    error = np.abs(back.astype(np.float64) - points)
    assert (error <= 2.0**-23 * (normalizer.scale + np.abs(points)) + tiny).all()
    moved = points.astype(np.float64) - points[0]  # one scale for both axes, and no turn
    assert np.allclose(x.astype(np.float64) - x[0], moved / normalizer.scale, rtol=0, atol=1e-6)


def test_normalizer_far_from_zero():
    """At 1e6 neighbouring float32 are 1/16 apart: nothing beyond that is lost."""
    points = np.float32(1e6) + np.arange(32, dtype=np.float32).reshape(16, 2) / 16
    normalizer = Normalizer.of(points)
    np.testing.assert_array_equal(normalizer.denormalize(normalizer.normalize(points)), points)
    assert len(np.unique(normalizer.normalize(points)[:, 0])) == 16 and normalizer.scale == 15 / 16
    two = points[:2] - [[0, 0], [1 / 16, 1 / 16]]  # neighbours: float32 has no number for their middle
    np.testing.assert_array_equal(Normalizer.of(two).denormalize(Normalizer.of(two).normalize(two)), two)
    in_float64 = 1e6 + np.arange(32).reshape(16, 2) / 1000
    x = Normalizer.of(in_float64).normalize(in_float64)
    assert np.allclose(np.diff(x[:, 0]), 2 / 15, atol=1e-6)


def test_normalizer_of_a_line_and_of_a_point():
    line = np.array([[3, 1], [3, 5], [3, 2]], np.float32)
    assert Normalizer.of(line).normalize(line).tolist() == [[0, -1], [0, 1], [0, -0.5]]
    refused("the 1 points.*all equal.*--data.num", Normalizer.of, load_points("spiral", None, 1, 0)[0])
    refused("the 3 points.*all equal", Normalizer.of, np.ones((3, 2), np.float32))


def test_normalizer_of_the_toys_holds_fresh_points_nearly():
    for name in TOYS:
        train, test = load_points(name, None, 2000, 0)
        normalizer = Normalizer.of(train)
        assert np.abs(normalizer.normalize(train)).max() == 1 and np.abs(normalizer.normalize(test)).max() < 1.4
        spread = normalizer.normalize(test).std() * normalizer.scale
        assert spread == pytest.approx((test - normalizer.center).std(), rel=0.02)
