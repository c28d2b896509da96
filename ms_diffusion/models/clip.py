"""The text encoder of CLIP (Radford et al. 2021, section 2.4), which Stable Diffusion is conditioned on.

Parameter paths are those of transformers' CLIPTextModel, without their first part `text_model`. B, L: texts, tokens of each.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, check_fields
from .attention import LOWEST, heads_first, matmul, matmul_t
from .layers import GELU, Embedding, Linear, name_and_initialise
from .unet_ldm import LayerNorm


@dataclass(frozen=True)
class ClipTextConfig:
    """Configuration of a ClipTextEncoder, by transformers' names; the defaults are those of Stable Diffusion 1."""

    vocab_size: Annotated[int, AT_LEAST_1] = 49408
    """Number of tokens."""
    hidden_size: Annotated[int, AT_LEAST_1] = 768
    """Width of an entry of the context."""
    intermediate_size: Annotated[int, AT_LEAST_1] = 3072
    """Width inside a layer's feed-forward."""
    num_hidden_layers: Annotated[int, AT_LEAST_1] = 12
    """Number of layers. Stable Diffusion 2 has one less than its CLIP, and so takes the next to last layer's output."""
    num_attention_heads: Annotated[int, AT_LEAST_1] = 12
    """Heads of the attention, which the width is divided among."""
    max_position_embeddings: Annotated[int, AT_LEAST_1] = 77
    """Largest length of a text in tokens."""
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the feed-forward: x sigmoid(1.702 x), or GELU."""

    def build(self, seed: int = 0) -> "ClipTextEncoder":
        return ClipTextEncoder(self, seed)


class QuickGELU(nn.Cell):
    """x sigmoid(1.702 x), an approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(1.702 * x)


class CausalAttention(nn.Cell):
    """Multi-head attention of each entry to itself and those before it: x (B, L, dim), mask (L, L) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = [Linear(dim, dim) for _ in range(4)]

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        q = heads_first(self.q_proj(x), self.heads)
        k, v = heads_first(self.k_proj(x), self.heads), heads_first(self.v_proj(x), self.heads)
        out = matmul(ops.softmax(matmul_t(q * self.scale, k) + mask, -1), v)  # (B, h, L, d)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(x.shape))


class FeedForward(nn.Cell):
    """Two linear layers with an activation between them: (B, L, dim) -> the same."""

    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, inner), Linear(inner, dim)
        self.activate = QuickGELU() if activation == "quick_gelu" else GELU()

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)))


class Layer(nn.Cell):
    """Attention and feed-forward, each with a norm before it and a shortcut: x (B, L, dim), mask (L, L) -> (B, L, dim)."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        dim = config.hidden_size
        self.layer_norm1, self.self_attn = LayerNorm(dim), CausalAttention(dim, config.num_attention_heads)
        self.layer_norm2, self.mlp = LayerNorm(dim), FeedForward(dim, config.intermediate_size, config.hidden_act)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Cell):
    """Tokens (B, L) -> the sum of the embeddings of tokens and positions (B, L, dim)."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)
        self.positions = Tensor(np.arange(config.max_position_embeddings, dtype=np.int32))

    def construct(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding(self.positions[: tokens.shape[1]])


class Encoder(nn.Cell):
    """The layers, one after the other."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.layers = nn.CellList([Layer(config) for _ in range(config.num_hidden_layers)])

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class ClipTextEncoder(nn.Cell):
    """Tokens (B, L) int32 in [0, vocab_size), L <= max_position_embeddings -> the context (B, L, hidden_size) float32.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: the width is not divisible among the heads.
    """

    def __init__(self, config: ClipTextConfig = ClipTextConfig(), seed: int = 0):
        super().__init__()
        check_fields(config, "")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not divisible among {config.num_attention_heads} heads")
        self.embeddings, self.encoder = Embeddings(config), Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size)
        length = config.max_position_embeddings
        self.mask = Tensor(np.triu(np.full((length, length), LOWEST, np.float32), 1))
        name_and_initialise(self, seed)

    def construct(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.encoder(self.embeddings(tokens), self.mask[:length, :length])
        return ops.cast(self.final_layer_norm(x), ms.float32)
