"""The library's own CPU kernels for what MindSpore's run slowly: convolution, linear layers, norms, attention, Adam.

All are float32. `kernels.cc` and its headers are compiled on first use with the machine's C++ compiler ($CXX, c++, g++ or
clang++). The library is kept in the `kernels` folder of `files.cache_folder()`, one file for each source, CPU and MindSpore
version, whose name holds its SHA-256. It is loaded only from a folder that no other user could have written to. Without a
compiler, or with MS_DIFFUSION_KERNELS=off, `available()` is False and the layers use MindSpore's operators. Only
`models/layers.py`, `models/attention.py` and `training/step.py` use them.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops.signature import make_sig, sig_rw

from ..files import cache_folder, private_folder, process_folder, remove, sweep, temporary_path, user_cache
from ..runtime import allow_numpy_2, cgroups

allow_numpy_2()

# MindSpore's C++ sets OMP_NUM_THREADS=1, which looks like the user's choice in a child process. This mark tells the child.
MARK = "MS_DIFFUSION_OMP_NUM_THREADS_NOT_SET"
OMP_FROM_MINDSPORE = MARK in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
if "OMP_NUM_THREADS" not in os.environ:
    os.environ[MARK] = "1"

SOURCES = [Path(__file__).with_name("kernels.cc"), *sorted(Path(__file__).parent.glob("*.h"))]
FLAGS = "-O3 -march=native -std=c++17 -fopenmp-simd -ffp-contract=fast -fno-math-errno -fno-trapping-math".split()
FLAGS += "-fvisibility=hidden -shared -fPIC -pthread".split()
SUPERVISOR = str(Path(__file__).with_name("supervise.py"))
COMPILER_SECONDS, TRIAL_SECONDS = 180, 60  # they take 3 and 0.05


def _cpu() -> str:
    """Text that changes with the CPU features that -march=native uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(sorted({a for a in lines if a.startswith(("flags", "Features", "model name"))}))


def cpu_quota(groups: str, mount: Path) -> float:
    """CPUs that cgroups (v1 or v2) allow the process; infinity without a quota.

    `groups` is the text of /proc/self/cgroup. The smallest quota of the process's groups and of those above them applies."""
    quota = math.inf
    for group, is_v1 in cgroups("cpu", groups, mount):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            limit, period = map(int, " ".join((group / name).read_text() for name in names).split())
            quota = min(quota, limit / period) if limit > 0 else quota
    return quota


def thread_count() -> int:
    """Threads of the kernels: the smallest of the CPUs in the affinity mask, the cgroup CPU quota rounded up, and
    OMP_NUM_THREADS (its first number) where the user has set it."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = Path("/proc/self/cgroup")
    quota = cpu_quota(groups.read_text() if groups.exists() else "", Path("/sys/fs/cgroup"))
    wanted = "" if OMP_FROM_MINDSPORE else os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return math.ceil(min(affinity, quota, int(wanted) if wanted.isdigit() and int(wanted) else math.inf))


def _run(command: list, seconds: float, folder: Path) -> str | None:
    """None if a program succeeds, else the first line of what it says. Its temporary files are in `folder`. It ends with
    this process, and after `seconds` (`supervise.py`)."""
    supervisor = [sys.executable, "-I", "-S", SUPERVISOR, str(seconds), *map(str, command)]
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
    pipe = subprocess.PIPE
    with subprocess.Popen(supervisor, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        text = process.stderr.read(4096).decode(errors="replace")
        process.stderr.close()  # there may be no end of it
        done = process.stdout.read() == b"done\n"
    line = next(filter(None, map(str.strip, text.splitlines())), "no message")[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in line) if not done else None


def _works(library: Path, folder: Path) -> bool:
    """Whether the library loads here and its SiLU of 1 is right. Another process tries it, since it could be killed."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).self_test())"
    return _run([sys.executable, "-I", "-S", "-c", code, library], TRIAL_SECONDS, folder) is None


def _folder(place: Path) -> Path:
    """The private folder for libraries there. Raises OSError if it cannot be one."""
    folder = private_folder(place / "kernels")
    if ":" in str(folder):
        raise OSError(errno.EINVAL, "MindSpore takes no path with a colon", str(folder))
    return folder


def _find(folder: Path, key: str) -> Path | None:
    """The library of this key in a private folder. A file is one only if it is the user's own and not changed since it was
    built: its name ends in its SHA-256. Others are deleted. Nothing else is ever loaded, not even for a trial."""
    sweep(folder)
    for path in folder.glob(f"{key}-*.so"):
        found = path.lstat()
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        if own and path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}" and _works(path, folder):
            return path
        remove(path)
    return None


def _build() -> Path:
    """The compiled library. Raises OSError if there is no compiler, it fails, the library does not run, or it cannot be
    written to a folder that is safe from other users."""
    text = "".join([*(source.read_text() for source in SOURCES), *FLAGS, _cpu(), ms.__version__])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        if found := _find(_folder(user_cache()), key):
            return found
    compiler = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)
    if not compiler:
        raise OSError("no C++ compiler was found (g++ or clang++)")
    try:
        folder = _folder(cache_folder())
    except OSError as e:
        folder = _folder(process_folder(str(e)))
    scratch = private_folder(temporary_path(folder / "build"))
    try:
        new = scratch / "new.so"
        if problem := _run([compiler, *FLAGS, SOURCES[0], "-o", new], COMPILER_SECONDS, scratch):
            raise OSError(f"{compiler} failed: {problem}")
        if not _works(new, scratch):
            raise OSError(f"the library that {compiler} made does not run here")
        new.chmod(0o700)
        path = folder / f"{key}-{hashlib.sha256(new.read_bytes()).hexdigest()}.so"
        os.replace(new, path)
        return path
    finally:
        remove(scratch)


@functools.cache
def library() -> str | None:
    """The path of the compiled library, or None, with one line on stderr, where it cannot be built."""
    if os.environ.get("MS_DIFFUSION_KERNELS") == "off":
        return None
    try:
        path = str(_build())
        ctypes.CDLL(path).set_threads(thread_count())
        return path
    except OSError as e:
        print(f"note: training on the CPU will be several times slower: {e}", file=sys.stderr)
        return None


DISABLED: list[bool] = []  # one entry for each `disabled` block that runs


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Layers that are made within the block use MindSpore's operators alone, for graphs that leave this process."""
    DISABLED.append(True)
    try:
        yield
    finally:
        DISABLED.pop()


def available() -> bool:
    """Whether the layers use these kernels: MindSpore runs on the CPU and the library could be built."""
    return not DISABLED and ms.get_context("device_target") == "CPU" and library() is not None


def adam_available() -> bool:
    """Whether training uses `adam`. MindSpore 2.7 passes it copies of the parameters that other operators of this package
    read, so nothing would be trained; 2.10 passes the parameters themselves. The versions between were not tried."""
    return available() and tuple(map(int, ms.__version__.split(".")[:2])) >= (2, 10)


class Operator(ops.Custom):
    """An operator of the library with `outputs` float32 outputs. `out_shape` maps the shapes of the inputs to those of the
    outputs, and checks them, since the library does not. Raises TypeError if the first input is not float32."""

    def __init__(self, name: str, out_shape: Callable, outputs: int = 1):
        def out_dtype(*types):
            if "float32" not in repr(types[0]).lower():
                raise TypeError(f"the CPU kernel {name} takes float32, not {types[0]}")
            return types[0] if outputs == 1 else types[:1] * outputs

        super().__init__(f"{library()}:{name}", out_shape, out_dtype, "aot")

    def __deepcopy__(self, memo):  # ops.Custom's own fails (MindSpore 2.10); an operator has no state
        return self


def output_shape(x: list, weight: list, stride: int, padding: int, groups: int = 1, transposed: bool = False) -> list:
    """The output shape of a convolution of x (B, C, H, W); x and weight are shapes. Raises ValueError if the channels differ
    or the kernel is larger than the padded input."""
    out, channels = (weight[1], weight[0]) if transposed else (weight[0], weight[1] * groups)
    if len(x) != 4 or x[1] != channels:
        raise ValueError(f"a convolution of {channels} channels takes an input (B, C, H, W), not one of shape {tuple(x)}")
    k, p = weight[2], 2 * padding
    size = [(n - 1) * stride - p + k if transposed else (n + p - k) // stride + 1 for n in x[2:]]
    if min(size) < 1:
        raise ValueError(f"a kernel of {k} with padding {padding} does not fit an input of shape {tuple(x)}")
    return [x[0], out, *size]


def norm_shape(x: list, weight: list, *_) -> list:
    """The output shape of a GroupNorm of x (B, C, H, W); x, weight are shapes. Raises ValueError if the channels differ."""
    if len(x) != 4 or list(weight) not in ([x[1]], list(x[:2])):
        raise ValueError(f"a GroupNorm of {weight[-1]} channels takes an input (B, C, H, W), not one of shape {tuple(x)}")
    return x


class Convolution(nn.Cell):
    """(x, weight, bias) -> convolution, or transposed convolution."""

    def __init__(self, stride: int, padding: int, groups: int, transposed: bool = False):
        super().__init__()
        self.settings = Tensor([stride, padding, groups, False], ms.int32)
        name, out = ("conv_transpose", 1) if transposed else ("conv", 0)  # out: the weight's axis of output channels
        self.forward = Operator(name, lambda x, w, b, s: output_shape(x, w, stride, padding, groups, transposed))
        # Without an attribute, PyNative reuses the output shape of another stride or padding (MindSpore 2.10).
        self.forward.add_prim_attr("settings", f"{stride} {padding} {groups}")
        self.gradient = Operator(f"{name}_gradient", lambda dy, x, w, s: (x, w, [w[out]]), 3)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, x, weight, self.settings)


class NormConvolution(nn.Cell):
    """(x, norm's weight, bias and settings, weight, bias) -> convolution of the normalised x.

    The gradient computes the normalised x again instead of keeping it: that takes little time and saves a quarter of the
    memory of training."""

    def __init__(self, stride: int, padding: int, groups: int):
        super().__init__()
        self.settings = Tensor([stride, padding, groups], ms.int32)
        shape = functools.partial(output_shape, stride=stride, padding=padding, groups=groups)
        self.forward = Operator("norm_conv", lambda x, g, h, n, w, b, s: shape(norm_shape(x, g), w))
        self.forward.add_prim_attr("settings", f"{stride} {padding} {groups}")
        self.gradient = Operator("norm_conv_gradient", lambda dy, x, g, h, n, w, s: (x, g, h, w, w[:1]), 5)

    def construct(self, x: Tensor, norm_weight, norm_bias, norm_settings, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, norm_weight, norm_bias, norm_settings, weight, bias, self.settings)

    def bprop(self, x, norm_weight, norm_bias, norm_settings, weight, bias, out, dout):
        dx, dg, dh, dw, db = self.gradient(dout, x, norm_weight, norm_bias, norm_settings, weight, self.settings)
        return dx, dg, dh, ops.zeros_like(norm_settings), dw, db


def freeze(net: nn.Cell) -> None:
    """Make the gradients of the weights of `net`'s convolutions 0, which saves time. Call it before `net` is compiled."""
    for _, cell in net.cells_and_names():
        if isinstance(cell, Convolution):
            cell.settings = Tensor([*cell.settings.asnumpy()[:3], True], ms.int32)


class GroupNorm(nn.Cell):
    """(x, weight, bias) -> ``ops.group_norm``; `activation`: "gelu-before" (of x) or "silu-after" (of the result)."""

    def __init__(self, groups: int, eps: float, activation: str | None = None):
        super().__init__()
        kind = (None, "gelu-before", "silu-after").index(activation)
        self.settings = Tensor(np.array([groups, eps, kind], np.float32))
        self.forward = Operator("group_norm", norm_shape)
        self.gradient = Operator("group_norm_gradient", lambda dy, x, w, b, s: (x, w, b), 3)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, x, weight, bias, self.settings)


class Activation(nn.Cell):
    """x -> "gelu" (with the error function) or "silu" of x."""

    def __init__(self, name: str):
        super().__init__()
        self.forward = Operator(name, lambda x: x)
        self.gradient = Operator(f"{name}_gradient", lambda x, dy: x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.gradient(x, dout),)


class Linear(nn.Cell):
    """(x (n, c), weight (o, c), bias (o), residual (n, o) or None) -> f(x) weight^T + bias + residual; `activation` is f."""

    def __init__(self, activation: str | None = None):
        super().__init__()
        self.settings = Tensor([(None, "relu", "silu", "gelu-tanh").index(activation)], ms.int32)

        def shape(x, w, bias, *rest):
            if len(x) != 2 or x[1] != w[1]:
                raise ValueError(f"a linear layer of {w[1]} inputs takes an input (B, {w[1]}), not one of shape {tuple(x)}")
            y = [x[0], w[0]]
            if bias != w[:1] or any(residual != y for residual in rest[:-1]):
                raise ValueError(f"a linear layer's bias must have the shape ({w[0]},) and its residual {tuple(y)}")
            return y

        self.forward = Operator("linear", shape)
        self.gradient = Operator("linear_gradient", lambda dy, x, w, s: (x, w, w[:1]), 3)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return self.forward(x, weight, bias, self.settings)
        return self.forward(x, weight, bias, residual, self.settings)

    def bprop(self, x, weight, bias, residual, out, dout):
        return (*self.gradient(dout, x, weight, self.settings), dout)


class LinearAttention(nn.Cell):
    """qkv (B, 3 heads d, H, W) -> (B, heads d, H, W)."""

    def __init__(self, heads: int):
        super().__init__()
        self.settings = Tensor([heads], ms.int32)

        def shape(x, settings):
            if len(x) != 4 or x[1] % (3 * heads):
                raise ValueError(
                    f"attention of {heads} heads takes an input (B, 3 heads d, H, W), not one of shape {tuple(x)}"
                )
            return [x[0], x[1] // 3, x[2], x[3]]

        self.forward = Operator("linear_attention", shape)
        self.gradient = Operator("linear_attention_gradient", lambda dy, x, s: x)

    def construct(self, qkv: Tensor) -> Tensor:
        return self.forward(qkv, self.settings)

    def bprop(self, qkv, out, dout):
        return (self.gradient(dout, qkv, self.settings),)


class Attention(nn.Cell):
    """qkv (B, N, 3 heads d), in the order (q k v, head, d) -> softmax attention of each image (B, N, heads d). The gradient
    computes the weights (N, N) again instead of keeping them."""

    def __init__(self, heads: int):
        super().__init__()
        self.settings = Tensor([heads], ms.int32)

        def shape(x, settings):
            if len(x) != 3 or x[2] % (3 * heads):
                raise ValueError(f"attention of {heads} heads takes an input (B, N, 3 heads d), not one of shape {tuple(x)}")
            return [*x[:2], x[2] // 3]

        self.forward = Operator("attention", shape)
        self.gradient = Operator("attention_gradient", lambda dy, x, s: x)

    def construct(self, qkv: Tensor) -> Tensor:
        return self.forward(qkv, self.settings)

    def bprop(self, qkv, out, dout):
        return (self.gradient(dout, qkv, self.settings),)


def rows_shape(x: list, *per_image: list) -> list:
    """The shape of x (B N, d), which must fit shapes (B, d)."""
    for each in per_image:
        if len(x) != 2 or len(each) != 2 or each[1] != x[1] or each != per_image[0] or x[0] % max(each[0], 1):
            raise ValueError(f"rows of shape {tuple(x)} do not fit what is given for each image, {tuple(each)}")
    return x


class AdaLayerNorm(nn.Cell):
    """(x (B N, d), scale (B, d), shift (B, d)) -> layer norm of x times (1 + scale), plus shift."""

    def __init__(self, eps: float):
        super().__init__()
        self.settings = Tensor([eps], ms.float32)
        self.forward = Operator("ada_norm", lambda x, a, b, s: rows_shape(x, a, b))
        self.gradient = Operator("ada_norm_gradient", lambda dy, x, a, s: (x, a, a), 3)

    def construct(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.forward(x, scale, shift, self.settings)

    def bprop(self, x, scale, shift, out, dout):
        return self.gradient(dout, x, scale, self.settings)


class GatedSum(nn.Cell):
    """(x (B N, d), y (B N, d), gate (B, d)) -> x + gate y."""

    def __init__(self):
        super().__init__()

        def shape(x, y, gate):
            if x != y:
                raise ValueError(f"a sum takes numbers of one shape, not of {tuple(x)} and {tuple(y)}")
            return rows_shape(x, gate)

        self.forward = Operator("gated_sum", shape)
        self.gradient = Operator("gated_sum_gradient", lambda dy, y, gate: (y, gate), 2)

    def construct(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return self.forward(x, y, gate)

    def bprop(self, x, y, gate, out, dout):
        return (dout, *self.gradient(dout, y, gate))


def adam(optimizer: nn.Adam, clip_norm: float, ema=None, weight_decay: float = 0.0) -> Callable:
    """A function update(loss, gradients) -> the loss () and the gradients' norm (): it clips the norm at `clip_norm`, then
    decays the parameters with two or more axes, then takes `nn.Adam`'s step, then moves the averages of `ema`. Where the
    loss, the norm or the learning rate is not finite, it returns NaN and changes nothing.

    MindSpore needs ten operators for each parameter, this function one for all. The operator declares that it changes inputs
    in place: otherwise MindSpore passes it copies beside another such operator, for example a batch norm in training."""
    parameters, moments = optimizer.parameters, optimizer.moment1 + optimizer.moment2
    average_of = {} if ema is None else {id(p): a for p, a in zip(ema.sources, ema.averages, strict=True)}
    averages = [average_of[id(p)] for p in parameters if id(p) in average_of]  # a learned variance has none
    n, has_average = len(parameters), [float(id(p) in average_of) for p in parameters]
    constants = [float(c) for c in (n, optimizer.beta1, optimizer.beta2, optimizer.eps, clip_norm)]
    decays = [weight_decay * (p.ndim > 1) for p in parameters]
    constants = Tensor(np.array([*constants, *has_average, *decays], np.float32))
    operator = Operator("adam", lambda *inputs: ((), ()), 2)
    written = [False] * 4 + [True] * (3 + 3 * n) + [False] * n + [True] * len(averages)
    operator.set_signatures([make_sig(f"x{i}", sig_rw.RW_WRITE if w else sig_rw.RW_READ) for i, w in enumerate(written)])
    operator.add_prim_attr("side_effect_mem", True)
    step, schedule = optimizer.global_step, optimizer.learning_rate
    powers = (optimizer.beta1_power, optimizer.beta2_power)

    def update(loss, gradients):
        n = ops.cast(step, ms.float32) + 1  # (1,)
        decay = ema.decay_after(n) if ema is not None else n
        lr = schedule(step).reshape(1)
        return operator(constants, loss, lr, decay, *powers, step, *parameters, *moments, *gradients, *averages)

    return update
