"""The classifier against a PyTorch network written here, its accuracy, its training, and features from it."""

import errno
import functools
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Tensor, nn, ops

from benchmarks import judges, train_classifier
from benchmarks.train_classifier import accuracy, shift
from ms_diffusion import runtime
from ms_diffusion.convert import load_torch_state_dict
from ms_diffusion.data.batches import DATASETS, load_images
from ms_diffusion.images import to_float
from ms_diffusion.metrics import features as module
from ms_diffusion.metrics.features import Features
from ms_diffusion.models.classifier import BUNDLED, Classifier, load_classifier
from ms_diffusion.runtime import UserError, compiled

ROOT = Path(__file__).parents[1]
FULL = Path("/usr/share/datasets/fashion-mnist")
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def mini():
    """500 test images (N, 28, 28, 1) uint8 and their labels."""
    return load_images("fashion-mnist-mini", None, "test", 28, 1)


def perturbed(seed=0) -> Classifier:
    """A network with norms that are not 1 and 0."""
    net, rng = Classifier(seed=seed), np.random.default_rng(seed)
    for p in net.get_parameters():
        if ".norm." in p.name:
            p.set_data(Tensor(p.asnumpy() + 0.3 * rng.standard_normal(p.shape, dtype=np.float32)))
    return net


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


# The network


def test_shapes_and_that_graph_mode_agrees():
    net = perturbed()
    x = Tensor(np.random.default_rng(13).uniform(-1, 1, (13, 1, 28, 28)).astype(np.float32))
    assert [stage.shape[1:] for stage in net.stages(x)] == [(32, 28, 28), (64, 14, 14), (128, 7, 7)]
    features, logits = (out.asnumpy() for out in net.features_and_logits(x))
    assert features.shape == (13, Classifier.num_features) and logits.shape == (13, 10)
    for ours, expected in zip(compiled(net.features_and_logits)(x), (features, logits), strict=True):
        np.testing.assert_allclose(ours.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(net(x).asnumpy(), logits)
    np.testing.assert_allclose(net(x[:1]).asnumpy(), logits[:1], rtol=1e-5, atol=1e-5)


def peer(weights, x):
    """Features and logits by PyTorch, of weights by name and x (B, 1, 28, 28), as numpy."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    w = {name: torch.from_numpy(value) for name, value in weights.items()}

    def block(name, x, stride=1):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=1)
        return F.silu(F.group_norm(x, 8, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], 1e-5))

    def pair(name, x):
        return block(f"{name}.1", block(f"{name}.0", x))

    x = pair("conv1", torch.from_numpy(x))
    for down, conv in (("down2", "conv2"), ("down3", "conv3")):
        x = block(down, x, 2)
        x = x + pair(conv, x)
    features = x.flatten(2).mean(2)
    return features.numpy(), F.linear(features, w["head.weight"], w["head.bias"]).numpy()


@pytest.mark.parametrize("build", [perturbed, load_classifier])
def test_like_pytorch(build):
    net, x = build(), to_float(mini()[0][::40])
    ours = [out.asnumpy() for out in net.features_and_logits(Tensor(x))]
    for found, expected in zip(ours, peer(values(net), x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert np.std(expected, axis=0).mean() > 0.01  # of images, not of constants


def test_seeds_make_networks():
    a, same, other = (values(Classifier(seed=seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a[name], same[name]) for name in a)
    assert not np.array_equal(a["head.weight"], other["head.weight"])
    assert Classifier(classes=3).head.weight.shape == (3, 128)


# The weights that come with the package


def test_shipped_weights_are_small_and_whole():
    assert BUNDLED.stat().st_size <= 3e6
    weights = load_torch_state_dict(BUNDLED)
    assert {name: a.shape for name, a in weights.items()} == {name: a.shape for name, a in values(Classifier()).items()}
    assert all(np.isfinite(a).all() for a in weights.values())


def test_shipped_classifier_knows_the_mini_test_set():
    assert len(mini()[0]) == 500
    assert accuracy(load_classifier(), *mini()) >= 0.88


@pytest.mark.slow
def test_shipped_classifier_knows_the_test_set():
    if not FULL.is_dir():
        pytest.skip(f"{FULL} is not on this machine")
    pictures, labels = load_images("fashion-mnist", str(FULL), "test", 28, 1)
    assert len(pictures) == 10_000
    assert accuracy(load_classifier(), pictures, labels) >= 0.925


def test_other_files_are_refused(tmp_path):
    path, arrays = tmp_path / "net.safetensors", values(Classifier(classes=5))
    for content, complaint in (
        (safetensors.numpy.save(arrays), r"head.weight \(5, 128\) instead of \(10, 128\)"),
        (safetensors.numpy.save({"weight": np.zeros(3)}), "missing: conv1.0.conv.weight.* unexpected: weight"),
        (BUNDLED.read_bytes()[:-8], "not a complete .safetensors file"),
        (b"", "not a complete .safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load_classifier(path)
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "none.safetensors")


# Training


def moved(image, down, right):
    """(C, H, W) with the content of (y + down, x + right) at (y, x), black where there is none."""
    c, height, width = image.shape
    out = np.full((c, 3 * height, 3 * width), -1, image.dtype)
    out[:, height : 2 * height, width : 2 * width] = image
    return out[:, height + down : 2 * height + down, width + right : 2 * width + right]


def offsets(before, after, most):
    steps = range(-most, most + 1)
    return [(y, x) for y, x in itertools.product(steps, steps) if np.array_equal(moved(before, y, x), after)]


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_shift_moves_each_image_and_lets_black_in(seed, n, channels, height, width, most):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-0.9, 1, (n, channels, height, width)).astype(np.float32)
    kept = images.copy()
    found = shift(rng, images, most)
    assert found.shape == images.shape and found.dtype == np.float32
    assert all(offsets(before, after, most) for before, after in zip(images, found, strict=True))
    np.testing.assert_array_equal(images, kept)


def test_shift_is_by_two_pixels_at_most_and_all_are_drawn():
    image = np.random.default_rng(0).uniform(-0.9, 1, (1, 5, 5)).astype(np.float32)
    shifts = [offsets(image, after, 4) for after in shift(np.random.default_rng(1), np.stack([image] * 300))]
    assert all(len(shift) == 1 for shift in shifts)
    assert {shift[0] for shift in shifts} == set(itertools.product(range(-2, 3), repeat=2))


@pytest.mark.parametrize(("n", "batch_size"), [(1, 500), (13, 5), (10, 5)])
def test_accuracy_counts_the_largest_logits(n, batch_size):
    """Of a "network" whose logits are the ten pixels."""
    pictures = np.random.default_rng(n).permuted(np.tile(np.arange(10, dtype=np.uint8), (n, 1)), axis=1)
    labels = pictures.argmax(1)
    labels[::3] = (labels[::3] + 1) % 10

    def flat(x):
        return x.reshape((-1, 10))

    assert accuracy(flat, pictures.reshape(n, 2, 5, 1), labels, batch_size) == 1 - len(labels[::3]) / n


@pytest.fixture
def call(capsys):
    """The program in this process: (exit code, stdout, stderr)."""

    def call(*args):
        code = runtime.run_program(train_classifier.main, ["--device", "cpu", *args])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("num", "least"), [(300, 0), pytest.param(2000, 0.4, marks=pytest.mark.slow)])
def test_training_saves_float16_weights_of_the_printed_accuracy(call, tmp_path, monkeypatch, num, least):
    """On the first images of fashion-mnist-mini; in a folder that does not exist yet. Chance is 0.1."""

    def first_images(*args):
        pictures, labels = DATASETS["fashion-mnist-mini"](*args)
        return pictures[:num], labels[:num]

    monkeypatch.setitem(DATASETS, "first-images", first_images)
    path = tmp_path / "new" / "net.safetensors"
    code, out, err = call(*f"--name first-images --epochs 1 --batch-size 50 --out {path}".split())
    assert code == 0 and "Traceback" not in err and "arning" not in err, err
    assert list(path.parent.iterdir()) == [path]
    assert {a.dtype for a in safetensors.numpy.load_file(path).values()} == {np.dtype(np.float16)}
    share = accuracy(load_classifier(path), *(a[:num] for a in mini()))
    found = re.search(r"net.safetensors: ([\d.]+)% ", out)
    assert found and float(found[1]) == pytest.approx(100 * share, abs=0.005)
    assert share > least


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--epochs 0", "--epochs is 0"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--lr 0", "--lr is 0"),
        ("--lr nan", "--lr is nan"),
        ("--seed -1", "--seed is -1"),
        ("--out net.pt", ".safetensors"),
        ("--name nonsense", "unknown data set 'nonsense'"),
        ("--name fashion-mnist-mini --batch-size 2001", "2000 images are too few for a step of 2001"),
        ("--epochs many", "--epochs"),
        ("--epoch 1", "did you mean --epochs?"),
        ("--dir /nowhere", "/nowhere"),
    ],
)
def test_bad_arguments_end_in_one_line(call, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments.split())
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


# Features


@pytest.fixture(scope="module")
def network():
    return Features()


@pytest.fixture
def counted(network, monkeypatch):
    """Features whose network only adds up pixels, and the sizes of the batches it was given."""
    sizes = []

    def graph(x):
        sizes.append(len(x))
        total = x.asnumpy().sum((1, 2, 3))[:, None]
        return Tensor(total + np.arange(128, dtype=np.float32)), Tensor(total * np.ones(10, np.float32))

    monkeypatch.setattr(network, "graph", graph)
    return network, sizes


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ms_diffusion"


def fails(*_):
    raise AssertionError("was computed again")


def files(folder):
    return sorted(folder.iterdir()) if folder.is_dir() else []


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("n", [5, 13])
def test_features_are_the_networks_own_in_batches_that_do_not_divide(network, monkeypatch, n):
    monkeypatch.setattr(module, "BATCH", 5)
    pictures = mini()[0][:n]
    found, net = network(pictures), load_classifier()
    own = net.features_and_logits(Tensor(to_float(pictures)))
    assert list(found) == ["features", "logits"] and found["features"].shape == (n, network.num) == (n, 128)
    for values, expected in zip(found.values(), own, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected.asnumpy(), rtol=1e-5, atol=1e-5)


def test_every_batch_is_of_one_size(counted, monkeypatch):
    """So that one graph does for all."""
    features, sizes = counted
    monkeypatch.setattr(module, "BATCH", 5)
    assert features(mini()[0][:13])["logits"].shape == (13, 10) and sizes == [5, 5, 5]
    sizes.clear()
    assert features(mini()[0][:3])["logits"].shape == (3, 10) and sizes == [3]


@pytest.mark.parametrize("shape", [(28, 28, 3), (32, 32, 1), (32, 32, 3), (28, 20, 1)])
def test_other_images_need_inception(network, shape):
    size = "{} x {} x {}".format(*shape)
    with pytest.raises(UserError, match=f"not {size}: give --inception WEIGHTS$"):
        network(np.zeros((2, *shape), np.uint8))


class Means(nn.Cell):
    """The mean of each channel, in place of InceptionV3."""

    def construct(self, x):
        return ops.mean(x, (2, 3))


def test_inception_takes_any_size_and_colour(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    monkeypatch.setattr(module, "load_inception", lambda path: Means())
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 20, 3)).astype(np.uint8)
    found = Features(str(tmp_path / "weights.pth"))(pictures)
    assert list(found) == ["features"]
    np.testing.assert_allclose(found["features"], to_float(pictures).mean((2, 3)), atol=1e-6)


def test_weights_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Features(str(tmp_path / "none.pth"))


def test_cached_computes_once(counted, tmp_path, user_cache, monkeypatch):
    network, folder, pictures = counted[0], tmp_path / "data", mini()[0][:13]
    folder.mkdir()
    first = network.cached(pictures, str(folder))
    assert_same(first, network(pictures))
    [path] = files(folder)
    assert re.fullmatch(r"features-[0-9a-f]{16}\.bin", path.name) and not files(user_cache)
    monkeypatch.setattr(network, "graph", fails)
    assert_same(network.cached(pictures, str(folder)), first)
    assert_same(network.cached(pictures.copy(), str(folder)), first)
    assert files(folder) == [path]


def test_cached_for_other_images_computes_again(counted, tmp_path):
    features, sizes = counted
    pictures = mini()[0][:4]
    changed = pictures.copy()
    changed[3, 27, 27, 0] += 1
    found = [features.cached(x, str(tmp_path))["logits"] for x in (pictures, changed, pictures[:3], pictures[::-1])]
    assert len(files(tmp_path)) == len(sizes) == 4
    assert not np.array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[3], found[0][::-1])


def test_cached_for_other_weights_computes_again(counted, tmp_path, monkeypatch):
    features, sizes = counted
    features.cached(mini()[0][:4], str(tmp_path))
    monkeypatch.setattr(features, "weights", b"others")
    features.cached(mini()[0][:4], str(tmp_path))
    assert len(files(tmp_path)) == len(sizes) == 2


def truncated(path):
    return path.read_bytes()[: path.stat().st_size // 2]


def changed(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def as_npz(path):
    np.savez(path, features=np.zeros((4, 128), np.float32), logits=np.zeros((4, 10), np.float32))
    return path.with_suffix(".bin.npz").rename(path).read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        changed,
        as_npz,
        lambda path: b"<html>",
        lambda path: b"\x80\x04pickle",
        lambda path: b"",
    ],
)
def test_cached_over_a_spoilt_file_computes_again(counted, tmp_path, spoil):
    features, sizes = counted
    first = features.cached(mini()[0][:4], str(tmp_path))
    [path] = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(spoil(path))
    assert_same(features.cached(mini()[0][:4], str(tmp_path)), first)
    assert len(sizes) == 2 and files(tmp_path) == [path] and len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize("folder", ["missing", "read-only", None])
def test_cached_falls_back_to_the_users_cache(counted, tmp_path, user_cache, monkeypatch, folder):
    features, sizes = counted
    if folder == "read-only":
        (tmp_path / folder).mkdir()
        access = os.access  # which lets root write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: "read-only" not in str(path) and access(path, mode))
    given = folder and str(tmp_path / folder)
    first = features.cached(mini()[0][:4], given)
    assert len(files(user_cache)) == 1 and not files(tmp_path / str(folder))
    monkeypatch.setattr(features, "graph", fails)
    assert_same(features.cached(mini()[0][:4], given), first)
    assert len(sizes) == 1


def test_a_full_disk_costs_time_alone(counted, tmp_path, monkeypatch):
    features, sizes = counted

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert_same(features.cached(mini()[0][:4], str(tmp_path)), features(mini()[0][:4]))
    assert len(sizes) == 2 and not files(tmp_path)


def test_the_bar_is_shown_where_asked_for(counted, capsys, monkeypatch):
    features, _ = counted
    features(mini()[0][:4])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(features, "bar", True)
    features(mini()[0][:4])
    assert "classifier: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_judges_tell_noise_from_images(capsys, tmp_path, monkeypatch):
    """Two networks that a few steps have trained; the floor is other real images, and a file of the test images scores 0."""
    splits = {split: load_images("fashion-mnist-mini", None, split, 28, 1) for split in ("train", "test")}
    splits = {split: (found[0][:400], found[1][:400]) for split, found in splits.items()}
    monkeypatch.setitem(DATASETS, "first-images", lambda folder, split, size, channels: splits[split])
    noise = np.random.default_rng(0).integers(0, 256, (400, 28, 28, 1), dtype=np.uint8)
    for name, pictures in {"noise": noise, "real": splits["test"][0]}.items():
        np.savez(tmp_path / f"{name}.npz", images=pictures)
    paths = [str(tmp_path / f"{name}.npz") for name in ("noise", "real")]
    words = [*paths, *f"--name first-images --num 400 --epochs 2 --device cpu --json {tmp_path / 'scores.json'}".split()]
    assert runtime.run_program(judges.main, words) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name in judges.JUDGES:
        floor, noise, real = (scores[name][each] for each in ("real training images", *paths))
        assert scores[name]["accuracy"] > 0.2 and abs(real) < 1e-6 < floor < noise / 3
    assert runtime.run_program(judges.main, [*paths, "--num", "401", "--name", "first-images"]) == 2
