"""The trained parameters of a network as one buffer, so that a step on Ascend or a GPU updates them by a few launches,
however many they are. On the CPU one operator of our own does so without a buffer (`kernels.adam`)."""

from collections.abc import Sequence

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ..models.layers import each, split
from .muon import count_of


def flatten(x: Tensor) -> Tensor:
    return x.reshape(-1)


class Slot(nn.Cell):
    """A layer's parameter -> its value in the buffer, in the layer's `dtype`; the gradient is that of the parameter.

    All slots of a type cast and split the same buffer in the same way, which MindSpore merges into one launch (2.10)."""

    def __init__(self, buffer: Parameter, sizes: tuple[int, ...], index: int, shape: tuple[int, ...], dtype: ms.Type):
        super().__init__()
        self.buffer, self.sizes, self.index, self.shape, self.dtype = buffer, sizes, index, shape, dtype

    def construct(self, parameter: Tensor) -> Tensor:
        return split(ops.cast(self.buffer, self.dtype), self.sizes, 0)[self.index].reshape(self.shape)

    def bprop(self, parameter: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.cast(dout, parameter.dtype),)


class Pack:
    """Buffers for the parameters that the layers of `net` can read from one (those with a `weight_slot`), for Adam's moments
    of them and for averages, all in the same order.

    From now on the buffers are trained, and what they hold is stale until `write_back`. What is compiled from now on reads
    the network's weights from the buffer, so copy the network and load its weights before.

    Attributes:
        trained: The parameters that the optimizer trains, the packed ones first.
        members, count: The packed ones, and their number."""

    def __init__(self, net: nn.Cell, optimizer: nn.Adam):
        by_adam = len(optimizer.parameters) - count_of(optimizer)
        wanted, slots = {id(p) for p in optimizer.parameters[:by_adam]}, {}  # Muon needs each matrix by itself
        for _, cell in net.cells_and_names():
            for name, p in cell.parameters_and_names(expand=False):
                if id(p) in wanted and hasattr(cell, f"{name}_slot"):
                    slots[id(p)] = cell, f"{name}_slot"
        self.order = [i for _, i in sorted((id(p) not in slots, i) for i, p in enumerate(optimizer.parameters))]
        self.count, self.trained = len(slots), ms.ParameterTuple([optimizer.parameters[i] for i in self.order])
        self.members = self.trained[: self.count]
        self.sizes = tuple(p.size for p in self.members)
        self.held: list[tuple[Parameter, Sequence[Parameter]]] = []  # (buffer, the parameters that it holds)
        for buffer in self.buffers(self.members):
            for i, p in enumerate(self.members):  # in a tuple, so that the buffer is no parameter of the network
                cell, name = slots[id(p)]
                slot = Slot(buffer, self.sizes, i, p.shape, getattr(cell, "compute_type", ms.float32))
                setattr(cell, name, (slot,))

    def group(self, state: Sequence[Parameter]) -> ms.ParameterTuple:
        """What there is of each of the optimizer's parameters -> the buffer of the packed ones, then the others."""
        state = [state[i] for i in self.order]
        return ms.ParameterTuple([*self.buffers(state[: self.count]), *state[self.count :]])

    def buffers(self, members: Sequence[Parameter]) -> list[Parameter]:
        """The one buffer of these parameters, one for each packed one, made in the first call; none if nothing is packed."""
        if not members:
            return []
        for buffer, held in self.held:
            if held[0] is members[0]:
                return [buffer]
        values = np.concatenate([p.asnumpy().reshape(-1) for p in members])
        buffer = Parameter(Tensor(values), name=f"packed.{members[0].name}", requires_grad=False)
        self.held.append((buffer, members))
        return [buffer]

    def join(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of `trained` -> that of the buffer, then those of the others."""
        if self.count == 0:
            return gradients
        return (ops.concat(each(flatten, gradients[: self.count])),) + gradients[self.count :]

    def write_back(self) -> None:
        """Set the parameters, moments and averages from the buffers."""
        for buffer, members in self.held:
            values = np.split(buffer.asnumpy(), np.cumsum(self.sizes)[:-1])
            for p, value in zip(members, values, strict=True):
                ops.assign(p, Tensor(value.reshape(p.shape)))


def make_pack(net: nn.Cell, optimizer: nn.Adam) -> Pack | None:
    """A pack of the trained parameters of `net`; None on the CPU, where the buffer would only be copied."""
    return None if ms.get_context("device_target") == "CPU" else Pack(net, optimizer)
