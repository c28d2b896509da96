"""What a UNetModel is told, class or text, and the network that is told so (Rombach et al. 2022, section 3.3)."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from mindspore import Tensor, nn, ops

from .layers import Embedding, name_and_initialise
from .unet_ldm import CrossAttention, FeedForward, LayerNorm, UNetModel, UNetModelConfig

CONDITIONS = ("none", "class", "adm", "text")


class ClassEmbedder(nn.Cell):
    """Labels (B,) int32 -> a context of one entry (B, 1, dim)."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.embedding = Embedding(num, dim)

    def construct(self, labels):
        return self.embedding(labels).expand_dims(1)


class TextBlock(nn.Cell):
    """Self-attention and feed-forward, each normalised before and with a shortcut: (B, L, dim) -> the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), CrossAttention(dim, dim, heads, dim // heads)
        self.norm2, self.ff = LayerNorm(dim), FeedForward(dim)

    def construct(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class TextEncoder(nn.Cell):
    """A small transformer over words, trained with the network: tokens (B, L) int32 in [0, words] -> context (B, L, dim)."""

    def __init__(self, vocab_size: int, max_length: int, dim: int, depth: int = 2, heads: int = 4):
        super().__init__()
        self.token_emb, self.pos_emb = Embedding(vocab_size + 1, dim), Embedding(max_length, dim)
        self.positions = Tensor(np.arange(max_length, dtype=np.int32))
        self.blocks = nn.CellList([TextBlock(dim, heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)

    def construct(self, tokens):
        x = self.token_emb(tokens) + self.pos_emb(self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@dataclass(frozen=True)
class LatentUnetConfig(UNetModelConfig):
    """What a LatentUnet is built from."""

    in_channels: int = 2
    """Channels of a latent."""
    model_channels: int = 48
    """Base width; the embedding has four times as many numbers."""
    out_channels: int = 2
    """Channels of the output, those of a latent."""
    num_res_blocks: int = 1
    """ResBlocks of each level on the way down; on the way up there is one more."""
    attention_resolutions: tuple[int, ...] = (2,)
    """Where attention follows each ResBlock, by how far H and W are reduced there: (1, 2) is at full size and a half."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Width of each level as a multiple of model_channels; H and W halve between levels."""
    num_head_channels: int | None = 24
    """Channels of an attention head, which then number as many as fill the width."""
    latent_size: int = 8
    """H and W of a latent."""
    channels: int = 1
    """Image channels of the first stage, which makes the latents."""
    condition: Literal[CONDITIONS] = "class"
    """What the network is told: the class or a text by cross-attention, the class by the timestep's embedding (adm), or
    none."""
    num_classes: int | None = 10
    """Classes that it is told of by class or adm; else None."""
    context_dim: int | None = 64
    """Numbers of each entry of the context, by class or text; else None."""
    vocab_size: int = 0
    """Different words of the texts."""
    max_length: int = 0
    """Words of a text, at most."""
    cond_channels: int = 0
    """Channels of an image that the network is shown beside x."""

    @property
    def null_label(self) -> int | None:
        """What stands for no condition: the label after the last, token 0, or None where there is no condition."""
        return {"none": None, "text": 0}.get(self.condition, self.num_classes)

    def build(self, seed: int = 0) -> "LatentUnet":
        return LatentUnet(self, seed)


class LatentUnet(nn.Cell):
    """A UNetModel and what tells it of class or text: x (B, in_channels, H, W), t (B,) int32 -> (B, out_channels, H, W).

    Conditions follow t, those the network is built for, in this order: labels (B,) int32 in [0, num_classes], where
    num_classes stands for no label, or tokens (B, L) int32, where all 0 is no text; an image (B, cond_channels, H, W) beside
    x. So it has the five ways of CompVis's DiffusionWrapper: none, concat, crossattn, hybrid, adm.

    Raises:
        ValueError: num_classes or context_dim do not go with the condition, or see UNetModel.
    """

    def __init__(self, config: LatentUnetConfig, seed: int = 0):
        super().__init__()
        condition, context_dim = config.condition, config.context_dim
        if (config.num_classes is None) != (condition in ("none", "text")):
            raise ValueError(
                f"condition is {condition!r}, num_classes {config.num_classes}: it goes with class and adm alone"
            )
        if (context_dim is None) != (condition in ("none", "adm")):
            raise ValueError(f"condition is {condition!r}, context_dim {context_dim}: it goes with class and text alone")
        own = {f.name: getattr(config, f.name) for f in fields(UNetModelConfig)}
        own |= {"in_channels": config.in_channels + config.cond_channels, "use_spatial_transformer": context_dim is not None}
        own |= {"num_classes": config.num_classes + 1 if condition == "adm" else None}
        self.unet = UNetModel(UNetModelConfig(**own), seed)
        self.is_adm = condition == "adm"
        self.cond_stage = None
        if condition == "class":
            self.cond_stage = ClassEmbedder(config.num_classes + 1, context_dim)
        if condition == "text":
            self.cond_stage = TextEncoder(config.vocab_size, config.max_length, context_dim)
        if self.cond_stage is not None:
            name_and_initialise(self.cond_stage, seed + 1)
        for path, cell in self.cells_and_names():
            for name, parameter in cell.parameters_and_names(expand=False):
                parameter.name = f"{path}.{name}"

    def construct(self, x, t, *cond):
        context, y = None, None
        if self.cond_stage is not None:
            context, cond = self.cond_stage(cond[0]), cond[1:]
        if self.is_adm:
            y, cond = cond[0], cond[1:]
        if len(cond) > 0:
            x = ops.concat((x,) + cond, 1)
        return self.unet(x, t, context, y)
