"""Data sets and batches against known answers; downloads come from a server on the loopback."""

import gzip
import hashlib
import os
import socket
import struct
import tempfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import make_mini
from ms_diffusion.data import fashion_mnist
from ms_diffusion.data.batches import DATASETS, check_enough, check_images, load_images, make_dataset
from ms_diffusion.data.fashion_mnist import FILES, load_fashion_mnist, load_fashion_mnist_mini, read_idx
from ms_diffusion.runtime import UserError

pytestmark = pytest.mark.filterwarnings("error")


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_set(count=3, first=0):
    """Names and bytes of the four files; every image is filled with its index + first."""
    content = {}
    for images_name, labels_name in FILES.values():
        images = np.arange(first, first + count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        content[images_name], content[labels_name] = idx(images), idx(np.arange(count, dtype=np.uint8))
    return content


def put(folder, first=0, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small_set(first=first).items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)


# IDX files


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    zipped=st.booleans(),
    gz_name=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_idx_round_trip(tmp_path_factory, shape, seed, zipped, gz_name):
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if zipped and gz_name else "a")
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    out = read_idx(path)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, array)


def test_idx_known_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), [[1, 2, 3], [4, 5, 255]])


GOOD = idx(np.arange(12, dtype=np.uint8).reshape(3, 4))
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty", b""),
        ("short-header", GOOD[:7]),
        ("shorter-header", GOOD[:3]),
        ("truncated", GOOD[:-1]),
        ("trailing", GOOD + b"x"),
        ("floats", GOOD[:2] + b"\x0d" + GOOD[3:]),
        ("raw.gz", GOOD),
        ("truncated.gz", ZIPPED[:-9]),
        ("crc.gz", ZIPPED[:-8] + b"1234" + ZIPPED[-4:]),
        ("stream.gz", ZIPPED[:12] + b"\xff\xff\xff" + ZIPPED[15:]),
    ],
)
def test_corrupt_idx_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_idx(tmp_path / name)


# Where Fashion-MNIST is looked for


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for each place, and no network."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    folders = {name: tmp_path / name for name in ("user", "env", "cache", "debian")}
    folders["user"].mkdir()
    folders["env"].mkdir()
    monkeypatch.setenv("MS_DIFFUSION_DATA", str(folders["env"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setattr(fashion_mnist, "_debian_folders", lambda: [folders["debian"]])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
    return folders


def test_search_order(places):
    """Each place put in, last to first, takes over from the ones after it."""
    steps = [
        places["debian"],
        places["cache"] / "ms_diffusion" / "fashion-mnist",
        places["env"] / "FashionMNIST" / "raw",
        places["env"] / "fashion-mnist",
        places["env"],
        places["user"] / "FashionMNIST" / "raw",
        places["user"] / "fashion-mnist",
        places["user"],
    ]
    for i, folder in enumerate(steps):
        put(folder, first=10 * i, zipped=i % 2 == 0)
        for split in FILES:
            images, labels = load_fashion_mnist(split, str(places["user"]))
            assert images.shape == (3, 28, 28, 1) and images.dtype == np.uint8
            assert labels.dtype == np.int32 and labels.tolist() == [0, 1, 2]
            assert images[:, 0, 0, 0].tolist() == [10 * i, 10 * i + 1, 10 * i + 2]
    assert load_fashion_mnist("test")[0][0, 0, 0, 0] == 40  # without --data.dir: the environment's


def test_read_from_elsewhere_is_said(places, capsys):
    put(places["env"])
    load_fashion_mnist("train", str(places["user"]))
    assert str(places["env"]) in capsys.readouterr().err
    load_fashion_mnist("train")
    assert capsys.readouterr().err == ""


def test_debian_package(tmp_path, monkeypatch):
    dpkg = tmp_path / "dpkg"
    dpkg.write_text('#!/bin/sh\n[ "$2" = dataset-fashion-mnist ] && echo /a/b && echo /a/b/train-images-idx3-ubyte.gz\n')
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [str(folder) for folder in fashion_mnist._debian_folders()] == ["/a/b"]
    dpkg.unlink()
    assert fashion_mnist._debian_folders() == []


def test_bad_places_and_files(places):
    with pytest.raises(UserError, match="nowhere.*no such folder"):
        load_fashion_mnist("train", str(places["user"] / "nowhere"))
    with pytest.raises(UserError, match="'val'.*train, test"):
        load_fashion_mnist("val")
    put(places["user"])
    images, labels = (places["user"] / f"{name}.gz" for name in FILES["train"])
    labels.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    with pytest.raises(UserError, match="train-labels"):
        load_fashion_mnist("train", str(places["user"]))
    images.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    with pytest.raises(UserError, match="train-images"):
        load_fashion_mnist("train", str(places["user"]))


# Download


@pytest.fixture
def server(places, monkeypatch):
    """Serves server.files, each up to server.cut, and notes the names of the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.requests.append(self.path[1:])
            content = httpd.files.get(self.path[1:])
            if content is None:
                return self.send_error(404)
            if content.startswith(b"file:"):
                self.send_response(302)
                self.send_header("Location", content.decode())
                return self.end_headers()
            self.send_response(200)
            self.send_header("Content-Length", len(content))
            self.end_headers()
            self.wfile.write(content[: httpd.cut])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in small_set().items()}
    httpd.requests, httpd.cut = [], None
    monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{httpd.server_port}/")
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in httpd.files.items()}
    monkeypatch.setattr(fashion_mnist, "MD5", md5)
    monkeypatch.setattr(fashion_mnist, "SIZES", {name: len(content) for name, content in httpd.files.items()})
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


FIRST = "train-images-idx3-ubyte.gz"


def test_download(server, places):
    images, labels = load_fashion_mnist("test", str(places["user"]))
    assert images.shape == (3, 28, 28, 1) and labels.tolist() == [0, 1, 2]
    assert {path.name: path.read_bytes() for path in places["user"].iterdir()} == server.files
    load_fashion_mnist("train", str(places["user"]))
    assert server.requests == list(server.files)  # each once


def test_download_goes_where_one_can_write(server, places, monkeypatch):
    load_fashion_mnist("train")
    assert (places["env"] / FIRST).exists()
    monkeypatch.setenv("MS_DIFFUSION_DATA", str(places["env"] / FIRST / "under-a-file"))
    load_fashion_mnist("train")
    assert (places["cache"] / "ms_diffusion" / "fashion-mnist" / FIRST).exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["env"] / FIRST))
    monkeypatch.setattr(tempfile, "tempdir", str(places["env"] / FIRST))
    with pytest.raises(UserError, match="cannot write to"):
        load_fashion_mnist("train")


@pytest.mark.parametrize("damage", ["short", "changed", "longer"])
def test_bad_downloads_are_not_kept(server, places, damage):
    whole = dict(server.files)
    if damage == "short":
        server.cut = 30
    else:
        server.files[FIRST] = whole[FIRST][:-1] + {"changed": b"?", "longer": bytes(1 << 25)}[damage]
    with pytest.raises(UserError, match=f"{FIRST}.*MD5") as raised:
        load_fashion_mnist("train")
    assert "\n" not in str(raised.value) and list(places["env"].iterdir()) == []
    server.cut, server.files = None, whole
    load_fashion_mnist("train")


def test_a_download_ends_in_time_and_is_not_sent_elsewhere(server, places, monkeypatch):
    """A server may not send the program to a file of this machine."""
    official = server.files[FIRST]
    (places["user"] / "x").write_bytes(official)
    server.files[FIRST] = (places["user"] / "x").as_uri().encode()
    with pytest.raises(UserError, match="cannot be reached"):
        load_fashion_mnist("train")
    server.files[FIRST] = official
    monkeypatch.setattr(fashion_mnist, "MOST_SECONDS", -1)
    with pytest.raises(UserError, match="cannot be reached"):
        load_fashion_mnist("train")
    assert list(places["env"].iterdir()) == []


@pytest.mark.parametrize("reason", ["no server", "no file"])
def test_offline(places, server, reason):
    if reason == "no server":
        server.shutdown()
        server.server_close()
    else:
        server.files.clear()
    with pytest.raises(UserError) as raised:
        load_fashion_mnist("train", str(places["user"]))
    message = str(raised.value)
    for part in [*map(str, places.values()), "--data.dir", "apt install dataset-fashion-mnist", "--preset quick", "-mini"]:
        assert part in message
    assert "\n" not in message


# The embedded subset


def test_mini_is_balanced():
    for split, count in make_mini.PER_CLASS.items():
        images, labels = load_fashion_mnist_mini(split)
        assert images.shape == (10 * count, 28, 28, 1) and images.dtype == np.uint8 and labels.dtype == np.int32
        assert np.bincount(labels).tolist() == [count] * 10
        assert (np.diff(labels) != 0).mean() > 0.5  # in the original, mixed order
    with pytest.raises(UserError, match="'val'"):
        load_fashion_mnist_mini("val")


def test_first_of_each_class():
    assert make_mini.first_of_each_class(np.array([1, 0, 1, 1, 0, 0]), 2).tolist() == [0, 1, 2, 4]


def test_make_mini_gives_the_embedded_subset(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
    try:
        full = load_fashion_mnist("test")
    except UserError:
        pytest.skip("the full set is not on this machine")
    make_mini.main(["--out", str(tmp_path / "a")])
    make_mini.main(["--out", str(tmp_path / "b")])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        np.testing.assert_array_equal(read_idx(path), read_idx(fashion_mnist.MINI / path.name))
    images, labels = load_fashion_mnist_mini("test")
    np.testing.assert_array_equal(images[labels == 3], full[0][full[1] == 3][:50])


def test_idx_takes_no_more_memory_than_its_header_says(tmp_path):
    """A small file that unpacks to 100 MB, and headers of absurd sizes."""
    bomb = gzip.compress(GOOD + bytes(10**8))
    (tmp_path / "bomb.gz").write_bytes(bomb)
    headers = [(2**32 - 1,) * 3, (2**32 - 1,), (0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (1,) * 33, (0,) * 255]
    for i, shape in enumerate(headers):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        (tmp_path / f"raw{i}").write_bytes(header + b"\0")
        (tmp_path / f"zipped{i}").write_bytes(gzip.compress(header + b"\0"))
    tracemalloc.start()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name) as e:
            read_idx(path)
        assert "\n" not in str(e.value)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3e6


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_where_no_file_is(places, zipped):
    """A folder, a device and a pipe with a name of the data set are named, and nobody waits for them."""
    images = places["user"] / (FILES["train"][0] + ".gz" * zipped)
    for make in (images.mkdir, lambda: os.mkfifo(images), lambda: images.symlink_to("/dev/zero")):
        make()
        with pytest.raises(UserError, match="train-images.* not a file"):
            load_fashion_mnist("train", str(places["user"]))
        images.rmdir() if images.is_dir() else images.unlink()
    with pytest.raises(OSError, match="not a file"):
        read_idx("/dev/zero")


# Sets by name


def test_load_images(tmp_path):
    images, labels = load_images("fashion-mnist-mini", None, "test", 28, 1)
    padded, labels_too = load_images("fashion-mnist-mini", None, "test", 32, 1)
    assert padded.shape == (500, 32, 32, 1) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    np.testing.assert_array_equal(labels, labels_too)
    assert padded.sum(dtype=np.int64) == images.sum(dtype=np.int64)
    put(tmp_path)
    assert load_images("fashion-mnist", str(tmp_path), "train", 29, 1)[0].shape == (3, 29, 29, 1)
    Image.new("RGB", (9, 5)).save(tmp_path / "a.png")
    assert load_images("image-folder", str(tmp_path), "train", 8, 3)[0].shape == (1, 8, 8, 3)


def test_a_data_set_is_added_by_its_loader(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda *args: (args, None))
    assert load_images("mine", "folder", "test", 8, 3)[0] == ("folder", "test", 8, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), r"\(N, H, W, C\) .* not \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), r"not \(2, 4, 4, 2\)"),
        (np.zeros((0, 4, 4, 1), np.uint8), r"not \(0, 4, 4, 1\)"),
        (np.zeros((2, 4, 4, 1)), "uint8, .* not float64"),
        (np.zeros((2, 4, 5, 1), np.uint8), "square, not 4 x 5"),
    ],
)
def test_arrays_that_are_not_images(images, message):
    with pytest.raises(UserError, match=f"^file: .*{message}"):
        check_images(images, "file: ")
    check_images(np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "args, message",
    [
        (("fashion-mnist-mini", None, "test", 16, 1), "28 x 28 x 1, not 16 x 16 x 1"),
        (("fashion-mnist-mini", None, "test", 28, 3), "28 x 28 x 1, not 28 x 28 x 3"),
        (("cifar", None, "test", 28, 1), "'cifar'.*fashion-mnist, fashion-mnist-mini, image-folder"),
        (("image-folder", None, "test", 28, 1), "--data.dir"),
        (("arrays", None, "train", 28, 1), "does not keep"),
    ],
)
def test_load_images_bad_input(args, message):
    with pytest.raises(UserError, match=message):
        load_images(*args)


# The pipeline


def numbered(count, size=2, channels=1):
    """Black images whose top left pixel (channel 0) is their index, as is their label."""
    images = np.zeros((count, size, size, channels), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images, np.arange(count)


def numbered_points(count):
    """Points that no flip leaves as they are, and their index."""
    return np.random.default_rng(0).standard_normal((count, 2), np.float32) * 7, np.arange(count)


def rows(*args, **options):
    dataset = make_dataset(*args, **options)
    return list(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))


def equal(a, b):
    return len(a) == len(b) and all((x == u).all() and (y == v).all() for (x, y), (u, v) in zip(a, b, strict=True))


def test_batches_are_of_the_right_kind():
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    dataset = make_dataset(images, np.arange(10, dtype=np.int64), 10, 3)
    assert dataset.get_dataset_size() == 3 and dataset.get_col_names() == ["image", "label"]
    for row in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
        x, label = row["image"], row["label"]
        assert x.shape == (10, 3, 5, 4) and x.dtype == np.float32 and label.shape == (10,) and label.dtype == np.int32
        assert x.min() == -1 and x.max() == 1
        expected = images[label].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1  # labels stay with their images
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-7)


def test_repeatable_and_seeded():
    data = numbered(50)
    a = rows(*data, 8, 14, flip=True, seed=3)
    assert equal(a, rows(*data, 8, 14, flip=True, seed=3))
    assert not equal(a, rows(*data, 8, 14, flip=True, seed=4))
    epochs = [np.concatenate([y for _, y in a[i : i + 6]]).tolist() for i in (0, 6)]
    assert epochs[0] != epochs[1] and all(len(set(epoch)) == 48 for epoch in epochs)  # reshuffled; none twice


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 8),
    steps=st.integers(1, 30),
    resumed=st.integers(0, 29),
    seed=st.integers(0, 2**32),
    world_size=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_resume_ranks_and_epochs(count, batch_size, steps, resumed, seed, world_size):
    images, labels = numbered(count)
    kind = dict(seed=seed, flip=True, world_size=world_size)
    if count < batch_size * world_size:
        with pytest.raises(UserError, match=f"{count} images"):
            check_enough(images, batch_size, world_size)
        return
    check_enough(images, batch_size, world_size)
    resumed %= steps
    ranks = [make_dataset(images, labels, batch_size, steps, rank=rank, **kind).source for rank in range(world_size)]
    tail = make_dataset(images, labels, batch_size, steps, start_step=resumed, rank=world_size - 1, **kind).source
    whole = [list(source) for source in ranks]
    assert equal(list(tail), whole[-1][resumed:])

    whole = np.array([[label for _, label in batches] for batches in whole])  # (ranks, steps, batch)
    per_epoch = count // (batch_size * world_size)
    for start in range(0, steps, per_epoch):
        seen = whole[:, start : start + per_epoch].ravel()
        assert len(set(seen)) == seen.size  # ranks are disjoint, and no image comes twice in an epoch
        if start + per_epoch <= steps:
            assert count - seen.size < batch_size * world_size  # and all but a last part of a step are seen


def test_resume_through_mindspore():
    data = numbered(20)
    whole = rows(*data, 6, 11, flip=True)
    assert len(whole) == 11
    for k in (1, 3, 10):
        assert equal(rows(*data, 6, 11, start_step=k, flip=True), whole[k:])


def test_ranks_share_the_steps_of_one():
    """Two ranks at batch 4 see, step by step, what one sees at batch 8."""
    data = numbered(30)
    both = [rows(*data, 4, 7, rank=rank, world_size=2) for rank in range(2)]
    alone = rows(*data, 8, 7)
    for (_, first), (_, second), (_, joint) in zip(*both, alone, strict=True):
        assert np.concatenate([first, second]).tolist() == joint.tolist()


def source(*args, **options):
    """The dataset's rows, without MindSpore between."""
    return list(make_dataset(*args, **options).source)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 8),
    calls=st.integers(1, 8),
    steps_per_call=st.integers(2, 6),
    start_step=st.integers(0, 40),
    seed=st.integers(0, 2**32),
    world_size=st.integers(1, 3),
    of_points=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rows_of_several_steps(count, batch_size, calls, steps_per_call, start_step, seed, world_size, of_points):
    """Those of single steps, one on the other, from any step and over the end of an epoch."""
    assume(count >= batch_size * world_size)
    data = numbered_points(count) if of_points else numbered(count)
    steps = start_step + calls * steps_per_call
    options = dict(start_step=start_step, seed=seed, flip=not of_points, rank=world_size - 1, world_size=world_size)
    single = source(*data, batch_size, steps, **options)
    found = source(*data, batch_size, steps, steps_per_call=steps_per_call, **options)
    assert len(found) == calls
    for i, (x, labels) in enumerate(found):
        wanted = single[i * steps_per_call : (i + 1) * steps_per_call]
        np.testing.assert_array_equal(x, [x for x, _ in wanted])
        np.testing.assert_array_equal(labels, [labels for _, labels in wanted])
        assert x.shape[:2] == labels.shape == (steps_per_call, batch_size)
        assert x.dtype == np.float32 and labels.dtype == np.int32


def test_rows_of_several_steps_through_mindspore():
    data = numbered(20)
    whole = rows(*data, 6, 12, flip=True)  # 3 steps an epoch
    found = rows(*data, 6, 12, flip=True, start_step=2, steps_per_call=5)
    assert make_dataset(*data, 6, 12, start_step=2, steps_per_call=5).get_dataset_size() == len(found) == 2
    assert found[0][0].shape == (5, 6, 1, 2, 2) and found[0][1].shape == (5, 6)
    assert equal([(x, y) for row in found for x, y in zip(*row, strict=True)], whole[2:])


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_points_come_as_they_are(steps_per_call):
    points, numbers = numbered_points(11)
    found = rows(points, numbers, 4, 6, flip=True, steps_per_call=steps_per_call)
    assert len(found) == 6 // steps_per_call
    for x, y in found:
        assert x.dtype == np.float32 and y.dtype == np.int32 and x.shape == (*y.shape, 2)
        np.testing.assert_array_equal(x, points[y])
    seen = np.concatenate([y.reshape(-1, 4) for _, y in found])
    assert len(set(seen[:2].ravel())) == len(set(seen[2:4].ravel())) == 8  # none twice in an epoch
    assert source(*numbered_points(11), 11, 1)[0][1].tolist() != list(range(11))


def test_too_few_points_for_a_step():
    with pytest.raises(UserError, match="5 points are too few.*3 x 2.*--train.batch-size"):
        check_enough(numbered_points(5)[0], 3, 2)
    assert len(make_dataset(*numbered_points(6), 3, 10, world_size=2, steps_per_call=2).source) == 5


def test_flips():
    images = np.zeros((2000, 1, 3, 1), np.uint8)
    images[:, 0, 0, 0] = 255
    (x, _), (other, _) = rows(images, np.zeros(2000), 2000, 2, flip=True)
    flipped = x[:, 0, 0, 2] == 1
    np.testing.assert_array_equal(x[flipped, 0, 0], np.tile([-1, -1, 1], (flipped.sum(), 1)))
    np.testing.assert_array_equal(x[~flipped, 0, 0], np.tile([1, -1, -1], ((~flipped).sum(), 1)))
    assert 0.45 < flipped.mean() < 0.55  # 0.5 +- 4.5 standard deviations
    assert (flipped != (other[:, 0, 0, 2] == 1)).mean() > 0.4  # anew in each step
    assert images[:, 0, 0, 0].min() == 255  # the source is left alone
    assert (rows(images, np.zeros(2000), 2000, 1)[0][0][:, 0, 0, 0] == 1).all()


def test_no_step_left():
    with pytest.raises(UserError, match="step 5 of 5"):
        make_dataset(*numbered(4), 2, 5, start_step=5)


def test_resume_reads_nothing_before_its_step():
    dataset = make_dataset(*numbered(100), 64, 10**9 + 3, start_step=10**9, flip=True)
    assert len(list(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))) == 3


def test_the_memory_of_a_data_set_does_not_grow_with_its_steps():
    dataset = make_dataset(*numbered(10), 2, 3 * 10**9)  # 24 GB, were their indices listed
    assert dataset.get_dataset_size() == 3 * 10**9
    assert next(iter(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)))[1].shape == (2,)
