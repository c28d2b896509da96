"""The machine: device, compilation, ranks, interrupts, and how a program ends. The only file that knows a device's name.
Importing this module makes the settings that must precede ``import mindspore``. It imports MindSpore only when needed."""

import contextlib
import errno
import functools
import io
import os
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
STOP = threading.Event()  # set by Ctrl-C or SIGTERM after `catch_interrupts`


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


def available_memory() -> int:
    """Bytes of memory that this process may still take: the least of what the machine, the limit of its address space
    (ulimit -v) and its cgroup leave."""
    import resource

    page = resource.getpagesize()

    def numbers(path: str) -> list[int]:
        try:
            return [int(word) for word in Path(path).read_text().split() if word.isdecimal()]
        except OSError:
            return []

    def of_field(path: str, name: str) -> list[int]:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return []
        return [1024 * int(line.split()[1]) for line in lines if line.startswith(name)]

    left = of_field("/proc/meminfo", "MemAvailable:") or [1 << 62]
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], numbers("/proc/self/statm")[:1]
    if limit != resource.RLIM_INFINITY and used:
        left.append(limit - page * used[0])
    for most, current in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        found = numbers(f"/sys/fs/cgroup/{most}"), numbers(f"/sys/fs/cgroup/{current}")
        if all(found):
            left.append(found[0][0] - found[1][0])
    return max(min(left), 0)


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

    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(TypeError, SystemError, ImportError):
        Tensor([0.0]).reshape("")


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


def catch_interrupts() -> None:
    """Let Ctrl-C and SIGTERM set STOP; a second Ctrl-C ends the process at once. Call this before ``import mindspore``.

    Once an operator has run, SIGINT kills a MindSpore process without KeyboardInterrupt (2.7 to 2.10), and a process that
    waits for another rank runs no handler, so the signals are blocked and a thread waits for them. MindSpore sends SIGTERM
    to its own process when another rank has died; the work of this one can then not be completed."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def watch():
        interrupted = False
        while True:
            info = signal.sigwaitinfo(signals)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getpid() and several_ranks():
                print("error: another rank has ended, so this one ends too: see its log", file=sys.stderr, flush=True)
                os._exit(1)
            if interrupted and info.si_signo == signal.SIGINT:
                os._exit(130)
            interrupted = interrupted or info.si_signo == signal.SIGINT
            STOP.set()

    threading.Thread(target=watch, daemon=True).start()


HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": free some space, then run the same command again")
HINTS |= dict.fromkeys((errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), ": choose another path")


def run_program(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """The exit code of main(argv). Bad input and a full disk give one line and code 2, or a traceback with --debug.

    Several ranks end together: a launcher ends the others as soon as one has an exit code other than 0. Without a launcher
    MindSpore's scheduler does so, but not if a process signs off; one that fails therefore ends without that."""
    try:
        code = main(list(argv))
        barrier()  # until rank 0 has written and uploaded everything
        return code
    except Exception as e:
        hint = "" if isinstance(e, UserError) else HINTS.get(e.errno or 0) if isinstance(e, OSError) else None
        is_known = hint is not None and "--debug" not in argv
        if is_known:
            with contextlib.suppress(OSError):
                print(f"error: {e}{hint}", file=sys.stderr, flush=True)
        if several_ranks():
            if not is_known:
                traceback.print_exc()
            os._exit(2 if is_known else 1)
        if not is_known:
            raise
        return 2
