"""The U-Net of the annotated diffusion model, in pixel space (Ho et al. 2020, appendix B; Rogge & Rasul 2022).

The blocks come first, then the network. Parameter paths are those of the PyTorch original.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, NON_NEGATIVE, NOT_EMPTY, Bounds, check_fields
from . import layers
from .attention import Attention, LinearAttention
from .context import PixelConditions, TextEmbedding
from .layers import GELU, Embedding, GroupNorm, Identity, Linear, SiLU, chunk, conv2d, name_and_initialise, norm_conv


class Block(nn.Cell):
    """3x3 convolution, GroupNorm, SiLU: (B, dim, H, W) -> (B, dim_out, H, W); `scale`, `shift`: (B, dim_out) or None."""

    def __init__(self, dim: int, dim_out: int, groups: int = 8):
        super().__init__()
        self.proj = conv2d(dim, dim_out, 3, padding=1)
        self.norm = GroupNorm(groups, dim_out, activation="silu-after")

    def construct(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.norm(self.proj(x), scale, shift)


class ResnetBlock(nn.Cell):
    """Two Blocks and a shortcut (He et al. 2015): (B, dim, H, W), time_emb (B, time_emb_dim) -> (B, dim_out, H, W). The time
    embedding is added between the Blocks or, with `scale_shift`, scales and shifts the norm of the first Block (Dhariwal &
    Nichol 2021, section 4.3)."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int | None = None, groups: int = 8, scale_shift: bool = False):
        super().__init__()
        self.scale_shift = scale_shift
        emb_dim = dim_out * 2 if scale_shift else dim_out
        self.mlp = nn.SequentialCell(SiLU(), Linear(time_emb_dim, emb_dim)) if time_emb_dim else None
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = conv2d(dim, dim_out, 1) if dim != dim_out else Identity()

    def construct(self, x: Tensor, time_emb: Tensor | None = None) -> Tensor:
        if self.mlp is None or time_emb is None:
            h = self.block1(x)
        elif self.scale_shift:
            scale, shift = chunk(self.mlp(time_emb), 2, 1)
            h = self.block1(x, scale, shift)
        else:
            h = self.block1(x) + self.mlp(time_emb).expand_dims(-1).expand_dims(-1)
        return self.block2(h) + self.res_conv(x)


class ConvNextBlock(nn.Cell):
    """Depthwise 7x7 convolution, time embedding, inverted bottleneck of two convolutions, shortcut (Liu et al. 2022):
    (B, dim, H, W), time_emb (B, time_emb_dim) -> (B, dim_out, H, W)."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int | None = None, mult: int = 2):
        super().__init__()
        self.mlp = nn.SequentialCell(GELU(), Linear(time_emb_dim, dim)) if time_emb_dim else None
        self.ds_conv = conv2d(dim, dim, 7, padding=3, groups=dim)
        conv1, conv2 = conv2d(dim, dim_out * mult, 3, padding=1), conv2d(dim_out * mult, dim_out, 3, padding=1)
        # The second norm computes the GELU; the Identity keeps the numbers of PyTorch's parameter names
        norm1, norm2 = GroupNorm(1, dim), GroupNorm(1, dim_out * mult, activation="gelu-before")
        self.net = nn.SequentialCell(norm1, conv1, Identity(), norm2, conv2)
        self.res_conv = conv2d(dim, dim_out, 1) if dim != dim_out else Identity()

    def construct(self, x: Tensor, time_emb: Tensor | None = None) -> Tensor:
        h = self.ds_conv(x)
        if self.mlp is not None and time_emb is not None:
            h = h + self.mlp(time_emb).expand_dims(-1).expand_dims(-1)
        h = norm_conv(self.net[0], self.net[1], h)
        return norm_conv(self.net[3], self.net[4], h) + self.res_conv(x)


@dataclass(frozen=True)
class UnetConfig(PixelConditions):
    """Configuration of a Unet."""

    dim: Annotated[int, Bounds(4)] = 28
    """Base width: channels of the first level."""
    init_dim: Annotated[int, AT_LEAST_1] | None = None
    """Channels after the first convolution; None: dim // 3 * 2."""
    out_dim: Annotated[int, AT_LEAST_1] | None = None
    """Output channels; None: the image channels."""
    dim_mults: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], NOT_EMPTY] = (1, 2, 4)
    """Width of each level as a multiple of dim; H and W halve between levels."""
    channels: Annotated[int, AT_LEAST_1] = 1
    """Image channels: 1 gray, 3 RGB."""
    with_time_emb: bool = True
    """Condition the network on the timestep."""
    resnet_block_groups: Annotated[int, AT_LEAST_1] = 8
    """Groups of GroupNorm in a ResnetBlock."""
    use_convnext: bool = True
    """Use ConvNextBlocks instead of ResnetBlocks."""
    convnext_mult: Annotated[int, AT_LEAST_1] = 2
    """Width inside a ConvNextBlock as a multiple of its output width."""
    scale_shift: bool = False
    """Scale and shift the first norm of a ResnetBlock by the time embedding, instead of adding the embedding."""
    final_skip: bool = False
    """Feed the output of the first convolution to the last block too, so that detail can bypass all levels."""
    patch_size: Annotated[int, AT_LEAST_1] = 1
    """Turn patches of this side in pixels into channels (Luhman & Luhman 2022); 2 quarters the cost."""
    num_classes: Annotated[int, AT_LEAST_1] | None = None
    """Number of classes, embedded and added to the time embedding; None: no class condition."""
    vocab_size: Annotated[int, NON_NEGATIVE] = 0
    """Number of different tokens in the captions that condition the network, in place of classes; 0: no captions."""
    max_length: Annotated[int, NON_NEGATIVE] = 0
    """Maximum number of tokens in a caption."""
    text_dim: Annotated[int, AT_LEAST_1] = 128
    """Width of the encoder of captions."""
    cond_channels: Annotated[int, NON_NEGATIVE] = 0
    """Channels of a conditioning image that is concatenated to x."""
    self_condition: bool = False
    """Concatenate the previous estimate of x_0 to x (Chen et al. 2022)."""
    fourier_features: Annotated[int, Bounds(0, 8)] = 0
    """Concatenate sines and cosines of x to x, of this many periods: 1, 2, 4, ... of the 256 levels of a pixel (Kingma et
    al. 2021, arXiv 2107.00630, appendix C). They show the network small differences, which count in likelihoods."""

    @property
    def size_multiple(self) -> int:
        """H and W of the images must be divisible by this: MindSpore would silently return another size."""
        return self.patch_size * 2 ** (len(self.dim_mults) - 1)

    def build(self, seed: int = 0) -> "Unet":
        return Unet(self, seed)


class Unet(nn.Cell):
    """Predict from a noisy image x (B, channels, H, W) at timestep t (B,) int32: -> (B, out_dim, H, W), float32.

    The conditions of `config.cond_fields` follow t: labels (B,) int32 in [0, num_classes], where num_classes means "no
    class", or tokens (B, max_length) int32, where all 0 means "no caption"; an image (B, cond_channels, H, W). With
    `self_condition` the previous estimate of x_0 (B, channels, H, W) comes last, or zeros. `seed` determines the initial
    weights.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: a condition without with_time_emb, classes and captions together, captions without max_length,
            scale_shift with ConvNextBlocks, or a width that is not divisible by the groups.
    """

    def __init__(self, config: UnetConfig = UnetConfig(), seed: int = 0):
        super().__init__()
        check_fields(config, "")
        if config.null_label is not None and not config.with_time_emb:
            raise ValueError("num_classes and vocab_size need a time embedding: set with_time_emb, or leave both out")
        if config.vocab_size and (config.num_classes is not None or not config.max_length):
            raise ValueError(f"vocab_size is {config.vocab_size}: set max_length too, and num_classes to None")
        if config.use_convnext and config.scale_shift:
            raise ValueError("scale_shift is for ResnetBlocks: set use_convnext to False")
        dim, self.patch_size, self.final_skip = config.dim, config.patch_size, config.final_skip
        init_dim, time_dim = config.init_dim or dim // 3 * 2, dim * 4
        dims = [init_dim, *[dim * m for m in config.dim_mults]]
        levels = list(pairwise(dims))
        kind = partial(ResnetBlock, groups=config.resnet_block_groups, scale_shift=config.scale_shift)
        if config.use_convnext:
            kind = partial(ConvNextBlock, mult=config.convnext_mult)
        block = partial(kind, time_emb_dim=time_dim if config.with_time_emb else None)

        def attend(attention, channels):
            return layers.Residual(layers.PreNorm(channels, attention(channels)))

        # Time: t -> (B, 4 dim)
        self.time_mlp = None
        if config.with_time_emb:
            embedding, linear = layers.SinusoidalPositionEmbeddings(dim), Linear(dim, time_dim)
            self.time_mlp = nn.SequentialCell(embedding, linear, GELU(), Linear(time_dim, time_dim))
        self.label_emb = Embedding(config.num_classes + 1, time_dim) if config.num_classes is not None else None
        self.text_emb = None
        if config.vocab_size:
            self.text_emb = TextEmbedding(config.vocab_size, config.max_length, config.text_dim, time_dim)

        # Down: two blocks and linear attention per level, then half the size
        self.periods = tuple(2.0**i / 127.5 for i in range(config.fourier_features))
        channels_in = config.channels * (2 if config.self_condition else 1) + config.cond_channels
        channels_in += config.channels * 2 * len(self.periods)
        self.init_conv = conv2d(channels_in * self.patch_size**2, init_dim, 7, padding=3)
        self.downs = nn.CellList()
        for i, (c_in, c_out) in enumerate(levels):
            down = layers.Downsample(c_out) if i < len(levels) - 1 else Identity()
            attention = attend(LinearAttention, c_out)
            self.downs.append(nn.CellList([block(c_in, c_out), block(c_out, c_out), attention, down]))

        # Middle
        self.mid_block1 = block(dims[-1], dims[-1])
        self.mid_attn = attend(Attention, dims[-1])
        self.mid_block2 = block(dims[-1], dims[-1])

        # Up: the same over x and its skip connection, then twice the size
        self.ups = nn.CellList()
        for c_in, c_out in reversed(levels[1:]):
            attention, up = attend(LinearAttention, c_in), layers.Upsample(c_in)
            self.ups.append(nn.CellList([block(c_out * 2, c_in), block(c_in, c_in), attention, up]))

        last_in = dims[1] + (init_dim if self.final_skip else 0)
        channels_out = (config.out_dim or config.channels) * self.patch_size**2
        self.final_conv = nn.SequentialCell(kind(last_in, dim), conv2d(dim, channels_out, 1))
        name_and_initialise(self, seed)

    def construct(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        # Time. t is cast once, here: the gradient breaks where an integer t is used in both indexing and arithmetic.
        emb = self.time_mlp(ops.cast(t, ms.float32)) if self.time_mlp is not None else None
        if self.label_emb is not None:
            emb = emb + self.label_emb(cond[0])
            cond = cond[1:]
        if self.text_emb is not None:
            emb = emb + self.text_emb(cond[0])
            cond = cond[1:]

        # Down
        waves = ()
        for period in self.periods:
            phase = (x + 1.0) * (2 * math.pi / period)
            waves += (ops.sin(phase), ops.cos(phase))
        if len(cond) + len(waves) > 0:
            x = ops.concat((x,) + waves + cond, 1)
        if self.patch_size > 1:
            x = ops.pixel_unshuffle(x, self.patch_size)
        first = self.init_conv(x)
        x, skips = first, ()  # skips: newest first
        for block1, block2, attention, down in self.downs:
            x = attention(block2(block1(x, emb), emb))
            skips = (x,) + skips
            x = down(x)

        # Middle
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, emb)), emb)

        # Up
        for i, (block1, block2, attention, up) in enumerate(self.ups):
            x = ops.concat((x, skips[i]), 1)
            x = up(attention(block2(block1(x, emb), emb)))

        if self.final_skip:
            x = ops.concat((x, first), 1)
        x = ops.cast(self.final_conv(x), ms.float32)
        return ops.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x
