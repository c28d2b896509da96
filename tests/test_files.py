"""Files are whole or absent, and a cache never gives anything but what would be computed."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ms_diffusion.files import cache_folder, in_batches, load_or_compute, locked, sync_folder, write, write_synced


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("old", [b"old and longer", None])
def test_write_replaces_the_file(tmp_path, old):
    path = tmp_path / "new" / "a.bin"
    if old:
        path.parent.mkdir()
        path.write_bytes(old)
    write(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and files(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("old", [b"old", None])
def test_write_that_fails_midway_changes_nothing(tmp_path, error, old):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)

    def save(f):
        f.write(b"half of the ")
        f.flush()
        assert path.read_bytes() == old if old else not path.exists()
        assert len(files(tmp_path)) == (2 if old else 1)  # the half is in a file beside it
        raise error

    with pytest.raises(type(error)):
        write(path, save)
    assert files(tmp_path) == (["a.bin"] if old else [])
    if old:
        assert path.read_bytes() == old


def test_synced_files(tmp_path):
    write_synced(tmp_path / "a", b"data")
    sync_folder(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"data" and files(tmp_path) == ["a"]


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == cache_folder("") == cache_folder(tmp_path / "nowhere") == tmp_path / "ms_diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ms_diffusion"


def test_a_lock_lets_one_in(tmp_path):
    inside = []

    def work():
        with locked(tmp_path / "new"):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        for end in [pool.submit(work) for _ in range(8)]:
            end.result()


def test_load_or_compute(tmp_path):
    """Computed once, again where the file is corrupt, and each time where it cannot be written."""
    calls = []

    def compute():
        calls.append(1)
        return np.arange(3.0)

    for path in (tmp_path / "new" / "a.npy", tmp_path / "file" / "a.npy"):
        (tmp_path / "file").write_text("not a folder")
        for _ in range(2):
            assert load_or_compute(path, np.load, compute, np.save).tolist() == [0, 1, 2]
    assert len(calls) == 3
    path = tmp_path / "new" / "a.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_or_compute(path, np.load, compute, np.save).tolist() == [0, 1, 2] and len(calls) == 4
    assert load_or_compute(path, np.load, compute, np.save).tolist() == [0, 1, 2] and len(calls) == 4


def test_in_batches(capsys):
    """Batches of one size, the last one filled up; the arrays have as many rows as there are."""
    sizes = []

    def fn(rows):
        sizes.append(len(rows))
        return 2 * rows, rows.sum(1)

    rows = np.arange(39.0).reshape(13, 3)
    for size, expected in ((5, [5, 5, 5]), (13, [13]), (100, [13])):
        doubled, sums = in_batches(fn, rows, size)
        np.testing.assert_array_equal(doubled, 2 * rows)
        np.testing.assert_array_equal(sums, rows.sum(1))
        assert sizes == expected
        sizes.clear()
    assert capsys.readouterr().err == ""
    in_batches(fn, rows, 5, "bar")
    assert "bar: 100%" in capsys.readouterr().err
