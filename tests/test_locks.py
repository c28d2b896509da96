"""A folder has one writer, whatever the disk and however the writer before has ended."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ms_diffusion import locks
from ms_diffusion.files import machine, started
from ms_diffusion.locks import sole_writer
from ms_diffusion.runtime import UserError

HOLD = """
import sys, time
from pathlib import Path
from ms_diffusion.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 0.05 s; a writer without one for 0.6 s is taken for dead."""
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "LOST", 0.6)


def record(**changes):
    own = {"process": os.getpid(), "started": started(os.getpid()), "machine": machine(), "host": "h", "user": "u"}
    return json.dumps(own | {"token": "t", "count": 1} | changes).encode()


def test_another_process_is_named_and_a_killed_one_is_succeeded(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"process {process.pid} on"), sole_writer(tmp_path / "run"):
            pass
        assert time.monotonic() - begin < 1
        process.send_signal(signal.SIGKILL)
    with sole_writer(tmp_path / "run") as check:
        check()
        assert time.monotonic() - begin < 2
        (tmp_path / "run" / "file").write_text("x")
    assert os.listdir(tmp_path / "run") == ["file"]


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with sole_writer(tmp_path / "a" / "b"):
        assert os.listdir(tmp_path / "a" / "b") == [".lock"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("has_locks", [True, False])
def test_one_at_a_time(tmp_path, has_locks, request):
    if not has_locks:
        request.getfixturevalue("without_locks")
    inside, entered = [], []

    def work():
        try:
            with sole_writer(tmp_path):
                inside.append(1)
                assert len(inside) == 1
                time.sleep(0.3)
                inside.pop()
                entered.append(1)
        except UserError:
            return

    with ThreadPoolExecutor(4) as pool:
        for end in [pool.submit(work) for _ in range(4)]:
            end.result()
    assert len(entered) >= 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"{}", b"[" * 5000, record(process="1"), record(process=2**70), b"\0" * 9000]
)
def test_a_file_that_says_nothing_is_no_writer(tmp_path, without_locks, content, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / ".lock").write_bytes(content)
    with sole_writer(tmp_path) as check:
        check()


def test_without_locks_a_process_of_this_machine_is_asked_for(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / ".lock").write_bytes(record())
    with pytest.raises(UserError), sole_writer(tmp_path):
        pass
    (tmp_path / ".lock").write_bytes(record(started=1))  # its number belongs to another process now
    with sole_writer(tmp_path):
        pass


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_writer_on_another_machine(tmp_path, quick, has_locks, request):
    """It is refused as soon as it gives a sign of life, and taken for dead without one."""
    if not has_locks:
        request.getfixturevalue("without_locks")
    path = tmp_path / ".lock"
    path.write_bytes(record(machine="other"))
    timer = threading.Timer(0.3, lambda: path.write_bytes(record(machine="other", count=2)))
    timer.start()
    with pytest.raises(UserError, match="u's process"), sole_writer(tmp_path):
        pass
    begin = time.monotonic()
    with sole_writer(tmp_path):
        assert 0.4 < time.monotonic() - begin < 3
    path.write_bytes(record(machine="other"))
    os.utime(path, (1, 1))
    begin = time.monotonic()
    with sole_writer(tmp_path):
        assert time.monotonic() - begin < (0.4 if has_locks else 1.4)


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_writer_that_was_taken_over_notices(tmp_path, quick, how):
    path = tmp_path / ".lock"
    with sole_writer(tmp_path) as check:
        check()
        time.sleep(0.2)
        check()
        if how == "replaced":
            path.unlink()
        path.write_bytes(record(token="other"))
        time.sleep(0.2)
        with pytest.raises(UserError, match="taken over"):
            check()
    assert path.exists()  # it is the other's


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    with sole_writer(tmp_path / "run") as check:
        shutil.rmtree(tmp_path / "run")
        check()
        assert os.listdir(tmp_path / "run") == [".lock"]
        with pytest.raises(UserError), sole_writer(tmp_path / "run"):
            pass


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError), sole_writer(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "precious"


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path):
        raise ZeroDivisionError
    with sole_writer(tmp_path):
        pass
