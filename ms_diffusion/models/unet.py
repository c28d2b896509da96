"""The U-Net of the annotated diffusion model, in pixel space (Ho et al. 2020, appendix B; Rogge & Rasul 2022).

Written small to large: blocks, then the network. Parameter paths are those of the PyTorch original.
"""

from dataclasses import asdict, dataclass
from functools import partial

import mindspore as ms
from mindspore import nn, ops

from .attention import Attention, LinearAttention
from .layers import (
    GELU,
    Downsample,
    Embedding,
    GroupNorm,
    Identity,
    Linear,
    PreNorm,
    Residual,
    SiLU,
    SinusoidalPositionEmbeddings,
    Upsample,
    conv2d,
    name_and_initialise,
    norm_conv,
)


class Block(nn.Cell):
    """3x3 convolution, GroupNorm, SiLU: (B, dim, H, W) -> (B, dim_out, H, W); `scale`, `shift`: (B, dim_out) or None."""

    def __init__(self, dim: int, dim_out: int, groups: int = 8):
        super().__init__()
        self.proj = conv2d(dim, dim_out, 3, padding=1)
        self.norm = GroupNorm(groups, dim_out, activation="silu-after")

    def construct(self, x, scale=None, shift=None):
        return self.norm(self.proj(x), scale, shift)


class ResnetBlock(nn.Cell):
    """Two Blocks and a shortcut (He et al. 2015); the time embedding is added between them or, with `scale_shift`, scales
    and shifts the first one's norm (Dhariwal & Nichol 2021, section 4.3)."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int | None = None, groups: int = 8, scale_shift: bool = False):
        super().__init__()
        self.scale_shift = scale_shift
        emb_dim = dim_out * 2 if scale_shift else dim_out
        self.mlp = nn.SequentialCell(SiLU(), Linear(time_emb_dim, emb_dim)) if time_emb_dim else None
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = conv2d(dim, dim_out, 1) if dim != dim_out else Identity()

    def construct(self, x, time_emb=None):
        if self.mlp is None or time_emb is None:
            h = self.block1(x)
        elif self.scale_shift:
            scale, shift = ops.chunk(self.mlp(time_emb), 2, 1)
            h = self.block1(x, scale, shift)
        else:
            h = self.block1(x) + self.mlp(time_emb).expand_dims(-1).expand_dims(-1)
        return self.block2(h) + self.res_conv(x)


class ConvNextBlock(nn.Cell):
    """Depthwise 7x7, time embedding, then a two-convolution inverted bottleneck, and a shortcut (Liu et al. 2022)."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int | None = None, mult: int = 2):
        super().__init__()
        self.mlp = nn.SequentialCell(GELU(), Linear(time_emb_dim, dim)) if time_emb_dim else None
        self.ds_conv = conv2d(dim, dim, 7, padding=3, groups=dim)
        self.net = nn.SequentialCell(
            GroupNorm(1, dim),
            conv2d(dim, dim_out * mult, 3, padding=1),
            Identity(),  # the GELU is in the norm; this keeps PyTorch's parameter names
            GroupNorm(1, dim_out * mult, activation="gelu-before"),
            conv2d(dim_out * mult, dim_out, 3, padding=1),
        )
        self.res_conv = conv2d(dim, dim_out, 1) if dim != dim_out else Identity()

    def construct(self, x, time_emb=None):
        h = self.ds_conv(x)
        if self.mlp is not None and time_emb is not None:
            h = h + self.mlp(time_emb).expand_dims(-1).expand_dims(-1)
        h = norm_conv(self.net[0], self.net[1], h)
        return norm_conv(self.net[3], self.net[4], h) + self.res_conv(x)


@dataclass(frozen=True)
class UnetConfig:
    """What a Unet is built from."""

    dim: int = 28
    """Base width: channels of the first level."""
    init_dim: int | None = None
    """Channels after the first convolution; None is dim // 3 * 2."""
    out_dim: int | None = None
    """Output channels; None is `channels`."""
    dim_mults: tuple[int, ...] = (1, 2, 4)
    """Width of each level as a multiple of dim; H and W halve between levels."""
    channels: int = 1
    """Image channels: 1 gray, 3 RGB."""
    with_time_emb: bool = True
    """Tell the network the timestep."""
    resnet_block_groups: int = 8
    """Groups of GroupNorm in a ResnetBlock."""
    use_convnext: bool = True
    """ConvNextBlock; otherwise ResnetBlock."""
    convnext_mult: int = 2
    """Widening inside a ConvNextBlock."""
    scale_shift: bool = False
    """Let the embedding scale and shift a ResnetBlock's first norm, instead of adding it."""
    final_skip: bool = False
    """Show the last block what the first convolution gave, too: an image's detail needs no way through all levels."""
    patch_size: int = 1
    """Work on patches of this many pixels a side as channels (Luhman & Luhman 2022): 2 costs a quarter."""
    num_classes: int | None = None
    """Classes that the network is told of, by an embedding added to the time's; None is an unconditional network."""
    cond_channels: int = 0
    """Channels of an image that the network is shown beside x."""
    self_condition: bool = False
    """Show the network its last x_0 beside x (Chen et al. 2022)."""

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, or None where the network is told of none."""
        return self.num_classes

    @property
    def size_multiple(self) -> int:
        """H and W of the images must be divisible by this: MindSpore would silently return another size."""
        return self.patch_size * 2 ** (len(self.dim_mults) - 1)

    def build(self, seed: int = 0) -> "Unet":
        return Unet(**asdict(self), seed=seed)


class Unet(nn.Cell):
    """Predict from a noisy image x (B, channels, H, W) at timestep t (B,) int32: -> (B, out_dim, H, W), float32.

    The arguments are UnetConfig's; `seed` draws the initial weights. Conditions follow t, those the network is built for, in
    this order: labels (B,) int32 in [0, num_classes], where num_classes stands for no label; an image (B, cond_channels, H,
    W); the last x_0 (B, channels, H, W), or zeros.

    Raises:
        ValueError: a width is not divisible by the groups, labels without time embedding, scale_shift with ConvNextBlocks.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: tuple[int, ...] = (1, 2, 4, 8),
        channels: int = 3,
        with_time_emb: bool = True,
        resnet_block_groups: int = 8,
        use_convnext: bool = True,
        convnext_mult: int = 2,
        scale_shift: bool = False,
        final_skip: bool = False,
        patch_size: int = 1,
        num_classes: int | None = None,
        cond_channels: int = 0,
        self_condition: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if num_classes is not None and not (with_time_emb and num_classes > 0):
            raise ValueError(f"num_classes is {num_classes}: it must be at least 1, and needs with_time_emb")
        self.patch_size = patch_size
        init_dim = init_dim or dim // 3 * 2
        dims = [init_dim, *[dim * m for m in dim_mults]]
        levels = list(zip(dims[:-1], dims[1:], strict=True))
        time_dim = dim * 4 if with_time_emb else None
        if use_convnext and scale_shift:
            raise ValueError("scale_shift is for ResnetBlocks: set use_convnext to False")
        kind = (
            partial(ConvNextBlock, mult=convnext_mult)
            if use_convnext
            else partial(ResnetBlock, groups=resnet_block_groups, scale_shift=scale_shift)
        )
        block = partial(kind, time_emb_dim=time_dim)

        # Time: t -> (B, 4 dim)
        self.time_mlp = (
            nn.SequentialCell(SinusoidalPositionEmbeddings(dim), Linear(dim, time_dim), GELU(), Linear(time_dim, time_dim))
            if with_time_emb
            else None
        )
        self.label_emb = Embedding(num_classes + 1, time_dim) if num_classes is not None else None

        # Down: two blocks and linear attention a level, then half the size
        channels_in = channels * (2 if self_condition else 1) + cond_channels
        self.init_conv = conv2d(channels_in * patch_size**2, init_dim, 7, padding=3)
        self.downs = nn.CellList()
        for i, (c_in, c_out) in enumerate(levels):
            down = Downsample(c_out) if i < len(levels) - 1 else Identity()
            attention = Residual(PreNorm(c_out, LinearAttention(c_out)))
            self.downs.append(nn.CellList([block(c_in, c_out), block(c_out, c_out), attention, down]))

        # Middle
        self.mid_block1 = block(dims[-1], dims[-1])
        self.mid_attn = Residual(PreNorm(dims[-1], Attention(dims[-1])))
        self.mid_block2 = block(dims[-1], dims[-1])

        # Up: the same with the skip concatenated, then twice the size
        self.ups = nn.CellList()
        for c_in, c_out in reversed(levels[1:]):
            attention = Residual(PreNorm(c_in, LinearAttention(c_in)))
            self.ups.append(nn.CellList([block(c_out * 2, c_in), block(c_in, c_in), attention, Upsample(c_in)]))

        self.final_skip = final_skip
        last_in = dims[1] + (init_dim if final_skip else 0)
        self.final_conv = nn.SequentialCell(kind(last_in, dim), conv2d(dim, (out_dim or channels) * patch_size**2, 1))
        name_and_initialise(self, seed)

    def construct(self, x, t, *cond):
        # Time. One cast here: an integer t used for indexing and arithmetic alike breaks the gradient.
        emb = self.time_mlp(ops.cast(t, ms.float32)) if self.time_mlp is not None else None
        if self.label_emb is not None:
            emb = emb + self.label_emb(cond[0])
            cond = cond[1:]

        # Down
        if len(cond) > 0:
            x = ops.concat((x,) + cond, 1)
        if self.patch_size > 1:
            x = ops.pixel_unshuffle(x, self.patch_size)
        x = self.init_conv(x)
        first = x
        skips = ()  # newest first
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
