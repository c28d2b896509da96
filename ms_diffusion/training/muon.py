"""Muon: weights of convolutions and linear layers move along their momentum, made orthogonal (Jordan et al. 2024, "Muon: an
optimizer for hidden layers in neural networks"), as far as Adam would move them (Liu et al. 2025, arXiv 2502.16982)."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ..models.layers import CONVOLUTIONS_AND_LINEAR, each

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, which takes (0, 1] near 1 in so many steps
RMS = 0.2  # of an update at a learning rate of 1, about that of Adam's

times, times_transposed, transposed_times = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
times_each = ops.BatchMatMul()


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


def make_orthogonalise(shapes: Sequence[tuple[int, ...]]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A function of matrices (n, ...) of these shapes. Their singular values, but for those near 0, come near 1: U S V^T ->
    about U V^T.

    Each iteration of Jordan et al. multiplies x by a polynomial of x x^T. Here the polynomials are multiplied first, all
    those of one size by one operator, and x once."""
    sides = [min(n, math.prod(others)) for n, *others in shapes]
    groups = [tuple(i for i, other in enumerate(sides) if other == side) for side in sorted(set(sides))]
    unstacks = tuple((group, ops.Unstack(0, len(group))) for group in groups)
    order = sum(groups, ())
    places = tuple(map(order.index, range(len(order))))

    def orthogonalise(values):
        grams, products = each(_gram, values), ()
        for group, unstack in unstacks:
            products = products + tuple(unstack(_polynomials(ops.stack([grams[i] for i in group]))))
        return each(_times_polynomial, values, tuple([products[place] for place in places]))

    return orthogonalise


def _gram(x):
    """x x^T or x^T x, the smaller one."""
    matrix = x.reshape(x.shape[0], -1)
    return transposed_times(matrix, matrix) if _is_tall(matrix) else times_transposed(matrix, matrix)


def _polynomials(grams):
    """What each x is multiplied by: (k, n, n) -> (k, n, n)."""
    one = Tensor(np.eye(grams.shape[1], dtype=np.float32))
    size = ops.clamp((grams * one).sum((1, 2), keepdims=True), 1e-24, None)  # of x, squared
    grams = grams / size
    a, b, c = COEFFICIENTS
    product = one / ops.sqrt(size)
    for i in range(ITERATIONS):
        factor = a * one + times_each(b * one + c * grams, grams)
        product = times_each(factor, product)
        if i < ITERATIONS - 1:
            grams = times_each(times_each(factor, grams), factor)
    return product


def _times_polynomial(x, product):
    matrix = x.reshape(x.shape[0], -1)
    return (times(matrix, product) if _is_tall(matrix) else times(product, matrix)).reshape(x.shape)


def _is_tall(matrix):
    return matrix.shape[0] > matrix.shape[1]


def make_muon(parameters: Sequence[Parameter], velocities: Sequence[Parameter]) -> Callable:
    """move(momentum, lr, gradients): one step of the matrices, with Nesterov's momentum. Their velocities and then they
    themselves move. A step with lr 0, momentum 1 and gradients of 0 changes nothing."""
    orthogonalise = make_orthogonalise([p.shape for p in parameters])
    parameters, velocities = ParameterTuple(parameters), ParameterTuple(velocities)
    scales = tuple(RMS * max(p.shape[0], p.size // p.shape[0]) ** 0.5 for p in parameters)

    def move(momentum, lr, gradients):
        moved = each(partial(_add, momentum), velocities, gradients)
        updates = orthogonalise(each(partial(_add, momentum), moved, gradients))
        return each(partial(_move, lr), parameters, velocities, moved, updates, scales)

    return move


def _add(momentum, velocity, gradient):
    return momentum * velocity + gradient


def _move(lr, parameter, velocity, moved, update, scale):
    update = ops.depend(update, ops.assign(velocity, moved))
    return ops.assign(parameter, parameter - lr * scale * update)
