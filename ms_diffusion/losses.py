"""Errors of a prediction, element by element: (pred, target) of any shape -> the same shape."""

from mindspore import ops


def l1(pred, target):
    """|pred - target|."""
    return ops.abs(pred - target)


def l2(pred, target):
    """(pred - target)^2."""
    return ops.square(pred - target)


def huber(pred, target):
    """Half the square below an error of 1, linear above (Huber 1964; PyTorch's smooth_l1_loss)."""
    error = ops.abs(pred - target)
    return ops.where(error < 1, 0.5 * error * error, error - 0.5)


LOSSES = {"l1": l1, "l2": l2, "huber": huber}
