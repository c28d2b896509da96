"""The training step, its learning rate and its moving average, for any network and loss."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .. import kernels
from ..models.layers import each, split
from ..runtime import compiled
from .lora import LowRank
from .muon import MOMENTUM, Muon, count_of, make_muon
from .pack import Pack, flatten

OptimizerName = Literal["adam", "muon"]


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


def copy_network(net: nn.Cell, name: str) -> nn.Cell:
    """A copy of the network whose parameters need no gradient, and have `name` before their names."""
    # It recomputes nothing, and the cells that MindSpore has for that cannot be copied
    recomputing = [cell._recompute_cell for _, cell in net.cells_and_names() if cell._recompute_cell is not None]
    copied = copy.deepcopy(net, {id(cell): None for cell in recomputing})
    for source, parameter in zip(net.get_parameters(), copied.get_parameters(), strict=True):
        parameter.name, parameter.requires_grad = f"{name}.{source.name}", False
    return copied


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
        self.net = copy_network(net, self.name)
        self.sources = ms.ParameterTuple(net.get_parameters())
        self.averages = ms.ParameterTuple(self.net.get_parameters())
        self.targets, self.followed = self.averages, self.sources  # what the step moves, and towards what

    def use(self, pack: Pack) -> None:
        """Average the pack's buffer in place of the parameters in it."""
        averages = {id(source): average for source, average in zip(self.sources, self.averages, strict=True)}
        packed = [averages.pop(id(p)) for p in pack.members]
        others = [p for p in self.sources if id(p) in averages]
        self.targets = ms.ParameterTuple([*pack.buffers(packed), *averages.values()])
        self.followed = ms.ParameterTuple([*pack.buffers(pack.members), *others])

    def follow(self, parameters: Iterable[Parameter]) -> None:
        """Average these of the network's parameters alone; the others never change."""
        averages = {id(source): average for source, average in zip(self.sources, self.averages, strict=True)}
        self.followed = ms.ParameterTuple(parameters)
        self.targets = ms.ParameterTuple([averages[id(p)] for p in self.followed])

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
        adam_betas: tuple[float, float] = (0.9, 0.999), name: OptimizerName = "adam") -> nn.Adam:  # fmt: skip
    """Adam (Kingma & Ba 2014) with PyTorch's epsilon and `WarmupCosine`; it counts its steps in `global_step`.
    `extra_parameters` are trained together with the network's. With the name "muon", `Muon` moves the weights of the
    network's convolutions and linear layers, and Adam the rest."""
    schedule = WarmupCosine(lr, warmup_steps, total_steps, decay)
    options = {"learning_rate": schedule, "beta1": adam_betas[0], "beta2": adam_betas[1], "eps": 1e-8}
    parameters = [*net.trainable_params(), *extra_parameters]
    return Muon(net, parameters, **options) if name == "muon" else nn.Adam(parameters, **options)


adam = ops.Adam()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    return values.reshape(parameter.shape)


def _if_finite(finite: Tensor, value: Tensor) -> Tensor:
    """The value, or 0 in a step that is skipped, where a product with 0 would not be finite."""
    return ops.where(finite, value, 0.0)


def _nan_unless(finite: Tensor, value: Tensor) -> Tensor:
    return ops.where(finite, value, math.nan)


def _add_share(first: Tensor, share: float, total: Tensor, value: Tensor) -> Tensor:
    """Add this share of a value to the total, which the first one begins."""
    return ops.assign(total, ops.where(first, share * value, total + share * value))


def _adam(powers, lr, betas, eps, parameter, moment1, moment2, gradient):
    return adam(parameter, moment1, moment2, powers[0], powers[1], lr, betas[0], betas[1], eps, gradient)


def _decay_first(lr: Tensor, parameter: Tensor, rate: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, after the parameter has decayed at this rate."""
    return ops.depend(gradient, ops.assign(parameter, parameter * (1 - lr * rate)))


def _move_average(weight: Tensor, after: Tensor, average: Tensor, source: Tensor) -> Tensor:
    """Move the average by `weight` towards the value that `source` has once `after` is computed."""
    return ops.assign(average, ops.lerp(average, ops.depend(source, after), weight))


def _mover(ema: EMA, global_step: Parameter) -> Callable[[Tensor, Tensor], Tensor]:
    """A function for the graph, (loss, whether it is finite) -> the loss, after the average has followed what was trained.

    Its parameters are variables here: in a graph, those that are attributes of an object other than a Cell are constants,
    which a card assigns to in vain (MindSpore 2.10)."""
    targets, followed, decay_after = ema.targets, ema.followed, ema.decay_after

    def move(loss, finite):
        n = ops.cast(ops.depend(global_step, loss), ms.float32).reshape(())
        weight = _if_finite(finite, 1 - decay_after(n))
        return ops.depend(loss, each(partial(_move_average, weight, loss), targets, followed))

    return move


def in_one_copy(step: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`step`, compiled for Tensors and arrays, of which the arrays go to the device together, in float32: integers in them
    must be below 2^24. Each copy of its own would cost two synchronisations on Ascend (MindSpore 2.10)."""
    graphs: dict[Any, Callable] = {}
    without_arrays = compiled(step)

    def make_graph(kinds, sizes):
        def graph(joined, *others):
            parts, values = split(joined, sizes, 0), ()
            for place, shape, dtype in kinds:
                value = others[place] if shape is None else ops.cast(parts[place].reshape(shape), dtype)
                values = values + (value,)
            return step(*values)

        return compiled(graph)

    def call(*values):
        arrays, others, kinds = [], [], []
        for value in values:
            is_array = isinstance(value, np.ndarray)
            group = arrays if is_array else others
            kinds.append((len(group), value.shape, getattr(ms, value.dtype.name)) if is_array else (len(group), None, None))
            group.append(value)
        if not arrays:
            return without_arrays(*values)
        key = tuple(map(str, kinds))
        if key not in graphs:
            graphs[key] = make_graph(tuple(kinds), tuple(array.size for array in arrays))
        return graphs[key](Tensor(np.concatenate([np.float32(array).reshape(-1) for array in arrays])), *others)

    return call


def to_device(packed: bool) -> Callable[..., tuple[Tensor, ...]]:
    """A function that puts arrays on the device as Tensors; where parameters are `packed`, in one copy."""

    def same(*tensors):
        return tensors

    return in_one_copy(same) if packed else lambda *arrays: tuple(map(Tensor, arrays))


def make_undo(parameters: Sequence[Parameter]) -> tuple[Callable[[], Any], Callable[..., Any]]:
    """Two functions for what the forward pass itself changes, such as the running statistics of batch norms: remember()
    before a step, and undo(*losses) after it, which restores the parameters where a loss is not finite."""
    copies = ms.ParameterTuple([Parameter(p.asnumpy(), name=f"remembered.{p.name}") for p in parameters])
    kept = ms.ParameterTuple(parameters)

    def restore(finite, parameter, copy):
        return ops.assign(parameter, ops.where(finite, parameter, copy))

    def remember():
        return each(ops.assign, copies, kept)

    def undo(*losses):
        return each(partial(restore, ops.isfinite(ops.addn(losses))), kept, copies)

    return (compiled(remember), compiled(undo)) if parameters else (lambda: (), lambda *losses: ())


def rows_of(value: Any, part: int, parts: int) -> Any:
    """The rows of one of `parts` equal parts of a batch's field (B, ...). What has no rows, such as a weight (), is the same
    in all parts."""
    if not getattr(value, "shape", ()):
        return value
    rows = value.shape[0] // parts
    return value[part * rows : (part + 1) * rows]


def stack_parts(*parts: Any) -> Any:
    """Tensors, or tuples of them, of each part of a batch -> the same with a first axis for the parts."""
    return tuple(map(stack_parts, *parts)) if isinstance(parts[0], tuple) else ops.stack(parts)


def decay_rates(trained: Sequence[Parameter], weight_decay: float, pack: Pack | None) -> ms.ParameterTuple:
    """What each trained parameter decays by, of its shape: 0 for those with less than two axes. With a pack, that of its
    buffer comes first."""
    rates = [np.full(p.shape, weight_decay if p.ndim > 1 else 0.0, np.float32) for p in trained]
    if pack is not None and pack.count:
        rates = [np.concatenate([rate.reshape(-1) for rate in rates[: pack.count]]), *rates[pack.count :]]
    return ms.ParameterTuple(
        [Parameter(Tensor(rate), name=f"weight_decay.{i}", requires_grad=False) for i, rate in enumerate(rates)]
    )


def make_train_step(loss_fn: Callable[..., Any], optimizer: nn.Optimizer, ema: EMA | None = None, *, clip_norm: float = 1.0,
        loss_scaler: ms.amp.LossScaler | None = None, world_size: int = 1, has_aux: bool = False,
        extra_emas: Sequence[EMA] = (), steps_per_call: int = 1,
        pack: Pack | None = None, low_rank: LowRank | None = None,
        weight_decay: float = 0.0, accumulate: int = 1,
        before_part: Callable[[int], Any] | None = None) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """Compile `step(*values, **batch) -> (loss (), gradient norm ())`: the gradients of `loss_fn`, clipping, Adam or
    Muon, EMA.

    A step whose loss or gradients are not finite is skipped: it changes nothing, and its loss is NaN.

    The names of loss_fn's parameters are the fields of a batch. The step takes Tensors and arrays by position or by name; a
    field that is not passed has loss_fn's default, such as None.

    Args:
        clip_norm: the largest global norm of the gradients, which are scaled down to it (Pascanu et al. 2013).
        loss_scaler: `mindspore.amp.DynamicLossScaler` for float16; a step that is skipped lowers the scale.
        world_size: number of ranks; their losses and gradients are averaged, and all skip a step if one has to.
        has_aux: loss_fn returns (loss, aux), and the step (loss, gradient norm, aux). aux, a Tensor of floats or a tuple
            of such, is NaN in a step that is skipped, so that nothing else learns from it.
        extra_emas: averages of the network besides `ema`.
        steps_per_call: K > 1 makes K steps per call, with batches that have an additional first axis (K, ...), and returns
            the losses (K,) and the last gradient norm. For small networks on the CPU, whose steps take less than a call.
        pack: buffers that are trained in place of the network's parameters.
        low_rank: updates that the optimizer trains; a step adds them to the network's weights.
        weight_decay: before Adam's step, parameters are multiplied by 1 - learning rate * weight_decay (AdamW; Loshchilov &
            Hutter 2019, algorithm 2). Only those with two or more axes are: weights of convolutions, linear layers and
            embeddings, but no biases and none of the norms' parameters.
        accumulate: K > 1 sums the gradients of K equal parts of a batch, one after another, so that a step takes the memory
            of a part; fields without an axis are the same in all parts. Where loss_fn is a mean over the rows, the step is
            that of the whole batch, to rounding. Each aux gets a first axis, (K, ...).
        before_part: before_part(k) is called before part k of such a step.

    Raises ValueError if steps_per_call is above 1 together with loss_scaler, has_aux, extra_emas, low_rank or accumulate."""
    if steps_per_call > 1 and (loss_scaler is not None or has_aux or extra_emas or low_rank or accumulate > 1):
        others = "loss_scaler, has_aux, extra_emas, low_rank, accumulate"
        raise ValueError(f"steps_per_call above 1 works without {others}: set it to 1")
    fields = inspect.signature(loss_fn)
    emas, within = [*([] if ema is None else [ema]), *extra_emas], None if low_rank else ema
    moves_all = within is None or {id(p) for p in within.sources} <= {id(p) for p in optimizer.parameters}  # none is frozen
    by_muon = count_of(optimizer)
    is_fused = pack is None and moves_all and not by_muon and kernels.adam_available()
    fused = kernels.adam(optimizer, clip_norm, within, weight_decay) if is_fused else None
    now, later = ([], emas) if low_rank else (emas, extra_emas if fused else [])  # moved in the step's graph, and after it
    trained, state = optimizer.parameters, (optimizer.parameters, optimizer.moment1, optimizer.moment2)
    if pack is not None:
        trained, state = pack.trained, tuple(map(pack.group, state))
        for average in now:
            average.use(pack)
    if low_rank is not None:
        for average in emas:
            average.follow(low_rank.moved)
    parameters = state[0]
    by_adam = len(parameters) - by_muon
    adam_state = [ms.ParameterTuple(values[:by_adam]) for values in state]
    move_matrices = make_muon(*(values[by_adam:] for values in state[:2])) if by_muon else None
    rates = decay_rates(trained, weight_decay, pack) if weight_decay and not fused else None
    sizes = (*(p.size for p in parameters), 1)

    def scaled_loss(*batch):
        loss, aux = loss_fn(*batch) if has_aux else (loss_fn(*batch), ())
        return loss if loss_scaler is None else loss_scaler.scale(loss), aux

    loss_and_gradients = ms.value_and_grad(scaled_loss, None, trained, has_aux=True)

    def step(*batch):
        (loss, aux), gradients = loss_and_gradients(*batch)
        return take(loss, aux, gradients if pack is None else pack.join(gradients))

    def take(loss, aux, gradients):
        if loss_scaler is not None:
            loss = loss_scaler.unscale(loss)
        if world_size > 1:
            loss, gradients = over_ranks(loss, gradients)
        loss, norm = update(loss, gradients) if fused is None else fused_update(loss, gradients)
        if loss_scaler is not None:
            loss = ops.depend(loss, loss_scaler.adjust(ops.isfinite(loss)))
        return (loss, norm, each(partial(_nan_unless, ops.isfinite(loss)), aux)) if has_aux else (loss, norm)

    def over_ranks(loss, gradients):
        """Mean loss and mean gradients, by one reduction. They are finite if those of all ranks are."""
        values = each(flatten, gradients) + (loss.reshape(1),)
        means = split(ops.AllReduce()(ops.concat(values)) / world_size, sizes, 0)
        return means[-1].reshape(()), each(_like, parameters, means[:-1])

    def update(loss, gradients):
        """Clipping, Adam and averages. In a step that is skipped all stays as it is, by arithmetic: an `if` in the graph
        would bring the state to the host and back on Ascend and on a GPU."""
        norm = ops.sqrt(ops.addn(each(_sum_of_squares, gradients)))
        norm = norm if loss_scaler is None else norm / loss_scaler.scale_value
        shrink = ops.clamp(clip_norm / (norm + 1e-6), 0.0, 1.0)
        shrink = shrink if loss_scaler is None else shrink / loss_scaler.scale_value
        lr, betas = optimizer.learning_rate(optimizer.global_step).reshape(()), (optimizer.beta1, optimizer.beta2)
        powers = optimizer.beta1_power * betas[0], optimizer.beta2_power * betas[1]
        finite = ops.isfinite(loss + norm + lr)
        gradients = each(partial(_if_finite, finite), each(partial(ops.mul, shrink), gradients))
        lr, betas = _if_finite(finite, lr), (ops.where(finite, betas[0], 1.0), ops.where(finite, betas[1], 1.0))
        kept = ops.where(finite, powers[0], optimizer.beta1_power), ops.where(finite, powers[1], optimizer.beta2_power)
        if rates is not None:
            gradients = each(partial(_decay_first, lr), parameters, rates, gradients)
        done = ()
        if by_adam:
            done = each(partial(_adam, powers, lr, betas, optimizer.eps), *adam_state, gradients[:by_adam])
        if by_muon:
            done = done + move_matrices(ops.where(finite, MOMENTUM, 1.0), lr, gradients[by_adam:])
        loss = ops.depend(_nan_unless(finite, loss), done)
        ops.assign(optimizer.beta1_power, kept[0])
        ops.assign(optimizer.beta2_power, kept[1])
        ops.assign_add(optimizer.global_step, ops.cast(finite, ms.int32))
        return move_averages(moves_now, loss, finite), norm

    def fused_update(loss, gradients):
        """The same by one operator of the CPU."""
        return fused(loss, gradients if loss_scaler is None else loss_scaler.unscale(gradients))

    if accumulate > 1:
        zeros = [*(np.zeros(p.shape, np.float32) for p in parameters), np.float32(0)]
        places = [Parameter(Tensor(zero), name=f"sum.{i}", requires_grad=False) for i, zero in enumerate(zeros)]
        sums, loss_sum, is_first = ms.ParameterTuple(places[:-1]), places[-1], (Tensor(True), Tensor(False))

    def add_part(first, *batch):
        (loss, aux), gradients = loss_and_gradients(*batch)
        add = partial(_add_share, first, 1 / accumulate)
        done = each(add, sums, gradients if pack is None else pack.join(gradients))
        return ops.depend(add(loss_sum, loss), done), aux

    def take_sums(aux):
        return take(loss_sum, aux, sums)

    merge = low_rank.make_merge() if low_rank else None
    moves_now, moves_later = [[_mover(ema, optimizer.global_step) for ema in group] for group in (now, later)]

    def move_averages(moves, loss, finite):
        """The loss, after the averages have followed the parameters that the step has trained."""
        for move in moves:
            loss = move(loss, finite)
        return loss

    def repeat(count, *batches):
        i, norm, numbers = Tensor(0, ms.int32), Tensor(0.0, ms.float32), Tensor(np.arange(steps_per_call), ms.int32)
        losses = ops.zeros(steps_per_call, ms.float32)
        while i < count:  # a loop in the graph, because both are Tensors
            batch = ()
            for values in batches:
                batch = batch + (None if values is None else ops.gather(values, i, 0),)
            loss, norm = step(*batch)[:2]
            losses, i = ops.where(numbers == i, loss, losses), i + 1
        return losses, norm

    def finish(loss):
        if merge is not None:
            loss = ops.depend(loss, merge())
        return move_averages(moves_later, loss, ops.isfinite(loss))

    whole = step if accumulate == 1 else add_part
    train = compiled(repeat if steps_per_call > 1 else whole) if pack is None else in_one_copy(whole)
    take_all = compiled(take_sums)
    count = (Tensor(steps_per_call, ms.int32),) if steps_per_call > 1 else ()
    # A graph of its own: in one with the fused update MindSpore would update copies
    after = compiled(finish) if later or low_rank else None

    def in_parts(args):
        aux = []
        for k in range(accumulate):
            if before_part is not None:
                before_part(k)
            aux.append(train(is_first[min(k, 1)], *(rows_of(value, k, accumulate) for value in args))[1])
        return take_all(stack_parts(*aux))

    def train_step(*values: Tensor, **batch: Tensor) -> tuple[Tensor, ...]:
        bound = fields.bind(*values, **batch)
        bound.apply_defaults()
        args = [Tensor(value) if pack is None and isinstance(value, np.ndarray) else value for value in bound.args]
        out = train(*count, *args) if accumulate == 1 else in_parts(args)
        if after is not None:
            after(out[0])
        return out

    return train_step
