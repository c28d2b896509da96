"""The program where the machine gives it little: no home, no cache, no compiler, another language, low limits. It works, or
says in one line what is missing."""

import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ms_diffusion import runtime, versions
from ms_diffusion.runtime import UserError, group_memory

ROOT = Path(__file__).parents[1]
SHORT = "train --preset scurve --train.batch-size 8 --train.sample-num 4 --train.sample-steps 2".split()
SHORT += "--train.total-steps 4 --train.save-every 4 --train.sample-every 4".split()
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
# A user without an entry in /etc/passwd, who may read all files, since Python itself may be in another's home
NOBODY = (
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search".split()
)


def program(*args, limits="", user=(), without=(), **changes):
    """The program in a process of its own, after the shell's `limits`, with another environment."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {"PYTHONPATH": str(ROOT)} | changes
    command = [*user, "/bin/sh", "-c", f'{limits}\nexec "$@"', "sh", sys.executable, "-m", "ms_diffusion", *map(str, args)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, timeout=300)


def assert_one_line(done, *words):
    err = done.stderr.decode()
    assert done.returncode == 2 and not done.stdout and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def assert_trained(done, run, notes=0):
    """The run is complete, and stderr has nothing but progress and as many notes."""
    err = done.stderr.decode().replace("\r", "\n")
    assert done.returncode == 0, err
    lines = [line for line in err.splitlines() if line.strip() and "step/s" not in line and "s/step" not in line]
    assert len(lines) == notes and all(line.startswith("note: ") for line in lines), err
    assert (run / "checkpoints" / "step-0000004" / "state.json").exists() and (run / "loss.png").exists()


# Limits


@pytest.mark.parametrize("gigabytes", [0.25, 1, 2.9])
def test_too_little_address_space(gigabytes, tmp_path):
    done = program(*SHORT, "--run-dir", tmp_path / "run", limits=f"ulimit -v {int(gigabytes * 2**20)}")
    assert_one_line(done, "ulimit -v")
    assert list(tmp_path.iterdir()) == []


def test_each_command_says_so(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    with pytest.raises(UserError, match="ulimit -v"):
        versions.check_limits.__wrapped__()
    assert_one_line(program("sample", limits="ulimit -v 1000000"), "ulimit -v")


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(versions, "available_memory", lambda: 100 << 20)
    with pytest.raises(UserError, match="105 MB are free"):
        versions.check_limits.__wrapped__()


@needs_root
@pytest.mark.parametrize("count", [1, 5, 12])
def test_too_few_threads(count, tmp_path):
    done = program(*SHORT, "--run-dir", tmp_path / "run", user=[*NOBODY, "prlimit", f"--nproc={count}"])
    assert_one_line(done, "ulimit -u")


def test_the_threads_that_are_tried_end():
    before = len(os.listdir("/proc/self/task"))
    versions.check_limits.__wrapped__()
    end = time.monotonic() + 5
    while (now := len(os.listdir("/proc/self/task"))) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert now <= before


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_cgroups_leave(tmp_path, version):
    """The tightest of the process's group and those above counts, and what is kept of files is free."""
    root, prefix = (tmp_path / "memory", "total_") if version == 1 else (tmp_path, "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    groups = "3:cpu,memory:/a/b\n" if version == 1 else "0::/a/b\n"
    assert group_memory(groups, tmp_path) == float("inf")
    for folder, limit, used, kept in [("a/b", 1000, 300, 0), ("a", 900, 850, 600), (".", "max", 5000, 0)]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            (root / folder / name).write_text(f"{value}\n")
        (root / folder / "memory.stat").write_text(f"{prefix}inactive_file {kept // 2}\n{prefix}active_file {kept // 2}\n")
    assert group_memory(groups, tmp_path) == 650
    (root / "a" / names[1]).write_text("1200\n")
    assert group_memory(groups, tmp_path) == 300
    assert group_memory("1:cpu:/x\n", tmp_path) == float("inf")
    assert 0 < runtime.available_memory() < 1 << 62


def test_threads_that_cannot_be_started_are_no_traceback():
    for message in ("can't start new thread", "Resource temporarily unavailable"):
        assert "ulimit" in runtime.describe(RuntimeError(message))


# A short run


@pytest.mark.slow
def test_little_of_everything(tmp_path):
    """Another language, a terminal that can do nothing, no home, no temporary folder, a bad compiler, few files, a core."""
    run = tmp_path / "lauf-äöü 训练 [1]*"
    changes = dict(
        TERM="dumb", LANG="C", LC_ALL="POSIX", TMPDIR="/nonexistent", CXX="false", XDG_CACHE_HOME=str(tmp_path / "c")
    )
    core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    done = program(*SHORT, "--run-dir", run, without=["HOME"], limits="umask 077; ulimit -n 24", user=core, **changes)
    assert_trained(done, run, notes=1)  # of the compiler
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [run, *run.rglob("*")]}
    assert modes == {0}  # nothing is for others with this umask


@needs_root
@pytest.mark.slow
def test_a_user_without_an_entry_and_without_a_home(tmp_path):
    """Caches are in a folder of the process, which it removes."""
    for folder in ("tmp", "runs"):
        (tmp_path / folder).mkdir()
        os.chown(tmp_path / folder, 54321, 54321)
    tmp_path.chmod(0o755)
    environment = dict(without=["HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"], TMPDIR=str(tmp_path / "tmp"))
    done = program(*SHORT, "--run-dir", tmp_path / "runs" / "a", user=NOBODY, **environment)
    assert_trained(done, tmp_path / "runs" / "a", notes=1)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("megabytes, works", [(1024, True), (200, False)])
def test_a_memory_limit_of_a_cgroup(tmp_path, megabytes, works):
    group = Path("/sys/fs/cgroup/memory", f"ms_diffusion-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs a cgroup of version 1 that it can write to")
    try:
        (group / "memory.limit_in_bytes").write_text(str(megabytes << 20))
        done = program(*SHORT, "--run-dir", tmp_path / "run", limits=f"echo $$ > {group}/cgroup.procs")
    finally:
        time.sleep(0.5)  # the group is busy until its processes are gone
        group.rmdir()
    if works:
        assert_trained(done, tmp_path / "run")
    else:
        assert_one_line(done, "MB of memory")


def test_numpy_2_leaves_no_traceback_in_a_notebook():
    """MindSpore's look-up of NumPy's C interface fails and is printed through sys.excepthook, which IPython replaces."""
    code = "import sys; sys.excepthook = lambda *e: print(e); import ms_diffusion as md; md.runtime.set_device('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
