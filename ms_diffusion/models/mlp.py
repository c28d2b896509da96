"""Networks for points in the plane: the network of the S-curve experiment, and a better one with residual blocks.

B is the batch size; a point has 2 coordinates.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from mindspore import Tensor, nn, ops

from ..fields import AT_LEAST_1, DEPTH, Bounds, check_fields
from .layers import Embedding, Linear, SinusoidalPositionEmbeddings, check_weights, name_and_initialise, rows


@dataclass(frozen=True)
class MLPConfig:
    """Configuration of an MLP."""

    dim: Annotated[int, AT_LEAST_1] = 128
    """Width of the hidden layers."""
    num_embeddings: Annotated[int, AT_LEAST_1] = 100
    """Timesteps that have an embedding; at least the diffusion's num_timesteps."""

    cond_fields = ()  # names of the conditions that the network takes after t

    def build(self, seed: int = 0) -> "MLP":
        return MLP(self, seed)


class MLP(nn.Cell):
    """The network of the S-curve experiment: x (B, 2), t (B,) int32 in [0, num_embeddings) -> (B, 2).

    Four linear layers with ReLU between them; an embedding of the timestep is added to each hidden layer.

    Raises:
        UserError: a field of the configuration is out of range.
    """

    def __init__(self, config: MLPConfig = MLPConfig(), seed: int = 0):
        super().__init__()
        check_fields(config, "")
        dim = config.dim
        self.linears = nn.CellList([Linear(2, dim), *[Linear(dim, c_out, "relu") for c_out in (dim, dim, 2)]])
        self.step_embeddings = nn.CellList([Embedding(config.num_embeddings, dim) for _ in range(3)])
        name_and_initialise(self, seed)

    def construct(self, x: Tensor, t: Tensor) -> Tensor:
        for i in range(3):
            x = self.linears[i](x, self.step_embeddings[i](t))  # (B, dim)
        return self.linears[3](x)  #                              (B, 2)


class ResidualBlock(nn.Cell):
    """Two linear layers, each after a SiLU, the time embedding between them, and a shortcut (He et al. 2016, fig. 4e):
    x (B, dim), emb (B, dim) -> (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.time = Linear(dim, dim, "silu")
        self.linear1, self.linear2 = Linear(dim, dim, "silu"), Linear(dim, dim, "silu")

    def construct(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.linear2(self.linear1(x, self.time(emb)), x)


@dataclass(frozen=True)
class ResidualMLPConfig:
    """Configuration of a ResidualMLP."""

    dim: Annotated[int, Bounds(4)] = 128
    """Width, an even number."""
    depth: Annotated[int, Bounds(0, DEPTH.high)] = 3
    """Number of residual blocks."""
    frequencies: Annotated[int, Bounds(0, 100)] = 4
    """Number of sines and of cosines per coordinate, with periods 4, 2, 1, ... for data in [-1, 1]; 0: none."""
    num_embeddings: Annotated[int, AT_LEAST_1] = 1000
    """Timesteps that have an embedding; at least the diffusion's num_timesteps."""

    cond_fields = ()  # names of the conditions that the network takes after t

    def build(self, seed: int = 0) -> "ResidualMLP":
        return ResidualMLP(self, seed)


class ResidualMLP(nn.Cell):
    """Residual blocks over sines of the coordinates (Tancik et al. 2020) and of the timestep.

    x (B, 2), t (B,) int32 in [0, num_embeddings) -> (B, 2).

    Raises:
        UserError: a field of the configuration is out of range.
        ValueError: dim is odd.
    """

    def __init__(self, config: ResidualMLPConfig = ResidualMLPConfig(), seed: int = 0):
        super().__init__()
        check_fields(config, "")
        dim, num = config.dim, config.frequencies
        if dim % 2:
            raise ValueError(f"dim is {dim}: it must be even, for an equal number of sines and cosines")
        self.frequencies = Tensor((np.pi / 2 * 2.0 ** np.arange(num)).astype(np.float32))
        check_weights(config.num_embeddings, dim)
        every_t = Tensor(np.arange(config.num_embeddings, dtype=np.float32))
        self.time_embeddings = Tensor(SinusoidalPositionEmbeddings(dim)(every_t).asnumpy())  # once: a sine takes 20 ns
        self.time_mlp = Linear(dim, dim)
        self.first = Linear(2 + 4 * num, dim)
        self.blocks = nn.CellList([ResidualBlock(dim) for _ in range(config.depth)])
        self.last = Linear(dim, 2, "silu")
        name_and_initialise(self, seed)

    def construct(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_mlp(rows(self.time_embeddings, t))  #                (B, dim)
        angles = (x.expand_dims(-1) * self.frequencies).reshape(x.shape[0], -1)  #    (B, 2 frequencies)
        x = self.first(ops.concat((x, ops.sin(angles), ops.cos(angles)), 1))  #       (B, dim)
        for block in self.blocks:
            x = block(x, emb)
        return self.last(x)  #                                                        (B, 2)
