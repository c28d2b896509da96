"""Files are whole or absent, and a cache never gives anything but what would be computed."""

import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ms_diffusion.files import (
    cache_folder,
    check_output,
    in_batches,
    load_or_compute,
    locked,
    private_folder,
    process_folder,
    sync_folder,
    temporary_path,
    write,
    write_synced,
)
from ms_diffusion.runtime import UserError


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


# Caches


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_private_folder_is_made_for_its_user_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert mode(folder) == mode(folder.parent) == 0o700
    folder.chmod(0o755)
    assert private_folder(folder) == folder  # others may read it


UNSAFE = {
    "all may write": lambda top: (top / "a" / "b").chmod(0o777),
    "a group may write": lambda top: (top / "a" / "b").chmod(0o770),
    "like /tmp": lambda top: (top / "a" / "b").chmod(0o1777),
    "the folder above": lambda top: (top / "a").chmod(0o777),
    "a link": lambda top: (
        (top / "c").mkdir(),
        (top / "c").chmod(0o777),
        (top / "a/b").rmdir(),
        (top / "a/b").symlink_to("../c"),
    ),
    "a link to a link": lambda top: (
        (top / "c").mkdir(),
        (top / "c").chmod(0o777),
        (top / "c" / "d").symlink_to(top),
        (top / "a" / "b").rmdir(),
        (top / "a" / "b").symlink_to(top / "c" / "d"),
    ),
    "a loop": lambda top: ((top / "a" / "b").rmdir(), (top / "a" / "b").symlink_to("b")),
    "a link to nothing": lambda top: ((top / "a" / "b").rmdir(), (top / "a" / "b").symlink_to("nothing")),
    "a file": lambda top: ((top / "a" / "b").rmdir(), (top / "a" / "b").write_bytes(b"")),
    "a pipe": lambda top: ((top / "a" / "b").rmdir(), os.mkfifo(top / "a" / "b")),
}


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("end", ["", "new"])
def test_a_folder_that_others_could_change_is_not_private(tmp_path, name, end):
    (tmp_path / "a" / "b").mkdir(parents=True, mode=0o755)
    if name == "like /tmp" and end:
        pytest.skip("a folder of one's own in /tmp is safe")
    UNSAFE[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError):
        private_folder(tmp_path / "a" / "b" / end)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_ones_own_in_a_shared_one_or_behind_a_link_is_private(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to("shared/mine")
    assert private_folder(shared / "mine") == private_folder(tmp_path / "link") == shared / "mine"


def test_a_folder_of_another_user_is_not_private(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "mine")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionError):
        private_folder(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can give files away")
@pytest.mark.parametrize("part", ["shared/a", "shared/a/b", "shared/link"])
def test_what_another_user_made_on_the_way_is_not_private(tmp_path, part):
    (tmp_path / "shared" / "a" / "b").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "mine").mkdir()
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "mine")
    os.chown(tmp_path / part, 54321, -1, follow_symlinks=False)
    with pytest.raises(PermissionError):
        private_folder(tmp_path / part)


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """Neither $XDG_CACHE_HOME nor $HOME nor an entry for the user, and an empty folder for temporary files."""

    def unknown(_):
        raise KeyError

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    process_folder.cache_clear()
    yield tmp_path
    process_folder.cache_clear()


def test_cache_folder(no_home, monkeypatch):
    monkeypatch.setenv("HOME", str(no_home))
    assert cache_folder() == no_home / ".cache" / "ms_diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "x"))
    assert cache_folder(no_home) == no_home
    assert cache_folder() == cache_folder("") == cache_folder(no_home / "nowhere") == no_home / "x" / "ms_diffusion"


def no_access(path, monkeypatch):
    access = os.access  # which lets root write anywhere
    monkeypatch.setattr(os, "access", lambda other, mode: os.fspath(other) != str(path) and access(other, mode))


WITHOUT_CACHE = {
    "no home": lambda home, patch: None,
    "below a file": lambda home, patch: patch.setenv("HOME", str(home / "file" / "x")),
    "not writable": lambda home, patch: (patch.setenv("HOME", str(home)), no_access(home / ".cache/ms_diffusion", patch)),
    "shared": lambda home, patch: (patch.setenv("XDG_CACHE_HOME", str(home / "shared")), (home / "shared").chmod(0o777)),
}


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_without_a_cache_of_ones_own_there_is_one_of_the_process(no_home, monkeypatch, capsys, name):
    (no_home / "file").write_bytes(b"")
    (no_home / "shared").mkdir()
    WITHOUT_CACHE[name](no_home, monkeypatch)
    stale = temporary_path(no_home / "tmp" / "ms_diffusion")  # of a process that has ended: of this number, started later
    stale = stale.with_name(re.sub(rf"-{os.getpid()}-[0-9]+-", f"-{os.getpid()}-1-", stale.name))
    stale.mkdir()
    folder = cache_folder()
    assert folder.parent == no_home / "tmp" and mode(folder) == 0o700 and folder == cache_folder() and not stale.exists()
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1


def test_without_any_place_nothing_is_cached(no_home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(no_home / "nothing" / "file"))
    (no_home / "nothing").write_bytes(b"")
    path = cache_folder() / "a.bin"
    for _ in range(2):
        assert load_or_compute(path, "k", {"x": (1,)}, lambda: {"x": np.ones(1)})["x"].tolist() == [1]


def test_the_cache_of_a_process_ends_with_it_and_not_with_a_fork(no_home):
    code = "import os, sys; from ms_diffusion.files import cache_folder as c; print(c(), flush=True)"
    code += "\nif os.fork() == 0: sys.exit()\nos.wait(); print(c().is_dir())"
    environment = {
        "TMPDIR": str(no_home / "tmp"),
        "XDG_CACHE_HOME": "/dev/null",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("True\n") and str(no_home) in done.stdout, done.stderr
    assert files(no_home / "tmp") == []


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


@pytest.fixture
def cached():
    """cached(path) -> what a cache gives for x (3,) and y (2, 1); cached.calls: how often it was computed."""

    def cached(path, key="f" * 64):
        return load_or_compute(path, key, {"x": (3,), "y": (2, 1)}, compute)

    def compute():
        cached.calls += 1
        return {"x": np.arange(3.0), "y": np.array([[7.0], [8.0]])}

    cached.calls = 0
    yield cached
    wanted = compute()
    np.testing.assert_equal(cached(Path("/dev/null/x")), wanted)


def test_load_or_compute(tmp_path, cached):
    """Computed once, and each time where it cannot be written."""
    first = cached(tmp_path / "new" / "a.bin")
    assert first["x"].dtype == np.float32 and first["x"].tolist() == [0, 1, 2] and first["y"].tolist() == [[7], [8]]
    np.testing.assert_equal(cached(tmp_path / "new" / "a.bin"), first)
    assert cached.calls == 1
    (tmp_path / "file").write_text("not a folder")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for i, name in enumerate(["file/a.bin", "pipe", "folder"]):
        np.testing.assert_equal(cached(tmp_path / name), first)
        assert cached.calls == 2 + i
    assert sorted(files(tmp_path)) == ["file", "folder", "new", "pipe"] and files(tmp_path / "new") == ["a.bin"]


def test_a_cache_file_with_any_bit_changed_is_computed_again(tmp_path, cached):
    path = tmp_path / "a.bin"
    first = cached(path)
    whole = path.read_bytes()
    damaged = [whole[:i] for i in range(0, len(whole), 9)] + [whole + b"0", whole + whole, b"0" + whole]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 2)]
    for count, data in enumerate(damaged, 2):
        path.write_bytes(data)
        np.testing.assert_equal(cached(path), first)
        assert cached.calls == count and path.read_bytes() == whole


def test_a_cache_file_of_another_key_or_shape_is_computed_again(tmp_path, cached):
    path = tmp_path / "a.bin"
    others = [{"x": (5,)}, {"x": (4,), "y": (2, 1)}, {"y": (3,)}]
    for count, shapes in enumerate(others, 1):
        load_or_compute(path, "f" * 64, shapes, lambda shapes=shapes: {name: np.ones(s) for name, s in shapes.items()})
        cached(path)
        assert cached.calls == count
    first = cached(path)
    assert cached.calls == len(others)
    np.testing.assert_equal(cached(path, "0" * 64), first)
    assert cached.calls == len(others) + 1


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


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "points.npz", "checkpoints/a.png", "first_stage/ema.safetensors"]
)
def test_an_output_is_no_file_that_a_run_needs(tmp_path, name):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "link"):
        with pytest.raises(UserError, match="belongs to the run"):
            check_output(folder / name)
    check_output(
        tmp_path / "run" / "sample.png", tmp_path / "run" / "pictures" / "config.png", tmp_path / name.replace("/", "-")
    )
