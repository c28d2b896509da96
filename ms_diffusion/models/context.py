"""Encoders of a class or a text, and a UNetModel that is conditioned on them (Rombach et al. 2022, section 3.3)."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, DEPTH, NON_NEGATIVE, NOT_EMPTY, check_fields
from .layers import Embedding, Linear, name_and_initialise
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
    """Base width, an even number; the embedding is four times as wide."""
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
    condition: Literal["none", "class", "adm", "text"] = "class"
    """The condition: class or text by cross-attention, adm (the class, added to the time embedding), or none."""
    num_classes: Annotated[int, AT_LEAST_1] | None = 10
    """Number of classes for the conditions class and adm; otherwise None."""
    context_dim: Annotated[int, AT_LEAST_1] | None = 64
    """Width of a context entry for the conditions class and text; otherwise None."""
    vocab_size: Annotated[int, NON_NEGATIVE] = 0
    """Number of different words in the texts."""
    max_length: Annotated[int, NON_NEGATIVE] = 0
    """Maximum number of words in a text."""
    cond_channels: Annotated[int, NON_NEGATIVE] = 0
    """Channels of a conditioning image that is concatenated to x."""

    @property
    def null_label(self) -> int | None:
        """The value that means "no condition": label num_classes, token 0, or None for an unconditional network."""
        return {"none": None, "text": 0}.get(self.condition, self.num_classes)

    @property
    def cond_fields(self) -> tuple[str, ...]:
        """Names of the conditions that the network takes after t, in order."""
        first = {"none": (), "text": ("tokens",)}.get(self.condition, ("labels",))
        return first + ("cond_image",) * (self.cond_channels > 0)

    def build(self, seed: int = 0) -> "LatentUnet":
        return LatentUnet(self, seed)


class LatentUnet(nn.Cell):
    """A UNetModel with an encoder of its condition: x (B, in_channels, H, W), t (B,) int32 -> (B, out_channels, H, W).

    The conditions of `config.cond_fields` follow t: labels (B,) int32 in [0, num_classes], where num_classes means "no
    class", or tokens (B, max_length) int32, where all 0 means "no text"; an image (B, cond_channels, H, W), concatenated to
    x. These are the five modes of CompVis's DiffusionWrapper: none, concat, crossattn, hybrid, adm.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: num_classes or context_dim do not fit the condition, and see UNetModel.
    """

    def __init__(self, config: LatentUnetConfig, seed: int = 0):
        super().__init__()
        check_fields(config, "")
        condition, context_dim = config.condition, config.context_dim
        if (config.num_classes is None) != (condition in ("none", "text")):
            raise ValueError(f"condition is {condition!r}, num_classes {config.num_classes}: set it for class and adm only")
        if (context_dim is None) != (condition in ("none", "adm")):
            raise ValueError(f"condition is {condition!r}, context_dim {context_dim}: set it for class and text only")
        own = {f.name: getattr(config, f.name) for f in fields(UNetModelConfig)}
        own |= {"in_channels": config.in_channels + config.cond_channels, "use_spatial_transformer": context_dim is not None}
        num_labels, dim = (config.num_classes or 0) + 1, context_dim or 0  # labels: with that for "no class"
        own |= {"num_classes": num_labels if condition == "adm" else None}
        self.unet = UNetModel(UNetModelConfig(**own), seed)
        self.is_adm = condition == "adm"
        self.cond_stage = None
        if condition == "class":
            self.cond_stage = ClassEmbedder(num_labels, dim)
        if condition == "text":
            self.cond_stage = TextEncoder(config.vocab_size, config.max_length, dim)
        if self.cond_stage is not None:
            name_and_initialise(self.cond_stage, seed + 1)
        for name, parameter in self.parameters_and_names():
            parameter.name = name

    def construct(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        context, y = None, None
        if self.cond_stage is not None:
            context, cond = self.cond_stage(cond[0]), cond[1:]
        if self.is_adm:
            y, cond = cond[0], cond[1:]
        if len(cond) > 0:
            x = ops.concat((x,) + cond, 1)
        return self.unet(x, t, context, y)
