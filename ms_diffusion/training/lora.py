"""Low-rank updates of a trained network (Hu et al. 2021, "LoRA").

The weight W of a layer becomes W_0 + B A (eq. 3): W_0 stays as it is, and A and B, of a small rank, are trained. The network
itself holds the sum, so that its averages, checkpoints, samples and exports are those of any network."""

from collections.abc import Callable, Container
from typing import Literal

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ..models.attention import Attention, LinearAttention, TokenAttention
from ..models.layers import CONVOLUTIONS_AND_LINEAR, freeze, read
from ..models.unet_ldm import AttentionBlock, CrossAttention
from ..randomness import Stream
from ..runtime import UserError

ATTENTION = (Attention, LinearAttention, TokenAttention, AttentionBlock, CrossAttention)
Targets = Literal["attention", "all"]


class Update(nn.Cell):
    """What a layer reads in place of its weight W_0 (n, ...): W_0 + B A.

    A (rank, ...) is drawn as the weight of a new layer is, and B (n, rank, 1...) is 0 at first: the shapes of the two layers
    that PEFT has in their place."""

    def __init__(self, weight: Parameter, rank: int, rng: np.random.Generator):
        super().__init__()
        self.rank, self.shape, bound = rank, weight.shape, np.prod(weight.shape[1:]) ** -0.5
        a, b = (rank, *self.shape[1:]), (self.shape[0], rank, *(1 for _ in self.shape[2:]))
        self.base = Parameter(Tensor(weight.asnumpy()), requires_grad=False)
        self.a = Parameter(Tensor(rng.uniform(-bound, bound, a).astype(np.float32)))
        self.b = Parameter(Tensor(np.zeros(b, np.float32)))
        self.a_slot = self.b_slot = None

    def construct(self, weight: Tensor) -> Tensor:
        a, b = read(self.a, self.a_slot), read(self.b, self.b_slot)
        return self.base + ops.matmul(b.reshape(-1, self.rank), a.reshape(self.rank, -1)).reshape(self.shape)


class LowRank:
    """Updates of the layers of `net`. The rest of it is frozen, but for the parameters named in `whole`, which are trained
    themselves. What is compiled from now on computes with the updates, so copy the network before.

    Args:
        targets: "attention", the projections of all attention layers, or "all", every convolution and linear layer.

    Attributes:
        updates, weights: An `Update` for each such layer, and the parameters of `net` that receive their sums.
        adapters, bases: The trained A and B, with PEFT's names; the W_0.
        moved: The parameters of `net` that change.

    Raises UserError if there is no such layer."""

    def __init__(self, net: nn.Cell, rank: int, targets: Targets, seed: int, whole: Container[str] = ()):
        rng, layers = np.random.default_rng((seed, Stream.LORA)), {}
        for _, cell in net.cells_and_names():
            if targets == "all" or isinstance(cell, ATTENTION):
                layers |= {id(each): each for _, each in cell.cells_and_names() if isinstance(each, CONVOLUTIONS_AND_LINEAR)}
        chosen = [cell for cell in layers.values() if cell.weight.name not in whole]
        if not chosen:
            raise UserError("the network has no attention whose weights were loaded: set --train.lora-targets all")
        updates = [Update(cell.weight, rank, rng) for cell in chosen]
        self.updates, self.weights = nn.CellList(updates), ms.ParameterTuple([cell.weight for cell in chosen])
        for cell, update, weight in zip(chosen, updates, self.weights, strict=True):
            path = weight.name.removesuffix(".weight")
            update.base.name = f"base.{weight.name}"
            update.a.name, update.b.name = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
            cell.weight_slot = (update,)  # in a tuple, so that its parameters are none of the network
        self.adapters = [p for update in updates for p in (update.a, update.b)]
        self.bases = [update.base for update in updates]
        self.moved = [*self.weights, *(p for p in net.get_parameters() if p.name in whole)]
        for p in net.get_parameters():
            p.requires_grad = p.name in whole
        moved = {id(p) for p in self.moved}
        for _, cell in net.cells_and_names():
            if isinstance(cell, CONVOLUTIONS_AND_LINEAR) and moved.isdisjoint(map(id, cell.get_parameters())):
                freeze(cell)  # on the CPU this saves the time of its gradient

    def make_merge(self) -> Callable[[], tuple[Tensor, ...]]:
        """A function for a graph that sets the network's weights to their sums. Its parameters are variables, as those of
        an average are (step.py)."""
        weights, updates = self.weights, self.updates

        def merge():
            done = ()
            for i, update in enumerate(updates):
                done = done + (ops.assign(weights[i], update(weights[i])),)
            return done

        return merge
