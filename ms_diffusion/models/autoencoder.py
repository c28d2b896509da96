"""The autoencoders of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G): KL, with Gaussian latents, and VQ,
whose latents are vectors of a codebook.

The Gaussian comes first, then the codebook, the blocks, and the networks. Parameter paths are those of the PyTorch original.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ..fields import AT_LEAST_1, DEPTH, NON_NEGATIVE, NOT_EMPTY, Bounds, check_fields
from ..files import load_npy
from ..runtime import UserError
from .attention import attend, matmul, matmul_t, split_heads
from .layers import (
    Dropout,
    Embedding,
    GroupNorm,
    Identity,
    UpsampleNearest,
    chunk,
    conv2d,
    name_and_initialise,
    norm_conv,
    pad_bottom_right,
    read,
    rows,
)

EPS = 1e-6  # of every GroupNorm; PyTorch's default is 1e-5

# The distribution N(mean, diag(exp(logvar))) of z (B, C, h, w) is represented by its moments (B, 2C, h, w), mean and logvar,
# not by an object: an object that is created in a graph silently loses its gradient (MindSpore 2.7 and 2.10).


def mean_and_logvar(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, h, w) -> mean and logvar, both (B, C, h, w), logvar clipped to [-30, 20]. Moments of N(0, I) are 0."""
    mean, logvar = chunk(moments, 2, 1)
    return mean, ops.clamp(logvar, -30.0, 20.0)


def gaussian_mode(moments: Tensor) -> Tensor:
    """The most likely z, which is the mean: (B, C, h, w)."""
    return mean_and_logvar(moments)[0]


def gaussian_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """z = mean + std noise, for noise (B, C, h, w) from N(0, I) (Kingma & Welling 2013, section 2.4): (B, C, h, w)."""
    mean, logvar = mean_and_logvar(moments)
    return mean + ops.exp(0.5 * logvar) * noise


def gaussian_nll(moments: Tensor, z: Tensor) -> Tensor:
    """Negative log-density at z (B, C, h, w), in nats: (B,)."""
    mean, logvar = mean_and_logvar(moments)
    return 0.5 * (math.log(2 * math.pi) + logvar + ops.square(z - mean) * ops.exp(-logvar)).sum((1, 2, 3))


def gaussian_kl(moments: Tensor, other: Tensor | None = None) -> Tensor:
    """KL divergence in nats from N(0, I), or from the Gaussian with the moments `other`: (B,)."""
    other = ops.zeros_like(moments) if other is None else other
    return normal_kl(*mean_and_logvar(moments), *mean_and_logvar(other)).sum((1, 2, 3))


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of each entry, in nats; the shapes broadcast."""
    return 0.5 * (logvar2 - logvar1 + ops.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * ops.exp(-logvar2) - 1)


class VectorQuantizer(nn.Cell):
    """Vectors z (B, embed_dim, h, w) -> the nearest entries of a codebook, the codebook loss (), and the entries' ids (van
    den Oord et al. 2017, section 3).

    The gradient passes from the entries to z unchanged (straight-through). The loss is the sum of |sg(e) - z|^2, which moves
    the encoder, and |e - sg(z)|^2, which moves the codebook, means over all elements. beta weights the first (eq. 3), or
    with `legacy` the second, as in the published models.

    The ids are int32 (B, h, w); without `sane_index_shape` (B h w,), and with a remap (B h w, 1), as in the original. With a
    remap whose `unknown_index` is "random", the call takes `random` (B, h, w), see `remap_to_used`.

    Raises:
        UserError: the file of the remap cannot be read, or does not hold ids.
    """

    def __init__(self, config: "VQConfig"):
        super().__init__()
        self.weights = (1.0, config.beta) if config.legacy else (config.beta, 1.0)  # of encoder and codebook
        self.sane_index_shape, self.unknown_index = config.sane_index_shape, config.unknown_index
        self.embedding = Embedding(config.n_embed, config.embed_dim)
        self.used = None if config.remap is None else Tensor(read_remap(config.remap, config.n_embed))

    def nearest(self, z: Tensor) -> Tensor:
        """The id (B, h, w) int32 of the entry nearest to each vector; of two as near, the lower."""
        flat = ops.cast(ops.stop_gradient(z), ms.float32).transpose(0, 2, 3, 1).reshape(-1, z.shape[1])
        table = ops.stop_gradient(self.table())
        distances = ops.square(table).sum(1) - 2 * ops.matmul(flat, table.T)  # |z - e|^2 - |z|^2: (B h w, n_embed)
        return ops.cast(ops.argmin(distances, 1), ms.int32).reshape(z.shape[0], *z.shape[2:])

    def table(self) -> Tensor:
        """The entries (n_embed, embed_dim)."""
        return read(self.embedding.weight, self.embedding.weight_slot)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the call, with ids (B, h, w) into the whole codebook."""
        z, ids = ops.cast(z, ms.float32), self.nearest(z)
        entries = self.entries(ids)
        to_encoder, to_codebook = self.weights
        loss = to_encoder * ops.square(ops.stop_gradient(entries) - z).mean()
        loss = loss + to_codebook * ops.square(entries - ops.stop_gradient(z)).mean()
        return z + ops.stop_gradient(entries - z), loss, ids

    def entries(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) into the whole codebook -> (B, embed_dim, h, w)."""
        return rows(self.table(), ids.reshape(-1)).reshape(*ids.shape, -1).transpose(0, 3, 1, 2)

    def remap_to_used(self, ids: Tensor, random: Tensor | None = None) -> Tensor:
        """Ids (B, ...) into the whole codebook -> positions in the remap, and `unknown_index` for an id that is not in it;
        if that is "random", `random` (B, ...) int32, positions that the caller draws. Raises ValueError without them."""
        matches = ops.cast(ids.expand_dims(-1) == self.used, ms.int32)
        unknown = self.used.shape[0] if self.unknown_index == "extra" else self.unknown_index
        if unknown == "random":
            if random is None:
                raise ValueError("unknown_index is random: give random positions, or choose extra or a number")
            unknown = random
        return ops.cast(ops.where(matches.sum(-1) > 0, matches.argmax(-1), unknown), ms.int32)

    def unmap_to_all(self, ids: Tensor) -> Tensor:
        """Positions in the remap -> ids into the whole codebook; the extra position -> the first of the remap."""
        return ops.gather(self.used, ops.where(ids < self.used.shape[0], ids, 0), 0)

    def get_codebook_entry(self, ids: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """The entries of ids as the call returns them: (..., embed_dim), or for a shape (B, h, w, embed_dim) of them
        (B, embed_dim, h, w)."""
        ids = ids if self.used is None else self.unmap_to_all(ids)
        if shape is not None:
            return self.entries(ids.reshape(shape[:3]))
        return rows(self.table(), ids.reshape(-1)).reshape(*ids.shape, -1)

    def construct(self, z: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, ids = self.quantize(z)
        if self.used is not None:
            ids = self.remap_to_used(ids, random)
        if not self.sane_index_shape:
            ids = ids.reshape(-1) if self.used is None else ids.reshape(-1, 1)
        return quantized, loss, ids


def read_remap(path: str, n_embed: int) -> np.ndarray:
    """The ids of a codebook in a .npy file, (K,) int32. Raises UserError if it cannot be read, or does not hold such ids."""
    try:
        ids = load_npy(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < n_embed:
        raise UserError(f"{path} is not a list of ids of a codebook: save whole numbers (K,) from 0 to {n_embed - 1}")
    return ids.astype(np.int32)


def codebook_use(ids: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """The perplexity () of the entries with these ids, e to the entropy of their shares, and the number () of entries that
    occur, both float32. The perplexity is n_embed where all occur equally often, and 1 where there is one."""
    counts = ops.unsorted_segment_sum(ops.ones(ids.size, ms.float32), ids.reshape(-1), n_embed)
    shares = counts / ids.size
    return ops.exp(-(shares * ops.log(shares + 1e-10)).sum()), ops.cast(counts > 0, ms.float32).sum()


class ResnetBlock(nn.Cell):
    """GroupNorm, SiLU and 3x3 convolution twice, dropout before the second convolution, and a shortcut (He et al. 2016,
    fig. 4e): (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32, dropout: float = 0.0, level: int = 0):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, EPS, "silu-after")
        self.conv1 = conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, EPS, "silu-after")
        self.dropout = Dropout(dropout, c_out, level)
        self.conv2 = conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = conv2d(c_in, c_out, 1) if c_in != c_out else Identity()

    def construct(self, x: Tensor) -> Tensor:
        h = norm_conv(self.norm1, self.conv1, x)
        return self.nin_shortcut(x) + self.conv2(self.dropout(self.norm2(h)))


class AttnBlock(nn.Cell):
    """GroupNorm, self-attention with one head (Vaswani et al. 2017, eq. 1), shortcut: (B, channels, H, W) -> the same."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS)
        self.q, self.k, self.v = [conv2d(channels, channels, 1) for _ in range(3)]
        self.proj_out = conv2d(channels, channels, 1)

    def construct(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = split_heads(ops.concat((self.q(h), self.k(h), self.v(h)), 1), 1)  # (B, 1, C, N), N = H W
        out = attend(q, k, v, x.shape[1] ** -0.5)  #                                   (B, 1, C, N)
        return x + self.proj_out(out.reshape(x.shape))


class LinAttnBlock(nn.Cell):
    """Attention with one head, at a cost linear in H W: (B, channels, H, W) -> the same.

    As in the original, softmax applies to the keys alone (cf. Shen et al. 2018, eq. 4); there is no norm and no shortcut.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = conv2d(channels, channels, 1)

    def construct(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.to_qkv(x), 1)  #         (B, 1, C, N), N = H W
        out = matmul(matmul_t(v, ops.softmax(k, -1)), q)  # (B, 1, C, C), over the positions, times q
        return self.to_out(out.reshape(x.shape))


def attention(kind: str, channels: int, groups: int) -> nn.Cell:
    """The layer for `AutoencoderConfig.attention`: (B, channels, H, W) -> the same."""
    if kind == "vanilla":
        return AttnBlock(channels, groups)
    return LinAttnBlock(channels) if kind == "linear" else Identity()


class Downsample(nn.Cell):
    """Halve H and W by a 3x3 convolution, or without `with_conv` by the mean of 2x2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = conv2d(channels, channels, 3, stride=2) if with_conv else None

    def construct(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return ops.avg_pool2d(x, 2, 2)
        return self.conv(pad_bottom_right(x))


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of an AutoencoderKL; the defaults are Stable Diffusion's."""

    ch: Annotated[int, Bounds(1, 2**20)] = 128
    """Base width: channels after the encoder's first convolution."""
    ch_mult: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], NOT_EMPTY] = (1, 2, 4, 4)
    """Width of each level as a multiple of ch; H and W halve between levels."""
    num_res_blocks: Annotated[int, DEPTH] = 2
    """ResnetBlocks per level of the encoder; the decoder has one more per level."""
    attn_resolutions: tuple[Annotated[int, AT_LEAST_1], ...] = ()
    """Resolutions H = W at which attention follows every ResnetBlock; the middle always has attention."""
    dropout: Annotated[float, Bounds(0, 1, high_open=True)] = 0.0
    """Dropout rate in training, that is after `set_train()`, which must precede compilation; `layers.Masks` draws what is
    dropped."""
    channels: Annotated[int, AT_LEAST_1] = 3
    """Image channels: 1 gray, 3 RGB."""
    out_channels: Annotated[int, AT_LEAST_1] | None = None
    """Channels of the decoder's images; by default those of the encoder's."""
    resolution: Annotated[int, AT_LEAST_1] = 256
    """H and W of the images. The networks accept other sizes too; attn_resolutions refer to this one."""
    z_channels: Annotated[int, AT_LEAST_1] = 4
    """Channels between encoder and decoder, without those of the log-variances."""
    embed_dim: Annotated[int, AT_LEAST_1] = 4
    """Channels of the latent z: one 1x1 convolution maps z_channels to embed_dim, another one maps back."""
    attention: Literal["vanilla", "linear", "none"] = "vanilla"
    """AttnBlock, LinAttnBlock, or no attention."""
    resamp_with_conv: bool = True
    """Resample with 3x3 convolutions, instead of averaging and repeating pixels."""
    tanh_out: bool = False
    """Apply tanh to the decoder's output."""
    groups: Annotated[int, AT_LEAST_1] = 32
    """Groups of GroupNorm; every level's channels must be divisible by it."""

    @property
    def size_multiple(self) -> int:
        """f, the ratio of image size to latent size: H and W of images must be divisible by it."""
        return 2 ** (len(self.ch_mult) - 1)

    def build(self, seed: int = 0) -> "AutoencoderKL | VQModel":
        return AutoencoderKL(self, seed)


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """Configuration of a VQModel; the defaults are those of the published vq-f4."""

    ch_mult: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], NOT_EMPTY] = (1, 2, 4)
    z_channels: Annotated[int, AT_LEAST_1] = 3
    embed_dim: Annotated[int, AT_LEAST_1] = 3
    n_embed: Annotated[int, AT_LEAST_1] = 8192
    """Entries of the codebook, vectors of embed_dim numbers."""
    beta: Annotated[float, NON_NEGATIVE] = 0.25
    """Weight of a term of the codebook's loss; see legacy."""
    legacy: bool = True
    """beta weights what moves the codebook, as in the published models; otherwise what moves the encoder."""
    remap: str | None = None
    """File .npy of the ids that occur, (K,) whole numbers: ids are then positions in this list."""
    unknown_index: Literal["random", "extra"] | Annotated[int, NON_NEGATIVE] = "random"
    """What stands for an id that is not in the list of remap: a random position in it, one beyond its end, or this one."""
    sane_index_shape: bool = True
    """Ids are (B, h, w); otherwise (B h w,)."""

    def build(self, seed: int = 0) -> "VQModel":
        return VQModel(self, seed)


class Middle(nn.Cell):
    """Two ResnetBlocks with attention between them: (B, width, H, W) -> the same."""

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        options = {"groups": config.groups, "dropout": config.dropout, "level": len(config.ch_mult) - 1}
        self.block_1 = ResnetBlock(width, width, **options)
        self.attn_1 = attention(config.attention, width, config.groups)
        self.block_2 = ResnetBlock(width, width, **options)

    def construct(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Cell):
    """`num_blocks` ResnetBlocks, each followed by attention if the size of level i is in `config.attn_resolutions`, then one
    of the resamplers, or none: (B, c_in, H, W) -> (B, c_out, H', W')."""

    def __init__(self, config: AutoencoderConfig, i: int, c_in: int, c_out: int, num_blocks: int, down=False, up=False):
        super().__init__()
        kind = config.attention if config.resolution // 2**i in config.attn_resolutions else "none"
        widths = [c_in] + [c_out] * (num_blocks - 1)
        self.block = nn.CellList([ResnetBlock(c, c_out, config.groups, config.dropout, i) for c in widths])
        self.attn = nn.CellList([attention(kind, c_out, config.groups) for _ in widths])
        self.downsample = Downsample(c_out, config.resamp_with_conv) if down else Identity()
        self.upsample = UpsampleNearest(c_out, config.resamp_with_conv) if up else Identity()

    def construct(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = self.attn[i](block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Cell):
    """Images (B, channels, H, W) -> (B, 2 z_channels, H/f, W/f), or (B, z_channels, H/f, W/f) without `double_z`."""

    def __init__(self, config: AutoencoderConfig, double_z: bool = True):
        super().__init__()
        widths = [config.ch, *[config.ch * m for m in config.ch_mult]]
        self.conv_in = conv2d(config.channels, config.ch, 3, padding=1)
        self.down = nn.CellList()
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            self.down.append(Level(config, i, c_in, c_out, config.num_res_blocks, down=i < len(config.ch_mult) - 1))
        self.mid = Middle(config, widths[-1])
        self.norm_out = GroupNorm(config.groups, widths[-1], EPS, "silu-after")
        self.conv_out = conv2d(widths[-1], config.z_channels * (2 if double_z else 1), 3, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return norm_conv(self.norm_out, self.conv_out, self.mid(x))


class Decoder(nn.Cell):
    """(B, z_channels, h, w) -> images (B, out_channels, f h, f w).

    With `give_pre_end` it returns the features (B, ch ch_mult[0], f h, f w) before the last norm and convolution; both still
    have their parameters.
    """

    def __init__(self, config: AutoencoderConfig, give_pre_end: bool = False):
        super().__init__()
        self.give_pre_end, self.tanh_out = give_pre_end, config.tanh_out
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.CellList()  # in the encoder's order, from the largest images to the smallest
        for i, (c_out, c_in) in enumerate(pairwise([*widths, widths[-1]])):
            self.up.append(Level(config, i, c_in, c_out, config.num_res_blocks + 1, up=i > 0))
        self.norm_out = GroupNorm(config.groups, widths[0], EPS, "silu-after")
        self.conv_out = conv2d(widths[0], config.out_channels or config.channels, 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """The input of the last norm and convolution."""
        x = self.mid(self.conv_in(z))
        for i in range(len(self.up) - 1, -1, -1):
            x = self.up[i](x)
        return x

    def last(self, x: Tensor) -> Tensor:
        """Features -> images."""
        x = norm_conv(self.norm_out, self.conv_out, x)
        return ops.tanh(x) if self.tanh_out else x

    def construct(self, z: Tensor) -> Tensor:
        return self.features(z) if self.give_pre_end else self.last(self.features(z))


class Autoencoder(nn.Cell):
    """What both kinds share. `parts` is 2 if the encoder also gives log-variances, and 1 otherwise.

    A kind says how a latent is made of what `encode` gives, sample_latent(encoded, noise), and whether that needs noise."""

    quantize: "VectorQuantizer | None"
    needs_noise: bool
    sample_latent: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: AutoencoderConfig, parts: int):
        super().__init__()
        check_fields(config, "")
        if config.resolution % config.size_multiple:
            wrong = f"a resolution of {config.resolution} cannot be halved {len(config.ch_mult) - 1} times"
            raise ValueError(f"{wrong}: choose a multiple of {config.size_multiple}, or a shorter ch_mult")
        self.encoder, self.decoder = Encoder(config, parts == 2), Decoder(config)
        self.quant_conv = conv2d(parts * config.z_channels, parts * config.embed_dim, 1)
        self.post_quant_conv = conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images -> (B, parts embed_dim, h, w), what `sample_latent` makes latents of."""
        return ops.cast(self.quant_conv(self.encoder(x)), ms.float32)

    def decode_latent(self, z: Tensor) -> Tensor:
        """z as the decoder takes it -> images."""
        return ops.cast(self.decoder(self.post_quant_conv(z)), ms.float32)

    @property
    def last_layer(self) -> Parameter:
        """The weight whose gradients balance the adversarial and the reconstruction loss (Esser et al. 2021, eq. 7)."""
        return self.decoder.conv_out.weight


class AutoencoderKL(Autoencoder):
    """Images x (B, channels, H, W) in [-1, 1] and their latents z (B, embed_dim, h, w), h = H / f and w = W / f.

    ``net(x, noise)`` -> reconstruction (B, out_channels, H, W), moments of q(z | x) (B, 2 embed_dim, h, w), which `encode`
    gives too. The reconstruction decodes the sample for the noise (B, embed_dim, h, w), or the mode without noise. `seed`
    determines the initial weights.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: a width is not divisible by the groups, or the resolution by `size_multiple`.
    """

    needs_noise, sample_latent = True, staticmethod(gaussian_sample)

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig(), seed: int = 0):
        super().__init__(config, parts=2)
        self.quantize = None
        name_and_initialise(self, seed)

    def decode(self, z: Tensor) -> Tensor:
        """z -> images."""
        return self.decode_latent(z)

    def construct(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moments = self.encode(x)
        z = gaussian_mode(moments) if noise is None else gaussian_sample(moments, noise)
        return self.decode(z), moments


def same_latent(z: Tensor, noise: Tensor | None = None) -> Tensor:
    """z, which is no distribution: `gaussian_sample` of a VQModel."""
    return z


class VQModel(Autoencoder):
    """Images x (B, channels, H, W) in [-1, 1] and their latents z (B, embed_dim, h, w), h = H / f and w = W / f, for which
    the decoder gets the nearest entries of a codebook (Esser et al. 2021, section 3.1).

    ``net(x, random)`` -> reconstruction (B, out_channels, H, W), codebook loss (), ids: see `VectorQuantizer`. `seed`
    determines the initial weights.

    A diffusion works on what `encode` gives, the vectors before quantization, and `decode` quantizes, as VQModelInterface of
    the original does.

    Raises:
        UserError: a field of the configuration is out of range, or its remap cannot be read.
        ValueError: a width is not divisible by the groups, or the resolution by `size_multiple`.
    """

    needs_noise, sample_latent = False, staticmethod(same_latent)

    def __init__(self, config: VQConfig = VQConfig(), seed: int = 0):
        super().__init__(config, parts=1)
        self.quantize = VectorQuantizer(config)
        name_and_initialise(self, seed)
        entries, bound = self.quantize.embedding.weight, 1 / config.n_embed
        values = np.random.default_rng((seed, 1)).uniform(-bound, bound, entries.shape)
        entries.set_data(Tensor(values.astype(np.float32)))

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """z, quantized unless `force_not_quantize`, -> images."""
        return self.decode_latent(z if force_not_quantize else self.quantize.quantize(z)[0])

    def ids(self, x: Tensor) -> Tensor:
        """Images -> ids (B, h, w) int32 into the whole codebook."""
        return self.quantize.nearest(self.encode(x))

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) int32 into the whole codebook -> images."""
        return self.decode_latent(self.quantize.entries(ids))

    def construct(self, x: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, ids = self.quantize(self.encode(x), random)
        return self.decode_latent(quantized), loss, ids
