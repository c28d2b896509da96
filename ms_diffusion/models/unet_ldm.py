"""The conditional U-Net of guided diffusion (Dhariwal & Nichol 2021, section 3) and latent diffusion (Rombach et al. 2022,
section 3.3): attention at chosen resolutions, conditioned on timestep, class and a context such as the words of a text.

The layers come first, then the transformer, then the network. Parameter paths are those of CompVis latent-diffusion, whose
``TimestepEmbedSequential`` is a list here: every layer of a block takes (x, emb, context) and uses what it needs.
B, N, L: batch, positions of the image (H W), entries of the context.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.mint.nn import functional as F

from ..fields import AT_LEAST_1, DEPTH, NOT_EMPTY, POSITIVE, Bounds, check_fields
from . import layers
from .attention import LOWEST, attend, heads_first, matmul, matmul_t, softmax, split_heads
from .layers import (
    GELU,
    Dropout,
    Embedding,
    GroupNorm,
    Identity,
    Linear,
    UpsampleNearest,
    ascend,
    check_weights,
    chunk,
    conv2d,
    name_and_initialise,
    norm_conv,
    pad_bottom_right,
    read,
)

TimestepEmbedding = partial(layers.SinusoidalPositionEmbeddings, cosines_first=True)


class Conv1d(nn.Conv2d):
    """``torch.nn.Conv1d`` along the last axis, padded by half the kernel: (B, c_in, H, W) -> (B, c_out, H, W / stride); the
    weight is (c_out, c_in, kernel)."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1):
        check_weights(c_out, c_in, kernel)
        super().__init__(c_in, c_out, 1, has_bias=True)
        self.weight = Parameter(Tensor(np.zeros((c_out, c_in, kernel), np.float32)), name="weight")
        self.weight_slot = self.bias_slot = self.norm_kernel = None
        self.compute_type = ms.float32
        self.steps: Any = (1, stride)
        self.border: Any = (0, kernel // 2)

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = read(self.weight, self.weight_slot), read(self.bias, self.bias_slot)
        x, bias = ops.cast(x, self.compute_type), ops.cast(bias, self.compute_type)
        weight = ops.cast(weight.expand_dims(2), self.compute_type)
        if ascend():
            return F.conv2d(x, weight, bias, self.steps, self.border)
        return ops.conv2d(x, weight, bias, self.steps, "pad", self.border)


def conv3(c_in: int, c_out: int, dims: int = 2, stride: int = 1) -> nn.Cell:
    """A convolution of 3 or 3 x 3, padded by 1: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride), or (B, c_out, 1, W /
    stride) if H and `dims` are 1."""
    return Conv1d(c_in, c_out, 3, stride) if dims == 1 else conv2d(c_in, c_out, 3, stride, padding=1)


class Downsample(nn.Cell):
    """Halve H and W by a strided convolution, or by the mean of 2 x 2: (B, C, H, W) -> (B, C, H/2, W/2). H stays 1 if `dims`
    is 1. The convolution pads all sides or, with `pad_right`, the bottom and the right."""

    def __init__(self, channels: int, with_conv: bool, dims: int = 2, pad_right: bool = False):
        super().__init__()
        size, self.pad_right = (dims, 2), pad_right and with_conv
        self.op = conv3(channels, channels, dims, 2) if with_conv else nn.AvgPool2d(size, size)
        if self.pad_right:
            self.op = conv2d(channels, channels, 3, stride=2)

    def construct(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.op(pad_bottom_right(x) if self.pad_right else x)


class ResBlock(nn.Cell):
    """Two 3x3 convolutions and a shortcut: x (B, c_in, H, W), emb (B, emb_channels) -> (B, c_out, H', W').

    The embedding is added between the convolutions or, with `scale_shift`, scales and shifts the second norm (Dhariwal &
    Nichol 2021, section 3.1). `resample`, a Downsample or UpsampleNearest without convolution, applies to the shortcut and
    before the first convolution. `level` is that of the output (`Dropout`). With `use_conv` the shortcut that changes the
    number of channels is a convolution of 3 x 3 instead of 1 x 1. In a series, `dims` and H are 1.
    """

    def __init__(self, c_in: int, c_out: int, emb_channels: int, groups=32, dropout=0.0, level=0,
            scale_shift=False, resample=None, use_conv=False, dims=2, eps=1e-5):  # fmt: skip
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        norm1, norm2 = [GroupNorm(groups, c, eps, "silu-after") for c in (c_in, c_out)]
        # The norms and Linear compute SiLU; an Identity keeps its number in the parameters' names
        self.in_layers = nn.SequentialCell(norm1, Identity(), conv3(c_in, c_out, dims))
        self.emb_layers = nn.SequentialCell(Identity(), Linear(emb_channels, c_out * 2 if scale_shift else c_out, "silu"))
        drop = Dropout(dropout, c_out, level)
        self.out_layers = nn.SequentialCell(norm2, Identity(), drop, conv3(c_out, c_out, dims))
        self.skip_connection = Identity()
        if c_in != c_out:
            conv1 = conv2d(c_in, c_out, 1) if dims == 2 else Conv1d(c_in, c_out)
            self.skip_connection = conv3(c_in, c_out, dims) if use_conv else conv1

    def construct(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        if self.resample is None:
            h = norm_conv(self.in_layers[0], self.in_layers[2], x)
        else:
            h = self.in_layers[2](self.resample(self.in_layers[0](x)))
            x = self.resample(x)
        emb = self.emb_layers(emb)
        if self.scale_shift:
            scale, shift = chunk(emb, 2, 1)
            h = self.out_layers[0](h, scale, shift)
        else:
            h = self.out_layers[0](h + emb.expand_dims(-1).expand_dims(-1))
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[2](h))


class AttentionBlock(nn.Cell):
    """Multi-head self-attention over all positions, and a shortcut: (B, C, H, W) -> the same.

    The channels of qkv are ordered (head, q k v, d), or (q k v, head, d) in the `new_order`.
    """

    def __init__(self, channels: int, heads: int, groups: int = 32, new_order: bool = False, eps: float = 1e-5):
        super().__init__()
        self.heads, self.new_order, self.scale, self.lean = heads, new_order, (channels // heads) ** -0.5, False
        self.norm = GroupNorm(groups, channels, eps)
        self.qkv = Conv1d(channels, 3 * channels)
        self.proj_out = Conv1d(channels, channels)

    def construct(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        if self.new_order:
            q, k, v = split_heads(qkv, self.heads)  #       (B, h, d, N)
        else:
            qkv = ops.cast(qkv, ms.float32).reshape(b, self.heads, -1, height * width)
            q, k, v = chunk(qkv, 3, 2)  # (B, h, d, N)
        out = attend(q, k, v, self.scale, self.lean)  #     (B, h, d, N)
        return x + self.proj_out(out.reshape(x.shape))


class LayerNorm(nn.Cell):
    """``torch.nn.LayerNorm`` over the last axis, in float32: (B, N, dim) -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(dim, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(dim, np.float32)), name="bias")
        self.weight_slot = self.bias_slot = None
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=1e-5)

    def construct(self, x: Tensor) -> Tensor:
        x, weight, bias = ops.cast(x, ms.float32), read(self.weight, self.weight_slot), read(self.bias, self.bias_slot)
        if ascend():
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
        return self.norm(x, weight, bias)[0]


class CrossAttention(nn.Cell):
    """Multi-head attention from x to the context, or to x itself without a context (Rombach et al. 2022, section 3.3).

    x (B, N, query_dim), context (B, L, context_dim) -> (B, N, query_dim). Entries of the context where `mask` (B, L), bool,
    is False are not attended to; a row without any True attends to all alike.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.scale, self.lean = heads, dim_head**-0.5, False
        inner, dims = heads * dim_head, (query_dim, context_dim, context_dim)
        self.to_q, self.to_k, self.to_v = [Linear(dim, inner, bias=False) for dim in dims]
        self.to_out = nn.SequentialCell(Linear(inner, query_dim))

    def construct(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = heads_first(self.to_q(x), self.heads)  #          (B, h, N, d)
        k = heads_first(self.to_k(context), self.heads)  #    (B, h, L, d)
        v = heads_first(self.to_v(context), self.heads)  #    (B, h, L, d)
        scores = matmul_t(q * self.scale, k)  #               (B, h, N, L)
        if mask is not None:
            scores = ops.masked_fill(scores, ops.logical_not(mask).expand_dims(1).expand_dims(1), LOWEST)
        out = matmul(softmax(scores, self.lean), v)  #        (B, h, N, d)
        b, n, _ = x.shape
        return self.to_out(out.transpose(0, 2, 1, 3).reshape(b, n, -1))


class GEGLU(nn.Cell):
    """A linear layer times the GELU of another one (Shazeer 2020, eq. 6): (B, N, dim) -> (B, N, dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj, self.gelu = Linear(dim, 2 * dim_out), GELU()

    def construct(self, x: Tensor) -> Tensor:
        x, gate = chunk(self.proj(x), 2, -1)
        return x * self.gelu(gate)


class FeedForward(nn.Cell):
    """GEGLU to four times the width, or if not `gated` a linear layer and GELU, then a linear layer back to dim: (B, N, dim)
    -> the same."""

    def __init__(self, dim: int, gated: bool = True):
        super().__init__()
        first = GEGLU(dim, 4 * dim) if gated else nn.SequentialCell(Linear(dim, 4 * dim), GELU())
        self.net = nn.SequentialCell(first, Identity(), Linear(4 * dim, dim))  # Identity: CompVis's dropout

    def construct(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, attention to the context, feed-forward; each has a norm before it and a shortcut.

    x (B, N, dim), context (B, L, context_dim), or None for x itself -> (B, N, dim).
    """

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None = None, gated: bool = True):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, dim_head)
        self.ff = FeedForward(dim, gated)
        self.attn2 = CrossAttention(dim, context_dim or dim, heads, dim_head)
        self.norm1, self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim), LayerNorm(dim)

    def construct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the positions of an image, and a shortcut (Rombach et al. 2022, appendix E.2.1).

    x (B, C, H, W), context (B, L, context_dim), or None for x itself -> (B, C, H, W). The blocks are heads dim_head wide.
    """

    def __init__(self, channels: int, heads: int, depth: int = 1, context_dim: int | None = None, groups: int = 32,
            dim_head: int | None = None):  # fmt: skip
        super().__init__()
        dim_head = dim_head or channels // heads
        inner = heads * dim_head
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = conv2d(channels, inner, 1)
        blocks = [BasicTransformerBlock(inner, heads, dim_head, context_dim) for _ in range(depth)]
        self.transformer_blocks = nn.CellList(blocks)
        self.proj_out = conv2d(inner, channels, 1)

    def construct(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        b, _, height, width = x.shape
        h = norm_conv(self.norm, self.proj_in, x)
        h = h.reshape(b, -1, height * width).transpose(0, 2, 1)  #                         (B, N, heads dim_head)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(0, 2, 1).reshape(b, -1, height, width))  #    (B, C, H, W)


@dataclass(frozen=True)
class UNetModelConfig:
    """Configuration of a UNetModel; the names are CompVis's."""

    in_channels: Annotated[int, AT_LEAST_1]
    """Channels of x."""
    model_channels: Annotated[int, AT_LEAST_1]
    """Base width; the embedding is four times as wide."""
    out_channels: Annotated[int, AT_LEAST_1]
    """Channels of the output."""
    num_res_blocks: Annotated[int, DEPTH]
    """ResBlocks per level on the way down; on the way up there is one more."""
    attention_resolutions: tuple[Annotated[int, AT_LEAST_1], ...]
    """Reductions of H and W at which attention follows each ResBlock: (4, 2) is at a quarter and at half of the size."""
    dropout: Annotated[float, Bounds(0, 1, high_open=True)] = 0.0
    """Dropout rate in ResBlocks in training; `layers.Masks` draws what is dropped."""
    channel_mult: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], NOT_EMPTY] = (1, 2, 4, 8)
    """Width of each level as a multiple of model_channels; H and W halve between levels."""
    conv_resample: bool = True
    """Convolve where H and W are halved or doubled."""
    num_classes: Annotated[int, AT_LEAST_1] | None = None
    """Number of classes, embedded and added to the time embedding; None: no class condition."""
    recompute: bool = False
    """Recompute ResBlocks and attention for the gradient instead of storing their activations: less memory, more time.
    With our CPU kernels it applies to attention only: MindSpore does not find their gradients in recomputed cells."""
    num_heads: Annotated[int, AT_LEAST_1] | None = None
    """Number of attention heads; used where num_head_channels is None."""
    num_heads_upsample: Annotated[int, AT_LEAST_1] | None = None
    """Number of heads of AttentionBlocks on the way up, in place of num_heads."""
    num_head_channels: Annotated[int, AT_LEAST_1] | None = None
    """Channels per attention head; the number of heads follows from the width."""
    use_scale_shift_norm: bool = False
    """Scale and shift the second norm of a ResBlock by the embedding, instead of adding the embedding."""
    resblock_updown: bool = False
    """Halve and double H and W inside a ResBlock."""
    use_new_attention_order: bool = False
    """Order the channels of an AttentionBlock as (q k v, head), instead of (head, q k v)."""
    use_spatial_transformer: bool = False
    """Use SpatialTransformers, which attend to the context, instead of AttentionBlocks."""
    transformer_depth: Annotated[int, DEPTH] = 1
    """Transformer blocks per SpatialTransformer."""
    context_dim: Annotated[int, AT_LEAST_1] | None = None
    """Width of a context entry; None: no context."""
    n_embed: Annotated[int, AT_LEAST_1] | None = None
    """Return logits over a codebook of this many entries, instead of out_channels."""
    groups: Annotated[int, AT_LEAST_1] = 32
    """Groups of GroupNorm."""
    legacy: bool = True
    """CompVis's older rules for heads. Otherwise each head of a SpatialTransformer has num_head_channels, also where the
    width is no multiple of it, and num_heads_upsample is not used."""
    dims: Annotated[int, Bounds(1, 2)] = 2
    """Dimensions of x: 2 for images (B, C, H, W), 1 for series (B, C, L)."""
    sines_first: bool = False
    """Sines before cosines in the timestep embedding, at the frequencies of Ho et al. 2020: networks of diffusers with
    flip_sin_to_cos False and freq_shift 1."""
    pad_right: bool = False
    """Pad the bottom and the right, not all sides, where a convolution halves H and W, as Ho et al. 2020: networks of
    diffusers with downsample_padding 0."""
    norm_eps: Annotated[float, POSITIVE] = 1e-5
    """epsilon of GroupNorm, but in a SpatialTransformer."""

    @property
    def size_multiple(self) -> int:
        """H and W of the images must be divisible by this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int, up: bool = False) -> tuple[int, int]:
        """Number of attention heads of a layer with this many channels, perhaps on the way up, and the channels of each.
        Raises ValueError if these are not all channels, which a SpatialTransformer can do without, or none."""
        size, count = self.num_head_channels, self.num_heads or 1
        what = "num_head_channels" if size else "num_heads"
        if up and self.num_heads_upsample and self.legacy and not size and not self.use_spatial_transformer:
            what, count = "num_heads_upsample", self.num_heads_upsample
        heads = channels // size if size else count
        width = size if size and not self.legacy else channels // max(heads, 1)
        if not heads or not width or not self.use_spatial_transformer and heads * (size or width) != channels:
            divisor = size or count
            raise ValueError(f"{channels} channels are not divisible into heads by {what} {divisor}: choose a divisor")
        return heads, width

    def build(self, seed: int | None = 0) -> "UNetModel":
        return UNetModel(self, seed)


class UNetModel(nn.Cell):
    """Predict from a noisy x (B, in_channels, H, W) float32 at timestep t (B,) int32: -> (B, out_channels, H, W) float32,
    or with n_embed -> (B, n_embed, H, W). If dims is 1, x and the output are (B, channels, L).

    A network with context_dim takes a context (B, L, context_dim) float32, one with num_classes takes y (B,) int32 in
    [0, num_classes). `seed` determines the initial weights. The last convolution of each block and of the network is zero,
    so that a new block returns its shortcut and a new network returns 0.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: at construction, context_dim without use_spatial_transformer or the reverse, neither num_heads nor
            num_head_channels, channels not divisible into heads or groups, transformers or pad_right for a series,
            sines_first with an odd width; in a call, a
            missing or superfluous context or y, or H or W not divisible by size_multiple.
    """

    def __init__(self, config: UNetModelConfig, seed: int | None = 0):
        super().__init__()
        check_fields(config, "")
        transformer, context_dim = config.use_spatial_transformer, config.context_dim
        if transformer != (context_dim is not None):
            raise ValueError(f"use_spatial_transformer is {transformer} and context_dim {context_dim}: set both or neither")
        if config.num_heads is None and config.num_head_channels is None:
            raise ValueError("attention needs a number of heads: set num_heads or num_head_channels")
        if transformer and config.dims == 1:
            raise ValueError("a SpatialTransformer is for images: set dims to 2, or use_spatial_transformer to False")
        if config.sines_first and (config.model_channels % 2 or config.model_channels < 4):
            raise ValueError("sines_first needs an even number of model_channels, at least 4")
        if config.pad_right and config.dims == 1:
            raise ValueError("pad_right is for images: set dims to 2, or pad_right to False")
        self.config, self.size_multiple = config, config.size_multiple
        self.size_message = f"H and W must be divisible by {self.size_multiple}: choose another image size"
        self.takes_context, self.takes_label = transformer, config.num_classes is not None
        width, emb_channels, groups = config.model_channels, 4 * config.model_channels, config.groups
        options = {"groups": groups, "dropout": config.dropout, "scale_shift": config.use_scale_shift_norm}
        dims = self.dims = config.dims
        block = partial(ResBlock, emb_channels=emb_channels, dims=dims, eps=config.norm_eps, **options)
        halve = partial(Downsample, dims=dims, pad_right=config.pad_right)

        def attention(channels, up=False):
            heads, dim_head = config.heads(channels, up)
            if transformer:
                return SpatialTransformer(channels, heads, config.transformer_depth, context_dim, groups, dim_head)
            return AttentionBlock(channels, heads, groups, config.use_new_attention_order, config.norm_eps)

        def stage(c_in, c_out, level, up=False):
            return [block(c_in, c_out, level=level)] + (
                [attention(c_out, up)] if 2**level in config.attention_resolutions else []
            )

        def enlarge(channels, with_conv):
            return UpsampleNearest(channels, conv3(channels, channels, dims) if with_conv else None, rows=dims)

        def resample(kind, channels, level):
            if config.resblock_updown:
                return block(channels, channels, level=level, resample=kind(channels, with_conv=False))
            return kind(channels, with_conv=config.conv_resample)

        # Timestep and class: -> (B, 4 model_channels)
        self.timestep_embedding = TimestepEmbedding(width, cosines_first=not config.sines_first)
        linear1, linear2 = Linear(width, emb_channels), Linear(emb_channels, emb_channels, "silu")
        self.time_embed = nn.SequentialCell(linear1, Identity(), linear2)
        self.label_emb = Embedding(config.num_classes, emb_channels) if config.num_classes is not None else None

        # Down
        self.input_blocks = nn.CellList([nn.CellList([conv3(config.in_channels, width, dims)])])
        skips, channels = [width], width
        for level, mult in enumerate(config.channel_mult):
            if level > 0:
                self.input_blocks.append(nn.CellList([resample(halve, channels, level)]))
                skips.append(channels)
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.CellList(stage(channels, mult * width, level)))
                channels = mult * width
                skips.append(channels)

        # Middle
        first, second = [block(channels, channels, level=len(config.channel_mult) - 1) for _ in range(2)]
        self.middle_block = nn.CellList([first, attention(channels), second])

        # Up: the input of each block is concatenated with the output of its mirror image on the way down
        self.output_blocks = nn.CellList()
        for level, mult in reversed([*enumerate(config.channel_mult)]):
            for i in range(config.num_res_blocks + 1):
                self.output_blocks.append(nn.CellList(stage(channels + skips.pop(), mult * width, level, up=True)))
                channels = mult * width
                if level > 0 and i == config.num_res_blocks:
                    self.output_blocks[-1].append(resample(enlarge, channels, level - 1))

        # CompVis keeps an unused `out` beside the codebook's predictor, so its weights contain both
        norm = GroupNorm(groups, channels, config.norm_eps, "silu-after")
        self.out = nn.SequentialCell(norm, Identity(), conv3(channels, config.out_channels, dims))
        self.id_predictor = None
        if config.n_embed:
            conv1 = conv2d(channels, config.n_embed, 1) if dims == 2 else Conv1d(channels, config.n_embed)
            self.id_predictor = nn.SequentialCell(GroupNorm(groups, channels, config.norm_eps), conv1)
        name_and_initialise(self, seed)  # then zeros in the last convolution of each block and of the network
        for p in self.get_parameters():
            if p.name.rpartition(".")[0].endswith(("out_layers.3", "proj_out")) or p.name.startswith("out.2."):
                p.set_data(Tensor(np.zeros(p.shape, np.float32)))
        if config.recompute:
            for _, cell in list(self.cells_and_names()):
                if isinstance(cell, ResBlock | AttentionBlock | BasicTransformerBlock):
                    cell.recompute()
                if isinstance(cell, AttentionBlock | CrossAttention):
                    cell.lean = True

    def construct(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if self.takes_context != (context is not None):
            raise ValueError("context is required by a network with context_dim, and accepted by no other")
        if self.takes_label != (y is not None):
            raise ValueError("y is required by a network with num_classes, and accepted by no other")
        if self.dims == 1:
            x = x.expand_dims(2)  # (B, C, 1, L)
        elif x.shape[2] % self.size_multiple != 0:
            raise ValueError(self.size_message)
        if x.shape[3] % self.size_multiple != 0:
            raise ValueError(self.size_message)

        emb = self.time_embed(self.timestep_embedding(ops.cast(t, ms.float32)))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        # Down
        x = self.input_blocks[0][0](x)
        skips = (x,)  # newest first
        for i in range(1, len(self.input_blocks)):
            for layer in self.input_blocks[i]:
                x = layer(x, emb, context)
            skips = (x,) + skips

        # Middle
        for layer in self.middle_block:
            x = layer(x, emb, context)

        # Up
        for i, block in enumerate(self.output_blocks):
            x = ops.concat((x, skips[i]), 1)
            for layer in block:
                x = layer(x, emb, context)

        last = self.out if self.id_predictor is None else self.id_predictor
        x = ops.cast(norm_conv(last[0], last[-1], x), ms.float32)
        return x if self.dims == 2 else ops.squeeze(x, 2)
