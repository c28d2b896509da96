"""The training step, its learning rate and its moving average. Nothing here knows what is being trained."""

import copy
import math
from functools import partial

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from .. import kernels
from ..runtime import compiled


class WarmupCosine(nn.learning_rate_schedule.LearningRateSchedule):
    """Learning rate: linear from 0 to `lr` in `warmup_steps`, then half a cosine to 0 at `total_steps`, and 0 after; or,
    without `decay`, `lr` from there on."""

    def __init__(self, lr: float, warmup_steps: int, total_steps: int, decay: bool = True):
        super().__init__()
        self.lr, self.warmup_steps, self.total_steps, self.decay = lr, warmup_steps, total_steps, decay

    def construct(self, step):
        step = ops.cast(step, ms.float32)
        warmup = ops.clamp((step + 1) / (self.warmup_steps + 1), 0.0, 1.0)
        if not self.decay:
            return self.lr * warmup
        progress = ops.clamp((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        return self.lr * warmup * 0.5 * (1 + ops.cos(math.pi * progress))


class EMA:
    """A copy of a network, `.net`, that follows it as an exponential moving average.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n steps (TensorFlow's ExponentialMovingAverage), so that
    the random initial weights are soon forgotten.

    With a `length` it is a power function's average instead, whose weights have a standard deviation of `length` times the
    steps so far (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", eqs. 3 to 5). Of
    two such, saved now and then, averages of other lengths can be made after training: `average_after_training`.
    """

    def __init__(self, net: nn.Cell, decay: float = 0.999, length: float | None = None):
        self.decay, self.power = decay, None if length is None else power_of_length(length) + 1
        self.name = "ema" if length is None else f"ema-{length:g}"
        self.net = copy.deepcopy(net)
        self.sources = ms.ParameterTuple(net.get_parameters())
        self.averages = ms.ParameterTuple(self.net.get_parameters())
        for source, average in zip(self.sources, self.averages, strict=True):
            average.name = f"{self.name}.{source.name}"
            average.requires_grad = False

    def decay_after(self, n):
        """The decay of step n, a float32 Tensor that counts from 1."""
        if self.power is not None:
            return ops.pow(1 - 1 / ops.clamp(n, 1.0, None), self.power)
        return ops.clamp((1 + n) / (10 + n), 0.0, self.decay)


def power_of_length(length: float) -> float:
    """gamma of the average with weights t^gamma that is so long (Karras et al. 2024, eq. 5 solved): 0.1 -> 6.94.

    Raises:
        ValueError: length is not between 0 and 0.289, the length of the plain mean.
    """
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the length of an average is {length}: choose above 0 and below 0.289, say 0.05")
    square = length**-2
    return float(max(np.roots([1, 7, 16 - square, 12 - square]).real))


def average_after_training(steps, lengths, step: int, length: float) -> np.ndarray:
    """Coefficients (N,) with which N saved averages, of these `steps` and `lengths`, add up to nearly the average of this
    `length` at `step`: least squares between the functions that weigh the weights (Karras et al. 2024, section 3.2)."""

    def product(step_a, gamma_a, step_b, gamma_b):  # of two such functions, integrated
        ratio = np.minimum(step_a / step_b, step_b / step_a) ** np.where(step_a < step_b, gamma_b, gamma_a)
        scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
        return scale * ratio / np.maximum(step_a, step_b)

    steps, gammas = np.array(steps, np.float64), np.array([power_of_length(each) for each in lengths])
    matrix = product(steps[:, None], gammas[:, None], steps, gammas)
    wanted = product(steps, gammas, step, power_of_length(length))
    return np.linalg.lstsq(matrix, wanted, rcond=None)[0]


def make_optimizer(
    net: nn.Cell, lr: float, warmup_steps: int, total_steps: int, others=(), decay: bool = True, betas=(0.9, 0.999)
) -> nn.Adam:
    """Adam (Kingma & Ba 2014) with PyTorch's defaults and `WarmupCosine`; it counts its steps in `global_step`.

    `others` are parameters that are trained besides the network's.
    """
    schedule = WarmupCosine(lr, warmup_steps, total_steps, decay)
    parameters = [*net.trainable_params(), *others]
    return nn.Adam(parameters, learning_rate=schedule, beta1=betas[0], beta2=betas[1], eps=1e-8)


# Over all gradients by HyperMap: list comprehensions made the step compile in 38 s instead of 5 (MindSpore 2.10).
each = ops.HyperMap()
sum_of_squares, scale, follow = (ops.MultitypeFuncGraph(name) for name in ("sum_of_squares", "scale", "follow"))


@sum_of_squares.register("Tensor")
def _sum_of_squares(gradient):
    return ops.square(gradient).sum()


@scale.register("Tensor", "Tensor")
def _scale(factor, gradient):
    return gradient * factor


@follow.register("Tensor", "Tensor", "Tensor", "Tensor")
def _follow(decay, after, average, source):
    """Move the average to the source's value after `after`."""
    new = ops.depend(source, after)
    return ops.assign(average, new + decay * (average - new))


def make_train_step(
    loss_fn,
    optimizer,
    ema: EMA | None = None,
    clip_norm: float = 1.0,
    loss_scaler=None,
    world_size: int = 1,
    has_aux: bool = False,
    extra_emas=(),
    steps_per_call: int = 1,
):
    """Compile `step(*batch) -> (loss (), gradient norm ())`: gradients of `loss_fn(*batch)`, clip, Adam, EMA.

    Args:
        clip_norm: the gradients' global norm is scaled down to this (Pascanu et al. 2013).
        loss_scaler: `mindspore.amp.DynamicLossScaler` for float16; a step that overflows is skipped.
        world_size: number of devices, whose gradients are averaged.
        has_aux: loss_fn returns (loss, more), and the step (loss, gradient norm, more).
        extra_emas: other averages that follow the network besides `ema`.
        steps_per_call: K > 1 makes K steps in one call, of batches with a further, first axis (K, ...), and returns their
            mean loss and the last gradient norm; a small network's step is shorter than the way into the graph. For
            float32, without has_aux and extra_emas.
    """
    parameters = optimizer.parameters
    reduce_gradients = nn.DistributedGradReducer(parameters, mean=True, degree=world_size) if world_size > 1 else None

    def scaled_loss(*batch):
        loss, aux = loss_fn(*batch) if has_aux else (loss_fn(*batch), ())
        return loss if loss_scaler is None else loss_scaler.scale(loss), aux

    loss_and_gradients = ms.value_and_grad(scaled_loss, None, parameters, has_aux=True)
    fused = kernels.adam(optimizer, clip_norm, ema) if kernels.adam_available() else None

    def update(loss, gradients):
        if fused is not None:
            return loss, fused(gradients)
        norm = ops.sqrt(ops.addn(each(sum_of_squares, gradients)))
        shrink = ops.clamp(clip_norm / (norm + 1e-6), 0.0, 1.0)
        loss = ops.depend(loss, optimizer(each(partial(scale, shrink), gradients)))
        if ema is not None:
            loss = follow_network(ema, loss)
        return loss, norm

    def follow_network(average, loss):
        n = ops.cast(ops.depend(optimizer.global_step, loss), ms.float32).reshape(())
        return ops.depend(loss, each(partial(follow, average.decay_after(n), loss), average.averages, average.sources))

    def step(*batch):
        (loss, aux), gradients = loss_and_gradients(*batch)
        if reduce_gradients is not None:
            gradients = reduce_gradients(gradients)
        if loss_scaler is None:
            loss, norm = update(loss, gradients)
        else:
            loss = loss_scaler.unscale(loss)
            finite = ms.amp.all_finite(gradients)
            norm = loss * 0
            if finite:
                loss, norm = update(loss, loss_scaler.unscale(gradients))
            loss = ops.depend(loss, loss_scaler.adjust(finite))
        return (loss, norm, aux) if has_aux else (loss, norm)

    def repeat(count, *batches):
        i, total, norm = Tensor(0, ms.int32), Tensor(0.0, ms.float32), Tensor(0.0, ms.float32)
        while i < count:  # a loop in the graph, since both are Tensors
            batch = ()
            for values in batches:
                batch = batch + (ops.gather(values, i, 0),)
            loss, norm = step(*batch)
            total, i = total + loss, i + 1
        return total / steps_per_call, norm

    if steps_per_call > 1:
        run, count = compiled(repeat), Tensor(steps_per_call, ms.int32)
        return lambda *batches: run(count, *batches)
    if not extra_emas:
        return compiled(step)

    def follow_more(loss):
        for average in extra_emas:
            loss = follow_network(average, loss)
        return loss

    train, follow_after = compiled(step), compiled(follow_more)  # in one graph the fused update would change copies

    def step_and_follow(*batch):
        out = train(*batch)
        follow_after(out[0])
        return out

    return step_and_follow
