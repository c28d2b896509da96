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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

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

DEVICES = ("auto", "ascend", "gpu", "cpu")
STOP = threading.Event()  # set by Ctrl-C or SIGTERM after `catch_interrupts`


class UserError(Exception):
    """Bad input. The message says in one line what is wrong and what to do; programs print it and exit with code 2."""


def command(name: str) -> str:
    """How a command of this package is called, in the way that the running program was called: "python train.py" in a clone,
    "python -m ms_diffusion train", or "ms-diffusion train"."""
    program = Path(sys.argv[0]).name
    if program in ("train.py", "sample.py") and name in ("train", "sample"):
        return f"python {name}.py"
    if program in ("train.py", "sample.py", "__main__.py"):
        return f"python -m ms_diffusion {name}"
    return f"ms-diffusion {name}"


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
            ms.set_device(kinds[name], None if name == "cpu" else card)
            return kinds[name]
    raise UserError(f"no {kinds[device]} device is usable here: check its driver, or run with --device auto or --device cpu")


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
    time, and MindSpore raises the error when the result is read (2.10 takes 3 s for it)."""
    import mindspore as ms
    from mindspore import Tensor, ops

    if ms.get_context("device_target") != "CPU":
        return ms.jit(fn)

    done = threading.Event()
    zero = Tensor(0, ms.int32)

    def set_done(x):
        done.set()
        return x

    notify = ops.Custom(set_done, out_shape=lambda x: x, out_dtype=lambda x: x, func_type="pyfunc")

    def announced(*args, **kwargs):
        out = fn(*args, **kwargs)
        return ops.depend(out, notify(ops.depend(zero, out)))

    graph = ms.jit(announced)

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


def initialise_ranks() -> tuple[int, int]:
    """(rank, world size): (0, 1), or those of a process that msrun or a rank table has launched."""
    if int(os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM") or 1) == 1:
        return 0, 1
    from mindspore import communication

    communication.init()
    return communication.get_rank(), communication.get_group_size()


def barrier() -> None:
    """Wait until all ranks are here; nothing with one rank."""
    if int(os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM") or 1) > 1:
        from mindspore import Tensor, ops

        ops.AllReduce()(Tensor([0.0])).asnumpy()


def catch_interrupts() -> None:
    """Let Ctrl-C and SIGTERM set STOP; a second Ctrl-C ends the process at once. Call this before ``import mindspore``.
    Once an operator has run, SIGINT kills a MindSpore process without KeyboardInterrupt (2.7 to 2.10), so the signal is
    blocked and a thread waits for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def watch():
        signal.sigwait({signal.SIGINT})
        STOP.set()
        signal.sigwait({signal.SIGINT})
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())


HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": free some space, then run the same command again")
HINTS |= dict.fromkeys((errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), ": choose another path")


def run_program(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """The exit code of main(argv). Bad input and a full disk give one line and code 2, or a traceback with --debug."""
    try:
        return main(list(argv))
    except (UserError, OSError) as e:
        hint = "" if isinstance(e, UserError) else HINTS.get(e.errno or 0)
        if hint is None or "--debug" in argv:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {e}{hint}", file=sys.stderr)
        return 2
