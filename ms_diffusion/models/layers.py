"""Building blocks with PyTorch's names, defaults and initialisation.

B, C, H, W: batch, channels, height, width. Every parameter is called ``weight`` or ``bias``, as in PyTorch. The path of a
parameter in the network is therefore its state-dict key, and weights move in both directions without a table of names.
"""

import math
from functools import partial

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.mint.nn import functional as F
from mindspore.ops.auto_generate import SplitWithSize

from .. import kernels
from ..files import check_memory
from ..randomness import Stream
from ..runtime import initialise_ranks, on_ascend

CONVOLUTIONS_AND_LINEAR = (nn.Conv2d, nn.Conv2dTranspose, nn.Dense)
Identity = nn.Identity  # x -> x

# On Ascend, mint's operators are one launch each, by aclnn, where those of ops and nn are several, or take the slower aclop.
# They exist on Ascend alone (MindSpore 2.10). In a graph the question is answered when it is compiled.
ascend = ops.constexpr(on_ascend)
split_with_size = SplitWithSize()
HAS_SPLIT = not ms.__version__.startswith("2.7.")  # on the CPU; there 2.7 has that operator outside graphs alone
# HyperMap loops over all tensors: with list comprehensions a training step compiled in 38 s instead of 5 (MindSpore 2.10).
each = ops.HyperMap()


def split(x: Tensor, sizes: tuple[int, ...], axis: int) -> tuple[Tensor, ...]:
    """Parts of x of these sizes along an axis."""
    return split_with_size(x, sizes, axis) if HAS_SPLIT or ascend() else ops.split(x, sizes, axis)


def chunk(x: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
    """`parts` equal parts of x along an axis."""
    size = x.shape[axis] // parts
    return split(x, (size,) * parts, axis) if ascend() else ops.split(x, size, axis)


def rows(table: Tensor, index: Tensor) -> Tensor:
    """The rows (B, dim) with indices (B,) int32 of a table (num, dim)."""
    return F.embedding(index, table) if ascend() else ops.gather(table, index, 0)


def read(parameter: Parameter, slot: tuple[nn.Cell] | None) -> Tensor:
    """The value of a layer's parameter: its own, or that in the buffer where it is trained (`training.pack.Slot`)."""
    return parameter if slot is None else slot[0](parameter)


def check_weights(*shape: int) -> None:
    """Raise UserError if a layer with weights of this shape cannot be trained in the memory that is free: it takes the
    weights, their gradients, two moments and an average."""
    check_memory(5 * 4 * math.prod(shape), f"a layer with weights {shape}")


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with square kernels, computed in `compute_type`: (B, c_in, H, W) -> (B, c_out, H', W')."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: int, groups: int, bias: bool):
        check_weights(c_out, c_in // groups, kernel, kernel)
        super().__init__(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, group=groups, has_bias=bias)
        self.compute_type = ms.float32
        self.weight_slot = self.bias_slot = self.kernel = self.norm_kernel = None
        if kernels.available():
            self.kernel = kernels.Convolution(stride, padding, groups)
            self.norm_kernel = kernels.NormConvolution(stride, padding, groups)
            self.zeros = Tensor(np.zeros(c_out, np.float32))

    def construct(self, x: Tensor, norm_weight=None, norm_bias=None, norm_settings=None) -> Tensor:
        """The convolution of x, or, by the CPU kernel, of GroupNorm(x)."""
        weight = read(self.weight, self.weight_slot)
        bias = read(self.bias, self.bias_slot) if self.has_bias else None
        if self.kernel is not None and self.compute_type == ms.float32:
            bias = self.zeros if bias is None else bias
            if norm_weight is not None:
                return self.norm_kernel(x, norm_weight, norm_bias, norm_settings, weight, bias)
            return self.kernel(x, weight, bias)
        x, weight = ops.cast(x, self.compute_type), ops.cast(weight, self.compute_type)
        bias = None if bias is None else ops.cast(bias, self.compute_type)
        if ascend():
            return F.conv2d(x, weight, bias, self.stride[0], self.padding, 1, self.group)
        x = self.conv2d(x, weight)
        return x if bias is None else ops.bias_add(x, bias)


def conv2d(c_in: int, c_out: int, kernel: int, stride=1, padding=0, groups=1, bias: bool = True) -> Conv2d:
    """``torch.nn.Conv2d``: (B, c_in, H, W) -> (B, c_out, H', W')."""
    return Conv2d(c_in, c_out, kernel, stride, padding, groups, bias)


class Conv2dTranspose(nn.Conv2dTranspose):
    """``torch.nn.ConvTranspose2d`` with square kernels and a bias, computed in `compute_type`."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: int):
        check_weights(c_in, c_out, kernel, kernel)
        super().__init__(c_in, c_out, kernel, stride, pad_mode="pad", padding=padding, has_bias=True)
        self.compute_type = ms.float32
        self.weight_slot = self.bias_slot = None
        self.border = kernel - 2 * padding
        self.kernel = kernels.Convolution(stride, padding, 1, transposed=True) if kernels.available() else None

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = read(self.weight, self.weight_slot), read(self.bias, self.bias_slot)
        if self.kernel is not None and self.compute_type == ms.float32:
            return self.kernel(x, weight, bias)
        x, weight = ops.cast(x, self.compute_type), ops.cast(weight, self.compute_type)
        bias, stride = ops.cast(bias, self.compute_type), self.stride[0]
        if ascend():
            return F.conv_transpose2d(x, weight, bias, stride, self.padding)
        b, _, height, width = x.shape
        size = (b, self.out_channels, (height - 1) * stride + self.border, (width - 1) * stride + self.border)
        return ops.bias_add(self.conv2d_transpose(x, weight, size), bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with a tanh (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh") if ascend() else ops.gelu(x, approximate="tanh")


class Linear(nn.Dense):
    """``torch.nn.Linear`` of f(x), with the `activation` f ("relu", "silu", "gelu-tanh" or None), plus `addend`; one pass on
    the CPU.

    x (B, ..., c_in), addend (B, c_out) or None -> (B, ..., c_out), computed in `compute_type`.
    """

    def __init__(self, c_in: int, c_out: int, activation: str | None = None, bias: bool = True):
        check_weights(c_out, c_in)
        super().__init__(c_in, c_out, has_bias=bias)
        self.compute_type = ms.float32
        self.weight_slot = self.bias_slot = None
        self.before = {None: None, "relu": ops.relu, "silu": ops.silu, "gelu-tanh": gelu_tanh}[activation]
        self.kernel = kernels.Linear(activation) if kernels.available() and bias else None

    def construct(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        weight = read(self.weight, self.weight_slot)
        bias = read(self.bias, self.bias_slot) if self.has_bias else None
        if self.kernel is not None and self.compute_type == ms.float32 and x.ndim == 2:
            return self.kernel(x, weight, bias, addend)
        x = ops.cast(x if self.before is None else self.before(x), self.compute_type)
        weight, bias = ops.cast(weight, self.compute_type), None if bias is None else ops.cast(bias, self.compute_type)
        if ascend():
            y = F.linear(x, weight, bias)
        else:
            y = self.matmul(x.reshape(-1, x.shape[-1]), weight)
            y = (y if bias is None else ops.bias_add(y, bias)).reshape((*x.shape[:-1], self.out_channels))
        return y if addend is None else y + addend


def Downsample(dim: int) -> Conv2d:
    """Halve H and W: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return conv2d(dim, dim, 4, stride=2, padding=1)


def Upsample(dim: int) -> Conv2dTranspose:
    """Double H and W by a transposed convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return Conv2dTranspose(dim, dim, 4, 2, 1)


def pad_bottom_right(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 1, W + 1), with zeros. ops.pad hangs in its 18th gradient (MindSpore 2.10)."""
    b, c, height, width = x.shape
    x = ops.concat((x, ops.zeros((b, c, 1, width), x.dtype)), 2)
    return ops.concat((x, ops.zeros((b, c, height + 1, 1), x.dtype)), 3)


class UpsampleNearest(nn.Cell):
    """Repeat each pixel `rows` x 2, then apply `conv`, if it is True one of 3 x 3: (B, C, H, W) -> (B, C, rows H, 2W).

    Every layer of a UNetModel takes `emb` and `context`; this one ignores them.
    """

    def __init__(self, channels: int, conv: nn.Cell | bool | None = True, rows: int = 2):
        super().__init__()
        self.conv = (conv2d(channels, channels, 3, padding=1) if conv is True else conv) or Identity()
        self.rows = rows

    def construct(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        interpolate = F.interpolate if ascend() else ops.interpolate
        return self.conv(interpolate(x, size=(self.rows * x.shape[2], 2 * x.shape[3]), mode="nearest"))


class GroupNorm(nn.Cell):
    """Group normalisation in float32, whatever the input's precision (Wu & He 2018, eq. 1): (B, C, H, W) -> the same.

    `activation` "gelu-before" normalises GELU(x), "silu-after" returns SiLU of the normalised x; one pass on the CPU.

    Raises:
        ValueError: `channels` is not divisible by `groups`.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, activation: str | None = None):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels are not divisible into {groups} groups: choose another dim or groups")
        check_weights(channels)
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = Parameter(Tensor(np.ones(channels, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(channels, np.float32)), name="bias")
        self.weight_slot = self.bias_slot = None
        self.kernel = kernels.GroupNorm(groups, eps, activation) if kernels.available() else None
        self.activate = Activation(activation.split("-")[0]) if activation and self.kernel is None else None

    def construct(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """With `scale` and `shift` (B, C), the activation applies to the normalised x times (1 + scale), plus shift."""
        x, weight, bias = ops.cast(x, ms.float32), read(self.weight, self.weight_slot), read(self.bias, self.bias_slot)
        if self.kernel is not None:
            if scale is None:
                return self.kernel(x, weight, bias)
            return self.kernel(x, weight * (1 + scale), bias * (1 + scale) + shift)
        if self.activation == "gelu-before":
            x = self.activate(x)
        x = ops.group_norm(x, self.groups, weight, bias, self.eps)
        if scale is not None and shift is not None:
            x = x * (1 + scale).expand_dims(-1).expand_dims(-1) + shift.expand_dims(-1).expand_dims(-1)
        return self.activate(x) if self.activation == "silu-after" else x


class RankMean(nn.Cell):
    """The mean of a Tensor over all ranks; its gradient is that of the mean of their losses. The Tensor itself with one."""

    def __init__(self):
        super().__init__()
        self.world_size = initialise_ranks()[1]
        self.sum = ops.AllReduce() if self.world_size > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        return x if self.sum is None else self.sum(x) / self.world_size


class BatchNorm(nn.Cell):
    """``torch.nn.BatchNorm2d`` (Ioffe & Szegedy 2015): (B, C, H, W) -> the same.

    Training mode normalises by the statistics of all ranks' batches, and updates the running ones, which evaluation mode
    uses; a `frozen` layer is always in evaluation mode. PyTorch's ``num_batches_tracked`` is left out: nothing uses it.
    """

    def __init__(self, channels: int, eps: float = 1e-5, frozen: bool = False):
        super().__init__()
        self.eps, self.frozen = eps, frozen
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.weight, self.bias = Parameter(Tensor(ones), name="weight"), Parameter(Tensor(zeros), name="bias")
        self.running_mean = Parameter(Tensor(zeros), name="running_mean", requires_grad=False)
        self.running_var = Parameter(Tensor(ones), name="running_var", requires_grad=False)
        self.weight_slot = self.bias_slot = None
        self.of_all_ranks = RankMean()

    def construct(self, x: Tensor) -> Tensor:
        x, weight, bias = ops.cast(x, ms.float32), read(self.weight, self.weight_slot), read(self.bias, self.bias_slot)
        statistics, training = (self.running_mean, self.running_var), self.training and not self.frozen
        if not training or self.of_all_ranks.world_size == 1:
            if ascend():
                return F.batch_norm(x, *statistics, weight, bias, training, 0.1, self.eps)
            return ops.batch_norm(x, *statistics, weight, bias, training=training, momentum=0.1, eps=self.eps)
        mean = self.of_all_ranks(x.mean((0, 2, 3), keep_dims=True))  # (1, C, 1, 1)
        x = x - mean
        var = self.of_all_ranks(ops.square(x).mean((0, 2, 3), keep_dims=True))
        n = x.shape[0] * x.shape[2] * x.shape[3] * self.of_all_ranks.world_size
        x = ops.depend(x, self.move(self.running_mean, mean))
        x = ops.depend(x, self.move(self.running_var, var * (n / (n - 1))))
        return x * (weight.reshape(mean.shape) / ops.sqrt(var + self.eps)) + bias.reshape(mean.shape)

    def move(self, average: Parameter, new: Tensor) -> Tensor:
        return ops.assign(average, 0.9 * average + 0.1 * ops.stop_gradient(new).reshape(average.shape))


class Dropout(nn.Cell):
    """In training, x with a share p of its values 0 and the others divided by 1 - p (Srivastava et al. 2014); otherwise x
    itself. Which values are 0 is said by `Masks`, without which training raises ValueError.

    x (B, channels, H / 2^level, W / 2^level) -> the same, where H and W are those of the network's input."""

    def __init__(self, p: float, channels: int, level: int):
        super().__init__()
        self.p, self.channels, self.level, self.index = p, channels, level, 0
        self.masks: tuple[Masks] | None = None

    def construct(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.masks is None:
            raise ValueError(
                "training with dropout needs masks: make ms_diffusion.models.layers.Masks, and draw before a step"
            )
        return x * ops.cast(self.masks[0](self.index), x.dtype).reshape(x.shape)


class Masks(nn.Cell):
    """What each `Dropout` of `net` multiplies a batch (batch_size, C, *size) by, in one parameter, which is none of `net`.
    Make them before `net` is compiled, and `draw` them before each step. Without dropout they do nothing.

    A step of several parts has batches of batch_size one after another: `use` chooses that of a part."""

    def __init__(self, net: nn.Cell, batch_size: int, size: tuple[int, ...], parts: int = 1):
        super().__init__()
        self.parts, self.drawn = parts, [np.zeros(0, np.float32)]
        self.layers = tuple(cell for _, cell in net.cells_and_names() if isinstance(cell, Dropout) and cell.p)
        self.shapes = tuple((batch_size, cell.channels, *(n >> cell.level for n in size)) for cell in self.layers)
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.values = Parameter(Tensor(np.zeros(sum(self.sizes) or 1, np.float32)), name="masks", requires_grad=False)
        for i, cell in enumerate(self.layers):  # in a tuple, so that the parameter is none of the network
            cell.index, cell.masks = i, (self,)

    def construct(self, index: int) -> Tensor:
        return split(self.values, self.sizes, 0)[index].reshape(self.shapes[index])

    def draw(self, seed: int, step: int, rank: int = 0) -> None:
        """The masks of a step: of each row of the batch of all ranks its own, whichever rank has it."""
        if not self.layers:
            return
        rows, per_row = self.parts * self.shapes[0][0], np.cumsum([size // self.shapes[0][0] for size in self.sizes])
        generators = [np.random.default_rng((seed, Stream.DROPOUT, rank * rows + i, step)) for i in range(rows)]
        uniform = np.stack([rng.random(per_row[-1], np.float32) for rng in generators])
        self.drawn = [self.kept(np.split(part, per_row[:-1], 1)) for part in np.split(uniform, self.parts)]
        self.use(0)

    def kept(self, uniform: list[np.ndarray]) -> np.ndarray:
        kept = [(u >= cell.p).reshape(-1) / np.float32(1 - cell.p) for u, cell in zip(uniform, self.layers, strict=True)]
        return np.concatenate(kept)

    def use(self, part: int) -> None:
        """The masks of a part of the step that `draw` was called for."""
        if self.layers:
            ops.assign(self.values, Tensor(self.drawn[part]))


def of_images(x: Tensor, per_image: Tensor) -> Tensor:
    """The rows of each image: x (B N, dim), per_image (B, dim) -> (B, N, dim)."""
    return x.reshape(per_image.shape[0], -1, x.shape[-1])


class AdaLayerNorm(nn.Cell):
    """Layer normalisation over the last axis without weights, then a scale and a shift for each image, in float32 (Peebles &
    Xie 2023, section 3.2): x (B N, dim), scale and shift (B, dim) -> norm(x) (1 + scale) + shift."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.kernel = kernels.AdaLayerNorm(eps) if kernels.available() else None

    def construct(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x, scale, shift = ops.cast(x, ms.float32), ops.cast(scale, ms.float32), ops.cast(shift, ms.float32)
        if self.kernel is not None:
            return self.kernel(x, scale, shift)
        if ascend():
            normal = F.layer_norm(x, x.shape[-1:], None, None, self.eps)
        else:
            centred = x - x.mean(-1, keep_dims=True)
            normal = centred * ops.rsqrt(ops.square(centred).mean(-1, keep_dims=True) + self.eps)
        y = of_images(normal, scale) * (1 + scale).expand_dims(1) + shift.expand_dims(1)
        return y.reshape(x.shape)


class GatedSum(nn.Cell):
    """x + gate y in float32, with a gate for each image: x and y (B N, dim), gate (B, dim) -> (B N, dim)."""

    def __init__(self):
        super().__init__()
        self.kernel = kernels.GatedSum() if kernels.available() else None

    def construct(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        x, y, gate = ops.cast(x, ms.float32), ops.cast(y, ms.float32), ops.cast(gate, ms.float32)
        if self.kernel is not None:
            return self.kernel(x, y, gate)
        return x + (of_images(y, gate) * gate.expand_dims(1)).reshape(x.shape)


def freeze(net: nn.Cell) -> nn.Cell:
    """Mark all parameters of `net` as not trainable, in place; returns `net`."""
    for p in net.get_parameters():
        p.requires_grad = False
    kernels.freeze(net)
    return net


def norm_conv(norm: GroupNorm, conv: nn.Cell, x: Tensor) -> Tensor:
    """conv(norm(x)); on the CPU as one operator, which does not store the normalised x."""
    if norm.kernel is not None and conv.norm_kernel is not None and conv.compute_type == ms.float32:
        weight, bias = read(norm.weight, norm.weight_slot), read(norm.bias, norm.bias_slot)
        return conv(ops.cast(x, ms.float32), weight, bias, norm.kernel.settings)
    return conv(norm(x))


class Activation(nn.Cell):
    """SiLU x sigmoid(x), or GELU x Phi(x) by the error function, PyTorch's default (``nn.GELU``'s is the tanh form)."""

    def __init__(self, name: str):
        super().__init__()
        self.is_silu = name == "silu"
        self.kernel = kernels.Activation(name) if kernels.available() else None

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(ops.cast(x, ms.float32))
        if self.is_silu:
            return ops.silu(x)
        return F.gelu(x, approximate="none") if ascend() else ops.gelu(x, approximate="none")


GELU, SiLU = partial(Activation, "gelu"), partial(Activation, "silu")


class LeakyReLU(nn.Cell):
    """x where x is positive, elsewhere `slope` times x (Maas et al. 2013)."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def construct(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope) if ascend() else ops.leaky_relu(x, self.slope)


class Residual(nn.Cell):
    """x -> fn(x) + x."""

    def __init__(self, fn: nn.Cell):
        super().__init__()
        self.fn = fn

    def construct(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class PreNorm(nn.Cell):
    """x -> fn(GroupNorm_1(x))."""

    def __init__(self, dim: int, fn: nn.Cell):
        super().__init__()
        self.fn, self.norm = fn, GroupNorm(1, dim)

    def construct(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Embedding(nn.Cell):
    """``torch.nn.Embedding``, initialised from N(0, 1): (B,) int32 in [0, num) -> (B, dim)."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        check_weights(num, dim)
        self.weight, self.weight_slot = Parameter(Tensor(np.zeros((num, dim), np.float32)), name="weight"), None

    def construct(self, index: Tensor) -> Tensor:
        return rows(read(self.weight, self.weight_slot), index)


class SinusoidalPositionEmbeddings(nn.Cell):
    """Timesteps (B,) float32 -> (B, dim): sines then cosines of dim/2 frequencies from 1 to 1/10000 (Vaswani 2017, 3.5).

    With `cosines_first`, cosines then sines of the frequencies 10000^(-2i/dim), i < dim/2, then 0 if dim is odd, as in
    CompVis latent-diffusion.
    """

    def __init__(self, dim: int, cosines_first: bool = False):
        super().__init__()
        check_weights(dim, dim)  # of the linear layer that takes them
        half, self.cosines_first, self.odd = dim // 2, cosines_first, cosines_first and dim % 2 == 1
        steps = half if cosines_first else half - 1
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(half) / steps).astype(np.float32))

    def construct(self, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * self.frequencies.reshape(1, -1)  # (B, dim/2)
        sines, cosines = ops.sin(angles), ops.cos(angles)
        parts = (cosines, sines) if self.cosines_first else (sines, cosines)
        return ops.concat(parts + (ops.zeros_like(sines[:, :1]),) if self.odd else parts, -1)  # (B, dim)


def name_and_initialise(net: nn.Cell, seed: int | None) -> None:
    """Name each parameter by its path and set PyTorch's default initial values, all from one seed; zeros without a seed, for
    a large network whose weights are going to be loaded.

    PyTorch draws weight and bias of convolutions and linear layers from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and embeddings
    from N(0, 1). Nested CellLists would otherwise leave duplicate names, which ``nn.Adam`` refuses.
    """
    rng = np.random.default_rng(seed)
    for path, cell in net.cells_and_names():
        for name, parameter in cell.parameters_and_names(expand=False):
            parameter.name = f"{path}.{name}"
            if seed is None:
                parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
            elif isinstance(cell, CONVOLUTIONS_AND_LINEAR):
                bound = 1 / math.sqrt(np.prod(cell.weight.shape[1:]))  # shape[1:] is fan_in, as PyTorch counts it
                parameter.set_data(Tensor(rng.uniform(-bound, bound, parameter.shape).astype(np.float32)))
            elif isinstance(cell, Embedding):
                parameter.set_data(Tensor(rng.standard_normal(parameter.shape, np.float32)))


def set_compute_type(net: nn.Cell, dtype: ms.Type) -> None:
    """Run convolutions and linear layers in `dtype`; parameters, norms and softmax stay in float32."""
    for _, cell in net.cells_and_names():
        if isinstance(cell, CONVOLUTIONS_AND_LINEAR):
            cell.compute_type = dtype
