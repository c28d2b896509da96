"""The loss of held-out data, which shows when a network begins to learn its training data by heart."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mindspore import Parameter, Tensor, nn, ops

from ..runtime import UserError, check_interrupted, compiled, gather, ranks
from .step import copy_network

Batch = dict[str, np.ndarray]


class Validation:
    """The mean loss of the same batches with any weights of a network. Several ranks share the batches.

    Args:
        average: the network in evaluation mode, of which a copy takes the weights.
        make_loss: make_loss(net) -> a function for the graph, from the fields of a batch to the loss ().
        batches: of equal size; noise and timesteps in them are fixed, so that losses of two steps can be compared."""

    def __init__(self, average: nn.Cell, make_loss: Callable[[nn.Cell], Callable], batches: Sequence[Batch]):
        net = copy_network(average, "validated")
        self.parameters, self.batches, loss_fn = list(net.get_parameters()), batches, make_loss(net)
        self.fields, self.loss = inspect.signature(loss_fn), compiled(loss_fn)

    def __call__(self, weights: Iterable[Parameter]) -> float:
        """Raises UserError if the loss is not finite."""
        for p, value in zip(self.parameters, weights, strict=True):
            ops.assign(p, value)
        rank, world_size = ranks()
        mine = self.batches[rank::world_size]
        total, count = gather(np.array([sum(map(self.loss_of, mine)), len(mine)], np.float64)).sum(0)
        if not math.isfinite(total):
            raise UserError("val_loss is not finite: resume from the last checkpoint with a lower --train.lr")
        return float(total / count)

    def loss_of(self, batch: Batch) -> float:
        check_interrupted()
        bound = self.fields.bind(**{name: Tensor(values) for name, values in batch.items()})
        bound.apply_defaults()
        return float(self.loss(*bound.args).asnumpy())


def in_batches_of(size: int, fields: Batch) -> list[Batch]:
    """Fields (n, ...) as batches of this size, or of n if that is less; rows that are too few for a batch are left out."""
    n = len(next(iter(fields.values())))
    size = min(size, n)
    return [{name: values[i : i + size] for name, values in fields.items()} for i in range(0, n - size + 1, size)]


def even_timesteps(rng: np.random.Generator, T: int, n: int) -> np.ndarray:
    """(n,) int32 in [0, T), evenly spaced, in random order."""
    return rng.permutation((np.arange(n) + 0.5) * T // n).astype(np.int32)
