"""The diffusion transformer, DiT (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

The layers come first, then the block, then the network. Parameter paths are those of facebookresearch/DiT.
B, N: batch, tokens of an image (H W / patch_size^2).
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, DEPTH, NON_NEGATIVE, POSITIVE, Bounds, check_fields
from .attention import TokenAttention
from .context import PixelConditions, TextEmbedding
from .layers import (
    AdaLayerNorm,
    Embedding,
    GatedSum,
    Identity,
    Linear,
    SinusoidalPositionEmbeddings,
    chunk,
    conv2d,
    name_and_initialise,
)

FREQUENCIES = 256  # sines and cosines of the timestep


def positions(rows: int, columns: int, dim: int) -> np.ndarray:
    """Fixed embeddings of a grid of tokens (rows columns, dim) float32: dim / 4 sines, then cosines, of the column, then of
    the row, whose frequencies fall from 1 to almost 1/10000 (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    row, column = np.indices((rows, columns)).reshape(2, -1, 1)
    parts = [f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, 1).astype(np.float32)


@ops.constexpr
def positions_tensor(rows: int, columns: int, dim: int) -> Tensor:
    return Tensor(positions(rows, columns, dim))


class Mlp(nn.Cell):
    """Two linear layers with a GELU, in its tanh form, between them: (B N, dim) -> the same."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, inner), Linear(inner, dim, "gelu-tanh")

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def modulation(dim: int, parts: int) -> nn.SequentialCell:
    """SiLU and a linear layer: (B, dim) -> (B, parts dim). Linear computes the SiLU; the Identity keeps its number."""
    return nn.SequentialCell(Identity(), Linear(dim, parts * dim, "silu"))


class DiTBlock(nn.Cell):
    """Self-attention and Mlp between norms and gates that depend on the embedding ("adaLN-Zero", section 3.2): x (B N, dim),
    emb (B, dim) -> (B N, dim). With gates of 0 it returns x."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.attn = AdaLayerNorm(1e-6), TokenAttention(dim, heads)
        self.norm2, self.mlp = AdaLayerNorm(1e-6), Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation, self.gated_sum = modulation(dim, 6), GatedSum()

    def construct(self, x: Tensor, emb: Tensor, n: int) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunk(self.adaLN_modulation(emb), 6, 1)  # each (B, dim)
        x = self.gated_sum(x, self.attn(self.norm1(x, scale1, shift1), n), gate1)
        return self.gated_sum(x, self.mlp(self.norm2(x, scale2, shift2)), gate2)


class FinalLayer(nn.Cell):
    """Norm that depends on the embedding, and a linear layer: x (B N, dim), emb (B, dim) -> (B N, dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.norm_final, self.linear = AdaLayerNorm(1e-6), Linear(dim, dim_out)
        self.adaLN_modulation = modulation(dim, 2)

    def construct(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = chunk(self.adaLN_modulation(emb), 2, 1)
        return self.linear(self.norm_final(x, scale, shift))


@dataclass(frozen=True)
class DiTConfig(PixelConditions):
    """Configuration of a DiT."""

    hidden_size: Annotated[int, Bounds(4)] = 192
    """Width of a token; divisible by 4 and by num_heads."""
    depth: Annotated[int, DEPTH] = 6
    """Number of blocks."""
    num_heads: Annotated[int, AT_LEAST_1] = 6
    """Attention heads of a block."""
    mlp_ratio: Annotated[float, POSITIVE] = 4.0
    """Width inside the Mlp of a block as a multiple of hidden_size."""
    patch_size: Annotated[int, AT_LEAST_1] = 2
    """Side in pixels of the patch that becomes a token."""
    channels: Annotated[int, AT_LEAST_1] = 1
    """Image channels: 1 gray, 3 RGB."""
    out_dim: Annotated[int, AT_LEAST_1] | None = None
    """Output channels; None: the image channels."""
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

    @property
    def size_multiple(self) -> int:
        """H and W of the images must be divisible by this."""
        return self.patch_size

    def build(self, seed: int = 0) -> "DiT":
        return DiT(self, seed)


class DiT(nn.Cell):
    """Predict from a noisy image x (B, channels, H, W) at timestep t (B,) int32: -> (B, out_dim, H, W), float32.

    H and W are any multiples of the patch's side: the embeddings of the positions are computed for the size of x. Conditions
    follow t as for a `Unet`. `seed` determines the initial weights, with which the output is 0.

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: hidden_size is not divisible by 4 or by num_heads, classes and captions together, or captions without
            max_length.
    """

    def __init__(self, config: DiTConfig = DiTConfig(), seed: int = 0):
        super().__init__()
        check_fields(config, "")
        dim, self.patch_size, self.channels_out = config.hidden_size, config.patch_size, config.out_dim or config.channels
        if dim % 4 or dim % config.num_heads:
            heads = f"num_heads, {config.num_heads}"
            raise ValueError(f"hidden_size is {dim}: choose a width that is divisible by 4 and by {heads}")
        if config.vocab_size and (config.num_classes is not None or not config.max_length):
            raise ValueError(f"vocab_size is {config.vocab_size}: set max_length too, and num_classes to None")
        self.dim = dim

        # Condition: t and class or caption -> (B, dim)
        self.t_frequencies = SinusoidalPositionEmbeddings(FREQUENCIES, cosines_first=True)
        self.t_embedder, self.y_embedder, self.text_emb = nn.Cell(), None, None
        self.t_embedder.mlp = nn.SequentialCell(Linear(FREQUENCIES, dim), Identity(), Linear(dim, dim, "silu"))
        if config.num_classes is not None:
            self.y_embedder = nn.Cell()
            self.y_embedder.embedding_table = Embedding(config.num_classes + 1, dim)
        if config.vocab_size:
            self.text_emb = TextEmbedding(config.vocab_size, config.max_length, config.text_dim, dim)

        # Tokens
        channels_in = config.channels * (2 if config.self_condition else 1) + config.cond_channels
        self.x_embedder = nn.Cell()
        self.x_embedder.proj = conv2d(channels_in, dim, self.patch_size, stride=self.patch_size)
        self.blocks = nn.CellList([DiTBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)])
        self.final_layer = FinalLayer(dim, self.patch_size**2 * self.channels_out)
        name_and_initialise(self, seed)
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """The initial values of the paper's code: uniform by Glorot & Bengio 2010, eq. 16, small embeddings, and 0 for the
        modulations and the last layer, so that each block is the identity (section 3.2)."""
        rng = np.random.default_rng((seed, 1))
        layers = {path: cell for path, cell in self.cells_and_names() if not path.startswith("text_emb")}
        for path, cell in layers.items():
            if isinstance(cell, nn.Dense | nn.Conv2d):
                shape = cell.weight.shape
                bound = np.sqrt(6 / (shape[0] + np.prod(shape[1:])))
                weight = rng.uniform(-bound, bound, shape)
                if path.startswith("t_embedder"):
                    weight = rng.normal(0, 0.02, shape)
                if "adaLN_modulation" in path or path == "final_layer.linear":
                    weight = np.zeros(shape)
                cell.weight.set_data(Tensor(weight.astype(np.float32)))
                cell.bias.set_data(Tensor(np.zeros(cell.bias.shape, np.float32)))
            elif isinstance(cell, Embedding):
                cell.weight.set_data(Tensor(rng.normal(0, 0.02, cell.weight.shape).astype(np.float32)))

    def has_positions(self, table: np.ndarray) -> bool:
        """Whether a table (1, N, dim) holds the positions of a square image."""
        side = round(np.sqrt(table.size / self.dim))
        return table.shape == (1, side**2, self.dim) and np.allclose(table[0], positions(side, side, self.dim), atol=1e-4)

    def construct(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        # Condition. t is cast once, here: the gradient breaks where an integer t is used in both indexing and arithmetic.
        emb = self.t_embedder.mlp(self.t_frequencies(ops.cast(t, ms.float32)))  #        (B, dim)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder.embedding_table(cond[0])
            cond = cond[1:]
        if self.text_emb is not None:
            emb = emb + self.text_emb(cond[0])
            cond = cond[1:]

        # Patchify
        if len(cond) > 0:
            x = ops.concat((x,) + cond, 1)
        p, h, w = self.patch_size, x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = ops.cast(self.x_embedder.proj(x), ms.float32)  #                             (B, dim, h, w)
        x = x.reshape(-1, self.dim, h * w).transpose(0, 2, 1)  #                         (B, N, dim), N = h w
        x = (x + positions_tensor(h, w, self.dim)).reshape(-1, self.dim)  #              (B N, dim)

        for block in self.blocks:
            x = block(x, emb, h * w)

        # Unpatchify
        x = ops.cast(self.final_layer(x, emb), ms.float32)  #                            (B N, p p out_dim)
        x = x.reshape(-1, h, w, p, p, self.channels_out).transpose(0, 5, 1, 3, 2, 4)  #  (B, out_dim, h, p, w, p)
        return x.reshape(-1, self.channels_out, h * p, w * p)
