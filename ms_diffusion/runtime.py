"""The machine: device, compilation, ranks, interrupts, and how a program ends. The only file that knows a device's name.
Importing this module makes the settings that must precede ``import mindspore``. It imports MindSpore only when needed."""

import contextlib
import ctypes
import errno
import functools
import io
import math
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from mindspore import Tensor

# On a CPU with AVX-512, MindSpore's NCHW convolutions fall back to oneDNN's reference kernel, 100 times slower than AVX2.
# The setting affects only the CPU's oneDNN, so it is made before the device is known; the user's own setting is kept.
if "mindspore" in sys.modules and "ONEDNN_MAX_CPU_ISA" not in os.environ:
    warnings.warn(
        "mindspore was imported before ms_diffusion, so the CPU runs without ms_diffusion's settings and may be several "
        "times slower: import ms_diffusion first",
        stacklevel=2,
    )
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
os.environ.setdefault("GLOG_v", "4")  # MindSpore's C++ log on stderr repeats what its exceptions say
# Seconds that a CPU waits for another rank. MindSpore's 30 (before 2.10 it knows no other) would end a run while rank 0
# uploads; a rank that has died is noticed otherwise, by the launcher and by MindSpore's scheduler.
os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "7200")

DEVICES = ("auto", "ascend", "gpu", "cpu")


class UserError(Exception):
    """Bad input. The message says in one line what is wrong and what to do; programs print it and exit with code 2."""


class Interrupted(Exception):
    """Work that need not be finished was given up, because the program was asked to stop."""


def command(name: str) -> str:
    """How a command of this package is called, in the way that the running program was called: "python train.py" in a clone,
    "python -m ms_diffusion train", or "ms-diffusion train"."""
    program = Path(sys.argv[0]).name
    if program in ("train.py", "sample.py") and name in ("train", "sample"):
        return f"python {name}.py"
    if program in ("train.py", "sample.py", "__main__.py"):
        return f"python -m ms_diffusion {name}"
    return f"ms-diffusion {name}"


def cgroups(controller: str, groups: str, mount: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of the process's cgroups and of those above them, and whether their files are those of version 1. `groups`
    is the text of /proc/self/cgroup."""
    for _, controllers, path in (line.split(":", 2) for line in groups.splitlines()):
        if not controllers or controller in controllers.split(","):
            folder = mount / (controller if controllers else "") / path.strip("/")
            yield from ((group, bool(controllers)) for group in (folder, *folder.parents))


def group_memory(groups: str, mount: Path) -> float:
    """Bytes that the memory limits of cgroups leave; infinity without one. What the system keeps of files is not counted as
    taken, since it makes room."""
    left = math.inf
    for group, is_v1 in cgroups("memory", groups, mount):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_v1 else ("memory.max", "memory.current")
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            limit, used = (int((group / name).read_text()) for name in names)
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = [int(parts.get("total_" * is_v1 + name, 0)) for name in ("active_file", "inactive_file")]
            left = min(left, limit - used + sum(files))
    return left


def available_memory() -> int:
    """Bytes of memory that this process may still take: the least of what the machine, the limit of its address space
    (ulimit -v) and its cgroups leave."""
    import resource

    left = [float(1 << 62)]
    with contextlib.suppress(OSError, ValueError):
        left.append(group_memory(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")))
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            left.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    return max(int(min(left)), 0)


def set_device(device: str = "auto") -> str:
    """Choose Ascend, then GPU, then CPU, or the one named; returns its MindSpore name. Call it before building networks.
    Raises UserError if the device is unknown or not there."""
    import mindspore as ms

    allow_numpy_2()
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    kinds = {"ascend": "Ascend", "gpu": "GPU", "cpu": "CPU"}
    for name in [device] if device != "auto" else kinds:
        if getattr(ms.device_context, name).is_available():
            card = int(os.environ.get("DEVICE_ID") or os.environ.get("ASCEND_DEVICE_ID") or 0)
            if not several_ranks():  # once they are connected, MindSpore refuses a second call
                ms.set_device(kinds[name], None if name == "cpu" else card)
                if name != "cpu":
                    set_arithmetic(name)
            return kinds[name]
    raise UserError(f"no {kinds[device]} device is usable here: check its driver, or run with --device auto or --device cpu")


def on_device(values: "np.ndarray") -> "Tensor":
    """A Tensor that is on the device: one on the host would be copied to an Ascend or a GPU in each call that takes it."""
    import mindspore as ms

    tensor, target = ms.Tensor(values), ms.get_context("device_target")
    return tensor if target == "CPU" else tensor.move_to(target)


def set_arithmetic(device: str) -> None:
    """Let a card compute float32 in float32 and give the same result twice. By default convolutions would shorten their
    inputs to 19 bits (HF32 on Ascend, TF32 on a GPU), and sums might vary in their order, which is faster:
    MS_DIFFUSION_FAST_MATH=on. What the program has already set stays, since MindSpore takes each setting once."""
    import mindspore as ms

    fast, short = os.environ.get("MS_DIFFUSION_FAST_MATH") == "on", {"ascend": "hf32", "gpu": "tf32"}[device]
    op_precision = getattr(ms.device_context, device).op_precision
    names = [f"{kind}_allow_{short}" for kind in ("conv", "matmul")]
    for setting, value in [*((getattr(op_precision, name), fast) for name in names), (ms.set_deterministic, not fast)]:
        with contextlib.suppress(RuntimeError):
            setting(value)


def on_ascend() -> bool:
    """Whether MindSpore runs on Ascend."""
    import mindspore as ms

    return ms.get_context("device_target") == "Ascend"


@functools.cache
def allow_numpy_2() -> None:
    """Let MindSpore's operators work beside NumPy 2; call it before the first operator.

    MindSpore 2.10 is compiled against NumPy 1. Its first operator that reads a Python number or shape looks up NumPy's C
    interface, raises SystemError and prints a page; every later one works. So this makes such a call, with a wrong shape,
    which fails in any case and before the device is used. NumPy scalars, such as np.int64(2), are still no arguments for
    operators."""
    from mindspore import Tensor

    hook, sys.excepthook = sys.excepthook, lambda *_: None  # a notebook's would show the page in the cell
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(TypeError, SystemError, ImportError):
            Tensor([0.0]).reshape("")
    finally:
        sys.excepthook = hook


def compiled(fn: Callable) -> Callable:
    """``ms.jit(fn)``, for a function of Tensors.

    On the CPU, a thread that waits for a MindSpore result spins on a core that the kernels need: a training step of the
    28-channel U-Net on 2 cores takes 2.9 s so, and 0.9 s where the caller sleeps until the graph reports its end
    (MindSpore 2.10). So on the CPU the graph ends by setting an event.

    A graph whose operator fails never sets the event. The caller therefore stops waiting as soon as the process uses no CPU
    time, and MindSpore raises the error when the result is read (2.10 takes 3 s for it).

    There is a graph for each shape of the arguments, which goes with the function (`with_own_graphs`)."""
    import mindspore as ms
    from mindspore import Tensor, ops

    ms.set_recursion_limit(4000)  # MindSpore's 1000 ends the compilation of deep U-Nets
    if ms.get_context("device_target") != "CPU":
        # Kernel by kernel on every Ascend: MindSpore would give graphs to GE on the 910A. O1 fuses kernels; it is untested
        return with_own_graphs(ms.jit(fn, jit_level="O0", backend="ms_backend"))

    done = threading.Event()
    zero = Tensor(0, ms.int32)

    def set_done(x):
        done.set()
        return x

    notify = ops.Custom(set_done, out_shape=lambda x: x, out_dtype=lambda x: x, func_type="pyfunc")

    def announced(*args, **kwargs):
        out = fn(*args, **kwargs)
        return ops.depend(out, notify(ops.depend(zero, out)))

    graph = with_own_graphs(ms.jit(announced))

    def call(*args, **kwargs):
        done.clear()
        out = graph(*args, **kwargs)
        spent = time.process_time()
        for _ in range(120):  # for a minute at most, should other threads keep the process busy after a failure
            if done.wait(0.5):
                break
            before, spent = spent, time.process_time()
            if spent - before < 0.01:
                break
        return out

    return call


MOST_GRAPHS = 16  # of a function: 16 MB each for a small network; `denoiser.graph_size` has 12 sizes
_unused: list[list[str]] = []  # names of the graphs of functions that are gone


def with_own_graphs(graph: Callable) -> Callable:
    """A function of ``ms.jit`` that keeps its last `MOST_GRAPHS` graphs. They are freed when it is gone, before another
    function is compiled; MindSpore (2.7 to 2.10) would keep each graph, and the network in it, until the process ends."""
    cache, names = graph_api().ms_compile_cache, []
    while _unused:  # here, since a finalizer may run in any thread, and amid the compilation of another graph
        free_graphs(_unused.pop())

    def call(*args, **kwargs):
        before = set(cache)
        out = graph(*args, **kwargs)
        names.extend(cache - before)
        while len(names) > MOST_GRAPHS:
            free_graphs([names.pop(0)])
        return out

    weakref.finalize(call, _unused.append, names).atexit = False
    return call


def graph_api() -> Any:
    """The module in which MindSpore keeps its graphs; ``ms.ms_memory_recycle``, which frees all of them, is in it too."""
    try:
        from mindspore.graph import api
    except ImportError:  # before 2.10
        from mindspore.common import api
    return api


def free_graphs(names: Sequence[str]) -> None:
    """Free graphs, by their names in MindSpore's cache, as ``ms.ms_memory_recycle`` does, and their functions."""
    api, chosen = graph_api(), set(names)
    api._cell_graph_executor.del_net_res(None, chosen)
    api.JitExecutor_.get_instance().del_net_res(None, chosen)
    api.ms_compile_cache.difference_update(chosen)
    if hasattr(api, "_get_func_args_info_cached"):  # of the last 4096 functions
        api._get_func_args_info_cached.cache_clear()


@functools.cache
def initialise_ranks() -> tuple[int, int]:
    """(rank, world size): (0, 1), or those of a process that msrun, mpirun or a rank table has launched. Call it after
    `set_device` and before the first Tensor. Raises UserError if the ranks cannot be connected."""
    sizes = (os.environ.get(name) for name in ("RANK_SIZE", "MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE"))
    if next((int(size) for size in sizes if size), 1) == 1:
        return 0, 1
    from mindspore import communication

    try:
        communication.init()
    except RuntimeError as e:
        first = str(e).splitlines()[0].strip()
        if "not successfully spawned" in first:  # MindSpore's words where a process did not reach the others in time
            port = os.environ.get("MS_SCHED_PORT", "of the scheduler")
            first = f"not all have started, or another program has port {port}: choose another with msrun --master_port"
        raise UserError(f"the ranks are not connected: {first}") from e
    return communication.get_rank(), communication.get_group_size()


CHUNK = 1 << 18  # numbers of 4 bytes that are broadcast at once
_alone = threading.local()


def ranks() -> tuple[int, int]:
    """(rank, world size) of a computation that the ranks share: (0, 1) `alone`."""
    return (0, 1) if getattr(_alone, "active", False) else initialise_ranks()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this context a rank computes for itself what the ranks would otherwise share."""
    before, _alone.active = getattr(_alone, "active", False), True
    try:
        yield
    finally:
        _alone.active = before


def gather(values: "np.ndarray") -> "np.ndarray":
    """The arrays of all ranks, (world size, *shape), the same on each rank. They have one shape, and numbers of 4 or 8
    bytes."""
    import numpy as np

    if ranks()[1] == 1:
        return values[None]
    bits = np.ascontiguousarray(values).reshape(-1).view(np.int32)  # a type that all devices gather
    return all_gather(bits).view(values.dtype).reshape(-1, *values.shape)


def all_gather(numbers: "np.ndarray") -> "np.ndarray":
    """MindSpore's operator: numbers (n,) int32 of each rank -> those of all, (world size * n,)."""
    from mindspore import Tensor, ops

    return ops.AllGather()(Tensor(numbers)).asnumpy()


def from_rank(root: int, numbers: "np.ndarray") -> "np.ndarray":
    """MindSpore's operator: numbers (n,) int32 of each rank -> those of rank `root`."""
    from mindspore import Tensor, ops

    return ops.Broadcast(root)((Tensor(numbers),))[0].asnumpy()


def broadcast(data: bytes, root: int = 0) -> bytes:
    """The bytes of rank `root`, on every rank."""
    import numpy as np

    rank, world_size = ranks()
    if world_size == 1:
        return data
    padded = np.frombuffer(data + bytes(-len(data) % 4), np.int32)
    size, rest = gather(np.array([len(padded), len(padded) * 4 - len(data)], np.int32))[root].tolist()
    parts = []
    for first in range(0, size, CHUNK):  # of one size, for which the operator is compiled once
        part = np.zeros(CHUNK, np.int32)
        if rank == root:
            part[: len(padded) - first] = padded[first : first + CHUNK]
        parts.append(from_rank(root, part).tobytes())
    return b"".join(parts)[: 4 * size - rest]


def several_ranks() -> bool:
    """Whether this process is connected to other ranks."""
    return bool(initialise_ranks.cache_info().currsize) and initialise_ranks()[1] > 1


def barrier() -> None:
    """Wait until all ranks are here; nothing with one rank, or where the ranks are not connected."""
    import numpy as np

    if several_ranks():
        gather(np.zeros(1, np.int32))


# How a program ends

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
STOP = threading.Event()  # set by the first of these signals after `defer_interrupts`
_deferred, _ready = threading.Event(), threading.Event()
_notice = ""
_ready.set()
_given_up = threading.local()


def catch_interrupts() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the process at once. After `defer_interrupts` the first one sets STOP instead, and
    a second Ctrl-C ends the process. A signal that was ignored, such as SIGHUP by nohup, still is. Call this before ``import
    mindspore``.

    A process that waits for another rank runs no handler, so all threads but one block the signals. For this one they are
    not caught at first: the system ends the process, even where MindSpore holds Python's lock for good. Later it waits for
    them. Once an operator has run, MindSpore has a handler of its own for SIGINT (2.7 to 2.10), which is undone. It sends
    SIGTERM to its own process when another rank has died; the work of this one can then not be completed."""
    ignored = {number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
    for number in SIGNALS - ignored:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _ready.clear()

    def watch():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        handler = ctypes.c_void_p(int(signal.SIG_IGN if signal.SIGINT in ignored else signal.SIG_DFL))
        while not _deferred.wait(0.5):
            ctypes.CDLL(None).signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _ready.set()
        asked = False
        while True:
            info = signal.sigwaitinfo(SIGNALS)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getpid() and several_ranks():
                print("error: another rank has ended, so this one ends too: see its log", file=sys.stderr, flush=True)
                os._exit(1)
            if info.si_signo in ignored:
                continue
            if asked and info.si_signo == signal.SIGINT:
                os._exit(130)
            if not asked:
                say(_notice)  # before STOP, which may let the process end at once
            asked = True
            STOP.set()

    threading.Thread(target=watch, daemon=True).start()


def defer_interrupts(notice: str = "stopping as soon as the run is saved; Ctrl-C ends at once, without saving") -> None:
    """Let the signals of `catch_interrupts` set STOP from now on: the program looks at it and saves its work. `notice` is
    what they say."""
    global _notice
    _notice = notice
    _deferred.set()
    _ready.wait()


@contextlib.contextmanager
def given_up(when: Callable[[], bool]) -> Iterator[None]:
    """In this context `check_interrupted`, which long computations call, raises Interrupted once when() is true."""
    before, _given_up.when = getattr(_given_up, "when", None), when
    try:
        yield
    finally:
        _given_up.when = before


def check_interrupted() -> None:
    """Raise Interrupted if what this thread computes need not be finished."""
    if (when := getattr(_given_up, "when", None)) and when():
        raise Interrupted


# What a program prints


class Output(io.FileIO):
    """stdout or stderr. Once it cannot be written to, because its reader has ended or its disk is full, the whole process
    writes to /dev/null in its place, and `lost` says why: work of hours must not end for that."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                if (written := super().write(left)) is None:  # it does not block, and is full
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as e:
            self.lost = e
            open_null(self.fileno())
        return len(data)


def open_null(number: int) -> None:
    """Let a descriptor be /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def open_streams() -> None:
    """Let the program print whatever its streams are: closed, broken, or of an encoding that lacks characters, which are
    then written as backslash escapes. A closed descriptor becomes /dev/null, or the next file would get its number and the
    program's messages."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            open_null(number)
        stream = getattr(sys, name)
        if name != "stdin" and (stream is None or stream is getattr(sys, f"__{name}__")):  # else a notebook's or a test's
            raw, through = Output(number, "wb", closefd=False), getattr(stream, "write_through", False)
            options = {"line_buffering": number == 2 or raw.isatty(), "write_through": through}
            buffer: Any = raw if through else io.BufferedWriter(raw)
            encoding = getattr(stream, "encoding", "utf-8")
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors="backslashreplace", **options))


def check_stdout() -> None:
    """Raise OSError if what was printed could not be written, unless nobody reads it any more."""
    sys.stdout.flush()
    buffer: Any = getattr(sys.stdout, "buffer", None)
    lost = getattr(getattr(buffer, "raw", buffer), "lost", None)
    if lost and lost.errno != errno.EPIPE:
        raise OSError(lost.errno, lost.strerror, "stdout")


def progress_bars() -> Any:
    """The class of the progress bars, if it was imported."""
    return getattr(sys.modules.get(f"{__package__}.progress"), "ProgressBar", None)


def say(text: str) -> None:
    """Print a line on stderr, above a progress bar if there is one."""
    with contextlib.suppress(OSError):
        if bars := progress_bars():
            bars.write(one_line(text), file=sys.stderr)
        else:
            print(one_line(text), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """The text with everything that a terminal would not show as it is, such as a newline in a file's name, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


SPACE = ": free some space, then run the same command again"
PATH = ": choose another path"
HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), SPACE)
HINTS |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), PATH)
HINTS |= dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY, errno.EXDEV), PATH)
HINTS |= {errno.ENOENT: ": check the path, and that nothing has removed it"}
HINTS |= dict.fromkeys((errno.EMFILE, errno.ENFILE), ": allow more open files by ulimit -n")
HINTS |= dict.fromkeys((errno.ENOMEM, errno.EAGAIN), ": end other programs, or raise the limits of this one (ulimit -a)")
OTHER = ": check the disk or the network, then run the same command again"
NO_MEMORY = re.compile(
    r"memory (?:is not|isn't|not) enough|out of memory|bad_alloc|std::length_error|cannot allocate memory"
    r"|alloc\w* .*\bmem\w* .*fail|(?:alloc\w*|malloc) (?:\w+ )*mem\w* failed",
    re.IGNORECASE,
)


NO_THREADS = re.compile("resource temporarily unavailable|can't start new thread", re.IGNORECASE)


def describe(e: Exception) -> str | None:
    """What is wrong with the input or the machine, and what to do; None for a fault of the program."""
    if isinstance(e, UserError):
        return str(e)
    if isinstance(e, OSError):
        path = e.filename2 or e.filename
        is_named = isinstance(path, str | bytes) and e.strerror
        return (f"{os.fsdecode(path)}: {e.strerror}" if is_named else str(e)) + HINTS.get(e.errno or 0, OTHER)
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and NO_MEMORY.search(str(e))):
        return "there is not enough memory: use smaller batches, images or networks, or end other programs"
    if isinstance(e, RuntimeError) and NO_THREADS.search(str(e)):
        return "no more threads can be started: raise the limits (ulimit -u, -v), or end other programs"
    if isinstance(e, UnicodeError) or (isinstance(e, ValueError) and "null byte" in str(e)):
        return f"a name or a text has characters that cannot be used: {e}"
    return None


def run_program(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """The exit code of main(argv). Bad input and trouble with files or memory give one line and code 2, or a traceback with
    --debug.

    Several ranks end together: a launcher ends the others as soon as one has an exit code other than 0. Without a launcher
    MindSpore's scheduler does so, but not if a process signs off; one that fails therefore ends without that."""
    open_streams()
    try:
        code = main(list(argv))
        barrier()  # until rank 0 has written and uploaded everything
        if not _deferred.is_set():  # else there is a run, whether its log is there or not
            check_stdout()
        return code
    except Exception as e:
        text = describe(e)
        for bar in list(getattr(progress_bars(), "_instances", ())):
            bar.close()  # else the message would stand in its line
        is_known = text is not None and "--debug" not in argv
        if is_known:
            say(f"error: {text}")
        if several_ranks():
            if not is_known:
                traceback.print_exc()
            os._exit(2 if is_known else 1)
        if not is_known:
            raise
        return 2
