"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G), and the Gaussian in its middle.

Written small to large: the Gaussian, blocks, then the networks. Parameter paths are those of the PyTorch original.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import mindspore as ms
from mindspore import Parameter, nn, ops

from .attention import attend, matmul, matmul_t, split_heads
from .layers import GroupNorm, Identity, UpsampleNearest, conv2d, name_and_initialise, norm_conv

EPS = 1e-6  # of every GroupNorm; PyTorch's default is 1e-5

# N(mean, diag(exp(logvar))) of z (B, C, h, w) is written as its moments (B, 2C, h, w), not as an object: one that is made
# within a graph loses its gradient without a word (MindSpore 2.7 and 2.10).


def mean_and_logvar(moments):
    """(B, 2C, h, w) -> both (B, C, h, w), logvar clipped to [-30, 20]; zeros are the moments of N(0, I)."""
    mean, logvar = ops.chunk(moments, 2, 1)
    return mean, ops.clamp(logvar, -30.0, 20.0)


def gaussian_mode(moments):
    """The likeliest z, which is the mean: (B, C, h, w)."""
    return mean_and_logvar(moments)[0]


def gaussian_sample(moments, noise):
    """z = mean + std noise, with noise (B, C, h, w) of N(0, I) (Kingma & Welling 2013, section 2.4): (B, C, h, w)."""
    mean, logvar = mean_and_logvar(moments)
    return mean + ops.exp(0.5 * logvar) * noise


def gaussian_nll(moments, z):
    """-log of the density at z (B, C, h, w), in nats: (B,)."""
    mean, logvar = mean_and_logvar(moments)
    return 0.5 * (math.log(2 * math.pi) + logvar + ops.square(z - mean) * ops.exp(-logvar)).sum((1, 2, 3))


def gaussian_kl(moments, other=None):
    """KL divergence in nats from N(0, I), or from the Gaussian of the moments `other`: (B,)."""
    other = ops.zeros_like(moments) if other is None else other
    return normal_kl(*mean_and_logvar(moments), *mean_and_logvar(other)).sum((1, 2, 3))


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of each entry, in nats.

    The shapes broadcast; all but logvar2 may be numbers.
    """
    return 0.5 * (logvar2 - logvar1 + ops.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * ops.exp(-logvar2) - 1)


class ResnetBlock(nn.Cell):
    """Twice GroupNorm, SiLU and 3x3 convolution, with dropout before the second, and a shortcut (He et al. 2016, fig. 4e):
    (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, EPS, "silu-after")
        self.conv1 = conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, EPS, "silu-after")
        self.dropout = nn.Dropout(p=dropout)
        self.conv2 = conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = conv2d(c_in, c_out, 1) if c_in != c_out else Identity()

    def construct(self, x):
        h = norm_conv(self.norm1, self.conv1, x)
        return self.nin_shortcut(x) + self.conv2(self.dropout(self.norm2(h)))


class AttnBlock(nn.Cell):
    """GroupNorm, self-attention with one head (Vaswani et al. 2017, eq. 1), shortcut: (B, channels, H, W) -> the same."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS)
        self.q, self.k, self.v = [conv2d(channels, channels, 1) for _ in range(3)]
        self.proj_out = conv2d(channels, channels, 1)

    def construct(self, x):
        _, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = split_heads(ops.concat((self.q(h), self.k(h), self.v(h)), 1), 1)  # (B, 1, C, N), N = H W
        out = attend(q, k, v, channels**-0.5)  #                                       (B, 1, C, N)
        return x + self.proj_out(out.reshape(-1, channels, height, width))


class LinAttnBlock(nn.Cell):
    """Attention with one head whose cost is linear in H W: (B, channels, H, W) -> the same.

    As the original has it: softmax of the keys alone (after Shen et al. 2018, eq. 4), no norm and no shortcut.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = conv2d(channels, channels, 1)

    def construct(self, x):
        q, k, v = split_heads(self.to_qkv(x), 1)  #    (B, 1, C, N), N = H W
        context = matmul_t(v, ops.softmax(k, -1))  #   (B, 1, C, C), over the positions
        out = matmul(context, q)  #                    (B, 1, C, N)
        return self.to_out(out.reshape(x.shape))


def attention(kind: str, channels: int, groups: int) -> nn.Cell:
    """(B, channels, H, W) -> the same, by AutoencoderConfig's `attention`."""
    if kind == "vanilla":
        return AttnBlock(channels, groups)
    if kind == "linear":
        return LinAttnBlock(channels)
    if kind == "none":
        return Identity()
    raise ValueError(f"unknown attention {kind!r}: choose vanilla, linear or none")


class Downsample(nn.Cell):
    """Halve H and W by a 3x3 convolution, or else by the mean of 2x2 pixels: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = conv2d(channels, channels, 3, stride=2) if with_conv else None

    def construct(self, x):
        if self.conv is None:
            return ops.avg_pool2d(x, 2, 2)
        # A row at the bottom, a column on the right; the 18th gradient of ops.pad never ends (MindSpore 2.10)
        b, c, height, width = x.shape
        x = ops.concat((x, ops.zeros((b, c, 1, width), x.dtype)), 2)
        x = ops.concat((x, ops.zeros((b, c, height + 1, 1), x.dtype)), 3)
        return self.conv(x)


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an AutoencoderKL is built from; as it stands, the one of Stable Diffusion.

    Raises:
        ValueError: the resolution cannot be halved between all levels.
    """

    ch: int = 128
    """Base width: channels after the encoder's first convolution."""
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level as a multiple of ch; H and W halve between levels."""
    num_res_blocks: int = 2
    """ResnetBlocks a level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = ()
    """Attention follows every ResnetBlock of the levels with this H = W, and always stands in the middle."""
    dropout: float = 0.0
    """Rate of dropout in training, that is after `set_train()`, which must precede compilation. MindSpore draws it, so a
    resumed run has other draws."""
    channels: int = 3
    """Image channels: 1 gray, 3 RGB."""
    resolution: int = 256
    """H and W of the images; the networks take others, too, but attn_resolutions count from this one."""
    z_channels: int = 4
    """Channels between encoder and decoder, without the logarithms of the variances."""
    embed_dim: int = 4
    """Channels of the latent z: a 1x1 convolution leads from z_channels to these, and another one back."""
    attention: Literal["vanilla", "linear", "none"] = "vanilla"
    """AttnBlock, LinAttnBlock, or no attention."""
    resamp_with_conv: bool = True
    """Change H and W with 3x3 convolutions; otherwise by the mean of pixels and by repeating them."""
    tanh_out: bool = False
    """End the decoder with tanh."""
    groups: int = 32
    """Groups of GroupNorm; they divide every level's channels."""

    num_classes: ClassVar[None] = None  # as a Unet's, for the programs
    null_label: ClassVar[None] = None
    cond_channels: ClassVar[int] = 0
    self_condition: ClassVar[bool] = False

    def __post_init__(self):
        if self.resolution % self.size_multiple:
            raise ValueError(
                f"a resolution of {self.resolution} cannot be halved {len(self.ch_mult) - 1} times: choose one that is "
                f"divisible by {self.size_multiple}, or a shorter ch_mult"
            )

    @property
    def size_multiple(self) -> int:
        """f, by how much z is smaller than the image: H and W of images must be divisible by it."""
        return 2 ** (len(self.ch_mult) - 1)

    def build(self, seed: int = 0) -> "AutoencoderKL":
        return AutoencoderKL(self, seed)


class Middle(nn.Cell):
    """Two ResnetBlocks with attention between: (B, width, H, W) -> the same."""

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, config.groups, config.dropout)
        self.attn_1 = attention(config.attention, width, config.groups)
        self.block_2 = ResnetBlock(width, width, config.groups, config.dropout)

    def construct(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Cell):
    """`num_blocks` ResnetBlocks, each with attention after it where H = W = `size` has it, then one of the resamplers:
    (B, c_in, H, W) -> (B, c_out, H', W')."""

    def __init__(
        self,
        config: AutoencoderConfig,
        c_in: int,
        c_out: int,
        num_blocks: int,
        size: int,
        downsample: nn.Cell | None = None,
        upsample: nn.Cell | None = None,
    ):
        super().__init__()
        widths = [c_in] + [c_out] * num_blocks
        kind = config.attention if size in config.attn_resolutions else "none"
        self.block = nn.CellList([ResnetBlock(c, c_out, config.groups, config.dropout) for c in widths[:-1]])
        self.attn = nn.CellList([attention(kind, c_out, config.groups) for _ in range(num_blocks)])
        self.downsample, self.upsample = downsample or Identity(), upsample or Identity()

    def construct(self, x):
        for i, block in enumerate(self.block):
            x = self.attn[i](block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Cell):
    """Images (B, channels, H, W) -> (B, 2 z_channels, H/f, W/f), or of z_channels without `double_z`.

    Raises:
        ValueError: a width is not divisible by the groups, or the attention is unknown.
    """

    def __init__(self, config: AutoencoderConfig, double_z: bool = True):
        super().__init__()
        widths = [config.ch, *[config.ch * m for m in config.ch_mult]]
        self.conv_in = conv2d(config.channels, config.ch, 3, padding=1)
        self.down = nn.CellList()
        for i, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            last = i == len(config.ch_mult) - 1
            down = None if last else Downsample(c_out, config.resamp_with_conv)
            size = config.resolution // 2**i
            self.down.append(Level(config, c_in, c_out, config.num_res_blocks, size, downsample=down))
        self.mid = Middle(config, widths[-1])
        self.norm_out = GroupNorm(config.groups, widths[-1], EPS, "silu-after")
        self.conv_out = conv2d(widths[-1], config.z_channels * (2 if double_z else 1), 3, padding=1)

    def construct(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return norm_conv(self.norm_out, self.conv_out, self.mid(x))


class Decoder(nn.Cell):
    """(B, z_channels, h, w) -> images (B, channels, f h, f w); with `give_pre_end` the features (B, ch ch_mult[0], f h, f w)
    before the last norm and convolution, which are there nevertheless.

    Raises:
        ValueError: as Encoder.
    """

    def __init__(self, config: AutoencoderConfig, give_pre_end: bool = False):
        super().__init__()
        self.give_pre_end, self.tanh_out = give_pre_end, config.tanh_out
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.CellList()  # in the encoder's order, from the largest images to the smallest
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            up = None if i == 0 else UpsampleNearest(c_out, config.resamp_with_conv)
            size = config.resolution // 2**i
            self.up.append(Level(config, c_in, c_out, config.num_res_blocks + 1, size, upsample=up))
        self.norm_out = GroupNorm(config.groups, widths[0], EPS, "silu-after")
        self.conv_out = conv2d(widths[0], config.channels, 3, padding=1)

    def features(self, z):
        """What the last norm and convolution take."""
        x = self.mid(self.conv_in(z))
        for i in range(len(self.up) - 1, -1, -1):
            x = self.up[i](x)
        return x

    def last(self, x):
        """From these to images."""
        x = norm_conv(self.norm_out, self.conv_out, x)
        return ops.tanh(x) if self.tanh_out else x

    def construct(self, z):
        x = self.features(z)
        return x if self.give_pre_end else self.last(x)


class AutoencoderKL(nn.Cell):
    """Images x (B, channels, H, W) in [-1, 1] and their latents z (B, embed_dim, h, w), h = H / f and w = W / f.

    ``net(x, noise)`` -> reconstruction (B, channels, H, W), moments of q(z | x) (B, 2 embed_dim, h, w), by way of the sample
    with that noise (B, embed_dim, h, w), or without noise by way of the mode. `seed` draws the initial weights.

    Raises:
        ValueError: a width is not divisible by the groups, or the attention is unknown.
    """

    def __init__(self, config: AutoencoderConfig, seed: int = 0):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = conv2d(config.embed_dim, config.z_channels, 1)
        name_and_initialise(self, seed)

    def encode(self, x):
        """The moments of q(z | x), for `gaussian_sample`, `gaussian_mode`, `gaussian_kl` and `gaussian_nll`."""
        return ops.cast(self.quant_conv(self.encoder(x)), ms.float32)

    def decode(self, z):
        """z -> images."""
        return ops.cast(self.decoder(self.post_quant_conv(z)), ms.float32)

    def construct(self, x, noise=None):
        moments = self.encode(x)
        z = gaussian_mode(moments) if noise is None else gaussian_sample(moments, noise)
        return self.decode(z), moments

    @property
    def last_layer(self) -> Parameter:
        """The weight at which the adversarial loss is balanced with the reconstruction's (Esser et al. 2021, eq. 7)."""
        return self.decoder.conv_out.weight
