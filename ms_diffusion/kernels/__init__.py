"""Own CPU kernels for what MindSpore's run slowly: convolution, linear layers, norms, linear attention; float32.

`kernels.cc` is compiled on first use with the machine's C++ compiler ($CXX, c++, g++ or clang++) and kept in
~/.cache/ms_diffusion/kernels, one library for each source, CPU and MindSpore version. Without a compiler, or with
MS_DIFFUSION_KERNELS=off, `available()` is False and the layers use MindSpore's operators. `models/layers.py`,
`models/attention.py` and `training.py` choose; nothing else knows of this package.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops.signature import make_sig, sig_rw

SOURCE = Path(__file__).with_name("kernels.cc")
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
FLAGS += ["-shared", "-fPIC", "-pthread"]


def _cpu() -> str:
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def _works(library: Path) -> bool:
    """Whether the library loads here and its SiLU of (1,) is right: another process tries, for a spoilt file can kill it."""
    code = (
        "import ctypes, sys; import numpy as np; x = np.ones(1, np.float32); y = x * 0\n"
        "data = (ctypes.c_void_p * 2)(x.ctypes.data, y.ctypes.data); one = (ctypes.c_int64 * 1)(1)\n"
        "shapes = (ctypes.POINTER(ctypes.c_int64) * 2)(one, one); ndims = (ctypes.c_int * 2)(1, 1)\n"
        "types = (ctypes.c_char_p * 2)(b'float32', b'float32')\n"
        "rc = ctypes.CDLL(sys.argv[1]).silu(2, data, ndims, shapes, types, None, None)\n"
        "sys.exit(rc or int(abs(y[0] - 0.7310586) > 1e-6))"
    )
    return subprocess.run([sys.executable, "-c", code, library], capture_output=True).returncode == 0


@functools.cache
def library() -> str | None:
    """The path of the compiled library, or None, with one line on stderr, where it cannot be had."""
    if os.environ.get("MS_DIFFUSION_KERNELS") == "off":
        return None
    compiler = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)
    key = hashlib.sha256("".join([SOURCE.read_text(), *FLAGS, _cpu(), ms.__version__]).encode()).hexdigest()[:16]
    path = Path.home() / ".cache" / "ms_diffusion" / "kernels" / f"{key}.so"
    problem = "no C++ compiler was found (g++ or clang++)"
    try:
        if path.exists() and _works(path):
            return str(path)
        if compiler:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                new = Path(folder) / path.name
                build = subprocess.run([compiler, *FLAGS, SOURCE, "-o", new], capture_output=True, text=True)
                problem = f"{compiler} failed: {(build.stderr.strip() or 'no message').splitlines()[0]}"
                if build.returncode == 0:
                    problem = f"the library that {compiler} made does not run here"
                    if _works(new):
                        os.replace(new, path)
                        return str(path)
    except OSError as e:
        problem = str(e)
    print(f"note: training on the CPU will be several times slower: {problem}", file=sys.stderr)
    return None


def available() -> bool:
    """Whether the layers shall use these kernels: MindSpore runs on the CPU and the library is there."""
    return ms.get_context("device_target") == "CPU" and library() is not None


def adam_available() -> bool:
    """Whether training shall use `adam`: MindSpore 2.7 hands it copies of parameters that other operators of ours read, and
    nothing would be trained; 2.10 hands it the parameters. Those between were not tried."""
    return available() and tuple(map(int, ms.__version__.split(".")[:2])) >= (2, 10)


class Operator(ops.Custom):
    """An operator of the library; `out_shape` and `out_dtype` (the former's by default) take the inputs'.

    The library trusts what it is given, so shapes and types are checked here.
    """

    def __init__(self, name: str, out_shape, out_dtype=None):
        def checked(*types):
            if "float32" not in repr(types[0]).lower():
                raise TypeError(f"the CPU kernel {name} takes float32, not {types[0]}")
            return (out_dtype or out_shape)(*types)

        super().__init__(f"{library()}:{name}", out_shape, checked, "aot")

    def __deepcopy__(self, memo):  # ops.Custom's own fails (MindSpore 2.10); an operator has no state
        return self


def output_shape(x, weight, stride: int, padding: int, groups: int = 1, transposed: bool = False):
    """Of a convolution of x (B, C, H, W), all as lists.

    Raises:
        ValueError: the channels do not fit or the kernel is larger than the padded input.
    """
    out, channels = (weight[1], weight[0]) if transposed else (weight[0], weight[1] * groups)
    if len(x) != 4 or x[1] != channels:
        raise ValueError(f"a convolution of {channels} channels cannot take an input of shape {tuple(x)}: (B, C, H, W)")
    if transposed:
        size = [(n - 1) * stride - 2 * padding + weight[2] for n in x[2:]]
    else:
        size = [(n + 2 * padding - weight[2]) // stride + 1 for n in x[2:]]
    if min(size) < 1:
        raise ValueError(f"a kernel of {weight[2]} with padding {padding} does not fit an input of shape {tuple(x)}")
    return [x[0], out, *size]


def norm_shape(x, weight, *_):
    """Of a GroupNorm of x (B, C, H, W).

    Raises:
        ValueError: the channels do not fit.
    """
    if len(x) != 4 or list(weight) not in ([x[1]], list(x[:2])):
        raise ValueError(f"a GroupNorm of {weight[-1]} channels cannot take an input of shape {tuple(x)}: (B, C, H, W)")
    return x


class Convolution(nn.Cell):
    """(x, weight, bias) -> convolution, or its transpose."""

    def __init__(self, stride: int, padding: int, groups: int, transposed: bool = False):
        super().__init__()
        self.settings = Tensor([stride, padding, groups, False], ms.int32)
        name = "conv_transpose" if transposed else "conv"

        def shape(x, w, b, settings):
            return output_shape(x, w, stride, padding, groups, transposed)

        self.forward = Operator(name, shape, lambda x, w, b, s: x)
        # PyNative would take the shape that it found for an equal operator on equal inputs (MindSpore 2.10)
        self.forward.add_prim_attr("settings", f"{stride} {padding} {groups}")
        out = 1 if transposed else 0  # the axis of the weight that holds the outputs
        self.gradient = Operator(f"{name}_gradient", lambda dy, x, w, s: (x, w, [w[out]]), lambda dy, x, w, s: (x, w, w))

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, x, weight, self.settings)


class NormConvolution(nn.Cell):
    """(x, norm's weight, bias and settings, weight, bias) -> convolution of the normalised x, which is not kept for the
    gradient but computed again: it takes little time and a quarter of the memory of training."""

    def __init__(self, stride: int, padding: int, groups: int):
        super().__init__()
        self.settings = Tensor([stride, padding, groups], ms.int32)

        def shape(x, g, h, n, w, b, settings):
            return output_shape(norm_shape(x, g), w, stride, padding, groups)

        self.forward = Operator("norm_conv", shape, lambda x, g, h, n, w, b, s: x)
        self.forward.add_prim_attr("settings", f"{stride} {padding} {groups}")
        self.gradient = Operator(
            "norm_conv_gradient",
            lambda dy, x, g, h, n, w, s: (x, g, h, w, w[:1]),
            lambda dy, x, g, h, n, w, s: (x, g, h, w, w),
        )

    def construct(self, x, norm_weight, norm_bias, norm_settings, weight, bias):
        return self.forward(x, norm_weight, norm_bias, norm_settings, weight, bias, self.settings)

    def bprop(self, x, norm_weight, norm_bias, norm_settings, weight, bias, out, dout):
        dx, dg, dh, dw, db = self.gradient(dout, x, norm_weight, norm_bias, norm_settings, weight, self.settings)
        return dx, dg, dh, ops.zeros_like(norm_settings), dw, db


def freeze(net: nn.Cell) -> None:
    """Spare the gradients of the weights of `net`'s convolutions, before it is compiled: they become 0."""
    for _, cell in net.cells_and_names():
        if isinstance(cell, Convolution):
            cell.settings = Tensor([*cell.settings.asnumpy()[:3], True], ms.int32)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with square kernels, the same padding on all sides and pad_mode "pad"."""

    def __init__(self, c_in, c_out, kernel, stride, padding, group, has_bias):
        super().__init__(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, group=group, has_bias=has_bias)
        self.convolution, self.in_float32 = Convolution(stride, padding, group), True
        self.norm_convolution = NormConvolution(stride, padding, group)
        if not has_bias:
            self.zeros = Tensor(np.zeros(c_out, np.float32))

    def construct(self, x, norm_weight=None, norm_bias=None, norm_settings=None):
        """The convolution of x, or of GroupNorm(x)."""
        if not self.in_float32:
            return super().construct(x)
        bias = self.bias if self.has_bias else self.zeros
        if norm_weight is not None:
            return self.norm_convolution(x, norm_weight, norm_bias, norm_settings, self.weight, bias)
        return self.convolution(x, self.weight, bias)


class Conv2dTranspose(nn.Conv2dTranspose):
    def __init__(self, c_in, c_out, kernel, stride, padding):
        super().__init__(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, has_bias=True)
        self.convolution, self.in_float32 = Convolution(stride, padding, 1, transposed=True), True

    def construct(self, x):
        return self.convolution(x, self.weight, self.bias) if self.in_float32 else super().construct(x)


class GroupNorm(nn.Cell):
    """(x, weight, bias) -> ``ops.group_norm``, of GELU(x) or with SiLU after it if `activation` says so."""

    def __init__(self, groups: int, eps: float, activation: str | None = None):
        super().__init__()
        kinds = {None: 0, "gelu-before": 1, "silu-after": 2}
        self.settings = Tensor(np.array([groups, eps, kinds[activation]], np.float32))
        self.forward = Operator("group_norm", norm_shape, lambda x, w, b, s: x)
        self.gradient = Operator("group_norm_gradient", lambda dy, x, w, b, s: (x, w, b))

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, x, weight, bias, self.settings)


class Activation(nn.Cell):
    """x -> "gelu" (by the error function) or "silu" of it."""

    def __init__(self, name: str):
        super().__init__()
        self.forward = Operator(name, lambda x: x)
        self.gradient = Operator(f"{name}_gradient", lambda x, dy: x)

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.gradient(x, dout),)


class Linear(nn.Cell):
    """(x (n, c), weight (o, c), bias (o), more (n, o) or None) -> f(x) weight^T + bias + more, f the `activation` before."""

    def __init__(self, activation: str | None = None):
        super().__init__()
        self.settings = Tensor([(None, "relu", "silu").index(activation)], ms.int32)

        def shape(x, w, bias, *more_and_settings):
            if len(x) != 2 or x[1] != w[1]:
                raise ValueError(f"a linear layer of {w[1]} inputs cannot take an input of shape {tuple(x)}: (B, {w[1]})")
            y = [x[0], w[0]]
            if bias != w[:1] or any(more != y for more in more_and_settings[:-1]):
                raise ValueError(f"a linear layer's bias must be of shape ({w[0]},), and what it adds of shape {tuple(y)}")
            return y

        self.forward = Operator("linear", shape, lambda x, *_: x)
        self.gradient = Operator("linear_gradient", lambda dy, x, w, s: (x, w, w[:1]), lambda dy, x, w, s: (x, w, w))

    def construct(self, x, weight, bias, more):
        if more is None:
            return self.forward(x, weight, bias, self.settings)
        return self.forward(x, weight, bias, more, self.settings)

    def bprop(self, x, weight, bias, more, out, dout):
        return (*self.gradient(dout, x, weight, self.settings), dout)


class LinearAttention(nn.Cell):
    """qkv (B, 3 h d, H, W) -> (B, h d, H, W)."""

    def __init__(self, heads: int):
        super().__init__()
        self.settings = Tensor([heads], ms.int32)

        def shape(x, settings):
            if len(x) != 4 or x[1] % (3 * heads):
                raise ValueError(f"{heads} heads cannot share an input of shape {tuple(x)}: (B, 3 heads d, H, W)")
            return [x[0], x[1] // 3, x[2], x[3]]

        self.forward = Operator("linear_attention", shape, lambda x, s: x)
        self.gradient = Operator("linear_attention_gradient", lambda dy, x, s: x)

    def construct(self, qkv):
        return self.forward(qkv, self.settings)

    def bprop(self, qkv, out, dout):
        return (self.gradient(dout, qkv, self.settings),)


def adam(optimizer: nn.Adam, clip_norm: float, ema=None):
    """update(gradients) -> their norm (): clip it at `clip_norm`, then `nn.Adam`'s step, then the `EMA`'s.

    One operator for what takes MindSpore ten for each parameter. It changes its inputs in place and says so: beside another
    operator that does, such as a batch norm in training, it would otherwise be given copies.
    """
    averages = ema.averages if ema is not None else ()
    constants = [len(optimizer.parameters), optimizer.beta1, optimizer.beta2, optimizer.eps, clip_norm]
    constants = Tensor(np.array([float(c) for c in constants], np.float32))
    operator = Operator("adam", lambda *inputs: (), lambda *inputs: inputs[0])
    parameters, moments = optimizer.parameters, optimizer.moment1 + optimizer.moment2
    n = len(parameters)
    written = [False] * 3 + [True] * (3 + 3 * n) + [False] * n + [True] * len(averages)
    operator.set_signatures([make_sig(f"x{i}", sig_rw.RW_WRITE if w else sig_rw.RW_READ) for i, w in enumerate(written)])
    operator.add_prim_attr("side_effect_mem", True)
    step, schedule = optimizer.global_step, optimizer.learning_rate
    powers = (optimizer.beta1_power, optimizer.beta2_power)

    def update(gradients):
        n = ops.cast(step, ms.float32) + 1  # (1,)
        decay = ema.decay_after(n) if ema is not None else n
        lr = schedule(step).reshape(1)
        return operator(constants, lr, decay, *powers, step, *parameters, *moments, *gradients, *averages)

    return update
