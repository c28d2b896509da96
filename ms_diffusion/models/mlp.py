"""Networks for points in the plane: the S-curve experiment's, and one with residual blocks that does better.

B points of 2 numbers. Written small to large.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from mindspore import Tensor, nn, ops

from .layers import Embedding, Linear, SinusoidalPositionEmbeddings, name_and_initialise


@dataclass(frozen=True)
class MLPConfig:
    """What an MLP is built from."""

    dim: int = 128
    """Width of the hidden layers."""
    num_embeddings: int = 100
    """Timesteps that it has embeddings for; at least the diffusion's."""

    num_classes: ClassVar[None] = None  # as a Unet's, for the programs
    null_label: ClassVar[None] = None
    self_condition: ClassVar[bool] = False

    def build(self, seed: int = 0) -> "MLP":
        return MLP(**asdict(self), seed=seed)


class MLP(nn.Cell):
    """Four linear layers with ReLU between, each hidden one with an embedding of the timestep added: the network of the
    S-curve experiment. x (B, 2), t (B,) int32 in [0, num_embeddings) -> (B, 2). The arguments are MLPConfig's.

    Raises:
        ValueError: dim or timesteps below 1.
    """

    def __init__(self, dim: int = 128, num_embeddings: int = 100, seed: int = 0):
        super().__init__()
        if dim < 1 or num_embeddings < 1:
            raise ValueError(f"an MLP of width {dim} for {num_embeddings} num_embeddings: both must be at least 1")
        widths = [Linear(2, dim), Linear(dim, dim, "relu"), Linear(dim, dim, "relu"), Linear(dim, 2, "relu")]
        self.linears = nn.CellList(widths)
        self.step_embeddings = nn.CellList([Embedding(num_embeddings, dim) for _ in range(3)])
        name_and_initialise(self, seed)

    def construct(self, x, t):
        for i in range(3):
            x = self.linears[i](x, self.step_embeddings[i](t))  # (B, dim)
        return self.linears[3](x)  #                              (B, 2)


class ResidualBlock(nn.Cell):
    """Two linear layers with SiLU before each, the time embedding between them, and a shortcut (He et al. 2016, fig. 4e)."""

    def __init__(self, dim: int):
        super().__init__()
        self.time = Linear(dim, dim, "silu")
        self.linear1, self.linear2 = Linear(dim, dim, "silu"), Linear(dim, dim, "silu")

    def construct(self, x, emb):
        return self.linear2(self.linear1(x, self.time(emb)), x)


@dataclass(frozen=True)
class ResidualMLPConfig:
    """What a ResidualMLP is built from."""

    dim: int = 128
    """Width, an even number."""
    depth: int = 3
    """Residual blocks."""
    frequencies: int = 4
    """Sines and cosines of each coordinate: of periods 4, 2, 1, ... where the data have -1 to 1; 0 is none."""
    num_embeddings: int = 1000
    """Timesteps that it has embeddings for; at least the diffusion's."""

    num_classes: ClassVar[None] = None
    null_label: ClassVar[None] = None
    self_condition: ClassVar[bool] = False

    def build(self, seed: int = 0) -> "ResidualMLP":
        return ResidualMLP(**asdict(self), seed=seed)


class ResidualMLP(nn.Cell):
    """Residual blocks over sines of the coordinates (Tancik et al. 2020) and of the timestep.

    x (B, 2), t (B,) int32 in [0, num_embeddings) -> (B, 2). The arguments are ResidualMLPConfig's.

    Raises:
        ValueError: dim is not even and at least 4, depth or frequencies are below 0, timesteps below 1.
    """

    def __init__(self, dim: int = 128, depth: int = 3, frequencies: int = 4, num_embeddings: int = 1000, seed: int = 0):
        super().__init__()
        if dim < 4 or dim % 2 or depth < 0 or frequencies < 0 or num_embeddings < 1:
            raise ValueError(
                f"dim {dim} must be even, at least 4; depth {depth} and frequencies {frequencies} at least 0, timesteps "
                f"{num_embeddings} at least 1"
            )
        self.frequencies = Tensor((np.pi / 2 * 2.0 ** np.arange(frequencies)).astype(np.float32))
        every_t = Tensor(np.arange(num_embeddings, dtype=np.float32))
        self.time_embeddings = Tensor(SinusoidalPositionEmbeddings(dim)(every_t).asnumpy())  # once: a sine takes 20 ns
        self.time_mlp = Linear(dim, dim)
        self.first = Linear(2 + 4 * frequencies, dim)
        self.blocks = nn.CellList([ResidualBlock(dim) for _ in range(depth)])
        self.last = Linear(dim, 2, "silu")
        name_and_initialise(self, seed)

    def construct(self, x, t):
        emb = self.time_mlp(ops.gather(self.time_embeddings, t, 0))  #                (B, dim)
        angles = (x.expand_dims(-1) * self.frequencies).reshape(x.shape[0], -1)  #    (B, 2 frequencies)
        x = self.first(ops.concat((x, ops.sin(angles), ops.cos(angles)), 1))  #       (B, dim)
        for block in self.blocks:
            x = block(x, emb)
        return self.last(x)  #                                                        (B, 2)
