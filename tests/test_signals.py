"""Signals and broken streams: a command ends at once, a run is saved first, and no stream that is gone costs any work."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import call, metrics, request, tree

from ms_diffusion import files, runtime
from ms_diffusion.progress import ProgressBar
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import Config, override
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start(code, *args, before="", **options):
    """A Python process that runs this code with the signals' default actions; `before` runs in it first."""
    defaults = "import signal\nfor s in (1, 15):\n    signal.signal(s, 0)\nsignal.signal(2, signal.default_int_handler)\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", defaults + before + code, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, cwd=pipes.pop("cwd", None), **pipes)


def wait_for(path, process, seconds=120):
    """Return when the process has made the file."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def finish(process, seconds=120):
    """(exit code, stdout, stderr) of a process that ends."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert "Traceback" not in (err or ""), err
    return process.returncode, out, err


# Signals, without MindSpore

WAIT = """
import ctypes, sys, time, threading
from pathlib import Path
from ms_diffusion import runtime
runtime.catch_interrupts()
def ready():
    Path(sys.argv[1]).touch()
def hold():  # Python's lock, as a library may
    threading.Timer(0.3, ready).start()
    time.sleep(0.5)
    ctypes.PyDLL(None).sleep(60)
"""


def start_each(code, folder):
    """A process for each signal, when all are ready."""
    processes = {number: start(WAIT + code, folder / number.name) for number in SIGNALS}
    for number, process in processes.items():
        wait_for(folder / number.name, process)
    return processes


def test_a_signal_ends_a_command_at_once(tmp_path):
    """Also one that holds Python's lock."""
    processes = start_each("hold()", tmp_path)
    time.sleep(0.4)
    for number, process in processes.items():
        process.send_signal(number)
    assert [finish(process, 5) for process in processes.values()] == [(-number, "", "") for number in SIGNALS]


def test_while_a_run_trains_a_signal_asks_it_to_stop(tmp_path):
    """And says so first, however slow its stream is."""
    slow = "say = runtime.say\nruntime.say = lambda text: (time.sleep(0.2), say(text))\n"
    code = slow + "runtime.defer_interrupts()\nready()\nassert runtime.STOP.wait(60)\nprint('saved')"
    processes = start_each(code, tmp_path)
    for number, process in processes.items():
        process.send_signal(number)
    for code, out, err in [finish(process, 5) for process in processes.values()]:
        assert (code, out) == (0, "saved\n") and len(err.splitlines()) == 1


def test_a_second_ctrl_c_ends_it(tmp_path):
    code = "runtime.defer_interrupts()\nready()\nruntime.STOP.wait()\nPath(sys.argv[2]).touch()\ntime.sleep(60)"
    process = start(WAIT + code, tmp_path / "1", tmp_path / "2")
    wait_for(tmp_path / "1", process)
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "2", process)
    process.send_signal(signal.SIGINT)
    assert finish(process, 5)[0] == 130


@pytest.mark.parametrize("deferred", [False, True])
def test_what_was_ignored_stays_ignored(tmp_path, deferred):
    """SIGHUP by nohup, SIGINT of a shell's job in the background."""
    ignore = "signal.signal(1, signal.SIG_IGN)\nsignal.signal(2, signal.SIG_IGN)\n"
    code = "runtime.defer_interrupts()\n" * deferred + "ready()\nprint(runtime.STOP.wait(0.5))"
    process = start(WAIT + code, tmp_path / "ready", before=ignore)
    wait_for(tmp_path / "ready", process)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert finish(process, 5) == (0, "False\n", "")


def test_the_doctor_leaves_no_children(tmp_path):
    """They end with it, however it ends."""
    code = """
import sys
from ms_diffusion.commands import doctor
doctor.run_python(f"import os, pathlib, time; pathlib.Path({sys.argv[1]!r}).write_text(str(os.getpid())); time.sleep(60)")
"""
    process = start(code, tmp_path / "child")
    wait_for(tmp_path / "child", process)
    time.sleep(0.1)
    child = int((tmp_path / "child").read_text())
    process.kill()
    process.communicate()
    end = time.monotonic() + 5
    while files.started(child) and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_need_not_be_finished_is_given_up():
    """Between batches of decoding and of features too; not in other threads, and not after the context."""
    stop, seen = threading.Event(), []

    def fn(rows):
        seen.append(len(rows))
        if len(seen) == 2:
            stop.set()
        return [rows]

    with pytest.raises(runtime.Interrupted), runtime.given_up(stop.is_set):
        files.in_batches(fn, np.zeros(10), 2)
    assert seen == [2, 2]
    runtime.check_interrupted()
    with runtime.given_up(stop.is_set):
        thread = threading.Thread(target=lambda: files.in_batches(fn, np.zeros(4), 2))
        thread.start()
        thread.join()
    assert seen == [2] * 4


# Streams

PRINT = """
import sys
from ms_diffusion import runtime
def main(argv):
    for _ in range(3):
        print("x" * 5000, flush=True)
        print("y" * 5000, file=sys.stderr, flush=True)
    with open(argv[0], "w") as file:
        print(file.fileno(), file=file)
    return 0
sys.exit(runtime.run_program(main, sys.argv[1:]))
"""


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(tmp_path, numbers):
    """No file gets the number of a closed one, and with it what the program prints."""
    close = f"""
import os
if "again" not in sys.argv:
    for number in {numbers}:
        os.close(number)
    os.execv(sys.executable, [sys.executable, "-c", {PRINT!r}, *sys.argv[1:], "again"])
"""
    assert finish(start("import sys\n" + close, tmp_path / "out"))[0] == 0
    assert int((tmp_path / "out").read_text()) > 2


def test_a_reader_that_has_gone(tmp_path):
    read, write = os.pipe()
    os.close(read)
    streams = [{"stdout": write}, {"stderr": write}, {"stdout": write, "stderr": write}]
    processes = [start(PRINT, tmp_path / str(i), **options) for i, options in enumerate(streams)]
    os.close(write)
    assert [finish(process)[0] for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_under_the_output(tmp_path):
    """The work is done; the exit code tells that what was printed is lost, unless a run has trained."""
    deferred = PRINT.replace("    return 0", "    runtime.defer_interrupts()\n    return 0")
    with open("/dev/full", "w") as full:
        lost, run = (start(code, tmp_path / "out", stdout=full) for code in (PRINT, deferred))
        quiet = start(PRINT, tmp_path / "quiet", stderr=full)
    code, _, err = finish(lost)
    assert code == 2 and err.splitlines()[-1].startswith("error: stdout: No space left") and (tmp_path / "out").exists()
    assert finish(run)[0] == finish(quiet)[0] == 0


def test_a_pipe_that_does_not_block(tmp_path):
    """All arrives, though it is full for a while."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = start(PRINT, tmp_path / "out", stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    time.sleep(0.3)
    with open(read) as file:
        assert file.read().count("x") == 15000
    assert finish(process)[0] == 0


def test_characters_that_a_stream_lacks(tmp_path):
    code = PRINT.replace('"x" * 5000', "argv[0]").replace('"y" * 5000', "argv[0]")
    path = tmp_path / os.fsdecode("ü雪\udcff".encode(errors="surrogateescape"))
    process = start("import os\n" + code, path, stdin=subprocess.DEVNULL)
    _, out, err = finish(process)
    assert out.count("\\udcff") == err.count("\\udcff") == 3 and "ü雪" in out


# Errors


def error_of(e):
    """(exit code, stderr) of a program that raises."""

    def main(argv):
        raise e

    return runtime.run_program(main, [])


@pytest.mark.parametrize(
    "e",
    [OSError(number, os.strerror(number), "some/path") for number in sorted(errno.errorcode)]
    + [OSError(5, "Input/output error", "old", None, "some/path"), OSError(5, "Input/output error", b"some/path")]
    + [OSError("some/path cannot be read"), MemoryError(), UnicodeDecodeError("utf-8", b"some/path", 0, 1, "invalid")]
    + [ValueError("embedded null byte")]
    + [RuntimeError(text) for text in (
        "Device(id:0) memory isn't enough and alloc failed, kernel name: Conv2D, alloc size: 123B.",
        "Malloc for kernel output failed, Memory isn't enough, node:Default/Add", "Allocate memory failed", "std::bad_alloc",
        "Memory not enough: current free memory size[1] is smaller than required size[2].", "Out of memory")],
    ids=repr,
)  # fmt: skip
def test_errors_of_one_line(e, capsys):
    assert error_of(e) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ("some/path" in line or isinstance(e, MemoryError | RuntimeError | ValueError))


@pytest.mark.parametrize("e", [RuntimeError("a fault"), ValueError("memory of a shape"), KeyError("x"), RecursionError()])
def test_faults_of_the_program_have_a_traceback(e):
    with pytest.raises(type(e)):
        error_of(e)


def test_debug_shows_the_traceback():
    def main(argv):
        raise UserError("bad")

    with pytest.raises(UserError):
        runtime.run_program(main, ["--debug"])


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\rb", os.fsdecode(b"a\xff\xfe"), "a\u2028b"], ids=ascii)
def test_a_message_is_one_line_whatever_a_file_is_called(name, capsys):
    assert error_of(UserError(f"{name} is wrong")) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err[:-1].isprintable()


def test_an_error_stands_in_a_line_of_its_own(capsys, monkeypatch):
    """Not in that of a progress bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def main(argv):
        for _ in ProgressBar(range(3)):
            raise UserError("bad")

    assert runtime.run_program(main, []) == 2
    assert capsys.readouterr().err.replace("\r", "\n").splitlines()[-1] == "error: bad"


# Output paths


def test_outputs_are_tested_before_the_work(class_run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    wrong = [".", "file/a.png", "a" * 300, "/dev/null/a.png", "/proc/a.png"]
    for name in wrong:
        for flag in ("--out", "--gif", "--npz", "--denoise-row"):
            with pytest.raises(OSError) as e:
                class_run.task.render(class_run, request("--steps", 3, "--out", "x.png", flag, name), tmp_path)
            assert runtime.describe(e.value)
    with pytest.raises(UserError, match="two outputs"):
        class_run.task.render(class_run, request("--steps", 3, "--out", "x", "--gif", "./y/../x"), tmp_path)
    assert tree(tmp_path) == before | {Path("y"): None} or tree(tmp_path) == before


def test_devices_stay_devices(tmp_path):
    files.check_output("/dev/null", "/dev/null", None)
    files.write("/dev/null", lambda f: f.write(b"x"))
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    files.check_output(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert files.is_device(Path("/dev/stdout")) or not Path("/dev/stdout").exists()


def test_commands_that_cannot_write_do_no_work(tmp_path, monkeypatch):
    from ms_diffusion.commands import evaluate

    np.savez(tmp_path / "x.npz", images=np.zeros((4, 28, 28, 1), np.uint8))
    monkeypatch.setattr(evaluate, "Reference", None)
    for flags in (["--json", tmp_path], ["--out", tmp_path], ["--out", "x", "--json", "x"], ["--out", tmp_path / "x.npz/a"]):
        code, _, err = call("evaluate", tmp_path / "x.npz", *flags)
        assert code == 2 and "Traceback" not in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["[a-z]*? -x\nü雪", os.fsdecode(b"a\xff")], ids=ascii)
def test_any_character_in_a_path(class_run, tmp_path, name, monkeypatch, capsys):
    """None has a meaning but / and NUL."""
    home, images = tmp_path / name, np.zeros((4, 1, 28, 28), np.float32)
    shutil.copytree(class_run.home, home)
    (tmp_path / "a").mkdir()  # what the pattern fits
    run = Run(home)
    run.__dict__["generator"] = SimpleNamespace(draw=lambda *_: images, batch_size=64)
    written = run.task.render(run, request("--num", 4, "--steps", 3, "--npz", home / f"{name}.npz"), home)
    assert run.step == class_run.step and written == [home / "sample.png", home / f"{name}.npz"]
    assert all(path.is_file() for path in written) and not list((tmp_path / "a").iterdir())
    for i in range(2):
        (home / f"{i}.png").write_bytes(written[0].read_bytes())
    config, _ = PRESETS["quick"].with_data(home)
    assert override(config, size=28).task().load_data()[0].shape == (3, 28, 28, 1)
    assert Config.from_json(write_config(home / "new" / name, config)).data.dir == str(home)


def write_config(path, config):
    files.write_json(path, config.to_record())
    return path


# Whole commands

DRIVER = """
import importlib, sys, time
from pathlib import Path
import ms_diffusion.__main__ as program
from ms_diffusion import runtime

mark, module, owner, name, count = sys.argv[1:6]

def hooked(*args):
    loaded, calls = importlib.import_module(*args), []
    part = importlib.import_module(module)
    part = getattr(part, owner) if owner else part
    original = getattr(part, name)

    def call(*args, **options):
        calls.append(1)
        if len(calls) == int(count):
            Path(mark).touch()
            while not Path(mark + "-sent").exists():
                time.sleep(0.01)
            if runtime.STOP.wait(10):
                Path(mark + "-stop").touch()
            time.sleep(10 if Path(mark + "-again").exists() else 0)
        return original(*args, **options)

    setattr(part, name, call)
    return loaded

program.import_module = hooked
sys.exit(program.main(sys.argv[6:]))
"""
TASKS = "ms_diffusion.training.tasks"
TRAIN = """--preset scurve --device cpu --model.dim 8 --model.depth 1 --data.num 200 --diffusion.num-timesteps 200
    --train.batch-size 32 --train.sample-num 20 --train.sample-steps 200 --train.steps-per-call 1 --train.log-every 1
    --train.save-every 5 --train.sample-every 6 --train.total-steps 8""".split()


def interrupt(folder, number, hook, *args, again=None):
    """Start a command and send it a signal at the n-th call of a function, which waits for it: `hook` is (module, class,
    name, n). A second signal is sent once the first has been noticed."""
    mark, sent, noticed = (folder / name for name in ("mark", "mark-sent", "mark-stop"))
    process = start(DRIVER, mark, *hook, *args, cwd=folder)
    wait_for(mark, process)
    process.send_signal(number)
    if again:
        (folder / "mark-again").touch()
    sent.touch()
    if again:
        wait_for(noticed, process)
        process.send_signal(again)
    end = finish(process)
    for path in folder.glob("mark*"):
        path.unlink()
    return end


def contents(run):
    """What a run has written, without times, and without a checkpoint of a step at which it was interrupted."""
    kept = [path for path in tree(run) if path.parts[0] != "checkpoints" or {"step-0000005", "step-0000008"} & {*path.parts}]
    return metrics(run), {
        path: (run / path).read_bytes() for path in kept if path.suffix in (".safetensors", ".png", ".npz")
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    assert call("train", *TRAIN, "--run-dir", run)[0] == 0
    return contents(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hook", "step"),
    [
        (signal.SIGHUP, (f"{TASKS}.points", "PointsTask", "advance", 1), 1),  # compilation
        (signal.SIGTERM, ("ms_diffusion.training.checkpoint", "Checkpoint", "save", 1), 6),
        (signal.SIGINT, (f"{TASKS}.points", "PointsTask", "preview", 1), 6),
        (signal.SIGTERM, ("ms_diffusion.plots2d", "", "save_samples", 2), 8),
    ],
    ids=["compile", "save", "preview", "last-picture"],
)
def test_an_interrupted_run_is_saved_and_goes_on_as_if_it_were_not(tmp_path, straight, number, hook, step):
    """The same files, byte for byte, as of a run that was not interrupted."""
    run = tmp_path / "run"
    code, out, err = interrupt(tmp_path, number, hook, "train", *TRAIN, "--run-dir", run)
    if hook[2] == "save_samples":  # all was done but for the picture, which a moment suffices for
        assert code == 0
    else:
        assert code == 130 and f"stopped at step {step} of 8, all saved" in out
        assert "stopping" in err and not (run / f"samples/step-{step:07d}.png").exists()
        assert call("train", *TRAIN, "--run-dir", run)[0] == 0
    assert contents(run) == straight


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, straight):
    hook = "ms_diffusion.training.checkpoint", "Checkpoint", "save", 1
    code, _, _ = interrupt(tmp_path, signal.SIGINT, hook, "train", *TRAIN, "--run-dir", "run", again=signal.SIGINT)
    assert code == 130 and not list((tmp_path / "run").rglob("*.safetensors"))
    assert call("train", *TRAIN, "--run-dir", tmp_path / "run")[0] == 0
    assert contents(tmp_path / "run") == straight


@pytest.mark.slow
def test_a_run_without_streams_trains_on(tmp_path, straight):
    """Closed, or on a full disk, or broken by a reader that ends."""
    read, write = os.pipe()
    os.close(read)
    process = start("import os\nos.close(2)\n" + DRIVER, "mark", "os", "", "getpid", 0, "train", *TRAIN, "--run-dir", "run",
                    cwd=tmp_path, stdout=write)  # fmt: skip
    os.close(write)
    assert finish(process)[0] == 0
    assert contents(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hook", "args"),
    [
        (signal.SIGINT, ("ms_diffusion.commands.sample", "", "load", 1), "sample --num 4 --out out.png --gif out.gif"),
        (signal.SIGINT, ("ms_diffusion.sampling", "Generator", "draw", 1), "evaluate --num 150 --json x.json --out x.png"),
        (
            signal.SIGTERM,
            ("ms_diffusion.commands.likelihood", "", "make_denoiser", 1),
            "likelihood fashion-mnist-large --num 4",
        ),
        (signal.SIGHUP, ("ms_diffusion.commands.export", "", "describe", 1), "export --format mindir --out x.mindir"),
        (
            signal.SIGTERM,
            ("ms_diffusion.commands.benchmark", "", "set_device", 1),
            "benchmark --presets quick --json x.json",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_other_commands_end_at_once_and_write_nothing(tmp_path, number, hook, args):
    code, out, err = interrupt(tmp_path, number, hook, *args.split())
    assert code == -number and not out
    assert not list(tmp_path.iterdir())
