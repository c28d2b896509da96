"""Muon: weights of convolutions and linear layers move along their momentum, made orthogonal (Jordan et al. 2024, "Muon: an
optimizer for hidden layers in neural networks"), as far as Adam would move them (Liu et al. 2025, arXiv 2502.16982)."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mindspore import Parameter, Tensor, nn, ops

from ..models.layers import CONVOLUTIONS_AND_LINEAR

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, which takes (0, 1] near 1 in so many steps
RMS = 0.2  # of an update at a learning rate of 1, about that of Adam's

times, times_transposed, transposed_times = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)


def matrices(net: nn.Cell) -> list[Parameter]:
    """The trained weights of `net` that are matrices, (n, m) or (n, m, kernel, kernel). Embeddings are none, whose rows
    change one at a time, nor are convolutions in groups."""
    layers = [cell for _, cell in net.cells_and_names() if isinstance(cell, CONVOLUTIONS_AND_LINEAR)]
    weights = {id(cell.weight): cell.weight for cell in layers if getattr(cell, "group", 1) == 1}
    return [weight for weight in weights.values() if weight.requires_grad]


class Muon(nn.Adam):
    """The state of both optimizers, whose steps `make_train_step` takes: Muon those of the matrices of `net`, the last
    `count` parameters, with their momentum in `moment1`, and Adam those of the others."""

    def __init__(self, net: nn.Cell, parameters: Iterable[Parameter], **options: Any):
        found = matrices(net)
        ids = set(map(id, found))
        super().__init__([*(p for p in parameters if id(p) not in ids), *found], **options)
        self.count = len(found)


def count_of(optimizer: nn.Optimizer) -> int:
    """How many of the optimizer's parameters, the last ones, Muon moves."""
    return optimizer.count if isinstance(optimizer, Muon) else 0


def orthogonalise(x: Tensor) -> Tensor:
    """x (n, ...) as a matrix (n, m) with its singular values, but for those near 0, near 1: U S V^T -> about U V^T.

    Each iteration of Jordan et al. multiplies x by a polynomial of x x^T. Here the polynomials, which are small matrices,
    are multiplied first, and x once."""
    matrix = x.reshape(x.shape[0], -1)
    is_tall = matrix.shape[0] > matrix.shape[1]
    size = ops.clamp(ops.square(matrix).sum(), 1e-24, None)
    gram = (transposed_times(matrix, matrix) if is_tall else times_transposed(matrix, matrix)) / size
    one = Tensor(np.eye(min(matrix.shape), dtype=np.float32))
    a, b, c = COEFFICIENTS
    product = one / ops.sqrt(size)
    for i in range(ITERATIONS):
        factor = a * one + times(b * one + c * gram, gram)
        product = times(factor, product)
        if i < ITERATIONS - 1:
            gram = times(times(factor, gram), factor)
    return (times(matrix, product) if is_tall else times(product, matrix)).reshape(x.shape)


def muon(momentum: Tensor, lr: Tensor, parameter: Tensor, velocity: Tensor, gradient: Tensor) -> Tensor:
    """One step of a matrix, with Nesterov's momentum: its velocity and then itself move. A step with lr 0, momentum 1 and
    gradient 0 changes nothing."""
    moved = momentum * velocity + gradient
    update = orthogonalise(gradient + momentum * moved)
    rows = parameter.shape[0]
    scale = RMS * max(rows, parameter.size // rows) ** 0.5
    update = ops.depend(update, ops.assign(velocity, moved))
    return ops.assign(parameter, parameter - lr * scale * update)
