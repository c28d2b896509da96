"""Encoders of a class, text or image, and a UNetModel that is conditioned on them (Rombach et al. 2022, section 3.3)."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, DEPTH, NON_NEGATIVE, NOT_EMPTY, check_fields
from .attention import matmul, matmul_t
from .layers import Embedding, Identity, Linear, conv2d, name_and_initialise
from .unet_ldm import CrossAttention, FeedForward, LayerNorm, UNetModel, UNetModelConfig


class ClassEmbedder(nn.Cell):
    """Labels (B,) int32 in [0, num) -> a context with one entry (B, 1, dim)."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.embedding = Embedding(num, dim)

    def construct(self, labels: Tensor) -> Tensor:
        return self.embedding(labels).expand_dims(1)


class TextBlock(nn.Cell):
    """Self-attention and feed-forward, each with a norm before it and a shortcut: (B, L, dim) -> the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), CrossAttention(dim, dim, heads, dim // heads)
        self.norm2, self.ff = LayerNorm(dim), FeedForward(dim)

    def construct(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class TextEncoder(nn.Cell):
    """A small transformer, trained with the network: tokens (B, max_length) in [0, vocab_size] -> (B, max_length, dim)."""

    def __init__(self, vocab_size: int, max_length: int, dim: int, depth: int = 2, heads: int = 4):
        super().__init__()
        if dim < heads:
            raise ValueError(f"context_dim is {dim}: for a text it must be at least {heads}, the number of heads")
        self.token_emb, self.pos_emb = Embedding(vocab_size + 1, dim), Embedding(max_length, dim)
        self.positions = Tensor(np.arange(max_length, dtype=np.int32))
        self.blocks = nn.CellList([TextBlock(dim, heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)

    def construct(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb(self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BERTEmbedder(nn.Cell):
    """The text encoder of latent diffusion (Rombach et al. 2022, section 4.3.1), with the vocabulary of BERT and the layers
    of x-transformers: tokens (B, max_length) in [0, vocab_size) -> (B, max_length, dim); padding is attended to."""

    def __init__(self, vocab_size: int, max_length: int, dim: int, depth: int):
        super().__init__()
        layers = nn.CellList()
        for _ in range(depth):
            attention = CrossAttention(dim, dim, heads=8, dim_head=64)
            attention.to_out = Linear(8 * 64, dim)  # which is no list in the checkpoint's names
            layers.append(nn.CellList([LayerNorm(dim), attention]))
            layers.append(nn.CellList([LayerNorm(dim), FeedForward(dim, gated=False)]))
        self.transformer = nn.Cell()
        self.transformer.token_emb = Embedding(vocab_size, dim)
        self.transformer.pos_emb, self.transformer.attn_layers = nn.Cell(), nn.Cell()
        self.transformer.pos_emb.emb = Embedding(max_length, dim)
        self.transformer.attn_layers.layers = layers
        self.transformer.norm = LayerNorm(dim)
        self.positions = Tensor(np.arange(max_length, dtype=np.int32))

    def construct(self, tokens: Tensor) -> Tensor:
        x = self.transformer.token_emb(tokens) + self.transformer.pos_emb.emb(self.positions)
        for norm, layer in self.transformer.attn_layers.layers:
            x = x + layer(norm(x))
        return self.transformer.norm(x)


def resizing(size: int, factor: float, method: str) -> np.ndarray:
    """The matrix (floor(factor size), size) float32 that resizes an axis as ``torch.nn.functional.interpolate`` does with
    this scale_factor: "nearest", "bilinear", "bicubic" (Keys 1981, a = -0.75) or "area"."""
    length = math.floor(size * factor)
    if not length:
        raise ValueError(f"{size} pixels times {factor:g} is less than one pixel: choose larger images")
    matrix, rows = np.zeros((length, size)), np.arange(length)
    if method == "area":  # the mean of all pixels that an output pixel touches
        for i in rows:
            low, high = i * size // length, -(-(i + 1) * size // length)
            matrix[i, low:high] = 1 / (high - low)
    elif method == "nearest":
        matrix[rows, np.minimum(np.floor(rows / factor), size - 1).astype(int)] = 1
    else:
        at = (rows + 0.5) / factor - 0.5
        at = np.maximum(at, 0) if method == "bilinear" else at
        for offset in range(-1, 3):
            pixel = np.floor(at) + offset
            d = abs(at - pixel)
            near, far = (1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
            weight = np.where(d < 1, near, np.where(d < 2, far, 0)) if method == "bicubic" else np.maximum(1 - d, 0)
            np.add.at(matrix, (rows, np.clip(pixel, 0, size - 1).astype(int)), weight)
    return matrix.astype(np.float32)


@ops.constexpr
def resizing_tensor(size: int, factor: float, method: str) -> Tensor:
    return Tensor(resizing(size, factor, method))


class SpatialRescaler(nn.Cell):
    """Resize a conditioning image `n_stages` times by the factor `multiplier`, then map its channels, if `out_channels` is
    given, by a 1x1 convolution: (B, in_channels, H, W) -> (B, out_channels, H', W').

    Raises:
        ValueError: n_stages is negative, or the method is none of nearest, bilinear, bicubic and area.
    """

    def __init__(self, n_stages: int = 1, method: str = "bilinear", multiplier: float = 0.5, in_channels: int = 3,
            out_channels: int | None = None, bias: bool = False):  # fmt: skip
        super().__init__()
        if n_stages < 0 or method not in ("nearest", "bilinear", "bicubic", "area"):
            known = "n_stages must be at least 0, method nearest, bilinear, bicubic or area"
            raise ValueError(f"n_stages is {n_stages} and method {method!r}: {known}")
        self.n_stages, self.method, self.multiplier = n_stages, method, float(multiplier)
        self.channel_mapper = Identity() if out_channels is None else conv2d(in_channels, out_channels, 1, bias=bias)

    def construct(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            b, c, height, width = x.shape
            x = x.reshape(b * c, height, width)
            x = matmul_t(x, resizing_tensor(width, self.multiplier, self.method).expand_dims(0).tile((b * c, 1, 1)))
            x = matmul(resizing_tensor(height, self.multiplier, self.method).expand_dims(0).tile((b * c, 1, 1)), x)
            x = x.reshape(b, c, x.shape[1], x.shape[2])
        return self.channel_mapper(x)


class PixelConditions:
    """What the conditions of a network of images follow from: the fields that `UnetConfig` and `DiTConfig` share."""

    num_classes: int | None
    vocab_size: int
    cond_channels: int

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or the token that means "no caption"; None for an unconditional network."""
        return 0 if self.vocab_size else self.num_classes

    @property
    def cond_fields(self) -> tuple[str, ...]:
        """Names of the conditions that the network takes after t, in order."""
        first = ("tokens",) if self.vocab_size else ("labels",) * (self.num_classes is not None)
        return first + ("cond_image",) * (self.cond_channels > 0)


class TextEmbedding(nn.Cell):
    """The mean of a `TextEncoder` over the tokens of a caption, for a time embedding: tokens (B, max_length) -> (B,
    dim_out). Tokens of 0, which pad a caption, do not count."""

    def __init__(self, vocab_size: int, max_length: int, dim: int, dim_out: int):
        super().__init__()
        self.encoder, self.proj = TextEncoder(vocab_size, max_length, dim), Linear(dim, dim_out)

    def construct(self, tokens: Tensor) -> Tensor:
        used = ops.cast(tokens != 0, ms.float32).expand_dims(-1)
        total = (self.encoder(tokens) * used).sum(1)
        return self.proj(total / ops.maximum(used.sum(1), Tensor(1.0, ms.float32)))


@dataclass(frozen=True)
class LatentUnetConfig(UNetModelConfig):
    """Configuration of a LatentUnet."""

    in_channels: Annotated[int, AT_LEAST_1] = 2
    """Channels of a latent."""
    model_channels: Annotated[int, AT_LEAST_1] = 48
    """Base width; the embedding is four times as wide."""
    out_channels: Annotated[int, AT_LEAST_1] = 2
    """Channels of the output; equal to those of a latent."""
    num_res_blocks: Annotated[int, DEPTH] = 1
    """ResBlocks per level on the way down; on the way up there is one more."""
    attention_resolutions: tuple[Annotated[int, AT_LEAST_1], ...] = (2,)
    """Reductions of H and W at which attention follows each ResBlock: (1, 2) is at full and at half size."""
    channel_mult: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], NOT_EMPTY] = (1, 2)
    """Width of each level as a multiple of model_channels; H and W halve between levels."""
    num_head_channels: Annotated[int, AT_LEAST_1] | None = 24
    """Channels per attention head; the number of heads follows from the width."""
    latent_size: Annotated[int, AT_LEAST_1] = 8
    """H and W of a latent."""
    channels: Annotated[int, AT_LEAST_1] = 1
    """Channels of the images that the first stage encodes."""
    condition: Literal["none", "class", "adm", "text", "bert", "context"] = "class"
    """The condition: class, text, bert (a text, by CompVis's encoder) or context (rows from outside, such as a frozen text
    encoder's) by cross-attention, adm (the class, added to the time embedding), or none."""
    num_classes: Annotated[int, AT_LEAST_1] | None = 10
    """Number of classes for the conditions class and adm; otherwise None."""
    null_class: bool = True
    """Whether there is one class more, which means "no class" and which guidance needs."""
    context_dim: Annotated[int, AT_LEAST_1] | None = 64
    """Width of a context entry for the conditions class, text, bert and context; otherwise None."""
    vocab_size: Annotated[int, NON_NEGATIVE] = 0
    """Number of different words in the texts."""
    max_length: Annotated[int, NON_NEGATIVE] = 0
    """Maximum number of words in a text."""
    text_depth: Annotated[int, DEPTH] = 2
    """Layers of the text encoder for the conditions text and bert."""
    cond_channels: Annotated[int, NON_NEGATIVE] = 0
    """Channels of a conditioning image that is concatenated to x."""

    @property
    def null_label(self) -> int | None:
        """The value that means "no condition": label num_classes, token 0, or None for a network without such a value, or
        whose null row comes from outside."""
        label = self.num_classes if self.null_class else None
        return {"none": None, "text": 0, "bert": None, "context": None}.get(self.condition, label)

    @property
    def cond_fields(self) -> tuple[str, ...]:
        """Names of the conditions that the network takes after t, in order."""
        first = {"none": (), "text": ("tokens",), "bert": ("tokens",), "context": ("context",)}
        first = first.get(self.condition, ("labels",))
        return first + ("cond_image",) * (self.cond_channels > 0)

    def build(self, seed: int | None = 0) -> "LatentUnet":
        return LatentUnet(self, seed)


class LatentUnet(nn.Cell):
    """A UNetModel with an encoder of its condition: x (B, in_channels, H, W), t (B,) int32 -> (B, out_channels, H, W).

    The conditions of `config.cond_fields` follow t: labels (B,) int32 in [0, num_classes], where num_classes means "no
    class", or tokens (B, max_length) int32, where for a TextEncoder all 0 means "no text", or a context (B, L, context_dim)
    float32; an image (B, cond_channels, H, W), concatenated to x. These are the five modes of CompVis's DiffusionWrapper:
    none, concat, crossattn, hybrid, adm.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: num_classes or context_dim do not fit the condition, and see UNetModel.
    """

    def __init__(self, config: LatentUnetConfig, seed: int | None = 0):
        super().__init__()
        check_fields(config, "")
        condition, context_dim = config.condition, config.context_dim
        if (config.num_classes is None) != (condition not in ("class", "adm")):
            raise ValueError(f"condition is {condition!r}, num_classes {config.num_classes}: set it for class and adm only")
        if (context_dim is None) != (condition in ("none", "adm")):
            kinds = "class, text, bert and context"
            raise ValueError(f"condition is {condition!r}, context_dim {context_dim}: set it for {kinds} only")
        own = {f.name: getattr(config, f.name) for f in fields(UNetModelConfig)}
        own |= {"in_channels": config.in_channels + config.cond_channels, "use_spatial_transformer": context_dim is not None}
        num_labels, dim = (config.num_classes or 0) + config.null_class, context_dim or 0
        words = config.vocab_size, config.max_length, dim, config.text_depth
        own |= {"num_classes": num_labels if condition == "adm" else None}
        self.unet = UNetModel(UNetModelConfig(**own), seed)
        self.is_adm = condition == "adm"
        self.cond_stage, self.takes_context = None, condition == "context"
        if condition == "class":
            self.cond_stage = ClassEmbedder(num_labels, dim)
        if condition == "text":
            self.cond_stage = TextEncoder(*words)
        if condition == "bert":
            self.cond_stage = BERTEmbedder(*words)
        if self.cond_stage is not None:
            name_and_initialise(self.cond_stage, None if seed is None else seed + 1)
        if condition == "bert":  # whose embeddings begin smaller
            for p in (self.cond_stage.transformer.token_emb.weight, self.cond_stage.transformer.pos_emb.emb.weight):
                p.set_data(Tensor(np.float32(0.02) * p.asnumpy()))
        for name, parameter in self.parameters_and_names():
            parameter.name = name

    def construct(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        context, y = None, None
        if self.cond_stage is not None:
            context, cond = self.cond_stage(cond[0]), cond[1:]
        if self.takes_context:
            context, cond = cond[0], cond[1:]
        if self.is_adm:
            y, cond = cond[0], cond[1:]
        if len(cond) > 0:
            x = ops.concat((x,) + cond, 1)
        return self.unet(x, t, context, y)
