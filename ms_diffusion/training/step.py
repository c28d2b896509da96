"""The training step, its learning rate and its moving average, for any network and loss."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .. import kernels
from ..runtime import compiled


class WarmupCosine(nn.learning_rate_schedule.LearningRateSchedule):
    """Learning rate: linear from 0 to `lr` in `warmup_steps`, then half a cosine to 0 at `total_steps`, and 0 after it.
    Without `decay` the rate stays `lr` after the warm-up."""

    def __init__(self, lr: float, warmup_steps: int, total_steps: int, decay: bool = True):
        super().__init__()
        self.lr, self.warmup_steps, self.total_steps, self.decay = lr, warmup_steps, total_steps, decay

    def construct(self, step: Tensor) -> Tensor:
        step = ops.cast(step, ms.float32)
        warmup = ops.clamp((step + 1) / (self.warmup_steps + 1), 0.0, 1.0)
        if not self.decay:
            return self.lr * warmup
        progress = ops.clamp((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        return self.lr * warmup * 0.5 * (1 + ops.cos(math.pi * progress))


class EMA:
    """An exponential moving average of a network's weights; `.net` is the copy of the network that has them.

    The decay after n steps is min(decay, (1 + n) / (10 + n)) (TensorFlow's ExponentialMovingAverage), so the random initial
    weights are soon forgotten.

    With `length` it is the average of a power function instead, whose weights over time have a standard deviation of
    `length` times the steps so far (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
    eqs. 3 to 5). `average_after_training` combines saved averages of two lengths to other lengths."""

    def __init__(self, net: nn.Cell, decay: float = 0.999, length: float | None = None):
        self.decay, self.power = decay, None if length is None else power_of_length(length) + 1
        self.name = "ema" if length is None else f"ema-{length:g}"
        self.net = copy.deepcopy(net)
        self.sources = ms.ParameterTuple(net.get_parameters())
        self.averages = ms.ParameterTuple(self.net.get_parameters())
        for source, average in zip(self.sources, self.averages, strict=True):
            average.name = f"{self.name}.{source.name}"
            average.requires_grad = False

    def decay_after(self, n: Tensor) -> Tensor:
        """The decay in step n, a float32 Tensor; the first step is 1."""
        if self.power is not None:
            return ops.pow(1 - 1 / ops.clamp(n, 1.0, None), self.power)
        return ops.clamp((1 + n) / (10 + n), 0.0, self.decay)


def power_of_length(length: float) -> float:
    """The gamma of the average with weights t^gamma that has this length (Karras et al. 2024, eq. 5 solved): 0.1 -> 6.94.
    Raises ValueError if length is not between 0 and 0.289, the length of the plain mean."""
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the length of an average is {length}: choose a value above 0 and below 0.289, for example 0.05")
    square = length**-2
    return float(max(np.roots([1, 7, 16 - square, 12 - square]).real))


def average_after_training(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> np.ndarray:
    """The coefficients (N,) with which N averages, saved at `steps` with `lengths`, sum to nearly the average of `length` at
    `step`: least squares between the functions of time that weight the weights (Karras et al. 2024, section 3.2)."""

    def product(step_a, gamma_a, step_b, gamma_b):  # integral of two such functions' product
        ratio = np.minimum(step_a / step_b, step_b / step_a) ** np.where(step_a < step_b, gamma_b, gamma_a)
        scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
        return scale * ratio / np.maximum(step_a, step_b)

    times, gammas = np.array(steps, np.float64), np.array([power_of_length(each) for each in lengths])
    matrix = product(times[:, None], gammas[:, None], times, gammas)
    target = product(times, gammas, step, power_of_length(length))
    return np.linalg.lstsq(matrix, target, rcond=None)[0]


def make_optimizer(net: nn.Cell, lr: float, warmup_steps: int, total_steps: int, *,
        extra_parameters: Iterable[Parameter] = (), decay: bool = True,
        adam_betas: tuple[float, float] = (0.9, 0.999)) -> nn.Adam:  # fmt: skip
    """Adam (Kingma & Ba 2014) with PyTorch's epsilon and `WarmupCosine`; it counts its steps in `global_step`.
    `extra_parameters` are trained together with the network's."""
    schedule = WarmupCosine(lr, warmup_steps, total_steps, decay)
    parameters = [*net.trainable_params(), *extra_parameters]
    return nn.Adam(parameters, learning_rate=schedule, beta1=adam_betas[0], beta2=adam_betas[1], eps=1e-8)


# HyperMap loops over all gradients: with list comprehensions the step compiled in 38 s instead of 5 (MindSpore 2.10).
each = ops.HyperMap()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


def _move_average(decay: Tensor, after: Tensor, average: Tensor, source: Tensor) -> Tensor:
    """Update the average with the value that `source` has once `after` is computed."""
    new = ops.depend(source, after)
    return ops.assign(average, new + decay * (average - new))


def make_train_step(loss_fn: Callable[..., Any], optimizer: nn.Optimizer, ema: EMA | None = None, *, clip_norm: float = 1.0,
        loss_scaler: ms.amp.LossScaler | None = None, world_size: int = 1, has_aux: bool = False,
        extra_emas: Sequence[EMA] = (), steps_per_call: int = 1) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """Compile `step(*values, **batch) -> (loss (), gradient norm ())`: the gradients of `loss_fn`, clipping, Adam, EMA.

    The names of loss_fn's parameters are the fields of a batch. The step takes Tensors by position or by name; a field that
    is not passed has loss_fn's default, such as None.

    Args:
        clip_norm: the largest global norm of the gradients, which are scaled down to it (Pascanu et al. 2013).
        loss_scaler: `mindspore.amp.DynamicLossScaler` for float16; a step with an overflow is skipped.
        world_size: number of devices; their gradients are averaged.
        has_aux: loss_fn returns (loss, aux), and the step (loss, gradient norm, aux).
        extra_emas: averages of the network besides `ema`.
        steps_per_call: K > 1 makes K steps per call, with batches that have an additional first axis (K, ...), and returns
            the mean loss and the last gradient norm. For small networks, whose steps take less time than a call.

    Raises ValueError if steps_per_call is above 1 together with loss_scaler, has_aux or extra_emas."""
    if steps_per_call > 1 and (loss_scaler is not None or has_aux or extra_emas):
        raise ValueError("steps_per_call above 1 works without loss_scaler, has_aux and extra_emas only: set it to 1")
    fields = inspect.signature(loss_fn)
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
        norm = ops.sqrt(ops.addn(each(_sum_of_squares, gradients)))
        shrink = ops.clamp(clip_norm / (norm + 1e-6), 0.0, 1.0)
        loss = ops.depend(loss, optimizer(each(partial(ops.mul, shrink), gradients)))
        return (loss if ema is None else update_average(ema, loss)), norm

    def update_average(average, loss):
        n = ops.cast(ops.depend(optimizer.global_step, loss), ms.float32).reshape(())
        moved = each(partial(_move_average, average.decay_after(n), loss), average.averages, average.sources)
        return ops.depend(loss, moved)

    def step(*batch):
        (loss, aux), gradients = loss_and_gradients(*batch)
        if reduce_gradients is not None:
            gradients = reduce_gradients(gradients)
        if loss_scaler is None:
            loss, norm = update(loss, gradients)
        else:
            loss, finite = loss_scaler.unscale(loss), ms.amp.all_finite(gradients)
            norm = loss * 0
            if finite:
                loss, norm = update(loss, loss_scaler.unscale(gradients))
            loss = ops.depend(loss, loss_scaler.adjust(finite))
        return (loss, norm, aux) if has_aux else (loss, norm)

    def repeat(count, *batches):
        i, total, norm = Tensor(0, ms.int32), Tensor(0.0, ms.float32), Tensor(0.0, ms.float32)
        while i < count:  # a loop in the graph, because both are Tensors
            batch = ()
            for values in batches:
                batch = batch + (None if values is None else ops.gather(values, i, 0),)
            loss, norm = step(*batch)[:2]
            total, i = total + loss, i + 1
        return total / steps_per_call, norm

    def update_extra_averages(loss):
        for average in extra_emas:
            loss = update_average(average, loss)
        return loss

    train = compiled(repeat if steps_per_call > 1 else step)
    count = (Tensor(steps_per_call, ms.int32),) if steps_per_call > 1 else ()
    # A graph of its own: in one with the fused update MindSpore would update copies
    after = compiled(update_extra_averages) if extra_emas else None

    def train_step(*values: Tensor, **batch: Tensor) -> tuple[Tensor, ...]:
        bound = fields.bind(*values, **batch)
        bound.apply_defaults()
        out = train(*count, *bound.args)
        if after is not None:
            after(out[0])
        return out

    return train_step
